# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Cost of training a HAM: operations, memory, communication and time, by arithmetic, for `COST.md`.

Tests compare the counts with real small models; the rates of the hardware are assumptions, named in `Hardware`.

Usage: ``python -m model_cards.benchmarks.cost --output model_cards/benchmarks/COST.md``
"""

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ham_hf.configuration_ham import ERROR_ROUTERS, LEARNED_ROUTERS, HAMConfig
from ham_hf.evaluation.markdown import table
from ham_hf.files import write_whole
from ham_hf.modeling_ham import HAMForCausalLM
from ham_hf.prefix_attention_ham import QUERY_BLOCK

# Bytes per number: parameters, gradients and Adam's two moments are float32, activations and messages bfloat16.
WIDE, NARROW = 4, 2
BYTES_PER_PARAMETER = 4 * WIDE
# Tokens per chunk of the delta rule: in PyTorch, and in the kernel.
CHUNK, KERNEL_CHUNK = 32, 64
# Usable part of a GPU's memory: message buffers and fragmentation take the rest.
USABLE = 0.9


@dataclass(frozen=True)
class Hardware:
    """Rates of one GPU: the maker's figures for an H100 SXM, and the assumed efficiencies."""

    memory: float = 80e9  # bytes
    operations: float = 989e12  # bfloat16 multiplications and additions per second
    matrices: float = 0.5  # efficiency in the projections, the MLP and the head
    sequence: float = 0.2  # efficiency in the RNN and in attention
    within: float = 450e9  # bytes per second to the other GPUs of a machine, one way
    between: float = 50e9  # bytes per second to other machines, one way
    link: float = 0.8  # efficiency of both links
    gpus: int = 8  # GPUs per machine


class Model(NamedTuple):
    """A shape, the tokens per row and per step of the whole system, and the fraction of tokens kept."""

    name: str
    config: HAMConfig
    context: int
    batch: int
    usage: float = 0.5


MODELS = (
    Model(
        "0.1B",
        HAMConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
        ),
        4096,
        2**19,
    ),
    Model(
        "0.8B",
        HAMConfig(hidden_size=1536, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=12),
        16384,
        2**19,
    ),
    Model(
        "7B",
        HAMConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        16384,
        2**22,
    ),
)


class Parameters(NamedTuple):
    """Numbers of parameters; a tied head has none, and `matrices` counts the weights of `Linear`s in layers."""

    embedding: int
    layers: int
    head: int
    rest: int
    matrices: int

    @property
    def total(self) -> int:
        """All trained parameters."""
        return self.embedding + self.layers + self.head + self.rest


def parameters(config: HAMConfig) -> Parameters:
    """Counts the parameters of a model that is built without memory."""
    return _count(config.to_json_string())


