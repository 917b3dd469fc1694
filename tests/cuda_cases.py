"The kernels for a GPU against the reference. `test_cuda.py` runs these: on a GPU, and by Triton's interpreter."
import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_cpu import DTYPES, SLOPES, inputs
from test_cpu import test_parameters_of_another_dtype_are_rounded_as_the_input_is as rounded
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from learned_relu import batchnorm
from learned_relu.batchnorm import bn_learned_relu, fuse_bn
from learned_relu.bench.speed import saved_bytes
from learned_relu.functional import learned_relu, learned_relu_gradients
from learned_relu.kernels import tiles, triton
from learned_relu.layers import GeneralRelu, LearnedRelu
from learned_relu.reference import learned_relu_reference

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda'
DTYPES = [*DTYPES, torch.float16]
SHAPES = [((3, 5), 1), ((2, 5, 3, 3), 1), ((2, 3, 70), 1), ((2, 3, 8, 9), 1), ((3, 4, 17), 0), ((2, 2, 2, 2, 3), 3)]
SLOW = DEVICE == 'cpu'  # the interpreter, which gets the larger shapes in two dtypes, and smaller ones for finite differences
KINDS = [(*o, d) for o in SHAPES for d in ([torch.float32, torch.bfloat16] if SLOW and o not in SHAPES[:2] else DTYPES)]


@pytest.fixture
def big(monkeypatch):
    "Places are counted as in inputs of more than 2^31 elements"
    monkeypatch.setattr(tiles, 'BIG', 0)
    tiles._ways.clear()
    yield
    tiles._ways.clear()


@pytest.fixture
def small(monkeypatch):
    "Tiles so small that even these inputs have many, and programs so few that each has several"
    monkeypatch.setattr(tiles, 'SIZE', 128)
    monkeypatch.setattr(tiles, 'SUM_SIZE', 128)
    monkeypatch.setattr(tiles, 'PROGRAMS', 6)
    tiles._ways.clear()
    yield
    tiles._ways.clear()


def given(*args): return [None if o is None else o.detach().to(DEVICE).requires_grad_() for o in args]


def as_the_reference(shape, channel_dim, num, slope, dtype, last):
    x, *ps = given(*inputs(shape, channel_dim, num, slope, last, dtype))
    y, g = learned_relu(x, *ps, channel_dim, impl='kernel'), torch.randn_like(x)
    exact = [o.detach().double().requires_grad_() for o in (x, *ps)]
    want = learned_relu_reference(*exact, channel_dim)
    assert y.stride() == x.stride() and y.dtype == dtype
    assert_close(y, want.to(dtype))
    if dtype in (torch.float32, torch.float64): assert torch.equal(y, learned_relu_reference(x, *ps, channel_dim))
    grads = torch.autograd.grad(y, [x, *ps], g)
    for a, b in zip(grads, torch.autograd.grad(want, exact, g.double()), strict=True): assert_close(a, b.to(dtype))
    for a, b in zip(grads, learned_relu_gradients(g, x, *ps, channel_dim), strict=True): assert torch.equal(a, b), 'the same numbers again'
    ps[0].requires_grad_(False)  # so that output and signs are kept
    less = learned_relu(x, *ps, channel_dim, impl='kernel')
    assert torch.equal(less, y) and not less.grad_fn.how.whole
    for a, b in zip(torch.autograd.grad(less, [x, *ps[1:]], g), (grads[0], *grads[2:]), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('shape,channel_dim,dtype', KINDS)
def test_values_and_gradients_are_those_of_the_reference(shape, channel_dim, per_channel, dtype):
    for last in (False, True) if len(shape) == 4 and channel_dim == 1 else (False,):
        as_the_reference(shape, channel_dim, shape[channel_dim] if per_channel else 1, 'some', dtype, last)


@pytest.mark.parametrize('slope', SLOPES)
def test_slopes(slope):
    for last in False, True: as_the_reference((2, 4, 3, 5), 1, 4, slope, torch.float32, last)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('shape,last', [((7, 3, 11, 13), False), ((7, 3, 11, 13), True), ((5, 70, 3, 3), True)])
def test_many_tiles(shape, last, per_channel, dtype, small):
    as_the_reference(shape, 1, shape[1] if per_channel else 1, 'some', dtype, last)
    way = next(iter(tiles._ways.values()))
    assert way.sum_per > 1 and way.chunks > 1, 'several tiles a program, several programs a channel'


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('dtype,other', [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32),
                                         (torch.float16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)])
