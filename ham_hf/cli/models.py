# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Loads the model and the tokenizer of a command, or raises an error of one line."""

import argparse
import re
from pathlib import Path
from typing import Any

from .arguments import CommandError, Parser, check_checkpoint_folder, failing_as, number
from .libraries import import_transformers

MODEL = "argument --model"
EMBEDDED_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "ham-tiny"


def add_model_arguments(parser: Parser, max_new_tokens: int) -> None:
    """Adds the arguments of every command that runs a model."""
    whole = number("a whole number from 1", 1, 2**31, int)
    help_text = "folder of a HAM checkpoint, or its name on the Hub (default: the one in this package)"
    parser.add_argument("--model", metavar="PATH_OR_ID", default=str(EMBEDDED_CHECKPOINT), help=help_text)
    help_text = "length of the continuation (default: %(default)s)"
    parser.add_argument("--max-new-tokens", metavar="N", type=whole, default=max_new_tokens, help=help_text)
    temperature = number("a number from 0 to 1000", 0, 1000)
    help_text = "sample at this temperature; 0 takes the likeliest token (default: %(default)s)"
    parser.add_argument("--temperature", metavar="T", type=temperature, default=0.0, help=help_text)
    seed = number("a whole number from 0 to 2^64 - 1", 0, 2**64 - 1, int)
    parser.add_argument(
        "--seed", metavar="S", type=seed, default=0, help="seed of the sampling (default: %(default)s)"
    )
    add_placement_arguments(parser)


def add_placement_arguments(parser: Parser) -> None:
    """Adds the device and the type of the weights."""
    help_text = "auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: %(default)s)"
    parser.add_argument("--device", default="auto", help=help_text)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    help_text = "type of the weights: %(choices)s (default: auto, the checkpoint's)"
    parser.add_argument("--dtype", metavar="DTYPE", choices=dtypes, default="auto", help=help_text)


def load(
    arguments: argparse.Namespace, argument: str = MODEL, any_model: bool = False, **choice: Any
) -> tuple[Any, Any]:
    """The model, ready on its device, and its tokenizer.

    Args:
        arguments: those of the command.
        argument: how errors call the argument that names the model.
        any_model: also take a causal language model of Transformers that is not a HAM.
        choice: fields of the configuration to change.
    """
    name = arguments.model
    check_model_name(name, argument)
    import_transformers()
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = pick_device(arguments.device)
    with Console(stderr=True).status("Loading the model"):
        with failing_as(f"{argument}: cannot load a model from {name}"):
            if any_model and model_type(name) != "ham":
                model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype)
            else:
                model = load_model(name, arguments.dtype, argument, **choice)
        with failing_as(f"{argument}: cannot load a tokenizer from {name}"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        if len(tokenizer) > model.config.vocab_size:
            sizes = f"{len(tokenizer)} tokens in its tokenizer and {model.config.vocab_size} embeddings"
            raise CommandError(f"{argument}: {name} has {sizes}, takes a checkpoint where they agree")
        return model.to(device), tokenizer


def load_model(name: str, dtype: str, argument: str, **choice: Any) -> Any:
    """The model of a checkpoint; refuses a checkpoint that is not a HAM or lacks weights."""
    import torch

    from .. import HAMForCausalLM

    kind = model_type(name)
    if kind != "ham":
        raise CommandError(f"{argument}: {name} holds a model of type {kind!r}, takes a HAM model ('ham')")
    # With this option `from_pretrained` reports which shapes differ; without it, it would print a table.
    loaded: Any = HAMForCausalLM.from_pretrained(
        name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **choice
    )
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise CommandError(
            f"{argument}: {name} lacks {len(wrong)} of the weights that its config.json asks for, "
            f"or has them in another shape, such as {wrong[0]}"
        )
    if not all(bool(torch.isfinite(x).all()) for x in model.parameters()):
        raise CommandError(f"{argument}: {name} holds weights that are not finite numbers")
    if model.config.num_hybrid_layers == 0:
        raise CommandError(f"{argument}: {name} has no layer of type 'hybrid', takes a model with at least one")
    return model


def model_type(name: str) -> Any:
    """The type of model in a checkpoint."""
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(name)[0].get("model_type")


def check_model_name(name: str, argument: str = MODEL) -> None:
    """Refuses a name that is neither a folder nor possible on the Hub, before anything is imported or downloaded."""
    if Path(name).is_dir():
        check_checkpoint_folder(Path(name), argument)
    elif name == str(EMBEDDED_CHECKPOINT):
        raise CommandError(f"{argument}: this installation lacks its checkpoint {name}; give --model PATH_OR_ID")
    elif Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CommandError(f"{argument}: {name!r} is not a folder, takes the folder of a HAM checkpoint or OWNER/NAME")


def pick_device(name: str) -> Any:
    """The device to run on; raises `CommandError` if it does not work."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"argument --device: {name!r} is not available, takes auto, cpu, cuda or cuda:N") from error
    return torch.device(name)


def check_budgets(config: Any, budgets: list[int | None]) -> None:
    """Refuses budgets that window and sinks alone would fill."""
    hybrid = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "hybrid"]
    always = max(config.window_of(i) + config.sinks_of(i) for i in hybrid)
    for budget in budgets:
        if budget is not None and budget <= always:
            raise CommandError(
                f"argument --kv-budget: got {budget}, takes more than the {always} tokens of window and sinks"
            )


def calibrated(model: Any) -> bool:
    """True if the checkpoint holds the score quantiles that `kv_usage` needs."""
    mixers = [layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]
    return all(bool((mixer.score_quantiles.amax(-1) > 0).all()) for mixer in mixers)
