"What may reach the curve that is no ordinary memory, run in a process of its own, since a mistake ends it: prints a line a case."
import faulthandler
import sys
import tempfile
import warnings

import torch
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

from learned_relu.batchnorm import bn_learned_relu
from learned_relu.functional import learned_relu, learned_relu_gradients
from learned_relu.kernels.dispatch import impl, node
from learned_relu.layers import LearnedRelu
from learned_relu.reference import learned_relu_reference
from learned_relu.surrogate import leaky_grad_relu, learned_clip, learned_threshold, symmetric_clip

faulthandler.enable()
warnings.simplefilter('ignore')
SHAPE = 4, 3, 5, 5


class Named(torch.Tensor): "A subclass with memory of its own"


def frozen(t):
    with torch.inference_mode(): return t.clone()


def stored(t):
    "As a view of a larger storage that was swapped in behind the tensor"
    res = torch.empty(0, dtype=t.dtype)
    return res.set_(torch.cat([t.flatten(), t.flatten()]).untyped_storage(), t.numel(), t.shape, t.stride())


KINDS = dict(plain=lambda t: t, negated=lambda t: torch._neg_view(-t), imaginary=lambda t: torch.complex(t, -t).conj().imag,
             wrapper=lambda t: TwoTensor(t, t.clone()), subclass=lambda t: t.as_subclass(Named), swapped=stored,
             transposed=lambda t: t.mT.contiguous().mT if t.ndim > 1 else t, parameter=nn.Parameter,
             inference=frozen)


def alike(a, b):
    a, b = (o.a if isinstance(o, TwoTensor) else o for o in (a, b))
    assert_close(a.detach().as_subclass(torch.Tensor), b.detach().as_subclass(torch.Tensor), check_dtype=False)


def case(name, got, want):
    "Both computed, or both refused"
    res = []
    for f in (got, want):
        try: res.append(f())
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as e: res.append(e)
    if isinstance(res[1], Exception): assert isinstance(res[0], Exception), f'{name}: computed what PyTorch refuses: {res[1]}'
    elif isinstance(res[0], Exception): raise AssertionError(f'{name}: {type(res[0]).__name__}: {res[0]}')
    else:
        for a, b in zip(*res, strict=True): alike(a, b)
    print('ok', name, flush=True)


def curve(f, x, g, leak, sub, maxv):
    args = [o if o.requires_grad or not o.is_leaf else o.requires_grad_() for o in (x, leak, sub, maxv)]
    y = f(*args)
    return y, *torch.autograd.grad(y, args, g)


def bn(form, x, g, weight, bias, leak, sub, maxv):
    args = [o if o.requires_grad or not o.is_leaf else o.requires_grad_() for o in (x, weight, bias, leak, sub, maxv)]
    x, weight, bias, *ps = args
    if form is bn_learned_relu: y = bn_learned_relu(x, torch.zeros(3), torch.ones(3), weight, bias, *ps, training=True)
    else: y = learned_relu_reference(nn.functional.batch_norm(x, None, None, weight, bias, training=True), *ps)
    return y, *torch.autograd.grad(y, args, g)


def values(**roles):
    torch.manual_seed(0)
    res = dict(x=torch.randn(SHAPE), g=torch.randn(SHAPE), leak=torch.tensor([0., .1, .3]), sub=torch.tensor([.1, .2, 0.]),
               maxv=torch.tensor([.5, 1., 9.]), weight=torch.rand(3), bias=torch.randn(3))
    return {k: roles.get(k, lambda t: t)(v) for k, v in res.items()}


CURVE, NORM = ('x', 'g', 'leak', 'sub', 'maxv'), ('x', 'g', 'weight', 'bias', 'leak', 'sub', 'maxv')


