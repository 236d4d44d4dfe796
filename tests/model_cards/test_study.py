# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The studies: tasks, gradients, equal parameters, resuming, and reports from stored results."""

import math
from types import SimpleNamespace

import pytest
import torch

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.files import append_row, read_rows
from ham_hf.inputs_ham import TokenLayout
from ham_hf.reference import naive_sparse_attention
from ham_hf.training.control import thresholds_of
from model_cards.rows import current_commit
from model_cards.study import language, language_report, recall_study, report, study
from model_cards.study.__main__ import main
from model_cards.study.fitting import Training, block_means, fit
from model_cards.study.gradients import GRADIENTS, use_gradient
from model_cards.study.job import NAME
from model_cards.study.recall import RecallTask
from tests.model_cards.small_models import SMALL, small_model

LEARNED = {"router": "learned", "kv_output_norm": True}
STUDY = """
arms:
  gdn: {layer_types: linear_attention}
  cosine: {router: cosine}
  learned: {router: learned}
  log-bias: {router: learned, gradient: log_bias}
  of-my-own: {router: random, oracle: true}
recall:
  seeds: 2
  arms: [gdn, cosine, learned]
  tasks: {pattern: {filler: pattern, pairs: [2, 4], length: 24, queries: 2, keys: 12, values: 12}}
  model: &model
    {vocab_size: 24, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
     rope_parameters: null, target_kv_usage: 0.25}
  training: {steps: 8, rows: 2, learning_rate: 0.003, warmup: 4}
  usages: [0.1, 0.5]
  pairs: [2, 4, 8]
gradients:
  seeds: 1
  arms: [of-my-own, log-bias]
  tasks: {noise: {filler: random, pairs: [2, 4], length: 24, queries: 2, keys: 12, values: 12}}
  model: *model
  training: {steps: 8, rows: 2, learning_rate: 0.003, warmup: 4, usage_from: 1.0}
  usages: [0.1, 0.5]
  pairs: [2, 4, 8]
"""


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.setattr(recall_study, "EVALUATION_ROWS", 8)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


class TestGradients:
    @pytest.fixture
    def mixed(self):
        """A function: the mixer of a gradient, and its attention over values scaled by it, with all tensors."""

        def make(gradient):
            torch.manual_seed(0)
            model = small_model(SMALL | LEARNED, 6000)
            use_gradient(model, gradient)
            mixer = model.model.layers[0].mixer
            q, k, v = (torch.randn(1, 7, 2, 8, dtype=torch.float64) for _ in range(3))
            scores = torch.rand(1, 7, 2, dtype=torch.float64).requires_grad_()
            keep = torch.rand(1, 7, 2) > 0.5
            scaled = mixer._scale_values(v, scores)

            tokens = TokenLayout(torch.arange(7)[None])
            out = mixer.attend_kept(q, k, scaled, keep, scores.detach(), tokens, None, None)
            return out, q, k, v, scores, keep

        return make

    def test_log_bias_is_a_bias_of_the_logits(self, mixed):
        out, q, k, v, scores, keep = mixed("log_bias")
        biased = torch.cat([k, scores.log()[..., None] * math.sqrt(8)], dim=-1)
        wanted, _ = naive_sparse_attention(
            torch.cat([q, torch.ones_like(q[..., :1])], -1), biased, v, keep, scale=8**-0.5
        )
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)

    def test_straight_through_leaves_values_and_moves_scores_as_scaling_would(self, mixed):
        out, q, k, v, scores, keep = mixed("straight_through")
        wanted, weights = naive_sparse_attention(q, k, v, keep)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
        upstream = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, scores, upstream)
        # Scaling value j by s_j adds s_j times what its readers take of it.
        per_value = torch.einsum("bhts,bthv->bshv", weights, upstream)
        torch.testing.assert_close(gradient, (per_value * v).sum(-1), rtol=0, atol=1e-12)

    def test_behind_the_norm_the_mean_score_counts_whatever_the_size_of_values(self, mixed):
        out, q, k, v, scores, keep = mixed("behind_norm")
        values, _ = naive_sparse_attention(q, k, v, keep)
        mean_score, _ = naive_sparse_attention(q, k, scores[..., None], keep)
        model = small_model(SMALL | LEARNED, 6000)
        use_gradient(model, "behind_norm")
        norm = model.model.layers[0].mixer.kv_norm
        wanted = torch.nn.functional.rms_norm(values, (8,), eps=norm.eps) * mean_score
        torch.testing.assert_close(norm.double()(out), wanted, rtol=0, atol=1e-12)

    def test_noise_tries_dropped_tokens_in_training_alone(self):
        torch.manual_seed(0)
        mixer = small_model(SMALL | LEARNED, 6000).model.layers[0].mixer
        mixer.__class__ = GRADIENTS["noise"]
        scores, k = torch.full((1, 4000, 2), 0.4), torch.zeros(1, 4000, 2, 8)
        threshold = torch.full((1, 2), 0.5)
        tokens = TokenLayout(torch.arange(4000)[None])
        noisy, kept = mixer.train()._route(scores, k, threshold, tokens)
        # The threshold lies log(3 / 2) logits higher, which a unit normal exceeds in 34.3% of cases.
        assert abs(kept.float().mean() - 0.343) < 0.02
        assert abs(noisy.logit().mean() - scores.logit().mean()) < 0.05
        still, kept = mixer.eval()._route(scores, k, threshold, tokens)
        assert torch.equal(still, scores)
        assert not kept.any()

    def test_a_score_behind_the_norm_needs_the_norm(self):
        model = small_model(SMALL | LEARNED | {"kv_output_norm": False}, 6000)
        with pytest.raises(ValueError, match="`kv_output_norm` must be true with the gradient 'behind_norm'"):
            use_gradient(model, "behind_norm")

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_each_lets_a_router_learn(self, gradient):
        model = small_model(SMALL | LEARNED, 6000).train()
        use_gradient(model, gradient)
        ids = torch.randint(24, (2, 20))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert model.model.layers[0].mixer.router.up_proj.weight.grad.abs().max() > 0
        assert model.config.router_aux_loss_coef == (gradient == "received_attention")


