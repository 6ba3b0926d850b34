"Questions about scenes, emoji kinds, the CIFAR-10 classifier"
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffcourse import data, extractors, metrics
from diffcourse.core import CourseError, generator, to_float
from diffcourse.extractors import ATTRIBUTES, CifarResNet, EmojiClassifier, ShapesClassifier, attributes
from diffcourse.shapes import Scene, Thing
from diffcourse.train import RECIPES
from diffcourse.weights import load_card, shipped


def scene(*things, background='light'): return Scene(tuple(Thing(*t) for t in things), background)


# ---------------------------------------------------------------- questions

def test_a_scene_answers_its_questions():
    s = scene(('circle', 'red', 'small', .2, .5), ('square', 'blue', 'large', .7, .55), background='dark')
    assert attributes(s) == {'a red circle', 'a small circle', 'a blue square', 'a large square', 'a circle left of a square',
                             'two things or more', 'night'}
    assert attributes(s) <= set(ATTRIBUTES) and len(ATTRIBUTES) == len(set(ATTRIBUTES)) == 98


def test_binding_is_asked_for():
    a = scene(('circle', 'red', 'small', .2, .5), ('square', 'blue', 'small', .7, .55))
    b = scene(('circle', 'blue', 'small', .2, .5), ('square', 'red', 'small', .7, .55))
    assert attributes(a) != attributes(b)


def test_relations_are_read_from_both_ends():
    a = scene(('circle', 'red', 'small', .5, .2), ('square', 'blue', 'small', .55, .8))
    b = scene(('square', 'blue', 'small', .55, .8), ('circle', 'red', 'small', .5, .2))
    assert attributes(a) == attributes(b) and 'a circle above a square' in attributes(a)


def test_labels_of_a_set():
    scenes = data.shapes(20, seed=5)
    asked = extractors.shape_questions(scenes)
    for row, s in zip(asked.labels, scenes.extra['scene']):
        assert {ATTRIBUTES[i] for i in row.nonzero()[:, 0].tolist()} == attributes(s)


def test_question_scores_count_whole_scenes():
    asked = extractors.shape_questions(data.shapes(40, seed=6))
    class Oracle(ShapesClassifier):
        wrong, batch = None, 1000
        def outputs(self, x, wanted=()):
            z = 2. * asked.labels.float() - 1
            if self.wrong is not None: z[:10, self.wrong] *= -1
            return {'attributes': z}
    oracle = Oracle()
    assert set(extractors.question_scores(oracle, asked).values()) == {1.}
    oracle.wrong = 97
    scores = extractors.question_scores(oracle, asked)
    assert scores['night'] == scores['all'] == .75 and scores['colours'] == scores['relations'] == 1


# ---------------------------------------------------------------- emoji

def test_emoji_kinds():
    kinds = extractors.emoji_kinds(data.emoji('test', size=16))
    assert len(kinds.classes) == 27 == EmojiClassifier.classes
    for i in (0, 100, 301): assert kinds.classes[kinds.labels[i]] == f"{kinds.extra['category'][i]}, {kinds.extra['style'][i]}"


