"What is not finite, put where it may turn up in a fit: the activation parameters stay, learn on, and it is said."
import itertools
import math
import warnings

import pytest
import torch
from common import OPTS, Follow, make, quiet
from fastai.callback.core import Callback
from torch import nn

from learned_relu.all import ActTelemetry, ClampActParams, EMAActParams, FreezeActParams, NoDecayActParams, act_params
from learned_relu.averages import mend_averages
from learned_relu.callback.clamp import forget_lost

inf, nan = math.inf, math.nan
SETS = dict(clamp=lambda: [ClampActParams()], averages=lambda: [ClampActParams(), EMAActParams(.9)],
            all=lambda: [NoDecayActParams(lr_mult=.5), ClampActParams(), EMAActParams(.9), FreezeActParams(1.), ActTelemetry(3, activations=True)])
AT, STEPS = 13, 10  # within the second epoch of ten steps
STATES = 'state', 'first state', 'last state', 'slow weights'


class Fault(Callback):
    "One value of one activation parameter, of what belongs to it, or a whole batch"
    order, run_valid = -100, False
    def __init__(self, place, value): self.place, self.value, self.hurt = place, value, []

    def before_batch(self):
        if self.train_iter != AT: return
        p = self.learn.model[1].leak
        if self.place == 'batch': self.learn.xb = tuple(o*self.value for o in self.xb)
        elif self.place == 'value': p.data[2] = self.value
        elif self.place == 'average': self.learn.model[1].leak_avg[2] = self.value
        elif self.place in STATES: self.hurt = self.states_of(p)
        for v in self.hurt: v[2] = self.value

    def states_of(self, p):
        if self.place == 'slow weights':
            return [slow for slow, fast in zip(self.opt.slow_weights[0], self.opt.param_lists[0], strict=True) if fast is p]
        found = [v for v in getattr(self.opt, 'opt', self.opt).state[p].values() if isinstance(v, torch.Tensor) and v.ndim]
        return {'state': found, 'first state': found[:1], 'last state': found[-1:]}[self.place]

    def after_backward(self):
        if self.train_iter == AT and self.place == 'gradient': self.learn.model[1].leak.grad[2] = self.value


def finite(ts): return all(t.isfinite().all() for t in ts)


def all_of(model): return torch.cat([o.param.flatten() for o in act_params(model)])


PLACES = 'value', 'gradient', 'average', 'state', 'first state', 'last state', 'slow weights'

def there(place, value, opt, which): return (place != 'average' or which != 'clamp') and (place != 'slow weights' or opt == 'ranger')


CASES = [pytest.param(*o, marks=() if math.isnan(o[1]) or o[1] > 0 and o[3] == 'all' else pytest.mark.slow)
         for o in itertools.product(PLACES, (nan, inf, -inf), OPTS, SETS) if there(*o)]


@pytest.mark.tried('a number that is not finite in a fit')
@pytest.mark.parametrize('place,value,opt,which', CASES)
def test_what_is_lost_comes_back_learns_on_and_is_said(place, value, opt, which):
    fault, follow = Fault(place, value), Follow(all_of)
    learn = make(*SETS[which](), opt=opt)
    with quiet(learn), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(4, wd=0., cbs=[fault, follow])  # so that nothing but learning moves
    acts, said = act_params(learn.model), [str(o.message) for o in said]
    assert finite(follow.seen[AT:]) and finite(b for k, b in learn.model.named_buffers() if k.endswith('_avg'))
    assert all(((o.param >= low) & (o.param <= high)).all() for o in acts for low, high in [o.layer.bounds_of(o.kind)])
    last = torch.stack(follow.seen[-STEPS:])[:, 2]
    assert last.diff().any() or last[-1] in (0., .5), 'the one that was lost learns on, or lies at a bound'
    assert math.isfinite(learn.recorder.losses[-1])
    hurt = place not in STATES or bool(fault.hurt)
    assert any('not finite' in o for o in said) == hurt, said
    if place in STATES and hurt: assert any('optimizer state of 1 activation parameters (1.leak)' in o for o in said), said


