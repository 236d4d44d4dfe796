# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Thousands of damaged configurations, weights and saved caches: each is refused with a clean error, or works."""

import contextlib
import copy
import json
import random
import re
import resource
import sys
import time

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import AutoConfig

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM
from ham_hf.cache_file_ham import checksum

# Of each seed; the others have the first third of seed 0.
CONFIGURATIONS, CHECKPOINTS, CACHES = 3700, 300, 1000
seeds_and_parts = pytest.mark.parametrize(
    ("seed", "part"), [(0, 3), *(pytest.param(seed, 1, marks=pytest.mark.slow) for seed in (0, 1))]
)
# OSError is what Transformers makes of broken JSON. RuntimeError is clean only if it tells of shapes that differ.
CLEAN = (ValueError, TypeError, OSError, StrictDataclassError, SafetensorError)
SLOWEST = 10  # seconds for one case, of which the slowest took 0.7 on two busy cores
MOST_MEMORY = 2**29  # bytes by which a run may grow, whatever its files ask for

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7, "attention_factor": 1.1}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "original_max_position_embeddings": 1024}
VARIANTS = [
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024} | YARN},
    {"rope_parameters": {"rope_type": "llama3", "factor": 4.0} | LLAMA3},
    {"rope_parameters": {"rope_type": "longrope", "factor": 4.0} | LONGROPE},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "num_labels": 3},
    {"rope_parameters": None, "threshold": [0.3, 0.4], "router": "learned", "id2label": {0: "a", 1: "b", 2: "c"}},
    {"layer_types": ["linear_attention", "full_attention"], "eos_token_id": [1, 2], "dtype": "bfloat16"},
]
# As older releases of Transformers wrote them, or as only a caller gives them. Left out are those that Transformers
# reads before HAMConfig does, or that describe another library's work: `configuration_files`, `quantization_config`.
# Nor is a `dtype` put into a nested dictionary: Transformers prints any as if it were a type of torch.
OTHER_KEYS = {
    "rope_theta": 1e4,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "partial_rotary_factor": 1.0,
    "torch_dtype": "float16",
    "num_labels": 3,
    "problem_type": "regression",
    "name_or_path": "x",
    "output_attentions": False,
    "attn_implementation": "eager",
    "experts_implementation": None,
    "per_layer_config": None,
    "fusion_config": None,
    "text_config": None,
    "auto_map": {"AutoConfig": "configuration_ham.HAMConfig"},
    "transformers_weights": "model.safetensors",
    "ignore_keys_at_rope_validation": [],
    "mlp_layer_types": [],
    "mtp_layer_types": [],
    "image_token_id": 1,
}
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**30, 10**400, 0.5, -1.5, 1e-300, 1e308]
WORDS = "hybrid default yarn longrope proportional float64 int8 load auto F64 ../../x a/b \0 x".split(" ")
LISTS = [[], [1], [None], [[]], [{}], ["hybrid"], ["hybrid"] * 2, ["hybrid"] * 1000, [0, 10**12], [2**40, 2**40]]
DICTIONARIES = [{}, {"a": 1}, {"": None}, {"0": "a"}, {"x": "y"}, {"__float__": "NaN"}, {"hybrid": {}}]
DICTIONARIES += [{"full_attention": None}, {"rope_type": "linear", "factor": 2}]
VALUES = [None, True, False, float("nan"), float("inf"), "", "x" * 5000, *NUMBERS, *WORDS, *LISTS, *DICTIONARIES]
BYTES = [b"[", b"{", b'"', b"\\", b"9" * 50, b"e9", b"-", b",", b"\xff", b"\0", b"null", b"9" * 5000]
BYTES += [b"[" * 3000, b'{"a":' * 3000]


def containers(x):
    """`x` and every list and dictionary within it."""
    if isinstance(x, (dict, list)):
        yield x
        for y in x.values() if isinstance(x, dict) else x:
            yield from containers(y)


