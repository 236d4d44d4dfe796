# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checks of a forward call's arguments, and the layout of its tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.utils import logging

from .cache_file_ham import cache_contents, check_same_contents
from .cache_ham import HAMCache
from .configuration_ham import HAMConfig
from .ops_ham import exporting

logger = logging.get_logger(__name__)


# Name of the cache in calls, outputs and generation of the installed Transformers; release 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class EitherCacheName:
    """An output with the attribute `cache` under every release; Transformers itself provides `past_key_values`."""

    if CACHE_NAME != "cache":

        @property
        def cache(self) -> HAMCache | None:
            """The cache that a call filled."""
            return self.past_key_values  # type: ignore[attr-defined]


def name_cache(output: Any) -> Any:
    """Adds the attribute `cache` to one of Transformers' own outputs, under releases that name it otherwise."""
    if CACHE_NAME != "cache" and isinstance(output, ModelOutput) and not hasattr(output, "cache"):
        output.cache = output.get(CACHE_NAME)
    return output


def given_cache(cache: HAMCache | None, past_key_values: HAMCache | None) -> HAMCache | None:
    """The cache of a call that may use either name for it; raises `ValueError` if it uses both."""
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("Give the cache once: `cache` and `past_key_values` are two names of one argument.")
    if CACHE_NAME == "cache":
        logger.warning_once("`past_key_values` is deprecated, as in Transformers 5.24. Use `cache` instead.")
    return past_key_values


@dataclass
class TokenLayout:
    """Layout of a call's tokens: padding, positions and documents.

    Attributes:
        positions: `[B, T]` int64 index among the real tokens of the row's document.
        real: `[B, T]` bool, false for padding; `None` if every token is real.
        seq_idx: `[B, T]` int64 document of each token; `None` if each row is one document.
        past_real: `[B, S]` bool, the same as `real` for the tokens in the cache; `None` if all are real.
    """

    positions: torch.Tensor
    real: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    past_real: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenLayout":
        """Moves the layout to another device; accelerate's device maps call this for a layer's inputs."""
        tensors = {name: x for name, x in vars(self).items() if x is not None}
        return TokenLayout(**{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})


