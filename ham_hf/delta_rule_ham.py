# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The gated delta rule, chunkwise and linear in memory, with the state's prediction of each token's value."""

import torch

from .ops_ham import exporting, kernel_for
from .routing_ham import error_score

# Tokens, over all rows and heads, that the chunkwise delta rule handles at once: more do not fit in a CPU's cache.
SEGMENT_TOKENS = 8192
# A decay in log space from which nothing is left, also in float64. Sums of decays stay finite above it.
FORGETS_ALL = -1000.0


def gated_delta_rule_with_prediction(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_size: int | None = None,
    score: str | None = None,
    predict: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gated delta rule (arXiv 2412.06464) in its chunkwise WY form, with the state's prediction for each token.

    Within a chunk the pseudo-values `u_t = beta_t (v_t - vhat_t)` solve `(I + diag(beta) A) U = diag(beta) (V - V0)`,
    where `A` holds the decayed products of keys below the diagonal and `V0` the predictions of the initial state.
    The prediction is then `A U + V0`, a product without cancellation: it is exactly zero where nothing was stored.

    Args:
        q: `[B, T, H, K]`, L2-normalised by the caller; `H` is a multiple of `Hk`.
        k: `[B, T, Hk, K]`, L2-normalised by the caller.
        v: `[B, T, Hk, V]`.
        g: `[B, T, Hk]` decay in log space, from `-inf` to 0; 0 for padding.
        beta: `[B, T, Hk]` write strength in (0, 1), or (0, 2) with negative eigenvalues; 0 for padding.
        scale: factor of the output; `K ** -0.5` if `None`.
        initial_state: `[B, Hk, K, V]` float32; zeros if `None`.
        seq_idx: `[B, T]` int, document of each token, constant over padding; the state is cleared where it changes.
        chunk_size: tokens solved at once; by default the fastest number, 64 in the kernel and 32 in PyTorch.
        score: `"cosine"`, `"l2"` or `"residual"` returns that score of each prediction instead. Scores have no
            gradient, predictions have one.
        predict: `False` skips the predictions, for callers that read neither them nor a score.

    Returns:
        `o` `[B, T, H, V]`, predictions `[B, T, Hk, V]` and final state `[B, Hk, K, V]`, all in float32 or wider; with
        `score`, scores `[B, T, Hk]` in place of the predictions; without `predict`, `None`.

    Raises:
        ValueError: for a score without `predict`.
    """
    if score is not None and not predict:
        raise ValueError(f"`predict` must be True with `score` {score!r}, got {predict!r}.")
    if kernel := kernel_for("gated_delta_rule_with_prediction", k, v):
        return kernel(q, k, v, g, beta, scale, initial_state, seq_idx, chunk_size or 64, score, predict)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    g = g.clamp(min=FORGETS_ALL)
    # Scores decide what is kept, so autocast must not lower the precision of the state they come from.
    with torch.autocast(q.device.type, enabled=False):
        prediction: torch.Tensor | None
        if q.shape[1] == 1:
            o, prediction, state = _delta_rule_step(q, k, v, g, beta, initial_state, scale)
        else:
            # A loop over chunks would fix the length of an exported program.
            chunk = q.shape[1] if exporting() else chunk_size or 32
            o, prediction, state = _delta_rule(q, k, v, g, beta, initial_state, seq_idx, scale, chunk, predict)
        if score is not None and prediction is not None:
            prediction = error_score(score, v, prediction, beta)
        return o, prediction if predict else None, state


def _delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of the gated delta rule: the recurrence itself."""
    q, k, v, g, beta = (x.squeeze(1) for x in (q, k, v, g, beta))
    state = state * g.exp()[..., None, None]
    prediction = (k.unsqueeze(-2) @ state).squeeze(-2)
    update = beta[..., None] * (v - prediction)
    state = torch.addcmul(state, k.unsqueeze(-1), update.unsqueeze(-2))
    out = (q * scale).unflatten(1, (k.shape[1], -1)) @ state
    return out.flatten(1, 2).unsqueeze(1), prediction.unsqueeze(1), state


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    seq_idx: torch.Tensor | None,
    scale: float,
    chunk: int,
    predict: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gated delta rule over segments of whole chunks, short enough to fit in a CPU's cache."""
    length = q.shape[1]
    if chunk >= length:
        return _delta_rule_chunks(q, k, v, g, beta, state, seq_idx, scale, length, predict)
    segment = max(1, SEGMENT_TOKENS // max(1, q.shape[0] * q.shape[2] * chunk)) * chunk
    outputs, predictions = [], []
    for start in range(0, length, segment):
        part = slice(start, start + segment)
        if seq_idx is not None and start:
            state = state.masked_fill((seq_idx[:, start] != seq_idx[:, start - 1])[:, None, None, None], 0)
        documents = None if seq_idx is None else seq_idx[:, part]
        out, prediction, state = _delta_rule_chunks(
            q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], state, documents, scale, chunk, predict
        )
        outputs.append(out)
        if prediction is not None:
            predictions.append(prediction)
    return torch.cat(outputs, 1), torch.cat(predictions, 1) if predict else None, state


def _delta_rule_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    seq_idx: torch.Tensor | None,
    scale: float,
    chunk: int,
    predict: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gated delta rule over chunks: everything but the state's own recurrence is one batched product."""
    length = q.shape[1]
    q = q.unflatten(2, (k.shape[2], -1))
    q, k, v, g, beta = (_split_chunks(x, chunk) for x in (q, k, v, g, beta))  # [N, B, Hk, C, ...], q: [..., C, G, K]
    documents = None if seq_idx is None else _split_chunks(seq_idx.unsqueeze(2), chunk)

    # Decays are small differences of large sums, which float32 would round. Apple's GPUs have nothing wider.
    sums = g.cumsum(-1, dtype=torch.float32 if g.device.type == "mps" else torch.float64)
    within, to_end = (
        (x - y).to(k.dtype) for x, y in ((sums.unsqueeze(-1), sums.unsqueeze(-2)), (sums[..., -1:], sums))
    )
    within = within.masked_fill(_unseen(chunk, documents, g.device), -torch.inf).exp()
    to_end, from_start, across = to_end.exp(), sums.to(k.dtype).exp(), sums[..., -1].to(k.dtype).exp()
    if documents is not None:
        carried, ending, continues = _document_borders(documents)
        from_start, to_end, across = from_start * carried, to_end * ending, across * continues

    products = (k @ k.mT * within).tril(-1)
    k_in, k_out = k * from_start[..., None], k * to_end[..., None]
    # The solver works on columns: a transposed system lets it read and write our layout directly.
    solved = torch.linalg.solve_triangular(
        (products * beta[..., None]).mT,
        (torch.cat([v, k_in], -1) * beta[..., None]).mT,
        upper=True,
        left=False,
        unitriangular=True,
    ).mT
    from_values, from_state = solved.flatten(1, 2).split([v.shape[-1], k.shape[-1]], -1)
    to_state, across = k_out.flatten(1, 2).mT, across.flatten(1, 2)[..., None, None]
    shape, state = state.shape, state.flatten(0, 1)
    state_of_chunk, update_of_chunk = [], []
    # Unbound once: the gradient of each index would fill a tensor of all chunks.
    of_chunks = (x.unbind() for x in (from_values, from_state, to_state, across))
    for values, reads, writes, decay in zip(*of_chunks, strict=True):
        state_of_chunk.append(state)
        update_of_chunk.append(torch.baddbmm(values, reads, state, alpha=-1))
        state = torch.baddbmm(state * decay, writes, update_of_chunk[-1])
    states, updates = torch.cat(state_of_chunk), torch.cat(update_of_chunk)

    # One matrix per stream and chunk from here on: `[N * B * Hk, rows, columns]`.
    prediction = None
    if predict:
        prediction = torch.baddbmm(k_in.flatten(0, 2) @ states, products.flatten(0, 2), updates)
        prediction = _join_chunks(prediction.view(v.shape))[:, :length]
    weights = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * within.unsqueeze(4)
    weights, q_in = (x.flatten(0, 2).flatten(1, 2) for x in (weights, q * from_start[..., None, None]))
    out = torch.baddbmm(q_in @ states, weights, updates, beta=scale, alpha=scale)
    out = _join_chunks(out.view(*q.shape[:-1], v.shape[-1]))[:, :length]
    return out.flatten(2, 3), prediction, state.view(shape)


def _split_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """`[B, T, Hk, ...]` to `[N, B, Hk, C, ...]`; zeros, or the last document, pad the last chunk."""
    missing = -x.shape[1] % chunk
    if missing:
        filling = torch.zeros_like(x[:, -1:]) if x.is_floating_point() else x[:, -1:]
        x = torch.cat([x, filling.repeat_interleave(missing, 1)], 1)
    return x.unflatten(1, (-1, chunk)).movedim((1, 3), (0, 2)).contiguous()


def _join_chunks(x: torch.Tensor) -> torch.Tensor:
    """`[N, B, Hk, C, ...]` to `[B, N * C, Hk, ...]`."""
    return x.movedim((0, 2), (1, 3)).flatten(1, 2)


def _unseen(chunk: int, documents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """True where a token of a chunk must not see another: `[C, C]` or, with documents, `[N, B, 1, C, C]`."""
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1)
    return later if documents is None else later | (documents.unsqueeze(-1) != documents.unsqueeze(-2))


def _document_borders(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bools: tokens that read the state before their chunk, or write the one after it; chunks that a state crosses."""
    before = torch.cat([documents[:1, ..., :1], documents[:-1, ..., -1:]])
    after = documents[..., -1:]
    return documents == before, documents == after, (before == after).squeeze(-1)


__all__ = ["gated_delta_rule_with_prediction"]
