# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Transformers tests FSDP2 and tensor parallelism for models on a list of its own: here is what it asks of those."""

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.distributed import DistributedConfig

from ham_hf.loading_ham import transformers_release

pytestmark = pytest.mark.slow

CASES = ["learned thresholds", "fixed threshold, tied"]
PROGRAM = Path(__file__).with_name("parallel_run.py")
# Sums in another order, after four steps of an optimizer; see test_scale_out.py.
AFTER_STEPS = 1e-4


def run(launch, folder: Path, *topics: str, processes: int = 2) -> dict[str, Any]:
    launch(PROGRAM, folder / "found.json", *topics, processes=processes)
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory, launch) -> dict[str, Any]:
    """Results of two processes, topic by topic."""
    return run(launch, tmp_path_factory.mktemp("parallel"), "resumed", "in_bfloat16", "tensor_parallel")


@pytest.mark.parametrize("case", CASES)
class TestFullySharded:
    def test_training_that_stops_and_goes_on_is_that_of_ddp(self, found, case):
        result = found["resumed"][case]
        assert result["losses"] < 1e-5
        assert result["weights"] < AFTER_STEPS
        assert result["weights without the optimizer's state"] > 10 * AFTER_STEPS

    @pytest.mark.parametrize("kind", ["saved", "shards"])
    def test_a_saved_model_comes_back_bit_equal(self, found, case, kind):
        """Whole, or as each rank's shards."""
        assert found["resumed"][case][kind] == 0

    def test_each_layer_is_a_group(self, found, case):
        """And so are embedding, norm and head, but a tied head and its embedding are one."""
        result = found["resumed"][case]
        layers = {f"model.layers.{i}" for i in range(4)}
        assert layers | {""} <= set(result["groups"])
        assert {name for name in result["groups"] if name.count(".") > 2} == set()
        assert result["tied"] == ("tied" in case)
        assert result["sharded"]

    def test_bfloat16_takes_steps(self, found, case):
        result = found["in_bfloat16"][case]
        if "tied" in case and transformers_release() < (5, 23):
            assert "install Transformers 5.23 or newer, or load in float32" in result["refused"]
            return
        assert result["finite"]
        assert max(result["losses"]) < 10
        assert result["still"] == (["threshold"] if "fixed" in case else [])
        learned = [] if "fixed" in case else ["error_weight"]
        assert result["float32"] == ["A_log", "dt_bias", *learned, "threshold"]


@pytest.mark.parametrize("case", CASES)
class TestTensorParallel:
    def test_prompts_and_generation_are_those_of_one_process(self, found, case):
        result = found["tensor_parallel"][case]
        for one_process, two_processes in (result["logits"], result["steps"]):
            # Beside what one process rounds, each sum over shards is rounded once more: at most twice as often.
            assert 0 < two_processes < 2 * one_process
        assert result["text"]
        assert result["kept"]

    def test_what_is_tied_is_sharded_together(self, found, case):
        """As in Transformers' own models: newer releases shard the embedding too, and then the tied head with it."""
        result = found["tensor_parallel"][case]
        own, native = result["rules"]
        assert own == native
        assert result["tied"] == ("tied" in case)
        assert result["head"]
        assert result["embedding"] == (own is not None or result["tied"])


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_tensor_parallel_float8_is_as_exact_as_that_of_one_process(launch, tmp_path):
    """Scales are per row of a weight: a shard's are those of the whole row or smaller, so the error does not grow."""
    result = run(launch, tmp_path, "quantized")["quantized"]
    assert 0.001 * result["scale"] < result["one process"] < 0.5 * result["scale"]
    assert result["two processes"] < 1.1 * result["one process"]


@pytest.mark.skipif(
    "dp_replicate_size" not in inspect.signature(DistributedConfig).parameters, reason="needs Transformers 5.23"
)
def test_shards_may_be_replicated(launch, tmp_path):
    """Four processes, two of which share each of two models."""
    for result in run(launch, tmp_path, "replicated", processes=4)["replicated"].values():
        assert result["mesh"] == [2, 2]
        assert result["losses"] < 1e-5
        assert result["weights"] < AFTER_STEPS
