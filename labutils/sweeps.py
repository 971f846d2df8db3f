"""Hundreds of recipes tried on all cores or many machines, into a table that survives a kill.

    recipes = [Recipe.keeping("fp32", experts=f"int{bits}") for bits in range(2, 9)]
    frame = sweep(OnStandin(), recipes, "front.csv")

The work is spread by joblib: over processes of this machine, or over the machines of a Dask
cluster, by joblib's own backend for it:

    client = distributed.Client("scheduler-address:8786")
    with joblib.parallel_config("dask"):
        frame = sweep(OnStandin(), recipes, "front.csv")

Where a worker dies, Dask measures its recipe again on another one. On this machine alone joblib
stops then with a `TerminatedWorkerError`; the next call goes on where it stopped. A recipe that
four workers die of is given up by Dask, of which joblib (1.6.0) hears nothing: all others are
measured, and the sweep waits until it is interrupted.
"""

import csv
import io
import json
import numbers
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import joblib
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import standin
from .budget import weight_bytes, weights_in
from .checkpoints import load
from .recipes import Recipe
from .shaker import Shaker

RECIPE, MEASURE = "recipe", "measure"
Measure = Callable[[Recipe], Mapping[str, float]]


@dataclass(frozen=True)
class OnStandin:
    """A measure for `sweep`: what a recipe, *simulated*, makes of the stand-in on `pages` pages.

    A call gives `bytes` of all weights, constants included, and `bits_per_weight` of all
    parameters; `kl` with its 95% interval, and `loss`, in nats per token; `accuracy`, the share of
    right answers; and `flip_rate`, the share of tokens whose set of experts changed, over all
    layers. The pages are of lines that training never showed, or with `held_out=False` of those it
    did: choose by these, and judge by the others. See `Shaker`.

    The model is in float32, is loaded once in each process, and computes on one thread, so that the
    numbers are the same to the last bit whichever process they are from. (Processors of another
    make may round otherwise: those of a cluster should be alike.)
    """

    pages: int = 8
    held_out: bool = True

    def __call__(self, recipe: Recipe) -> dict[str, float]:
        with _alone():
            shaker = _shaker(self.pages, self.held_out)
            weights = list(weights_in(shaker.model))
            shaken = shaker.simulate(recipe)
            kl = shaken.intervals.kl
            size = sum(weight_bytes(weight, recipe) for weight in weights)
            return {
                "bytes": size,
                "bits_per_weight": 8 * size / sum(weight.parameters for weight in weights),
                "kl": kl.estimate,
                "kl_low": kl.low,
                "kl_high": kl.high,
                "loss": shaken.nats.mean().item(),
                "accuracy": shaken.accuracy,
                "flip_rate": shaken.flip_rate,
            }


