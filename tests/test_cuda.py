"The kernels for a GPU, each time in a process of its own, since Triton chooses at import between GPU and interpreter."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='Triton comes with PyTorch on Linux')


HERE = Path(__file__).parent


def run(*command, **env): return subprocess.run([sys.executable, *command], env=dict(os.environ, **env), capture_output=True, text=True)


def run_cases(**env):
    res = run('-m', 'pytest', '-p', 'no:cacheprovider', HERE/'cuda_cases.py', **env)
    assert res.returncode == 0 and ' passed' in res.stdout and 'skipped' not in res.stdout, res.stdout[-3000:] + res.stderr[-2000:]


def test_under_the_interpreter(): run_cases(TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')


def test_all_kernels_compile_and_sum_without_atomics():
    res = run('-W', 'ignore', HERE/'compile_cases.py', TRITON_INTERPRET='0')
    assert res.returncode == 0 and res.stdout == 'all\n', res.stdout[-500:] + res.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(): run_cases(TRITON_INTERPRET='0')
