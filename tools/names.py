"Every promised name on one page: how it is called, and one line of what it does, read off the library."
import re
from importlib.metadata import entry_points
from inspect import Parameter, getdoc, signature

from show_doc import readable

import learned_relu.all
from learned_relu.learner import Learner

METHODS = {f'Learner.{o}': getattr(Learner, o) for o in ('to_learned_relu', 'to_relu')}

def arguments(sym):
    "What it is called with, without types; a method for each event, which every callback takes, is left out"
    given = [p.replace(annotation=Parameter.empty) for p in signature(sym).parameters.values()]
    return readable(', '.join(str(p) for p in given if not re.match('self$|before_|after_', p.name)))

def line(name, sym, command=False):
    "A row: the name as a link to its page, what it is called with, what it does"
    page, about = sym.__module__.removeprefix('learned_relu.'), ' '.join(getdoc(sym).split())
    about = re.split(r'(?<=[.;]) ', about)[0].rstrip('.;').replace('|', '\\|')
    return f'| [{name}]({page}.ipynb#{name.lower()})`{" --help" if command else f"({arguments(sym)})"}` | {about} |'

def groups():
    "The names by the ring that they need"
    ours = {k: o for k, o in vars(learned_relu.all).items() if not k.startswith('_')}
    fastai = {k: o for k, o in ours.items() if k not in learned_relu.__all__} | METHODS
    scripts = [o for o in entry_points(group='console_scripts') if o.module.startswith('learned_relu.')]
    torch = {k: ours[k] for k in learned_relu.__all__}
    return dict(torch=torch, fastai=fastai, commands={o.name: o.load() for o in sorted(scripts)})

def fill(page):
    "Write the tables into the places that `page` leaves for them"
    text = page.read_text(encoding='utf-8')
    for part, syms in groups().items():
        rows = [line(k, o, part == 'commands') for k, o in syms.items()]
        text = text.replace(f'::: {{#{part}}}\n:::', '\n'.join(['| call | what it does |', '|---|---|', *rows]))
    page.write_text(text, encoding='utf-8')
