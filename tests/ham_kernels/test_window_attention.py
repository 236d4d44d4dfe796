# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention over kept columns and a window of the last tokens, against the reference's dense mask over all tokens."""

import pytest
import torch

pytest.importorskip("triton")

from ham_hf.reference import naive_sparse_attention
from ham_kernels.compact import compact_kept
from ham_kernels.sparse_prefix_attention import backward, forward, sparse_prefix_attention, tiles

pytestmark = pytest.mark.usefixtures("arithmetic_as_on_a_gpu", "small_tiles")


def window_starts(window, real, seq_idx=None):
    """First token of each token's window, `[B, L]`; its own if the window has no other."""
    rank = real.cumsum(1) - 1
    start = torch.searchsorted(rank, (rank - (window - 1)).clamp(min=0))
    if seq_idx is not None:
        start = start.maximum(torch.searchsorted(seq_idx, seq_idx))
    return start.minimum(torch.arange(real.shape[1], device=real.device))


def kernel_arguments(k, v, keep, window, real=None, seq_idx=None, queries=None, evict=None):
    """Everything after `v`, for the last `queries` tokens; `evict` is a time and the tokens `[B, L, Hk]` it takes."""
    length = keep.shape[1]
    queries = length if queries is None else queries
    times = torch.full_like(keep, queries + 1, dtype=torch.long)
    if evict is not None:
        times[evict[1]] = evict[0] - (length - queries)
    (k_kept, v_kept, until), before = compact_kept(keep, k, v, times[..., None])
    start = window_starts(window, torch.ones_like(keep[..., 0]) if real is None else real, seq_idx)
    document = torch.zeros_like(start) if seq_idx is None else torch.searchsorted(seq_idx, seq_idx)
    begin, end = (before.gather(1, x[..., None].expand_as(before))[:, -queries:] for x in (document, start))
    return {
        "k_kept": k_kept, "v_kept": v_kept, "begin": begin, "end": end,
        "until": None if evict is None else until[..., 0], "window_start": start[:, -queries:], "real": real,
    }  # fmt: skip


def ours(q, k, v, keep, window, queries=None, **case):
    """Outputs and log-sum-exp of the kernels."""
    arguments = kernel_arguments(k, v, keep, window, queries=queries, **case)
    return sparse_prefix_attention(q[:, -(queries or q.shape[1]) :], k, v, **arguments, return_lse=True)


def reference(q, k, v, keep, window, real=None, seq_idx=None, queries=None, evict=None):
    """The definition; an eviction changes the kept set of the queries from its time on."""
    parts = [(slice(None), keep)]
    if evict is not None:
        parts = [(slice(evict[0]), keep), (slice(evict[0], None), keep & ~evict[1])]
    out, lse = [], []
    own_logits = (q * k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)).sum(-1) * q.shape[3] ** -0.5
    for part, kept in parts:
        o, weights = naive_sparse_attention(q, k, v, kept, seq_idx=seq_idx, window=window, real=real)
        own_weights = weights.diagonal(dim1=2, dim2=3).transpose(1, 2)
        out.append(o[:, part])
        lse.append((own_logits - own_weights.log())[:, part])
    return torch.cat(out, 1)[:, -(queries or q.shape[1]) :], torch.cat(lse, 1)[:, -(queries or q.shape[1]) :]


