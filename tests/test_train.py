"The trainer: what it computes, what it survives, what it refuses"
import errno, json, os, random, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffcourse.train as train
import diffcourse.weights as weights
from diffcourse.core import CourseError, Draws
from diffcourse.data import ImageSet
from diffcourse.train import EMA, RECIPES, Recipe, Settings, Trainer, fixed_loss, lr_factor, register, train_recipe
from diffcourse.weights import digest, read_tensors, save_weights

HERE = Path(__file__).parent
GOLDEN, HELPER = HERE / 'golden', HERE / 'helpers/train_job.py'
sys.path.insert(0, str(HERE / 'helpers'))
from train_job import damage, denoise, job, net, numbers  # noqa: E402


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv('DIFFCOURSE_DEVICE', 'cpu')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a, b):
    "Are two trainers equal to the last bit, their histories included?"
    return a.step == b.step and a.losses == b.losses and a.extras == b.extras and digest(a.state()) == digest(b.state())


# --- averages -------------------------------------------------------------------------------------------------

class OneWeight(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.weight = nn.Parameter(w.clone())


def lit_ema_error(cls):
    T, J = load_file(GOLDEN / 'lit_ema.safetensors'), json.loads((GOLDEN / 'lit_ema.json').read_text())
    model = OneWeight(T['in/w0'])
    ema = cls(model, J['config']['decay'], warmup=True)
    worst = 0.
    for n in range(1, 13):
        model.weight.data.copy_(T[f'in/w{n}'])
        ema.update(model)
        want = T[f'out/w_ema{n}']
        worst = max(worst, float(((ema.shadow['weight'] - want).abs() / (J['atol'] + J['rtol'] * want.abs())).max()))
    return worst


def gd_ema_error(cls, **how):
    T, J = load_file(GOLDEN / 'gd_train_step.safetensors'), json.loads((GOLDEN / 'gd_train_step.json').read_text())
    model = OneWeight(T['weights/out.2.weight'].float())
    ema = cls(model, J['config']['ema_rate'], **how)
    worst = 0.
    for n in (1, 2):
        model.weight.data.copy_(T[f'out/step{n}.after_out.2.weight'])
        ema.update(model)
        worst = max(worst, float((ema.shadow['weight'] - T[f'out/step{n}.ema_out.2.weight']).abs().max()))
    return worst


class LateEMA(EMA):
    "A mistake: the first update counts as number 0"
    def decay_at(self, n): return super().decay_at(n - 1)


class SwappedEMA(EMA):
    "A mistake: decay and its complement exchanged"
    def decay_at(self, n): return 1 - super().decay_at(n)


def test_ema_with_warmup_equals_latent_diffusions():
    assert lit_ema_error(EMA) <= 1
    assert lit_ema_error(LateEMA) > 1000 and lit_ema_error(SwappedEMA) > 1000


def test_ema_without_warmup_equals_guided_diffusions():
    assert gd_ema_error(EMA) < 1e-7
    assert gd_ema_error(EMA, warmup=True) > 1e-5 and gd_ema_error(SwappedEMA) > 1e-5


def test_ema_averages_parameters_and_copies_buffers():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, .5)
    model.weight.data.fill_(3.)
    model.running_mean.fill_(8.)
    model.num_batches_tracked.fill_(7)
    ema.update(model)
    assert ema.shadow['weight'].tolist() == [2., 2.] and ema.shadow['running_mean'].tolist() == [8., 8.]
    assert ema.shadow['num_batches_tracked'] == 7
    with pytest.raises(CourseError, match='1.5'): EMA(model, 1.5)


# --- settings -------------------------------------------------------------------------------------------------

def test_the_step_size_rises_then_falls():
    f = [lr_factor(i, 100, 10) for i in range(100)]
    assert f[0] == .1 and f[9] == 1 and f[10] == 1 and f[55] == pytest.approx(.5) and 0 < f[99] < .001
    assert [lr_factor(i, 100, 10, 'constant') for i in (0, 50, 99)] == [.1, 1, 1]


@pytest.mark.parametrize('wrong', [dict(steps=0), dict(steps=9, batch_size=0), dict(steps=9, lr=-1), dict(steps=9, clip=0),
                                   dict(steps=9, schedule='linear')])
