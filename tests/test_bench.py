"Runs in pairs, records that survive, and the commands as a shell calls them."
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
from common import in_process, on_terminal, read_until
from torch.overrides import TorchFunctionMode

from learned_relu.bench import full
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.data import Source
from learned_relu.bench.recipe import Recipe
from learned_relu.bench.record import made_by, read_record

CMD = [str(Path(sys.executable).with_name('learned_relu_compare'))]
SMALL = '--size 16 --bs 8 --epochs 1'.split()
WOOF = Path(__file__).resolve().parents[2]/'shared'/'data'/'imagewoof2-160.tgz'

pytestmark = pytest.mark.usefixtures('cache')


def run(*args, check=False, command=CMD[0]): return in_process(command, *args, check=check)


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    args = '--data', images, *SMALL, '--seeds', 2, '--arms', 'relu,learned', '--out'
    return out, args, run(*args, out, check=True)


def test_a_run_of_few_steps_is_said_to_be_one(finished, images, tmp_path):
    assert 'A run takes 3 steps, in which curves hardly move' in finished[2].stdout  # 24 images, 8 a batch
    assert Source('mnist', 16).steps(Recipe(bs=100, epochs=2)) == 80
    said = run('--data', images, '--size', 16, '--bs', 2, '--epochs', 5, '--seeds', 1, '--arms', 'relu', '--out', tmp_path, check=True)
    assert 'hardly move' not in said.stdout  # 60 steps


def test_a_record_is_read_without_a_trainer():
    code = ("import sys\nfrom pathlib import Path\nfrom learned_relu.bench.record import read_record"
            "\nassert read_record(next(Path(sys.argv[1]).rglob('records/*.json')))['format'] == 1"
            "\nprint([o for o in sys.modules if o.split('.')[0] in ('fastai', 'torch') or o.startswith('learned_relu.kernels')])")
    records = Path(__file__).parents[1]/'benchmarks'/'records'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, records], capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'


@pytest.mark.parametrize('command', [[*CMD], [sys.executable, '-m', 'learned_relu.bench.train']], ids=['compare', 'module'])
def test_who_types_a_command_reads_no_warning_of_what_it_loads(command):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONWARNINGS'}
    done = subprocess.run([*command, '--help'], capture_output=True, text=True, check=True, env=env)
    assert 'usage' in done.stdout and done.stderr == ''


@pytest.mark.parametrize('what', ['measured', 'plot_speed'])
def test_a_speed_record_is_there_when_it_is_whole(what, tmp_path, monkeypatch):
    from learned_relu.bench.commands import speed
    rows = pd.DataFrame([dict(work='operation', name='relu', median=1., low=1., high=1., rounds=1)])
    monkeypatch.setattr(speed, 'measured', lambda *_: rows)
    monkeypatch.setattr(speed, 'first_call', lambda: pd.DataFrame(dict(relu=[1.], LearnedRelu=[2.])))
    with monkeypatch.context() as m:
        m.setattr(speed, what, lambda *_: 1/0)
        with pytest.raises(ZeroDivisionError): speed.learned_relu_speed(tmp_path/'out')
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as m:
        def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        m.setattr(speed.json, 'dumps', full)
        with pytest.raises(SystemExit, match='cannot be written .No space left on device.: pass another --out'):
            speed.learned_relu_speed(tmp_path/'out')
    assert not list(tmp_path.iterdir())
    speed.learned_relu_speed(tmp_path/'out')
    record = json.loads((tmp_path/'out'/'speed.json').read_text())
    assert {k: record[k] for k in ('commit', 'versions', 'hardware')} == made_by('cpu', {})


class StandIn(TorchFunctionMode):
    "What is meant for a GPU goes to the CPU."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        def cpu(o): return torch.device('cpu') if isinstance(o, str | torch.device) and str(o).startswith('cuda') else o
        if func is torch.device: return func(*args)
        return func(*map(cpu, args), **{k: cpu(v) for k, v in (kwargs or {}).items()})


