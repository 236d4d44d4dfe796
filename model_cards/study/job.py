# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""One model of a study: its name, all settings that determine its result, and its construction."""

from dataclasses import dataclass
from typing import Any

import torch

from ham_hf.configuration_ham import HAMConfig
from ham_hf.modeling_ham import HAMForCausalLM

from .fitting import Training, build_model, config_of_size

# Name of a job, unique in a study, from the fields of the job or of its result.
NAME = "{part}.{task}.{arm}.{seed}"


@dataclass(frozen=True)
class Job:
    """One model to train and measure.

    Attributes:
        part: `"recall"`, `"gradients"`, `"routers"`, `"repairs"`, `"language"` or `"selection"`.
        task: the task's name in the study file.
        arm: the model's name there.
        seed: seed of weights and data.
        settings: all other settings that determine the result: `model` (fields of its HAMConfig), `equal_to` (fields
            of the model whose number of parameters it matches), `task`, `training`, `gradient`, `usages` and `pairs`;
            and `oracle`, if its router is one.
    """

    part: str
    task: str
    arm: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The job's name, see `NAME`."""
        return NAME.format_map(vars(self))

    @property
    def training(self) -> Training:
        """The model's training."""
        return Training(**self.settings["training"])

    def config(self, vocab_size: int) -> HAMConfig:
        """The model's configuration, with an MLP width that equalises the number of parameters."""
        vocabulary = {"vocab_size": vocab_size}
        with torch.device("meta"):
            parameters = HAMForCausalLM(HAMConfig(**self.settings["equal_to"] | vocabulary)).num_parameters()
        return config_of_size(self.settings["model"] | vocabulary, parameters)

    def build(self, vocab_size: int, device: str) -> HAMForCausalLM:
        """The model with its initial weights."""
        return build_model(self.config(vocab_size), self.seed).to(device)  # type: ignore[arg-type]  # torch wraps it
