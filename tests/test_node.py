"The native node: the same bits as the Python function, whatever comes in, goes out or lies between; and how it comes into being."
import os
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from threading import Timer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu import DTYPES, SHAPES, SLOPES, inputs, node_possible
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from learned_relu.functional import learned_relu
from learned_relu.kernels import build, dispatch
from learned_relu.kernels import node as room
from learned_relu.kernels.dispatch import impl, node
from learned_relu.kernels.library import shelf
from learned_relu.layers import LearnedRelu

pytestmark = node_possible


@pytest.fixture(scope='module', autouse=True)
def native():
    node.make()
    yield


@contextmanager
def in_python():
    "The same kernels, called from the Python function"
    kept, node.curve = node.curve, lambda *_: None
    try: yield
    finally: node.curve = kept


def is_native(y): return 'CppNode' in y.grad_fn.name()


def same(a, b):
    if a is None or b is None: return a is b
    alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and a.requires_grad == b.requires_grad
    return alike and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())


def results(args, dim, g):
    y = learned_relu(*args, dim)
    if not y.requires_grad: return [y]
    wanted = [o for o in args if o.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, g, allow_unused=True)]


def compared(args, dim, g):
    "Whether the node took it; what comes out is the same in any case"
    got = results(args, dim, g)
    with in_python(): want = results(args, dim, g)
    assert len(got) == len(want) and all(map(same, got, want))
    return got[0].requires_grad and is_native(got[0])


@pytest.mark.parametrize('slope', SLOPES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_shape_layout_and_slope(slope, dtype):
    taken, of = 0, 0
    for (shape, dim), per_channel in product([*SHAPES, ((33, 2100), 1), ((3, 4100), 0), ((70, 16, 2, 2), -3), ((9000,), 0)], (True, False)):
        for last in (False, True) if len(shape) == 4 and dim in (1, -3) else (False,):
            x, *ps = inputs(shape, dim, shape[dim] if per_channel else 1, slope, last, dtype)
            for g in torch.randn_like(x), torch.randn(shape).to(dtype), torch.ones((), dtype=dtype).expand(shape):
                taken += compared([x, *ps], dim, g)
                of += 1
    assert taken == of > 40


@pytest.mark.parametrize('need', list(product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize('slope', ['usual', 'zero', 'some'])
def test_every_combination_of_gradients(need, slope):
    for dtype, num in product(DTYPES, (1, 20)):
        args = [o.detach().requires_grad_(n) for o, n in zip(inputs((2, 20, 3, 3), 1, num, slope, False, dtype), need, strict=True)]
        taken = compared(args, 1, torch.randn(2, 20, 3, 3).to(dtype))
        if any(need): assert taken


@pytest.mark.tried('random inputs, their values and gradients', 200)
@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 13), min_size=0, max_size=5), data=st.data(), last=st.booleans(), dtype=st.sampled_from(DTYPES),
       slope=st.sampled_from(list(SLOPES)))
def test_any_shape(shape, data, last, dtype, slope):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1)) if shape else 0
    nums = [data.draw(st.sampled_from([1, shape[dim]])) if shape else 1 for _ in range(3)]
    x = torch.randn(shape).to(dtype)
    if last and len(shape) in (4, 5): x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    ps = [f(n) for f, n in zip((SLOPES[slope], torch.rand, lambda n: torch.rand(n) + .5), nums, strict=True)]
    ps = [p[0] if p.numel() == 1 and data.draw(st.booleans()) else p for p in ps]
    ps = [p.to(data.draw(st.sampled_from([*DTYPES, torch.float16]))) for p in ps]
    compared([o.detach().requires_grad_() for o in (x, *ps)], dim, torch.randn(shape).to(dtype))


def values(dtype=torch.float32, slope='usual', last=False, shape=(4, 8, 5, 5)):
    return inputs(shape, 1, shape[1], slope, last, dtype)


def test_values_that_are_no_numbers():
    x, *ps = values()
    with torch.no_grad():
        for i, v in enumerate((float('nan'), float('inf'), -float('inf'), 0.)): x[0, :, 0, i] = v
    assert compared([x, *ps], 1, torch.randn_like(x))


