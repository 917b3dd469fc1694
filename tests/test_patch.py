"Surgery: nested, shared, repeated, wrapped, functional, and without a trace."
import pytest
import torch
from fastai.vision.models.xresnet import xresnet18, xresnet34
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet18, resnet50

from learned_relu.all import (
    GeneralRelu,
    LeakyGradRelu,
    LearnedClip,
    LearnedRelu,
    LearnedThreshold,
    SymmetricClip,
    act_layers,
    learned_xresnet,
    patch_relus,
    plain_xresnet,
    unpatch_relus,
)
from learned_relu.xresnet import xresnet_names


def test_every_relu_of_an_xresnet_is_replaced_and_the_convolutions_are_the_same():
    torch.manual_seed(3); plain = xresnet18(n_out=10)
    state = torch.get_rng_state()
    torch.manual_seed(3); built = learned_xresnet('xresnet18', n_out=10)
    assert torch.equal(state, torch.get_rng_state()), 'patching draws no random number'
    torch.manual_seed(3); patched = xresnet18(n_out=10)
    patch_relus(patched)
    for m in built, patched:
        assert len(act_layers(m)) == 19 and not any(isinstance(o, nn.ReLU) for o in m.modules())
        assert all(torch.equal(v, m.state_dict()[k]) for k, v in plain.state_dict().items())
    assert len(patch_relus(xresnet34())) == 35


def test_no_trace_is_left():
    model = xresnet18()
    model[0][1].eval()
    with torch.no_grad(): model(torch.randn(2, 3, 32, 32))
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    patch_relus(model, dry_run=True)
    assert torch.equal(rng, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    patch_relus(model.eval())
    assert not any(m.training for m in act_layers(model).values())


def test_tied_calls_need_one_count():
    report = patch_relus(resnet50(), shared='tie')
    assert len(report) == 1 and len(report.left_alone) == 16
    assert all('channels: left alone' in o.note and o.calls == 3 for o in report.left_alone)
    report = patch_relus(resnet18(), shared='tie')
    assert len(report) == 9 and sum('tied' in o.note for o in report.rows) == 8


def test_one_module_in_two_places_stays_one_module_if_tied_and_becomes_two_if_not():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act)
    report = patch_relus(model, shared='tie')
    assert model[1] is model[3] and len(report) == 1 and 'stands in 2 places' in report.rows[0].note
    unpatch_relus(model)
    assert model[1] is act and model[3] is act
    assert [o.name for o in patch_relus(model).rows] == ['1', '3'] and model[1] is not model[3]
    unpatch_relus(model)
    assert model[1] is act and model[3] is act


def test_names_choose():
    model = xresnet18()
    report = patch_relus(model, include='4.*', exclude='*.act')
    assert [o.name for o in report.rows] == ['4.0.convpath.0.2', '4.1.convpath.0.2']


@pytest.mark.parametrize('layer', [LearnedClip, SymmetricClip, LearnedThreshold, LeakyGradRelu])
def test_the_other_layers_are_put_in_and_taken_out(layer):
    model = xresnet18()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    assert len(patch_relus(model, layer=layer)) == 19 and sum(isinstance(o, layer) for o in model.modules()) == 19
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(unpatch_relus(model)) == 19 and set(model.state_dict()) == set(plain)


def test_other_layers_and_dtypes():
    model = xresnet18().double()
    patch_relus(model, layer=nn.PReLU)
    assert model[0][2].weight.shape == (32,) and model[0][2].weight.dtype == torch.float64
    unpatch_relus(model)
    patch_relus(model, layer=GeneralRelu, per_channel=False, sub=.5)
    assert model[0][2].num_parameters == 1 and model[0][2].sub.item() == .5
    assert model(torch.randn(2, 3, 32, 32).double()).dtype == torch.float64


@pytest.mark.parametrize('bad,words', [
    (lambda: patch_relus(nn.Linear(2, 2)), 'nothing to patch'), (lambda: unpatch_relus(nn.Linear(2, 2)), 'nothing to undo'),
    (lambda: patch_relus(nn.DataParallel(nn.Sequential(nn.ReLU()))), 'wrapped in DataParallel'),
    (lambda: patch_relus(nn.ReLU()), 'put it into an nn.Sequential'),
    (lambda: patch_relus(nn.Sequential(nn.Embedding(5, 3), nn.ReLU())), 'pass sample='),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), sample=torch.zeros(2, 5)), 'could not be run'),
    (lambda: patch_relus(nn.Sequential(nn.Softmax(-1), nn.ReLU()), sample=torch.zeros(2, 6, 4)), 'pass channel_dim='),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), shared='some'), "shared is 'some'"),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), init='random'), "init is 'random'"),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), init='same', layer=LearnedClip), 'LearnedClip is none'),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), nn.GELU()), init='same', replace=nn.GELU), 'none of the ReLU family'),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), exclude='acts*'), "exclude='acts\\*' matches none"),
    (lambda: patch_relus(nn.Sequential(nn.Linear(4, 3), LearnedRelu(3))), 'patched already'),
    (lambda: patch_relus(torch.compile(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))), 'compiled'),
    (lambda: patch_relus(resnet18(), shared='error'), "is called 2 times"),
    (lambda: learned_xresnet('vgg'), "arch is 'vgg'")])
def test_bad_input_is_named(bad, words):
    with pytest.raises(ValueError, match=words): bad()


def test_a_failed_pass_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(9, 1))
    with pytest.raises(ValueError): patch_relus(model)
    assert isinstance(model[1], nn.ReLU) and model.training and not model[1]._forward_hooks


def test_distributed_is_refused():
    class Fake(nn.parallel.DistributedDataParallel):
        def __init__(self): nn.Module.__init__(self)
    with pytest.raises(ValueError, match='patch the model first'): patch_relus(Fake())
    assert isinstance(LearnedRelu(), nn.Module)


def batchnorms(model): return [k for k, m in model.named_modules() if isinstance(m, _BatchNorm)]


def test_without_batchnorm_an_xresnet_begins_as_the_same_function_and_normalises_nothing():
    torch.manual_seed(0); plain, state = plain_xresnet('xse_resnet18', 10, sa=True), torch.get_rng_state()
    torch.manual_seed(0); bare = plain_xresnet('xse_resnet18', 10, batchnorm=False, sa=True)
    assert torch.equal(state, torch.get_rng_state()) and batchnorms(plain) and batchnorms(bare) == []
    assert all(m.training for m in bare.modules()) and len(patch_relus(bare, dry_run=True)) == len(patch_relus(plain, dry_run=True))
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(bare(x), plain.eval()(x))
    torch.testing.assert_close(bare(x[:1]), bare(x)[:1])
    bare(x).sum().backward()
    assert [k for k, p in bare.named_parameters() if p.grad is None] == []
    assert all(m.bias is not None for k, m in bare.named_modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize('name', xresnet_names())
def test_every_xresnet_can_do_without_batchnorm(name):
    with torch.device('meta'): assert batchnorms(plain_xresnet(name, 10)) and batchnorms(plain_xresnet(name, 10, batchnorm=False)) == []
