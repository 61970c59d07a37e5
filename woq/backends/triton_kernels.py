"""The Triton kernels: decode, prefill, dequantization, and what they share. triton_layout.py says what they read.

The weight is the left operand, y^T = W x^T, so that few tokens are few columns and not padding to 16 rows. Codes minus
zero points are exact in 16 bits; sums are float32 and meet the scale once a group: the products never round a weight.
`PACKED` (NVIDIA) turns a pair of words into a pair of floats in two to four instructions of inline PTX; the other way
is plain Triton and runs anywhere, the interpreter included. `EARLY` is programmatic dependent launch: the kernel starts
while its predecessor ends, fetches weights into L2, and waits before it reads x or writes.

WA, WB, WC are the widths of a weight's planes, 0 where it has fewer; GROUP is the group size, 0 for one group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_constexpr_function: Callable[[Any], Any] = getattr(triton, "constexpr_function", lambda f: f)
CAN_PACK = hasattr(triton, "constexpr_function")
CAN_START_EARLY = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")


@_constexpr_function
def _ptx(run: int, wa: int, wb: int, wc: int, half: bool) -> str:
    """PTX: $1, $2, $3, pairs of words of the three planes, and $4, a pair of `_offset`s -> $0, a pair of floats.

    A code is put under an exponent that makes its last bit worth 1: 1024 + code in float16, 128 + code in bfloat16,
    whose 7 bits of mantissa an 8-bit code exceeds; that one is put together from halves, exactly.
    """
    both = 0x10001
    text = f"{{ .reg .b32 t, u, m, d; mov.b32 m, {(0x6400 if half else 0x4300) * both}; "
    below = 0
    for i, width in enumerate(w for w in (wa, wb, wc) if w):
        at, mask = run * width % 16, ((1 << width) - 1) * both
        if below + width > 7 and not half:
            text += f"mov.b32 m, {0x4500 * both}; shr.u32 u, $2, {at}; lop3.b32 u, u, {mask}, m, 0xEA; "
            text += (
                f"mov.b32 m, {0x3F80 * both}; mov.b32 d, {0xC508 * both}; "  # 1; -2176; u is 2048 + 16 high
            )
            text += "fma.rn.bf16x2 u, u, m, d; fma.rn.bf16x2 t, t, m, u; "  # 16 high - 128; code
        else:
            move = at - below
            text += f"shr.u32 u, ${i + 1}, {move}; " if move >= 0 else f"shl.b32 u, ${i + 1}, {-move}; "
            text += f"lop3.b32 t, u, {mask << below}, {'t' if i else 'm'}, 0xEA; "
        below += width
    if half:
        return text + "add.f16x2 $0, t, $4; }"
    return text + f"mov.b32 m, {0x3F80 * both}; fma.rn.bf16x2 $0, t, m, $4; }}"


@triton.jit  # type: ignore[untyped-decorator]
def _offset(zero, DTYPE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `_weights` adds to a raw code: minus the zero point, minus what the float holds besides the code."""
    zero = zero.to(tl.float32)
    if PACKED:
        if tl.float16 == DTYPE:
            zero += 1024.0
        elif not WIDE:
            zero += 128.0
    return (-zero).to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    a,
    b,
    c,
    offset,
    RUN: tl.constexpr,
    WA: tl.constexpr,
    WB: tl.constexpr,
    WC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Run number RUN of a block as floats of `offset`'s dtype, code minus zero; a, b, c: words of the three planes."""
    if PACKED:
        text: tl.constexpr = _ptx(RUN, WA, WB, WC, offset.dtype == tl.float16)
        return tl.inline_asm_elementwise(text, "=&r,r,r,r,r", [a, b, c, offset], offset.dtype, True, 2)
    else:
        code = (a >> (RUN * WA % 16)) & ((1 << WA) - 1)
        if WB > 0:
            code |= ((b >> (RUN * WB % 16)) & ((1 << WB) - 1)) << WA
        if WC > 0:
            code |= ((c >> (RUN * WC % 16)) & ((1 << WC) - 1)) << (WA + WB)
        return (code.to(tl.float32) + offset.to(tl.float32)).to(offset.dtype)  # exact


