"""How much memory something takes while it runs, and how much of it stays.

A process has no single size. The number that most tools show, the resident set (RSS), counts every
page that is in physical memory now, whoever owns it. That number lies about checkpoints:
`safetensors` maps the file, so a model of 768 MB "loads" in a hundredth of a second with the RSS
flat; the RSS then rises page by page as the weights are touched; and those pages are copies of a
file, which the kernel may drop whenever it needs room. The part that cannot be dropped is
*anonymous* memory: pages with no file behind them, such as the heap and every tensor that was
computed instead of mapped. A model that fits is one whose anonymous memory fits, so that is what a
`Meter` reports first, with the RSS beside it.

What is read, where:

| system  | anonymous                                   | highest RSS                    |
|---------|---------------------------------------------|--------------------------------|
| Linux   | `RssAnon` of /proc/self/status              | `VmHWM`, the kernel's own mark |
| Windows | private bytes (committed, psutil `private`) | the highest sample             |
| macOS   | unique set size (psutil `uss`)              | the highest sample             |

A sampler misses what lives between two samples. The kernel does not: it keeps the highest RSS in
`VmHWM`, and writing 5 to /proc/self/clear_refs sets that mark back to the present
(`man 5 proc_pid_clear_refs`). PyTorch's CUDA allocator keeps such marks too. There is one set of
marks for the process, so all runs that are open take note of them before anyone sets them back.

A freed tensor is not always given back: the C allocator keeps blocks for later, and a second model
can move into the holes of the first and seem to take nothing. So a run begins and ends by asking
glibc to return what is free (`man 3 malloc_trim`). In between, and on other systems throughout,
what the allocator keeps counts; peaks include it.

Left out: pages in swap and the memory of child processes. The kernel's counters are good to about
1 MiB.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from time import perf_counter
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    import pandas

MIB = 2**20
GIB = 2**30
SLOWEST_INTERVAL_SECONDS = 0.05
LISTEN_EVERY_SECONDS = 0.2


def sized(size_bytes: int) -> str:
    """A number of bytes to be read: in GiB, or in MiB below one.

    >>> sized(3 * 2**29), sized(3 * 2**20)
    ('1.50 GiB', '3.00 MiB')
    """
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.2f} MiB"


# ---------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class Memory:
    """Five sizes of this process in bytes, each from its own source.

    `gpu_allocated_bytes` is what tensors occupy and `gpu_reserved_bytes` what PyTorch holds for
    them, both summed over the GPUs; `gpu_driver_bytes` is what the driver counts on these GPUs
    (NVML), CUDA's own context and other processes included. All three are 0 without a GPU.
    """

    anonymous_bytes: int
    rss_bytes: int
    gpu_allocated_bytes: int = 0
    gpu_reserved_bytes: int = 0
    gpu_driver_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """The resident part that has a file or shared memory behind it."""
        return max(0, self.rss_bytes - self.anonymous_bytes)

    def highest(self, other: Memory) -> Memory:
        """Each of the five sizes at the larger of its two values."""
        return Memory(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Samples:
    """What a meter saw: one column for each quantity, one entry for each sample.

    `seconds` counts recorded time: the clock stands still between runs. The other columns are
    those of `Memory`, in bytes. They are `array.array`s, 48 bytes a sample.
    """

    seconds: array
    anonymous_bytes: array
    rss_bytes: array
    gpu_allocated_bytes: array
    gpu_reserved_bytes: array
    gpu_driver_bytes: array

    @classmethod
    def empty(cls) -> Samples:
        """Columns without an entry."""
        return cls(array("d"), *(array("q") for _ in fields(Memory)))

    def __len__(self) -> int:
        return len(self.seconds)

    def copy(self) -> Samples:
        """The same samples in columns of their own."""
        return Samples(**{name: column[:] for name, column in vars(self).items()})

    def _append(self, seconds: float, memory: Memory) -> None:
        for column, value in zip(vars(self).values(), (seconds, *astuple(memory)), strict=True):
            column.append(value)


@dataclass(frozen=True)
class Phase:
    """A named stretch of a run, in seconds on the meter's clock."""

    name: str
    began_seconds: float
    ended_seconds: float


