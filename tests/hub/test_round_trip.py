# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Models go to a Hub and come back by huggingface_hub's own client, also over connections that break in the middle."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import ham_hf
from tests.hub.loopback_hub import Cut, LoopbackHub

TINY = Path(ham_hf.__file__).parent / "checkpoints" / "ham-tiny"
# The client fetches pieces of 10 MiB and resumes after the last whole one: the larger shard has one and a bit.
SHARD_SIZE = "12MB"
PIECE = 10 * 2**20
LARGER_SHARD = "model-00001-of-00002.safetensors"

# Of every program here: what a user of a model sees, in a form that JSON can carry.
COMMON = """
import hashlib, json, sys, time
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

# The client waits for seconds before it tries again.
time.sleep = lambda seconds: None

def fingerprint(model, tokenizer):
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy())
    inputs = tokenizer("The captain looked at the sea, and", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, threshold=0.4)
    return [digest.hexdigest(), tokenizer.decode(output[0])]

def kept(model, tokenizer, **options):
    inputs = tokenizer("The captain looked at the sea, and", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, **options)
    return output.cache.kept_tokens().tolist()

def change(model):
    with torch.no_grad():
        model.model.layers[-1].mixer.o_proj.weight.neg_()
"""

PUBLISH = (
    COMMON
    + """
import ham_hf
from ham_hf import HAMConfig, HAMForCausalLM

api = HfApi()
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
small = HAMForCausalLM(HAMConfig(vocab_size=9, **sizes))
refusals = {}

def refused(name, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        refusals[name] = [type(error).__name__, status, str(error)]

load = HAMForCausalLM.from_pretrained
refused("wrong token", small.push_to_hub, "small", token="hf_wrong")
refused("nothing created", api.model_info, "someone/small")
refused("of another", small.push_to_hub, "else/small")
small.push_to_hub("small", private=True)
load("someone/small")
refused("private", load, "someone/small", token=False, cache_dir="empty")
refused("exists", api.create_repo, "someone/small")
refused("revision", load, "someone/small", revision="v2")
refused("repository", load, "someone/none")

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
seen = {"first": fingerprint(model, tokenizer)}
model.generation_config.threshold = 0.4
model.push_to_hub("ham", max_shard_size=sys.argv[2])
first = tokenizer.push_to_hub("ham").oid
api.create_tag("someone/ham", tag="v1", revision=first)

del model.generation_config.threshold
change(model)
seen["second"] = fingerprint(model, tokenizer)
model.push_to_hub("ham", max_shard_size=sys.argv[2])
code = open(f"{ham_hf.__path__[0]}/modeling_ham.py").read() + "EDITION = 2\\n"
second = api.upload_file(path_or_fileobj=code.encode(), path_in_repo="modeling_ham.py", repo_id="someone/ham").oid
model.push_to_hub("ham", max_shard_size=sys.argv[2], revision="draft")
assert api.whoami()["name"] == "someone"
files = api.list_repo_files("someone/ham", revision="v1")
print(json.dumps({"first": first, "second": second, "seen": seen, "files": files, "refusals": refusals}))
"""
)

# Its arguments: options of `from_pretrained`, once a time that the model is loaded.
READ = (
    COMMON
    + """
loads = []
for options in map(json.loads, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained("someone/ham", **options)
    options.pop("code_revision", None)
    tokenizer = AutoTokenizer.from_pretrained("someone/ham", **options)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Ahoy"}], tokenize=False)
    default = kept(model, tokenizer) == kept(model, tokenizer, threshold=0.4)
    module = sys.modules[type(model).__module__]
    edition = getattr(module, "EDITION", 1)
    loads.append({"seen": fingerprint(model, tokenizer), "chat": chat, "default": default})
    loads[-1] |= {"module": module.__name__, "edition": edition}
print(json.dumps(loads))
"""
)


def client(hub, **more):
    """The environment of a process whose Hub is this one."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"} | more


@dataclass
class Published:
    """The model on the Hub: two commits, what a user of either sees, and what was refused before there was any."""

    hub: LoopbackHub
    first: str
    second: str
    seen: dict
    files: list
    refusals: dict


@pytest.fixture(scope="module")
def published(tmp_path_factory, run_python):
    with LoopbackHub().serving() as hub:
        folder = tmp_path_factory.mktemp("publisher")
        yield Published(hub, **run_python(folder, PUBLISH, TINY, SHARD_SIZE, package=True, **client(hub)))


def test_a_push_holds_all_that_a_model_needs(published, code_files):
    shards = {LARGER_SHARD, "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    texts = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert set(published.files) == shards | texts | code_files | {"README.md", "config.json"}
    commit = published.hub.repositories["someone/ham"].commits[published.first]
    assert json.loads(commit["generation_config.json"].content)["threshold"] == 0.4
    assert len(commit[LARGER_SHARD].content) > PIECE
    assert published.seen["first"] != published.seen["second"]


def test_it_comes_back_as_it_was_by_branch_tag_and_commit(published, run_python, tmp_path):
    options = [{}, {"revision": "draft"}, {"revision": "v1"}, {"revision": published.first}]
    program = "import ham_hf\n" + READ
    loads = run_python(tmp_path, program, *map(json.dumps, options), package=True, **client(published.hub))
    for load, version in zip(loads, ("second", "second", "first", "first"), strict=True):
        assert load["seen"] == published.seen[version]
        assert load["default"] == (version == "first"), "the threshold in its generation configuration"
        assert load["module"] == "ham_hf.modeling_ham"
        assert load["chat"] == "Ahoy"


@pytest.mark.slow
def test_a_pinned_revision_has_the_weights_and_the_code_of_that_commit(published, run_python, tmp_path):
    """Without the package `revision` pins weights and code, `code_revision` the code alone."""
    expected = [
        ({"revision": published.first}, "first", 1),
        ({"revision": "main"}, "second", 2),
        ({"revision": published.second, "code_revision": published.first}, "second", 1),
    ]
    options = [json.dumps(options | {"trust_remote_code": True}) for options, *_ in expected]
    loads = run_python(tmp_path, READ, *options, **client(published.hub))
    for load, (_, version, edition) in zip(loads, expected, strict=True):
        assert load["seen"] == published.seen[version]
        assert load["edition"] == edition
        assert load["module"].startswith("transformers_modules.someone.ham.")


@pytest.mark.slow
def test_a_download_that_breaks_is_resumed_or_leaves_nothing(published, run_python, tmp_path):
    """The first version breaks once, after a whole piece; of the second one shard never comes to its end."""
    hub, first, second = published.hub, published.first, published.second
    hub.requests.clear()
    hub.cuts = [
        Cut(f"GET .*/resolve/{first}/{LARGER_SHARD}", after=PIECE + 1000),
        Cut(f"GET .*/resolve/{second}/model-00002", after=1000, times=1000),
    ]
    program = (
        COMMON
        + """
