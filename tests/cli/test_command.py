# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The command `ham-hf` itself: help, refusals without torch, what it registers, how it ends."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import ham_hf
import ham_hf.cli as cli
from ham_hf import HAMForCausalLM, __version__
from ham_hf.cli import demo
from tests.cli.calls import PROMPT, refusal


def test_the_study_is_where_its_results_are(capsys):
    for arguments in (["study"], ["study", "--help"], ["study", "cpu", "--output", "x", "--report"]):
        assert "in a checkout of the repository run `python -m model_cards.study`" in refusal(capsys, *arguments)
    assert cli.main([]) == 0
    assert "study" not in capsys.readouterr().out


def test_help_and_version(capsys):
    for arguments, expected in (
        (["--version"], f"ham-hf {__version__}\n"),
        (["--help"], "ham-hf demo"),
        (["generate", "--help"], "--threshold 0 0.5 2"),
        (["demo", "--help"], "--max-new-tokens"),
        (["inspect", "--help"], "ham-hf inspect letter.txt --threshold 0.4 0.6"),
        (["calibrate", "--help"], "ham-hf calibrate my-ham --text book.txt"),
        (["card", "--help"], "ham-hf card my-ham --results my-results --repo-id OWNER/my-ham"),
        (["push", "--help"], "ham-hf push my-ham OWNER/my-ham --private"),
        (["serve", "--help"], "ham-hf serve my-ham --memory 8"),
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
        *[([x, "--help"], 0) for x in ("generate", "demo", "train", "calibrate", "card", "push", "serve", "run")],
        (["train", "no/such/recipe.yaml"], 2),
        (["study", "cpu", "--output", "x"], 2),
        (["calibrate", "no/such/folder", "--text", "x", "--in-place"], 2),
        (["card", "no/such/folder"], 2),
        (["push", "no/such/folder", "me/my-ham"], 2),
        (["generate", "Ahab", "--model", "no/such/folder"], 2),
        (["serve", "no/such/folder"], 2),
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


@pytest.mark.slow
def test_importing_the_package_registers_it_for_users_at_once(run_program, tmp_path):
    done = run_program(AT_ONCE, folder=tmp_path, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_the_command_registers_it_with_the_first_class_that_is_asked_for():
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pipe_gets_the_whole_text_without_escape_codes(checkpoint):
    """And stderr nothing, whatever torchao and PyTorch have to say about each other."""
    command = [sys.executable, "-c", COMMAND, "generate", PROMPT, "--model", checkpoint]
    command += ["--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    output = done.stdout.decode()
    assert PROMPT in output
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (torch.OutOfMemoryError, 1)])
def test_interruption_and_lack_of_memory_end_in_one_line(capsys, monkeypatch, error, status):
    def fail(arguments):
        raise error

    monkeypatch.setattr(demo, "load", fail)
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err.strip().count("\n") == 0
