"A killed run goes on to the same end, and what stands in the way is said before anything is lost."
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import in_process, make, on_terminal, quiet, read_until
from fastai.callback.core import Callback

from learned_relu.bench.arms import Arm, arms
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.data import Source
from learned_relu.bench.recipe import Recipe
from learned_relu.bench.record import in_use, read_record, records_dir, write_record
from learned_relu.bench.resume import EpochCheckpoint, _read, random_states
from learned_relu.bench.run import train_run
from learned_relu.callback.clamp import ClampActParams

ARM = 'learned+averages+freeze'
SMALL = dict(data='noise', model='learned_relu.bench.small:small_net', size=16, bs=8)
ALL = SMALL | dict(epochs=4, opt='ranger', mixup=.4, sh=.2, smoothing=.1) # every kind of random draw there is


def ended(record):
    "What a record says that clocks, memory and interruptions have no part in"
    return {k: v for k, v in record.items() if k not in ('began', 'seconds', 'seconds_per_epoch', 'epoch_seconds', 'resumed', 'peak_memory')}


def killed_after(monkeypatch, epochs):
    "The next run ends as Ctrl-C ends it, once the checkpoint of `epochs` is written"
    write = EpochCheckpoint._write
    def and_stop(self, states):
        write(self, states)
        if len(self.values) == epochs: raise KeyboardInterrupt
    monkeypatch.setattr(EpochCheckpoint, '_write', and_stop)


@pytest.mark.tried('a run of a comparison interrupted')
@pytest.mark.parametrize('schedule,epochs', [('one_cycle', 3), ('flat_cos', 1)]) # before and after freezing, which comes at half
def test_an_interrupted_run_ends_bit_for_bit_as_if_nothing_had_been(images, tmp_path, monkeypatch, schedule, epochs):
    recipe, source, file = Recipe(schedule=schedule, **ALL), Source(images, 16, workers=0), tmp_path/'run.pt'
    whole = train_run(Arm(ARM), 0, recipe, source)
    with monkeypatch.context() as m:
        killed_after(m, epochs)
        with pytest.raises(KeyboardInterrupt): train_run(Arm(ARM), 0, recipe, source, checkpoint=file)
    again = train_run(Arm(ARM), 0, recipe, source, checkpoint=file)
    assert again['resumed'] == [epochs] and whole['resumed'] == [] and len(again['epoch_seconds']) == 4
    assert json.dumps(ended(again)) == json.dumps(ended(whole))
    assert len(set(whole['telemetry']['step'])) == 12 and all(np.isfinite(whole['train_loss']))


EVERY = [*(o for o in arms if o != 'profile'), 'general:leak=0.1', 'learned:sub=0.5', 'torch.nn.ELU',
         *(f'learned+{o}' for o in ('caps', 'averages', 'freeze', 'caps+averages', 'caps+freeze', 'averages+freeze', 'caps+averages+freeze'))]

QUICK = 'learned_scalar', 'threshold', 'learned+caps+averages+freeze'


@pytest.mark.tried('a run of a comparison interrupted')
@pytest.mark.parametrize('arm', [pytest.param(o, marks=() if o in QUICK else pytest.mark.slow) for o in EVERY])
def test_every_arm_goes_on_to_the_end_that_it_would_have_had(images, tmp_path, monkeypatch, arm):
    recipe, source, file = Recipe(**ALL | dict(epochs=2)), Source(images, 16, workers=0), tmp_path/'run.pt'
    whole = train_run(Arm(arm), 0, recipe, source)
    with monkeypatch.context() as m:
        killed_after(m, 1)
        with pytest.raises(KeyboardInterrupt): train_run(Arm(arm), 0, recipe, source, checkpoint=file)
    again = train_run(Arm(arm), 0, recipe, source, checkpoint=file)
    assert again['resumed'] == [1] and json.dumps(ended(again)) == json.dumps(ended(whole))


@pytest.mark.parametrize('change', [lambda o: o.pop('freeze_act_params'), lambda o: o['act_telemetry'].pop('start')],
                         ids=['all', 'some'])
def test_a_checkpoint_of_another_version_is_named_before_any_training(images, tmp_path, monkeypatch, change):
    recipe, source, file = Recipe(**ALL), Source(images, 16, workers=0), tmp_path/'run.pt'
    with monkeypatch.context() as m:
        killed_after(m, 1)
        with pytest.raises(KeyboardInterrupt): train_run(Arm(ARM), 0, recipe, source, checkpoint=file)
    state = torch.load(file, weights_only=True)
    change(state['callbacks'])
    torch.save(state, file)
    with pytest.raises(ValueError, match='run.pt was written by another version.*move it away'):
        train_run(Arm(ARM), 0, recipe, source, checkpoint=file)
    assert torch.load(file, weights_only=True)['values'] == state['values'], 'it stays as it was'


