"What a training found: read, kept, matched with other networks, started from, compared, searched for, and judged."
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import make, quiet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from learned_relu.act_layer import ActLayer
from learned_relu.all import EMAActParams, GeneralRelu, LearnedRelu, act_layers, act_params, harvest, load_profile, patch_relus, save_profile
from learned_relu.bench import launch
from learned_relu.bench.arms import Arm
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.commands.harvest import learned_relu_harvest
from learned_relu.bench.data import Source
from learned_relu.bench.pairs import check_pairs
from learned_relu.bench.recipe import Recipe, read_recipe
from learned_relu.bench.record import read_records
from learned_relu.bench.search import search
from learned_relu.bench.stability import agreement, layer_moves, reset_effects, stability
from learned_relu.profile import KINDS, Found, Profile, as_profile, reset_profile
from learned_relu.xresnet import plain_xresnet

TINY = Recipe(size=8, bs=2000, widen=.125)
numbers = st.floats(-1e6, 1e6)
layers = st.dictionaries(st.text(min_size=1, max_size=9), st.fixed_dictionaries({k: numbers for k in KINDS}), min_size=1, max_size=6)


def some(n=3, **origin): return Profile({f'{i}.act': dict(leak=.1*i, sub=.2 + .1*i, maxv=10. - i) for i in range(n)}, origin)


@pytest.fixture
def file(tmp_path): return save_profile(some(), tmp_path/'some.json')


# the file

@given(layers=layers)
def test_a_profile_is_read_as_it_was_written(layers, tmp_path_factory):
    made = Profile(layers, dict(data='mnist', seeds=[1, 2]))
    again = load_profile(save_profile(made, tmp_path_factory.mktemp('p')/'p.json'))
    assert again.layers == made.layers and list(again.layers) == list(layers) and again.origin == made.origin
    assert again.digest() == made.digest() and re.fullmatch('[0-9a-f]{8}', made.digest())


def test_the_digest_is_that_of_the_values():
    spread = Profile({n: {k: Found(v.mean, 1., 2.) for k, v in o.items()} for n, o in some().layers.items()}, dict(other=1))
    assert spread.digest() == some().digest() != some(4).digest() != reset_profile(some(4), kinds='sub').digest()


@pytest.mark.parametrize('text,words', [
    ('{', 'is no JSON'), ('[]', 'is no profile of format 1'), ('{"format": 2, "layers": {}}', 'is no profile of format 1'),
    ('{"format": 1, "layers": {}}', 'layers is empty'), ('{"format": 1, "layers": {"0": {"leak": 1}}}', 'pass leak, sub and maxv'),
    ('{"format": 1, "layers": {"0": {"leak": NaN, "sub": 0, "maxv": 1}}}', 'leak of layer .0. is nan'),
    ('{"format": 1, "layers": {"0": {"leak": {"value": 1}, "sub": 0, "maxv": 1}}}', 'some.json')])
def test_files_that_hold_no_profile(text, words, file):
    file.write_text(text)
    with pytest.raises(ValueError, match=words): load_profile(file)


def test_nothing_finished_is_written_over(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match='holds something else'): save_profile(some(2), file)
    assert file.read_bytes() == before and save_profile(some(), file) == file
    with pytest.raises(ValueError, match='cannot be written'): save_profile(some(), file/'below')
    with pytest.raises(ValueError, match='cannot be written'): save_profile(some(), file.parent)
    with pytest.raises(TypeError, match='values is a dict'): as_profile({})


# harvest

def test_harvest_is_mean_and_spread_over_channels_and_runs():
    models = [nn.Sequential(nn.Linear(2, 3), LearnedRelu(3, leak=torch.tensor([.1, .2, .6])*s, sub=.1*s, maxv=5.)) for s in (1, 2)]
    models[0].train(); models[1].eval()
    leak = harvest(models).layers['1']['leak']
    assert leak.mean == pytest.approx(.45) and leak.runs == pytest.approx(np.std([.3, .6], ddof=1))
    assert leak.channels == pytest.approx(np.mean([np.std([.1, .2, .6]), np.std([.2, .4, 1.2])]))
    assert harvest(models[0]).layers['1']['sub'] == (pytest.approx(.1), pytest.approx(0, abs=1e-8), None)
    assert harvest(nn.DataParallel(models[0])).values() == harvest(models[0]).values()