class TestFitting:
    def test_models_of_a_study_have_equal_parameters(self):
        for kind in ({"layer_types": ["full_attention"] * 2}, {"layer_types": ["linear_attention"] * 2}, {}):
            parameters = small_model(SMALL | kind, 20_000).num_parameters()
            assert abs(parameters - 20_000) <= 3 * 16 * 2 / 2, "half of what one more channel of the MLPs would add"

    def test_too_few_parameters_are_refused(self):
        with pytest.raises(ValueError, match="`parameters` must be at least"):
            small_model(SMALL, 100)

    def test_usage_falls_to_its_target(self):
        model = small_model(SMALL, 6000)
        targets = []
        training = Training(steps=10, rows=1, learning_rate=1e-3, warmup=2, usage_from=1.0, usage_ramp=0.5)
        ids = torch.randint(24, (1, 12))

        def watch(step):
            targets.append(model.config.target_kv_usage)

        losses = fit(model, lambda step: (ids, ids), training, "x", watch)
        assert targets[0] == 1.0
        assert targets == sorted(targets, reverse=True)
        assert targets[5:] == [0.25] * 5
        assert len(losses) == 10
        assert not model.training

    def test_thresholds_may_be_frozen_at_first(self):
        model = small_model(SMALL, 20_000)
        training = Training(steps=10, rows=1, learning_rate=1e-3, warmup=2, frozen=0.4)
        ids, thresholds = torch.randint(24, (1, 12)), []

        def watch(step):
            thresholds.append(torch.stack([x.detach().clone() for x in thresholds_of(model).values()]))

        fit(model, lambda step: (ids, ids), training, "x", watch)
        moves = torch.stack(thresholds).diff(dim=0).abs().amax((1, 2))
        assert (moves[:3] == 0).all()
        assert moves[3] > 0, "the update that follows 4 others is the first of the thresholds"
        assert model.config.target_kv_usage == 0.25
        with pytest.raises(ValueError, match=r"`frozen` must be a fraction of the steps, between 0 and 1, got 1\.5"):
            Training(steps=10, rows=1, learning_rate=1e-3, frozen=1.5)

    def test_recency_is_trained_and_measured_with_a_window_of_equal_size(self):
        model, budgets = small_model(SMALL | {"router": "recency"}, 20_000), []
        plain = model.forward

        def forward(*args, **arguments):
            budgets.append(arguments.get("kv_budget"))
            return plain(*args, **arguments)

        model.forward = forward
        task = RecallTask("pattern", pairs=(2,), length=24, queries=2, keys=12, values=12)
        fit(model, lambda step: task.batch(step, 1), Training(3, 1, 1e-3, warmup=2, frozen=0.5), "x")
        assert budgets == [6] * 3
        assert [recall_study._measure(model, task, 2, kv_usage)[1] for kv_usage in (None, 0.5, 0.01)] == [
            0.25,
            0.5,
            1 / 24,
        ]
        assert budgets[3:] == [6, 12, 1]

    @pytest.mark.parametrize("kind", ["linear_attention", "full_attention", "hybrid"])
    def test_all_but_thresholds_warm_up_and_come_to_rest(self, kind, monkeypatch):
        model = small_model(SMALL | {"layer_types": [kind] * 2}, 20_000)
        rates = []

        class Watched(torch.optim.AdamW):
            def step(self):
                thresholds = {id(x) for x in thresholds_of(model).values()}
                rates.append([g["lr"] for g in self.param_groups if id(g["params"][0]) not in thresholds])
                super().step()

        monkeypatch.setattr(torch.optim, "AdamW", Watched)
        ids = torch.randint(24, (1, 12))
        fit(model, lambda step: (ids, ids), Training(10, 1, 1e-3, warmup=2), "x")
        assert len(rates[0]) == 2, "matrices, and what does not decay"
        for at_first, highest, at_last in zip(rates[0], rates[1], rates[-1], strict=True):
            assert at_first == pytest.approx(5e-4)
            assert highest > 9e-4
            assert at_last < 5e-5

    def test_losses_are_told_in_means_of_blocks_and_of_what_is_left(self):
        assert block_means([1.0] * 50 + [3.0] * 10) == [1.0, 3.0]

    def test_a_loss_that_is_no_number_stops_the_run(self):
        model = small_model(SMALL, 6000)
        torch.nn.init.constant_(model.model.norm.weight, torch.nan)
        ids = torch.randint(24, (1, 12))
        with pytest.raises(RuntimeError, match="The loss of x is nan at step 0"):
            fit(model, lambda step: (ids, ids), Training(2, 1, 1e-3), "x")


