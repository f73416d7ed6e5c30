"""Attention in parts, merged by log-sum-exp, against one dense softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from avflow.pathways import catalogue
from avflow.pathways.pathway import blocked_segments, first_target
from avflow.workers.engine import backends, flex, flex_kernel, kernel_check, partial, sdpa
from avflow.workers.engine.partial import (
    merge_into,
    partial_attention,
    plain_attention,
    self_attention,
    shared_attention,
)
from avflow.workers.engine.reads import plan_reads
from avflow.workers.engine.rows import target_spans

CPU = torch.device("cpu")
EXACT = {torch.float32: 3e-6, torch.float64: 1e-13}


def numbers(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    dtype=st.sampled_from(list(EXACT)),
    rows=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (4, 4)]),
    q=st.integers(1, 9),
    n=st.integers(1, 11),
    size=st.sampled_from([8, 16]),
)
def test_two_parts_make_one_softmax(data, dtype, rows, heads, q, n, size) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    query = numbers(generator, rows, heads[0], q, size, dtype=dtype)
    own = [numbers(generator, rows, heads[1], q, size, dtype=dtype) for _ in range(2)]
    shared = [numbers(generator, 1, heads[1], n, size, dtype=dtype) for _ in range(2)]
    out, lse = partial_attention(query, *own, causal=True, scale=0.3)
    total = (out.to(dtype), lse.to(dtype))
    merge_into(total, shared_attention(query, *shared, scale=0.3))
    together = [
        torch.cat([a.expand(rows, -1, -1, -1), b], 2) for a, b in zip(shared, own, strict=True)
    ]
    allowed = torch.cat([torch.ones(q, n, dtype=torch.bool), torch.ones(q, q).tril().bool()], 1)
    expected = dense(query, *together, allowed, 0.3)
    assert (total[0] - expected).abs().max() <= EXACT[dtype]


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 3e-3), (torch.float64, 1e-10)])
@pytest.mark.parametrize("scale", [-40.0, 40.0, 400.0])
def test_parts_are_merged_whose_scores_no_exponential_holds(dtype, off, scale) -> None:
    generator = torch.Generator().manual_seed(7)
    query, *others = (numbers(generator, 2, h, 6, 8, dtype=dtype) for h in (4, 2, 2, 2, 2))
    first, second = others[:2], others[2:]
    out, lse = partial_attention(query, *first, causal=False, scale=scale)
    assert lse.abs().max() > 100
    total = (out, lse)
    merge_into(total, partial_attention(query, *second, causal=False, scale=scale))
    together = [torch.cat([a, b], 2) for a, b in zip(first, second, strict=True)]
    expected = dense(query, *together, torch.ones(6, 12, dtype=torch.bool), scale)
    assert (total[0] - expected).abs().max() <= off


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", list(EXACT))
def test_the_kernel_and_the_plain_products_agree(dtype: torch.dtype, causal: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (numbers(generator, 2, h, 40, 16, dtype=dtype) for h in (4, 2, 2))
    fast = partial_attention(query, key, value, causal=causal, scale=0.2)
    plain = plain_attention(query, key, value, causal=causal, scale=0.2)
    for mine, theirs in zip(fast, plain, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kernels_are_held_to_plain_products_before_they_are_used(dtype, monkeypatch) -> None:
    assert kernel_check.fits(CPU, dtype)
    fused = partial.fused_attention

    def in_base_two(*arguments, **options):
        out, lse = fused(*arguments, **options)
        return out, lse / math.log(2)

    monkeypatch.setattr(partial, "fused_attention", in_base_two)
    assert "log-sum-exp of 1 queries over 130 keys" in kernel_check.difference(CPU, dtype)
    with pytest.warns(UserWarning, match="this run will be slow"):
        assert not kernel_check.fits.__wrapped__(CPU, dtype)
    monkeypatch.setattr(kernel_check, "fits", lambda device, dtype: False)
    generator = torch.Generator().manual_seed(5)
    query, key, value = (numbers(generator, 2, h, 40, 16, dtype=dtype) for h in (4, 2, 2))
    found = partial_attention(query, key, value, causal=True, scale=0.2)
    plain = plain_attention(query, key, value, causal=True, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_query_that_reads_itself_alone_gets_its_own_value() -> None:
    generator = torch.Generator().manual_seed(6)
    query, key, value = (numbers(generator, 2, h, 5, 8, dtype=torch.float64) for h in (4, 2, 2))
    out, lse = self_attention(query, key, value, scale=0.2)
    assert torch.equal(out, value.repeat_interleave(2, 1))
    by_hand = (query * key.repeat_interleave(2, 1)).sum(-1) * 0.2
    assert torch.equal(lse, by_hand)


@pytest.mark.parametrize("at", [99, 149])
def test_one_query_over_keys_that_others_share_leaves_them_as_they_were(random_layout, at) -> None:
    generator = torch.Generator().manual_seed(7)
    reads = plan_reads(random_layout("single_video", 150, 7), None, ((at, at + 1),), 150, CPU)
    query = numbers(generator, 2, 4, 1, 16, dtype=torch.float32)
    key, value = (numbers(generator, 1, 4, 150, 16, dtype=torch.float32) for _ in range(2))
    before = key.clone(), value.clone()
    found = sdpa.attend(reads, query, None, (key, value), 0.3)
    allowed = torch.arange(150) <= at
    assert (found - dense(query, key, value, allowed, 0.3)).abs().max() <= EXACT[torch.float32]
    assert torch.equal(key, before[0])
    assert torch.equal(value, before[1])


@pytest.mark.parametrize("kind", ["single_video", "interleaved"])
@pytest.mark.parametrize("joining", [False, True])
def test_both_backends_give_the_same_for_every_pathway(random_layout, kind, joining) -> None:
    layout = random_layout(kind, 150, 9)
    generator = torch.Generator().manual_seed(9)
    for pathway in (p for p in catalogue.ALL if p.layout == kind):
        blocked = blocked_segments(layout, pathway)
        start = first_target(layout, blocked)
        assert start is not None
        spans = target_spans(layout, blocked, start) if joining else ((start, 150),)
        own_from = 150 if joining else start
        q = sum(b - a for a, b in spans)
        rows = 1 if joining else 2
        query = numbers(generator, rows, 4, q, 16, dtype=torch.float32)
        own = tuple(numbers(generator, rows, 2, q, 16, dtype=torch.float32) for _ in range(2))
        shared = tuple(
            numbers(generator, 1, 2, own_from, 16, dtype=torch.float32) for _ in range(2)
        )
        parts = plan_reads(layout, blocked, spans, own_from, CPU)
        blocks = flex.plan_blocks(layout, blocked, spans, own_from, CPU)
        mine = sdpa.attend(parts, query, own, shared, 0.25)
        theirs = flex.attend(blocks, query, own, shared, scale=0.25, kernel=flex_attention)
        assert (mine - theirs).abs().max() <= 3e-6, pathway.name


HEADS = flex_kernel.Heads(n=4, kv=2, size=64, dtype=torch.bfloat16)


def test_the_example_that_decides_for_the_compiled_backend_is_near_and_can_fail() -> None:
    assert flex_kernel.difference(CPU, flex_attention, HEADS) <= 0.05

    def unmasked(query, key, value, *, block_mask, **rest):
        return flex_attention(query, key, value, **rest)

    assert flex_kernel.difference(CPU, unmasked, HEADS) > 0.3
    assert not flex_kernel.possible_on(CPU)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch) -> None:
    asked = []

    def wrong(compiler, settings):
        asked.append(settings)

        def unmasked(query, key, value, *, block_mask, **rest):
            return flex_attention(query, key, value, **rest)

        return unmasked

    monkeypatch.setattr(flex_kernel, "compiled", wrong)
    flex_kernel.kernel_for.cache_clear()
    with pytest.warns(UserWarning, match="FlexAttention is not used on cpu .* wrong by"):
        assert flex_kernel.kernel_for(CPU, HEADS) is None
    assert asked == list(flex_kernel.SETTINGS)
    flex_kernel.kernel_for.cache_clear()


def test_where_more_memory_is_asked_than_a_card_has_less_is_asked(monkeypatch) -> None:
    def choosy(compiler, settings):
        def kernel(*arguments, **options):
            if not settings:
                raise RuntimeError("out of resource: shared memory")
            return flex_attention(*arguments, **options)

        return kernel

    monkeypatch.setattr(flex_kernel, "compiled", choosy)
    flex_kernel.kernel_for.cache_clear()
    kernel = flex_kernel.kernel_for(CPU, HEADS)
    assert kernel is not None
    assert flex_kernel.difference(CPU, kernel, HEADS) <= 0.05
    flex_kernel.kernel_for.cache_clear()


def test_what_cannot_be_compiled_goes_by_parts(random_layout, monkeypatch) -> None:
    layout = random_layout("single_video", 100, 2)
    monkeypatch.setattr(flex_kernel, "possible_on", lambda device: True)
    monkeypatch.setattr(backends, "MANY_PARTS", 0)
    flex_kernel.kernel_for.cache_clear()
    view = backends.plan_view(layout, None, ((60, 100),), 60, CPU)
    assert view.blocks is not None
    generator = torch.Generator().manual_seed(3)
    query = numbers(generator, 2, 4, 40, 16, dtype=torch.float32)
    own = tuple(numbers(generator, 2, 2, 40, 16, dtype=torch.float32) for _ in range(2))
    shared = tuple(numbers(generator, 1, 2, 60, 16, dtype=torch.float32) for _ in range(2))
    with pytest.warns(UserWarning, match="is not used on cpu"):  # no such kernel on a CPU
        out = backends.attend(view, query, own, shared, 0.25)
    assert torch.equal(out, sdpa.attend(view.reads, query, own, shared, 0.25))

    def given_up(*arguments, **options):
        raise flex_kernel.FailOnRecompileLimitHit("too many shapes")

    monkeypatch.setattr(flex_kernel, "kernel_for", lambda device, heads: given_up)
    with pytest.warns(UserWarning, match="too many shapes; going by parts"):
        again = backends.attend(view, query, own, shared, 0.25)
    assert torch.equal(again, out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_backend_on_a_gpu(dtype) -> None:
    heads = flex_kernel.Heads(n=16, kv=2, size=128, dtype=dtype)
    assert flex_kernel.kernel_for(torch.device("cuda"), heads) is not None
