# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Shows a calibration: what each usage keeps of some text, and how it is divided over the heads."""

from pathlib import Path

import torch

from ..configuration_ham import HAMConfig
from ..modeling_ham import HAMForCausalLM
from ..routing_ham import usage_shares
from .markdown import table

USAGES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
# The usage that the picture shows.
PICTURED = 0.25


@torch.no_grad()
def usage_table(model: HAMForCausalLM, windows: list[torch.Tensor]) -> str:
    """What the model keeps and holds of `[1, T]` windows at several usages, and its loss on them, as a table."""
    lines = []
    hybrid = [i for i, layer_type in enumerate(model.config.layer_types) if layer_type == "hybrid"]
    for kv_usage in USAGES:
        figures = []
        for window in windows:
            ids = window.to(model.device)
            outputs = model(ids, labels=ids, use_cache=True, kv_usage=kv_usage)
            counts = outputs.cache.kept_tokens(), outputs.cache.held_tokens()
            figures.append([*(x[hybrid].float().mean() / ids.shape[1] for x in counts), outputs.loss.cpu()])
        kept, held, loss = torch.tensor(figures).mean(0).tolist()
        lines.append([f"{kv_usage:.0%}", f"{kept:.1%}", f"{held:.1%}", f"{loss:.4f}"])
    return table(["usage asked for", "kept", "held, with window and sinks", "loss (nats/token)"], lines)


def plot_heads(config: HAMConfig, path: Path) -> None:
    """Draws the importance of each head, and the share that it keeps of a usage of 25%, layer by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    importance = torch.tensor(config.head_importance)
    shares = usage_shares(config, PICTURED)
    layers = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "hybrid"]
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 4), layout="constrained", sharex=True)
    for axis, values, title, largest in (
        (axes[0], importance, "importance (part of the fall of the loss, nats/token)", None),
        (axes[1], shares, f"share kept when {PICTURED:.0%} is asked for", 1.0),
    ):
        image = axis.imshow(
            values.T.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=largest, interpolation="nearest"
        )
        axis.set(ylabel="key/value head", title=title, yticks=range(values.shape[1]))
        figure.colorbar(image, ax=axis)
    step = -(-len(layers) // 16)
    axes[1].set(xlabel="layer", xticks=range(0, len(layers), step), xticklabels=layers[::step])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
