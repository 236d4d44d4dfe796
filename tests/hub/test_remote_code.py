# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A saved HAM loads, generates and is saved again where `ham_hf` is not installed, by the code that lies beside it."""

import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import ham_hf
from ham_hf import HAMConfig, HAMForCausalLM, loading_ham

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ham_hf.__file__).parent
TINY = PACKAGE / "checkpoints" / "ham-tiny"
OLDEST = os.environ.get("HAM_OLDEST_TRANSFORMERS")
MODELS = {
    "AutoModel": "HAMModel",
    "AutoModelForCausalLM": "HAMForCausalLM",
    "AutoModelForQuestionAnswering": "HAMForQuestionAnswering",
    "AutoModelForSequenceClassification": "HAMForSequenceClassification",
    "AutoModelForTokenClassification": "HAMForTokenClassification",
}


def code_in(folder):
    return {path.name for path in folder.glob("*.py")}


def observe(model, tokenizer):
    """Observes a loaded model as its user; the source of this function also runs without `ham_hf`."""
    inputs = tokenizer("The captain looked at the sea, and", return_tensors="pt", return_token_type_ids=False)
    settings = [{}, {"threshold": 0}, {"threshold": 0.5}, {"threshold": 2}, {"kv_usage": 0.25}, {"kv_budget": 4}]
    texts, kept = [], []
    for setting in settings:
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **setting)
        texts.append(tokenizer.decode(output.sequences[0]))
        kept.append(output.cache.kept_tokens().tolist())
    continued = model.generate(output.sequences, max_new_tokens=4, do_sample=False, cache=output.cache)
    texts.append(tokenizer.decode(continued[0]))
    cache = type(output.cache)
    logits = [x.hex() for x in model(**inputs).logits[0, -1].tolist()]
    return {"texts": texts, "kept": kept, "logits": logits}, f"{cache.__module__}.{cache.__name__}"


STRANGER = f"""
import json
import sys

import huggingface_hub
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

{inspect.getsource(observe)}

source, copy = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(source)
    refusal = None
except ValueError as error:
    refusal = str(error)
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
seen, cache = observe(model, tokenizer)
loaded = {{}}
for name in {list(MODELS)}:
    loaded[name] = type(getattr(transformers, name).from_pretrained(source, trust_remote_code=True)).__name__
model.save_pretrained(copy)
tokenizer.save_pretrained(copy)
versions = {{"transformers": transformers.__version__, "huggingface_hub": huggingface_hub.__version__}}
hidden = not any(name.partition(".")[0] in ("ham_hf", "ham_kernels") for name in sys.modules)
# On a line of its own: the question whether to trust the code has no end of line.
print()
print(json.dumps({{"refusal": refusal, "seen": seen, "cache": cache, "classes": loaded, "versions": versions,
                  "config": type(config).__module__, "hidden": hidden}}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "ham-tiny"
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The observations with the package."""
    return observe(AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint))[0]


def oldest_supported(package):
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(re.search(r">=([\d.]+)", line)[1] for line in requirements if line.startswith(package))


@pytest.fixture(params=["newest", pytest.param("oldest", marks=pytest.mark.slow)])
def release(request):
    """The versions a process is to find, the installed ones or the oldest supported, and the environment for that."""
    packages = ("transformers", "huggingface_hub")
    if request.param == "newest":
        if Version(version("transformers")).release[:2] < loading_ham.NEWEST_TRANSFORMERS:
            pytest.skip("these tests run on an older release themselves")
        return {package: version(package) for package in packages}, {}
    if OLDEST is None or not Path(OLDEST).is_dir():
        pytest.skip(f"HAM_OLDEST_TRANSFORMERS={OLDEST} is no folder: `make .venv/oldest/.installed` fills it")
    return {package: oldest_supported(package) for package in packages}, {"PYTHONPATH": OLDEST}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_runs_without_the_package_and_is_saved_again(
    processes, checkpoint, expected, release, run_python, tmp_path, code_files
):
    """The second process loads what the first one saved; both see what the package gives, to the bit."""
    assert len(set(expected["texts"])) > 3, "the settings should not all give one text"
    versions, environment = release
    folders = [checkpoint, tmp_path / "copy", tmp_path / "copy of the copy"][: processes + 1]
    for source, copy in itertools.pairwise(folders):
        result = run_python(tmp_path, STRANGER, source, copy, HF_HUB_OFFLINE="1", **environment)
        assert result["hidden"]
        for package, found in result["versions"].items():
            assert Version(found).release[:2] == Version(versions[package]).release[:2]
        assert "trust_remote_code=True" in result["refusal"]
        assert result["seen"] == expected
        assert re.fullmatch(r"transformers_modules\..*\.cache_ham\.HAMCache", result["cache"])
        assert result["config"].startswith("transformers_modules.")
        assert result["classes"] == MODELS
        assert code_in(copy) == code_files
        assert all((copy / name).read_bytes() == (PACKAGE / name).read_bytes() for name in code_files)


