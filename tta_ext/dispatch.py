"""Which backend runs an operator: loading of the native library, fallback, forced backends."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tta_ext import schemas
from tta_ext.schemas import OpSpec, below_autograd

__all__ = ["BACKENDS", "invoke", "native_status", "serves", "use_backend"]

COMPILED = ("cpu", "cuda")
BACKENDS = ("reference", *COMPILED, "triton")
# The first Triton whose language has what the kernels use.
TRITON_VERSION = (3, 6)
# Torch's names of the devices that Triton compiles for; AMD's GPUs go by "cuda".
TRITON_DEVICES = ("cuda", "xpu")
# Operators that the reference serves in Triton's place.
NOT_IN_TRITON = frozenset(("greedy_knapsack",))

# A kernel's refusal: function, file and line of the check, and what it says (csrc/bind). Bad values
# are marked, so that callers of torch.ops can tell them from bad arguments.
_REFUSAL = re.compile(r"(\w+), [^\n]*?[/\\]bind[/\\]\w+\.\w+:\d+, (?:invalid row: )?([^\n]*)")
# The one that is no refusal: a CUDA call failed.
_FAILURE = "check_cuda"

# The backend forced by use_backend, for the whole process; None lets the dispatcher choose. And the
# blocks that are open, by the order of their opening: threads may leave theirs in any order.
_forced: str | None = None
_blocks: list[use_backend] = []
_blocks_lock = threading.Lock()

# Of each library that has been tried, by device: "" = usable, other text = why not.
_status: dict[str, str] = {}
# Devices whose loaded library is of another version: its kernels are registered and cannot be taken
# back, so they must be walked around.
_stale: set[str] = set()


def native_status(device: str = "cpu") -> str:
    """Empty if a device's native library is loaded, otherwise why not; loads it if need be."""
    if device not in _status:
        _status[device] = _load(device)
    return _status[device]


def _load(device: str) -> str:
    from tta_ext import build

    result = build.load(device)
    if not result.loaded:
        return result.reason or "no reason given"
    name = "native_version" if device == "cpu" else f"{device}_version"
    try:
        version = int(getattr(torch.ops.tta_ext, name)())
    except (RuntimeError, NotImplementedError):  # it loads, and registers nothing of ours
        version = None
    return _check_version(version, str(result.path), device.upper())


def _check_version(version: int | None, path: str, device: str) -> str:
    """Why a loaded library must not be used; empty if it may."""
    if version == schemas.NATIVE_VERSION:
        return ""
    made_for = "something else" if version is None else f"operator version {version}"
    reason = (
        f"{path} was built for {made_for}, this is version {schemas.NATIVE_VERSION}; "
        "reinstall tta_ext to mend it"
    )
    warnings.warn(f"native {device} operators are off: {reason}", stacklevel=3)
    _stale.add(device.lower())
    return reason


def has_kernel(name: str, device: str) -> bool:
    """Whether a compiled kernel of the operator is registered for "cpu" or "cuda"."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"tta_ext::{name}.out", device.upper())
    )


def serves(name: str, device: str = "cpu") -> tuple[str, str]:
    """Which backend runs an operator on a device, and why not a faster one (empty if none is)."""
    reason = native_status(device) if device in COMPILED else ""
    if not reason:
        if has_kernel(name, device):
            return device, ""
        reason = f"no compiled {device} kernel of {name} is loaded"
    return ("triton" if _triton_serves(name, device) else "reference"), reason


@functools.cache
def triton_status(device: str) -> str:
    """Empty if the Triton kernels run on a type of device, otherwise why not."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "triton is not installed; mend it with: pip install triton"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < TRITON_VERSION:
        wanted = ".".join(map(str, TRITON_VERSION))
        return f"triton is {triton.__version__}, expected {wanted} or newer; upgrade torch with it"
    if triton.knobs.runtime.interpret:
        return ""
    if device not in TRITON_DEVICES:
        return "Triton compiles for GPUs; under TRITON_INTERPRET=1 the CPU runs its kernels, slowly"
    return "" if getattr(torch, device).is_available() else f"torch finds no {device} device"