@pytest.mark.parametrize('training', [True, False])
def test_averages_are_what_counts_where_there_are_any(training):
    learn = make(EMAActParams(.9), lr=.05)
    before = harvest(learn.model).values()
    with quiet(learn): learn.fit(1)
    learn.model.train(training)
    found = harvest(learn.model).values()
    for n, m in act_layers(learn.model).items():
        for k in KINDS: assert found[n][k] == pytest.approx(getattr(m, f'{k}_avg').double().mean().item(), abs=1e-12)
    assert found != before and found['1']['leak'] != pytest.approx(learn.model[1].leak.mean().item(), abs=1e-6)


def record(seed, arm='learned', digest='abc', shift=0., **more):
    means = {f'{n}.{k}': dict(mean=.1*i + seed + shift, std=.5) for i, (n, k) in enumerate((n, k) for n in ('0', '1.act') for k in KINDS)}
    return dict(arm=arm, seed=seed, digest=digest, data=dict(name='d'), commit='c', recipe={}, activation=means, fixed={}) | more


def test_harvest_of_records():
    found = harvest([record(0), record(4)])
    assert list(found.layers) == ['0', '1.act'] and found.layers['0']['leak'] == (2., .5, pytest.approx(8**.5))
    assert found.origin == dict(arm='learned', digest='abc', data='d', seeds=[0, 4], commits=['c'], recipe={})
    assert harvest(record(0, averaged=record(0, shift=7.)['activation'])).values()['0']['leak'] == 7.
    only_sub = record(0, activation={'0.sub': dict(mean=.3, std=0.)}, fixed=dict(leak=.05, maxv=10.))
    assert harvest(only_sub).values() == {'0': dict(leak=.05, sub=.3, maxv=10.)}
    only_sub['profile'] = dict(layers={'0': dict(leak=.2, sub=.1, maxv=8.)}) # what the others stand at
    assert harvest(only_sub).values() == {'0': dict(leak=.2, sub=.3, maxv=8.)}


@pytest.mark.parametrize('given,error,words', [
    ([record(0), record(1, digest='d')], ValueError, 'records are of learned .recipe abc., learned .recipe d.'),
    ([record(0), record(0)], ValueError, 'one seed twice'), ([record(0, activation={})], ValueError, 'has no layer with leak'),
    ([], TypeError, 'pass models'), ([record(0), nn.ReLU()], TypeError, 'pass models'), (3, TypeError, 'pass models'),
    (nn.Linear(1, 1), ValueError, 'has no layer with leak'),
    ([nn.Sequential(LearnedRelu()), nn.Sequential(nn.Identity(), LearnedRelu())], ValueError, 'different layers')])
def test_what_cannot_be_harvested(given, error, words):
    with pytest.raises(error, match=words): harvest(given)


# starting from it

class Calls(nn.Module):
    "One ReLU called twice, and one that is a function"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU()
    def forward(self, x): return torch.relu(self.act(self.b(self.act(self.a(x)))) - .1)


@pytest.mark.parametrize('layer,per_channel', [(LearnedRelu, True), (LearnedRelu, False), (GeneralRelu, True), (GeneralRelu, False)])
def test_every_curve_starts_from_the_layer_of_its_name(layer, per_channel):
    x, donor, model = torch.randn(7, 4), Calls(), Calls()
    patch_relus(donor, x)
    with torch.no_grad():
        for i, o in enumerate(act_params(donor)): o.param.fill_(.01 + i/64) # which float32 holds
    found = harvest(donor)
    report = patch_relus(model, x, layer, per_channel, values=found)
    assert len(found) == 3 and harvest(model).values() == found.values() and 'layer of its name' in report.notes[-1]
    assert all(getattr(m, k).unique().numel() == 1 for m in model.modules() if isinstance(m, ActLayer) for k in KINDS)


