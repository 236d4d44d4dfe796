# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Generation with a HAM: every override of Transformers' GenerationMixin."""

from functools import wraps
from typing import Any

import torch
from transformers.generation import CandidateGenerator, GenerationConfig, GenerationMixin, GenerationMode
from transformers.modeling_outputs import ModelOutput

from .cache_ham import HAMCache
from .configuration_ham import HAMConfig
from .inputs_ham import CACHE_NAME, given_cache

# What decides which tokens are kept, in a call of `generate` or of `forward`, or in a generation configuration.
ROUTING_ARGUMENTS = ("threshold", "kv_usage", "kv_budget")


class HAMGenerationMixin(GenerationMixin):
    """What `generate` does differently for a HAM: its own cache, and thresholds that reach every forward call."""

    config: HAMConfig

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as Transformers does; the cache of a `ModelOutput` is called `cache` under every release."""
        cache = given_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        output = super().generate(*args, **kwargs)
        if CACHE_NAME != "cache" and isinstance(output, ModelOutput):
            output.cache = output.get(CACHE_NAME)
        return output

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Loads the generation configuration; what is saved next is marked as the model's own, see `__init__`."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        self.generation_config._from_model_config = None

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Lets generation configurations set `threshold` (or `kv_usage`) and `kv_budget`, which Transformers drops.

        An argument of `generate` comes before the configuration given to it, that before `config.threshold`, and that
        before the model's own generation configuration. `None` sets nothing. `threshold` and `kv_usage` decide the
        same, so the one that comes first hides the other, too.
        """
        given = {name: kwargs.pop(name) for name in ROUTING_ARGUMENTS if name in kwargs}
        routing: dict[str, Any] = {}
        own = vars(self.generation_config)
        if self.config.threshold is not None:
            # Else `from_pretrained(path, threshold=...)` would be lost on a checkpoint with a default of its own here.
            own = {name: value for name, value in own.items() if name not in ("threshold", "kv_usage")}
        for source in (given, {} if generation_config is None else vars(generation_config), own):
            found = {name: source[name] for name in ROUTING_ARGUMENTS if source.get(name) is not None}
            if "threshold" in routing or "kv_usage" in routing:
                found = {name: value for name, value in found.items() if name == "kv_budget"}
            routing = found | routing
        prepared, model_kwargs = super()._prepare_generation_config(  # type: ignore[misc]
            generation_config, *args, **kwargs
        )
        # An assistant model is given this configuration, too.
        for name in ROUTING_ARGUMENTS:
            vars(prepared).pop(name, None)
        return prepared, model_kwargs | routing

    # Transformers calls it with names only.
    def _get_candidate_generator(  # type: ignore[override]
        self, *, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        """Leaves an assistant model to its own generation configuration: it has other layers, or is no HAM."""
        others = {name: value for name, value in model_kwargs.items() if name not in ROUTING_ARGUMENTS}
        return super()._get_candidate_generator(model_kwargs=others, **kwargs)  # type: ignore[misc]

    # Transformers annotates this method as returning a bool, though it returns nothing, and `self` of its generation
    # methods as a protocol that no model meets.
    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Makes a HAMCache, which `generate` then fills; Transformers' own caches would store what HAM drops."""
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                "`cache_implementation` must be None, 'dynamic' or 'offloaded' for a HAM model, got "
                f"{implementation!r}."
            )
        cache = HAMCache(self.config, offloading=implementation == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        *,
        inputs_embeds: torch.Tensor | None = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Leaves out the tokenizers that `generate` needs for `stop_strings`, but hands on to every forward call."""
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeats rows for beams and several return sequences; rows are the second dimension of a threshold tensor."""
        threshold = model_kwargs.get("threshold")
        if isinstance(threshold, torch.Tensor) and (threshold.ndim != 1 or len(threshold) == 1):
            del model_kwargs["threshold"]
        else:
            threshold = None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if threshold is not None:
            if threshold.ndim == 3 and threshold.shape[1] > 1:
                threshold = threshold.repeat_interleave(expand_size, dim=1)
            model_kwargs["threshold"] = threshold
        return input_ids, model_kwargs


__all__ = ["HAMGenerationMixin"]
