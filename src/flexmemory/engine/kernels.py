"""The kernels of a decode step for few sequences; `engine/narrow.py` launches them.

At such batches a step is bound by the bytes of the weights, so memory must never idle. A program takes whole rows of a
matrix in one tile, which it asks for before it waits for the kernel before it (programmatic dependent launch). Products
are summed in fp32. Three launches a memory layer, five a dense or flex layer.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait until all that the kernels before this one wrote is there."""
    if PDL:
        gdc_wait()


@triton.jit
def _tile(weight_ptr, rows, row_mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = row_mask[:, None]
    if WIDTH != BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    pointers = weight_ptr + rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _vector(pointer, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _dot(tile, vector):
    return tl.sum(tile.to(tl.float32) * vector[None, :], axis=1)


@triton.jit
def _inverse_rms(x, eps, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)


@triton.jit
def query_and_cache_kernel(
    x_ptr, gain_ptr, eps, weight_ptr, scale_ptr, rotary_ptr, lengths_ptr, query_ptr, keys_ptr, values_ptr,
    rotary_stride, slot_stride, head_stride,
    BATCH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, PAIRS: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes some pairs of one head's outputs: `plain.query_and_cache`."""
    _begin(PDL)
    head = tl.program_id(0)
    near = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)  # of a head's first half; they turn with those of its second
    far = near + E // 2
    every = near >= 0
    first = _tile(weight_ptr, head * E + near, every, D, BLOCK)
    second = _tile(weight_ptr, head * E + far, every, D, BLOCK)
    gain = _vector(gain_ptr, D, BLOCK)
    _wait(PDL)
    for b in tl.static_range(BATCH):
        x = _vector(x_ptr + b * D, D, BLOCK)
        position = tl.load(lengths_ptr + b)
        inverse = _inverse_rms(x, eps, D)
        a = _dot(first, x * gain) * inverse
        c = _dot(second, x * gain) * inverse
        if INT8:
            a *= tl.load(scale_ptr + head * E + near)
            c *= tl.load(scale_ptr + head * E + far)
        if head < H + G:
            cosine = tl.load(rotary_ptr + position * E + near)
            sine = tl.load(rotary_ptr + rotary_stride + position * E + near)
            turned = a * cosine - c * sine
            c = c * cosine + a * sine
            a = turned
        cached = b * slot_stride.to(tl.int64) + position * E
        if head < H:
            target = query_ptr + (b * H + head) * E
        elif head < H + G:
            target = keys_ptr + cached + (head - H) * head_stride
        else:
            target = values_ptr + cached + (head - H - G) * head_stride
        tl.store(target + near, a.to(query_ptr.dtype.element_ty))
        tl.store(target + far, c.to(query_ptr.dtype.element_ty))


@triton.jit
def attend_kernel(
    query_ptr, keys_ptr, values_ptr, lengths_ptr, parts_ptr, arrived_ptr, out_ptr, scale, slot_stride, head_stride,
   
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes a share of one head's cached tokens, and the last puts them together."""
    _begin(PDL)
    head = tl.program_id(0)  # of all sequences: b * H + h
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_E)
    inside = columns < E
    # Lengths, and all that is cached but the newest token, are older than this step: no need to wait for them.
    length = tl.load(lengths_ptr + head // H)
    cached = (head // H).to(tl.int64) * slot_stride + (head % H // (H // G)) * head_stride
    share = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    stop = tl.minimum(split * share + share, length)
    tokens = split * share + tl.arange(0, TOKENS)
    keys_ptr += cached + columns[None, :]
    values_ptr += cached + columns[None, :]
    mask = (tokens < stop)[:, None] & inside[None, :]
    key = tl.load(keys_ptr + tokens[:, None] * E, mask=mask, other=0.0)
    value = tl.load(values_ptr + tokens[:, None] * E, mask=mask, other=0.0)
    _wait(PDL)
    query = tl.load(query_ptr + head * E + columns, mask=inside, other=0.0).to(tl.float32)
    query *= scale * 1.4426950408889634  # powers of two below
    highest = float("-inf")
    total = 0.0
    summed = tl.zeros((BLOCK_E,), tl.float32)
    if split == 0:
        newest = tl.load(keys_ptr + length * E, mask=inside[None, :], other=0.0).to(tl.float32)
        highest = tl.sum(tl.sum(newest * query[None, :], axis=0), axis=0)
        total = 1.0
        summed = tl.sum(tl.load(values_ptr + length * E, mask=inside[None, :], other=0.0).to(tl.float32), axis=0)
    at = split * share
    while at < stop:
        scores = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
        scores = tl.where(tokens < stop, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(weights, axis=0)
        summed = summed * fading + tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
        highest = higher
        at += TOKENS
        tokens += TOKENS
        mask = (tokens < stop)[:, None] & inside[None, :]
        key = tl.load(keys_ptr + tokens[:, None] * E, mask=mask, other=0.0)
        value = tl.load(values_ptr + tokens[:, None] * E, mask=mask, other=0.0)
    if SPLITS == 1:
        tl.store(out_ptr + head * E + columns, (summed / total).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        WIDTH: tl.constexpr = BLOCK_E + 2
        part = parts_ptr + (head * SPLITS + split) * WIDTH
        tl.store(part + columns, summed)
        tl.store(part + BLOCK_E, highest)
        tl.store(part + BLOCK_E + 1, total)
        tl.debug_barrier()  # all of this program's parts are written before it says that it arrived
        arrived = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(arrived_ptr + head, 0)
            parts = parts_ptr + (head * SPLITS + tl.arange(0, SPLITS)) * WIDTH
            highests = tl.load(parts + BLOCK_E)
            totals = tl.load(parts + BLOCK_E + 1)
            sums = tl.load(parts[:, None] + columns[None, :])
            weights = tl.exp2(highests - tl.max(highests, axis=0))
            result = tl.sum(sums * weights[:, None], axis=0) / tl.sum(weights * totals, axis=0)
            tl.store(out_ptr + head * E + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_projection_kernel(
    x_ptr, inner_ptr, weight_ptr, scale_ptr, rows_ptr, index_ptr, row_stride, out_ptr,
   
    BATCH: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_ROW: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes some outputs: `plain.add_projection`."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < D
    tile = _tile(weight_ptr, rows, mask, K, BLOCK)
    _wait(PDL)
    for b in tl.static_range(BATCH):
        vector = _vector(inner_ptr + b * K, K, BLOCK)
        added = tl.load(x_ptr + b * D + rows, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROW:
            row = rows_ptr + tl.load(index_ptr + b).to(tl.int64) * row_stride
            added += tl.load(row + rows, mask=mask, other=0.0).to(tl.float32)
        y = _dot(tile, vector)
        if INT8:
            y *= tl.load(scale_ptr + rows, mask=mask, other=0.0)
        tl.store(out_ptr + b * D + rows, (y + added).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_kernel(
    x_ptr, gain_ptr, eps, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, out_ptr,
    BATCH: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes some cells: `plain.gated`."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < K
    gate_tile = _tile(gate_ptr, rows, mask, D, BLOCK)
    up_tile = _tile(up_ptr, rows, mask, D, BLOCK)
    gain = _vector(gain_ptr, D, BLOCK)
    _wait(PDL)
    for b in tl.static_range(BATCH):
        x = _vector(x_ptr + b * D, D, BLOCK)
        inverse = _inverse_rms(x, eps, D)
        gate = _dot(gate_tile, x * gain) * inverse
        up = _dot(up_tile, x * gain) * inverse
        if INT8:
            gate *= tl.load(gate_scale_ptr + rows, mask=mask, other=0.0)
            up *= tl.load(up_scale_ptr + rows, mask=mask, other=0.0)
        y = up * gate * tl.sigmoid(gate)
        tl.store(out_ptr + b * K + rows, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_kernel(
    x_ptr, gain_ptr, eps, weight_ptr, scale_ptr, logits_ptr, best_ptr, best_id_ptr,
    BATCH: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    GREEDY: tl.constexpr, INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes some tokens, of which it keeps the scores or only the best."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < V
    tile = _tile(weight_ptr, rows, mask, D, BLOCK)
    gain = _vector(gain_ptr, D, BLOCK)
    _wait(PDL)
    for b in tl.static_range(BATCH):
        x = _vector(x_ptr + b * D, D, BLOCK)
        y = _dot(tile, x * gain) * _inverse_rms(x, eps, D)
        if INT8:
            y *= tl.load(scale_ptr + rows, mask=mask, other=0.0)
        if GREEDY:
            best, place = tl.max(tl.where(mask, y, float("-inf")), axis=0, return_indices=True)
            tl.store(best_ptr + b * tl.num_programs(0) + tl.program_id(0), best)
            tl.store(best_id_ptr + b * tl.num_programs(0) + tl.program_id(0), tl.program_id(0) * ROWS + place)
        else:
            tl.store(logits_ptr + b * V + rows, y, mask=mask)


@triton.jit
def best_kernel(best_ptr, best_id_ptr, out_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The best of what the programs of `head_kernel` kept, for one sequence."""
    _begin(PDL)
    b = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    _wait(PDL)
    values = tl.load(best_ptr + b * COUNT + places, mask=places < COUNT, other=float("-inf"))
    _, place = tl.max(values, axis=0, return_indices=True)
    tl.store(out_ptr + b, tl.load(best_id_ptr + b * COUNT + place).to(tl.int64))
