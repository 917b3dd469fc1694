"The docs site, built and read in a real browser: what a reader sees, finds and can move."
import functools
import gzip
import http.server
import importlib
import itertools
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from fastcore.nbio import read_nb
from fontTools.ttLib import TTFont
from nbdev.config import get_config
from PIL import Image

import learned_relu.all
from learned_relu.reference import learned_relu_reference

REPO = Path(__file__).parents[1]
SOURCES = sorted(o.relative_to(REPO/'nbs') for o in (REPO/'nbs').rglob('*') if o.suffix in ('.ipynb', '.qmd') and not o.name.startswith(('.', '_')))
PAGES = [o for o in SOURCES if o.stem != '404']  # which is shown in the place of pages that are not there
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ('headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync '
         'disable-dev-shm-usage').split()

# what the browser is asked
SEEN = """const titled = o => !!(o.closest('figure') || document.createElement('p')).querySelector('figcaption');
return {title: document.title, about: document.querySelector('meta[name=description]')?.content, headings: document.querySelectorAll('h1').length,
        hidden: [...document.querySelectorAll('main pre')].filter(o => o.scrollWidth > o.clientWidth + 1).map(o => o.textContent.slice(0, 80)),
        pictures: [...document.images].map(o => [o.naturalWidth, o.alt, titled(o)]),
        formulas: [...document.querySelectorAll('math')].map(o => [o.getBoundingClientRect().height, o.textContent])}"""
COLOURS = r"""const colour = o => getComputedStyle(o).backgroundColor;
const behind = o => { for (; o; o = o.parentElement) if (!/^rgba.*, 0(\.[0-4]\d*)?\)$/.test(colour(o))) return colour(o) };
const kinds = ['p', 'li', 'h1', 'h2', 'h3', 'code', 'a', 'button', 'th', 'td', 'dt', 'dd', 'label', 'figcaption'];
const read = [...document.querySelectorAll(kinds.map(o => 'main ' + o).join())];
return read.filter(o => o.offsetParent).map(o => [getComputedStyle(o).color, behind(o) || 'rgb(255, 255, 255)', o.textContent.slice(0, 40)])"""
OUTSIDE = r"""const moves = o => o.tagName != 'MAIN' && /auto|scroll/.test(getComputedStyle(o).overflowX);
const scrolls = o => { for (; o; o = o.parentElement) if (moves(o)) return true };
return [...document.querySelectorAll('main *')].filter(o => o.getBoundingClientRect().right > innerWidth + 1 && !scrolls(o))
    .map(o => o.outerHTML.slice(0, 80)).concat(document.documentElement.scrollWidth > innerWidth ? ['the page'] : [])"""
MOVE = """[...document.querySelectorAll('.curve-widget input')].forEach((o, i) => {
    o.value = arguments[0][i]; o.dispatchEvent(new Event('input', {bubbles: true})) });
return Object.fromEntries([...document.querySelectorAll('.curve-widget dd')].map(o => [o.dataset.of, +o.textContent]))"""

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason='smalldocs needs Python 3.11')


def html(source): return re.sub(r'^\d+[a-z0-9]*_', '', source.name).removesuffix(source.suffix) + '.html'


@pytest.fixture(scope='module')
def site():
    "The site as it is published; building it fails on links that lead nowhere and on a README that is out of date"
    done = subprocess.run([sys.executable, 'tools/docs.py', '--check'], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return get_config().doc_path


@pytest.fixture(scope='module')
def browser():
    if not (BROWSER and DRIVER): pytest.skip('no Chromium with its driver is installed')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for o in FLAGS: options.add_argument(f'--{o}')
    options.set_capability('goog:loggingPrefs', dict(browser='ALL'))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope='module')
def url(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


def see(browser, width, height=900, scheme='light'):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=False))
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=scheme)]))


