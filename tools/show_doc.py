"""How the reference pages show a symbol: as nbdev does, with a table of its parameters in the place of comments.

`tools` has to be on the path."""
import re
from inspect import Parameter, getsource, isclass

from fastcore.docments import DocmentTbl
from nbdev.showdoc import BasicMarkdownRenderer


def parameter_table(sym) -> str:
    "Markdown of the parameters; fastcore does not read the comment behind a `**name`."
    table = DocmentTbl(sym)
    try: source = getsource(sym.__init__ if isclass(sym) else sym)
    except (OSError, TypeError): source = '' # a dataclass has no `__init__` in a file
    for name, said in re.findall(r'^\s*\*\*(\w+)[^#\n]*# (.+)$', source, flags=re.M):
        if name in table.dm: table.dm[name]['docment'] = said
    return str(table)

class ParameterTable(BasicMarkdownRenderer):
    "Source link, heading, call, docstring and a table of parameters."
    def _repr_markdown_(self):
        before, _, after = super()._repr_markdown_().partition(f'```python\n{self.dm}\n```')
        params = [p for p in self.sig.parameters.values() if p.name != 'self'] if self.sig else []
        call = ', '.join(str(p.replace(annotation=Parameter.empty)) for p in params)
        return f'{before}```python\n{self.nm}({call})\n```\n\n{after.strip()}\n\n{parameter_table(self.sym)}'
