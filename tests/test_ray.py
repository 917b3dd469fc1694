"Runs on several machines: whatever is killed, the records are those of one machine; what stands in the way is named by node."
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from learned_relu.bench.arms import Arm
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.compare import compare
from learned_relu.bench.data import Source
from learned_relu.bench.node import _on_processes, packed, token, unpacked
from learned_relu.bench.recipe import Recipe

ray = pytest.importorskip('ray')
from ray.cluster_utils import Cluster  # noqa: E402

from learned_relu.bench.on_ray import _alive, _check_answers, _interrupts, _made, _Nodes, on_ray  # noqa: E402

NET = 'learned_relu.bench.small:small_net'
HOW = Recipe(model=NET, size=8, bs=100, epochs=6)
ARMS, SEEDS = ['relu', 'learned'], [0]
pytestmark = pytest.mark.filterwarnings('default')  # those of Ray are not ours


@pytest.fixture(scope='module')
def source(): return Source('mnist', 8)


@pytest.fixture(scope='module')
def cluster():
    "A head that takes no run, and two nodes of one core each"
    with pytest.MonkeyPatch.context() as m:
        for k in 'RAY_worker_niceness', 'RAY_memory_monitor_refresh_ms': m.setenv(k, '0')  # beside other tests
        made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False, node_name='head'))
        made.ours = [made.add_node(num_cpus=1, node_name=o) for o in ('north', 'south')]
        ray.init(made.address, log_to_driver=False, logging_level=40)
        yield made
        ray.shutdown()
        made.shutdown()


def made(out, source, launch=None, arms=ARMS, seeds=SEEDS, how=HOW):
    arms = [o if isinstance(o, Arm) else Arm(o) for o in arms]
    return compare(arms, seeds, source, how, out, launch=launch) if launch else compare(arms, seeds, source, how, out)


def records(out): return {o.name: json.loads(o.read_text()) for o in Path(out, 'records').glob('*.json')}


def ends(out): return {k: {o: r[o] for o in ('arm', 'seed', 'end', 'pair', 'accuracy', 'train_loss')} for k, r in records(out).items()}


def table(out):
    "What the table says, but for times"
    with Path(out, 'table.csv').open() as f: rows = [*csv.DictReader(f)]
    return [{k: v for k, v in o.items() if 'time' not in k and 's/epoch' not in k} for o in rows]


def left(out): return sorted(o.name for o in Path(out).rglob('*') if o.name.startswith('.token') or o.suffix in ('.pt', '.tmp'))


@pytest.fixture(scope='module')
def local(tmp_path_factory, source):
    out = tmp_path_factory.mktemp('local')
    made(out, source)
    return out


# the same as on one machine

