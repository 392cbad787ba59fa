"""A mixture of experts computes every token in its own experts, and what transformers computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from families_test import arrays, divergences, logits, reference, starred, tokens_for
from family_cases import MISSING, raw
from moe_models import tiny_mixtral, tiny_qwen3_moe

from mojax.find import find
from mojax.formats.nvfp4 import FORMAT as NVFP4
from mojax.model import decode
from mojax.models import layers


def read_starred(folder) -> dict[str, np.ndarray]:
    """A published checkpoint of one file as parameters."""
    table = starred(safetensors.numpy.load_file(folder / "model.safetensors"))
    return {name: np.stack(rows) if "*" in name else rows[0] for name, rows in table.items()}


def from_disk(folder, dtype: str, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers, which reads the checkpoint's names by itself."""
    import torch
    import transformers

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values())
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


MIXTURES = pytest.mark.parametrize(
    ("family", "write", "changes"),
    [
        ("mixtral", tiny_mixtral, {}),
        ("qwen3_moe", tiny_qwen3_moe, {}),
        ("qwen3_moe", tiny_qwen3_moe, {"mlp_only_layers": [0]}),
    ],
)


@MIXTURES
def test_a_published_mixture(family, write, changes, tmp_path):
    """transformers' logits in float32; in bfloat16 as close to them as transformers' own bfloat16 is.

    Rounding sends one token in a hundred to other experts, where KL is a thousand times larger: the median.
    """
    folder = write(tmp_path, **changes)
    module, config = find("models", family), json.loads((tmp_path / "config.json").read_text())
    params = read_starred(folder)
    assert {k: v.shape for k, v in params.items()} == module.shapes(module.configure(config))
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 128))
    run = jax.jit(lambda p, t: logits(module, config, p, t))
    exact, rounded = (from_disk(folder, dtype, tokens) for dtype in ("float32", "bfloat16"))
    full = np.asarray(run({k: v.astype(np.float32) for k, v in params.items()}, tokens))
    assert np.abs(full - exact).max() / np.abs(exact).max() < 2e-5
    ours = np.asarray(run(params, tokens))
    assert ours.dtype == np.float32
    pairs = {
        "float32||theirs": (exact, rounded),
        "float32||ours": (exact, ours),
        "ours||theirs": (ours, rounded),
    }
    noise, own, between = (float(np.median(divergences(*pair))) for pair in pairs.values())
    print(f"median KL {', '.join(pairs)}: {noise:.2e} {own:.2e} {between:.2e}")
    assert own < noise
    assert between < 1.2 * (own + noise)


def mixture(count: int = 8, per_token: int = 2, width: int = 16, hidden: int = 32, seed: int = 0):
    """A layer of experts and its float32 tensors."""
    e = layers.Experts(
        module="mlp",
        names=("gate_proj", "up_proj", "down_proj"),
        count=count,
        per_token=per_token,
        width=width,
        normalise=True,
        rounded=False,
    )
    rng = np.random.default_rng(seed)
    wide, narrow = (count, width, hidden), (count, hidden, width)
    table = {"gate": (count, hidden)} | {f"experts.*.{n}": wide for n in e.names[:2]}
    table |= {"experts.*.down_proj": narrow}
    return e, {
        f"mlp.{k}.weight": jnp.asarray(rng.standard_normal(s) / s[-1] ** 0.5, jnp.float32)
        for k, s in table.items()
    }


def by_hand(p: dict, x: np.ndarray, e: layers.Experts) -> np.ndarray:
    """Token by token and expert by expert, in float64; of equal experts the first."""
    gate, up, down = (np.asarray(p[f"mlp.experts.*.{n}.weight"], np.float64) for n in e.names)
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    out = np.zeros_like(rows)
    for row, y in zip(rows, out, strict=True):
        scores = np.asarray(p["mlp.gate.weight"], np.float64) @ row
        share = np.exp(scores - scores.max())
        chosen = np.argsort(-share, kind="stable")[: e.per_token]
        for i in chosen:
            a = gate[i] @ row
            y += share[i] / share[chosen].sum() * (down[i] @ (a / (1 + np.exp(-a)) * (up[i] @ row)))
    return out.reshape(x.shape)


