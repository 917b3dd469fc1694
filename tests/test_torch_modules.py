"""What PyTorch's suite asks of its modules, asked of ours, and of nn.PReLU first.

Its cases (`ModuleInfo` of `torch.testing._internal`) are installed with torch; its test_modules.py, whose checks are followed here, is
not. A check that nn.PReLU passes is passed by every layer, or it stands in SKIPPED with the reason."""
import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from learned_relu.batchnorm import fuse_bn
from learned_relu.functional import learned_relu_reference
from learned_relu.layers import GeneralRelu, LeakyGradRelu, LearnedClip, LearnedRelu, LearnedThreshold, SymmetricClip

SHAPES = (4, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)


def relu_form(m, params, x): return learned_relu_reference(x, m.current('leak'), m.current('sub'), m.current('maxv'), m.channel_dim)
def clip_form(m, params, x): return torch.maximum(torch.minimum(x, line(m, x, 'cutoff')), line(m, x, 'low'))
def symmetric_form(m, params, x): return torch.maximum(torch.minimum(x, line(m, x, 'cutoff')), -line(m, x, 'cutoff'))
def threshold_form(m, params, x): return torch.where(x > line(m, x, 'threshold'), x, line(m, x, 'value'))
def relu(m, params, x): return x.relu()


class Fused(nn.Sequential):
    "BatchNorm and curve as one, which come as two modules"
    def __init__(self, n, ndim, device=None, dtype=None, **kwargs):
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[ndim]
        super().__init__(norm(n, device=device, dtype=dtype), LearnedRelu(n, device=device, dtype=dtype, **kwargs))
        fuse_bn(*self)


def fused_form(m, params, x):
    bn, act = m
    running = (None, None) if m.training else (bn.running_mean, bn.running_var)
    return relu_form(act, params, nn.functional.batch_norm(x, *running, bn.weight, bn.bias, m.training, 0., bn.eps))


def line(m, x, kind):
    p = m.current(kind)
    return p.reshape(()) if p.numel() == 1 else p.reshape([-1 if i == m.channel_dim % x.ndim else 1 for i in range(x.ndim)])


# layer: its class, what it is made with, what it computes
OURS = {
    'LearnedRelu': (LearnedRelu, dict(leak=.1, sub=.2, maxv=.7), relu_form),
    'GeneralRelu': (GeneralRelu, dict(leak=.1, sub=.2, maxv=.7), relu_form),
    'LearnedClip': (LearnedClip, dict(cutoff=.7, low=-.3, learn=('cutoff', 'low')), clip_form),
    'SymmetricClip': (SymmetricClip, dict(cutoff=.6), symmetric_form),
    'LearnedThreshold': (LearnedThreshold, dict(threshold=.3, value=.1, learn=('value',)), threshold_form),
    'LeakyGradRelu': (LeakyGradRelu, {}, relu),
    'BnLearnedRelu': (Fused, dict(leak=.1, sub=.2, maxv=.7), fused_form)}
SKIPPED = {('LeakyGradRelu', 'grad'): 'a surrogate gradient is no derivative of the values', ('LeakyGradRelu', 'gradgrad'): 'likewise'}


def inputs_of(name, common):
    "A function as ModuleInfo wants it: every shape, one value and one a channel, channels first and last"
    cls, kwargs, form = OURS[name]
    def module_inputs(module_info, device, dtype, requires_grad, training, **_):
        x = partial(torch.testing.make_tensor, device=device, dtype=dtype, requires_grad=requires_grad, low=-2, high=2)
        def one(shape, *args, **kw):
            return common.ModuleInput(common.FunctionInput(*args, **(kwargs | kw)), common.FunctionInput(x(shape)), reference_fn=form)
        if cls is Fused: return [one(o, o[1], max(1, len(o) - 2)) for o in SHAPES]
        if cls is LeakyGradRelu: return [one(o) for o in ((), (4,), *SHAPES)] + [one(o, torch.full((3,), .2, dtype=dtype)) for o in SHAPES]
        return ([one(o) for o in ((), (4,), (0, 3), *SHAPES)] + [one(o, 3) for o in ((0, 3), *SHAPES)]
                + [one(o, o[-1], channel_dim=-1) for o in SHAPES])
    return module_inputs


def info_of(name, common):
    if name != 'PReLU': return common.ModuleInfo(OURS[name][0], module_inputs_func=inputs_of(name, common))
    return next(o for o in common.module_db if o.module_cls is nn.PReLU)


def cases(info, dtype=torch.float32, training=True, requires_grad=False):
    for o in info.module_inputs_func(info, device='cpu', dtype=dtype, requires_grad=requires_grad, training=training):
        make = partial(info.module_cls, *o.constructor_input.args, **o.constructor_input.kwargs)
        yield make, *o.forward_input.args, o


def tensors(m): return [o for o in (*m.parameters(), *m.buffers()) if o.is_floating_point()]


