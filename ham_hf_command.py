# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Entry point of the command `ham-hf`, outside of the package, whose import it tells that PyTorch can wait."""

# Read by `ham_hf/__init__.py`.
running = False


def main() -> int:
    """Runs the command line; returns the exit status."""
    global running
    running = True
    from ham_hf.cli import main as run

    return run()
