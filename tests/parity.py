"""Compare this package with the official implementations: inputs and outputs of their code, kept in golden files.

    python -m tests.parity [DIR] [--only GLOB] [--full] [--json FILE] [--schemas DIR]

A golden is NAME.json (configuration, tolerances, where it comes from) beside NAME.safetensors (`weights/…`, `in/…`,
    `out/…`).
Everything is built from the json's configuration and the tensors' names; nothing here knows a size, a seed or a step count.
A new family is one function below: it takes a `Golden` and returns `{output name: tensor}`, leaving out what is not implemented.
"""
import argparse
import ast
import json
import math
import resource
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffcourse import ddpm, layers, train, unet
from diffcourse.core import CourseError, require

HERE = Path(__file__).resolve().parent
FAMILIES = {}   # glob of golden names → function


def family(*patterns):
    "Register a checker for the goldens whose name matches"
    def put(f):
        FAMILIES.update(dict.fromkeys(patterns, f))
        return f
    return put


# ---------------------------------------------------------------------------------------------------------------- files

@dataclass
class Golden:
    "One golden file"
    path: Path                      # of the json
    schemas: Path | None = None     # a folder of schemas; default: the copy in the package
    info: dict = field(init=False)  # the json

    def __post_init__(self): self.info = json.loads(self.path.read_text(encoding='utf-8'))

    @property
    def name(self) -> str: return self.info.get('name', self.path.stem)

    @cached_property
    def tensors(self) -> dict: return load_file(self.path.with_suffix('.safetensors'))

    def group(self, prefix: str) -> dict:
        "The tensors below a prefix, without it"
        return {k[len(prefix):]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    @cached_property
    def inputs(self) -> dict: return self.group('in/')

    @cached_property
    def outputs(self) -> dict: return {k.replace('out/', '', 1): v for k,
                                       v in self.tensors.items() if k.startswith('out/') or '/out/' in k}

    @property
    def config(self) -> dict:
        "The json's configuration; a full-size golden takes its schema's"
        return self.info['config'] if 'config' in self.info else self.schema()['config']

    def schema(self, i: int = 0) -> dict:
        "The layout that the golden names (the i-th, if several)"
        files = self.info['keys_file']
        name = Path((files if isinstance(files, list) else [files])[i]).stem
        if self.schemas is None: return layers.official_schema(name)
        return json.loads((self.schemas / f'{name}.json').read_text(encoding='utf-8'))

    def weights(self, i: int = 0) -> dict:
        "The stored weights, or for full-size goldens the ones that follow from key names and shapes"
        if 'salt' in self.info: return procedural(self.schema(i)['state_dict'], self.info['salt'],
                                                  self.info.get('gain', 1.))
        return {k: v.float() if v.is_floating_point() else v for k, v in self.group('weights/').items()}


def procedural(
    shapes: dict,      # key → shape
    salt: str,         # goes before every key
    gain: float = 1.,  # of matrices and filters
) -> dict:             # key → float32 tensor
    "Weights that follow from names and shapes: a released size can be checked without its file"
    out = {}
    for key, shape in shapes.items():
        if key.endswith('num_batches_tracked'): continue
        n = math.prod(shape)
        v = (2 * np.random.RandomState(zlib.crc32((salt + key).encode())).random_sample(n) - 1) * math.sqrt(3)
        if len(shape) >= 2: v *= gain / math.sqrt(n / shape[0])
        elif key.endswith('running_var'): v = 1 + .1 * abs(v)
        elif key.endswith('weight'): v = 1 + .1 * v
        else: v = .1 * v
        out[key] = torch.from_numpy(v.astype(np.float32).reshape(shape))
    return out


# -------------------------------------------------------------------------------------------------------------- formulas

FUNCTIONS = dict(sin=torch.sin, cos=torch.cos, tanh=torch.tanh, exp=torch.exp, sqrt=torch.sqrt, abs=torch.abs,
                 sigmoid=torch.sigmoid, cat=lambda xs, dim=1: torch.cat(list(xs), dim))
OPERATORS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
             ast.Div: lambda a, b: a / b, ast.Pow: lambda a, b: a ** b}


