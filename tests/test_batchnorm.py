"BatchNorm and the curve as one layer: the same values, gradients, statistics and keys as the two apart."
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from common import make, quiet
from fastai.callback.schedule import fit_one_cycle  # noqa: F401
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from learned_relu import batchnorm
from learned_relu.all import (
    BnLearnedRelu,
    ClampActParams,
    EMAActParams,
    LearnedRelu,
    act_params,
    bn_learned_relu,
    learned_relu,
    learned_relu_reference,
    patch_relus,
    unpatch_relus,
)
from learned_relu.batchnorm import fuse_batchnorms, fuse_bn, unfuse_batchnorms
from learned_relu.bench.speed import saved_bytes
from learned_relu.kernels import build


@pytest.fixture(params=['kernel', 'operations'])
def form(request, monkeypatch):
    "Where there is a kernel, by it and without"
    if request.param == 'operations': monkeypatch.setattr(batchnorm, 'normed_layout', lambda *args: None)
    elif build.kernels() is None: pytest.skip('needs Linux and a C++ compiler')


def arguments(n=3, dtype=torch.float64, last=False):
    torch.manual_seed(0)
    x = torch.randn(4, n, 3, 5, dtype=dtype)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    w, b = torch.linspace(.5, 1.5, n), torch.linspace(-.3, .3, n)
    ps = torch.linspace(0, .3, n), torch.linspace(-.2, .4, n), torch.linspace(.4, 1.2, n)
    return [o.to(dtype).requires_grad_() for o in (x, w, b, *ps)]


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_gradients_are_those_of_finite_differences(training, last, form):
    x, w, b, *ps = arguments(last=last)
    rm, rv = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    def f(x, w, b, *ps): return bn_learned_relu(x, rm.clone(), rv.clone(), w, b, *ps, training=training)
    assert gradcheck(f, (x, w, b, *ps)) and gradgradcheck(f, (x, w, b, *ps))
    def plain(x, *ps): return bn_learned_relu(x, None, None, None, None, *ps, training=True)
    assert gradcheck(plain, (x, *ps)) and gradgradcheck(plain, (x, *ps))


@pytest.mark.parametrize('which', [1, 2])
@pytest.mark.parametrize('last', [False, True])
def test_a_shift_or_cap_that_is_nan_is_seen(last, which, form):
    x, w, b, *ps = arguments(last=last)
    with torch.no_grad(): ps[which][1] = torch.nan
    for training in True, False:
        y = bn_learned_relu(x, torch.zeros(3).double(), torch.ones(3).double(), w, b, *ps, training=training)
        assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()
        assert not torch.autograd.grad(y[:, [0, 2]].sum(), x)[0].isnan().any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(16, 6), (8, 6, 7), (4, 6, 5, 9), (2, 6, 3, 4, 5)])
def test_as_the_two_apart(shape, training, dtype, form):
    torch.manual_seed(0)
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    one = nn.Sequential(cls(6), LearnedRelu(6, leak=torch.tensor([0., .1, .2, .3, .4, 0.]), maxv=1.)).train(training)
    with torch.no_grad(): one[0].weight.uniform_(.5, 2); one[0].running_mean.uniform_(-1, 1)
    two = copy.deepcopy(one)
    fuse_batchnorms(two, torch.zeros(shape))
    two.train(training)
    res = []
    for m in (one, two):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = m(x)
        y.backward(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype))
        res.append([y, x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*res, strict=True): assert_close(a, b)
    assert list(one.state_dict()) == list(two.state_dict())


@pytest.mark.parametrize('kwargs', [dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(eps=.1, momentum=.5)], ids=str)
def test_every_kind_of_batchnorm(kwargs, form):
    one = nn.Sequential(nn.BatchNorm2d(4, **kwargs), LearnedRelu(4))
    two = copy.deepcopy(one)
    fuse_batchnorms(two, torch.zeros(1, 4, 2, 2))
    for _ in range(3):
        x = torch.randn(5, 4, 3, 3)
        assert_close(one(x), two(x))
    for a, b in zip(one.buffers(), two.buffers(), strict=True): assert_close(a, b)
    assert_close(one.eval()(x), two.eval()(x))


@pytest.mark.parametrize('track', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_value_is_computed_again(monkeypatch, dtype, affine, track):
    monkeypatch.setattr(batchnorm, 'normed_layout', lambda *args: None)
    seen, real = [], torch.native_batch_norm
    monkeypatch.setattr(batchnorm.torch, 'native_batch_norm', lambda *args: seen.append(real(*args)) or seen[-1])
    m = nn.Sequential(nn.BatchNorm2d(4, affine=affine, track_running_stats=track), LearnedRelu(4))
    fuse_bn(*m)
    torch.manual_seed(0)
    m((torch.randn(8, 4, 6, 6)*3 + 1).to(dtype).requires_grad_()).float().sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0][0], seen[1][0])


