# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Heals a converted model: opens its shut gates, and distils its source into it while it keeps fewer tokens."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..conversion.memories import SHUT
from ..mixer_ham import HAMMixer
from ..modeling_ham import HAMForCausalLM
from .control import hybrid_mixers

IGNORED = -100
# Positions with distributions over the vocabulary in memory at once, beside the logits.
CHUNK = 1024
# Inputs of a batch that the teacher receives; it does not know a HAM's other arguments.
TEACHER_INPUTS = ("input_ids", "attention_mask", "position_ids")
PACKED_INPUTS = ("seq_idx", "cu_seq_lens_q")


def open_gates(model: HAMForCausalLM, bias: float = -2.0) -> int:
    """Gives every gate that conversion left shut a bias from which training can open it.

    The gate `sigmoid(-20)` has almost no gradient. From -4 or -2 a memory adds 2% or 12% of a normalised output
    that nothing has learned to read yet, which changes the loss little and lets training find the memory.

    Args:
        model: a converted model; only its gates change.
        bias: bias of the gates, above -20 and at most 0.

    Returns:
        The number of opened gates, one per query head.

    Raises:
        TypeError, ValueError: for another bias, and for a model without a shut gate.
    """
    check_bias(bias, "bias")
    opened = open_gates_of(hybrid_mixers(model), bias)
    if not opened:
        raise ValueError(f"`model` has no shut gate (a bias of {SHUT} or less), so there is none to open.")
    return opened


def open_gates_of(mixers: Iterable[HAMMixer], bias: float) -> int:
    """Gives every shut gate of hybrid mixers a bias, and returns how many there were."""
    gates = [gate.bias for mixer in mixers for gate in (mixer.rnn_gate_proj, mixer.kv_gate_proj)]
    opened = sum(int((gate <= SHUT).sum()) for gate in gates)
    with torch.no_grad():
        for gate in gates:
            gate.masked_fill_(gate <= SHUT, bias)
    return opened


def distillation_loss(
    loss: torch.Tensor,
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    weight: float = 1.0,
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Turns the next-token loss into `(1 - weight) * loss + weight * temperature^2 * KL(teacher || student)`.

    Distillation as in Hinton et al. (arXiv 1503.02531, section 2). The thresholds' control loop, which a HAM's loss
    carries, stays whole at any weight. Beside the two tensors of logits and one gradient, at most 1,024 positions are
    held in float32: they are computed again in the backward pass.

    Args:
        loss: scalar that the student returned for `labels`, with the same `num_items_in_batch`.
        logits: `[B, T, vocabulary]` of the student.
        teacher_logits: `[B, T, vocabulary]` of the teacher; no gradient reaches them.
        labels: `[B, T]` int64; position `t` predicts label `t + 1` and counts where that is not -100.
        weight: share of the divergence, in `[0, 1]`.
        temperature: divisor of the logits, above 0.
        num_items_in_batch: divisor of the sums if several calls or ranks share a batch; by default the number of
            positions that count.

    Raises:
        TypeError, ValueError: for shapes that differ, and for a weight or a temperature out of range.
    """
    check_mixture(weight, temperature)
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`teacher_logits` must have the shape {list(logits.shape)} of `logits`, got {list(teacher_logits.shape)}."
        )
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"`labels` must have the shape {list(logits.shape[:2])}, got {list(labels.shape)}.")
    # The last position predicts nothing.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    chunks = (logits.flatten(0, 1), teacher_logits.detach().flatten(0, 1), following)
    excess = torch.zeros((), device=logits.device)
    for chunk in zip(*(x.split(CHUNK) for x in chunks), strict=True):
        excess = excess + checkpoint(_excess, *chunk, temperature, use_reentrant=False)
    counted = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return loss + weight * excess / counted


def _excess(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """The divergence from the teacher minus the next-token loss, summed over `[N]` positions."""
    counted = labels != IGNORED
    logits, teacher, labels = logits[counted].float(), teacher[counted].float(), labels[counted]
    student_log, teacher_log = ((x / temperature).log_softmax(-1) for x in (logits, teacher))
    divergence = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    return temperature**2 * divergence - F.cross_entropy(logits, labels, reduction="sum")


class Teacher:
    """The source of a converted model, frozen, in evaluation mode, on the student's device and in its dtype.

    Args:
        path: folder, or repository of the Hub, of a causal language model.
        student: the model that is to learn from it.
        weight: share of the divergence in the loss, see `distillation_loss`.
        temperature: divisor of the logits.

    Raises:
        TypeError, ValueError: for a weight or temperature out of range, and a vocabulary other than the student's.
    """

    def __init__(self, path: str, student: PreTrainedModel, weight: float = 1.0, temperature: float = 1.0):
        check_mixture(weight, temperature)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=student.dtype, use_safetensors=True)
        if model.config.vocab_size != student.config.vocab_size:
            raise ValueError(
                f"`teacher` must have the student's vocabulary of {student.config.vocab_size} tokens, got "
                f"{model.config.vocab_size} in {path}."
            )
        self.model = model.eval().requires_grad_(False).to(student.device)
        self.weight, self.temperature = weight, temperature

    def loss(
        self,
        loss: torch.Tensor,
        logits: torch.Tensor,
        inputs: Mapping[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """`distillation_loss` of a batch for which the student returned `loss` and `logits`.

        Args:
            loss, logits, num_items_in_batch: as in `distillation_loss`.
            inputs: the student's inputs with `labels`; documents packed into a row have `position_ids`, and no
                padding.

        Raises:
            ValueError: for packed documents without `position_ids`, as the teacher would read across documents.
        """
        return distillation_loss(
            loss,
            logits,
            self.logits(inputs),
            inputs["labels"],
            self.weight,
            self.temperature,
            num_items_in_batch,
        )

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The teacher's logits `[B, T, vocabulary]` of a batch; raises as `loss` does."""
        given = {name: inputs[name] for name in TEACHER_INPUTS if inputs.get(name) is not None}
        if "position_ids" not in given and any(inputs.get(name) is not None for name in PACKED_INPUTS):
            raise ValueError(f"`position_ids` must be given with {PACKED_INPUTS}, as the teacher knows none of these.")
        if "attention_mask" in given and bool(given["attention_mask"].all()):
            # With a mask, Transformers' models ignore the positions that show where a packed document begins.
            del given["attention_mask"]
        return self.model(**given, use_cache=False).logits


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check_mixture(weight: float, temperature: float) -> None:
    """Raises `TypeError` or `ValueError` for a weight or a temperature that `distillation_loss` does not take."""
    if not _is_number(weight) or not _is_number(temperature):
        raise TypeError(f"`weight` and `temperature` must be numbers, got {weight!r} and {temperature!r}.")
    if not 0 <= weight <= 1:
        raise ValueError(f"`weight` must be between 0 and 1, got {weight}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be a finite number above 0, got {temperature}.")


def check_bias(bias: float, name: str) -> None:
    """Raises `TypeError` or `ValueError` for a bias to which gates cannot be opened."""
    if not _is_number(bias):
        raise TypeError(f"`{name}` must be a number, got {bias!r}.")
    if not SHUT < bias <= 0:
        raise ValueError(f"`{name}` must be above {SHUT}, where a gate is shut, and at most 0, got {bias}.")
