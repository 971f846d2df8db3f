"""Ten small languages whose answers can be checked: the stand-in's corpus, as a program.

A language model is easiest to judge where every question has exactly one right answer. Each
language here asks and answers in one line::

    sort 52914 > 12459
    roman 1987 > MCMLXXXVII
    capital france > paris

What stands before the answer (name, question, arrow, space) is the *prompt*. The answer comes
from a short function of the question, which is also the definition of the language. So the
corpus needs no download and never runs out, and a score is a count of answers that are exactly
right.

A *page* is what the model reads: lines of all languages, one after the other, cut after 255
characters. With the token that begins a text this makes 256.

Held out means: a prompt whose CRC-32 is divisible by ten is never trained on and is what the
model is scored with. The rule looks at the characters alone, so it is the same on every machine.
What is new in a held-out prompt is, in

- `sum`: the pair of numbers; every number was seen in other pairs.
- `sort`: the string of digits.
- `reverse`, `next`: the word, which is a random string of letters.
- `count`: the word together with the letter.
- `roman`: the number; nine in ten of 1 to 3999 were seen.
- `close`: the string of brackets.
- `past`: the sentence; each of its words was seen in other sentences.
- `code`: the program; its arithmetic was seen under other variable names.
- `capital`: nothing. A fact cannot be worked out, so every one is trained on and what is
  scored is recall.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
PAGE_CHARACTERS = 255
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def _pairs(text: str) -> dict[str, str]:
    """Pairs as one would type them: `a:b c:d`."""
    return dict(pair.split(":") for pair in text.split())


NUMERALS = _pairs("M:1000 CM:900 D:500 CD:400 C:100 XC:90 L:50 XL:40 X:10 IX:9 V:5 IV:4 I:1")
NOUNS = "baby bird cat child cook dog farmer fox girl horse king mouse pilot queen robot wolf"
PAST = _pairs("""
    asks:asked bites:bit calls:called catches:caught chases:chased draws:drew feeds:fed finds:found
    follows:followed forgets:forgot helps:helped hides:hid holds:held kisses:kissed knows:knew
    leaves:left likes:liked loses:lost meets:met paints:painted sees:saw teaches:taught
    visits:visited watches:watched
    """)
CAPITALS = _pairs("""
    albania:tirana algeria:algiers angola:luanda armenia:yerevan australia:canberra austria:vienna
    azerbaijan:baku bahrain:manama bangladesh:dhaka belarus:minsk belgium:brussels bhutan:thimphu
    botswana:gaborone bulgaria:sofia cambodia:phnom-penh cameroon:yaounde canada:ottawa
    chad:ndjamena chile:santiago china:beijing colombia:bogota croatia:zagreb cuba:havana
    cyprus:nicosia czechia:prague denmark:copenhagen ecuador:quito egypt:cairo eritrea:asmara
    estonia:tallinn ethiopia:addis-ababa fiji:suva finland:helsinki france:paris gabon:libreville
    georgia:tbilisi germany:berlin ghana:accra greece:athens guinea:conakry hungary:budapest
    iceland:reykjavik india:new-delhi indonesia:jakarta iran:tehran iraq:baghdad ireland:dublin
    italy:rome jamaica:kingston japan:tokyo jordan:amman kenya:nairobi laos:vientiane latvia:riga
    lebanon:beirut libya:tripoli lithuania:vilnius mali:bamako malta:valletta mexico:mexico-city
    mongolia:ulaanbaatar morocco:rabat nepal:kathmandu norway:oslo oman:muscat peru:lima
    poland:warsaw portugal:lisbon qatar:doha romania:bucharest rwanda:kigali senegal:dakar
    serbia:belgrade slovakia:bratislava spain:madrid sudan:khartoum sweden:stockholm turkey:ankara
    ukraine:kyiv vietnam:hanoi
    """)


@dataclass(frozen=True)
class Example:
    """One line of one language, `prompt + answer`; a newline ends it in a page."""

    language: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether this prompt is scored rather than trained on (facts are both)."""
        return LANGUAGES[self.language].memorised or _is_held_out(self.prompt)

    @property
    def trained_on(self) -> bool:
        return LANGUAGES[self.language].memorised or not _is_held_out(self.prompt)

    @property
    def line(self) -> str:
        return self.prompt + self.answer + "\n"


@dataclass(frozen=True)
class Passage:
    """Where a whole line stands on a page: its first character, its answer's, and its end's.

    `page[start:answer]` is the prompt, `page[answer:stop]` the answer with its newline.
    """

    language: str
    start: int
    answer: int
    stop: int


