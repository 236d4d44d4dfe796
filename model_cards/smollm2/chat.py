# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Has SmolLM2 as a HAM follow conversations of several turns, and asks for what their first turn told.

Usage, after ``make demo-smollm2``:

    python -m model_cards.smollm2.chat run
    python -m model_cards.smollm2.chat report

A user tells three facts in the first turn, and has paragraphs explained in the next ones. The replies that the
model gives with everything kept are the transcript of every arm, which reads it turn by turn into one cache. In the
end each fact is asked for, from a fork of the cache. `run` appends a row to chat.jsonl for each conversation and arm;
run again, it goes on.
"""

import argparse
import random
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.evaluation.markdown import table
from ham_hf.evaluation.report import mean_and_error
from ham_hf.files import append_row, read_rows, write_whole

from ..rows import Row, current_commit
from .checkpoint import CACHE, checkpoint
from .needles import EVERYTHING, Arm, Models, interval
from .texts import halves

ROOM = Path(__file__).parent
RESULTS = ROOM / "chat.jsonl"
CONVERSATIONS, TURNS, SEED = 20, 4, 11
# New tokens of a reply, and of the answer to a question.
REPLY, ANSWER = 60, 24
# Words of a paragraph that is given to explain.
PARAGRAPH = (60, 120)
FACTS = {
    "dog": ("my dog is called {}", "What is my dog called?", ("Biscuit", "Rufus", "Pepper", "Hector", "Luna", "Max")),
    "city": ("I live in {}", "In which city do I live?", ("Lisbon", "Oslo", "Vienna", "Chicago", "Madrid", "Dublin")),
    "sister": (
        "my sister is called {}",
        "What is my sister called?",
        ("Clara", "Ruth", "Emma", "Nora", "Alice", "Judith"),
    ),
}
# In the order of the table.
ARMS = {
    EVERYTHING: Arm(heads="even", kv_usage=1.0),
    "by importance": Arm(kv_usage=0.25),
    "all heads alike": Arm(heads="even", kv_usage=0.25),
    "all heads alike, random router": Arm("random", "even", kv_usage=0.25),
    "by importance, a tenth": Arm(kv_usage=0.1),
}


class Conversation(NamedTuple):
    """The user's turns, the first with the facts; and, by fact, a last turn that asks for it and its answer."""

    turns: list[str]
    questions: dict[str, tuple[str, str]]


def conversations() -> list[Conversation]:
    """`CONVERSATIONS` of `TURNS` turns after the first, of paragraphs that the calibration did not see."""
    source = random.Random(SEED)
    fitting = [x for x in halves()[1].split("\n\n") if PARAGRAPH[0] <= len(x.split()) <= PARAGRAPH[1]]
    drawn = source.sample(fitting, CONVERSATIONS * TURNS)
    made = []
    for index in range(CONVERSATIONS):
        words = {fact: source.choice(known) for fact, (_, _, known) in FACTS.items()}
        told = [FACTS[fact][0].format(word) for fact, word in words.items()]
        turns = [f"Hello! Let me tell you about myself: {told[0]}, {told[1]}, and {told[2]}."]
        turns += [f"Explain this in two sentences:\n\n{x}" for x in drawn[index * TURNS : (index + 1) * TURNS]]
        made.append(Conversation(turns, {fact: (FACTS[fact][1], word) for fact, word in words.items()}))
    return made


class Turn(NamedTuple):
    """Ids `[1, T]` of what comes before a reply, from the end of the one before, and of the reply."""

    before: torch.Tensor
    reply: torch.Tensor


class Transcript(NamedTuple):
    """A conversation with the replies that the model gives with everything kept.

    Attributes:
        turns: its turns.
        questions: ids `[1, T]` that ask for a fact after the last turn, and the word to find, by fact.
    """

    turns: list[Turn]
    questions: dict[str, tuple[torch.Tensor, str]]


def transcript(model: HAMForCausalLM, tokenizer: PreTrainedTokenizerBase, x: Conversation) -> Transcript:
    """Has the model reply to each turn of a conversation, with everything kept."""
    messages: list[dict[str, str]] = []
    seen = torch.zeros(1, 0, dtype=torch.int64)
    turns: list[Turn] = []
    for text in x.turns:
        before = added_ids(tokenizer, messages, text)
        seen = torch.cat([seen, before], dim=1)
        reply = generated(model, seen, None, 1.0, REPLY)
        turns.append(Turn(before, reply))
        seen = torch.cat([seen, reply], dim=1)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": decoded(tokenizer, reply)}]
    asked = {fact: (added_ids(tokenizer, messages, text), word) for fact, (text, word) in x.questions.items()}
    return Transcript(turns, asked)


def added_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], text: str) -> torch.Tensor:
    """Ids `[1, T]` that the chat template puts between the last reply and the next one, when a user says `text`."""
    told = ""
    if messages:
        told = str(tokenizer.apply_chat_template(messages, tokenize=False))
        # The template closes the last reply, which ends without that.
        told = told[: told.rindex(messages[-1]["content"]) + len(messages[-1]["content"])]
    asked = [*messages, {"role": "user", "content": text}]
    whole = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    return tokenizer(whole[len(told) :], add_special_tokens=False, return_tensors="pt")["input_ids"]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    """The text of a reply."""
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


