"The kernels for a GPU against the reference. `test_cuda.py` runs these: on a GPU, and by Triton's interpreter."
import os
import warnings

import pytest
import torch
from test_cpu import DTYPES, SHAPES, SLOPES, inputs
from test_cpu import test_parameters_of_another_dtype_are_rounded_as_the_input_is as rounded
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from learned_relu.functional import learned_relu, learned_relu_gradients
from learned_relu.reference import learned_relu_reference

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda'
KINDS = [(torch.float32, o) for o in SLOPES] + [(o, 'some') for o in (torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize('dtype,slope', KINDS)
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('shape,channel_dim', [*SHAPES, ((3, 70, 2, 2), 1), ((1500, 2), 1), ((2, 2, 40, 40), 1)])
def test_values_and_gradients_are_those_of_the_reference(shape, channel_dim, per_channel, slope, dtype):
    for last in (False, True) if len(shape) == 4 and channel_dim == 1 else (False,):
        args = inputs(shape, channel_dim, shape[channel_dim] if per_channel else 1, slope, last, dtype)
        x, *ps = [o.detach().to(DEVICE).requires_grad_() for o in args]
        y, g = learned_relu(x, *ps, channel_dim, impl='kernel'), torch.randn_like(x)
        exact = [o.detach().double().requires_grad_() for o in (x, *ps)]
        want = learned_relu_reference(*exact, channel_dim)
        assert y.stride() == x.stride() and y.dtype == dtype
        assert_close(y, want.to(dtype))
        if dtype in (torch.float32, torch.float64): assert torch.equal(y, learned_relu_reference(x, *ps, channel_dim))
        grads = torch.autograd.grad(y, [x, *ps], g)
        for a, b in zip(grads, torch.autograd.grad(want, exact, g.double()), strict=True): assert_close(a, b.to(dtype))
        for a, b in zip(grads, learned_relu_gradients(g, x, *ps, channel_dim), strict=True): assert torch.equal(a, b), 'the same numbers again'


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('other', DTYPES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_parameters_of_another_dtype(dtype, other, last): rounded(dtype, other, (2, 20, 3, 3), last, DEVICE)


@pytest.mark.parametrize('shape,last', [((3, 5), False), ((2, 3, 4, 3), False), ((2, 3, 4, 3), True)])
def test_gradients_are_those_of_finite_differences(shape, last):
    args = [o.detach().to(DEVICE).requires_grad_() for o in inputs(shape, 1, shape[1], 'some', last)]
    def curve(*args): return learned_relu(*args, impl='kernel')
    assert gradcheck(curve, args) and gradgradcheck(curve, args)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_corners(dtype):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[-inf, inf, nan, -2., 3., 0.]], device=DEVICE, dtype=dtype).requires_grad_()
    for leak, want in (0., [-1., 2., nan, -1., 2., -1.]), (.5, [-inf, 2., nan, -2., 2., -1.]):
        ps = [torch.tensor(o, device=DEVICE).requires_grad_() for o in (leak, 1., 2.)]
        y = learned_relu(x, *ps, impl='kernel')
        assert_close(y, torch.tensor([want], device=DEVICE, dtype=dtype), equal_nan=True)
        dx, dmaxv = torch.autograd.grad(y.sum(), [x, ps[2]])
        assert torch.equal(dx.cpu(), torch.tensor([[leak, 0., leak, leak, 0., leak]], dtype=dtype)) and dmaxv.item() == 2


def test_only_the_input_is_kept_and_a_gradient_may_lie_otherwise():
    x, *ps = [o.detach().to(DEVICE).requires_grad_() for o in inputs((2, 6, 9, 9), 1, 6, 'some', True, torch.float32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t): y = learned_relu(x, *ps, impl='kernel')
    assert [t.data_ptr() for t in saved if t.numel() > 6] == [x.data_ptr()]
    g = torch.randn(2, 6, 9, 9, device=DEVICE)
    got, want = (torch.autograd.grad(o, [x, *ps], g) for o in (y, learned_relu_reference(x, *ps)))
    for a, b in zip(got, want, strict=True): assert_close(a, b)


def test_where_triton_fails_it_is_said_once(monkeypatch):
    from learned_relu.kernels import triton as cuda
    def broken(*args, **kwargs): raise RuntimeError('Failed to find C compiler')
    cuda.works.cache_clear()
    monkeypatch.setattr(cuda, 'forward', broken)
    x, *ps = [o.detach().to(DEVICE).requires_grad_() for o in inputs((2, 3, 4, 4), 1, 3)]
    with pytest.warns(UserWarning, match='because Triton failed: RuntimeError: Failed to find C compiler') as seen: y = learned_relu(x, *ps)
    assert len(seen) == 1 and torch.equal(y, learned_relu_reference(x, *ps))
    with warnings.catch_warnings(): warnings.simplefilter('error'); learned_relu(x, *ps)
    cuda.works.cache_clear()
