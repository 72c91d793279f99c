"""Compile the Triton kernels ahead of time, without a GPU, and look at the machine code.

    python -m tools.triton.ahead [--all] [--output FILE.md]

Operators are called with their launches recorded in place of run; each recorded kernel is then
compiled for each target: in float32, the first of the autotuned block sizes, under a rule of each
kind, or with --all in every dtype, size and rule. Ends with 1 where a kernel does not compile, or
its code holds what the arithmetic of csrc/core does not ask for: an approximate or flushed
operation, or a product contracted with a sum in float64, where no kernel has an fma.

Triton keeps what it compiles (TRITON_CACHE_DIR): a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import tta_ext.backends.triton as backend
from benchmarks.harness import table
from tta_ext import rng, rules, schemas
from tta_ext.backends.triton import launch

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel as it would have been run: its Python function, types and constants.

    The types of a group of arguments are a group; a constant has its place: a parameter's number
    and, in a group, the field's.
    """

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """Its name, its constants, what it is not given, and 16-bit dtypes."""
        names = self.kernel.arg_names
        fixed = {names[at[0]]: value for at, value in self.constants.items() if len(at) == 1}
        words = [f"{k}={v}" for k, v in fixed.items() if k.isupper()]
        words += [f"no {k}" for k, v in fixed.items() if v is None and not k.isupper()]
        types = str(self.signature.values())
        words += [kind for kind in ("bf16", "fp16") if f"'*{kind}'" in types]
        return f"{self.kernel.__name__} {', '.join(words)}".strip()


def _type_of(value: Any, specialize: bool, at: tuple[int, ...], fixed: dict[Any, Any]) -> Any:
    """The type of an argument or of a group; what becomes a constant is noted."""
    if isinstance(value, tuple):
        types = [_type_of(x, True, (*at, i), fixed) for i, x in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if value is None or (specialize and type(value) is int and value == 1):
        fixed[at] = value
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def describe(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], every: bool
) -> Iterator[Launch]:
    """The launches that one call may become, one a block size."""
    warps = constants.pop("num_warps", None)
    configs = getattr(kernel, "configs", [triton.Config({})])[: None if every else 1]
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    for config in configs:
        values = dict(zip(kernel.arg_names, args, strict=False)) | constants | config.kwargs
        signature: dict[str, Any] = {}
        fixed: dict[tuple[int, ...], Any] = {}
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], fixed[(i,)] = "constexpr", value
            else:
                varies = not parameter.do_not_specialize
                signature[parameter.name] = _type_of(value, varies, (i,), fixed)
        yield Launch(kernel, signature, fixed, {"num_warps": warps or config.num_warps})


def record(call: Callable[[], None], every: bool) -> list[Launch]:
    """The launches of a call, which is made without running them."""
    found: list[Launch] = []

    def note(kernel: Any, programs: Any, *args: Any, **constants: Any) -> None:
        found.extend(describe(kernel, args, constants, every))

    modules = [m for n, m in sys.modules.items() if n.startswith(backend.__name__)]
    kept = {m: m.launch for m in modules if getattr(m, "launch", None) is launch.launch}
    for module in kept:
        module.launch = note  # type: ignore[attr-defined]
    try:
        call()
    finally:
        for module, original in kept.items():
            module.launch = original  # type: ignore[attr-defined]
    return found


# A rule of each kind: a budget, a test of p from below, a test of q from above, a distance.
_KINDS = (rules.KNAPSACK, rules.THRESHOLD, rules.PROXY_ABOVE, rules.OPTIMAL)


