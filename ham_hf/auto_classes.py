# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Registers HAM with Transformers' Auto classes when it is imported, and holds the public classes."""

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
from .modeling_ham import (
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
    HAMPreTrainedModel,
)

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