class Oracle:
    """A model without hybrid layers that foresees, by a window of tokens, what followed it the first time."""

    device = torch.device("cpu")
    config = SimpleNamespace(
        num_hybrid_layers=0, layer_types=["full_attention"], num_hidden_layers=1, vocab_size=500, router="cosine"
    )

    def __init__(self, window):
        self.window = window

    def __call__(self, input_ids, logits_to_keep=0, **_):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            followed_by = {}
            for i in range(self.window, len(ids) + 1):
                seen = tuple(ids[i - self.window : i])
                if seen in followed_by:
                    logits[row, i - 1, followed_by[seen]] = 1
                elif i < len(ids):
                    followed_by[seen] = ids[i]
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


class TestMeasuring:
    def test_one_who_remembers_all_pairs_names_all_values(self):
        task = RecallTask("pattern", marked=True)
        for pairs in (4, 32, 64):
            assert recall_study._measure(Oracle(1), task, pairs, None) == (1.0, 1.0)
        assert recall_study._measure(Oracle(200), task, 4, None)[0] < 0.1

    def test_one_who_remembers_the_text_foresees_all_needles(self):
        windows = list(torch.arange(480).view(4, 1, 120))
        for distance in (60, 300):
            assert language._needle(Oracle(2), windows, distance, None) == 1.0
            assert language._needle(Oracle(400), windows, distance, None) < 0.1

    def test_training_calibration_and_evaluation_share_no_batch(self, study_file, monkeypatch):
        drawn, real = [], RecallTask.batch

        def batch(task, seed, rows, pairs=None):
            drawn.append((seed, pairs))
            return real(task, seed, rows, pairs)

        monkeypatch.setattr(RecallTask, "batch", batch)
        job = next(x for x in study.jobs_of(study.read_study(str(study_file))) if x.arm == "cosine")
        study.run_job(job, None, "cpu")
        evaluated = {seed for seed, pairs in drawn if pairs is not None}
        others = [seed for seed, pairs in drawn if pairs is None]
        assert len(evaluated) == 3
        assert len(others) == len(set(others)) == 1 + 8 + recall_study.CALIBRATION_BATCHES
        assert not evaluated & set(others)


def run(study_file, output, *parts):
    return main([str(study_file), "--output", str(output), "--parts", *parts])


