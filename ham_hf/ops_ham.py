# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The operations of a HAM layer, each linear in memory; `reference_ham` defines what they compute."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_torchdynamo_exporting

from .routing_ham import error_score, widened

try:
    import ham_kernels
except ImportError as error:
    ham_kernels = None  # type: ignore[assignment]
    NO_KERNELS_BECAUSE = str(error)

# Queries of an attention block, whose logits are held at once; twice as many where there are many columns.
QUERY_BLOCK = 64
MANY_COLUMNS = 512
# Streams whose kept counts lie within this ratio share one padded batch, which bounds what padding costs.
GROUP_RATIO = 0.75
# The mask of such a batch has about this many elements a query head: larger ones leave a CPU core's own cache.
GROUP_ELEMENTS = 2**18
# The chunkwise delta rule works on this many tokens, over all rows and heads, at once: more leave a CPU's cache.
SEGMENT_TOKENS = 8192
# Up to so many queries a stream PyTorch reads pages where they lie: the copies of queries are no larger than the keys.
PAGED_QUERIES = 16
# The kernels hold a whole head in registers.
MAX_KERNEL_HEAD_DIM = 256


def exporting() -> bool:
    """Whether `torch.export` traces this call, not strictly: older Dynamos think so whenever they compile."""
    return is_torchdynamo_exporting() and not torch.compiler.is_dynamo_compiling()


def _kernel(op: str, *tensors: torch.Tensor) -> Callable[..., Any] | None:
    """The kernel that runs `op` on tensors like these, or `None`: then PyTorch does.

    PyTorch has everything on a CPU, float64 (the kernels would round it), wider heads and what is exported.
    """
    if exporting():
        return None
    device = tensors[0].device
    if device.type != "cuda" or any(x.dtype == torch.float64 or x.shape[-1] > MAX_KERNEL_HEAD_DIM for x in tensors):
        return None
    problem = NO_KERNELS_BECAUSE if ham_kernels is None else ham_kernels.platform_problem(device)
    if problem is None:
        return getattr(ham_kernels, op)
    _warn_without_kernels(problem)
    return None


@functools.cache
def _warn_without_kernels(problem: str) -> None:
    warnings.warn(f"`ham_kernels` is not used on the GPU, PyTorch is, which is slower: {problem}.", stacklevel=4)


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """L2-normalises the last dimension of `x` in float32 or wider; a zero vector stays zero."""
    x = widened(x)
    if _in_own_passes(x):
        return _Normalise.apply(x, None, 1, eps)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides `x` `[..., D]` by the root mean square of its last dimension, and multiplies with `weight` `[D]`."""
    if _in_own_passes(x):
        return _Normalise.apply(x, weight, x.shape[-1], eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _in_own_passes(x: torch.Tensor) -> bool:
    """Whether `_Normalise` serves: on a CPU PyTorch's own norm is made of operations that each fill a tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not exporting()


