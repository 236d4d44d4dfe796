# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Random programs of what a user does to a cache, each step held to every row alone, computed without a cache."""

import copy
import pickle
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM

VOCABULARY, LAYERS = 29, ["hybrid", "linear_attention", "full_attention", "hybrid"]


def make_model(**settings):
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        **settings,
    )
    return HAMForCausalLM(config).eval().requires_grad_(False)


class CacheMachine(RuleBasedStateMachine):
    """A cache beside its oracle: the tokens of every row, and which columns of the batch were real."""

    model = make_model()
    wide = copy.deepcopy(model).double()

    @initialize(rows=st.integers(1, 3), threshold=st.sampled_from([0.0, 0.5, 0.52, 2.0]))
    def start(self, rows, threshold):
        self.cache, self.threshold = HAMCache(self.model.config), threshold
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.rows: list[list[int]] = [[] for _ in range(rows)]

    def draw(self, data, most=20):
        """New tokens `[B, n]` and which of them are real; a row may be all padding."""
        length = data.draw(st.integers(1, most))
        seed = data.draw(st.integers(0, 2**16))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (len(self.rows), length), generator=generator)
        real = torch.ones_like(ids)
        if data.draw(st.booleans()):
            real = torch.randint(0, 2, ids.shape, generator=generator)
        return ids, real

    def call(self, ids, real, cache=None, model=None):
        mask = torch.cat([self.mask, real], dim=1)
        model, cache = model or self.model, self.cache if cache is None else cache
        return model(ids, attention_mask=mask, cache=cache, threshold=self.threshold)

    def take_in(self, ids, real):
        self.mask = torch.cat([self.mask, real], dim=1)
        for row, tokens, keep in zip(self.rows, ids, real.bool(), strict=True):
            row.extend(tokens[keep].tolist())

    @rule(data=st.data())
    def feed(self, data):
        ids, real = self.draw(data)
        logits = self.call(ids, real).logits
        self.take_in(ids, real)
        for row, found, keep in zip(self.rows, logits, real.bool(), strict=True):
            if keep.any():
                expected = self.model(torch.tensor([row]), threshold=self.threshold, use_cache=False).logits[0]
                torch.testing.assert_close(found[keep], expected[-int(keep.sum()) :], rtol=0, atol=1e-5)

    @rule(data=st.data(), layer=st.integers(0, len(LAYERS) - 1))
    def fail(self, data, layer):
        """A call stops before `layer`: the cache is as it was, or says so until a good copy takes its place."""
        ids, real = self.draw(data)
        backup, fresh = copy.deepcopy(self.cache), not self.cache.is_initialized
        module = self.model.model.layers[layer]

        def stop(*_):
            raise KeyboardInterrupt

        hook = module.register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                self.call(ids, real)
        finally:
            hook.remove()
        if layer and not fresh:
            for use in (self.cache.kept_tokens, self.cache.get_seq_length, lambda: self.call(ids, real)):
                with pytest.raises(RuntimeError, match="half-changed"):
                    use()
            self.cache = backup

    @rule(data=st.data())
    def draft(self, data):
        """Tokens come in and some are taken back."""
        if not self.mask.shape[1]:
            return
        ids, real = self.draw(data)
        kept = data.draw(st.integers(0, ids.shape[1]))
        self.cache.activate_past_recording()
        self.call(ids, real)
        self.cache.crop(kept - ids.shape[1])
        self.cache.stop_past_recording()
        self.take_in(ids[:, :kept], real[:, :kept])

    @rule(data=st.data())
    def choose_rows(self, data):
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.cache.batch_select_indices(chosen)
        self.rows, self.mask = [list(self.rows[i]) for i in chosen], self.mask[chosen]

    @rule(data=st.data(), source_stays=st.booleans())
    def fork(self, data, source_stays):
        """One of two forks goes on, while the other reads something else, with a budget."""
        if not self.cache.is_initialized:
            return
        stays, leaves = self.cache, self.cache.fork()
        self.cache, other = (stays, leaves) if source_stays else (leaves, stays)
        ids, real = self.draw(data)
        mask = torch.cat([self.mask, real], dim=1)
        for budget in data.draw(st.sampled_from([(None,), (None, 23), (23, 23)])):
            self.model(ids, attention_mask=mask, cache=other, threshold=self.threshold, kv_budget=budget)
            mask = torch.cat([mask, real], dim=1)

    @rule(way=st.sampled_from(["copy", "pickle", "inference", "file"]))
    def replace_by_a_twin(self, way):
        if way == "copy":
            self.cache = copy.deepcopy(self.cache)
        elif way == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))
        elif way == "inference":
            with torch.inference_mode():
                self.cache = copy.deepcopy(self.cache)
        elif self.cache.is_initialized:
            with tempfile.TemporaryDirectory() as folder:
                self.cache.save(Path(folder) / "cache")
                self.cache = HAMCache.load(Path(folder) / "cache", self.model.config)

    @rule(data=st.data())
    def misuse(self, data):
        """Another past, another dtype, another thread: all are refused and change nothing."""
        ids, real = self.draw(data, most=3)
        if not self.mask.shape[1]:
            return
        wrong = self.mask.clone()
        row, column = data.draw(st.integers(0, len(wrong) - 1)), data.draw(st.integers(0, wrong.shape[1] - 1))
        wrong[row, column] = 1 - wrong[row, column]
        with pytest.raises(ValueError, match=f"`attention_mask` contradicts `cache`: token {column} of row {row}"):
            self.model(ids, attention_mask=torch.cat([wrong, real], dim=1), cache=self.cache)
        with pytest.raises(ValueError, match=r"this call computes them in torch\.float64"):
            self.call(ids, real, model=self.wide)
        errors = []

        def second():
            try:
                self.call(ids, real)
            except RuntimeError as error:
                errors.append(str(error))

        with self.cache.changing("test"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        assert len(errors) == 1
        assert "in use by another call" in errors[0]

    @invariant()
    def holds_what_each_row_would(self):
        if not hasattr(self, "cache") or not self.mask.shape[1]:
            return
        assert self.cache.get_seq_length() == self.mask.shape[1]
        assert self.cache.real_tokens.tolist() == [len(row) for row in self.rows]
        held = self.cache.past_real()
        assert torch.equal(self.mask.bool(), torch.ones_like(self.mask).bool() if held is None else held)
        for number, row in enumerate(self.rows):
            if row:
                own = self.model(torch.tensor([row]), threshold=self.threshold).cache
                for layer in (0, 2, 3):
                    found = self.cache.kept_positions(layer)[number][0].tolist()
                    assert found == own.kept_positions(layer)[0][0].tolist()


class WindowMachine(CacheMachine):
    """The same with windows, of which the shorter is soon left and the longer seldom, and sinks."""

    model = make_model(attention_window=[4, 0, 0, 17], attention_sinks=2)
    wide = copy.deepcopy(model).double()


TestCachePrograms, TestCacheProgramsWithWindows = CacheMachine.TestCase, WindowMachine.TestCase
for programs in (TestCachePrograms, TestCacheProgramsWithWindows):
    programs.settings = settings(
        max_examples=20, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
    )