@given(have=st.integers(1, 30), want=st.integers(1, 30))
def test_other_networks_are_matched_by_depth(have, want):
    starts, said = some(have).matched([f'other{i}' for i in range(want)])
    leak = [o['leak'] for o in starts]
    ends = [o['leak'] for o in some(have).values().values()]
    assert len(starts) == want and leak == sorted(leak) and f'{want} curves' in said and 'by their depth' in said
    if want > 1: assert (leak[0], leak[-1]) == (ends[0], pytest.approx(ends[-1]))
    if want == have > 1: assert leak == pytest.approx(ends)


def test_a_name_alone_does_not_make_the_same_network():
    starts, said = some(3).matched(['0.act', '9.act', '2.act', '3.act'])
    assert 'by their depth, since 2 of' in said and [o['leak'] for o in starts] == pytest.approx([0., .2/3, .4/3, .2])
    assert some(3).matched([['shared', '1.act']])[0] == [some(3).values()['1.act']]


def test_a_dry_run_says_it_and_changes_nothing(file):
    model = plain_xresnet('xresnet18', 3, c_in=1, widen=.25)
    report = patch_relus(model, torch.randn(2, 1, 16, 16), values=str(file), dry_run=True)
    assert '19 curves start from the 3 layers' in report.notes[-1] and not act_layers(model)
    patch_relus(model, torch.randn(2, 1, 16, 16), values=str(file), fuse_bn=True)
    assert [harvest(model).values()['0.2'][k] for k in KINDS] == pytest.approx([some().values()['0.act'][k] for k in KINDS])


@pytest.mark.parametrize('kwargs,error,words', [
    (dict(init='same'), ValueError, 'so does init'), (dict(leak=.1), ValueError, 'so does leak'), (dict(layer=nn.SiLU), ValueError, 'SiLU is none'),
    (dict(values=3), TypeError, 'values is a int'), (dict(values='nowhere.json'), ValueError, 'cannot be read')])
def test_starts_that_contradict(kwargs, error, words):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(error, match=words): patch_relus(model, torch.randn(2, 4), **dict(values=some()) | kwargs)
    assert isinstance(model[1], nn.ReLU)


def test_a_learner_starts_from_it_within_its_bounds(file):
    learn = make(layer=lambda n: nn.ReLU())
    with pytest.raises(ValueError, match='1.leak starts between 0.9 and 0.9, outside its bounds'):
        learn.to_learned_relu(values=Profile({'1': dict(leak=.9, sub=0., maxv=10.)}))
    assert not act_layers(learn.model)
    learn.to_learned_relu(values=file)
    assert harvest(learn.model).values()['3']['sub'] == pytest.approx(.4)
    with quiet(learn): learn.fit(1)


# arms

def test_an_arm_is_named_by_the_values_of_its_file(file, tmp_path):
    other = save_profile(some(note='from elsewhere'), tmp_path/'other.json')
    arms = [Arm(f'profile:{o}') for o in (file, other)] + [Arm(f'learned:{file}+averages+freeze')]
    assert [o.name for o in arms] == [f'profile-{some().digest()}']*2 + [f'learned-{some().digest()}+averages+freeze']
    assert arms[0].patch['layer'] is GeneralRelu and not arms[0].learns and arms[2].learns and len(arms[2].callbacks) == 4


@pytest.mark.parametrize('arm,words', [
    ('profile', 'say which'), ('relu:leak=.1', 'leave out what follows'), ('clip:leak=.1', 'leave out'), ('learned_from_relu:leak=.1', 'leave out'),
    ('general:leak=x', 'after the colon'), ('general:leak=nan', 'after the colon'), ('general:gain=1', 'after the colon'),
    ('general:nowhere.json', 'cannot be read'), ('torch.nn.ELU:leak=.1', 'leave out'), ('profile:x.json+freeze', 'cannot be read')])
def test_starts_of_arms_that_cannot_be(arm, words):
    with pytest.raises(ValueError, match=words): Arm(arm)


