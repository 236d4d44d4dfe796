# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""No cut, batch, padding or packing changes a result."""

from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ham_hf import HAMCache
from ham_hf.configuration_ham import LAYER_TYPES, ROUTERS
from ham_hf.reference import naive_surviving_tokens
from tests.model.exactness.calls import assert_as_alone
from tests.model.exactness.cases import BORROWED, MARGIN, POSITION_ROUTERS, PROPERTY, calls, cases, contiguous, exact
from tests.model.exactness.wide_models import WIDE, kept_lists, make_model


def borrowed(config):
    """The parts of `BORROWED` that a configuration has and a layer uses."""
    return {
        part
        for part, settings in BORROWED.items()
        if all(getattr(config, name) == value for name, value in settings.items())
        and (part != "shapes" or "linear_attention" in config.layer_types)
    }


# Fewer than a hundred examples may miss a kind; the slow three hundred have each at least three times.
@pytest.mark.parametrize("examples", [45, pytest.param(300, marks=pytest.mark.slow)])
def test_rows_do_not_depend_on_their_batch_padding_thresholds_or_cuts(examples):
    taken = Counter()

    @settings(PROPERTY, max_examples=examples)
    @given(st.data())
    def check(data):
        case = data.draw(cases())
        plan = data.draw(calls([len(x) for x in case.rows]))
        masks = torch.cat([call.real for call in plan], 1)
        positions = not contiguous(masks) or data.draw(st.booleans())
        cache = assert_as_alone(case, plan, positions)
        taken[case.model.config.router] += 1
        taken.update(set(case.model.config.layer_types))
        taken["step"] += any(call.real.shape[1] == 1 for call in plan[1:])
        taken["step of a padded row"] += any(call.real.shape[1] == 1 and not call.real.all() for call in plan[1:])
        taken["chunk onto a cache"] += any(call.real.shape[1] > 1 for call in plan[1:])
        taken["padding inside"] += not contiguous(masks)
        taken["padding outside"] += contiguous(masks) and not bool(masks.all())
        taken["no padding"] += bool(masks.all())
        taken["no positions"] += not positions
        taken["several rows"] += len(case.rows) > 1
        taken["several chunks"] += max(call.real.shape[1] for call in plan) > 64
        taken[f"{type(case.argument).__name__} threshold"] += 1
        taken.update(borrowed(case.model.config))
        taken[f"window {case.model.config.attention_window}"] += bool(case.hybrid)
        taken[f"sinks {case.model.config.attention_sinks}"] += bool(case.hybrid)
        usage = (cache.kept_tokens() / cache.real_tokens[:, None])[case.hybrid]
        taken["some kept"] += bool(((usage > 0) & (usage < 1)).any())

    check()
    wanted = {*ROUTERS, *LAYER_TYPES, "step", "step of a padded row", "chunk onto a cache", "padding inside"}
    wanted |= {"padding outside", "no padding", "no positions", "several rows", "several chunks"}
    wanted |= {f"window {x}" for x in (0, 1, 5, 64, 200)} | {"sinks 0", "sinks 4"}
    wanted |= {f"{x} threshold" for x in ("float", "list", "Tensor", "NoneType")} | BORROWED.keys()
    assert all(taken[x] >= examples // 100 for x in wanted), taken
    assert taken["some kept"] >= examples // 5, taken


@pytest.mark.parametrize("examples", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_packed_documents_equal_documents_alone(examples):
    taken = Counter()

    @settings(PROPERTY, max_examples=examples)
    @given(st.data())
    @torch.no_grad()
    def check(data):
        case = data.draw(cases(min_rows=2, max_rows=4, forms=("number", "list", "learned")))
        way = data.draw(st.sampled_from(["position_ids", "cu_seq_lens_q", "seq_idx", "padded position_ids"]))
        copies = 1 if way == "cu_seq_lens_q" else data.draw(st.integers(1, 2))
        orders = [list(range(len(case.rows)))[:: 1 if b == 0 else -1] for b in range(copies)]
        ids = torch.stack([torch.cat([case.rows[i] for i in order]) for order in orders])
        lengths = [torch.tensor([len(case.rows[i]) for i in order]) for order in orders]
        positions = torch.stack([torch.cat([torch.arange(n) for n in x.tolist()]) for x in lengths])
        documents = torch.stack([torch.arange(len(x)).repeat_interleave(x) for x in lengths])
        arguments = {"position_ids": positions}
        if way == "cu_seq_lens_q":
            # As Transformers' collator gives them: with position ids.
            arguments["cu_seq_lens_q"] = torch.cat([torch.zeros(1, dtype=torch.long), lengths[0].cumsum(0)])
        elif way == "seq_idx":
            arguments["seq_idx"] = documents
        elif way == "padded position_ids":
            pad = torch.zeros(copies, 3, dtype=torch.long)
            ids = torch.cat([pad, ids, pad], 1)
            arguments = {
                "position_ids": torch.cat([pad, positions, positions[:, -1:] + 1 + torch.arange(3)], 1),
                "attention_mask": torch.cat([pad, torch.ones_like(positions), pad], 1),
            }
        threshold = case.argument
        output = case.model(ids, threshold=threshold, output_routing_scores=True, **arguments)
        assert output.cache is None
        offset = 3 if way == "padded position_ids" else 0
        for b, order in enumerate(orders):
            start = offset
            for row in order:
                expected = case.alone(row)
                part = slice(start, start + len(case.rows[row]))
                scale = max(1, expected.logits.abs().max())
                assert (output.logits[b, part] - expected.logits[0]).abs().max() < MARGIN * scale
                for x, y in zip(output.routing_scores or (), expected.routing_scores or (), strict=True):
                    assert (x[b, part] - y[0]).abs().max() < MARGIN
                start = part.stop
        taken[way] += 1
        taken["hybrid"] += bool(case.hybrid)
        taken["several chunks"] += ids.shape[1] > 64

    check()
    ways = ("position_ids", "cu_seq_lens_q", "seq_idx", "padded position_ids")
    assert all(taken[way] >= examples // 30 for way in ways), taken
    assert taken["hybrid"] >= examples // 12, taken
    assert taken["several chunks"] >= examples // 30, taken


@pytest.mark.parametrize(("examples", "evicting"), [(15, 2), pytest.param(60, 20, marks=pytest.mark.slow)])
def test_a_budget_keeps_the_same_tokens_however_they_arrive(examples, evicting):
    taken = Counter()

    @settings(PROPERTY, max_examples=examples)
    @given(st.data())
    @torch.no_grad()
    def check(data):
        case = data.draw(cases(max_rows=2))
        config = case.model.config
        always = max((config.window_of(layer) for layer in case.hybrid), default=0) + config.attention_sinks
        budget = data.draw(st.integers(1, 8)) + always
        plan = data.draw(calls([len(x) for x in case.rows]))
        masks = torch.cat([call.real for call in plan], 1)
        references = [case.alone(row, kv_budget=budget) for row in range(len(case.rows))]
        for row, reference in enumerate(references):
            for n, layer in enumerate(case.hybrid):
                scores = reference.routing_scores[n][0]
                if (
                    case.model.config.router not in POSITION_ROUTERS
                ):  # near ties may fall either way; exact ones may not
                    gaps = scores.sort(0).values.diff(dim=0)
                    assume(not ((gaps < MARGIN / 10) & ~exact(scores.sort(0).values[1:])).any())
                for (_, head), positions in kept_lists(reference.cache, layer).items():
                    sinks = torch.arange(len(scores)) < config.attention_sinks
                    ranked = scores[:, head].masked_fill(sinks, torch.inf)
                    admitted = ranked >= case.thresholds[n, row, head]
                    held = naive_surviving_tokens(ranked, admitted, budget, case.window(layer))[-1]
                    assert positions == (held & admitted).nonzero()[:, 0].tolist()
                    taken["evicted"] += int(admitted.sum()) > len(positions)
                    taken["evicted beside a window"] += int(admitted.sum()) > len(positions) and case.window(layer) > 1
        cache = assert_as_alone(case, plan, not contiguous(masks) or data.draw(st.booleans()), kv_budget=budget)
        for layer in case.hybrid:
            assert cache.held_tokens()[layer].max() <= budget
        for name, wanted in (("steps", lambda n: n == 1), ("chunks", lambda n: n > 1)):
            taken[name] += bool(case.hybrid) and any(wanted(call.real.shape[1]) for call in plan[1:])
        taken["full attention"] += "full_attention" in case.model.config.layer_types

    check()
    assert taken["evicted"] >= evicting, taken
    assert taken["evicted beside a window"] >= evicting // 20, taken
    assert all(taken[x] >= examples // 30 for x in ("steps", "chunks", "full attention")), taken


@pytest.mark.parametrize("length", [5, 40])
def test_rows_at_different_thresholds_write_what_they_write_alone(length, tiny_config):
    model = make_model(tiny_config(num_hidden_layers=3, layer_types=["hybrid", "linear_attention", "hybrid"], **WIDE))
    ids = torch.randint(1, 97, (4, length))
    thresholds = torch.tensor([-1.0, 0.45, 0.55, 2.0])
    cache = HAMCache(model.config)
    arguments = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, threshold=thresholds, cache=cache, **arguments)
    for row in range(4):
        own = HAMCache(model.config)
        alone = model.generate(ids[row : row + 1], threshold=float(thresholds[row]), cache=own, **arguments)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(own.kept_tokens()[:, 0], cache.kept_tokens()[:, row])
    usage = cache.kv_usage()[[0, 2]].mean((0, 2))
    assert usage[0] == 1
    assert usage[3] == 0
    assert 0 < usage[2] < usage[1] < 1


def test_padding_between_packed_documents_hides_no_border(tiny_config):
    model = make_model(tiny_config(**WIDE))
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 0, 0, 1, 2]])
    ids = torch.randint(1, 97, (1, 8))
    packed = model(ids, attention_mask=mask, position_ids=positions, threshold=0.4, use_cache=False).logits
    alone = model(ids[:, 5:], threshold=0.4, use_cache=False).logits
    assert torch.allclose(packed[:, 5:], alone, atol=1e-5)


def test_padding_moves_no_position_when_none_are_given(tiny_config):
    """A right-padded prompt that goes on through the cache, without `position_ids`."""
    model = make_model(tiny_config(**WIDE))
    ids = torch.randint(1, 97, (1, 14))
    padded = torch.cat([ids[:, :8], torch.zeros(1, 3, dtype=torch.long), ids[:, 8:]], 1)
    mask = (padded != 0).long()
    cache = HAMCache(model.config)
    model(padded[:, :11], attention_mask=mask[:, :11], cache=cache, threshold=0.4)
    later = model(padded[:, 11:], attention_mask=mask, cache=cache, threshold=0.4).logits
    assert torch.allclose(later, model(ids, threshold=0.4, use_cache=False).logits[:, 8:], atol=1e-5)
