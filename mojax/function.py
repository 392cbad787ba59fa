"""A JAX function with its parameters under names: what is compressed when there is no checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from mojax import interpret, trace
from mojax.compile import jit
from mojax.errors import InputError
from mojax.formats.base import QTensor, Scheme
from mojax.program import INPUT
from mojax.rules import RULES, Rule, Rules
from mojax.rules import checked as checked_rules
from mojax.simulate import leading, round_weight, rounded
from mojax.structure import axes
from mojax.structure.graph import Graph
from mojax.trace import Site

NEVER = "kept: never used"  # as coverage says it
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # contract, batch


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Function:
    """A function, its parameters, and how it runs. Immutable: `mojax.quantize` and others give a new one.

    New values for the same parameters are `dataclasses.replace(model, params=trained)`.

    Attributes:
      fn: `fn(params, *args)`, with `params` the pytree that the user wrote it for.
      tree, names: the structure of that pytree, and the names of its leaves in order.
      params: by name, paths joined by ".": arrays, ShapeDtypeStructs or QTensors; and `<name>.input_scale`,
        the calibrated maximum of a static input, float32 `[]` or `[*batch]`.
      example: the arguments as ShapeDtypeStructs.
      rules: what is known of primitives; see `mojax.rules`.
      schemes: by leaf, the formats of a weight and of its inputs; none for a leaf in full precision.
      layouts: of each of these, the axes (contract, batch), as in `mojax.trace.Site`.
      maxima: of static inputs whose maximum is not among the parameters, so that no training loop changes it.
      fake: whether weights that are arrays are rounded wherever they are read.
      notes: by leaf, why one that could be encoded is not.
    """

    fn: Callable
    tree: Any
    names: tuple[str, ...]
    params: Mapping[str, Any]
    example: tuple[Any, ...]
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    maxima: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fake: bool = False
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", "fn")
        return f"Function({name}, {len(self.names)} leaves, {len(self.schemes)} quantized)"

    def flat(self, params: Mapping[str, Any], *args: Any) -> Any:
        """`fn` of a flat dict of arrays: nothing is rounded."""
        return self.fn(self.nested(params), *args)

    @functools.cached_property
    def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every leaf of the user's pytree."""
        return {n: jax.ShapeDtypeStruct(self.params[n].shape, self.params[n].dtype) for n in self.names}

    @functools.cached_property
    def graph(self) -> Graph:
        """The program on the example."""
        return trace.graph(self.flat, self.specs, *self.example, rules=self.rules)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where the program reads its parameters, in its order."""
        return trace.graph_sites(self.graph, self.rules)

    @functools.cached_property
    def stacks(self) -> dict[str, int]:
        """Of each leaf that has a scheme, how many first axes the program may take rows of."""
        return {n: leading(batch) for n, (_, batch) in self.layouts.items()}

    def nested(self, params: Mapping[str, Any]) -> Any:
        """Flat parameters as the pytree that `fn` was written for; input scales have no place in it."""
        return jax.tree.unflatten(self.tree, [params[n] for n in self.names])

    def apply(self, params: Any, *args: Any) -> Any:
        """What `fn` returns, with weights and inputs rounded as `schemes` say; QTensors run packed.

        Can be jitted, differentiated and sharded like any function of JAX.

        Args:
          params: with the names of `self.params`, or the user's own pytree; a missing input scale is that of
            the input at hand.
        Raises:
          InputError: a parameter is missing or only a shape, or a QTensor is used where no kernel takes it.
        """
        if jax.tree.structure(params) == self.tree:
            params = dict(zip(self.names, jax.tree.leaves(params), strict=True))
        known = {*self.names, *map(scale_name, self.schemes)}
        params = {n: leaf for n, leaf in params.items() if n in known}
        for name in self.names:
            if name not in params:
                raise InputError(f"{name}: is missing from params, which need the names of model.params")
            if isinstance(params[name], jax.ShapeDtypeStruct):
                raise InputError(f"{name}: is only a shape; call model.apply(params, ...) with arrays")
        tracer = jax.core.Tracer  # type: ignore[attr-defined]
        if any(isinstance(x, tracer) for x in jax.tree.leaves((params, args))):
            return self.run(params, *args)
        return self._compiled(params, *args)

    def __call__(self, *args: Any) -> Any:
        """`apply` with the function's own parameters."""
        return self.apply(self.params, *args)

    @functools.cached_property
    def _compiled(self) -> Callable:
        return jit()(self.run)

    def run(self, params: Mapping[str, Any], *args: Any) -> Any:
        """`apply` of parameters that were checked."""
        leaves = {n: params[n] for n in self.names}
        if not self.schemes and not any(isinstance(leaf, QTensor) for leaf in leaves.values()):
            return self.flat(leaves, *args)

        def hook(place: interpret.Place) -> tuple[Any, None]:
            scheme = self.schemes.get(place.name)
            if scheme is None or scheme.inputs is None or place.op in ("gather", "cache"):
                return None, None
            amax = params.get(scale_name(place.name), self.maxima.get(place.name))
            return rounded(scheme.inputs, place, amax), None

        def read(name: str, value: Any) -> Any:
            if not self.fake or name not in self.schemes or isinstance(value, QTensor):
                return value
            taken = len(self.specs[name].shape) - value.ndim
            return round_weight(self.schemes[name].weights, value, *self.layouts[name], taken)

        run = interpret.intercept(self.flat, hook, read=read, stacks=self.stacks, rules=self.rules)
        return run(leaves, *args)[0]