def test_parameters_of_another_dtype(dtype, other, last): rounded(dtype, other, (2, 20, 3, 3), last, DEVICE)


@pytest.mark.parametrize('last', [False, True])
def test_places_in_64_bits(last, small, big):
    as_the_reference((3, 20, 3, 5), 1, 20, 'some', torch.float32, last)
    as_the_two_apart((3, 20, 3, 5), torch.float32, last)


def test_more_channels_than_a_grid_takes():
    x = torch.randn(tiles.GROUPS + 1, 3, device=DEVICE)
    ps = [torch.rand(len(x), device=DEVICE, requires_grad=True) for _ in range(3)]
    assert tiles.way_for(x, 0, len(x)) is None and tiles.way_for(x[1:], 0, len(x) - 1) is not None
    assert torch.equal(learned_relu(x, *ps, 0), learned_relu_reference(x, *ps, 0))


@pytest.mark.parametrize('learns', [True, False])
@pytest.mark.parametrize('shape,last', [((2, 3), False), ((1, 3, 2, 2), True)] if SLOW else [((3, 5), False), ((2, 3, 2, 3), True)])
def test_gradients_are_those_of_finite_differences(shape, last, learns):
    args = given(*inputs(shape, 1, shape[1], 'some', last))
    args[1].requires_grad_(learns)
    def curve(*args): return learned_relu(*args, impl='kernel')
    assert gradcheck(curve, args) and gradgradcheck(curve, args)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_corners(dtype):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[-inf, inf, nan, -2., 3., 0.]], device=DEVICE, dtype=dtype).requires_grad_()
    for leak, want in (0., [-1., 2., nan, -1., 2., -1.]), (.5, [-inf, 2., nan, -2., 2., -1.]):
        for learns in (True, False):
            ps = [torch.tensor(o, device=DEVICE).requires_grad_() for o in (leak, 1., 2.)]
            y = learned_relu(x, ps[0].requires_grad_(learns), *ps[1:], impl='kernel')
            assert_close(y, torch.tensor([want], device=DEVICE, dtype=dtype), equal_nan=True)
            dx, dmaxv = torch.autograd.grad(y.sum(), [x, ps[2]])
            assert torch.equal(dx.cpu(), torch.tensor([[leak, 0., leak, leak, 0., leak]], dtype=dtype)) and dmaxv.item() == 2


@pytest.mark.parametrize('which', range(3))
def test_nan_in_a_parameter_is_seen(which):
    x = torch.tensor([[-2., 3., 3.], [3., -2., 3.]], device=DEVICE)
    ps = [torch.full((3,), o, device=DEVICE) for o in (.1, .25, 1.)]
    ps[which][1] = torch.nan
    for grad in False, True:
        y = learned_relu(x, *(o.clone().requires_grad_(grad) for o in ps), impl='kernel')
        assert y.isnan().tolist() == [[False, which > 0, False], [False, True, False]]


def test_nothing_and_gradients_that_lie_otherwise():
    empty = torch.zeros(0, 6, device=DEVICE, requires_grad=True)
    assert learned_relu(empty, *torch.ones(3, 6, device=DEVICE)).shape == (0, 6)
    x, *ps = given(*inputs((2, 6, 9, 9), 1, 6, 'some', True, torch.float32))
    for g in torch.randn(2, 6, 9, 9, device=DEVICE), torch.randn((), device=DEVICE).expand(2, 6, 9, 9):
        got, want = (torch.autograd.grad(o, [x, *ps], g) for o in (learned_relu(x, *ps, impl='kernel'), learned_relu_reference(x, *ps)))
        for a, b in zip(got, want, strict=True): assert_close(a, b)


