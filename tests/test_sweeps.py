import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import distributed
import joblib
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils import standin
from labutils.budget import predict
from labutils.checkpoints import load
from labutils.evaluate import kl, nats_by_token
from labutils.flips import record
from labutils.formats import FORMATS
from labutils.recipes import Recipe, simulated
from labutils.shaker import Shaker
from labutils.sweeps import OnStandin, one_line, sweep

SIZES = (32, 64, 128, 256, 512, 1024)
RECIPES = [Recipe(experts=format, block_size=size) for format in ("int2", "int3") for size in SIZES]


@dataclass(frozen=True)
class Counted:
    """Writes a line to `calls` for each recipe; then does what `mishap` says.

    "slow" waits a little at every recipe; "raises" does so too, and raises at block size 256;
    "dies" kills its process there, the first time.
    """

    calls: Path
    mishap: str = ""

    def __call__(self, recipe: Recipe) -> dict[str, float]:
        with self.calls.open("a") as file:
            file.write(one_line(recipe) + "\n")
        if self.mishap in ("slow", "raises"):
            time.sleep(0.2)
        if recipe.block_size == 256:
            self._come_to_grief(recipe)
        return {"bits": int(recipe.experts[-1]), "share": 1 / (3 * recipe.block_size)}

    def _come_to_grief(self, recipe: Recipe) -> None:
        if self.mishap == "raises":
            raise _Unpicklable(f"no luck with {recipe.experts}")
        if self.mishap == "dies" and not self.calls.with_suffix(".died").exists():
            self.calls.with_suffix(".died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.calls.read_text().splitlines())


class _Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("an exception that cannot leave its process")


@pytest.fixture
def measure(tmp_path):
    return Counted(tmp_path / "calls.txt")


def test_a_row_for_each_recipe_in_their_order(tmp_path, measure):
    frame = sweep(measure, RECIPES, tmp_path / "new" / "table.csv", n_jobs=2, progress=False)
    assert list(frame.columns) == ["recipe", "bits", "share"]
    assert [Recipe(**json.loads(line)) for line in frame["recipe"]] == RECIPES
    assert frame["bits"].tolist() == [2] * 6 + [3] * 6
    assert frame["share"].tolist() == [1 / (3 * size) for size in SIZES] * 2
    file = pd.read_csv(tmp_path / "new" / "table.csv")
    pd.testing.assert_frame_equal(file.drop(columns="measure"), frame)
    assert not list(tmp_path.rglob("*.part"))


def test_equal_recipes_are_measured_once(tmp_path, measure):
    frame = sweep(measure, [*RECIPES, *RECIPES], tmp_path / "t.csv", n_jobs=1, progress=False)
    assert set(measure.counts.values()) == {1}
    assert len(frame) == len(RECIPES)


def test_what_the_table_has_is_not_measured_again_and_stays(tmp_path, measure):
    first = sweep(measure, RECIPES[6:], tmp_path / "t.csv", n_jobs=1, progress=False)
    both = sweep(measure, RECIPES, tmp_path / "t.csv", n_jobs=1, progress=False)
    again = sweep(measure, RECIPES[6:], tmp_path / "t.csv", n_jobs=1, progress=False)
    assert set(measure.counts.values()) == {1}
    pd.testing.assert_frame_equal(both[6:].reset_index(drop=True), first)
    pd.testing.assert_frame_equal(again, first)
    assert len(pd.read_csv(tmp_path / "t.csv")) == len(RECIPES)


def test_no_recipes_are_no_rows(tmp_path, measure):
    assert sweep(measure, [], tmp_path / "t.csv", progress=False).empty


@given(
    st.builds(
        Recipe,
        experts=st.sampled_from(list(FORMATS)),
        router=st.sampled_from(list(FORMATS)),
        block_size=st.sampled_from((32, 64, 128)),
        double_quant=st.booleans(),
        overrides=st.dictionaries(
            st.sampled_from(("layers.0", "layers.*.experts.3", "layers.*.attention")),
            st.sampled_from(list(FORMATS)),
        ),
    )
)
def test_a_line_is_a_recipe(recipe):
    read = Recipe(**json.loads(one_line(recipe)))
    assert read == recipe
    assert list(read.overrides.items()) == list(recipe.overrides.items())
    assert "\n" not in one_line(recipe)


def test_a_line_tells_overrides_in_another_order_apart():
    paths = {"layers.0.experts": "int8", "layers.0": "int4"}
    backwards = dict(reversed(paths.items()))
    assert one_line(Recipe(overrides=paths)) != one_line(Recipe(overrides=backwards))
    assert one_line(Recipe(router="int8", experts="int3")) == (
        '{"experts": "int3", "router": "int8"}'
    )


# ------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_failure_names_its_recipe_after_the_others_are_saved(tmp_path, n_jobs):
    failing = Counted(tmp_path / "calls.txt", "raises")
    with pytest.raises(RuntimeError, match=r'"int2"\} failed: (.|\n)*no luck with int2'):
        sweep(failing, RECIPES, tmp_path / "t.csv", n_jobs=n_jobs, progress=False)
    saved = pd.read_csv(tmp_path / "t.csv")["recipe"].tolist()
    begun = failing.counts
    assert len(saved) == len(begun) - 1 or (n_jobs == 2 and len(saved) == len(begun) - 2)
    assert {line for line in begun if "256" not in line} == set(saved)
    assert len(begun) < len(RECIPES), "nothing is begun after a failure"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": torch.tensor(1.0)}, "not plain numbers"),
        ({"loss": "much"}, "not plain numbers"),
        ({}, "not plain numbers"),
        ({"measure": 1.0}, "columns already"),
    ],
)
def test_a_measure_gives_numbers(tmp_path, values, message):
    with pytest.raises(RuntimeError, match=message):
        sweep(Given(values), RECIPES, tmp_path / "t.csv", n_jobs=1, progress=False)
    assert not (tmp_path / "t.csv").exists()


