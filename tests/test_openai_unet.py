"The OpenAI U-Net: its parts against float64 formulas, its settings, every released layout, loading and refusing"
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffcourse import first_stage, layers, openai_unet as ou, unet
from diffcourse.core import CourseError, generator
from diffcourse.layers import official_schema
from diffcourse.weights import layout, layout_differences

TINY = dict(image_size=16, in_channels=1, model_channels=16, out_channels=1, num_res_blocks=1, channel_mult=(1, 2),
            attention_resolutions=(2,), num_head_channels=8, groups=4)


def random_net(kind=ou.UNetModel, seed=0, **settings):
    return ou.randomise(kind(**TINY | settings), generator(seed)).eval()


def given(seed=1, n=3):
    g = generator(seed)
    return torch.randn(n, 1, 16, 16, generator=g), torch.tensor([0, 400, 999])[:n]


class TestParts:
    def test_normalises_in_float32_and_returns_what_came(self):
        norm = ou.GroupNorm32(8, 2)
        x = 50 + torch.randn(2, 8, 6, 6, generator=generator(0))
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            y = norm(x.to(dtype)).detach()
            assert y.dtype == dtype and abs(float(y.double().std()) - 1) < .02
        want = F.group_norm(x.bfloat16().float(), 2, eps=1e-5)
        assert (norm(x.bfloat16()).float() - want).abs().max() < .02

    def test_epsilon(self):
        small = torch.randn(1, 8, 4, 4, generator=generator(0), dtype=torch.float64) * 1e-3
        y = ou.GroupNorm32(8, 2).double()(small)
        torch.testing.assert_close(y, F.group_norm(small, 2, eps=1e-5))
        assert (y - F.group_norm(small, 2, eps=1e-6)).abs().max() > .5

    @pytest.mark.parametrize('kind', ['openai', 'openai, time added', 'ddpm', 'first stage'])
    def test_sampling_in_place_gives_the_same_numbers_and_spares_what_comes_in(self, kind):
        x, t = given()
        net = {'openai': random_net, 'openai, time added': lambda: random_net(use_scale_shift_norm=False),
               'ddpm': lambda: ou.randomise(unet.UNet(1, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(8,), image_size=16,
                                                      groups=4), generator(0)).eval(),
               'first stage': lambda: ou.randomise(first_stage.AutoencoderKL(
                   dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), in_channels=1, out_ch=1, resolution=16, z_channels=2,
                        groups=4), 2), generator(0)).eval()}[kind]()
        call = (lambda: net.decode(net.encode(x).mean)) if kind == 'first stage' else lambda: net(x, t)
        before, with_gradients = x.clone(), call()
        with torch.no_grad(): without = call()
        assert with_gradients.requires_grad and torch.equal(with_gradients.detach(), without) and torch.equal(x, before)

    @pytest.mark.parametrize('heads', [1, 2, 4])
    def test_both_orders_hold_the_same_attention(self, heads):
        g = generator(heads)
        new, old = (ou.AttentionBlock(16, heads, order, 4).double() for order in (True, False))
        for p in new.parameters(): nn.init.normal_(p, generator=g)
        state = new.state_dict()
        for k in ('qkv.weight', 'qkv.bias'):
            state[k] = state[k].unflatten(0, (3, heads, 16 // heads)).transpose(0, 1).flatten(0, 2)
        old.load_state_dict(state)
        x = torch.randn(2, 16, 3, 5, generator=g, dtype=torch.float64)
        torch.testing.assert_close(new(x), old(x))
        if heads > 1: assert not new(x).allclose(ou.AttentionBlock(16, heads, False, 4).double().requires_grad_(False)(x))

    @pytest.mark.parametrize('settings, heads', [((64, 4), 4), ((64, 4, 16), 4), ((64, 1, 64), 1), ((96, 1, 32), 3)])
    def test_counts_heads(self, settings, heads): assert ou.count_heads(*settings) == heads

    @pytest.mark.parametrize('settings', [(64, 5), (64, 1, 48), (64, 1, 128), (64, 0)])
    def test_refuses_heads_that_do_not_fit(self, settings):
        with pytest.raises(CourseError, match='heads'): ou.count_heads(*settings)

    def test_resampling_blocks_start_as_averages_and_repetitions(self):
        x = torch.randn(2, 8, 6, 6, generator=generator(3))
        for how, want in (('down', F.avg_pool2d(x, 2)), ('up', x.repeat_interleave(2, 2).repeat_interleave(2, 3))):
            block = ou.ResBlock(8, 4, resample=how, groups=2)
            assert torch.equal(block(x, torch.randn(2, 4)), want)


class TestNetwork:
    @pytest.mark.parametrize('settings', [dict(use_scale_shift_norm=True), dict(resblock_updown=True), dict(conv_resample=False),
                                          dict(num_head_channels=-1, num_heads=4), dict(channel_mult=(.5, 1), groups=2),
                                          dict(use_new_attention_order=True), dict(num_res_blocks=2, attention_resolutions=(1, 2))])
    def test_a_fresh_network_answers_zero_and_a_random_one_uses_everything(self, settings):
        x, t = given()
        assert ou.UNetModel(**TINY | settings)(x, t).abs().max() == 0
        net = random_net(**settings)
        with torch.no_grad():
            a = net(x, t)
            moved = [net(x, t + 100), net(x + F.pad(torch.ones(1, 1), (0, 15, 0, 15)), t)]
        assert a.shape == x.shape and all(not a.allclose(b, atol=1e-4) for b in moved)

    def test_pictures_of_a_batch_do_not_mix(self):
        net, (x, t) = random_net(use_scale_shift_norm=True), given()
        with torch.no_grad(): together, alone = net(x, t), torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_float_timesteps_lie_between(self):
        net, (x, _) = random_net(), given()
        at = lambda t: net(x, torch.full((3,), t))
        with torch.no_grad(): a, b, c = at(400), at(400.5), at(401)
        assert not b.allclose(a, atol=1e-6) and (b - a).norm() < (c - a).norm()

    def test_labels(self):
        net, (x, t) = random_net(num_classes=5), given()
        y = torch.tensor([0, 4, 2])
        with torch.no_grad(): assert not net(x, t, y).allclose(net(x, t, y.flip(0)), atol=1e-4)
        for wrong in (None, y + 1, y - 1, y[:2], y.float()):
            with pytest.raises(CourseError, match='label'): net(x, t, wrong)
        with pytest.raises(CourseError, match='no classes'): random_net()(x, t, y)

    @pytest.mark.parametrize('settings, word', [(dict(image_size=18, channel_mult=(1, 2, 2)), 'halved'), (dict(groups=32), 'groups'),
                                                (dict(num_head_channels=12), 'heads'), (dict(num_res_blocks=0), 'block'),
                                                (dict(num_classes=0), 'num_classes')])
    def test_settings_are_checked(self, settings, word):
        with pytest.raises(CourseError, match=word): ou.UNetModel(**TINY | settings)

    def test_an_unknown_setting_is_named(self):
        with pytest.raises(TypeError, match='blocks'): ou.UNetModel(**TINY, blocks=3)

    @pytest.mark.parametrize('shape', [(3, 1, 15, 16), (3, 3, 16, 16), (3, 16, 16)])
    def test_pictures_are_checked(self, shape):
        with pytest.raises(CourseError, match='divisible'): random_net()(torch.zeros(shape), torch.zeros(3))

    def test_other_sizes_pass_where_nothing_is_tied_to_one(self):
        with torch.no_grad(): assert random_net()(torch.zeros(2, 1, 24, 8), torch.zeros(2)).shape == (2, 1, 24, 8)

    def test_attention_sits_where_the_factors_say(self):
        net = ou.UNetModel(**TINY | dict(channel_mult=(1, 1, 2), attention_resolutions=(2,)))
        factor = {i: any(isinstance(m, ou.AttentionBlock) for m in stage) for i, stage in enumerate(net.input_blocks)}
        assert factor == {0: False, 1: False, 2: False, 3: True, 4: False, 5: False}

    def test_another_attention_can_take_its_place(self):
        made = []
        class Told(ou.ContextBlock):
            def __init__(self, channels, heads):
                super().__init__()
                made.append((channels, heads))
                self.read = nn.Linear(5, channels)
            def forward(self, x, context): return x + self.read(context).mean(1)[:, :, None, None]
        net, (x, t) = random_net(attention=Told), given()
        assert set(made) == {(32, 4)} and len(made) == 4         # one down, middle, two up
        c = torch.randn(3, 7, 5, generator=generator(2))
        with torch.no_grad():
            assert not net(x, t, context=c).allclose(net(x, t, context=-c), atol=1e-4)
            assert not net(x, t, context=c).allclose(net(x, t, context=c, extra=torch.ones(3, 64)), atol=1e-4)

    def test_gradients_reach_every_parameter(self):
        for kind, more in ((ou.UNetModel, {}), (ou.SuperResModel, {}), (ou.EncoderUNetModel, dict(out_channels=4))):
            net, (x, t) = random_net(kind, **more, use_scale_shift_norm=True, resblock_updown=True), given()
            net(x, t, **(dict(low_res=x[..., ::2, ::2]) if kind is ou.SuperResModel else {})).square().sum().backward()
            missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert not missing


class TestSuperResolution:
    def test_the_small_picture_is_laid_beside_bilinearly(self):
        net, (x, t) = random_net(ou.SuperResModel), given()
        small = F.avg_pool2d(x, 4)
        beside = F.interpolate(small, (16, 16), mode='bilinear', align_corners=False)
        with torch.no_grad():
            want = super(ou.SuperResModel, net).forward(torch.cat([x, beside], 1), t)
            assert torch.equal(net(x, t, low_res=small), want)
            assert torch.equal(net(x, t, low_res=beside), want)     # already large: unchanged

    @pytest.mark.parametrize('shape', [(2, 1, 4, 4), (3, 3, 4, 4), (3, 4, 4)])
    def test_small_pictures_are_checked(self, shape):
        x, t = given()
        with pytest.raises(CourseError, match='low_res'): random_net(ou.SuperResModel)(x, t, low_res=torch.zeros(shape))


class TestClassifier:
    @pytest.mark.parametrize('pool', ou.POOLS)
    def test_pools(self, pool):
        net, (x, t) = random_net(ou.EncoderUNetModel, pool=pool, out_channels=7), given()
        with torch.no_grad(): assert net(x, t).shape == (3, 7) and not net(x, t).allclose(net(x, t + 500), atol=1e-5)

    def test_the_attention_pool_asks_with_the_mean(self):
        pool = ou.randomise(ou.AttentionPool2d(3, 8, 4, 5), generator(1)).double()
        x = torch.randn(2, 8, 3, 3, generator=generator(2), dtype=torch.float64)
        tokens = torch.cat([x.flatten(2).mean(2, keepdim=True), x.flatten(2)], 2) + pool.positional_embedding
        qkv = torch.einsum('bcl,oc->bol', tokens, pool.qkv_proj.weight[..., 0]) + pool.qkv_proj.bias[:, None]
        q, k, v = qkv.unflatten(1, (3, 2, 4)).unbind(1)
        w = (torch.einsum('bhc,bhcs->bhs', q[..., 0], k) / 2).softmax(-1)
        want = torch.einsum('bhs,bhcs->bhc', w, v).flatten(1) @ pool.c_proj.weight[..., 0].T + pool.c_proj.bias
        torch.testing.assert_close(pool(x), want)

    def test_bad_settings(self):
        with pytest.raises(CourseError, match='pool'): ou.EncoderUNetModel(pool='mean', **TINY)
        with pytest.raises(CourseError, match='num_head_channels'):
            ou.EncoderUNetModel(pool='attention', **TINY | dict(num_head_channels=-1))

    def test_a_fixed_size_is_said(self):
        net = random_net(ou.EncoderUNetModel, pool='attention')
        with pytest.raises(CourseError, match='another size'): net(torch.zeros(1, 1, 32, 32), torch.zeros(1))


class TestReleased:
    @pytest.mark.parametrize('name', ou.released())
    def test_layout_and_parameters(self, name):
        model, schema = ou.from_official(name, device='meta'), official_schema(name)
        assert layout(model) == {k: tuple(s) for k, s in schema['state_dict'].items()}
        assert sum(p.numel() for p in model.parameters()) == schema['n_params'] and model.official == name

    def test_there_are_seventeen(self): assert len(ou.released()) == 17

    @pytest.mark.parametrize('name, heads', [('guided-diffusion/128x128_diffusion', {4}), ('guided-diffusion/64_256_upsampler', {4}),
                                             ('guided-diffusion/64x64_diffusion', {6, 9, 12}),
                                             ('improved-diffusion/lsun_uncond_100M_2400K_bs64', {1})])
    def test_heads_are_as_the_flags_say(self, name, heads):
        found = {m.heads for m in ou.from_official(name, 'meta').modules() if isinstance(m, ou.AttentionBlock)}
        assert found == heads

    def test_only_the_64_model_and_the_pools_use_the_new_order(self):
        new = {n for n in ou.released() for m in ou.from_official(n, 'meta').modules() if getattr(m, 'new_order', False)}
        assert new == {'guided-diffusion/64x64_diffusion'}

    def test_unknown_names(self):
        with pytest.raises(CourseError, match='known'): ou.from_official('guided-diffusion/1024')
        with pytest.raises(CourseError, match='known'): ou.from_official('ddpm-ermongroup/cifar10')

    def test_layouts_are_recognised_and_names_decide_ties(self):
        unique, shared = set(), {}
        for name in ou.released():
            state = ou.from_official(name, 'meta').state_dict()
            found = ou.which_release(state, f'somewhere/{name.split("/")[1]}.pt')
            assert found == name
            if ou.which_release(state) == name: unique.add(name)
            else: shared[name] = ou.which_release(state)
        assert shared == {'guided-diffusion/lsun_bedroom': 'guided-diffusion/256x256_diffusion_uncond'}

    def test_a_released_file_loads_by_itself(self, tmp_path, monkeypatch):
        "A small stand-in release: its file is recognised, built, and loaded in evaluation mode"
        flags = dict(image_size=64, num_channels=32, num_res_blocks=1, num_heads=4, attention_resolutions='16', channel_mult='1,2',
                     dropout=.1, class_cond=True, use_scale_shift_norm=True, learn_sigma=True, diffusion_steps=1000,
                     noise_schedule='linear')
        net = ou.randomise(ou.from_flags(flags), generator(0))
        schema = dict(config=flags, state_dict={k: list(s) for k, s in layout(net).items()})
        real = ou.official_schema
        for module in (ou, layers):
            monkeypatch.setattr(module, 'official_schema', lambda n: schema if n == 'guided-diffusion/toy' else real(n))
        monkeypatch.setattr(ou, 'official_names', lambda: ['guided-diffusion/toy'])
        monkeypatch.setattr(ou, 'recognise', lambda s: ['guided-diffusion/toy'] if layout(s) == layout(net) else [])
        torch.save(net.state_dict(), tmp_path / 'toy.pt')
        loaded = ou.load_official(tmp_path / 'toy.pt')
        assert loaded.official == 'guided-diffusion/toy' and loaded.flags == flags and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values()))
        torch.save({k: v for k, v in net.state_dict().items() if k != 'out.2.bias'}, tmp_path / 'short.pt')
        with pytest.raises(CourseError, match='out.2.bias'): ou.load_official(tmp_path / 'short.pt')

    def test_another_network_is_refused_with_the_first_differing_keys(self, tmp_path):
        torch.save(random_net().state_dict(), tmp_path / 'mine.pt')
        with pytest.raises(CourseError, match='(?s)no released model.*Nearest is .*(missing|unknown|other shape)'):
            ou.load_official(tmp_path / 'mine.pt')

    def test_a_file_with_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self): return (open, (str(tmp_path / 'ran'), 'w'))
        torch.save({'x': Evil()}, tmp_path / 'evil.pt')
        with pytest.raises(CourseError): ou.load_official(tmp_path / 'evil.pt')
        assert not (tmp_path / 'ran').exists()

    def test_a_layout_that_no_longer_matches_is_an_error(self, monkeypatch):
        schema = json.loads(json.dumps(official_schema('improved-diffusion/cifar10_uncond_50M_500K')))
        schema['state_dict']['out.2.bias'] = [7]
        monkeypatch.setattr(layers, 'official_schema', lambda n: schema)
        with pytest.raises(CourseError, match='out.2.bias'): ou.from_official('improved-diffusion/cifar10_uncond_50M_500K', 'meta')

    def test_unknown_sizes(self):
        flags = dict(official_schema('improved-diffusion/cifar10_uncond_50M_500K')['config'], image_size=48)
        with pytest.raises(CourseError, match='multipliers'): ou.from_flags(flags, 'meta')
        assert not layout_differences(ou.from_flags(flags | dict(channel_mult='1,2,2,2', attention_resolutions='24,12'), 'meta'),
                                      official_schema('improved-diffusion/cifar10_uncond_50M_500K')['state_dict'])
