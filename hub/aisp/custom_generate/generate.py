"""A search by reward as ``custom_generate`` of transformers; all of it is in tta_ext."""

from typing import Any

from tta_ext.hf import aisp


def generate(model: Any, **arguments: Any) -> Any:
    """What ``help(tta_ext.hf.aisp)`` says, through the model's own ``generate``."""
    return model.generate(custom_generate=aisp, **arguments)
