"Every call its own curve, in models that others wrote, and whatever happens to the model afterwards."
import copy
import io
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from fastai.collab import EmbeddingNN
from fastai.tabular.model import TabularModel
from fastai.vision.all import create_unet_model, create_vision_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import models as tv
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.optical_flow import raft_small

from learned_relu.act_layer import ActLayer
from learned_relu.layers import GeneralRelu, LearnedRelu
from learned_relu.params import act_layers, act_params
from learned_relu.patch import patch_relus, unpatch_relus
from learned_relu.rewrite import is_edited


def images(size=64, n=2): return (torch.randn(n, 3, size, size),)
def tv_model(name, **kwargs): return lambda: getattr(tv, name)(weights=None, **kwargs)
def detector(f): return lambda: f(weights=None, weights_backbone=None, min_size=64, max_size=64)


MODELS = {  # name: how it is built, its inputs, the ReLU calls of one run
    'resnet18': (tv_model('resnet18'), images, 17), 'resnet50': (tv_model('resnet50'), images, 49),
    'googlenet': (tv_model('googlenet', init_weights=False), lambda: images(96), 57),
    'densenet121': (tv_model('densenet121'), images, 121), 'vgg11_bn': (tv_model('vgg11_bn'), images, 10),
    'mobilenet_v3_small': (tv_model('mobilenet_v3_small'), images, 14),
    'shufflenet': (tv_model('shufflenet_v2_x0_5'), images, 37), 'squeezenet': (tv_model('squeezenet1_1'), images, 26),
    'quantizable resnet18': (lambda: tv.quantization.resnet18(weights=None, quantize=False), images, 17),
    'retinanet': (detector(retinanet_resnet50_fpn), lambda: ([torch.rand(3, 64, 64)],), 90),
    'fcos': (detector(fcos_resnet50_fpn), lambda: ([torch.rand(3, 64, 64)],), 95),
    'raft': (lambda: raft_small(weights=None), lambda: images(128, 1)*2, 111),
    'unet resnet18': (lambda: create_unet_model(tv.resnet18, 5, (64, 64), pretrained=False), images, 39),
    'vision_learner resnet50': (lambda: create_vision_model(tv.resnet50, 10, pretrained=False), images, 50),
    'tabular': (lambda: TabularModel([(10, 4), (7, 3)], 5, 2, [200, 100], ps=.1),
                lambda: (torch.randint(0, 7, (8, 2)), torch.randn(8, 5)), 2),
    'collab': (lambda: EmbeddingNN([(10, 4), (7, 3)], [50, 20]), lambda: (torch.randint(0, 7, (8, 2)),), 2),
    'transformer': (lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
                    lambda: (torch.randn(2, 7, 32), torch.randn(2, 5, 32)), 4),
    'encoder layer': (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation=nn.ReLU()),
                      lambda: (torch.randn(2, 7, 32),), 1)}


def tensors(o):
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): return [t for v in o.values() for t in tensors(v)]
    return [t for v in o for t in tensors(v)] if isinstance(o, (list, tuple)) else []


def outputs(model, sample, grad=False):
    with torch.set_grad_enabled(grad), torch.random.fork_rng(): torch.manual_seed(1); return tensors(model.eval()(*sample))


def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def curves_called(model, sample):
    called = []
    hooks = [m.register_forward_hook(lambda m, a, o: called.append(m)) for m in act_layers(model).values()]
    outputs(model, sample)
    for h in hooks: h.remove()
    return called


@pytest.mark.parametrize('name', MODELS)
def test_every_call_is_a_curve_of_its_own_and_all_of_it_can_be_undone(name):
    build, inputs, calls = MODELS[name]
    torch.manual_seed(0)
    model, sample, other = build(), inputs(), inputs()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(0, .1)
    before = [outputs(model, o) for o in (sample, other)]
    keys, places = list(model.state_dict()), {n: m for n, m in model.named_modules(remove_duplicate=False)}
    classes, values = {m: type(m) for m in model.modules()}, {k: v.clone() for k, v in model.state_dict().items()}
    report = patch_relus(model, sample, init='same')
    assert report.learning == calls and [o.calls for o in report.replaced] == [1]*calls, report.summary()
    called = curves_called(model, sample)
    assert len(called) == len(set(called)) == calls
    assert all(same(b, outputs(model, o)) for b, o in zip(before, (sample, other), strict=True))
    if name not in ('raft', 'retinanet', 'fcos'):  # these train with targets, or do the same at length
        with_grad, without = outputs(model, sample, grad=True), outputs(model, sample)
        for a, b in zip(with_grad, without, strict=True): torch.testing.assert_close(a, b)
        sum(t.pow(2).mean() for t in tensors(model.train()(*sample))).backward()
        assert [o.name for o in act_params(model) if o.param.grad is None or not o.param.grad.isfinite().all()] == []
    unpatch_relus(model)
    assert list(model.state_dict()) == keys and {m: type(m) for m in model.modules()} == classes
    assert {n: id(m) for n, m in model.named_modules(remove_duplicate=False)} == {n: id(m) for n, m in places.items()}
    model.load_state_dict(values)
    assert same(before[0], outputs(model, sample))


