"Layers: state, averages, bad input, compiled and half precision."
import math
import pickle
from copy import deepcopy

import pytest
import torch
from fastai.layers import ConvLayer
from torch import nn
from torch.testing import assert_close

from learned_relu.act_layer import ActLayer
from learned_relu.layers import GeneralRelu, LeakyGradRelu, LearnedClip, LearnedRelu, LearnedThreshold, SymmetricClip
from learned_relu.plot import curve_values

LAYERS = [LearnedRelu(), LearnedRelu(3), LearnedRelu(3, learn=('leak', 'maxv')), LearnedRelu(learn=()), GeneralRelu(), GeneralRelu(3),
          LearnedClip(3), LearnedClip(3, cutoff=1., value=.5, low=None, width=.5, learn=('cutoff', 'value')), LearnedClip(learn=()),
          SymmetricClip(3), LearnedThreshold(), LearnedThreshold(3, learn=('threshold', 'value')),
          LeakyGradRelu(), LeakyGradRelu(torch.rand(3)), LeakyGradRelu(torch.tensor(.1))]
LEARN = [o for o in LAYERS if getattr(o, 'learn', ())]
each_layer = pytest.mark.parametrize('layer', LAYERS, ids=repr)


@each_layer
def test_state_survives_saving_copying_and_pickling(layer):
    layer = deepcopy(layer)
    for v in layer.state_dict().values(): v.copy_(torch.rand_like(v.float()).add(1))
    other = deepcopy(layer)
    for v in other.state_dict().values(): v.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 4)
    for o in other, deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert all(torch.equal(v, o.state_dict()[k]) for k, v in layer.state_dict().items())
        assert torch.equal(o.eval()(x), layer.eval()(x))


@each_layer
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_layer_follows_the_dtype_of_its_input(layer, dtype):
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    assert layer(x).dtype == dtype
    assert_close(layer(x), layer.float()(x.float()).to(dtype), atol=.04 if dtype == torch.bfloat16 else 1e-6, rtol=.02)
    assert deepcopy(layer).to(dtype)(x).dtype == dtype


@each_layer
def test_compiled_in_both_modes(layer):
    odd = isinstance(layer, LeakyGradRelu) or isinstance(layer, LearnedClip) and not layer.learn
    if odd and torch.__version__ < (2, 5): pytest.skip('the compiler of PyTorch 2.4 cannot')
    layer, x = deepcopy(layer), torch.randn(2, 3, 4, 4)
    if getattr(layer, 'learn', ()): layer.update_averages(.9)
    torch._dynamo.reset()  # all layers share one forward, whose recompilations are counted
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for mode in True, False:
        layer.train(mode)
        assert_close(compiled(x), layer(x))


def test_averages_are_read_in_evaluation_only():
    m = LearnedRelu(2)
    m.update_averages(.5)
    with torch.no_grad(): m.sub.fill_(.75)
    m.update_averages(.5)
    x = torch.ones(1, 2)
    assert_close(m.train()(x), torch.full((1, 2), .25)); assert_close(m.eval()(x), torch.full((1, 2), .5))
    assert_close(curve_values(m, torch.ones(1)), torch.full((2, 1), .5))
    assert_close(curve_values(m.train(), torch.ones(1)), torch.full((2, 1), .25))
    m.eval().reset_averages()
    assert_close(m(x), torch.full((1, 2), .25))


def test_loading_in_training_mode_is_not_taken_for_stale_averages(recwarn):
    m, other = LearnedRelu(), LearnedRelu(leak=.2)
    for o in m, other: o.update_averages(.9)
    m.eval().train()
    m.load_state_dict(other.state_dict())
    m.eval()
    assert m.num_averaged == 1 and not len(recwarn)


def test_what_is_fixed_is_state_too():
    assert set(GeneralRelu().state_dict()) == {'leak', 'sub', 'maxv'} and set(LeakyGradRelu(torch.ones(3)).state_dict()) == {'leak'}
    assert set(LearnedClip(learn=()).state_dict()) == {'cutoff', 'low'}


@pytest.mark.parametrize('layer', LEARN, ids=repr)
def test_every_kind_has_bounds_that_its_start_keeps(layer):
    for k in layer.learn:
        low, high = layer.bounds_of(k)
        assert -math.inf < low < high < math.inf and (getattr(layer, k) >= low).all() and (getattr(layer, k) <= high).all()


