"Against diffusers: the same scheduler steps, the same network, and the same pictures from a folder written here"
import json

import pytest
import torch

from diffcourse import ddpm, first_stage
from diffcourse.core import CourseError, generator, to_uint8
from diffcourse.unet import UNet, to_diffusers, unet_to_diffusers

diffusers = pytest.importorskip('diffusers')

KINDS = dict(eps='epsilon', x0='sample', v='v_prediction')


def network(dtype=torch.float32, **changes):
    "A small U-Net with random weights everywhere (a fresh one answers zero)"
    settings = dict(in_channels=1, channels=16, multipliers=(1, 2), blocks=1, attention_resolutions=(4,),
                    image_size=8, groups=8)
    net, g = UNet(**settings | changes).eval(), generator(0)
    for p in net.parameters(): p.data = torch.randn(p.shape,
                                                    generator=g) * (1. / p[0].numel() ** .5 if p.ndim > 1 else .1)
    return net.to(dtype)


def pipeline(folder, dtype=torch.float32):
    "Load with diffusers, without its progress bar"
    pipe = diffusers.DDPMPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large'])
def test_scheduler_steps(kind, clip, variance):
    "Every tenth step of a thousand, from the same noise: equal to 1e-6 of the state's size"
    schedule = ddpm.Schedule.linear(1000)
    theirs = diffusers.DDPMScheduler(trained_betas=schedule.betas.tolist(), prediction_type=KINDS[kind],
                                     clip_sample=clip, variance_type=variance)
    theirs.betas, theirs.alphas_cumprod = schedule.betas, schedule.alphas_cumprod      # the same float64 tables, so that only the step is compared
    theirs.alphas, theirs.one = 1 - schedule.betas, torch.tensor(1., dtype=torch.float64)
    denoiser = ddpm.Denoiser(lambda x, t: raw, schedule, kind, variance).guided(x0=ddpm.clip_x0 if clip else None)
    path, g = schedule.steps(), generator(1)
    for t in [*range(0, 1000, 10), 999]:
        x, raw, = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
        noise = torch.randn(x.shape, generator=generator(t), dtype=torch.float64)
        ours = next(ddpm.ancestral(denoiser, [path[999 - t]], x, noises=[noise]))
        want = theirs.step(raw, t, x, generator=generator(t)).prev_sample
        assert (ours - want).abs().max() <= 1e-6 * (1 + want.abs().max()), t


def test_scheduler_steps_can_differ():
    "The comparison fails for the other variance (their own tables are float32: 4e-5 at this step)"
    schedule = ddpm.Schedule.linear(1000)
    theirs = diffusers.DDPMScheduler(variance_type='fixed_small', clip_sample=False)
    x, raw = torch.randn(2, 2, 3, 4, 4, generator=generator(2))
    noise = torch.randn(x.shape, generator=generator(3))
    step = schedule.steps()[990]                                                       # t = 9, where β̃ and β differ by some per cent
    for variance, close in (('fixed_small', True), ('fixed_large', False)):
        d = ddpm.Denoiser(lambda x, t: raw, schedule, 'eps', variance)
        ours = next(ddpm.ancestral(d, [step], x, noises=[noise]))
        difference = (ours - theirs.step(raw, 9, x, generator=generator(3)).prev_sample).abs().max()
        assert bool(difference < 1e-4) is close


@pytest.mark.parametrize('changes', [
    {}, dict(image_size=28, multipliers=(1, 2, 2), attention_resolutions=(7, 14)), dict(in_channels=3, blocks=2,
        attention_resolutions=()),
    dict(middle_attention=False), dict(channels=32, groups=32, multipliers=(1, 2, 4), image_size=16,
                                       attention_resolutions=(16, 4))])
def test_network(changes):
    "The renamed weights make the same network"
    net = network(torch.float64, **changes)
    config, state = unet_to_diffusers(net)
    theirs = diffusers.UNet2DModel.from_config(config).double().eval()
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, net.in_channels, net.config['image_size'], net.config['image_size'], generator=generator(4),
                    dtype=torch.float64)
    t = torch.tensor([3, 700])
    with torch.no_grad(): torch.testing.assert_close(net(x, t), theirs(x, t).sample, rtol=1e-5,
                                                     atol=1e-5)  # their time embedding is float32


@pytest.mark.parametrize('kind, variance, clip', [('eps', 'fixed_small', True), ('v', 'fixed_large', True),
                                                  ('x0', 'fixed_small', False)])
