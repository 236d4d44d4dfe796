# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares the gated delta rule's kernels with the token loop in float64: outputs, prediction, state, gradients."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ham_hf.ops_ham import l2norm  # noqa: E402
from ham_hf.reference import naive_gated_delta_rule_with_prediction  # noqa: E402
from ham_hf.routing_ham import cosine_score, l2_score, residual_score  # noqa: E402
from ham_kernels import gated_delta_rule as delta_rule  # noqa: E402
from ham_kernels.gated_delta_rule import gated_delta_rule_with_prediction  # noqa: E402
from ham_kernels.gated_delta_rule.chunks import (  # noqa: E402
    chunk_bounds,
    sequence_bounds,
    split_documents,
    split_rows,
)

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
TUNED_KERNELS = {
    name: kernel
    for module in (delta_rule.wy, delta_rule.state, delta_rule.output, delta_rule.backward)
    for name, kernel in vars(module).items()
    if hasattr(kernel, "tiles")
}
pytestmark = pytest.mark.usefixtures("arithmetic_as_on_a_gpu")


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """Fills new buffers with NaN, so that numbers a kernel leaves unwritten show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def amid_nan(x):
    """A contiguous copy with NaN before and behind it."""
    buffer = x.new_full((x.numel() + 64,), torch.nan)
    return buffer[32:-32].view(x.shape).copy_(x)


def random_inputs(batch, length, kv_heads, group, key_dim, value_dim, dtype=torch.float32, device="cpu", state=True):
    q = l2norm(torch.randn(batch, length, kv_heads * group, key_dim))
    # Keys lie close together, so that the inverse is far from the identity.
    k = l2norm(torch.randn(batch, length, kv_heads, key_dim) + 0.5)
    v = torch.randn(batch, length, kv_heads, value_dim)
    g = -0.2 * torch.rand(batch, length, kv_heads)
    beta = torch.rand(batch, length, kv_heads)
    inputs = [*(x.to(dtype) for x in (q, k, v)), g, beta]
    if state:
        inputs.append(torch.randn(batch, kv_heads, key_dim, value_dim))
    return [amid_nan(x.to(device)).requires_grad_() for x in inputs]


def plain_chunks(q, k, v, g, beta, initial_state=None, chunk=64):
    """The same maths in PyTorch: products in the dtype of the inputs, gates, inverse and state in float32."""
    dtype, groups = v.dtype, q.shape[2] // k.shape[2]
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
    k, v, g, beta = (x.repeat_interleave(groups, 1) for x in (k, v, g[..., None], beta[..., None]))
    shape = *k.shape[:2], k.shape[3], v.shape[3]
    state = torch.zeros(shape, device=q.device)
    if initial_state is not None:
        state = initial_state.repeat_interleave(groups, 1)
    outputs, predictions = [], []
    for parts in zip(*(x.split(chunk, 2) for x in (q, k, v, g, beta)), strict=True):
        q_, k_, v_, g_, beta_ = parts
        one = torch.ones(k_.shape[2], k_.shape[2], device=q.device)
        g_ = one.tril() @ g_  # `cumsum` adds up in float64 on a CPU
        decay = (g_ - g_.mT).masked_fill(one.triu(1).bool(), -torch.inf).exp()
        within = (k_ @ k_.mT).float() * decay.tril(-1)
        eye = torch.eye(k_.shape[2], device=q.device).expand_as(within)
        inverse = torch.linalg.solve_triangular(eye + beta_ * within, eye, upper=False, unitriangular=True).to(dtype)
        before = state.to(dtype)
        u = inverse @ (beta_ * v_).to(dtype) - inverse @ (beta_ * g_.exp() * k_).to(dtype) @ before
        predictions.append(within.to(dtype) @ u + (k_ @ before) * g_.exp().to(dtype))
        weights = ((q_ @ k_.mT).float() * decay).to(dtype)
        outputs.append((weights @ u + (q_ @ before) * g_.exp().to(dtype)) * k.shape[-1] ** -0.5)
        last = g_[:, :, -1:]
        state = state * last.exp() + (k_.mT @ (u * (last - g_).exp()).to(dtype)).float()
    o, prediction = torch.cat(outputs, 2).transpose(1, 2), torch.cat(predictions, 2).transpose(1, 2)
    return o, prediction[:, :, ::groups], state[:, ::groups]


def with_gradients(function, inputs, do, dstate, dprediction=None):
    """Outputs of `function`, and the gradients of all inputs for those of the output and of the final state."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    o, prediction, state = function(*inputs)
    pairs = [(o, do), (state, dstate)] + ([] if dprediction is None else [(prediction, dprediction)])
    gradients = torch.autograd.grad([x for x, _ in pairs], inputs, [dx.to(x.dtype) for x, dx in pairs])
    outputs = {"o": o, "prediction": prediction, "final_state": state}
    return outputs | {f"d{name}": x for name, x in zip(NAMES, gradients, strict=False)}


