"""What the plan refuses before any weight is read, and what it decides alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mojax
from mojax import checkpoint, model, plan_table
from mojax.recipe import adjusted, load_recipe

TINY = Path(model.__file__).parent / "data" / "tiny"


def recipe_of(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def problems(source, recipe, **more):
    with pytest.raises(mojax.PlanError) as caught:
        mojax.plan(source, recipe, **more)
    return "\n".join(caught.value.problems)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "steps, said",
    [
        ("[smoothquant]", r"\[smoothquant\]; the last step must encode"),
        ("[rtn, smoothquant]", "smoothquant moves .* stands after rtn.*put smoothquant first"),
        ("[smoothquant, smoothquant, rtn]", "smoothquant stands twice"),
        ("[smoothquant: {alpha: high}, rtn]", "smoothquant cannot use alpha: 'high'"),
    ],
)
def test_steps_that_cannot_run(tmp_path, steps, said):
    mine = recipe_of(tmp_path, f"extends: int8\nsteps: {steps}\n")
    with pytest.raises(mojax.InputError, match=said):
        mojax.plan(mojax.load("tiny"), mine)


# ---------------------------------------------------------------- what a dialect can say at once


def test_formats_that_a_dialect_cannot_mix(tmp_path):
    mine = recipe_of(tmp_path, "extends: fp8\nrules: [{match: '*.mlp.*', weights: int4, inputs: none}]\n")
    mojax.plan(mojax.load("tiny"), mine)
    assert "cannot mix" in problems(mojax.load("tiny"), mine, format="modelopt", target="trtllm")


# ---------------------------------------------------------------- what servers fuse


def copy_of_tiny(folder, tensors=lambda tensors: tensors, **changes):
    """The built-in model with other tensors and another config."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (shard,) = folder.glob("*.safetensors")
    read = {n: np.array(v) for n, v in checkpoint.read_shard(shard).items()}
    checkpoint.write_shard(shard, tensors(read))
    return mojax.load(folder, generic=True)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_blocks_of_fp8_do_not_cross_fused_members(tmp_path, target):
    """gate_proj and up_proj with 160 rows each."""

    def narrow(tensors):
        for name, value in tensors.items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensors[name] = value[:160].copy()
            if name.endswith("down_proj.weight"):
                tensors[name] = value[:, :160].copy()
        return tensors

    source = copy_of_tiny(tmp_path / "narrow", narrow, intermediate_size=160)
    said = problems(source, "fp8_block", target=target)
    assert "gate_proj.weight: has 160 rows" in said and "--keep=model.layers.0.mlp.up_proj.weight" in said
    assert "0.mlp.up_proj.weight: has" not in said  # the last member may end in half a block
    mojax.plan(source, "fp8_block", target="transformers")
    keep = ["*.gate_proj.weight", "*.up_proj.weight"]
    said = mojax.plan(source, adjusted(load_recipe("fp8_block"), keep=keep), target=target)
    assert said.schemes


def test_one_answer_to_share_scale(tmp_path):
    mine = recipe_of(tmp_path, "extends: fp8\nrules: [{match: '*.q_proj.weight', share_scale: true}]\n")
    said = problems(mojax.load("tiny"), mine)
    assert "share_scale" in said and "layers.0.self_attn.k_proj.weight false" in said


def test_a_tied_head_is_not_encoded_by_its_copy(tmp_path):
    def untie(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    source = copy_of_tiny(tmp_path / "tied", untie)
    mine = recipe_of(tmp_path, "extends: int4\nrules: [{match: lm_head.weight, weights: int4}]\n")
    assert "this copy of it is not read" in problems(source, mine)


# ---------------------------------------------------------------- without a family


def test_generic_keeps_routers(tmp_path):
    def route(tensors):
        router = np.zeros((8, tensors["model.norm.weight"].shape[0]), tensors["model.norm.weight"].dtype)
        return tensors | {
            "model.layers.0.mlp.gate.weight": router,
            "model.layers.1.mlp.router.weight": router,
        }

    source = copy_of_tiny(tmp_path / "moe", route, model_type="novel")
    schemes = mojax.plan(source, "fp8_dynamic").schemes
    assert not {m for m in schemes if m.endswith((".gate", ".router"))}
    assert "model.layers.0.mlp.gate_proj" in schemes
    by_name = "rules: [{match: model.layers.0.mlp.gate.weight, weights: {format: fp8, per: channel}}]\n"
    named = mojax.plan(source, recipe_of(tmp_path, "extends: fp8_dynamic\n" + by_name))
    assert "model.layers.0.mlp.gate" in named.schemes and "model.layers.1.mlp.router" not in named.schemes


def test_a_cache_for_some_layers_is_a_problem(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: fp8_dynamic\nrules: [{match: 'model.layers.0.*', kv_cache: fp8}]\n")
    with pytest.raises(mojax.PlanError, match="one format for the cache of all layers"):
        mojax.plan(mojax.load("tiny"), str(mine))


def test_the_plan_says_that_the_cache_is_quantized(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: fp8_dynamic\nrules: [{match: '*', kv_cache: fp8}]\n")
    made = mojax.plan(mojax.load("tiny"), str(mine))
    assert "key/value cache fp8" in plan_table.totals(made)
    assert plan_table.as_dict(made)["kv_cache"] == "fp8"


def test_generic_says_once_that_a_recipe_needs_data(tmp_path):
    source = copy_of_tiny(tmp_path / "odd", model_type="odd")
    (said,) = problems(source, load_recipe("nvfp4")).splitlines()
    assert said.startswith("nvfp4 needs calibration, and model_type 'odd' has no forward function")
