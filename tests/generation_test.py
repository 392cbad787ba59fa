"""Generation: where it ends, how tokens are drawn, what is streamed and printed, what is refused."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing

import mojax
from mojax import cli, decoding
from mojax.decoding import Sampling
from mojax.errors import InputError, NotFiniteError
from mojax.find import find
from mojax.formats import nvfp4
from mojax.formats.base import Scheme
from mojax.model import Model

TINY = Path(mojax.__file__).parent / "data" / "tiny"
TOKENIZER = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
SAID = {"A": "é日🙂 done", "B": " the return value of a"}  # what follows each prompt
EOS = 1
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def draw(config, seed=0):
    family, rng = find("models", "llama"), np.random.default_rng(seed)
    shapes = family.shapes(family.configure(config))
    return {
        n: (rng.standard_normal(s) * (s[-1] ** -0.5 if len(s) > 1 else 0) + (len(s) == 1)).astype(np.float32)
        for n, s in shapes.items()
    }


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A checkpoint that answers every prompt of SAID with its text: each token has one successor."""
    folder = tmp_path_factory.mktemp("scripted")
    config = LLAMA | {"vocab_size": 4096, "eos_token_id": EOS}
    tensors = draw(config)
    for name in tensors:
        if "o_proj" in name or "down_proj" in name or "lm_head" in name:
            tensors[name][:] = 0
    table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    chains = [[*ids(prompt), *ids(text), EOS] for prompt, text in SAID.items()]
    assert sum(map(len, chains)) - 1 == len({i for chain in chains for i in chain})  # only EOS occurs twice
    for chain in chains:
        head[chain[1:]] += table[chain[:-1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def runner(scripted):
    return mojax.run(mojax.load(scripted))


@pytest.fixture
def copy(scripted, tmp_path):
    return Path(shutil.copytree(scripted, tmp_path / "copy"))


@pytest.fixture(scope="module")
def random():
    """A model in memory without a tokenizer, whose next token is hard to foretell."""
    config = LLAMA | {"vocab_size": 61}
    return mojax.run(Model(config, draw(config), find("models", "llama")))


def tokens(made):
    return [list(t.tokens) for t in made.texts]


def test_the_batch_goes_on_when_some_are_done(runner):
    made = runner.generate(list(SAID), max_tokens=30)
    assert [t.text for t in made.texts] == list(SAID.values())
    assert tokens(made) == [ids(text) for text in SAID.values()]
    assert len(set(map(len, tokens(made)))) == 2  # one was done before the other
    assert [t.reason for t in made.texts] == ["stop", "stop"]
    short = runner.generate(["A"], max_tokens=1).texts[0]
    assert (list(short.tokens), short.reason) == (ids(SAID["A"])[:1], "length")
    assert runner.generate("A", max_tokens=1).tokens_per_second is None


def test_prompts_may_be_ids(runner):
    want = runner.generate("B", max_tokens=30)
    for prompt in (ids("B"), [ids("B")], np.array(ids("B")), jnp.array(ids("B")), (tuple(ids("B")),)):
        assert runner.generate(prompt, max_tokens=30).texts == want.texts
    two = runner.generate(np.array([ids("A"), ids("B")]), max_tokens=30)
    assert two.texts[1] == want.texts[0]
    mixed = runner.generate(["A", ids("B")], max_tokens=30)
    assert mixed.texts == two.texts and mixed.prompt_tokens == (2, 1)  # <|bos|>


@pytest.mark.parametrize(
    "own, general, ends",
    [
        (EOS, None, EOS),
        (None, None, None),
        ("first", {"eos_token_id": EOS}, EOS),
        ("first", {}, "first"),
        ("first", {"eos_token_id": None}, None),
        (EOS, {"eos_token_id": [7, "third", EOS]}, "third"),
        ([EOS, "third"], None, "third"),
    ],
)
def test_stop_tokens(own, general, ends, copy):
    """Those of generation_config.json before those of config.json; of several, the first that comes."""
    said = ids(SAID["A"])
    names = {"first": said[0], "third": said[2]}

    def read(value):
        return [names.get(v, v) for v in value] if isinstance(value, list) else names.get(value, value)

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": read(own)}))
    if general is not None:
        (copy / "generation_config.json").write_text(json.dumps({k: read(v) for k, v in general.items()}))
    made = mojax.run(mojax.load(copy)).generate("A", max_tokens=len(said) + 2).texts[0]
    want = {None: said, EOS: said, "first": [], "third": said[:2]}[ends]
    assert list(made.tokens[: len(want)]) == want
    assert made.reason == ("length" if ends is None else "stop")
    assert len(made.tokens) == len(want) + 2 * (ends is None)


def test_special_tokens_of_a_prompt_are_the_tokenizers(copy, runner):
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> <|bos|> $A", special_tokens=[("<|bos|>", 0), ("<|pad|>", 2)]
    )
    tokenizer.save(str(copy / "tokenizer.json"))
    made = mojax.run(mojax.load(copy)).generate(["A", ids("A")], max_tokens=30)
    assert made.prompt_tokens == (3, 1)
    assert [t.text for t in made.texts] == [SAID["A"]] * 2


def test_a_stream_grows_by_whole_characters(runner):
    assert len(ids("é日🙂")) > 4  # characters are split over tokens
    seen = []
    made = runner.generate(list(SAID), max_tokens=30, stream=seen.append)
    assert seen[-1] == list(made.texts) and len(seen) > 3
    for before, after in itertools.pairwise(seen):
        assert all(b.text.startswith(a.text) for a, b in zip(before, after, strict=True))
    assert not any("\ufffd" in text.text for texts in seen for text in texts)
    assert [t.reason for t in seen[0]] == [None, None]
    cut = runner.generate("A", max_tokens=1, stream=seen.append)
    assert cut.texts[0].text == "\ufffd" == seen[-1][0].text  # the end: nothing is to come


def test_seeds(random):
    prompts = [[3, 4, 5], [7]]
    a, b, c = (
        tokens(random.generate(prompts, max_tokens=12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert a == b != c
    other = random.generate([[3, 4, 5], [9, 9]], max_tokens=12, temperature=1.0, seed=1)
    assert tokens(other)[0] == a[0]  # a row does not depend on the others
    assert tokens(random.generate([[3, 4, 5]] * 2, max_tokens=12, temperature=1.0))[0] != a[0]


@pytest.mark.parametrize(
    "how", [{"temperature": t} for t in (1e-4, 1e-37, 1e-45)] + [{"temperature": 9.0, "top_p": 1e-50}]
)
def test_the_likeliest_token_is_a_limit(how, random):
    prompts = [[3, 4, 5], [7]]
    greedy = random.generate(prompts, max_tokens=12)
    assert tokens(random.generate(prompts, max_tokens=12, **how)) == tokens(greedy)


LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0], np.float32) + 100


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_tokens_are_drawn_from_the_nucleus(temperature, top_p):
    rows, order = 8192, np.random.default_rng(0).permutation(8)
    sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p), jax.random.key(3))
    batch = jnp.asarray(np.tile(LOGITS[order], (rows, 1)))
    found = np.bincount(np.asarray(jax.jit(decoding.choose)(batch, sampling, jnp.int32(5))), minlength=8)
    logs = (LOGITS - 100).astype(np.float64) / temperature
    p = np.exp(logs) / np.exp(logs).sum()
    p[np.cumsum(p) - p >= top_p] = 0  # LOGITS descend
    expected = rows * p[order] / p.sum()
    assert not found[expected == 0].any()
    inside = expected > 0
    squares = ((found - expected)[inside] ** 2 / expected[inside]).sum()
    assert squares < 24.3  # chi-square, at most 7 degrees of freedom: one in a thousand is above


