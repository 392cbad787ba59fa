"""The ModelOpt dialect, as nvidia-modelopt 0.47 exports it and vLLM, SGLang and TensorRT-LLM read it."""

from mojax.converters.modelopt.schemes import ARITHMETIC, DIALECT, check, check_cache, config, parse
from mojax.converters.modelopt.tensors import (
    SUFFIXES,
    branch,
    cache_names,
    layout,
    read,
    read_cache,
    write,
    write_cache,
)

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
WRITES = True
LISTS_EMBEDDINGS = True

__all__ = [
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
    "layout",
    "parse",
    "read",
    "read_cache",
    "write",
    "write_cache",
]
