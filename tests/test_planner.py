"""The planner against `predict`, against brute force, and against what loading really took."""

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import mixtral_config, write_any, write_mixtral
from transformers import Llama4TextConfig, LlamaConfig, MixtralConfig

from labutils import planner, standin
from labutils.budget import activation_bytes, predict, read_config
from labutils.checkpoints import coverage, load
from labutils.ledger import PUBLISHED
from labutils.meter import GIB
from labutils.planner import (
    CARDS,
    FITS,
    OFFLOADED,
    SHORTER,
    SHORTEST_CONTEXT_TOKENS,
    TOO_LARGE,
    Card,
    Machine,
    card_named,
    plan,
    plans_table,
)
from labutils.recipes import Recipe

IN_NF4 = Recipe(attention="nf4")
ON_4090 = Machine(CARDS["RTX 4090"])


# -------------------------------------------------------------------------- a published example


def test_mixtral_in_nf4_needs_more_than_24_gib_and_32_do():
    """Claim C14: with double quantization and 4,096 tokens it is 1.3 GiB too much."""
    verdicts = {name: plan("Mixtral-8x7B", IN_NF4, Machine(card)) for name, card in CARDS.items()}
    for name, made in verdicts.items():
        assert (made.verdict == FITS) == (CARDS[name].gib > 30), made.sentence
        assert made.bytes_needed == predict(PUBLISHED["Mixtral-8x7B"], IN_NF4, 4096).total_bytes
    assert verdicts["RTX 4090"].short_bytes / GIB == pytest.approx(1.30, abs=0.01)
    assert verdicts["RTX 5090"].short_bytes == 0
    assert verdicts["RTX 3090"].verdict == SHORTER


def test_a_token_moves_64_experts_of_mixtral_at_worst():
    """5.8 GB in NF4 with double quantization, as known from its experts' size."""
    made = plan("Mixtral-8x7B", IN_NF4, ON_4090)
    assert made.verdict == OFFLOADED
    experts_bytes = predict(PUBLISHED["Mixtral-8x7B"], IN_NF4).by_component["experts"]
    assert made.offload.host_bytes == experts_bytes
    assert made.offload.token_bytes == experts_bytes * 64 // 256
    assert made.offload.token_bytes / 1e9 == pytest.approx(5.82, abs=0.01)
    rest = predict(PUBLISHED["Mixtral-8x7B"], IN_NF4, 4096).total_bytes - experts_bytes
    assert made.offload.card_bytes == rest + experts_bytes // 256


def test_the_largest_experts_are_the_worst_that_a_token_can_choose():
    config = FAMILIES["mixtral"]
    recipe = Recipe(overrides={"layers.0.experts.3": "int8", "layers.0.experts.5.up_proj": "bf16"})
    sizes = {
        expert: predict(config, Recipe(overrides={f"layers.0.experts.{expert}": "bf16"}))
        for expert in (0, 3)
    }
    assert sizes[0] == sizes[3]
    plain = plan(config, Recipe(), ON_4090).offload
    one = plain.host_bytes // 16
    mixed = plan(config, recipe, ON_4090).offload
    by_component = predict(config, recipe).by_component["experts"]
    assert mixed.host_bytes == by_component
    assert mixed.token_bytes == (by_component - 14 * one) + 2 * one


# ------------------------------------------------------------------------------- as predict says


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_budget_is_predicts(name):
    recipe = Recipe(attention="int8", shared_experts="nf4", router="fp16", experts="mxfp4")
    recipe = replace(recipe, **dict.fromkeys(("embeddings", "lm_head", "dense_mlp"), "fp16"))
    made = plan(name, recipe, ON_4090, 5000, 3)
    assert made.budget == predict(PUBLISHED[name], recipe, 5000, 3)
    assert made.shares == (made.budget.total_bytes,)
    assert list(made.budget.by_component) == list(
        predict(PUBLISHED[name], recipe, 5000, 3).by_component
    )


