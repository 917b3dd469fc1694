"Small learners for the tests, and commands in their process."
import io
import os
import random
import runpy
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import fastai.callback.schedule  # noqa: F401  adds fit_one_cycle and lr_find
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.test_utils import synth_learner
from torch import nn

from learned_relu.all import LearnedRelu

OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=ranger, wrapped=partial(OptimWrapper, opt=torch.optim.AdamW))


def make(*cbs, opt='adam', lr=.01, path=None, layer=LearnedRelu, **kwargs):
    "A regression with two learned layers"
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    model = nn.Sequential(nn.Linear(1, 8), layer(8, **kwargs), nn.Linear(8, 8), layer(8, **kwargs), nn.Linear(8, 1))
    learn = synth_learner(n_trn=10, cbs=cbs, model=model, path=path)
    learn.opt_func, learn.lr = OPTS[opt], lr
    return learn


@contextmanager
def quiet(learn):
    with learn.no_logging(), learn.no_bar(): yield


class Follow(Callback):
    "Values of one parameter after every training batch"
    run_valid = False
    order = 100
    def __init__(self, get): self.get, self.seen = get, []
    def after_batch(self): self.seen.append(self.get(self.learn.model).detach().clone())


def in_process(command, *args, check=False):
    "Run a command's own script in this process, which has imported what takes long: what it said, and how it ended"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, 'argv', [str(command), *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try: runpy.run_path(str(command), run_name='__main__')
        except SystemExit as e:
            code = 0 if e.code is None else 1
            if code: print(e.code, file=err)
    assert not check or code == 0, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), returncode=code)


def on_terminal(cmd, **kwargs):
    "A process that writes to a terminal, where bars are drawn, and what to read it from"
    ours, its = os.openpty()
    child = subprocess.Popen([*map(str, cmd)], stdout=its, stderr=its, **kwargs)
    os.close(its)
    return child, ours


def read_until(terminal, seen=lambda said: False):
    "What was written until it is seen; without that, until the process has ended"
    said = b''
    try:
        while not seen(said): said += os.read(terminal, 4096)
    except OSError: pass  # nobody writes any more
    return said
