"The statistics by hand, the figures by their values, the page and the command by what they write."
import base64
import errno
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from learned_relu import _files
from learned_relu.bench.arms import Arm
from learned_relu.bench.commands.report import first_paragraph, learned_relu_report
from learned_relu.bench.compare import compare
from learned_relu.bench.figures import STARTS, plot_accuracy, plot_pairs, plot_params, plot_shapes, shape_values, shapes
from learned_relu.bench.glance import answers
from learned_relu.bench.pairs import accuracy_at, check_pairs, epoch_ends, equal_time, paired, time_ratio
from learned_relu.bench.record import read_record, read_records
from learned_relu.bench.report import check_report, recipe_toml, report_page, save_report
from learned_relu.bench.stats import anytime_interval, bootstrap_interval, equivalence_p, holm, interval, p_value, pairs_needed, signs
from learned_relu.bench.table import (
    BOARD_NOISE,
    board_rows,
    declared,
    leaderboard,
    readable,
    readable_equivalence,
    readable_losses,
    readable_tests,
    table,
)
from learned_relu.layers import LearnedRelu
from learned_relu.reference import learned_relu_reference

REAL = Path(__file__).parents[1]/'benchmarks'/'records'/'accuracy'
WOOF, DIGITS = REAL/'2026-11-21-imagewoof-64px-xresnet18-2ep-flipped', REAL/'2026-11-21-digits-family'


def record(arm, seed, acc, seconds=1., pair='same', **more):
    return dict(arm=arm, seed=seed, accuracy=[.1, acc], seconds_per_epoch=seconds, pair=f'{pair}-{seed}', commit=None,
                data=dict(name='<data>', fingerprint='f'), recipe=dict(arch='xresnet18', size=128, epochs=2),
                versions=dict(torch='2'), hardware=dict(device='cpu', threads=2)) | more


BOARD = dict(data=dict(name='imagewoof2-160', fingerprint='f'))
RECORDS = [record('relu', 0, .50, 1.), record('relu', 1, .60, 2.), record('relu', 2, .58, 4.),
           record('learned', 0, .52, 3.), record('learned', 1, .61, 2.2), record('learned', 2, .61, 4.8)]

differences = st.lists(st.integers(-400, 400), min_size=2, max_size=8).map(lambda o: np.array(o)/40.)


def test_means_spreads_pairs_and_times():
    t = table(RECORDS).set_index('arm')
    assert t.n.tolist() == [3, 3] and t.accuracy.tolist() == pytest.approx([56, 58])
    assert t['std'].tolist() == pytest.approx([((36 + 16 + 4)/2)**.5, ((36 + 9 + 9)/2)**.5])
    d = np.array([2., 1., 3.])
    half = stats.t.ppf(.975, 2)*d.std(ddof=1)/3**.5
    assert t.loc['learned', ['vs relu', 'vs relu low', 'vs relu high']].tolist() == pytest.approx([2, 2 - half, 2 + half])
    assert t.loc['learned', ['vs relu bootstrap low', 'vs relu bootstrap high']].isna().all(), 'of three pairs it holds far less than it says'
    assert t.loc['learned', 'time ratio'] == pytest.approx(1.2) and t.loc['learned', 'vs relu n'] == 3
    assert np.isnan(t.loc['relu', 'vs relu']) and np.isnan(t.loc['learned', 'vs general'])


def test_runs_that_began_otherwise_are_refused():
    def at(capability, weights): return dict(hardware=dict(device='cpu', machine='x86_64', capability=capability, threads=2),
                                             versions=dict(torch='2.15.0'), pair=dict(weights=weights, batches='same'))
    others = [*RECORDS[:2], record('relu', 2, .58) | at('AVX2', 'a'), *RECORDS[3:5], record('learned', 2, .99) | at('DEFAULT', 'b')]
    with pytest.raises(ValueError) as refused: paired(others, 'learned', 'relu')
    for o in ('seed 2: learned and relu are no pair, since their initial weights differ',
              'relu ran on cpu, x86_64, CPU capability AVX2, 2 threads, torch 2.15.0', 'make its runs again where the other ran',
              'learned ran on cpu, x86_64, CPU capability DEFAULT, 2 threads, torch 2.15.0'): assert o in str(refused.value)
    for ask in (table, report_page, check_pairs):
        with pytest.raises(ValueError, match='are no pair'): ask(others)
    assert paired(others[:-1], 'learned', 'relu') == pytest.approx([.02, .01]), 'a seed that one arm lacks is no fault'


def test_one_pair_has_no_interval():
    one = np.array([.1])
    assert np.isnan([*interval(one), *bootstrap_interval(one), p_value(one), pairs_needed(one)]).all()
    text = readable(table([RECORDS[0], RECORDS[3]])).set_index('arm')
    assert text.loc['learned', 'vs relu [95 %]'] == '+2.00' and text.loc['relu', 'std'] == '-'


def test_pairs_that_are_alike_have_a_point_and_no_test():
    for d in (np.array([.1, .1]), np.array([.52 - .51, .61 - .60, .41 - .40])*100):
        assert interval(d) == (d[0], d[0]) and bootstrap_interval(d) == pytest.approx((d[0], d[0]))
        assert np.isnan(p_value(d)) and np.isnan(pairs_needed(d))


def every_resample(d): return np.array([np.mean(o) for o in product(d, repeat=len(d))])


