"""The hub: the real client against a local server that speaks the hub's routes."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from mojax.checkpoint import locate, write_index, write_shard
from mojax.errors import InputError

pytest.importorskip("huggingface_hub")
SHA = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Folders by repository name, at one commit each; notes the path and size of what it sends."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.repositories, self.sent, self.ranges = {}, [], True


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that its client asks."""

    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        path, repositories = urlsplit(self.path).path, self.server.repositories
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, kind, revision = m.groups()
        elif m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, kind = m[1], m[2], "file"
        else:
            return self.answer(404)
        if name == "org/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if name not in repositories:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", SHA):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "file":
            return self.file(repositories[name] / m[3])
        files = sorted(f for f in repositories[name].rglob("*") if f.is_file())
        names = [str(f.relative_to(repositories[name])) for f in files]
        if kind == "tree":
            rows = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": f"{i:040x}"}
                for i, (n, f) in enumerate(zip(names, files, strict=True))
            ]
            return self.answer(200, body=json.dumps(rows).encode())
        info = {
            "id": name,
            "modelId": name,
            "sha": SHA,
            "tags": [],
            "siblings": [{"rfilename": n} for n in names],
        }
        self.answer(200, body=json.dumps(info).encode())

    do_HEAD = do_GET

    def file(self, path):
        if not path.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        about = {"X-Repo-Commit": SHA, "ETag": f'"{path.name}-{len(data)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or not self.server.ranges:
            return self.answer(200, about, data)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.answer(206, about, data[start:stop])

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.server.sent.append((urlsplit(self.path).path, len(body)))
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


BIG = 300_000


def repository(folder, shards=1, extra=()):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("card")
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in (1, 2)]
    )
    weight_map = {}
    for i, name in enumerate(names):
        write_shard(folder / name, {f"x{i}": np.full(BIG, i, np.uint8), f"y{i}": np.ones((2, 3), np.float32)})
        weight_map |= {f"x{i}": name, f"y{i}": name}
    if shards > 1:
        write_index(folder, weight_map, shards * (BIG + 24))
    for name in extra:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 10)
    return folder


