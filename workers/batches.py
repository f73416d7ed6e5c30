"""Batches of knockout rows on a loaded model: run, split where memory runs out, and read off.

Shapes: R rows, O option letters, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.workers.engine.baseline import Baseline
from avflow.workers.engine.cost import Cost, batch_cost
from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.memory import HEAD_ROWS, Shapes, batch_bytes, piece_tokens
from avflow.workers.engine.plan import Batch, halves
from avflow.workers.engine.replay import replay
from avflow.workers.failing import is_out_of_memory
from avflow.workers.models.base import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is read off R rows' probabilities."""

    p_base_token: NDArray[np.float64]  # [R]
    p_options: NDArray[np.float64]  # [R, O]
    token: NDArray[np.int32]  # [R]

    @staticmethod
    def join(parts: "Sequence[Outcome]") -> "Outcome":
        """Their rows one after the other."""
        return Outcome(
            p_base_token=np.concatenate([part.p_base_token for part in parts]),
            p_options=np.concatenate([part.p_options for part in parts]),
            token=np.concatenate([part.token for part in parts]),
        )

    def __getitem__(self, rows: Sequence[int]) -> "Outcome":
        at = list(rows)
        return Outcome(
            p_base_token=self.p_base_token[at],
            p_options=self.p_options[at],
            token=self.token[at],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Which of a row's probabilities are kept: the base token's and each option letter's."""

    base_token: int
    option_tokens: tuple[int, ...]

    def read(self, probabilities: Tensor) -> Outcome:
        """probabilities [R, V]."""
        options = probabilities[:, list(self.option_tokens)]
        return Outcome(
            p_base_token=probabilities[:, self.base_token].double().cpu().numpy(),
            p_options=options.double().cpu().numpy(),
            token=probabilities.argmax(dim=1).int().cpu().numpy(),
        )

    def read_last(self, decoder: Decoder, hidden: Tensor) -> Outcome:
        """hidden [R, D] of the last layer: a few rows at a time, for a vocabulary is wide."""
        pieces = torch.split(hidden, HEAD_ROWS)
        return Outcome.join([self.read(last_probabilities(decoder, piece)) for piece in pieces])


class BatchRunner:
    """Runs one sample's batches, and counts what they cost."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        baseline: Baseline,
        shapes: Shapes,
        byte_budget: int,
        reader: Reader,
    ) -> None:
        self.decoder, self.baseline = decoder, baseline
        self.shapes, self.byte_budget, self.reader = shapes, byte_budget, reader
        self.cost = Cost()
        self.split_batches = 0
        self._handed_over: Tensor | None = None

    def run(self, batch: Batch) -> Outcome:
        """The trunk's outcome, then each row's. Without `batch.control` the first means nothing.

        A group's batches are run in their order: each begins with what the one before handed over.
        A batch that the device has no room for is cut in two, and counted; one row that does not
        fit raises what torch raised.
        """
        return self._run(batch, piece_tokens(self.shapes, self.byte_budget))

    def _run(self, batch: Batch, tokens_a_piece: int) -> Outcome:
        if self._fits(batch) or len(batch.rows) == 1:
            try:
                trunk = self._trunk(batch)
                done = replay(self.decoder, self.baseline, trunk, batch, tokens_a_piece)
                outcome = self.reader.read_last(self.decoder, done.last)
                self._handed_over = done.trunk
                self.cost += batch_cost(self.shapes, batch)
                return outcome
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch.rows) == 1:
                    raise
        # Outside the handler, so that the failed attempt's tensors are free by now.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.split_batches += 1
        first, second = (self._run(part, tokens_a_piece // 2) for part in halves(batch))
        return Outcome.join([first, second[range(1, len(second.token))]])

    def _trunk(self, batch: Batch) -> Tensor:
        if batch.opens:
            return self.baseline.residual[batch.first_layer, batch.start][0]
        if self._handed_over is None:
            raise ValueError("a batch before this one, of the same group, has not been run")
        return self._handed_over

    def _fits(self, batch: Batch) -> bool:
        """Whether the device has room for the batch now. A CPU is taken to have it."""
        device = self.baseline.cos.device
        if device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        needed = batch_bytes(self.shapes, batch.start, len(batch.rows), self.byte_budget)
        return needed <= free + unused