def bca_by_hand(d):
    "Efron's interval from all resamples there are"
    means, norm = np.sort(every_resample(d)), stats.norm
    z0 = norm.ppf(((means < d.mean() - 1e-12).mean() + (means <= d.mean() + 1e-12).mean())/2)
    out = np.array([np.delete(d, i).mean() for i in range(len(d))])
    u = out.mean() - out
    a = (u**3).sum()/(6*(u**2).sum()**1.5)
    at = [norm.cdf(z0 + (z0 + z)/(1 - a*(z0 + z))) for z in norm.ppf([.025, .975])]
    return np.quantile(means, at)


@pytest.mark.parametrize('d', [[.1, .2, .4, .8, 5.], [-3., 1., 1.5, 2., 2.5]], ids=str)
def test_the_bootstrap_is_bca(d):
    d = np.array(d)
    want, spread = bca_by_hand(d), np.quantile(every_resample(d), [.025, .975])
    assert bootstrap_interval(d) == pytest.approx(tuple(want), abs=.04*np.ptp(d))
    assert abs(want - spread).max() > .08*np.ptp(d), 'percentiles would do as well here, so nothing is tested'


@settings(deadline=None, max_examples=30)
@given(differences, st.integers(-100, 100))
def test_the_bootstrap_moves_with_its_data_stays_within_and_is_the_same_again(d, shift):
    low, high = bootstrap_interval(d)
    assert (low, high) == bootstrap_interval(d)
    assert d.min() - 1e-9 <= low <= high <= d.max() + 1e-9
    assert bootstrap_interval(d*2 + shift) == pytest.approx((low*2 + shift, high*2 + shift), abs=1e-6)


@given(differences)
def test_p_value_and_interval_by_the_t_distribution(d):
    assume(np.ptp(d) > 0)
    n, se = len(d), d.std(ddof=1)/len(d)**.5
    assert p_value(d) == pytest.approx(2*stats.t.sf(abs(d.mean())/se, n - 1), abs=1e-9)
    half = stats.t.ppf(.975, n - 1)*se
    assert interval(d) == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-9)


def holm_by_hand(ps):
    res, worst = [np.nan]*len(ps), 0.
    have = sorted((i for i, p in enumerate(ps) if not np.isnan(p)), key=lambda i: ps[i])
    for k, i in enumerate(have): res[i] = worst = max(worst, min(1., ps[i]*(len(have) - k)))
    return res


@settings(deadline=None, max_examples=25)  # statsmodels collects garbage at each call
@given(st.lists(st.floats(0, 1) | st.just(np.nan), max_size=8))
def test_holm_by_hand(ps): np.testing.assert_allclose(holm(ps), holm_by_hand(ps), rtol=1e-12)


def power_of(n, size): return stats.nct.sf(stats.t.ppf(.975, n - 1), n - 1, size*n**.5)


@settings(deadline=None)
@given(st.floats(.13, 40.), st.sampled_from([.5, 1.]))
def test_so_many_pairs_have_the_power_and_one_fewer_has_not(spread, effect):
    n = pairs_needed(np.array([1., 1. + spread*2**.5]), effect)
    assert n == int(n) >= 3 and power_of(n, effect/spread) > .8 - 1e-3
    assert n == 3 or power_of(n - 1, effect/spread) < .8


def test_a_tiny_spread_needs_three_pairs(): assert pairs_needed(np.array([1., 1.0001])) == 3


def test_signs_and_ties():
    assert signs(np.array([2., 0., -1.])) == '1 of 3 above, 1 tied' and signs(np.array([2., .3])) == '2 of 2 above' and signs(np.array([])) == ''
    assert signs(np.array([.5 - .4 - .1])) == '0 of 1 above, 1 tied', 'rounding is no difference'


def test_statsmodels_is_asked_for_by_name_and_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, 'statsmodels.stats.multitest', None)
    with pytest.raises(ImportError, match=r'pip install "learned_relu\[bench\]"'): holm([.1])
    with pytest.raises(ImportError, match='statsmodels'): compare([Arm('relu')], [0], None, None, 'nowhere')


def test_accuracy_at_a_time_by_hand():
    r = dict(accuracy=[.2, .4, .5], seconds_per_epoch=20., epoch_seconds=[10., 30., 20.])
    assert epoch_ends(r).tolist() == [10, 40, 60] and epoch_ends(dict(r, epoch_seconds=None)).tolist() == [20, 40, 60]
    assert [accuracy_at(r, t) for t in (10, 25, 40, 50, 60, 99)] == pytest.approx([.2, .3, .4, .45, .5, .5])
    assert np.isnan(accuracy_at(r, 9.9))


def test_equal_time_is_that_of_relu_with_the_same_seed():
    rs = [record('relu', 0, .5, epoch_seconds=[1., 1.]), record('relu', 1, .5, epoch_seconds=[4., 4.]), record('slow', 0, .5, epoch_seconds=[1., 3.]),
          record('slow', 1, .9, epoch_seconds=[2., 2.]), record('slow', 2, 1.), record('late', 0, .5, epoch_seconds=[2.5, 2.5])]
    assert equal_time(rs, 'slow') == pytest.approx(((.1 + .4/3) + .9)/2)
    assert equal_time(rs, 'relu') == .5 and np.isnan(equal_time(rs, 'late')) and np.isnan(equal_time(rs[2:], 'slow'))
    assert table(rs).set_index('arm').loc['slow', 'accuracy at relu time'] == pytest.approx(100*equal_time(rs, 'slow'))


