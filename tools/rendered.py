"What is mended on the pages of the site once they are rendered, and which of their links lead nowhere."
import html
import re
from html.parser import HTMLParser
from pathlib import PurePosixPath

import yaml
from latex2mathml.converter import convert


def draw_math(site):
    "Formulas as MathML in the place of TeX and the script that would fetch KaTeX from elsewhere"
    def formula(m):
        drawn = convert(html.unescape(m[2])[2:-2], display='block' if m[1] == 'display' else 'inline')
        return f'<span class="math {m[1]}">{drawn}</span>'
    for p in site.rglob('*.html'):
        txt = p.read_text(encoding='utf-8')
        txt = re.sub(r'<span class="math (inline|display)">(.*?)</span>', formula, txt, flags=re.S)
        p.write_text(re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*></script>', '', txt), encoding='utf-8')

def unlink(site):
    "Words of everybody's language, which nbdev takes for functions of that name in other rooms, are no links"
    words, to = '(?:backward|first|fit|forward)', r'[^")\s]*/api/(?P<room>[\w.]+?)\.(?:html|llms\.md)#\w+'
    links = {'.html': rf'<a href="{to}">(?P<word><code>{words}</code>)</a>',
             '.llms.md': rf'\[(?P<word>`{words}`)\]\({to}\)'}
    for ending, link in links.items():
        for p in site.rglob(f'*{ending}'):
            def word(m): return m[0] if m['room'] == p.name.removesuffix(ending) else m['word']
            p.write_text(re.sub(link, word, p.read_text(encoding='utf-8')), encoding='utf-8')

class Links(HTMLParser):
    "The ids of a page, and where its links lead"
    def __init__(self, page):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(page.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag == 'a' and 'href' in attrs: self.links.append(attrs['href'])

def broken(site, md, base):
    "Links that lead nowhere: within `site`, and from README.md to it"
    pages = {p.resolve(): Links(p) for p in site.rglob('*.html')}
    links = [(p, o) for p, page in pages.items() for o in page.links]
    ours = [o for o in re.findall(r'\]\(([^)\s]+)\)', md) if o.startswith(base)]
    links += [((site/'index.html').resolve(), o.removeprefix(base)) for o in ours]
    for p, o in links:
        if re.match(r'\w+:|//', o): continue
        path, _, mark = o.partition('#')
        to = (p.parent/path).resolve() if path else p
        if to.is_dir(): to /= 'index.html'
        if not to.exists() or (mark and to in pages and mark not in pages[to].ids): yield f'{p.name}: {o}'

def link_sources(site, names):
    "Links to edit a page and to its source lead to the file in the repository, whose name the site shortens"
    for new, old in names.items():
        p = site/PurePosixPath(new).with_suffix('.html')
        p.write_text(p.read_text(encoding='utf-8').replace(f'/main/nbs/{new}"', f'/main/nbs/{old}"'), encoding='utf-8')

def from_root(page, root):
    "The links of a page that is shown at whatever address was asked for, from the path `root` of the site on"
    txt = page.read_text(encoding='utf-8').replace('content="./"', f'content="{root}"')
    page.write_text(re.sub(r'((?:href|src)=")(?!\w+:|[#/])', rf'\1{root}', txt), encoding='utf-8')

def explain(site, names):
    "Link words of the glossary where they first stand in the text of the pages `names`, but common ones"
    common = {'average', 'channel', 'curve', 'interval', 'kernel', 'kind', 'pair', 'recipe', 'record', 'seed'}
    terms = re.findall(r'<h2[^>]*data-anchor-id="([\w-]+)">([^<]+)', (site/'glossary.html').read_text(encoding='utf-8'))
    terms = {name: mark for mark, name in terms if name not in common}
    word = re.compile(rf'(?<![\w-])({"|".join(sorted(terms, key=len, reverse=True))})(?![\w-])')
    for name in names:
        p = site/PurePosixPath(name).with_suffix('.html')
        left, inside, parts = dict(terms), [], re.split(r'(<[^>]+>)', p.read_text(encoding='utf-8'))
        def link(m):
            mark = left.pop(m[1], None)
            return f'<a class="term" href="{"../"*name.count("/")}glossary.html#{mark}">{m[1]}</a>' if mark else m[1]
        for i, o in enumerate(parts):
            if m := re.match(r'<(/?)(p|a|code|figure|math)\b', o): inside = inside[:-1] if m[1] else [*inside, m[2]]
            elif inside == ['p']: parts[i] = word.sub(link, o)
        p.write_text(''.join(parts), encoding='utf-8')

def mend_copies(site):
    "Links of stored outputs in the Markdown copies, which lead to notebooks, lead to the copies of these"
    link = re.compile(r'(\]\((?!\w+:)[^)\s]*?)(?:\d+[a-z0-9]*_)?([\w.]+)\.(?:ipynb|qmd)(?=[)#])')
    for p in site.rglob('*.llms.md'):
        p.write_text(link.sub(r'\1\2.llms.md', p.read_text(encoding='utf-8')), encoding='utf-8')

def fill_listings(site):
    "The tables that list pages, as lists in the Markdown copies, which leave them empty"
    row = re.compile(r'<a href="([^"]+)\.html" class="title[^>]*>(.*?)</a></td><td><span[^>]*>(.*?)</span>', re.S)
    for p in site.rglob('index.llms.md'):
        page = p.with_name('index.html').read_text(encoding='utf-8')
        def items(m):
            table = re.search(rf'id="listing-{m[1]}".*?</table>', page, re.S)
            lines = (f'- [{name}]({to}.llms.md): {about}' for to, name, about in row.findall(table[0]))
            return html.unescape('\n'.join(lines))
        p.write_text(re.sub(r'<div id="(\w+)">\n\n</div>', items, p.read_text(encoding='utf-8')), encoding='utf-8')

def contents(items, part=''):
    "The pages of a sidebar in their order, each with the names of the parts that it is in"
    for o in items:
        if isinstance(o, str): yield o, part
        else:
            first = [o['href']] if 'href' in o else []
            yield from contents(first + o['contents'], f'{part}: {o["section"]}'.strip(': '))

def llms_txt(site, sidebar, base):
    "The list of pages for models, by the parts of the sidebar, each page with what it says of itself"
    old = (site/'llms.txt').read_text(encoding='utf-8')
    parts = {}
    said = yaml.safe_load(sidebar.read_text(encoding='utf-8'))['website']['sidebar']
    for name, part in contents(said['contents']):
        to = PurePosixPath(name).with_suffix('')
        page = (site/f'{to}.html').read_text(encoding='utf-8')
        told = r'<title>(.*?)(?: – \w+)?</title>', r'name="description" content="(.*?)"'
        title, about = (html.unescape(re.search(o, page)[1]) for o in told)
        parts.setdefault(part or 'Start', []).append(f'- [{title}]({base}{to}.llms.md): {about}')
    lists = [f'## {part}\n\n' + '\n'.join(o) for part, o in parts.items()]
    (site/'llms.txt').write_text('\n\n'.join([old.partition('## Pages')[0].strip(), *lists]) + '\n', encoding='utf-8')