def formula(
    text: str,  # prose with one formula in it, such as 'eps(x,t) = 0.6*x + 0.2*sin(t/100)'
):              # a function (x, t, **named tensors) → Tensor
    "The formula in a sentence as a function; numbers, named tensors, + - * / ^ and a few functions, nothing else"
    text = text.replace(' over tokens and channels', '').replace('^', '**').replace('·', '*')
    starts = [0, *(i + 1 for i, c in enumerate(text) if c in '=:')]
    found = [tree for tree in (_longest(text[i:].strip()) for i in starts) if tree is not None]
    require(len(found) > 0, f'no formula in {text!r}')
    tree = max(found, key=lambda t: len(ast.dump(t)))
    return lambda x, t=None, **names: _value(tree, dict(x=x, t=_beside(t, x), **names), x)


def _longest(text):
    "The longest prefix that is a formula in x"
    for end in range(len(text), 0, -1):
        try: tree = ast.parse(text[:end], mode='eval').body
        except SyntaxError: continue
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        if all(map(_legal, ast.walk(tree))) and 'x' in names: return tree


def _legal(node):
    "May this node stand in a formula?"
    if isinstance(node, ast.Call): return isinstance(node.func, ast.Name) and node.func.id in (*FUNCTIONS, 'mean')
    return isinstance(node, (ast.BinOp, ast.UnaryOp, ast.USub, ast.UAdd, ast.Name, ast.Load, ast.List, ast.Tuple,
                             ast.keyword, *OPERATORS)) \
        or isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _beside(t, x):
    "Per-item numbers, shaped to broadcast against x"
    if t is None: return None
    t = torch.as_tensor(t)
    return t.float() if t.ndim == 0 else t.float().reshape(-1, *[1] * (x.ndim - 1))


def _value(node, names, x):
    "Evaluate a checked tree"
    go = lambda n: _value(n, names, x)
    if isinstance(node, ast.Constant): return node.value
    if isinstance(node, ast.Name):
        require(names.get(node.id) is not None, f'the formula needs {node.id}')
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)): return [go(n) for n in node.elts]
    if isinstance(node, ast.UnaryOp): return -go(node.operand) if isinstance(node.op, ast.USub) else go(node.operand)
    if isinstance(node, ast.BinOp): return OPERATORS[type(node.op)](go(node.left), go(node.right))
    arguments, keywords = [go(n) for n in node.args], {k.arg: go(k.value) for k in node.keywords}
    if node.func.id == 'mean': return _beside(arguments[0].flatten(1).mean(1), x)
    return FUNCTIONS[node.func.id](*(torch.as_tensor(a) if isinstance(a, (int, float)) and i == 0 else a for i,
                                     a in enumerate(arguments)), **keywords)


# -------------------------------------------------------------------------------------------------------------- families

def schedule(
    name: str,           # 'linear', 'cosine', …
    T: int,              # number of levels
    config: dict = {},   # may hold the first and last β
):                       # a Schedule, or None where this package has none of that name
    "A noise schedule by its published name"
    make = getattr(ddpm.Schedule, name, None)
    if make is None: return None
    ends = {ours: config[theirs] for ours, many in dict(start=('beta_start', 'linear_start'),
                                                        end=('beta_end', 'linear_end')).items()
            for theirs in many if theirs in config}
    return make(T, **ends)


@family('timestep_embedding')
def timestep_embedding(g):
    "Names say it all: [ddpm_]INPUT_dimN[_maxperiodP]"
    out = {}
    for name in g.outputs:
        order = 'sin_cos' if name.startswith('ddpm_') else 'cos_sin'
        kind, *settings = name.removeprefix('ddpm_').split('_')
        read = {s.rstrip('0123456789.'): float(s.lstrip('abcdefghijklmnopqrstuvwxyz')) for s in settings}
        out[name] = layers.timestep_embedding(g.inputs[f't_{kind}'], int(read['dim']), read.get('maxperiod', 10000),
                                              order=order)
    return out


@family('schedules')
def schedules(g):
    "SCHEDULE_T/ARRAY"
    out, made = {}, {}
    for name in g.outputs:
        which, array = name.split('/')
        kind, T = which.rsplit('_', 1)
        if which not in made: made[which] = schedule(kind, int(T), g.info.get('config', {}))
        if made[which] is not None and hasattr(made[which], array): out[name] = getattr(made[which], array)
    return out


