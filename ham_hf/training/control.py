# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Steers usage in training: the target's schedule, the thresholds' learning rate, and figures to watch."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration_ham import HAMConfig, check_target_kv_usage
from ..conversion.memories import added_parameters
from ..mixer_ham import HAMMixer
from ..modeling_ham import HAMModel
from ..threshold_control_ham import threshold_gradients

Target = float | list[float]

# Parameters of a HAM that weight decay would distort: it is for matrices.
UNDECAYED = {"bias", "A_log", "dt_bias", "error_weight", "threshold"}
# Settings with which SGD, and Adam and its kin, descend by the gradient itself. Adam divides the gradient by its usual
# size, and would take steps of one length at any distance from the target; momentum carries a threshold past it.
PLAIN_DESCENT = {"weight_decay": 0.0, "eps": 1.0, "betas": (0.0, 0.99), "momentum": 0.0}


@dataclass(frozen=True)
class UsageSchedule:
    """The target usage of each step: straight lines between points, level before the first and after the last.

    Attributes:
        points: `(step, target)` in rising order of steps; a target is a fraction, or all are lists with one fraction
            per hybrid layer. `((0, 1.0), (2000, 0.5))` lowers the usage of a converted model.
        freeze_steps: number of steps at the beginning during which thresholds are held; the schedule's steps still
            count from the start of training.

    Raises:
        TypeError, ValueError: for points that do not form a schedule.
    """

    points: tuple[tuple[int, Target], ...]
    freeze_steps: int = 0

    def __post_init__(self) -> None:
        _check_step("freeze_steps", self.freeze_steps)
        try:
            points = tuple((step, list(x) if isinstance(x, (list, tuple)) else x) for step, x in self.points)
        except (TypeError, ValueError):
            raise TypeError(f"`points` must be pairs of a step and a target usage, got {self.points!r}.") from None
        if not points:
            raise ValueError("`points` must hold at least one pair of a step and a target usage, got none.")
        for step, target in points:
            _check_step("points", step)
            if target is None:
                raise TypeError("`points` must have target usages; to hold the thresholds, set `freeze_steps`.")
            check_target_kv_usage(target, "layer", len(target) if isinstance(target, list) else 1)
        steps = [step for step, _ in points]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"`points` must have rising steps, got {steps}.")
        sizes = {len(target) if isinstance(target, list) else None for _, target in points}
        if len(sizes) > 1:
            raise ValueError(f"`points` must have targets of one form, numbers or lists of one length, got {points}.")
        object.__setattr__(self, "points", points)

    def target_at(self, step: int) -> Target | None:
        """The target of the update after `step` others; `None`, which holds thresholds, while they are frozen."""
        if step < self.freeze_steps:
            return None
        after = bisect_right([at for at, _ in self.points], step)
        if after in (0, len(self.points)):
            return self.points[max(0, after - 1)][1]
        (first, low), (last, high) = self.points[after - 1], self.points[after]
        way = (step - first) / (last - first)
        if isinstance(low, list) and isinstance(high, list):
            return [a + (b - a) * way for a, b in zip(low, high, strict=True)]
        return low + (high - low) * way  # type: ignore[operator]  # all targets have one form

    def check(self, max_steps: int) -> None:
        """Raises `ValueError` for points and frozen steps beyond a training of `max_steps`."""
        last = self.points[-1][0]
        if last > max_steps:
            raise ValueError(
                f"`points` must end within the {max_steps} steps of the training, got one at step {last}."
            )
        if self.freeze_steps > max_steps:
            raise ValueError(
                f"`freeze_steps` must be at most the {max_steps} steps of the training, got {self.freeze_steps}."
            )


def _check_step(name: str, step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"`{name}` must count steps in whole numbers, got {step!r}.")
    if step < 0:
        raise ValueError(f"`{name}` must count steps from 0, got {step}.")


