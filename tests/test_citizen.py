"What PyTorch does to layers, beside the table on the page: averages in every precision, what is loaded, graphs, and shares of a model."
import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from test_distributed import launch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from torch.testing import assert_close

from learned_relu.act_layer import starting_value
from learned_relu.batchnorm import fuse_batchnorms
from learned_relu.functional import learned_relu
from learned_relu.layers import GeneralRelu, LeakyGradRelu, LearnedClip, LearnedRelu, LearnedThreshold, SymmetricClip
from learned_relu.params import act_params, activation_weights
from learned_relu.surrogate import leaky_grad_relu, learned_clip, learned_threshold, symmetric_clip

LEARNED = [LearnedRelu, LearnedClip, SymmetricClip, LearnedThreshold]
CASTS = {'half': lambda m: m.half(), 'bfloat16': lambda m: m.bfloat16(), 'to': lambda m: m.to(torch.bfloat16), 'type': lambda m: m.type(torch.half),
         'within a model': lambda m: nn.Sequential(m).half()[0], 'made so': lambda m: type(m)(3, dtype=torch.half), 'double': lambda m: m.double(),
         'double, then half': lambda m: m.double().half(), 'default dtype': lambda m: in_default(torch.bfloat16, type(m))}


def in_default(dtype, cls):
    torch.set_default_dtype(dtype)
    try: return cls(3)
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('cast', CASTS.values(), ids=CASTS)
@pytest.mark.parametrize('cls', LEARNED)
def test_an_average_follows_in_every_precision(cls, cast):
    m = cast(cls(3))
    k = m.learn[0]
    p, wide = getattr(m, k), torch.promote_types(getattr(m, k).dtype, torch.float32)
    m.update_averages(.99)
    with torch.no_grad(): p.mul_(1.25)
    for _ in range(1000): m.update_averages(.99)
    avg = getattr(m, f'{k}_avg')
    assert avg.dtype == wide and m.eval().current(k).dtype == p.dtype
    assert_close(avg, p.to(wide), rtol=1e-3, atol=0)
    assert m(torch.randn(2, 3, dtype=p.dtype)).dtype == p.dtype


def test_what_a_cast_leaves_of_an_average():
    m = LearnedRelu(3)
    m.update_averages(.9)
    with torch.no_grad(): m.leak.mul_(1.3)
    m.update_averages(.9)
    before = m.leak_avg.clone()
    assert torch.equal(m.half().leak_avg, before) and torch.equal(m.float().leak_avg, before)
    assert m.double().leak_avg.dtype == torch.float64 and m.to('meta').leak_avg.is_meta and m.num_averaged.dtype == torch.long


def test_in_float32_an_average_is_what_lerp_gives():
    m, want = LearnedRelu(3, leak=torch.rand(3)), None
    for i in range(20):
        m.update_averages(.99)
        want = m.leak.detach().clone() if i == 0 else want.lerp(m.leak.detach(), torch.tensor(1 - .99))
        with torch.no_grad(): m.leak.add_(torch.rand(3))
    assert torch.equal(m.leak_avg, want)


def averaged(**kwargs):
    m = LearnedRelu(3, **kwargs)
    m.update_averages(.9)
    with torch.no_grad(): m.leak.add_(.1); m.sub.add_(.1)
    return m


def without(state, *words): return {k: v for k, v in state.items() if not any(o in k for o in words)}


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('prefix', [False, True])
def test_averages_that_were_not_loaded_are_forgotten(prefix, assign):
    m, other, x = averaged(), LearnedRelu(3, leak=.3, sub=.1), torch.randn(5, 3)
    model = nn.Sequential(m) if prefix else m
    state = (nn.Sequential(other) if prefix else other).state_dict()
    model.load_state_dict(without(state, 'avg', 'averaged'), strict=False, assign=assign)
    assert m.num_averaged == 0 and torch.equal(m.leak_avg, m.leak) and torch.equal(model.eval()(x), other.eval()(x))


