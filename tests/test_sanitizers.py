"The C++ under the compiler's own judges: warnings, and what AddressSanitizer and UndefinedBehaviorSanitizer see at run time."
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
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
@pytest.mark.parametrize('compiler', ['g++', 'clang++'])
def test_no_warnings_of_the_node(compiler, monkeypatch):
    if not shutil.which(compiler): pytest.skip(f'there is no {compiler}')
    monkeypatch.setenv('CXX', compiler)
    flags = ['-Wall', '-Wextra', '-Werror', '-Wno-unused-command-line-argument']  # the libraries, of which no use is made
    done = subprocess.run([*node.command(), *flags, '-fsyntax-only'], input=node.source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


JUDGES = dict(address='libasan.so', undefined='libubsan.so')


@pytest.fixture(scope='module', params=JUDGES)
def judged(request, tmp_path_factory):
    lib = library(JUDGES[request.param])
    if not os.path.isabs(lib): pytest.skip(f'g++ has no {JUDGES[request.param]} here')
    env = os.environ | dict(CXX=f'g++ -fsanitize={request.param} -fno-sanitize-recover=all', XDG_CACHE_HOME=str(tmp_path_factory.mktemp('cache')),
                            ASAN_OPTIONS='detect_leaks=0,halt_on_error=1', OMP_NUM_THREADS='2')
    def run(*args, **more):
        command = [sys.executable, '-W', 'ignore', HERE/'sanitized_cases.py', *args]
        return subprocess.run(command, env=env | more, capture_output=True, text=True)
    made = run('compile')  # apart, since with the judge loaded the compiler would be judged too, for minutes
    assert made.returncode == 0, made.stderr[-2000:]
    return request.param, partial(run, LD_PRELOAD=f'{lib}:{library("libstdc++.so.6")}')  # whose throw is watched


def test_no_case_reads_or_writes_beside_its_tensors_or_does_what_is_undefined(judged):
    done = judged[1]()
    assert done.returncode == 0 and 'ERROR' not in done.stderr and 'runtime error' not in done.stderr, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 500
    assert 'with a node' in done.stdout or not (Path(sysconfig.get_path('include'))/'Python.h').exists()


def test_a_write_beside_a_tensor_is_noticed(judged):
    if judged[0] != 'address': pytest.skip('it is AddressSanitizer that looks at this')
    done = judged[1]('break')
    assert done.returncode != 0 and 'heap-buffer-overflow' in done.stderr, done.stderr[-3000:]
