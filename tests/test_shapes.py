"The world of shapes: its pictures, its sentences, and the parser that reads both"
import io
import time

import pytest
import torch
import torch.nn.functional as F

from diffcourse.core import CourseError, generator, to_float, to_uint8
from diffcourse.shapes import (COLOURS, RELATIONS, SHAPES, SIZES, Request, Scene, Thing, alignment, caption, components,
                               coverage, jitter, masks, matches, parse, parse_caption, parse_many, relation, render,
                               render_many, same_scene, sample_scene, scenes)


@pytest.fixture(scope='module')
def world():
    return scenes(3000, seed=11)


def each(x, change):
    "Apply a change of PIL images to a batch"
    import numpy as np
    from PIL import Image
    images = [change(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in x]
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


def jpeg(image):
    from PIL import Image
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=75)
    return Image.open(file)


def blur(image):
    from PIL import ImageFilter
    return image.filter(ImageFilter.GaussianBlur(1))


def box(image):
    from PIL import ImageFilter
    return image.filter(ImageFilter.BoxBlur(1))


def noisy(x, σ=.1):
    "Gaussian noise of standard deviation σ where black is 0 and white is 1: twice as hard as on [-1, 1]"
    return (x / 255 + σ * torch.randn(x.shape, generator=generator(1))).clamp(0, 1).mul(255).round().to(torch.uint8)


def rate(truth, x):
    return sum(map(same_scene, truth, parse_many(x))) / len(truth)


def test_clean_pictures_are_read_exactly(world):
    x, _, truth = world
    assert rate(truth, x) >= .999
    assert rate(truth[:500], to_float(x[:500])) >= .998
    assert rate(truth[:500], render_many(truth[:500], 64)) >= .998


@pytest.mark.parametrize('change', [lambda x: each(x, jpeg), noisy, lambda x: each(x, blur), lambda x: each(x, box)],
                         ids=['JPEG 75', 'noise 0.1', 'Gaussian blur of 1 pixel', 'box blur of 1 pixel'])
def test_corrupted_pictures_are_read(world, change):
    x, _, truth = world
    assert rate(truth[:1500], change(x[:1500])) >= .98


def noise_pictures():
    g = generator(2)
    normal = torch.randn(500, 3, 32, 32, generator=g)
    coarse = F.interpolate(torch.randn(500, 3, 6, 6, generator=g), size=(32, 32), mode='bicubic')
    return dict(uniform=torch.randint(256, (500, 3, 32, 32), generator=g, dtype=torch.uint8), normal=to_uint8(normal),
                bright=to_uint8(.9 + .2 * normal), dark=to_uint8(-.9 + .2 * normal), clouds=to_uint8(coarse),
                bright_clouds=to_uint8(.9 + coarse), dark_clouds=to_uint8(-.9 + coarse),
                grey=torch.full((3, 3, 32, 32), 128, dtype=torch.uint8), white=torch.full((3, 3, 32, 32), 255, dtype=torch.uint8))


@pytest.mark.parametrize('kind', list(noise_pictures()))
def test_noise_is_not_a_scene(kind):
    found = parse_many(noise_pictures()[kind])
    assert sum(s is not None for s in found) <= .01 * len(found)


def test_fashion_is_not_a_scene():
    from diffcourse.data import fashion_mnist
    x = fashion_mnist('test', full=False).images.expand(-1, 3, -1, -1)[:1500]
    big = F.interpolate(x.float(), (32, 32), mode='bilinear').round().to(torch.uint8)
    for y in (x, big, F.pad(x, [2] * 4), 255 - big):
        assert sum(s is not None for s in parse_many(y)) <= .01 * len(y)


def test_a_scene_of_foreign_things_is_not_a_scene():
    grey = Scene((Thing('circle', 'red', 'large', .5, .5, rgb=(128, 128, 128)),))
    assert parse(render(grey)) is None
    four = torch.cat([torch.cat([render(Scene((Thing('circle', c, 'small', .5, .5),)))[:, 8:24, 8:24] for c in row], 2)
                      for row in (('red', 'blue'), ('green', 'cyan'))], 1)
    assert four.shape == (3, 32, 32) and parse(four) is None


