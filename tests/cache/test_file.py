# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The file of a cache: its model reads it, foreign and damaged ones are refused, half of one is none."""

import copy
import fcntl
import os
import random
import resource
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ham_hf import HAMCache, HAMForCausalLM, cache_file_ham

LAYERS = ["hybrid", "linear_attention", "full_attention"]


@pytest.fixture(scope="module")
def make_model(tiny_config):
    def make(seed=0, **overrides):
        torch.manual_seed(seed)
        config = tiny_config(**({"num_hidden_layers": 3, "layer_types": LAYERS} | overrides))
        return HAMForCausalLM(config).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def filled(model, ids):
    cache = HAMCache(model.config)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids, attention_mask=mask, cache=cache, threshold=0.5)
    return cache


def signed(path, change=None, metadata=None):
    """Writes a changed file again with a checksum that fits, as somebody could who means harm."""
    with safe_open(path, framework="pt") as file:
        held = file.metadata() | (metadata or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change is not None:
        change(tensors)
    held.pop("checksum")
    save_file(tensors, path, metadata=held | {"checksum": cache_file_ham.checksum(tensors, held)})


# --- whose cache it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": None},
        {"router": "l2"},
        {"kv_output_norm": False},
        {"rnn_output_norm": False},
        {"rms_norm_eps": 1e-5},
        {"qk_norm": False},
        {"allow_neg_eigval": True},
        {"output_gate": "sigmoid"},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_another_configuration_is_refused(model, make_model, ids, tmp_path, overrides):
    filled(model, ids).save(tmp_path / "cache")
    other = make_model(**overrides)
    with pytest.raises(ValueError, match=rf"`path` gives the cache of a model of another .*`{next(iter(overrides))}`"):
        HAMCache.load(tmp_path / "cache", other.config)
    with pytest.raises(ValueError, match=rf"`cache` gives the cache .*`{next(iter(overrides))}`"):
        other(ids[:, :1], cache=filled(model, ids))


def test_what_changes_no_content_does_not_matter(model, make_model, ids, tmp_path):
    filled(model, ids).save(tmp_path / "cache")
    other = make_model(threshold=0.4, target_kv_usage=0.1, max_position_embeddings=64, use_cache=False)
    other.load_state_dict(model.state_dict())
    other(ids[:, :1], cache=HAMCache.load(tmp_path / "cache", other.config))


def test_other_weights_are_refused_at_the_first_use(model, make_model, ids, tmp_path):
    filled(model, ids).save(tmp_path / "cache")
    loaded, other = HAMCache.load(tmp_path / "cache", model.config), make_model(seed=1)
    with pytest.raises(ValueError, match=r"`cache` was filled by a model with other weights: \d+ parameters differ"):
        other(ids[:, :1], cache=loaded)
    nudged = copy.deepcopy(model)
    nudged.model.layers[1].mlp.up_proj.weight += 1e-3
    with pytest.raises(ValueError, match=r"1 parameters differ, such as 'layers\.1\.mlp\.up_proj\.weight'"):
        nudged(ids[:, :1], cache=loaded)
    assert torch.equal(model(ids[:, :1], cache=loaded).logits, model(ids[:, :1], cache=filled(model, ids)).logits)


def test_the_same_model_after_a_round_trip_goes_on(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "model")
    filled(model, ids).save(tmp_path / "cache")
    again = HAMForCausalLM.from_pretrained(tmp_path / "model").requires_grad_(False)
    cache = HAMCache.load(tmp_path / "cache", again.config)
    assert torch.equal(again(ids[:, :1], cache=cache).logits, model(ids[:, :1], cache=filled(model, ids)).logits)
    cache.save(tmp_path / "again")
    model(ids[:, :1], cache=HAMCache.load(tmp_path / "again", model.config))


def test_another_dtype_is_refused_at_the_first_use(model, ids, tmp_path):
    filled(model, ids).save(tmp_path / "cache")
    wide = copy.deepcopy(model).double()
    loaded = HAMCache.load(tmp_path / "cache", wide.config)
    with pytest.raises(ValueError, match=r"in torch\.float32, this call computes them in torch\.float64"):
        wide(ids[:, :1], cache=loaded)


def test_a_cache_in_use_by_another_model_of_equal_shape(model, make_model, ids):
    cache = filled(model, ids)
    with pytest.raises(ValueError, match="`cache` was filled by a model with other weights"):
        make_model(seed=1)(ids[:, :1], cache=cache)
    copy.deepcopy(model)(ids[:, :1], cache=cache)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_every_changed_byte_is_noticed(model, ids, tmp_path):
    path = tmp_path / "cache"
    filled(model, ids).save(path)
    whole, rng = path.read_bytes(), random.Random(0)
    for place in rng.sample(range(len(whole)), 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"`path`"):
            HAMCache.load(path, model.config)


def change_of(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("0.recurrent_state", float("nan")), "layer 0: `recurrent_state` must be finite"),
        (change_of("0.conv_state", float("inf")), "layer 0: `conv_state` must be finite"),
        (change_of("2.keys", float("-inf")), "layer 2: `keys` must be finite"),
        (change_of("0.values", float("nan")), "layer 0: `values` must be finite"),
        (change_of("0.scores", 1.5), "layer 0: `scores` must be between 0 and 1"),
        (change_of("0.scores", float("nan")), "layer 0: `scores` must be between 0 and 1"),
        (change_of("padding", False), "`padding` and `real_tokens` contradict each other"),
        (lambda tensors: tensors.pop("padding"), "`padding` and `real_tokens` contradict each other"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "holds 'other', which belongs to no layer"),
    ],
)
def test_a_signed_file_that_makes_no_sense(model, ids, tmp_path, change, message):
    path = tmp_path / "cache"
    filled(model, ids).save(path)
    signed(path, change)
    with pytest.raises(ValueError, match=message):
        HAMCache.load(path, model.config)