class Loop(nn.Module):
    def __init__(self, turns=3):
        super().__init__()
        self.layers, self.turns = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), turns
    def forward(self, x):
        for i in range(self.turns): x = F.relu(self.layers[i % 3](x))
        return x


class Shared(nn.Module):
    "A head that is called with each level of a pyramid, and an activation called twice."
    def __init__(self):
        super().__init__()
        self.head, self.act = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.ReLU()
        self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
    def forward(self, x):
        levels = [self.head(F.avg_pool2d(x, k)) for k in (1, 2, 4)]
        y = self.act(self.narrow(sum(F.interpolate(o, x.shape[-2:]) for o in levels)))
        return self.act(self.wide(y))


class Checkpointed(nn.Module):
    def __init__(self): super().__init__(); self.body = Shared()
    def forward(self, x): return checkpoint(self.body, x, use_reentrant=False)


def patched(model, sample, **kwargs):
    torch.manual_seed(0)
    patch_relus(model, sample, **kwargs)
    with torch.no_grad():
        for i, o in enumerate(act_params(model)): o.param.add_(.01*i)
    return model


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_turns_and_calls_have_their_own_values_and_nothing_brings_them_out_of_step():
    model = patched(Shared(), X)
    assert [n for n in act_layers(model)] == ['head.1.0', 'head.1.1', 'head.1.2', 'act.0', 'act.1']
    y = model(X)
    def broken(m, args): raise KeyboardInterrupt
    hook = model.wide.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt): model(X)
    hook.remove()
    assert torch.equal(model(X), y)
    y.sum().backward()
    grads = {o.name + o.kind: o.param.grad.clone() for o in act_params(model)}
    whole = Checkpointed(); whole.body = model
    model.zero_grad(); whole(X).sum().backward()
    assert all(torch.equal(o.param.grad, grads[o.name + o.kind]) for o in act_params(model))


@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'compile', 'export', 'trace', 'state_dict', 'submodule'])
def test_a_split_model_goes_wherever_a_model_goes(how):
    model = patched(Shared(), X).eval()
    y = model(X)
    if how == 'deepcopy': other = copy.deepcopy(model)
    if how == 'pickle': other = pickle.loads(pickle.dumps(model))
    if how == 'compile': other = torch.compile(model, fullgraph=True, backend='aot_eager')
    if how == 'export': other = torch.export.export(model, (X,)).module()
    if how == 'trace':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a traced size is a tensor, which PyTorch mentions
            other = torch.jit.trace(model, X)
    if how == 'submodule': other = nn.Sequential(model)[:1]
    if how == 'state_dict':
        other = Shared(); patch_relus(other, X); other.load_state_dict(model.state_dict()); other.eval()
    torch.testing.assert_close(other(X), y, rtol=0, atol=0)
    if how in ('deepcopy', 'pickle'):
        assert isinstance(other, Shared) and is_edited(other) and not set(other.parameters()) & set(model.parameters())
        assert len(unpatch_relus(other)) == 5 and type(other) is Shared


def test_a_model_that_was_compiled_in_place_before_computes_what_an_eager_one_does():
    torch._dynamo.reset()
    eager, compiled = Shared().eval(), Shared().eval()
    compiled.load_state_dict(eager.state_dict())
    compiled.compile(backend='eager')
    torch.testing.assert_close(compiled(X), eager(X))
    for m in eager, compiled: patched(m, X)
    torch.testing.assert_close(compiled(X), eager(X))
    for m in eager, compiled: unpatch_relus(m)
    torch.testing.assert_close(compiled(X), eager(X))