SHAPES = [(300, 5), (7, 20), (5, 3, 70), (4, 9, 8, 9), (3, 20, 3, 3), (2, 3, 40, 30), (6, 1, 9, 9), (2, 3, 4, 5, 6), (40, 3000)]


@pytest.mark.skipif(build.kernels() is None, reason='needs Linux and a C++ compiler')
@pytest.mark.parametrize('scalar', [False, True])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_kernels_against_the_form_to_read(dtype, shape, affine, training, scalar):
    torch.manual_seed(0)
    n = shape[1]
    x = (torch.randn(shape, dtype=torch.float64)*2 + 1).to(dtype)
    w, b = (torch.linspace(.5, 1.5, n).to(dtype), torch.linspace(-.3, .3, n).to(dtype)) if affine else (None, None)
    maxv = torch.tensor(.7) if scalar else torch.linspace(.4, 1.2, n)
    ps = [o.to(dtype) for o in (torch.tensor([0. if scalar else .1]), torch.linspace(-.2, .4, n), maxv)]
    stats = [torch.linspace(.5, 1.5, n).to(dtype), torch.linspace(2, 5, n).to(dtype)]
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    exact = [None if o is None else o.double().requires_grad_() for o in (x, w, b, *ps)]
    h = F.batch_norm(exact[0], *(o.double() for o in stats), *exact[1:3], training)
    want = learned_relu_reference(h, *exact[3:])
    z = learned_relu_reference(h, *exact[3:5], torch.tensor(torch.inf, dtype=torch.float64)) - exact[5].reshape(-1, *[1]*(len(shape) - 2))
    g = g.masked_fill((h.abs() < 1e-4) | (z.abs() < 1e-4), 0)  # at the kinks rounding decides
    theirs = torch.autograd.grad(want, [o for o in exact if o is not None], g.double())
    for fmt in [torch.contiguous_format] + [torch.channels_last]*(len(shape) == 4) + [torch.channels_last_3d]*(len(shape) == 5):
        args = [None if o is None else o.clone().requires_grad_() for o in (x.contiguous(memory_format=fmt), w, b, *ps)]
        running = [o.clone() for o in stats]
        assert batchnorm.normed_layout(args[0], *running, *args[1:3])
        y = bn_learned_relu(args[0], *running, *args[1:], training=training)
        assert y.stride() == args[0].stride()
        loose = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else {}
        assert_close(y, want.to(dtype), **loose)
        for a, c in zip(torch.autograd.grad(y, [o for o in args if o is not None], g), theirs, strict=True):
            scale = c.abs().max().clamp_min(1e-3)
            assert a.shape == c.shape and a.dtype == dtype
            assert_close(a.double()/scale, c/scale, **loose or dict(rtol=1e-9, atol=1e-12))
        with torch.no_grad(): assert torch.equal(bn_learned_relu(args[0], *(o.clone() for o in stats), *args[1:], training=training), y)


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('shape', [(8, 64, 30, 30), (8, 300, 4, 4)])
def test_kernels_give_the_same_numbers_on_any_number_of_threads(shape, last):
    x, *ps = arguments(shape[1], torch.float32)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    n, res = torch.get_num_threads(), []
    try:
        mean, var = torch.batch_norm_update_stats(x.detach(), None, None, 0.)  # PyTorch's own sums depend on the threads
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            y = bn_learned_relu(x, mean, var, *ps)
            res.append([y, *torch.autograd.grad(y, [x, *ps], torch.ones(shape))])
    finally: torch.set_num_threads(n)
    for other in res[1:]:
        for a, b in zip(res[0], other, strict=True): assert torch.equal(a, b)


def test_the_cap_is_where_it_was_going_forward():
    torch.manual_seed(0)
    x, (w, b) = torch.randn(64, 8, 8, 8, requires_grad=True), torch.rand(2, 8)
    for sub in torch.linspace(-.5, .5, 20):
        free = bn_learned_relu(x, None, None, w, b, torch.tensor(.1), sub, torch.tensor(torch.inf), training=True).detach()
        maxv = free.flatten()[torch.randint(free.numel(), ())].clone()  # some element lies on it exactly
        rm, rv = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
        y = bn_learned_relu(x, rm, rv, w, b, torch.tensor(.1), sub, maxv)
        dx, = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx == 0, y == maxv)


