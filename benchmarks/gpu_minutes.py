"""What only a GPU can tell, in a few minutes: bits, graphs, times beside what the memory allows.

    python -m benchmarks.gpu_minutes [--minutes N] [--dry-run] [--output FOLDER]

Steps in processes of their own, each with a share of the time, so that one that hangs or crashes
costs no other: build (for this GPU alone), bits (every operator at V = 128256 equals the CPU's, by
the CUDA library and by Triton), graphs (captured and replayed), times (every operator at B rows
against torch.softmax, the eager chain, torch.compile, Triton and, where it can be imported,
FlashInfer, all in CUDA graphs), sanitizer (compute-sanitizer over small sizes), and in the time
that is left the variants of the CUDA library (docs/gpu.md), built and timed. FOLDER gets report.md,
lines.jsonl, log.txt. The limit of a time is the bytes that cannot be avoided over the measured
bandwidth of a copy. --dry-run does the same on the CPU with few and small calls: all but the
device. Exit code: 1 where a step failed, 2 where one was cut short or skipped (but a variant).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tta_ext
from tta_ext import dispatch
from tta_ext.build.cuda import VARIANTS

from . import eager, gpu_times, harness

ROOT = Path(__file__).resolve().parent.parent
VOCAB, DIM, RULE = 128256, 4096, ("threshold", 0.001)
BATCHES = (8, 64, 1, 256)  # the most telling first: time may run out
# Shares of the time; what a step leaves goes to those after it.
SHARES = {"build": 0.4, "bits": 0.35, "graphs": 0.2, "times": 0.6, "sanitizer": 0.5, "variant": 1.0}
# The operators whose kernels differ in a variant.
VARIED = ("categorical_sample", "deferral", "implicit_reward_probs")
Call = Callable[[], Any]


class Setting(NamedTuple):
    """Where and how much: the GPU, or the CPU in a dry run."""

    device: str
    vocab: int
    dim: int
    batches: tuple[int, ...]
    backends: tuple[str, ...]

    @classmethod
    def of(cls, device: str, small: bool) -> Setting:
        usable = tuple(name for name in ("cuda", "triton") if not dispatch.unavailable(name))
        backends = ("cpu",) if device == "cpu" else usable
        if small:
            return cls(device, 1000, 128, (2,), backends)
        return cls(device, VOCAB, DIM, BATCHES, backends)


def synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def differing(found: Any, wanted: Any) -> int:
    """How many elements of two results have other bits; all NaNs count as one."""
    count = 0
    for a, b in zip(tensors(found), tensors(wanted), strict=True):
        a = a.cpu()
        same = (a == b) & ((a == 0).logical_not() | (a.float().signbit() == b.float().signbit()))
        if a.is_floating_point():
            same |= a.isnan() & b.isnan()
        count += int((~same).sum())
    return count


def cases(setting: Setting, device: str, batch: int) -> Iterator[gpu_times.Measured]:
    return gpu_times.calls((batch,), (setting.vocab,), (setting.dim,), device)


# ---- steps: each yields lines of the report ------------------------------------------------------


def build(setting: Setting) -> Iterator[dict[str, Any]]:
    """The CUDA library, compiled for this GPU by all cores unless one that was built fits."""
    device = "cpu" if setting.device == "cpu" else "cuda"
    start = time.perf_counter()
    reason = dispatch.native_status(device)
    yield {"what": f"{device} library", "seconds": time.perf_counter() - start, "wrong": reason}
    for name in ("cuda", "triton"):
        if reason := dispatch.unavailable(name):
            yield {"what": f"backend {name}", "note": f"not available: {reason}"}


def bits(setting: Setting) -> Iterator[dict[str, Any]]:
    """Every operator against the CPU's kernels."""
    batch = 3
    pairs = zip(cases(setting, setting.device, batch), cases(setting, "cpu", batch), strict=True)
    for there, here in pairs:
        with tta_ext.use_backend("cpu"):
            wanted = tensors(here.call())
        wanted = tuple(value.clone() for value in wanted)
        for backend in setting.backends:
            with tta_ext.use_backend(backend):
                wrong = differing(there.call(), wanted)
            what = f"{there.op} {there.dtype} {there.rows}x{there.columns}"
            yield {"what": what, "backend": backend, "wrong": f"{wrong} differ" if wrong else ""}