SIGNATURES = """
import inspect, json, sys
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator

owners = (GenerationMixin, PreTrainedModel, AssistedCandidateGenerator)
found = {}
for name in json.loads(sys.argv[1]):
    owner, _, method = name.partition(".")
    function = getattr(next(x for x in owners if x.__name__ == owner), method, None)
    # Its decorators name a parameter in two ways.
    found[name] = None if function is None else str(list(inspect.signature(inspect.unwrap(function)).parameters))
print(json.dumps(found))
"""
# The parameters of what is overridden, or called, though it is not for that: {cache} is this release's name of it.
PRIVATE = {
    "GenerationMixin.adjust_generation_fn": "self generation_config from_auto_class from_pipeline "
    "pretrained_model_name_or_path cache_dir force_download proxies local_files_only token revision subfolder "
    "trust_remote_code kwargs",
    "GenerationMixin._prepare_generation_config": "self generation_config kwargs",
    "GenerationMixin._get_candidate_generator": "self generation_config input_ids inputs_tensor logits_processor "
    "model_kwargs assistant_model target_tokenizer assistant_tokenizer",
    "GenerationMixin._prepare_cache_for_generation": "self generation_config model_kwargs generation_mode batch_size "
    "max_cache_length",
    "GenerationMixin._valid_auto_compile_criteria": "self model_kwargs generation_config",
    "PreTrainedModel.get_compiled_call": "self compile_config",
    "GenerationMixin._sample": "self input_ids logits_processor stopping_criteria generation_config synced_gpus "
    "streamer model_kwargs",
    "GenerationMixin._assisted_decoding": "self input_ids logits_processor stopping_criteria generation_config "
    "synced_gpus streamer inputs_tensor assistant_model assistant_tokenizer tokenizer model_kwargs",
    "GenerationMixin._expand_inputs_for_generation": "{self} expand_size is_encoder_decoder input_ids model_kwargs",
    "AssistedCandidateGenerator.__init__": "self input_ids assistant_model generation_config model_kwargs "
    "inputs_tensor logits_processor",
    "PreTrainedModel._load_pretrained_model": "model state_dict checkpoint_files load_config expected_keys",
    "PreTrainedModel._load_and_finalize_distributed_pretrained_model": "self distributed_checkpoint_dir device_map "
    "device_mesh",
    "PreTrainedModel._init_weights": "self module",
}


def test_private_methods_have_the_signatures_that_overrides_rely_on(release, run_python, tmp_path):
    versions, environment = release
    found = run_python(tmp_path, SIGNATURES, json.dumps(list(PRIVATE)), **environment)
    oldest = Version(versions["transformers"]) < Version("5.23")
    expected = dict(PRIVATE)
    expected["GenerationMixin._expand_inputs_for_generation"] = PRIVATE[
        "GenerationMixin._expand_inputs_for_generation"
    ].format(self="" if oldest else "self")
    expected = {name: str(parameters.split()) for name, parameters in expected.items()}
    if oldest:
        expected["PreTrainedModel._load_and_finalize_distributed_pretrained_model"] = None
    assert found == expected


def test_private_methods_are_overridden_in_two_files():
    """In those of generation and of loading, and they are among those whose signatures are held."""
    held = {name.partition(".")[2] for name in PRIVATE}
    for path in sorted(PACKAGE.glob("*_ham.py")):
        module = importlib.import_module(f"ham_hf.{path.stem}")
        classes = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
        for cls in classes:
            private = {
                name
                for name, x in vars(cls).items()
                if name.startswith("_")
                and not hasattr(torch.nn.Module, name)
                and (inspect.isfunction(x) or isinstance(x, (staticmethod, classmethod)))
                and any(hasattr(base, name) for base in (GenerationMixin, PreTrainedModel))
            }
            assert private <= held, (cls, private - held)
            if path.stem not in ("generation_ham", "loading_ham"):
                assert private <= {"_init_weights"}, (cls, private)


UNTESTED = """
import json, logging, sys
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM

# With all imported: meanwhile Transformers puts another module in its place.
sys.modules["transformers"].__version__ = sys.argv[1]

class Told(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

told = []
logging.getLogger("transformers").addHandler(Told())
names = set()
for source in sys.argv[2:]:
    for _ in range(2):
        names.add(type(AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)).__module__)
print()
print(json.dumps([[message for message in told if message.startswith("HAM was tested")], len(names)]))
"""


@pytest.mark.slow
def test_untested_releases_are_told_of_once(checkpoint, run_python, tmp_path):
    """By the code of two checkpoints, which is loaded as two modules, and by each model that is made."""
    copy = tmp_path / "other"
    shutil.copytree(checkpoint, copy)
    with (copy / "modeling_ham.py").open("a", encoding="utf-8") as file:
        file.write("# Another version of the code.\n")
    messages, modules = run_python(tmp_path, UNTESTED, "5.25.0", checkpoint, copy, HF_HUB_OFFLINE="1")
    assert modules == 2
    assert messages == [
        "HAM was tested with Transformers 5.17 to 5.24, and this is 5.25.0. If anything fails, install a tested "
        "release, or newer code of HAM."
    ]


