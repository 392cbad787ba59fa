"""What kernels.py times: operations and shapes by section, what runs against what, and how much work it is.

On a GPU shapes are those of Llama 3 8B and 70B, Mixtral 8x7B and Qwen 3 30B-A3B; elsewhere smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from operands import BF16, caches, encoded, loaded, normal, several, weights
from timing import Case, Timing, first_line, implementations

import mojax
from mojax.find import find
from mojax.formats.base import Format, QTensor, Scheme
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.mxfp8 import MXFP8
from mojax.formats.nvfp4 import NVFP4
from mojax.kernels.attention import attend
from mojax.kernels.dequantize import dequantize
from mojax.kernels.grouped_matmul import grouped_matmul
from mojax.kernels.hadamard import hadamard
from mojax.kernels.matmul import matmul
from mojax.kernels.quantize import quantize
from mojax.kernels.scaled import scaled
from mojax.model import Model, linears

F32 = jnp.float32
LAST = (((1,), (1,)), ((), ()))  # [M, K] with [N, K]
FORMATS: dict[str, Format] = {
    "nvfp4": NVFP4(),
    "mxfp4": MXFP4(),
    "int4 g128": INT4(arithmetic="checkpoint"),
    "int4 g32": INT4(32, arithmetic="checkpoint"),
    "fp8": FP8("channel", arithmetic="checkpoint"),
    "int8": INT8(arithmetic="checkpoint"),
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMALL = LLAMA_8B | {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


class Scale(NamedTuple):
    """How large the shapes are to be."""

    gpu: bool
    quick: bool

    def pick(self, gpu: Any, gpu_quick: Any, cpu: Any, cpu_quick: Any) -> Any:
        return ((cpu, cpu_quick), (gpu, gpu_quick))[self.gpu][self.quick]


class Work(NamedTuple):
    """What a call does at least: bytes read and written, multiplications plus additions, and their dtype."""

    nbytes: float
    operations: float = 0
    unit: str = "bf16"


class Contest(NamedTuple):
    """Cases of one shape that run against each other, by name; `found` where they have been timed already."""

    shape: str
    cases: Mapping[str, Case]
    works: Mapping[str, Work]
    found: Mapping[str, Timing | str] | None = None


# ---------------------------------------------------------------- the device


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, LAST, preferred_element_type=F32).astype(BF16)


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, LAST)


def device(scale: Scale) -> Iterator[Contest]:
    """Bandwidth of copies, and square products of every dtype that the device multiplies."""
    nbytes, n = scale.pick(2**30, 2**30, 2**27, 2**26), scale.pick(8192, 8192, 2048, 1024)
    arrays = [normal((nbytes // 2,), i) for i in range(2)]
    cases = {"copy": Case(lambda _, a: a, (), arrays), "negate": Case(lambda _, a: -a, (), arrays)}
    works = dict.fromkeys(cases, Work(2 * nbytes))
    cases["sum"] = Case(lambda _, a: jnp.sum(a), (), [normal((nbytes // 4,), i, F32) for i in range(2)])
    works["sum"] = Work(nbytes)
    yield Contest(f"{nbytes / 2**20:.0f} MB", cases, works)
    del arrays, cases
    cases, works = against(normal((n, n), 0), [normal((n, n), i + 1, by=0.01) for i in range(2)])
    if scale.gpu:
        fp8 = [normal((n, n), i, jnp.float8_e4m3fn) for i in range(3)]
        cases["fp8"] = Case(partial(lax.dot_general, **_to(BF16)), fp8[0], fp8[1:])
        works["fp8"] = Work(4 * n**2, 2 * n**3, "fp8")
    int8 = [normal((n, n), i, jnp.int8, 40) for i in range(3)]
    cases["int8"] = Case(partial(lax.dot_general, **_to(jnp.int32)), int8[0], int8[1:])
    works["int8"] = Work(6 * n**2, 2 * n**3, "int8")
    yield Contest(f"{n} x {n} x {n}", cases, works)


def _to(dtype: Any) -> dict[str, Any]:
    return {"dimension_numbers": LAST, "preferred_element_type": dtype}


# ---------------------------------------------------------------- products


def matmuls(scale: Scale) -> Iterator[Contest]:
    """bfloat16 inputs times a weight in each format."""
    large = ((4096, 4096), (4096, 14336), (8192, 8192), (28672, 4096))
    for N, K in scale.pick(large, large[1:2], large[:2], ((2048, 2048),)):
        packed = {n: [loaded(q) for q in weights(f, (N, K))] for n, f in FORMATS.items()}
        ws = several(partial(normal, (N, K), by=0.02), 2 * N * K)
        for M in scale.pick((1, 4, 16, 64), (1, 16), (1, 16, 64), (1, 16)):
            x = normal((M, K), 99)
            cases, works = against(x, ws)
            for name, qs in packed.items():
                cases[name] = Case(partial(matmul, dtype=BF16), x, qs)
                works[name] = Work(qs[0].nbytes + 2 * M * (N + K), 2 * M * N * K)
            yield Contest(f"{M} x {N} x {K}", cases, works)


def against(x: jax.Array, ws: list[jax.Array]) -> tuple[dict[str, Case], dict[str, Work]]:
    """The two products of bfloat16 that others are compared with."""
    (M, K), (N, _) = x.shape, ws[0].shape
    cases = {"bf16": Case(dot, x, ws), "bf16 plain": Case(plain, x, ws)}
    return cases, dict.fromkeys(cases, Work(2 * (M * K + N * K + M * N), 2 * M * N * K))


def scaled_products(scale: Scale) -> Iterator[Contest]:
    """8 bits times 8 bits: inputs encoded beforehand, and encoded by the same call."""
    token, block = FP8("token"), FP8("block")
    kinds: dict[str, tuple[Format, Format, Format]] = {
        "fp8 per tensor": (FP8(), FP8(), FP8()),
        "fp8 per token, channel": (token, FP8("channel"), token),
        "fp8 1x128, 128x128": (token, block, block),
        "int8 per token, channel": (INT8("token"), INT8(), INT8("token")),
    }
    large = ((28672, 4096), (4096, 14336))
    for N, K in scale.pick(large, large[1:], ((4096, 4096),), ((1024, 2048),)):
        packed = {n: weights(w, (N, K)) for n, (_, w, _) in kinds.items()}
        ws = several(partial(normal, (N, K), by=0.02), 2 * N * K)
        for M in scale.pick((16, 1024, 4096), (16, 4096), (16, 256), (16,)):
            x = normal((M, K), 99)
            cases, works = against(x, ws)
            for name, (inputs, weight, rounds) in kinds.items():
                shape = (M, K // 128, 128) if weight is block else (M, K)
                codes, unit = encoded(inputs, shape, 99), name.split()[0]
                cases[name] = Case(partial(scaled, dtype=BF16), codes, packed[name])
                cases[f"{name}, encodes"] = Case(partial(matmul, dtype=BF16, inputs=rounds), x, packed[name])
                read = packed[name][0].nbytes + 2 * M * N
                works[name] = Work(read + codes.nbytes, 2 * M * N * K, unit)
                works[f"{name}, encodes"] = Work(read + 2 * M * K, 2 * M * N * K, unit)
            yield Contest(f"{M} x {N} x {K}", cases, works)


def grouped(scale: Scale) -> Iterator[Contest]:
    """Experts of a mixture; only those that have rows must be read."""
    mixtral, qwen = (8, 2, 14336, 4096), (128, 8, 1536, 2048)
    formats = {"nvfp4": NVFP4(), "int4 g128": FORMATS["int4 g128"], "fp8 128x128": FP8("block")}
    for E, top, N, K in scale.pick((mixtral, qwen), (qwen,), ((8, 2, 1024, 1024),), ((8, 2, 256, 512),)):
        packed = {n: [loaded(q) for q in weights(f, (E, N, K), 1)] for n, f in formats.items()}
        ws = several(partial(normal, (E, K, N), by=0.02), 2 * E * N * K)
        for tokens in scale.pick((16, 1024), (16, 1024), (16, 256), (16,)):
            x = normal((tokens * top, K), 99)
            picked = np.argsort(np.random.default_rng(0).random((tokens, E)), axis=1)[:, :top]
            sizes = jnp.asarray(np.bincount(picked.ravel(), minlength=E), jnp.int32)
            busy, rows = np.count_nonzero(sizes) / E, x.shape[0]
            cases = {"bf16": Case(lambda xs, w: lax.ragged_dot(xs[0], w, xs[1]), (x, sizes), ws)}
            works = {"bf16": Work(busy * 2 * E * N * K + 2 * rows * (N + K), 2 * rows * N * K)}
            for name, qs in packed.items():
                cases[name] = Case(_grouped, (x, sizes), qs)
                nbytes = busy * qs[0].nbytes + 2 * rows * (N + K)
                works[name] = Work(nbytes, 2 * rows * N * K)
            yield Contest(f"{tokens} tokens, {top} of {E}, {N} x {K}", cases, works)


def _grouped(shared: tuple[Any, Any], q: QTensor) -> jax.Array:
    x, sizes = shared
    return grouped_matmul(x, q, sizes, dtype=BF16)


# ---------------------------------------------------------------- attention


def attention(scale: Scale) -> Iterator[Contest]:
    """One new token against a full cache, Llama 3 8B's heads."""
    slots = scale.pick(4096, 4096, 4096, 1024)
    for batch in scale.pick((1, 32), (1, 32), (1, 8), (1,)):
        q, shape = normal((batch, 1, 32, 128), 99), (batch, slots, 8, 128)
        at = jnp.full((batch, 1), slots - 1, jnp.int32)
        shared = (q, at, jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots)))
        formats = {"bf16 cache": None, "fp8 cache": FP8(), "nvfp4 cache": NVFP4()}
        found = {name: caches(format, shape) for name, format in formats.items()}
        cases = {"bf16": Case(partial(_attend, only="reference"), shared, found["bf16 cache"])}
        cases |= {name: Case(_attend, shared, pairs) for name, pairs in found.items()}
        nbytes = {name: sum(a.nbytes for a in case.items[0]) for name, case in cases.items()}
        operations = 4 * batch * 32 * slots * 128
        works = {name: Work(n + 2 * q.nbytes, operations) for name, n in nbytes.items()}
        yield Contest(f"batch {batch}, {slots} slots", cases, works)


