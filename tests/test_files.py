"Written whole or not at all, whatever fails, and whoever else writes."
import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from learned_relu._files import whole_file

ENDLESS = """import sys, time
from pathlib import Path
from learned_relu._files import whole_file
with whole_file(sys.argv[1]) as temp:
    if 'directory' in sys.argv: temp.mkdir()
    (temp/'part' if temp.is_dir() else temp).write_text('half')
    print('half', flush=True)
    time.sleep(60)"""


def names(path): return sorted(o.name for o in path.rglob('*'))


def fill(temp, kind, text):
    if kind == 'directory': temp.mkdir()
    (temp/'part' if kind == 'directory' else temp).write_text(text)


def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


kinds = pytest.mark.parametrize('kind', ['file', 'directory'])


@pytest.mark.tried('a disk that is full or refuses')
@kinds
@pytest.mark.parametrize('name', ['fsync', 'replace'])
def test_where_the_system_fails_nothing_is_there(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match='No space left'), whole_file(tmp_path/'a') as temp: fill(temp, kind, 'new')
    assert names(tmp_path) == []


@pytest.mark.tried('a disk that is full or refuses')
@pytest.mark.parametrize('name', ['fsync', 'replace'])
def test_where_the_system_fails_the_old_file_stays(name, tmp_path, monkeypatch):
    (tmp_path/'a').write_text('old')
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match='No space left'), whole_file(tmp_path/'a') as temp: temp.write_text('new')
    assert names(tmp_path) == ['a'] and (tmp_path/'a').read_text() == 'old'


@kinds
def test_all_of_it_is_on_the_disk_before_it_has_its_name(kind, tmp_path, monkeypatch):
    done, real = [], dict(fsync=os.fsync, replace=os.replace)
    def synced(handle): done.append(os.fstat(handle).st_ino); real['fsync'](handle)
    def replaced(*args): done.append('renamed'); real['replace'](*args)
    monkeypatch.setattr(os, 'fsync', synced)
    monkeypatch.setattr(os, 'replace', replaced)
    with whole_file(tmp_path/'a') as temp: fill(temp, kind, 'new')
    assert done == [*(o.stat().st_ino for o in [*(tmp_path/'a').rglob('*'), tmp_path/'a']), 'renamed']


def test_the_error_of_the_writer_is_the_one_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr('learned_relu._files.remove', full) # as where another program holds the file
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path/'a') as temp: temp.write_text('half'); 1/0  # noqa: B018


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='there is no SIGKILL')
@pytest.mark.tried('a process or a machine killed')
@kinds
def test_a_killed_writer_leaves_no_file_and_the_next_one_alone_tidies_up(kind, tmp_path):
    (tmp_path/'a').mkdir(); (tmp_path/'a.kept.json').touch()
    file = tmp_path/'a'/'b [1]'
    child = subprocess.Popen([sys.executable, '-c', ENDLESS, file, kind], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'half\n'
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    left, = (tmp_path/'a').iterdir()
    assert left.name.startswith('b [1].') and left.suffix == '.tmp'
    with whole_file(file) as temp: temp.write_text('not alone')
    assert left.exists() and file.read_text() == 'not alone'
    with whole_file(file, alone=True) as temp: temp.write_text('alone')
    assert names(tmp_path) == ['a', 'a.kept.json', 'b [1]'] and file.read_text() == 'alone'


def test_two_writers_do_not_meet_and_the_later_one_wins(tmp_path):
    file, inside = tmp_path/'a', threading.Barrier(2, timeout=20)
    def write(text, wait=None, done=None):
        with whole_file(file) as temp:
            for o in text:
                with open(temp, 'a') as f: f.write(o)
                inside.wait()
            if wait: wait.wait(20)
        if done: done.set()
    first = threading.Event()
    both = [threading.Thread(target=write, args=('aaaa',), kwargs=dict(done=first)),
            threading.Thread(target=write, args=('bbbb',), kwargs=dict(wait=first))]
    for o in both: o.start()
    for o in both: o.join(30)
    assert file.read_text() == 'bbbb' and names(tmp_path) == ['a']


@pytest.mark.skipif(not hasattr(os, 'umask') or os.name == 'nt', reason='there is no umask')
@pytest.mark.parametrize('mask', [0o022, 0o077, 0o222])
def test_a_file_has_the_rights_that_the_user_gives_new_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path/'a') as temp: os.close(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o666))
    finally: os.umask(before)
    assert (tmp_path/'a').stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_is_opened_for_writing_where_windows_puts_it_on_the_disk(tmp_path, monkeypatch):
    how, real = [], os.open
    def opened(path, flags, *args, **kwargs): how.append(flags & os.O_RDWR); return real(path, flags, *args, **kwargs)
    with whole_file(tmp_path/'d') as temp:
        fill(temp, 'directory', 'new')
        monkeypatch.setattr(os, 'open', opened)
        monkeypatch.setattr(os, 'name', 'nt') # nothing between here and the end makes a `Path`
    monkeypatch.undo()
    assert how == [os.O_RDWR] and names(tmp_path) == ['d', 'part'] # the directory itself cannot be opened there


def test_a_writer_that_writes_nothing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path/'a'): pass
    assert names(tmp_path) == []
