# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The tasks after RULER are worded, built and scored as published, and their prompts are as long as they may be."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ham_hf.evaluation import ruler
from ham_hf.evaluation.ruler import TASKS, make_samples, most_that_fit, score

CHECKPOINT = Path(__file__).parents[2] / "ham_hf" / "checkpoints" / "ham-tiny"
NEEDLE_TASKS = [name for name in TASKS if name.startswith("niah")]
# scripts/synthetic.yaml of RULER: haystack, kind of key, kind of value; keys, values, queries.
PUBLISHED_NEEDLES = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}
PUBLISHED_OTHERS = {
    "vt": ({"num_chains": 1, "num_hops": 4}, 30),
    "cwe": ({"freq_cw": 30, "freq_ucw": 3, "num_cw": 10}, 120),
    "fwe": ({"alpha": 2.0}, 50),
}
KINDS = {"words": r"[a-z]+-[a-z]+", "numbers": r"[1-9]\d{6}", "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}"}
# Tokens of one more piece, in ham-tiny's tokenizer, with a margin: a line, a long word, three entries of a list.
ONE_MORE = dict.fromkeys(NEEDLE_TASKS, 48) | {"niah_multikey_3": 120, "vt": 36, "cwe": 36, "fwe": 16}
TOO_SHORT = {("vt", 512), ("cwe", 512)}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def told(text):
    """The needles of a text as (kind, key, value)."""
    return re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s)", text)


def assignments(text):
    return dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE))


def entries(text):
    """The words of a numbered list, whose numbers must follow each other."""
    numbered = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in numbered] == [*range(1, len(numbered) + 1)]
    return [word for _, word in numbered]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("12 and 34", ["12", "34", "56", "78"], 0.5),
        (" ABCDE, fghij", ["abcde", "FGHIJ"], 1),
        ("one two", ["three"], 0),
        ("", ["three"], 0),
        ("1234567", ["345"], 1),
        ("a c", ["a", "b", "c"], 2 / 3),
    ],
)
def test_the_score_is_the_share_of_answers_found(prediction, answers, expected):
    assert score("vt", prediction, answers) == pytest.approx(expected)


def test_settings_are_the_published_ones():
    assert TASKS.keys() == PUBLISHED_NEEDLES.keys() | PUBLISHED_OTHERS.keys()
    names = ["type_haystack", "type_needle_k", "type_needle_v", "num_needle_k", "num_needle_v", "num_needle_q"]
    for name, values in PUBLISHED_NEEDLES.items():
        assert TASKS[name].settings == dict(zip(names, values, strict=True))
        assert TASKS[name].max_new_tokens == 128
    for name, (settings, tokens) in PUBLISHED_OTHERS.items():
        assert (TASKS[name].settings, TASKS[name].max_new_tokens) == (settings, tokens)


@pytest.mark.parametrize(
    ("task", "beginning", "end"),
    [
        (
            "niah_single_1",
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the number afterwards.\n",
            "\nWhat is the special magic number for KEY mentioned in the provided text? The special magic number for "
            "KEY mentioned in the provided text is",
        ),
        (
            "niah_multikey_3",
            "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the uuid afterwards.\n",
            "\nWhat is the special magic uuid for KEY mentioned in the provided text? The special magic uuid for KEY "
            "mentioned in the provided text is",
        ),
        (
            "niah_multivalue",
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
            "you about the numbers afterwards.\n",
            "\nWhat are all the special magic numbers for KEY mentioned in the provided text? The special magic "
            "numbers for KEY mentioned in the provided text are",
        ),
        (
            "niah_multiquery",
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
            "you about the numbers afterwards.\n",
            "\nWhat are all the special magic numbers for KEY, KEY, KEY, and KEY mentioned in the provided text? The "
            "special magic numbers for KEY, KEY, KEY, and KEY mentioned in the provided text are",
        ),
        (
            "vt",
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
            "\nQuestion: Find all variables that are assigned the value NUMBER in the text above. Answer: According "
            "to the chain(s) of variable assignment in the text above, 5 variables are assigned the value NUMBER, "
            "they are: ",
        ),
        (
            "cwe",
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.\n1. ",
            "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear "
            "most often in the list are:",
        ),
        (
            "fwe",
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words. ",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
            "most frequently appeared words are:",
        ),
    ],
)
def test_wording_is_the_published_one(task, beginning, end, tokenizer):
    for sample in make_samples(task, tokenizer, 1024, 3):
        pattern = re.escape(end).replace("KEY", r"(?:[a-f0-9-]{36}|[a-z]+-[a-z]+)").replace("NUMBER", r"\d{5}")
        assert sample.prompt.startswith(beginning)
        assert re.search(f"{pattern}$", sample.prompt)
        assert sample.prompt.endswith(sample.answer_prefix)
        assert re.match(r" (The special magic|Answer: )", sample.answer_prefix)


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_they_may_be(task, length, tokenizer):
    if (task, length) in TOO_SHORT:
        with pytest.raises(ValueError, match=rf"`length` must be at least \d+ for 2 samples .* got {length}"):
            make_samples(task, tokenizer, length, 2)
        return
    for sample in make_samples(task, tokenizer, length, 2):
        found = len(tokenizer(sample.prompt).input_ids) + TASKS[task].max_new_tokens
        assert length - ONE_MORE[task] < found <= length


