"What intervals and verdicts are worth: against scipy and statsmodels, and by counting how often they are wrong where the truth is known."
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.stats.weightstats import ttost_paired

from learned_relu.bench.stats import (
    BOOTSTRAP_FROM,
    COVERAGE,
    COVERAGE_PAIRS,
    EXPECTED,
    anytime_factor,
    anytime_interval,
    bootstrap_interval,
    equivalence_p,
    holm,
    interval,
    p_value,
    verdict,
)

DRAWS = dict(normal=lambda rng, size: rng.normal(size=size), heavy_tails=lambda rng, size: rng.standard_t(3, size),
             skewed=lambda rng, size: rng.exponential(size=size) - 1, heavier=lambda rng, size: rng.standard_t(2, size),
             flat=lambda rng, size: rng.uniform(-1, 1, size), steps=lambda rng, size: rng.normal(size=size).round(),
             mixed=lambda rng, size: rng.normal(size=size)*np.where(rng.random(size) < .1, 10, 1))


@pytest.fixture(autouse=True)
def full_where_asked_for(request):
    if request.node.get_closest_marker('slow') and 'slow' not in request.config.option.markexpr: pytest.skip('all repetitions: -m slow')


differences = st.lists(st.integers(-400, 400), min_size=2, max_size=30).map(lambda o: np.array(o)/40.)


def t_values(diffs):
    "Of the first two, three, ... of each row; infinite where all are alike and not 0"
    n = np.arange(2, diffs.shape[1] + 1)
    mean = diffs.cumsum(1)[:, 1:]/n
    var = np.maximum((diffs**2).cumsum(1)[:, 1:] - n*mean**2, 0)/(n - 1)
    with np.errstate(divide='ignore', invalid='ignore'): return n, np.nan_to_num(abs(mean)/np.sqrt(var/n), nan=0.)


def ever_out(name, times, pairs=50, watched_from=2, by='anytime', seed=0):
    "Share of comparisons whose interval has left out the true mean, 0, by each number of pairs if it was watched"
    n, t = t_values(DRAWS[name](np.random.default_rng(seed), (times, pairs)))
    limit = np.array([anytime_factor(o) for o in n]) if by == 'anytime' else stats.t.ppf(.975, n - 1)
    out = np.maximum.accumulate((t > limit) & (n >= watched_from), axis=1).mean(0)
    return dict(zip(n.tolist(), out, strict=True))


times = pytest.mark.parametrize('times', [20_000, pytest.param(100_000, marks=pytest.mark.slow)])


@times
def test_watched_from_the_second_pair_to_the_fiftieth_it_is_wrong_in_at_most_one_case_of_twenty(times):
    out = ever_out('normal', times)
    assert .015 < out[50] < .05, 'below, and not so far below that it was made wide for nothing'


@times
@pytest.mark.parametrize('name', ['heavy_tails', 'heavier', 'flat', 'steps', 'mixed'])
def test_the_same_holds_for_symmetric_differences_that_are_not_normal(name, times): assert ever_out(name, times)[50] < .05


@times
def test_skewed_differences_break_every_promise_and_this_one_least(times):
    ours, students = ever_out('skewed', times)[20], ever_out('skewed', times, watched_from=3, by='t')[20]
    assert .05 < ours < .12 and students > .3


@times
def test_a_watched_t_interval_is_wrong_in_17_to_23_cases_of_a_hundred(times):
    out = ever_out('normal', times, watched_from=3, by='t')
    assert out[3] == pytest.approx(.05, abs=.006) and out[10] == pytest.approx(.17, abs=.01) and out[20] == pytest.approx(.23, abs=.01)


def ratio(t, n):
    "What the anytime-valid interval is made of: how much better a mean that is wagered on tells what was seen"
    r = 1 + n*EXPECTED
    return r**-.5*((1 + t**2/(n - 1))/(1 + t**2/((n - 1)*r)))**(n/2)


@pytest.mark.parametrize('n', [2, 3, 5, 10, 20])
def test_the_ratio_is_that_of_two_t_densities_and_fair(n):
    spread = math.sqrt(EXPECTED)
    for t in (0., .3, 2., 6.):
        def weighted(d, t=t): return stats.nct.pdf(t, n - 1, d*n**.5)*stats.norm.pdf(d, scale=spread)
        wagered = integrate.quad(weighted, -12*spread, 12*spread, limit=300)[0]
        assert ratio(t, n) == pytest.approx(wagered/stats.t.pdf(t, n - 1), rel=1e-6)
    fair = 2*integrate.quad(lambda t: ratio(t, n)*stats.t.pdf(t, n - 1), 0, np.inf, limit=500)[0]
    assert fair == pytest.approx(1, abs=1e-4)


@given(st.integers(2, 200), st.sampled_from([.5, .9, .95, .99]))
def test_the_interval_ends_where_a_mean_has_lost(n, level):
    factor = anytime_factor(n, level)
    if math.isinf(factor): assert ratio(1e9, n) < 1/(1 - level), 'no mean has lost, however far away'
    else: assert ratio(factor, n) == pytest.approx(1/(1 - level), rel=1e-6) and factor > stats.t.ppf((1 + level)/2, n - 1)


