# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The memories of requests in an arena against a HAMCache for each, step by step, in blocks that hold NaN before."""

import random
from types import SimpleNamespace

import pytest
import torch

from ham_hf import HAMCache
from ham_hf.inputs_ham import TokenLayout
from ham_hf.serving.vllm import register
from ham_hf.serving.vllm.arena import Arena
from ham_hf.serving.vllm.manager import Changes, Row
from ham_hf.serving.vllm.memory import GroupMemory
from tests.serving.vllm.engine import prompt, small_model

BLOCKS, LONGEST = 120, 160


class Server:
    """Runs the layers of a model over an arena, and over a HAMCache for each request."""

    def __init__(self, model, seed=0):
        register()
        self.model, self.random = model, random.Random(seed)
        sizes = SimpleNamespace(dtype=torch.float32, max_model_len=LONGEST)
        self.vllm_config = SimpleNamespace(
            model_config=sizes,
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        self.arena = Arena(model.config, self.vllm_config)
        # Bytes of ones are NaN in every floating-point dtype.
        self.pool = torch.full((BLOCKS, 1, 1, self.arena.layout.block_bytes), -1, dtype=torch.int8)
        self.arena.bind_kv_cache(self.pool)
        self.spec = self.arena.get_kv_cache_spec(self.vllm_config)
        self.free, self.epochs = set(range(1, BLOCKS)), 0
        self.requests = {}

    def start(self, slot, threshold, budget=None):
        """A new request; the one that was at the slot ends, and its blocks are overwritten."""
        for block in self.requests.get(slot, {"blocks": []})["blocks"]:
            self.pool[block] = -1
            self.free.add(block)
        self.epochs += 1
        self.requests[slot] = {
            "epoch": self.epochs, "threshold": threshold, "budget": budget, "blocks": [], "tokens": 0,
            "cache": HAMCache(self.model.config),
        }  # fmt: skip

    def give(self, slot, tokens):
        """Blocks for the worst case, some of which replace others at the end of the request's list."""
        request = self.requests[slot]
        if (report := request.get("report")) is not None:
            kept = self.random.randint(self.spec.blocks(report.pages), len(request["blocks"]))
            for block in request["blocks"][kept:]:
                self.pool[block] = -1
                self.free.add(block)
            del request["blocks"][kept:]
        start = len(request["blocks"])
        needed = self.spec.blocks(self.spec.pages(request["tokens"] + tokens, request["tokens"] + tokens))
        new = self.random.sample(sorted(self.free), needed - start)
        self.free -= set(new)
        request["blocks"] += new
        return Changes(request["epoch"], slot, start, new, True)

    @torch.no_grad()
    def step(self, lengths):
        """Each request at a slot takes in so many tokens; compares what the layers output, and what they hold."""
        rows = {}
        for slot, length in lengths.items():
            changes, request = self.give(slot, length), self.requests[slot]
            rows[slot] = Row(f"at {slot}", changes, request["blocks"][0], request["tokens"] == 0, {})
        self.arena.begin(list(rows.values()))
        groups = {}
        for slot, row in rows.items():
            groups.setdefault((lengths[slot], row.fresh, self.requests[slot]["budget"]), []).append(slot)
        for (length, fresh, budget), slots in groups.items():
            self.compare([rows[slot] for slot in slots], slots, length, fresh, budget)

    def compare(self, rows, slots, length, fresh, budget):
        requests = [self.requests[slot] for slot in slots]
        ids = torch.tensor([prompt(length, 7 * request["epoch"] + request["tokens"]) for request in requests])
        start = torch.tensor([[request["tokens"]] for request in requests])
        positions = start + torch.arange(length)
        memory = GroupMemory(self.arena, rows, fresh, budget)
        thresholds = torch.tensor([request["threshold"] for request in requests])
        decoder = self.model.model
        hidden = decoder.embed_tokens(ids)
        angles = decoder.rotary_emb(hidden, positions)
        for layer, rule in zip(decoder.layers, decoder.retention(len(rows), thresholds, None, budget), strict=True):
            hidden = layer(
                hidden,
                position_embeddings=angles,
                tokens=TokenLayout(positions),
                cache=memory,
                retention=rule,
            )
        memory.save()
        reports = self.arena.take_reports()
        for n, request in enumerate(requests):
            threshold = request["threshold"]
            alone = decoder(ids[n : n + 1], cache=request["cache"], threshold=threshold, kv_budget=budget)
            # Rows of a batch are added up in another order than a row alone; measured: 2e-6.
            torch.testing.assert_close(decoder.norm(hidden[n : n + 1]), alone.last_hidden_state, atol=1e-4, rtol=1e-4)
            request["tokens"] += length
            request["report"] = report = reports[request["epoch"]]
            cache = request["cache"]
            stored = [layer.store.counts for layer in cache.layers if layer.store is not None]
            limits = [
                LONGEST if budget is None or kind == "full_attention" else budget - max(layer.window - 1, 0)
                for kind, layer in zip(self.model.config.layer_types, cache.layers, strict=True)
                if kind != "linear_attention"
            ]
            closed = [((n % 16 == 0) & (n < limit)).sum() for n, limit in zip(stored, limits, strict=True)]
            assert report.closed == sum(closed)
            assert report.tokens == request["tokens"]
            assert report.held == int(cache.held_tokens().sum())
            assert report.pages == sum(int((counts + 15).div(16, rounding_mode="floor").sum()) for counts in stored)


MODELS = {
    "paper": {},
    "window, sinks": {"attention_window": 6, "attention_sinks": 2},
    "every kind": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "hybrid"]},
}


@pytest.mark.parametrize("budget", [None, 21, 32])
@pytest.mark.parametrize("name", MODELS)
def test_a_request_in_the_arena_equals_a_cache_of_its_own(name, budget):
    server = Server(small_model(**MODELS[name]))
    draw = server.random
    for slot in range(4):
        server.start(slot, draw.choice([0.0, 0.42, 0.47, 0.5, 2.0]), draw.choice([None, budget]))
    for _ in range(40):
        lengths = {}
        for slot in draw.sample(range(4), draw.randint(1, 4)):
            length = draw.choice([1, 1, 1, 2, 15, 16, 17, 33])
            if server.requests[slot]["tokens"] + length > LONGEST:
                server.start(slot, draw.choice([0.0, 0.42, 0.5, 2.0]), draw.choice([None, budget]))
            lengths[slot] = length
        server.step(lengths)


def test_pages_without_blocks_are_an_error_and_touch_no_other_request():
    server = Server(small_model())
    server.start(0, 0.0)
    server.start(1, 0.0)
    server.step({0: 40, 1: 40})
    # The request's list has shrunk, and what was behind belongs to the other one now.
    server.give = lambda slot, tokens: Changes(1, 0, 1, [], True)
    server.arena.table[0, 1:4] = torch.tensor(server.requests[1]["blocks"] * 2)[:3]
    before = server.pool[server.requests[1]["blocks"]].clone()
    with pytest.raises(RuntimeError, match="Request at 0 took 16 pages, and has 0 blocks"):
        server.step({0: 16})
    assert server.pool[server.requests[1]["blocks"]].equal(before)
