"One call on a learner: what it changes, what it must not, and the way back."
import random

import numpy as np
import pytest
import torch
from common import make, quiet
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn
from torch.utils.data import TensorDataset

from learned_relu.all import act_params
from learned_relu.callback.telemetry import param_stats
from learned_relu.learner import sample_inputs


class Drawing(TensorDataset):
    "As augmentations do, draw from every generator"
    def __getitem__(self, i): random.random(); np.random.rand(); torch.rand(1); return super().__getitem__(i)


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
    with pytest.warns(UserWarning, match='after the optimizer was made'): learn.to_learned_relu(cbs=[])
    start = [o.param.detach().clone() for o in act_params(learn.model)]
    with quiet(learn): learn.fit(1)
    moved = {o.kind for o, v in zip(act_params(learn.model), start, strict=True) if (o.param != v).any()}
    assert moved == {'leak', 'sub', 'maxv'}  # maxv through weight decay, which nothing takes away here


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
