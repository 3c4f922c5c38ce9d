"""Ranks decide together (law 4): what any of them wishes, all learn at the same moment, and as seldom as will do."""

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from toolkit.distributed import Ranks


class Agreement:
    """What any rank wishes after some piece of work, such as a step, all learn after the same piece.

    `wishes` maps a name, such as "stop", to a function that says whether this rank wants it now. Asking the others
    costs a reduction, so they are asked every k pieces; rank 0 chooses k so that it costs at most 0.5% of the time and
    is at most 1 s late.
    """

    COST, REACTION_S = 0.002, 1.0  # aimed below 0.5%: what is known is an average, of rank 0

    def __init__(self, ranks: Ranks, wishes: Mapping[str, Callable[[], bool]]) -> None:
        self.ranks, self.wishes = ranks, wishes
        self.done, self.next, self.asked, self.asked_s = 0, 1, 0, time.monotonic()

    def afresh(self) -> "Agreement":
        """The same wishes for another kind of work, whose pieces take another time."""
        return Agreement(self.ranks, self.wishes)

    def reached(self) -> frozenset[str]:
        """The wishes that all ranks now know of. To be called by every rank after every piece of work."""
        self.done += 1
        if self.done < self.next:
            return _NO_WISH
        wanted = [wish() for wish in self.wishes.values()]
        if self.ranks.world_size > 1:
            wanted = self._asked(wanted)
        return (
            frozenset(name for name, yes in zip(self.wishes, wanted, strict=True) if yes) if any(wanted) else _NO_WISH
        )

    def _asked(self, wanted: list[bool]) -> list[bool]:
        start_s, start_cpu_s = time.monotonic(), time.process_time()
        period = self._period(start_s) if self.ranks.leads else 0
        votes = torch.tensor([*wanted, period])
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        *agreed, period = votes.tolist()
        # In CPU time: to wait for a slow rank is no cost. Most take 200 us, but in one of five gloo's thread spins for
        # some milliseconds.
        self.cost_s += (time.process_time() - start_cpu_s - self.cost_s) / 8
        self.next, self.asked, self.asked_s = self.done + period, self.done, start_s
        return [bool(vote) for vote in agreed]

    cost_s = 5e-4

    def _period(self, now_s: float) -> int:
        """Pieces until the next question, from the measured time of a piece and of a question."""
        if self.asked == 0:  # no piece has been measured yet: what came before was something else
            return 1
        piece_s = max((now_s - self.asked_s) / max(1, self.done - self.asked), 1e-6)
        affordable = self.cost_s / (self.COST * piece_s)
        return max(1, min(round(affordable + 0.5), int(self.REACTION_S / piece_s)))


_NO_WISH: frozenset[str] = frozenset()
