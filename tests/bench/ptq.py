"""The same post-training quantization in mojax, llm-compressor and ModelOpt: wall time, CPU time, memory, KL.

    python tests/bench/ptq.py --peers=FOLDER --work=FOLDER [--models=tiny] [--schemes=nvfp4] [--runs=5]
    python tests/bench/ptq.py ... --models=100m --schemes=nvfp4/gptq,int4/gptq,int4/awq,nvfp4/mse,nvfp4/sweep

`--peers` is the folder that make_envs.sh filled. A scheme is a format, to nearest, or FORMAT/ALGORITHM: error
feedback, activation-aware scales, and weight scales by least squares in both tools, each with its defaults.
Every run is a fresh process, as a user would start it: import, load, calibrate on the same 64 x 256 tokens,
quantize, save. Tools take turns, so that a busy machine hurts all of them; every number is the minimum over
the runs. CPU time is user + system and memory the peak resident size, both as the kernel counts them for the
process and the children it waited for. mojax verifies what it wrote in that time; the peers do not. Every run
is a file in --work, so that another call goes on where this one was; those of mojax count for the sources
that made them.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from peers.quality_numbers import sources

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = ROOT / "mojax" / "data"
PEERS = {"llmcompressor": "ptq_llmcompressor.py", "modelopt": "ptq_modelopt.py"}
TOOLS = ("mojax", *PEERS)
PLAIN = ("nvfp4", "fp8_dynamic", "int4")
STEPS = {"gptq": "[gptq]", "awq": "[awq, rtn]", "mse": "[mse]", "sweep": "[sweep]"}
ALGORITHMS = ("nvfp4/gptq", "int4/gptq", "int4/awq", "nvfp4/mse", "nvfp4/sweep")


class Run(NamedTuple):
    """What one process used: seconds, seconds, bytes; and the JSON line that a peer printed."""

    wall: float
    cpu: float
    rss: int
    said: dict


def make_tokens(text: Path, out: Path, sequences: int, length: int) -> None:
    """The first pieces of a text in the built-in model's tokens -> `tokens` int32 [sequences, length]."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "tiny" / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    np.savez(out, tokens=np.array(ids[: sequences * length], np.int32).reshape(sequences, length))


def make_model(out: Path, hidden: int = 768, layers: int = 12, seed: int = 0) -> None:
    """A random Llama of 100 million parameters, N(0, 0.02^2) in bf16, head not tied."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    heads, head_dim, kv_heads, inner, vocabulary = hidden // 64, 64, hidden // 192, hidden * 8 // 3, 16384
    config = json.loads((DATA / "tiny" / "config.json").read_text())
    config.update(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    norms = ["model.norm.weight"]
    for prefix in (f"model.layers.{i}." for i in range(layers)):
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in linears.items()}
        norms += [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    tensors |= {name: np.ones(hidden, ml_dtypes.bfloat16) for name in norms}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tiny" / name, out / name)


def prepare(work: Path, models: list[str]) -> None:
    """Tokens and models, where they are missing."""
    for name in ("calibration", "evaluation"):
        if not (work / f"{name}.npz").exists():
            make_tokens(DATA / "text" / f"{name}.txt", work / f"{name}.npz", 64, 256)
    if "100m" in models and not (work / "100m").exists():
        make_model(work / "100m.partial")
        (work / "100m.partial").rename(work / "100m")


def measure(command: list[str], log: Path) -> Run:
    """Run one command to its end. Raises RuntimeError with the end of its output if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode:
        raise RuntimeError(f"exit {process.returncode}: " + "\n".join(lines[-5:])[-1000:])
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said)


def command(tool: str, peers: Path, model: Path, tokens: Path, scheme: str, out: Path) -> list[str]:
    if tool == "mojax":
        form, _, algorithm = scheme.partition("/")
        recipe = form
        if algorithm:
            recipe = str(out.with_suffix(".yaml"))
            out.parent.mkdir(parents=True, exist_ok=True)
            Path(recipe).write_text(f"extends: {form}\nsteps: {STEPS[algorithm]}\n")
        flags = [f"--model={model}", f"--recipe={recipe}", f"--calibration={tokens}", f"--out={out}"]
        return [sys.executable, "-m", "mojax", "quantize", *flags, "--noevaluate"]
    python = peers / tool / "bin" / "python"
    return [str(python), str(HERE / "peers" / PEERS[tool]), str(model), str(tokens), scheme, str(out)]


def divergence(out: Path, model: Path, work: Path) -> float:
    """KL(model || out) in nats per token on the evaluation text, measured by mojax for every tool alike."""
    flags = [f"--model={out}", f"--reference={model}", f"--text={work / 'evaluation.npz'}", "--json"]
    evaluate = [sys.executable, "-m", "mojax", "evaluate", *flags]
    result = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"exit {result.returncode}: {result.stderr.strip()[-1000:]}")
    return json.loads(result.stdout)["kl_mean"]