def test_a_model_saved_with_other_code_is_refused():
    source = 'import torch\nclass Net(torch.nn.Module):\n    def __init__(self): super().__init__(); self.fc = torch.nn.Linear(3, 3)\n'
    def module(body):
        import linecache
        text = source + f'    def forward(self, x): {body}\n'
        name = f'<a module of {len(text)} letters>'
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        res = types.ModuleType('net_of_test')
        exec(compile(text, name, 'exec'), res.__dict__)
        sys.modules['net_of_test'] = res
        return res
    try:
        model = module('return torch.relu(self.fc(x))').Net()
        patch_relus(model, torch.zeros(1, 3))
        saved = io.BytesIO(); torch.save(model, saved); saved.seek(0)
        module('return torch.relu(self.fc(x)) + 1')
        with pytest.raises(RuntimeError, match='no longer what it was'): torch.load(saved, weights_only=False)
    finally: sys.modules.pop('net_of_test', None)


def test_loops():
    assert len(patch_relus(Loop(3), torch.zeros(2, 4))) == 3
    longer = patched(Loop(3), torch.zeros(2, 4))
    longer.turns = 5
    longer(torch.randn(2, 4)).sum().backward()
    longer.turns = 1
    longer(torch.randn(2, 4)).sum().backward()
    recurrent = Loop(40); recurrent.layers = nn.ModuleList([nn.Linear(4, 4)]*3)
    report = patch_relus(recurrent, torch.zeros(2, 4))
    assert len(report) == 1 and 'called 40 times: one curve, tied' in report.rows[0].note


class Siamese(nn.Module):
    def __init__(self): super().__init__(); self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    def forward(self, x): return self.body(x) - self.body(-x)


class Drops(nn.Module):
    "Skips layers at random."
    def __init__(self): super().__init__(); self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    def forward(self, x):
        for l in self.layers:
            if torch.rand(()) < .5: x = F.relu(l(x))
        return F.relu(x)


def test_what_shares_weights_by_design_and_what_differs_from_run_to_run_shares_a_curve():
    report = patch_relus(Siamese(), torch.zeros(2, 4))
    assert report.rows[0].note == 'called 2 times: one curve, tied'
    torch.manual_seed(1)
    report = patch_relus(model := Drops(), torch.zeros(2, 4))
    assert len(report) == 2 and 'differs from run to run' in report.rows[0].note
    for _ in range(9): model(torch.randn(2, 4))


class Hard(nn.Module):
    "Calls that cannot be led elsewhere, each for a reason of its own."
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.ReLU()
        self.listed = [nn.ReLU()]
    @staticmethod
    def helper(x): return F.relu(x)
    @torch.no_grad()
    def decorated(self, x): return self.act(x)
    def forward(self, x):
        return self.last(self.helper(self.listed[0](self.fc(self.act(x)))) + self.decorated(x) + (lambda o: torch.relu(o))(x))


def test_what_is_called_in_training_only_is_said_and_leaves_no_trace():
    model = tv.googlenet(weights=None, init_weights=False, aux_logits=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    report = patch_relus(model, dry_run=True)
    assert '4 more calls are made in training only' in report.notes[0] and 'googlenet.py' in report.notes[0]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items()) and torch.equal(rng, torch.get_rng_state())


def test_what_stays_is_said_with_its_place():
    report = patch_relus(Hard(), torch.randn(2, 4))
    notes = {o.name: o.note for o in report.rows}
    assert any('helper' in k and 'no method of a module' in v for k, v in notes.items())
    assert any('<lambda>' in k for k in notes) and 'decorated' in notes['act'] and notes['last'] == ''
    assert report.learning == 3 and report.calls == 6, report


class Residual(nn.Module):
    "A branch that begins in place changes what the shortcut adds."
    def __init__(self, inplace=True): super().__init__(); self.act, self.conv, self.inplace = nn.ReLU(inplace=inplace), nn.Conv2d(3, 3, 1), inplace
    def forward(self, x):
        x = x.clone()
        return self.conv(self.act(x)) + x


class ResidualFunction(Residual):
    def forward(self, x):
        x = x.clone()
        return self.conv(F.relu(x, inplace=self.inplace)) + x