def calls(every: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of every operator; in its dtypes and under all rules, or some."""
    batch, vocab = 2, 128256
    seed, rollout = torch.tensor([7]), torch.tensor([3])
    each = torch.arange(batch)
    key = (seed, each, each, 0, rollout)
    param = torch.full((batch,), 0.3, dtype=torch.float64)
    yield "philox", (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    yield "normal", (1000, seed, 0, 0, 0, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(batch, vocab, dtype=dtype)
        for sampled in (True, False):
            yield "categorical_sample", (x, 0.7, *key, sampled, rng.BASE, 0, False)
        if dtype is torch.float16:
            continue
        hidden = torch.zeros(batch, 4096, dtype=dtype)
        mean = torch.zeros(1, 8, 4096)
        yield "prelogit_perturb", (hidden, mean, each, each, each, each, 0, 0.5, seed, False)
        if dtype is not torch.float32 and not every:
            continue
        for rule in range(len(rules.RULE_NAMES)) if every else _KINDS:
            proxied = rule in rules.NEEDS_PROXY
            for critical in ((0, 2) if every else (2,)) if rule == rules.KNAPSACK else (0,):
                given = (param, rule, critical, 0.7, 1.0)
                yield "deferral_mask", (x, x if proxied else None, *given, False)
                yield "deferral_probs", (x, x, *given, False)
                yield "deferral_stats", (x, x if proxied else None, *given, False)
                for sampled in (True, False):
                    if not proxied:
                        yield "deferral_propose", (x, *given, *key, sampled, False)
                    yield "deferral_sample", (x, x, *given, *key, sampled, False)
                    base = x.view(batch, 1, vocab).expand(batch, 3, vocab)
                    draft = torch.zeros(batch, 2, dtype=torch.int64)
                    proxy = base if proxied else base[:, :2]
                    yield "deferral_verify", (
                        base, proxy, draft, each, *given, *key, sampled, True, False,
                    )  # fmt: skip
        expert, beta = torch.zeros(2, batch, vocab, dtype=dtype), torch.ones(2)
        for anti in (None, expert):
            yield "implicit_reward_probs", (x, expert, anti, beta, 0.7, False)
            yield "implicit_reward_sample", (x, expert, anti, beta, 0.7, *key, True, False)
    weights = torch.zeros(1, 32)
    yield "importance_weights", (weights, weights, weights, 0.3, 0.9, 0.5, False)
    for length in (None, torch.zeros(1, 32, dtype=torch.int64)):
        yield "control_update", (mean, weights, length, seed, each[:1], 0, 0.5, 0, 32, False, False)
    yield "control_merge", (mean, torch.zeros(2, 1, 8, 4096), 0.5)


def launches(every: bool) -> dict[str, Launch]:
    """Every different kernel, by its label."""
    found: dict[str, Launch] = {}
    for name, args in calls(every):
        spec = schemas.OPS[name]
        outputs = dict(zip(spec.outputs, spec.allocate(*args), strict=True))
        for one in record(lambda: getattr(backend, name)(*args, **outputs), every):  # noqa: B023
            seen = found.get(one.label)
            if seen is None or len(one.constants) < len(seen.constants):
                found[one.label] = one
    return found


# What no kernel may have. ptxas contracts nothing either: Triton gives it --fmad=false.
_FOREIGN = re.compile(
    r"\b(?:ex2|lg2|sin|cos|rcp|rsqrt|tanh)\.\S*|\S+\.(?:approx|ftz|full)\.\S*|fma\.rn\.f64"
)
# On AMD, where a kernel divides nothing and makes no integer of a double: both are made of fma.
_CONTRACTED = re.compile(r"v_(?:fma|fmac|mad|mac)_f64\S*")


def foreign(code: dict[str, str]) -> list[str]:
    """Operations in compiled code that the source has not."""
    found = _FOREIGN.findall(code.get("ptx", ""))
    if not re.search(r"arith\.(?:divf|fpto[su]i)", code["ttir"]):
        found += _CONTRACTED.findall(code.get("amdgcn", ""))
    return sorted(set(found))


def _usage(compiled: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers a thread (vector registers on AMD) and spilled bytes."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert registers and spilled
        return int(registers[1]), 4 * int(spilled[1])
    dump = shutil.which("cuobjdump") or str(
        Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [dump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def compile_one(one: Launch, target: GPUTarget) -> tuple[int, int, list[str]]:
    """Registers, spilled bytes, and what its PTX has that it must not have."""
    source = ASTSource(fn=one.kernel, signature=one.signature, constexprs=one.constants)
    options = {"enable_fp_fusion": False, **one.options}
    compiled = triton.compile(source, target=target, options=options)
    return (*_usage(compiled, target), foreign(compiled.asm))


_HEAD = """\
# The Triton kernels, compiled without a GPU

`python -m tools.triton.ahead {command}` compiles them, and writes registers a thread / spilled
bytes a thread (on AMD: vector registers), by Triton {version}; with `--all` for every rule, dtype
and block size.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--all", action="store_true", help="every dtype, block size and rule")
    parser.add_argument("--only", default="", help="kernels whose label has this in it")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    failed, rows = [], []
    chosen = {k: one for k, one in launches(options.all).items() if options.only in k}
    if not chosen:
        failed.append(f"no kernel has {options.only!r} in its label")
    for label, one in chosen.items():
        rows.append([label, str(one.options["num_warps"])])
        for name in options.targets:
            try:
                registers, spilled, wrong = compile_one(one, TARGETS[name])
                rows[-1].append(f"{registers} / {spilled}")
                failed += [f"{label} for {name} has {word}" for word in wrong]
            except Exception as error:
                rows[-1].append("-")
                failed.append(f"{label} for {name}: {str(error).splitlines()[:4]}")
        print(*rows[-1], sep=" | ", flush=True)
    if options.output:
        text = _HEAD.format(command=" ".join(sys.argv[1:]), version=triton.__version__)
        body = table(("kernel", "warps", *options.targets), rows)
        options.output.write_text(f"{text}{body}\n")
    print(
        "\n".join(f"FAILED {line}" for line in failed)
        or "all compiled; nothing foreign in the code"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
