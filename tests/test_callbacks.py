"Callbacks alone, together, with helpers of fastai around them, and against sabotage."
import io
import math
import warnings

import pytest
import torch
from common import OPTS, Follow, make, quiet
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelStepException
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import Datasets
from fastai.learner import load_learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.testing import assert_close

from learned_relu.all import (
    ActTelemetry,
    ClampActParams,
    EMAActParams,
    FreezeActParams,
    LearnedClip,
    LearnedRelu,
    LearnedThreshold,
    NoDecayActParams,
    SymmetricClip,
    act_params,
    patch_relus,
)
from learned_relu.guard import Guard

wrapped_opts = pytest.mark.parametrize('opt', OPTS)


def values(model): return {f'{o.name}.{o.kind}': o.param.detach().clone() for o in act_params(model)}


def test_fifty_steps_move_every_parameter():
    learn = make(maxv=1.5)
    seen = {}
    class Grads(Callback):
        def after_step(self):
            for o in act_params(self.learn.model): seen[o.name, o.kind] = max(seen.get((o.name, o.kind), 0), o.param.grad.abs().max().item())
    start = values(learn.model)
    with quiet(learn): learn.fit_one_cycle(5, 5e-2, wd=.01, cbs=Grads())
    assert len(start) == 6 and all((start[k] != v).any() for k, v in values(learn.model).items())
    assert all(v > 0 for v in seen.values()) and len(seen) == 6


def test_learn_nothing_moves_nothing():
    learn = make(learn=())
    before = {k: v.clone() for k, v in learn.model.named_buffers()}
    with quiet(learn): learn.fit(2, wd=.1)
    assert before and all(torch.equal(before[k], v) for k, v in learn.model.named_buffers())


@wrapped_opts
def test_a_cap_that_never_binds_keeps_every_bit(opt):
    kept, pulled = make(NoDecayActParams(), opt=opt), make(opt=opt)
    for learn in kept, pulled:
        with quiet(learn): learn.fit(3, wd=.1)
    assert all((m.maxv == 10).all() for m in (kept.model[1], kept.model[3]))
    assert (pulled.model[1].maxv < 10).all()


class Skip(Callback):
    "As mixed precision does after an overflow, every other step"
    order, run_valid = 100, False
    def __init__(self, what=CancelStepException): self.what = what
    def before_step(self):
        if self.train_iter % 2: raise self.what('skip')


@pytest.mark.parametrize('skip', [None, CancelStepException, CancelBatchException])
def test_groups_of_a_wrapped_optimizer_are_the_same_outside_the_step(skip):
    learn = make(NoDecayActParams(lr_mult=.5), *([Skip(skip)] if skip else []), opt='wrapped')
    counts = []
    class Look(Callback):
        def after_batch(self): counts.append([len(o) for o in self.opt.param_lists])
    with quiet(learn): learn.fit_one_cycle(2, wd=.1, cbs=Look())
    assert len({tuple(o) for o in counts}) == 1 and len(counts[0]) == 1
    assert {id(p) for p in learn.opt.param_lists[0]} == {id(p) for p in learn.model.parameters()}


@wrapped_opts
def test_a_multiplier_scales_the_step(opt):
    moved = []
    for mult in 1., .25:
        learn = make(NoDecayActParams(lr_mult=mult), opt=opt)
        class One(Callback):
            order = 60
            def after_step(self): moved.append(self.learn.model[3].sub.detach() - .25)
        with quiet(learn): learn.fit(1, cbs=One())
    assert_close(moved[0]*.25, moved[10], rtol=1e-3, atol=1e-6)