def net(act, dtype=torch.float32, last=False):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), act, nn.Conv2d(16, 16, 3)).to(DEVICE, dtype)
    if isinstance(act, LearnedRelu) and act.leak.requires_grad: fuse_bn(model[1], model[2])
    return model.to(memory_format=torch.channels_last) if last else model


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_as_small_as_relu_in_place(dtype, last):
    x = torch.randn(2, 3, 18, 18, device=DEVICE, dtype=dtype)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    relu = saved_bytes(net(nn.ReLU(inplace=True), dtype, last), x)
    for act in GeneralRelu(), LearnedRelu(16, learn=('sub', 'maxv')), LearnedRelu(16, leak=0.):
        assert saved_bytes(net(act, dtype, last), x) <= 1.05*relu
    m, two = (nn.Sequential(nn.BatchNorm2d(16), o).to(DEVICE, dtype) for o in (LearnedRelu(16), nn.ReLU()))
    fuse_bn(*m)
    x = torch.randn(2, 16, 16, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    assert saved_bytes(m, x) <= .55*saved_bytes(two, x)


def test_what_is_kept():
    x, *ps = given(*inputs((2, 6, 8, 8), 1, 6, 'some', False, torch.float32))
    for learns, kept in (True, x.nbytes), (False, x.nbytes + x.nbytes//32):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = learned_relu(x, ps[0].requires_grad_(learns), *ps[1:], impl='kernel')
        large = [t for t in saved if t.numel() > 6]
        assert sum(t.nbytes for t in large) == kept and large[0].data_ptr() == (x if learns else y).data_ptr()


def fused_and_apart(shape, dtype, last, training=True, affine=True, running=True, mixed=False, **kwargs):
    n, wide = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    own = wide if mixed else dtype
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64)*2 + 1).to(dtype)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    w, b = (torch.linspace(.5, 1.5, n).to(own), torch.linspace(-.3, .3, n).to(own)) if affine else (None, None)
    ps = [o.to(own) for o in (torch.arange(n) % 3*.1, torch.linspace(-.2, .4, n), torch.linspace(.4, 1.2, n))]
    stats = [torch.linspace(.5, 1.5, n).to(own).to(DEVICE), torch.linspace(2, 5, n).to(own).to(DEVICE)] if running else [None, None]
    args, exact = given(x, w, b, *ps), [None if o is None else o.detach().double().to(DEVICE).requires_grad_() for o in (x, w, b, *ps)]
    mine, theirs = ([None if o is None else f(o) for o in stats] for f in (torch.clone, lambda o: o.double()))
    assert batchnorm.normed_layout(args[0], *mine, *args[1:3])[0].__name__.endswith('triton_batchnorm')
    y = bn_learned_relu(args[0], *mine, *args[1:], training=training, **kwargs)
    h = F.batch_norm(exact[0], *theirs, *exact[1:3], training, **kwargs)
    return args, exact, mine, theirs, y, h, learned_relu_reference(h, *exact[3:])


