"""A page as a notebook to take away: what it shows, below a cell that installs what it needs, without outputs.

They lie in `notebooks/`, from where a hosted notebook opens them, and on the site beside their pages."""
import ast
import re
import shutil
from urllib.parse import urljoin

import yaml
from cells import shown, split
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb

PARTS = 'tutorials', 'tasks' # whose pages are taken away
INSTALL = '%pip install -q "learned_relu[{extras}] @ git+{repo}"'
CLONE = '!git clone -q {repo}\n%cd -q learned_relu\n%pip install -q -e ".[dev]"'
# what a page says of its notebook, on the site alone
LINKS = """::: {{.content-visible when-format="html"}}
<p class="take-away"><a href="{file}" download>Download this page as a notebook</a>
or <a href="{hosted}">open it in Colab</a></p>
:::"""

def pages_of(src): return [p for part in PARTS for p in sorted((src/part).glob('*.ipynb'))]

def install(codes, repo):
    "What installs the packages that `codes` import, or the whole repository where they read its files"
    if any('benchmarks' in code for code in codes): return CLONE.format(repo=repo)
    nodes = [o for code in codes for o in ast.walk(ast.parse(code)) if isinstance(o, ast.ImportFrom)]
    rooms = {o.module.partition('.')[0] for o in nodes}
    return INSTALL.format(extras='bench,ray' if 'ray' in rooms else 'bench', repo=repo)

def hosted(name, repo):
    "Where a hosted notebook opens the page `name`"
    return f'https://colab.research.google.com/github/{repo.removeprefix("https://github.com/")}/blob/main/notebooks/{name}'

def take_away(page, url, repo):
    "The notebook of the processed `page`, which is published at `url`"
    said = yaml.safe_load(page.cells[0].source.strip('-\n'))
    def absolute(m):
        if re.match(r'\w+:', m[2]): return m[0]
        to = re.sub(r'\.(ipynb|qmd)(?=#|$)', '.html', m[2])
        return f'{m[1]}({urljoin(url, to)})'
    codes = {c.id: split(c)[1].strip() for c in shown(page)}
    texts = {c.id: c.source for c in page.cells if c.cell_type == 'markdown' and not c.source.startswith('<!--')}
    texts = {k: re.sub(r'(\[[^\]]*\])\(([^)\s]+)\)', absolute, o) for k, o in texts.items()}
    title = f'# {said["title"]}\n\n{said["description"]}\n\nAs [a page with what comes out]({url}).'
    cells = [mk_cell(install(codes.values(), repo), id='install'), mk_cell(title, 'markdown', id='title')]
    both = {k: mk_cell(o, id=k) for k, o in codes.items()} | {k: mk_cell(o, 'markdown', id=k) for k, o in texts.items()}
    cells += [both[c.id] for c in page.cells if c.id in both]
    return new_nb(cells, dict(kernelspec=dict(display_name='Python 3', language='python', name='python3')))

def offer(src, dest, base, repo):
    "Write the notebooks of the pages in `src` to `dest`, and say on each page where its own is"
    shutil.rmtree(dest, ignore_errors=True)
    for p in pages_of(src):
        name, page = p.relative_to(src).as_posix(), read_nb(p)
        (dest/name).parent.mkdir(parents=True, exist_ok=True)
        write_nb(take_away(page, base + name.replace('.ipynb', '.html'), repo), dest/name)
        page.cells.insert(1, mk_cell(LINKS.format(file=p.name, hosted=hosted(name, repo)), 'markdown', id='take-away'))
        write_nb(page, p)
