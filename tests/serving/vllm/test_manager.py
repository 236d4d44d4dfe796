# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The manager of blocks, in random programs against vLLM's own pool, without an engine."""

import itertools
from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool

from ham_hf.paged_store_ham import PAGE_SIZE
from ham_hf.serving.vllm.layout import BLOCK_PAGES
from ham_hf.serving.vllm.manager import Expectation, HAMManager, HAMSpec, Report

BLOCKS = 120


def make(hybrid, full, state_blocks=2, blocks=BLOCKS):
    spec = HAMSpec(
        shapes=((256,),),
        dtypes=(torch.int8,),
        block_size=PAGE_SIZE,
        hybrid_streams=hybrid,
        full_streams=full,
        state_blocks=state_blocks,
    )
    pool = BlockPool(blocks, enable_caching=False, hash_block_size=PAGE_SIZE)
    manager = HAMManager(
        kv_cache_spec=spec, block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=PAGE_SIZE
    )
    return manager, pool


def needed(manager, name, tokens, admission=False):
    return manager.get_num_blocks_to_allocate(name, tokens, [], 0, 0, tokens, apply_admission_cap=admission)


class Worker:
    """What a worker does: it takes pages when a stream needs one, and knows blocks only by the changes it is told."""

    def __init__(self, manager):
        self.manager, self.tables, self.counts, self.tokens = manager, {}, {}, {}

    def run(self, changes, new, kept, budget):
        """`new` tokens of a request, of which stream `n` keeps `kept[n]`; returns the report."""
        spec, key = self.manager.kv_cache_spec, changes.epoch
        self.tables[changes.slot] = self.tables.get(changes.slot, [])[: changes.start] + changes.blocks
        counts = self.counts.setdefault(key, [0] * (spec.hybrid_streams + spec.full_streams))
        limits = [budget or 10**9] * spec.hybrid_streams + [10**9] * spec.full_streams
        counts = self.counts[key] = [min(c + k, limit) for c, k, limit in zip(counts, kept, limits, strict=True)]
        self.tokens[key] = self.tokens.get(key, 0) + new
        pages = sum(-(-c // PAGE_SIZE) for c in counts)
        blocks = self.tables[changes.slot]
        assert pages <= (len(blocks) - spec.state_blocks) * BLOCK_PAGES, "the manager reserved too little"
        life = self.manager._by_epoch.get(changes.epoch)
        if life is not None:
            # What the request uses is its own, in the same order, whatever went back meanwhile.
            used = spec.blocks(pages)
            assert [block.block_id for block in life.blocks][:used] == blocks[:used]
        closed = sum(c % PAGE_SIZE == 0 and c < limit for c, limit in zip(counts, limits, strict=True))
        return Report(self.tokens[key], pages, closed, sum(counts))


class Programs(RuleBasedStateMachine):
    """Requests come, run in steps whose reports arrive late, are preempted, start again, end, and go on."""

    @initialize(hybrid=st.sampled_from([0, 1, 16, 48]), full=st.sampled_from([0, 3, 16]))
    def start(self, hybrid, full):
        assume(hybrid + full)
        self.manager, self.pool = make(hybrid, full)
        self.worker = Worker(self.manager)
        self.names = (f"request {n}" for n in itertools.count())
        self.seen, self.budgets = {}, {}  # of the requests that are known to the scheduler
        self.steps, self.reports = deque(), deque()
        self.most = 0

    @precondition(lambda self: len(self.seen) < 3)
    @rule(budget=st.none() | st.integers(1, 40), usage=st.floats(0, 1))
    def new_request(self, budget, usage):
        name = next(self.names)
        self.seen[name], self.budgets[name] = 0, budget
        self.manager.expect(name, Expectation(usage, budget))

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), new=st.sampled_from([1, 1, 2, 15, 16, 17, 40]))
    def schedule(self, data, new):
        name = data.draw(st.sampled_from(sorted(self.seen)))
        blocks = needed(self.manager, name, self.seen[name] + new)
        if blocks > self.pool.get_num_free_blocks():
            return
        before = self.pool.get_num_free_blocks()
        assert self.manager.allocate_new_blocks(name, self.seen[name] + new, self.seen[name] + new) == []
        assert before - self.pool.get_num_free_blocks() == blocks
        self.seen[name] += new
        self.steps.append((self.manager.changes_of(name), new, self.budgets[name]))

    @precondition(lambda self: self.steps)
    @rule(share=st.sampled_from([0.0, 0.3, 1.0, 1.0]), random=st.randoms(use_true_random=False))
    def run(self, share, random):
        changes, new, budget = self.steps.popleft()
        spec = self.manager.kv_cache_spec
        kept = [sum(random.random() < share for _ in range(new)) for _ in range(spec.hybrid_streams)]
        report = self.worker.run(changes, new, kept + [new] * spec.full_streams, budget)
        self.reports.append((changes.epoch, report))

    @precondition(lambda self: self.reports)
    @rule()
    def deliver(self):
        self.manager.report(*self.reports.popleft())

    @precondition(lambda self: any(self.seen.values()))
    @rule(data=st.data())
    def end_as_a_conversation(self, data):
        name = data.draw(st.sampled_from(sorted(name for name, seen in self.seen.items() if seen)))
        self.manager.keep(name, str(self.budgets[name]), [7] * self.seen[name])
        self.manager.free(name)
        self.manager.forget(name)
        del self.seen[name]

    @precondition(lambda self: len(self.seen) < 3 and len(self.manager.conversations))
    @rule(budget=st.none() | st.integers(1, 40), new=st.sampled_from([1, 17]))
    def go_on(self, budget, new):
        name = next(self.names)
        budget = self.budgets[list(self.budgets)[-1]] if budget is None else budget
        self.manager.expect(name, Expectation(1.0, budget))
        found = self.manager.find(name, str(budget), [7] * 500)
        if not found:
            self.manager.forget(name)
            return
        self.seen[name], self.budgets[name] = 0, budget
        free = self.pool.get_num_free_blocks()
        kept = sum(len(life.blocks) for life in self.manager._by_epoch.values())
        blocks = self.manager.get_num_blocks_to_allocate(name, found + new, [], found, 0, found + new)
        freed = kept - sum(len(life.blocks) for life in self.manager._by_epoch.values())
        assert self.pool.get_num_free_blocks() == free + freed
        if blocks > self.pool.get_num_free_blocks():
            assert len(self.manager.conversations) == 1, "all others gave way"
            return
        self.manager.add_local_computed_blocks(name, [], 0, found)
        self.manager.allocate_external_computed_blocks(name, 0, found)
        self.manager.allocate_new_blocks(name, found + new, found + new)
        assert self.pool.get_num_free_blocks() == free + freed - blocks
        self.seen[name] = found + new
        self.steps.append((self.manager.changes_of(name), new, budget))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def preempt(self, data):
        name = data.draw(st.sampled_from(sorted(self.seen)))
        self.manager.free(name)
        self.seen[name] = 0

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def end(self, data):
        name = data.draw(st.sampled_from(sorted(self.seen)))
        self.manager.free(name)
        self.manager.forget(name)
        del self.seen[name]

    @invariant()
    def each_block_has_one_owner(self):
        if not hasattr(self, "manager"):
            return
        owned = [block.block_id for life in self.manager._by_epoch.values() for block in life.blocks]
        running = [block.block_id for blocks in self.manager.req_to_blocks.values() for block in blocks]
        assert set(running) <= set(owned)
        assert len(set(owned)) == len(owned)
        assert 0 not in owned
        assert len(owned) + self.pool.get_num_free_blocks() == BLOCKS - 1
        slots = [life.slot for life in self.manager.lives.values()]
        assert len(set(slots)) == len(slots)
        self.most = max(self.most, len(slots))
        assert all(slot < self.most for slot in slots), "the worker has a row for each running request"

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        for name in list(self.seen):
            self.manager.free(name)
            self.manager.forget(name)
        for late in self.reports:
            self.manager.report(*late)
        self.manager.drop_conversations()
        assert self.pool.get_num_free_blocks() == BLOCKS - 1
        assert not self.manager._by_epoch
        assert not self.manager.lives
        assert not self.manager.req_to_blocks
        assert not self.manager.expectations


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_chunk_reserves_its_worst_case_and_gives_back_what_it_did_not_keep():
    manager, pool = make(hybrid=8, full=0)
    manager.expect("a", Expectation(0.25))
    manager.allocate_new_blocks("a", 160, 160)
    # 10 pages for each of 8 streams, 16 pages a block, and 2 blocks for the state.
    assert BLOCKS - 1 - pool.get_num_free_blocks() == 2 + 5
    first = manager.changes_of("a")
    manager.report(first.epoch, Report(160, 16, 0, 200))
    assert BLOCKS - 1 - pool.get_num_free_blocks() == 2 + 1
    # 16 pages are full, and each of the 8 streams has room for one token more.
    assert needed(manager, "a", 161) == 0
    assert needed(manager, "a", 162) == 1
    manager.allocate_new_blocks("a", 162, 162)
    later = manager.changes_of("a")
    assert (later.start, len(later.blocks), later.shrunk) == (3, 1, True)


