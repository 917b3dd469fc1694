"""Run tests with the oldest versions that settings.ini allows: `python tools/oldest.py FOLDER [TEST ...]`.

FOLDER is a virtual environment, made where it is not there yet. Without TEST all files of tests/ are run that need
neither a browser, a cluster, Triton, trackers of experiments nor what reads and builds notebooks."""
import re
import subprocess
import sys
import tempfile
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = 'cuda log pages ray release results rings site'.split() # what these need has oldest versions of its own


def oldest():
    "What settings.ini asks for, each at its lower bound"
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    asked = f"{cfg['DEFAULT']['requirements']} {cfg['DEFAULT']['bench_requirements']}"
    bounds = [o for o in re.findall(r'([\w-]+)>=([\d.]+)', asked) if '.' in o[1]]
    # any patch of 2.4, but 2.8.12 itself
    return [f'{name}=={low}' + ('.*' if low.count('.') == 1 else '') for name, low in bounds]


def make(env):
    venv.create(env, with_pip=True)
    with tempfile.NamedTemporaryFile('w', suffix='.txt') as f:
        f.write('\n'.join(oldest()))
        f.flush()
        more = 'pytest', 'hypothesis', 'expecttest', 'safetensors'
        pip = [env/'bin'/'python', '-m', 'pip', 'install', '-q', '-c', f.name]
        subprocess.run([*pip, '-e', f'{ROOT}[bench]', *more], check=True)


def main(env=None, *tests):
    if env is None: sys.exit(__doc__)
    env = Path(env).absolute()
    if not (env/'bin'/'pytest').exists(): make(env)
    files = [o for o in sorted((ROOT/'tests').glob('test_*.py')) if o.stem.removeprefix('test_') not in ELSEWHERE]
    pytest = [env/'bin'/'python', '-m', 'pytest', '-p', 'no:cacheprovider', '--confcutdir', ROOT/'tests']
    sys.exit(subprocess.run([*pytest, *(tests or files)], cwd=ROOT).returncode)


if __name__ == '__main__': main(*sys.argv[1:])
