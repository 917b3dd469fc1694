"The kernels for a CPU: against the reference in every layout, what they keep, and what happens where there are none."
import os
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from learned_relu.bench.speed import saved_bytes
from learned_relu.functional import learned_relu, learned_relu_gradients
from learned_relu.kernels import build, cpu, layout
from learned_relu.kernels.library import shelf
from learned_relu.layers import GeneralRelu, LearnedRelu
from learned_relu.reference import learned_relu_reference

pytestmark = pytest.mark.skipif(build.kernels() is None, reason='needs Linux and a C++ compiler')
node_possible = pytest.mark.skipif(build.kernels() is None or not (Path(sysconfig.get_path('include'))/'Python.h').exists(),
                                   reason='needs Linux, a C++ compiler and Python.h')
SLOPES = dict(usual=lambda n: torch.linspace(.05, .3, n), zero=torch.zeros, some=lambda n: torch.arange(n) % 3*.1,
              first=lambda n: (torch.arange(n) > 0)*.1, below=lambda n: -torch.ones(n)*.1)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def inputs(shape, channel_dim, num, slope='usual', last=False, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    ps = [SLOPES[slope](num), torch.linspace(-.2, .4, num), torch.linspace(.4, 1.2, num)]
    line = [1]*len(shape)
    line[channel_dim] = -1
    kink = (ps[1] + ps[2]).reshape(line if num > 1 else (1,)*len(shape))
    for k in (torch.zeros(()), kink): x = torch.where((x - k).abs() < 1e-2, k + 2e-2, x)  # no ties, also when rounded
    x = x.to(dtype)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), *(p.to(dtype).requires_grad_() for p in ps)


SHAPES = [((3, 5), 1), ((2, 20, 3, 3), 1), ((2, 3, 70), 1), ((2, 11, 8, 8), 1), ((2, 9, 8, 9), 1),
          ((3, 4, 17), -1), ((3, 4, 70), 0), ((2, 2, 2, 2, 3), 3)]


@pytest.mark.parametrize('slope', SLOPES)
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('shape,channel_dim', SHAPES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_values_and_gradients_are_those_of_the_reference(shape, channel_dim, per_channel, slope, dtype):
    for last in (False, True) if len(shape) == 4 and channel_dim == 1 else (False,):
        x, *ps = inputs(shape, channel_dim, shape[channel_dim] if per_channel else 1, slope, last, dtype)
        y, g = learned_relu(x, *ps, channel_dim, impl='kernel'), torch.randn_like(x)
        exact = [o.detach().double().requires_grad_() for o in (x, *ps)]
        want = learned_relu_reference(*exact, channel_dim)
        assert_close(y, want.to(dtype))
        if dtype != torch.bfloat16: assert torch.equal(y, learned_relu_reference(x, *ps, channel_dim))
        for a, b in zip(torch.autograd.grad(y, [x, *ps], g), torch.autograd.grad(want, exact, g.double()), strict=True): assert_close(a, b.to(dtype))


@pytest.mark.parametrize('slope', SLOPES)
@pytest.mark.parametrize('shape,last', [((1, 20, 2, 1), False), ((1, 20, 2, 1), True), ((2, 3, 8, 8), False), ((2, 3, 8, 8), True), ((2, 20), False)])
def test_gradients_are_those_of_finite_differences_whatever_is_kept(shape, last, slope):
    args = inputs(shape, 1, shape[1], slope, last)
    def curve(*args): return learned_relu(*args, impl='kernel')
    assert gradcheck(curve, args) and gradgradcheck(curve, args)


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('shape', [(2, 20, 8, 9), (2, 20, 3, 3)])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('other', DTYPES)
def test_parameters_of_another_dtype_are_rounded_as_the_input_is(dtype, other, shape, last, device='cpu'):
    x, leak, sub, maxv = [o.detach().to(device) for o in inputs(shape, 1, 20, last=last, dtype=dtype)]
    leak, sub, maxv = ((p.double()*1.001).to(other) for p in (leak, sub, maxv))  # half precision does not hold these
    ps = [leak, sub[:1].expand(20), torch.stack([maxv, maxv], 1)[:, 0]]
    g = torch.randn_like(x)
    def results(*args):
        args = [o.requires_grad_() for o in args]
        y = learned_relu(*args, impl='kernel')
        return y, *torch.autograd.grad(y, args, g)
    got, want = results(x, *ps), results(x, *(p.to(dtype) for p in ps))
    for a, b in zip(got[:2], want[:2], strict=True): assert torch.equal(a, b)
    for p, a, b in zip(ps, got[2:], want[2:], strict=True):
        assert a.dtype == other and a.shape == p.shape
        assert torch.equal(a.to(dtype), b) or torch.equal(a, b.to(other)), 'summed once, rounded as the parameter'


@pytest.mark.tried('random inputs, their values and gradients', 100)
@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(1, 13), min_size=1, max_size=4), data=st.data(), last=st.booleans(), slope=st.sampled_from(list(SLOPES)))
def test_any_shape(shape, data, last, slope):
    dim = data.draw(st.integers(0, len(shape) - 1))
    x, *ps = inputs(shape, dim, data.draw(st.sampled_from([1, shape[dim]])), slope, last and len(shape) == 4)
    g = torch.randn_like(x)
    got, want = ([f(x, *ps, dim), *torch.autograd.grad(f(x, *ps, dim), [x, *ps], g)] for f in (learned_relu, learned_relu_reference))
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True): assert_close(a, b)


