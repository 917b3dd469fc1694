"The whole model compiled in place: one graph, the callbacks at work, the same numbers and keys."
import pytest
import torch
from common import OPTS, make, quiet
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from learned_relu.all import ActTelemetry, ClampActParams, EMAActParams, FreezeActParams, LearnedRelu, NoDecayActParams, patch_relus


@pytest.fixture(autouse=True)
def fresh(): torch._dynamo.reset(); counters.clear(); yield; torch._dynamo.reset()


def trained(compiled, when='after', backend='aot_eager', activations=False, fuse=False):
    learn = make()
    torch.manual_seed(0)
    learn.model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    learn.opt_func = OPTS['sgd']
    def compile(): learn.model.compile(fullgraph=True, backend=backend)
    if compiled and when == 'before': compile(); quiet_predictions(learn)
    learn.to_learned_relu(cbs=[NoDecayActParams(), ClampActParams(), EMAActParams(), FreezeActParams(),
                               ActTelemetry(every=2, activations=activations)], fuse_bn=fuse)
    if compiled and when == 'after': compile()
    with quiet(learn): learn.fit(3)
    return learn, quiet_predictions(learn)


def quiet_predictions(learn):
    with quiet(learn): return learn.get_preds()[0]


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('activations', [False, True])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_compiled_model_trains_as_an_eager_one(when, activations, fuse):
    (eager, want), (learn, got) = (trained(o, when, activations=activations, fuse=fuse) for o in (False, True))
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    for (k, a), (l, b) in zip(eager.model.state_dict().items(), learn.model.state_dict().items(), strict=True):
        assert k == l and '_orig_mod' not in k
        assert_close(a, b, rtol=1e-4, atol=1e-4)
    if not activations: assert counters['stats']['unique_graphs'] <= (2 if when == 'after' else 3), 'training, evaluation, and before it was patched'
    a, b = (o.act_telemetry.frame() for o in (eager, learn))
    assert len(a) == len(b) and list(a.columns) == list(b.columns)
    if activations: assert_close(torch.tensor(a.clipped.values), torch.tensor(b.clipped.values), rtol=1e-3, atol=1e-3, equal_nan=True)
    if activations: assert b.clipped.notna().any()


def test_saved_compiled_and_loaded_eager(tmp_path):
    learn, preds = trained(True)
    learn.path = tmp_path
    learn.save('m')
    other, _ = trained(False)
    other.path = tmp_path
    other.load('m')
    assert_close(quiet_predictions(other), preds)


@pytest.mark.slow
def test_compiled_by_inductor():
    (_, want), (_, got) = (trained(o, backend='inductor') for o in (False, True))
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_compiled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    patch_relus(model, x, maxv=1.)
    def grads(): model.zero_grad(); model(x).square().sum().backward(); return [p.grad.clone() for p in model.parameters()]
    want = grads()
    model.compile(fullgraph=True, backend='aot_eager')
    for a, b in zip(grads(), want, strict=True): assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counters['stats']['unique_graphs'] == 1 and sum(isinstance(o, LearnedRelu) for o in model.modules()) == 2


def test_what_a_wrapped_model_hides_is_said():
    learn = make(ActTelemetry(activations=True))
    learn.model = torch.compile(learn.model, backend='eager')
    with quiet(learn), pytest.raises(ValueError, match='compile in place'): learn.fit(1)