def test_without_a_graph():
    x, *ps = (o.detach() for o in values())
    learning = [p.clone().requires_grad_() for p in ps]
    for mode in torch.no_grad, torch.inference_mode:
        with mode():
            for args in (x, *ps), (x, *learning), (x.clone(), *learning):
                y = node.curve(*args, 1)
                with in_python(): assert same(y, learned_relu(*args)) and y.is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode(): frozen = x.clone()
    assert same(node.curve(frozen, *ps, 1), learned_relu(x, *ps)) and node.curve(frozen, *learning, 1) is None
    assert not node.curve(x, *ps, 1).requires_grad


@pytest.mark.parametrize('slope,last,shape', [('usual', False, (2, 3, 2, 2)), ('zero', False, (2, 3, 2, 2)), ('some', False, (2, 3, 2, 2)),
                                              ('some', True, (1, 20, 2, 1)), ('first', True, (1, 20, 2, 1)), ('some', False, (2, 3, 8, 8))])
def test_gradients_of_gradients(slope, last, shape):
    args = values(torch.float64, slope, last, shape)
    def curve(*args): return learned_relu(*args, impl='kernel')
    assert is_native(curve(*args)) and gradcheck(curve, args) and gradgradcheck(curve, args)
    def second():
        y = curve(*args)
        first = torch.autograd.grad(y, args, torch.ones_like(y).mul(.5), create_graph=True)
        return *first, *torch.autograd.grad(sum((o*o).sum() for o in first), args, allow_unused=True)
    got = second()
    with in_python(): want = second()
    assert all(map(same, got, want))


@pytest.mark.parametrize('slope', ['usual', 'some'])
def test_a_gradient_of_zeros_of_many_or_of_none(slope):
    x, *ps = values(slope=slope)
    def found(g, **kwargs): return torch.autograd.grad(learned_relu(x, *ps), [x, *ps], g, **kwargs)
    for g in torch._efficientzerotensor(x.shape), torch._neg_view(torch.randn_like(x)), torch.complex(x, -x).detach().conj().imag:
        got = found(g)
        with in_python(): assert all(map(same, got, found(g)))
    many = torch.randn(3, *x.shape)
    got = found(many, is_grads_batched=True)
    with in_python(): want = found(many, is_grads_batched=True)
    for a, b in zip(got, want, strict=True): assert_close(a, b)
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y): return y.clone()
        @staticmethod
        def backward(ctx, g): return None
    torch.autograd.backward(Nothing.apply(learned_relu(x, *ps)).sum())
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize('slope,dtype', [('usual', torch.float32), ('zero', torch.float32), ('some', torch.float32), ('usual', torch.bfloat16)])
def test_what_is_kept_in_which_order(slope, dtype):
    x, *ps = values(dtype, slope, shape=(3, 8, 9, 9))
    def packed():
        seen = []
        def pack(t): seen.append((t.shape, t.dtype, t.stride(), t.data_ptr() in [o.data_ptr() for o in (x, *ps)])); return t
        with saved_tensors_hooks(pack, lambda t: t): y = learned_relu(x, *ps)
        y.sum().backward()
        return seen
    got = packed()
    with in_python(): assert packed() == got and len(got) == dict(usual=5, zero=4, some=7)[slope if dtype == torch.float32 else 'zero']
    if slope == 'some': assert got[-1][0] == (3, 3, 81), 'three of the eight channels'


UNPACKED = dict(contiguous=lambda t: t.clone(memory_format=torch.contiguous_format), strided=lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
                negated=lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
                within=lambda t: torch.stack([t, t])[1])


@pytest.mark.parametrize('unpack', UNPACKED.values(), ids=UNPACKED)
@pytest.mark.parametrize('slope,last', [('usual', True), ('zero', True), ('some', False), ('first', True)])
def test_what_was_kept_elsewhere(unpack, slope, last):
    x, *ps = values(slope=slope, last=last, shape=(4, 20, 9, 9))
    with saved_tensors_hooks(lambda t: t.detach(), unpack): assert compared([x, *ps], 1, torch.randn_like(x))
    with save_on_cpu(): assert compared([x, *ps], 1, torch.randn_like(x))


