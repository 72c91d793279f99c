"""What vLLM's processes run when they start (entry-point group ``vllm.general_plugins``)."""

from __future__ import annotations

__all__ = ["ARCHITECTURE", "register"]

ARCHITECTURE = "TTAKadForCausalLM"


def register() -> None:
    """Make the pair known as an architecture; nothing is imported before a model asks for it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"tta_ext.engines.vllm.model:{ARCHITECTURE}")