def test_another_version_is_refused(model, ids, tmp_path):
    path = tmp_path / "cache"
    filled(model, ids).save(path)
    signed(path, metadata={"version": "3"})
    with pytest.raises(ValueError, match="is a cache of format version '3', this release reads '2'"):
        HAMCache.load(path, model.config)


def test_what_load_refuses_is_not_saved(model, ids, tmp_path):
    cache = filled(model, ids)
    cache.layers[0].recurrent_state[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0: `recurrent_state` must be finite"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_cropped_to_nothing(model, ids, tmp_path):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    model(ids, cache=cache, threshold=0.5)
    cache.crop(-ids.shape[1])
    cache.save(tmp_path / "cache")
    loaded = HAMCache.load(tmp_path / "cache", model.config)
    assert loaded.get_seq_length() == 0
    assert torch.equal(model(ids, cache=loaded, threshold=0.5).logits, model(ids, threshold=0.5).logits)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_many_save_at_once(model, ids, tmp_path):
    path, errors = tmp_path / "cache", []
    caches = [filled(model, ids[:, :n]) for n in (8, 16, 40)]

    def save(cache):
        try:
            for _ in range(20):
                cache.save(path)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert HAMCache.load(path, model.config).get_seq_length() in (8, 16, 40)
    assert os.listdir(tmp_path) == ["cache"]


def test_files_of_the_user_stay_and_what_a_kill_left_goes(model, ids, tmp_path):
    own = tmp_path / "cache.partial"
    own.write_text("mine")
    left, busy = tmp_path / ".cache.abc.partial", tmp_path / ".cache.def.partial"
    for folder in (left, busy):
        folder.mkdir()
        (folder / "cache").write_text("half")
    held = os.open(busy, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    filled(model, ids).save(tmp_path / "cache")
    os.close(held)
    assert own.read_text() == "mine"
    assert not left.exists()
    assert busy.exists(), "another process is writing it"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask(model, ids, tmp_path, umask):
    before = os.umask(umask)
    try:
        filled(model, ids).save(tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o666 & ~umask


def test_errors_name_the_path(model, ids, tmp_path):
    cache = filled(model, ids)
    with pytest.raises(FileNotFoundError, match=r"There is no folder for this file: .*missing/cache"):
        cache.save(tmp_path / "missing" / "cache")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"A file cannot take the place of a folder: .*/folder"):
        cache.save(tmp_path / "folder")
    with pytest.raises(IsADirectoryError, match=r"A cache is a file, not a folder: .*/folder"):
        HAMCache.load(tmp_path / "folder", model.config)


def test_a_full_disk_leaves_the_old_file(model, ids, tmp_path):
    """The system's limit on a file's size stands for a disk without room."""
    path = tmp_path / "cache"
    filled(model, ids[:, :8]).save(path)
    whole = path.read_bytes()
    cache, limits = filled(model, ids), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Cannot write .*/cache: .*File too large"):
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["cache"]
