# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Cases for compiling every kernel ahead of time at its shipped tile shapes.

`CASES` lists those of each op; `HOPPER_CASES` has the tile shapes that only sm_90 runs.
"""

from collections.abc import Iterable
from typing import Any

import triton

from ham_kernels import compact
from ham_kernels.decode_mix_append import APPEND_FIELDS, SLAB_BLOCK, decode_mix_append_fwd_kernel
from ham_kernels.decode_update import block_sizes, decode_update_fwd_kernel
from ham_kernels.gated_delta_rule import backward, output, state, wy
from ham_kernels.gated_delta_rule.chunks import MAX_HEAD_DIM, tile_width
from ham_kernels.ragged_decode_attention import (
    PLAN_BLOCK,
    SLAB_FIELDS,
    page_list_fwd_kernel,
    ragged_decode_attention_fwd_kernel,
    ragged_decode_merge_fwd_kernel,
    split_plan_fwd_kernel,
    tile_shape,
)
from ham_kernels.sparse_prefix_attention import backward as sparse_backward
from ham_kernels.sparse_prefix_attention.forward import sparse_prefix_attention_fwd_kernel
from ham_kernels.sparse_prefix_attention.tiles import HOPPER_TILES, TILES

Case = dict[str, Any]


def make_case(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int = 3
) -> Case:
    """One case of a kernel, as `aot_compile.py` takes it.

    `types` and `constants` may name arguments that the kernel lacks; one that neither names is a bfloat16 tensor.
    """
    names = kernel.arg_names
    return {
        "kernel": kernel,
        "signature": {name: types.get(name, "*bf16") for name in names if name not in constants},
        "constexprs": {name: constants[name] for name in names if name in constants},
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def typed(**names: str) -> dict[str, str]:
    """The type of each argument, from the arguments of each type: `typed(i32="T NT")`; `p_i32` is a tensor of it."""
    return {name: kind.replace("p_", "*") for kind, arguments in names.items() for name in arguments.split()}


# --- compact_kept ----------------------------------------------------------------------------------------------------

COMPACT_TYPES = typed(
    p_u8="keep", p_i32="counts total", p_i64="before", i32="T M stride_b stride_t stride_h"
)  # fmt: skip


def compact_cases() -> Iterable[Case]:
    block_t, block_h = compact._tile(16)
    for kernel in (compact.compact_kept_scan_kernel, compact.compact_kept_count_kernel):
        yield make_case(kernel, COMPACT_TYPES, {"HK": 16, "BLOCK_T": block_t, "BLOCK_H": block_h}, compact.NUM_WARPS)
    for dim in (64, 128):
        block_t, block_d = compact._tile(dim)
        constants = {"HK": 16, "D": dim, "BLOCK_T": block_t, "BLOCK_D": block_d}
        for kernel in (compact.compact_kept_fwd_kernel, compact.compact_kept_bwd_kernel):
            yield make_case(kernel, COMPACT_TYPES, constants, compact.NUM_WARPS)


# --- gated_delta_rule_with_prediction: one query head to each key/value head, rows that are one sequence -------------

DELTA_TYPES = typed(
    p_fp32="g beta gc diagonal dg dg_parts dbeta prediction moments scores initial_state final_state dfinal_state "
    "dinitial_state",
    i32="T NT tokens bucket count",
    fp32="scale",
)


def delta_case(kernel: Any, dim: int, warps: int, stages: int, scored: bool = True, **constants: Any) -> Case:
    """One case at a head dimension; `scored` tells whether scores or predictions are returned."""
    fixed: dict[str, Any] = {
        "HK": 16,
        "GROUP": 1,
        "K": dim,
        "V": dim,
        "BT": 64,
        "BK": tile_width(dim, 64),
        "BV": tile_width(dim, 64),
        "PARTS": triton.cdiv(dim, 64),
        "PACKED": False,
        "PRECISION": "tf32",
        "borders": None,
        "sequences": None,
        "prediction" if scored else "moments": None,
    }
    return make_case(kernel, DELTA_TYPES, fixed | constants, warps, stages)


def delta_cases() -> Iterable[Case]:
    columns, step_columns = output.CHUNK_COLUMNS, output.STEP_COLUMNS
    for dim in (128, 64, 32, 16):
        whole = tile_width(dim, MAX_HEAD_DIM)
        read: dict[str, Any] = {"BK": output.read_tile_width(dim), "BV": 32, "WIDTH": columns}
        yield delta_case(output.output_fwd_kernel, dim, 4, 2, **read)
        yield delta_case(output.output_fwd_kernel, dim, 4, 2, **read, GROUP=4)
        yield delta_case(output.output_fwd_kernel, dim, 4, 2, **read, scored=False)
        yield delta_case(output.output_fwd_kernel, dim, 4, 2, **read, moments=None)
        parts = triton.cdiv(dim, columns)
        yield delta_case(output.score_fwd_kernel, dim, 4, 3, PARTS=parts, SCORE="cosine", BLOCK=256)
        yield delta_case(wy.wy_inverse_fwd_kernel, dim, 4, 2)
        yield delta_case(wy.wy_apply_fwd_kernel, dim, 4, 2)
        yield delta_case(state.state_fwd_kernel, dim, 4, 2, BK=whole, BV=32)
        step: dict[str, Any] = {"BK": whole, "BV": 32, "WIDTH": step_columns}
        yield delta_case(output.step_fwd_kernel, dim, 4, 1, **step)
        yield delta_case(output.step_fwd_kernel, dim, 4, 1, **step, scored=False)
        yield delta_case(output.step_fwd_kernel, dim, 4, 1, **step, moments=None)
        for group in (1, 4):
            yield delta_case(backward.local_bwd_kernel, dim, 4, 2, BK=whole, GROUP=group)
        for group in (1, 4):
            yield delta_case(backward.key_bwd_kernel, dim, 4, 2, BV=32, GROUP=group)
        for group in (1, 4):
            yield delta_case(backward.state_bwd_kernel, dim, 4, 2, BK=whole, BV=32, GROUP=group)
        for group in (1, 4):
            yield delta_case(backward.query_bwd_kernel, dim, 4, 2, BV=32, GROUP=group)
        yield delta_case(backward.wy_bwd_kernel, dim, 4, 2, BV=32)


# --- sparse_prefix_attention -----------------------------------------------------------------------------------------

SPARSE_TYPES = typed(
    p_i64="begin end until window_start",
    p_i32="seen shown_until",
    p_fp32="lse lse_rest self_weight delta self_slope dlse",
    fp32="scale log2_scale",
    i32="L T M T_BUCKET M_BUCKET",
)
SPARSE_FLOATS = "q k v k_kept v_kept keys values o do dq dk dv dkeys dvalues"
SPARSE_KERNELS = {
    "fwd": sparse_prefix_attention_fwd_kernel,
    "dq": sparse_backward.sparse_prefix_attention_bwd_dq_kernel,
    "dkv": sparse_backward.sparse_prefix_attention_bwd_dkv_kernel,
}


def sparse_case(
    kernel: Any,
    dim: int,
    group: int,
    warps: int,
    stages: int,
    blocks: dict[str, int],
    given: str = "",
    dtype: str = "bf16",
) -> Case:
    """One case at a head dimension; of the arguments that may be absent, only those `given` are there."""
    constants: dict[str, Any] = {"HK": 16, "GROUP": group, "K": dim, "V": dim, "BLOCK_K": dim, "BLOCK_V": dim}
    constants |= blocks | {"STRIDE": 16 if "window_start" in given else 1}
    constants |= dict.fromkeys({"until", "dlse", "window_start", "shown_until", "L"} - set(given.split()))
    types = SPARSE_TYPES | dict.fromkeys(SPARSE_FLOATS.split(), f"*{dtype}")
    return make_case(kernel, types, constants, warps, stages)


def sparse_tile_cases(tiles: dict[str, dict[tuple[int, int], list[tuple[int, int, int, int]]]]) -> Iterable[Case]:
    """Every tile shape at head dimensions 64 and 128, with and without a window.

    The first of each kernel also with groups and masks of columns.
    """
    for dim in (128, 64):
        for name, kernel in SPARSE_KERNELS.items():
            for window, masked in (("", "until"), ("window_start L", "until window_start shown_until L")):
                shapes = tiles[f"{name}_window" if window and name != "dkv" else name].get((2, dim), [])
                for i, (block_m, block_n, warps, stages) in enumerate(shapes):
                    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
                    yield sparse_case(kernel, dim, 1, warps, stages, blocks, window)
                    if i == 0:
                        yield sparse_case(kernel, dim, 4, warps, stages, blocks, masked)


def sparse_cases() -> Iterable[Case]:
    yield from sparse_tile_cases(TILES)
    for name in ("fwd_window", "dq_window", "dkv"):
        block_m, block_n, warps, stages = TILES[name][4, 128][0]
        kernel, blocks = SPARSE_KERNELS[name.removesuffix("_window")], {"BLOCK_M": block_m, "BLOCK_N": block_n}
        yield sparse_case(kernel, 64, 1, warps, stages, blocks, "window_start L", "fp32")
    kernel = sparse_backward.sparse_prefix_attention_bwd_self_kernel
    for dim in (64, 128):
        blocks = {"BLOCK_T": sparse_backward.SELF_ELEMENTS // dim}
        for given in ("dlse", "dlse L"):
            yield sparse_case(kernel, dim, 4, sparse_backward.SELF_WARPS, 3, blocks, given)
    blocks = {"BLOCK_N": sparse_backward.SEEN_COLUMNS}
    yield sparse_case(sparse_backward.sparse_prefix_attention_bwd_seen_kernel, 128, 1, 4, 3, blocks, "until")


# --- ragged_decode_attention -----------------------------------------------------------------------------------------

RAGGED_TYPES = typed(
    p_i64="counts fill recent_fill page_list slabs",
    p_i32="page_start split_start split_stream",
    p_fp32="near_lse peak total partial",
    p_u8="keep",
    i32="num_streams num_pages num_splits split_pages rows recent_slots key_bytes value_bytes",
    fp32="scale",
)


# Arguments that are `None` without recent tokens.
RECENT_ARGUMENTS = ("recent_k", "recent_v", "recent_fill", "recent_slots")


def ragged_case(key_dim: int, rows: int, dtype: str = "bf16") -> Case:
    """The shipped tile of a head dimension and a number of rows."""
    tile = tile_shape(rows, 16, key_dim, 2 if dtype == "bf16" else 4)
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    sizes = {"K": key_dim, "V": key_dim, "BLOCK_K": key_dim, "BLOCK_V": key_dim, "PAGE": 16, "ALIGNMENT": 16}
    types = RAGGED_TYPES | {"q": f"*{dtype}"}
    return make_case(ragged_decode_attention_fwd_kernel, types, sizes | tile, num_warps, num_stages)


def merge_case(key_dim: int, block_t: int, near: bool = False, absent: tuple[str, ...] = RECENT_ARGUMENTS) -> Case:
    """The merge of a row's splits, with the near tokens' softmax given or still to be computed."""
    sizes: dict[str, Any] = {"K": key_dim, "V": key_dim, "BLOCK_K": key_dim, "BLOCK_V": key_dim}
    sizes |= {"G": 4, "PAGE": 16, "BLOCK_P": 16, "BLOCK_T": block_t, "BLOCK_S": 16}
    sizes |= dict.fromkeys(absent) | ({} if near else {"near": None, "near_lse": None})
    return make_case(ragged_decode_merge_fwd_kernel, RAGGED_TYPES, sizes, 4)


def plan_case(absent: tuple[str, ...]) -> Case:
    """The plan of the splits."""
    sizes = {"K": 128, "V": 128, "PAGE": 16, "BLOCK": PLAN_BLOCK} | dict.fromkeys(absent)
    return make_case(split_plan_fwd_kernel, RAGGED_TYPES, sizes, 4)


def ragged_cases() -> Iterable[Case]:
    for key_dim in (128, 64):
        yield from (ragged_case(key_dim, rows) for rows in (16, 32, 64, 128))
    yield from (ragged_case(256, rows) for rows in (16, 32, 64))
    yield from (ragged_case(key_dim, 32, "fp32") for key_dim in (128, 64, 256))
    for key_dim in (128, 64, 256):
        yield from (merge_case(key_dim, *kind) for kind in ((1, False), (16, False), (16, True)))
        yield merge_case(key_dim, 1, absent=())
    yield plan_case((*RECENT_ARGUMENTS, "page_list", "num_pages"))
    yield plan_case(())
    for recent in (0, 1):
        constants = {"FIELDS": SLAB_FIELDS, "RECENT": recent, "BLOCK": 256}
        yield make_case(page_list_fwd_kernel, RAGGED_TYPES, constants, 4)


# --- decode_update and decode_mix_append: one row of 16 query heads --------------------------------------------------

UPDATE_TYPES = typed(
    p_i64="positions",
    p_fp32="A_log dt_bias state given error_weight threshold scores",
    p_i1="keep real",
    i32="stride_rope stride_threshold_row stride_threshold_head",
    fp32="eps",
)
MIX_TYPES = typed(
    p_fp32="scores tail_scores window_scores",
    p_i64="positions real_tokens counts full_pages slabs",
    p_i32="tail_positions",
    p_i1="real keep window_keep",
    i32="num_slabs num_slots",
    fp32="eps",
)
# Arguments that are `None` in a layer without attention.
ATTENTION_ARGUMENTS = ("q_weight", "k_weight", "cos", "sin", "threshold", "q_out", "k_out", "v_out", "scores", "keep")
APPEND_ARGUMENTS = (
    *("o_kv", "rnn_gate", "kv_gate", "kv_weight", "k", "v", "scores", "keep"),
    *("counts", "full_pages", "slabs", "tail_k", "tail_v", "tail_scores", "tail_positions"),
)
UNLEARNED = ("given", "error_weight")
WINDOW_ARGUMENTS = ("window_k", "window_v", "window_scores", "window_keep", "num_slots")


def update_case(
    key_dim: int, groups: int, score: str | None = "cosine", absent: tuple[str, ...] = UNLEARNED, sinks: int = 0
) -> Case:
    """The shipped blocks of a head dimension."""
    constants: dict[str, Any] = {"HK": 16 // groups, "G": groups, "K": key_dim, "V": key_dim, "W": 4, "SCORE": score}
    constants |= dict.fromkeys(("SCALE_VALUES", "ALLOW_NEG_EIGVAL"), not absent)
    constants |= dict.fromkeys(("QK_NORM", "ROPE", "ATTENTION_CONV"), True) | {"SINKS": sinks}
    constants |= block_sizes(groups, key_dim, key_dim) | dict.fromkeys(absent)
    constants |= {} if sinks else {"positions": None}
    return make_case(decode_update_fwd_kernel, UPDATE_TYPES, constants, 8)


def mix_case(key_dim: int, groups: int, absent: tuple[str, ...] = WINDOW_ARGUMENTS, sinks: int = 0) -> Case:
    """The shipped blocks of a head dimension, at 16 tokens a page."""
    constants: dict[str, Any] = {"HK": 16 // groups, "G": groups, "K": key_dim, "V": key_dim}
    constants |= {"PAGE": 16, "FIELDS": APPEND_FIELDS, "BLOCK_S": SLAB_BLOCK, "SILU": True, "SINKS": sinks}
    constants |= block_sizes(groups, key_dim, key_dim) | dict.fromkeys(absent)
    return make_case(decode_mix_append_fwd_kernel, MIX_TYPES, constants, 4)


DECODE_SIZES = ((128, 1), (64, 1), (128, 4), (256, 1))


def update_cases() -> Iterable[Case]:
    yield from (update_case(*sizes) for sizes in DECODE_SIZES)
    yield update_case(128, 1, score="learned_error", absent=())
    yield update_case(128, 1, score=None, absent=(*ATTENTION_ARGUMENTS, *UNLEARNED))
    yield update_case(128, 1, sinks=4)


def mix_cases() -> Iterable[Case]:
    yield from (mix_case(*sizes) for sizes in DECODE_SIZES)
    yield mix_case(128, 1, absent=(*APPEND_ARGUMENTS, *WINDOW_ARGUMENTS))
    yield from (mix_case(*sizes, absent=(), sinks=4) for sizes in DECODE_SIZES)


CASES: dict[str, list[Case]] = {
    "compact_kept": list(compact_cases()),
    "decode_mix_append": list(mix_cases()),
    "decode_update": list(update_cases()),
    "gated_delta_rule": list(delta_cases()),
    "ragged_decode_attention": list(ragged_cases()),
    "sparse_prefix_attention": list(sparse_cases()),
}
HOPPER_CASES: dict[str, list[Case]] = {"sparse_prefix_attention": list(sparse_tile_cases(HOPPER_TILES))}
