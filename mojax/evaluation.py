"""How far a quantized model is from its source on the same tokens: KL, top-1 agreement, perplexity.

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v)), p the source, q the quantized model, in nats.

Both models run block by block, so that memory is two blocks and the activations, whatever the depth.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mojax import beside, flat
from mojax.calibration import batches, start
from mojax.checkpoint import Checkpoint
from mojax.compile import jit
from mojax.errors import InputError, NotFiniteError
from mojax.experts import Stacked
from mojax.model import Lazy, Model
from mojax.models.layers import Block
from mojax.program import head, run_block
from mojax.threads import each

CHUNK = 2**24  # logits at a time, in elements


class BrokenError(InputError):
    """The quantized model gives logits that are not finite, where its source's are finite."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was made, and how near it is to its source. None where there is no forward function.

    Attributes:
      kl_mean, kl_p99: nats, over tokens.
      top1_agreement: share of tokens whose likeliest next token is the source's.
      perplexity, perplexity_source: exp of the mean negative log-likelihood of the next token.
      bits_per_weight: 8 x bytes of all tensors / parameters of the source.
      bits_per_quantized_weight: the same over encoded tensors.
      seconds: wall time of everything.
      peak_rss_bytes: of this process.
      tokens: how many were evaluated; text: where they came from.
      worst: the ten encoded tensors farthest from the source, `{tensor, rel_error}`.
      steps: what the steps of the recipe did on their own objectives, see `mojax.outcomes.summary`.
      notes: what is right but worth knowing, and why something was not measured.
    """

    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    perplexity_source: float | None = None
    bits_per_weight: float | None = None
    bits_per_quantized_weight: float | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    tokens: int = 0
    text: str = ""
    worst: tuple[dict[str, Any], ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@jit()
def compare(p_logits: jax.Array, q_logits: jax.Array, targets: Any) -> tuple[jax.Array, ...]:
    """Per token of float32 logits `[tokens, vocabulary]` and targets int32 `[tokens]`.

    Returns:
      KL, agreement of the top choice, and the negative log-likelihoods of the target under p and q;
      `[tokens]`.
    """
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    nll = [-jnp.take_along_axis(lp, targets[:, None], axis=-1)[:, 0] for lp in (p, q)]
    return jnp.maximum(kl, 0.0), same, nll[0], nll[1]


def hidden(model: Model, tokens: np.ndarray, interrupted: Callable[[], bool]) -> list[jax.Array]:
    """The last block's output, in batches; quantized weights and inputs meet in kernels."""
    xs = start(model, tokens)
    for block in model.blocks:
        if interrupted():
            raise KeyboardInterrupt
        xs = through(model, block, xs)
    return xs


def through(model: Model, block: Block, xs: list[jax.Array]) -> list[jax.Array]:
    """Batches of one block's output from those of its input; nothing of the block is held when it returns."""
    params = jax.device_put(model.local(block))
    run = partial(run_block, model.program(block), params)
    out = [run(xs[0]), *each(run, xs[1:])]  # the first alone, so that it is compiled once
    return jax.block_until_ready(out)  # else the parameters of blocks to come are loaded meanwhile