@functools.cache
def _count(text: str) -> Parameters:
    config = HAMConfig(**json.loads(text))
    with torch.device("meta"):
        model = HAMForCausalLM(config)
    embedding, layers = (
        model.model.embed_tokens.weight.numel(),
        sum(p.numel() for p in model.model.layers.parameters()),
    )
    head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - embedding - layers - head
    linear = (m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    return Parameters(embedding, layers, head, rest, sum(linear))


class Operations(NamedTuple):
    """Multiplications and additions per token of a forward pass (two per weight), by part of the model."""

    matrices: float
    rnn: float
    solve: float
    prediction: float
    prediction_backward: float
    attention: float
    attention_backward: float
    head: float

    @property
    def sequence(self) -> float:
        """Operations between tokens."""
        return self.rnn + self.solve + self.prediction + self.attention

    @property
    def sequence_backward(self) -> float:
        """Backward operations between tokens: two products per product, a solve and a product per solve."""
        return 2 * self.rnn + 3 * self.solve + self.prediction_backward + self.attention_backward

    @property
    def forward(self) -> float:
        """Operations of a whole forward pass."""
        return self.matrices + self.sequence + self.head

    @property
    def backward(self) -> float:
        """Operations of a whole backward pass."""
        return 2 * (self.matrices + self.head) + self.sequence_backward


def operations(config: HAMConfig, context: int, usage: float, chunk: int = CHUNK) -> Operations:
    """Operations per token of hybrid layers; on average a query sees half of the kept tokens, and its own block."""
    heads, kv_heads, key, value = _heads(config)
    layers = config.num_hidden_layers
    # Per key/value head: products of keys, updates, state; per query head: products with keys, updates, state.
    rnn = kv_heads * (2 * chunk * key + 4 * key * value)
    rnn += heads * (2 * chunk * key + 2 * chunk * value + 2 * key * value)
    predicts = config.router in (*ERROR_ROUTERS, "learned_error")
    prediction = layers * kv_heads * predicts * (2 * key * value + 2 * chunk * value)
    met = layers * heads * (usage * context / 2 + QUERY_BLOCK)
    return Operations(
        matrices=2 * parameters(config).matrices,
        rnn=layers * rnn,
        solve=layers * kv_heads * chunk * (key + value),
        prediction=prediction,
        # A score has a gradient only if the router learns from it.
        prediction_backward=2 * prediction * (config.router == "learned_error"),
        attention=met * 2 * (key + value),
        attention_backward=met * 2 * (3 * key + 2 * value),  # the weights again, then four gradients
        head=2 * config.vocab_size * config.hidden_size,
    )


def saved_by_layer(config: HAMConfig, usage: float, kernels: bool, width: int = NARROW) -> float:
    """Bytes per token that a hybrid layer saves for its backward pass, with activations of `width` bytes.

    In PyTorch, or on a GPU with PyTorch's fused norms and the kernels, which save almost nothing of the RNN.
    """
    heads, kv_heads, key, value = _heads(config)
    hidden, channels = config.hidden_size, sum(config.layer_shape("hybrid").channels)
    keys = heads * key + kv_heads * key  # queries and keys together
    # The MLP's four tensors, the convolution's two, the attention's inputs, the kept tokens again, and gates.
    narrow = 4 * config.intermediate_size + 2 * channels + keys + usage * kv_heads * (key + value) + 12 * heads
    if config.router in LEARNED_ROUTERS:
        narrow += 3 * config.router_hidden_size + 2 * kv_heads * value
    if kernels:
        narrow += 4 * hidden + 8 * heads * value + kv_heads * value
        return width * narrow + WIDE * (2 * keys + kv_heads * KERNEL_CHUNK)
    # A norm saves its input in float32 and its output, and for a narrower input the normalised one, too.
    narrow += 2 * hidden + 6 * heads * value
    normed = 2 * hidden + 2 * heads * value
    wide: float = normed if width == WIDE else 2 * normed + keys
    # The delta rule over chunks: tensors of queries, of keys and values, and the states between chunks.
    wide += heads * (2 * key + 2 * CHUNK)
    wide += kv_heads * (5 * key + 3 * value + 4 * CHUNK + 3 * key * value / CHUNK)
    copies = 2 * keys if width != WIDE else 0
    return width * narrow + WIDE * (wide + copies)


def activation_bytes(config: HAMConfig, usage: float, checkpointing: bool, kernels: bool = True) -> float:
    """Bytes per token: of all layers, or of their inputs and one layer at a time; and the head's float32 logits."""
    layer = saved_by_layer(config, usage, kernels)
    head = 3 * NARROW * config.hidden_size + WIDE * config.vocab_size
    if not checkpointing:
        return config.num_hidden_layers * layer + head
    return config.num_hidden_layers * NARROW * config.hidden_size + max(layer, head)


def memory_of_weights(config: HAMConfig, sharded_by: int) -> float:
    """Bytes on each GPU of weights, gradients and Adam's moments; if sharded, also of the gathered weights."""
    counted = parameters(config)
    if sharded_by == 1:
        # Autocast holds a narrow copy of the weights that it multiplies by.
        return BYTES_PER_PARAMETER * counted.total + NARROW * (counted.matrices + counted.head)
    # Two layers, as one computes while the next is gathered, gradients of one, and embedding and head with gradients.
    layer = counted.layers / config.num_hidden_layers
    gathered = 2 * NARROW * layer + WIDE * layer + (NARROW + WIDE) * (counted.embedding + counted.head + counted.rest)
    return BYTES_PER_PARAMETER * counted.total / sharded_by + gathered


class Traffic(NamedTuple):
    """Bytes of the tensors in a step's collectives, by kind; the bytes on a link follow from them."""

    all_reduce: float = 0
    all_gather: float = 0
    reduce_scatter: float = 0

    def sent(self, ranks: int) -> float:
        """Bytes that each of `ranks` sends, in rings: an all-reduce is a reduce-scatter and an all-gather."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (ranks - 1) / ranks


def data_parallel_traffic(config: HAMConfig) -> Traffic:
    """DDP: every gradient once, in float32."""
    return Traffic(all_reduce=WIDE * parameters(config).total)


def sharded_traffic(config: HAMConfig, width: int = NARROW) -> Traffic:
    """FSDP2: layers and embedding are gathered twice, norm and head, which stay, once; gradients are float32."""
    counted = parameters(config)
    embedding = 0 if config.tie_word_embeddings else counted.embedding
    gathered = counted.total + counted.layers + embedding
    return Traffic(all_gather=width * gathered, reduce_scatter=WIDE * counted.total)


def tensor_parallel_traffic(config: HAMConfig, tokens: int, width: int = NARROW) -> Traffic:
    """Transformers' plan for `tokens` of a row: gathers and sums, forward and for the gradients."""
    shape, hidden = config.layer_shape("hybrid"), config.hidden_size
    gate = shape.out_channels if config.output_gate else 0
    # Queries, keys, values and gate are gathered, and so is the gradient of the output projection's input.
    gathered = sum(shape.channels) + gate + shape.out_channels
    # Forward: the outputs of mixer and MLP. Backward: the gradient of the input of each matrix divided by columns.
    summed = (2 + 3 + bool(gate) + 2) * hidden
    layers = config.num_hidden_layers
    return Traffic(
        all_reduce=width * tokens * (layers * summed + 2 * hidden),
        all_gather=width * tokens * (layers * gathered + config.vocab_size),
    )


def _heads(config: HAMConfig) -> tuple[int, int, int, int]:
    shape = config.layer_shape("hybrid")
    return shape.query_heads, shape.key_heads, shape.key_dim, shape.value_dim


def checkpoints(model: Model, hardware: Hardware) -> bool:
    """True if a row fits a machine's GPUs only with activation checkpointing."""
    row = model.context * activation_bytes(model.config, model.usage, checkpointing=False)
    return row + memory_of_weights(model.config, hardware.gpus) > USABLE * hardware.memory


def fits_alone(model: Model, hardware: Hardware) -> bool:
    """True if one GPU holds weights, gradients and moments."""
    return memory_of_weights(model.config, 1) <= hardware.memory


def compute_seconds(model: Model, hardware: Hardware) -> float:
    """Seconds of forward and backward per token on one GPU, with checkpointing if a row needs it."""
    again = checkpoints(model, hardware)
    done = operations(model.config, model.context, model.usage, KERNEL_CHUNK)
    matrices = 3 * (done.matrices + done.head) + again * done.matrices
    sequence = (1 + again) * done.sequence + done.sequence_backward
    return (matrices / hardware.matrices + sequence / hardware.sequence) / hardware.operations


def message_seconds(way: str, config: HAMConfig, gpus: int, hardware: Hardware) -> float:
    """Seconds of a step's messages between `gpus`, by DDP, FSDP2 or HSDP (FSDP2 in a machine, DDP between machines).

    Rings through several machines use all network cards of a machine at once; a ring is as fast as its slowest link.
    Each of HSDP's rings between machines has the card of one GPU, and that GPU's share of the gradients.
    """
    inside, outside = hardware.within * hardware.link, hardware.between * hardware.link
    if way == "HSDP" and gpus > hardware.gpus:
        machines, shard = gpus // hardware.gpus, Traffic(all_reduce=WIDE * parameters(config).total / hardware.gpus)
        return sharded_traffic(config).sent(hardware.gpus) / inside + shard.sent(machines) / outside
    traffic = data_parallel_traffic(config) if way == "DDP" else sharded_traffic(config)
    return traffic.sent(gpus) / (inside if gpus <= hardware.gpus else min(inside, hardware.gpus * outside))


def tensor_parallel_speedup(model: Model, ranks: int, hardware: Hardware) -> float:
    """Speedup of a token on `ranks` GPUs of a machine: they divide matrices, repeat the rest, and wait."""
    done = operations(model.config, model.context, model.usage, KERNEL_CHUNK)
    again = checkpoints(model, hardware)
    repeated = ((1 + again) * done.sequence + done.sequence_backward) / hardware.sequence
    divided = (3 * (done.matrices + done.head) + again * done.matrices) / hardware.matrices
    waits = tensor_parallel_traffic(model.config, 1).sent(ranks) / (hardware.within * hardware.link)
    return compute_seconds(model, hardware) / ((repeated + divided / ranks) / hardware.operations + waits)


def parameter_table() -> str:
    """The models' shapes and parameters."""
    rows = []
    for model in MODELS:
        config, counted = model.config, parameters(model.config)
        shape = f"{config.num_hidden_layers} x {config.hidden_size}, MLP {config.intermediate_size}"
        heads = f"{config.num_attention_heads} / {config.num_key_value_heads} of {config.head_dim}"
        numbers = [counted.total, counted.layers, counted.embedding + counted.head]
        rows.append([model.name, shape, heads, *(f"{n / 1e6:,.0f}M" for n in numbers)])
    columns = "model | layers x width | heads / key-value heads | parameters | in layers | embedding and head"
    return table(columns.split(" | "), rows)


def operation_table() -> str:
    """Operations per token, forward by part and backward, at several usages."""
    rows = []
    for model in MODELS:
        for usage in (0.0, 0.25, 0.5, 1.0):
            done = operations(model.config, model.context, usage, KERNEL_CHUNK)
            parts = [done.matrices, done.rnn + done.solve + done.prediction, done.attention, done.head]
            numbers = [*parts, done.forward, done.backward]
            rows.append([model.name, f"{model.context}", f"{usage:.0%}", *(f"{n / 1e9:.2f}" for n in numbers)])
    columns = "model | context | kept | projections, MLP | RNN | attention | head | forward | backward (GFLOP a token)"
    return table(columns.split(" | "), rows)


def activation_table() -> str:
    """Memory of activations of a row."""
    rows = []
    for model in MODELS:
        cells = [model.name, f"{model.context}"]
        for kernels in (False, True):
            for checkpointing in (False, True):
                number = activation_bytes(model.config, model.usage, checkpointing, kernels)
                cells += [f"{number / 1e3:,.0f} KB", f"{number * model.context / 1e9:.1f} GB"]
        rows.append(cells)
    columns = (
        "model | context | PyTorch: a token | a row | checkpointed: a token | a row | kernels: a token | a row | "
        "checkpointed: a token | a row"
    )
    return table(columns.split(" | "), rows)


def memory_table(hardware: Hardware) -> str:
    """Memory of weights on each GPU, and the tokens whose activations fit beside them."""
    rows = []
    for model in MODELS:
        for gpus in (1, 8, 32, 128):
            held = memory_of_weights(model.config, gpus)
            room = USABLE * hardware.memory - held
            each = [activation_bytes(model.config, model.usage, checkpointing) for checkpointing in (False, True)]
            way = "DDP, any number" if gpus == 1 else f"FSDP2, {gpus}"
            fits = [f"{max(room, 0) / x:,.0f}" if room > 0 else "does not fit" for x in each]
            rows.append([model.name, way, f"{held / 1e9:.1f} GB", *fits])
    columns = "model | way, GPUs | weights and optimizer on each | tokens beside them | checkpointed"
    return table(columns.split(" | "), rows)


def message_table() -> str:
    """Bytes that each GPU sends."""
    rows = []
    for model in MODELS:
        ddp, fsdp = (way(model.config).sent(8) for way in (data_parallel_traffic, sharded_traffic))
        tensor = (tensor_parallel_traffic(model.config, 1).sent(ranks) for ranks in (2, 8))
        rows.append(
            [model.name, f"{ddp / 1e9:.2f} GB", f"{fsdp / 1e9:.2f} GB", *(f"{x / 1e6:.2f} MB" for x in tensor)]
        )
    columns = "model | DDP, 8 GPUs, a step | FSDP2, 8 GPUs, a step | TP 2, a token | TP 8, a token"
    return table(columns.split(" | "), rows)


def time_table(hardware: Hardware) -> str:
    """Seconds of a step's computing and messages by number of GPUs."""
    rows = []
    for model in MODELS:
        most = model.batch // model.context
        alone = compute_seconds(model, hardware)
        for gpus in (8, 16, 32, 64, 128, 256):
            if gpus > most:
                continue
            compute = alone * model.batch / gpus
            ways = [message_seconds(way, model.config, gpus, hardware) for way in ("DDP", "FSDP2", "HSDP")]
            shares = [f"{x:.3f} s ({compute / max(compute, x):.0%})" for x in ways]
            if not fits_alone(model, hardware):
                shares[0] = "does not fit"
            rows.append([model.name, f"{gpus}", f"{model.batch // gpus:,}", f"{compute:.3f} s", *shares])
    columns = "model | GPUs | tokens on each | computing | DDP's messages | FSDP2's | HSDP's"
    return table(columns.split(" | "), rows)


def limit_table(hardware: Hardware) -> str:
    """The fewest tokens a GPU needs to hide its messages, and the most GPUs that follow from the batch."""
    rows = []
    for model in MODELS:
        cells = [model.name, f"{model.batch // model.context}"]
        for way in ("DDP", "FSDP2", "HSDP"):
            tokens = message_seconds(way, model.config, 1024, hardware) / compute_seconds(model, hardware)
            fits = way != "DDP" or fits_alone(model, hardware)
            cells += [f"{tokens:,.0f}", f"{model.batch / tokens:,.0f}"] if fits else ["does not fit", ""]
        rows.append([*cells, *(f"{tensor_parallel_speedup(model, ranks, hardware):.1f}" for ranks in (2, 4, 8))])
    columns = (
        "model | rows in a batch | DDP: fewest tokens | most GPUs | FSDP2: fewest tokens | most GPUs | "
        "HSDP: fewest tokens | most GPUs | TP 2: times as fast | TP 4 | TP 8"
    )
    return table(columns.split(" | "), rows)


def page(hardware: Hardware) -> str:
    """The text of `COST.md`."""
    return PAGE.format(
        **{name: f"{getattr(hardware, name) / 1e9:.0f}" for name in ("memory", "within", "between")},
        **{name: f"{getattr(hardware, name):.0%}" for name in ("matrices", "sequence", "link")},
        operations=f"{hardware.operations / 1e12:.0f}",
        gpus=hardware.gpus,
        parameter_table=parameter_table(),
        operation_table=operation_table(),
        activation_table=activation_table(),
        memory_table=memory_table(hardware),
        message_table=message_table(),
        time_table=time_table(hardware),
        limit_table=limit_table(hardware),
    )


PAGE = """<!-- Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0. -->
# What training a HAM costs

Written by `python -m model_cards.benchmarks.cost --output model_cards/benchmarks/COST.md`. **This is arithmetic,
nothing here was measured on a GPU.** What the counts rest on is tested on small models on a CPU: parameters exactly;
operations within 1% of PyTorch's `FlopCounterMode`; what PyTorch keeps for the backward pass within 5%; the bytes of
DDP, FSDP2 and tensor parallelism within 1% of what two processes sent (`tests/model_cards/test_cost.py`,
`tests/training/test_scale_out.py`).

Assumed of a GPU: {memory} GB; {operations} TFLOP/s in bfloat16, of which projections, MLP and head reach {matrices},
RNN and attention {sequence}, what kernels compute twice included; {within} GB/s to the {gpus} GPUs of a machine and
{between} GB/s to other machines, each way, of which {link} are reached. The rates are those that NVIDIA states for an
H100 SXM with a card of 400 Gbit/s for each GPU, and rings through several machines use all of a machine's cards; the
efficiencies are guesses, and the seconds are as good as they are. Latency is not counted.
Messages and computing overlap completely, which is the best case. Parameters, gradients and Adam's moments are
float32 (16 bytes a parameter), activations and gathered weights bfloat16, gradients are reduced in float32.

## Models

{parameter_table}

Every layer is a HAM layer with the router `cosine`, the vocabulary has 32,000 tokens, embedding and head are two
matrices. The 0.8B is of the size that the paper reports; its shape is ours.

## Operations

{operation_table}

The RNN costs the same at every context, attention in proportion to what is kept. The backward pass of the
projections is twice the forward pass, that of attention more than twice, as the weights are computed again;
checkpointing adds one forward pass of the layers.

## Memory

Activations at 50% kept. In PyTorch a layer keeps the parts of the delta rule's chunks in float32. The kernels keep
its inputs and compute the rest again; that count is read off their code, and the part of the RNN is tested under
Triton's interpreter.

{activation_table}

The logits in float32 are in it (128 KB a token at 32,000 tokens), which is most of the 0.1B checkpointed.

Tokens that fit beside the weights, with the kernels, into 90% of the memory:

{memory_table}

## Communication

Sent by each GPU, in rings:

{message_table}

DDP sums every gradient. FSDP2 gathers every layer twice, and scatters gradients. Tensor parallelism sends for every
token of a row: `q`, `k`, `v` and the output gate are gathered, because the convolution, the RNN's parameters and the
kept sets belong to whole heads.

## Time, and where it stops

A step of 0.5M tokens (0.1B, 0.8B) or 4M (7B, checkpointed, as a row would not fit). Beside the seconds of messages
stands the share of time spent computing, if they overlap:

{time_table}

{limit_table}

- **Rows.** A GPU computes at least one row, so a batch of 0.5M tokens in rows of 16k tokens ends at 32 GPUs. There
  is no parallelism along a row (context parallelism): the RNN's state would have to travel from GPU to GPU.
- **Messages.** The fewest tokens a GPU needs in a step, at many machines, and the GPUs that the batch feeds at that.
  Past it the time of a step stays and only the bill grows. By bytes HSDP needs the most, because gradients are summed
  within a machine and again between machines; what speaks for it is latency, as no layer waits for weights of another
  machine. In all three the batch runs out of rows first. Accumulated gradients count, as DDP and FSDP2 reduce once a
  step (FSDP2 gathers in every part of it, though).
- **Tensor parallelism** divides projections, MLP, embedding and head, and each rank repeats RNN and attention. It
  saves memory and some time within a machine, and is no way to scale further. Its ranks see the same rows.
- **Pipelines** are declared in the plan of Transformers and not tested.
"""


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description="Writes what training a HAM costs, by arithmetic.")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    write_whole(parser.parse_args().output, page(Hardware()))


if __name__ == "__main__":
    main()