def test_no_weight_is_decoded_ahead_and_nothing_is_compiled_twice(caplog):
    config = LLAMA | {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    params, format = draw(config), nvfp4.FORMAT()
    linears = [n for n in params if "proj" in n]
    wide = {n: w.astype(jnp.bfloat16) for n, w in params.items()}
    packed = wide | {n: format.encode(wide[n]) for n in linears}
    schemes = {n.removesuffix(".weight"): Scheme(format) for n in linears}
    config |= {"dtype": "bfloat16"}
    runner = mojax.run(Model(config, packed, find("models", "llama"), schemes=schemes))

    state = runner._prefill([[1, 2, 3]], None, 20)
    args = (runner.programs, runner.weights, state, None, jnp.int32(20))
    memory = decoding.advance.lower(*args).compile().memory_analysis()  # type: ignore
    whole, largest = 2 * sum(params[n].size for n in linears), 2 * 256 * 512
    assert memory.argument_size_in_bytes < 0.4 * whole
    assert memory.temp_size_in_bytes < 2.5 * largest < 0.3 * whole

    runner.generate([[1, 2, 3]], max_tokens=20)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        made = [runner.generate([[5] * n], max_tokens=m) for n, m in ((3, 20), (9, 33), (16, 2))]
    assert [len(m.texts[0].tokens) for m in made] == [20, 33, 2]
    assert not [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]


BAD = [
    ([], {}, "there are none"),
    (5, {}, "prompts: found int, needed texts or lists of token ids"),
    ([[]], {}, "prompt 0: is empty"),
    ([[3], [1.5]], {}, "prompt 1: is neither a text nor a list of token ids"),
    ([[3], [[1], [2, 3]]], {}, "prompt 1: is neither"),
    ([[3, 61]], {}, "prompt 0: holds token ids from 3 to 61; the vocabulary has 61"),
    ([[-1]], {}, "prompt 0: holds token ids from -1"),
    ([[3] * 120], {"max_tokens": 9}, "make 129; the model has 128 positions"),
    ("text", {}, "prompt 0: is text, and a model without files has no tokenizer; give prompts as lists"),
    ([[3]], {"max_tokens": 0}, "max_tokens: 0 is not at least 1"),
    ([[3]], {"temperature": -1.0}, "temperature: -1.0"),
    ([[3]], {"temperature": float("nan")}, "temperature: nan"),
    ([[3]], {"top_p": 0.0}, "top_p: 0.0 is not above 0"),
    ([[3]], {"top_p": 2.0}, "top_p: 2.0 is not above 0 and at most 1"),
    ([[3]], {"seed": -1}, "seed: -1"),
]


@pytest.mark.parametrize("prompts, how, message", BAD)
def test_what_cannot_be_generated(prompts, how, message, random):
    with pytest.raises(InputError, match=message):
        random.generate(prompts, **how)


def test_what_cannot_run(copy, tmp_path):
    function = mojax.from_function(lambda p, x: x @ p["up"], {"up": jnp.ones((8, 8))}, jnp.ones((1, 8)))
    with pytest.raises(InputError, match="found Function, needed a model"):
        mojax.run(function)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        mojax.run(mojax.load(copy)).generate("A")
    (copy / "tokenizer.json").unlink()
    without = mojax.run(mojax.load(copy))
    assert without.generate([ids("A")], max_tokens=30).texts[0] == (None, tuple(ids(SAID["A"])), "stop")
    with pytest.raises(InputError, match="no tokenizer; give prompts as lists of token ids"):
        without.generate("A")
    (copy / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is 'end'"):
        mojax.run(mojax.load(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(InputError, match="'unheard_of' has no forward function"):
        mojax.run(mojax.load(copy, generic=True))


def run(capsys, *args):
    capsys.readouterr()
    code = cli.run(["generate", *map(str, args)])
    return code, *capsys.readouterr()


def test_command_prints_a_text_once(capsys, scripted):
    code, out, err = run(capsys, f"--model={scripted}", "--prompt=A", "--max_tokens=30")
    assert (code, out) == (0, SAID["A"] + "\n")
    assert err.endswith(" tokens/s\n") and float(err.split()[0]) > 0
    code, out, err = run(capsys, f"--model={scripted}", "--prompt=A", "--max_tokens=1")
    assert (code, out, err) == (0, "\ufffd\n", "")


def test_command_with_several_prompts_and_json(capsys, scripted):
    both = (f"--model={scripted}", "--prompt=B", "--prompt=A", "--max_tokens=30")
    code, out, _ = run(capsys, *both)
    assert (code, out) == (0, f"> B\n{SAID['B']}\n\n> A\n{SAID['A']}\n\n")
    code, out, _ = run(capsys, *both, "--json")
    found = json.loads(out)
    assert code == 0 and set(found) == {"texts", "tokens_per_second"} and found["tokens_per_second"] > 0
    assert found["texts"] == [
        {"prompt": p, "prompt_tokens": 2, "text": SAID[p], "tokens": ids(SAID[p]), "reason": "stop"}
        for p in "BA"
    ]
    hot = ("--temperature=2", "--top_p=0.9", "--json")
    a, b, c = (run(capsys, *both[:3], *hot, f"--seed={seed}")[1] for seed in (1, 1, 2))
    a, b, c = ([t["tokens"] for t in json.loads(text)["texts"]] for text in (a, b, c))
    assert a == b != c


def test_command_says_what_is_wrong(capsys, copy, scripted):
    for args, message in (
        ((f"--model={scripted}", "--prompt=A", "--top_p=0"), "top_p: 0.0"),
        ((f"--model={scripted}", "--prompt=A", "--max_tokens=500"), "max_position_embeddings"),
        ((f"--model={scripted}",), "needs --prompt"),
        ((f"--model={copy}/nowhere", "--prompt=A"), "nowhere"),
    ):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run(capsys, f"--model={copy}", "--prompt=A")
    assert (code, out) == (2, "")
    assert err == "mojax: the model gives logits that are not finite; nothing can be generated\n"
    with pytest.raises(NotFiniteError):
        mojax.run(mojax.load(copy)).generate("A")
