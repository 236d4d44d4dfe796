# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The command `ham-hf`: what it prints and writes, what it refuses, and that its numbers are the cache's own."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import ham_hf
import ham_hf.cli as cli
from ham_hf import HAMCache, HAMConfig, HAMForCausalLM, __version__
from ham_hf.cli import demo
from ham_hf.cli import models as cli_models
from ham_hf.hub.push import Pushed
from ham_hf.inspection import comparison
from ham_hf.inspection.kept_tokens import Piece, numbered_text, pieces_of, printable, shaded_text, wrapped
from ham_hf.inspection.run_table import bars, runs_table
from ham_hf.inspection.runs import Setting, heads_that_kept, measure, prefill

USAGE = Path(__file__).parents[2] / "model_cards/ham_tiny/usage.json"
PROMPT = "It was a dark night, and the captain — “Ahab” — had gone below.\nNobody spoke; the wind rose, and rose."


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    for pair in ("th", "Ġw"):
        vocabulary[pair] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_model(vocab_size, **changes):
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **changes,
    )
    return HAMForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def save(folder, tokenizer, model):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("plain"), tokenizer, tiny_model(len(tokenizer)))


@pytest.fixture(scope="module")
def calibrated_checkpoint(tmp_path_factory, tokenizer):
    model = tiny_model(len(tokenizer))
    for layer in model.model.layers:
        layer.mixer.score_quantiles.copy_(torch.linspace(0.2, 0.8, layer.mixer.score_quantiles.shape[1]))
    return save(tmp_path_factory.mktemp("calibrated"), tokenizer, model)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No colour forced from outside, and Transformers' logging left as it was found."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def rows(output):
    """The cells of the table of runs, one list a row."""
    table = output.split("what the cache kept")[1].split("KV held:")[0]
    return [line.split() for line in table.splitlines() if re.match(r" *(learned|-?inf|-?\d)", line)]


def generate(capsys, *arguments):
    """Runs `ham-hf generate`, which must succeed without a word on stderr; returns what it printed."""
    assert cli.main(["generate", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys, *arguments):
    """Runs a call that must be refused before anything is printed; returns its one line on stderr."""
    assert cli.main([str(x) for x in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ham-hf: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_study_is_where_its_results_are(capsys):
    for arguments in (["study"], ["study", "--help"], ["study", "cpu", "--output", "x", "--report"]):
        assert "`python -m model_cards.study` in a checkout of the repository" in refusal(capsys, *arguments)
    assert cli.main([]) == 0
    assert "study" not in capsys.readouterr().out


def test_help_and_version(capsys):
    for arguments, expected in (
        (["--version"], f"ham-hf {__version__}\n"),
        (["--help"], "ham-hf demo"),
        (["generate", "--help"], "--threshold 0 0.5 2"),
        (["demo", "--help"], "--max-new-tokens"),
        (["card", "--help"], "ham-hf card my-ham --results my-results --repo-id OWNER/my-ham"),
        (["push", "--help"], "ham-hf push my-ham OWNER/my-ham --private"),
        (["run", "--help"], "transformers serve"),
        ([], "ham-hf demo"),
    ):
        if arguments:
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main(arguments)
        else:
            assert cli.main([]) == 0
        assert expected in capsys.readouterr().out


def test_run_hands_its_arguments_to_another_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "pygmentize", "-V"])
    assert not stop.value.code
    assert "Pygments version" in capsys.readouterr().out
    assert transformers.HAMForCausalLM is HAMForCausalLM
    assert "'no-such-tool'" in refusal(capsys, "run", "no-such-tool", "--help")


# The installed script, for the code of this folder; and what a call imported, for calls that import next to nothing.
COMMAND = "import sys; sys.argv[0] = '/bin/ham-hf'; from ham_hf.cli import main; sys.exit(main())"
AS_A_MODULE = """
import runpy
sys.argv[0], sys.orig_argv = "-m", ["python", "-m", "ham_hf.cli"]
runpy.run_module("ham_hf.cli", run_name="__main__", alter_sys=True)
"""
LOOK_BEHIND = """
import atexit, sys
atexit.register(lambda: print([x for x in ("torch", "transformers", "rich") if x in sys.modules], file=sys.stderr))
"""
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONPATH": str(Path(ham_hf.__file__).parents[1]),
}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        ([], 0),
        *[([name, "--help"], 0) for name in ("generate", "demo", "train", "card", "push", "run")],
        (["train", "no/such/recipe.yaml"], 2),
        (["study", "cpu", "--output", "x"], 2),
        (["card", "no/such/folder"], 2),
        (["push", "no/such/folder", "me/my-ham"], 2),
        (["generate", "Ahab", "--model", "no/such/folder"], 2),
        (["run", "no-such-tool"], 2),
    ],
)
@pytest.mark.parametrize("program", [COMMAND, AS_A_MODULE], ids=["script", "module"])
def test_help_and_wrong_paths_are_answered_at_once(arguments, status, program, tmp_path):
    """Without torch, which takes ten seconds; by the installed script and by `python -m`."""
    command = [sys.executable, "-c", LOOK_BEHIND + program, *arguments]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert time.monotonic() - begin < 5, "0.2 s on an idle core"
    *said, imported = done.stderr.splitlines()
    assert imported == "[]"
    assert done.returncode == status, done.stderr
    assert len(said) == (1 if status else 0), said
    assert bool(done.stdout) == (status == 0)