def test_the_budget_is_predicts_with_exceptions_too():
    recipe = Recipe(overrides={"layers.*.experts.3.down_proj": "int8", "layers.1": "fp4"})
    made = plan("OLMoE-1B-7B", recipe, ON_4090)
    assert made.budget == predict(PUBLISHED["OLMoE-1B-7B"], recipe, 4096)
    with pytest.raises(ValueError, match=r"No part of this model fits the override 'layers.99'"):
        plan("OLMoE-1B-7B", Recipe(overrides={"layers.99": "int8"}), ON_4090)


def endless(name: str):
    """A published config without a longest context of its own: memory alone decides."""
    config = read_config(PUBLISHED[name])
    config.max_position_embeddings = planner.MOST_TOKENS
    return config


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_longest_context_is_exact(name, batch_size):
    card = Card("enough", predict(PUBLISHED[name], IN_NF4, 4096, 5).total_bytes / GIB + 1)
    config = endless(name)
    longest = plan(config, IN_NF4, Machine(card), 1, batch_size).longest_context_tokens
    at = predict(config, IN_NF4, longest, batch_size).total_bytes
    beyond = predict(config, IN_NF4, longest + 1, batch_size).total_bytes
    assert longest > 4096
    assert at <= card.usable_bytes < beyond


# --------------------------------------------------------------------------------- several cards


def splits(row: list[int], cards: int):
    """The shares of every way to cut `row` into at most `cards` pieces."""
    for count in range(min(cards, len(row))):
        for cuts in combinations(range(1, len(row)), count):
            yield [sum(row[i:j]) for i, j in pairwise((0, *cuts, len(row)))]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(1, 4), st.integers(0, 9))
def test_the_fullest_card_is_as_empty_as_whole_layers_allow(row, cards, everywhere):
    stack = planner._Stack(row, everywhere)
    shares = stack.shares(cards)
    best = min(max(split) for split in splits(row, cards)) + everywhere
    assert max(shares) == best
    assert len(shares) <= cards
    assert sum(shares) == sum(row) + len(shares) * everywhere
    assert stack.fits(cards, best)
    assert not stack.fits(cards, best - 1)


@pytest.mark.parametrize("cards", [2, 3, 4])
def test_layers_are_split_whole_and_every_card_has_activations(cards):
    made = plan("Mixtral-8x7B", IN_NF4, Machine(CARDS["RTX 3060"], cards))
    one = plan("Mixtral-8x7B", IN_NF4, Machine(CARDS["RTX 3060"]))
    activations = one.budget.by_component["activations"]
    assert sum(made.shares) == one.bytes_needed + (cards - 1) * activations
    sizes = one.budget.by_component
    row = sum(sizes[name] for name in ("attention", "router", "experts", "norms", "kv_cache"))
    layer = (row - 2 * 4096) // 32
    ends = sizes["embeddings"]
    inner = [share - activations for share in made.shares]
    inner[0] -= ends
    inner[-1] -= ends + 2 * 4096
    assert all(share % layer == 0 for share in inner)
    assert made.verdict == (FITS if cards > 2 else OFFLOADED)


@pytest.mark.parametrize("cards", [1, 2, 3])
def test_what_fits_at_the_longest_context_does_not_beyond(cards):
    machine = Machine(CARDS["RTX 5090"], cards)
    mixtral = endless("Mixtral-8x7B")
    longest = plan(mixtral, IN_NF4, machine).longest_context_tokens
    assert plan(mixtral, IN_NF4, machine, longest).verdict == FITS
    beyond = plan(mixtral, IN_NF4, machine, longest + 1)
    assert beyond.verdict == SHORTER
    assert beyond.longest_context_tokens == longest
    assert beyond.bytes_needed > beyond.bytes_available


# ------------------------------------------------------------------------------------- verdicts


