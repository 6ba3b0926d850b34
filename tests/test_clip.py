"CLIP: official numbers, exact gradients however the batch is cut, files that are refused, and peers"
import importlib.util
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffcourse import clip, data, priors
from diffcourse.core import CourseError, Draws, generator
from diffcourse.weights import layout, save_weights
from tests import parity

peer = pytest.mark.skipif(importlib.util.find_spec('open_clip') is None, reason='open_clip_torch is not installed')


def tiny(**more):
    "A ViT CLIP of 8×8 pixels and 20 symbols, in float64"
    torch.manual_seed(0)
    how = dict(embed_dim=8, image_resolution=8, vision_layers=1, vision_width=32, vision_patch_size=4, context_length=6, vocab_size=20,
               transformer_width=32, transformer_heads=4, transformer_layers=2, vision_heads=4) | more
    return clip.CLIP(**how).double()


def batch(n=8):
    "Pictures and captions for it"
    middle = torch.randint(1, 18, (n, 4), generator=generator(3))
    text = torch.cat([torch.full((n, 1), 18), middle, torch.full((n, 1), 19)], 1)
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=generator(2)), text


def gradient(model, step):
    "All gradients after a step, as one row"
    model.zero_grad()
    step()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---------------------------------------------------------------------------------------------------- official numbers

NAMES = ('clip_tokenizer', 'full__clip_vit_b32')


@pytest.mark.parametrize('name', NAMES)
def test_goldens(name):
    if name == 'clip_tokenizer' and importlib.util.find_spec('open_clip') is None: pytest.skip('CLIP vocabulary not installed')
    found = parity.check(parity.Golden(Path(__file__).parent / 'golden' / f'{name}.json'))
    assert found.word == 'passed', parity.line(found)


def test_every_released_layout():
    for name in clip.released(): assert layout(clip.from_official(name, 'meta')), name
    assert len(clip.released()) == 14


# ------------------------------------------------------------------------------------------------------------- peers

def peer_model(config):
    import open_clip
    torch.manual_seed(1)
    return open_clip.model.CLIP(**config).eval()


TINY = dict(embed_dim=24, quick_gelu=False, text_cfg=dict(context_length=10, vocab_size=50, width=32, heads=4, layers=3),
            vision_cfg=dict(layers=2, width=48, head_width=16, patch_size=8, image_size=16))
B32 = dict(embed_dim=512, quick_gelu=True, text_cfg=dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=2),
           vision_cfg=dict(layers=2, width=768, patch_size=32, image_size=224))
RESNET = dict(embed_dim=16, quick_gelu=True, text_cfg=dict(context_length=9, vocab_size=40, width=32, heads=4, layers=1),
              vision_cfg=dict(layers=[1, 1, 1, 1], width=8, head_width=64, patch_size=None, image_size=64))


@peer
@pytest.mark.parametrize('config', [TINY, B32, RESNET], ids=['tiny', 'B/32 sizes, 2 blocks', 'resnet'])
def test_equals_open_clip_both_ways(config):
    theirs, ours = peer_model(config), clip.CLIP(**clip.open_clip_flags(config)).eval()
    size, length, vocab = config['vision_cfg']['image_size'], config['text_cfg']['context_length'], config['text_cfg']['vocab_size']
    x = torch.randn(2, 3, size, size, generator=generator(0))
    t = torch.randint(1, vocab - 1, (2, length), generator=generator(1))
    t[:, 5] = vocab - 1
    for a, b in ((theirs, ours), (ours, theirs)):                    # their weights in our network, and ours in theirs
        b.load_state_dict(a.state_dict())
        with torch.no_grad():
            for mine, other in ((ours.encode_image(x), theirs.encode_image(x)), (ours.encode_text(t), theirs.encode_text(t))):
                assert (mine - other).abs().max() < 1e-5 * max(1, float(other.abs().max()))
        with torch.no_grad():                                        # the second direction with other numbers
            for p in ours.parameters(): p.add_(.01 * torch.randn(p.shape, generator=generator(p.numel())))