@pytest.mark.tried('a run of a comparison interrupted', 2)
def test_interrupted_twice(images, tmp_path, monkeypatch):
    recipe, source, file = Recipe(**ALL), Source(images, 16, workers=0), tmp_path/'run.pt'
    for n in 1, 2:
        with monkeypatch.context() as m:
            killed_after(m, n)
            with pytest.raises(KeyboardInterrupt): train_run(Arm('penalty'), 0, recipe, source, checkpoint=file)
    again = train_run(Arm('penalty'), 0, recipe, source, checkpoint=file)
    assert again['resumed'] == [1, 2] and ended(again) == ended(train_run(Arm('penalty'), 0, recipe, source))


@pytest.mark.tried('a process or a machine killed')
def test_killed_within_an_epoch_by_the_system(images, tmp_path):
    cmd = Path(sys.executable).with_name('learned_relu_compare'), '--data', images, \
        *f'--model {SMALL["model"]} --size 16 --bs 8 --epochs 3 --seeds 1 --arms {ARM} --out'.split()
    child, terminal = on_terminal([*cmd, tmp_path/'a'])
    assert read_until(terminal, lambda said: b'[1/3' in said.partition(b'Epoch 2/3')[2])
    child.send_signal(signal.SIGKILL)
    child.wait()
    os.close(terminal)
    assert list((tmp_path/'a'/'checkpoints').glob('*.pt')) and not list((tmp_path/'a'/'records').glob('*.json'))
    for o in 'ab': in_process(cmd[0], *cmd[1:], tmp_path/o, check=True)
    a, b = (read_record(next((tmp_path/o/'records').glob('*.json'))) for o in 'ab')
    assert a['resumed'] == [1] and ended(a) == ended(b) and not (tmp_path/'a'/'checkpoints').exists()


def test_what_was_put_back_is_counted_over_the_interruption():
    class Spoil(Callback):
        def before_batch(self):
            if self.train_iter == 0: self.learn.model[1].leak.data[0] = float('nan')
    def learner(*cbs):
        learn = make(ClampActParams(), Spoil(), *cbs)
        learn.loss_func = torch.nn.functional.mse_loss
        return learn
    learn = learner()
    with quiet(learn), pytest.warns(UserWarning, match='put back'): learn.fit(1)
    state = learn.clamp_act_params.state_dict()
    assert learn.clamp_act_params.restored == 1
    class Continue(Callback):
        order = EpochCheckpoint.order
        def before_train(self): self.learn.clamp_act_params.load_state_dict(dict(counts=state['counts'] + 4))
    again = learner(Continue())
    with quiet(again), pytest.warns(UserWarning, match='put back: 6 values'): again.fit(1)
    assert again.clamp_act_params.restored == 6 and learn.clamp_act_params.restored == 1


def checkpoint(tmp_path, images, monkeypatch, arm='relu'):
    file = tmp_path/'run.pt'
    with monkeypatch.context() as m:
        killed_after(m, 1)
        recipe = Recipe(**SMALL, epochs=2)
        with pytest.raises(KeyboardInterrupt): train_run(Arm(arm), 0, recipe, Source(images, 16, workers=0), checkpoint=file)
    return file


@pytest.mark.parametrize('change', [dict(arm='leaky'), dict(seed=1), dict(lr=.1)])
def test_a_checkpoint_of_another_run_is_refused(images, tmp_path, monkeypatch, change):
    file = checkpoint(tmp_path, images, monkeypatch)
    before = file.read_bytes()
    recipe = Recipe(**SMALL, epochs=2, lr=change.get('lr', Recipe.lr))
    with pytest.raises(ValueError, match='run.pt is the checkpoint of another run'):
        train_run(Arm(change.get('arm', 'relu')), change.get('seed', 0), recipe, Source(images, 16, workers=0), checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize('content', [b'', b'no checkpoint', None])
def test_a_broken_checkpoint_is_named(images, tmp_path, monkeypatch, content):
    file = checkpoint(tmp_path, images, monkeypatch)
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match='run.pt cannot be read as a checkpoint'):
        train_run(Arm('relu'), 0, Recipe(**SMALL, epochs=2), Source(images, 16, workers=0), checkpoint=file)