AT_ONCE = """
import pickle
import ham_hf
from transformers import AutoConfig
assert type(AutoConfig.for_model("ham")) is ham_hf.HAMConfig
assert pickle.loads(pickle.dumps(ham_hf.HAMConfig())).to_dict() == ham_hf.HAMConfig().to_dict()
"""
LATER = """
import sys
sys.argv[0] = "/bin/ham-hf"
import ham_hf
assert "torch" not in sys.modules and not hasattr(ham_hf, "HAMNothing")
from ham_hf import HAMCache, HAMConfig, cache_ham
from transformers import AutoModelForCausalLM
assert HAMCache is cache_ham.HAMCache
config = HAMConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
assert type(AutoModelForCausalLM.from_config(config)) is ham_hf.HAMForCausalLM
"""


def test_importing_the_package_registers_it_for_users_at_once(run_program, tmp_path):
    done = run_program(AT_ONCE, folder=tmp_path, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_the_command_registers_it_with_the_first_class_that_is_asked_for():
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_pipe_gets_the_whole_text_without_escape_codes(checkpoint):
    """And stderr nothing, whatever torchao and PyTorch have to say about each other."""
    command = [sys.executable, "-c", COMMAND, "generate", PROMPT, "--model", checkpoint]
    command += ["--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    output = done.stdout.decode()
    assert PROMPT in output
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output)


def test_table_shows_the_numbers_of_the_cache(capsys, checkpoint, tokenizer):
    thresholds = (0, 0.5, 2)
    output = generate(
        capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 6, "--loss", "--threshold", *thresholds
    )
    model = HAMForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for threshold, row in zip(thresholds, rows(output), strict=True):
        cache = HAMCache(model.config)
        text = model.generate(ids, cache=cache, threshold=threshold, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            logits = model(ids, threshold=threshold).logits[0]
        half = ids.shape[1] // 2
        loss = torch.nn.functional.cross_entropy(logits[half - 1 : -1], ids[0, half:]).item()
        held = cache.memory_bytes() - cache.state_bytes()
        assert row[:3] == [
            f"{threshold:g}",
            f"{cache.get_seq_length()}",
            f"{cache.kept_tokens().float().mean():.1f}",
        ]
        assert row[3:5] == [f"{cache.kv_usage().mean():.1%}", bars(cache.kv_usage().mean((1, 2)).tolist())]
        assert row[5:7] == [f"{held / 1024:.1f}", f"{cache.full_kv_bytes() / 1024:.1f}"]
        assert row[7:9] == [f"{held / cache.full_kv_bytes():.0%}", f"{cache.state_bytes() / 1024:.1f}"]
        assert float(row[10]) == pytest.approx(loss, abs=1e-3)
        continuation = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
        section = output.split(f"threshold {threshold:g} ")[1]
        assert PROMPT + printable(continuation) in section


def test_higher_thresholds_keep_fewer_tokens(capsys, checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0, 0.45, 0.5, 0.55, 2)
    kept = [float(row[2]) for row in rows(generate(capsys, PROMPT, *arguments))]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[2] > kept[4] == 0


def test_learned_thresholds_by_default(capsys, checkpoint):
    output = generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 3)
    at_half = generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0.5)
    assert "learned thresholds" in output
    assert rows(output)[0][1:4] == rows(at_half)[0][1:4]  # a fresh model's thresholds are 0.5


def test_kv_usage(capsys, calibrated_checkpoint):
    arguments = ("--model", calibrated_checkpoint, "--max-new-tokens", 3)
    table = rows(generate(capsys, PROMPT, *arguments, "--kv-usage", 1, 0.5, 0))
    assert [row[0] for row in table] == ["1", "0.5", "0"]
    by_threshold = rows(generate(capsys, PROMPT, *arguments, "--threshold", 0, 0.5, 2))
    assert [row[2:5] for row in table] == [row[2:5] for row in by_threshold]