class TestRunning:
    def test_goes_on_where_it_was_interrupted_and_reports(self, study_file, tmp_path, monkeypatch, capsys):
        trained = []
        real = study.run_job

        def counted(job, *arguments):
            if len(trained) == 3:
                raise KeyboardInterrupt
            trained.append(job.name)
            return real(job, *arguments)

        monkeypatch.setattr(study, "run_job", counted)
        monkeypatch.setattr(recall_study, "PROBE_EVERY", 8)  # all steps
        output = tmp_path / "out"
        assert run(study_file, output, "recall", "gradients") == 130
        assert len(read_rows(output / "recall.jsonl")) == 3
        monkeypatch.setattr(study, "run_job", lambda job, *rest: trained.append(job.name) or real(job, *rest))
        assert run(study_file, output, "recall", "gradients") == 0
        assert len(trained) == len(set(trained)) == 8
        assert trained[0] == "recall.pattern.gdn.0"
        table = (output / "study.md").read_text()
        assert table in capsys.readouterr().out
        assert "| cosine - gdn | pattern | 2 |" in table
        assert table.index("| noise | log-bias | 1 |") < table.index("| noise | of-my-own | 1 |"), (
            "in the order of `arms`"
        )
        for plot in ("recall.png", "gradients.png"):
            assert (output / plot).read_bytes().startswith(b"\x89PNG")
        rows = read_rows(output / "recall.jsonl")
        assert [NAME.format_map(x) for x in rows] == trained[:6]
        assert [x["arm"] for x in read_rows(output / "gradients.jsonl")] == ["of-my-own", "log-bias"]
        of_my_own, log_bias = read_rows(output / "gradients.jsonl")
        assert of_my_own["settings"]["oracle"]
        assert "oracle" not in log_bias["settings"]
        result = rows[-1]
        assert (result["task"], result["arm"], result["seed"]) == ("pattern", "learned", 1)
        assert result["commit"] == current_commit()
        assert set(result["accuracy"]) == {"learned", "0.1", "0.5"}
        assert set(result["accuracy"]["0.1"]) == {"2", "4", "8"}
        assert result["usage"]["0.5"]["4"] == pytest.approx(0.5, abs=0.15)
        assert len(result["losses"]) == 1
        assert len(result["flicker"]) == 1

    @pytest.mark.slow
    def test_the_report_is_of_this_study_alone(self, study_file, tmp_path):
        output = tmp_path / "out"
        assert run(study_file, output, "gradients") == 0
        append_row(output / "recall.jsonl", {"part": "recall", "task": "pattern", "arm": "gdn", "seed": 7})
        for file in ("study.md", "gradients.png", "recall.png"):
            (output / file).unlink()
        assert main([str(study_file), "--output", str(output), "--report"]) == 0
        assert "gdn" not in (output / "study.md").read_text()
        assert {x.name for x in output.glob("*.png")} == {"gradients.png", "recall.png"}

    def test_a_job_is_a_function_of_its_settings(self, study_file):
        job = next(x for x in study.jobs_of(study.read_study(str(study_file))) if x.arm == "learned")
        assert study.run_job(job, None, "cpu") == study.run_job(job, None, "cpu")

    def test_a_result_of_other_settings_is_not_taken_for_this_one(self, study_file, tmp_path, capsys):
        output = tmp_path / "out"
        output.mkdir()
        row = {"part": "recall", "task": "pattern", "arm": "gdn", "seed": 0, "settings": {}}
        append_row(output / "recall.jsonl", row)
        assert run(study_file, output, "recall") == 2
        assert "holds a result of other settings, recall.pattern.gdn.0" in capsys.readouterr().err
        assert [x.name for x in output.iterdir()] == ["recall.jsonl"]
        assert read_rows(output / "recall.jsonl") == [row]

    @pytest.mark.slow
    def test_a_row_whose_writing_was_interrupted_is_made_again(self, study_file, tmp_path):
        output = tmp_path / "out"
        assert run(study_file, output, "gradients") == 0
        file = output / "gradients.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        (output / "study.md").unlink()
        assert main([str(study_file), "--output", str(output), "--report"]) == 0
        table = (output / "study.md").read_text()
        assert "of-my-own" in table
        assert "log-bias" not in table
        assert run(study_file, output, "gradients") == 0
        assert file.read_bytes() == whole

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ("recall:", "recal:", "unknown keys ['recal']"),
            ("  usages: [0.1, 0.5]\n  pairs: [2, 4, 8]", "  usages: [0.1, 0.5]", "`recall` must have the keys"),
            ("arms: [gdn, cosine, learned]", "arms: [gnd]", "`recall.arms` names ['gnd']"),
            ("log_bias", "log", "`arms.log-bias.gradient` must be one of"),
            ("cosine: {router: cosine}", "cosine:", "names ['cosine'], which `arms` does not define as a mapping"),
            ("cosine: {router: cosine}", "cosine: {ruter: cosine}", "`arms.cosine` has no key `ruter`"),
            ("hidden_size", "hiden_size", "`recall.model` has no key `hiden_size`: did you mean `hidden_size`?"),
            (
                "training: {steps: 8, rows: 2, learning_rate: 0.003, warmup: 4}",
                "training:",
                "must be a mapping, got None",
            ),
            ("steps: 8", "stepps: 50", "`recall.training` has no key `stepps`: did you mean `steps`?"),
            ("steps: 8", "steps: 0", "`steps` must be at least 1"),
            ("seeds: 2", "seeds: 0", "`recall.seeds` must be a whole number of at least 1"),
            ("usages: [0.1, 0.5]", "usages: []", "`recall.usages` must be a list that is not empty"),
            ("filler: pattern", "fillers: pattern", "`recall.tasks.pattern` has no key `fillers`"),
            ("pairs: [2, 4, 8]", "pairs: [2, 4, 13]", "`pairs` must lie between 1 and 12, the number of keys"),
            ("noise: {filler: random", "pattern: {filler: random", "`gradients.tasks.pattern` must have the settings"),
            (
                "pairs: [2, 4, 8]\ngradients",
                "pairs: [2, 4]\ngradients",
                "`gradients.pairs` must be as in `recall`, [2, 4]",
            ),
            ("arms:\n", "arms: [\n", "is not YAML"),
        ],
    )
    def test_a_wrong_study_is_refused(self, study_file, tmp_path, capsys, before, after, message):
        study_file.write_text(STUDY.replace(before, after, 1))
        assert run(study_file, tmp_path / "out", "recall") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_wrong_arguments_are_named(self, study_file, tmp_path, capsys):
        for arguments, message in (
            (["cpo", "--output", "x"], "no file 'cpo', takes a YAML file or one of cpu"),
            ([str(study_file), "--output", "x", "--parts", "recal"], "argument --parts: got 'recal'"),
            (["cpu", "--output", "x", "--parts", "language"], "argument --corpus: language needs it"),
            (["cpu", "--output", "x", "--parts", "routers", "selection"], "argument --corpus: selection needs it"),
            ([str(study_file), "--output", str(tmp_path / "none"), "--report"], "there is nothing to report"),
        ):
            assert main([*arguments]) == 2
            assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["language", "selection"])