@pytest.mark.parametrize('cls', [Residual, ResidualFunction])
@pytest.mark.parametrize('inplace', [True, False])
def test_an_activation_in_place_stays_in_place_where_that_matters(cls, inplace):
    model = cls(inplace)
    y, dx = model(X), torch.autograd.functional.jacobian(lambda x: model(x).sum(), X)
    report = patch_relus(model, X, init='same')
    assert ('overwrites its input' in report.rows[0].note) == inplace
    assert torch.equal(model(X), y) and torch.equal(torch.autograd.functional.jacobian(lambda x: model(x).sum(), X), dx)
    if inplace:
        unpatch_relus(model)
        report = patch_relus(model, X, layer=nn.PReLU, dry_run=True)
        assert len(report) == 0 and 'overwrites its input' in report.rows[0].note


def test_hooks_and_attributes_go_over_and_come_back():
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []
    model[1].tag = 'mine'
    handle = model[1].register_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    patch_relus(model)
    seen.clear(); model(torch.zeros(1, 3))
    assert seen == ['LearnedRelu'] and model[1].tag == 'mine'
    unpatch_relus(model); model(torch.zeros(1, 3))
    handle.remove(); model(torch.zeros(1, 3))
    assert seen == ['LearnedRelu', 'ReLU']


def test_a_relu_that_is_none_and_one_within_another():
    class Scaled(nn.ReLU):
        def forward(self, x): return 2*super().forward(x)
    class Nested(nn.ReLU):
        def __init__(self): super().__init__(); self.inner = nn.ReLU()
        def forward(self, x): return self.inner(super().forward(x))
    model = nn.Sequential(nn.Linear(3, 3), Scaled(), Nested())
    report = patch_relus(model)
    assert [o.new for o in report.rows] == ['', 'LearnedRelu'] and 'computes something else' in report.rows[0].note
    model(torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('act,replace', [(nn.ReLU6(), nn.ReLU6), (nn.LeakyReLU(.3), nn.LeakyReLU), (nn.Hardtanh(0, 2.), nn.Hardtanh),
                                         (nn.PReLU(4, init=.2), nn.PReLU), (nn.PReLU(init=.7), nn.PReLU)])
def test_the_family_starts_where_it_stood(act, replace):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), act), 20*X
    y = model(x)
    with pytest.raises(ValueError, match='nothing to patch'): patch_relus(model)
    assert patch_relus(model, x, replace=replace).rows[0].old == type(act).__name__
    assert not torch.equal(model(x), y)
    unpatch_relus(model)
    patch_relus(model, x, replace=replace, init='same')
    assert torch.equal(model(x), y)


def test_a_trained_model_starts_as_it_was_unless_told_otherwise():
    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        model(X); return model.eval()
    y = trained()(X)
    report = patch_relus(model := trained(), X)
    assert report.notes[0].startswith('The model has been trained, as the statistics') and torch.equal(model(X), y)
    for kwargs in dict(init={}), dict(leak=.05), dict(init=dict(leak=.05)):
        assert not patch_relus(model := trained(), X, **kwargs).notes and not torch.equal(model(X), y)
    old = trained()
    old[1].num_batches_tracked.zero_()  # as after loading a file from before it was counted, or without it
    assert patch_relus(old, X).notes and torch.equal(old(X), y)


def test_what_else_tells_that_a_model_has_been_trained():
    def model(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 2)).eval()
    assert not patch_relus(model(), X).notes, 'weights as PyTorch draws them'
    frozen, drawn = model(), model()
    frozen[0].requires_grad_(False)
    y = frozen(X)
    assert 'as its frozen weights tell' in patch_relus(frozen, X).notes[0] and torch.equal(frozen(X), y)
    with torch.no_grad(): drawn[0].weight[0, 0, 0, 0] = 1.
    y = drawn(X)
    assert patch_relus(drawn, X).notes[0].startswith('Nothing tells whether the model has been trained') and not torch.equal(drawn(X), y)
    unpatch_relus(drawn)
    for init in {}, 'same': assert not patch_relus(drawn, X, init=init).notes; unpatch_relus(drawn)
    assert torch.equal(drawn(X), y)
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    assert not patch_relus(lazy, per_channel=False, dry_run=True).notes


def test_samples_by_name_and_activations_of_other_kinds():
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.fc, self.act = nn.Linear(4, 4), nn.GELU()
        def forward(self, *, a, b): return self.act(F.relu(self.fc(a))) + b
    report = patch_relus(Named(), dict(a=torch.zeros(2, 4), b=torch.ones(2, 4)))
    assert report.summary() == '1 of 2 activation calls (50%) are curves now; 1 of gelu() is not'


