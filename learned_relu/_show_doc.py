"How the reference pages show a symbol: as nbdev does, with a table of its parameters in the place of comments. For building the site only."
from inspect import Parameter

from fastcore.docments import DocmentTbl
from nbdev.showdoc import BasicMarkdownRenderer


class ParameterTable(BasicMarkdownRenderer):
    "Source link, heading, call, docstring and a table of parameters."
    def _repr_markdown_(self):
        before, _, after = super()._repr_markdown_().partition(f'```python\n{self.dm}\n```')
        params = [p.replace(annotation=Parameter.empty) for p in self.sig.parameters.values() if p.name != 'self'] if self.sig else []
        return f'{before}```python\n{self.nm}({", ".join(map(str, params))})\n```\n\n{after.strip()}\n\n{DocmentTbl(self.sym)}'
