"""Keep what is tried on the library, and what came of it, as a record: `python tools/reliability.py FOLDER`.

Runs the tests that say `tried`, slow ones too; `--from FILE ...` adds up what `pytest --junitxml=FILE` wrote."""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from learned_relu.bench.record import made_by

ROOT = Path(__file__).parents[1]
# what is tried, as the mark says -> what has to come of it
TRIED = {
    'random inputs, their values and gradients': 'those of the formula, within the bound that is stated',
    "a check of PyTorch's own suite": 'whatever nn.PReLU passes is passed',
    'a tensor without ordinary memory': "PyTorch's result or its refusal, never the end of the process",
    'a case under the sanitizers': 'nothing read or written beside a tensor, nothing undefined',
    'an exception or a cancellation in an event of a fit': 'no trace; the next fit trains the same bits',
    'a number that is not finite in a fit': 'activation parameters stay finite, learn on, and it is said',
    'a batch of NaN, of infinities, or a million times too large': 'activation parameters stay finite and in bounds',
    'a run of a comparison interrupted': 'it goes on to the end that it would have had, to the bit',
    'a process or a machine killed': 'nothing finished is lost, what was half done is done again',
    'a disk that is full or refuses': 'what was there stays whole, and a sentence',
    'a file damaged, cut or foreign': 'refused or made again, never other weights, images or code',
    'a record, profile or recipe changed': 'a sentence that names file and field, or a table',
    'a compiler that fails': 'tried once and named; PyTorch computes instead',
    'an image that is none': 'named, or left out where that was asked for',
    'a hostile name': 'shown escaped, and no path leaves its directory',
}


def counted(files):
    "What was tried, how often and in how many tests, and which of these failed; a test counts once"
    tried, tests, failed = Counter(), Counter(), defaultdict(set)
    cases = defaultdict(list) # of one test, which is there again where what comes after it failed, too
    for file in files:
        for o in ElementTree.parse(file).iter('testcase'): cases[o.get('classname'), o.get('name')].append(o)
    for (_, name), found in cases.items():
        if all(o.find('skipped') is not None for o in found): continue
        for o in found[0].iter('property'):
            what = o.get('name').removeprefix('tried: ')
            if what == o.get('name'): continue
            tried[what] += int(o.get('value'))
            tests[what] += 1
            if any(o.find(k) is not None for o in found for k in ('failure', 'error')): failed[what].add(name)
    def row(what): return dict(tried=tried[what], tests=tests[what], failed=sorted(failed[what]))
    return [dict(what=what, want=want, **row(what)) for what, want in TRIED.items()]


def said():
    "Test file -> what its tests say that they try"
    says = re.compile(r"""(?:mark\.tried\(|_property\()'(?:tried: )?((?:[^'\\]|\\')*)'""")
    found = {o: says.findall(o.read_text(encoding='utf-8')) for o in sorted((ROOT/'tests').glob('test_*.py'))}
    return {str(k): {o.replace("\\'", "'") for o in v} for k, v in found.items() if v}


def run(file, tests):
    "These tests, slow ones too"
    command = [sys.executable, '-m', 'pytest', '-m', 'slow or not slow', f'--junitxml={file}', *tests]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status not in (0, 1): sys.exit(f'pytest ended with {status}, so that not all was tried: nothing is written')


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('folder', type=Path, help='of the new record')
    ask.add_argument('--from', dest='given', type=Path, nargs='+', help='what pytest --junitxml wrote')
    args = ask.parse_args()
    to = args.folder/'tried.json'
    if to.exists(): sys.exit(f'{to} is there already: a record never changes, pass another folder')
    tests = said()
    if unknown := set().union(*tests.values()) ^ TRIED.keys():
        sys.exit(f'tests and tools/reliability.py do not agree on what is tried: {", ".join(sorted(unknown))}')
    with tempfile.TemporaryDirectory() as temp:
        files = args.given or [Path(temp)/'junit.xml']
        if not args.given: run(*files, tests)
        rows = counted(files)
    args.folder.mkdir(parents=True, exist_ok=True)
    about = dict(date=date.today().isoformat(), **made_by('cpu', dict(cores=os.cpu_count())))
    to.write_text(json.dumps(dict(format=1, **about, rows=rows), indent=1) + '\n', encoding='utf-8')
    failed = sum(len(o['failed']) for o in rows)
    print(f'{sum(o["tried"] for o in rows):,} tried in {sum(o["tests"] for o in rows):,} tests, {failed} failed: {to}')


if __name__ == '__main__': main()
