"""What the undisturbed pass shows: attention by group, attention maps, norms and sinks.

Paper section 3 and appendix B (Fig. 1, 2, 7). There is no pass of its own: the probes watch the
baseline that a sample's every number starts from, and change no bit of it. The residual stream of a
layer is its input. Queries and keys are looked at as the layer's own attention gets them, through
transformers' AttentionInterface, set for the text decoder alone and for the layers asked for; N x N
weights never exist.

A sink is a token whose largest activation, over the token's root mean square, is at least
`SINK_PEAK` of what a token with a single non-zero dimension would have, sqrt(D): the RMS-normed
criterion of sink studies (25 at D = 3584), with no dimension named beforehand and at any width.
And its norm is at least `SINK_NORM` times the layer's median, since sinks stand out by it, too.

Shapes: N prompt tokens, D hidden size, H heads, G key/value heads, g = H // G, d head size, c
queries of a piece, W bin width, B bins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.workers.engine.interface import attending, attention_function
from avflow.workers.failing import failure, ruins_worker
from avflow.workers.models.base import Decoder
from avflow.workers.protocol import ProbeName, ProbeSpec, UnitFailure

NAME = "avflow_probed"
MAX_BINS = 128
MAP_SCORE_BYTES = 2**28
SINK_PEAK = 0.4
SINK_NORM = 3.0
MAX_SINKS = 64  # a layer, the largest norms first; their number is recorded whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """A value of the long table; "" and -1 where a column says nothing (see ProbeDone)."""

    layer: int
    value: float
    group: str = ""
    position: int = -1
    key: int = -1
    width: int = -1
    dimension: int = -1


# -- groups ----------------------------------------------------------------------------------


def probed_groups(layout: Layout) -> dict[str, NDArray[np.int64]]:
    """Positions of each group that the prompt has (groups may overlap), then, by kind of segment,
    of what lies in none: all attention is accounted for."""
    groups = {}
    for name in group_names(layout.kind):
        try:
            groups[name] = group_positions(layout, name)
        except LayoutError:  # empty here, or (candidates) not defined for the sample
            continue
    held = np.zeros(layout.n_tokens, dtype=np.bool_)
    held[np.concatenate(list(groups.values()))] = True
    kinds = np.array([segment.kind for segment in layout.segments])[layout.segment_of_position]
    for kind in dict.fromkeys(kinds[~held].tolist()):
        groups[kind] = np.flatnonzero(~held & (kinds == kind))
    return groups


def group_of_position(layout: Layout) -> list[str]:
    """One group a position: the first, in the groups' order, that holds it."""
    names = [""] * layout.n_tokens
    for group, positions in reversed(probed_groups(layout).items()):
        for position in positions.tolist():
            names[position] = group
    return names


class _Groups:
    """A prompt's groups, found once a sample, and when a probe first asks."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    @cached_property
    def positions(self) -> dict[str, NDArray[np.int64]]:
        return probed_groups(self._layout)

    @cached_property
    def names(self) -> list[str]:
        return group_of_position(self._layout)


# -- the probes ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What a layer's attention gets: query [H, N, d] and key [G, N, d], rotated."""

    query: Tensor
    key: Tensor
    scaling: float


_Seen = TypeVar("_Seen", Tensor, Attended)  # a layer's input [N, D], or its attention
_Look = Callable[[ProbeSpec, _Groups, int, _Seen], Iterator[ProbeRow]]


def _last_attention(
    _spec: ProbeSpec, groups: _Groups, layer: int, seen: Attended
) -> Iterator[ProbeRow]:
    weights = mean_attention(seen.query[:, -1:], seen.key, seen.scaling)[0].cpu().numpy()
    for group, positions in groups.positions.items():
        yield ProbeRow(layer=layer, group=group, value=float(weights[positions].sum()))


def _attention_map(
    _spec: ProbeSpec, _groups: _Groups, layer: int, seen: Attended
) -> Iterator[ProbeRow]:
    pooled, width = pooled_map(seen.query, seen.key, seen.scaling)
    for q, row in enumerate(pooled.tolist()):
        for k, value in enumerate(row[: q + 1]):
            yield ProbeRow(layer=layer, value=value, position=q * width, key=k * width, width=width)


def _norms(_spec: ProbeSpec, groups: _Groups, layer: int, hidden: Tensor) -> Iterator[ProbeRow]:
    norms = _exact(hidden).norm(dim=-1).double().tolist()
    for position, (group, norm) in enumerate(zip(groups.names, norms, strict=True)):
        yield ProbeRow(layer=layer, group=group, position=position, value=norm)


def _sinks(spec: ProbeSpec, groups: _Groups, layer: int, hidden: Tensor) -> Iterator[ProbeRow]:
    exact = _exact(hidden)
    sinks = find_sinks(exact)
    yield ProbeRow(layer=layer, value=float(len(sinks)))
    for position in sinks[:MAX_SINKS]:
        size = min(spec.top_dimensions, exact.shape[1])
        top = exact[position].abs().topk(size)
        values = top.values.double().tolist()
        for dimension, value in zip(top.indices.tolist(), values, strict=True):
            yield ProbeRow(
                layer=layer,
                group=groups.names[position],
                position=position,
                dimension=dimension,
                value=value,
            )