def test_scenes_are_a_function_of_their_arguments(world):
    x, captions, truth = world
    y, again, _ = scenes(300, seed=11, start=200)
    assert y.equal(x[200:500]) and again == captions[200:500]
    assert not scenes(100, seed=12)[0].equal(x[:100])
    assert render_many(truth[:50]).equal(x[:50])
    assert len(scenes(0)[1]) == 0 and {len(s.things) for s in scenes(50, things=(2,))[2]} == {2}


def test_things_on_a_lattice_stand_there_and_are_read():
    for k in (1, 2, 3):
        pictures, captions, drawn = scenes(300, seed=3, things=k, grid=8)
        places = torch.tensor([(t.x, t.y) for s in drawn for t in s.things])
        assert torch.equal(places * 8, (places * 8).round()) and len(places.unique(dim=0)) > 20
        assert alignment(captions, pictures)['all'] == 1
        assert torch.equal(pictures, render_many(drawn))     # and nothing was jittered


def test_scenes_are_balanced_and_fair(world):
    _, _, truth = world
    things = [t for s in truth for t in s.things]
    for name, known in (('shape', SHAPES), ('colour', COLOURS)):
        share = [sum(getattr(t, name) == k for t in things) / len(things) for k in known]
        assert max(share) / min(share) < 1.15
    single = [s.things[0].size for s in truth if len(s.things) == 1]
    assert abs(single.count('small') / len(single) - .5) < .06
    related = [relation(s.things[0], t) for s in truth for t in s.things[1:]]
    assert all(.2 < related.count(r) / len(related) < .3 for r in RELATIONS)
    pairs = {(a.shape, b.shape) for s in truth for a in s.things for b in s.things if a != b and a.size == b.size == 'large'}
    assert len(pairs) == len(SHAPES)**2
    assert all(m.sum(0).max() <= 1 for m in (masks(s) for s in truth[:200]))


def test_every_caption_is_read_back(world):
    _, captions, truth = world
    for text, scene in zip(captions, truth):
        first, *rest = scene.things
        said = tuple(Thing(t.shape, t.colour, t.size) for t in scene.things)
        assert parse_caption(text) == Request(said, tuple(relation(first, t) for t in rest), scene.background)
    assert caption(Scene((Thing('circle', 'red', 'small', .2, .5), Thing('square', 'blue', 'large', .7, .5)))) == \
        'a small red circle left of a large blue square'


@pytest.mark.parametrize('text', ['', 'a', 'red circle', 'a circle red', 'a photo of a dog', 'a red circle over a blue square',
                                  'a red circle and', 'a red circle, a circle, a square and a cross', '🔴', 'un cercle rouge'])
def test_other_sentences_are_not_captions(text):
    assert parse_caption(text) is None
    with pytest.raises(CourseError, match='no caption'):
        matches(text, None)


def test_what_is_not_said_is_not_asked():
    scene = Scene((Thing('circle', 'red', 'small', .2, .5), Thing('square', 'blue', 'large', .7, .45)))
    found = parse(render(scene))
    for text in ('a circle and a square', 'a blue square and a red circle.', 'A large square right of a circle',
                 'a square, a small circle', 'a red circle, and a square'):
        assert matches(text, found)['all'], text
    assert matches('a circle and a square', found)['relation'] is None
    assert matches('a circle', found)['count'] is False
    assert not matches('a circle and a square at night', found)['all']


def test_each_hit_can_miss_alone():
    a, b = Thing('circle', 'red', 'small', .2, .5), Thing('square', 'blue', 'large', .7, .45)
    from dataclasses import replace
    text = caption(Scene((a, b)))
    wrong = dict(shapes=(replace(a, shape='cross'), b), colours=(replace(a, colour='green'), b),
                 sizes=(replace(a, size='large'), b), binding=(replace(a, colour='blue'), replace(b, colour='red')),
                 relation=(replace(a, x=.7, y=.45), replace(b, x=.25, y=.5)), count=(a,))
    attributes = ('shapes', 'colours', 'sizes', 'relation', 'background', 'scene')
    for name, things in wrong.items():
        hits = matches(text, parse(render(Scene(things))))
        assert not hits[name] and not hits['all'], name
        if name != 'count': assert all(hits[k] for k in attributes if k != name), name
        if name != 'relation': assert not hits['binding']
    assert not matches(text, parse(render(Scene((a, b), 'dark'))))['background']
    assert not any(matches(text, None).values())


