"""Train small language models like the built-in one on text that every machine has: Python's own.

    python tests/bench/train_tiny.py --seed=1                 dense: the built-in Llama, trained anew
    python tests/bench/train_tiny.py --seed=1 --kind=moe      Qwen3-MoE: 4 experts of 384, 2 for each token

One model, trained once, says little about a method; the same recipe on several says if an ordering holds.
The text is the standard library's docstrings, its sources and `pydoc_data/topics.py`; a paragraph that shares
eight words in a row with mojax's calibration or evaluation text is left out. Pieces of 256 tokens of the
built-in tokenizer, AdamW (arXiv 1711.05101), cosine rate, float32; the checkpoint is bfloat16. The functions
that are trained are those of `mojax.models`, so that architecture and checkpoint agree. What is printed and
written to training.json beside the model: loss on the evaluation text before and after. An interrupted run
goes on where it was; a model that is there already is not trained again. The default takes about a quarter of
an hour on one idle core.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import mojax
from mojax import experts, find, interpret, text

DATA = Path(mojax.__file__).parent / "data"
LENGTH, ROWS = 256, 4  # tokens of a piece, pieces of a step
SHARES = {"topics": 0.25, "docstrings": 0.45, "sources": 0.3}  # of the pieces of a step
SHINGLE = 8  # words in a row that training and held-out text may not have in common
BALANCE = 0.01  # weight of the load-balancing loss, arXiv 2101.03961 eq. 4


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mojax-bench"


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def documents() -> dict[str, list[str]]:
    """Docstrings, sources and topics of this Python, by kind, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = {kind: [] for kind in SHARES}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"} & set(parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        if parts[0] == "pydoc_data":
            scope: dict[str, Any] = {}
            exec(compile(tree, str(path), "exec"), scope)
            found["topics"] += [t for _, t in sorted(scope.get("topics", {}).items())]
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [s for n in ast.walk(tree) if isinstance(n, kinds) and (s := ast.get_docstring(n))]
        found["docstrings"] += ["\n\n".join(strings)] if strings else []
        found["sources"].append(source)
    return found


def streams(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Token ids of every kind of text, `[tokens]`, without what calibration and evaluation text hold."""
    held = [
        (DATA / "text" / f"{name}.txt").read_text(encoding="utf-8") for name in ("calibration", "evaluation")
    ]
    seen = set().union(*(shingles(re.findall(r"\w+", t)) for t in held))
    out = {}
    for kind, texts in documents().items():
        kept = [
            "\n\n".join(p for p in re.split(r"\n{2,}", t) if seen.isdisjoint(shingles(re.findall(r"\w+", p))))
            for t in texts
        ]
        encoded = tokenizer.encode_batch([t + "\n\n" for t in kept if t.strip()], add_special_tokens=False)
        out[kind] = np.concatenate([np.array(e.ids, np.int32) for e in encoded])
    return out


def pieces(found: dict[str, np.ndarray], seed: int, first: int) -> Iterator[np.ndarray]:
    """int32 `[ROWS, LENGTH]` for step `first` and those after it; each step has a seed of its own."""
    kinds = list(SHARES)
    for step in range(first, 1 << 30):
        rng = np.random.default_rng((seed, step))
        chosen = rng.choice(len(kinds), ROWS, p=[SHARES[k] for k in kinds])
        rows = []
        for kind in (found[kinds[i]] for i in chosen):
            at = rng.integers(len(kind) - LENGTH)
            rows.append(kind[at : at + LENGTH])
        yield np.stack(rows)


def configuration(kind: str) -> dict[str, Any]:
    """config.json: that of the built-in model, or its Qwen3-MoE sister of the same width and depth."""
    config = json.loads((DATA / "tiny" / "config.json").read_text())
    if kind == "moe":
        for key in ("mlp_bias", "pretraining_tp"):
            config.pop(key, None)
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 384,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": BALANCE,
        }
    return config


def initial(config: dict[str, Any], seed: int) -> dict[str, jax.Array]:
    """Norms one, the rest N(0, 0.02^2), what writes to the residual stream divided by sqrt(2 layers)."""
    family = find.find("models", config["model_type"])
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in family.shapes(family.configure(config)).items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / (2 * config["num_hidden_layers"]) ** 0.5 if writes else 0.02
        value = np.ones(shape) if "norm" in name else rng.normal(0, deviation, shape)
        out[name] = jnp.asarray(value, jnp.float32)
    return out


def loss(
    config: dict[str, Any], params: dict[str, jax.Array], tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Nats per token of the next tokens of `[rows, length]`, and the load-balancing loss (0 if dense)."""
    family = find.find("models", config["model_type"])
    hyper = family.configure(config)
    x = family.embed(hyper, params, tokens)
    balance = jnp.float32(0)
    for prefix, kind in family.blocks(hyper):
        local = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}

        def run(p: Any, x: jax.Array, kind: str = kind) -> jax.Array:
            return family.block(hyper, kind, p, x, jnp.arange(x.shape[1]))

        if hyper.experts is None:
            x = run(local, x)
        else:
            x, scores = interpret.intercept(run, router)(local, x)
            balance += sum(unbalanced(s, hyper.experts.per_token) for s in jax.tree.leaves(scores))
    logits = family.head(hyper, params, x)[:, :-1]
    lp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(lp, tokens[:, 1:, None], axis=-1)), balance


