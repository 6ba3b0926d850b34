"""Measure claims DDIM-1 … DDIM-4 with the shipped ddpm_fashion network: nothing is trained

    python scripts/claims_ddim.py --budget laptop --out ddim.json [--only DDIM-3 DDIM-4]

Writes {'DDIM-1': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, …}, …}; the rules are in data/claims/rules.json, older
than the numbers. Samples of every kind start from the same x_T, one set for each sampling seed.
"""
import sys
import time

import claims_common
import torch

from diffcourse import data, metrics
from diffcourse.core import budget, default_device, generator, to_float
from diffcourse.ddim import ddim, dpm_2m, encode, quadratic_timesteps
from diffcourse.ddpm import Denoiser, Schedule, ddpm_fashion, q_posterior_mean_variance
from diffcourse.exact import Mixture, exact_denoiser
from diffcourse.train import device_name
from diffcourse.weights import load_weights, shipped

# the names 10 … 1000 in the rules are step counts; at the smoke budget fewer steps stand in for them
SETTINGS = {
    'smoke': dict(samples=6, steps={10: 2, 20: 3, 50: 4, 100: 5}, full=6, pairs=4, pictures=4, batch=32),
    'laptop': dict(samples=120, steps={n: n for n in (10, 20, 50, 100)}, full=1000, pairs=8, pictures=32, batch=64),
    'gpu': dict(samples=2000, steps={n: n for n in (10, 20, 50, 100)}, full=1000, pairs=2000, pictures=512, batch=2000),
}
SCHEDULE = Schedule.linear()


def path_of(sequence, n):
    "The steps of the paper's quadratic sequence, or evenly spaced ones"
    return SCHEDULE.steps(quadratic_timesteps(SCHEDULE.T, n) if sequence == 'quadratic' else n)


@torch.no_grad()
def ends(denoiser, path, x_T, sampler=ddim, batch=64, **how):
    "Where the walks from x_T end"
    done = []
    for i, x in enumerate(x_T.split(batch)):
        for x in sampler(denoiser, path, x, generator(i, x.device), **how): pass
        done.append(x.float().cpu())
    return torch.cat(done)


class Judge:
    "Feature-FIDs against the training pictures, and features"
    def __init__(self, device):
        name = 'fashion_classifier'
        self.name = name if shipped(name) else 'untrained'
        self.model = metrics.get_extractor(name, device) if shipped(name) else metrics.FashionClassifier().eval().to(device)
        self.reference = metrics.statistics(data.fashion_mnist('train'), self.model)

    def features(self, pictures): return metrics.features(self.model, pictures.clamp(-1, 1))

    def row(self, eta, sequence, steps, by_seed):
        "One line of the table: the pooled score with its interval, and each seed's"
        fid = lambda p, n: metrics.feature_fid(p.clamp(-1, 1), self.reference, self.model, resamples=n)
        pooled = fid(torch.cat(by_seed), 100)
        return dict(eta=eta, sequence=sequence, steps=steps, fid=pooled.value, low=pooled.low, high=pooled.high, n=pooled.n,
                    by_seed=[round(fid(p, 0).value, 3) for p in by_seed])


def samples(denoiser, s, starts, say) -> dict:
    "(η, sequence, steps, sampler) → pictures of each seed"
    few = s['steps']
    wanted = [(0., 'quadratic', n, ddim) for n in few.values()] + [(η, 'quadratic', few[10], ddim) for η in (.5, 1.)]
    wanted += [(1., 'quadratic', few[20], ddim)] + [(0., 'even', few[n], ddim) for n in (10, 20)]
    wanted += [(0., 'quadratic', few[n], dpm_2m) for n in (10, 20)]
    out = {}
    for η, sequence, n, sampler in wanted:
        how = dict(eta=η) if sampler is ddim else {}
        out[η, sequence, n, sampler.__name__] = [ends(denoiser, path_of(sequence, n), x, sampler, s['batch'], **how) for x in starts]
        say(f'{sampler.__name__} η={η} {sequence} {n} steps')
    return out


def trips(denoiser, s, device) -> dict:
    "Mean squared error of pictures walked to noise and back, by steps"
    x, out = to_float(data.fashion_mnist('test').images[:s['pictures']]).to(device), {}
    for name, n in s['steps'].items():
        path = SCHEDULE.steps(n)
        codes = torch.cat([ends(denoiser, path, part, lambda d, p, x, gen: encode(d, p, x)).to(device) for part in x.split(s['batch'])])
        out[name] = float(((ends(denoiser, path, codes, batch=s['batch']) - x.cpu()) / 2).square().mean())
    return out


