# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Hybrid Associative Memory models (arXiv 2603.22325): the mixer with its two memories, the decoder and the heads."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_ham import HAMCache, HAMCacheLayer, LayerStep, attend_new
from .configuration_ham import ERROR_ROUTERS, LEARNED_ROUTERS, HAMConfig
from .generation_ham import HAMGenerationMixin, with_routing
from .inputs_ham import (
    CACHE_NAME,
    EitherCacheName,
    TokenLayout,
    check_checkpointing,
    check_inputs,
    check_outputs_wanted,
    check_tokens,
    checked_flags,
    given_cache,
    last_hidden_states,
    name_cache,
    packed_documents,
    token_layout,
    wants_cache,
)
from .loading_ham import HAMLoadingMixin, warn_of_untested_transformers
from .ops_ham import (
    decode_kernel,
    exporting,
    gated_delta_rule_with_prediction,
    l2norm,
    rms_norm,
    rotated,
    short_convolution,
)
from .routing_ham import (
    NUM_QUANTILES,
    HAMRouter,
    check_kv_budget,
    check_kv_usage,
    check_threshold,
    error_score,
    threshold_gradients,
    usage_threshold,
    widened,
)

try:
    from ham_hf.hub.push import push_model
except ImportError:  # this file as remote code, where the package is not installed
    push_model = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# The learned threshold of a fresh model: the score of a token of which the RNN predicts nothing.
INITIAL_THRESHOLD = 0.5
OUTPUT_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
# Parameters and buffers that stay float32: bfloat16 would move a threshold by up to 0.002, and with it the kept set.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "threshold", "score_quantiles")
# What the loss function reads; anything else would be dropped in silence.
LOSS_ARGUMENTS = {"shift_labels", "num_items_in_batch", "ignore_index"}


@dataclass
class HAMModelOutputWithPast(EitherCacheName, BaseModelOutputWithPast):  # type: ignore[misc]
    """Output of `HAMModel`: Transformers' output of a decoder, and what HAM adds.

    Attributes:
        last_hidden_state: `[B, T, D]`, or of as many tokens as were to be kept.
        cache: the `HAMCache`, or `None` without one.
        hidden_states: with `output_hidden_states=True`, one `[B, T, D]` per layer and the embeddings.
        attentions: with `output_attentions=True`, `[B, H, T, S]` per layer with attention; tokens not kept are zero.
        routing_scores: with `output_routing_scores=True`, `[B, T, Hk]` float32 in `[0, 1]` per hybrid layer.
        threshold_control: with `output_threshold_control=True` in training, `[2 + B, Hk]` per hybrid layer: zeros that
            carry the thresholds' gradients, the thresholds, and how many tokens each row kept.
    """

    routing_scores: tuple[torch.Tensor, ...] | None = None
    threshold_control: tuple[torch.Tensor, ...] | None = None


@dataclass
class HAMCausalLMOutputWithPast(EitherCacheName, CausalLMOutputWithPast):  # type: ignore[misc]
    """Output of `HAMForCausalLM`: scalar loss, logits `[B, T, vocabulary]` and what `HAMModelOutputWithPast` holds."""

    routing_scores: tuple[torch.Tensor, ...] | None = None


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor, tokens: TokenLayout, cache: HAMCacheLayer | None
) -> torch.Tensor:
    """Dense weights `[B, H, T, S]`, formed when asked for: over all tokens seen, zero where one was not kept.

    Args:
        q: `[B, T, H, K]`; k: `[B, T, Hk, K]`; keep: `[B, T, Hk]` bool.
        tokens: the layout of the new tokens.
        cache: the layer's cache before this call, or `None`.
    """
    length, key_dim = q.shape[1], q.shape[3]
    t = torch.arange(length, device=q.device)
    visible = (t[:, None] > t) & keep.permute(0, 2, 1)[:, :, None]
    if tokens.seq_idx is not None:
        visible = visible & (tokens.seq_idx[:, :, None] == tokens.seq_idx[:, None])[:, None]
    visible = visible | (t[:, None] == t)
    keys = k.transpose(1, 2)
    if cache is not None and cache.seen_tokens:
        held, held_visible = cache.dense_keys(tokens.past_real)
        keys = torch.cat([held, keys], dim=2)
        visible = torch.cat([held_visible[:, :, None].expand(-1, -1, length, -1), visible], dim=-1)
    q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))
    logits = (q @ keys.unsqueeze(2).mT).float() * key_dim**-0.5
    return logits.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1).flatten(1, 2).to(q.dtype)