def test_a_measure_keeps_its_names(tmp_path):
    with pytest.raises(RuntimeError, match=r"\} failed: it gives loss, but .*t\.csv has bits"):
        sweep(fickle, RECIPES, tmp_path / "t.csv", n_jobs=1, progress=False)


def test_another_measure_takes_another_table(tmp_path, measure):
    sweep(measure, RECIPES[:2], tmp_path / "t.csv", n_jobs=1, progress=False)
    other = Counted(measure.calls, "slow")
    with pytest.raises(ValueError, match=r"holds what Counted\(.*''\) measured, not .*'slow'\)"):
        sweep(other, RECIPES[:2], tmp_path / "t.csv", n_jobs=1, progress=False)


@pytest.mark.parametrize("text", ["", "recipe,loss\n", "a,b,c\n1,2,3\n", "recipe,x,measure\n1\n"])
def test_a_file_that_is_no_table_is_left_alone(tmp_path, measure, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match="is no table of a sweep"):
        sweep(measure, RECIPES, tmp_path / "t.csv", n_jobs=1, progress=False)
    assert (tmp_path / "t.csv").read_text() == text


DAMAGED = {
    "cut in the measure": (lambda whole: whole[:-5], "its last line is cut off"),
    "cut in a number": (lambda whole: whole[: whole.rindex(b',"Counted') - 3], "is cut off"),
    "not text": (lambda whole: whole + b"\xff\xfe\n", "what is no text"),
    "no number": (lambda whole: whole.replace(b",2,", b",2x,", 1), "'2x' is no number.*int2"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_table_is_named_and_left_alone(tmp_path, measure, how):
    damage, message = DAMAGED[how]
    table = tmp_path / "t.csv"
    sweep(measure, RECIPES[:2], table, n_jobs=1, progress=False)
    damaged = damage(table.read_bytes())
    table.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"t\.csv is damaged: .*{message}"):
        sweep(measure, RECIPES, table, n_jobs=1, progress=False)
    assert table.read_bytes() == damaged
    assert measure.counts.total() == 2


def test_a_table_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path, measure):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file.t\.csv cannot be written .* nothing was measured"):
        sweep(measure, RECIPES, tmp_path / "file" / "t.csv", n_jobs=1, progress=False)
    assert not measure.calls.exists()


@dataclass(frozen=True)
class Given:
    values: dict[str, float]

    def __call__(self, recipe: Recipe) -> dict[str, float]:
        return self.values

    def bits(self, recipe: Recipe) -> dict[str, float]:
        return {"bits": self.values["bits"] + 1}


class Nameless:
    def __call__(self, recipe: Recipe) -> dict[str, float]:
        raise AssertionError("nothing is measured")

    bits = __call__


def fickle(recipe: Recipe) -> dict[str, float]:
    return {"bits": 1.0} if recipe.block_size == 32 else {"loss": 1.0}


def powers(recipe: Recipe, base: int) -> dict[str, float]:
    return {"bits": float(base)}


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (Given({"bits": 1.0}), "Given(values={'bits': 1.0})"),
        (Given({"bits": 1.0}).bits, "<bound method Given.bits of Given(values={'bits': 1.0})>"),
        (fickle, "fickle"),
        (partial(powers, base=3), "functools.partial(<function powers>, base=3)"),
    ],
    ids=["dataclass", "method", "function", "partial"],
)
def test_a_name_is_the_same_in_every_process(tmp_path, measure, name):
    sweep(measure, RECIPES[:1], tmp_path / "t.csv", n_jobs=1, progress=False)
    assert pd.read_csv(tmp_path / "t.csv")["measure"][0] == name


def test_a_measure_that_has_no_name_of_its_own_is_refused(tmp_path):
    """Another of its kind would be given the first one's numbers."""

    def inner(recipe):
        raise AssertionError("nothing is measured")

    nameless = (Nameless(), Nameless().bits, lambda recipe: {"bits": 1.0}, inner, partial(inner))
    for measure in (*nameless, partial(powers, base=Nameless())):
        with pytest.raises(ValueError, match="give it a repr that names its arguments"):
            sweep(measure, RECIPES, tmp_path / "t.csv", n_jobs=1, progress=False)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- killed