def test_what_was_not_loaded_keeps_its_average():
    m = averaged()
    before = copy.deepcopy(m.state_dict())
    m.load_state_dict({}, strict=False)
    m.load_state_dict(dict(leak_avg=before['leak_avg']), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    m.load_state_dict(without(before, 'leak_avg') | dict(leak=torch.full((3,), .4)), strict=False)  # one average alone is missing
    assert m.num_averaged == 1 and m.leak_avg.tolist() == m.leak.tolist() and torch.equal(m.sub_avg, before['sub_avg'])


def test_old_checkpoints_in_half_precision_load_wide():
    old = {k: v.half() if v.is_floating_point() else v for k, v in averaged().state_dict().items()}
    for assign in False, True:
        m = LearnedRelu(3).half()
        m.load_state_dict(old, assign=assign)
        assert m.leak_avg.dtype == torch.float32 and m.leak.dtype == torch.half and m.num_averaged == 1
        assert_close(m.leak_avg, old['leak_avg'].float())


def test_on_meta_a_state_dict_without_averages_is_enough():
    with torch.device('meta'): m = LearnedRelu(3)
    state = LearnedRelu(3, leak=.3).state_dict()
    m.load_state_dict(without(state, 'avg', 'averaged'), strict=False, assign=True)
    assert m.eval()(-torch.ones(1, 3)).tolist() == LearnedRelu(3, leak=.3)(-torch.ones(1, 3)).tolist()


def test_parametrized_values_are_loaded_averaged_and_not_clamped():
    def make():
        m = LearnedRelu(3)
        parametrize.register_parametrization(m, 'leak', nn.Softplus())
        return m
    m, other = make(), make()
    m.update_averages(.9)
    with torch.no_grad(): other.parametrizations.leak.original.fill_(-2.)
    m.load_state_dict(without(other.state_dict(), 'avg', 'averaged'), strict=False)
    assert m.num_averaged == 0 and torch.equal(m.leak_avg, other.leak)
    assert [o.kind for o in act_params(nn.Sequential(m))] == ['sub', 'maxv']
    assert {id(o) for o in activation_weights(m)} == {id(o) for o in m.parameters()}


def test_moved_averages_are_noticed_across_a_cast_and_nothing_else_is():
    m = averaged().eval().train()
    m.half()
    with warnings.catch_warnings(): warnings.simplefilter('error'); m.eval()
    m.train().float()
    with torch.no_grad(): m.leak.add_(.1)
    with pytest.warns(UserWarning, match='trained without updating'): m.double().eval()
    assert m.num_averaged == 0


LAYERS = [*LEARNED, GeneralRelu]


@pytest.mark.parametrize('cls', LAYERS)
def test_back_to_the_start(cls):
    start = torch.rand(3) + 1
    k = {LearnedRelu: 'leak', GeneralRelu: 'leak', LearnedThreshold: 'threshold'}.get(cls, 'cutoff')
    m = cls(3, **{k: start})
    with torch.no_grad():
        for o in (*m.parameters(), *m.buffers()): o.fill_(7)
    m.reset_parameters()
    assert all(torch.equal(v, cls(3, **{k: start}).state_dict()[n]) for n, v in m.state_dict().items())
    far = cls(3, **{k: start}, device='meta')
    far.to_empty(device='cpu').reset_parameters()
    assert torch.equal(getattr(far, k), start)


def test_a_start_that_is_on_meta_is_no_start():
    m = LearnedRelu(3, leak=torch.rand(3, device='meta')).to_empty(device='cpu')
    with pytest.raises(RuntimeError, match='leak started from a tensor on meta'): m.reset_parameters()


@pytest.mark.parametrize('bad,words', [
    (lambda: LearnedRelu(leak=float('nan'), device='meta'), 'leak starts at nan'), (lambda: SymmetricClip(cutoff=0., device='meta'), 'start above 0'),
    (lambda: LearnedClip(cutoff=1., low=1., device='meta'), 'start low below'), (lambda: LearnedRelu(0, device='meta'), 'num_parameters is 0'),
    (lambda: LearnedRelu(2, sub=torch.zeros(3), device='meta'), r'shape \(3,\)'),
    (lambda: LeakyGradRelu(float('inf'), device='meta'), 'leak starts')])
def test_what_is_wrong_is_wrong_on_meta_too(bad, words):
    with pytest.raises(ValueError, match=words): bad()


def test_where_and_as_what_values_start():
    with pytest.raises(TypeError, match='dtype is torch.int32'): LearnedRelu(dtype=torch.int32)
    with pytest.raises(ValueError, match='leak starts at 70000'): LearnedRelu(leak=70000., dtype=torch.half)
    assert starting_value('leak', torch.ones(2, dtype=torch.half), 2).dtype == torch.half  # a tensor brings its own
    assert starting_value('leak', torch.ones(2, dtype=torch.long), 2).dtype == torch.float32
    assert in_default(torch.float64, LearnedRelu).leak.tolist() == [.05]*3
    value = torch.ones(2)
    assert starting_value('leak', value, 2).data_ptr() != value.data_ptr()
    m = LeakyGradRelu(torch.ones(2, 1).flatten(), device='meta', dtype=torch.half)
    assert m.leak.is_meta and m.leak.dtype == torch.half
    with FakeTensorMode(): assert LearnedClip(2, cutoff=torch.ones(2)).cutoff.shape == (2,)


FUNCTIONS = {learned_relu: (.1, .2, 3.), leaky_grad_relu: (.1,), learned_clip: (1.,), symmetric_clip: (1.,), learned_threshold: (1.,)}


@pytest.mark.parametrize('f,values', FUNCTIONS.items(), ids=lambda o: getattr(o, '__name__', ''))
def test_a_function_is_one_node(f, values):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for i, v in enumerate(values): self.register_parameter(f'p{i}', nn.Parameter(torch.full((3,), v), requires_grad=f is not leaky_grad_relu))
        def forward(self, x): return f(x*2, *self.parameters())
    m, x = Model(), torch.randn(4, 3)
    graph = torch.fx.symbolic_trace(m)
    assert [o.target for o in graph.graph.nodes if o.op == 'call_function'][1:] == [f] and torch.equal(graph(x), m(x))


@pytest.mark.parametrize('start', [True, False])
def test_a_layer_that_is_all_there_is_to_write_down(start):
    m, x = averaged().train(start), torch.randn(4, 3)
    assert torch.equal(torch.fx.symbolic_trace(m)(x), m(x))


def test_fused_layers_in_a_graph():
    x = torch.randn(6, 3, 4, 4)
    m = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), LearnedRelu(3))
    other = copy.deepcopy(m)
    fuse_batchnorms(m, x)
    graph = torch.fx.symbolic_trace(m)
    for mode in True, False: assert_close(copy.deepcopy(graph).train(mode)(x), copy.deepcopy(other).train(mode)(x))


