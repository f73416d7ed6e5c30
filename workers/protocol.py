"""What goes to a worker and what comes back. Picklable without torch; numpy and scalars only.

    UnitSpec  ->  run_unit  ->  CurveDone | InterventionDone | ProbeDone | UnitFailure ...
                            ->  SampleDone

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

Stage = Literal[
    "load",
    "decode",
    "prepare",
    "encode",
    "prefill",
    "replay",
    "discard",
    "probe",
    "worker",
    "timeout",
]
ProbeName = Literal["last_attention", "attention_map", "norms", "sinks"]


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
class MaskSpec:
    """The blocked edges of all `pathways` at once, at fixed `layers` (paper, Table 1)."""

    name: str
    pathways: tuple[Pathway, ...]
    layers: tuple[int, ...]
    option_span: OptionSpan = "letter"
    correct_only: bool = False

    @property
    def key(self) -> str:
        """Unique in the unit: `mask/video_for_last`."""
        return f"mask/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardStep:
    """Once layer `after_layer` has run, the tokens of `groups` leave the sequence."""

    after_layer: int
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardSpec:
    """Tokens that leave the sequence on the way up (paper, Table 4), `steps` by ascending layer.

    Without steps: the full prefill, timed in the same way.
    """

    name: str
    steps: tuple[DiscardStep, ...]
    option_span: OptionSpan = "letter"
    correct_only: bool = False

    @property
    def key(self) -> str:
        """Unique in the unit: `discard/video`."""
        return f"discard/{self.name}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers after which tokens leave."""
        return tuple(step.after_layer for step in self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSpec:
    """What to look at in the undisturbed pass at `layers` (paper, Fig. 1, 2, 7).

    `last_attention` and `attention_map` are of a layer's own attention, `norms` and `sinks` of the
    residual stream that enters it. `top_dimensions`: how many of a sink's hidden dimensions.
    """

    name: ProbeName
    layers: tuple[int, ...]
    top_dimensions: int = 16
    correct_only: bool = False

    @property
    def key(self) -> str:
        """Unique in the unit: `probe/norms`."""
        return f"probe/{self.name}"


ExtraSpec = MaskSpec | DiscardSpec | ProbeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """All of one sample's work under one model.

    `curves` and `extras` are everything the plan holds for the sample: the composition of batches
    follows from the curves alone. `wanted` are the keys still missing; only these are yielded.
    `byte_budget` bounds a batch's activations and is part of the identity. `cost` is token-layers,
    for ordering. `decode_timeout_s` is for each of the sample's files; None: the media spec's.
    """

    unit_id: str
    model: str
    data_root: str
    sample: Sample
    curves: tuple[CurveSpec, ...]
    wanted: frozenset[str]
    byte_budget: int
    cost: float
    extras: tuple[ExtraSpec, ...] = ()
    decode_timeout_s: float | None = None

    @property
    def work(self) -> tuple[CurveSpec | ExtraSpec, ...]:
        """Everything with a key, in the order in which it is done."""
        return (*self.curves, *self.extras)


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
class InterventionDone:
    """A mask's or a discard's answer. `curve` is its key, `layers` the spec's; O option letters.

    `p` is the probability of the baseline's token, `predicted` the letter (None when the top-1
    token is no option letter), `correct` whether it is the answer's. `p_base` and `correct_base`
    are of the sample left alone: for a mask of the unmasked row beside it, which went through the
    same kernels, for a discard of the baseline. `token_layers` and `prefill_s` are a discard's own,
    None for a mask, whose work is counted with the sample's replay.
    """

    unit_id: str
    curve: str
    layers: tuple[int, ...]
    p: float
    p_options: NDArray[np.float64]  # [O]
    token: int
    predicted: str | None
    correct: bool
    p_base: float
    correct_base: bool
    token_layers: int | None
    prefill_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeDone:
    """What a probe saw, R rows. `curve` is its key. "" and -1 where a column says nothing.

    `position` and `key` are prompt positions, or the first of a bin of `width` of them (the last
    bin is shorter); `dimension` is a hidden one.

    last_attention: the last token's attention to `group`, mean over heads
    attention_map:  from the queries at `position` to the keys at `key`, mean over the bins' edges
                    (the causally closed ones count 0) and over heads
    norms:          L2 norm of the residual stream at `position`, which lies in `group`
    sinks:          |activation| of the sink at `position` in `dimension`; and a row a layer without
                    a position: how many sinks there are
    """

    unit_id: str
    curve: str
    layer: NDArray[np.int16]  # [R]
    group: tuple[str, ...]  # [R]
    position: NDArray[np.int32]  # [R]
    key: NDArray[np.int32]  # [R]
    width: NDArray[np.int32]  # [R]
    dimension: NDArray[np.int32]  # [R]
    value: NDArray[np.float64]  # [R]


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
    notes: tuple[str, ...] = ()  # what to know of it: `file: what decoding changed`, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFailure:
    """A failure as data. `curve`: the key of what failed, None the whole sample. `retryable`: the
    same inputs might pass (I/O, memory); a corrupt file or a group that can't be located is not."""

    unit_id: str
    curve: str | None
    stage: Stage
    error: str  # the exception's class name
    message: str
    traceback: str
    retryable: bool = False


Finished = CurveDone | InterventionDone | ProbeDone  # what has a key: handed back and stored whole
Event = Finished | SampleDone | UnitFailure
