# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Scores of tokens, HAMRouter, and Retention, the rule by which a layer keeps tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_ham import ERROR_ROUTERS, LARGEST_THRESHOLD, LEARNED_ROUTERS, HAMConfig
from .numbers_ham import LARGEST_INT, plain_number

# Below this product of norms a direction is rounding noise, so the cosine counts as 0.
COSINE_EPS = 1e-8
NUM_QUANTILES = 65


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_score(v: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Prediction error `(1 - cos(vhat, v)) / 2` in `[0, 1]` of `[..., V]` values; 0.5 where either vector is zero.

    Next to a zero vector it has no gradient: the gradient of a direction grows without bounds there.
    """
    dot = (v * prediction).sum(-1)
    norms = v.norm(dim=-1) * prediction.norm(dim=-1)
    cosine = dot / norms.clamp(min=COSINE_EPS)
    cosine = torch.where(norms > COSINE_EPS, cosine, cosine.detach())
    return ((1 - cosine) / 2).clamp(0, 1)


def l2_score(v: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Prediction error with magnitude, `|v - vhat|^2 / (|v| + |vhat|)^2` in `[0, 1]`; 0 where both are zero."""
    total = v.norm(dim=-1) + prediction.norm(dim=-1)
    return ((v - prediction).norm(dim=-1) / total.clamp(min=COSINE_EPS)).square().clamp(0, 1)


def residual_score(v: torch.Tensor, prediction: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Size of the write to the state: `r / (1 + r)`, `r = beta |v - vhat| / |v|` (after HOLA, arXiv 2607.02303)."""
    residual = beta * (v - prediction).norm(dim=-1)
    return residual / (residual + v.norm(dim=-1).clamp(min=COSINE_EPS))


def error_score(
    score: str, v: torch.Tensor, prediction: torch.Tensor, beta: torch.Tensor, in_graph: bool = False
) -> torch.Tensor:
    """Computes the score of a given name, in float32 or wider.

    Args:
        score: `"cosine"`, `"l2"` or `"residual"`.
        v: `[..., V]` values.
        prediction: `[..., V]` the value that the state held for each key before.
        beta: `[...]` write strengths.
        in_graph: True to give the score a gradient; a hard decision passes none, so it is usually cut off.
    """
    v, prediction, beta = (widened(x if in_graph else x.detach()) for x in (v, prediction, beta))
    if score == "cosine":
        return cosine_score(v, prediction)
    if score == "l2":
        return l2_score(v, prediction)
    if score == "residual":
        return residual_score(v, prediction, beta)
    raise ValueError(f"`score` must be one of 'cosine', 'l2', 'residual', got {score!r}.")


def random_score(positions: torch.Tensor, layer_idx: int, num_heads: int) -> torch.Tensor:
    """A hash of (position, layer, head) in `[0, 1)`: the control, independent of content.

    Args:
        positions: `[B, T]` int64, each token's index among the real tokens of its document.
        layer_idx: the layer, so that layers do not keep the same tokens.
        num_heads: number of key/value heads.

    Returns:
        `[B, T, num_heads]` float32.
    """
    head = torch.arange(num_heads, device=positions.device) + layer_idx * num_heads
    x = positions.long()[..., None] * 0x9E3779B1 + head * 0x85EBCA77 + 1
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = (x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 15)
        x = x * multiplier
    x = (x & 0xFFFFFFFF) >> 8
    return x.float() / 2**24


def recency_score(positions: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The position in units of `2**-24`, in `[0, 1)`: the control that keeps by age alone.

    A score is fixed when its token arrives, so it cannot fall with age; it rises with the position instead. A full
    head drops its lowest score, the oldest token: `kv_budget=b` holds the last `b` tokens. `threshold=p / 2**24` holds
    all tokens from position `p` on. Float32 tells all positions below `2**24` apart; later ones tie, and of equal
    scores the oldest leaves.

    Args:
        positions: `[B, T]` int64, each token's index among the real tokens of its row.
        num_heads: number of key/value heads.

    Returns:
        `[B, T, num_heads]` float32.
    """
    scores = positions.clamp(min=0, max=2**24 - 1).float() / 2**24
    return scores[..., None].repeat(1, 1, num_heads)


class Float32Linear(nn.Linear):
    """A projection computed in float32 or wider for weights of any dtype: in bfloat16 many scores would tie."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = widened(x)
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class HAMRouter(nn.Module):
    """Routing scores `[B, T, Hk]` of a layer in `[0, 1]`; a head keeps a token if its score reaches the threshold.

    Scores are float32, or wider in a wider model. A score that is not a number counts as 1: a broken token then shows
    in the output, as it would with everything kept, and no threshold drops it unseen.
    """

    def __init__(self, config: HAMConfig, layer_idx: int):
        super().__init__()
        self.kind = config.router
        self.layer_idx = layer_idx
        self.num_heads = config.num_key_value_heads
        # Name of the prediction's `error_score` that this router reads, or `None`.
        self.error = "cosine" if self.kind == "learned_error" else self.kind if self.kind in ERROR_ROUTERS else None
        if self.kind in LEARNED_ROUTERS:
            self.up_proj = nn.Linear(config.hidden_size, config.router_hidden_size)
            self.down_proj = Float32Linear(config.router_hidden_size, self.num_heads)
        if self.kind == "learned_error":
            self.error_weight = nn.Parameter(torch.ones(self.num_heads, dtype=torch.float32))

    def forward(
        self,
        hidden_states: torch.Tensor,
        errors: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Scores of tokens.

        Args:
            hidden_states: `[B, T, D]` normalised input of the layer.
            errors: `[B, T, Hk]` scores of the RNN's prediction, of the kind `self.error`; not read if that is `None`.
            positions: `[B, T]` int64 index among real tokens.

        Raises:
            ValueError: if the router reads errors and gets none.
        """
        if self.error is None:
            scores = self.without_state(hidden_states, positions).expand(*hidden_states.shape[:2], self.num_heads)
        elif errors is None:
            raise ValueError(f"`errors` must be a tensor with the router {self.kind!r}, got None.")
        elif self.kind in ERROR_ROUTERS:
            scores = errors
        else:
            logits = self.without_state(hidden_states, positions)
            scores = (logits + self.error_weight.to(errors.dtype) * errors).sigmoid()
        return scores.masked_fill(scores.isnan(), 1.0)

    def without_state(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The part that needs no RNN state: scores, except of `learned_error`, whose logits these are.

        Args:
            hidden_states: `[B, T, D]`; positions: `[B, T]`.

        Returns:
            `[B, T, Hk]` float32 or wider.
        """
        if self.kind == "random":
            return random_score(positions, self.layer_idx, self.num_heads)
        if self.kind == "recency":
            return recency_score(positions, self.num_heads)
        with torch.autocast(hidden_states.device.type, enabled=False):
            # Use only the outputs of the projections: LoRA, quantisation and offloading change everything else.
            logits = self.down_proj(F.silu(self.up_proj(hidden_states)))
        return logits if self.kind == "learned_error" else logits.sigmoid()


def check_threshold(threshold: object, num_layers: int, batch_size: int, num_heads: int) -> torch.Tensor | None:
    """Converts every accepted form of `threshold` to one float32 tensor `[layers or 1, batch or 1, heads or 1]`.

    Args:
        threshold: `None` (learned thresholds), a number for every layer, a list or tuple with one number per hybrid
            layer, a tensor `[batch]` with one per row, or a tensor `[layers or 1, batch or 1, heads or 1]`. NumPy
            scalars and tensors without dimensions are numbers, here and everywhere else.
        num_layers: number of hybrid layers.
        batch_size: number of rows.
        num_heads: number of key/value heads.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it holds NaN or its shape does not fit.
    """
    expected = (
        f"a number, a list of {num_layers} numbers (one per hybrid layer), a tensor [{batch_size}] (one per row) or a "
        f"tensor [{num_layers} or 1, {batch_size} or 1, {num_heads} or 1] (layers, rows, key/value heads)"
    )
    if threshold is None:
        return None
    if isinstance(threshold, torch.Tensor) and (threshold.ndim or threshold.is_floating_point()):
        if not threshold.is_floating_point():
            raise TypeError(
                f"`threshold` must be a floating-point tensor, got {threshold.dtype}; expected {expected}."
            )
        tensor = threshold.detach().float()
        tensor = tensor[None, :, None] if tensor.ndim == 1 else tensor.reshape(1, 1, 1) if tensor.ndim == 0 else tensor
        sizes = (num_layers, batch_size, num_heads)
        if tensor.ndim != 3 or any(n not in (1, size) for n, size in zip(tensor.shape, sizes, strict=True)):
            raise ValueError(f"`threshold` has shape {list(threshold.shape)}; expected {expected}.")
    else:
        entries = threshold if isinstance(threshold, (list, tuple)) else [threshold]
        numbers = [plain_number(x) for x in entries]
        if any(x is None for x in numbers):
            raise TypeError(f"`threshold` is {_describe(threshold)}; expected {expected}.")
        if isinstance(threshold, (list, tuple)) and len(threshold) != num_layers:
            raise ValueError(f"`threshold` has {len(threshold)} entries; expected {expected}.")
        if any(isinstance(x, int) and abs(x) > LARGEST_THRESHOLD for x in numbers):
            raise ValueError(f"`threshold` must be between -2**53 and 2**53, or infinite; expected {expected}.")
        if any(x != x for x in numbers):
            raise ValueError(f"`threshold` must not be NaN; expected {expected}.")
        values = [float(x) for x in numbers if x is not None]
        return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)
    # The capture of a CUDA graph forbids reading values on the GPU; the caller has had them checked before.
    unreadable = torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    if not unreadable and torch.isnan(tensor).any():
        raise ValueError(f"`threshold` must not be NaN; expected {expected}.")
    return tensor


def check_kv_usage(kv_usage: object) -> float | None:
    """Returns `kv_usage` as a float in `[0, 1]` or `None`; raises `TypeError` or `ValueError` for anything else."""
    if kv_usage is None:
        return None
    number = plain_number(kv_usage)
    if number is None:
        raise TypeError(f"`kv_usage` must be a number between 0 and 1, got {_describe(kv_usage)}.")
    if not 0 <= number <= 1:
        raise ValueError(f"`kv_usage` must be a number between 0 and 1, got {_describe(number)}.")
    return float(number)


def check_kv_budget(kv_budget: object) -> int | None:
    """Returns `kv_budget`, a positive int or `None`; raises `TypeError` or `ValueError` for anything else."""
    if kv_budget is None:
        return None
    number = plain_number(kv_budget)
    if not isinstance(number, int):
        raise TypeError(f"`kv_budget` must be a positive int (kept tokens per head), got {_describe(kv_budget)}.")
    if not 1 <= number <= LARGEST_INT:
        raise ValueError(
            f"`kv_budget` must be a positive int (kept tokens per head) below 2**63, got {_describe(number)}."
        )
    return number


def _describe(x: object) -> str:
    if isinstance(x, torch.Tensor) and x.ndim:
        return f"a tensor {list(x.shape)}"
    if isinstance(x, int) and x.bit_length() > 64:
        # Python refuses to print the largest ints.
        return f"an int of {x.bit_length()} bits"
    return f"{x!r} of type {type(x).__name__}"


def usage_shares(config: HAMConfig, kv_usage: float) -> torch.Tensor:
    """How much each head keeps, so that their mean is `kv_usage`.

    By `config.head_importance` the most important `kv_usage / (1 + kv_usage)` of the heads keep everything, and the
    others the fraction `kv_usage ** 2`; the head in which the border falls keeps the mean of its two parts. So shares
    grow steadily with `kv_usage`, from nothing to everything. Of equally important heads the first comes first. Few
    heads retrieve from afar, and need everything for it (DuoAttention, arXiv 2410.10819); to the others a little of
    all that lies behind the window is worth more than to have none.

    Args:
        config: the model's; without `head_importance`, or with `usage_division="even"`, every head keeps `kv_usage`.
        kv_usage: mean fraction to keep, from 0 to 1.

    Returns:
        `[hybrid layers, Hk]` float64 on the CPU.
    """
    if config.head_importance is None or config.usage_division == "even":
        shape = (config.num_hybrid_layers, config.num_key_value_heads)
        return torch.full(shape, kv_usage, dtype=torch.float64, device="cpu")
    importance = torch.tensor(config.head_importance, dtype=torch.float64, device="cpu")
    ranks = importance.flatten().argsort(descending=True, stable=True).argsort().view_as(importance).double()
    within = (importance.numel() * kv_usage / (1 + kv_usage) - ranks).clamp(0, 1)
    others = kv_usage**2
    return others + within * (1 - others)


def usage_threshold(quantiles: torch.Tensor, kv_usage: float | torch.Tensor) -> torch.Tensor:
    """The threshold that keeps a fraction `kv_usage` of calibrated scores.

    Args:
        quantiles: `[..., Q]` score quantiles at `Q` equally spaced levels from 0 to 1, all zero if never calibrated.
        kv_usage: fraction to keep, or one for each head, `[...]`.

    Returns:
        `[...]` float32 thresholds, interpolated between quantiles; above 1 for a usage of 0, 0 for a usage of 1.

    Raises:
        ValueError: if the quantiles were never calibrated.
    """
    quantiles = quantiles.float()
    if not bool((quantiles.amax(-1) > 0).all()):
        raise ValueError(
            "`kv_usage` needs score quantiles, and this checkpoint has none: run `ham-hf calibrate`, or "
            "`ham_hf.evaluation.calibrate(model, batches)` and save it, or give `threshold` instead."
        )
    # In float64 and on the CPU, as not every device has it: a tiny usage is still a usage.
    share = torch.as_tensor(kv_usage, dtype=torch.float64, device="cpu").expand(quantiles.shape[:-1])
    level = (1 - share) * (quantiles.shape[-1] - 1)
    low = level.floor().clamp(0, quantiles.shape[-1] - 2)
    below, above = (quantiles.gather(-1, (low + n).long().to(quantiles.device)[..., None])[..., 0] for n in (0, 1))
    thresholds = torch.lerp(below, above, (level - low).float().to(quantiles.device))
    thresholds = thresholds.masked_fill((share <= 0).to(quantiles.device), 2.0)
    return thresholds.masked_fill((share >= 1).to(quantiles.device), 0.0)


class Retention(NamedTuple):
    """The rule by which a layer keeps tokens in one call.

    Attributes:
        threshold: `[B or 1, Hk or 1]` float32, the least score of a kept token; `None` for the layer's learned one.
        budget: most tokens that a head may hold, window and sinks included, beyond which the lowest score is dropped;
            `None` for any number.
    """

    threshold: torch.Tensor | None = None
    budget: int | None = None

    @classmethod
    def resolve(
        cls,
        config: HAMConfig,
        quantiles: list[torch.Tensor],
        batch: int,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
        kv_budget: int | None = None,
    ) -> list["Retention"]:
        """The rule of each layer; a layer that does not route has an empty rule.

        Args:
            config: the model's; its `fixed_threshold` applies if a call gives neither `threshold` nor `kv_usage`.
            quantiles: `[Hk, Q]` calibrated score quantiles of each hybrid layer; only `kv_usage` needs them.
            batch: number of rows.
            threshold, kv_usage, kv_budget: as `HAMModel.forward` takes them.

        Raises:
            TypeError, ValueError: for arguments that do not fit, and for `kv_usage` together with `threshold` or with
                the router `"recency"`.
        """
        kv_usage, kv_budget = check_kv_usage(kv_usage), check_kv_budget(kv_budget)
        if threshold is not None and kv_usage is not None:
            raise ValueError("Give at most one of `threshold` and `kv_usage`: both decide what is kept.")
        if kv_usage is not None and config.router == "recency":
            raise ValueError(
                f"`kv_usage` must be left out with the router 'recency', whose scores are positions, got {kv_usage}: "
                "give `kv_budget`, how many of the last tokens a head holds."
            )
        if threshold is None and kv_usage is None:
            threshold = config.fixed_threshold
        thresholds = check_threshold(threshold, config.num_hybrid_layers, batch, config.num_key_value_heads)
        if kv_usage is not None and quantiles:
            # All layers at once: the check that they were calibrated waits for a GPU.
            stacked = torch.stack([x.to(quantiles[0].device) for x in quantiles])
            thresholds = usage_threshold(stacked, usage_shares(config, kv_usage))[:, None]
        rules = [cls()] * config.num_hidden_layers
        hybrid = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "hybrid"]
        for n, i in enumerate(hybrid):
            threshold_of_layer = None if thresholds is None else thresholds[n if len(thresholds) > 1 else 0]
            rules[i] = cls(threshold_of_layer, kv_budget)
            if kv_budget is not None and kv_budget <= (always := config.window_of(i) + config.sinks_of(i)):
                raise ValueError(
                    f"`kv_budget` must exceed the window and the sinks of a layer, {always} tokens that are always "
                    f"held, got {kv_budget}."
                )
        return rules

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Retention":
        """Moves the rule to another device; accelerate's device maps call this for a layer's inputs."""
        if self.threshold is None:
            return self
        return self._replace(threshold=self.threshold.to(device, non_blocking=non_blocking))


__all__ = [
    "HAMRouter",
    "Retention",
    "check_kv_budget",
    "check_kv_usage",
    "check_threshold",
    "cosine_score",
    "error_score",
    "l2_score",
    "random_score",
    "recency_score",
    "residual_score",
    "usage_shares",
    "usage_threshold",
]
