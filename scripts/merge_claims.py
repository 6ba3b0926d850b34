"""Take measured claims into data/claims/results.json: python scripts/merge_claims.py RESULT.json [RESULT.json …]

Each file maps a claim's id to {"numbers", "budget", "device", "seeds", …}, as scripts/claims_*.py write them. A claim without
a committed rule is refused.
"""
import json
import subprocess
import sys
from pathlib import Path

from diffcourse.core import atomic_write, require, verdict

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / 'data/claims/results.json'


def main(files):
    rules = json.loads((ROOT / 'data/claims/rules.json').read_text(encoding='utf-8'))
    results = json.loads(TARGET.read_text(encoding='utf-8')) if TARGET.exists() else {}
    for f in files:
        for id, r in json.loads(Path(f).read_text(encoding='utf-8')).items():
            require(id in rules, f'{f} measures {id}, which has no rule')
            verdict(rules[id]['rule'], r['numbers'])  # the rule must be computable
            results[id] = r
    ordered = {k: results[k] for k in rules if k in results}
    with atomic_write(TARGET) as tmp: tmp.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    subprocess.run([sys.executable, ROOT / 'scripts/manifest.py'], check=True)


if __name__ == '__main__': main(sys.argv[1:])
