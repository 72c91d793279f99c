"""The pair of models that ships with the package; its README says what it has read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ASSETS", "DemoPair", "demo_pair"]

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"


class DemoPair(NamedTuple):
    """Two causal language models over one vocabulary, and its tokenizer."""

    base: Any
    proxy: Any
    tokenizer: Any


def demo_pair() -> DemoPair:
    """Load the small pair that ships with the package: 1.3M and 0.4M parameters, float32, CPU.

    The base can do each step of a word problem but mostly answers at once, and wrongly; the proxy
    works step by step in the answer format, and cannot compute.
    No network, no other files; a fraction of a second.

    Returns:
        Base, proxy and tokenizer, as :class:`tta_ext.KnapsackDeferral` takes them.

    Raises:
        ImportError: transformers is missing.

    Example:
        >>> kad = tta_ext.KnapsackDeferral(*tta_ext.demo_pair(), rule="threshold", param=0.4)
        >>> problem = "Tom has 47 apples. Tom buys 12 more. Tom sells 20. How many apples?"
        >>> kad.generate(f"Q: {problem}\\nA:", seed=0).text
        ' 47+12=59; 59-20=39; #### 39'
    """
    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer

    base, proxy = (load_model(str(ASSETS / name)) for name in ("base", "proxy"))
    return DemoPair(base, proxy, load_tokenizer(str(ASSETS / "base")))
