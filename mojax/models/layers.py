"""Layers that decoder families share: linear, RMSNorm, rotary embedding, attention, gated MLP, experts.

  rms_norm   y = g * x / sqrt(mean(x^2) + eps)                                   (arXiv 1910.07467)
  rotary     [a, b] -> [a cos - b sin, b cos + a sin], angle = position * f_i    (arXiv 2104.09864)
  attention  softmax(q k^T / sqrt(head_dim) + mask) v, key heads shared by groups of query heads
  gated MLP  down(act(gate(x)) * up(x))                                          (arXiv 2002.05202)
  experts    sum over the top k of softmax(router(x)), share_e * gated MLP_e(x)  (arXiv 2101.03961)

Values rest in the dtype of `x`; every dot, norm and softmax computes in float32 and rounds once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mojax.errors import InputError, nearest

Params = Mapping[str, Any]


class Block(NamedTuple):
    """One decoder layer: the prefix of its tensors' names, and which program it is."""

    prefix: str
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A Mixture-of-Experts layer.

    Attributes:
      module: name of the layer in its block; the router is `<module>.gate`.
      names: gate, up and down projection of an expert, `<module>.experts.*.<name>.weight`.
      count, per_token: experts there are, and experts that each token goes to.
      width: outputs of the gate and up projections.
      normalise: the shares of a token's experts are divided by their sum.
      rounded: the shares are rounded to the dtype of the hidden states.
    """

    module: str
    names: tuple[str, str, str]
    count: int
    per_token: int
    width: int
    normalise: bool
    rounded: bool


class Rope(NamedTuple):
    """Rotary embedding: one angular frequency per pair of dimensions, and a factor on cos and sin."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def _silu(x: jax.Array) -> jax.Array:
    return x * lax.logistic(x)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _relu(x: jax.Array) -> jax.Array:
    return lax.max(x, jnp.zeros_like(x))


ACTIVATIONS = {"silu": _silu, "swish": _silu, "gelu": _gelu, "gelu_pytorch_tanh": _gelu_tanh, "relu": _relu}

# [rows, in] x [experts, out, in] -> [rows, out]: the leaf is read as it lies, without a transpose
ROWS_BY_EXPERT = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))