def test_settings_name_what_is_wrong(wrong):
    with pytest.raises(CourseError, match=str(list(wrong.values())[-1])): Settings(**wrong)


def test_a_loss_per_item_is_refused():
    with pytest.raises(CourseError, match='take its mean'):
        job(loss=lambda m, b, d: m(b['x']).flatten(1).mean(1)).fit()


# --- training -------------------------------------------------------------------------------------------------

def test_training_lowers_the_fixed_loss_and_costs_are_on_the_card():
    t = job(steps=60)
    before = fixed_loss(t.model, denoise, numbers())
    t.fit()
    assert fixed_loss(t.model, denoise, numbers()) < .8 * before
    assert fixed_loss(t.model, denoise, numbers()) == fixed_loss(t.model, denoise, numbers()) and t.model.training
    card = t.card()
    assert card['steps'] == 60 and card['parameters'] == 153 and card['images_per_second'] > 0 and card['peak_memory'] > 0
    assert json.loads(json.dumps(card)) == card and len(t.extras['noise']) == 60


def test_one_update_is_adamw_with_clipping_and_warmup():
    t = job(model=net(dropout=0.), clip=.01, weight_decay=.1, steps=20, bf16=False)
    twin = net(dropout=0.)
    best = torch.optim.AdamW(twin.parameters(), 1e-2, weight_decay=.1)
    for step in range(3):
        t.update()
        best.zero_grad()
        denoise(twin, t.batches(step), Draws(0, step))[0].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), .01)
        best.param_groups[0]['lr'] = 1e-2 * min(1, (step + 1) / 4)
        best.step()
    for a, b in zip(t.model.parameters(), twin.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_average_is_what_ema_model_holds():
    t = job(ema=.5, ema_warmup=False, steps=1)
    start = [p.detach().clone() for p in t.model.parameters()]
    t.fit()
    for a, b, e in zip(start, t.model.parameters(), t.ema_model().parameters()): torch.testing.assert_close(e, (a + b) / 2)
    assert not t.ema_model().training
    plain = job(ema=None, steps=3).fit()
    assert digest(plain.ema_model().state_dict()) == digest(plain.model.state_dict())


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    job(steps=3).fit()
    assert before.equal(torch.get_rng_state())


def test_data_may_be_images_tensors_or_a_function():
    images = ImageSet(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), 'test pictures')
    t = job(data=images, steps=3).fit()
    assert t.card()['data']['name'] == 'test pictures' and t.card()['data']['items'] == 40
    job(data=lambda step: {'x': torch.full((16, 1, 8, 8), float(step))}, steps=3).fit()
    vectors = {'x': torch.randn(64, 5)}
    job(data=vectors, model=nn.Linear(5, 5), steps=3).fit()


def test_a_bar_only_where_it_is_wanted(capsys):
    job(steps=5, progress=True).fit()
    assert '100.00%' in capsys.readouterr().out
    job(steps=5).fit()
    assert capsys.readouterr().out == ''


# --- two processes --------------------------------------------------------------------------------------------

def curve_error(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def two_processes(what, out, **env):
    "Run a job of the helper in two processes; what each of them reports"
    env = os.environ | {'ACCELERATE_USE_CPU': '1', 'OMP_NUM_THREADS': '1'} | env
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', HELPER, what, out],
                         env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((out / f'{r}.json').read_text()) for r in (0, 1)]


def test_two_processes_train_as_one(tmp_path):
    ranks = two_processes('double', tmp_path)
    one = job(model=net(dropout=0.), steps=12, bf16=False).fit()
    a, b = (r['right'] for r in ranks)
    assert one.world == 1 and a['world'] == b['world'] == 2
    for i in range(12):
        assert not set(a['index'][i]) & set(b['index'][i])
        assert a['index'][i] + b['index'][i] == one.batches(i)['index'].tolist()
    assert a['weights'] == b['weights'] and a['average'] == b['average']
    assert a['losses'] == b['losses'] and curve_error(a['losses'], one.losses) < 1e-4
    wrong = ranks[0]['wrong']
    assert wrong['index'] == ranks[1]['wrong']['index'] and curve_error(wrong['losses'], one.losses) > 1e-3


