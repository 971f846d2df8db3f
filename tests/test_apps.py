"""Apps are driven without a browser: record, and read the figure's data."""

import math
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import transformers
from families import FAMILIES

from labutils import apps, standin
from labutils.apps import ErrorLine, live_memory, redraw
from labutils.budget import predict
from labutils.checkpoints import load
from labutils.damage import Damage
from labutils.ledger import ledger_of
from labutils.meter import MIB, Meter, mark
from labutils.moe import MoELayer, route
from labutils.planner import CARDS, FITS, Machine, plan
from labutils.recipes import Recipe
from labutils.shaker import Shaker
from labutils.style import changeable

GIB = 2**30


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


# ------------------------------------------------------------------------------------ live memory


def test_chart_grows_while_a_run_records() -> None:
    meter = Meter()
    chart, errors = live_memory(meter).children
    assert chart.layout.title.text == "Nothing recorded yet"
    with meter("load in NF4", predicted_bytes=MIB):
        assert eventually(lambda: len(chart.data[0].x) > 0)
        during = len(chart.data[0].x)
        assert "so far" in chart.layout.title.text
        mark("quantize")
        assert eventually(lambda: len(chart.data[0].x) > during)
        assert eventually(lambda: "quantize" in (chart.data[-1].y or ()))
    assert len(chart.data[0].x) == len(meter.samples), "the end of a run is drawn too"
    assert "so far" not in chart.layout.title.text
    assert errors.value == "" and meter.listener_error is None


def test_second_run_is_drawn_in_the_same_chart() -> None:
    meter = Meter()
    chart, _ = live_memory(meter).children
    bands = []
    for label in ("first", "second"):
        with meter(label):
            pass
        bands.append([shape.type for shape in chart.layout.shapes].count("rect"))
        assert chart.layout.title.text.startswith(label)
    assert bands == [1, 2]
    assert [note.text for note in chart.layout.annotations] == ["second", "first"]


def test_chart_made_later_shows_what_was_recorded_before() -> None:
    meter = Meter()
    with meter("before"):
        pass
    chart, _ = live_memory(meter).children
    assert chart.layout.title.text.startswith("before")


def test_failed_drawing_is_shown_and_keeps_the_last_good_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("no <paint> left")

    meter = Meter()
    chart, errors = live_memory(meter).children
    with meter("good"):
        pass
    points = len(chart.data[0].x)
    with monkeypatch.context() as patched:
        patched.setattr(apps, "memory_chart", fail)
        with meter("not drawn"):
            pass
    assert "ValueError: no &lt;paint&gt; left" in errors.value
    assert chart.layout.title.text.startswith("good") and len(chart.data[0].x) == points
    with meter("drawn again"):
        pass
    assert errors.value == "" and len(meter.runs) == 3


# -------------------------------------------------------------------------------------- the parts


def test_error_line_lets_an_interrupt_through() -> None:
    line = ErrorLine()
    with pytest.raises(KeyboardInterrupt), line.shown():
        raise KeyboardInterrupt
    assert line.value == ""


