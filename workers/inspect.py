"""What a prompt is made of, which edges a pathway takes away, and the decoder's exact inputs.

For a person who doubts a number, and for an outside tool that starts from the same tensors.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avflow.pathways.groups import group_names, group_positions, members, positions
from avflow.pathways.layout import Layout, LayoutError, OptionSpan, SegmentKind
from avflow.pathways.pathway import Pathway, blocked_segments
from avflow.workers.models.base import Embedded, Prepared

_SHOWN_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRow:
    """One segment: positions [start, stop), the groups it is part of, the start of its text."""

    segment: str
    kind: SegmentKind
    groups: tuple[str, ...]
    start: int
    stop: int
    n_tokens: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgesRow:
    """Positions of `target` don't read `sources`; `n_edges` (query, key) pairs a layer."""

    target: str
    sources: tuple[str, ...]
    n_edges: int


def layout_rows(prepared: Prepared, option_span: OptionSpan = "letter") -> list[LayoutRow]:
    """The prompt's segments in order."""
    layout = prepared.layout
    of_segment: list[list[str]] = [[] for _ in layout.segments]
    for group in _groups(layout, option_span):
        for member in members(layout, group, option_span):
            for number in member:
                of_segment[number].append(group)
    return [
        LayoutRow(
            segment=segment.name,
            kind=segment.kind,
            groups=tuple(groups),
            start=segment.start,
            stop=segment.stop,
            n_tokens=segment.stop - segment.start,
            text=_text(prepared, segment.start, segment.stop),
        )
        for segment, groups in zip(layout.segments, of_segment, strict=True)
    ]


def _text(prepared: Prepared, start: int, stop: int) -> str:
    """The characters of the first tokens of [start, stop); an ellipsis where there are more."""
    shown = min(stop, start + _SHOWN_TOKENS)
    begin, end = int(prepared.offsets[start, 0]), int(prepared.offsets[shown - 1, 1])
    return prepared.prompt[begin:end] + (" …" if shown < stop else "")


def _groups(layout: Layout, option_span: OptionSpan) -> list[str]:
    """The groups that this prompt has at all."""
    found = []
    for group in group_names(layout.kind):
        try:
            members(layout, group, option_span)
        except LayoutError:  # a prompt without options has no true option, and so on
            continue
        found.append(group)
    return found


def edges_rows(
    prepared: Prepared, pathway: Pathway, option_span: OptionSpan = "letter"
) -> list[EdgesRow]:
    """The segments whose attention the pathway changes, in order.

    Sources that come later than their target are left out: causality hides them anyway. Raises
    LayoutError if a group of the pathway is not found, or the pathway is for another layout.
    """
    layout = prepared.layout
    if pathway.layout != layout.kind:
        raise LayoutError(
            f"pathway {pathway.name} is for {pathway.layout} prompts, sample "
            f"{prepared.sample.sample_id} is {layout.kind}"
        )
    blocked = np.tril(blocked_segments(layout, pathway, option_span), -1)
    lengths = np.array([s.stop - s.start for s in layout.segments])
    return [
        EdgesRow(
            target=layout.segments[row].name,
            sources=tuple(layout.segments[column].name for column in np.flatnonzero(blocked[row])),
            n_edges=int(lengths[row] * lengths[blocked[row]].sum()),
        )
        for row in np.flatnonzero(blocked.any(axis=1))
    ]


def dump(
    path: Path, prepared: Prepared, embedded: Embedded, option_span: OptionSpan = "letter"
) -> None:
    """Write the decoder's inputs and the token groups as one safetensors file, whole or not at all.

    `input_ids`, `attention_mask`, `inputs_embeds`, `position_ids` as in `Embedded`; int64
    `group.<name>` (positions, ascending) for each group the prompt has; for groups of several
    members also `member.<name>.<i>`; int64 [1] `answer`, int64 [O] `option_tokens`.
    """
    from safetensors.torch import save

    tensors = {
        "input_ids": embedded.input_ids,
        "attention_mask": embedded.attention_mask,
        "inputs_embeds": embedded.inputs_embeds,
        "position_ids": embedded.position_ids,
        "answer": torch.tensor([prepared.layout.answer]),
        "option_tokens": torch.tensor(prepared.option_tokens, dtype=torch.int64),
        **_group_tensors(prepared.layout, option_span),
    }
    # Cloned: the batch dimension's expand() shares memory, which safetensors refuses.
    data = save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
        metadata={"sample_id": prepared.sample.sample_id, "option_span": option_span},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder, path.name)
        whole.write_bytes(data)
        os.replace(whole, path)


def _group_tensors(layout: Layout, option_span: OptionSpan) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for group in _groups(layout, option_span):
        found[f"group.{group}"] = torch.from_numpy(group_positions(layout, group, option_span))
        each = members(layout, group, option_span)
        if len(each) > 1:
            for number, member in enumerate(each):
                found[f"member.{group}.{number}"] = torch.from_numpy(positions(layout, member))
    return found
