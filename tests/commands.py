"""The ``tta`` command, called in this process."""

from __future__ import annotations

import pytest

from tta_ext.cli.app import run


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    status = run(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err
