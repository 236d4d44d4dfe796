# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Retrieval tasks after RULER (Hsieh et al., arXiv 2404.06654): prompts of any length, made by code, and their score.

All of RULER's synthetic tasks but question answering, which needs data sets. Templates, answer prefixes, tokens to
generate and the settings of each task are those of github.com/NVIDIA/RULER at commit c3f5e3b, word for word: of its
files scripts/data/synthetic/constants.py and scripts/synthetic.yaml. The code is our own and departs from RULER's
where it says so here:

- Essays are the help texts of Python, `pydoc_data.topics`, which everyone has; they change a little from one Python
  to the next. RULER takes essays by Paul Graham, which we may not ship; pass them, or any text, as `haystack`. A
  sentence ends with a word that ends in `.`, `!` or `?`; RULER asks nltk.
- Adjectives and nouns are our own lists, not those of the package wonderwords. Lists of common words take single
  words while there are enough for the length, and otherwise adjective-noun pairs for all their words; RULER then
  takes words from a list of English.
- Keys, values and variables of a prompt all differ. RULER draws each by itself, so that a distractor may, rarely,
  have the key that is asked for. The worked example of `cwe` shares no word with the list.
- Every sample has random numbers of its own, and as much haystack as fits in it; RULER finds one amount for all
  samples and shuffles all of them alike. Special tokens of the tokenizer count; RULER leaves them out.
- RULER's shortest length is 4096. Below 2000 the worked example of `vt` takes at most a quarter of the length; RULER
  gives it 500 tokens.
"""

import itertools
import math
import random
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .ruler_words import ADJECTIVES, NOUNS

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Where needles may lie in an essay, in percent of its sentences.
DEPTHS = [round(100 * n / 39) for n in range(40)]
# Adjective-noun pairs would run out not far above this.
LONGEST = 2**20
# From here on lists of common words are RULER's long ones.
LONG_LISTS = 4096
# The most that the worked example of `vt` takes, in tokens, and the words in that of a long list.
EXAMPLE_TOKENS, EXAMPLE_WORDS = 500, 40
# The single words of lists; pairs of them name needles.
WORDS = [*ADJECTIVES, *NOUNS]


class Sample(NamedTuple):
    """A prompt, which ends with its answer prefix, and the answers to it."""

    prompt: str
    answers: tuple[str, ...]
    answer_prefix: str


class Draft(NamedTuple):
    """A sample whose length is still open.

    Attributes:
        prompt: the prompt with so many pieces of haystack: words, lines or the size of a list.
        least: pieces that it must have at least.
        answers: the answers.
        answer_prefix: the end of the prompt.
    """

    prompt: Callable[[int], str]
    least: int
    answers: tuple[str, ...]
    answer_prefix: str


class Request(NamedTuple):
    """What a draft is made for: tokens of prompt and answer together, a way to count them, and the essay's words."""

    task: "Task"
    rng: random.Random
    length: int
    count_tokens: Callable[[str], int]
    essay: Sequence[str]


class Task(NamedTuple):
    """One of RULER's tasks.

    Attributes:
        draft: makes a draft for a request.
        settings: its keyword arguments, named as in RULER's synthetic.yaml.
        max_new_tokens: tokens to generate.
        template: the prompt up to the answer prefix.
        answer_prefix: the end of the prompt.
    """

    draft: Callable[..., Draft]
    settings: dict[str, Any]
    max_new_tokens: int
    template: str
    answer_prefix: str


class Drawn:
    """The first strings of an endless source, drawn when they are first needed."""

    def __init__(self, source: Iterator[str]) -> None:
        self.source = source
        self.strings: list[str] = []

    def first(self, n: int) -> list[str]:
        """The first `n` strings, the same ones in every call."""
        self.strings.extend(itertools.islice(self.source, max(0, n - len(self.strings))))
        return self.strings[:n]


def distinct(draw: Callable[[], str]) -> Iterator[str]:
    """What `draw` returns, without what it returned before."""
    seen = set()
    while True:
        drawn = draw()
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def random_letters(rng: random.Random, alphabet: str, count: int) -> Iterator[str]:
    """Distinct words of `count` random letters."""
    return distinct(lambda: "".join(rng.choices(alphabet, k=count)))


