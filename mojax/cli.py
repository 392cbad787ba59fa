"""The command line: `mojax VERB --flag=value`. Flags in, one call of the pipeline, exit codes out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mojax
from mojax.arguments import VERBS, Flags, command, parse, size_of, usage
from mojax.errors import InputError, PlanError, nearest


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry point."""
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if code == 130:  # XLA may still compute; an ordinary exit would take its memory away under it
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command; the exit code: 0 done, 1 verify differs, 2 input, 3 limit, 130 interrupted."""
    if not args or args[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"mojax {mojax.__version__}")
        return 0
    verb, rest = args[0], args[1:]
    try:
        if verb not in VERBS:
            raise InputError(f"mojax has no verb {verb!r}{nearest(verb, VERBS)}")
        f, words = parse(verb, rest)
        if f.help:
            print(usage(verb))
            return 0
        return COMMANDS[verb](f, words)
    except PlanError as error:
        for problem in error.problems:
            print(f"mojax: {problem}", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"mojax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"mojax: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _recipe(f: Flags) -> Any:
    """The recipe with the command line's changes."""
    from mojax.recipe import adjusted, load_recipe

    recipe = load_recipe(f.recipe, trust_python=f.trust_remote_code)
    return adjusted(
        recipe,
        keep=f.keep,
        text=f.calibration,
        sequences=f.sequences,
        length=f.length,
        seed=f.seed,
    )


def quantize(f: Flags, words: list[str]) -> int:
    from mojax import model_card, pipeline, verify

    out = f.out.rstrip("/") or "/"
    say: Callable[[str], None] = (
        (lambda line: print(line, file=sys.stderr)) if sys.stderr.isatty() else _quiet
    )
    stop = _Interrupt()
    try:
        report = pipeline.optimize(
            f.model,
            _recipe(f),
            out,
            format=f.format,
            target=f.target,
            evaluation_text=f.text,
            revision=f.revision,
            generic=f.generic,
            evaluate=not f.noevaluate,
            kl_limit=f.kl_limit,
            max_shard_size=size_of(f.max_shard_size),
            say=say,
            interrupted=stop,
        )
    except verify.VerifyError as error:
        return _differs(error, out)
    except pipeline.LimitError as error:
        print(f"mojax: {error}", file=sys.stderr)
        return 3
    except (pipeline.Interrupted, KeyboardInterrupt):
        print(
            f"mojax: stopped; whole blocks are kept in {out}.partial; to go on: {command('quantize', f)}",
            file=sys.stderr,
        )
        return 130
    finally:
        stop.restore()
    for name, value in model_card.summary(report):
        print(f"{name:40s} {value}")
    for row in report.worst:
        print(f"  {row['tensor']}: relative error {row['rel_error']}")
    print(
        f"{report.seconds:.1f} s, peak memory {(report.peak_rss_bytes or 0) / 1e6:.0f} MB; "
        f"report in {out}/report.json"
    )
    print(serve(out, f.target))
    return 0


def _differs(error: Any, out: str) -> int:
    for line in error.differences:
        print(f"mojax: {line}", file=sys.stderr)
    print(f"mojax: {out}.partial is left as it is", file=sys.stderr)
    return 1


def serve(out: str, target: str) -> str:
    """How to serve the folder, for the last lines."""
    if os.path.isfile(f"{out}/adapter/adapter_config.json"):
        return _serve_both(out, target)
    return {
        "vllm": f"vllm serve {out}",
        "sglang": f"python -m sglang.launch_server --model-path {out}",
        "trtllm": f"trtllm-serve {out}",
        "transformers": f"AutoModelForCausalLM.from_pretrained({out!r})",
    }[target]


def _serve_both(out: str, target: str) -> str:
    """The same of a checkpoint whose low-rank branches are a LoRA adapter in its folder."""
    with open(f"{out}/adapter/adapter_config.json") as file:
        rank = json.load(file)["r"]
    most = next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= rank), rank)
    served = {
        "vllm": f"vllm serve {out} --enable-lora --max-lora-rank {most} --lora-modules svd={out}/adapter",
        "sglang": f"python -m sglang.launch_server --model-path {out} --enable-lora --max-lora-rank {most} "
        f"--lora-paths svd={out}/adapter",
        "transformers": f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({out!r}), "
        f"'{out}/adapter')",
    }[target]
    asked = "" if target == "transformers" else "; ask for the model svd"
    return f"its low-rank branches are the adapter {out}/adapter, to be served with it{asked}\n{served}"


def plan(f: Flags, words: list[str]) -> int:
    from mojax import pipeline, plan_table, planner

    model = _open(f)
    made = planner.plan(model, _recipe(f), format=f.format, target=f.target)
    asked = None if f["text"].using_default_value else f.text
    texts = pipeline.read_texts(model, made, asked)
    if f.json:
        print(json.dumps(plan_table.as_dict(made) | texts, indent=2))
    else:
        print(plan_table.table(made))
        print(plan_table.totals(made))
        for purpose, origin in texts.items():
            if origin:
                print(f"{purpose.replace('_', ' ')}: {origin}")
    return 0


