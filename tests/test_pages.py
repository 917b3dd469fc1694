"What readers find stored in the pages: results, and nothing of the machine that made them."
import base64
import io
import re
from pathlib import Path

import pytest
from fastcore.nbio import read_nb
from PIL import Image

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
        said = dict(re.findall(r'^#\| (fig-\w+): (.+)$', cell.source, flags=re.M))
        assert len(pictures) == 1 and len(said.get('fig-cap', '')) > 10 and len(said.get('fig-alt', '')) > 40, cell.source
        assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).mode == 'P', 'run `python tools/figures.py`'
