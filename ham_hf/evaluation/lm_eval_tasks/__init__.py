# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
r"""The tasks of `ruler` for lm-evaluation-harness (written for 0.4.13): the functions that the YAML files here name.

    ham-hf run lm_eval --model hf --model_args pretrained=PATH,threshold=0.4 --tasks ham_ruler_niah_single_1 \
        --include_path ham_hf/evaluation/lm_eval_tasks --metadata '{"max_seq_lengths": [1024, 4096]}'

`--tasks ham_ruler` runs them all. The metadata are those of `documents`, and a length is the name of its metric, as in
the harness's own tasks of RULER. The harness cuts off the beginning of prompts that are longer than the model's
`max_position_embeddings`, unless the model arguments hold a larger `max_length`.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from ..ruler import make_samples, score

# The harness needs a list of metrics beforehand, so only lengths that are named in _ham_ruler.yaml have one.
LENGTHS = tuple(2**n for n in range(9, 21))


def documents(
    ruler_task: str,
    max_seq_lengths: Sequence[int] = (4096,),
    num_samples: int = 100,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    **_: Any,
) -> dict[str, Dataset]:
    """The documents of a task, `num_samples` for each length; RULER has 500.

    Args:
        ruler_task: a name of `ruler.TASKS`.
        max_seq_lengths: tokens of prompt and answer together.
        num_samples, seed: of each length.
        tokenizer, pretrained, revision, trust_remote_code: where the tokenizer is; the harness passes on the model's
            arguments, all of them.

    Raises:
        ValueError: without a `pretrained` or `tokenizer`, for lengths that are not in `LENGTHS`, and as `make_samples`
            does.
    """
    source = tokenizer or pretrained
    if not isinstance(source, str):
        raise ValueError(f"`tokenizer` or `pretrained` must be a name or a folder, got {source!r}.")
    if not isinstance(max_seq_lengths, list | tuple) or not set(LENGTHS).issuperset(max_seq_lengths):
        raise ValueError(f"`max_seq_lengths` must be a list of some of {[*LENGTHS]}, got {max_seq_lengths!r}.")
    loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    rows = [
        {
            "ruler_task": ruler_task,
            "length": length,
            "input": sample.prompt.removesuffix(sample.answer_prefix),
            "gen_prefix": sample.answer_prefix,
            "outputs": [*sample.answers],
        }
        for length in max_seq_lengths
        for sample in make_samples(ruler_task, loaded, length, num_samples, seed)
    ]
    return {"test": Dataset.from_list(rows)}


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The score of a document under the name of its length; the harness averages over those that have one."""
    return {str(document["length"]): score(document["ruler_task"], results[0], document["outputs"])}
