"""The version of tta_ext, which setup.py reads from here, and how its extras are installed."""

__version__ = "0.1.0"


def install(extra: str) -> str:
    """The command that an error names where a package of an extra is missing."""
    return f'pip install ".[{extra}]" in a checkout of tta_ext'
