"""Text from a model, with its weights packed: `mojax.run(model).generate(["..."])`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mojax import decoding
from mojax.decoding import Programs, Sampling, State, Weights
from mojax.errors import InputError, NotFiniteError
from mojax.model import Model
from mojax.program import INPUT, Program
from mojax.tokenizer import Tokenizer, load_tokenizer

LENGTH, SLOTS = 16, 64  # prompts and caches are padded to multiples of these, so that few sizes are compiled
PAUSE = 0.1  # seconds between two looks at the tokens of a stream, about
_ADVICE = "give prompts as lists of token ids"

Prompt = str | Sequence[int] | np.ndarray
Stream = Callable[[list["Text"]], None]


class Text(NamedTuple):
    """What follows a prompt.

    Attributes:
      text: None where there is no tokenizer.
      tokens: ids, without the one that ended it.
      reason: "stop" at an end-of-sequence token, "length" at max_tokens.
    """

    text: str | None
    tokens: tuple[int, ...]
    reason: Literal["stop", "length"]


class Generation(NamedTuple):
    """The texts that follow the prompts, and how fast they came.

    Attributes:
      texts: in the order of the prompts.
      prompt_tokens: how many each prompt has.
      tokens_per_second: over all sequences, without what had to be compiled; None for too few tokens.
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
          temperature: 0 is greedy.
          top_p: sample from the likeliest tokens that together have this probability.
          seed: the same seed, prompts and device give the same tokens.
          stream: called with all texts so far, whenever there are new tokens.
        Raises:
          InputError: a number out of range, no prompt or an empty one, a token outside the vocabulary, or
            more tokens than the model has positions. NotFiniteError: logits that hold NaN or infinity.
        """
        _check(max_tokens, temperature, top_p, seed)
        ids = [self._ids(i, p) for i, p in enumerate(_several(prompts))]
        self._fit(ids, max_tokens)
        sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p), jax.random.key(seed))
        state = self._prefill(ids, sampling, max_tokens)
        made, seconds, chunk = 0, 0.0, 1
        while True:
            found = np.asarray(state.tokens)[:, : int(state.made)]
            if not bool(state.finite):
                raise NotFiniteError("the model gives logits that are not finite; nothing can be generated")
            texts = [self._text(row) for row in found]
            if stream is not None:
                stream(texts)
            if found.shape[1] == max_tokens or bool(state.done.all()):
                break
            begin, compiled = time.perf_counter(), found.shape[1] > 1
            until = min(found.shape[1] + chunk, max_tokens)
            state = jax.block_until_ready(
                decoding.advance(self.programs, self.weights, state, sampling, jnp.int32(until))
            )
            passed = time.perf_counter() - begin
            if compiled:  # the first call compiles
                made, seconds = made + len(ids) * (int(state.made) - found.shape[1]), seconds + passed
                chunk = max(1, min(64, int(chunk * PAUSE / max(passed, 1e-6)))) if stream else max_tokens
        return Generation(tuple(texts), tuple(map(len, ids)), made / seconds if made else None)

    def _ids(self, i: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(f"prompt {i}: is text, and the model has no tokenizer; {_ADVICE}")
            found = self.tokenizer.prompt(prompt)
        else:
            found = [int(t) for t in prompt]
        vocab = self.model.config.get("vocab_size")
        if not found:
            raise InputError(f"prompt {i}: is empty; at least one token is needed")
        if min(found) < 0 or (vocab and max(found) >= vocab):
            raise InputError(
                f"prompt {i}: holds token ids from {min(found)} to {max(found)}; the vocabulary has {vocab}"
            )
        return found

    def _fit(self, ids: list[list[int]], max_tokens: int) -> None:
        longest, positions = max(map(len, ids)), self.model.config.get("max_position_embeddings")
        if positions and longest + max_tokens > positions:
            raise InputError(
                f"a prompt of {longest} tokens and max_tokens {max_tokens} are {longest + max_tokens} together, "
                f"the model has {positions} positions (max_position_embeddings); shorten one"
            )

    def _prefill(self, ids: list[list[int]], sampling: Sampling, max_tokens: int) -> State:
        length = -(-max(map(len, ids)) // LENGTH) * LENGTH
        slots = -(-(length + max_tokens) // SLOTS) * SLOTS
        tokens, start = np.zeros((len(ids), length), np.int32), np.zeros(len(ids), np.int32)
        for i, row in enumerate(ids):
            start[i] = length - len(row)
            tokens[i, start[i] :] = row
        c = self.model.hyper
        shape = (len(ids), slots, c.num_key_value_heads, c.head_dim)
        layers = tuple(
            decoding.empty(
                self.programs.cache,
                shape,
                self.model.dtype,
                (params.get(f"self_attn.k_cache{INPUT}"), params.get(f"self_attn.v_cache{INPUT}")),
            )
            for params in self.weights.blocks
        )
        return decoding.prefill(self.programs, self.weights, layers, tokens, sampling, max_tokens, start)

    def _text(self, row: np.ndarray) -> Text:
        ends = np.flatnonzero(np.isin(row, self.programs.stop))
        tokens = tuple(map(int, row[: ends[0]] if len(ends) else row))
        text = None if self.tokenizer is None else self.tokenizer.decode(tokens)
        return Text(text, tokens, "stop" if len(ends) else "length")


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
    blocks = tuple(dataclasses.replace(model, cache=None).program(b) for b in model.blocks)
    programs = Programs(Program(head.family, head.config, "embed"), blocks, head, model.cache, _stop(model))
    weights = Weights(
        model.outside("embed"),
        tuple(jax.device_put(model.local(block)) for block in model.blocks),
        model.outside("head"),
    )
    folder = model.checkpoint.folder if model.checkpoint is not None else None
    try:
        tokenizer = load_tokenizer(folder, _ADVICE) if folder is not None else None
    except InputError:
        tokenizer = None
    return Runner(model, programs, weights, tokenizer)


def _stop(model: Model) -> tuple[int, ...]:
    """The ids that end a sequence: those of generation_config.json, else of config.json."""
    said = model.config.get("eos_token_id")
    path = model.checkpoint.folder / "generation_config.json" if model.checkpoint is not None else None
    if path is not None and path.exists():
        said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", said)
    return tuple(said) if isinstance(said, list) else () if said is None else (int(said),)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (
        len(prompts) and np.ndim(prompts[0]) == 0 and not isinstance(prompts[0], str)
    ):
        return [prompts]  # type: ignore[list-item]
    if not len(prompts):
        raise InputError("prompts: there are none; give at least one")
    return list(prompts)  # type: ignore[arg-type]


def _check(max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if max_tokens < 1:
        raise InputError(f"max_tokens: {max_tokens} is not at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: {temperature} is not a number from 0 (greedy) on")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: {top_p} is not above 0 and at most 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} is not from 0 to 4294967295")