@triton.jit  # type: ignore[untyped-decorator]
def _fetch(words, first, rows, stride, size, TILES: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fetch the first `size` bytes of TILES of the `rows` rows of tiles into L2: no kernel before writes weights."""
    if EARLY:
        for tile in tl.static_range(TILES):
            row = tl.minimum(first + tile, rows - 1).to(tl.int64)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b32 $0, 0; "
                "@p cp.async.bulk.prefetch.L2.global [$1], $2; }",
                "=&r,l,r",
                [words + row * stride, size],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit  # type: ignore[untyped-decorator]
def _wait(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernel before has ended and its results can be read."""
    if EARLY:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _release(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may start, once every program has come here or ended."""
    if EARLY:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _load(at, mask, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _group(block, j: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group of run number j of a block."""
    if GROUP == 0:
        return block * 0
    elif GROUP < BLOCK:
        return block * (BLOCK // GROUP) + j * 32 // GROUP
    else:
        return block // (GROUP // BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    scales, zeros, group, n, in_n, groups, n_size, SYM: tl.constexpr, EVEN: tl.constexpr
):
    """Scales and zero points of outputs n in a group, or in a column of groups; as they are stored."""
    at = tl.minimum(group, groups - 1) * n_size + n  # past the end, where x is 0: any group
    scale = _load(scales + at, in_n, EVEN)
    zero = scale if SYM else _load(zeros + at, in_n, EVEN)
    return scale, zero


@triton.jit  # type: ignore[untyped-decorator]
def _add_block(  # type: ignore[no-untyped-def]  # noqa: PLR0913, C901
    total, x_at, w_at, scales, zeros, scale, zero, block, n, in_m, in_n, in_w, k, k_size, groups, n_size,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    SYM: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """total [.., N, M] plus one block of K. x_at [.., 32, M] and w_at [.., N, 32] point to the block's first run.

    scale, zero [.., N]: the block's, where it has one of each; else they are loaded here.
    """
    DTYPE: tl.constexpr = x_at.dtype.element_ty
    RUNS: tl.constexpr = BLOCK // 32
    PER_SCALE: tl.constexpr = GROUP // 32 if (GROUP > 0 and GROUP < BLOCK) else RUNS
    TILES: tl.constexpr = RUNS * WA // 16  # of the first plane
    EACH: tl.constexpr = 16 // WA  # runs in a tile of the first plane
    for t in tl.static_range(TILES):
        a = _load(w_at + t * 512, in_w, EVEN)
        if WB == 0:
            b = a
        elif t * WB % WA == 0:
            b = _load(w_at + (TILES + t * WB // WA) * 512, in_w, EVEN)
        if WC == 0:
            c = a
        elif t * WC % WA == 0:
            c = _load(w_at + (TILES + RUNS * WB // 16 + t * WC // WA) * 512, in_w, EVEN)
        for i in tl.static_range(EACH):
            if (t * EACH + i) % PER_SCALE == 0:
                acc = tl.zeros_like(total)
                if PER_SCALE < RUNS:
                    g = _group(block, t * EACH + i, BLOCK, GROUP)
                    scale, zero = _scale(scales, zeros, g, n, in_n, groups, n_size, SYM, EVEN)
                if SYM:
                    zero = tl.full(scale.shape, 1 << (WA + WB + WC - 1), tl.int32)
                offset = tl.expand_dims(_offset(zero, DTYPE, WA + WB + WC == 8, PACKED), -1)
            in_x = in_m
            if not EVEN:
                in_x = in_m & (k + (t * EACH + i) * 32 < k_size)
            right = tl.load(x_at + (t * EACH + i) * 32, mask=in_x, other=0.0)
            left = _weights(a, b, c, tl.broadcast_to(offset, a.shape), t * EACH + i, WA, WB, WC, PACKED)
            acc = tl.dot(left, right, acc)
            if (t * EACH + i) % PER_SCALE == PER_SCALE - 1:
                total += acc * tl.expand_dims(scale.to(tl.float32), -1)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _decode_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x, words, scales, zeros, out, m_size, n_size, k_size, blocks, groups, fetch,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    SYM: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y for BLOCK_M tokens and BLOCK_N outputs; the blocks of K go round PARTS groups of warps, whose sums meet at the end.

    EVEN: outputs and blocks of K divide, so that nothing but tokens is masked.
    """
    SIZE: tl.constexpr = (WA + WB + WC) * BLOCK // 16  # words of 16 bits that a block has for one output
    first = tl.program_id(0) // tl.cdiv(m_size, BLOCK_M) * BLOCK_N
    stride = blocks * (SIZE * 16)
    _fetch(words, first // 16, tl.cdiv(n_size, 16), stride, fetch, BLOCK_N // 16, EARLY)
    m = (tl.program_id(0) % tl.cdiv(m_size, BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    part = tl.arange(0, PARTS)
    run = tl.arange(0, 32)
    in_n = (n < n_size)[None, :]
    w_at = (
        words
        + (n // 16).to(tl.int64)[None, :, None] * stride
        + (n % 16)[None, :, None] * 32
        + run[None, None, :]
    )
    x_at = x + m.to(tl.int64)[None, None, :] * k_size + run[None, :, None]
    total = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    group = _group(part, 0, BLOCK, GROUP)[:, None]
    scale, zero = _scale(scales, zeros, group, n[None, :], in_n, groups, n_size, SYM, EVEN)
    _wait(EARLY)
    for step in tl.range(0, tl.cdiv(blocks, PARTS), num_stages=STAGES):
        block = step * PARTS + part
        # The next step's scales: too small for asynchronous copies, they would stall the loop.
        group = _group(block + PARTS, 0, BLOCK, GROUP)[:, None]
        next_scale, next_zero = _scale(scales, zeros, group, n[None, :], in_n, groups, n_size, SYM, EVEN)
        k = block[:, None, None] * BLOCK
        total = _add_block(
            total, x_at + k, w_at + block[:, None, None] * (SIZE * 16), scales, zeros, scale, zero,
            block[:, None], n[None, :], (m < m_size)[None, None, :], in_n,
            (n < n_size)[None, :, None] & (block < blocks)[:, None, None], k + run[None, :, None], k_size, groups, n_size,
            WA, WB, WC, BLOCK, GROUP, SYM, EVEN, PACKED,
        )  # fmt: skip
        scale, zero = next_scale, next_zero
    _release(EARLY)
    y = tl.sum(total, 0)
    at = out + m.to(tl.int64)[None, :] * n_size + n[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(m < m_size)[None, :] & (n < n_size)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _prefill_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x, words, scales, zeros, out, m_size, n_size, k_size, blocks, groups,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    SYM: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for a large tile: all warps share a block of K; PARTS > 1 programs leave float32 parts [PARTS, M, N]."""
    SIZE: tl.constexpr = (WA + WB + WC) * BLOCK // 16
    first = tl.program_id(0) // tl.cdiv(m_size, BLOCK_M) * BLOCK_N
    part = tl.program_id(1)
    stride = blocks * (SIZE * 16)
    m = (tl.program_id(0) % tl.cdiv(m_size, BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    run = tl.arange(0, 32)
    in_n = n < n_size
    w_at = words + (n // 16).to(tl.int64)[:, None] * stride + (n % 16)[:, None] * 32 + run[None, :]
    x_at = x + m.to(tl.int64)[None, :] * k_size + run[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    scale, zero = _scale(scales, zeros, _group(part, 0, BLOCK, GROUP), n, in_n, groups, n_size, SYM, EVEN)
    for block in tl.range(part, blocks, PARTS, num_stages=STAGES):
        group = _group(block + PARTS, 0, BLOCK, GROUP)
        next_scale, next_zero = _scale(scales, zeros, group, n, in_n, groups, n_size, SYM, EVEN)
        k = block * BLOCK
        total = _add_block(
            total, x_at + k, w_at + block * (SIZE * 16), scales, zeros, scale, zero,
            block, n, (m < m_size)[None, :], in_n, in_n[:, None], k + run[:, None], k_size, groups, n_size,
            WA, WB, WC, BLOCK, GROUP, SYM, EVEN, PACKED,
        )  # fmt: skip
        scale, zero = next_scale, next_zero
    at = out + (part * m_size + m).to(tl.int64)[None, :] * n_size + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < m_size)[None, :] & in_n[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = sum over p of parts[p, i], in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + i, mask=i < size, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(x, order, out, k_size, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[m, k] = x[m, order[k]]."""
    _wait(EARLY)
    _release(EARLY)
    row = tl.program_id(0).to(tl.int64) * k_size
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(order + k, mask=k < k_size, other=0)
    tl.store(out + row + k, tl.load(x + row + column, mask=k < k_size, other=0.0), mask=k < k_size)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    words, scales, zeros, out, n_size, row_length, k_size, blocks, group_size,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, BLOCK: tl.constexpr, BY_RUN: tl.constexpr,
    SYM: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[n, k] = (code - zero) * scale, rounded once. scales [G, row_length]; BY_RUN: a run of 32 inputs has one."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    RUNS: tl.constexpr = BLOCK // 32
    TILES: tl.constexpr = RUNS * WA // 16
    EACH: tl.constexpr = 16 // WA
    SIZE: tl.constexpr = (WA + WB + WC) * BLOCK // 16
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    run = tl.arange(0, 32)
    in_n = (n < n_size)[:, None]
    tile = (n // 16).to(tl.int64)[:, None] * blocks + block
    w_at = words + tile * (SIZE * 16) + (n % 16)[:, None] * 32 + run[None, :]
    for t in tl.static_range(TILES):
        a = tl.load(w_at + t * 512, mask=in_n, other=0)
        if WB == 0:
            b = a
        elif t * WB % WA == 0:
            b = tl.load(w_at + (TILES + t * WB // WA) * 512, mask=in_n, other=0)
        if WC == 0:
            c = a
        elif t * WC % WA == 0:
            c = tl.load(w_at + (TILES + RUNS * WB // 16 + t * WC // WA) * 512, mask=in_n, other=0)
        for i in tl.static_range(EACH):
            k = block * BLOCK + (t * EACH + i) * 32 + run[None, :]
            inside = in_n & (k < k_size)
            if BY_RUN:
                first = tl.minimum(block * BLOCK + (t * EACH + i) * 32, k_size - 1)
                place = (first // group_size) * row_length + n[:, None]
                in_scale = in_n
            else:
                place = (k // group_size) * row_length + n[:, None]
                in_scale = inside
            scale = tl.load(scales + place, mask=in_scale, other=0.0).to(tl.float32)
            if SYM:
                zero = tl.full(scale.shape, 1 << (WA + WB + WC - 1), tl.int32)
            else:
                zero = tl.load(zeros + place, mask=in_scale, other=0)
            offset = tl.broadcast_to(_offset(zero, DTYPE, WA + WB + WC == 8, PACKED), a.shape)
            code = _weights(a, b, c, offset, t * EACH + i, WA, WB, WC, PACKED).to(tl.float32)
            tl.store(out + n.to(tl.int64)[:, None] * k_size + k, (code * scale).to(DTYPE), mask=inside)