def generated(
    model: HAMForCausalLM, ids: torch.Tensor, cache: HAMCache | None, kv_usage: float, count: int
) -> torch.Tensor:
    """At most `count` greedy tokens `[1, n]` after `ids` `[1, T]`, without the token that ends a reply."""
    arguments: dict[str, Any] = {"kv_usage": kv_usage, "max_new_tokens": count, "do_sample": False}
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, **arguments)
    new = whole[:, ids.shape[1] :]
    return new[:, :-1] if new[0, -1] == model.generation_config.eos_token_id else new


@torch.no_grad()
def figures_of(model: HAMForCausalLM, tokenizer: PreTrainedTokenizerBase, x: Transcript, kv_usage: float) -> Row:
    """What an arm makes of a transcript.

    Returns:
        `loss`, of the replies (nats per token), and `last_loss`, of the last one alone; `held`, the fraction of the
        tokens in memory at the end; `found`, by fact, whether the answer has its word.
    """
    cache, losses, seen = HAMCache(model.config), [], []
    for turn in x.turns:
        ids = torch.cat(turn, dim=1)
        logits = model(ids, cache=cache, kv_usage=kv_usage, logits_to_keep=turn.reply.shape[1] + 1).logits
        losses.append(F.cross_entropy(logits[0, :-1], turn.reply[0], reduction="none"))
        seen.append(ids)
    found = {}
    for fact, (question, word) in x.questions.items():
        ids = torch.cat([*seen, question], dim=1)
        answer = generated(model, ids, cache.fork(), kv_usage, ANSWER)
        found[fact] = word.lower() in decoded(tokenizer, answer).lower()
    return {
        "loss": torch.cat(losses).mean().item(),
        "last_loss": losses[-1].mean().item(),
        "tokens": sum(part.shape[1] for part in seen),
        "held": cache.kv_usage().mean().item(),
        "found": found,
    }


def run(cache: Path, count: int) -> None:
    """Measures the conversations and arms that have no row yet."""
    folder = checkpoint(cache)
    models, tokenizer = Models(folder), AutoTokenizer.from_pretrained(folder)
    done = {(row["index"], row["arm"]) for row in read_rows(RESULTS)}
    for index, x in enumerate(tqdm(conversations()[:count], unit="conversation")):
        missing = [name for name in ARMS if (index, name) not in done]
        if not missing:
            continue
        told = transcript(models.at(ARMS[EVERYTHING]), tokenizer, x)
        for name in missing:
            figures = figures_of(models.at(ARMS[name]), tokenizer, told, ARMS[name].kv_usage)
            append_row(RESULTS, {"index": index, "arm": name, **figures, "commit": current_commit()})


def to_markdown(rows: list[Row]) -> str:
    """A row for each arm."""
    everything = {row["index"]: row for row in rows if row["arm"] == EVERYTHING}
    asked = {(index, fact) for index, row in everything.items() for fact, found in row["found"].items() if found}
    lines = []
    for name in ARMS:
        own = [row for row in rows if row["arm"] == name]
        if not own:
            continue
        hits = [row["found"][fact] for row in own for fact in row["found"] if (row["index"], fact) in asked]
        low, high = interval(sum(hits), len(hits))
        cells = [name, f"{statistics.mean(row['held'] for row in own):.1%}"]
        cells.append(f"{sum(hits)} of {len(hits)} ({low:.0%} to {high:.0%})")
        for loss in ("loss", "last_loss"):
            if name == EVERYTHING:
                cells.append(f"{statistics.mean(row[loss] for row in own):.3f}")
            else:
                mean, error = mean_and_error([row[loss] - everything[row["index"]][loss] for row in own])
                cells.append(f"{mean:+.3f} ± {error:.3f}")
        lines.append(cells)
    tokens = [row["tokens"] for row in everything.values()]
    tail = (
        f"{len(everything)} conversations of {TURNS + 1} turns and {min(tokens)} to {max(tokens)} tokens. Facts: told "
        "in the first turn, asked for after the last, counted where the answer with everything kept has them, as "
        f"{len(asked)} of {len(FACTS) * len(everything)} do; with 95% intervals. Losses, in nats/token, are those of "
        "what the model replies with everything kept, and below the first row what is lost against that, ± the "
        "standard error over conversations."
    )
    return f"{table(['heads', 'held', 'facts found', 'loss of replies', 'of the last reply'], lines)}\n\n{tail}\n"


def main() -> None:
    """Measures, or writes chat.md from the rows."""
    parser = argparse.ArgumentParser(description="Conversations of several turns with SmolLM2 as a HAM.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure what has no row yet")
    command.add_argument("--cache", type=Path, default=CACHE, help="folder of the HAM (default: %(default)s)")
    command.add_argument("--count", type=int, default=CONVERSATIONS, help="conversations (default: %(default)s)")
    commands.add_parser("report", help="write chat.md")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.cache, arguments.count)
    report = to_markdown(read_rows(RESULTS))
    print(report)
    write_whole(ROOM / "chat.md", report)


if __name__ == "__main__":
    main()