def mutated(document, names, rng):
    """A copy of a JSON document with values, keys, types or nesting changed in one to three places."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place, value = rng.choice(list(containers(document))), copy.deepcopy(rng.choice(VALUES))
        if isinstance(place, list):
            i = rng.randint(0, len(place))
            place[i : i + rng.randrange(2)] = rng.choice([[], [value], [value], place[:5]])
            continue
        key = rng.choice(list(place) or ["a"])
        kind = rng.randrange(6)
        if kind == 0:
            place.pop(key, None)
        elif kind == 1:
            place[rng.choice(names)] = value
        elif kind == 2 and key in place:
            place[key] = rng.choice([[place[key]], {"a": place[key]}, str(place[key]), [place[key]] * 3])
        elif kind == 3 and key in place:
            other = rng.choice(list(place))
            place[key], place[other] = place[other], place[key]
        else:
            place[key] = value
    return document


def damaged(data, rng):
    """Bytes with some flipped, cut out, doubled or inserted, or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        i, n = rng.randrange(len(data) + 1), rng.randrange(1, 20)
        kind = rng.randrange(5)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i:]
        elif kind == 2:
            del data[i : i + n]
        else:
            data[i:i] = data[:n] if kind == 3 else rng.choice(BYTES)
    return bytes(data)


def damaged_safetensors(data, rng):
    """A safetensors file whose length, header or bytes are not what they were."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        return damaged(data, rng)
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + data[8:]
    if kind <= 4:
        header = damaged(header, rng)
    else:
        header = json.loads(header)
        names = ["dtype", "shape", "data_offsets", "__metadata__", *header]
        header = exchanged(header, rng) if kind == 5 else mutated(header, names, rng)
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + tensors


def exchanged(header, rng):
    """A header that stays valid more often: two tensors change places, or one its shape, dtype or name."""
    one, other = rng.sample([name for name in header if name != "__metadata__"], 2)
    kind = rng.randrange(5)
    if kind == 0:
        header[one], header[other] = header[other], header[one]
    elif kind == 1:
        header[one]["shape"] = header[one]["shape"][::-1]
    elif kind == 2:
        header[one]["shape"] = [1, *header[one]["shape"]]
    elif kind == 3:
        header[one]["dtype"] = rng.choice(["F32", "I32", "U32", "BF16", "F16", "I64", "F64", "BOOL", "F8_E4M3", "F4"])
    else:
        header[f"{one}x"] = header.pop(one)
    return header


def put(path, data):
    """Writes a file anew: to cut an old one off makes some file systems wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@contextlib.contextmanager