def points(count: int) -> go.Figure:
    shapes = [{"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1} for i in range(count)]
    return go.Figure(
        [go.Scatter(y=list(range(count)))], {"title": {"text": str(count)}, "shapes": shapes}
    )


def test_redraw_takes_over_data_and_layout_and_leaves_the_zoom() -> None:
    shown = changeable(points(3))
    shown.layout.xaxis.range = [0, 1]
    redraw(shown, points(2))
    assert list(shown.data[0].y) == [0, 1] and shown.layout.title.text == "2"
    assert len(shown.layout.shapes) == 2
    assert shown.layout.xaxis.range == (0, 1)


def test_redraw_sends_only_what_differs() -> None:
    """Inside an entry too: here the bars' heights and none of their looks."""
    looks = {"marker": {"color": "red"}, "error_y": {"array": [1, 1], "width": 4}}
    shown = changeable(go.Figure([go.Bar(y=[1, 2], **looks)], {"height": 300}))
    sent = []
    shown.data[0].on_change(lambda _, y, error: sent.append((y, error)), "y", "error_y.array")
    shown.layout.on_change(lambda _, height: sent.append(height), "height")
    looks["error_y"] = looks["error_y"] | {"array": [2, 1]}
    redraw(shown, go.Figure([go.Bar(y=[1, 2], **looks)], {"height": 300}))
    assert sent == [((1, 2), (2, 1))]
    redraw(shown, go.Figure([go.Bar(y=[1, 2], **looks)], {"height": 301}))
    assert sent[1:] == [301]
    redraw(shown, go.Figure([go.Bar(y=[1, 2], **looks)], {"height": 301}))
    assert len(sent) == 2


def test_redraw_names_every_entry_by_itself() -> None:
    """A page refuses `marker` of one trace together with `marker.color` of another."""

    def bars(*looks: dict) -> go.Figure:
        return go.Figure([go.Bar(y=[1, 2], **look) for look in looks])

    shown = changeable(bars({}, {"marker": {"color": "red"}}))
    sent = []
    shown.observe(lambda change: change.new and sent.append(change.new), "_py2js_update")
    redraw(shown, bars({"marker": {"color": "blue"}}, {"marker": {"color": "blue"}}))
    assert [set(message["style_data"]) for message in sent] == [{"marker.color"}]
    assert [trace.marker.color for trace in shown.data] == ["blue", "blue"]


def test_redraw_of_another_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        redraw(changeable(points(2)), go.Figure())


def test_redraws_from_several_threads_are_each_whole() -> None:
    shown, broken = changeable(points(1)), []

    def draw(offset: int) -> None:
        for count in range(1 + offset, 60, 4):
            redraw(shown, points(count))
            with apps._DRAWING:
                if len(shown.data[0].y) != int(shown.layout.title.text):
                    broken.append(count)

    threads = [threading.Thread(target=draw, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken


def test_the_cache_app_follows_its_controls():
    box = apps.kv_cache(2 * GIB, 2**17, {"a card": 8 * GIB})
    controls, chart, errors = box.children
    context, batch = controls.children
    assert chart.layout.title.text == "a card has room for all 32,768 tokens"
    batch.value = 4
    assert chart.layout.title.text == "a card is full after 12,288 tokens"
    context.value = 2**12
    assert chart.data[1].y[-1] == 2.0
    assert errors.value == ""


# --------------------------------------------------------------------------- routing and parameters


def test_parameters_follow_experts_and_those_for_a_token():
    ledgers = {name: ledger_of(FAMILIES[name]) for name in ("mixtral", "olmoe")}
    controls, chart, errors = apps.parameters(ledgers).children
    model, experts, top_k = controls.children
    start = ledgers["mixtral"].with_experts(8, 2)
    assert list(chart.data[2].y) == [start.total / 1e9, start.active / 1e9]

    experts.value = 64
    kept, met = chart.data[2].y
    assert kept > 5 * start.total / 1e9 and met < 1.2 * start.active / 1e9
    assert chart.layout.title.text.startswith("64 experts, 2 for a token")
    top_k.value = 16
    assert chart.data[2].y[0] == kept and chart.data[2].y[1] > 2 * met
    model.value = "olmoe"
    assert (experts.value, top_k.value) == (16, 4), "a model comes with its own numbers"
    assert chart.data[2].y[0] == ledgers["olmoe"].total / 1e9
    assert errors.value == ""


def test_a_token_cannot_have_more_experts_than_there_are():
    controls, chart, errors = apps.parameters({"mixtral": ledger_of(FAMILIES["mixtral"])}).children
    _, experts, top_k = controls.children
    top_k.value = 9
    assert top_k.value == 8, "the slider ends at the number of experts"
    experts.value = 1
    assert chart.layout.title.text.startswith("1 expert, 1 for a token")
    experts.value = 16
    top_k.value = 9
    assert chart.layout.title.text.startswith("16 experts, 9 for a token")
    assert errors.value == ""


def test_who_goes_where_follows_layer_top_k_and_noise():
    drawn = torch.Generator().manual_seed(1)
    routings = [route(torch.randn(5, 8, generator=drawn), 2) for _ in range(3)]
    controls, chart, errors = apps.who_goes_where(list("token"), routings).children
    layer, top_k, noise = controls.children

    def shown() -> list[list[int]]:
        experts = list(chart.data[1].y)
        return [experts[at : at + top_k.value] for at in range(0, len(experts), top_k.value)]

    assert shown() == routings[0].chosen.tolist()
    layer.value = 2
    assert shown() == routings[2].chosen.tolist()
    top_k.value = 3
    assert shown() == route(routings[2].logits, 3).chosen.tolist()
    noise.value = 2.0
    assert shown() != route(routings[2].logits, 3).chosen.tolist()
    noise.value = 0.0
    top_k.value = 8
    assert sum(chart.data[2].x) == 5 * 8 and errors.value == ""


# ---------------------------------------------------------------------------------- number formats


@pytest.fixture
def number_formats():
    """The app by name: its controls, the note under them, the chart and the error line."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16, 256, generator=generator)
    box = apps.number_formats({"normal": normal, "cubes": normal**3})
    first, second, note, chart, errors = box.children
    names = ("bits", "block", "double", "family", "kind")
    controls = dict(zip(names, first.children + second.children, strict=True))
    return SimpleNamespace(**controls, note=note, chart=chart, errors=errors)


def test_number_formats_follow_every_control(number_formats):
    app = number_formats
    titles = [app.chart.layout.title.text]
    assert titles[0].startswith("NF4, blocks of 64: 4.500 bits per weight")
    for control, value, start in (
        ("bits", 3, "NF3, blocks of 64: 3.500"),
        ("family", "integer", "INT3, blocks of 64: 3.500"),
        ("block", "row", "INT3, blocks of 256: 3.125"),
        ("block", "tensor", "INT3, one block: 3.008"),
        ("block", 128, "INT3, blocks of 128: 3.250"),
        ("double", True, "INT3, double quantization, blocks of 128: 3.078"),
        ("kind", "cubes", "INT3, double quantization, blocks of 128: 3.078"),
        ("family", "integer, minimum to maximum", "INT3 from minimum to maximum, blocks of 128"),
        ("bits", 8, "INT8 from minimum to maximum, blocks of 128: 8.500"),
        ("family", "float", "FP8 E4M3, double quantization, blocks of 128: 8.078"),
    ):
        getattr(app, control).value = value
        titles.append(app.chart.layout.title.text)
        assert titles[-1].startswith(start) and titles[-1] != titles[-2]
    assert len(app.chart.data[1].x) == 3 * 253 and app.errors.value == ""


def test_a_width_that_a_family_lacks_is_said_and_leaves_the_picture(number_formats):
    app = number_formats
    app.family.value = "float"
    before = app.chart.layout.title.text
    assert before.startswith("FP4") and app.note.value == ""
    app.bits.value = 6
    assert "has 4 or 8 bits, not 6" in app.note.value
    assert app.chart.layout.title.text == before and app.errors.value == ""
    app.bits.value = 8
    assert app.note.value == "" and app.chart.layout.title.text.startswith("FP8 E4M3")


def test_microscaled_formats_bring_blocks_of_their_own(number_formats):
    app = number_formats
    app.family.value = "NVFP4"
    assert "blocks of 16" in app.note.value and app.block.disabled and app.double.disabled
    assert app.chart.layout.title.text.startswith("NVFP4, blocks of 16: 4.508")
    app.family.value = "integer, minimum to maximum"
    assert app.double.disabled and not app.block.disabled


# ----------------------------------------------------------------------------- calibrated rounding


def test_the_calibration_app_follows_its_controls():
    """Many tokens turn harm into help; every control changes the picture, none the traces."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 64, generator=generator)
    tokens, held_out = (torch.randn(n, 16, generator=generator) @ mixed for n in (2048, 500))
    box = apps.calibration(MoELayer(64, 128, 4, 2), tokens, held_out)
    controls, chart, errors = box.children
    method, bits, drawn, damping, expert = controls.children
    assert bits.value == 3 and drawn.value == 32 and drawn.options[-1] == ("2,048", 2048)
    seen = [chart.layout.title.text]
    for control, value in (
        (drawn, 2048),
        (damping, 0.1),
        (bits, 2),
        (expert, 3),
        (method, "awq"),
    ):
        control.value = value
        seen.append(chart.layout.title.text)
        assert len(chart.data) == 3 and errors.value == ""
    assert len(set(seen)) == len(seen)
    assert seen[0].startswith("GPTQ on ") and "of expert 0" in seen[0]
    assert "less error" in seen[1] and seen[-1].startswith("AWQ on ")
    assert "int2, 2.58 bits per weight" in chart.layout.title.subtitle.text
    plain, _, calibrated = (list(bars.y) for bars in chart.data)
    damping.value = 1
    assert list(chart.data[2].y) == calibrated, "AWQ has no damping"
    method.value, drawn.value = "gptq", 2048
    assert all(after < before for before, after in zip(plain, chart.data[2].y, strict=True))


# --------------------------------------------------------------------- what quantized experts cost


def damage_of(nats: float) -> Damage:
    return Damage(4.5, nats, pd.Series({"sum": 1.0, "sort": 1.0}), np.zeros((2, 4)))


def test_damage_follows_bits_family_and_what_is_quantized() -> None:
    def by_bits(*nats: float) -> dict[int, Damage]:
        return {bits: damage_of(value) for bits, value in enumerate(nats, start=2)}

    sweeps = {
        "integer": {"experts": by_bits(0.9, 0.6), "attention": by_bits(0.8, 0.7)},
        "normal float": {"experts": by_bits(0.55, 0.5), "attention": by_bits(0.75, 0.65)},
    }
    box = apps.damage(sweeps, damage_of(0.5))
    controls, chart, errors = box.children
    bits, target, family = controls.children
    seen = [chart.layout.title.text]
    for control, value in ((bits, 3), (target, "attention"), (family, "normal float")):
        control.value = value
        seen.append(chart.layout.title.text)
    losses = [title.rsplit("loss ", 1)[1] for title in seen]
    assert losses == ["+0.4000 nats", "+0.1000 nats", "+0.2000 nats", "+0.1500 nats"]
    assert seen[-1].startswith("Attention in 3-bit normal float")
    assert errors.value == ""


def test_a_lower_threshold_takes_a_column_out_and_lowers_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator).clamp(-4, 4)
    x[:, 3] *= 50
    weight = torch.randn(16, 32, generator=generator)
    controls, chart, errors = apps.int8_threshold(x, weight, [1.0, 6.0, math.inf]).children
    assert chart.layout.title.text.startswith("Plain INT8")
    (threshold,) = controls.children
    threshold.value = 6.0
    assert chart.layout.title.text.startswith("3.1% of the columns")
    assert chart.data[0].y[1] < chart.data[0].y[2] / 2
    assert errors.value == ""


# -------------------------------------------------------------------------------------- the shaker


@pytest.fixture(scope="module")
def small_shaker() -> Shaker:
    transformers.utils.logging.disable_progress_bar()
    model = load(standin.PATH, device_map="cpu").float()
    return Shaker(model, standin.tokenizer(), pages=2)


@pytest.fixture
def shaken(small_shaker):
    """The app by name: its controls, the note beside them, the chart and the error line."""
    rows, chart, errors = apps.shaker(small_shaker).children
    names = ("what", "layer", "expert", "how", "noise", "bits", "shown", "note")
    controls = dict(zip(names, rows.children, strict=True))
    river = next(trace for trace in chart.data if trace.type == "sankey")
    cells = next(trace for trace in chart.data if trace.type == "heatmap")
    return SimpleNamespace(**controls, chart=chart, errors=errors, river=river, cells=cells)


def rate(app) -> float:
    """The share of flips that the first gauge shows."""
    return app.chart.data[0].x[0]


def test_no_noise_is_exactly_nothing(shaken):
    assert rate(shaken) > 0.05, "it starts with a disturbance"
    for what in ("router", "router logits", "hidden states", "experts"):
        shaken.what.value, shaken.noise.value = what, 0.0
        title = shaken.chart.layout.title.text
        assert title.startswith("0% noise on ") and ": 0% of tokens flip, KL 0, " in title
        assert [gauge.x[0] for gauge in shaken.chart.data[:3]] == [0, 0, 0]
        assert set(np.ravel(shaken.cells.text)) <= {"0", ""}
        assert len(shaken.river.link.value) == 8
        shaken.noise.value = 0.2
        assert rate(shaken) > 0 and shaken.errors.value == ""


def test_more_noise_flips_more_and_costs_more(shaken):
    flips, kl = [], []
    for noise in (0.0, 0.1, 0.3, 1.0):
        shaken.noise.value = noise
        flips.append(rate(shaken))
        kl.append(shaken.chart.data[1].x[0])
    assert flips == sorted(set(flips)) and kl == sorted(set(kl))


def test_a_disturbance_stays_in_its_layer_and_its_expert(shaken):
    assert shaken.expert.disabled
    shaken.layer.value = 3
    upper = shaken.cells.z[:3]
    assert np.nansum(upper) == 0 and np.nansum(shaken.cells.z[3]) > 0
    shaken.what.value = "one expert"
    assert not shaken.expert.disabled
    shaken.expert.value, shaken.layer.value = 5, 1
    assert shaken.chart.layout.title.text.startswith("20% noise on expert 5 of layer 1: ")
    assert np.nansum(shaken.cells.z[:2]) == 0 and rate(shaken) > 0
    whole = rate(shaken)
    shaken.what.value = "experts"
    assert shaken.expert.disabled and rate(shaken) > whole


def test_a_router_in_4_bits_is_shaken_by_its_logits():
    model = load(standin.PATH, Recipe(router="nf4"), device_map="cpu")
    rows, chart, _errors = apps.shaker(Shaker(model, standin.tokenizer(), pages=2)).children
    assert rows.children[0].value == "router logits"
    assert chart.layout.title.text.startswith("20% noise on router logits: ")


def test_only_stored_weights_are_rounded(shaken):
    assert shaken.bits.disabled and not shaken.noise.disabled
    shaken.how.value = "bits"
    assert shaken.noise.disabled and not shaken.bits.disabled and shaken.note.value == ""
    assert shaken.chart.layout.title.text.startswith("Router in 3 bits: ")
    rounded = rate(shaken)
    shaken.bits.value = 2
    assert rate(shaken) > rounded
    for what, reason in (
        ("router logits", "not stored"),
        ("hidden states", "not stored"),
        ("as many expert weights", "scattered"),
    ):
        shaken.what.value = what
        assert shaken.bits.disabled and shaken.how.disabled and not shaken.noise.disabled
        assert reason in shaken.note.value
        assert shaken.chart.layout.title.text.startswith(f"20% noise on {what}: ")
    shaken.what.value = "attention"
    assert shaken.chart.layout.title.text.startswith("Attention in 2 bits: ")
    assert shaken.note.value == "" and not shaken.bits.disabled and shaken.errors.value == ""


def test_the_river_has_every_choice_once(shaken, small_shaker):
    tokens = small_shaker.exam.token_ids.numel()
    for noise in (0.0, 0.2, 1.0):
        shaken.noise.value = noise
        for shown, decisions in ((0, tokens), (3, tokens), ("all", 4 * tokens)):
            shaken.shown.value = shown
            assert sum(shaken.river.link.value) == 2 * decisions
            flipped, stayed = shaken.chart.data[-3:-1]
            assert sum(flipped.y) + sum(stayed.y) == decisions


def test_another_layer_is_shown_without_reading_again(shaken, small_shaker, monkeypatch):
    monkeypatch.setattr(small_shaker, "disturbed", None)
    before = rate(shaken)
    for layer in (0, 1, 2, 3, "all"):
        shaken.shown.value = layer
        named = "all layers" if layer == "all" else f"layer {layer}"
        titles = [note.text for note in shaken.chart.layout.annotations]
        assert any(f"old expert to new, {named}: " in title for title in titles)
    assert rate(shaken) == before and shaken.errors.value == ""


def test_what_goes_wrong_is_shown_and_the_last_picture_stays(shaken, monkeypatch):
    def fail(*arguments: object) -> None:
        raise ValueError("no <paint> left")

    title, links = shaken.chart.layout.title.text, tuple(shaken.river.link.value)
    with monkeypatch.context() as patched:
        patched.setattr(apps, "shaken_view", fail)
        shaken.noise.value = 0.5
    assert "ValueError: no &lt;paint&gt; left" in shaken.errors.value
    assert shaken.chart.layout.title.text == title and shaken.river.link.value == links
    shaken.noise.value = 0.7
    assert shaken.errors.value == "" and "70% noise" in shaken.chart.layout.title.text


def test_the_model_is_afterwards_what_it_was(shaken, small_shaker):
    before = {name: value.clone() for name, value in small_shaker.model.state_dict().items()}
    shaken.noise.value = 1.0
    for _, what in shaken.what.options:
        shaken.what.value = what
    shaken.how.value = "bits"
    for what in ("router", "experts", "one expert", "attention"):
        shaken.what.value = what
    after = small_shaker.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert shaken.errors.value == ""


def test_moves_from_several_threads_take_turns(shaken, small_shaker, monkeypatch):
    """Two disturbances at once would take each other's weights for the undisturbed ones."""
    inside, most = [], []
    disturbed = small_shaker.disturbed

    @contextmanager
    def watched(disturbance):
        inside.append(disturbance)
        most.append(len(inside))
        with disturbed(disturbance):
            yield
        inside.pop()

    monkeypatch.setattr(small_shaker, "disturbed", watched)
    before = {name: value.clone() for name, value in small_shaker.model.state_dict().items()}
    moves = [(shaken.noise, 0.3), (shaken.layer, 2), (shaken.what, "attention")]
    threads = [
        threading.Thread(target=setattr, args=(control, "value", value)) for control, value in moves
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 1 and max(most) == 1 and shaken.errors.value == ""
    assert shaken.chart.layout.title.text.startswith("30% noise on attention of layer 2: ")
    after = small_shaker.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------ recipes and plans


@pytest.fixture
def mixed(small_shaker):
    """The app by name: a control for each component, the chart and the error line."""
    rows, chart, errors = apps.mixture(small_shaker).children
    controls = {control.description: control for control in rows.children}
    return SimpleNamespace(**controls, chart=chart, errors=errors)


def mebibytes(app) -> float:
    return float(re.match(r"([\d.]+) of", app.chart.layout.title.text)[1])


def test_a_format_for_each_component_has_its_bytes_and_its_damage(mixed, small_shaker):
    assert set(vars(mixed)) - {"chart", "errors"} == {
        "experts", "attention", "router", "embeddings", "lm_head"
    }  # fmt: skip
    for name in ("experts", "attention"):
        getattr(mixed, name).value = "bf16"
    assert "KL 0 nats" in mixed.chart.layout.title.text
    assert "0% of tokens flip" in mixed.chart.layout.title.text
    everything = mebibytes(mixed)
    mixed.experts.value = "int2"
    recipe = Recipe.keeping("bf16", experts="int2", double_quant=False)
    expected = predict(small_shaker.model.config, recipe).total_bytes / 2**20
    assert mebibytes(mixed) == pytest.approx(expected, abs=0.005) and expected < everything
    kl = small_shaker.simulate(recipe).kl.mean().item()
    assert f"KL {kl:.2g} nats" in mixed.chart.layout.title.text and mixed.errors.value == ""


def test_what_was_tried_stays_and_counts_once(mixed):
    def tried() -> list[str]:
        small = [
            trace for trace in mixed.chart.data if trace.xaxis == "x2" and trace.marker.size == 7
        ]
        return [label for trace in small for label in trace.customdata]

    assert len(tried()) == 1
    for value in ("int3", "int2", "int3", "int2"):
        mixed.experts.value = value
    assert len(tried()) == len(set(tried())) == 3 and mixed.errors.value == ""


@pytest.fixture
def planned():
    rows, chart, errors = apps.planner(["OLMoE-1B-7B", "Mixtral-8x7B"]).children
    controls = {control.description: control for control in rows.children}
    return SimpleNamespace(controls=controls, chart=chart, errors=errors)


def test_the_planner_says_what_plan_says(planned):
    recipe = Recipe(attention="nf4", shared_experts="nf4", dense_mlp="nf4")
    moves = [("model", "Mixtral-8x7B"), ("context", 2**15), ("cards", 2), ("sequences", 4)]
    settings = {"model": "OLMoE-1B-7B", "context": 4096, "cards": 1, "sequences": 1}
    for name, value in moves:
        planned.controls[name].value = value
        settings[name] = value
        plans = [
            plan(
                settings["model"],
                recipe,
                Machine(card, settings["cards"], 64),
                settings["context"],
                settings["sequences"],
            )
            for card in CARDS.values()
        ]
        title = planned.chart.layout.title.text
        assert title.startswith(settings["model"]) and f"{settings['context']:,} tokens" in title
        fitting = sum(each.verdict == FITS for each in plans)
        assert f"fits {fitting} of {len(CARDS)}" in title and planned.errors.value == ""


def test_fewer_bits_need_fewer_bytes(planned):
    def needed() -> float:
        return float(re.search(r"([\d.]+) GiB", planned.chart.layout.title.text)[1])

    sizes = []
    for name in planned.controls["recipe"].options:
        planned.controls["recipe"].value = name
        sizes.append(needed())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 * sizes[-1]