def test_two_processes_with_weights_in_shards_train_as_one(tmp_path):
    "FSDP: each holds its slice of weights, optimiser and average; checkpoints are whole, and one process can go on from them"
    a, b = two_processes('shards', tmp_path, ACCELERATE_USE_FSDP='true')
    one = job(model=net(dropout=0.), steps=12, bf16=False).fit()
    assert a['world'] == b['world'] == 2 and a['sharded'] and not one.card()['sharded']
    assert a['held'] + b['held'] == a['in all'] == 153 and max(a['held'], b['held']) < 153 and a['averaged'] == a['held']
    assert a['state'] == b['state'] and a['ema'] == b['ema'] and a['losses'] == b['losses']
    assert curve_error(a['losses'], one.losses) < 1e-4 < 1e-3 < curve_error(a['wrong'], one.losses)
    alone = job(tmp_path, model=net(seed=3, dropout=0.), steps=12, bf16=False).resume()
    assert alone.step == 12 and digest(alone.state()) == a['state'] and digest(alone.ema_model().state_dict()) == a['ema']
    for k, v in one.state().items(): torch.testing.assert_close(alone.state()[k], v, rtol=1e-3, atol=1e-5)


def test_shards_want_contiguous_weights(monkeypatch):
    t = job(steps=2)
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    t.world = 2
    with pytest.raises(CourseError, match='leave channels_last out'): t._layout(True)
    assert t._layout(None) == torch.contiguous_format


@pytest.mark.parametrize('channels_last, layout', [(None, torch.contiguous_format), (False, torch.contiguous_format), (True, torch.channels_last)])
def test_layout_on_a_cpu(channels_last, layout):
    wide = lambda: nn.Sequential(nn.Conv2d(3, 4, 3))
    t = Trainer(wide(), lambda m, b, d: m(b['x']).square().mean(), {'x': torch.randn(8, 3, 6, 6)}, steps=3, batch_size=4,
                channels_last=channels_last, device='cpu', progress=False).fit()
    assert t.layout == layout and t.model[0].weight.is_contiguous(memory_format=layout)
    t.device = torch.device('cuda')
    assert t._layout(None) == torch.channels_last


def test_a_batch_must_divide_among_processes():
    t = job()
    with pytest.raises(CourseError, match='divi'): train.Batcher(t.data, 15, world=2)


# --- resuming -------------------------------------------------------------------------------------------------

