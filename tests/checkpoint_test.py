"""Checkpoints: what is read is what was written, and every damaged file is one clear InputError."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from mojax.checkpoint import (
    INDEX,
    Checkpoint,
    locate,
    open_checkpoint,
    read_entries,
    read_shard,
    side_files,
    write_index,
    write_shard,
    write_text,
)
from mojax.errors import InputError
from mojax.header import DTYPES


def raw(header, data=b""):
    """A safetensors file from a header (object, or bytes as they are) and data."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def entry(dtype: object = "F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def folder_with(path, config: str | None = "{}", **files):
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(config)
    for name, tensors in files.items():
        write_shard(path / f"{name}.safetensors", tensors)
    return path


def every_dtype():
    rng = np.random.default_rng(0)
    made = {}
    for name, dtype in DTYPES.items():
        values = np.arange(2) if dtype == np.bool_ else rng.integers(0, 100, 6)
        made[name] = values.astype(dtype).reshape(2, -1)
    made["scalar"] = np.array(3, ml_dtypes.bfloat16)
    made["nothing"] = np.zeros((0, 5), np.float32)
    return made


def test_every_dtype_round_trips_bytes(tmp_path):
    tensors = every_dtype()
    files = open_checkpoint(folder_with(tmp_path / "m", model=tensors))
    assert set(files) == set(tensors) and len(files) == len(tensors)
    for name, x in tensors.items():
        assert files[name].dtype == x.dtype and files[name].shape == x.shape, name
        assert files[name].tobytes() == x.tobytes(), name
        assert not files[name].flags.writeable, name
        assert files.spec(name) == (x.dtype, x.shape)


def test_all_256_codes_of_eight_bit_floats_survive(tmp_path):
    codes = np.arange(256, dtype=np.uint8)
    kinds = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu)
    write_shard(tmp_path / "x.safetensors", {k.__name__: codes.view(k) for k in kinds})
    for name, x in read_shard(tmp_path / "x.safetensors").items():
        assert x.dtype.name == name and (x.view(np.uint8) == codes).all()


def test_agrees_with_the_safetensors_library(tmp_path):
    tensors = {n: x for n, x in every_dtype().items() if x.dtype.isbuiltin == 1}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    theirs, ours = load_file(path), read_shard(path)
    assert set(theirs) == set(ours)
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name], strict=True)
    write_shard(path, tensors)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        for name in tensors:
            np.testing.assert_array_equal(file.get_tensor(name), tensors[name], strict=True)


def test_large_tensors_are_views_and_small_ones_need_no_mapping(tmp_path):
    large = np.arange(1 << 15, dtype=np.float32)
    files = open_checkpoint(folder_with(tmp_path / "m", model={"large": large, "small": large[:3]}))
    x, root = files["large"], files["large"]
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
    assert type(root).__name__ == "mmap" and (x == large).all() and not x.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        files["small"][0] = 1


@pytest.mark.parametrize("count", [3, 40_000])  # read, and mapped
def test_unaligned_tensors(tmp_path, count):
    x = np.arange(count, dtype=np.float32).astype(ml_dtypes.bfloat16)
    y = np.arange(count, dtype=np.float64)
    ends = [1, 1 + x.nbytes, 1 + x.nbytes + y.nbytes]
    header = {
        "a": entry("U8", [1], [0, ends[0]]),
        "x": entry("BF16", x.shape, ends[:2]),
        "y": entry("F64", y.shape, ends[1:]),
    }
    (tmp_path / "x.safetensors").write_bytes(raw(header, b"\7" + x.tobytes() + y.tobytes()))
    found = read_shard(tmp_path / "x.safetensors")
    assert (found["x"] == x).all() and (found["y"] == y).all() and found["a"] == 7


def test_only_headers_are_read_on_opening(tmp_path):
    folder = folder_with(tmp_path / "m")
    size = 1 << 40  # a terabyte of holes: reading it would take minutes
    with open(folder / "model.safetensors", "wb") as f:
        head = raw({"x": entry("U8", [size], [0, size])})
        f.write(head)
        f.truncate(len(head) + size)
    files = open_checkpoint(folder)
    assert files.spec("x") == (np.uint8, (size,))
    assert files.entries["x"].stop - files.entries["x"].start == size


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    x = np.zeros(1 << 16, np.uint8)
    files = open_checkpoint(folder_with(tmp_path / "m", model={"small": x[:10], "large": x}))
    os.truncate(tmp_path / "m" / "model.safetensors", 100)
    for name in files:
        with pytest.raises(InputError, match=name):
            files[name]


