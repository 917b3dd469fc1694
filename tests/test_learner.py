"One call on a learner: what it changes, what it must not, and the way back."
import random
import re
import warnings

import numpy as np
import pytest
import torch
from common import make, quiet
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.torch_core import params
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learned_relu.all import ActGradPenalty, ClampActParams, EMAActParams, FreezeActParams, LearnedClip, LearnedRelu, act_params, patch_relus
from learned_relu.learner import sample_inputs
from learned_relu.spread import param_stats

X = torch.arange(8.)[:, None]*9


class Drawing(TensorDataset):
    "As augmentations do, draw from every generator"
    def __getitem__(self, i): random.random(); np.random.rand(); torch.rand(1); return super().__getitem__(i)


class OnlyTrains(Callback):
    def after_train(self): raise CancelFitException


def plain(seed=0):
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    data = Drawing(torch.arange(64.)[:, None], torch.zeros(64, 1))
    dls = DataLoaders(TfmdDL(data, bs=8, shuffle=True, num_workers=0))  # no validation set: the sample is a batch of training
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    return Learner(dls, model, nn.MSELoss(), lr=.01)


def test_a_sample_leaves_every_generator_as_it_was():
    class States(Callback):
        def __init__(self): self.seen = []
        def before_batch(self):
            self.seen.append((self.xb[0].flatten().tolist(), torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[2]))
        def after_train(self): raise CancelFitException
    def seen(look):
        learn = plain()
        if look: sample_inputs(learn)
        with quiet(learn): learn.fit(1, cbs=(states := States()))
        return states.seen
    assert len(seen(False)) == 8 and seen(False) == seen(True)


def test_parameters_put_in_after_a_fit_learn_without_any_callback():
    learn = make()
    learn.model[1] = nn.ReLU(); learn.model[3] = nn.ReLU()
    with quiet(learn): learn.fit(1)
    with pytest.warns(UserWarning, match='after the optimizer was made'), pytest.warns(UserWarning, match='Nothing tells whether'):
        learn.to_learned_relu(cbs=[])
    start = [o.param.detach().clone() for o in act_params(learn.model)]
    with quiet(learn): learn.fit(1)
    moved = {o.kind for o, v in zip(act_params(learn.model), start, strict=True) if (o.param != v).any()}
    assert moved == {'leak', 'sub', 'maxv'}  # maxv through weight decay, which nothing takes away here


def _image(i): return torch.randn(3, 32, 32)
def _label(i): return i % 2


def vision():
    "A vision learner on random images, with a body that shares its ReLUs."
    from fastai.vision.all import DataLoaders as Loaders
    from fastai.vision.all import vision_learner
    from torchvision.models import resnet18
    images = Datasets(list(range(8)), [[_image], [_label]])
    return vision_learner(Loaders.from_dsets(images, images, bs=4, num_workers=0), resnet18, n_out=2, pretrained=False,
                          normalize=False, loss_func=nn.CrossEntropyLoss())


def test_a_split_learner_is_exported_loaded_frozen_and_split_by_fastai(tmp_path):
    learn = vision().to_learned_relu()
    assert learn.relu_report.learning == learn.relu_report.calls == 18
    with quiet(learn): learn.fit_one_cycle(1, 1e-2)
    groups = [{id(p) for p in ps} for ps in learn.opt.param_lists]
    assert all(sum(id(o.param) in g for g in groups) == 1 for o in act_params(learn.model)), 'each in one group of the splitter'
    learn.freeze()  # a frozen body gives the features that it gave
    assert {o.param.requires_grad for o in act_params(learn.model[0])} == {False}
    assert {o.param.requires_grad for o in act_params(learn.model[1])} == {True}
    learn.unfreeze()
    assert all(o.param.requires_grad for o in act_params(learn.model))
    x = torch.randn(2, 3, 32, 32)
    y = learn.model.eval()(x)
    learn.path = tmp_path
    learn.save('split'); learn.export('split.pkl')
    loaded = load_learner(tmp_path/'split.pkl')
    assert torch.equal(loaded.model.eval()(x), y) and loaded.model[0][4][0].relu[1] is not learn.model[0][4][0].relu[1]
    other = vision().to_learned_relu()
    other.path = tmp_path
    other.load('split', with_opt=False)
    assert torch.equal(other.model.eval()(x), y)
    assert torch.equal(loaded.to_relu().model.eval()(x), learn.to_relu().model.eval()(x))


