"""Train several recipes side by side on one device, each for so many seconds: what a GPU rented by the minute is best used for.

    python scripts/train_together.py OUT clip_shapes:100 glide_shapes:210 unclip_prior_shapes:150@clip_shapes

`name:seconds` gives a recipe its time from its first step on; `@other` makes it wait for another one, whose weights
are put among the shipped ones (and into the manifest) first; `name:seconds+start` goes on from the weights of another.
`--measure name …` afterwards, on any machine, writes what the recipes' `evaluate` finds of shipped weights into their cards.
The number of steps follows the speed: every two hundred steps it is estimated again, and with it the cosine of the learning
rate, which therefore ends at zero when the time does. The card says how many steps there were. Networks named in COMPILE=name,name
are compiled, and run as they are where that fails.
"""
import fcntl, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse(job: str) -> dict:
    found = re.fullmatch(r'(\w+):(\d+)(?:@([\w,]+))?(?:\+(\w+))?', job)
    if not found: raise SystemExit(f'{job!r} is not name:seconds[@other,other][+start]')
    name, seconds, after, start = found.groups()
    return dict(name=name, seconds=int(seconds), after=after.split(',') if after else [], start=start)


def install(path: Path) -> None:
    "Put weights among the shipped ones; one process at a time"
    with open(ROOT / '.train_together.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for p in (path, path.with_suffix('.json')): shutil.copy(p, ROOT / 'data/weights' / p.name)
        subprocess.run([sys.executable, 'scripts/manifest.py'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(name, seconds, start, out: Path, level: str) -> dict:
    import torch
    from diffcourse.train import Trainer, find_recipe
    from diffcourse.weights import load_weights, save_weights, weight_file
    from diffcourse import zoo  # noqa: F401 (registers every recipe)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.suppress_errors = True
    recipe, begin = find_recipe(name), time.time()
    how = {**recipe.settings[level], 'steps': 10**7}
    how['warmup'] = min(how.get('warmup', 100), 300)
    data = recipe.data(level)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.get('seed', 0))
        model = recipe.model()
    if start: load_weights(start, model).train()
    t = Trainer(model, recipe.loss, data, name=name, compile=name in os.environ.get('COMPILE', '').split(','), **how)
    t.origin = {'recipe': name, 'budget': level}
    if start: t.origin['start'] = {k: weight_file(start)[1].get(k) for k in ('name', 'steps', 'seconds', 'sha256')}
    t.objective.train()
    print(f'{name}: ready after {time.time() - begin:.0f} s', flush=True)
    first, cpu, mark = time.time(), time.process_time(), None
    while t.step < t.settings.steps and time.time() < first + seconds:
        t.update([])
        if t.step in (10, 50) or t.step % 200 == 0:                               # the first ones are slow
            now, mark, before = time.time(), (t.step, time.time()), mark
            if not before: continue
            speed, left = (t.step - before[0]) / (now - before[1]), first + seconds - now
            t.settings.steps = t.step + max(1, int(.98 * speed * left))
            if t.step % 1000 in (0, 50): print(f'{name}: {t.step} of {t.settings.steps}, {speed:.1f} steps/s, '
                                               f'loss {sum(t.losses[-100:]) / len(t.losses[-100:]):.4f}', flush=True)
    t.seconds, t.cpu_seconds = time.time() - first, time.process_time() - cpu
    card = dict(t.card(), metrics={}, beside='other trainings on the same device')
    path = save_weights(out / f'{name}.safetensors', t.ema_model(), card, 'int8')
    print(f'{name}: done, {t.step} of {t.settings.steps} steps, loss {card["loss"]:.4f}', flush=True)
    return path


def measure(name: str) -> dict:
    "What a recipe's `evaluate` finds of its shipped weights, written into their card"
    from diffcourse import zoo
    from diffcourse.core import asset, atomic_write
    from diffcourse.train import find_recipe
    path = Path(asset(f'weights/{name}.json'))
    card = json.loads(path.read_text(encoding='utf-8'))
    card['metrics'] = find_recipe(name).evaluate(zoo.load(name))
    with atomic_write(path) as tmp: tmp.write_text(json.dumps(card, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    subprocess.run([sys.executable, 'scripts/manifest.py'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return card['metrics']


def main(out: Path, jobs: list[dict], level: str) -> None:
    running, waiting, done = {}, list(jobs), set()
    while running or waiting:
        for job in [j for j in waiting if set(j['after']) <= done]:
            waiting.remove(job)
            told = [sys.executable, __file__, str(out), '--one', json.dumps(job)]
            running[job['name']] = subprocess.Popen(told, cwd=ROOT, env={**os.environ, 'DIFFCOURSE_BUDGET': level},
                                                    stdout=open(out / f'{job["name"]}.log', 'w'), stderr=subprocess.STDOUT)
        for name in [n for n, p in running.items() if p.poll() is not None]:
            code = running.pop(name).returncode
            print(f'{time.strftime("%T")} {name} ended with {code}', flush=True)
            if code == 0: done.add(name)
            else:
                print((out / f'{name}.log').read_text()[-1500:], flush=True)
                waiting = [j for j in waiting if name not in j['after']]
        time.sleep(.5)


if __name__ == '__main__':
    if sys.argv[1] == '--measure':
        for name in sys.argv[2:]: print(name, measure(name), flush=True)
        raise SystemExit
    out, level = Path(sys.argv[1]), os.environ.get('DIFFCOURSE_BUDGET', 'gpu')
    out.mkdir(parents=True, exist_ok=True)
    if sys.argv[2] == '--one':
        job = json.loads(sys.argv[3])
        path = train(job['name'], job['seconds'], job['start'], out, level)
        if os.environ.get('INSTALL', '1') == '1': install(path)
    else: main(out, [parse(j) for j in sys.argv[2:]], level)
