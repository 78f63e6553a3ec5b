"""Compiling recorded launches for a GPU that is not there, and reading what the compiler made of them."""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from effbench.kernels._common.launch import Launch


class Compiled(NamedTuple):
    """One kernel, compiled."""

    kernel: str  # its name
    registers: int
    spills: int  # bytes of registers that did not fit and live in local memory
    shared: int  # bytes of shared memory
    matrix_products: int  # tensor-core instructions in the code
    wide_loads: float  # share of the loads of global memory that bring 16 bytes to a lane at once
    lane_instructions: float  # instructions of all lanes per number, in the longest loop


def compile_launch(launch: Launch, capability: int = 90) -> Compiled:
    """Compile `launch` for an NVIDIA GPU of that compute capability."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if not isinstance(value, int | float) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options={"num_warps": launch.num_warps})
    lines = [line.split(";")[0] for line in result.asm["sass"].splitlines()]
    usage = _read_resources(result.asm["cubin"])
    loads = [line for line in lines if re.search(r"\b(LDG|LDGSTS)\.", line)]  # to registers, to shared memory
    return Compiled(
        kernel=result.metadata.name,
        registers=usage["REG"],
        spills=usage["LOCAL"] + usage["STACK"],
        shared=result.metadata.shared,
        matrix_products=sum("HGMMA" in line or "HMMA" in line for line in lines),
        wide_loads=sum(".128" in line for line in loads) / max(1, len(loads)),
        lane_instructions=_measure_longest_loop(lines) * launch.num_warps * 32 / launch.numbers,
    )


def _read_resources(cubin: bytes) -> dict[str, int]:
    """What the code occupies: REG registers, bytes of STACK, SHARED and LOCAL memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", output)}


def _measure_longest_loop(lines: list[str]) -> int:
    """Instructions in the body of the longest loop of a SASS listing; all of them where there is no loop."""
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith("LBB")}
    bodies = []
    for at, line in enumerate(lines):
        branch = re.search(r"\bBRA(?:\.\w+)* .*?(LBB\d+)", line)
        # A branch to itself only pads the end of the code.
        if branch and labels.get(branch[1], at) < at - 1:
            body = lines[labels[branch[1]] : at + 1]
            bodies.append(sum("\t" in instruction for instruction in body))
    return max(bodies, default=sum("\t" in line for line in lines))
