# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention over compacted columns and itself: outputs, log-sum-exp and gradients against dense masked softmax."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ham_hf.reference import naive_sparse_attention  # noqa: E402
from ham_kernels.compact import compact_kept  # noqa: E402
from ham_kernels.sparse_prefix_attention import backward, forward, sparse_prefix_attention, tiles  # noqa: E402
from ham_kernels.sparse_prefix_attention.op import MAX_LENGTH  # noqa: E402

KERNELS = {
    "fwd": forward.sparse_prefix_attention_fwd_kernel,
    "dq": backward.sparse_prefix_attention_bwd_dq_kernel,
    "dkv": backward.sparse_prefix_attention_bwd_dkv_kernel,
}
NAMES = ("q", "k", "v", "k_kept", "v_kept")
pytestmark = pytest.mark.usefixtures("arithmetic_as_on_a_gpu", "small_tiles")


def branches(steps, name):
    """The branches that a kernel took."""
    return {masked for step, _, masked in steps if step == name}


def make_inputs(device, dtype=torch.float32, *, batch=1, length=77, heads=2, groups=1, K=16, V=16, columns=77):
    """The five differentiable tensors, of unit variance."""
    shapes = (
        (batch, length, heads * groups, K),
        (batch, length, heads, K),
        (batch, length, heads, V),
        (batch, heads, columns, K),
        (batch, heads, columns, V),
    )
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def counted(keep):
    """`begin` and `end` of one document without a cache."""
    end = keep.cumsum(1) - keep.long()
    return torch.zeros_like(end), end


def dense(q, k, v, k_kept, v_kept, begin, end, until=None, scale=None):
    """The definition, as one softmax over the columns and the query itself. Returns outputs and log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v, begin, end = (x.repeat_interleave(groups, dim=2) for x in (k, v, begin, end))
    k_kept, v_kept = (x.repeat_interleave(groups, dim=1) for x in (k_kept, v_kept))
    column = torch.arange(k_kept.shape[2], device=q.device)
    visible = (column >= begin[..., None]) & (column < end[..., None])  # [B, T, H, M]
    if until is not None:
        t = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
        visible &= t < until.repeat_interleave(groups, dim=1)[:, None]
    logits = torch.einsum("bthk,bhmk->bthm", q, k_kept).masked_fill(~visible, -torch.inf)
    logits = torch.cat([logits, (q * k).sum(-1, keepdim=True)], -1) * scale
    weights = logits.softmax(-1)
    out = torch.einsum("bthm,bhmv->bthv", weights[..., :-1], v_kept) + weights[..., -1:] * v
    return out, logits.logsumexp(-1)


def evaluate(function, inputs, spans, grads, dtype, **options):
    """Outputs, log-sum-exp and gradients of a function, at a precision."""
    inputs = [x if x.dtype == dtype else x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = function(*inputs, *spans, **options)
    gradients = torch.autograd.grad((out, lse), inputs, (grads[0].to(out.dtype), grads[1].to(lse.dtype)))
    return dict(zip(("o", "lse", *NAMES), (out, lse, *gradients), strict=True))


def check(inputs, spans, assert_error_within, but=(), factor=2.0, **options):
    """Compares the kernel with the dense softmax in float64; PyTorch's error at this precision sets the bound."""
    q, _, v = inputs[:3]
    grads = (torch.randn(*q.shape[:3], v.shape[3], device=q.device), torch.randn(q.shape[:3], device=q.device))
    ours = evaluate(sparse_prefix_attention, inputs, spans, grads, q.dtype, return_lse=True, **options)
    exact = evaluate(dense, inputs, spans, [x.to(q.dtype).double() for x in grads], torch.float64, **options)
    exact["lse"] = exact["lse"].double()
    baseline = evaluate(dense, inputs, spans, grads, q.dtype, **options)
    assert ours["o"].dtype == q.dtype
    assert ours["lse"].dtype == torch.float32
    for name in ours.keys() - set(but):
        assert_error_within(ours[name], exact[name], baseline[name], factor, name=name)


