"What is published: a wheel and a source distribution that install, import and train by themselves."
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from nbdev.config import get_config

import learned_relu

REPO = Path(__file__).parents[1]
TRAINS = '''
from fastai.callback.training import ShortEpochCallback
from fastai.vision.all import CrossEntropyLossFlat, Learner
import learned_relu
from learned_relu.all import LearnedRelu, plain_xresnet
from learned_relu.bench.data import mnist_dls
dls, _ = mnist_dls(size=16, bs=64)
learn = Learner(dls, plain_xresnet('xresnet18', 10, c_in=1), CrossEntropyLossFlat(), cbs=ShortEpochCallback(.05)).to_learned_relu()
with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
moved = {name: (p - 10 if name == 'maxv' else p - dict(leak=.05, sub=.25)[name]).abs().max().item()
         for m in learn.model.modules() if isinstance(m, LearnedRelu) for name, p in m.named_parameters()}
assert moved['leak'] > 0 and moved['sub'] > 0, moved
print(learned_relu.__file__)
'''


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, REPO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    wheel, sdist = sorted(out.iterdir(), key=lambda o: o.suffix, reverse=True)
    assert wheel.suffix == '.whl' and sdist.name.endswith('.tar.gz')
    return wheel, sdist


def held_by(folder):
    files = [o for o in (folder/'learned_relu').rglob('*') if o.is_file() and '__pycache__' not in o.parts]
    assert {'.py', '.html'} <= {o.suffix for o in files}, 'modules and templates'
    return {o.relative_to(folder).as_posix() for o in files}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as f: names = f.namelist()
    assert held_by(REPO) <= set(names) and {o.split('/')[0] for o in names} == {'learned_relu', f'learned_relu-{learned_relu.__version__}.dist-info'}


def test_the_metadata_says_what_users_and_tools_need(built):
    with zipfile.ZipFile(built[0]) as f:
        folder = f'learned_relu-{learned_relu.__version__}.dist-info/'
        meta, entries = message_from_bytes(f.read(folder + 'METADATA')), f.read(folder + 'entry_points.txt').decode()
        assert any(o.startswith(folder) and o.endswith('LICENSE') for o in f.namelist())
    assert meta['Version'] == learned_relu.__version__ and meta['Requires-Python'] == '>=3.10' and meta['License-Expression'] == 'Apache-2.0'
    assert {'Repository', 'Documentation'} <= {o.split(',')[0] for o in meta.get_all('Project-URL')}
    needs = {re.split('[^a-z]', o)[0] for o in meta.get_all('Requires-Dist') if 'extra' not in o}
    assert needs == {'fastai', 'fastcore', 'torch', 'matplotlib', 'filelock'}
    assert set(meta.get_all('Provides-Extra')) == {'bench', 'ray', 'dev'}
    assert any(o.startswith('Development Status') for o in meta.get_all('Classifier')) and meta.get_payload().startswith('# learned_relu')
    commands = re.findall(r'^(learned_relu_\w+) = ', entries, flags=re.M)
    assert commands == [f'learned_relu_{o}' for o in 'compare harvest report search speed train'.split()]


def installed(package, to):
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--target']
    subprocess.run([*pip, to, package], check=True)
    return {o: (to/o).read_bytes() for o in held_by(to)}


def test_what_was_built_installs_imports_and_trains(built, tmp_path):
    to = tmp_path/'wheel'
    assert installed(built[0], to) == installed(built[1], tmp_path/'sdist')
    assert held_by(to) == held_by(REPO)
    env = os.environ | dict(PYTHONPATH=str(to), PYTHONWARNINGS='ignore')
    def python(*args): return subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert Path(python('-c', TRAINS).splitlines()[-1]).is_relative_to(to) # and not the checkout
    assert '--recipe' in python(to/'bin'/'learned_relu_compare', '--help')


def workflow(): return yaml.safe_load((REPO/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8'))


def test_every_action_is_pinned_to_a_commit_and_says_its_version():
    lines = [o.strip(' -') for file in (REPO/'.github'/'workflows').iterdir() for o in file.read_text(encoding='utf-8').splitlines()]
    used = [o for o in lines if o.startswith('uses:')]
    assert used and [o for o in used if not re.fullmatch(r'uses: actions/[\w-]+@[0-9a-f]{40} # v\d+(\.\d+)+', o)] == []
    steps = [o for job in workflow()['jobs'].values() for o in job['steps']]
    assert len(used) == sum('uses' in o for o in steps)


def test_what_is_published_is_the_site_that_was_tested():
    job = workflow()['jobs']['test']
    steps = [o.get('uses', o.get('run', '')).partition('@')[0] for o in job['steps']]
    assert steps.index('bash .ci/run') < steps.index('actions/upload-pages-artifact') == len(steps) - 1
    upload, versions = job['steps'][-1], job['strategy']['matrix']['python']
    assert upload['with']['path'] == get_config().doc_path.name and versions == ['3.10', '3.13']
    assert upload['if'] == "github.event_name == 'push' && matrix.python == '3.13'" and workflow()[True]['push'] == {'branches': ['main']}
    assert not any('continue-on-error' in o for o in [job, *job['steps']])


def test_the_site_is_published_after_every_test_by_the_only_job_that_may():
    jobs = workflow()['jobs']
    publish = jobs.pop('publish')
    assert set(publish['needs']) == set(jobs) and publish['if'] == "github.event_name == 'push'"
    assert [o['uses'].partition('@')[0] for o in publish['steps']] == ['actions/deploy-pages']
    assert workflow()['permissions'] == {'contents': 'read'} and not any('permissions' in o for o in jobs.values())
    assert publish['permissions'] == {'pages': 'write', 'id-token': 'write'}


def test_macos_and_windows_run_tests_that_are_there():
    job = workflow()['jobs']['elsewhere']
    assert job['strategy']['matrix']['os'] == ['macos-latest', 'windows-latest']
    files = [o for o in job['steps'][-1]['run'].split() if o.startswith('tests/')]
    assert 'tests/test_rings.py' in files and [o for o in files if not (REPO/o).is_file()] == []
