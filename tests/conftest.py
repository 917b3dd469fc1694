"What several test files train on, and where it is kept."
import shutil
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from learned_relu.kernels.build import kernels
from learned_relu.kernels.dispatch import node
from learned_relu.kernels.library import shelf


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    "A figure that a test left would show up among the outputs of the next page that draws"
    yield
    if pyplot := sys.modules.get('matplotlib.pyplot'): pyplot.close('all')


@pytest.fixture
def without_node(monkeypatch):
    "The curve without a native node, whether or not one was loaded"
    monkeypatch.setattr(node, 'curve', lambda *_: None)


def pytest_runtest_setup(item):
    "What a test does to the library and how often, `tried(what, n)`: kept by --junitxml, added up by tools/reliability.py"
    for mark in item.iter_markers('tried'):
        what, n = (*mark.args, 1)[:2]
        item.user_properties.append((f'tried: {what}', item.callspec.params[n] if isinstance(n, str) else n))


@pytest.fixture(scope='session')
def internals():
    "What PyTorch tests itself with, which may move"
    try:
        with pytest.MonkeyPatch.context() as m:  # which would keep every later test and page from setting them
            m.setattr(torch.backends, 'disable_global_flags', lambda: None)
            from torch.testing._internal import common_modules, common_utils, composite_compliance, optests
    except Exception as e: pytest.skip(f'the internals of torch {torch.__version__} have moved, or what they need is missing: {e}')
    assert not torch.backends.flags_frozen()
    return SimpleNamespace(modules=common_modules, utils=common_utils, composite=composite_compliance, optests=optests)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "What the commands keep, kernels and decoded images, goes with the tests; kernels that are there need not be compiled again"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a machine without a compiler
        kernels()
    there = shelf()
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        for o in there.glob('*.so'): shutil.copy(o, shelf())
        yield


@pytest.fixture(scope='module')
def images(tmp_path_factory, cache):
    "A folder of noise in two classes, with an odd count in each of validation, so that two processes have to pad"
    path, rng = tmp_path_factory.mktemp('data')/'noise', np.random.default_rng(0)
    for part, n in dict(train=12, val=5).items():
        for c in 'ab':
            (path/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path/part/c/f'{i}.png')
    return path
