"""Steps that choose scales, of weights and of inputs: none gets worse, and each does what it says."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mojax
from mojax import calibration, pipeline
from mojax.errors import InputError
from mojax.formats.base import Scheme
from mojax.formats.fp8 import FP8
from mojax.formats.int4 import INT4
from mojax.formats.int8 import INT8
from mojax.formats.mxfp4 import MXFP4
from mojax.formats.nvfp4 import NVFP4
from mojax.input_scales import Part, Seen, edges
from mojax.matrices import Matrix, own_outer
from mojax.recipe import load_recipe
from mojax.rounding.scales import ROOM, cost, local, search
from mojax.trace import Site
from mojax.transforms import (
    awq_clip,
    clip,
    entropy,
    four_over_six,
    headroom,
    local_hessian,
    mse,
    percentile,
    sweep,
)
from mojax.transforms.base import Context

RNG = np.random.default_rng(0)
BF16 = np.dtype(ml_dtypes.bfloat16)
NV = NVFP4(arithmetic="checkpoint")
FORMATS = (NV, INT4(group=32, symmetric=False), MXFP4(), FP8("channel"))


def matrix(format=NV, out=24, width=64, **stats):
    w = (RNG.standard_normal((out, width)) * np.exp(RNG.standard_normal((out, 1)))).astype(BF16)
    x = RNG.standard_normal((200, width)).astype(np.float32) * np.exp(RNG.standard_normal(width)).astype(
        np.float32
    )
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    seen = {"gram": x.T @ x, "count": np.int64(200), "sumsq": np.square(x).sum(0)}
    scales = format.fit(jnp.asarray(w), own_outer(format, np.float32(np.abs(np.float32(w)).max()), BF16))
    return Matrix("w.weight", 0, w, format, scales, None, seen | stats)


def error(m, scales, importance=None):
    """Of the output, or of the weights: in NumPy, from what the codes decode to."""
    d = np.asarray(m.format.decode(m.format.encode_as(jnp.asarray(m.w), scales))) - np.float32(m.w)
    if importance is None:
        return np.square(d).sum(-1)
    blocks = d.reshape(len(d), importance.shape[0], -1)
    return np.einsum("rbi,bij,rbj->rb", blocks, importance, blocks)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.label + f.arithmetic[0])
def test_no_search_is_worse_than_the_maximum(format):
    m = matrix(format)
    h = np.asarray(local(jnp.asarray(m.stats["gram"]), np.shape(m.format.step(m.scales))[-1]))
    made = {
        "mse": mse.solve(m, low=0.5, high=1.25, count=20, weighted=False),
        "weighted": mse.solve(m, low=0.5, high=1.25, count=20, weighted=True),
        "sweep": sweep.solve(m),
        "local_hessian": local_hessian.solve(m, low=0.5, high=1.75, count=32, damping=0.01),
        "awq_clip": awq_clip.solve(m, low=0.5, count=12),
    }
    for name, solved in made.items():
        assert solved.after <= solved.before, name
    slack = 1.01  # the quotient by a scale is rounded on the way to codes, and not in the search
    assert (error(m, made["mse"].scales) <= slack * error(m, m.scales)).all()
    assert (error(m, made["awq_clip"].scales, h) <= slack * error(m, m.scales, h)).all()
    assert made["mse"].after < 0.999 * made["mse"].before
    assert made["awq_clip"].after < made["awq_clip"].before
    assert made["local_hessian"].scales["inner"].dtype == m.scales["inner"].dtype


def test_a_bounded_sweep_finds_the_best_of_all_codes():
    m = matrix()
    every = jnp.broadcast_to(
        jnp.asarray(np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)), (24, 4, 126)
    )
    best = search(NV, jnp.asarray(m.w), m.scales, every)
    made = sweep.solve(m)
    np.testing.assert_allclose(made.after, cost(NV, jnp.asarray(m.w), best), rtol=1e-6)
    assert made.after < 0.95 * made.before
    assert "mse searches" in sweep.solve(matrix(INT8())).note


def test_the_local_hessian_of_independent_inputs_is_weighted_least_squares():
    h = np.diag(np.exp(RNG.standard_normal(64))).astype(np.float32) * 200
    m = matrix(gram=h, sumsq=np.diagonal(h))
    options = {"low": 0.5, "high": 1.75, "count": 32}
    a = local_hessian.solve(m, damping=1e-6, **options)
    b = mse.solve(m, weighted=True, **options)
    same = np.asarray(a.scales["inner"]).astype(np.float32) == np.asarray(b.scales["inner"]).astype(
        np.float32
    )
    assert same.mean() > 0.99  # but for ties within rounding
    np.testing.assert_allclose(a.after, b.after * 200, rtol=1e-3)
    assert b.after < mse.solve(m, weighted=False, **options).after * 200


def test_a_search_starts_from_the_scales_of_the_step_before():
    m = matrix()
    half = {**m.scales, "inner": NV.rescaled(m.scales, jnp.float32(0.7))}
    m = m._replace(scales=half)
    made = sweep.solve(m)
    assert made.before == pytest.approx(cost(NV, jnp.asarray(m.w), half))
    assert made.after < made.before


def test_four_over_six_is_never_worse_and_ties_go_to_six():
    w = np.zeros((2, 16), np.float32)
    w[0, :4], w[1, :4] = [8, 6, 4, 2], [6, 4, 3, 2]  # 6 / 8 of the maximum exists under 4 alone
    amax = np.float32(8)
    m = matrix()._replace(
        w=w.astype(BF16), scales=NV.fit(jnp.asarray(w, BF16), four_over_six.outer(NV, amax, BF16))
    )
    made = four_over_six.solve(m)
    step = np.asarray(NV.step(made.scales))
    np.testing.assert_allclose(step[:, 0], [8 / 4, 6 / 6], rtol=0.04)
    assert (error(m, made.scales) <= error(m, m.scales)).all() and made.after < made.before
    tie = np.zeros((1, 16), np.float32)
    tie[0, 0] = 12  # exact under both
    exact = NVFP4()
    scales = exact.fit(jnp.asarray(tie), exact.outer(np.float32(ROOM * 12), np.dtype(np.float32)))
    m = m._replace(format=exact, w=tie, scales=scales)
    np.testing.assert_array_equal(four_over_six.solve(m).scales["inner"], m.scales["inner"])
    big = matrix()
    big = big._replace(
        scales=NV.fit(jnp.asarray(big.w), four_over_six.outer(NV, np.abs(np.float32(big.w)).max(), BF16))
    )
    assert four_over_six.solve(big).after < 0.97 * four_over_six.solve(big).before
    assert np.asarray(four_over_six.solve(big).scales["inner"]).astype(np.float32).max() <= 448
    assert "is for nvfp4" in four_over_six.solve(matrix(INT8())).note


def test_experts_that_nobody_saw_keep_or_least_squares():
    m = matrix(gram=np.zeros((64, 64), np.float32), count=np.int64(0))
    assert "nothing is clipped" in awq_clip.solve(m, low=0.5, count=12).note
    plain = mse.solve(m, low=0.5, high=1.75, count=32, weighted=False)
    made = local_hessian.solve(m, low=0.5, high=1.75, count=32, damping=0.01)
    np.testing.assert_array_equal(made.scales["inner"], plain.scales["inner"])
    assert "least squares" in made.note


def seen(x, format, out=8):
    """An input `x [tokens, in]` of two weights."""
    histogram = np.asarray(calibration.STATISTICS["histogram"].take(jnp.asarray(x)))
    stats = {"absmax": np.abs(x).max(0), "count": np.int64(len(x)), "sample": x, "histogram": histogram}
    weights = tuple(jnp.asarray(RNG.standard_normal((out, x.shape[1])), jnp.bfloat16) for _ in range(2))
    return Seen("w.weight", format, BF16, float(np.abs(x).max()), (Part(weights, stats),))


def spiky(tokens=400, width=32, spike=300.0):
    x = RNG.standard_normal((tokens, width)).astype(np.float32)
    x[7, 3] = spike
    return x


SHARES = (1.0, *np.linspace(0.08, 1, 30)[:-1].tolist())


@pytest.mark.parametrize("format", [INT8("tensor"), FP8("tensor"), NV], ids=lambda f: f.name)
def test_clipping_takes_the_least_error_of_the_outputs(format):
    for x in (spiky(), RNG.standard_normal((300, 32)).astype(np.float32), spiky(spike=9.0)):
        s = seen(x, format)
        made = clip.solve(s, shares=SHARES, rows=10**6)
        assert made.after <= made.before and made.top <= s.top
        w = np.concatenate([np.float32(v) for v in s.parts[0].weights])
        plain = jnp.asarray(x, jnp.bfloat16)

        def far(top, plain=plain, w=w):
            q = np.float32(format.fake(plain, format.outer(np.float32(top), BF16)))
            return np.square((q - np.float32(plain)) @ w.T).sum()

        np.testing.assert_allclose([made.before, made.after], [far(s.top), far(made.top)], rtol=1e-3)
        np.testing.assert_allclose(
            made.after, min(far(np.float32(s.top) * np.float32(m)) for m in SHARES), rtol=1e-3
        )
    if format.name == "int8":
        assert clip.solve(seen(spiky(spike=9.0), format), shares=SHARES, rows=400).top < 9


def test_percentile_100_is_the_maximum_and_less_clips():
    x = spiky(tokens=2000)
    s = seen(x, INT8("tensor"))
    assert percentile.solve(s, percent=100).top == s.top
    wide = percentile.at(s.parts[0].stats["histogram"], x.size, 100)
    assert s.top <= wide <= s.top * 2 ** (1 / 64) * 1.0001
    tops = [percentile.solve(s, percent=p).top for p in (90, 99, 99.9, 99.99, 100)]
    assert tops == sorted(tops)
    for p, top in zip((90, 99, 99.9), tops, strict=False):
        true = np.percentile(np.abs(x), p)
        assert true * 0.99 <= top <= true * 1.03
    assert tops[3] < 10 < s.top
    assert "of the maximum" in percentile.solve(s, percent=99).note


def test_zeros_count_for_a_percentile_however_many_rows_were_padded():
    x = spiky(tokens=500)
    s = seen(x, INT8("tensor"))
    stats = dict(s.parts[0].stats)
    stats["histogram"] = stats["histogram"] + np.eye(1, 4096, dtype=np.int64)[0] * 10**6
    padded = s._replace(parts=(s.parts[0]._replace(stats=stats),))
    assert percentile.solve(padded, percent=99).top == percentile.solve(s, percent=99).top


def test_the_edges_of_a_histogram_are_those_of_calibration():
    e = edges(calibration.OCTAVES * calibration.BINS)
    for i in (700, 2560, 3000):
        found = calibration.STATISTICS["histogram"].take(
            jnp.asarray([[np.float32((e[i] * e[i + 1]) ** 0.5)]])
        )
        assert int(found[i]) == 1


def test_entropy_clips_what_hardly_occurs():
    gauss = RNG.standard_normal((4000, 32)).astype(np.float32)
    made = entropy.solve(seen(gauss, INT8("tensor")), stride=16)
    assert made.after <= made.before and made.top > 2.5
    spikes = gauss.copy()
    spikes[::1000, 0] = 60
    made = entropy.solve(seen(spikes, INT8("tensor")), stride=16)
    assert 3 < made.top < 30 and made.after < made.before
    flat = np.linspace(-1, 1, 128000, dtype=np.float32).reshape(-1, 32)
    assert entropy.solve(seen(flat, INT8("tensor")), stride=16).top > 0.95
    assert "left at the maximum" in entropy.solve(seen(gauss, NV), stride=16).note


def test_entropy_counts_everything_once():
    x = np.abs(spiky(tokens=1000, spike=20.0))
    s = seen(x, INT8("tensor"))
    counts = entropy.linear(s.parts[0].stats["histogram"], s.top)
    assert len(counts) == 2048
    np.testing.assert_allclose(counts.sum(), x.size, rtol=1e-4)
    half = np.sum(x < s.top / 16)
    np.testing.assert_allclose(counts[:128].sum(), half, rtol=0.03)


def test_headroom_keeps_the_scales_of_small_blocks_normal():
    x = RNG.standard_normal((800, 64)).astype(np.float32) * 1e-2
    x[5, 3] = 5e4  # alone; the maximum would make every other scale subnormal
    s = seen(x, NV)
    made = headroom.solve(s, ratio=16384.0, low=1.0, high=99.9)
    assert made.before > 0.9 and made.after < 0.01 and made.top < s.top
    even = RNG.uniform(1, 2, (100, 64)).astype(np.float32)
    made = headroom.solve(seen(even, NV), ratio=16384.0, low=1.0, high=99.99)
    assert made.top > 2 and made.before == made.after == 0  # room above, nothing lost
    fake = np.float32(NV.fake(jnp.asarray(even, jnp.bfloat16), NV.outer(np.float32(made.top), BF16)))
    top = np.float32(NV.fake(jnp.asarray(even, jnp.bfloat16), NV.outer(np.float32(2), BF16)))
    assert np.square(fake - even).sum() < 1.05 * np.square(top - even).sum()
    assert "is for nvfp4" in headroom.solve(seen(even, INT8("tensor")), ratio=2.0, low=1.0, high=99.0).note


def test_weights_that_read_the_same_input_share_its_scale_and_others_do_not():
    shared, other = spiky(spike=9.0), spiky(spike=40.0)
    format = INT8("tensor")
    a, b = (seen(x, format).parts[0].stats for x in (shared, other))
    names = ("q", "k", "down")
    params = {n + ".weight": np.asarray(RNG.standard_normal((8, 32)), BF16) for n in names}
    groups = dict(zip(names, (0, 0, 1), strict=True))
    sites = tuple(Site(n + ".weight", "dot", (1,), groups[n], None) for n in names)
    log = []
    context = Context(sites, {n: Scheme(INT8(), format) for n in names}, targets=params, log=log.append)
    stats = {"q.weight": a, "k.weight": a, "down.weight": b}
    made = clip.clip().apply(params, stats, context)
    assert set(made) == {n + ".input_scale" for n in names}
    assert made["q.input_scale"] == made["k.input_scale"] != made["down.input_scale"]
    assert made["q.input_scale"].dtype == np.float32 and made["q.input_scale"].shape == ()
    assert [o.weight for o in log] == ["q.weight", "down.weight"] and all(o.after <= o.before for o in log)
    readers = tuple(params[n + ".weight"] for n in ("q", "k"))
    both = seen(shared, format)._replace(parts=(Part(readers, a),))
    both = clip.solve(both, shares=SHARES, rows=2048)
    assert made["q.input_scale"] == np.float32(both.top)
    again = clip.clip().apply(params | {"down.input_scale": np.float32(20)}, stats, context)
    assert again["down.input_scale"] <= 20
    with pytest.raises(InputError, match=r"down\.weight: percentile needs statistics of its inputs"):
        percentile.percentile().apply(params, {k: stats[k] for k in ("q.weight", "k.weight")}, context)


def test_experts_share_a_scale_and_layers_of_a_stack_do_not():
    format = FP8("tensor")
    x = np.stack([spiky(spike=20.0), spiky(spike=5.0)])
    parts = [seen(one, format).parts[0].stats for one in x]
    stats = {k: np.stack([p[k] for p in parts]) for k in parts[0]}
    w = np.asarray(RNG.standard_normal((2, 8, 32)), BF16)
    for name, shape in (("experts.*.up", ()), ("stack", (2,))):
        site = Site(name + ".weight", "dot", (2,), 0, None, batch=(0,))
        context = Context((site,), {name: Scheme(FP8(), format)}, targets={name + ".weight": w})
        made = percentile.percentile(percent=100).apply(
            {name + ".weight": w}, {name + ".weight": stats}, context
        )
        top = made[name + ".input_scale"]
        assert top.shape == shape
        np.testing.assert_array_equal(top, np.float32(20) if not shape else np.float32([20, 5]))


def test_options_that_cannot_be_are_refused():
    for make, options, said in (
        (mse.mse, {"low": 2.0, "high": 1.0}, "mse: low is 2.0"),
        (clip.clip, {"low": 1.5}, "clip: low is 1.5"),
        (percentile.percentile, {"percent": 101}, "percentile: percent is 101"),
        (entropy.entropy, {"stride": 0}, "entropy: stride is 0"),
        (headroom.headroom, {"ratio": 3e4}, "headroom: ratio is 30000.0"),
        (awq_clip.awq_clip, {"low": 0.5, "step": 0.4}, "awq_clip: low is 0.5"),
        (local_hessian.local_hessian, {"damping": 0}, "local_hessian: low is 0.5"),
    ):
        with pytest.raises(InputError, match=said):
            make(**options)


NVFP4_RULES = [{"match": "*", "weights": "nvfp4", "inputs": "nvfp4"}]
INT8_RULES = [
    {
        "match": "*",
        "weights": {"format": "int8", "per": "channel"},
        "inputs": {"format": "int8", "per": "tensor"},
    }
]


@pytest.mark.parametrize(
    "rules, steps",
    [
        (NVFP4_RULES, ["awq", "headroom", "four_over_six", "local_hessian"]),
        (
            INT8_RULES,
            [
                {"smoothquant": {"sites": "all"}},
                {"percentile": {"percent": 99.999}},
                "clip",
                {"mse": {"weighted": True}},
            ],
        ),
    ],
    ids=["nvfp4", "int8"],
)
def test_a_folder_is_written_and_verified(tmp_path, rules, steps):
    recipe = {
        "description": "steps",
        "rules": rules,
        "steps": steps,
        "calibration": {"sequences": 4, "length": 64},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    tokens = pipeline.read_text(mojax.load("tiny"), None, load_recipe("nvfp4"), "builtin", "evaluation").ids
    np.savez(tmp_path / "text.npz", tokens=np.asarray(tokens)[:4, :64])
    report = mojax.optimize(
        "tiny",
        tmp_path / "r.yaml",
        tmp_path / "out",
        kl_limit=0.1,
        evaluation_text=str(tmp_path / "text.npz"),
    )
    assert (
        report.kl_mean
        < {"nvfp4": 0.05, "int8": 0.02}[rules[0]["weights"] if rules is NVFP4_RULES else "int8"]
    )


def test_a_function_with_static_inputs_needs_no_rtn():
    w = jnp.asarray(RNG.standard_normal((32, 32)), jnp.float32)
    x = jnp.asarray(RNG.standard_normal((64, 32)), jnp.float32)
    model = mojax.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": w, "b": w.T}, x)
    recipe = dataclasses.replace(load_recipe("nvfp4"), steps=(("clip", {}), ("local_hessian", {})))
    packed = mojax.quantize(model, recipe, mojax.calibrate(model, recipe, [x]))
    plain = dataclasses.replace(load_recipe("nvfp4"), steps=(("sweep", {}),))
    swept = mojax.quantize(model, plain, mojax.calibrate(model, plain, [x]))
    for made in (packed, swept):
        far = np.linalg.norm(made(x) - model(x)) / np.linalg.norm(model(x))
        assert far < 0.2
        assert {"a.input_scale", "b.input_scale"} <= set(made.params)