def _attend(shared: tuple[Any, Any, Any], cache: tuple[Any, Any], only: str | None = None) -> jax.Array:
    q, at, places = shared
    return attend(q, *cache, at, places, implementation=only)


# ---------------------------------------------------------------- rounding


def rounding(scale: Scale) -> Iterator[Contest]:
    """bfloat16 to codes and back; rotated before, and with a search for scales."""
    formats = FORMATS | {"mxfp8": MXFP8(), "fp8 per tensor": FP8(), "fp8 per token": FP8("token")}
    shape = scale.pick((4096, 14336), (4096, 14336), (2048, 2048), (256, 2048))
    size = math.prod(shape)
    xs = several(partial(normal, shape), 2 * size)
    cases, works = {}, {}
    for name, format in formats.items():
        options: list[tuple[str, dict[str, Any]]] = [(name, {})]
        if name == "nvfp4":
            options += [(f"{name} {n}", {"hadamard": n}) for n in (16, 128)] + [
                (f"{name} sweep", {"sweep": True})
            ]
        for label, option in options:
            cases[f"quantize {label}"] = Case(
                partial(_quantize, format=format, **option), jnp.float32(0.002), xs
            )
            works[f"quantize {label}"] = Work(2 * size + format.spec(shape, np.dtype(BF16)).nbytes)
    yield Contest(f"{shape[0]} x {shape[1]}", cases, works)
    cases, works = {}, {}
    for name, format in formats.items():
        qs = weights(format, shape)
        cases[f"dequantize {name}"] = Case(lambda _, q: dequantize(q), (), qs)
        works[f"dequantize {name}"] = Work(2 * size + qs[0].nbytes)
    for n in (16, 128):
        cases[f"hadamard {n}"] = Case(lambda _, x, n=n: hadamard(x, block=n), (), xs)
        works[f"hadamard {n}"] = Work(4 * size)
    yield Contest(f"{shape[0]} x {shape[1]}", cases, works)


