"""Store the figures of the notebooks small: at most 1200 pixels wide, in 64 colours.

`python tools/figures.py` after `nbdev-test --save`."""
import base64
import io

from fastcore.nbio import read_nb, write_nb
from nbdev.config import get_config
from PIL import Image


def small(png):
    "The picture with its colours in a palette; None where they are already"
    im, out = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if im.mode == 'P': return None
    im = im.convert('RGB')
    im.thumbnail((1200, 6000), Image.Resampling.LANCZOS)
    im.quantize(64, dither=Image.Dither.NONE).save(out, 'png', optimize=True)
    return base64.b64encode(out.getvalue()).decode() + '\n'

def main():
    for path in sorted(get_config().nbs_path.rglob('[!_.]*.ipynb')):
        nb, changed = read_nb(path), False
        for out in (o for c in nb.cells for o in c.get('outputs', [])):
            png = out.get('data', {}).get('image/png')
            if png and (res := small(''.join(png))): out['data']['image/png'], changed = res, True
        if changed: write_nb(nb, path)

if __name__ == '__main__': main()