def test_saved_tensors_that_come_back_in_another_layout():
    x, *ps = arguments(20, torch.float32, last=True)
    g = torch.randn_like(x)
    want = torch.autograd.grad(bn_learned_relu(x, None, None, *ps, training=True), [x, *ps], g)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
        got = torch.autograd.grad(bn_learned_relu(x, None, None, *ps, training=True), [x, *ps], g.contiguous())
    for a, b in zip(got, want, strict=True): assert torch.equal(a, b)


@pytest.mark.skipif(build.kernels() is None, reason='needs Linux and a C++ compiler')  # PyTorch rounds more, channels last
@pytest.mark.parametrize('eps', [0., 1e-5])
@pytest.mark.parametrize('last', [False, True])
def test_what_does_not_vary(last, eps):
    n = 300
    x = (torch.rand(n, generator=torch.Generator().manual_seed(0))*10**torch.linspace(-3, 3, n)).reshape(1, n, 1, 1).expand(5, n, 9, 9)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    w, b, *ps = arguments(n, torch.float32)[1:]
    rm, rv = torch.zeros(n), torch.ones(n)
    y = bn_learned_relu(x, rm, rv, w, b, *ps, training=True, eps=eps)
    if eps: assert_close(y, learned_relu(b.reshape(1, n, 1, 1).expand(5, n, 9, 9).contiguous(), *ps), rtol=1e-3, atol=5e-2)
    assert rv.isfinite().all() and (rv - .9).abs().max() < 1e-6
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize('kwargs', [dict(momentum=.1), dict(momentum=1.), dict(momentum=0.)], ids=str)
def test_running_statistics_are_those_of_pytorch(kwargs):
    x, *ps = arguments(3, torch.float32)
    x = (x.detach() + 100).requires_grad_()
    mine, theirs = ([torch.full((3,), 2.), torch.full((3,), 3.)] for _ in range(2))
    for _ in range(3):
        bn_learned_relu(x, *mine, *ps, training=True, **kwargs)
        F.batch_norm(x, *theirs, training=True, **kwargs)
    for a, b in zip(mine, theirs, strict=True): assert_close(a, b)


def test_many_gradients_at_once(form):
    args = arguments()
    y = bn_learned_relu(args[0], None, None, *args[1:], training=True)
    gs = torch.randn(5, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, args, gs, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(gs):
        for a, b in zip(got, torch.autograd.grad(y, args, g, retain_graph=True), strict=True): assert_close(a[i], b)


def test_what_the_kernels_do_not_take_goes_another_way():
    x, *ps = arguments(3, torch.float32)
    ones = torch.ones(3)
    for other in (x[..., ::2], x.bfloat16()): assert batchnorm.normed_layout(other, ones) is None
    assert batchnorm.normed_layout(x, ones.double()) is None and batchnorm.normed_layout(x, torch.ones(6)[::2]) is None
    parts = x[..., ::2], x[..., ::2].contiguous()
    assert_close(*(bn_learned_relu(o, None, None, *ps, training=True) for o in parts))


def test_a_frozen_batchnorm_in_a_training_model(form):
    one = nn.Sequential(nn.BatchNorm2d(4), LearnedRelu(4))
    one[0].running_mean += 1
    two = copy.deepcopy(one)
    fuse_batchnorms(two, torch.zeros(1, 4, 2, 2))
    one[0].eval(); two[0].eval()
    x = torch.randn(5, 4, 3, 3)
    assert_close(one(x), two(x))
    one(x).sum().backward(); two(x).sum().backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True): assert_close(a.grad, b.grad)
    assert two[0].running_mean.eq(1).all() and two[0].num_batches_tracked == 0


@pytest.mark.parametrize('dtype,slope', [(torch.float32, .05), (torch.float32, 0.), (torch.bfloat16, .05)])
def test_only_the_input_is_kept(dtype, slope, form):
    m = nn.Sequential(nn.BatchNorm2d(8), LearnedRelu(8, leak=slope)).to(dtype)
    fuse_batchnorms(m, torch.zeros(1, 8, 2, 2, dtype=dtype))
    x = torch.randn(4, 8, 32, 32, dtype=dtype, requires_grad=True)
    assert x.nbytes <= saved_bytes(m, x) < 1.02*x.nbytes and m(x).nbytes == x.nbytes