def _check_rate(name: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {rate!r}.")


def _is_threshold(name: str) -> bool:
    return name.rpartition(".")[2] == "threshold"


def _decays(name: str) -> bool:
    """True if the parameter of this name has weight decay."""
    owner, _, leaf = name.rpartition(".")
    return leaf not in UNDECAYED and not owner.endswith("norm")


def thresholds_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned thresholds `[Hk]` of every hybrid layer, by name and in the order of the layers."""
    return {name: parameter for name, parameter in model.named_parameters() if _is_threshold(name)}


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    threshold_learning_rate: float = 0.2,
    router_learning_rate: float | None = None,
    added_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn, for AdamW and its kin (whose `eps` is a number) and for SGD.

    Thresholds have a learning rate of their own, and descend by the gradient itself under any optimizer: their group
    brings the settings for that, of which an optimizer takes those that it has.

    Args:
        model: a HAM, also wrapped by DDP, FSDP (which must keep the parameters' names), peft or `torch.compile`.
        learning_rate: rate of everything but thresholds, learned routers and what conversion added.
        weight_decay: weight decay of matrices; norms, biases, decay rates and thresholds have none.
        threshold_learning_rate: rate of the thresholds. If it is too high, usage swings from batch to batch; if it is
            too low, usage follows late.
        router_learning_rate: rate of learned routers; by default that of what conversion added.
        added_learning_rate: rate of what conversion added to the layers of a source; `learning_rate` by default.

    Returns:
        Dictionaries with `params`, `lr` and `weight_decay`; no group is empty, and the thresholds' is the last.

    Raises:
        ValueError: for a rate that is not a number of at least 0, and if a wrapper has dropped the parameters' names.
    """
    added_rate = learning_rate if added_learning_rate is None else added_learning_rate
    router_rate = added_rate if router_learning_rate is None else router_learning_rate
    rates = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "threshold_learning_rate": threshold_learning_rate,
        "added_learning_rate": added_rate,
        "router_learning_rate": router_rate,
    }
    for name, rate in rates.items():
        _check_rate(name, rate)
    mixers = () if added_learning_rate is None else hybrid_mixers(model)
    added = {id(parameter) for mixer in mixers for parameter in added_parameters(mixer).values()}
    settings: dict[tuple[float, float], list[nn.Parameter]] = {}
    thresholds = []
    for name, parameter in model.named_parameters():
        if "flat_param" in name:
            raise ValueError("`model` must keep its parameters' names: give FSDP `use_orig_params=True`.")
        if not parameter.requires_grad:
            continue
        if _is_threshold(name):
            thresholds.append(parameter)
            continue
        decay = weight_decay if _decays(name) else 0.0
        rate = router_rate if ".router." in f".{name}" else added_rate if id(parameter) in added else learning_rate
        settings.setdefault((rate, decay), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in settings.items()
    ]
    if thresholds:
        groups.append({"params": thresholds, "lr": threshold_learning_rate, **PLAIN_DESCENT})
    return groups


def clipped_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters for gradient clipping: all that learn but thresholds, whose gradients are not slopes of the loss."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not _is_threshold(name)]


def _ham(model: nn.Module) -> HAMModel:
    """The decoder in a model, which may be wrapped."""
    found = [module for module in model.modules() if isinstance(module, HAMModel)]
    if len(found) != 1:
        raise ValueError(f"`model` must hold one HAM, got {type(model).__name__} with {len(found)}.")
    return found[0]


def hybrid_mixers(model: nn.Module) -> list[HAMMixer]:
    """The mixers of the hybrid layers of a HAM, which may be wrapped."""
    return [layer.mixer for layer in _ham(model).layers if layer.mixer.layer_type == "hybrid"]


