"The curve against its reference, its gradients by definition, its corners by hand."
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

from learned_relu.functional import learned_relu
from learned_relu.reference import learned_relu_reference

SHAPES = [((6, 3), 1), ((6, 3), -1), ((4, 3, 5), 1), ((4, 5, 3), -1), ((2, 3, 4, 5), 1), ((2, 4, 5, 3), -1),
          ((2, 3, 2, 3, 2), 1), ((2, 2, 3, 2, 3), -1), ((0, 3, 4, 4), 1), ((2, 3, 0, 4), 1)]
eager = partial(learned_relu, impl='eager')
CURVES = pytest.mark.parametrize('curve', [learned_relu, eager], ids=['chosen', 'eager'])
LAYOUTS = ['contiguous', 'channels_last', 'strided', 'expanded']


def params(n, dtype=torch.float64, grad=True, shape=None):
    "leak, sub and maxv of `n` values, with caps that bind for part of a normal sample"
    vs = torch.linspace(.05, .3, n), torch.linspace(-.2, .4, n), torch.linspace(.4, 1.2, n)
    return [v.to(dtype).reshape(shape if shape is not None else (n,)).requires_grad_(grad) for v in vs]


def away_from_kinks(x, leak, sub, maxv, channel_dim, gap=1e-3):
    "Move inputs off x == 0 and z - sub == maxv, where a finite difference says nothing"
    shape = [1]*x.ndim
    shape[channel_dim] = -1
    kink = (maxv + sub).detach().reshape(shape if maxv.numel() > 1 else (1,)*x.ndim)
    for k in (torch.zeros(()), kink): x = torch.where((x - k).abs() < gap, k + 2*gap, x)
    return x


def laid_out(x, layout):
    if layout == 'channels_last':
        fmt = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
        return x.contiguous(memory_format=fmt) if fmt else x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'strided': return torch.stack([x, x], -1)[..., 0]
    if layout == 'expanded': return x[:1].expand(x.shape) if len(x) else x
    return x


@CURVES
@pytest.mark.parametrize('layout', LAYOUTS[:3])  # finite differences need memory of their own for each element
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('shape,channel_dim', SHAPES)
def test_gradients_are_those_of_finite_differences(shape, channel_dim, per_channel, layout, curve):
    ps = params(3) if per_channel else params(1)
    x = away_from_kinks(torch.randn(shape, dtype=torch.float64), *ps, channel_dim)
    x = (laid_out(x, layout) if x.numel() else x).detach().requires_grad_()
    assert gradcheck(curve, (x, *ps, channel_dim))
    assert gradgradcheck(curve, (x, *ps, channel_dim))


@CURVES
def test_gradients_with_0d_parameters(curve):
    ps = params(1, shape=())
    x = away_from_kinks(torch.randn(5, dtype=torch.float64), *ps, 0).requires_grad_()
    assert gradcheck(curve, (x, *ps, 0)) and gradgradcheck(curve, (x, *ps, 0))


@CURVES
def test_parameters_of_different_shapes(curve):
    leak, sub, maxv = params(3)[0], params(1, shape=())[1], params(1)[2]
    x = away_from_kinks(torch.randn(4, 3, dtype=torch.float64), leak, sub, maxv, 1).requires_grad_()
    assert gradcheck(curve, (x, leak, sub, maxv)) and gradgradcheck(curve, (x, leak, sub, maxv))


finite = st.floats(-50, 50, width=32)


@pytest.mark.tried('random inputs, their values and gradients', 'n')
@pytest.mark.parametrize('n', [200, pytest.param(5000, marks=pytest.mark.slow)])
@CURVES
def test_any_numbers_agree_with_the_reference(curve, n):
    @settings(max_examples=n, deadline=None)
    @example(xs=[-1.], leak=torch.tensor(1e-3).item(), sub=1., maxv=0.)  # a slope that is barely divided by
    @given(xs=st.lists(finite, min_size=1, max_size=40), leak=st.floats(0, 1, width=32), sub=st.floats(-2, 2, width=32),
           maxv=st.floats(-1, 20, width=32))
    def agree(xs, leak, sub, maxv): agrees(curve, xs, leak, sub, maxv)
    agree()


def agrees(curve, xs, leak, sub, maxv):
    x = torch.tensor(xs).requires_grad_()
    ps = [torch.tensor([o]).requires_grad_() for o in (leak, sub, maxv)]
    y, want = curve(x[None], *ps), learned_relu_reference(x[None], *ps)
    assert torch.equal(y, want)
    g = torch.linspace(-1, 1, x.numel())[None]
    dx, dleak, *rest = torch.autograd.grad(y, [x, *ps], g)
    wantx, wantleak, *others = torch.autograd.grad(want, [x, *ps], g)
    # the kernel divides what it kept by the slope (kernels.cpu, "What is kept"), which magnifies the rounding of sub
    divided = 2**-23*abs(sub)/leak if leak >= 2**-10 else 0
    assert_close(dleak, wantleak, rtol=1.3e-6, atol=1e-5 + (0 if curve is eager else divided*g.abs().sum().item()))
    for a, b in zip((dx, *rest), (wantx, *others), strict=True): assert_close(a, b)


