"""Pictures of flips hold their records, and their titles are the finding."""

import numpy as np
import pandas as pd
import pytest
import torch

from labutils import flip_figures
from labutils.meter import MIB
from labutils.moe import route
from labutils.shaker import WHAT
from labutils.style import COLORS

NAN = float("nan")


def table(columns: str, *rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split())


def said(figure) -> tuple[str, str]:
    return figure.layout.title.text, figure.layout.title.subtitle.text


def test_what_is_below_zero_has_flipped():
    noisy = 0.5 + 0.4 * 2**0.5 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    figure = flip_figures.margin_under_noise(0.5, 0.4, noisy)
    share = (noisy < 0).double().mean().item()
    title, subtitle = said(figure)
    assert title == f"A margin of 0.50 under noise of 0.40 flips {share:.1%} of the time"
    assert "= 18.8%; drawn 10,000 times" in subtitle
    flipped, kept, gaussian = figure.data
    assert max(flipped.x) < 0 < min(kept.x)
    areas = [bars.y.sum() * bars.width for bars in (flipped, kept)]
    assert areas == pytest.approx([share, 1 - share])
    assert gaussian.x[np.argmax(gaussian.y)] == pytest.approx(0.5)
    assert [line.x0 for line in figure.layout.shapes] == [0, 0.5]


def test_no_flip_is_no_error():
    figure = flip_figures.margin_under_noise(9.0, 0.1, torch.linspace(8.8, 9.2, 100))
    assert said(figure)[0].endswith("flips 0.0% of the time")
    assert len(figure.data[0].x) == 0


@pytest.mark.parametrize(
    ("near", "share"), [([1, 1], "50%"), ([1, 3], "50 to 100%")], ids=["alike", "apart"]
)
def test_margins_are_counted_in_standard_deviations(near, share):
    """Of four tokens, two are at a tie; in the second layer perhaps all but a hair from one."""
    logits = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [2.0, 0.0, -2.0], [2.0, 0.0, -2.0]])
    tied = logits.clone()
    if near[1] == 3:
        tied[2:, 1] = 1.999
    figure = flip_figures.margins_by_layer([route(values, top_k=1) for values in (logits, tied)])
    assert said(figure)[0].startswith(f"{share} of the tokens are nearer than a tenth")
    assert "4 tokens in each layer" in said(figure)[1]
    first = figure.data[0]
    scaled = 2 / logits.std().item()
    assert set(first.y[first.x < 0.99 * scaled]) == {50}
    assert set(first.y[first.x > 1.01 * scaled]) == {100}