@pytest.mark.parametrize('slope', ['usual', 'some'])
def test_a_checkpoint_that_computes_again_by_the_other_way(slope):
    x, *ps = values(slope=slope)
    g = torch.randn_like(x)
    want = results([x, *ps], 1, g)
    for first, second in (True, False), (False, True), (True, True):
        ways = iter((first, second))
        def f(*args, ways=ways):
            if next(ways): return learned_relu(*args)
            with in_python(): return learned_relu(*args)
        y = checkpoint(f, x, *ps, use_reentrant=False)
        assert all(map(same, want, [y, *torch.autograd.grad(y, [x, *ps], g)]))


@pytest.mark.parametrize('slope', ['usual', 'some'])
def test_what_was_changed_in_place_is_noticed(slope):
    for change in range(5):
        x, *ps = values(slope=slope)
        y = learned_relu(x*1, *ps)
        with torch.no_grad(): (x, *ps, y)[change].mul_(2)
        if change == 0: y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.sum().backward()


def test_twice():
    x, *ps = values()
    y = learned_relu(x, *ps)
    first = torch.autograd.grad(y.sum(), [x, *ps], retain_graph=True)
    y.sum().backward()
    assert all(same(a, o.grad) for a, o in zip(first, (x, *ps), strict=True))
    with pytest.raises(RuntimeError, match='backward through the graph a second time'): torch.autograd.grad(y, x, torch.ones_like(y))


@pytest.mark.parametrize('slope', ['usual', 'some'])
@pytest.mark.parametrize('which', range(5))
def test_memory_that_was_freed(which, slope):
    x, *ps = values(slope=slope)
    y, g = learned_relu(x, *ps), torch.randn_like(x)
    (x, *ps, y, g)[which + 1].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match='a storage of 8 bytes'): torch.autograd.grad(y, [x, *ps], g)
    x, *ps = (o.detach() for o in values())
    (x, *ps)[which % 4].untyped_storage().resize_(8)
    assert node.curve(x, *ps, 1) is None
    with pytest.raises(ValueError, match='a storage of 8 bytes'): learned_relu(x, *ps)


@pytest.mark.parametrize('kind', ['forward', 'backward'])
def test_memory_that_ran_out(kind, monkeypatch):
    of = build.kernels().of[torch.float32]
    with monkeypatch.context() as m:
        failing = room.ctypes.CFUNCTYPE(room.ctypes.c_int64, room.ctypes.POINTER(build.Call))(lambda _: 1)
        m.setitem(of, kind, failing)
        node.load()
        x, *ps = values()
        with pytest.raises(MemoryError, match='no memory left for the sums of learned_relu'): learned_relu(x, *ps).sum().backward()
    node.load()
    assert compared(values(), 1, torch.randn(4, 8, 5, 5))


def test_anomalies_are_found_and_told_where():
    x, *ps = values()
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter('ignore')
        y = learned_relu(x, *ps)
        with pytest.raises(RuntimeError, match="Function 'torch::autograd::CppNode<Curve>' returned nan values"):
            torch.autograd.grad(y, [x, *ps], torch.full_like(y, float('nan')))


@pytest.mark.parametrize('slope', ['usual', 'some'])
def test_threads(slope):
    x, *ps = values(slope=slope, shape=(16, 8, 20, 20))
    y, g = learned_relu(x, *ps), torch.randn_like(x)
    want = torch.autograd.grad(y, [x, *ps], g, retain_graph=True)
    def again(i):
        res = torch.autograd.grad(y if i % 2 else learned_relu(x, *ps), [x, *ps], g, retain_graph=True)
        return all(map(same, want, res))
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(again, range(200)))


