# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Counts tunings and compilations of the kernels as lengths grow, and checks which platforms they refuse."""

import inspect
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import Autotuner, JITFunction  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

import ham_kernels  # noqa: E402
from ham_kernels import tuning  # noqa: E402

# Lengths of one bucket, 129 to 256: an odd one, a multiple of 16, and its end.
LENGTHS = (131, 160, 256)


def compile_key(kernel, args, kwargs):
    """Triton's key for compiling a launch: constants, types, and for integers if they are 1 or a multiple of 16."""
    signature = inspect.signature(kernel.fn)
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in signature.parameters}
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    exempt = getattr(kernel, "kwargs", {}).get("do_not_specialize") or getattr(kernel, "do_not_specialize", None) or ()
    key = [kernel.fn.__name__, options.get("num_warps"), options.get("num_stages")]
    for i, (name, value) in enumerate(bound.arguments.items()):
        if signature.parameters[name].annotation in (tl.constexpr, "tl.constexpr", "constexpr"):
            key.append((name, str(value)))
        elif isinstance(value, torch.Tensor):
            key.append((name, value.dtype))
        elif isinstance(value, int) and not isinstance(value, bool):
            wide = not -(2**31) <= value < 2**31
            specialized = name not in exempt and i not in exempt
            key.append((name, wide, specialized and (value == 1, value % 16 == 0)))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)


@pytest.fixture
def recorded(monkeypatch):
    """The sets of keys of all launches since: those of tuning, and those of compilation."""
    tuned, compiled = set(), set()
    run_tuner = Autotuner.run

    def run(self, *args, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        dtypes = tuple((name, x.dtype) for name, x in arguments.items() if isinstance(x, torch.Tensor))
        tuned.add((self.base_fn.__name__, tuple((name, arguments[name]) for name in self.keys), dtypes))
        return run_tuner(self, *args, **kwargs)

    monkeypatch.setattr(Autotuner, "run", run)
    for kind in (JITFunction, InterpretedFunction):

        def launch(self, *args, grid, warmup, original=kind.run, **kwargs):
            compiled.add(compile_key(self, args, dict(kwargs)))
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)

        monkeypatch.setattr(kind, "run", launch)
    return tuned, compiled


def leaf(*shape, device):
    return torch.randn(*shape, device=device).requires_grad_()


def run_gated_delta_rule(length, device):
    q, k, v = (leaf(1, length, 2, 16, device=device) for _ in range(3))
    gates = torch.rand(1, length, 2, device=device)
    out, _, state = ham_kernels.gated_delta_rule_with_prediction(q, k * 0.2, v, -gates, gates)
    (out.sum() + state.sum()).backward()


def run_compact_kept(length, device):
    keep = torch.arange(length, device=device)[None, :, None].expand(1, -1, 2) % 2 == 0
    (compacted,), _ = ham_kernels.compact_kept(keep.contiguous(), leaf(1, length, 2, 16, device=device))
    compacted.sum().backward()


def run_sparse_prefix_attention(length, device):
    q, k, v = (leaf(1, length, 2, 16, device=device) for _ in range(3))
    end = ((torch.arange(length, device=device) + 1) // 2)[None, :, None].expand(1, -1, 2).contiguous()
    k_kept, v_kept = (x[:, ::2].transpose(1, 2) for x in (k, v))
    ham_kernels.sparse_prefix_attention(q, k, v, k_kept, v_kept, torch.zeros_like(end), end).sum().backward()
    window_start = (torch.arange(length, device=device) - 4).clamp(min=0)[None]
    nothing = torch.zeros_like(end)
    out = ham_kernels.sparse_prefix_attention(q, k, v, k_kept, v_kept, nothing, nothing, window_start=window_start)
    out.sum().backward()


def run_ragged_decode_attention(length, device):
    streams, page = 2, 16
    full = length // page
    keys, values = (torch.randn(streams * full, page, 16, device=device) for _ in range(2))
    owner = torch.arange(streams, device=device, dtype=torch.int32).repeat_interleave(full)
    fill = torch.full((streams,), length % page, device=device)
    tail = (*(torch.randn(streams, page, 16, device=device) for _ in range(2)), fill)
    for tokens in (1, 5, 5 + length % 7):
        q, k = torch.randn(2, streams, tokens, 2, 16, device=device)
        keep = torch.ones(streams, tokens, dtype=torch.bool, device=device)
        ham_kernels.ragged_decode_attention(q, k[:, :, 0], k[:, :, 1], keep, [(keys, values, owner)], tail)


RUNS = {
    "gated_delta_rule_with_prediction": run_gated_delta_rule,
    "compact_kept": run_compact_kept,
    "sparse_prefix_attention": run_sparse_prefix_attention,
    "ragged_decode_attention": run_ragged_decode_attention,
}


# The interpreter takes ten seconds for each of these.
LONG_RUNS = ("gated_delta_rule_with_prediction", "ragged_decode_attention")


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow) if op in LONG_RUNS else op for op in RUNS])
def test_a_new_length_in_a_bucket_neither_tunes_nor_compiles(op, recorded, device):
    if not hasattr(ham_kernels, op):
        pytest.skip(f"ham_kernels has no {op}")
    tuned, compiled = recorded
    RUNS[op](LENGTHS[0], device)
    assert compiled
    before = set(tuned), set(compiled)
    for length in LENGTHS[1:]:
        RUNS[op](length, device)
        assert tuned == before[0], f"length {length} tunes again: {tuned - before[0]}"
        assert compiled == before[1], f"length {length} compiles again: {compiled - before[1]}"