def exact_errors() -> dict:
    "DDIM-4 in float64: the family's variance and mean at η = 1 against DDPM's posterior, a step at η = 0 against Euler's"
    double, g, worst = dict(dtype=torch.float64), generator(0), dict(variance_error=0., mean_error=0., ode_error=0.)
    world = exact_denoiser(Mixture(torch.tensor([[-.6], [.5]], **double), .1, torch.tensor([.3, .7], **double)), SCHEDULE)
    size = lambda ᾱ: ((1 - ᾱ) / ᾱ).sqrt()
    for step in [s for n in (1000, 50, 7) for s in SCHEDULE.steps(n)[:-1]]:
        x0, x = (torch.randn(6, 1, generator=g, **double) for _ in range(2))
        mean, variance, _ = q_posterior_mean_variance(x0, x, step)
        paper = (1 - step.ᾱ_next) / (1 - step.ᾱ) * (1 - step.ᾱ / step.ᾱ_next)
        old = (x - step.ᾱ.sqrt() * x0) / (1 - step.ᾱ).sqrt()
        theirs = step.ᾱ_next.sqrt() * x0 + (1 - step.ᾱ_next - paper).sqrt() * old
        euler = (x / step.ᾱ.sqrt() + (size(step.ᾱ_next) - size(step.ᾱ)) * world.denoise(x, step).eps) * step.ᾱ_next.sqrt()
        ours = next(ddim(world, [step], x))
        found = dict(variance_error=(variance / paper - 1).abs().max(), mean_error=(mean - theirs).abs().max() / theirs.abs().max(),
                     ode_error=(ours - euler).abs().max() / ours.abs().max())
        worst = {k: max(v, float(found[k])) for k, v in worst.items()}
    return worst


def of_samples(denoiser, s, starts, judge, say) -> tuple[dict, list]:
    "DDIM-1, 1b and 2, and the table they rest on"
    few = s['steps']
    drawn = samples(denoiser, s, starts, say)
    table = [judge.row(η, f'{sequence}, 2M' if sampler == 'dpm_2m' else sequence, n, p) for (η, sequence, n, sampler), p in drawn.items()]
    row = {(r['eta'], r['steps']): r for r in table if r['sequence'] == 'quadratic'}
    f = {n: judge.features(torch.cat(drawn[0., 'quadratic', few[n], 'ddim'])) for n in few}
    apart = lambda a, b: float((a - b).norm(dim=1).mean())
    control = apart(f[100], f[100].roll(1, 0))
    full = judge.features(ends(denoiser, path_of('quadratic', s['full']), starts[0][:s['pairs']], batch=s['batch']))
    say(f"ddim η=0 {s['full']} steps for {s['pairs']} samples")
    half = [(row[η, few[n]]['high'] - row[η, few[n]]['low']) / 2 for η in (0., 1.) for n in (10, 20)]
    return {'DDIM-1': {f'fid_{n}': row[0., few[n]]['fid'] for n in few} | {'near_1000': apart(f[100][:len(full)], full) / control},
            'DDIM-1b': {f'eta{int(η)}_{n}': row[η, few[n]]['fid'] for η in (0., 1.) for n in (10, 20)} | {'spread': max(half)},
            'DDIM-2': {f'same_{n}': apart(f[n], f[100]) for n in (10, 20, 50)} | {'control': control}}, table


IDS = ('DDIM-1', 'DDIM-1b', 'DDIM-2', 'DDIM-3', 'DDIM-4')

def measure(level, seeds, device, only=IDS) -> dict:
    "The claims: numbers, and the tables they rest on"
    s, began, numbers, table = SETTINGS[level], time.perf_counter(), {}, []
    say = lambda what: print(f'{time.perf_counter() - began:6.0f} s  {what}', file=sys.stderr, flush=True)
    net = ddpm_fashion.model().eval()
    if shipped('ddpm_fashion'): net = load_weights('ddpm_fashion', net)
    denoiser = Denoiser(net.to(device, memory_format=torch.channels_last), SCHEDULE)   # x0 is not clipped, as in the paper's code
    common = dict(budget=level, device=device_name(device), network='ddpm_fashion' if shipped('ddpm_fashion') else 'untrained')
    how = {'DDIM-3': dict(seeds=1, pictures=s['pictures']), 'DDIM-4': dict(seeds=1)}   # no chance in either
    if set(only) & set(IDS[:3]):
        starts = [torch.randn(s['samples'], 1, 28, 28, generator=generator(1000 * seed)).to(device) for seed in seeds]
        judge = Judge(device)
        numbers, table = of_samples(denoiser, s, starts, judge, say)
        common |= dict(samples=s['samples'] * len(seeds), extractor=judge.name, reference=data.fashion_mnist('train').name)
    if 'DDIM-3' in only: numbers['DDIM-3'] = {f'mse_{n}': e for n, e in trips(denoiser, s, device).items()}
    if 'DDIM-4' in only: numbers['DDIM-4'] = exact_errors()
    common |= dict(seconds=round(time.perf_counter() - began, 1))
    return {id: {'numbers': n, 'seeds': len(seeds), **common, **how.get(id, {})} | ({'table': table} if id == 'DDIM-1' else {})
            for id, n in numbers.items() if id in only}


def main(args=None):
    parser = claims_common.parser(__doc__, 'of the x_T')
    parser.add_argument('--only', nargs='+', choices=IDS, default=IDS, help='these claims; the first three are measured together')
    a = parser.parse_args(args)
    result = measure(budget(a.budget), a.seeds, default_device(), a.only)
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
