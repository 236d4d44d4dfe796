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
# Mixes at which the derivative is taken: the middles of two halves.
MIXES = (0.25, 0.75)
# What a needle may be called. Several, so that no head is important for one phrase alone.
THINGS = ("the secret number", "the code of the safe", "the number of the ticket", "the telephone extension")
# Tokens from the needle to the end of its prompt, as parts of the prompt.
NEAREST, FARTHEST = 0.2, 0.7


class Example(NamedTuple):
    """A prompt and the answer to it, `[T]` and `[n]` int64 token ids."""

    prompt: torch.Tensor
    answer: torch.Tensor


class LayerCall(NamedTuple):
    """A layer's input `[1, T, D]` and its other arguments."""

    hidden: torch.Tensor
    arguments: dict[str, Any]


def head_importance(model: HAMForCausalLM, examples: Sequence[Example], show_progress: bool = False) -> torch.Tensor:
    """How much each key/value head matters to answers: the fall of their loss as it comes to see what is far.

    Each head's output is seen as the mix `o_window + m (o_full - o_window)` of its attention with nothing kept but
    window and sinks and with everything kept (DuoAttention, arXiv 2410.10819, section 2.2, which trains `m`). As one
    `m` of all heads goes from 0 to 1 the loss of an answer (nats per token) falls; each head's part of that is the
    integral of the derivative by its own `m` (integrated gradients, arXiv 1703.01365), here the mean at `MIXES`. The
    derivative at 1 alone says little: there the answer is sure, whatever one head does. A head whose part is a rise
    is better off without its far tokens, so the mean over the examples is cut off at 0; its absolute value would rank
    such a head high.

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
        falls = [
            loss_falls(model, x) for x in tqdm(examples, desc="importance", disable=None if show_progress else True)
        ]
    finally:
        model.train(training)
    return torch.stack(falls).mean(0).clamp(min=0)


def stored_importance(importance: torch.Tensor) -> list[list[float]]:
    """The result of `head_importance` as `config.head_importance` has it: four digits tell heads apart."""
    return [[float(f"{x:.4g}") for x in layer] for layer in importance.tolist()]


def loss_falls(model: HAMForCausalLM, example: Example) -> torch.Tensor:
    """Each head's part of the fall of one answer's loss, `[hybrid layers, Hk]` float32."""
    ids = torch.cat(example)[None].to(model.device)
    calls = layer_calls(model, ids, len(example.answer) + 1)
    return torch.stack([falls_at(model, calls, ids[0, -len(example.answer) :], mix) for mix in MIXES]).mean(0)


def falls_at(model: HAMForCausalLM, calls: list[LayerCall], answer: torch.Tensor, mix: float) -> torch.Tensor:
    """How fast the loss of an answer `[n]` falls by the mix of each head, where all have this one."""
    hidden, inputs = calls[0][0], []
    with torch.no_grad():
        for layer, call in zip(model.model.layers, calls, strict=True):
            inputs.append(hidden)
            hidden, _ = mixed(layer, hidden, call.arguments, mix)
    hidden.requires_grad_()
    with torch.enable_grad():
        logits = model.lm_head(model.model.norm(hidden))[0, :-1]
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), answer), hidden)
    falls = []
    for layer, x, call in zip(reversed(model.model.layers), reversed(inputs), reversed(calls), strict=True):
        gradient, fall = layer_fall(layer, x, call.arguments, gradient, mix)
        falls += [] if fall is None else [fall.cpu()]
    return torch.stack(falls[::-1])


@torch.no_grad()
def layer_calls(model: HAMForCausalLM, ids: torch.Tensor, last: int) -> list[LayerCall]:
    """What every layer is called with for `[1, T]` ids with everything kept, when the `last` logits are wanted."""
    calls: list[LayerCall] = []

    def record(_: Any, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(args[0], kwargs))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in model.model.layers]
    try:
        model(ids, use_cache=False, threshold=0.0, logits_to_keep=last)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def mixed(
    layer: HAMDecoderLayer, hidden: torch.Tensor, arguments: dict[str, Any], mix: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of a layer whose heads mix, and `o_full - o_window` `[B, T, H, V]`, `None` without both."""
    if layer.mixer.layer_type != "hybrid":
        return layer(hidden, **arguments), None
    windows: list[torch.Tensor] = []
    differences: list[torch.Tensor] = []

    def mix_in(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        differences.append(args[0] - windows[0])
        return (windows[0] + mix * differences[0],)

    handle = layer.mixer.kv_norm.register_forward_pre_hook(lambda _, args: windows.append(args[0]))
    try:
        layer(hidden, **(arguments | {"retention": NOTHING}))
        handle.remove()
        handle = layer.mixer.kv_norm.register_forward_pre_hook(mix_in)
        return layer(hidden, **arguments), differences[0]
    finally:
        handle.remove()


def layer_fall(
    layer: HAMDecoderLayer, hidden: torch.Tensor, arguments: dict[str, Any], gradient: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Takes the loss's gradient from the output of a layer to its input.

    Args:
        layer: the layer.
        hidden, arguments: its input `[1, T, D]` and its other arguments.
        gradient: `[1, n, D]` of its output.
        mix: of all heads, above 0.

    Returns:
        The gradient of its input, and, of a hybrid layer, how fast the loss falls by the mix of each key/value head,
        `[Hk]`.
    """
    hidden.requires_grad_()
    with torch.enable_grad():
        output, difference = mixed(layer, hidden, arguments, mix)
        if difference is None:
            return torch.autograd.grad(output, hidden, gradient)[0], None
        gradient, of_difference = torch.autograd.grad(output, [hidden, difference], gradient)
    fall = -(of_difference / mix * difference.detach()).float().sum((0, 1, 3))
    return gradient, fall.view(layer.mixer.shape.key_heads, -1).sum(1)


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
