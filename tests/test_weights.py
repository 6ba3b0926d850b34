"Weights on disk: files that are whole, come back as precise as promised, and are never run"
import copyreg, io, json, os, pickle, zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import diffcourse.weights as weights
from diffcourse.core import CourseError, Table, sha256
from diffcourse.weights import Stub, digest, load_tensors, load_weights, save_weights, weights_report
from tests.helpers.train_job import damage, net


class Wide(nn.Module):
    "Layers large and small, a buffer of integers, one of doubles"
    def __init__(self, scale=1.):
        super().__init__()
        self.conv, self.out = nn.Conv2d(16, 32, 3), nn.Linear(32, 4)
        self.register_buffer('count', torch.tensor(3))
        self.register_buffer('exact', torch.linspace(0, 1, 7, dtype=torch.float64))


@pytest.mark.parametrize('dtype, error', [('fp32', 0.), ('fp16', 2.**-11), ('int8', 1 / 254 * 1.01)])
def test_weights_come_back_as_precise_as_promised(tmp_path, dtype, error):
    model, back = Wide(), Wide()
    path = save_weights(tmp_path / 'wide', model, {'recipe': 'wide', 'loss': .5}, dtype)
    load_weights(path, back)
    worst = (model.conv.weight - back.conv.weight).abs().amax((1, 2, 3)) / model.conv.weight.abs().amax((1, 2, 3))
    assert worst.max() <= error and (dtype == 'fp32' or worst.max() > error / 20)
    assert (model.out.weight - back.out.weight).abs().max() <= 2.**-12
    assert back.exact.equal(model.exact) and back.count == 3 and not back.training
    card = json.loads((tmp_path / 'wide.json').read_text())
    assert card['recipe'] == 'wide' and card['dtype'] == dtype and card['bytes'] == path.stat().st_size
    sizes = {'fp32': 4, 'fp16': 2, 'int8': 1}
    assert path.stat().st_size < 4608 * sizes[dtype] + 2600


def test_numbers_too_large_for_fp16_stay_float32(tmp_path):
    model, back = nn.Linear(2, 2), nn.Linear(2, 2)
    model.weight.data.fill_(1e6)
    load_weights(save_weights(tmp_path / 'w', model), back)
    assert back.weight.equal(model.weight)


def test_weights_of_another_architecture(tmp_path):
    path = save_weights(tmp_path / 'w', nn.Linear(2, 3))
    with pytest.raises(CourseError, match=r'another architecture. other shape: weight is \(3, 2\), expected \(3, 4\)'): load_weights(path, nn.Linear(4, 3))
    with pytest.raises(CourseError, match='missing: extra'):
        model = nn.Linear(2, 3)
        model.extra = nn.Parameter(torch.zeros(1))
        load_weights(path, model)


@pytest.mark.parametrize('how', ['truncated', 'one bit', 'header', 'a web page'])
def test_damaged_weights_are_refused(tmp_path, how):
    path = save_weights(tmp_path / 'w', Wide())
    damage(path, how)
    with pytest.raises(CourseError, match='SHA-256'): load_weights(path, Wide())
    path.with_suffix('.json').unlink()
    with pytest.raises(CourseError, match='truncated|damaged'): load_weights(path, Wide())


# --- other people's files -------------------------------------------------------------------------------------

class Bomb:
    "Makes a folder when it is unpickled"
    def __init__(self, flag): self.flag = flag
    def __reduce__(self): return os.mkdir, (str(self.flag),)


