# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The importance of heads is the slope of an answer's loss, and needles lie where they are said to lie."""

import json

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import importance
from ham_hf.evaluation.importance import Example, head_importance, loss_falls, needle_examples, read_examples
from ham_hf.routing_ham import Retention
from tests.cli.calls import byte_tokenizer

KINDS = ["hybrid", "linear_attention", "full_attention", "hybrid"]
WINDOW, SINKS = 6, 2


@pytest.fixture
def model(tiny_config):
    config = tiny_config(num_hidden_layers=4, layer_types=KINDS, attention_window=WINDOW, attention_sinks=SINKS)
    model = HAMForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # a loss that depends on attention
    return model


def example(length=40, answer=3):
    return Example(torch.randint(1, 97, (length,)), torch.randint(1, 97, (answer,)))


def loss_of_mix(model, x, shares):
    """The answer's loss with shares `[hybrid layers, H]` of the full attention in each query head's output."""
    ids = torch.cat(x)[None]
    handles = []
    for n, layer in enumerate(layer for layer in model.model.layers if layer.mixer.layer_type == "hybrid"):
        outputs, busy = [], []

        def mixed(norm, args, outputs=outputs, busy=busy, n=n):
            if busy:
                return None
            return (outputs[0] + shares[n][:, None] * (args[0] - outputs[0]),)

        def window_only(mixer, args, kwargs, outputs=outputs, busy=busy):
            if not busy:
                busy.append(True)
                hook = mixer.kv_norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
                mixer(*args, **(kwargs | {"retention": Retention(torch.full((1, 1), 2.0))}))
                hook.remove()
                busy.clear()

        handles.append(layer.mixer.register_forward_pre_hook(window_only, with_kwargs=True))
        handles.append(layer.mixer.kv_norm.register_forward_pre_hook(mixed))
    logits = model(ids, threshold=0.0, use_cache=False).logits[0, -len(x.answer) - 1 : -1]
    for handle in handles:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits, x.answer)


def test_it_is_the_slope_of_the_loss_by_each_heads_share(model):
    x, slopes = example(), []
    for mix in importance.MIXES:
        shares = torch.full((2, 4), mix, requires_grad=True)
        slopes += torch.autograd.grad(loss_of_mix(model, x, shares), shares)
    expected = -torch.stack(slopes).mean(0).view(2, 2, 2).sum(2)  # two query heads a key/value head
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(loss_falls(model, x), expected, rtol=1e-4, atol=1e-6)


def test_the_parts_of_all_heads_make_the_fall_of_the_loss(model, monkeypatch):
    for parameter in model.parameters():
        parameter.data.mul_(0.6)  # a loss without the twists of large weights
    x = example()
    nothing, everything = (loss_of_mix(model, x, torch.full((2, 4), mix)) for mix in (0.0, 1.0))
    monkeypatch.setattr(importance, "MIXES", [(n + 0.5) / 20 for n in range(20)])
    assert abs(nothing - everything) > 1e-3
    assert loss_falls(model, x).sum().item() == pytest.approx((nothing - everything).item(), rel=0.01)


def test_examples_are_averaged_and_heads_that_do_harm_count_nothing(model):
    examples = [example(), example(33, 1), example(50, 5)]
    mean = torch.stack([loss_falls(model, x) for x in examples]).mean(0)
    assert (mean < 0).any()
    assert (mean > 0).any()
    assert torch.equal(head_importance(model, examples), mean.clamp(min=0))


def test_what_lies_in_the_window_needs_no_head(model):
    assert head_importance(model, [example(WINDOW + SINKS - 3, 2)]).abs().max() < 1e-6
    assert head_importance(model, [example(WINDOW + SINKS + 8, 2)]).max() > 1e-5


def test_the_model_is_left_as_it_was(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    head_importance(model, [example()])
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_refused_examples(model, tiny_config):
    with pytest.raises(ValueError, match="`examples` must hold at least one"):
        head_importance(model, [])
    for empty in (Example(torch.ones(0).long(), torch.ones(1).long()), Example(torch.ones(1).long(), torch.ones(0))):
        with pytest.raises(ValueError, match="neither of them empty"):
            head_importance(model, [empty])
    with pytest.raises(ValueError, match="no hybrid layer"):
        head_importance(HAMForCausalLM(tiny_config(layer_types=["full_attention"] * 2)), [example()])


class TestNeedles:
    tokenizer = byte_tokenizer()
    filler = tokenizer("The sea was grey, and nobody spoke of it. " * 40)["input_ids"]

    def test_the_number_is_told_once_and_asked_for(self):
        length = 500
        for x in needle_examples(self.tokenizer, self.filler, 20, length, 0):
            assert len(x.prompt) == length
            text, answer = self.tokenizer.decode(x.prompt), self.tokenizer.decode(x.answer)
            assert answer[0] == " "
            assert answer[1:].isdecimal()
            assert len(answer) == 6
            assert text.count(answer) == 1
            back = length - len(self.tokenizer(text[: text.index(answer)])["input_ids"])
            assert 0.2 * length - 1 <= back <= 0.7 * length + 30
            assert text.endswith(" is")
            told = text[: text.index(answer)].rpartition(": ")[2]
            assert text.lower().endswith(told)

    def test_a_seed_decides_all(self):
        def prompts(seed):
            return [x.prompt.tolist() for x in needle_examples(self.tokenizer, self.filler, 3, 400, seed)]

        assert prompts(0) == prompts(0)
        assert prompts(0) != prompts(1)
        assert len({tuple(x) for x in prompts(0)}) == 3

    def test_too_little_room_or_text_is_refused(self):
        with pytest.raises(ValueError, match="`length` must leave room"):
            needle_examples(self.tokenizer, self.filler, 1, 60, 0)
        with pytest.raises(ValueError, match="`filler` must have at least"):
            needle_examples(self.tokenizer, self.filler[:100], 1, 400, 0)


def test_prompts_of_a_file_are_read_as_they_are(tmp_path):
    tokenizer, path = byte_tokenizer(), tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "The sea is", "answer": " grey", "note": 1}) + "\n")
    (x,) = read_examples(path, tokenizer)
    assert tokenizer.decode(x.prompt) == "The sea is"
    assert tokenizer.decode(x.answer) == " grey"
    for wrong in ("{", "3", "[]", '{"prompt": "a"}', '{"prompt": "a", "answer": ""}', '{"prompt": 1, "answer": "b"}'):
        path.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n" + wrong + "\n")
        with pytest.raises(ValueError, match="line 2, must be a JSON object"):
            read_examples(path, tokenizer)
    path.write_text("")
    with pytest.raises(ValueError, match="got no line"):
        read_examples(path, tokenizer)
