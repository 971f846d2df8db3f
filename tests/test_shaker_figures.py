"""The picture of a shaken model holds its record, and nothing where nothing happened."""

import math

import numpy as np
import pytest
import torch

from labutils.evaluate import Answer, Exam
from labutils.flips import compare
from labutils.moe import route
from labutils.shaker import Disturbance, Shaken
from labutils.shaker_figures import shaken_view

PAGES, TOKENS, EXPERTS = 3, 6, 4
LOGITS = torch.tensor([4.0, 3.0, 2.0, 1.0])
REFERENCE = LOGITS.repeat(2, PAGES * TOKENS, 1)
OTHERS_SECOND = torch.tensor([4.0, 2.0, 3.0, 1.0])  # {0, 1} becomes {0, 2}
OTHER_ORDER = torch.tensor([3.0, 4.0, 2.0, 1.0])
NOISE = Disturbance("router", noise=0.2)


def shaken(
    after: torch.Tensor,
    before: torch.Tensor = REFERENCE,
    kl: float = 0.0,
    rise: float = 0.0,
    right: tuple[bool, ...] = (True, True, False),
    disturbance: Disturbance = NOISE,
) -> Shaken:
    """Two layers, router logits (layers, pages x tokens, experts); half `sum`, half `sort`."""
    pages = before.shape[1] // TOKENS
    names = np.full((pages, TOKENS), "sum", dtype=object)
    names[:, TOKENS // 2 :] = "sort"
    exam = Exam(
        torch.zeros(pages, TOKENS, dtype=torch.long),
        names,
        tuple(Answer("sum", page, 1, 2) for page in range(PAGES)),
    )
    flips = tuple(compare(route(b, 2), route(a, 2)) for b, a in zip(before, after, strict=True))
    nats = torch.ones(pages, TOKENS - 1, dtype=torch.float64)
    return Shaken(
        disturbance,
        exam,
        flips,
        torch.full((pages, TOKENS), kl),
        nats + rise,
        nats,
        np.array(right),
        np.array([True, True, False]),
    )


def traces(figure):
    """The traces by what they show."""
    by_type = {kind: [t for t in figure.data if t.type == kind] for kind in ("bar", "scatter")}
    rate, kl, loss, answers, *kinds, flipped, stayed = by_type["bar"]
    (cells,) = (t for t in figure.data if t.type == "heatmap")
    (river,) = (t for t in figure.data if t.type == "sankey")
    labels, share = by_type["scatter"]
    return {
        "rate": rate, "kl": kl, "loss": loss, "answers": answers, "kinds": kinds, "cells": cells,
        "river": river, "labels": labels, "flipped": flipped, "stayed": stayed, "share": share,
    }  # fmt: skip


def test_where_nothing_changed_everything_is_exactly_zero():
    figure = shaken_view(shaken(REFERENCE, disturbance=Disturbance("router")))
    shown = traces(figure)
    assert figure.layout.title.text == (
        "0% noise on router: 0% of tokens flip, KL 0, 2 of 2 answers still right"
    )
    for name in ("rate", "kl", "loss"):
        bar = shown[name]
        assert (bar.x[0], bar.error_x.array[0], bar.error_x.arrayminus[0]) == (0, 0, 0)
    assert [row[:2] for row in shown["cells"].text] == [["0", "0"]] * 2
    assert [list(bars.y) for bars in shown["kinds"]] == [[0, 0]] * 3
    link = shown["river"].link
    assert list(link.source) == [0, 1] and list(link.target) == [2, 3]
    assert sum(shown["flipped"].y) == 0 and sum(shown["stayed"].y) == 2 * PAGES * TOKENS
    assert set(shown["share"].y) == {0}
    assert "loss <b>0</b> nats" in [note.text for note in figure.layout.annotations]


def test_flips_are_shown_by_language_kind_and_move():
    after = REFERENCE.clone()
    after[1, :3] = OTHERS_SECOND  # the sums of the first page, in layer 1
    after[1, 3] = OTHER_ORDER
    shown = traces(shaken_view(shaken(after)))
    (first, second), (missing, *_) = shown["cells"].z[1][:2], shown["cells"].z[1][2:]
    assert first == pytest.approx(100 * 3 / 9) and second == 0 and math.isnan(missing)
    assert shown["cells"].text[1][:3] == ["33", "0", ""]
    changed, first, order = (list(bars.y) for bars in shown["kinds"])
    assert changed == pytest.approx([0, 3 / 18])
    assert first == order == pytest.approx([0, 1 / 18])
    assert shown["rate"].x[0] == pytest.approx(3 / 36)

    node, link = shown["river"].node, shown["river"].link
    moves = {
        (node.customdata[source], node.customdata[target]): value
        for source, target, value in zip(link.source, link.target, link.value, strict=True)
    }
    assert moves == {(0, 0): 36, (1, 1): 33, (1, 2): 3}
    pale = [color.endswith("0.22)") for color in link.color]
    assert pale == [True, True, False]


def test_a_layer_has_its_own_river_and_margins():
    after = REFERENCE.clone()
    after[1] = OTHERS_SECOND
    record = shaken(after)
    for layer, flipped, title in (
        (0, 0, "layer 0: 0 of 36 move"),
        (1, 18, "layer 1: 18 of 36 move"),
        (None, 18, "all layers: 18 of 72 move"),
    ):
        figure = shaken_view(record, layer)
        shown = traces(figure)
        tokens = 36 if layer is None else 18
        assert sum(shown["river"].link.value) == 2 * tokens
        assert sum(shown["flipped"].y) == flipped
        assert sum(shown["stayed"].y) == tokens - flipped
        assert any(note.text.endswith(title) for note in figure.layout.annotations)
        assert shown["rate"].x[0] == 0.5, "the gauges are of the whole model"


def test_an_expert_that_nobody_chooses_is_left_out_of_the_river():
    """All leave expert 1: it stands on the left and not on the right, and no index is off."""
    shown = traces(shaken_view(shaken(OTHERS_SECOND.repeat(2, PAGES * TOKENS, 1))))
    river = shown["river"]
    assert list(river.node.customdata) == [0, 1, 0, 2]
    assert list(zip(river.link.source, river.link.target, strict=True)) == [(0, 2), (1, 3)]
    assert list(shown["labels"].text) == ["0", "1", "0", "2"]
    assert len(river.node.color) == len(river.node.x) == len(river.node.y) == 4


def test_the_experts_ends_do_not_overlap_and_fill_the_height():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2, PAGES * TOKENS, EXPERTS, generator=generator)
    river = traces(shaken_view(shaken(after, before)))["river"]
    height = river.node.pad / (1 / (4 * EXPERTS))
    counts = np.zeros(2 * EXPERTS)
    np.add.at(counts, np.array(river.link.source), np.array(river.link.value))
    np.add.at(counts, np.array(river.link.target), np.array(river.link.value))
    thick = counts / counts[:EXPERTS].sum() * (height - (EXPERTS - 1) * river.node.pad)
    for side in (slice(0, EXPERTS), slice(EXPERTS, None)):
        middle = np.array(river.node.y[side]) * height
        top, bottom = middle - thick[side] / 2, middle + thick[side] / 2
        assert top[0] == pytest.approx(0, abs=1e-9) and bottom[-1] == pytest.approx(height)
        assert top[1:] - bottom[:-1] == pytest.approx(river.node.pad)


