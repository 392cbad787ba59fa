"""The command line: `mojax VERB --flag=value`. Flags in, one call of the pipeline, exit codes out."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

import mojax
from mojax.errors import InputError, PlanError, nearest

Flags = flags.FlagValues

VERBS = {
    "quantize": "quantize a checkpoint, verify and evaluate what was written",
    "plan": "print what quantize would do, and every problem; reads no weight",
    "evaluate": "KL, top-1 agreement and perplexity of a checkpoint against its source",
    "verify": "read a checkpoint back and check everything that a server relies on",
    "inspect": "what is inside any checkpoint",
    "convert": "write a quantized checkpoint in another dialect, same codes",
    "recipes": "the menu of recipes; with a NAME, that recipe resolved",
}
EXAMPLES = {
    "quantize": "mojax quantize --model=tiny --recipe=nvfp4 --out=tiny-nvfp4",
    "plan": "mojax plan --model=tiny --recipe=int4",
    "evaluate": "mojax evaluate --model=tiny-nvfp4 --reference=tiny",
    "verify": "mojax verify --model=tiny-nvfp4 --reference=tiny",
    "inspect": "mojax inspect --model=tiny-nvfp4",
    "convert": "mojax convert --model=tiny-nvfp4 --format=modelopt --out=tiny-nvfp4-modelopt",
    "recipes": "mojax recipes nvfp4",
}


def define(verb: str) -> Flags:
    """The flags of one verb, and no others."""
    f = Flags()

    def text(name: str, default: str | None, what: str) -> None:
        flags.DEFINE_string(name, default, what, flag_values=f)

    def switch(name: str, what: str) -> None:
        flags.DEFINE_boolean(name, False, what, flag_values=f)

    def number(name: str, what: str) -> None:
        flags.DEFINE_integer(name, None, what, flag_values=f)

    flags.DEFINE_boolean("help", False, "show this text", flag_values=f)
    if verb != "recipes":
        text("model", None, "a folder, a hub id, or tiny, the built-in model")
    if verb in ("quantize", "plan"):
        text("recipe", "nvfp4", "a name from `mojax recipes`, or a file")
        text("target", "vllm", "what must be able to load it: vllm, sglang, trtllm, transformers")
        text("calibration", None, "builtin, or a txt, jsonl, parquet or npz file (default: the recipe's)")
        flags.DEFINE_multi_string(
            "keep", [], "glob of tensors to leave as they are; repeatable", flag_values=f
        )
        text("revision", None, "of a hub id")
        switch("trust_remote_code", "allow a recipe that is a Python file")
        switch("generic", "accept an unknown model_type; data-free recipes on its 2-D weights")
    if verb in ("quantize", "plan", "convert"):
        text("format", "compressed-tensors", "the checkpoint dialect: compressed-tensors, modelopt")
    if verb in ("quantize", "convert"):
        text("out", None, "the new folder")
        text("max_shard_size", "5GB", "largest file, as 500MB or 5GB")
    if verb in ("quantize", "evaluate", "plan"):
        text("text", "builtin", "evaluation text: builtin, or a txt, jsonl, parquet or npz file")
        number("sequences", "pieces of text (default: the recipe's)")
        number("length", "tokens of a piece (default: the recipe's)")
        number("seed", "of the choice of pieces; with 0 evaluation takes the first (default: the recipe's)")
    if verb in ("evaluate", "verify"):
        text("reference", None, "the source")
    if verb == "evaluate":
        text("report", None, "also write the report to this file")
    if verb == "quantize":
        flags.DEFINE_float("kl_limit", None, "largest mean KL, nats (default: the recipe's)", flag_values=f)
        switch("noevaluate", "skip the evaluation")
    if verb in ("plan", "inspect", "verify", "recipes", "evaluate"):
        switch("json", "machine-readable, on stdout")
    return f


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry point."""
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
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


def parse(verb: str, args: list[str]) -> tuple[Flags, list[str]]:
    """The verb's flags, and the words that are none.

    Raises:
      InputError: a flag that the verb does not have, a value that is missing or of the wrong type.
    """
    f = define(verb)
    known = sorted(f)
    switches = [name for name in known if f[name].boolean]
    args = [_underscored(a, known) for a in args]
    for arg in args:
        name = arg.lstrip("-").partition("=")[0]
        if arg.startswith("-") and name not in known and name.removeprefix("no") not in switches:
            raise InputError(f"{verb} has no flag --{name}{_others(name)}{nearest(name, known, '--')}")
    try:
        words = f(["mojax", *args])[1:]
    except flags.Error as error:
        raise InputError(f"{verb}: {str(error).splitlines()[0]}") from None
    for name in known:
        value = f[name].value
        if isinstance(value, str) and (not value or value.startswith("--")):
            raise InputError(f"{verb}: --{name} has no value; write --{name}=...")
    if words and verb != "recipes":
        raise InputError(f"{verb}: {words[0]!r} is not a flag; write --flag=value")
    if verb != "recipes" and not f.help:
        for name in ("model", "out", "reference" if verb == "evaluate" else "model"):
            if name in known and f[name].value is None:
                raise InputError(f"{verb} needs --{name}; for example: {EXAMPLES[verb]}")
    return f, words


def _others(name: str) -> str:
    """The verbs that do have a flag, in brackets."""
    verbs = [verb for verb in VERBS if name in define(verb)]
    return f" ({', '.join(verbs)} have)" if verbs else ""


def _underscored(arg: str, known: list[str]) -> str:
    """A flag written with dashes inside, --kl-limit=1, as it is defined."""
    name, equals, value = arg.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    return f"--{plain}{equals}{value}" if arg.startswith("--") and plain in known else arg


def usage(verb: str | None = None) -> str:
    """Help of mojax, or of one verb."""
    if verb is None:
        width = max(map(len, VERBS))
        lines = [f"  {name.ljust(width)}  {what}" for name, what in VERBS.items()]
        return (
            "usage: mojax VERB --flag=value\n\n" + "\n".join(lines) + "\n\nmojax VERB --help shows its flags."
        )
    f = define(verb)
    lines = [f"mojax {verb}: {VERBS[verb]}", "", f"  {EXAMPLES[verb]}", ""]
    for name in f:
        default = f[name].default
        shown = "" if default in (None, False, []) else f" (default {default})"
        lines.append(f"  --{name}  {f[name].help}{shown}")
    return "\n".join(lines)


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
            max_shard_size=_bytes(f.max_shard_size),
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


def command(verb: str, f: Flags) -> str:
    """The command line that gives these flags, for a shell."""
    words = ["mojax", verb]
    for name in f:
        value = f[name].value
        if not f[name].using_default_value and value is not False:
            words += [
                f"--{name}" if value is True else f"--{name}={v}"
                for v in (value if isinstance(value, list) else [value])
            ]
    return shlex.join(words)


def serve(out: str, target: str) -> str:
    """How to serve the folder, for the last line."""
    return {
        "vllm": f"vllm serve {out}",
        "sglang": f"python -m sglang.launch_server --model-path {out}",
        "trtllm": f"trtllm-serve {out}",
        "transformers": f"AutoModelForCausalLM.from_pretrained({out!r})",
    }[target]


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
        made = conversion.convert(f.model, f.format, out, max_shard_size=_bytes(f.max_shard_size))
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


def _bytes(value: str) -> int:
    """Bytes of "500MB" or "5GB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    for unit, size in units.items():
        number = value.upper().removesuffix(unit).strip()
        if value.upper().endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * size)
    raise InputError(f"--max_shard_size={value}: write a size as 500MB or 5GB")
