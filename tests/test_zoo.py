"Recipes by name: training on data of one's own"
import pytest
import torch

from diffcourse import cli, zoo
from diffcourse.core import CourseError, to_float
from diffcourse.data import fashion_mnist
from diffcourse.weights import shipped


def codes(n=40, shape=(7, 7)): return dict(x=torch.randint(128, (n, *shape)), y=torch.arange(n) % 10)


def test_a_recipe_of_codes_trains_on_codes_of_ones_own(tmp_path):
    if not shipped('vqvae_fashion'): pytest.skip('needs vqvae_fashion to draw its picture')
    card = zoo.fit('vqvae_fashion_prior', tmp_path, 'smoke', codes(), steps=2, batch_size=4)
    assert card['steps'] == 2 and card['data']['items'] == 40 and (tmp_path / 'vqvae_fashion_prior/vqvae_fashion_prior.safetensors').exists()


@pytest.mark.parametrize('data, words', [
    (lambda: fashion_mnist('test').subset(slice(40)), 'a dict of x, y'), (lambda: {'x': codes()['x']}, 'a dict of x, y'),
    (lambda: codes(shape=(8, 8)), r'\(7, 7\).*\(8, 8\)')], ids=['pictures', 'no labels', 'shape'])
def test_what_a_recipe_of_codes_cannot_learn_is_named(data, words, tmp_path):
    with pytest.raises(CourseError, match=words): zoo.fit('vqvae_fashion_prior', tmp_path, 'smoke', data(), steps=2, batch_size=4)
    assert not list(tmp_path.rglob('*.safetensors'))


def test_what_a_recipe_of_pictures_cannot_learn_is_named(tmp_path):
    with pytest.raises(CourseError, match='pictures of shape'): zoo.fit('ae_fashion', tmp_path, 'smoke', codes(), steps=2, batch_size=4)
    card = zoo.fit('ae_fashion', tmp_path, 'smoke', fashion_mnist('test').subset(slice(40)), steps=2, batch_size=4)
    assert card['data']['items'] == 40


def test_the_command_trains_recipes_of_codes(tmp_path):
    "It used to ask every recipe for the size of its pictures"
    if not shipped('vqvae_fashion'): pytest.skip('needs vqvae_fashion')
    row = cli._train_one('vqvae_fashion_prior', tmp_path, 'smoke', None, 'fp16', dict(steps=2, batch_size=4))
    assert row[2] == 2
    with pytest.raises(CourseError, match='no pictures but from codes'): cli._train_one('vqvae_fashion_prior', tmp_path, 'smoke', tmp_path, 'fp16', {})


def test_reconstruct_names_what_it_cannot_do():
    with pytest.raises(CourseError, match='does not reconstruct'): zoo.reconstruct('vqvae_fashion_prior', fashion_mnist('test').images[:2])
    with pytest.raises(CourseError, match='shape'): zoo.reconstruct('ae_fashion', torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    x = fashion_mnist('test').images[:4]
    assert (zoo.reconstruct('ae_fashion', x, device='cpu') - to_float(x)).square().mean() < .2
