# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Stops a training at the end of a step, saved, when a signal asks for it."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """Inside of `with`, Ctrl-C and SIGTERM let the step end, and have it saved, before the training stops.

    Another signal after the first second interrupts at once, which costs the steps since the last checkpoint. Before
    that it is the same request, which reaches a process from the terminal and once more from what launched it.

    Attributes:
        asked: whether to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        """Takes the signals over, which only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {x: signal.signal(x, self._ask) for x in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
        elif now - self._asked_at > 1:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops all ranks after the same step, whichever was told to."""
        if args.world_size > 1:
            self.asked = any(gather_object([self.asked]))
        if self.asked:
            control.should_save = control.should_training_stop = True
