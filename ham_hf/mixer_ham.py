# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMMixer, the token mixer of a layer, and its modules: convolution, norm and rotary embedding."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .attention_ham import attend_new
from .cache_ham import HAMCache
from .cache_layer_ham import HAMCacheLayer
from .compiled_attention_ham import attend_in_graph
from .configuration_ham import LEARNED_ROUTERS, HAMConfig
from .decode_step_ham import decode_step, decoding_kernels
from .delta_rule_ham import gated_delta_rule_with_prediction
from .inputs_ham import TokenLayout
from .layer_step_ham import LayerStep
from .ops_ham import exporting, l2norm, rms_norm, rotated, short_convolution
from .received_attention_ham import attention_received, prediction_loss
from .routing_ham import NUM_QUANTILES, HAMRouter, Retention, error_score, widened

OUTPUT_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}

# Parameters and buffers that stay float32: bfloat16 would move a threshold by up to 0.002, and with it the kept set,
# and would round the training steps of an error's weight, 8 at first, to nothing.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "threshold", "score_quantiles", "error_weight")


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    keep: torch.Tensor,
    tokens: TokenLayout,
    cache: HAMCacheLayer | None,
    window: int = 0,
) -> torch.Tensor:
    """Dense attention weights `[B, H, T, S]` over all tokens seen, zero for those not held; formed on request.

    Args:
        q: `[B, T, H, K]`; k: `[B, T, Hk, K]`; keep: `[B, T, Hk]` bool.
        tokens: the layout of the new tokens.
        cache: the layer's cache before this call, or `None`.
        window: number of the last real tokens that a query sees, itself included.
    """
    length, key_dim = q.shape[1], q.shape[3]
    t = torch.arange(length, device=q.device)
    visible = keep.permute(0, 2, 1)[:, :, None]
    if window > 1:
        visible = visible | _in_window(tokens.positions, tokens.positions, tokens.real, window)
    visible = (t[:, None] > t) & visible
    if tokens.seq_idx is not None:
        visible = visible & (tokens.seq_idx[:, :, None] == tokens.seq_idx[:, None])[:, None]
    visible = visible | (t[:, None] == t)
    keys = k.transpose(1, 2)
    if cache is not None and cache.seen_tokens:
        held, held_kept = cache.dense_keys(tokens.past_real)
        keys = torch.cat([held, keys], dim=2)
        held_visible = held_kept[:, :, None].expand(-1, -1, length, -1)
        if window > 1:
            past_real = tokens.past_real
            if past_real is None:
                past_real = torch.ones(len(q), held.shape[2], dtype=torch.bool, device=q.device)
            held_visible = held_visible | _in_window(tokens.positions, past_real.cumsum(1) - 1, past_real, window)
        visible = torch.cat([held_visible, visible], dim=-1)
    q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))
    logits = (q @ keys.unsqueeze(2).mT).float() * key_dim**-0.5
    return logits.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1).flatten(1, 2).to(q.dtype)


def _in_window(queries: torch.Tensor, keys: torch.Tensor, real: torch.Tensor | None, window: int) -> torch.Tensor:
    """`[B, 1, T, S]` bool: keys at positions `[B, S]`, false for padding, in the window of queries at `[B, T]`."""
    inside = queries[:, :, None] - keys[:, None] < window
    return (inside if real is None else inside & real[:, None])[:, None]