def as_the_two_apart(shape, dtype, last, **kwargs):
    args, exact, mine, theirs, y, h, want = fused_and_apart(shape, dtype, last, **kwargs)
    assert y.stride() == args[0].stride() and y.dtype == dtype
    exactly = dtype in (torch.float32, torch.float64)
    loose = {torch.float32: dict(rtol=1e-4, atol=1e-5), torch.float64: {}}.get(dtype, dict(rtol=4e-2, atol=4e-2))
    assert_close(y, want.to(dtype), **loose)
    for a, b in zip(mine, theirs, strict=True):
        if a is not None: assert_close(a, b.to(a.dtype), **{} if exactly else dict(rtol=1e-2, atol=1e-2))
    line = [1, -1] + [1]*(len(shape) - 2)
    z = learned_relu_reference(h, *exact[3:5], torch.tensor(torch.inf, device=DEVICE, dtype=torch.float64)) - exact[5].reshape(line)
    near = 1e-4 if exactly else 5e-2
    g = torch.randn(shape, device=DEVICE).to(dtype).masked_fill((h.abs() < near) | (z.abs() < near), 0)  # at the kinks rounding decides
    some, all_of = [o for o in args if o is not None], [o for o in exact if o is not None]
    got = torch.autograd.grad(y, some, g)
    for a, b, p in zip(got, torch.autograd.grad(want, all_of, g.double()), some, strict=True):
        scale = b.abs().max().clamp_min(1e-3)
        assert a.shape == p.shape and a.dtype == p.dtype
        assert_close(a.double()/scale, b/scale, **(dict(rtol=1e-9, atol=1e-10) if dtype == torch.float64 else loose))


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
def test_batchnorm_and_curve_as_the_two_apart(dtype, training, last):
    as_the_two_apart((3, 5, 3, 5), dtype, last, training=training)
    if dtype in (torch.bfloat16, torch.float16): as_the_two_apart((3, 5, 3, 5), dtype, last, training=training, mixed=True)


KWARGS = [dict(affine=False), dict(running=False), dict(eps=.1, momentum=.5), dict(momentum=1.), dict(momentum=0.)]


@pytest.mark.parametrize('kwargs', KWARGS, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_every_kind_of_batchnorm(dtype, kwargs): as_the_two_apart((4, 5, 6), dtype, False, **kwargs)


LARGER = [((7, 5), False), ((5, 3, 11, 13), False), ((5, 3, 11, 13), True), ((2, 70, 3, 3), True), ((2, 3, 2, 5, 6), False)]


@pytest.mark.parametrize('shape,last', LARGER)
def test_many_tiles_with_batchnorm(shape, last, small):
    for dtype in torch.float32, torch.bfloat16: as_the_two_apart(shape, dtype, last)


def test_cumulative_statistics_and_half_precision_in_a_model():
    one = nn.Sequential(nn.BatchNorm2d(4, momentum=None), LearnedRelu(4)).to(DEVICE)
    two = copy.deepcopy(one)
    fuse_bn(*two)
    for dtype in torch.float32, torch.float32, torch.bfloat16:
        x = torch.randn(5, 4, 3, 3, device=DEVICE).to(dtype)
        assert_close(one(x), two(x), **dict(rtol=0, atol=2**-6) if dtype == torch.bfloat16 else {})  # one step before it is shifted
    for a, b in zip(one.buffers(), two.buffers(), strict=True): assert_close(a, b)
    assert_close(one.eval()(x), two.eval()(x), rtol=0, atol=2**-6)


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('eps', [0., 1e-5])
def test_what_hardly_varies(last, eps, small):
    n = 5
    x = torch.linspace(.1, 1000, n).reshape(1, n, 1, 1).expand(4, n, 5, 9)
    fmt = torch.channels_last if last else torch.contiguous_format
    flat = x.contiguous(memory_format=fmt).to(DEVICE).requires_grad_()
    rm, rv = torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE)
    ps = torch.tensor([.1, .2, 1.], device=DEVICE)
    y = bn_learned_relu(flat, rm, rv, None, None, *ps, training=True, eps=eps)
    assert rv.isfinite().all() and (rv - .9).abs().max() < 1e-6
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), flat)[0].isfinite().all()
    torch.manual_seed(0)
    far = (x + torch.randn(4, n, 5, 9)*.01).contiguous(memory_format=fmt).to(DEVICE)  # squares alone would tell nothing
    kernels, way = batchnorm.normed_layout(far)
    mean, var = kernels.normed_stats(far, way)
    exact = far.double()
    assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=0)
    assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_the_same_again_with_batchnorm_and_gradients_that_lie_otherwise(dtype, last, small):
    args = fused_and_apart((3, 20, 3, 5), dtype, last)[0]
    some = [o for o in args if o is not None]
    def back(g): return torch.autograd.grad(bn_learned_relu(args[0], None, None, *args[1:], training=True), some, g)
    one, g = torch.tensor(.5, device=DEVICE, dtype=dtype), torch.randn(3, 20, 5, 3, device=DEVICE).to(dtype).mT
    for given, plain in ((one.expand(args[0].shape), one.repeat(args[0].shape)), (g, g.contiguous())):
        for a, b, c in zip(back(given), back(given), back(plain), strict=True): assert torch.equal(a, b) and torch.equal(a, c)
    assert bn_learned_relu(args[0][:0], *torch.ones(2, 20, device=DEVICE), *args[1:]).shape == (0, 20, 3, 5)


