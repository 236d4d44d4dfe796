# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A call that fails, is interrupted or meets another one: the cache is as it was, or says that it is not."""

import copy
import logging
import os
import pickle
import signal
import threading

import pytest
import torch
import transformers

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.paged_store_ham import PagedStore

LAYERS = ["hybrid", "linear_attention", "full_attention", "hybrid"]
USES = {
    "get_seq_length": lambda cache, model, path: cache.get_seq_length(),
    "kept_tokens": lambda cache, model, path: cache.kept_tokens(),
    "kept_positions": lambda cache, model, path: cache.kept_positions(0),
    "kv_usage": lambda cache, model, path: cache.kv_usage(),
    "memory_bytes": lambda cache, model, path: cache.memory_bytes(),
    "state_bytes": lambda cache, model, path: cache.state_bytes(),
    "full_kv_bytes": lambda cache, model, path: cache.full_kv_bytes(),
    "real_tokens": lambda cache, model, path: cache.real_tokens,
    "past_real": lambda cache, model, path: cache.past_real(),
    "save": lambda cache, model, path: cache.save(path),
    "prune": lambda cache, model, path: cache.prune(0.5),
    "crop": lambda cache, model, path: cache.crop(0),
    "batch_select_indices": lambda cache, model, path: cache.batch_select_indices([0]),
    "batch_repeat_interleave": lambda cache, model, path: cache.batch_repeat_interleave(2),
    "reorder_cache": lambda cache, model, path: cache.reorder_cache(torch.tensor([1, 0])),
    "forward": lambda cache, model, path: model(torch.ones(2, 1, dtype=torch.long), cache=cache),
    "generate": lambda cache, model, path: model.generate(torch.ones(2, 99, dtype=torch.long), cache=cache),
    "reset": lambda cache, model, path: cache.reset(),
    "copy": lambda cache, model, path: copy.deepcopy(cache).kv_usage(),
}


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    model = HAMForCausalLM(tiny_config(num_hidden_layers=4, layer_types=LAYERS)).eval().requires_grad_(False)
    for x in model.parameters():
        if x.ndim > 1:
            torch.nn.init.normal_(x, std=0.2)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(1))


def filled(model, ids, **arguments):
    cache = HAMCache(model.config)
    model(ids, cache=cache, threshold=0.5, **arguments)
    return cache


class Failure:
    """Makes layer `layer` of a model fail, before it computes or at its first new page."""

    def __init__(self, model, layer, error):
        self.module, self.error = model.model.layers[layer], error

    def __enter__(self):
        self.hook = self.module.register_forward_pre_hook(lambda *_: self.error())

    def __exit__(self, *_):
        self.hook.remove()