@triton.jit
def specialized_kernel(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), n)


@triton.jit(do_not_specialize=["n", "bucket"])
def unspecialized_kernel(x, n, bucket, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), n)


tuned_kernel = tuning.tuned([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["bucket"])(
    unspecialized_kernel
)


def test_the_count_sees_lengths_that_compile_again(recorded, device):
    tuned, compiled = recorded
    x = torch.empty(64, device=device)
    for n in (17, 18, 32, 48, 1):
        specialized_kernel[(1,)](x, n, 16)
    assert len(compiled) == 3  # ordinary numbers, multiples of 16, and 1
    compiled.clear()
    for n in (17, 18, 32, 48, 1):
        tuned_kernel[(1,)](x, n, tuning.next_bucket(n))
    assert len(compiled) == 1
    assert {key for _, key, _ in tuned} == {(("bucket", 16),), (("bucket", 32),), (("bucket", 64),)}


def test_without_tuning_the_first_shape_is_taken(device):
    if tuning.TUNING:
        pytest.skip("tuning is on")
    x = torch.zeros(64, device=device)
    tuned_kernel[(1,)](x, 7, 16)
    assert x.tolist() == [7.0] * 16 + [0.0] * 48


def test_buckets_are_powers_of_two_that_hold_the_length():
    assert [tuning.next_bucket(n) for n in (0, 1, 16, 17, 1024, 1025)] == [16, 16, 16, 32, 1024, 2048]


@pytest.mark.parametrize(
    ("capability", "version", "problem"),
    [
        ((7, 5), (3, 7, 1), "capability 8.0"),
        ((8, 0), (3, 4, 0), None),
        ((9, 0), (3, 6, 0), None),
        ((9, 0), (3, 7, 1), None),
        ((10, 0), (3, 7, 1), "Triton 3.8"),
        ((12, 0), (3, 7, 9), "Triton 3.8"),
        ((10, 0), (3, 8, 0), None),
        ((13, 0), (3, 8, 0), "no GPU of this kind"),
    ],
)
def test_bad_pairs_of_gpu_and_triton(capability, version, problem):
    found = tuning.known_problem(capability, version)
    assert found is None if problem is None else problem in found


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes PyTorch report a GPU, and Triton a version."""

    def pretend(capability, version):
        monkeypatch.setattr(tuning, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
        monkeypatch.setattr(triton, "__version__", version)

    tuning.platform_problem.cache_clear()
    yield pretend
    tuning.platform_problem.cache_clear()


def test_a_bad_pair_is_refused_by_name(gpu):
    gpu((10, 0), "3.7.1+git123")
    with pytest.raises(RuntimeError, match=r"Blackwell.*Triton 3\.8.*Pretended with Triton 3\.7\.1\+git123"):
        ham_kernels.check_platform(torch.device("cuda", 0))


def test_an_amd_gpu_is_refused(gpu, monkeypatch):
    gpu((9, 4), "3.6.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match=r"do not run on AMD GPUs yet.*Pretended"):
        ham_kernels.check_platform(torch.device("cuda", 0))


def test_a_good_pair_is_taken_also_with_an_odd_version(gpu):
    gpu((9, 0), "3.6.0rc1")
    ham_kernels.check_platform(torch.device("cuda", 0))


@pytest.mark.slow
def test_a_triton_that_needs_a_gpu_to_be_imported_with_is_done_without():
    program = (
        "import torch, triton, types; triton.__version__ = '3.3.0'; from ham_hf import ops_ham; "
        "assert ops_ham.ham_kernels is None; "
        "gpu = types.SimpleNamespace(device=torch.device('cuda', 0), dtype=torch.float32, shape=(2, 16)); "
        "assert ops_ham.kernel_for('compact_kept', gpu) is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "`ham_kernels` needs Triton 3.4 or newer, found 3.3.0" in done.stderr


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device, got 'cpu'"):
        ham_kernels.check_platform(torch.device("cpu"))