@pytest.mark.parametrize('impl', ['kernel', 'eager'])
@pytest.mark.parametrize('high', [1., 3.])  # the cap is at 1
def test_gradients_lie_as_optimizers_want_them(impl, high):
    ps = [nn.Parameter(torch.tensor(o).expand(1).clone()) for o in (.1, .2, 1.)]  # of which the stride is 0
    assert ps[0].stride() == (0,) and LearnedRelu().leak.stride() == (1,)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learned_relu(torch.linspace(-1, high, 6).view(2, 3), *ps, impl=impl).sum().backward()
    assert all(p.grad.stride() == (1,) for p in ps)


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('num', [1, 64])
def test_many_threads_and_a_gradient_in_another_layout(last, num):
    x, *ps = inputs((8, 64, 30, 30), 1, num, 'some', last, torch.float32)
    g = torch.randn(8, 64, 30, 30)
    exact = [o.detach().double().requires_grad_() for o in (x, *ps)]
    want = torch.autograd.grad(learned_relu_reference(*exact), exact, g.double())
    n = torch.get_num_threads()
    try:
        res = []
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            res.append(torch.autograd.grad(learned_relu(x, *ps, impl='kernel'), [x, *ps], g))
    finally: torch.set_num_threads(n)
    for a, b in zip(res[0], want, strict=True): assert_close(a, b.float(), rtol=1e-5, atol=1e-3)
    for other in res[1:]:
        for a, b in zip(res[0], other, strict=True): assert torch.equal(a, b), 'the same numbers whatever the number of threads'


@pytest.mark.parametrize('last', [False, True])
def test_as_small_as_relu_in_place(last):
    def net(act): return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), act, nn.Conv2d(32, 32, 3))
    x = torch.randn(4, 3, 34, 34).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    relu, learned, fixed = (saved_bytes(net(o).to(memory_format=torch.channels_last if last else torch.contiguous_format), x)
                            for o in (nn.ReLU(inplace=True), LearnedRelu(32), GeneralRelu()))
    assert learned <= 1.05*relu and fixed <= 1.05*relu
    some = LearnedRelu(32, leak=(torch.arange(32) >= 8)*.05)
    assert saved_bytes(net(some), x) - learned < 1.1*4*4*32*32*32/4, 'a quarter of the channels has a slope of 0'


def test_what_is_kept_is_the_output_and_a_bit():
    layer, x = LearnedRelu(4), torch.randn(2, 4, 16, 16, requires_grad=True)
    y = layer(x)
    assert saved_bytes(layer, x) == y.nbytes + y.nbytes//32
    x.data.zero_()  # the input may be overwritten
    y.sum().backward()
    assert x.grad.unique().numel() == 2
    z = layer(torch.randn(2, 4, 16, 16))
    z.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): z.sum().backward()


def test_nothing_is_kept_without_gradients():
    layer, x = LearnedRelu(4).requires_grad_(False), torch.randn(2, 4, 16, 16)
    assert saved_bytes(layer, x) == 0
    with torch.no_grad(): assert not LearnedRelu(4)(x).requires_grad


@pytest.mark.parametrize('x', [torch.zeros(2, 3, 4, 8)[..., ::2], torch.zeros(2, 3).half(), torch.zeros(0, 3),
                               torch.zeros(1, 3).expand(4, 3), torch.zeros(3, 2).T])
