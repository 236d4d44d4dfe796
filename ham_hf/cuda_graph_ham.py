# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A decoding step as a CUDA graph: a small model spends more time on kernel launches than on arithmetic."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .cache_ham import HAMCache
from .configuration_ham import HAMConfig
from .decode_step_ham import has_decoding_kernels
from .inputs_ham import CACHE_NAME
from .ops_ham import decode_kernel

if TYPE_CHECKING:
    from .modeling_ham import HAMForCausalLM

# Kinds of RoPE whose frequencies change with the length, which they read on the host.
GROWING_ROPE = ("dynamic", "longrope")
DEVICE = "cuda"
# Arguments of a forward call that a graph has baked in, or that say what it assumes.
REPLAYED = {"input_ids", "attention_mask", "position_ids", "threshold", "kv_usage", "logits_to_keep", "return_dict"}
REPLAYED |= {"use_cache", CACHE_NAME}


# Tensors whose addresses a captured step has baked in; `None` for those that a layer does not have.
Addressed = list[torch.Tensor | None]


class Recording(NamedTuple):
    """A captured step, the logits that it writes, and the tensors whose addresses it has baked in."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    addressed: Addressed


class CapturedStep:
    """Runs one token per row through a model and its cache, replayed from a CUDA graph.

    The first call runs as usual, which compiles the kernels; the second is captured, and every later one replays it.
    After the cache has grown, or something else has changed it, the next two calls do this again. The host waits for
    the GPU only when the cache's spare pages might not suffice for another token; a fuller cache has more of them.

    Rows of the prompt may have been padded; from here on every row has a token at each step. For `kv_budget`,
    gradients, packed rows and drafts that may be removed, call the model instead. The graph knows only the addresses
    of the weights: make a new `CapturedStep` after moving, casting, swapping or wrapping weights or layers.

    Args:
        model: in evaluation mode, on one CUDA device; layers `"hybrid"` and `"linear_attention"`.
        cache: filled by a prompt, not offloaded, not recording for assisted generation.
        threshold, kv_usage: as in `generate`.

    Raises:
        TypeError, ValueError: for a model or a cache that cannot be captured.

    Example:
    ```python
    >>> cache = HAMCache(model.config)
    >>> with torch.no_grad():
    ...     logits = model(**inputs, cache=cache, logits_to_keep=1, threshold=0.4).logits[:, -1]
    >>> step = CapturedStep(model, cache, threshold=0.4)
    >>> for _ in range(100):
    ...     tokens = logits.argmax(-1)
    ...     logits = step(tokens)
    ```
    """

    def __init__(
        self,
        model: "HAMForCausalLM",
        cache: HAMCache,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
    ):
        if error := obstacle_of_model(model) or _obstacle_of_cache(cache) or _obstacle_of_kernels(model, cache):
            raise error
        self.model, self.cache = model, cache
        self._threshold = self._resolved(threshold, kv_usage)
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=model.device)
        self._recording: Recording | None = None
        self._rehearsed: Addressed = []

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds the next token of each row.

        Args:
            tokens: `[B]` int64 on the model's device.

        Returns:
            `[B, vocabulary]` logits, which the next call overwrites.
        """
        if error := _obstacle_of_cache(self.cache, rows=len(self._tokens)):
            raise error
        self._check_tokens(tokens)
        with torch.cuda.device_of(self._tokens):
            return self._next(tokens)

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        """Replays the recording, or makes it."""
        self._tokens.copy_(tokens[:, None])
        self.cache.reserve()
        layers = self.cache.layers
        addressed = [x for layer in layers for x in layer.addressed()]
        recording = self._recording
        if recording is not None and _same(addressed, recording.addressed):
            with self.cache.changing("CapturedStep"):
                for layer in layers:
                    layer.count_step()
            recording.graph.replay()
            return recording.logits
        if error := _obstacle_of_kernels(self.model, self.cache):
            raise error
        if not _same(addressed, self._rehearsed):
            self._rehearsed = addressed
            return self._step()
        self._recording = None  # frees its memory
        self._recording = self._record(addressed)
        self._recording.graph.replay()
        return self._recording.logits

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        own = self._tokens
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"`tokens` must be a tensor [{len(own)}], got {type(tokens).__name__}.")
        if (tokens.shape, tokens.dtype, tokens.device) != (own.shape[:1], own.dtype, own.device):
            raise ValueError(
                f"`tokens` must be [{len(own)}] of {own.dtype} on {own.device}, got {list(tokens.shape)} of "
                f"{tokens.dtype} on {tokens.device}."
            )

    def _step(self) -> torch.Tensor:
        return self.model(self._tokens, cache=self.cache, threshold=self._threshold).logits[:, -1]

    def _record(self, addressed: Addressed) -> Recording:
        """Captures a step: nothing runs on the device, and the host counts the token that the replay will add."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._step()
        return Recording(graph, logits, addressed)

    def _resolved(
        self, threshold: float | list[float] | torch.Tensor | None, kv_usage: float | None
    ) -> torch.Tensor | None:
        """`[layers, B, Hk]` thresholds on the model's device; `None` for the learned ones."""
        batch, heads = self.cache.batch_size, self.model.config.num_key_value_heads
        rules = self.model.model.retention(batch, threshold, kv_usage)
        given = [rule.threshold for rule in rules if rule.threshold is not None]
        tensors = [x.to(self.model.device).expand(batch, heads) for x in given]
        return torch.stack(tensors) if tensors else None


def _same(tensors: Addressed, others: Addressed) -> bool:
    return len(tensors) == len(others) and all(x is y for x, y in zip(tensors, others, strict=True))