@pytest.mark.parametrize(("groups", "fraction"), [(1, 0.5), (4, 0.8), (3, 0.3)])
def test_agrees_with_the_reference_through_compaction(groups, fraction, device, assert_error_within):
    length = 65
    q, k, v = make_inputs(device, length=length, groups=groups, columns=0)[:3]
    keep = torch.rand(1, length, 2, device=device) < fraction

    def ours(q, k, v):
        (k_kept, v_kept), end = compact_kept(keep, k, v)
        return sparse_prefix_attention(q, k, v, k_kept, v_kept, torch.zeros_like(end), end)

    def results(function, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    grad = torch.randn_like(q)
    exact = results(lambda q, k, v: naive_sparse_attention(q, k, v, keep)[0], torch.float64)
    baseline = results(lambda q, k, v: naive_sparse_attention(q, k, v, keep)[0], torch.float32)
    for name, a, b, c in zip(("o", "q", "k", "v"), results(ours, torch.float32), exact, baseline, strict=True):
        assert_error_within(a, b, c, name=name)


@pytest.mark.parametrize(
    ("dtype", "batch", "groups", "length", "K", "V"),
    [
        (torch.float32, 1, 1, 97, 16, 16),
        (torch.float32, 1, 4, 33, 48, 80),
        (torch.bfloat16, 1, 4, 41, 32, 16),
        (torch.bfloat16, 1, 1, 77, 48, 80),
        (torch.float16, 1, 1, 65, 20, 64),
        (torch.float32, 4, 4, 1, 16, 16),
    ],
)
def test_random_kept_sets(dtype, batch, groups, length, K, V, device, amid_nan, assert_error_within):
    keep = torch.rand(batch, length, 2, device=device) < torch.tensor([0.9, 0.4], device=device)
    inputs = make_inputs(device, dtype, batch=batch, length=length, groups=groups, K=K, V=V, columns=length)
    check([amid_nan(x) for x in inputs], counted(keep), assert_error_within)


def test_masked_and_unmasked_tiles_are_both_taken(steps, device, assert_error_within):
    keep = torch.ones(1, 70, 1, dtype=torch.bool, device=device)
    check(make_inputs(device, length=70, heads=1, columns=70), counted(keep), assert_error_within)
    for name in ("_attend", "_add_dq", "_add_dkv"):
        assert branches(steps, name) == {False, True}


def test_work_is_proportional_to_what_is_kept(steps, device):
    """With the first 20 of 96 tokens kept, each tile of 32 queries visits two tiles of 16 columns."""
    keep = (torch.arange(96, device=device) < 20).view(1, -1, 1)
    inputs = make_inputs(device, length=96, heads=1, columns=96)
    sparse_prefix_attention(*inputs, *counted(keep))
    assert sorted(start for _, start, _ in steps) == [0, 0, 0, 16, 16, 16]


@pytest.mark.parametrize("columns", [0, 9])
def test_nothing_kept(columns, device, assert_error_within):
    inputs = make_inputs(device, length=35, columns=columns)
    with torch.no_grad():
        for x in inputs[3:]:
            x.fill_(torch.nan)
    nothing = torch.zeros(1, 35, 2, dtype=torch.long, device=device)
    out = sparse_prefix_attention(*inputs, nothing, nothing)
    torch.testing.assert_close(out, inputs[2], rtol=0, atol=0)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert not any(x.any() for x in (grads[0], grads[1], grads[3], grads[4]))
    torch.testing.assert_close(grads[2], torch.ones_like(out), rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 40])
def test_a_span_ends_with_the_columns(columns, device, assert_error_within):
    inputs = make_inputs(device, columns=columns)
    begin, end = counted(torch.ones(1, 77, 2, dtype=torch.bool, device=device))
    check(inputs, (begin, end + 5), assert_error_within)