def stopped_by(number, folder, after):
    "Run the job in another process, send it a signal in its `after`-th step, return its exit status and words"
    p = subprocess.Popen([sys.executable, HELPER, 'run', folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=os.environ | {'OMP_NUM_THREADS': '1'})
    for _ in range(after): assert p.stdout.readline() == 'step\n', p.stderr.read()
    p.send_signal(number)
    out, err = p.communicate(timeout=200)
    assert set(out.split()) <= {'step'}, 'a pipe is no terminal: no bar'
    return p.returncode, err


def test_resume_after_kill_is_exact(tmp_path):
    after = random.Random().randint(3, 24)
    status, _ = stopped_by(signal.SIGKILL, tmp_path, after)
    assert status == -signal.SIGKILL
    step = read_tensors(tmp_path / 'checkpoint.safetensors')[1]['step']
    assert after - 1 <= step < 30, f'killed in step {after}, checkpoint of step {step}'
    resumed, whole = job(tmp_path, model=net(seed=9)).resume().fit(), job().fit()
    assert same(resumed, whole), f'killed in step {after}'
    assert not list(tmp_path.glob('.*.part'))


class Forgetful(Trainer):
    "A mistake: the optimiser's memory is not restored"
    def resume(self, **how):
        super().resume(**how)
        self.optimizer.state.clear()
        return self


class LooseDropout(Trainer):
    "A mistake: dropout comes from wherever the global generator has got to"
    def update(self, asked=()):
        train.same_chance, kept = lambda *a: train.nullcontext(), train.same_chance
        try: return super().update(asked)
        finally: train.same_chance = kept


@pytest.mark.parametrize('cls, exact', [(Trainer, True), (Forgetful, False), (LooseDropout, False)])
def test_what_a_resume_must_restore(tmp_path, cls, exact):
    part = job(tmp_path, cls=cls)
    for _ in range(11): part.update()
    part.save()
    assert same(job(tmp_path, cls=cls).resume().fit(), job(cls=cls).fit()) == exact


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    status, err = stopped_by(signal.SIGINT, tmp_path, 5)
    assert status != 0 and 'stopped after step' in err and 'resume().fit()' in err
    assert same(job(tmp_path).resume().fit(), job().fit())


def test_ctrl_c_without_a_folder_keeps_the_trainer_whole():
    calls = []
    def loss(*a):
        calls.append(1)
        if len(calls) == 4: signal.raise_signal(signal.SIGINT)
        return denoise(*a)
    t = job(loss=loss)
    with pytest.raises(KeyboardInterrupt, match=r'after step 4 of 30; go on with fit\(\)'): t.fit()
    assert same(t.fit(), job().fit())


def test_resume_refuses_what_does_not_belong(tmp_path):
    job(tmp_path, steps=5).fit()
    with pytest.raises(CourseError, match='already holds a run'): job(tmp_path, steps=5).fit()
    with pytest.raises(CourseError, match=r'lr is 0.01 there and 0.02 here'): job(tmp_path, steps=5, lr=.02).resume()
    with pytest.raises(CourseError, match='the data set changed'): job(tmp_path, steps=5, data=numbers(2)).resume()
    other = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
    with pytest.raises(CourseError, match=r'0.weight is \(8, 1, 3, 3\), expected \(4, 1, 3, 3\)'):
        job(tmp_path, steps=5, model=other).resume()
    with pytest.raises(CourseError, match='there is no file'): job(tmp_path / 'empty').resume()
    with pytest.raises(CourseError, match='no folder'): job().resume()
    assert job(tmp_path / 'empty').resume(missing_ok=True).step == 0


def test_a_constant_schedule_may_be_extended(tmp_path):
    job(tmp_path, schedule='constant', steps=20).fit()
    t = job(tmp_path, schedule='constant', steps=25).resume().fit()
    assert t.step == 25 and len(t.losses) == 25


# --- trouble --------------------------------------------------------------------------------------------------

class Poison:
    "A loss that goes wrong on its `when`-th call"
    def __init__(self, when, how): self.calls, self.when, self.how = 0, when, how

    def __call__(self, model, batch, draws):
        self.calls += 1
        loss, extra = denoise(model, batch, draws)
        return (self.how(loss) if self.calls == self.when else loss), extra


class Careless(Trainer):
    "A mistake: nobody looks whether the numbers are finite"
    def _agree(self, numbers): return [v if abs(v) < 1e30 else 0. for v in super()._agree(numbers)]


@pytest.mark.parametrize('how', [lambda l: l * float('nan'), lambda l: l / 0., lambda l: l + (l - l).sqrt()],
                         ids=['nan', 'inf', 'gradient'])
def test_a_bad_update_is_never_applied(tmp_path, how):
    good = job(steps=8, schedule='constant', warmup=0).fit()
    t = job(tmp_path, Poison(9, how), save_every=3, schedule='constant', warmup=0)
    with pytest.raises(CourseError, match=r'at step 8: training stopped before this update was applied'): t.fit()
    assert t.step == 8 and digest(t.model.state_dict()) == digest(good.model.state_dict())
    assert digest(t.ema.shadow) == digest(good.ema.shadow)
    assert read_tensors(t.checkpoint)[1]['step'] == 6
    careless = job(None, Poison(9, how), cls=Careless, schedule='constant').fit()
    assert any(v.isnan().any() for v in careless.model.state_dict().values())


def test_weights_that_are_not_finite_do_not_overwrite_a_checkpoint(tmp_path):
    t = job(tmp_path, steps=5).fit()
    t.model[0].bias.data[0] = float('inf')
    before = t.checkpoint.read_bytes()
    with pytest.raises(CourseError, match='not finite'): t.save()
    assert t.checkpoint.read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    real = weights.save_file
    def full(tensors, path, metadata):
        if json.loads(metadata['diffcourse'])['step'] < 7: return real(tensors, path, metadata=metadata)
        Path(path).write_bytes(b'half a file')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(weights, 'save_file', full)
    with pytest.raises(CourseError, match='No space left on device'): job(tmp_path).fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'checkpoint.safetensors']
    monkeypatch.setattr(weights, 'save_file', real)
    t = job(tmp_path).resume()
    assert t.step == 6 and same(t.fit(), job().fit())