def test_with_experts_in_cpu_memory_the_longest_context_is_exact_too():
    machine = Machine(CARDS["RTX 4060"], host_gib=32)
    mixtral = endless("Mixtral-8x7B")
    longest = plan(mixtral, IN_NF4, machine).longest_context_tokens
    at = plan(mixtral, IN_NF4, machine, longest)
    beyond = plan(mixtral, IN_NF4, machine, longest + 1)
    assert (at.verdict, beyond.verdict) == (OFFLOADED, TOO_LARGE)
    assert at.offload.card_bytes <= at.bytes_available < beyond.offload.card_bytes
    assert beyond.longest_context_tokens == longest
    assert f"at most {longest:,} tokens do" in beyond.sentence


def test_no_context_is_longer_than_what_the_model_was_made_for():
    large = Machine(CARDS["H200"])
    at = plan("OLMoE-1B-7B", IN_NF4, large, 4096)
    beyond = plan("OLMoE-1B-7B", IN_NF4, large, 4097)
    assert (at.verdict, at.longest_context_tokens) == (FITS, 4096)
    assert at.sentence.endswith("it fits; up to 4,096 tokens do.")
    assert (beyond.verdict, beyond.longest_context_tokens) == (FITS, 4096)
    assert beyond.sentence.endswith("it fits; yet the model was made for 4,096 tokens.")
    shorter = plan("OLMoE-1B-7B", IN_NF4, Machine(CARDS["RTX 4060"]), 20_000)
    assert (shorter.verdict, shorter.longest_context_tokens) == (SHORTER, 4096)
    assert "take at most 4,096 tokens" in shorter.next_step
    assert shorter.sentence.endswith("; the model was made for 4,096 tokens.")


def test_a_search_without_an_end_ends():
    assert planner._longest(lambda tokens: True) >= planner.MOST_TOKENS
    assert planner._longest(lambda tokens: tokens <= 777) == 777


def test_experts_need_room_in_main_memory():
    enough = plan("Mixtral-8x7B", IN_NF4, replace(ON_4090, host_gib=26))
    too_little = plan("Mixtral-8x7B", IN_NF4, replace(ON_4090, host_gib=25))
    assert enough.verdict == OFFLOADED
    assert (too_little.verdict, too_little.longest_context_tokens) == (TOO_LARGE, 0)
    assert "or 26 GiB of main memory for the experts" in too_little.sentence


def test_a_context_too_short_for_a_page_is_no_offer():
    needed = predict(PUBLISHED["OLMoE-1B-7B"], IN_NF4, SHORTEST_CONTEXT_TOKENS).total_bytes
    barely = Card("barely", (needed + planner.CONTEXT_BYTES) / GIB + 1e-6)
    less = Card("less", (needed + planner.CONTEXT_BYTES) / GIB - 1e-6)
    made = plan("OLMoE-1B-7B", IN_NF4, Machine(barely))
    assert (made.verdict, made.longest_context_tokens) == (SHORTER, SHORTEST_CONTEXT_TOKENS)
    assert plan("OLMoE-1B-7B", IN_NF4, Machine(less)).verdict == OFFLOADED
    assert plan("OLMoE-1B-7B", IN_NF4, Machine(less), 100).verdict == FITS


def test_without_a_card_main_memory_decides():
    made = plan("Mixtral-8x7B", IN_NF4, Machine(host_gib=24))
    assert (made.verdict, made.offload) == (TOO_LARGE, None)
    assert made.bytes_available == 20 * GIB
    assert "take 29 GiB of main memory" in made.sentence
    assert plan("Mixtral-8x7B", IN_NF4, Machine(host_gib=29)).verdict == FITS
    assert plan("Mixtral-8x7B", IN_NF4, Machine(host_gib=28)).verdict == SHORTER


def test_a_dense_model_has_no_experts_to_move():
    dense = LlamaConfig(num_hidden_layers=16, vocab_size=64)
    made = plan(dense, Recipe(), Machine(Card("small", 1)))
    assert (made.verdict, made.offload) == (TOO_LARGE, None)
    assert plan(dense, Recipe(), ON_4090).verdict == FITS


# --------------------------------------------------------------------------------------- advice


