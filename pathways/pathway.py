"""A pathway: who may not read whom, as data.

Attention knockout (paper section 3, Eq. 2; Geva et al. 2023): at every layer of a window the
additive mask is minus infinity for (query in targets, key in sources), every other edge stays as
the causal mask has it. A query's own position is never blocked, so that no row of the softmax is
empty.
"""

import re
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from avflow.pathways.groups import group_names, members
from avflow.pathways.layout import Layout, LayoutKind, OptionSpan, Positions

Direction = Literal["one_way", "both_ways", "across"]
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_ARROWS: dict[Direction, str] = {"one_way": "-/->", "both_ways": "<-/->", "across": "-/->"}


class PathwayError(ValueError):
    """A pathway's definition is wrong: what, and which values are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pathway:
    """Targets (queries) may not read sources (keys).

    `one_way`: targets don't read sources. `both_ways`: nor sources targets. `across`: sources and
    targets are the same groups, and no member (frame, chunk, candidate) reads another member.
    `figures` are the paper's figures that show it; empty for a person's own.
    """

    name: str
    layout: LayoutKind
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    direction: Direction = "one_way"
    figures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise PathwayError(
                f"pathway name {self.name!r} must be a plain identifier (a-z, 0-9, _)"
            )
        known = group_names(self.layout)
        for group in self.sources + self.targets:
            if group not in known:
                raise PathwayError(
                    f"pathway {self.name}: {self.layout} prompts have no group {group!r}; "
                    f"known: {', '.join(known)}"
                )
        if not self.sources or not self.targets:
            raise PathwayError(f"pathway {self.name}: give at least one source and one target")
        if self.direction == "across" and self.sources != self.targets:
            raise PathwayError(f"pathway {self.name}: 'across' needs the same sources and targets")

    @property
    def label(self) -> str:
        """As figures print it: `video -/-> question`, `cross-frame`."""
        if self.direction == "across":
            return self.name.replace("_", "-")
        return f"{'+'.join(self.sources)} {_ARROWS[self.direction]} {'+'.join(self.targets)}"


def blocked_segments(
    layout: Layout, pathway: Pathway, option_span: OptionSpan = "letter"
) -> NDArray[np.bool_]:
    """bool [S, S], True where queries of segment row may not read keys of segment column.

    Given before causality: of its edges only those that the causal mask allows are lost. On the
    diagonal, True closes a segment's positions to each other, never a position to itself; only a
    person's own pathway, whose sources and targets overlap, has it. Raises LayoutError if a group
    is not found.
    """
    n = len(layout.segments)
    blocked = np.zeros((n, n), dtype=np.bool_)
    if pathway.direction == "across":
        groups = [m for name in pathway.sources for m in members(layout, name, option_span)]
        for one, other in permutations(groups, 2):
            blocked[np.ix_(one, other)] = True
        np.fill_diagonal(blocked, False)  # a segment in two members still reads itself
    else:
        sources = _segments(layout, pathway.sources, option_span)
        targets = _segments(layout, pathway.targets, option_span)
        blocked[np.ix_(targets, sources)] = True
        if pathway.direction == "both_ways":
            blocked[np.ix_(sources, targets)] = True
    return blocked


def _segments(layout: Layout, groups: tuple[str, ...], span: OptionSpan) -> list[int]:
    return sorted({i for name in groups for m in members(layout, name, span) for i in m})


def blocked_keys(layout: Layout, blocked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """int64 [n_tokens]: how many keys each query loses that the causal mask allowed it."""
    lengths = np.array([s.stop - s.start for s in layout.segments])
    before = (np.tril(blocked, -1) * lengths).sum(axis=1)
    inside = np.concatenate([np.arange(length) for length in lengths])  # earlier, same segment
    segment = layout.segment_of_position
    return np.asarray(before[segment] + inside * np.diag(blocked)[segment], dtype=np.int64)


def causal_blocked_edges(layout: Layout, blocked: NDArray[np.bool_]) -> int:
    """How many (query, key) edges a layer loses: blocked ones that the causal mask allowed."""
    return int(blocked_keys(layout, blocked).sum())


def target_positions(layout: Layout, blocked: NDArray[np.bool_]) -> Positions:
    """int64, ascending: the queries that lose a key (T, as far as causality lets it matter)."""
    return np.flatnonzero(blocked_keys(layout, blocked))


def first_target(layout: Layout, blocked: NDArray[np.bool_]) -> int | None:
    """The first position whose attention changes (s = min T); None if no causal edge is blocked."""
    targets = target_positions(layout, blocked)
    return int(targets[0]) if targets.size else None