@dataclass(frozen=True)
class Score:
    """How many of the examples of one language were answered exactly right."""

    examples: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples


@dataclass(frozen=True)
class Language:
    """How to ask, and the one right answer.

    `question` draws a question from a generator, `answer` answers any such question, and
    `weight` is how many times as often as the plainest language it is drawn for a page.

    >>> LANGUAGES["sum"].answer("47+85")
    '231'
    """

    name: str
    description: str
    question: Callable[[torch.Generator], str]
    answer: Callable[[str], str]
    weight: int = 1
    memorised: bool = False

    def example(self, question: str) -> Example:
        return Example(self.name, f"{self.name} {question} > ", self.answer(question))


def draw(language: str, generator: torch.Generator) -> Example:
    """One example of a language, held out or not."""
    chosen = LANGUAGES[language]
    return chosen.example(chosen.question(generator))


def held_out_examples(language: str, count: int, generator: torch.Generator) -> list[Example]:
    """`count` different held-out examples, or all that a small language has (capital: 80).

    >>> [example.line for example in held_out_examples("sort", 1, torch.Generator().manual_seed(0))]
    ['sort 14419990 > 01144999\\n']
    """
    found = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        example = draw(language, generator)
        if example.held_out:
            found[example.prompt] = example
    return list(found.values())


def lines(
    generator: torch.Generator, held_out: bool = False, only: str | None = None
) -> Iterator[str]:
    """Lines without end, all trained on or all held out: of every language by weight, or of one."""
    names = [name for name, language in LANGUAGES.items() for _ in range(language.weight)]
    while True:
        example = draw(only or names[_below(len(names), generator)], generator)
        if example.held_out if held_out else example.trained_on:
            yield example.line


def pages(
    count: int, generator: torch.Generator, held_out: bool = False, only: str | None = None
) -> list[str]:
    """`count` strings of exactly 255 characters: whole lines, the last one cut where it is."""
    source = lines(generator, held_out, only)
    drawn = []
    for _ in range(count):
        page = ""
        while len(page) < PAGE_CHARACTERS:
            page += next(source)
        drawn.append(page[:PAGE_CHARACTERS])
    return drawn


def passages(page: str) -> list[Passage]:
    """The whole lines of a page; the one that is cut at its end is left out.

    Raises ValueError for a line that is not of the form `language prompt > answer`.

    >>> passages("sum 1+2 > 3\\nsort 21 > 12\\nsum 4")[1]
    Passage(language='sort', start=12, answer=22, stop=25)
    """
    found, start = [], 0
    for line in page.splitlines(keepends=True):
        stop = start + len(line)
        if line.endswith("\n"):
            if " > " not in line or line.split(" ", 1)[0] not in LANGUAGES:
                raise ValueError(
                    f"The line {line.rstrip()!r} is of none of the languages; write it like "
                    "'sum 1+2 > 3'."
                )
            answer = start + line.index(" > ") + len(" > ")
            found.append(Passage(line.split(" ", 1)[0], start, answer, stop))
        start = stop
    return found


def greedy_answers(model, tokenizer, examples: list[Example]) -> list[str]:
    """What a causal language model answers to each prompt, choosing the likeliest token each time.

    `model` and `tokenizer` are any causal model of transformers and its tokenizer. Prompts of
    different lengths are padded on the left, where the attention mask hides the padding, so that
    every answer begins in the same column. An answer ends at the newline.
    """
    prompts = [tokenizer(example.prompt)["input_ids"] for example in examples]
    longest_answer = max(len(tokenizer(example.answer)["input_ids"]) for example in examples)
    width = max(map(len, prompts))
    padding = tokenizer.pad_token_id or 0
    token_ids = torch.tensor([[padding] * (width - len(ids)) + ids for ids in prompts])
    visible = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    generated = model.generate(
        input_ids=token_ids.to(model.device),
        attention_mask=visible.to(model.device),
        max_new_tokens=longest_answer + 1,
        do_sample=False,
        pad_token_id=padding,
    )
    texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]


def score(
    model, tokenizer, examples_per_language: int, generator: torch.Generator
) -> dict[str, Score]:
    """For each language, how many held-out examples the model answers exactly right."""
    scores = {}
    for name in LANGUAGES:
        examples = held_out_examples(name, examples_per_language, generator)
        answers = greedy_answers(model, tokenizer, examples)
        pairs = zip(answers, examples, strict=True)
        scores[name] = Score(len(examples), sum(seen == needed.answer for seen, needed in pairs))
    return scores


