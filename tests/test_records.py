"Records from elsewhere: whatever a file holds, it is a sentence that names it, or a table as any other."
import json
import math
import shutil
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_relu.bench.commands.report import learned_relu_report
from learned_relu.bench.recipe import Recipe, planned, read_recipe
from learned_relu.bench.record import read_record, read_records, read_runs, record_name, write_record
from learned_relu.bench.report import report_page
from learned_relu.bench.table import readable, table
from learned_relu.profile import load_profile

RECORDS = Path(__file__).parents[1]/'benchmarks'/'records'/'accuracy'
FOLDER = RECORDS/'2026-11-26-digits-small'
RECIPES = RECORDS.parents[1]/'recipes'
ODD = [None, True, -1, 0, 1, 1.5, 1e300, 10**400, math.nan, math.inf, '', 'x', '../../x', '/tmp/x', '$x_1$', '<b>', '=1+1', 'a\nb', '\x1b[2J',
       'ä'*300, 'm.' + 'Ä'*100, [], ['x'], [[]], {}, {'x': {}}]
GONE = object()


def records(n=2):
    "Runs of two arms with the same seeds, as their files hold them"
    return [json.loads(o.read_text()) for arm in ('learned', 'general') for o in sorted(FOLDER.glob(f'records/{arm}-*.json'))[:n]]


def places(o, at=()):
    "Where something can be changed: each field, and the first of each list"
    inside = o.items() if isinstance(o, dict) else enumerate(o[:1]) if isinstance(o, list) else ()
    for k, v in inside:
        yield (*at, k)
        yield from places(v, (*at, k))


def changed(record, at, to):
    "A copy with another value, or none, at a place"
    record = json.loads(json.dumps(record))
    inner = record
    for k in at[:-1]: inner = inner[k]
    if to is GONE: del inner[at[-1]]
    else: inner[at[-1]] = to
    return record


def file_of(record, folder):
    "The file that a record says it is, whatever it says"
    (folder/'records').mkdir(exist_ok=True)
    try: name = record_name(record['arm'], record['seed'], record['digest'])
    except Exception: name = 'x.json'
    file = folder/'records'/(name if '/' not in name and '\0' not in name else 'x.json')
    file.write_text(json.dumps(record))
    return file


