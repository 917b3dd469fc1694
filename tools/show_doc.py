"""How the reference pages show a symbol: as nbdev does, with a table of its parameters in the place of comments.

`tools` has to be on the path."""
import re
from inspect import Parameter, getsource, isclass

from fastcore.docments import DocmentTbl
from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer


def source_of(sym) -> str:
    "The text of a function or class, '' where there is none in a file."
    try: return getsource(sym)
    except (OSError, TypeError): return ''

def place(sym) -> str:
    "Module and line of a symbol, as `learned_relu/plot.py#L20`; '' unless it is in one module alone."
    lib, source = get_config().lib_path, source_of(sym)
    texts = {p: p.read_text(encoding='utf-8') for p in lib.rglob('*.py')} if source else {}
    found = [(p, t[:t.index(source)].count('\n') + 1) for p, t in texts.items() if source in t]
    if len(found) != 1: return ''
    return f'{found[0][0].relative_to(lib.parent).as_posix()}#L{found[0][1]}'

def parameter_table(sym) -> str:
    "Markdown of the parameters; fastcore does not read the comment behind a `**name`."
    table = DocmentTbl(sym)
    source = source_of(sym.__init__ if isclass(sym) else sym) # a dataclass has no `__init__` in a file
    for name, said in re.findall(r'^\s*\*\*(\w+)[^#\n]*# (.+)$', source, flags=re.M):
        if name in table.dm: table.dm[name]['docment'] = said
    return readable(str(table))

def readable(text) -> str:
    "No type where it was only guessed from a default of None; a class by its name."
    return re.sub(r"<class '[\w.]*?(\w+)'>", r'\1', text.replace('| NoneType |', '| |'))

class ParameterTable(BasicMarkdownRenderer):
    "Source link, heading, call, docstring and a table of parameters."
    def _repr_markdown_(self):
        before, _, after = super()._repr_markdown_().partition(f'```python\n{self.dm}\n```')
        params = [p for p in self.sig.parameters.values() if p.name != 'self'] if self.sig else []
        at = place(self.sym) # nbdev takes the first module that has a name
        if at: before = re.sub(r'(?<=/blob/)([^/]+)/[^)]+', rf'\1/{at}', before)
        call = ', '.join(str(p.replace(annotation=Parameter.empty)) for p in params)
        return f'{before}```python\n{self.nm}({readable(call)})\n```\n\n{after.strip()}\n\n{parameter_table(self.sym)}'