def test_the_family_is_every_arm_against_relu():
    more = [*RECORDS, *(record('general', s, a) for s, a in enumerate((.51, .62, .58))), record('other', 0, .7)]
    t = table(more).set_index('arm')
    assert t.index.tolist() == ['relu', 'learned', 'general', 'other']
    ps = [p_value(paired(more, o, 'relu')*100) for o in ('learned', 'general')]
    assert t['vs relu p'].tolist() == pytest.approx([np.nan, *ps, np.nan], nan_ok=True)
    assert t['vs relu p holm'].tolist() == pytest.approx([np.nan, *holm_by_hand(ps), np.nan], nan_ok=True)
    assert t['vs relu p holm'].min() > t['vs relu p'].min()
    assert readable_tests(table(more))[['arm', 'versus']].values.tolist() == [['learned', 'relu'], ['general', 'relu'], ['other', 'relu'],
                                                                             ['learned', 'general'], ['other', 'general']]
    versus = [p_value(paired(more, o, 'general')*100) for o in ('learned', 'other')]
    want = [np.nan, holm_by_hand(versus)[0], np.nan, np.nan]
    assert t['vs general p holm'].tolist() == pytest.approx(want, nan_ok=True), 'relu against general is general against relu'


@pytest.mark.parametrize('points,margin,said', [
    (3., None, 'x is more accurate, p is'), (-3., None, 'relu is more accurate, p is'), (0., None, 'no difference is shown, p is'),
    (3., 1., 'x is more accurate, with a margin of 1'), (-3., 1., 'relu is more accurate, with a margin of 1'),
    (-3., 9., 'relu is more accurate, by less than the margin, with a margin of 9'), (0., 9., 'equivalent, with a margin of 9'),
    (0., .01, 'neither a difference nor equivalence is shown, with a margin of 0.01')])
def test_a_sentence_says_which_arm_is_more_accurate(points, margin, said):
    runs = [record(o, s, .5 + (o == 'x')*(points + .1*(-1)**s)/100) for s in range(6) for o in ('relu', 'x')]
    sentence, = answers(table(runs, dict(margin=margin)))
    assert sentence.startswith(f'x − relu: {points:+.2f} points [') and f', 6 pairs: {said}' in sentence


def test_the_noise_of_the_boards_is_asked_of_the_interval():
    def arm(name, *points): return [record(name, s, .5 + p/100) for s, p in enumerate(points)]
    rs = [*arm('relu', 0, 0, 0), *arm('near', .1, -.1, .1), *arm('shown', .2, .3, .4), *arm('lower', -.2, -.3, -.4), *arm('wide', .1, 2., -2.),
          *arm('above', .9, 1., 1.3), *arm('far', 3., 3.1, 3.2), *arm('worse', -3., -3.1, -3.2), *arm('edge', 1., 1., 1.), *arm('one', .1)]
    want = ['-', 'yes', 'yes, not 0', 'yes, not 0', 'open', 'open', 'no', 'no', 'no', '-']
    assert 'within board noise' not in readable(table(rs)), 'these data have no board'
    assert 'leaderboard' not in report_page(rs) and 'board' not in report_page(rs).partition('<dl>')[2]
    rs = [r | BOARD for r in rs]
    assert readable(table(rs))['within board noise'].tolist() == want
    assert 'Rows for the leaderboards' in report_page(rs) and '<dt>within board noise' in report_page(rs)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-300, 300), min_size=2, max_size=5))
def test_board_noise_and_interval_never_contradict_each_other(points):
    rs = [*(record('relu', s, .5, **BOARD) for s in range(len(points))), *(record('x', s, .5 + p/1e4, **BOARD) for s, p in enumerate(points))]
    r = table(rs).iloc[1]
    low, high, said = r['vs relu low'], r['vs relu high'], r['within board noise']
    assert said in ('yes', 'yes, not 0', 'no', 'open')
    if said == 'yes': assert -BOARD_NOISE < low <= 0 <= high < BOARD_NOISE
    if said == 'yes, not 0': assert -BOARD_NOISE < low and high < BOARD_NOISE and not low <= 0 <= high
    if said == 'no': assert low >= BOARD_NOISE or high <= -BOARD_NOISE
    if said == 'open': assert min(high, BOARD_NOISE) > max(low, -BOARD_NOISE) and (low <= -BOARD_NOISE or high >= BOARD_NOISE)


def test_rows_as_the_boards_have_them():
    rows = board_rows(leaderboard([*RECORDS, record('a|b', 0, .12344)])).splitlines()
    assert rows == ['| Size (px) | Epochs | Accuracy | # Runs | Arm |', '| -- | -- | -- | -- | -- |', '| 128 | 2 | 56.00% | 3, mean | relu |',
                    '| 128 | 2 | 58.00% | 3, mean | learned |', r'| 128 | 2 | 12.34% | 1 | a\|b |']


def test_what_the_readme_says_of_real_records():
    t = readable(table(read_records(DIGITS)[0]['45a0749e'])).set_index('arm')
    assert t.loc['symmetric', 'vs relu [95 %]'] == '-10.10 [-18.41, -1.79]' and t.loc['relu', ['accuracy %', 'std']].tolist() == ['93.13', '1.10']


def telemetry(kinds, layers=('b', 'a', 'c', 'd', 'e'), steps=(0, 5, 9)):
    rows = [(s, o, k, STARTS.get(k, 1.) - .01*s*(i + 1)) for s in steps for i, o in enumerate(layers) for k in kinds]
    return dict(zip(('step', 'layer', 'kind', 'mean'), map(list, zip(*rows, strict=True)), strict=True))