def test_the_card_that_is_advised_fits_and_the_next_smaller_does_not():
    advised = []
    for name in PUBLISHED:
        made = plan(name, IN_NF4, Machine(CARDS["RTX 4060"]), 8192)
        if made.verdict == FITS:
            continue
        card = next(card for card in CARDS if f"one {card}" in made.next_step)
        smaller = [other for other in CARDS.values() if other.gib < CARDS[card].gib]
        assert plan(name, IN_NF4, Machine(CARDS[card]), 8192).verdict == FITS
        assert all(plan(name, IN_NF4, Machine(x), 8192).verdict != FITS for x in smaller)
        advised.append(card)
    assert len(set(advised)) > 2


def test_the_recipe_that_is_advised_fits():
    machine = Machine(CARDS["RTX 6000 Ada"])
    made = plan("Mixtral-8x7B", Recipe(experts="bf16"), machine)
    assert "take experts in NF4 with double quantization or" in made.next_step
    assert plan("Mixtral-8x7B", Recipe(), machine).verdict == FITS
    needed = predict(PUBLISHED["Mixtral-8x7B"], IN_NF4, 4096).total_bytes
    tight = Machine(Card("tight", (needed + planner.CONTEXT_BYTES) / GIB + 0.1))
    tighter = plan("Mixtral-8x7B", Recipe(experts="int8"), tight)
    assert "take experts, attention in NF4 with" in tighter.next_step
    assert plan("Mixtral-8x7B", Recipe(), tight).verdict != FITS
    assert plan("Mixtral-8x7B", IN_NF4, tight).verdict == FITS


def test_int3_experts_are_advised_where_4_bits_do_not_fit():
    """Mixtral-8x7B on a card of 24 GB, up to 9,733 tokens."""
    advised = "take experts in INT3 with attention in INT4 (to be exported, not loaded here) or"
    recipe = Recipe(experts="int3", attention="int4", double_quant=False)
    assert advised in plan("Mixtral-8x7B", IN_NF4, ON_4090, 9733).next_step
    assert plan("Mixtral-8x7B", recipe, ON_4090, 9733).longest_context_tokens == 9733
    assert "INT3" not in plan("Mixtral-8x7B", IN_NF4, ON_4090, 9734).next_step


def test_the_batch_that_is_advised_fits_and_one_more_does_not():
    machine = Machine(CARDS["RTX 5090"])
    made = plan("Mixtral-8x7B", IN_NF4, machine, 4096, 16)
    batch = int(re.search(r"a batch of (\d+) or", made.next_step)[1])
    assert 1 <= batch < 16
    assert plan("Mixtral-8x7B", IN_NF4, machine, 4096, batch).verdict == FITS
    assert plan("Mixtral-8x7B", IN_NF4, machine, 4096, batch + 1).verdict != FITS
    assert "batch" not in plan("Mixtral-8x7B", IN_NF4, ON_4090, 4096, 16).next_step


def test_calibrated_recipes_are_advised_without_double_quantization():
    recipe = Recipe(experts="int8", method="gptq", double_quant=False)
    made = plan("Mixtral-8x7B", recipe, Machine(CARDS["RTX 6000 Ada"]))
    assert "take experts in NF4 or" in made.next_step


def test_where_nothing_helps_that_is_said():
    wordy = MixtralConfig(num_hidden_layers=1, vocab_size=10**9)
    made = plan(wordy, Recipe(), Machine(CARDS["T4"], host_gib=0))
    assert (made.verdict, made.longest_context_tokens) == (TOO_LARGE, 0)
    assert made.sentence.endswith("it does not fit; take fewer bits or a smaller model.")


@pytest.mark.parametrize("machine", [ON_4090, Machine(CARDS["T4"], 2), Machine()])
@pytest.mark.parametrize("name", ["Mixtral-8x7B", "OLMoE-1B-7B", "Mixtral-8x22B"])
def test_the_sentence_has_both_numbers_and_the_verdict(name, machine):
    made = plan(name, IN_NF4, machine)
    assert f"needs {made.bytes_needed / GIB:.2f} GiB for 4,096 tokens" in made.sentence
    assert f"has {made.bytes_available / GIB:.2f}: it {made.verdict}; " in made.sentence
    assert made.sentence.endswith(".")
    assert "\n" not in made.sentence


