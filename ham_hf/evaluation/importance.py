# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Importance of heads: how much answers need what each key/value head reads from beyond its window and sinks."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..modeling_ham import HAMDecoderLayer, HAMForCausalLM
from ..routing_ham import Retention

NOTHING = Retention(torch.full((1, 1), 2.0))
# What a needle may be called. Several, so that no head is important for one phrase alone.
THINGS = ("the secret number", "the code of the safe", "the number of the ticket", "the telephone extension")
# Tokens from the needle to the end of its prompt, as parts of the prompt.
NEAREST, FARTHEST = 0.2, 0.7


class Example(NamedTuple):
    """A prompt and the answer to it, `[T]` and `[n]` int64 token ids."""

    prompt: torch.Tensor
    answer: torch.Tensor


def head_importance(model: HAMForCausalLM, examples: Sequence[Example], show_progress: bool = False) -> torch.Tensor:
    """How much each key/value head matters to answers: the rise of their loss if the head forgets what is far.

    Each head's output is seen as the mix `m o_full + (1 - m) o_window` of its attention with everything kept and with
    nothing kept but window and sinks (DuoAttention, arXiv 2410.10819, section 2.2, which trains `m`). To first order
    at `m = 1` the loss of an answer (nats per token) rises by `sum of dL/do (o_window - o_full)` over the tokens and
    the query heads of a group when `m` falls to 0. A head whose loss would fall instead is better off without its far
    tokens, so the mean rise over the examples is cut off at 0; its absolute value would rank such a head high.

    One layer at a time has a graph, so memory grows by the hidden states of each layer and no more.

    Args:
        model: the model, on one device; nothing in it changes.
        examples: prompts whose answers lie beyond the window.
        show_progress: shows a progress bar on a terminal.

    Returns:
        `[hybrid layers, Hk]` float32 on the CPU, 0 or more.

    Raises:
        ValueError: if there is no example, one lacks a prompt or an answer, or the model has no hybrid layer.
    """
    if not model.config.num_hybrid_layers:
        raise ValueError("`model` has no hybrid layer, so there is no head to keep or drop tokens.")
    if not examples or any(len(part) == 0 for example in examples for part in example):
        raise ValueError("`examples` must hold at least one prompt with an answer, neither of them empty.")
    training = model.training
    model.eval()
    try:
        rises = [
            loss_rises(model, x) for x in tqdm(examples, desc="importance", disable=None if show_progress else True)
        ]
    finally:
        model.train(training)
    return torch.stack(rises).mean(0).clamp(min=0)


def loss_rises(model: HAMForCausalLM, example: Example) -> torch.Tensor:
    """The first-order rise of one answer's loss for each head that forgets, `[hybrid layers, Hk]` float32."""
    ids = torch.cat(example)[None].to(model.device)
    answer = ids[0, -len(example.answer) :]
    calls, hidden = layer_calls(model, ids, len(answer) + 1)
    hidden.requires_grad_()
    with torch.enable_grad():
        logits = model.lm_head(model.model.norm(hidden))[0, :-1]
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), answer), hidden)
    rises = []
    for layer, (hidden, arguments) in zip(reversed(model.model.layers), reversed(calls), strict=True):
        gradient, rise = layer_rise(layer, hidden, arguments, gradient)
        rises += [] if rise is None else [rise.cpu()]
    return torch.stack(rises[::-1])


@torch.no_grad()
def layer_calls(
    model: HAMForCausalLM, ids: torch.Tensor, last: int
) -> tuple[list[tuple[torch.Tensor, dict[str, Any]]], torch.Tensor]:
    """Runs `[1, T]` ids with everything kept, for the `last` logits.

    Returns:
        For every layer its hidden states `[1, T, D]` and its other arguments; and the last layer's output, `[1, last,
        D]`.
    """
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def record(_: Any, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))

    modules = [*model.model.layers, model.model.norm]
    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        model(ids, use_cache=False, threshold=0.0, logits_to_keep=last)
    finally:
        for handle in handles:
            handle.remove()
    return calls[:-1], calls[-1][0]


def layer_rise(
    layer: HAMDecoderLayer, hidden: torch.Tensor, arguments: dict[str, Any], gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Takes the loss's gradient from the output of a layer to its input.

    Args:
        layer: the layer.
        hidden, arguments: its input `[1, T, D]` and its other arguments.
        gradient: `[1, n, D]` of its output.

    Returns:
        The gradient of its input, and, of a hybrid layer, the rise of the loss for each key/value head, `[Hk]`.
    """
    outputs: list[torch.Tensor] = []
    handles = []
    if layer.mixer.layer_type == "hybrid":
        handles = [layer.mixer.kv_norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))]
    hidden.requires_grad_()
    try:
        with torch.enable_grad():
            output = layer(hidden, **arguments)
            gradient, *of_attention = torch.autograd.grad(output, [hidden, *outputs], gradient)
        if not of_attention:
            return gradient, None
        with torch.no_grad():
            layer(hidden, **(arguments | {"retention": NOTHING}))
    finally:
        for handle in handles:
            handle.remove()
    full, window = outputs
    rise = (of_attention[0].float() * (window.float() - full.float())).sum((0, 1, 3)).detach()
    return gradient, rise.view(layer.mixer.shape.key_heads, -1).sum(1)


def needle_examples(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    count: int,
    length: int,
    seed: int,
    things: Sequence[str] = THINGS,
) -> list[Example]:
    """Prompts of `length` tokens that tell a number of five digits once, far back, and ask for it at the end.

    Args:
        tokenizer: the model's.
        filler: token ids of text to tell it in, of at least `length` tokens.
        count: number of prompts.
        length: tokens of a prompt; the number lies 20% to 70% of them back.
        seed: seed of the numbers, of their places and of the pieces of text.
        things: what the number is said to be.

    Raises:
        ValueError: for too little text, and for a length that leaves no room.
    """
    generator = random.Random(seed)
    beginning = tokenizer("")["input_ids"]
    examples = []
    for _ in range(count):
        thing, number = generator.choice(things), generator.randint(10000, 99999)
        fact, question, answer = (
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (
                f"\n\nRemember this: {thing} is {number}.\n\n",
                f"\n\nQuestion: What is {thing}?\nAnswer: {thing[0].upper()}{thing[1:]} is",
                f" {number}",
            )
        )
        back = round(length * generator.uniform(NEAREST, FARTHEST)) - len(question)
        front = length - len(beginning) - len(fact) - back - len(question)
        if back < 0 or front < 0:
            raise ValueError(f"`length` must leave room for a number and a question, got {length}.")
        if len(filler) < front + back:
            raise ValueError(f"`filler` must have at least {front + back} tokens, got {len(filler)}.")
        start = generator.randrange(len(filler) - front - back + 1)
        text = [*filler[start : start + front + back]]
        prompt = [*beginning, *text[:front], *fact, *text[front:], *question]
        examples.append(Example(torch.tensor(prompt), torch.tensor(answer)))
    return examples


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Reads JSON Lines with the strings `prompt` and `answer`, which are joined as they are.

    Raises:
        ValueError: for a line that is something else, and for a file without one.
    """
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            texts = [json.loads(line)[name] for name in ("prompt", "answer")]
        except (ValueError, TypeError, KeyError, RecursionError):
            texts = []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                f"{path}, line {number}, must be a JSON object with the strings `prompt` and `answer`, got {line!r}."
            )
        prompt, answer = texts
        ids = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        examples.append(Example(*map(torch.tensor, ids)))
    if not examples:
        raise ValueError(f"{path} must hold a prompt with an answer in each line, got no line.")
    return examples
