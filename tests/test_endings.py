"A fit may end in any event and in any way: nothing of ours outlives it, and the next one trains as the first would have."
import io
import itertools
import random
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import OPTS, quiet
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import Datasets
from fastai.learner import Recorder, load_learner
from fastai.test_utils import synth_learner
from torch import nn

from learned_relu.all import (
    ActGradPenalty,
    ActTelemetry,
    ClampActParams,
    EMAActParams,
    FreezeActParams,
    LearnedRelu,
    LogActParams,
    NoDecayActParams,
    act_params,
)
from learned_relu.callback.core import ActCallback

EVENTS = ('before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step '
          'after_batch after_train before_validate after_validate after_epoch after_fit').split()
ENDS = (KeyboardInterrupt, ValueError, CancelBackwardException, CancelBatchException, CancelStepException, CancelTrainException, CancelValidException,
        CancelEpochException, CancelFitException)
CALLBACKS = dict(decay=lambda: [NoDecayActParams(lr_mult=.5)], clamp=lambda: [ClampActParams()], ema=lambda: [EMAActParams(.9)],
                 freeze=lambda: [FreezeActParams(.3)], telemetry=lambda: [ActTelemetry(1, activations=True)], penalty=lambda: [ActGradPenalty(.1)])
CALLBACKS['all'] = lambda: [o for k, f in CALLBACKS.items() if k != 'all' for o in f()]
SETS = [(k, 'adam', 100) for k in CALLBACKS] + [('all', 'adam', -100), ('all', 'wrapped', -100), ('all', 'wrapped', 100)]


class End(Callback):
    "Ends a fit in one event: before those of ours (order -100) or after them (100)"
    def __init__(self, event, end, order):
        self.order = order
        def raise_it():
            if event in EVENTS[3:11] and not (self.learn.training and self.learn.iter == 1): return
            raise end('as it may happen')
        setattr(self, event, raise_it)


def make(cbs=(), opt='adam'):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), LearnedRelu(4), nn.Linear(4, 4), LearnedRelu(4), nn.Linear(4, 1))
    learn = synth_learner(n_trn=2, n_val=1, model=model, cbs=cbs)
    learn.opt_func, learn.lr = OPTS[opt], .01
    return learn


def fit(learn, n=1, cbs=()):
    torch.manual_seed(1); random.seed(1); np.random.seed(1)
    for dl in learn.dls.loaders: dl.rng = random.Random(1)  # which decides the order of the batches
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of averages that nobody updates
        learn.fit(n, wd=.1, cbs=list(cbs))


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def again(learn, start):
    learn.model.load_state_dict(start); learn.opt = None
    learn.model.zero_grad()  # fastai leaves the gradients of a batch that was broken off


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def left(learn, cbs):
    "What there is of a fit in a learner, in words"
    ours = [o for o in learn.cbs if isinstance(o, ActCallback)]
    groups = [[id(p) for p in o] for o in learn.opt.param_lists] if learn.opt else [[id(p) for p in learn.model.parameters()]]
    return [what for what, is_left in dict(
        hooks=any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in learn.model.modules()),
        metrics=len(learn.metrics) > 0, callbacks=[type(o) for o in ours] != [type(o) for o in cbs],
        others=any(type(o).__name__ in ('End', 'ActColumns') for o in learn.cbs), step=learn.opt is not None and 'step' in vars(learn.opt),
        groups=sorted(sum(groups, [])) != sorted(id(p) for p in learn.model.parameters()) or len(groups) > 1,
        attributes=any(k in vars(o) for o in ours for k in o.fleeting)).items() if is_left]


