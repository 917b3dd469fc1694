"Folded models: the same values in every layout, shifts only where they may move, nothing of this library left, and the model untouched."
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from learned_relu.act_layer import ActLayer
from learned_relu.fold import fold_plan, fold_relus
from learned_relu.layers import GeneralRelu, LeakyGradRelu, LearnedClip, LearnedRelu, LearnedThreshold, SymmetricClip
from learned_relu.patch import patch_relus

inf, nan, big = torch.inf, torch.nan, torch.finfo().max


def r(n=3, low=0., high=1.): return torch.linspace(low, high, n) if n > 1 else torch.tensor([(low + high)/2])


LAYERS = {
    'one value': lambda **k: LearnedRelu(**k), 'per channel': lambda **k: LearnedRelu(3, leak=r(), sub=r(), maxv=r(low=.5, high=2), **k),
    'general': lambda **k: GeneralRelu(3, leak=r(), **k), 'relu': lambda **k: LearnedRelu(3, leak=0., sub=0., maxv=big, **k),
    'shifted relu': lambda **k: LearnedRelu(leak=0., sub=.5, maxv=big, **k), 'relu6': lambda **k: LearnedRelu(leak=0., sub=0., maxv=6., **k),
    'cap below 0': lambda **k: LearnedRelu(leak=0., sub=0., maxv=-1., **k), 'identity': lambda **k: LearnedRelu(leak=1., sub=0., maxv=big, **k),
    'leaky and capped': lambda **k: LearnedRelu(leak=.1, sub=0., maxv=1., **k), 'odd slopes': lambda **k: LearnedRelu(3, leak=r(low=-1, high=3), **k),
    'prelu': lambda **k: LearnedRelu(3, leak=r(), sub=0., maxv=big, **k), 'clip': lambda **k: LearnedClip(3, cutoff=r(low=1, high=2), **k),
    'no low': lambda **k: LearnedClip(low=None, **k), 'clip to 1': lambda **k: LearnedClip(3, cutoff=1., low=-2., **k),
    'untied': lambda **k: LearnedClip(3, cutoff=r(low=1, high=2), value=r(), width=1., **k),
    'positive': lambda **k: LearnedClip(3, cutoff=r(low=-1, high=2), value=.5, low=None, width=1., positive_only=True, **k),
    'symmetric': lambda **k: SymmetricClip(3, cutoff=r(low=1, high=2), **k), 'symmetric, one': lambda **k: SymmetricClip(**k),
    'threshold': lambda **k: LearnedThreshold(**k), 'thresholds': lambda **k: LearnedThreshold(3, threshold=r(), value=r(), **k),
    'gradient': lambda **k: LeakyGradRelu(**k)}
LAYOUTS = {'vectors': ((5, 3), 1), 'images': ((2, 3, 4, 4), 1), 'sequences': ((2, 3, 4), 1), 'tokens': ((2, 4, 3), -1),
    'tokens, from the front': ((2, 4, 3), 2),
           'NHWC': ((2, 4, 4, 3), -1), 'volumes': ((2, 3, 2, 2, 2), -4)}
each_layer = pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)


@pytest.mark.parametrize('shape,dim', LAYOUTS.values(), ids=LAYOUTS)
@each_layer
def test_the_same_values(make, shape, dim):
    torch.manual_seed(0)
    act, x = make(channel_dim=dim).eval(), torch.randn(shape)*4
    x.flatten()[:3] = torch.tensor([0., inf, nan])
    folded = fold_relus(nn.Sequential(nn.Identity(), act), x.abs().nan_to_num(posinf=1))
    assert torch.equal(fold_relus(act, x)(x).nan_to_num(7.), act(x).nan_to_num(7.)) and not isinstance(folded[1], ActLayer)
    kept = fold_relus(nn.Sequential(nn.Identity(), act), x[:1], keep_caps=True)
    assert torch.equal(kept(x).nan_to_num(7.), act(x).nan_to_num(7.))


@each_layer
def test_a_value_that_is_no_number_shows_where_the_layer_shows_it(make):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)*4
    for kind in getattr(make(), 'kinds', ()):
        act = make().eval()
        getattr(act, kind).data[-1] = nan
        y = act(x)
        assert y.isnan().any()
        for o in fold_relus(act, x), fold_relus(act, x, keep_caps=True), fold_relus(nn.Sequential(nn.Identity(), act, nn.Identity()), x):
            assert torch.equal(o(x).isnan(), y.isnan()) and torch.equal(o(x).nan_to_num(7.), y.nan_to_num(7.)), kind


@each_layer
def test_at_most_two_operations_more_than_prelu(make):
    x = torch.randn(2, 3, 4, 4)
    graph = torch.export.export(fold_relus(nn.Sequential(nn.Identity(), make()), x, keep_caps=True), (x,)).graph
    assert sum(o.op == 'call_function' for o in graph.nodes) <= 3


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@each_layer
def test_in_other_precisions(make, dtype):
    act, x = make().to(dtype).eval(), torch.randn(2, 3, 4, 4).to(dtype)*4
    assert_close(fold_relus(act, x)(x), act(x))  # which looks at the dtype, too


