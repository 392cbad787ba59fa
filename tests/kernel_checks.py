"""What tests of GPU kernels share: lowering for a GPU that is not here, and running without one."""

import dataclasses

import jax
import pytest
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


@dataclasses.dataclass(frozen=True)
class _Device(AbstractDevice):
    """A device that is only a compute capability."""

    compute_capability: str = "9.0"


def lowered(fn, *args, arch=HOPPER):
    """The program of `fn(*args)` for a CUDA device of this compute capability, as text; none is needed.

    Layouts, dtypes, swizzles and architecture are checked on the way. `args` may be ShapeDtypeStructs.
    """
    device = _Device("abstract", None, "gpu", f"{arch[0]}.{arch[1]}")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    return text
