"""What kernels take of a multiprocessor, compiled for an H100 or H200 without one: `python -m ...bench.resources`.

Triton's own `ptxas` and `cuobjdump` do the work, so this needs no CUDA toolkit and no GPU.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from workbench_kernels.blocks import Blocks

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block can have on compute capability 9.0."""

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        name: of the kernel and its variant.
        registers: per thread.
        shared: bytes of shared memory per block.
        stack: bytes of local memory per thread; more than 0 means that registers spill.
        warps: per block.
        matrix_instructions: products on the matrix units in its machine code (`mma` and `wgmma`).
    """

    name: str
    registers: int
    shared: int
    stack: int
    warps: int
    matrix_instructions: int


def compile_for(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    blocks: "Blocks",
    capability: int = 90,
) -> Resources:
    """Compile one variant of a kernel down to machine code.

    Args:
        name: of the variant.
        kernel: a function under `triton.jit`.
        types: Triton types of arguments; those that are not named are `i32` and, like pointers, divisible by 16.
        constants: values of its compile-time arguments.
        blocks: for its warps and stages.
        capability: compute capability, times ten.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else types.get(argument, "i32")
        if signature[argument].startswith("*") or (signature[argument] == "i32" and argument not in types):
            aligned[(place,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, dict(constants), aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True},
    )
    registers, stack = _usage(made.asm["cubin"])
    return Resources(
        name=name,
        registers=registers,
        shared=int(made.metadata.shared),
        stack=stack,
        warps=blocks.warps,
        matrix_instructions=len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", made.asm["ptx"])),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes that a compiled kernel declares."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def score_variants(dtype: str, precision: str, d_head: int, width: int) -> Iterator[Resources]:
    """Every kernel of receiver scoring for one dtype, width of head and of window."""
    from workbench_kernels.blocks import block_shapes, power_of_two
    from workbench_kernels.ops.score import kernel as score

    held = "*" + DTYPES[dtype]
    shared = {"start": "*i64", "scale": "fp32", "width": "i32", "length": "i32"}
    label = f"{dtype} {precision} d_head={d_head} width={width}"
    blocks = block_shapes(width, width, d_head, getattr(torch, dtype), precision)
    common = {
        "CAUSAL": True,
        "GROUP": 1,
        "D_HEAD": d_head,
        "DP": power_of_two(d_head),
        "BU": blocks.keys,
        "PRECISION": precision,
    }
    halves = {"HB": power_of_two(d_head // 2), "BM": blocks.rows}
    clean = {**shared, **dict.fromkeys("qkvg", held)}
    yield compile_for(
        f"base {label}",
        score.base_kernel,
        {**clean, "worth_out": "*fp32", "log_out": "*fp32"},
        {**common, **halves},
        blocks=blocks,
    )
    yield compile_for(
        f"value {label}",
        score.value_kernel,
        {**clean, "log_in": "*fp32", "out": "*fp32", "n_heads": "i32"},
        {**common, "BT": blocks.rows},
        blocks=blocks,
    )
    wide = dict.fromkeys(("base", "inverse", "constant", "norm", "cos", "sin", "base_worth", "out"), "*fp32")
    types = {**clean, **wide, "heads": "*i64", "delta": held, "matrix": held, "norm_eps": "fp32"}
    types |= dict.fromkeys(("senders", "n_heads", "i_n", "i_t", "i_s"), "i32")
    for keys in (False, True):
        for factored in (False, True):
            yield compile_for(
                f"score {'k' if keys else 'q'} {'factored' if factored else 'projected'} {label}",
                score.score_kernel,
                types,
                {
                    **common,
                    **halves,
                    "KEYS": keys,
                    "FACTORED": factored,
                    "CONSTANT": True,
                    "NORM": True,
                    "D_INNER": d_head if factored else 0,
                    "HALF_ROT": d_head // 2,
                    "BI": min(32, power_of_two(d_head)),
                },
                blocks=blocks,
            )


def attend_variants(dtype: str, precision: str, d_head: int, width: int) -> Iterator[Resources]:
    """Attention from suffixes for one dtype, width of head and of window."""
    from workbench_kernels.blocks import block_shapes, power_of_two
    from workbench_kernels.ops.attend import kernel as attend

    held = "*" + DTYPES[dtype]
    blocks = block_shapes(width, width, d_head, getattr(torch, dtype), precision)
    types = dict.fromkeys(("q", "k", "v", "prefix_k", "prefix_v", "out"), held)
    types |= {"start": "*i64", "scale": "fp32", "n_prompts": "i32", "width": "i32", "prefix": "i32", "kv_heads": "i32"}
    yield compile_for(
        f"suffix {dtype} {precision} d_head={d_head} width={width}",
        attend.suffix_kernel,
        types,
        {
            "GROUP": 1,
            "D_HEAD": d_head,
            "DP": power_of_two(d_head),
            "BM": blocks.rows,
            "BU": blocks.keys,
            "PRECISION": precision,
        },
        blocks=blocks,
    )


def norm_variants(dtype: str, d_model: int) -> Iterator[Resources]:
    """Both kernels of norms for one dtype and width of stream."""
    from workbench_kernels.ops.norm import kernel, launch

    held = "*" + DTYPES[dtype]
    for layernorm in (True, False):
        label = f"{'layernorm' if layernorm else 'rmsnorm'} {dtype} d_model={d_model}"
        block = launch.row_block(d_model)
        yield compile_for(
            f"norm_delta {label}",
            kernel.norm_delta_kernel,
            {**dict.fromkeys(("base", "delta", "weight", "bias", "out"), held), "eps": "fp32", "rows": "i32"},
            {"LAYERNORM": layernorm, "BIAS": layernorm, "BD": block.keys},
            blocks=block,
        )
        block = launch.sender_block(d_model, 64)
        yield compile_for(
            f"inverse_sigma {label}",
            kernel.inverse_sigma_kernel,
            {
                **dict.fromkeys(("unit", "deltas"), held),
                **dict.fromkeys(("sigma", "out"), "*fp32"),
                **dict.fromkeys(("width", "senders", "s_n", "s_t"), "i32"),
                "eps": "fp32",
            },
            {"LAYERNORM": layernorm, "BS": block.rows, "BD": block.keys},
            blocks=block,
        )


SHAPES = (
    ("float32", "ieee"),
    ("float32", "tf32x3"),
    ("float32", "tf32"),
    ("bfloat16", "ieee"),
    ("float16", "ieee"),
)


def main() -> None:
    """Print a table of all variants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-head", type=int, nargs="*", default=[16, 64, 128, 256])
    parser.add_argument("--width", type=int, nargs="*", default=[16, 1024])
    parser.add_argument("--d-model", type=int, nargs="*", default=[768, 4096])
    given = parser.parse_args()
    print("| kernel | registers | shared bytes | stack bytes | warps | matrix instructions |")
    print("|---|---|---|---|---|---|")
    for dtype, precision in SHAPES:
        for d_head in given.d_head:
            for width in given.width:
                _show(score_variants(dtype, precision, d_head, width))
                _show(attend_variants(dtype, precision, d_head, width))
        if precision == "ieee":
            for d_model in given.d_model:
                _show(norm_variants(dtype, d_model))


def _show(found: Iterator[Resources]) -> None:
    for r in found:
        print(
            f"| {r.name} | {r.registers} | {r.shared} | {r.stack} | {r.warps} | {r.matrix_instructions} |", flush=True
        )


if __name__ == "__main__":
    main()
