# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What the common tests of Transformers' models ask, of every HAM model: they are not part of its package.

Here is what the contract with Transformers and the tests of the cache do not ask already.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from ham_hf import (
    HAMCache,
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
    HAMPreTrainedModel,
    inputs_ham,
)
from ham_hf.inputs_ham import CACHE_NAME

# Newer releases of Transformers call it `activation_checkpointing_enable`.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_:FutureWarning")

HEADS = (HAMForCausalLM, HAMForSequenceClassification, HAMForTokenClassification, HAMForQuestionAnswering)
MODELS = (HAMModel, *HEADS)
FLOAT32_NAMES = ("A_log", "dt_bias", "threshold", "score_quantiles")
MIXED = ["hybrid", "linear_attention", "full_attention"]
CASES = {
    "learned thresholds": {},
    "fixed threshold": {"threshold": 0.5},
    "mixed layers": {"layer_types": MIXED, "num_hidden_layers": len(MIXED)},
}
# Newer releases of Transformers record the hidden states of chosen layers only.
CHOOSES_LAYERS = hasattr(output_capturing, "resolve_hidden_states_indices")


@pytest.fixture(params=list(CASES))
def config(request, tiny_config):
    return tiny_config(bos_token_id=1, eos_token_id=2, **CASES[request.param])


@pytest.fixture
def every_kind(tiny_config):
    """A layer of each kind, for tests of every class: what differs between them does not depend on the layers."""
    return tiny_config(bos_token_id=1, eos_token_id=2, **CASES["mixed layers"])


@pytest.fixture
def model(config):
    """A causal LM that keeps some tokens and drops others."""
    return distinct(HAMForCausalLM(config)).eval()