def token_layout(
    batch: int,
    length: int,
    device: torch.device,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: HAMCache | None,
    seq_idx: torch.Tensor | None = None,
    in_one_graph: bool = False,
) -> TokenLayout:
    """Computes the layout of `[batch, length]` new tokens from the checked arguments of `HAMModel.forward`.

    With `in_one_graph` nothing waits for values: a mask may have padding, and positions may restart.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    seen_real = None if cache is None else cache.real_tokens
    past_real = None if cache is None else cache.past_real()
    real = None
    if attention_mask is not None:
        real = attention_mask[:, seen:].bool()
        if not in_one_graph and reads_mask(attention_mask, length) and bool(real.all()):
            real = None
    positions = torch.arange(length, device=device).expand(batch, -1) if real is None else real.cumsum(1) - 1
    if seq_idx is None and position_ids is not None and length > 1:
        seq_idx = restarts(position_ids.expand(batch, -1), real, in_one_graph)
    if seen and seen_real is not None:
        return TokenLayout(positions + seen_real.to(device)[:, None], real, seq_idx, past_real)
    if seq_idx is not None:
        first = torch.searchsorted(seq_idx.contiguous(), seq_idx.contiguous())
        # Number of real tokens before each token; a document may begin with padding.
        before = positions if real is None else positions + ~real
        positions = positions - before.gather(1, first)
    return TokenLayout(positions.clamp(min=0), real, seq_idx, past_real)


def reads_mask(attention_mask: torch.Tensor, length: int) -> bool:
    """True if the host reads a mask: reading stalls a GPU, which is worth it per prompt, not per new token."""
    return (length > 1 or attention_mask.device.type == "cpu") and not exporting()


def restarts(position_ids: torch.Tensor, real: torch.Tensor | None, in_one_graph: bool = False) -> torch.Tensor | None:
    """`[B, T]` document of each token, a new one where positions of real tokens fail to rise; `None` if all rise."""
    if real is None:
        starts = F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))
    else:
        column = torch.arange(real.shape[1], device=real.device)
        # The column of the last real token before each, -1 if there is none: padding may stand between two documents.
        last = F.pad(torch.where(real, column, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
        starts = real & (last >= 0) & (position_ids <= position_ids.gather(1, last.clamp(min=0)))
    if exporting() or in_one_graph:
        # A program must serve packed rows and others alike.
        return starts.long().cumsum(1)
    documents = int(starts.sum())
    if not documents:
        return None
    tokens = torch.ones_like(starts) if real is None else real
    if documents == int((tokens.sum(1) - 1).clamp(min=0).sum()):
        # One-token documents are possible; a mistake is more likely, and nothing else in training would reveal it.
        logger.warning_once(
            "`position_ids` rise nowhere, so each token is read as a document of its own, that sees no other. Leave "
            "them out to have the tokens of a row counted."
        )
    return starts.long().cumsum(1)


def check_checkpointing(model: Any, cache: HAMCache | None) -> None:
    """Refuses a cache with gradient checkpointing, which recomputes layers and would store every token twice."""
    if cache is not None and _is_checkpointed(model):
        raise ValueError(
            "`cache` cannot be filled with gradient checkpointing, which computes layers again in the backward pass. "
            "Leave it out, or call the model under `torch.no_grad()` or after `model.eval()`."
        )


def wants_cache(model: Any, use_cache: bool | None, packed: bool, by_positions: bool) -> bool:
    """True if a call without a cache makes one: `use_cache`, or else `config.use_cache`, decides.

    Packed rows and checkpointed layers get none; a warning says so if the caller may expect one.

    Args:
        model: the `HAMModel`.
        use_cache: the argument of the call.
        packed: True if a row holds several documents.
        by_positions: True if only `position_ids` say so, by failing to rise.

    Raises:
        ValueError: for packed rows and `use_cache=True`.
    """
    wanted = model.config.use_cache if use_cache is None else use_cache
    if wanted and _is_checkpointed(model):
        if use_cache:
            logger.warning_once("`use_cache=True` cannot be combined with gradient checkpointing: there is no cache.")
        return False
    if not wanted or not packed or exporting():
        return bool(wanted)
    if use_cache:
        raise ValueError(
            "`use_cache` must be False for packed rows (`position_ids` that fail to rise, `cu_seq_lens_q` or "
            "`seq_idx`): a cache holds one document per row. Give one document per row, padded."
        )
    if by_positions and not model.training:
        logger.warning_once(
            "`position_ids` fail to rise, so each row is read as several documents, which do not see each other, and "
            "there is no cache. Give `use_cache=False` if this is meant; else leave `position_ids` out, and mark "
            "padding in `attention_mask`."
        )
    return False


def _is_checkpointed(model: Any) -> bool:
    return (
        model.training
        and torch.is_grad_enabled()
        and any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)
    )


def checked_flags(kwargs: dict[str, Any], last_n: int, config: HAMConfig) -> bool:
    """Refuses unknown keyword arguments and outputs that exclude each other; returns True if attentions are wanted."""
    known = {"output_attentions", "output_hidden_states", "output_routing_scores", "output_threshold_control"}
    known |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(f"HAMModel.forward() got unexpected keyword arguments {unknown}.")
    _check_last("last_n", last_n)
    if last_n and _is_set("output_hidden_states", kwargs.get("output_hidden_states"), config):
        raise ValueError(f"`last_n` must be 0 where hidden states are returned, got {last_n}.")
    return _is_set("output_attentions", kwargs.get("output_attentions"), config)


def last_hidden_states(
    logits_to_keep: int | torch.Tensor, output_hidden_states: bool | None, config: HAMConfig
) -> int:
    """Number of last hidden states that a head needs: 0 (all) if they are returned or chosen by index."""
    if isinstance(logits_to_keep, torch.Tensor) or _is_set("output_hidden_states", output_hidden_states, config):
        return 0
    return logits_to_keep


def _is_set(name: str, flag: bool | None, config: HAMConfig) -> bool:
    return bool(getattr(config, name) if flag is None else flag)


def check_tokens(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, config: HAMConfig
) -> tuple[int, int]:
    """Checks that exactly one of `input_ids` and `inputs_embeds` is given, and fits; returns rows and tokens."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if inputs_embeds is None:
        rows, tokens = _check_integers("input_ids", input_ids, [(None, None)], 0, config.vocab_size).shape
        return rows, tokens
    if not isinstance(inputs_embeds, torch.Tensor) or not inputs_embeds.is_floating_point():
        found = inputs_embeds.dtype if isinstance(inputs_embeds, torch.Tensor) else type(inputs_embeds).__name__
        raise TypeError(
            f"`inputs_embeds` must be a floating-point tensor [rows, tokens, {config.hidden_size}], got {found}."
        )
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size:
        raise ValueError(
            f"`inputs_embeds` must be [rows, tokens, {config.hidden_size}], got {list(inputs_embeds.shape)}."
        )
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def check_inputs(
    batch: int,
    length: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: HAMCache | None,
    config: HAMConfig,
) -> None:
    """Refuses inputs whose type or shape does not fit."""
    if batch == 0 or length == 0:
        raise ValueError("`input_ids` (or `inputs_embeds`) must hold at least one row and one token per row.")
    if cache is not None:
        _check_cache(batch, cache, config)
    seen = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            raise TypeError(f"`attention_mask` must be a tensor [batch, tokens], got {type(attention_mask).__name__}.")
        if tuple(attention_mask.shape) != (batch, seen + length):
            raise ValueError(
                f"`attention_mask` must be [{batch}, {seen + length}] (rows, tokens in the cache and new ones), got "
                f"{list(attention_mask.shape)}."
            )
        readable = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise ValueError("`attention_mask` must be 1 for real tokens and 0 for padding, got other values.")
        if cache is not None and seen and reads_mask(attention_mask, length):
            _check_past(attention_mask[:, :seen].bool(), cache.past_real())
    if position_ids is not None:
        _check_integers("position_ids", position_ids, [(batch, length), (1, length)], 0)


