# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Hybrid Associative Memory models (arXiv 2603.22325): the decoder layer, the decoder and the heads."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_ham import HAMCache
from .configuration_ham import LEARNED_ROUTERS, HAMConfig
from .generation_ham import HAMGenerationMixin, with_routing
from .inputs_ham import (
    CACHE_NAME,
    EitherCacheName,
    TokenLayout,
    check_checkpointing,
    check_inputs,
    check_outputs_wanted,
    check_tokens,
    checked_flags,
    given_cache,
    last_hidden_states,
    name_cache,
    packed_documents,
    token_layout,
    wants_cache,
)
from .loading_ham import HAMLoadingMixin, warn_of_untested_transformers
from .mixer_ham import FLOAT32_PARAMETERS, HAMMixer, HAMRMSNorm, HAMRotaryEmbedding, HAMShortConvolution
from .ops_ham import exporting
from .routing_ham import HAMRouter, Retention
from .threshold_control_ham import AddGradient, batch_share, control_loop, labels_by_row, real_tokens

logger = logging.get_logger(__name__)

# Learned threshold of a new model: the score of a token for which the RNN predicts nothing.
INITIAL_THRESHOLD = 0.5
# Weight of the error in a new `learned_error` router: errors within 1/8 of 1/2 have logits within 1 of 0.
INITIAL_ERROR_WEIGHT = 8.0
# Arguments that the loss function reads; it would silently drop others.
LOSS_ARGUMENTS = {"shift_labels", "num_items_in_batch", "ignore_index"}


@dataclass
class HAMModelOutputWithPast(EitherCacheName, BaseModelOutputWithPast):  # type: ignore[misc]
    """Output of `HAMModel`: Transformers' decoder output with HAM's additions.

    Attributes:
        last_hidden_state: `[B, T, D]`, or only the last `last_n` positions.
        cache: the `HAMCache`, or `None` without one.
        hidden_states: with `output_hidden_states=True`, one `[B, T, D]` per layer and the embeddings.
        attentions: with `output_attentions=True`, `[B, H, T, S]` per layer with attention; tokens not kept are zero.
        routing_scores: with `output_routing_scores=True`, `[B, T, Hk]` float32 in `[0, 1]` per hybrid layer.
        threshold_control: with `output_threshold_control=True` in training, `[2 + B, Hk]` per hybrid layer: zeros that
            carry the thresholds' gradients, the thresholds, and how many tokens each row kept; see `HAMMixer.forward`.
    """

    routing_scores: tuple[torch.Tensor, ...] | None = None
    threshold_control: tuple[torch.Tensor, ...] | None = None


@dataclass
class HAMCausalLMOutputWithPast(EitherCacheName, CausalLMOutputWithPast):  # type: ignore[misc]
    """Output of `HAMForCausalLM`: scalar loss, logits `[B, T, vocabulary]` and fields of `HAMModelOutputWithPast`."""

    routing_scores: tuple[torch.Tensor, ...] | None = None


class HAMDecoderLayer(GradientCheckpointingLayer):
    """Residual block of mixer and MLP, each after a norm; with `attention_post_norm`, attention layers have it behind.

    With `last_n`, returns only the last `n` positions; earlier ones are computed only as far as the cache needs.
    """

    def __init__(self, config: HAMConfig, layer_idx: int):
        super().__init__()
        self.mixer = HAMMixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.post_norm = config.attention_post_norm and self.mixer.has_attention
        norm = config.hidden_size, config.rms_norm_eps, config.zero_centered_norms
        if not self.post_norm:
            self.input_layernorm = HAMRMSNorm(*norm)
        self.post_attention_layernorm = HAMRMSNorm(*norm)
        if self.post_norm:
            self.post_feedforward_layernorm = HAMRMSNorm(*norm)

    def forward(
        self, hidden_states: torch.Tensor, last_n: int = 0, **mixer_arguments: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        mixer_input = hidden_states if self.post_norm else self.input_layernorm(hidden_states)
        mixed, _, _, control = self.mixer(mixer_input, last_n=last_n, **mixer_arguments)
        hidden_states = hidden_states[:, -last_n:]
        if self.post_norm:
            hidden_states = hidden_states + self.post_attention_layernorm(mixed)
            hidden_states = hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))
        else:
            hidden_states = hidden_states + mixed
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        # Returned, not recorded by a hook: a re-entrant checkpoint gives a gradient only to returned tensors.
        return hidden_states if control is None else (hidden_states, control)