@pytest.mark.parametrize('source', PAGES, ids=str)
def test_a_page_loads_with_its_figures_and_formulas_and_fits_a_phone(source, browser, url):
    see(browser, 1280)
    browser.get(url + str(source.with_name(html(source)).as_posix()))
    assert [o['message'] for o in browser.get_log('browser') if o['level'] in ('SEVERE', 'WARNING')] == []
    said = browser.execute_script(SEEN)
    assert said['title'] and said['about'] and said['headings'] == 1 and not said['hidden']
    assert all(width > 0 and len(alt) > 20 and titled for width, alt, titled in said['pictures'])
    cells = read_nb(REPO/'nbs'/source).cells if source.suffix == '.ipynb' else []
    stored = [o for c in cells for o in c.get('outputs', [])]
    assert len(said['pictures']) == sum('image/png' in o.get('data', {}) for o in stored) + (source.name == 'index.ipynb')
    prose = '\n'.join(o.source for o in cells if o.cell_type == 'markdown')
    formulas = re.findall(r'\$\$.+?\$\$|\$[^$\n]+\$', re.sub(r'```.*?```|`[^`]*`', '', prose, flags=re.S), flags=re.S)
    assert len(said['formulas']) == len(formulas) and all(height > 5 and '\\' not in text for height, text in said['formulas'])
    see(browser, 390)
    assert browser.execute_script(OUTSIDE) == [] # what is wider than the screen, and cannot be scrolled by itself


def test_types_and_links_are_those_that_a_reader_means(site):
    pages = {o.stem: o.read_text() for o in site.rglob('*.html')}
    copies = {o.name.removesuffix('.html.md').removesuffix('.llms.md'): o.read_text() for o in [*site.rglob('*.md'), REPO/'README.md']}
    assert len(pages) > 100 and not [k for k, v in pages.items() if 'NoneType' in v or '&lt;class ' in v]
    assert len(copies) > 100 and not [k for k, v in copies.items() if '[[`' in v]  # a link within a link
    assert not [k for k, v in copies.items() if re.search(r'\]\((?!\w+:)[^)\s]*\.(ipynb|qmd)', v)]
    words, to = '(?:backward|first|fit|forward)', r'/api/([\w.]+)\.html'
    for texts, link in (pages, rf'{to}#{words}"><code>'), (copies, rf'\[`{words}`\]\([^)\s]*{to}#'):
        led = {k: set(re.findall(link, v)) for k, v in texts.items()}
        assert all(v <= {k} for k, v in led.items()) and any(led.values())


def test_what_a_page_shows_names_nothing_that_it_does_not_give(site, tmp_path):
    shown = {o: o.read_text() for o in site.rglob('*.llms.md')}
    codes = {k: re.findall(r'^```python\n(.*?)^```', v, flags=re.M | re.S) for k, v in shown.items()}
    stars = {}
    for i, (page, blocks) in enumerate(codes.items()):
        cells = [o for o in blocks if not re.fullmatch(r'[\w.]+\([^\n]*\)\n', o)]  # how a function is called, above its table
        (tmp_path/f'page{i}.py').write_text('\n\n'.join(cells))
        given = {k for o in cells for m in re.findall(r'^from (\S+) import \*', o, flags=re.M) for k in dir(importlib.import_module(m))}
        stars[f'page{i}.py'] = page.name, given
    command = [Path(sys.executable).with_name('ruff'), 'check', '--isolated', '--select=F821,F405', '--output-format=json', tmp_path]
    said = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    missing = {(stars[Path(o['filename']).name][0], name) for o in said for name in [re.search('`(.+?)`', o['message'])[1]]
               if name not in stars[Path(o['filename']).name][1]}
    assert len(stars) > 100 and sum(map(len, codes.values())) > 500 and missing == set()


def test_lines_of_code_fit_beside_the_lists(site):
    shown = [o for p in site.rglob('*.llms.md') for o in re.findall(r'^```python\n(.*?)^```', p.read_text(), flags=re.M | re.S)]
    wide = [o for o in shown if max(map(len, o.split('\n'))) > 72]  # a text or a comment that has no place to break
    assert len(shown) > 500 and len(wide) < len(shown)/10


def test_every_promised_name_has_a_line_and_a_page(site):
    text = (site/'api/names.html').read_text()
    rows = re.findall(r'<td><a href="([^"]+)">([\w.]+)</a><code>\(', text)
    fastai = [k for k in vars(learned_relu.all) if not k.startswith('_') and k not in learned_relu.__all__]
    assert [name for _, name in rows] == [*learned_relu.__all__, *fastai, 'Learner.to_learned_relu', 'Learner.to_relu']
    for to, name in rows:
        page, _, mark = to.partition('#')
        assert f'id="{mark}"' in (site/'api'/page).read_text() and name.lower() == mark