@each_layer
def test_an_input_that_is_overwritten(make):
    act = make().eval()
    if not isinstance(act, ActLayer): return
    act.writes_back = True
    x = torch.randn(2, 3, 4, 4)
    a, b = x.clone(), x.clone()
    assert torch.equal(fold_relus(act, x)(a), act(b)) and torch.equal(a, b)


def test_inputs_of_several_kinds():
    class Twice(nn.Module):
        def __init__(self, act): super().__init__(); self.act = act
        def forward(self, x): return self.act(x), self.act(x.mean((2, 3)))
    for make in LAYERS.values():
        m, x = Twice(make()).eval(), torch.randn(2, 3, 4, 4)
        for a, b in zip(fold_relus(m, x)(x), m(x), strict=True): assert torch.equal(a, b)


def test_averages_are_what_is_folded_and_the_model_stays():
    m, x = nn.Sequential(nn.Conv2d(3, 3, 1), LearnedRelu(3), nn.BatchNorm2d(3)), torch.randn(4, 3, 5, 5)
    m[1].update_averages(.9)
    with torch.no_grad(): m[1].leak.fill_(.4), m[1].sub.fill_(.9)
    m[1].update_averages(.9)
    before, classes = copy.deepcopy(m.state_dict()), [type(o) for o in m.modules()]
    folded = fold_relus(m, x)
    assert m.training and not folded.training and classes == [type(o) for o in m.modules()]
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert_close(folded(x), m.eval()(x), rtol=1e-6, atol=1e-6)
    assert folded[1].negative_slope == m[1].leak_avg[0].item()


class Residual(nn.Module):
    def __init__(self, act, conv): super().__init__(); self.act, self.conv = act, conv
    def forward(self, x): y = self.act(x); return y + self.conv(y)


class Same(nn.Module):
    def __init__(self, act, conv): super().__init__(); self.act, self.conv = act, conv
    def forward(self, x): return self.conv(self.conv(self.act(x)))


class Flag(nn.Module):
    def __init__(self, *layers): super().__init__(); self.net = nn.Sequential(*layers)
    def forward(self, x): return self.net(x) if x.sum() < 1e9 else x


def act(n=4): return LearnedRelu(n, sub=r(n, .1, .9), leak=r(n), maxv=r(n, 1, 2))
def hooked(m): m.register_forward_hook(lambda *o: None); return m


MOVES = {
    'a convolution': lambda: nn.Sequential(act(), nn.Conv2d(4, 6, 3)), 'without bias': lambda: nn.Sequential(act(), nn.Conv2d(4, 6, 1, bias=False)),
    'grouped': lambda: nn.Sequential(act(), nn.Conv2d(4, 8, 3, groups=2, stride=2)),
    'valid': lambda: nn.Sequential(act(), nn.Conv2d(4, 4, 3, padding='valid')),
    'reflected': lambda: nn.Sequential(act(), nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')),
    'one value': lambda: nn.Sequential(act(1), nn.Conv2d(4, 4, 2)),
    'a BatchNorm': lambda: nn.Sequential(act(), nn.BatchNorm2d(4)), 'pooled': lambda: nn.Sequential(act(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 1)),
    'averaged': lambda: nn.Sequential(act(), nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 1)),
    'averaged in a frame': lambda: nn.Sequential(act(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(4, 4, 1)),
    'a head': lambda: nn.Sequential(act(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)),
    'one value, tokens': lambda: nn.Sequential(act(1), nn.Linear(8, 3))}
STAYS = {
    'padded': lambda: nn.Sequential(act(), nn.Conv2d(4, 4, 3, padding=1)),
    'padded to the same': lambda: nn.Sequential(act(), nn.Conv2d(4, 4, 3, padding='same')),
    'averaged with the frame': lambda: nn.Sequential(act(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 4, 1)),
    'a shortcut': lambda: Residual(act(), nn.Conv2d(4, 4, 1)),
    'shared': lambda: Same(act(), nn.Conv2d(4, 4, 1)), 'not followed': lambda: Flag(act(), nn.Conv2d(4, 4, 1)),
    'the end': lambda: nn.Sequential(nn.Conv2d(4, 4, 1), act()),
    'another activation': lambda: nn.Sequential(act(), nn.Sigmoid(), nn.Conv2d(4, 4, 1)),
    'transposed': lambda: nn.Sequential(act(), nn.ConvTranspose2d(4, 4, 3)),
    'along the last dimension': lambda: nn.Sequential(act(), nn.Linear(8, 3)), 'watched': lambda: nn.Sequential(hooked(act()), nn.Conv2d(4, 4, 1)),
    'watched behind': lambda: nn.Sequential(act(), hooked(nn.Conv2d(4, 4, 1))),
    'without statistics': lambda: nn.Sequential(act(), nn.BatchNorm2d(4, track_running_stats=False))}


@pytest.mark.parametrize('keep', [True, False])
@pytest.mark.parametrize('make,moves', [(o, True) for o in MOVES.values()] + [(o, False) for o in STAYS.values()], ids=[*MOVES, *STAYS])
def test_where_a_shift_moves(make, moves, keep):
    torch.manual_seed(0)
    m = make()
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d) and o.track_running_stats: o.running_mean.uniform_(-1, 1); o.running_var.uniform_(.5, 2)
    m, x = m.eval(), torch.randn(2, 4, 8, 8)*3
    folded, plan = fold_relus(m, x, keep_caps=keep), fold_plan(m, x, keep_caps=keep)
    assert_close(folded(x), m(x), rtol=1e-6, atol=2e-6)
    assert sum('its shift moves into' in o.note for o in plan.rows) == moves
    other = torch.randn(2, 4, 8, 8)*3
    assert_close(fold_relus(m, x, keep_caps=True)(other), m(other), rtol=1e-6, atol=2e-6)