def graphs(setting: Setting) -> Iterator[dict[str, Any]]:
    """Every operator captured in a CUDA graph gives on replay what it gives without."""
    for backend, case in itertools.product(setting.backends, cases(setting, setting.device, 2)):
        if case.op == "prelogit_perturb":  # adds to its own output
            continue
        with tta_ext.use_backend(backend):
            wanted = [value.cpu().clone() for value in tensors(case.call())]
            synchronize(setting)
            if setting.device == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = case.call()
                for value in tensors(found):
                    value.zero_()
                graph.replay()
                synchronize(setting)
            else:
                found = case.call()
        wrong = differing(found, wanted)
        what = f"{case.op} {case.dtype} {case.rows}x{case.columns}"
        yield {"what": what, "backend": backend, "wrong": f"{wrong} differ" if wrong else ""}


def timer(setting: Setting) -> Callable[[Call], float]:
    """Microseconds a call, by the median of replays of a CUDA graph."""
    if setting.device == "cpu":
        return lambda call: harness.measure({"": call}, 0.002, 3)[""].q50 * 1e6
    from triton.testing import do_bench_cudagraph

    return lambda call: 1e3 * do_bench_cudagraph(call, rep=10, return_mode="median")


def row_bytes(op: str, columns: int, size: int) -> int | None:
    """Bytes a row that an operator cannot avoid, ``size`` a logit; None where work, not memory,
    is what it costs."""
    base, both = columns * size, 2 * columns * size
    drafted = gpu_times.DRAFT * both + base
    known = {
        "categorical_sample": base, "deferral_propose": base, "deferral_propose greedy": base,
        "deferral_propose knapsack": base, "deferral_sample": base, "deferral_sample greedy": both,
        "deferral_sample deferred": both, "deferral_mask": base + columns,
        "deferral_mask knapsack": base + columns, "deferral_probs": both + 4 * columns,
        "deferral_stats": base, "implicit_reward": base + both,
        "implicit_reward_probs": base + both + 4 * columns, "greedy_knapsack": 9 * columns,
        "deferral_verify": drafted, "deferral_verify mass": drafted,
        "deferral_verify unrelated": both,
    }  # fmt: skip
    return known.get(op)


def others(setting: Setting, batch: int, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """What else gives about the same, by operator and name."""
    generator = torch.Generator().manual_seed(gpu_times.SEED)
    shape = batch, setting.vocab
    base, proxy = (
        (3 * torch.randn(*shape, generator=generator)).to(dtype).to(setting.device)
        for _ in range(2)
    )
    chains: dict[str, tuple[Any, ...]] = {
        "categorical_sample": (eager.categorical_sample, base),
        "deferral_propose": (eager.deferral_propose, base, *RULE),
        "deferral_sample": (eager.deferral_sample, base, proxy, *RULE),
        "deferral_mask": (eager.deferral_mask, base, proxy, *RULE),
        "deferral_mask knapsack": (eager.deferral_mask, base, proxy, "knapsack", 0.4),
        "deferral_probs": (eager.deferral_probs, base, proxy, *RULE),
        "deferral_stats": (eager.deferral_stats, base, proxy, *RULE),
    }
    found: dict[str, dict[str, Call]] = {}
    for op, (chain, *given) in chains.items():
        compiled = functools.partial(torch.compile(chain, dynamic=False), *given)
        found[op] = {"eager": functools.partial(chain, *given), "compile": compiled}
        if setting.device == "cpu":
            del found[op]["compile"]  # needs minutes of a C++ compiler
    found["categorical_sample"]["softmax"] = lambda: torch.softmax(base, -1, dtype=torch.float32)
    if setting.device == "cuda" and importlib.util.find_spec("flashinfer") is not None:
        sampling = importlib.import_module("flashinfer.sampling")
        found["categorical_sample"]["flashinfer"] = lambda: sampling.sampling_from_logits(
            base.float()
        )
    return found


def copied(setting: Setting, timed: Callable[[Call], float]) -> float:
    """Bytes a microsecond of a copy of 1 GiB, which is too large for any cache."""
    source = torch.zeros(1 << (28 if setting.device == "cuda" else 20), device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source))