def evaluate(
    model: Model,
    reference: Model,
    tokens: np.ndarray,
    *,
    text: str = "",
    interrupted: Callable[[], bool] = lambda: False,
) -> Report:
    """Compare a model with its source.

    Args:
      model: quantized, read back from disk or from `apply`.
      reference: its source.
      tokens: int32 `[sequences, length]`.
      text: where the tokens come from, for the report.
      interrupted: asked between blocks; KeyboardInterrupt if it says so.
    Raises:
      InputError: the two have different vocabularies, or the tokens do not fit them.
      NotFiniteError: the source's logits hold NaN or infinity. BrokenError: only the quantized model's do.
    """
    for name, found in (("model", model), ("reference", reference)):
        if not isinstance(found, Model):
            raise InputError(f"{name}: found {type(found).__name__}, needed a model of mojax.load")
    if not hasattr(tokens, "shape"):
        raise InputError(f"tokens: found {type(tokens).__name__}, needed int32 [sequences, length]")
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise InputError(
            f"tokens: shape is {list(tokens.shape)}, needed [sequences, length] with length of 2 or more"
        )
    sizes = [m.config.get("vocab_size") for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(f"vocab_size is {sizes[0]} here and {sizes[1]} in the reference: not the same model")
    if tokens.min() < 0 or (sizes[0] and tokens.max() >= sizes[0]):
        raise InputError(
            f"tokens: holds ids from {tokens.min()} to {tokens.max()}, the vocabulary has {sizes[0]}"
        )
    kl, same, nll_p, nll_q = per_token(model, reference, tokens, interrupted)
    return Report(
        kl_mean=float(kl.mean(dtype=np.float64)),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(same.mean()),
        perplexity=float(
            np.exp(nll_q[:, :-1].mean(dtype=np.float64))
        ),  # the last token of a piece has no next
        perplexity_source=float(np.exp(nll_p[:, :-1].mean(dtype=np.float64))),
        bits_per_weight=bits(model, reference),
        bits_per_quantized_weight=quantized_bits(model),
        peak_rss_bytes=peak_rss(),
        tokens=int(tokens.size),
        text=text,
    )


def per_token(
    model: Model, reference: Model, tokens: np.ndarray, interrupted: Callable[[], bool] = lambda: False
) -> tuple[np.ndarray, ...]:
    """What `compare` gives for every token, float32 or bool `[sequences, length]` each.

    Args:
      model, reference, tokens, interrupted: as in `evaluate`, which checks them. The last token of a sequence
        has no next one: its two negative log-likelihoods mean nothing.
    Raises:
      NotFiniteError, BrokenError: as in `evaluate`.
    """
    size = reference.config.get("vocab_size")
    pairs = zip(batches(tokens), *(hidden(m, tokens, interrupted) for m in (reference, model)), strict=True)
    outsides = reference.outside("head"), model.outside("head")
    heads = reference.head_program(), model.head_program()
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for ids, xp, xq in pairs:
        rows = max(1, CHUNK // (ids.shape[1] * int(size or 1)))
        for i in range(0, len(ids), rows):
            p = head(heads[0], outsides[0], xp[i : i + rows])
            q = head(heads[1], outsides[1], xq[i : i + rows])
            targets = np.roll(ids[i : i + rows], -1, axis=1).reshape(-1)
            values = compare(p.reshape(targets.size, -1), q.reshape(targets.size, -1), targets)
            for store, value in zip(parts, values, strict=True):
                store.append(np.asarray(value).reshape(-1, ids.shape[1]))
    kl, same, nll_p, nll_q = (np.concatenate(p) for p in parts)
    _finite(kl, nll_p)
    return kl, same, nll_p, nll_q


def _finite(kl: np.ndarray, nll_source: np.ndarray) -> None:
    """Raises for logits that are not finite: those of the source, or else those of the quantized model."""
    if np.isfinite(kl).all():
        return
    if not np.isfinite(nll_source).all():
        raise NotFiniteError(
            "the source gives logits that are not finite on this text; check the checkpoint or the text"
        )
    raise BrokenError("the quantized model gives logits that are not finite on this text")


def not_finite(model: Model) -> list[str]:
    """The float tensors of the source that hold NaN or infinity. Reads everything."""
    files = model.checkpoint if model.checkpoint is not None else model.params
    found = []
    for name in files:
        flat = np.asarray(files[name]).reshape(-1)
        if jnp.issubdtype(flat.dtype, jnp.floating) and not all(
            np.isfinite(flat[i : i + 2**22].astype(np.float32)).all() for i in range(0, flat.size, 2**22)
        ):
            found.append(name)
    return found


def bits(model: Model, reference: Model) -> float:
    """8 x bytes of all tensors / parameters of the source; a tied tensor counts once."""
    if model.checkpoint is not None and type(model.params) in (Checkpoint, Stacked, Lazy):
        size = sum(e.stop - e.start for e in model.checkpoint.entries.values())
    else:
        size = sum(leaf.nbytes for leaf in model.params.values())
    files = reference.checkpoint
    count = (
        sum(int(np.prod(files.spec(n).shape)) for n in files)
        if files
        else sum(int(np.prod(v.shape)) for v in reference.params.values())
    )
    return 8 * size / count


def quantized_bits(model: Model) -> float | None:
    """The same over encoded tensors; None when there are none."""
    size = count = 0
    for module in model.schemes:
        leaf = model.params[module + ".weight"]  # one at a time: some are copies
        size, count = size + leaf.nbytes, count + int(np.prod(leaf.shape))
        more = (*(beside.branch(model.params, module) or ()), *(flat.factors(model.params, module) or ()))
        size += sum(a.nbytes for a in more)
    return 8 * size / count if count else None


def peak_rss() -> int:
    """Bytes; the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worst(errors: Mapping[str, float], count: int = 10) -> tuple[dict[str, Any], ...]:
    """The tensors with the largest relative error."""
    ranked = sorted(errors.items(), key=lambda e: -e[1])[:count]
    return tuple({"tensor": n, "rel_error": round(e, 6)} for n, e in ranked)
