"Pack a folder of schemas (one json per released model: its config and `state_dict` key → shape) into data/schemas.json.xz"
import json
import lzma
import sys
from pathlib import Path

from diffcourse.core import CourseError, atomic_write, require

target = Path(__file__).resolve().parent.parent / 'data' / 'schemas.json.xz'


def read(
    folder: Path,  # holds NAME.json files
) -> dict:         # NAME → its json
    "Every schema of a folder, checked: the counts that each states must be those of its `state_dict`"
    schemas = {}
    for path in sorted(Path(folder).glob('*.json')):
        schema = json.loads(path.read_text(encoding='utf-8'))
        require('state_dict' in schema, f'{path} has no state_dict')
        require(schema.get('n_tensors', len(schema['state_dict'])) == len(schema['state_dict']),
                f'{path} says {schema.get("n_tensors")} tensors and lists {len(schema["state_dict"])}')
        schemas[path.stem] = schema
    require(len(schemas) > 0, f'no *.json in {folder}')
    return schemas


def pack(
    schemas: dict,  # NAME → schema
) -> bytes:
    "The same bytes for the same schemas, whoever packs them"
    text = json.dumps(schemas, separators=(',', ':'), sort_keys=False, ensure_ascii=False)
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit('usage: python scripts/build_schemas.py FOLDER_OF_SCHEMAS')
    try: schemas = read(Path(sys.argv[1]))
    except CourseError as e: sys.exit(str(e))
    with atomic_write(target) as tmp: tmp.write_bytes(pack(schemas))
    print(f'{len(schemas)} schemas in {target} ({target.stat().st_size:,} bytes); now run scripts/manifest.py')