def times(setting: Setting) -> Iterator[dict[str, Any]]:
    """The table: every operator and what else there is, beside the limit."""
    timed = timer(setting)
    bandwidth = copied(setting, timed)
    yield {"what": "copy", "note": f"{bandwidth / 1e3:.1f} GB/s, read and written"}
    for batch in setting.batches:
        rivals: dict[torch.dtype, dict[str, dict[str, Call]]] = {}
        for case in cases(setting, setting.device, batch):
            dtype = getattr(torch, case.dtype)
            if dtype not in rivals:
                rivals = {dtype: others(setting, batch, dtype)}
            known = row_bytes(case.op, case.columns, dtype.itemsize)
            line: dict[str, Any] = {
                "op": case.op, "dtype": case.dtype, "rows": case.rows, "columns": case.columns,
                "limit": case.rows * known / bandwidth if known else None, "us": {},
            }  # fmt: skip
            runs = dict.fromkeys(setting.backends, case.call) | rivals[dtype].get(case.op, {})
            for name, call in runs.items():
                with contextlib.ExitStack() as stack:
                    if name in setting.backends:
                        stack.enter_context(tta_ext.use_backend(name))
                    try:
                        line["us"][name] = timed(call)
                    except Exception as error:  # a rival that cannot run is no failure of ours
                        if name in setting.backends:
                            line["wrong"] = f"{name}: {str(error).partition(chr(10))[0]}"
            yield line


def variant(setting: Setting) -> Iterator[dict[str, Any]]:
    """A variant of the CUDA library: its bits, and its times beside those of ``times``."""
    name, backend = os.environ["TTA_EXT_CUDA_VARIANT"], setting.backends[0]
    if setting.device == "cuda" and backend != "cuda":
        yield {"what": f"variant {name}", "note": dispatch.unavailable("cuda")}
        return
    setting = setting._replace(backends=(backend,), batches=setting.batches[:2])
    for line in bits(setting):
        if line["wrong"]:
            yield {**line, "what": f"{name}: {line['what']}"}
    timed = timer(setting)
    for case in itertools.chain(*(cases(setting, setting.device, b) for b in setting.batches)):
        if case.op.startswith(VARIED):
            with tta_ext.use_backend(backend):
                us = {name: timed(case.call)}
            shape = {"rows": case.rows, "columns": case.columns}
            yield {"op": case.op, "dtype": case.dtype, **shape, "us": us}


STEPS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "build": build, "bits": bits, "graphs": graphs, "times": times, "variant": variant,
}  # fmt: skip


def run_step(name: str, setting: Setting, path: Path) -> int:
    """A step in this process; lines are appended as they come."""
    failed = False
    with path.open("a") as file:
        for line in STEPS[name](setting):
            failed |= bool(line.get("wrong"))
            file.write(json.dumps({"step": name, **line}) + "\n")
            file.flush()
    return int(failed)


# ---- the conductor -------------------------------------------------------------------------------


def commands(dry: bool, lines: Path) -> Iterator[tuple[str, list[str] | str]]:
    """The command of each step, or why there is none; of a variant, one after the other."""
    python = [sys.executable, "-m", "benchmarks.gpu_minutes", "--lines", str(lines)]
    device = ["--device", "cpu", "--small"] if dry else ["--device", "cuda"]
    for name in STEPS:
        if name != "variant":
            yield name, [*python, *device, "--step", name]
    tool = shutil.which("compute-sanitizer")
    small = [*python, *device, *([] if dry else ["--small"]), "--step", "bits"]
    if dry:
        yield "sanitizer", small  # all but the tool
    elif tool is None:
        yield "sanitizer", "compute-sanitizer was not found (it is part of the CUDA toolkit)"
    else:
        yield "sanitizer", [tool, "--tool", "memcheck", "--error-exitcode", "1", *small]
    for name in VARIANTS:
        yield f"variant {name}", [*python, *device, "--step", "variant"]