import ham_hf

def load(revision, **options):
    model = AutoModelForCausalLM.from_pretrained("someone/ham", revision=revision, **options)
    return fingerprint(model, AutoTokenizer.from_pretrained("someone/ham", revision=revision, **options))

outcome = {"first": load(sys.argv[1])}
for name, options in (("second", {}), ("offline", {"local_files_only": True})):
    try:
        outcome[name] = load(sys.argv[2], **options)
    except Exception as error:
        outcome[name] = type(error).__name__
print(json.dumps(outcome))
"""
    )
    outcome = run_python(tmp_path, program, first, second, package=True, **client(hub))
    assert outcome["first"] == published.seen["first"]
    assert [asked for *_, asked in hub.requests if asked] == [f"bytes={PIECE}-"]
    assert outcome["second"] in ("RemoteProtocolError", "OSError")
    assert outcome["offline"] == "OSError"
    snapshots = tmp_path / "home" / "hub" / "models--someone--ham" / "snapshots"
    commits = hub.repositories["someone/ham"].commits
    for path in snapshots.glob("*/*"):
        assert path.read_bytes() == commits[path.parent.name][path.name].content, path
    assert not (snapshots / second / "model-00002-of-00002.safetensors").exists()


@pytest.mark.slow
def test_an_upload_that_breaks_is_retried_or_leaves_the_commit_before(run_python, tmp_path):
    """A push shows whole or not at all, whether a file, every attempt at it, or the commit breaks in the middle."""
    program = (
        COMMON
        + """
import ham_hf

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
outcomes = []

def push(name):
    try:
        model.push_to_hub(name, max_shard_size=sys.argv[2])
        outcomes.append("pushed")
    except Exception as error:
        outcomes.append(type(error).__name__)
    return HfApi().model_info(f"someone/{name}").sha

model.save_pretrained("before", max_shard_size=sys.argv[2])
heads = {"retried": [push("retried")], "broken": [push("broken")], "halved": [push("halved"), push("halved")]}
change(model)
model.save_pretrained("after", max_shard_size=sys.argv[2])
heads["broken"] += [push("broken"), push("broken")]
print(json.dumps([outcomes, heads]))
"""
    )
    with LoopbackHub().serving() as hub:
        # The client tries to send a file six times, and a commit once. What the Hub has is not sent again, so that the
        # first push to the second repository sends no file.
        hub.cuts = [
            Cut("PUT /lfs/someone/retried/", after=10**6),
            Cut("PUT /lfs/someone/broken/", after=10**6, times=6),
            Cut("POST .*/someone/halved/commit/", after=10**4),
        ]
        outcomes, heads = run_python(tmp_path, program, TINY, SHARD_SIZE, package=True, **client(hub))
    assert [cut.times for cut in hub.cuts] == [0, 0, 0]
    errors = ("RuntimeError", "RemoteProtocolError", "ReadError", "WriteError")
    retried, broken, halved, halved_again, changed, changed_again = outcomes
    assert (retried, broken, halved_again, changed_again) == ("pushed",) * 4
    assert halved in errors
    assert changed in errors
    assert heads["broken"][0] == heads["broken"][1] != heads["broken"][2]

    def weights(name, sha):
        files = hub.repositories[f"someone/{name}"].commits[sha]
        return {path: file.content for path, file in files.items() if path.endswith(".safetensors")}

    def saved(folder):
        return {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.safetensors")}

    assert weights("retried", heads["retried"][0]) == weights("broken", heads["broken"][0]) == saved("before")
    assert weights("broken", heads["broken"][2]) == saved("after") != saved("before")
    assert not hub.repositories["someone/halved"].commits[heads["halved"][0]]
    assert weights("halved", heads["halved"][1]) == saved("before")
    assert [len(hub.repositories[f"someone/{name}"].commits) for name in ("retried", "broken", "halved")] == [2, 3, 2]


def test_what_the_hub_refuses(published):
    """A wrong token creates nothing; a private model is its owner's; what is missing is named."""
    refusals = published.refusals
    assert {name: refusal[:2] for name, refusal in refusals.items()} == {
        "wrong token": ["HfHubHTTPError", 401],
        "nothing created": ["RepositoryNotFoundError", 404],
        "of another": ["HfHubHTTPError", 403],
        "private": ["OSError", None],
        "exists": ["HfHubHTTPError", 409],
        "revision": ["OSError", None],
        "repository": ["OSError", None],
    }
    for name, said in (("revision", "v2"), ("repository", "someone/none"), ("private", "someone/small")):
        assert said in refusals[name][2]
    assert list(published.hub.repositories) == ["someone/small", "someone/ham"]