def bits(o):
    "Equal where all that is inside is, to the bit"
    if isinstance(o, dict): return {k: bits(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [*map(bits, o)]
    return o.numpy().tobytes() if isinstance(o, torch.Tensor) else repr(o)


@pytest.mark.tried('a file damaged, cut or foreign', 'n')
@pytest.mark.parametrize('n', [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_flipped_bit_never_gives_other_weights(images, tmp_path, n):
    file = tmp_path/'run.pt'
    train_run(Arm('relu'), 0, Recipe(**SMALL), Source(images, 16, workers=0), checkpoint=file)
    whole, rng, refused = file.read_bytes(), random.Random(0), 0
    mark = torch.load(file)['mark']
    meant = bits(_read(file, mark))
    for at in (rng.randrange(len(whole)) for _ in range(n)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at+1:])
        try: assert bits(_read(file, mark)) == meant
        except ValueError as e: refused += 'run.pt cannot be read as a checkpoint' in str(e)
    assert refused > n*.8


def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.tried('a disk that is full or refuses')
def test_a_full_disk_leaves_the_checkpoint_before(images, tmp_path, monkeypatch):
    file = checkpoint(tmp_path, images, monkeypatch)
    before = file.read_bytes()
    def half(state, tmp): Path(tmp).write_bytes(b'half'); raise RuntimeError('PytorchStreamWriter failed writing file') # as torch.save does
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(ValueError, match='run.pt cannot be written .* free some space'):
        train_run(Arm('relu'), 0, Recipe(**SMALL, epochs=2), Source(images, 16, workers=0), checkpoint=file)
    assert file.read_bytes() == before and [o.name for o in tmp_path.iterdir()] == ['run.pt']


@pytest.mark.tried('a disk that is full or refuses')
def test_a_full_disk_within_a_run_is_one_line_too(images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(SystemExit, match=r'^error: relu-seed0-\w+.pt cannot be written'):
        learned_relu_compare(data=str(images), arms='relu', seeds=1, size=16, bs=8, out=tmp_path)
    assert not list((tmp_path/'checkpoints').iterdir())


def test_another_number_of_workers_is_another_run(images, tmp_path, monkeypatch):
    file = checkpoint(tmp_path, images, monkeypatch)
    with pytest.raises(ValueError, match="is the checkpoint of another run, .*'workers': 0.*'workers': 2"):
        train_run(Arm('relu'), 0, Recipe(**SMALL, epochs=2), Source(images, 16, workers=2), checkpoint=file)


def test_the_scaler_of_mixed_precision_is_gone_after_the_fit():
    keep = EpochCheckpoint()
    learn = make(keep)
    learn.scaler = None # as MixedPrecision leaves it
    keep._rest = dict(callbacks={}, scaler=dict(scale=2.), smooth=(1, torch.tensor(0.)), random=[random_states(learn.dls)])
    with quiet(learn): learn.fit(1)
    assert keep._rest is None and learn.recorder.smooth_loss.count > 1


def test_what_a_killed_process_left_of_its_checkpoint_goes_with_the_next(images, tmp_path):
    (tmp_path/'run.pt.77.tmp').touch(); (tmp_path/'other.pt.77.tmp').touch()
    train_run(Arm('relu'), 0, Recipe(**SMALL), Source(images, 16, workers=0), checkpoint=tmp_path/'run.pt')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['other.pt.77.tmp', 'run.pt']


def test_what_a_killed_process_left_of_its_record_goes_with_the_next(tmp_path):
    path = records_dir(tmp_path)
    (path/'relu-seed0-a.json.77.tmp').write_text('{"for'); (path/'relu-seed1-a.json.77.tmp').touch()
    kept = write_record(dict(arm='relu', seed=0, digest='a'), path)
    assert sorted(o.name for o in path.iterdir()) == [kept.name, 'relu-seed1-a.json.77.tmp'] and json.loads(kept.read_text())['seed'] == 0


@pytest.mark.tried('a disk that is full or refuses')
def test_a_disk_that_is_full_keeps_finished_records(tmp_path, monkeypatch):
    path = records_dir(tmp_path)
    kept = write_record(dict(arm='relu', seed=0, digest='a'), path)
    before = kept.read_bytes()
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ValueError, match=re.escape('relu-seed1-a.json cannot be written')):
        write_record(dict(arm='relu', seed=1, digest='a'), path)
    assert [o.name for o in path.iterdir()] == [kept.name] and kept.read_bytes() == before


@pytest.mark.tried('a disk that is full or refuses')
def test_a_full_disk_is_one_line_in_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('learned_relu.bench.record.json.dump', full)
    with pytest.raises(SystemExit, match='error: relu-seed0-.*json cannot be written'):
        learned_relu_compare(arms='relu', seeds=1, size=8, epochs=1, bs=2000, out=tmp_path/'o')
    assert len(list((tmp_path/'o'/'checkpoints').glob('*.pt'))) == 1 # the trained epochs are not lost
    monkeypatch.undo()
    learned_relu_compare(arms='relu', seeds=1, size=8, epochs=1, bs=2000, out=tmp_path/'o')
    assert read_record(next((tmp_path/'o'/'records').glob('*.json')))['resumed'] == [1]


def test_a_directory_in_use_is_named_with_its_process(tmp_path):
    hold = 'import sys; from learned_relu.bench.record import in_use\nwith in_use(sys.argv[1]): print("in", flush=True); sys.stdin.read()'
    child = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'in\n'
    with pytest.raises(SystemExit, match=f'error: .* is in use by process {child.pid} on '):
        learned_relu_compare(arms='relu', seeds=1, size=8, epochs=1, bs=2000, out=tmp_path)
    child.kill(); child.communicate() # a lock does not outlive its process
    with in_use(tmp_path): assert (tmp_path/'.lock.owner').read_text().startswith(f'process {os.getpid()} on')
    assert not list((tmp_path/'records').glob('*.json'))
