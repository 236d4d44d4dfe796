# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Trains ham-tiny, the embedded checkpoint, on public-domain English; can be interrupted and resumed.

Usage: ``python -m model_cards.ham_tiny.train --corpus DIR --tokenizer DIR --output DIR``

Every second step uses the learned thresholds, which the control loop drives to half of the tokens; the other steps
keep a randomly drawn fraction, by the score quantiles measured so far, so that one checkpoint serves every usage.
Recall is helped in two ways, because text alone teaches it only after billions of tokens: the layers start as copying
layers (`initialize_recall`), and in the first steps most rows repeat themselves.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.files import write_whole
from ham_hf.files_ham import whole_file
from ham_hf.training.initialization import initialize_recall
from ham_hf.training.sampling import TokenSampler

CALIBRATE_EVERY = 50
EVALUATE_EVERY = 250
SAVE_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result, stored with it."""

    seed: int = 0
    steps: int = 4400
    warmup: int = 50
    decay_from: int = 1900
    repeat_until: int = 300
    repeat_context: int = 256
    repeat_rows: float = 0.6
    context: int = 512
    tokens_per_step: int = 2048
    text_repeat_rows: float = 0.1
    name_rows: float = 0.0
    late_from: int = 3000
    late_context: int = 1024
    late_tokens_per_step: int = 4096
    late_usage: float = 1.6
    book_weight: float = 2.0
    matrix_lr: float = 0.01
    other_lr: float = 3e-3
    threshold_lr: float = 2e-3
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    start_share: float = 0.0

    def learning_rate(self, step: int) -> float:
        """Factor of every learning rate: warm-up, constant, linear decay to 2%."""
        rest = (self.steps - step) / (self.steps - self.decay_from)
        return min(1.0, (step + 1) / self.warmup, max(0.02, rest))

    def batch_shape(self, step: int) -> tuple[int, int]:
        """Rows and tokens per row: short, cheap rows first, and more and longer rows in the last part."""
        if step >= self.late_from:
            return self.late_tokens_per_step // self.late_context, self.late_context
        context = self.repeat_context if step < self.repeat_until else self.context
        return self.tokens_per_step // context, context

    def repeats_at(self, step: int) -> tuple[float, float]:
        """Fractions of rows that repeat text and that repeat random tokens."""
        if step < self.repeat_until:
            return self.repeat_rows / 2, self.repeat_rows / 2
        return self.text_repeat_rows, 0.0

    def usage_at(self, step: int) -> float | None:
        """Fraction of tokens that a step keeps; `None` for the learned thresholds.

        Drawn from (0, 1), and in the late part from a range beyond 1, so that training also keeps all tokens.
        """
        if step % 2 == 0 or step <= CALIBRATE_EVERY:
            return None
        highest = self.late_usage if step >= self.late_from else 1.0
        return min(1.0, highest * float(np.random.default_rng([self.seed, step]).uniform()))


# Continues a finished checkpoint: long windows only, names in some, and a decay over almost the whole run. The mean of
# the weights before and after, with three times the weight on those after, is better than both.
CONTINUED = Recipe(
    steps=1600,
    decay_from=50,
    repeat_until=0,
    late_from=0,
    name_rows=0.3,
    matrix_lr=0.006,
    other_lr=2e-3,
    start_share=0.25,
)
# Also continues a finished checkpoint, with many more tokens per step, for a GPU.
LONG = replace(
    CONTINUED,
    steps=900,
    name_rows=0.1,
    late_tokens_per_step=32768,
    matrix_lr=0.01,
    other_lr=3e-3,
    weight_decay=0.1,
)
RECIPES = {"first": Recipe(), "continued": CONTINUED, "long": LONG}


def ham_tiny_config(tokenizer: PreTrainedTokenizerBase) -> HAMConfig:
    """The shape of ham-tiny: 5 million parameters, and an RNN state small enough that the kept tokens matter.

    Without RoPE, which rotates a query away from an equal key further back; RNN and convolution know the order.
    """
    return HAMConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters=None,
        target_kv_usage=0.5,
        threshold_scope="layer",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_optimizers(model: HAMForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest, and thresholds without weight decay at their own rate.

    These are not the newer groups of `ham_hf.training.control`, because this code must stay as it made the checkpoint.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"This recipe needs `torch.optim.Muon` of PyTorch 2.9 or newer, found {torch.__version__}.")
    mixer_matrices = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "z_proj.weight")
    matrices, thresholds, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("threshold"):
            thresholds.append(parameter)
        elif (parameter.ndim == 2 and ".mlp." in name) or name.endswith(mixer_matrices):
            matrices.append(parameter)
        else:
            others.append(parameter)
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, momentum=0.95)
    groups = [{"params": others, "lr": recipe.other_lr}, {"params": thresholds, "lr": recipe.threshold_lr}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adam]


def train_step(model: HAMForCausalLM, optimizers: list, tokens: torch.Tensor, recipe: Recipe, step: int) -> float:
    """One update; returns the loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * recipe.learning_rate(step)
    tokens = tokens.to(model.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, kv_usage=recipe.usage_at(step)).loss
    if not torch.isfinite(loss):
        raise RuntimeError(
            f"The loss is {loss.item()} at step {step}; nothing was saved since step {step - step % SAVE_EVERY}."
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def evaluate(model: HAMForCausalLM, batches: list[torch.Tensor]) -> dict[str, float]:
    """Held-out loss (nats per token) at the learned thresholds and at usages 0, 0.25 and 1, and the usage of each."""
    model.eval()
    result = {}
    for name, arguments in {
        "learned": {},
        "0": {"kv_usage": 0.0},
        "0.25": {"kv_usage": 0.25},
        "1": {"kv_usage": 1.0},
    }.items():
        losses, usages = [], []
        for batch in (x.to(model.device) for x in batches):
            outputs = model(input_ids=batch, labels=batch, use_cache=True, **arguments)
            losses.append(outputs.loss.item())
            usages.append(outputs.cache.kv_usage().mean().item())
        result[f"loss_{name}"], result[f"usage_{name}"] = float(np.mean(losses)), float(np.mean(usages))
    model.train()
    return result


def save_state(path: Path, step: int, model: HAMForCausalLM, optimizers: list, recipe: Recipe) -> None:
    """Writes parameters, buffers, optimizer moments and recipe to one safetensors file, whole or not at all."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    for i, optimizer in enumerate(optimizers):
        for n, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{n}.{name}": torch.as_tensor(x).clone() for name, x in moments.items()}
    metadata = {"step": str(step), "recipe": json.dumps(asdict(recipe))}
    with whole_file(path) as unfinished:
        save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished, metadata=metadata)


def load_state(path: Path, model: HAMForCausalLM, optimizers: list, recipe: Recipe) -> int:
    """Restores a state of `save_state`; returns the step after which it was written.

    Raises:
        ValueError: if another recipe wrote it, apart from the number of steps.
    """
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        written_by = Recipe(**json.loads(file.metadata()["recipe"]))
        if replace(written_by, steps=recipe.steps) != recipe:
            raise ValueError(f"{path} is of a run with another recipe, {written_by}: give another `--output`.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    parameters = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    model.load_state_dict(parameters | {"lm_head.weight": parameters["model.embed_tokens.weight"]})
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, x in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, n, name = key.split(".", 3)
                state["state"].setdefault(int(n), {})[name] = x
        optimizer.load_state_dict(state)
    return step


def read_log(path: Path, before: int) -> list[dict]:
    """The entries of a JSON Lines log before a step, so that a resumed run rewrites those after its last save."""
    if not path.exists():
        return []
    return [entry for line in path.read_text().splitlines() if (entry := json.loads(line))["step"] < before]


def train(
    corpus: Path,
    tokenizer_path: Path,
    output: Path,
    recipe: Recipe,
    start: Path | None = None,
    device: str = "cpu",
) -> HAMForCausalLM:
    """Trains from scratch, from `start` or from the last saved step in `output`; returns the calibrated model."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    sampler = TokenSampler(corpus, "train", tokenizer, recipe.book_weight)
    held_out = TokenSampler(corpus, "held_out", tokenizer)
    evaluation = [held_out.batch(i, 4, recipe.late_context) for i in range(4)]
    torch.manual_seed(recipe.seed)
    if start is None:
        model = HAMForCausalLM(ham_tiny_config(tokenizer))
        initialize_recall(model)
    else:
        model = HAMForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.to(device).train()  # type: ignore[arg-type]
    optimizers = build_optimizers(model, recipe)

    state, log_path, first = output / "state.safetensors", output / "log.jsonl", 0
    if state.exists():
        first = 1 + load_state(state, model, optimizers, recipe)
        print(f"Resuming at step {first}")
    log = read_log(log_path, first)
    started = time.monotonic()
    with tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, unit="step", mininterval=10) as progress:
        for step in progress:
            seed = recipe.seed * 1_000_003 + step
            tokens = sampler.batch(seed, *recipe.batch_shape(step), recipe.repeats_at(step), recipe.name_rows)
            entry = {"step": step, "loss": train_step(model, optimizers, tokens, recipe, step)}
            progress.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
            if step % CALIBRATE_EVERY == CALIBRATE_EVERY - 1:
                calibrate(model, [tokens])
            if step % EVALUATE_EVERY == EVALUATE_EVERY - 1 or step == recipe.steps - 1:
                entry |= evaluate(model, evaluation)
                tqdm.write(json.dumps(entry))
            log.append(entry | {"seconds": round(time.monotonic() - started, 1)})
            if step % SAVE_EVERY == SAVE_EVERY - 1 or step == recipe.steps - 1:
                # The log first: a resumed run drops its entries after the last saved state.
                write_whole(log_path, "".join(json.dumps(x) + "\n" for x in log))
                save_state(state, step, model, optimizers, recipe)
    if start is not None and recipe.start_share:
        mix_in(model, HAMForCausalLM.from_pretrained(start, dtype=torch.float32).to(device), recipe.start_share)  # type: ignore[arg-type]
    calibrate(model, [sampler.batch(10**9 + i, 4, recipe.late_context) for i in range(16)])
    return model.eval()


