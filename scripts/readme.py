"README.md from nbs/index.ipynb: its markdown, with the site's conveniences turned into plain GitHub markdown"
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shown(cell: dict) -> list[str]:
    "A markdown cell's text, or the tables that a code cell printed"
    if cell['cell_type'] == 'markdown': return [''.join(cell['source']).strip()]
    return [''.join(o['data']['text/markdown']) for o in cell['outputs'] if 'text/markdown' in o.get('data', {})]


def readme() -> str:
    "The text of README.md; pictures are read from nbs/images, code is dropped and its tables kept"
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(part for c in cells for part in shown(c))
    text = re.sub(r'\]\(images/', '](nbs/images/', text)
    text = re.sub(r'\]\((\d\d\w*_\w+\.ipynb)\)', r'](nbs/\1)', text)
    return '<!-- made from nbs/index.ipynb by make readme -->\n\n' + text.strip() + '\n'


if __name__ == '__main__':
    target = ROOT / 'README.md'
    if '--check' in sys.argv: sys.exit(0 if target.read_text(encoding='utf-8') == readme() else 'README.md differs from nbs/index.ipynb: run make readme')
    target.write_text(readme(), encoding='utf-8')
