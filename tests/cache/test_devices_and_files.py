# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A cache moves whole: to another device, and through a file that only its model reads."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from ham_hf import HAMCache, HAMForCausalLM, cache_file_ham
from tests.cache.caches import MIXED, assert_continues, assert_same, contents, feed, filled


def test_offloading_changes_no_output(model, ids, mask):
    plain, offloaded = HAMCache(model.config), HAMCache(model.config, offloading=True)
    cuts = (20, 21, 22)
    torch.testing.assert_close(
        feed(model, offloaded, ids, cuts, mask), feed(model, plain, ids, cuts, mask), rtol=0, atol=0
    )
    assert_same(offloaded, plain)
    assert offloaded.layers[0].conv_state.device.type == "cpu"


def test_moving_leaves_nothing_behind(model, ids):
    """Every tensor moves, those remembered for a crop too (the device `meta` stands in for one that CI lacks)."""
    cache = HAMCache(model.config)
    feed(model, cache, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids, (1, 2))
    for layer in cache.layers:
        count = len(layer.tensors())
        layer.to(torch.device("meta"))
        assert len(layer.tensors()) == count
        left = [x for x in tree_leaves([vars(layer), [vars(s) for s in layer._steps]]) if isinstance(x, torch.Tensor)]
        left += layer.tensors()
        assert {x.device.type for x in left} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(make_model, ids, mask, tmp_path, dtype):
    model = make_model(num_hidden_layers=4, layer_types=list(MIXED), dtype=dtype)
    cache = filled(model, ids[:, :40], (20, 21), mask)
    path = tmp_path / "conversation.safetensors"
    cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    loaded = HAMCache.load(path, model.config)
    assert_same(loaded, cache)
    assert loaded.memory_bytes() <= cache.memory_bytes()
    # Heads of bfloat16 sum their pages in another order.
    assert_continues(model, loaded, cache, ids, mask, 1e-5 if dtype == torch.float32 else 0.05)


def test_saving_is_whole_or_not_at_all(model, ids, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"

    def failing(tensors, name, metadata=None):
        with open(name, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    cache = filled(model, ids[:, :30])
    with monkeypatch.context() as patch:
        patch.setattr(cache_file_ham, "save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            cache.save(path)
    assert list(tmp_path.iterdir()) == []
    cache.save(path)
    whole = path.read_bytes()
    feed(model, cache, ids)
    with monkeypatch.context() as patch:
        patch.setattr(cache_file_ham, "save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            cache.save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_wrong_files_are_refused(model, ids, tmp_path):
    good = tmp_path / "good.safetensors"
    filled(model, ids[:, :30]).save(good)
    whole = good.read_bytes()
    contents_of = {"text": b"hello", "empty": b"", "half": whole[: len(whole) // 2], "head": whole[:100]}
    for name, data in contents_of.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"`path` .*{name}\.safetensors.* is not a cache"):
            HAMCache.load(path, model.config)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"0.keys": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match=r"`path` .*foreign\.safetensors.* is not a cache"):
        HAMCache.load(foreign, model.config)
    with pytest.raises(FileNotFoundError, match="missing"):
        HAMCache.load(tmp_path / "missing.safetensors", model.config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 5),
        ("head_dim", 16),
        ("value_head_dim", 16),
        ("num_key_value_heads", 4),
        ("num_attention_heads", 8),
        ("conv_kernel_size", 3),
        ("layer_types", ["hybrid"] * 4),
    ],
)
def test_a_cache_of_another_shape_is_refused(model, tiny_config, ids, tmp_path, field, value):
    """From a file and as `cache` alike, naming what differs."""
    layers = value if field == "num_hidden_layers" else 4
    other = tiny_config(
        **{"num_hidden_layers": layers, "head_dim": 8, "value_head_dim": 8}
        | {"layer_types": [*MIXED, "hybrid"][:layers]}
        | {field: value}
    )
    named = "layer_types" if field == "num_hidden_layers" else field
    cache = filled(model, ids[:, :30])
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"`path` .*`{named}`"):
        HAMCache.load(tmp_path / "cache", other)
    before = contents(cache)
    with pytest.raises(ValueError, match=rf"`cache` .*`{named}`"):
        HAMForCausalLM(other)(ids[:, :1], cache=cache)
    assert_same(cache, before)


def test_rows_and_prune_work_where_an_offloaded_layer_lies(model, ids):
    """An offloaded layer's tensors are not on the device it works on, here one that holds no data."""
    cache, expected = filled(model, ids[:, :20]), filled(model, ids[:, :20])
    for layer in cache.layers:
        layer.device = torch.device("meta")
    rows = torch.arange(cache.batch_size).flip(0)
    for each in (cache, expected):
        each.reorder_cache(rows)
        each.prune(0.5)
    assert torch.equal(cache.kept_tokens(), expected.kept_tokens())