def test_a_device_that_is_really_full(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', disk], capture_output=True).returncode:
        pytest.skip('only root may mount a small disk')
    try:
        t = job(disk, steps=5).fit()
        (disk / 'ballast').write_bytes(bytes(8 * (64 * 1024 // 8) - sum(f.stat().st_blocks * 512 for f in disk.iterdir()) - 4096))
        with pytest.raises(CourseError, match='No space left on device'): t.save()
        assert read_tensors(t.checkpoint)[1]['step'] == 5 and not list(disk.glob('.*.part'))
    finally: subprocess.run(['umount', disk], check=True)


@pytest.mark.parametrize('how', ['truncated', 'one bit', 'header', 'a web page'])
def test_a_damaged_checkpoint_is_refused(tmp_path, how):
    t = job(tmp_path, steps=3).fit()
    damage(t.checkpoint, how)
    before = t.checkpoint.read_bytes()
    with pytest.raises(CourseError, match='truncated|damaged') as e: job(tmp_path, steps=3).resume()
    assert str(t.checkpoint) in str(e.value) and t.checkpoint.read_bytes() == before


def test_two_writers_of_one_folder(tmp_path):
    with train.folder_lock(tmp_path):
        with pytest.raises(CourseError, match='another process is writing'): job(tmp_path).fit()
    job(tmp_path, steps=2).fit()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CourseError, match='choose another folder'): job(tmp_path / 'file/run').fit()


def test_out_of_memory_suggests_a_smaller_batch():
    def loss(*a): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    with pytest.raises(CourseError, match='batch_size=16: try batch_size=8'): job(loss=loss).fit()
    def other(*a): raise RuntimeError('shapes do not match')
    with pytest.raises(RuntimeError, match='shapes'): job(loss=other).fit()


# --- recipes --------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny():
    yield register(Recipe('tiny', 'a denoiser for tests', lambda level: numbers(), lambda: net(), denoise,
                          {'smoke': dict(steps=12, batch_size=16, device='cpu')}))
    RECIPES.pop('tiny')


def test_a_recipe_trains_twice_the_same(tiny, tmp_path):
    a, b = train_recipe('tiny', 'smoke'), train_recipe(tiny, 'smoke')
    assert same(a, b) and a.card()['recipe'] == 'tiny' and a.card()['budget'] == 'smoke' and a.step == 12
    assert train_recipe('tiny', 'smoke', seed=1).losses != a.losses
    first = train_recipe('tiny', 'smoke', folder=tmp_path)
    assert same(train_recipe('tiny', 'smoke', folder=tmp_path), first)


def test_training_starts_from_weights(tiny, tmp_path):
    first = train_recipe('tiny', 'smoke')
    save_weights(tmp_path / 'tiny.safetensors', first.ema_model(), first.card(), 'fp32')
    still = train_recipe('tiny', 'smoke', start=tmp_path / 'tiny.safetensors', steps=1, lr=1e-30)
    assert all(torch.equal(a, b) for a, b in zip(still.model.parameters(), first.ema_model().parameters()))
    assert still.card()['start']['steps'] == 12 and still.card()['start']['name'] == 'tiny' and 'start' not in first.card()
    other = replace(tiny, name='other', model=lambda: nn.Linear(3, 3))
    with pytest.raises(CourseError, match='another architecture'):
        train_recipe(other, 'smoke', start=tmp_path / 'tiny.safetensors')
    with pytest.raises(CourseError, match='no embedded weights'): train_recipe('tiny', 'smoke', start='tyni')


def test_an_unknown_recipe_or_budget(tiny):
    with pytest.raises(CourseError, match='known: .*tiny'): train_recipe('tyni')
    with pytest.raises(CourseError, match='no settings for the budget gpu'): train_recipe('tiny', 'gpu')