def router(place: interpret.Place) -> tuple[None, Any]:
    """Taps the scores of a router, float32 `[tokens, experts]`."""
    return None, place.run() if place.name.endswith("mlp.gate.weight") else None


def unbalanced(scores: jax.Array, per_token: int) -> jax.Array:
    """experts * sum_e f_e P_e: f the share of choices of expert e, P its mean probability; 1 at best."""
    probability = jax.nn.softmax(scores.reshape(-1, scores.shape[-1]), axis=-1)
    chosen = jax.lax.top_k(probability, per_token)[1]
    share = jnp.mean(jax.nn.one_hot(chosen, scores.shape[-1]), axis=(0, 1))
    return scores.shape[-1] * jnp.sum(share * jnp.mean(probability, axis=0))


def optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(100, steps // 10), steps, rate / 20)
    matrices = lambda params: {name: p.ndim > 1 for name, p in params.items()}  # noqa: E731
    adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def held_out(config: dict[str, Any], params: dict[str, jax.Array], sequences: int = 64) -> float:
    """Nats per token on mojax's evaluation text."""
    ids = text.tokens("builtin", DATA / "tiny", sequences=sequences, length=LENGTH, purpose="evaluation").ids
    step = jax.jit(lambda p, t: loss(config, p, t)[0])
    return float(np.mean([step(params, jnp.asarray(ids[i : i + ROWS])) for i in range(0, sequences, ROWS)]))


def save(out: Path, config: dict[str, Any], params: dict[str, jax.Array], facts: dict[str, Any]) -> None:
    """A Hugging Face folder, whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {}
    for name, value in params.items():
        array = np.asarray(value).astype(ml_dtypes.bfloat16)
        names = experts.expand(name, len(array))
        tensors |= dict(zip(names, array, strict=True)) if experts.starred(name) else {name: array}
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tiny" / name, partial / name)
    (partial / "training.json").write_text(json.dumps(facts, indent=1))
    partial.rename(out)


def keep(path: Path, step: int, state: Any) -> None:
    """Parameters and optimizer after `step` steps."""
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = path.with_suffix(".partial")
    save_file(leaves, partial, metadata={"step": str(step)})
    partial.rename(path)


def resumed(path: Path, state: Any) -> tuple[int, Any]:
    """What `keep` wrote, or step 0 and `state`."""
    if not path.exists():
        return 0, state
    leaves, structure = jax.tree.flatten(state)
    found = load_file(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    step = int(header["__metadata__"]["step"])
    return step, jax.tree.unflatten(structure, [jnp.asarray(found[str(i)]) for i in range(len(leaves))])


def train(kind: str, seed: int, steps: int, rate: float, out: Path, report: int = 100) -> None:
    """Train one model into the folder `out`."""
    config = configuration(kind)
    found = streams(Tokenizer.from_file(str(DATA / "tiny" / "tokenizer.json")))
    print({name: len(ids) for name, ids in found.items()}, "tokens", flush=True)
    rule = optimizer(steps, rate)
    params = initial(config, seed)
    checkpoint = out.with_name(f"{out.name}-{steps}.state")
    before = held_out(config, params)
    first, (params, state) = resumed(checkpoint, (params, rule.init(params)))
    print(f"loss on the evaluation text: {before:.3f} nats before; from step {first}", flush=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, tokens: Any) -> Any:
        def total(p: Any) -> tuple[jax.Array, jax.Array]:
            nats, balance = loss(config, p, tokens)
            return nats + BALANCE * balance, nats

        gradient, nats = jax.grad(total, has_aux=True)(params)
        change, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, change), state, nats

    start, recent = time.perf_counter(), []
    for step, tokens in zip(range(first, steps), pieces(found, seed, first), strict=False):
        params, state, nats = update(params, state, jnp.asarray(tokens))
        recent.append(float(nats))
        if (step + 1) % report == 0:
            seconds = (time.perf_counter() - start) / len(recent)
            print(
                f"step {step + 1}: {np.mean(recent[-report:]):.3f} nats, {seconds:.2f} s a step", flush=True
            )
            keep(checkpoint, step + 1, (params, state))
    params = {name: p.astype(jnp.bfloat16).astype(jnp.float32) for name, p in params.items()}
    after = held_out(config, params)
    print(f"loss on the evaluation text: {after:.3f} nats after {steps} steps", flush=True)
    python = platform.python_version()
    facts = {"kind": kind, "seed": seed, "steps": steps, "rate": rate, "python": python, "before": before}
    save(out, config, params, facts | {"after": after, "train": float(np.mean(recent[-report:] or [0]))})
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of the order of the text")
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    parser.add_argument("--steps", type=int, default=1500, help=f"of {ROWS} x {LENGTH} tokens each")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=cache() / "models", help="folder of the trained models")
    arguments = parser.parse_args()
    out = arguments.out / f"{arguments.kind}-{arguments.seed}"
    if (out / "model.safetensors").exists():
        print(f"{out}: there already; {(out / 'training.json').read_text()}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    train(arguments.kind, arguments.seed, arguments.steps, arguments.rate, out)
    print(out)


if __name__ == "__main__":
    main()