def interrupt():
    """Ctrl-C, also in a process that ignores it, as shells have those do that they start in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("error", "kind"), [(interrupt, KeyboardInterrupt), (out_of_memory, torch.OutOfMemoryError)])
@pytest.mark.parametrize("layer", range(4))
def test_a_call_that_stops_in_any_layer(model, ids, tmp_path, layer, error, kind):
    cache, path = filled(model, ids[:, :30]), tmp_path / "cache"
    cache.save(path)
    good = path.read_bytes()
    expected = model(ids[:, 30:], cache=copy.deepcopy(cache), threshold=0.5).logits
    with Failure(model, layer, error), pytest.raises(kind):
        model(ids[:, 30:], cache=cache, threshold=0.5)
    if layer == 0:
        assert torch.equal(model(ids[:, 30:], cache=cache, threshold=0.5).logits, expected)
        return
    for name, use in USES.items():
        if name == "reset":
            continue
        with pytest.raises(RuntimeError, match=rf"left half-changed when `forward` stopped \({kind.__name__}"):
            use(cache, model, path)
    assert path.read_bytes() == good
    cache.reset()
    assert cache.get_seq_length() == 0
    model(ids[:, :30], cache=cache, threshold=0.5)
    assert torch.equal(model(ids[:, 30:], cache=cache, threshold=0.5).logits, expected)


@pytest.mark.parametrize("layer", range(4))
def test_a_fresh_cache_is_fresh_again(model, ids, layer):
    cache = HAMCache(model.config)
    with Failure(model, layer, out_of_memory), pytest.raises(torch.OutOfMemoryError):
        model(ids, cache=cache, threshold=0.5)
    assert cache.get_seq_length() == 0
    found = model(ids, cache=cache, threshold=0.5).logits
    assert torch.equal(found, model(ids, threshold=0.5).logits)


def test_no_room_for_a_page_counts_no_token(model, ids, monkeypatch):
    """Room is allocated before anything is counted."""
    cache = filled(model, ids[:, :15])
    before = [layer.store.counts.clone() for layer in cache.layers if layer.store]
    with monkeypatch.context() as patch:
        patch.setattr(PagedStore, "_new_pages", lambda *_: out_of_memory())
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, 15:], cache=cache, threshold=0.0)
    assert all(
        torch.equal(x, layer.store.counts)
        for x, layer in zip(before, (y for y in cache.layers if y.store), strict=True)
    )
    assert cache.layers[0].seen_tokens == 15
    with pytest.raises(RuntimeError, match="`forward` stopped"):
        cache.kv_usage()


@pytest.mark.parametrize("change", ["prune", "batch_select_indices", "crop"])
def test_a_change_that_stops_between_layers(model, ids, monkeypatch, change):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :30], cache=cache, threshold=0.3)
    arguments = {"prune": (0.6,), "batch_select_indices": (torch.tensor([1]),), "crop": (-3,)}[change]
    monkeypatch.setattr(cache.layers[3], change, lambda *_: out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        getattr(cache, change)(*arguments)
    with pytest.raises(RuntimeError, match=f"`{change}` stopped"):
        cache.kv_usage()


@pytest.mark.parametrize("use", ["forward", "reset", "prune"])
def test_a_second_thread_is_refused(model, ids, use):
    cache = filled(model, ids[:, :30])
    expected = model(ids[:, 30:], cache=copy.deepcopy(cache), threshold=0.5).logits
    caught = []

    def second():
        try:
            USES[use](cache, model, None)
        except RuntimeError as error:
            caught.append(str(error))

    def call_from_another_thread():
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    with Failure(model, 1, call_from_another_thread):
        found = model(ids[:, 30:], cache=cache, threshold=0.5).logits
    assert len(caught) == 1
    assert caught[0].startswith(f"`{use}` found this cache in use by another call: give every thread")
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_is_refused_before_anything_changes(model, ids, dtype):
    cache = filled(model, ids[:, :30])
    expected = model(ids[:, 30:], cache=copy.deepcopy(cache), threshold=0.5).logits
    other = copy.deepcopy(model).to(dtype)
    # Rounded weights are other weights; wider ones are the same.
    message = "other weights" if dtype == torch.bfloat16 else "this call computes them in torch.float64"
    with pytest.raises(ValueError, match=message):
        other(ids[:, 30:], cache=cache, threshold=0.5)
    assert torch.equal(model(ids[:, 30:], cache=cache, threshold=0.5).logits, expected)


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])
@pytest.mark.parametrize("recording", [False, True])
def test_a_copy_made_in_inference_mode_goes_on_outside(model, ids, twin, recording):
    cache = HAMCache(model.config)
    if recording:
        cache.activate_past_recording()
    with torch.inference_mode():
        model(ids[:, :30], cache=cache, threshold=0.5)
        other = twin(cache)
    found = [
        torch.cat([model(ids[:, t : t + 1], cache=held, threshold=0.5).logits for t in range(30, 60)], dim=1)
        for held in (other, cache)
    ]
    assert torch.equal(*found)


def test_defaults_of_torch_have_no_say(model, ids):
    def run():
        cache = HAMCache(model.config)
        for begin, end in ((0, 30), (30, 31), (31, 60)):
            model(ids[:, begin:end].clone(), cache=cache, threshold=0.3, kv_budget=9)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices([0, 3])
        return [cache.kept_tokens(), cache.kv_usage(), *cache.kept_positions(0)[1]]

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))
    cache = filled(model, ids)
    with torch.device("meta"):
        assert cache.kept_tokens().device.type == "cpu"
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices([0, 3])
        assert cache.kv_usage().device.type == "cpu"


def test_gradients_stop_at_the_cache_and_one_warning_says_so(tiny_config, ids):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ham_hf.modeling_ham")
    logger.addHandler(handler)
    transformers.utils.logging.warning_once.cache_clear()  # another test may have had the warning
    try:
        model = HAMForCausalLM(tiny_config()).train()
        cache = HAMCache(model.config)
        for part in ids.split(20, dim=1):
            model.zero_grad()
            model(part, cache=cache, labels=part, threshold=0.5).loss.backward()
        with torch.no_grad():
            alone = HAMCache(model.config)
            [model.eval()(part, cache=alone, threshold=0.5) for part in ids.split(20, dim=1)]
        assert torch.equal(alone.kept_tokens(), cache.kept_tokens())
    finally:
        logger.removeHandler(handler)
    assert sum("Gradients stop at `cache`" in message for message in messages) == 1
