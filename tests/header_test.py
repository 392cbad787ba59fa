"""Headers: what the safetensors library reads is read alike; every lie is an InputError, never a crash."""

import json
import struct

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mojax.checkpoint import read_shard, write_shard
from mojax.errors import InputError
from mojax.header import DTYPES, read_header

fuzz = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def raw(header, data=b""):
    """A safetensors file from a header (object, or bytes as they are) and data."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def entry(dtype: object = "F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWO = {"a": entry(), "b": entry(offsets=(4, 8))}
LIES = {
    "no bytes at all": (b"", "shorter than its header"),
    "short prefix": (b"\1\0", "shorter than its header"),
    "length beyond the file": (struct.pack("<Q", 1 << 63) + b"{}", "shorter than its header"),
    "length one too many": (struct.pack("<Q", 3) + b"{}", "shorter than its header"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not JSON": (raw(b"{,}"), "not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "an array": (raw(b"[]"), "not a JSON object"),
    "empty header": (raw(b""), "not a JSON object"),
    "deep": (raw(b'{"a":' * 100_000), "not JSON"),
    "long integer": (raw(b'{"a":' + b"1" * 5000 + b"}"), "not JSON"),
    "not a number": (raw(b'{"a":NaN}'), "not JSON"),
    "twice": (
        raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        "'a' is in the header twice",
    ),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "not an entry": (raw({"a": 1}), "'a': found 1"),
    "no dtype": (raw({"a": {"shape": [0], "data_offsets": [0, 0]}}), "'a': dtype None"),
    "unknown dtype": (raw({"a": entry("F4")}, bytes(4)), "'a': dtype 'F4' is unknown"),
    "dtype list": (raw({"a": entry(["F32"])}, bytes(4)), "'a': dtype"),
    "negative size": (raw({"a": entry(shape=[-1])}, bytes(4)), "'a': shape"),
    "true size": (raw({"a": entry(shape=[True])}, bytes(4)), "'a': shape"),
    "float size": (raw({"a": entry(shape=[1.0])}, bytes(4)), "'a': shape"),
    "65 axes": (raw({"a": entry(shape=[1] * 65)}, bytes(4)), "'a': shape"),
    "overflow": (raw({"a": entry(shape=[1 << 40, 1 << 40], offsets=[0, 0])}), "'a': shape .* larger"),
    "overflow with zero": (
        raw({"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}),
        "'a': shape .* larger",
    ),
    "size and length": (raw({"a": entry(shape=[2])}, bytes(4)), "'a': F32 .* takes 8 bytes.* 4"),
    "negative offsets": (raw({"a": entry(offsets=[-4, 0])}, bytes(4)), "'a': data_offsets"),
    "backward offsets": (raw({"a": entry(offsets=[4, 0])}, bytes(4)), "'a': data_offsets"),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 4])}, bytes(4)), "'a': data_offsets"),
    "huge offsets": (raw({"a": entry(offsets=[1 << 64, (1 << 64) + 4])}, bytes(4)), "'a': data_offsets"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "'b' .*overlaps"),
    "same bytes": (raw({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
    "hole": (raw({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "'b' .*unused bytes"),
    "hole at the start": (raw({"a": entry(offsets=[4, 8])}, bytes(8)), "'a' .*unused bytes"),
    "truncated": (raw(TWO, bytes(7)), "'b' ends at byte .*incomplete"),
    "trailing": (raw(TWO, bytes(9)), "1 bytes after the last tensor"),
    "bad name": (raw({"\ud800": entry()}, bytes(4)), "not valid Unicode"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_names_the_file_and_the_problem(tmp_path, case):
    content, expected = LIES[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value)
    str(error.value).encode()  # printable
    with pytest.raises(safetensors.SafetensorError):  # but for four, so does the library
        if case in ("twice", "65 axes", "overflow with zero", "unknown dtype"):
            raise safetensors.SafetensorError
        with safetensors.safe_open(tmp_path / "x.safetensors", framework="np") as file:
            file.keys()


def test_a_header_over_the_limit(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", 100_000_001))
        f.truncate(100_000_100)
    with pytest.raises(InputError, match="100000001 bytes; at most 100000000"):
        read_header(path)


def check_like_the_library(path):
    """Ours reads what the library reads, or gives InputError; it never reads what the library refuses."""
    try:
        ours = read_shard(path)
    except InputError as error:
        assert str(path) in str(error)
        return None
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(ours)
        for name, x in ours.items():
            assert tuple(file.get_slice(name).get_shape()) == x.shape
            if x.dtype.isbuiltin == 1:
                np.testing.assert_array_equal(file.get_tensor(name), x, strict=True)
    return ours


@fuzz
@given(content=st.binary(max_size=200), prefixed=st.booleans())
def test_fuzz_random_bytes(tmp_path, content, prefixed):
    (tmp_path / "x.safetensors").write_bytes(raw(content) if prefixed else content)
    check_like_the_library(tmp_path / "x.safetensors")


@fuzz
@given(data=st.data())
def test_fuzz_mutated_files(tmp_path, data):
    tensors = {"a": np.ones((1, 2)), "b": np.arange(3, dtype=np.int8), "c": np.zeros((0, 2), np.float16)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([*b'0123456789{}[]:,"- FUI\x00\xff', content[at] ^ 1]))
    content = content[: data.draw(st.integers(max(0, len(content) - 4), len(content)))]
    content += data.draw(st.sampled_from([b"", b"", b"\0"]))
    path.write_bytes(content)
    check_like_the_library(path)


sizes = st.one_of(st.integers(-2, 6), st.sampled_from([1 << 31, 1 << 62, 1 << 63, 1 << 64]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "BOOL", "F64", "X", 3]),
        "shape": st.one_of(st.lists(sizes, max_size=3), st.none(), st.just("1")),
        "data_offsets": st.one_of(
            st.lists(sizes, min_size=2, max_size=2), st.lists(sizes, max_size=3), st.none()
        ),
    }
)


@fuzz
@given(
    header=st.dictionaries(st.text(max_size=3), st.one_of(entries, st.integers()), max_size=3),
    size=st.integers(0, 9),
)
def test_fuzz_structured_headers(tmp_path, header, size):
    (tmp_path / "x.safetensors").write_bytes(raw(header, bytes(size)))
    check_like_the_library(tmp_path / "x.safetensors")


@fuzz
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=4), max_size=4
    ),
    kind=st.sampled_from(sorted(DTYPES)),
)
def test_fuzz_writing_then_reading(tmp_path, shapes, kind):
    rng = np.random.default_rng(len(shapes))
    tensors = {
        n: rng.integers(0, 2, shape).astype(DTYPES[kind])
        for n, shape in shapes.items()
        if n != "__metadata__"
    }
    write_shard(tmp_path / "x.safetensors", tensors)
    ours = check_like_the_library(tmp_path / "x.safetensors")
    assert ours is not None and ours.keys() == tensors.keys()
    assert all(ours[n].tobytes() == x.tobytes() and ours[n].shape == x.shape for n, x in tensors.items())
