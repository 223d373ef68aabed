"""Compiles every Triton kernel for a GPU that need not be there, at the sizes of the default model.

    python tests/compile_kernels.py [CAPABILITY]        90 is Hopper, 80 Ampere; default 90

Prints a line for each kernel: shared memory, local memory that its PTX asks for, bytes of machine code. The MLP product
is compiled with pointers; with TMA descriptors it needs the device.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a compiler is wanted

import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_gpt as tg

BFLOAT16, FLOAT32, INT32, INT64, NUMBER = "*bf16", "*fp32", "*i32", "*i64", "fp32"


def launches() -> list[tuple[str, Callable, dict[str, str], dict[str, Any]]]:
    """(name, kernel, types of its pointers and floats where they are not bfloat16 and int32, its constants)."""
    up, slope, many = (tg.TILES["hopper", kind] for kind in ("up", "slope", "many"))
    mlp = dict(left=BFLOAT16, right=BFLOAT16, pre=BFLOAT16, out=BFLOAT16, slope=NUMBER)
    nll = dict(logits=BFLOAT16, targets=INT64, nats=FLOAT32, total=FLOAT32, g=FLOAT32, out=BFLOAT16, softcap=NUMBER)
    heads = dict(qk=BFLOAT16, gain=FLOAT32, cos=FLOAT32, sin=FLOAT32, q=BFLOAT16, k=BFLOAT16)
    heads |= dict(out=BFLOAT16, dgain=FLOAT32, eps=NUMBER)
    gate = {name: BFLOAT16 for name in ("y", "v", "gate", "g", "out", "dv", "dgate")}
    square = dict(a=BFLOAT16, base=BFLOAT16, out=BFLOAT16, alpha=NUMBER, beta=NUMBER)
    paths = dict(costs=FLOAT32, branches=INT32, decisions=INT32, path=INT32)
    block = dict(ROWS=2, HEADS=16, WIDTH=64)
    dtype = dict(TMA=False, DTYPE=triton.language.bfloat16, PROGRAMS=132)
    return [
        ("mlp forward", tg.mlp_kernel, mlp, up | dtype | dict(BACKWARD=False)),
        ("mlp backward", tg.mlp_kernel, mlp, slope | dtype | dict(BACKWARD=True)),
        ("nll", tg.nll_kernel, nll, dict(BLOCK=tg.VOCABULARY_BLOCK)),
        ("nll slope", tg.nll_slope_kernel, nll, dict(BLOCK=tg.VOCABULARY_BLOCK)),
        ("heads forward", tg.heads_kernel, heads, block | dict(BACKWARD=False, out=None)),
        ("heads backward", tg.heads_kernel, heads, block | dict(BACKWARD=True)),
        ("gate forward", tg.exclusive_gate_kernel, gate, block | dict(HEADS=2, BACKWARD=False)),
        ("gate backward", tg.exclusive_gate_kernel, gate, block | dict(HEADS=2, BACKWARD=True)),
        ("symmetric", tg.symmetric_kernel, square, many | dict(BASE=True)),
        ("trellis", tg.trellis_kernel, paths, dict(STATES=8, num_warps=1)),
    ]


def compile_kernel(kernel: Callable, types: dict[str, str], constants: dict[str, Any], target: GPUTarget) -> Any:
    """Triton's result for one kernel; raises what the compiler raises."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    names = list(inspect.signature(kernel).parameters)
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(tg.jit(kernel), signature, places)
    return triton.compile(source, target=target, options=options)


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
    for name, kernel, types, constants in launches():
        compiled = compile_kernel(kernel, types, constants, target)
        local = re.findall(r"\.local .*?\[(\d+)\]", compiled.asm["ptx"])
        memory = f"shared:{compiled.metadata.shared} local_bytes:{sum(map(int, local))}"
        print(f"kernel:{name.replace(' ', '_')} function:{kernel.__name__} sm:{target.arch} {memory} cubin_bytes:{len(compiled.asm['cubin'])}")


if __name__ == "__main__":
    main()
