# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Random models, rows of tokens, thresholds, and ways to cut the rows into calls."""

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, assume, event, settings
from hypothesis import strategies as st

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.configuration_ham import ROUTERS
from tests.model.exactness.wide_models import WIDE, make_model

# Reproducible: the same examples on every machine, none remembered.
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
MARGIN = (
    5e-5  # what rounding may do to a score or a logit; a score this close to its threshold may fall on either side
)


def exact(scores):
    """Scores that no rounding touches: those of tokens of which nothing was predicted."""
    return (scores == 0.5) | (scores == 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@dataclass
class Case:
    """A model, rows of tokens of different lengths, and how they are thresholded."""

    model: HAMForCausalLM
    rows: list[torch.Tensor]
    thresholds: torch.Tensor  # [hybrid layers, rows, heads]
    argument: object  # the same as given to the model

    def _repr_pretty_(self, printer, cycle):
        """The text that Hypothesis prints of a failing example."""
        lengths = [len(x) for x in self.rows]
        printer.text(f"Case({lengths=}, threshold={self.argument}, config={self.model.config.to_diff_dict()})")

    @property
    def hybrid(self):
        return [i for i, kind in enumerate(self.model.config.layer_types) if kind == "hybrid"]

    @property
    def keeping(self):
        return [i for i, kind in enumerate(self.model.config.layer_types) if kind != "linear_attention"]

    def window(self, layer):
        return self.model.config.window_of(layer)

    def alone(self, row, **arguments):
        """The row in one unpadded call, which every other way must agree with; unsure decisions end the example."""
        limit = self.thresholds[:, row : row + 1]
        argument = {"threshold": limit} if self.argument is not None else {}
        output = self.model(self.rows[row][None], output_routing_scores=True, **argument, **arguments)
        if self.model.config.router not in POSITION_ROUTERS:
            for scores, tau in zip(output.routing_scores or (), limit, strict=True):
                assume(not (((scores - tau).abs() < MARGIN) & ~exact(scores)).any())
        return output


MIXES = [
    ["hybrid"],
    ["hybrid", "hybrid"],
    ["linear_attention", "hybrid"],
    ["full_attention", "hybrid"],
    ["hybrid", "linear_attention", "hybrid"],
    ["hybrid", "hybrid", "full_attention"],
    ["full_attention", "linear_attention"],
]
# Parts of layers that other families have; heads of linear layers must fit those of no other layer.
BORROWED = {
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "shapes": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "linear_output_gate": "silu",
    },
    "eigenvalues": {"allow_neg_eigval": True},
    "gates": {"output_gate": "sigmoid", "output_norm_eps": 5e-2},
    "norms": {"qk_norm": "projection", "zero_centered_norms": True, "attention_post_norm": True},
}
# Drawn from lists rather than ranges: Hypothesis would try the ends of a range, one token, most of the time.
LENGTHS = [1, 2, 3, 5, 8, 13, 17, 21, 30]
# Routers whose scores are computed from positions alone, without rounding: equal however a row is cut into calls.
POSITION_ROUTERS = ("random", "recency")
THRESHOLD_FORMS = ("number", "list", "rows", "everything", "learned")


