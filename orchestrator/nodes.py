"""Which machines are broken, told from samples that are: pure, without Ray and clock.

A sample that kills its worker does so wherever it runs, while others pass. A machine whose driver,
GPU or disk is gone lets nothing pass: workers die there over different samples, or can't load, and
nothing finishes in between.

Of a model that does not load, too, nobody knows at first whether it or the machine is at fault,
and a broken machine says no within seconds, while others still read weights. So the workers that
are still loading are waited for: one that becomes ready speaks for the model.
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


class Loads:
    """What failed loads say of each model, and of the machines that they failed on."""

    def __init__(self) -> None:
        self._most: dict[str, int] = {}
        self._doubtful: dict[str, list[str]] = {}

    def failed(self, model: str, node: str) -> None:
        """It did not load there, and no worker of the model runs: start none beside those that
        are still loading."""
        self._doubtful.setdefault(model, []).append(node)

    def limit(self, model: str, workers: int) -> None:
        """It runs, and more workers of it than these do not load."""
        self._most[model] = workers

    def settled(self, model: str, node: str = "") -> list[str]:
        """It runs on `node`, or was given up. Returns the other machines, once for each load that
        failed there meanwhile."""
        return [other for other in self._doubtful.pop(model, ()) if other != node]

    def doubtful(self, model: str) -> bool:
        """Whether loads have failed since it last ran, if it ever did."""
        return model in self._doubtful

    def may_start(self, model: str, live: int) -> bool:
        """Whether to start one worker beside the `live` ones, loading or ready."""
        if live and self.doubtful(model):
            return False
        return live < self._most.get(model, live + 1)