def test_an_error_leaves_everything_as_it_was(monkeypatch):
    model = Shared()
    before, classes = {k: v.clone() for k, v in model.state_dict().items()}, {m: type(m) for m in model.modules()}
    from learned_relu import patch
    for name in 'astray', 'start_from_data':
        def fails(*args): raise KeyboardInterrupt
        monkeypatch.setattr(patch, name, fails)
        with pytest.raises(KeyboardInterrupt): patch_relus(model, X, init='data')
        monkeypatch.undo()
        assert {m: type(m) for m in model.modules()} == classes and list(model.state_dict()) == list(before)
        assert not any(isinstance(m, ActLayer) for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), .1)
    patch_relus(model, X)
    assert isinstance(model.act[0], LearnedRelu) and optimizer


class Calls(nn.Module):
    "A module of which each test sets the body of `forward`."
    def __init__(self): super().__init__(); self.fc, self.fc2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()


class ByArgument(Calls):
    def forward(self, x, act=F.relu): return act(self.fc(x))


class ByVariable(Calls):
    def forward(self, x): f = F.relu if x.shape[0] == 2 else torch.tanh; return f(self.fc(x))


class IntoBuffer(Calls):
    def forward(self, x):
        y = self.fc(x)
        out = torch.empty_like(y)
        with torch.no_grad(): torch.clamp(y, min=0, out=out)
        return out + y


class OfLengths(Calls):
    def forward(self, x): return self.act(self.fc(x)) + (torch.arange(4)[None] - 1).clamp(min=0)


class ByKeywords(Calls):
    def forward(self, x): return F.relu(**{'input': self.fc(x)}) + F.relu(input=self.fc2(x))


class ByMethod(Calls):
    def forward(self, x): f = self.fc(x).relu; return f() + torch.Tensor.relu(self.fc2(x)) + sum(map(F.relu, [x]))


class InIterable(Calls):
    def forward(self, x): return sum(y for layer in (self.fc, self.fc2) for y in self.act(layer(x)))


class Caught(Calls):
    def forward(self, x):
        try: self.act('no tensor')
        except (TypeError, AttributeError): pass
        return F.relu(self.fc(x))


class Container(nn.Sequential):
    def forward(self, x): return F.relu(super().forward(x))


@pytest.mark.parametrize('build,learning,why', [
    (ByArgument, 0, 'is a variable'), (ByVariable, 0, 'is a variable'), (IntoBuffer, 0, 'not called'), (OfLengths, 1, ''),
    (ByKeywords, 1, '*args'), (ByMethod, 0, 'is a variable'), (InIterable, 2, 'cannot be written anew'), (Caught, 1, ''),
    (lambda: Container(nn.Linear(4, 4)), 0, 'would run a module put into it')], ids=lambda o: getattr(o, '__name__', None))
def test_calls_that_only_look_like_one(build, learning, why):
    torch.manual_seed(0)
    model, x, longer = build(), torch.randn(2, 4), torch.randn(3, 4)
    before = model(x), model(longer)
    if learning: report = patch_relus(model, x, init='same')
    else:
        with pytest.raises(ValueError, match='There is nothing to patch'): patch_relus(model, x, init='same')
        report = patch_relus(model, x, dry_run=True)
    assert report.learning == learning and any(why in o.note for o in report.rows), report
    assert torch.equal(model(x), before[0]) and torch.equal(model(longer), before[1])
    if build is ByArgument: assert (model(x, torch.tanh) < 0).any()


def test_a_source_that_is_not_what_runs_is_not_written_anew(tmp_path, monkeypatch):
    def write(body): (tmp_path/'net_on_disk.py').write_text(
        'import torch\nimport torch.nn.functional as F\nclass Net(torch.nn.Module):\n'
        '    def __init__(self): super().__init__(); self.fc = torch.nn.Linear(4, 4)\n'
        f'    def forward(self, x): return {body}\n')
    monkeypatch.syspath_prepend(tmp_path)
    write('F.relu(self.fc(x))')
    import net_on_disk
    x = torch.randn(2, 4)
    model = net_on_disk.Net()
    y = model(x)
    write('F.relu(self.fc(x))*333')
    with pytest.raises(ValueError, match='has changed since it was imported'): patch_relus(model, x, init='same')
    assert torch.equal(model(x), y)
    sys.modules.pop('net_on_disk')


