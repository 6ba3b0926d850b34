"Write data/MANIFEST.json: the SHA-256 and size of every embedded file (run after changing data/)"
import json
from pathlib import Path

from diffcourse.core import atomic_write, sha256

root = Path(__file__).resolve().parent.parent / 'data'


def entries() -> dict:
    "path → {'sha256', 'bytes'} for every file under data/ that is not documentation"
    files = [f for f in sorted(root.rglob('*')) if f.is_file() and f.suffix not in ('.md', '.part') and f.name != 'MANIFEST.json' and not f.name.startswith('.')]
    return {f.relative_to(root).as_posix(): {'sha256': sha256(f), 'bytes': f.stat().st_size} for f in files}


if __name__ == '__main__':
    with atomic_write(root / 'MANIFEST.json') as tmp: tmp.write_text(json.dumps(entries(), indent=1) + '\n', encoding='utf-8')
    print(f'{len(entries())} files in data/MANIFEST.json')
