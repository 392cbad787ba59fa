"""Compressing any JAX function by a recipe: calibrate, fake-quantize, quantize, dequantize, evaluate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax import interpret
from mojax.calibration import ENCODE, STATISTICS, Stats, encoding, merged, statistics
from mojax.choice import PRODUCTS, Choice, Given, missing, resolve, solved
from mojax.compile import jit
from mojax.errors import InputError, NotFiniteError
from mojax.formats.base import QTensor
from mojax.formats.leaf import canonical, restore
from mojax.function import INPUT, Function, Layout, checked, module_name, scale_name
from mojax.kernels.base import decoded
from mojax.recipe import Recipe
from mojax.simulate import leading, round_weight
from mojax.trace import Site
from mojax.transforms.base import Context, Transform


def calibrate(model: Any, recipe: Any, batches: Any, keep: Sequence[str] = ()) -> Stats:
    """Statistics of every input that a recipe needs, by leaf.

    Args:
      model: a Function; or a checkpoint's Model, with its Plan and tokens (int32 `[sequences, length]`), see
        `mojax.pipeline.calibrate`.
      recipe: a name, a file or a Recipe.
      batches: tuples of arguments, or single arguments.
      keep: as for `quantize`.
    Returns:
      `stats[leaf][statistic]`: absmax and sumsq float32 `[*batch, in]`, count int64 `[*batch]`, with the
      experts and layers of a leaf along `batch`; for a convolution `in` is the channels of its input. Where
      a program reads rows in a way that hides which, all have the statistics of all.
    Raises:
      PlanError: the recipe cannot be used, every problem. InputError: there are no batches.
    """
    if not isinstance(model, Function):
        from mojax import pipeline

        return pipeline.calibrate(model, recipe, batches)
    choice = solved(resolve(model, recipe, keep))
    if not choice.needs:
        return Stats()
    params = {n: concrete(model, n) for n in model.names}
    moves = any(step.phase == "block" for step in choice.steps)
    first = choice.needs if not moves else (*choice.migration.needs, *["absmax"] * bool(choice.static))
    batches = list(listed(batches))
    stats = _observed(model, choice, first, params, batches)
    if moves and choice.encoding.needs:
        params |= _transformed(model, params, choice, choice.migration, stats)
        later = _observed(model, choice, choice.encoding.needs, params, batches)
        stats |= {name + ENCODE: values for name, values in later.items()}
    return stats


def _observed(
    model: Function,
    choice: Choice,
    needs: tuple[str, ...],
    params: Mapping[str, Any],
    batches: Sequence[tuple],
) -> Stats:
    """Statistics of the inputs of what is to be encoded, with these parameters."""
    layouts, stacks = choice.layouts, {n: leading(batch) for n, (_, batch) in choice.layouts.items()}

    def tap(place: interpret.Place) -> tuple[None, Any]:
        seen = place.name in choice.schemes and place.op in PRODUCTS
        return None, statistics(place, needs) if seen else None

    watched = interpret.intercept(model.flat, tap, merge=merged, stacks=stacks, rules=model.rules)
    observe = jit()(lambda params, *args: watched(params, *args)[1])
    leaves = {n: params[n] for n in model.names}
    stats = Stats()
    for args in batches:
        for key, tap_values in observe(leaves, *args).items():
            name = key if key in choice.schemes else key.rpartition("#")[0]
            sizes = tuple(model.specs[name].shape[a] for a in layouts[name][1])
            values = {need: _spread(need, np.asarray(v), sizes) for need, v in tap_values.items()}
            stats = stats.merge({name: values})
    if not stats:
        raise InputError("batches: there are none; give tuples of arguments, as the function takes them")
    return stats


def listed(batches: Any) -> Iterator[tuple]:
    """The tuples of arguments of each batch.

    Raises:
      InputError: one array instead of several batches.
    """
    if hasattr(batches, "shape"):
        raise InputError(f"batches: found one array {list(batches.shape)}; give a list of batches, [x]")
    return (args if isinstance(args, tuple) else (args,) for args in batches)


def _spread(need: str, value: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """`value` with the batch axes; where some rows could not be told apart, all have what all have seen."""
    one = jax.eval_shape(STATISTICS[need].take, jax.ShapeDtypeStruct((1, 1), jnp.float32)).ndim
    if value.ndim == one + len(sizes):
        return value
    over = tuple(range(value.ndim - one))
    if STATISTICS[need].reduce == "join":
        value = value.reshape(-1, value.shape[-1])
    else:
        value = {"max": np.max, "sum": np.sum}[STATISTICS[need].reduce](value, axis=over)
    return np.broadcast_to(value, (*sizes, *value.shape))


def fake_quant(
    model: Function, recipe: str | Recipe, stats: Given | None = None, keep: Sequence[str] = ()
) -> Function:
    """The function with weights and inputs rounded where they are used, and straight-through gradients.

    Its params have the same names and shapes, so that a training loop takes it as it is. A scale of a weight
    follows the weight; a static scale of an input is calibrated if stats are given, else that of the batch
    at hand. Steps of the recipe before the last one (smoothquant) change the values of params once.

    Raises:
      PlanError: every problem. InputError: not a Function, or one that is packed.
    """
    model, stats = _plain(model, stats)
    choice = resolve(model, recipe, keep)
    choice.problems.extend(missing(choice, stats, optional=True))
    solved(choice)
    params = dict(model.params)
    if any(step.phase == "block" for step in choice.steps):
        values = {n: concrete(model, n) for n in model.names}
        params |= _transformed(model, values, choice, choice.migration, stats)
    maxima = {n: _maximum(n, stats) for n in choice.static if "absmax" in stats.get(n, ())}
    maxima = {n: params.pop(scale_name(n), top) for n, top in maxima.items()}  # as smoothing left it
    return dataclasses.replace(_with(model, params, choice, fake=True), maxima=maxima)


def quantize(
    model: Function, recipe: str | Recipe, stats: Given | None = None, keep: Sequence[str] = ()
) -> Function:
    """The function with QTensor leaves. Calling it runs packed; inputs are rounded as the recipe says.

    Args:
      model: in full precision; or from `fake_quant` after training, whose steps before the last one are done
        and not done again. One that was made from shapes gives one with shapes of QTensors, for parameters
        that were saved: `dataclasses.replace(quantize(model, recipe), params=load_params(path))`.
      recipe: a name, a file or a Recipe; see `mojax.choice.resolve` for what is kept by default.
      stats: from `calibrate`; needed for static input scales, and by some steps.
      keep: globs of leaves to leave as they are.
    Raises:
      PlanError: every problem, also what could not run packed. InputError: not a Function, or packed already.
    """
    trained = isinstance(model, Function) and model.fake
    model, stats = _plain(model, stats)
    choice = resolve(model, recipe, keep)
    if trained:
        choice = choice._replace(steps=tuple(s for s in choice.steps if s.phase == "encode"))
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in model.params.values())
    choice.problems.extend([] if abstract else missing(choice, stats))
    choice.problems.extend([] if choice.problems else unpackable(model, choice))
    solved(choice)
    if abstract:
        return _with(model, packed_specs(model, choice), choice, fake=False)
    params = {n: model.params[n] for n in model.names}
    params |= _transformed(model, params, choice, _both(choice), stats)
    params |= {scale_name(n): _maximum(n, stats) for n in choice.static if scale_name(n) not in params}
    return _with(model, params, choice, fake=False)


def packed_specs(model: Function, choice: Choice) -> dict[str, Any]:
    """Shapes and dtypes of the parameters that `quantize` gives."""
    specs: dict[str, Any] = dict(model.specs)
    for name, scheme in choice.schemes.items():
        w, (contract, batch) = model.specs[name], choice.layouts[name]
        specs[name] = scheme.weights.spec(w.shape, np.dtype(w.dtype), contract, batch)
    for name in choice.static:
        sizes = tuple(model.specs[name].shape[a] for a in choice.layouts[name][1])
        specs[scale_name(name)] = jax.ShapeDtypeStruct(sizes, jnp.float32)
    return specs


def unpackable(model: Function, choice: Choice) -> list[str]:
    """Which leaves no kernel could take, found by tracing the packed program on shapes."""
    found: list[str] = []
    schemes = dict(choice.schemes)
    while schemes:
        left = choice._replace(schemes=schemes)
        params = packed_specs(model, left)
        try:
            jax.eval_shape(_with(model, params, left, fake=False).run, params, *model.example)
            break
        except InputError as error:
            name = next((n for n in schemes if str(error).startswith(f"{n}: is packed")), None)
            if name is None:
                raise
            found.append(str(error).replace("keep this parameter as it is", f"pass keep=[{name!r}]"))
            del schemes[name]
    return found


def dequantize(model: Any) -> Any:
    """The model with the values of its QTensors as arrays in their own dtype; inputs are still rounded.

    Of a checkpoint's Model this is what transformers computes with compressed-tensors: products of decoded
    weights and decoded inputs, both rounded to the model's dtype. Packed, products are of the codes.

    Args:
      model: a Function; or a checkpoint's Model, whose weights are decoded when they are used.
    Raises:
      InputError: neither of the two.
    """
    from mojax.model import Model, dequantized

    if isinstance(model, Model):
        return dequantized(model)
    params = {
        n: decoded(v) if isinstance(v, QTensor) else v for n, v in checked(model, "dequantize").params.items()
    }
    return dataclasses.replace(model, params=params)


def _plain(model: Any, stats: Given | None) -> tuple[Function, Given]:
    """The function in full precision; calibrated maxima that it has stand in for statistics."""
    model = checked(model, "quantize")
    if not (stats is None or isinstance(stats, Mapping)):
        raise InputError(f"stats: found {type(stats).__name__}, needed what mojax.calibrate gives")
    if packed := [n for n in model.names if isinstance(model.params[n], QTensor)]:
        raise InputError(f"{packed[0]}: is packed already; call mojax.dequantize(model) first")
    scales = {n: model.params[scale_name(n)] for n in model.schemes if scale_name(n) in model.params}
    known = {n: {"absmax": np.asarray(a)[..., None]} for n, a in (*model.maxima.items(), *scales.items())}
    params = {n: model.params[n] for n in model.names}
    bare = dataclasses.replace(model, params=params, schemes={}, layouts={}, maxima={}, fake=False, notes={})
    return bare, known if stats is None else stats


def _with(model: Function, params: Mapping[str, Any], choice: Choice, fake: bool) -> Function:
    return dataclasses.replace(
        model, params=params, schemes=choice.schemes, layouts=choice.layouts, notes=choice.notes, fake=fake
    )


def concrete(model: Function, name: str) -> Any:
    """The value of a leaf.

    Raises:
      InputError: it is only a shape.
    """
    if isinstance(model.params[name], jax.ShapeDtypeStruct):
        raise InputError(f"{name}: is only a shape; use dataclasses.replace(model, params=...) with values")
    return model.params[name]


def _maximum(name: str, stats: Given) -> jax.Array:
    """The largest input magnitude of each matrix of a leaf, float32 `[*batch]`; of all where one saw none."""
    top = np.max(np.asarray(stats[name]["absmax"], np.float32), axis=-1)
    if not np.isfinite(top).all():
        raise NotFiniteError(f"{name}: its inputs are not finite during calibration; check params and data")
    return jnp.asarray(np.where(top > 0, top, top.max()))


# Transforms see matrices


def _both(choice: Choice) -> Transform:
    """All steps as one; those that encode see the statistics that were taken for them."""

    def apply(params: Mapping[str, Any], stats: Given, context: Context) -> Mapping[str, Any]:
        changed = dict(choice.migration.apply(params, stats, context))
        return changed | dict(choice.encoding.apply({**params, **changed}, encoding(stats), context))

    return Transform(apply)


def _transformed(
    model: Function, params: Mapping[str, Any], choice: Choice, step: Transform, stats: Given
) -> dict[str, Any]:
    """The leaves that a transform changes. It sees all as `<module>.weight`, those to encode as matrices."""
    shown = {n: module_name(n) + ".weight" for n in model.names}
    shown |= {n: n for n, s in shown.items() if s in model.names}  # not the name of another leaf
    back = {s: n for n, s in shown.items()}
    matrices = {
        s: canonical(params[n], *choice.layouts[n]) if n in choice.schemes else params[n]
        for n, s in shown.items()
    }
    sites = tuple(_shown(site, shown, choice) for site in model.sites)
    schemes = {module_name(n): scheme for n, scheme in choice.schemes.items()}
    kept = frozenset(shown[n] for n in choice.notes)
    seen = {s + end: stats[n + end] for n, s in shown.items() for end in ("", ENCODE) if n + end in stats}
    scales = {module_name(n) + INPUT: n for n in choice.schemes}
    changed: dict[str, Any] = {}
    try:
        made = step.apply(matrices, seen, Context(sites, schemes, (), kept))
    except NotFiniteError as error:
        name = next((n for s, n in back.items() if str(error).startswith(f"{s}:")), None)
        if name is None:
            raise
        what = "its inputs are not finite" if "its inputs" in str(error) else "holds NaN or infinity"
        raise NotFiniteError(f"{name}: {what}; repair it, or pass keep=[{name!r}]") from error
    for key, value in made.items():
        if key in scales:
            one_for_all = np.ndim(value) == 0 and choice.layouts[scales[key]][1]
            changed[key] = _maximum(scales[key], stats) if one_for_all else jnp.asarray(value, jnp.float32)
            continue
        if key not in back:
            raise InputError(f"{key}: a step of the recipe returned this leaf, which the function lacks")
        name = back[key]
        changed[name] = _restored(value, model.specs[name].shape, choice.layouts.get(name))
    return changed


def _shown(site: Site, shown: Mapping[str, str], choice: Choice) -> Site:
    """A site under the names and in the layout that a transform sees."""
    if site.op == "cache":
        return site
    site = site._replace(
        weight=shown[site.weight],
        producer=site.producer and shown[site.producer],
        also=tuple(shown[n] for n in site.also),
    )
    n = len(site.batch)
    encoded = module_name(site.weight) in map(module_name, choice.schemes) and site.op in PRODUCTS
    return site._replace(contract=(n + 1,), batch=tuple(range(n))) if encoded else site


def _restored(value: Any, shape: tuple[int, ...], layout: Layout | None) -> Any:
    if isinstance(value, QTensor) and layout is not None:
        return dataclasses.replace(value, shape=tuple(shape), contract=layout[0], batch=layout[1])
    return value if layout is None else restore(value, tuple(shape), *layout)


# Evaluation


class Comparison(NamedTuple):
    """How far a function is from its reference.

    Attributes:
      rel_error: of the float outputs, norm of the difference / norm of the reference's.
      loss, loss_reference: means over batches; None without a loss.
      bits_per_weight: 8 x bytes of all leaves / parameters of the reference.
      worst: the ten leaves with the largest relative error, `{tensor, rel_error}`.
    """

    rel_error: float
    loss: float | None
    loss_reference: float | None
    bits_per_weight: float
    worst: tuple[dict[str, Any], ...]


def evaluate(model: Any, reference: Any, batches: Any, loss: Callable | None = None, **options: Any) -> Any:
    """Compare a model with its reference.

    Args:
      model: a Function (the result is a Comparison); or a checkpoint's Model, with tokens for batches (the
        result is a Report, and options are those of `mojax.evaluation.evaluate`).
      reference: of the same kind, in full precision.
      batches: tuples of arguments, or single arguments.
      loss: `loss(outputs, *args)`, a scalar.
    Raises:
      InputError: no batches, or the two do not return the same structure.
    """
    if not isinstance(model, Function):
        from mojax import evaluation

        return evaluation.evaluate(model, reference, batches, **options)
    if options:
        raise InputError(f"evaluate: of a function has no option {', '.join(options)}; it has loss")
    return _compare(model, checked(reference, "evaluate"), batches, loss)


def _compare(
    model: Function, reference: Function, batches: Iterable[Any], loss: Callable | None
) -> Comparison:
    from mojax.evaluation import worst

    far = size = 0.0
    losses: list[tuple[float, float]] = []
    count = 0
    for args in listed(batches):
        got, wanted = model(*args), reference(*args)
        if jax.tree.structure(got) != jax.tree.structure(wanted):
            raise InputError("evaluate: the two functions return different structures")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            if jnp.issubdtype(jnp.result_type(b), jnp.inexact):
                b = np.asarray(b, np.float64)
                far, size = far + _square(np.asarray(a, np.float64) - b), size + _square(b)
        if loss is not None:
            losses.append((float(loss(got, *args)), float(loss(wanted, *args))))
        count += 1
    if not count:
        raise InputError("batches: there are none; give tuples of arguments, as the function takes them")
    means = [float(m) for m in np.mean(losses, axis=0)] if losses else [None, None]
    weights = sum(math.prod(spec.shape) for spec in reference.specs.values())
    return Comparison(
        math.sqrt(far / size) if size else math.sqrt(far),
        means[0],
        means[1],
        8 * sum(int(leaf.nbytes) for leaf in model.params.values()) / weights,
        worst({n: _weight_error(model, reference, n) for n in model.schemes}),
    )


def _square(x: np.ndarray) -> float:
    return float(np.sum(np.square(x)))


def _weight_error(model: Function, reference: Function, name: str) -> float:
    """Relative error of a weight as the function reads it."""
    w, true = model.params[name], np.asarray(reference.params[name], np.float64)
    if isinstance(w, QTensor):
        w = decoded(w)
    elif model.fake:
        w = round_weight(model.schemes[name].weights, jnp.asarray(w), *model.layouts[name])
    error = _square(np.asarray(w, np.float64) - true)
    return math.sqrt(error / _square(true)) if error else 0.0
