# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Gets the inputs of a conversion, a repository's files and a tokenizer, or tells the user what to do."""

from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .gguf import read_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Second copies of the weights, in their makers' formats.
SECOND_COPIES = ["consolidated*", "original/*"]
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*"]


def download(source: str, revision: str | None, gguf_file: str | None) -> Path:
    """The folder of a repository's snapshot; for GGUF with this weight file alone.

    Raises:
        ValueError: if the repository is gated, missing or misnamed; says what to do.
    """
    wanted = DOWNLOADED if gguf_file is None else [x for x in DOWNLOADED if x != "*.safetensors"] + [gguf_file]
    must = f"`source` must be a folder, or OWNER/NAME on the Hub, got {source!r}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=SECOND_COPIES))
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{source}"
        raise ValueError(
            f"{source} is gated: its owner decides who may download it. Ask for access on its page, {page}, and "
            f"{log_in} as the account that has it."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{must}: the Hub has no repository of that name, or a private one that your token may not read. Check "
            f"the name; for a private one {log_in}."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`--revision` must be a branch, tag or commit of {source}, got {revision!r}.") from error
    except HFValidationError as error:
        raise ValueError(f"{must}, which is neither.") from error


def load_tokenizer(folder: Path, gguf_file: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, else in a GGUF file, or `None` if there is none; its code is not run.

    Raises:
        ValueError: if it cannot be read; says what to do.
    """
    beside = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not beside and gguf_file is None:
        return None
    try:
        if not beside and gguf_file is not None:
            return read_tokenizer(folder, gguf_file, config)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
        if "trust_remote_code" in str(error):
            reason = (
                "is code in its repository, which a conversion does not run. Read that code, and save the tokenizer "
                "to the new folder afterwards: AutoTokenizer.from_pretrained(SOURCE, trust_remote_code=True)"
                ".save_pretrained(OUTPUT)"
            )
        # Transformers would try tiktoken, and ask for that package.
        elif "tokenizer.json" not in beside and "tokenizer.model" in beside and find_spec("sentencepiece") is None:
            reason = "is a tokenizer.model, which takes two packages to read: pip install sentencepiece protobuf"
        raise ValueError(
            f"The tokenizer of {folder} {reason}. To convert the model without it add --no-tokenizer."
        ) from error