def test_a_class_that_registers_its_subclasses_gets_none():
    registry = {}
    class Registered(nn.Module):
        def __init_subclass__(cls): registry[cls.__name__] = cls
    class Net(Registered):
        def __init__(self): super().__init__(); self.fc, self.act = nn.Linear(4, 4), nn.ReLU()
        def forward(self, x): return self.act(self.act(self.fc(x)))
    report = patch_relus(model := Net(), torch.randn(2, 4))
    assert 'keeps track of its subclasses' in report.rows[0].note and type(model) is Net and registry == {'Net': Net}


def test_the_last_dimension_stays_the_last_whatever_their_number():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    patch_relus(model)
    assert model(torch.randn(2, 5, 4)).shape == (2, 5, 2) and model[1].channel_dim == -1
    patch_relus(model := nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()))
    assert model[2].channel_dim == 1


def test_a_part_that_overwrites_what_it_is_given_goes_on_doing_so():
    class Whole(nn.Module):
        def __init__(self): super().__init__(); self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
        def forward(self, x): x = x.clone(); return self.body(x) + x
    model, x = Whole(), torch.randn(2, 4)
    y = model(x)
    assert 'overwrites its input' in patch_relus(model.body, x, init='same').rows[0].note and torch.equal(model(x), y)


def test_backward_hooks_of_both_kinds_fire_on():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    model[1].register_full_backward_hook(lambda m, gi, go: seen.append(len(gi)))
    patch_relus(model)
    model(torch.randn(2, 4)).sum().backward()
    assert seen == [1]


def test_precisions_start_as_what_stood_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()
    patch_relus(model, torch.randn(2, 4).double(), init='same')
    assert model[1].maxv.dtype == torch.float64
    class Mixed(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head, self.act = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4), nn.ReLU()
        def forward(self, x): return self.act(self.head(self.body(x).float()))
    patch_relus(model := Mixed(), torch.randn(2, 4).bfloat16())
    assert model.act.leak.dtype == torch.float32


def test_patched_twice_and_pickled():
    class Both(Calls):
        def forward(self, x): return F.relu(self.fc(x)) + self.act(self.fc2(x)) + self.act(x)
    globals()['Both'] = Both; Both.__qualname__ = 'Both'
    model, x = Both(), torch.randn(2, 4)
    patch_relus(model, x, include='relu'); patch_relus(model, x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x)) and len(act_layers(model)) == 3
    unpatch_relus(model)
    assert type(model) is Both


def test_a_failed_second_patch_takes_nothing_of_the_first_back():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.ReLU()), nn.Linear(8, 4), nn.ReLU())
    x = torch.randn(2, 3, 8)
    patch_relus(model, x, include='0.*', leak=.4)
    class Fails(nn.Module):
        def forward(self, x): raise KeyError
    with pytest.raises(ValueError, match='could not be run'): patch_relus(model, x, layer=Fails)
    torch.testing.assert_close(outputs(model, (x,)), outputs(model, (x,), grad=True))


def test_nothing_of_a_run_stays(tmp_path):
    import numpy as np
    class Draws(Calls):
        def forward(self, x): np.random.rand(); return self.act(self.fc(x))
    state = np.random.get_state()[1:3]
    patch_relus(Draws(), torch.randn(2, 4))
    assert state[1] == np.random.get_state()[2] and (state[0] == np.random.get_state()[1]).all()
    scripted = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)), nn.ReLU())
    assert len(patch_relus(scripted, torch.randn(2, 4))) == 1 and not any(m._forward_hooks for m in scripted[::2])
    with torch.inference_mode(): assert len(patch_relus(Calls1(), torch.randn(2, 4))) == 1


class Calls1(Calls):
    def forward(self, x): return F.relu(self.fc(x))