def test_kind_scores():
    kinds = extractors.emoji_kinds(data.emoji('test', size=32))
    class Oracle(EmojiClassifier):
        batch = 1000
        def outputs(self, x, wanted=()): return {'logits': 20. * F.one_hot(kinds.labels // 3 * 3, 27)}   # always the first style
    scores = extractors.kind_scores(Oracle(), kinds)
    assert scores['category'] == 1 and scores['style'] == scores['both'] == pytest.approx(float((kinds.labels % 3 == 0).double().mean()))


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize('kind, width', [(ShapesClassifier, 96), (EmojiClassifier, 64)])
def test_any_multiple_of_32_is_seen_as_its_average(kind, width):
    model = kind().eval()
    large = torch.randint(0, 2, (3, 3, 64, 64), generator=generator(0), dtype=torch.uint8) * 255
    small = F.avg_pool2d(to_float(large), 2)
    with torch.no_grad(): torch.testing.assert_close(metrics.features(model, large), model.features(small), rtol=1e-5, atol=1e-5)
    assert metrics.features(model, large).shape == (3, width) and '32×32' in metrics.preprocessing(model)
    for bad in ((3, 48, 48), (3, 32, 64)):
        with pytest.raises(CourseError, match='squares of 32, 64'): metrics.features(model, torch.zeros(1, *bad, dtype=torch.uint8))


def test_a_score_needs_one_distribution():
    with pytest.raises(CourseError, match='but not logits'): metrics.outputs(ShapesClassifier(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'logits')


@pytest.mark.parametrize('name', ['shapes_classifier', 'emoji_classifier'])
def test_recipes_and_shipped_weights(name):
    recipe = RECIPES[name]
    few = recipe.data('smoke')
    assert recipe.model()(to_float(few.images[:2])).shape == (2, recipe.model.classes)
    if not shipped(name): pytest.skip(f'no weights of {name} yet')
    card, found = load_card(name), recipe.evaluate(metrics.get_extractor(name, 'cpu'))
    assert card['bytes'] <= 1_000_000
    for k, v in found.items(): assert abs(v - card['metrics'][k]) < .01, k


# ---------------------------------------------------------------- CIFAR-10

def test_resnet_layout():
    net = CifarResNet()
    assert sum(p.numel() for p in net.parameters()) == 855_770
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules()) == 55
    assert net.eval().features(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_resnet_is_fetched_converted_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path))
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '1')
    with pytest.raises(CourseError, match='DIFFCOURSE_OFFLINE'): extractors.load_resnet()
    assert not list(tmp_path.rglob('*.safetensors'))
    net, calls = CifarResNet(), []
    theirs = copy.deepcopy(net)
    theirs.linear = theirs.head
    del theirs.head                                    # the package's module has its own name for the last layer
    torch.save(theirs, tmp_path / 'net.pth')           # a whole pickled module, as in the package
    monkeypatch.delenv('DIFFCOURSE_OFFLINE')
    monkeypatch.setattr(extractors, 'wheel_member', lambda *a: calls.append(a) or tmp_path / 'net.pth')
    first, second = extractors.load_resnet(), extractors.load_resnet()
    assert len(calls) == 1 and all(a.equal(b) for a, b in zip(first.state_dict().values(), net.state_dict().values()))
    assert second.state_dict().keys() == net.state_dict().keys() and not second.training


def test_resnet_knows_its_classes():
    if not extractors.resnet_file().exists() or data.idx_folder('cifar10') is None:
        pytest.skip('the weights of cifar_resnet56 or CIFAR-10 are not on this machine')
    test = data.cifar10('test').subset(range(200))
    right = metrics.outputs(extractors.load_resnet(), test, 'logits')['logits'].argmax(1) == test.labels
    assert right.double().mean() > .9


# --- LPIPS ----------------------------------------------------------------------------------------------------

def lively_lpips(kind):
    "Random weights; heads are positive, as fitted ones are"
    torch.manual_seed(1)
    net = extractors.LPIPS(kind).eval()
    for k in range(5): getattr(net, f'lin{k}')['model'][1].weight.data.abs_()
    return net


@pytest.mark.parametrize('kind', ['alex', 'vgg'])
def test_lpips_is_that_of_torchmetrics(kind):
    "The same weights in another implementation; its smallest length is 1e-8 under the root, ours 1e-10 beside it"
    theirs = pytest.importorskip('torchmetrics.functional.image.lpips')
    pytest.importorskip('torchvision')
    net, other = lively_lpips(kind), theirs._LPIPS(pretrained=False, net=kind, pnet_rand=True, use_dropout=True).eval()
    state = {k: v for k, v in net.state_dict().items() if not k.startswith('scaling_layer')}
    assert set(state) <= set(other.state_dict()), 'the published names'
    other.load_state_dict(state, strict=False)
    for k in range(5): getattr(other, f'lin{k}').model[-1].weight.data.copy_(state[f'lin{k}.model.1.weight'])
    x, y = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(net(x, y), other(x, y).flatten(), rtol=2e-3, atol=1e-6)
        assert not torch.allclose(net(x, y), other(x.flip(1), y).flatten(), rtol=2e-3)     # the check sees exchanged channels