@pytest.mark.parametrize("task", TASKS)
def test_the_least_length_that_is_named_is_enough_and_needed(task, tokenizer):
    with pytest.raises(ValueError, match="must be at least") as error:
        make_samples(task, tokenizer, 100, 2, seed=3)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(make_samples(task, tokenizer, least, 2, seed=3)) == 2
    with pytest.raises(ValueError, match=f"must be at least {least} .* got {least - 1}"):
        make_samples(task, tokenizer, least - 1, 2, seed=3)


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needles_hold_the_answers(task, tokenizer):
    haystack, key_kind, value_kind, keys, values, queries = PUBLISHED_NEEDLES[task]
    for sample in make_samples(task, tokenizer, 1024, 4):
        needles = told(sample.prompt)
        assert {kind for kind, _, _ in needles} == {value_kind}
        number = max(keys, queries) * values
        assert len(needles) == number if haystack != "needle" else len(needles) > 3 * number
        assert all(re.fullmatch(KINDS[key_kind], key) for _, key, _ in needles)
        assert all(re.fullmatch(KINDS[value_kind], value) for _, _, value in needles)
        assert len({key for _, key, _ in needles}) == len(needles) // values, "distractors have other keys"
        assert len({value for _, _, value in needles}) == len(needles)
        asked = re.search(r" for (.*) mentioned in the provided text (?:is|are)$", sample.answer_prefix)[1]
        asked = re.split(r", (?:and )?", asked)
        assert len(asked) == queries
        of_keys = [{value for _, key, value in needles if key == name} for name in asked]
        answers = [set(sample.answers[i : i + values]) for i in range(0, len(sample.answers), values)]
        assert answers == of_keys
        assert len(sample.answers) == values * queries


def test_noise_and_needles_are_lines(tokenizer):
    for task, others in (("niah_single_1", {NOISE}), ("niah_multikey_2", set())):
        sample = make_samples(task, tokenizer, 1024, 1)[0]
        lines = sample.prompt.split("\n")[1:-1]
        assert {line for line in lines if not told(line + "\n")} == others


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multikey_1"])
def test_depths_of_needles_vary(task, tokenizer):
    depths = []
    for sample in make_samples(task, tokenizer, 1024, 24):
        beginning, end = sample.prompt.index("\n"), sample.prompt.rindex("\n")
        depths.append((sample.prompt.index(sample.answers[0]) - beginning) / (end - beginning))
    assert min(depths) < 0.25
    assert max(depths) > 0.75
    assert len({round(depth, 2) for depth in depths}) > 10
    assert 0.3 < sum(depths) / len(depths) < 0.7


def test_an_essay_is_repeated_and_needles_lie_between_sentences(tokenizer):
    text = 'One two three. "Four five?" Six\n\nseven  eight! Nine.'
    first, last = [], []
    for sample in make_samples("niah_multivalue", tokenizer, 1024, 32, haystack=text):
        context = "\n".join(sample.prompt.split("\n")[1:-1])
        parts = re.split(r"One of the special magic numbers for \S+ is: \d+\.", context)
        assert len(parts) == 5
        words = [part.split() for part in parts]
        assert all(part[-1] in ("three.", 'five?"', "eight!", "Nine.") for part in words[:-1] if part)
        flat = [*itertools.chain.from_iterable(words)]
        assert flat == [*itertools.islice(itertools.cycle(text.split()), len(flat))]
        assert len(flat) > 100
        first.append(not words[0])
        last.append(not words[-1])
    assert 0 < sum(first) < 16, "a needle may come first"
    assert 0 < sum(last) < 16, "and last"


