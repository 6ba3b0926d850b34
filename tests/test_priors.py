"Chapter 05a: the transformer, its memory, and drawing tokens"
import math

import pytest
import torch
from torch import nn

from diffcourse import priors
from diffcourse.core import CourseError, generator
from diffcourse.priors import GPT, Block, Memory, draw, generate, next_probabilities


def lively(model):
    "Random weights that matter"
    for i, p in enumerate(model.parameters()): nn.init.normal_(p, std=.3, generator=generator(i))
    return model.eval()


@pytest.fixture(scope='module')
def model(): return lively(GPT(11, 24, 3, 4, 32))


PATTERN = torch.ones(24, 24, dtype=torch.bool).tril() & ((torch.arange(24)[:, None] - torch.arange(24)) % 4 <= 1)


@pytest.mark.parametrize('dials', [{}, dict(temperature=.7, top_k=4), dict(top_p=.8), dict(temperature=0)], ids=str)
@pytest.mark.parametrize('kind', ['causal', 'patterns', 'unmasked', 'embeddings', 'known', 'added'])
def test_memory_changes_no_token(kind, dials):
    extra = dict(patterns=[PATTERN, PATTERN.new_ones(24, 24).tril()]) if kind == 'patterns' else dict(n_unmasked=3) if kind == 'unmasked' else {}
    model, how = lively(GPT(11, 24, 3, 4, 32, **extra)), {}
    prompt = torch.randint(11, (6, 3), generator=generator(0))
    if kind == 'embeddings': how['embeddings'] = torch.randn(6, 4, 32, generator=generator(1))
    if kind == 'added': how['added'] = torch.randn(6, 19, 32, generator=generator(2))
    if kind == 'known':
        how['known'] = torch.full((6, 17), -1)
        how['known'][:, :5], how['known'][2, 9], how['known'][:, 12] = 4, 7, 3
    for seed in range(3):
        one, two = (generate(model, prompt, 17, seed=seed, cache=c, **how, **dials) for c in (True, False))
        assert one.shape == (6, 17) and (one == two).all()
    if kind == 'known': assert (one[how['known'] >= 0] == how['known'][how['known'] >= 0]).all()


def test_a_broken_memory_is_noticed(monkeypatch, model):
    "The test above can fail: keys of the first position are forgotten"
    prompt = torch.randint(11, (6, 1), generator=generator(0))
    right = generate(model, prompt, 20)
    of = Memory.of
    monkeypatch.setattr(Memory, 'of', lambda self, i: lambda k, v: tuple(x[:, 1:] if x.shape[1] > 1 else x for x in of(self, i)(k, v)))
    assert (generate(model, prompt, 20) != right).any()


