"""What the undisturbed pass shows: attention by group, attention maps, norms and sinks.

Paper section 3 and appendix B (Fig. 1, 2, 7). One walk over the official decoder layers serves all
probes of a sample. A layer's attention is seen through transformers' AttentionInterface, set for
the text decoder alone and put back afterwards; it attends by sdpa, and queries and keys are looked
at beside it, so that N x N weights never exist. The residual stream of a layer is its input.

A sink is a token whose largest activation, over the token's root mean square, is at least
`SINK_PEAK` of what a token with a single non-zero dimension would have, sqrt(D): the RMS-normed
criterion of sink studies (25 at D = 3584), with no dimension named beforehand and at any width.
And its norm is at least `SINK_NORM` times the layer's median, since sinks stand out by it, too.

Shapes: N prompt tokens, D hidden size, H heads, G key/value heads, g = H // G, d head size, c
queries of a piece, W bin width, B bins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.workers.engine.interface import attending, causal_mask
from avflow.workers.failing import ruins_worker
from avflow.workers.models.base import Decoder, Embedded
from avflow.workers.protocol import ProbeName, ProbeSpec

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


def run_probes(
    decoder: Decoder, embedded: Embedded, layout: Layout, specs: Sequence[ProbeSpec]
) -> dict[str, list[ProbeRow] | Exception]:
    """Each probe's rows by its key; the error instead, where a probe failed on its own.

    Raises what the walk itself raises, and what ruins the worker.
    """
    n_layers = len(decoder.layers)
    probes = {spec.key: _Guarded(spec, _PROBES[spec.name](spec, layout)) for spec in specs}
    for guarded in probes.values():
        if any(not 0 <= layer < n_layers for layer in guarded.spec.layers):
            layers = guarded.spec.layers
            guarded.error = ValueError(f"layers {layers} don't fit a model of {n_layers}")
    sound = [guarded for guarded in probes.values() if guarded.error is None]
    if sound:
        _walk(decoder, embedded, sound)
    return {key: guarded.error or guarded.probe.rows for key, guarded in probes.items()}


class _Probe(Protocol):
    rows: list[ProbeRow]

    def on_input(self, layer: int, hidden: Tensor) -> None:
        """hidden [N, D] enters the layer."""
        ...

    def on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """query [H, N, d] and key [G, N, d], both rotated."""
        ...


@dataclass(slots=True)
class _Guarded:
    """A probe whose error is kept and costs the other probes nothing."""

    spec: ProbeSpec
    probe: _Probe
    error: Exception | None = None

    def wants(self, layer: int) -> bool:
        return self.error is None and layer in self.spec.layers

    @contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if ruins_worker(error):
                raise
            self.error = error
            self.probe.rows.clear()


# -- the walk --------------------------------------------------------------------------------


@torch.inference_mode()
def _walk(decoder: Decoder, embedded: Embedded, probes: Sequence[_Guarded]) -> None:
    hidden = embedded.inputs_embeds
    with attending(decoder.config, NAME, _attend):
        mask = causal_mask(decoder, hidden, embedded.attention_mask)
        cos, sin = decoder.rotary(hidden, embedded.position_ids)
        top = max(layer for guarded in probes for layer in guarded.spec.layers)
        for i, layer in enumerate(decoder.layers[: top + 1]):
            looking = [guarded for guarded in probes if guarded.wants(i)]
            for guarded in looking:
                with guarded.guard():
                    guarded.probe.on_input(i, hidden[0])
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                taps=_Taps(i, looking),
            )


@dataclass(frozen=True, slots=True)
class _Taps:
    layer: int
    probes: Sequence[_Guarded]

    def __call__(self, query: Tensor, key: Tensor, scaling: float) -> None:
        for guarded in self.probes:
            if guarded.error is None:
                with guarded.guard():
                    guarded.probe.on_attention(self.layer, query[0], key[0], scaling)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    taps: _Taps,
    **interface: Any,  # dropout, position_ids, …: what transformers passes to every function
) -> tuple[Tensor, None]:
    taps(query, key, scaling)
    mixed, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **interface
    )
    return mixed, None


# -- the probes ------------------------------------------------------------------------------


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


@dataclass(slots=True)
class _LastAttention:
    spec: ProbeSpec
    layout: Layout
    rows: list[ProbeRow] = field(default_factory=list)

    def on_input(self, layer: int, hidden: Tensor) -> None:
        """Nothing: this probe is of attention."""

    def on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        weights = mean_attention(query[:, -1:], key, scaling)[0].cpu().numpy()
        for group, positions in probed_groups(self.layout).items():
            share = float(weights[positions].sum())
            self.rows.append(ProbeRow(layer=layer, group=group, value=share))


@dataclass(slots=True)
class _AttentionMap:
    spec: ProbeSpec
    layout: Layout
    rows: list[ProbeRow] = field(default_factory=list)

    def on_input(self, layer: int, hidden: Tensor) -> None:
        """Nothing: this probe is of attention."""

    def on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        pooled, width = pooled_map(query, key, scaling)
        values = pooled.cpu().numpy()
        for q in range(len(values)):
            self.rows += [
                ProbeRow(layer=layer, value=value, position=q * width, key=k * width, width=width)
                for k, value in enumerate(values[q, : q + 1].tolist())
            ]


@dataclass(slots=True)
class _Norms:
    spec: ProbeSpec
    layout: Layout
    rows: list[ProbeRow] = field(default_factory=list)

    def on_input(self, layer: int, hidden: Tensor) -> None:
        groups = group_of_position(self.layout)
        norms = _exact(hidden).norm(dim=-1).double().tolist()
        self.rows += [
            ProbeRow(layer=layer, group=group, position=position, value=norm)
            for position, (group, norm) in enumerate(zip(groups, norms, strict=True))
        ]

    def on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Nothing: this probe is of the residual stream."""


@dataclass(slots=True)
class _Sinks:
    spec: ProbeSpec
    layout: Layout
    rows: list[ProbeRow] = field(default_factory=list)

    def on_input(self, layer: int, hidden: Tensor) -> None:
        exact = _exact(hidden)
        sinks = find_sinks(exact)
        groups = group_of_position(self.layout)
        self.rows.append(ProbeRow(layer=layer, value=float(len(sinks))))
        for position in sinks[:MAX_SINKS]:
            size = min(self.spec.top_dimensions, exact.shape[1])
            top = exact[position].abs().topk(size)
            self.rows += [
                ProbeRow(
                    layer=layer,
                    group=groups[position],
                    position=position,
                    dimension=dimension,
                    value=value,
                )
                for dimension, value in zip(
                    top.indices.tolist(), top.values.double().tolist(), strict=True
                )
            ]

    def on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Nothing: this probe is of the residual stream."""


_PROBES: Mapping[ProbeName, Callable[[ProbeSpec, Layout], _Probe]] = {
    "last_attention": _LastAttention,
    "attention_map": _AttentionMap,
    "norms": _Norms,
    "sinks": _Sinks,
}


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
