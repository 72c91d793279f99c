"""Fuzzes every operator: python tests/fuzz.py [--seconds 60 | --minutes M | --cases N] [--seed S]

A case is a call drawn from its seed and number alone: an operator of the schemas' table with good
arguments (draws.py), most of them then spoilt by type: shapes, strides, dtypes, aliases, devices,
extremes, objects of other kinds; as the public function, as torch.ops.tta_ext.X or as its .out
form. Inputs end at an unreadable page, outputs lie between guards over two kinds of garbage. A
call must be refused in a documented way, or have a result that keeps to the operator's table, is
the same on another instruction set and number of threads, leaves its inputs alone and is what
meanings.py says. Cases run in a child: its death, and a case that does not end, is a fault, and the
next child goes on behind it. Each fault is told with the command that shows it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from draws import ARGUMENTS, MEDIUM, SMALL, Draw
from meanings import MEANINGS
from spoiling import GUARD, Rng, at_the_edge, bits, flat, guarded, plain, spoilt, typed
from torch import Tensor

import tta_ext
from tta_ext import dispatch, ops, rng, rules, schemas

REFUSALS = (ValueError, TypeError, RuntimeError)
HANG = 300.0  # seconds


# ---------------------------------------------------------------------------- a case


class Case:
    """A call, its arguments by name, and which form it takes."""

    def __init__(self, seed: int, number: int) -> None:
        r = self.r = Rng(seed, number)
        self.spec: schemas.OpSpec = r.one_of(list(schemas.OPS.values()))
        op = self.spec.name
        arguments = self.spec.functional._schema.arguments
        kinds = {a.name: str(a.type).replace("Optional[Tensor]", "Tensor?") for a in arguments}
        self.kinds = kinds
        sizes = SMALL if r.chance(0.9) else MEDIUM
        if op in ARGUMENTS:
            given = ARGUMENTS[op](Draw(op, r.below(2**31), sizes))
        else:
            given = tuple(typed(r, kind) for kind in kinds.values())
        self.arguments: dict[str, Any] = dict(zip(self.spec.inputs, given, strict=True))
        self.form = r.one_of(("functional", "out", "public"))
        self.plain = r.chance(0.4)
        names = list(self.arguments)
        if r.chance(0.1):
            self.plain = False
            self.arguments = {name: typed(r, kinds[name]) for name in names}
        elif not self.plain:
            for _ in range(r.one_of((1, 1, 2, 3))):
                name = r.one_of(names)
                self.arguments[name] = spoilt(r, self.arguments[name], kinds[name])
        for name, x in self.arguments.items():
            if isinstance(x, Tensor) and plain(x) and r.chance(0.7):
                self.arguments[name] = at_the_edge(x)
        tensors = [n for n, x in self.arguments.items() if isinstance(x, Tensor)]
        if not self.plain and len(tensors) > 1 and r.chance(0.15):
            one, other = r.one_of(tensors), r.one_of(tensors)
            self.arguments[one] = self.arguments[other]
        self.level = r.below(3)
        self.threads = 1 + r.below(2)

    def __str__(self) -> str:
        return f"{self.spec.name} ({self.form}) of " + ", ".join(
            f"{name}={_short(x)}" for name, x in self.arguments.items()
        )


def _short(x: Any) -> str:
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_meta:
        return repr(x)[:60]
    values = f" {x.tolist()}" if 0 < x.numel() < 5 else ""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}/{list(x.stride())}{values}"


@contextlib.contextmanager
def _place(level: int, threads: int) -> Any:
    before = torch.ops.tta_ext.cpu_isa(-1), torch.get_num_threads()
    torch.ops.tta_ext.cpu_isa(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.ops.tta_ext.cpu_isa(before[0])
        torch.set_num_threads(before[1])


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def public(spec: schemas.OpSpec, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The public function on an operator's arguments, in whose names it is called."""
    given = dict(arguments)
    if "rule" in given:
        codes = {"rule": rules.RULE_NAMES, "critical": tuple(rules.CRITICAL)}
        for name, texts in codes.items():
            code = given[name]
            if type(code) is int and 0 <= code < len(texts):
                given[name] = texts[code]
        if given["rule"] == "argmax":
            given["param"] = None
    if "partial" in given:
        start, stop, partial = (given.pop(name) for name in ("start", "stop", "partial"))
        given["rollouts"] = (start, stop) if partial else None
    if spec.name == "prelogit_perturb":
        dot = torch.zeros(len(given["hidden"]) if isinstance(given["hidden"], Tensor) else 0)
        return getattr(ops, spec.name)(**given, dot=dot), dot
    return _as_tuple(getattr(ops, spec.name)(**given))