def _open(f: Flags) -> Any:
    from mojax.model import load

    return load(f.model, revision=f.revision, generic=f.generic, headers_only=True)


def evaluate(f: Flags, words: list[str]) -> int:
    from mojax import model_card, pipeline

    numbers = {name: f[name].value for name in ("sequences", "length", "seed")}
    asked: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    report = pipeline.evaluate_folder(f.model, f.reference, f.text, **asked)

    content = json.dumps(report.as_dict(), indent=2)
    if f.report:
        with open(f.report, "w") as file:
            file.write(content + "\n")
    if f.json:
        print(content)
    else:
        for name, value in model_card.summary(report):
            print(f"{name:40s} {value}")
    return 0


def generate(f: Flags, words: list[str]) -> int:
    from mojax import generation, model

    numbers = {"max_tokens": f.max_tokens, "seed": f.seed}
    options: dict[str, Any] = {k: v for k, v in numbers.items() if v is not None}
    runner = generation.run(model.load(f.model, revision=f.revision))
    alone = len(f.prompt) == 1 and not f.json
    printed = _Printed()
    made = runner.generate(
        f.prompt, temperature=f.temperature, top_p=f.top_p, stream=printed if alone else None, **options
    )
    if f.json:
        rows = zip(f.prompt, made.prompt_tokens, made.texts, strict=True)
        texts = [{"prompt": p, "prompt_tokens": n, **t._asdict()} for p, n, t in rows]
        print(json.dumps({"texts": texts, "tokens_per_second": made.tokens_per_second}, indent=2))
    elif not alone:
        for prompt, text in zip(f.prompt, made.texts, strict=True):
            print(f"> {prompt}\n{text.text}\n")
    if made.tokens_per_second is not None:
        print(f"{made.tokens_per_second:.1f} tokens/s", file=sys.stderr)
    return 0


class _Printed:
    """Prints a text as it grows."""

    def __init__(self) -> None:
        self.shown = ""

    def __call__(self, texts: Sequence[Any]) -> None:
        (text,) = texts
        # Few tokenizers read bytes in another way once more of them have come: then all of it again.
        new = text.text.removeprefix(self.shown) if text.text.startswith(self.shown) else "\n" + text.text
        print(new, end="\n" if text.reason else "", flush=True)
        self.shown = text.text


def verify(f: Flags, words: list[str]) -> int:
    from mojax import evaluation
    from mojax import verify as verification

    reference = f.reference
    try:
        found = verification.verify(f.model, reference)
    except verification.VerifyError as error:
        if f.json:
            print(json.dumps({"differences": error.differences}, indent=2))
        for line in error.differences:
            print(f"mojax: {line}", file=sys.stderr)
        return 1
    if f.json:
        content = {"differences": [], "tensors": found.tensors, "errors": found.errors, "notes": found.notes}
        print(json.dumps(content, indent=2))
        return 0
    print(f"{f['model'].value}: {found.tensors} tensors, no difference")
    for note in found.notes:
        print(f"note: {note}")
    for row in evaluation.worst(found.errors):
        print(f"  {row['tensor']}: relative error {row['rel_error']}")
    return 0


def inspect(f: Flags, words: list[str]) -> int:
    from mojax import inspection

    facts = inspection.inspect(f.model)
    print(json.dumps(facts, indent=2) if f.json else inspection.text(facts))
    return 0


def convert(f: Flags, words: list[str]) -> int:
    from mojax import conversion, verify

    out = f.out.rstrip("/") or "/"
    try:
        made = conversion.convert(f.model, f.format, out, max_shard_size=size_of(f.max_shard_size))
    except verify.VerifyError as error:
        return _differs(error, out)
    print(serve(out, made.target))
    return 0


def recipes(f: Flags, words: list[str]) -> int:
    from mojax import recipe

    if len(words) > 1:
        raise InputError(f"mojax recipes takes one NAME, got {' '.join(words)}")
    if not words:
        print(json.dumps(recipe.menu_rows(), indent=2) if f.json else recipe.menu())
        return 0
    content = recipe.resolved(recipe.load_recipe(words[0]))
    if f.json:
        print(json.dumps(content, indent=2))
    else:
        import yaml

        print(yaml.safe_dump(content, sort_keys=False), end="")
    return 0


COMMANDS: dict[str, Callable[[Flags, list[str]], int]] = {
    "quantize": quantize,
    "plan": plan,
    "evaluate": evaluate,
    "generate": generate,
    "verify": verify,
    "inspect": inspect,
    "convert": convert,
    "recipes": recipes,
}


class _Interrupt:
    """The first Ctrl-C is a question that the pipeline asks between blocks; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("mojax: finishing this block; press again to stop at once", file=sys.stderr)

    def __call__(self) -> bool:
        return self.asked

    def restore(self) -> None:
        """Ctrl-C means again what it meant before."""
        signal.signal(signal.SIGINT, self.before)


def _quiet(line: str) -> None:
    """Progress of a command whose stderr is not a terminal."""
