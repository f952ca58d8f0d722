"""Which of the nodes that can take a task gets it.

Nodes are compared by, in this order: repeated recent failures of the service there, tasks of the service, all
tasks, and the order in which the nodes joined.  Placement preferences come before that: they divide the nodes into a
tree of branches (by a label's values), and each task goes to the branch with the fewest tasks of the service.

One ``Spread`` places tasks that ask for the same.  Each choice must be entered into the accounting before the next.

Source: swarmkit, manager/scheduler/{scheduler,decision_tree,nodeset}.go.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence

from skep.manager.scheduler.accounting import Account, Accounting
from skep.manager.scheduler.filters import filters_for
from skep.manager.scheduler.requirements import Requirements
from skep.model.constraints import label_of

MAX_FAILURES = 5
"""From this many recent failures on, a node is only taken when no other will do."""


class Spread:
    """Chooses nodes for tasks with the same requirements, one after another."""

    def __init__(self, wish: Requirements, accounting: Accounting, now: float) -> None:
        """``now``: on the clock that failures were noted with."""
        self._wish = wish
        self._accounting = accounting
        self._filters = filters_for(wish)
        failures = accounting.failures(wish, now)
        self._failing = {id: count for id, count in failures.items() if count >= MAX_FAILURES}
        levels = [over for over in wish.spread_over if _is_label(over)]
        if levels:
            self._root: _Branch | Iterator[Account] = self._tree(list(accounting.accounts.values()), levels)
        else:
            self._root = self._from_least_loaded()

    def next(self) -> Account | None:
        """The node for the next task; None when no node will do any more."""
        return next(self._root, None)

    def _tree(self, accounts: list[Account], levels: Sequence[str]) -> "_Branch":
        copies = self._accounting.copies(self._wish.service_id)
        tasks = sum(copies[account.node.id] for account in accounts)
        if not levels:
            return _Branch(tasks, choices=self._among(accounts))
        parts: dict[str, list[Account]] = {}
        for account in accounts:
            parts.setdefault(label_of(account.node, levels[0]) or "", []).append(account)
        children = [self._tree(parts[value], levels[1:]) for value in sorted(parts)]
        return _Branch(tasks, children=children)

    def _from_least_loaded(self) -> Iterator[Account]:
        """Nodes without a task of the service first, as few of them looked at as possible."""
        copies = self._accounting.copies(self._wish.service_id)
        taken = [
            account
            for id in {**copies, **self._failing}
            if (account := self._accounting.accounts.get(id)) is not None
        ]
        for account in self._accounting.in_order_of_load():
            id = account.node.id
            if id not in self._failing and not self._copies(account) and self._passes(account):
                taken.append(account)
                yield account
        yield from self._among(taken)

    def _among(self, accounts: Iterable[Account]) -> Iterator[Account]:
        heap = [(*self._rank(account), account.order, account) for account in accounts]
        heapq.heapify(heap)
        while heap:
            account = heap[0][-1]
            if self._passes(account):
                yield account
                heapq.heapreplace(heap, (*self._rank(account), account.order, account))
            else:
                heapq.heappop(heap)

    def _rank(self, account: Account) -> tuple[int, int, int]:
        return self._failing.get(account.node.id, 0), self._copies(account), account.active

    def _copies(self, account: Account) -> int:
        return self._accounting.copies(self._wish.service_id)[account.node.id]

    def _passes(self, account: Account) -> bool:
        copies = self._copies(account)
        return all(filter.passes(self._wish, account, copies) for filter in self._filters)


class _Branch:
    """A part of the nodes: divided further, or chosen from."""

    def __init__(
        self, tasks: int, *, children: Iterable["_Branch"] = (), choices: Iterator[Account] | None = None
    ) -> None:
        self.tasks = tasks
        self._open = list(children)
        self._choices = choices or iter(())

    def __iter__(self) -> "_Branch":
        return self

    def __next__(self) -> Account:
        while self._open:
            fewest = min(self._open, key=lambda branch: branch.tasks)
            account = next(fewest, None)
            if account is not None:
                self.tasks += 1
                return account
            self._open.remove(fewest)
        account = next(self._choices)
        self.tasks += 1
        return account


def _is_label(descriptor: str) -> bool:
    return descriptor.lower().startswith(("node.labels.", "engine.labels."))
