# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds PagedStore to a plain list, over random sequences of what a cache asks of it."""

import copy
import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ham_hf.paged_store_ham import MIN_SLAB_PAGES, PAGE_SIZE, SLAB_GROWTH, PagedStore
from tests.cache.caches import as_tokens


class StoreMachine(RuleBasedStateMachine):
    """PagedStore against one Python list of `(key, score, position)` per stream."""

    @initialize(streams=st.integers(1, 4))
    def start(self, streams):
        self.store = PagedStore(streams, 3, 2, torch.float32, torch.device("cpu"))
        self.model = [[] for _ in range(streams)]
        self.names = itertools.count(1)
        self.position = itertools.count()
        self.marked = None

    def fresh(self, counts, scores):
        """New tokens with keys that never repeat, as KeptTokens and as rows of the model."""
        rows = [
            (stream, (next(self.names), scores[i % len(scores)], next(self.position)))
            for stream, count in enumerate(counts)
            for i in range(count)
        ]
        return as_tokens(rows), rows

    def append(self, counts, scores):
        tokens, rows = self.fresh(counts, scores)
        self.store.append(tokens)
        for stream, row in rows:
            self.model[stream].append(row)

    SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=1, max_size=5)

    @rule(data=st.data(), scores=SCORES)
    def append_ragged(self, data, scores):
        self.append([data.draw(st.sampled_from([0, 1, 5, 15, 16, 17, 40, 130])) for _ in self.model], scores)

    @rule(data=st.data(), scores=SCORES, steps=st.integers(1, 20))
    def decode(self, data, scores, steps):
        for _ in range(steps):
            self.append([data.draw(st.integers(0, 1)) for _ in self.model], scores)

    @rule()
    def mark(self):
        self.marked = self.store.mark(), copy.deepcopy(self.model)

    @precondition(lambda self: self.marked is not None)
    @rule()
    def rollback(self):
        mark, self.model = self.marked
        self.store.rollback(mark)
        self.marked = None

    @rule(data=st.data(), scores=SCORES)
    def replace_lowest(self, data, scores):
        self.marked = None
        tokens, rows = self.fresh([data.draw(st.integers(0, 1)) for _ in self.model], scores)
        self.store.replace_lowest(tokens)
        for stream, row in rows:
            held = self.model[stream]
            lowest = min(held, key=lambda x: (x[1], x[2]), default=None)
            if lowest is not None and row[1] >= lowest[1]:
                held.remove(lowest)
                held.append(row)

    @rule(data=st.data())
    def select_streams(self, data):
        self.marked = None
        source = data.draw(st.lists(st.integers(0, len(self.model) - 1), min_size=1, max_size=5))
        tokens, streams = self.store.tokens(), self.store.tokens().streams
        index = torch.cat([(streams == s).nonzero()[:, 0] for s in source])
        counts = torch.tensor([len(self.model[s]) for s in source])
        renumbered = torch.arange(len(source)).repeat_interleave(counts)
        self.store = self.store.rebuilt(tokens.select(index, renumbered), len(source))
        self.model = [list(self.model[s]) for s in source]

    @rule(limit=st.sampled_from([0.25, 0.5]))
    def prune(self, limit):
        self.marked = None
        tokens = self.store.tokens()
        self.store = self.store.rebuilt(tokens.select(tokens.scores >= limit))
        self.model = [[row for row in held if row[1] >= limit] for held in self.model]

    @invariant()
    def holds_the_same(self):
        if not hasattr(self, "store"):
            return
        rows = [(stream, row) for stream, held in enumerate(self.model) for row in held]
        expected, found = as_tokens(rows), self.store.tokens()
        for name in ("keys", "values", "scores", "positions", "streams"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)
        assert self.store.counts.tolist() == [len(held) for held in self.model]

    @invariant()
    def wastes_little(self):
        if not hasattr(self, "store"):
            return
        used = sum(self.store.used)
        unused = sum(len(slab["owner"]) for slab in self.store.slabs) - used
        assert used == sum(len(held) // PAGE_SIZE for held in self.model)
        assert 0 <= unused <= max(MIN_SLAB_PAGES, int(used * SLAB_GROWTH))


StoreMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=15, deadline=None)
TestStore = StoreMachine.TestCase
