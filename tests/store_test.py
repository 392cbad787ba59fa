"""Parameters on disk: what is saved comes back, same bytes, and a damaged file is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file
from shipped import distinct

import mojax
from mojax.errors import InputError
from mojax.formats.base import QTensor


def packed(recipe="int8"):
    p = zoo.program("scan_layers_remat")
    params = {n: jnp.tile(w, [1] * (w.ndim - 1) + [1]) for n, w in p.params.items()}
    return mojax.quantize(mojax.from_function(p.fn, params, *p.args), recipe), p.args


def assert_same(a, b):
    assert jax.tree.structure(dict(a)) == jax.tree.structure(dict(b))
    for x, y in zip(jax.tree.leaves(dict(a)), jax.tree.leaves(dict(b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_packed_parameters_come_back_and_run(tmp_path):
    model, args = packed()
    mojax.save_params(tmp_path / "p", model.params)
    mojax.save_params(tmp_path / "q", model.params)
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    back = mojax.load_params(tmp_path / "p")
    assert_same(back, model.params)
    np.testing.assert_array_equal(model.apply(back, *args), model(*args))


NAMES = [n for n in distinct() if "hadamard" not in n and "rotated" not in n]  # of checkpoints alone


@pytest.mark.parametrize("recipe", NAMES)
def test_every_format_comes_back(tmp_path, recipe):
    w = zoo.floats(128, 256).astype(jnp.bfloat16)
    model = mojax.from_function(lambda p, x: x @ p["a"]["w"].T, {"a": {"w": w}}, w[:4])
    stats = mojax.calibrate(model, recipe, [w[:4]])
    params = {**mojax.quantize(model, recipe, stats).params, "step": np.int32(3)}
    assert isinstance(params["a.w"], QTensor)
    mojax.save_params(tmp_path / "p", params)
    assert_same(mojax.load_params(tmp_path / "p"), dict(sorted(params.items())))


def test_what_cannot_be_saved_is_refused(tmp_path):
    path = tmp_path / "p"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="p: exists already"):
        mojax.save_params(path, {})
    assert path.read_bytes() == b"mine"
    model, _ = packed()
    for params, why in (
        ({"a": 0.5}, "a: is float, not an array"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "a: is ShapeDtypeStruct, not an array"),
        ({"a": jax.random.key(0)}, "a: is a random key"),
        ({"a": jnp.ones(2, jnp.int4)}, "'a' is int4, which a safetensors file cannot hold"),
        ({**model.params, "up.codes": np.ones(2)}, "up.codes: is the name of two tensors"),
    ):
        with pytest.raises(InputError, match=why):
            mojax.save_params(tmp_path / "new", params)
        assert not (tmp_path / "new").exists()


def changed(path, edit):
    """The file at `path` with its tensors and description changed by `edit(tensors, description)`."""
    tensors = load_file(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    said = json.loads(header["__metadata__"]["mojax"])
    edit(tensors, said)
    out = path.with_name("changed")
    save_file(tensors, out, metadata={"mojax": json.dumps(said)})
    return out


@pytest.mark.parametrize(
    "edit, why",
    [
        (lambda t, s: t.pop("up.codes"), "up.codes: found nothing, needed int8"),
        (
            lambda t, s: t.update({"up.codes": t["up.codes"][:1]}),
            r"up.codes: found int8 \[1, 24, 16\], needed",
        ),
        (lambda t, s: t.update({"up.scales.inner": np.ones(3)}), "up.scales.inner: found float64"),
        (lambda t, s: s["packed"]["up"]["format"].update(name="int9"), "up: its description .*'int9'"),
        (lambda t, s: s["packed"]["up"]["format"].update(group=8), "up: its description cannot be used"),
        (lambda t, s: s["packed"]["up"].update(batch=[7]), "up: its description cannot be used"),
        (lambda t, s: s["packed"]["up"].pop("shape"), "up: its description cannot be used"),
        (lambda t, s: s["packed"].update(up=3), "up: its description cannot be used"),
        (lambda t, s: s.pop("packed"), "the metadata cannot be read"),
        (lambda t, s: s.update(version=2), "has version 2"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, edit, why):
    model, _ = packed()
    mojax.save_params(tmp_path / "p", model.params)
    assert_same(mojax.load_params(changed(tmp_path / "p", lambda t, s: None)), model.params)
    with pytest.raises(InputError, match=why):
        mojax.load_params(changed(tmp_path / "p", edit))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        mojax.load_params(tmp_path / "absent")
    save_file({"a": np.ones(2)}, tmp_path / "p")
    with pytest.raises(InputError, match=r"was not written by mojax.save_params"):
        mojax.load_params(tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    (tmp_path / "p").write_bytes(whole[:-3])
    with pytest.raises(InputError, match="incomplete"):
        mojax.load_params(tmp_path / "p")


@pytest.mark.filterwarnings("ignore")
def test_orbax_saves_and_restores(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    model, args = packed()
    params = dict(model.params)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", params)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "orbax", jax.eval_shape(lambda: params))
    assert_same(back, params)
    np.testing.assert_array_equal(model.apply(back, *args), model(*args))
