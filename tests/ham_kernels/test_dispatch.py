# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares a model on the kernels with the same model on PyTorch, and checks the choice between the two."""

import inspect
import itertools
import types
import warnings

import pytest
import torch

pytest.importorskip("triton")

import ham_kernels
from ham_hf import HAMForCausalLM, ops_ham, prefix_attention_ham
from ham_kernels.decode_update import AttentionView, Convolution, Gates, Routing

TRAINED_OPS = ("gated_delta_rule_with_prediction", "compact_kept", "sparse_prefix_attention")
OPS = (*TRAINED_OPS, "ragged_decode_attention", "decode_update", "decode_mix_append")
# Ops that run on the kernels too, because an op takes their results.
COMPANIONS = {"ragged_decode_attention": ("slab_table",), "decode_mix_append": ("slab_table", "decode_update")}
# An op alone is compared among the slow tests: the interpreter takes ten seconds for most.
ALONE = [pytest.param(op, marks=pytest.mark.slow) for op in OPS]
EACH = pytest.mark.parametrize("on_kernels", [*ALONE, "all"], indirect=True)
TRAINED = pytest.mark.parametrize("on_kernels", [*TRAINED_OPS, "all"], indirect=True)  # decoding has no gradient
# Each takes ten seconds under the interpreter.
ALL = pytest.mark.parametrize("on_kernels", [pytest.param("all", marks=pytest.mark.slow)], indirect=True)
# Absolute for logits, relative to the largest of the parameter for gradients, in float32. Measured: 2e-7 and 2e-6.
LOGITS, GRADIENT = 1e-6, 2e-5
LENGTH, PADDING = 70, 9
# A threshold, and true if the first row is padded: a single token has its own kernel only without a mask.
TURNS = ((0.0, False), (0.45, True), (0.5, False), (2.0, True))
# A prefill of more than two pages; more tokens than decoding reads without compaction; a draft; two single tokens.
ENDS = (40, 57, 60, 61, 62)


@pytest.fixture
def on_kernels(request, monkeypatch, choose_kernels):
    """A function that sends one op, or all, to the kernels and counts the calls; before, all runs on PyTorch."""
    chosen = OPS if request.param == "all" else (request.param,)
    missing = [op for op in chosen if not hasattr(ham_kernels, op)]
    if missing:
        pytest.skip(f"ham_kernels has no {', '.join(missing)}")
    calls = dict.fromkeys(chosen, 0)

    def kernel(op, *tensors):
        if op in chosen:
            calls[op] += 1
        elif not any(op in COMPANIONS.get(x, ()) for x in chosen):
            return None
        return getattr(ham_kernels, op)

    def switch():
        choose_kernels(kernel)
        return calls

    choose_kernels(lambda op, *tensors: None)
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 16)  # within one block PyTorch reads no compacted tokens
    return switch


def tiny_model(tiny_config, device="cpu", **overrides):
    torch.manual_seed(3)
    # Keys and values of unequal width, neither a power of two.
    settings = {"num_hidden_layers": 2, "head_dim": 12, "value_head_dim": 20, "router": "cosine"}
    return HAMForCausalLM(tiny_config(**(settings | overrides))).to(device)


def inputs(device="cpu"):
    torch.manual_seed(4)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :PADDING] = 0
    return {"input_ids": torch.randint(1, 97, (2, LENGTH)).to(device), "attention_mask": mask.to(device)}


def kept(cache):
    """Tokens that each layer holds: (stream, position), in order."""
    stored = [layer.store.tokens() for layer in cache.layers]
    return [torch.stack([x.streams, x.positions.long()], 1).tolist() for x in stored]