@wrapped_opts
def test_frozen_is_bitwise_frozen(opt):
    get = lambda m: torch.cat([o.param.flatten() for o in act_params(m)])
    follow, weight, grads = Follow(get), Follow(lambda m: m[0].weight), []
    class Grads(Callback):
        order = 60
        def after_step(self): grads.append([o.param.grad is None for o in act_params(self.learn.model)])
    learn = make(FreezeActParams(.5), follow, Grads(), opt=opt)
    learn.opt_func = OPTS[opt]
    with quiet(learn): learn.fit(4, wd=.1)
    seen = torch.stack(follow.seen)
    assert (seen[:20].diff(dim=0) != 0).any(1).all()
    assert torch.equal(seen[19:], seen[19].expand(len(seen) - 19, -1))
    assert not any(map(any, grads[:20])) and all(map(all, grads[20:])), 'what is frozen is no part of any norm of gradients'
    learn.remove_cb(follow); learn.add_cb(weight)
    frozen = get(learn.model).clone()
    with quiet(learn): learn.fit(1, wd=.1)
    assert not torch.equal(frozen, get(learn.model)), 'the next fit starts unfrozen'
    assert (torch.stack(weight.seen).diff(dim=0) != 0).any()


def test_validating_inside_a_fit_does_not_unfreeze():
    follow = Follow(lambda m: m[1].sub)
    class ValidateInside(Callback):
        def after_batch(self):
            if self.training and self.iter == 7:
                self.learn.validate(); self.learn.training = True; self.learn.model.train(); self.learn.dl = self.learn.dls.train
    learn = make(FreezeActParams(.25), ActTelemetry(1), follow)
    with quiet(learn): learn.fit(2, wd=.1, cbs=ValidateInside())
    seen = torch.stack(follow.seen)
    assert len(seen) == 20 and torch.equal(seen[5:], seen[5].expand(len(seen) - 5, -1))
    assert set(learn.act_telemetry.frame().fit) == {0} and len(learn.metrics) == 0, 'one fit, whatever is validated within it'


def test_freezing_at_averages():
    learn = make(EMAActParams(.9), FreezeActParams(.5, at='average'))
    with quiet(learn): learn.fit(2)
    m = learn.model[1]
    assert_close(m.sub.detach(), m.sub_avg)
    lone = make(FreezeActParams(.5, at='average'))
    with quiet(lone), pytest.raises(ValueError, match='add EMAActParams'): lone.fit(1)


def test_bounds_hold_after_every_step():
    outside = []
    class Check(Callback):
        order = 60
        def after_step(self):
            for o in act_params(self.learn.model):
                low, high = self.learn.clamp_act_params.bounds_of(o.layer, o.kind)
                outside.append(((o.param < low) | (o.param > high)).any().item())
    learn = make(ClampActParams(leak=(.04, .06), sub=(.2, .3)), Check(), lr=.1)
    with quiet(learn): learn.fit(3)
    assert len(outside) == 180 and not any(outside)
    assert (learn.model[1].leak == .04).any() or (learn.model[1].leak == .06).any()


class NaN(Callback):
    "NaN once, in a parameter or a gradient, at one step of a fit"
    order, run_valid = 0, False
    def __init__(self, where): self.where = where
    def before_batch(self):
        if self.where == 'value' and self.train_iter == 4: self.model[1].leak.data[2] = math.nan
    def after_backward(self):
        if self.where == 'gradient' and self.train_iter == 4: self.model[1].leak.grad[2] = math.nan


@pytest.mark.tried('a number that is not finite in a fit')
@pytest.mark.parametrize('where', ['value', 'gradient'])
@pytest.mark.parametrize('averages', [True, False])
@wrapped_opts
def test_one_nan_is_survived_counted_and_said_once(where, averages, opt):
    learn = make(NaN(where), ClampActParams(), GradientClip(1.), *([EMAActParams()] if averages else []), opt=opt)
    follow = Follow(lambda m: m[1].leak[2])
    with quiet(learn), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(3, cbs=follow)
    assert len([o for o in said if 'not finite' in str(o.message)]) == 1
    assert (learn.clamp_act_params.restored, learn.clamp_act_params.zeroed) == ((1, 0) if where == 'value' else (0, 1))
    assert math.isfinite(learn.recorder.losses[-1]) and all(p.isfinite().all() for p in learn.model.parameters())
    later = torch.stack(follow.seen[6:])
    assert later.isfinite().all() and len(later.unique()) > 3, 'it goes on learning'