def test_a_learner_of_which_little_or_nothing_learns_says_so():
    class Other(nn.Module):
        def __init__(self, relu): super().__init__(); self.fc, self.act, self.relu = nn.Linear(1, 1), nn.GELU(), nn.ReLU() if relu else None
        def forward(self, x):
            x = self.act(self.act(self.fc(x)))
            return self.relu(x) if self.relu else (lambda o: torch.relu(o))(x)
    learn = plain()
    learn.model = Other(True)
    with pytest.warns(UserWarning, match=r'1 of 3 activation calls \(33%\) are curves now; 2 of gelu\(\) are not'): learn.to_learned_relu()
    learn = plain()
    learn.model = Other(False)
    with pytest.raises(ValueError, match='no call of Other can be given a curve'): learn.to_learned_relu()
    assert not learn.model._forward_hooks and not hasattr(learn, 'relu_report')


def test_a_trained_learner_starts_where_it_stood_within_the_bounds():
    learn = plain()
    learn.model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(8, 1)
    learn.model(x)
    y = learn.model.eval()(x)
    learn.to_learned_relu()
    act = learn.model[2]
    assert 'has been trained' in learn.relu_report.notes[0] and torch.equal(learn.model(x), y)
    assert act.maxv.tolist() == [100.]*4 and act.maxv_avg.tolist() == [100.]*4 and act.leak.tolist() == [0.]*4
    learn.to_relu().to_learned_relu(init={})
    assert learn.model[2].leak.tolist() == pytest.approx([.05]*4)
    with pytest.raises(ValueError, match='leak starts between 0.9 and 0.9'): learn.to_relu().to_learned_relu(init=dict(leak=.9))


@pytest.mark.parametrize('kwargs,words', [
    (dict(leak=torch.full((1,), .9), per_channel=False), '1.leak starts between 0.9 and 0.9, outside its bounds'),
    (dict(layer=LearnedClip, cutoff=1000.), '1.cutoff starts between 1000 and 1000'),
    (dict(init='data'), '1.maxv starts between'), (dict(replace=(nn.ReLU, nn.PReLU), init='same'), '3.leak starts between 0.8 and 0.8')])
def test_no_start_is_moved_into_the_bounds_unsaid(kwargs, words):
    learn = plain()
    learn.model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 4), nn.PReLU(init=.8), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=words): learn.to_learned_relu(**kwargs)
    assert not act_params(learn.model) and [type(o) for o in learn.model][1::2] == [nn.ReLU, nn.PReLU]


def test_a_refused_start_leaves_curves_that_were_built_in():
    learn = plain()
    learn.model = nn.Sequential(nn.Linear(1, 4), LearnedRelu(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 1)).eval()
    before = learn.model[1]
    with pytest.raises(ValueError, match='2.1.leak starts between 0.9'): learn.to_learned_relu(leak=.9)
    assert learn.model[1] is before and isinstance(learn.model[2][1], nn.ReLU)


def test_a_cap_that_was_not_there_and_clips_is_told():
    learn = plain()
    learn.model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad(): learn.model[0].weight.fill_(9.)  # of inputs up to 63
    learn.model[0].requires_grad_(False)
    y = learn.model(X)
    with pytest.warns(UserWarning, match='1 had no cap and starts with 100, .* clips this batch'): learn.to_learned_relu(sample=X)
    assert not torch.equal(learn.model(X), y)
    learn.to_relu().to_learned_relu(sample=X, cbs=[ClampActParams(maxv=(5, 1000))])
    assert torch.equal(learn.model(X), y) and learn.model[1].maxv.tolist() == [1000.]*4
    patch_relus(learn.to_relu().model, X)
    with pytest.warns(UserWarning, match='were there already'): learn.to_learned_relu(sample=X/9)
    assert learn.model[1].maxv.tolist() == [100.]*4
    with quiet(learn): learn.fit(1, cbs=OnlyTrains())


