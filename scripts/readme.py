"README.md from nbs/index.ipynb: its markdown, with the site's conveniences turned into plain GitHub markdown"
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The text of README.md; pictures are read from nbs/images, front matter is dropped"
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(''.join(c['source']).strip() for c in cells if c['cell_type'] == 'markdown')
    text = re.sub(r'^---\n.*?\n---\n', '', text, flags=re.S)
    text = re.sub(r'\]\(images/', '](nbs/images/', text)
    text = re.sub(r'\]\((\d\d\w*_\w+\.ipynb)\)', r'](nbs/\1)', text)
    return '<!-- made from nbs/index.ipynb by make readme -->\n\n' + text.strip() + '\n'


if __name__ == '__main__':
    target = ROOT / 'README.md'
    if '--check' in sys.argv: sys.exit(0 if target.read_text(encoding='utf-8') == readme() else 'README.md differs from nbs/index.ipynb: run make readme')
    target.write_text(readme(), encoding='utf-8')
