"""Recipes: how rules resolve, that every mistake is one message with its place, nothing else gets out."""

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mojax import recipe as recipes
from mojax.cache import of_rule
from mojax.document import Calibration, Rule
from mojax.errors import InputError
from mojax.find import find
from mojax.recipe import adjusted, choose, load_recipe, resolved
from mojax.resolve import made_steps

DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture
def write(tmp_path):
    """Writes a file beside the others of this test; gives its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def refused(source, **options):
    with pytest.raises(InputError) as error:
        load_recipe(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- shipped recipes


def test_the_shipped_recipes_are_these():
    assert recipes.names() == (
        "fp8",
        "fp8_block",
        "fp8_dynamic",
        "fp8_kv",
        "fp8k_nvfp4v",
        "int4",
        "int4_asymmetric",
        "int4_autoround",
        "int4_awq",
        "int4_best",
        "int4_gptq",
        "int8",
        "int8_hadamard",
        "int8_smoothquant",
        "int8_static",
        "int8_static_best",
        "int8_static_rotated",
        "mxfp4",
        "mxfp4_best",
        "mxfp4_hadamard",
        "mxfp4_rotated",
        "mxfp4_two_sided",
        "mxfp4_weight_only",
        "mxfp4_weight_only_best",
        "mxfp8",
        "nf4",
        "nvfp4",
        "nvfp4_autoround",
        "nvfp4_awq",
        "nvfp4_best",
        "nvfp4_cast",
        "nvfp4_four_over_six",
        "nvfp4_gptq",
        "nvfp4_kv",
        "nvfp4_local_hessian",
        "nvfp4_mlp_only",
        "nvfp4_svdquant",
        "nvfp4_weight_only",
        "nvfp4_weight_only_best",
        "w4a8_awq",
    )
    assert recipes.layers() == ("error_feedback", "two_sided")


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_complete(name):
    """Its formats and steps can be made, and `needs_data` says what the formats and steps say themselves."""
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.menu
    assert all(rule.shipped and rule.optional for rule in recipe.rules)
    every = choose(recipe, "model.layers.0.mlp.up_proj.weight")
    if every.weights is None:  # extends others: only the cache is quantized
        cache = of_rule(every.kv_cache, every.attention, "float32")
        assert cache is not None and recipe.menu.needs_data == cache.calibrated
        return
    made = {}
    for key in ("weights", "inputs"):
        choice = getattr(every, key)
        assert choice is not None, f"{name} does not say what becomes of {key}"
        if isinstance(choice, dict):
            options = {k: v for k, v in choice.items() if k != "format"}
            made[key] = find("formats", choice["format"]).FORMAT(**options)
    assert "weights" in made
    static = "inputs" in made and made["inputs"].static
    assert recipe.menu.needs_data == (static or any(step.needs or step.tune for step in made_steps(recipe)))


def test_shipped_recipes_say_what_the_table_says():
    def says(name):
        every = choose(load_recipe(name), DOWN)
        return every.weights, every.inputs

    nvfp4, mxfp4, mxfp8 = {"format": "nvfp4"}, {"format": "mxfp4"}, {"format": "mxfp8"}
    assert says("nvfp4") == (nvfp4, nvfp4)
    assert says("nvfp4_weight_only") == (nvfp4, "none")
    assert says("fp8") == ({"format": "fp8", "per": "tensor"},) * 2
    assert says("fp8_dynamic") == ({"format": "fp8", "per": "channel"}, {"format": "fp8", "per": "token"})
    assert says("fp8_block") == ({"format": "fp8", "per": "block"},) * 2
    assert says("int8") == ({"format": "int8", "per": "channel"}, {"format": "int8", "per": "token"})
    assert says("int8_smoothquant") == says("int8")
    assert says("int4") == ({"format": "int4", "group": 128}, "none")
    assert says("int4_asymmetric") == ({"format": "int4", "group": 128, "symmetric": False}, "none")
    assert says("mxfp4") == (mxfp4, mxfp4)
    assert says("mxfp4_weight_only") == (mxfp4, "none")
    assert says("mxfp8") == (mxfp8, mxfp8)
    assert [step for step, _ in load_recipe("int8_smoothquant").steps] == ["smoothquant", "rtn"]


def test_the_menu_has_a_line_per_recipe():
    lines = recipes.menu().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(recipes.names())
    int8 = next(line for line in lines if line.startswith("int8 "))
    assert "int8 per channel" in int8 and "int8 per token" in int8


def test_the_rows_of_the_menu_are_plain_data():
    rows = {row.pop("name"): row for row in json.loads(json.dumps(recipes.menu_rows()))}
    assert list(rows) == list(recipes.names())
    assert rows["fp8_dynamic"]["inputs"] == "fp8 per token" and rows["int4"]["inputs"] == ""
    facts = {"weights", "inputs", "hardware", "needs_data", "bits_per_weight", "kl_tiny", "description"}
    assert all(row.keys() == facts for row in rows.values())


def test_listing_recipes_imports_no_arrays():
    code = (
        "import sys, mojax.recipe as r; r.menu(); "
        "sys.exit(','.join({'jax', 'numpy', 'ml_dtypes', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hyphens_are_underscores():
    assert load_recipe("fp8-dynamic") == load_recipe("fp8_dynamic")


# ---------------------------------------------------------------- rules


def test_the_last_matching_rule_wins_key_by_key(write):
    recipe = load_recipe(
        write(
            "my.yaml",
            """
            extends: nvfp4
            rules:
              - {match: "*.mlp.*", weights: {format: int4, group: 64}}
              - {match: "*.down_proj.weight", inputs: none, share_scale: true}
              - {match: "*.layers.3.*", share_scale: false, kv_cache: fp8}
            """,
        )
    )
    int4, nvfp4 = {"format": "int4", "group": 64}, {"format": "nvfp4"}
    assert choose(recipe, DOWN) == Rule(DOWN, int4, "none", kv_cache="fp8", share_scale=False)
    up = "model.layers.0.mlp.up_proj.weight"
    assert choose(recipe, up) == Rule(up, int4, nvfp4)
    query = "model.layers.3.self_attn.q_proj.weight"
    assert choose(recipe, query) == Rule(query, nvfp4, nvfp4, kv_cache="fp8", share_scale=False)


def test_the_order_decides_not_how_narrow_a_rule_is(write):
    rules = [{"match": "*.down_proj.weight", "weights": "keep"}, {"match": "*", "weights": "mxfp4"}]
    assert choose(load_recipe(write("a.yaml", {"rules": rules})), DOWN).weights == {"format": "mxfp4"}
    assert choose(load_recipe(write("b.yaml", {"rules": rules[::-1]})), DOWN).weights == "keep"


def test_a_star_crosses_dots_and_case_counts(write):
    rules = [{"match": "model.*.weight", "weights": "fp8"}, {"match": "MODEL.*", "weights": "keep"}]
    assert choose(load_recipe(write("a.yaml", {"rules": rules})), DOWN).weights == {"format": "fp8"}


def test_a_users_rule_must_match_unless_it_says_optional(write):
    recipe = load_recipe(
        write(
            "a.yaml",
            "extends: fp8\nrules: [{match: a, weights: keep}, {match: b, weights: keep, optional: true}]",
        )
    )
    assert [(r.match, r.optional, r.shipped) for r in recipe.rules] == [
        ("*", True, True),
        ("a", False, False),
        ("b", True, False),
    ]


def test_the_command_line_has_the_last_word():
    recipe = load_recipe("nvfp4")
    assert adjusted(recipe) == recipe
    other = adjusted(recipe, keep=["*.down_proj.weight"], sequences=3, seed=0)
    assert choose(other, DOWN).weights == "keep" and choose(other, DOWN).inputs == {"format": "nvfp4"}
    assert not other.rules[-1].optional and not other.rules[-1].shipped
    assert other.calibration == recipe.calibration._replace(sequences=3, seed=0)
    for wrong, place in [
        ({"sequences": 0}, "--sequences: found 0"),
        ({"length": -1}, "--length: found -1"),
        ({"seed": -1}, "--seed: found -1"),
        ({"keep": [""]}, "--keep: found ''"),
    ]:
        with pytest.raises(InputError, match=place):
            adjusted(recipe, **wrong)


# ---------------------------------------------------------------- extends


def test_a_child_replaces_steps_and_merges_calibration_and_limits(write):
    write(
        "parent.yaml",
        "extends: fp8\ndescription: p\ncalibration: {length: 8, seed: 1}\nlimits: {kl_mean: 1}",
    )
    child = load_recipe(write("child.yaml", "extends: parent.yaml\nsteps: [smoothquant: {alpha: 0.5}, rtn]"))
    assert child.steps == (("smoothquant", {"alpha": 0.5}), ("rtn", {}))
    assert (child.name, child.description, child.menu) == ("child", "p", None)
    grandchild = load_recipe(
        write(
            "last.yaml",
            "extends: child.yaml\ncalibration: {seed: 2}\nlimits: {kl_mean: null}",
        )
    )
    assert grandchild.steps == child.steps
    assert grandchild.calibration == Calibration("builtin", 64, 8, 2)
    assert (child.limits, grandchild.limits) == ({"kl_mean": 1.0}, {})


def test_parents_of_a_list_come_in_order_and_each_once(write):
    """Both parents start from fp8: the second must not undo what the first says."""
    write("a.yaml", 'extends: fp8\nrules: [{match: "*.down_proj.weight", weights: keep}]')
    write("b.yaml", 'extends: fp8\nrules: [{match: "*.up_proj.weight", weights: keep}]')
    recipe = load_recipe(write("c.yaml", "extends: [a.yaml, b.yaml]"))
    assert [r.match for r in recipe.rules] == ["*", "*.down_proj.weight", "*.up_proj.weight"]
    assert choose(recipe, DOWN).weights == "keep"


def test_a_parent_is_found_beside_its_child(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("sub/parent.yaml", "extends: int8")
    assert load_recipe(write("child.yaml", "extends: sub/parent.yaml")).rules == load_recipe("int8").rules


def test_a_file_named_like_a_shipped_recipe_may_extend_it(write):
    assert load_recipe(write("nvfp4.yaml", "extends: nvfp4")).rules == load_recipe("nvfp4").rules


def test_cycles_are_refused(write):
    write("a.yaml", "extends: b.yaml")
    assert "extends itself" in refused(write("b.yaml", "extends: a.yaml"))
    assert "extends itself" in refused(write("c.yaml", "extends: c.yaml"))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("FP8", "fp8"),
        ("FP8_DYNAMIC", "fp8_dynamic"),
        ("FP8_BLOCK", "fp8_block"),
        ("W8A8", "int8"),
        ("W4A16", "int4"),
        ("w4a16", "int4"),
        ("W4A16_ASYM", "int4_asymmetric"),
        ("NVFP4", "nvfp4"),
        ("NVFP4A16", "nvfp4_weight_only"),
        ("MXFP4", "mxfp4"),
        ("MXFP4A16", "mxfp4_weight_only"),
        ("MXFP8", "mxfp8"),
        ("NVFP4_DEFAULT_CFG", "nvfp4"),
        ("W4A16_NVFP4_CFG", "nvfp4_weight_only"),
        ("FP8_DEFAULT_CFG", "fp8"),
        ("fp8_per_channel_per_token_cfg", "fp8_dynamic"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_block"),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4"),
        ("Int8", "int8"),
    ],
)
def test_other_tools_names_are_hints(theirs, ours):
    assert refused(theirs) == f"{theirs} is called {ours} here"


def test_every_hint_names_a_recipe():
    assert set(recipes.CALLED.values()) <= set(recipes.names())


def test_unknown_names(write, tmp_path, monkeypatch):
    assert "did you mean 'nvfp4'" in refused("nvpf4")
    monkeypatch.chdir(tmp_path)
    write("mine.yaml", "extends: fp8")
    assert "say mine.yaml" in refused("mine")
    assert "No such file" in refused("other.yaml")
    assert "cannot be read" in refused(str(tmp_path) + "/")
    assert "not the name of a file" in refused("a\0.yaml")


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    ("", "empty"),
    ("# nothing\n", "empty"),
    ("just words", "found 'just words', needed a mapping"),
    ("- a\n- b", "found a list, needed a mapping"),
    ("{}", "no rules"),
    ("rules: []", "no rules"),
    ("a: [1", "line 1: not YAML"),
    ("extends: fp8\nrules: [\n", "line 3: not YAML"),
    ("a: b\n  c: d", "line 2: not YAML"),
    ("extends: fp8\nextends: int8", "line 2: not YAML: the key 'extends' stands twice"),
    ("rules: [{match: a, match: b, weights: keep}]", "the key 'match' stands twice"),
    ("x: &a {b: 1}\ny: {<<: *a}", "`<<` is not supported"),
    ("a: !!python/object/apply:os.getcwd []", "line 1: not YAML"),
    ("a: 2024-99-99", "not YAML"),
    ("a: !!int x", "not YAML"),
    ("? [a]\n: b", "not YAML"),
    ("1: 2", "the key 1 is not a word"),
    ("extend: fp8", "extend: unknown key; did you mean 'extends'"),
    ("extends: fp8\nrules: {match: a}", "rules: found a mapping, needed a list"),
    ("extends: fp8\nrules: [keep]", "rules[0]: found 'keep', needed a mapping"),
    ("extends: 3", "extends: found 3, needed a list"),
    ("extends: [3]", "extends[0]: found 3, needed text"),
    ("extends: fp9", "no shipped recipe is called 'fp9'"),
    ("extends: gone.yaml", "gone.yaml: cannot be read"),
    ("rules: [{match: a, weight: keep}]", "rules[0].weight: unknown key; did you mean 'weights'"),
    ("rules: [{weights: keep}]", "rules[0]: no `match`"),
    ("rules: [{match: a}]", "rules[0]: says nothing"),
    ("rules: [{match: a, optional: true}]", "rules[0]: says nothing"),
    ("rules: [{match: 3, weights: keep}]", "rules[0].match: found 3, needed text"),
    ("rules: [{match: '', weights: keep}]", "rules[0].match: found '', needed text"),
    ("rules: [{match: a, weights: }]", "rules[0].weights: found nothing"),
    ("rules: [{match: a, weights: none}]", "rules[0].weights: unknown format 'none'"),
    ("rules: [{match: a, inputs: keep}]", "rules[0].inputs: unknown format 'keep'"),
    ("rules: [{match: a, inputs: off}]", "rules[0].inputs: found false"),
    ("rules: [{match: a, weights: nvpf4}]", "rules[0].weights: unknown format 'nvpf4'; did you mean 'nvfp4'"),
    ("rules: [{match: a, weights: {group: 3}}]", "rules[0].weights: no `format`"),
    ("rules: [{match: a, weights: {format: in4}}]", "rules[0].weights.format: unknown format 'in4'"),
    (
        "rules: [{match: a, weights: {format: fp8_dynamic}}]",
        "unknown format 'fp8_dynamic'; known: fp8, int4",
    ),
    ("rules: [{match: a, weights: {format: int4, group: [1]}}]", "rules[0].weights.group: found a list"),
    ("rules: [{match: a, weights: {format: int4, group: .nan}}]", "rules[0].weights.group: found nan"),
    ("rules: [{match: a, weights: {format: int4, 3: 4}}]", "rules[0].weights: the key 3 is not a word"),
    ("rules: [{match: a, kv_cache: fp9}]", "rules[0].kv_cache: unknown format 'fp9'"),
    ("rules: [{match: a, kv_cache: {format: fp9}}]", "rules[0].kv_cache.format: unknown format 'fp9'"),
    ("rules: [{match: a, kv_cache: {k: fp8}}]", "rules[0].kv_cache: names k; it is a mapping like"),
    ("rules: [{match: a, kv_cache: {format: fp8, k: fp8}}]", "rules[0].kv_cache: names format and k"),
    ("rules: [{match: a, kv_cache: {skip_last: 1}}]", "rules[0].kv_cache: names no format"),
    (
        "rules: [{match: a, kv_cache: {format: fp8, skip_lst: 1}}]",
        "skip_lst: unknown key; did you mean 'skip_last'",
    ),
    (
        "rules: [{match: a, kv_cache: {format: fp8, skip_last: -1}}]",
        "skip_last: found -1, needed a whole number",
    ),
    ("rules: [{match: a, kv_cache: {format: fp8, per: row}}]", "per: found 'row', needed tensor or head"),
    ("rules: [{match: a, kv_cache: {format: fp8, cast: 1}}]", "cast: found 1, needed true or false"),
    ("rules: [{match: a, kv_cache: [fp8]}]", "rules[0].kv_cache: found a list"),
    ("rules: [{match: a, attention: nvfp4}]", "rules[0].attention: found 'nvfp4', needed fp8 or none"),
    ("rules: [{match: a, share_scale: 1}]", "rules[0].share_scale: found 1, needed true or false"),
    ("rules: [{match: a, weights: keep, optional: 'yes'}]", "rules[0].optional: found 'yes'"),
    ("extends: fp8\nsteps: rtn", "steps: found 'rtn', needed a list"),
    ("extends: fp8\nsteps: []", "steps: empty"),
    ("extends: fp8\nsteps: [rnt]", "steps[0]: unknown step 'rnt'; did you mean 'rtn'"),
    ("extends: fp8\nsteps: [3]", "steps[0]: found 3"),
    ("extends: fp8\nsteps: [{rtn: {}, smoothquant: {}}]", "steps[0]: found a mapping"),
    ("extends: fp8\nsteps: [rtn: 3]", "steps[0].rtn: found 3, needed a mapping"),
    ("extends: fp8\nsteps: [rtn: {a: {b: c}}]", "steps[0].rtn.a: found a mapping"),
    ("extends: fp8\ncalibration: 3", "calibration: found 3, needed a mapping"),
    ("extends: fp8\ncalibration: {sequence: 3}", "calibration.sequence: unknown key; did you mean 'seq"),
    ("extends: fp8\ncalibration: {sequences: 0}", "calibration.sequences: found 0, needed a whole number"),
    ("extends: fp8\ncalibration: {sequences: true}", "calibration.sequences: found true"),
    ("extends: fp8\ncalibration: {sequences: 1.5}", "calibration.sequences: found 1.5"),
    ("extends: fp8\ncalibration: {length: 0}", "calibration.length: found 0"),
    ("extends: fp8\ncalibration: {length: 99999999999}", "calibration.length: found 99999999999"),
    ("extends: fp8\ncalibration: {seed: -1}", "calibration.seed: found -1"),
    ("extends: fp8\ncalibration: {text: 3}", "calibration.text: found 3"),
    ("extends: fp8\nlimits: {kl: 3}", "limits.kl: unknown key; known: kl_mean"),
    ("extends: fp8\nlimits: {kl_mean: 0}", "limits.kl_mean: found 0, needed a number above 0"),
    ("extends: fp8\nlimits: {kl_mean: .inf}", "limits.kl_mean: found inf"),
    ("extends: fp8\nlimits: {kl_mean: low}", "limits.kl_mean: found 'low'"),
    ("extends: fp8\ndescription: 'a\n\n  b'", "description: more than one line"),
    ("extends: fp8\ndescription: [a]", "description: found a list, needed text"),
    ("extends: fp8\nname: 3", "name: found 3, needed text"),
    ("extends: fp8\nmenu: {}", "menu.hardware: found nothing"),
    ("extends: fp8\nmenu: {hardware: x}", "menu.needs_data: found nothing"),
    ("extends: fp8\nmenu: {hardware: x, needs_data: true, kl_tiny: -1}", "menu.kl_tiny: found -1"),
]


@pytest.mark.parametrize("text, complaint", MISTAKES, ids=[repr(t[:40]) for t, _ in MISTAKES])
def test_a_mistake_is_one_message_with_its_place(write, text, complaint):
    message = refused(write("my.yaml", text))
    assert complaint in message
    assert "my.yaml" in message or "extends: " in text


def test_a_mistake_in_a_parent_names_the_parent(write):
    write("parent.yaml", "stepz: [rtn]")
    assert "parent.yaml: stepz: unknown key" in refused(write("child.yaml", "extends: parent.yaml"))


def test_files_that_are_no_recipes(tmp_path, write):
    assert "larger than" in refused(write("big.yaml", "# " + "x" * 1_000_000))
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9")
    assert "not UTF-8 text (byte 16)" in refused(str(tmp_path / "latin.yaml"))
    assert "nested too deeply" in refused(write("deep.yaml", "[" * 100_000))
    assert "a huge number" in refused(write("huge.yaml", f"rules: 0x{'f' * 9000}"))
    assert "longer than 1000 characters" in refused(write("long.yaml", {"name": "x" * 1001}))
    (tmp_path / "folder.yaml").mkdir()
    assert "Is a directory" in refused(str(tmp_path / "folder.yaml"))


def test_an_alias_bomb_is_refused_before_it_is_expanded(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    refused(write("bomb.yaml", "\n".join(lines)))
    refused(write("rules.yaml", "\n".join([*lines, "rules: *a39"])))


def test_an_alias_may_spare_typing(write):
    text = """
    rules:
      - {match: "*.q_proj.weight", weights: &fine {format: int4, group: 32}}
      - {match: "*.k_proj.weight", weights: *fine}
    """
    recipe = load_recipe(write("a.yaml", text))
    assert recipe.rules[0].weights == recipe.rules[1].weights == {"format": "int4", "group": 32}


# ---------------------------------------------------------------- Python recipes


def test_python_recipes_run_only_when_trusted(write, tmp_path):
    proof = tmp_path / "ran"
    path = write(
        "a.py",
        f"""