def evaluate(function, inputs, grads, dtype, keep, window, **case):
    """Outputs, log-sum-exp and gradients of a function, at a precision."""
    inputs = [x if x.dtype == dtype else x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = function(*inputs, keep, window, **case)
    gradients = torch.autograd.grad((out, lse), inputs, (grads[0].to(out.dtype), grads[1].to(lse.dtype)))
    return dict(zip(("o", "lse", "q", "k", "v"), (out, lse, *gradients), strict=True))


def check(inputs, keep, window, assert_error_within, factor=2.0, **case):
    """Compares the kernels with the reference in float64; PyTorch's error at this precision sets the bound."""
    q, _, v = inputs
    length = case.get("queries") or q.shape[1]
    grads = [torch.randn(*q.shape[:1], length, q.shape[2], *x, device=q.device) for x in ((v.shape[3],), ())]
    actual = evaluate(ours, inputs, grads, q.dtype, keep, window, **case)
    exact = evaluate(reference, inputs, [x.to(q.dtype) for x in grads], torch.float64, keep, window, **case)
    baseline = evaluate(reference, inputs, grads, q.dtype, keep, window, **case)
    assert (actual["o"].dtype, actual["lse"].dtype) == (q.dtype, torch.float32)
    for name, value in actual.items():
        assert_error_within(value, exact[name], baseline[name], factor, name=name)


def make_inputs(device, length, dtype=torch.float32, batch=1, heads=2, groups=1, K=16, V=16):
    shapes = ((batch, length, heads * groups, K), (batch, length, heads, K), (batch, length, heads, V))
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def kept_at_random(device, length, fractions=(0.8, 0.2), batch=1):
    return torch.rand(batch, length, len(fractions), device=device) < torch.tensor(fractions, device=device)


@pytest.mark.parametrize(
    ("window", "length", "groups", "batch"),
    [(1, 41, 1, 1), (2, 33, 4, 1), (5, 65, 1, 2), (64, 97, 2, 1), (200, 77, 1, 1), (3, 1, 4, 4), (1, 1, 4, 4)],
)
def test_windows(window, length, groups, batch, device, amid_nan, assert_error_within):
    inputs = make_inputs(device, length, batch=batch, groups=groups)
    check([amid_nan(x) for x in inputs], kept_at_random(device, length, batch=batch), window, assert_error_within)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("window", "groups", "K", "V"), [(7, 1, 48, 80), (40, 4, 20, 64)])
def test_low_precision(dtype, window, groups, K, V, device, amid_nan, assert_error_within):
    inputs = make_inputs(device, 61, dtype, groups=groups, K=K, V=V)
    check([amid_nan(x) for x in inputs], kept_at_random(device, 61), window, assert_error_within)


@pytest.mark.parametrize("fractions", [(0.0, 0.0), (1.1, 1.1), (1.1, 0.0, 0.03)])
def test_nothing_everything_and_very_different_counts_kept(fractions, device, assert_error_within):
    inputs = make_inputs(device, 70, heads=len(fractions))
    check(inputs, kept_at_random(device, 70, fractions), 9, assert_error_within)


def padded(device, length):
    """Two rows, one padded on the left, the other in the middle too."""
    real = torch.ones(2, length, dtype=torch.bool, device=device)
    real[0, :19] = False
    real[1, :2] = real[1, 20:45] = real[1, 50] = False
    return real


@pytest.mark.parametrize("window", [1, pytest.param(8, marks=pytest.mark.slow), 40])
def test_padding_is_neither_shown_nor_counted(window, device, assert_error_within):
    real = padded(device, 75)
    keep = kept_at_random(device, 75, batch=2) & real[..., None]
    check(make_inputs(device, 75, batch=2, groups=2), keep, window, assert_error_within, real=real)


@pytest.mark.parametrize("window", [4, 50])
def test_packed_documents(window, device, assert_error_within):
    """Each document sees its own columns and tokens only, wherever it starts in a tile."""
    seq_idx = torch.tensor([[0] * 3 + [1] * 58 + [2] * 1 + [3] * 38], device=device)
    check(make_inputs(device, 100), kept_at_random(device, 100), window, assert_error_within, seq_idx=seq_idx)


@pytest.mark.parametrize(("queries", "window"), [(1, 6), (33, 6), pytest.param(33, 60, marks=pytest.mark.slow)])
def test_tokens_before_the_queries(queries, window, device, amid_nan, assert_error_within):
    """Of two rows one is padded; windows reach back before the first query."""
    real = padded(device, 75)
    keep = kept_at_random(device, 75, batch=2) & real[..., None]
    inputs = [amid_nan(x) for x in make_inputs(device, 75, batch=2, groups=8)]
    check(inputs, keep, window, assert_error_within, queries=queries, real=real)


@pytest.mark.parametrize("queries", [90, 50])
def test_evicted_columns(queries, device, assert_error_within):
    """An evicted token is still shown by the windows that hold it."""
    keep = kept_at_random(device, 90, (0.9, 0.5))
    evict = (60, kept_at_random(device, 90, (0.5, 0.9)))
    check(make_inputs(device, 90), keep, 12, assert_error_within, queries=queries, evict=evict)