FLIPS = table(
    "where noise predicted nearest_pair measured low high",
    ("toy layer", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    ("toy layer", 0.1, 0.10, 0.09, 0.11, 0.08, 0.14),
    ("toy layer", 1.0, 0.50, 0.30, 0.52, 0.45, 0.55),
    ("stand-in, layer 3", 0.1, 0.20, 0.19, 0.25, 0.22, 0.28),
)


def test_predictions_are_counted_over_all_panels_that_draw_them():
    figure = flip_figures.flip_curves(FLIPS)
    assert said(figure)[0] == (
        "Predicted within the interval at 2 of 3 noise levels, from one pair alone at 1"
    )
    assert [note.text for note in figure.layout.annotations] == ["toy layer", "stand-in, layer 3"]
    predicted, pair, measured = figure.data[:3]
    assert list(measured.x) == [0.1, 1.0], "a logarithmic axis has no 0"
    assert list(predicted.y) == [10, 50] and list(pair.y) == [9, 30]
    assert pair.line.dash == "dash"
    np.testing.assert_allclose(measured.error_y.array, [3, 3])
    np.testing.assert_allclose(measured.error_y.arrayminus, [3, 7])


def test_many_places_take_several_rows():
    places = pd.concat([FLIPS.assign(where=f"layer {layer}") for layer in range(4)])
    figure = flip_figures.flip_curves(places)
    assert figure.layout.height > flip_figures.flip_curves(FLIPS).layout.height
    assert figure.data[-1].xaxis == "x4"
    assert sum(trace.showlegend for trace in figure.data) == 3


DRIFT = table(
    "bits layer cause flips low high",
    (4, 0, "router's weights", 0.60, 0.50, 0.70),
    (2, 0, "activations: experts' weights upstream", 0.0, 0.0, 0.0),
    (2, 1, "activations: experts' weights upstream", 0.26, 0.25, 0.28),
    (4, 1, "activations: experts' weights upstream", 0.05, 0.03, 0.06),
)


@pytest.mark.parametrize(
    ("causes", "title"),
    [
        ("activations|router", "In 2 bits 26% of the tokens flip in layer 1 with its router"),
        ("router", "In 4 bits 60% of the tokens flip in layer 0 (router's weights)"),
    ],
    ids=["activations", "router alone"],
)
def test_the_largest_drift_is_named(causes, title):
    figure = flip_figures.drift_by_layer(DRIFT[DRIFT.cause.str.contains(causes)])
    assert said(figure)[0].startswith(title)


def test_drift_has_a_panel_for_each_bit_width():
    figure = flip_figures.drift_by_layer(DRIFT)
    assert [note.text for note in figure.layout.annotations] == ["2 bits", "4 bits"]
    router, activations = figure.data[2:]
    assert router.line.color == COLORS["router"] and list(router.y) == [60]
    assert list(activations.x) == ["1"] and activations.xaxis == "x2"
    np.testing.assert_allclose(activations.error_y.arrayminus, [2])


def noise(*, router: tuple, experts: tuple) -> pd.DataFrame:
    """Flips and KL of both at 9% noise; at 3 and 30% all the same, at 1% nothing at all."""
    same = (0.5, 0.1)
    rows = [
        (name, level, flips, flips * 0.9, flips * 1.1, kl, kl * 0.5, kl * 2)
        for name, nine in (("router", router), ("experts", experts))
        for level, (flips, kl) in ((0.01, (0.0, 0.0)), (0.03, same), (0.09, nine), (0.3, same))
    ]
    return table("what noise flips flips_low flips_high kl kl_low kl_high", *rows)


@pytest.mark.parametrize(
    ("router", "experts", "title"),
    [
        ((0.1, 1e-5), (0.02, 7e-5), "flips 5 times what the experts flip, at a seventh"),
        ((0.02, 3e-3), (0.04, 2e-4), "flips half of what the experts flip, at 15 times"),
        ((0.09, 2e-5), (0.1, 4e-3), "flips 0.9 times what the experts flip, at 1/200"),
    ],
    ids=["crossed", "the same way", "hardly more"],
)
def test_the_two_orders_are_compared_near_ten_percent(router, experts, title):
    figure = flip_figures.noise_curves(noise(router=router, experts=experts))
    assert said(figure)[0].startswith("At 9% noise the router " + title)
    assert f"router {router[0]:.2%} and" in said(figure)[1]


def test_no_flip_is_drawn_at_the_lower_end_and_said_in_the_hover():
    figure = flip_figures.noise_curves(noise(router=(0.1, 1e-5), experts=(0.02, 7e-5)))
    flips, kl = figure.data[0], figure.data[2]
    assert list(flips.y) == pytest.approx([1, 50, 10, 50]) and flips.customdata[0][0] == 0
    assert list(kl.y) == pytest.approx([1e-6, 0.1, 1e-5, 0.1]) and kl.customdata[0][0] == 0
    assert figure.layout.yaxis.ticktext[0] == "1<br>or less"
    assert figure.layout.yaxis2.ticktext[0] == "10<sup>-6</sup><br>or less"
    np.testing.assert_allclose(kl.error_y.array, [0, 0.1, 1e-5, 0.1])
    whole = noise(router=(0.1, 1e-5), experts=(0.02, 7e-5)).query("noise > 0.05")
    assert "or less" not in str(flip_figures.noise_curves(whole).layout)


def test_every_part_that_can_be_shaken_has_a_colour():
    assert set(WHAT) == set(flip_figures._SHAKEN_COLORS)


def rounded(bits: tuple[int, ...], router_kl: float, experts_kl: float) -> pd.DataFrame:
    rows = [
        (what, width, kl, kl / 2, kl * 2, saved)
        for what, kl, saved in (("router", router_kl, MIB / 4), ("experts", experts_kl, 100 * MIB))
        for width in bits
    ]
    return table("what bits kl kl_low kl_high bytes_saved", *rows)


@pytest.mark.parametrize(
    ("bits", "router", "experts", "title"),
    [
        ((2, 3, 4), 0.01, 0.16, "In 3 bits the router costs 1/16 of the experts' KL, and 25 times"),
        ((2, 4), 0.6, 0.2, "In 2 bits the router costs 3 times the experts' KL, and 1,200 times"),
        ((3,), 1e-6, 4e-3, "In 3 bits the router costs 1/4,000 of the experts' KL, and a tenth of"),
        ((3,), 0.0, 0.0, "In 3 bits the router costs 1 times the experts' KL"),
    ],
    ids=["less and more", "no 3 bits", "less and less", "nothing"],
)
def test_damage_is_counted_by_bits_and_by_bytes(bits, router, experts, title):
    rows = pd.concat([rounded(bits, router, experts), rounded((8,), 0.1, 0.1)])
    figure = flip_figures.bits_and_bytes(rows.reset_index(drop=True))
    assert said(figure)[0].startswith(title)
    assert "Simulated" in said(figure)[1]


def test_damage_by_bytes_is_per_mebibyte():
    figure = flip_figures.bits_and_bytes(rounded((2, 3), 0.01, 0.2))
    router, _, router_per_mib, experts_per_mib = figure.data
    assert list(router.x) == ["2", "3"] and list(router.y) == [0.01, 0.01]
    assert list(router_per_mib.y) == [0.04, 0.04]
    assert list(experts_per_mib.y) == pytest.approx([0.002, 0.002])
    little = flip_figures.bits_and_bytes(rounded((2, 3), 0.01, 1e-5)).data[3]
    assert list(little.y) == pytest.approx([1e-7, 1e-7]), "little for each MiB is not too little"
    assert router_per_mib.text[0] == "2 bits, 0.25 MiB saved"
    np.testing.assert_allclose(router_per_mib.error_y.array, [0.04, 0.04])


EXCHANGES = table(
    "layer exchange kl low high",
    (0, "second expert for the next best", 0.005, 0.0, 0.02),
    (0, "second expert for a random one", 0.016, 0.01, 0.02),
    (0, "first expert for the next best", 5.0, 4.8, 5.2),
    (1, "second expert for the next best", 0.001, 0.0005, 0.002),
    (1, "first expert for the next best", 0.13, 0.1, 0.2),
)


def test_the_first_expert_is_held_against_the_second():
    figure = flip_figures.forced_exchanges(EXCHANGES)
    assert said(figure)[0] == (
        "Exchanging the first expert costs 130 to 1,000 times as much as exchanging the second"
    )
    assert said(figure)[1].startswith("each for the next best, in one layer at a time")
    assert [dots.name for dots in figure.data] == list(EXCHANGES.exchange[:3])
    second = figure.data[0]
    assert list(second.x) == ["layer 0", "layer 1"]
    np.testing.assert_allclose(second.error_y.arrayminus, [0.005 - 0.0001, 0.0005])
    assert second.customdata[0][1] == 0
    assert figure.layout.yaxis.ticktext[0] == "10<sup>-4</sup><br>or less"


def test_far_from_a_tie_is_held_against_near():
    rows = [(0, 0.5, 0.03, 0.01, 0.05), (0, 0.1, 0.001, 0.0, 0.002)]
    rows += [(1, 0.2, 0.003, 0.001, 0.01), (1, 0.7, 0.001, 0.0005, 0.003)]
    figure = flip_figures.cost_by_margin(table("layer margin kl low high", *rows))
    title, subtitle = said(figure)
    assert title == ("Far from a tie another second expert costs more in 1 of 2 layers, 30 times")
    assert "the farthest fifth of the tokens over the nearest" in subtitle
    assert list(figure.data[1].x) == [0.2, 0.7]
    assert figure.data[0].line.color != figure.data[1].line.color
    assert figure.layout.yaxis.ticktext[0] == "10<sup>-4</sup><br>or less"


def test_the_router_is_held_against_the_experts_on_two_texts():
    rows = [("pages", "router", 0.09, 0.001, 0.0005, 0.002), ("pages", "experts", 0.02, 0.01, 0, 1)]
    rows += [("noise", "router", 0.1, 0.6, 0.5, 0.7), ("noise", "experts", 0.03, 0.2, 0.1, 0.3)]
    figure = flip_figures.damage_by_text(table("text what flips kl low high", *rows))
    title, subtitle = said(figure)
    assert title == "Router: a tenth of the experts' KL on pages, 3 times on noise"
    assert "9 to 10% of the tokens" in subtitle
    assert list(figure.data[0].x) == ["pages", "noise"]
    np.testing.assert_allclose(figure.data[0].error_y.array, [0.001, 0.1])


REPLAYED = table(
    "where bits cell share low high nats both",
    ("pages", 2, "routing only", 0.1, 0.05, 0.2, 0.01, 0.1),
    ("pages", 2, "weights only", 0.9, 0.8, 0.95, 0.09, 0.1),
    ("pages", 3, "routing only", 0.1, 0.05, 0.15, 0.2, 2.0),
    ("pages", 3, "weights only", 0.75, 0.7, 0.8, 1.5, 2.0),
    ("Mixtral", 3, "routing only", 0.4, NAN, NAN, 0.08, 0.2),
    ("Mixtral", 3, "weights only", 0.5, NAN, NAN, 0.1, 0.2),
)


def test_cells_are_shares_of_both():
    figure = flip_figures.two_by_two(REPLAYED)
    title, subtitle = said(figure)
    assert title == "The old routing regains 10 to 25% on pages"
    assert subtitle.endswith("published: 50% on Mixtral")
    routing, weights = figure.data
    assert list(routing.x) == pytest.approx([10, 10, 40])
    assert list(weights.x) == pytest.approx([90, 75, 50])
    assert list(weights.y) == [
        "pages, 2 bits<br>both: 0.1 nats",
        "pages, 3 bits<br>both: 2 nats",
        "Mixtral, 3 bits<br>both: 0.2 nats",
    ]
    np.testing.assert_allclose(weights.error_x.array, [5, 5, NAN])
    np.testing.assert_allclose(weights.error_x.arrayminus, [10, 5, NAN])
    assert weights.customdata[1] == " [70.0%, 80.0%]: 1.5 of 2 nats"
    assert weights.customdata[2] == ": 0.1 of 0.2 nats"


def test_what_may_be_nothing_is_not_said_to_be_more():
    unsure = REPLAYED.assign(high=REPLAYED.high.mask(REPLAYED.high == 0.95, 1.07))
    assert said(flip_figures.two_by_two(unsure))[0] == "The old routing regains up to 25% on pages"


def test_without_a_published_case_none_is_spoken_of():
    figure = flip_figures.two_by_two(REPLAYED[REPLAYED["where"] != "Mixtral"])
    assert "published" not in said(figure)[1]


@pytest.mark.parametrize(
    ("done", "begins"), [("in 2 bits", "In 2 bits, expert 1"), ("removed", "Removed, expert 1")]
)
def test_the_most_costly_expert_is_held_against_the_median(done, begins):
    kl = pd.DataFrame([[0.0003, 0.0], [0.0001, 0.0108]])
    use = pd.DataFrame([[0.6, 0.4], [0.75, 0.25]])
    figure = flip_figures.expert_map(kl, use, done)
    title, subtitle = said(figure)
    assert title == f"{begins} of layer 1 costs most: 54 times what the median expert costs"
    assert subtitle.endswith("it gets 25% of its layer's choices, even use would be 50%")
    (heatmap,) = figure.data
    assert [list(row) for row in heatmap.text] == [["0.0003", "0"], ["0.0001", "0.011"]]
    assert heatmap.z[0][1] == -7, "nothing stands at the lower end of the colours"
    assert list(heatmap.customdata[1][1]) == [0.0108, 25]
    assert done in heatmap.colorbar.title.text