def test_alignment_counts(world):
    x, captions, _ = world
    right, shuffled = alignment(captions[:300], x[:300]), alignment(captions[1:301], x[:300])
    assert right['n'] == 300 and right['all'] >= .99 and right['binding'] >= .99
    assert shuffled['scene'] >= .99 and shuffled['all'] < .02 and .2 < shuffled['count'] < .5
    with pytest.raises(CourseError): alignment(captions[:3], x[:2])


def test_masks_cover_what_was_drawn():
    for seed in range(20):
        scene = jitter(sample_scene(generator(seed)), generator(seed + 100))
        m, picture = masks(scene, 48), render(scene, 48).float()
        assert m.shape == (len(scene.things), 48, 48) and 0 <= m.min() and m.max() <= 1
        empty = m.sum(0) == 0
        assert (picture - torch.tensor(scene.rgb)[:, None, None]).abs().amax(0)[empty].max() == 0
        for t, k in zip(scene.things, m):
            assert (picture[:, k == 1] - torch.tensor(t.rgb)[:, None]).abs().max() == 0


def test_coverage_agrees_with_a_finer_grid():
    at = (torch.tensor([.47]), torch.tensor([.52]), torch.tensor([.15]))
    for shape in SHAPES:
        coarse, fine = coverage(shape, *at), coverage(shape, *at, fine=32)
        assert (coarse - fine).abs().max() < .2 and abs(fine.sum() / 32**2 - torch.pi * .15**2) < 1e-3


def test_components_agree_with_scipy():
    from scipy.ndimage import label
    mask = torch.rand(40, 24, 24, generator=generator(0)) > .55
    for ours, m in zip(components(mask, steps=400), mask):
        theirs, count = label(m.numpy())
        pairs = set(zip(ours.flatten().tolist(), theirs.flatten().tolist()))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) and count >= len(pairs) - 1


@pytest.mark.parametrize('bad', [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 40), torch.zeros(1, 3, 8, 8),
                                 torch.zeros(1, 3, 32, 32, dtype=torch.long), torch.full((1, 3, 32, 32), torch.nan),
                                 torch.full((1, 3, 32, 32), 200.), [[0]], None])
def test_wrong_pictures_are_refused(bad):
    with pytest.raises(CourseError):
        parse_many(bad)


def test_wrong_arguments_are_refused():
    with pytest.raises(CourseError, match='hexagon'): Thing('hexagon')
    with pytest.raises(CourseError): Scene(())
    with pytest.raises(CourseError): Scene((Thing('circle', 'red', 'small', .5, .5),), 'green')
    with pytest.raises(CourseError): render(Scene((Thing('circle', 'red', 'small'),)))
    with pytest.raises(CourseError): scenes(2, things=(4,))
    with pytest.raises(CourseError): scenes(-1)
    with pytest.raises(CourseError): parse(torch.zeros(1, 3, 32, 32))
    assert parse_many(torch.zeros(0, 3, 32, 32)) == []


def test_speed(world):
    x, _, truth = world
    parse_many(x[:10])
    start = time.process_time()
    parse_many(x[:600])
    assert time.process_time() - start < 600 / 100, 'parsing takes more than 10 ms of processor time a picture'
    start = time.process_time()
    scenes(2000, seed=77)
    assert time.process_time() - start < 2000 / 250, 'drawing takes more than 4 ms of processor time a scene'


def test_sizes_are_named_after_their_radius():
    for size in SIZES:
        for shape in SHAPES:
            assert parse(render(Scene((Thing(shape, 'green', size, .5, .5),)))).things[0].size == size