def test_a_fork():
    code = '''
import os, torch
from learned_relu.kernels.dispatch import node
node.make()
x, ps = torch.randn(4, 3, requires_grad=True), [torch.full((3,), o, requires_grad=True) for o in (.1, .2, 1.)]
def results():
    y = node.curve(x, *ps, 1)
    return [y, *torch.autograd.grad(y.sum(), [x, *ps])]
want, pid = results(), os.fork()
if pid == 0:
    try: os._exit(0 if all(map(torch.equal, want, results())) else 1)
    finally: os._exit(2)
print(os.waitpid(pid, 0)[1])
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout == '0\n', done.stderr[-2000:]


@pytest.mark.parametrize('slope', ['usual', 'some'])
def test_compiled_autograd(slope):
    compiled = pytest.importorskip('torch._dynamo.compiled_autograd')
    x, *ps = values(slope=slope)
    want = torch.autograd.grad(learned_relu(x, *ps).sum(), [x, *ps])
    enable = getattr(compiled, '_enable', None) or compiled.enable
    y = learned_relu(x, *ps)
    with warnings.catch_warnings(), enable(lambda graph: torch.compile(graph, backend='eager')):
        warnings.simplefilter('ignore')  # of PyTorch, about gradients of tensors that are no leaves
        y.sum().backward()
    for a, o in zip(want, (x, *ps), strict=True): assert_close(a, o.grad)


def test_the_switch():
    x, *ps = values()
    for name, there in dict(kernel=True, eager=False, reference=False).items():
        with impl(name): assert is_native(learned_relu(x, *ps)) == there
        assert is_native(learned_relu(x, *ps, impl=name)) == there
    with impl('eager'): assert is_native(learned_relu(x, *ps, impl='kernel'))


def test_nobody_who_looks_on_sees_it():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None): return f(*args, **(kwargs or {}))
    x, *ps = values()
    def nothing(): assert node.curve(x, *ps, 1) is None
    with Watch(): nothing()
    with FakeTensorMode(): nothing()
    with forward_ad.dual_level(): nothing()
    nothing_under_vmap = torch.vmap(lambda o: (nothing(), o)[1])
    nothing_under_vmap(torch.zeros(2))
    torch.jit.trace(lambda o: (nothing(), o*1)[1], torch.zeros(2), check_trace=False)
    class Named(torch.Tensor): pass
    for i in range(4):
        args = [x, *ps]
        args[i] = args[i].detach().as_subclass(Named)
        assert node.curve(*args, 1) is None
    layer = LearnedRelu(8)
    torch.compile(layer, backend='eager', fullgraph=True)(x).sum().backward()
    assert node.curve(x, *ps, 1.) is None and node.curve(x, *ps, 9) is None and node.curve(None, *ps, 1) is None


# how it comes into being

def child(code, **env):
    return subprocess.run([sys.executable, '-W', 'error', '-c', SETUP + code], env=os.environ | env, capture_output=True, text=True)


SETUP = '''
import sys, time, torch
from pathlib import Path
from learned_relu.kernels import build, node as room
from learned_relu.kernels.library import shelf
flags = [o for o in build._flags() if o != '-O3'] + ['-O0']
build._flags = lambda: flags
from learned_relu.kernels.dispatch import node
from learned_relu.functional import learned_relu
x, ps = torch.randn(4, 3, requires_grad=True), [torch.full((3,), o, requires_grad=True) for o in (.1, .2, 1.)]
def calls(n):
    for _ in range(n): y = learned_relu(x, *ps)
    y.sum().backward()
    return y.grad_fn.name()
cache = shelf()
'''


@pytest.fixture(scope='module')
def compiler(tmp_path_factory):
    "A compiler that does what `NODE` says in place of compiling a node, and a cache with the kernels that it compiled"
    path = tmp_path_factory.mktemp('compiler')
    script = f'#!/bin/sh\ncase "$*" in *torch_python*) eval "$NODE";; esac\nexec {os.environ.get("CXX", "g++")} "$@"\n'
    (path/'cc').write_text(script)
    (path/'cc').chmod(0o755)
    done = child('calls(1)', CXX=str(path/'cc'), XDG_CACHE_HOME=str(path/'cache'))
    assert done.returncode == 0, done.stderr[-2000:]
    return path


@pytest.fixture
def scripted(compiler, tmp_path):
    "A function from what to do in place of compiling a node to an environment, and a cache of its own"
    shutil.copytree(compiler/'cache', tmp_path/'cache')
    return lambda what: dict(CXX=str(compiler/'cc'), XDG_CACHE_HOME=str(tmp_path/'cache'), NODE=what)


def test_a_short_script_compiles_nothing_and_a_long_one_has_no_wait(scripted):
    env = scripted(f'cat > /dev/null; cp {room.found(room.library_key())} "$(echo "$*" | sed "s/.*-o //")"; exit 0')
    done = child('''