@pytest.mark.parametrize('layer', LEARN, ids=repr)
def test_every_learned_kind_gets_a_gradient_and_an_average(layer):
    layer, x = deepcopy(layer), torch.linspace(-20, 20, 999)[:, None].expand(-1, 3)
    layer(x).add(1).pow(2).sum().backward()
    assert all((p.grad != 0).all() for p in layer.parameters()) and len(list(layer.parameters())) == len(layer.learn)
    layer.update_averages(.9)
    with torch.no_grad():
        for p in layer.parameters(): p.mul_(1.5)
    layer.update_averages(.9)
    for k in layer.learn: assert_close(getattr(layer, f'{k}_avg'), getattr(layer, k)*(.1 + .9/1.5))


@pytest.mark.parametrize('layer', LEARN, ids=repr)
def test_clipped_is_where_the_input_has_no_gradient(layer):
    x = torch.linspace(-20, 20, 999)[:, None].expand(-1, 3).clone().requires_grad_()
    y = deepcopy(layer)(x)
    assert torch.equal(deepcopy(layer).clipped(y), torch.autograd.grad(y.sum(), x)[0] == 0)


def test_as_act_cls_and_in_state_dicts():
    layer = ConvLayer(3, 4, act_cls=LearnedRelu)
    assert {k.split('.')[-1] for k in layer.state_dict()} >= {'leak', 'sub', 'maxv', 'leak_avg', 'sub_avg', 'maxv_avg', 'num_averaged'}
    assert LearnedRelu.__default_init__ is nn.init.kaiming_uniform_ and isinstance(LearnedRelu(inplace=True), ActLayer)


def test_only_positive_inputs_count_where_asked():
    for positive_only in True, False:
        layer = LearnedClip(cutoff=.1, value=-1., low=None, width=.5, positive_only=positive_only)
        layer(torch.tensor([[-.1]])).sum().backward()
        assert (layer.cutoff.grad == 0).all() == positive_only


@pytest.mark.parametrize('bad,error,words', [
    (lambda: LearnedRelu(0), ValueError, 'num_parameters is 0'), (lambda: LearnedRelu(-3), ValueError, 'num_parameters is -3'),
    (lambda: LearnedRelu(1.5), TypeError, 'num_parameters is 1.5'), (lambda: LearnedRelu(leak=math.nan), ValueError, 'leak starts at nan'),
    (lambda: LearnedRelu(maxv=math.inf), ValueError, 'maxv starts at inf'), (lambda: GeneralRelu(sub=math.nan), ValueError, 'sub starts'),
    (lambda: LearnedRelu(3, sub=torch.zeros(2)), ValueError, r'shape \(2,\)'), (lambda: LearnedRelu(learn=('alpha',)), ValueError, 'alpha'),
    (lambda: LearnedClip(value=1.), ValueError, 'cutoff is to be learned and width is 0'),
    (lambda: LearnedThreshold(width=0), ValueError, 'width is 0'), (lambda: LearnedClip(cutoff=1., low=1.), ValueError, 'start low below cutoff'),
    (lambda: SymmetricClip(cutoff=0.), ValueError, 'cutoff starts at 0'),
    (lambda: LearnedClip(learn='sub'), ValueError, "'sub', which LearnedClip"),
    (lambda: SymmetricClip(0), ValueError, 'num_parameters is 0'), (lambda: LeakyGradRelu(math.inf), ValueError, 'leak starts at inf'),
    (lambda: LeakyGradRelu(torch.ones(2, 2)), ValueError, r'shape \(2, 2\)'),
    (lambda: LearnedRelu(3)(torch.zeros(2, 4)), ValueError, 'leak has 3 values, but x has 4'),
    (lambda: LearnedRelu()(torch.zeros(2, dtype=torch.int)), TypeError, 'torch.int32')])
def test_bad_input_is_named(bad, error, words):
    with pytest.raises(error, match=words): bad()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('updates', [0, 2])
def test_evaluation_reads_the_same_with_and_without_gradients(updates, dtype):
    m = LearnedRelu(3, dtype=dtype)
    for _ in range(updates):
        m.update_averages(.5)
        with torch.no_grad(): m.leak.add_(.1)
    m.train().eval()
    x = torch.linspace(-2, 12, 12, dtype=dtype).view(4, 3)
    want = m(x)
    with torch.no_grad(): got = m(x)
    with torch.inference_mode(): frozen = m(x)
    assert want.requires_grad and torch.equal(got, want) and torch.equal(frozen, want) and got.dtype == dtype
    assert torch.equal(want, m.train()(x)) == (updates == 0)
