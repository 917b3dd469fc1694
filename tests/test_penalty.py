"The penalty on activation gradients: what receives it, from which loss, for which layers, and what it leaves behind."
import math
import sys

import pytest
import torch
from common import make, quiet
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.test_utils import synth_dbunch
from torch import nn
from torch.testing import assert_close

from learned_relu.all import ActGradPenalty, LearnedRelu
from learned_relu.callback.penalty import act_grad_penalty


class Look(Callback):
    "Inputs, targets and gradients of every batch, before the optimizer steps"
    order, run_valid = 0, False  # before accumulation cancels the batch
    def __init__(self): self.seen, self.before = [], []
    def before_batch(self): self.before.append([p.detach().clone() for p in self.learn.model.parameters()])
    def before_step(self): self.seen.append((self.xb[0], self.yb[0], [p.grad.clone() for p in self.learn.model.parameters()]))


def by_hand(model, start, x, y, weight, watched):
    "Gradients of loss + weight * penalty in one plain graph, and the penalty"
    for p, v in zip(model.parameters(), start, strict=True): p.data.copy_(v)
    outs, h = [], x
    for m in model:
        h = m(h)
        if watched(m): outs.append(h)
    loss = nn.functional.mse_loss(h, y)
    penalty = sum(g.pow(2).sum() for g in torch.autograd.grad(loss, outs, create_graph=True))
    return torch.autograd.grad(loss + weight*penalty, list(model.parameters()), allow_unused=True), penalty.item()


def smooth(*cbs, **kwargs):
    learn = make(*cbs, **kwargs)
    learn.model[1], learn.model[3] = nn.Softplus(), nn.Tanh()
    return learn


@pytest.mark.parametrize('layers,watched', [((nn.Softplus, nn.Tanh), lambda m: isinstance(m, (nn.Softplus, nn.Tanh))),
                                            ('1', lambda m: isinstance(m, nn.Softplus)), ('[13]', lambda m: not isinstance(m, nn.Linear)),
                                            (nn.Linear, lambda m: isinstance(m, nn.Linear))])
def test_weights_receive_exactly_the_gradient_of_the_sum(layers, watched):
    look = Look()
    learn = smooth(ActGradPenalty(.5, layers), look)
    with quiet(learn): learn.fit(1)
    seen = []
    for (x, y, grads), start in zip(look.seen, look.before, strict=True):
        want, penalty = by_hand(learn.model, start, x, y, .5, watched)
        assert_close(grads, list(want)); seen.append(penalty)
    assert len(seen) == 10 and learn.recorder.values[0][2] == pytest.approx(sum(seen)/len(seen), rel=1e-5)
    assert learn.recorder.metric_names[3] == 'grad_penalty' and len(learn.metrics) == 0


def test_no_layers_named_means_every_curve():
    look, watched = Look(), lambda m: isinstance(m, LearnedRelu)
    learn = make(ActGradPenalty(.5), look)
    with quiet(learn): learn.fit(1)
    (x, y, grads), start = look.seen[0], look.before[0]
    want, _ = by_hand(learn.model, start, x, y, .5, watched)
    assert_close(grads, [torch.zeros_like(g) if w is None else w for g, w in zip(grads, want, strict=True)])


def test_the_loss_that_is_shown_is_the_plain_one():
    plain, held = smooth(lr=0.), smooth(ActGradPenalty(10., nn.Tanh), lr=0.)
    for o in plain, held:
        with quiet(o): o.fit(1)
    assert plain.recorder.values[0][:2] == held.recorder.values[0][:2]


def test_under_gradient_accumulation():
    look = Look()
    learn = smooth(ActGradPenalty(.5, nn.Softplus), GradientAccumulation(32), look)
    with quiet(learn): learn.fit(1)
    both = [by_hand(learn.model, look.before[i], *look.seen[i][:2], .5, lambda m: isinstance(m, nn.Softplus))[0] for i in range(2)]
    assert_close(look.seen[1][2], [(a + b)/2 for a, b in zip(*both, strict=True)])


class Scaled(MixedPrecision):
    "The scaler of mixed precision on the CPU, without the half precision"
    def before_fit(self): self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu', enabled=False), torch.amp.GradScaler('cpu', 1024.), []


def test_under_mixed_precision_it_is_unscaled():
    seen = []
    for cbs in (), (Scaled(),):
        learn = smooth(ActGradPenalty(.5, nn.Softplus), *cbs)
        with quiet(learn): learn.fit(1)
        seen.append((learn.recorder.values[0], [p.detach().clone() for p in learn.model.parameters()]))
    assert_close(seen[0][0], seen[1][0]); assert_close(seen[0][1], seen[1][1])


def test_the_scale_keeps_float16_from_vanishing():
    a = torch.ones(4, dtype=torch.float16, requires_grad=True)
    def loss(): return (a*a).float().mean()*1e-8
    assert act_grad_penalty(loss(), [a]).item() == 0
    assert act_grad_penalty(loss(), [a], torch.tensor(2.**24)).item() == pytest.approx(4*(2*1e-8/4)**2, rel=1e-2)


def test_squares_are_summed_in_float32():
    a = torch.ones(300, 300, dtype=torch.float16, requires_grad=True)
    assert act_grad_penalty((a*1).sum(dtype=torch.float32), [a]).item() == 90_000


