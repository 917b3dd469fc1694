"Surrogate gradients by hand, what is differentiable by finite differences, corners, and refusals."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_functional import LAYOUTS, SHAPES, laid_out
from torch import tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.testing import assert_close

from learned_relu.surrogate import edge_window, leaky_grad_relu, learned_clip, learned_threshold, surrogate_gradient, symmetric_clip

inf, nan = math.inf, math.nan


def per_channel(*starts, n=3, dtype=torch.float64): return [torch.linspace(o, o + .2, n, dtype=dtype).requires_grad_() for o in starts]


def away_from(x, *edges, gap=1e-3):
    for e in edges: x = torch.where((x - e).abs() < gap, e + 2*gap, x)
    return x.detach().requires_grad_()


CURVES = {'tied': lambda x, a, b, d: learned_clip(x, a, channel_dim=d), 'untied': lambda x, a, b, d: learned_clip(x, a, b, channel_dim=d),
          'low': lambda x, a, b, d: learned_clip(x, a, low=-b, channel_dim=d), 'all': lambda x, a, b, d: learned_clip(x, a, b/2, -b, d),
          'positive': lambda x, a, b, d: learned_clip(x, a - 1, b, channel_dim=d, positive_only=True),
          'symmetric': lambda x, a, b, d: symmetric_clip(x, a, channel_dim=d),
          'threshold': lambda x, a, b, d: learned_threshold(x, a, b, channel_dim=d, width=0.)}
each_curve = pytest.mark.parametrize('curve', CURVES.values(), ids=CURVES)


@each_curve
@pytest.mark.parametrize('layout', LAYOUTS[:3])
@pytest.mark.parametrize('shape,channel_dim', [SHAPES[i] for i in (0, 1, 2, 4, 5, 7, 8)])
def test_gradients_are_those_of_finite_differences(curve, shape, channel_dim, layout):
    a, b = per_channel(.6, .5)
    line = [1]*len(shape)
    line[channel_dim] = -1
    e = (a.reshape(line), b.reshape(line))
    x = away_from(torch.randn(shape, dtype=torch.float64), *e, -e[0], -e[1], e[0] - 1, tensor(0.))
    x = (laid_out(x, layout) if x.numel() else x).detach().requires_grad_()
    assert gradcheck(curve, (x, a, b, channel_dim)) and gradgradcheck(curve, (x, a, b, channel_dim))


@each_curve
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_dtype_layout_and_input_are_kept(curve, dtype, layout):
    x = laid_out(torch.randn(4, 3, 6, 6), layout).to(dtype)
    before = x.clone()
    a, b = per_channel(.6, .5, dtype=torch.float32)
    y = curve(x.requires_grad_(), a, b, 1)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == dtype and y.stride() == before.relu().stride() and torch.equal(x.detach(), before)
    assert a.grad.dtype == torch.float32


@each_curve
def test_nan_passes_and_infinities_are_cut(curve):
    x = tensor([[inf, -inf, nan, 1.]], requires_grad=True)
    a, b = (tensor(o, requires_grad=True) for o in (.6, .5))
    y = curve(x, a, b, 1)
    assert y[0, 2].isnan() and y[0, 0].isnan() == y[0, 1].isnan() == False  # noqa: E712
    assert all(o.isfinite().all() for o in grad(y.sum(), [x, a, b], allow_unused=True) if o is not None)


@pytest.mark.parametrize('curve', [*CURVES.values(), lambda x, a, b, d: learned_clip(x, b, low=a, channel_dim=d)], ids=[*CURVES, 'only low'])
def test_an_edge_that_is_no_number_shows_in_every_form(curve):
    x, (a, b) = torch.randn(2, 3, 4).abs().double(), [o.detach() for o in per_channel(.6, .5)]
    clean, want = curve(x, a, b, 1), torch.zeros(2, 3, 4, dtype=torch.bool)
    want[:, 1] = True
    lost = tensor([a[0], nan, a[2]], dtype=a.dtype)
    def f(x): return curve(x, lost, b, 1)
    for y in f(x), torch.func.jvp(f, (x,), (x,))[0], torch.jit.trace(f, x)(x), torch.compile(f, backend='aot_eager')(x):
        assert torch.equal(y.isnan(), want) and torch.equal(y[~want], clean[~want])