@pytest.mark.tried('a batch of NaN, of infinities, or a million times too large')
@pytest.mark.parametrize('value', [nan, inf, 1e6])
@pytest.mark.parametrize('which', SETS)
def test_a_bad_batch_leaves_activation_parameters_that_can_be_used(which, value):
    learn = make(*SETS[which]())
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(3, cbs=[Fault('batch', value)])
    assert finite(o.param for o in act_params(learn.model)) and finite(b for k, b in learn.model.named_buffers() if k.endswith('_avg'))
    for o in act_params(learn.model): low, high = o.layer.bounds_of(o.kind); assert ((o.param >= low) & (o.param <= high)).all()


def test_a_state_that_was_lost_before_a_fit_is_said_before_training():
    learn = make(ClampActParams())
    with quiet(learn):
        learn.fit(1)
        learn.opt.state[learn.model[3].sub]['sqr_avg'][:] = nan
        before = learn.model[3].sub.detach().clone()
        with pytest.warns(UserWarning, match=r'1 activation parameters \(3.sub\)'): learn.fit(1, reset_opt=False)
    assert learn.clamp_act_params.restored == 0 and (learn.model[3].sub != before).all()


@pytest.mark.parametrize('opt', OPTS)
def test_a_gradient_so_large_that_its_square_is_infinite_stops_nothing_for_good(opt):
    class Huge(Callback):
        order, run_valid = -100, False
        def after_backward(self):
            if self.train_iter == AT: self.learn.model[1].leak.grad[2] = 1e25
    follow = Follow(all_of)
    learn = make(ClampActParams(), Huge(), opt=opt)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(6, wd=0., cbs=[follow])
    last = torch.stack(follow.seen[-STEPS:])[:, 2]
    assert finite(follow.seen) and (last.diff().any() or last[-1] in (0., .5))


def test_averages_that_are_lost_with_their_parameter_are_not_hidden():
    m = make().model[1]
    m.update_averages(.9)
    with torch.no_grad(): m.leak[0] = m.leak_avg[0] = m.sub_avg[1] = nan
    assert mend_averages([m]) == 1 and m.leak_avg[0].isnan() and m.sub_avg[1] == m.sub[1]


def test_a_value_lost_together_with_its_average_comes_back():
    class Both(Callback):
        order, run_valid = -100, False
        def before_batch(self):
            if self.train_iter == AT: self.learn.model[1].leak.data[2] = self.learn.model[1].leak_avg[2] = nan
    follow = Follow(all_of)
    learn = make(ClampActParams(), EMAActParams(.9))
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(3, cbs=[Both(), follow])
    assert finite(follow.seen) and learn.model[1].leak_avg.isfinite().all()


def test_only_what_is_lost_begins_anew():
    learn = make(ClampActParams())
    with quiet(learn): learn.fit(1)
    acts = act_params(learn.model)
    learn.opt.state[acts[1].param]['grad_avg'][0] = inf
    kept = {o.name + o.kind: dict(learn.opt.state[o.param]) for o in acts}
    assert forget_lost(learn.opt, acts) == [f'{acts[1].name}.{acts[1].kind}'] and forget_lost(learn.opt, acts) == []
    assert set(learn.opt.state[acts[1].param]) <= {'do_wd', 'force_train'}
    assert all(learn.opt.state[o.param] == kept[o.name + o.kind] for o in acts if o is not acts[1])


def test_weights_that_are_lost_are_nobodys_secret():
    class Lost(Callback):
        order, run_valid = -100, False
        def before_batch(self):
            if self.train_iter == AT: nn.init.constant_(self.learn.model[0].weight, nan)
    learn = make(ClampActParams(), Lost())
    with quiet(learn): learn.fit(2)
    assert math.isnan(learn.recorder.losses[-1]) and (learn.clamp_act_params.restored, learn.clamp_act_params.zeroed) == (0, 0)
