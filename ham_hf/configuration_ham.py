# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMConfig: the shape, router and thresholds of a Hybrid Associative Memory model, checked when it is built."""

import dataclasses
import difflib
import math
import os
from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .numbers_ham import with_plain_numbers
from .rope_ham import check_rope

if TYPE_CHECKING:
    # Never run. Transformers saves and fetches the siblings that a file imports together with it, so a saved
    # configuration brings the code of the models and their imports.
    from .modeling_ham import HAMModel  # noqa: F401

logger = logging.get_logger(__name__)

# Class that each Auto class loads from the code saved beside a configuration, if `ham_hf` is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_ham.HAMConfig",
    "AutoModel": "modeling_ham.HAMModel",
    "AutoModelForCausalLM": "modeling_ham.HAMForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_ham.HAMForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_ham.HAMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_ham.HAMForTokenClassification",
}
LAYER_TYPES = ("hybrid", "linear_attention", "full_attention")
ERROR_ROUTERS = ("cosine", "l2", "residual")
LEARNED_ROUTERS = ("learned", "learned_error")
ROUTERS = (*ERROR_ROUTERS, *LEARNED_ROUTERS, "random", "recency")
THRESHOLD_SCOPES = ("head", "layer", "model")
USAGE_DIVISIONS = ("importance", "even")
OUTPUT_GATES = ("silu", "sigmoid")
# Shapes of "linear_attention" layers, under Transformers' names: given together or not at all.
LINEAR_SHAPE = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")

# Sizes far above those of any model. A configuration that asks for more is damaged or hostile, and is refused before a
# list or a module is made of it; smaller sizes are later compared with the size of the checkpoint's files.
LARGEST = {
    "vocab_size": 2**28,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**9,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "value_head_dim": 2**16,
    "max_position_embeddings": 2**40,
    "conv_kernel_size": 2**10,
    "router_hidden_size": 2**20,
    **dict.fromkeys(LINEAR_SHAPE, 2**16),
}
LARGEST_WINDOW = 2**24
MOST_LABELS = 2**17
# Types of fields that Transformers reads without a check, and fails on if they are of another type.
INHERITED_TYPES = {
    "auto_map": dict,
    "_attn_implementation": str,
    "attn_implementation": str,
    "_experts_implementation": str,
    "experts_implementation": str,
    "fusion_config": dict,
    "id2label": dict,
    "is_encoder_decoder": bool,
    "num_labels": int,
    "output_hidden_states": bool,
    "problem_type": str,
    "quantization_config": dict,
    "rope_scaling": dict,
    "transformers_weights": str,
}
# Keys under which Transformers would look for other configurations, to use them in place of this one.
OTHER_CONFIGURATIONS = {"decoder", "generator", "per_layer_config", "text_config", "text_encoder"}
# Thresholds are computed in floating point, where larger integers are rounded, and the largest overflow.
LARGEST_THRESHOLD = 2**53
LARGEST_IMPORTANCE = 2**53
# Known keys of old releases of Transformers, of its other parts and of tools; those of GenerationConfig are known too.
OTHER_KEYS = (
    "add_cross_attention attn_implementation auto_map compression_config cross_attention_hidden_size custom_pipelines "
    "experts_implementation finetuning_task forced_decoder_ids fusion_config gradient_checkpointing is_causal "
    "is_decoder loss_type name_or_path num_labels partial_rotary_factor prefix pruned_heads quantization_config "
    "rope_scaling rope_theta sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder "
    "tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers_weights use_bfloat16 xla_device"
).split()

# Types of the fields that a caller may leave `None`; `__post_init__` fills in most of them. Type checkers see `Any`
# for `None`, so that code which reads a finished configuration need not check for `None`.
if TYPE_CHECKING:
    FilledBool = bool | Any
    FilledInt = int | Any
    FilledNumber = float | int | Any
    FilledStrings = list[str] | Any
else:
    FilledBool = bool | None
    FilledInt = int | None
    FilledNumber = float | int | None
    FilledStrings = list[str] | None