@dataclass(frozen=True)
class Run:
    """One `with meter(label):` block: what it started from, what it left, how high it went.

    `start`, `end` and `peak` hold all five sizes; `peak` has each at its highest. Of these
    `peak.anonymous_bytes` and `peak.gpu_driver_bytes` are the highest samples, the GPU's other two
    are PyTorch's own marks (summed over the GPUs), and `peak.rss_bytes` is the kernel's where
    `peak_is_exact`, else a sample too.

    `peak_bytes` is the main one: anonymous memory at its highest. It is the highest sample or,
    where the kernel's mark shows that the RSS went higher between two samples, that mark less the
    largest file-backed part seen. So it also finds an allocation that lived 5 ms; it is too high
    only by file pages that came and went between two samples.

    `largest_gap_seconds` is the longest time without a sample: C code that keeps the interpreter's
    lock stops the sampling. `predicted_bytes` is what was expected to stay, `error` says how the
    block failed, and `recording` is True in a record taken before the run ended.

    Example: start 100, peak 190, end 140 (MiB) is 40 kept, with a peak 90 above the start.
    """

    label: str
    began_seconds: float
    seconds: float
    start: Memory
    end: Memory
    peak: Memory
    peak_bytes: int
    peak_is_exact: bool
    phases: tuple[Phase, ...]
    largest_gap_seconds: float
    predicted_bytes: int | None = None
    error: str | None = None
    recording: bool = False

    @property
    def start_bytes(self) -> int:
        """Anonymous memory at the start."""
        return self.start.anonymous_bytes

    @property
    def end_bytes(self) -> int:
        """Anonymous memory at the end."""
        return self.end.anonymous_bytes

    @property
    def kept_bytes(self) -> int:
        """Anonymous memory that the run left behind; negative if it freed some."""
        return self.end_bytes - self.start_bytes

    @property
    def peak_above_start_bytes(self) -> int:
        """How far anonymous memory rose above the start."""
        return self.peak_bytes - self.start_bytes

    @property
    def gpu_kept_bytes(self) -> int:
        """What tensors occupy on the GPUs at the end, above the start."""
        return self.end.gpu_allocated_bytes - self.start.gpu_allocated_bytes

    @property
    def gpu_peak_above_start_bytes(self) -> int:
        """How far tensors on the GPUs rose above the start."""
        return self.peak.gpu_allocated_bytes - self.start.gpu_allocated_bytes

    @property
    def on_gpu(self) -> bool:
        """Whether the run left more on the GPUs than in the host's memory."""
        return self.gpu_kept_bytes > max(0, self.kept_bytes)

    @property
    def ended_seconds(self) -> float:
        """The end on the meter's clock."""
        return self.began_seconds + self.seconds


@dataclass(frozen=True)
class Record:
    """All that a meter knows at one moment: its samples, and its runs with the open ones last."""

    samples: Samples
    runs: tuple[Run, ...]


@dataclass(eq=False)
class _OpenRun:
    label: str
    predicted_bytes: int | None
    began_seconds: float
    start: Memory
    peak: Memory
    peak_file_bytes: int
    peak_is_exact: bool
    largest_gap_seconds: float = 0.0
    marks: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None

    def see(self, memory: Memory, gap_seconds: float) -> None:
        self.peak = self.peak.highest(memory)
        self.peak_file_bytes = max(self.peak_file_bytes, memory.file_bytes)
        self.largest_gap_seconds = max(self.largest_gap_seconds, gap_seconds)

    def see_marks(self, marks: Memory) -> None:
        rss_bytes = marks.rss_bytes if self.peak_is_exact else 0
        self.peak = self.peak.highest(replace(marks, rss_bytes=rss_bytes))

    def mark(self, name: str, seconds: float) -> None:
        if not self.marks or self.marks[-1][0] != name:
            self.marks.append((name, seconds))

    def as_run(self, seconds: float, end: Memory, recording: bool) -> Run:
        bounds = pairwise([*self.marks, ("", seconds)])
        return Run(
            label=self.label,
            began_seconds=self.began_seconds,
            seconds=seconds - self.began_seconds,
            start=self.start,
            end=end,
            peak=self.peak,
            peak_bytes=max(self.peak.anonymous_bytes, self.peak.rss_bytes - self.peak_file_bytes),
            peak_is_exact=self.peak_is_exact,
            phases=tuple(Phase(name, began, ended) for (name, began), (_, ended) in bounds),
            largest_gap_seconds=self.largest_gap_seconds,
            predicted_bytes=self.predicted_bytes,
            error=self.error,
            recording=recording,
        )


# -------------------------------------------------------------------------------------- the meter

_LOCK = threading.RLock()
_RECORDING: list[Meter] = []