def explosive(name, tmp_path, flag):
    "A file that runs something when it is opened the usual way, and that way"
    path, tensor = tmp_path / name, torch.zeros(2)
    state = {'state_dict': {'w': tensor, 'x': Bomb(flag)}}
    kind = name.split('.')[0]
    if kind == 'plain': path.write_bytes(pickle.dumps({'w': Bomb(flag)}, protocol=2))
    if kind == 'protocol4': path.write_bytes(pickle.dumps({'w': Bomb(flag)}, protocol=4))
    if kind == 'inst': path.write_bytes(f"(dS'w'\n(S'{flag}'\nios\nmkdir\ns.".encode())
    if kind == 'obj': path.write_bytes(f"(dS'w'\n(cos\nmkdir\nS'{flag}'\nos.".replace("'\nos.", "'\no").encode() + b's.')
    if kind == 'zip': torch.save(state, path)
    if kind == 'old': torch.save(state, path, _use_new_zipfile_serialization=False)
    if kind == 'module':
        model = nn.Linear(2, 2)
        model.hook = Bomb(flag)
        torch.save(model, path)
    if kind == 'nested':
        inner = io.BytesIO()
        torch.save({'w': Bomb(flag)}, inner)
        path.write_bytes(pickle.dumps({'w': Nested(inner.getvalue())}))
    return path, pickle.load if kind in ('plain', 'protocol4', 'inst', 'obj', 'nested') else \
        lambda f: torch.load(f, weights_only=False)


class Nested:
    "A storage as plain pickle holds it: bytes that are a file of their own"
    def __init__(self, data): self.data = data
    def __reduce__(self): return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize('name', ['plain.pt', 'plain.pth', 'plain.bin', 'plain.ckpt', 'plain.pkl', 'protocol4.pkl', 'inst.pkl',
                                  'zip.pt', 'zip.ckpt', 'old.pt', 'nested.pkl', 'module.pt'])
def test_a_malicious_pickle_runs_nothing(tmp_path, name):
    flag = tmp_path / 'exploded'
    path, usual = explosive(name, tmp_path, flag)
    try: found = load_tensors(path)
    except CourseError as e: assert 'no plain state dict' in str(e) and ('mkdir' in str(e) or 'nested' in name)
    else: assert name == 'module.pt' and set(found) == {'weight', 'bias'}
    assert not flag.exists()
    with open(path, 'rb') as f: usual(f)
    assert flag.exists(), 'the bomb is a dud: the test proves nothing'


def pickled(text): return text.replace('|', '\n').encode('latin1')


@pytest.mark.parametrize('text', [
    "c__builtin__|setattr|(ctorch._utils|_rebuild_tensor_v2|S'spoiled'|I1|tR.",       # through setattr
    "ctorch._utils|_rebuild_tensor_v2|(NdS'spoiled'|I1|stb.",                         # through BUILD's second dictionary
    "ccollections|OrderedDict|(NdS'spoiled'|I1|stb.",
    "ctorch|FloatStorage|(NdS'spoiled'|I1|stb.",
    "c__builtin__|eval|(S'torch.spoiled'|tR.", "c__builtin__|getattr|(cos|system|S'__call__'|tR(S'true'|tR.",
    "ccopy_reg|_reconstructor|(cos|mkdir|c__builtin__|object|NtR.",
    "ctorch._tensor|_rebuild_from_type_v2|(cos|mkdir|NS'x'|Ntt.",
])
def test_nothing_known_can_be_altered(tmp_path, text):
    (tmp_path / 'x.pkl').write_bytes(pickled(text))
    with pytest.raises(CourseError): load_tensors(tmp_path / 'x.pkl')
    for thing in (torch, torch._utils, torch._utils._rebuild_tensor_v2, torch.FloatStorage, dict, weights._view, Stub):
        assert not hasattr(thing, 'spoiled')
    assert all(not hasattr(v, 'spoiled') for v in weights._MEANS.values())


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    "Sizes and strides come from the file: they must not reach memory that is not the tensor's"
    class Far:
        def __init__(self, t): self.t = t
        def __reduce__(self): return torch._utils._rebuild_tensor_v2, (self.t.untyped_storage(), 0, (1000, 1000), (1000, 1), False, {})
    torch.save([Far(torch.zeros(4)), Stub], tmp_path / 'far.pt')
    with pytest.raises(CourseError, match='damaged'): load_tensors(tmp_path / 'far.pt', part=0)


