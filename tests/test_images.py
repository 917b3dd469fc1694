"Decoded once: the same batches bit by bit, and a file that is whole or not there."
import errno
import io
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
from PIL import Image
from torch import nn

from learned_relu.bench import images as cache
from learned_relu.bench.data import Source, find_images, image_dls
from learned_relu.bench.images import decode_images, loader_share

SLOWLY = """import sys, time
from learned_relu.bench import images as cache
from learned_relu.bench.data import find_images
write = cache._write
def late(*args): write(*args); time.sleep(.1)
cache._write = late
cache.decode_images(*find_images(sys.argv[1])[1:], sys.argv[2])"""


def pictures(path, n, sides=(30, 60)):
    "Images of every kind that `PILImage.create` makes RGB, each of its own size"
    rng = np.random.default_rng(0)
    for i in range(n):
        file = path/('train', 'val')[i % 3 == 2]/'ab'[i % 2]/str(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        h, w = rng.integers(*sides, 2)
        x = Image.fromarray(rng.integers(0, 256, (h, w, 4), dtype=np.uint8), 'RGBA')
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        rgb = x.convert('RGB')
        kinds = [lambda: rgb.save(f'{file}.jpg'), lambda: rgb.save(f'{file}.png'), lambda: x.convert('L').save(f'{file}.jpg'),
                 lambda: rgb.convert('P').save(f'{file}.png'), lambda: x.save(f'{file}.png'), lambda: x.convert('CMYK').save(f'{file}.jpg'),
                 lambda: rgb.save(f'{file}.jpg', exif=exif), lambda: x.convert('LA').save(f'{file}.png'),
                 lambda: rgb.convert('1').save(f'{file}.png')]
        kinds[i % len(kinds)]()
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return pictures(tmp_path_factory.mktemp('pictures'), 72)


def same(images, files):
    assert len(images) == len(files)
    for i, o in enumerate(files): assert np.array_equal(np.asarray(images[i]), np.asarray(PILImage.create(o)))


def epoch(path, files, images, workers):
    set_seed(3)
    dls = image_dls(path, files, 32, 8, num_workers=workers, images=images)
    return [b for dl in dls for _ in range(2) for b in dl]


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_the_same_bit_by_bit(folder, tmp_path, workers):
    path, files, mark = find_images(folder)
    images = decode_images(files, mark, tmp_path)
    same(images, files)
    for f in files: assert type(images.open(f)) is PILImage
    assert len({tuple(o) for o in images.sizes}) > 40 and images[-1].size == images[len(files)-1].size
    plain, mapped = (epoch(path, files, o, workers) for o in (None, images))
    assert len(plain) == 2*(48//8 + 24//8) and len({x.sum().item() for x, _ in plain[:6]}) == 6
    for (x, y), (a, b) in zip(plain, mapped, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b) and type(x) is type(a) and x.stride() == a.stride()


def test_after_the_first_time_no_file_is_decoded(folder, tmp_path, monkeypatch, capsys):
    path, files, mark = find_images(folder)
    decode_images(files, mark, tmp_path)
    assert capsys.readouterr().out.startswith('Decoding 72 images once')
    def refuse(*_): raise AssertionError('decoded again')
    monkeypatch.setattr(Image, 'open', refuse)
    images = decode_images(files, mark, tmp_path)
    for x, _ in epoch(path, files, images, 0): assert len(x)
    assert capsys.readouterr().out == ''


@pytest.mark.tried('a process or a machine killed')
def test_a_killed_decode_leaves_nothing_that_looks_finished(tmp_path):
    path, files, mark = find_images(pictures(tmp_path/'p', 48, (400, 500)))
    child = subprocess.Popen([sys.executable, '-c', SLOWLY, path, tmp_path/'c'], stdout=subprocess.PIPE, text=True)
    while not list((tmp_path/'c').glob('*.tmp')) or next((tmp_path/'c').glob('*.tmp')).stat().st_size < 1_000_000:
        assert child.poll() is None
        time.sleep(.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and list((tmp_path/'c').glob('*.tmp')) and not list((tmp_path/'c').glob('*.rgb'))
    same(decode_images(files, mark, tmp_path/'c'), files)
    assert not list((tmp_path/'c').glob('*.tmp'))


def test_two_processes_at_once_decode_once(tmp_path):
    path, files, mark = find_images(pictures(tmp_path/'p', 48, (300, 400)))
    both = [subprocess.Popen([sys.executable, '-c', SLOWLY, path, tmp_path/'c'], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [o.communicate()[0] for o in both]
    assert [o.returncode for o in both] == [0, 0] and sorted(o.count('Decoding') for o in said) == [0, 1]
    same(decode_images(files, mark, tmp_path/'c'), files)


@pytest.mark.tried('a file damaged, cut or foreign')
@pytest.mark.parametrize('harm,words', [
    (lambda b: b[:-1], 'bytes instead of'), (lambda b: b[:70], 'damaged index'), (lambda b: b + b'more', 'bytes instead of'),
    (lambda b: b'', 'other images'), (lambda b: b'GIF89a' + b[6:], 'other images'),
    (lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:], 'damaged index')])
def test_a_truncated_or_foreign_file_is_written_again(folder, tmp_path, capsys, harm, words):
    path, files, mark = find_images(folder)
    images = decode_images(files, mark, tmp_path)
    images.path.write_bytes(harm(images.path.read_bytes()))
    with pytest.raises(ValueError, match=words): images[0]
    capsys.readouterr()
    same(decode_images(files, mark, tmp_path), files)
    said = capsys.readouterr().out
    assert words in said and 'so it is written again' in said


def image(path, **how):
    path.parent.mkdir(exist_ok=True)
    Image.new('RGB', (9, 9)).save(path, **how)


def bomb(path, side):
    "A picture of a few KB that says it has so many pixels a side"
    Image.new('L', (side, side)).save(path, compress_level=9)
    assert path.stat().st_size < 200_000


ODD = dict(fifo=lambda d: os.mkfifo(d/'x.png'), empty=lambda d: (d/'x.png').touch(), nowhere=lambda d: (d/'x.png').symlink_to('nothing'),
           itself=lambda d: (d/'x.png').symlink_to('x.png'), text=lambda d: (d/'x.png').write_text('no image'),
           bomb=lambda d: bomb(d/'x.png', 10_000), deep=lambda d: Image.fromarray(np.full((9, 9), 999, 'uint16')).save(d/'x.png'),
           floats=lambda d: Image.fromarray(np.ones((9, 9), 'float32')).save(d/'x.tif'),
           cut=lambda d: (d/'x.png').write_bytes((d/'0.jpg').read_bytes()[:200]))


@pytest.mark.tried('an image that is none')
@pytest.mark.parametrize('what', ODD)
def test_what_is_no_image_is_named_or_left_out_and_never_waited_for(what, tmp_path):
    path = pictures(tmp_path/'p', 12)
    place = next(o for o in (path/'train').iterdir() if o.is_dir())
    image(place/'0.jpg')
    whole = find_images(path)[1]
    ODD[what](place)
    said = r'1 image\(s\) cannot be read, have more than [\d,]+ pixels, or integers or floats for colours; the first is train'
    with pytest.raises(ValueError, match=said): find_images(path)
    assert find_images(path, skip_unreadable=True)[1] == whole


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # fastai leaves such a file to the garbage collector
def test_of_a_moving_picture_the_first_frame_counts(tmp_path):
    path = pictures(tmp_path/'p', 12)
    moving = path/'train'/'a'/'moving.gif'
    Image.new('RGB', (9, 9), 'red').save(moving, save_all=True, append_images=[Image.new('RGB', (9, 9), 'blue')])
    path, files, mark = find_images(path)
    assert (np.asarray(decode_images(files, mark, tmp_path/'c').open(moving)) == (255, 0, 0)).all()


def test_a_link_that_leads_back_is_named(tmp_path):
    path = pictures(tmp_path/'p', 12)
    place = next(o for o in (path/'train').iterdir() if o.is_dir())
    (place/'again').symlink_to(path/'train')
    with pytest.raises(ValueError, match=f'^train/{place.name}/again/. is the same folder as train/., by a link'): find_images(path)
    (place/'again').unlink()
    shutil.move(place, tmp_path/'elsewhere')
    place.symlink_to(tmp_path/'elsewhere')
    assert len(find_images(path)[1]) == 12, 'a link to somewhere else is welcome'


def test_a_class_that_is_only_judged_on_is_named(tmp_path):
    path = pictures(tmp_path/'p', 12)
    image(path/'val'/'<c>'/'1.png')
    with pytest.raises(ValueError, match="val/ has images of '<c>', which train/ does not have"): find_images(path)


@pytest.mark.tried('a hostile name')
@pytest.mark.parametrize('name', ['$x_1$', '<b>', '=1+1', 'a\nb', '\x1b[2J', '\u202eabc', 'ä'*100, "it's", 'a"b', 'a;b', ' '])
def test_folders_of_any_name(name, tmp_path):
    path = pictures(tmp_path/name, 12)
    place = next(o for o in (path/'train').iterdir() if o.is_dir())
    place.rename(place.with_name(name))
    for o in (path/'val').iterdir(): o.name == place.name and o.rename(o.with_name(name))
    source = Source(path, 16)
    assert source.name.isprintable() and (source.name == name) == name.isprintable() and name in source.dls(2).vocab
    assert len(list(source.dls(2).train)) > 1


@pytest.mark.tried('a file damaged, cut or foreign', 63)
def test_one_flipped_bit_is_noticed_and_mended_wherever_it_is(folder, tmp_path, capsys):
    path, files, mark = find_images(folder)
    images = decode_images(files, mark, tmp_path)
    whole, rng, mended = images.path.read_bytes(), random.Random(0), 0
    for at in [rng.randrange(len(whole)) for _ in range(60)] + [len(whole) - 1, images.offsets[0], images.offsets[-1]]:
        images.path.write_bytes(whole)
        with open(images.path, 'r+b') as f:
            f.seek(at)
            f.write(bytes([whole[at] ^ 1 << rng.randrange(8)]))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            same(decode_images(files, mark, tmp_path), files)
        mended += len(seen) == 1 and not images.path.exists() or 'damaged index' in capsys.readouterr().out
    assert mended == 63


def test_an_image_that_changed_but_kept_its_length_is_decoded_again(tmp_path, capsys):
    path, files, mark = find_images(pictures(tmp_path/'p', 12))
    for o in files[:2]: Image.new('RGB', (7, 5), ('red', 'blue')[o is files[0]]).save(o.with_suffix('.bmp')), o.unlink()
    path, files, mark = find_images(path)
    same(decode_images(files, mark, tmp_path/'c'), files)
    bmp = [o for o in files if o.suffix == '.bmp']
    before, when = bmp[0].read_bytes(), bmp[0].stat()
    Image.new('RGB', (7, 5), 'green').save(bmp[0])
    os.utime(bmp[0], ns=(when.st_atime_ns, when.st_mtime_ns))  # not even the date tells
    assert bmp[0].stat().st_size == when.st_size
    changed = find_images(path)[2]
    same(decode_images(files, changed, tmp_path/'c'), files)
    bmp[0].write_bytes(before)
    assert changed != find_images(path)[2] == mark
    same(decode_images(files, mark, tmp_path/'c'), files)
    assert capsys.readouterr().out.count('Decoding') == 2


def test_other_files_of_the_same_data_are_not_those_that_were_decoded(folder, tmp_path):
    path, files, mark = find_images(folder)
    for some in files[:9], files[9:18], files[8::-1]: same(decode_images(some, mark, tmp_path), some)


@pytest.mark.tried('a file damaged, cut or foreign')
def test_images_of_one_length_that_changed_places_are_other_data(tmp_path):
    path = pictures(tmp_path/'p', 12)
    a, b = (o/'x.bmp' for o in (path/'train').iterdir())
    for o, colour in {a: 'red', b: 'blue'}.items(): Image.new('RGB', (7, 5), colour).save(o)
    mark = find_images(path)[2]
    a.rename(path/'aside'), b.rename(a), (path/'aside').rename(b)
    assert find_images(path)[2] != mark


@pytest.mark.tried('a disk that is full or refuses')
@pytest.mark.parametrize('when', ['before', 'while writing'])
def test_a_full_disk_is_refused_in_words(folder, tmp_path, monkeypatch, when):
    path, files, mark = find_images(folder)
    if when == 'before': monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=300_000))
    else:
        write, calls = cache._write, []
        def full(*args):
            calls.append(args)
            if len(calls) > 20: raise OSError(errno.ENOSPC, 'No space left on device')
            write(*args)
        monkeypatch.setattr(cache, '_write', full)
    with pytest.raises(ValueError, match='images take 0.4 MB.*make room, let XDG_CACHE_HOME') as e: decode_images(files, mark, tmp_path)
    assert str(tmp_path) in str(e.value) and ('No space left' in str(e.value) or '0.3 MB free' in str(e.value))
    assert {o.suffix for o in tmp_path.iterdir()} <= {'.lock'}
    monkeypatch.undo()
    same(decode_images(files, mark, tmp_path), files)


class Short(io.FileIO):
    "A file that takes 777 bytes at a time"
    def write(self, data): return super().write(memoryview(data)[:777])


def test_short_writes_are_completed(folder, tmp_path, monkeypatch):
    path, files, mark = find_images(folder)
    real = open
    def short(file, mode): return io.BufferedRandom(Short(file, mode)) if mode == 'r+b' else real(file, mode)
    monkeypatch.setattr(cache, 'open', short, raising=False)
    same(decode_images(files, mark, tmp_path), files)


@pytest.mark.tried('a disk that is full or refuses')
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
def test_a_disk_that_is_full_only_when_a_file_is_closed_is_noticed():
    with pytest.raises(OSError, match='No space left'): cache._write('/dev/full', b'x', 0)


@pytest.mark.tried('an image that is none')
@pytest.mark.parametrize('how', ['not an image', 'cut short'])
def test_an_unreadable_image_is_named(tmp_path, how):
    path, files, mark = find_images(pictures(tmp_path/'p', 12, (100, 120)))
    files[4].write_bytes(b'no image' if how == 'not an image' else files[4].read_bytes()[:-3000])
    with pytest.raises(ValueError, match=f'{files[4]} cannot be read .*: mend it'): decode_images(files, mark, tmp_path/'c')
    assert not list((tmp_path/'c').glob('*.tmp'))


@pytest.mark.tried('a disk that is full or refuses')
def test_a_directory_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='file/images cannot be written .*XDG_CACHE_HOME'):
        decode_images(*find_images(folder)[1:], tmp_path/'file'/'images')


def pixels(images, i): return images[i].tobytes()


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_a_pickle_carries_no_pixels_and_opens_in_another_process(folder, tmp_path, method):
    path, files, mark = find_images(folder)
    images = decode_images(files, mark, tmp_path)
    expected = images[7].tobytes()
    assert len(pickle.dumps(images)) < images.sizes.prod(1).sum()/10
    assert pickle.loads(pickle.dumps(images))[7].tobytes() == expected
    with get_context(method).Pool(1) as pool: assert pool.apply(pixels, (images, 7)) == expected


def test_a_file_outside_the_map_is_decoded(folder, tmp_path):
    path, files, mark = find_images(folder)
    images = decode_images(files[1:], mark, tmp_path)
    assert np.array_equal(np.asarray(images.open(files[0])), np.asarray(PILImage.create(files[0])))


def test_a_source_builds_the_map_where_xdg_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert Source(folder, 32, cache=False).images is None and not list(tmp_path.iterdir())
    source = Source(folder, 32)
    assert [o.suffix for o in sorted((tmp_path/'learned_relu'/'images').iterdir())][-1] == '.rgb'
    def first(source): set_seed(0); return source.dls(8).train.one_batch()[0]
    plain = first(Source(folder, 32, cache=False))
    def refuse(*_): raise AssertionError('decoded again')
    monkeypatch.setattr(Image, 'open', refuse)  # in the workers too, which are forked
    assert torch.equal(first(source), plain)


class Sleepy:
    "A loader whose batches take 30 ms"
    device = torch.device('cpu')
    def __init__(self, n=8): self.train = self; self.n = n
    def __len__(self): return self.n
    def __iter__(self):
        for _ in range(self.n): time.sleep(.03); yield torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)


class Slow(nn.Linear):
    "A model that takes 60 ms"
    def forward(self, x): time.sleep(.06); return super().forward(x.flatten(1))


def test_the_script_of_the_record_of_loading_runs(images, tmp_path):
    main = runpy.run_path(str(Path(__file__).parents[1]/'benchmarks'/'input_path.py'))['main']
    main(images, tmp_path/'out', every=1, size=16, bs=4, rounds=1, steps=1, batches=1)
    assert len(json.loads((tmp_path/'out'/'input.json').read_text())['rows']) == 4


def test_the_share_of_loading_is_measured():
    model = Slow(192, 2)
    before = [o.clone() for o in model.parameters()]
    got = loader_share(Sleepy(), model, 5)
    assert got['images'] == 20 and .0075 <= got['wait'] and .015 <= got['step'] and abs(got['share'] - got['wait']/(got['wait'] + got['step'])) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert loader_share(Sleepy(), model, 50)['images'] == 24
    with pytest.raises(ValueError, match='has 2 batch'): loader_share(Sleepy(2), model)
