"The icons that a site shows, out of the two thousand of their font: nobody has to load the others."
import re

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

_rule = re.compile(r'\.bi-([\w-]+)::before\{content:"\\(\w+)"\}')
_source = re.compile(r'src:url\("fonts/bootstrap-icons\.woff2[^}]*(?=\})')

def used(site, styles):
    "The codes of the icons that pages and scripts name, and of those that style sheets draw"
    texts = ''.join(p.read_text(encoding='utf-8') for o in ('*.html', '*.js') for p in site.rglob(o))
    drawn = (site/'site_libs'/'smalldocs.css').read_text(encoding='utf-8')
    names = set(re.findall(r'\bbi-([\w-]+)', texts + drawn))
    named = {code for name, code in _rule.findall(styles) if name in names}
    return named | {o.lower() for o in re.findall(r'content: ?"\\(f\w+)"', drawn, flags=re.I)}

def lighten(site):
    "Leave in the font, and in its style sheet, the icons that are used"
    folder = site/'site_libs'/'bootstrap-icons'
    sheet, file = folder/'bootstrap-icons.min.css', folder/'fonts'/'bootstrap-icons.woff'
    styles = sheet.read_text(encoding='utf-8')
    codes, font = used(site, styles), TTFont(file)
    subsetter = Subsetter(Options())
    subsetter.populate(unicodes=[int(o, 16) for o in codes])
    subsetter.subset(font)
    font.flavor = 'woff'
    font.save(file)
    file.with_suffix('.woff2').unlink()
    styles = _rule.sub(lambda m: m[0] if m[2] in codes else '', styles)
    sheet.write_text(_source.sub('src:url("fonts/bootstrap-icons.woff") format("woff")', styles), encoding='utf-8')
