"""int8 codes as operands of the tensor cores on Hopper: widened to bfloat16 in registers, exactly.

A byte b, seen as b = low 7 bits - 128 x sign bit, becomes a bfloat16 without a conversion: with the exponent of 128
(0x4300) its low bits make 128 + low, and its sign bit alone makes 128 or 256, so the difference of the two is b.

Values are the left operand with their channels as rows, but lie in memory with tokens as rows. A thread therefore
takes channels that are neighbours in memory: a load brings one token's, and pairing tokens is part of the widening.
The rows of the product are then channels in another order, which `store_transposed` undoes.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

TILE = plgpu.Layout.WGMMA
LOW, SIGN, BIAS = 0x007F007F, 0x00800080, 0x43004300
BLOCK = 64


def transforms(dim: int, dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Layout of a block in shared memory: rows swizzled over as many of 128 bytes as they have."""
    width = jnp.dtype(dtype).itemsize
    swizzle = min(128, dim * width)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)


def widen(codes, interpret: bool) -> Array:
    """[64, D] codes in shared memory as bfloat16 in registers."""
    if interpret:
        return codes[...].astype(jnp.bfloat16)
    loaded = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(loaded.astype(jnp.bfloat16), TILE)


def _constant(x: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, x))


def _place(dim: int) -> tuple[ir.Value, ir.Value]:
    """(lane, first channel of this thread): a thread has dim / 32 neighbouring channels."""
    lane = arith.remui(utils.thread_idx(), _constant(32))
    warp = arith.remui(arith.divui(utils.thread_idx(), _constant(32)), _constant(4))
    group = arith.addi(arith.muli(warp, _constant(8)), arith.divui(lane, _constant(4)))
    return lane, arith.muli(group, _constant(dim // 32))


def _pointer(base: ir.Value, offset: ir.Value) -> ir.Value:
    return utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8))


def _load_channels(base: ir.Value, offset: ir.Value, count: int) -> list[ir.Value]:
    """`count` bytes at `base + offset`, as registers of four (the upper two empty where there are two)."""
    i16, i32 = (ir.IntegerType.get_signless(n) for n in (16, 32))
    where = _pointer(base, offset)
    if count == 2:
        return [arith.extui(i32, llvm.load(i16, where))]
    if count == 4:
        return [llvm.load(i32, where)]
    pair = llvm.load(ir.VectorType.get((2,), i32), where)
    return [vector.extract(pair, dynamic_position=[], static_position=[n]) for n in range(2)]


def _widened_pair(first: ir.Value, second: ir.Value, byte: int) -> ir.Value:
    """Byte `byte` of two registers as two bfloat16."""
    selector = byte | byte << 4 | (4 + byte) << 8 | (4 + byte) << 12
    i32 = ir.IntegerType.get_signless(32)
    asm = (
        "{ .reg .b32 x, a, b; prmt.b32 x, $1, $2, $3; lop3.b32 a, x, $4, $6, 0xEA; lop3.b32 b, x, $5, $6, 0xEA;"
        " sub.rn.bf16x2 $0, a, b; }"
    )
    constants = [_constant(x) for x in (selector, LOW, SIGN, BIAS)]
    out: Any = llvm.inline_asm(i32, [first, second, *constants], asm, "=r,r,r,n,n,n,n")
    return utils.bitcast(out, ir.VectorType.get((2,), ir.BF16Type.get()))


def widen_transposed(codes, interpret: bool) -> Array:
    """[64, D] codes in shared memory as [D, 64] bfloat16 in registers, rows in the order of `row_of_channel`."""
    dim = codes.shape[-1]
    if interpret:
        return codes[...].astype(jnp.bfloat16).T
    layout = transforms(dim, jnp.int8)
    width, count = min(128, dim), dim // 32

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(layout),),
        return_type=plgpu.ShapeDtypeStruct((dim, BLOCK), jnp.bfloat16, layout=TILE),
    )
    def load(_, ref):
        base = utils.memref_ptr(ref)
        lane, channel = _place(dim)
        columns = arith.remui(channel, _constant(width))
        tile = arith.muli(arith.divui(channel, _constant(width)), _constant(8 * width))
        offsets = []
        for odd in range(2):  # tokens 8 j + 2 (lane % 4) + odd
            row = arith.addi(arith.muli(arith.remui(lane, _constant(4)), _constant(2)), _constant(odd))
            flat = arith.addi(arith.addi(tile, arith.muli(row, _constant(width))), columns)
            turn = arith.andi(arith.shrui(flat, _constant(7)), _constant(width // 16 - 1))
            offsets.append(arith.xori(flat, arith.shli(turn, _constant(4))))
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((dim, BLOCK)), dtype=object)
        for j in range(BLOCK // 8):
            step = _constant(j * 8 * dim)
            even, odd = (_load_channels(base, arith.addi(offset, step), count) for offset in offsets)
            for n in range(count):
                value = _widened_pair(even[n // 4], odd[n // 4], n % 4)
                registers[(n // 2, j, 0, 0, n % 2, 0, 0, 0, 0)] = value
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return load(codes)


def store_transposed(ref, x: Array, interpret: bool) -> None:
    """ref [N, D] = x.T for bfloat16 x [D, N] whose rows are in the order that `widen_transposed` gives."""
    if interpret:
        ref[...] = x.T
        return
    dim = x.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def store(_, ref, x):
        base = utils.memref_ptr(ref)
        lane, channel = _place(dim)
        query = arith.muli(arith.remui(lane, _constant(4)), _constant(2))
        bf16 = ir.BF16Type.get()
        for j in range(x.shape[1] // 8):
            for odd in range(2):
                parts = [
                    vector.extract(
                        x.registers[(n // 2, j, 0, 0, n % 2, 0, 0, 0, 0)], dynamic_position=[], static_position=[odd]
                    )
                    for n in range(dim // 32)
                ]
                row = arith.addi(query, _constant(8 * j + odd))
                offset = arith.addi(arith.muli(row, _constant(dim)), channel)
                value = vector.from_elements(ir.VectorType.get((dim // 32,), bf16), parts)
                llvm.store(value, _pointer(base, arith.muli(offset, _constant(2))))

    store(ref, x)
