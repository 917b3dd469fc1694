"The kernels over shapes, layouts, dtypes and slopes, for `test_sanitizers.py`: whatever they read or write beside their tensors ends the process."
# ruff: noqa: E402, I001
import os
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryFile

from learned_relu.kernels import build
from learned_relu.kernels import node as room

FLAGS = [o for o in build._flags() if o != '-O3']
build._flags = lambda: [*FLAGS, '-O0']  # with judges in every line more would take minutes
room.command = lambda made=room.command: ['-O0' if o == '-O1' else o for o in made()]
if sys.argv[1:] == ['compile']:
    from learned_relu.kernels.dispatch import node
    build.compiled(os.environ['CXX'])
    if Path(sysconfig.get_path('include'), 'Python.h').exists(): node.compile()
    sys.exit(0)

import torch
from test_cpu import DTYPES, SHAPES, SLOPES, inputs

from learned_relu.batchnorm import bn_learned_relu
from learned_relu.functional import learned_relu
from learned_relu.kernels.dispatch import node

MORE = [((1, 1), 1), ((2, 8, 8, 8), 1), ((2, 7, 65), 1), ((33, 2100), 1), ((3, 4100), 0), ((70, 16, 2, 2), 1)]


def curve_cases():
    for shape, dim in SHAPES + MORE:
        for dtype in DTYPES:
            for slope in SLOPES:
                for last in (False, True) if len(shape) == 4 and dim == 1 else (False,):
                    for num in 1, shape[dim]:
                        x, *ps = inputs(shape, dim, num, slope, last, dtype)
                        y = learned_relu(x, *ps, dim, impl='kernel')
                        torch.autograd.grad(y, [x, *ps], torch.randn_like(x))
                        with torch.no_grad(): learned_relu(x, *ps, dim, impl='kernel')
                        yield


def batchnorm_cases():
    for shape in [s for s, dim in SHAPES + MORE if dim == 1 and len(s) > 1 and s[0]*s[-1] > 1]:
        for dtype in torch.float32, torch.float64:
            for last in (False, True) if len(shape) == 4 else (False,):
                for training in True, False:
                    x, *ps = inputs(shape, 1, shape[1], 'some', last, dtype)
                    stats = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
                    weight = [torch.rand(shape[1], dtype=dtype, requires_grad=True) for _ in range(2)]
                    y = bn_learned_relu(x, *stats, *weight, *ps, training=training)
                    torch.autograd.grad(y, [x, *weight, *ps], torch.randn_like(x))
                    yield


def told(fault):
    "What the judges say of a fault, in a process of its own: one element too few, or no channel to divide by"
    x, ps = torch.randn(40, 8), [torch.ones(8) for _ in range(3)]
    at = {k: p.data_ptr() for k, p in zip(('leak', 'sub', 'maxv'), ps, strict=True)}
    y, channels = torch.empty(39*8), 0 if fault == 'undefined' else 8
    call = build.Call(x=x.data_ptr(), y=y.data_ptr(), numel=320, channels=channels, inner=1, repeat=1, **at)
    with TemporaryFile() as file:
        if (pid := os.fork()) == 0:
            os.dup2(file.fileno(), 2)
            build.run('forward', x.dtype, call)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        file.seek(0)
        return f'{fault} {status} ' + ' '.join(file.read().decode().split())


if __name__ == '__main__':
    assert build.kernels() is not None
    for fault in 'beside', 'undefined': print(told(fault), flush=True)
    cases = sum(1 for cases in (curve_cases, batchnorm_cases) for _ in cases())
    print(cases, 'cases', 'with a node' if node.curve.__name__ == 'curve' else 'without')
