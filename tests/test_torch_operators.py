"""What PyTorch's suite asks of its operators, asked of ours, and of F.prelu first.

The checks follow test_ops.py, test_fake_tensor.py and functorch's test_ops.py, which are not installed, and call what is (`torch.testing._internal`).
A check that F.prelu passes is passed by every function, or it stands in SKIPPED with the reason."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad as func_grad
from torch.func import jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close, make_tensor

from learned_relu.batchnorm import bn_learned_relu
from learned_relu.functional import learned_relu
from learned_relu.surrogate import leaky_grad_relu, learned_clip, learned_threshold, surrogate_gradient, symmetric_clip

SHAPES = (4,), (4, 3), (2, 3, 4), (2, 3, 2, 2), (2, 3, 2, 2, 2)


def normed(x, weight, bias, leak, sub, maxv):
    if x.ndim == 1: return normed(x[None], weight, bias, leak, sub, maxv)[0]
    running = torch.zeros(x.shape[1], dtype=x.dtype), torch.ones(x.shape[1], dtype=x.dtype)
    return bn_learned_relu(x, *running, weight.expand(x.shape[1]), bias.expand(x.shape[1]), leak, sub, maxv)


# function: starts of its parameters
OPERATORS = {
    'prelu': (lambda x, a: F.prelu(x, a), (.2,)),
    'learned_relu': (learned_relu, (.2, .3, .7)),
    'learned_relu, eager': (partial(learned_relu, impl='eager'), (.2, .3, .7)),
    'bn_learned_relu': (normed, (.9, .1, .2, .3, .7)),
    'learned_clip': (learned_clip, (.6,)),
    'learned_clip, all': (lambda x, c, v, low: learned_clip(x, c, v, low), (.6, .4, -.5)),
    'symmetric_clip': (symmetric_clip, (.6,)),
    'learned_threshold': (partial(learned_threshold, width=0.), (.3, .1)),
    'learned_clip, window': (partial(learned_clip, width=.5), (.6, .4)),
    'learned_clip, positive': (partial(learned_clip, positive_only=True), (.6, .4)),
    'learned_threshold, window': (learned_threshold, (.3, .1)),
    'leaky_grad_relu': (leaky_grad_relu, ()),
    'leaky_grad_relu, slopes': (lambda x: leaky_grad_relu(x, torch.full((1,), .2, dtype=x.dtype)), ()),
    'surrogate_gradient': (lambda x: surrogate_gradient(x.sign(), x), ())}
SURROGATES = 'learned_clip, window', 'learned_threshold, window', 'leaky_grad_relu', 'leaky_grad_relu, slopes', 'surrogate_gradient'
SKIPPED = {(o, check): 'a surrogate gradient is no derivative of the values' for o in SURROGATES
           for check in ('gradcheck', 'gradgradcheck', 'forward_gradcheck')}


def samples(starts, dtype=torch.float64, requires_grad=True, shapes=SHAPES):
    "An input and parameters, of one value and of one a channel"
    for shape in shapes:
        for n in {1, shape[1] if len(shape) > 1 else 1}:
            x = make_tensor(shape, dtype=dtype, device='cpu', low=-2, high=2, requires_grad=requires_grad)
            yield x, *(torch.linspace(o, o + .1, n, dtype=dtype).requires_grad_(requires_grad) for o in starts)


def grads(f, args, g=None):
    y = f(*args)
    return y, *torch.autograd.grad(y, args, torch.ones_like(y) if g is None else g)


def dtypes(f, starts, tools):
    for dtype in torch.float64, torch.float32, torch.bfloat16, torch.float16:
        for args in samples(starts, dtype):
            y, *gs = grads(f, args)
            assert y.dtype == dtype and [o.dtype for o in gs] == [dtype]*len(args)
            tol = {} if dtype.itemsize > 2 else dict(rtol=.05, atol=.05)
            assert_close(y.double(), f(*(o.double() for o in args)), **(tol or dict(rtol=1e-5, atol=1e-5)))


def noncontiguous(f, starts, tools):
    for args in samples(starts):
        want = grads(f, args)
        for i in range(len(args) + 1):
            strided = [tools.utils.noncontiguous_like(o) if i in (j, len(args)) else o for j, o in enumerate(args)]
            assert_close(grads(f, strided, tools.utils.noncontiguous_like(torch.ones_like(want[0]))), want)


def views(f, starts, make):
    for args in samples(starts, requires_grad=False):
        for i in range(len(args)):
            lazy = [make(o) if i == j else o for j, o in enumerate(args)]
            y = f(*args)
            assert_close(f(*lazy), y)
            assert_close(grads(f, [o.requires_grad_() for o in lazy], make(torch.ones_like(y))), grads(f, [o.requires_grad_() for o in args]))


def negated_views(f, starts, tools): views(f, starts, lambda t: torch._neg_view(-t))
def imaginary_views(f, starts, tools): views(f, starts, lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag)


def copy_on_write(f, starts, tools):
    "PyTorch's test_cow_input: reading a lazy copy neither changes it nor gives it memory of its own"
    for args in samples(starts, requires_grad=False):
        lazy, g = [torch._lazy_clone(o).requires_grad_() for o in args], torch._lazy_clone(torch.ones_like(args[0]))
        got, want = grads(f, lazy, g), grads(f, [o.clone().requires_grad_() for o in args])
        assert hasattr(g, 'const_data_ptr') <= all(map(torch._C._is_cow_tensor, (*lazy, g)))
        assert_close(got, want); assert_close([o.detach() for o in lazy], list(args))


def composite(f, starts, tools):
    for args in samples(starts):
        tools.composite.check_with_mode(f, args, {}, assert_close)
        tools.composite.check_all_permutations(f, args, {}, assert_close)


def composite_backward(f, starts, tools):
    for args in samples(starts, shapes=SHAPES[1:2]): tools.composite.check_backward_formula(f, args, {}, assert_equal_fn=assert_close)


def composite_forward(f, starts, tools):
    "The input and one parameter at a time, since every choice of subclasses is tried, for values and tangents"
    for args in samples(starts, shapes=SHAPES[1:2]):
        for i in range(1, len(args)) or [0]:
            def g(x, p=None, i=i, args=args): return f(x, *(p if i == j else o.detach() for j, o in enumerate(args) if j))
            tools.composite.check_forward_ad_formula(g, (args[0], args[i])[:len(args)], {}, assert_equal_fn=assert_close)


def fake(f, starts, tools):
    from torch._subclasses import FakeTensorMode
    for autocast in False, True:
        for args in samples(starts, torch.float32, requires_grad=False):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                want = f(*args)
                with FakeTensorMode() as mode: got = f(*map(mode.from_tensor, args))
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    for args in samples(starts, torch.float32): tools.optests.fake_check(lambda *a: grads(f, a), args, {})


def gradcheck(f, starts, tools):
    for args in samples(starts): assert tools.utils.gradcheck(f, args, check_batched_grad=True)


def gradgradcheck(f, starts, tools):
    "Slow mode, since the fast one counts a gradient that is 0 whatever comes (of an edge without a window) on one side only"
    for args in samples(starts): assert tools.utils.gradgradcheck(f, args, check_batched_grad=True, fast_mode=False)


def forward_gradcheck(f, starts, tools):
    for args in samples(starts, shapes=SHAPES[:2]):
        once = dict(check_batched_grad=False, fast_mode=False)
        assert tools.utils.gradcheck(f, args, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True, **once)
        assert tools.utils.gradgradcheck(f, args, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False, **once)


def transforms(f, starts, tools):
    for args in samples(starts, requires_grad=False, shapes=SHAPES[1:4]):
        y, many = f(*args), torch.stack([args[0], args[0].flip(0)])
        assert_close(vmap(f, (0, *[None]*len(starts)))(many, *args[1:]), torch.stack([f(o, *args[1:]) for o in many]))
        for dim in range(1, args[0].ndim + 1):
            assert_close(vmap(f, (dim, *[None]*len(starts)))(many.movedim(0, dim), *args[1:])[0], y)
        loss = partial(lambda f, *a: f(*a).pow(2).sum(), f)
        each = func_grad(loss, tuple(range(len(args))))
        assert_close(vmap(each, (0, *[None]*len(starts)))(many, *args[1:])[0][0], each(*args)[0])
        t = tuple(map(torch.ones_like, args))
        tangent, cotangents = jvp(f, args, t)[1], vjp(f, *args)[1](torch.ones_like(y))
        assert_close(tangent.sum(), sum(o.sum() for o in cotangents))
        assert_close(jacfwd(f)(*args), jacrev(f)(*args))
        jvp(lambda *a: vjp(f, *a)[1](torch.ones_like(y)), args, t)


def written_down(f, starts, tools):
    for args in samples(starts, shapes=SHAPES[1:2]):
        for mode in 'real', 'fake', 'symbolic': tools.optests.make_fx_check(f, args, {}, mode)
        for dynamic in False, True: tools.optests.aot_autograd_check(f, args, {}, dynamic, check_gradients='auto')


def tangents_of_gradients(f, starts, tools):
    "Of a graph that was made before anybody asked for tangents"
    for args in samples(starts, torch.float32):
        y = f(*args)
        g, t = torch.randn_like(y), torch.randn_like(y)
        want = torch.autograd.grad(y, args, t, retain_graph=True)  # linear in what comes in
        with forward_ad.dual_level():
            got = torch.autograd.grad(y, args, forward_ad.make_dual(g, t))
            for a, b in zip(map(forward_ad.unpack_dual, got), want, strict=True):
                assert_close(torch.zeros_like(b) if a.tangent is None else a.tangent, b)  # none is needed where all of it is 0


def autocast(f, starts, tools):
    for args in samples(starts, torch.float32):
        want = f(*args)
        with torch.autocast('cpu', torch.bfloat16): got = grads(f, args)
        assert_close(got[0], want, rtol=.02, atol=.02, check_dtype=False)


CHECKS = {o.__name__: o for o in (dtypes, noncontiguous, negated_views, imaginary_views, copy_on_write, composite, composite_backward,
    composite_forward, fake, gradcheck, gradgradcheck, forward_gradcheck, transforms, written_down, tangents_of_gradients, autocast)}


TRIED = pytest.mark.tried('a check of PyTorch\'s own suite')


@pytest.mark.parametrize('check', CHECKS)
@pytest.mark.parametrize('name', [pytest.param(o, marks=() if o == 'prelu' else TRIED) for o in OPERATORS])
def test_an_operator_of_pytorch(name, check, internals):
    if why := SKIPPED.get((name, check)): pytest.skip(why)
    torch.manual_seed(0)
    CHECKS[check](*OPERATORS[name], internals)