def conduct(minutes: float, dry: bool, folder: Path) -> int:
    """All steps within the time, and the report."""
    end = time.monotonic() + 60 * minutes - 10  # for the report
    folder.mkdir(parents=True, exist_ok=True)
    lines, log = folder / "lines.jsonl", folder / "log.txt"
    lines.write_text("")
    variables = {"MAX_JOBS": str(os.cpu_count() or 1), **os.environ}
    if not dry and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        variables["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    state: list[tuple[str, str, str]] = []
    with log.open("w") as file:
        for name, command in commands(dry, lines):
            kind, _, wanted = name.partition(" ")
            share = SHARES[kind] * (end - time.monotonic())
            extra = {"TTA_EXT_CUDA_VARIANT": wanted} if wanted else {}
            if isinstance(command, str) or share < 5:
                why = command if isinstance(command, str) else "no time was left"
                state.append((name, "skipped", why))
                continue
            print(f"== {name}, at most {share:.0f} s", flush=True)
            start = time.monotonic()
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=variables | extra, stdout=file, stderr=file,
                    timeout=share,
                ).returncode  # fmt: skip
                how = "failed" if code else "done"
            except subprocess.TimeoutExpired:
                how = "cut short"
            state.append((name, how, f"{time.monotonic() - start:.0f} s"))
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    text = report(state, found)
    (folder / "report.md").write_text(text)
    print(text)
    states = {how for name, how, _ in state if how == "failed" or not name.startswith("variant")}
    return 1 if "failed" in states else 2 if states & {"cut short", "skipped"} else 0


def report(state: Sequence[tuple[str, str, str]], found: Sequence[dict[str, Any]]) -> str:
    """Steps, what was wrong, and one table of measured times beside their limits."""
    parts = [harness.table(("step", "how it ended", ""), state)]
    counts = {
        name: sum(line["step"] == name and "backend" in line for line in found)
        for name in ("bits", "graphs")
    }
    wrong = [
        f"- {line['step']}: {line.get('what', line.get('op'))} {line.get('backend', '')}: "
        f"{line['wrong']}"
        for line in found
        if line.get("wrong")
    ]
    parts.append("\n".join(wrong) or "Nothing was wrong.")
    parts.append(f"Compared with the CPU: {counts['bits']} calls; replayed: {counts['graphs']}.")
    parts += [f"{line['what']}: {line['note']}." for line in found if line.get("note")]
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in found:
        if line.get("us"):  # a variant's time stands beside the others of its call
            at = tuple(line[key] for key in ("op", "dtype", "rows", "columns"))
            merged.setdefault(at, {"limit": None} | line | {"us": {}})["us"] |= line["us"]
    timed = list(merged.values())
    names = list(dict.fromkeys(name for line in timed for name in line["us"]))
    rows = []
    for line in timed:
        limit = line["limit"]
        ours = next(iter(line["us"].values()))
        rows.append(
            [
                line["op"], line["dtype"], f"{line['rows']}x{line['columns']}",
                *(f"{line['us'][name]:.1f}" if name in line["us"] else "" for name in names),
                f"{limit:.1f}" if limit else "", f"{ours / limit:.2f}" if limit else "",
            ]
        )  # fmt: skip
    parts.append(
        harness.table(("op", "dtype", "BxV", *(f"{n} us" for n in names), "limit us", "x"), rows)
    )
    command = "python -m benchmarks.gpu_minutes"
    return harness.document("GPU check", command, harness.environment(), "\n\n".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, nargs="?", const=9.0, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        setting = Setting.of(options.device, options.small)
        return run_step(options.step, setting, options.lines)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_minutes: torch sees no CUDA device; nothing can be checked here (--dry-run can)")
        return 77
    return conduct(options.minutes, options.dry_run, options.output)


if __name__ == "__main__":
    sys.exit(main())
