# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Generation with a HAM: every override of Transformers' GenerationMixin."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache
from transformers.generation import (
    CandidateGenerator,
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from .cache_ham import HAMCache
from .configuration_ham import HAMConfig
from .cuda_graph_ham import CapturedForward, counts_positions, has_hooks, obstacle_of_model
from .inputs_ham import CACHE_NAME, given_cache, name_cache

# Arguments that decide which tokens are kept, in a call of `generate` or `forward` or in a generation configuration.
ROUTING_ARGUMENTS = ("threshold", "kv_usage", "kv_budget")
# Routing arguments of the running `generate` of each model, in this context.
_routing: ContextVar[Mapping[Any, dict[str, Any]]] = ContextVar("ham_routing", default=MappingProxyType({}))


@contextmanager
def routed(model: Any, routing: dict[str, Any]) -> Iterator[None]:
    """Applies `routing` to calls of `model` and of its base model that give no routing arguments themselves."""
    token = _routing.set({**_routing.get(), model: routing, model.base_model: routing})
    try:
        yield
    finally:
        _routing.reset(token)


def with_routing(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Adds the routing arguments of this model's running `generate` to the keyword arguments of a forward call.

    Logits processors and decoding loops call the model without these arguments. A call that gives one of them is
    left as it is.

    Raises:
        ValueError: if thresholds were given one per row, and this call has other rows.
    """
    routing = _routing.get().get(model)
    if not routing:
        return kwargs
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    if any(given.get(name) is not None for name in ROUTING_ARGUMENTS):
        return kwargs
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if isinstance(tokens, torch.Tensor) and "threshold" in routing:
        routing = routing | {"threshold": _threshold_of_rows(routing["threshold"], len(tokens))}
    return kwargs | routing


def own_routing(config: HAMConfig, generation_config: GenerationConfig) -> dict[str, Any]:
    """The routing arguments that a checkpoint's generation configuration sets.

    It sets neither `threshold` nor `kv_usage` beside `config.threshold`: otherwise a checkpoint's own default would
    override `from_pretrained(path, threshold=...)`.
    """
    names = ROUTING_ARGUMENTS if config.fixed_threshold is None else ("kv_budget",)
    own = vars(generation_config)
    return {name: own[name] for name in names if own.get(name) is not None}


def first_routing(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """The routing arguments in force: each from the first of `sources` that sets it; `None` sets nothing.

    `threshold` and `kv_usage` decide the same thing, so the first one found hides the other in later sources, too.
    """
    routing: dict[str, Any] = {}
    for source in sources:
        found = {name: source[name] for name in ROUTING_ARGUMENTS if source.get(name) is not None}
        if "threshold" in routing or "kv_usage" in routing:
            found = {name: value for name, value in found.items() if name == "kv_budget"}
        routing = found | routing
    return routing


def _threshold_of_rows(threshold: Any, batch: int) -> Any:
    """A threshold for the rows of a call made within `generate`, which repeats rows side by side."""
    if not isinstance(threshold, torch.Tensor) or threshold.ndim not in (1, 3):
        return threshold
    dim = 0 if threshold.ndim == 1 else 1
    rows = threshold.shape[dim]
    if rows in (1, batch):
        return threshold
    if batch % rows:
        raise ValueError(
            f"`threshold` has one entry for each of the {rows} rows that `generate` was given, and the model was "
            f"called with {batch} rows meanwhile: give that call a `threshold` of its own."
        )
    return threshold.repeat_interleave(batch // rows, dim)


def _check_cache_implementation(implementation: str | None) -> None:
    if implementation not in (None, "dynamic", "offloaded"):
        raise ValueError(
            "`cache_implementation` must be None, 'dynamic' or 'offloaded' for a HAM model, which keeps tokens in a "
            f"HAMCache of its own, got {implementation!r}."
        )


def _check_continuation(cache: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a prompt no longer than the tokens in the cache: Transformers takes it for the whole conversation.

    A prompt may hold only the new tokens if its mask covers all tokens.
    """
    for prompt in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")):
        if isinstance(prompt, torch.Tensor) and prompt.ndim > 1:
            break
    else:
        return
    seen, length = cache.get_seq_length() if isinstance(cache, Cache) else 0, prompt.shape[1]
    mask = kwargs.get("attention_mask")
    new_tokens_only = isinstance(mask, torch.Tensor) and mask.shape[-1] > length
    if seen and length <= seen and not new_tokens_only:
        raise ValueError(
            f"`cache` holds {seen} tokens, and the prompt has {length}. Give the whole conversation: the tokens that "
            "the cache holds, then the new ones, at least one."
        )


class EarlyExitDrafts(AssistedCandidateGenerator):
    """Drafts made by the first `assistant_early_exit` layers of the model itself.

    Transformers' own class lowers `config.num_hidden_layers` while it drafts, for other threads too, and for good if a
    draft fails. Here the cache of the drafts determines the number of layers.
    """

    def __init__(self, *, assistant_model: Any, generation_config: GenerationConfig, **kwargs: Any):
        layers = generation_config.assistant_early_exit
        most = assistant_model.config.num_hidden_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= most:
            raise ValueError(f"`assistant_early_exit` must be an int between 1 and {most} (layers), got {layers!r}.")
        super().__init__(assistant_model=assistant_model, generation_config=generation_config, **kwargs)
        # Otherwise the drafts would be made with drafts, too.
        self.generation_config.assistant_early_exit = None
        cache = HAMCache(assistant_model.config)
        del cache.layers[layers:]
        cache.activate_past_recording()
        self.assistant_kwargs[CACHE_NAME] = cache


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember the tokens chosen for rows that had already ended; these count as padding.

    Attributes:
        fillers: `[B, n]` bool of the tokens generated so far, true where a row had ended before; `None` at first.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.fillers: torch.Tensor | None = None
        self._ended: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """`[B]` bool of the rows that end with the last token of `input_ids` `[B, T]`."""
        ends = super().__call__(input_ids, scores, **kwargs)
        ended = torch.zeros_like(ends) if self._ended is None else self._ended
        new = ended[:, None]
        self.fillers = new if self.fillers is None else torch.cat([self.fillers, new], dim=1)
        self._ended = ended | ends
        return ends

    def padding(self) -> torch.Tensor | None:
        """`fillers`, or `None` if the host knows that no row had ended; it does not wait for a GPU to find out."""
        if self.fillers is None or len(self.fillers) == 1:
            return None
        if self.fillers.device.type == "cpu" and not bool(self.fillers[:, -1].any()):
            return None
        return self.fillers


class HAMGenerationMixin(GenerationMixin):
    """`generate` for a HAM: its own cache, and thresholds that reach every forward call."""

    config: HAMConfig

    @wraps(GenerationMixin.generate)
    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generates as Transformers does; the cache of a `ModelOutput` is called `cache` under every release."""
        if kwargs.get("cache_implementation") == "paged":
            # Transformers would start continuous batching before it prepares and checks the configuration.
            _check_cache_implementation("paged")
        cache = given_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            _check_continuation(cache, inputs, kwargs)
            kwargs[CACHE_NAME] = cache
        with routed(self, self._routing_of_call(generation_config, kwargs)):
            return name_cache(super().generate(inputs, generation_config, *args, **kwargs))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `NotImplementedError`: Transformers' continuous batching uses a cache that keeps every token."""
        raise NotImplementedError(
            f"{type(self).__name__} has no continuous batching: Transformers' paged cache would keep what HAM drops. "
            "Give `generate` a batch of rows, padded on the left."
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `NotImplementedError`, as `init_continuous_batching` does."""
        self.init_continuous_batching()

    def _routing_of_call(self, generation_config: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The routing arguments in force for a call of `generate`: `threshold` or `kv_usage`, and `kv_budget`, if set.

        Precedence, highest first: an argument of `generate`, the configuration given to it, the enclosing call of the
        same model (which makes the drafts of an assistant), `config.threshold`, the model's own generation
        configuration. `None` sets nothing. `threshold` and `kv_usage` decide the same thing, so the first one found
        hides the other, too.
        """
        own = own_routing(self.config, self.generation_config)
        configuration = {} if generation_config is None else vars(generation_config)
        return first_routing(given, configuration, _routing.get().get(self, own))

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Loads the generation configuration, and clears its mark `_from_model_config`, see `HAMForCausalLM`."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        self.generation_config._from_model_config = None

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Lets generation configurations set `threshold` (or `kv_usage`) and `kv_budget`, which Transformers drops."""
        routing = self._routing_of_call(generation_config, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ROUTING_ARGUMENTS}
        prepared, model_kwargs = super()._prepare_generation_config(  # type: ignore[misc]
            generation_config, *args, **kwargs
        )
        _check_cache_implementation(prepared.cache_implementation)
        # An assistant model receives this configuration, too.
        for name in ROUTING_ARGUMENTS:
            vars(prepared).pop(name, None)
        return prepared, model_kwargs | routing

    # Transformers passes keyword arguments only.
    def _get_candidate_generator(  # type: ignore[override]
        self, *, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        """Hides the routing arguments from an assistant model: it has other layers, or is not a HAM."""
        own = (*ROUTING_ARGUMENTS, "tokens_in_cache")
        others = {name: value for name, value in model_kwargs.items() if name not in own}
        if kwargs["generation_config"].assistant_early_exit is not None:
            names = ("input_ids", "generation_config", "inputs_tensor", "logits_processor")
            arguments = {name: kwargs[name] for name in names}
            return EarlyExitDrafts(assistant_model=self, model_kwargs=others, **arguments)
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
        cache = HAMCache(self.config, offloading=generation_config.cache_implementation == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """True if steps are replayed from a CUDA graph, which `disable_compile=True` turns off as it does compilation.

        Beams change the cache at every step, and drafts are several tokens: they are left to the model's own call, as
        are chunked prefill, models with hooks, and positions of the caller's own.
        """
        if generation_config.compile_config is not None:
            return bool(super()._valid_auto_compile_criteria(model_kwargs, generation_config))  # type: ignore[misc]
        plain = generation_config.num_beams in (None, 1) and not generation_config.is_assistant
        plain = plain and not generation_config.disable_compile and generation_config.prefill_chunk_size is None
        if not plain or obstacle_of_model(self) is not None or has_hooks(self):  # type: ignore[arg-type]
            return False
        return counts_positions(model_kwargs.get("position_ids"), model_kwargs.get("attention_mask"))

    def get_compiled_call(self, compile_config: Any) -> Any:
        """The call that replays steps; with a `compile_config`, that of Transformers, by `torch.compile`."""
        if compile_config is not None:
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        return CapturedForward(self)  # type: ignore[arg-type]

    def _sample(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Generates, and tracks rows that have ended at an end-of-sequence token: Transformers feeds them padding."""
        if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            stopping_criteria = kwargs["ended_rows"] = EndedRows(stopping_criteria)
        return super()._sample(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with drafts; the cache records tokens that may have to be removed during this call only.

        Transformers would feed the whole prompt again, so the first call receives the number of tokens in the cache.
        """
        cache = kwargs.get(CACHE_NAME)
        if not isinstance(cache, HAMCache):
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        kwargs["tokens_in_cache"] = cache.get_seq_length()
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:
            cache.stop_past_recording()

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
        """Marks tokens fed to rows that have ended as padding, and drops arguments that no forward call takes.

        The tokenizers serve `stop_strings`.
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
            # Transformers drops only a mask of ones, which must still agree with the padding in the cache.
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


__all__ = ["HAMGenerationMixin", "first_routing", "own_routing", "with_routing"]