@pytest.mark.tried('an exception or a cancellation in an event of a fit', 'n')
@pytest.mark.parametrize('n', [27, pytest.param(144, marks=pytest.mark.slow)])
@pytest.mark.parametrize('which,opt,order', SETS)
def test_nothing_outlives_a_fit(which, opt, order, n):
    cbs = CALLBACKS[which]()
    learn, fresh = make(cbs, opt), make(CALLBACKS[which](), opt)
    start = state(learn)
    fit(fresh)
    wrong = []
    first = SETS.index((which, opt, order))  # each set meets each end in three events, and all sets together in all of them
    some = [(EVENTS[(first + i + k) % len(EVENTS)], end) for i, end in enumerate(ENDS) for k in (0, 5, 10)]
    tried = some if n == 27 else [*itertools.product(EVENTS, ENDS)]
    assert len({*tried}) == n
    for event, end in tried:
        again(learn, start)
        try: fit(learn, 2, [End(event, end, order)])
        except (KeyboardInterrupt, ValueError) as e: assert 'as it may happen' in str(e), e
        except Exception as e:  # fastai itself catches no CancelBatchException outside a batch, and so on
            assert isinstance(e, ENDS), (event, end, e)
        if found := left(learn, cbs): wrong.append((event, end.__name__, found))
        torch.save(learn.model, io.BytesIO())
        again(learn, start)
        fit(learn)
        if not same(state(fresh), state(learn)): wrong.append((event, end.__name__, 'the next fit trains otherwise'))
        with quiet(learn): assert len(learn.validate()) == 1
    assert not wrong, wrong


@pytest.mark.tried('an exception or a cancellation in an event of a fit', 16)
@pytest.mark.parametrize('end', [KeyboardInterrupt, ValueError])
def test_callbacks_of_one_fit_leave_with_it(end):
    learn = make()
    for event in EVENTS:
        given = CALLBACKS['all']()
        with quiet(learn):
            try: learn.fit(1, cbs=[*given, End(event, end, 100)])
            except end: pass
            for o in act_params(learn.model): low, high = o.layer.bounds_of(o.kind); assert ((o.param >= low) & (o.param <= high)).all(), event
            learn.validate()
        assert not left(learn, []), event
        assert all(o.learn is None for o in given)
        rows = next(o for o in given if isinstance(o, ActTelemetry)).frame()
        assert rows.empty == (event in EVENTS[:3])
        assert rows.empty or rows.step.max() == rows.step.nunique() - 1, 'every step that was made is recorded, the last one too'


class Exporting(Callback):
    order = 100
    def __init__(self, event): setattr(self, event, self.export_it)
    def export_it(self):
        self.learn.export('within.pkl')


def x_of(i): return torch.tensor([i/80 - 1.])
def y_of(i): return torch.tensor([i/40 + 1.])


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_train', 'after_validate', 'after_epoch', 'after_fit'])
def test_exporting_works_within_a_fit_and_after_an_interrupt(event, tmp_path):
    learn = make(CALLBACKS['all']())
    learn.dls = Datasets(list(range(60)), [[x_of], [y_of]], splits=[list(range(48)), list(range(48, 60))]).dataloaders(bs=16, num_workers=0)
    learn.path = tmp_path
    with quiet(learn):
        with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[Exporting(event), End('after_fit', KeyboardInterrupt, 200)])
        learn.export('after.pkl')
    for name in 'within.pkl', 'after.pkl':
        loaded = load_learner(tmp_path/name)
        assert not any(k in vars(o) for o in loaded.cbs if isinstance(o, ActCallback) for k in o.fleeting)
        loaded.remove_cbs([o for o in loaded.cbs if type(o).__name__ in ('End', 'Exporting')])
        hooked = [m for m in loaded.model.modules() if m._forward_hooks]
        assert not hooked
        assert loaded.get_preds(dl=learn.dls.valid)[0].isfinite().all()
        loaded.dls = learn.dls
        fit(loaded)


def test_a_row_has_its_columns_where_somebody_validates_within_the_fit():
    class Nested(Callback):
        order = 70
        def __init__(self): self.seen = []
        def after_epoch(self):
            if self.learn.lock.locked(): return
            names, row = list(self.recorder.metric_names), list(self.recorder.values[-1])
            self.seen.append((names, len(row), len(self.learn.validate())))
    learn = make([ActTelemetry(), ActGradPenalty(.1)])
    learn.metrics = [nn.functional.mse_loss]
    nested = Nested()
    with quiet(learn): learn.fit(3, cbs=nested)
    names = ['epoch', 'train_loss', 'valid_loss', 'mse_loss', 'leak', 'sub', 'maxv', 'grad_penalty', 'time']
    assert nested.seen == [(names, 7, 2)]*3, 'validate tells what the user asked for, also within a fit'
    assert len(learn.validate()) == 2