class UsageMeter:
    """Measures the usage of a model in the calls made inside `with`, in training or not; padding does not count.

    Layers that gradient checkpointing recomputes in the backward pass are not counted again. No figure is copied to
    the host, and no rank waits for another, before `read`.

    Args:
        model: a HAM, also wrapped.
        bins: number of equal parts of `[0, 1]` in which scores are counted.
        with_gradients: measure only calls that compute a gradient, not those that TRL's trainers make within a step to
            generate, or for a reference.

    Raises:
        ValueError: for a model without hybrid layers.
    """

    def __init__(self, model: nn.Module, bins: int = 50, with_gradients: bool = False):
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"`bins` must be a positive int, got {bins!r}.")
        self.decoder = _ham(model)
        self.bins = bins
        self.with_gradients = with_gradients
        self.mixers = hybrid_mixers(model)
        if not self.mixers:
            raise ValueError("`model` has no hybrid layer, so there is no usage to measure.")
        self._handles: list[RemovableHandle] = []
        self._inside = False
        self._reset()

    def _reset(self) -> None:
        # For each layer: kept `[Hk]`, histogram `[Hk * bins]`, tokens `[1]`, all int64 on the layer's device.
        self._counts: list[list[torch.Tensor] | None] = [None] * len(self.mixers)
        self._thresholds: list[torch.Tensor | None] = [None] * len(self.mixers)

    def __enter__(self) -> Self:
        """Starts to measure; raises `RuntimeError` inside another `with` of the same meter."""
        if self._handles:
            raise RuntimeError("This meter measures already: leave its `with` first.")
        # A backward pass calls layers again, but not the decoder.
        self._handles = [
            self.decoder.register_forward_pre_hook(lambda *_: self._enter_decoder(True)),
            self.decoder.register_forward_hook(lambda *_: self._enter_decoder(False), always_call=True),
        ]
        for index, mixer in enumerate(self.mixers):
            hook = self._hook(index)
            self._handles.append(mixer.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Stops measuring; the figures stay until they are read."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside = [], False

    def _enter_decoder(self, inside: bool) -> None:
        # Checked here: inside a checkpointed layer gradients may be off.
        self._inside = inside and (torch.is_grad_enabled() or not self.with_gradients)

    def _hook(self, index: int) -> Any:
        def hook(mixer: HAMMixer, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
            if self._inside:
                # A sharded threshold is whole here.
                self._thresholds[index] = mixer.threshold.detach().float().clone()
                in_force = mixer.threshold_in_force(kwargs["retention"].threshold, output[2].device)
                self._count(index, output[2].detach(), in_force, kwargs["tokens"].real)

        return hook

    def _count(self, index: int, scores: torch.Tensor, thresholds: torch.Tensor, real: torch.Tensor | None) -> None:
        """Adds the scores `[B, T, Hk]` of a call with thresholds `[B or 1, Hk or 1]` to the counts."""
        heads = scores.shape[-1]
        real = torch.ones_like(scores[..., 0], dtype=torch.bool) if real is None else real
        weights = real[..., None].expand_as(scores).long()
        kept = ((scores >= thresholds[:, None]) * weights).sum((0, 1))
        bins = (scores * self.bins).long().clamp(0, self.bins - 1)
        bins = bins + torch.arange(heads, device=scores.device) * self.bins
        histogram = weights.new_zeros(heads * self.bins).scatter_add_(0, bins.flatten(), weights.flatten())
        new = [kept, histogram, real.sum().view(1)]
        old = self._counts[index]
        self._counts[index] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def read(self) -> dict[str, Any]:
        """Returns the figures since the last call, summed over all ranks, and starts anew.

        Every rank must call it.

        Returns:
            `usage`: `[L, Hk]` float32, the fraction of tokens kept; `histogram`: `[L, Hk, bins]` int64, the number of
            scores in each part of `[0, 1]`; `thresholds`: `[L, Hk]` float32, the learned ones at the last call;
            `tokens`: int. Tensors are on the CPU.

        Raises:
            RuntimeError: if no token was seen.
        """
        device = self.mixers[0].threshold.device
        heads = self.decoder.config.num_key_value_heads
        size = heads + heads * self.bins + 1
        rows = [
            torch.zeros(size, dtype=torch.int64, device=device) if x is None else torch.cat(x).to(device)
            for x in self._counts
        ]
        total = torch.stack(rows)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        thresholds = [torch.full((heads,), torch.nan) if x is None else x.cpu() for x in self._thresholds]
        self._reset()
        kept, histogram, tokens = total.cpu().split([heads, heads * self.bins, 1], dim=1)
        if not bool(tokens.all()):
            raise RuntimeError("No token was seen since the last `read()`: call the model inside of `with meter:`.")
        return {
            "usage": kept / tokens,
            "histogram": histogram.unflatten(1, (heads, self.bins)),
            "thresholds": torch.stack(thresholds),
            "tokens": int(tokens[0]),
        }


class ThresholdCallback(TrainerCallback):
    """Makes Transformers' Trainer, and those derived from it such as TRL's, meet a target usage, and logs usage.

    Before every step it sets the schedule's target at `state.global_step`, so that a resumed training goes on as an
    unbroken one would. After the optimizer's step each threshold moves by `threshold_learning_rate` times its error in
    usage, measured over all tokens of the update: every part of an accumulated batch and every rank counts. The result
    therefore does not depend on the optimizer, the schedule of the learning rate, the clipping or the loss. The
    optimizer meanwhile sees zero gradients for the thresholds (`config.target_kv_usage` is `None` within a step, and
    the target between steps), and applies no weight decay to thresholds, decay rates, norms and biases.

    An optimizer that holds the thresholds in a group of their own, such as that of `parameter_groups`, moves them
    itself, at the rate of that group.

    Every log of the training loss also holds the fraction kept since the last one (`kv_usage`), the target of the last
    step (`kv_usage_target`, a mean of several, unless thresholds are held), and by layer `kv_usage/layer_0`,
    `kv_usage_min/layer_0`, `kv_usage_max/layer_0` (mean, smallest and largest of its heads) and `threshold/layer_0`
    (mean). They join the Trainer's `log_history` and the `logs` of later callbacks. Trainer puts callbacks that report
    to other tools before those it is given: for them to read the figures, insert this callback at the front of
    `trainer.callback_handler.callbacks`.

    Args:
        schedule: the target usage of each step. Default: the configuration's `target_kv_usage` throughout.
        threshold_learning_rate: if it is too high, usage swings from step to step; if too low, usage follows late.

    Attributes:
        figures: result of `UsageMeter.read` for the last log, histograms included; `None` before the first.

    Raises:
        ValueError: for a rate that is not a finite number of at least 0.
    """

    def __init__(self, schedule: UsageSchedule | None = None, threshold_learning_rate: float = 0.2):
        _check_rate("threshold_learning_rate", threshold_learning_rate)
        self.schedule = schedule
        self.threshold_learning_rate = threshold_learning_rate
        self.figures: dict[str, Any] | None = None
        self._meter: UsageMeter | None = None  # since the last log
        self._update: UsageMeter | None = None  # of one update, if this callback moves the thresholds
        self._targets = UsageSchedule(((0, 1.0),))
        self._undecayed: set[int] = set()
        self._regrouped: list[tuple[dict[str, Any], list[nn.Parameter]]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises `ValueError` for a schedule that this model, optimizer or training cannot follow."""
        meter = UsageMeter(model, with_gradients=True)
        targets = self._schedule_for(meter.decoder.config)
        targets.check(state.max_steps)
        thresholds = [mixer.threshold for mixer in meter.mixers]
        if not any(threshold.requires_grad for threshold in thresholds):
            raise ValueError("`model` has no threshold that learns: set `requires_grad_(True)` on these parameters.")
        update = None
        if not _have_groups_of_their_own(thresholds, optimizer):
            check_movable(args, thresholds, meter.decoder.config.num_key_value_heads)
            update = UsageMeter(model, bins=1, with_gradients=True)
        for old in (self._meter, self._update):
            if old is not None:
                old.__exit__()  # left by a training that broke off within a step
        self._put_back(optimizer)
        self._meter, self._update, self._targets = meter, update, targets
        self._undecayed = {id(parameter) for name, parameter in model.named_parameters() if not _decays(name)}

    def _schedule_for(self, config: HAMConfig) -> UsageSchedule:
        """The schedule, or the configuration's target throughout; raises `ValueError` if a model cannot follow it."""
        if config.router == "recency":
            raise ValueError(
                "`router` of the configuration must be another than 'recency' for thresholds to learn: that one keeps "
                "the last `kv_budget` tokens."
            )
        if config.threshold is not None:
            raise ValueError(
                f"`threshold` of the configuration must be None, so that thresholds learn, got {config.threshold}."
            )
        if self.schedule is None:
            if config.target_kv_usage is None:
                raise ValueError(
                    "`target_kv_usage` of the configuration must be set where no `schedule` is given, got None, by "
                    "which thresholds are held."
                )
            return UsageSchedule(((0, config.target_kv_usage),))
        for _, target in self.schedule.points:
            check_target_kv_usage(target, config.threshold_scope, config.num_hybrid_layers)
        return self.schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the target of the step and starts to measure its calls; calls of an evaluation are not measured."""
        assert self._meter is not None
        target = None if self._update is not None else self._targets.target_at(state.global_step)
        self._meter.decoder.config.target_kv_usage = target
        self._meter.__enter__()
        if self._update is not None:
            self._update.__enter__()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Exempts parameters from weight decay by groups that last for one step.

        Lasting groups would be saved, but a checkpoint is resumed into the groups that Trainer makes.
        """
        for group in list(optimizer.param_groups):
            spared = [parameter for parameter in group["params"] if id(parameter) in self._undecayed]
            if spared and group.get("weight_decay"):
                self._regrouped.append((group, group["params"]))
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in self._undecayed]
                optimizer.param_groups.append({**group, "params": spared, "weight_decay": 0.0})

    def _put_back(self, optimizer: Any) -> None:
        if self._regrouped:
            del optimizer.param_groups[-len(self._regrouped) :]
        for group, parameters in self._regrouped:
            group["params"] = parameters
        self._regrouped = []

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Moves the thresholds, unless the optimizer has moved them."""
        self._put_back(optimizer)
        if self._update is None:
            return
        target = self._targets.target_at(state.global_step)
        figures, scope = self._update.read(), self._update.decoder.config.threshold_scope
        steps = threshold_gradients(figures["thresholds"], figures["usage"], target, scope)
        for mixer, step in zip(self._update.mixers, steps, strict=True):
            if mixer.threshold.requires_grad:
                descend(mixer.threshold, self.threshold_learning_rate * step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the measurement of the step."""
        assert self._meter is not None
        self._meter.__exit__()
        if self._update is not None:
            self._update.__exit__()
            # `global_step` counts this step already.
            self._meter.decoder.config.target_kv_usage = self._targets.target_at(state.global_step - 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the figures to a log of the training loss; runs on every rank."""
        if self._meter is None or logs is None or "loss" not in logs:
            return
        self.figures = self._meter.read()
        scalars = usage_scalars(self.figures, [mixer.layer_idx for mixer in self._meter.mixers])
        target = self._meter.decoder.config.target_kv_usage
        if target is not None:
            scalars["kv_usage_target"] = sum(target) / len(target) if isinstance(target, list) else target
        logs.update(scalars)
        state.log_history[-1].update(scalars)


def _have_groups_of_their_own(thresholds: list[nn.Parameter], optimizer: Any) -> bool:
    """True if an optimizer holds all thresholds apart from other parameters, as with `parameter_groups`."""
    wanted = {id(threshold) for threshold in thresholds if threshold.requires_grad}
    alone = [group["params"] for group in optimizer.param_groups if {id(x) for x in group["params"]} <= wanted]
    return wanted == {id(parameter) for parameters in alone for parameter in parameters}


def check_movable(arguments: TrainingArguments, thresholds: list[nn.Parameter], heads: int) -> None:
    """Raises `ValueError` for engines that train copies of the model's parameters."""
    if getattr(arguments, "deepspeed", None) is not None or getattr(arguments, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "`deepspeed` must be left out with ThresholdCallback: DeepSpeed trains copies of the thresholds, which "
            "nobody else can move. Use DDP or FSDP2."
        )
    if any(threshold.shape != (heads,) for threshold in thresholds):
        raise ValueError(
            "`fsdp_version` must be 2 with ThresholdCallback: FSDP1 cuts the thresholds from the model's parameters."
        )


@torch.no_grad()
def descend(threshold: nn.Parameter, step: torch.Tensor) -> None:
    """Subtracts a step `[Hk]` from a threshold, which may be sharded over ranks that all know the step."""
    step = step.to(threshold.device)
    if isinstance(threshold.data, DTensor):
        mesh, placements = threshold.data.device_mesh, threshold.data.placements
        step = distribute_tensor(step, mesh, placements, src_data_rank=None)
    threshold.sub_(step)


def usage_scalars(figures: dict[str, Any], layers: Iterable[int]) -> dict[str, float]:
    """The result of `UsageMeter.read` as named numbers for a log; `layers` are the indices of the hybrid layers."""
    usage = figures["usage"]
    scalars = {"kv_usage": usage.mean().item()}
    for layer, kept, thresholds in zip(layers, usage, figures["thresholds"], strict=True):
        scalars[f"kv_usage/layer_{layer}"] = kept.mean().item()
        scalars[f"kv_usage_min/layer_{layer}"] = kept.min().item()
        scalars[f"kv_usage_max/layer_{layer}"] = kept.max().item()
        scalars[f"threshold/layer_{layer}"] = thresholds.mean().item()
    return scalars
