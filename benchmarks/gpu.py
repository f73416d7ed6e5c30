"""The engine on one GPU at the true shapes of the 3B and 7B models, with random weights.

    python benchmarks/gpu.py --json FILE [--models 3b 7b] [--repeats 2]

Needs torch and transformers alone. Reports: bfloat16 against float32 over 50 random prompts, the
engine's distance beside the plain pass's; speedups and bounds at about 11,000 tokens, as
`benchmarks/engine.py` defines them; prefill with tokens discarded; peak memory with the whole card
and held to 24 GB.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import (
    PANEL,
    REAL_AUDIO,
    REAL_VISION,
    SMALL_AUDIO,
    SMALL_VISION,
    Case,
    Size,
    build,
    dense_mask,
    encode,
    engine,
    naive_pass,
    plan,
    prefill,
    seconds,
)
from discard import latency
from discard import show as show_latency
from engine import compare, show

from avflow.pathways import catalogue
from avflow.workers.engine.flex_kernel import Heads, difference, kernel_for
from avflow.workers.engine.memory import peak_bytes

PROMPT: dict[str, Any] = {"chunks": 32, "pair_patches": (24, 24), "sound": 50, "question": 200}
SIZES = {
    "3b": Size(layers=36, hidden=2048, intermediate=11008, heads=16, kv_heads=2, vocabulary=151936,
               vision=REAL_VISION, audio=REAL_AUDIO, **PROMPT),
    "7b": Size(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, vocabulary=152064,
               vision=REAL_VISION, audio=REAL_AUDIO, **PROMPT),
}  # fmt: skip
SMALL = Size(
    layers=12, hidden=1024, intermediate=4096, heads=8, kv_heads=2, vocabulary=8000,
    vision=SMALL_VISION, audio=SMALL_AUDIO, chunks=6, pair_patches=(12, 12), sound=24, question=96,
)  # fmt: skip
GB = 10**9


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; benchmarks/engine.py does not")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    report: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flex": flex(device),
        "bfloat16": precision(device),
    }
    _save(report, options.json)
    for name in options.models:
        report[name] = at_true_shape(SIZES[name], device, options.repeats)
        _save(report, options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine on a GPU at the true shapes.")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", required=True, help="written as results come in")
    return parser.parse_args()


def _save(report: dict[str, Any], path: str) -> None:
    Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


def flex(device: torch.device) -> dict[str, float | None]:
    """By model: how far the compiled FlexAttention is from the parts, None where it is not used."""
    found = {}
    for name, size in SIZES.items():
        head = size.hidden // size.heads
        heads = Heads(n=size.heads, kv=size.kv_heads, size=head, dtype=torch.bfloat16)
        kernel = kernel_for(device, heads)
        found[name] = None if kernel is None else difference(device, kernel, heads)
    return found


def precision(device: torch.device, prompts: int = 50) -> dict[str, float]:
    """Distances of the base token's probability to the float32 answer, relative, as medians."""
    mine, theirs, agreement = [], [], 0.0
    rng = random.Random(0)
    for seed in range(prompts):
        coarse = build(SMALL, torch.bfloat16, device, seed)
        exact = _in_float32(coarse, device, seed)
        pathway, center = rng.choice(PANEL), rng.randrange(SMALL.layers)
        truth = naive_pass(exact, dense_mask(exact, pathway), center)
        token = int(truth.argmax())
        job = plan(exact, [pathway])
        answer = engine(exact, job, prefill(exact, job))[pathway.name, center]
        agreement = max(agreement, float((answer - truth).abs().max()))
        fast = engine(coarse, job, prefill(coarse, job))[pathway.name, center]
        plain = naive_pass(coarse, dense_mask(coarse, pathway), center)
        for found, distances in ((fast, mine), (plain, theirs)):
            distances.append(abs(float(found[token] / truth[token]) - 1))
    return {
        "prompts": prompts,
        "engine": median(mine),
        "plain": median(theirs),
        "engine_over_plain": median(mine) / median(theirs),
        "float32_agreement": agreement,
    }


def _in_float32(coarse: Case, device: torch.device, seed: int) -> Case:
    """The same numbers with room to spare."""
    exact = build(SMALL, torch.float32, device, seed)
    exact.hf_model.load_state_dict(coarse.hf_model.state_dict())
    embeds = coarse.embedded.inputs_embeds.float()
    return replace(exact, embedded=replace(exact.embedded, inputs_embeds=embeds))


def at_true_shape(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Speedups, and peak memory of the whole panel, free and held to 24 GB."""
    case = build(size, torch.bfloat16, device)
    weights = sum(p.numel() * p.element_size() for p in case.hf_model.parameters())
    computed = peak_bytes(case.shapes, weights, size.byte_budget)
    row: dict[str, Any] = {"weights_gb": weights / GB, "computed_peak_gb": computed / GB}
    row["free"] = _panel_memory(case)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * GB / total), device)
    row["held_to_24_gb"] = _panel_memory(case)
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    row.update(compare(case, repeats))
    row["tokens"], row["layers"] = case.layout.n_tokens, size.layers
    row["machine"] = torch.cuda.get_device_name(device)
    row["discard"] = latency(case, repeats)
    show(row)
    show_latency(case, row["discard"])
    return row


def _panel_memory(case: Case) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    job = plan(case, catalogue.SINGLE_VIDEO)

    def whole() -> None:
        encode(case)
        engine(case, job, prefill(case, job))

    took, _ = seconds(case, whole)
    return {"panel_s": took, "peak_gb": torch.cuda.max_memory_allocated() / GB}


if __name__ == "__main__":
    main()