@given(differences, st.integers(-100, 100))
def test_the_anytime_interval_moves_and_stretches_with_its_data_and_is_wider_than_t(d, shift):
    low, high = anytime_interval(d)
    assert anytime_interval(d*2 + shift) == pytest.approx((low*2 + shift, high*2 + shift), abs=1e-9)
    assert low <= interval(d)[0] + 1e-9 and interval(d)[1] <= high + 1e-9
    assert (len(d) < 5) == math.isinf(low) == math.isinf(high)
    half = anytime_factor(len(d))*stats.sem(d) if len(d) >= 5 else np.inf
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-9)


def test_one_pair_has_no_anytime_interval(): assert np.isnan([*anytime_interval(np.array([.1])), *anytime_interval(np.array([]))]).all()


def held(name, draw, times):
    "Intervals in a hundred that hold the true mean, for each of `COVERAGE_PAIRS`"
    by = 'anytime' if 'anytime' in name else 't'
    if 'watched' in name:
        out = ever_out(draw, times, max(COVERAGE_PAIRS), 3, by, seed=1)
        return [100*(1 - out[n]) for n in COVERAGE_PAIRS]
    n, t = t_values(DRAWS[draw](np.random.default_rng(1), (times, max(COVERAGE_PAIRS))))
    return (100*(t <= stats.t.ppf(.975, n - 1)).mean(0))[np.isin(n, COVERAGE_PAIRS)]


@pytest.mark.parametrize('times,off', [(20_000, 1.2), pytest.param(100_000, .7, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name,draw', [(k, o) for k, by in COVERAGE.items() for o in by if k != 'bootstrap'])
def test_reports_tell_how_often_an_interval_holds_the_truth(name, draw, times, off):
    told, found = COVERAGE[name][draw], held(name, draw, times)
    assert [o is None for o in told] == [('anytime' in name and n < 5) for n in COVERAGE_PAIRS]
    assert max(abs(a - b) for a, b in zip(told, found, strict=True) if a is not None) < off


@pytest.mark.parametrize('times,off', [(200, 7.), pytest.param(4_000, 1.8, marks=pytest.mark.slow)])
@pytest.mark.parametrize('draw', COVERAGE['bootstrap'])
def test_and_how_often_a_bootstrap_does(draw, times, off):
    for n, told in zip(COVERAGE_PAIRS, COVERAGE['bootstrap'][draw], strict=True):
        assert (told is None) == (n < BOOTSTRAP_FROM)
        if told is None: continue
        found = [low <= 0 <= high for low, high in map(bootstrap_interval, DRAWS[draw](np.random.default_rng(7), (times, n)))]
        assert abs(100*np.mean(found) - told) < off


@settings(deadline=None)
@given(differences, st.floats(.01, 12))
def test_equivalence_is_that_of_statsmodels_and_of_the_90_percent_interval(d, margin):
    assume(np.ptp(d) > 0)
    p, (low, high) = equivalence_p(d, margin), interval(d, .9)
    assert p == pytest.approx(ttost_paired(d, np.zeros_like(d), -margin, margin)[0], abs=1e-12)
    sides = [stats.ttest_1samp(d, edge, alternative=way).pvalue for edge, way in ((-margin, 'greater'), (margin, 'less'))]
    assert p == pytest.approx(max(sides), abs=1e-9)
    assume(abs(p - .05) > 1e-9)
    assert (p < .05) == (-margin < low and high < margin)


def test_too_few_or_equal_differences_have_no_test_of_equivalence():
    for d in ([], [.1], [.1, .1, .1]): assert np.isnan(equivalence_p(np.array(d), 1.))
    assert verdict(np.nan, np.nan) == verdict(.01, np.nan) == ''


@pytest.mark.parametrize('difference,equivalence,want', [
    (.2, .2, 'neither shown'), (.2, .01, 'equivalent'), (.01, .2, 'different'), (.01, .01, 'different, within the margin'),
    (.05, .05, 'neither shown')])
def test_a_verdict_says_what_was_shown(difference, equivalence, want): assert verdict(difference, equivalence) == want


def share(said, words): return np.mean([words in o for o in said])


@pytest.mark.parametrize('times', [1_500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('n', [5, 20])
def test_verdicts_are_wrong_in_one_case_of_twenty(n, times):
    rng = np.random.default_rng(3)
    def verdicts(mean): return [verdict(p_value(d), equivalence_p(d, .5)) for d in rng.normal(mean, .5, (times, n))]
    slack = 4*(.05*.95/times)**.5
    equal, edge = verdicts(0.), verdicts(.5)
    assert share(equal, 'different') < .05 + slack, 'there is no difference'
    assert share(edge, 'equivalent') < .05 + slack and share(edge, 'within') < .05 + slack, 'the difference is not within the margin'
    assert share(equal, 'equivalent') > (.9 if n == 20 else .2) and share(edge, 'different') > (.9 if n == 20 else .2), 'and often right'


@pytest.mark.parametrize('times', [400, pytest.param(5_000, marks=pytest.mark.slow)])
def test_of_many_arms_none_is_called_equivalent_by_chance(times):
    rng = np.random.default_rng(4)
    ps = np.array([[equivalence_p(d, .5) for d in arms] for arms in rng.normal(.5, .5, (times, 5, 10))])
    for o in ps[:3]: assert holm(o).min() == pytest.approx(min(1, 5*o.min())), 'so that counting does not take minutes'
    corrected = (5*ps.min(1) < .05).mean()
    assert corrected < .05 + 4*(.05*.95/times)**.5 < .15 < (ps.min(1) < .05).mean()