assert 'Curve' in calls(room.ENOUGH - 1) and 'Cpp' not in calls(1), 'whoever has to wait for a compiler is served by Python'
for _ in range(600):
    if 'Cpp' in calls(1): break
    time.sleep(.1)
else: raise AssertionError('it never came')
print(*(o.name for o in cache.glob('*.so')))
''', **env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(o[:5] for o in done.stdout.split()) == ['curve', 'node-']
    done = child('assert "Cpp" not in calls(1) and "Cpp" in calls(1)', **env)
    assert done.returncode == 0, f'a library that is there is loaded at the first call: {done.stderr[-2000:]}'


def test_what_is_not_counted(scripted):
    done = child('''
calls(1)
big = torch.zeros(room.SMALL + 1)
for _ in range(room.ENOUGH): learned_relu(big, *(p[:1] for p in ps)); learned_relu(x, *ps, impl='eager')
with torch.no_grad(): torch.vmap(lambda o: [learned_relu(o, *ps) for _ in range(room.ENOUGH)][0])(x[None])
assert next(node._calls) == 2
''', **scripted('exit 1'))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('fault', ['exit 1', 'cat > /dev/null; echo nonsense > "$(echo "$*" | sed "s/.*-o //")"; exit 0'])
def test_where_it_cannot_be_compiled_nothing_is_said_and_nothing_left(fault, scripted, tmp_path):
    done = child('''
calls(room.ENOUGH)
for _ in range(100):
    if node.curve is room._nothing: break
    time.sleep(.1)
else: raise AssertionError('it goes on trying')
assert 'Cpp' not in calls(3)
''', **scripted(fault))
    assert done.returncode == 0 and not done.stderr and not done.stdout, done.stderr[-2000:]
    assert {o.suffix for o in (tmp_path/'cache'/'learned_relu'/'kernels').iterdir()} <= {'.so', '.lock'}


@pytest.mark.parametrize('how', ['', 'sys.exit(3)', 'raise KeyboardInterrupt', 'import os; os.fork() or sys.exit(0); os.wait()'])
def test_a_process_that_ends_takes_the_compiler_along(how, scripted, tmp_path):
    env = scripted(f'echo $$ > {tmp_path}/pid; sleep 60; exit 1')
    done = child(f'''
calls(room.ENOUGH)
pid = Path({str(tmp_path)!r})/'pid'
while not (pid.exists() and pid.read_text().strip()): time.sleep(.01)
assert len(list(cache.glob('*.so'))) == 1
begin = time.time()
print(begin, flush=True)
{how}
''', **env)
    assert time.time() - float(done.stdout.split()[0]) < 30, 'it does not wait for the minute that the compiler takes'
    for _ in range(50):
        if not alive(int((tmp_path/'pid').read_text())): break
        time.sleep(.1)
    else: raise AssertionError('the compiler goes on')
    assert {o.suffix for o in (tmp_path/'cache'/'learned_relu'/'kernels').iterdir()} <= {'.so', '.lock'}


def test_who_asks_for_it_waits_for_another_who_makes_it(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    mine = room.Node(None)
    monkeypatch.setattr(mine._compiler, 'run', lambda command: Path(command[-1]).write_text('made'))
    hold = 'import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print("held", flush=True); sys.stdin.read()'
    held = [sys.executable, '-c', hold, shelf()/f'{room.library_key()}.lock']
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(OSError, match='another process has been compiling for 0 seconds'): mine.compile(wait=0)
        later = Timer(1, other.stdin.close)
        later.start()
        mine.compile()
        later.join()
    assert room.found(room.library_key()).read_text() == 'made'


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except OSError: return False


def test_without_a_compiler_there_is_none(monkeypatch):
    monkeypatch.setattr(dispatch.cpu, 'supported', lambda *_: False)
    monkeypatch.setattr(room, 'supported', lambda *_: False)
    new = room.Node(dispatch._back_of_node)
    for _ in range(3): assert new.curve(torch.zeros(2, 3), *[torch.ones(3)]*3, 1) is None
    assert next(new._calls) == 1
    assert room.Node(None).curve(torch.zeros(2, 3), *[torch.ones(3)]*3, 1) is None