def test_each_kind_of_row_for_a_gpu_is_measured_on_a_stand_in(monkeypatch):
    class Graph:
        def replay(self): torch.ones(1000).sum()

    given = dict(synchronize=lambda: None, Stream=lambda: None, stream=lambda _: nullcontext(), CUDAGraph=Graph, graph=lambda _, pool: nullcontext(),
                 graph_pool_handle=lambda: 1, reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 1, max_memory_allocated=lambda: 8)
    for k, v in given.items(): monkeypatch.setattr(torch.cuda, k, v)
    monkeypatch.setitem(full.SIZES, 'cuda', {'xresnet18': (32, 2)})
    monkeypatch.setitem(full.KINDS, 'cuda', full.KINDS['cuda'][:1])
    monkeypatch.setattr(full, 'FIT', 2)
    copied, measured = full.copy_rows, full.activation_rows
    monkeypatch.setattr(full, 'copy_rows', lambda device, _: copied(device, 1024, 1))
    monkeypatch.setattr(full, 'activation_rows', lambda layers, _, *args: measured(layers, (2, 64, 4, 4), *args))
    works = full.full_works('cuda', 1, 1)
    compiled = [o for o in works if 'compiled' in o]  # minutes, and the same models as `--compiled` times on a CPU
    with StandIn(): rows, left, ended = full.measured_until({k: f for k, f in works.items() if k not in compiled}, 5)
    assert (left, ended, len(works) - len(compiled)) == ([], 'done', 8)
    assert not rows.duplicated(['work', 'name']).any() and rows[['median', 'low', 'high', 'rounds']].notna().all(axis=None)
    of = {k: rows[rows.work.str.startswith(k)] for k in ('copy', 'operation', 'with BatchNorm', 'step, ', 'step in a CUDA graph', 'fit of')}
    assert [len(o) for o in of.values()] == [1, 16, 8, 5, 5, 5]
    assert of['fit of'].name.iloc[-1] == 'LearnedRelu, fuse_bn, all callbacks' and (of['step, '].peak == 1).all()
    assert (rows.bytes_per_second > 0).sum() == 11 and not [o for o in full.full_works('cuda', 1, 0) if 'xresnet' in o]


def test_a_speed_record_keeps_what_was_measured_however_it_ends(tmp_path, monkeypatch, capsys):
    from learned_relu.bench.commands import speed
    class OutOfResources(Exception): pass  # as Triton's, which is no RuntimeError

    def of(error=None):
        def work():
            if error: raise error
            return full.ratios_to('relu', full.timed({'relu': lambda: None}, 3)).assign(rounds=3)
        return work

    def stopped(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)
    works = dict(a=of(), b=of(OutOfResources('shared memory\nand more')), c=of(RuntimeError()), d=of(FileNotFoundError('no C compiler')))
    works |= dict(e=of(), f=stopped, g=of())
    monkeypatch.setattr(speed, 'full_works', lambda *_: works)
    out = tmp_path/'o'
    speed.learned_relu_speed(out, all=True, device='cpu', rounds=1, steps=1)
    record = json.loads((out/'speed.json').read_text())
    assert [o['work'] for o in record['rows']] == ['a', 'e'] and record['left'] == list('bcdfg') and record['seconds'] < 9
    assert record['ended'] == 'interrupted; b: OutOfResources: shared memory; c: RuntimeError: ; d: FileNotFoundError: no C compiler'
    assert 'interrupted; b: OutOfResources' in (out/'speed.html').read_text() and (out/'speed.csv').exists() and (out/'speed.png').exists()
    for device, words in ('cuda:1', "device is 'cuda:1': pass cpu or cuda"), ('cuda', 'no GPU is there'):
        if device == 'cuda' and torch.cuda.is_available(): continue
        with pytest.raises(SystemExit, match=words): speed.learned_relu_speed(tmp_path/'p', all=True, device=device)


def test_a_work_that_takes_too_long_ends_with_the_round():
    made = []
    def work():
        times = full.timed({'relu': lambda: made.append(1)}, 1000, number=1)
        return full.ratios_to('relu', times).assign(rounds=len(times))
    rows, left, ended = full.measured_until(dict(a=work, b=work), 0)
    assert rows.rounds.tolist() == [1] and len(made) == 2 and (left, ended) == (['b'], 'the 0 minutes were up')