class Odd(nn.Module):
    "What modules may hold: shared, transposed, empty and half-precision tensors, buffers that are not stored, None"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ModuleDict({'tail': nn.Linear(2, 2)}))
        self.turned, self.empty = nn.Parameter(torch.rand(3, 4).T), nn.Parameter(torch.empty(0, 3))
        self.tied = self.body[0].weight
        self.register_buffer('brief', torch.rand(2, 2).bfloat16())
        self.register_buffer('yes', torch.tensor([True, False]))
        self.register_buffer('scratch', torch.zeros(2), persistent=False)
        self.register_parameter('none', None)


def kinds(model, folder):
    "The same numbers in every kind of file"
    torch.save(model.state_dict(), folder / 'dict.pt')
    torch.save(model.state_dict(), folder / 'old dict.pth', _use_new_zipfile_serialization=False)
    torch.save(model, folder / 'module.pt')
    torch.save(model, folder / 'old module.pt', _use_new_zipfile_serialization=False)
    torch.save({'state_dict': model.state_dict(), 'epoch': 3, 'callbacks': [Odd, {'best': Wide}]}, folder / 'lightning.ckpt')
    torch.save({'state_dict': model}, folder / 'module inside.bin')
    (folder / 'plain.pkl').write_bytes(pickle.dumps(model.state_dict()))
    (folder / 'plain module.pkl').write_bytes(pickle.dumps(model, protocol=2))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve")
def test_every_kind_of_pickle_gives_the_modules_own_state_dict(tmp_path):
    model = Odd()
    kinds(model, tmp_path)
    want = model.state_dict()
    for path in tmp_path.iterdir():
        got = load_tensors(path)
        assert list(got) == list(want), path.name
        for k, v in got.items(): assert v.dtype == want[k].dtype and v.shape == want[k].shape and v.equal(want[k]), (path.name, k)
        Odd().load_state_dict(got)


def test_the_inert_reader_agrees_with_pytorchs(tmp_path):
    "On files that both can read"
    torch.save({'a': torch.arange(12.).view(3, 4)[:, 1:3], 'f': torch.rand(3).to(torch.float8_e4m3fn), 'u': torch.ones(2, dtype=torch.uint16)},
               tmp_path / 'a.pt')
    with zipfile.ZipFile(tmp_path / 'a.pt') as z: ours = weights._read_zip(z)
    theirs = torch.load(tmp_path / 'a.pt', weights_only=True)
    for k, v in theirs.items(): assert ours[k].dtype == v.dtype and ours[k].shape == v.shape and ours[k].float().equal(v.float())


def test_parts_of_a_checkpoint(tmp_path):
    a, b = {'w': torch.ones(2)}, {'w': torch.zeros(2)}
    torch.save({'model': a, 'ema': b, 'step': 3}, tmp_path / 'd.pt')
    torch.save([a, b, 7], tmp_path / 'l.ckpt')
    assert load_tensors(tmp_path / 'd.pt', 'ema')['w'].sum() == 0 and load_tensors(tmp_path / 'l.ckpt', 0)['w'].sum() == 2
    with pytest.raises(CourseError, match="no part 'emma'; it has: model, ema, step"): load_tensors(tmp_path / 'd.pt', 'emma')
    assert load_tensors(tmp_path / 'd.pt')['w'].sum() == 2 and load_tensors(tmp_path / 'd.pt', ema=True)['w'].sum() == 0
    assert load_tensors(tmp_path / 'l.ckpt', ema=True)['w'].sum() == 0
    torch.save({'weights': a, 'step': 3}, tmp_path / 'odd.pt')
    with pytest.raises(CourseError, match='weights is .* step is 3'): load_tensors(tmp_path / 'odd.pt')


