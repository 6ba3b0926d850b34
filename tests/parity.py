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
import re
import resource
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffcourse import (adm, cfg, clip, dalle, ddim, ddpm, dvae, edit, first_stage, glide, iddpm, inception, latent, layers,
                        metrics, openai_unet, priors, scores, train, unclip, unet, vae, vqvae, vqvae2)
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
    def outputs(self) -> dict:
        "Tensors, and the numbers of words that the json may hold: tokens/TEXT/KIND"
        words = {f'tokens/{text}/{kind}': torch.tensor(v) for text, kinds in self.info.get('tokens', {}).items()
                 if isinstance(kinds, dict) for kind, v in kinds.items()}
        return words | {k.replace('out/', '', 1): v for k, v in self.tensors.items() if k.startswith('out/') or '/out/' in k}

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


def channels(C, variance):
    "How many channels a network gives: twice as many where it also says the variance"
    return C * (2 if variance.lower().startswith('learned') else 1)


@family('p_mean_variance')
def p_mean_variance(g):
    "MEAN.VARIANCE.clip0|1/RESULT"
    out, i = {}, g.inputs
    s = schedule(g.config['schedule'], g.config['T'], g.config)
    for case in {name.split('/')[0] for name in g.outputs} if s else ():
        mean, variance, clip = case.split('.')
        if variance.lower() not in ddpm.VARIANCES: continue
        raw = i[f'model_output_{channels(i["x"].shape[1], variance)}']
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
    d = ddpm.Denoiser(lambda x, t: model(x, t), s, MEANS[c['mean']], c['var'].lower()).guided(x0=ddpm.clip_x0 if c.get('clip_denoised', True) else None)
    r = ddpm.bits_per_dim(d, i['x_start'], noises=i['noises'])
    return dict(total_bpd=r['total'], prior_bpd=r['prior'], vb=r['vb'], xstart_mse=r['x0_mse'], mse=r['mse'])


def last(states):
    "The end of a walk"
    for x in states: pass
    return x


def noting(denoiser, notes):
    "The same denoiser; every prediction is noted"
    def note(p, x, step, cond):
        notes.append(p)
        return p
    return denoiser.guided(prediction=note)