def test_columns_can_be_switched_off_and_stand_once_with_train_metrics():
    learn = make([ActTelemetry()])
    learn.recorder.train_metrics = True
    learn.metrics = [nn.functional.mse_loss]
    with quiet(learn): learn.fit(1)
    assert [o for o in learn.recorder.metric_names if 'leak' in o] == ['leak'] and len(learn.recorder.values[0]) == 7
    bare = make([ActTelemetry(columns=False), ActGradPenalty(.1, columns=False)])
    with quiet(bare): bare.fit(1)
    assert bare.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'time'] and not bare.act_telemetry.frame().empty


def test_one_batch_by_hand_before_the_first_fit():
    learn = make([NoDecayActParams(), ClampActParams(), EMAActParams(), FreezeActParams(), ActTelemetry(1)])
    learn.create_opt()
    b = learn.dls.one_batch()
    learn.remove_cbs([Recorder, ProgressCallback])  # which need a fit
    learn.one_batch(0, b)  # not training yet: as a validation
    learn.epoch, learn.train_iter, learn.training, learn.n_iter, learn.pct_train, learn.dl = 0, 0, True, 1, 0., learn.dls.train
    before = [o.param.detach().clone() for o in act_params(learn.model)]
    learn.one_batch(0, b)
    assert any((o.param != v).any() for o, v in zip(act_params(learn.model), before, strict=True)) and learn.model[1].num_averaged == 1
    learn.add_cbs([Recorder(), ProgressCallback()])
    fit(learn)
    assert learn.act_telemetry.frame().fit.tolist() == [0]*6 + [1]*12, 'what was done by hand is over where a fit begins'
    assert not left(learn, learn.cbs.filter(lambda o: isinstance(o, ActCallback)))


def twice(learn): return [o.name for o in learn.cbs if isinstance(o, ActCallback)]


def test_a_callback_given_to_a_fit_takes_the_place_of_the_learners_own():
    learn = make([EMAActParams(.9), ActTelemetry(1), NoDecayActParams()], opt='wrapped')
    own, given = learn.act_telemetry, ActTelemetry(1)
    with quiet(learn):
        learn.fit(1, cbs=[EMAActParams(.5), given, NoDecayActParams(lr_mult=.1)])
        assert learn.model[1].num_averaged == 2 and own.frame().empty and len(given.frame()) == 12
        assert [len(o) for o in learn.opt.param_lists] == [12] and learn.act_telemetry is own
        learn.fit(1)
    assert learn.model[1].num_averaged == 4 and len(own.frame()) == 12 and learn.ema_act_params.decay == .9
    with quiet(learn), pytest.raises(ValueError, match='EMAActParams more than once'): learn.fit(1, cbs=[EMAActParams(), EMAActParams()])
    with quiet(learn): learn.fit(1, cbs=EMAActParams)  # a class is made a callback, as fastai does
    assert sorted(twice(learn)) == ['act_telemetry', 'ema_act_params', 'no_decay_act_params']


def test_of_two_in_a_learner_the_one_added_last_stays():
    learn = make([EMAActParams(.9)])
    learn.add_cb(EMAActParams(.5))
    with quiet(learn), pytest.warns(UserWarning, match='EMAActParams was added to the learner more than once'): learn.fit(1)
    assert twice(learn) == ['ema_act_params'] and learn.ema_act_params.decay == .5 and learn.model[1].num_averaged == 2


def test_to_learned_relu_twice_and_beside_own_callbacks():
    learn = synth_learner(n_trn=3, cbs=[EMAActParams(.9), ActTelemetry(1)], model=nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)))
    own = learn.ema_act_params
    learn.to_learned_relu()
    assert learn.ema_act_params is own and len(set(twice(learn))) == len(twice(learn)) == 4
    with quiet(learn): learn.fit(1)
    assert learn.model[1].num_averaged == 3
    leak = learn.model[1].leak.detach().clone()
    with pytest.warns(UserWarning, match='were there already'): learn.to_learned_relu(cbs=[EMAActParams(.5), ClampActParams])
    assert learn.ema_act_params.decay == .5 and len(set(twice(learn))) == len(twice(learn)) == 4 and torch.equal(leak, learn.model[1].leak)