@peer
def test_loss_equals_open_clips():
    from open_clip.loss import ClipLoss
    x, y = (F.normalize(torch.randn(6, 8, generator=generator(i)), dim=-1) for i in (0, 1))
    torch.testing.assert_close(clip.contrastive_loss(x, y, 20.), ClipLoss()(x, y, 20.), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec('transformers') is None, reason='transformers is not installed')
def test_text_model_equals_transformers():
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Theirs
    config = dict(vocab_size=40, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=9, hidden_act='quick_gelu')
    torch.manual_seed(0)
    theirs, ours = Theirs(CLIPTextConfig(**config)).eval(), clip.CLIPTextModel(**config).eval()
    state = {k if k.startswith('text_model.') else f'text_model.{k}': v for k, v in theirs.state_dict().items()}
    ours.load_state_dict({k: v for k, v in state.items() if 'position_ids' not in k})
    t = torch.randint(0, 40, (2, 9), generator=generator(0))
    with torch.no_grad(): torch.testing.assert_close(ours(t), theirs(t).last_hidden_state, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- properties

def test_what_comes_after_the_end_mark_does_not_matter():
    model = tiny()
    a = torch.tensor([[18, 3, 4, 19, 0, 0], [18, 3, 4, 19, 7, 7], [18, 5, 4, 19, 0, 0]])
    z = model.encode_text(a)
    assert (z[0] - z[1]).abs().max() < 1e-9 < (z[0] - z[2]).abs().max()


def test_bidirectional_attention_would_be_seen(monkeypatch):
    model, a = tiny(), torch.tensor([[18, 3, 4, 19, 0, 0], [18, 3, 4, 19, 7, 7]])
    forward = priors.Block.forward
    monkeypatch.setattr(priors.Block, 'forward', lambda self, x, mask=None, causal=False, memory=None: forward(self, x, mask, False))
    z = model.encode_text(a)
    assert (z[0] - z[1]).abs().max() > 1e-4


@pytest.mark.parametrize('chunk', [1, 3, 8])
def test_pieces_give_the_gradient_of_the_whole(chunk):
    model, (x, t) = tiny(), batch()
    loss = lambda: clip.contrastive_loss(model.encode_image(x), model.encode_text(t), clip.scale_of(model))
    want = gradient(model, lambda: loss().backward())
    got = gradient(model, lambda: clip.cached_backward(model, x, t, chunk))
    assert (got - want).norm() < 1e-6 * want.norm()


def test_adding_up_pieces_does_not():
    model, (x, t) = tiny(), batch()
    part = lambda i: clip.contrastive_loss(model.encode_image(x[i]), model.encode_text(t[i]), clip.scale_of(model)) / 2
    want = gradient(model, lambda: (2 * part(slice(None))).backward())
    naive = gradient(model, lambda: (part(slice(4)) + part(slice(4, 8))).backward())
    assert (naive - want).norm() > .1 * want.norm()


WORKER = '''
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from diffcourse import clip
sys.path.insert(0, os.getcwd())
from tests.test_clip import batch, tiny

if 'plain' in sys.argv: clip._Gather.backward = staticmethod(lambda ctx, g: g[dist.get_rank() * ctx.n:][:ctx.n])
dist.init_process_group('gloo')
rank, (x, t), model = dist.get_rank(), batch(), tiny()

class Whole(torch.nn.Module):
    def __init__(self): super().__init__(); self.model = model
    def forward(self, x, t):
        z = clip.gathered(model.encode_image(x)), clip.gathered(model.encode_text(t))
        return clip.contrastive_loss(*z, clip.scale_of(model))

mine = slice(4 * rank, 4 * rank + 4)
assert dist.get_world_size() == 2
whole = DistributedDataParallel(Whole())   # kept: without it there is nobody to average
whole(x[mine], t[mine]).backward()
if rank == 0: torch.save(torch.cat([p.grad.flatten() for p in model.parameters()]), sys.argv[1])
dist.destroy_process_group()
'''


@pytest.mark.parametrize('how', ['summed', 'plain'])
def test_two_processes_give_the_gradient_of_one(tmp_path, how):
    "Exactly so with the gather of this course; not with one whose backward pass forgets the other process"
    (tmp_path / 'worker.py').write_text(WORKER, encoding='utf-8')
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '0', '--rdzv_backend', 'c10d',
               '--rdzv_endpoint', 'localhost:0', str(tmp_path / 'worker.py'), str(tmp_path / 'g.pt'), how]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': root})
    assert done.returncode == 0, done.stderr[-2000:]
    model, (x, t) = tiny(), batch()
    want = gradient(model, lambda: clip.contrastive_loss(model.encode_image(x), model.encode_text(t), clip.scale_of(model)).backward())
    off = float((torch.load(tmp_path / 'g.pt') - want).norm() / want.norm())
    assert off < 1e-6 if how == 'summed' else off > .1, off