def test_kv_budget_bounds_what_a_head_keeps(capsys, checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0, "--kv-budget", 7)
    output = generate(capsys, PROMPT, *arguments)
    assert "threshold 0, kv-budget 7" in output
    assert rows(output)[0][2] == "7.0"


def test_sampling_follows_the_seed(capsys, checkpoint):
    def text(*arguments):
        return generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 12, *arguments).split("what the")[0]

    assert text("--temperature", 2, "--seed", 3) == text("--temperature", 2, "--seed", 3)
    assert text("--temperature", 2, "--seed", 3) != text("--temperature", 2, "--seed", 4)
    assert text("--temperature", 0, "--seed", 3) == text("--seed", 4)


def test_dtype_and_device(capsys, checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 2, "--threshold", 0, "--device", "cpu")
    full = rows(generate(capsys, PROMPT, *arguments, "--dtype", "float32"))[0]
    half = rows(generate(capsys, PROMPT, *arguments, "--dtype", "bfloat16"))[0]
    assert float(half[6]) == pytest.approx(float(full[6]) / 2, abs=0.1)


def test_prompt_from_file_and_stdin(capsys, checkpoint, tmp_path, monkeypatch):
    def body(*arguments):
        output = generate(capsys, *arguments, "--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0)
        return output.split("what the cache kept")[0]

    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert body(PROMPT) == body("--prompt-file", file) == body("--prompt-file", "-")


def test_one_token_prompt(capsys, checkpoint):
    assert rows(generate(capsys, "a", "--model", checkpoint, "--max-new-tokens", 1))[0][1] == "1"


def test_demo_runs_from_all_tokens_to_none(capsys, monkeypatch, checkpoint, calibrated_checkpoint):
    for path, settings in ((checkpoint, demo.THRESHOLDS), (calibrated_checkpoint, demo.USAGES)):
        monkeypatch.setattr(cli_models, "EMBEDDED_CHECKPOINT", path)
        assert cli.main(["demo", "--max-new-tokens", "1"]) == 0
        table = rows(capsys.readouterr().out)
        assert [row[0] for row in table] == [f"{x:g}" for x in settings]
        assert (table[0][3], table[-1][3]) == ("100.0%", "0.0%")
        assert all(len(row) == 11 for row in table)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--threshold", "nan"], ["--threshold", "'nan'"]),
        (["--threshold", "half"], ["--threshold", "'half'"]),
        (["--threshold"], ["--threshold"]),
        (["--kv-usage", "1.5"], ["--kv-usage", "'1.5'", "0 to 1"]),
        (["--kv-usage", "nan"], ["--kv-usage", "'nan'"]),
        (["--kv-usage", "0.5"], ["--kv-usage", "calibrate", "--threshold"]),
        (["--kv-usage", "0.5", "--threshold", "0.5"], ["--kv-usage", "--threshold"]),
        (["--kv-budget", "0"], ["--kv-budget", "'0'", "whole number"]),
        (["--kv-budget", "2.5"], ["--kv-budget", "'2.5'"]),
        (["--max-new-tokens", "-3"], ["--max-new-tokens", "'-3'", "whole number"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "'0'"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens", "'many'"]),
        (["--temperature", "-1"], ["--temperature", "'-1'"]),
        (["--temperature", "inf"], ["--temperature", "'inf'"]),
        (["--seed", "-1"], ["--seed", "'-1'"]),
        (["--device", "abacus"], ["--device", "'abacus'", "cpu"]),
        (["--device", "meta"], ["--device", "'meta'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--prompt-file", "-"], ["--prompt-file", "PROMPT"]),
        (["--thresh", "0.5"], ["--thresh"]),
    ],
)
def test_refused_arguments(capsys, checkpoint, arguments, expected):
    message = refusal(capsys, "generate", PROMPT, "--model", checkpoint, *arguments)
    assert all(part in message for part in expected), message


def test_refused_prompts(capsys, checkpoint, tmp_path, monkeypatch):
    def message(*arguments):
        return refusal(capsys, "generate", "--model", checkpoint, *arguments)

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"\n")
    assert "PROMPT" in message()
    assert "empty" in message(" ")
    assert "empty" in message("--prompt-file", "-")
    assert "empty" in message("--prompt-file", tmp_path / "empty")
    assert "UTF-8" in message("--prompt-file", tmp_path / "latin")
    assert "No such file" in message("--prompt-file", tmp_path / "missing")
    assert "cannot read" in message("--prompt-file", tmp_path)
    assert "UTF-8" in message("caf\udce9")
    assert "--loss" in message("a", "--loss")
    assert "'a'" in message("--threshold", "0.5", "a")  # PROMPT behind --threshold: the message says where it goes