def ask(hub, home, source, **options):
    """`locate` in a process of its own, since the client reads its settings when it is imported."""
    code = """
import json, sys
from mojax.checkpoint import locate
from mojax.errors import InputError
source, options = json.loads(sys.argv[1])
if isinstance(source, list):  # several that fail
    messages = []
    for one in source:
        try:
            locate(one, **options)
        except InputError as error:
            messages.append(str(error))
    print(json.dumps(messages))
    raise SystemExit
try:
    files = locate(source, **options)
except InputError as error:
    print(json.dumps({"error": str(error)}))
    raise SystemExit
found = {"tensors": {n: [files.spec(n).dtype.name, list(files.spec(n).shape)] for n in files}}
found |= {"config": files.config, "folder": str(files.folder), "only": files.headers_only}
found["present"] = sorted(str(f.relative_to(files.folder)) for f in files.folder.rglob("*") if f.is_file())
try:
    found["sum"] = {n: float(files[n].sum()) for n in files}
except InputError as error:
    found["sum"] = str(error)
print(json.dumps(found))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    env["HF_ENDPOINT"] = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_address[1]}"
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps([source, options])],
        env=env, cwd=home.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def home(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "home"


def test_download_reads_all_but_other_weights_and_then_the_cache(hub, home, tmp_path):
    extra = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "original/p.json",
        "a/b.txt",
    ]
    hub.repositories["org/one"] = repository(tmp_path / "one", extra=extra)
    found = ask(hub, home, "org/one")
    assert found["config"] == {"model_type": "llama"} and not found["only"]
    assert found["sum"] == {"x0": 0, "y0": 6}
    assert found["present"] == ["README.md", "a/b.txt", "config.json", "model.safetensors", "tokenizer.json"]
    gone = ask("http://127.0.0.1:9", home, "org/one")  # nobody listens there: the cache has it all
    assert gone == found


@pytest.mark.parametrize("headers", [False, True])
def test_an_adapter_of_ours_comes_with_its_model(hub, home, tmp_path, headers):
    """The low-rank branches of a checkpoint; of other folders no weights are taken."""
    folder = hub.repositories["org/two"] = repository(tmp_path / "two", extra=["onnx/model.safetensors"])
    (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}')
    name, large = "base_model.model.x.lora_A.weight", np.ones((8, BIG), np.float32)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    write_shard(folder / "adapter/adapter_model.safetensors", {name: large})
    found = ask(hub, home, "org/two", headers_only=headers)
    assert ("adapter/adapter_model.safetensors" in found["present"]) != headers
    assert "adapter/adapter_config.json" in found["present"]
    assert "onnx/model.safetensors" not in found["present"]
    if headers:
        assert found["tensors"][name] == ["float32", [8, BIG]]
        assert sum(size for _, size in hub.sent) < large.nbytes


@pytest.mark.parametrize("shards, ranges", [(1, True), (2, True), (1, False)])
def test_headers_only_fetches_no_weights(hub, home, tmp_path, shards, ranges):
    hub.repositories["org/model-0.6B"] = repository(tmp_path / "model", shards, ["pytorch_model.bin"])
    hub.ranges = ranges
    found = ask(hub, home, "org/model-0.6B", headers_only=True)
    expected = {}
    for i in range(shards):
        expected |= {f"x{i}": ["uint8", [BIG]], f"y{i}": ["float32", [2, 3]]}
    assert found["tensors"] == expected
    assert found["only"] and "only headers were fetched" in found["sum"]
    assert "tokenizer.json" in found["present"] and found["config"] == {"model_type": "llama"}
    assert not [n for n in found["present"] if n.endswith((".safetensors", ".bin"))]
    if ranges:
        assert max(size for _, size in hub.sent) < BIG / 2


def test_a_long_header_takes_a_second_range(hub, home, tmp_path):
    folder = repository(tmp_path / "one")
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3000)]
    write_shard(folder / "model.safetensors", {n: np.zeros(1, np.float32) for n in names})
    hub.repositories["org/one"] = folder
    found = ask(hub, home, "org/one", headers_only=True)
    assert set(found["tensors"]) == set(names)
    assert len([path for path, _ in hub.sent if path.endswith("model.safetensors")]) == 2


def test_a_damaged_header_on_the_hub(hub, home, tmp_path):
    folder = repository(tmp_path / "one")
    os.truncate(folder / "model.safetensors", BIG)
    hub.repositories["org/one"] = folder
    assert "model.safetensors: 'x0' ends at byte" in ask(hub, home, "org/one", headers_only=True)["error"]


def test_what_the_hub_refuses(hub, home, tmp_path):
    hub.repositories["org/one"] = repository(tmp_path / "one")
    bins = hub.repositories["org/bin"] = repository(tmp_path / "bin", extra=["pytorch_model.bin"])
    (bins / "model.safetensors").unlink()
    for headers_only in (False, True):
        absent, gated, converted = ask(
            hub, home, ["org/absent", "org/gated", "org/bin"], headers_only=headers_only
        )
        assert "no such folder, and no such model on the hub" in absent
        assert "access is gated" in gated
        assert "only pytorch_model.bin" in converted and "from_pretrained('org/bin')" in converted
    assert "has no revision 'v9'" in ask(hub, home, "org/one", revision="v9", headers_only=True)["error"]
    assert not [path for path, _ in hub.sent if path.endswith(".bin")]
    assert "hub is not reachable" in ask("http://127.0.0.1:9", home, "org/absent")["error"]


def test_offline_without_a_cache():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(InputError, match="no such folder, not in the cache"):
        locate("org/mojax-absent-model")
    with pytest.raises(InputError, match="no such folder, not in the cache"):
        locate("org/mojax-absent-model", headers_only=True)


def test_without_the_client_the_message_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from mojax.checkpoint import locate\nlocate('tiny')\nlocate('org/name')"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert (
        "InputError: 'org/name': no such folder; to read it from the hub: pip install 'mojax[hf]'"
        in run.stderr
    )


def test_opening_a_folder_imports_neither_jax_nor_the_client():
    code = (
        "import sys; from mojax.checkpoint import locate; locate('tiny')['model.norm.weight']\n"
        "print({'jax', 'huggingface_hub', 'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert run.stdout == "set()\n", run.stderr