def test_equal_captions_change_no_gradient():
    words, which = torch.randn(3, 4, generator=generator(0), dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 2])
    x, found = torch.randn(6, 4, generator=generator(1), dtype=torch.float64), []
    for same in (None, which[:, None] == which):
        a, w = x.clone().requires_grad_(), words.clone().requires_grad_()
        found.append(torch.autograd.grad(clip.contrastive_loss(a, w[which], 7., same), (a, w)))
    for a, b in zip(*found): assert (a - b).abs().max() < 1e-6


def test_scale_is_clamped_as_a_parameter():
    model = tiny()
    model.logit_scale.data.fill_(math.log(150))
    clip.clamp_scale(model)
    assert abs(float(clip.scale_of(model).detach()) - 100) < 1e-6 and model.logit_scale.requires_grad


def test_noised_gradient_is_the_slope_and_leaves_parameters_alone():
    sizes = dict(n_embd=8, n_head=2, n_xf_blocks=1, n_head_state=8)
    torch.manual_seed(0)
    model = clip.NoisedCLIP(dict(n_bpe_vocab=20, max_text_len=6, **sizes), dict(image_size=8, patch_size=4, n_timestep=9, **sizes)).double()
    x, way = (torch.randn(2, 3, 8, 8, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    t, text = torch.tensor([1, 8]), model.encode_text(batch(2)[1]).detach()
    with torch.no_grad():
        fit = [float((text * model.encode_image(x + h * way, t)).sum()) for h in (1e-5, -1e-5)]
    slope = 300 * (fit[0] - fit[1]) / 2e-5
    assert abs(float((model.gradient(x, t, text, 3.) * way).sum()) - slope) < 1e-5 * abs(slope)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(CourseError, match='must be told t'): model.encode_image(x)


# ------------------------------------------------------------------------------------------------------- tokens and bad input

def test_long_empty_and_strange_captions():
    bpe = clip.clip_words('shapes')
    start, end = (bpe.ids[s] for s in clip.CLIP_SPECIALS)
    with pytest.warns(UserWarning, match='cut to 6'): row = clip.clip_tokens(['a small red circle ' * 9], bpe, 8)[0]
    assert row[0] == start and row[-1] == end == len(bpe) - 1
    assert clip.clip_tokens([''], bpe, 4).tolist() == [[start, end, 0, 0]]
    assert clip.clip_tokens([''], bpe, 4, pad=None).tolist() == [[start, end, end, end]]
    assert clip.clip_tokens(['ein kleiner Kreis ☃ 圆'], bpe, 40)[0].argmax() > 5
    with pytest.raises(CourseError, match='list of strings'): clip.clip_tokens('one caption', bpe)


def test_wrong_pictures_and_files(tmp_path):
    with pytest.raises(CourseError, match=r'takes colour pictures \(B, 3, 8, 8\)'): tiny().encode_image(torch.zeros(1, 1, 8, 8).double())
    torch.save({'visual.conv1.weight': torch.zeros(768, 3, 32, 32)}, tmp_path / 'part.pt')
    with pytest.raises(CourseError, match='Nearest is clip/ViT-B-32; missing'): clip.load_official(tmp_path / 'part.pt')
    with pytest.raises(CourseError, match='no released model'): clip.from_official('clip/ViT-Z')
    with pytest.raises(CourseError, match='two plain towers'): clip.open_clip_flags(dict(TINY, custom_text=True))


def test_torchscript_needs_trust(tmp_path):
    model, path = tiny().float().eval(), tmp_path / 'tiny.pt'

    class Holder(torch.nn.Module):
        "What OpenAI's files are: a traced model with three numbers beside its weights"
        def __init__(self):
            super().__init__()
            for name, part in model.named_children(): self.add_module(name, part)
            for name, p in model.named_parameters(recurse=False): self.register_parameter(name, p)
            for name in clip.SCRIPT_EXTRAS: self.register_buffer(name, torch.tensor(8))

        def forward(self, x): return x + self.logit_scale

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.trace(Holder(), torch.zeros(1)), str(path))
    with pytest.raises(CourseError, match='trust=True'): clip.load_official(path, model=tiny())
    other = clip.load_official(path, trust=True, model=tiny(vision_layers=1))
    assert all(torch.equal(a.float(), b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


# ------------------------------------------------------------------------------------------------------- data and scores

def test_who_fits_whom():
    "A caption fits the pictures of its concept, in its style if it names one"
    p = clip.emoji_pairs('train')
    rows = torch.tensor([i for i in range(len(p['x'])) if p['concept'][i] < 3])
    x, tokens, same = clip.drawn({k: v[rows] for k, v in p.items()}, Draws(0, 0))
    assert x.shape[1:] == (3, 32, 32) and bool(same.diagonal().all())
    assert not bool((same & (p['concept'][rows][:, None] != p['concept'][rows])).any())
    styles = p['style'][rows]
    assert bool((same & (styles[:, None] != styles)).any()), 'no caption without a style was drawn'


def test_flags_and_letters_are_not_mirrored():
    e = data.emoji('train', size=16)
    turned = dict(zip(e.extra['name'], clip.emoji_pairs('train')['mirrors'].tolist()))
    assert not any(turned[n] for n in turned if 'flag' in n or 'arrow' in n or 'button' in n)
    assert turned['red apple'] and turned['guitar']


def test_retrieval_counts():
    z = torch.eye(4)
    assert clip.retrieval(z, z, ks=(1,))['caption@1'] == 1
    shifted = clip.retrieval(z, z.roll(1, 0), ks=(1, 4))
    assert shifted == {'caption@1': 0., 'caption@4': 1., 'picture@1': 0., 'picture@4': 1.}
    assert clip.retrieval(z, z.roll(1, 0), torch.ones(4, 4, dtype=torch.bool), (1,))['caption@1'] == 1


def test_rerank_takes_a_model():
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 3, 32, 32, generator=generator(0)) * 2 - 1
    best, scores = clip.rerank(['a small red circle', 'a large blue square'], pictures, model=clip.clip_shapes.model())
    assert best.shape == (2, 3, 32, 32) and torch.equal(best[0], pictures[0, scores[0].argmax()])


@pytest.mark.parametrize('name', ['clip_shapes', 'noised_clip_shapes'])
def test_weights_survive_int8(tmp_path, name):
    from diffcourse.train import find_recipe
    from diffcourse.weights import load_weights
    torch.manual_seed(0)
    model, x = find_recipe(name).model().eval(), torch.rand(4, 3, 32, 32, generator=generator(0)) * 2 - 1
    path = save_weights(tmp_path / name, model, {}, 'int8')
    again, t = load_weights(path, find_recipe(name).model()), [torch.arange(4)] if 'noised' in name else []
    with torch.no_grad(): cos = F.cosine_similarity(model.encode_image(x, *t), again.encode_image(x, *t))
    assert float(cos.min()) > .999