def _call(case: Case, garbage: int = 0xCD) -> tuple[Tensor, ...]:
    """The results of a case's call; AssertionError if it wrote where it must not."""
    spec, arguments = case.spec, case.arguments
    if case.form == "public":
        return public(spec, arguments)
    if case.form == "functional":
        return _as_tuple(spec.functional(*arguments.values()))
    like = next((x for x in arguments.values() if not isinstance(x, int)), None)
    if not isinstance(like, Tensor):
        raise TypeError("there is nothing to make outputs like")
    shapes = spec.allocate(*arguments.values())
    made = [guarded(x, garbage) for x in shapes]
    outputs = {name: x for name, (x, _) in zip(spec.outputs, made, strict=True)}
    for name in spec.accumulated:
        outputs[name].zero_()
    spec.out(*arguments.values(), **outputs)
    for name, (_, memory) in zip(spec.outputs, made, strict=True):
        edges = torch.cat((memory[:GUARD], memory[-GUARD:]))
        assert (edges == garbage).all(), f"it writes outside of {name}"
    return tuple(outputs.values())


def _refused(case: Case, error: Exception) -> None:
    """A refusal is one of the documented kinds; in public, one sentence without a file's name."""
    assert isinstance(error, REFUSALS), f"{type(error).__name__}: {error}"
    if case.form == "public":
        text = str(error)
        assert text and "\n" not in text, f"no sentence: {type(error).__name__}: {text[:400]}"
        ours = "DefaultCPUAllocator" not in text
        assert not (ours and re.search(r"\.(cpp|h|py):\d+", text)), f"names a file: {text}"
    assert not case.plain or case.arguments.get("check", True) or case.form == "public", (
        f"good arguments are refused: {error}"
    )


def run(case: Case) -> str:
    """ "judged" or "refused"; AssertionError with what is wrong."""
    spec, arguments = case.spec, case.arguments
    inputs = {
        name: (x, flat(x.detach()).clone())
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta
    }
    reference = case.form == "public" and case.r.chance(0.1)
    with _place(case.level, case.threads):
        try:
            with tta_ext.use_backend("reference") if reference else contextlib.nullcontext():
                results = _call(case)
        except AssertionError:
            raise
        except Exception as error:
            _refused(case, error)
            results = None
    for name, (x, before) in inputs.items():
        assert bits(flat(x.detach())) == bits(before), f"it changes {name}"
    if results is None:
        return "refused"
    assert len(results) == len(spec.results)
    for (name, dtype, _, _), x in zip(spec.results, results, strict=True):
        assert x.is_contiguous() and not x.requires_grad, f"{name} is {_short(x)}"
        assert dtype in (None, x.dtype), f"{name} is {x.dtype}"
    if any(x.is_meta for x in results):
        return "judged"
    if not reference:
        with _place(case.r.below(3), 3 - case.threads):
            again = _call(case, 0x31)
        for name, one, other in zip(spec.outputs, results, again, strict=True):
            assert bits(one) == bits(other), f"{name} has other bits the second time"
    if spec.name in MEANINGS:
        for fault in MEANINGS[spec.name](_meant(case, results[0].shape[:1]), *results):
            raise AssertionError(fault)
    return "judged"