def mark(name: str) -> None:
    """Every meter that is recording right now enters the phase `name`; without one, nothing.

    For library code, which need not know who is watching:

    >>> mark("quantize")
    """
    with _LOCK:
        for meter in _RECORDING:
            meter.mark(name)


class Meter:
    """Records the memory of this process while a block runs, fifty times a second.

    >>> meter = Meter()
    >>> with meter("twelve million ones", predicted_bytes=48_000_000):
    ...     ones = torch.ones(12_000_000)
    >>> round(meter.runs[0].kept_bytes / 48_000_000, 1)
    1.0

    Runs may be nested; an inner run is an entry of its own in `runs`, which lists them in the order
    in which they ended. A thread samples every `interval_seconds`, and only inside a `with`. An
    exception ends the run, which remembers it, and goes on to the caller. Opening a run sets back
    the process's marks: `VmHWM` and `torch.cuda.max_memory_allocated`.

    `listener_error` is the last exception that a listener raised, or None.

    Raises ValueError for an interval that is not above 0, or above 0.05 seconds (20 Hz).
    """

    def __init__(self, interval_seconds: float = 0.02) -> None:
        if not 0 < interval_seconds <= SLOWEST_INTERVAL_SECONDS:
            raise ValueError(
                f"interval_seconds={interval_seconds}: choose one above 0 and at most "
                f"{SLOWEST_INTERVAL_SECONDS}, so that at least 20 samples are taken in a second"
            )
        self.interval_seconds = interval_seconds
        self.runs: list[Run] = []
        self.listener_error: Exception | None = None
        self._samples = Samples.empty()
        self._latest = Memory(0, 0)
        self._open: list[_OpenRun] = []
        self._listeners: list[Callable[[Record], None]] = []
        self._listening = threading.Lock()
        self._clock_zero_seconds = 0.0

    @contextmanager
    def __call__(self, label: str, predicted_bytes: int | None = None) -> Iterator[Meter]:
        """Records the block as one run; `predicted_bytes` is what you expect it to leave behind."""
        run = self._begin(label, predicted_bytes)
        try:
            yield self
        except BaseException as error:
            run.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._end(run)

    def mark(self, name: str) -> None:
        """The innermost open run enters the phase `name`, until the next mark or its end.

        The phase that it is already in, or no open run: nothing happens.
        """
        with _LOCK:
            if self._open:
                self._sample()
                self._open[-1].mark(name, self._samples.seconds[-1])

    @property
    def samples(self) -> Samples:
        """A copy of all samples so far, consistent also while another thread records."""
        with _LOCK:
            return self._samples.copy()

    def record(self) -> Record:
        """All samples and runs so far, consistent also while another thread records."""
        with _LOCK:
            samples = self._samples.copy()
            open_runs = [
                run.as_run(samples.seconds[-1], self._latest, recording=True) for run in self._open
            ]
            return Record(samples, (*self.runs, *open_runs))

    def listen(self, listener: Callable[[Record], None]) -> None:
        """Calls `listener` with the record, 5 times a second while recording and after each run.

        The calls come one at a time: while recording from a thread beside the one that samples, at
        the end of a run from the thread that ran it. What a listener raises is kept in
        `listener_error`, and the recording goes on.
        """
        self._listeners.append(listener)

    def table(self) -> pandas.DataFrame:
        """The runs that have ended as a DataFrame, one row each, sizes in MiB = 2**20 bytes.

        Kept and peak are above the run's start. The columns on GPU memory are there when a run
        used any.
        """
        import pandas

        frame = pandas.DataFrame([_row(run) for run in self.runs])
        used_gpu = any(run.peak.gpu_allocated_bytes for run in self.runs)
        return frame if used_gpu else frame.drop(columns=[c for c in frame if "GPU" in c])

    def _begin(self, label: str, predicted_bytes: int | None) -> _OpenRun:
        _return_freed_memory()
        with _LOCK:
            if not self._open:
                self._clock_zero_seconds = perf_counter() - self._recorded_seconds()
                _RECORDING.append(self)
            now = self._sample()
            _share_marks()
            run = _OpenRun(
                label=label,
                predicted_bytes=predicted_bytes,
                began_seconds=self._recorded_seconds(),
                start=now,
                peak=now,
                peak_file_bytes=now.file_bytes,
                peak_is_exact=_set_marks_back(),
            )
            self._open.append(run)
            if len(self._open) == 1:
                self._start_sampling()
            return run

    def _end(self, run: _OpenRun) -> None:
        with _LOCK:
            self._sample()
            _return_freed_memory()
            now = self._sample()
            _share_marks()
            self._open.remove(run)
            self.runs.append(run.as_run(self._recorded_seconds(), now, recording=False))
            if not self._open:
                _RECORDING.remove(self)
                self._done.set()
        self._notify()

    def _recorded_seconds(self) -> float:
        """Recorded time up to the last sample."""
        return self._samples.seconds[-1] if len(self._samples) else 0.0

    def _sample(self) -> Memory:
        memory = _memory()
        seconds = perf_counter() - self._clock_zero_seconds
        for run in self._open:
            run.see(memory, seconds - self._recorded_seconds())
        self._samples._append(seconds, memory)
        self._latest = memory
        return memory

    def _start_sampling(self) -> None:
        self._done = threading.Event()
        for work, pause_seconds in (
            (self._sample_if_open, self.interval_seconds),
            (self._notify, LISTEN_EVERY_SECONDS),
        ):
            threading.Thread(
                target=_repeat, args=(work, pause_seconds, self._done), name="meter", daemon=True
            ).start()

    def _sample_if_open(self) -> None:
        with _LOCK:
            if self._open:
                self._sample()

    def _notify(self) -> None:
        with self._listening:
            record = self.record() if self._listeners else None
            for listener in self._listeners:
                try:
                    listener(record)
                except Exception as error:
                    self.listener_error = error


