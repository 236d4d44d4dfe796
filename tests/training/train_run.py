# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf train` with FSDP2 among CPUs, which accelerate has for accelerators only: ``train_run.py RECIPE``."""

import os
import sys

from trainer_run import FSDP2, pass_for_accelerators

from ham_hf.cli import main

if __name__ == "__main__":
    pass_for_accelerators()
    os.environ.update(FSDP2)
    sys.exit(main(["train", sys.argv[1]]))
