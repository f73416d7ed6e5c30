"""In bfloat16 the engine is as near to the float32 answer as the plain bfloat16 pass is."""

import random
from dataclasses import replace
from statistics import median

import pytest
import torch
from engine_ways import fast, of_kind, plain, reference_edges

from avflow.workers.models.base import Embedded

NEAR = 1.1
"""Of the plain pass's median distance."""


def distances(tiny_thinker, random_layout, random_embedded, prompts: int, device: str):
    """Relative distances of the top token's probability to float32: the engine's, the plain's.

    Weights of the usual spread: at ten times that, a rounding anywhere changes the answer."""
    mine, theirs = [], []
    rng = random.Random(0)
    for seed in range(prompts):
        shape = {"hidden": 128, "heads": 4, "kv_heads": 2, "seed": seed}
        coarse, exact = (tiny_thinker(dtype=t, **shape) for t in ("bfloat16", "float32"))
        with torch.no_grad():
            pairs = zip(coarse.hf_model.parameters(), exact.hf_model.parameters(), strict=True)
            for ours, full in pairs:
                ours.mul_(0.3 if ours.ndim > 1 else 1)
                full.copy_(ours.float())
        # Casting a model casts its rotary frequencies too, which a loaded checkpoint keeps.
        coarse.decoder.rotary.inv_freq = exact.decoder.rotary.inv_freq.clone()
        coarse.hf_model.to(device)
        exact.hf_model.to(device)
        layout = random_layout("single_video", 200, seed)
        made = random_embedded(layout, coarse, seed)
        given = Embedded(
            inputs_embeds=made.inputs_embeds.to(device),
            position_ids=made.position_ids.to(device),
            attention_mask=made.attention_mask.to(device),
            input_ids=made.input_ids.to(device),
        )
        in_full = replace(given, inputs_embeds=given.inputs_embeds.float())
        pathway, centers = rng.choice(of_kind(layout)), rng.sample(range(8), 2)
        edges = reference_edges(layout, pathway)
        truth = plain(exact, in_full, edges, centers, 3)
        fine = plain(coarse, given, edges, centers, 3)
        ours = fast(coarse, given, layout, [pathway], 3)[pathway.name][centers]
        for row, token in enumerate(truth.argmax(-1).tolist()):
            mine.append(float((ours[row, token] / truth[row, token] - 1).abs()))
            theirs.append(float((fine[row, token] / truth[row, token] - 1).abs()))
    return mine, theirs


@pytest.mark.slow
def test_as_near_as_the_plain_pass(tiny_thinker, random_layout, random_embedded) -> None:
    torch.set_num_threads(1)
    mine, theirs = distances(tiny_thinker, random_layout, random_embedded, 50, "cpu")
    assert 0 < median(mine) <= NEAR * median(theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_as_near_as_the_plain_pass_on_a_gpu(tiny_thinker, random_layout, random_embedded) -> None:
    mine, theirs = distances(tiny_thinker, random_layout, random_embedded, 50, "cuda")
    assert 0 < median(mine) <= NEAR * median(theirs)