def check_target_kv_usage(target: Any, scope: str, num_layers: int) -> None:
    """Checks a target usage for thresholds of a `scope`: `None` holds them, a list has one entry per layer.

    Raises:
        TypeError: if it is neither `None`, a number nor a list of numbers.
        ValueError: if a number is not between 0 and 1, or a list does not fit.
    """
    if target is None:
        return
    values = target if isinstance(target, list) else [target]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`target_kv_usage` must be None, a number or a list of numbers, got {target!r}.")
        if not 0 <= value <= 1:
            raise ValueError(f"`target_kv_usage` must be between 0 and 1, got {target}.")
    if not isinstance(target, list):
        return
    if scope == "model":
        raise ValueError(
            "`target_kv_usage` must be one number with `threshold_scope='model'`, where the mean of all layers is to "
            f"meet it, got {target}: write one number, or `threshold_scope='layer'`."
        )
    if len(values) != num_layers:
        raise ValueError(f"`target_kv_usage` must have one entry per hybrid layer ({num_layers}), got {len(values)}.")


class LayerShape(NamedTuple):
    """Heads of a layer's queries, keys and values, and their sizes."""

    query_heads: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> list[int]:
        """Channels of queries, keys and values, in the order of the convolution."""
        return [self.query_heads * self.key_dim, self.key_heads * self.key_dim, self.value_heads * self.value_dim]

    @property
    def out_channels(self) -> int:
        """Channels of the mixed output: some for each query head, or for each value head where several share a key."""
        return max(self.query_heads, self.value_heads) * self.value_dim


