# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The model card of a checkpoint, made only of facts from its files and its measurements."""

import html
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..configuration_ham import HAMConfig
from ..conversion.shards import DTYPES
from .checkpoint import Checkpoint
from .sources import LICENCE_FIELDS, Sources, check_depth

TEMPLATE = Path(__file__).parent / "card_template.md"
# Marks a card that may be overwritten; a card without it was written by hand.
MARKER = "<!-- Written by `ham-hf card`, which writes it anew: change the files that it is made of instead. -->"
TAGS = ("ham", "hybrid-associative-memory", "gated-deltanet", "kv-cache")
LAYERS = {
    "hybrid": "hybrid",
    "linear_attention": "Gated DeltaNet only (`linear_attention`)",
    "full_attention": "attention to every token only (`full_attention`)",
}
ROUTERS = {
    "cosine": "the RNN's prediction error, by the angle to the value",
    "l2": "the RNN's prediction error, with its magnitude",
    "residual": "what the token writes to the RNN's state, against its value",
    "learned": "an MLP of the token",
    "learned_error": "an MLP of the token and the RNN's prediction error",
    "random": "a hash of the position, as a control",
    "recency": "the position: a full head drops the oldest token, as a control",
}


def build_card(checkpoint: Checkpoint, sources: Sources, name: str, repo_id: str | None = None) -> ModelCard:
    """Fills the template.

    Args:
        checkpoint: facts from the checkpoint's own files.
        sources: measurements and texts about it.
        name: the model's name.
        repo_id: the repository that the card tells readers to load, a placeholder by default.
    """
    name = quotable(name)
    config = checkpoint.config
    evaluation = sources.metadata.get("evaluation", {})
    content = {
        "marker": MARKER,
        "prose": prose,
        "error_figure": error_figure,
        "name": name,
        "sections": sources.sections,
        "parameters": None if is_quantized(checkpoint.config) else f"{sum(checkpoint.parameters.values()):,}",
        "architecture": architecture_rows(checkpoint),
        "router": router_rows(checkpoint),
        "calibrated": checkpoint.calibrated,
        "default_thresholds": "learned thresholds" if config.fixed_threshold is None else "default threshold",
        "repo_id": repo_id or placeholder(name),
        "repo_id_known": repo_id is not None,
        "auto_class": checkpoint.auto_class,
        "generates": checkpoint.task == "text-generation",
        "conversion": quotable(checkpoint.conversion),
        "usage_table": usage_table(sources.usage),
        "evaluated_on": quotable(evaluation.get("dataset")),
        "licence": [quotable(sources.metadata[name]) for name in LICENCE_FIELDS if name in sources.metadata],
        "not_stated": not_stated(checkpoint),
        "heads_plot": None if checkpoint.heads_plot is None else checkpoint.heads_plot.name,
        "plot": None if sources.plot is None else sources.plot.name,
    }
    card = ModelCard.from_template(card_data(checkpoint, sources, name), template_path=str(TEMPLATE), **content)
    card.text += "\n"  # Jinja drops it
    return card


def quotable(value: Any) -> Any:
    """A JSON value with strings that are safe in a sentence, a table's cell or a block of code, whoever wrote them."""
    if isinstance(value, dict):
        return {name: quotable(content) for name, content in value.items()}
    if isinstance(value, list):
        return [quotable(content) for content in value]
    return " ".join(value.split()).replace("`", "'") if isinstance(value, str) else value


def prose(text: str) -> str:
    """Escapes a quotable text for Markdown outside code: it begins no HTML, link, picture or table cell."""
    return re.sub(r"([\[\]|])", r"\\\1", html.escape(text, quote=False))


def error_figure(value: float) -> str:
    """A difference of logits, with two digits everywhere."""
    return f"{value:.1e}"


def placeholder(name: str) -> str:
    """Placeholder for a repository of unknown owner; the code in a card has it between quotes."""
    try:
        validate_repo_id(f"OWNER/{name}")
    except HFValidationError:
        return "OWNER/NAME"
    return f"OWNER/{name}"


def card_in(folder: Path) -> ModelCard | None:
    """The README.md of a folder, or `None`; raises `ValueError` if the Hub could not read its metadata."""
    path = folder / REPOCARD_NAME
    return load_card(path) if path.is_file() else None


def load_card(path: str | Path) -> ModelCard:
    """The model card in a file; raises `ValueError` if the Hub could not read its metadata."""
    try:
        card = ModelCard.load(path)
        check_depth("its metadata", vars(card.data))
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not a model card with metadata that the Hub can read: {error}") from error
    return card


