"""How fast the controls answer: computation and redrawing in the kernel, app by app.

    python benchmarks/controls.py

Every control of an app is moved through its values, in an order drawn from a seed, and each move is
timed until its figure is changed. What the browser adds is left out: some 50 ms.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ipywidgets as widgets
import torch
import transformers

from labutils import apps, languages, standin
from labutils.checkpoints import load
from labutils.damage import Probe
from labutils.flips import record
from labutils.ledger import PUBLISHED, ledger_of
from labutils.moe import MoELayer, block_inputs
from labutils.recipes import Recipe
from labutils.shaker import Shaker

MEDIAN_LIMIT_SECONDS = 0.100
MEDIAN_LIMITS_SECONDS = {"shaker": 0.150, "mixture": 0.150}  # a move reads 1,500 tokens or more
P95_LIMIT_SECONDS = 0.250
MOST_VALUES = 12


@dataclass(frozen=True)
class Pace:
    """How long the moves of one app's controls took."""

    app: str
    seconds: tuple[float, ...]

    @property
    def median_limit_seconds(self) -> float:
        return MEDIAN_LIMITS_SECONDS.get(self.app, MEDIAN_LIMIT_SECONDS)

    @property
    def slow(self) -> bool:
        """Whether a limit is passed, that of the median or that of the 95th percentile."""
        return (
            self.median_seconds > self.median_limit_seconds or self.p95_seconds > P95_LIMIT_SECONDS
        )

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p95_seconds(self) -> float:
        return statistics.quantiles(self.seconds, n=20, method="inclusive")[-1]

    def __str__(self) -> str:
        seconds = (self.median_seconds, self.p95_seconds, self.median_limit_seconds)
        milliseconds = "".join(f"{1000 * each:9.0f}" for each in (*seconds, P95_LIMIT_SECONDS))
        return f"{self.app:16}{len(self.seconds):6}{milliseconds}"


def built_apps() -> Iterator[tuple[str, Callable[[], widgets.Box]]]:
    """Each app of notebooks 01 to 06 by its name, as its notebook shows it."""
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(standin.PATH, device_map="cpu").float(), standin.tokenizer()
    probe = Probe(model, tokenizer, pages=4, examples=4)
    duty = probe.duties[3][0]
    layer = MoELayer.from_transformers(model.model.layers[3].mlp)
    line = "capital kenya > nairobi"
    seen = record(model, tokenizer([line], return_tensors="pt")["input_ids"]).routings
    drawn = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    trained = layer.experts[0].up_proj.weight.detach()
    sweep = {bits: probe.damage(Recipe(f"int{bits}")) for bits in (2, 3, 4)}
    pages = languages.pages(16, torch.Generator().manual_seed(0))
    tokens = block_inputs(model, tokenizer(pages, return_tensors="pt")["input_ids"])[3]
    thresholds = [1.0, 3.0, 6.0, 12.0, 48.0, math.inf]

    yield "parameters", lambda: apps.parameters({n: ledger_of(p) for n, p in PUBLISHED.items()})
    yield "who_goes_where", lambda: apps.who_goes_where(["<s>", *line], seen)
    yield "number_formats", lambda: apps.number_formats({"normal": drawn, "trained": trained})
    yield "damage", lambda: apps.damage({"integer": {"experts": sweep}}, probe.undisturbed)
    yield (
        "int8_threshold",
        lambda: apps.int8_threshold(
            layer.experts[0].middle(duty.inputs).detach(),
            layer.experts[0].down_proj.weight.detach(),
            thresholds,
        ),
    )
    half = len(tokens) // 2
    yield "calibration", lambda: apps.calibration(layer, tokens[:half], tokens[half:])
    shaker = Shaker(model, tokenizer)
    yield "shaker", lambda: apps.shaker(shaker)
    yield "mixture", lambda: apps.mixture(Shaker(model, tokenizer, pages=6))
    yield "planner", lambda: apps.planner(list(PUBLISHED))


def controls(box: widgets.Box) -> Iterator[widgets.Widget]:
    """Everything in an app that a reader can move."""
    for child in box.children:
        if isinstance(child, widgets.Box):
            yield from controls(child)
        elif values(child):
            yield child


def values(control: widgets.Widget) -> list:
    """Values of a control to move it through, at most a dozen; none for what is no control."""
    if isinstance(control, widgets.Checkbox):
        return [True, False]
    if hasattr(control, "options"):
        options = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return options[:: math.ceil(len(options) / MOST_VALUES)]
    if hasattr(control, "min") and hasattr(control, "max"):
        steps = round((control.max - control.min) / control.step)
        stride = math.ceil((steps + 1) / MOST_VALUES)
        return [control.min + index * control.step for index in range(0, steps + 1, stride)]
    return []


def pace(name: str, box: widgets.Box) -> Pace:
    """Move every control through its values, twice, and time each move."""
    moves = [(control, value) for control in controls(box) for value in values(control)] * 2
    random.Random(0).shuffle(moves)
    seconds = []
    for control, value in moves:
        if control.value == value or control.disabled:
            continue
        began = time.perf_counter()
        control.value = value
        seconds.append(time.perf_counter() - began)
    return Pace(name, tuple(seconds))


def main() -> list[Pace]:
    print(f"{'app':16}{'moves':>6}{'median':>9}{'p95':>9}{'limits':>9}{'':9}   ms")
    paces = []
    for name, build in built_apps():
        paces.append(pace(name, build()))
        print(paces[-1], flush=True)
    return paces


if __name__ == "__main__":
    main()