def test_what_no_kernel_takes_goes_another_way(x):
    assert cpu.plan(x, tuple(torch.ones(3, 3)), 1, 3) is None
    y = learned_relu(x, *(torch.full((3,), o) for o in (.1, .2, 1.)))
    assert y.shape == x.shape and y.dtype == x.dtype


@pytest.mark.parametrize('curve', [learned_relu, learned_relu_reference])
def test_tensors_without_memory(curve):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        x, ps = torch.zeros(2, 3), [torch.full((3,), o, requires_grad=True) for o in (.1, .2, 1.)]
        assert curve(x, *ps).shape == (2, 3)
    x, ps = torch.zeros(2, 3, device='meta'), [torch.zeros(3, device='meta', requires_grad=True) for _ in range(3)]
    curve(x, *ps).sum().backward()
    assert ps[0].grad.shape == (3,)


def test_tensors_of_two_devices_are_refused_by_pytorch():
    with pytest.raises(RuntimeError): learned_relu(torch.zeros(2, 3), *(torch.zeros(3, device='meta') for _ in range(3)))


def test_another_default_device():
    x, *ps = inputs((2, 3, 4, 4), 1, 3)
    def grads():
        first = torch.autograd.grad(learned_relu(x, *ps, impl='kernel').sum(), [x, *ps], create_graph=True)
        return *first, *torch.autograd.grad(first[1].sum(), x), *torch.autograd.grad(learned_relu(x, *ps, impl='kernel').sum(), ps)
    want = grads()
    with torch.device('meta'): got = grads()
    for a, b in zip(got, want, strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_saved_tensors_that_come_back_in_another_layout(dtype):
    x, *ps = inputs((2, 20, 4, 5), 1, 20, 'some', True, dtype)
    g = torch.randn(2, 20, 4, 5).to(dtype)
    want = torch.autograd.grad(learned_relu(x, *ps, impl='kernel'), [x, *ps], g)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
        got = torch.autograd.grad(learned_relu(x, *ps, impl='kernel'), [x, *ps], g)
    for a, b in zip(got, want, strict=True): assert torch.equal(a, b)


def test_a_shape_seen_before_is_checked_and_told_apart_all_the_same():
    x, ps = torch.randn(4, 4, 4), torch.linspace(.1, .4, 4)
    args = ps, ps, torch.full((4,), 1.)
    for _ in range(2):
        for dim in range(3): assert torch.equal(learned_relu(x, *args, dim, impl='kernel'), learned_relu_reference(x, *args, dim))
        with pytest.raises(ValueError, match='sub has 3 values'): learned_relu(x, ps, ps[:3], ps)
        with pytest.raises(ValueError, match='channel_dim is 3'): learned_relu(x, *args, 3)
        with pytest.raises(ValueError, match='no kernel'): learned_relu(x.mT, *args, impl='kernel')


def test_ever_new_shapes_are_not_all_remembered():
    ps = torch.tensor([.1]), torch.tensor([.2]), torch.tensor([1.])
    for n in range(1, 5000): learned_relu(torch.zeros(n), *ps)
    assert 0 < len(layout._layouts) <= 4096


@pytest.mark.parametrize('impl', ['kernel', 'eager'])
def test_many_gradients_at_once(impl):
    x, *ps = inputs((2, 3, 4, 4), 1, 3)
    y, gs = learned_relu(x, *ps, impl=impl), torch.randn(5, 2, 3, 4, 4, dtype=torch.float64)
    got = torch.autograd.grad(y, [x, *ps], gs, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(gs):
        for a, b in zip(got, torch.autograd.grad(y, [x, *ps], g, retain_graph=True), strict=True): assert_close(a[i], b)


def test_gradients_of_another_dtype_or_shape():
    x, *ps = [o.detach() for o in inputs((2, 3, 4, 4), 1, 3, dtype=torch.float32)]
    g = torch.randn(2, 3, 4, 4)
    for a, b in zip(learned_relu_gradients(g.double(), x, *ps), learned_relu_gradients(g, x, *ps), strict=True): assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r'g has shape \(3,\), but x \(10, 3\)'): learned_relu_gradients(g[0, :, 0, 0], torch.zeros(10, 3), *ps)


def test_one_value_for_a_whole_input_in_any_order():
    x, *ps = inputs((2, 3, 4, 5), 1, 1, last=True)
    assert torch.equal(learned_relu(x, *ps, channel_dim=-1, impl='kernel'), learned_relu_reference(x, *ps, channel_dim=-1))


@pytest.fixture
def fresh(monkeypatch, without_node):
    "No kernels loaded, before and after; what is compiled meanwhile is compiled quickly"
    flags = [o for o in build._flags() if o != '-O3']
    monkeypatch.setattr(build, '_flags', lambda: [*flags, '-O0'])
    build.kernels.cache_clear()
    yield
    build.kernels.cache_clear()


def runs_anyway():
    x, *ps = inputs((2, 3, 4, 4), 1, 3)
    assert torch.equal(learned_relu(x, *ps), learned_relu_reference(x, *ps))


def test_without_a_compiler_it_is_said_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path)); monkeypatch.delenv('CXX', raising=False)
    with pytest.warns(UserWarning, match=r'several times slower on a CPU, because there is no C\+\+ compiler') as seen: runs_anyway()
    assert len(seen) == 1
    runs_anyway()
    with pytest.raises(ValueError, match='no kernel'): learned_relu(torch.zeros(2, 3), *[torch.ones(1)]*3, impl='kernel')


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    bad = tmp_path/'cc'
    bad.write_text('#!/bin/sh\necho "no such flag" >&2; exit 1\n'); bad.chmod(0o755)
    monkeypatch.setenv('CXX', str(bad)); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with pytest.warns(UserWarning, match='failed: no such flag'): runs_anyway()
    assert {o.suffix for o in shelf().iterdir()} == {'.lock'}, 'nothing half made is left'


