# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Two processes train as one does: DDP, FSDP2 and tensor parallelism, over gloo on CPUs."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from ham_hf.configuration_ham import ROUTERS

# Two processes take more than a minute.
pytestmark = pytest.mark.slow
# Of the largest element of each tensor. Measured: sums in another order give up to 3e-6 where rows are divided among
# processes, and 5e-5 where matrices are, whose gradients pass through more of them.
ROWS_DIVIDED = 1e-5
MATRICES_DIVIDED = 2e-4
# bfloat16 has 8 bits: gradients summed over two halves of a batch differ by a rounding or two.
BFLOAT16 = 2**-6
# Ranks hold unequal shares only since Transformers 5.21.
UNEVEN = pytest.mark.skipif(Version(transformers.__version__) < Version("5.21"), reason="needs Transformers 5.21")
TENSOR_PARALLEL = ["cosine", "learned, tied", pytest.param("odd", marks=UNEVEN), "no output gate"]


@pytest.fixture(scope="module")
def found(tmp_path_factory, launch) -> dict[str, Any]:
    """Results of two processes, topic by topic."""
    output = tmp_path_factory.mktemp("two_processes") / "found.json"
    launch(Path(__file__).with_name("two_processes.py"), output)
    return json.loads(output.read_text())


class TestDataParallel:
    @pytest.mark.parametrize("router", ROUTERS)
    def test_rows_of_unequal_lengths_give_the_loss_and_gradients_of_one_process(self, found, router):
        result = found["data_parallel"][router]
        assert result["loss"] < 1e-5
        assert result["gradients"] < ROWS_DIVIDED

    @pytest.mark.parametrize("router", [router for router in ROUTERS if router != "recency"])  # keeps by a budget
    def test_usage_and_thresholds_are_steered_by_all_rows(self, found, router):
        """No rank's own usage is the mean."""
        result = found["data_parallel"][router]
        assert any(0.05 < x < 0.95 for x in result["usage"])
        assert result["usage over ranks"] < 1e-6
        assert result["thresholds"] < ROWS_DIVIDED
        assert result["one rank alone"] > 100 * ROWS_DIVIDED

    def test_accumulated_gradients_are_those_of_one_process(self, found):
        result = found["data_parallel"]["accumulated"]
        assert result["loss"] < 1e-5
        assert max(result["gradients"], result["thresholds"]) < ROWS_DIVIDED


class TestFullySharded:
    @pytest.mark.parametrize("case", ["plain", "tied", "checkpointed by accelerate", "checkpointed by Transformers"])
    def test_gradients_are_those_of_one_process(self, found, case):
        result = found["sharded"][case]
        assert result["sharded"]
        assert result["loss"] < 1e-5
        assert max(result["gradients"], result["thresholds"]) < ROWS_DIVIDED

    def test_optimizer_steps_are_those_of_one_process(self, found):
        assert found["sharded_steps"]["steps"] < 1e-4

    def test_a_state_loads_bit_equal_and_saves_as_an_ordinary_checkpoint(self, found):
        result = found["sharded_steps"]
        assert result["moved"] > 1e-3
        assert result["loaded"]
        assert result["saved"]

    def test_bfloat16_computes_what_one_process_does_in_bfloat16(self, found):
        result = found["in_bfloat16"]
        assert result["masters"] == ["torch.float32"]
        assert result["against one process"]["loss"] < 1e-2
        assert result["against one process"]["gradients"] < BFLOAT16
        assert result["against one process"]["thresholds"] < ROWS_DIVIDED
        for name in ("loss", "thresholds"):
            assert result["against float32"][name] <= 2 * result["one process against float32"][name]

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", ROWS_DIVIDED), ("bfloat16", BFLOAT16)])
    def test_the_plan_of_transformers_gives_the_gradients_of_one_process(self, found, dtype, tolerance):
        result = found["sharded_by_transformers"][dtype]
        assert result["loss"] < 1e-2 if dtype == "bfloat16" else result["loss"] < 1e-5
        assert result["gradients"] < tolerance
        assert result["thresholds"] < ROWS_DIVIDED
        assert result["saved"]

    def test_thresholds_and_decays_stay_float32_under_the_plan_of_transformers(self, found):
        assert found["sharded_by_transformers"]["bfloat16"]["float32"] == ["A_log", "dt_bias", "threshold"]


class TestTensorParallel:
    @pytest.mark.parametrize("case", TENSOR_PARALLEL)
    def test_one_batch_gives_the_loss_and_gradients_of_one_process(self, found, case):
        result = found["tensor_parallel"][case]
        assert result["loss"] < 1e-5
        assert result["gradients"] < MATRICES_DIVIDED
        assert result["thresholds"] < ROWS_DIVIDED

    @pytest.mark.parametrize("case", TENSOR_PARALLEL)
    def test_what_every_rank_holds_whole_stays_equal(self, found, case):
        """A router, gates, norms and thresholds have no rule in the plan: ranks must not drift apart."""
        assert found["tensor_parallel"][case]["equal on all ranks"]
        assert found["tensor_parallel"][case]["steps"] < MATRICES_DIVIDED

    @pytest.mark.parametrize("case", TENSOR_PARALLEL)
    def test_generates_and_saves_as_one_process_does(self, found, case):
        result = found["tensor_parallel"][case]
        assert result["text"]
        assert result["saved"]

    @pytest.mark.parametrize("case", TENSOR_PARALLEL)
    def test_two_ranks_hold_little_more_than_half_each(self, found, case):
        """Of what is shared: older releases of Transformers leave an embedding that is not tied whole."""
        result = found["tensor_parallel"][case]
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} <= set(result["sharded"])
        assert ("z_proj" in result["sharded"]) == (case != "no output gate")
        assert result["share held"] < 0.56

    def test_no_rule_is_without_a_module(self, found):
        assert found["tensor_parallel"]["warnings"] == []


class TestMessages:
    @pytest.mark.parametrize("way", ["DDP", "DDP tied", "FSDP2", "FSDP2 tied", "TP", "TP tied"])
    def test_what_is_sent_is_what_the_page_on_cost_says(self, found, way):
        """Within 1%: what two ranks cannot share evenly is padded."""
        if way == "TP" and "embed_tokens" not in found["tensor_parallel"]["cosine"]["sharded"]:
            pytest.skip("this release of Transformers leaves the embedding whole on every rank")
        for sent, expected in found["messages"][way].values():
            assert sent == pytest.approx(expected, rel=0.01)
