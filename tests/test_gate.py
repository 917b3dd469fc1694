"No tensor, whatever it is, ends the process or is read for what it is not."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cpu import node_possible

from learned_relu import _torch
from learned_relu.functional import learned_relu
from learned_relu.kernels import build, cpu
from learned_relu.kernels.dispatch import impl
from learned_relu.reference import learned_relu_reference

HERE = Path(__file__).parent
compiled = pytest.mark.skipif(build.kernels() is None, reason='needs Linux and a C++ compiler')


def child(*args, **env):
    return subprocess.run([sys.executable, '-W', 'ignore', *args], env=os.environ | env, capture_output=True, text=True)


@pytest.mark.tried('a tensor without ordinary memory', 250)
@pytest.mark.parametrize('form', ['python', pytest.param('node', marks=node_possible)])
def test_every_kind_of_tensor_in_every_role(form):
    done = child(HERE/'gate_cases.py', form)
    assert done.returncode == 0 and done.stdout.endswith('all\n'), done.stdout[-500:] + done.stderr[-3000:]
    assert sum(o.startswith('ok ') for o in done.stdout.splitlines()) > 250


NAMES = ['_transforms', '_modes', '_keys']


@pytest.mark.parametrize('name', NAMES)
def test_a_torch_without_a_private_name_computes_the_readable_form(name, monkeypatch, without_node):
    monkeypatch.setattr(_torch, name, None)
    x, ps = torch.randn(4, 3, requires_grad=True), [torch.full((3,), o, requires_grad=True) for o in (.1, .2, 1.)]
    y = learned_relu(x, *ps)
    assert 'Curve' not in y.grad_fn.name() and torch.equal(y, learned_relu_reference(x, *ps))


def test_a_torch_without_any_of_them_can_be_imported():
    code = ('import torch\nfor o in "_len_torch_dispatch_stack _dispatch_keys".split(): delattr(torch._C, o)\n'
            'from learned_relu.functional import learned_relu\nx = torch.randn(2, 3, requires_grad=True)\n'
            'learned_relu(x, *map(torch.tensor, (.1, .2, 1.))).sum().backward(); assert x.grad is not None; print("fine")')
    done = child('-c', code)
    assert done.stdout == 'fine\n', done.stderr[-2000:]


def test_without_one_call_for_many_each_is_copied(monkeypatch):
    monkeypatch.setattr(_torch, '_copy_each', None)
    to, values = [torch.zeros(2), torch.zeros(3)], [torch.randn(2), torch.randn(3)]
    _torch.copy_each(to, values)
    assert all(map(torch.equal, to, values))


@compiled
def test_the_switch_for_a_process_a_block_and_a_call():
    x, ps = torch.randn(4, 3, requires_grad=True), [torch.full((3,), o, requires_grad=True) for o in (.1, .2, 1.)]
    def form(y):
        name = y.grad_fn.name()
        if 'CppNode' in name: return 'kernel'
        return y.grad_fn.how.backend.name if 'Curve' in name else 'readable'
    with impl('eager'):
        assert form(learned_relu(x, *ps)) == 'eager' and form(learned_relu(x, *ps, impl='kernel')) == 'kernel'
        with impl('reference'): assert form(learned_relu(x, *ps)) == 'readable'
        with impl(None): assert form(learned_relu(x, *ps)) == 'kernel'
        with pytest.raises(ZeroDivisionError), impl('reference'): 1/0  # noqa: B018
        assert form(learned_relu(x, *ps)) == 'eager'
    assert form(learned_relu(x, *ps)) == 'kernel'
    with impl('kernel'):  # which is no reason to lose the tangents of who looks on
        _, t = torch.func.jvp(lambda x: learned_relu(x, *ps), (x.detach(),), (torch.ones(4, 3),))
        assert torch.equal(t, torch.where(x > 0, 1., .1)*(torch.where(x > 0, x, .1*x) - .2 < 1))
    code = ('import torch; from learned_relu.functional import learned_relu as f\n'
            'y = f(torch.ones(2, 3, requires_grad=True), *map(torch.tensor, (.1, .2, 1.))); print(y.grad_fn.how.backend.name)')
    assert child('-c', code, LEARNED_RELU_IMPL='eager').stdout == 'eager\n'
    assert "impl is 'fast': pass 'reference', 'eager' or 'kernel'" in child('-c', code, LEARNED_RELU_IMPL='fast').stderr


@compiled
def test_where_memory_is_short_it_is_said(monkeypatch, without_node):
    monkeypatch.setitem(build.kernels().of[torch.float32], 'backward', lambda call: 1)
    x = torch.randn(4, 3, requires_grad=True)
    y = learned_relu(x, *map(torch.tensor, (.1, .2, 1.)))
    with pytest.raises(MemoryError, match='no memory left for the sums of learned_relu'): y.sum().backward()


@compiled
def test_the_argument_is_the_one_that_the_kernels_were_compiled_with():
    leak, sub = torch.tensor([.1, 0., .2, 1e-5]), torch.full((4,), .25)
    which = torch.zeros(4, dtype=torch.bool)
    assert build.run('lost', torch.float32, build.Call(leak=leak.data_ptr(), sub=sub.data_ptr(), channels=4, signs=which.data_ptr())) == 2
    assert which.tolist() == [False, True, False, True] and cpu.needs_input((leak, sub, sub), torch.float32).tolist() == which.tolist()


@pytest.mark.skipif(_torch._name is repr, reason='PyTorch 2.4 writes the keys out, which takes three times as long')
def test_the_gate_costs_less_for_a_tensor_than_two_of_the_smallest_operations():
    from timeit import repeat
    x, g = torch.randn(4, 3), torch.randn(4, 3)
    _torch.in_memory(x, g)
    pairs = [[min(repeat(f, number=500, repeat=1)) for f in (lambda: _torch.in_memory(*[x, g]*4), lambda: torch.relu(x))] for _ in range(40)]
    gate, relu = (sorted(o)[len(o)//2] for o in zip(*pairs, strict=True))
    assert gate/8 < 2*relu, f'a tensor takes {gate/8/relu:.2f} of a relu of twelve numbers, which is less than a microsecond'
