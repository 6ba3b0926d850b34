"What a user gets: the wheel and the sdist in a place of their own, and the command line with its manners"
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def dist(tmp_path_factory):
    "An sdist, and a wheel built from that sdist"
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', out, ROOT], check=True, capture_output=True)
    return out


@pytest.fixture(scope='session')
def site(dist, tmp_path_factory):
    "The wheel unpacked in an empty folder"
    out = tmp_path_factory.mktemp('site')
    zipfile.ZipFile(next(dist.glob('*.whl'))).extractall(out)
    return out


def run(args, site, cwd, check=True, **env):
    "Run python away from the checkout, seeing the package only in `site`"
    env = {**os.environ, 'PYTHONPATH': str(site), 'DIFFCOURSE_HOME': str(cwd / 'home'), 'DIFFCOURSE_OFFLINE': '1', 'DIFFCOURSE_BUDGET': 'smoke', **env}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    if check: assert done.returncode == 0, done.stdout + done.stderr
    return done


def cli(*args, site, cwd, check=True, **env): return run(['-m', 'diffcourse.cli', *args], site, cwd, check, **env)


def test_wheel_holds_data_weights_and_notebooks(site):
    assets = site / 'diffcourse' / '_assets'
    listed = json.loads((assets / 'MANIFEST.json').read_text())
    assert listed and all((assets / f).exists() for f in listed)
    assert len(list((assets / 'nbs').glob('*.ipynb'))) == len(list((ROOT / 'nbs').glob('*.ipynb')))


def test_sdist_can_build(dist):
    names = {n.split('/', 1)[1] for n in tarfile.open(next(dist.glob('*.tar.gz'))).getnames() if '/' in n}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'data/MANIFEST.json'} <= names


def test_the_wheel_is_what_runs_and_finds_its_assets(site, tmp_path):
    code = 'import diffcourse.core as c; print(c.__file__); print(c.asset("claims/rules.json")); print(c.asset_root())'
    out = run(['-c', code], site, tmp_path).stdout.splitlines()
    assert all(str(site) in line for line in out), out


def test_an_editable_install_finds_its_assets(tmp_path):
    out = run(['-c', 'import diffcourse.core as c; print(c.asset_root())'], '', tmp_path).stdout.strip()
    assert Path(out) == ROOT / 'data'


def test_train_sample_and_weights_from_the_wheel(site, tmp_path):
    out = cli('train', 'ddpm_fashion_small', '--budget', 'smoke', '--steps', '20', site=site, cwd=tmp_path)
    folder = tmp_path / 'runs' / 'ddpm_fashion_small'
    assert (folder / 'ddpm_fashion_small.safetensors').exists() and 'ddpm_fashion_small' in out.stdout
    card = json.loads((folder / 'ddpm_fashion_small.json').read_text())
    assert card['steps'] == 20 and card['budget'] == 'smoke'
    cli('sample', 'ddpm_fashion_small', '-n', '4', '--weights', folder / 'ddpm_fashion_small.safetensors', '--out', 'x.png', site=site, cwd=tmp_path)
    assert (tmp_path / 'x.png').read_bytes()[:4] == b'\x89PNG'
    verified = cli('weights', 'verify', site=site, cwd=tmp_path).stdout
    assert 'ddpm_fashion' in verified and 'damaged' not in verified


def test_reconstruct_and_notebooks_from_the_wheel(site, tmp_path):
    cli('reconstruct', 'ae_fashion', 'fashion_mnist', '-n', '4', site=site, cwd=tmp_path)
    assert (tmp_path / 'reconstructions.png').exists()
    cli('notebooks', 'course', site=site, cwd=tmp_path)
    assert (tmp_path / 'course' / '08_ddpm.ipynb').exists()
    again = cli('notebooks', 'course', site=site, cwd=tmp_path, check=False)
    assert again.returncode == 2 and '--force' in again.stderr and len(again.stderr.strip().splitlines()) == 1


def test_data_and_doctor_from_the_wheel(site, tmp_path):
    assert 'fashion_mnist' in cli('data', 'verify', site=site, cwd=tmp_path).stdout
    assert 'torch ' in cli('doctor', site=site, cwd=tmp_path, check=False).stdout


