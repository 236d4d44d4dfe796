# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A source on the Hub is read at the commit that was asked for, without its weights in other formats."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hub.loopback_hub import LoopbackHub

SCRIPT = Path(__file__).parents[2] / "conversion_scripts/convert_transformer_to_ham.py"

# Two versions of a model, and a card whose licence only the second has.
PUBLISH = """
import json, pathlib, torch
from huggingface_hub import HfApi
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=None
)
api, folder = HfApi(), pathlib.Path("source")
api.create_repo("someone/llama")
commits = []
for license in ("mit", "apache-2.0"):
    torch.manual_seed(len(commits))
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\\nlicense: {license}\\n---\\n")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights")
    commits.append(api.upload_folder(repo_id="someone/llama", folder_path=folder).oid)
api.create_tag("someone/llama", tag="v1", revision=commits[0])
print(json.dumps(commits))
"""
CONVERT = """
import json, runpy, sys

script, calls = sys.argv[1:]
codes = []
for arguments in json.loads(calls):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps(codes))
"""


REFUSED = """
import contextlib, io, json, runpy, sys

script, calls = sys.argv[1:]
said = []
for arguments in json.loads(calls):
    sys.argv = [script, *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            said.append([stop.code, error.getvalue().splitlines()[-1]])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory, run_python):
    """The Hub, the environment of a process that uses it, and the commits of both versions."""
    with LoopbackHub().serving() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        yield hub, environment, run_python(tmp_path_factory.mktemp("publisher"), PUBLISH, **environment)


@pytest.mark.slow
def test_gated_missing_and_misnamed_repositories_are_told_apart(published, run_python, tmp_path):
    """Each with what to do about it; the Hub does not tell a missing one from another's private one."""
    hub, environment, _ = published
    hub.repositories["someone/gated"] = replace(hub.repositories["someone/llama"], gated=True)
    calls = [
        ["someone/gated", "a"],
        ["someone/none", "b"],
        ["someone/llama", "c", "--revision", "v9"],
        ["./someone", "d"],
    ]
    said = run_python(tmp_path, REFUSED, SCRIPT, json.dumps(calls), package=True, **environment)
    without_token = {"HF_ENDPOINT": hub.url}
    said += run_python(tmp_path, REFUSED, SCRIPT, json.dumps(calls[:2]), package=True, **without_token)
    assert [code for code, _ in said] == [2] * 6
    gated, missing, revision, misnamed, gated_unknown, missing_unknown = (line for _, line in said)
    for line in (gated, gated_unknown):
        assert "someone/gated is gated" in line
        assert f"Ask for access on its page, {hub.url}/someone/gated" in line
        assert "hf auth login" in line
    for line in (missing, missing_unknown):
        assert "no repository of that name, or a private one" in line
        assert "gated" not in line
    assert "`--revision` must be a branch, tag or commit of someone/llama, got 'v9'" in revision
    assert "must be a folder, or OWNER/NAME on the Hub, got './someone', which is neither" in misnamed


def test_a_revision_of_a_source_on_the_hub(published, run_python, tmp_path):
    hub, environment, (first, second) = published
    hub.requests.clear()
    calls = [["someone/llama", "old", "--revision", "v1"], ["someone/llama", "new"], ["someone/none", "none"]]
    codes = run_python(tmp_path, CONVERT, SCRIPT, json.dumps(calls), package=True, **environment)
    assert codes == [0, 0, 2]
    assert hub.requests
    assert "consolidated" not in str(hub.requests)
    for folder, commit, license_name in (("old", first, "mit"), ("new", second, "apache-2.0")):
        source = json.loads((tmp_path / folder / "conversion.json").read_text())["source"]
        assert (source["name"], source["commit"]) == ("someone/llama", commit)
        card = (tmp_path / folder / "README.md").read_text()
        assert f"license: {license_name}" in card
        assert "base_model: someone/llama" in card
        assert f"commit `{commit}`" in card
