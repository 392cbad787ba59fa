"""The flags of each verb: what exists, what is wrong with a command line, what help says."""

from __future__ import annotations

import shlex

from absl import flags

from mojax.errors import InputError, nearest

Flags = flags.FlagValues

VERBS = {
    "quantize": "quantize a checkpoint, verify and evaluate what was written",
    "plan": "print what quantize would do, and every problem; reads no weight",
    "evaluate": "KL, top-1 agreement and perplexity of a checkpoint against its source",
    "generate": "continue prompts with a model as it is packed",
    "verify": "read a checkpoint back and check everything that a server relies on",
    "inspect": "what is inside any checkpoint",
    "convert": "write a quantized checkpoint in another dialect, same codes",
    "recipes": "the menu of recipes; with a NAME, that recipe resolved",
}
EXAMPLES = {
    "quantize": "mojax quantize --model=tiny --recipe=nvfp4 --out=tiny-nvfp4",
    "plan": "mojax plan --model=tiny --recipe=int4",
    "evaluate": "mojax evaluate --model=tiny-nvfp4 --reference=tiny",
    "generate": "mojax generate --model=tiny-nvfp4 --prompt='The function returns'",
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

    def fraction(name: str, default: float | None, what: str) -> None:
        flags.DEFINE_float(name, default, what, flag_values=f)

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
        number("sequences", "pieces of text, to calibrate and to evaluate on (default: the recipe's)")
        number("length", "tokens of a piece (default: the recipe's)")
        number("seed", "of the choice of pieces; with 0 evaluation takes the first (default: the recipe's)")
    if verb in ("evaluate", "verify"):
        text("reference", None, "the source")
    if verb == "evaluate":
        text("report", None, "also write the report to this file")
    if verb == "quantize":
        fraction("kl_limit", None, "largest mean KL, nats (default: the recipe's)")
        switch("noevaluate", "skip the evaluation")
    if verb == "generate":
        flags.DEFINE_multi_string("prompt", [], "a text to continue; repeatable, one batch", flag_values=f)
        number("max_tokens", "at most so many tokens each (default 32)")
        fraction("temperature", 0.0, "0 takes the likeliest token, without top_p and seed (default 0)")
        fraction("top_p", 1.0, "sample from the likeliest tokens that together have this share (default 1)")
        number("seed", "of the sampling (default 0)")
        text("revision", None, "of a hub id")
    if verb in ("plan", "inspect", "verify", "recipes", "evaluate", "generate"):
        switch("json", "machine-readable, on stdout")
    return f


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
            raise InputError(
                f"{verb} has no flag --{name}{_others(name)}{nearest(name, known, '--', 1, 0.0)}"
            )
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
        for name in ("model", "out", "reference" if verb == "evaluate" else "model", "prompt"):
            if name in known and f[name].value in (None, []):
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


def size_of(value: str) -> int:
    """Bytes of "500MB" or "5GB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    for unit, size in units.items():
        number = value.upper().removesuffix(unit).strip()
        if value.upper().endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * size)
    raise InputError(f"--max_shard_size={value}: write a size as 500MB or 5GB")
