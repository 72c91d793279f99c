"""How much time drafting may lose: the account that keeps ``"auto"`` from falling behind.

Whether drafts pay is learnt by drafting, which costs time where they do not. :class:`Budget` keeps
account of that time: each step's cost against what the plain loop would have taken to the same
tokens. A round is allowed only if its loss, should none of its draft tokens stand, is covered. So,
however acceptance turns out and as far as measured costs hold for the round ahead,

* all calls of one object together take at most 1 + SHARE times what the plain loop would take;
* one call loses at most SHARE of its time or, if that is more and earlier calls have left it over,
  ONCE of the time that it is expected to take; if the latest drafts paid, GAINED plain steps.
  (Without these, answers of a few dozen tokens could never be drafted.)

What drafts gain in a call, it may lose again. Where nothing but the limit can end an answer, the
share of (nearly) the whole call's time is there from the start. A call is expected to be as long as
the shortest of the latest ones.

**Plain time.** A plain step of n rows takes about ``F + g n``; rows that drafting has moved apart
are worth ``g`` for each token and ``F`` for each step that the slowest unfinished row has made: as
much as is surely saved if the plain loop goes on from here.
"""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """The account of one call.

    Args:
        kept: seconds left over by earlier calls; below 0 what they owe.
        paid: the latest drafts paid.

    Attributes:
        plain: seconds that the plain loop would have taken so far.
        lost: seconds taken beyond that; below 0 what was gained.
    """

    SHARE = 0.02
    ONCE = 0.025
    # Not all of it: the plain loop may become faster.
    LOAN = 0.9
    GAINED = 2.5

    def __init__(self, kept: float = 0.0, paid: bool = False) -> None:
        self.kept, self.paid = kept, paid
        self.plain = self.lost = 0.0

    def spare(self, ahead: float = 0.0, call: float = 0.0) -> float:
        """Seconds that the next round may lose.

        Args:
            ahead: plain seconds that this call is certain to need yet.
            call: plain seconds that it is expected to need in all.
        """
        own = self.SHARE * (self.plain + self.LOAN * ahead)
        if self.kept < 0.0:
            return own + self.kept - self.lost
        kept = self.kept if self.paid else min(self.kept, self.ONCE * call)
        return max(own, kept) - self.lost

    def add(self, plain: float, seconds: float) -> float:
        """Count a step.

        Args:
            plain: seconds that the plain loop takes for what the step gained.
            seconds: what the step took.

        Returns:
            Change of what this call will leave over.
        """
        self.plain += plain
        self.lost += seconds - plain
        return self.SHARE * plain - (seconds - plain)