def reference(x, leak, sub, maxv):
    return learned_relu_reference(torch.tensor(x), *(torch.tensor(o, dtype=torch.float64) for o in (leak, sub, maxv))).numpy()


@given(st.floats(0, .5), st.floats(0, 1), st.floats(.5, 20))
def test_shapes_are_the_reference_curve(leak, sub, maxv):
    x = np.linspace(-5, 25, 61)
    got = shapes(pd.DataFrame([dict(maxv=maxv, leak=leak, sub=sub), STARTS]), x)
    np.testing.assert_array_equal(got, [reference(x, leak, sub, maxv), reference(x, **STARTS)])


def test_the_starts_are_those_of_the_layer():
    layer = LearnedRelu()
    assert {k: layer.current(k).item() for k in STARTS} == pytest.approx(STARTS)


def test_parameters_that_were_not_learned_come_from_the_record_or_the_layer():
    r = record('learned', 0, .5, telemetry=telemetry(['leak', 'sub']))
    v = shape_values(r)
    assert list(dict.fromkeys(v.index.get_level_values('layer'))) == ['b', 'a', 'c', 'd', 'e'] and list(v) == ['leak', 'sub', 'maxv']
    assert v.loc[('a', 5)].tolist() == pytest.approx([.05 - .1, .25 - .1, 10.])
    assert set(shape_values(dict(r, fixed=dict(maxv=3.))).maxv) == {3.}
    for other in (dict(r, fixed=dict(leak=0.)), dict(r, telemetry=telemetry(['leak', 'cutoff'])), dict(r, telemetry=None), RECORDS[0]):
        assert not len(shape_values(other)) and plot_shapes(other) is None


def test_curves_drawn_are_those_of_first_middle_and_last_layer_beside_relu():
    r = record('learned', 0, .5, telemetry=telemetry(['leak', 'sub', 'maxv']))
    axs, v = plot_shapes(r).axes, shape_values(r)
    assert [o.get_title() for o in axs[:3]] == ['layer b', 'layer c', 'layer e']
    for col, layer in enumerate('bce'):
        x, start = axs[col].lines[0].get_xdata(), reference(axs[col].lines[0].get_xdata(), **v.loc[(layer, 0)])
        for i, step in enumerate((0, 5, 9)):
            want = reference(x, **v.loc[(layer, step)])
            for row, y in enumerate((want, want, want - start)): np.testing.assert_allclose(axs[3*row + col].lines[i].get_ydata(), y, atol=1e-12)
        for row in (0, 1): np.testing.assert_array_equal(axs[3*row + col].lines[-1].get_ydata(), np.maximum(x, 0))
        assert x[0] == -3 and x[-1] > v.maxv.max(), 'the cap is in the picture'


def test_bands_reach_from_the_lowest_to_the_highest_run():
    ax = plot_accuracy(RECORDS).axes[0]
    for band, arm in zip(ax.collections, ('relu', 'learned'), strict=True):
        ys = np.array([r['accuracy'][-1] for r in RECORDS if r['arm'] == arm])*100
        at = band.get_paths()[0].vertices
        assert [at[at[:, 0] == 2, 1].min(), at[at[:, 0] == 2, 1].max()] == pytest.approx([ys.min(), ys.max()])
    means = [o.get_ydata()[-1] for o in ax.lines if not o.get_label().startswith('_')]
    assert means == pytest.approx([56, 58]) and ax.get_legend()
    one = plot_accuracy([dict(r, accuracy=r['accuracy'][-1:]) for r in RECORDS]).axes[0]
    assert [o.get_text() for o in one.get_xticklabels()] == ['relu\n(n=3)', 'learned\n(n=3)']


@pytest.mark.parametrize('n,kinds', [(1, ''), (3, 't'), (5, 't anytime-valid'), (9, 't anytime-valid'), (10, 't anytime-valid bootstrap')])
def test_intervals_are_drawn_from_as_many_pairs_as_they_need_and_told_apart(n, kinds):
    records = [record(o, s, .5 + gain*(.01 + .003*(s % 4))) for s in range(n) for o, gain in (('relu', 0), ('learned', 1))]
    fig, d = plot_pairs(records), paired(records, 'learned', 'relu')*100
    lines = {o.get_label(): o for o in fig.axes[0].lines}
    drawn = {o.rpartition(', ')[2]: tuple(v.get_xdata()) for o, v in lines.items() if 'interval' in o}
    want = {'t': interval, 'anytime-valid': anytime_interval, 'bootstrap': bootstrap_interval}
    assert drawn == {o: want[o](d) for o in kinds.split()}
    assert sorted(lines['seeds'].get_xdata()) == pytest.approx(sorted(d)) and lines['mean'].get_xdata() == pytest.approx(d.mean())
    assert {o.get_text() for o in fig.legends[0].texts} == {*lines}
    keys = plot_pairs([r | BOARD for r in records]).legends[0].texts
    assert {o.get_text() for o in keys} == {*lines, 'noise of the boards, ±1 point'}
    text = readable_tests(table(records))
    assert [o for o in text if o.startswith('95 %')] == ['95 % t', '95 % anytime-valid'] + ['95 % bootstrap']*(n >= 10)
    assert (text['95 % anytime-valid'] == '-').all() == (n < 5)


