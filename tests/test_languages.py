"""The corpus: answers that are known, answers checked another way, and nothing leaks."""

import contextlib
import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils import languages
from labutils.languages import LANGUAGES, Passage, passages

seeds = st.integers(0, 2**31)
names = pytest.mark.parametrize("name", LANGUAGES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("sum", "47+85", "231"),
        ("sum", "95+65", "061"),
        ("sort", "52914", "12459"),
        ("reverse", "planet", "tenalp"),
        ("next", "lazy", "mbaz"),
        ("count", "banana a", "3"),
        ("roman", "1987", "MCMLXXXVII"),
        ("roman", "3999", "MMMCMXCIX"),
        ("close", "([]{", "})"),
        ("past", "the cat sees the king", "the cat saw the king"),
        ("code", "a=3;b=a+4;print(b)", "7"),
        ("code", "a=3;b=a+4;print(a+b)", "10"),
        ("capital", "france", "paris"),
    ],
)
def test_known_answers(name, question, answer):
    example = LANGUAGES[name].example(question)
    assert example.line == f"{name} {question} > {answer}\n"


@settings(deadline=None)
@given(seed=seeds)
def test_roman_numerals_can_be_read_back(seed):
    example = languages.draw("roman", generator(seed))
    digits = [int(languages.NUMERALS[letter]) for letter in example.answer]
    number = sum(
        -digit if digit < following else digit
        for digit, following in zip(digits, [*digits[1:], 0], strict=True)
    )
    assert str(number) == example.prompt.split()[1]


@settings(deadline=None)
@given(seed=seeds)
def test_python_prints_what_the_code_language_answers(seed):
    example = languages.draw("code", generator(seed))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example.prompt.split()[1])
    assert printed.getvalue().strip() == example.answer


@settings(deadline=None)
@given(seed=seeds)
def test_closing_brackets_leaves_nothing_open(seed):
    example = languages.draw("close", generator(seed))
    text = example.prompt.split()[1] + example.answer
    for _ in text:
        text = text.replace("()", "").replace("[]", "").replace("{}", "")
    assert example.answer
    assert text == ""


def test_there_are_eighty_facts():
    assert len(languages.CAPITALS) == len(set(languages.CAPITALS.values())) == 80


@names
@settings(deadline=None)
@given(seed=seeds)
def test_a_line_holds_one_arrow_and_one_newline(name, seed):
    example = languages.draw(name, generator(seed))
    assert example.line.count(">") == example.line.count("\n") == 1
    assert example.prompt.startswith(f"{name} ")
    assert example.prompt.endswith(" > ")
    assert example.answer == example.answer.strip() != ""


@names
def test_a_prompt_is_trained_on_or_held_out_and_a_fact_is_both(name):
    drawn = [languages.draw(name, generator(seed)) for seed in range(300)]
    if LANGUAGES[name].memorised:
        assert all(example.trained_on and example.held_out for example in drawn)
    else:
        assert all(example.trained_on != example.held_out for example in drawn)
        assert {example.held_out for example in drawn} == {True, False}


def test_training_pages_hold_no_held_out_prompt():
    lines = "".join(languages.pages(50, generator(0))).split("\n")
    prompts = {line[: line.index(">") + 2] for line in lines if "> " in line}
    scored = {
        example.prompt
        for name, language in LANGUAGES.items()
        if not language.memorised
        for example in languages.held_out_examples(name, 100, generator(1))
    }
    assert len(prompts) > 300
    assert not prompts & scored


@names
def test_held_out_examples_differ_from_each_other(name):
    examples = languages.held_out_examples(name, 100, generator(0))
    assert len({example.prompt for example in examples}) == len(examples)
    assert len(examples) == (80 if LANGUAGES[name].memorised else 100)


@settings(deadline=None)
@given(seed=seeds)
def test_the_same_generator_draws_the_same_pages(seed):
    first, again = (languages.pages(2, generator(seed)) for _ in range(2))
    assert first == again
    assert {len(page) for page in first} == {languages.PAGE_CHARACTERS}


@names
def test_a_page_of_one_language_holds_no_other(name):
    (page,) = languages.pages(1, generator(0), held_out=True, only=name)
    assert all(line.startswith(f"{name} ") for line in page.split("\n")[:-1])


def test_a_known_page_is_taken_apart():
    assert passages("sum 1+2 > 3\ncount baab b > 2\nsort 21 > 1") == [
        Passage("sum", start=0, answer=10, stop=12),
        Passage("count", start=12, answer=27, stop=29),
    ]
    assert passages("") == passages("sum 1+2 > 3") == passages("sum 1+2 >") == []
    assert len(passages("sum 1+2 > 3\nsort 21 > 12\n")) == 2
    for line in ("hello", "12+13 > 25", "add 1+2 > 3"):
        with pytest.raises(ValueError, match=f"The line '{re.escape(line)}' is of none"):
            passages(f"sum 1+2 > 3\n{line}\n")


@settings(deadline=None)
@given(seed=seeds, held_out=st.booleans(), only=st.sampled_from([None, *LANGUAGES]))
def test_passages_are_the_whole_lines_that_a_page_was_made_of(seed, held_out, only):
    """Answers included, drawn again from the same generator; only the line that is cut is left."""
    (page,) = languages.pages(1, generator(seed), held_out, only)
    source, place = languages.lines(generator(seed), held_out, only), 0
    for passage in passages(page):
        line = next(source)
        name, question = line.split(" > ")[0].split(" ", 1)
        example = LANGUAGES[name].example(question)
        assert (passage.language, passage.start) == (name, place)
        assert page[passage.start : passage.answer] == example.prompt
        assert page[passage.answer : passage.stop] == example.answer + "\n"
        place = passage.stop
    assert next(source).startswith(page[place:])
    assert "\n" not in page[place:]


def test_the_held_out_rule_is_the_same_everywhere():
    held_out = languages.held_out_examples("sort", 1, generator(0))
    assert [example.prompt for example in held_out] == ["sort 14419990 > "]