def limits():
    """Fails if what runs within takes too much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MOST_MEMORY


def attempt(load, use, case):
    """True if `load` returned an object, which `use` then used; a failure names the `case`."""
    begin = time.perf_counter()
    try:
        loaded = load()
    except CLEAN:
        return False
    except BaseException as error:
        if isinstance(error, RuntimeError) and "mismatched_sizes" in str(error):
            return False
        raise AssertionError(f"{type(error).__name__} of {case!r}") from error
    finally:
        assert time.perf_counter() - begin < SLOWEST, case
    try:
        use(loaded)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} when using {case!r}") from error
    return True


@pytest.fixture(autouse=True)
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL + 1)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def run(model):
    ids = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        assert model.eval()(ids, return_dict=True).logits.shape == (1, 3, model.config.vocab_size)


def use_configuration(config, folder, build):
    repr(config)
    if not build:
        return
    config.save_pretrained(folder)
    HAMConfig.from_pretrained(folder)
    with torch.device("meta"):
        size = sum(x.numel() for x in HAMForCausalLM(config).parameters())
    if size < 10**6:
        run(HAMForCausalLM(config))


@seeds_and_parts
def test_configurations(tmp_path, seed, part):
    rng = random.Random(seed)
    documents = [json.loads(HAMConfig(**(SHAPE | variant)).to_json_string()) for variant in VARIANTS]
    documents.append({**SHAPE, **OTHER_KEYS, "model_type": "ham"})
    keys = {
        key for document in documents for place in containers(document) if isinstance(place, dict) for key in place
    }
    names = sorted((keys | OTHER_KEYS.keys() | set(dir(HAMConfig))) - {"dtype"})
    loaded = 0
    with limits():
        for i in range(CONFIGURATIONS // part):
            document = rng.choice(documents)
            if i % 3:
                data = json.dumps(mutated(document, names, rng)).encode()
            elif i % 50:
                data = damaged(json.dumps(document).encode(), rng)
            else:
                data = json.dumps(rng.choice(VALUES)).encode()
            put(tmp_path / "config.json", data)

            def use(config, build=i % 32 == 0):
                use_configuration(config, tmp_path / "again", build)

            loaded += attempt(lambda: HAMConfig.from_pretrained(tmp_path), use, data)
    assert loaded > CONFIGURATIONS / part / 10, "hardly anything passed: the mutations test nothing"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    HAMForCausalLM(HAMConfig(**SHAPE, layer_types=["hybrid", "full_attention"])).save_pretrained(folder)
    return folder


@seeds_and_parts
def test_checkpoints(checkpoint, seed, part):
    """Three of four have damaged weights, the others a changed configuration beside good weights."""
    rng = random.Random(2 + seed)
    weights, configuration = checkpoint / "model.safetensors", checkpoint / "config.json"
    whole, document = weights.read_bytes(), json.loads(configuration.read_text())
    names = sorted((document.keys() | OTHER_KEYS.keys()) - {"dtype"})
    loaded = 0
    with limits():
        for i in range(CHECKPOINTS // part):
            if i % 4:
                case = damaged_safetensors(whole, rng)
                put(weights, case)
            else:
                case = json.dumps(mutated(document, names, rng))
                put(configuration, case.encode())
            loaded += attempt(lambda: HAMForCausalLM.from_pretrained(checkpoint), run, case)
            put(weights, whole)
            put(configuration, json.dumps(document).encode())
    assert loaded > CHECKPOINTS / part / 10, "hardly anything passed: the mutations test nothing"


def signed(data):
    """A damaged cache with a checksum that fits, where it can be read at all: the other checks must stand alone."""
    try:
        tensors, header = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError):
        return data
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        return data
    metadata.pop("checksum", None)
    return save(tensors, metadata | {"checksum": checksum(tensors, metadata)})


@pytest.mark.parametrize("layer_types", [["hybrid", "linear_attention"], ["full_attention", "hybrid"]], ids=str)
@seeds_and_parts
def test_saved_caches(tmp_path, layer_types, seed, part):
    rng = random.Random(4 + seed)
    torch.manual_seed(0)
    model = HAMForCausalLM(HAMConfig(**SHAPE, layer_types=layer_types)).eval()
    cache = HAMCache(model.config)
    with torch.no_grad():
        model(torch.randint(0, 11, (2, 40)), cache=cache, threshold=0.5)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    whole = path.read_bytes()

    def assert_undamaged(loaded):
        for found, expected in zip(loaded.layers, cache.layers, strict=True):
            found, expected = found.state_dict(), expected.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)

    def use(cache):
        try:
            with torch.no_grad():
                model(torch.zeros(cache.batch_size, 1, dtype=torch.long), cache=cache)
        except ValueError as error:
            # The model and its dtype are known at the first use only.
            if not re.search("by a model with other weights|this call computes them in", str(error)):
                raise
            return
        assert cache.kept_tokens().shape == (2, cache.batch_size, 1)
        cache.prune(0.5)

    loaded = 0
    with limits():
        for _ in range(CACHES // 2 // part):
            data = damaged_safetensors(whole, rng)
            put(path, data)
            attempt(lambda: HAMCache.load(path, model.config), assert_undamaged, data)
            put(path, data := signed(data))
            loaded += attempt(lambda: HAMCache.load(path, model.config), use, data)
    assert loaded > CACHES / part / 100


def test_auto_config_differs_only_in_nesting(tmp_path):
    """`AutoConfig` reads the file before HAMConfig sees it; JSON without end is its own error there."""
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(RecursionError):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nested too deeply"):
        HAMConfig.from_pretrained(tmp_path)