@pytest.mark.filterwarnings('ignore:overflow encountered in cast')  # NumPy's, of the interpreter
@pytest.mark.parametrize('last', [False, True])
def test_a_mean_far_away_in_half_precision(last):
    "Beyond the ends of a tile it is normalised to infinity"
    x = torch.full((3, 4, 3, 3), 1000., device=DEVICE, dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    ps = [torch.full((4,), o, device=DEVICE, requires_grad=True) for o in (.05, .25, 10.)]
    y = bn_learned_relu(x, None, None, None, None, *ps, training=True)
    assert all(o.isfinite().all() for o in torch.autograd.grad(y.sum(), [x, *ps]))


def test_second_derivatives_with_batchnorm():
    torch.manual_seed(0)
    args = given(*(o.double() for o in (torch.randn(3, 2, 3), torch.ones(2), torch.zeros(2), *inputs((3, 2), 1, 2, 'some')[1:])))
    def f(*args): return bn_learned_relu(args[0], None, None, *args[1:], training=True)
    assert gradcheck(f, args, fast_mode=True) and gradgradcheck(f, args, fast_mode=True)


def test_a_running_statistic_that_changed_is_noticed():
    x, ps = torch.randn(3, 2, 4, device=DEVICE, requires_grad=True), torch.tensor([.1, .2, 1.], device=DEVICE)
    stats = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    y = bn_learned_relu(x, *stats, None, None, *ps)
    bn_learned_relu(x, *stats, None, None, *ps, training=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.sum().backward()


def test_kernels_started(monkeypatch):
    "One forward and one back beside a sum, three and two with a BatchNorm"
    started, real = [], tiles.Launch.__call__
    monkeypatch.setattr(tiles.Launch, '__call__', lambda self, *args, **kwargs: started.append(self.kernel) or real(self, *args, **kwargs))
    def count(f):
        del started[:]
        res = f()
        return len(started), res
    x, *ps = given(*inputs((2, 3, 4, 4), 1, 3, 'some', False, torch.float32))
    assert triton.works(x.device)  # which tries two once
    for f, want in ((lambda: learned_relu(x, *ps), (1, 1)), (lambda: bn_learned_relu(x, None, None, None, None, *ps, training=True), (3, 2))):
        n, y = count(f)
        m, _ = count(lambda: torch.autograd.grad(y.sum(), [x, *ps]))  # noqa: B023
        assert (n, m) == want


def test_where_triton_fails_it_is_said_once(monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('Failed to find C compiler')
    triton.works.cache_clear()
    monkeypatch.setattr(triton, 'forward', broken)
    x, *ps = given(*inputs((2, 3, 4, 4), 1, 3))
    with pytest.warns(UserWarning, match='because Triton failed: RuntimeError: Failed to find C compiler') as seen: y = learned_relu(x, *ps)
    assert len(seen) == 1 and torch.equal(y, learned_relu_reference(x, *ps))
    with warnings.catch_warnings(): warnings.simplefilter('error'); learned_relu(x, *ps)
    assert batchnorm.normed_layout(x) is None
    triton.works.cache_clear()


def in_a_loop(model):
    x = torch.randn(8, 16, 9, 9, device='cuda', requires_grad=True)
    g, inputs = torch.randn_like(x), [x, *model.parameters()]
    return lambda: torch.autograd.grad(model(x), inputs, g)


def models():
    fused = nn.Sequential(nn.BatchNorm2d(16), LearnedRelu(16, maxv=1.)).cuda()
    fuse_bn(*fused)
    return LearnedRelu(16, maxv=1.).cuda(), fused, LearnedRelu(16, learn=('sub', 'maxv')).cuda()


if DEVICE == 'cuda':  # the interpreter has no streams
    from learned_relu.bench.fits import fit_rows, learners_of
    from learned_relu.bench.full import FORMATS

    @pytest.mark.parametrize('i', range(3))
    def test_nobody_waits_for_the_gpu_and_graphs_replay(i):
        step = in_a_loop(models()[i])
        want = step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try: step()
        finally: torch.cuda.set_sync_debug_mode('default')
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side): step()
        side.synchronize()
        with torch.cuda.graph(graph): got = step()
        for o in got: o.zero_()
        graph.replay()
        for a, b in zip(got, want, strict=True): assert torch.equal(a, b)

    @pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
    def test_compiled(mode):
        for model in models():
            torch.manual_seed(0)
            step = in_a_loop(model)
            want = step()
            model.compile(mode=mode)
            for _ in range(3): got = [o.clone() for o in step()]
            for a, b in zip(got, want, strict=True): assert_close(a, b, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize('layout', FORMATS)
    def test_fits_with_all_callbacks_are_timed(dtype, layout):
        learners = learners_of('xresnet18', 32, 4, 'cuda', dtype, FORMATS[layout], steps=2)
        before = [copy.deepcopy(o.model) for o in learners.values()]
        assert (fit_rows(learners, 1).seconds > 0).all()
        for learn, old in zip(learners.values(), before, strict=True):
            assert any(not torch.equal(a, b) for a, b in zip(learn.model.parameters(), old.parameters(), strict=True)), 'it was trained'

    def test_kernels_as_the_profiler_counts_them():
        x, *ps = given(*inputs((4, 8, 16, 16), 1, 8, 'some', False, torch.float32))
        def count(f):
            f()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen: f(); torch.cuda.synchronize()
            return sum(o.count for o in seen.key_averages() if o.device_type == torch.autograd.DeviceType.CUDA)
        for f, want in ((lambda: learned_relu(x, *ps), (1, 2)), (lambda: bn_learned_relu(x, None, None, None, None, *ps, training=True), (3, 3))):
            y = f()
            g = torch.randn_like(y)
            assert (count(f), count(lambda: torch.autograd.grad(y, [x, *ps], g, retain_graph=True))) == want  # noqa: B023

    def test_addresses_that_are_no_multiples_of_16():
        for shift in 0, 1, 0, 2:
            x, *ps = (torch.randn(n + shift, device='cuda')[shift:].view(s) for n, s in ((2*16*81, (2, 16, 9, 9)), *[(16, (16,))]*3))
            assert torch.equal(learned_relu(x, *ps), learned_relu_reference(x, *ps))

    def test_more_elements_than_32_bits_count():
        x = torch.empty(2**31 + 2**20, device='cuda', dtype=torch.bfloat16).uniform_(-1, 1).view(2, -1)
        for channel_dim, num in ((0, 2), (1, 1)):
            ps = [torch.full((num,), o, device='cuda', requires_grad=True) for o in (.5, .25, .5)]
            y = learned_relu(x.requires_grad_(), *ps, channel_dim)
            dx, dsub = torch.autograd.grad(y, [x, ps[1]], torch.ones((), device='cuda', dtype=x.dtype).expand(x.shape))
            for o in (slice(0, 2**20), slice(-2**20, None)):
                part, few = x.detach()[:, o], [p.detach() for p in ps]
                assert_close(y[:, o], learned_relu_reference(part, *few, channel_dim), rtol=1e-2, atol=1e-2)
                assert torch.equal(dx[:, o] == .5, (part <= 0) & (y[:, o] < .5))
            assert_close(dsub.sum().double(), -(y < .5).sum().double(), rtol=1e-4, atol=0)
            del y, dx