@pytest.mark.parametrize('f', [lambda x, a: learned_clip(x, a, a/2, width=.5), lambda x, a: learned_clip(x, a, low=-a),
                               lambda x, a: symmetric_clip(x, a), lambda x, a: learned_threshold(x, a, width=.5),
                               lambda x, a: leaky_grad_relu(x, .2)*a])
def test_a_trace_has_the_gradients_of_the_function(f):
    args = torch.randn(50, 3).requires_grad_(), torch.rand(3).add(.3).requires_grad_()
    traced = torch.jit.trace(f, tuple(o.detach().clone().requires_grad_() for o in args), check_trace=False)
    for a, b in zip(*(torch.autograd.grad(o(*args).pow(2).sum(), args) for o in (f, traced)), strict=True): assert_close(a, b)


def test_two_processes_share_out_a_model_and_hold_the_same_averages(tmp_path):
    launch(Path(__file__).with_name('two_shards.py'), tmp_path)
    a, b = (json.loads((tmp_path/f'{i}.json').read_text()) for i in (0, 1))
    assert a == b and a['local'] == 4 and a['keys'] and a['started'] == a['leak']
    assert_close(a['averages'], a['alone'])
    alone, *others = a['evaluated']
    for o in others: assert_close(torch.tensor(o), torch.tensor(alone))
    assert a['forgotten'] == [[0, True], [0, True]]
