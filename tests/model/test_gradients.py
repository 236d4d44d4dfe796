# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Every gradient of a whole layer is what finite differences measure in float64, while what is kept stays the same."""

import pytest
import torch

from ham_hf import HAMModel
from ham_hf.configuration_ham import ROUTERS

LENGTH = 37  # two chunks of the delta rule, the second one odd
# Relative, but for what float64 rounds. Measured: 2.6e-7, where a cosine bends next to a short prediction.
STEP, TOLERANCE = 1e-5, 1e-6
# Every router in plain rows; padded and packed ones where the score has a gradient that runs through the RNN.
CASES = [(router, "plain") for router in ROUTERS] + [("learned_error", "padded"), ("learned_error", "packed")]


def random_model(tiny_config, **overrides):
    """A model in float64 with random weights everywhere, also where a fresh model has ones and zeros."""
    settings = {"initializer_range": 0.25, "rms_norm_eps": 1e-2, "attention_bias": True, "hidden_size": 24}
    model = HAMModel(tiny_config(**(settings | overrides))).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("router.down_proj.weight"):
                parameter.normal_(std=0.5)
            elif "error_weight" in name:
                parameter.copy_(2 + torch.rand_like(parameter))
            elif name.endswith("bias") and "dt_bias" not in name:
                parameter.normal_(std=0.5)
    return model


def layouts(kind):
    """Arguments of a call whose rows are plain, padded on both sides, or packed."""
    if kind == "padded":
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[0, :5], mask[1, 30:] = 0, 0
        return {"attention_mask": mask}
    if kind == "packed":
        return {"position_ids": torch.cat([torch.arange(n) for n in (11, 1, 25)]).expand(2, -1)}
    return {}


def thresholds_amid_scores(model, **arguments):
    """`[1, 1, heads]`, each in the widest gap of the middle half of its head's scores."""
    scores = model(**arguments, output_routing_scores=True).routing_scores[0].detach().flatten(0, 1).sort(0).values
    quarter = len(scores) // 4
    gaps = scores.diff(dim=0)[quarter:-quarter]
    at = gaps.argmax(0, keepdim=True) + quarter
    # A position lies where it lies, whatever the weights.
    assert model.config.router == "recency" or (gaps.amax(0) > 1e-3).all(), "a score lies too close to the threshold"
    return ((scores.gather(0, at) + scores.gather(0, at + 1)) / 2)[None]


@pytest.mark.parametrize(("router", "rows"), CASES)
def test_gradients_are_those_of_finite_differences(router, rows, tiny_config):
    model = random_model(tiny_config, router=router, num_hidden_layers=1, threshold=0.5)
    arguments = {"inputs_embeds": torch.randn(2, LENGTH, 24, dtype=torch.float64), "use_cache": False} | layouts(rows)
    real = arguments.get("attention_mask", torch.ones(2, LENGTH)).bool()
    arguments["threshold"] = thresholds_amid_scores(model, **arguments)
    weights = torch.randn(2, LENGTH, 24, dtype=torch.float64) * real[..., None]

    def loss():
        return (model(**arguments).last_hidden_state * weights).sum() / LENGTH

    arguments["inputs_embeds"].requires_grad_()
    loss().backward()
    tensors = dict(model.named_parameters()) | {"input": arguments["inputs_embeds"]}
    unused = {name for name, x in tensors.items() if x.grad is None}
    assert unused == {"embed_tokens.weight", *(n for n in tensors if n.endswith("mixer.threshold"))}
    for name, tensor in tensors.items():
        if name in unused:
            continue
        direction = torch.nn.functional.normalize(torch.randn_like(tensor).flatten(), dim=0).view_as(tensor)
        with torch.no_grad():
            values = []
            for step in (STEP, -2 * STEP):
                tensor += step * direction
                values.append(loss())
            tensor += STEP * direction
        measured = (values[0] - values[1]) / (2 * STEP)
        claimed = (tensor.grad * direction).sum()
        assert measured.abs() > 1e-5, f"{name}: a gradient that is next to zero proves nothing"
        assert (claimed - measured).abs() <= TOLERANCE * max(measured.abs(), 1e-3), (
            f"{name}: {claimed} is not {measured}"
        )
