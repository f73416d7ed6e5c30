"""What goes to a worker and what comes back. Picklable without torch; numpy and scalars only.

    UnitSpec  ->  run_unit  ->  CurveDone | UnitFailure ...  ->  SampleDone

The stream of a unit ends with exactly one SampleDone, or with a UnitFailure whose `curve` is None
when the sample itself failed (decode, prompt, baseline). A worker that dies ends the stream early:
what it had yielded stays valid.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from avflow.datasets.sample import Sample
from avflow.pathways.layout import OptionSpan
from avflow.pathways.pathway import Pathway

Stage = Literal["load", "decode", "prepare", "encode", "prefill", "replay", "worker", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSpec:
    """One pathway under one window, at these centre layers: the smallest thing handed back.

    `variant` spells what else defines the job ("letter" or "full" for the option span).
    `correct_only`: skip the curve where the baseline's answer is wrong.
    """

    pathway: Pathway
    window: int
    center_layers: tuple[int, ...]
    option_span: OptionSpan = "letter"
    correct_only: bool = True

    @property
    def variant(self) -> str:
        """As in the tables' `variant` column."""
        return self.option_span

    @property
    def key(self) -> str:
        """Unique among a unit's curves: `video_to_question/k3/letter`."""
        return f"{self.pathway.name}/k{self.window}/{self.variant}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """All of one sample's work under one model.

    `curves` is everything the plan holds for the sample: the composition of batches follows from
    it alone. `wanted` are the keys still missing; only these are yielded. `byte_budget` bounds a
    batch's activations and is part of the identity. `cost` is token-layers, for ordering.
    """

    unit_id: str
    model: str
    data_root: str
    sample: Sample
    curves: tuple[CurveSpec, ...]
    wanted: frozenset[str]
    byte_budget: int
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveDone:
    """A finished curve. C centre layers, O option letters; probabilities float64.

    p_base and base_token are the baseline's top-1 at the last position; correct_base says whether
    that token is the answer's letter. `n_blocked_edges` counts (query, key) edges summed over the
    window's layers.
    """

    unit_id: str
    curve: str
    center_layer: NDArray[np.int16]  # [C]
    p_knockout: NDArray[np.float64]  # [C], of base_token
    p_options: NDArray[np.float64]  # [C, O]
    knockout_token: NDArray[np.int32]  # [C]
    n_blocked_edges: NDArray[np.int64]  # [C]
    p_base: float
    base_token: int
    correct_base: bool
    answer_token: int
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDone:
    """The sample's own row, yielded last. Seconds, FLOPs (multiply-adds x 2), bytes."""

    unit_id: str
    answer: str
    predicted: str | None  # the letter, None when the top-1 token is no option letter
    base_token: int
    p_base: float
    p_options: NDArray[np.float64]  # [O]
    correct: bool
    n_tokens: int
    group_spans: dict[str, list[list[int]]]  # group -> half-open spans
    decode_s: float
    encode_s: float
    prefill_s: float
    replay_s: float
    token_layers: int
    flops: float
    flops_lower_bound: float
    split_batches: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFailure:
    """A failure as data. `curve` None: the whole sample. `retryable`: the same inputs might pass
    (I/O, memory); a corrupt file or a group that can't be located is not."""

    unit_id: str
    curve: str | None
    stage: Stage
    error: str  # the exception's class name
    message: str
    traceback: str
    retryable: bool = False


Event = CurveDone | SampleDone | UnitFailure
