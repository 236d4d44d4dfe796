# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Everything that determines the result of healing: sizes and rates, and the compared arms."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes and rates that all arms share.

    Attributes:
        context: tokens in a row.
        rows: rows in a step.
        repeats: fractions of rows that repeat text and random tokens, see `TokenSampler`; so the source learns to look
            things up.
        names: fraction of rows with names.
        source_steps: steps of the source's training.
        source_lr: its peak rate.
        transfer_steps: steps of layer-wise transfer.
        transfer_lr: its rate.
        steps: steps of end-to-end training after it.
        lr: peak rate of what came from the source.
        added_lr: peak rate of what conversion added.
        open_gates: bias from which gates open.
        held: fraction of a row's tokens in memory at its end, those of window and sinks included.
        windows_per_document: held-out windows of each document at most.
    """

    context: int = 512
    rows: int = 4
    repeats: tuple[float, float] = (0.15, 0.15)
    names: float = 0.3
    source_steps: int = 1500
    source_lr: float = 3e-3
    transfer_steps: int = 100
    transfer_lr: float = 3e-3
    steps: int = 200
    lr: float = 1e-3
    added_lr: float = 3e-3
    open_gates: float = -1.0
    held: float = 0.25
    windows_per_document: int = 12


@dataclass(frozen=True)
class Arm:
    """A memory of the converted model, and how it is healed.

    Attributes:
        label: its name in tables.
        router: router of the memory.
        window: its window.
        sinks: its sinks.
        transfer: True to begin with layer-wise transfer.
        opened: True to open the RNN's gates.
        weight: share of the divergence from the source in the loss; the next-token loss has the rest.
    """

    label: str
    router: str = "cosine"
    window: int = 0
    sinks: int = 0
    transfer: bool = True
    opened: bool = True
    weight: float = 1.0

    @property
    def memory(self) -> str:
        """The name of its memory."""
        return f"{self.router}-{self.window}"

    def usage(self, settings: Settings) -> float:
        """The fraction of the tokens beyond window and sinks to keep, so that as many are held as by other arms."""
        fixed = self.window + self.sinks
        return (settings.held * settings.context - fixed) / (settings.context - fixed)


ARMS = {
    "cosine": Arm("cosine"),
    "l2": Arm("l2", "l2"),
    "l2-window": Arm("l2, window 64, 4 sinks", "l2", 64, 4),
    "random": Arm("random", "random"),
    # The router of a head that keeps nothing beyond its window has no say.
    "recency": Arm("window 124, 4 sinks, nothing else", "random", 124, 4),
    "no-transfer": Arm("cosine, no transfer", transfer=False),
    "no-teacher": Arm("cosine, no teacher", weight=0.0),
    "shut": Arm("cosine, RNN's gates shut", transfer=False, opened=False),
}
