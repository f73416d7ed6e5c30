"""The engine at the paper's sizes on a CUDA device that is not there.

torch's fake tensors have shapes, dtypes and devices, and no numbers: what the engine does at the
true shapes of the 3B and 7B models and 11,036 tokens is done, within seconds and no memory. Asked
of it: no tensor on a wrong device, nothing of N x N, and no more bytes than are planned.
"""

import weakref
from collections.abc import Callable, Iterator
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

from avflow.workers.engine import flex, flex_kernel, kernel_check, probes
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


@pytest.fixture
def build(scripts: dict[str, ModuleType]) -> Iterator[Callable[..., Any]]:
    """A few layers of a true model, in bfloat16."""

    def built(model: str, budget: int = 2**31) -> Any:
        true = scripts["gpu"].SIZES[model]
        size = replace(true, layers=LAYERS, window=WINDOW, byte_budget=budget)
        return scripts["cases"].build(size, torch.bfloat16, GPU)

    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield built


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
    mask = options["block_mask"]
    assert mask.shape[-2:] == (query.shape[2], key.shape[2])
    held = [cell.cell_contents for cell in mask.mask_mod.__closure__]
    assert {tensor.device for tensor in (*held, mask.kv_indices)} == {query.device}
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), SimpleNamespace(lse=lse)


LATE = ("question_to_last", "video_to_true_option", "video_to_question")


@pytest.mark.parametrize(
    ("model", "budget", "pathways", "compiled"),
    [
        ("3b", 2**31, LATE, False),
        ("3b", 2**30, (*LATE, "cross_frame"), True),
        ("7b", 2**31, (*LATE, "cross_frame"), True),
    ],
)
def test_a_sample_takes_no_more_than_is_planned_and_nothing_of_n_by_n(
    scripts: dict[str, ModuleType],
    build: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    budget: int,
    pathways: tuple[str, ...],
    compiled: bool,
) -> None:
    kernel = shapes_of_flex if compiled else None
    monkeypatch.setattr(flex_kernel, "kernel_for", lambda device, heads: kernel)
    cases, case = scripts["cases"], build(model, budget)
    shapes = case.shapes
    assert shapes.n_tokens == 11036
    job = cases.plan(case, [cases.BY_NAME[name] for name in pathways])
    with ledger(case) as prefill:
        baseline = cases.prefill(case, job)
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


def test_a_layer_on_another_gpu_has_its_blocks_there(build: Callable[..., Any]) -> None:
    layout, other = build("3b").layout, torch.device("cuda:1")
    blocks = flex.plan_blocks(layout, None, ((20, layout.n_tokens),), 20, GPU)
    query, own, shared = (
        torch.empty(1, heads, n, 128, device=other)
        for heads, n in ((16, layout.n_tokens - 20), (2, layout.n_tokens - 20), (2, 20))
    )
    out = flex.attend(blocks, query, (own, own), (shared, shared), scale=1.0, kernel=shapes_of_flex)
    assert out.device == other


def test_a_mask_of_n_by_n_would_be_seen(build: Callable[..., Any]) -> None:
    case = build("3b")
    n = case.layout.n_tokens
    with ledger(case) as seen:
        torch.ones(n, n, dtype=torch.bool, device=GPU)
    assert seen.peak == n * n
    assert seen.squares


def test_tokens_leave_on_the_gpu(build: Callable[..., Any]) -> None:
    case, media = build("3b"), np.arange(20, 9000)
    with ledger(case) as seen:
        walked = discard_prefill(case.decoder, case.embedded, {1: media})
    assert walked.lengths == (11036, 11036, 11036 - len(media), 11036 - len(media))
    assert walked.probabilities.device == GPU
    assert not seen.squares


def test_an_attention_map_is_pooled_in_bounded_memory(build: Callable[..., Any]) -> None:
    case = build("7b")
    size, n = case.size, case.layout.n_tokens
    with ledger(case) as seen:
        query = torch.randn(size.heads, n, 128, dtype=torch.bfloat16, device=GPU)
        key = torch.randn(size.kv_heads, n, 128, dtype=torch.bfloat16, device=GPU)
        pooled, _ = probes.pooled_map(query, key, 0.1)
    assert pooled.device == GPU
    assert max(pooled.shape) <= probes.MAX_BINS
    assert seen.peak < 4 * probes.MAP_SCORE_BYTES + 2**30