def test_pages_say_where_their_source_is_and_how_they_look_on_a_card(site):
    for source in SOURCES:
        text = (site/source.with_name(html(source))).read_text()
        assert {f'/{o}/main/nbs/{source.as_posix()}"' in text for o in ('edit', 'blob')} == {True}, source
        cards = dict(re.findall(r'<meta property="og:(\w+)" content="([^"]+)"', text))
        assert set(cards) >= {'title', 'description', 'image'}, source
    image = site/cards['image'].removeprefix(get_config().doc_url)
    with Image.open(image) as picture: assert picture.format == 'PNG' and min(picture.size) >= 200


def test_an_address_without_a_page_leads_back_from_everywhere(site):
    links = re.findall(r'(?:href|src)="([^"#]+)"', (site/'404.html').read_text())
    base = urlparse(get_config().doc_url).path
    ours = [o for o in links if not re.match(r'https?://', o)]
    assert base == '/learned_relu/' and len(ours) > 20 and [o for o in ours if not o.startswith(base)] == []
    assert [o for o in ours if not (site/o.removeprefix(base).partition('?')[0]).exists()] == []


def test_the_front_page_is_light(site, browser, url):
    see(browser, 1280)
    browser.get(url)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(o => o.name)")
    files = [site/'index.html', *(site/o.removeprefix(url).partition('?')[0] for o in loaded)]
    sent = {o.name: len(o.read_bytes() if o.suffix in ('.png', '.woff') else gzip.compress(o.read_bytes())) for o in files}
    assert len(sent) > 8 and 'bootstrap-icons.woff' in sent and sum(sent.values()) < 300_000, sent
    drawn = browser.execute_script("return [...document.querySelectorAll('i.bi')].map(o => getComputedStyle(o, '::before').content)")
    codes = TTFont(site/'site_libs/bootstrap-icons/fonts/bootstrap-icons.woff').getBestCmap()
    drawn = [o.strip('"') for o in drawn if o not in ('none', 'normal')]
    assert len(drawn) > 3 and [o for o in drawn if ord(o) not in codes] == []


def test_nothing_comes_from_elsewhere(site):
    pages = {str(o.relative_to(site)): o.read_text() for o in site.rglob('*.html')}
    loads = re.compile(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]*(?:stylesheet|icon|preload)[^>]*>')
    assert {k: o for k, v in pages.items() for o in loads.findall(v) if re.search('="(https?:)?//', o)} == {}
    used = {o for v in pages.values() for o in re.findall(r'href="[^"]*?(site_libs/[^"]+\.css)"', v)}
    assert used and [o for o in used if re.search(r'(?:@import|url\()\W*(?:https?:)?//', (site/o).read_text())] == []


def test_search_finds_learned_relu(browser, url):
    see(browser, 1280)
    browser.get(url)
    box = browser.find_element('css selector', 'input[type=search], #quarto-search input')
    box.send_keys('LearnedRelu')
    from selenium.webdriver.support.ui import WebDriverWait
    found = 'return [...document.querySelectorAll("a.search-result")].find(o => o.offsetParent && o.textContent.includes("LearnedRelu"))?.href'
    browser.get(WebDriverWait(browser, 10).until(lambda b: b.execute_script(found)))
    assert browser.find_element('css selector', 'h1').text == 'Layers' and '#learnedrelu' in browser.current_url


@pytest.mark.parametrize('name', [o.with_name(html(o)).as_posix() for o in PAGES])
def test_dark_mode_can_be_read(name, browser, url):
    see(browser, 1280, scheme='dark')
    browser.get(url + name)
    read = browser.execute_script(COLOURS)
    def light(c):
        r = [float(o)/255 for o in re.findall(r'[\d.]+', c)[:3]]
        return sum(w*(o/12.92 if o <= .04045 else ((o + .055)/1.055)**2.4) for w, o in zip((.2126, .7152, .0722), r, strict=True))
    def contrast(a, b): return (max(light(a), light(b)) + .05)/(min(light(a), light(b)) + .05)
    assert len(read) > 5 and light(browser.execute_script('return getComputedStyle(document.body).backgroundColor')) < .1
    assert [(text, front, back) for front, back, text in read if contrast(front, back) < 4.5] == [] # what WCAG asks


