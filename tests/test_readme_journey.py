# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The README's way from a Transformer on disk to a HAM on the Hub and back, every command as it stands there."""

import os
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import ham_hf
from tests.hub.loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# Runs a command as a shell would.
PROGRAM = """
import runpy, sys

sys.argv = sys.argv[1:]
if sys.argv[0] == "ham-hf":
    from ham_hf.cli import main
    sys.exit(main())
assert sys.argv.pop(0) == "python"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_every_command_of_the_journey(run_program, tmp_path):
    text = (ROOT / "README.md").read_text().split("<!-- journey:begin -->")[1].split("<!-- journey:end -->")[0]
    commands = re.search(r"```bash\n(.*?)```", text, re.DOTALL).group(1).splitlines()
    program = re.search(r"```py\n(.*?)```", text, re.DOTALL).group(1)
    assert [command.split()[0] for command in commands] == ["python", "ham-hf", "ham-hf", "ham-hf"]

    source = tmp_path / "path/to/Qwen3-0.6B"
    AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE)).save_pretrained(source)
    AutoTokenizer.from_pretrained(f"{ham_hf.__path__[0]}/checkpoints/ham-tiny").save_pretrained(source)
    (tmp_path / "conversion_scripts").symlink_to(ROOT / "conversion_scripts")
    with LoopbackHub().serving() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }

        def run(command: str) -> str:
            words = shlex.split(command.replace("OWNER", hub.user))
            done = run_program(PROGRAM, *words, folder=tmp_path, environment=environment, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        converted, generated, described, pushed = map(run, commands)
        assert "largest difference" in converted
        assert "Wrote my-ham" in converted
        assert "100" in generated
        assert "Wrote my-ham/README.md" in described
        assert f"{hub.user}/my-ham" in pushed
        assert hub.repositories.keys() == {f"{hub.user}/my-ham"}
        (tmp_path / "load.py").write_text(program.replace("OWNER", hub.user))
        assert run(f"python {tmp_path}/load.py").startswith("The captain looked at the sea, and")
