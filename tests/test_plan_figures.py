"""Pictures of plans: every byte in the stack, every verdict with its number."""

import pytest
from random_checkpoints import mixtral_config

from labutils.apps import redraw
from labutils.meter import GIB
from labutils.plan_figures import memory_of, verdicts
from labutils.planner import (
    CONTEXT_BYTES,
    FITS,
    HOST_BYTES,
    OFFLOADED,
    SHORTER,
    TOO_LARGE,
    Card,
    Machine,
    plan,
    plans_table,
)
from labutils.recipes import Recipe
from labutils.style import changeable

CONFIG = mixtral_config(hidden=512, ffn=1024, layers=8)
TOKENS = 1024
RECIPE = Recipe()


def card(name: str, usable_bytes: int) -> Card:
    return Card(name, (usable_bytes + CONTEXT_BYTES) / GIB)


def machines() -> list[Machine]:
    """One for each verdict, two small cards, and none."""
    ample = Machine(Card("ample", 80))
    whole, shorter = (
        plan(CONFIG, RECIPE, ample, tokens).bytes_needed for tokens in (TOKENS, 3 * TOKENS // 4)
    )
    without = plan(CONFIG, RECIPE, ample, TOKENS).offload.card_bytes
    return [
        Machine(card("large", 2 * whole)),
        Machine(card("middle", shorter)),
        Machine(card("small", without + 1000)),
        Machine(card("tiny", without // 2)),
        Machine(card("pair", int(0.7 * whole)), 2),
        Machine(None, host_gib=(HOST_BYTES + 2 * whole) / GIB),
    ]


@pytest.fixture(scope="module")
def plans():
    return [plan(CONFIG, RECIPE, machine, TOKENS) for machine in machines()]


def bars(figure):
    *stack, filled, short, outlines = figure.data
    return stack, filled, short, outlines


def said(figure) -> list[str]:
    """What stands at the end of each row, without the mark's colour."""
    return [note.text.split("</span> ")[-1] for note in figure.layout.annotations]


def test_each_machine_gets_its_verdict_and_its_number(plans):
    assert [made.verdict for made in plans] == [FITS, SHORTER, OFFLOADED, TOO_LARGE, FITS, FITS]
    figure = memory_of(plans)
    total, large, middle, small, tiny, pair, cpu = said(figure)
    needed = plans[0].budget.total_bytes / GIB
    assert total == f"<b>{needed:,.1f} GiB</b>"
    assert large == f"fits, {plans[0].bytes_needed / GIB:,.1f} GiB left"
    assert middle == f"fits with {plans[1].longest_context_tokens:,} tokens"
    assert small.startswith("experts in CPU memory, ")
    assert tiny.startswith("short by ") and tiny.endswith(" GiB")
    assert pair.endswith(" GiB left a card") and cpu.startswith("fits, ")
    assert figure.layout.title.text == (
        f"mixtral, experts in NF4, 1,024 tokens: {needed:,.1f} GiB, fits 3 of 6 machines"
    )
    assert figure.layout.title.subtitle.text.startswith(
        "1 more with a shorter context; 1 more with experts in CPU memory; predicted: "
    )


def test_the_stack_is_the_whole_budget(plans):
    stack, *_ = bars(memory_of(plans))
    sizes = {bar.name: bar.x[0] * GIB for bar in stack if bar.x[0]}
    budget = plans[0].budget.by_component
    assert sizes == pytest.approx({n.replace("_", " ").replace("kv", "KV"): s for n, s in
                                   budget.items()})  # fmt: skip
    ends = [bar.base[0] + bar.x[0] for bar in stack]
    assert [bar.base[0] for bar in stack[1:]] == pytest.approx(ends[:-1])


def test_boxes_are_filled_as_far_as_needed(plans):
    _, filled, short, outlines = bars(memory_of(plans))
    rooms = [made.bytes_available / GIB for made in plans]
    first, second = plans[4].shares
    assert outlines.x == pytest.approx([*rooms[:5], rooms[4], rooms[5]])
    assert filled.base == pytest.approx([0, 0, 0, 0, 0, rooms[4], 0])
    needs = [plans[0].bytes_needed, plans[1].bytes_available, plans[2].offload.card_bytes,
             plans[3].bytes_available, first, second, plans[5].bytes_needed]  # fmt: skip
    assert filled.x == pytest.approx([need / GIB for need in needs])
    lacking = [0, plans[1].short_bytes, 0, plans[3].short_bytes, 0, 0]
    assert short.x == pytest.approx([size / GIB for size in lacking])
    colors = dict(zip([0, 1, 2, 3], filled.marker.color, strict=False))
    assert len(set(colors.values())) == 4 and len(set(filled.marker.pattern.shape)) == 4


def test_another_model_is_drawn_into_the_same_widget(plans):
    shown = changeable(memory_of(plans))
    others = [plan("OLMoE-1B-7B", Recipe("int8"), machine, 8192, 2) for machine in machines()]
    figure = memory_of(others)
    redraw(shown, figure)
    assert shown.layout.title.text.startswith("OLMoE-1B-7B, experts in INT8, 2 x 8,192 tokens: ")
    end, needed = figure.layout.xaxis.range[1], others[0].budget.total_bytes / GIB
    assert needed < end < 6 * needed


def test_verdicts_have_a_cell_for_each_pair():
    table = plans_table([CONFIG, "OLMoE-1B-7B"], RECIPE, machines()[:4], TOKENS)
    figure = verdicts(table, "experts in NF4, 1,024 tokens")
    cells = figure.data[0]
    assert list(cells.y) == ["mixtral", "OLMoE-1B-7B"] and len(cells.x) == 4
    assert list(cells.z[0]) == [0, 1, 2, 3] and list(cells.z[1]) == [3] * 4
    assert [text[0] for text in cells.text[0]] == ["\u2713", "\u25d0", "\u21c4", "\u2717"]
    tokens = plan(CONFIG, RECIPE, machines()[1], TOKENS).longest_context_tokens
    assert [f"{tokens:,} tokens" in text for text in cells.text[0]] == [False, True, False, False]
    missing = (table.available_gib - table.needed_gib).iloc[-1]
    assert cells.text[1][3] == f"\u2717 \u2212{abs(missing):.1f}"
    assert figure.layout.title.text == (
        "Experts in NF4, 1,024 tokens: 1 of 8 fit, 2 more with a compromise"
    )