def test_a_comparison_is_paired_recorded_and_reported(finished):
    out, _, done = finished
    records = [read_record(o) for o in sorted((out/'records').glob('*.json'))]
    assert len(records) == 4 and (out/'table.csv').exists()
    by = {(r['arm'], r['seed']): r for r in records}
    for seed in 0, 1: assert by['relu', seed]['pair'] == by['learned', seed]['pair']
    assert by['relu', 0]['pair'] != by['relu', 1]['pair']
    r = by['learned', 0]
    assert r['hardware'] == made_by('cpu', dict(processes=1, workers=2))['hardware'] and r['versions'] == made_by('cpu', {})['versions']
    assert r['data']['name'] == 'noise' and isinstance(r['recipe'], dict) and len(r['accuracy']) == 1 and len(r['activation']) == 57
    assert r['hardware']['capability'] == torch.backends.cpu.get_cpu_capability() and r['hardware']['cpu']
    assert str(out) not in json.dumps(records)
    assert 'vs relu' in done.stdout and not list((out/'records').glob('*.tmp'))
    page = (out/'report.html').read_text()
    assert r['data']['valid'] == 10 and r['steps'] == 3 and 'A run took 3 steps of the optimizer. There are 10 images' in page
    assert '|-' not in done.stdout and 'train_loss' in done.stdout, 'a pipe is told of epochs and has no bars'
    assert page.count('<img alt="') == 5 and 'src="http' not in page


def test_records_keep_what_their_recipe_declares_and_the_report_judges_by_it(finished, images, tmp_path):
    out, args, _ = finished
    (tmp_path/'r.toml').write_text('margin = 0.5\nmeasures = ["accuracy", "valid_loss"]\n')
    run('--recipe', tmp_path/'r.toml', *args[:-5], '--seeds', 1, '--arms', 'relu,leaky', '--out', tmp_path/'o', check=True)
    (tmp_path/'late.toml').write_text('margin = 2.0\n')
    for how, late in (('late.toml', True), ('r.toml', False)):
        done = run('--recipe', tmp_path/how, *args[:-5], '--seeds', 1, '--arms', 'relu,leaky', '--out', tmp_path/'o', check=True)
        assert ('finished before declare another margin' in done.stdout) == late and 'leaky − relu: ' in done.stdout
    records = list(map(read_record, (tmp_path/'o'/'records').glob('*.json')))
    assert [r['judging'] for r in records] == [dict(margin=.5, measures=['accuracy', 'valid_loss'])]*2
    assert {r['digest'] for r in records} == {read_record(o)['digest'] for o in (out/'records').iterdir()}, 'it is the same recipe'
    assert not any('judging' in read_record(o) for o in (out/'records').iterdir())
    assert 'Declared with every run' in (tmp_path/'o'/'report.html').read_text() and 'loss vs relu' in pd.read_csv(tmp_path/'o'/'table.csv')
    assert 'exploratory loss vs relu' in pd.read_csv(out/'table.csv')


def test_a_directory_from_another_kind_of_machine_is_refused_before_anything_is_trained(finished, tmp_path):
    out, args, _ = finished
    shutil.copytree(out, tmp_path/'o')
    moved = next((tmp_path/'o'/'records').glob('relu-seed0-*'))
    r = json.loads(moved.read_text())
    r['pair']['weights'], r['hardware']['capability'] = 'drawn elsewhere', 'DEFAULT'
    moved.write_text(json.dumps(r))
    done = run(*args[:-5], '--seeds', 3, '--arms', 'relu,learned', '--out', tmp_path/'o')
    assert done.returncode == 1 and 'run 5/6' not in done.stdout and 'Traceback' not in done.stderr
    assert 'seed 0: relu and learned are no pair, since their initial weights differ. relu ran on cpu' in done.stderr and 'DEFAULT' in done.stderr
    assert len(list((tmp_path/'o'/'records').iterdir())) == 4


def test_a_directory_from_another_gpu_is_refused_before_anything_is_trained(finished, tmp_path):
    out, args, _ = finished
    shutil.copytree(out, tmp_path/'o')
    moved = next((tmp_path/'o'/'records').glob('learned-seed1-*'))
    r = json.loads(moved.read_text())
    r['hardware']['device'] = 'NVIDIA H100'
    moved.write_text(json.dumps(r))
    assert not run(*args, tmp_path/'o').returncode, 'a report takes nothing but records'
    done = run(*args[:-5], '--seeds', 3, '--arms', 'relu,learned', '--out', tmp_path/'o')
    assert done.returncode == 1 and 'run 5/6' not in done.stdout
    assert 'learned, seed 1, ran on NVIDIA H100, and the next run would be made on cpu' in done.stderr
    assert len(list((tmp_path/'o'/'records').iterdir())) == 4