@CURVES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_dtype_layout_and_input_are_kept(dtype, layout, curve):
    torch.manual_seed(0)
    x = laid_out(torch.randn(4, 3, 6, 6), layout).to(dtype)
    before, like = x.clone(), x.relu()
    ps = params(3, torch.float32)
    x.requires_grad_()
    y = curve(x, *ps)
    y.float().sum().backward()
    assert y.dtype == dtype and y.stride() == like.stride()
    assert torch.equal(x.detach(), before)
    assert x.grad.dtype == dtype and all(p.grad.dtype == torch.float32 for p in ps)
    assert_close(y, learned_relu_reference(before, *ps))


@CURVES
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_parameter_gradients_are_summed_in_float32(dtype, curve):
    x = -torch.ones(1, 1, 100, 100, dtype=dtype)
    leak, sub, maxv = params(1, torch.float32)
    curve(x, leak, sub, maxv).sum().backward()
    assert leak.grad.item() == -10_000 and sub.grad.item() == -10_000 and maxv.grad.item() == 0


@CURVES
def test_ties(curve):
    x = torch.tensor([[0., 1.5, 1.5 + 1e-6]]).requires_grad_()
    leak, sub, maxv = (torch.tensor([o]).requires_grad_() for o in (.25, .5, 1.))
    curve(x, leak, sub, maxv).backward(torch.tensor([[1., 10., 100.]]))
    assert x.grad.tolist() == [[.25, 0., 0.]]
    assert (leak.grad.item(), sub.grad.item(), maxv.grad.item()) == (0., -1., 110.)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape,channel_dim', [((64, 3), 1), ((2, 3, 5, 7), 1), ((2, 9, 5, 3), -1), ((5, 3), 0)])
@pytest.mark.parametrize('which', range(3))
def test_nan_in_a_parameter_is_seen_wherever_it_matters_in_every_form(which, shape, channel_dim, dtype):
    n = shape[channel_dim]
    ps = [torch.full((n,), o, dtype=dtype) for o in (.1, .25, 1.)]
    ps[which][1], ps[0][2] = torch.nan, 0.
    x, g = torch.randn(shape).to(dtype)*2, torch.randn(shape).to(dtype)
    bent = torch.ones(n, x.numel()//n, dtype=torch.bool) if which else x.movedim(channel_dim, 0).reshape(n, -1) <= 0
    want = bent & (torch.arange(n) == 1)[:, None]
    found = []
    for impl in 'reference', 'eager', 'kernel', None:
        if impl == 'kernel' and dtype == torch.float16: continue
        xs = [o.clone().requires_grad_() for o in (x, *ps)]
        y = learned_relu(*xs, channel_dim, impl=impl)
        with torch.no_grad(): alone = learned_relu(x, *ps, channel_dim, impl=impl)
        for o in y, alone: assert torch.equal(o.isnan().movedim(channel_dim, 0).reshape(n, -1), want), impl
        found.append((impl, torch.autograd.grad(y, xs, g)))
    if dtype not in (torch.float32, torch.float64): return
    for impl, grads in found[1:]:
        kept = torch.arange(n) != 1 if impl == 'eager' and which == 0 else slice(None)  # whose slope there is NaN for all inputs
        for a, b in zip(found[0][1], grads, strict=True):
            a, b = (o.movedim(channel_dim if o.ndim > 1 else 0, 0)[kept] for o in (a, b))
            assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize('curve', [learned_relu, eager, learned_relu_reference])
def test_corners(curve):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[-inf, inf, nan, -2., 3.]]).requires_grad_()
    for leak, want in (0., [-1., 2., nan, -1., 2.]), (.5, [-inf, 2., nan, -2., 2.]):
        ps = [torch.tensor(o).requires_grad_() for o in (leak, 1., 2.)]
        y = curve(x, *ps)
        assert_close(y, torch.tensor([want]), equal_nan=True)
        dx, dmaxv = torch.autograd.grad(y.sum(), [x, ps[2]])
        assert torch.equal(dx, torch.tensor([[leak, 0., leak, leak, 0.]])) and dmaxv.item() == 2


@CURVES
def test_the_start_at_plain_relu_is_plain_relu(curve):
    x = torch.randn(3, 4, 5, 5)*3
    zero = torch.zeros(())
    assert torch.equal(curve(x, zero, zero, torch.tensor(torch.inf)), F.relu(x))


def test_the_eager_form_keeps_the_input_alone():
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        eager(x, *params(3, torch.float32))
    big = [t for t in saved if t.numel() > 3]
    assert len(big) == 1 and big[0].data_ptr() == x.data_ptr()