def missing_from(sources: Sources, repo_id: str | None) -> list[str]:
    """Facts missing from a card of these sources, by the file that would hold them."""
    missing = [f"{name}.md" for name in ("summary", "data", "recipe", "limits") if not sources.sections[name]]
    missing += [f"`{name}` in card.json" for name in ("license", "language") if name not in sources.metadata]
    if sources.usage is None:
        missing.append("usage.json of ham-hf evaluate")
    elif not {"dataset", "type"} <= set(sources.metadata.get("evaluation", {})):
        missing.append("`evaluation` in card.json, so the losses are not in the metadata")
    if sources.usage is not None and sources.plot is None:
        missing.append("usage.png of ham-hf evaluate")
    return missing if repo_id else [*missing, "the name on the Hub (--repo-id)"]


def not_stated(checkpoint: Checkpoint) -> str:
    """Text for a section that nobody wrote."""
    if checkpoint.conversion is None:
        return "Not stated."
    source = quotable(checkpoint.conversion["source"]["name"])
    return f"Not stated here; see `{source}`, which this model was made from."


def card_data(checkpoint: Checkpoint, sources: Sources, name: str) -> ModelCardData:
    """The metadata block, without fields that nobody stated."""
    metadata = sources.metadata
    results = eval_results(sources, checkpoint.task)
    return ModelCardData(
        language=metadata.get("language"),
        license=metadata.get("license"),
        license_name=metadata.get("license_name"),
        license_link=metadata.get("license_link"),
        library_name="transformers",
        pipeline_tag=checkpoint.task,
        tags=[*TAGS, *metadata.get("tags", [])],
        base_model=base_model(checkpoint),
        datasets=metadata.get("datasets"),
        model_name=name if results else None,
        eval_results=results or None,
    )


def base_model(checkpoint: Checkpoint) -> str | None:
    """The model on the Hub that a checkpoint was converted from; `None` if there is none, or it was a local folder."""
    name = "" if checkpoint.conversion is None else checkpoint.conversion["source"]["name"]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not Path(name).exists() else None


def eval_results(sources: Sources, task: str | None) -> list[EvalResult]:
    """The held-out loss at each usage, in the Hub's format, which needs the names of a task and a data set."""
    evaluation = sources.metadata.get("evaluation", {})
    if sources.usage is None or task is None or not {"dataset", "type"} <= set(evaluation):
        return []
    # Imported here to avoid a circle: importing ham_hf imports this file, and ham_hf.evaluation imports ham_hf.
    from ..evaluation.report import setting_name

    results = []
    for x in sources.usage["results"]:
        name = setting_name(x)
        asked = f"asked to keep {name}" if x["kv_usage"] is not None else f"at {name}"
        wanted = "learned thresholds" if name == "learned" else asked
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=evaluation["type"],
                dataset_name=evaluation["dataset"],
                dataset_split=evaluation.get("split"),
                metric_type="loss",
                metric_name=f"held-out loss (nats/token), {wanted}, {x['usage']:.1%} of the tokens kept",
                metric_value=round(x["loss"], 4),
                metric_args={"context": sources.usage["context"]},
            )
        )
    return results


def usage_table(usage: dict[str, Any] | None) -> str | None:
    """Loss and bytes at each usage, as `ham-hf evaluate` tabulates them."""
    if usage is None:
        return None
    from ..evaluation.report import to_markdown  # as above

    return to_markdown(usage["results"], usage["context"]).strip()


