"""Experts of one layer: a single leaf with a star in its name here, one tensor each in the files.

`...experts.*.up_proj.weight [experts, out, in]` is `...experts.0.up_proj.weight [out, in]` and so on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mojax.checkpoint import Checkpoint, Spec
from mojax.errors import InputError
from mojax.formats.base import QTensor, Scheme, stack_rows

Shapes = Mapping[str, tuple[int, ...]]


def starred(name: str) -> bool:
    """Whether the name of a leaf or module stands for those of experts."""
    return "*" in name


def expand(name: str, count: int) -> tuple[str, ...]:
    """The names in the files that a name stands for, in the order of the experts; a plain name alone."""
    return tuple(name.replace("*", str(i)) for i in range(count)) if starred(name) else (name,)


def star(name: str, known: Collection[str]) -> str | None:
    """The starred name of `known` that stands for a name in the files, or None."""
    for m in re.finditer(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)", name):
        if (found := f"{name[: m.start()]}*{name[m.end() :]}") in known:
            return found
    return None


def spread(modules: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """A mapping by module as one by the names in the files.

    Args:
      shapes: of the weight of every starred module, `[experts, out, in]`.
    """
    counts = {m: shapes[m + ".weight"][0] if starred(m) else 1 for m in modules}
    return {name: value for m, value in modules.items() for name in expand(m, counts[m])}


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by the names of a model's parameters; experts are stacked at each access.

    Attributes:
      files: the checkpoint.
      names: parameter -> names in the files, in the order of the files.
    """

    files: Checkpoint
    names: Mapping[str, tuple[str, ...]]

    def __getitem__(self, name: str) -> np.ndarray:
        parts = [self.files[n] for n in self.names[name]]
        return np.stack(parts) if starred(name) else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def spec(self, name: str) -> Spec:
        """Dtype and shape from the headers."""
        found = self.files.spec(self.names[name][0])
        return Spec(found.dtype, (len(self.names[name]), *found.shape)) if starred(name) else found


def stacked(files: Checkpoint, shapes: Shapes) -> Checkpoint | Stacked:
    """The tensors of a checkpoint by the names of a model's parameters, whose shapes are given."""
    stars = {n: shape[0] for n, shape in shapes.items() if starred(n)}
    if not stars:
        return files
    names: dict[str, tuple[str, ...]] = {}
    for name in files:
        leaf = star(name, stars)
        if leaf is None:
            names[name] = (name,)
        elif leaf not in names:
            names[leaf] = tuple(n for n in expand(leaf, stars[leaf]) if n in files)
    return Stacked(files, names)


def problems(files: Checkpoint, shapes: Shapes) -> list[str]:
    """What contradicts a model's shapes in the tensors of its experts: one message per leaf.

    Experts must be numbered from 0 without a hole, and alike in shape and dtype.
    """
    stars = {n: shape for n, shape in shapes.items() if starred(n)}
    modules = {n.rpartition(".")[0] for n in stars}
    above = {leaf: set[str]() for leaf in stars}
    for name in files if stars else ():
        leaf = star(name, stars)
        if leaf is not None:
            above[leaf].add(name)
    said = []
    for leaf, (count, *shape) in stars.items():
        names = expand(leaf, count)
        missing = [i for i, n in enumerate(names) if n not in files]
        if missing:
            which = f"all {count}" if len(missing) == count else listed(missing)
            said.append(
                f"{leaf}: config.json implies experts 0 to {count - 1}, the files lack {which}"
                f"{_instead(leaf, files, modules) if len(missing) == count else ''}"
            )
        if more := sorted(above[leaf].difference(names)):
            said.append(
                f"{more[0]}: config.json implies experts 0 to {count - 1}, and the files have more; "
                "one of the two belongs to another model"
            )
        found = {n: files.spec(n) for n in names if n in files}
        wrong = next((n for n, s in found.items() if tuple(s.shape) != tuple(shape)), None)
        if wrong:
            said.append(
                f"{wrong}: the file holds {list(found[wrong].shape)}, config.json implies {list(shape)}; "
                "one of the two belongs to another model"
            )
        if len(dtypes := {s.dtype.name for s in found.values()}) > 1:
            said.append(f"{leaf}: experts are {' and '.join(sorted(dtypes))}; convert them to one dtype")
    return said


