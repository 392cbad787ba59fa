"""From MXFP4 to NVFP4 in closed form: where a source is MXFP4, not one number of it changes.

Where 16 numbers are E2M1 elements times a power of two, they are such elements again under an NVFP4 scale:

  k  = ceil(log2(amax_block / 6))         the smallest exponent that holds the block, at most the source's
  m  = max over blocks k - 8              outer scale 2^m, one for weights that a server fuses
  s  = 2^clip(k - m, -9, 8)               inner scale, an E4M3 number

which is exact for k >= m - 9, 17 powers of two below the largest. Any other block is rounded to nearest under
e4m3(amax_block / (6 * 2^m)). Only decoded values count, so a copy of an MXFP4 model in bfloat16 is as good.
OCP Microscaling Formats 1.0 and arXiv 2509.25149 define the two formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.formats.base import QTensor
from mojax.formats.leaf import canonical
from mojax.formats.numerics import amax, blocks, divide, e2m1, e2m1_value, e4m3, exponent, pack
from mojax.transforms.base import Context, Outcome, Params, Stats, Transform

_BLOCK = 16
_LOWEST, _HIGHEST = -9, 8  # powers of two among the positive E4M3 numbers


@jit()
def exponents(w: Any) -> jax.Array:
    """Of every block of `w [out, in]` the smallest `k` with `amax <= 6 * 2^k`, int32; -129 for zeros."""
    return exponent(amax(blocks(w, _BLOCK)), 1.5 + 2**-23) - 129


@jit()
def solve(w: Any, k: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cast of one matrix.

    Args:
      w: `[out, in]`.
      k: `exponents(w)`.
      m: int32 `[]`, the exponent of the outer scale.
    Returns:
      codes, uint8 `[out, in]`, zeros with their sign; inner scales, float8_e4m3fn `[out, in / 16]`; the
      number of blocks that are not exact, int32.
    """
    x, outer = blocks(jnp.asarray(w).astype(jnp.float32), _BLOCK), _power(m)
    inner = _power(jnp.clip(k - m, _LOWEST, _HIGHEST))

    def codes(inner: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = divide(x, (inner * outer)[..., None])
        found = e2m1(y, jnp.signbit(y))
        return found, jnp.all(e2m1_value(found) == y, -1)

    exact_codes, exact = codes(inner)
    nearest = jnp.maximum(divide(amax(x), 6 * outer), 2.0**_LOWEST)
    inner = e4m3(jnp.where(exact, inner, nearest))
    found = jnp.where(exact[..., None], exact_codes, codes(inner.astype(jnp.float32))[0])
    return found.reshape(w.shape), inner, jnp.sum(~exact)


def _power(e: jax.Array) -> jax.Array:
    """`2^e`, float32, for `e` in -126..127."""
    return jax.lax.bitcast_convert_type((jnp.clip(e, -126, 127) + 127) << 23, jnp.float32)


def cast() -> Transform:
    """MXFP4 to NVFP4 without a loss; after rtn, whose NVFP4 codes it replaces. Other formats stay."""
    return Transform(_apply, encodes=True, phase="encode")


def _apply(params: Params, stats: Stats, context: Context) -> Params:
    names = [m + ".weight" for m, scheme in context.schemes.items() if scheme.weights.name == "nvfp4"]
    names = [name for name in names if isinstance(params[name], QTensor)]
    groups = [group for group in context.shared if set(group) <= set(names)]
    alone = [(name,) for name in names if not any(name in group for group in groups)]
    changed: dict[str, Any] = {}
    for group in (*groups, *alone):
        changed |= _cast_group(group, params, context)
    return changed


def _cast_group(group: Sequence[str], params: Params, context: Context) -> dict[str, QTensor]:
    """The weights of one outer scale; of experts, one for every expert."""
    matrices = {}
    for name in group:
        q: QTensor = params[name]
        w = canonical(np.asarray(context.targets[name]), q.contract, q.batch)
        matrices[name] = w.reshape(-1, *w.shape[-2:])
    parts: dict[str, list[tuple[Any, ...]]] = {name: [] for name in group}
    for i in range(len(matrices[group[0]])):
        k = {name: exponents(matrices[name][i]) for name in group}
        m = np.int32(max(int(jnp.max(found)) for found in k.values()) - _HIGHEST)
        m = np.clip(m, np.int32(-100), np.int32(100))  # of a tensor of zeros too
        for name in group:
            codes, inner, wrong = solve(matrices[name][i], k[name], jnp.asarray(m))
            parts[name].append((pack(codes), inner, np.float32(2.0**m), wrong))
    return {name: _whole(name, params[name], parts[name], context) for name in group}


def _whole(name: str, q: QTensor, parts: list[tuple[Any, ...]], context: Context) -> QTensor:
    """The leaf from its matrices, in the arrangement of `q`."""
    levels = zip(*parts, strict=True)
    codes, inner, outer, wrong = (np.stack([np.asarray(a) for a in level]) for level in levels)
    context.log(Outcome("cast", name, float(inner.size), float(wrong.sum())))
    outer = 1 / outer if q.format.arithmetic == "checkpoint" else outer
    scales = {
        "inner": inner.reshape(q.scales["inner"].shape),
        "outer": outer.reshape(np.shape(q.scales["outer"])),
    }
    return dataclasses.replace(q, codes=codes.reshape(q.codes.shape), scales=scales)
