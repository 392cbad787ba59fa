"""What the tracer and the interpreter know of a primitive: a table by name, which users extend.

A primitive is one of four things. It contracts a parameter with an activation (`Dot`), it calls a function
(`Call`), it only moves entries about (`Move`), or it is none of these and is bound as it stands; a parameter
that enters one of the last kind is an array like any other from there on. Loops and branches (scan, while,
cond, remat, shard_map) are not in the table: the tracer and the interpreter know them.

    rule = Dot("dot", lambda params, shapes, side: Dims((0,), (1,)) if side == 1 else None)
    mojax.from_function(fn, params, x, rules={"my_matmul": rule})
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mojax.errors import InputError, nearest
from mojax.view import SAME, Shape, View, follow


class Dims(NamedTuple):
    """Which axes of two operands meet.

    Attributes:
      contract: the axes of the parameter's operand that are summed over (of a lookup: that are indexed).
      partners: the axis of the other operand that each meets; None for one that meets a window.
      batch: the axes of the parameter's operand along which every entry is a matrix of its own.
      paired: the axis of the other operand that each of `batch` meets; None where rows are in groups.
    """

    contract: tuple[int, ...]
    partners: tuple[int | None, ...]
    batch: tuple[int, ...] = ()
    paired: tuple[int | None, ...] = ()


class Dot(NamedTuple):
    """A primitive that contracts its first two operands.

    Attributes:
      op: "dot", "ragged_dot", "conv" or "gather", as in `mojax.trace.Site`.
      dims: `(params, shapes, side) -> Dims`, with the parameters of the equation and the shapes of its
        inputs, when operand `side` (0 or 1) is the parameter; None where that is no site.
      groups: which operand holds the number of rows of each group, if one does.
      kernel: `kernel(x, q, params) -> result`, the operation on the other operand and a parameter that is
        packed (a QTensor, see `mojax.kernels`). Without one such a parameter is refused there; the primitives
        in `RULES` have kernels of their own.
    """

    op: str
    dims: Callable[[Mapping[str, Any], Sequence[Shape], int], Dims | None]
    groups: int | None = None
    kernel: Callable[[Any, Any, Mapping[str, Any]], Any] | None = None


class Call(NamedTuple):
    """A primitive that calls a function with its inputs: `body(params)` is its jaxpr. It is inlined."""

    body: Callable[[Mapping[str, Any]], Any]


class Move(NamedTuple):
    """A primitive that only moves entries of its first input about.

    Attributes:
      views: `(name, params, shapes, view) -> views`: the View that each output gives of what the input shows;
        None where it cannot be said. `shapes` are those of the outputs.
    """

    views: Callable[[str, Mapping[str, Any], Sequence[Shape], View], list[View | None]]


Rule = Dot | Call | Move
Rules = Mapping[str, Rule]


def _dot(params: Mapping[str, Any], shapes: Sequence[Shape], side: int) -> Dims | None:
    contract, batch = params["dimension_numbers"]
    if not contract[side]:  # an outer product, or a product entry by entry
        return None
    return Dims(*(tuple(d[i]) for d in (contract, batch) for i in (side, 1 - side)))


def _ragged_dot(params: Mapping[str, Any], shapes: Sequence[Shape], side: int) -> Dims | None:
    """Rows in groups, a matrix per group; the forms that gradients have are no sites."""
    numbers = params["ragged_dot_dimension_numbers"]
    (left, right), batch = numbers.dot_dimension_numbers
    rows, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    if side == 0 or any(batch) or rows[0] in left or not groups:
        return None
    return Dims(tuple(right), tuple(left), groups, (None,))


def _conv(params: Mapping[str, Any], shapes: Sequence[Shape], side: int) -> Dims | None:
    """Summed over the channels of a group and the window."""
    numbers = params["dimension_numbers"]
    if side == 0 or params["batch_group_count"] != 1:
        return None
    inner = tuple(numbers.rhs_spec[1:])
    return Dims(inner, (numbers.lhs_spec[1], *[None] * (len(inner) - 1)))


def _gather(params: Mapping[str, Any], shapes: Sequence[Shape], side: int) -> Dims | None:
    looked_up = tuple(params["dimension_numbers"].start_index_map)
    return None if side else Dims(looked_up, (None,) * len(looked_up))


def _inner(params: Mapping[str, Any]) -> Any:
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


MOVES = "transpose squeeze reshape broadcast_in_dim slice dynamic_slice split"
CALLS = "jit pjit closed_call core_call eval_jaxpr"

OPS = ("dot", "ragged_dot", "conv", "gather")
RULES: Rules = {
    "dot_general": Dot("dot", _dot),
    "ragged_dot_general": Dot("ragged_dot", _ragged_dot, groups=2),
    "conv_general_dilated": Dot("conv", _conv),
    "gather": Dot("gather", _gather),
    **dict.fromkeys(CALLS.split(), Call(_inner)),
    **dict.fromkeys([*MOVES.split(), *SAME], Move(follow)),
}


def checked(rules: Mapping[str, Rule], primitives: Collection[str]) -> dict[str, Rule]:
    """All rules, those of a user over our own.

    Args:
      rules: the user's.
      primitives: the names of those in the program.
    Raises:
      InputError: what is given is no rule, or is for a primitive that the program has not.
    """
    for name, rule in rules.items():
        if not isinstance(rule, Dot | Call | Move):
            raise InputError(
                f"rules: {name} is {type(rule).__name__}, needed a Dot, Call or Move of mojax.rules"
            )
        if isinstance(rule, Dot) and rule.op not in OPS:
            raise InputError(f"rules: {name}: op is {rule.op!r}, needed one of {', '.join(OPS)}")
        if name not in RULES and name not in primitives:
            raise InputError(f"rules: the function has no operation {name!r}{nearest(name, primitives)}")
    return {**RULES, **rules}


def dims_of(
    name: str, rule: Dot, params: Mapping[str, Any], shapes: Sequence[Shape], side: int
) -> Dims | None:
    """The axes that meet in one operation.

    Raises:
      InputError: a user's rule gives something else, or axes that do not exist or differ in length.
    """
    dims = rule.dims(params, shapes, side)
    if dims is None:
        return None
    if not isinstance(dims, Dims):
        raise InputError(f"rules: {name}: dims returned {type(dims).__name__}, needed Dims or None")
    own, other = shapes[side], shapes[1 - side]
    for mine, theirs in ((dims.contract, dims.partners), (dims.batch, dims.paired)):
        for a, b in zip(mine, theirs, strict=len(mine) == len(theirs)):
            if not 0 <= a < len(own) or (b is not None and not 0 <= b < len(other)):
                raise InputError(
                    f"rules: {name}: {dims} names an axis that {list(own)} or {list(other)} lacks"
                )
            if b is not None and rule.op != "conv" and own[a] != other[b]:
                raise InputError(
                    f"rules: {name}: axis {a} of {list(own)} and axis {b} of {list(other)} differ in length; "
                    "they cannot meet"
                )
        if len(mine) != len(theirs):
            raise InputError(f"rules: {name}: {dims} has {len(mine)} axes that meet {len(theirs)}")
    return dims


def views_of(
    name: str, rule: Move, params: Mapping[str, Any], shapes: Sequence[Shape], view: View
) -> list[View | None]:
    """The views that the outputs of one operation give.

    Raises:
      InputError: a user's rule gives another number of them, or of another shape.
    """
    views = rule.views(name, params, shapes, view)
    found = [None if v is None else v.shape for v in views]
    wrong = len(views) != len(shapes) or any(v not in (None, s) for v, s in zip(found, shapes, strict=False))
    if name not in RULES and wrong:
        raise InputError(f"rules: {name}: views of shape {found} for outputs of shape {[*map(list, shapes)]}")
    return views
