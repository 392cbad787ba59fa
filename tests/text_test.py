"""Tokens: the ids that the model's tokenizer and template give; every bad source is a clear InputError."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mojax.errors import InputError
from mojax.text import Purpose, tokens
from mojax.tokenizer import load_template, load_tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "mojax" / "data" / "tiny"
TEXT = ROOT / "mojax" / "data" / "text"
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def encode():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def chat(tmp_path):
    """The tiny model's tokenizer with a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def ask(source, folder=TINY, sequences=1, length=8, seed=0, purpose: Purpose = "evaluation", vocab=None):
    return tokens(source, folder, sequences=sequences, length=length, seed=seed, purpose=purpose, vocab=vocab)


def jsonl(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_evaluation_is_the_beginning_of_the_stream(encode):
    found = ask("builtin", sequences=64, length=256, vocab=4096)
    whole = encode((TEXT / "evaluation.txt").read_text(encoding="utf-8"))
    assert found.ids.dtype == np.int32 and found.ids.shape == (64, 256)
    assert found.ids.ravel().tolist() == whole[: 64 * 256]
    assert found.preview == (TEXT / "evaluation.txt").read_text(encoding="utf-8")[:200]
    assert "built-in evaluation" in found.origin
    assert not (found.ids[1:, 0] == 0).any()  # no <|bos|> per piece


def test_evaluation_with_a_seed_is_a_choice(encode):
    whole = encode((TEXT / "evaluation.txt").read_text(encoding="utf-8"))
    pieces = [tuple(whole[i : i + 64]) for i in range(0, 8 * 16 * 64, 64)]
    found = [ask("builtin", sequences=16, length=64, seed=seed) for seed in (0, 5, 5, 6)]
    at = [[pieces.index(tuple(row)) for row in f.ids.tolist()] for f in found]
    assert at[0] == list(range(16)) != at[1] == sorted(set(at[1]))
    assert at[1] == at[2] != at[3]


def test_calibration_is_a_seeded_choice_of_whole_pieces(encode):
    whole = encode((TEXT / "calibration.txt").read_text(encoding="utf-8"))
    pieces = [tuple(whole[i : i + 256]) for i in range(0, len(whole) - 255, 256)]
    first = ask("builtin", sequences=64, length=256, purpose="calibration")
    at = [pieces.index(tuple(row)) for row in first.ids.tolist()]
    assert at == sorted(set(at)) and at != list(range(64))
    assert ask("builtin", sequences=64, length=256, purpose="calibration").digest == first.digest
    assert ask("builtin", sequences=64, length=256, purpose="calibration", seed=1).digest != first.digest
    every = ask("builtin", sequences=len(pieces), length=256, purpose="calibration")
    assert [tuple(row) for row in every.ids.tolist()] == pieces


def test_the_builtin_text_takes_well_under_half_a_second():
    def timed():
        begun = time.process_time()  # of this process: the machine may be busy
        ask("builtin", sequences=64, length=256, purpose="calibration")
        return time.process_time() - begun

    assert min(timed() for _ in range(3)) < 0.5


def test_a_long_file_is_not_read_to_its_end(tmp_path, encode):
    text = (TEXT / "evaluation.txt").read_text(encoding="utf-8")
    (tmp_path / "x.txt").write_text(text * 40)  # ten megabytes
    begun = time.process_time()
    found = ask(tmp_path / "x.txt", sequences=4, length=64, purpose="calibration")
    assert time.process_time() - begun < 1
    pieces = [tuple(p) for p in np.reshape(encode(text)[: 8 * 4 * 64], (-1, 64)).tolist()]
    assert all(tuple(row) in pieces for row in found.ids.tolist())


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(InputError, match=r"78861 tokens, needed 1000 x 256 = 256000; pass --sequences=308"):
        ask("builtin", sequences=1000, length=256)
    with pytest.raises(InputError, match="--sequences=1 --length=78861"):
        ask("builtin", sequences=1, length=100_000)
    with pytest.raises(InputError, match="at least 1"):
        ask("builtin", sequences=0)


def test_jsonl_rows_are_one_stream(tmp_path, encode):
    path = jsonl(
        tmp_path / "x.jsonl",
        {"text": "The first document."},
        "",
        {"text": ""},
        {"prompt": "One and", "completion": " two.", "extra": 1},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "You"}]},
    )
    stream = encode("The first document.") + encode("\n\nOne and two.") + encode("\n\nHello\n\nYou")
    found = ask(path, length=len(stream))
    assert found.ids[0].tolist() == stream
    assert found.preview == "The first document.\n\nOne and two.\n\nHello\n\nYou"
    with pytest.raises(InputError, match=f"{len(stream)} tokens"):
        ask(path, length=len(stream) + 1)


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", "row 2: not JSON"),
        ('{"text": "\\ud800', "row 2: not JSON"),
        ("[1]", "row 2: found list; needed text"),
        ('{"title": "x"}', "row 2: found keys title; needed text"),
        ('{"text": 3}', "row 2: found keys text"),
        ('{"prompt": "x"}', "row 2: found keys prompt"),
        ('{"messages": []}', "row 2: messages is '\\[\\]'"),
        ('{"messages": ["x"]}', "row 2: a message is 'x'"),
        ('{"messages": [{"content": "x"}]}', "row 2: a message is"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        ask(jsonl(tmp_path / "x.jsonl", {"text": "a b"}, bad))


def test_parquet(tmp_path, encode):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(**columns):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    rows = ["One two three.", "Four five six."]
    stream = encode(rows[0]) + encode("\n\n" + rows[1])
    assert ask(write(text=rows, id=[1, 2]), length=len(stream)).ids[0].tolist() == stream
    talk = [[{"role": "user", "content": rows[0]}], [{"role": "user", "content": rows[1]}]]
    assert ask(write(messages=talk), length=len(stream)).ids[0].tolist() == stream
    with pytest.raises(InputError, match="row 2: found keys text"):
        ask(write(text=["a", None]), length=100)
    with pytest.raises(InputError, match="columns id; needed text or messages"):
        ask(write(id=[1]))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        ask(tmp_path / "x.parquet")


def test_npz(tmp_path):
    path, ids = tmp_path / "x.npz", np.arange(40).reshape(4, 10)
    np.savez(path, tokens=ids)
    for purpose in ("calibration", "evaluation"):
        found = ask(path, tmp_path, sequences=3, length=8, purpose=purpose, vocab=40)
        assert found.ids.dtype == np.int32 and (found.ids == ids[:3, :8]).all()
    assert found.preview.startswith("token ids 0 1 2")
    with pytest.raises(InputError, match=r"\[4, 10\], needed \[5, 8\]; pass --sequences=4 --length=10"):
        ask(path, tmp_path, sequences=5)
    with pytest.raises(InputError, match="token id 37 is outside the model's vocabulary of 37"):
        ask(path, tmp_path, sequences=4, vocab=37)
    for bad, message in [
        ({"tokens": ids - 1}, "token id -1 is outside"),
        ({"tokens": ids + (1 << 40)}, "outside 32 bits"),
        ({"tokens": ids.astype(float)}, "float64"),
        ({"tokens": ids[0]}, r"int64 \[10\]; needed integers"),
        ({"ids": ids}, "no array 'tokens'; found ids"),
        ({"tokens": np.array([None])}, "cannot be read as npz"),
    ]:
        np.savez(path, **bad)
        with pytest.raises(InputError, match=message):
            ask(path, tmp_path)
    for content in (b"", b"PK\3\4 not a zip", b"text"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as npz"):
            ask(path, tmp_path)


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        ask(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="no such file"):
        ask(tmp_path)
    (tmp_path / "x.md").write_text("text")
    with pytest.raises(InputError, match=r"needs to end in \.txt"):
        ask(tmp_path / "x.md")
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        ask(tmp_path / "x.txt")
    for name, empty in (("x.txt", ""), ("x.txt", " \n\n"), ("x.jsonl", ""), ("x.jsonl", '{"text": ""}')):
        (tmp_path / name).write_text(empty)
        with pytest.raises(InputError, match="holds no text"):
            ask(tmp_path / name)


def test_ids_outside_the_vocabulary():
    with pytest.raises(InputError, match="outside the model's vocabulary of 100"):
        ask("builtin", vocab=100)


def test_calibration_rows_are_rendered(tmp_path, chat, encode):
    path = jsonl(
        tmp_path / "x.jsonl",
        {"text": "A document."},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"prompt": "In", "completion": "out"},
    )
    text = (
        "<|bos|><|user|>A document.<|eos|><|bos|><|user|>Why?<|eos|><|assistant|>So.<|eos|>"
        "<|bos|><|user|>In<|eos|><|assistant|>out<|eos|>"
    )
    stream = encode(text)
    assert {0, 1, 3, 4} <= set(stream)  # special tokens, not their letters
    found = ask(path, chat, length=len(stream), purpose="calibration")
    assert found.ids[0].tolist() == stream and found.preview == text and "chat template" in found.origin
    plain = (
        encode("A document.")
        + encode("<|bos|><|user|>Why?<|eos|><|assistant|>So.<|eos|>")
        + encode("\n\nInout")
    )
    assert ask(path, chat, length=len(plain)).ids[0].tolist() == plain


def test_a_txt_file_becomes_turns_of_paragraphs(chat):
    found = ask("builtin", chat, sequences=64, length=256, purpose="calibration")
    turns = (found.ids == 3).sum()  # <|user|>
    assert 10 < turns and found.preview.startswith("<|bos|><|user|>:mod:`ensurepip`")
    assert (ask("builtin", chat, sequences=64, length=256).ids > 4).all()  # evaluation stays plain


def test_template_sources(chat):
    def render(**config):
        (chat / "tokenizer_config.json").write_text(json.dumps(config))
        template = load_template(chat)
        return template and template([{"role": "user", "content": "x"}])

    bos = {"bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": None}
    assert render(**bos, chat_template="ignored") == "<b><|user|>x<e>"
    (chat / "chat_template.jinja").unlink()
    assert render(**bos, chat_template="{{ bos_token }}!") == "<b>!"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert render(chat_template=named) == "D"
    assert render(chat_template=named[:1]) is None and render() is None
    (chat / "special_tokens_map.json").write_text('{"eos_token": "<m>"}')
    assert render(chat_template="{{ eos_token }}") == "<m>"
    with pytest.raises(InputError, match="template is not valid"):
        render(chat_template="{% if %}")
    with pytest.raises(InputError, match="refuses the messages"):
        render(chat_template="{{ absent.attribute }}")
    (chat / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match=r"tokenizer_config\.json cannot be read"):
        load_template(chat)


def test_a_template_that_refuses_names_the_row(tmp_path, chat):
    path = jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"messages": [{"role": "system", "content": "x"}]})
    with pytest.raises(InputError, match="row 2: the chat template refuses the messages: no role system"):
        ask(path, chat, purpose="calibration", length=100)