def test_the_gradient_of_an_edge_is_finite_at_infinity_and_nan():
    x, t = tensor([inf, -inf, nan, 1.]), tensor(.6, requires_grad=True)
    assert grad(learned_clip(x, t, tensor(.5), width=1.).sum(), t)[0] == pytest.approx(.5*.6)
    assert grad(learned_threshold(x, t, width=1.).sum(), t)[0] == pytest.approx(-1*.6)


def test_distances_are_taken_in_float32():
    x, t = tensor([1 + 2**-7], dtype=torch.bfloat16), tensor(1., requires_grad=True)
    assert grad(learned_clip(x, t, tensor(0.), width=.1).float().sum(), t)[0] == pytest.approx((1 + 2**-7)*(1 - 2**-7/.1)/.1, rel=1e-3)


def test_the_gradient_of_an_upper_edge_by_hand():
    x, g = tensor([0., .75, 1., 1.25, 3.], requires_grad=True), tensor([1., 10., 100., 1000., 10000.])
    t, v = tensor(1., requires_grad=True), tensor(.5, requires_grad=True)
    y = learned_clip(x, t, v, width=.5)
    assert y.tolist() == [0., .75, .5, .5, .5]
    dx, dt, dv = grad(y, [x, t, v], g)
    # window(d) = (1 - |d|/.5)/.5: 1 at d = .25, 2 at d = 0; jump x - v: .25, .5, .75
    assert dx.tolist() == [1, 10, 0, 0, 0] and dv == 11100 and dt == 10*.25*1 + 100*.5*2 + 1000*.75*1


def test_the_gradient_of_a_threshold_by_hand():
    x, g = tensor([0., .75, 1., 1.25, 3.], requires_grad=True), tensor([1., 10., 100., 1000., 10000.])
    t, v = tensor(1., requires_grad=True), tensor(.5, requires_grad=True)
    y = learned_threshold(x, t, v, width=.5)
    assert y.tolist() == [.5, .5, .5, 1.25, 3.]
    dx, dt, dv = grad(y, [x, t, v], g)
    assert dx.tolist() == [0, 0, 0, 1000, 10000] and dv == 111 and dt == -(10*.25*1 + 100*.5*2 + 1000*.75*1)


def test_a_number_as_value_has_the_precision_of_the_input():
    assert learned_threshold(torch.zeros(1, dtype=torch.float64), tensor(1.), .1).item() == .1


def test_ties_go_to_the_parameters():
    x, t, low = tensor([-1., 1.], requires_grad=True), tensor(1., requires_grad=True), tensor(-1., requires_grad=True)
    assert [o.tolist() for o in grad(learned_clip(x, t, low=low).sum(), [x, t, low])] == [[0, 0], 1, 1]
    assert [o.tolist() for o in grad(symmetric_clip(x, t).sum(), [x, t])] == [[0, 0], 0]  # +1 from above, -1 from below


