# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Uploads a checkpoint with its card and its code to a repository on the Hub, in one commit."""

import tempfile
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from .card import build_card, card_in, load_card
from .checkpoint import Checkpoint, read_checkpoint
from .sources import read_sources

# Suffixes of files that are uploaded beside the weights; the state of a training run and pickles are not.
SUFFIXES = {".json", ".jsonl", ".md", ".txt", ".py", ".jinja", ".model", ".png", ".svg"}
NAMES = {"LICENSE", "NOTICE"}
TRAINER_STATE = "trainer_state.json"


class Pushed(NamedTuple):
    """Result of an upload.

    Attributes:
        repo_id: the repository, with its owner.
        commit: its commit.
        files: the names of the files in it.
        size: their bytes.
        card: source of the card.
        code: the names of code files that the folder lacked.
        left_out: names in the folder that were not uploaded.
    """

    repo_id: str
    commit: CommitInfo
    files: list[str]
    size: int
    card: str
    code: list[str]
    left_out: list[str]


@wraps(PreTrainedModel.push_to_hub)
def push_to_hub(model: PreTrainedModel, *args: Any, **kwargs: Any) -> str:
    """Pushes as Transformers does, and adds a HAM's card if the repository has none."""
    # A model with adapters saves only these, which are not a HAM checkpoint.
    if getattr(model, "_hf_peft_config_loaded", False):
        return PreTrainedModel.push_to_hub(model, *args, **kwargs)
    return push_model(model, *args, **kwargs)


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: str | list[str] | None = None,
) -> CommitInfo:
    """Transformers' `push_to_hub`, with its arguments, which adds a HAM's card if the repository has none."""
    api = HfApi(token=token)
    # Before anything is saved, so that a wrong token is reported at once.
    repo_id = open_repository(api, repo_id, private, revision, create_pr)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        checkpoint = read_checkpoint(Path(temporary))
        made = build_card(checkpoint, read_sources(checkpoint.folder), repo_id.split("/")[-1], repo_id)
        card, _ = card_on_hub(api, repo_id, revision, made)
        wanted = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
        card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *wanted]))
        return api.create_commit(
            repo_id,
            operations(files_of(checkpoint), str(card).encode()),
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
) -> Pushed:
    """Uploads a checkpoint folder, which stays unchanged.

    The card is the folder's README.md, byte for byte. Without one, it is the repository's card with its metadata
    completed, or else a card made from the folder. Code that the folder lacks is added.

    Args:
        folder: a checkpoint with its tokenizer.
        repo_id: `"OWNER/NAME"`, or `"NAME"` for a repository of the token's owner; created if it does not exist.
        commit_message: the first line of the commit.
        private: True to make a new repository private; the owner's setting by default.
        token: token of the Hub; the one of `hf auth login` by default.
        revision: the branch, created if it does not exist; the main one by default.

    Raises:
        ValueError: if `folder` is not a whole HAM checkpoint, a file in it is invalid, or `repo_id` cannot be the name
            of a repository; nothing was sent then.
    """
    check_repo_id(repo_id, folder)
    checkpoint, sources = read_checkpoint(folder), read_sources(folder)
    # The bytes of the file, not the card written again.
    card = None if card_in(folder) is None else (folder / REPOCARD_NAME).read_bytes()
    origin = "the folder's"
    api = HfApi(token=token)
    repo_id = open_repository(api, repo_id, private, revision)
    if card is None:
        made = build_card(checkpoint, sources, sources.metadata.get("name", repo_id.split("/")[-1]), repo_id)
        found, origin = card_on_hub(api, repo_id, revision, made)
        card = str(found).encode()
    files = files_of(checkpoint)
    kept_back = {path.name for path in folder.iterdir()} - {name.partition("/")[0] for name in files} - {REPOCARD_NAME}
    with tempfile.TemporaryDirectory() as temporary:
        code = [] if checkpoint.has_code else add_code(checkpoint, Path(temporary), files)
        size = sum(path.stat().st_size for path in files.values())
        commit = api.create_commit(
            repo_id,
            operations(files, card),
            commit_message=commit_message or f"Upload {checkpoint.architecture}",
            revision=revision,
        )
    return Pushed(repo_id, commit, sorted({*files, REPOCARD_NAME}), size, origin, code, sorted(kept_back))


def check_repo_id(repo_id: str, folder: Path | None = None) -> None:
    """Raises `ValueError` for a name that a repository cannot have, such as a path, to which `folder` could be copied.

    Args:
        repo_id: `"OWNER/NAME"` or `"NAME"`.
        folder: the checkpoint to push.
    """
    if repo_id.startswith((".", "/", "~")) or ("/" in repo_id and Path(repo_id).exists()):
        copy = "" if folder is None else f" To have the checkpoint there, copy it: cp -r {folder} {repo_id}"
        raise ValueError(
            f"`repo_id` must be OWNER/NAME on the Hub, got {repo_id!r}, a path on this machine: push uploads to the "
            f"Hub.{copy}"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be OWNER/NAME, got {repo_id!r}: {error}") from error


def open_repository(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool = False
) -> str:
    """Creates the repository and the branch if they are missing; returns the repository's name with its owner."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # A user who may only propose changes cannot create branches; a missing branch then fails the commit.
            if not create_pr or error.response.status_code != 403:
                raise
    return repo_id


def card_on_hub(api: HfApi, repo_id: str, revision: str | None, made: ModelCard) -> tuple[ModelCard, str]:
    """The repository's card, completed with metadata from the one `made` here, or else that one; and its origin."""
    if not api.file_exists(repo_id, REPOCARD_NAME, revision=revision):
        return made, "made of the checkpoint"
    card = load_card(api.hf_hub_download(repo_id, REPOCARD_NAME, revision=revision))
    for name, value in vars(made.data).items():
        if value is not None and card.data.get(name) is None:
            card.data[name] = value
    return card, "the repository's"


def files_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of a checkpoint folder to upload, by their names in the repository."""
    folder = checkpoint.folder
    paths = [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*.jinja")]
    paths = [path for path in paths if path.suffix in SUFFIXES or path.name in NAMES]
    paths = [path for path in paths if not path.name.startswith(".") and path.name != TRAINER_STATE]
    return {x.relative_to(folder).as_posix(): x for x in [*paths, *checkpoint.weight_files] if x.is_file()}


def add_code(checkpoint: Checkpoint, folder: Path, files: dict[str, Path]) -> list[str]:
    """Saves code and a configuration that names it to `folder`, adds both to `files`, and returns the code's names."""
    checkpoint.config.save_pretrained(folder)
    saved = {path.name: path for path in folder.iterdir()}
    files |= saved
    return sorted(name for name in saved if name.endswith(".py"))


def operations(files: dict[str, Path], card: bytes) -> list[CommitOperationAdd]:
    """The operations of a commit of these files and this card."""
    cardless = {name: path for name, path in files.items() if name != REPOCARD_NAME}
    added = [CommitOperationAdd(name, path) for name, path in sorted(cardless.items())]
    return [CommitOperationAdd(REPOCARD_NAME, card), *added]
