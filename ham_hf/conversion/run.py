# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""One conversion, from a source to a HAM or back: resumable, verified, and written whole or not at all."""

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import REPOCARD_NAME
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .. import __version__
from ..configuration_ham import HAMConfig
from ..files import write_whole
from ..generation_ham import ROUTING_ARGUMENTS
from ..hub.card import build_card, card_in, error_figure
from ..hub.checkpoint import read_checkpoint
from ..hub.sources import LICENCE_FIELDS, RECORD, read_conversion, read_json, read_sources
from ..modeling_ham import HAMForCausalLM
from .declaration import Conversion, no_preparation
from .features import hold_recent_tokens
from .gguf import SUFFIX, GGUFTensors, check_packages, find_gguf, read_config, read_model
from .origin import download, load_tokenizer
from .shards import TensorRule, Tensors, Weights, check_rules, write_shards
from .verification import agree, compare_logits, model_logits, shapes_of, transformers_logits

VERIFIED_ROWS = 2
# The usual width of a convolution.
FEWEST_VERIFIED = 4
# Fields of a HAMConfig that change no logit of a checkpoint without its RNN, or without its cache; training sets some.
FREE_FIELDS = {
    "_name_or_path", "architectures", "attention_sinks", "attention_window", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "head_importance", "pad_token_id", "router", "router_hidden_size", "target_kv_usage",
    "threshold_scope", "transformers_version", "usage_division", "use_cache",
}  # fmt: skip

# Printed once a HAM is written.
NEXT = """\
Next: ham-hf generate PROMPT --model {output}
Then heal it, which teaches its new memory what the other one may drop: ham-hf train healing.yaml, with the recipe of
conversion_scripts/README.md and
  model: {{from: {output}}}"""


