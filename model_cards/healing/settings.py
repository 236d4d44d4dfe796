# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Everything that determines the result of healing: sizes and rates, and the compared ways to heal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that determines the result, stored with it."""

    seed: int = 0
    context: int = 512
    rows: int = 4
    source_steps: int = 1500
    source_lr: float = 3e-3
    steps: int = 200
    lr: float = 1e-3
    open_gates: float = -2.0
    measure_every: int = 20
    windows_per_document: int = 12

    @property
    def schedule(self) -> list[list[float]]:
        """Steps and usage: down to a half, held, down to a quarter, held."""
        return [[self.steps * n // 5, usage] for n, usage in enumerate((1.0, 0.5, 0.5, 0.25))]

    @property
    def half_until(self) -> int:
        """The last step of the half."""
        return self.steps * 2 // 5


@dataclass(frozen=True)
class Run:
    """One way to heal."""

    label: str
    weight: float = 1.0
    opened: bool = True
    router: str = "cosine"


RUNS = {
    "healed": Run("healed: distilled, gates opened"),
    "next_tokens": Run("healed without a teacher", weight=0.0),
    "shut": Run("healed with the gates left shut", opened=False),
    "random": Run("healed, random router (control)", router="random"),
}
