"The dVAE: its limits, its file reader, its bad input"
import math

import pytest
import torch

from diffcourse import dvae
from diffcourse.core import CourseError, Draws


def tiny(**more): return dvae.DVAE(**dict(vocab_size=16, n_hid=8, n_init=8, n_blk_per_group=1, group_count=3) | more)


def test_the_density_integrates_to_one_and_the_check_can_fail():
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64).sigmoid()
    mass = lambda f: float(torch.trapezoid(f.exp(), x))
    μ, b = torch.tensor(.7, dtype=torch.float64), torch.tensor(math.log(.4), dtype=torch.float64)
    assert abs(mass(dvae.logit_laplace(x, μ, b)) - 1) < 1e-5
    assert abs(mass(dvae.logit_laplace(x, μ, b) + (x * (1 - x)).log()) - 1) > .1     # without the change of variables


def test_draws_follow_the_softmax():
    logits, u = torch.tensor([1., 0., -1., .5]), torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    share = torch.bincount((logits + dvae.gumbel(u)).argmax(1), minlength=4) / len(u)
    assert ((share - logits.softmax(0)).abs() < 4 * .5 / 200).all()
    wrong = torch.bincount((logits - dvae.gumbel(u)).argmax(1), minlength=4) / len(u)
    assert ((wrong - logits.softmax(0)).abs() > 4 * .5 / 200).any()


def test_edges_of_uniform_numbers_are_finite():
    assert dvae.gumbel(torch.tensor([0., 1 - 1e-8, 1.])).isfinite().all()


def test_extremes_survive_mapping():
    x = torch.tensor([0., 1.])
    assert dvae.logit_laplace(dvae.map_pixels(x), torch.zeros(2), torch.zeros(2)).isfinite().all()
    assert torch.allclose(dvae.unmap_pixels(dvae.map_pixels(x)), x, atol=1e-6)


def test_released_files_as_pickled_modules(tmp_path):
    model = tiny().eval()
    for part in ('encoder', 'decoder'): torch.save(getattr(model, part), tmp_path / f'{part}.pkl')
    again, x = dvae.load_official(tmp_path / 'encoder.pkl', tmp_path / 'decoder.pkl'), torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(again(x), model(x))
    with pytest.raises(CourseError, match='another architecture'): dvae.load_official(tmp_path / 'decoder.pkl', tmp_path / 'encoder.pkl')
    torch.save({'conv.weight': torch.zeros(2)}, tmp_path / 'other.pkl')
    with pytest.raises(CourseError, match='blocks.input.w'): dvae.load_official(tmp_path / 'other.pkl', tmp_path / 'decoder.pkl')


def test_a_file_that_wants_to_run_something_runs_nothing(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path / 'ran'), 'w'))
    (tmp_path / 'encoder.pkl').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CourseError): dvae.load_official(tmp_path / 'encoder.pkl', tmp_path / 'encoder.pkl')
    assert not (tmp_path / 'ran').exists()


def test_the_loss_anneals_with_the_step():
    torch.manual_seed(0)
    model, batch = tiny(floor=-1., gain=.5), dict(x=torch.rand(2, 3, 16, 16) * 2 - 1)
    loss = dvae.loss_dvae(β=(0., 6.6), β_steps=10, τ=(1., .1), τ_steps=20)
    seen = [loss(model, batch, Draws(0, s)) for s in (0, 10, 20, 2 ** 31 - 1)]
    assert [round(float(extra['τ']), 3) for _, extra in seen] == [1., .55, .1, .1]
    first, extra = seen[0]
    assert abs(float(first) - float(extra['distortion'])) < 1e-6           # β = 0 at first
    last, extra = seen[2]
    assert abs(float(last - extra['distortion']) - 6.6 * float(extra['rate']) / 48) < 1e-5


@pytest.mark.parametrize('call, message', [
    (lambda m: m.encode(torch.zeros(1, 3, 18, 16)), 'multiples of 4'), (lambda m: m.encode(torch.zeros(1, 1, 16, 16)), 'B, 3'),
    (lambda m: m.decode(torch.full((1, 4, 4), 16)), r'\[0, 16\)'), (lambda m: m.decode(torch.zeros(1, 4, 4)), 'whole numbers'),
    (lambda m: dvae.gumbel_softmax(torch.zeros(1, 3), torch.rand(1, 3), 0.), 'positive')])
def test_bad_input_is_named(call, message):
    with pytest.raises(CourseError, match=message): call(tiny())