def test_the_haystack_is_pythons_help_without_another(tokenizer):
    prompt = make_samples("niah_single_2", tokenizer, 1024, 1)[0].prompt
    assert "Assert statements are a convenient way to insert debugging assertions" in prompt


@pytest.mark.parametrize("length", [1024, 4096])
def test_variables_form_the_chain(length, tokenizer):
    for sample in make_samples("vt", tokenizer, length, 4):
        example, prompt = sample.prompt.split("\n\nMemorize and track")
        for text, answers, letters in ((prompt, [*sample.answers], 5), (example, example.split()[-5:], 3)):
            value = re.search(r"assigned the value (\d{5}) in the text", text)[1]
            of = assignments(text)
            assert len(of) == 5
            for name in answers:
                assert re.fullmatch(rf"[A-Z]{{{letters}}}", name)
                while name in of:
                    name = of[name]
                assert name == value
            assert len(set(answers)) == 5
            assert [*of] == answers, "in the order in which they are assigned"
        assert "they are:  " in example
        lines = prompt.split("\n")[2:-1]
        chain = [n for n, line in enumerate(lines) if line.startswith("VAR")]
        assert all(b - a > 1 for a, b in itertools.pairwise(chain)), "noise lies between"
        assert {line for line in lines if not line.startswith("VAR")} == {NOISE}


def test_the_example_takes_500_tokens_of_a_long_prompt(tokenizer):
    prompt = make_samples("vt", tokenizer, 4096, 1)[0].prompt
    tokens = len(tokenizer(prompt.split("\n\nMemorize and track")[0]).input_ids)
    assert 460 < tokens < 530  # its answers count too


@pytest.mark.parametrize(
    ("length", "of_example", "of_list"), [(1024, (3, 1, 20), (6, 1)), (4096, (10, 3, 40), (30, 3))]
)
def test_common_words_are_the_most_common(length, of_example, of_list, tokenizer):
    for sample in make_samples("cwe", tokenizer, length, 3):
        _, example, prompt = sample.prompt.split("Below is a numbered list")
        numbered = entries(prompt.split("\nQuestion:")[0])
        assert sum(a == b for a, b in itertools.pairwise(numbered)) < len(numbered) / 5, "in a random order"
        listed = Counter(numbered)
        assert {word for word, _ in listed.most_common(10)} == set(sample.answers)
        assert len(set(sample.answers)) == 10
        assert set(listed.values()) == set(of_list)
        assert all(listed[word] == of_list[0] for word in sample.answers)
        example, answers = example.split("\nQuestion:")
        listed, answers = Counter(entries(example)), entries(answers.split(" are: ")[1])
        common, others, words = of_example
        assert dict.fromkeys(answers, common) == dict(listed.most_common(10))
        assert len(listed) == words
        assert set(listed.values()) == {common, others}


def test_long_lists_are_of_pairs(tokenizer, monkeypatch):
    monkeypatch.setattr(ruler, "WORDS", ruler.WORDS[:60])
    for sample in make_samples("cwe", tokenizer, 6000, 2):
        listed = entries(sample.prompt.split("Below is")[2].split("\nQuestion:")[0])
        assert all(re.fullmatch(KINDS["words"], word) for word in [*listed, *sample.answers])
        assert len(tokenizer(sample.prompt).input_ids) > 6000 - 120 - 48


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_frequent_words_are_the_most_frequent(length, tokenizer):
    for sample in make_samples("fwe", tokenizer, length, 3):
        text = sample.prompt.split("coded words. ")[1].split("\nQuestion:")[0]
        assert 5 < sum(word != "..." for word in text.split()[:40]) < 30, "in a random order"
        (dots, noise), *counts = Counter(text.split()).most_common()
        assert dots == "..."
        assert [word for word, _ in counts[:3]] == [*sample.answers]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts)
        assert counts[2][1] > counts[3][1]
        # Zeta distribution of 2: the words of rank k are 1 / k^2 times as many as the dots.
        assert all(abs(count - noise / rank**2) <= 1 for rank, (_, count) in enumerate(counts, 2))


