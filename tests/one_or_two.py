"One training of the same global batches by as many processes as there are; each writes down its steps. Argument: a folder to write to."
import json
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import num_distrib, rank_distrib
from torch import nn

from learned_relu.all import ActTelemetry, ClampActParams, EMAActParams, FreezeActParams, LearnedRelu, NoDecayActParams, act_params
from learned_relu.bench.distributed import on_all_processes

STEPS, N = 12, 24


class Steps(Callback):
    order = 100
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append([o.param.detach().double().tolist() for o in act_params(self.model)])


torch.manual_seed(0)
x = torch.randn(N, 4)
y = x.abs().sum(1, keepdim=True)
pairs = list(zip(x, y, strict=True))  # all of which are one global batch, so that sharing out changes no step
dls = DataLoaders(TfmdDL(pairs, bs=N//max(1, num_distrib()), shuffle=True), TfmdDL(pairs, bs=N))
model = nn.Sequential(nn.Linear(4, 8), LearnedRelu(8), nn.Linear(8, 8), LearnedRelu(maxv=6.), nn.Linear(8, 1))
cbs = [NoDecayActParams(lr_mult=2.), ClampActParams(), EMAActParams(.9), FreezeActParams(.75), ActTelemetry(every=1), Steps()]
learn = Learner(dls, model, nn.MSELoss(), lr=.02, opt_func=Adam, cbs=cbs)
with learn.no_bar(), learn.no_logging():
    with on_all_processes(learn): learn.fit(STEPS, wd=.1)
say = dict(steps=learn.steps.seen, processes=num_distrib(), averages=[getattr(o.layer, f'{o.kind}_avg').tolist() for o in act_params(model)],
           weights=[p.tolist() for p in model.parameters()])
Path(sys.argv[1], f'{num_distrib()}-{rank_distrib()}.json').write_text(json.dumps(say))