def test_two_nodes_make_the_runs_of_one_machine_and_what_one_raises_is_told_once(cluster, local, source, tmp_path, capfd, monkeypatch):
    (tmp_path/'odd.py').write_text('from torch import nn\nclass Odd(nn.ReLU):\n    n = 0\n    def forward(self, x):\n        Odd.n += 1\n'
                                   '        if Odd.n > 700: raise ValueError("it is odd")\n        return super().forward(x)\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match='1 of 3 runs failed, as said above; the report is on the others'):
        made('o', source, partial(on_ray, out='o'), ['odd.Odd', *ARMS])
    said = capfd.readouterr()
    lines = said.out.splitlines()
    for o in ('1/3: odd.Odd, seed 0', '2/3: relu, seed 0', '3/3: learned, seed 0'):  # two of them at once
        like = rf'run {o} on (north|south), [12] running, [0-2] done(, about [\d:]+ to go)?'
        assert any(re.fullmatch(like, line) for line in lines), lines
    assert 'run 1/3: odd.Odd, seed 0 failed: it is odd' in lines and len(lines) == 4 and not said.err
    assert ends('o') == ends(local) and table('o') == table(local)
    assert [o[:14] for o in left('o')] == ['odd.Odd-seed0-'] and all(o['hardware']['threads'] == 1 for o in records('o').values())
    made('o', source, partial(on_ray, out='o', address='nowhere'))  # nobody is asked where nothing is missing
    assert capfd.readouterr().out.count('finished before') == 2


# killed

def busy(): return [o for o in psutil.process_iter(['cmdline']) if (o.info['cmdline'] or [''])[0].startswith('ray::_told')]


def killed_through(cluster, source, local, out, rng, kinds):
    "Make the runs, killing these one after another at random moments; how many were"
    n = 0
    with ThreadPoolExecutor() as pool:
        job = pool.submit(made, out, source, partial(on_ray, out=out))
        for kind in kinds:
            time.sleep(rng.uniform(0, 3))
            while not (found := busy()) and not job.done(): time.sleep(.1)
            if job.done(): break
            n += 1
            if kind == 'worker': rng.choice(found).kill()
            else:
                cluster.remove_node(cluster.ours.pop(rng.randrange(2)), allow_graceful=False)
                cluster.ours.append(cluster.add_node(num_cpus=1, node_name=f'new{rng.randrange(10**6)}'))
        job.result()
    assert ends(out) == ends(local) and table(out) == table(local) and not left(out)
    return n


@pytest.mark.tried('a process or a machine killed', 2)
def test_a_worker_and_a_node_that_are_killed_change_nothing(cluster, local, source, tmp_path):
    assert killed_through(cluster, source, local, tmp_path, random.Random(0), ['node', 'worker']) == 2


@pytest.mark.slow
@pytest.mark.tried('a process or a machine killed', 20)
def test_many_that_are_killed_change_nothing(cluster, local, source, tmp_path):
    n, rng = 0, random.Random(1)
    for i in range(40):
        n += killed_through(cluster, source, local, tmp_path/str(i), rng, ['worker', 'node', 'worker'])
        if n >= 20: break
    print(f'{n} kills in {i + 1} comparisons')
    assert n >= 20


def command(out, *more, **kwargs):
    args = ['--model', NET, '--size', 8, '--bs', 100, '--epochs', 6, '--seeds', 1, '--arms', 'relu,learned', '--launcher', 'ray', '--out', out]
    return subprocess.Popen([Path(sys.executable).with_name('learned_relu_compare'), *map(str, args), *more], text=True,
                            env=os.environ | dict(OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def until(process, line):
    for said in process.stdout:
        if line in said: return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.tried('a process or a machine killed', 6)
def test_a_driver_that_is_killed_loses_only_what_ran(cluster, local, tmp_path):
    rng = random.Random(6)
    for _ in range(6):
        one = command(tmp_path, '--address', cluster.address)
        until(one, ', seed')
        time.sleep(rng.uniform(0, 6))
        kept = ends(tmp_path)
        one.kill()
        one.communicate()
        for k, v in kept.items(): assert ends(tmp_path)[k] == v == ends(local)[k]
    done = command(tmp_path, '--address', cluster.address)
    out, err = done.communicate()
    assert not done.returncode and not err and ends(tmp_path) == ends(local)
    assert not left(tmp_path)


def test_a_ray_of_its_own_says_nothing_and_an_interrupt_how_to_go_on(local, tmp_path):
    one = command(tmp_path, start_new_session=True)
    until(one, ', seed 0 on ')
    os.killpg(one.pid, signal.SIGINT)
    out, err = one.communicate(timeout=60)
    assert one.returncode == 1 and err.strip().startswith('stopped: finished runs and epochs are kept in') and len(err.splitlines()) == 1
    assert all(re.match(r'run \d/2: ', o) for o in out.splitlines()), out
    assert not [o for o in left(tmp_path) if '.pt' not in o]  # half a checkpoint, where one was being written, goes with the next start
    assert not list(tmp_path.glob('records/*.tmp')) and records(tmp_path).keys() <= records(local).keys()


def test_an_interrupt_that_a_callback_swallowed_is_raised_again():
    with _interrupts() as heard:
        try: os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt: pass
        with pytest.raises(KeyboardInterrupt): next(_made(SimpleNamespace(waiting=[0], running={}), None, heard))


# what stands in the way

def unshared():
    try: subprocess.run(['unshare', '-m', 'true'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError): pytest.skip('no mount namespaces without privileges')


@contextmanager
def odd_node(cluster, mounts='true', name='odd', **env):
    "Another node, in a mount namespace of its own"
    unshared()
    there = set(_alive())
    start = f'ray start --address {cluster.address} --num-cpus 1 --node-name {name} --block --disable-usage-stats'
    bin = Path(sys.executable).parent
    node = subprocess.Popen(['unshare', '-m', 'sh', '-c', f'{mounts} && exec {bin}/{start}'], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env=os.environ | env, start_new_session=True)
    while not (new := set(_alive()) - there): time.sleep(.1)
    yield
    os.killpg(node.pid, signal.SIGTERM)
    node.wait()
    while new & set(_alive()): time.sleep(.1)


def refused(source, out, arms=('relu',), **options):
    with pytest.raises(ValueError) as e: made(out, source, partial(on_ray, out=out, **options), list(arms), [0])
    assert not records(out) and not left(out)
    return str(e.value)


def test_a_node_of_another_kind_is_refused_or_chosen(cluster, source, tmp_path, capfd):
    with odd_node(cluster, ATEN_CPU_CAPABILITY='default'):
        text = refused(source, tmp_path)
        assert re.match(r'the nodes are of several kinds.*\bodd: .*DEFAULT.*choose one with kind', text)
        made(tmp_path, source, partial(on_ray, out=tmp_path, kind='capability default'), ['relu'])
    assert [o['hardware']['capability'] for o in records(tmp_path).values()] == ['DEFAULT']
    assert capfd.readouterr().out.startswith('run 1/1: relu, seed 0 on odd, 1 running, 0 done')


def test_a_node_that_cannot_take_part_is_named(cluster, source, tmp_path):
    with odd_node(cluster, f'mount -t tmpfs tmpfs {tmp_path}'):
        assert refused(source, tmp_path).startswith(f'node odd: it does not see the run directory {tmp_path} (No such file or directory)')


LOOKS = """
import os, pathlib, subprocess, sys
from learned_relu.bench.node import look
out, images, digits, photos, mine = sys.argv[1:]
def show(payload, mount='true', undo=None):
    subprocess.run(mount, shell=True, check=True)
    print(look(pathlib.Path(payload).read_bytes(), out, 'a1', 'odd')['wrong'])
    if undo: subprocess.run(['umount', undo], check=True)
show(digits)
show(digits, f'mount --bind {out} {out} && mount -o remount,bind,ro {out}', out)
show(digits, f'mount -t tmpfs -o size=64k tmpfs {out}/checkpoints', f'{out}/checkpoints')
show(photos, f'mount -t tmpfs tmpfs {images}', images)
show(photos, f'mount -t tmpfs tmpfs {images}/val/a', f'{images}/val/a')
os.environ['XDG_CACHE_HOME'] = f'{out}/cache'
os.mkdir(f'{out}/cache')
show(photos, f'mount -t tmpfs -o size=8k tmpfs {out}/cache', f'{out}/cache')
show(mine)
"""


def test_what_stands_in_the_way_of_a_node_is_a_sentence(images, source, tmp_path, monkeypatch):
    unshared()
    out = tmp_path/'o'
    (out/'checkpoints').mkdir(parents=True)
    token(out, 'a1').write_text('a1')
    (tmp_path/'mine.py').write_text('import os\nfrom torch import nn\nif os.environ.get("LACKS"): import nowhere\nclass Mine(nn.ReLU): pass\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    how = HOW.pinned(10, 1)
    for name, payload in dict(digits=([], how, source), photos=([], Recipe(size=16, bs=8), Source(str(images), 16, workers=0)),
                              mine=([Arm('mine.Mine')], how, source)).items():
        Path(name).write_bytes(packed(payload))
    done = subprocess.run(['unshare', '-m', sys.executable, '-c', LOOKS, out, images, 'digits', 'photos', 'mine'], capture_output=True,
                          text=True, env=os.environ | dict(LACKS='1'))
    assert not done.returncode, done.stderr
    want = ['None', f'it cannot write to the run directory {out} (Read-only file system): let every node write there, and make room',
            f'it cannot write to the run directory {out} (No space left on device): let every node write there, and make room',
            f"data is '{images}', which has no folder train/", f"data is '{images}', which holds other images here (fingerprint ",
            f'{out}/cache/learned_relu/images has 0.0 MB free, but the decoded images take',
            "ModuleNotFoundError: No module named 'nowhere'"]
    for line, words in zip(done.stdout.splitlines(), want, strict=True): assert line.startswith(words), line


def test_a_directory_from_another_gpu_is_refused_before_anything_is_trained(cluster, source, local, tmp_path):
    shutil.copytree(local/'records', tmp_path/'records')
    moved = next((tmp_path/'records').glob('relu-seed0-*'))
    r = json.loads(moved.read_text())
    r['hardware']['device'] = 'NVIDIA H100'
    moved.write_text(json.dumps(r))
    before = records(tmp_path)
    with pytest.raises(ValueError, match='relu, seed 0, ran on NVIDIA H100, and the next run would be made on cpu'):
        made(tmp_path, source, partial(on_ray, out=tmp_path), seeds=[100])
    assert records(tmp_path) == before and not left(tmp_path)


def test_a_node_that_sees_another_directory_takes_no_part(cluster, tmp_path):
    ref, node = ray.put(dict(kind='a kind', device='a GPU', wrong=None)), next(iter(_alive()))
    nodes = SimpleNamespace(asked={ref: node}, names={node: 'north'}, kinds={}, devices={}, out=tmp_path, token='t')
    assert _Nodes.answer(nodes, ref).startswith(f'node north: what it writes to {tmp_path} is not seen here') and not nodes.kinds
    token(tmp_path, f't-{node}').touch()
    nodes.asked[ref] = node
    assert _Nodes.answer(nodes, ref) is None and (nodes.kinds, nodes.devices) == ({node: 'a kind'}, {'a kind': 'a GPU'})


def test_a_module_of_the_directory_that_the_command_was_given_in_is_found(tmp_path, monkeypatch):
    (tmp_path/'beside_the_command.py').write_text('from torch import nn\nclass Mine(nn.ReLU): pass\n')
    with monkeypatch.context() as m:
        m.chdir(tmp_path)
        m.syspath_prepend(tmp_path)
        payload = packed(Arm('beside_the_command.Mine'))
    monkeypatch.delitem(sys.modules, 'beside_the_command')
    monkeypatch.setattr(sys, 'path', [*sys.path])
    assert str(tmp_path) not in sys.path and unpacked(payload).name == 'beside_the_command.Mine'


def test_more_than_any_node_has(cluster, source, tmp_path):
    text = refused(source, tmp_path, cpus=7)
    assert text.startswith('a run takes 7 CPU(s) and 0 GPU(s), which no node has (') and 'north: 1 CPUs, 0 GPUs' in text


@pytest.mark.parametrize('options,words', [
    (dict(launcher='slurm'), "launcher is 'slurm': pass 'local' or 'ray'"),
    (dict(gpus_per_run=.5), "gpus_per_run is 0.5, which is for Ray"),
    (dict(launcher='ray', gpus_per_run=-1), 'gpus_per_run is -1: pass 0, a fraction of 1, or a whole number'),
    (dict(launcher='ray', gpus_per_run=float('nan')), 'gpus_per_run is nan'),
    (dict(launcher='ray', cpus_per_run=0), 'cpus_per_run is 0'),
    (dict(launcher='ray', address='ray://head:10001'), 'start the command on a machine of the cluster'),
])
def test_options_that_cannot_be_are_refused_before_anything_is_looked_for(tmp_path, options, words):
    with pytest.raises(SystemExit, match=re.escape(words)): learned_relu_compare(data='nowhere', out=tmp_path/'o', **options)
    assert not (tmp_path/'o').exists()


@pytest.mark.parametrize('address', ['127.0.0.1:1', 'north', 'nowhere.invalid:6379'])
def test_an_address_where_nothing_answers_is_said_at_once(address):
    with pytest.raises(ValueError, match=f"address is '{address}', where nothing answers .*: pass auto, or host and port"):
        _check_answers(address)


def test_a_recipe_file_may_name_the_launcher(tmp_path):
    (tmp_path/'x.toml').write_text('launcher = "ray"\n')
    with pytest.raises(SystemExit, match='cpus_per_run is 0'): learned_relu_compare(recipe=tmp_path/'x.toml', cpus_per_run=0)
    (tmp_path/'x.toml').write_text('launcher = "slurm"\n')
    with pytest.raises(SystemExit, match="x.toml: launcher is 'slurm'"): learned_relu_compare(recipe=tmp_path/'x.toml')


def test_without_ray_the_extra_is_named():
    code = ('import sys; sys.modules["ray"] = None\nfrom learned_relu.bench.commands.compare import learned_relu_compare as f\n'
            'f(launcher="ray", data="nowhere")')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stderr.strip() == 'error: Runs on several machines need Ray: pip install "learned_relu[ray]"'


def test_several_processes_make_one_run(source, tmp_path):
    record = _on_processes(packed((Arm('relu'), 0, replace(HOW, epochs=1).pinned(10, 1), source, tmp_path/'a.pt')), 2)
    assert record['hardware']['processes'] == 2 and len(record['accuracy']) == 1