def _check_past(mask: torch.Tensor, past_real: torch.Tensor | None) -> None:
    """Raises `ValueError` unless a mask `[B, S]` of cached tokens marks the same padding as when they were stored."""
    expected = torch.ones_like(mask) if past_real is None else past_real.to(mask.device)
    different = (mask != expected).nonzero()
    if len(different):
        row, token = different[0].tolist()
        was, now = ("real", "padding") if expected[row, token] else ("padding", "real")
        raise ValueError(
            f"`attention_mask` contradicts `cache`: token {token} of row {row} is {now} now and was {was} when the "
            "cache took it in. Give the mask of the earlier calls (`cache.past_real()`), then that of the new tokens."
        )


def _check_cache(batch: int, cache: HAMCache, config: HAMConfig) -> None:
    if not isinstance(cache, HAMCache):
        raise TypeError(
            f"`cache` must be a HAMCache, got {type(cache).__name__}: HAMCache(model.config). Keys and values alone, "
            "such as the prefix of peft's prefix tuning, do not suffice: they have no RNN state."
        )
    if cache.config is not config:
        check_same_contents("cache", cache_contents(cache.config), config)
    if cache.is_initialized and cache.batch_size != batch:
        raise ValueError(f"`cache` holds {cache.batch_size} rows, the input {batch}.")


def check_outputs_wanted(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    loss_kwargs: dict[str, Any],
    config: HAMConfig,
) -> None:
    """Refuses labels and `logits_to_keep` that do not fit, before anything is computed."""
    batch, length = check_tokens(input_ids, inputs_embeds, config)
    ignored = loss_kwargs.get("ignore_index", -100)
    for name, x in (("labels", labels), ("shift_labels", loss_kwargs.get("shift_labels"))):
        if x is not None:
            _check_integers(name, x, [(batch, length)], 0, config.vocab_size, ignored)
    if isinstance(logits_to_keep, torch.Tensor):
        _check_integers("logits_to_keep", logits_to_keep, [(None,)], -length, length)
    else:
        _check_last("logits_to_keep", logits_to_keep, "an int or an integer tensor")


