"Recipe files: what they may say, and that the boards are what their names say."
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastcore.nbio import read_nb
from torch.nn.modules.batchnorm import _BatchNorm

from learned_relu.bench.arms import Arm, arms
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.recipe import Recipe, _later, planned, read_recipe
from learned_relu.bench.record import read_record
from learned_relu.bench.run import arm_model

RECIPES = Path(__file__).resolve().parents[1]/'benchmarks'/'recipes'
BOARDS = [(d, s, e) for d in ('imagenette', 'imagewoof') for s in (128, 192, 256) for e in (5, 20, 80, 200)]


@pytest.mark.parametrize('file', sorted(RECIPES.glob('*.toml')), ids=lambda o: o.stem)
def test_every_recipe_names_what_there_is(file):
    plan = read_recipe(file)
    Recipe(**plan.recipe)
    for o in plan.arms: Arm(o)


@pytest.mark.parametrize('data,size,epochs', BOARDS)
def test_a_board_is_what_its_name_says(data, size, epochs):
    file = RECIPES/('published.toml' if epochs < 80 else 'published-mixup.toml')
    how, plan = planned(file, dict(data=data, size=size, epochs=epochs))
    short = read_recipe(file).recipe
    assert (short['data'], short['size'], short['epochs']) in BOARDS, 'without options it is a board, too'
    assert (how.data, how.size, how.epochs, how.source) == (data, size, epochs, '') and plan.seeds == 5
    assert (how.arch, how.opt, how.lr, how.mom, how.sqrmom, how.eps, how.bs, how.wd) == ('xse_resnext50', 'ranger', 8e-3, .95, .99, 1e-6, 64, .01)
    assert (how.schedule, how.smoothing, how.sa, how.pool) == ('flat_cos', .1, True, 'MaxPool')
    assert (how.mixup > 0) == (epochs >= 80)


def test_the_arms_that_separate_the_causes_are_all_there():
    plan = read_recipe(RECIPES/'causes.toml')
    both = [f'{o}{x}' for o in ('learned', 'learned_scalar') for x in ('', '+averages', '+freeze', '+averages+freeze')]
    assert {'relu', 'leaky', 'general', 'prelu', 'silu', 'mish', 'learned_from_relu', 'learned_no_leak', 'learned_no_sub',
            'learned_no_maxv', *both} <= set(plan.arms)


def test_the_optimizer_and_the_loss_get_what_the_recipe_says():
    how = Recipe(opt='ranger', schedule='flat_cos', mom=.9, sqrmom=.98, eps=1e-4, beta=.5, smoothing=.2)
    assert how.opt_func().keywords == dict(mom=.9, sqr_mom=.98, eps=1e-4, beta=.5)
    assert Recipe().opt_func().keywords == {} and Recipe(opt='sgd', schedule='flat_cos', mom=0.).opt_func().keywords == dict(mom=0.)
    loss = how.loss_func()
    assert isinstance(loss, LabelSmoothingCrossEntropyFlat) and loss.eps == .2


def write(path, **texts):
    for k, v in texts.items(): (path/f'{k}.toml').write_text(v)
    return path


@pytest.mark.parametrize('text,error,words', [
    ('epoch = 5', ValueError, "x.toml has a key 'epoch', perhaps meant as 'epochs'"),
    ('zebra = 1', ValueError, "has a key 'zebra': pass some of"),
    ('epochs = "5"', TypeError, "x.toml: epochs is '5': pass a whole number"),
    ('epochs = 2.5', TypeError, 'epochs is 2.5'), ('epochs = true', TypeError, 'epochs is True'),
    ('sa = 1', TypeError, 'sa is 1: pass a true or false'),
    ('size = 0', ValueError, 'x.toml: size is 0'), ('size = 100000', ValueError, 'size is 100000'),
    ('lr = inf', ValueError, 'lr is inf'), ('lr = 0', ValueError, 'lr is 0'), ('mom = 1', ValueError, 'mom is 1'),
    ('mom = 0.5', ValueError, 'one_cycle moves the momentum itself'),
    ('smoothing = -0.1', ValueError, 'smoothing is -0.1'),
    ('mixup = -1', ValueError, 'mixup is -1'), ('source = "128"', ValueError, "source is '128'"), ('arms = "relu"', TypeError, "arms is 'relu'"),
    ('seeds = 0', ValueError, 'seeds is 0'), ('base = "none.toml"', ValueError, 'cannot be read'), ('base = 3', TypeError, 'base is 3'),
    ('base = "x.toml"', ValueError, 'leads back'), ('opt = "sgd"\nsqrmom = 0.99', ValueError, 'sqrmom is 0.99, which sgd does not have'),
    ('beta = 0.5', ValueError, 'which adam does not have'),
    ('margin = 0', ValueError, 'x.toml: margin is 0: pass points of accuracy, above 0'), ('margin = "1"', ValueError, "margin is '1'"),
    ('margin = true', ValueError, 'margin is True'), ('margin = nan', ValueError, 'margin is nan'), ('margin = 100', ValueError, 'below 100'),
    ('measures = "accuracy"', ValueError, "x.toml: measures is 'accuracy': pass ['accuracy'] or ['accuracy', 'valid_loss']"),
    ('measures = ["valid_loss"]', ValueError, "measures is ['valid_loss']"), ('measures = 0', ValueError, 'measures is 0'),
    ('margins = 0.5', ValueError, "has a key 'margins', perhaps meant as 'margin'"),
    ('size = ', ValueError, 'x.toml is not TOML'), ('pool = "MaxBlurPool"', ValueError, "pool is 'MaxBlurPool'"),
    ('schedule = "step"', ValueError, "schedule is 'step'")])