def test_tokens_near_a_tie_are_in_the_first_bins():
    before, after = REFERENCE.clone(), REFERENCE.clone()
    margin = torch.linspace(0.01, 1, PAGES * TOKENS)
    before[0, :, 1] = before[0, :, 2] + margin
    after[0] = before[0]
    after[0, :, 2] += 0.1
    shown = traces(shaken_view(shaken(after, before), layer=0))
    near = int((margin < 0.1).sum())
    assert sum(shown["flipped"].y) == near
    x = np.array(shown["flipped"].x)
    assert 10 ** x[np.array(shown["flipped"].y) > 0].max() < 0.12
    assert list(shown["share"].y)[:near] == [100] * near and shown["share"].y[-1] == 0


def test_damage_has_scales_that_stay():
    """0 at 0, equal steps for equal factors, and a loss that falls goes to the left."""

    def bars(kl: float, rise: float):
        return traces(shaken_view(shaken(REFERENCE, kl=kl, rise=rise)))

    places = [bars(kl, 0.0)["kl"].x[0] for kl in (0.0, 1e-3, 1e-2, 1e-1)]
    assert places[0] == 0 and np.diff(places[1:]) == pytest.approx([1, 1], abs=0.01)
    rises = [bars(0.0, rise)["loss"].x[0] for rise in (-0.01, 0.0, 0.01)]
    assert rises[0] == pytest.approx(-rises[2], rel=1e-3) and rises[1] == 0
    calm, wild = shaken_view(shaken(REFERENCE)), shaken_view(shaken(REFERENCE, kl=2.0, rise=2.0))
    for axis in ("xaxis5", "xaxis6", "xaxis7", "xaxis8", "yaxis4"):
        assert calm.layout[axis].range == wild.layout[axis].range
    assert len(calm.data) == len(wild.data)


