"""What is read ahead is in the page cache; how far ahead is bounded; nothing is left running."""

import os
import sys
import threading
from pathlib import Path

import pytest

from labutils import readahead
from labutils.readahead import PIECE_BYTES, ReadAhead

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="on other systems nothing is read ahead"
)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Where each request began, in the order of the requests."""
    starts = []
    monkeypatch.setattr(
        readahead.os, "sendfile", lambda _to, _from, start, _count: starts.append(start)
    )
    return starts


def written(folder: Path, pieces: int, name: str = "a") -> Path:
    """A file of so many pieces, the last a little shorter; it takes no room on the disk."""
    file = folder / name
    file.touch()
    os.truncate(file, pieces * PIECE_BYTES - 7)
    return file


def threads() -> int:
    return threading.active_count()


def test_every_piece_of_every_file_is_asked_for_once_and_in_order(tmp_path, asked):
    files = [written(tmp_path, 3, "a"), written(tmp_path, 2, "b")]
    before = threads()
    with ReadAhead(files) as ahead:
        ahead.wait()
    assert asked == [piece * PIECE_BYTES for piece in (0, 1, 2, 0, 1)]
    assert threads() == before


def test_it_stays_within_reach_of_what_was_used(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 2 * PIECE_BYTES)
    with ReadAhead([written(tmp_path, 5)]) as ahead:
        ahead._thread.join(0.2)
        assert len(asked) == 2
        ahead.used(PIECE_BYTES)
        ahead._thread.join(0.2)
        assert len(asked) == 3
        ahead.wait()
        assert len(asked) == 5


def test_leaving_the_block_early_ends_it(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(readahead, "AHEAD_BYTES", PIECE_BYTES)
    before = threads()
    with pytest.raises(KeyboardInterrupt), ReadAhead([written(tmp_path, 4)]):
        raise KeyboardInterrupt
    assert threads() == before
    assert len(asked) <= 1


def test_a_file_that_disappears_stops_nothing_else(tmp_path, asked):
    files = [written(tmp_path, 2, "gone"), written(tmp_path, 1)]
    ahead = ReadAhead(files)
    files[0].unlink()
    with ahead:
        ahead.wait()
    assert asked == [0]


def test_the_system_really_reads(tmp_path):
    with ReadAhead([written(tmp_path, 2)]) as ahead:
        ahead.wait()
        assert ahead.total_bytes == 2 * PIECE_BYTES - 7
