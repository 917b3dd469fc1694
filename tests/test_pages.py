"What readers find stored in the pages: results, and nothing of the machine that made them."
import base64
import io
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from fastcore.nbio import read_nb
from fastcore.script import anno_parser
from PIL import Image
from ray.scripts.scripts import cli

from learned_relu.bench.arms import Arm
from learned_relu.bench.commands.compare import learned_relu_compare
from learned_relu.bench.commands.harvest import learned_relu_harvest
from learned_relu.bench.commands.report import learned_relu_report
from learned_relu.bench.commands.search import learned_relu_search
from learned_relu.bench.commands.speed import learned_relu_speed
from learned_relu.bench.commands.train import learned_relu_train
from learned_relu.bench.recipe import read_recipe

PAGES = sorted((Path(__file__).parents[1]/'nbs').rglob('[!.]*.ipynb'))
UNWANTED = re.compile(r'█|Warning|Traceback|/home/|/root/|/tmp/|/usr/|\\\\Users')


def texts(nb):
    "Every text in the stored outputs"
    for cell in nb.cells:
        for out in cell.get('outputs', []):
            if 'text' in out: yield cell.id, ''.join(out['text'])
            for kind, data in out.get('data', {}).items():
                if kind.startswith('text/'): yield cell.id, ''.join(data)


def test_the_pages_are_found(): assert len(PAGES) >= 20


@pytest.mark.parametrize('page', PAGES, ids=lambda o: o.name)
def test_no_progress_bars_warnings_or_paths_in_outputs(page):
    found = [(id, t[:100]) for id, t in texts(read_nb(page)) if UNWANTED.search(t)]
    assert not found


@pytest.mark.parametrize('page', PAGES, ids=lambda o: o.name)
def test_something_is_stored(page): assert any(t.strip() for _, t in texts(read_nb(page)))


@pytest.mark.parametrize('page', PAGES, ids=lambda o: o.name)
def test_every_figure_has_a_title_and_a_description_and_is_stored_small(page):
    for cell in read_nb(page).cells:
        pictures = [''.join(o['data']['image/png']) for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
        if not pictures: continue
        said = yaml.safe_load('\n'.join(re.findall(r'^#\| (.+: .+)$', cell.source, flags=re.M)))  # as it is read for the site
        assert len(pictures) == 1 and len(said.get('fig-cap', '')) > 10 and len(said.get('fig-alt', '')) > 40, cell.source
        assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).mode == 'P', 'run `python tools/figures.py`'


COMMANDS = {'learned_relu_compare': learned_relu_compare, 'learned_relu_train': learned_relu_train, 'learned_relu.bench.train': learned_relu_train,
            'learned_relu_report': learned_relu_report, 'learned_relu_search': learned_relu_search, 'learned_relu_harvest': learned_relu_harvest,
            'learned_relu_speed': learned_relu_speed}
PROSE = {o: '\n'.join(c.source for c in read_nb(o).cells if c.cell_type == 'markdown') for o in PAGES}
SHELL = re.compile(r'^```sh\n(.*?)^```', re.S | re.M)
SHOWN = [(o.name, line) for o, text in PROSE.items() for block in SHELL.findall(text) for line in block.splitlines()]


def test_code_in_the_prose_is_for_a_shell(): # all other code is in cells, which run
    told = {page: text for page, text in PROSE.items() if page.parent.name != 'api'}
    assert {o for text in told.values() for o in re.findall(r'^(?:```|~~~)(\S*)', text, flags=re.M)} == {'sh', ''} and len(SHOWN) >= 7


def called(words):
    "The command of ours among `words`, and what it is called with"
    command = next(o for o in words if o in COMMANDS)
    args = vars(anno_parser(COMMANDS[command], command).parse_args(words[words.index(command) + 1:]))
    return COMMANDS[command], {k: v for k, v in args.items() if k not in ('pdb', 'xtra')}  # which fastcore adds


def parsed_by_ray(words):
    command, args = cli, words[1:]
    while isinstance(command, click.Group): command = command.commands[args.pop(0)]
    command.make_context(words[0], args)


@pytest.mark.parametrize('name,line', SHOWN)
def test_a_command_in_the_prose_can_be_given(name, line):
    words = [o.removeprefix('.venv/bin/') for o in shlex.split(line.split('&&')[-1])]
    if words[:3] == ['python', '-m', 'pytest']: return # what .ci/run runs, or a part of it
    if words[:2] == ['pip', 'install']: return # what notebooks begin with, and tests/test_notebooks.py runs
    if words[0] == 'ray': parsed_by_ray(words)
    if words[0] == 'ray' and '--' not in words: return
    _, args = called(words)
    if args.get('recipe'): read_recipe(PAGES[0].parents[2]/args['recipe'])
    for arm in (args.get('arms') or args.get('arm') or 'relu').split(','):
        if '.' not in arm: Arm(arm) # one of the reader's own is not here


MINE = "from torch import nn\nfrom learned_relu.layers import LearnedRelu\nLearnedSwish = LearnedRelu\n" \
       "def net(n_out): return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out))\n"
SMALL = dict(size=24, epochs=1, seeds=2, rounds=1, bs=8, workers=0, launcher='local', address=None, widen=.25, fp16=False, device='cpu', minutes=.2)
RUN = {o: [line for line in re.findall(r'.*learned_relu[_.].*', '\n'.join(SHELL.findall(text))) if '.venv' not in line] for o, text in PROSE.items()}


@pytest.mark.slow
@pytest.mark.parametrize('page', [o for o in PAGES if RUN[o]], ids=lambda o: o.stem)
def test_the_commands_of_a_page_run_one_after_another_on_small_stand_ins(page, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'benchmarks').symlink_to(PAGES[0].parents[2]/'benchmarks')
    for name in 'mymodel', 'my_curves': (tmp_path/f'{name}.py').write_text(MINE)
    for line in RUN[page]:
        command, args = called(shlex.split(line))
        digits, own = (args.get('data') or 'mnist') == 'mnist', bool(args.get('model'))
        small = {k: SMALL[k] for k in args if k in SMALL and not (k == 'size' and digits) and not (k == 'widen' and (digits or own))}
        wants = args.get('data') in ('imagewoof', 'imagenette', 'shapes') or re.search('published|-gpu', args.get('recipe') or '')
        if wants: small['data'] = str(images)
        if (args.get('out') or '').startswith('/shared'): small['out'] = args['out'].lstrip('/')
        if command in (learned_relu_report, learned_relu_harvest): small = {}
        command(**args | small)
        assert 'report.html' in capsys.readouterr().out or command is not learned_relu_compare, line


# rooms that are unwrapped when their turn comes, and how much of each is left: lines over 120 columns, cells over 50 lines
NOT_YET = {'06_caps': (4, 0), '10_xresnet': (2, 0)}


@pytest.mark.parametrize('page', [o for o in PAGES if o.parent.name == 'api'], ids=lambda o: o.stem)
def test_exported_cells_are_narrow_and_short(page):
    cells = [c.source.splitlines() for c in read_nb(page).cells if c.cell_type == 'code' and c.source.startswith('#| export')]
    wide, long = [o for c in cells for o in c if len(o) > 120], [c for c in cells if len(c) > 51]
    assert (len(wide), len(long)) == NOT_YET.get(page.stem, (0, 0)), '\n'.join(wide)