def _is_held_out(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % 10 == 0


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


def _letters(
    shortest: int, longest: int, generator: torch.Generator, alphabet: str = LETTERS
) -> str:
    length = shortest + _below(longest - shortest + 1, generator)
    drawn = torch.randint(len(alphabet), (length,), generator=generator).tolist()
    return "".join(alphabet[letter] for letter in drawn)


def _ask_sum(generator: torch.Generator) -> str:
    return f"{_below(100, generator)}+{_below(100, generator)}"


def _answer_sum(question: str) -> str:
    return str(sum(int(number) for number in question.split("+")))[::-1]


def _ask_sort(generator: torch.Generator) -> str:
    return _letters(3, 8, generator, DIGITS)


def _answer_sort(question: str) -> str:
    return "".join(sorted(question))


def _ask_word(generator: torch.Generator) -> str:
    return _letters(3, 8, generator)


def _answer_reverse(question: str) -> str:
    return question[::-1]


def _answer_next(question: str) -> str:
    return question.translate(str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0]))


def _ask_count(generator: torch.Generator) -> str:
    few = _letters(3, 3, generator)
    return f"{_letters(3, 8, generator, few)} {few[0]}"


def _answer_count(question: str) -> str:
    word, letter = question.split()
    return str(word.count(letter))


def _ask_roman(generator: torch.Generator) -> str:
    return str(1 + _below(3999, generator))


def _answer_roman(question: str) -> str:
    left, answer = int(question), ""
    for numeral, value in NUMERALS.items():
        answer += numeral * (left // int(value))
        left %= int(value)
    return answer


def _ask_close(generator: torch.Generator) -> str:
    question, still_open = "", ""
    while not still_open or (len(question) < 9 and _below(6, generator)):
        if still_open and _below(3, generator) == 0:
            question += BRACKETS[still_open[-1]]
            still_open = still_open[:-1]
        else:
            bracket = _letters(1, 1, generator, "([{")
            question += bracket
            still_open += bracket
    return question


def _answer_close(question: str) -> str:
    still_open: list[str] = []
    for bracket in question:
        if bracket in BRACKETS:
            still_open.append(bracket)
        else:
            still_open.pop()
    return "".join(BRACKETS[bracket] for bracket in reversed(still_open))


def _ask_past(generator: torch.Generator) -> str:
    subject, whom, verb = (
        words[_below(len(words), generator)] for words in (NOUNS.split(), NOUNS.split(), list(PAST))
    )
    return f"the {subject} {verb} the {whom}"


def _answer_past(question: str) -> str:
    return " ".join(PAST.get(word, word) for word in question.split())


def _ask_code(generator: torch.Generator) -> str:
    first, second = (LETTERS[index] for index in torch.randperm(26, generator=generator)[:2])
    shown = (first, second, f"{first}+{second}")[_below(3, generator)]
    start, step = _below(10, generator), _below(10, generator)
    return f"{first}={start};{second}={first}+{step};print({shown})"


def _answer_code(question: str) -> str:
    start, step, shown = question.split(";")
    first = int(start[2:])
    second = first + int(step[4:])
    values = {start[0]: first, step[0]: second}
    return str(sum(values[name] for name in shown[len("print(") : -1].split("+")))


def _ask_capital(generator: torch.Generator) -> str:
    return list(CAPITALS)[_below(len(CAPITALS), generator)]


LANGUAGES: dict[str, Language] = {
    language.name: language
    for language in (
        Language(
            "sum",
            "the sum of two numbers below 100, its digits written units first (47+85 > 231), "
            "in the order in which one adds and carries",
            _ask_sum,
            _answer_sum,
            weight=3,
        ),
        Language("sort", "three to eight digits in ascending order", _ask_sort, _answer_sort),
        Language("reverse", "a word read backwards", _ask_word, _answer_reverse),
        Language("next", "each letter's successor, a after z", _ask_word, _answer_next),
        Language("count", "how often a letter occurs in a word", _ask_count, _answer_count),
        Language("roman", "a number up to 3999 in roman numerals", _ask_roman, _answer_roman),
        Language("close", "the brackets that close what is open", _ask_close, _answer_close),
        Language("past", "a sentence put into the past tense", _ask_past, _answer_past),
        Language(
            "code",
            "what a Python program of two assignments prints",
            _ask_code,
            _answer_code,
            weight=2,
        ),
        Language(
            "capital",
            "the capitals of 80 countries, by heart",
            _ask_capital,
            CAPITALS.__getitem__,
            memorised=True,
        ),
    )
}