class _Normalise(torch.autograd.Function):
    """`x / sqrt(sum(x^2) / count + eps)` over the last dimension, times a weight; keeps its input and one number each.

    Passes write in place where they can: on a CPU new memory costs more than arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, count: int, eps: float) -> torch.Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(count).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.count = count
        out = x * inverse
        return out if weight is None else out.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed, dweight = x * inverse, None
        product = grad * normed
        if weight is not None:
            dweight = product.flatten(0, -2).sum(0)
            product *= weight
        along = product.sum(-1, keepdim=True).div_(ctx.count)
        dx = product.copy_(grad) if weight is None else torch.mul(grad, weight, out=product)
        return dx.addcmul_(normed, along, value=-1).mul_(inverse), dweight, None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: Transformers' `apply_rotary_pos_emb`, with one new tensor instead of five.

    Args:
        x: `[B, T, H, K]`.
        cos, sin: `[B or 1, T, 1, K]`, both halves of `K` alike.

    Returns:
        `[B, T, H, K]`.
    """
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution followed by SiLU, over the real tokens of each row.

    Args:
        x: `[B, T, C]` inputs.
        weight: `[C, W]`; `weight[:, W - 1]` multiplies the current token.
        initial_state: `[B, W - 1, C]` last real inputs before this call, oldest first; zeros if `None`.
        real: `[B, T]` bool, false for padding; `None` if every token is real.
        seq_idx: `[B, T]` int, the document of each token; `None` if each row is one document.

    Returns:
        `[B, T, C]` outputs (unspecified for padding) and `[B, W - 1, C]` final state (unspecified for packed rows).
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, channels)
    new, x = x, torch.cat([initial_state, x], dim=1)
    final_state = x[:, length:].clone() if real is None else convolution_state(new, initial_state, real)
    if real is None and seq_idx is None:
        return _ShortConvolution.apply(x, weight), final_state

    # Entry `r + i` of `order` is the i-th oldest input that the r-th real token reads: the state counts as real.
    real = x.new_ones(batch, length, dtype=torch.bool) if real is None else real
    order = _real_first(real, width - 1)
    rank = (real.cumsum(1) - 1).clamp(min=0)
    out = torch.zeros_like(x[:, :length])
    for i in range(width):
        source = order.gather(1, rank + i)
        tap = x.gather(1, source[..., None].expand(-1, -1, channels))
        if seq_idx is not None:
            document = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=1).gather(1, source)
            tap = tap.masked_fill((document != seq_idx)[..., None], 0)
        out = torch.addcmul(out, tap, weight[:, i])
    return F.silu(out), final_state


class _ShortConvolution(torch.autograd.Function):
    """`short_convolution` of `[B, W - 1 + T, C]`, where every token is real and of one document.

    Of `[B, T, C]` it keeps nothing for the backward pass: to convolve again is faster than to fill new memory.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.silu(_convolve(x, weight.T.contiguous()), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        taps, length = weight.T.contiguous(), grad.shape[1]
        product = _convolve(x, taps)
        grad = torch.ops.aten.silu_backward(grad, product)
        dx, dtaps = grad.new_zeros(x.shape), torch.empty_like(taps)
        for i, tap in enumerate(taps):
            span = slice(i, i + length)
            dx[:, span].addcmul_(grad, tap)
            dtaps[i] = torch.mul(x[:, span], grad, out=product).sum((0, 1))
        return dx, dtaps.T


def _convolve(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """`[B, T, C]` sums of `W` neighbours in `[B, W - 1 + T, C]`, weighted by taps `[W, C]`."""
    length = x.shape[1] - len(taps) + 1
    out = x[:, :length] * taps[0]
    for i in range(1, len(taps)):
        out.addcmul_(x[:, i : i + length], taps[i])
    return out


def convolution_state(x: torch.Tensor, initial_state: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The last `W - 1` real inputs `[B, W - 1, C]` after `x` `[B, T, C]` follows `initial_state` `[B, W - 1, C]`."""
    width = initial_state.shape[1]
    extended = torch.cat([initial_state, x[:, -width:] if real is None else x], dim=1)
    if real is None:
        return extended[:, extended.shape[1] - width :].clone()
    last = real.sum(1, keepdim=True) + torch.arange(width, device=x.device)
    source = _real_first(real, width).gather(1, last)
    return extended.gather(1, source[..., None].expand(-1, -1, x.shape[2]))