@pytest.mark.parametrize('every', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_record_with_any_field_changed_is_refused_in_a_sentence_or_makes_a_table(every, tmp_path, record_property):
    (first, *others), taken = records(), []
    few = *list(first['activation'])[:1], 'step', 'mean', 'layer'  # of many that are alike
    at = [o for o in places(first) if o[0] not in ('activation', 'telemetry') or len(o) < 2 or o[1] in few]
    cases = [(where, to) for where in at for to in (GONE, *ODD)][::every]
    for where, to in cases:
        file = file_of(changed(first, where, to), tmp_path)
        try: taken.append((where, to, read_record(file)))
        except ValueError as e: assert 'json' in str(e) and len(str(e)) < 1000 and str(e).isprintable(), (where, to)
        file.unlink()
    record_property('tried: a record, profile or recipe changed', len(cases))
    assert len(cases) > 2000/every and len(taken) < len(cases)/2
    for where, to, record in taken[::every]:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            try: assert len(readable(table([record, *others]))) == 2 + (record['arm'] not in ('learned', 'general')), (where, to)
            except ValueError as e: assert 'no pair' in str(e) or 'declare' in str(e), (where, to, e)


@pytest.mark.parametrize('every', [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_profile_with_anything_changed_is_refused_in_a_sentence_or_read(every, tmp_path, record_property):
    whole, file, tried = json.loads((RECORDS/'2026-11-26-digits-mlp-search'/'profiles'/'round-1.json').read_text()), tmp_path/'p.json', 0
    for at, to in [(at, to) for at in places(whole) for to in (GONE, *ODD)][::every]:
        file.write_text(json.dumps(changed(whole, at, to)))
        tried += 1
        try: assert all(math.isfinite(v) for o in load_profile(file).values().values() for v in o.values()), (at, to)
        except ValueError as e: assert 'p.json' in str(e), (at, to)
    record_property('tried: a record, profile or recipe changed', tried)
    assert tried > 1900/every


@pytest.mark.parametrize('every', [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_recipe_with_anything_changed_is_refused_in_a_sentence_or_read(every, tmp_path, record_property):
    names, file = [o.name for o in fields(Recipe)], tmp_path/'r.toml'
    names += 'launcher profile base arms seeds margin measures other'.split()
    all_ = [dict(read_recipe(o).recipe) for o in sorted(RECIPES.glob('*.toml'))]
    cases = [(recipe, k, to) for recipe in all_ for k in names for to in ODD if to is not None][::every]
    for recipe, k, to in cases:
        file.write_text(tomli_w.dumps(recipe | {k: to}))
        try: assert isinstance(planned(file, {})[0], Recipe)
        except (TypeError, ValueError) as e: assert 'r.toml' in str(e) or k == 'base', (k, to)
    record_property('tried: a record, profile or recipe changed', len(cases))
    assert len(cases) > 5000/every


@pytest.mark.tried('a record, profile or recipe changed')
@pytest.mark.parametrize('read,name,text', [(load_profile, 'p.json', '['*100_000), (read_recipe, 'r.toml', 'a = ' + '['*100_000)])
def test_what_is_too_deep_is_refused(read, name, text, tmp_path):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=name): read(tmp_path/name)


@pytest.mark.tried('a hostile name')
def test_a_digest_leads_nowhere(tmp_path):
    for i, digest in enumerate(('../../out', str(tmp_path/'elsewhere'), '..', 'a/b')):
        folder = tmp_path/'runs'/f'{i}'
        (folder/'records').mkdir(parents=True)
        for j, o in enumerate(records()): (folder/'records'/f'{j}.json').write_text(json.dumps(o | dict(digest=digest)))
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit): learned_relu_report(tmp_path/'runs', out=tmp_path/'page')
    assert [o for o in sorted(tmp_path.rglob('*')) if o not in before and tmp_path/'page' not in (o, *o.parents)] == []
    assert not list((tmp_path/'page').rglob('table.csv'))


PLAIN = st.none() | st.booleans() | st.floats() | st.integers() | st.text()


@pytest.mark.tried('a record, profile or recipe changed', 300)
@settings(max_examples=150, deadline=None)
@given(st.recursive(PLAIN, lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=8))
def test_anything_that_is_json_is_refused_in_a_sentence(tmp_path_factory, found):
    file = tmp_path_factory.getbasetemp()/'any.json'
    for o in (found, dict(format=1, any=found)):
        file.write_text(json.dumps(o))
        with pytest.raises(ValueError, match=r'any\.json'): read_record(file)


@pytest.mark.tried('a record, profile or recipe changed', 300)
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 10**9))
def test_a_file_that_is_cut_or_overwritten_is_refused(tmp_path_factory, junk, at):
    file, whole = tmp_path_factory.getbasetemp()/'any.json', next(FOLDER.glob('records/*.json')).read_bytes()
    for text in (whole[:at % len(whole)], junk, whole[:at % len(whole)] + junk):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r'any\.json'): read_record(file)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path/'records').mkdir()
    (tmp_path/'records'/'deep.json').write_text('['*100_000)
    (tmp_path/'records'/'folder.json').mkdir()
    (tmp_path/'records'/'wide.json').write_text('{"format": 1, "seed": %s}' % ('9'*5000))
    by_digest, wrong = read_records(tmp_path)
    assert not by_digest and [o.split(': ')[1].split()[0] for o in wrong] == ['deep.json', 'folder.json', 'wide.json']


def test_a_run_that_diverged_is_json_and_makes_a_page(tmp_path):
    first, *others = records()
    ended = {k: dict(v, mean=math.nan) for k, v in first['activation'].items()}
    gone = first | dict(train_loss=[math.nan]*6, valid_loss=[math.inf]*6, activation=ended)
    (tmp_path/'records').mkdir()
    file = write_record(gone, tmp_path/'records')
    json.loads(file.read_text(), parse_constant=lambda o: pytest.fail(o))
    back = read_record(file)
    assert all(map(math.isnan, back['valid_loss'] + back['train_loss']))
    page = report_page([back, *others])
    assert 'learned' in page and page.count('<img alt="') > 3


def test_a_copy_is_no_pair_more(tmp_path):
    shutil.copytree(FOLDER/'records', tmp_path/'records')
    one = next((tmp_path/'records').glob('learned-seed0-*'))
    digest = json.loads(one.read_text())['digest']
    other = one.with_name(one.name.replace('learned', 'learned_'))
    shutil.copy(one, other)
    n, (wrong,) = len(read_records(FOLDER)[0][digest]), read_records(tmp_path)[1]
    assert len(read_records(tmp_path)[0][digest]) == n and f'call it {one.name}' in wrong
    with pytest.raises(ValueError, match=f'{other.name} holds the run of learned, seed 0'): read_runs(tmp_path, digest)
    one.write_text(other.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match='holds the run of learned, seed 1'): read_record(one)


def test_every_record_of_this_repository_is_one():
    wrong = [o for folder in RECORDS.iterdir() if folder.is_dir() for o in read_records(folder)[1]]
    assert wrong == []


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_two_arms_have_two_files(a, b):
    names = {record_name(o, 0, '0'*8) for o in {a, b} if len(o.encode()) < 60}
    assert len(names) == len({o for o in {a, b} if len(o.encode()) < 60}) and not any(set(o) & set('/\\:*?"<>|\0\n') for o in names)