def architecture_rows(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The table of the shape: labels and values."""
    config = checkpoint.config
    kinds = [f"{config.layer_types.count(x)} {text}" for x, text in LAYERS.items() if x in config.layer_types]
    sizes = f"keys of {config.head_dim} and values of {config.value_head_dim}"
    convolution = "queries, keys and values" + ("" if config.attention_conv else ", those of the RNN alone")
    tied = "tied to the output layer" if config.tie_word_embeddings else "not tied to the output layer"
    shape = config.layer_shape("linear_attention")
    linear = f"{shape.key_heads} key heads, {shape.value_heads} value heads, keys of {shape.key_dim} and values of "
    linear_rows = [("heads of linear layers", f"{linear}{shape.value_dim}")] if config.linear_num_key_heads else []
    dtypes = [f"{n:,} in {dtype_name(kind)}" for kind, n in checkpoint.parameters.most_common()]
    return [
        ("layers", ", ".join(kinds)),
        ("width", f"{config.hidden_size:,}"),
        ("heads", f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key/value heads, {sizes}"),
        *linear_rows,
        ("MLP", f"{config.intermediate_size:,}, gated, `{config.hidden_act}`"),
        ("positions", positions(config)),
        ("convolution", f"{config.conv_kernel_size} tokens, of {convolution}"),
        ("norms and gates", norms_and_gates(config)),
        *always_held(config),
        ("vocabulary", f"{config.vocab_size:,} tokens, embeddings {tied}"),
        ("longest sequence", f"{config.max_position_embeddings:,} tokens (`max_position_embeddings`)"),
        ("quantized weights, as stored" if is_quantized(config) else "parameters", ", ".join(dtypes)),
    ]


def always_held(config: HAMConfig) -> list[tuple[str, str]]:
    """The row of the tokens that hybrid layers hold whatever their scores; none without window and sinks."""
    hybrid = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "hybrid"]
    parts = []
    for which, sizes in (("last", map(config.window_of, hybrid)), ("first", map(config.sinks_of, hybrid))):
        different = sorted(set(sizes))
        if any(different):
            by_layer = " tokens, by layer," if len(different) > 1 else " tokens"
            parts.append(f"the {which} {' or '.join(f'{x:,}' for x in different)}{by_layer}")
    return [("always held", " and ".join(parts))] if parts else []


def dtype_name(kind: str) -> str:
    """PyTorch's name of a safetensors dtype of plain weights; other dtypes keep their name."""
    return str(DTYPES.get(kind, kind)).removeprefix("torch.")


def is_quantized(config: HAMConfig) -> bool:
    """True if several parameters may share a stored number, which then does not tell the number of parameters."""
    return getattr(config, "quantization_config", None) is not None


def positions(config: HAMConfig) -> str:
    """The position embedding of the attention."""
    if config.rope_parameters is None:
        return "no RoPE"
    rope = config.rope_parameters
    part = rope.get("partial_rotary_factor", 1.0)
    of_part = "" if part == 1.0 else f", of {part:.0%} of a head"
    return f"RoPE, `{rope['rope_type']}`, base {rope['rope_theta']:,.0f}{of_part}"


def norms_and_gates(config: HAMConfig) -> str:
    """The switches of a layer that are on."""
    switches = {
        "norm of queries and keys": config.qk_norm,
        "norm of the RNN's output": config.rnn_output_norm,
        "norm of the attention's output": config.kv_output_norm,
        "output gate": config.output_gate,
        "output gate of linear layers": config.linear_output_gate and not config.output_gate,
        "norms after attention and MLP, not before": config.attention_post_norm,
        "biases of q, k, v and output": config.attention_bias,
        "biases of the MLP": config.mlp_bias,
    }
    return ", ".join(name for name, on in switches.items() if on) or "none"


def router_rows(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The table of the router and its thresholds; empty without a hybrid layer."""
    if checkpoint.thresholds is None:
        return []
    config = checkpoint.config
    quantiles = "calibrated: `kv_usage` can be asked for"
    if not checkpoint.calibrated:
        quantiles = "not calibrated: `kv_usage` is refused until `ham-hf calibrate` has run"
    default = "none: the learned thresholds hold"
    if config.fixed_threshold is not None:
        default = f"`{config.fixed_threshold}`, in the place of the learned ones"
    return [
        ("router", f"`{config.router}`: {ROUTERS[config.router]}"),
        ("learned thresholds", learned_thresholds(checkpoint.thresholds)),
        ("default threshold", default),
        ("target of training", target_of_training(config)),
        ("score quantiles", quantiles),
        ("division of `kv_usage`", division_of_usage(config)),
    ]


def division_of_usage(config: HAMConfig) -> str:
    """How heads share a usage, see `usage_shares`."""
    if config.head_importance is None:
        return "even: the importance of the heads was not measured"
    if config.usage_division == "even":
        return "even, by choice: the importance of the heads is known"
    return "by the importance of the heads: the most important keep everything, the others little"


def target_of_training(config: HAMConfig) -> str:
    """The fraction of tokens that training drove the thresholds to keep."""
    target = config.target_kv_usage
    if target is None:
        return "none: the thresholds were held"
    if isinstance(target, list):
        by_layer = ", ".join(f"{value:.0%}" for value in target)
        return f"{by_layer} of the tokens kept, hybrid layer by layer, measured per {config.threshold_scope}"
    return f"{target:.0%} of the tokens kept, measured per {config.threshold_scope}"


def learned_thresholds(thresholds: torch.Tensor) -> str:
    """The range of `[hybrid layers, Hk]` thresholds."""
    low, high = thresholds.min().item(), thresholds.max().item()
    values = f"{low:.3f} everywhere" if low == high else f"from {low:.3f} to {high:.3f}"
    layers, heads = thresholds.shape
    return f"{values}, one for each of {heads} key/value heads in {layers} layers"
