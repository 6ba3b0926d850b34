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