def linear(p: Params, module: str, x: jax.Array, bias: bool = False) -> jax.Array:
    """`x [..., in]` times `<module>.weight [out, in]`, plus `<module>.bias [out]` before rounding."""
    w = p[f"{module}.weight"]
    y = lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if bias:
        y = y + lax.expand_dims(p[f"{module}.bias"].astype(jnp.float32), range(x.ndim - 1))
    return y.astype(x.dtype)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """`x [..., n]`, `gain [n]`; normalised in float32, rounded, then multiplied by the gain."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(lax.square(x32), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * lax.expand_dims(gain, range(x.ndim - 1))


def angles(rope: Rope, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin for `positions` int32 `[..., length]`, each `[..., length, 1, head_dim / 2]` in `dtype`."""
    frequencies = jnp.array(rope.frequencies, jnp.float32, ndmin=positions.ndim + 2)
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return (jnp.cos(angle) * rope.scale).astype(dtype), (jnp.sin(angle) * rope.scale).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x [batch, length, heads, head_dim]`: dimension i pairs with i + head_dim / 2."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = (t.reshape(-1, *t.shape[-3:]) for t in (cos, sin))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """Causal attention with grouped heads.

    Args:
      q: `[batch, length, heads, head_dim]`; heads is a multiple of kv_heads.
      k, v: `[batch, length, kv_heads, head_dim]`.
      positions: int32 `[length]`; a query sees the keys whose position is not above its own.
      window: a query sees only this many positions, its own included; None is all.
    Returns:
      `[batch, length, heads * head_dim]` in the dtype of q.
    """
    batch, length, heads, size = q.shape
    kv_heads, f32 = k.shape[2], jnp.float32
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = lax.dot_general(q, k, (((4,), (3,)), ((0, 2), (0, 2))), preferred_element_type=f32)
    scores = scores.astype(q.dtype).astype(f32) * size**-0.5  # [batch, kv_heads, length, group, keys]
    scores = scores.astype(q.dtype).astype(f32)
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(seen[None, None, :, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    y = lax.dot_general(weights, v, (((4,), (1,)), ((0, 1), (0, 2))), preferred_element_type=f32)
    return y.astype(q.dtype).transpose(0, 2, 1, 3, 4).reshape(batch, length, heads * size)


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int | None], jax.Array]


def attention(
    p: Params,
    x: jax.Array,
    positions: jax.Array,
    *,
    head_dim: int,
    rope: Rope,
    window: int | None = None,
    bias: bool = False,
    output_bias: bool = False,
    norm_eps: float | None = None,
    attend: Attend = attend,
) -> jax.Array:
    """Self-attention of a block on its normalised input `x [batch, length, hidden]`.

    The cache is named: keys after rotation are "self_attn.k_cache", values "self_attn.v_cache", both
    `[batch, length, kv_heads, head_dim]`.

    Args:
      p: the block's tensors, `self_attn.{q,k,v,o}_proj.weight` and biases.
      positions: int32 `[length]`, the same for every sequence of the batch, or `[batch, length]`.
      bias: q, k and v have biases; `output_bias`: o has one.
      norm_eps: if given, each head of q and k goes through RMSNorm (`q_norm`, `k_norm`) before rotation.
      attend: what `attend` of this file does; one that keeps keys and values takes its place.
    """
    q, k, v = (
        linear(p, f"self_attn.{name}_proj", x, bias).reshape(*x.shape[:2], -1, head_dim) for name in "qkv"
    )
    if norm_eps is not None:
        q = rms_norm(q, p["self_attn.q_norm.weight"], norm_eps)
        k = rms_norm(k, p["self_attn.k_norm.weight"], norm_eps)
    cos, sin = angles(rope, positions, x.dtype)
    k = checkpoint_name(rotate(k, cos, sin), "self_attn.k_cache")
    v = checkpoint_name(v, "self_attn.v_cache")
    return linear(p, "self_attn.o_proj", attend(rotate(q, cos, sin), k, v, positions, window), output_bias)


def gated_mlp(p: Params, x: jax.Array, *, act: str, bias: bool = False) -> jax.Array:
    """`mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))`; `act` is a key of ACTIVATIONS."""
    gate, up = (linear(p, f"mlp.{name}_proj", x, bias) for name in ("gate", "up"))
    hidden = ACTIVATIONS[act](gate.astype(jnp.float32)).astype(x.dtype) * up
    return linear(p, "mlp.down_proj", hidden, bias)


def route(p: Params, e: Experts, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shares and indices of the experts of each of `x [tokens, hidden]`, both `[tokens, per_token]`.

    The largest shares of a softmax over all experts in float32, largest first; of equal ones the first.
    """
    scores = linear(p, f"{e.module}.gate", x).astype(jnp.float32)
    shares, chosen = lax.top_k(jax.nn.softmax(scores, axis=-1), e.per_token)
    if e.normalise:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return (shares.astype(x.dtype).astype(jnp.float32) if e.rounded else shares), chosen


def grouped_linear(p: Params, module: str, x: jax.Array, groups: jax.Array) -> jax.Array:
    """`x [rows, in]`, sorted by expert, times each row's matrix of `<module>.weight [experts, out, in]`.

    Args:
      groups: int32 `[experts]`, how many rows each expert has; they sum to rows.
    """
    w = p[f"{module}.weight"]
    y = lax.ragged_dot_general(x, w, groups, ROWS_BY_EXPERT, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def moe(p: Params, x: jax.Array, e: Experts, *, act: str) -> jax.Array:
    """Every token through its own experts, `[batch, length, hidden]` to the same; none is dropped.

    Computes tokens * per_token rows, sorted by expert; an expert may have none. Outputs are summed in float32
    in the order of `route` and rounded once.

    Args:
      p: the block's tensors: the router `[experts, hidden]` and three leaves `[experts, out, in]`.
      act: a key of ACTIVATIONS.
    """
    tokens = x.reshape(-1, x.shape[-1])
    shares, chosen = route(p, e, tokens)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    groups = jnp.bincount(chosen.reshape(-1), length=e.count).astype(jnp.int32)
    rows = tokens[order // e.per_token]
    gate, up, down = (f"{e.module}.experts.*.{name}" for name in e.names)
    a, b = (grouped_linear(p, module, rows, groups) for module in (gate, up))
    y = grouped_linear(p, down, ACTIVATIONS[act](a.astype(jnp.float32)).astype(x.dtype) * b, groups)
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
    return jnp.sum(y * shares[:, :, None], axis=1).astype(x.dtype).reshape(x.shape)


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding of a config.json, by the rules of transformers' modeling_rope_utils.

    Reads `rope_scaling` and `rope_theta` (before transformers 5) or `rope_parameters`; the first wins.
    Frequencies are float32 arithmetic in transformers' order.

    Raises:
      InputError: a rope type, a partial rotation or a form that cannot be computed exactly; a missing key.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise InputError(
            f"config.json: {key} is {rope!r}, needed one flat mapping for all layers; "
            "this family has one rotary embedding"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise InputError(
            f"config.json: {key}.rope_type is {kind!r}, which mojax cannot compute{nearest(str(kind), ROPES)}"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise InputError(
            f"config.json: partial_rotary_factor is {partial}, needed 1 (rotate all of head_dim)"
        )
    if head_dim % 2:
        raise InputError(f"config.json: head_dim is {head_dim}, needed an even number to rotate pairs")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if not isinstance(theta, (int, float)) or theta <= 1:
        raise InputError(f"config.json: rope_theta is {theta!r}, needed a number above 1")
    powers = np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    top = {k: config.get(k) for k in ("max_position_embeddings", "original_max_position_embeddings")}
    values = {**rope, "rope_theta": float(theta)}
    length = top["original_max_position_embeddings"] or rope.get("original_max_position_embeddings")
    values["original_max_position_embeddings"] = length or top["max_position_embeddings"]
    values["max_position_embeddings"] = top["max_position_embeddings"]
    frequencies, scale = ROPES[kind](powers, _Keys(key, values))
    return Rope(tuple(float(f) for f in np.asarray(frequencies, np.float32)), float(scale))


class _Keys(NamedTuple):
    """The numbers of a rope mapping, with the name to put in errors."""

    key: str
    values: Mapping[str, Any]

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise InputError(f"config.json: {self.key}.{name} is {value!r}, needed a number above 0")
        return value


def _default(powers: np.ndarray, keys: _Keys) -> tuple[np.ndarray, float]:
    return 1 / powers, 1.0


def _linear(powers: np.ndarray, keys: _Keys) -> tuple[np.ndarray, float]:
    return 1 / powers / keys.number("factor"), 1.0


def _llama3(powers: np.ndarray, keys: _Keys) -> tuple[np.ndarray, float]:
    """Long waves are divided by the factor, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = (keys.number(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    length = keys.number("original_max_position_embeddings")
    f = 1 / powers
    wave = 2 * math.pi / f
    smooth = (length / wave - low) / (high - low) if high != low else np.zeros_like(f)
    between = (1 - smooth) * f / factor + smooth * f
    return np.where(wave > length / low, f / factor, np.where(wave < length / high, f, between)), 1.0


def _yarn(powers: np.ndarray, keys: _Keys) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): a ramp from kept to interpolated frequencies, a factor on cos and sin."""
    length, theta = keys.number("original_max_position_embeddings"), keys.number("rope_theta")
    size = 2 * len(powers)
    if keys.values.get("factor") is None:
        factor = keys.number("max_position_embeddings") / length
    else:
        factor = keys.number("factor")

    def dimension(rotations: float) -> float:
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def growth(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low = dimension(keys.values.get("beta_fast") or 32)
    high = dimension(keys.values.get("beta_slow") or 1)
    if keys.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    scale = keys.values.get("attention_factor")
    if scale is None:
        m, m_all = keys.values.get("mscale"), keys.values.get("mscale_all_dim")
        scale = growth(m) / growth(m_all) if m and m_all else growth()
    return 1 / (factor * powers) * (1 - kept) + 1 / powers * kept, scale


ROPES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