# ---------------------------------------------------------------------------- cards and machines


def test_cards_have_less_than_is_printed_on_the_box():
    printed = (8, 12, 16, 16, 24, 24, 32, 40, 48, 80, 96, 141)
    for card, gib in zip(CARDS.values(), printed, strict=True):
        assert 0.92 * gib < card.gib < gib
        assert card.usable_bytes == int(card.gib * GIB) - GIB // 2


def test_a_card_is_found_in_any_case_and_the_nearest_are_named():
    assert card_named("rtx 4090") is CARDS["RTX 4090"]
    with pytest.raises(ValueError, match=r"'4090'; did you mean RTX 4090 or"):
        card_named("4090")
    with pytest.raises(ValueError, match=r"'zzz'; there are RTX 4060, RTX 3060, T4"):
        card_named("zzz")
    with pytest.raises(ValueError, match=r"There are RTX 4060.*--card-gib 180 .*Card\('B200', 180"):
        card_named("B200")


def test_a_machine_takes_a_card_by_its_name():
    assert Machine("rtx 4090") == ON_4090
    with pytest.raises(ValueError, match="Unknown card 'B200'"):
        Machine("B200")
    with pytest.raises(TypeError, match="not 24"):
        Machine(24)


@pytest.mark.parametrize("gib", ["24", None, True, 0, -1, float("nan"), float("inf"), 1e308])
def test_cards_that_there_are_not(gib):
    with pytest.raises(ValueError, match=r"^The memory of card 'new' is a number of GiB above 0"):
        Card("new", gib)


def test_a_card_smaller_than_the_allowance_has_nothing_for_a_model():
    assert Card("tiny", 0.25).usable_bytes == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"cards": 0},
        {"cards": 1.5},
        {"cards": "2"},
        {"cards": True},
        {"host_gib": -1},
        {"host_gib": float("inf")},
        {"host_gib": float("nan")},
        {"host_gib": "64"},
        {"card": None, "cards": 2},
    ],
)
def test_machines_that_there_are_not(wrong):
    with pytest.raises(ValueError, match="machine"):
        Machine(**{"card": CARDS["T4"]} | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        (0, 1),
        (4096, 0),
        (-1, 1),
        (1.5, 1),
        (float("nan"), 1),
        (4096, 2.0),
        ("4k", 1),
        (10**9, 10**4),
    ],
)
def test_nothing_to_plan(wrong):
    with pytest.raises(ValueError, match="nothing to plan"):
        plan("Mixtral-8x7B", IN_NF4, ON_4090, *wrong)


def test_a_name_is_no_machine_and_a_format_no_recipe():
    with pytest.raises(TypeError, match=r"Machine\('RTX 4090'\), not 'T4'"):
        plan("Mixtral-8x7B", IN_NF4, "T4")
    with pytest.raises(TypeError, match=r"for a Recipe, .* not 'nf4'"):
        plan("Mixtral-8x7B", "nf4", ON_4090)


@pytest.mark.parametrize("name", ["", "  "])
def test_a_model_without_a_name(name):
    with pytest.raises(ValueError, match="A model needs a name: give a folder"):
        plan(name, IN_NF4, ON_4090)


# --------------------------------------------------------------------------------------- configs


