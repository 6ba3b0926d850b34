"""Drawing pictures: this package against diffusers' pipelines, side by side in one process; and quality against time.

    python benchmarks/sampling.py [--n 16] [--steps 20] [--rounds 7] [--threads N] [--compile] [--json FILE]
    python benchmarks/sampling.py --quality [--samples 500] [--passes 5 10 20 50] [--plot FILE.png]   # feature-FID and time by sampler

Both draw with the same network and the same weights (the shipped ddpm_fashion, renamed for diffusers' UNet2DModel), in equally many
passes. Every round runs every contender once, in another order, and medians are reported, so that a busy machine is busy for all.
"""
import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from diffcourse import data, metrics
from diffcourse.core import default_device
from diffcourse.ddim import ddim, dpm_2m, heun, quadratic_timesteps
from diffcourse.ddpm import ancestral, ddpm_fashion, picture_denoiser, sample
from diffcourse.train import device_name
from diffcourse.weights import load_weights, shipped
from diffcourse.unet import unet_to_diffusers
from side_by_side import interleaved, ratio


def network():
    "The shipped network; an untrained one where none is shipped"
    net = ddpm_fashion.model().eval()
    return load_weights('ddpm_fashion', net) if shipped('ddpm_fashion') else net


def ours(
    n: int,                       # pictures
    steps: int,                   # passes through the network
    sampler=ddim,                 # of `diffcourse.ddim`
    channels_last: bool = False,  # memory layout
    compiled: bool = False,       # through torch.compile with the weights frozen in
):                                # a function of a seed that draws
    "This package's sampler, from the noise that diffusers draws for this seed"
    net = network().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    denoiser = picture_denoiser(torch.compile(net) if compiled else net)
    path = denoiser.schedule.steps(range(0, 1000, 1000 // steps))

    @torch.inference_mode()
    def draw(seed):
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 1, 28, 28, generator=gen)
        for x in sampler(denoiser, path, x, gen): pass
        return x.clamp(-1, 1)
    return draw


def theirs(
    n: int,                       # pictures
    steps: int,                   # passes through the network
    scheduler: str = 'DDIMScheduler', # of diffusers
    channels_last: bool = False,  # memory layout
):                                # a function of a seed that draws
    "diffusers' pipeline with the same weights"
    import diffusers
    config, state = unet_to_diffusers(network())
    model = diffusers.UNet2DModel.from_config(config).eval()
    model.load_state_dict(state)
    if channels_last: model = model.to(memory_format=torch.channels_last)
    how = dict(clip_sample=True) if scheduler == 'DDIMScheduler' else dict(algorithm_type='dpmsolver++', solver_order=2)
    made = getattr(diffusers, scheduler)(1000, beta_start=1e-4, beta_end=.02, **how)
    if scheduler == 'DDIMScheduler':
        pipe = diffusers.DDIMPipeline(model, made)
        pipe.set_progress_bar_config(disable=True)
        draw = lambda seed: pipe(n, torch.Generator().manual_seed(seed), num_inference_steps=steps, output_type='np',
                                 use_clipped_model_output=True).images   # ε follows the clipped x0, as here
        return lambda seed: torch.from_numpy(draw(seed)).permute(0, 3, 1, 2) * 2 - 1
    return partial(_loop, model, made, n, steps)


@torch.no_grad()
def _loop(model, scheduler, n, steps, seed):
    "The documented loop for a scheduler that has no unconditional pipeline"
    scheduler.set_timesteps(steps)
    x = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps: x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


def contenders(n, steps, compiled=False):
    "name → a function of a seed"
    table = {'diffusers, DDIMPipeline': theirs(n, steps), '  channels-last': theirs(n, steps, channels_last=True),
            'diffusers, DPM-Solver++(2M) loop': theirs(n, steps, 'DPMSolverMultistepScheduler'),
            'diffcourse, ddim': ours(n, steps), '  channels-last.': ours(n, steps, channels_last=True),
            'diffcourse, dpm_2m': ours(n, steps, dpm_2m)}
    if compiled:
        import torch._inductor.config as inductor
        inductor.freezing = True                            # weights become constants, laid out once as the convolutions want them
        table['  compiled'] = ours(n, steps, compiled=True)
    return table


def measure(table, rounds) -> dict:
    "name → seconds and CPU seconds of each round; every round in a new order"
    first, warm = {}, {}
    for k, draw in table.items():                                                      # warm, and what they draw
        start = time.perf_counter()
        first[k] = draw(0)
        warm[k] = time.perf_counter() - start
    for k, x in first.items(): assert bool(x.isfinite().all()) and x.abs().max() <= 1 + 1e-5, k
    seconds, cpu, _ = interleaved({k: lambda r, draw=draw: draw(r + 1) for k, draw in table.items()}, rounds)
    same = float((first['diffusers, DDIMPipeline'] - first['diffcourse, ddim']).abs().max())
    assert same < 1e-3, f'the two do not compute the same pictures: they differ by {same}'
    return dict(seconds=seconds, cpu=cpu, warm=warm, largest_difference=same)


def report(result, n) -> str:
    "A Markdown table; ratios are medians of the rounds' ratios"
    base, rows = 'diffusers, DDIMPipeline', ['| contender | pictures/s | against the pipeline | same, by CPU time |', '|---|---:|---:|---:|']
    for k, v in result['seconds'].items():
        rows.append(f'| {k.replace("  ", "&emsp;")} | {n / statistics.median(v):.1f} | {ratio(result["seconds"], base, k):.2f}× | {ratio(result["cpu"], base, k):.2f}× |')
    if '  compiled' in result['warm']: rows += ['', f'First call of the compiled network: {result["warm"]["  compiled"]:.0f} s.']
    return '\n'.join(rows + ['', f'Largest difference between the two DDIM pictures of one seed: {result["largest_difference"]:.1e}'])


def quality(samples, counts) -> list:
    "Feature-FID and seconds a picture by sampler and number of passes; on a CPU the process's own seconds, whatever else runs"
    device, net = default_device(), network()
    net, rows = net.to(device, memory_format=torch.channels_last), []
    model = metrics.get_extractor('fashion_classifier', device)
    reference = metrics.statistics(data.fashion_mnist('train'), model)
    for name, sampler in (('ancestral', ancestral), ('ddim', ddim), ('dpm_2m', dpm_2m), ('heun', heun)):
        denoiser = picture_denoiser(net)
        for passes in counts:
            path = denoiser.schedule.steps(quadratic_timesteps(1000, (passes + 1) // 2 if name == 'heun' else passes))
            clock = time.perf_counter if device.type == 'cuda' else time.process_time
            start = clock()
            x = sample(denoiser, (samples, 1, 28, 28), path, 0, sampler, batch_size=64).clamp(-1, 1)
            took = clock() - start
            score = metrics.feature_fid(x, reference, model)
            rows.append(dict(sampler=name, passes=passes, seconds=took / samples, fid=score.value, low=score.low, high=score.high))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def plot(rows, path):
    "Feature-FID against milliseconds a picture, one line for each sampler; the numbers are passes"
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6, 3.4), dpi=96)
    ax = fig.subplots()
    for name in dict.fromkeys(r['sampler'] for r in rows):
        mine = [r for r in rows if r['sampler'] == name]
        line, = ax.plot([1000 * r['seconds'] for r in mine], [r['fid'] for r in mine], 'o-', ms=4, label=name)
        for r in mine: ax.annotate(r['passes'], (1000 * r['seconds'], r['fid']), (3, 4), textcoords='offset points', fontsize=8, color=line.get_color())
    ax.set(xscale='log', yscale='log', xlabel='milliseconds a picture, one CPU thread' if torch.get_num_threads() == 1 else 'milliseconds a picture',
           ylabel='feature-FID')
    ax.legend(fontsize=8)
    ax.grid(alpha=.3, which='both')
    fig.tight_layout()
    fig.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description='Drawing pictures, against diffusers')
    p.add_argument('--n', type=int, default=16)
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--threads', type=int)
    p.add_argument('--compile', action='store_true', help='also this sampler with a compiled network; the first call takes minutes on a CPU')
    p.add_argument('--quality', action='store_true')
    p.add_argument('--samples', type=int, default=500)
    p.add_argument('--passes', type=int, nargs='+', default=(5, 10, 20, 50))
    p.add_argument('--plot', type=Path)
    p.add_argument('--json', type=Path)
    a = p.parse_args(argv)
    if a.threads: torch.set_num_threads(a.threads)
    if a.quality:
        rows = quality(a.samples, a.passes)
        if a.plot: plot(rows, a.plot)
        print('\n'.join(['| sampler | passes | ms a picture | feature-FID | 95 % |', '|---|---:|---:|---:|---|'] + [
            f"| {r['sampler']} | {r['passes']} | {1000 * r['seconds']:.0f} | {r['fid']:.2f} | {r['low']:.2f} … {r['high']:.2f} |" for r in rows]))
    else: print(report(rows := measure(contenders(a.n, a.steps, a.compile), a.rounds), a.n))
    print(f'\n{device_name(default_device())}, PyTorch {torch.__version__}')
    if a.json: a.json.write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
