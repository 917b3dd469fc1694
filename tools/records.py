"""Write the index of all records, `benchmarks/records/README.md`: one line each, from its own README.

`python tools/records.py` writes it; `--check` only says whether it is up to date."""
import sys
from pathlib import Path

RECORDS = Path(__file__).parents[1]/'benchmarks'/'records'
KINDS = dict(
    accuracy='Trainings, a file a run. `learned_relu_report benchmarks/records/accuracy` makes pages of them.',
    speed='Timings: what activations, whole training steps and the loading of images cost.',
    reliability='What the tests do to the library, and what came of it. Written by `python tools/reliability.py`.',
)
ABOUT = ('What was measured, each in a folder that says what was run, with which code, on what, and what came out. '
         'A record never changes, so later ones supersede it. Written by `python tools/records.py`.')
# a record never changes, so what took the place of which is said here
SUPERSEDED = {
    '2026-11-21-imagewoof-64px-xresnet18-2ep': '2026-11-21-imagewoof-64px-xresnet18-2ep-flipped',
    '2026-11-21-imagewoof-64px-xresnet18-2ep-flipped': '2026-11-21-imagewoof-64px-5ep-xresnet18',
    '2026-11-21-speed-2-cores': '2026-11-21-speed-kernels-2-cores',
    '2026-11-21-speed-kernels-2-cores-first': '2026-11-21-speed-kernels-2-cores',
    '2026-11-21-speed-kernels-2-cores-earlier': '2026-11-21-speed-kernels-2-cores',
    '2026-11-21-speed-kernels-2-cores': '2026-11-21-speed-fused-2-cores',
    '2026-11-21-speed-calls-2-cores': '2026-11-21-speed-fused-2-cores',
    '2026-11-21-speed-fused-2-cores-given-back': '2026-11-21-speed-fused-2-cores',
    '2026-11-27-two-cores': '2026-11-27-two-cores-all',
}


def line(folder):
    "A record in one line: its folder, the title of its README, how many runs, and what superseded it"
    title = (folder/'README.md').read_text(encoding='utf-8').partition('\n')[0].removeprefix('# ')
    runs = len(list(folder.glob('records/*.json')))
    after = SUPERSEDED.get(folder.name)
    if after and not (folder.parent/after).is_dir():
        sys.exit(f'{folder.name} is superseded by {after}, which is not there: mend SUPERSEDED in tools/records.py')
    notes = [f'{runs} runs'] if runs else []
    if after: notes.append(f'superseded by {after}')
    noted = f' ({"; ".join(notes)})' if notes else ''
    return f'- [{folder.name}]({folder.parent.name}/{folder.name}): {title}{noted}'

def index():
    "The whole index"
    parts = ['# Records', ABOUT]
    for kind, about in KINDS.items():
        folders = sorted(o for o in (RECORDS/kind).iterdir() if o.is_dir())
        parts += [f'## {kind.capitalize()}', about, '\n'.join(map(line, folders))]
    return '\n\n'.join(parts) + '\n'

def main(check=False):
    file, text = RECORDS/'README.md', index()
    if not check: file.write_text(text, encoding='utf-8')
    elif file.read_text(encoding='utf-8') != text:
        sys.exit('benchmarks/records/README.md is out of date: run `python tools/records.py`')

if __name__ == '__main__': main('--check' in sys.argv)