def test_headers_only_has_shapes_but_no_data(tmp_path):
    there = open_checkpoint(folder_with(tmp_path / "m", model={"x": np.zeros(3)}))
    files = Checkpoint(there.folder, there.config, there.entries, headers_only=True)
    assert files.spec("x").shape == (3,)
    with pytest.raises(InputError, match="x: only headers"):
        files["x"]
    with pytest.raises(KeyError):
        files["y"]


def sharded(path, indexed=True):
    parts = {"model-00001-of-00002": {"a": np.ones(1)}, "model-00002-of-00002": {"b": np.full(1, 2.0)}}
    folder_with(path, **parts)
    if indexed:
        weight_map = {n: f"{part}.safetensors" for part, tensors in parts.items() for n in tensors}
        write_index(path, weight_map, 16)
    return path


@pytest.mark.parametrize("indexed", [True, False])
def test_shards(tmp_path, indexed):
    files = open_checkpoint(sharded(tmp_path / "m", indexed))
    assert {n: float(x[0]) for n, x in files.items()} == {"a": 1, "b": 2}
    assert files.entries["b"].file.name == "model-00002-of-00002.safetensors"


def test_index_is_in_the_hugging_face_form(tmp_path):
    write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"}, 8)
    assert (tmp_path / INDEX).read_text() == (
        '{\n  "metadata": {\n    "total_size": 8\n  },\n  "weight_map": {\n'
        '    "a": "1.safetensors",\n    "b": "2.safetensors"\n  }\n}\n'
    )


def test_every_missing_shard_is_named(tmp_path):
    for indexed in (True, False):
        folder = folder_with(tmp_path / str(indexed))
        write_shard(folder / "model-00002-of-00004.safetensors", {"a": np.zeros(1)})
        names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
        if indexed:
            write_index(folder, dict(zip("xayz", names, strict=True)), 8)
        with pytest.raises(InputError) as error:
            open_checkpoint(folder)
        assert [n in str(error.value) for n in names] == [True, False, True, True]


def test_index_and_shards_that_disagree(tmp_path):
    folder = sharded(tmp_path / "m")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_index(folder, names | {"c": names["b"]}, 8)
    with pytest.raises(InputError, match="'c' in model-00002"):
        open_checkpoint(folder)
    write_index(folder, {"a": names["b"], "b": names["a"]}, 8)
    with pytest.raises(InputError, match=r"'a' in model-00002.*'b' in model-00001"):
        open_checkpoint(folder)
    write_index(folder, names | {"d": "../elsewhere.safetensors"}, 8)
    with pytest.raises(InputError, match="elsewhere"):
        open_checkpoint(folder)
    for bad in ("{}", '{"weight_map": []}', "[]", "{"):
        (folder / INDEX).write_text(bad)
        with pytest.raises(InputError, match=r"index\.json"):
            open_checkpoint(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = sharded(tmp_path / "m")
    write_shard(folder / "model-00002-of-00002.safetensors", {"a": np.zeros(1), "b": np.zeros(1)})
    with pytest.raises(InputError, match=r"'a' is in two files: .*00001-of.*00002-of"):
        open_checkpoint(folder)


def test_ambiguous_folders(tmp_path):
    folder = sharded(tmp_path / "m", indexed=False)
    write_shard(folder / "model-00001-of-00001.safetensors", {"c": np.zeros(1)})
    with pytest.raises(InputError, match="more than one set"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "n")
    write_shard(folder / "model.safetensors", {"c": np.zeros(1)})
    with pytest.raises(InputError, match="remove one"):
        open_checkpoint(folder)
    folder = folder_with(tmp_path / "o", model={"a": np.zeros(1)}, consolidated={"b": np.zeros(1)})
    assert list(open_checkpoint(folder)) == ["a"]


def test_folders_that_are_no_checkpoint(tmp_path):
    def message(folder):
        with pytest.raises(InputError) as error:
            open_checkpoint(folder)
        return str(error.value)

    one = {"a": np.zeros(1)}
    assert "no such folder" in message(tmp_path / "absent")
    assert "empty" in message(folder_with(tmp_path / "empty", None))
    assert "no config.json" in message(folder_with(tmp_path / "bare", None, model=one))
    for i, bad in enumerate(["{", "[]", "\ud800".encode("utf-8", "surrogatepass").decode("latin1")]):
        assert "config.json" in message(folder_with(tmp_path / f"broken{i}", bad, model=one))
    adapter = folder_with(tmp_path / "adapter", None, adapter_model=one)
    (adapter / "adapter_config.json").write_text("{}")
    assert "merge it" in message(adapter)
    assert "give the folder" in message(adapter / "adapter_model.safetensors")
    assert "no *.safetensors, found config.json" in message(folder_with(tmp_path / "plain"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model-Q4.gguf"])
def test_other_weight_formats_say_how_to_convert(tmp_path, name):
    folder = folder_with(tmp_path / "m")
    (folder / name).write_bytes(b"x")
    with pytest.raises(InputError) as error:
        open_checkpoint(folder)
    assert name in str(error.value) and "save_pretrained" in str(error.value)
    assert ("gguf_file='model-Q4.gguf'" in str(error.value)) == name.endswith("gguf")
    compile(str(error.value).split('-c "')[1].rstrip('"'), "advice", "exec")  # the advice is valid Python


def test_side_files_follow_links_and_leave_weights(tmp_path):
    kept = ["tokenizer.json", "chat_template.jinja", "sub/config.json", "sub/README.md", ".gitattributes"]
    left = [
        "config.json", "README.md", "model.safetensors", INDEX, "x.bin", "x.bin.index.json", ".cache/x.json",
        "consolidated.00.pth", "params/x.gguf", ".git/HEAD", "original/params.json", "tf_model.h5",
    ]  # fmt: skip
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for i, name in enumerate(kept + left):  # as in the hub's cache: every file is a link to a blob
        (blobs / str(i)).write_bytes(name.encode())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blobs / str(i))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").write_text("1")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    found = side_files(folder)
    assert [str(f.relative_to(folder)) for f in found] == sorted([*kept, "linked/code.py"])
    assert (folder / "tokenizer.json").read_bytes() == b"tokenizer.json"
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"gone\.json"):
        side_files(folder)


def test_a_snapshot_of_links_opens(tmp_path):
    folder_with(tmp_path / "blobs", model={"x": np.arange(3)})
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).symlink_to(tmp_path / "blobs" / name)
    assert open_checkpoint(tmp_path / "m")["x"].tolist() == [0, 1, 2]