def test_a_window_of_one_token_is_none(device):
    """Bit for bit, forward and backward."""
    inputs, keep = make_inputs(device, 50, groups=2), kept_at_random(device, 50)
    arguments = kernel_arguments(*inputs[1:], keep, 1)
    results = []
    for window_start in (None, arguments["window_start"]):
        out = sparse_prefix_attention(*inputs, **(arguments | {"window_start": window_start}))
        results.append([out, *torch.autograd.grad(out.sum(), inputs, retain_graph=True)])
    for without, with_window in zip(*results, strict=True):
        torch.testing.assert_close(with_window, without, rtol=0, atol=0)


def test_what_no_query_sees_may_hold_anything(device):
    """Tokens before all windows, and kept tokens that are still in the last query's window."""
    q, k, v = make_inputs(device, 80)
    q = q[:, -30:].detach().requires_grad_()
    arguments = kernel_arguments(k, v, kept_at_random(device, 80), 6, queries=30)
    column = torch.arange(arguments["k_kept"].shape[2], device=device)
    unseen = column >= arguments["end"][:, -1, :, None]
    before = int(arguments["window_start"][0, 0])
    assert unseen.any()
    assert before == 45
    results = []
    for value in (0.0, torch.nan):
        own = [x.detach().clone() for x in (k, v)]
        kept = [arguments[name].detach().clone() for name in ("k_kept", "v_kept")]
        for x in own:
            x[:, :before] = value
        for x in kept:
            x[unseen] = value
        inputs = [q, *(x.requires_grad_() for x in (*own, *kept))]
        changed = arguments | {"k_kept": inputs[3], "v_kept": inputs[4]}
        out, lse = sparse_prefix_attention(*inputs[:3], **changed, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not any(x[:, :before].any() for x in results[1][3:5])


def test_work_is_proportional_to_the_window(steps, device):
    """With nothing kept, a tile of 32 queries visits the 19 tokens before it and its own, in tiles of 16."""
    inputs = make_inputs(device, 96, heads=1)
    ours(*inputs, kept_at_random(device, 96, (0.0,)), 20)[0].sum().backward()
    for name in ("_attend", "_add_dq"):
        assert sorted(start for step, start, _ in steps if step == name) == [0, 13, 16, 29, 45, 45, 61, 61, 77, 93]
    # A tile of 16 tokens is seen by the 34 queries from the second on, the last three tiles by fewer.
    assert len([1 for step, _, _ in steps if step == "_add_dkv"]) == 2 * 4 + 1 + 1


@pytest.mark.parametrize("padding", [False, True])
def test_only_the_ends_of_a_window_are_masked(padding, steps, device):
    """Padding could be anywhere, so with it forward and `dq` mask all tiles."""
    real = torch.ones(1, 96, dtype=torch.bool, device=device) if padding else None
    ours(*make_inputs(device, 96, heads=1), kept_at_random(device, 96, (0.0,)), 80, real=real)[0].sum().backward()
    branches = {name: {masked for step, _, masked in steps if step == name} for name, _, _ in steps}
    assert branches["_attend"] == branches["_add_dq"] == ({True} if padding else {False, True})
    assert branches["_add_dkv"] == {False, True}


def test_strided_inputs_and_other_integers(device):
    """Also windows of 32-bit integers, and the window's arguments as slices."""
    real = padded(device, 60)[:, :50]
    inputs, keep = make_inputs(device, 50, batch=2), kept_at_random(device, 50, batch=2) & real[..., None]
    arguments = kernel_arguments(*(x.detach() for x in inputs[1:]), keep, 7, real=real)
    expected = sparse_prefix_attention(*inputs, **arguments)
    wide = torch.full((2, 100), 99, dtype=torch.int32, device=device)
    wide[:, ::2] = arguments["window_start"]
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    out = sparse_prefix_attention(*strided, **(arguments | {"window_start": wide[:, ::2]}))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grad = torch.randn_like(out)
    for actual, right in zip(
        torch.autograd.grad(out, strided, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=0, atol=0)


def test_autocast(device):
    inputs, keep = make_inputs(device, 30), kept_at_random(device, 30)
    arguments = kernel_arguments(*inputs[1:], keep, 5)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = sparse_prefix_attention(*inputs, **arguments)
    low = arguments | {name: arguments[name].bfloat16() for name in ("k_kept", "v_kept")}
    expected = sparse_prefix_attention(*(x.bfloat16() for x in inputs), **low)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_bad_input(device):
    q, k, v = make_inputs(device, 9)
    arguments = kernel_arguments(k, v, kept_at_random(device, 9, (1.1, 1.1)), 3, queries=6)
    arguments |= {"q": q[:, -6:], "k": k, "v": v, "real": torch.ones(1, 9, dtype=torch.bool, device=device)}
    start = arguments["window_start"]

    def call(**changes):
        return sparse_prefix_attention(**(arguments | changes))

    call()
    with pytest.raises(TypeError, match=r"`window_start` must be a tensor, got int"):
        call(window_start=3)
    with pytest.raises(TypeError, match=r"`window_start` must be an integer tensor, got torch.float32"):
        call(window_start=start.float())
    with pytest.raises(ValueError, match=r"`window_start` must have 2 dimensions, got \[1, 6, 2\]"):
        call(window_start=start[..., None].expand(-1, -1, 2))
    with pytest.raises(ValueError, match=r"`window_start` must be \[1, 6\] .* got \[1, 5\]"):
        call(window_start=start[:, 1:])
    with pytest.raises(TypeError, match=r"`real` must be a bool tensor, got torch.int64"):
        call(real=arguments["real"].long())
    with pytest.raises(ValueError, match=r"`real` must be \[1, 9\] .* got \[1, 6\]"):
        call(real=arguments["real"][:, -6:])
    with pytest.raises(ValueError, match=r"`real` .* needs `window_start`, got None"):
        call(k=k[:, -6:], v=v[:, -6:], window_start=None, real=arguments["real"][:, -6:])
    with pytest.raises(ValueError, match=r"`k` must have at least the 6 tokens of `q`, got 5"):
        call(k=k[:, -5:], v=v[:, -5:])
    with pytest.raises(ValueError, match=r"`k` must be \[1, 6, 2, 16\] .* got \[1, 9, 2, 16\]"):
        call(window_start=None, real=None)
    with pytest.raises(ValueError, match=r"`v` must be \[1, 9, 2, 16\] .* got \[1, 8, 2, 16\]"):
        call(v=v[:, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("groups", "K", "V"), [(1, 128, 128), (4, 64, 64), (3, 96, 192), (2, 256, 256)])
@pytest.mark.parametrize("window", [64, 700])
def test_real_shapes_on_the_gpu(dtype, groups, K, V, window, amid_nan, assert_error_within):
    """Two rows, one padded on the left, whose first 300 tokens have no query."""
    length = 1531
    real = torch.ones(2, length, dtype=torch.bool, device="cuda")
    real[1, :420] = False
    keep = kept_at_random("cuda", length, (1.0, 0.5, 0.02), batch=2) & real[..., None]
    inputs = make_inputs("cuda", length, dtype, batch=2, heads=3, groups=groups, K=K, V=V)
    factor = 4.0 if dtype == torch.float32 else 2.0  # products of the kernel are one chain, cuBLAS adds up in blocks
    case = {"queries": length - 300, "real": real}
    check([amid_nan(x) for x in inputs], keep, window, assert_error_within, factor, **case)


KERNELS = {
    "fwd_window": forward.sparse_prefix_attention_fwd_kernel,
    "dq_window": backward.sparse_prefix_attention_bwd_dq_kernel,
    "dkv": backward.sparse_prefix_attention_bwd_dkv_kernel,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("tile", range(4))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tile_shape_that_tuning_may_choose(kernel, tile, dim, assert_error_within, monkeypatch):
    """The other tests run the first tile shape of each kernel."""
    tuned = tiles.with_tiles(KERNELS[kernel], kernel, 2, dim, torch.cuda.get_device_capability() == (9, 0))
    assert len(tuned.tiles) <= 4
    if tile >= len(tuned.tiles):
        pytest.skip("this chip has fewer tile shapes for this width")
    monkeypatch.setattr(tuned, "configs", [tuned.tiles[tile]])
    inputs = make_inputs("cuda", 517, torch.bfloat16, groups=2, K=dim, V=dim)
    check(inputs, kept_at_random("cuda", 517, (1.0, 0.3)), 200, assert_error_within)