OTHERS = [dict(layer=LearnedClip, cutoff=.5), dict(layer=LearnedClip, cutoff=.5, value=.25, low=-.2, width=.5, learn=('cutoff', 'value', 'low')),
          dict(layer=SymmetricClip, cutoff=.5), dict(layer=LearnedThreshold, learn=('threshold', 'value'))]


@pytest.mark.parametrize('other', OTHERS, ids=lambda o: '-'.join([o['layer'].__name__, *o.get('learn', ())]))
@wrapped_opts
def test_all_callbacks_on_the_other_layers(other, opt):
    kinds = other.get('learn', ('cutoff',))
    get = lambda m: torch.cat([o.param.flatten() for o in act_params(m)])
    follow = Follow(get)
    class Damage(Callback):
        order, run_valid = 0, False
        def before_batch(self):
            if self.train_iter == 4: getattr(self.model[1], kinds[0]).data[2] = math.nan
    learn = make(NoDecayActParams(), ClampActParams(), EMAActParams(.9), FreezeActParams(.5), ActTelemetry(2, activations=True), Damage(), follow,
                 opt=opt, **other)
    with quiet(learn), pytest.warns(UserWarning, match='1 values and 0 gradients'): learn.fit(4, wd=.1)
    seen = torch.stack(follow.seen)
    assert seen.isfinite().all() and (seen[:20].diff(dim=0) != 0).any(1).all() and torch.equal(seen[19:], seen[19].expand(len(seen) - 19, -1))
    assert all(((o.param >= low) & (o.param <= high)).all() for o in act_params(learn.model) for low, high in [o.layer.bounds_of(o.kind)])
    assert math.isfinite(learn.recorder.losses[-1]) and learn.model[1].num_averaged == 40 and learn.recorder.metric_names[3:-1] == list(kinds)
    df = learn.act_telemetry.frame()
    assert set(df.kind) == set(kinds) and df[['mean', 'clipped', 'negative']].notna().all(axis=None) and 0 < df.clipped.max() <= 1
    assert len(learn.act_telemetry.plot_curves()) == 2


def test_nothing_is_claimed_when_the_loss_is_nan():
    class Lost(Callback):
        def after_loss(self):
            if self.training: self.learn.loss_grad = self.learn.loss_grad*math.nan; self.learn.loss = self.learn.loss_grad.clone()
    learn = make(ClampActParams(), Lost())
    with quiet(learn): learn.fit(1)
    assert (learn.clamp_act_params.restored, learn.clamp_act_params.zeroed) == (0, 0)


@pytest.mark.parametrize('n_acc', [1, 32])
def test_averages_equal_those_by_hand(n_acc):
    steps = []
    class Steps(Callback):
        order = 60
        def after_step(self): steps.append(self.learn.model[1].sub.detach().clone())
    learn = make(EMAActParams(.9), Steps(), *([GradientAccumulation(n_acc)] if n_acc > 1 else []))
    with quiet(learn): learn.fit(2)
    want = steps[0]
    for p in steps[1:]: want = .9*want + .1*p
    m = learn.model[1]
    assert m.num_averaged == len(steps) == (20 if n_acc == 1 else 10)
    assert_close(m.sub_avg, want)


def test_a_skipped_step_is_no_step():
    learn = make(EMAActParams(.9), ActTelemetry(1), Skip())
    with quiet(learn): learn.fit(1)
    assert learn.model[1].num_averaged == 5 and len(learn.act_telemetry.frame()) == 5*6


