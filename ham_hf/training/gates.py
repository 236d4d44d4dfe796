# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures how far training has opened the gates of the two memories: a converted model's new one starts shut."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..mixer_ham import HAMMixer
from .control import hybrid_mixers

GATES = ("rnn_gate", "kv_gate")


class GateMeter:
    """Means of both gates over tokens, heads, layers and training calls, of which each has the same weight.

    Only calls inside `with` count, and padding does. No figure is copied to the host, and no rank waits for another,
    before `read`.

    Args:
        mixers: those of hybrid layers, in training; calls of one that evaluates do not count.
    """

    def __init__(self, mixers: Sequence[HAMMixer]):
        self.mixers = mixers
        self._handles: list[RemovableHandle] = []
        # For each gate: the sum of its means and their number, float32 `[2]`.
        self._sums: dict[str, torch.Tensor | None] = dict.fromkeys(GATES)

    def __enter__(self) -> Self:
        """Starts to measure."""
        for name in GATES:
            for mixer in self.mixers:
                gate = getattr(mixer, f"{name}_proj")
                self._handles.append(gate.register_forward_hook(partial(self._add, name)))
        return self

    def __exit__(self, *_: object) -> None:
        """Stops measuring; the figures stay until they are read."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _add(self, name: str, gate: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if gate.training:
            opened = output.float().sigmoid().mean()
            new = torch.stack([opened, torch.ones_like(opened)])
            old = self._sums[name]
            self._sums[name] = new if old is None else old + new.to(old.device)

    def read(self) -> dict[str, float]:
        """The means since the last call over all ranks, `rnn_gate` and `kv_gate`; none without a call.

        Every rank must call it.
        """
        sums = [x for x in self._sums.values() if x is not None]
        self._sums = dict.fromkeys(GATES)
        if not sums:
            return {}
        total = torch.stack(sums)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return {name: opened / count for name, (opened, count) in zip(GATES, total.tolist(), strict=True)}


class GateCallback(TrainerCallback):
    """Adds the means of both gates since the last one, `rnn_gate` and `kv_gate`, to every log of a training loss."""

    def __init__(self) -> None:
        self._meter: GateMeter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Starts to measure."""
        self._meter = GateMeter(hybrid_mixers(model)).__enter__()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops measuring."""
        assert self._meter is not None
        self._meter.__exit__()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the means; runs on every rank."""
        if self._meter is not None and logs is not None and "loss" in logs:
            gates = self._meter.read()
            logs.update(gates)
            state.log_history[-1].update(gates)
