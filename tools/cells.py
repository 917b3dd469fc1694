"""The cells that a reader sees, made to run alone: in their order, in a fresh process, with nothing else.

What they need of the imports of hidden cells is gathered in a folded cell before the first, and lines that run out of
their column are wrapped."""
import ast
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fastcore.nbio import mk_cell, read_nb, write_nb

WIDTH = 72 # characters, which fit between the two lists beside a page where a window is 1280 points wide
FOLD = '#| code-fold: true\n#| code-summary: {}\n'
LONG = 12 # lines, beyond which the code of a figure is folded

def split(cell):
    "The options of a cell, and its code"
    lines = cell.source.splitlines(keepends=True)
    return [''.join(o for o in lines if o.startswith('#|') is option) for option in (True, False)]

def shown(nb):
    "The code cells that a reader of a processed page sees"
    return [c for c in nb.cells if c.cell_type == 'code' and 'echo: false' not in c.source and split(c)[1].strip()]

def starred(module):
    "The names that a star import of `module` gives"
    m = importlib.import_module(module)
    return getattr(m, '__all__', [k for k in vars(m) if not k.startswith('_')])

def imported(o):
    "The names that a node of a tree imports, each with a line that imports it alone"
    if not isinstance(o, (ast.Import, ast.ImportFrom)): return {}
    if o.names[0].name == '*': return {k: f'from {o.module} import {k}' for k in starred(o.module)}
    def alone(a): return ast.ImportFrom(o.module, [a], 0) if isinstance(o, ast.ImportFrom) else ast.Import([a])
    return {a.asname or a.name: ast.unparse(alone(a)) for a in o.names}

def made(o):
    "The names that a node of a tree makes"
    if isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)): return {o.name}
    if isinstance(o, ast.arg): return {o.arg}
    if isinstance(o, ast.Name): return set() if isinstance(o.ctx, ast.Load) else {o.id}
    return {k.partition('.')[0] for k in imported(o)}

def taken(code):
    "The names that `code` uses and does not make"
    nodes = [*ast.walk(ast.parse(code))]
    return {o.id for o in nodes if isinstance(o, ast.Name)}.difference(*map(made, nodes))

def given(source, package):
    "The names that a notebook imports, or exports to a module of `package`, each with a line that imports it alone"
    codes = [c.source for c in source.cells if c.cell_type == 'code']
    module = next((f'{package}.{o.split()[-1]}' for o in codes if o.startswith('#| default_exp')), None)
    res = {}
    for code in codes:
        exported = module and re.match(r'#\| *export', code)
        for o in ast.parse(code).body:
            stars = isinstance(o, ast.ImportFrom) and o.names[0].name == '*'
            res = imported(o) | res if stars else res | imported(o)
            if exported and isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
                names = set().union(*map(made, ast.walk(o) if isinstance(o, ast.Assign) else [o]))
                res |= {k: f'from {module} import {k}' for k in names}
    return res

def ruff(codes, *args):
    "What `ruff` with `args` makes of each of `codes`"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder)/f'{i}.py' for i in range(len(codes))]
        for p, code in zip(files, codes, strict=True): p.write_text(code, encoding='utf-8')
        command = Path(sys.executable).with_name('ruff')
        subprocess.run([command, *args, '--isolated', '--no-cache', '--quiet', folder], check=True)
        return [p.read_text(encoding='utf-8').strip() for p in files]

def wrapped(codes):
    "Each of `codes` in lines of at most `WIDTH`, where it is wider; a last semicolon, which hides an output, stays"
    options = f'line-length = {WIDTH}', 'format.quote-style = "preserve"', 'format.skip-magic-trailing-comma = true'
    res = ruff(codes, 'format', *(f'--config={o}' for o in options))
    def one(old, new): return new + ';'*old.rstrip().endswith(';') if max(map(len, old.split('\n'))) > WIDTH else old
    return [*map(one, codes, res)]

def folded(options, code):
    "The options of a cell; the code of a figure is folded where it is long"
    long = 'fig-cap' in options and code.count('\n') >= LONG
    return FOLD.format('Code of this figure') + options if long else options

def checks(node):
    "Whether a statement does nothing but check"
    named = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    return isinstance(node, ast.Assert) or named and node.value.func.id.startswith('test_')

def pieces(code):
    "The code in pieces, in their order: pairs of whether a piece does nothing but check, and its text"
    lines, res, end = code.splitlines(keepends=True), [], 0
    for node in ast.parse(code).body:
        text, only = ''.join(lines[end:node.end_lineno]), checks(node)
        if res and (node.lineno <= end or only == res[-1][0]): res[-1] = (only and res[-1][0], res[-1][1] + text)
        else: res.append((only, text))
        end = max(end, node.end_lineno)
    return res

def apart(cell):
    "The cells that a shown cell becomes, so that what does nothing but check is folded; outputs stay with the rest"
    (opts, code), res = split(cell), []
    parts = pieces(code.strip('\n'))
    told = max((i for i, (only, _) in enumerate(parts) if not only), default=-1)
    for i, (only, text) in enumerate(parts):
        own = opts if i == told else FOLD.format('Check') if only else ''
        res.append(mk_cell(own + text.strip('\n'), id=cell.id if i == told else f'{cell.id}-{i}'))
        if i == told: res[-1].outputs = cell.outputs
    return res if told >= 0 else [cell]

def complete(pages, package):
    "Give each of `pages`, files of processed notebooks with their sources, the imports that it needs, and narrow lines"
    nbs = {p: (read_nb(p), read_nb(source)) for p, source in pages.items()}
    codes = {p: '\n'.join(split(c)[1] for c in shown(nb)) for p, (nb, _) in nbs.items()}
    lines = {p: given(source, package) for p, (_, source) in nbs.items()}
    def changes(o): return '.' in o and o.partition('.')[0] not in sys.stdlib_module_names # fastai.callback.schedule
    effects = {p: {*filter(changes, lines[p])} if codes[p] else set() for p in nbs}
    needed = ['\n'.join(lines[p][o] for o in sorted(taken(codes[p]) & {*lines[p]} | effects[p])) for p in nbs]
    ours = f'--config=lint.isort.known-first-party = ["{package}"]'
    for (nb, _), code in zip(nbs.values(), ruff(needed, 'check', '--select=I', '--fix', ours), strict=True):
        first = FOLD.format('Imports of this page') + code
        if code: nb.cells.insert(nb.cells.index(shown(nb)[0]), mk_cell(first, id='imports'))
    cells = [c for nb, _ in nbs.values() for c in shown(nb)]
    for c, code in zip(cells, wrapped([split(c)[1] for c in cells]), strict=True):
        c.source = folded(split(c)[0], code) + code
    for p, (nb, _) in nbs.items():
        seen = {id(c) for c in shown(nb)} if p.parent.name != 'api' else set()
        nb.cells = [o for c in nb.cells for o in (apart(c) if id(c) in seen else [c])]
        write_nb(nb, p)