def test_heat_maps_have_depth_downwards_and_time_to_the_right():
    r = record('clip', 0, .5, telemetry=telemetry(['cutoff', 'low']))
    axs = plot_params(r).axes
    assert [o.get_title() for o in axs[:2]] == ['cutoff', 'low'] and [o.get_text() for o in axs[0].get_yticklabels()] == list('bacde')
    np.testing.assert_allclose(axs[0].images[0].get_array(), 1 - .01*np.outer(range(1, 6), [0, 5, 9]))


def pairs(): return plot_pairs(RECORDS)


@pytest.mark.parametrize('draw', [lambda: plot_accuracy(RECORDS), pairs,
                                  lambda: plot_shapes(record('learned', 0, .5, telemetry=telemetry(['leak', 'sub', 'maxv']))),
                                  lambda: plot_params(record('learned', 0, .5, telemetry=telemetry(['leak'])))])
def test_every_figure_has_labelled_axes_and_room_for_them(draw):
    fig = draw()
    assert type(fig.get_layout_engine()).__name__ == 'ConstrainedLayoutEngine'
    plots = [o for o in fig.axes if o.get_label() != '<colorbar>']
    assert all(o.get_xlabel() for o in plots if o.get_subplotspec().is_last_row())
    assert all(o.get_ylabel() or draw is pairs and o.get_yticklabels() for o in plots if o.get_subplotspec().is_first_col())
    assert all(o.get_ylabel() for o in fig.axes if o not in plots)


HOSTILE = ['$\\frac{$', 'a$_b$ \\$c\\$', '<script>alert("1")</script>', "it's & \"so\"", '_private', '{{ name }} {% raw %}']


def hostile_records():
    tele = telemetry(['leak', 'sub', 'maxv'], layers=HOSTILE)
    named = dict(data=dict(name=f'imagewoof {HOSTILE[2]}', fingerprint=HOSTILE[3]), recipe=dict(arch=HOSTILE[0], size=128, epochs=2, note=HOSTILE[2]))
    return [record(o, s, .5 + s/100, telemetry=tele, **named) for o in ('relu', *HOSTILE) for s in (0, 1)]


def texts_of(fig): return [o.get_text() for o in fig.findobj(plt.Text)]


def test_names_are_drawn_letter_by_letter():
    records = hostile_records()
    once = [dict(r, accuracy=r['accuracy'][-1:]) for r in records]
    figures = [plot_accuracy(records), plot_accuracy(once), plot_pairs(records), *(f(r) for f in (plot_params, plot_shapes) for r in records[2::2])]
    for fig in figures:
        fig.canvas.draw()  # where a formula that is none is an error
        assert not any(o.get_parse_math() for o in fig.findobj(plt.Text) if '$' in o.get_text())
    for fig, each in zip(figures[:3], ('{} (n=2)', '{}\n(n=2)', '{} (n=2)'), strict=True):
        assert {each.format(o) for o in HOSTILE if fig is not figures[0] or o[0] != '_'} <= {*texts_of(fig)}
    for fig, arm in zip(figures[3:], HOSTILE*2, strict=True): assert any(arm in o for o in texts_of(fig))
    assert {*HOSTILE} <= {*texts_of(figures[3])} and f'layer {HOSTILE[0]}' in texts_of(figures[9])


def read(page):
    "Tags, attributes and text of a page, as a browser has them"
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.handle_data = found.append
    parser.feed(page)
    return [o for o in found if not isinstance(o, str)], ''.join(o for o in found if isinstance(o, str))


def test_names_are_written_letter_by_letter():
    tags, text = read(report_page(hostile_records()))
    own = 'html head meta title style body h1 h2 table thead tbody tr th td p a figure img figcaption dl dt dd pre code ul li'.split()
    assert {o for o, _ in tags} == {*own}
    assert {k for _, a in tags for k in a} <= {*'lang charset name content style class border href alt src'.split()}, 'a name opened an attribute'
    assert all(text.count(o) >= 3 for o in HOSTILE), 'in two tables and the board'
    alts = [a['alt'] for tag, a in tags if tag == 'img']
    assert all(f'Curves of three layers of {o}, seed 0 over' in ' '.join(alts) for o in HOSTILE)
    assert f'# Runs | Arm |\n| -- | -- | -- | -- | -- |\n| 128 | 2 | 50.50% | 2, mean | relu |\n| 128 | 2 | 50.50% | 2, mean | {HOSTILE[0]} |' in text
    assert f'Data imagewoof {HOSTILE[2]}, fingerprint {HOSTILE[3]};' in text and f'{HOSTILE[2]}: {HOSTILE[0]}' in text


def test_a_page_without_pairs_or_telemetry_and_with_strange_names():
    page = report_page(RECORDS[3:])
    assert plot_pairs(RECORDS[3:]) is None and plot_params(RECORDS[3]) is None
    assert '&lt;data&gt;' in page and '<data>' not in page and page.count('<img alt="') == 1 and 'How sure' not in page


def test_a_page_holds_what_a_reader_needs():
    page = report_page(read_records(WOOF)[0]['34d243ea'])
    assert page.count('<img alt=') == page.count('<figcaption>') == 5 and not re.search(r'src="http|<link|<script|@import', page)
    assert 'https://github.com/fastai/imagenette' in page and '±1 %' in page and '| 64 | 2 | 41.10% | 1 | learned |' in page
    assert 'size = 64\n' in page and 'data = &#34;imagewoof2-160&#34;' in page
    meant = ' '.join(re.findall('<dt>(.*?)</dt>', page))
    heads = set(re.findall('<th>(.*?)</th>', page)) - {'arm', 'accuracy %'}
    assert {o for o in heads if re.sub(r' \[.*', '', o) not in meant} == set(), 'columns that are not explained'
    assert b'Software' not in base64.b64decode(re.search('base64,([^"]*)', page)[1])[:2000]