def sweep(
    measure: Measure,
    recipes: Iterable[Recipe],
    table: Path | str,
    n_jobs: int = -1,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each recipe, in their order: the recipe as `one_line`, then what was measured.

    `measure` gives the same names, with plain numbers, for every recipe. It is pickled, and called
    in `n_jobs` processes (-1: as many as there are cores; a Dask cluster uses all that it has).
    Equal recipes are measured once and have one row. `progress` shows a bar.

    The CSV file `table` is written anew after each result and renamed into place, so it is whole at
    any time, and a kill loses no more than what is just being measured. Recipes that it has already
    are not measured again: after a kill the same call goes on. Rows of other recipes stay in the
    file and are not returned. Its last column names the measure with its arguments; a change of
    the code behind it is not noticed, so take another table then. No two sweeps may write one table
    at a time.

    Raises RuntimeError with the recipe and the traceback if a measurement fails, or gives anything
    but numbers, or other names than those of the table: what is under way is finished and saved
    before, and nothing else begun. Before anything is measured, raises ValueError for a measure
    whose name does not tell it from others (a lambda, a function within another, an object without
    a repr), and for a file that is no sweep's table, is damaged, or is that of another measure;
    and OSError if the file cannot be written.
    """
    measured_by = _name(measure)
    sheet = _Sheet.read(Path(table), measured_by)
    wanted = {one_line(recipe): recipe for recipe in recipes}
    missing = [line for line in wanted if line not in sheet.rows]
    if missing:
        sheet.require_writable()
    failures = []

    def calls() -> Iterator:
        for line in missing:
            if failures:
                return
            yield joblib.delayed(_measured)(measure, line, wanted[line])

    workers = joblib.Parallel(n_jobs, return_as="generator_unordered", batch_size=1)
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), disable=not progress)
    with bar:
        for result in workers(calls()) if missing else ():
            if failure := result.failure or sheet.mismatch(result.values):
                failures.append(f"Measuring {result.line} failed: {failure}")
                continue
            sheet.add(result, order=wanted)
            bar.update()
    if failures:
        raise RuntimeError(failures[0])
    return sheet.frame(wanted)


def one_line(recipe: Recipe) -> str:
    """A recipe as one line of JSON, without what is default; `Recipe(**json.loads(line))` reads it.

    >>> one_line(Recipe(router="int8", experts="int3"))
    '{"experts": "int3", "router": "int8"}'

    Equal lines are equal recipes. Overrides keep their order, for the last one counts.
    """
    default = Recipe().to_dict()
    chosen = {name: value for name, value in recipe.to_dict().items() if value != default[name]}
    return json.dumps(dict(sorted(chosen.items())))


@dataclass(frozen=True)
class _Result:
    """What came of one recipe: its `values`, or the `failure` in words."""

    line: str
    values: dict[str, float] = field(default_factory=dict)
    failure: str = ""


def _measured(measure: Measure, line: str, recipe: Recipe) -> _Result:
    """Run in a worker. A failure comes back as text: not every exception can be pickled."""
    try:
        values = dict(measure(recipe))
    except Exception:
        return _Result(line, failure=traceback.format_exc())
    if not values or not all(isinstance(value, numbers.Real) for value in values.values()):
        return _Result(line, failure=f"{values} are not plain numbers by name.")
    if {RECIPE, MEASURE} & set(values):
        return _Result(line, failure=f"{RECIPE!r} and {MEASURE!r} are columns already: {values}.")
    return _Result(line, {name: _plain(value) for name, value in values.items()})


def _plain(value: numbers.Real) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@dataclass
class _Sheet:
    """A table's rows by recipe, kept as text, so that a resumed table is the same bytes."""

    path: Path
    measured_by: str
    names: list[str]
    rows: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path, measured_by: str) -> "_Sheet":
        """The sheet in the file at `path`; an empty one where there is none."""
        if not path.exists():
            return cls(path, measured_by, [], {})
        try:
            text = path.read_bytes().decode("utf-8")
            header, *lines = [*csv.reader(io.StringIO(text, newline=""))] or [[]]
        except (UnicodeDecodeError, csv.Error):
            raise _damaged(path, "it holds what is no text") from None
        titled = (header[:1], header[2:][-1:]) == ([RECIPE], [MEASURE])
        if titled and not text.endswith("\n"):
            raise _damaged(path, "its last line is cut off")
        whole = all(len(line) == len(header) for line in lines)
        if not whole or not titled:
            raise ValueError(
                f"{path} is no table of a sweep, whose columns are {RECIPE!r}, some measures, and "
                f"{MEASURE!r}. Remove it or take another name."
            )
        for line in lines:
            if wrong := [cell for cell in line[1:-1] if not _is_number(cell)]:
                raise _damaged(path, f"{wrong[0]!r} is no number, in the row of {line[0]}")
        if others := {line[-1] for line in lines} - {measured_by}:
            raise ValueError(
                f"{path} holds what {others.pop()} measured, not {measured_by}; take another table."
            )
        return cls(path, measured_by, header[1:-1], {line[0]: line[1:-1] for line in lines})

    def require_writable(self) -> None:
        """OSError unless a file can be written beside the table, whose folder is made for it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._beside.touch()
            self._beside.unlink()
        except OSError as problem:
            raise OSError(
                f"{self.path} cannot be written ({problem}); nothing was measured. Take another "
                "table."
            ) from None

    def mismatch(self, values: dict[str, float]) -> str:
        """What is wrong with the names of `values`, in words; "" if nothing is."""
        if not self.names or list(values) == self.names:
            return ""
        return f"it gives {', '.join(values)}, but {self.path} has {', '.join(self.names)}."

    def add(self, result: _Result, order: Iterable[str]) -> None:
        """Add a row and write the file: the rows in `order` first, the others as they stood."""
        self.names = list(result.values)
        self.rows[result.line] = [repr(value) for value in result.values.values()]
        first = [line for line in order if line in self.rows]
        lines = dict.fromkeys([*first, *self.rows])
        self._beside.write_text(self._text(lines), encoding="utf-8", newline="\n")
        os.replace(self._beside, self.path)

    def frame(self, lines: Iterable[str]) -> pd.DataFrame:
        """The rows of `lines`, read from the text: the same file gives the same frame."""
        text = io.StringIO(self._text(lines))
        return pd.read_csv(text).drop(columns=MEASURE)

    @property
    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def _text(self, lines: Iterable[str]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([RECIPE, *self.names, MEASURE])
        writer.writerows([line, *self.rows[line], self.measured_by] for line in lines)
        return text.getvalue()


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} is damaged: {how}. Mend or remove it, or take another table.")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _name(measure: Measure) -> str:
    """A measure in words that are the same in every process: `OnStandin(pages=8)`.

    ValueError where others have the same: a lambda, a function within another, or an object with an
    address for a name, in which the arguments are not.
    """
    bound = hasattr(measure, "__self__")
    function = "" if bound else getattr(measure, "__qualname__", "")
    named = re.sub(r"<function ([\w.]+) at 0x\w+>", r"<function \1>", repr(measure))
    if "<" in function or (not function and re.search(r" at 0x\w+>", named)):
        raise ValueError(
            f"The measure {measure!r} cannot be told from others by its name, which the table "
            "keeps: give it a repr that names its arguments, as a dataclass has, or take a "
            "function of a module."
        )
    return function or named


_ALONE = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, no other thread simulates anything in the same model, and torch has one thread."""
    with _ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _shaker(pages: int, held_out: bool) -> Shaker:
    return Shaker(load(standin.PATH).float(), standin.tokenizer(), pages, held_out=held_out)