def triton_kernel(name: str) -> Callable[..., None] | None:
    """An operator in Triton, in the ``X.out`` form; None where the reference serves instead."""
    if name in NOT_IN_TRITON:
        return None
    kernel: Callable[..., None] = getattr(importlib.import_module("tta_ext.backends.triton"), name)
    return kernel


def _triton_serves(name: str, device: str) -> bool:
    """Whether an operator without a compiled kernel runs in Triton, unasked: on GPUs it does."""
    if device not in TRITON_DEVICES or triton_status(device):
        return False
    return triton_kernel(name) is not None


def reference(name: str) -> Callable[..., Any]:
    """The reference function of an operator."""
    module = importlib.import_module("tta_ext.backends.reference")
    return getattr(module, name)


def run_without_kernel(spec: OpSpec, args: Sequence[Any], outputs: dict[str, Tensor]) -> None:
    """``X.out`` where no compiled kernel is registered yet: load one, or run the reference."""
    schemas.refuse_foreign(spec, args, outputs)
    device = next(iter(outputs.values())).device.type
    untried = device in COMPILED and device not in _status
    if untried and serves(spec.name, device)[0] == device:
        spec.out(*args, **outputs)
        return
    _run(_triton_serves(spec.name, device), spec, args, [outputs[name] for name in spec.outputs])


schemas.fallback = run_without_kernel


