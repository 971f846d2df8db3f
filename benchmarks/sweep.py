"""How fast recipes are tried: two hundred of them on the stand-in, in a process for each core.

    python benchmarks/sweep.py

Starting the processes is counted, some seconds of imports in each.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

from labutils.recipes import Recipe
from labutils.sweeps import OnStandin, sweep

WIDTHS = ("int2", "int3", "int4", "int8", "bf16")


def recipes() -> list[Recipe]:
    """Every mixture of these widths for experts, attention, router, and both ends: 200."""
    return [
        Recipe(experts, attention, router, ends, ends, double_quant=False)
        for experts, attention, router, ends in itertools.product(
            WIDTHS, WIDTHS, WIDTHS[1:], ("int4", "bf16")
        )
    ]


def main() -> float:
    tried, cores = recipes(), os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        sweep(OnStandin(), tried, Path(folder) / "table.csv", progress=False)
        seconds = time.perf_counter() - began
    pace = len(tried) / seconds / cores
    print(f"{len(tried)} recipes in {seconds:.1f} s: {pace:.1f} a second and core, {cores} cores")
    return pace


if __name__ == "__main__":
    main()