def test_heads_of_very_different_length_and_garbage_behind_them(device, assert_error_within):
    """One head keeps everything, one a single token; columns past a head's own count hold NaN."""
    length = 90
    keep = torch.ones(1, length, 3, dtype=torch.bool, device=device)
    keep[:, :, 1] = torch.arange(length, device=device) == 40
    keep[:, :, 2] = False
    inputs = make_inputs(device, length=length, heads=3, columns=length + 7)
    spans = counted(keep)
    past = torch.arange(length + 7, device=device) >= spans[1][:, -1, :, None]
    q, _, v = inputs[:3]
    grads = (torch.randn_like(v), torch.randn(q.shape[:3], device=device))
    exact = evaluate(dense, inputs, spans, grads, torch.float64)
    baseline = evaluate(dense, inputs, spans, grads, torch.float32)
    garbage = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for x in garbage[3:]:
            x[past] = torch.nan
    ours = evaluate(sparse_prefix_attention, garbage, spans, grads, torch.float32, return_lse=True)
    for name, value in ours.items():
        assert_error_within(value, exact[name], baseline[name], name=name)


def test_packed_documents(device, assert_error_within):
    """Each document sees its own columns only: `begin` rises where it starts, in the middle of tiles too."""
    length = 100
    seq_idx = torch.tensor([0] * 3 + [1] * 58 + [2] * 39, device=device)
    keep = torch.rand(1, length, 2, device=device) < torch.tensor([0.9, 0.5], device=device)
    _, end = counted(keep)
    first = torch.searchsorted(seq_idx, seq_idx)
    begin = end[:, first]
    inputs = make_inputs(device, length=length, columns=length)
    check(inputs, (begin, end), assert_error_within)


def test_packed_documents_have_unmasked_tiles(steps, device):
    """A document begins in the first tile of columns, and another in the last."""
    _, end = counted(torch.ones(1, 96, 1, dtype=torch.bool, device=device))
    begin = torch.where(end < 8, 0, torch.where(end < 90, 8, 90))
    sparse_prefix_attention(*make_inputs(device, length=96, heads=1, columns=96), begin, end).sum().backward()
    for name in ("_attend", "_add_dq", "_add_dkv"):
        assert branches(steps, name) == {False, True}


@pytest.mark.parametrize("groups", [1, 4])
def test_cached_columns_before_the_new_ones(groups, device, assert_error_within):
    """Cached columns are aligned to the right; two rows, one of them with few of them."""
    width, length = 50, 40
    keep = torch.rand(2, length, 1, device=device) < 0.6
    begin, end = counted(keep)
    begin, end = begin + torch.tensor([0, 33], device=device).view(2, 1, 1), end + width
    inputs = make_inputs(device, batch=2, length=length, heads=1, groups=groups, columns=width + length)
    check(inputs, (begin, end), assert_error_within)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_evicted_columns(dtype, device, assert_error_within):
    """A column is seen until its eviction, which may come at once, or before the first of these queries."""
    length, width = 70, 5
    keep = torch.rand(1, length, 2, device=device) < 0.7
    begin, end = (x.to(dtype) for x in counted(keep))
    until = torch.randint(-9, length + 2, (1, 2, length + width), device=device, dtype=dtype)
    until[:, :, :20] = length + 1
    inputs = make_inputs(device, length=length, groups=2, columns=length + width)
    check(inputs, (begin, end + width, until), assert_error_within)


def test_columns_that_stay_need_no_mask(steps, device):
    """In the gradient of a tile of columns, `until` costs nothing where it evicts nothing."""
    keep = torch.ones(1, 80, 1, dtype=torch.bool, device=device)
    until = torch.full((1, 1, 80), 81, device=device)
    inputs = make_inputs(device, length=80, heads=1, columns=80)
    sparse_prefix_attention(*inputs, *counted(keep), until).sum().backward()
    assert branches(steps, "_add_dkv") == {False, True}
    assert branches(steps, "_attend") == {True}