def _run(in_triton: bool, spec: OpSpec, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """Run an operator in Triton, where there is a kernel of it, or by the reference."""
    schemas.refuse_overlap(spec, args, outputs)
    kernel = triton_kernel(spec.name) if in_triton else None
    if kernel is None:
        _run_reference(spec, args, outputs)
        return
    torch._C._increment_version(outputs)
    kernel(*args, **dict(zip(spec.outputs, outputs, strict=True)))


def _run_reference(spec: OpSpec, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        results = reference(spec.name)(*args)
        values = results if isinstance(results, tuple) else (results,)
        for name, value, output in zip(spec.outputs, values, outputs, strict=True):
            (output.add_ if name in spec.accumulated else output.copy_)(value)


def _forces_other(op: OpSpec, device: torch.device) -> bool:
    """Whether the reference or Triton runs in place of a compiled kernel.

    Raises where a forced kernel cannot run.
    """
    if _forced == "reference" or (_forced is None and device.type in _stale):
        return True
    if _forced == "triton":
        if reason := triton_status(device.type):
            raise RuntimeError(
                f"backend 'triton' is forced but the tensors are on {device}: {reason}"
            )
        return True
    if _forced is not None and device.type != _forced:
        raise RuntimeError(
            f"backend {_forced!r} is forced but the tensors are on {device}; move them to "
            f"{_forced} or leave use_backend"
        )
    if _forced == "cuda" and not has_kernel(op.name, "cuda"):
        raise RuntimeError(
            f"backend {_forced!r} has no kernel of {op.name}; use_backend('reference') has one"
        )
    return False


def translated(error: RuntimeError) -> Exception:
    """A kernel's complaint about its arguments as ``ValueError``, anything else as it is."""
    found = _REFUSAL.match(str(error))
    if found is None:
        return error
    return (RuntimeError if found[1] == _FAILURE else ValueError)(found[2])


def _remade(args: Sequence[Any]) -> list[Any]:
    """Arguments for a call under a fake or another tensor mode, which must have made what it sees.

    The numbers that tta_ext.ops keeps as tensors were made before.
    """
    with torch.utils._python_dispatch._disable_current_modes():
        kept = {
            i: (x.tolist(), x.dtype, x.device)
            for i, x in enumerate(args)
            if type(x) is Tensor and x.dim() < 2 and not x.is_meta and x.dtype in _NUMBERS
        }
    made = {i: torch.tensor(v, dtype=t, device=d) for i, (v, t, d) in kept.items()}
    return [made.get(i, x) for i, x in enumerate(args)]


_NUMBERS = (torch.int64, torch.float64)
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def _traced(op: OpSpec, args: Sequence[Any], out: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """An operator where torch looks on: as one call without effects, if nobody gave an output."""
    if out is None:
        result = op.functional(*args)
        return (result,) if len(op.outputs) == 1 else result
    op.out(*args, **dict(zip(op.outputs, out)))  # noqa: B905
    return out


def kernel_is_next() -> bool:
    """Whether a call on CPU tensors goes to the compiled kernel, or is refused by the fallback."""
    return (
        not torch.compiler.is_compiling()
        and _forced is None
        and _status.get("cpu") == ""
        and not _stale
        and not _modes()
    )


Recheck = Callable[[OpSpec, Sequence[Any], "Sequence[Tensor] | None"], None]


def invoke(
    op: OpSpec,
    args: Sequence[Any],
    out: Sequence[Tensor] | None,
    recheck: Recheck | None = None,
) -> Sequence[Tensor]:
    """Run an operator on validated arguments, into ``out`` if it is given.

    ``recheck``: where the kernel is next, what it checks itself may be left to it; of a call that
    it refuses this says why.
    """
    if recheck is None and torch.compiler.is_compiling():
        return _traced(op, args, out)
    # A parameter, a number, or a tensor of somebody's mode.
    if recheck is None and type(args[0]) is not Tensor:
        mode = getattr(args[0], "fake_mode", None)
        if mode is not None or _modes():
            with mode if mode is not None and not _modes() else contextlib.nullcontext():
                return _traced(op, _remade(args), out)
    given = out
    if out is None:
        out = op.allocate(*args)
    else:
        torch._C._increment_version(out)
    if (_forced is not None or _stale) and _forces_other(op, device := out[0].device):
        unasked = _forced is None and _triton_serves(op.name, device.type)
        _run(_forced == "triton" or unasked, op, args, out)
        return out
    names = op.outputs
    try:
        guard = _guards.pop()
    except IndexError:
        guard = below_autograd()
    try:
        with guard:
            if len(names) == 2:  # decoding steps: spares the zip
                op.run(*args, **{names[0]: out[0], names[1]: out[1]})
            else:
                op.run(*args, **dict(zip(names, out)))  # noqa: B905
    except (RuntimeError, TypeError, ValueError) as error:
        if recheck is not None:
            recheck(op, args, given)
        if not isinstance(error, RuntimeError):
            raise
        if given is None and _transforms() is not None:
            # torch.vmap and its like do not know of outputs that are given.
            return _traced(op, args, None)
        raise translated(error) from None
    finally:
        _guards.append(guard)
    return out


# Making one costs as much as using it, so they are kept; no two calls have the same at a time.
_guards: list[Any] = []


def unavailable(backend: str) -> str:
    """Why a backend cannot be forced; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "triton":
        kinds = [triton_status(device) for device in TRITON_DEVICES]
        return "" if "" in kinds else kinds[0]
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device; install a CUDA build of torch on a machine with one"
    return native_status(backend)


class use_backend:
    """Make all public operators of this process use one backend, inside a ``with`` block.

    Args:
        backend: ``"reference"`` (plain PyTorch, any device), ``"cpu"`` or ``"cuda"``
            (compiled), or ``"triton"`` (GPUs; compiled by Triton; ``greedy_knapsack`` alone is
            the reference's).

    Raises:
        ValueError: not a backend.
        RuntimeError: the backend cannot run here; the message says why and what would mend it.

    The choice holds for the process, not for the thread, and does not reach into graphs that
    ``torch.compile`` has already made. ``torch.ops.tta_ext.*`` are not affected.

    Example:
        >>> with tta_ext.use_backend("reference"):
        ...     mask = tta_ext.ops.deferral_mask(logits, rule="threshold", param=0.3)
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
        self._backend = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._backend!r})"

    def __enter__(self) -> use_backend:
        global _forced
        reason = unavailable(self._backend)
        if reason:
            raise RuntimeError(f"backend {self._backend!r} is not available: {reason}")
        with _blocks_lock:
            _blocks.append(self)
            _forced = self._backend
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        with _blocks_lock:
            last = max(i for i, block in enumerate(_blocks) if block is self)
            del _blocks[last]
            _forced = _blocks[-1]._backend if _blocks else None
