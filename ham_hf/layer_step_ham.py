# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""LayerStep: the new tokens of one forward, as a layer hands them to its memories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .paged_store_ham import KeptTokens, map_tensors


@dataclass(frozen=True)
class LayerStep:
    """The new tokens of one forward, for a layer's memories; absent parts are `None`.

    Attributes:
        positions: `[B, T]` index among the real tokens of the row.
        real: `[B, T]` bool, false for padding, or `None`.
        conv_inputs: `[B, T, C]` inputs of the short convolution.
        conv_state: `[B, W - 1, C]` state of the convolution after the call.
        rnn: `(k, v, g, beta)` as `gated_delta_rule_with_prediction` takes them.
        recurrent_state: `[B, Hk, K, V]` float32 state after the call, one per value head.
        keys, values: `[B, T, Hk, K]` and `[B, T, Hk, V]` of the attention view.
        scores: `[B, T, Hk]` float32 routing scores.
        keep: `[B, T, Hk]` bool.
    """

    positions: torch.Tensor
    real: torch.Tensor | None = None
    conv_inputs: torch.Tensor | None = None
    conv_state: torch.Tensor | None = None
    rnn: tuple[torch.Tensor, ...] | None = None
    recurrent_state: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    keep: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens of the step."""
        return self.positions.shape[1]

    def first(self, length: int) -> "LayerStep":
        """The inputs of the first `length` tokens, without the states, which belong to the whole step."""
        fields: dict[str, Any] = {name: x[:, :length] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        fields |= {"conv_state": None, "recurrent_state": None}
        rnn = None if self.rnn is None else tuple(x[:, :length] for x in self.rnn)
        return LayerStep(**(fields | {"rnn": rnn}))

    @classmethod
    def joined(cls, steps: list["LayerStep"]) -> "LayerStep":
        """Joins successive steps into one, without their states."""
        names = ("conv_inputs", "keys", "values", "scores", "keep", "positions")
        fields: dict[str, Any] = {name: _cat([getattr(step, name) for step in steps]) for name in names}
        if any(step.real is not None for step in steps):
            fields["real"] = torch.cat(
                [torch.ones_like(x.positions, dtype=torch.bool) if x.real is None else x.real for x in steps], dim=1
            )
        rnn = (
            None
            if steps[0].rnn is None
            else tuple(torch.cat(x, dim=1) for x in zip(*(s.rnn for s in steps), strict=True))
        )
        return cls(rnn=rnn, **fields)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerStep":
        """The step with `change` applied to every tensor."""
        return LayerStep(**map_tensors(change, vars(self)))

    def kept(self) -> KeptTokens:
        """The kept tokens of a layer with attention, flat and ordered by stream and position."""
        keys, values, scores, keep = self.keys, self.values, self.scores, self.keep
        if keys is None or values is None or scores is None or keep is None:
            raise ValueError("A step of a linear layer keeps no tokens.")
        heads = keep.shape[2]
        row, head, time = keep.transpose(1, 2).nonzero(as_tuple=True)
        return KeptTokens(
            keys[row, time, head],
            values[row, time, head],
            scores[row, time, head],
            self.positions[row, time].int(),
            row * heads + head,
        )


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors, dim=1)


__all__ = ["LayerStep"]