@family('diffusion_q')
def diffusion_q(g):
    "SCHEDULE/FUNCTION"
    out, i = {}, g.inputs
    for kind in g.config.get('schedules') or [g.config['schedule']]:
        s = schedule(kind, g.config['T'], g.config)
        if s is None: continue
        step = s.steps().at(i['t'])
        mean, variance, log_variance = ddpm.q_mean_variance(i['x_start'], step.ᾱ)
        post = ddpm.q_posterior_mean_variance(i['x_start'], i['x_t'], step)
        results = {
            'q_sample': ddpm.q_sample(i['x_start'], step.ᾱ, i['noise']),
            'q_mean_variance.mean': mean, 'q_mean_variance.variance': variance, 'q_mean_variance.log_variance': log_variance,
            'q_posterior.mean': post[0], 'q_posterior.variance': post[1], 'q_posterior.log_variance_clipped': post[2],
            '_predict_xstart_from_eps': ddpm.x0_from_eps(i['x_t'], i['noise'], step.ᾱ),
            '_predict_eps_from_xstart': ddpm.eps_from_x0(i['x_t'], i['x_start'], step.ᾱ),
            '_prior_bpd': ddpm.prior_bpd(i['x_start'], s)}
        out |= {f'{kind}/{k}': v for k, v in results.items()}
    return out


MEANS = dict(EPSILON='eps', START_X='x0', PREVIOUS_X='previous_x')   # the official names → ours


@family('p_mean_variance')
def p_mean_variance(g):
    "MEAN.VARIANCE.clip0|1/RESULT"
    out, i = {}, g.inputs
    s = schedule(g.config['schedule'], g.config['T'], g.config)
    for case in {name.split('/')[0] for name in g.outputs} if s else ():
        mean, variance, clip = case.split('.')
        if variance.lower() not in ddpm.VARIANCES: continue
        raw = i[f'model_output_{i["x"].shape[1] * (2 if variance.startswith("LEARNED") else 1)}']
        denoiser = ddpm.Denoiser(lambda x, t: raw, s, MEANS[mean], variance.lower())
        step = s.steps().at(i['t'])
        p = denoiser.guided(x0=ddpm.clip_x0 if clip == 'clip1' else None).denoise(i['x'], step)
        small = ddpm.q_posterior_mean_variance(p.x0, i['x'],
            step)[1]                 # zero at t = 0, where the logarithm is floored
        results = dict(mean=p.mean, pred_xstart=p.x0, log_variance=p.log_variance,
                       variance=small if variance == 'FIXED_SMALL' else p.log_variance.exp())
        out |= {f'{case}/{k}': v for k, v in results.items()}
    return out


@family('calc_bpd_loop')
def calc_bpd_loop(g):
    "The bound, term by term, of a closed-form model"
    c, i = g.config, g.inputs
    s, model = schedule(c['schedule'], c['T'], c), formula(c['model'])
    if s is None: return {}
    d = ddpm.Denoiser(lambda x, t: model(x, t), s, MEANS[c['mean']], c['var'].lower()).guided(x0=ddpm.clip_x0)
    r = ddpm.bits_per_dim(d, i['x_start'], noises=i['noises'])
    return dict(total_bpd=r['total'], prior_bpd=r['prior'], vb=r['vb'], xstart_mse=r['x0_mse'], mse=r['mse'])


@family('ddim_generalized_steps')
def ddim_generalized_steps(g):
    "DDIM's own repository: here its DDPM sampler, which clips x0 and takes the large variance"
    i, model = g.inputs, formula(g.config['model'])
    s = ddpm.Schedule(i['betas'].double())
    d = ddpm.Denoiser(lambda x, t: model(x, t), s, 'eps', 'fixed_large').guided(x0=ddpm.clip_x0)
    if g.config['seq'][0] != 0: return {}                                             # that code masks the last noise at t = 0 only
    x = i['x_T']
    for x in ddpm.ancestral(d, s.steps(g.config['seq']), x, noises=i['noises']): pass
    return dict(ddpm_steps=x)