def _quantize(outer: jax.Array, x: jax.Array, *, format: Format, **options: Any) -> QTensor:
    return quantize(x, format, outer=outer if format.static else None, **options)


# ---------------------------------------------------------------- whole models


def decode(scale: Scale) -> Iterator[Contest]:
    """Tokens of a whole model one after the other, batch 1, weights in bfloat16 and in NVFP4."""
    config = LLAMA_8B if scale.gpu else SMALL | ({"num_hidden_layers": 4} if scale.quick else {})
    tokens = scale.pick(128, 64, 32, 16)
    family = find("models", "llama")
    empty = Model(config, {}, family)
    modules = [m for m in linears(empty, {}) if m != "lm_head"]
    found: dict[str, Timing | str] = {}
    works = {}
    for name, format in (("bf16", None), ("nvfp4", NVFP4())):
        schemes = {m: Scheme(format) for m in modules} if format else {}
        params = {}
        for i, (leaf, shape) in enumerate(empty.shapes.items()):
            if leaf.removesuffix(".weight") in schemes:
                params[leaf] = encoded(format, shape, i)
            else:
                params[leaf] = jnp.ones(shape, BF16) if len(shape) == 1 else normal(shape, i, by=0.02)
        model = Model(config, params, family, schemes=schemes)
        works[name] = Work(sum(a.nbytes for n, a in params.items() if "embed_tokens" not in n))
        try:
            found[name] = _generated(mojax.run(model), tokens)
        except Exception as error:  # whatever it is: the other model goes on
            found[name] = first_line(error)
        del params, model
    billions = sum(map(math.prod, empty.shapes.values())) / 1e9
    yield Contest(f"a token, {billions:.2f}B Llama", {}, works, found)


def _generated(runner: Any, tokens: int) -> Timing:
    """Seconds per token by `generate`'s own clock, the median of three; what runs the first packed linear."""
    rates = [runner.generate([[1, 2, 3, 4]], max_tokens=tokens).tokens_per_second for _ in range(3)]
    times = sorted(1 / rate for rate in rates)
    q = next((a for a in runner.model.params.values() if isinstance(a, QTensor)), None)
    ran = ""
    if q is not None:
        one = jax.ShapeDtypeStruct((1, q.shape[1]), BF16)
        ran = implementations(jax.jit(partial(matmul, dtype=BF16)).lower(one, q))
    return Timing(times[1], (times[2] - times[0]) / times[1], None, ran)


SECTIONS = {
    "matmul": matmuls,
    "scaled": scaled_products,
    "rounding": rounding,
    "grouped": grouped,
    "attention": attention,
    "decode": decode,
}