@torch.no_grad()
def mix_in(model: HAMForCausalLM, other: HAMForCausalLM, share: float) -> None:
    """Replaces every parameter by the mean of two models, in which `other` has the weight `share`."""
    for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
        parameter.lerp_(its, share)


def earlier_recipes(start: Path | None) -> list[dict]:
    """The recipes that made a checkpoint, in order."""
    if start is None or not (start / "recipe.json").exists():
        return []
    recipes = json.loads((start / "recipe.json").read_text())
    return recipes if isinstance(recipes, list) else [recipes]


def main() -> None:
    """Trains and writes the checkpoint, its tokenizer, log and recipe to `--output`."""
    parser = argparse.ArgumentParser(description="Trains ham-tiny; run again to resume.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by corpus.py beside this")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by tokenizer.py beside this")
    parser.add_argument("--output", type=Path, required=True, help="folder for state, log and the checkpoint")
    parser.add_argument("--start", type=Path, help="finished checkpoint to continue, with a recipe of its own")
    parser.add_argument("--recipe", choices=RECIPES, help="default: continued with --start, otherwise first")
    parser.add_argument("--device", default="cpu", help="device to train on (default: cpu)")
    parser.add_argument("--steps", type=int, help="updates in all (default: the recipe's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    before = earlier_recipes(arguments.start)
    recipe = RECIPES[arguments.recipe or ("first" if arguments.start is None else "continued")]
    recipe = replace(recipe, seed=len(before), steps=arguments.steps or recipe.steps)
    if recipe.steps <= recipe.decay_from:
        parser.error(f"--steps must be above {recipe.decay_from}, where the decay begins, got {recipe.steps}")
    model = train(arguments.corpus, arguments.tokenizer, arguments.output, recipe, arguments.start, arguments.device)
    checkpoint = arguments.output / "ham-tiny"
    model.save_pretrained(arguments.output / "float32")
    # Loading in bfloat16, unlike casting, leaves thresholds, quantiles and decays in float32.
    half = HAMForCausalLM.from_pretrained(arguments.output / "float32", dtype=torch.bfloat16)
    half.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(checkpoint)
    write_whole(checkpoint / "recipe.json", json.dumps([*before, asdict(recipe)], indent=2) + "\n")
    print(f"Wrote {checkpoint}")


if __name__ == "__main__":
    main()