def test_a_model_is_counted_once(monkeypatch):
    counted = []
    real = planner.weights_of
    monkeypatch.setattr(planner, "weights_of", lambda config: counted.append(0) or real(config))
    config = MixtralConfig(num_hidden_layers=2, vocab_size=514)
    for recipe in (IN_NF4, Recipe(), Recipe(block_size=128)):
        for tokens in (1, 1000):
            plan(config, recipe, ON_4090, tokens)
    assert len(counted) == 1
    plan(config, Recipe(overrides={"layers.0": "int8"}), ON_4090)
    assert len(counted) == 2


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "config.json"
    for layers in (2, 3):
        path.write_text(json.dumps(mixtral_config(layers=layers).to_dict()))
        by_file, by_folder = plan(path, IN_NF4, ON_4090), plan(tmp_path, IN_NF4, ON_4090)
        assert by_file.budget == by_folder.budget
        assert by_file.budget == predict(mixtral_config(layers=layers), IN_NF4, 4096)
        path.unlink()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "mixtral", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "vit"}', "no language model"),
        ('{"model_type": "mixtral", "hidden_size": -4}', "no language model"),
        ('{"model_type": "mixtral", "num_attention_heads": 0}', "strange"),
        ('{"model_type": "mixtral", "vocab_size": -5}', "strange"),
    ],
)
def test_a_config_that_cannot_be_planned_is_named_in_a_sentence(tmp_path, text, said):
    path = tmp_path / "strange.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        plan(path, IN_NF4, ON_4090)
    assert "strange" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        plan(tmp_path, IN_NF4, ON_4090)


def test_the_table_has_a_row_for_each_model_and_machine():
    machines = [ON_4090, Machine(CARDS["T4"], 2), Machine()]
    table = plans_table(["Mixtral-8x7B", "OLMoE-1B-7B"], IN_NF4, machines, 2048)
    assert table[["model", "machine"]].values.tolist() == [
        [model, machine.name] for model in ("Mixtral-8x7B", "OLMoE-1B-7B") for machine in machines
    ]
    made = plan("Mixtral-8x7B", IN_NF4, machines[1], 2048)
    row = table.iloc[1]
    assert row.needed_gib == made.bytes_needed / GIB
    assert row.available_gib == made.bytes_available / GIB
    assert (row.longest_context, row.verdict) == (made.longest_context_tokens, made.verdict)
    everywhere = plans_table(PUBLISHED, IN_NF4)
    assert len(everywhere) == len(PUBLISHED) * len(CARDS)


# ---------------------------------------------------------------------- what loading really took


RECIPES = {
    "nf4": Recipe(attention="nf4"),
    "int8": Recipe(experts="int8", attention="int8"),
    "bf16": Recipe(experts="bf16"),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Mixtral of 52 million parameters in the published layout, 100 MiB."""
    config = mixtral_config(hidden=1024, ffn=896, layers=2, experts=8, vocab=1024)
    return write_mixtral(tmp_path_factory.mktemp("wide"), config, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", RECIPES)
@pytest.mark.parametrize("source", ["standin", "wide"])
def test_what_is_planned_is_what_loading_stores(source, format, request):
    folder = standin.PATH if source == "standin" else request.getfixturevalue("wide")
    covered = coverage(load(folder, RECIPES[format], device_map="cpu"))
    made = plan(folder, RECIPES[format], Machine())
    assert made.budget.weights_bytes == pytest.approx(covered.total_bytes, rel=0.005)
    for component, size in covered.by_component().items():
        assert made.budget.by_component[component] == pytest.approx(size, rel=0.005), component
    assert made.bytes_needed == made.budget.weights_bytes + sum(
        made.budget.by_component[name] for name in ("kv_cache", "activations")
    )
    config = load(folder, device_map="cpu").config
    assert made.budget.by_component["activations"] == activation_bytes(config, 4096)


def test_a_family_with_transposed_experts_loads_as_planned(tmp_path):
    config = Llama4TextConfig(
        hidden_size=128,
        intermediate_size=96,
        intermediate_size_mlp=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        pad_token_id=0,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        architectures=["Llama4ForCausalLM"],
    )
    folder = write_any(tmp_path / "llama4", config, seed=0)
    recipe = Recipe(experts="bf16", attention="nf4", dense_mlp="int8")
    covered = coverage(load(folder, recipe, device_map="cpu"))
    assert covered.by_component() == predict(folder, recipe).by_component
