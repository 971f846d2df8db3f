"""Have the disk read files while the processor is busy with what came before.

A checkpoint is mapped, not read: a tensor's bytes come from the disk when they are first touched,
and whoever touches them waits. `ReadAhead` has them fetched beforehand, in order, by a thread of
its own. They go into the system's page cache, which costs the process no memory.

    with ReadAhead(weight_files(folder)) as ahead:
        ...  # load; for every tensor that was used up: ahead.used(tensor.nbytes)
"""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PIECE_BYTES = 2**24
AHEAD_BYTES = 2**30


class ReadAhead:
    """Fetches `files` one after the other, never more than a GiB ahead of what `used` has counted.

    Leaving the block ends it; `wait` returns when the last byte is there. On other systems than
    Linux nothing happens.
    """

    def __init__(self, files: Sequence[Path]):
        self._size_bytes = {file: file.stat().st_size for file in files}
        self.total_bytes = sum(self._size_bytes.values())
        self._used_bytes = 0
        self._moved = threading.Condition()
        self._stopped = sys.platform != "linux"
        self._thread = threading.Thread(target=self._fetch, daemon=True)

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()
        self._thread.join()

    def used(self, count_bytes: int) -> None:
        """So many bytes more have been used up."""
        with self._moved:
            self._used_bytes += count_bytes
            self._moved.notify()

    def wait(self) -> None:
        """Return when everything is in memory, used up or not."""
        self.used(self.total_bytes)
        self._thread.join()

    def _fetch(self) -> None:
        """Sends each file to /dev/null, which has it read and nothing copied."""
        position = 0
        for file, size_bytes in self._size_bytes.items():
            # What is wrong with a file is for those to say who need what is in it.
            with suppress(OSError), file.open("rb") as source, open(os.devnull, "wb") as nowhere:
                for start in range(0, size_bytes, PIECE_BYTES):
                    if not self._may_fetch(position):
                        return
                    os.sendfile(nowhere.fileno(), source.fileno(), start, PIECE_BYTES)
                    position += PIECE_BYTES

    def _may_fetch(self, position: int) -> bool:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or position < self._used_bytes + AHEAD_BYTES)
            return not self._stopped