def test_the_button_turns_dark_mode_on_and_off(browser, url):
    see(browser, 1280)
    browser.get(url)
    def back(): return browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    light = back()
    button = browser.find_element('css selector', '.quarto-color-scheme-toggle')
    button.click()
    dark = back()
    button.click()
    assert back() == light != dark


def drawn(browser, xs):
    "Heights of the curve at `xs`, read off the drawing with its own ticks"
    marks = browser.execute_script("""const svg = document.querySelector('.curve-widget svg');
        return [[...svg.querySelectorAll('text')].map(o => [o.textContent, +o.getAttribute('x'), +o.getAttribute('y')]),
                svg.querySelector('path.line.a').getAttribute('d')]""")
    at = {}
    for text, px, py in marks[0]: at.setdefault(text, []).append((px, py))
    (left, _), middle = at['-4'][0], at['0'][0][0]
    (_, zero), (_, one) = at['0'][-1], at['1'][-1]
    ends = [tuple(map(float, o)) for o in re.findall(r'[ML](\S+?) ([-\d.e]+)', marks[1])]
    points = sorted(((px - middle)/(middle - left)*4, (zero - 4 - py)/(zero - one)) for px, py in ends)
    return np.interp(xs, *np.array(points).T).tolist()


@pytest.mark.parametrize('scheme', ['http', 'file'])
def test_the_widget_says_what_the_library_says(scheme, site, browser, url):
    see(browser, 1280)
    browser.get(url if scheme == 'http' else (site/'index.html').resolve().as_uri()) # no server is needed
    names = 'leak', 'sub', 'maxv', 'x'
    three = .3, .5, 1.5
    for values in (*three, -1.), (*three, 0.), (*three, 2.), (*three, 3.2), (0., 0., 10., -4.), (.5, 1., .5, -4.), (.05, .25, 10., .1):
        got = browser.execute_script(MOVE, values)
        p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in zip(names, values, strict=True)}
        y = learned_relu_reference(p['x'].reshape(1, 1), p['leak'], p['sub'], p['maxv'])
        y.sum().backward()
        want = dict(y=y.item(), dx=p['x'].grad.item(), **{f'd{k}': p[k].grad.item() for k in names[:3]})
        assert got == pytest.approx(want, abs=5.1e-5), values
        x = torch.linspace(-3.9, 3.9, 40, dtype=torch.float64)
        y = learned_relu_reference(x[:, None], *(p[k].detach() for k in names[:3]))[:, 0]
        assert drawn(browser, x) == pytest.approx(y.tolist(), abs=.01), values


def test_the_widget_goes_by_keyboard_and_says_what_it_is(browser, url):
    from selenium.webdriver.common.keys import Keys
    see(browser, 1280)
    browser.get(url)
    sliders = browser.find_elements('css selector', '.curve-widget input')
    assert [(o.aria_role, o.accessible_name) for o in sliders] == [('slider', o) for o in ('leak', 'sub', 'maxv', 'x')]
    def drawn(): return [browser.find_element('css selector', '.curve-widget ' + o).get_attribute('innerHTML') for o in ('dl', 'svg g')]
    for o in sliders:
        before = drawn()
        o.send_keys(Keys.ARROW_RIGHT)
        values, lines = (a != b for a, b in zip(before, drawn(), strict=True))
        assert lines and (values or o.accessible_name == 'maxv') # at x = -1 no cap is reached
    relu = browser.find_element('xpath', "//button[text()='ReLU']")
    relu.send_keys(Keys.ENTER)
    assert [float(o.get_attribute('value')) for o in sliders[:3]] == [0, 0, 10]
    drawings = browser.find_elements('css selector', '.curve-widget svg')
    assert [o.accessible_name.split(',')[0] for o in drawings] == ['The curve', 'Its slope', 'What reaches the parameters']
    assert 'slope 0 below 0 and 1 above' in drawings[0].accessible_name
    from selenium.webdriver.support.ui import WebDriverWait
    def said(b): return b.find_element('css selector', '.curve-widget [role=status]').get_attribute('textContent')
    WebDriverWait(browser, 5).until(lambda b: said(b).startswith('At x -0.9, y is 0, dy/dx is 0, dy/dleak is -0.9,'))