@pytest.mark.skipif(sys.platform == 'win32', reason='the peak of memory is read from the resource module')
def test_memory_is_constant_over_200_steps():
    import resource
    class Peak(Callback):
        run_valid, order = False, 100
        def __init__(self): self.peak = []
        def after_batch(self): self.peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10))
    learn = smooth(ActGradPenalty(.5, nn.Tanh), peak := Peak())
    learn.dls = synth_dbunch(n_train=50, n_valid=1, bs=16)
    learn.model = nn.Sequential(nn.Linear(1, 50_000), nn.Tanh(), nn.Linear(50_000, 1))  # 3 MB an activation
    with quiet(learn): learn.fit(4)
    assert len(peak.peak) == 200 and peak.peak[-1] - peak.peak[4] < 100, 'MB; keeping one activation a step would be 600'
    assert not any(m._forward_hooks for m in learn.model)


def test_helpers_and_nested_validation_leave_the_value_alone():
    class ValidateInside(Callback):
        def after_batch(self):
            if self.training and self.iter == 4:
                self.learn.validate(); self.learn.training = True; self.learn.model.train(); self.learn.dl = self.learn.dls.train
    values = []
    for cbs in (), (ValidateInside(),):
        learn = smooth(ActGradPenalty(.5, nn.Tanh), lr=0.)
        with quiet(learn): learn.fit(1, cbs=list(cbs))
        values.append(learn.act_grad_penalty.told()['grad_penalty']())
    assert math.isfinite(values[0]) and values[0] == pytest.approx(values[1])
    with quiet(learn): learn.lr_find(num_it=6, show_plot=False); learn.validate(); learn.get_preds()
    assert len(learn.metrics) == 0


def test_after_an_error_in_a_batch_the_next_fit_watches_once():
    class Fail(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn = smooth(ActGradPenalty(.5, nn.Tanh))
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Fail())
    look = Look()
    learn.remove_cb(Fail)
    with quiet(learn): learn.fit(1, cbs=look)
    want, _ = by_hand(learn.model, look.before[0], *look.seen[0][:2], .5, lambda m: isinstance(m, nn.Tanh))
    assert_close(look.seen[0][2], list(want))


def test_after_an_error_nothing_more_is_kept_and_the_model_can_be_pickled(tmp_path):
    class Fail(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn = smooth(ActGradPenalty(.5, nn.Tanh))
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Fail())
    learn.remove_cb(Fail)
    with quiet(learn): learn.validate(); learn.get_preds()
    assert len(learn.act_grad_penalty._outs) == 0
    torch.save(learn.model, tmp_path/'model.pth')


def test_a_step_that_overflowed_is_left_out_of_the_value():
    learn = smooth(ActGradPenalty(.5, nn.Tanh), lr=0.)
    with quiet(learn): learn.fit(1)
    value = learn.act_grad_penalty.told()['grad_penalty']
    before = value()
    learn.act_grad_penalty._values.append(torch.tensor(math.inf))
    assert value() == before


def test_one_tensor_counts_once_and_a_change_in_place_is_named():
    nested, look = smooth(lr=0.), smooth(ActGradPenalty(.5, '3'), lr=0.)
    nested.model = nn.Sequential(*nested.model[:2], nn.Sequential(*nested.model[2:4]), nested.model[4])
    nested.add_cb(ActGradPenalty(.5, '2*'))  # the inner Sequential, its Linear and its Tanh, whose output is that of the Sequential
    both = smooth(ActGradPenalty(.5, '[23]'), lr=0.)
    for o in nested, look, both:
        with quiet(o): o.fit(1)
    values = [o.act_grad_penalty.told()['grad_penalty']() for o in (nested, look, both)]
    assert values[0] == pytest.approx(values[2]) and values[1] < values[2]
    changed = smooth(ActGradPenalty(.5, nn.Linear))
    changed.model[1] = nn.ReLU(inplace=True)
    with quiet(changed), pytest.raises(ValueError, match='changed in place by the layer after it'): changed.fit(1)


@pytest.mark.parametrize('how', ['wrapped', 'in place', 'within'])
def test_compiled_models_are_refused(how):
    learn = smooth(ActGradPenalty(.5, nn.Tanh))
    if how == 'wrapped': learn.model = torch.compile(learn.model, backend='eager')
    elif how == 'in place': learn.model.compile(backend='eager')
    else: learn.model[3].compile(backend='eager')
    with quiet(learn), pytest.raises(ValueError, match='cannot be differentiated again'): learn.fit(1)


def test_a_frozen_model_is_named():
    learn = smooth(ActGradPenalty(.5, nn.Softplus))
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    with quiet(learn), pytest.raises(ValueError, match='took part in this batch with a gradient'): learn.fit(1)


@pytest.mark.parametrize('bad,error,words', [
    (lambda: ActGradPenalty(0), ValueError, 'weight is 0'), (lambda: ActGradPenalty(math.nan), ValueError, 'weight is nan'),
    (lambda: ActGradPenalty(-1.), ValueError, 'weight is -1'), (lambda: ActGradPenalty('x'), ValueError, "weight is 'x'"),
    (lambda: ActGradPenalty(1., layers=[nn.ReLU]), TypeError, 'layers is')])
def test_bad_input_is_named(bad, error, words):
    with pytest.raises(error, match=words): bad()


def test_nothing_chosen_is_an_error():
    for layers in None, 'head.*', nn.ReLU:
        learn = smooth(ActGradPenalty(1., layers))
        with quiet(learn), pytest.raises(ValueError, match='No module of Sequential is chosen'): learn.fit(1)
