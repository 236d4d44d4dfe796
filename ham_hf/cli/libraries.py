# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Imports Transformers for a command, and keeps the messages of other packages off the terminal."""

import logging

# Transformers imports torchao if it is installed. torchao then warns of each of its compiled kernels that this build
# of PyTorch cannot load, and PyTorch warns of how torchao registers two classes: no command uses either.
# Their errors still show, and so do the warnings of every other logger.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def import_transformers() -> None:
    """Imports Transformers, registers HAM and silences Transformers' messages; the commands print their own."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    import huggingface_hub
    import transformers

    import ham_hf.auto_classes  # noqa: F401  registers HAM

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