def call(function, **kwargs):
    """`function` of `[q, k, v, g, beta]` and perhaps an initial state."""
    return lambda q, k, v, g, beta, s=None, **more: function(q, k, v, g, beta, initial_state=s, **kwargs, **more)


def compare(inputs, assert_error_within, seq_idx=None, chunk_size=64, through_prediction=False):
    """Compares every result with the float64 token loop, within twice the error of the same maths in PyTorch.

    On a GPU the bound for float32, which PyTorch multiplies exactly before it adds, is four times that error. The
    kernels multiply pairs of TF32 numbers: 24 bits of each factor, but without the product of the two small halves,
    and tensor cores truncate their sums where float32 rounds them.
    """
    q, v = inputs[0], inputs[2]
    factor = 4.0 if v.is_cuda and v.dtype == torch.float32 else 2.0
    do = torch.randn(*q.shape[:3], v.shape[3], device=q.device)
    dstate = torch.randn(q.shape[0], v.shape[2], q.shape[3], v.shape[3], device=q.device)
    given = do, dstate, torch.randn(v.shape, device=q.device) if through_prediction else None
    actual = with_gradients(
        call(gated_delta_rule_with_prediction, seq_idx=seq_idx, chunk_size=chunk_size), inputs, *given
    )
    wide = [x.double() for x in inputs]
    exact = with_gradients(call(naive_gated_delta_rule_with_prediction, seq_idx=seq_idx), wide, *given)
    # Documents do not change the rounding error, so their baseline is one document.
    plain = with_gradients(call(plain_chunks, chunk=chunk_size), inputs, *given)
    alone = exact
    if seq_idx is not None:
        alone = with_gradients(call(naive_gated_delta_rule_with_prediction), wide, *given)
    for name, reference in exact.items():
        baseline = reference + (plain[name].double() - alone[name])
        assert_error_within(actual[name], reference, baseline, factor, name=name)


def compare_step(inputs, assert_error_within):
    """One token without gradients, within twice the error of the recurrence in PyTorch."""
    with torch.no_grad():
        actual = call(gated_delta_rule_with_prediction)(*inputs)
        exact = call(naive_gated_delta_rule_with_prediction)(*(x.double() for x in inputs))
        baseline = call(naive_gated_delta_rule_with_prediction)(*inputs)
    for name, a, e, b in zip(("o", "prediction", "final_state"), actual, exact, baseline, strict=True):
        assert_error_within(a, e, b.to(a.dtype), name=name)


