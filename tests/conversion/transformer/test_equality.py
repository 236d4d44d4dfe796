# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Llama, Mistral, Qwen2 and Qwen3 become HAMs that compute the same, and come back bit for bit."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ham_hf import HAMForCausalLM
from ham_hf.conversion.verification import shapes_of, transformers_model
from tests.conversion.transformer.sources import LLAMA3, SOURCES


def logits(folder, tokens, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, **arguments).logits


@pytest.mark.parametrize("name", SOURCES)
def test_computes_the_same_and_comes_back(name, source, convert, tensors_of, tmp_path):
    """Largest difference over all of these: 4e-6, of logits up to 4."""
    folder, ham, back = source(SOURCES[name]), tmp_path / "ham", tmp_path / "back"
    assert convert(folder, ham) == 0
    tokens = torch.randint(4096, (2, 131))
    expected = logits(folder, tokens)
    torch.testing.assert_close(logits(ham, tokens), expected, rtol=0, atol=1e-4)
    assert logits(ham, tokens, threshold=0.5).sub(expected).abs().max() > 1e-2, "the threshold decides nothing"

    record = json.loads((ham / "conversion.json").read_text())
    assert record["source"]["architecture"] == record["verification"]["source_code"]
    assert 0 <= record["verification"]["max_abs_logit_error"] < 1e-4

    assert convert(ham, back, "--back") == 0
    assert (back / "config.json").read_text() == (folder / "config.json").read_text()
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bfloat16_stays_and_comes_back(source, convert, tensors_of, tmp_path):
    folder = source(SOURCES["qwen3, biased, tied, yarn"], torch.bfloat16)
    assert convert(folder, tmp_path / "ham") == 0
    dtypes = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in tensors_of(tmp_path / "ham").items()}
    float32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert float32 == {"A_log", "dt_bias", "threshold", "score_quantiles"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert HAMForCausalLM.from_pretrained(tmp_path / "ham").dtype == torch.bfloat16
    assert convert(tmp_path / "ham", tmp_path / "back", "--back") == 0
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before | after)