class HAMPreTrainedModel(HAMLoadingMixin, PreTrainedModel):
    """Base of every HAM model: its configuration, its initialisation and the flags that Transformers reads."""

    config: HAMConfig
    config_class = HAMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HAMDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Transformers reads this flag as: packed rows equal padded ones. They do; HAM has its own attention in any case.
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = list(FLOAT32_PARAMETERS)
    _can_record_outputs = {
        "hidden_states": HAMDecoderLayer,
        "attentions": OutputRecorder(HAMMixer, index=1),
        "routing_scores": OutputRecorder(HAMMixer, index=2),
    }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `forward`; within this model's `generate`, with its routing arguments unless the call gives its own.

        Done here because `forward` is compiled, and Dynamo cannot read context variables.
        """
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        return name_cache(super().__call__(*args, **with_routing(self, args, kwargs)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HAMRMSNorm) and module.zero_centered:
            init.zeros_(module.weight)
        elif isinstance(module, HAMShortConvolution):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, HAMMixer):
            self._init_mixer(module)

    def _init_mixer(self, mixer: HAMMixer) -> None:
        """Decays as in Mamba-2 and Gated DeltaNet: `A` uniform in (1, 16), time steps log-uniform in (0.001, 0.1)."""
        if mixer.has_rnn:
            init.copy_(mixer.A_log, torch.empty_like(mixer.A_log).uniform_(1, 16).log())
            dt = torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        if mixer.layer_type == "hybrid":
            init.constant_(mixer.threshold, INITIAL_THRESHOLD)
            if mixer.router.kind in LEARNED_ROUTERS:
                self._init_router(mixer.router)
            init.zeros_(mixer.score_quantiles)

    def _init_router(self, router: HAMRouter) -> None:
        """Logits of about unit variance for all sizes: if all scores lay at the threshold, all or none would be kept.

        `learned_error` starts as `sigmoid(w (e - 1 / 2))`, which ranks tokens as the error does; the MLP corrects it.
        """
        init.normal_(router.up_proj.weight, std=router.up_proj.in_features**-0.5)
        if router.kind == "learned_error":
            init.zeros_(router.down_proj.weight)
            init.constant_(router.down_proj.bias, -INITIAL_ERROR_WEIGHT / 2)
            init.constant_(router.error_weight, INITIAL_ERROR_WEIGHT)
            return
        # The mean square of SiLU(x) is 0.36 for a unit normal `x`.
        init.normal_(router.down_proj.weight, std=(0.36 * router.down_proj.in_features) ** -0.5)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes as Transformers does; raises `ValueError`, changing nothing, if the padding token would be lost."""
        pad = self.config.pad_token_id
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        lowest = 1 if pad is None else pad + 1
        if size < lowest:
            why = "" if pad is None else f", as `pad_token_id` is {pad}"
            raise ValueError(f"`new_num_tokens` must be at least {lowest}{why}, got {new_num_tokens}.")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder: Any = self.base_model
        decoder.vocab_size = self.config.vocab_size
        return embeddings

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Not inherited: FSDP derives a class from the model's, and PyTorch's code would be saved as the model's.
        cls._auto_class = None


