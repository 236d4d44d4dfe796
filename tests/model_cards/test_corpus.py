# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Tests the cleaning and the splitting of the training text, and its tokenizer, on made-up input."""

import struct
import zlib

import pytest
from transformers import AutoTokenizer

from ham_hf.training.documents import Document, read_documents, write_documents
from model_cards.ham_tiny import corpus, sources
from model_cards.ham_tiny.sources import Source
from model_cards.ham_tiny.tokenizer import END_OF_TEXT, PADDING, train_tokenizer

STORY = "\n\n".join(f"The {word} ship sailed past the {word} harbour." for word in ("old", "red", "tall", "swift")) * 4


def make_source(held_out: frozenset[str] | None = None) -> Source:
    return Source("books", "1.0", "npm", "0" * 64, ("*.txt",), "CC0", sources.read_titled_book, held_out)


def serialize_r_strings(lines: list[str]) -> bytes:
    strings = b"".join(struct.pack(">ii", 0x40009, len(line.encode())) + line.encode() for line in lines)
    header = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8"
    return header + struct.pack(">ii", 16, len(lines)) + strings


class TestCleaning:
    def test_joins_lines_and_keeps_paragraphs(self):
        assert corpus.clean_text("One\r\n two  three.\r\n\r\n\r\nFour.\r\n") == "One two three.\n\nFour."

    def test_normalises_punctuation(self):
        assert corpus.clean_text("\u201cIt\u2019s _so_\u201d \u2014 he\u00a0said\u2026") == '"It\'s so" -- he said...'

    def test_decodes_entities_and_drops_tags_and_control_characters(self):
        assert corpus.clean_text("a &quot;b&quot; <i>c</i>\x00d\ufeff") == 'a "b" c d'

    def test_drops_ornaments_and_editorial_notes(self):
        raw = "One.\n\n  *   *   *\n\n[Illustration: a\nship]\n\nTwo (Applause.) three."
        assert corpus.clean_text(raw) == "One.\n\nTwo three."

    @pytest.mark.parametrize("end", ["*** END OF THE PROJECT GUTENBERG EBOOK X ***", "End of Project Gutenberg's X"])
    def test_drops_the_licence_at_the_end(self, end):
        raw = f"The last words.\n\n{end}\n\nSmall print."
        assert corpus.clean_text(raw) == "The last words."

    def test_drops_rows_of_figures_but_keeps_sentences_with_a_figure(self):
        raw = "We sold 1,200 acres in 1850. Wool - 12,280,100 - 14,200,900. Postage .........cents 93. We prospered."
        assert corpus.clean_text(raw) == "We sold 1,200 acres in 1850. We prospered."


class TestReading:
    def test_titled_book(self):
        assert list(sources.read_titled_book("a.txt", b"[A Book]\nText\n")) == [("A Book", "Text\n")]

    def test_untitled_book_is_an_error(self):
        with pytest.raises(ValueError, match=r"a\.txt"):
            list(sources.read_titled_book("a.txt", b"Text\n"))

    def test_speech(self):
        [(title, text)] = sources.read_speech("data/1861_ann_b_smith_r.txt", "caf\u00e9".encode("latin-1"))
        assert (title, text) == ("1861 Ann B Smith", "caf\u00e9")

    def test_r_books_skip_other_objects(self):
        other_object = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">i", 13)
        chunks = [serialize_r_strings(["A BOOK", "", "By Jane Austen", "Text."]), other_object]
        content = b"".join(struct.pack(">i", len(chunk)) + zlib.compress(chunk) for chunk in chunks)
        assert list(sources.read_r_books("x.rdb", content)) == [("A Book", "\nText.")]

    def test_r_database_that_is_not_compressed_is_an_error(self):
        with pytest.raises(ValueError, match=r"x\.rdb"):
            list(sources.read_r_books("x.rdb", b"not compressed"))


class TestSplitting:
    def test_drops_exact_duplicates_and_other_editions(self):
        novel = " ".join(f"word{number}" for number in range(2000))
        edition = novel.replace("word50 ", "changed ")
        other = " ".join(f"other{number}" for number in range(2000))
        documents = [Document("a", str(i), text) for i, text in enumerate([novel, edition, other, "Hi.", "Hi."])]
        assert [document.title for document in corpus.drop_duplicates(documents)] == ["0", "2", "3"]

    def test_named_works_are_held_out(self):
        documents = [Document("books", title, "text") for title in "ab"]
        splits = corpus.split_documents(documents, [make_source(frozenset({"b"}))])
        assert splits == {"train": documents[:1], "held_out": documents[1:]}

    def test_hash_holds_out_a_small_fixed_share(self):
        documents = [Document("books", f"title {number}", "text") for number in range(2000)]
        splits = corpus.split_documents(documents, [make_source()])
        assert splits == corpus.split_documents(documents, [make_source()])
        assert 30 <= len(splits["held_out"]) <= 90
        assert len(splits["train"]) + len(splits["held_out"]) == 2000

    def test_documents_survive_the_file(self, tmp_path):
        documents = [Document("a", "t", "line\n\n\u2603 \U0001f600")]
        write_documents(tmp_path / "train.jsonl", documents)
        assert read_documents(tmp_path / "train.jsonl") == documents
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]

    def test_missing_file_names_the_remedy(self, tmp_path):
        with pytest.raises(ValueError, match=r"model_cards\.ham_tiny\.corpus"):
            read_documents(tmp_path / "train.jsonl")


class TestDownloading:
    def test_a_changed_package_is_an_error(self, tmp_path):
        (tmp_path / "books-1.0.archive").write_bytes(b"something else")
        with pytest.raises(RuntimeError, match=r"books 1\.0 has digest"):
            sources.download(make_source(), tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([STORY], vocabulary_size=280).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class TestTokenizer:
    @pytest.mark.parametrize(
        "text",
        [
            STORY,
            "",
            "  two leading spaces",
            "a\n\n\nb\t\r\n",
            "it 's , spaced .",
            "\u2603 \U0001f468\u200d\U0001f469 \u00e9e\u0301\x00",
        ],
    )
    def test_round_trip(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (END_OF_TEXT, END_OF_TEXT, PADDING)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        assert len(tokenizer) == 280

    def test_pads_on_the_left(self, tokenizer):
        batch = tokenizer(["The old ship sailed", "The"], padding=True)
        assert batch["input_ids"][1][0] == tokenizer.pad_token_id
        assert batch["attention_mask"][1][0] == 0

    def test_training_is_deterministic(self, tokenizer):
        assert train_tokenizer([STORY], vocabulary_size=280).get_vocab() == tokenizer.get_vocab()

    def test_too_small_a_vocabulary_is_an_error(self):
        with pytest.raises(ValueError, match="at least 258"):
            train_tokenizer([STORY], vocabulary_size=100)