@pytest.mark.parametrize("name", ["qwen3", "mistral, sliding", "qwen2, sliding in one layer"])
def test_generates_the_source_s_text(name, source, convert, tmp_path):
    """Greedy text of left-padded rows, through the cache that the HAM fills; tokenizer and settings came along."""
    folder = source(SOURCES[name])
    assert convert(folder, tmp_path / "ham") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ham")
    batch = tokenizer(
        ["The captain looked at the sea, and", "It is"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    texts = []
    for path in (folder, tmp_path / "ham"):
        model = AutoModelForCausalLM.from_pretrained(path)
        out = model.generate(
            **batch, max_new_tokens=40, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        texts.append(out.sequences)
    assert type(out.cache).__name__ == "HAMCache"
    sliding = HAMForCausalLM.from_pretrained(tmp_path / "ham").config.attention_window
    for layer, usage in enumerate(out.cache.kept_tokens() / out.cache.real_tokens[:, None]):
        assert (usage == (0 if isinstance(sliding, list) and sliding[layer] != 64 else 1)).all()
    assert torch.equal(*texts)
    assert (tmp_path / "ham/generation_config.json").is_file()


def test_an_rnn_that_opens_is_heard_and_not_taken_back(source, convert, tmp_path, capsys):
    """The RNN starts from the source's q, k and v: with its gate open the logits move; there is no way back then."""
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    assert "Not verified" in capsys.readouterr().out
    assert json.loads((tmp_path / "ham/conversion.json").read_text())["verification"] is None
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    tokens = torch.randint(4096, (1, 40))
    before = model(input_ids=tokens).logits
    for layer in model.model.layers:
        layer.mixer.rnn_gate_proj.bias.data.fill_(0.0)
    assert (model(input_ids=tokens).logits - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "opened")
    (tmp_path / "opened/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "opened", tmp_path / "back", "--back") == 2
    assert "rnn_gate_proj.bias is above" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_training_finds_the_rnn_once_its_gate_is_opened(source, convert, tmp_path):
    """Opening the gate, as the README advises, costs next to nothing; then it has a gradient and the RNN learns."""
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham").train()
    model.config.target_kv_usage = 0.25
    tokens = torch.randint(64, (4, 48), generator=torch.Generator().manual_seed(0))
    gates = [layer.mixer.rnn_gate_proj for layer in model.model.layers]
    losses, gradients = [], []
    for bias in (-20.0, -4.0):
        for gate in gates:
            gate.bias.data.fill_(bias)
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        gradients.append(torch.autograd.grad(losses[-1], gates[0].weight)[0].norm())
    assert (losses[1] - losses[0]).abs() < 0.01 * losses[0]
    assert gradients[0] < 1e-6 * gradients[1]

    thresholds = [x for name, x in model.named_parameters() if name.endswith(".threshold")]
    others = [x for name, x in model.named_parameters() if not name.endswith(".threshold")]
    groups = [{"params": others, "lr": 1e-3}, {"params": thresholds, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    moved = {name: (x.detach() - before[name]).abs().max().item() for name, x in model.named_parameters()}
    assert loss < losses[1] - 1
    assert all(moved[name] > 0.1 for name in moved if name.endswith(".threshold"))
    of_the_rnn = [x for name, x in moved.items() if name.endswith(("rnn_gate_proj.weight", "A_log", "b_proj.weight"))]
    assert len(of_the_rnn) == 6
    # Thirty steps of 1e-3 at most.
    assert min(of_the_rnn) > 5e-3


def test_comes_back_after_training_has_set_its_fields(source, convert, tensors_of, tmp_path, capsys):
    """As `Trainer` does: no cache, the tokenizer's special tokens; and saved anew in other shards."""
    folder = source(SOURCES["llama"])
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    model.config.use_cache, model.config.pad_token_id, model.config.eos_token_id = False, 3, [0, 2]
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    assert convert(tmp_path / "tuned", tmp_path / "back", "--back") == 2
    assert "copy that file from the folder that it was loaded from" in capsys.readouterr().err
    (tmp_path / "tuned/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "tuned", tmp_path / "back", "--back") == 0
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert {name for name in before | after if not torch.equal(before[name], after[name])} == {
        "model.layers.0.mlp.up_proj.weight"
    }


# What the configurations of released models say, in the form of their day.
RELEASED = {
    "Llama 2 7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "vocab_size": 32000,
    },
    "Llama 3.2 1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009],
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "Qwen2.5 7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
    },
}


@pytest.mark.parametrize(("name", "billions"), [("Llama 2 7B", 6.74), ("Llama 3.2 1B", 1.24), ("Qwen2.5 7B", 7.62)])
def test_shapes_of_released_models(name, billions, module):
    """Every tensor of both sides has its rule, without any weight; the source has as many as its name says."""
    source = AutoConfig.for_model(**RELEASED[name])
    config = module.ham_config(source)
    ham, back = module.to_ham(source, config), module.from_ham(source, config)
    shapes = shapes_of(transformers_model, source)
    assert {rule.name for rule in ham} == shapes_of(HAMForCausalLM, config).keys()
    assert {rule.name for rule in back} == shapes.keys()
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("options", "window", "sinks"),
    [([], 64, 4), (["--window", "0", "--sinks=0"], 0, 0), (["--window=9"], 9, 4)],
    ids=str,
)
def test_holds_recent_and_first_tokens(options, window, sinks, source, convert, tmp_path):
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify", *options) == 0
    config = AutoConfig.from_pretrained(tmp_path / "ham")
    assert (config.attention_window, config.attention_sinks) == (window, sinks)
    assert config.router == "l2"


def test_routes_as_it_is_asked_to(source, convert, tmp_path, capsys):
    folder = source(SOURCES["llama"])
    assert convert(folder, tmp_path / "ham", "--no-verify", "--router", "random") == 0
    assert AutoConfig.from_pretrained(tmp_path / "ham").router == "random"
    with pytest.raises(SystemExit):
        convert(folder, tmp_path / "other", "--router", "learned")
    assert "invalid choice: 'learned'" in capsys.readouterr().err


def test_a_layer_that_slides_keeps_its_window_and_nothing_else(source, convert, tmp_path):
    assert convert(source(SOURCES["qwen2, sliding in one layer"]), tmp_path / "ham", "--no-verify") == 0
    config = AutoConfig.from_pretrained(tmp_path / "ham")
    assert (config.attention_window, config.attention_sinks) == ([64, 9], [4, 0])
