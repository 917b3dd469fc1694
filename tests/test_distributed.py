"Two processes over gloo: the same averages and the same frozen values in both, one record, no deadlock."
import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_run_by_two_processes_leaves_one_record(images, tmp_path):
    done = launch('-m', 'learned_relu.bench.train', '--data', images, '--size', 16, '--bs', 4, '--arm', 'learned+averages', '--out', tmp_path)
    records = [read_record(o) for o in (tmp_path/'records').glob('*.json')]
    assert len(records) == 1 and records[0]['hardware']['processes'] == 2 and 'telemetry' in records[0]
    assert done.stdout.count('run 1/1') == 1 and done.stdout.count('table.csv') == 1 and not (tmp_path/'checkpoints').exists()