def close(p: dict, x: np.ndarray, e: layers.Experts) -> np.ndarray:
    got, want = np.asarray(layers.moe(p, jnp.asarray(x), e, act="silu")), by_hand(p, x, e)
    assert np.abs(got - want).max() < 3e-6 * np.abs(want).max()
    return got


def hidden_states(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_one_token():
    e, p = mixture()
    close(p, hidden_states(1, 1, 32), e)


def test_experts_without_a_token():
    """The first, the last and some between get no row; their weights do not matter."""
    e, p = mixture(count=12)
    x = np.abs(hidden_states(2, 9, 32))
    p["mlp.gate.weight"] = p["mlp.gate.weight"].at[jnp.array([0, 4, 5, 11])].set(-1.0)
    want = close(p, x, e)
    for name in e.names:
        module = f"mlp.experts.*.{name}.weight"
        p[module] = p[module].at[jnp.array([0, 4, 5, 11])].set(7.0)
    np.testing.assert_array_equal(layers.moe(p, jnp.asarray(x), e, act="silu"), want)


def test_equal_shares_go_to_the_first_experts():
    """A token on which the router is undecided takes part in exactly `per_token` experts."""
    e, p = mixture(per_token=3)
    x = hidden_states(1, 6, 32)
    x[0, 2] = 0  # every score is 0
    _, chosen = layers.route(p, e, jnp.asarray(x[0]))
    assert chosen[2].tolist() == [0, 1, 2]
    close(p, x, e)
    p["mlp.gate.weight"] = jnp.zeros_like(p["mlp.gate.weight"])
    close(p, x, e)


def test_a_tie_where_either_choice_is_the_same_as_transformers():
    """Experts 1 and 5 are copies, router and all: whichever a tie takes, the sum is one."""
    import torch

    config = raw("mixtral", {})
    model = reference(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for w in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                w[5] = w[1]
    tokens = tokens_for(config)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).logits.numpy()
    params = {k: jnp.asarray(v) for k, v in arrays(model).items()}
    got = np.asarray(logits(find("models", "mixtral"), config, params, tokens))
    assert np.abs(got - want).max() / np.abs(want).max() < 2e-5


def test_the_experts_compute_the_rows_that_are_needed():
    """tokens * per_token rows in three grouped products, whatever the number of experts; no capacity."""
    e, p = mixture(count=16, per_token=3)
    x = jnp.asarray(hidden_states(2, 5, 32))
    program = jax.make_jaxpr(lambda p, x: layers.moe(p, x, e, act="silu"))(p, x)
    rows = [q.invars[0].aval.shape[0] for q in program.eqns if q.primitive.name == "ragged_dot_general"]
    assert rows == [2 * 5 * 3] * 3


def test_both_names_of_the_number_of_experts():
    """transformers 5 writes num_local_experts where published Qwen3-MoE files have num_experts."""
    module = find("models", "qwen3_moe")
    new = raw("qwen3_moe", {"num_experts": MISSING, "num_local_experts": 8})
    assert module.configure(new) == module.configure(raw("qwen3_moe", {}))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_shares_are_rounded_where_transformers_rounds_them(family):
    """In bfloat16, on scores that are whole numbers: Mixtral keeps float32 shares, Qwen3-MoE rounds them."""
    import torch

    config = raw(family, {})
    model = reference(config).to(torch.bfloat16)
    router = model.model.layers[0].mlp.gate
    rng = np.random.default_rng(0)
    w, x = (rng.integers(-1, 2, (n, config["hidden_size"])).astype(np.float32) for n in (8, 64))
    with torch.no_grad():
        router.weight.copy_(torch.from_numpy(w / 2))
        _, theirs, _ = router(torch.from_numpy(x).to(torch.bfloat16))
    e = find("models", family).configure(config).experts
    p = {f"{e.module}.gate.weight": jnp.asarray(w / 2, jnp.bfloat16)}
    shares, _ = layers.route(p, e, jnp.asarray(x, jnp.bfloat16))
    assert shares.dtype == jnp.float32
    np.testing.assert_allclose(shares, theirs.float().numpy(), rtol=1e-6)


def test_a_stack_is_decoded_expert_by_expert():
    q = NVFP4().spec((16, 256, 512), np.dtype(jnp.bfloat16), (2,), (0,))
    analysis = decode.lower(q).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < analysis.output_size_in_bytes / 4
