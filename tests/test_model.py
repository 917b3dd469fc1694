"A network and a folder of one's own: found, asked rightly, refused in a sentence, told apart, compared and resumed."
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learned_relu.bench.arms import Arm
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.data import Source, find_images
from learned_relu.bench.model import _text, own_model, pinned_model
from learned_relu.bench.recipe import Recipe, planned
from learned_relu.bench.record import read_record
from learned_relu.bench.run import train_run
from learned_relu.bench.trial import tried

pytestmark = pytest.mark.usefixtures('cache')

NET = """
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, n_out, c_in):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(c_in, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, n_out)
    def forward(self, x): return self.last(F.relu(self.norm(self.first(x))).mean((2, 3)))
"""
ODD = NET + """
import secrets, torch
def net(n_out, c_in=3): return Net(n_out, c_in)
def fixed(n_out): return Net(n_out, 3)
def unseeded(n_out, c_in=3):
    model = Net(n_out, c_in)
    model.last.bias.data.fill_(secrets.randbelow(1000))
    return model
def extra(n_out, c_in=3):
    class Extra(Net):
        def get_extra_state(self): return Net
        def set_extra_state(self, state): pass
    return Extra(n_out, c_in)
def raises(n_out, c_in=3): raise RuntimeError('no weights today')
def smooth(n_out, c_in=3): return nn.Sequential(nn.Conv2d(c_in, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))
def deep(n_out, c_in=3): return nn.Sequential(nn.Conv2d(c_in, 8, 33), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))
def many(n_out, c_in=3): return Net(1000, c_in)
def listed(n_out): return [Net(n_out, 3)]
class Hidden(Net):
    def __init__(self, n_out, c_in=3):
        super().__init__(n_out, c_in)
        self.scale = torch.rand(n_out)
    def forward(self, x): return super().forward(x)*self.scale
made = Net(10, 3)
number = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    "A function that writes a file of networks into the current directory and names its module, a new one each time"
    monkeypatch.chdir(tmp_path)
    def write(text):
        name = f'nets_{random.SystemRandom().randrange(10**9)}'
        (tmp_path/f'{name}.py').write_text(text)
        return name
    return write


@pytest.mark.parametrize('name,arms,words', [
    ('nett', 'relu', "has no 'nett', perhaps meant as 'net': name a function of it"),
    ('made', 'relu', 'which is a model already, and every run needs a new one'), ('number', 'relu', 'which is nothing to call'),
    ('listed', 'relu', 'which returned a list for n_out=10: return an nn.Module'),
    ('raises', 'relu', 'calling it with n_out=10, c_in=1 raised RuntimeError: no weights today'),
    ('many', 'relu', 'is a tensor of shape (2, 1000): let it return a tensor of shape (2, 10)'),
    ('deep', 'relu', 'which cannot take images of 1 x 8 x 8 (RuntimeError'),
    ('smooth', 'relu,learned', "in which the arm 'learned' can replace nothing"),
    ('smooth', 'penalty', "which has no nn.ReLU that the arm 'penalty' could watch"),
    ('unseeded', 'relu', 'whose weights are others each time it is made, though the seed is the same'),
    ('extra', 'relu', 'which cannot be written to a checkpoint and read again'),
    ('Hidden', 'relu', 'which holds values that its state_dict lacks')])
def test_what_a_network_gets_wrong_is_said_before_any_run(name, arms, words, nets, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        learned_relu_compare(model=f'{nets(ODD)}:{name}', arms=arms, seeds=1, size=8, bs=2000, out=tmp_path/'o')
    assert words in str(e.value) and '\n' not in str(e.value) and str(e.value).startswith("error: model is 'nets_")
    assert 'run 1/' not in capsys.readouterr().out and not list((tmp_path/'o').rglob('*.json'))


@pytest.mark.parametrize('given,words', [
    ('nowhere:net', 'nowhere cannot be imported (ModuleNotFoundError'), ('nowhere', 'pass package.module:function'),
    (':net', 'pass package.module:function')])
def test_a_path_that_leads_nowhere_is_refused_before_images_are_looked_for(given, words):
    with pytest.raises(SystemExit, match=re.escape(words)): learned_relu_compare(model=given, data='nowhere')


@pytest.mark.parametrize('k,v', dict(arch='xresnet18', widen=1., sa=False, sym=True, pool='AvgPool', batchnorm=False).items())
def test_a_network_of_ones_own_goes_with_nothing_that_describes_an_xresnet(k, v, tmp_path):
    with pytest.raises(SystemExit, match=f"model is 'a:b', and {k} is .* for fastai's xresnets alone"): learned_relu_compare(model='a:b', **{k: v})
    other = dict(arch='xresnet34', widen=.5, sa=True, sym=True, pool='MaxPool', batchnorm=False)
    with pytest.raises(ValueError, match=f"and {k} is "): Recipe(model='a:b', **{k: other[k]})


def test_who_names_a_network_names_all_of_it(tmp_path):
    (tmp_path/'x.toml').write_text('arch = "xresnet34"\nsa = true\nlr = 0.1\n')
    (tmp_path/'own.toml').write_text('base = "x.toml"\nmodel = "a:b"\n')
    for how in planned(tmp_path/'x.toml', dict(model='a:b'))[0], planned(tmp_path/'own.toml', {})[0]:
        assert (how.model, how.arch, how.sa, how.lr) == ('a:b', '', False, .1)
    back = planned(tmp_path/'own.toml', dict(widen=.5))[0]
    assert (back.model, back.arch, back.widen, back.lr) == ('', 'xresnet18', .5, .1)


def test_what_a_record_says_of_its_recipe_is_a_recipe():
    how = Recipe(model='a:b@12345678', lr=.1)
    assert Recipe(**vars(how)) == how


@pytest.mark.parametrize('text', ['def net(n_out): return Net(n_out, 3)', 'def net(k): return Net(k, 3)', 'def net(n=5): return Net(n, 3)',
                                  'def net(*, weights=None, num_classes=5): return Net(num_classes, 3)',
                                  'def net(weights=None, **rest): return Net(c_in=3, **rest)',
                                  'def net(n_classes, in_chans): return Net(n_classes, in_chans)'])
def test_each_way_of_saying_how_many_classes(text, nets):
    name = nets(NET + text)
    torch.manual_seed(0)
    model = own_model(f'{name}:net', 7, 1)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    torch.manual_seed(0)
    assert torch.equal(own_model(f'{name}:net', 7, 1).last.weight, model.last.weight)


def test_trying_names_draws_no_random_number(nets):
    name = nets(NET + "def plain(n_out): return Net(n_out, 3)\ndef hidden(**rest):\n    model = Net(rest.pop('n_out', 3), 3)\n"
                "    if rest: raise TypeError('unexpected keyword argument')\n    return model")
    made = []
    for o in 'plain', 'hidden':
        torch.manual_seed(0)
        made.append(own_model(f'{name}:{o}', 7))
    assert torch.equal(made[0].last.weight, made[1].last.weight)


@pytest.mark.parametrize('path', ['resnet18', 'mobilenet_v3_small', 'efficientnet_b0', 'shufflenet_v2_x0_5', 'squeezenet1_1'])
def test_factories_of_torchvision_pass_as_they_are(path):
    pytest.importorskip('torchvision')
    arms = [Arm('relu')] if path == 'efficientnet_b0' else [Arm('relu'), Arm('prelu')] # which has no ReLU
    assert tried(Recipe(size=32, model=f'torchvision.models:{path}'), arms, Source('mnist', 32)).model.startswith(f'torchvision.models:{path}@')


def test_another_text_another_class_and_another_helper_are_other_networks(nets, tmp_path):
    def mark(name):
        _text.cache_clear() # as in a new process
        for o in list(sys.modules):
            if o.startswith('nets_'): del sys.modules[o]
        return pinned_model(f'{name}:net', 10)
    helper = nets(NET)
    name = nets(f'import {helper}\ndef net(n_out): return {helper}.Net(n_out, 3)')
    found = [mark(name)]
    assert mark(name) == found[0]
    (tmp_path/f'{helper}.py').write_text(NET.replace('F.relu', 'F.gelu'))
    found.append(mark(name))
    (tmp_path/f'{name}.py').write_text(f'import {helper}\ndef net(n_out): return {helper}.Net(n_out, 3) # edited')
    found.append(mark(name))
    assert len(set(found)) == 3
    with pytest.raises(ValueError, match=f'but what is there now has the digest {found[2].partition("@")[2]}'): pinned_model(found[0], 10)


def command(cwd, *args):
    cmd = Path(sys.executable).with_name('learned_relu_compare')
    return subprocess.run([str(o) for o in (cmd, *args)], cwd=cwd, capture_output=True, text=True, env=os.environ | dict(PYTHONWARNINGS='ignore'))


def test_a_network_beside_the_shell_is_compared_and_an_edited_one_is_another(images, tmp_path, monkeypatch, capsys):
    (tmp_path/'netbeside.py').write_text(ODD)
    args = '--data', images, '--model', 'netbeside:net', '--size', 16, '--bs', 8, '--epochs', 1, '--seeds', 2, '--arms', 'relu,prelu', '--out', 'o'
    done = command(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path/'o'/'records').glob('*.json'))
    records = {(r['arm'], r['seed']): r for r in map(read_record, files)}
    assert len(records) == 4 and all(records['relu', o]['pair'] == records['prelu', o]['pair'] for o in (0, 1))
    said, = {r['recipe']['model'] for r in records.values()}
    assert re.fullmatch('netbeside:net@[0-9a-f]{8}', said) and {r['recipe']['arch'] for r in records.values()} == {''}
    assert str(tmp_path) not in json.dumps(list(records.values())) and 'noise: netbeside:net<' in (tmp_path/'o'/'report.html').read_text()
    r = records['relu', 0]
    assert replace(Recipe(**r['recipe']), data=r['data']['name']).digest(r['data']['fingerprint']) == r['digest']
    (tmp_path/'netbeside.py').write_text(ODD.replace('(2, 3)', '(3, 2)'))
    monkeypatch.chdir(tmp_path)
    learned_relu_compare(data=str(images), model='netbeside:net', size=16, bs=8, epochs=1, seeds=2, arms='relu,prelu', out='o')
    assert 'finished before' not in capsys.readouterr().out
    assert len(list((tmp_path/'o'/'records').glob('*.json'))) == 8


def test_a_run_of_ones_own_network_goes_on_to_the_same_end_and_no_other_does(nets, tmp_path):
    how, source = Recipe(model=f'{nets(ODD)}:net', size=8, bs=1000, epochs=2), Source('mnist', 8)
    whole = train_run(Arm('prelu'), 0, how, source)
    from learned_relu.bench.resume import EpochCheckpoint
    stop = EpochCheckpoint.after_epoch
    class Killed(Exception): pass
    def once(self):
        stop(self)
        raise Killed('here')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(EpochCheckpoint, 'after_epoch', once)
        with pytest.raises(Killed): train_run(Arm('prelu'), 0, how, source, checkpoint=tmp_path/'c.pt')
    shutil.copy(tmp_path/'c.pt', tmp_path/'d.pt')
    again = train_run(Arm('prelu'), 0, how, source, checkpoint=tmp_path/'c.pt')
    assert again['resumed'] == [1] and again['end'] == whole['end'] and again['recipe'] == whole['recipe']
    other = replace(how, model=f'{nets(ODD + "# edited")}:net')
    with pytest.raises(ValueError, match='is the checkpoint of another run'): train_run(Arm('prelu'), 0, other, source, checkpoint=tmp_path/'d.pt')


def test_a_folder_may_say_valid(images, tmp_path):
    shutil.copytree(images, tmp_path/'noise')
    before = find_images(images)
    assert find_images(tmp_path/'noise')[2] == before[2]
    (tmp_path/'noise'/'val').rename(tmp_path/'noise'/'valid')
    path, files, mark = find_images(tmp_path/'noise')
    assert len(files) == len(before[1]) and mark != before[2] and sum('valid' in o.parts for o in files) == 10
    dls = Source(tmp_path/'noise', 16, workers=0, cache=False).dls(8)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (24, 10, 2)
    (tmp_path/'noise'/'val').mkdir()
    with pytest.raises(ValueError, match='has a folder val/ and a folder valid/: rename the one'): find_images(tmp_path/'noise')
    for o in 'val', 'valid': shutil.rmtree(tmp_path/'noise'/o)
    with pytest.raises(ValueError, match='which has no folder val/ or valid/: pass mnist'): find_images(tmp_path/'noise')
