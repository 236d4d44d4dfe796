# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What every row of a result file tells: the commit that made it."""

import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def current_commit() -> str | None:
    """The commit of this checkout, with the suffix `-dirty` if its code was changed; `None` outside of git."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head