def every_kind_in_every_role():
    for kind, make in KINDS.items():
        for role in CURVE:
            def run(f, make=make, role=role): v = values(**{role: make}); return curve(f, *(v[o] for o in CURVE))
            for form in None, 'eager':
                with impl(form): case(f'curve {form} {kind} {role}', lambda: run(learned_relu), lambda: run(learned_relu_reference))
        for role in NORM:
            def normed(f, make=make, role=role): v = values(**{role: make}); return bn(f, *(v[o] for o in NORM))
            case(f'batchnorm {kind} {role}', lambda: normed(bn_learned_relu), lambda: normed(None))


def zeros_that_nobody_wrote():
    def zero(t): return torch._efficientzerotensor(t.shape)
    for role in CURVE:
        def run(f, make, role=role): v = values(**{role: make}); return curve(f, *(v[o].clone() if o != role else v[o] for o in CURVE))
        if role == 'g': case('zeros g', lambda: run(learned_relu, zero), lambda: run(learned_relu_reference, torch.zeros_like))
        else: case(f'zeros {role}', lambda: run(learned_relu, zero), lambda: run(learned_relu_reference, zero))
    v = values()
    bn_args = [v[o] for o in NORM]
    bn_args[1] = zero(v['g'])
    case('zeros batchnorm g', lambda: bn(bn_learned_relu, *bn_args), lambda: bn(None, bn_args[0], torch.zeros(SHAPE), *bn_args[2:]))


def fakes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    mode = FakeTensorMode()
    for role in CURVE:
        v = values(**{role: mode.from_tensor})
        def run(f, v=v):
            with mode: return [o.shape for o in curve(f, *(o if isinstance(o, torch._subclasses.FakeTensor) else mode.from_tensor(o)
                                                           for o in (v[k] for k in CURVE)))]
        assert run(learned_relu) == run(learned_relu_reference)
        print('ok fake', role, flush=True)
    v = values()
    y = learned_relu(v['x'].requires_grad_(), v['leak'], v['sub'], v['maxv'])
    try: torch.autograd.grad(y, v['x'], mode.from_tensor(v['g']))
    except Exception as e: print('ok fake gradient of a real output:', type(e).__name__, flush=True)
    else: print('ok fake gradient of a real output', flush=True)


def freed():
    for role in 'x', 'leak', 'maxv':
        v = values()
        v[role].untyped_storage().resize_(0)
        try: learned_relu(v['x'], v['leak'], v['sub'], v['maxv'])
        except ValueError as e: assert 'a storage of 0 bytes' in str(e)
        else: raise AssertionError(f'freed {role}: computed')
        print('ok freed', role, flush=True)
    for role in 'x', 'leak':
        v = values()
        y = learned_relu(v['x'].requires_grad_(), v['leak'].requires_grad_(), v['sub'], v['maxv'])
        gone = y if role == 'x' else v['leak']
        gone.untyped_storage().resize_(8)
        try: torch.autograd.grad(y, v['leak'], v['g'])
        except (ValueError, RuntimeError) as e: assert 'storage' in str(e), e
        else: raise AssertionError(f'freed {role} between forward and backward: computed')
        print('ok freed between', role, flush=True)


def kept_elsewhere():
    "Saved tensors that come back as something else"
    for kind in 'wrapper', 'negated', 'subclass', 'transposed':
        v = values()
        want = curve(learned_relu_reference, *(v[o].clone() for o in CURVE))
        def run(v=v, kind=kind):
            def pack(t): return t.detach()
            def unpack(t): return KINDS[kind](t) if t.is_floating_point() else t
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack): return curve(learned_relu, *(v[o].clone() for o in CURVE))
        case(f'kept as {kind}', run, lambda want=want: want)


