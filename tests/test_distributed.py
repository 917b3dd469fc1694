"Two processes over gloo: the same averages and the same frozen values in both, one record, no deadlock."
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDL

from learned_relu.bench.data import Source
from learned_relu.bench.recipe import Recipe
from learned_relu.bench.record import read_record

LAUNCH = [str(Path(sys.executable).with_name('torchrun')), '--nproc_per_node', '2', '--standalone']


def launch(*args):
    done = subprocess.run([*LAUNCH, *map(str, args)], capture_output=True, text=True, timeout=240, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_both_processes_hold_the_same(images, tmp_path):
    launch(Path(__file__).with_name('two_processes.py'), images, tmp_path)
    a, b = (json.loads((tmp_path/f'{i}.json').read_text()) for i in (0, 1))
    assert (a['rank'], b['rank'], a['processes'], b['processes'], a['first'], b['first']) == (0, 1, 2, 2, True, False)
    assert len(a['seen']) == len(b['seen']) == 6 and a['seen'] != b['seen'] # 24 images in batches of 4, shared out: 3 a process and epoch
    for k in 'params', 'averages', 'half', 'averaged': assert a[k] == b[k]
    assert a['params'] == a['half'] and len(set(a['params'][0])) > 1 and set(a['averaged']) == {6}
    assert a['telemetry'] == b['telemetry'] == 6*57 and a['loaders'] == ['TfmdDL', 'TfmdDL']


class Shared(DistributedDL):
    def _broadcast(self, t, rank): return list(t)


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_steps_are_counted_as_images_are_shared_out(processes, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', str(processes))
    for n, bs in product(range(8, 40), (2, 7)):
        if bs > n//processes: continue  # refused
        dl = Shared(TfmdDL(range(n), bs=bs, shuffle=True, drop_last=True), rank=0, world_size=processes, device=torch.device('cpu'))
        assert Source.steps(SimpleNamespace(n_train=n), Recipe(bs=bs, epochs=2)) == 2*len(list(dl)), (n, bs)


def test_two_processes_train_as_one_does_with_their_batches_together(tmp_path):
    script = Path(__file__).with_name('one_or_two.py')
    launch(script, tmp_path)
    alone = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-3000:]
    one, a, b = (json.loads((tmp_path/o).read_text()) for o in ('0-0.json', '2-0.json', '2-1.json'))
    assert a == b and (one['processes'], a['processes'], len(one['steps'])) == (0, 2, 12)
    assert one['steps'][8] != one['steps'][7] and one['steps'][9:] == [one['steps'][9]]*3, 'they learn, and are frozen in the end'
    for k in 'steps', 'averages', 'weights':
        for p, q in zip(flat(one[k]), flat(a[k]), strict=True): assert q == pytest.approx(p, rel=1e-4, abs=1e-6), k


def flat(o): return [v for i in o for v in flat(i)] if isinstance(o, list) else [o]


TRAIN = '--size', '16', '--bs', '4', '--epochs', '2', '--opt', 'ranger', '--arm', 'learned+averages'


def train(images, out): return '-m', 'learned_relu.bench.train', '--data', images, *TRAIN, '--out', out


def only_record(out):
    found = list((out/'records').glob('*.json'))
    assert len(found) == 1 and not (out/'checkpoints').exists()
    return read_record(found[0])


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    "A run that nothing interrupts, and what it said"
    out = tmp_path_factory.mktemp('whole')
    return out, launch(*train(images, out)).stdout


def test_a_run_by_two_processes_leaves_one_record(whole):
    out, said = whole
    record = only_record(out)
    assert record['hardware']['processes'] == 2 and 'telemetry' in record and record['resumed'] == []
    assert said.count('run 1/1') == 1 and said.count('table.csv') == 1


@pytest.mark.skipif(not Path('/proc').exists(), reason='who started whom is read from /proc')
def test_a_run_by_two_processes_goes_on_after_both_were_killed(images, whole, tmp_path):
    child = subprocess.Popen([*LAUNCH, *map(str, train(images, tmp_path))], env=os.environ | dict(OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob('checkpoints/*.pt')):
        assert child.poll() is None
        time.sleep(.02)
    for o in [*workers(child.pid), child.pid]: os.kill(o, signal.SIGKILL) # the launcher starts each in a session of its own
    child.wait()
    assert not list(tmp_path.glob('records/*.json'))
    launch(*train(images, tmp_path))
    a, b = only_record(whole[0]), only_record(tmp_path)
    assert b['resumed'] == [1] and a['end'] == b['end'] and a['accuracy'] == b['accuracy'] and a['activation'] == b['activation']


def workers(launcher):
    "The processes that a process has started, by what Linux says of them"
    return [int(o) for t in Path(f'/proc/{launcher}/task').iterdir() for o in (t/'children').read_text().split()]
