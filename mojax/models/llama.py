"""The Llama family (model_type "llama"), and the decoder that the other families configure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mojax.errors import InputError, nearest
from mojax.models import layers
from mojax.models.layers import Block, Experts, Params, Rope

FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
KEEP = ("lm_head.weight", "model.embed_tokens.weight")
DENSE = "_dense"  # ends the kind of a block that has a gated MLP where others have experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the decoder needs; fields carry their names in config.json, the last six are derived.

    Attributes:
      layer_types: per layer "full_attention" or "sliding_attention", the kinds of its blocks; in a model with
        experts followed by "_dense" where the layer has none.
      sliding_window: positions that a query of a sliding layer sees, its own included.
      qkv_bias, output_bias, mlp_bias: which linears have a bias.
      qk_norm: each head of q and k goes through RMSNorm.
      experts: what takes the place of the gated MLP; None is nothing.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """`config[key]`, or the default when it is missing or null; InputError unless an int above 0."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}, needed an integer above 0")
    return value


def read(config: Mapping[str, Any], **family: Any) -> Config:
    """A Config from config.json with transformers' defaults; `family` sets the fields a family decides.

    Raises:
      InputError: a key is missing, or has a value that this decoder cannot compute exactly.
    """
    if config.get("per_layer_config"):
        raise InputError("config.json: per_layer_config is set, needed one configuration for all layers")
    heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
    act = config.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in layers.ACTIVATIONS:
        raise InputError(
            f"config.json: hidden_act is {act!r}, which mojax cannot compute"
            f"{nearest(str(act), layers.ACTIVATIONS)}"
        )
    eps = config.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise InputError(f"config.json: rms_norm_eps is {eps!r}, needed a small number such as 1e-6")
    fields = {
        "num_key_value_heads": size(config, "num_key_value_heads", heads),
        "head_dim": size(config, "head_dim", hidden // heads),
        "sliding_window": None,
        "layer_types": ("full_attention",) * size(config, "num_hidden_layers"),
        **family,
    }
    if heads % fields["num_key_value_heads"]:
        raise InputError(
            f"config.json: num_attention_heads is {heads}, needed a multiple of num_key_value_heads "
            f"({fields['num_key_value_heads']})"
        )
    return Config(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        num_attention_heads=heads,
        hidden_act=act,
        rms_norm_eps=float(eps),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=layers.read_rope(config, fields["head_dim"]),
        **fields,
    )


def configure(config: Mapping[str, Any]) -> Config:
    """Config from a raw config.json; InputError names the key of anything that cannot be done exactly."""
    bias = bool(config.get("attention_bias", False))
    return read(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model; a tied `lm_head.weight` is absent, experts are one `*`."""
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for prefix, kind in blocks(c):
        local = _attention_shapes(c) | (_expert_shapes(c, e) if (e := _experts(c, kind)) else _mlp_shapes(c))
        table |= {prefix + name: shape for name, shape in local.items()}
    table["model.norm.weight"] = (c.hidden_size,)
    return table if c.tie_word_embeddings else table | {"lm_head.weight": (c.vocab_size, c.hidden_size)}


def _experts(c: Config, kind: str) -> Experts | None:
    return None if kind.endswith(DENSE) else c.experts


def _expert_shapes(c: Config, e: Experts) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{e.module}.experts.*.{name}.weight" for name in e.names)
    wide = (e.count, e.width, c.hidden_size)
    router = {f"{e.module}.gate.weight": (e.count, c.hidden_size)}
    return router | {gate: wide, up: wide, down: (e.count, c.hidden_size, e.width)}


def _linear_shapes(linears: dict[str, tuple[int, int, bool]]) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {f"{m}.weight": (o, i) for m, (o, i, _) in linears.items()}
    return table | {f"{m}.bias": (o,) for m, (o, _, bias) in linears.items() if bias}


def _mlp_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner = c.hidden_size, c.intermediate_size
    sides = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return _linear_shapes({f"mlp.{name}_proj": (o, i, c.mlp_bias) for name, (o, i) in sides.items()})


def _attention_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Those of the norms as well."""
    hidden = c.hidden_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linears = {
        "self_attn.q_proj": (q, hidden, c.qkv_bias),
        "self_attn.k_proj": (kv, hidden, c.qkv_bias),
        "self_attn.v_proj": (kv, hidden, c.qkv_bias),
        "self_attn.o_proj": (hidden, q, c.output_bias),
    }
    local = _linear_shapes(linears)
    local |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if c.qk_norm:
        local |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    return local


def blocks(c: Config) -> tuple[Block, ...]:
    """The decoder layers in order."""
    return tuple(Block(f"model.layers.{i}.", kind) for i, kind in enumerate(c.layer_types))


def embed(c: Config, p: Params, tokens: jax.Array) -> jax.Array:
    """`[batch, length, hidden]` in the dtype of the weights; a token outside the vocabulary gives NaN.

    Args:
      p: by full name.
      tokens: int32 `[batch, length]`.
    """
    table = jnp.asarray(p["model.embed_tokens.weight"])
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def block(
    c: Config,
    kind: str,
    p: Params,
    x: jax.Array,
    positions: jax.Array,
    attend: layers.Attend = layers.attend,
) -> jax.Array:
    """One decoder layer, `[batch, length, hidden]` to the same.

    Args:
      kind: from `blocks`.
      p: the layer's tensors, named without the layer's prefix.
      positions: int32 `[length]`, the same for every sequence of the batch, or `[batch, length]`.
      attend: as in `layers.attention`.
    """
    y = layers.rms_norm(x, p["input_layernorm.weight"], c.rms_norm_eps)
    x = x + layers.attention(
        p,
        y,
        positions,
        head_dim=c.head_dim,
        rope=c.rope,
        window=c.sliding_window if kind.startswith("sliding_attention") else None,
        bias=c.qkv_bias,
        output_bias=c.output_bias,
        norm_eps=c.rms_norm_eps if c.qk_norm else None,
        attend=attend,
    )
    y = layers.rms_norm(x, p["post_attention_layernorm.weight"], c.rms_norm_eps)
    if e := _experts(c, kind):
        return x + layers.moe(p, y, e, act=c.hidden_act)
    return x + layers.gated_mlp(p, y, act=c.hidden_act, bias=c.mlp_bias)


def head(c: Config, p: Params, x: jax.Array) -> jax.Array:
    """Logits float32 `[batch, length, vocab]`, not rounded to the dtype of `x`; `p` by full name."""
    y = layers.rms_norm(x, p["model.norm.weight"], c.rms_norm_eps)
    w = p["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return lax.dot_general(y, w, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