def test_no_more_is_kept_than_relu_in_place_keeps():
    def net(act): return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), act, nn.Conv2d(32, 32, 3))
    x, m = torch.randn(4, 3, 34, 34), net(LearnedRelu(32, leak=0.))
    fuse_batchnorms(m, x)
    assert saved_bytes(m, x) <= 1.001*saved_bytes(net(nn.ReLU(inplace=True)), x)


def test_a_whole_model_fused_and_taken_apart():
    torch.manual_seed(0)
    model = xresnet18(n_out=4)
    relus = copy.deepcopy(model)
    report = patch_relus(model, fuse_bn=True, leak=0., sub=0., maxv=100.)
    assert sum(o.new == 'BnLearnedRelu' for o in report.rows) == 11 and sum(o.new == 'LearnedRelu' for o in report.rows) == 8
    assert all('with' in o.note for o in report.rows if o.new == 'BnLearnedRelu')
    x = torch.randn(4, 3, 32, 32)
    assert_close(model(x), relus(x))
    for k, v in relus.state_dict().items(): assert_close(model.state_dict()[k], v)
    assert len(act_params(model)) == 3*19
    apart = copy.deepcopy(model)
    assert unfuse_batchnorms(apart) == 11 and not [o for o in apart.modules() if isinstance(o, BnLearnedRelu)]
    assert_close(apart.eval()(x), model.eval()(x))
    apart.load_state_dict(model.state_dict())
    unpatch_relus(model)
    assert str(model) == str(relus) and all(type(o) is not BnLearnedRelu for o in model.modules())
    assert_close(model(x), relus.eval()(x))


class Double(nn.Module):
    def forward(self, x): return x.double()


def test_training_goes_on_with_the_same_optimizer(form):
    def net(): return nn.Sequential(Double(), nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    res, x = [], torch.zeros(2, 1)
    for fuse in (False, True):
        learn = make(ClampActParams(), EMAActParams(), opt='sgd')  # Adam blows up the rounding of a bias before BatchNorm
        torch.manual_seed(0)
        learn.model = net().double()  # in which a hundred steps round alike
        patch_relus(learn.model, x)
        if fuse: fuse_batchnorms(learn.model, x)
        with quiet(learn):
            learn.fit(1)
            if fuse: unfuse_batchnorms(learn.model); fuse_batchnorms(learn.model, x)
            learn.fit(2, reset_opt=False)
        res.append(learn.model.state_dict())
    assert list(res[0]) == list(res[1])
    for a, b in zip(*(o.values() for o in res), strict=True): assert_close(a, b)


def test_saved_and_loaded_whole():
    m = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    patch_relus(m, fuse_bn=True)
    f = io.BytesIO(); torch.save(m, f); f.seek(0)
    n = torch.load(f, weights_only=False)
    assert n[2]._bn[0].weight is n[1].weight
    x = torch.randn(3, 1, 4, 4)
    assert_close(m(x), n(x))
    m.double(); assert m(x.double()).dtype == torch.float64


@pytest.mark.skipif(torch.__version__ < '2.5', reason='the dynamo of PyTorch 2.4 sets no attribute of a module within a graph')
def test_compiled_without_a_graph_break():
    m = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), LearnedRelu(4))
    fuse_batchnorms(m)
    x = torch.randn(3, 1, 4, 4)
    torch._dynamo.reset()
    want, got = copy.deepcopy(m)(x), torch.compile(m, backend='eager', fullgraph=True)(x)
    assert_close(got, want)


class InTraining(nn.Module):
    def forward(self, x): return x*2 if self.training else x