def test_a_linear_layer_after_vectors_and_after_tokens():
    for dim, x in (1, torch.randn(5, 4)), (-1, torch.randn(2, 5, 4)):
        m = nn.Sequential(LearnedRelu(4, sub=r(4), channel_dim=dim), nn.Linear(4, 3)).eval()
        assert 'moves into 1' in fold_plan(m, x).rows[0].note
        assert_close(fold_relus(m, x)(x), m(x), rtol=1e-6, atol=1e-6)


def test_a_cap_is_left_out_where_the_sample_does_not_reach_it():
    m, low, high = nn.Sequential(nn.Identity(), LearnedRelu(3, maxv=2.)).eval(), torch.rand(2, 3), torch.rand(2, 3) + 3
    assert 'binds nowhere' in fold_plan(m, low).rows[0].note and 'minimum' not in fold_plan(m, low).rows[0].new
    for kwargs in dict(sample=high), dict(sample=low, keep_caps=True): assert torch.equal(fold_relus(m, **kwargs)(high), m(high))
    alone = nn.Sequential(nn.Linear(3, 3), m).eval()
    assert 'minimum' in fold_plan(alone).rows[0].new  # the zeros that stand for a sample say nothing of caps


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n)
    def forward(self, x): return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Functions(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x): return self.b(torch.relu(self.a(x)).relu_())


def vary(m):
    for o in m.modules():
        if isinstance(o, ActLayer):
            for k, p in o.named_parameters(): p.data.copy_(torch.rand_like(p)*.4 + (2 if k == 'maxv' else .1))
    return m.eval()


PATCHED = {'blocks': (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
                      (2, 3, 8, 8)),
           'functions': (Functions, (5, 4)),
           'a transformer': (lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True), (2, 5, 8))}


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # of attention, which is PyTorch's
@pytest.mark.parametrize('make,shape', PATCHED.values(), ids=PATCHED)
def test_patched_models_run_without_this_library(make, shape, tmp_path):
    torch.manual_seed(0)
    m, x = make(), torch.randn(shape)
    assert len(patch_relus(m, x)) > 0
    want = vary(m)(x)
    torch.save((fold_relus(m, x), x, want), tmp_path/'model.pt')
    code = (f"import sys; sys.modules['learned_relu'] = None; import torch; m, x, want = torch.load({str(tmp_path/'model.pt')!r}, weights_only=False)"
            "\ntorch.testing.assert_close(m(x), want, rtol=1e-6, atol=2e-6)")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)
    for f in lambda o: torch.export.export(o, (x,)).module(), lambda o: torch.jit.trace(o, x, check_trace=False), copy.deepcopy:
        assert_close(f(fold_relus(m, x))(x), want, rtol=1e-6, atol=2e-6)


def test_what_has_a_curve_of_its_own_stays():
    class Cubed(ActLayer):
        def __init__(self): super().__init__(dict(a=1.), learn='a')
        def curve(self, x, values, channel_dim): return x**3*values['a']
    m, x = nn.Sequential(Cubed(), LearnedRelu()).eval(), torch.randn(2, 3)
    plan = fold_plan(m, x)
    assert len(plan) == 1 and 'a curve of its own' in plan.rows[0].note and '1 of 2 folded' in repr(plan)
    assert_close(fold_relus(m, x)(x), m(x))


def test_hooks_see_what_they_saw():
    m, x, seen = nn.Sequential(nn.Linear(3, 3), LearnedRelu(3)).eval(), torch.randn(2, 3), []
    m[1].register_forward_hook(lambda mod, args, out: seen.append(out.detach().clone()))
    fold_relus(m, x)(x), m(x)
    assert torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize('bad,words', [
    (lambda: fold_relus(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), 'nothing to fold'),
    (lambda: fold_relus(nn.DataParallel(LearnedRelu())), 'wrapped in DataParallel'),
    (lambda: fold_relus(torch.compile(nn.Sequential(LearnedRelu()))), 'is compiled'),
    (lambda: fold_relus(nn.Sequential(LearnedRelu(3))), 'pass sample='),
    (lambda: fold_relus(nn.Sequential(nn.Linear(2, 3), LearnedRelu(3)), torch.randn(2, 5)), 'pass sample=')])
def test_bad_input_is_named(bad, words):
    with pytest.raises(ValueError, match=words): bad()
