"""The compressed-tensors dialect, as llm-compressor writes it and vLLM and transformers read it."""

from mojax.converters.compressed_tensors import adapter as ADAPTER
from mojax.converters.compressed_tensors.adapter import branch, joined
from mojax.converters.compressed_tensors.schemes import ARITHMETIC, DIALECT, check, check_cache, config, parse
from mojax.converters.compressed_tensors.tensors import (
    SUFFIXES,
    cache_names,
    layout,
    read,
    read_cache,
    write,
    write_cache,
)

METHODS = (DIALECT,)
WRITES = True
LISTS_EMBEDDINGS = False

__all__ = [
    "ADAPTER",
    "ARITHMETIC",
    "DIALECT",
    "LISTS_EMBEDDINGS",
    "METHODS",
    "SUFFIXES",
    "WRITES",
    "branch",
    "cache_names",
    "check",
    "check_cache",
    "config",
    "joined",
    "layout",
    "parse",
    "read",
    "read_cache",
    "write",
    "write_cache",
]