@pytest.mark.parametrize(
    ("found", "warns"),
    [
        ("5.16.2", True),
        ("5.17.0", False),
        ("5.24.9", False),
        ("5.25.0.dev0", True),
        ("5.100.0", True),
        ("6.0.0", True),
        ("4.99.1", True),
    ],
)
def test_releases_that_are_untested(tiny_config, monkeypatch, found, warns):
    told = []
    monkeypatch.setattr(loading_ham.transformers, "__version__", found)
    monkeypatch.setattr(logging.getLogger("transformers"), "warning_once", told.append, raising=False)
    HAMForCausalLM(tiny_config())
    assert [message.startswith("HAM was tested with Transformers 5.17 to 5.24") for message in told] == [True] * warns


def test_the_tested_releases_are_those_that_are_installed():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest, newest = loading_ham.OLDEST_TRANSFORMERS, loading_ham.NEWEST_TRANSFORMERS
    bounds = f"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    assert [line for line in requirements if line.startswith("transformers")] == [bounds]


@pytest.mark.parametrize("name", MODELS.values())
def test_every_model_is_saved_with_its_code(name, tiny_config, tmp_path, code_files):
    config = tiny_config()
    # Of a repository whose code lies in another one; what is saved here has its own.
    config.auto_map = {"AutoModel": "someone/code--modeling_ham.HAMModel"}
    getattr(ham_hf, name)(config).save_pretrained(tmp_path)
    assert code_in(tmp_path) == code_files
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    models = {auto: f"modeling_ham.{model}" for auto, model in MODELS.items()}
    assert auto_map == models | {"AutoConfig": "configuration_ham.HAMConfig"}


def test_a_configuration_is_saved_with_the_code_of_the_models(tiny_config, tmp_path, code_files):
    tiny_config().save_pretrained(tmp_path)
    assert code_in(tmp_path) == code_files


def test_a_class_of_ones_own_keeps_its_entry(tiny_config, tmp_path, code_files):
    """An Auto class loads the class that a user registered for it; the others load HAM's."""
    (tmp_path / "own_model.py").write_text("from ham_hf import HAMModel\n\n\nclass OwnModel(HAMModel):\n    pass\n")
    spec = importlib.util.spec_from_file_location("own_model", tmp_path / "own_model.py")
    module = sys.modules["own_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OwnModel.register_for_auto_class("AutoModel")
    module.OwnModel(tiny_config()).save_pretrained(tmp_path / "saved")
    del sys.modules["own_model"]
    assert code_in(tmp_path / "saved") == code_files | {"own_model.py"}
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "own_model.OwnModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling_ham.HAMForCausalLM"


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_installed_package_wins_without_a_question(trust, checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody should be asked"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust)
        AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust)
    assert type(model) is HAMForCausalLM
    assert type(config) is HAMConfig
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_checkpoint_of_the_trainer_carries_the_code_and_resumes(tiny_config, tmp_path, code_files):
    rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 4
    options = {"output_dir": str(tmp_path), "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(HAMForCausalLM(tiny_config()), TrainingArguments(max_steps=1, **options), train_dataset=rows).train()
    assert code_in(tmp_path / "checkpoint-1") == code_files
    resumed = Trainer(HAMForCausalLM(tiny_config()), TrainingArguments(max_steps=2, **options), train_dataset=rows)
    assert resumed.train(resume_from_checkpoint=True).global_step == 2
    assert code_in(tmp_path / "checkpoint-2") == code_files


@pytest.mark.slow
def test_under_fsdp_the_model_is_saved_and_not_the_class_that_pytorch_made_of_it(run_python, tmp_path, code_files):
    """FSDP derives a class of its own from the model's; Transformers would save the file that defines it."""
    program = """
import json, os, sys
import torch
from torch.distributed import device_mesh, fsdp
from ham_hf import HAMConfig, HAMForCausalLM

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
model = HAMForCausalLM(HAMConfig(vocab_size=9, **sizes))
# As after loading by an Auto class with trust_remote_code=True.
model.register_for_auto_class("AutoModelForCausalLM")
weights = model.state_dict()
fsdp.fully_shard(model, mesh=device_mesh.init_device_mesh("cpu", (1,)))
model.save_pretrained(sys.argv[1] + "/saved", state_dict=weights)
torch.distributed.destroy_process_group()
print(json.dumps(type(model).__name__))
"""
    assert run_python(tmp_path, program, tmp_path, package=True) == "FSDPHAMForCausalLM"
    assert code_in(tmp_path / "saved") == code_files
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_ham.HAMForCausalLM"
