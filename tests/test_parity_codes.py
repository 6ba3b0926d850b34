"The quantisers' goldens are met, on other sizes too, and each check fails when the code it checks is changed"
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffcourse import vqvae, vqvae2
from tests import parity

HERE = ['vqvae_ema_sonnet', 'vqvae_ema_zalando', 'vqvae_zalando_model', 'vqvae2_quantize_rosinality', 'vqvae2_model', 'vqgan_vector_quantizer']


def one(name): return parity.check(parity.Golden(parity.HERE / 'golden' / f'{name}.json'))


@pytest.mark.parametrize('name', HERE)
def test_meets_official(name):
    v = one(name)
    got, _, wanted, *_ = v.note.split()
    assert v.word == 'passed' and got == wanted, parity.line(v)


def farthest(original): return lambda z, codes, memory=1: original(-z, codes, memory)
def long_codes_win(original): return lambda z, codes, memory=1: (z @ codes.T).argmax(1)
def no_gradient(original): return lambda z, q: q.detach()
def swapped(original): return lambda z, q: original(z, q)[::-1]
def summed(original): return lambda z, q: tuple(v * z.numel() for v in original(z, q))
def in_bits(original): return lambda counts: original(counts).log2()
def after_update(original):
    def forward(self, z):
        found = original(self, z)
        return found._replace(z=self.lookup(found.indices))
    return forward


def other_decay(original):
    def follow(self, z, indices):
        decay, self.decay = self.decay, 1 - self.decay
        original(self, z, indices)
        self.decay = decay
    return follow


def other_rule(rule):
    def change(original):
        def follow(self, z, indices):
            mine, self.rule = self.rule, rule
            original(self, z, indices)
            self.rule = mine
        return follow
    return change


def coarsely_smoothed(original):
    def follow(self, z, indices):
        eps, self.eps = self.eps, .01
        original(self, z, indices)
        self.eps = eps
    return follow


def never_legacy(original):
    def forward(self, z):
        self.legacy = False
        return original(self, z)
    return forward


def plain_skip(original): return lambda self, x: x + self.conv(x)
def rectified_skip(original): return lambda self, x: x.relu() + self.conv(x)


def bottom_first(original): return lambda self, top, bottom: self.dec(torch.cat([bottom, self.upsample_t(top)], 1))


def blind_bottom(original):
    def levels(self, x):
        below = self.enc_b(x)
        top = self.quantize_t(self.quantize_conv_t(self.enc_t(below)))
        return top, self.quantize_b(self.quantize_conv_b(torch.cat([0 * self.dec_t(top.z), below], 1)))
    return levels


Q = vqvae.Quantiser
MUTATIONS = [
    ('vqvae_ema_sonnet', vqvae, 'nearest_code', farthest), ('vqvae_ema_sonnet', vqvae, 'perplexity', in_bits),
    ('vqvae_ema_sonnet', Q, 'follow', other_rule('rosinality')), ('vqvae_ema_sonnet', Q, 'follow', other_decay),
    ('vqvae_ema_sonnet', Q, 'follow', coarsely_smoothed), ('vqvae_ema_sonnet', Q, 'forward', after_update),
    ('vqvae_ema_zalando', Q, 'follow', other_rule('rosinality')), ('vqvae_ema_zalando', vqvae, 'straight_through', no_gradient),
    ('vqvae_ema_zalando', Q, 'forward', after_update),
    ('vqvae2_quantize_rosinality', Q, 'follow', other_rule('zalando')), ('vqvae2_quantize_rosinality', vqvae, 'nearest_code', long_codes_win),
    ('vqvae2_quantize_rosinality', Q, 'follow', other_decay), ('vqvae2_quantize_rosinality', vqvae, 'code_losses', summed),
    ('vqvae_zalando_model', vqvae.ResBlock, 'forward', plain_skip), ('vqvae_zalando_model', vqvae, 'code_losses', swapped),
    ('vqvae_zalando_model', vqvae, 'perplexity', in_bits),
    ('vqgan_vector_quantizer', vqvae, 'code_losses', swapped), ('vqgan_vector_quantizer', Q, 'forward', never_legacy),
    ('vqgan_vector_quantizer', vqvae, 'straight_through', no_gradient), ('vqgan_vector_quantizer', vqvae, 'nearest_code', long_codes_win),
    ('vqvae2_model', vqvae.ResBlock, 'forward', rectified_skip), ('vqvae2_model', vqvae2.VQVAE2, 'draw', bottom_first),
    ('vqvae2_model', vqvae2.VQVAE2, 'levels', blind_bottom), ('vqvae2_model', vqvae, 'nearest_code', long_codes_win)]


@pytest.mark.parametrize('name, where, attribute, change', MUTATIONS,
                         ids=lambda v: v if isinstance(v, str) else getattr(v, '__name__', ''))
def test_notices(monkeypatch, name, where, attribute, change):
    "Every check can fail"
    monkeypatch.setattr(where, attribute, change(vars(where)[attribute]))
    assert one(name).word == 'FAILED'


def textbook(z, codes, N, m, γ, ε, overwrite):
    "zalando's and rosinality's step, written out with one-hot rows in float64"
    z, codes, N, m = (v.double() for v in (z, codes, N, m))
    hot = F.one_hot(torch.cdist(z, codes).argmin(1), len(codes)).double()
    N, m = γ * N + (1 - γ) * hot.sum(0), γ * m + (1 - γ) * hot.T @ z
    smooth = (N + ε) / (N.sum() + len(N) * ε) * N.sum()
    return hot, smooth if overwrite else N, m, m / smooth[:, None]


@pytest.mark.parametrize('K, D, γ, word', [(7, 3, .9, 'passed'), (40, 5, .5, 'passed'), (7, 3, .8, 'FAILED')])
def test_other_sizes(tmp_path, K, D, γ, word):
    "A golden of another size and decay, made by plain float64; the last names a decay that was not used"
    g = torch.Generator().manual_seed(K)
    z, codes, m, N = (torch.randn(*s, generator=g) for s in ((2, 4, 3, D), (K, D), (K, D), (K,)))
    N = N.abs() + 1
    flat = z.flatten(0, 2)
    hot, N1, m1, e1 = textbook(flat, codes, N, m, .9 if word == 'FAILED' else γ, 1e-5, False)
    q = hot @ codes.double()
    out = {'step1.quantize': q.view(2, 4, 3, D), 'step1.diff': (q - flat).square().mean(), 'step1.indices': hot.argmax(1).view(2, 4, 3),
           'after1.cluster_size': N1, 'after1.embed_avg': m1.T, 'after1.embed': e1.T}
    into = {'in/z1': z, 'in/before.embed': codes.T, 'in/before.embed_avg': m.T, 'in/before.cluster_size': N}
    tensors = into | {f'out/{k}': v if v.dtype == torch.int64 else v.float() for k, v in out.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / 'vqvae2_quantize_rosinality.safetensors')
    info = dict(name='vqvae2_quantize_rosinality', config=dict(dim=D, n_embed=K, decay=γ, eps=1e-5), rtol=1e-5, atol=1e-5)
    (tmp_path / 'vqvae2_quantize_rosinality.json').write_text(json.dumps(info))
    v, = parity.run(tmp_path)
    assert v.word == word, parity.line(v)