def several_turns(model, threshold, padded):
    """Logits and kept sets after a prefill, a second turn, a draft of three tokens and two single ones."""
    model.eval()
    whole, cache, logits = {name: x[:, : ENDS[-1]] for name, x in inputs(model.device).items()}, None, []
    real = whole["attention_mask"].bool() if padded else torch.ones_like(whole["input_ids"]).bool()
    with torch.no_grad():
        for begin, end in itertools.pairwise((0, *ENDS)):
            out = model(
                whole["input_ids"][:, begin:end],
                attention_mask=real[:, :end].long() if padded else None,
                cache=cache,
                use_cache=True,
                threshold=threshold,
            )
            cache = out.cache
            logits.append(out.logits)
    return torch.cat(logits, 1)[real], kept(cache)


def loss_and_gradients(model, **arguments):
    model.train()
    model.zero_grad()
    loss = model(**arguments, labels=arguments["input_ids"]).loss
    loss.backward()
    return loss.item(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual[0] == pytest.approx(expected[0], abs=LOGITS)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        error = (actual[1][name] - grad).abs().max().item()
        allowed = GRADIENT * max(grad.abs().max().item(), 1e-3)
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


# With a window every op but one of the RNN takes other arguments.
WINDOW = {"attention_window": 6, "attention_sinks": 2}
WINDOWS = pytest.mark.parametrize(
    "window", [pytest.param({}, marks=pytest.mark.slow), WINDOW], ids=["no window", "window"]
)


@EACH
@WINDOWS
def test_cached_turns_are_those_of_pytorch(window, tiny_config, on_kernels, device):
    model = tiny_model(tiny_config, device, num_hidden_layers=1, **window)
    expected = {turn: several_turns(model, *turn) for turn in TURNS}
    numbers = [sum(map(len, sets)) for _, sets in expected.values()]
    sinks = 2 * model.config.num_key_value_heads * model.config.attention_sinks
    assert numbers[0] > numbers[1] > numbers[2] > numbers[3] == sinks, "the thresholds do not tell anything apart"
    calls = on_kernels()
    for turn, (logits, sets) in expected.items():
        actual, actual_sets = several_turns(model, *turn)
        assert actual_sets == sets, f"{turn}: another set is kept"
        error = (actual - logits).abs().max().item()
        assert error <= LOGITS, f"{turn}: logits off by {error:.2e}"
    assert all(calls.values()), f"never called: {calls}"


@TRAINED
@WINDOWS
def test_gradients_are_those_of_pytorch(window, tiny_config, on_kernels, device):
    model = tiny_model(tiny_config, device, **window)
    arguments = inputs(device)  # without a threshold, so that the learned ones apply and have a gradient
    expected = loss_and_gradients(model, **arguments)
    assert len(expected[1]) >= len(list(model.parameters())) - 4, "parameters without a gradient prove nothing"
    calls = on_kernels()
    assert_same_gradients(loss_and_gradients(model, **arguments), expected)
    assert all(calls[op] for op in TRAINED_OPS if op in calls), f"never called: {calls}"


@ALL
@pytest.mark.parametrize("threshold", [0.0, 2.0], ids=str)
def test_gradients_at_the_extremes_are_those_of_pytorch(threshold, tiny_config, on_kernels, device):
    model = tiny_model(tiny_config, device)
    arguments = {**inputs(device), "threshold": threshold}
    expected = loss_and_gradients(model, **arguments)
    on_kernels()
    assert_same_gradients(loss_and_gradients(model, **arguments), expected)


@ALL
def test_gradients_of_a_learned_router_in_packed_rows(tiny_config, on_kernels, device):
    model = tiny_model(tiny_config, device, router="learned_error")
    arguments = {"input_ids": torch.randint(1, 97, (1, LENGTH)).to(device), "threshold": 0.5}
    arguments["position_ids"] = torch.cat([torch.arange(33), torch.arange(LENGTH - 33)])[None].to(device)
    expected = loss_and_gradients(model, **arguments)
    on_kernels()
    assert_same_gradients(loss_and_gradients(model, **arguments), expected)


@ALL
@pytest.mark.parametrize("arguments", [{"threshold": 0.5}, {"threshold": 0.0, "kv_budget": 11}], ids=str)
def test_generated_text_is_that_of_pytorch(arguments, tiny_config, on_kernels, device):
    model = tiny_model(tiny_config, device).eval()
    arguments = {**inputs(device), "max_new_tokens": 8, "do_sample": False, **arguments}
    expected = model.generate(**arguments)
    on_kernels()
    assert model.generate(**arguments).tolist() == expected.tolist()


def test_tensors_on_a_cpu_never_reach_the_kernels(tiny_config, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a kernel was called for a tensor on a CPU")

    for op in OPS:
        monkeypatch.setattr(ham_kernels, op, fail, raising=False)
    model = tiny_model(tiny_config)
    loss_and_gradients(model, **inputs())
    model.eval().generate(**inputs(), max_new_tokens=3, do_sample=False)


def on_gpu(dtype=torch.float32, head_dim=16):
    """Stand-in for a tensor on a GPU, with the attributes that the choice reads."""
    return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(2, head_dim))


@pytest.fixture
def platform(monkeypatch):
    """A function that sets the problem that `ham_kernels` reports for the GPU."""
    ops_ham._warn_without_kernels.cache_clear()

    def set_problem(problem):
        module = types.SimpleNamespace(compact_kept="the kernel")
        module.INTERFACE, module.platform_problem = ops_ham.KERNEL_INTERFACE, lambda device, interface: problem
        monkeypatch.setattr(ops_ham, "ham_kernels", module)

    yield set_problem
    ops_ham._warn_without_kernels.cache_clear()


def test_tensors_on_a_gpu_go_to_the_kernels(platform):
    platform(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert ops_ham.kernel_for("compact_kept", on_gpu(dtype)) == "the kernel"
        assert ops_ham.kernel_for("compact_kept", on_gpu(head_dim=256)) == "the kernel"


def test_what_the_kernels_cannot_hold_takes_pytorch(platform):
    platform(None)
    assert ops_ham.kernel_for("compact_kept", on_gpu(), on_gpu(torch.float64)) is None
    assert ops_ham.kernel_for("compact_kept", on_gpu(), on_gpu(head_dim=257)) is None
    assert ops_ham.kernel_for("compact_kept", torch.zeros(2, 16)) is None


def test_kernels_of_another_version_are_left_alone(monkeypatch):
    """The code of a checkpoint may be older than the installed kernels, or newer."""
    device = torch.device("cuda", 0)
    assert ham_kernels.INTERFACE == ops_ham.KERNEL_INTERFACE
    assert "version 1 of the kernels" in ham_kernels.platform_problem(device), "code that gives no version"
    monkeypatch.setattr(ops_ham, "KERNEL_INTERFACE", ham_kernels.INTERFACE + 1)
    ops_ham._warn_without_kernels.cache_clear()
    with pytest.warns(UserWarning, match="`import ham_hf` before the model is loaded"):
        assert ops_ham.kernel_for("compact_kept", on_gpu()) is None
    monkeypatch.setattr(ops_ham, "ham_kernels", types.SimpleNamespace(platform_problem=lambda device: None))
    with pytest.warns(UserWarning, match="`ham_kernels` is older than version"):
        assert ops_ham.kernel_for("compact_kept", on_gpu()) is None
    ops_ham._warn_without_kernels.cache_clear()


# The arguments that version 3 of the kernels takes from the code of a model.
SIGNATURES = {
    ham_kernels.compact_kept: "keep tensors capacity",
    ham_kernels.decode_mix_append: "update positions real_tokens real norm_weights output_gate o_kv gates pages eps "
    "gate_activation window sinks",
    ham_kernels.decode_update: "qkv convolution gates state routing view real allow_neg_eigval",
    ham_kernels.gated_delta_rule_with_prediction: "q k v g beta scale initial_state seq_idx chunk_size score predict",
    ham_kernels.ragged_decode_attention: "q k v keep pages tail scale index recent",
    ham_kernels.slab_table: "slabs",
    ham_kernels.sparse_prefix_attention: "q k v k_kept v_kept begin end until scale window_start real return_lse",
    AttentionView: "norm_weights rope convolved scale_values eps",
    Convolution: "state weight",
    Gates: "a b A_log dt_bias",
    Routing: "threshold score given error_weight positions sinks",
}


@pytest.mark.parametrize("takes", SIGNATURES, ids=lambda takes: takes.__name__)
def test_another_signature_is_another_version(takes):
    """If this fails, raise `INTERFACE` of the kernels and `KERNEL_INTERFACE` of the model's code."""
    assert ham_kernels.INTERFACE == 3
    assert " ".join(inspect.signature(takes).parameters) == SIGNATURES[takes]


@pytest.mark.parametrize("installed", [False, True])
def test_a_gpu_without_kernels_warns_once_and_takes_pytorch(installed, platform, monkeypatch):
    platform("this GPU is too old")
    if not installed:
        monkeypatch.setattr(ops_ham, "ham_kernels", None)
        monkeypatch.setattr(ops_ham, "NO_KERNELS_BECAUSE", "No module named 'ham_kernels'", raising=False)
    with pytest.warns(UserWarning, match="too old" if installed else "No module named"):
        assert ops_ham.kernel_for("compact_kept", on_gpu()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops_ham.kernel_for("compact_kept", on_gpu()) is None


@pytest.mark.parametrize("on_kernels", ["all"], indirect=True)
def test_every_launch_is_on_the_device_of_its_tensors(on_kernels, tiny_config, monkeypatch):
    """A model whose layers are on several devices; in a backward pass autograd sees to the device."""
    executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    if torch.cuda.is_available():
        pytest.skip("nothing is interpreted")
    guards, launched, launch = [], set(), executor.__call__

    class Guard:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            guards.append(self.device)

        def __exit__(self, *_):
            guards.pop()

    def checked(self, *args, **kwargs):
        assert guards, f"{self.fn.__name__} is launched wherever the caller happens to be"
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(executor, "__call__", checked)
    model = tiny_model(tiny_config, num_hidden_layers=1).eval()
    on_kernels()
    ids = inputs()["input_ids"][:, :34]
    with torch.no_grad():
        cache = model(ids[:, :32], use_cache=True, threshold=0.4).cache
        model(ids[:, 32:33], cache=cache, use_cache=True, threshold=0.4)
    names = ("wy_inverse_fwd", "compact_kept_fwd", "sparse_prefix_attention_fwd", "ragged_decode_attention_fwd")
    for name in (*names, "decode_update_fwd", "decode_mix_append_fwd"):
        assert f"{name}_kernel" in launched, name


@pytest.mark.parametrize("on_kernels", ["all"], indirect=True)
def test_only_the_first_axis_of_a_grid_grows_with_the_batch(on_kernels, tiny_config, monkeypatch):
    """The others end at 65,535, fewer than the streams of a large batch."""
    if torch.cuda.is_available():
        pytest.skip("nothing is interpreted")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch, set_grid = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.set_grid_dim
    launched, other_axes = [], {}

    def named(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    def recorded(self, *grid):
        other_axes.setdefault(launched[-1], set()).add((batch, *grid[1:]))
        return set_grid(self, *grid)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", named)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_dim", recorded)
    model = tiny_model(tiny_config, num_hidden_layers=1, **WINDOW)
    on_kernels()
    for batch in (1, 3):
        ids = inputs()["input_ids"][:1, :9].repeat(batch, 1)
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            cache = model.eval()(ids[:, :8], use_cache=True, threshold=0.4).cache
            model(ids[:, 8:], cache=cache, use_cache=True, threshold=0.4)
        model.train()
    assert len(other_axes) > 10
    for name, grids in other_axes.items():
        small, large = ({grid[1:] for grid in grids if grid[0] == batch} for batch in (1, 3))
        assert small == large, name
