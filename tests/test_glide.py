"""GLIDE: text in the U-Net, official layouts, captions as rows, guidance, inpainting, enlarging.

The official outputs are checked by `python -m tests.parity FOLDER`; here its checkers are seen failing on changed code, with goldens that
this package writes itself.
"""
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffcourse import dalle, edit, glide, layers, openai_unet
from diffcourse.core import CourseError, Draws, generator
from diffcourse.dalle import clip_bpe, gpt2_bpe, shapes_bpe
from diffcourse.ddpm import Schedule
from diffcourse.shapes import scenes
from tests import parity
from tests.helpers.golden import one, write_golden

TEXT = dict(n_vocab=40, text_ctx=12, xf_width=32, xf_layers=1, xf_heads=4, xf_final_ln=True, xf_padding=True)
BASE = dict(in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=[2], dropout=.1,
            channel_mult=[1, 1], num_heads=1, num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True)
NAMES = ('glide_text2im', 'glide_superres', 'glide_inpaint', 'glide_superres_inpaint')


def given(name):
    "Inputs of a golden"
    g = generator(0)
    tokens = torch.randint(40, (2, 12), generator=g)
    out = dict(x=torch.randn(2, 3, 8, 8, generator=g), timesteps=torch.tensor([3, 700]), tokens=tokens,
               mask=torch.arange(12) < torch.tensor([[5], [0]]))
    if 'superres' in name: out['low_res'] = torch.randn(2, 3, 4, 4, generator=g)
    if 'inpaint' in name:
        out['inpaint_image'] = torch.randn(2, 3, 8, 8, generator=g)
        out['inpaint_mask'] = (torch.rand(2, 1, 8, 8, generator=g) < .5).float()
    return out