def test_a_recipe_names_its_profile(file, tmp_path):
    recipe = tmp_path/'mine.toml'
    recipe.write_text('size = 8\nprofile = "some.json"\narms = ["relu", "profile"]')
    plan = read_recipe(recipe)
    assert [Arm(plan.named(o)).name for o in plan.arms] == ['relu', f'profile-{some().digest()}'] and plan.named('general') == 'general'
    (tmp_path/'below.toml').write_text('base = "mine.toml"\nsize = 16')
    assert read_recipe(tmp_path/'below.toml').profile == plan.profile
    recipe.write_text('profile = 3')
    with pytest.raises(TypeError, match='mine.toml: profile is 3'): read_recipe(recipe)


def test_a_comparison_learns_harvests_and_bakes(tmp_path, capsys):
    small = dict(size=8, bs=2000, widen=.125, epochs=1, seeds=2, out=str(tmp_path/'out'))
    learned_relu_compare(arms='relu,learned+averages', **small)
    learned_relu_harvest(str(tmp_path/'out'), str(tmp_path/'found.json'), arm='learned+averages')
    found = load_profile(tmp_path/'found.json')
    (records,), _ = (list(o.values()) if isinstance(o, dict) else o for o in read_records(tmp_path/'out'))
    learned = [r for r in records if r['arm'] == 'learned+averages']
    assert found.values() == harvest(learned).values() and found.origin['seeds'] == [0, 1]
    assert found.layers['0.2']['leak'].mean == pytest.approx(np.mean([r['averaged']['0.2.leak']['mean'] for r in learned]))
    capsys.readouterr()
    learned_relu_compare(arms=f'relu,profile:{tmp_path/"found.json"}', **small)
    name = f'profile-{found.digest()}'
    (records,), _ = (list(o.values()) if isinstance(o, dict) else o for o in read_records(tmp_path/'out'))
    baked = [r for r in records if r['arm'] == name]
    check_pairs(records)
    assert len(baked) == 2 and all(Profile(r['profile']['layers']).digest() == found.digest() and r['activation'] == {} for r in baked)
    assert not [o for o in (tmp_path/'out/records').iterdir() if str(tmp_path) in o.read_text()] # no path of this machine
    assert name in (tmp_path/'out/report.html').read_text() and name in capsys.readouterr().out
    with pytest.raises(SystemExit, match='has no run with seed 7'): learned_relu_harvest(str(tmp_path/'out'), arm='learned+averages', seeds='0,7')


# searching

def test_a_search_goes_on_where_it_was_broken_off(tmp_path, monkeypatch, capsys):
    source, made = Source('mnist', 8), []
    run = partial(search, 'learned_from_relu+freeze', [5, 6], source, Recipe(size=8, bs=1000, widen=.125, lr=.05), rounds=2)
    whole = run(tmp_path/'whole')
    real = launch.train_run
    def breaks(*args, **kwargs):
        made.append(args[0].name)
        if len(made) == 4: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(launch, 'train_run', breaks)
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'parts')
    again = run(tmp_path/'parts')
    assert len(whole) == 2 and len(made) == 5 and [o['profile'].values() for o in again] == [o['profile'].values() for o in whole]
    first = whole[0]['profile']
    assert whole[1]['arm'] == f'learned-{first.digest()}+freeze' == made[-1]
    assert whole[0]['movement']['leak'][0] == pytest.approx(np.sqrt(np.mean([o['leak'].mean**2 for o in first.layers.values()])))
    assert [o.name for o in sorted((tmp_path/'parts/profiles').iterdir())] == ['round-1.json', 'round-2.json']


def test_a_search_ends_when_the_profile_has_settled(tmp_path, capsys):
    done = search('learned', [0, 1], Source('mnist', 8), Recipe(size=8, bs=4000, widen=.125, lr=1e-5), tmp_path)
    assert len(done) == 1 and 'round 1 moved' in capsys.readouterr().out


def test_a_search_goes_on_from_the_profile_of_another_network(file, tmp_path, capsys):
    (done,) = search(f'learned:{file}', [0, 1], Source('mnist', 8), Recipe(size=8, bs=4000, widen=.125, lr=1e-5), tmp_path/'out')
    assert len(done['profile']) == 19 and done['movement']['leak'][0] < 1e-3 # from where each layer started, by its depth