def _meant(case: Case, rows: tuple[int, ...]) -> SimpleNamespace:
    """A call's arguments as the operator has them: what the public function takes in other forms
    as tensors and numbers.
    """
    given = dict(case.arguments)
    if case.form == "public":
        if given.get("rule") == rules.ARGMAX:
            given["param"] = 0.0
        if "partial" in given and not given["partial"]:
            given |= {"start": 0, "stop": given["weights"].shape[1]}
        for name in ("seed", "position"):
            if name in given and given[name] is None:
                given[name] = 0
        if "sequence" in given and given["sequence"] is None:
            given["sequence"] = torch.arange(*rows)
    tensors = {name for name, kind in case.kinds.items() if kind == "Tensor"}
    for name, x in given.items():
        if isinstance(x, Tensor):
            given[name] = x.detach()
        elif name in tensors:
            x = rng.as_seed(x) if name == "seed" and isinstance(x, int) else x
            real = isinstance(x, bool | float) or name in ("param", "capacity")
            given[name] = torch.tensor(
                float(x) if real else x, dtype=torch.float64 if real else None
            )
    return SimpleNamespace(**given)


def fault_of(seed: int, number: int, counts: collections.Counter[str]) -> str:
    """What is wrong with a case; "" if nothing is."""
    case = Case(seed, number)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[run(case)] += 1
    except AssertionError as error:
        return f"{case}\n  {error}"
    except Exception:
        return f"{case}\n  the fuzzer's own:\n{traceback.format_exc()}"
    return ""


# ---------------------------------------------------------------------------- children


def again(seed: int, number: int) -> str:
    return f"python tests/fuzz.py --seed {seed} --case {number}"


def child(seed: int, first: int, goes_on: Callable[[int], bool], journal: int) -> int:
    """Cases one after the other, each noted before it begins; how many had a fault."""
    faults, number, counts = 0, first, collections.Counter[str]()
    room = 8 << 30  # what asks for more is refused by torch, not by the machine
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    parent = os.getppid()
    while goes_on(number) and os.getppid() == parent:
        os.pwrite(journal, b"%20d" % number, 0)
        fault = fault_of(seed, number, counts)
        if fault:
            faults += 1
            print(f"FAULT {fault}\n  {again(seed, number)}", flush=True)
        number += 1
    print(f"{number - first} calls: {dict(counts)}, {faults} faults", flush=True)
    return faults


def fuzz(seed: int, goes_on: Callable[[int], bool], hang: float = HANG) -> int:
    """Children until ``goes_on`` says no; how many ended badly."""
    bad, number = 0, 0
    with tempfile.TemporaryFile() as file:
        while goes_on(number):
            os.pwrite(file.fileno(), b"%20d" % number, 0)
            pid = os.fork()
            if not pid:
                status = 70
                try:
                    status = min(child(seed, number, goes_on, file.fileno()), 1)
                finally:
                    os._exit(status)
            seen, since = -1, time.monotonic()
            while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
                number = int(os.pread(file.fileno(), 20, 0))
                if number != seen:
                    seen, since = number, time.monotonic()
                elif time.monotonic() - since > hang:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            code = os.waitstatus_to_exitcode(ended[1])
            number = int(os.pread(file.fileno(), 20, 0)) + 1
            bad += code != 0
            if code not in (0, 1):
                how = "did not end" if code == -signal.SIGKILL else f"ended its process ({code})"
                print(f"FAULT {Case(seed, number - 1)}\n  {how}\n  {again(seed, number - 1)}")
            else:
                break
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=60.0)
    length.add_argument("--minutes", type=float)
    length.add_argument("--cases", type=int, help="so many, whatever the time")
    length.add_argument("--case", type=int, help="this one alone, here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if reason := dispatch.native_status():
        sys.exit(f"there is no compiled library to fuzz: {reason}")
    if args.case is not None:
        print(fault_of(args.seed, args.case, counts := collections.Counter()) or dict(counts))
        return int(not counts)
    if args.cases is not None:
        return int(fuzz(args.seed, lambda number: number < args.cases) > 0)
    end = time.monotonic() + (args.seconds if args.minutes is None else 60 * args.minutes)
    return int(fuzz(args.seed, lambda _: time.monotonic() < end) > 0)


if __name__ == "__main__":
    sys.exit(main())