@pytest.mark.parametrize(
    ("batch", "length", "chunk_size", "kv_heads", "group", "key_dim", "value_dim"),
    [
        (16, 1, 64, 2, 1, 32, 32),
        (2, 63, 64, 3, 1, 32, 32),
        pytest.param(4, 64, 64, 1, 4, 32, 32, marks=pytest.mark.slow),
        (2, 65, 64, 2, 1, 48, 80),
        pytest.param(1, 130, 64, 4, 1, 32, 16, marks=pytest.mark.slow),
        (4, 33, 16, 1, 4, 24, 40),
        (2, 33, 32, 2, 2, 80, 48),
    ],
)
def test_agrees_with_the_token_loop(
    batch, length, chunk_size, kv_heads, group, key_dim, value_dim, device, assert_error_within
):
    inputs = random_inputs(batch, length, kv_heads, group, key_dim, value_dim, device=device)
    compare(inputs, assert_error_within, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_pytorch(dtype, device, assert_error_within):
    inputs = random_inputs(2, 70, 1, 2, 32, 48, dtype=dtype, device=device)
    compare(inputs, assert_error_within, chunk_size=32)


def test_without_an_initial_state(device, assert_error_within):
    inputs = random_inputs(2, 40, 1, 2, 32, 32, device=device, state=False)
    compare(inputs, assert_error_within, chunk_size=16)


@pytest.mark.parametrize("state", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_documents(state, device, assert_error_within):
    # Borders inside chunks and at their edges, a document of one token, rows that differ, a row that is one document.
    lengths = [[5, 16, 1, 22, 26], [32, 38], [70]]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    inputs = random_inputs(3, 70, 1, 2, 32, 32, device=device, state=state)
    compare(inputs, assert_error_within, seq_idx=seq_idx.to(device), chunk_size=16)


@pytest.mark.parametrize(
    ("dtype", "length", "group", "state", "lengths"),
    [
        (torch.float32, 33, 1, True, None),
        (torch.float32, 33, 3, False, None),
        (torch.float32, 40, 1, True, [5, 16, 1, 18]),
        (torch.bfloat16, 33, 2, True, None),
    ],
    ids=str,
)
def test_gradients_through_the_prediction(dtype, length, group, state, lengths, device, assert_error_within):
    inputs = random_inputs(1, length, 2, group, 32, 32, dtype=dtype, device=device, state=state)
    seq_idx = None
    if lengths is not None:
        seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(device)
    compare(inputs, assert_error_within, seq_idx=seq_idx, chunk_size=16, through_prediction=True)


@pytest.mark.parametrize("decay", ["strong", "mixed", "infinite"])
def test_decays_keep_their_digits_beside_those_that_forget_everything(decay, device):
    """A decay is the difference of two sums of up to 3,200, which float32 holds to 2e-4."""
    *inputs, g, beta, state = (x.detach() for x in random_inputs(1, 70, 2, 1, 32, 32, device=device))
    strong = -1 - 49 * torch.rand_like(g)
    if decay == "infinite":
        strong = torch.full_like(g, -torch.inf)
    g = strong if decay == "strong" else torch.where(torch.rand_like(g) < 0.3, strong, -1e-3 * torch.rand_like(g))
    inputs = [x.requires_grad_() for x in (*inputs, g, beta, state)]
    do, dprediction = torch.randn_like(inputs[0]), torch.randn_like(inputs[2])
    given = do, torch.randn_like(state), dprediction
    actual = with_gradients(call(gated_delta_rule_with_prediction), inputs, *given)
    exact = with_gradients(call(naive_gated_delta_rule_with_prediction), [x.double() for x in inputs], *given)
    for name, x in exact.items():
        error = (actual[name] - x).abs().max() / max(1, x.abs().max())
        assert error < 2e-6, f"{name}: off by {error:.1e}"


def test_documents_are_split_as_rows_are():
    rows, documents = split_rows(3, 70, 32), split_documents(torch.zeros(3, 70, dtype=torch.long), 32)
    assert (rows.total, rows.sequences, rows.per_row) == (9, 3, 3)
    assert (documents.total, documents.sequences) == (9, 3)
    assert documents.borders.tolist() == [0, 32, 64, 70, 102, 134, 140, 172, 204, 210]
    assert documents.table.tolist() == [[0, 70, 0, 0, 0], [70, 140, 3, 1, 1], [140, 210, 6, 2, 2]]


def test_padding_changes_nothing(device):
    q, k, v, g, beta, state = (x.detach() for x in random_inputs(1, 45, 1, 1, 32, 32, device=device))
    real = torch.ones(45, dtype=torch.bool, device=device)
    real[[0, 1, 2, 15, 16, 17, 40, 44]] = False
    g, beta = g * real[:, None], beta * real[:, None]
    padded = gated_delta_rule_with_prediction(q, k, v, g, beta, initial_state=state, chunk_size=16)
    bare = [x[:, real] for x in (q, k, v, g, beta)]
    alone = gated_delta_rule_with_prediction(*bare, initial_state=state, chunk_size=16)
    for i in range(2):
        torch.testing.assert_close(padded[i][:, real], alone[i], rtol=0, atol=2e-6)  # measured: 5e-7
    torch.testing.assert_close(padded[2], alone[2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [1, 40])
def test_the_prediction_is_exactly_zero_where_nothing_was_stored(length, device):
    q, k, v, g, beta = (x.detach() for x in random_inputs(1, length, 1, 1, 32, 32, device=device, state=False))
    seq_idx = (torch.arange(length, device=device) >= 21).long()[None]
    _, prediction, _ = gated_delta_rule_with_prediction(q, k, v, g, beta, seq_idx=seq_idx, chunk_size=16)
    assert torch.equal(prediction[:, 0], torch.zeros_like(prediction[:, 0]))
    if length > 21:
        assert torch.equal(prediction[:, 21], torch.zeros_like(prediction[:, 21]))
        assert prediction[:, 1:21].abs().amin((0, 2, 3)).min() > 0
    # A padding token at the front stores nothing either.
    beta[:, 0] = g[:, 0] = 0
    _, prediction, _ = gated_delta_rule_with_prediction(q, k, v, g, beta, chunk_size=16)
    assert torch.equal(prediction[:, :2], torch.zeros_like(prediction[:, :2]))


SCORES = {
    "cosine": lambda v, p, beta: cosine_score(v, p),
    "l2": lambda v, p, beta: l2_score(v, p),
    "residual": residual_score,
}


def error_of_scores(inputs, score, **options):
    """The largest error of the kernel's scores, and of scores of the prediction that it returns, against float64."""
    q, k, v, g, beta, state = (x.detach() for x in inputs)
    exact = naive_gated_delta_rule_with_prediction(
        *(x.double() for x in (q, k, v, g, beta)), initial_state=state.double()
    )
    exact = SCORES[score](v.double(), exact[1], beta.double())
    call_kernel = call(gated_delta_rule_with_prediction, **options)
    prediction = call_kernel(q, k, v, g, beta, state)[1]
    scores = call_kernel(q, k, v, g, beta, state, score=score)[1]
    assert scores.shape == v.shape[:3]
    assert scores.dtype == torch.float32
    of_prediction = SCORES[score](v.float(), prediction, beta)
    return max((x.double() - exact).abs().max().item() for x in (scores, of_prediction))


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value_dim", [pytest.param(32, marks=pytest.mark.slow), 80])
def test_scores_in_place_of_predictions(value_dim, score, length, device):
    """Also with values wider than a tile, and with two heads; measured at most 3e-7."""
    inputs = random_inputs(2, length, 2, 1, 32, value_dim, device=device)
    assert error_of_scores(inputs, score, chunk_size=16) < 1e-6


@pytest.mark.parametrize("score", SCORES)
def test_neither_scores_nor_predictions_are_rounded_to_half_precision(score, device):
    """A step in bfloat16 has float32's error; a prediction rounded to bfloat16 would make it 1e-4 or more."""
    inputs = random_inputs(16, 1, 2, 1, 32, 48, dtype=torch.bfloat16, device=device)
    assert error_of_scores(inputs, score) < 1e-6


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("score", SCORES)
def test_what_is_not_a_number_scores_1(score, length, device):
    inputs = [x.detach() for x in random_inputs(1, length, 2, 1, 32, 32, device=device)]
    inputs[2][:, -1, 0] = torch.nan
    scores = call(gated_delta_rule_with_prediction, chunk_size=16)(*inputs, score=score)[1]
    assert scores[0, -1, 0] == 1
    assert ((scores[:, :, 1] >= 0) & (scores[:, :, 1] < 1)).all()


def test_scores_change_nothing_else(device):
    inputs = random_inputs(2, 20, 1, 2, 32, 32, device=device)
    plain = call(gated_delta_rule_with_prediction, chunk_size=16)(*inputs)
    scored = call(gated_delta_rule_with_prediction, chunk_size=16)(*inputs, score="cosine")
    assert not scored[1].requires_grad
    for i in (0, 2):
        assert torch.equal(plain[i], scored[i])
    for a, b in zip(*(torch.autograd.grad(x[0].sum() + x[2].sum(), inputs) for x in (plain, scored)), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def products(device, monkeypatch):
    """Counts the products of matrices that Triton's interpreter computes."""
    if device != "cpu":
        pytest.skip("only the interpreter's products can be counted")
    from triton.runtime import interpreter

    counted = []
    plain = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda *args: counted.append(1) or plain(*args))
    return counted


def without_and_with_prediction(inputs, **options):
    """Both results of the op, each followed by its gradients if it has any."""
    results = []
    for predict in (False, True):
        o, prediction, state = call(gated_delta_rule_with_prediction, predict=predict, **options)(*inputs)
        assert (prediction is not None) == predict
        loss = o.sum() + state.square().sum()
        gradients = torch.autograd.grad(loss, inputs) if loss.requires_grad else ()
        results.append([o, state, *gradients])
    return results


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_prediction_that_is_left_out_changes_nothing_else(packed, device):
    inputs = random_inputs(2, 24, 1, 2, 32, 48, device=device)
    seq_idx = (torch.arange(24, device=device) >= 21).long().expand(2, -1) if packed else None
    without, with_it = without_and_with_prediction(inputs, chunk_size=16, seq_idx=seq_idx)
    assert len(without) == 8
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


def test_a_prediction_that_is_left_out_is_not_computed(products):
    """Products per chunk and half of the keys: keys times state and keys; per chunk, the latter times updates."""
    inputs = [x.detach() for x in random_inputs(1, 40, 3, 1, 32, 32)]
    numbers = []
    for predict in (False, True):
        products.clear()
        call(gated_delta_rule_with_prediction, predict=predict, chunk_size=16)(*inputs)
        numbers.append(len(products))
    chunks, heads, halves = 3, 3, 2
    assert numbers[1] - numbers[0] == (2 * halves + 1) * chunks * heads


def test_a_step_may_leave_the_prediction_out(device, monkeypatch):
    inputs = [x.detach() for x in random_inputs(3, 1, 2, 2, 32, 48, device=device)]
    places, plain = [], delta_rule.output._prediction_and_moments
    monkeypatch.setattr(
        delta_rule.output, "_prediction_and_moments", lambda *args: places.append(plain(*args)) or places[-1]
    )
    without, with_it = without_and_with_prediction(inputs)
    assert places[0] == (None, None)
    assert places[1][0].shape == (3, 1, 2, 48)
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


def test_documents_and_padding_score_as_they_predict(device):
    """A document's first token finds nothing stored and scores 0.5, also after padding."""
    q, k, v, g, beta = (x.detach() for x in random_inputs(1, 40, 1, 1, 32, 48, device=device, state=False))
    seq_idx = (torch.arange(40, device=device) >= 21).long()[None]
    beta[:, 0] = g[:, 0] = 0
    arguments = {"seq_idx": seq_idx, "chunk_size": 16}
    prediction = gated_delta_rule_with_prediction(q, k, v, g, beta, **arguments)[1]
    scores = gated_delta_rule_with_prediction(q, k, v, g, beta, **arguments, score="cosine")[1]
    torch.testing.assert_close(scores, cosine_score(v, prediction), rtol=0, atol=5e-7)  # measured: 1.2e-7
    assert scores[0, [0, 1, 21], 0].tolist() == [0.5] * 3
    assert (scores[0, 2:21] != 0.5).all()


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_agrees_with_the_token_loop(state, dtype, device, assert_error_within):
    compare_step(random_inputs(3, 1, 2, 4, 48, 80, dtype=dtype, device=device, state=state), assert_error_within)


def test_one_token_has_a_step_of_its_own_unless_a_gradient_is_needed(device, monkeypatch):
    inputs = random_inputs(1, 1, 1, 1, 32, 32, device=device)
    steps = []
    plain = delta_rule.op.step_fwd
    monkeypatch.setattr(delta_rule.op, "step_fwd", lambda *args: steps.append(1) or plain(*args))
    call(gated_delta_rule_with_prediction)(*inputs)[0].sum().backward()
    assert not steps
    call(gated_delta_rule_with_prediction)(*(x.detach() for x in inputs))
    assert steps


def test_a_sequence_may_be_cut_anywhere(device):
    q, k, v, g, beta, state = (x.detach() for x in random_inputs(2, 40, 1, 2, 32, 32, device=device))
    whole = gated_delta_rule_with_prediction(q, k, v, g, beta, initial_state=state, chunk_size=16)
    parts = []
    for tokens in (slice(0, 19), slice(19, 20), slice(20, 40)):
        part = [x[:, tokens] for x in (q, k, v, g, beta)]
        *outputs, state = gated_delta_rule_with_prediction(*part, initial_state=state, chunk_size=16)
        parts.append(outputs)
    for i in range(2):
        joined = torch.cat([x[i] for x in parts], 1)
        torch.testing.assert_close(joined, whole[i], rtol=0, atol=2e-6)  # measured: 5e-7
    torch.testing.assert_close(state, whole[2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("score", ["cosine", "l2", "residual"])
def test_scores_of_chunks_and_steps_differ_by_a_rounding_of_half_precision(score, device):
    """Chunks take products in bfloat16, steps in float32: what ham_hf/README.md promises of kept sets."""
    q, k, v, g, beta, state = (x.detach() for x in random_inputs(1, 130, 2, 2, 64, 64, torch.bfloat16, device=device))
    whole = gated_delta_rule_with_prediction(q, k, v, g, beta, initial_state=state, score=score)[1]
    parts = []
    for t in range(130):
        now = [x[:, t : t + 1] for x in (q, k, v, g, beta)]
        _, part, state = gated_delta_rule_with_prediction(*now, initial_state=state, score=score)
        parts.append(part)
    gaps = (torch.cat(parts, 1) - whole).abs()
    assert gaps.mean() < 5e-4, f"{gaps.mean():.1e}"  # measured: 2e-4
    assert gaps.max() < 4e-3, f"{gaps.max():.1e}"  # measured: 8e-4, a fifth of the spacing of bfloat16 below 1


def test_nothing_flows_through_a_score_and_any_output_may_go_unused(device):
    inputs = random_inputs(1, 20, 1, 1, 32, 32, device=device)
    assert not call(gated_delta_rule_with_prediction, chunk_size=16)(*inputs, score="l2")[1].requires_grad
    outputs = call(gated_delta_rule_with_prediction, chunk_size=16)(*inputs)
    ones = [torch.ones_like(x) for x in outputs]
    together = torch.autograd.grad(outputs, inputs, ones, retain_graph=True)
    alone = [torch.autograd.grad(x, inputs, one, retain_graph=True) for x, one in zip(outputs, ones, strict=True)]
    for name, whole, *parts in zip(NAMES, together, *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=0, atol=1e-5, msg=name)


def test_queries_and_keys_may_have_more_precision_than_values(device):
    q, k, v, g, beta = (x.detach() for x in random_inputs(1, 20, 1, 1, 32, 32, device=device, state=False))
    v = v.bfloat16()
    mixed = gated_delta_rule_with_prediction(q, k, v, g, beta, chunk_size=16)
    rounded = gated_delta_rule_with_prediction(q.bfloat16(), k.bfloat16(), v, g, beta, chunk_size=16)
    assert [x.dtype for x in mixed] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(mixed, rounded, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda x: x[:, :, :1]),
        ("k", lambda x: x[:, :-1]),
        ("v", lambda x: x[..., 0]),
        ("v", lambda x: x.double()),
        ("g", lambda x: x[..., None]),
        ("beta", lambda x: x[:, :, :1]),
        ("initial_state", lambda x: x.mT),
        ("seq_idx", lambda x: x[0]),
        ("chunk_size", lambda _: 48),
        ("score", lambda _: "cosin"),
    ],
)
def test_wrong_arguments_are_named(name, change, device):
    q, k, v, g, beta, state = random_inputs(1, 4, 2, 1, 16, 32, device=device)
    arguments = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}
    arguments |= {"seq_idx": torch.zeros(1, 4, dtype=torch.long, device=device), "chunk_size": 64, "score": None}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"`{name}`"):
        gated_delta_rule_with_prediction(**arguments)


def test_a_score_without_a_prediction_is_refused(device):
    inputs = random_inputs(1, 4, 2, 1, 16, 32, device=device)
    with pytest.raises(ValueError, match="`predict` must be True with `score` 'l2', got False"):
        call(gated_delta_rule_with_prediction, predict=False, score="l2")(*inputs)


def test_head_dimensions_above_256_are_refused(device):
    inputs = random_inputs(1, 2, 1, 1, 257, 16, device=device, state=False)
    with pytest.raises(ValueError, match="256"):
        gated_delta_rule_with_prediction(*inputs)


@triton.jit
def borders_kernel(out, borders, chunk, sequence, T, NT, HK: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr):
    start, _ = chunk_bounds(borders, chunk, T, NT, 64, PACKED)
    begin, _, first, _, _ = sequence_bounds(borders, sequence, T, NT, PACKED)
    tl.store(out, start * HK * K)
    tl.store(out + 1, begin * HK * K)
    tl.store(out + 2, first * HK * (K * K))


@pytest.mark.parametrize("packed", [False, True])
def test_addresses_have_64_bits(packed, device):
    """Addresses of tokens and of states in a batch of long rows."""
    T, HK, K, row = 2**20, 16, 128, 5
    NT = T // 64
    table = torch.tensor([row * T, (row + 1) * T, row * NT, row, row], device=device)
    out = torch.empty(3, dtype=torch.int64, device=device)
    # In the packed case the first entries of the table also serve as borders of a chunk.
    borders_kernel[(1,)](
        out, table if packed else None, 0 if packed else row * NT, 0 if packed else row, T, NT, HK, K, packed
    )
    assert out.tolist() == [row * T * HK * K, row * T * HK * K, row * NT * HK * K * K]
    assert out.min() > 2**32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "key_dim", "value_dim", "packed"),
    [
        (torch.bfloat16, 4, 1, 128, 128, False),
        (torch.bfloat16, 2, 4, 128, 128, True),
        (torch.bfloat16, 2, 2, 256, 256, False),
        (torch.bfloat16, 2, 1, 96, 192, True),
        (torch.float16, 2, 3, 64, 64, False),
        (torch.float32, 2, 2, 128, 64, False),
        (torch.float32, 2, 1, 256, 256, False),
    ],
)
def test_real_shapes_on_the_gpu(dtype, kv_heads, group, key_dim, value_dim, packed, assert_error_within):
    inputs = random_inputs(2, 517, kv_heads, group, key_dim, value_dim, dtype=dtype, device="cuda")
    seq_idx = (torch.arange(517, device="cuda") // 150).expand(2, -1) if packed else None
    compare(inputs, assert_error_within, seq_idx=seq_idx)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        pytest.param(name, i, id=f"{name}-{i}")
        for name, kernel in TUNED_KERNELS.items()
        for i in range(len(kernel.tiles))
    ],
)
def test_every_tile_shape_that_tuning_may_choose(kernel, tile, dim, assert_error_within, monkeypatch):
    """The other tests run the first tile shape of each kernel."""
    tuned = TUNED_KERNELS[kernel]
    monkeypatch.setattr(tuned, "configs", [tuned.tiles[tile]])
    length = 1 if kernel == "step_fwd_kernel" else 150
    inputs = random_inputs(2, length, 2, 2, dim, dim, dtype=torch.bfloat16, device="cuda")
    (compare_step if length == 1 else compare)(inputs, assert_error_within)