TEMPLATES = {
    "controls": "{% for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
    "{{ m | tojson }}\n{% endfor %}\n",
    "whitespace": "  {% for m in messages %}\n    {{ m['content'] }}\n  {% endfor %}\nend\n",
    "json": "{{ messages | tojson(indent=2) }}{{ {'b': 'é<', 'a': 1} | tojson(sort_keys=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "absent": "{% if tools %}T{% endif %}{% if documents is defined %}D{% endif %}"
    "{% if add_generation_prompt %}G{% endif %}{{ enable_thinking is defined }}{{ undefined_name }}",
    "dates": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') | length }}{% endif %}",
    "methods": "{{ messages[0].content.split('</think>')[-1].lstrip('\\n').strip() }}"
    "{{ messages[::-1] | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(chat, name):
    transformers = pytest.importorskip("transformers")
    (chat / "chat_template.jinja").write_text(TEMPLATES[name])
    messages = [{"role": "user", "content": "<think>é</think>\n x "}, {"role": "assistant", "content": "y"}]
    theirs = transformers.AutoTokenizer.from_pretrained(str(chat))
    render = load_template(chat)
    assert render is not None
    assert render(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_a_template_cannot_reach_python(chat):
    (chat / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="refuses"):
        ask("builtin", chat, purpose="calibration")


def test_the_day_does_not_change_the_tokens(chat):
    (chat / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}")
    render = load_template(chat)
    assert render is not None and render([]) == "2024-07-26"


def test_truncation_and_padding_of_the_file_are_off(chat, encode):
    tokenizer = Tokenizer.from_file(str(chat / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(chat / "tokenizer.json"))
    texts = ["one two three four five six seven", "a"]
    assert load_tokenizer(chat).encode(texts) == [encode(t) for t in texts]


def test_other_tokenizer_files_go_through_transformers(tmp_path, encode):
    pytest.importorskip("transformers")
    model = json.loads((TINY / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}'
    )
    assert ask("builtin", tmp_path, length=64).ids[0].tolist() == ask("builtin", length=64).ids[0].tolist()


def test_without_a_tokenizer(tmp_path):
    with pytest.raises(
        InputError, match=r"no tokenizer; give tokens as an npz file.*fp8_dynamic.*nvfp4_weight_only"
    ):
        ask("builtin", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        ask("builtin", tmp_path)


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    ).stderr


def test_missing_packages_are_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "x.parquet").write_bytes(b"x")
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from mojax.text import tokens\n"
        "tokens({}, Path({}), sequences=1, length=1, purpose='evaluation')"
    )
    found = run(code.format("'builtin'", "sys.argv[1]"), tmp_path)
    assert "no tokenizer.json, and tokenizer.model needs transformers: pip install 'mojax[hf]'" in found
    found = run(code.format("sys.argv[1] + '/x.parquet'", repr(str(TINY))), tmp_path)
    assert "reading parquet needs pyarrow: pip install 'mojax[parquet]'" in found
