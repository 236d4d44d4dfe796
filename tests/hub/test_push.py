# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A push sends one commit with weights, code and a card, and loses nobody's card."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel

from ham_hf import HAMForCausalLM, HAMPreTrainedModel
from ham_hf.hub.card import MARKER
from ham_hf.hub.push import push_folder

HAM_TINY = Path(__file__).parents[2] / "ham_hf/checkpoints/ham-tiny"
SOMEONES_CARD = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n"


class FakeHub:
    """Stands for the Hub behind the methods of `HfApi`, and remembers what was sent."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []
        self.commits = []
        self.card = None
        self.refused_branches = False

    def create_repo(self, api, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private, api.token))
        assert exist_ok
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, api, repo_id, *, branch, exist_ok=False):
        self.calls.append(("create_branch", repo_id, branch))
        assert exist_ok
        if self.refused_branches:
            # The HTTP library behind it goes by different names in the supported releases.
            response = SimpleNamespace(status_code=403, headers={}, request=None)
            raise HfHubHTTPError("forbidden", response=response)

    def file_exists(self, api, repo_id, filename, *, revision=None):
        assert filename == "README.md"
        self.calls.append(("file_exists", repo_id, revision))
        return self.card is not None

    def hf_hub_download(self, api, repo_id, filename, *, revision=None):
        (self.folder / filename).write_text(self.card)
        return self.folder / filename

    def create_commit(self, api, repo_id, operations, **arguments):
        files = {}
        for x in operations:
            with x.as_file() as file:
                assert x.path_in_repo not in files
                files[x.path_in_repo] = file.read()
        self.commits.append(SimpleNamespace(repo_id=repo_id, files=files, **arguments))
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0123",
            commit_message=arguments["commit_message"],
            commit_description="",
            oid="0123",
        )

    def sent(self):
        """The one commit."""
        (commit,) = self.commits
        commit.card = ModelCard(commit.files["README.md"].decode())
        return commit


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    hub = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "create_branch", "file_exists", "hf_hub_download", "create_commit"):
        method = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda api, *args, _method=method, **kwargs: _method(api, *args, **kwargs))
    return hub


@pytest.fixture
def model(tiny_config):
    return HAMForCausalLM(tiny_config())


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(HAM_TINY, tmp_path / "folder")


def test_a_model_is_pushed_with_its_card_and_its_code(hub, model):
    model.add_model_tags("story")
    arguments = {"private": True, "token": "hf_x", "commit_message": "First", "commit_description": "Why", "tags": "z"}
    url = model.push_to_hub("my-ham", **arguments)
    commit = hub.sent()
    assert hub.calls[0] == ("create_repo", "my-ham", True, "hf_x")
    assert (commit.repo_id, commit.commit_message, commit.commit_description) == ("me/my-ham", "First", "Why")
    assert (commit.revision, commit.create_pr) == (None, False)
    assert str(url) == "https://huggingface.co/me/my-ham/commit/0123"
    assert {"config.json", "model.safetensors", "configuration_ham.py", "modeling_ham.py"} <= set(commit.files)
    assert MARKER in commit.card.text
    assert commit.card.text.count('"me/my-ham"') == 4
    assert commit.card.data.tags[-2:] == ["story", "z"]
    assert f"{sum(x.numel() for x in model.parameters()):,} parameters" in commit.card.text


def test_large_models_are_pushed_in_shards(hub, model):
    model.push_to_hub("me/my-ham", max_shard_size="20KB")
    files = hub.sent().files
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1
    assert {name for name in files if name.endswith(".safetensors")} == shards


def test_a_card_on_the_hub_gains_what_its_metadata_lacks_and_nothing_else(hub, model):
    hub.card = SOMEONES_CARD
    model.push_to_hub("me/my-ham", tags=["new"])
    card = hub.sent().card
    assert card.text == "\n# Mine\n"
    assert card.data.to_dict() == {
        "license": "mit",
        "tags": ["mine", "new"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }


def test_nothing_is_sent_while_the_card_on_the_hub_cannot_be_seen(hub, model, monkeypatch):
    """Transformers takes a lost connection for a repository without a card, and replaces it."""

    def fail(*arguments, **named):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "file_exists", fail)
    with pytest.raises(ConnectionError):
        model.push_to_hub("me/my-ham")
    assert not hub.commits


def test_branches_are_made_and_their_card_is_looked_at(hub, model):
    model.push_to_hub("me/my-ham", revision="trial")
    assert ("create_branch", "me/my-ham", "trial") in hub.calls
    assert ("file_exists", "me/my-ham", "trial") in hub.calls
    assert hub.sent().revision == "trial"


def test_who_may_only_propose_changes_needs_no_branch(hub, model):
    hub.refused_branches = True
    with pytest.raises(HfHubHTTPError):
        model.push_to_hub("me/my-ham", revision="trial")
    assert not hub.commits
    model.push_to_hub("me/my-ham", revision="trial", create_pr=True)
    assert hub.sent().create_pr
    model.push_to_hub("me/my-ham", revision="refs/pr/1")
    assert len([x for x in hub.calls if x[0] == "create_branch"]) == 2


def test_an_unknown_argument_is_refused(hub, model):
    with pytest.raises(TypeError, match="licence"):
        model.push_to_hub("me/my-ham", licence="mit")
    assert not hub.calls


@pytest.mark.parametrize("reason", ["remote code", "adapters"])
def test_transformers_pushes_what_has_no_card_of_ours(hub, model, monkeypatch, reason):
    pushed = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    if reason == "remote code":
        monkeypatch.delattr(HAMPreTrainedModel, "push_to_hub")
    else:
        model._hf_peft_config_loaded = True
    model.push_to_hub("me/my-ham", private=True)
    assert pushed == [(("me/my-ham",), {"private": True})]
    assert not hub.calls


def test_a_folder_is_pushed_with_the_code_it_lacks_and_stays_as_it_is(hub, folder):
    (folder / "optimizer.pt").write_bytes(b"pickled")
    (folder / "trainer_state.json").write_text("{}")
    (folder / ".credentials.json").write_text('{"token": "hf_x"}')
    (folder / "checkpoint-5").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pushed = push_folder(folder, "my-ham", private=True)
    commit = hub.sent()
    assert pushed.repo_id == commit.repo_id == "me/my-ham"
    assert pushed.files == sorted(commit.files)
    assert pushed.left_out == [".credentials.json", "checkpoint-5", "optimizer.pt", "trainer_state.json"]
    assert {"cache_ham.py", "configuration_ham.py", "modeling_ham.py"} <= set(pushed.code) <= set(commit.files)
    assert commit.files["additional_chat_templates/tool.jinja"] == b"{{ messages }}"
    assert json.loads(commit.files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_ham.HAMForCausalLM"
    unchanged = set(commit.files) - {"README.md", "config.json", *pushed.code}
    assert {"model.safetensors", "tokenizer.json"} <= unchanged
    assert all(commit.files[name] == (folder / name).read_bytes() for name in unchanged)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert 'from_pretrained("me/my-ham"' in commit.card.text


def test_a_folder_that_has_the_code_is_sent_as_it_is(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    code = tmp_path / "whole" / "modeling_ham.py"
    code.write_text(code.read_text() + "# mine\n")
    pushed = push_folder(tmp_path / "whole", "me/my-ham")
    assert pushed.code == []
    assert hub.sent().files["modeling_ham.py"].endswith(b"# mine\n")
    code.unlink()  # configuration still names it
    assert "modeling_ham.py" in push_folder(tmp_path / "whole", "me/my-ham").code


@pytest.mark.parametrize(("own", "on_hub"), [(True, True), (True, False), (False, True), (False, False)])
def test_which_card_a_folder_is_pushed_with(hub, folder, own, on_hub):
    if own:
        (folder / "README.md").write_text("---\nlicense: bsd\n---\n# Own\n")
    if on_hub:
        hub.card = SOMEONES_CARD
    pushed = push_folder(folder, "me/my-ham", revision="trial")
    commit = hub.sent()
    title = "# Own" if own else "# Mine" if on_hub else "# my-ham"
    assert title in commit.card.text.split("\n")
    assert pushed.card == ("the folder's" if own else "the repository's" if on_hub else "made of the checkpoint")
    assert commit.revision == "trial"


@pytest.mark.parametrize("text", ["# Own\n", "---\nlicense: 'bsd'  # of the weights\n---\n\n\n# Own"])
def test_a_card_in_a_folder_is_sent_byte_for_byte(hub, folder, text):
    (folder / "README.md").write_text(text)
    push_folder(folder, "me/my-ham")
    assert hub.sent().files["README.md"] == text.encode()


def test_results_in_a_folder_are_in_its_card(hub, folder):
    shutil.copy(HAM_TINY.parents[2] / "model_cards/ham_tiny/usage.json", folder)
    push_folder(folder, "me/my-ham")
    commit = hub.sent()
    results = json.loads((folder / "usage.json").read_text())["results"]
    quarter = next(x for x in results if x["kv_usage"] == 0.25)
    assert f"| 25% | {quarter['usage']:.1%} | {quarter['loss']:.4f} |" in commit.card.text
    assert "usage.json" in commit.files


@pytest.mark.parametrize("repo_id", ["./folder", "/tmp/folder", "a/b/c", "", "a b", "datasets/a/b", "x--y"])
def test_names_that_no_repository_can_have(hub, folder, repo_id):
    with pytest.raises(ValueError, match="repo_id"):
        push_folder(folder, repo_id)
    assert not hub.calls


def test_a_path_is_no_repository(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parents[1])
    with pytest.raises(ValueError, match="path on this machine"):
        push_folder(folder, f"{folder.parent.name}/{folder.name}")
    assert not hub.calls


def test_folders_that_are_not_sent(hub, folder):
    (folder / "README.md").write_text("---\n- a list\n---\n")
    with pytest.raises(ValueError, match=r"README\.md"):
        push_folder(folder, "me/my-ham")
    (folder / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md"):
        push_folder(folder, "me/my-ham")
    (folder / "README.md").unlink()
    (folder / "usage.json").write_text("{}")
    with pytest.raises(ValueError, match=r"usage\.json"):
        push_folder(folder, "me/my-ham")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        push_folder(folder, "me/my-ham")
    assert not hub.calls
