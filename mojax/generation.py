"""Text from a model, with its weights packed: `mojax.run(model).generate(["..."])`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax import checkpoint, decoding
from mojax.decoding import Programs, Sampling, State, Weights
from mojax.errors import InputError, NotFiniteError
from mojax.formats.base import QTensor
from mojax.kernels.base import prepared
from mojax.model import Model
from mojax.program import Program, cache_scales
from mojax.tokenizer import Tokenizer, load_tokenizer

LENGTH, SLOTS = 16, 64  # prompts and caches are padded to multiples of these, so that few sizes are compiled
PAUSE = 0.1  # seconds between two looks at the tokens of a stream, about
_ADVICE = "give prompts as lists of token ids, in Python: mojax.run(model).generate([[1, 2]])"

Prompt = str | Sequence[int] | np.ndarray
Stream = Callable[[list["Text"]], None]


class Text(NamedTuple):
    """What follows a prompt.

    Attributes:
      text: None where there is no tokenizer. While tokens are still to come it grows by whole characters.
      tokens: ids, without the one that ended it.
      reason: "stop" at an end-of-sequence token, "length" at max_tokens, None while tokens are still to come.
    """

    text: str | None
    tokens: tuple[int, ...]
    reason: Literal["stop", "length"] | None


class Generation(NamedTuple):
    """The texts that follow the prompts, and how fast they came.

    Attributes:
      texts: in the order of the prompts.
      prompt_tokens: how many each prompt has.
      tokens_per_second: over all sequences, without the prompts and the first two tokens, which may have to
        wait for a compiler; None where there are no others.
    """

    texts: tuple[Text, ...]
    prompt_tokens: tuple[int, ...]
    tokens_per_second: float | None


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model that is ready to generate: its weights lie on the device as they are packed."""

    model: Model
    programs: Programs
    weights: Weights
    tokenizer: Tokenizer | None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> Generation:
        """What follows each prompt; they run as one batch.

        Args:
          prompts: texts, or lists of token ids; one or several.
          max_tokens: at most so many tokens each.
          temperature: 0 is greedy, whatever top_p and seed are.
          top_p: sample from the likeliest tokens that together have this probability.
          seed: the same seed, prompts and device give the same tokens.
          stream: called with the `Text` of every prompt so far, whenever there are new tokens.
        Raises:
          InputError: a number out of range, no prompt, one without tokens, a token outside the vocabulary,
            or more tokens than the model has positions. NotFiniteError: logits with NaN or infinity.
        """
        _check(max_tokens, temperature, top_p, seed)
        ids = [self._ids(i, p) for i, p in enumerate(_several(prompts))]
        self._fit(ids, max_tokens)
        sampling = _sampling(temperature, top_p, seed)
        state = self._prefill(ids, sampling, max_tokens)
        texts = self._texts(state, max_tokens, [""] * len(ids))
        counted, seconds, chunk = 0, 0.0, 1
        while True:
            if stream is not None:
                stream(texts)
            if all(text.reason for text in texts):
                break
            begin, before, made = time.perf_counter(), _count(texts), int(state.made)
            until = jnp.int32(min(made + chunk, max_tokens))
            state = decoding.advance(self.programs, self.weights, state, sampling, until)
            texts = self._texts(state, max_tokens, [text.text or "" for text in texts])
            if made > 1:  # the first call may compile
                passed = time.perf_counter() - begin
                counted, seconds = counted + _count(texts) - before, seconds + passed
                chunk = max(1, min(64, int(chunk * PAUSE / passed)))
            chunk = chunk if stream is not None else max_tokens
        speed = counted / seconds if counted else None
        return Generation(tuple(texts), tuple(map(len, ids)), speed)

    def _ids(self, i: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            found = self._tokenizer(i).prompt(prompt)
        else:
            found = _integers(i, prompt)
        vocab = self.model.config.get("vocab_size")
        if not found:
            raise InputError(f"prompt {i}: is empty; at least one token is needed")
        if min(found) < 0 or (vocab and max(found) >= vocab):
            raise InputError(
                f"prompt {i}: holds token ids from {min(found)} to {max(found)}; the vocabulary has {vocab}"
            )
        return found

    def _tokenizer(self, i: int) -> Tokenizer:
        if self.tokenizer is not None:
            return self.tokenizer
        if self.model.checkpoint is None:
            raise InputError(f"prompt {i}: is text, and a model without files has no tokenizer; {_ADVICE}")
        return load_tokenizer(self.model.checkpoint.folder, _ADVICE)  # says what is wrong with it

    def _fit(self, ids: list[list[int]], max_tokens: int) -> None:
        longest, positions = max(map(len, ids)), self.model.config.get("max_position_embeddings")
        if positions and longest + max_tokens > positions:
            raise InputError(
                f"a prompt of {longest} tokens and max_tokens {max_tokens} make {longest + max_tokens}; the "
                f"model has {positions} positions (max_position_embeddings); shorten one"
            )

    def _prefill(self, ids: list[list[int]], sampling: Sampling | None, max_tokens: int) -> State:
        length = -(-max(map(len, ids)) // LENGTH) * LENGTH
        slots = -(-(length + max_tokens) // SLOTS) * SLOTS
        tokens, start = np.zeros((len(ids), length), np.int32), np.zeros(len(ids), np.int32)
        for i, row in enumerate(ids):
            start[i] = length - len(row)
            tokens[i, start[i] :] = row
        c = self.model.hyper
        shape = (len(ids), slots, c.num_key_value_heads, c.head_dim)
        layers = tuple(
            decoding.empty(program.cache, shape, self.model.dtype, (scales.get("k"), scales.get("v")))
            for program, scales in zip(
                self.programs.blocks, map(cache_scales, self.weights.blocks), strict=True
            )
        )
        return decoding.prefill(self.programs, self.weights, layers, tokens, sampling, start)

    def _texts(self, state: State, max_tokens: int, shown: list[str]) -> list[Text]:
        tokens, made, finite = jax.device_get((state.tokens, state.made, state.finite))
        if not finite:
            raise NotFiniteError("the model gives logits that are not finite; nothing can be generated")
        rows = zip(tokens[:, :made], shown, strict=True)
        return [self._text(row, made == max_tokens, before) for row, before in rows]

    def _text(self, row: np.ndarray, full: bool, shown: str) -> Text:
        ends = np.flatnonzero(np.isin(row, self.programs.stop))
        tokens = tuple(map(int, row[: ends[0]] if len(ends) else row))
        reason = "stop" if len(ends) else "length" if full else None
        if self.tokenizer is None:
            return Text(None, tokens, reason)
        text = self.tokenizer.decode(tokens)
        if reason is None:
            whole = text.rstrip("\ufffd")  # the bytes of a character that is still to come
            text = whole if whole.startswith(shown) else shown
        return Text(text, tokens, reason)


def run(model: Any) -> Runner:
    """Make a model ready to generate. Packed weights stay packed; quantized inputs are rounded as declared.

    Args:
      model: from `mojax.load` (any checkpoint, quantized or not) or `mojax.apply`.
    Raises:
      InputError: not a checkpoint's model, or one without a forward function.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"run: found {type(model).__name__}, needed a model of mojax.load or mojax.apply; a Function is "
            "called as it is"
        )
    head = model.head_program()
    blocks = tuple(model.program(b) for b in model.blocks)
    programs = Programs(Program(head.family, head.config, "embed"), blocks, head, _stop(model))
    outside = model.outside("embed")
    weights = Weights(
        outside,
        tuple(prepare(model, block.prefix, model.local(block)) for block in model.blocks),
        {name: outside.get(name, leaf) for name, leaf in prepare(model, "", model.outside("head")).items()},
    )
    folder = model.checkpoint.folder if model.checkpoint is not None else None
    try:
        tokenizer = load_tokenizer(folder, _ADVICE) if folder is not None else None
    except InputError:
        tokenizer = None
    return Runner(model, programs, weights, tokenizer)


def prepare(model: Model, prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters on the device, packed ones in the order that its kernels read fastest."""

    def one(name: str, leaf: Any) -> Any:
        scheme = model.schemes.get(prefix + name.removesuffix(".weight"))
        leaf = jax.device_put(leaf)
        return prepared(leaf, scheme.inputs) if scheme is not None and isinstance(leaf, QTensor) else leaf

    return {name: one(name, leaf) for name, leaf in params.items()}


def _stop(model: Model) -> tuple[int, ...]:
    """The ids that end a sequence: those of generation_config.json, else of config.json."""
    said, file = model.config.get("eos_token_id"), "config.json"
    path = model.checkpoint.folder / "generation_config.json" if model.checkpoint is not None else None
    if path is not None and path.exists():
        found = checkpoint.read_json(path)
        said, file = found.get("eos_token_id", said), path.name if "eos_token_id" in found else file
    ids = [] if said is None else said if isinstance(said, list) else [said]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{file}: eos_token_id is {said!r}, needed a token id, a list of them, or null")
    return tuple(ids)


def _several(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    try:
        found = list(prompts)
    except TypeError:
        raise InputError(
            f"prompts: found {type(prompts).__name__}, needed texts or lists of token ids"
        ) from None
    if not found:
        raise InputError("prompts: there are none; give at least one")
    one = not isinstance(found[0], str | Sequence) and not getattr(found[0], "ndim", 0)
    return [found] if one else found


def _integers(i: int, prompt: Any) -> list[int]:
    try:
        found = np.asarray(prompt)
    except ValueError:  # lists of different lengths
        found = np.zeros((), object)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise InputError(f"prompt {i}: is neither a text nor a list of token ids")
    return found.tolist()


def _sampling(temperature: float, top_p: float, seed: int) -> Sampling | None:
    least = np.finfo(np.float32).tiny  # what is below is 0 on some devices
    if temperature < least:
        return None
    return Sampling(jnp.float32(temperature), jnp.float32(max(top_p, least)), jax.random.key(seed))


def _count(texts: Sequence[Text]) -> int:
    return sum(len(text.tokens) for text in texts)


def _check(max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    for name, value, kind in (
        ("max_tokens", max_tokens, int | np.integer),
        ("temperature", temperature, int | float | np.number),
        ("top_p", top_p, int | float | np.number),
        ("seed", seed, int | np.integer),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            needed = "an integer" if kind == int | np.integer else "a number"
            raise InputError(f"{name}: {value!r} is not {needed}")
    if max_tokens < 1:
        raise InputError(f"max_tokens: {max_tokens} is not at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: {temperature} is not a number from 0 (greedy) on")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: {top_p} is not above 0 and at most 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} is not from 0 to 4294967295")