class HAMModel(HAMPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: HAMConfig):
        # `from_pretrained(path, threshold=...)` sets fields one by one, after the configuration was checked whole.
        config.validate_architecture()
        warn_of_untested_transformers()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [HAMDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        # torch's ModuleList does not say what it holds.
        self.layers: Sequence[HAMDecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = HAMRMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norms)
        self.rotary_emb = None
        if config.rope_parameters is not None:
            self.rotary_emb = HAMRotaryEmbedding(config)  # type: ignore[arg-type]  # reads what HAMConfig has too
        self.gradient_checkpointing = False
        self.post_init()
        if all(layer.mixer.output_gate is None for layer in self.layers):
            # Transformers warns of a rule for a module that does not exist.
            plan = self._tp_plan or {}
            self._tp_plan = {name: style for name, style in plan.items() if not name.endswith("z_proj")}
        if self.dtype in (torch.float16, torch.bfloat16):
            self._fsdp_plan = self._fsdp_plan_by_dtype()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: HAMCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
        kv_budget: int | None = None,
        last_n: int = 0,
        past_key_values: HAMCache | None = None,
        **kwargs: Any,
    ) -> HAMModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: `[B, T]` int64, or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, tokens in the cache + T]`, 0 for padding (left or right); `None` if all are real.
            position_ids: `[B or 1, T]` int64 for RoPE; a packed document begins where they fail to rise. By default
                real tokens are counted.
            cache: a `HAMCache` to continue from; with fewer layers than the model has, only the first ones are run.
            use_cache: fill and return a cache, by default `config.use_cache`. Packed rows have none.
            threshold: keep tokens whose routing score is at least this: a number, a list (one per hybrid layer), a
                tensor `[B]` or `[layers or 1, B or 1, heads or 1]`. At most 0 keeps all, above 1 keeps none. Defaults
                to `config.threshold`, then to the learned thresholds. In training, a call with this argument or
                `kv_usage` gives the learned thresholds no gradient: DDP then needs `find_unused_parameters=True`, or
                thresholds with `requires_grad_(False)`, as they are while `config.threshold` is set.
            kv_usage: keep about this fraction instead, by the checkpoint's calibrated score quantiles; heads share it
                by their importance, see `config.usage_division`.
            kv_budget: hold at most this many tokens per key/value head; the lowest scores are dropped.
            last_n: return only the last `last_n` positions (0: all), which saves the last layer most of its work on a
                prompt.
            past_key_values: the name of `cache` before Transformers 5.24.
            kwargs: `output_attentions`, `output_hidden_states`, `output_routing_scores` (bool); for packed rows
                `cu_seq_lens_q` `[documents + 1]` or `seq_idx` `[1, T]`, as Transformers' collators give them.

        Raises:
            TypeError, ValueError: for arguments that do not fit; the cache is unchanged then.
        """
        cache = given_cache(cache, past_key_values)
        check_checkpointing(self, cache)
        output_attentions = checked_flags(kwargs, last_n, self.config)
        batch, length = check_tokens(input_ids, inputs_embeds, self.config)
        check_inputs(batch, length, attention_mask, position_ids, cache, self.config)
        retention = self.retention(batch, threshold, kv_usage, kv_budget)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        device = inputs_embeds.device
        # Copied here, not in each layer, where a blocking copy would stall a GPU once per layer.
        retention = [rule.to(device, non_blocking=device.type == "cuda") for rule in retention]
        seq_idx = packed_documents(kwargs, batch, length, device)
        # Elsewhere a compiled call may need a cache, for which the host must know of padding and of documents.
        in_one_graph = torch.compiler.is_compiling() and cache is None and (self.training or use_cache is False)
        tokens = token_layout(batch, length, device, attention_mask, position_ids, cache, seq_idx, in_one_graph)
        if tokens.real is not None:
            # Embeddings of padding may be NaN, and must not reach a sum, not even times zero.
            inputs_embeds = inputs_embeds.masked_fill(~tokens.real[..., None], 0)
        if cache is None:
            use_cache = wants_cache(self, use_cache, tokens.seq_idx is not None, by_positions=seq_idx is None)
        cache = self._prepare_cache(cache, use_cache, tokens, kv_budget)
        if output_attentions and kv_budget is not None:
            raise ValueError("`output_attentions` cannot be combined with `kv_budget`: give one of them.")

        position_embeddings = None
        if self.rotary_emb is not None:
            position_ids = tokens.positions if position_ids is None else position_ids
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        controls: list[torch.Tensor] = []
        # Drafts of an early exit have a cache of the first layers only.
        layers = self.layers if cache is None else self.layers[: len(cache.layers)]
        with nullcontext() if cache is None else cache.filling(self, tokens.real):
            for layer, rule in zip(layers, retention[: len(layers)], strict=True):
                output = layer(
                    hidden_states,
                    last_n=last_n if layer is layers[-1] else 0,
                    position_embeddings=position_embeddings,
                    tokens=tokens,
                    cache=cache,
                    retention=rule,
                    output_attentions=output_attentions,
                )
                hidden_states = output[0] if isinstance(output, tuple) else output
                controls.extend(output[1:] if isinstance(output, tuple) else ())
        hidden_states = self.norm(hidden_states)
        if cache is not None and hidden_states.requires_grad:
            _tell_of_cut_graph(cache)
        if controls and not kwargs.get("output_threshold_control"):
            seen = real_tokens(tokens.real, batch, length, hidden_states.device)
            hidden_states, controls = self._steer(hidden_states, controls, seen), []
        return HAMModelOutputWithPast(
            last_hidden_state=hidden_states,
            threshold_control=tuple(controls) or None,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )

    def _fsdp_plan_by_dtype(self) -> dict[str, str]:
        """Groups of FSDP2 that each have one dtype, as FSDP2 asks: own parameters of mixers and routers stay float32.

        No group lies within another: Transformers before 5.23 shards the outer one first, and with it the inner.
        """
        plan = {name: style for name, style in (self._fsdp_plan or {}).items() if name != "layers.*"}
        for layer in self.layers:
            owners = {"layers.*": layer, "layers.*.mixer": layer.mixer}
            if layer.mixer.layer_type == "hybrid":
                owners["layers.*.mixer.router"] = layer.mixer.router
            for prefix, owner in owners.items():
                for name, module in owner.named_children():
                    if module not in owners.values() and any(True for _ in module.parameters()):
                        plan[f"{prefix}.{name}"] = "free_full_weight"
        return plan

    def _steer(self, hidden_states: torch.Tensor, controls: list[torch.Tensor], seen: torch.Tensor) -> torch.Tensor:
        """Closes the control loop where no language-modelling loss does: other heads, and losses made from logits.

        Such a loss does not tell how many calls an update has, so each call moves the thresholds by a whole step.

        Args:
            hidden_states: `[B, n, D]`, from which the loss is computed.
            controls: those of every hybrid layer, see `HAMMixer.forward`.
            seen: `[B]` float32 real tokens of each row.
        """
        weights = (1 / seen.sum().clamp(min=1)).expand_as(seen)
        return AddGradient.apply(hidden_states, *control_loop(controls, weights, self.config))

    def retention(
        self,
        batch: int,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
        kv_budget: int | None = None,
    ) -> list[Retention]:
        """The rule by which each layer keeps tokens of `batch` rows; arguments and errors are those of `forward`."""
        quantiles = []
        if kv_usage is not None:
            quantiles = [layer.mixer.score_quantiles for layer in self.layers if layer.mixer.layer_type == "hybrid"]
        return Retention.resolve(self.config, quantiles, batch, threshold, kv_usage, kv_budget)

    def _prepare_cache(
        self, cache: HAMCache | None, use_cache: bool | None, tokens: TokenLayout, kv_budget: int | None
    ) -> HAMCache | None:
        if tokens.seq_idx is not None:
            if cache is not None:
                raise ValueError(
                    "`cache` cannot be filled from packed rows (`position_ids` that restart, "
                    "`cu_seq_lens_q` or `seq_idx`): a cache holds one document per row. Give one document per row, "
                    "padded."
                )
            if kv_budget is not None:
                raise ValueError("`kv_budget` cannot be combined with packed rows: give one document per row, padded.")
            return None
        if cache is None and use_cache:
            cache = HAMCache(self.config)
        if exporting() and (cache is not None or kv_budget is not None):
            raise ValueError(
                "`use_cache` must be False, and `kv_budget` None, where a model is exported: what a cache keeps is "
                "decided by the data."
            )
        if kv_budget is not None and cache is not None and cache.layers[0].record_past:
            raise ValueError(
                "`kv_budget` cannot be combined with assisted generation or `activate_past_recording()`: a token that "
                "left the cache cannot be brought back."
            )
        return cache


def _tell_of_cut_graph(cache: HAMCache) -> None:
    """Warns once, at the second call with gradients that reads a cache: gradients do not flow back through it."""
    if cache.holds_cut_graph:
        logger.warning_once(
            "Gradients stop at `cache`: a HAMCache holds no autograd graph of the calls that filled it."
        )
    cache.holds_cut_graph = True


def _register_for_label_shift(model_class: type) -> None:
    """Makes Trainer, which goes by class names, shift labels that it smooths; else the model learns to copy."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_class.__name__, model_class.__name__)


# The mixin is first, as it overrides a method of PreTrainedModel.
class HAMForCausalLM(HAMGenerationMixin, HAMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Transformers declares pairs of names, and reads pairs of lists.
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HAMConfig):
        super().__init__(config)
        self.model = HAMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Transformers would derive it from the class name, which differs in a subclass.
        self.loss_type = "ForCausalLM"
        self.post_init()
        # A GenerationConfig with this mark ignores custom fields such as `threshold` when it is read from a file.
        self.generation_config._from_model_config = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register_for_label_shift(cls)  # FSDP makes a subclass

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: HAMCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        threshold: float | list[float] | torch.Tensor | None = None,
        kv_usage: float | None = None,
        kv_budget: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing_scores: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: HAMCache | None = None,
        **loss_kwargs: Any,
    ) -> HAMCausalLMOutputWithPast:
        """Predicts the next token at every position; see `HAMModel.forward` for the arguments that are not listed.

        Args:
            labels: `[B, T]` int64, -100 where no loss is wanted. In training the loss carries the thresholds' control
                loop as a term of value zero.
            logits_to_keep: form logits only for this many last positions (0: all), or for the positions in a tensor.
            loss_kwargs: `shift_labels` `[B, T]` in place of `labels`, `ignore_index` in place of -100, and
                `num_items_in_batch`, the number of counted labels in all calls and ranks of a batch, by which sums are
                divided. Trainer gives it also when it computes the loss itself from `logits`: without labels it
                changes nothing, and each call moves the thresholds by a whole step.
        """
        has_loss = labels is not None or loss_kwargs.get("shift_labels") is not None
        unknown = sorted(set(loss_kwargs) - (LOSS_ARGUMENTS if has_loss else {"num_items_in_batch"}))
        if unknown:
            raise TypeError(f"HAMForCausalLM.forward() got unexpected keyword arguments {unknown}.")
        check_outputs_wanted(input_ids, inputs_embeds, labels, logits_to_keep, loss_kwargs, self.config)
        optional = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "output_routing_scores": output_routing_scores,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "max_length_q": max_length_q,
            "max_length_k": max_length_k,
            "seq_idx": seq_idx,
        }
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            threshold=threshold,
            kv_usage=kv_usage,
            kv_budget=kv_budget,
            last_n=last_hidden_states(logits_to_keep, output_hidden_states, self.config),
            output_threshold_control=self.training and has_loss,
            return_dict=True,
            **{name: value for name, value in optional.items() if value is not None},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if has_loss:
            loss = self._loss(logits, labels, attention_mask, outputs.threshold_control, loss_kwargs)
        return HAMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing_scores=outputs.routing_scores,
            **{CACHE_NAME: outputs.cache},
        )

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        controls: Sequence[torch.Tensor] | None,
        loss_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The loss of `logits`; with `controls`, plus a zero that gives thresholds and learned routers a gradient."""
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        if not controls:
            return loss
        batch, length = (loss_kwargs["shift_labels"] if labels is None else labels).shape
        real = None if attention_mask is None else attention_mask[:, -length:]
        seen = real_tokens(real, batch, length, loss.device)
        counted = labels_by_row(labels, loss_kwargs, loss.device)
        weights, share = batch_share(counted, seen, loss_kwargs.get("num_items_in_batch"))
        levers, gradients = control_loop(controls, weights, self.config)
        return loss + share * (levers * gradients).sum()


_register_for_label_shift(HAMForCausalLM)


class HAMForSequenceClassification(GenericForSequenceClassification, HAMPreTrainedModel):
    """The decoder with a classifier of the last real token."""

    accepts_loss_kwargs = False  # Trainer scales the loss of an accumulated batch, which Transformers' heads do not


class HAMForTokenClassification(GenericForTokenClassification, HAMPreTrainedModel):
    """The decoder with a classifier of every token."""

    accepts_loss_kwargs = False


class HAMForQuestionAnswering(GenericForQuestionAnswering, HAMPreTrainedModel):
    """The decoder with a span head."""

    accepts_loss_kwargs = False


__all__ = [
    "HAMForCausalLM",
    "HAMForQuestionAnswering",
    "HAMForSequenceClassification",
    "HAMForTokenClassification",
    "HAMModel",
    "HAMPreTrainedModel",
]