@with_plain_numbers
@strict
class HAMConfig(PreTrainedConfig):
    r"""
    Configuration of a Hybrid Associative Memory model (arXiv 2603.22325).

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): Number of tokens in the vocabulary.
        hidden_size (`int`, *optional*, defaults to 2048): Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 5632): Width of the MLP.
        num_hidden_layers (`int`, *optional*, defaults to 24): Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 16): Number of query heads, shared by both memories.
        num_key_value_heads (`int`, *optional*): Number of key/value heads; the RNN state, the routing scores and the
            kept tokens live per key/value head. Defaults to `num_attention_heads`.
        head_dim (`int`, *optional*): Size of a query or key. Defaults to `hidden_size // num_attention_heads`.
        value_head_dim (`int`, *optional*): Size of a value. Defaults to `head_dim`.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the MLP.
        max_position_embeddings (`int`, *optional*, defaults to 32768): Longest sequence the model was made for.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of every RMSNorm.
        use_cache (`bool`, *optional*, defaults to `True`): If `True`, the model returns a cache.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): If `True`, the head reuses the embedding matrix.
        rope_parameters (`dict`, *optional*): RoPE of the attention view, such as `{"rope_type": "default",
            "rope_theta": 10000.0}`, the default; `None` leaves positions out (NoPE). With types whose frequencies
            depend on the length (`"dynamic"`, `"longrope"`) a prompt given in pieces has other outputs than the whole
            prompt. With `"partial_rotary_factor"` only that part of a head rotates: the first dimensions of each half
            of it, see `mixer_ham.partial_rotary_order`.
        attention_bias (`bool`, *optional*, defaults to `False`): If `True`, the q, k, v and output projections have
            biases.
        mlp_bias (`bool`, *optional*, defaults to `False`): If `True`, the projections of the MLP have biases.
        layer_types (`list[str]`, *optional*): One of `"hybrid"` (HAM), `"linear_attention"` (Gated DeltaNet only) and
            `"full_attention"` (softmax over every token) per layer. Defaults to `"hybrid"` everywhere.
        conv_kernel_size (`int`, *optional*, defaults to 4): Width of the causal depthwise convolution of q, k and v.
        attention_conv (`bool`, *optional*, defaults to `True`): If `True`, the attention reads the convolved q, k, v;
            else it reads the raw projections, as a Transformer does.
        qk_norm (`bool` or `str`, *optional*, defaults to `True`): Learned RMSNorm of the attention's q and k, per head
            with `True`; `"projection"` takes one over the channels of all heads, as OLMo 2 does.
        rnn_output_norm (`bool`, *optional*, defaults to `True`): If `True`, the RNN's output is RMS-normalised.
        kv_output_norm (`bool`, *optional*): If `True`, the attention's output is RMS-normalised. Defaults to `True`,
            but for `router="learned"` and `"learned_error"` to `False`: their scores scale the values that attention
            reads, and learn from the size of what is read, which a norm cancels.
        zero_centered_norms (`bool`, *optional*, defaults to `False`): If `True`, the weights of every norm except
            those of the memories' outputs are offsets from 1, as in Qwen3-Next.
        output_norm_eps (`float`, *optional*): Epsilon of the norms of the memories' outputs. Defaults to
            `rms_norm_eps`.
        output_gate (`bool` or `str`, *optional*, defaults to `True`): Gate that multiplies the mixed output:
            `silu(W_z x)` (`True` or `"silu"`), `sigmoid(W_z x)` (`"sigmoid"`) or none (`False`).
        linear_output_gate (`bool` or `str`, *optional*): The same gate in `"linear_attention"` layers. Defaults to
            `output_gate`.
        linear_num_key_heads (`int`, *optional*): Number of query heads, and of key heads, in `"linear_attention"`
            layers. Give it with the next three or give none of them: then these layers have the shapes of the others.
        linear_num_value_heads (`int`, *optional*): Number of value heads there, a multiple of `linear_num_key_heads`;
            the RNN state lives per value head, and each key head serves the same number of consecutive value heads.
        linear_key_head_dim (`int`, *optional*): Size of a query or key there.
        linear_value_head_dim (`int`, *optional*): Size of a value there.
        allow_neg_eigval (`bool`, *optional*, defaults to `False`): If `True`, the RNN's write strength is
            `2 sigmoid(W_b x)` instead of `sigmoid(W_b x)`, so that its transition may have negative eigenvalues
            (arXiv 2411.12537).
        attention_post_norm (`bool`, *optional*, defaults to `False`): If `True`, layers with attention normalise the
            outputs of the mixer and the MLP instead of their inputs, as OLMo 2 does.
        router (`str`, *optional*, defaults to `"cosine"`): The routing score: `"cosine"`, `"l2"`, `"residual"`
            (prediction errors of the RNN), `"learned"`, `"learned_error"`, `"random"` or `"recency"`. The last two are
            controls: a score is a hash of the token's position, or the position itself, so that with `kv_budget` the
            most recent tokens stay, a window of equal size. `"recency"` takes no `kv_usage` and learns no threshold.
        attention_window (`int` or `list[int]`, *optional*, defaults to 0): Number of the last tokens, the current one
            included, that attention sees whether they are kept or not: one value, or one per layer, which only hybrid
            layers read. 0 and 1 both mean the current token alone, as in the paper.
        attention_sinks (`int` or `list[int]`, *optional*, defaults to 0): Number of the first tokens of a document
            that hybrid layers always keep: one value, or one per layer.
        router_hidden_size (`int`, *optional*): Width of a learned router's MLP. Defaults to `hidden_size // 4`.
        router_aux_loss_coef (`float`, *optional*): Weight of a loss in training while thresholds learn: the score of a
            token predicts the most attention that a later token would pay it, were every token kept. It adds to the
            gradients alone, not to the loss that a call returns, and only learned routers read it. Defaults to 1 for
            `router="learned"` without `kv_output_norm`, else to 0.
        target_kv_usage (`float` or `list[float]`, *optional*, defaults to 0.5): Fraction of tokens that training
            drives the thresholds to keep: one value, or one per hybrid layer, except with the scope `"model"`. `None`
            holds the thresholds where they are.
        threshold_scope (`str`, *optional*, defaults to `"head"`): Unit whose usage meets `target_kv_usage`: each
            `"head"`, the mean of each `"layer"` or the mean of the whole `"model"`.
        threshold (`float` or `list[float]`, *optional*): Threshold used when a call gives none: one value, or one per
            hybrid layer. `None` uses the learned thresholds; with the router `"recency"`, whose scores are the
            positions in units of `2**-24`, it is 0, which admits every token.
        head_importance (`list[list[float]]`, *optional*): How much each key/value head matters, in any unit from 0:
            one list per hybrid layer. `ham-hf calibrate` measures it, see `ham_hf.evaluation.importance`.
        usage_division (`str`, *optional*, defaults to `"importance"`): How a call's `kv_usage` is divided over heads:
            by `"importance"`, if there is a `head_importance` (see `routing_ham.usage_shares`), or `"even"`.

    Raises `ValueError` (or huggingface_hub's `StrictDataclassError` for a wrong type) for a combination that no model
    can be built from.
    """

    model_type = "ham"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}

    # q, k, v and z are gathered: the convolution and the kept sets need whole heads beside their per-head parameters.
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise_gather_output",
        "layers.*.mixer.k_proj": "colwise_gather_output",
        "layers.*.mixer.v_proj": "colwise_gather_output",
        "layers.*.mixer.z_proj": "colwise_gather_output",
        "layers.*.mixer.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: FilledInt = None
    head_dim: FilledInt = None
    value_head_dim: FilledInt = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = field(default_factory=dict)
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: FilledStrings = None
    conv_kernel_size: int = 4
    attention_conv: bool = True
    qk_norm: bool | str = True
    rnn_output_norm: bool = True
    kv_output_norm: FilledBool = None
    zero_centered_norms: bool = False
    output_norm_eps: float | None = None
    output_gate: bool | str = True
    linear_output_gate: bool | str | None = None
    linear_num_key_heads: FilledInt = None
    linear_num_value_heads: FilledInt = None
    linear_key_head_dim: FilledInt = None
    linear_value_head_dim: FilledInt = None
    allow_neg_eigval: bool = False
    attention_post_norm: bool = False
    router: str = "cosine"
    router_hidden_size: FilledInt = None
    router_aux_loss_coef: FilledNumber = None
    attention_window: int | list[int] = 0
    attention_sinks: int | list[int] = 0
    target_kv_usage: float | int | list[float | int] | None = 0.5
    threshold_scope: str = "head"
    threshold: float | int | list[float | int] | None = None
    head_importance: list[list[float | int]] | None = None
    usage_division: str = "importance"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_inherited(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.router_hidden_size is None:
            self.router_hidden_size = max(1, self.hidden_size // 4)
        if self.kv_output_norm is None:
            self.kv_output_norm = self.router not in LEARNED_ROUTERS
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = float(self.router == "learned" and not self.kv_output_norm)
        if self.layer_types is None and self.num_hidden_layers <= LARGEST["num_hidden_layers"]:
            self.layer_types = ["hybrid"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # TRL reads `auto_map` of every model outside Transformers, also from a folder without code.
        self.auto_map = getattr(self, "auto_map", None) or {}

    def _check_inherited(self, extra: dict[str, Any]) -> None:
        """Refuses fields and `extra` keys that Transformers would fail on, or would let replace code of ours."""
        for name, value in (vars(self) | extra).items():
            expected = INHERITED_TYPES.get(name, object)
            if value is not None and not isinstance(value, expected):
                raise TypeError(f"`{name}` must be {expected.__name__}, got {value!r}.")
        if extra.get("model_type", self.model_type) != self.model_type:
            raise ValueError(f"`model_type` must be {self.model_type!r}, got {extra['model_type']!r}.")
        for name in extra.keys() - {"model_type"}:
            if name in OTHER_CONFIGURATIONS:
                raise ValueError(f"`{name}` must be left out: a HAM has one configuration, got {extra[name]!r}.")
            code = getattr(type(self), name, None)
            if hasattr(type(self), name) and not (isinstance(code, property) and code.fset):
                raise ValueError(f"`{name}` is part of the code of HAMConfig, which no configuration may replace.")
        for name in ("attn_implementation", "experts_implementation"):
            value = extra.get(name) or extra.get(f"_{name}") or ""
            if "/" in value:
                # Transformers would download the repository and run its code.
                raise ValueError(f"`{name}` must name no repository: HAM has its own attention; got {value!r}.")
        weights = extra.get("transformers_weights") or "model.safetensors"
        if not weights.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"`transformers_weights` must name safetensors or their index, got {weights!r}.")
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", extra.get("torch_dtype"))):
            found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
                raise ValueError(f"`{name}` must be a floating-point type of torch, or its name, got {dtype!r}.")
        num_labels = extra.get("num_labels")
        if num_labels is not None and not 0 <= num_labels <= MOST_LABELS:
            raise ValueError(f"`num_labels` must be between 0 and {MOST_LABELS}, got {num_labels}.")
        self._warn_of_unknown(extra)

    def _warn_of_unknown(self, extra: dict[str, Any]) -> None:
        """Warns once of each key that nothing reads: a typo, or a field of a newer version."""
        fields = [x.name for x in dataclasses.fields(self)]
        known = {*fields, *OTHER_KEYS, *vars(GenerationConfig())}
        for name in extra:
            if name in known or name.startswith("_") or hasattr(type(self), name):
                continue
            similar = difflib.get_close_matches(name, fields, n=1)
            hint = f" Is `{similar[0]}` meant?" if similar else ""
            logger.warning_once(f"HAMConfig knows no field `{name}`: it is kept, and changes nothing.{hint}")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json` as Transformers does; raises `OSError` if it is not JSON or nested too deeply."""
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            raise OSError(f"The config file of {pretrained_model_name_or_path} is nested too deeply.") from error

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Completes `rope_parameters` as Transformers does, but keeps `None`, which means no positions here."""
        if self.rope_parameters is None and not kwargs.get("rope_scaling") and kwargs.get("rope_theta") is None:
            return kwargs
        given = kwargs.get("rope_scaling") or self.rope_parameters or {}
        if any(layer_type in given for layer_type in LAYER_TYPES):
            # One set of parameters for each type of layer, which HAM does not have: validation refuses it later.
            self.rope_parameters = kwargs.pop("rope_scaling", None) or self.rope_parameters
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

    @property
    def num_hybrid_layers(self) -> int:
        """Number of layers that route tokens; a list of thresholds has one entry for each."""
        return self.layer_types.count("hybrid")

    def window_of(self, layer_idx: int) -> int:
        """Number of the last tokens that a query of a layer sees besides kept ones; 0 in layers that do not route."""
        return self._of_hybrid_layer(self.attention_window, layer_idx)

    def sinks_of(self, layer_idx: int) -> int:
        """Number of the first tokens of a document that a layer always keeps; 0 in layers that do not route."""
        return self._of_hybrid_layer(self.attention_sinks, layer_idx)

    def _of_hybrid_layer(self, value: int | list[int], layer_idx: int) -> int:
        if self.layer_types[layer_idx] != "hybrid":
            return 0
        return value[layer_idx] if isinstance(value, list) else value

    @property
    def fixed_threshold(self) -> float | int | list[float | int] | None:
        """The threshold in the place of the learned ones, `None` if those hold."""
        return 0.0 if self.threshold is None and self.router == "recency" else self.threshold

    def layer_shape(self, layer_type: str) -> LayerShape:
        """The shape of layers of a type: linear ones may have their own."""
        if layer_type == "linear_attention" and self.linear_num_key_heads is not None:
            return LayerShape(
                self.linear_num_key_heads,
                self.linear_num_key_heads,
                self.linear_num_value_heads,
                self.linear_key_head_dim,
                self.linear_value_head_dim,
            )
        kv_heads = self.num_key_value_heads
        return LayerShape(self.num_attention_heads, kv_heads, kv_heads, self.head_dim, self.value_head_dim)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves as Transformers does, together with the code that loads every HAM model without `ham_hf`."""
        # Entries of another repository ("repository--module.Class") belong to the code there.
        entries = getattr(self, "auto_map", None) or {}
        self.auto_map = AUTO_MAP | {name: value for name, value in entries.items() if "--" not in str(value)}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_architecture(self) -> None:
        """Refuses shapes and switches that no model can be built from; called by `@strict` and again before saving."""
        self._validate_sizes()
        self._validate_linear_shape()
        self._validate_layers()
        if self.rope_parameters is not None:
            check_rope(self.rope_parameters, self.head_dim)
        self._validate_routing()

    def _validate_sizes(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim value_head_dim max_position_embeddings conv_kernel_size router_hidden_size"
        )
        others = (
            "initializer_range rms_norm_eps output_norm_eps router_aux_loss_coef target_kv_usage threshold "
            "pad_token_id bos_token_id eos_token_id attention_window attention_sinks"
        )
        for name in (*positive.split(), *LINEAR_SHAPE, *others.split()):
            # Older releases of huggingface_hub let a bool pass for an int.
            value = getattr(self, name)
            if any(isinstance(x, bool) for x in (value if isinstance(value, list) else [value])):
                raise ValueError(f"`{name}` must be a number, got {value}.")
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name, largest in LARGEST.items():
            if (getattr(self, name) or 0) > largest:
                raise ValueError(f"`{name}` must be at most {largest}, got {getattr(self, name)}.")
        for name in ("initializer_range", "rms_norm_eps", "output_norm_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a finite number above 0, got {value}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads}), so that every key/value head serves the same number of query heads."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be None or between 0 and {self.vocab_size - 1}, as `vocab_size` is "
                f"{self.vocab_size}; got {self.pad_token_id}."
            )

    def _validate_linear_shape(self) -> None:
        shape = {name: getattr(self, name) for name in LINEAR_SHAPE}
        for name, value in shape.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        absent = [name for name, value in shape.items() if value is None]
        if len(absent) == len(shape):
            return
        if absent:
            raise ValueError(
                f"`{'`, `'.join(LINEAR_SHAPE)}` must be given all four, or all left None for the shapes of the other "
                f"layers; got {shape}."
            )
        if shape["linear_num_value_heads"] % shape["linear_num_key_heads"]:
            raise ValueError(
                f"`linear_num_value_heads` ({self.linear_num_value_heads}) must be a multiple of "
                f"`linear_num_key_heads` ({self.linear_num_key_heads}), so that every key head serves the same number "
                "of value heads."
            )

    def _validate_layers(self) -> None:
        for layer_type in self.layer_types:
            if layer_type not in LAYER_TYPES:
                raise ValueError(f"`layer_types` entries must be one of {LAYER_TYPES}, got {layer_type!r}.")
        if not isinstance(self.qk_norm, bool) and self.qk_norm != "projection":
            raise ValueError(
                "`qk_norm` must be True (per head), 'projection' (over all heads at once) or False, got "
                f"{self.qk_norm!r}."
            )
        for name in ("output_gate", "linear_output_gate"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in OUTPUT_GATES:
                raise ValueError(f"`{name}` must be True, False or one of {OUTPUT_GATES}, got {value!r}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must have one entry per layer: `num_hidden_layers` ({self.num_hidden_layers}), got "
                f"{len(self.layer_types)}."
            )

    def _validate_routing(self) -> None:
        if self.router not in ROUTERS:
            raise ValueError(f"`router` must be one of {ROUTERS}, got {self.router!r}.")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(
                f"`router_aux_loss_coef` must be a number of at least 0, got {self.router_aux_loss_coef}."
            )
        if self.threshold_scope not in THRESHOLD_SCOPES:
            raise ValueError(f"`threshold_scope` must be one of {THRESHOLD_SCOPES}, got {self.threshold_scope!r}.")
        if self.usage_division not in USAGE_DIVISIONS:
            raise ValueError(f"`usage_division` must be one of {USAGE_DIVISIONS}, got {self.usage_division!r}.")
        check_target_kv_usage(self.target_kv_usage, self.threshold_scope, self.num_hybrid_layers)
        self._validate_windows()
        self._validate_importance()
        if self.threshold is None:
            return
        values = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        if any(isinstance(value, int) and abs(value) > LARGEST_THRESHOLD for value in values):
            raise ValueError(f"`threshold` must be between -2**53 and 2**53, or infinite, got {self.threshold}.")
        if any(math.isnan(value) for value in values):
            raise ValueError(f"`threshold` must not be NaN, got {self.threshold}.")
        if isinstance(self.threshold, list) and len(values) != self.num_hybrid_layers:
            raise ValueError(
                f"`threshold` must have one entry per hybrid layer ({self.num_hybrid_layers}), got {len(values)}."
            )

    def _validate_windows(self) -> None:
        for name in ("attention_window", "attention_sinks"):
            given = getattr(self, name)
            values = given if isinstance(given, list) else [given]
            if isinstance(given, list) and len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must be one int, or have one entry per layer: `num_hidden_layers` "
                    f"({self.num_hidden_layers}), got {len(values)}."
                )
            if not all(0 <= value <= LARGEST_WINDOW for value in values):
                raise ValueError(f"`{name}` must be between 0 and {LARGEST_WINDOW}, got {given}.")

    def _validate_importance(self) -> None:
        if self.head_importance is None:
            return
        layers, heads = self.num_hybrid_layers, self.num_key_value_heads
        sizes = [len(layer) for layer in self.head_importance]
        if sizes != [heads] * layers:
            raise ValueError(
                f"`head_importance` must have one list per hybrid layer ({layers}) of one number per key/value head "
                f"({heads}), got {len(sizes)} lists of {sorted(set(sizes))} numbers."
            )
        for value in (x for layer in self.head_importance for x in layer):
            if isinstance(value, bool) or not 0 <= value <= LARGEST_IMPORTANCE:
                raise ValueError(f"`head_importance` must hold finite numbers from 0 to 2**53, got {value}.")


# Transformers saves the code of a registered class.
HAMConfig.register_for_auto_class()

__all__ = ["HAMConfig"]