def once(arguments, model: Path, scheme: str, tool: str, turn: int) -> dict:
    """What one run took, or why it failed; of a file, if there is one of such a run."""
    work, name = arguments.work, f"{model.name}-{scheme.replace('/', '-')}-{tool}"
    version = f"-{sources()}" if tool == "mojax" else ""
    path, out = work / "runs" / f"{name}{version}-{turn}.json", work / "out" / name
    if path.exists():
        return json.loads(path.read_text())
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    line = command(tool, arguments.peers, model, work / "calibration.npz", scheme, out)
    before = os.getloadavg()[0]
    run = measure(line, work / f"{name}.log")
    found = run._asdict() | {"load": [round(before, 2), round(os.getloadavg()[0], 2)]}
    found["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".partial").write_text(json.dumps(found))
    path.with_suffix(".partial").rename(path)
    return found


def compare(arguments, name: str, scheme: str) -> list[dict]:
    """All tools on one model and scheme, in turns -> one row per tool."""
    work = arguments.work
    model = DATA / "tiny" if name == "tiny" else work / name
    tools = [t for t in arguments.tools if t != "modelopt" or scheme in PLAIN]
    rows = {tool: {"model": name, "scheme": scheme, "tool": tool, "runs": []} for tool in tools}
    for turn in range(arguments.runs):
        for tool, row in rows.items():
            if "failed" in row:
                continue
            try:
                row["runs"].append(once(arguments, model, scheme, tool, turn))
            except (RuntimeError, OSError) as error:
                row["failed"] = str(error)
                print(f"{name} {scheme} {tool}: FAILED {error}", file=sys.stderr, flush=True)
        done = {t: r["runs"][-1] for t, r in rows.items() if "failed" not in r}
        seen = ", ".join(f"{t} {r['wall']:.1f} s, CPU {r['cpu']:.1f} s" for t, r in done.items())
        print(f"{name} {scheme} turn {turn + 1}: {seen}", file=sys.stderr, flush=True)
    for tool, row in rows.items():
        if name != "tiny" or not arguments.evaluate or "failed" in row:
            continue
        try:
            out = work / "out" / f"{model.name}-{scheme.replace('/', '-')}-{tool}"
            row["kl_mean"] = divergence(out, model, work)
        except RuntimeError as error:
            row["failed"] = f"evaluate: {error}"
            print(f"{name} {scheme} {tool}: KL FAILED {error}", file=sys.stderr, flush=True)
    return list(rows.values())


def best(row: dict, key: str) -> float | None:
    return min((run[key] for run in row["runs"]), default=None)


def table(rows: list[dict]) -> str:
    """Markdown: minima, and every peer's multiple of mojax's."""
    lines = [
        "| model | scheme | tool | wall s | CPU s | peak MB | MB written | KL | wall x | CPU x | memory x |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {(row["model"], row["scheme"]): row for row in rows if row["tool"] == "mojax"}
    for row in rows:
        cells = [row["model"], row["scheme"], row["tool"]]
        values = {key: best(row, key) for key in ("wall", "cpu", "rss")}
        for key, unit in (("wall", 1), ("cpu", 1), ("rss", 2**20)):
            value = values[key]
            cells.append("failed" if value is None else f"{value / unit:.{0 if unit > 1 else 1}f}")
        cells.append(f"{row['runs'][0]['bytes'] / 2**20:.1f}" if row["runs"] else "")
        cells.append(f"{row['kl_mean']:.5f}" if "kl_mean" in row else "failed" if "failed" in row else "")
        for key, value in values.items():
            base = best(ours.get((row["model"], row["scheme"]), {"runs": []}), key)
            cells.append(f"{value / base:.1f}" if value and base else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions(rows: list[dict]) -> dict[str, str]:
    """Exact versions: ours from this environment, a peer's as the peer printed them."""
    ask = [sys.executable, "-m", "mojax", "--version"]
    asked = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    found = {"python": platform.python_version(), "mojax": asked.stdout.strip()}
    found |= {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "numpy")}
    for row in rows:
        for run in row["runs"][:1]:
            found |= {f"{row['tool']}: {k}": v for k, v in run["said"].get("versions", {}).items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare mojax with its peers on one machine.")
    parser.add_argument("--peers", type=Path, required=True, help="folder that make_envs.sh filled")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, outputs and logs")
    parser.add_argument("--models", default="tiny,100m")
    parser.add_argument("--schemes", default=",".join(PLAIN))
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--noevaluate", dest="evaluate", action="store_false", help="no KL")
    arguments = parser.parse_args()
    known = {"models": ("tiny", "100m"), "schemes": (*PLAIN, *ALGORITHMS), "tools": TOOLS}
    for flag, allowed in known.items():
        chosen = getattr(arguments, flag).split(",")
        if unknown := sorted(set(chosen) - set(allowed)):
            parser.error(f"--{flag}: {', '.join(unknown)} is not one of {', '.join(allowed)}")
        setattr(arguments, flag, chosen)
    arguments.work, arguments.peers = arguments.work.resolve(), arguments.peers.absolute()
    arguments.work.mkdir(parents=True, exist_ok=True)
    # In its own process: the kernel counts a parent's peak memory into the child that it starts.
    spawn = multiprocessing.get_context("spawn")
    maker = spawn.Process(target=prepare, args=(arguments.work, arguments.models))
    maker.start()
    maker.join()
    if maker.exitcode:
        return 1
    jobs = [(name, scheme) for name in arguments.models for scheme in arguments.schemes]
    rows = [row for job in jobs for row in compare(arguments, *job)]
    facts = {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load, least and most": [
            f([x for r in rows for run in r["runs"] for x in run["load"]], default=None) for f in (min, max)
        ],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "runs": arguments.runs,
        **versions(rows),
    }
    (arguments.work / "ptq.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    print("\n" + table(rows))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