def _real_first(real: torch.Tensor, width: int) -> torch.Tensor:
    """Indices `[B, width + T]` into state and tokens, real ones first and in order; all of the state is real."""
    padding = ~F.pad(real, (width, 0), value=True)
    return padding.to(torch.uint8).argsort(dim=1, stable=True)


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
    """The gated delta rule (arXiv 2412.06464) in its chunkwise WY form, with what the state predicted for each token.

    Within a chunk the pseudo-values `u_t = beta_t (v_t - vhat_t)` solve `(I + diag(beta) A) U = diag(beta) (V - V0)`,
    where `A` holds the decayed products of keys below the diagonal and `V0` what the chunk's initial state predicts.
    The prediction is then `A U + V0`, a product without cancellation: it is exactly zero where nothing was stored.

    Args:
        q: `[B, T, H, K]`, L2-normalised by the caller; `H` is a multiple of `Hk`.
        k: `[B, T, Hk, K]`, L2-normalised by the caller.
        v: `[B, T, Hk, V]`.
        g: `[B, T, Hk]` decay in log space, at most 0; 0 for padding.
        beta: `[B, T, Hk]` write strength in (0, 1), or (0, 2) with negative eigenvalues; 0 for padding.
        scale: factor of the output; `K ** -0.5` if `None`.
        initial_state: `[B, Hk, K, V]` float32; zeros if `None`.
        seq_idx: `[B, T]` int, document of each token, constant over padding; the state is cleared where it changes.
        chunk_size: tokens solved at once; by default what is fastest, 64 in the kernel and 32 in PyTorch.
        score: `"cosine"`, `"l2"` or `"residual"` returns that score of each prediction instead, outside the graph, in
            which the predictions themselves are.
        predict: `False` leaves the predictions out, for one who reads neither them nor a score.

    Returns:
        `o` `[B, T, H, V]`, predictions `[B, T, Hk, V]` and final state `[B, Hk, K, V]`, all in float32 or wider; with
        `score`, scores `[B, T, Hk]` in place of the predictions; without `predict`, `None`.

    Raises:
        ValueError: for a score without `predict`.
    """
    if score is not None and not predict:
        raise ValueError(f"`predict` must be True with `score` {score!r}, got {predict!r}.")
    if kernel := _kernel("gated_delta_rule_with_prediction", k, v):
        return kernel(q, k, v, g, beta, scale, initial_state, seq_idx, chunk_size or 64, score, predict)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
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
    """The gated delta rule over segments of whole chunks, short enough to be worked on in the cache of a CPU."""
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
    # The solver works on columns: a transposed system is one that it takes and gives in the layout of ours.
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
    # Taken apart at once: the gradient of an index fills a tensor of all chunks.
    of_chunks = (x.unbind() for x in (from_values, from_state, to_state, across))
    for values, reads, writes, decay in zip(*of_chunks, strict=True):
        state_of_chunk.append(state)
        update_of_chunk.append(torch.baddbmm(values, reads, state, alpha=-1))
        state = torch.baddbmm(state * decay, writes, update_of_chunk[-1])
    states, updates = torch.cat(state_of_chunk), torch.cat(update_of_chunk)

    # One matrix a stream and chunk from here on: `[N * B * Hk, rows, columns]`.
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
    """Which tokens of a chunk a token must not see, later and other documents': `[C, C]` or `[N, B, 1, C, C]`."""
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1)
    return later if documents is None else later | (documents.unsqueeze(-1) != documents.unsqueeze(-2))


