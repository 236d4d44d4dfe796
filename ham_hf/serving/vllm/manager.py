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
from .conversations import Conversations, Key
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
        prompt: tokens of the prompt, which it takes in chunk by chunk.
    """

    usage: float = 1.0
    budget: int | None = None
    prompt: int = 0

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
        epoch: number of this life of the request.
        slot: row of the worker's tables.
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
        changes: where its memory is.
        first_block: the first of its blocks, by which a worker finds it in a batch.
        fresh: true if it has seen no token yet.
        routing: its routing arguments; read when its slot is new.
    """

    request_id: str
    changes: Changes
    first_block: int
    fresh: bool
    routing: dict[str, Any]


@dataclass
class Life:
    """A request's memory between its first block and the return of the last.

    Attributes:
        epoch: a number that no other life has: a preempted request that starts again begins another.
        slot: row of the workers' tables.
        blocks: the same list as in the manager's `req_to_blocks`.
        budget: most tokens that a hybrid head may hold, or `None`.
        promised: tokens for which steps were given memory.
        sent: blocks that the workers know of, and which the request still has.
        shrunk: true if they know of others.
        report: what the workers said last.
    """

    epoch: int
    slot: int
    blocks: list[KVCacheBlock]
    budget: int | None
    promised: int = 0
    sent: int = 0
    shrunk: bool = False
    report: Report | None = None


class HAMManager(SingleTypeKVCacheManager):
    """Reserves the worst case of a step on top of what was reported, and takes back what the step did not need.

    Memories of requests that have ended stay as `conversations` while nobody else needs their blocks.
    """

    kv_cache_spec: HAMSpec

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lives: dict[str, Life] = {}  # of the requests that run
        self.conversations: Conversations[Life] = Conversations()
        self.expectations: dict[str, Expectation] = {}
        self._by_epoch: dict[int, Life] = {}  # of both
        self._resumes: dict[str, Key] = {}  # requests that may take over a conversation
        self._epochs = 0
        self._slots: list[int] = []  # free ones; with those in use they are 0 to their number

    def expect(self, request_id: str, expectation: Expectation) -> None:
        """Notes what a request will keep, until `forget`."""
        self.expectations[request_id] = expectation

    def forget(self, request_id: str) -> None:
        """Drops what was noted of a request that has ended."""
        self.expectations.pop(request_id, None)
        self._resumes.pop(request_id, None)

    def required(self, life: Life | None, budget: int | None, tokens: int) -> int:
        """Blocks that surely suffice when the request has seen `tokens`."""
        spec = self.kv_cache_spec
        most = spec.pages(tokens, tokens if budget is None else min(tokens, budget))
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

        vLLM asks both before it admits a request. Prompts that others still read count, too. An expectation that was
        too low costs a preemption. Conversations give way to what is needed, but for the one that the request goes on
        with.
        """
        life, key = self.lives.get(request_id), None
        if life is None and total_computed_tokens:
            key = self._resumes[request_id]
            life = self.conversations.get(key)
        expectation = self.expectations.get(request_id, Expectation())
        if apply_admission_cap:
            needed = self._expected(expectation, num_tokens) + self._outstanding()
        else:
            needed = self.required(life, expectation.budget, num_tokens)
        new = max(needed - (0 if life is None else len(life.blocks)), 0)
        while new > self.block_pool.get_num_free_blocks() and (old := self.conversations.take_oldest(but=key)):
            self._end(old)
        return new

    def _expected(self, expectation: Expectation, tokens: int) -> int:
        """Blocks that a request is expected to need when it has seen `tokens`."""
        return self.kv_cache_spec.blocks(self.kv_cache_spec.pages(tokens, expectation.kept(tokens)))

    def _outstanding(self) -> int:
        """Blocks that running requests are expected to need still for their prompts."""
        outstanding = 0
        for request_id, life in self.lives.items():
            expectation = self.expectations.get(request_id, Expectation())
            if life.promised < expectation.prompt:
                outstanding += max(self._expected(expectation, expectation.prompt) - len(life.blocks), 0)
        return outstanding

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Gives a request the blocks for a step after which it has seen `num_tokens`; returns none, see the module."""
        life = self.lives.get(request_id)
        if life is None:
            self._epochs += 1
            budget = self.expectations.get(request_id, Expectation()).budget
            life = Life(self._epochs, self._free_slot(), self.req_to_blocks[request_id], budget)
            self.lives[request_id] = self._by_epoch[life.epoch] = life
        life.promised = max(life.promised, num_tokens)
        missing = self.required(life, life.budget, num_tokens) - len(life.blocks)
        life.blocks.extend(self.block_pool.get_new_blocks(max(missing, 0)))
        return []

    def _free_slot(self) -> int:
        return self._slots.pop() if self._slots else len(self.lives)

    def report(self, epoch: int, report: Report) -> None:
        """Takes the workers' report, and gives back the blocks at the end that no token needs, nor can need.

        A report of a life that has ended meanwhile changes nothing.
        """
        life = self._by_epoch.get(epoch)
        if life is None:
            return
        life.report = report
        # Steps that were scheduled since need their worst case still.
        needed = self.required(life, life.budget, life.promised)
        self.block_pool.free_blocks(reversed(life.blocks[needed:]))
        del life.blocks[needed:]
        if life.sent > len(life.blocks):
            life.sent, life.shrunk = len(life.blocks), True

    def changes_of(self, request_id: str) -> Changes:
        """What changed in a request's list of blocks since the last call."""
        life = self.lives[request_id]
        new = [block.block_id for block in life.blocks[life.sent :]]
        changes = Changes(life.epoch, life.slot, life.sent, new, life.shrunk)
        life.sent, life.shrunk = len(life.blocks), False
        return changes

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Ends the life of a request that has finished, was aborted or is preempted; returns its blocks."""
        life = self.lives.pop(request_id, None)
        if life is not None:
            self._slots.append(life.slot)
            del self._by_epoch[life.epoch]
        return super().pop_blocks_for_free(request_id)

    def _end(self, life: Life) -> None:
        """Gives back the blocks of a conversation."""
        del self._by_epoch[life.epoch]
        self.block_pool.free_blocks(reversed(life.blocks))

    def keep(self, request_id: str, group: str, tokens: Sequence[int]) -> None:
        """Makes a conversation of a request that has ended after it has seen `tokens`."""
        life = self.lives.pop(request_id)
        self._slots.append(life.slot)
        # Its blocks are in the list of no request; the life has them.
        super().pop_blocks_for_free(request_id)
        if (old := self.conversations.add(group, tokens, life)) is not None:
            self._end(old)

    def find(self, request_id: str, group: str, tokens: Sequence[int]) -> int:
        """How many of a request's `tokens` a conversation has seen; the request may go on with it at once."""
        self._resumes.pop(request_id, None)
        if (key := self.conversations.longest(group, tokens)) is None:
            return 0
        self._resumes[request_id] = key
        return key.tokens

    def allocate_external_computed_blocks(
        self, request_id: str, num_local_computed_tokens: int, num_external_computed_tokens: int, *args: Any, **kw: Any
    ) -> None:
        """Gives a request the conversation that `find` found."""
        life = self.conversations.take(self._resumes.pop(request_id))
        life.slot, life.sent = self._free_slot(), 0
        self.lives[request_id] = life
        self.req_to_blocks[request_id] = life.blocks

    def drop_conversations(self) -> None:
        """Gives back the blocks of all conversations."""
        while (life := self.conversations.take_oldest()) is not None:
            self._end(life)

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