def _repeat(work: Callable[[], object], pause_seconds: float, done: threading.Event) -> None:
    while not done.wait(pause_seconds):
        work()


def _row(run: Run) -> dict[str, object]:
    def mib(size_bytes: int | None) -> float:
        return math.nan if size_bytes is None else round(size_bytes / MIB, 1)

    return {
        "run": run.label,
        "seconds": round(run.seconds, 2),
        "predicted MiB": mib(run.predicted_bytes),
        "kept MiB": mib(run.kept_bytes),
        "peak MiB": mib(run.peak_above_start_bytes),
        "kept on GPU MiB": mib(run.gpu_kept_bytes),
        "peak on GPU MiB": mib(run.gpu_peak_above_start_bytes),
        "highest RSS MiB": mib(run.peak.rss_bytes),
        "RSS is exact": run.peak_is_exact,
        "largest gap seconds": round(run.largest_gap_seconds, 3),
        "error": run.error or "",
    }


# ------------------------------------------------------------------------ reading this process


def _memory() -> Memory:
    if sys.platform == "linux":
        status = _status()
        host = status.get("RssAnon", status["VmRSS"]), status["VmRSS"]
    else:
        process = psutil.Process()
        sizes = process.memory_info() if os.name == "nt" else process.memory_full_info()
        host = (sizes.private if os.name == "nt" else sizes.uss), sizes.rss
    return Memory(*host, *_over_gpus("memory_allocated", "memory_reserved"), _driver_bytes())


def _marks() -> Memory:
    """The highest sizes since the marks were set back, by whoever keeps one; 0 elsewhere."""
    rss_bytes = _status().get("VmHWM", 0) if sys.platform == "linux" else 0
    return Memory(0, rss_bytes, *_over_gpus("max_memory_allocated", "max_memory_reserved"))


def _share_marks() -> None:
    """Every open run of every meter takes note of the marks."""
    marks = _marks()
    for meter in _RECORDING:
        for run in meter._open:
            run.see_marks(marks)


def _set_marks_back() -> bool:
    """Sets the process's marks to the present; whether the kernel's could be set."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_freed_memory() -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _status() -> dict[str, int]:
    return _kib_lines(Path("/proc/self/status"))


def _kib_lines(path: Path) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file under /proc, in bytes."""
    lines = (line.split() for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}


def _over_gpus(*sizes: str) -> list[int]:
    """These functions of `torch.cuda`, each summed over the GPUs; 0 before CUDA is in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [sum(getattr(torch.cuda, size)(device) for device in devices) for size in sizes]


def _driver_bytes() -> int:
    return sum(gpu.total_bytes - gpu.free_bytes for gpu in _nvml_gpus())


@cache
def _nvml_handles() -> tuple[object, ...]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, without starting CUDA."""
    try:
        import pynvml
    except ImportError:
        return ()
    handles = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        every = ",".join(map(str, range(pynvml.nvmlDeviceGetCount())))
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(","):
            by_index = name.strip().isdigit()
            handles.append(
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if by_index
                else pynvml.nvmlDeviceGetHandleByUUID(name.strip())
            )
    return tuple(handles)