def test_half_an_hour_today_and_half_an_hour_tomorrow_make_the_same_runs(finished, tmp_path):
    out, args, _ = finished
    for n in 1, 2:
        done = run(*args, tmp_path, '--minutes', .0001, check=True)
        assert f'{4 - n} of {5 - n} runs are left' in done.stdout and 'report.html' in done.stdout
        assert len(list((tmp_path/'records').iterdir())) == n
    assert 'are left' not in run(*args, tmp_path, '--minutes', 30, check=True).stdout
    assert {o.name for o in (tmp_path/'records').iterdir()} == {o.name for o in (out/'records').iterdir()}
    for o in (out/'records').iterdir(): assert read_record(o)['end'] == read_record(tmp_path/'records'/o.name)['end']
    for how, said in (('--minutes', 0), 'minutes is 0: pass a positive number'), (('--minutes', 9, '--launcher', 'ray'), 'that one process makes'):
        assert said in run(*args, tmp_path, *how).stderr


def test_the_same_command_again_trains_nothing(finished):
    out, args, _ = finished
    before = {o: o.stat().st_mtime_ns for o in (out/'records').iterdir()}
    assert run(*args, out, check=True).stdout.count('finished before') == 4
    assert before == {o: o.stat().st_mtime_ns for o in (out/'records').iterdir()}


def test_a_run_more_joins_the_report(finished, tmp_path):
    out, args, _ = finished
    shutil.copytree(out, tmp_path/'o')
    train = str(Path(CMD[0]).with_name('learned_relu_train'))
    run(*args[:-5], '--arm', 'relu', '--seed', 2, '--out', tmp_path/'o', check=True, command=train)
    table = pd.read_csv(tmp_path/'o'/'table.csv').set_index('arm')
    assert table.loc['relu', 'n'] == 3 and table.loc['learned', 'n'] == 2 and table.loc['learned', 'vs relu n'] == 2


ELSEWHERE = """import os, sys
sys.modules.update(resource=None, fcntl=None)
for o in 'pwrite', 'getuid': delattr(os, o)
from learned_relu.bench.arms import Arm
from learned_relu.bench.data import Source
from learned_relu.bench.recipe import Recipe
from learned_relu.bench.run import train_run
r = train_run(Arm('learned'), 0, Recipe(size=16, bs=8), Source(sys.argv[1], 16, workers=0))
print(r['peak_memory'], len(r['accuracy']))"""


def test_a_run_needs_no_resource_fcntl_pwrite_or_getuid(images, tmp_path):
    env = os.environ | dict(XDG_CACHE_HOME=str(tmp_path), CXX='false') # and no kernels
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', ELSEWHERE, images], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == "{'bytes': None, 'scope': 'process, all its runs'} 1"
    assert list((tmp_path/'learned_relu'/'images').glob('*.rgb'))


def test_a_batch_has_to_be_there_for_every_process(images, monkeypatch):
    Source(images, 16, cache=False).check_bs(24)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='bs is 13, but there are only 12 images in training for each process'):
        Source(images, 16, cache=False).check_bs(13)


def test_every_arm_trains_from_the_same_start(images, tmp_path):
    names = ('leaky,prelu,silu,mish,general,clip,symmetric,threshold,leaky_grad,penalty,torch.nn.ELU,learned_relu.layers.LearnedClip,'
             'learned_scalar,learned_only_sub,learned_no_leak,learned_no_sub,learned_no_maxv,learned_fast,learned_from_relu,learned+caps+averages+freeze')
    run('--data', images, *SMALL, '--model', 'learned_relu.bench.small:small_net', '--seeds', 1, '--arms', names, '--out', tmp_path, check=True)
    records = {r['arm']: r for r in map(read_record, (tmp_path/'records').glob('*.json'))}
    assert set(records) == set(names.split(',')) and len({json.dumps(r['pair']) for r in records.values()}) == 1
    assert all('telemetry' in records[o] for o in ('clip', 'symmetric', 'threshold', 'learned_relu.layers.LearnedClip'))
    def kinds(arm): return {o.rpartition('.')[2] for o in records[arm]['activation']}
    assert kinds('learned_only_sub') == {'sub'} and kinds('learned_no_leak') == {'sub', 'maxv'} and kinds('learned_no_maxv') == {'leak', 'sub'}
    assert records['learned_no_leak']['fixed'].keys() == {'leak'} and records['learned_only_sub']['fixed'] == dict(leak=pytest.approx(.05), maxv=10.)
    caps = [v['max'] for k, v in records['learned+caps+averages+freeze']['activation'].items() if k.endswith('.maxv')]
    assert len(caps) == 6 and max(caps) < 9 and {v['n'] for v in records['learned_scalar']['activation'].values()} == {1}


