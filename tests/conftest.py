"""Strict JAX for every test: no silent dtype or rank promotion, warnings are errors."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # has a core; threads that wait for work would take the others'
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a background job; tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


MAPS = Path("/proc/self/maps")  # of Linux, which allows a process 65530 of them


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Each compiled function maps memory, thousands in a file of tests; past the limit the process dies."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 16000:
        jax.clear_caches()
        gc.collect()


def pytest_runtest_setup(item):
    """`JAX_PLATFORMS=cuda,cpu pytest -m gpu` on a machine with a GPU."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("no GPU: JAX_PLATFORMS=cuda,cpu pytest -m gpu, where there is one")
