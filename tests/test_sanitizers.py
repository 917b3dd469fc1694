"The C++ under the compiler's own judges: warnings, and what AddressSanitizer and UndefinedBehaviorSanitizer see at run time."
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_cpu import node_possible

from learned_relu.kernels import build, node

HERE = Path(__file__).parent
GXX = shutil.which('g++')
pytestmark = pytest.mark.skipif(not (sys.platform.startswith('linux') and GXX), reason='needs Linux and g++')


def library(name): return subprocess.run([GXX, f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize('compiler', ['g++', 'clang++'])
@pytest.mark.parametrize('openmp', [True, False])
def test_no_warnings(compiler, openmp):
    if not shutil.which(compiler): pytest.skip(f'there is no {compiler}')
    flags = ['-std=c++17', '-O1', '-Wall', '-Wextra', '-Werror', '-Wno-psabi', '-fsyntax-only', '-x', 'c++', '-']
    flags = (['-fopenmp'] if openmp else ['-Wno-unknown-pragmas']) + flags
    done = subprocess.run([compiler, *flags], input=build.source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@node_possible
def test_no_warnings_of_the_node_by_clang(monkeypatch):  # those of g++ end the compilation below
    if not shutil.which('clang++'): pytest.skip('there is no clang++')
    monkeypatch.setenv('CXX', 'clang++')
    flags = ['-Wall', '-Wextra', '-Werror', '-Wno-unused-command-line-argument']  # the libraries, of which no use is made
    done = subprocess.run([*node.command(), *flags, '-fsyntax-only'], input=node.source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
    "What ran under both judges: output, and what they said"
    libs = [library(o) for o in ('libasan.so', 'libubsan.so', 'libstdc++.so.6')]  # the last for its throw, which is watched
    if not all(map(os.path.isabs, libs)): pytest.skip('g++ has no sanitizers here')
    env = os.environ | dict(CXX='g++ -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all', OMP_NUM_THREADS='2',
                            XDG_CACHE_HOME=str(tmp_path_factory.mktemp('cache')), ASAN_OPTIONS='detect_leaks=0,halt_on_error=1')
    def run(*args, **more):
        command = [sys.executable, '-W', 'ignore', HERE/'sanitized_cases.py', *args]
        return subprocess.run(command, env=env | more, capture_output=True, text=True)
    made = run('compile')  # apart, since with the judges loaded the compiler would be judged too, for minutes
    assert made.returncode == 0, made.stderr[-2000:]
    return run(LD_PRELOAD=':'.join(libs))


@pytest.mark.tried('a case under the sanitizers', 500)
def test_no_case_reads_or_writes_beside_its_tensors_or_does_what_is_undefined(judged):
    assert judged.returncode == 0 and 'ERROR' not in judged.stderr and 'runtime error' not in judged.stderr, judged.stderr[-3000:]
    *_, last = judged.stdout.splitlines()
    assert int(last.split()[0]) > 500
    assert 'with a node' in last or not (Path(sysconfig.get_path('include'))/'Python.h').exists()


@pytest.mark.parametrize('fault,said', [('beside', 'heap-buffer-overflow'), ('undefined', 'runtime error: division by zero')])
def test_a_fault_is_noticed(judged, fault, said):
    line = next(o for o in judged.stdout.splitlines() if o.startswith(fault))
    assert said in line and not line.startswith(f'{fault} 0'), line
