"""The ``tta`` command. Needs typer, rich, scipy and PyYAML, the extra ``cli``."""

from __future__ import annotations

import sys

from tta_ext._version import install

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``tta`` console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A character that the terminal's encoding lacks must not end a run.
            stream.reconfigure(errors="backslashreplace")
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"tta needs {error.name}; mend it with: {install('cli')}")
    from tta_ext.cli.app import run

    sys.exit(run())
