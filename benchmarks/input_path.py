"""What loading costs with and without decoded images, beside a training step.

`python benchmarks/input_path.py FOLDER OUT`: FOLDER is a data set of images with `train/` and `val/`;
OUT becomes a folder with `input.json` and `profile.txt`."""
import cProfile
import io
import json
import os
import platform
import pstats
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import PIL
import torch
from fastai.torch_core import set_seed
from fastcore.script import call_parse

from learned_relu.bench.data import find_images, image_dls
from learned_relu.bench.images import decode_images, loader_share
from learned_relu.bench.record import commit
from learned_relu.xresnet import plain_xresnet


def spread(values, n):
    low, mid, high = pd.Series(values).quantile([.25, .5, .75])
    return dict(median=float(f'{mid:.4g}'), low=float(f'{low:.4g}'), high=float(f'{high:.4g}'), n=n)


@call_parse
def main(
    folder:str,      # data set, with `train/` and `val/`
    out:str,         # folder to write
    every:int=12,    # take every n-th image
    size:int=128,    # side of the images in training
    bs:int=64,       # batch size
    rounds:int=7,    # how often each loader is timed alone
    steps:int=3,     # in how many of these rounds within training too
    batches:int=4,   # training steps in a round
    arch:str='xresnet18', # model to train
):
    "Time the loader alone and within training, in turns, and say where its time goes"
    path, files, mark = find_images(folder)
    files = files[::every]
    out = Path(out)
    out.mkdir(parents=True)
    began, rows, ratios = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), [], []
    with tempfile.TemporaryDirectory() as d:
        tick = time.perf_counter()
        images = decode_images(files, f'{mark} every {every}', d)
        decode = time.perf_counter() - tick
        contents = dict(images=len(files), megabytes=round(images.path.stat().st_size/1e6, 1), seconds=round(decode, 2))
        model = plain_xresnet(arch, 10)

        def alone(dls):
            for _ in dls.train: pass # an epoch that warms up, workers included
            tick = time.perf_counter()
            n = sum(len(x) for x, _ in dls.train)
            return n/(time.perf_counter() - tick)

        for workers in 0, 2:
            speed, share = {}, {}
            for i in range(rounds):
                for name in ('decoded each time', 'map')[::(-1)**i]:
                    set_seed(i)
                    decoded = images if name == 'map' else None
                    dls = image_dls(path, files, size, bs, num_workers=workers, images=decoded)
                    speed.setdefault(name, []).append(alone(dls))
                    if i < steps: share.setdefault(name, []).append(loader_share(dls, model, batches))
            for name in speed:
                got = pd.DataFrame(share[name])
                times = {f'{k}_ms': spread(got[k]*1000, len(got)) for k in ('wait', 'step')}
                rows.append(dict(num_workers=workers, images=name, images_per_second=spread(speed[name], rounds),
                                 **times, share=spread(got['share'], len(got))))
            ratio = [a/b for a, b in zip(speed['map'], speed['decoded each time'], strict=True)]
            ratios.append(dict(num_workers=workers, map_over_decoded=spread(ratio, rounds)))
            print(json.dumps(rows[-2:], indent=1), ratios[-1])

        report = io.StringIO()
        for name, o in {'decoded each time': None, 'map': images}.items():
            dls = image_dls(path, files, size, bs, num_workers=0, images=o)
            for _ in dls.train: pass
            with cProfile.Profile() as profile: n = sum(len(x) for x, _ in dls.train)
            print(f'\n{name}: {n} images, num_workers=0', file=report)
            pstats.Stats(profile, stream=report).strip_dirs().sort_stats('tottime').print_stats(18)
    (out/'profile.txt').write_text('\n'.join(o.rstrip() for o in report.getvalue().splitlines()) + '\n')
    hardware = dict(device='cpu', machine=platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads())
    versions = dict(python=platform.python_version(), pillow=PIL.__version__)
    versions |= {o: version(o) for o in ('torch', 'fastai', 'learned_relu')}
    data = dict(name=path.name, fingerprint=mark, every=every)
    record = dict(format=1, began=began, commit=commit(), data=data, size=size, bs=bs, arch=arch, decode=contents,
                  hardware=hardware, versions=versions, rows=rows, ratios=ratios)
    (out/'input.json').write_text(json.dumps(record, indent=1) + '\n')
    print(f'wrote {out}', file=sys.stderr)