def listed(numbers: Sequence[int], most: int = 20) -> str:
    """`17, 40, 99`, and how many more."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def _instead(leaf: str, files: Collection[str], modules: Collection[str]) -> str:
    """What the files hold in place of the experts of a leaf, beside the other `modules`."""
    inside = leaf.split("*")[0]
    others = (n for n in files if n.startswith(inside) and star(n.rpartition(".")[0], modules) is None)
    found = next(others, None)
    if found is None:
        return ""
    if not found.removeprefix(inside)[:1].isdigit():
        return (
            f"; they hold {found}, experts fused in one tensor: save the model again with transformers, "
            "which parts them"
        )
    return (
        f"; they hold {found}: rename the experts' tensors to the names of the original model "
        "(llm-compressor renames Mixtral's w1, w3 and w2, and servers do not load that either)"
    )


def modules_missing(files: Collection[str], modules: Shapes) -> list[str]:
    """The same as `problems` for encoded modules, whose tensors have other endings.

    Args:
      modules: starred module -> shape of its weight.
    """
    there = {name.rpartition(".")[0] for name in files}
    said = []
    for module, (count, *_) in modules.items():
        missing = [i for i, n in enumerate(expand(module, count)) if n not in there]
        if missing:
            which = f"all {count}" if len(missing) == count else listed(missing)
            hint = _instead(module, files, modules) if len(missing) == count else ""
            said.append(
                f"{module}: config.json implies experts 0 to {count - 1}, the files lack {which}{hint}"
            )
    return said


def one_scheme(module: str, count: int, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """How all the experts of a starred module run, from the schemes by names in the files.

    Raises:
      InputError: they do not run alike.
    """
    names = expand(module, count)
    found = [schemes.get(n) for n in names]
    odd = next((i for i, scheme in enumerate(found) if scheme != found[0]), None)
    if odd is not None:
        said = ", ".join(f"{names[i]} {s.label if (s := found[i]) else 'as it is'}" for i in (0, odd))
        raise InputError(f"{module}: experts of one layer must be encoded alike, config.json says: {said}")
    return found[0]


Reader = Callable[[str], tuple[QTensor, np.float32 | None]]


def read(module: str, count: int, reader: Reader) -> QTensor:
    """An encoded module; of a starred one the experts stacked.

    Args:
      reader: one module in the files, and the maximum of its static input.
    """
    if not starred(module):
        return reader(module)[0]
    return stack_rows([_host(reader(name)[0]) for name in expand(module, count)])


def maximum(module: str, count: int, reader: Reader) -> np.float32 | None:
    """The maximum of the static input of a module; of experts the largest, as servers take it."""
    found = [top for name in expand(module, count) if (top := reader(name)[1]) is not None]
    return np.float32(max(found)) if found else None


def _host(q: QTensor) -> QTensor:
    return dataclasses.replace(
        q, codes=np.asarray(q.codes), scales={level: np.asarray(a) for level, a in q.scales.items()}
    )


def rows(q: QTensor) -> Iterator[QTensor]:
    """The experts of a stack one after another, in numpy; a matrix alone."""
    if not q.batch:
        yield q
        return
    q = _host(q)
    for i in range(q.shape[q.batch[0]]):
        yield q.row(i)


def entries(leaf: Any, name: str) -> Iterator[Any]:
    """The tensors in the files of one leaf: experts, encoded or not, one after another; others alone."""
    if isinstance(leaf, QTensor):
        yield from rows(leaf)
    elif starred(name):
        yield from leaf
    else:
        yield leaf
