"""Results as tables of pandas, which is loaded when the first is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from tta_ext._version import install

__all__ = ["to_pandas"]


def to_pandas(rows: Iterable[Any]) -> Any:
    """A ``pandas.DataFrame`` with a row for each of some records.

    Args:
        rows: dicts, objects with ``as_dict()`` (rows of :func:`tta_ext.evaluation.evaluate` and
            :func:`tta_ext.tasks.run`, traces, iterations) or other dataclass instances.

    Raises:
        ImportError: pandas is missing; the message has the command.

    Example:
        >>> to_pandas(evaluate(models, task)).set_index(["rule", "mode"])["exact"]
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise ImportError(f"tables need pandas: {install('pandas')}") from None
    return pandas.DataFrame([_record(row) for row in rows])


def _record(row: Any) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    found: dict[str, Any] = row.as_dict() if hasattr(row, "as_dict") else asdict(row)
    return found
