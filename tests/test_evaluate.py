"""The measures: known values, transformers' own loss, and what padding must not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from labutils import languages, standin
from labutils.evaluate import CrossEntropy, cross_entropy, kl, right_answers, task_accuracy
from labutils.recipes import Recipe, simulated


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(standin.PATH, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return standin.tokenizer()


def test_kl_of_a_published_example():
    reference, changed = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert kl(reference, changed) == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.1438, abs=1e-4)


def test_perplexity_is_the_number_of_equally_likely_choices():
    assert CrossEntropy(math.log(64), tokens=1).perplexity == pytest.approx(64)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tokenizer):
    blank = AutoModelForCausalLM.from_config(standin.config())
    torch.nn.init.zeros_(blank.lm_head.weight)
    assert cross_entropy(blank, tokenizer, ["sum 1+2 > 3"]).perplexity == pytest.approx(64)


def test_cross_entropy_is_transformers_own_loss(model, tokenizer):
    text = languages.pages(1, torch.Generator().manual_seed(0))[0]
    token_ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=token_ids, labels=token_ids).loss.item()
    measured = cross_entropy(model, tokenizer, [text])
    assert measured.nats_per_token == pytest.approx(loss, abs=1e-5)
    assert measured.tokens == len(text)


def test_padding_does_not_change_cross_entropy(model, tokenizer):
    texts = ["sum 1+2 > 3\n", "sort 52914 > 12459\n", languages.pages(1, torch.Generator())[0]]
    alone = [cross_entropy(model, tokenizer, [text]) for text in texts]
    together = cross_entropy(model, tokenizer, texts)
    assert together.tokens == sum(one.tokens for one in alone)
    nats = sum(one.nats_per_token * one.tokens for one in alone)
    assert together.nats_per_token * together.tokens == pytest.approx(nats, rel=1e-5)


def test_left_padding_does_not_change_answers(model, tokenizer):
    examples = [
        languages.held_out_examples(name, 2, torch.Generator().manual_seed(0))[1]
        for name in languages.LANGUAGES
    ]
    together = languages.greedy_answers(model, tokenizer, examples)
    assert together == [
        languages.greedy_answers(model, tokenizer, [example])[0] for example in examples
    ]


def test_task_accuracy_finds_the_recorded_scores(model, tokenizer):
    table = task_accuracy(model, tokenizer, examples_per_language=50)
    assert list(table.index) == list(languages.LANGUAGES)
    assert set(table["examples"]) == {50}
    assert (table["accuracy"] == table["correct"] / table["examples"]).all()
    recorded = standin.scores()["languages"]
    for name, accuracy in table["accuracy"].items():
        share = recorded[name]["correct"] / recorded[name]["examples"]
        assert accuracy == pytest.approx(share, abs=0.2), name


@pytest.mark.parametrize("experts", ["bf16", "int2"])
def test_right_answers_are_those_that_generating_gives(model, tokenizer, experts):
    """Of a whole model nearly all are right, of one with 2-bit experts about seven in ten."""
    generator = torch.Generator().manual_seed(3)
    examples = [
        example
        for name in languages.LANGUAGES
        for example in languages.held_out_examples(name, 12, generator)
    ]
    with simulated(model, Recipe(experts=experts)):
        answers = languages.greedy_answers(model, tokenizer, examples)
        found = right_answers(model, tokenizer, examples)
    generated = [seen == e.answer for seen, e in zip(answers, examples, strict=True)]
    assert found == generated
    assert 0.5 < sum(found) / len(found) < 1


def test_the_recorded_cross_entropy_is_the_default_one(model, tokenizer):
    measured = cross_entropy(model, tokenizer)
    recorded = standin.scores()
    assert measured.tokens == recorded["scored_tokens"]
    assert measured.nats_per_token == pytest.approx(recorded["nats_per_token"], abs=0.005)


def test_text_without_a_second_token_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="0 tokens that follow another"):
        cross_entropy(model, tokenizer, [""])


def test_logits_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)"):
        kl(torch.zeros(3, 4), torch.zeros(2, 4))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-5, 5))
def test_kl_is_never_negative_and_ignores_a_constant(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    reference, changed = torch.randn(2, 3, 5, generator=generator)
    assert kl(reference, reference) == 0
    assert kl(reference, changed) >= 0
    assert kl(reference, reference + shift) == pytest.approx(0, abs=1e-6)
