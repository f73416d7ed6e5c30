"""The engine at the paper's sizes on a CUDA device that is not there.

torch's fake tensors have shapes, dtypes and devices, and no numbers: what the engine does at the
true shapes of the 3B and 7B models and 11,036 tokens is done, within seconds and no memory. Asked
of it: no tensor on a wrong device, nothing of N x N, and no more bytes than are planned.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from avflow.workers.engine import flex, kernel_check, probes
from avflow.workers.engine.discard import discard_prefill
from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.interface import causal_mask
from avflow.workers.engine.memory import (
    HEAD_CHUNK,
    baseline_bytes,
    batch_bytes,
    head_bytes,
    piece_tokens,
)
from avflow.workers.engine.replay import replay

GPU = torch.device("cuda:0")
LONG = 1000  # a tensor with two such sides, none of them a width of the model's, is N x N
LAYERS, WINDOW = 4, 3


@dataclass
class Ledger(TorchDispatchMode):
    """Bytes on the GPU of what comes to be within, and the most at any time; `squares` are tensors
    of positions by positions."""

    widths: frozenset[int] = frozenset()
    now: int = 0
    peak: int = 0
    squares: set[str] = field(default_factory=set)
    _held: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if _on_gpu(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(_on_gpu, tree_leaves(out)):
            sides = set(tensor.shape[-2:])
            if tensor.dim() > 1 and min(sides) > LONG and not sides & self.widths:
                self.squares.add(f"{func} {tuple(tensor.shape)}")
            storage = _storage(tensor)
            if storage._cdata in given | self._held:
                continue
            self._held.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def _on_gpu(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cuda"


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@pytest.fixture
def scripts(benchmark_scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks, whose cases have the true shapes. Without numbers, no kernel can be tried out
    first, and no mask seen to be of ones alone (below it is)."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor: False)
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: True)
    monkeypatch.setattr(kernel_check, "fits", lambda device, dtype: True)
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1)  # else small numbers go to the GPU
    return benchmark_scripts


@pytest.fixture(params=["3b", "7b"])
def case(scripts: dict[str, ModuleType], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A few layers of the true model, in bfloat16."""
    size = replace(scripts["gpu"].SIZES[request.param], layers=LAYERS, window=WINDOW)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield scripts["cases"].build(size, torch.bfloat16, GPU)


def ledger(case: Any) -> Ledger:
    size = case.size
    widths = {size.hidden, size.intermediate, size.vocabulary, size.heads * 128}
    return Ledger(widths=frozenset(widths | {n % HEAD_CHUNK for n in widths}))


def test_a_prompt_without_padding_needs_no_mask(tiny_thinker: Any) -> None:
    hidden, ones = torch.randn(1, 50, 64), torch.ones(1, 50, dtype=torch.int64)
    assert causal_mask(tiny_thinker().decoder, hidden, ones) is None


def shapes_of_flex(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """What the compiled kernel hands back."""
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert options["block_mask"].shape[-2:] == (query.shape[2], key.shape[2])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), SimpleNamespace(lse=lse)


PATHWAYS = ("question_to_last", "video_to_true_option", "video_to_question", "cross_frame")


@pytest.mark.parametrize(("budget", "compiled"), [(2**31, False), (2**31, True), (2**30, True)])
def test_a_sample_takes_no_more_than_is_planned_and_nothing_of_n_by_n(
    scripts: dict[str, ModuleType],
    case: Any,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    compiled: bool,
) -> None:
    monkeypatch.setattr(flex, "works_on", lambda device: compiled)
    monkeypatch.setattr(flex, "_compiled", lambda: shapes_of_flex)
    cases, shapes = scripts["cases"], case.shapes
    assert shapes.n_tokens == 11036
    sized = replace(case, size=replace(case.size, byte_budget=budget))
    job = cases.plan(sized, [cases.BY_NAME[name] for name in PATHWAYS])
    with ledger(case) as prefill:
        baseline = cases.prefill(sized, job)
    assert not prefill.squares
    planned = baseline_bytes(shapes, len(baseline.residual))
    assert prefill.now <= planned
    most = planned + max(shapes.n_tokens * shapes.activation_bytes, head_bytes(shapes, 1))
    assert 0.6 * most <= prefill.peak <= most
    tokens, trunk = piece_tokens(shapes, budget), None
    for batch in job.batches:
        if batch.opens:
            trunk = baseline.residual[batch.first_layer, batch.start][0]
        assert trunk is not None
        with ledger(case) as replayed:
            done = replay(case.decoder, baseline, trunk, batch, tokens)
            answers = last_probabilities(case.decoder, done.last)
        assert answers.device == GPU
        assert not replayed.squares
        planned = batch_bytes(shapes, batch.start, len(batch.rows), budget)
        assert replayed.peak <= planned
        if batch.start < LONG:  # late positions take too little to be told from rounding up
            assert replayed.peak >= 0.6 * planned
        trunk = done.trunk


def test_an_edge_that_is_planned_too_small_is_seen(case: Any) -> None:
    n = case.layout.n_tokens
    with ledger(case) as seen:
        torch.ones(n, n, dtype=torch.bool, device=GPU)
    assert seen.peak == n * n
    assert seen.squares


def test_tokens_leave_on_the_gpu(scripts: dict[str, ModuleType], case: Any) -> None:
    media = np.arange(20, 9000)
    with ledger(case) as seen:
        walked = discard_prefill(case.decoder, case.embedded, {1: media})
    assert walked.lengths == (11036, 11036, 11036 - len(media), 11036 - len(media))
    assert walked.probabilities.device == GPU
    assert not seen.squares


def test_an_attention_map_is_pooled_in_bounded_memory(case: Any) -> None:
    size, n = case.size, case.layout.n_tokens
    with ledger(case) as seen:
        query = torch.randn(size.heads, n, 128, dtype=torch.bfloat16, device=GPU)
        key = torch.randn(size.kv_heads, n, 128, dtype=torch.bfloat16, device=GPU)
        pooled, _ = probes.pooled_map(query, key, 0.1)
    assert pooled.device == GPU
    assert max(pooled.shape) <= probes.MAX_BINS
    assert seen.peak < 4 * probes.MAP_SCORE_BYTES + 2**30
