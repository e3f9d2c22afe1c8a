"""Measure every kernel on this device: `python -m workbench_kernels.bench --json bench.json --markdown bench.md`.

For each operation and size: time of the Triton kernel, of its torch reference and of the reference under
torch.compile; operations and bytes a second beside the measured ceilings of the same device and dtype; the share of the
floor that these set; peak memory; error against float64. On a CPU there is no kernel to time, only torch.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from workbench_kernels.bench.cases import Case, Problem, attend_cases, norm_cases, score_cases
from workbench_kernels.bench.measure import Ceilings, ceilings, measure, relative_error
from workbench_kernels.dispatch import has_triton

PRECISIONS = {
    "fp32": (torch.float32, "ieee"),
    "tf32x3": (torch.float32, "tf32x3"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}

SCORES = [
    Problem(n=32, tokens=16, senders=144, heads=12, kv_heads=12, d_head=64),
    Problem(n=16, tokens=64, senders=90, heads=9, kv_heads=3, d_head=64),
    Problem(n=4, tokens=256, senders=64, heads=32, kv_heads=8, d_head=128),
    Problem(n=2, tokens=1024, senders=16, heads=12, kv_heads=12, d_head=64),
]
MEMORY = [
    Problem(n=1, tokens=tokens, senders=16, heads=4, kv_heads=4, d_head=64) for tokens in (64, 128, 256, 512, 1024)
]
ATTEND = [
    Problem(n=8, tokens=8, senders=256, heads=12, kv_heads=12, d_head=64, prefix=120),
    Problem(n=8, tokens=16, senders=128, heads=9, kv_heads=3, d_head=64, prefix=48),
    Problem(n=2, tokens=256, senders=64, heads=32, kv_heads=8, d_head=128),
]
NORMS = [(32, 16, 256, 768), (8, 16, 256, 4096)]

QUICK_SCORES = [Problem(n=2, tokens=8, senders=3, heads=3, kv_heads=1, d_head=16, prefix=4)]
QUICK_MEMORY = [Problem(n=1, tokens=tokens, senders=2, heads=2, kv_heads=2, d_head=16) for tokens in (16, 32)]
QUICK_NORMS = [(2, 8, 3, 32)]


def all_cases(dtype: torch.dtype, device: torch.device, quick: bool) -> Iterator[Case]:
    """Every operation at every size."""
    yield from score_cases(QUICK_SCORES if quick else SCORES, dtype, device)
    yield from attend_cases(QUICK_SCORES if quick else ATTEND, dtype, device)
    yield from norm_cases(QUICK_NORMS if quick else NORMS, dtype, device)


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, precision: str, top: Ceilings, *, repeats: int, compiled: bool
) -> dict[str, Any]:
    """Measure one case in every way that this device has."""
    ways: dict[str, Callable[[], object]] = {"torch": lambda: case.run("torch", precision)}
    if device.type == "cuda" and has_triton():
        ways["triton"] = lambda: case.run("triton", precision)
    if compiled:
        ways["torch.compile"] = torch.compile(lambda: case.run("torch", precision))
    floor = max(case.flops / top.flops, case.bytes / top.bytes)
    row: dict[str, Any] = {
        "operation": case.operation,
        "sizes": case.sizes,
        "flops": case.flops,
        "bytes": case.bytes,
        "floor_seconds": floor,
        "bound": "arithmetic" if case.flops / top.flops > case.bytes / top.bytes else "memory",
    }
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        for way, work in ways.items():
            try:
                found = measure(work, device, repeats=repeats)
            except torch.cuda.OutOfMemoryError:
                row[way] = {"error": "out of memory"}
                torch.cuda.empty_cache()
                continue
            except Exception as error:
                if way != "torch.compile":
                    raise
                row[way] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                continue
            row[way] = {
                "seconds": found.seconds,
                "spread": found.spread,
                "tflops": case.flops / found.seconds / 1e12,
                "gbytes": case.bytes / found.seconds / 1e9,
                "floor_share": floor / found.seconds,
                "peak_mib": None if found.peak_bytes is None else found.peak_bytes / (1 << 20),
            }
            if way != "torch.compile":
                truth = case.small(torch.float64)("torch", "ieee")
                row[way]["error"] = relative_error(case.small(dtype)(way, precision), truth)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return row


def memory_rows(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Peak memory of scoring against the number of tokens, beside the memory of its inputs."""
    rows = []
    for problem in QUICK_MEMORY if quick else MEMORY:
        for case in score_cases([problem], torch.float32, device):
            if "projected" not in case.operation:
                continue
            row: dict[str, Any] = {"operation": case.operation, "tokens": problem.tokens, "bytes": case.bytes}
            for way in ("torch", "triton") if device.type == "cuda" and has_triton() else ("torch",):
                peak = measure(lambda c=case, w=way: c.run(w, "ieee"), device, repeats=1).peak_bytes  # type: ignore[misc]
                row[way] = peak
            rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The measurements as tables."""
    lines = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['date']}", ""]
    lines += ["| precision | product, TFLOP/s | copy, GB/s |", "|---|---|---|"]
    for name, top in result["ceilings"].items():
        lines.append(f"| {name} | {top['flops'] / 1e12:.3g} | {top['bytes'] / 1e9:.4g} |")
    lines += [
        "",
        "| precision | operation | sizes | bound | kernel, ms | TFLOP/s | GB/s | of floor | torch, ms | compiled, ms "
        "| times torch | kernel, MiB | torch, MiB | error | torch's error |",
        "|" + "---|" * 15,
    ]
    for name, rows in result["rows"].items():
        for row in rows:
            kernel, plain = row.get("triton", {}), row.get("torch", {})
            shown = kernel or plain
            ratio = plain["seconds"] / kernel["seconds"] if "seconds" in kernel and "seconds" in plain else None
            values = [
                _scaled(kernel.get("seconds"), 1e3),
                _scaled(shown.get("tflops"), 1),
                _scaled(shown.get("gbytes"), 1),
                _scaled(shown.get("floor_share"), 1),
                _scaled(plain.get("seconds"), 1e3),
                _scaled(row.get("torch.compile", {}).get("seconds"), 1e3),
                _scaled(ratio, 1),
                _scaled(kernel.get("peak_mib"), 1),
                _scaled(plain.get("peak_mib"), 1),
                _scaled(kernel.get("error"), 1),
                _scaled(plain.get("error"), 1),
            ]
            lines.append(f"| {name} | {row['operation']} | {row['sizes']} | {row['bound']} | {' | '.join(values)} |")
    lines += ["", "| operation | tokens | inputs, MiB | kernel peak, MiB | torch peak, MiB |", "|---|---|---|---|---|"]
    for row in result["memory"]:
        values = [_scaled(row.get(way), 1 / (1 << 20)) for way in ("bytes", "triton", "torch")]
        lines.append(f"| {row['operation']} | {row['tokens']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _scaled(value: float | str | None, by: float) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value * by:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """Parse arguments, measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", nargs="*", choices=sorted(PRECISIONS), default=["fp32", "tf32x3", "tf32", "bf16"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether the program works, not how fast")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: give at least 1")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: torch sees no CUDA device here; use --device cpu")
    side, copied = (256, 1 << 20) if given.quick else (8192, 1 << 32) if device.type == "cuda" else (2048, 1 << 28)
    tops: dict[str, dict[str, float]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in given.precision:
        dtype, precision = PRECISIONS[name]
        top = ceilings(device, dtype, precision, size=side, copied=copied)
        tops[name], rows[name] = {"flops": top.flops, "bytes": top.bytes}, []
        seen: set[str] = set()
        for case in all_cases(dtype, device, given.quick):
            first = case.operation not in seen
            seen.add(case.operation)
            compiled = first and name == "fp32" and not given.no_compile and not given.quick
            row = run_case(case, device, dtype, precision, top, repeats=given.repeats, compiled=compiled)
            rows[name].append(row)
            print(f"{name} {case.operation} {case.sizes}", file=sys.stderr, flush=True)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "ceilings": tops,
        "rows": rows,
        "memory": memory_rows(device, given.quick),
    }
    table = markdown(result)
    print(table)
    for path, text in ((given.json, json.dumps(result, indent=2) + "\n"), (given.markdown, table)):
        if path is not None:
            path.write_text(text, encoding="utf-8")


def _triton_version() -> str | None:
    if not has_triton():
        return None
    from importlib.metadata import version

    return version("triton")


if __name__ == "__main__":
    main()
