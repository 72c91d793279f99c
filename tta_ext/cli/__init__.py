"""The ``tta`` command. Needs typer and rich: ``pip install 'tta-ext[cli]'``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``tta`` console script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"tta needs {error.name}; install it with: pip install 'tta-ext[cli]'")
    from tta_ext.cli.app import run

    sys.exit(run())