SCRIPT = """
import sys
from pathlib import Path
from test_sweeps import RECIPES, Counted
from labutils.sweeps import sweep
folder = Path(sys.argv[1])
sweep(Counted(folder / "calls.txt", "slow"), RECIPES, folder / "t.csv", n_jobs=1, progress=False)
"""


def test_a_killed_sweep_goes_on(tmp_path):
    (tmp_path / "calls.txt").touch()
    started = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    try:
        _wait_for_rows(tmp_path / "t.csv", 3, started)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    saved = set(pd.read_csv(tmp_path / "t.csv")["recipe"])
    assert 3 <= len(saved) < len(RECIPES)
    slow = Counted(tmp_path / "calls.txt", "slow")
    before = slow.counts
    resumed = sweep(slow, RECIPES, tmp_path / "t.csv", n_jobs=2, progress=False)
    assert {line for line in before if slow.counts[line] > before[line]}.isdisjoint(saved)
    assert slow.counts.total() - before.total() == len(RECIPES) - len(saved)
    whole = sweep(slow, RECIPES, tmp_path / "whole.csv", n_jobs=1, progress=False)
    pd.testing.assert_frame_equal(resumed, whole)
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def _wait_for_rows(table: Path, rows: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        if table.exists() and len(table.read_text().splitlines()) > rows:
            return
        time.sleep(0.02)
    raise AssertionError("the sweep ended before it could be killed")


@pytest.fixture
def cluster():
    """Two workers of Dask, a process each. A worker's death is logged, and meant here."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster),
    ):
        yield cluster


def test_a_cluster_that_loses_a_worker_gives_the_same_table(tmp_path, cluster):
    calls = tmp_path / "calls.txt"
    workers = {worker.pid for worker in cluster.workers.values()}
    with joblib.parallel_config("dask"):
        after = sweep(Counted(calls, "dies"), RECIPES, tmp_path / "dask.csv", progress=False)
    assert calls.with_suffix(".died").exists()
    assert {worker.pid for worker in cluster.workers.values()} != workers
    undisturbed = sweep(Counted(calls), RECIPES, tmp_path / "loky.csv", n_jobs=2, progress=False)
    pd.testing.assert_frame_equal(after, undisturbed)


# --------------------------------------------------------------------------------- the stand-in


MIXED = [
    Recipe(),
    Recipe.keeping("fp32"),
    Recipe.keeping("fp32", experts="int2", double_quant=False),
    Recipe(router="int8", overrides={"layers.1.experts.3": "int8"}),
]


def test_the_stand_in_is_measured_as_by_hand():
    model, tokenizer = load(standin.PATH).float(), standin.tokenizer()
    exam = Shaker(model, tokenizer, 2).exam
    measured = OnStandin(pages=2)(MIXED[3])
    reference = record(model, exam.token_ids)
    with simulated(model, MIXED[3]):
        seen = record(model, exam.token_ids)
    flipped = [
        (a.chosen.sort().values != b.chosen.sort().values).any(dim=1).double().mean().item()
        for a, b in zip(reference.routings, seen.routings, strict=True)
    ]
    size = predict(standin.PATH, MIXED[3]).total_bytes
    assert measured.pop("kl_low") <= measured["kl"] <= measured.pop("kl_high")
    assert measured == pytest.approx(
        {
            "bytes": size,
            "bits_per_weight": 8 * size / standin.scores()["parameters"],
            "kl": kl(reference.logits, seen.logits),
            "loss": nats_by_token(seen.logits, exam.token_ids).mean().item(),
            "accuracy": exam.right(seen.logits).mean(),
            "flip_rate": sum(flipped) / len(flipped),
        },
        rel=1e-4,
    )


def test_pages_that_training_showed_are_others():
    seen, held_out = (OnStandin(2, shown)(MIXED[3])["loss"] for shown in (False, True))
    assert seen != held_out


def test_nothing_changes_where_nothing_is_rounded():
    measured = OnStandin(pages=2)(Recipe.keeping("fp32"))
    assert measured["bits_per_weight"] == 32
    assert (measured["kl"], measured["flip_rate"]) == (0, 0)


def test_every_process_and_thread_gives_the_same_numbers(tmp_path):
    before = torch.get_num_threads()
    measure = OnStandin(pages=2)
    alone = sweep(measure, MIXED, tmp_path / "1.csv", n_jobs=1, progress=False)
    spread = sweep(measure, MIXED, tmp_path / "2.csv", n_jobs=2, progress=False)
    with joblib.parallel_config("threading"):
        threads = sweep(measure, MIXED, tmp_path / "3.csv", n_jobs=3, progress=False)
    pd.testing.assert_frame_equal(spread, alone, check_exact=True)
    pd.testing.assert_frame_equal(threads, alone, check_exact=True)
    assert torch.get_num_threads() == before