def weighted_sum(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sums values `[B, S, Hk, V]` with dense weights `[B, H, T, S]`: `[B, T, H, V]`, as `attend_new` returns."""
    weights = weights.unflatten(1, (v.shape[2], -1))
    return (weights @ v.transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2)


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
    """RMSNorm of `[..., D]`, in the dtype of its weight; a `zero_centered` weight is an offset from 1.

    Autocast narrows the outputs of projections; given two dtypes PyTorch's norm would warn, and return the narrower.
    """

    eps: float

    def __init__(self, size: int, eps: float, zero_centered: bool = False):
        self.zero_centered = zero_centered
        super().__init__(size, eps)

    def reset_parameters(self) -> None:
        """Sets the weight to its neutral value."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    @property
    def scale(self) -> torch.Tensor:
        """The factors of the normalised input, `[D]`; the sum with 1 is widened, because bfloat16 would round it."""
        return 1 + widened(self.weight) if self.zero_centered else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.zero_centered:
            return rms_norm(x.to(self.weight.dtype), self.weight, self.eps)
        return rms_norm(x.to(self.scale.dtype), self.scale, self.eps).to(self.weight.dtype)


class HAMRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE of all or part of each head: cosines and sines `[B, T, K]` that rotate the first dimensions of each half.

    Pairs are `(i, i + K / 2)` for every part, so code that rotates a whole head works here too; a pair that does not
    rotate has cosine 1 and sine 0. `partial_rotary_order` converts from the layout in which the rotated dimensions are
    the first of the head.
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
    """Index in the usual layout of each dimension of a head of `HAMRotaryEmbedding`, `[head_dim]` int64.

    In the usual layout the first `rotary_dim` dimensions rotate, in pairs `(i, i + rotary_dim / 2)`. Queries and keys
    in the new order have the same products, so the order converts a checkpoint: `weight.unflatten(0, (-1,
    head_dim))[:, order].flatten(0, 1)` for the q and k projections and their biases, `weight[order]` for a QK-norm per
    head.
    """
    rotated, still = rotary_dim // 2, (head_dim - rotary_dim) // 2
    parts = torch.arange(head_dim).split([rotated, rotated, still, still])
    return torch.cat([parts[0], parts[2], parts[1], parts[3]])


class Recalled(NamedTuple):
    """Output of the RNN for new tokens.

    Attributes:
        output: `[B, T, H, V]`.
        errors: `[B, T, Hk]` score of its prediction, `None` if the layer's router reads none.
        inputs: `(k, v, g, beta)` as `gated_delta_rule_with_prediction` takes them.
        state: `[B, value heads, K, V]` float32 after the call.
    """

    output: torch.Tensor
    errors: torch.Tensor | None
    inputs: tuple[torch.Tensor, ...]
    state: torch.Tensor

    def stored(self) -> dict[str, Any]:
        """The fields of a `LayerStep` that the RNN fills."""
        return {"rnn": self.inputs, "recurrent_state": self.state}


class Attended(NamedTuple):
    """Output of attention for new tokens, and the tensors that a cache stores.

    Attributes:
        output: `[B, n, H, V]`, of the last `n` tokens or of all.
        weights: `[B, H, T, S]` where they were formed.
        queries: `[B, T, H, K]`, of all new tokens.
        keys, values: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
        scores: `[B, T, Hk]` float32; a full head drops the lowest.
        keep: `[B, T, Hk]` bool.
    """

    output: torch.Tensor
    weights: torch.Tensor | None
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    keep: torch.Tensor

    def stored(self) -> dict[str, Any]:
        """The fields of a `LayerStep` that attention fills."""
        return {name: getattr(self, name) for name in ("keys", "values", "scores", "keep")}


class HAMMixer(nn.Module):
    """Token mixer of a layer: a Gated DeltaNet over all tokens, attention over those it predicts badly, and their mix.

    A `"linear_attention"` layer has only the first memory, a `"full_attention"` layer only the second, which then
    keeps every token.
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
        self.window, self.sinks = config.window_of(layer_idx), config.sinks_of(layer_idx)
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
        """Moves and casts as PyTorch does, but leaves `FLOAT32_PARAMETERS` in float32."""
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
        """True if training moves the threshold: it does not if the configuration fixes one."""
        return self.config.fixed_threshold is None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: TokenLayout,
        retention: Retention,
        cache: HAMCache | None = None,
        output_attentions: bool = False,
        last_n: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Mixes tokens.

        Args:
            hidden_states: `[B, T, D]` normalised input.
            position_embeddings: cosines and sines `[B or 1, T, K]` of RoPE, or `None`.
            tokens: the layout of the new tokens.
            retention: the rule by which a hybrid layer keeps tokens.
            cache: the cache to read and fill.
            output_attentions: forms the attention weights, which takes memory quadratic in `T`.
            last_n: returns the output of the last `last_n` tokens only; 0: of all.

        Returns:
            `[B, n, D]` output, `[B, H, T, S]` attention weights or `None`, `[B, T, Hk]` routing scores or `None`, and,
            while the threshold is learned, `[2 + B, Hk]`: a zero that carries the threshold's gradient, the threshold,
            and how many tokens each row kept; `[2 + 2 B, Hk]` with the loss of a learned router, of each row.
        """
        layer_cache = None if cache is None else cache.layers[self.layer_idx]
        offloaded = cache is not None and cache.offload_layers
        if layer_cache is not None and offloaded:
            layer_cache.prefetch()
        kernels = None
        if layer_cache is not None and not output_attentions:
            # A full head drops tokens, and an offloaded layer moves its pages: then the host appends.
            appends = retention.budget is None and not offloaded
            kernels = decoding_kernels(self, hidden_states, tokens, layer_cache, appends)
        if layer_cache is None or kernels is None:
            out = self._mix_tokens(
                hidden_states, position_embeddings, tokens, layer_cache, retention, output_attentions, last_n
            )
        else:
            if cache is not None and kernels[1] is not None:
                cache.reserve(self.layer_idx)
            out = decode_step(self, kernels, hidden_states, position_embeddings, tokens, layer_cache, retention)
        if layer_cache is not None and offloaded:
            layer_cache.offload()
        return out

    def _mix_tokens(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: TokenLayout,
        cache: HAMCacheLayer | None,
        retention: Retention,
        output_attentions: bool,
        last_n: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """`forward` for any number of tokens, with the cache of this layer."""
        raw, convolved, conv_state = self._project(hidden_states, tokens, cache)
        recalled = scores = attended = control = None
        if self.has_rnn:
            recalled = self._recall(hidden_states, convolved, tokens, cache)
        if recalled is not None and self.layer_type == "hybrid":
            scores = self.router(hidden_states, recalled.errors, tokens.positions)
        if self.has_attention:
            qkv = convolved if self.config.attention_conv else raw
            attended = self._attend(
                qkv, scores, position_embeddings, tokens, cache, retention, output_attentions, last_n
            )
        if cache is not None:
            convolution: dict[str, Any] = {"conv_inputs": raw, "conv_state": conv_state} if self.has_conv else {}
            memories = {**(recalled.stored() if recalled else {}), **(attended.stored() if attended else {})}
            cache.update(LayerStep(tokens.positions, tokens.real, **convolution, **memories), retention.budget)
        if attended is not None and self.training and self.layer_type == "hybrid" and retention.threshold is None:
            control = self._control(attended, scores, tokens)
        o_rnn, o_kv = (None if x is None else x.output[:, -last_n:] for x in (recalled, attended))
        weights = attended.weights if attended is not None and output_attentions else None
        return self.mix(hidden_states[:, -last_n:], o_rnn, o_kv), weights, scores, control

    def _project(
        self, hidden_states: torch.Tensor, tokens: TokenLayout, cache: HAMCacheLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values `[B, T, C]` before and after the convolution, and its final state."""
        raw = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)
        if cache is not None:
            cache.accept(inputs=raw)
        if not self.has_conv:
            return raw, raw, None
        state = None if cache is None else cache.conv_state
        return raw, *self.conv(raw, state, tokens.real, tokens.seq_idx)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits `[B, T, C]` into `[B, T, heads, dim]` queries, keys and values."""
        key_dim, value_dim = self.shape.key_dim, self.shape.value_dim
        q, k, v = qkv.split(self.sizes, -1)
        return q.unflatten(-1, (-1, key_dim)), k.unflatten(-1, (-1, key_dim)), v.unflatten(-1, (-1, value_dim))

    def _recall(
        self, hidden_states: torch.Tensor, convolved: torch.Tensor, tokens: TokenLayout, cache: HAMCacheLayer | None
    ) -> Recalled:
        """Runs the RNN over `[B, T, D]` input and its convolved queries, keys and values `[B, T, C]`."""
        q, k, v = self._heads(convolved)
        g, beta = self._rnn_gates(hidden_states, tokens.real)
        q, k = l2norm(q), l2norm(k)
        if self.shape.value_heads > self.shape.key_heads:
            q, k = (x.repeat_interleave(self.shape.value_heads // self.shape.key_heads, dim=2) for x in (q, k))
        score = self.router.error if self.layer_type == "hybrid" else None
        # A learned router's error needs a gradient, which the op's own score lacks.
        in_graph = self.config.router in LEARNED_ROUTERS and torch.is_grad_enabled()
        # Without `score` the op returns the prediction itself.
        output, errors, state = gated_delta_rule_with_prediction(
            q,
            k,
            v,
            g,
            beta,
            initial_state=None if cache is None else cache.recurrent_state,
            seq_idx=tokens.seq_idx,
            score=None if in_graph else score,
            predict=bool(score),
        )
        if in_graph and score is not None and errors is not None:
            errors = error_score(score, v, errors, beta, in_graph=True)
        return Recalled(output.to(hidden_states.dtype), errors, (k, v, g, beta), state)

    def _rnn_gates(self, hidden_states: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log decays `g` and write strengths `beta`, `[B, T, value heads]` in float32; 0 for padding."""
        beta = widened(self.b_proj(hidden_states)).sigmoid()
        if self.config.allow_neg_eigval:
            beta = 2 * beta
        g = -widened(self.A_log).exp() * F.softplus(widened(self.a_proj(hidden_states)) + widened(self.dt_bias))
        if real is None:
            return g, beta
        return g.masked_fill(~real[..., None], 0), beta.masked_fill(~real[..., None], 0)

    def _attend(
        self,
        qkv: torch.Tensor,
        scores: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: TokenLayout,
        cache: HAMCacheLayer | None,
        retention: Retention,
        output_attentions: bool,
        last_n: int,
    ) -> Attended:
        """Routes the tokens of `[B, T, C]` queries, keys and values, and attends over the kept ones."""
        q, k, v = self._heads(qkv)
        if scores is not None and self.config.router in LEARNED_ROUTERS:
            v = self._scale_values(v, scores)
        # Under autocast norms and rotation widen, but a cache holds keys and values of one dtype.
        q, k = (x.to(v.dtype) for x in self._attention_view(q, k, position_embeddings))
        if cache is not None:
            cache.accept(keys=k)
        routed_scores, keep = self._route(scores, k, retention.threshold, tokens)
        queries, weights = q, None
        if output_attentions or exporting():
            weights = attention_weights(q, k, keep, tokens, cache, self.window)
        # Requested weights are part of the graph, except with a filled cache, whose pages are read in place. An
        # exported program uses them because its shapes must not depend on the number of kept tokens.
        if weights is not None and (cache is None or not cache.seen_tokens):
            output = weighted_sum(weights, v)
        else:
            if cache is None or cache.store is None:
                q = q[:, -last_n:]
            output = self.attend_kept(q, k, v, keep, routed_scores, tokens, cache, retention.budget)
        return Attended(output, weights, queries, k, v, routed_scores, keep)

    def _scale_values(self, v: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scales values `[B, T, Hk, V]` by learned scores, which get their gradient through them."""
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
        """Float32 scores that rank tokens and the kept tokens, `[B, T, Hk]`; without a router all are kept, at 1.

        Sinks rank above everything, so that no threshold and no budget drops them.
        """
        if scores is None:
            scores = torch.ones(k.shape[:3], dtype=torch.float32, device=k.device)
            keep = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
        else:
            scores = self.with_sinks(scores.detach().float(), tokens)
            keep = scores >= self.threshold_in_force(threshold, scores.device)[:, None]
        return scores, keep if tokens.real is None else keep & tokens.real[..., None]

    def with_sinks(self, scores: torch.Tensor, tokens: TokenLayout) -> torch.Tensor:
        """Scores `[B, T, Hk]` with those of sinks infinite."""
        if not self.sinks:
            return scores
        return scores.masked_fill((tokens.positions < self.sinks)[..., None], torch.inf)

    def threshold_in_force(self, threshold: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """`threshold` `[B or 1, Hk or 1]` on `device`; the learned one, `[1, Hk]` float32, if it is `None`."""
        return self.threshold.detach().float()[None] if threshold is None else threshold.to(device)

    def _control(self, attended: Attended, scores: torch.Tensor | None, tokens: TokenLayout) -> torch.Tensor:
        """Input of the control loop, formed here: a sharded parameter is whole only inside its module's forward."""
        threshold = self.threshold.float()
        rows = [torch.stack([threshold - threshold.detach(), threshold.detach()]), attended.keep.sum(1).float()]
        if scores is not None and self.config.router in LEARNED_ROUTERS and self.config.router_aux_loss_coef:
            received = attention_received(attended.queries, attended.keys, tokens.real, tokens.seq_idx, self.window)
            rows.append(prediction_loss(scores, received, tokens.real))
        return torch.cat(rows)

    def attend_kept(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keep: torch.Tensor,
        scores: torch.Tensor,
        tokens: TokenLayout,
        cache: HAMCacheLayer | None,
        budget: int | None,
    ) -> torch.Tensor:
        """Attention of the last `n` new tokens over the kept and recent tokens before them, `[B, n, H, V]`.

        Args:
            q: `[B, n, H, K]`, normalised and rotated; of all new tokens if the layer's cache has a store.
            k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
            keep, scores: `[B, T, Hk]` bool and float32.
            tokens: the layout of the new tokens.
            cache: the layer's cache, or `None`.
            budget: most tokens that a head may hold, or `None`.
        """
        if cache is None and torch.compiler.is_compiling():
            return attend_in_graph(q, k, v, keep, scores, budget, tokens.seq_idx, self.window, tokens.real)
        if cache is None:
            return attend_new(
                q, k, v, keep, scores, budget, seq_idx=tokens.seq_idx, window=self.window, real=tokens.real
            )
        if budget is not None:
            cache.enforce_budget(budget)
        return cache.attend(q, k, v, keep, scores, budget, tokens.real)

    def mix(self, hidden_states: torch.Tensor, o_rnn: torch.Tensor | None, o_kv: torch.Tensor | None) -> torch.Tensor:
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


__all__ = ["HAMMixer", "partial_rotary_order"]