def test_helpers_leave_everything_as_it_was(tmp_path):
    learn = make(NoDecayActParams(), ClampActParams(), EMAActParams(), ActTelemetry(2), path=tmp_path)
    with quiet(learn): learn.fit(2)
    state, rows = {k: v.clone() for k, v in learn.model.state_dict().items()}, len(learn.act_telemetry.frame())
    with quiet(learn):
        learn.validate(); learn.get_preds()
        learn.lr_find(num_it=12, show_plot=False)
        learn.model.train(); learn.summary()
    assert all(torch.equal(state[k], v) for k, v in learn.model.state_dict().items())
    assert len(learn.act_telemetry.frame()) == rows == 11*6 and len(learn.metrics) == 0
    with quiet(learn): learn.fit(1)
    assert learn.model[1].num_averaged == 30 and set(learn.act_telemetry.frame().fit) == {0, 1}


def test_what_is_loaded_at_the_end_of_a_fit_stays_and_the_last_step_is_told(tmp_path):
    class Stops(Callback):
        order = 101
        def after_batch(self):
            if self.training and (self.epoch, self.iter) == (2, 3): raise CancelFitException
    follow = Follow(lambda m: m[1].sub)
    learn = make(NoDecayActParams(), ClampActParams(), FreezeActParams(.5), ActTelemetry(7), follow, path=tmp_path)
    best = SaveModelCallback(monitor='valid_loss', comp=lambda a, b: a > b, fname='first')  # that of the first epoch
    with quiet(learn): learn.fit(3, .05, cbs=[best, Stops()])
    saved = torch.load(tmp_path/'models'/'first.pth')
    assert not torch.equal(saved['1.sub'], follow.seen[-1]) and len(follow.seen) == 24
    assert all(torch.equal(saved[k], v) for k, v in learn.model.state_dict().items())
    rows = learn.act_telemetry.frame().query("layer == '1' and kind == 'sub'")
    assert rows.step.tolist() == [0, 7, 14, 21, 23] and math.isclose(rows['mean'].iloc[-1], follow.seen[-1].mean(), abs_tol=1e-6)


def test_lr_find_is_no_training_to_freeze_in(tmp_path):
    firsts = []
    for looks in False, True:
        learn = make(FreezeActParams(.5, epochs=4), ActTelemetry(1), path=tmp_path)
        with quiet(learn):
            learn.fit(1)
            before = {k: v.clone() for k, v in learn.model.state_dict().items()}
            if looks: learn.lr_find(num_it=12, show_plot=False)
            assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
            learn.fit(3)
        df = learn.act_telemetry.frame()
        firsts.append(df[df.frozen].step.min())
    assert firsts == [20, 20]


def x_of(i): return torch.tensor([i/80 - 1.])
def y_of(i): return torch.tensor([i/40 + 1.])


def test_saving_and_exporting_carry_everything(tmp_path):
    learn = make(EMAActParams(.9), ActTelemetry(2), ClampActParams(), NoDecayActParams(), path=tmp_path)
    dsets = Datasets(list(range(160)), [[x_of], [y_of]], splits=[list(range(128)), list(range(128, 160))])
    learn.dls = dsets.dataloaders(bs=16, num_workers=0)  # data that can be exported
    with quiet(learn): learn.fit(2)
    want = learn.get_preds()[0]
    file = learn.save('x')
    fresh = make(path=tmp_path)
    fresh.load(file.stem)
    learn.export('x.pkl')
    loaded = load_learner(tmp_path/'x.pkl')
    for o in fresh, loaded:
        assert all(torch.equal(v, o.model.state_dict()[k]) for k, v in learn.model.state_dict().items())
        o.model.eval()
    x = torch.linspace(-2, 2, 9)[:, None]
    assert torch.equal(fresh.model(x), loaded.model(x)) and torch.equal(fresh.model(x), learn.model.eval()(x))
    assert len(want) == 32 and len(loaded.act_telemetry.frame()) == len(learn.act_telemetry.frame())
    watched = make(ActTelemetry(2), path=tmp_path)
    watched.load(file.stem)
    assert len(watched.act_telemetry.plot_curves()) == 2 and len(watched.act_telemetry.frame()) == len(learn.act_telemetry.frame())
    make(path=tmp_path).save(file.stem)
    watched = make(ActTelemetry(2), path=tmp_path).load(file.stem, with_opt=False)
    assert watched.act_telemetry.frame().empty, 'a history goes with the file that it stood beside'