def module_name(leaf: str) -> str:
    """A leaf's name without `.weight`."""
    return leaf.removesuffix(".weight")


def scale_name(leaf: str) -> str:
    """Where the calibrated maximum of a leaf's inputs is."""
    return module_name(leaf) + INPUT


def from_function(
    fn: Callable,
    params: Any,
    *example: Any,
    rules: Mapping[str, Rule] | None = None,
    unused: bool = False,
) -> Function:
    """A Function from `fn(params, *args)`.

    Args:
      params: any pytree of arrays or `jax.ShapeDtypeStruct`s.
      example: arguments, of which shapes and dtypes are looked at; ShapeDtypeStructs do.
      rules: of primitives that mojax does not know, or knows otherwise; see `mojax.rules`.
      unused: whether fn may leave parameters alone; else that is taken for a mistake.
    Raises:
      InputError: a leaf of params or of example is no array or is never used, two have one name, a rule
        cannot be used, or fn cannot be traced. What fn itself raises (shapes that do not fit) comes as it is.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_packed)
    flat: dict[str, Any] = {}
    for path, leaf in leaves:
        name = ".".join(_key(k) for k in path) or "params"
        if isinstance(leaf, QTensor):
            raise InputError(
                f"params: {name} is packed already; make the function from arrays or shapes, quantize it by "
                "the same recipe, and give it these: dataclasses.replace(model, params=loaded)"
            )
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise InputError(
                f"params: {name} is {type(leaf).__name__} ({leaf!r:.40}), not an array; keep what is none "
                "out of params, for example with equinox.partition(model, equinox.is_array)"
            )
        if name in flat:
            raise InputError(f"params: two leaves are called {name}; rename a key (paths are joined by '.')")
        flat[name] = leaf
    for i, leaf in ((i, leaf) for i, arg in enumerate(example) for leaf in jax.tree.leaves(arg)):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise InputError(
                f"argument {i + 1} of the example holds {type(leaf).__name__} ({leaf!r:.40}), not an array; "
                "fix it in the function: lambda params, x: fn(params, x, ...)"
            )
    specs = jax.eval_shape(lambda *args: args, *example)
    model = Function(fn, tree, tuple(flat), flat, specs)
    if rules:
        known = trace.primitives(model.flat, model.specs, *specs)
        model = dataclasses.replace(model, rules=checked_rules(rules, known))
    spare = [n for n, said in coverage(model).items() if said == NEVER]
    if spare and not unused:
        code = getattr(inspect.unwrap(fn), "__code__", None)
        where = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""
        raise InputError(
            f"params: {', '.join(spare[:5])}{' ...' * (len(spare) > 5)}: never used by the function{where}; "
            "leave out what it does not need, or pass unused=True"
        )
    return model


def _packed(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _key(key: Any) -> str:
    """One step of a path: a key, an index or an attribute."""
    found = [getattr(key, k) for k in ("key", "idx", "name") if hasattr(key, k)]
    return str(found[0] if found else key)


def from_flax(
    module: Any,
    *example: Any,
    variables: Any = None,
    rules: Mapping[str, Rule] | None = None,
    unused: bool = False,
    **constants: Any,
) -> Function:
    """A Function from a Flax module, called as it is: `module(*args, **constants)`.

    Of an NNX module the `nnx.Param`s are the parameters; other variables (statistics, random state, and
    whether it trains) stay as they are now, and what a call writes to them is dropped. Of a Linen module the
    collection "params" is; the other collections stay as they are.

    Args:
      module: an `nnx.Module`, or a `linen.Module` that is bound (`module.bind(variables)`).
      variables: of a Linen module that is not bound, what `module.init` gave.
      rules, unused: as of `from_function`.
      constants: keyword arguments that are not traced, such as `train=False`.
    Raises:
      InputError: not a module, a Linen module without variables, or one that cannot be called so.
    """
    from flax import errors, linen, nnx

    try:
        if isinstance(module, nnx.Module):
            return from_function(*_nnx(nnx, module, constants), *example, rules=rules, unused=unused)
        if isinstance(module, linen.Module):
            return from_function(
                *_linen(linen, module, variables, constants), *example, rules=rules, unused=unused
            )
    except errors.FlaxError as error:
        raise InputError(
            f"{type(module).__name__}: cannot be called with this example: {error}; set the mode it is to "
            "run in (module.eval(), deterministic=True) and pass what it needs, or wrap it: "
            "mojax.from_function(lambda params, *args: ..., params, *args)"
        ) from error
    raise InputError(
        f"from_flax: found {type(module).__name__}, needed an nnx.Module or a linen.Module; for other "
        "functions use mojax.from_function(fn, params, *args)"
    )


def _nnx(nnx: Any, module: Any, constants: Mapping[str, Any]) -> tuple[Callable, Any]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    tree = jax.tree.structure(params)

    def fn(pure: Any, *args: Any) -> Any:
        state = jax.tree.unflatten(tree, jax.tree.leaves(pure))
        fresh = jax.tree.map(lambda leaf: leaf, rest)  # a copy: a call may write to its variables
        return nnx.merge(graph, state, fresh)(*args, **constants)

    return fn, nnx.to_pure_dict(params)


def _linen(linen: Any, module: Any, variables: Any, constants: Mapping[str, Any]) -> tuple[Callable, Any]:
    name = type(module).__name__
    if variables is None:
        if module.scope is None:
            raise InputError(
                f"{name}: a linen.Module holds no parameters; call from_flax(module, *args, "
                "variables=module.init(key, *args)), or bind it: module.bind(variables)"
            )
        module, variables = module.unbind()
    variables = linen.meta.unbox(dict(variables))
    if "params" not in variables:
        raise InputError(f"{name}: variables hold {sorted(variables)}, needed the collection 'params'")
    rest = {k: v for k, v in variables.items() if k != "params"}

    def fn(params: Any, *args: Any) -> Any:
        return module.apply({"params": params, **rest}, *args, **constants)

    return fn, variables["params"]


def sites(model: Any) -> tuple[Site, ...]:
    """Where a model reads its parameters; of a checkpoint's model, in its blocks.

    Raises:
      InputError: neither a Function nor a Model.
    """
    from mojax.model import Model
    from mojax.transforms.base import placed

    if isinstance(model, Function):
        return model.sites
    if not isinstance(model, Model):
        raise InputError(f"sites: found {type(model).__name__}, needed a model of mojax")
    found: list[Site] = []
    for block in model.blocks:
        first = 1 + max((s.group for s in found), default=-1)
        found += [s._replace(group=first + s.group) for s in placed(model.sites(block), block.prefix)]
    return tuple(found)


def coverage(model: Function) -> dict[str, str]:
    """What becomes of every leaf, one line each.

    "site" (a dot, ragged dot or convolution reads it), with the formats once it has some: "site: int8, inputs
    as they are". "kept: why". "unreachable: why", where arithmetic lies between a parameter and its dot.

    Raises:
      InputError: not a Function.
    """
    from mojax.structure.coverage import coverage as reached

    said = reached(checked(model, "coverage").graph, model.rules)
    said |= {n: f"kept: {why}" for n, why in model.notes.items() if said[n].startswith("site")}
    return said | {n: f"site: {scheme.label}" for n, scheme in model.schemes.items()}


def coupled_axes(model: Function, *, frozen: bool = False) -> list[axes.Group]:
    """Groups of axes that must be cut together: each iterates over its pairs (leaf, axis).

    `member.indices(unit)`, of a member of `group.members`, are the entries of its axis that go with a unit.

    Args:
      frozen: also the groups of which nothing can be cut, with the reasons in `group.frozen`.
    Raises:
      InputError: not a Function.
    """
    f = checked(model, "coupled_axes")
    program = trace.graph(f.flat, f.specs, *f.example, rules=f.rules, views=False)
    return [group for group in axes.coupled(program) if frozen or group.prunable]


def checked(model: Any, verb: str) -> Function:
    """The model, if it is a Function.

    Raises:
      InputError: it is not.
    """
    if not isinstance(model, Function):
        raise InputError(
            f"{verb}: found {type(model).__name__}, needed a Function; make one with mojax.from_function(fn, "
            "params, *args) or mojax.from_flax(module, *args)"
        )
    return model
