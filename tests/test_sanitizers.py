"The C++ under the compiler's own judges: warnings, and what AddressSanitizer and UndefinedBehaviorSanitizer see at run time."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from learned_relu.kernels import build

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


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
    libs = [library(o) for o in ('libasan.so', 'libubsan.so')]
    if not all(map(os.path.isabs, libs)): pytest.skip('g++ has no sanitizers here')
    cache = str(tmp_path_factory.mktemp('cache'))
    env = os.environ | dict(CXX='g++ -fsanitize=address,undefined -fno-sanitize-recover=all -g', XDG_CACHE_HOME=cache, LD_PRELOAD=':'.join(libs),
                            ASAN_OPTIONS='detect_leaks=0,halt_on_error=1', UBSAN_OPTIONS='print_stacktrace=1', OMP_NUM_THREADS='2')
    def run(*args):
        command = [sys.executable, '-W', 'ignore', HERE/'sanitized_cases.py', *args]
        return subprocess.run(command, env=env, capture_output=True, text=True)
    return run


def test_no_case_reads_or_writes_beside_its_tensors(judged):
    done = judged()
    assert done.returncode == 0 and 'ERROR' not in done.stderr and 'runtime error' not in done.stderr, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 500


def test_a_write_beside_a_tensor_is_noticed(judged):
    done = judged('break')
    assert done.returncode != 0 and 'heap-buffer-overflow' in done.stderr, done.stderr[-3000:]