def test_the_trace_of_data_parallel_training_is_removed(tmp_path):
    torch.save({'module.a.weight': torch.ones(1), 'module.b': torch.ones(1)}, tmp_path / 'all.pt')
    torch.save({'module.weight': torch.ones(1), 'b': torch.ones(1)}, tmp_path / 'one.pt')
    assert set(load_tensors(tmp_path / 'all.pt')) == {'a.weight', 'b'} and set(load_tensors(tmp_path / 'one.pt')) == {'module.weight', 'b'}


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript_needs_a_known_hash_or_trust(tmp_path, monkeypatch):
    model, path = nn.Sequential(nn.Linear(2, 3)), tmp_path / 'script.pt'
    torch.jit.script(model).save(str(path))
    with pytest.raises(CourseError, match='trust=True'): load_tensors(path)
    assert load_tensors(path, trust=True)['0.weight'].equal(model[0].weight)
    monkeypatch.setitem(weights.TRUSTED_SCRIPTS, sha256(path), 'this very file')
    assert set(load_tensors(path)) == {'0.weight', '0.bias'}
    assert all(len(k) == 64 for k in weights.TRUSTED_SCRIPTS)


def test_tensor_files_that_are_read_and_refused(tmp_path):
    state = {'weight': torch.ones(2, 3)}
    torch.save(state, tmp_path / 'a.pt')
    save_file(state, tmp_path / 'c.safetensors')
    for name in ('a.pt', 'c.safetensors'): assert load_tensors(tmp_path / name)['weight'].equal(state['weight'])
    (tmp_path / 'd.h5').write_bytes(b'x')
    with pytest.raises(CourseError, match='d.h5 is no weights file'): load_tensors(tmp_path / 'd.h5')
    with pytest.raises(CourseError, match='no file'): load_tensors(tmp_path / 'absent.pt')
    (tmp_path / 'e.safetensors').write_bytes((tmp_path / 'a.pt').read_bytes())
    with pytest.raises(CourseError, match='not a safetensors file'): load_tensors(tmp_path / 'e.safetensors')
    for cut in (10, 400, -40):
        (tmp_path / 'cut.pt').write_bytes((tmp_path / 'a.pt').read_bytes()[:cut])
        with pytest.raises(CourseError, match='damaged'): load_tensors(tmp_path / 'cut.pt')
    (tmp_path / 'page.pt').write_text('<html>404</html>')
    with pytest.raises(CourseError, match='damaged'): load_tensors(tmp_path / 'page.pt')


# --- weights that travel with the package ---------------------------------------------------------------------

@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "An embedded-data folder with one set of weights"
    root = tmp_path / 'assets'
    path = save_weights(root / 'weights/tiny', net(), {'recipe': 'tiny', 'budget': 'smoke', 'steps': 30, 'loss': .5})
    entry = lambda p: {'sha256': sha256(p), 'bytes': p.stat().st_size}
    names = {f'weights/{p.name}': entry(p) for p in (path, path.with_suffix('.json'))}
    (root / 'MANIFEST.json').write_text(json.dumps(names))
    monkeypatch.setattr('diffcourse.core.asset_roots', lambda: [root])
    return path


def test_shipped_weights_by_name(shelf):
    assert weights.shipped('tiny') and not weights.shipped('huge') and weights.load_card('tiny')['budget'] == 'smoke'
    model = load_weights('tiny', net(seed=3))
    assert (model[0].weight - net()[0].weight).abs().max() < 1e-3
    with pytest.raises(CourseError, match="'huge'; there are: tiny"): load_weights('huge', net())
    report = weights_report(verify=True)
    assert isinstance(report, Table) and report.rows[0][0] == 'tiny' and report.rows[0][-1] == 'intact'
    damage(shelf, 'one bit')
    assert 'SHA-256' in weights_report(verify=True).rows[0][-1]
    with pytest.raises(CourseError, match='SHA-256'): load_weights('tiny', net())
