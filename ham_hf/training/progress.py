# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Progress of a training for the user: a progress bar, a line per log, a table per evaluation, and log.jsonl."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_whole

LOG = "log.jsonl"
# What an entry of the log has one of.
LOGGED = {"loss", "eval_loss", "transfer_error"}
# Names of an evaluation's settings in its table.
NAMES = {"": "learned", "usage": "for usage", "threshold": "at", "teacher": "(the teacher)"}


class LogFile(TrainerCallback):
    """Writes losses, usage and evaluations to a JSON Lines file, an object per log, with its `step`.

    An evaluation is written when it is over, with the lists added to its log meanwhile, which tools that plot logs
    would not accept.

    A resumed training rewrites its history, so that steps done twice appear once.

    Args:
        path: the file.
        before: logs of an earlier stage, which come first.
    """

    def __init__(self, path: Path, before: list[dict[str, Any]]):
        self.path = path
        self.before = before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the history before the checkpoint."""
        if state.is_world_process_zero:
            write_whole(self.path, "".join(map(_line, [*self.before, *state.log_history])))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a line for a loss."""
        if logs is not None and "loss" in logs:
            self._add(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds a line for an evaluation."""
        self._add(state)

    def _add(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: dict[str, Any]) -> str:
    # Trainer's summary at the end covers this run only.
    return json.dumps(entry) + "\n" if not LOGGED.isdisjoint(entry) else ""


class Progress(TrainerCallback):
    """Shows a bar on a terminal, a line for every log and a table for every evaluation, on rank 0.

    Every line is written out at once, also into a file or a pipe. Without a bar, the first step has a line of its own,
    so that the speed is known before the first loss.

    Args:
        tokens: tokens that a step reads.
        bar: True to show a bar.
        loss: name of a step's loss; "loss" is the next-token loss, as in the tables.
    """

    def __init__(self, tokens: int, bar: bool, loss: str = "loss"):
        self.tokens = tokens
        self.show_bar = bar
        self.loss = loss
        self.bar: tqdm | None = None
        self.seen = (0, 0.0)  # step and time of the last line with a loss, or of the start
        self.stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prints the number of parameters, steps and tokens."""
        if not state.is_world_process_zero:
            return
        self.seen = (state.global_step, time.monotonic())
        sizes = [(x.numel(), x.requires_grad) for x in model.parameters()]
        parameters, learning = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
        part = "" if learning == parameters else f"{learning:,} of "
        begun = f", going on after step {state.global_step:,}" if state.global_step else ""
        steps = f"{state.max_steps:,} steps of {self.tokens:,} tokens{begun}"
        print(f"Training {part}{parameters:,} parameters: {steps}", flush=True)
        disable = None if self.show_bar else True  # `None`: disabled if stderr is not a terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=disable)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar; without one, prints a line for the first step."""
        if self.bar is None:
            return
        self.bar.update()
        if self.bar.disable and not self.stepped and state.global_step % state.logging_steps:
            _write(f"step {state.global_step:6,}  {self._speed(state):,.0f} tokens/s")
        self.stepped = True

    def _speed(self, state: TrainerState) -> float:
        """Tokens per second since the last line with a loss."""
        return (state.global_step - self.seen[0]) * self.tokens / (time.monotonic() - self.seen[1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints a line for a loss, and a table for an evaluation."""
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            speed = self._speed(state)
            self.seen = (state.global_step, time.monotonic())
            kept = f"  kept {logs['kv_usage']:6.1%}" if "kv_usage" in logs else ""
            gate = f"  RNN gate {logs['rnn_gate']:.3f}" if "rnn_gate" in logs else ""
            _write(
                f"step {state.global_step:6,}  {self.loss} {logs['loss']:.4f}{kept}{gate}  "
                f"lr {logs['learning_rate']:.2e}  gradient {logs['grad_norm']:.2f}  {speed:,.0f} tokens/s"
            )
        elif "eval_loss" in logs:
            _write(table_of(state.global_step, logs))
            self.seen = (state.global_step, time.monotonic())


class TransferProgress:
    """Shows a bar on a terminal and a line for every log of a layer-wise transfer, and writes the logs to a file.

    Args:
        path: the log, as JSON Lines; it is rewritten when the transfer goes on.
        steps: steps in all, of which `done` are done.
        tokens: tokens that a step reads.
        logs: those of the steps that are done; `log` adds to it.
        bar: True to show a bar.
    """

    def __init__(self, path: Path, steps: int, done: int, tokens: int, logs: list[dict[str, Any]], bar: bool):
        self.path, self.tokens, self.logs = path, tokens, logs
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=None if bar and done < steps else True)
        self.step, self.seen = done, (done, time.monotonic())

    def __enter__(self) -> "TransferProgress":
        """Writes the logs of the steps that are done."""
        write_whole(self.path, "".join(map(_line, self.logs)))
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the bar."""
        self.bar.close()

    def advance(self) -> None:
        """Counts a step."""
        self.step += 1
        self.bar.update()

    def log(self, figures: dict[str, float]) -> None:
        """Adds figures to the logs, and shows them."""
        self.logs.append(figures)
        write_whole(self.path, "".join(map(_line, self.logs)))
        (step, start), now = self.seen, time.monotonic()
        self.seen = (self.step, now)
        _write(
            f"transfer step {self.step:6,}  error {figures['transfer_error']:.4f}, of the worst layer "
            f"{figures['transfer_error_worst']:.4f}  kept {figures['kv_usage']:6.1%}  RNN gate "
            f"{figures['rnn_gate']:.3f}  lr {figures['learning_rate']:.2e}  "
            f"{(self.step - step) * self.tokens / (now - start):,.0f} tokens/s"
        )


def _write(text: str) -> None:
    """Writes above the bar, and at once: a pipe would hold the text back."""
    tqdm.write(text)
    sys.stdout.flush()


def table_of(step: int, metrics: dict[str, float]) -> str:
    """An evaluation as a table: next-token losses at each setting of the thresholds, and of a teacher.

    Where they were measured, losses of passages read before have a column, `again`.
    """
    lines = [f"evaluation after step {step:,}" if step else "evaluation before the first step"]
    again = f"{'again':>9}" if "eval_second_time" in metrics else ""
    lines += [f"  {'thresholds':<18}{'loss':>8}{'kept':>9}{again}"]
    for key, loss in metrics.items():
        if not key.startswith("eval_loss"):
            continue
        setting = key.removeprefix("eval_loss").strip("/")
        name = NAMES[setting.partition("_")[0]]
        kept = metrics.get(key.replace("loss", "kept", 1))
        kept_text = f"{kept:9.1%}" if kept is not None else " " * 8 + "-"
        label = f"{name} {setting.partition('_')[2]}"
        second = metrics.get(key.replace("loss", "second_time", 1))
        lines.append(f"  {label:<18}{loss:8.4f}{kept_text}" + (f"{second:9.4f}" if second is not None else ""))
    return "\n".join(lines)
