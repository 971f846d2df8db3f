"""Temporary folders go with their process, even a killed one, and never while it lives."""

import subprocess
import sys
from pathlib import Path

import pytest

from labutils import scratch

MAKE = "from labutils import scratch; made = scratch.folder(); (made / 'weights').write_text('0')"
SLEEP = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def another_process(then: str) -> subprocess.Popen[str]:
    """A Python that makes a folder, says so, and goes on with `then`."""
    script = f"{MAKE}; print('made', flush=True); {then}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    return process


def test_a_folder_goes_with_its_process(temporary: Path) -> None:
    another_process("pass").communicate()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_folder(temporary: Path) -> None:
    killed = another_process(SLEEP)
    killed.kill()
    killed.communicate()
    (left,) = temporary.iterdir()
    assert (left / "weights").read_text() == "0"
    assert list(temporary.iterdir()) == [left]
    made = scratch.folder()
    assert list(temporary.iterdir()) == [made]


def test_folders_in_use_stay_whoever_made_them(temporary: Path) -> None:
    living = another_process(SLEEP)
    (theirs,) = temporary.iterdir()
    mine = [scratch.folder(), scratch.folder()]
    assert {theirs, *mine} == set(temporary.iterdir())
    living.kill()
    living.communicate()


def test_what_is_not_of_its_kind_is_not_touched(temporary: Path) -> None:
    (temporary / "tmp-of-somebody").mkdir()
    (temporary / f"{scratch.PREFIX}results").mkdir()
    (temporary / f"{scratch.PREFIX}notes").write_text("no folder")
    others = set(temporary.iterdir())
    assert {scratch.folder(), *others} == set(temporary.iterdir())


def test_a_lock_that_may_not_be_taken_is_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = temporary / f"{scratch.PREFIX}foreign"
    foreign.mkdir()
    (foreign / scratch.LOCK).touch()
    refuse = PermissionError("another user's")
    lock = scratch.FileLock

    def locked(path: Path, **options) -> lock:
        if path.parent == foreign:
            raise refuse
        return lock(path, **options)

    monkeypatch.setattr(scratch, "FileLock", locked)
    assert {scratch.folder(), foreign} == set(temporary.iterdir())


def test_a_forked_process_leaves_the_folder_to_its_parent(temporary: Path) -> None:
    there = "print(made.exists())"
    process = another_process(f"import os; os.fork() and os.wait() and {there}")
    assert process.communicate()[0] == "True\n"
    assert list(temporary.iterdir()) == []


def test_many_at_once_keep_their_folders(temporary: Path) -> None:
    more = "import sys; more = [scratch.folder() for _ in range(10)]; "
    check = "sys.exit(not all((each / scratch.LOCK).exists() for each in [made, *more]))"
    processes = [another_process(more + check) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    for process in processes:
        process.communicate()
    assert list(temporary.iterdir()) == []
