"What `ActTelemetry` and the report draw of a history: one picture, the right values, and nothing made of rounding."
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from common import make, quiet
from torch import nn

from learned_relu.bench.figures import plot_params, plot_shapes
from learned_relu.callback.freeze import FreezeActParams
from learned_relu.callback.telemetry import ActTelemetry
from learned_relu.history import mean_values, plot_curves, plot_map, plot_means
from learned_relu.layers import LearnedClip, LearnedRelu


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    plt.close('all')
    yield
    plt.close('all')


def trained(model=None):
    learn = make(ActTelemetry(3))
    learn.model = model or learn.model
    with quiet(learn): learn.fit(1, 1e-2)
    return learn.act_telemetry


def history(means, layers='ab'):
    return pd.DataFrame([dict(layer=o, step=s, kind='leak', mean=m) for o, ms in zip(layers, means, strict=True) for s, m in enumerate(ms)])


def test_telemetry_and_report_draw_the_same():
    tele = trained()
    run = dict(arm='learned', seed=0, telemetry=tele.frame().to_dict('list'))
    for kind, ax in zip(('leak', 'sub', 'maxv'), plot_params(run).axes, strict=False):
        mine = tele.heatmap(kind)
        np.testing.assert_array_equal(mine.images[0].get_array(), ax.images[0].get_array())
        assert mine.images[0].get_clim() == ax.images[0].get_clim()
        assert [o.get_text() for o in mine.get_yticklabels()] == ['1', '3'] and (mine.get_title(), ax.get_title()) == (f'{kind}: mean', kind)
    whole = plot_shapes(run, n=5).axes[0].lines
    for mine, theirs in zip(tele.plot_curves()[0].lines, whole, strict=True):
        assert plt.matplotlib.colors.same_color(mine.get_color(), theirs.get_color())
        np.testing.assert_allclose(mine.get_ydata(), np.interp(mine.get_xdata(), *theirs.get_data()), atol=.02)  # corners fall between points


def test_curves_are_those_of_each_layer_with_what_it_holds_fixed():
    layers = LearnedRelu(3, leak=torch.tensor([.1, .2, .3]), sub=.5, learn='sub'), LearnedClip(3, cutoff=1.)
    model = nn.Sequential(nn.Linear(1, 3), layers[0], nn.Linear(3, 3), layers[1], nn.Linear(3, 1))
    tele = trained(model=model)
    for ax, name, layer in zip(tele.plot_curves(2), '13', layers, strict=True):
        means = tele.frame().set_index(['layer', 'step', 'kind'])['mean'].loc[name]
        for line, step in zip(ax.lines, (0, 9), strict=False):
            fixed = {k: getattr(layer, k).double().mean() for k in layer.kinds if k not in layer.learn}
            values = fixed | {k: torch.tensor(means[step, k]) for k in layer.learn}
            want = layer.curve(torch.from_numpy(line.get_xdata())[:, None], values, channel_dim=1)[:, 0].detach()
            np.testing.assert_allclose(line.get_ydata(), want, atol=1e-12)
        assert ax.get_title() == f'layer {name}' and ax.lines[-1].get_label() == 'ReLU'
    assert ax.lines[0].get_ydata().max() == pytest.approx(1, abs=.02), 'the cap of layer 3'


def test_layers_stay_in_the_order_of_the_model_and_only_those_with_a_curve_are_drawn():
    values = mean_values(history([[.1, .2]]*4, ['z', 'b', 'y', 'a']))
    assert list(dict.fromkeys(values.index.get_level_values('layer'))) == ['z', 'b', 'y', 'a']
    def curve(rows, x): return np.outer(rows.leak, x)
    axs = plot_curves(values, dict.fromkeys('zya', curve), views=('whole', 'change'))
    assert [o.get_title() for o in axs[0]] == ['layer z', 'layer y', 'layer a']
    np.testing.assert_allclose(axs[1, 0].lines[1].get_ydata(), .1*axs[1, 0].lines[1].get_xdata())
    with pytest.raises(ValueError, match=r"curves has \['q'\], none of which was recorded: pass some of \['z', 'b', 'y', 'a'\]"):
        plot_curves(values, dict(q=curve))


@pytest.mark.parametrize('means, ends', [
    ([[.1, .3], [.2, .2]], (.1, .3)), ([[10, 10.004], [10, 10]], (9.996998, 10.007002)), ([[-5, -5], [-5, -5]], (-5.0025, -4.9975)),
    ([[.1, np.inf], [.3, np.nan]], (.1, .3)), ([[np.nan]*2]*2, (0, 1))], ids=str)
def test_no_scale_is_finer_than_a_thousandth_or_stretched_by_what_is_not_finite(means, ends):
    ax = plot_map(history(means), 'leak')
    assert ax.images[0].get_clim() == pytest.approx(ends)
    ax.figure.canvas.draw()
    low, high = plot_means(history(means))[0].get_ylim()
    assert low <= ends[0] and high >= ends[1] and high - low < 1.2*(ends[1] - ends[0]) or not np.isfinite(means).any()


def test_what_cannot_be_drawn_is_named():
    one = history([[.1]], 'a')
    for draw in (lambda: plot_map(one, 'slope'), lambda: plot_means(one, ['slope'])):
        with pytest.raises(ValueError, match=r"kind is 'slope': pass one of \['leak'\]"): draw()
    with pytest.raises(ValueError, match=r"value is 'step': pass one of \['mean'\]"): plot_map(one, 'leak', 'step')
    for draw in (plot_means(one)[0], plot_map(one, 'leak'), plot_curves(mean_values(one), dict(a=lambda rows, x: x[None]))[0, 0]):
        draw.figure.canvas.draw()  # a single moment is a history, too
    tele = ActTelemetry()
    for draw in (tele.plot, tele.heatmap, tele.plot_curves):
        with pytest.raises(ValueError, match='no history yet'): draw()


def test_what_was_held_is_called_frozen():
    learn = make(FreezeActParams(0.), ActTelemetry(3))
    with quiet(learn): learn.fit(1, 1e-2)
    axs = learn.act_telemetry.plot()
    assert all(ax.get_title().endswith('\nfrozen: it was held where it is') for ax in axs)
    assert (learn.act_telemetry.heatmap('leak', 'frozen').images[0].get_array() == 1).all()