class Branch(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.bn, self.act, self.other, self.how = nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU(), how
        self.drop = InTraining()
    def forward(self, x):
        h = self.bn(x)
        return {'dropped': lambda: self.act(self.drop(h)),
                'returned': lambda: (self.act(h), h), 'added': lambda: self.act(h) + h, 'twice': lambda: self.act(h) + self.other(h),
                'again': lambda: self.act(self.act(h)), 'changed': lambda: self.act(h*2), 'bn twice': lambda: self.act(self.bn(h))}[self.how]()


@pytest.mark.parametrize('how', ['dropped', 'returned', 'added', 'twice', 'again', 'changed', 'bn twice'])
def test_what_is_used_elsewhere_is_not_fused(how):
    m = Branch(how)
    patch_relus(m, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match='nothing to fuse'): fuse_batchnorms(m, torch.zeros(1, 3, 4, 4))
    assert not [o for o in m.modules() if isinstance(o, BnLearnedRelu)]


def test_bad_input_is_named():
    with pytest.raises(TypeError, match='SyncBatchNorm cannot be fused'): fuse_bn(nn.SyncBatchNorm(3), LearnedRelu(3))
    with pytest.raises(TypeError, match='pass a LearnedRelu with channel_dim=1'): fuse_bn(nn.BatchNorm2d(3), LearnedRelu(3, channel_dim=-1))
    one = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match='one value per channel'): bn_learned_relu(torch.ones(1, 3), None, None, *[one]*5, training=True)
    with pytest.raises(ValueError, match='fuse_bn goes with LearnedRelu'): patch_relus(xresnet18(), layer=nn.PReLU, fuse_bn=True)
    m = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3), nn.ReLU())
    with pytest.raises(ValueError, match='nothing to fuse'): patch_relus(m, fuse_bn=True)
    assert type(m[1]) is nn.SyncBatchNorm and type(m[2]) is nn.ReLU, 'left as it was'
    m = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    assert patch_relus(m, fuse_bn=True, dry_run=True).rows[0].new == 'BnLearnedRelu' and type(m[2]) is nn.ReLU
    m = nn.Sequential(nn.BatchNorm2d(3), LearnedRelu())
    fuse_bn(*m)
    with pytest.raises(ValueError, match='expected 4D'): m(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r'running_mean has shape \(3,\), but x has 4 channels'): m(torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match='running_mean is None'): bn_learned_relu(torch.ones(2, 3), None, None, *[one]*5)
    assert m(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize('change', [nn.SyncBatchNorm.convert_sync_batchnorm, lambda m: nn.Sequential(nn.Identity(), m[1])], ids=['sync', 'identity'])
def test_another_batchnorm_in_its_place_is_refused(change):
    m = nn.Sequential(nn.BatchNorm2d(3), LearnedRelu(3))
    fuse_bn(*m)
    x = torch.randn(4, 3, 5, 5)
    m(x)
    with pytest.raises(RuntimeError, match=r'Call unfuse_batchnorms\(model\) first'): change(m)(x)


def test_replicas_are_refused():
    m = nn.Sequential(nn.BatchNorm2d(3), LearnedRelu(3))
    fuse_bn(*m)
    replica = nn.Sequential(*(o._replicate_for_data_parallel() for o in m))
    with pytest.raises(RuntimeError, match='was not called before it'): replica(torch.randn(4, 3, 5, 5))


def test_drawing_a_fused_model_does_not_touch_its_statistics():
    from learned_relu.all import plot_model
    m = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), LearnedRelu(3))
    fuse_batchnorms(m)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    plot_model(m)
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k])


def test_second_derivatives_count_each_path_once(form):
    torch.manual_seed(0)
    x0, w = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.linspace(.5, 1.5, 3, dtype=torch.float64)
    ps = [o.double() for o in (torch.zeros(3), torch.full((3,), .2), torch.full((3,), 5.))]
    def loss(f):
        v = w.clone().requires_grad_()
        y = f(x0*v.view(1, 3, 1, 1)**2, v)  # the weight also feeds the input
        g, = torch.autograd.grad(y.square().sum(), v, create_graph=True)
        return torch.autograd.grad(g.square().sum(), v)[0]
    assert_close(loss(lambda x, v: bn_learned_relu(x, None, None, v, v, *ps, training=True)),
                 loss(lambda x, v: learned_relu(F.batch_norm(x, None, None, v, v, True), *ps)))


def test_the_transforms_of_torch_func():
    x, w, b, *ps = [o.detach() for o in arguments(dtype=torch.float32)]
    def f(x): return bn_learned_relu(x, None, None, w, b, *ps, training=True).square().sum()
    def g(x): return learned_relu(F.batch_norm(x, None, None, w, b, True), *ps).square().sum()
    assert_close(torch.func.grad(f)(x), torch.func.grad(g)(x))


def test_the_form_it_replaces():
    x, w, b, *ps = arguments(dtype=torch.float32)
    with torch.no_grad():
        assert_close(bn_learned_relu(x, None, None, w, b, *ps, training=True), learned_relu(F.batch_norm(x, None, None, w, b, True), *ps))