WRONG = [(['sample', 'ddpm_cats'], 'ddpm_cats'), (['train', 'ddpm_cats'], 'ddpm_cats'), (['sample', 'ddpm_fashion', '-n', '0'], '0'),
         (['sample', 'fashion_judge'], 'does not generate'), (['train', 'ddpm_fashion_small', '--steps', '0'], 'steps'),
         (['train', 'ddpm_fashion_small', '--budget', 'huge'], 'huge'), (['data', 'get', 'imagenet'], 'imagenet'),
         (['sample', 'ddpm_fashion', '--weights', 'nowhere.safetensors'], 'nowhere.safetensors'), (['sample', 'ddpm_fashion', '--device', 'abacus'], 'abacus'),
         (['reconstruct', 'ae_fashion', 'no-such-set'], 'no-such-set'), (['train', 'ddpm_fashion_small', '--data', 'no-such-folder'], 'no-such-folder'),
         (['train', 'ddpm_fashion_small', '--dtype', 'int7'], 'int7'), (['demo', '--seconds', '0'], 'seconds'), (['data', 'verify', 'dogs'], 'dogs'),
         (['reconstruct', 'ae_fashion', 'emoji'], '(3, 64, 64)'), (['reconstruct', 'ddpm_fashion', 'fashion_mnist'], 'does not reconstruct'),
         (['sample', 'ddpm_fashion', '--weights', 'bomb.pt'], 'mkdir'), (['sample', 'vae_fashion', '--weights', 'other.pt'], 'another architecture'),
         (['reconstruct', 'ae_fashion', 'empty'], 'no pictures'), (['reconstruct', 'ae_fashion', 'corrupt'], 'a.png'),
         (['sample'], 'recipe'), (['frobnicate'], 'frobnicate')]


class Bomb:
    "Makes a folder when it is unpickled"
    def __reduce__(self): return os.mkdir, ('exploded',)


@pytest.fixture
def traps(tmp_path):
    "Bad input of several kinds"
    import torch
    torch.save({'weight': Bomb()}, tmp_path / 'bomb.pt')
    torch.save({'weight': torch.zeros(3)}, tmp_path / 'other.pt')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'corrupt').mkdir()
    (tmp_path / 'corrupt/a.png').write_text('no picture')


@pytest.mark.parametrize('args, names', WRONG, ids=lambda v: ' '.join(v) if isinstance(v, list) else None)
def test_a_users_mistake_is_one_clear_line(args, names, site, traps, tmp_path):
    done = cli(*args, site=site, cwd=tmp_path, check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr and names in done.stderr, done.stderr
    assert not (tmp_path / 'exploded').exists() and not list(tmp_path.glob('*.png'))


def test_two_processes_write_one_result(site, tmp_path):
    "Under torchrun the ranks share the work; one of them writes and speaks"
    done = run(['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'diffcourse.cli', 'train', 'ddpm_fashion_small',
                '--budget', 'smoke', '--steps', '3', '--batch-size', '4'], site, tmp_path, ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1')
    assert done.stdout.count('written to') == 1, done.stdout
    card = json.loads((tmp_path / 'runs/ddpm_fashion_small/ddpm_fashion_small.json').read_text())
    assert card['processes'] == 2 and card['steps'] == 3


def test_doctor_says_what_needs_attention(site, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    done = cli('doctor', site=site, cwd=tmp_path, check=False, DIFFCOURSE_HOME=str(tmp_path / 'file'))
    assert done.returncode == 1 and '✗' in done.stdout and 'set DIFFCOURSE_HOME' in done.stdout
    assert cli('doctor', site=site, cwd=tmp_path, check=False).returncode == 0


def test_an_unwritable_place_is_named(site, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    done = cli('sample', 'vae_fashion', '-n', '1', '--out', 'file/x.png', site=site, cwd=tmp_path, check=False)
    assert done.returncode in (1, 2) and 'Traceback' not in done.stderr and 'file' in done.stderr


@pytest.mark.parametrize('args', [['notebooks', 'file'], ['demo', '--out', 'file'], ['sample', 'vae_fashion', '-n', '1', '--out', '.']])
def test_a_file_in_the_way_is_named(args, site, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    done = cli(*args, site=site, cwd=tmp_path, check=False)
    assert done.returncode in (1, 2) and 'Traceback' not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_demo_from_the_wheel(site, tmp_path):
    done = cli('demo', '--seconds', '2', '--no-notebook', site=site, cwd=tmp_path)
    assert all((tmp_path / 'demo' / f).stat().st_size > 2000 for f in ('ladder.png', 'trained_here.png', 'ddpm_fashion_small.safetensors'))
    for word in ('chapter', 'seconds', 'loss', 'DDPM, trained here', 'ddpm_fashion, shipped', 'embedded', 'Next:'): assert word in done.stdout, done.stdout


def test_damaged_weights_are_refused(site, tmp_path):
    import shutil
    broken = tmp_path / 'site'
    shutil.copytree(site, broken)
    f = broken / 'diffcourse' / '_assets' / 'weights' / 'ae_fashion.safetensors'
    f.write_bytes(f.read_bytes()[:-1] + b'\0')
    done = cli('weights', 'verify', site=broken, cwd=tmp_path, check=False)
    assert done.returncode == 2 and 'ae_fashion' in done.stderr and 'SHA-256' in done.stderr


def test_every_command_has_help_worth_reading(site, tmp_path):
    top = cli('--help', site=site, cwd=tmp_path).stdout
    for command in ('train', 'sample', 'reconstruct', 'data', 'weights', 'notebooks', 'demo', 'doctor'):
        assert command in top
        assert len(cli(command, '--help', site=site, cwd=tmp_path).stdout.splitlines()) >= 5
