# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint from a stranger runs no code, takes no memory beyond its size, and writes and calls nowhere."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ham_hf
import ham_kernels
from ham_hf import HAMCache, HAMConfig, HAMForCausalLM, HAMForSequenceClassification, HAMModel
from model_cards.ham_tiny import train as ham_tiny

ROOTS = [Path(ham_hf.__file__).parent, Path(ham_kernels.__file__).parent]
CHECKPOINT = ROOTS[0] / "checkpoints" / "ham-tiny"
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and measures memory as Linux does")

# --- nothing is unpickled --------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load", "yaml.load"}


def test_our_code_unpickles_and_evaluates_nothing():
    files = [file for root in ROOTS for file in root.rglob("*.py") if "checkpoints" not in file.parts]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert UNPICKLERS.isdisjoint(name.split(".")[0] for name in modules), f"{file}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{file}:{node.lineno}"


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant(path, mark, kind):
    state = {"lm_head.weight": Planted(mark), "step": Planted(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")


def test_the_planted_pickles_work(tmp_path):
    plant(tmp_path / "x.bin", tmp_path / "mark", "zip")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.fixture
def folder(tmp_path, tiny_config):
    """A checkpoint in a folder of its own."""
    HAMForCausalLM(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_index(folder, shard, metadata):
    (folder / "model.safetensors").unlink()
    index = {"metadata": metadata, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_a_bin(folder):
    (folder / "model.safetensors").unlink()
    return "pytorch_model.bin"


def index_of_bins(folder):
    write_index(folder, "evil.bin", {"dtype": "float32"})
    return "evil.bin"


def index_of_bins_without_a_dtype(folder):
    """Transformers looks into the first shard for a dtype, with its restricted unpickler, before we see the names."""
    write_index(folder, "evil.bin", {})
    edit(folder, dtype=None)
    return "evil.bin"


def named_in_the_configuration(folder):
    edit(folder, transformers_weights="adapter_model.bin", dtype=None)
    return "adapter_model.bin"


@pytest.mark.parametrize("kind", ["pickle", "zip", "old zip"])
@pytest.mark.parametrize(
    ("arrange", "error", "message"),
    [
        (only_a_bin, OSError, r"no file named model\.safetensors"),
        (index_of_bins, ValueError, "safetensors files only, got .*evil"),
        (named_in_the_configuration, ValueError, "`transformers_weights` must name safetensors"),
        (index_of_bins_without_a_dtype, pickle.UnpicklingError, "[Ww]eights.only"),
    ],
)
def test_a_planted_pickle_is_not_run(folder, tmp_path, arrange, error, message, kind):
    plant(folder / arrange(folder), tmp_path / "mark", kind)
    for auto in (HAMForCausalLM, AutoModelForCausalLM):
        with pytest.raises(error, match=message):
            auto.from_pretrained(folder)
    assert not (tmp_path / "mark").exists()


def test_pickles_beside_good_weights_are_not_read(folder, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        plant(folder / name, tmp_path / "mark", "zip")
    HAMForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "mark").exists()


def test_saved_caches_and_training_states_are_no_pickles(tiny_config, tmp_path):
    plant(tmp_path / "planted", tmp_path / "mark", "pickle")
    with pytest.raises(ValueError, match="is not a cache"):
        HAMCache.load(tmp_path / "planted", tiny_config())
    with pytest.raises(Exception, match=r"[Hh]eader"):
        ham_tiny.load_state(tmp_path / "planted", HAMForCausalLM(tiny_config()), [], ham_tiny.Recipe())
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("argument", ["use_safetensors", "weights_only"])
def test_pickles_cannot_be_asked_for(folder, argument):
    with pytest.raises(ValueError, match=rf"`{argument}` must not be False: .*Convert them once"):
        HAMForCausalLM.from_pretrained(folder, **{argument: False})


def test_the_advice_on_conversion_works(folder):
    """The error tells how to convert weights that are not safetensors."""
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(expected, path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        HAMForCausalLM.from_pretrained(folder)
    save_file(torch.load(path, weights_only=True), folder / "model.safetensors", metadata={"format": "pt"})
    loaded = HAMForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())


# --- sizes and shapes ------------------------------------------------------------------------------------------------


def test_the_largest_models_pass():
    """Twice the largest that were published, in each dimension."""
    with torch.device("meta"):
        config = HAMConfig(
            vocab_size=600_000,
            hidden_size=32768,
            intermediate_size=131072,
            num_hidden_layers=256,
            num_attention_heads=256,
            num_key_value_heads=16,
            head_dim=256,
            max_position_embeddings=20_000_000,
            rope_parameters={"rope_type": "yarn", "rope_theta": 1e8, "factor": 64, "beta_fast": 32},
        )
        assert HAMConfig.from_dict(config.to_dict()).num_hidden_layers == 256
        HAMModel(HAMConfig.from_dict(config.to_dict() | {"num_hidden_layers": 2, "layer_types": ["hybrid"] * 2}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9, "layer_types": None}, "`num_hidden_layers` must be at most"),
        ({"vocab_size": 10**12}, "`vocab_size` must be at most"),
        ({"layer_types": ["hybrid"] * 10**4}, "`layer_types` must have one entry per layer"),
        ({"num_labels": 10**9}, "`num_labels` must be between 0 and"),
        ({"to_dict": 1}, "`to_dict` is part of the code"),
        ({"model_type": "llama"}, "`model_type` must be 'ham', got 'llama'"),
        ({"text_config": {}}, "`text_config` must be left out"),
        ({"attn_implementation": "someone/kernels"}, "`attn_implementation` must name no repository"),
        ({"transformers_weights": "x.bin"}, "`transformers_weights` must name safetensors or their index"),
        ({"dtype": "load"}, "`dtype` must be a floating-point type"),
        ({"dtype": None, "torch_dtype": 1}, "`torch_dtype` must be a floating-point type"),
        ({"auto_map": 5}, "auto_map"),
        ({"id2label": [1]}, "id2label"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_no_configuration_may_ask_for(folder, changes, message):
    edit(folder, **changes)
    for auto in (HAMConfig, HAMForCausalLM):
        with pytest.raises(Exception, match=message):
            auto.from_pretrained(folder)


def test_tolerated_differences_stay_tolerated(folder, tiny_config):
    """Many of the parameters may be missing, and more than enough of them may be there."""
    HAMForSequenceClassification.from_pretrained(folder, num_labels=2000)
    HAMForCausalLM.from_pretrained(folder, vocab_size=150, ignore_mismatched_sizes=True)
    HAMForCausalLM.from_pretrained(folder, num_hidden_layers=1, layer_types=["hybrid"])
    HAMForCausalLM.from_pretrained(folder, num_hidden_layers=3, layer_types=["hybrid"] * 3)
    with pytest.raises(ValueError, match=r"asks for \d+ parameters, the files hold \d+"):
        HAMForCausalLM.from_pretrained(folder, vocab_size=2**18, ignore_mismatched_sizes=True)
    state = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, folder / "model.safetensors", {"format": "pt"})
    HAMForCausalLM.from_pretrained(folder)  # which Transformers tells what is missing
    loaded = HAMForCausalLM.from_pretrained(None, config=tiny_config(), state_dict=state)
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])


def test_shards_lie_beside_their_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name files beside it, got '\.\./outside\.safetensors'"):
        HAMForCausalLM.from_pretrained(folder)
    index["weight_map"] = {"lm_head.weight": "missing.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=r"missing\.safetensors"):
        HAMForCausalLM.from_pretrained(folder)


def test_the_shards_of_several_ranks_are_measured_too(folder):
    """A file of such a name makes Transformers take memory for the whole model before it reads anything."""
    weights = folder / "model.safetensors"
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(weights.read_bytes())
    expected = load_file(weights)
    loaded = HAMForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())
    edit(folder, vocab_size=2**28)
    with pytest.raises(ValueError, match=r"asks for \d+ parameters, the files hold \d+"):
        HAMForCausalLM.from_pretrained(folder)


HOSTILE = """
import json, resource, sys, time
from pathlib import Path
import transformers
from ham_hf import HAMCache, HAMConfig, HAMForCausalLM

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
transformers.logging.set_verbosity_error()
HAMForCausalLM.from_pretrained(folder)  # what this imports is not counted
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
weights, configuration = folder / "model.safetensors", folder / "config.json"
whole, document, saved = weights.read_bytes(), json.loads(configuration.read_text()), cache.read_bytes()
config = HAMConfig.from_pretrained(folder)


def with_header(data, change):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def attempt(name, load):
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        load()
        error = ""
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"[:300]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024
    print(json.dumps([name, error, time.process_time() - begin, grown]))


wide = {"hidden_size": 2**20, "vocab_size": 2**28, "intermediate_size": 2**24, "num_attention_heads": 2**16}
for changes in (
    {"num_hidden_layers": 10**9, "layer_types": None},
    {"num_hidden_layers": 512, "layer_types": None},
    {"num_hidden_layers": 512, "layer_types": None, **wide},
    {"layer_types": ["hybrid"] * 10**6},
    {"vocab_size": 10**12},
    {"vocab_size": 2**28},
    {"hidden_size": 10**9},
    {"num_attention_heads": 10**8},
    {"head_dim": 2**16},
    {"conv_kernel_size": 10**9},
    {"router": "learned", "router_hidden_size": 2**20},
    {"num_labels": 10**9},
    {"max_position_embeddings": 10**18},
    wide,
):
    configuration.write_text(json.dumps(document | changes))
    attempt(str(changes)[:60], lambda: HAMForCausalLM.from_pretrained(folder))
configuration.write_text(json.dumps(document))


def claim(shape):
    def change(header):
        header["lm_head.weight"]["shape"] = shape
    return change


def stretch(header):
    begin = header["lm_head.weight"]["data_offsets"][0]
    header["lm_head.weight"] = {"dtype": "F32", "shape": [2**38], "data_offsets": [begin, begin + 2**40]}


def stretch_counts(header):
    header["0.counts"]["shape"] = [2**40]


for change in (claim([10**12, 10**9]), claim([2**62, 2**62]), claim([1]), stretch):
    weights.write_bytes(with_header(whole, change))
    attempt("weights", lambda: HAMForCausalLM.from_pretrained(folder))
for length in (2**40, 2**63, len(whole)):
    weights.write_bytes(length.to_bytes(8, "little") + whole[8:])
    attempt("length of weights", lambda: HAMForCausalLM.from_pretrained(folder))
weights.write_bytes(whole)


def rich(header):
    header["__metadata__"]["seen_tokens"] = str(2**40)


for change in (stretch_counts, rich):
    cache.write_bytes(with_header(saved, change))
    attempt("cache", lambda: HAMCache.load(cache, config))
from safetensors import safe_open
from safetensors.torch import load_file, save_file
cache.write_bytes(saved)
tensors = load_file(cache)
metadata = safe_open(cache, framework="pt").metadata()
tensors["0.counts"][:] = 2**60
save_file(tensors, cache, metadata=metadata)
attempt("counts of the cache", lambda: HAMCache.load(cache, config))
"""
CLEAN = ("ValueError", "OSError", "SafetensorError", "StrictDataclass")


@pytest.mark.slow
@linux
def test_hostile_sizes_end_quickly_and_take_no_memory(folder, tmp_path, tiny_config):
    """With a GiB to spare, each is refused within seconds and a fraction of it."""
    cache = HAMCache(tiny_config())
    HAMForCausalLM(tiny_config()).eval()(torch.randint(1, 97, (2, 20)), cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    command = [sys.executable, "-c", HOSTILE, str(folder), str(tmp_path / "cache.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 24, done.stderr
    for name, error, seconds, mebibytes in cases:
        assert error.startswith(CLEAN), (name, error)
        assert seconds < 5, (name, seconds)
        assert mebibytes < 128, (name, mebibytes)


# --- no network, no writes elsewhere ---------------------------------------------------------------------------------

WATCHED = """
import json, os, sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class"}
stage, seen = "import", []


def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        seen.append([stage, event, str(arguments[0])])
    elif event in CHANGES:
        seen.extend([stage, event, os.path.abspath(os.fsdecode(x))] for x in arguments if isinstance(x, (str, bytes)))
    elif event in RUNS or event.startswith("socket."):
        seen.append([stage, event, ""])


sys.addaudithook(watch)
import torch, transformers
import ham_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

path, target = sys.argv[1:]
stage = "load"
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
ham_hf.HAMForCausalLM.from_pretrained(path, threshold=0.4)
stage = "generate"
cache = ham_hf.HAMCache(model.config)
inputs = tokenizer("The sea", return_tensors="pt", return_token_type_ids=False)
model.generate(**inputs, max_new_tokens=4, cache=cache, kv_usage=0.5)
stage = "save"
model.save_pretrained(target)
tokenizer.save_pretrained(target)
cache.save(target + "/cache.safetensors")
ham_hf.HAMCache.load(target + "/cache.safetensors", model.config)
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_no_network_and_no_write_elsewhere(tmp_path):
    """From the import to the saved model; torch itself tries the temporary folder out, and keeps a cache there."""
    places = {name: tmp_path / name for name in ("home", "tmp", "here", "target")}
    for place in places.values():
        place.mkdir()
    environment = {
        name: x for name, x in os.environ.items() if not name.startswith(("HF_", "XDG_", "TORCH", "TRITON_"))
    }
    environment |= {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(root.parent) for root in ROOTS)
    command = [sys.executable, "-c", WATCHED, str(CHECKPOINT), str(places["target"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=places["here"], timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert any(stage == "save" and path.startswith(str(places["target"])) for stage, _, path in seen)
    for stage, event, path in seen:
        allowed = {"import": [places["tmp"], "/dev/null"], "save": [places["target"]]}.get(stage, [])
        assert path.startswith(tuple(map(str, allowed))) if allowed else False, (stage, event, path)
    assert not list(places["home"].rglob("*"))
    assert not list(places["here"].rglob("*"))
