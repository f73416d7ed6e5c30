"""Which machines are broken, told from samples that are: pure, without Ray and clock.

A sample that kills its worker does so wherever it runs, while others pass. A machine whose driver,
GPU or disk is gone lets nothing pass: workers die there over different samples, or can't load, and
nothing finishes in between.
"""

from collections import defaultdict

DEATHS_IN_A_ROW = 3


class NodeHealth:
    """Deaths by machine since the last sample that was finished there."""

    def __init__(self) -> None:
        self._suspects: dict[str, set[str]] = defaultdict(set)
        self._loads = 0

    def died(self, node: str, unit_id: str | None) -> bool:
        """A worker died there, over this unit (None: it did not load). Whether that is enough.

        A machine that has no name is never enough.
        """
        self._loads += unit_id is None
        self._suspects[node].add(f"load {self._loads}" if unit_id is None else unit_id)
        return bool(node) and len(self._suspects[node]) >= DEATHS_IN_A_ROW

    def passed(self, node: str) -> None:
        """A sample was finished there."""
        self._suspects.pop(node, None)
