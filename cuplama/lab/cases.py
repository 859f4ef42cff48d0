"""Judge an op on its own cases, with whatever this machine has: a GPU, or the emulator."""

from __future__ import annotations

from ..backends.cuda.driver import cuda_available
from ..errors import ParameterError
from ..ops.op import Op
from .check import backend_checker
from .emulation import Emulator
from .report import counted
from .workloads import case_workloads

__all__ = ["check_op"]


def check_op(op: Op, dtype: str = "f32") -> str:
    """Hold an op's kernels to its reference on every one of its cases, as ``cuplama.lab.check`` does for all ops.

    op: one of the package, or what ``cuplama.ops.load`` gives; dtype: the T of its signature, "f32", "f16" or "bf16".
    Returns what was done, such as "right on 2 cases, on the emulator". Raises WrongResultError, which names case,
    output and element; CompileError; DeviceError where there is neither a GPU nor a C++ compiler; ParameterError for
    an op that declares no cases.
    """
    if not op.cases:
        raise ParameterError(f"{op.name} declares no cases to check it on: cases=[dict(n=5), ...]")
    workloads = case_workloads(op, dtype)
    if cuda_available()[0]:
        from ..backends.cuda.backend import CudaBackend

        backend = CudaBackend(dtype)
        try:
            checker, where = backend_checker(backend), backend.describe()
            for workload in workloads:
                checker.check(workload, workload.arrays())
        finally:
            backend.close()
    else:
        emulator, where = Emulator(), "the emulator"
        for workload in workloads:
            emulator.check(workload)
    return f"right on {counted(len(workloads), 'case')}, on {where}"
