"""Axes as classes of units: a union-find in which an axis may be a product or a sequence of other axes.

Two axes that meet in an operation are one `Dim` from then on. A reshape makes a Dim a product (row-major), a
slice or a concatenation makes it a sequence of segments; both are found again in every axis that is the same.
A Dim that is frozen is not taken apart any more: its parts are frozen too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

MOST = 64  # segments of one axis; beyond, as in a product of shifted copies, it is frozen


class Dim:
    """An axis, or a part of one.

    Attributes:
      size: number of entries.
      parts: what it is made of, if anything: factors of a product, outermost first, or segments in order.
      product: whether `parts` are factors.
      frozen: why no entry can be cut, first reason first.
      least: how many entries must remain.
    """

    def __init__(self, size: int, frozen: Iterable[str] = ()):
        self.size = size
        self.parts: tuple[Dim, ...] = ()
        self.product = False
        self.frozen = dict.fromkeys(frozen)
        self.least = 1
        self.up: Dim | None = None


def find(d: Dim) -> Dim:
    """What stands for the class of `d`."""
    top = d
    while top.up is not None:
        top = top.up
    while d.up is not None:
        d.up, d = top, d.up
    return top


def factors(d: Dim) -> list[Dim]:
    d = find(d)
    return [f for part in d.parts for f in factors(part)] if d.parts and d.product else [d]


def segments(d: Dim) -> list[Dim]:
    d = find(d)
    return [s for part in d.parts for s in segments(part)] if d.parts and not d.product else [d]


def product(parts: Sequence[Dim]) -> Dim:
    return _made([p for p in parts if p.size != 1], math.prod(p.size for p in parts), True)


def sequence(parts: Sequence[Dim]) -> Dim:
    return _made([p for p in parts if p.size], sum(p.size for p in parts), False)


def _made(parts: Sequence[Dim], size: int, is_product: bool) -> Dim:
    if len(parts) == 1:
        return parts[0]
    out = Dim(size)
    out.parts, out.product = tuple(parts), is_product
    return out


def freeze(d: Dim, *reasons: str) -> None:
    """No entry of `d`, nor of what it is made of, can be cut."""
    d = find(d)
    d.frozen.update(dict.fromkeys(reasons))
    parts, d.parts = d.parts, ()
    for part in parts:
        if part.size > 1:
            freeze(part, *reasons)


def keep(d: Dim, least: int, reason: str) -> None:
    """At least so many entries of `d` must remain."""
    d = find(d)
    if d.parts:
        freeze(d, reason)
    else:
        d.least = max(d.least, least)


def unify(a: Dim, b: Dim, reason: str) -> None:
    """From here on the axes are one; frozen for that reason where they do not fit each other."""
    a, b = find(a), find(b)
    if a is b or a.size == 1 or b.size == 1:
        return
    if a.size != b.size or (a.parts and b.parts and not _align(a, b, reason)):
        freeze(a, reason)
        freeze(b, reason)
    a, b = find(a), find(b)
    if a is b or a.size != b.size:
        return
    if not b.parts or (a.parts and b.product):  # segments say more: each of them may be a product
        a, b = b, a
    if a.frozen or b.frozen:
        freeze(b, *a.frozen)
        freeze(a, *b.frozen)
    elif b.parts and a.least > 1:
        freeze(b, f"{reason}: a part of an axis of which {a.least} must remain")
    b.least = max(a.least, b.least)
    a.up, a.parts = b, ()


def _align(a: Dim, b: Dim, reason: str) -> bool:
    """Unify the parts of two axes, taking apart those that are longer; whether they fit."""
    if a.product and b.product:
        return _align_parts(factors(a), factors(b), factor, factors, reason)
    if a.product:
        a, b = b, a
    left, right = segments(a), [b] if b.product else segments(b)
    short = len(left) <= MOST and len(right) <= MOST
    return short and _align_parts(left, right, cut, segments, reason)


def _align_parts(left: list[Dim], right: list[Dim], take: Callable, parts: Callable, reason: str) -> bool:
    """Unify rows of parts, first with first; `take` cuts the longer one, `parts` are those of the rest."""
    while left and right:
        if left[0].size < right[0].size:
            left, right = right, left
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size:
            found = take(x, y.size, reason)
            if found is None:
                return False
            x, rest = found
            left[:0] = parts(rest)
        unify(x, y, reason)
    return True


def factor(d: Dim, outer: int, reason: str) -> tuple[Dim, Dim] | None:
    """`d` as a product of an axis of `outer` entries and an inner one; None if it is no such product."""
    d = find(d)
    if outer in (1, d.size):
        return (d, Dim(1)) if outer == d.size else (Dim(1), d)
    if d.size % outer:
        return None
    if not d.parts:
        return _take_apart(d, (outer, d.size // outer), True)
    if d.product:
        return _factor_product(factors(d), outer, reason)
    return _factor_sequence(segments(d), d.size // outer, reason)


def _factor_product(parts: list[Dim], outer: int, reason: str) -> tuple[Dim, Dim] | None:
    before = []
    for i, part in enumerate(parts):
        if outer % part.size:
            found = factor(part, outer, reason)
            return found and (product([*before, found[0]]), product([found[1], *parts[i + 1 :]]))
        before.append(part)
        outer //= part.size
        if outer == 1:
            return product(before), product(parts[i + 1 :])
    return None


def _factor_sequence(parts: list[Dim], inner: int, reason: str) -> tuple[Dim, Dim] | None:
    if any(part.size % inner for part in parts):
        return None
    found = [factor(part, part.size // inner, reason) for part in parts]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    for _, other in pairs[1:]:
        unify(pairs[0][1], other, reason)
    return sequence([o for o, _ in pairs]), pairs[0][1]


def cut(d: Dim, at: int, reason: str) -> tuple[Dim, Dim] | None:
    """`d` as two segments, the first of `at` entries; None if the cut goes through its factors."""
    d = find(d)
    if at in (0, d.size):
        return (d, Dim(0)) if at else (Dim(0), d)
    if not d.parts:
        return _take_apart(d, (at, d.size - at), False)
    if d.product:
        outer, *rest = factors(d)
        inner = d.size // outer.size
        found = None if at % inner else cut(outer, at // inner, reason)
        return found and (product([found[0], *rest]), product([found[1], *rest]))
    before, parts = [], segments(d)
    while parts[0].size <= at:
        at -= parts[0].size
        before.append(parts.pop(0))
    found = cut(parts[0], at, reason)
    if found is None or len(parts) + len(before) >= MOST:
        return None
    return sequence([*before, found[0]]), sequence([found[1], *parts[1:]])


def _take_apart(d: Dim, sizes: tuple[int, int], is_product: bool) -> tuple[Dim, Dim]:
    reasons = dict.fromkeys(d.frozen)
    if d.least > 1:
        reasons[f"a part of an axis of which {d.least} must remain"] = None
    left, right = Dim(sizes[0], reasons), Dim(sizes[1], reasons)
    if reasons:
        freeze(d, *reasons)
    else:
        d.parts, d.product = (left, right), is_product
    return left, right


class Part(NamedTuple):
    """Which entries of an axis belong to unit i: `offset + i * stride`, and that plus k * step for every
    `(count, step)` of `repeats` and k below count."""

    offset: int
    stride: int
    repeats: tuple[tuple[int, int], ...] = ()


WHOLE = Part(0, 1)


def places(d: Dim, where: Part = WHOLE) -> Iterator[tuple[Dim, Part]]:
    """What an axis is made of in the end, each with its place in the axis."""
    d = find(d)
    if not d.parts:
        yield d, where
    elif d.product:
        for i, part in enumerate(d.parts):
            outer = math.prod(p.size for p in d.parts[:i])
            inner = math.prod(p.size for p in d.parts[i + 1 :])
            stride = where.stride * inner
            around = ((outer, stride * part.size), (inner, where.stride))
            repeats = where.repeats + tuple(r for r in around if r[0] > 1)
            yield from places(part, Part(where.offset, stride, repeats))
    else:
        starts = itertools.accumulate((p.size for p in d.parts), initial=0)
        for start, part in zip(starts, d.parts, strict=False):
            yield from places(part, where._replace(offset=where.offset + start * where.stride))