@pytest.mark.parametrize(("size", "but"), [pytest.param(2, (), marks=pytest.mark.slow), (3, ("k",))])
def test_large_logits_and_a_scale(size, but, device, assert_error_within):
    """Most weights are nearly 0 or 1, so few rows have an error at all, and the test needs many.

    The gradient of a token's own key is its weight times `do . (v - o)`. With nearly all weight on itself, `o` is `v`
    except for rounding, while PyTorch subtracts from `do . v` the same product that it added. From logits of 50 on
    that is up to 2.5 times PyTorch's error, as in any attention that saves `o` and not the weights.
    """
    inputs = [x.detach().mul(size).requires_grad_() for x in make_inputs(device, batch=8, length=40, columns=40)]
    keep = torch.rand(8, 40, 2, device=device) < 0.7
    check(inputs, counted(keep), assert_error_within, but=but, scale=0.7)


@pytest.mark.slow
def test_weights_of_nearly_one_keep_their_digits(device, assert_error_within):
    """Rounding the log-sum-exp of logits in the hundreds would cost more than PyTorch's error of such a weight."""
    inputs = [x.detach().mul(6).requires_grad_() for x in make_inputs(device, batch=8, length=40, columns=40)]
    keep = torch.rand(8, 40, 2, device=device) < 0.7
    check(inputs, counted(keep), assert_error_within, but=("o", "lse", "q", "k", "k_kept"), scale=0.7)


def test_strided_inputs(device):
    keep = torch.rand(1, 40, 2, device=device) < 0.7
    inputs = make_inputs(device, length=40, columns=40)
    spans = counted(keep)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    expected, out = (
        sparse_prefix_attention(*inputs, *spans),
        sparse_prefix_attention(*strided, *(x.mT.contiguous().mT for x in spans)),
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, strided, grad.mT.contiguous().mT),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_only_the_log_sum_exp_is_differentiated(device):
    keep = torch.rand(1, 20, 2, device=device) < 0.7
    inputs, spans = make_inputs(device, length=20, columns=20), counted(keep)
    _, lse = sparse_prefix_attention(*inputs, *spans, return_lse=True)
    _, expected = dense(*inputs, *spans)
    lse.sum().backward()
    grads = torch.autograd.grad(expected.sum(), inputs, allow_unused=True)
    for x, grad in zip(inputs, grads, strict=True):
        torch.testing.assert_close(x.grad, torch.zeros_like(x) if grad is None else grad, rtol=1e-5, atol=1e-6)


def test_autocast(device):
    keep = torch.rand(1, 20, 2, device=device) < 0.7
    inputs, spans = make_inputs(device, length=20, columns=20), counted(keep)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = sparse_prefix_attention(*inputs, *spans)
    expected = sparse_prefix_attention(*(x.bfloat16() for x in inputs), *spans)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_no_tokens(device):
    inputs = make_inputs(device, length=0, columns=3)
    empty = torch.zeros(1, 0, 2, dtype=torch.long, device=device)
    out, lse = sparse_prefix_attention(*inputs, empty, empty, return_lse=True)
    assert out.shape == (1, 0, 2, 16)
    assert lse.shape == (1, 0, 2)


