# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The public classes; importing this file registers them with the Auto classes and sets their `push_to_hub`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_ham import HAMCache
from .configuration_ham import HAMConfig
from .hub.push import push_to_hub
from .modeling_ham import (
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
    HAMPreTrainedModel,
)

# Set here because this file does not travel: remote code pushes as Transformers does, without our model card.
HAMPreTrainedModel.push_to_hub = push_to_hub  # type: ignore[assignment, method-assign]

AutoConfig.register("ham", HAMConfig)
AutoModel.register(HAMConfig, HAMModel)
AutoModelForCausalLM.register(HAMConfig, HAMForCausalLM)
AutoModelForSequenceClassification.register(HAMConfig, HAMForSequenceClassification)
AutoModelForTokenClassification.register(HAMConfig, HAMForTokenClassification)
AutoModelForQuestionAnswering.register(HAMConfig, HAMForQuestionAnswering)

__all__ = [
    "HAMCache",
    "HAMConfig",
    "HAMForCausalLM",
    "HAMForQuestionAnswering",
    "HAMForSequenceClassification",
    "HAMForTokenClassification",
    "HAMModel",
    "HAMPreTrainedModel",
]