@pytest.mark.parametrize(
    ("kl", "said"), [(1.96, "2.0"), (0.00198, "0.0020"), (1.2e-5, "0.000012"), (1e-9, "<0.00001")]
)
def test_the_title_has_two_digits_of_the_damage(kl, said):
    figure = shaken_view(shaken(REFERENCE, kl=kl, rise=-kl))
    assert f"KL {said}, 2 of 2 answers" in figure.layout.title.text
    loss = "nearly 0" if kl < 1e-5 else f"\u2212{said}"
    assert f"loss <b>{loss}</b> nats" in [note.text for note in figure.layout.annotations]


def test_answers_lost_and_won_are_told_apart():
    figure = shaken_view(
        shaken(REFERENCE, right=(True, False, True), disturbance=Disturbance("experts", bits=3))
    )
    assert figure.layout.title.text.startswith("Experts in 3 bits: ")
    assert figure.layout.title.text.endswith("1 of 2 answers still right")
    assert figure.layout.title.subtitle.text.endswith("simulated")
    answers = traces(figure)["answers"]
    assert answers.x[0] == 2
    assert "<b>2</b> of 3 answers right, 1 new" in [n.text for n in figure.layout.annotations]
    assert answers.hovertemplate.startswith("2 of 3 right; 1 of the 2 that were right before")


def test_few_flips_are_never_written_as_none():
    """One token of 5,400 flips in one of two layers, one of 2,700 sums."""
    before = REFERENCE.repeat(1, 300, 1)
    after = before.clone()
    after[0, 0] = OTHERS_SECOND
    figure = shaken_view(shaken(after, before))
    assert "router: <0.01% of tokens flip" in figure.layout.title.text
    assert traces(figure)["cells"].text[0][:2] == ["<1", "0"]
    after[0, 1:6] = OTHERS_SECOND
    assert "router: 0.06% of tokens" in shaken_view(shaken(after, before)).layout.title.text


def test_margins_that_are_all_alike_or_infinite_are_drawn():
    alike = traces(shaken_view(shaken(REFERENCE)))
    assert alike["stayed"].y[0] == 2 * PAGES * TOKENS
    closed = REFERENCE.clone()
    closed[:, :, 2:] = -torch.inf
    endless = traces(shaken_view(shaken(closed, closed)))
    assert endless["stayed"].y[-1] == 2 * PAGES * TOKENS