def _check_last(name: str, number: object, accepted: str = "an int") -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"`{name}` must be {accepted}, got {number!r}.")
    if number < 0:
        raise ValueError(f"`{name}` must be 0 (all) or positive (a number of last tokens), got {number}.")


def _check_integers(
    name: str,
    x: object,
    shapes: list[tuple[int | None, ...]],
    lowest: int | None = None,
    below: int | None = None,
    ignored: int | None = None,
) -> torch.Tensor:
    """Returns `x` if it is an integer tensor of one of `shapes` (`None`: any size), on the CPU with values in range.

    On a GPU the values are not checked, because reading them would stall it.
    """
    sizes = " or ".join("[" + ", ".join("any" if n is None else str(n) for n in shape) + "]" for shape in shapes)
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be an integer tensor {sizes}, got {type(x).__name__}.")
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`{name}` must be an integer tensor {sizes}, got {x.dtype}.")
    if not any(
        x.ndim == len(s) and all(n in (None, size) for n, size in zip(s, x.shape, strict=True)) for s in shapes
    ):
        raise ValueError(f"`{name}` must be {sizes}, got {list(x.shape)}.")
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return x
    values = x if ignored is None else x[x != ignored]
    if (lowest is not None and bool((values < lowest).any())) or (below is not None and bool((values >= below).any())):
        accepted = f"at least {lowest}" if below is None else f"between {lowest} and {below - 1}"
        raise ValueError(f"`{name}` must be {accepted}, got {int(values.min())} to {int(values.max())}.")
    return x


def packed_documents(kwargs: dict[str, Any], batch: int, length: int, device: torch.device) -> torch.Tensor | None:
    """`[B, T]` document of each token from `seq_idx`, `cu_seq_lens_q` or both, checked; `None` without them."""
    seq_idx, lengths, key_lengths = (kwargs.get(name) for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"))
    if seq_idx is not None:
        _check_integers("seq_idx", seq_idx, [(batch, length)])
        if not torch.compiler.is_compiling() and bool((seq_idx[:, 1:] < seq_idx[:, :-1]).any()):
            raise ValueError("`seq_idx` must not fall along a row: it numbers the documents in order.")
        seq_idx = seq_idx.long().to(device)
    if lengths is None and key_lengths is None:
        return seq_idx
    documents = _documents_of_lengths(lengths, key_lengths, batch, length, device)
    if torch.compiler.is_compiling():
        return documents
    if seq_idx is not None and not torch.equal(seq_idx.diff() > 0, documents.diff() > 0):
        raise ValueError("`seq_idx` and `cu_seq_lens_q` must begin documents at the same tokens, or give one of them.")
    return documents


def _documents_of_lengths(
    lengths: Any, key_lengths: Any, batch: int, length: int, device: torch.device
) -> torch.Tensor:
    """`[1, T]` document of each token from cumulative lengths."""
    lengths = _check_integers("cu_seq_lens_q", lengths, [(None,)])
    columns = torch.arange(length, device=device)
    if batch != 1:
        raise ValueError(f"`cu_seq_lens_q` needs a single row, got {batch} rows.")
    if torch.compiler.is_compiling():
        return (torch.searchsorted(lengths.to(device), columns, right=True) - 1).unsqueeze(0)
    if key_lengths is not None and not torch.equal(torch.as_tensor(key_lengths), lengths):
        raise ValueError("`cu_seq_lens_k` must equal `cu_seq_lens_q`: queries and keys are the same tokens.")
    ends = [0, *lengths.tolist(), length]
    if len(ends) < 4 or ends[1] != 0 or ends[-2] != length or ends != sorted(ends):
        raise ValueError(f"`cu_seq_lens_q` must rise from 0 to {length}, got {lengths.tolist()}.")
    return (torch.searchsorted(lengths.to(device), columns, right=True) - 1).unsqueeze(0)


__all__ = [
    "CACHE_NAME",
    "EitherCacheName",
    "TokenLayout",
    "check_checkpointing",
    "check_inputs",
    "check_outputs_wanted",
    "check_tokens",
    "checked_flags",
    "given_cache",
    "last_hidden_states",
    "name_cache",
    "packed_documents",
    "restarts",
    "token_layout",
    "wants_cache",
]