open({str(proof)!r}, "w").close()
def recipe():
    return {{"extends": "fp8", "rules": [
        {{"match": f"*.layers.{{i}}.*", "weights": "keep"}} for i in (0, 3)]}}
""",
    )
    assert "--trust_remote_code" in refused(path)
    assert "--trust_remote_code" in refused(write("child.yaml", "extends: a.py"))
    assert not proof.exists()
    recipe = load_recipe(path, trust_python=True)
    assert proof.exists() and choose(recipe, DOWN).weights == "keep"
    assert load_recipe(str(tmp_path / "child.yaml"), trust_python=True).rules == recipe.rules


def test_python_mistakes(write):
    assert "running it failed: ZeroDivisionError" in refused(write("a.py", "1 / 0"), trust_python=True)
    assert "running it failed: SyntaxError" in refused(write("b.py", "1 +"), trust_python=True)
    assert "defines no `recipe`" in refused(write("c.py", "x = 1"), trust_python=True)
    assert "needed a mapping" in refused(write("d.py", "recipe = [1]"), trust_python=True)
    assert "no such file" in refused("gone.py", trust_python=True)


# ---------------------------------------------------------------- round trip and fuzz


def round_trip(recipe, folder):
    path = folder / "again.yaml"
    path.write_text(yaml.safe_dump(resolved(recipe), sort_keys=False))
    return load_recipe(path)


@pytest.mark.parametrize("name", recipes.names())
def test_a_resolved_recipe_loads_to_itself(name, tmp_path):
    recipe = load_recipe(name)
    assert round_trip(recipe, tmp_path) == recipe
    as_json = json.loads(json.dumps(resolved(dataclasses.replace(recipe, menu=None))))
    assert recipes.restored(as_json) == dataclasses.replace(recipe, menu=None)


def test_equality_sees_every_field():
    recipe = load_recipe("nvfp4")
    others = {"steps": (("rtn", {"a": 1}),), "rules": (), "limits": {"kl_mean": 9.0}, "name": "x"}
    for field, other in others.items():
        assert dataclasses.replace(recipe, **{field: other}) != recipe


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
WORD = st.sampled_from(
    [
        "fp8",
        "int4",
        "nvfp4",
        "keep",
        "none",
        "rtn",
        "format",
        "match",
        "weights",
        "*",
        "*.weight",
        "[a",
        "builtin",
    ]
)
VALUE = st.recursive(
    SCALAR | WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD | TEXT, inner, max_size=3),
    max_leaves=8,
)
FORMAT = st.sampled_from(["fp8", "int4", {"format": "int8", "per": "token"}, {"format": "int4", "group": 32}])
RULE = st.fixed_dictionaries(
    {"match": WORD, "weights": st.just("keep") | FORMAT},
    optional={
        "inputs": st.just("none") | FORMAT,
        "kv_cache": st.sampled_from(
            ["fp8", "none", {"k": "fp8", "v": "nvfp4"}, {"format": "fp8", "skip_last": 2}]
        ),
        "attention": st.sampled_from(["fp8", "none"]),
        "share_scale": st.booleans(),
        "optional": st.booleans(),
    },
)
RECIPE = st.fixed_dictionaries(
    {"rules": st.lists(RULE, min_size=1, max_size=4)},
    optional={
        "extends": st.sampled_from(["nvfp4", ["fp8", "int8_smoothquant"]]),
        "description": TEXT.map(lambda s: " ".join(s.split())),
        "steps": st.lists(st.sampled_from(["rtn", {"smoothquant": {"alpha": 0.5}}]), min_size=1, max_size=3),
        "calibration": st.fixed_dictionaries(
            {}, optional={"length": st.integers(1, 99), "seed": st.integers(0, 9)}
        ),
        "limits": st.fixed_dictionaries({}, optional={"kl_mean": st.floats(1e-6, 10)}),
    },
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example overwrites its one file
)


@FUZZ
@given(RECIPE)
def test_fuzz_valid_recipes_round_trip(tmp_path, data):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data))
    recipe = load_recipe(tmp_path / "a.yaml")
    assert round_trip(recipe, tmp_path) == recipe
    assert len(recipe.rules) >= len(data["rules"])


@FUZZ
@given(RECIPE, VALUE, st.data())
def test_fuzz_mutated_recipes_load_or_are_refused(tmp_path, data, value, draw):
    """One value somewhere in a valid recipe becomes another; whatever loads also round-trips."""
    node, parent, key = data, None, None
    while isinstance(node, dict | list) and node and (parent is None or draw.draw(st.booleans())):
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, draw.draw(st.sampled_from(keys))
        node = parent[key]
    assert isinstance(parent, dict | list)
    parent[key] = value  # pyright: ignore[reportArgumentType, reportCallIssue]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data))
    try:
        recipe = load_recipe(tmp_path / "a.yaml")
    except InputError:
        return
    choose(recipe, DOWN)
    assert round_trip(recipe, tmp_path) == recipe


SNIPPETS = (
    *(
        "rules:",
        "- match: ",
        "weights: ",
        "extends: fp8",
        "&a ",
        "*a",
        "{",
        "}",
        "[",
        "]",
        "\n",
        "  ",
        ": ",
        "? ",
        "<<",
    ),
    *(
        "!!int ",
        "!!set ",
        "'",
        '"\\ud800"',
        "|",
        ">",
        "---",
        "0x",
        "1_",
        "2024-13-45",
        "=",
        "~",
        "\t",
        "%YAML 9.9",
    ),
)


@FUZZ
@given(st.lists(st.sampled_from(SNIPPETS) | TEXT, max_size=25).map("".join))
def test_fuzz_any_text_loads_or_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_bytes(text.encode())
    try:
        assert load_recipe(tmp_path / "a.yaml").rules
    except InputError as error:
        assert str(error)


@FUZZ
@given(st.binary(max_size=60))
def test_fuzz_any_bytes_load_or_are_refused(tmp_path, raw):
    (tmp_path / "a.yaml").write_bytes(raw)
    try:
        assert load_recipe(tmp_path / "a.yaml").rules
    except InputError as error:
        assert str(error)


@FUZZ
@given(TEXT)
def test_fuzz_any_name_is_refused(name):
    if name.replace("-", "_") not in recipes.names():
        with pytest.raises(InputError):
            load_recipe(name)
