"The table by hand."
import numpy as np
import pytest
from scipy import stats

from learned_relu.bench.figures import plot_pairs, plot_params
from learned_relu.bench.report import report_page
from learned_relu.bench.stats import interval, paired
from learned_relu.bench.table import readable, table


def record(arm, seed, acc, seconds=1., pair='same'):
    return dict(arm=arm, seed=seed, accuracy=[.1, acc], seconds_per_epoch=seconds, pair=f'{pair}-{seed}', data=dict(name='<data>', fingerprint='f'),
                recipe=dict(arch='xresnet18', size=28, epochs=2), versions=dict(torch='2'), hardware=dict(device='cpu', threads=2), commit=None)


RECORDS = [record('relu', 0, .50, 1.), record('relu', 1, .60, 2.), record('relu', 2, .58, 4.),
           record('learned', 0, .52, 3.), record('learned', 1, .61, 2.2), record('learned', 2, .61, 4.8)]


def test_means_spreads_pairs_and_times():
    t = table(RECORDS).set_index('arm')
    assert t.n.tolist() == [3, 3] and t.accuracy.tolist() == pytest.approx([56, 58])
    assert t['std'].tolist() == pytest.approx([((36 + 16 + 4)/2)**.5, ((36 + 9 + 9)/2)**.5])
    d = np.array([2., 1., 3.])
    half = stats.t.ppf(.975, 2)*d.std(ddof=1)/3**.5
    assert t.loc['learned', ['vs relu', 'vs relu low', 'vs relu high']].tolist() == pytest.approx([2, 2 - half, 2 + half])
    assert t.loc['learned', 'time ratio'] == pytest.approx(1.2) and t.loc['learned', 'vs relu n'] == 3
    assert np.isnan(t.loc['relu', 'vs relu']) and np.isnan(t.loc['learned', 'vs general'])


def test_runs_that_began_otherwise_are_no_pair():
    others = [*RECORDS[:5], record('learned', 2, .99, pair='other')]
    assert paired(others, 'learned', 'relu') == pytest.approx([.02, .01])


def test_one_pair_has_no_interval():
    assert np.isnan(interval(np.array([.1]))).all() and interval(np.array([.1, .1])) == (.1, .1)
    text = readable(table([RECORDS[0], RECORDS[3]])).set_index('arm')
    assert text.loc['learned', 'vs relu [95 %]'] == '+2.00' and text.loc['relu', 'std'] == '-'


def test_a_page_without_pairs_or_telemetry_and_with_strange_names():
    page = report_page(RECORDS[3:])
    assert plot_pairs(RECORDS[3:]) is None and plot_params(RECORDS[3]) is None
    assert '&lt;data&gt;' in page and '<data>' not in page and page.count('<img alt="') == 1