def random_strings(rng: random.Random, kind: str) -> Iterator[str]:
    """Distinct keys or values: `words` (adjective-noun), `numbers` of 7 digits or `uuids` of version 4."""
    draws: dict[str, Callable[[], str]] = {
        "words": lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
        "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    return distinct(draws[kind])


def shuffled(items: Iterable[str], seed: float) -> list[str]:
    """The items in a random order, the same one for a seed and a number of items."""
    items = [*items]
    random.Random(seed).shuffle(items)
    return items


def insert_lines(lines: Sequence[str], facts: Sequence[str], fractions: Sequence[float]) -> list[str]:
    """Lines with each fact, in order, in front of a line of its own; `fractions` in 0..1 say where."""
    lines, room = [*lines], len(lines) - len(facts) + 1
    places = [int(fraction * room) + n for n, fraction in enumerate(sorted(fractions))]
    for place, fact in zip(reversed(places), reversed(facts), strict=True):
        lines.insert(place, fact)
    return lines


def insert_sentences(essay: Sequence[str], words: int, facts: Sequence[str], depths: Sequence[int]) -> str:
    """So many words of an essay, repeated where it is shorter, with facts between sentences at depths in percent."""
    text = [*itertools.islice(itertools.cycle(essay), words)]
    ends = [n for n, word in enumerate(text, 1) if word.rstrip("\"')]").endswith((".", "!", "?")) and n < words]
    borders = [0, *ends, words]
    places = [borders[(len(borders) - 1) * depth // 100] for depth in sorted(depths)]
    for place, fact in zip(reversed(places), reversed(facts), strict=True):
        text.insert(place, fact)
    return " ".join(text)


def draft_of(
    request: Request,
    context: Callable[[int], str],
    least: int,
    answers: Iterable[str],
    example: str = "",
    **gaps: str | int,
) -> Draft:
    """The draft with this context, after a worked example; `gaps` fill the template and the answer prefix."""
    template, prefix = request.task.template, request.task.answer_prefix.format(**gaps)
    return Draft(
        lambda pieces: example + template.format(context=context(pieces), **gaps) + prefix,
        least,
        tuple(answers),
        prefix,
    )


def draft_needles(
    request: Request,
    type_haystack: str,
    type_needle_k: str,
    type_needle_v: str,
    num_needle_k: int,
    num_needle_v: int,
    num_needle_q: int,
) -> Draft:
    """Values of keys told in a haystack of `noise`, an `essay` or other needles (`needle`); some keys are asked for.

    A piece of haystack is a word of the essay, or a line.
    """
    rng = request.rng
    keys, values = random_strings(rng, type_needle_k), random_strings(rng, type_needle_v)

    def tell(key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=type_needle_v, key=key, value=value)

    number_of_keys = max(num_needle_k, num_needle_q)
    told = {key: [*itertools.islice(values, num_needle_v)] for key in itertools.islice(keys, number_of_keys)}
    facts = [tell(key, value) for key, key_values in told.items() for value in key_values]
    rng.shuffle(facts)
    queries = rng.sample([*told], num_needle_q)
    depths, fractions = rng.sample(DEPTHS, len(facts)), [rng.random() for _ in facts]
    # Nothing draws from `rng` after this, so a distractor depends on its number alone.
    distractors = Drawn(map(tell, keys, values))

    def context(pieces: int) -> str:
        if type_haystack == "essay":
            return insert_sentences(request.essay, pieces, facts, depths)
        lines = [NOISE] * pieces if type_haystack == "noise" else distractors.first(pieces)
        return "\n".join(insert_lines(lines, facts, fractions))

    kind = type_needle_v
    if num_needle_q * num_needle_v == 1:
        kind = kind.removesuffix("s")
        request = request._replace(task=in_singular(request.task))
    query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
    least = 1 if type_haystack == "essay" else len(facts)
    answers = [value for key in queries for value in told[key]]
    return draft_of(request, context, least, answers, type_needle_v=kind, query=query)


def in_singular(task: Task) -> Task:
    """The task whose wording asks for one answer, by RULER's replacements."""
    template, prefix = task.template, task.answer_prefix
    for several, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template, prefix = template.replace(several, one), prefix.replace(several, one)
    return task._replace(template=template, answer_prefix=prefix)


def draft_chains(request: Request, num_chains: int, num_hops: int) -> Draft:
    """Variables assigned to each other in noise, after a worked example of shorter names. A piece is a line."""
    of_example = chains_in_noise(request, num_chains, num_hops, name_length=3)
    room = min(EXAMPLE_TOKENS, request.length // 4)
    lines = most_that_fit(lambda n: request.count_tokens(of_example.prompt(n)), room, of_example.least)
    example = of_example.prompt(lines or of_example.least) + " " + " ".join(of_example.answers) + "\n\n"
    return chains_in_noise(request, num_chains, num_hops, name_length=5, example=example)


def chains_in_noise(request: Request, num_chains: int, num_hops: int, name_length: int, example: str = "") -> Draft:
    """A draft with chains of `num_hops + 1` variables in noise, which asks for those of the first chain."""
    rng = request.rng
    names, chains = random_letters(rng, string.ascii_uppercase, name_length), []
    values = [rng.randrange(10000, 99999) for _ in range(num_chains)]
    for value in values:
        variables = [*itertools.islice(names, num_hops + 1)]
        hops = [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(variables)]
        chains.append((variables, [f"VAR {variables[0]} = {value}", *hops], [rng.random() for _ in variables]))

    def context(pieces: int) -> str:
        lines = [NOISE] * pieces
        for _, facts, fractions in chains:
            lines = insert_lines(lines, facts, fractions)
        return "\n".join(lines)

    return draft_of(request, context, num_hops + 1, chains[0][0], example, query=values[0], num_v=num_hops + 1)


def draft_common_words(request: Request, freq_cw: int, freq_ucw: int, num_cw: int) -> Draft:
    """A numbered list of words, some of them common, after a worked example. A piece is another word of the list."""
    rng = request.rng
    single = common_words(request, iter(rng.sample(WORDS, len(WORDS))), freq_cw, freq_ucw, num_cw)
    longest = request.count_tokens(single.prompt(len(WORDS) - EXAMPLE_WORDS)) + request.task.max_new_tokens
    if longest > request.length:
        return single
    return common_words(request, random_strings(rng, "words"), freq_cw, freq_ucw, num_cw)


def common_words(request: Request, source: Iterator[str], freq_cw: int, freq_ucw: int, num_cw: int) -> Draft:
    """The draft that takes its words, and before them those of its example, from a source of distinct words."""
    example_words, example_repeats, repeats = EXAMPLE_WORDS, (10, 3), (freq_cw, freq_ucw)
    if request.length < LONG_LISTS:
        example_words, example_repeats, repeats = 20, (3, 1), (6, 1)
    seed, words = request.rng.random(), Drawn(source)

    def numbered(items: Iterable[str]) -> str:
        return " ".join(f"{n}. {item}" for n, item in enumerate(items, 1))

    def context(chosen: Sequence[str], repeats: tuple[int, int]) -> str:
        return numbered(shuffled([*chosen[:num_cw]] * repeats[0] + [*chosen[num_cw:]] * repeats[1], seed))

    of_example = words.first(example_words)
    example = draft_of(request, lambda _: context(of_example, example_repeats), 0, of_example[:num_cw])
    return draft_of(
        request,
        lambda pieces: context(words.first(example_words + pieces)[example_words:], repeats),
        num_cw + 1,
        words.first(example_words + num_cw)[example_words:],
        example.prompt(0) + " " + numbered(example.answers) + "\n",
    )


def draft_frequent_words(request: Request, alpha: float) -> Draft:
    """Coded words as frequent as a zeta distribution of `alpha` has it. A piece is a word, before rounding down."""
    rng = request.rng
    # The shortest text repeats six words, so that its length does not depend on the length that was asked for.
    size = max(6, (request.length - request.task.max_new_tokens) // 50)
    words = [*itertools.islice(random_letters(rng, string.ascii_lowercase, 6), size)]
    words[0] = "..."  # RULER's noise is the most frequent word
    whole = torch.special.zeta(torch.tensor(alpha, dtype=torch.float64), 1).item()
    shares = [rank**-alpha / whole for rank in range(1, size + 1)]
    seed = rng.random()

    def context(pieces: int) -> str:
        repeated = [[word] * int(pieces * share) for word, share in zip(words, shares, strict=True)]
        return " ".join(shuffled(itertools.chain.from_iterable(repeated), seed))

    # So many that the last word of the answer is more frequent than the next, after rounding too.
    least = math.ceil(1 / (shares[3] - shares[4]))
    return draft_of(request, context, least, words[1:4])


def most_that_fit(size: Callable[[int], int], limit: int, least: int) -> int | None:
    """The largest number from `least` whose growing, nearly linear size is within the limit; `None` if there is none.

    It interpolates, so that the expensive large sizes are computed a few times only.
    """
    low, high = least, None
    of_least = of_low = size(least)
    if of_low > limit:
        return None
    of_high, probe, step = 0, least + 8, 0
    while high is None or high - low > 1:
        found, step = size(probe), step + 1
        if found <= limit:
            low, of_low = probe, found
        else:
            high, of_high = probe, found
        if high is None:
            missing = (limit - of_low) * (low - least) // max(1, of_low - of_least)
            probe = min(low + missing + 1, 16 * low)  # the first sizes tell little about far ones
        elif step < 12:
            probe = low + max(1, (limit - of_low) * (high - low) // (of_high - of_low))
            probe = min(probe, max(low + 1, high - 1))
        else:
            probe = (low + high) // 2
    return low


NEEDLES = (
    128,
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)


def needle_task(
    type_haystack: str, type_needle_k: str, type_needle_v: str, keys: int = 1, values: int = 1, queries: int = 1
) -> Task:
    """A task of needles, as one entry of RULER's synthetic.yaml has it."""
    settings: dict[str, Any] = {"type_haystack": type_haystack, "type_needle_k": type_needle_k}
    settings |= {"type_needle_v": type_needle_v, "num_needle_k": keys, "num_needle_v": values}
    return Task(draft_needles, settings | {"num_needle_q": queries}, *NEEDLES)


TASKS = {
    "niah_single_1": needle_task("noise", "words", "numbers"),
    "niah_single_2": needle_task("essay", "words", "numbers"),
    "niah_single_3": needle_task("essay", "words", "uuids"),
    "niah_multikey_1": needle_task("essay", "words", "numbers", keys=4),
    "niah_multikey_2": needle_task("needle", "words", "numbers"),
    "niah_multikey_3": needle_task("needle", "uuids", "uuids"),
    "niah_multivalue": needle_task("essay", "words", "numbers", values=4),
    "niah_multiquery": needle_task("essay", "words", "numbers", queries=4),
    "vt": Task(
        draft_chains,
        {"num_chains": 1, "num_hops": 4},
        30,
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
        "Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned "
        "the value {query}, they are: ",
    ),
    "cwe": Task(
        draft_common_words,
        {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10},
        120,
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": Task(
        draft_frequent_words,
        {"alpha": 2.0},
        50,
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
}


def make_samples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
    haystack: str | None = None,
) -> list[Sample]:
    """Makes prompts that are, with the tokens to generate, as long as `length` allows and no longer.

    One more word of the essay, line of noise or needles, or word of a list would be too long.

    Args:
        task: a name of `TASKS`.
        tokenizer: counts the tokens of a prompt, special tokens included.
        length: tokens of prompt and answer together, `TASKS[task].max_new_tokens` of them for the answer.
        count: number of samples; the first ones do not depend on it.
        seed: seed of all that is random in them.
        haystack: text for the tasks whose haystack is an essay, which starts anew where it is too short; Python's
            help texts if `None`. Other tasks do not use it.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a task without that name, a `length` too short for the task (the error says how long it must
            be) or longer than 1,048,576, a `count` below 1, a haystack without a word, and a tokenizer that finds no
            more tokens in a longer text.
    """
    definition = task_named(task)
    check_arguments(tokenizer, length, count, seed, haystack)
    essay = (help_texts() if haystack is None else haystack).split()
    room = length - definition.max_new_tokens

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    def draft(number: int) -> Draft:
        rng = random.Random(f"{task} {seed} {number}")
        return definition.draft(Request(definition, rng, length, count_tokens, essay), **definition.settings)

    def sample(drafted: Draft) -> Sample:
        pieces = most_that_fit(lambda n: count_tokens(drafted.prompt(n)), room, drafted.least)
        if pieces is None:
            shortest = max(count_tokens(x.prompt(x.least)) for x in map(draft, range(count)))
            raise ValueError(
                f"`length` must be at least {shortest + definition.max_new_tokens} for {count} samples of the task "
                f"{task!r} with this tokenizer, got {length}."
            )
        return Sample(drafted.prompt(pieces), drafted.answers, drafted.answer_prefix)

    return [sample(draft(number)) for number in range(count)]


def check_arguments(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, haystack: str | None
) -> None:
    """Refuses arguments of `make_samples`, as it says."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a tokenizer of Transformers, got {type(tokenizer).__name__}.")
    if len(tokenizer(f"{NOISE} {NOISE}")["input_ids"]) <= len(tokenizer(NOISE)["input_ids"]):
        raise ValueError(f"`tokenizer` must find more tokens in a longer text, got as many for two of {NOISE!r}.")
    for name, value in {"length": length, "count": count, "seed": seed}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not 1 <= length <= LONGEST:
        raise ValueError(f"`length` must be 1 to {LONGEST}, got {length}.")
    if count < 1:
        raise ValueError(f"`count` must be 1 or more, got {count}.")
    if not isinstance(haystack, str | None):
        raise TypeError(f"`haystack` must be a string or None, got {type(haystack).__name__}.")
    if haystack is not None and not haystack.split():
        raise ValueError(f"`haystack` must have a word, got {haystack!r}.")


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """The fraction of the answers that the prediction contains, upper and lower case alike, 0 to 1.

    RULER's `string_match_all`, its score of all these tasks; `string_match_part` is for question answering alone.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a task without that name, and without an answer.
    """
    task_named(task)
    if not isinstance(prediction, str):
        raise TypeError(f"`prediction` must be a string, got {type(prediction).__name__}.")
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"`answers` must be a sequence of strings, got {answers!r}.")
    if not answers:
        raise ValueError("`answers` must have at least one answer, got none.")
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def task_named(name: str) -> Task:
    """The task of a name, or an error that lists them all."""
    if not isinstance(name, str):
        raise TypeError(f"`task` must be a string, got {type(name).__name__}.")
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {name!r}.")
    return TASKS[name]


@cache
def help_texts() -> str:
    """Python's help texts, in the order of their names."""
    return " ".join(topics[name] for name in sorted(topics))