def test_folder_samples_the_same_pictures(tmp_path, kind, variance, clip):
    "DDPMPipeline from the folder and our sampler, from one generator: every byte equal"
    net, schedule, shape = network(), ddpm.Schedule.linear(25), (3, 1, 8, 8)
    pipe = pipeline(to_diffusers(tmp_path / 'model', net, schedule, kind, variance, clip))
    theirs = pipe(batch_size=3, num_inference_steps=25, generator=generator(5), output_type='np').images
    g = generator(5)
    x = torch.randn(shape, generator=g)
    denoiser = ddpm.Denoiser(net, schedule, kind, variance).guided(x0=ddpm.clip_x0 if clip else None)
    with torch.no_grad():
        for x in ddpm.ancestral(denoiser, schedule.steps(), x, g): pass
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    torch.testing.assert_close((x / 2 + .5).clamp(0, 1), theirs, rtol=0, atol=1e-5)
    assert to_uint8(x).equal((theirs * 255).round().to(torch.uint8))
    assert to_uint8(x).unique().numel() > 8                                           # not a blank picture


def test_folder_is_plain(tmp_path):
    "No code, no pickle: json and safetensors"
    folder = to_diffusers(tmp_path / 'm', network(), ddpm.Schedule.linear(25))
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()) == [
        'model_index.json', 'scheduler/scheduler_config.json', 'unet/config.json', 'unet/diffusion_pytorch_model.safetensors']
    assert json.loads((folder / 'unet/config.json').read_text())['_class_name'] == 'UNet2DModel'


def test_what_cannot_be_written(tmp_path):
    net, schedule = network(), ddpm.Schedule.linear(25)
    for wrong in (dict(parameterization='previous_x'), dict(variance='learned')):
        with pytest.raises(CourseError): to_diffusers(tmp_path / 'm', net, schedule, **wrong)
    with pytest.raises(CourseError): to_diffusers(tmp_path / 'm', network(resample_with_conv=False), schedule)
    assert not (tmp_path / 'm').exists()


SAME = dict(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, resolution=32, groups=16)


@pytest.mark.parametrize('changes', [{}, dict(attn_type='none'), dict(num_res_blocks=1, ch_mult=(1, 3))])
def test_first_stage_is_theirs(changes):
    "diffusers' AutoencoderKL with our tensors gives our clouds and copies, and comes back unchanged"
    torch.manual_seed(0)
    net, g = first_stage.AutoencoderKL(SAME | changes, 4, scale=.3).eval(), generator(0)
    config, state = first_stage.stage_to_diffusers(net)
    theirs = diffusers.AutoencoderKL.from_config(config).eval()
    theirs.load_state_dict(state)
    x, z = torch.randn(2, 3, 32, 32, generator=g), torch.randn(2, 4, 32 // net.config.f, 32 // net.config.f, generator=g)
    with torch.no_grad():
        q, p = net.encode(x), theirs.encode(x).latent_dist
        for ours, other in ((q.mean, p.mean), (q.logvar, p.logvar), (net.decode(z), theirs.decode(z).sample)):
            assert torch.allclose(ours, other, atol=1e-5), float((ours - other).abs().max())
    back = first_stage.stage_from_diffusers(dict(theirs.config), theirs.state_dict())
    assert back.scale == .3 and all(v.equal(back.state_dict()[k]) for k, v in net.state_dict().items())


def test_first_stages_that_diffusers_cannot_hold():
    for bad in (dict(ch_mult=(2, 2)), dict(attn_resolutions=(16,)), dict(z_channels=3)):
        with pytest.raises(CourseError, match='no place'): first_stage.stage_to_diffusers(first_stage.AutoencoderKL(SAME | bad, 4))
    net = first_stage.AutoencoderKL(SAME, 4)
    config, state = first_stage.stage_to_diffusers(net)
    with pytest.raises(CourseError, match='quant_conv.bias'): first_stage.stage_from_diffusers(config, {k: v for k, v in state.items() if k != 'quant_conv.bias'})
    with pytest.raises(CourseError, match='unknown: more'): first_stage.stage_from_diffusers(config, state | {'more': torch.zeros(1)})


@pytest.mark.parametrize('name', ['sd-v1', 'sd-x4-upscaling'])
def test_released_first_stage_is_theirs_key_for_key(name):
    net = first_stage.from_official(f'{name}/first_stage_AutoencoderKL', 'meta')
    config, state = first_stage.stage_to_diffusers(net)
    with torch.device('meta'): theirs = diffusers.AutoencoderKL.from_config(config)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
