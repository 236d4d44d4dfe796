# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMManager, which gives requests blocks in vLLM's scheduler: by what was kept, never by the tokens seen.

How much a step keeps is known only when it has run. So a request holds the pages that the worker has reported, and
the worst case of the tokens not yet reported; when the report comes, the blocks that no page needs go back. The list
of blocks of a request therefore shrinks as well as grows, which vLLM's own table of blocks in the worker cannot: the
connector sends the changes (`changes_of`), and vLLM's table is read for the first block only, which names the request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ...paged_store_ham import PAGE_SIZE
from .layout import BLOCK_PAGES


@dataclass(frozen=True, kw_only=True)
class HAMSpec(MambaSpec):
    """The blocks of a request, as the scheduler counts them; see `MemoryLayout`.

    To vLLM it is the state of a recurrent layer, the one kind of memory that it hands out as raw bytes.
    """

    hybrid_streams: int
    full_streams: int
    state_blocks: int

    def blocks(self, pages: int) -> int:
        """Blocks of a request with this many pages."""
        return self.state_blocks + cdiv(pages, BLOCK_PAGES)

    def pages(self, tokens: int, kept: int) -> int:
        """Most pages of a request that has seen `tokens`, of which hybrid layers keep `kept` a head."""
        return self.full_streams * cdiv(tokens, PAGE_SIZE) + self.hybrid_streams * cdiv(kept, PAGE_SIZE)

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Blocks of a request that keeps each of `max_len` tokens."""
        return self.blocks(self.pages(max_len, max_len))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest request: the pool must hold it whole, so that no request has to fail for memory."""
        return self.page_size_bytes * self.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len)


