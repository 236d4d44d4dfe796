# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMSettings completes vLLM's configuration for a HAM model, and refuses what the plugin does not serve."""

from typing import Any

from transformers import GenerationConfig
from vllm.config import KVTransferConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ...configuration_ham import HAMConfig
from ...generation_ham import ROUTING_ARGUMENTS, first_routing, own_routing
from .requests import HAMArguments, Served
from .sharding import Shard

logger = init_logger(__name__)

CONNECTOR, CONNECTOR_MODULE = "HAMConnector", "ham_hf.serving.vllm.connector"
PROCESSOR = "ham_hf.serving.vllm.requests:HAMArguments"
# Key of `--additional-config` with the plugin's own settings: defaults of the routing arguments, and this switch.
KEY = "ham"
CONVERSATIONS = "conversations"
# Types of RoPE whose frequencies change with the length of what is read.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def _own(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    return additional.get(KEY, {}) if isinstance(additional, dict) else {}


def routing_defaults(vllm_config: VllmConfig) -> dict[str, Any]:
    """The routing arguments of requests that give none, once `HAMSettings` has completed the configuration."""
    return {name: value for name, value in _own(vllm_config).items() if name in ROUTING_ARGUMENTS}


def keeps_conversations(vllm_config: VllmConfig) -> bool:
    """True if a request may go on with the memory of one that has ended."""
    return _own(vllm_config).get(CONVERSATIONS, False)


class HAMSettings(VerifyAndUpdateConfig):
    """What vLLM's configuration must say to serve a HAM model.

    A server needs no flags for it. `--additional-config '{"ham": {"kv_budget": 1024}}'` sets defaults of the routing
    arguments, before those of the checkpoint's generation configuration; `"conversations": true` has the next turn of
    a conversation go on with the memory of the last, which stays in blocks that are free otherwise.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Completes the configuration.

        Raises:
            ValueError: for a feature of vLLM that the plugin does not serve, and for defaults that do not fit.
        """
        _refuse_unserved(vllm_config)
        model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
        if cache_config.enable_prefix_caching:
            logger.info("HAM models have no prefix cache: a state holds all tokens up to one. It is off.")
            cache_config.enable_prefix_caching = False
        # What a layer reads depends on what was kept, so there is no graph to compile or to capture.
        model_config.enforce_eager = True
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_consumer"
        )
        others = [x for x in model_config.logits_processors or [] if x != PROCESSOR]
        model_config.logits_processors = [*others, PROCESSOR]
        own = _checked(vllm_config)
        defaults = {name: value for name, value in own.items() if name in ROUTING_ARGUMENTS}
        served = Served(model_config.hf_config, defaults, model_config.model, model_config.revision, bool(others))
        served.check(None)
        vllm_config.additional_config = {**vllm_config.additional_config, KEY: own}
        HAMArguments.served = served


def _refuse_unserved(vllm_config: VllmConfig) -> None:
    parallel, config = vllm_config.parallel_config, vllm_config.model_config.hf_config
    if parallel.pipeline_parallel_size != 1:
        raise ValueError(
            f"`pipeline_parallel_size` must be 1 for a HAM model, got {parallel.pipeline_parallel_size}: use "
            "`tensor_parallel_size` or `data_parallel_size`."
        )
    Shard(0, parallel.tensor_parallel_size).config(config)
    for name in ("speculative_config", "lora_config", "kv_transfer_config"):
        given = getattr(vllm_config, name)
        if given is not None and getattr(given, "kv_connector", None) != CONNECTOR:
            raise ValueError(f"`{name}` must be left out for a HAM model, got {given}.")
    cache_config = vllm_config.cache_config
    plain = {
        "quantization": (vllm_config.model_config.quantization, None),
        "kv_cache_dtype": (cache_config.cache_dtype, "auto"),
        "kv_offloading_size": (cache_config.kv_offloading_size, None),
    }
    for name, (value, accepted) in plain.items():
        if value != accepted:
            raise ValueError(f"`{name}` must be left out for a HAM model, got {value!r}.")
    kind = (config.rope_parameters or {}).get("rope_type")
    if kind in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"A model with RoPE of the type {kind!r} cannot be served: its frequencies depend on the longest request "
            "of a batch, so that requests would change each other's answers."
        )
    if vllm_config.use_v2_model_runner:
        raise ValueError("The V2 model runner cannot serve HAM models: set the variable VLLM_USE_V2_MODEL_RUNNER=0.")


def _checked(vllm_config: VllmConfig) -> dict[str, Any]:
    """The plugin's own settings, with the routing arguments of the checkpoint's generation configuration."""
    config: HAMConfig = vllm_config.model_config.hf_config
    given = _own(vllm_config)
    if not isinstance(given, dict):
        raise ValueError(f"`additional_config[{KEY!r}]` must be a dict, got {given!r}.")
    names = (*ROUTING_ARGUMENTS, CONVERSATIONS)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"`additional_config[{KEY!r}]` takes {', '.join(names)}, got {unknown[0]!r}.")
    switch = given.get(CONVERSATIONS, False)
    if not isinstance(switch, bool):
        raise ValueError(f"`additional_config[{KEY!r}][{CONVERSATIONS!r}]` must be true or false, got {switch!r}.")
    generation = GenerationConfig(**vllm_config.model_config.try_get_generation_config())
    return first_routing(given, own_routing(config, generation)) | {CONVERSATIONS: switch}