def test_batches_may_come_from_pytorch_or_a_list():
    data = TensorDataset(torch.arange(64.)[:, None], torch.zeros(64, 1))
    g = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=g)
    draws, batch = g.get_state(), next(iter(DataLoader(data, batch_size=8)))
    for dls in DataLoaders(loader, loader), DataLoaders([batch]*3, []):
        learn = Learner(dls, plain().model, nn.MSELoss(), lr=.01).to_learned_relu()
        assert torch.equal(g.get_state(), draws) and learn.relu_report.learning == 1
    with pytest.raises(ValueError, match='come only once: pass sample='):
        Learner(DataLoaders(iter([batch]), []), plain().model, nn.MSELoss()).to_learned_relu()


def test_the_way_back_leaves_nothing_of_curves_and_freezes_what_was_frozen():
    learn = plain()
    learn.splitter = lambda m: [params(m[0]), params(m[1:])]
    learn.freeze()
    learn.to_learned_relu(cbs=ActGradPenalty(.1))
    assert learn.opt.frozen_idx == 1 and not learn.model[0].weight.requires_grad and act_params(learn.model)
    learn.to_relu()
    assert learn.opt.frozen_idx == 1 and not any(isinstance(o, ActGradPenalty) for o in learn.cbs)
    learn.to_learned_relu()
    assert learn.opt.frozen_idx == 1 and not learn.model[0].weight.requires_grad


def test_one_callback_needs_no_list():
    learn = plain().to_learned_relu(cbs=EMAActParams())
    assert [type(o) for o in learn.cbs][-1] is EMAActParams


@pytest.mark.parametrize('given,there', [
    (None, 'NoDecay Clamp EMA Telemetry'), ([], ''), (FreezeActParams(.5), 'NoDecay Clamp EMA Telemetry Freeze'),
    ([EMAActParams(.9), FreezeActParams], 'EMA Freeze'), (CSVLogger(), 'NoDecay Clamp EMA Telemetry CSVLogger')])
def test_other_callbacks_come_beside_the_four_and_a_choice_of_them_in_their_place(given, there):
    learn = plain()
    before = [*learn.cbs]
    learn.to_learned_relu(cbs=given)
    assert [re.sub('Act|Params', '', type(o).__name__) for o in learn.cbs if o not in before] == there.split()


def test_an_optimizer_without_a_step_has_no_momentum_to_lose():
    learn = make()
    learn.model[1] = nn.ReLU(); learn.model[3] = nn.ReLU()
    learn.freeze()  # as vision_learner does in its constructor
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.to_learned_relu(cbs=[])
    assert {id(o.param) for o in act_params(learn.model)} <= {id(p) for ps in learn.opt.param_lists for p in ps}


def test_there_and_back():
    learn = make()
    learn.model[1] = nn.ReLU(); learn.model[3] = nn.ReLU()
    cbs = [type(o) for o in learn.cbs]
    assert learn.to_learned_relu() is learn and len(learn.cbs) == len(cbs) + 4
    assert learn.to_relu() is learn and [type(o) for o in learn.cbs] == cbs and isinstance(learn.model[1], nn.ReLU)
    with quiet(learn): learn.fit(1)


def test_the_gradient_in_a_record_is_its_root_mean_square():
    p = nn.Parameter(torch.tensor([0., .1]))
    p.grad = torch.tensor([3., 4.])
    assert param_stats(p, 0., 1.)[4].item() == pytest.approx(12.5**.5)
