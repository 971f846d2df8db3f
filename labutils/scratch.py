"""Temporary folders that do not pile up, however the process that made them ends.

A Jupyter kernel is killed a few seconds after it was asked to stop, at once under nbval, and no
clean-up of its own runs then: what a notebook wrote would stay on the disk for good. So each folder
holds a lock that the system lets go with its process, and whoever makes the next one removes those
that nobody holds.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "moe-lab-"
LOCK = ".in-use"


def folder() -> Path:
    """A new temporary folder, empty but for its lock; it goes with this process or a later call."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        _remove_unheld(lock.parent)
    made = Path(tempfile.mkdtemp(prefix=PREFIX))
    held = FileLock(made / f"{LOCK}-soon")
    held.acquire()
    Path(held.lock_file).rename(made / LOCK)  # seen by others only now that it is held
    atexit.register(_let_go, made, held, os.getpid())
    return made


def _remove_unheld(left: Path) -> None:
    try:
        with FileLock(left / LOCK, timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    except (Timeout, OSError):
        pass  # in use, or another user's


def _let_go(made: Path, held: FileLock, maker: int) -> None:
    if os.getpid() == maker:  # a forked process ends too
        held.release()
        shutil.rmtree(made, ignore_errors=True)