def _nvml_gpus() -> tuple[Gpu, ...]:
    """The GPUs as NVML sees them now; none where it cannot tell."""
    gpus = []
    for handle in _nvml_handles():
        import pynvml

        with suppress(pynvml.NVMLError):
            sizes = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(pynvml.nvmlDeviceGetName(handle), sizes.total, sizes.free))
    return tuple(gpus)


# --------------------------------------------------------------------------- what there is in all

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it, in bytes."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What this process may use: `cores`, memory in bytes, and the GPUs it can see."""

    cores: int
    total_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    platform: str


def machine(proc: Path = PROC, cgroup: Path = CGROUP) -> Machine:
    """The cores, memory and GPUs that this process may use, a container's limits included.

    A container sees the whole machine in /proc/meminfo, yet the kernel ends it at its cgroup's
    limit. Every cgroup from the process's own up to the root counts, in version 1 and version 2.
    Where NVML can be asked, CUDA is not started. `proc` and `cgroup` are where those trees are.

    Example: 64 GiB in the machine and a container limited to 8 GiB: `total_bytes` is 8 * 2**30.
    """
    return Machine(
        cores=_cores(proc, cgroup),
        total_bytes=min(room.total_bytes for room in _rooms(proc, cgroup)),
        available_bytes=available_bytes(proc, cgroup),
        gpus=_gpus(),
        platform=f"{platform.platform()}, Python {platform.python_version()}",
    )


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """How many more bytes of host memory this process can use before something must give.

    The system's own estimate, or what a cgroup leaves where that is less: its limit, less what is
    in use. File pages that nobody used lately (`inactive_file`) do not count as in use, since the
    kernel drops them first.

    Example: a limit of 8 GiB, 6 GiB in use, 1 GiB of that inactive file pages: 3 GiB.
    """
    return min(room.available_bytes for room in _rooms(proc, cgroup))


@dataclass(frozen=True)
class _Room:
    total_bytes: int
    available_bytes: int


def _rooms(proc: Path, cgroup: Path) -> list[_Room]:
    """The system's memory, then that of every cgroup with a limit around this process."""
    rooms = [_system_room(proc)]
    for directory in _cgroups("memory", proc, cgroup):
        for limit, usage, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):
                limit_bytes = int((directory / limit).read_text())
                usage_bytes = int((directory / usage).read_text())
                stat = dict(map(str.split, (directory / "memory.stat").read_text().splitlines()))
                busy_bytes = max(0, usage_bytes - int(stat.get(inactive, 0)))
                rooms.append(_Room(limit_bytes, max(0, limit_bytes - busy_bytes)))
    return rooms


def _system_room(proc: Path) -> _Room:
    if (proc / "meminfo").exists():
        sizes = _kib_lines(proc / "meminfo")
        return _Room(sizes["MemTotal"], sizes["MemAvailable"])
    memory = psutil.virtual_memory()
    return _Room(memory.total, memory.available)


def _cores(proc: Path, cgroup: Path) -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [_cpu_quota(directory) for directory in _cgroups("cpu", proc, cgroup)]
    return max(1, int(min([allowed or 1, *quotas])))


def _cpu_quota(directory: Path) -> float:
    """The cores that a cgroup may use, infinite without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (directory / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError):
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        if quota > 0:
            return quota / int((directory / "cpu.cfs_period_us").read_text())
    return math.inf


def _cgroups(controller: str, proc: Path, cgroup: Path) -> list[Path]:
    """Where this process's cgroups for `controller` may be, from its own up to the root."""
    with suppress(FileNotFoundError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        found = []
        for _, controllers, path in (line.split(":", 2) for line in lines):
            if controllers and controller not in controllers.split(","):
                continue
            own = PurePosixPath(path)
            for mount in (controllers, controller) if controllers else ("", "unified"):
                found += [cgroup / mount / str(part)[1:] for part in (own, *own.parents)]
        return list(dict.fromkeys(found))
    return []


def _gpus() -> tuple[Gpu, ...]:
    """By NVML, else by CUDA itself (or ROCm), which starts it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return _nvml_gpus() or tuple(
        Gpu(torch.cuda.get_device_name(device), total_bytes, free_bytes)
        for device in devices
        for free_bytes, total_bytes in [torch.cuda.mem_get_info(device)]
    )