def _document_borders(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per chunk: which tokens read the state before it, which reach that after it, and whether a state crosses it."""
    before = torch.cat([documents[:1, ..., :1], documents[:-1, ..., -1:]])
    after = documents[..., -1:]
    return documents == before, documents == after, (before == after).squeeze(-1)


def decode_kernel(op: str, state: torch.Tensor) -> Callable[..., Any] | None:
    """A kernel that takes one token through a part of a layer in place, or `None`: then PyTorch's operations do.

    It has no backward and no mixed precision.

    Args:
        op: `"decode_update"`, what comes before attention, or `"decode_mix_append"`, what comes after.
        state: `[B, Hk, K, V]` recurrent state of the layer.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(state.device.type):
        return None
    return _kernel(op, state, state.mT)


def compact_kept(keep: torch.Tensor, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gathers the kept tokens of each row and head, in order, to the front.

    Args:
        keep: `[B, T, Hk]` bool.
        tensors: each `[B, T, Hk, D]`.

    Returns:
        each tensor as `[B, Hk, M, D]`, `M` the largest number kept (what lies past a head's own number is
        unspecified), and `[B, T, Hk]` int64, the number of tokens kept before each.
    """
    if kernel := _kernel("compact_kept", keep, *tensors):
        return kernel(keep, *tensors)
    counts = keep.cumsum(1)
    largest = int(counts[:, -1].max()) if keep.numel() else 0
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :largest].transpose(1, 2)
    compacted = [x.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in tensors]
    return compacted, counts - keep.long()


def sparse_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of each query over a span of compacted kept tokens and itself.

    Column `end[t]` holds token `t` itself if that is kept. Work is proportional to the spans; backward recomputes the
    weights, so memory is linear in `T`.

    Args:
        q: `[B, T, H, K]` queries; `H` is a multiple of `Hk`.
        k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`, each query's own key and value, which it always sees.
        k_kept, v_kept: `[B, Hk, M, K]` and `[B, Hk, M, V]` compacted keys and values.
        begin, end: `[B, T, Hk]` int, query `t` sees columns `begin <= c < end`; both must not fall along `T`.
        until: `[B, Hk, M]` int, column `c` is seen by queries `t < until` only; `None` if nothing is ever evicted.
        scale: factor of the logits; `K ** -0.5` if `None`.

    Returns:
        `[B, T, H, V]` in the dtype of `v`.
    """
    batch, _, kv_heads, key_dim = k.shape
    scale = key_dim**-0.5 if scale is None else scale
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, k_kept, v_kept = (x.to(dtype) for x in (q, k, v, k_kept, v_kept))
    if kernel := _kernel("sparse_prefix_attention", k, v):
        return kernel(q, k, v, k_kept, v_kept, begin, end, until, scale)
    q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * Hk, G, T, K]
    k, v, begin, end = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, begin, end))
    k_kept, v_kept = k_kept.flatten(0, 1), v_kept.flatten(0, 1)
    until = None if until is None else until.flatten(0, 1)
    out = _SparsePrefixAttention.apply(q, k, v, k_kept, v_kept, begin, end, until, scale)
    return out.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _SparsePrefixAttention(torch.autograd.Function):
    """`sparse_prefix_attention` over streams, one per row and key/value head, in blocks of queries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_kept: torch.Tensor,
        v_kept: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        until: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, k_kept, v_kept, begin, end, until)
        ctx.scale = scale
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        for block in _blocks(k, v, k_kept, v_kept, begin, end, until, q.shape[1]):
            queries = q[block.streams, :, block.rows]
            # The queries of a group are rows of one matrix, which is faster than several that share their keys.
            block_out = F.scaled_dot_product_attention(
                queries.flatten(1, 2)[:, None],
                block.keys[:, None],
                block.values[:, None],
                attn_mask=block.mask.flatten(1, 2)[:, None],
                scale=scale,
            )
            out[block.streams, :, block.rows] = block_out.view(*queries.shape[:3], -1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, k_kept, v_kept, begin, end, until = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Added up over blocks, so in float32 at least.
        dtype = torch.promote_types(q.dtype, torch.float32)
        dk_kept, dv_kept = torch.zeros_like(k_kept, dtype=dtype), torch.zeros_like(v_kept, dtype=dtype)
        for block in _blocks(k, v, k_kept, v_kept, begin, end, until):
            streams, rows, columns = block.streams, block.rows, block.columns
            queries, dout = q[streams, :, rows] * ctx.scale, grad[streams, :, rows]
            shape = (*queries.shape[:3], block.keys.shape[1])
            queries, dout = queries.flatten(1, 2), dout.flatten(1, 2)
            logits = (queries @ block.keys.mT).view(shape) + block.mask
            weights = logits.softmax(-1, dtype=dtype).to(q.dtype).flatten(1, 2)
            dlogits = dout @ block.values.mT
            dlogits = weights * (dlogits - (weights * dlogits).sum(-1, keepdim=True))
            dq[streams, :, rows] = (dlogits @ block.keys).view(*shape[:3], -1) * ctx.scale
            dkeys, dvalues = dlogits.mT @ queries, weights.mT @ dout
            dk[streams, rows], dv[streams, rows] = dkeys[:, : shape[2]], dvalues[:, : shape[2]]
            dk_kept[streams, columns] += dkeys[:, shape[2] :]
            dv_kept[streams, columns] += dvalues[:, shape[2] :]
        return dq, dk, dv, dk_kept.to(k_kept.dtype), dv_kept.to(v_kept.dtype), None, None, None, None


class _Block(NamedTuple):
    """A block of queries: of which streams, which tokens, and what they read.

    The keys `[n, t + C, K]` and values `[n, t + C, V]` are those of the block's own `t` tokens and, behind them, of
    the `C` kept columns from before it; the mask `[n, copies, t, t + C]` is 0 where a query may look, else -inf. They
    are views that the next block overwrites.
    """

    streams: torch.Tensor | slice
    rows: slice
    columns: slice
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


def _blocks(
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    copies: int = 1,
) -> Iterator[_Block]:
    """Yields every block of every group of streams that see alike numbers of columns; `copies` of each mask."""
    length = end.shape[1]
    lows, highs = begin[:, ::QUERY_BLOCK].tolist(), end[:, ::QUERY_BLOCK].tolist()
    firsts, lasts, totals = begin[:, 0].tolist(), begin[:, -1].tolist(), (end[:, -1] - begin[:, 0]).tolist()
    # A token is kept if the next one counts one more, and then stands in the column of its own count.
    kept = F.pad(end[:, 1:] > end[:, :-1], (0, 1))
    dropped = torch.zeros_like(kept, dtype=k.dtype).masked_fill_(~kept, -torch.inf)
    later = k.new_full((2 * QUERY_BLOCK, 2 * QUERY_BLOCK), -torch.inf).triu()
    for group in _group_alike(totals):
        size = min(_block_size(max(totals[n] for n in group)), length)
        starts = range(0, length, size)
        streams = slice(group[0], group[0] + 1) if len(group) == 1 else torch.tensor(group, device=end.device)
        alike = len(group) == 1 and firsts[group[0]] == lasts[group[0]] and until is None
        # Room in front for a block's own keys: they are written over columns that no later query sees.
        keys, values = (F.pad(x[streams], (0, 0, size, 0)) for x in (k_kept, v_kept))
        marks = [start // QUERY_BLOCK for start in starts]
        spans = [slice(min(lows[n][i] for n in group), max(highs[n][i] for n in group)) for i in marks]
        mask = keys.new_zeros(len(group), copies, size, size + max(x.stop - x.start for x in spans))
        for start, columns in zip(starts, spans, strict=True):
            own = min(size, length - start)
            rows = slice(start, start + own)
            first, last = columns.start + size - own, columns.stop + size
            keys[:, first : first + own], values[:, first : first + own] = k[streams, rows], v[streams, rows]
            block_mask = mask[:, :, :own, : last - first]
            inside = dropped[streams, None, rows] + later[:own, :own]
            inside.diagonal(dim1=1, dim2=2).zero_()
            if alike:
                block_mask[..., own:size] = 0  # where a longer block masked tokens of its own
            else:
                inside.masked_fill_(~_visible_inside(begin, end, until, streams, rows), -torch.inf)
                visible = _visible_columns(begin, end, until, streams, rows, columns)
                block_mask[..., own:] = torch.where(visible, 0.0, -torch.inf)[:, None]
            block_mask[..., :own] = inside[:, None]
            yield _Block(streams, rows, columns, keys[:, first:last], values[:, first:last], block_mask)


def _block_size(columns: int) -> int:
    """A block's queries also read all of its own keys: a short one pays beside few columns, a long one beside many."""
    return QUERY_BLOCK if columns < MANY_COLUMNS else 2 * QUERY_BLOCK


