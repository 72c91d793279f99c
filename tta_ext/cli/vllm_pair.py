"""``tta vllm-pair``: two models as one for vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tta_ext.cli.common import console, quiet_transformers
from tta_ext.cli.config import Config

__all__ = ["vllm_pair"]


def vllm_pair(
    base: Annotated[str, typer.Argument(help="Base model: folder with safetensors or hub name.")],
    proxy: Annotated[str, typer.Argument(help="Proxy model, likewise.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    config: Config = None,
) -> None:
    """Write the small folder that makes two models one for vLLM; weights are linked, not copied."""
    from tta_ext.engines.vllm.pair import serve_command, write_pair

    quiet_transformers()
    written = write_pair(base, proxy, out)
    console.print(f"written: {written}", soft_wrap=True)
    console.print(f"serve it: {shlex.join(serve_command(written))}", soft_wrap=True)
