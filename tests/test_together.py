"What must hold whatever a fit is made of: fastai's schedules, trackers and helpers in pairs, with all callbacks of ours."
import random
import warnings

import fastai.callback.schedule  # noqa: F401  adds fit_one_cycle and the like
import numpy as np
import pytest
import torch
from common import OPTS, quiet
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.optimizer import Lamb, QHAdam, RAdam, RMSProp
from fastai.test_utils import synth_learner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from learned_relu.all import (
    ActTelemetry,
    ClampActParams,
    EMAActParams,
    FreezeActParams,
    LearnedRelu,
    NoDecayActParams,
    act_layers,
    act_params,
)
from learned_relu.averages import decay_after, update_averages

OPTIMIZERS = OPTS | dict(rms=RMSProp, radam=RAdam, qhadam=QHAdam, lamb=Lamb)
SCHEDULES = dict(fit=lambda learn, n: learn.fit(n, 1e-2, wd=.1), one_cycle=lambda learn, n: learn.fit_one_cycle(n, 2e-2, wd=.1),
                 flat_cos=lambda learn, n: learn.fit_flat_cos(n, 1e-2, wd=.1), sgdr=lambda learn, n: learn.fit_sgdr(1, n, 2e-2, wd=.1),
                 again=lambda learn, n: [learn.fit(1, 1e-2), learn.fit(1, 1e-3)], tune=lambda learn, n: learn.fine_tune(1, 1e-2))
HELPERS = dict(none=list, accumulate=lambda: [GradientAccumulation(24)], clip=lambda: [GradientClip(.1)], mixup=lambda: [MixUp(.4)],
               bf16=lambda: [MixedPrecision(amp_mode=AMPMode.BF16)], early=lambda: [EarlyStoppingCallback(monitor='leak', patience=1)],
               best=lambda: [SaveModelCallback(monitor='valid_loss', fname='together')],
               every=lambda: [SaveModelCallback(every_epoch=True, with_opt=True)],
               plateau=lambda: [ReduceLROnPlateau(patience=1)], nan=lambda: [TerminateOnNaNCallback()], short=lambda: [ShortEpochCallback(.5)],
               hypers=lambda: [ParamScheduler({'wd': SchedCos(.1, 0.)})])


class Oracle(Callback):
    "Looks after every step: bounds, frozen bits, averages by hand"
    order, run_valid = 100, False
    def __init__(self, decay, warm_up): self.decay, self.warm_up, self.n, self.frozen = decay, warm_up, 0, None
    def before_train(self):
        if self.epoch == 0: self.frozen = None
    def after_cancel_step(self): self.skip = True
    def after_step(self):
        if self.__dict__.pop('skip', False): return
        acts = act_params(self.learn.model)
        now = [o.param.detach().clone() for o in acts]
        for o, p in zip(acts, now, strict=True):
            low, high = o.layer.bounds_of(o.kind)
            assert ((p >= low) & (p <= high)).all(), f'{o.name}.{o.kind} is out of bounds'
        if self.learn.freeze_act_params.frozen:
            if self.frozen is not None: assert all(torch.equal(a, b) for a, b in zip(self.frozen, now, strict=True)), 'what is frozen moved'
            self.frozen = now
        kept = decay_after(self.n, self.decay, self.warm_up)
        self.avg = [p if self.n == 0 else kept*a + (1 - kept)*p for a, p in zip(getattr(self, 'avg', now), now, strict=True)]
        self.n += 1
        for o, a in zip(acts, self.avg, strict=True): assert_close(getattr(o.layer, f'{o.kind}_avg'), a, rtol=1e-5, atol=1e-7)


def learner(opt, cbs, path):
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    model = nn.Sequential(nn.Linear(1, 4), LearnedRelu(4), nn.Sequential(nn.Linear(4, 4), LearnedRelu(1)), nn.Linear(4, 1))
    learn = synth_learner(n_trn=4, n_val=1, model=model, cbs=cbs, path=path)
    learn.opt_func = OPTIMIZERS[opt]
    learn.splitter = lambda m: [[*m[0].parameters(), *m[1].parameters()], [*m[2].parameters(), *m[3].parameters()]]
    return learn


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from(sorted(SCHEDULES)), st.sampled_from(sorted(HELPERS)), st.sampled_from(sorted(HELPERS)),
       st.sampled_from([.3, .5, 1.]), st.sampled_from([.5, .9]), st.booleans(), st.sampled_from([None, 1, 3]), st.sampled_from([1., .5]))
def test_invariants(tmp_path, opt, schedule, one, other, after, decay, warm_up, every, mult):
    kinds = [one] if one == other else [one, other]
    ours = [NoDecayActParams(mult), ClampActParams(), EMAActParams(decay, warm_up), FreezeActParams(after), ActTelemetry(every)]
    learn = learner(opt, [*ours, Oracle(decay, warm_up)], tmp_path)
    learn.add_cbs(c for k in kinds for c in HELPERS[k]())
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        SCHEDULES[schedule](learn, 2)
    df = learn.act_telemetry.frame()
    if 'best' not in kinds: assert learn.model[1].num_averaged == learn.oracle.n  # which goes back to its best epoch in the end
    steps = df.step.drop_duplicates()
    assert steps.is_monotonic_increasing and steps.is_unique and df[['mean', 'std', 'min', 'max']].notna().all(axis=None)
    assert set(df.fit) == set(range(df.fit.max() + 1)) and steps.max() == learn.oracle.n - 1, 'the last step of the last fit is there'
    assert df.groupby('fit').step.min().iloc[0] == 0 and not learn.metrics
    assert [o.name for o in learn.cbs if o.name == 'act_columns'] == [] and 'step' not in vars(learn.opt)


