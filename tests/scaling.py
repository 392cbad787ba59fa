"""The proof of what sites say of producers: a scale of every channel moves, and the function stays."""

import math
import warnings

import jax
import numpy as np


def grouped(sites):
    """The sites of each group that has a producer, a list for each."""
    by = {}
    for s in sites:
        if s.producer:
            by.setdefault(s.group, []).append(s)
    return list(by.values())


def move(params, sites, group, seed=0):
    """`params` with a random scale moved from the producer of `group` to its weights; float64."""
    first = group[0]
    own = [s.contract for s in sites if s.weight == first.producer and s.op != "gather"]
    rest = [n for i, n in enumerate(params[first.producer].shape) if i not in (own[0] if own else ())]
    n = math.prod(params[first.weight].shape[i] for i in first.contract)
    factors = first.channels or ((n, True),)
    channels = math.prod(n for n, has in factors if has)
    s = np.exp(np.random.default_rng(seed).standard_normal((math.prod(rest) // channels, channels)))
    out = dict(params)
    for name in (first.producer, *first.also):
        taken = own[0] if own and name == first.producer else ()
        shape = [1 if i in taken else n for i, n in enumerate(out[name].shape)]
        out[name] = out[name] / s.reshape(shape)
    for site in {s.weight: s for s in group}.values():
        out[site.weight] = out[site.weight] * spread(s, out[site.weight].shape, site, factors)
    return out


def spread(s, shape, site, factors):
    """s [leading, channels] in the shape of a weight, 1 along what it does not depend on."""
    axes = []
    while math.prod(shape[i] for i in axes) < len(s):
        axes.append(site.batch[len(axes)])
    lead = [shape[i] for i in axes]
    s = s.reshape(*lead, *(n if has else 1 for n, has in factors))
    s = np.broadcast_to(s, (*lead, *(n for n, _ in factors)))
    axes += site.contract
    s = s.reshape([shape[i] for i in axes]).transpose(np.argsort(axes))
    return s.reshape([n if i in axes else 1 for i, n in enumerate(shape)])


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


def differences(fn, params, args, changed):
    """For each of `changed`: the largest difference of the outputs of fn in float64, relative to the largest
    magnitude there."""
    run = jax.jit(fn, compiler_options=FAST)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a program may ask for float32
        args = jax.tree.map(wide, args)
        first, *others = (
            [np.asarray(x, np.float64) for x in jax.tree.leaves(run(jax.tree.map(wide, p), *args))]
            for p in (params, *changed)
        )
    return [max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(first, o, strict=True)) for o in others]


def wide(x):
    """A float as a float64 array."""
    x = np.asarray(x)
    return jax.numpy.asarray(x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x)


def check(fn, params, args, sites):
    """Every claim, one at a time and all together."""
    moved = params = {n: np.asarray(w, np.float64) if w.dtype.kind == "f" else w for n, w in params.items()}
    groups, changed = grouped(sites), []
    for i, group in enumerate(groups):
        changed.append(move(params, sites, group, i))
        moved = move(moved, sites, group, i)
    for error, group in zip(differences(fn, params, args, [*changed, moved]), [*groups, "all"], strict=True):
        assert error < 1e-10, group