@pytest.mark.parametrize('args,words', [(('learned', [1]), 'pass two at least'), (('general', [0, 1]), 'does not learn leak'),
                                        (('clip', [0, 1]), 'does not learn leak'), (('rellu', [0, 1]), "arm is 'rellu'")])
def test_searches_that_cannot_be(args, words, tmp_path):
    with pytest.raises(ValueError, match=words): search(*args, Source('mnist', 8), TINY, tmp_path/'out')
    assert not (tmp_path/'out').exists()


# judging

def test_the_interval_of_agreement_holds_what_it_says():
    rng = np.random.default_rng(0)
    for layers, runs, noise in (19, 3, .5), (8, 5, 1.), (51, 2, .2):
        true = 1/(1 + noise**2)
        def once(): return agreement(rng.normal(size=layers) + noise*rng.normal(size=(runs, layers)) + rng.normal(size=(runs, 1)))
        found = np.array([once() for _ in range(600)])
        held = ((found[:, 1] <= true) & (true <= found[:, 2])).mean()
        assert .93 < held < .97 and found[:, 0].mean() == pytest.approx(true, abs=.05)


def test_stability_and_moves_of_the_records_kept_here():
    folder = Path(__file__).parents[1]/'benchmarks/records/accuracy/2026-11-21-imagewoof-64px-5ep-xresnet18'
    records = [r for rs in read_records(folder)[0].values() for r in rs if r['arm'] == 'learned']
    by_kind = stability(records).set_index('kind')
    wide = np.array([[r['activation'][f'{n}.leak']['mean'] for n in harvest(records).layers] for r in records])
    assert by_kind.agreement['leak'] == pytest.approx(agreement(wide)[0]) and by_kind.low['leak'] > .8
    assert by_kind.spread['leak'] == pytest.approx(np.sqrt(wide.var(0, ddof=1).mean()))
    found = layer_moves(records).set_index(['layer', 'kind'])
    assert len(found) == 57 and found.loc[('7.1.act', 'leak'), 'high'] < 0
    assert found.loc[('7.1.act', 'leak'), 'value'] == pytest.approx(harvest(records).values()['7.1.act']['leak'])


def test_resetting_leaves_the_model_as_it_was(monkeypatch):
    learn = make(EMAActParams(), lr=.05)
    with quiet(learn): learn.fit(1)
    before = [t.clone() for t in learn.model.state_dict().values()]
    found = reset_effects(learn)
    whole = float(learn.validate()[0])
    assert found.layer.tolist() == ['1', '3'] and (found.added.abs() > 0).all() and (found.loss - found.added).to_numpy() == pytest.approx(whole)
    real, calls = learn.validate, []
    def breaks():
        calls.append(1)
        if len(calls) == 2: raise RuntimeError('no')
        return real()
    monkeypatch.setattr(learn, 'validate', breaks)
    with pytest.raises(RuntimeError): reset_effects(learn, by='kind')
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="by is 'channel'"): reset_effects(learn, by='channel')


def test_a_profile_without_a_kind():
    without = reset_profile(some(), '*', 'leak')
    assert {o['leak'] for o in without.values().values()} == {.05} and [o['sub'] for o in without.values().values()] == pytest.approx([.2, .3, .4])
    assert reset_profile(some(), '0.*').values() | {'0.act': None} == some().values() | {'0.act': None}
    assert without.origin['reset'] == [['*', ['leak']]] and json.dumps(without.origin)
    with pytest.raises(ValueError, match='matches none'): reset_profile(some(), 'x')
    with pytest.raises(ValueError, match='kinds is'): reset_profile(some(), kinds=('gain',))


def test_a_table_of_numbers_for_who_reads():
    text = repr(harvest([record(0), record(4)]))
    assert text.startswith('Profile of 2 layers (arm learned, digest abc, data d)') and '2 ± 2.8' in text
    assert isinstance(stability([record(0), record(1)]), pd.DataFrame)
