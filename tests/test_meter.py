"""A run sees what is allocated in it, however short-lived, and reads the limits of a container."""

import mmap
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from labutils import meter as module
from labutils.meter import (
    MIB,
    Machine,
    Memory,
    Meter,
    Record,
    available_bytes,
    machine,
    mark,
    sized,
)

TOLERANCE_BYTES = 8 * MIB  # the kernel's counters, thread stacks, what the interpreter needs


def allocated(mebibytes: int) -> torch.Tensor:
    """A tensor of that size, every page of it written."""
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


@pytest.fixture
def unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No samples but those at the borders of runs, so that only the kernel's mark can tell."""
    monkeypatch.setattr(Meter, "_sample_if_open", lambda self: None)


needs_kernel_mark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="only a Linux kernel with /proc/self/clear_refs has a mark that can be set back",
)


# ---------------------------------------------------------------------------------------- one run


def test_run_sees_what_it_keeps() -> None:
    meter = Meter()
    with meter("200 MiB", predicted_bytes=200 * MIB):
        kept = allocated(200)
    (run,) = meter.runs
    assert (run.label, run.predicted_bytes, run.error) == ("200 MiB", kept.nbytes, None)
    assert run.kept_bytes == pytest.approx(200 * MIB, abs=TOLERANCE_BYTES)
    assert run.peak_above_start_bytes == pytest.approx(200 * MIB, abs=TOLERANCE_BYTES)
    assert run.peak.rss_bytes >= run.peak_bytes >= run.end_bytes == run.end.anonymous_bytes
    assert run.seconds > 0 and not run.recording and not run.on_gpu


def test_freed_memory_is_in_the_peak_and_not_in_what_is_kept() -> None:
    meter = Meter()
    with meter("up and down"):
        tensor = allocated(100)
        time.sleep(0.1)
        del tensor
    (run,) = meter.runs
    assert run.peak.anonymous_bytes - run.start_bytes >= 100 * MIB - TOLERANCE_BYTES
    assert abs(run.kept_bytes) <= TOLERANCE_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked to return freed memory")
def test_small_freed_tensors_do_not_count_as_kept() -> None:
    """Blocks below glibc's threshold stay in its heap, the newest of them pinned by the oldest."""
    meter = Meter()
    with meter("every twentieth stays"):
        tensors = [torch.ones(2**14) for _ in range(1600)]  # 64 KiB each
        kept = tensors[::20]
        del tensors
    kept_bytes = sum(tensor.nbytes for tensor in kept)
    assert meter.runs[0].kept_bytes == pytest.approx(kept_bytes, abs=TOLERANCE_BYTES)


@needs_kernel_mark
def test_exact_peak_catches_what_lives_5_milliseconds(unsampled: None) -> None:
    meter = Meter()
    with meter("a blip"):
        pages = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, 64 * MIB, mmap.PAGESIZE):
            pages[page] = 1
        time.sleep(0.005)
        pages.close()
    (run,) = meter.runs
    assert run.peak_is_exact
    assert run.peak.anonymous_bytes - run.start_bytes < TOLERANCE_BYTES, "no sample saw it"
    assert run.peak_above_start_bytes == pytest.approx(64 * MIB, abs=TOLERANCE_BYTES)


@needs_kernel_mark
def test_mapped_file_counts_in_rss_alone(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(64 * MIB))
    meter = Meter()
    with meter("map"):
        mapped = torch.from_file(str(tmp_path / "weights"), size=64 * MIB, dtype=torch.uint8)
        mapped.max()
    (run,) = meter.runs
    assert run.end.rss_bytes - run.start.rss_bytes >= 64 * MIB - TOLERANCE_BYTES
    assert run.peak_above_start_bytes < TOLERANCE_BYTES