texts = st.text(st.characters(codec='utf-8'), max_size=6)
values = st.recursive(st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
                      lambda o: st.lists(o, max_size=3) | st.dictionaries(texts, o, max_size=3), max_leaves=5)


def typed(o):
    "Everything in `o` with its type; the order of keys means nothing in TOML, where tables come last"
    if isinstance(o, dict): return {k: typed(v) for k, v in o.items()}
    return [typed(v) for v in o] if isinstance(o, list) else repr(o)


@settings(deadline=None)
@given(st.dictionaries(texts, values, max_size=6))
def test_a_recipe_reads_back_as_it_was(recipe):
    tomllib = pytest.importorskip('tomllib')
    back = tomllib.loads(recipe_toml(recipe))
    assert back == recipe and typed(back) == typed(recipe), 'types count too'


def test_real_recipes_read_back_and_what_is_not_set_is_a_comment():
    tomllib = pytest.importorskip('tomllib')
    for file in sorted(REAL.glob('*/records/*.json')):
        recipe = read_record(file)['recipe']
        assert tomllib.loads(recipe_toml(recipe)) == {k: v for k, v in recipe.items() if v is not None}
        assert all(f'# {k} is not set' in recipe_toml(recipe) for k, v in recipe.items() if v is None)
    assert tomllib.loads(recipe_toml(dict(a=1, pool=None))) == dict(a=1) and '# pool is not set' in recipe_toml(dict(pool=None))
    for wrong in ({1}, [1, None], dict(a=[b'']), {1: 2}):
        with pytest.raises(TypeError, match='pool is.*pass a number'): recipe_toml(dict(size=1, pool=wrong))


def test_what_is_not_set_stays_in_its_place_and_cannot_leave_its_comment():
    tomllib = pytest.importorskip('tomllib')
    text = recipe_toml({'lr': .1, 'mom': None, 'own': dict(a=1), 'a\nb = 1': None, 'wd': 0})
    assert text == 'lr = 0.1\n# mom is not set\n# "a\\nb = 1" is not set\nwd = 0\n[own]\na = 1\n'
    assert tomllib.loads(text) == dict(lr=.1, wd=0, own=dict(a=1))


def test_tomli_w_is_asked_for_by_name_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tomli_w', None)
    for ask in (check_report, lambda: recipe_toml(dict(a=1)), lambda: save_report(RECORDS, tmp_path)):
        with pytest.raises(ImportError, match=r'tomli-w: pip install "learned_relu\[bench\]"'): ask()
    assert not contents(tmp_path)


def test_a_report_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    save_report(RECORDS, tmp_path)
    before = contents(tmp_path)
    assert sorted(before) == ['report.html', 'table.csv']
    monkeypatch.setattr(_files.os, 'replace', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): save_report(RECORDS[:3], tmp_path)
    assert contents(tmp_path) == before


def contents(path): return {o.relative_to(path).as_posix(): o.read_bytes() for o in sorted(Path(path).rglob('*')) if o.is_file()}


ALL = sorted(o for o in REAL.iterdir() if o.is_dir())


@pytest.mark.parametrize('folders', [(DIGITS, WOOF), pytest.param(ALL, marks=pytest.mark.slow)], ids=['two', 'all'])
def test_the_command_twice_writes_the_same_and_nothing_into_the_records(folders, tmp_path, capsys):
    both = tmp_path/'both' # as in a folder of one's own, where a timing lies beside trainings
    for o in folders: shutil.copytree(o, both/o.name)
    shutil.copytree(REAL.with_name('speed')/'2026-11-21-speed-2-cores', both/'2026-11-21-speed-2-cores')
    before = contents(both)
    for o in 'ab': learned_relu_report(both, out=tmp_path/o)
    a, b = contents(tmp_path/'a'), contents(tmp_path/'b')
    assert a == b and contents(both) == before and capsys.readouterr().out.count('index.html') == 2
    index = a['index.html'].decode()
    for folder in both.iterdir():
        assert f'<h2>{folder.name}</h2>' in index
        have = [f'{folder.name}/{o}' in a for o in ('table.csv', 'report.html')]
        assert have == [any(folder.glob('records/*.json'))]*2
    speed = index.split('2026-11-21-speed-2-cores</h2>')[1].split('<h2>')[0]
    assert 'Not training records' in speed and '<td>-10.10 [-18.41, -1.79]</td>' in index and 'Two shared CPU cores' in index
    assert all((tmp_path/'a'/o).is_file() for o in re.findall('href="([^"h][^"]*)"', index))


@pytest.mark.tried('a disk that is full or refuses')
@pytest.mark.parametrize('name', ['fsync', 'replace'])
@pytest.mark.parametrize('at', [0, 1, 2])  # the table, the page, the index
def test_a_disk_that_is_full_is_one_line_and_leaves_the_report_before(at, name, tmp_path, monkeypatch):
    learned_relu_report(WOOF, out=tmp_path/'out')
    before, calls, real = contents(tmp_path/'out'), [], getattr(os, name)
    def full(*args):
        calls.append(args)
        if len(calls) > at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)
    monkeypatch.setattr(_files.os, name, full)
    with pytest.raises(SystemExit, match=r'^error: .*(table.csv|report.html|index.html) cannot be written \(No space left on device\): free'):
        learned_relu_report(WOOF, out=tmp_path/'out')
    assert contents(tmp_path/'out') == before and len(calls) == at + 1


