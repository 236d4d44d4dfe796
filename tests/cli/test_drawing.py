# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Texts, tables and bars as they are drawn: every character is there, and all fits."""

import io

from rich.console import Console

from ham_hf import HAMCache
from ham_hf.inspection import comparison
from ham_hf.inspection.kept_tokens import Piece, numbered_text, pieces_of, printable, shaded_text, wrapped
from ham_hf.inspection.run_table import runs_table
from ham_hf.inspection.runs import Setting, heads_that_kept, measure, prefill
from tests.cli.calls import PROMPT, generate, rows, tiny_model


def test_heads_that_kept_counts_every_position(tokenizer):
    model = tiny_model(len(tokenizer))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    cache = HAMCache(model.config)
    scores = model(ids, cache=cache, threshold=0.5, output_routing_scores=True).routing_scores
    expected = sum((layer[0] >= 0.5).sum(-1) for layer in scores)
    assert heads_that_kept(cache, ids.shape[1]) == expected.tolist()


def test_pieces_join_to_the_text_and_never_cut_a_character(tokenizer):
    text = "a — “é” 🙂\n\nthe  war"
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    pieces = pieces_of(text, offsets, list(range(len(offsets))))
    assert "".join(piece.text for piece in pieces) == text
    dash = next(piece for piece in pieces if "—" in piece.text)
    assert dash.heads == max(i for i, (start, end) in enumerate(offsets) if text[start:end] == "—")


def test_numbers_stand_under_the_first_letter_of_their_token():
    pieces = [Piece("The", 4), Piece(" whale", 0), Piece("\n", 1), Piece("鯨", 2), Piece(" x", 4)]
    assert numbered_text(pieces, num_heads=4, width=40).plain.split("\n") == [
        "The whale⏎",
        "9   ·    3",
        "鯨 x",
        "5  9",
    ]


def test_wrapping_loses_nothing_and_fits():
    text = "one two  three\nfour-five-six-seven eight \n\nnine"
    lines = wrapped(text, 10)
    assert "".join(text[start:end] for start, end in lines) == text
    assert all(len(text[start:end].rstrip("\n")) <= 10 for start, end in lines)
    assert text[slice(*lines[0])] == "one two  "


def test_colours_only_on_a_terminal_that_has_them():
    pieces = [Piece("kept", 4), Piece(" dropped", 0)]
    terminal, plain = io.StringIO(), io.StringIO()
    Console(file=terminal, force_terminal=True, color_system="truecolor").print(shaded_text(pieces, 4))
    Console(file=plain).print(shaded_text(pieces, 4))
    assert "\x1b[" in terminal.getvalue()
    assert plain.getvalue() == "kept dropped\n"


def test_text_on_a_terminal_breaks_between_words():
    output = io.StringIO()
    writer = comparison.ProseWriter(Console(file=output, force_terminal=True, width=12, color_system=None))
    for part in ("one two three ", "four five ", "six\nseven"):
        writer.write(part, "")
    lines = output.getvalue().split("\n")
    assert [line.strip() for line in lines] == ["one two", "three four", "five six", "seven"]
    assert all(len(line) <= 12 for line in lines)


def test_control_characters_are_shown_instead_of_obeyed():
    assert printable("a\x1b[31m\x07\tb\r\nc\x9b") == "a␛[31m␇ b\nc�"


def test_long_prompts_are_cut_where_they_are_drawn(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(comparison, "DRAWN_TOKENS", 10)
    monkeypatch.setattr(comparison, "SHOWN_CHARACTERS", 20)
    output = generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 1, "--threshold", 0.5)
    assert "… rose, and rose." in output
    assert "earlier tokens are not drawn" in output
    assert output.rstrip().splitlines()[-2].endswith("and rose.")


def test_table_fits_eighty_columns(tokenizer):
    model = tiny_model(len(tokenizer))
    cache = HAMCache(model.config)
    prefill(model, tokenizer(PROMPT, return_tensors="pt").input_ids, cache, Setting("threshold", 0.0))
    run = measure(cache, Setting("threshold", 0.0), 5, speed=12345.0, loss=9.876)
    output = io.StringIO()
    Console(file=output, width=80).print(runs_table([run], 80))
    assert max(map(len, output.getvalue().splitlines())) <= 80
    assert len(rows(f"what the cache kept\n{output.getvalue()}KV held:")[0]) == 11