class Expectation(NamedTuple):
    """What a request is expected to keep.

    Attributes:
        usage: fraction of the tokens that hybrid layers keep, for admission.
        budget: most tokens that their heads may hold, or `None`.
    """

    usage: float = 1.0
    budget: int | None = None

    def kept(self, tokens: int) -> int:
        """Tokens expected to be kept, of `tokens`, in each hybrid head."""
        kept = -int(-self.usage * tokens // 1)
        return kept if self.budget is None else min(kept, self.budget)


class Report(NamedTuple):
    """What the worker says of a request after a step.

    Attributes:
        tokens: tokens seen.
        pages: pages taken.
        closed: streams whose next kept token takes a new page.
        held: tokens held, in pages and windows, over all streams.
    """

    tokens: int
    pages: int
    closed: int
    held: int


class Changes(NamedTuple):
    """What the worker must know of a request to find its memory in a step.

    Attributes:
        epoch: number of this life of the request: a preempted request that starts again has another.
        slot: row of the worker's table of blocks.
        start: entries of that row that still hold.
        blocks: the entries behind them.
        shrunk: true if entries behind `start` have gone.
    """

    epoch: int
    slot: int
    start: int
    blocks: list[int]
    shrunk: bool


class Row(NamedTuple):
    """A request of a step.

    Attributes:
        request_id: its name.
        changes: where its memory is; its first block is `first_block`.
        first_block: the first of its blocks, by which a worker finds it in a batch.
        fresh: true if the step has its first tokens.
        routing: its routing arguments; read in its first step.
    """

    request_id: str
    changes: Changes
    first_block: int
    fresh: bool
    routing: dict[str, Any]


@dataclass
class _Life:
    """A request between its first block and the return of its blocks."""

    epoch: int
    slot: int
    promised: int = 0  # tokens for which steps were given memory
    sent: int = 0  # blocks that the worker knows of, and still holds
    shrunk: bool = False  # whether it knows of others
    report: Report | None = None


class HAMManager(SingleTypeKVCacheManager):
    """Reserves the worst case of a step on top of what was reported, and takes back what the step did not need."""

    kv_cache_spec: HAMSpec

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lives: dict[str, _Life] = {}
        self.expectations: dict[str, Expectation] = {}
        self._epochs = 0
        self._slots: list[int] = []  # free ones; with those in use they are 0 to their number

    def expect(self, request_id: str, expectation: Expectation) -> None:
        """Notes what a request will keep, until `forget`."""
        self.expectations[request_id] = expectation

    def forget(self, request_id: str) -> None:
        """Drops what `expect` noted, when the request has ended."""
        self.expectations.pop(request_id, None)

    def required(self, request_id: str, tokens: int) -> int:
        """Blocks that surely suffice when the request has seen `tokens`."""
        spec, budget = self.kv_cache_spec, self.expectations.get(request_id, Expectation()).budget
        most = spec.pages(tokens, tokens if budget is None else min(tokens, budget))
        life = self.lives.get(request_id)
        if life is None or life.report is None:
            return spec.blocks(most)
        new, closed = max(tokens - life.report.tokens, 0), life.report.closed
        # An open page has room for one token at least, so the others take their first new page one token later.
        opened = spec.hybrid_streams + spec.full_streams - closed
        worst = closed * cdiv(new, PAGE_SIZE) + opened * cdiv(max(new - 1, 0), PAGE_SIZE)
        return spec.blocks(min(life.report.pages + worst, most))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that a step needs; with `apply_admission_cap`, those that a whole prompt is expected to need.

        vLLM asks both before it admits a request. An expectation that was too low costs a preemption.
        """
        if apply_admission_cap:
            kept = self.expectations.get(request_id, Expectation()).kept(num_tokens)
            needed = self.kv_cache_spec.blocks(self.kv_cache_spec.pages(num_tokens, kept))
        else:
            needed = self.required(request_id, num_tokens)
        return max(needed - len(self.req_to_blocks.get(request_id, ())), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Gives a request the blocks for a step after which it has seen `num_tokens`; returns none, see the module."""
        life = self.lives.get(request_id)
        if life is None:
            self._epochs += 1
            slot = self._slots.pop() if self._slots else len(self.lives)
            life = self.lives[request_id] = _Life(self._epochs, slot)
        life.promised = max(life.promised, num_tokens)
        blocks = self.req_to_blocks[request_id]
        blocks.extend(self.block_pool.get_new_blocks(max(self.required(request_id, num_tokens) - len(blocks), 0)))
        return []

    def report(self, request_id: str, epoch: int, report: Report) -> None:
        """Takes a worker's report, and gives back the blocks at the end that no token needs, nor can need.

        A report of an earlier life, or of a request that has ended meanwhile, changes nothing.
        """
        life = self.lives.get(request_id)
        if life is None or life.epoch != epoch:
            return
        life.report = report
        blocks = self.req_to_blocks[request_id]
        # Steps that were scheduled since need their worst case still.
        needed = self.required(request_id, life.promised)
        self.block_pool.free_blocks(reversed(blocks[needed:]))
        del blocks[needed:]
        if life.sent > len(blocks):
            life.sent, life.shrunk = len(blocks), True

    def changes_of(self, request_id: str) -> Changes:
        """What changed in a request's list of blocks since the last call."""
        life, blocks = self.lives[request_id], self.req_to_blocks[request_id]
        new = [block.block_id for block in blocks[life.sent :]]
        changes = Changes(life.epoch, life.slot, life.sent, new, life.shrunk)
        life.sent, life.shrunk = len(blocks), False
        return changes

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Ends the life of a request that has finished, was aborted or is preempted; returns its blocks."""
        life = self.lives.pop(request_id, None)
        if life is not None:
            self._slots.append(life.slot)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is no prefix cache."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """No block: a state after some tokens is not kept for others that begin alike."""
        return tuple([] for _ in kv_cache_group_ids), 0


def register_spec() -> None:
    """Tells vLLM which manager serves `HAMSpec`; may be called again."""
    # Built-in specs register only into an empty registry, so they must come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HAMSpec, HAMManager, uniform_type_base_spec=HAMSpec)