def folder_with(path, *files):
    (path/'records').mkdir(parents=True)
    for o in files: shutil.copy(o, path/'records')
    return path


def test_a_page_for_each_digest(tmp_path):
    folder_with(tmp_path/'in'/'mixed', *(WOOF/'records').iterdir(), *(DIGITS/'records').glob('*seed0*'))
    learned_relu_report(tmp_path/'in', out=tmp_path/'out')
    got = contents(tmp_path/'out')
    assert sorted(got) == ['index.html', *(f'mixed/{d}/{o}' for d in ('34d243ea', '45a0749e') for o in ('report.html', 'table.csv'))]
    assert all(f'mixed/{d}/report.html' in got['index.html'].decode() for d in ('34d243ea', '45a0749e'))


def test_an_index_leads_to_folders_of_any_name(tmp_path):
    name = 'a "b" <i>#1 100% ?q=&amp;'
    folder_with(tmp_path/'in'/name, *(WOOF/'records').iterdir())
    (tmp_path/'in'/name/'README.md').write_text('it is <b>bold</b> & "so"')
    learned_relu_report(tmp_path/'in', out=tmp_path/'out')
    tags, text = read((tmp_path/'out'/'index.html').read_text(encoding='utf-8'))
    assert name in text and 'it is <b>bold</b> & "so"' in text and not {'i', 'b'} & {o for o, _ in tags}
    links = [unquote(urlsplit(a['href']).path) for tag, a in tags if tag == 'a']
    assert links == [f'{name}/report.html'] and (tmp_path/'out'/links[0]).is_file()


def test_broken_records_are_all_named_and_the_rest_is_built(tmp_path):
    folder_with(tmp_path/'in'/'whole', *(WOOF/'records').iterdir())
    bad = folder_with(tmp_path/'in'/'bad', WOOF/'records'/'relu-seed0-34d243ea.json')/'records'
    (bad/'half.json').write_text('{"format": 1,')
    (bad/'old.json').write_text('{"format": 0}')
    (bad/'short.json').write_text('{"format": 1, "arm": "relu", "accuracy": []}')
    with pytest.raises(SystemExit) as stop: learned_relu_report(tmp_path/'in', out=tmp_path/'out')
    said = stop.value.code
    assert isinstance(said, str), 'which Python prints, and exits with 1'
    for o in ('error: 3 records', 'half.json is not JSON', 'old.json has format 0', 'short.json: it has no seed', f'{bad.parent}: '): assert o in said
    assert sorted(contents(tmp_path/'out')) == ['bad/report.html', 'bad/table.csv', 'index.html', 'whole/report.html', 'whole/table.csv']


def test_paths_that_cannot_be(tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'file').touch()
    for path, want in (('none', 'no directory'), ('file', 'no directory'), ('empty', 'no folder has records')):
        with pytest.raises(SystemExit, match=f'error: path is .*{path}.*{want}.*pass a folder'):
            learned_relu_report(tmp_path/path, out=tmp_path/'out')
    one = folder_with(tmp_path/'in'/'one', WOOF/'records'/'relu-seed0-34d243ea.json')
    for out in (one, one/'report', tmp_path/'in'):
        with pytest.raises(SystemExit, match='error: out is .*a record never changes: pass another --out'): learned_relu_report(one, out=out)
    with pytest.raises(SystemExit, match='cannot be written'): learned_relu_report(one, out=tmp_path/'file'/'out')
    assert sorted(contents(one)) == ['records/relu-seed0-34d243ea.json'] and not (tmp_path/'out').exists()


def test_the_first_paragraph_is_neither_heading_nor_code_nor_table():
    assert first_paragraph('# A\n\n```sh\nls\n\npwd\n```\n\n| a |\n| - |\n\nsome\ntext\n\nmore') == 'some text'
    assert first_paragraph('') == first_paragraph('# only\n') == ''


def test_an_earlier_report_among_the_records_is_no_record(tmp_path):
    shutil.copytree(REAL/'2026-11-21-digits-family', tmp_path/'runs'/'digits')
    for _ in range(2): learned_relu_report(str(tmp_path/'runs'), str(tmp_path/'runs'/'report'))
    assert 'digits' in (tmp_path/'runs'/'report'/'index.html').read_text() and not (tmp_path/'runs'/'report'/'report').exists()


def test_seeds_that_one_arm_lacks_are_told_and_not_timed():
    others = [*RECORDS[:4], record('learned', 7, .61, 9.), record('learned', 8, .61, 9.)]
    df = table(others)
    row = readable(df).set_index('arm').loc['learned']
    assert row['n'] == '3, 1 paired' and df.set_index('arm').loc['learned', 'time ratio'] == pytest.approx(3.)


