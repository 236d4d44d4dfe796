# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Saves and stops a training at the end of a step when a signal asks for it."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """Inside `with`, Ctrl-C and SIGTERM let the step end, save it, and then stop the training.

    Another signal more than a second later interrupts at once, which loses the steps since the last checkpoint. Within
    that second it counts as the same request, which a process may get both from the terminal and from its launcher.

    Attributes:
        asked: True if the training is to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        """Takes the signals over, which only the main thread can do."""
        if threading.current_thread() is threading.main_thread():
            self._before = {x: signal.signal(x, self._ask) for x in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the signals' earlier handlers."""
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
        """Stops all ranks after the same step if any rank got a signal."""
        if args.world_size > 1:
            self.asked = any(gather_object([self.asked]))
        if self.asked:
            control.should_save = control.should_training_stop = True
