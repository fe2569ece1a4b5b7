"""Sparse and masked matrix products on the tensor cores.

Every product is computed as weights times tokens, `[outputs, tokens]`, and stored transposed: the weights, which pass
through registers to be masked, may then stay there as the left operand, and a few tokens fill the short side of the
instruction. PRECISION holds for float32 alone: "ieee" multiplies exactly, "tf32" on the tensor cores. UPCAST serves
the interpreter, whose bfloat16 arithmetic is wrong: operands are widened before they are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x: float32 of any shape; ACTIVATION: none, relu, gelu, gelu_tanh or silu."""
    if ACTIVATION != "none" and ACTIVATION != "relu" and ACTIVATION != "gelu" and ACTIVATION != "gelu_tanh":
        tl.static_assert(ACTIVATION == "silu", "activate: no such activation")
    if ACTIVATION == "relu":
        return tl.where(x > 0, x, tl.where(x != x, x, 0.0))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z), here with z = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    return x


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b, in float32. a: `[I, J]`; b: `[J, L]`; acc: `[I, L]`."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """packed: uint8 `[ROWS, BYTES]`; returns int32 `[ROWS, 8 * BYTES]` of 0 and 1, the lowest bit of a byte first."""
    bits = (tl.expand_dims(packed.to(tl.int32), 2) >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, BYTES * 8))


@triton.jit
def swizzle(outputs, tokens, GROUP: tl.constexpr):
    """Program -> (output tile, token tile), GROUP token tiles at a time: a wave of programs then shares its reads."""
    program = tl.program_id(0)
    width = GROUP * outputs
    first = (program // width) * GROUP
    size = tl.minimum(tokens - first, GROUP)
    return (program % width) // size, first + (program % width) % size


@triton.jit
def masked_linear_kernel(
    x, w, mask, bias, out, M, OUT, RED, stride_xm, stride_xr, stride_wn, stride_mn,
    TRANSPOSED: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out: `[M, OUT]` = activation(x `[M, RED]` times the masked weights, + bias).

    w: `[N, K]`, rows stride_wn apart; mask: uint8 `[N, K]`, or with BITS `[N, ceil(K / 8)]`, rows stride_mn apart.
    OUT is N and RED is K; TRANSPOSED (the gradient of the input): OUT is K, RED is N. The weights are read whole and
    masked in registers: loads under the mask itself would fall apart into single elements.
    """
    tile_o, tile_m = swizzle(tl.cdiv(OUT, BLOCK_O), tl.cdiv(M, BLOCK_M), GROUP)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    step_x = tl.full((), BLOCK_R, tl.int64) * stride_xr  # the stride of a transposed x of many tokens is large
    from_x = x + m.to(tl.int64)[None, :] * stride_xm + r.to(tl.int64)[:, None] * stride_xr
    if TRANSPOSED:
        from_w = w + r.to(tl.int64)[:, None] * stride_wn + o[None, :]
        step_w = BLOCK_R * stride_wn
    else:
        from_w = w + o.to(tl.int64)[:, None] * stride_wn + r[None, :]
        step_w = BLOCK_R
    if BITS:
        if TRANSPOSED:
            byte = tile_o * (BLOCK_O // 8) + tl.arange(0, BLOCK_O // 8)
            from_mask = mask + r.to(tl.int64)[:, None] * stride_mn + byte[None, :]
            step_mask = BLOCK_R * stride_mn
        else:
            byte = tl.arange(0, BLOCK_R // 8)
            from_mask = mask + o.to(tl.int64)[:, None] * stride_mn + byte[None, :]
            step_mask = BLOCK_R // 8
    else:
        if TRANSPOSED:
            from_mask = mask + r.to(tl.int64)[:, None] * stride_mn + o[None, :]
            step_mask = BLOCK_R * stride_mn
        else:
            from_mask = mask + o.to(tl.int64)[:, None] * stride_mn + r[None, :]
            step_mask = BLOCK_R
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for done in range(0, RED, BLOCK_R):
        left = RED - done
        tokens = tl.load(from_x, mask=(r < left)[:, None] & (m < M)[None, :], other=0.0)
        if TRANSPOSED:
            inside = (r < left)[:, None] & (o < OUT)[None, :]
        else:
            inside = (o < OUT)[:, None] & (r < left)[None, :]
        weights = tl.load(from_w, mask=inside, other=0.0)
        if BITS:
            if TRANSPOSED:
                packed = tl.load(from_mask, mask=(r < left)[:, None] & (byte * 8 < OUT)[None, :], other=0)
                keep = unpack_bits(packed, BLOCK_R, BLOCK_O // 8)
            else:
                packed = tl.load(from_mask, mask=(o < OUT)[:, None] & (byte * 8 < left)[None, :], other=0)
                keep = unpack_bits(packed, BLOCK_O, BLOCK_R // 8)
        else:
            keep = tl.load(from_mask, mask=inside, other=0)
        weights = tl.where(keep != 0, weights, 0.0).to(x.dtype.element_ty)
        if TRANSPOSED:
            weights = tl.trans(weights)
        acc = product(weights, tokens, acc, PRECISION, UPCAST)
        from_x += step_x
        from_w += step_w
        from_mask += step_mask
    if BIAS:
        acc += tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)[:, None]
    acc = activate(acc, ACTIVATION)
    to = out + m.to(tl.int64)[None, :] * OUT + o[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(o < OUT)[:, None] & (m < M)[None, :])


@triton.jit
def masked_weight_gradient_kernel(
    dy, x, mask, out, M, N, K, stride_dm, stride_dn, stride_xm, stride_xk, stride_mn,
    BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out: `[N, K]` = the sum over M tokens of dy `[M, N]` x `[M, K]` where the mask keeps, else 0. A tile without a
    kept entry reads neither dy nor x. mask as in :func:`masked_linear_kernel`.
    """
    tile_n, tile_k = swizzle(tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    inside = (n < N)[:, None] & (k < K)[None, :]
    mask_row = mask + n.to(tl.int64)[:, None] * stride_mn
    if BITS:
        byte = tile_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        packed = tl.load(mask_row + byte[None, :], mask=(n < N)[:, None] & (byte * 8 < K)[None, :], other=0)
        keep = unpack_bits(packed, BLOCK_N, BLOCK_K // 8)
    else:
        keep = tl.load(mask_row + k[None, :], mask=inside, other=0).to(tl.int32)
    tokens = tl.where(tl.max(tl.max(keep, 1), 0) != 0, M, 0)
    from_dy = dy + r.to(tl.int64)[None, :] * stride_dm + n.to(tl.int64)[:, None] * stride_dn
    from_x = x + r.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for done in range(0, tokens, BLOCK_R):
        left = tokens - done
        a = tl.load(from_dy, mask=(n < N)[:, None] & (r < left)[None, :], other=0.0)
        b = tl.load(from_x, mask=(r < left)[:, None] & (k < K)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION, UPCAST)
        from_dy += BLOCK_R * stride_dm
        from_x += BLOCK_R * stride_xm
    acc = tl.where(keep != 0, acc, 0.0)
    to = out + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bsr_linear_kernel(
    x, crow, index, order, values, bias, out, M, OUT, stride_xm, stride_xr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out: `[M, OUT]` = activation(x `[M, RED]` times the sparse weights, + bias); values: `[nblocks, ROWS, COLS]`.

    crow: int32 `[bands + 1]`, index: int32 `[nblocks]`: the blocks of each band of outputs. TRANSPOSED (the gradient
    of the input): crow and index are those of the transpose and order (int32 `[nblocks]`) says which block of values
    each one is. A step takes BLOCK_R inputs: several small blocks, or part of a large one.
    """
    OUTPUTS: tl.constexpr = COLS if TRANSPOSED else ROWS
    INPUTS: tl.constexpr = ROWS if TRANSPOSED else COLS
    band = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.arange(0, OUTPUTS)
    first = tl.load(crow + band)
    last = tl.load(crow + band + 1)
    length = (last - first) * INPUTS
    from_x = x + m.to(tl.int64)[None, :] * stride_xm
    acc = tl.zeros((OUTPUTS, BLOCK_M), tl.float32)
    for done in range(0, length, BLOCK_R):
        p = done + tl.arange(0, BLOCK_R)
        within = p % INPUTS
        entry = first + p // INPUTS
        there = p < length
        inputs = tl.load(index + entry, mask=there, other=0) * INPUTS + within
        if TRANSPOSED:
            block = tl.load(order + entry, mask=there, other=0).to(tl.int64) * (ROWS * COLS)
            from_w = values + (block + within * COLS)[:, None] + o[None, :]
            weights = tl.trans(tl.load(from_w, mask=there[:, None], other=0.0))
        else:
            block = entry.to(tl.int64) * (ROWS * COLS)
            from_w = values + (block + within)[None, :] + o[:, None] * COLS
            weights = tl.load(from_w, mask=there[None, :], other=0.0)
        at_x = from_x + inputs.to(tl.int64)[:, None] * stride_xr
        tokens = tl.load(at_x, mask=there[:, None] & (m < M)[None, :], other=0.0)
        acc = product(weights.to(x.dtype.element_ty), tokens, acc, PRECISION, UPCAST)
    at = band * OUTPUTS + o
    if BIAS:
        acc += tl.load(bias + at).to(tl.float32)[:, None]
    acc = activate(acc, ACTIVATION)
    to = out + m.to(tl.int64)[None, :] * OUT + at[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < M)[None, :])