def test_what_a_recipe_cannot_say_is_named_with_its_file(text, error, words, tmp_path):
    with pytest.raises(error, match=re.escape(words)): read_recipe(write(tmp_path, x=text)/'x.toml')
    with pytest.raises(SystemExit, match='^error: '): learned_relu_compare(recipe=tmp_path/'x.toml')


def test_a_command_line_takes_a_recipes_yes_back(tmp_path):
    write(tmp_path, a='sa = true')
    assert planned(tmp_path/'a.toml', {})[0].sa and not planned(tmp_path/'a.toml', dict(sa=False))[0].sa


def test_a_command_line_goes_before_the_file_and_the_file_before_its_base(tmp_path):
    write(tmp_path, a='lr = 0.1\nwd = 0.2\nbs = 16\narms = ["mish"]\nseeds = 7', b='base = "a.toml"\nwd = 0.3\nbs = 32')
    how, plan = planned(tmp_path/'b.toml', dict(bs=64, wd=None, sa=False))
    assert (how.lr, how.wd, how.bs, how.epochs) == (.1, .3, 64, Recipe.epochs) and (plan.arms, plan.seeds) == (('mish',), 7)


def test_what_is_declared_about_judging_goes_by_the_file_and_changes_no_digest(tmp_path):
    write(tmp_path, a='margin = 1\nmeasures = ["accuracy", "valid_loss"]', b='base = "a.toml"\nmargin = 0.5', c='lr = 0.008',
          d='measures = ["accuracy"]')
    said = {o: read_recipe(tmp_path/f'{o}.toml').judging for o in 'abcd'}
    both = ['accuracy', 'valid_loss']
    assert said == dict(a=dict(margin=1, measures=both), b=dict(margin=.5, measures=both), c=None, d=dict(margin=None, measures=['accuracy']))
    assert len({planned(tmp_path/f'{o}.toml', {})[0].digest('f') for o in 'abcd'}) == 1, 'a recipe is how runs are made'
    assert read_recipe(RECIPES/'imagewoof-32px-5ep-half.toml').judging == dict(margin=.5, measures=both)


def test_every_field_changes_the_digest():
    other = dict(data='x', source='160', arch='xresnet34', epochs=2, size=29, bs=3, lr=1.,
                 schedule='flat_cos', opt='ranger', sqrmom=.5, eps=1e-3, wd=0.,
                 smoothing=.1, mixup=.1, sh=.1, sa=True, sym=True, pool='MaxPool', fp16=True, batchnorm=False, widen=.5, model='a:b')
    digests = {Recipe(**{k: v}).digest('f') for k, v in other.items()}
    digests |= {Recipe(opt='ranger', beta=1.).digest('f'), Recipe(schedule='flat_cos', mom=.5).digest('f'), Recipe().digest('f')}
    assert set(other) | {'beta', 'mom'} == {o.name for o in fields(Recipe)} and len(digests) == len(other) + 3


def test_a_field_that_came_later_leaves_the_digests_of_older_records():
    records = [read_record(o) for o in RECIPES.parent.glob('records/accuracy/*/records/*.json')]
    full = [r for r in records if {o.name for o in fields(Recipe)} - _later.keys() <= r['recipe'].keys()] # the first three folders say less
    assert len(full) > 30 and any('batchnorm' not in r['recipe'] for r in full)
    for r in full: assert replace(Recipe(**r['recipe']), data=r['data']['name']).digest(r['data']['fingerprint']) == r['digest']


def test_without_batchnorm_is_another_network_and_with_it_the_usual_one():
    def count(**how): return sum(isinstance(m, _BatchNorm) for m in Recipe(**how).network(10).modules())
    assert count(batchnorm=False) == 0 < count() == count(batchnorm=True)


def test_what_learns_from_relu_starts_as_relu():
    torch.manual_seed(0); x = torch.randn(4, 3, 64, 64)*2
    for norm in True, False:
        outs = []
        for arm in 'relu', 'learned_from_relu', 'learned':
            torch.manual_seed(0); outs.append(arm_model(Arm(arm), Recipe(batchnorm=norm), 10)(x))
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_integers_and_floats_of_one_value_are_one_recipe():
    assert Recipe(lr=1).digest('f') == Recipe(lr=1.).digest('f') != Recipe(lr=2).digest('f')


@pytest.mark.parametrize('arm,words', [
    ('relu+averages', 'after an arm that learns'), ('learned+freeze+averages', 'in this order'),
    ('learned+averages+averages', 'after an arm'), ('learned_no_maxv+caps', 'does not learn maxv'), ('clip+caps', 'does not learn maxv'),
    ('torch.nn.Threshold', 'cannot be made without arguments'),
    ('torch.nn.ELU+freeze', 'after an arm that learns'), ('learned+', 'after an arm'), ('', "arm is ''"),
    ('torch.nn', "'torch.nn' is no nn.Module class")])
def test_arms_that_cannot_be(arm, words):
    with pytest.raises(ValueError, match=re.escape(words)): Arm(arm)


def test_arm_names_are_documented():
    assert all(re.fullmatch('[a-z_]+', o) for o in arms)
    prose = ' '.join(o.source for o in read_nb(RECIPES.parents[1]/'nbs/api/31_bench.arms.ipynb').cells if o.cell_type == 'markdown')
    assert [o for o in arms if f'`{o}`' not in prose] == []
