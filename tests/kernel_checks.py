"""What tests of GPU kernels share: lowering and compiling for a GPU that is not here, running without one."""

import dataclasses
import os
import re
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax 0.10 has it, but does not show it
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

INTERPRET = InterpretGPUParams()
REGISTERS = hasattr(plgpu, "InterpretGPUParams")  # this interpreter follows operands in registers (jax 0.11)
HOPPER, BLACKWELL = (9, 0), (10, 0)
gpu = pytest.mark.gpu

# Set by .ci/kernels, which brings NVIDIA's assembler: `lowered` then compiles too, and reads its logs here.
DUMPS = os.environ.get("MOSAIC_GPU_DUMP_TO")
if DUMPS:  # a folder for each process of pytest-xdist
    DUMPS = os.environ["MOSAIC_GPU_DUMP_TO"] = f"{DUMPS}-{os.getpid()}"
    Path(DUMPS).mkdir()
LOGS: list[str] = []
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.9 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: {} minor: {} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "none"
"""


@dataclasses.dataclass(frozen=True)
class _Device(AbstractDevice):
    """A device that is only a compute capability."""

    compute_capability: str = "9.0"


def lowered(fn, *args, arch=HOPPER):
    """The program of `fn(*args)` for a CUDA device of this compute capability, as text; none is needed.

    Layouts, dtypes, swizzles and architecture are checked on the way. `args` may be ShapeDtypeStructs.
    """
    if DUMPS and str(arch[0]) != os.environ["MOJAX_ARCH"]:
        pytest.skip("a process assembles for one architecture")
    device = _Device("abstract", None, "gpu", f"{arch[0]}.{arch[1]}")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    if DUMPS:
        for log in assembled(fn, *args, arch=arch):
            assert "0 bytes spill stores, 0 bytes spill loads" in log, log
            assert int(re.findall(r"Used (\d+) registers", log)[-1]) <= 255
    return text


def assembled(fn, *args, arch=HOPPER):
    """What NVIDIA's assembler says of the kernels in `fn(*args)` that are new to this process."""
    config = TARGET.format(*arch)
    (device,) = topologies.get_topology_desc("none", "cuda", target_config=config, topology="1x1x1").devices
    on = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), args)
    for file in Path(DUMPS).iterdir():
        file.unlink()
    with jax.default_device(device):
        jax.jit(fn).trace(*args).lower().compile()
    logs = [file.read_text() for file in sorted(Path(DUMPS).glob("*.ptxas"))]
    LOGS.extend(logs)
    assert LOGS, "nothing was assembled"
    return logs
