# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`python -m ham_hf.cli`, the form in which launchers of several processes call the command."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