def weighted_sum(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The values `[B, S, Hk, V]` that dense weights `[B, H, T, S]` select: `[B, T, H, V]`, as `attend_new` gives."""
    weights = weights.unflatten(1, (v.shape[2], -1))
    return (weights @ v.transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2)


class AddGradient(torch.autograd.Function):
    """Hands `x` on and gives `lever` the gradient `gradient` once a loss, of whatever scale, reaches `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lever: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, *ctx.saved_tensors, None


class HAMShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU; `weight` is `[C, W]`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))

    def forward(
        self,
        x: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return short_convolution(x, self.weight, initial_state, real, seq_idx)


class HAMRMSNorm(nn.RMSNorm):
    """RMSNorm of `[..., D]`, in the dtype of its weight; a `zero_centered` weight holds what is added to 1.

    Autocast narrows what projections put out; of two dtypes PyTorch's norm would warn, and give the narrower one.
    """

    eps: float

    def __init__(self, size: int, eps: float, zero_centered: bool = False):
        self.zero_centered = zero_centered
        super().__init__(size, eps)

    def reset_parameters(self) -> None:
        """Starts as a norm without a weight."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    @property
    def scale(self) -> torch.Tensor:
        """What the normalised input is multiplied with, `[D]`; the sum is widened, as bfloat16 would round it."""
        return 1 + widened(self.weight) if self.zero_centered else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.zero_centered:
            return rms_norm(x.to(self.weight.dtype), self.weight, self.eps)
        return rms_norm(x.to(self.scale.dtype), self.scale, self.eps).to(self.weight.dtype)


class HAMRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE of all or a part of each head: cosines and sines `[B, T, K]` that turn the first dimensions of each half.

    Pairs are `(i, i + K / 2)` whatever the part, so what rotates a whole head rotates this one too; a pair that stays
    has cosine 1 and sine 0. `partial_rotary_order` leads here from the layout in which the rotated dimensions are the
    first of the head.
    """

    @staticmethod
    def compute_default_rope_parameters(
        config: Any, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """The frequencies `[rotated / 2]`, as in Transformers' Qwen3-Next, and a scale of 1."""
        rope = config.rope_parameters
        dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return (1.0 / rope["rope_theta"] ** exponents).to(device), 1.0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().forward(x, position_ids)
        still = (self.config.head_dim - cos.shape[-1]) // 2
        if not still:
            return cos, sin
        halves = cos.unflatten(-1, (2, -1)), sin.unflatten(-1, (2, -1))
        return F.pad(halves[0], (0, still), value=1.0).flatten(-2), F.pad(halves[1], (0, still)).flatten(-2)


def partial_rotary_order(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Where each dimension of a head of `HAMRotaryEmbedding` stands in the usual layout, `[head_dim]` int64.

    Usual is that the first `rotary_dim` dimensions rotate, in pairs `(i, i + rotary_dim / 2)`. Queries and keys in the
    order given here have the same products, so this converts a checkpoint: `weight.unflatten(0, (-1, head_dim))[:,
    order].flatten(0, 1)` of the q and k projections and of their biases, `weight[order]` of a QK-norm per head.
    """
    rotated, still = rotary_dim // 2, (head_dim - rotary_dim) // 2
    parts = torch.arange(head_dim).split([rotated, rotated, still, still])
    return torch.cat([parts[0], parts[2], parts[1], parts[3]])


class HAMMixer(nn.Module):
    """Token mixer of a layer: a Gated DeltaNet over all tokens, attention over those it predicts badly, and their mix.

    A `"linear_attention"` layer has only the first memory, a `"full_attention"` layer only the second, which then
    keeps all.
    """

    score_quantiles: torch.Tensor

    def __init__(self, config: HAMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.has_rnn = self.layer_type != "full_attention"
        self.has_attention = self.layer_type != "linear_attention"
        self.has_conv = self.has_rnn or config.attention_conv
        gate = config.output_gate
        if self.layer_type == "linear_attention" and config.linear_output_gate is not None:
            gate = config.linear_output_gate
        self.output_gate = "silu" if gate is True else gate or None
        hidden, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        out_norm_eps = eps if config.output_norm_eps is None else config.output_norm_eps
        self.shape = config.layer_shape(self.layer_type)
        self.sizes = self.shape.channels
        heads, key_heads, value_heads, key_dim, value_dim = self.shape

        self.q_proj = nn.Linear(hidden, self.sizes[0], bias=bias)
        self.k_proj = nn.Linear(hidden, self.sizes[1], bias=bias)
        self.v_proj = nn.Linear(hidden, self.sizes[2], bias=bias)
        self.o_proj = nn.Linear(self.shape.out_channels, hidden, bias=bias)
        if self.has_conv:
            self.conv = HAMShortConvolution(sum(self.sizes), config.conv_kernel_size)
        if self.output_gate is not None:
            self.z_proj = nn.Linear(hidden, self.shape.out_channels, bias=False)
        if self.has_rnn:
            self.a_proj = nn.Linear(hidden, value_heads, bias=False)
            self.b_proj = nn.Linear(hidden, value_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
            self.rnn_norm = HAMRMSNorm(value_dim, out_norm_eps) if config.rnn_output_norm else nn.Identity()
        if self.has_attention:
            normed = self.sizes if config.qk_norm == "projection" else [key_dim, key_dim]
            centered = config.zero_centered_norms
            self.q_norm = HAMRMSNorm(normed[0], eps, centered) if config.qk_norm else nn.Identity()
            self.k_norm = HAMRMSNorm(normed[1], eps, centered) if config.qk_norm else nn.Identity()
            self.kv_norm = HAMRMSNorm(value_dim, out_norm_eps) if config.kv_output_norm else nn.Identity()
        if self.layer_type == "hybrid":
            self.rnn_gate_proj = nn.Linear(hidden, heads)
            self.kv_gate_proj = nn.Linear(hidden, heads)
            self.router = HAMRouter(config, layer_idx)
            threshold = torch.empty(key_heads, dtype=torch.float32)
            self.threshold = nn.Parameter(threshold, requires_grad=self.learns_threshold)
            self.register_buffer("score_quantiles", torch.zeros(key_heads, NUM_QUANTILES, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts as PyTorch does, but leaves in float32 what bfloat16 would move: `FLOAT32_PARAMETERS`."""
        # A parametrization moves a parameter into a module of its own, under a longer name.
        named = [*self.named_parameters(), *self.named_buffers()]
        own = [x for name, x in named if not set(FLOAT32_PARAMETERS).isdisjoint(name.split("."))]
        kept = {id(x) for tensor in own for x in (tensor, tensor.grad)}

        def cast(x: torch.Tensor) -> torch.Tensor:
            out = fn(x)
            narrowed = id(x) in kept and out.is_floating_point() and out.dtype.itemsize < torch.float32.itemsize
            return x.to(out.device, torch.float32) if narrowed else out

        return super()._apply(cast, recurse)

    @property
    def learns_threshold(self) -> bool:
        """True if training moves the threshold: one that the configuration fixes takes no part in it."""
        return self.config.threshold is None

    @property
    def has_decoding_kernels(self) -> bool:
        """Whether the kernels of a decoding step compute what this layer does; PyTorch computes the others."""
        return (
            self.has_rnn
            and self.shape.value_heads == self.shape.key_heads
            and not (self.has_attention and self.config.qk_norm == "projection")
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: TokenLayout,
        cache: HAMCache | None = None,
        threshold: torch.Tensor | None = None,
        kv_budget: int | None = None,
        output_attentions: bool = False,
        outputs_to_keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Mixes tokens.

        Args:
            hidden_states: `[B, T, D]` normalised input.
            position_embeddings: cosines and sines `[B or 1, T, K]` of RoPE, or `None`.
            tokens: which tokens are real, their positions and documents.
            cache: the cache to read and fill.
            threshold: `[B or 1, Hk or 1]`; the learned one if `None`.
            kv_budget: kept tokens a head of a hybrid layer may hold, or `None`.
            output_attentions: whether to form the attention weights, which takes memory quadratic in `T`.
            outputs_to_keep: the number `n` of last tokens whose output is wanted; all if `None`.

        Returns:
            `[B, n, D]` output, `[B, H, T, S]` attention weights or `None`, `[B, T, Hk]` routing scores or `None`, and,
            while the threshold is learned, `[2 + B, Hk]`: a zero that carries the threshold's gradient, the threshold,
            and how many tokens each row kept.
        """
        layer_cache = None if cache is None else cache.layers[self.layer_idx]
        offloaded = cache is not None and cache.offload_layers
        if layer_cache is not None and offloaded:
            layer_cache.prefetch()
        if self.layer_type != "hybrid":
            kv_budget = None
        if layer_cache is not None and not output_attentions:
            # A full head drops tokens, and an offloaded layer moves its pages: then the host appends.
            kernels = self._decoding_kernels(hidden_states, tokens, layer_cache, kv_budget is None and not offloaded)
            if kernels is not None:
                if cache is not None and kernels[1] is not None:
                    cache.reserve(self.layer_idx)
                out = self._decode(
                    kernels, hidden_states, position_embeddings, tokens, layer_cache, threshold, kv_budget
                )
                if offloaded:
                    layer_cache.offload()
                return out
        step = LayerStep(positions=tokens.positions, real=tokens.real)
        raw = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)
        if layer_cache is not None:
            layer_cache.accept(raw)
        convolved = raw
        if self.has_conv:
            step.conv_inputs = raw
            state = None if layer_cache is None else layer_cache.conv_state
            convolved, step.conv_state = self.conv(raw, state, tokens.real, tokens.seq_idx)

        o_rnn = o_kv = weights = scores = None
        q, k, v = self._heads(convolved)
        if self.has_rnn:
            o_rnn, errors = self._recall(hidden_states, q, k, v, tokens, layer_cache, step)
        if self.layer_type == "hybrid":
            scores = self.router(hidden_states, errors, tokens.positions)
        if self.has_attention:
            q, k, v = self._heads(convolved if self.config.attention_conv else raw)
            if scores is not None and self.config.router in LEARNED_ROUTERS:
                v = self._scale_values(v, scores)
            # Under autocast norms and rotation widen, and a cache holds keys and values of one dtype.
            q, k = (x.to(v.dtype) for x in self._attention_view(q, k, position_embeddings))
            if layer_cache is not None:
                layer_cache.accept(raw, k)
            routed, keep = self._route(scores, k, threshold, tokens)
            step.keys, step.values, step.scores, step.keep = k, v, routed, keep
            if output_attentions or exporting():
                weights = attention_weights(q, k, keep, tokens, layer_cache)
            # Weights that are asked for are part of the graph, but for those of a filled cache, whose pages are read
            # as they lie; and on how many tokens are kept the shapes of an exported program must not depend.
            if weights is not None and (layer_cache is None or not layer_cache.seen_tokens):
                o_kv = weighted_sum(weights, v)
            else:
                if outputs_to_keep is not None and (layer_cache is None or layer_cache.store is None):
                    q = q[:, -outputs_to_keep:]
                o_kv = self._attend(q, k, v, keep, routed, tokens, layer_cache, kv_budget)
        if layer_cache is not None:
            layer_cache.update(step, kv_budget)
            if offloaded:
                layer_cache.offload()
        control = None
        if self.training and self.layer_type == "hybrid" and threshold is None:
            control = self._control(keep)
        if outputs_to_keep is not None:
            hidden_states = hidden_states[:, -outputs_to_keep:]
            o_rnn, o_kv = (None if x is None else x[:, -outputs_to_keep:] for x in (o_rnn, o_kv))
        return self._mix(hidden_states, o_rnn, o_kv), weights if output_attentions else None, scores, control

    def _decoding_kernels(
        self, hidden_states: torch.Tensor, tokens: TokenLayout, cache: HAMCacheLayer, appends: bool
    ) -> tuple[Callable[..., Any], Callable[..., Any] | None] | None:
        """The kernels of a single token, where there are any: before attention and, if it `appends`, after it."""
        one_token = hidden_states.shape[1] == 1 and tokens.seq_idx is None
        # They update the states in place, which a cache that is to be rolled back needs as they were.
        if not one_token or not self.has_decoding_kernels or self.training or cache.record_past:
            return None
        if cache.conv_state is None or cache.recurrent_state is None:
            return None
        # What accelerate offloads is there only while the module that owns it runs.
        if self.conv.weight.is_meta:
            return None
        # Quantized projections may put out another type than the convolution has, which PyTorch promotes.
        if cache.conv_state.dtype != self.conv.weight.dtype:
            return None
        update = decode_kernel("decode_update", cache.recurrent_state)
        if update is None:
            return None
        return update, decode_kernel("decode_mix_append", cache.recurrent_state) if appends else None

    def _decode(
        self,
        kernels: tuple[Callable[..., Any], Callable[..., Any] | None],
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: TokenLayout,
        cache: HAMCacheLayer,
        threshold: torch.Tensor | None,
        kv_budget: int | None,
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        """`forward` for a single token, in kernels: what comes before attention and, if there is one, what follows.

        With the second kernel nothing waits for the host while the cache has room `reserve`d.
        """
        update, append = kernels
        x = hidden_states.squeeze(1)
        real = None if tokens.real is None else tokens.real.squeeze(1).contiguous()
        out = update(
            torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1),
            cache.conv_state,
            self.conv.weight,
            self.a_proj(x),
            self.b_proj(x),
            self.A_log.float(),
            self.dt_bias.float(),
            cache.recurrent_state,
            real=real,
            allow_neg_eigval=self.config.allow_neg_eigval,
            **self._decoding_attention(hidden_states, position_embeddings, tokens, threshold),
        )
        scores, o_kv = None, None
        if self.has_attention:
            q, k, v, scores, keep = (y.unsqueeze(1) for y in out[1:])
            o_kv = self._attend(q, k, v, keep, scores, tokens, cache, kv_budget)
        if append is not None:
            mixed = self._mix_and_append(append, x, out, o_kv, real, tokens, cache)
            return mixed.unsqueeze(1), None, scores, None
        step = LayerStep(tokens.positions, tokens.real)
        if self.has_attention:
            step.keys, step.values, step.scores, step.keep = k, v, scores, keep
        step.conv_state, step.recurrent_state = cache.conv_state, cache.recurrent_state
        cache.update(step, kv_budget)
        return self._mix(hidden_states, out.o.unsqueeze(1), o_kv), None, scores, None

    def _decoding_attention(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: TokenLayout,
        threshold: torch.Tensor | None,
    ) -> dict[str, Any]:
        """What the kernel of a single token wants to know of the layer's attention, and of what it keeps."""
        config = self.config
        if not self.has_attention:
            return {"threshold": None, "score": None}
        arguments: dict[str, Any] = {"score": config.router}
        if config.router not in ERROR_ROUTERS:
            arguments["given"] = self.router.without_state(hidden_states, tokens.positions).squeeze(1)
            arguments["scale_values"] = config.router in LEARNED_ROUTERS
            if config.router == "learned_error":
                arguments["error_weight"] = self.router.error_weight.float()
            else:
                arguments["score"] = "given"
        return arguments | {
            "threshold": self._threshold(threshold, hidden_states.device),
            "norm_weights": (self.q_norm.scale, self.k_norm.scale) if config.qk_norm else None,
            "rope": position_embeddings and tuple(angle.squeeze(1).contiguous() for angle in position_embeddings),
            "attention_conv": config.attention_conv,
            "eps": config.rms_norm_eps,
        }

    def _mix_and_append(
        self,
        kernel: Callable[..., Any],
        x: torch.Tensor,
        update: tuple[torch.Tensor, ...],
        o_kv: torch.Tensor | None,
        real: torch.Tensor | None,
        tokens: TokenLayout,
        cache: HAMCacheLayer,
    ) -> torch.Tensor:
        """`_mix` of a single token `[B, D]`, in a kernel that also gives the cache what it is to hold of the token."""
        config = self.config
        attention: dict[str, Any] = {}
        if o_kv is not None:
            attention["o_kv"] = o_kv.squeeze(1)
            attention["gates"] = (self.rnn_gate_proj(x), self.kv_gate_proj(x))
        mixed = kernel(
            update,
            tokens.positions.squeeze(1),
            cache.real_tokens,
            real=real,
            norm_weights=(
                self.rnn_norm.weight if config.rnn_output_norm else None,
                self.kv_norm.weight if self.has_attention and config.kv_output_norm else None,
            ),
            output_gate=None if self.output_gate is None else self.z_proj(x),
            gate_activation=self.output_gate or "silu",
            pages=cache.open_pages(),
            eps=config.rms_norm_eps if config.output_norm_eps is None else config.output_norm_eps,
            **attention,
        )
        cache.count_step()
        return self.o_proj(mixed)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits `[B, T, C]` into `[B, T, heads, dim]` queries, keys and values."""
        key_dim, value_dim = self.shape.key_dim, self.shape.value_dim
        q, k, v = qkv.split(self.sizes, -1)
        return q.unflatten(-1, (-1, key_dim)), k.unflatten(-1, (-1, key_dim)), v.unflatten(-1, (-1, value_dim))

    def _recall(
        self,
        hidden_states: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tokens: TokenLayout,
        cache: HAMCacheLayer | None,
        step: LayerStep,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the RNN: its output `[B, T, H, V]`, and the score of its prediction if the layer's router reads one."""
        beta = widened(self.b_proj(hidden_states)).sigmoid()
        if self.config.allow_neg_eigval:
            beta = 2 * beta
        g = -widened(self.A_log).exp() * F.softplus(widened(self.a_proj(hidden_states)) + widened(self.dt_bias))
        if tokens.real is not None:
            beta, g = (x.masked_fill(~tokens.real[..., None], 0) for x in (beta, g))
        q, k = l2norm(q), l2norm(k)
        if self.shape.value_heads > self.shape.key_heads:
            q, k = (x.repeat_interleave(self.shape.value_heads // self.shape.key_heads, dim=2) for x in (q, k))
        step.rnn = (k, v, g, beta)
        state = None if cache is None else cache.recurrent_state
        score = self.router.error if self.layer_type == "hybrid" else None
        # A learned router's error is part of what it computes: then it has a gradient, which a score of the op lacks.
        in_graph = self.config.router in LEARNED_ROUTERS and torch.is_grad_enabled()
        o_rnn, errors, step.recurrent_state = gated_delta_rule_with_prediction(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            seq_idx=tokens.seq_idx,
            score=None if in_graph else score,
            predict=bool(score),
        )
        if in_graph and score is not None and errors is not None:
            errors = error_score(score, v, errors, beta, in_graph=True)
        return o_rnn.to(hidden_states.dtype), errors

    def _scale_values(self, v: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The values `[B, T, Hk, V]` as attention reads them: a learned score has its gradient from them."""
        return v * scores[..., None].to(v.dtype)

    def _attention_view(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.qk_norm == "projection":
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is None:
            return q, k
        cos, sin = (x.unsqueeze(2) for x in position_embeddings)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    def _route(
        self, scores: torch.Tensor | None, k: torch.Tensor, threshold: torch.Tensor | None, tokens: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores `[B, T, Hk]` float32 that rank tokens, and which are kept; without a router all are, at 1."""
        if scores is None:
            scores = torch.ones(k.shape[:3], dtype=torch.float32, device=k.device)
            keep = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
        else:
            scores = scores.detach().float()
            keep = scores >= self._threshold(threshold, scores.device)[:, None]
        if tokens.real is not None:
            keep = keep & tokens.real[..., None]
        return scores, keep

    def _threshold(self, threshold: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        return self.threshold.detach().float()[None] if threshold is None else threshold.to(device)

    def _control(self, keep: torch.Tensor) -> torch.Tensor:
        """What the control loop needs; formed here: a sharded parameter is whole only inside its module's forward."""
        threshold = self.threshold.float()
        return torch.cat([torch.stack([threshold - threshold.detach(), threshold.detach()]), keep.sum(1).float()])

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keep: torch.Tensor,
        scores: torch.Tensor,
        tokens: TokenLayout,
        cache: HAMCacheLayer | None,
        kv_budget: int | None,
    ) -> torch.Tensor:
        if cache is None:
            return attend_new(q, k, v, keep, scores, kv_budget, seq_idx=tokens.seq_idx)
        if kv_budget is not None:
            cache.enforce_budget(kv_budget)
        return cache.attend(q, k, v, keep, scores, kv_budget)

    def _mix(self, hidden_states: torch.Tensor, o_rnn: torch.Tensor | None, o_kv: torch.Tensor | None) -> torch.Tensor:
        """Gates, adds and projects the `[B, T, H, V]` outputs of the memories."""
        if self.layer_type == "hybrid":
            mixed = self.rnn_gate_proj(hidden_states).sigmoid()[..., None] * self.rnn_norm(o_rnn)
            mixed = mixed + self.kv_gate_proj(hidden_states).sigmoid()[..., None] * self.kv_norm(o_kv)
        else:
            mixed = self.rnn_norm(o_rnn) if self.has_rnn else self.kv_norm(o_kv)
        mixed = mixed.flatten(2)
        if self.output_gate is not None:
            mixed = mixed * OUTPUT_GATES[self.output_gate](self.z_proj(hidden_states))
        return self.o_proj(mixed)


class HAMDecoderLayer(GradientCheckpointingLayer):
    """Residual block: mixer, then MLP, each behind its norm; with `attention_post_norm` and attention, before it.

    With `outputs_to_keep` its output is that of the last so many tokens, and it does no more for the others than what
    these and the cache need.
    """

    def __init__(self, config: HAMConfig, layer_idx: int):
        super().__init__()
        self.mixer = HAMMixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.post_norm = config.attention_post_norm and self.mixer.has_attention
        norm = config.hidden_size, config.rms_norm_eps, config.zero_centered_norms
        if not self.post_norm:
            self.input_layernorm = HAMRMSNorm(*norm)
        self.post_attention_layernorm = HAMRMSNorm(*norm)
        if self.post_norm:
            self.post_feedforward_layernorm = HAMRMSNorm(*norm)

    def forward(
        self, hidden_states: torch.Tensor, outputs_to_keep: int | None = None, **mixer_arguments: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        mixer_input = hidden_states if self.post_norm else self.input_layernorm(hidden_states)
        mixed, _, _, control = self.mixer(mixer_input, outputs_to_keep=outputs_to_keep, **mixer_arguments)
        if outputs_to_keep is not None:
            hidden_states = hidden_states[:, -outputs_to_keep:]
        if self.post_norm:
            hidden_states = hidden_states + self.post_attention_layernorm(mixed)
            hidden_states = hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))
        else:
            hidden_states = hidden_states + mixed
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        # Returned rather than recorded by a hook: out of a re-entrant checkpoint only what is returned has a gradient.
        return hidden_states if control is None else (hidden_states, control)


class HAMPreTrainedModel(HAMLoadingMixin, PreTrainedModel):
    """What every HAM model shares: its configuration, its initialisation and what Transformers must know of it."""

    config: HAMConfig
    config_class = HAMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HAMDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Packed rows equal padded ones, which Transformers asks this flag about; HAM has its own attention in either case.
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = list(FLOAT32_PARAMETERS)
    _can_record_outputs = {
        "hidden_states": HAMDecoderLayer,
        "attentions": OutputRecorder(HAMMixer, index=1),
        "routing_scores": OutputRecorder(HAMMixer, index=2),
    }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `forward`; within a `generate` of this model, with what that was asked to keep unless this call says.

        Here, because what is compiled is `forward`, and Dynamo cannot read what is set for a context.
        """
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        return name_cache(super().__call__(*args, **with_routing(self, args, kwargs)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HAMRMSNorm) and module.zero_centered:
            init.zeros_(module.weight)
        elif isinstance(module, HAMShortConvolution):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, HAMRouter) and module.kind == "learned_error":
            init.ones_(module.error_weight)
        elif isinstance(module, HAMMixer):
            self._init_mixer(module)

    def _init_mixer(self, mixer: HAMMixer) -> None:
        """Decays as in Mamba-2 and Gated DeltaNet: `A` uniform in (1, 16), time steps log-uniform in (0.001, 0.1)."""
        if mixer.has_rnn:
            init.copy_(mixer.A_log, torch.empty_like(mixer.A_log).uniform_(1, 16).log())
            dt = torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        if mixer.layer_type == "hybrid":
            init.constant_(mixer.threshold, INITIAL_THRESHOLD)
            if mixer.router.kind in LEARNED_ROUTERS:
                self._init_router(mixer.router)
            init.zeros_(mixer.score_quantiles)

    def _init_router(self, router: HAMRouter) -> None:
        """Logits of unit variance, whatever the sizes: where all scores lie at the threshold, all or none are kept."""
        init.normal_(router.up_proj.weight, std=router.up_proj.in_features**-0.5)
        # Of a unit normal `x`, the mean square of SiLU(x) is 0.36.
        init.normal_(router.down_proj.weight, std=(0.36 * router.down_proj.in_features) ** -0.5)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes as Transformers does; `ValueError`, with nothing changed, where the padding token would be lost."""
        pad = self.config.pad_token_id
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        lowest = 1 if pad is None else pad + 1
        if size < lowest:
            why = "" if pad is None else f", as `pad_token_id` is {pad}"
            raise ValueError(f"`new_num_tokens` must be at least {lowest}{why}, got {new_num_tokens}.")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder: Any = self.base_model
        decoder.vocab_size = self.config.vocab_size
        return embeddings

    @wraps(PreTrainedModel.push_to_hub)
    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]  # wrapped as its parent's is
        """Pushes as Transformers does, with a HAM's card where the repository has none; without `ham_hf` its own."""
        # Of a model with adapters only they are saved, which are no HAM checkpoint.
        if push_model is None or getattr(self, "_hf_peft_config_loaded", False):
            return super().push_to_hub(*args, **kwargs)
        return push_model(self, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Not inherited: FSDP derives a class from the model's, and PyTorch's code would be saved as the model's.
        cls._auto_class = None


class HAMModel(HAMPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: HAMConfig):
        # `from_pretrained(path, threshold=...)` sets fields one by one, after the configuration was checked whole.
        config.validate_architecture()
        warn_of_untested_transformers()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [HAMDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        # torch's ModuleList does not say what it holds.
        self.layers: Sequence[HAMDecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = HAMRMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norms)
        self.rotary_emb = None
        if config.rope_parameters is not None:
            self.rotary_emb = HAMRotaryEmbedding(config)  # type: ignore[arg-type]  # reads what HAMConfig has too
        self.gradient_checkpointing = False
        self.post_init()
        if all(layer.mixer.output_gate is None for layer in self.layers):
            # Transformers warns of a rule for what is not there.
            plan = self._tp_plan or {}
            self._tp_plan = {name: style for name, style in plan.items() if not name.endswith("z_proj")}
        if self.dtype in (torch.float16, torch.bfloat16):
            # An FSDP group has one dtype, and a mixer's own parameters stay float32: its modules get their own groups.
            children = (child for layer in self.layers for child in layer.mixer.named_children())
            names = {name for name, module in children if any(True for _ in module.parameters())}
            plan = {f"layers.*.mixer.{name}": "free_full_weight" for name in sorted(names)}
            self._fsdp_plan = {**(self._fsdp_plan or {}), **plan}

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: HAMCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
        kv_budget: int | None = None,
        hidden_states_to_keep: int = 0,
        past_key_values: HAMCache | None = None,
        **kwargs: Any,
    ) -> HAMModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: `[B, T]` int64, or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, tokens in the cache + T]`, 0 for padding (left or right); `None` if all are real.
            position_ids: `[B or 1, T]` int64 for RoPE; where they fail to rise a packed document begins. By default
                real tokens are counted.
            cache: a `HAMCache` to continue from; with fewer layers than the model has, only the first ones are run.
            use_cache: whether to fill and return a cache, by default `config.use_cache`. Packed rows have none.
            threshold: keep tokens whose routing score is at least this: a number, a list (one per hybrid layer), a
                tensor `[B]` or `[layers or 1, B or 1, heads or 1]`. At most 0 keeps all, above 1 keeps none. Defaults
                to `config.threshold`, then to the learned thresholds. In training the learned ones have no gradient
                from a call with this argument or `kv_usage`: DDP then needs `find_unused_parameters=True`, or
                thresholds with `requires_grad_(False)`, as they are while `config.threshold` is set.
            kv_usage: keep about this fraction instead, by the checkpoint's calibrated score quantiles.
            kv_budget: hold at most this many tokens per key/value head; the lowest score leaves.
            hidden_states_to_keep: return the last hidden state of the last so many tokens only (0: all), which spares
                the last layer most of its work on a prompt.
            past_key_values: the name of `cache` before Transformers 5.24.
            kwargs: `output_attentions`, `output_hidden_states`, `output_routing_scores` (bool); for packed rows
                `cu_seq_lens_q` `[documents + 1]` or `seq_idx` `[1, T]`, as Transformers' collators give them.

        Raises:
            TypeError, ValueError: for arguments that do not fit; the cache is unchanged then.
        """
        cache = given_cache(cache, past_key_values)
        check_checkpointing(self, cache)
        output_attentions = checked_flags(kwargs, hidden_states_to_keep, self.config)
        batch, length = check_tokens(input_ids, inputs_embeds, self.config)
        check_inputs(batch, length, attention_mask, position_ids, cache, self.config)
        thresholds = self.layer_thresholds(threshold, kv_usage, batch)
        kv_budget = check_kv_budget(kv_budget)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        device = inputs_embeds.device
        # Here rather than in each layer, where a copy that waits would stall a GPU once a layer.
        thresholds = [x if x is None else x.to(device, non_blocking=x.device.type == "cpu") for x in thresholds]
        seq_idx = packed_documents(kwargs, batch, length, device)
        tokens = token_layout(batch, length, device, attention_mask, position_ids, cache, seq_idx)
        if tokens.real is not None:
            # Whatever stands in for padding, NaN included, must not reach a sum, were it times zero.
            inputs_embeds = inputs_embeds.masked_fill(~tokens.real[..., None], 0)
        if cache is None:
            use_cache = wants_cache(self, use_cache, tokens.seq_idx is not None, by_positions=seq_idx is None)
        cache = self._prepare_cache(cache, use_cache, tokens, kv_budget)
        if exporting() and (cache is not None or kv_budget is not None):
            raise ValueError(
                "`use_cache` must be False, and `kv_budget` None, where a model is exported: what a cache keeps is "
                "decided by the data."
            )
        if output_attentions and kv_budget is not None:
            raise ValueError("`output_attentions` cannot be combined with `kv_budget`: give one of them.")

        position_embeddings = None
        if self.rotary_emb is not None:
            position_ids = tokens.positions if position_ids is None else position_ids
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        controls: list[torch.Tensor] = []
        # Drafts of an early exit have a cache of the first layers only.
        layers = self.layers if cache is None else self.layers[: len(cache.layers)]
        with nullcontext() if cache is None else cache.filling(self, tokens.real):
            for layer, layer_threshold in zip(layers, thresholds[: len(layers)], strict=True):
                trims = layer is layers[-1] and 0 < hidden_states_to_keep < length
                output = layer(
                    hidden_states,
                    outputs_to_keep=hidden_states_to_keep if trims else None,
                    position_embeddings=position_embeddings,
                    tokens=tokens,
                    cache=cache,
                    threshold=layer_threshold,
                    kv_budget=kv_budget,
                    output_attentions=output_attentions,
                )
                hidden_states = output[0] if isinstance(output, tuple) else output
                controls.extend(output[1:] if isinstance(output, tuple) else ())
        hidden_states = self.norm(hidden_states)
        if cache is not None and hidden_states.requires_grad:
            if cache.holds_cut_graph:
                logger.warning_once(
                    "Gradients stop at `cache`: a HAMCache holds no autograd graph of the calls that filled it."
                )
            cache.holds_cut_graph = True
        if controls and not kwargs.get("output_threshold_control"):
            seen = real_tokens(tokens.real, batch, length, hidden_states.device)
            hidden_states, controls = self._steer(hidden_states, controls, seen), []
        return HAMModelOutputWithPast(
            last_hidden_state=hidden_states,
            threshold_control=tuple(controls) or None,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )

    def _steer(self, hidden_states: torch.Tensor, controls: list[torch.Tensor], seen: torch.Tensor) -> torch.Tensor:
        """Closes the control loop where no language-modelling loss does: other heads, and losses made from logits.

        Such a loss tells nothing of how many calls an update has, so that each adds a whole step to the thresholds.

        Args:
            hidden_states: `[B, n, D]`, which the loss is made of.
            controls: of every hybrid layer, see `HAMMixer.forward`.
            seen: `[B]` float32 real tokens of each row.
        """
        weights = (1 / seen.sum().clamp(min=1)).expand_as(seen)
        return AddGradient.apply(hidden_states, *_control_loop(controls, weights, self.config))

    def layer_thresholds(
        self, threshold: float | list[float] | torch.Tensor | None, kv_usage: float | None, batch: int
    ) -> list[torch.Tensor | None]:
        """What each layer compares its scores with: `[B or 1, Hk or 1]`, or `None` for the learned threshold."""
        config = self.config
        kv_usage = check_kv_usage(kv_usage)
        if threshold is not None and kv_usage is not None:
            raise ValueError("Give at most one of `threshold` and `kv_usage`: both decide what is kept.")
        if threshold is None and kv_usage is None:
            threshold = config.threshold
        tensor = check_threshold(threshold, config.num_hybrid_layers, batch, config.num_key_value_heads)
        per_layer: list[torch.Tensor | None] = [None] * config.num_hidden_layers
        hybrid = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "hybrid"]
        if kv_usage is not None and hybrid:
            quantiles = [self.layers[i].mixer.score_quantiles for i in hybrid]
            # All layers at once: a GPU is waited for to know whether they were calibrated.
            tensor = usage_threshold(torch.stack([x.to(quantiles[0].device) for x in quantiles]), kv_usage)[:, None]
        if tensor is not None:
            for n, i in enumerate(hybrid):
                per_layer[i] = tensor[min(n, len(tensor) - 1)]
        return per_layer

    def _prepare_cache(
        self, cache: HAMCache | None, use_cache: bool | None, tokens: TokenLayout, kv_budget: int | None
    ) -> HAMCache | None:
        if tokens.seq_idx is not None:
            if cache is not None:
                raise ValueError(
                    "`cache` cannot be filled from packed rows (`position_ids` that restart, "
                    "`cu_seq_lens_q` or `seq_idx`): a cache holds one document per row. Give one document per row, "
                    "padded."
                )
            if kv_budget is not None:
                raise ValueError("`kv_budget` cannot be combined with packed rows: give one document per row, padded.")
            return None
        if cache is None:
            return HAMCache(self.config) if use_cache else None
        if kv_budget is not None and cache.layers[0].record_past:
            raise ValueError(
                "`kv_budget` cannot be combined with assisted generation or `activate_past_recording()`: a token that "
                "left the cache cannot be brought back."
            )
        return cache


def real_tokens(real: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Real tokens of each row among the new ones, `[B]` float32; `real` `[B, T]` is `None` if all are."""
    if real is None:
        return torch.full((batch,), float(length), device=device)
    return real.sum(1).to(device, torch.float32)


def _control_loop(
    controls: Sequence[torch.Tensor], weights: torch.Tensor, config: HAMConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros `[L, Hk]` that reach the thresholds, and the gradients these are to have; layers may sit on any device.

    Args:
        controls: of every hybrid layer, see `HAMMixer.forward`.
        weights: `[B]` of a kept token of each row in the usage, which is their sum.
    """
    stacked = torch.stack([x.to(weights.device) for x in controls])
    levers, thresholds, kept = stacked[:, 0], stacked[:, 1].detach(), stacked[:, 2:].detach()
    usage = (weights[:, None] * kept).sum(1)
    return levers, threshold_gradients(thresholds, usage, config.target_kv_usage, config.threshold_scope)


def _labels_by_row(labels: torch.Tensor | None, loss_kwargs: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Labels of each row that the loss counts, `[B]` float32."""
    shifted = loss_kwargs.get("shift_labels")
    counted = labels[:, 1:] if shifted is None and labels is not None else shifted
    return (counted != loss_kwargs.get("ignore_index", -100)).sum(1).to(device, torch.float32)


def _batch_share(
    counted: torch.Tensor, seen: torch.Tensor, num_items: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """This call's part in the control loop: weights `[B]` of kept tokens in its usage, and the share of its gradient.

    A call that is given `num_items_in_batch` may be a piece of a batch, of which it knows no more than how many labels
    there are. So each row's usage has the weight of its labels there, as its loss has: then the pieces into which rows
    are dealt add up to the whole. A call without it is a whole batch, in which every token has the same weight. Both
    are the same where rows have labels in proportion to their tokens, as rows of one length do that are learned whole.

    A call without a label has no share: its loss moves nothing.

    Args:
        counted: `[B]` float32 labels of each row that count.
        seen: `[B]` float32 real tokens of each row.
        num_items: labels of the whole batch.
    """
    total = counted.sum()
    if num_items is None:
        return (1 / seen.sum().clamp(min=1)).expand_as(seen), (total > 0).float()
    weights = counted / (total.clamp(min=1) * seen.clamp(min=1))
    # Without labels the number of items may be 0, too.
    return weights, torch.where(total > 0, total / num_items, 0.0)


def _shifts_labels(model_class: type) -> None:
    """Has Trainer shift the labels that it smooths: it goes by the names of classes, and would learn to copy."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_class.__name__, model_class.__name__)


class HAMForCausalLM(HAMPreTrainedModel, HAMGenerationMixin, GenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Transformers declares pairs of names, and reads pairs of lists.
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HAMConfig):
        super().__init__(config)
        self.model = HAMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Transformers reads it from the name of the class, and a subclass has its own.
        self.loss_type = "ForCausalLM"
        self.post_init()
        # A GenerationConfig with this mark ignores custom fields such as `threshold` when it is read from a file.
        self.generation_config._from_model_config = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _shifts_labels(cls)  # as FSDP derives one

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: HAMCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
        kv_budget: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing_scores: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: HAMCache | None = None,
        **loss_kwargs: Any,
    ) -> HAMCausalLMOutputWithPast:
        """Predicts the next token at every position; see `HAMModel.forward` for the arguments that are not listed.

        Args:
            labels: `[B, T]` int64, -100 where no loss is wanted. In training the loss carries the thresholds' control
                loop as a term of value zero.
            logits_to_keep: form logits for the last so many positions only (0: all), or for the positions in a tensor.
            loss_kwargs: `shift_labels` `[B, T]` in place of `labels`, `ignore_index` in place of -100, and
                `num_items_in_batch`, the number of labels that count in all calls and ranks which share a batch: what
                sums are divided by. Trainer gives the last also where it makes the loss itself, of `logits`: without
                labels it changes nothing, and each call moves the thresholds by a whole step.
        """
        has_loss = labels is not None or loss_kwargs.get("shift_labels") is not None
        unknown = sorted(set(loss_kwargs) - (LOSS_ARGUMENTS if has_loss else {"num_items_in_batch"}))
        if unknown:
            raise TypeError(f"HAMForCausalLM.forward() got unexpected keyword arguments {unknown}.")
        check_outputs_wanted(input_ids, inputs_embeds, labels, logits_to_keep, loss_kwargs, self.config)
        optional = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "output_routing_scores": output_routing_scores,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "max_length_q": max_length_q,
            "max_length_k": max_length_k,
            "seq_idx": seq_idx,
        }
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            threshold=threshold,
            kv_usage=kv_usage,
            kv_budget=kv_budget,
            hidden_states_to_keep=last_hidden_states(logits_to_keep, output_hidden_states, self.config),
            output_threshold_control=self.training and has_loss,
            return_dict=True,
            **{name: value for name, value in optional.items() if value is not None},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if has_loss:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
            if outputs.threshold_control:
                batch, length = (loss_kwargs["shift_labels"] if labels is None else labels).shape
                real = None if attention_mask is None else attention_mask[:, -length:]
                seen = real_tokens(real, batch, length, loss.device)
                counted = _labels_by_row(labels, loss_kwargs, loss.device)
                weights, share = _batch_share(counted, seen, loss_kwargs.get("num_items_in_batch"))
                levers, gradients = _control_loop(outputs.threshold_control, weights, self.config)
                # A zero, by which the thresholds have their gradients.
                loss = loss + share * (levers * gradients).sum()
        return HAMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing_scores=outputs.routing_scores,
            **{CACHE_NAME: outputs.cache},
        )


_shifts_labels(HAMForCausalLM)


class HAMForSequenceClassification(GenericForSequenceClassification, HAMPreTrainedModel):
    """The decoder with a classifier of the last real token."""

    accepts_loss_kwargs = False  # Trainer scales the loss of an accumulated batch, which Transformers' heads do not


class HAMForTokenClassification(GenericForTokenClassification, HAMPreTrainedModel):
    """The decoder with a classifier of every token."""

    accepts_loss_kwargs = False


class HAMForQuestionAnswering(GenericForQuestionAnswering, HAMPreTrainedModel):
    """The decoder with a span head."""

    accepts_loss_kwargs = False


__all__ = [
    "HAMForCausalLM",
    "HAMForQuestionAnswering",
    "HAMForSequenceClassification",
    "HAMForTokenClassification",
    "HAMModel",
    "HAMPreTrainedModel",
]