def test_taking_out_refuses_a_class_that_was_changed_since_and_changes_nothing():
    model = nn.Sequential(Shared(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    patch_relus(model, X, fuse_bn=True)
    owner = model[0]
    owner.scale = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(owner, 'scale', nn.Identity())
    classes = {m: type(m) for m in model.modules()}
    with pytest.raises(ValueError, match='take them off first'): unpatch_relus(model)
    assert {m: type(m) for m in model.modules()} == classes and len(act_layers(model)) == 6
    nn.utils.parametrize.remove_parametrizations(owner, 'scale')
    assert len(unpatch_relus(model)) == 6 and type(owner) is Shared


def helper(x): return F.relu(x)


class Helped(nn.Module):
    "Calls a ReLU in a function, which is not its method, and one of its own"
    def __init__(self, own):
        super().__init__()
        self.lin, self.own = nn.Linear(4, 4), nn.ReLU() if own else nn.Identity()

    def forward(self, x): return helper(self.own(helper(self.lin(x))))


def test_a_call_in_a_function_is_told_once_whatever_it_is_given():
    report = patch_relus(Helped(True), torch.randn(2, 4))
    assert (report.calls, report.learning) == (3, 1) and not any('training' in o for o in report.notes)
    row, = [o for o in report.rows if 'helper' in o.name]
    assert row.calls == 2 and 'helper is no method of a module' in row.note


def test_where_no_call_can_be_reached_that_is_an_error_which_says_why():
    model = Helped(False)
    assert patch_relus(model, torch.randn(2, 4), dry_run=True).learning == 0
    why = '(?s)no call of Helped can be given a curve.*helper is no method of a module'
    with pytest.raises(ValueError, match=why): patch_relus(model, torch.randn(2, 4))
    assert not act_layers(model)


class Normed(nn.Module):
    "A BatchNorm behind an activation, or another norm, which somebody else may read as well"
    def __init__(self, functional=False, skip=False, norm=None):
        super().__init__()
        self.lin, self.act, self.bn, self.functional, self.skip = nn.Linear(4, 4), nn.ReLU(), norm or nn.BatchNorm1d(4), functional, skip

    def forward(self, x):
        y = self.act(self.lin(x))
        z = F.batch_norm(y, None, None, training=True) if self.functional else self.bn(y)
        return z + y if self.skip else z


def lost(model, sample=None, **kwargs):
    report = patch_relus(model, torch.randn(8, 4) if sample is None else sample, **kwargs)
    return [o.partition(' ')[0] for o in report.notes if 'nothing but a normalisation' in o]


@pytest.mark.parametrize('functional', [False, True])
def test_a_shift_that_a_batchnorm_takes_away_is_told(functional):
    model = Normed(functional)
    assert any(o.startswith('1 curve feeds (act) nothing but') for o in patch_relus(Normed(functional), torch.randn(8, 4)).notes)
    assert lost(model) == ['1']
    (model.train()(torch.randn(64, 4))*torch.randn(64, 4)).sum().backward()
    assert model.act.sub.grad.abs().max() < 1e-4*model.act.leak.grad.abs().max()
    assert lost(Normed(functional), learn=['leak', 'maxv']) == lost(Normed(functional), layer=GeneralRelu) == []


NORMS = {  # the norm, a sample in which its channels come second, and of which shifts it leaves nothing: one per channel, one per layer
    'instance': (nn.InstanceNorm1d(4), (8, 4, 6), (True, True)), 'instance, affine': (nn.InstanceNorm1d(4, affine=True), (8, 4, 6), (True, True)),
    'layer': (nn.LayerNorm(4), (8, 4), (False, True)), 'group': (nn.GroupNorm(2, 4), (8, 4), (False, True)),
    'root mean square': (nn.RMSNorm(4), (8, 4), (False, False)), 'none': (nn.Identity(), (8, 4), (False, False))}


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('name', NORMS)
def test_a_shift_that_another_norm_takes_away_is_told(name, per_channel):
    torch.manual_seed(0)
    norm, shape, gone = NORMS[name]
    model = Normed(norm=norm)
    if len(shape) > 2: model.lin = nn.Conv1d(4, 4, 1)
    assert lost(model, torch.randn(shape), per_channel=per_channel) == (['1'] if gone[not per_channel] else [])
    x = torch.randn(64, *shape[1:])
    (model.train()(x)*torch.randn(x.shape)).sum().backward()
    assert (model.act.sub.grad.abs().max() < 1e-4*model.act.leak.grad.abs().max()) == gone[not per_channel]


def test_a_shift_that_somebody_else_reads_is_not():
    torch.manual_seed(0)
    for functional in False, True:
        assert lost(model := Normed(functional, skip=True)) == []
        (model.train()(torch.randn(64, 4))*torch.randn(64, 4)).sum().backward()
        assert model.act.sub.grad.abs().max() > 1e-2*model.act.leak.grad.abs().max()
    assert lost(tv_model('resnet18')(), images()) == lost(tv_model('densenet121')(), images()) == []
    assert lost(TabularModel([(10, 4)], 5, 2, [20, 10]), (torch.randint(0, 9, (8, 1)), torch.randn(8, 5))) == ['2']