def write(folder, name):
    "A golden of this name made by the code as it is"
    inputs, config = given(name), {**TEXT, **BASE}
    net = glide.KINDS['superres' in name, 'inpaint' in name](**config).eval()
    write_golden(folder, name, config, inputs, parity.procedural(layers.layout(net), 'salt/'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('golden')
    for name in NAMES: write(path, name)
    return path


@pytest.mark.parametrize('name', NAMES)
def test_unchanged_code_passes(folder, name): assert one(folder, name).word == 'passed'


def padding_ignored(original): return lambda self, tokens, mask: original(self, tokens, torch.ones_like(mask))


def first_position(original):
    def encode(self, tokens, mask):
        _, words = original(self, tokens, mask)
        return self.transformer_proj(words[:, 0]), words
    return encode


def kind_by_kind(original):
    def beside(self, k, v, context, seen):
        kc, vc = openai_unet._pointwise(self.encoder_kv, context).chunk(2, -1)
        return torch.cat([kc, k], 1), torch.cat([vc, v], 1), None
    return beside


def words_masked(original): return lambda self, x, context=None: original(self, x, None if context is None else (
    context, torch.arange(context.shape[1]).expand(context.shape[:2]) < 5))


def mask_the_other_way(original): return lambda x, image, mask: original(x, image, None if mask is None else 1 - mask)


def mask_first(original):
    def beside(x, image, mask):
        out = original(x, image, mask)
        return torch.cat([out[:, :3], out[:, 6:], out[:, 3:6]], 1)
    return beside


def corners(original): return lambda low, x: F.interpolate(low, x.shape[2:], mode='bilinear', align_corners=True)


CHANGES = [('glide_text2im', glide.Text2ImUNet, 'encode_text', padding_ignored),
           ('glide_text2im', glide.Text2ImUNet, 'encode_text', first_position),
           ('glide_text2im', openai_unet.AttentionBlock, '_beside', kind_by_kind),
           ('glide_text2im', openai_unet.AttentionBlock, 'forward', words_masked),
           ('glide_inpaint', glide, 'beside', mask_the_other_way), ('glide_inpaint', glide, 'beside', mask_first),
           ('glide_superres', openai_unet, 'enlarged', corners),
           ('glide_superres_inpaint', glide, 'enlarged', corners)]


@pytest.mark.parametrize('name, owner, what, change', CHANGES, ids=lambda v: getattr(v, '__name__', str(v)))
def test_changed_code_fails(folder, monkeypatch, name, owner, what, change):
    monkeypatch.setattr(owner, what, change(getattr(owner, what)))
    assert one(folder, name).word == 'FAILED'


@pytest.fixture
def vocabularies():
    "GPT-2's and CLIP's, where they are kept or can be fetched"
    try: gpt2_bpe(), clip_bpe()
    except CourseError as e: pytest.skip(str(e))


def no_gathering(original): return lambda text: [piece for word in original(text) for piece in word.split(' ') if piece]
def loose_spaces(original): return lambda text: [piece for word in original(text) for piece in re.split('( )', word) if piece]
def case_kept(original): return lambda text: dalle.gpt2_words(text)
def zeros(original): return lambda bpe, *a: (lambda rows, mask: (rows * mask, mask))(*original(bpe, *a))
def end_counts(original): return lambda bpe, *a: (lambda rows, mask: (rows, mask.roll(1, 1) | mask))(*original(bpe, *a))
def by_spaces(original): return str.split
def fewer(original): return lambda: original()[1:]


def test_words_are_numbered_as_released(vocabularies):
    v = one(parity.HERE / 'golden', 'glide_tokenizers')
    assert v.word == 'passed' and v.note == '32 of 32 outputs', parity.line(v)


@pytest.mark.parametrize('owner, what, change', [
    (dalle, 'gpt2_words', no_gathering), (dalle, 'gpt2_words', loose_spaces), (dalle.GPT2BPE, 'words_in', case_kept),
    (glide, 'glide_tokens', zeros), (glide, 'glide_tokens', end_counts), (dalle, 'words_of', by_spaces),
    (edit, 'fast27', fewer)], ids=lambda v: getattr(v, '__name__', str(v)))
def test_other_words_are_noticed(vocabularies, monkeypatch, owner, what, change):
    new = change(getattr(owner, what))
    monkeypatch.setattr(owner, what, staticmethod(new) if isinstance(owner, type) else new)
    assert one(parity.HERE / 'golden', 'glide_tokenizers').word == 'FAILED'


def test_released_layouts():
    assert len(glide.glide_released()) == 4
    for name in glide.glide_released():
        net = glide.from_official(name, 'meta')
        assert layers.recognise(net)[0] == name and net.flags['noise_schedule'] in ('cosine', 'linear')
    with pytest.raises(CourseError, match='known: glide/'): glide.from_official('glide/large')


def test_a_wrong_file_is_named(tmp_path):
    net = openai_unet.UNetModel(**BASE | dict(channel_mult=(1,), attention_resolutions=()))
    save_file(net.state_dict(), tmp_path / 'wrong.safetensors')
    with pytest.raises(CourseError, match='wrong.safetensors is no released model of glide.*missing'):
        glide.load_official(tmp_path / 'wrong.safetensors')


def test_patches_are_a_change_of_shape():
    "A network on patches of 2×2 is the network on the same numbers laid out as channels"
    how = dict(model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(4,), num_head_channels=32)
    a = openai_unet.randomise(openai_unet.UNetModel(in_channels=3, out_channels=3, patch=2, **how), generator(0)).eval()
    b = openai_unet.UNetModel(in_channels=12, out_channels=12, **how | dict(attention_resolutions=(2,))).eval()
    b.load_state_dict(a.state_dict())
    x, t = torch.randn(2, 3, 16, 16, generator=generator(1)), torch.tensor([5, 900])
    with torch.no_grad(): assert torch.allclose(a(x, t), F.pixel_shuffle(b(F.pixel_unshuffle(x, 2), t), 2), atol=1e-6)
    with pytest.raises(CourseError, match='divisible by 4'): a(x[..., :6, :6], t)


def test_a_mask_hides_words():
    block = openai_unet.randomise(openai_unet.AttentionBlock(32, 2, encoder_channels=6), generator(0)).eval()
    x, words = torch.randn(1, 32, 4, 4, generator=generator(1)), torch.randn(1, 5, 6, generator=generator(2))
    seen = torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        assert torch.allclose(block(x, (words, seen)), block(x, words[:, :3]), atol=1e-6)
        assert not torch.allclose(block(x, words), block(x, words[:, :3]), atol=1e-4)


def test_captions_as_rows():
    bpe = shapes_bpe()
    rows, mask = glide.glide_tokens(bpe, ['a red circle', ''], 6)
    assert mask.tolist() == [[True] * 3 + [False] * 3, [False] * 6] and (rows[~mask] == len(bpe)).all()
    with pytest.raises(CourseError, match='not one string'): glide.glide_tokens(bpe, 'a red circle', 6)
    with pytest.warns(UserWarning, match='cut to 4 symbols'): glide.glide_tokens(bpe, ['a small red circle at night'], 4)
    net = glide.scenes_net()
    with pytest.raises(CourseError, match='symbols'): glide.text_to_image(net, type(bpe)([]), ['a'])


def test_held_out_sentences_are_not_trained_on():
    _, captions = glide.told_scenes(600)
    assert not any(map(glide.held_out, captions)) and all(map(glide.held_out, glide.unseen_captions(10, 2)))
    assert abs(len(captions) / 600 - .9) < .05


def test_an_emptied_caption_is_the_null_of_guidance():
    "p = 1 trains what guidance at scale 0 asks for"
    net = openai_unet.randomise(glide.scenes_net(), generator(0)).eval()
    batch = dict(x=scenes(4)[0], **dict(zip(('tokens', 'mask'), glide.glide_tokens(shapes_bpe(), scenes(4)[1], 16))))
    empty = dict(batch, tokens=torch.full_like(batch['tokens'], net.pad), mask=torch.zeros_like(batch['mask']))
    with torch.no_grad():
        dropped = glide.loss_glide(glide.glide_denoiser(None), p=1.)(net, batch, Draws(0, 0))
        plain = glide.loss_glide(glide.glide_denoiser(None), p=0.)(net, empty, Draws(0, 0))
        kept = glide.loss_glide(glide.glide_denoiser(None), p=0.)(net, batch, Draws(0, 0))
        a = glide.text_to_image(net, shapes_bpe(), ['a red circle'], 1, scale=0., steps=2)
        b = glide.text_to_image(net, shapes_bpe(), [''], 1, scale=1., steps=2)
    assert torch.allclose(dropped, plain) and not torch.allclose(dropped, kept) and torch.allclose(a, b, atol=1e-4)


def test_pasting_ends_at_the_known_pixels_and_a_wider_network_at_the_same_answer():
    bpe, (words, truth, mask) = shapes_bpe(), edit.cut_scenes(2)
    net = openai_unet.randomise(glide.scenes_net(), generator(3)).eval()
    wide = edit.widened(net, glide.scenes_net(glide.InpaintText2ImUNet)).eval()
    for model in (net, wide):
        out = edit.inpaint(model, bpe, words, truth, mask, steps=2)
        assert torch.equal(out * mask, truth * mask) and not torch.equal(out, truth)
    with pytest.raises(CourseError, match='the mask must be'): edit.inpaint(net, bpe, words, truth, mask[:1])


def test_states_of_pasting_have_the_noise_of_their_level():
    "With a sampler that does nothing, the known half has mean √ᾱ·y and variance 1 − ᾱ after the step"
    path = Schedule.cosine().respaced(4)
    def still(denoiser, steps, x, gen, **cond):
        for _ in steps:
            sent = yield x
            x = x if sent is None else sent
    image, mask = torch.full((1, 1, 100, 100), .5), torch.ones(1, 1, 100, 100)
    states = list(edit.keeping(image, mask, still)(None, path, torch.zeros_like(image), generator(0)))
    for step, x in zip(path, states):
        assert abs(float(x.mean()) - .5 * float(step.ᾱ_next) ** .5) < .05 and abs(float(x.var()) - float(1 - step.ᾱ_next)) < .06


def test_boxes():
    assert edit.box_mask((1, 2, 4, 8), 8).sum() == 64 - 18
    for bad in ((5, 0, 3, 9), (0, 0, 40, 3), (0, 0, 3)):
        with pytest.raises(CourseError, match='a box is'): edit.box_mask(bad, 32)


def test_levels_of_the_released_upsampler():
    kept = edit.fast27()
    assert len(kept) == 27 and kept[-1] == 997 and sorted(set(kept)) == kept


def test_blur_of_an_impulse_and_of_nothing():
    x = torch.zeros(1, 2, 9, 9)
    x[..., 4, 4] = 1
    out = edit.blurred(x, torch.tensor([.7]))
    k = torch.exp(-.5 * (torch.arange(-2., 3) / .7) ** 2)
    assert torch.allclose(out[0, 0, 2:7, 2:7], (k[:, None] * k / k.sum() ** 2), atol=1e-6)
    assert torch.equal(edit.blurred(x, torch.zeros(1)), x)


def test_intervals():
    assert glide.share_interval([False] * 20)[0::2] == (0., pytest.approx(.161, abs=.001))
    assert glide.share_interval([True] * 20)[1] == pytest.approx(.839, abs=.001)
    with pytest.raises(CourseError): glide.share_interval([])