def test_short_coded_texts_have_no_tie_for_the_third_word(tokenizer):
    with pytest.raises(ValueError, match="must be at least") as error:
        make_samples("fwe", tokenizer, 1, 1)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    for length in range(least, least + 200, 8):
        prompt, answers, _ = make_samples("fwe", tokenizer, length, 1)[0]
        counts = Counter(prompt.split("coded words. ")[1].split("\nQuestion:")[0].split())
        fewest = min(counts[word] for word in answers)
        assert all(count < fewest for word, count in counts.items() if word not in (*answers, "..."))


def test_samples_follow_from_the_seed_alone(tokenizer):
    for task in TASKS:
        random.seed(5)
        samples = make_samples(task, tokenizer, 1024, 3, seed=1)
        random.seed(6)
        assert make_samples(task, tokenizer, 1024, 2, seed=1) == samples[:2], "and not from their number"
        assert len({sample.answers for sample in samples}) == 3
        assert make_samples(task, tokenizer, 1024, 1, seed=2)[0].answers != samples[0].answers


def test_the_search_finds_what_counting_finds():
    rng = random.Random(0)
    for _ in range(200):
        steps = [rng.choice((0, 1, 1, 2, 40)) if rng.random() < 0.5 else 3 for _ in range(rng.randrange(9, 400))]
        sizes = [5, *itertools.accumulate(steps, initial=6)]
        least = rng.randrange(3)

        def size(n, sizes=sizes):
            return sizes[n] if n < len(sizes) else 10**6 + n

        limit = rng.randrange(4, sizes[-1] + 9)
        fitting = [n for n in range(least, len(sizes)) if size(n) <= limit]
        assert most_that_fit(size, limit, least) == max(fitting, default=None)


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2", "cwe", "fwe"])
def test_a_long_prompt_is_tokenized_a_few_times(task, tokenizer, monkeypatch):
    counted = []

    def counting(size, limit, least):
        def counted_size(n):
            counted.append(size(n))
            return counted[-1]

        return most_that_fit(counted_size, limit, least)

    monkeypatch.setattr(ruler, "most_that_fit", counting)
    length = 20000
    prompt = make_samples(task, tokenizer, length, 1)[0].prompt
    assert len(tokenizer(prompt).input_ids) > length - 250
    assert sum(counted) < 10 * length


def test_no_word_is_part_of_another():
    words = ruler.WORDS
    assert len(words) == len(set(words)) > 1000
    assert not [(a, b) for a, b in itertools.permutations(words, 2) if a in b]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "qa_1"}, ValueError, "`task` must be one of niah_single_1, .*, got 'qa_1'"),
        ({"task": None}, TypeError, "`task` must be a string, got NoneType"),
        ({"tokenizer": "gpt2"}, TypeError, "`tokenizer` must be a tokenizer of Transformers, got str"),
        ({"length": 0}, ValueError, "`length` must be 1 to 1048576, got 0"),
        ({"length": 2**20 + 1}, ValueError, "`length` must be 1 to 1048576, got 1048577"),
        ({"length": 1024.0}, TypeError, "`length` must be an integer, got 1024.0"),
        ({"count": 0}, ValueError, "`count` must be 1 or more, got 0"),
        ({"count": True}, TypeError, "`count` must be an integer, got True"),
        ({"seed": "1"}, TypeError, "`seed` must be an integer, got '1'"),
        ({"haystack": b"text"}, TypeError, "`haystack` must be a string or None, got bytes"),
        ({"haystack": " \n"}, ValueError, "`haystack` must have a word"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message, tokenizer):
    arguments = {"task": "fwe", "tokenizer": tokenizer, "length": 512, "count": 1}
    with pytest.raises(error, match=message):
        make_samples(**(arguments | changes))


def test_a_tokenizer_that_does_not_count_is_refused():
    blind = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    with pytest.raises(ValueError, match="`tokenizer` must find more tokens"):
        make_samples("fwe", blind, 512, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("qa_1", "a", ["a"]), ValueError, "`task` must be one of"),
        (("vt", None, ["a"]), TypeError, "`prediction` must be a string, got NoneType"),
        (("vt", "a", "a"), TypeError, "`answers` must be a sequence of strings, got 'a'"),
        (("vt", "a", [1]), TypeError, "`answers` must be a sequence of strings"),
        (("vt", "a", []), ValueError, "`answers` must have at least one"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        score(*arguments)
