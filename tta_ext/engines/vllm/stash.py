"""Where a pair's model leaves the proxy's logits for whoever draws, in the same process."""

from __future__ import annotations

from torch import Tensor

from tta_ext.engines.rows import Group

__all__ = ["Stash", "stash"]


class Stash:
    """The proxy's logits of the latest rows.

    Attributes:
        logits: ``[rows, V]``, row for row those of the base.
    """

    logits: Tensor | None = None

    def of(self, rows: int, group: Group) -> Tensor:
        """A group's.

        Raises:
            ValueError: nothing is there of a step with so many rows.
        """
        if self.logits is None or len(self.logits) != rows:
            found = "none" if self.logits is None else str(len(self.logits))
            raise ValueError(f"the proxy has left {found} rows of logits, expected {rows}")
        return self.logits.index_select(0, group.index)


stash = Stash()