@CURVES
def test_only_what_is_needed_gets_a_gradient(curve):
    x = torch.randn(2, 3, requires_grad=True)
    leak, sub, maxv = params(3, torch.float32, grad=False)
    curve(x, leak, sub.requires_grad_(), maxv).sum().backward()
    assert leak.grad is None and maxv.grad is None and sub.grad is not None and x.grad is not None


@CURVES
def test_a_cap_that_binds_and_slopes_of_zero(curve):
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    x.data[0, 0, 0, 0] = -torch.inf
    ps = [torch.tensor(o, dtype=torch.float64).requires_grad_() for o in ([0., .2, 0.], [.1, 0., .3], [.3, .2, .1])]
    g = torch.randn_like(x)
    got, want = (torch.autograd.grad(f(x, *ps), [x, *ps], g) for f in (curve, learned_relu_reference))
    for a, b in zip(got, want, strict=True): assert_close(a, b)


@pytest.mark.parametrize('transform', [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
                                       lambda f: lambda x: torch.func.vmap(f)(x[None])[0]], ids=['grad', 'jvp', 'vmap'])
def test_the_transforms_of_torch_func(transform):
    x, ps = torch.randn(2, 3, 4, 4), [p.detach() for p in params(3, torch.float32)]
    got, want = (transform(lambda x, f=f: f(x, *ps).sum())(x) for f in (learned_relu, learned_relu_reference))
    assert_close(got, want)


def test_forward_mode():
    x, ps = torch.randn(2, 3), [p.detach() for p in params(3, torch.float32)]
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(learned_relu(forward_ad.make_dual(x, torch.ones_like(x)), *ps)).tangent
    assert_close(got, torch.autograd.functional.jvp(lambda x: learned_relu_reference(x, *ps), x, torch.ones_like(x))[1])


def test_traced_and_exported_as_the_readable_form():
    class Act(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for k, p in zip(('leak', 'sub', 'maxv'), ps, strict=True): self.register_buffer(k, p)
        def forward(self, x): return learned_relu(x, self.leak, self.sub, self.maxv)
    x, ps = torch.randn(2, 3, 4, 4), params(3, torch.float32, grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit says that it is deprecated
        traced = torch.jit.trace(Act(), x)
    for f in (traced, torch.export.export(Act(), (x,)).module()): assert torch.equal(f(2*x), learned_relu(2*x, *ps))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="impl is 'fast': pass 'reference'"): learned_relu(torch.zeros(2, 3), *params(3), impl='fast')
    with pytest.raises(ValueError, match='no kernel for torch.float16'):
        learned_relu(torch.zeros(2, 3, dtype=torch.half), *params(3), impl='kernel')


def test_compiled_without_a_graph_break():
    x, ps = torch.randn(2, 3, 4, 4, requires_grad=True), params(3, torch.float32)
    seen = []
    def look(graph, inputs): seen.append(graph.code); return graph.forward
    f = torch.compile(learned_relu, fullgraph=True, backend=look)
    for a, b in zip(torch.autograd.grad(f(x, *ps).sum(), [x, *ps]), torch.autograd.grad(learned_relu(x, *ps).sum(), [x, *ps]),
                    strict=True): assert_close(a, b)
    assert len(seen) == 1 and 'where' in seen[0] and 'autograd_function' not in seen[0], 'the readable form, for the compiler to fuse'


@pytest.mark.parametrize('x,ps,channel_dim,error,words', [
    (torch.zeros(2, 3), params(4, torch.float32), 1, ValueError, 'leak has 4 values, but x has 3 channels'),
    (torch.zeros(2, 3), [torch.zeros(3), torch.zeros(2), torch.zeros(3)], 1, ValueError, 'sub has 2 values'),
    (torch.zeros(2, 3), [torch.zeros(1, 3)]*3, 1, ValueError, r'shape \(1, 3\)'),
    (torch.zeros(3), params(3, torch.float32), 1, ValueError, 'channel_dim is 1'),
    (torch.zeros(2, 3, dtype=torch.long), params(3, torch.float32), 1, TypeError, 'torch.int64'),
    (torch.zeros(2, 3, dtype=torch.complex64), params(3, torch.float32), 1, TypeError, 'complex64'),
    (torch.zeros(2, 3), [.1, .2, .3], 1, TypeError, 'leak is a float'),
    ([1., 2.], params(1, torch.float32), 1, TypeError, 'x is a list'),
])
@pytest.mark.parametrize('curve', [learned_relu, learned_relu_reference])
def test_bad_input_is_named(curve, x, ps, channel_dim, error, words):
    with pytest.raises(error, match=words): curve(x, *ps, channel_dim)


def test_the_reference_is_found_where_it_was():
    from learned_relu import functional
    assert functional.learned_relu_reference is learned_relu_reference
