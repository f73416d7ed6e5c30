"""One sample's whole work on a loaded model, as a stream of events.

    prepare -> encode -> prefill -> (batch of rows -> CurveDone ...) ... -> SampleDone

A failure is yielded as data (UnitFailure) and the rest goes on; only what ruins the worker itself
(host memory gone, a broken CUDA context) is raised. The same unit gives the same numbers whatever
was wanted of it: batches follow from all of its curves.
"""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from avflow.datasets.media import DecodedMedia
from avflow.datasets.sample import LETTERS
from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.pathways.pathway import blocked_segments, causal_blocked_edges, first_target
from avflow.pathways.windows import window_layers
from avflow.workers.engine.baseline import Baseline, run_baseline
from avflow.workers.engine.cost import Cost, Shapes, least_cost, plain_cost, replay_cost, shapes_of
from avflow.workers.engine.masks import causal_mask, knockout_mask
from avflow.workers.engine.plan import Batch, Knockout, compose_batches, score_bytes
from avflow.workers.engine.replay import Row, replay
from avflow.workers.meter import Meter
from avflow.workers.models.base import LoadedModel, Prepared
from avflow.workers.protocol import CurveDone, CurveSpec, Event, SampleDone, Stage, UnitFailure, UnitSpec


def run_unit(
    model: LoadedModel, unit: UnitSpec, media: Sequence[DecodedMedia], decode_s: float
) -> Iterator[Event]:
    """Yield a CurveDone for each wanted curve as soon as it is complete, then one SampleDone.

    `media` in the order of `unit.sample.media`, decoded in `decode_s` seconds. A curve that fails
    yields a UnitFailure of its own; a sample that fails before its curves yields one with
    `curve` None and ends. A curve with `correct_only` is left out where the baseline is wrong.
    """
    raise NotImplementedError