def in_form(form, model, limits):
    """A threshold in this form, as the model is given it, and the limits `[layers, rows, heads]` that it means."""
    shape = limits.shape
    argument = {
        "number": lambda: float(limits.mean()) if limits.numel() else 0.5,
        "list": lambda: limits.mean((1, 2)).tolist(),
        "rows": lambda: limits.mean((0, 2)),
        "everything": lambda: limits,
        "learned": lambda: None,  # with the router "recency": everything is kept
    }[form]()
    if form == "number":
        limits = torch.full(shape, argument)
    elif form == "list":
        limits = torch.tensor(argument)[:, None, None].expand(shape)
    elif form == "rows":
        limits = argument[None, :, None].expand(shape)
    elif form == "learned" and model.config.router == "recency":
        limits = torch.zeros(shape)
    elif form == "learned":
        limits = limits[:, :1].expand(shape)
        hybrid = (layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid")
        for mixer, limit in zip(hybrid, limits, strict=True):
            mixer.threshold.data.copy_(limit[0])
    return argument, limits


@st.composite
def cases(draw, min_rows=1, max_rows=3, forms=THRESHOLD_FORMS):
    layers = draw(st.sampled_from(MIXES))
    kv_heads, groups = draw(st.sampled_from([(2, 2), (1, 1), (2, 1), (1, 3)]))
    switches = ("attention_conv", "qk_norm", "kv_output_norm", "output_gate")
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "value_head_dim": draw(st.sampled_from([8, 5])),
        "layer_types": layers,
        "router": draw(st.sampled_from(ROUTERS)),
        "conv_kernel_size": draw(st.sampled_from([4, 1, 2])),
        "rope_parameters": draw(st.sampled_from([{"rope_type": "default", "rope_theta": 100.0}, None])),
        "pad_token_id": 0,
        "attention_window": draw(st.sampled_from([0, 0, 1, 5, 64, 200, [8] * len(layers)])),
        "attention_sinks": draw(st.sampled_from([0, 0, 4])),
        **dict.fromkeys(draw(st.lists(st.sampled_from(switches), max_size=2)), False),
        **WIDE,
    }
    for part in draw(st.lists(st.sampled_from(sorted(BORROWED)), max_size=2)):
        settings |= BORROWED[part]
    config = HAMConfig(**settings)
    model = make_model(config, seed=draw(st.integers(0, 1000)))
    seed = draw(st.integers(0, 1000))
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=min_rows, max_size=max_rows))
    lengths[0] += draw(st.sampled_from([0, 0, 66]))  # 66: beyond one chunk of the RNN
    rows = [torch.randint(1, 97, (n,), generator=generator(seed + i)) for i, n in enumerate(lengths)]

    # Thresholds at a quantile of the scores, with some that keep everything or nothing.
    shape = (config.num_hybrid_layers, len(rows), kv_heads)
    quantile, spread = draw(st.floats(0.1, 0.9)), draw(st.sampled_from([0.0, 0.3]))
    with torch.no_grad():
        scores = model(
            torch.cat(rows)[None], threshold=0.5, output_routing_scores=True, use_cache=False
        ).routing_scores
    limits = torch.zeros(shape)
    for n, x in enumerate(scores or ()):
        level = (quantile + spread * (torch.rand(shape[1:], generator=generator(seed)) - 0.5)).clamp(0, 1)
        limits[n] = torch.quantile(x.flatten(), level.flatten()).view(shape[1:]) + 1e-4 * (config.router != "recency")
    extreme = draw(st.sampled_from([None, None, None, -1.0, 0.0, 0.5, 1.5]))
    if extreme is not None:
        limits[:, 0] = extreme
    form = draw(st.sampled_from(forms)) if config.num_hybrid_layers else "number"
    argument, limits = in_form(form, model, limits)
    event(f"{form} {config.router}")
    return Case(model, rows, limits, argument)


@dataclass
class Call:
    """One forward: which columns hold a real token, `[B, T]`."""

    real: torch.Tensor


@st.composite
def calls(draw, lengths):
    """Cuts rows of the given lengths into calls: whole, chunks, single steps or turns, each with its own padding."""
    style = draw(st.sampled_from(["whole", "steps", "chunks", "turns", "prompt and steps"]))
    longest = max(lengths)
    if style == "whole":
        counts = [lengths]
    elif style == "steps":
        counts = [[int(t < n) for n in lengths] for t in range(longest)]
    elif style == "prompt and steps":
        prompt = draw(st.integers(1, longest))
        counts = [[min(n, prompt) for n in lengths]]
        counts += [[int(t < n) for n in lengths] for t in range(prompt, longest)]
    else:
        # Chunks cut all rows at the same token; in turns every row says as much as it likes, or nothing.
        pieces = draw(st.integers(2, 4))
        cuts = [sorted(draw(st.lists(st.integers(0, n), min_size=pieces, max_size=pieces))) for n in lengths]
        if style == "chunks":
            cuts = [[min(cut, n) for cut in cuts[0]] for n in lengths]
        edges = [[0, *cut, n] for cut, n in zip(cuts, lengths, strict=True)]
        counts = [[row[i + 1] - row[i] for row in edges] for i in range(pieces + 1)]
    counts = [x for x in counts if max(x)]
    placement = draw(st.sampled_from(["left", "right", "anywhere"]))
    extra = draw(st.integers(0, 2)) if style != "steps" else 0
    result = []
    for i, numbers in enumerate(counts):
        width = max(numbers) + (extra if i == 0 else 0)
        real = torch.zeros(len(lengths), width, dtype=torch.bool)
        for row, n in enumerate(numbers):
            columns = (
                torch.randperm(width, generator=generator(draw(st.integers(0, 99))))
                if placement == "anywhere"
                else None
            )
            if placement == "left":
                real[row, width - n :] = True
            elif placement == "right":
                real[row, :n] = True
            else:
                real[row, columns[:n]] = True
        result.append(Call(real))
    return result


def contiguous(masks):
    """True if each row's real tokens are neighbours: padding then only shifts positions, which RoPE does not see."""
    return all(bool((row.nonzero()[:, 0].diff() == 1).all()) for row in masks)
