"A compiled library that is damaged, somebody else's, or never worked: made again or done without, and never run."
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cpu import fresh, runs_anyway  # noqa: F401

from learned_relu.kernels import build
from learned_relu.kernels.library import found, key, made, shelf

compiled = pytest.mark.skipif(build.kernels() is None, reason='needs Linux and a C++ compiler')
COMPILER = os.environ.get('CXX', 'g++')
FLAGS = [o for o in build._flags() if o != '-O3'] + ['-O0']


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return shelf()


def child(code, **env):
    begin = f'from learned_relu.kernels import build\nbuild._flags = lambda: {FLAGS}\n'
    return subprocess.run([sys.executable, '-W', 'error', '-c', begin + code], env=os.environ | env, capture_output=True, text=True)


RUN = '''import torch; from learned_relu.functional import learned_relu
learned_relu(torch.randn(4, 3), *[torch.ones(3)]*3, impl="kernel"); print("fine")'''


def harmed(path, whole, rng):
    "Ways to damage a library, as names and functions"
    def flip(at): path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
    for n in (0, 1_000, 10_000, 100_000, len(whole) - 1): yield f'cut to {n}', lambda n=n: path.write_bytes(whole[:n])
    for at in (100, len(whole)//2, rng.randrange(len(whole))): yield f'bit at {at}', lambda at=at: flip(at)
    yield 'another library', lambda: path.write_bytes(Path(torch.__file__).with_name('lib').joinpath('libc10.so').read_bytes())
    yield 'text', lambda: path.write_text('no library')
    yield 'a directory', lambda: (path.unlink(), path.mkdir(), (path/'in').touch())
    yield 'a link to nothing', lambda: (path.unlink(), path.symlink_to('nothing'))
    yield 'removed', path.unlink


@pytest.mark.tried('a file damaged, cut or foreign', 13)
@compiled
def test_a_damaged_library_is_noticed_and_made_again(fresh, place):  # noqa: F811
    path = build.compiled(COMPILER)
    whole, name = path.read_bytes(), path.stem.rpartition('-')[0]
    for what, harm in harmed(path, whole, random.Random(0)):
        harm()
        assert found(name) is None, what
        assert not path.exists() and not path.is_symlink(), what
        made(name, lambda o: o.write_bytes(whole))
        assert path.read_bytes() == whole and found(name) == path, what


@pytest.mark.tried('a file damaged, cut or foreign')
@compiled
@pytest.mark.parametrize('n', [1000, 30_000])
def test_a_file_that_was_cut_does_not_end_the_process(fresh, place, n):  # noqa: F811
    path = build.compiled(COMPILER)
    with open(path, 'r+b') as f: f.truncate(n)
    done = child(RUN, XDG_CACHE_HOME=os.environ['XDG_CACHE_HOME'])
    assert done.stdout == 'fine\n', done.stderr[-2000:]
    assert path.stat().st_size > n


def script(tmp_path, text):
    path = tmp_path/'cc'
    path.write_bytes(f'#!/bin/sh\n{text}\n'.encode('latin-1'))
    path.chmod(0o755)
    return str(path)


@pytest.mark.tried('a compiler that fails')
@pytest.mark.parametrize('text,said', [
    ('echo "Paramètre inconnu: é" >&2; exit 1', 'failed: Param.tre inconnu'), ('exec sleep 600', 'took longer than 1 seconds'),
    ('exit 0', 'it ended well and wrote nothing'), ('while [ "$1" != -o ]; do shift; done; cat > "$2"', 'invalid ELF header'),
    (f'while [ "$1" != -o ]; do shift; done; echo "int nothing;" | {COMPILER} -shared -o "$2" -x c -', 'has no lost_float'),
    ('kill -9 $$', 'status -9'), ('[ "$LC_ALL" = C ] && echo in plain English >&2; exit 1', 'in plain English')])
def test_a_compiler_that_does_not_work_is_tried_once_and_named(fresh, place, tmp_path, monkeypatch, text, said):  # noqa: F811
    monkeypatch.setenv('CXX', script(tmp_path, f'echo x >> {tmp_path}/times; {text}'))
    monkeypatch.setattr(build, 'PATIENCE', 1)
    with pytest.warns(UserWarning, match=f'several times slower on a CPU, because .*{said}') as seen: runs_anyway()
    assert len(seen) == 1 and (tmp_path/'times').read_text() == 'x\n'
    assert not list(place.glob('*.making'))


@pytest.mark.tried('a compiler that fails')
@pytest.mark.parametrize('command,said', [("g++ '", 'which is no command'), ('/nowhere/cc', 'No such file'), ('/', 'ermission')])
def test_a_command_that_is_none(fresh, place, monkeypatch, command, said):  # noqa: F811
    monkeypatch.setenv('CXX', command)
    with pytest.warns(UserWarning, match=f'because .*{said}'): runs_anyway()


@compiled
def test_want_of_openmp_alone_costs_threads(fresh, place, tmp_path, monkeypatch):  # noqa: F811
    without = 'case "$*" in *-fopenmp*) echo "error: libgomp.spec: No such file" >&2; exit 1;; esac'
    monkeypatch.setenv('CXX', script(tmp_path, f'{without}\nexec {COMPILER} "$@"'))
    with pytest.warns(UserWarning, match='run on one thread, since .*libgomp.spec'): runs_anyway()
    assert build.kernels() is not None


@pytest.mark.parametrize('mode', [0o777, 0o770, 0o720])
def test_a_directory_that_others_can_write_is_not_used(fresh, place, mode):  # noqa: F811
    place.chmod(mode)
    with pytest.warns(UserWarning, match='can be written by other users, so nothing of it is run'): runs_anyway()


@compiled
def test_a_library_that_others_can_write_is_not_run(fresh, place):  # noqa: F811
    build.compiled(COMPILER).chmod(0o666)
    with pytest.warns(UserWarning, match=r'\.so can be written by other users'): runs_anyway()


@compiled
@pytest.mark.parametrize('n', [3, pytest.param(10, marks=pytest.mark.slow)])
def test_many_processes_compile_once(place, tmp_path, n):
    cc = script(tmp_path, f'echo x >> {tmp_path}/times; sleep 2; exec {COMPILER} "$@"')
    with ThreadPoolExecutor(n) as pool: done = list(pool.map(lambda _: child(RUN, CXX=cc), range(n)))
    assert [o.stdout for o in done] == ['fine\n']*n, [o.stderr[-500:] for o in done]
    assert (tmp_path/'times').read_text() == 'x\n' and len(list(place.glob('*.so'))) == 1


@pytest.mark.tried('a process or a machine killed')
def test_one_that_was_killed_leaves_the_next_one_free(place, tmp_path):
    name = key('slow', 'source')
    code = 'import sys, time; from learned_relu.kernels.library import made\n' \
           'made(sys.argv[1], lambda o: (o.write_text("half"), print("now", flush=True), time.sleep(60)))'
    with subprocess.Popen([sys.executable, '-c', code, name], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'now\n'
        with pytest.raises(OSError, match='another process has been compiling for 0.1 seconds'): made(name, lambda o: None, wait=.1)
        other.send_signal(signal.SIGKILL)
    assert (place/f'{name}.making'/'new.so').read_text() == 'half'
    path = made(name, lambda o: o.write_text('whole'), wait=5)
    assert path.read_text() == 'whole' and not list(place.glob('*.making'))


def test_a_hanging_compiler_costs_a_minute_at_most():
    assert build.PATIENCE <= 60


def test_nothing_is_said_where_all_is_well(fresh, place):  # noqa: F811
    began = time.time()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(2):
            if build.kernels() is None: pytest.skip('needs Linux and a C++ compiler')
            build.kernels.cache_clear()
    assert time.time() - began < 120