def test_a_command_trains_without_batchnorm(images, tmp_path):
    run('--data', images, *SMALL, '--seeds', 1, '--arms', 'learned+caps', '--batchnorm', 0, '--out', tmp_path, check=True)
    record, = map(read_record, (tmp_path/'records').glob('*.json'))
    assert record['recipe']['batchnorm'] is False and all(map(math.isfinite, record['train_loss'] + record['valid_loss']))


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_stopped_within_the_second_run_loses_only_that_run(how, images, tmp_path):
    args = '--data', images, *SMALL, '--seeds', 1, '--arms', 'relu,leaky', '--out', tmp_path
    def heard(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background ignores
    child, terminal = on_terminal([*CMD, *args], preexec_fn=heard)
    said = read_until(terminal, lambda said: b'[1/3' in said.partition(b'run 2/2')[2])  # the bar of the second run, after its first batch
    child.send_signal(how)
    said += read_until(terminal)
    child.wait()
    os.close(terminal)
    assert child.returncode not in (0, 2) and b'KeyboardInterrupt' not in said
    kept = list((tmp_path/'records').glob('*.json'))
    assert [read_record(o)['arm'] for o in kept] == ['relu'] and not (tmp_path/'table.csv').exists()
    if how == signal.SIGINT: assert b'the same command goes on from there' in said
    before = kept[0].read_bytes()
    assert run(*args, check=True).stdout.count('finished before') == 1
    assert len(list((tmp_path/'records').glob('*.json'))) == 2 and kept[0].read_bytes() == before


@pytest.mark.parametrize('args,words', [
    (dict(arms='rellu'), "arm is 'rellu'"), (dict(arch='vgg'), "arch is 'vgg'"), (dict(data='nowhere'), "data is 'nowhere'"),
    (dict(seeds=0), 'seeds is 0'), (dict(opt='lion'), "opt is 'lion'"), (dict(out='/proc/none'), 'cannot be written'),
    (dict(arms=','), 'arms is empty'), (dict(bs=4001), 'bs is 4001'), (dict(lr=-1.), 'lr is -1')])
def test_bad_input_ends_before_any_training(args, words, capsys):
    with pytest.raises(SystemExit, match=words): learned_relu_compare(**args)
    assert 'run 1/' not in capsys.readouterr().out


def test_a_shell_sees_the_error_and_no_traceback():
    done = subprocess.run([*CMD, '--arms', 'rellu'], capture_output=True, text=True)
    assert done.returncode == 1 and "arm is 'rellu'" in done.stderr and 'Traceback' not in done.stderr


def test_an_older_record_is_named(finished, tmp_path):
    out, args, _ = finished
    (tmp_path/'records').mkdir()
    for o in (out/'records').iterdir(): (tmp_path/'records'/o.name).write_text(o.read_text().replace('"format": 1', '"format": 0'))
    done = run(*args, tmp_path)
    assert done.returncode == 1 and 'has format 0' in done.stderr


@pytest.mark.skipif(not WOOF.exists(), reason='the Imagewoof images are not beside this checkout')
def test_real_images(tmp_path):
    import tarfile
    with tarfile.open(WOOF) as f:
        counts, names = {}, []
        for m in f:
            folder = Path(m.name).parent
            if m.isfile() and m.name.lower().endswith('.jpeg') and counts.get(folder, 0) < 8:
                counts[folder] = counts.get(folder, 0) + 1; names.append(m)
        f.extractall(tmp_path, members=names, filter='data')
    done = run('--data', tmp_path/'imagewoof2-160', '--size', 32, '--bs', 16, '--seeds', 1, '--arms', 'relu,learned', '--out', tmp_path/'out')
    assert done.returncode == 0, done.stderr
    assert {read_record(o)['data']['name'] for o in (tmp_path/'out'/'records').glob('*.json')} == {'imagewoof2-160'}
