"""Twins of a model: the same function, with outliers of a known kind planted in its weights.

    python tests/bench/twins.py MODEL OUT --kind=S      channels scaled: what SmoothQuant and AWQ undo exactly
    python tests/bench/twins.py MODEL OUT --kind=R      the PCA basis: what a Hadamard rotation undoes
    python tests/bench/twins.py MODEL OUT --kind=C      nothing but the dtype: the control

S  in 2 % of channels a factor alpha, log-uniform in [8, 64], goes from readers to the gain of their norm,
   from o's columns to v's rows (query heads that share a value head share alpha), from down's columns to up's
   rows.
R  the gains of norms go into their readers, the residual stream is rotated into the eigenbasis of its second
   moment (the head is untied), and so is the value of each head.
Neither says who is best on a real model: S proves that scaling is implemented, R that rotation is. Twins are
float32; S with --dtype=bfloat16 takes powers of two for alpha, which are exact. Prints the largest change of
a logit, which must be under 1e-4 of the largest logit, or nothing is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import mojax
from mojax import experts, text
from mojax.models import layers

SHARE, LOW, HIGH = 0.02, 8.0, 64.0
BOUND = 1e-4  # of the largest logit

Params = dict[str, np.ndarray]


def readers(names: Any, prefix: str, norm: str) -> list[str]:
    """The weights of a block that read the output of one of its two norms; routers of experts too."""
    ends = {
        "input_layernorm": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "post_attention_layernorm": (
            *("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight"),
            *("mlp.gate.weight", "block_sparse_moe.gate.weight"),
        ),
    }[norm]
    return [n for n in names if n.startswith(prefix) and n.endswith(ends)]


def pairs(names: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Weights of a block without anything but a product between them: (up, down)."""
    for up, down in (("up_proj.weight", "down_proj.weight"), ("w3.weight", "w2.weight")):
        yield from ((n, n.removesuffix(up) + down) for n in names if n.startswith(prefix) and n.endswith(up))


def factors(rng: np.random.Generator, shape: tuple[int, ...], exact: bool) -> np.ndarray:
    """Ones, and alpha in 2 % of the channels of the last axis, at least one of them."""
    out = np.ones(shape)
    for row in out.reshape(-1, shape[-1]):
        chosen = rng.choice(shape[-1], max(1, round(SHARE * shape[-1])), replace=False)
        alpha = np.exp2(rng.uniform(np.log2(LOW), np.log2(HIGH), len(chosen)))
        row[chosen] = np.exp2(np.round(np.log2(alpha))) if exact else alpha
    return out


