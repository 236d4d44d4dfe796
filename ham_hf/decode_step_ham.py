# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""One token through a mixer in two kernels: one before attention, one after it that also appends to the cache."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .cache_layer_ham import HAMCacheLayer
from .configuration_ham import ERROR_ROUTERS, LEARNED_ROUTERS
from .inputs_ham import TokenLayout
from .layer_step_ham import LayerStep
from .ops_ham import decode_kernel
from .routing_ham import Retention

if TYPE_CHECKING:
    from .mixer_ham import HAMMixer


def has_decoding_kernels(mixer: "HAMMixer") -> bool:
    """True if the kernels of a decoding step compute this kind of layer; PyTorch computes the others."""
    return (
        mixer.has_rnn
        and mixer.shape.value_heads == mixer.shape.key_heads
        and not (mixer.has_attention and mixer.config.qk_norm == "projection")
    )


def decoding_kernels(
    mixer: "HAMMixer", hidden_states: torch.Tensor, tokens: TokenLayout, cache: HAMCacheLayer, appends: bool
) -> tuple[Callable[..., Any], Callable[..., Any] | None] | None:
    """The kernels for a single token, before attention and, if it `appends`, after it; `None` if PyTorch computes it.

    Args:
        hidden_states: `[B, T, D]`.
        tokens: the layout of the new tokens.
        cache: the layer's cache.
        appends: False if the host appends, because a full head drops tokens or an offloaded layer moves its pages.
    """
    one_token = hidden_states.shape[1] == 1 and tokens.seq_idx is None
    if not one_token or not has_decoding_kernels(mixer) or mixer.training or not cache.kernels_may_write:
        return None
    if cache.conv_state is None or cache.recurrent_state is None:
        return None
    # accelerate loads an offloaded weight only while the module that owns it runs.
    if mixer.conv.weight.is_meta:
        return None
    # Quantized projections may output another dtype than the convolution has, which PyTorch promotes.
    if cache.conv_state.dtype != mixer.conv.weight.dtype:
        return None
    update = decode_kernel("decode_update", cache.recurrent_state)
    if update is None:
        return None
    return update, decode_kernel("decode_mix_append", cache.recurrent_state) if appends else None


def decode_step(
    mixer: "HAMMixer",
    kernels: tuple[Callable[..., Any], Callable[..., Any] | None],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    tokens: TokenLayout,
    cache: HAMCacheLayer,
    retention: Retention,
) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
    """`HAMMixer.forward` for a single token: a kernel before attention and, if there is one, a kernel after it.

    With the second kernel nothing waits for the host while the cache has reserved pages left.
    """
    update, append = kernels
    x = hidden_states.squeeze(1)
    real = None if tokens.real is None else tokens.real.squeeze(1).contiguous()
    out = update(
        torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1),
        (cache.conv_state, mixer.conv.weight),
        (mixer.a_proj(x), mixer.b_proj(x), mixer.A_log.float(), mixer.dt_bias.float()),
        cache.recurrent_state,
        real=real,
        allow_neg_eigval=mixer.config.allow_neg_eigval,
        **_attention_arguments(mixer, hidden_states, position_embeddings, tokens, retention.threshold),
    )
    scores, o_kv = None, None
    if mixer.has_attention:
        q, k, v, scores, keep = (y.unsqueeze(1) for y in out[1:])
        o_kv = mixer.attend_kept(q, k, v, keep, scores, tokens, cache, retention.budget)
    if append is not None:
        mixed = _mix_and_append(mixer, append, x, out, o_kv, real, tokens, cache)
        return mixed.unsqueeze(1), None, scores, None
    stored: dict[str, Any] = {}
    if scores is not None:
        stored = {"keys": k, "values": v, "scores": mixer.with_sinks(scores, tokens), "keep": keep}
    states: dict[str, Any] = {"conv_state": cache.conv_state, "recurrent_state": cache.recurrent_state}
    cache.update(LayerStep(tokens.positions, tokens.real, **states, **stored), retention.budget)
    return mixer.mix(hidden_states, out.o.unsqueeze(1), o_kv), None, scores, None


def _attention_arguments(
    mixer: "HAMMixer",
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    tokens: TokenLayout,
    threshold: torch.Tensor | None,
) -> dict[str, Any]:
    """The first kernel's groups `routing` and `view`; a layer without attention has neither."""
    config = mixer.config
    if not mixer.has_attention:
        return {}
    score, given, error_weight = config.router, None, None
    if config.router not in ERROR_ROUTERS:
        given = mixer.router.without_state(hidden_states, tokens.positions).squeeze(1)
        if config.router == "learned_error":
            error_weight = mixer.router.error_weight.float()
        else:
            score = "given"
    norm_weights = (mixer.q_norm.scale, mixer.k_norm.scale) if config.qk_norm else None
    rope = position_embeddings and tuple(angle.squeeze(1).contiguous() for angle in position_embeddings)
    scale_values = config.router in LEARNED_ROUTERS
    threshold = mixer.threshold_in_force(threshold, hidden_states.device)
    positions = tokens.positions.squeeze(1).contiguous()
    return {
        "routing": (threshold, score, given, error_weight, positions, mixer.sinks),
        "view": (norm_weights, rope, config.attention_conv, scale_values, config.rms_norm_eps),
    }


def _mix_and_append(
    mixer: "HAMMixer",
    kernel: Callable[..., Any],
    x: torch.Tensor,
    update: tuple[torch.Tensor, ...],
    o_kv: torch.Tensor | None,
    real: torch.Tensor | None,
    tokens: TokenLayout,
    cache: HAMCacheLayer,
) -> torch.Tensor:
    """Mixes a single token `[B, D]` in a kernel that also appends it to the cache."""
    config = mixer.config
    attention: dict[str, Any] = {}
    if o_kv is not None:
        attention["o_kv"] = o_kv.squeeze(1)
        attention["gates"] = (mixer.rnn_gate_proj(x), mixer.kv_gate_proj(x))
    mixed = kernel(
        update,
        tokens.positions.squeeze(1).contiguous(),
        cache.real_tokens,
        real=real,
        norm_weights=(
            mixer.rnn_norm.weight if config.rnn_output_norm else None,
            mixer.kv_norm.weight if mixer.has_attention and config.kv_output_norm else None,
        ),
        output_gate=None if mixer.output_gate is None else mixer.z_proj(x),
        gate_activation=mixer.output_gate or "silu",
        pages=cache.open_pages(),
        eps=config.rms_norm_eps if config.output_norm_eps is None else config.output_norm_eps,
        window=None if cache.recent is None else tuple(cache.recent.tensors()),
        sinks=mixer.sinks,
        **attention,
    )
    cache.count_step()
    return mixer.o_proj(mixed)


__all__ = ["decode_step", "decoding_kernels", "has_decoding_kernels"]
