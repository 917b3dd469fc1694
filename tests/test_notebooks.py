"What a page shows runs alone: the notebooks to take away, and every page of the site."
import ast
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from fastcore.nbio import read_nb
from packaging.requirements import Requirement

REPO = Path(__file__).parents[1]
TAKEN = sorted((REPO/'notebooks').rglob('*.ipynb'))
URL = 'https://github.com/learned-relu/learned_relu'
IDS = [o.relative_to(REPO/'notebooks').as_posix() for o in TAKEN]
# shown in CI: what users begin with; the others take longer, or need what a tutorial's own cells bring
QUICK = 'tasks/', 'tutorials/coming_from', 'tutorials/first_training'


def front(): return (REPO/'README.md').read_text(encoding='utf-8')  # whose line for installing is the same


def codes(nb): return [c.source for c in nb.cells if c.cell_type == 'code']


def brought(extras):
    "The distributions that installing the package with `extras` brings"
    res, todo = set(), [('learned_relu', extras)]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in res: continue
        res.add((name, wanted))
        for o in map(Requirement, requires(name) or []):
            if not o.marker or any(o.marker.evaluate(dict(extra=e)) for e in (wanted or {''})):
                try: requires(o.name)
                except importlib.metadata.PackageNotFoundError: continue  # of another system
                todo.append((o.name.lower(), frozenset(o.extras)))
    return {re.sub('[-_.]+', '-', name).lower() for name, _ in res}


def test_each_page_of_both_parts_is_taken_away():
    pages = {p.relative_to(REPO/'nbs').as_posix() for part in ('tutorials', 'tasks') for p in (REPO/'nbs'/part).glob('*.ipynb')}
    assert set(IDS) == pages and len(IDS) > 12


@pytest.mark.parametrize('path', TAKEN, ids=IDS)
def test_the_first_cell_installs_what_the_others_import(path):
    nb = read_nb(path)
    install, *rest = codes(nb)
    assert nb.cells[0].source == install and nb.cells[1].source.startswith('# ') and URL in install
    assert not any(c.get('outputs') for c in nb.cells) and not any('#|' in o for o in rest)
    if not install.startswith('!git'): assert install.replace('%pip install -q ', 'pip install ').replace(',ray', '') in front()
    extras = re.search(r'learned_relu\[([\w,]+)\]|"\.\[(dev)\]"', install)
    there = brought(frozenset((extras[1] or extras[2]).split(',')))
    nodes = [o for code in rest for o in ast.walk(ast.parse(code))]
    rooms = {a.name for o in nodes if isinstance(o, ast.Import) for a in o.names} | {o.module for o in nodes if isinstance(o, ast.ImportFrom)}
    tops = {o.partition('.')[0] for o in rooms} - sys.stdlib_module_names - {'learned_relu'}
    dists = packages_distributions()
    assert tops and {o for o in tops if not {re.sub('[-_.]+', '-', d).lower() for d in dists[o]} & there} == set()
    links = re.findall(r'\]\(([^)\s]+)\)', '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown'))
    assert links and [o for o in links if not re.match('https?:', o)] == []


def some(path, name): return pytest.param(path, id=name, marks=() if name.startswith(QUICK) else pytest.mark.slow)


@pytest.mark.parametrize('path', map(some, TAKEN, IDS))
def test_what_a_page_shows_runs_alone_in_a_fresh_process(path, tmp_path):
    install, *rest = codes(read_nb(path))
    (file := tmp_path/'cells.py').write_text('\n\n'.join(rest), encoding='utf-8')
    env = os.environ | dict(PYTHONPATH=str(REPO), PYTHONWARNINGS='ignore', MPLBACKEND='agg')
    clone = REPO if install.startswith('!git clone') else tmp_path
    done = subprocess.run([sys.executable, file], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
    "A function that gives a fresh environment, in which there is what runs notebooks and nothing else"
    def host(name):
        where = tmp_path_factory.mktemp(name)/'env'
        subprocess.run([sys.executable, '-m', 'venv', where], check=True)
        subprocess.run([where/'bin'/'python', '-m', 'pip', 'install', '-q', 'nbconvert', 'ipykernel'], check=True)
        return where/'bin'
    made = {}
    return lambda install: made.setdefault(install, host(f'env{len(made)}'))


@pytest.mark.slow
@pytest.mark.parametrize('path', TAKEN, ids=IDS)
def test_a_notebook_runs_where_its_first_cell_alone_installs(path, hosts, tmp_path):
    at = hosts(codes(read_nb(path))[0])
    ours = dict(GIT_CONFIG_COUNT='1', GIT_CONFIG_KEY_0=f'url.{REPO.as_uri()}.insteadOf', GIT_CONFIG_VALUE_0=URL)  # as if it were published
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')} | ours | dict(PATH=f'{at}:{os.environ["PATH"]}')
    convert = [at/'python', '-m', 'nbconvert', '--to', 'notebook', '--execute', '--output-dir', tmp_path, '--ExecutePreprocessor.timeout=900']
    done = subprocess.run([*convert, path], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(c.get('outputs') for c in read_nb(tmp_path/path.name).cells)
