"""Round to nearest: every weight to its format, scales from the largest magnitudes.

Static input scales are the largest magnitude that calibration saw. Weights that a server fuses share the
outer scale, taken over all of them before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax.compile import jit
from mojax.errors import InputError, NotFiniteError
from mojax.formats.base import Format, QTensor
from mojax.formats.leaf import canonical
from mojax.formats.rows import common_rows, cut
from mojax.threads import each
from mojax.transforms.base import Context, Params, Transform


@jit(static_argnums=(0,))
def _encode(format: Format, w: Any, outer: Any) -> QTensor:
    return format.encode(w, outer)


@jit()
def _largest(w: Any) -> jax.Array:
    top = jnp.max(jnp.abs(w)).astype(jnp.float32)
    return jnp.where(jnp.all(jnp.isfinite(w)), top, jnp.inf)  # XLA's maximum on a CPU may lose a NaN


def largest(w: Any, rows: int) -> np.float32:
    """The largest magnitude of a weight, `rows` at a time; NaN and infinity show."""
    return np.max([np.float32(_largest(part)) for part in cut(w, rows)])


def encode(format: Format, w: Any, outer: Any, rows: int) -> QTensor:
    """One weight `[out, in]` under the outer scale `outer` (None: the format has none), `rows` at a time."""
    parts = [_encode(format, part, outer) for part in cut(w, rows)]
    if len(parts) == 1:
        return parts[0]
    scales = {
        level: parts[0].scales[level]
        if level == "outer"
        else np.concatenate([p.scales[level] for p in parts])
        for level in parts[0].scales
    }
    return QTensor(np.concatenate([p.codes for p in parts]), scales, format, tuple(w.shape), parts[0].dtype)


class Leaf(NamedTuple):
    """A weight as its matrices `[out, in]` in turn: one, or one for every entry of its batch axes."""

    name: str
    matrices: Sequence[Any]  # views where the leaf lies so
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    shape: tuple[int, ...]

    def whole(self, parts: Sequence[QTensor]) -> QTensor:
        """The encoded leaf, from its encoded matrices."""
        if not self.batch and not self.contract:
            return parts[0]
        sizes = tuple(self.shape[a] for a in self.batch)

        def stack(*arrays: Any) -> np.ndarray:
            return np.stack([np.asarray(a) for a in arrays]).reshape(*sizes, *arrays[0].shape)

        codes = stack(*(q.codes for q in parts))
        scales = {level: stack(*(q.scales[level] for q in parts)) for level in parts[0].scales}
        q = parts[0]
        return QTensor(codes, scales, q.format, self.shape, q.dtype, self.contract, self.batch)


def rtn() -> Transform:
    """Round to nearest."""
    return Transform(_apply, encodes=True)


def _apply(params: Params, stats: Mapping[str, Mapping[str, Any]], context: Context) -> Params:
    shared = [
        group for group in context.shared if all(n.removesuffix(".weight") in context.schemes for n in group)
    ]
    grouped = {name for group in shared for name in group}
    alone = [(m + ".weight",) for m in context.schemes if m + ".weight" not in grouped]
    leaves = _leaves(params, context)
    rows = common_rows([leaf.matrices[0].shape for leaf in leaves.values()])
    work = [(group, i) for group in (*shared, *alone) for i in range(len(leaves[group[0]].matrices))]
    done = each(lambda item: _encode_group(leaves, *item, context, rows), work)
    parts: dict[str, list[QTensor]] = {}
    for part in done:
        for name, q in part.items():
            parts.setdefault(name, []).append(q)
    changed: dict[str, Any] = {name: leaves[name].whole(qs) for name, qs in parts.items()}
    for module, scheme in context.schemes.items():
        if scheme.inputs is not None and scheme.inputs.static:
            seen = static_maximum(module + ".weight", stats)  # of an earlier step, if it changed the inputs
            changed[module + ".input_scale"] = params.get(module + ".input_scale", seen)
    return changed


def _leaves(params: Params, context: Context) -> dict[str, Leaf]:
    """What is to be encoded; a leaf `[out, in]` where no site says otherwise."""
    axes = {site.weight: (site.contract, site.batch) for site in context.sites if site.op != "gather"}
    found = {}
    for name in (module + ".weight" for module in context.schemes):
        w = params[name]
        contract, batch = axes.get(name, ((), ()))
        if not batch and len(w.shape) == 2 and contract in ((), (1,)):
            found[name] = Leaf(name, [w], (), (), tuple(w.shape))
            continue
        whole = canonical(np.asarray(w), contract, batch)
        found[name] = Leaf(name, whole.reshape(-1, *whole.shape[-2:]), contract, batch, tuple(w.shape))
    return found


def _encode_group(
    leaves: Mapping[str, Leaf], group: tuple[str, ...], i: int, context: Context, rows: int
) -> dict[str, QTensor]:
    """Encode matrix `i` of the weights of one group, under one outer scale where the format has one."""
    format = context.schemes[group[0].removesuffix(".weight")].weights
    matrices = {name: leaves[name].matrices[i] for name in group}
    amax = {name: largest(w, rows) for name, w in matrices.items()}
    for name, value in amax.items():
        if not np.isfinite(value):
            raise NotFiniteError(
                f"{name.replace('*', str(i))}: holds NaN or infinity, which no format can hold; repair the "
                f"checkpoint, or add --keep={name} --noevaluate to leave this tensor as it is"
            )
    outer = None
    if format.static:
        outer = format.outer(np.asarray(max(amax.values())), np.dtype(matrices[group[0]].dtype))
    return {name: encode(format, w, outer, rows) for name, w in matrices.items()}


def static_maximum(name: str, stats: Mapping[str, Mapping[str, Any]]) -> np.float32:
    """The largest input magnitude of a site.

    Experts share the largest of those that saw tokens.

    Raises:
      InputError: calibration did not see this site (of experts: none of them), or saw values that are not
        finite.
    """
    if name not in stats or not np.any(stats[name].get("count", 1)):
        raise InputError(f"{name}: its inputs need a static scale, but calibration has not seen them")
    amax = np.float32(np.max(np.asarray(stats[name]["absmax"])))
    if not np.isfinite(amax):
        raise NotFiniteError(
            f"{name}: its inputs are not finite during calibration; the model overflows in its "
            "own dtype on this "
            "text, check the checkpoint or the text"
        )
    return amax
