"""How long it takes to find the sites of a large model, and what running through the interpreter costs.

    python tests/bench/tracing.py

The model is a mixture of experts of 48 layers and 121 billion parameters, unrolled, given as shapes alone.
The cost of the interpreter is the ratio of two compiled programs in one process: the function itself, and
the function through `intercept` with a hook that does nothing. Times are the least of several, interleaved.
"""

from __future__ import annotations

import functools
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax import load
from mojax.interpret import intercept
from mojax.models import qwen3_moe
from mojax.structure.coverage import coverage
from mojax.trace import graph, graph_sites

LARGE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def whole(family: Any, config: Any, params: Any, tokens: Any) -> Any:
    """Logits of all layers, one after the other."""
    x = family.embed(config, params, tokens)
    positions = jnp.arange(tokens.shape[1])
    for prefix, kind in family.blocks(config):
        local = {n.removeprefix(prefix): params[n] for n in params if n.startswith(prefix)}
        x = family.block(config, kind, local, x, positions)
    return family.head(config, params, x)


def large() -> None:
    """Trace, find every site and account for every parameter."""
    config = qwen3_moe.configure(LARGE)
    params = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in qwen3_moe.shapes(config).items()}
    count = sum(math.prod(p.shape) for p in params.values())
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    program = graph(functools.partial(whole, qwen3_moe, config), params, tokens)
    traced = time.perf_counter()
    found = graph_sites(program)
    sited = time.perf_counter()
    said = coverage(program)
    done = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert set(said) == set(params)
    print(
        f"{count / 1e9:.0f}B parameters in {len(params)} leaves, {len(program.ops)} operations, "
        f"{len(found)} sites: trace {traced - start:.2f} s, sites {sited - traced:.2f} s, coverage "
        f"{done - sited:.2f} s, together {done - start:.2f} s; {(after - before) / 1024:.0f} MB more memory"
    )


def least(programs: list[Callable[[], Any]], times: int) -> list[float]:
    """Seconds of each, the least of `times` rounds in which they take turns."""
    best = [math.inf] * len(programs)
    for _ in range(times):
        for i, run in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def overhead(name: str, fn: Callable, params: Any, *args: Any, times: int = 20) -> None:
    """Compile and run a function as it is and through the interpreter."""
    through = intercept(fn, lambda place: (None, None))
    compiled, seconds = [], []
    for program in (fn, lambda p, *a: through(p, *a)[0]):
        start = time.perf_counter()
        compiled.append(jax.jit(program).lower(params, *args).compile())
        seconds.append(time.perf_counter() - start)
    plain, ours = least([functools.partial(c, params, *args) for c in compiled], times)
    print(
        f"{name}: {1e3 * plain:.2f} ms as it is, {1e3 * ours:.2f} ms through the interpreter, ratio "
        f"{ours / plain:.3f}; trace and compile {seconds[0]:.2f} s and {seconds[1]:.2f} s"
    )


def main() -> None:
    large()
    model = load("tiny")
    params = {n: jnp.asarray(model.params[n]) for n in model.params}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4096, (4, 256)), jnp.int32)
    overhead("tiny Llama, 1024 tokens", functools.partial(whole, model.family, model.hyper), params, tokens)
    rng = np.random.default_rng(1)
    stack = {"w": jnp.asarray(rng.standard_normal((12, 512, 512)) / 25, jnp.float32)}
    x = jnp.asarray(rng.standard_normal((256, 512)), jnp.float32)

    def scanned(p: Any, x: Any) -> Any:
        return jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["w"])[0]

    overhead("scan of 12 rematerialised layers", scanned, stack, x)


if __name__ == "__main__":
    main()
