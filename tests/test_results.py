"Numbers that readers are told: each is computed from a record, and stored as it comes out today."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from fastcore.xtras import working_directory

from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.data import mnist_dls

REPO = Path(__file__).parents[1]
PAGES = [REPO/'nbs'/o for o in ('index.ipynb', 'results.ipynb')]
NUMBER = re.compile(r'\d+\.\d+|\d+(?:\.\d+)? ?(?:%|per ?cent|points|times)')


def told(outputs):
    "What of outputs is text for readers"
    return [''.join(o.get('text', o.get('data', {}).get('text/markdown', ''))) for o in outputs]


def trains(cell): return cell.cell_type == 'code' and any(o in cell.source for o in ('learn.', 'seen'))


@pytest.mark.parametrize('page', PAGES, ids=lambda o: o.name)
def test_what_is_stored_is_what_the_records_say_today(page):
    nb, seen, shell = read_nb(page), 0, CaptureShell(page)
    with working_directory(page.parent):
        for cell in (o for o in nb.cells if o.cell_type == 'code' and not trains(o)):
            stored = told(cell.outputs)
            shell.cell(cell)
            assert not shell.exc, shell.prettytb(fname=page)
            assert told(cell.outputs) == stored, f'run the page anew: {cell.source}'
            seen += len(NUMBER.findall(''.join(stored)))
    assert seen > 10


def typed(cell):
    "What a person wrote into a cell: prose, and of code the options and the constants"
    if cell.cell_type == 'markdown': return [cell.source]
    strings = [str(o.value) for o in ast.walk(ast.parse(cell.source)) if isinstance(o, ast.Constant) and isinstance(o.value, (str, float))]
    return strings + re.findall(r'^#\| fig.*', cell.source, flags=re.M)


@pytest.mark.parametrize('page', PAGES, ids=lambda o: o.name)
def test_no_measured_number_is_typed(page):
    needs = dict(re.findall(r'(\w+)>=([\d.]+)', re.search('^requirements = (.*)', (REPO/'settings.ini').read_text(), flags=re.M)[1]))
    needs = f'PyTorch {needs["torch"]} and fastai {needs["fastai"]}'
    settings = r'```.*?```|`[^`]*`|\{fig-alt=.*?\}|Python 3\.\d+|intervals of 95 %|\[95 %\]|Imagewoof at 64 px|' + re.escape(needs)
    text = '\n'.join(o for c in read_nb(page).cells if not trains(c) for o in typed(c))
    assert NUMBER.findall(re.sub(settings, '', text, flags=re.S)) == []


def test_records_lie_where_they_belong_and_their_index_is_current():
    subprocess.run([sys.executable, REPO/'tools'/'records.py', '--check'], check=True)
    folders = [o for o in (REPO/'benchmarks'/'records').glob('*/*') if o.is_dir()]
    for o in folders:
        assert re.fullmatch(r'\d{4}-\d\d-\d\d-[a-z0-9-]+', o.name) and (o/'README.md').is_file(), o
        assert (o.parent.name == 'accuracy') == (o/'records').is_dir() and not (o/'report.html').exists(), o
    assert len(folders) >= 16


def test_the_digits_are_those_of_the_records():
    said = [json.loads(o.read_text(encoding='utf-8'))['data'] for o in (REPO/'benchmarks'/'records').glob('accuracy/*digits*/records/*.json')]
    assert said and all(o == dict(name='mnist', fingerprint=mnist_dls()[1]) for o in said)


def test_the_readme_tells_what_the_page_tells():
    def lines(text): return [re.sub(r'\]\([^)]*\)', ']', o).strip() for o in text.splitlines()]  # there links lead to the site
    said = [o for c in read_nb(PAGES[0]).cells for t in told(c.get('outputs', [])) for o in lines(t) if NUMBER.search(o)]
    there = lines((REPO/'README.md').read_text())
    assert len(said) >= 4 and [o for o in said if o not in there] == []


def test_every_block_of_the_readme_is_run_by_a_check():
    readme, page = (REPO/'README.md').read_text(), read_nb(PAGES[0])
    blocks = re.findall(r'^```(\w*)\n(.*?)^```', readme, flags=re.S | re.M)
    cells = {re.sub(r'^#\|.*\n', '', o.source, flags=re.M).strip() for o in page.cells if o.cell_type == 'code'}
    assert {o for o, _ in blocks} == {'python', 'sh'}
    for kind, block in blocks:
        if kind == 'python': assert block.strip() in cells # which run as tests
    commands = [o.strip() for kind, o in blocks if kind == 'sh']
    begin = 'python3 -m venv .venv && .venv/bin/python -m pip install -q -e ".[dev]" && .venv/bin/'
    first = read_nb(REPO/'notebooks'/'tutorials'/'first_training.ipynb').cells[0].source  # which tests/test_notebooks.py runs
    install = first.replace('%pip install -q', 'pip install')
    assert commands == [install, begin + 'learned_relu_compare', begin + 'python -m pytest'] # .ci/run runs the last
    assert (REPO/'benchmarks/recipes/published.toml').exists() and 'benchmarks/recipes/published.toml' in readme


def test_the_first_command_does_what_the_readme_says(monkeypatch):
    called = []
    monkeypatch.setattr('learned_relu.bench.commands.compare.run_arms', lambda *args: called.append(args))
    learned_relu_compare()
    arms, seeds, how, out, *_ = called[0]
    assert ([o.name for o in arms], seeds, how.data, str(out)) == (['relu', 'general', 'learned'], list(range(12)), 'mnist', 'runs/mnist')