def many_at_once():
    v = values()
    args = [v[o].requires_grad_() for o in ('x', 'leak', 'sub', 'maxv')]
    gs = torch.randn(3, *SHAPE)
    got, want = (torch.autograd.grad(f(*args), args, gs, is_grads_batched=True) for f in (learned_relu, learned_relu_reference))
    for a, b in zip(got, want, strict=True): alike(a, b)
    leaks = torch.rand(5, 3)
    got, want = (torch.vmap(lambda o, f=f: f(v['x'].detach(), o, v['sub'].detach(), v['maxv'].detach()))(leaks)
                 for f in (learned_relu, learned_relu_reference))
    alike(got, want)
    print('ok many at once', flush=True)


def other_functions():
    for kind in 'negated', 'imaginary', 'swapped', 'subclass':
        for name, f in dict(learned_clip=lambda t: learned_clip(t, torch.tensor(1.)), symmetric_clip=lambda t: symmetric_clip(t, torch.tensor(1.)),
                            learned_threshold=lambda t: learned_threshold(t, torch.tensor(.2)), leaky_grad_relu=leaky_grad_relu).items():
            for role in 'x', 'g':
                def run(make, f=f, role=role):
                    v = values(**{role: make})
                    x = v['x'].requires_grad_() if v['x'].is_leaf else v['x']
                    if not x.requires_grad: x = x.detach().requires_grad_()
                    y = f(x)
                    return y, *torch.autograd.grad(y, x, v['g'])
                case(f'{name} {kind} {role}', lambda: run(KINDS[kind]), lambda: run(KINDS['plain']))
    v = values()
    for role in CURVE:
        for kind in KINDS:
            given = values(**{role: KINDS[kind]})
            case(f'gradients {kind} {role}', lambda given=given: learned_relu_gradients(given['g'], given['x'], *(given[o] for o in CURVE[2:])),
                 lambda: learned_relu_gradients(v['g'], v['x'], *(v[o] for o in CURVE[2:])))


def under_autocast():
    for form in None, 'eager', 'reference':
        for shape in SHAPE, (0, 3), (6, 8):
            x = torch.randn(shape)[..., ::2] if shape == (6, 8) else torch.randn(shape)
            with impl(form), torch.autocast('cpu', torch.bfloat16):
                y = learned_relu(x, *map(torch.tensor, (.1, .2, 1.)))
            assert y.dtype == torch.float32, (form, shape)
    print('ok autocast', flush=True)


def distributed():
    "Parameters of a layer that was distributed, beside an input that was and one that was not"
    try:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
    except ImportError: return print('ok distributed: this PyTorch has it under another name', flush=True)
    v = values()
    want = curve(learned_relu_reference, *(v[o].clone() for o in CURVE))
    with tempfile.TemporaryDirectory() as d:
        torch.distributed.init_process_group('gloo', init_method=f'file://{d}/store', rank=0, world_size=1)
        mesh = torch.distributed.init_device_mesh('cpu', (1,))
        for form in None, 'eager':
            with impl(form):
                m = distribute_module(LearnedRelu(3, **{k: v[k] for k in ('leak', 'sub', 'maxv')}), mesh)
                assert isinstance(m.leak, DTensor)
                try: m(v['x'].clone())
                except RuntimeError as e: assert 'mixed torch.Tensor and DTensor' in str(e), e
                else: raise AssertionError('distributed parameters and a plain input: computed')
                for place in Replicate(), Shard(0), Shard(1):
                    x, g = (distribute_tensor(v[o].clone(), mesh, [place]).requires_grad_(o == 'x') for o in ('x', 'g'))
                    y = m(x)
                    got = y, *torch.autograd.grad(y, [x, m.leak, m.sub, m.maxv], g)
                    for a, b in zip(got, want, strict=True): alike(a.full_tensor(), b)
                    print('ok distributed', form, place, flush=True)
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    if sys.argv[1:] == ['node']: node.make()
    else: node.curve = lambda *_: None
    for f in (every_kind_in_every_role, zeros_that_nobody_wrote, fakes, freed, kept_elsewhere, many_at_once, other_functions, under_autocast,
              distributed): f()
    print('all', flush=True)
    sys.exit(0)
