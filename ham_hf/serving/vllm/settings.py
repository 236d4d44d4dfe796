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

logger = init_logger(__name__)

CONNECTOR, CONNECTOR_MODULE = "HAMConnector", "ham_hf.serving.vllm.connector"
PROCESSOR = "ham_hf.serving.vllm.requests:HAMArguments"
# Key of `--additional-config` with the server's own defaults of the routing arguments.
DEFAULTS = "ham"


def routing_defaults(vllm_config: VllmConfig) -> dict[str, Any]:
    """The routing arguments of requests that give none, once `HAMSettings` has completed the configuration."""
    additional = vllm_config.additional_config
    return additional.get(DEFAULTS, {}) if isinstance(additional, dict) else {}


class HAMSettings(VerifyAndUpdateConfig):
    """What vLLM's configuration must say to serve a HAM model.

    A server needs no flags for it. `--additional-config '{"ham": {"kv_budget": 1024}}'` sets defaults of the routing
    arguments, before those of the checkpoint's generation configuration.
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
        defaults = _defaults(vllm_config)
        served = Served(model_config.hf_config, defaults, model_config.model, model_config.revision, bool(others))
        served.check(None)
        vllm_config.additional_config = {**vllm_config.additional_config, DEFAULTS: defaults}
        HAMArguments.served = served


def _refuse_unserved(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ValueError(
                f"`{name}` must be 1 for a HAM model, got {getattr(parallel, name)}: use `data_parallel_size`."
            )
    for name in ("speculative_config", "lora_config", "kv_transfer_config"):
        given = getattr(vllm_config, name)
        if given is not None and getattr(given, "kv_connector", None) != CONNECTOR:
            raise ValueError(f"`{name}` must be left out for a HAM model, got {given}.")
    if vllm_config.model_config.quantization is not None:
        raise ValueError(f"`quantization` must be left out, got {vllm_config.model_config.quantization!r}.")
    if vllm_config.use_v2_model_runner:
        raise ValueError("The V2 model runner cannot serve HAM models: set the variable VLLM_USE_V2_MODEL_RUNNER=0.")


def _defaults(vllm_config: VllmConfig) -> dict[str, Any]:
    config: HAMConfig = vllm_config.model_config.hf_config
    given = routing_defaults(vllm_config)
    unknown = sorted(set(given) - set(ROUTING_ARGUMENTS))
    if unknown:
        raise ValueError(
            f"`additional_config[{DEFAULTS!r}]` takes {', '.join(ROUTING_ARGUMENTS)}, got {unknown[0]!r}."
        )
    generation = GenerationConfig(**vllm_config.model_config.try_get_generation_config())
    return first_routing(given, own_routing(config, generation))