def test_lpips_of_grey_and_small_pictures_and_bad_input():
    net = lively_lpips('alex')
    x, y = torch.rand(2, 3, 1, 28, 28) * 2 - 1
    with torch.no_grad():
        assert net(x, y).shape == (3,) and net(x, x).abs().max() == 0 and net(x, y).min() > 0
        torch.testing.assert_close(net(x, y), net(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    with pytest.raises(CourseError, match='one shape'): net(x, y[:, :, :20])
    with pytest.raises(CourseError, match='alex, vgg'): extractors.LPIPS('squeeze')


def test_lpips_weights_come_from_known_bytes_only(tmp_path, monkeypatch):
    import hashlib
    import pickle
    import tarfile
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path / 'home'))
    with pytest.raises(CourseError, match='keep_lpips'): extractors.load_lpips()

    class Bomb:
        def __reduce__(self): return __import__('os').mkdir, (str(tmp_path / 'exploded'),)

    def archive(content):
        (tmp_path / 'alexnet.ckpt').write_bytes(content)
        with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as t: t.add(tmp_path / 'alexnet.ckpt', 'x/weights/alexnet.ckpt')
        return tmp_path / 'a.tar.gz'

    with pytest.raises(CourseError, match='SHA-256'): extractors.keep_lpips(archive(b'other bytes'))
    with pytest.raises(CourseError, match='holds no vgg16'): extractors.keep_lpips(archive(b'x'), 'vgg')
    (tmp_path / 'broken').write_bytes(b'no archive')
    with pytest.raises(CourseError, match='cannot be read'): extractors.keep_lpips(tmp_path / 'broken')
    bomb = pickle.dumps(Bomb())
    monkeypatch.setitem(extractors.LPIPS_FILES, 'alex', ('alexnet.ckpt', hashlib.sha256(bomb).hexdigest()))
    with pytest.raises(CourseError, match='no place among weights'): extractors.keep_lpips(archive(bomb))
    assert not (tmp_path / 'exploded').exists() and not extractors.lpips_file().exists()


def test_lpips_weights_are_turned_and_named(tmp_path, monkeypatch):
    "Arrays as that package has them, channels last, give the network they came from"
    import hashlib
    import pickle
    import tarfile
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path / 'home'))
    net = lively_lpips('alex')
    convs = [m for m in net.net.modules() if isinstance(m, torch.nn.Conv2d)]
    turned = lambda w: w.detach().permute(2, 3, 1, 0).contiguous().numpy()
    found = {'AlexNet_0': {f'Conv_{i}': {'kernel': turned(c.weight), 'bias': c.bias.detach().numpy()} for i, c in enumerate(convs)}}
    for k in range(5): found[f'NetLinLayer_{k}'] = {'Conv_0': {'kernel': turned(getattr(net, f'lin{k}')['model'][1].weight)}}
    content = pickle.dumps(found, protocol=3).replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    (tmp_path / 'alexnet.ckpt').write_bytes(content)
    with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as t: t.add(tmp_path / 'alexnet.ckpt', 'x/weights/alexnet.ckpt')
    monkeypatch.setitem(extractors.LPIPS_FILES, 'alex', ('alexnet.ckpt', hashlib.sha256(content).hexdigest()))
    extractors.keep_lpips(tmp_path / 'a.tar.gz')
    again = extractors.load_lpips()
    assert all(v.equal(net.state_dict()[k]) for k, v in again.state_dict().items())


def test_stored_copies_belong_to_the_shipped_weights():
    "A network that was trained anew has to be measured anew: scripts/reconstructions.py"
    from diffcourse.weights import shipped
    rows = extractors.copies_measured(*(n for n in ('vqvae_fashion', 'vqvae_emoji', 'vqvae_shapes', 'vqvae2_grocery', 'vqvae2_emoji', 'dvae_emoji')
                                        if shipped(n))).rows
    for name, n, psnr, lpips, other in rows: assert n != 'not measured' and 0 < lpips < other, name
