"Telemetry that leaves the process: read back from the files that W&B, TensorBoard and trackio wrote."
import json
import os
import sqlite3
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from common import make, quiet
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.learner import Learner

from learned_relu.all import ActTelemetry, EMAActParams, LogActParams

os.environ['TRACKIO_DIR'] = tempfile.mkdtemp()  # which trackio reads when it is imported
wandb = pytest.importorskip('wandb', reason='W&B is not installed')
trackio = pytest.importorskip('trackio', reason='trackio is not installed')
event_accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='TensorBoard is not installed')


def records_of(file):
    "The records of a file as W&B writes it offline: a log of LevelDB, in blocks of 32 KiB, after a header of 7 bytes"
    data, at, whole = file.read_bytes(), 7, b''
    while at + 7 <= len(data):
        _, n, kind = struct.unpack_from('<IHB', data, at)
        if kind == 0 or 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        whole = (b'' if kind in (1, 2) else whole) + data[at + 7:at + 7 + n]  # full, first, middle, last
        at += 7 + n
        if kind in (1, 4): yield whole


def read_wandb(folder):
    "Step -> values, and the names of pictures, of the one offline run below `folder`"
    from wandb.proto import wandb_internal_pb2
    steps, pictures = {}, set()
    for data in records_of(next(Path(folder).rglob('*.wandb'))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for o in record.history.item:
            name = o.key or '/'.join(o.nested_key)
            if not name.startswith('act/'): continue
            if name.startswith(('act/map', 'act/curves')): pictures.add(name.rpartition('/')[0])  # type, size and so on of a file
            else: steps.setdefault(record.history.step.num, {})[name] = json.loads(o.value_json)
    return steps, pictures


def read_board(folder):
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=dict(scalars=0, images=0)).Reload()
    steps = {}
    for tag in events.Tags()['scalars']:
        for o in events.Scalars(tag) if tag.startswith('act/') else (): steps.setdefault(o.step, {})[tag] = o.value
    return steps, {o for o in events.Tags()['images'] if o.startswith('act/')}


def read_trackio(folder, project):
    steps, pictures = {}, set()
    with sqlite3.connect(Path(folder)/f'{project}.db') as db:
        for step, metrics in db.execute('select step, metrics from metrics'):
            for k, v in json.loads(metrics).items():
                if isinstance(v, dict): pictures.add(k)
                elif k.startswith('act/'): steps.setdefault(step, {})[k] = v
    return steps, pictures


def wanted(tele):
    "Step of the record -> values"
    df = tele.frame()
    return {step: {f'act/mean/{o.kind}/{o.layer}': np.float32(o.mean_) for o in rows.rename(columns=dict(mean='mean_')).itertuples()}
            for step, rows in df.groupby('step')}


def same(found, want):
    assert [*found] == [*want]
    for (_, a), b in zip(found.items(), want.values(), strict=True):
        assert a.keys() == b.keys() and all(np.float32(a[k]) == b[k] for k in b)


class Nested(Callback):
    "Validates within the fit, as a callback that predicts for a picture does"
    order = 70
    def after_epoch(self):
        if not self.learn.lock.locked(): self.learn.validate(); self.learn.get_preds()


PICTURES = {'act/map/leak', 'act/map/sub', 'act/map/maxv', 'act/curves'}


class Stop(Callback):
    run_valid = False
    def __init__(self, how): self.how = how
    def after_batch(self):
        if (self.epoch, self.iter) == (1, 2): raise self.how('stop')


@pytest.mark.parametrize('end', [None, CancelFitException, KeyboardInterrupt])
def test_every_record_arrives_at_its_step_and_none_is_lost(end, tmp_path, monkeypatch):
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setattr(Learner, 'gather_args', lambda self: {})  # which WandbCallback cannot format for data in a plain list
    run = trackio.init(project=f'curves-{tmp_path.name}', embed=False, auto_log_cpu=False, auto_log_gpu=False)
    wandb.init(mode='offline', dir=tmp_path, settings=wandb.Settings(silent=True, console='off', x_disable_stats=True))
    learn = make(EMAActParams(), ActTelemetry(4))
    cbs = [WandbCallback(log_preds=False), TensorBoardCallback(tmp_path/'board', trace_model=False, log_preds=False), LogActParams(run), Nested()]
    with quiet(learn):
        try: learn.fit(2, cbs=[*cbs, *([Stop(end)] if end else [])])
        except KeyboardInterrupt: pass
    wandb.finish(); trackio.finish()
    want = wanted(learn.act_telemetry)
    assert [*want] == ([0, 4, 8, 12, 16, 19] if end is None else [0, 4, 8, 12])
    pictures = set() if end is KeyboardInterrupt else PICTURES
    found, shown = read_wandb(tmp_path)
    if end is KeyboardInterrupt: found[12] = found.pop(11)  # the batch was not over: what it left went with the one before
    for sent, seen in (found, shown), read_board(tmp_path/'board'), read_trackio(os.environ['TRACKIO_DIR'], f'curves-{tmp_path.name}'):
        same(sent, want)
        assert seen == pictures


def test_pictures_every_few_epochs(tmp_path):
    learn = make(ActTelemetry(), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False), LogActParams(pictures=2))
    with quiet(learn): learn.fit(5)
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance=dict(images=0)).Reload()
    assert [o.step for o in events.Images('act/curves')] == [20, 40, 50], 'optimizer steps so far'


@pytest.mark.parametrize('pictures', [-1, True, .5])
def test_bad_input_is_named(pictures):
    with pytest.raises(ValueError, match=f'pictures is {pictures}'): LogActParams(pictures=pictures)


def test_unknown_values_are_named_before_training(tmp_path):
    learn = make(ActTelemetry(), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False), LogActParams(values=['median']))
    with quiet(learn), pytest.raises(ValueError, match="values names 'median'"): learn.fit(1)