def test_a_learner_is_saved_to_a_buffer(tmp_path):
    for cbs in [], [ActTelemetry(2)]:
        learn, buffer = make(*cbs, path=tmp_path), io.BytesIO()
        with quiet(learn): learn.fit(1)
        learn.save(buffer)
        buffer.seek(0)
        fresh = make(*cbs, path=tmp_path)
        fresh.load(buffer)
        assert all(torch.equal(v, fresh.model.state_dict()[k]) for k, v in learn.model.state_dict().items())


def test_training_on_without_averaging_drops_the_averages_and_says_so():
    learn = make(EMAActParams(.9))
    with quiet(learn): learn.fit(1)
    learn.remove_cb(EMAActParams)
    with quiet(learn), pytest.warns(UserWarning, match='without updating their averages'): learn.fit(1)
    assert learn.model[1].num_averaged == 0


@pytest.mark.parametrize('opt', ['adam', 'wrapped'])
def test_patching_after_the_optimizer_was_made_is_handled(opt):
    learn = make(opt=opt)
    learn.model[1] = nn.ReLU(); learn.model[3] = nn.ReLU()
    with quiet(learn): learn.fit(1)
    patch_relus(learn.model)
    learn.add_cb(NoDecayActParams())
    with quiet(learn), pytest.warns(UserWarning, match='after the optimizer was made'): learn.fit(1, wd=.1)
    assert (learn.model[1].sub != .25).any() and (learn.model[1].maxv == 10).all()


def test_an_optimizer_built_by_hand_cannot_be_made_again():
    learn = make()
    learn.model[1] = nn.ReLU()
    learn.opt_func = OptimWrapper(opt=torch.optim.AdamW(learn.model.parameters()))
    learn.create_opt()
    learn.model[1] = LearnedRelu(8)
    learn.add_cb(NoDecayActParams())
    with quiet(learn), pytest.raises(ValueError, match='built before the model was patched'): learn.fit(1)


@pytest.mark.parametrize('bad,error,words', [
    (lambda: ClampActParams(leak=(1, 0)), ValueError, 'lower one first'), (lambda: ClampActParams(leak=.5), TypeError, 'pass a pair'),
    (lambda: ClampActParams(leak=(math.nan, 1)), ValueError, 'lower one first'),
    (lambda: EMAActParams(1.), ValueError, r'\[0, 1\)'), (lambda: EMAActParams(-.1), ValueError, 'decay is -0.1'),
    (lambda: EMAActParams(math.nan), ValueError, 'decay is nan'), (lambda: FreezeActParams(1.1), ValueError, 'after is 1.1'),
    (lambda: FreezeActParams(.5, 'mean'), ValueError, "at is 'mean'"), (lambda: ActTelemetry(0), ValueError, 'every is 0'),
    (lambda: ActTelemetry(.5), TypeError, 'every is 0.5'), (lambda: NoDecayActParams(math.inf), ValueError, 'lr_mult is inf')])
def test_bad_input_is_named(bad, error, words):
    with pytest.raises(error, match=words): bad()


def test_a_step_in_which_all_is_well_writes_nothing():
    layer = LearnedRelu(8)
    acts = act_params(layer)
    guard = Guard(acts, [o.layer.bounds_of(o.kind) for o in acts])
    def written():
        loss = layer(torch.linspace(-2, 12, 80).view(10, 8)).sum()
        loss.backward()
        before = [t._version for o in acts for t in (o.param, o.param.grad)]
        guard.before_batch(); guard.before_step(loss); guard.after_step()
        return sum(a != t._version for a, t in zip(before, (t for o in acts for t in (o.param, o.param.grad)), strict=True))
    assert written() == 0
    layer.leak.data[3] = -1.
    assert written() > 0 and layer.leak[3] == 0
    assert written() == 0
    layer.sub.grad[2] = float('nan')
    assert written() > 0 and layer.sub.grad[2] == 0 and guard.counts() == (0, 1)