_OF_INPUT: Mapping[ProbeName, _Look[Tensor]] = {"norms": _norms, "sinks": _sinks}
_OF_ATTENTION: Mapping[ProbeName, _Look[Attended]] = {
    "last_attention": _last_attention,
    "attention_map": _attention_map,
}


# -- watching the pass ------------------------------------------------------------------------


class Probes:
    """A sample's probes, which `run_baseline` shows its pass to by `watch`.

    A probe that fails is left out of the rest, and costs the pass and the others nothing. `timed`
    is entered around what the probes themselves do.
    """

    def __init__(
        self,
        unit_id: str,
        decoder: Decoder,
        layout: Layout,
        specs: Sequence[ProbeSpec],
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._unit_id, self._specs, self._timed = unit_id, specs, timed
        self._decoder, self._groups = decoder, _Groups(layout)
        self._rows: dict[str, list[ProbeRow]] = {spec.key: [] for spec in specs}
        self._failed: dict[str, UnitFailure] = {}
        n_layers = len(decoder.layers)
        for spec in specs:
            if any(not 0 <= layer < n_layers for layer in spec.layers):
                fault = f"layers {spec.layers} don't fit a model of {n_layers}"
                self._fail(spec, ValueError(fault))

    @property
    def found(self) -> dict[str, list[ProbeRow] | UnitFailure]:
        """Each probe's rows by its key, or its failure."""
        return self._rows | self._failed

    @contextmanager
    def watch(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """hidden [1, N, D] enters the layer, which is run within. Raises what ruins the worker."""
        self._look(_OF_INPUT, layer, hidden[0])
        if not self._asked(_OF_ATTENTION, layer):
            yield
            return
        config = self._decoder.config
        attention = self._decoder.layers[layer].get_submodule("self_attn")
        own = attention_function(config, attention)

        def shown(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            *rest: object,
            scaling: float,
            **more: Any,
        ) -> object:
            seen = Attended(query=query[0], key=key[0], scaling=scaling)
            self._look(_OF_ATTENTION, layer, seen)
            return own(module, query, key, *rest, scaling=scaling, **more)

        with attending(config, NAME, shown):
            yield

    def _asked(self, looks: Mapping[ProbeName, object], layer: int) -> list[ProbeSpec]:
        sound = [spec for spec in self._specs if spec.key not in self._failed]
        return [spec for spec in sound if spec.name in looks and layer in spec.layers]

    def _look(self, looks: Mapping[ProbeName, _Look[_Seen]], layer: int, seen: _Seen) -> None:
        for spec in self._asked(looks, layer):
            with self._timed():
                try:
                    self._rows[spec.key].extend(looks[spec.name](spec, self._groups, layer, seen))
                except Exception as error:
                    if ruins_worker(error):
                        raise
                    self._fail(spec, error)

    def _fail(self, spec: ProbeSpec, error: Exception) -> None:
        # As data: an exception would hold the frames of the pass, and so all that is in them.
        self._failed[spec.key] = failure(self._unit_id, spec.key, "probe", error)


# -- the arithmetic --------------------------------------------------------------------------


def mean_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Causal attention weights, mean over heads. query [H, c, d], the last c of key's positions,
    key [G, n, d] -> [c, n] float64. Scores and softmax in float32 or better."""
    heads, c, d = query.shape
    kv_heads, n, _ = key.shape
    queries = _exact(query).reshape(kv_heads, heads // kv_heads * c, d) * scaling
    scores = (queries @ _exact(key).transpose(1, 2)).view(heads, c, n)
    at = torch.arange(n, device=query.device)
    scores.masked_fill_(at > at[n - c :, None], float("-inf"))
    return torch.softmax(scores, dim=-1).mean(dim=0).double()


def pooled_map(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, int]:
    """The attention map in bins of W positions: [B, B] float64, B <= MAX_BINS, and W.

    A bin is the mean over its (query, key) edges, the causally closed ones counted as 0; the last
    bin is shorter. query [H, N, d], key [G, N, d]; queries go in pieces of bounded scores.
    """
    heads, n, _ = query.shape
    width = -(-n // MAX_BINS)
    bins = -(-n // width)
    piece = max(1, MAP_SCORE_BYTES // (4 * heads * n))
    total = torch.zeros(bins, bins, dtype=torch.float64, device=query.device)
    for start in range(0, n, piece):
        stop = min(start + piece, n)
        weights = mean_attention(query[:, start:stop], key[:, :stop], scaling)
        padded = nn.functional.pad(weights, (0, bins * width - stop))
        by_key = padded.view(stop - start, bins, width).sum(dim=-1)
        total.index_add_(0, torch.arange(start, stop, device=query.device) // width, by_key)
    sizes = torch.full((bins,), width, dtype=torch.float64, device=query.device)
    sizes[-1] = n - (bins - 1) * width
    return total / (sizes[:, None] * sizes), width


def find_sinks(hidden: Tensor) -> list[int]:
    """Positions of the sinks of hidden [N, D], the largest norm first (see above)."""
    norms = hidden.norm(dim=-1)
    rms = norms / hidden.shape[1] ** 0.5
    peaked = hidden.abs().amax(dim=-1) >= SINK_PEAK * hidden.shape[1] ** 0.5 * rms
    found = (peaked & (norms >= SINK_NORM * norms.median()) & (norms > 0)).nonzero()[:, 0]
    ordered: list[int] = found[norms[found].argsort(descending=True)].tolist()
    return ordered


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