def test_only_positive_inputs_are_clipped():
    x, t = tensor([-2., -.5, .5]), tensor(-1.)
    assert learned_clip(x, t).tolist() == [-2, -1, -1] and learned_clip(x, t, positive_only=True).tolist() == [-2, -.5, -1]
    t = tensor(0., requires_grad=True)
    x = tensor([-.1, .1])
    assert grad(learned_clip(x, t, tensor(1.), width=1., positive_only=True).sum(), t)[0] == pytest.approx((.1 - 1)*.9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_parameter_gradients_are_summed_in_float32(dtype):
    t, v = (tensor(o, requires_grad=True) for o in (.5, .25))
    learned_clip(torch.ones(1, 1, 300, 300, dtype=dtype), t, v, width=1.).sum().backward()
    assert v.grad == 90_000 and t.grad == 90_000*.75*.5
    one = torch.zeros((), requires_grad=True)
    surrogate_gradient(torch.ones(300, 300, dtype=dtype), one).sum().backward()
    assert one.grad == 90_000


@settings(max_examples=100, deadline=None)
@given(width=st.floats(.01, 10), at=st.floats(-5, 5))
def test_the_window_has_area_1(width, at):
    d = torch.linspace(-11, 11, 100_001, dtype=torch.float64)
    assert torch.trapezoid(edge_window(d, width), d).item() == pytest.approx(1, abs=1e-3)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@pytest.mark.tried('random inputs, their values and gradients', 100)
@settings(max_examples=100, deadline=None)
@given(f=st.lists(floats, min_size=4, max_size=4), b=st.lists(floats, min_size=4, max_size=4))
def test_any_numbers_on_either_side(f, b):
    f, b, g = tensor(f), tensor(b, requires_grad=True), tensor([1., -2., 3., inf])
    y = surrogate_gradient(f, b)
    assert torch.equal(y.nan_to_num(7.), f.nan_to_num(7.)) and torch.equal(grad(y, b, g)[0], g)


@pytest.mark.parametrize('fs,bs', [((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (4,)), ((4,), ()), ((0, 3), (3,))])
def test_both_sides_broadcast(fs, bs):
    f, b = torch.randn(fs), torch.randn(bs, dtype=torch.float64, requires_grad=True)
    y = surrogate_gradient(f, b)
    g = torch.randn(y.shape)
    db, = grad(y, b, g)
    assert y.dtype == torch.float32 and torch.equal(y, f.expand(y.shape)) and db.dtype == torch.float64
    assert_close(db, g.double().sum_to_size(bs))


def test_the_result_is_a_tensor_of_its_own():
    f, b = torch.randn(3), torch.randn(3, requires_grad=True)
    y = surrogate_gradient(f, b)
    y.mul_(2)
    y.sum().backward()
    assert b.grad.tolist() == [2, 2, 2] and torch.equal(y, 2*f)


def test_second_derivatives():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    first, = grad(surrogate_gradient(x.round(), x**3).sum(), x, create_graph=True)
    assert_close(first, 3*x**2); assert_close(grad(first.sum(), x)[0], 6*x)
    first, = grad((leaky_grad_relu(x, .2)**2).sum(), x, create_graph=True)
    assert_close(first, 2*x.relu()); assert_close(grad(first.sum(), x)[0], torch.where(x > 0, 2., 2*.2*.2).double())  # its surrogate's, twice


@pytest.mark.parametrize('slope,channel_dim', [(.2, 1), (-.5, 1), (0., 1), (tensor(.2), 1), (tensor([.1, .2, .3]), 1), (tensor([.1, .2, .3]), -1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_relu_forward_leaky_backward(slope, channel_dim, dtype):
    x = torch.randn(4, 3, 5, 3, dtype=dtype)
    x[0, 0, 0] = tensor([0., inf, -inf])
    x[0, 1, 0, 0] = nan
    x.requires_grad_()
    line = slope.reshape([-1, 1, 1] if channel_dim == 1 and slope.ndim else [-1]).to(dtype) if isinstance(slope, torch.Tensor) else slope
    y, want = leaky_grad_relu(x, slope, channel_dim), surrogate_gradient(x.relu(), torch.where(x > 0, x, x*line))
    assert y.dtype == dtype and torch.equal(y.nan_to_num(7.), x.relu().nan_to_num(7.)) and y[0, 1, 0, 0].isnan()
    g = torch.randn_like(y)
    got, = grad(y, x, g)
    assert_close(got, torch.where(x > 0, g, g*line)); assert_close(got.nan_to_num(7.), grad(want, x, g)[0].nan_to_num(7.))


def test_the_output_alone_is_saved():
    x, saved = torch.randn(4, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t): y = leaky_grad_relu(x)
    assert [o.data_ptr() for o in saved] == [y.data_ptr()]


FUNCTIONS = {'surrogate': lambda x: surrogate_gradient(x.relu(), F.leaky_relu(x, .1)), 'leaky': leaky_grad_relu,
             'leaky per channel': lambda x: leaky_grad_relu(x, tensor([.1, .2, .3]), -1), 'clip': lambda x: learned_clip(x, tensor(.5), width=.5),
             'threshold': lambda x: learned_threshold(x, tensor(.5)), 'symmetric': lambda x: symmetric_clip(x, tensor(.5))}
each_function = pytest.mark.parametrize('f', FUNCTIONS.values(), ids=FUNCTIONS)


@each_function
def test_compiled_without_a_graph_break(f):
    x = torch.randn(4, 3, requires_grad=True)
    y, c = f(x), torch.compile(f, fullgraph=True, backend='aot_eager')(x)
    assert torch.equal(y, c); assert_close(grad(y.sum(), x), grad(c.sum(), x))


@each_function
def test_reverse_mode_transforms_give_what_autograd_gives(f):
    x = torch.randn(4, 3, requires_grad=True)
    want, = grad(f(x).sum(), x)
    each = torch.func.vmap(torch.func.grad(lambda o: f(o).sum()))(x)
    assert torch.equal(torch.func.grad(lambda o: f(o).sum())(x), want) and torch.equal(each, want)


EDGES = {'clip': lambda x, a, b: learned_clip(x, a, b, width=.5, channel_dim=-1), 'tied': lambda x, a, b: learned_clip(x, a, low=-b, width=.5),
         'threshold': lambda x, a, b: learned_threshold(x, a, b, width=.7, channel_dim=-1), 'symmetric': lambda x, a, b: symmetric_clip(x, a) + b,
         'leaky': lambda x, a, b: leaky_grad_relu(x, .2) + a*b,
         'surrogate': lambda x, a, b: surrogate_gradient(x.round(), x.clamp(-1, 1)*a) + b,
         'leaky per channel': lambda x, a, b: leaky_grad_relu(x, tensor([.1, .2, .3], dtype=x.dtype), channel_dim=-1) + a*b}


@pytest.mark.parametrize('f', EDGES.values(), ids=EDGES)
def test_forward_mode_is_reverse_mode_transposed(f):
    args = [torch.randn(40, 3, dtype=torch.float64), *(torch.rand(2, dtype=torch.float64) + .2)]
    args[0][1] = tensor([inf, -inf, 0.])
    tangents = [torch.randn_like(o) for o in args]
    value, tangent = torch.func.jvp(f, tuple(args), tuple(tangents))
    y = f(*[o.requires_grad_() for o in args])
    g = torch.randn_like(y)
    assert torch.equal(value, y)
    back = grad(y, args, g)
    assert_close((g*tangent).sum(), sum((b*t).sum() for b, t in zip(back, tangents, strict=True)))


@pytest.mark.parametrize('bad,error,words', [
    (lambda: surrogate_gradient(torch.ones(2), torch.ones(3)), ValueError, r'forward has shape \(2,\) and backward \(3,\)'),
    (lambda: surrogate_gradient(torch.arange(2), torch.ones(2)), TypeError, 'forward has dtype torch.int64'),
    (lambda: surrogate_gradient(torch.ones(2), 1.), TypeError, 'backward is a float'),
    (lambda: leaky_grad_relu(torch.arange(3)), TypeError, 'torch.int64'), (lambda: leaky_grad_relu([1.]), TypeError, 'x is a list'),
    (lambda: leaky_grad_relu(torch.ones(2, 3), torch.ones(2)), ValueError, 'leak has 2 values, but x has 3 channels'),
    (lambda: leaky_grad_relu(torch.ones(2), nan), ValueError, 'leak is nan'),
    (lambda: leaky_grad_relu(torch.ones(2, 3), torch.ones(3, requires_grad=True)), ValueError, 'leak.detach'),
    (lambda: learned_clip(torch.ones(2, 3), 6.), TypeError, 'cutoff is a float'),
    (lambda: learned_clip(torch.ones(2, 3), torch.ones(2)), ValueError, 'cutoff has 2 values, but x has 3 channels'),
    (lambda: learned_clip(torch.ones(2, 3), torch.ones(1), torch.ones(2)), ValueError, 'value has 2 values'),
    (lambda: learned_clip(torch.ones(2, 3), torch.ones(1), low=torch.ones(2)), ValueError, 'low has 2 values'),
    (lambda: learned_clip(torch.ones(2, 3), torch.ones(1), width=-1.), ValueError, 'width is -1'),
    (lambda: learned_clip(torch.ones(2, 3), torch.ones(1), width=nan), ValueError, 'width is nan'),
    (lambda: symmetric_clip(torch.ones(2, 3), torch.ones(2)), ValueError, 'cutoff has 2 values'),
    (lambda: learned_threshold(torch.ones(2, 3), torch.ones(2)), ValueError, 'threshold has 2 values'),
    (lambda: learned_threshold(torch.ones(2, 3).int(), torch.ones(1)), TypeError, 'torch.int32')])
def test_bad_input_is_named(bad, error, words):
    with pytest.raises(error, match=words): bad()