@pytest.mark.parametrize('other', [dict(device='NVIDIA H100'), dict(capability='AVX512'), dict(cpu='another'), dict(threads=1), dict(processes=2)])
def test_times_of_different_machines_are_not_compared(other):
    alike = [dict(r, hardware=dict(device='cpu', machine='x86_64', cpu='one', capability='AVX2', threads=2, processes=1)) for r in RECORDS]
    moved = [*alike[:-1], dict(alike[-1], hardware=alike[-1]['hardware'] | other)]
    was, now = (table(o).set_index('arm').loc['learned'] for o in (alike, moved))
    assert was['time ratio'] == pytest.approx(1.2) and np.isnan(now['time ratio']) and np.isnan(now['accuracy at relu time'])
    assert now['vs relu n'] == 3 and now['vs relu'] == was['vs relu'], 'only times depend on it'
    assert readable(table(moved)).set_index('arm').loc['learned', ['s/epoch vs relu', 'at relu time %']].tolist() == ['-', '-']


def test_what_only_one_record_says_of_its_machine_does_not_tell_them_apart():
    known = [*RECORDS[:3], *(dict(r, hardware=dict(r['hardware'], capability='AVX2', cpu='one')) for r in RECORDS[3:])]
    assert time_ratio(known, 'learned') == time_ratio(RECORDS, 'learned') == pytest.approx(1.2)


DECLARED = dict(margin=2.5, measures=['accuracy', 'valid_loss'])


def judged(records, judging=DECLARED): return [dict(r, judging=judging, valid_loss=[1., 1 - r['accuracy'][-1]]) for r in records]


def test_only_what_all_who_declare_agree_on_counts():
    rs = judged(RECORDS)
    assert declared(RECORDS)[0] == {} and 'equivalence is not judged' in declared(RECORDS)[1] and 'exploratory' in declared(RECORDS)[1]
    assert declared(rs) == (DECLARED, 'Declared with every run, before it was made: arms are equivalent within 2.5 points of accuracy; '
                                      'measured by accuracy, valid_loss.')
    assert declared([*RECORDS[:2], *rs[2:]])[1].startswith('Declared with 4 of 6 runs')
    assert declared([*judged(RECORDS[:1], dict(DECLARED, margin=1.)), *rs[1:]])[0] == {}
    assert 'no margin' in declared(judged(RECORDS, dict(margin=None, measures=['accuracy', 'valid_loss'])))[1]


def test_a_declared_loss_stands_beside_accuracy_and_another_is_called_exploratory():
    old = [{k: v for k, v in r.items() if k != 'judging'} for r in judged(RECORDS)]
    beside, apart = readable(table(judged(RECORDS))), readable(table(old))
    assert beside.loc[1, 'loss vs relu [95 %]'].startswith('-0.020 [') and [o for o in apart if 'loss' in o] == []
    assert readable_losses(table(old)).loc[1, 'exploratory loss vs relu [95 %]'] == beside.loc[1, 'loss vs relu [95 %]']
    assert not len(readable_losses(table(judged(RECORDS)))) and not len(readable_losses(table(RECORDS)))
    pages = {k: report_page(o) for k, o in dict(declared=judged(RECORDS), old=old).items()}
    assert 'Validation loss, exploratory' in pages['old'] and 'Validation loss, exploratory' not in pages['declared']
    assert 'loss vs relu [95 %]' in pages['declared'] and 'verdict at ±2.5' in pages['declared'] and 'verdict at' not in pages['old']
    assert 'Declared with every run' in pages['declared'] and 'Neither a margin nor a second measure was declared' in pages['old']


def test_a_verdict_goes_by_what_holm_leaves():
    arms = dict(learned=(.52, .614, .606), general=(.501, .60, .579))
    rs = judged([*RECORDS[:3], *(record(k, s, a) for k, accuracies in arms.items() for s, a in enumerate(accuracies))])
    t = table(rs).set_index('arm')
    ps = [equivalence_p(paired(rs, o, 'relu')*100, 2.5) for o in ('learned', 'general')]
    assert t['vs relu equivalence p'].tolist() == pytest.approx([np.nan, *ps], nan_ok=True)
    assert t['vs relu equivalence p holm'].tolist() == pytest.approx([np.nan, *holm_by_hand(ps)], nan_ok=True)
    assert t['vs relu verdict'].tolist() == ['', 'neither shown', 'equivalent'], 'although p is below 0.05 before'
    assert t.loc['learned', 'vs relu p'] < .05 < t.loc['learned', 'vs relu p holm']
    text = readable_equivalence(table(rs))
    assert text['verdict at ±2.5'].tolist() == ['neither shown', 'equivalent', t.loc['learned', 'vs general verdict']]
    assert not len(readable_equivalence(table(RECORDS))), 'no margin, no verdict'
    assert table(RECORDS, DECLARED).set_index('arm').loc['learned', 'vs relu verdict'] == 'neither shown', 'or one that was declared elsewhere'


def test_a_folder_of_runs_that_are_no_pairs_is_named_and_the_rest_is_built(tmp_path):
    folder_with(tmp_path/'in'/'whole', *(WOOF/'records').iterdir())
    mixed = folder_with(tmp_path/'in'/'mixed', *(WOOF/'records').iterdir())/'records'/'learned-seed0-34d243ea.json'
    mixed.write_text(mixed.read_text().replace('"weights": "', '"weights": "other'))
    with pytest.raises(SystemExit) as stop: learned_relu_report(tmp_path/'in', out=tmp_path/'out')
    assert 'error: runs that are no pairs are not reported on:' in stop.value.code and 'mixed, recipe 34d243ea: seed 0: ' in stop.value.code
    assert 'their initial weights differ' in stop.value.code
    assert sorted(contents(tmp_path/'out')) == ['index.html', 'whole/report.html', 'whole/table.csv']
    assert 'Some of its runs are no pairs' in (tmp_path/'out'/'index.html').read_text()