def test_refused_checkpoints(capsys, checkpoint, tokenizer, tmp_path, monkeypatch):
    def message(folder):
        return refusal(capsys, "generate", PROMPT, "--model", folder)

    def copy(name):
        return shutil.copytree(checkpoint, tmp_path / name)

    (tmp_path / "nothing").mkdir()
    assert "config.json" in message(tmp_path / "nothing")
    assert "no folder" in message(tmp_path / "missing")
    monkeypatch.setattr(cli_models, "EMBEDDED_CHECKPOINT", tmp_path / "missing")
    assert "lacks its checkpoint" in refusal(capsys, "demo")

    other = copy("other")
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "'bert'" in message(other)
    (other / "config.json").write_text("{")
    assert "cannot load a model" in message(other)

    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    assert "cannot load a model" in message(cut)

    wordless = copy("wordless")
    for file in wordless.glob("tokenizer*"):
        file.unlink()
    assert "cannot load a tokenizer" in message(wordless)

    reshaped = copy("reshaped")
    config = (reshaped / "config.json").read_text()
    (reshaped / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    assert "another shape" in message(reshaped)

    model = tiny_model(len(tokenizer))
    model.model.norm.weight.data[0] = torch.nan
    assert "not finite" in message(save(tmp_path / "nan", tokenizer, model))
    assert "tokenizer" in message(save(tmp_path / "small", tokenizer, tiny_model(100)))
    linear = tiny_model(len(tokenizer), layer_types=["linear_attention"] * 3)
    assert "hybrid" in message(save(tmp_path / "linear", tokenizer, linear))


def card(capsys, *arguments):
    """Runs `ham-hf card`, which must succeed without a word on stderr; returns what it printed."""
    assert cli.main(["card", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_card_is_written_and_written_anew(capsys, calibrated_checkpoint, tmp_path):
    folder = shutil.copytree(calibrated_checkpoint, tmp_path / "my-ham")
    output = card(capsys, folder)
    written = (folder / "README.md").read_text()
    assert f"Wrote {folder / 'README.md'}" in output
    assert "# my-ham" in written
    assert all(name in output for name in ("data.md", "usage.json", "license", "name on the Hub"))
    (folder / "data.md").write_text("All of it.")
    output = card(capsys, folder, "--repo-id", "someone/my-ham")
    assert "data.md" not in output
    assert "name on the Hub" not in output
    rewritten = (folder / "README.md").read_text()
    assert "All of it." in rewritten
    assert "someone/my-ham" in rewritten
    assert not list(folder.glob("*.partial"))


def test_card_takes_results_and_their_plot_from_elsewhere(capsys, checkpoint, tmp_path):
    results, output = tmp_path / "results", tmp_path / "out" / "card.md"
    results.mkdir()
    output.parent.mkdir()
    (results / "usage.png").write_bytes(b"picture")
    shutil.copy(USAGE, results)
    (results / "card.json").write_text('{"name": "Trial"}')
    assert "usage.png" in card(capsys, checkpoint, "--results", results, "--output", output)
    assert (output.parent / "usage.png").read_bytes() == b"picture"
    text = output.read_text()
    assert "# Trial" in text
    assert "](usage.png)" in text
    quarter = next(x for x in json.loads(USAGE.read_text())["results"] if x["kv_usage"] == 0.25)
    assert f"| 25% | {quarter['usage']:.1%} | {quarter['loss']:.4f} |" in text


def test_card_leaves_what_it_did_not_write(capsys, checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "README.md"
    output.write_text("# Mine\n")
    assert "--force" in refusal(capsys, "card", checkpoint, "--output", output)
    assert output.read_text() == "# Mine\n"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        assert cli.main(["card", str(checkpoint), "--output", str(output), "--force"]) == 130
    assert output.read_text() == "# Mine\n"
    capsys.readouterr()
    card(capsys, checkpoint, "--output", output, "--force")
    assert "# Mine" not in output.read_text()


def test_refused_cards(capsys, checkpoint, tmp_path):
    def message(*arguments):
        return refusal(capsys, "card", *arguments)

    output = tmp_path / "card.md"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "usage.json").write_text("{")
    assert "CHECKPOINT" in message()
    assert "missing" in message(tmp_path / "missing")
    assert "config.json" in message(tmp_path / "nothing")
    assert "usage.json" in message(checkpoint, "--output", output, "--results", tmp_path / "broken")
    assert "missing" in message(checkpoint, "--output", output, "--results", tmp_path / "missing")
    assert "--repo-id" in message(checkpoint, "--output", output, "--repo-id", "./my-ham")
    assert "--output" in message(checkpoint, "--output", tmp_path)
    assert "There is no folder for this file" in message(checkpoint, "--output", tmp_path / "missing" / "card.md")
    assert not output.exists()


def test_push_says_what_it_did(capsys, checkpoint, monkeypatch):
    calls = []

    def push_folder(folder, repo_id, **arguments):
        calls.append((str(folder), repo_id, arguments))
        commit = SimpleNamespace(commit_url="http://127.0.0.1/me/my-ham/commit/0123", oid="0123")
        return Pushed("me/my-ham", commit, ["a", "b"], 2_500_000, "the folder's", ["a_ham.py"], ["x.pt"])

    monkeypatch.setattr("ham_hf.hub.push.push_folder", push_folder)
    assert cli.main(["push", checkpoint, "my-ham", "--private", "--revision", "trial", "--message", "First"]) == 0
    output = capsys.readouterr().out
    assert calls == [(str(checkpoint), "my-ham", {"private": True, "revision": "trial", "commit_message": "First"})]
    for part in ("2 files (2.5 MB)", "me/my-ham/commit/0123", "revision='0123'", "the folder's", "a_ham.py", "x.pt"):
        assert part in output
    cli.main(["push", checkpoint, "my-ham"])
    assert calls[1][2] == {"private": None, "revision": None, "commit_message": None}


def test_refused_pushes(capsys, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise ConnectionError("no route")

    assert "OWNER/NAME" in refusal(capsys, "push", checkpoint)
    for name in ("./my-ham", "../my-ham", "/srv/my-ham", str(tmp_path)):
        message = refusal(capsys, "push", checkpoint, name)
        assert "push uploads to the Hub" in message
        assert f"cp -r {checkpoint} {name}" in message
    assert "missing" in refusal(capsys, "push", tmp_path / "missing", "me/my-ham")
    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert "no route" in refusal(capsys, "push", checkpoint, "me/my-ham")
    response = SimpleNamespace(status_code=401, headers={}, request=None)
    monkeypatch.setattr(HfApi, "create_repo", Mock(side_effect=HfHubHTTPError("Unauthorized", response=response)))
    assert "HF_TOKEN" in refusal(capsys, "push", checkpoint, "me/my-ham")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (torch.OutOfMemoryError, 1)])
def test_interruption_and_lack_of_memory_end_in_one_line(capsys, monkeypatch, error, status):
    def fail(arguments):
        raise error

    monkeypatch.setattr(demo, "load", fail)
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_mixed_layers_are_measured_where_they_have_attention(tokenizer):
    model = tiny_model(len(tokenizer), layer_types=["linear_attention", "hybrid", "full_attention"])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    cache = HAMCache(model.config)
    prefill(model, ids, cache, Setting("threshold", 2.0))
    run = measure(cache, Setting("threshold", 2.0), ids.shape[1], speed=1.0, loss=None)
    assert run.usage_by_layer == [0.0, 1.0]
    assert run.usage == 0.5
    assert run.kept_per_head == (ids.shape[1] - 1) / 2
    assert set(run.prompt_heads) == {0}


def test_prompts_are_read_in_pieces(tokenizer, monkeypatch):
    model = tiny_model(len(tokenizer))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    setting = Setting("threshold", 0.5)
    whole, pieces = HAMCache(model.config), HAMCache(model.config)
    loss = prefill(model, ids, whole, setting, score=True)
    monkeypatch.setattr("ham_hf.inspection.runs.PREFILL_TOKENS", 7)
    assert prefill(model, ids, pieces, setting, score=True) == pytest.approx(loss, rel=1e-5)
    assert heads_that_kept(pieces, ids.shape[1]) == heads_that_kept(whole, ids.shape[1])


def test_the_option_for_the_loss_has_an_old_name(capsys, checkpoint):
    arguments = ["generate", PROMPT, "--model", str(checkpoint), "--max-new-tokens", "1"]
    assert cli.main([*arguments, "--score"]) == 0
    old = capsys.readouterr()
    assert old.err == "ham-hf: warning: --score is now called --loss\n"
    assert cli.main([*arguments, "--loss"]) == 0
    assert "loss" in capsys.readouterr().out
    assert "loss" in old.out
    assert cli.main(arguments) == 0
    assert "loss" not in capsys.readouterr().out


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