def test_a_late_report_of_an_earlier_life_changes_nothing():
    manager, pool = make(hybrid=8, full=0)
    manager.allocate_new_blocks("a", 160, 160)
    old = manager.changes_of("a").epoch
    manager.free("a")
    manager.allocate_new_blocks("a", 160, 160)
    free = pool.get_num_free_blocks()
    manager.report(old, Report(160, 8, 8, 128))
    assert pool.get_num_free_blocks() == free
    manager.report(manager.changes_of("a").epoch, Report(160, 8, 8, 128))
    assert pool.get_num_free_blocks() > free


def test_a_report_leaves_what_a_scheduled_step_may_need():
    manager, _ = make(hybrid=16, full=0)
    manager.allocate_new_blocks("a", 16, 16)
    manager.allocate_new_blocks("a", 32, 32)
    assert len(manager.req_to_blocks["a"]) == 2 + 2
    manager.report(1, Report(16, 0, 16, 0))
    assert len(manager.req_to_blocks["a"]) == 2 + 1, "the second 16 tokens may all be kept"


@pytest.mark.parametrize(
    ("expectation", "pages"),
    [
        (Expectation(1.0), 80),
        (Expectation(0.25), 8 * 3),
        (Expectation(0.0), 0),
        (Expectation(1.0, budget=20), 8 * 2),
    ],
)
def test_a_prompt_is_admitted_by_what_it_is_expected_to_keep(expectation, pages):
    manager, _ = make(hybrid=8, full=0)
    manager.expect("a", expectation)
    assert needed(manager, "a", 160, admission=True) == 2 + -(-pages // BLOCK_PAGES)


def test_prompts_that_are_still_read_count_in_admission():
    manager, _ = make(hybrid=8, full=0)
    manager.expect("a", Expectation(0.5, prompt=640))
    manager.expect("b", Expectation(0.5, prompt=640))
    alone = needed(manager, "b", 640, admission=True)
    assert alone == 2 + 8 * 20 // BLOCK_PAGES
    manager.allocate_new_blocks("a", 64, 64)
    # The first chunk of the other has the worst case of 64 tokens.
    held = 2 + 8 * 4 // BLOCK_PAGES
    assert needed(manager, "b", 640, admission=True) == alone + alone - held
    manager.allocate_new_blocks("a", 640, 640)
    manager.report(1, Report(640, 10, 0, 100))
    assert needed(manager, "b", 640, admission=True) == alone, "it has read its prompt, and kept less than expected"


def test_layers_that_keep_everything_are_admitted_whole():
    manager, _ = make(hybrid=8, full=16)
    manager.expect("a", Expectation(0.0))
    assert needed(manager, "a", 160, admission=True) == 2 + 10


def test_a_budget_bounds_what_is_reserved():
    manager, pool = make(hybrid=16, full=0)
    manager.expect("a", Expectation(1.0, budget=32))
    manager.allocate_new_blocks("a", 400, 400)
    assert BLOCKS - 1 - pool.get_num_free_blocks() == 2 + 2
    manager.report(1, Report(400, 32, 0, 512))
    assert needed(manager, "a", 401) == 0
    assert needed(manager, "a", 800) == 0