@pytest.mark.parametrize('opt', ['adam', 'wrapped'])
def test_a_splitter_that_leaves_them_out_is_named_before_training(opt):
    learn = make([ClampActParams()], opt)
    learn.splitter = lambda m: [[*m[0].parameters(), *m[2].parameters()], list(m[4].parameters())]
    before = state(learn)
    with quiet(learn), pytest.raises(ValueError, match=r'splitter of the learner leaves out 6 activation parameters \(1.leak, 1.sub'): learn.fit(1)
    assert same(before, state(learn))
    for o in act_params(learn.model): o.param.requires_grad_(False)  # left out on purpose
    with quiet(learn): learn.fit(1)


@pytest.mark.parametrize('end', [None, KeyboardInterrupt])
def test_a_step_that_somebody_else_wrapped_goes_on_being_called_and_stays(end):
    learn, plain = make(CALLBACKS['all']()), make(CALLBACKS['all']())
    learn.create_opt(); plain.create_opt()
    step, made = learn.opt.step, []
    def counted(): made.append(1); step()
    learn.opt.step = counted
    try: fit(learn, 2, [End('after_batch', end, 100)] if end else [])
    except KeyboardInterrupt: pass
    assert learn.opt.step is counted and len(made) == (4 if end is None else 2)
    fit(plain, 2)
    if end is None: assert same(learn.model.state_dict(), plain.model.state_dict())


def test_to_relu_takes_every_callback_of_ours_away(tmp_path):
    learn = synth_learner(n_trn=2, model=nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)))
    learn.to_learned_relu().add_cb(LogActParams())
    learn.to_relu()
    assert not twice(learn)
    fit(learn)


def test_the_summary_counts_what_curves_learn():
    learn = make()
    with quiet(learn): said = str(learn.summary())
    assert f'Total params: {sum(p.numel() for p in learn.model.parameters())}' in said
    assert not hasattr(learn.model[1], 'weight'), 'which is there while fastai looks, and no longer: its init would fill it'


def test_a_frozen_parameter_shows_as_frozen_and_is_marked():
    learn = make([FreezeActParams(.5), ActTelemetry(1)])
    fit(learn, 4)
    df = learn.act_telemetry.frame()
    assert df.groupby('step').frozen.all().tolist() == [False]*4 + [True]*4 and df.grad.notna().all() and (df.grad[df.frozen] == 0).all()
    assert (df.grad[~df.frozen] > 0).any()
    ax = learn.act_telemetry.plot(['leak'])[0]
    assert 'frozen' in ax.get_legend_handles_labels()[1]
    learn.remove_cb(FreezeActParams)
    fit(learn, 1)
    ax, more = learn.act_telemetry.plot(['leak'])[0], ax
    assert len(more.lines) == 2 + 3 and len(ax.lines) == 2 + 4, 'two layers; a line where an epoch, or another fit, begins'
    plt.close('all')


def test_another_model_has_a_history_of_its_own():
    tele, learn, other = ActTelemetry(1), make(), make()
    other.model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4), LearnedRelu(4), nn.Linear(4, 1))
    for o in learn, other: fit(o, 1, [tele])
    with pytest.warns(UserWarning, match='The first 1 fits were of another model'): axs = tele.plot_curves()
    assert len(axs) == 1 and set(tele.frame().fit) == {0, 1}


def test_the_history_goes_on_where_a_saved_model_does(tmp_path):
    def learner():
        learn = make([ActTelemetry(1)])
        learn.path = tmp_path
        return learn
    whole = learner()
    fit(whole, 3, [SaveModelCallback(every_epoch=True, with_opt=True)])
    again = learner()
    again.load('model_1')
    with quiet(again): again.fit(3, wd=.1, start_epoch=2)
    df = again.act_telemetry.frame()
    assert df.step.drop_duplicates().tolist() == whole.act_telemetry.frame().step.drop_duplicates().tolist() == [*range(6)]
    assert df.epoch.drop_duplicates().tolist() == [0, 1, 2]
    before = df[df.epoch < 2].drop(columns='fit')
    assert before.equals(whole.act_telemetry.frame()[lambda o: o.epoch < 2].drop(columns='fit'))