def test_refused_mark_leaves_the_highest_sample(
    monkeypatch: pytest.MonkeyPatch, unsampled: None
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(path)

    allocated(200)  # the kernel's mark still stands there
    monkeypatch.setattr(Path, "write_text", refuse)
    meter = Meter()
    with meter("nothing"):
        pass
    (run,) = meter.runs
    assert not run.peak_is_exact
    assert run.peak_above_start_bytes < TOLERANCE_BYTES


def test_exception_ends_the_run_and_goes_on() -> None:
    meter = Meter()
    with pytest.raises(KeyError, match="w1"), meter("outer"), meter("load"):
        raise KeyError("w1")
    assert [run.error for run in meter.runs] == ["KeyError: 'w1'"] * 2
    with meter("again"):
        pass
    assert meter.runs[-1].error is None


# --------------------------------------------------------------------------------------- sampling


def test_samples_come_at_20_hertz_or_more() -> None:
    meter = Meter()
    with meter("wait"):
        time.sleep(1)
    (run,) = meter.runs
    assert len(meter.samples) / run.seconds >= 20
    assert 0.02 <= run.largest_gap_seconds < run.seconds


@pytest.mark.parametrize("interval_seconds", [0, -1, 0.06])
def test_slow_sampling_is_refused(interval_seconds: float) -> None:
    with pytest.raises(ValueError, match="at least 20 samples"):
        Meter(interval_seconds)


def test_largest_gap_tells_of_missing_samples(unsampled: None) -> None:
    meter = Meter()
    with meter("outer"), meter("a call that keeps the interpreter's lock"):
        time.sleep(0.2)
    assert all(run.largest_gap_seconds >= 0.2 for run in meter.runs)


def test_threads_run_only_inside_a_run() -> None:
    def threads(expected: int) -> int:
        """How many there are, once there are as many as expected or 5 seconds have passed."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            running = sum(thread.name == "meter" for thread in threading.enumerate())
            if running == expected:
                break
            time.sleep(0.01)
        return running

    meter = Meter()
    assert threads(0) == 0
    with meter("outer"), meter("inner"):
        assert threads(2) == 2, "one samples, one calls the listeners"
    assert threads(0) == 0


def test_clock_stands_still_between_runs() -> None:
    meter = Meter()
    with meter("first"):
        pass
    time.sleep(0.3)
    with meter("second"):
        pass
    first, second = meter.runs
    assert first.ended_seconds <= second.began_seconds < first.ended_seconds + 0.1


def test_samples_are_consistent_for_another_thread() -> None:
    meter, broken, reads = Meter(interval_seconds=0.001), [], 0
    with meter("write"):
        deadline = time.monotonic() + 0.5
        writer = threading.Thread(target=lambda: [meter.mark(str(i % 2)) for i in range(2000)])
        writer.start()
        while time.monotonic() < deadline:
            record = meter.record()
            columns = list(vars(record.samples).values())
            reads += 1
            if len({len(column) for column in columns}) != 1 or sorted(columns[0]) != [*columns[0]]:
                broken.append(record)
        writer.join()
    assert reads > 5 and not broken
    taken = meter.samples
    with meter("later"):
        pass
    assert len(taken) < len(meter.samples), "a copy does not grow"


# --------------------------------------------------------------------------------- nested, phases


@needs_kernel_mark
@pytest.mark.parametrize("same_meter", [True, False], ids=["nested", "two meters"])
def test_outer_run_keeps_its_peak_when_an_inner_sets_the_mark_back(
    same_meter: bool, unsampled: None
) -> None:
    outer = Meter()
    inner = outer if same_meter else Meter()
    with outer("outer"):
        allocated(96)
        with inner("inner"):
            allocated(48)
    peaks = {run.label: run.peak_above_start_bytes for run in {*outer.runs, *inner.runs}}
    assert peaks["inner"] == pytest.approx(48 * MIB, abs=TOLERANCE_BYTES)
    assert peaks["outer"] == pytest.approx(96 * MIB, abs=TOLERANCE_BYTES)


@needs_kernel_mark
def test_peak_of_an_inner_run_is_one_of_the_outer(unsampled: None) -> None:
    meter = Meter()
    with meter("outer"):
        with meter("first"):
            allocated(96)
        with meter("second"):
            allocated(48)
    assert [run.label for run in meter.runs] == ["first", "second", "outer"]
    above = [round(run.peak_above_start_bytes / MIB / 48) for run in meter.runs]
    assert above == [2, 1, 2]


def test_phase_lasts_until_the_next_mark_or_the_end() -> None:
    meter = Meter()
    with meter("load"):
        meter.mark("read")
        meter.mark("read")
        time.sleep(0.02)
        mark("quantize")
    (run,) = meter.runs
    read, quantize = run.phases
    assert (read.name, quantize.name) == ("read", "quantize")
    assert read.ended_seconds - read.began_seconds >= 0.02
    assert read.ended_seconds == quantize.began_seconds
    assert quantize.ended_seconds == run.ended_seconds


def test_mark_is_for_the_innermost_run_of_every_meter() -> None:
    one, other = Meter(), Meter()
    with one("outer"), one("inner"), other("beside"):
        mark("here")
    names = {run.label: [phase.name for phase in run.phases] for run in one.runs + other.runs}
    assert names == {"outer": [], "inner": ["here"], "beside": ["here"]}


def test_mark_outside_a_run_does_nothing() -> None:
    meter = Meter()
    mark("nobody is listening")
    meter.mark("nor here")
    assert meter.runs == [] and len(meter.samples) == 0


# -------------------------------------------------------------------------------------- listeners


def test_listener_hears_of_open_runs_and_of_each_end() -> None:
    """At most five times a second; on a busy machine that second may be longer."""
    records: list[Record] = []
    meter = Meter()
    meter.listen(records.append)
    with meter("a second", predicted_bytes=7):
        time.sleep(1)
    last = records[-1]
    during = [record.runs[0] for record in records if record.runs[0].recording]
    assert 1 <= len(during) <= len(records) - 1 <= 5 * meter.runs[0].seconds + 1
    assert {run.predicted_bytes for run in during} == {7}
    assert last.runs == tuple(meter.runs) and len(last.samples) == len(meter.samples)


def test_listener_that_raises_is_remembered_and_stops_nothing() -> None:
    def fail(record: Record) -> None:
        raise RuntimeError("no paint left")

    heard: list[Record] = []
    meter = Meter()
    meter.listen(fail)
    meter.listen(heard.append)
    with meter("a run"):
        time.sleep(0.3)
    assert str(meter.listener_error) == "no paint left"
    assert len(heard) >= 2 and len(meter.runs) == 1


# ------------------------------------------------------------------------------------------ table


def test_table_has_a_row_for_each_run() -> None:
    meter = Meter()
    assert meter.table().empty
    with meter("predicted", predicted_bytes=3 * MIB):
        pass
    with meter("not predicted"):
        pass
    table = meter.table()
    assert list(table["run"]) == ["predicted", "not predicted"]
    assert table["predicted MiB"][0] == 3.0 and table["predicted MiB"].isna()[1]
    assert not [column for column in table if "GPU" in column]


# ------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """PyTorch and NVML as they would be with two GPUs; what they say can be set."""
    said = SimpleNamespace(allocated=10, peak=40, used=[100, 200], marks_set_back=0)

    class NVMLError(Exception):
        pass

    def sizes(handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=1000, free=1000 - said.used[handle], used=said.used[handle])

    def by_uuid(uuid: str) -> int:
        raise NVMLError(uuid)

    def set_back(device: int) -> None:
        said.marks_set_back += 1

    for name, answer in {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "memory_allocated": lambda device: said.allocated,
        "memory_reserved": lambda device: said.allocated + 2,
        "max_memory_allocated": lambda device: said.peak,
        "max_memory_reserved": lambda device: said.peak + 2,
        "reset_peak_memory_stats": set_back,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetMemoryInfo=sizes,
        nvmlDeviceGetName=lambda handle: f"GPU {handle}",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    module._nvml_handles.cache_clear()
    yield said
    module._nvml_handles.cache_clear()


def test_gpus_are_summed_and_their_peak_is_the_allocators(two_gpus: SimpleNamespace) -> None:
    meter = Meter()
    with meter("to the GPUs"):
        two_gpus.allocated = 10**9
        two_gpus.peak = 2 * 10**9
    (run,) = meter.runs
    host = run.end.anonymous_bytes, run.end.rss_bytes
    assert run.end == Memory(*host, 2 * 10**9, 2 * 10**9 + 4, 300)
    assert (run.gpu_kept_bytes, run.on_gpu) == (2 * 10**9 - 20, True)
    assert run.gpu_peak_above_start_bytes == 4 * 10**9 - 20
    assert two_gpus.marks_set_back == 2
    assert meter.table()["kept on GPU MiB"][0] == 1907.3


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["GPU 0", "GPU 1"]), ("1", ["GPU 1"]), ("", []), ("1,-1,0", ["GPU 1"])],
)
def test_machine_lists_the_visible_gpus(
    two_gpus: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    names: list[str],
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine().gpus
    assert [gpu.name for gpu in found] == names
    assert all(gpu.total_bytes == 1000 and gpu.free_bytes in (900, 800) for gpu in found)


# ------------------------------------------------------------------------------------ the machine

GIB = 2**30


def tree(root: Path, files: dict[str, object]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup: 64 GiB of memory with 60 available, and these files."""
    files = {
        "proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {60 * 2**20} kB\nHugePages: 0",
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root / "proc", root / "cgroup"


def seen(root: Path, files: dict[str, object]) -> tuple[float, float]:
    """Total and available GiB."""
    here: Machine = machine(*tree(root, files))
    assert here.available_bytes == available_bytes(*tree(root, files))
    return here.total_bytes / GIB, here.available_bytes / GIB


V2 = {
    "memory.max": 8 * GIB,
    "memory.current": 6 * GIB,
    "memory.stat": f"anon {5 * GIB}\ninactive_file {GIB}",
}
V1 = {
    "memory.limit_in_bytes": 8 * GIB,
    "memory.usage_in_bytes": 6 * GIB,
    "memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}",
}
OPEN_V1 = {
    "memory.limit_in_bytes": 9223372036854771712,
    "memory.usage_in_bytes": 6 * GIB,
    "memory.stat": "total_inactive_file 0",
}


def within(folder: str, files: dict[str, object]) -> dict[str, object]:
    return {f"cgroup/{folder}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "total_and_available"),
    [
        ({}, (64, 60)),
        ({"proc/self/cgroup": "0::/", **within(".", V2)}, (8, 3)),
        ({"proc/self/cgroup": "0::/lab/run", **within("lab", V2)}, (8, 3)),
        ({"proc/self/cgroup": "0::/docker/of/the/host", **within(".", V2)}, (8, 3)),
        ({"proc/self/cgroup": "0::/", **within(".", V2 | {"memory.max": "max"})}, (64, 60)),
        ({"proc/self/cgroup": "0::/", **within(".", V2 | {"memory.current": 9 * GIB})}, (8, 0)),
        ({"proc/self/cgroup": "0::/", **within(".", V2 | {"memory.max": 128 * GIB})}, (64, 60)),
        ({"proc/self/cgroup": "5:cpu:/\n4:memory:/a/b", **within("memory/a/b", V1)}, (8, 3)),
        ({"proc/self/cgroup": "4:memory:/a/b", **within("memory", OPEN_V1)}, (64, 60)),
        ({"proc/self/cgroup": "5:cpu:/a\n0::/", **within("memory/a", V1)}, (64, 60)),
        ({"proc/self/cgroup": "0::/a", **within("unified/a", V2)}, (8, 3)),
    ],
    ids=[
        "no cgroups",
        "v2",
        "v2 limit of a parent",
        "v2 path of the host",
        "v2 without limit",
        "v2 over its limit",
        "v2 limit above the machine",
        "v1",
        "v1 without limit",
        "v1 of another controller",
        "hybrid",
    ],
)
def test_memory_under_a_cgroup(
    tmp_path: Path, files: dict[str, object], total_and_available: tuple[float, float]
) -> None:
    assert seen(tmp_path, files) == total_and_available


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a", "cgroup/a/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a", "cgroup/a/cpu.max": "20000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a", "cgroup/a/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a", "cgroup/a/cpu.max": "max 100000"}, 8),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a",
                "cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
                "cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ({"proc/self/cgroup": "3:cpu:/", "cgroup/cpu/cpu.cfs_quota_us": "-1"}, 8),
    ],
)
def test_cores_under_a_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, object], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine(*tree(tmp_path, files)).cores == cores


def test_machine_as_it_is() -> None:
    here = machine()
    assert here.cores >= 1 and here.platform
    assert 0 < here.available_bytes <= here.total_bytes


def test_bytes_are_read_in_gibibytes_or_mebibytes() -> None:
    assert sized(3 * 2**29) == "1.50 GiB" and sized(2**30) == "1.00 GiB"
    assert sized(2**30 - 2**20) == "1023.00 MiB" and sized(0) == "0.00 MiB"