@pytest.mark.parametrize('name', ['index.html', 'results.html', 'tutorials/first_training.html', 'api/layers.html', 'glossary.html'])
def test_all_that_is_pressed_has_a_name_and_is_reached_in_the_order_of_the_page(name, browser, url):
    from selenium.webdriver.common.keys import Keys
    see(browser, 1280)
    browser.get(url + name)
    there = [o for o in browser.find_elements('css selector', 'a[href], button, input, summary, [tabindex]') if o.is_displayed()]
    assert len(there) > 20 and [o.get_attribute('outerHTML')[:90] for o in there if not o.accessible_name.strip()] == []
    assert browser.execute_script('return document.documentElement.lang') == 'en'
    assert browser.execute_script("return [...document.querySelectorAll('[tabindex]')].filter(o => o.tabIndex > 0).length") == 0
    levels = browser.execute_script("return [...document.querySelectorAll('main :is(h1, h2, h3, h4)')].map(o => +o.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))  # no level is left out
    seen = []
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(browser.switch_to.active_element)
    after = 'return arguments[0].compareDocumentPosition(arguments[1]) & 4'
    assert len(set(seen)) == 12 and all(browser.execute_script(after, a, b) for a, b in itertools.pairwise(seen))


def test_a_word_of_the_glossary_leads_there_where_it_first_stands(site):
    linked = {p: re.findall(r'<a class="term" href="(?:\.\./)?glossary\.html#([\w-]+)">([^<]+)</a>', p.read_text()) for p in site.rglob('*.html')}
    marks = dict(re.findall(r'data-anchor-id="([\w-]+)">([^<]+)', (site/'glossary.html').read_text()))
    assert len({o for v in linked.values() for o in v}) > 8 and sum(map(bool, linked.values())) > 15
    for page, found in linked.items():
        assert len(found) == len(set(found)) and all(marks[mark] == word for mark, word in found), page.name
        assert not found or page.parent.name != 'api' and page.name != 'glossary.html'
    first = (site/'tutorials/learn_once_and_bake.html').read_text()
    text = re.sub(r'<(pre|code|h\d|a (?!class="term")[^>]*|figure|title|nav|meta[^>]*).*?</\1>', '', first[first.index('</header>'):], flags=re.S)
    assert re.search(r'\bprofile\b(?!">)', text).start() == re.search(r'profile</a>', text).start()


def test_the_bar_leads_to_the_parts(browser, url):
    see(browser, 1280)
    browser.get(url)
    links = {o.text.strip(): o.get_attribute('href') for o in browser.find_elements('css selector', '#navbarCollapse .navbar-nav.me-auto a')}
    assert list(links) == ['Start', 'Tutorials', 'By task', 'Explanations', 'Reference', 'Results']
    for name, to in list(links.items())[1:]:
        browser.get(to)
        assert browser.find_element('css selector', 'h1').text == name


def test_a_reader_of_the_reference_meets_layers_first_and_internals_last(browser, url):
    see(browser, 1280)
    browser.get(url + 'api/index.html')
    parts = [o.text for o in browser.find_elements('css selector', 'main h2')]
    assert parts[0] == 'Layers and models' and parts[-1] == 'Internals'
    def listed(part): return [o.text for o in browser.find_elements('css selector', f'#listing-{part} tbody a')]
    assert listed('layers')[0] == 'Layers' and len(listed('internals')) > 4
    def aside(which): return [o.get_attribute('textContent') for o in browser.find_elements('css selector', f'#quarto-sidebar {which} .menu-text')]
    inner = '.sidebar-item-section .sidebar-item-section'
    assert aside(f'{inner} > .sidebar-item-container') == parts
    assert aside(f'{inner} li') == [o for part in ('layers', 'training', 'comparing', 'internals') for o in listed(part)]


def contents(items):
    for o in items:
        if isinstance(o, str): yield o
        else: yield from filter(None, [o.get('href')]); yield from contents(o.get('contents', []))


def test_every_page_is_in_the_sidebar_and_in_the_list_of_its_part():
    listed = list(contents(yaml.safe_load((REPO/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']))
    assert sorted(listed) == sorted(o.as_posix() for o in PAGES)
    def head(part): return yaml.safe_load((REPO/'nbs'/part/'index.qmd').read_text().split('---')[1])
    def pages(part): return [o for o in listed if o.startswith(part) and o.endswith('ipynb')]
    assert [f'api/{o}' for group in head('api')['listing'] for o in group['contents']] == pages('api')
    for part in 'tutorials', 'tasks', 'explanations':
        orders = [re.search(r'^- order: (\d+)$', read_nb(REPO/'nbs'/o).cells[0].source, flags=re.M) for o in pages(part)]
        assert all(orders) and [int(o[1]) for o in orders] == list(range(1, len(orders) + 1))


def test_a_module_has_its_page_with_its_names_and_their_source(site):
    for info in pkgutil.walk_packages(learned_relu.__path__, 'learned_relu.'):
        name = info.name.removeprefix('learned_relu.')
        if info.ispkg or name == 'all' or name.startswith('_'): continue
        module, page = importlib.import_module(info.name), (site/f'api/{name}.html').read_text()
        told = [k for k in module.__all__ if callable(getattr(module, k))]
        assert [k for k in told if not re.search(rf'id="(?:\w+\.)?{k.lower()}"', page)] == []
        assert not told or f'/blob/main/learned_relu/{name.replace(".", "/")}.py#L' in page and '>Details</' in page, name


@pytest.mark.parametrize('name', ['cpu', 'triton', 'eager'])  # which have functions of one name
def test_source_links_lead_to_the_module_of_their_page(site, name):
    page = (site/f'api/kernels.{name}.html').read_text()
    assert set(re.findall(r'/blob/main/([\w/]+)\.py#L\d+"', page)) == {f'learned_relu/kernels/{name}'}


def test_llms_txt_names_every_page(site):
    named = {o.removeprefix(get_config().doc_url.rstrip('/')).lstrip('/') for o in re.findall(r'\]\(([^)]+)\)', (site/'llms.txt').read_text())}
    assert [o for o in PAGES if o.with_name(html(o)).as_posix().replace('.html', '.llms.md') not in named] == []


def test_models_read_lists_in_the_order_of_the_site(site):
    parts = re.findall(r'^## (.+)$', (site/'llms.txt').read_text(), flags=re.M)
    assert parts[:2] == ['Start', 'Tutorials'] and parts.index('Reference: Layers and models') < parts.index('Reference: Internals')
    for part in 'tutorials', 'tasks', 'explanations', 'api':
        text = (site/part/'index.llms.md').read_text()
        pages = [o for o in PAGES if o.parent.name == part and o.suffix == '.ipynb']
        assert [o for o in pages if f']({html(o).replace(".html", ".llms.md")}): ' not in text] == [], part


def points(line): return torch.tensor([[float(v) for v in o.split(',')] for o in line.get('points').split()], dtype=torch.float64).T


def test_the_drawn_curves_are_curves():
    lines = ElementTree.parse(REPO/'nbs/curve.svg').findall('.//{*}polyline')
    assert len(lines) == 3
    for line in lines:
        x, y = points(line)
        values = (torch.tensor(float(line.get(f'data-{k}')), dtype=torch.float64) for k in ('leak', 'sub', 'maxv'))
        torch.testing.assert_close(y, learned_relu_reference(x[:, None], *values)[:, 0])


def test_the_icon_draws_the_curve():
    line = ElementTree.parse(REPO/'nbs/favicon.svg').find('{*}polyline')
    x, y = points(line)
    title = ElementTree.parse(REPO/'nbs/favicon.svg').find('{*}title').text
    leak, sub, maxv = (torch.tensor(float(o), dtype=torch.float64) for o in re.findall(r'[\d.]+', title))
    torch.testing.assert_close(-y, learned_relu_reference(x[:, None], leak, sub, maxv)[:, 0])