def scale(model: Any, params: Params, seed: int, exact: bool, layer: int | None = None) -> None:
    """The twin S, in place; in one layer, or in all."""
    rng, hyper = np.random.default_rng(seed), model.hyper
    for prefix in (b.prefix for i, b in enumerate(model.blocks) if layer in (None, i)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            alpha = factors(rng, (hyper.hidden_size,), exact)
            params[f"{prefix}{norm}.weight"] *= alpha
            for name in readers(params, prefix, norm):
                params[name] /= alpha
        value, out = (f"{prefix}self_attn.{n}_proj" for n in "vo")
        alpha = factors(rng, (hyper.num_key_value_heads, hyper.head_dim), exact)
        for name in (f"{value}.weight", f"{value}.bias"):
            if name in params:
                params[name] *= alpha.reshape(-1, *(1,) * (params[name].ndim - 1))
        shared = np.repeat(alpha, hyper.num_attention_heads // hyper.num_key_value_heads, axis=0)
        params[f"{out}.weight"] /= shared.reshape(-1)
        for up, down in pairs(params, prefix):
            alpha = factors(rng, params[up].shape[:-1], exact)
            params[up] *= alpha[..., None]
            params[down] /= alpha[..., None, :]
            if (bias := up.removesuffix("weight") + "bias") in params:
                params[bias] *= alpha


def moments(model: Any, params: Params, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Second moments of the residual stream `[hidden, hidden]`, of each block's values `[heads, d, d]`."""
    hyper, family = model.hyper, model.family
    single = {n: jnp.asarray(p, jnp.float32) for n, p in params.items()}
    x = family.embed(hyper, single, jnp.asarray(tokens))
    total, values = np.zeros((hyper.hidden_size,) * 2), {}
    for prefix, kind in model.blocks:
        local = {n.removeprefix(prefix): p for n, p in single.items() if n.startswith(prefix)}
        y = layers.rms_norm(x, local["input_layernorm.weight"], hyper.rms_norm_eps)
        v = layers.linear(local, "self_attn.v_proj", y, hyper.qkv_bias)
        v = np.asarray(v, np.float64).reshape(-1, hyper.num_key_value_heads, hyper.head_dim)
        values[prefix] = np.einsum("thi,thj->hij", v, v)
        x = family.block(hyper, kind, local, x, jnp.arange(tokens.shape[1]))
        flat = np.asarray(x, np.float64).reshape(-1, hyper.hidden_size)
        total += flat.T @ flat
    return total, values


def fold(model: Any, params: Params) -> None:
    """Gains of norms into what reads them; the head gets a matrix of its own."""
    head = params.pop("lm_head.weight", params["model.embed_tokens.weight"].copy())
    gain = params["model.norm.weight"]
    params["lm_head.weight"] = head * gain
    params["model.norm.weight"] = np.ones_like(gain)
    for prefix in (b.prefix for b in model.blocks):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = params[f"{prefix}{norm}.weight"]
            for name in readers(params, prefix, norm):
                params[name] = params[name] * gain
            params[f"{prefix}{norm}.weight"] = np.ones_like(gain)


def rotate(model: Any, params: Params, tokens: np.ndarray) -> float:
    """The twin R, in place; the share of the residual stream's energy in its first direction."""
    total, values = moments(model, params, tokens)
    fold(model, params)
    energy, basis = np.linalg.eigh(total)
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    ends = ("o_proj.weight", "down_proj.weight", "w2.weight", "o_proj.bias", "down_proj.bias")
    norms = ("input_layernorm", "post_attention_layernorm")
    reading = {n for b in model.blocks for norm in norms for n in readers(params, b.prefix, norm)}
    for name, value in params.items():
        if name in outside or name in reading:
            params[name] = value @ basis
        elif name.endswith(ends):
            params[name] = basis.T @ value  # a bias too
    group = model.hyper.num_attention_heads // model.hyper.num_key_value_heads
    for prefix, second in values.items():
        heads = np.linalg.eigh(second)[1]  # [kv_heads, d, d]
        name, out = f"{prefix}self_attn.v_proj", f"{prefix}self_attn.o_proj.weight"
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in params:
                rows = params[part].reshape(*heads.shape[:2], -1)
                params[part] = np.einsum("hij,hik->hjk", heads, rows).reshape(params[part].shape)
        columns = params[out].reshape(len(params[out]), -1, heads.shape[1])
        shared = np.repeat(heads, group, axis=0)
        params[out] = np.einsum("nhi,hij->nhj", columns, shared).reshape(params[out].shape)
    return float(energy[-1] / energy.sum())


def logits(family: Any, config: dict[str, Any], params: Params, tokens: np.ndarray) -> np.ndarray:
    """In float32, whatever the dtype of the checkpoint."""
    hyper = family.configure(config)
    single = {n: jnp.asarray(np.asarray(p, np.float32)) for n, p in params.items()}
    x = family.embed(hyper, single, jnp.asarray(tokens))
    for prefix, kind in family.blocks(hyper):
        local = {n.removeprefix(prefix): p for n, p in single.items() if n.startswith(prefix)}
        x = family.block(hyper, kind, local, x, jnp.arange(tokens.shape[1]))
    return np.asarray(family.head(hyper, single, x))


def save(out: Path, source: Path, config: dict[str, Any], params: Params) -> None:
    """A Hugging Face folder beside the source's tokenizer, whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {}
    for name, value in params.items():
        names = experts.expand(name, len(value))
        tensors |= dict(zip(names, value, strict=True)) if experts.starred(name) else {name: value}
    tensors = {n: np.ascontiguousarray(v) for n, v in tensors.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.glob("*.json"):
        if path.name.startswith(("tokenizer", "generation")):
            shutil.copy(path, partial / path.name)
    partial.rename(out)


def make(
    source: str, out: Path, kind: str, seed: int = 0, dtype: str = "float32", layer: int | None = None
) -> float:
    """Write a twin; the largest change of a logit, relative to the largest logit."""
    model = mojax.load(source)
    assert model.checkpoint is not None and model.family is not None
    folder, config = model.checkpoint.folder, dict(model.config) | {"dtype": dtype}
    config.pop("torch_dtype", None)
    params = {name: np.asarray(model.params[name]).astype(np.float64) for name in model.params}
    pieces = {"sequences": 16, "length": 256}
    judged = text.tokens("builtin", folder, **pieces, purpose="evaluation").ids
    before = logits(model.family, dict(model.config), params, judged)
    if kind == "S":
        scale(model, params, seed, dtype == "bfloat16", layer)
    elif kind == "R":
        seen = text.tokens("builtin", folder, **pieces, purpose="calibration").ids
        print(f"energy in the first direction of the residual stream: {rotate(model, params, seen):.1%}")
        config["tie_word_embeddings"] = False
    written = {
        n: p.astype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]) for n, p in params.items()
    }
    after = logits(model.family, config, written, judged)
    change = float(np.abs(after - before).max())
    relative = change / float(np.abs(before).max())
    print(f"largest change of a logit: {change:.2e}, {relative:.2e} of the largest; bound {BOUND:.0e}")
    if not relative < BOUND:
        raise SystemExit(
            f"{out}: not the same function as {source}; a twin {kind} in {dtype} cannot be written"
        )
    save(out, folder, config, written)
    return relative


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, or 'tiny'")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=("S", "R", "C"), required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the channels and factors of S")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layer", type=int, help="S in this layer alone")
    arguments = parser.parse_args()
    if arguments.layer is not None and arguments.kind != "S":
        parser.error("--layer goes with --kind=S")
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already")
    jax.config.update("jax_default_matmul_precision", "highest")
    make(arguments.model, arguments.out, arguments.kind, arguments.seed, arguments.dtype, arguments.layer)


if __name__ == "__main__":
    main()
