# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Routing arguments of requests: `threshold`, `kv_usage` and `kv_budget` in vLLM's `extra_args` (`vllm_xargs`)."""

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from ...configuration_ham import HAMConfig
from ...conversion.shards import find_weights
from ...generation_ham import ROUTING_ARGUMENTS, first_routing
from ...loading_ham import open_weights
from ...routing_ham import NUM_QUANTILES, Retention

# Arguments of vLLM's own that travel in the same place.
OTHER_ARGUMENTS = ("kv_transfer_params", "ec_transfer_params")


def routing_of(extra_args: dict[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """The routing arguments in force for a request: its own, then the server's."""
    return first_routing(extra_args or {}, defaults)


def expected_usage(config: HAMConfig, routing: dict[str, Any]) -> float:
    """The fraction of tokens that a request is expected to keep: asked for, or what the thresholds were trained for.

    A threshold that is not learned says little before its scores are seen: at most 0 keeps all, above 1 nothing.
    """
    if routing.get("kv_usage") is not None:
        return float(routing["kv_usage"])
    threshold = routing.get("threshold", config.fixed_threshold)
    if threshold is not None:
        thresholds = threshold if isinstance(threshold, list) else [threshold]
        if thresholds and (max(thresholds) <= 0 or min(thresholds) > 1):
            return float(max(thresholds) <= 0)
    target = config.target_kv_usage
    targets = target if isinstance(target, list) else [1.0 if target is None else target]
    return sum(targets) / len(targets) if targets else 1.0


@dataclass
class Served:
    """The served checkpoint, against which requests are checked.

    Attributes:
        config: of the model.
        defaults: routing arguments of requests that give none.
        model, revision: a folder, or a repository of the Hub and its revision.
        takes_others: true if `extra_args` may hold arguments of other logits processors.
    """

    config: HAMConfig
    defaults: dict[str, Any]
    model: str
    revision: str | None = None
    takes_others: bool = False

    @cached_property
    def quantiles(self) -> list[torch.Tensor]:
        """The score quantiles `[Hk, Q]` of each hybrid layer, from the checkpoint's files; zero if it has none."""
        folder = Path(self.model)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(snapshot_download(self.model, revision=self.revision, allow_patterns=patterns))
        found: dict[str, torch.Tensor] = {}
        for path in find_weights(folder):
            with open_weights(path) as file:
                names = [name for name in file.keys() if name.endswith(".score_quantiles")]  # noqa: SIM118, not a dict
                found |= {name: file.get_tensor(name) for name in names}
        hybrid = [i for i, kind in enumerate(self.config.layer_types) if kind == "hybrid"]
        none = torch.zeros(self.config.num_key_value_heads, NUM_QUANTILES)
        return [found.get(f"model.layers.{i}.mixer.score_quantiles", none) for i in hybrid]

    def check(self, extra_args: dict[str, Any] | None) -> None:
        """Raises `ValueError` for arguments that the model would refuse, and for unknown ones."""
        unknown = sorted(set(extra_args or {}) - {*ROUTING_ARGUMENTS, *OTHER_ARGUMENTS})
        if unknown and not self.takes_others:
            similar = difflib.get_close_matches(unknown[0], ROUTING_ARGUMENTS, n=1)
            hint = f" Is `{similar[0]}` meant?" if similar else ""
            raise ValueError(f"`vllm_xargs` takes {', '.join(ROUTING_ARGUMENTS)}, got {unknown[0]!r}.{hint}")
        routing = routing_of(extra_args, self.defaults)
        quantiles = [] if routing.get("kv_usage") is None else self.quantiles
        try:
            Retention.resolve(self.config, quantiles, 1, **routing)
        except TypeError as error:
            # vLLM answers a ValueError with HTTP 400, anything else with 500.
            raise ValueError(str(error)) from error


class HAMArguments(LogitsProcessor):
    """Refuses requests with routing arguments that do not fit; it leaves logits alone.

    vLLM gives plugins no other way to check the arguments of a request where it arrives, before it is queued.
    """

    # Set by `HAMSettings` in the process that takes requests in: `validate_params` is given nothing else.
    served: Served | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises `ValueError` for a request that the model would refuse."""
        if cls.served is None:
            raise ValueError("`HAMArguments` checks requests of a HAM model, and none is served by this process.")
        cls.served.check(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns `logits` unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """True, so that vLLM leaves it out where it can."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Keeps no state."""