class Run:
    """One call of a script: reads `source`, and writes `output` whole or not at all."""

    def __init__(self, conversion: Conversion, arguments: argparse.Namespace, argv: list[str]):
        conversion.prepare()
        self.conversion = conversion
        self.arguments = arguments
        self.argv = argv
        self.output = Path(arguments.output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        # Tells which command the partial folder belongs to: written before it, and removed after it.
        self.state = self.output.with_name(self.output.name + ".partial.json")
        if os.path.lexists(self.output):
            raise ValueError(f"`output` must not exist yet, got {self.output}.")
        self.source, self.gguf_file = self._find_source()

    def _find_source(self) -> tuple[Path, str | None]:
        """The source's folder, and the name of the GGUF file to read in it, if any."""
        source, revision, gguf_file = self.arguments.source, self.arguments.revision, self.arguments.gguf_file
        path = Path(source)
        if path.exists() and revision:
            raise ValueError(f"`--revision` belongs to a repository on the Hub, got {source}, which is here.")
        if path.is_file():
            if path.suffix != SUFFIX:
                raise ValueError(f"`source` must be a folder, a {SUFFIX} file or OWNER/NAME on the Hub, got {source}.")
            if gguf_file is not None:
                raise ValueError(f"`--gguf-file` belongs to a folder or a repository, got the file {source}.")
            path, gguf_file = path.parent, path.name
        elif not path.is_dir():
            print(f"{source} is not a folder here: fetching it from the Hub", flush=True)
            path = download(source, revision, gguf_file)
        gguf_file = find_gguf(path, gguf_file)
        if gguf_file is not None:
            if not self.conversion.reads_gguf or self.arguments.back:
                raise ValueError(f"{self.conversion.script} reads no GGUF here, got {gguf_file}.")
            check_packages()
        return path, gguf_file

    def _source_name(self) -> str:
        """A repository's name on the Hub, or the name of a folder or file without the folders above it."""
        source = self.arguments.source
        return Path(source).resolve().name if Path(source).exists() else source

    def _command(self) -> str:
        """The command for others to read: without the folders above source and output."""
        names = {self.arguments.source: self._source_name(), self.arguments.output: self.output.name}
        arguments = [names.get(argument, argument) for argument in self.argv]
        return shlex.join(["python", f"conversion_scripts/{self.conversion.script}", *arguments])

    def to_ham(self) -> None:
        """Writes the HAM."""
        conversion = self.conversion
        config, config_json = self._source_config()
        ham_config = conversion.ham_config(config)
        if conversion.takes_window:
            hold_recent_tokens(ham_config, self.arguments.window, self.arguments.sinks)
            ham_config.router = self.arguments.router
        old = self._source_tensors()
        ham_config.dtype = old.main_dtype()
        rules = {rule.name: rule for rule in conversion.to_ham(config, ham_config)}
        left_out = self._left_out(old, config)
        shapes = shapes_of(HAMForCausalLM, ham_config)
        check_rules(rules, shapes, left_out, old)
        self._resume_or_begin(old)
        ham_config.architectures = ["HAMForCausalLM"]
        ham_config.save_pretrained(self.partial)
        self._copy_companions(config)
        self._write(old, rules, shapes)
        del old  # it may be in memory, and two models follow in turn
        self._record(config, config_json, left_out - {"lm_head.weight"})
        card = build_card(read_checkpoint(self.partial), read_sources(self.partial), self.output.name)
        write_whole(self.partial / REPOCARD_NAME, str(card))
        self._finish()
        print(conversion.summary)
        if conversion.takes_window:
            print("model_cards/smollm2/README.md tells what a converted SmolLM2 loses, by the tokens it holds.")
        print(NEXT.format(output=self.output))
        if conversion.prepare is no_preparation:  # a teacher is a model that Transformers has
            # It has plain weights.
            teacher = self.arguments.source if self.gguf_file is None else "(the output of this script with --back)"
            print(f"  distillation: {{teacher: {teacher}}}")

    def _record(self, config: Any, config_json: dict[str, Any], left_out: set[str]) -> None:
        """Verifies the HAM and records its origin, for its card and for the way back."""
        conversion = self.conversion
        notes = [conversion.summary]
        if left_out:
            notes.append(f"{len(left_out)} tensors of the source were left out: {conversion.left_out_because}.")
            print(notes[-1])
        record = {
            "source": {
                "name": self.arguments.name or self._source_name(),
                # The cache of the Hub names folders by their commits.
                "commit": None if Path(self.arguments.source).exists() else self.source.name,
                "model_type": config.model_type,
                "architecture": (config.architectures or ["unknown"])[0],
                "config": config_json,
            },
            "script": conversion.script,
            "command": self._command(),
            "date": datetime.date.today().isoformat(),
            "notes": notes,
            "verification": self._verify(self._source_logits, self.partial, config),
        }
        write_whole(self.partial / RECORD, json.dumps(record, indent=1) + "\n")

    def _source_tensors(self) -> Tensors:
        """The source's tensors."""
        if self.gguf_file is not None:
            return GGUFTensors(self.source, self.gguf_file)
        return Weights(self.source, self.conversion.rename)

    def _source_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits that the source's own code computes."""
        if self.gguf_file is not None:
            return model_logits(read_model(self.source, self.gguf_file), tokens)
        return self.conversion.logits(self.source, tokens)

    def _check_model_type(self, model_type: Any) -> None:
        known = self.conversion.model_types
        if model_type not in known:
            hint = " conversion_scripts/README.md names the script for each type."
            if model_type == HAMConfig.model_type:
                hint = " For the way back add --back."
            raise ValueError(
                f"`source` must be of a model type in {known} for {self.conversion.script}, got {model_type!r}.{hint}"
            )

    def _source_config(self) -> tuple[Any, dict[str, Any]]:
        """The configuration of the source's language model, and the content of that model's own config.json."""
        if self.gguf_file is not None:
            config, config_json = read_config(self.source, self.gguf_file)
            self._check_model_type(config.model_type)
            return config, config_json
        config_json = read_json(self.source / CONFIG_NAME)
        # Before Transformers reads it, as it would ask whether to run the code of an unknown type.
        self._check_model_type(config_json.get("model_type"))
        config = AutoConfig.from_pretrained(self.source)
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "`source` must hold plain weights, got a `quantization_config`. Take the original checkpoint."
            )
        language = config.get_text_config()
        if language is config:
            return config, config_json
        language.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[language.model_type]]
        return language, json.loads(language.to_json_string())

    def from_ham(self) -> None:
        """Writes the source's checkpoint again, from a HAM that a script made, which may have been trained since."""
        conversion = self.conversion
        record = read_conversion(self.source)
        if record is None:
            raise ValueError(
                f"`source` must be a folder that {conversion.script} wrote, got one without {RECORD}. Of a HAM "
                "that was saved again, copy that file from the folder that it was loaded from."
            )
        if record["script"] != conversion.script:
            raise ValueError(f"`source` was written by {record['script']}: take that script for the way back.")
        text = json.dumps(record["source"]["config"], indent=2) + "\n"
        config = AutoConfig.for_model(**record["source"]["config"])
        ham_config = HAMConfig.from_pretrained(self.source)
        self._check_lossless(conversion.ham_config(config), ham_config)
        old = Weights(self.source)
        for requirement in conversion.requirements(config, ham_config):
            if not requirement.holds(old.get(requirement.name)):
                raise ValueError(
                    f"The way back would lose something: {requirement.name} {requirement.says}. A HAM that was "
                    "trained with both memories has no counterpart among its sources."
                )
        rules = {rule.name: rule for rule in conversion.from_ham(config, ham_config)}
        implied = {requirement.name for requirement in conversion.requirements(config, ham_config)}
        implied |= {name for name in old.names() if re.search(conversion.inert, name)}
        shapes = shapes_of(conversion.empty_source, config)
        check_rules(rules, shapes, implied, old)
        self._resume_or_begin(old)
        write_whole(self.partial / CONFIG_NAME, text)
        self._copy_companions(config)
        self._write(old, rules, shapes)
        self._verify(partial(conversion.logits, self.partial), self.source, config)
        self._finish()

    def _check_lossless(self, expected: HAMConfig, got: HAMConfig) -> None:
        expected_fields, got_fields = expected.to_dict(), got.to_dict()
        for field in sorted((expected_fields.keys() | got_fields.keys()) - FREE_FIELDS):
            if expected_fields.get(field) != got_fields.get(field):
                raise ValueError(
                    f"The way back would lose something: `{field}` must still be {expected_fields.get(field)!r}, got "
                    f"{got_fields.get(field)!r}."
                )

    def _left_out(self, old: Tensors, config: Any) -> set[str]:
        # Some tied models are saved with both copies.
        tied = {"lm_head.weight"} & old.names() if config.tie_word_embeddings else set()
        embedding = {"model.embed_tokens.weight", "model.embeddings.weight"} & old.names()
        if tied and not any(torch.equal(old.get("lm_head.weight"), old.get(name)) for name in embedding):
            raise ValueError(
                "`source` must hold an lm_head.weight equal to its embeddings, or none, as its config.json sets "
                "`tie_word_embeddings`. Set that to false if the head is one of its own."
            )
        if self.conversion.left_out is None:
            return tied
        return tied | {name for name in old.names() if re.search(self.conversion.left_out, name)}

    def _write(self, old: Tensors, rules: dict[str, TensorRule], shapes: dict[str, torch.Size]) -> None:
        size = sum(shape.numel() for shape in shapes.values())
        print(f"Reads {self.source}: {len(old.names())} tensors in {len(old.files)} file(s)")
        print(f"Writes {self.output}: {len(shapes)} tensors, {size / 1e6:,.1f} million parameters", flush=True)
        write_shards(rules, shapes, old, self.partial, self.arguments.max_shard_size)

    def _resume_or_begin(self, old: Tensors) -> None:
        """Keeps the shards of an interrupted run of the same command, or starts afresh."""
        state = {
            "script": self.conversion.script,
            "version": __version__,
            "back": self.arguments.back,
            "window": [self.arguments.window, self.arguments.sinks],
            "max_shard_size": self.arguments.max_shard_size,
            "source": old.fingerprint(),
        }
        if self.partial.exists():
            if not self.state.is_file():
                raise ValueError(
                    f"`output` is written to {self.partial} first, which exists: move it or choose another."
                )
            if json.loads(self.state.read_text(encoding="utf-8")) == state:
                print(f"Goes on with {self.partial}")
                return
            shutil.rmtree(self.partial)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.state, json.dumps(state))
        self.partial.mkdir()

    def _copy_companions(self, config: PreTrainedConfig) -> None:
        """Copies tokenizer, generation settings and licence."""
        said = []
        tokenizer = None if self.arguments.no_tokenizer else load_tokenizer(self.source, self.gguf_file, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.partial)
            said.append("the tokenizer")
        if (self.source / GENERATION_CONFIG_NAME).is_file():
            # Copied as JSON: Transformers does not save all that it loads, and ignores our fields in a marked file.
            settings = read_json(self.source / GENERATION_CONFIG_NAME)
            dropped = {"_from_model_config", *(ROUTING_ARGUMENTS if self.arguments.back else ())}
            settings = {name: value for name, value in settings.items() if name not in dropped}
            write_whole(self.partial / GENERATION_CONFIG_NAME, json.dumps(settings, indent=2) + "\n")
            said.append("the generation settings")
        for path in self.source.glob("LICENSE*"):
            if path.is_file():
                shutil.copyfile(path, self.partial / path.name)
                said.append(path.name)
        licence = {} if self.arguments.back else self._licence()
        if "license" in licence:
            write_whole(self.partial / "card.json", json.dumps(licence) + "\n")
            said.append(f"the licence that its card states ({licence.get('license_name', licence['license'])})")
        print(f"Copied {', '.join(said) or 'nothing'} beside the weights")
        if tokenizer is None:
            print("Left the tokenizer out, as asked" if self.arguments.no_tokenizer else "Found no tokenizer to copy")

    def _licence(self) -> dict[str, str]:
        """The licence that the source's card states, if the card can be read."""
        try:
            card = card_in(self.source)
        except ValueError as error:
            print(f"Takes no licence from the source's card: {error}")
            return {}
        stated = {} if card is None else {name: card.data.get(name) for name in LICENCE_FIELDS}
        return {name: value for name, value in stated.items() if isinstance(value, str)}

    def _verify(
        self, source_logits: Callable[[torch.Tensor], torch.Tensor], ham: Path, config: PreTrainedConfig
    ) -> dict[str, Any] | None:
        """Compares the logits of both checkpoints on random tokens, with one model at a time in memory."""
        if self.arguments.no_verify:
            print("Not verified, as asked")
            return None
        length = self.arguments.verify_tokens
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (VERIFIED_ROWS, length), generator=generator)
        name = (config.architectures or [config.model_type])[0]
        print(f"Compares the logits of {name} and of HAM on {VERIFIED_ROWS} x {length} random tokens in float32")
        figures = compare_logits(source_logits(tokens), transformers_logits(ham, tokens))
        figures["source_code"] = self.conversion.source_code(name)
        print(
            f"  largest difference {error_figure(figures['max_abs_logit_error'])} "
            f"(allowed {error_figure(figures['tolerance'])}), mean {error_figure(figures['mean_abs_logit_error'])}, "
            f"same likeliest token {figures['top1_agreement']:.1%}"
        )
        if not agree(figures):
            raise ValueError(
                f"The two models must agree to {error_figure(figures['tolerance'])}, got "
                f"{error_figure(figures['max_abs_logit_error'])}; "
                f"nothing was written but {self.partial}, for inspection: remove it with {self.state.name}."
            )
        return figures

    def _finish(self) -> None:
        os.replace(self.partial, self.output)
        self.state.unlink()
        print(f"Wrote {self.output}")