def test_bad_input(device):
    q, k, v, k_kept, v_kept = make_inputs(device, length=6, columns=4)
    begin = end = torch.zeros(1, 6, 2, dtype=torch.long, device=device)

    def call(**changes):
        arguments = {
            "q": q, "k": k, "v": v, "k_kept": k_kept, "v_kept": v_kept, "begin": begin, "end": end,
        }  # fmt: skip
        return sparse_prefix_attention(**(arguments | changes))

    with pytest.raises(TypeError, match=r"`v_kept` must be a tensor, got list"):
        call(v_kept=[1])
    with pytest.raises(TypeError, match=r"`k` must be .* like `q`, torch.float32, got torch.bfloat16"):
        call(k=k.bfloat16())
    with pytest.raises(TypeError, match=r"`q` must be float32, float16 or bfloat16.*got torch.float64"):
        call(q=q.double())
    with pytest.raises(TypeError, match=r"`end` must be an integer tensor, got torch.float32"):
        call(end=end.float())
    with pytest.raises(ValueError, match=r"`begin` must have 3 dimensions, got \[6, 2\]"):
        call(begin=begin[0])
    with pytest.raises(ValueError, match=r"`end` must be \[1, 6, 2\] .* got \[1, 5, 2\]"):
        call(end=end[:, :5])
    with pytest.raises(ValueError, match=r"`k_kept` must be \[1, 2, 4, 16\] .* got \[1, 2, 4, 8\]"):
        call(k_kept=k_kept[..., :8])
    with pytest.raises(ValueError, match=r"`until` must be \[1, 2, 4\]"):
        call(until=begin)
    with pytest.raises(ValueError, match=r"`q` must have a multiple of the 2 heads of `k`, got 1"):
        call(q=q[:, :, :1])
    with pytest.raises(ValueError, match=r"head dimensions of 1 to 256, got 16 and 300"):
        call(v=torch.zeros(1, 6, 2, 300, device=device), v_kept=torch.zeros(1, 2, 4, 300, device=device))
    with pytest.raises(ValueError, match=r"`scale` must be positive and finite, got -1"):
        call(scale=-1)


@triton.jit
def addresses_kernel(out, stream, T, HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    _, base, _, query = tiles.query_rows(T * GROUP - BLOCK, stream.to(tl.int64), T, HK, GROUP, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), base * GROUP * K + query * K)


def test_addresses_have_64_bits(device):
    """Addresses, as the kernels add them up, of the last query rows of a head in the third of the longest rows."""
    T, HK, GROUP, K, BLOCK = MAX_LENGTH, 16, 4, 128, 16
    out = torch.empty(BLOCK, dtype=torch.int64, device=device)
    addresses_kernel[(1,)](out, 2 * HK + 5, T, HK, GROUP, K, BLOCK)
    row = torch.arange(T * GROUP - BLOCK, T * GROUP)
    expected = (((2 * T + row // GROUP) * HK + 5) * GROUP + row % GROUP) * K
    assert expected.min() > 2**32
    assert torch.equal(out.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("groups", "K", "V"), [(1, 128, 128), (4, 64, 64), (3, 96, 192), (2, 256, 256)])
def test_real_shapes_on_the_gpu(dtype, groups, K, V, amid_nan, assert_error_within):
    """The kernel adds up a float32 product in one chain of up to 6,124 rows, cuBLAS in blocks."""
    length, cached = 1531, 300
    factor = 4.0 if dtype == torch.float32 else 2.0
    keep = torch.rand(2, length, 3, device="cuda") < torch.tensor([1.0, 0.5, 0.02], device="cuda")
    begin, end = counted(keep)
    begin = begin + torch.tensor([0, 120, cached], device="cuda")
    inputs = make_inputs(
        "cuda", dtype, batch=2, length=length, heads=3, groups=groups, K=K, V=V, columns=cached + length
    )
    check([amid_nan(x) for x in inputs], (begin, end + cached), assert_error_within, factor=factor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_new_length_neither_compiles_nor_tunes(monkeypatch):
    """Within a bucket of lengths, forward and backward reuse the compiled kernels."""

    def attend(length):
        keep = torch.rand(1, length, 2, device="cuda") < 0.7
        inputs = make_inputs("cuda", torch.bfloat16, length=length, columns=length)
        sparse_prefix_attention(*inputs, *counted(keep)).sum().backward()

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs))
    attend(100)
    assert compiled
    compiled.clear()
    for length in (65, 97, 112, 128):
        attend(length)
    assert not compiled


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
    keep = torch.rand(1, 517, 2, device="cuda") < torch.tensor([1.0, 0.3], device="cuda")
    inputs = make_inputs("cuda", torch.bfloat16, length=517, groups=2, K=dim, V=dim, columns=517)
    check(inputs, counted(keep), assert_error_within)