def run_unet(g):
    "Strict load, one call"
    model = layers.load_strict(unet.UNet.from_config(g.config), g.weights()).eval()
    return dict(y=model(g.inputs['x'], g.inputs['timesteps']))


@family('ddpm_unet_ermongroup')
def ddpm_unet(g): return run_unet(g)


@family('full__ddpm_*')
def full_ddpm(g): return run_unet(g)


@family('lit_ema')
def lit_ema(g):
    "Inputs wN and bN are a network's weights after update N; an input that stops coming stays as it is"
    names = sorted({k.rstrip('0123456789') for k in g.inputs})
    net = nn.ParameterDict({n: nn.Parameter(g.inputs[f'{n}0'].clone()) for n in names})
    ema, out = train.EMA(net, g.config['decay'], warmup=g.config.get('use_num_upates', True)), {}
    average = nn.ParameterDict({n: nn.Parameter(g.inputs[f'{n}0'].clone()) for n in names})
    for k in range(1, 1 + max(int(name[1:]) for name in g.inputs)):
        for n in names: net[n].data = g.inputs.get(f'{n}{k}', net[n].data).clone()
        ema.update(net)
        ema.copy_to(average)
        out |= {f'{n}_ema{k}': average[n].detach().clone() for n in names if f'{n}_ema{k}' in g.outputs}
    return out


@family('gd_train_step')
def gd_train_step(g):
    "The moving average of two training steps, for each parameter whose values after the steps are stored in full"
    out = {}
    for name in [k.removeprefix('step1.after_') for k in g.outputs if k.startswith('step1.after_')
                 and not k.endswith('_norms')]:
        net, average = (nn.ParameterDict({'p': nn.Parameter(g.weights()[name].clone())}) for _ in range(2))
        ema = train.EMA(net, g.config['ema_rate'])
        for k in range(1, 1 + sum(o.endswith(f'.after_{name}') for o in g.outputs)):
            net['p'].data = g.outputs[f'step{k}.after_{name}'].clone()
            ema.update(net)
            ema.copy_to(average)
            out[f'step{k}.ema_{name}'] = average['p'].detach().clone()
    return out


# ------------------------------------------------------------------------------------------------------------ comparison

@dataclass
class Verdict:
    "What came of one golden"
    name: str                    # of the golden
    official: str                # the code it came from
    word: str                    # passed, partial, FAILED, unsupported, skipped
    error: float | None = None   # largest |difference| of any output
    note: str = ''               # what is missing or wrong
    seconds: float = 0.
    peak_mb: float | None = None # of the process, for full-size ones


def expected_form(name, value):
    "The stored form of an output: whole, every N-th number, or mean and standard deviation"
    base, _, form = name.partition('::')
    if form.startswith('flat_stride'): return value.flatten()[::int(form.removeprefix('flat_stride'))]
    if form == 'mean_std': return torch.stack([value.double().mean(), value.double().std()])
    return value


def compare(g, got) -> Verdict:
    "Every output at the json's own tolerance"
    rtol, atol, worst, wrong, done = g.info['rtol'], g.info['atol'], 0., [], 0
    for name, want in g.outputs.items():
        base = name.partition('::')[0]
        if base not in got: continue
        done += 1
        have = expected_form(name, torch.as_tensor(got[base]).detach()).double().cpu()
        want = want.double()
        if have.shape != want.shape:
            wrong.append(f'{name} has shape {tuple(have.shape)}, expected {tuple(want.shape)}')
            continue
        error = (have - want).abs()
        error = torch.where(have == want, 0.,
                            error)                                  # two equal infinities differ by nothing
        worst = max(worst, float(error.nan_to_num(math.inf).max()) if error.numel() else 0.)
        if not bool((error <= atol + rtol * want.abs()).all()): wrong.append(f'{name} is off by {float(error.max()):.2g}')
    total, source = len(g.outputs), g.info.get('official', g.info.get('system', ''))
    if wrong: return Verdict(g.name, source, 'FAILED', worst, f'{len(wrong)} of {done}: {"; ".join(wrong[:3])}')
    if done == 0: return Verdict(g.name, source, 'unsupported', None, f'none of {total} outputs')
    return Verdict(g.name, source, 'passed' if done == total else 'partial', worst, f'{done} of {total} outputs')