def test_an_oracle_of_language_is_refused(part):
    plan = study.read_study("cpu")
    with pytest.raises(ValueError, match=rf"`{part}\.arms` must be without oracles.* got 'oracle'"):
        study._check_plan(part, plan[part] | {"arms": ["oracle"]}, plan["arms"])


@pytest.mark.parametrize("name", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_the_studies_of_the_package_are_sound(name):
    plan = study.read_study(name)
    jobs = list(study.jobs_of(plan))
    assert len({job.name for job in jobs}) == len(jobs)
    assert plan["recall"]["seeds"] >= 5
    # Seeds of an arm have the same settings.
    for job in {(job.part, job.task, job.arm): job for job in jobs}.values():
        vocab_size = 5000 if job.part in study.OF_TEXT else RecallTask(**job.settings["task"]).vocab_size
        with torch.device("meta"):
            equal_to = HAMForCausalLM(HAMConfig(**job.settings["equal_to"] | {"vocab_size": vocab_size}))
        config = job.config(vocab_size)
        with torch.device("meta"):
            model = HAMForCausalLM(config)
        assert model.config.vocab_size == vocab_size
        # One more channel of the MLPs is as near as it gets.
        channel = 3 * config.hidden_size * config.num_hidden_layers
        assert abs(model.num_parameters() - equal_to.num_parameters()) <= channel / 2


class TestLanguage:
    def test_a_needle_lies_in_the_text_and_at_its_end(self):
        text = torch.arange(100, 200)[None]
        places = set()
        for index in range(3):
            ids, place = language._with_needle(text, 90, index, vocab_size=50)
            assert ids.shape == (1, 100)
            assert torch.equal(ids[0, place : place + 10], ids[0, -10:])
            rest = torch.cat([ids[0, :place], ids[0, place + 10 : -10]])
            assert torch.equal(rest, text[0, :80])
            places.add(place)
        assert places == {8, 40, 72}

    def test_traces_are_those_of_the_model(self):
        model = small_model(SMALL | {"vocab_size": 50}, 8000).eval()
        windows = [torch.randint(50, (1, 40)) for _ in range(2)]
        traces = language._traces(model, windows)
        assert torch.tensor(traces["scores"]).shape == (2, 40)
        assert torch.tensor(traces["by_position"]).shape == (2, 40)
        decay = torch.tensor(traces["decay"])
        assert decay.shape == (2, 40)
        mixer, inputs = model.model.layers[0].mixer, []
        handle = mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(input_ids=language._with_needle(windows[0], 30, 1, 50)[0], use_cache=False)
        handle.remove()
        g = -mixer.A_log.exp() * torch.nn.functional.softplus(mixer.a_proj(inputs[0]) + mixer.dt_bias)
        torch.testing.assert_close(decay[0], g.exp()[0].mean(-1), rtol=0, atol=1e-6)


class TestSelection:
    def test_a_model_is_trained_on_text_and_its_losses_are_those_of_each_usage(self, monkeypatch):
        monkeypatch.setattr(language, "NEEDLES", 2)
        monkeypatch.setattr(language, "CALIBRATION_BATCHES", 2)
        plan = study.read_study("cpu")
        plan["selection"]["arms"] = ["cosine", "all-kept", "gdn"]
        plan["selection"]["training"] = {"steps": 4, "rows": 1, "learning_rate": 1e-3, "warmup": 2}
        plan["selection"]["tasks"]["english"] |= {"context": 32, "distances": [16]}
        plan["selection"]["model"] |= {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        jobs = {job.arm: job for job in study.jobs_of(plan) if job.part == "selection" and job.seed == 0}

        def batch(seed, rows, length, repeats=None):
            return torch.randint(60, (rows, length), generator=torch.Generator().manual_seed(seed))

        windows = [batch(i, 1, 32) for i in range(3)]
        sampler = SimpleNamespace(vocab_size=60, batch=batch)
        texts = SimpleNamespace(training=sampler, held_out=lambda context, per_document: windows)
        for arm, usages in (("cosine", ["learned", "0.25", "1.0"]), ("all-kept", None), ("gdn", ["learned"])):
            result = study.run_job(jobs[arm], texts, "cpu")
            usages = usages or ["learned", "0.25", "1.0"]
            for name in ("held_out", "second_time", "first", "repeated", "usage", "needle"):
                assert list(result[name]) == usages
            assert [len(x) for x in result["second_time"].values()] == [3] * len(usages)
            assert result["usage"]["learned"] == {"cosine": result["usage"]["learned"], "all-kept": 1, "gdn": 0}[arm]
            if arm != "gdn":
                assert result["usage"]["1.0"] == 1
                same = result["held_out"]["learned"] == result["held_out"]["1.0"]
                assert same == (arm == "all-kept")

    def test_differences_are_paired_by_seed(self):
        def result(arm, seed, text, everything):
            of_text = {"held_out": text, "second_time": text + 1, "first": text, "repeated": None}
            figures = {name: {"learned": [x, x]} for name, x in of_text.items() if x is not None}
            figures["repeated"] = {"learned": [None, text]}
            if everything is not None:
                figures["held_out"]["1.0"] = [everything] * 2
            shared = {"part": "selection", "task": "t", "arm": arm, "seed": seed, "losses": [9.0, text]}
            return shared | {"usage": {"learned": 0.25}} | figures

        results = [result("gdn", 0, 5.0, None), result("gdn", 1, 7.0, None), result("gdn", 2, 1.0, None)]
        results += [result("cosine", 0, 5.5, 5.25), result("cosine", 1, 7.1, 6.75)]
        table = language_report.selection_differences(results)
        assert "| cosine - gdn | 2 | 0.300 ± 0.200 (0) | 0.300 ± 0.200 (0) | 0.000 ± 0.250 (1) |" in table
        assert len(table.splitlines()) == 3, "of the arms without results there are no differences"
        rows = language_report.selection_table(results).splitlines()
        assert rows[2].startswith("| gdn | 3 | 25% | 4.333 ± 1.764 | 4.333 ± 1.764 | 5.333 ± 1.764 | 4.333")
        assert rows[3].endswith("| 6.300 ± 0.800 | 6.000 ± 0.750 |")


def test_a_study_without_hybrid_layers_has_no_picture_of_scores(tmp_path):
    result = {"part": "language", "task": "t", "arm": "gdn", "seed": 0, "parameters": 9, "settings": {"usages": [0.5]}}
    figures = {"held_out": {"learned": [5.0]}, "usage": {"learned": 0.0}, "needle": {"learned": {"64": 0.5}}}
    written = report.write_report([result | figures], ["gdn"], tmp_path)
    assert [x.name for x in written] == ["study.md", "language.png"]
    assert "| gdn | 9 | 1 | 5.000 (0%) |  | 0.500 |" in (tmp_path / "study.md").read_text()


def test_differences_are_paired_by_seed_and_task():
    def result(part, task, arm, seed, value, kept):
        tilt = 0.1 if arm == "cosine" else 0.0
        fewest, most = ("4", "8") if task == "pattern" else ("2", "4")
        accuracy = {fewest: value + tilt, most: value - tilt}
        figures = {"accuracy": {"learned": accuracy}, "usage": {"learned": {fewest: kept, most: kept}}}
        return {"part": part, "task": task, "arm": arm, "seed": seed, **figures}

    results = [
        result("recall", "pattern", "cosine", 0, 0.5, 0.2),
        result("recall", "pattern", "cosine", 1, 0.9, 0.3),
        result("routers", "pattern", "gdn", 1, 0.7, 0.0),
        result("routers", "pattern", "gdn", 0, 0.1, 0.0),
        result("gradients", "marked", "cosine", 0, 1.0, 0.1),
        result("gradients", "marked", "gdn", 0, 0.5, 0.0),
    ]
    table = report.differences(results, [("cosine", "gdn")])
    assert table.splitlines()[2:] == [
        "| cosine - gdn | marked | 1 | 10% - 0% | 0.500 (1) | 0.600 (1) | 0.400 (1) |",
        "| cosine - gdn | pattern | 2 | 25% - 0% | 0.300 ± 0.100 (2) | 0.400 ± 0.100 (2) | 0.200 ± 0.100 (2) |",
    ]


def test_parts_that_share_a_task_differ_in_their_arms_alone():
    found = {}
    for job in study.jobs_of(study.read_study("cpu")):
        if job.part in study.COMPARED:
            common = {name: job.settings[name] for name in ("equal_to", "task", "training", "usages", "pairs")}
            # The ramp is what the arm is about.
            common["training"] = {k: v for k, v in common["training"].items() if k != "usage_from"}
            assert found.setdefault(job.task, common) == common
            assert found.setdefault((job.task, job.arm), job.part) == job.part


def test_repairs_are_told_with_standard_errors_and_paired_by_seed(tmp_path):
    def result(arm, seed, accuracy):
        figures = {"accuracy": {"learned": {"4": 0.0}, "0.25": {"4": accuracy + 0.1, "8": accuracy - 0.1}}}
        settings = {"usages": [0.25], "model": SMALL, "task": {"filler": "pattern"}}
        figures |= {"usage": {"learned": {"4": 0.2}}, "losses": [2.0, 1.0], "settings": settings}
        return {"part": "repairs", "task": "t", "arm": arm, "seed": seed, **figures}

    results = [result("cosine-free", seed, 0.1 * seed) for seed in (0, 1, 2)]
    results += [result("learned-free", 0, 0.3), result("learned-free", 2, 0.7)]
    written = report.write_report(results, ["learned-free", "cosine-free"], tmp_path)
    assert [x.name for x in written] == ["study.md", "repairs.md"]
    table = (tmp_path / "repairs.md").read_text()
    assert table.splitlines()[2:] == [
        "| learned-free | 2 | 0.500 ± 0.200 | 0.30, 0.70 | 0.400 ± 0.100 | 1.00 |",
        "| cosine-free | 3 | 0.100 ± 0.058 | 0.00, 0.10, 0.20 |  | 1.00 |",
    ]
    assert table in (tmp_path / "study.md").read_text()