def distinct(model):
    """Moves parameters away from their initial values, so that logits are far enough apart to compare tokens."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_((0.02 if name.endswith("threshold") else 0.1) * torch.randn_like(x))
    return model


def tokens(*shape: int) -> torch.Tensor:
    """Real tokens: neither padding, nor those that begin and end a text."""
    return torch.randint(3, 97, shape)


def example(cls, rows: int = 3) -> dict[str, torch.Tensor]:
    """Tokens, and the labels that the model of this class takes."""
    input_ids = tokens(rows, 9)
    labels = {
        HAMModel: {},
        HAMForCausalLM: {"labels": input_ids},
        HAMForSequenceClassification: {"labels": torch.arange(rows) % 2},
        HAMForTokenClassification: {"labels": input_ids % 2},
        HAMForQuestionAnswering: {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 4},
    }
    return {"input_ids": input_ids} | labels[cls]


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def outputs_of(out) -> dict[str, torch.Tensor]:
    """The tensors of an output that are numbers of the last layer."""
    return {name: out[name] for name in ("last_hidden_state", "logits", "start_logits", "end_logits") if name in out}


def loss_of(cls, model, inputs) -> torch.Tensor:
    out = model(**inputs, use_cache=False)
    return out.last_hidden_state.square().mean() if cls is HAMModel else out.loss


class TestMaking:
    @pytest.fixture
    def config(self, every_kind):
        return every_kind

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cls", MODELS)
    def test_decays_and_thresholds_are_float32_in_a_half_precision_model(self, cls, every_kind, dtype):
        """Of a model that is made, not loaded: nothing but the constructor knows of it then."""
        assert set(cls._keep_in_fp32_modules_strict) == set(FLOAT32_NAMES)
        model = cls._from_config(every_kind, dtype=dtype)
        kept = {name: x.dtype for name, x in model.state_dict().items() if name.endswith(FLOAT32_NAMES)}
        assert {name.rpartition(".")[2] for name in kept} == set(FLOAT32_NAMES)
        assert set(kept.values()) == {torch.float32}
        assert {x.dtype for name, x in model.state_dict().items() if name not in kept} == {dtype}
        model.load_state_dict({name: x.to(dtype) for name, x in model.state_dict().items()})
        assert all(x.dtype == torch.float32 for name, x in model.state_dict().items() if name in kept)

    @pytest.mark.parametrize("cls", MODELS)
    def test_a_state_dict_makes_the_model_whole(self, cls, every_kind):
        model = distinct(cls(every_kind))
        made = cls.from_pretrained(None, config=every_kind, state_dict=model.state_dict())
        for name, x in tensors(made).items():
            assert torch.equal(x, tensors(model)[name]), name
            assert x.is_contiguous(), name

    @pytest.mark.parametrize("router", ["cosine", "learned_error"])
    @pytest.mark.parametrize("cls", MODELS)
    def test_initialisation_is_the_same_before_and_after_the_meta_device(self, cls, every_kind, router, monkeypatch):
        """Bit for bit, where each module starts from the same random numbers: nothing is initialised elsewhere."""
        initialise = HAMPreTrainedModel._init_weights

        def seeded(self, module):
            torch.manual_seed(0)
            initialise(self, module)

        monkeypatch.setattr(HAMPreTrainedModel, "_init_weights", seeded)
        every_kind.router = router
        expected = tensors(cls(every_kind))
        loaded = cls.from_pretrained(None, config=every_kind, state_dict={})
        with torch.device("meta"):
            emptied = cls(every_kind)
        emptied.to_empty(device="cpu").init_weights()
        for found in (loaded, emptied):
            assert tensors(found).keys() == expected.keys()
            assert [name for name, x in tensors(found).items() if not torch.equal(x, expected[name])] == []

    def test_a_device_may_be_the_default(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with torch.device("cpu"):
            loaded = HAMForCausalLM.from_pretrained(tmp_path).eval()
        input_ids = tokens(2, 9)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
            HAMForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("source", MODELS)
    @pytest.mark.parametrize("target", MODELS)
    def test_heads_take_each_other_s_decoder(self, source, target, every_kind, tmp_path):
        model = distinct(source(every_kind))
        model.save_pretrained(tmp_path)
        loaded, info = target.from_pretrained(tmp_path, output_loading_info=True)
        shared = source is target or {source, target} == {HAMForSequenceClassification, HAMForTokenClassification}
        own = (
            {name for name in loaded.state_dict() if not name.startswith("model.")}
            if target is not HAMModel
            else set()
        )
        if source is target:
            assert info["missing_keys"] == set()
        elif not shared:
            assert info["missing_keys"] == own
        decoder = tensors(model.base_model)
        assert [name for name, x in tensors(loaded.base_model).items() if not torch.equal(x, decoder[name])] == []

    def test_weights_of_another_shape_are_named(self, model, config, tmp_path):
        model.save_pretrained(tmp_path)
        larger = copy.deepcopy(config)
        larger.vocab_size = 103
        with pytest.raises(RuntimeError, match="mismatch"):
            HAMForCausalLM.from_pretrained(tmp_path, config=larger)
        loaded, info = HAMForCausalLM.from_pretrained(
            tmp_path, config=larger, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert {name for name, *_ in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
        assert loaded(torch.full((1, 3), 102)).logits.shape == (1, 3, 103)
        assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)

    @pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_dtypes_are_asked_for_by_either_name_and_remembered(self, model, tmp_path, name, dtype):
        model.save_pretrained(tmp_path / "float32")
        loaded = HAMForCausalLM.from_pretrained(tmp_path / "float32", **{name: dtype})
        assert loaded.dtype == loaded.config.dtype == torch.bfloat16
        loaded.save_pretrained(tmp_path / "bfloat16")
        assert HAMForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
        assert HAMForCausalLM.from_pretrained(tmp_path / "bfloat16", **{name: "auto"}).dtype == torch.bfloat16
        assert HAMForCausalLM.from_pretrained(tmp_path / "bfloat16", **{name: "float32"}).dtype == torch.float32
        assert AutoModelForCausalLM.from_config(model.config, **{name: dtype}).dtype == torch.bfloat16

    @pytest.mark.parametrize("cls", MODELS)
    def test_a_state_goes_through_torch_s_files(self, cls, every_kind, tmp_path):
        model = distinct(cls(every_kind)).eval()
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = cls(every_kind).eval()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        inputs = {"input_ids": tokens(3, 9)}
        found, expected = outputs_of(other(**inputs)), outputs_of(model(**inputs))
        assert all(torch.equal(found[name], x) for name, x in expected.items())


class TestEmbeddings:
    @pytest.fixture
    def config(self, every_kind):
        return every_kind

    @pytest.mark.parametrize("cls", MODELS)
    def test_embeddings_are_got_and_set(self, cls, every_kind):
        model = cls(every_kind)
        assert type(model.get_input_embeddings()) is nn.Embedding
        new = nn.Embedding(12, 32)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is model.base_model.embed_tokens is new
        head = model.get_output_embeddings()
        assert head is (model.lm_head if cls is HAMForCausalLM else None)

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_vocabulary_grows_shrinks_and_is_saved(self, config, tied, tmp_path):
        config.tie_word_embeddings = tied
        model = distinct(HAMForCausalLM(config)).eval()
        input_ids = torch.randint(3, 80, (2, 9))
        expected = model(input_ids).logits[..., :80]
        for size, multiple, rows in ((110, None, 110), (90, None, 90), (90, 64, 128), (80, None, 80)):
            model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
            assert model.model.embed_tokens.weight.shape == (rows, 32)
            assert model.lm_head.weight.shape == (rows, 32)
            assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == rows
            assert model.config.vocab_size == model.vocab_size == rows
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            model.init_weights()  # initialises nothing again that has been
            assert torch.equal(model(input_ids).logits[..., :80], expected)
        model.save_pretrained(tmp_path)
        loaded = HAMForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config.vocab_size == 80
        assert torch.equal(loaded(input_ids).logits, expected)
        assert loaded.generate(input_ids, max_new_tokens=3).max() < 80

    def test_tied_weights_are_missed_by_nobody(self, config, tmp_path):
        config.tie_word_embeddings = True
        model = distinct(HAMForCausalLM(config))
        (name,) = [n for n, x in model.named_parameters() if x is model.lm_head.weight]
        assert name == "model.embed_tokens.weight"
        model.save_pretrained(tmp_path)
        assert name in load_file(tmp_path / "model.safetensors")
        _, info = HAMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        # Parting from the embedding, the head is saved by itself.
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
        model.save_pretrained(tmp_path)
        apart = HAMForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight + 1)

    def test_tensor_parallel_shards_what_is_tied_together(self, config):
        """Or not at all: a sharded head over an embedding that each rank has whole gathers logits of both."""
        model = HAMForCausalLM(config)
        native = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
        shards_embeddings = "model.embed_tokens" in native.tp_plan
        assert "lm_head" in model.tp_plan
        for each in (HAMModel(config), model):
            name = "embed_tokens" if each is not model else "model.embed_tokens"
            assert (name in each.tp_plan) == shards_embeddings
            assert each.tp_plan.get(name) == native.tp_plan.get("model.embed_tokens")


class TestOutputs:
    @pytest.mark.parametrize("cls", MODELS)
    def test_calls_repeat(self, cls, every_kind):
        model, inputs = distinct(cls(every_kind)).eval(), {"input_ids": tokens(2, 9)}
        first, second = outputs_of(model(**inputs)), outputs_of(model(**inputs))
        assert first
        assert all(torch.equal(second[name], x) for name, x in first.items())

    @pytest.mark.parametrize("wanted", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=str)
    @pytest.mark.parametrize("cls", MODELS)
    def test_a_tuple_has_the_entries_of_the_output_in_order(self, cls, every_kind, wanted):
        model, inputs = distinct(cls(every_kind)).eval(), example(cls)
        named = model(**inputs, **wanted)
        entries = model(**inputs, **wanted, return_dict=False)
        assert type(entries) is tuple
        assert (CACHE_NAME in named) == (cls not in (HAMForTokenClassification, HAMForQuestionAnswering))
        for name, found in zip(named, entries, strict=True):
            if name == CACHE_NAME:
                assert type(found) is HAMCache
                continue
            pairs = zip(found, named[name], strict=True) if isinstance(found, tuple) else [(found, named[name])]
            assert all(torch.equal(x, y) for x, y in pairs), name

    @pytest.mark.parametrize("cls", MODELS)
    def test_the_every_kinduration_says_what_is_returned(self, cls, every_kind):
        every_kind.output_hidden_states = every_kind.output_attentions = True
        model = cls(every_kind).eval()
        attentions = sum(kind != "linear_attention" for kind in every_kind.layer_types)
        out = model(tokens(3, 9))
        assert (len(out.hidden_states), len(out.attentions)) == (every_kind.num_hidden_layers + 1, attentions)
        out = model(tokens(3, 9), output_hidden_states=False, output_attentions=False)
        assert (out.get("hidden_states"), out.get("attentions")) == (None, None)

    @pytest.mark.skipif(not CHOOSES_LAYERS, reason="Transformers records all layers or none")
    @pytest.mark.parametrize("cls", MODELS)
    def test_hidden_states_of_chosen_layers(self, cls, every_kind):
        model, input_ids = distinct(cls(every_kind)).eval(), tokens(3, 9)
        every = model(input_ids, output_hidden_states=True).hidden_states
        chosen = model(input_ids, output_hidden_states=[0, -1]).hidden_states
        assert [x is not None for x in chosen] == [True] + [False] * (len(every) - 2) + [True]
        assert torch.equal(chosen[0], every[0])
        assert torch.equal(chosen[-1], every[-1])

    @pytest.mark.parametrize("cls", MODELS)
    def test_recorded_outputs_are_in_the_graph(self, cls, every_kind):
        model = distinct(cls(every_kind)).eval()
        out = model(tokens(3, 9), output_hidden_states=True, output_attentions=True)
        recorded = [*out.hidden_states, *out.attentions]
        for x in recorded:
            x.retain_grad()
        next(iter(outputs_of(out).values())).square().sum().backward()
        assert all(x.grad is not None and x.grad.any() for x in recorded)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("cls", MODELS)
    def test_a_row_does_not_depend_on_the_others(self, cls, every_kind, side):
        model = distinct(cls(every_kind)).eval()
        lengths = (9, 4, 1)
        rows = [tokens(1, n) for n in lengths]
        pads = [(0, 9 - n) if side == "right" else (9 - n, 0) for n in lengths]
        batch = torch.cat([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        together = outputs_of(model(batch, attention_mask=(batch > 0).long()))
        for n, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            for name, alone in outputs_of(model(row)).items():
                found = together[name][n : n + 1]
                if cls is not HAMForSequenceClassification:
                    found = found[:, pad[0] : 9 - pad[1]]
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)

    def test_the_cache_s_old_name_is_still_taken(self, model, monkeypatch):
        """Under Transformers 5.24 with a warning, and to the same effect."""
        warnings = []
        monkeypatch.setattr(inputs_ham.logger, "warning_once", warnings.append)
        input_ids, caches = tokens(2, 9), [HAMCache(model.config), HAMCache(model.config)]
        for name, cache in zip(("cache", "past_key_values"), caches, strict=True):
            for part in input_ids.split(5, dim=1):
                out = model(part, **{name: cache})
                assert out.cache is cache
                assert out[CACHE_NAME] is cache
        assert len(warnings) == (2 if CACHE_NAME == "cache" else 0)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 9
        following = tokens(2, 1)
        assert torch.equal(*(model(following, cache=cache).logits for cache in caches))


class TestTraining:
    @pytest.mark.parametrize("reentrant", [None, False, True])
    @pytest.mark.parametrize("cls", MODELS)
    def test_no_parameter_that_asks_for_a_gradient_goes_without(self, cls, config, reentrant):
        """FSDP and DDP wait for the gradient of each: a fixed threshold has none, and must not ask for one."""
        model = cls(config).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(cls, model, example(cls)).backward()
        without = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
        assert without == []
        frozen = {name.rpartition(".")[2] for name, x in model.named_parameters() if not x.requires_grad}
        assert frozen == (set() if config.threshold is None else {"threshold"})

    def test_loading_leaves_a_fixed_threshold_frozen(self, config, tmp_path):
        HAMForCausalLM(config).save_pretrained(tmp_path)
        for loaded in (
            HAMForCausalLM.from_pretrained(tmp_path),
            HAMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
            AutoModelForCausalLM.from_config(config),
            copy.deepcopy(HAMForCausalLM(config)),
        ):
            learned = {x.requires_grad for name, x in loaded.named_parameters() if name.endswith("threshold")}
            assert learned == {config.threshold is None}

    @pytest.mark.parametrize("cls", MODELS)
    def test_checkpointing_is_switched_on_and_off(self, cls, every_kind):
        model = cls(every_kind).train()
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert len(layers) == every_kind.num_hidden_layers
        computed = []
        layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
        for switch, times in ((None, 1), ("enable", 2), ("disable", 1)):
            if switch is not None:
                getattr(model, f"gradient_checkpointing_{switch}")()
            assert {m.gradient_checkpointing for m in [*layers, model.base_model]} == {times == 2}
            computed.clear()
            loss_of(cls, model, example(cls)).backward()
            assert len(computed) == times

    @pytest.mark.parametrize("reentrant", [None, False, True])
    @pytest.mark.parametrize("cls", MODELS)
    def test_frozen_embeddings_put_out_what_has_a_gradient(self, cls, every_kind, reentrant):
        """As adapters need it: with all weights frozen, checkpoints need inputs that ask for gradients."""
        model = cls(every_kind).train()
        model.requires_grad_(False)
        (adapted := model.base_model.layers[-1].mlp.up_proj).requires_grad_(True)
        if reentrant is None:
            model.enable_input_require_grads()
        else:  # which does the same
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        seen = []
        model.get_input_embeddings().register_forward_hook(lambda module, x, out: seen.append(out))
        loss_of(cls, model, example(cls)).backward()
        assert seen[0].requires_grad
        assert adapted.weight.grad.any()
        model.disable_input_require_grads()
        assert not model.get_input_embeddings()(tokens(1, 2)).requires_grad

    @pytest.mark.parametrize(
        ("kind", "labels", "loss"),
        [
            ("regression", torch.tensor([0.5, -1.0, 2.0]), F.mse_loss),
            ("single_label_classification", torch.tensor([0, 3, 1]), F.cross_entropy),
            (
                "multi_label_classification",
                torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]]),
                F.binary_cross_entropy_with_logits,
            ),
        ],
    )
    @pytest.mark.parametrize("named", [True, False])
    def test_kinds_of_labels(self, every_kind, kind, labels, loss, named, recwarn):
        """Named in the configuration, or told from the labels."""
        every_kind.problem_type = kind if named else None
        every_kind.num_labels = 1 if kind == "regression" else 4
        model = distinct(HAMForSequenceClassification(every_kind)).eval()
        out = model(tokens(3, 9), labels=labels)
        assert out.logits.shape == (3, every_kind.num_labels)
        torch.testing.assert_close(out.loss, loss(out.logits.squeeze(-1), labels))
        assert not [w for w in recwarn if "target size" in str(w.message)]
        out.loss.backward()
        assert model.score.weight.grad.any()

    def test_shifted_labels_take_the_place_of_labels(self, model):
        model.train()
        input_ids, shifted, others = tokens(2, 9), tokens(2, 9), tokens(2, 9)
        alone = model(input_ids, shift_labels=shifted).loss
        assert torch.equal(model(input_ids, labels=others, shift_labels=shifted).loss, alone)
        assert not torch.isclose(model(input_ids, labels=shifted, shift_labels=others).loss, alone)

    def test_a_text_is_learned_by_heart(self, config):
        """A few steps on one text: gradients point downhill in every kind of layer, and generation says the text."""
        model = HAMForCausalLM(config).train()
        text = tokens(1, 20)
        optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(text, labels=text).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 * losses[0]
        said = model.eval().generate(text[:, :2], max_new_tokens=18, do_sample=False)
        assert torch.equal(said, text)


class TestRope:
    @pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
    def test_positions_are_scaled(self, tiny_config, kind):
        """Every type changes long texts; the dynamic one leaves alone what was in reach before."""
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        scaled = {"rope_type": kind, "rope_theta": 10000.0, "factor": 10.0, "original_max_position_embeddings": 32}
        if kind != "yarn":
            del scaled["original_max_position_embeddings"]
        outputs = []
        for rope in (plain, scaled):
            torch.manual_seed(0)
            model = HAMModel(tiny_config(max_position_embeddings=32, rope_parameters=rope, threshold=0.0)).eval()
            torch.manual_seed(1)
            outputs.append([model(tokens(1, n)).last_hidden_state for n in (10, 48)])
        (short, long), (scaled_short, scaled_long) = outputs
        assert torch.allclose(short, scaled_short, atol=1e-5) == (kind == "dynamic")
        assert not torch.allclose(long, scaled_long, atol=1e-5)


class TestGeneration:
    def generate(self, model, *inputs, **arguments):
        arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | arguments
        return model.generate(*inputs, return_dict_in_generate=True, **arguments)

    @pytest.mark.parametrize(
        "mode", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
    )
    def test_everything_that_can_be_returned(self, model, mode):
        config, steps = model.config, 6
        wanted = ("scores", "logits", "attentions", "hidden_states")
        out = self.generate(model, tokens(2, 5), **mode, **{f"output_{name}": True for name in wanted})
        rows = 2 * mode.get("num_beams", 1)
        attentions = sum(kind != "linear_attention" for kind in config.layer_types)
        assert type(out.cache) is HAMCache
        for name in wanted:
            assert len(out[name]) == steps, name
        assert {x.shape for x in (*out.scores, *out.logits)} == {(rows, 97)}
        for step, (states, weights) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
            new, seen = (5, 5) if step == 0 else (1, 5 + step)
            assert {x.shape for x in states} == {(rows, new, 32)}
            assert len(states) == config.num_hidden_layers + 1
            assert {x.shape for x in weights} == {(rows, 4, new, seen)}
            assert len(weights) == attentions
        if "num_beams" not in mode:
            chosen = out.sequences[:, 5:]
            if not mode:
                assert torch.equal(torch.stack(out.logits, 1).argmax(-1), chosen)

    def test_nothing_given_starts_with_the_first_token(self, model):
        out = self.generate(model)
        assert out.sequences.shape == (1, 7)
        assert out.sequences[0, 0] == model.config.bos_token_id
        expected = self.generate(model, torch.tensor([[model.config.bos_token_id]]))
        assert torch.equal(out.sequences, expected.sequences)

    def test_other_embeddings_give_other_texts(self, model):
        """Embeddings stand before the tokens when both are given, and the tokens come first in what is returned."""
        embeds = [torch.randn(1, 7, 32) for _ in range(2)]
        input_ids = torch.ones(1, 7, dtype=torch.long)
        first, second, again = (self.generate(model, inputs_embeds=x).sequences for x in (*embeds, embeds[0]))
        assert first.shape == (1, 6)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        both = self.generate(model, input_ids, inputs_embeds=embeds[0]).sequences
        assert torch.equal(both, torch.cat([input_ids, first], 1))

    def test_goes_on_after_embeddings(self, model):
        """A text that began with embeddings goes on with the tokens that were said."""
        embeds = torch.randn(2, 5, 32)
        whole = self.generate(model, inputs_embeds=embeds)
        first = self.generate(model, inputs_embeds=embeds, max_new_tokens=3, min_new_tokens=3)
        said = torch.cat([embeds, model.get_input_embeddings()(first.sequences)], 1)
        mask = torch.ones(said.shape[:2], dtype=torch.long)
        rest = self.generate(
            model, inputs_embeds=said, attention_mask=mask, cache=first.cache, max_new_tokens=3, min_new_tokens=3
        )
        assert torch.equal(torch.cat([first.sequences, rest.sequences], 1), whole.sequences)
        assert rest.cache.get_seq_length() == whole.cache.get_seq_length()
        assert torch.equal(rest.cache.kept_tokens(), whole.cache.kept_tokens())

    @pytest.mark.parametrize("side", ["whole", "last token"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_goes_on_from_a_cache(self, model, padded, side):
        """Given the whole text, or the token that the cache lacks and the mask of all: the scores are the same."""
        input_ids = tokens(2, 6)
        mask = torch.ones_like(input_ids)
        if padded:
            input_ids[0, :3] = mask[0, :3] = 0
        whole = self.generate(model, input_ids, attention_mask=mask, output_scores=True)
        first = self.generate(model, input_ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
        text = first.sequences if side == "whole" else first.sequences[:, -1:]
        rest = self.generate(
            model,
            text,
            attention_mask=F.pad(mask, (0, 2), value=1),
            cache=copy.deepcopy(first.cache),
            max_new_tokens=4,
            min_new_tokens=4,
            output_scores=True,
        )
        assert torch.equal(rest.sequences[:, -5:], whole.sequences[:, -5:])
        torch.testing.assert_close(rest.scores, whole.scores[2:], rtol=1e-5, atol=1e-5)
        assert torch.equal(rest.cache.kept_tokens(), whole.cache.kept_tokens())

    @pytest.mark.parametrize(
        "mode", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
    )
    def test_a_turn_of_any_kind_follows_a_greedy_one(self, model, mode):
        """From a cache, a turn that samples or keeps beams is the one from its text."""
        first = self.generate(model, tokens(2, 6), max_new_tokens=4, min_new_tokens=4)
        text = first.sequences
        mode = mode | {"attention_mask": torch.ones_like(text)}
        torch.manual_seed(3)
        expected = self.generate(model, text, **mode).sequences
        torch.manual_seed(3)
        cache = first.cache
        if "num_beams" in mode:
            cache.batch_repeat_interleave(mode["num_beams"])
        assert torch.equal(self.generate(model, text, cache=cache, **mode).sequences, expected)

    def test_positions_are_counted_from_the_mask(self, model):
        input_ids = F.pad(tokens(2, 5), (4, 0))
        mask = (input_ids > 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found, given = (
            self.generate(model, input_ids, attention_mask=mask, output_scores=True, **extra)
            for extra in ({}, {"position_ids": positions})
        )
        assert torch.equal(found.sequences, given.sequences)
        torch.testing.assert_close(found.scores, given.scores)

    def test_only_the_last_logits_are_formed(self, model):
        """Whatever the prompt's length, and by the same argument that a caller may give."""
        sizes = []
        model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
        expected = self.generate(model, tokens(2, 8) * 0 + 7).sequences
        assert sizes == [1] * 6
        assert torch.equal(self.generate(model, tokens(2, 8) * 0 + 7, logits_to_keep=0).sequences, expected)
        assert sizes[6] == 8

    def test_inputs_are_prepared_as_they_are_given(self, model):
        cache = HAMCache(model.config)
        given = {"threshold": 0.4, "kv_budget": 5, "use_cache": True, CACHE_NAME: cache}
        mask = torch.ones(1, 4, dtype=torch.long)
        prepared = model.prepare_inputs_for_generation(
            tokens(1, 4), is_first_iteration=True, attention_mask=mask, **given
        )
        assert given.items() <= prepared.items()
        assert model(**prepared).cache is cache

    def test_sampling_with_an_assistant_follows_the_model(self, model, tiny_config):
        """Where one token has almost all of the weight, samples are the greedy text, whatever the assistant says."""
        model.lm_head.weight.data *= 1000
        input_ids = tokens(1, 6)
        expected = self.generate(model, input_ids, max_new_tokens=12).sequences
        torch.manual_seed(5)
        small = distinct(HAMForCausalLM(tiny_config(num_hidden_layers=1, eos_token_id=2))).eval()
        out = self.generate(model, input_ids, assistant_model=small, do_sample=True, max_new_tokens=12)
        assert torch.equal(out.sequences, expected)
        assert type(out.cache) is HAMCache
        assert out.cache.is_croppable

    def test_looking_up_prompts_stops_where_the_text_ends(self, model):
        """A candidate taken from the prompt may hold the last token: nothing may follow it."""
        input_ids = tokens(1, 4).repeat(1, 3)
        greedy = self.generate(model, input_ids, max_new_tokens=12).sequences[0, 12:]
        end = int(greedy[4])
        first = greedy.tolist().index(end)
        out = model.generate(
            input_ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=end
        )
        assert out[0, 12:].tolist() == greedy[: first + 1].tolist()

    def test_a_cache_that_cannot_be_cropped_is_not_asked_to(self, model, monkeypatch):
        """HAMCache says that it can, after a prompt as before one, so assisted generation takes it."""
        cache = HAMCache(model.config)
        assert cache.is_croppable
        cache.activate_past_recording()
        model(tokens(1, 5), cache=cache)
        assert cache.is_croppable
        model(tokens(1, 3), cache=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 6

    def test_attention_is_the_model_s_own(self, config, tmp_path, caplog):
        """Other implementations of attention are refused with words, or change nothing."""
        model = distinct(HAMForCausalLM(config)).eval()
        input_ids = tokens(2, 9)
        expected = model(input_ids).logits
        assert model.config._attn_implementation == "eager"
        model.set_attn_implementation("eager")
        assert torch.equal(model(input_ids).logits, expected)
        for name in ("sdpa", "flash_attention_2", "flex_attention"):
            with pytest.raises((ValueError, ImportError), match=r"HAMForCausalLM|flash|flex"):
                HAMForCausalLM._from_config(config, attn_implementation=name)