def forward(info, utils):
    for training in True, False:
        for make, x, case in cases(info, torch.float64, training):
            m = make(dtype=torch.float64).train(training)
            if case.reference_fn is not None: assert_close(m(x), case.reference_fn(m, x))


def factory_arguments(info, utils):
    for make, *_ in cases(info):
        for dtype in torch.float32, torch.float64, torch.bfloat16:
            m = make(device='cpu', dtype=dtype)
            assert {(o.device.type, o.dtype) for o in m.parameters()} <= {('cpu', dtype)}
        assert all(o.is_meta for o in tensors(make(device='meta')))


def device_context(info, utils):
    for make, *_ in cases(info):
        with torch.device('meta'): assert all(o.is_meta for o in make().parameters())


def moved(info, utils):
    for swap in True, False:
        old = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            for make, x, _ in cases(info):
                m = make()
                ids, y = [id(o) for o in m.parameters()], m(x).detach()
                assert {o.dtype for o in m.double().parameters()} <= {torch.float64}
                assert_close(m.float()(x), y)
                if swap: assert [id(o) for o in m.parameters()] == ids
                assert all(o.is_meta for o in m.to('meta').parameters())
                assert all(not o.is_meta for o in m.to_empty(device='cpu').parameters())
        finally: torch.__future__.set_swap_module_params_on_conversion(old)


def saved(info, utils):
    for make, x, _ in cases(info):
        m, file, whole = make(), io.BytesIO(), io.BytesIO()
        for p in m.parameters(): p.data.mul_(1.1)
        m.eval()
        torch.save(m.state_dict(), file); torch.save(m, whole)
        file.seek(0); whole.seek(0)
        other = make().eval()
        other.load_state_dict(torch.load(file, weights_only=True))
        assigned = make(device='meta').eval()
        assigned.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)
        for o in other, assigned, torch.load(whole, weights_only=False), pickle.loads(pickle.dumps(m)), copy.deepcopy(m), copy.copy(m):
            assert torch.equal(o(x), m(x))


def printed(info, utils):
    for make, *_ in cases(info): assert type(make()).__name__ in repr(make()) == str(make())


def input_kept(info, utils):
    "PyTorch's check_inplace, for modules that never overwrite: neither values nor the version that autograd counts"
    for make, x, _ in cases(info):
        before, version = x.clone(), x._version
        make()(x)
        assert torch.equal(x, before) and x._version == version


def non_contiguous(info, utils):
    for make, x, _ in cases(info, torch.float64, requires_grad=True):
        m = make(dtype=torch.float64)
        y = m(x)
        g = torch.randn_like(y)
        want = torch.autograd.grad(y, [x, *m.parameters()], g)
        for xs, gs, ps in (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1):
            t = utils.noncontiguous_like(x) if xs else x
            named = {k: utils.noncontiguous_like(p) if ps else p for k, p in m.named_parameters()}
            out = functional_call(m, named, (t,))
            got = torch.autograd.grad(out, [t, *named.values()], utils.noncontiguous_like(g) if gs else g)
            assert_close(out, y); assert_close(got, want)


def checked(info, utils, check):
    for make, x, _ in cases(info, torch.float64, requires_grad=True):
        m = make(dtype=torch.float64)
        names, ps = list(dict(m.named_parameters())), list(m.parameters())
        def f(x, *ps): return functional_call(m, dict(zip(names, ps, strict=True)), (x,))
        if x.numel(): assert check(f, (x, *ps))


def grad(info, utils): checked(info, utils, partial(utils.gradcheck, check_batched_grad=info.module_cls is not Fused))
def gradgrad(info, utils): checked(info, utils, utils.gradgradcheck)


def memory_format(info, utils):
    for make, x, _ in cases(info):
        for ndim, fmt in (4, torch.channels_last), (5, torch.channels_last_3d):
            if x.ndim != ndim: continue
            m = make()
            y = m.to(memory_format=fmt)(x.to(memory_format=fmt))
            assert y.is_contiguous(memory_format=fmt); assert_close(y, m(x))


def training_and_evaluation(info, utils):
    for make, x, _ in cases(info):
        m = make()
        assert x.numel() < 2 or torch.equal(m.train()(x), m.eval()(x)) != (info.module_cls is Fused)


CHECKS = {o.__name__: o for o in (forward, factory_arguments, device_context, moved, saved, printed, input_kept, non_contiguous, grad, gradgrad,
    memory_format, training_and_evaluation)}


TRIED = pytest.mark.tried('a check of PyTorch\'s own suite')


@pytest.mark.parametrize('check', CHECKS)
@pytest.mark.parametrize('name', ['PReLU', *(pytest.param(o, marks=TRIED) for o in OURS)])
def test_a_module_of_pytorch(name, check, internals):
    if why := SKIPPED.get((name, check)): pytest.skip(why)
    torch.manual_seed(0)
    CHECKS[check](info_of(name, internals.modules), internals.utils)