class CapturedForward:
    """A model's forward call within `generate`, which replays steps of one token a row from a CUDA graph.

    The first call, and every call that the graph does not cover, is the model's own: several tokens, a row that has
    ended, a `kv_budget`, requested hidden states or attention weights, no cache, or one that is offloaded or keeps
    drafts.

    Args:
        model: one that `obstacle_of_model` has nothing against.
    """

    def __init__(self, model: "HAMForCausalLM"):
        self.model = model
        self._step: CapturedStep | None = None
        self._output_class: Any = None

    def __call__(self, **inputs: Any) -> Any:
        """Takes and returns what the model's own call does."""
        step = None if self._output_class is None else self._step_for(inputs)
        if step is None:
            outputs = self.model(**inputs)
            self._output_class = type(outputs)
            return outputs
        # The next replay writes its logits to the same memory.
        logits = step(inputs["input_ids"][:, -1]).clone()
        return self._output_class(logits=logits[:, None], **{CACHE_NAME: step.cache})

    def _step_for(self, inputs: dict[str, Any]) -> CapturedStep | None:
        """The step of these inputs' cache, made at its first call; `None` if the model is to be called."""
        cache = inputs.get(CACHE_NAME)
        if cache is None or not self._covers(inputs):
            return None
        if self._step is None or self._step.cache is not cache:
            if _obstacle_of_kernels(self.model, cache) is not None:
                return None
            self._step = CapturedStep(self.model, cache, inputs.get("threshold"), inputs.get("kv_usage"))
        return self._step

    def _covers(self, inputs: dict[str, Any]) -> bool:
        """True if a replay gives what the model would; waits for the device if one of several rows may have ended."""
        config, ids, cache = self.model.config, inputs.get("input_ids"), inputs[CACHE_NAME]
        others = [
            name for name, value in inputs.items() if name not in REPLAYED and value is not None and value is not False
        ]
        if others or config.output_attentions or config.output_hidden_states or inputs.get("return_dict") is False:
            return False
        if ids is None or ids.shape[1] != 1 or _obstacle_of_cache(cache, rows=len(ids)) is not None:
            return False
        mask = inputs.get("attention_mask")
        # The only row of a batch has not ended, or there would be no call.
        return mask is None or len(ids) == 1 or bool(mask[:, -1].all())


def has_hooks(model: torch.nn.Module) -> bool:
    """True if a module calls functions of its user, hooks or a `forward` of its own, which a replay would not.

    Transformers' own hooks stay on a model that was once asked for hidden states, and do nothing in other calls.
    """
    if any("forward" in vars(x) for x in model.modules()):
        return True
    hooks = [hook for x in model.modules() for hook in (*x._forward_hooks.values(), *x._forward_pre_hooks.values())]
    return any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks)


def counts_positions(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> bool:
    """True if positions `[B, T]` number the real tokens of each row, as a replay does; waits for the device."""
    if position_ids is None:
        return True
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    if real.shape != position_ids.shape:
        return False
    return bool((position_ids == real.long().cumsum(-1) - 1)[real.bool()].all())


def obstacle_of_model(model: Any) -> Exception | None:
    """The error that says why a model's steps cannot be captured; `None` if they can."""
    if getattr(getattr(model, "config", None), "model_type", None) != HAMConfig.model_type or not hasattr(
        model, "lm_head"
    ):
        return TypeError(f"`model` must be a HAMForCausalLM, got {type(model).__name__}.")
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) > 1 or model.device.type != DEVICE:
        return ValueError(f"`model` must be on one CUDA device, got {', '.join(devices)}.")
    if model.training:
        return ValueError("`model` must be in evaluation mode, got one in training: call `model.eval()`.")
    if getattr(model, "hf_quantizer", None) is not None:
        return ValueError("`model` must have plain weights, got quantised ones: their layers may wait for the host.")
    if "full_attention" in model.config.layer_types:
        return ValueError("`model` must have no 'full_attention' layers: they have no kernel that appends.")
    if not all(has_decoding_kernels(layer.mixer) for layer in model.model.layers):
        return ValueError(
            "`model` must have as many key heads as value heads in every layer, and `qk_norm` per head or none: other "
            "layers have no kernels."
        )
    rope = (model.config.rope_parameters or {}).get("rope_type", "default")
    if rope in GROWING_ROPE:
        return ValueError(f"`model` must have a RoPE of constant frequencies, got {rope!r}.")
    return None


def _obstacle_of_cache(cache: Any, rows: int | None = None) -> Exception | None:
    if not isinstance(cache, HAMCache):
        return TypeError(f"`cache` must be a HAMCache, got {type(cache).__name__}.")
    if not cache.is_initialized:
        return ValueError("`cache` must hold a prompt, got an empty one: run the model with it first.")
    if rows not in (None, cache.batch_size):
        return ValueError(f"`cache` must hold {rows} rows as it did, got {cache.batch_size}.")
    if cache.offload_layers or cache.layers[0].record_past:
        return ValueError("`cache` must be neither offloaded nor recording for assisted generation.")
    return None


@torch.no_grad()
def _obstacle_of_kernels(model: "HAMForCausalLM", cache: HAMCache) -> Exception | None:
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        state, conv_state = layer.recurrent_state, layer.conv_state
        fits = state is not None and decode_kernel("decode_mix_append", state) is not None
        if not fits or conv_state is None or conv_state.dtype != block.mixer.conv.weight.dtype:
            return ValueError(
                "`model` must run on the kernels: `ham_kernels` for this GPU, no autocast, no float64, heads of at "
                "most 256 and projections of one dtype."
            )
    return None


__all__ = ["CapturedForward", "CapturedStep", "counts_positions", "has_hooks", "obstacle_of_model"]
