# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reference of every HAM operation in plain PyTorch: token loops and dense masks, which faster code must match."""

import torch
import torch.nn.functional as F


def naive_short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution and SiLU over real tokens, one row and one token at a time.

    Args:
        x: `[B, T, C]` inputs.
        weight: `[C, W]`; `weight[:, W - 1]` multiplies the current token.
        initial_state: `[B, W - 1, C]` inputs of the last real tokens before this call, oldest first; zeros if `None`.
        real: `[B, T]` bool, false for padding, which is skipped; `None` if every token is real.
        seq_idx: `[B, T]` int, the document of each token; a document does not see the one before it.

    Returns:
        `[B, T, C]` outputs (zero for padding) and `[B, W - 1, C]` final state.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    out = torch.zeros_like(x)
    state = x.new_zeros(batch, width - 1, channels) if initial_state is None else initial_state.clone()
    final = []
    for b in range(batch):
        history = list(state[b])
        document = None
        for t in range(length):
            if real is not None and not real[b, t]:
                continue
            if seq_idx is not None and document is not None and seq_idx[b, t] != document:
                history = [torch.zeros_like(x[b, t])] * (width - 1)
            document = None if seq_idx is None else seq_idx[b, t]
            window = torch.stack([*history, x[b, t]])
            out[b, t] = F.silu((window * weight.T).sum(0))
            history = list(window[1:])
        final.append(torch.stack(history) if width > 1 else x.new_zeros(0, channels))
    return out, torch.stack(final)


def naive_gated_delta_rule_with_prediction(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated delta rule (arXiv 2412.06464) token by token, with the state's prediction for each token.

    `vhat_t = exp(g_t) S_{t-1}^T k_t`; `S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - vhat_t)^T`; `o_t = scale S_t^T q_t`.

    Args:
        q: `[B, T, H, K]`, L2-normalised by the caller; `H` is a multiple of `Hk`.
        k: `[B, T, Hk, K]`, L2-normalised by the caller.
        v: `[B, T, Hk, V]`.
        g: `[B, T, Hk]` decay in log space, at most 0.
        beta: `[B, T, Hk]` write strength in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor of the output; `K ** -0.5` if `None`.
        initial_state: `[B, Hk, K, V]` float32; zeros if `None`.
        seq_idx: `[B, T]` int, the document of each token; the state is cleared where it changes.

    Returns:
        `o` `[B, T, H, V]`, predictions `[B, T, Hk, V]` and final state `[B, Hk, K, V]`, all in float32 or wider.
    """
    batch, length, heads, key_dim = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    scale = key_dim**-0.5 if scale is None else scale
    state = k.new_zeros(batch, kv_heads, key_dim, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs, predictions = [], []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = state * g[:, t, :, None, None].exp()
        prediction = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        update = beta[:, t, :, None] * (v[:, t] - prediction)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], update)
        query = q[:, t].unflatten(1, (kv_heads, groups)) * scale
        outputs.append(torch.einsum("bhkv,bhgk->bhgv", state, query).flatten(1, 2))
        predictions.append(prediction)
    return torch.stack(outputs, 1), torch.stack(predictions, 1), state


def naive_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scale: float | None = None,
    seq_idx: torch.Tensor | None = None,
    window: int = 0,
    real: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense masked softmax over `{j < t : j kept} ∪ {t} ∪ {j <= t : t - j < window}` of the query's document.

    Args:
        q: `[B, T, H, K]` queries.
        k, v: `[B, T, Hk, K]` keys and `[B, T, Hk, V]` values.
        keep: `[B, T, Hk]` bool, the kept tokens of each key/value head; false for padding.
        scale: factor of the logits; `K ** -0.5` if `None`.
        seq_idx: `[B, T]` int, the document of each token.
        window: number of the last real tokens that a query sees, itself included.
        real: `[B, T]` bool, false for padding, which the window neither shows nor counts; `None` if all are real.

    Returns:
        outputs `[B, T, H, V]` and weights `[B, H, T, T]`.
    """
    length, heads, key_dim = q.shape[1:]
    groups = heads // k.shape[2]
    scale = key_dim**-0.5 if scale is None else scale
    k, v, keep = (x.repeat_interleave(groups, dim=2) for x in (k, v, keep))
    t = torch.arange(length, device=q.device)
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if real is None else real
    position = real.cumsum(1)
    recent = (position[:, :, None] - position[:, None] < window) & real[:, None]
    visible = (t[:, None] > t) & (keep.transpose(1, 2)[:, :, None, :] | recent[:, None])
    if seq_idx is not None:
        visible = visible & (seq_idx[:, :, None] == seq_idx[:, None, :])[:, None]
    visible = visible | (t[:, None] == t)
    logits = torch.einsum("bthk,bshk->bhts", q, k) * scale
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v), weights


def naive_ragged_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float | None = None,
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention of new tokens over their stream's pages, the kept new tokens before them, and themselves.

    Args:
        q: `[N, T, G, K]` queries of `T` tokens in each of `N` streams.
        k, v: `[N, T, K]` and `[N, T, V]`, the tokens' own keys and values.
        keep: `[N, T]` bool, the tokens that later ones see.
        pages: per slab `(keys [P, p, K], values [P, p, V], owner [P])`: full pages and the stream each belongs to.
        tail: `(keys [N, p, K], values [N, p, V], fill [N])`: each stream's open page and the number of its tokens.
        scale: factor of the logits; `K ** -0.5` if `None`.
        recent: `(keys [N, R, K], values [N, R, V], fill [N])` in the window of a single new token, in any order.

    Returns:
        `[N, T, G, V]`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    for n in range(q.shape[0]):
        stored = [(keys[owner == n].flatten(0, 1), values[owner == n].flatten(0, 1)) for keys, values, owner in pages]
        stored.extend((x[0][n, : x[2][n]], x[1][n, : x[2][n]]) for x in (tail, recent) if x is not None)
        for t in range(q.shape[1]):
            seen = [*keep[n, :t].nonzero()[:, 0].tolist(), t]
            keys, values = (torch.cat(x) for x in zip(*stored, (k[n, seen], v[n, seen]), strict=True))
            out[n, t] = (q[n, t] @ keys.T * scale).softmax(-1) @ values
    return out


def naive_surviving_tokens(scores: torch.Tensor, keep: torch.Tensor, budget: int, window: int = 0) -> torch.Tensor:
    """Tokens that remain when at most `budget` fit and the lowest score leaves (the oldest of equal scores).

    The last `window` tokens, with the one that comes next, are held in any case; one that leaves the window stays if
    it was admitted, and competes with the others from then on.

    Args:
        scores: `[T]` routing scores of one head, in order of arrival.
        keep: `[T]` bool, the tokens that were admitted.
        budget: number of tokens that fit, those in the window included.
        window: number of the last tokens that a query sees, itself included.

    Returns:
        `[T, T]` bool: entry `(t, j)` is true if token `j` is held after token `t` was seen.
    """
    length = scores.shape[0]
    held: set[int] = set()
    table = torch.zeros(length, length, dtype=torch.bool)
    waits = max(window, 1) - 1
    for t in range(length):
        if t >= waits and keep[t - waits]:
            held.add(t - waits)
        if len(held) > budget - waits:
            held.remove(min(held, key=lambda j: (float(scores[j]), j)))
        table[t, list(held)] = True
        table[t, max(0, t - waits + 1) : t + 1] |= waits > 0
    return table


__all__ = [
    "naive_gated_delta_rule_with_prediction",
    "naive_ragged_decode_attention",
    "naive_short_convolution",
    "naive_sparse_attention",
    "naive_surviving_tokens",
]
