"""A record of finished work that survives a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A JSONL file of finished batches that survives a kill.

    Args:
        path: the file; created if missing. A line cut off by a kill is removed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._done: dict[str, Any] = {}
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)
        for line in content[:end].splitlines():
            entry = json.loads(line)
            self._done[json.dumps(entry["key"], sort_keys=True)] = entry["value"]

    def get(self, key: dict[str, Any]) -> Any:
        """The value stored under a key, or None."""
        return self._done.get(json.dumps(key, sort_keys=True))

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Append an entry; on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done[json.dumps(key, sort_keys=True)] = value