def test_logits_with_memory_in_pieces(model):
    tokens, memory = torch.randint(11, (2, 24), generator=generator(0)), Memory(model, 2)
    whole = model(tokens)
    pieces = torch.cat([model(part, memory=memory) for part in tokens.split([5, 1, 1, 9, 8], 1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(CourseError, match='25 positions'): model(tokens[:, :1], memory=memory)


@pytest.mark.parametrize('extra', [{}, dict(patterns=[PATTERN])], ids=['causal', 'patterns'])
def test_no_logit_depends_on_what_comes_later(extra):
    model, tokens = lively(GPT(11, 24, 3, 4, 32, **extra)), torch.randint(11, (1, 24), generator=generator(0))
    for i in (0, 7, 22):
        other = tokens.clone()
        other[:, i + 1:] = (other[:, i + 1:] + 1) % 11
        a, b = model(tokens), model(other)
        assert torch.equal(a[:, :i + 1], b[:, :i + 1]) and not torch.equal(a[:, i + 1:], b[:, i + 1:])


def test_draws_do_not_depend_on_the_batch(model):
    prompt = torch.randint(11, (8, 2), generator=generator(0))
    assert (generate(model, prompt, 10, seed=5)[:3] == generate(model, prompt[:3], 10, seed=5)).all()
    assert (generate(model, prompt, 10, seed=5) != generate(model, prompt, 10, seed=6)).any()
    assert (generate(model, prompt, 10, temperature=0, seed=5) == generate(model, prompt, 10, temperature=0, seed=6)).all()


def test_allowed_by_place(model):
    place = torch.zeros(6, 11, dtype=torch.bool)
    for i in range(6): place[i, [i, i + 5]] = True
    tokens = generate(model, torch.zeros(50, 1, dtype=torch.long), 6, allowed=place)
    assert set((tokens - torch.arange(6)).flatten().tolist()) == {0, 5}


@pytest.mark.parametrize('bad, words', [
    (dict(temperature=-.1), 'temperature'), (dict(top_k=0), 'top_k'), (dict(top_k=2.5), 'top_k'), (dict(top_p=0.), 'top_p'),
    (dict(top_p=1.01), 'top_p'), (dict(temperature=math.nan), 'temperature'), (dict(known=torch.zeros(2, 3).long()), 'known'), (dict(n=40), 'block_size'),
    (dict(prompt=torch.zeros(2, 0).long()), 'beginning'), (dict(prompt=torch.zeros(2, 1)), 'integers'), (dict(n=-1), 'cannot be')],
    ids=lambda v: v if isinstance(v, str) else '')
def test_bad_input_is_named(model, bad, words):
    how = dict(prompt=torch.zeros(2, 1).long(), n=4) | bad
    with pytest.raises(CourseError, match=words): generate(model, how.pop('prompt'), how.pop('n'), **how)


def test_nothing_allowed_is_named(model):
    with pytest.raises(CourseError, match='allowed'): generate(model, torch.zeros(1, 1).long(), 2, allowed=torch.zeros(11).bool())


def test_bad_models_are_named():
    with pytest.raises(CourseError, match='heads'): GPT(5, 8, 1, 3, 16)
    with pytest.raises(CourseError, match='layout'): Block(8, 2, 'bert')
    with pytest.raises(CourseError, match='act'): Block(8, 2, act='relu6')
    with pytest.raises(CourseError, match='diagonal'): GPT(5, 8, 1, 2, 16, patterns=[torch.zeros(8, 8)])
    with pytest.raises(CourseError, match='pattern'): GPT(5, 8, 1, 2, 16, patterns=[torch.ones(4, 4)])
    with pytest.raises(CourseError, match='unmasked'): generate(GPT(5, 8, 1, 2, 16, n_unmasked=3), torch.zeros(1, 1).long(), 2)


@pytest.mark.parametrize('dials', [dict(top_k=3), dict(top_p=.7), dict(top_k=5, top_p=.9, temperature=.8), dict(top_p=1.), dict(top_k=99)], ids=str)
def test_dials_agree_with_transformers(dials):
    "Their warpers, in their documented order: temperature, top-k, top-p"
    t = pytest.importorskip('transformers.generation.logits_process')
    logits = torch.randn(64, 11, generator=generator(0), dtype=torch.float64) * 2
    x = t.TemperatureLogitsWarper(dials['temperature'])(None, logits) if 'temperature' in dials else logits
    if 'top_k' in dials: x = t.TopKLogitsWarper(dials['top_k'])(None, x)
    if 'top_p' in dials: x = t.TopPLogitsWarper(dials['top_p'])(None, x)
    torch.testing.assert_close(next_probabilities(logits, **dials), x.softmax(-1))


def test_draw_never_takes_what_has_no_probability():
    p = torch.tensor([0., .3, 0., .7, 0.])
    u = torch.cat([torch.rand(10_000, generator=generator(0)), torch.tensor([0., 1 - 2**-24])])
    assert set(draw(p.expand(len(u), -1), u).tolist()) == {1, 3}


def test_masks_in_the_state_dict_as_minGPT_keeps_them():
    plain, official = GPT(5, 8, 2, 2, 16), GPT(5, 8, 2, 2, 16, masks=True)
    extra = set(official.state_dict()) - set(plain.state_dict())
    assert extra == {'blocks.0.attn.mask', 'blocks.1.attn.mask'}
    official.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randint(5, (2, 8), generator=generator(0))
    torch.testing.assert_close(official(x), plain(x))


@pytest.mark.parametrize('layout, keys', [
    ('clip', 'attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight attn.out_proj.bias ln_1.weight ln_1.bias mlp.c_fc.weight '
             'mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias ln_2.weight ln_2.bias'),
    ('glide', 'attn.c_qkv.weight attn.c_qkv.bias attn.c_proj.weight attn.c_proj.bias ln_1.weight ln_1.bias mlp.c_fc.weight '
              'mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias ln_2.weight ln_2.bias'),
    ('transformers', 'self_attn.q_proj.weight self_attn.q_proj.bias self_attn.k_proj.weight self_attn.k_proj.bias self_attn.v_proj.weight '
                     'self_attn.v_proj.bias self_attn.out_proj.weight self_attn.out_proj.bias layer_norm1.weight layer_norm1.bias '
                     'mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias layer_norm2.weight layer_norm2.bias')])
def test_layouts_are_those_of_released_files(layout, keys):
    assert set(Block(16, 2, layout).state_dict()) == set(keys.split())


@pytest.mark.parametrize('layout, released, prefix', [
    ('clip', 'clip/ViT-B-32', 'transformer.resblocks.0.'), ('glide', 'glide/base', 'transformer.resblocks.0.'),
    ('glide', 'karlo/prior', 'transformer.resblocks.0.'), ('clip', 'sd-v2/openclip_text', 'transformer.resblocks.0.'),
    ('transformers', 'sd-v1/clip_text', 'text_model.encoder.layers.0.')])
def test_layouts_against_released_schemas(layout, released, prefix):
    from diffcourse.layers import official_schema
    want = {k.removeprefix(prefix): tuple(s) for k, s in official_schema(released)['state_dict'].items() if k.startswith(prefix)}
    width = next(s[0] for k, s in want.items() if 'norm1' in k or 'ln_1' in k)
    with torch.device('meta'): block = Block(width, 8, layout)
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == want


# ------------------------------------------------------------------------------------------------- priors over maps of codes

def small(kind, K=6, shape=(3, 4)):
    net = GPT(K + 3, 12, 2, 2, 16) if kind == 'transformer' else priors.PixelCNN(K + 3, shape, 16, 3)
    return priors.CodePrior(lively(net), K, shape)


@pytest.mark.parametrize('kind', ['transformer', 'masked convolutions'])
def test_probabilities_of_all_maps_add_up_to_one(kind):
    "Two codes on a 2×3 map: 64 maps"
    net = GPT(4, 6, 2, 2, 16) if kind == 'transformer' else priors.PixelCNN(4, (2, 3), 16, 3)
    model = priors.CodePrior(lively(net), 2, (2, 3))
    maps = torch.cartesian_prod(*[torch.arange(2)] * 6).view(64, 2, 3)
    for label in (0, 1):
        p = (-model.nats(maps, torch.full((64, 1), label)).double().flatten(1).sum(1)).exp()
        assert abs(p.sum().item() - 1) < 1e-5


@pytest.mark.parametrize('kind', ['transformer', 'masked convolutions'])
def test_what_is_written_has_the_model_s_probabilities(kind):
    "A map of three places, 8 maps: frequencies of 20,000 draws against the model, each within 4.5 standard errors"
    net = GPT(4, 3, 1, 2, 16) if kind == 'transformer' else priors.PixelCNN(4, (1, 3), 16, 2)
    model, n = priors.CodePrior(lively(net), 2, (1, 3)), 20_000
    maps = torch.cartesian_prod(*[torch.arange(2)] * 3).view(8, 1, 3)
    p = (-model.nats(maps, torch.zeros(8, 1).long()).detach().double().flatten(1).sum(1)).exp()
    drawn = model.write(torch.zeros(n, 1).long(), seed=1).flatten(1) @ torch.tensor([4, 2, 1])
    z = (drawn.bincount(minlength=8) - n * p) / (n * p * (1 - p)).sqrt()
    assert z.abs().max() < 4.5


@pytest.mark.parametrize('kind', ['transformer', 'masked convolutions'])
def test_a_code_s_probability_knows_only_what_was_read(kind):
    model, maps, prompt = small(kind), torch.randint(6, (1, 3, 4), generator=generator(0)), torch.zeros(1, 1).long()
    base = model.logits(maps, prompt)
    for place in range(12):
        other = maps.flatten(1).clone()
        other[:, place] = (other[:, place] + 1) % 6
        changed = (model.logits(other.view(maps.shape), prompt) != base).any(-1)[0]
        assert not changed[:place + 1].any() and (place == 11 or changed[place + 1:].any())
    assert (model.logits(maps, prompt + 1) != base).any(-1).all()       # the label reaches every place


def test_masked_convolutions_without_mask_a_are_noticed(monkeypatch):
    original = priors.MaskedConv2d.__init__
    monkeypatch.setattr(priors.MaskedConv2d, '__init__', lambda self, kind, *a, **how: original(self, 'B', *a, **how))
    with pytest.raises(AssertionError): test_a_code_s_probability_knows_only_what_was_read('masked convolutions')


def test_blind_spot():
    "Plain masked convolutions never see what lies beyond the diagonal to the upper right"
    model = lively(priors.PixelCNN(5, (7, 7), 8, 10)).double()
    tokens = torch.randint(5, (1, 49), generator=generator(0))
    base, at = model(tokens), 4 * 7 + 2                                   # logits for row 4, column 2
    sees = []
    for i in range(at):
        other = tokens.clone()
        other[0, 1 + i] = (other[0, 1 + i] + 1) % 5
        sees.append(bool((model(other)[0, at] != base[0, at]).any()))
    blind = [divmod(i, 7) for i in range(at) if not sees[i]]
    assert blind == [(r, c) for r in range(5) for c in range(7) if r < 4 and c - 2 > 4 - r]


def test_writing_keeps_known_codes_in_both_nets():
    for kind in ('transformer', 'masked convolutions'):
        known = torch.full((5, 3, 4), -1)
        known[:, 0], known[1, 2, 2] = 2, 4
        maps = small(kind).write(torch.zeros(5, 1).long(), seed=2, known=known)
        assert maps.shape == (5, 3, 4) and (maps[known >= 0] == known[known >= 0]).all() and int(maps.max()) < 6


def test_label_prompt_withholds_a_tenth():
    labels, u = torch.arange(1000) % 10, torch.rand(1000, generator=generator(0))
    prompt = priors.label_prompt(labels, 10, u)
    assert prompt.shape == (1000, 1) and 60 < int((prompt == 10).sum()) < 140
    assert (priors.label_prompt(labels, 10)[:, 0] == labels).all()


def test_bad_convolutions_are_named():
    with pytest.raises(CourseError, match='kind'): priors.MaskedConv2d('C', 1, 1)
    with pytest.raises(CourseError, match='odd'): priors.MaskedConv2d('A', 1, 1, 4)
    with pytest.raises(CourseError, match='memory'): priors.PixelCNN(5, (2, 2), 8, 1)(torch.zeros(1, 1).long(), embeddings=torch.zeros(1, 1, 8))


def test_recipe_is_small_enough_to_ship(tmp_path):
    from diffcourse.weights import save_weights
    model = priors.fashion_prior()
    save_weights(tmp_path / 'p.safetensors', model, {}, 'int8')
    assert (tmp_path / 'p.safetensors').stat().st_size <= 250_000
    ratio = priors.effective(priors.fashion_pixelcnn()) / priors.effective(model)
    assert .97 < ratio < 1.03


# ------------------------------------------------------------------------------------------------- masked prediction

def test_patches_are_in_reading_order():
    x = torch.arange(64.).view(1, 1, 8, 8)
    p = priors.patches_of(x)
    assert p.shape == (1, 4, 16) and p[0, 1, 0] == 4 and p[0, 2, 0] == 32 and p[0, 0, 4] == 8


def test_hidden_patches_do_not_reach_the_features():
    torch.manual_seed(0)
    model, x = priors.PatchEncoder(7).eval(), torch.randn(2, 1, 28, 28)
    hide = priors.hide_block(torch.rand(2, 3))
    other = torch.where(torch.nn.functional.interpolate(hide.view(2, 1, 7, 7).float(), 28) > 0, 5., x)
    assert torch.equal(model.features(x, hide), model.features(other, hide))
    assert not torch.equal(model.features(x), model.features(other))


@pytest.mark.parametrize('target', ['tokens', 'pixels'])
def test_masked_loss_falls(target):
    from diffcourse.core import Draws
    torch.manual_seed(0)
    x = torch.randn(32, 1, 28, 28).cumsum(-1).tanh()
    batch = dict(x=x, codes=(x[:, 0, ::4, ::4] > 0).long())
    model, loss = priors.PatchEncoder(2 if target == 'tokens' else 16), priors.masked_loss(target)
    optimizer, values = torch.optim.AdamW(model.parameters(), 2e-3), []
    for i in range(25):
        value = loss(model, batch, Draws(0, i))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-5:]) < .9 * sum(values[:5])
    with pytest.raises(CourseError, match='words'): priors.masked_loss('words')


def test_linear_probe_reads_what_is_linear():
    g = generator(0)
    y = torch.randint(3, (600,), generator=g)
    x = torch.eye(3)[y] * 3 + torch.randn(600, 3, generator=g)
    noise = torch.randn(600, 3, generator=g)
    assert priors.linear_probe((x[:300], y[:300]), (x[300:], y[300:])) > 85
    assert priors.linear_probe((noise[:300], y[:300]), (noise[300:], y[300:])) < 50
