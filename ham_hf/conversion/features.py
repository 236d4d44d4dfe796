# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Properties that several sources share: fields of their configurations, and features that HAM lacks."""

from typing import Any

from ..configuration_ham import HAMConfig

# Layer types of hybrids of Gated DeltaNet and attention, and the HAM's layer types for them.
LAYER_TYPES = {"linear_attention": "linear_attention", "full_attention": "hybrid"}
SAME_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "initializer_range",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
TRANSFORMER_FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
LINEAR_FIELDS = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip


def same_fields(config: Any, *others: str) -> dict[str, Any]:
    """Fields that a source shares with a HAM's configuration by name: those of every source, and `others`."""
    fields = {name: getattr(config, name) for name in (*SAME_FIELDS, *others)}
    # Old configurations mean "none" by -1.
    if fields["pad_token_id"] == -1:
        fields["pad_token_id"] = None
    return fields


def sliding_windows(config: Any) -> list[int]:
    """The sliding window of each layer of a Transformer, 0 for one that sees everything the model was made for."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return [0] * layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if layer_type == "sliding_attention" else 0 for layer_type in types]


def hold_recent_tokens(config: HAMConfig, window: int, sinks: int) -> None:
    """Gives a HAM's layers a window and sinks, except those that have the sliding window of their source."""
    slides = config.attention_window
    if isinstance(slides, list):
        config.attention_sinks = [0 if own else sinks for own in slides]
        config.attention_window = [own or window for own in slides]
    else:
        config.attention_window, config.attention_sinks = window, sinks


def check_partial_rotation(config: Any) -> None:
    """Raises `ValueError` for heads that rotate in part, in sources that support this for some kinds of RoPE only."""
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ValueError(
            f"`partial_rotary_factor` must be 1.0, got {factor}: {config.model_type} reads it for some kinds only."
        )


def check_linear_hybrid(config: Any) -> None:
    """Raises `ValueError` for features of hybrids of Gated DeltaNet and attention that a HAM lacks."""
    for layer_type in config.layer_types:
        if layer_type not in LAYER_TYPES:
            raise ValueError(
                f"`layer_types` must hold only {' and '.join(LAYER_TYPES)}, got {layer_type!r}, which this script "
                "does not convert."
            )
    if config.hidden_act != "silu":
        raise ValueError(
            f"`hidden_act` must be 'silu', got {config.hidden_act!r}: the source uses it in the convolution of linear "
            "layers as well, where HAM has silu."
        )
