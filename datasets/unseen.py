"""Leaves undecoded the frames that nobody looks at and no other frame is built on.

At two frames a second of thirty, that is up to half of a clip. H.264 says of each frame whether
others refer to it, and its decoder can be told to pass over one that they don't; what it gives of
the other frames stays the same to the bit. Other codecs promise less and are decoded whole.
"""

from collections.abc import Sequence
from typing import Any

import av
import numpy as np

from avflow.datasets.tracks import SLACK_S

_WHOLE_FRAMES = ("mov", "matroska")  # containers with one frame a packet
_EDGE_S = 1e-6  # within which two frames may both be the one that is picked


class Unseen:
    """Tells a stream's decoder, packet by packet, what to pass over."""

    def __init__(
        self, stream: av.VideoStream, stamps: Sequence[int], times: Sequence[float]
    ) -> None:
        """`stamps` are the time stamps of all the stream's packets, `times` those that are looked
        at, in seconds from a zero that is known with the first frame."""
        self._codec = stream.codec_context
        self._index = stream.index
        self._stamps = np.unique(np.asarray(stamps, dtype=np.int64))
        self._starts = self._stamps * float(stream.time_base or 0)
        self._times = np.asarray(times)
        self._looked_at: frozenset[int] | None = None
        self._able = (
            self._codec.name == "h264"
            and stream.container.format.name.startswith(_WHOLE_FRAMES)
            and 0 < len(stamps) == len(self._stamps)
        )

    def before(self, packet: Any, zero: float | None) -> None:
        """Call with each packet before it is decoded; `zero` is None before the first frame."""
        if not self._able or zero is None or packet.stream.index != self._index:
            return
        if self._looked_at is None:
            self._looked_at = self._frames_at(zero)
        needed = packet.pts is None or packet.pts in self._looked_at
        self._codec.skip_frame = "DEFAULT" if needed else "NONREF"

    def _frames_at(self, zero: float) -> frozenset[int]:
        """The last frame, which tells whether the file is whole, and that on show at each time."""
        latest = zero + self._times + SLACK_S
        found = [len(self._stamps) - 1]
        for edge in (-_EDGE_S, _EDGE_S):
            found += (np.searchsorted(self._starts, latest + edge, side="right") - 1).tolist()
        return frozenset(int(self._stamps[max(0, i)]) for i in found)