@family('ddim_generalized_steps')
def ddim_generalized_steps(g):
    "DDIM's own repository: its sampler at any η, and its DDPM sampler, which clips x0 and takes the large variance"
    i, model, s = g.inputs, formula(g.config['model']), ddpm.Schedule(g.inputs['betas'].double())
    path, out = s.steps(g.config['seq']), {}
    d = ddpm.Denoiser(lambda x, t: model(x, t), s, 'eps', 'fixed_large')
    if g.config['seq'][0] == 0:                                                       # that code masks the last noise at t = 0 only
        out['ddpm_steps'] = last(ddpm.ancestral(d.guided(x0=ddpm.clip_x0), path, i['x_T'], noises=i['noises']))
    for name in g.outputs:
        if name.startswith('generalized_eta') and not name.endswith('_x0'):
            notes, η = [], float(name.removeprefix('generalized_eta'))
            out[name] = last(ddim.ddim(noting(d, notes), path, i['x_T'], noises=i['noises'], eta=η))
            out[f'{name}_x0'] = torch.stack([p.x0 for p in notes])
    if 'compute_alpha' in g.outputs:                                                  # at t = −1, 0, T/2 and T − 1
        ᾱ = s.alphas_cumprod
        out['compute_alpha'] = torch.stack([path[-1].ᾱ_next, ᾱ[0], ᾱ[s.T // 2], ᾱ[-1]]).reshape(-1, 1, 1, 1)
    return out


@family('respacing')
def respacing(g):
    "T_SPEC/ARRAY; the schedule's name, with exceptions as 'for T=N NAME'"
    words, out = g.config['schedule'], {}
    others = dict(re.findall(r'for T=(\d+) (\w+)', words))
    for name in g.outputs:
        case, array = name.split('/')
        T, spec = case.split('_', 1)
        table = schedule(others.get(T, re.match(r'\w+', words)[0]), int(T), g.config).respaced(spec).table
        out[name] = dict(alphas_cumprod=table.ᾱ, betas=table.β, posterior_log_variance_clipped=table.log_variance,
                         timestep_map=table.t).get(array)
    return {k: v for k, v in out.items() if v is not None}


@family('training_losses')
def training_losses(g):
    "[T100.]LOSS.MEAN.VARIANCE/PART of a constant model output, and the gradient of the hybrid loss"
    i, out = g.inputs, {}
    cases = {name.split('/')[0] for name in g.outputs if '/' in name}
    for case in cases:
        *other, kind, mean, variance = case.split('.')
        T = int(other[0].removeprefix('T')) if other else g.config['T']
        d = ddpm.Denoiser(None, schedule(g.config['schedule'], T, g.config), MEANS[mean], variance.lower())
        out |= {f'{case}/{k}': v for k, v in _losses(d, i, i[f't_T{T}'] if other else i['t'], kind.lower())[1].items()}
    if 'hybrid_grad_wrt_model_output' in g.outputs:
        d = ddpm.Denoiser(None, schedule(g.config['schedule'], g.config['T'], g.config), 'eps', 'learned_range')
        with torch.enable_grad():
            raw, terms = _losses(d, i, i['t'], 'rescaled_mse')
            out['hybrid_grad_wrt_model_output'], = torch.autograd.grad(terms['loss'].sum(), raw)
    return out


def _losses(d, i, t, kind):
    "Raw output and the loss terms of one case"
    raw, step = i[f'model_output_{channels(i["x_start"].shape[1], d.variance)}'].clone().requires_grad_(), d.schedule.steps().at(t)
    x = ddpm.q_sample(i['x_start'], step.ᾱ, i['noise'])
    return raw, iddpm.loss_terms(d, raw, i['x_start'], i['noise'], x, step, kind)


@family('vlb_terms')
def vlb_terms(g):
    "One term of the bound with and without clipping, and the functions it is made of"
    i, c = g.inputs, g.config
    C, s = i['x_start'].shape[1], schedule(c['schedule'], c['T'], c)
    raw = i[f'model_output_{channels(C, c["var"])}']
    step, out = s.steps().at(i['t']), {}
    d = ddpm.Denoiser(lambda x, t: raw, s, MEANS[c['mean']], c['var'].lower())
    for clip in (0, 1):
        p = d.guided(x0=ddpm.clip_x0 if clip else None).denoise(i['x_t'], step)
        out |= {f'clip{clip}/output': ddpm.vlb_term(p, i['x_start'], i['x_t'], step), f'clip{clip}/pred_xstart': p.x0}
    return out | dict(
        discretized_gaussian_log_likelihood=ddpm.discretized_gaussian_log_likelihood(i['x_start'], i['dg_means'], i['dg_log_scales']),
        normal_kl=ddpm.normal_kl(i['dg_means'], i['dg_log_scales'], i['noise'], raw[:, :C]),
        approx_standard_normal_cdf=ddpm.approx_standard_normal_cdf(i['noise']))


@family('loss_second_moment_resampler')
def loss_second_moment_resampler(g):
    "The importance sampler of timesteps, fed one loss after the other"
    c, i = g.config, g.inputs
    times = iddpm.SecondMoment(c['T'], c['history_per_term'], c['uniform_prob'])
    before = times.weights().clone()
    times.update(i['t_seq'], i['loss_seq'])
    p = times.weights() / times.weights().sum()
    return dict(weights_before=before, weights_after=times.weights(), probabilities=p, importance_weights=1 / (len(p) * p),
                loss_counts=times.counts, loss_history=times.losses)


def by_mean(grad):
    "Classifier guidance as DDPM's sampler takes it: the mean moves by variance times gradient"
    def move(p, x, step, cond): return replace(p, mean=p.mean + p.variance * grad)
    return move


def by_score(grad):
    "Classifier guidance as DDIM takes it: the noise, and with it x0 and the mean, which are not clipped again"
    def move(p, x, step, cond):
        eps = p.eps - ddpm.spread((1 - step.ᾱ).sqrt(), x) * grad
        x0 = ddpm.x0_from_eps(x, eps, step.ᾱ)
        return replace(p, eps=eps, x0=x0, mean=ddpm.q_posterior_mean_variance(x0, x, step)[0])
    return move


@family('sampling_steps')
def sampling_steps(g):
    "clip0|1/WHAT: one step from a constant model output, with and without a classifier's gradient"
    i, c, out = g.inputs, g.config, {}
    s = schedule(c['schedule'], c['T'], c)
    raw, x, step, noises = i[f'model_output_{channels(i["x"].shape[1], c["var"])}'], i['x'], s.steps().at(i['t']), [i['noise']]
    further = replace(step, ᾱ=s.alphas_cumprod_next[i['t']])
    for clip in (0, 1):
        plain = ddpm.Denoiser(lambda x, t: raw, s, MEANS[c['mean']], c['var'].lower()).guided(x0=ddpm.clip_x0 if clip else None)
        mean, score = (plain.guided(prediction=f(i['cond_grad'])) for f in (by_mean, by_score))
        shifted, done = score.denoise(x, step), {}
        done |= {'p_sample': next(ddpm.ancestral(plain, [step], x, noises=noises)),
                 'p_sample_cond': next(ddpm.ancestral(mean, [step], x, noises=noises)),
                 'ddim_reverse': next(ddim.encode(plain, [further, step], x)),
                 'condition_mean': mean.denoise(x, step).mean,
                 'condition_score.mean': shifted.mean, 'condition_score.pred_xstart': shifted.x0}
        for η in c['etas']:
            done |= {f'ddim_eta{η}': next(ddim.ddim(plain, [step], x, noises=noises, eta=η)),
                     f'ddim_eta{η}_pred_xstart': plain.denoise(x, step).x0,
                     f'ddim_cond_eta{η}': next(ddim.ddim(score, [step], x, noises=noises, eta=η))}
        out |= {f'clip{clip}/{k}': v for k, v in done.items()}
    return out


@family('sampling_loops')
def sampling_loops(g):
    "Whole loops on a respaced path with a closed-form model"
    i, c, seen = g.inputs, g.config, []
    s, model = schedule(c['schedule'], c['T'], c), formula(c['model'])
    path = s.respaced(c['respacing'], c.get('rescale_timesteps', False))
    def net(x, t):
        seen.append(t)
        return model(x, t)
    d = ddpm.Denoiser(net, s, MEANS[c['mean']], c['var'].lower()).guided(x0=ddpm.clip_x0 if c.get('clip_denoised', True) else None)
    out = dict(p_sample_loop=last(ddpm.ancestral(d, path, i['x_T'], noises=i['noises'])))
    out['timesteps_seen_by_model'] = torch.stack(seen)
    for name in g.outputs:
        if name.startswith('ddim_eta'):
            η = float(name.removeprefix('ddim_eta'))
            out[name] = last(ddim.ddim(d, path, i['x_T'], noises=i['noises'], eta=η))
    return out


@family('k_diffusion')
def k_diffusion(g):
    "Noise sizes, and the samplers that have a counterpart here; their states are ours divided by √ᾱ"
    i, c, model = g.inputs, g.config, formula(g.config['denoiser'].replace('sigma', 't'))
    ends = c['sigma_min'], c['sigma_max']
    sizes = dict(karras_sigmas=ddim.karras_sigmas(c['n'], *ends, c['rho']),
                 exponential_sigmas=ddim.exponential_sigmas(c['n'], *ends))
    ᾱ = 1 / (1 + sizes['karras_sigmas'].flip(0) ** 2)
    path = ddpm.Path(ᾱ, told=sizes['karras_sigmas'].flip(0))
    net = lambda x, s: model(x * ddpm.spread((1 + s ** 2).sqrt(), x), s)
    d = ddpm.Denoiser(net, None, 'x0')
    start = i['x'] * path[0].ᾱ.sqrt().float()
    walk = lambda sampler, **how: last(sampler(d, path, start, noises=list(i['noises']), **how))
    return {k: torch.cat([v, torch.zeros(1)]) for k, v in sizes.items()} | dict(
        euler=walk(ddim.ddim), euler_ancestral=walk(ddim.ddim, eta=1.), heun=walk(ddim.heun), dpmpp_2m=walk(ddim.dpm_2m))


def run_unet(g):
    "Strict load, one call"
    model = layers.load_strict(unet.UNet.from_config(g.config), g.weights()).eval()
    return dict(y=model(g.inputs['x'], g.inputs['timesteps']))


@family('ddpm_unet_ermongroup')
def ddpm_unet(g): return run_unet(g)


@family('full__ddpm_*')
def full_ddpm(g): return run_unet(g)


def openai_settings(config):
    "The constructor's part of a golden's configuration, which also holds rates, schedules and notes"
    return {k: v for k, v in config.items() if k in (*openai_unet.UNetConfig.__dataclass_fields__, 'pool')}


def run_openai_unet(g, model):
    "Strict load, one call with everything that the golden gives"
    given = {k: g.inputs[k] for k in ('y', 'low_res') if k in g.inputs}
    return dict(y=layers.load_strict(model, g.weights()).eval()(g.inputs['x'], g.inputs['timesteps'], **given))


@family('improved_unet', 'gd_unet_*', 'eps_gd_unet', 'gd_superres')
def openai_denoiser(g):
    kind = openai_unet.SuperResModel if 'low_res' in g.inputs else openai_unet.UNetModel
    return run_openai_unet(g, kind(**openai_settings(g.config)))


@family('full__improved-diffusion_*', 'full__guided-diffusion_*')
def full_openai_unet(g):
    with torch.device('meta'): model = openai_unet.from_flags(g.config)
    model = model.to_empty(device='cpu')
    if isinstance(model, openai_unet.EncoderUNetModel):
        return dict(logits=layers.load_strict(model, g.weights()).eval()(g.inputs['x'], g.inputs['timesteps']))
    return run_openai_unet(g, model)


def glide_told(g):
    "What a GLIDE network is given besides the picture and the time"
    return {k: v for k, v in g.inputs.items() if k not in ('x', 'timesteps')}


@family('glide_text2im', 'glide_superres', 'glide_inpaint', 'glide_superres_inpaint')
def glide_denoiser(g):
    kind = glide.KINDS['low_res' in g.inputs, 'inpaint_image' in g.inputs]
    names = ('n_vocab', 'text_ctx', 'xf_width', 'xf_layers', 'xf_heads', 'xf_final_ln', 'xf_padding')
    model = kind(**openai_settings(g.config), **{k: g.config[k] for k in names})
    model = layers.load_strict(model, g.weights()).eval()
    last, words = model.encode_text(g.inputs['tokens'], g.inputs['mask'])
    out = dict(y=model(g.inputs['x'], g.inputs['timesteps'], **glide_told(g)), xf_proj=last, xf_out=words.transpose(1, 2))
    return out | (glide_guided(g, model) if g.group('cfg/') else {})


def glide_guided(g, model):
    "The notebooks' guided model function, and one ancestral step with it on a hundred levels of the cosine schedule"
    i, s = g.group('cfg/in/'), ddpm.Schedule.cosine()
    half, path = len(i['x']) // 2, s.respaced('100')
    text, null = ({k: i[k][part] for k in ('tokens', 'mask')} for part in (slice(half), slice(half, None)))
    d = ddpm.Denoiser(model, s, 'eps', 'learned_range').guided(x0=ddpm.clip_x0)
    ask = cfg.classifier_free(float(i['guidance_scale']), **null)
    def model_fn(x, t):     # the official one returns both halves: one mean, two variances
        guided = ask(d, x[:half], replace(path[0], t=t[:half]), text)
        return torch.cat([guided, torch.cat([guided[:, :3], model(x[:half], t[:half], **null)[:, 3:]], 1)])
    step, official = path.at(i['step_t']), replace(d, net=model_fn)
    return {'cfg/model_fn': model_fn(i['x'], i['timesteps']), 'cfg/timestep_map': path.table.t,
            'cfg/p_sample': next(ddpm.ancestral(official, [step], i['x'], noises=[i['step_noise']])),
            'cfg/pred_xstart': official.denoise(i['x'], step).x0}


@family('glide_tokenizers')
def glide_levels(g):
    "The levels that the released samplers visit; the numbers of texts, if the vocabularies can be had"
    out = {'100': torch.tensor(iddpm.space_timesteps(1000, '100')), 'fast27': torch.tensor(edit.fast27())}
    for vocabulary, read in ((dalle.gpt2_bpe, glide_reads), (dalle.clip_bpe, clip_reads)):
        try: bpe = vocabulary()
        except CourseError: continue
        for text, want in g.info.get('tokens', {}).items():
            out |= {f'tokens/{text}/{k}': v[:len(want[k])] if v.ndim else v
                    for k, v in read(bpe, text, g.config).items() if k in want}
    return out


def glide_reads(bpe, text, config):
    "What GLIDE's denoisers are told: numbers, a filled row, how many count"
    require(len(bpe) == config['end_token'] == config['n_vocab'] - 1, f'{len(bpe)} symbols before the end token')
    (row,), mask = glide.glide_tokens(bpe, [text], 128)
    return dict(glide_bpe=torch.tensor(bpe.encode(text)), glide_padded_128=row, mask_true=mask.sum())


def clip_reads(bpe, text, config):
    "What GLIDE's CLIP is told: the same between two marks"
    row, = clip.clip_tokens([text], bpe)
    return dict(clip_bpe=torch.tensor(bpe.encode(text)), clip_padded_77=row, clip_len=row.argmax() + 1)


@family('full__glide_*')
def full_glide(g):
    with torch.device('meta'): model = glide.from_glide_flags(g.config, g.schema()['n_vocab'])
    model = layers.load_strict(model.to_empty(device='cpu'), g.weights()).eval()
    return dict(y=model(g.inputs['x'], g.inputs['timesteps'], **glide_told(g)))


def first(q, **given):
    "A quantiser with the golden's codes and histories, in the layout of our tensors"
    for name, value in given.items(): getattr(q, name).data.copy_(value)
    return q.train()


def with_gradients(q, z):
    "The answer, and gradients of loss + Σ z_q² with respect to the input and to the codes (where those have any)"
    with torch.enable_grad():
        z, codes = z.clone().requires_grad_(), q.codebook
        found = q(z)
        wanted = [z, codes] if codes.requires_grad else [z]
        return found, *torch.autograd.grad(found.loss + (found.z ** 2).sum(), wanted)


def quantiser(config, rule, **how):
    "From the several names that the same two numbers have"
    K, D = (next(config[k] for k in names if k in config) for names in (('K', 'n_embed', 'n_e'), ('D', 'dim', 'e_dim')))
    known = dict(beta=config.get('commitment_cost', config.get('beta', 1.)), decay=config.get('decay', .99),
                 eps=config.get('epsilon', config.get('eps', 1e-5)))
    return vqvae.Quantiser(K, D, rule, **known | how)


def numbered(g, name):
    "zN in order"
    return sorted((k for k in g.inputs if re.fullmatch(rf'{name}\d+', k)), key=lambda k: int(k[len(name):]))


@family('vqvae_ema_sonnet')
def sonnet_quantiser(g):
    "Channels last; matrices (D, K); averages whose hidden part starts at zero; `plain` has a codebook that learns by gradient"
    i, out, rows = g.inputs, {}, lambda z: z.movedim(-1, 1)
    q = first(quantiser(g.config, 'sonnet'), codebook=i['before.embeddings'].T, counts=i['before.ema_cluster_average'],
              sums=i['before.ema_dw_average'].T)
    zs = numbered(g, 'z')
    for z in zs:
        n, found = z[1:], q(rows(i[z]))
        out |= {f'step{n}.quantize': found.z.movedim(1, -1), f'step{n}.loss': found.loss.reshape(1), f'step{n}.indices': found.indices,
                f'step{n}.perplexity': found.perplexity.reshape(1), f'after{n}.embeddings': q.codebook.T.clone(),
                f'after{n}.ema_cluster_hidden': q.counts.clone(), f'after{n}.ema_dw_hidden': q.sums.T.clone(),
                f'after{n}.ema_cluster_average': q.counts / q._warm(), f'after{n}.ema_dw_average': q.sums.T / q._warm()}
    found = q.eval()(rows(i[zs[-1]]))
    out |= {'eval.quantize': found.z.movedim(1, -1), 'eval.loss': found.loss.reshape(1)}
    found = first(quantiser(g.config, 'gradient'), codebook=i['before.embeddings'].T)(rows(i[zs[-1]]))
    return out | {'plain.quantize': found.z.movedim(1, -1), 'plain.loss': found.loss.reshape(1), 'plain.indices': found.indices,
                  'plain.perplexity': found.perplexity.reshape(1)}


@family('vqvae_ema_zalando')
def zalando_quantiser(g):
    "Channels first, with gradients"
    i, out = g.inputs, {}
    q = first(quantiser(g.config, 'zalando', names='zalando'))
    layers.load_strict(q, {'_embedding.weight': i['before.embedding'], '_ema_cluster_size': i['before.ema_cluster_size'],
                           '_ema_w': i['before.ema_w']})
    for z in numbered(g, 'z'):
        n, (found, slope) = z[1:], with_gradients(q, i[z])
        out |= {f'step{n}.quantized': found.z, f'step{n}.loss': found.loss, f'step{n}.indices': found.indices.flatten(),
                f'step{n}.perplexity': found.perplexity, f'step{n}.grad_z': slope}
        out |= {f'after{n}.{k.lstrip("_").removesuffix(".weight")}': v.clone() for k, v in q.state_dict().items()}
    found = q.eval()(i[numbered(g, 'z')[-1]])
    return out | {'eval.quantized': found.z, 'eval.loss': found.loss}


@family('vqvae_zalando_model')
def zalando_model(g):
    "The whole small network in eval mode, and its quantiser that learns by gradient"
    i, c = g.inputs, g.config
    q = first(quantiser(c, 'gradient'), codebook=i['vq.embedding'])
    found, slope, codes = with_gradients(q, i['vq.z'])
    out = {'vq.quantized': found.z, 'vq.loss': found.loss, 'vq.indices': found.indices.flatten(), 'vq.perplexity': found.perplexity,
           'vq.grad_z': slope, 'vq.grad_embedding': codes}
    net = vqvae.VQVAE(i['image'].shape[1], c['num_hiddens'], c['num_residual_layers'], c['num_residual_hiddens'], c['K'], c['D'],
                      block=dict(bias=False, rectified=True), rule='zalando', beta=c['commitment_cost'], decay=c['decay'])
    layers.load_strict(net, vqvae.from_zalando(g.weights())).eval()
    z = net.features(i['image'])
    found = net.quantise(z)
    return out | {'model.z_pre_vq': z, 'model.loss': found.loss, 'model.perplexity': found.perplexity,
                  'model.x_recon': net.decoder(found.z)}


def rewound(g):
    """The state before the first step.

    The published golden stored it by reference, so it holds the state after that step. Then the step is undone: averages by its
    indices and inputs, codes from what it answered; codes that it did not use can be anywhere far away.
    """
    i, o, decay = g.inputs, g.outputs, g.config.get('decay', .99)
    before = {k.removeprefix('before.'): v for k, v in i.items() if k.startswith('before.')}
    if not all(v.equal(o[f'after1.{k}']) for k, v in before.items()): return before
    chosen, z = o['step1.indices'].flatten(), i['z1'].flatten(0, -2).double()
    n = torch.bincount(chosen, minlength=len(before['cluster_size'])).double()
    s = torch.zeros_like(before['embed_avg'].T, dtype=torch.float64).index_add_(0, chosen, z)
    back = lambda average, new: ((average.double() - (1 - decay) * new) / decay).float()
    codes = torch.full_like(before['embed'].T, 1e3)
    codes[chosen] = o['step1.quantize'].flatten(0, -2)
    return dict(embed=codes.T, cluster_size=back(before['cluster_size'], n), embed_avg=back(before['embed_avg'], s.T))


@family('vqvae2_quantize_rosinality')
def rosinality_quantiser(g):
    "Channels last; its keys; the loss without β"
    i, out = g.inputs, {}
    q = quantiser(g.config, 'rosinality', beta=1., names='rosinality').train()
    layers.load_strict(q, rewound(g))
    for z in numbered(g, 'z'):
        n, found = z[1:], q(i[z].movedim(-1, 1))
        out |= {f'step{n}.quantize': found.z.movedim(1, -1), f'step{n}.diff': found.loss, f'step{n}.indices': found.indices}
        out |= {f'after{n}.{k}': v.clone() for k, v in q.state_dict().items()}
    return out


@family('vqvae2_model')
def two_levels(g):
    "The whole network in eval mode, by its own keys; its diff is without β"
    c, x = g.config, g.inputs['image']
    net = vqvae2.VQVAE2(c['in_channel'], c['channel'], c['n_res_block'], c['n_res_channel'], c['embed_dim'], c['n_embed'], beta=1.)
    top, bottom = layers.load_strict(net, g.weights()).eval().levels(x)
    return dict(quant_t=top.z, quant_b=bottom.z, id_t=top.indices, id_b=bottom.indices, diff=(top.loss + bottom.loss).reshape(1),
                dec=net.draw(top.z, bottom.z), decode_code=net.draw(net.quantize_t.lookup(top.indices), net.quantize_b.lookup(bottom.indices)))


@family('vqgan_vector_quantizer')
def vqgan_quantiser(g):
    "legacy0|1/…: VQGAN's second quantiser with β on either loss; v1/…: its first, which is as legacy"
    i, out = g.inputs, {}
    for case in ('legacy0', 'legacy1', 'v1'):
        q = layers.load_strict(quantiser(g.config, 'gradient', legacy=case != 'legacy0', names='taming'), g.weights())
        found, slope, codes = with_gradients(q, i['z'])
        out |= {f'{case}/z_q': found.z, f'{case}/loss': found.loss, f'{case}/indices': found.indices.flatten(),
                f'{case}/grad_z': slope, f'{case}/grad_embedding': codes, f'{case}/perplexity': found.perplexity}
    out['v1/indices'] = out['v1/indices'][:, None]
    return {k: v for k, v in out.items() if k in g.outputs} | dict(get_codebook_entry=q.lookup(found.indices))


@family('diagonal_gaussian')
def diagonal_gaussian(g):
    "Moments, a sample of given noise, divergence from the prior and from another, minus log-density"
    i = g.inputs
    p, other = (vae.DiagonalGaussian(i[k]) for k in ('parameters', 'other_parameters'))
    return dict(mean=p.mean, logvar=p.logvar, std=p.std, var=p.var, mode=p.mode(), sample=p.sample(i['noise']), kl=p.kl(),
                kl_other=p.kl(other), nll=p.nll(i['sample']))


@family('autoencoder_kl*', 'eps_autoencoder_kl*', 'full__*_vae*')
def kl_stage(g):
    "Encoder and decoder by their own keys; codes are not scaled"
    i = g.inputs
    net = layers.load_strict(first_stage.AutoencoderKL(**g.config), g.weights()).eval()
    q = net.encode(i['x'])
    out = dict(encoder_h=net.encoder(i['x']), moments=net.quant_conv(net.encoder(i['x'])), mean=q.mean, logvar=q.logvar,
               posterior_mean=q.mean, posterior_logvar=q.logvar, kl=q.kl(), decode_mode=net.decode(q.mode()))
    if 'noise' in i: out |= dict(sample=q.sample(i['noise']), decode_sample=net.decode(q.sample(i['noise'])))
    return out | (dict(decode_z=net.decode(i['z'])) if 'z' in i else {})


@family('vqmodel*', 'full__vqgan*')
def vq_stage(g):
    "Codes, the quantiser's loss and the copies; LDM's interface encodes without the codebook and decodes with it"
    x, net = g.inputs['x'], layers.load_strict(first_stage.VQModel(**g.config), g.weights()).eval()
    h, q = net.features(x), net.encode(x)
    rec = net.decode(q.z, quantise=False)
    return dict(quant=q.z, emb_loss=q.loss, loss=q.loss, indices=q.indices.flatten(), rec=rec, dec=rec, interface_h=net.latents(x),
                interface_decode=net.decode(h), interface_decode_force_not_quantize=net.decode(h, quantise=False))


@family('vqgan_discriminator*')
def patch_critic(g):
    "Logits in eval mode, both losses, and the weight that follows from two gradients"
    i, net = g.inputs, layers.load_strict(first_stage.PatchGAN(**g.config), g.weights()).eval()
    real, fake = net(i['real']), net(i['fake'])
    return dict(logits_real=real, logits_fake=fake, g_loss=-fake.mean(), hinge_d_loss=first_stage.critic_loss(real, fake),
                vanilla_d_loss=first_stage.critic_loss(real, fake, 'vanilla'),
                **{'adaptive_weight_disc0.8': first_stage.adaptive_weight(i['grad_nll'], i['grad_g'], .8)})


@family('ldm_*unet', 'sd1_unet*', 'sd2_unet*', 'eps_sd1_unet*', 'full__sd-*_unet*', 'full__ldm-*_unet*')
def latent_unet(g):
    "The denoisers of latent diffusion by their own keys and settings"
    config, i = g.config.get('unet', g.config), g.inputs
    with torch.device('meta'): net = latent.LatentUNet(**config)
    net = layers.load_strict(net.to_empty(device='cpu'), g.weights()).eval()
    return dict(y=net(i['x'], i['timesteps'], i.get('context'), i.get('y')))


def latent_schedule(c):
    "Its two ends and its length from fields of their own, or from words such as 'sd linear 0.00085..0.012, T=1000'"
    words = c.get('schedule', '')
    ends, T = re.search(r'([\d.]+)\.\.([\d.]+)', words), re.search(r'T=(\d+)', words)
    start, end = ends.groups() if ends else (c.get('linear_start', .00085), c.get('linear_end', .012))
    return latent.Schedule.scaled_linear(int(T[1] if T else c.get('T', 1000)), float(start), float(end))


@family('ldm_schedules')
def ldm_schedules(g):
    "NAME/ARRAY, NAME/ddimN/ARRAY with sigmas_etaE among them, quad_timesteps_N"
    out = {}
    for name in g.outputs:
        if name.startswith('quad_timesteps_'):
            out[name] = torch.tensor(ddim.quadratic_timesteps(1000, int(name.rpartition('_')[2]))) + 1
            continue
        which, *more, array = name.split('/')
        s = latent.Schedule.scaled_linear(1000, *g.config[which])
        if more:
            table = latent.latent_path(s, int(more[0].removeprefix('ddim'))).table
            η = float(array.removeprefix('sigmas_eta')) if array.startswith('sigmas') else 0.
            own = dict(timesteps=table.t, alphas=table.ᾱ, alphas_prev=table.ᾱ_next)
            out[name] = own.get(array, ddim.sigma(table.ᾱ, table.ᾱ_next, η))
        elif array == 'lvlb_weights': out[name] = latent.lvlb_weights(ddpm.Denoiser(None, s))
        elif array == 'posterior_log_variance_clipped': out[name] = s.posterior_variance.clamp(min=1e-20).log()
        else: out[name] = getattr(s, array.removesuffix('64'))
    return out


def guided_latents(g, parameterization='eps'):
    "A closed-form model, alone and guided by an unconditional context; LDM's path; the times the model was told"
    i, c, seen = g.inputs, g.config, []
    s, model = latent_schedule(c), formula(c['model'])
    def net(x, t, context):
        seen.append(t[:len(i['x_T'])].double())
        return model(x, t, c=context)
    scale = float(c.get('unconditional_guidance_scale', c.get('scale')))
    d = ddpm.Denoiser(net, s, parameterization)
    return d, d.guided(raw=cfg.classifier_free(scale, context=i['uc'])), latent.latent_path(s, c['S']), seen


@family('ldm_samplers')
def ldm_samplers(g):
    "Whole loops with guidance; ddim_noguide without; stochastic_encode and img2img_decode meet at step t_enc"
    i, (plain, d, path, seen), out = g.inputs, guided_latents(g), {}
    def walk(name, sampler, path, x, d=d, times='', wide=1, **how):
        if name not in g.outputs: return
        seen.clear()
        states = [x, *sampler(d, path, x, **how, context=i['c'])]
        out.update({name: states[-1], f'{name}_trajectory': torch.stack(states), times: torch.stack([t[:wide] for t in seen])})
    for name in g.outputs:
        if re.fullmatch(r'ddim_eta[\d.]+', name):
            walk(name, ddim.ddim, path, i['x_T'], noises=i['noises'], eta=float(name.removeprefix('ddim_eta')))
    walk('ddim_noguide', ddim.ddim, path, i['x_T'], plain, 'ddim_timesteps_seen', len(i['x_T']))
    walk('plms', latent.plms, path, i['x_T'], times='plms_timesteps_seen')
    walk('dpm_solver_pp_2m', latent.dpm_solver, latent.even_times(d.schedule, g.config['S']), i['x_T'], times='dpm_solver_timesteps_seen')
    if 't_enc' in i:
        k = int(i['t_enc'].flatten()[0])
        out['stochastic_encode'] = latent.stochastic_encode(path, i['x0'], k, i['enc_noise'])
        walk('img2img_decode', ddim.ddim, path[-k:], out['stochastic_encode'])
    return out


@family('ldm_p_losses')
def ldm_p_losses(g):
    "A constant model output; the reported bound, and the loss that the weights of both terms make"
    i, c, s = g.inputs, g.config, latent_schedule(g.config)
    d = ddpm.Denoiser(None, s, c['parameterization'])
    terms = latent.latent_terms(d, i['model_output'], i['x_start'], i['noise'], i['t'], c['loss_type'])
    simple, vlb = (terms[k].mean() for k in ('simple', 'vlb'))
    loss = c['l_simple_weight'] * simple + c['original_elbo_weight'] * vlb
    return {'x_noisy': ddpm.q_sample(i['x_start'], s.steps().at(i['t']).ᾱ, i['noise']), 'lvlb_weights': latent.lvlb_weights(d),
            'loss': loss, 'dict/train_loss': loss, 'dict/train_loss_simple': simple, 'dict/train_loss_vlb': vlb}


@family('sd2_v_prediction')
def sd2_v_prediction(g):
    "Velocities there and back, and DDIM on guided velocities"
    i, (d, guided, path, _) = g.inputs, guided_latents(g, 'v')
    step = d.schedule.steps().at(i['t'])
    walk = {name: last(ddim.ddim(guided, path, i['x_T'], context=i['c'])) for name in g.outputs if name.startswith('ddim')}
    return walk | dict(get_v=d.target(i['x'], i['noise'], None, step), lvlb_weights=latent.lvlb_weights(d),
                       predict_start_from_z_and_v=ddpm.x0_from_v(i['x'], i['v'], step.ᾱ),
                       predict_eps_from_z_and_v=ddpm.eps_from_v(i['x'], i['v'], step.ᾱ))


@family('sdunclip_noise_aug')
def sdunclip_noise_aug(g):
    i, c = g.inputs, g.config
    net = latent.NoiseAugmentation(i['emb'].shape[1], c['timestep_dim'], schedule(c['schedule'].replace('squaredcos_cap_v2', 'cosine'), c['T']))
    net.load_state_dict({k: i[k] for k in ('data_mean', 'data_std')})
    y = net(i['emb'], i['noise_level'], i['noise'])
    z, level = y.split([i['emb'].shape[1], c['timestep_dim']], 1)
    return dict(adm_y=y, z=z, level_emb=level)


@family('ldm_bert_xtransformer')
def ldm_bert(g): return dict(embeddings=layers.load_strict(latent.BERTEncoder(**g.config), g.weights()).eval()(**g.inputs))


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


@family('gd_classifier_*')
def gd_classifier(g):
    "Logits, and the gradient that guidance uses, already scaled"
    i, model = g.inputs, openai_unet.EncoderUNetModel(**openai_settings(g.config))
    layers.load_strict(model, g.weights()).eval()
    slope = adm.log_prob_gradient(model, i['x'], i['timesteps'], i['y'])
    return dict(logits=model(i['x'], i['timesteps']), cond_fn_grad=slope * g.config['classifier_scale'])


@family('gd_train_step')
def gd_train_step(g):
    "Whole training steps: hybrid loss, gradients, AdamW, moving average; norms are listed in the json's parameter order"
    c, out = g.config, {}
    s = schedule(c['schedule'], c['T'], c)
    if s is None: return {}
    net = layers.load_strict(openai_unet.UNetModel(**openai_settings(c)), g.weights())
    average, ema = openai_unet.UNetModel(**openai_settings(c)), train.EMA(net, c['ema_rate'])
    optimizer = torch.optim.AdamW(net.parameters(), c['lr'], weight_decay=c['weight_decay'])
    for k in sorted({name.split('.')[0] for name in g.outputs}, key=lambda k: int(k.removeprefix('step'))):
        given = {name.removeprefix(f'{k}.'): v for name, v in g.inputs.items() if name.startswith(f'{k}.')}
        with torch.enable_grad():
            step = s.steps().at(given['t'])
            x = ddpm.q_sample(given['x_start'], step.ᾱ, given['noise'])
            terms = iddpm.loss_terms(ddpm.Denoiser(net, s, 'eps', 'learned_range'), net(x, given['t'], given['y']),
                                     given['x_start'], given['noise'], x, step)
            terms['losses'] = terms.pop('loss')
            loss = (terms['losses'] * given['weights']).mean()
            optimizer.zero_grad()
            loss.backward()
        found = {'grad': {n: p.grad.clone() for n, p in net.named_parameters()}}
        optimizer.step()
        ema.update(net)
        ema.copy_to(average)
        found |= {what: {n: p.detach().clone() for n, p in m.named_parameters()}
                  for what, m in (('after', net), ('ema', average))}
        terms |= {f'{what}_{n}': v for what, values in found.items() for n, v in values.items()}
        terms |= {f'{what}_norms': torch.stack([values[n].norm() for n in g.info['parameter_order']])
                  for what, values in found.items()}
        out |= {f'{k}.{name}': v.detach() for name, v in (terms | {'loss': loss}).items()}
    return out


@family('mingpt')
def mingpt(g):
    "Logits and mean cross-entropy; dropouts of the configuration do nothing in eval mode"
    known = ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'n_unmasked')
    model = priors.GPT(**{k: v for k, v in g.config.items() if k in known}, masks=True)
    logits = layers.load_strict(model, g.weights()).eval()(g.inputs['idx'], g.inputs.get('embeddings'))
    return dict(logits=logits, loss=priors.token_loss(logits, g.inputs['targets']))


@family('karlo_prior', 'full__karlo_prior*')
def karlo_prior(g):
    "One call; the loop with guidance doubles the batch, and its first half is what the second is compared with"
    with torch.device('meta'): net = unclip._build({k: v for k, v in g.config.items() if k != 'diffusion'})
    net = layers.load_strict(net.to_empty(device='cpu'), g.weights()).eval()
    i, text = g.inputs, ('text_emb', 'text_enc', 'mask')
    out = dict(y=net(i['x'], i['timesteps'], **{k: i[k] for k in text}))
    loop = g.group('loop/in/')
    if not loop: return out
    words = g.config['diffusion']
    T, spacing = (int(re.search(p, words)[1]) for p in (r'(\d+) steps', r'respacing (\d+)'))
    n = len(loop['scale'])
    said, unsaid = ({k: loop[k][part] for k in text} for part in (slice(n), slice(n, None)))
    d = unclip.prior_denoiser(net, schedule(re.search(r'steps (\w+)', words)[1], T))
    d = d.guided(raw=cfg.classifier_free(loop['scale'], **unsaid))
    return out | {'loop/sample': last(ddpm.ancestral(d, d.schedule.respaced(str(spacing)), loop['x_T'][:n],
                                                 noises=loop['noises'][:, :n], **said))}


@family('karlo_decoder', 'full__karlo_decoder*', 'karlo_superres', 'full__karlo_sr*')
def karlo_unet(g):
    with torch.device('meta'): net = unclip._build(g.config)
    net = layers.load_strict(net.to_empty(device='cpu'), g.weights()).eval()
    return dict(y=net(**g.inputs))


@family('fid_inception_block_*')
def fid_block(g):
    "A block named as in pytorch-fid: FIDInceptionA … FIDInceptionE_2 (the last takes maxima), and two of the pools"
    letter, _, second = g.info['official'].rpartition('Inception')[2].partition('_')
    block = getattr(inception, f'Block{letter}')(**g.config).eval()
    if second == '2': block.pool = 'max'
    counters = {k: v for k, v in block.state_dict().items() if k.endswith('num_batches_tracked')}
    layers.load_strict(block, {**counters, **g.weights()})
    x = g.inputs['x']
    return dict(y=block(x), avg_pool_no_pad=inception.POOLS['inside'](x), E2_max_pool=inception.POOLS['max'](x))


@family('full__fid_inception*')
def full_inception(g):
    "The four maps that pytorch-fid gives, and the logits with bias"
    net = inception.Inception().take(g.weights()).eval()
    maps = dict(net.maps(net.prepare(2 * g.inputs['x01'] - 1)))
    return dict(block0_64=maps['pool1'], block1_192=maps['pool2'], block2_768=maps['Mixed_6e'],
                pool3_2048=maps['Mixed_7c'].mean((2, 3), keepdim=True), logits1008=net.read('logits', maps['Mixed_7c']))


@family('metrics_features')
def metrics_features(g):
    "pytorch-fid's distance and moments, torch-fidelity's scores; [isc_splitsK_shuffle0|1] and the kernel are read from names and json"
    i, c, out = g.inputs, g.config, {}
    stats = {k: metrics.Statistics().update(v) for k, v in i.items() if k != 'logits'}
    far = lambda a, b: torch.tensor(metrics.frechet_distance(stats[a], stats[b])).double()
    out |= dict(fid=far('f1', 'f2'), fid_torch_fidelity=far('f1', 'f2'), fid_self=far('f1', 'f1'), mu1=stats['f1'].mean,
                sigma1=stats['f1'].cov, fid_singular=far('singular_f1', 'singular_f2'),
                fid_degenerate=far('degenerate_f1', 'degenerate_f2'))
    for name in [k for k in g.outputs if k.startswith('isc_splits')]:
        splits, shuffle = (int(part.lstrip('abcdefghijklmnopqrstuvwxyz')) for part in name.split('_')[1:])
        parts = scores.groups_shuffled(len(i['logits']), splits, c['isc_rng_seed'] if shuffle else None)
        values = scores.inception_score(i['logits'], parts)
        out[name] = torch.stack([values.mean(), values.std(unbiased=False)])
    sure = 1e3 * torch.eye(i['logits'].shape[1])
    k = c['kid']
    kernel = dict(degree=k['degree'], coef0=k['coef0'], gamma=None if str(k['gamma']).startswith('1/') else k['gamma'])
    how = dict(subsets=k['subsets'], size=k['subset_size'], seed=k['rng_seed'])
    values = scores.kid(i['f1'], i['f2'], **how, **kernel)
    drawn = list(scores.kid_subsets(len(i['f1']), len(i['f2']), **how))
    precision, recall = scores.precision_recall(i['f1'], i['f2'], c['k'])   # f1 is real, f2 generated
    first = [int(n.removeprefix('mmd2_first')) for n in g.outputs if n.startswith('mmd2_first')]
    return out | dict(isc_onehot=scores.inception_score(sure)[0], kid_mean=values.mean(), kid_std=values.std(unbiased=False),
                      kid_subsets_idx=torch.stack([torch.stack([torch.from_numpy(v) for v in pair]) for pair in drawn]),
                      prc_precision=torch.tensor(precision), prc_recall=torch.tensor(recall),
                      **{f'mmd2_first{n}': scores.mmd2(i['f1'][:n], i['f2'][:n], **kernel) for n in first})


@family('adm_evaluator')
def adm_evaluator(g):
    "ADM's own evaluator: squared distances in float16, splits in order"
    i, k = g.inputs, g.config['k']
    real, fake = i['ref'], i['sample']
    precision, recall = scores.precision_recall(real, fake, k, 'adm')
    value = scores.inception_score(i['probs'].log(), scores.groups_in_order(len(i['probs']), g.config['split_size'])).mean()
    out = dict(fid=metrics.frechet_distance(*(metrics.Statistics().update(v) for v in (real, fake))), precision=precision,
               recall=recall, realism=scores.realism(real, fake, k, 'adm'))
    out |= {f'radii_{name}': scores.manifold_radii(x, k, 'adm')[:, None] for name, x in (('ref', real), ('sample', fake))}
    for name in g.outputs:
        if name.startswith('inception_score_split'): out[name] = value
        if name.startswith('pairwise_sq_dist_'):
            n, m = map(int, name.rpartition('_')[2].split('x'))
            out[name] = scores.distances(real[:n], fake[:m], 'adm')
    return {name: torch.as_tensor(v).reshape(g.outputs[name].shape) for name, v in out.items() if name in g.outputs}


@family('full__dalle_dvae*', 'dalle_dvae*')
def dalle_dvae(g):
    "The dVAE's encoder and decoder: logits, words, statistics of the pixels, and the picture"
    i = g.inputs
    if 'salt' in g.info:
        parts = [procedural(g.schema(k)['state_dict'], g.info['salt'] + name, g.info.get('gain', 1.))
                 for k, name in enumerate(('encoder.', 'decoder.'))]
    else:
        w = g.weights()
        parts = [{k[len(name):]: v for k, v in w.items() if k.startswith(name)} for name in ('encoder.', 'decoder.')]
    model = dvae.DVAE(**dvae.sizes_of(*parts)).eval()
    for net, state in zip((model.encoder, model.decoder), parts): layers.load_strict(net, state)
    x = i['x_mapped'] if 'x_mapped' in i else dvae.map_pixels(i['image01'])
    logits = model.encoder(x)
    words = logits.argmax(1)
    stats = model.decoder(nn.functional.one_hot(words, model.words).movedim(-1, 1).float())
    out = dict(z_logits=logits, z=words, z_indices=words, map_pixels=x, x_stats=stats,
               x_rec=dvae.unmap_pixels(stats[:, :model.channels].sigmoid()), x_stats_from_softmax=model.decoder(logits.softmax(1)))
    if 'unmap_test' in i: out['unmap_test'] = dvae.unmap_pixels(i['unmap_test'])
    return out


@family('clip_tokenizer')
def clip_tokenizer(g):
    "Numbers of the words in the json, against an output that holds nothing else; needs CLIP's vocabulary"
    bpe = clip.clip_bpe()
    require(g.config == dict(vocab=len(bpe), sot=bpe.ids[clip.CLIP_SPECIALS[0]], eot=bpe.ids[clip.CLIP_SPECIALS[1]]), 'size')
    for text, ids in g.info['tokens'].items(): require(bpe.encode(text) == ids, f'{text!r} becomes {bpe.encode(text)}')
    return {name: v for name, v in g.outputs.items()}


@family('openai_clip_vit', 'openai_clip_resnet', 'openclip_tiny', 'full__clip_*')
def clip_towers(g):
    "Embeddings, logits, losses and two gradients; full-size pictures follow from their description"
    config, i = g.config, dict(g.inputs)
    model = clip.CLIP(**(clip.open_clip_flags(config) if 'text_cfg' in config else config)).eval()
    layers.load_strict(model, g.weights() | {k: v for k, v in model.state_dict().items() if 'num_batches' in k})
    if 'salt' in g.info: model.logit_scale.data.fill_(math.log(100))
    if 'image_check_stride32' in i:
        i['image'] = torch.from_numpy((np.random.RandomState(9).random_sample((2, 3, 224, 224)) * 4 - 2).astype(np.float32))
        torch.testing.assert_close(i['image'][:, :, ::32, ::32], i['image_check_stride32'])
    tokens = i.get('text', i.get('tokens'))
    if tokens is None: return dict(image_features=model.encode_image(i['image']))
    with torch.enable_grad():
        image, text = model.encode_image(i['image']), model.encode_text(tokens)
        loss = clip.contrastive_loss(image, text, clip.scale_of(model))
        loss.backward()
    logits = model(i['image'], tokens)
    return dict(image_features=image, text_features=text, logits_per_image=logits[0], logits_per_text=logits[1],
                contrastive_loss=loss, clip_contrastive_loss=loss, open_clip_ClipLoss=loss,
                grad_logit_scale=model.logit_scale.grad, grad_text_projection=model.text_projection.grad,
                image_features_normalized=model.encode_image(i['image'], normalize=True),
                text_features_normalized=model.encode_text(tokens, normalize=True),
                last=model.text_states(tokens), penultimate=model.text_states(tokens, 1))


@family('full__openclip_*_text', 'full__sd-v1_clip_text')
def clip_text(g):
    "What Stable Diffusion reads: the states of CLIP's text tower"
    name = Path(g.info['keys_file']).stem.replace('__', '/')
    model = layers.load_strict(clip.from_official(name), g.weights()).eval()
    if isinstance(model, clip.CLIPTextModel): return dict(last_hidden_state=model(g.inputs['input_ids']))
    return dict(last=model.text_states(g.inputs['tokens']), penultimate=model.text_states(g.inputs['tokens'], 1))


@family('glide_noised_clip')
def glide_noised_clip(g):
    "Both towers and the gradient that guides"
    i, c = g.inputs, g.config
    model = layers.load_strict(clip.NoisedCLIP(c['text'], c['image'], c['logit_scale']), g.weights()).eval()
    text = model.encode_text(i['tokens'], i['lens'])
    return dict(text_embeddings=text, image_embeddings=model.encode_image(i['x'], i['t']),
                cond_fn_grad=model.gradient(i['x'], i['t'], text, c['grad_scale']))


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


# Outputs whose json asks for more digits than they have: name → (atol, why)
AMPLIFIED = {'glide_text2im/cfg/pred_xstart': (
    1.2e-4, 'x0 magnifies an error of ε by √(1/ᾱ−1) = 5.7 and guidance by up to 5; the same network in float64 is 2.9e-5 '
            'from the stored numbers, which allow 2e-5, and with the official order of operations in float32 3.7e-5, so the '
            'tolerance of ε is carried over: 5.7 · 2e-5')}


def tolerances(g, name) -> tuple[float, float]:
    "The json's, or what its note says of some outputs ('compare after_* at atol 2e-4'), or what `AMPLIFIED` says"
    if (key := f'{g.name}/{name}') in AMPLIFIED: return g.info['rtol'], AMPLIFIED[key][0]
    found = re.search(r'compare (\S+) at atol (\S+?)\.?$', g.info.get('note') or '')
    loose = found and fnmatch(name.split('.', 1)[-1], found[1])
    return g.info['rtol'], float(found[2]) if loose else g.info['atol']


def compare(g, got) -> Verdict:
    "Every output at the json's own tolerance"
    worst, wrong, done = 0., [], 0
    for name, want in g.outputs.items():
        rtol, atol = tolerances(g, name)
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