def checker(name):
    "The function for a golden of this name, or None"
    return next((f for pattern, f in FAMILIES.items() if fnmatch(name, pattern)), None)


def check(
    g: Golden,  # a golden
) -> Verdict:
    "Run one golden; an exception is a failure, not a crash"
    f, source, start = checker(g.name), g.info.get('official', g.info.get('system', '')), time.time()
    if f is None: return Verdict(g.name, source, 'unsupported')
    try:
        with torch.no_grad(): verdict = compare(g, f(g))
    except Exception as e: verdict = Verdict(g.name, source, 'FAILED', None, f'{type(e).__name__}: {e}')
    verdict.seconds = round(time.time() - start, 2)
    return verdict


def in_own_process(g, schemas) -> Verdict:
    "A full-size golden in a process of its own, so that its memory is given back"
    command = [sys.executable, '-m', 'tests.parity', str(g.path.parent), '--one', g.path.stem]
    done = subprocess.run(command + (['--schemas', str(schemas)] if schemas else []), capture_output=True, text=True,
                          cwd=HERE.parent)
    if done.returncode != 0:
        return Verdict(g.name, g.info.get('system', ''), 'FAILED', None,
                       f'process ended with {done.returncode}: {done.stderr.strip()[-300:]}')
    return Verdict(**json.loads(done.stdout.splitlines()[-1]))


def run(
    folder: Path = HERE / 'golden',  # of golden files
    only: str = '*',                 # a glob of names
    full: bool = False,              # also the released sizes, one process each
    schemas: Path | None = None,     # folder of schemas; default: the package's copy
    tell=lambda v: None,             # called with each verdict as it comes
) -> list:
    "Check every golden of a folder"
    verdicts = []
    for path in sorted(Path(folder).glob('*.json')):
        if not path.with_suffix('.safetensors').exists(): continue
        g = Golden(path, schemas)
        if not fnmatch(g.name, only): continue
        big = g.name.startswith('full__')
        if not big or checker(g.name) is None: v = check(g)
        elif full or only.startswith('full__'): v = in_own_process(g, schemas)
        else: v = Verdict(g.name, g.info.get('system', ''), 'skipped', None, 'released size: add --full')
        verdicts.append(v)
        tell(v)
    return verdicts


def line(v) -> str:
    "A verdict in a row"
    error = '' if v.error is None else f'{v.error:.1e}'
    memory = f', {v.peak_mb:.0f} MB' if v.peak_mb else ''
    return f'{v.name:34} {v.word:12} {error:>8}  {v.seconds:5.1f} s{memory}  {v.note}  [{v.official[:70]}]'


def main(argv=None) -> int:
    "The command; 0 when nothing failed"
    p = argparse.ArgumentParser(prog='python -m tests.parity',
                                description='Compare diffcourse with golden outputs of the official code')
    p.add_argument('dir', nargs='?', type=Path, default=HERE / 'golden',
                   help='folder of golden files (default: tests/golden)')
    p.add_argument('--only', default='*', metavar='GLOB', help='names to check, such as "p_*"')
    p.add_argument('--full', action='store_true', help='also the released sizes (full__*), one process each')
    p.add_argument('--json', type=Path, metavar='FILE', help='write the verdicts here')
    p.add_argument('--schemas', type=Path, metavar='DIR', help='folder of layouts (default: the copy in the package)')
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.one:
        v = check(Golden(a.dir / f'{a.one}.json', a.schemas))
        v.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
        print(json.dumps(vars(v)))
        return 0
    try: require(a.dir.is_dir(), f'{a.dir} is not a folder of golden files')
    except CourseError as e: p.error(str(e))
    verdicts = run(a.dir, a.only, a.full, a.schemas, lambda v: print(line(v), flush=True))
    counts = {w: sum(v.word == w for v in verdicts) for w in ('passed', 'partial', 'FAILED', 'unsupported', 'skipped')}
    print(', '.join(f'{n} {w}' for w, n in counts.items() if n) or f'no golden in {a.dir} matches {a.only!r}')
    if a.json: a.json.write_text(json.dumps([vars(v) for v in verdicts], indent=1) + '\n', encoding='utf-8')
    return 1 if counts['FAILED'] or not verdicts else 0


if __name__ == '__main__': sys.exit(main())