def _visible_inside(
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    streams: torch.Tensor | slice,
    rows: slice,
) -> torch.Tensor:
    """`[n, t, t]` bool: which of a block's own tokens its queries may look at, were all of them kept and earlier."""
    begin, end = begin[streams, rows], end[streams, rows]
    visible = end.unsqueeze(1) >= begin.unsqueeze(2)
    if until is not None:
        query = torch.arange(rows.start, rows.stop, device=end.device)
        visible &= query[:, None] < until[streams].gather(1, end.clamp(max=until.shape[1] - 1)).unsqueeze(1)
    return visible | torch.eye(end.shape[1], dtype=torch.bool, device=end.device)


def _visible_columns(
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    streams: torch.Tensor | slice,
    rows: slice,
    columns: slice,
) -> torch.Tensor:
    """`[n, t, C]` bool: which of the columns from before a block its queries may look at."""
    column = torch.arange(columns.start, columns.stop, device=end.device)
    visible = (column >= begin[streams, rows, None]) & (column < end[streams, rows.start, None, None])
    if until is not None:
        query = torch.arange(rows.start, rows.stop, device=end.device)
        visible &= query[:, None] < until[streams, None, columns]
    return visible


def _group_alike(counts: list[int]) -> list[list[int]]:
    """Partitions the indices of `counts` into small groups whose counts are at least `GROUP_RATIO` of the largest."""
    groups: list[list[int]] = []
    largest = 0
    for n in sorted(range(len(counts)), key=lambda n: -counts[n]):
        size = _block_size(largest)
        room = max(1, GROUP_ELEMENTS // (size * (size + largest)))
        if not groups or counts[n] < GROUP_RATIO * largest or len(groups[-1]) == room:
            groups.append([])
            largest = counts[n]
        groups[-1].append(n)
    return [sorted(group) for group in groups]


def slab_table(slabs: list[tuple[torch.Tensor, ...]]) -> torch.Tensor | None:
    """What the kernels know of each slab `(keys, values, owner, rank, scores, positions)`; PyTorch: `None`.

    `rank` `[P]` int32 numbers the pages of each stream, from 0. The table holds as long as the tensors stay in place.
    """
    kernel = _kernel("slab_table", *slabs[0][:2])
    return None if kernel is None else kernel(slabs)


def ragged_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float | None = None,
    index: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention of new tokens over paged keys of any number a head, the kept ones before them and themselves.

    Nothing is padded to the longest stream. What is stored is not copied, save by PyTorch for a gradient or where a
    stream has more than `PAGED_QUERIES` queries, and then for a few streams at a time.

    Args:
        q: `[N, T, G, K]`, the `G` queries of `T` tokens in each of `N` streams (a row and key/value head).
        k, v: `[N, T, K]` and `[N, T, V]`, the tokens' own keys and values.
        keep: `[N, T]` bool, which of the tokens the later ones see.
        pages: per slab `(keys [P, p, K], values [P, p, V], owner [P])`: full pages and the stream each belongs to.
        tail: `(keys [N, p, K], values [N, p, V], fill [N])`: each stream's open page and how much of it is in use.
        scale: factor of the logits; `K ** -0.5` if `None`.
        index: `(slab_table(...), counts [N] int64)`: where the slabs lie and how many tokens each stream holds, which
            spares the kernel a sort; `None` if it is not known. With it the last pages may be free: of all, slab by
            slab, only as many are read as the counts fill.

    Returns:
        `[N, T, G, V]` in the dtype of `v`.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not needs_gradient and (kernel := _kernel("ragged_decode_attention", k, v)):
        return kernel(q, k, v, keep, pages, tail, scale, index)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if index is not None:
        pages = _pages_in_use(pages, int((index[1] // tail[0].shape[1]).sum()))
    # A backward pass reads what the forward read, and by then pages may have been added to the same slabs.
    where_they_lie = q.shape[1] * q.shape[2] <= PAGED_QUERIES and not needs_gradient
    form = _attend_page_by_page if where_they_lie else _attend_stream_by_stream
    return form(q, k, v, keep, pages, tail, scale)


def _attend_page_by_page(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """`ragged_decode_attention` by a softmax whose parts are the pages: copies no keys, but the queries for each."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    tail_k, tail_v, fill = tail
    (length, groups), page = q.shape[1:3], tail_k.shape[1]
    q = q.flatten(1, 2)
    near = (q @ torch.cat([tail_k, k], 1).mT).to(dtype) * scale
    unused = torch.arange(page, device=q.device) >= fill[:, None]
    near[..., :page].masked_fill_(unused[:, None], -torch.inf)
    if length > 1:
        token = torch.arange(length, device=q.device)
        unseen = (token[:, None] < token) | (token[:, None] > token) & ~keep[:, None]
        near[..., page:].masked_fill_(unseen.repeat_interleave(groups, 1), -torch.inf)
    peak = near.amax(-1)
    paged = [(q[owner] @ keys.mT).to(dtype).mul_(scale) for keys, _, owner in pages]
    if pages:
        owner = torch.cat([owner for _, _, owner in pages])
        owners = owner.long()[:, None].expand(-1, q.shape[1])
        peak = peak.scatter_reduce(0, owners, torch.cat([logits.amax(-1) for logits in paged]), "amax")
    near = (near - peak[..., None]).exp()
    total = near.sum(-1)
    out = (near.to(v.dtype) @ torch.cat([tail_v, v], 1)).to(dtype)
    for logits, (_, values, owner) in zip(paged, pages, strict=True):
        weights = (logits - peak[owner, :, None]).exp()
        total.index_add_(0, owner, weights.sum(-1))
        out.index_add_(0, owner, (weights.to(v.dtype) @ values).to(dtype))
    return (out / total[..., None]).to(v.dtype).unflatten(1, (length, groups))


def _attend_stream_by_stream(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """`ragged_decode_attention` that copies what a few streams hold at a time, of those that hold alike numbers."""
    tail_k, tail_v, fill = tail
    streams, page = tail_k.shape[:2]
    # Each stream's open page comes first, with what is unused in front: all that it holds is then one span of columns.
    slot = ((torch.arange(page, device=q.device) + fill[:, None]) % page)[..., None]
    opened = [x.gather(1, slot.expand_as(x)) for x in (tail_k, tail_v)]
    pages = [(opened[0], opened[1], torch.arange(streams, device=q.device)), *pages]
    held, places = _places_of_pages([owner for _, _, owner in pages], streams)
    kept, before = compact_kept(keep[..., None], k[:, :, None], v[:, :, None])
    groups = _group_alike((held * page + before[:, -1, 0]).tolist())
    out = []
    for group in groups:
        members = torch.tensor(group, device=q.device)
        stored = _gather_pages(pages, places, held, members)
        keys, values = (torch.cat([x, new[members]], 2) for x, new in zip(stored, kept, strict=True))
        width = stored[0].shape[2]
        begin = (width - (held[members] - 1) * page - fill[members])[:, None, None].expand(-1, q.shape[1], 1)
        end = width + before[members]
        own = k[members].unsqueeze(2), v[members].unsqueeze(2)
        out.append(sparse_prefix_attention(q[members], *own, keys, values, begin, end, scale=scale))
    order = torch.tensor([n for group in groups for n in group], device=q.device)
    return torch.cat(out)[order.argsort()]


def _places_of_pages(owners: list[torch.Tensor], streams: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`[N]` pages of each stream, and for each slab's pages `[P]` which of its stream's they are."""
    owner = torch.cat(owners).long()
    held = torch.bincount(owner, minlength=streams)
    order = owner.argsort(stable=True)
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner), device=owner.device) - (held.cumsum(0) - held)[owner[order]]
    return held, list(place.split([len(x) for x in owners]))


def _gather_pages(
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    places: list[torch.Tensor],
    held: torch.Tensor,
    members: torch.Tensor,
) -> list[torch.Tensor]:
    """Keys and values `[n, 1, W, D]` of the streams `members` `[n]`, right-aligned."""
    width = int(held[members].max())
    row = torch.full_like(held, -1)
    row[members] = torch.arange(len(members), device=held.device)
    gathered = [x.new_zeros(len(members), width, *x.shape[1:]) for x in pages[0][:2]]
    for (keys, values, owner), place in zip(pages, places, strict=True):
        here = (row[owner] >= 0).nonzero()[:, 0]
        stream = owner[here]
        at = row[stream], width - held[stream] + place[here]
        gathered[0][at], gathered[1][at] = keys[here], values[here]
    return [x.flatten(1, 2).unsqueeze(1) for x in gathered]


def _pages_in_use(
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], number: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The first `number` pages of slabs `(keys, values, owner)`."""
    in_use = []
    for keys, values, owner in pages:
        if number > 0:
            in_use.append((keys[:number], values[:number], owner[:number]))
        number -= len(owner)
    return in_use


__all__ = [
    "compact_kept",
    "convolution_state",
    "decode_kernel",
    "gated_delta_rule_with_prediction",
    "l2norm",
    "ragged_decode_attention",
    "rms_norm",
    "short_convolution",
    "slab_table",
    "sparse_prefix_attention",
]
