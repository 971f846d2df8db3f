"""The measures: known values, transformers' own loss, and what padding must not change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from labutils import languages, standin
from labutils.evaluate import (
    Answer,
    CrossEntropy,
    Exam,
    Interval,
    bootstrap,
    cross_entropy,
    exam,
    kl,
    kl_by_token,
    mean_intervals,
    nats_by_token,
    right_answers,
    task_accuracy,
)
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


@pytest.mark.parametrize("change", [1e-6, 1e-4, 1e-2])
def test_the_divergence_of_each_token_is_never_negative_and_exact_where_it_is_small(change):
    """To second order it is half the variance of the change; in float32 it would drown below 1e-7.

    The logits are halves and quarters, so that they take up the change without rounding it.
    """
    drawn = torch.randint(-8, 9, (2, 500, 64), generator=torch.Generator().manual_seed(0))
    logits, noise = drawn.double() / 4
    p = logits.softmax(dim=-1)
    variance = (p * noise**2).sum(dim=-1) - (p * noise).sum(dim=-1) ** 2
    found = kl_by_token(logits, logits + change * noise)
    assert found.shape == (500,)
    torch.testing.assert_close(found, change**2 * variance / 2, rtol=max(0.01, 10 * change), atol=0)
    assert (kl_by_token(logits.float(), (logits + change * noise).float()) >= 0).all()
    assert kl(logits, logits + change * noise) == pytest.approx(found.mean().item())


def test_divergence_is_by_token_and_leaves_out_what_cannot_be():
    never = torch.tensor([0.0, 0.0, -math.inf])
    reference = torch.stack([never, torch.zeros(3)]).expand(4, 2, 3)
    found = kl_by_token(reference, torch.zeros(4, 2, 3))
    assert found.shape == (4, 2)
    assert found[0].tolist() == pytest.approx([math.log(3 / 2), 0])
    assert (kl_by_token(reference, reference) == 0).all()


# -------------------------------------------------------------------------------------- the exam


def page_by_page(count: int = 6) -> list[str]:
    return languages.pages(count, torch.Generator().manual_seed(0), held_out=True)


@torch.no_grad()
def read(model, sheet: Exam) -> torch.Tensor:
    return model(input_ids=sheet.token_ids, use_cache=False).logits


def test_the_answers_of_an_exam_are_those_that_stand_on_its_pages(tokenizer):
    pages = page_by_page()
    sheet = exam(tokenizer, pages)
    expected, names = [], []
    for page, text in enumerate(pages):
        place, by_character = 1, [""]  # the first token begins the text and is no character
        for line in text.split("\n")[:-1]:
            first = place + line.index(" > ") + 3
            place += len(line) + 1
            expected.append(Answer(line.split()[0], page, first, place - 1))
            by_character += [line.split()[0]] * (len(line) + 1)
        names.append(by_character + [""] * (256 - len(by_character)))
    assert list(sheet.answers) == expected
    assert sheet.languages.tolist() == names
    assert sheet.token_ids.tolist() == tokenizer(pages)["input_ids"]
    for answer in sheet.answers:
        tokens = sheet.token_ids[answer.page, answer.first : answer.last + 1]
        text = tokenizer.decode(tokens)
        assert text.endswith("\n") and " > " + text in pages[answer.page]


@pytest.mark.parametrize("experts", ["fp32", "int2"])
def test_an_answer_is_right_if_each_of_its_tokens_is_the_likeliest(model, tokenizer, experts):
    """Of the whole model nearly all are, with 2-bit experts some."""
    pages = page_by_page()
    sheet = exam(tokenizer, pages)
    kept = dict.fromkeys(("attention", "router", "embeddings", "lm_head"), "fp32")
    with simulated(model, Recipe(experts=experts, **kept)):
        logits = read(model, sheet)
    likeliest = [tokenizer.convert_ids_to_tokens(row) for row in logits.argmax(dim=-1).tolist()]
    right = []
    for page, text in enumerate(pages):
        place = 0
        for line in text.split("\n")[:-1]:
            answer = line.split(" > ")[1] + "\n"
            place += len(line) + 1
            # After the k-th character stands the token k, which says what it takes for the next.
            said = likeliest[page][place - len(answer) : place]
            right.append(said == list(answer))
    found = sheet.right(logits)
    assert found.tolist() == right
    assert 0.3 < np.mean(right) < 1
    by_page = [
        sum(r for r, a in zip(right, sheet.answers, strict=True) if a.page == page)
        for page in range(len(pages))
    ]
    assert sheet.by_page(found).tolist() == by_page


def test_on_a_page_of_its_own_an_answer_is_right_as_by_itself(model, tokenizer):
    """The first line of a page has nothing before it, as in `right_answers`."""
    examples = [
        example
        for name in languages.LANGUAGES
        for example in languages.held_out_examples(name, 6, torch.Generator().manual_seed(1))
    ]
    with simulated(model, Recipe("int2")):
        expected = right_answers(model, tokenizer, examples, examples_per_batch=1)
        sheets = [exam(tokenizer, [example.line]) for example in examples]
        found = [sheet.right(read(model, sheet)).tolist() for sheet in sheets]
    assert found == [[right] for right in expected]
    assert 0.3 < np.mean(expected) < 1


def test_one_wrong_token_makes_exactly_its_answer_wrong(tokenizer):
    """Also the first and the last of an answer; what stands before and after it counts nothing."""
    sheet = exam(tokenizer, page_by_page(2))
    perfect = torch.nn.functional.one_hot(sheet.token_ids.roll(-1, dims=1), 64).float()
    assert sheet.right(perfect).all()
    inside = {
        (answer.page, token): number
        for number, answer in enumerate(sheet.answers)
        for token in range(answer.first, answer.last + 1)
    }
    for page in range(2):
        for token in range(1, 256):
            logits = perfect.clone()
            logits[page, token - 1] *= -1
            wrong = (~sheet.right(logits)).nonzero()[0].tolist()
            assert wrong == ([inside[page, token]] if (page, token) in inside else [])


def test_a_page_without_a_whole_line_has_no_answers(tokenizer):
    sheet = exam(tokenizer, ["sum 47+85 > 231", "sort 32 > 23\nsu"])
    assert [answer.page for answer in sheet.answers] == [1]
    none = exam(tokenizer, ["sum 47+85 > 231"])
    assert none.answers == ()
    right = none.right(torch.zeros(1, 16, 64))
    assert right.shape == (0,)
    assert none.by_page(right).tolist() == [0]


def test_pages_of_different_lengths_are_cut_to_the_shortest(tokenizer):
    sheet = exam(tokenizer, ["sum 1+2 > 3\n", "sum 1+2 > 3\nsort 21 > 12\n", "sum 1+2 > 31\n"])
    assert sheet.token_ids.shape == sheet.languages.shape == (3, 13)
    assert [answer.page for answer in sheet.answers] == [0, 1], "the third one's newline is cut"
    assert (sheet.languages[:, 1:] == "sum").all()


@pytest.mark.parametrize("nothing", [[], "sum 1+2 > 3\n"])
def test_no_list_of_pages_is_refused(tokenizer, nothing):
    with pytest.raises(ValueError, match="a list of at least one page"):
        exam(tokenizer, nothing)


def test_answers_to_other_pages_are_refused(tokenizer):
    sheet = exam(tokenizer, page_by_page(2))
    with pytest.raises(ValueError, match=r"\(1, 256\) pages and tokens, the exam has \(2, 256\)"):
        sheet.right(torch.zeros(1, 256, 64))


def test_the_mean_surprise_is_the_cross_entropy(model, tokenizer):
    pages = page_by_page()
    sheet = exam(tokenizer, pages)
    logits = read(model, sheet)
    nats = nats_by_token(logits, sheet.token_ids)
    assert nats.shape == (6, 255)
    expected = cross_entropy(model, tokenizer, pages).nats_per_token
    assert nats.mean().item() == pytest.approx(expected, abs=1e-6)
    p = logits[3, 99].softmax(dim=-1)[sheet.token_ids[3, 100]]
    assert nats[3, 99].item() == pytest.approx(-math.log(p.item()), abs=1e-5)
    assert nats_by_token(logits.to(torch.bfloat16), sheet.token_ids).dtype == torch.float32


# -------------------------------------------------------------------------------------- intervals


def test_many_means_have_the_intervals_that_each_has_by_itself():
    columns = np.random.default_rng(0).normal(size=(12, 5))
    together = mean_intervals(columns)
    for column, interval in zip(columns.T, together, strict=True):
        alone = bootstrap(mean, column)
        assert interval.estimate == pytest.approx(alone.estimate)
        assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high))


def mean(values):
    return values


def difference(before, after):
    return after - before


def ratio(part, whole):
    return part / whole


def resampled(statistic, *samples, draws: int = 2000) -> Interval:
    """The same idea, slowly: draw whole pages, average, and take the middle 95%."""
    drawn = torch.Generator().manual_seed(99)
    means = [torch.as_tensor(sample).double().flatten(1).mean(dim=1) for sample in samples]
    pages = len(means[0])
    found = []
    for _ in range(draws):
        chosen = torch.randint(pages, (pages,), generator=drawn)
        found.append(statistic(*(values[chosen].mean().item() for values in means)))
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(statistic(*(values.mean().item() for values in means)), low, high)


@pytest.mark.parametrize(("statistic", "count"), [(mean, 1), (difference, 2), (ratio, 2)])
def test_an_interval_is_that_of_pages_drawn_one_by_one(statistic, count):
    """Both are drawn 2000 times: their ends lie within some percent of the width.

    Few pages have most of it, so that the interval is lopsided.
    """
    drawn = torch.rand(count, 12, 7, 11, generator=torch.Generator().manual_seed(0))
    samples = list(drawn + torch.logspace(-2, 1, 12)[:, None, None])
    found, expected = bootstrap(statistic, *samples), resampled(statistic, *samples)
    width = expected.high - expected.low
    assert found.estimate == pytest.approx(expected.estimate)
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    assert found.low < found.estimate < found.high


def test_about_95_in_100_intervals_hold_the_truth():
    drawn = torch.Generator().manual_seed(0)
    pages, tokens, experiments = 40, 16, 200
    held = 0
    for _ in range(experiments):
        of_page = torch.randn(pages, 1, generator=drawn)
        sample = 3 + of_page + 0.5 * torch.randn(pages, tokens, generator=drawn)
        interval = bootstrap(mean, sample, generator=drawn)
        held += interval.low <= 3 <= interval.high
    assert 0.89 <= held / experiments <= 0.99


def test_a_difference_of_pairs_is_surer_than_one_of_strangers():
    before, noise = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    before = before + 3 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
    after = before + 0.1 + 0.1 * noise
    pairs = bootstrap(difference, before, after)
    strangers = bootstrap(difference, before, after.flip(0))
    assert pairs.estimate == pytest.approx(strangers.estimate)
    assert pairs.high - pairs.low < 0.2 * (strangers.high - strangers.low)
    assert pairs.low > 0 > strangers.low


def test_what_is_the_same_on_all_pages_is_sure():
    assert bootstrap(mean, torch.full((5, 3), 0.25)) == Interval(0.25, 0.25, 0.25)
    assert bootstrap(difference, torch.ones(5), torch.ones(5)) == Interval(0, 0, 0)
    tenth = bootstrap(mean, np.full(7, 0.1))
    assert [tenth.estimate, tenth.low, tenth.high] == pytest.approx([0.1] * 3, abs=1e-15)


def test_the_same_generator_gives_the_same_interval():
    sample = torch.randn(20, generator=torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(5)
    first, second = (bootstrap(mean, sample, generator=drawn) for _ in range(2))
    assert bootstrap(mean, sample, generator=torch.Generator().manual_seed(5)) == first != second
    assert bootstrap(mean, sample) == bootstrap(mean, sample) != first
    assert first.estimate == second.estimate


def test_samples_are_what_the_measures_give():
    """Tensors, arrays, lists; numbers, flags; some with a row a page, some with one number."""
    flags = torch.rand(12, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = bootstrap(mean, flags.double())
    assert 0 < expected.low < expected.estimate == pytest.approx(flags.double().mean().item())
    for sample in (flags, flags.numpy(), flags.tolist(), flags.float().numpy(), flags.int()):
        assert bootstrap(mean, sample) == expected
    by_page = bootstrap(mean, flags.double().mean(dim=1))
    assert by_page.low == pytest.approx(expected.low)
    assert by_page.high == pytest.approx(expected.high)
    mixed = bootstrap(ratio, flags, flags.numpy().sum(axis=1))
    assert [mixed.estimate, mixed.low, mixed.high] == pytest.approx([1 / 9] * 3)


@pytest.mark.parametrize(
    "samples",
    [(torch.ones(1, 9),), (torch.ones(4), torch.ones(5)), (np.ones(0),), ()],
    ids=["one", "different", "empty", "none"],
)
def test_samples_of_too_few_or_of_different_pages_are_refused(samples):
    with pytest.raises(ValueError, match="give the same pages to all, at least 2"):
        bootstrap(mean, *samples)


def test_an_interval_is_written_as_asked():
    assert f"{Interval(0.25, 0.2, 0.304):.1%}" == "25.0% [20.0%, 30.4%]"
    assert str(Interval(1.0, 0.5, 2.0)) == "1.0 [0.5, 2.0]"
