"""What goes wrong with the user's input: one message per problem, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """The input cannot be used; the message says where, what was found, what was needed, what to do."""


class NotFiniteError(InputError):
    """NaN or infinity in a weight or an activation; what holds the first one may lie far before it."""


class PlanError(InputError):
    """Every problem that config.json and the safetensors headers show, all together.

    Attributes:
      problems: one message per problem.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, known: Iterable[str], prefix: str = "", most: int = 3, cutoff: float = 0.5) -> str:
    """`"; did you mean 'a' or 'b'?"`, or the known names when none is near; each after `prefix`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=most, cutoff=cutoff)
    if near:
        return "; did you mean " + " or ".join(repr(prefix + n) for n in near) + "?"
    return "; known: " + ", ".join(prefix + n for n in known[:20]) if known else ""