# operations

class Operations(TorchDispatchMode):
    def __init__(self): super().__init__(); self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(layers, cbs, record=False):
    "The operations of our callbacks in one late step of a model with so many curves: those of their events alone"
    model = nn.Sequential(nn.Linear(1, 4), *(LearnedRelu(4) for _ in range(layers)), nn.Linear(4, 1))
    learn = synth_learner(n_trn=8, n_val=1, model=model, cbs=cbs)
    counts = []
    for cb in cbs:
        def watched(event, call=cb.__call__, cb=cb):
            if not (learn.training and learn.train_iter == (0 if record else 6)): return type(cb).__call__(cb, event)
            with Operations() as seen: type(cb).__call__(cb, event)
            counts.extend(seen.names)
        learn.cbs.items[learn.cbs.index(cb)] = Watched(cb, watched)
    with quiet(learn): learn.fit(1)
    return counts


class Watched:
    "A callback of which every event goes through a function"
    def __init__(self, cb, call): self.cb, self.call = cb, call
    def __getattr__(self, k): return getattr(self.__dict__['cb'], k)
    def __call__(self, event): return self.call(event)


@pytest.mark.parametrize('frozen', [False, True])
def test_a_step_takes_twenty_operations_for_any_number_of_layers(frozen):
    def cbs(): return [NoDecayActParams(), ClampActParams(), EMAActParams(), *([FreezeActParams(.1)] if frozen else []), ActTelemetry(every=7)]
    few, many = operations(1, cbs()), operations(51, cbs())
    assert few == many and 10 <= len(many) <= 20, many
    assert not [o for o in many if 'local_scalar' in o or 'item' in o], 'nobody waits for a device'


# averages

@pytest.mark.parametrize('n', [1, 2, 5, 50])
def test_the_warm_up_is_that_of_torch_ema(n):
    "As torch_ema 0.3 computes it: decay = min(decay, (1 + n)/(10 + n)), shadow -= (1 - decay)*(shadow - parameter)"
    m, shadow = LearnedRelu(3), None
    rng = torch.Generator().manual_seed(0)
    for i in range(n):
        with torch.no_grad(): m.leak.copy_(torch.rand(3, generator=rng))
        update_averages([m], .99, warm_up=True)
        if shadow is None: shadow = m.leak.detach().clone()  # torch_ema begins with a copy
        else:
            decay = min(.99, (1 + i)/(10 + i))
            shadow.sub_((1 - decay)*(shadow - m.leak.detach()))
    assert_close(m.leak_avg, shadow)


@pytest.mark.parametrize('start', [1, 2])
def test_a_late_start_is_that_of_timm(start):
    "As timm's ModelEmaV2 and V3 with update_after_step: a copy of the model until then, ema.lerp_(parameter, 1 - decay) from there"
    seen, avg = [], []
    class Look(Callback):
        order, run_valid = 100, False
        def after_step(self):
            p = self.learn.model[1].leak.detach().clone()
            if self.epoch >= start: avg.append(p if not avg else torch.lerp(avg[-1], p, .1))
            seen.append((self.epoch, p))
        def after_train(self): self.learn.model.eval(); self.now = self.learn.model[1].current('leak').clone(); assert torch.equal(
            self.now, self.learn.model[1].leak if self.epoch < start else self.learn.model[1].leak_avg)
    learn = learner('adam', [EMAActParams(.9, start_epoch=start), Look()], None)
    with quiet(learn): learn.fit(3, 1e-2)
    assert_close(learn.model[1].leak_avg, avg[-1])
    assert learn.model[1].num_averaged == 4*(3 - start) == len(avg)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_layers_at_once_have_the_bits_of_one_by_one(dtype):
    one, other = (nn.ModuleList(LearnedRelu(n) for n in (1, 3, 8, 17)).to(dtype) for _ in range(2))
    rng = torch.Generator().manual_seed(0)
    for step in range(6):
        for a, b in zip(act_params(one), act_params(other), strict=True):
            v = torch.rand(a.param.shape, generator=rng).to(dtype)
            with torch.no_grad(): a.param.copy_(v); b.param.copy_(v)
        update_averages(list(act_layers(one).values()), .9)
        for m in act_layers(other).values(): m.update_averages(.9)
        if step == 3: one[2].reset_averages(); other[2].reset_averages()  # somebody else changes a count
    for a, b in zip(one.buffers(), other.buffers(), strict=True): assert torch.equal(a, b)


def test_fractions_of_epochs_over_fits_freeze_once_and_for_good():
    seen = []
    class Look(Callback):
        order, run_valid = 100, False
        def after_step(self): seen.append((self.learn.freeze_act_params.frozen, self.learn.model[1].leak.detach().clone()))
    learn = learner('adam', [FreezeActParams(.5, epochs=4), Look()], None)
    with quiet(learn): learn.fine_tune(2, 1e-2, freeze_epochs=2); learn.fit(1)
    assert [o for o, _ in seen] == [False]*8 + [True]*12
    assert all(torch.equal(p, seen[8][1]) for _, p in seen[8:])
    stopped = learner('adam', [FreezeActParams(0., epochs=1)], None)
    before = stopped.model[1].leak.detach().clone()
    with quiet(stopped): stopped.fit(2, 1e-2)
    assert torch.equal(before, stopped.model[1].leak), 'from now on'


