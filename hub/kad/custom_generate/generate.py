"""Deferral between two models as ``custom_generate`` of transformers; all of it is in tta_ext."""

from typing import Any

from tta_ext.hf import kad


def generate(model: Any, **arguments: Any) -> Any:
    """What ``help(tta_ext.hf.kad)`` says, through the model's own ``generate``."""
    return model.generate(custom_generate=kad, **arguments)
