"""float32 products on tensor cores that multiply bfloat16: operands as sums of bfloat16 terms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch


def split(x):
    """Three bfloat16 arrays whose sum is float32 `x`; by cutting bits, as compilers drop a rounding and its undoing."""
    terms = []
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        term = jax.lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(term.astype(jnp.bfloat16))
        x = x - term
    return [*terms, x.astype(jnp.bfloat16)]


def terms_of(x, dtype=jnp.bfloat16):
    """The terms of an array that `dtype` operands can hold: three of a float32, else one (int8 fits bfloat16)."""
    if x.dtype == jnp.float32:
        return split(x)
    return [x if x.dtype == dtype else x.astype(dtype)]


def swizzled(rows, width, dtype):
    """Transforms of shared memory whose rows are `width` elements, in tiles of `rows` (wgmma reads eights)."""
    return plgpu.TilingTransform((rows, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize)


def operand(shape, dtype):
    """Scratch for `multiply_add`'s left operand where kernels are interpreted, else None.

    Hardware takes it from registers; the interpreter multiplies what is in shared memory only.
    """
    return plgpu.SMEM(shape, dtype) if dispatch.interpreted() else None


def multiply_add(acc, left, right, through):
    """acc += sum of left[i] @ right[j], without the products below 2^-24 of the largest.

    Args:
      acc: accumulator reference [m, n]. left: terms [m, k] in registers. right: terms [k, n] in shared memory.
      through: reference [m, k] of `operand`, or None.
    """
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j <= 2]
    for i, j in sorted(pairs, key=sum, reverse=True):  # small ones first
        term = left[i]
        if through is not None:
            through[...], term = term, through
        plgpu.wgmma(acc, term, right[j])
    plgpu.wgmma_wait(0)
