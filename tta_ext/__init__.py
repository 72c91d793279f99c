"""Test-time alignment of frozen language models while they decode, on native kernels.

Importing registers the operators and loads nothing else: no compiler, no CUDA, no transformers, no
triton. Everything below is imported when it is first used. The ``tta`` command registers them with
the first command that runs, so that its help need not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from tta_ext._version import __version__


def register() -> None:
    """Import torch, and register the operators; importing tta_ext has done it already."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        # `python -m tta_ext.env` describes installations whose torch is missing, so it must start.
        if error.name == "torch" and "tta_ext.env" in sys.orig_argv:
            return
        raise ImportError(
            "tta_ext needs torch 2.10 or newer; mend it with: pip install torch"
        ) from error
    importlib.import_module("tta_ext.dispatch")
    importlib.import_module("tta_ext.schemas")


# The program is the command, as a script or as `python -m tta_ext.cli`.
_PROGRAM = os.path.basename(sys.argv[0]) if sys.argv else ""
if "tta_ext.cli" not in sys.orig_argv and _PROGRAM not in ("tta", "tta.exe"):
    register()

if TYPE_CHECKING:
    from tta_ext import decoding, hf, ops, rng, rules
    from tta_ext.decoding import (
        AdaptiveImportanceSampling,
        BestOfN,
        ChunkBeamSearch,
        KnapsackDeferral,
        ReControlSearch,
        RewardGuidedSearch,
    )
    from tta_ext.demo.pair import demo_pair
    from tta_ext.dispatch import use_backend
    from tta_ext.env import env_report
    from tta_ext.rules import Rule

__all__ = [
    "AdaptiveImportanceSampling",
    "BestOfN",
    "ChunkBeamSearch",
    "KnapsackDeferral",
    "ReControlSearch",
    "RewardGuidedSearch",
    "Rule",
    "__version__",
    "decoding",
    "demo_pair",
    "env_report",
    "hf",
    "ops",
    "rng",
    "rules",
    "use_backend",
]

_MODULES = frozenset({"decoding", "hf", "ops", "rng", "rules"})
_HOMES = {
    "AdaptiveImportanceSampling": "tta_ext.decoding",
    "BestOfN": "tta_ext.decoding",
    "ChunkBeamSearch": "tta_ext.decoding",
    "KnapsackDeferral": "tta_ext.decoding",
    "ReControlSearch": "tta_ext.decoding",
    "RewardGuidedSearch": "tta_ext.decoding",
    "Rule": "tta_ext.rules",
    "demo_pair": "tta_ext.demo.pair",
    "env_report": "tta_ext.env",
    "use_backend": "tta_ext.dispatch",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tta_ext.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module 'tta_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Not what this file imports for itself.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
