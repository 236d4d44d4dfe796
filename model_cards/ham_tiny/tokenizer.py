# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Trains the byte-level BPE tokenizer of the embedded checkpoint on the training split of the corpus.

Usage: ``python -m model_cards.ham_tiny.tokenizer --corpus DIR --output DIR``
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ham_hf.training.documents import SPLIT_FILES, Document, read_documents

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Trains a tokenizer that reproduces any text exactly: every byte is in its vocabulary, nothing is normalised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special_tokens = [END_OF_TEXT, PADDING]
    smallest_vocabulary = len(alphabet) + len(special_tokens)
    if vocabulary_size < smallest_vocabulary:
        raise ValueError(
            f"A vocabulary of {vocabulary_size} cannot hold the 256 bytes and the special tokens; "
            f"ask for at least {smallest_vocabulary}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # a HAM takes no token types
    )


def count_tokens(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[int]:
    """Returns the length in tokens of every document, without special tokens."""
    # The backend is called directly because the wrapper warns about documents longer than a model's context.
    return [len(tokenizer.backend_tokenizer.encode(document.text).ids) for document in documents]


def print_statistics(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    """Prints, for each split, its size in documents, tokens and bytes per token, and its document lengths."""
    print("split      documents     tokens bytes/token  shortest    median   longest")
    for split, file_name in SPLIT_FILES.items():
        documents = read_documents(corpus / file_name)
        lengths = sorted(count_tokens(tokenizer, documents))
        tokens = sum(lengths)
        size = sum(len(document.text.encode()) for document in documents)
        print(
            f"{split:<10} {len(documents):>9} {tokens:>10} {size / tokens:>11.3f} "
            f"{lengths[0]:>9} {lengths[len(lengths) // 2]:>9} {lengths[-1]:>9}"
        )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of the embedded checkpoint.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by corpus.py beside this")
    parser.add_argument("--output", type=Path, required=True, help="folder to save the tokenizer in")
    parser.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE)
    arguments = parser.parse_args()

    documents = read_documents(arguments.corpus / SPLIT_FILES["train"])
    print(f"Training a tokenizer of {arguments.vocabulary_size} tokens on {len(documents)} documents ...", flush=True)
    tokenizer = train_tokenizer((document.text for document in documents), arguments.vocabulary_size)
    tokenizer.save_pretrained(arguments.output)
    print(f"Saved the tokenizer in {arguments.output}")
    print_statistics(tokenizer, arguments.corpus)


if __name__ == "__main__":
    main()
