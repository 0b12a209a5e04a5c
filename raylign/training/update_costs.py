"""What updates cost, as ledger entries of the first worker: one `policy_update` for the updates between two records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self

from raylign.cost.flops import Work, pair_work
from raylign.cost.ledger import Entry, Ledger
from raylign.types import TokenizedPair


class UpdateCosts:
    """Opens an entry at the first update and closes it when told; closes it as well when the block around it ends.

    Args:
        ledger: None on all workers but the first, whose entries stand for all of them, and when nobody keeps one.
        devices: that all workers hold together, by kind.
        flops: of the forward and backward of some work, see `raylign.cost.flops`.
        is_shared: both answers of a pair share one computation of the prompt (layout "shared").
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        *,
        devices: Mapping[str, float] | None = None,
        flops: Callable[[Work], int] = lambda work: 0,
        is_shared: bool = True,
    ) -> None:
        self._ledger = ledger
        self._devices = devices or {}
        self._flops = flops
        self._is_shared = is_shared
        self._open = ExitStack()
        self._entry: Entry | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entry = None
        self._open.__exit__(kind, error, traceback)

    def begin(self) -> None:
        """The next update starts; goes on with the open entry when there is one."""
        if self._ledger is not None and self._entry is None:
            self._entry = self._open.enter_context(self._ledger.measure("policy_update", devices=self._devices))

    def count(self, pairs: Sequence[TokenizedPair]) -> None:
        """Forward and backward of an update over these pairs, on all workers together."""
        if self._entry is not None:
            lengths = ((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
            work = sum((pair_work(*pair, is_shared=self._is_shared) for pair in lengths), Work())
            self._entry.add(
                num_items=len(pairs),
                forward_tokens=work.tokens,
                backward_tokens=work.tokens,
                flops=self._flops(work),
            )

    def nested(self, phase: str) -> AbstractContextManager[Any]:
        """An entry for a part of an update that is not the update of the policy."""
        return nullcontext() if self._ledger is None else self._ledger.measure(phase, devices=self._devices)

    def end(self) -> None:
        """Close the entry."""
        self._entry = None
        self._open.close()
