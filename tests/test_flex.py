"""FlexAttention with a compiler: one compilation for every prompt, and blocks that miss nothing."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from avflow.pathways import catalogue
from avflow.pathways.layout import Layout
from avflow.pathways.pathway import blocked_segments, first_target
from avflow.workers.engine import flex, flex_kernel, sdpa
from avflow.workers.engine.reads import Span, plan_reads
from avflow.workers.engine.rows import target_spans

CPU = torch.device("cpu")
SINGLE = [p for p in catalogue.ALL if p.layout == "single_video"]


def asked(layout: Layout, number: int, joining: bool) -> tuple[np.ndarray, tuple[Span, ...], int]:
    """A pathway's blocked segments, the positions that are asked for, and where own keys begin."""
    blocked = blocked_segments(layout, SINGLE[number])
    start = first_target(layout, blocked)
    assert start is not None
    if joining:
        return blocked, target_spans(layout, blocked, start), layout.n_tokens
    return blocked, ((start, layout.n_tokens),), start


def test_one_compilation_serves_prompts_pathways_and_rows(random_layout) -> None:
    """torch gives up after eight, and would go by parts from there on. Captured as for a GPU, with
    lengths left open, and run without the last step, for which a GPU is needed."""
    torch._dynamo.reset()
    counters.clear()
    kernel = flex_kernel.compiled("aot_eager", {})
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for seed, n, rows in ((1, 150, 1), (2, 317, 2), (3, 290, 5), (4, 700, 1), (5, 512, 3)):
        layout = random_layout("single_video", n, seed)
        for number in (seed, seed + 7, seed + 14):
            for joining in (True, False):
                blocked, spans, own_from = asked(layout, number, joining)
                q, m = sum(b - a for a, b in spans), n - own_from
                query = numbers(rows, 4, q, 16)
                own = (numbers(rows, 2, m, 16), numbers(rows, 2, m, 16))
                shared = (numbers(1, 2, n, 16), numbers(1, 2, n, 16))
                parts = plan_reads(layout, blocked, spans, own_from, CPU)
                blocks = flex.plan_blocks(layout, blocked, spans, own_from, CPU)
                theirs = flex.attend(blocks, query, own, shared, scale=0.25, kernel=kernel)
                mine = sdpa.attend(parts, query, own, shared, 0.25)
                assert (mine - theirs).abs().max() <= 3e-6
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    number=st.integers(0, len(SINGLE) - 1),
    joining=st.booleans(),
    rows=st.integers(1, 3),
)
def test_listed_blocks_hold_what_the_mask_leaves_open(
    random_layout, seed: int, number: int, joining: bool, rows: int
) -> None:
    """A GPU reads the listed blocks alone, and asks the mask in none that is listed as full; a CPU
    asks the mask everywhere. Both must be the same edges."""
    layout = random_layout("single_video", 500, seed)
    blocked, spans, own_from = asked(layout, number, joining)
    blocks = flex.plan_blocks(layout, blocked, spans, own_from, CPU)
    for side, apart in ((blocks.own, True), (blocks.shared, False)):
        if side is None:
            continue
        mask = flex._block_mask(side, rows, apart)
        queries, keys = (torch.arange(n) for n in mask.seq_lengths)
        open_edges = mask.mask_mod(None, None, queries[:, None], keys)
        n_blocks = (len(queries) // flex.BLOCK, len(keys) // flex.BLOCK)
        mixed = listed(mask.kv_num_blocks, mask.kv_indices, n_blocks)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, n_blocks)
        by_block = open_edges.view(n_blocks[0], flex.BLOCK, n_blocks[1], flex.BLOCK)
        assert not (mixed & full).any()
        assert by_block.permute(0, 2, 1, 3)[full].all()
        assert not by_block.permute(0, 2, 1, 3)[~(mixed | full)].any()


def listed(counts: Tensor, which: Tensor, shape: tuple[int, int]) -> Tensor:
    """bool [query blocks, key blocks]."""
    chosen = torch.zeros(shape, dtype=torch.bool)
    for block, (count, columns) in enumerate(zip(counts[0, 0], which[0, 0], strict=True)):
        chosen[block, columns[: int(count)].long()] = True
    return chosen