def test_a_directory_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path/'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    with pytest.warns(UserWarning, match='XDG_CACHE_HOME'): runs_anyway()


def test_compiled_once_by_many_at_a_time(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    compiler = os.environ.get('CXX', 'g++')
    with ThreadPoolExecutor(3) as pool: paths = set(pool.map(build.compiled, [compiler]*3))
    assert paths == set(shelf().glob('*.so')) and len(paths) == 1
    made = next(iter(paths)).stat().st_mtime_ns
    build.compiled(compiler)
    assert next(iter(paths)).stat().st_mtime_ns == made
    with warnings.catch_warnings(): warnings.simplefilter('error'); runs_anyway()


def test_a_compiler_with_arguments_and_a_library_of_another(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); monkeypatch.setenv('CXX', f'{os.environ.get("CXX", "g++")} -g0')
    with warnings.catch_warnings(): warnings.simplefilter('error'); runs_anyway()
    assert shelf().stat().st_mode & 0o077 == 0
    build.kernels.cache_clear()
    monkeypatch.setattr(os, 'getuid', lambda: -1)
    with pytest.warns(UserWarning, match='belongs to another user'): runs_anyway()


def test_without_the_openmp_of_pytorch_it_runs_on_one_thread(fresh, monkeypatch):
    def compiled(compiler, openmp, real=build.compiled):
        if openmp: raise OSError('undefined symbol: GOMP_parallel')
        return real(compiler, openmp)
    monkeypatch.setattr(build, 'compiled', compiled)
    with pytest.warns(UserWarning, match='run on one thread, since .* undefined symbol: GOMP_parallel'): runs_anyway()


def test_without_openmp(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    lib = build.compiled(os.environ.get('CXX', 'g++'), openmp=False)
    symbols = lib.read_bytes()
    assert b'GOMP_parallel' not in symbols and b'forward_float' in symbols


def test_one_pool_of_threads():
    code = ('import torch; from learned_relu.functional import learned_relu\n'
            'learned_relu(torch.randn(4, 8, 64, 64), *[torch.ones(8)]*3, impl="kernel")\n'
            'libs = {o for o in open("/proc/self/maps").read().split() if "gomp" in o or "iomp" in o or "libomp" in o}\n'
            'assert len(libs) <= 1, libs')
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('slope', ['usual', 'some', 'zero'])
def test_a_plan_stays_as_it_was_made(slope):
    x, *ps = (o.detach() for o in inputs((2, 5, 3, 3), 1, 5, slope))
    plan = cpu.plan(x, tuple(ps), 1, 5)
    kept, how = cpu.keep(x, plan, True)
    made = bytes(how.call)
    y, signs = cpu.forward(x, how, kept is not x)
    if kept is x: y = signs = None
    first = cpu.backward(torch.ones_like(x), y, signs, kept, how)
    assert bytes(how.call) == made  # two threads may go back through one graph
    assert all(map(torch.equal, first, cpu.backward(torch.ones_like(x), y, signs, kept, how)))
