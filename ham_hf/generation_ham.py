# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Generation with a HAM: every override of Transformers' GenerationMixin."""

from functools import wraps
from typing import Any

import torch
from transformers.generation import (
    CandidateGenerator,
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import ModelOutput

from .cache_ham import HAMCache
from .configuration_ham import HAMConfig
from .inputs_ham import CACHE_NAME, given_cache

# What decides which tokens are kept, in a call of `generate` or of `forward`, or in a generation configuration.
ROUTING_ARGUMENTS = ("threshold", "kv_usage", "kv_budget")


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which tokens were chosen for rows that had ended: these count as padding.

    Attributes:
        fillers: for each token generated so far, `[B]` bool of the rows that had ended before it.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.fillers: list[torch.Tensor] = []
        self._ended: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """`[B]` bool of the rows that end with the last token of `input_ids` `[B, T]`."""
        ends = super().__call__(input_ids, scores, **kwargs)
        ended = torch.zeros_like(ends) if self._ended is None else self._ended
        self.fillers.append(ended)
        self._ended = ended | ends
        return ends

    def padding(self) -> torch.Tensor | None:
        """`[B, n]` bool of the tokens generated, true where a row had ended; `None` if the host sees that none had."""
        if not self.fillers or len(self.fillers[-1]) == 1:
            return None
        # A GPU is not waited for.
        if self.fillers[-1].device.type == "cpu" and not bool(self.fillers[-1].any()):
            return None
        return torch.stack(self.fillers, dim=1)


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
        own = (*ROUTING_ARGUMENTS, "tokens_in_cache")
        others = {name: value for name, value in model_kwargs.items() if name not in own}
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

    def _sample(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Generates; without an end-of-sequence token Transformers feeds rows that have ended what they predict."""
        if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            stopping_criteria = kwargs["ended_rows"] = EndedRows(stopping_criteria)
        return super()._sample(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with drafts; the cache records what it may have to take back during this call only.

        Transformers would feed the whole prompt again, so the first call is told how much of it the cache holds.
        """
        kwargs["tokens_in_cache"] = kwargs[CACHE_NAME].get_seq_length()
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:
            kwargs[CACHE_NAME].stop_past_recording()

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        ended_rows: EndedRows | None = None,
        tokens_in_cache: int = 0,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Marks what is fed to rows that have ended as padding, and leaves out what no forward call takes.

        The tokenizers are there for `stop_strings`.
        """
        if tokens_in_cache and kwargs.get("is_first_iteration"):
            next_sequence_length = input_ids.shape[1] - tokens_in_cache
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        padding = None if ended_rows is None else ended_rows.padding()
        cache = inputs.get(CACHE_NAME)
        if inputs.get("attention_mask") is None and (
            padding is not None or (isinstance(cache, HAMCache) and cache.past_real() is not None)
        ):
            # Transformers drops a mask of ones only; what the cache holds must not contradict it all the same.
            new = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            seen = 0 if cache is None else cache.get_seq_length()
            inputs["attention_mask"] = new.new_ones((new.shape[0], seen + new.shape[1]), dtype=torch.long)
        if padding is not None:
            mask = inputs["attention_mask"].clone()
            mask[:, -padding.shape[1] :].masked_fill_(padding, 0)
            inputs["attention_mask"] = mask
        return inputs

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