def test_writing_is_deterministic_and_leaves_nothing_else(tmp_path):
    tensors = every_dtype()
    write_shard(tmp_path / "a.safetensors", tensors)
    write_shard(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    (tmp_path / "c").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "c").stat().st_mode


def test_writing_strided_transposed_and_mapped_arrays(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_shard(tmp_path / "a.safetensors", {"t": x.T, "s": x[::2, 1::2], "big": x.astype(">f4")})
    first = read_shard(tmp_path / "a.safetensors")
    assert (first["t"] == x.T).all() and (first["s"] == x[::2, 1::2]).all() and (first["big"] == x).all()
    write_shard(tmp_path / "a.safetensors", first)  # over the file that is mapped
    assert (read_shard(tmp_path / "a.safetensors")["t"] == x.T).all()


def test_writing_refuses(tmp_path):
    with pytest.raises(InputError, match="'q' is float4_e2m1fn"):
        write_shard(tmp_path / "a.safetensors", {"q": np.zeros(2, ml_dtypes.float4_e2m1fn)})
    with pytest.raises(InputError, match="cannot be written"):
        write_shard(tmp_path / "absent" / "a.safetensors", {"q": np.zeros(2)})
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_shard(tmp_path / "a.safetensors", {"q": np.zeros(2)})
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "absent" / "x.json", "{}")
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_entries_of_a_written_shard(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"x": np.zeros((2, 3), np.int16), "y": np.zeros(1)})
    found = read_entries(tmp_path / "a.safetensors")
    assert found["x"].shape == (2, 3) and sum(e.stop - e.start for e in found.values()) == 20
    size = (tmp_path / "a.safetensors").stat().st_size
    assert max(e.stop for e in found.values()) == size


def test_tiny_is_built_in_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("tiny").config["model_type"] == "llama"
    folder_with(tmp_path / "tiny", '{"model_type": "mine"}', model={"x": np.zeros(1)})
    assert locate("tiny").config["model_type"] == "mine"
    assert list(locate(tmp_path / "tiny", headers_only=True)) == ["x"]


@pytest.mark.parametrize(
    "source", ["./typo", "models/a/b", "typo.safetensors", "gpt", "/absent/x", "a/../b", ""]
)
def test_a_mistyped_folder(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        locate(source)
