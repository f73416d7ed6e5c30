"""How much faster the engine is than the plain way, both timed in one run on one machine.

    python benchmarks/engine_vs_plain.py [--layers 12 --hidden 256 --tokens 1024 ...] [--json FILE]

The plain way is `workers/engine/reference.py`: one unmodified forward a (pathway, centre layer).
Its passes take the same time whatever they block, so `--plain-passes` of them are timed a pathway
and their mean is scaled to all; `agreement` is the largest difference of a probability over those
passes. The model is random: what it computes has no meaning, how long it takes has.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch
from torch import Tensor

from avflow.pathways import catalogue
from avflow.pathways.groups import group_positions, members, positions
from avflow.pathways.layout import Layout, Segment, SegmentKind
from avflow.pathways.pathway import Pathway, blocked_segments, first_target
from avflow.workers.engine import reference
from avflow.workers.engine.baseline import run_baseline
from avflow.workers.engine.cost import Shapes, plain_cost, replay_cost
from avflow.workers.engine.masks import suffix_masks
from avflow.workers.engine.plan import Knockout, compose_batches, score_bytes
from avflow.workers.engine.replay import replay
from avflow.workers.models.base import Decoder, Embedded

ALONE = ("question_to_last", "video_to_true_option", "video_to_question", "cross_frame")
COLUMNS = ("pathways", "forwards", "engine_s", "plain_s", "engine_over_plain",
           "flops_over_plain", "agreement")  # fmt: skip
Result = TypeVar("Result")
Outputs = dict[tuple[str, int], Tensor]  # (pathway, centre layer) -> probabilities [V]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A random model and prompt, and how to run them."""

    hf_model: Any
    layout: Layout
    embedded: Embedded
    shapes: Shapes
    window: int
    byte_budget: int
    plain_passes: int
    device: torch.device


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    case = build_case(options)
    by_name = {p.name: p for p in catalogue.SINGLE_VIDEO}
    results = [compare(case, [by_name[name]]) for name in ALONE]
    results.append(compare(case, catalogue.SINGLE_VIDEO))
    print_table(results)
    report = {"device": name_of(case.device), "torch": torch.__version__, **vars(options)}
    text = json.dumps({**report, "results": results}, indent=1)
    if options.json:
        Path(options.json).write_text(text + "\n")
    else:
        print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Engine against plain forwards, in one run.")
    whole = {"layers": 12, "hidden": 256, "intermediate": 1024, "heads": 8, "kv-heads": 2,
             "vocabulary": 2000, "tokens": 1024, "question": 96, "chunks": 8, "window": 7,
             "threads": 1, "budget-mib": 256, "plain-passes": 2}  # fmt: skip
    for name, default in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the report here instead of printing it")
    return parser.parse_args()


def build_case(options: argparse.Namespace) -> Case:
    layout = build_layout(options.tokens, options.question, options.chunks)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    model = build_model(options).to(device=device, dtype=dtype).eval()
    n = layout.n_tokens
    embedded = Embedded(
        inputs_embeds=torch.randn(1, n, options.hidden).to(device=device, dtype=dtype),
        position_ids=torch.arange(n, device=device).expand(3, 1, n),
        attention_mask=torch.ones(1, n, dtype=torch.int64, device=device),
        input_ids=torch.zeros(1, n, dtype=torch.int64, device=device),
    )
    shapes = Shapes(
        n_layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_size=options.hidden // options.heads,
        intermediate=options.intermediate,
        vocabulary=options.vocabulary,
        n_tokens=n,
        item_bytes=dtype.itemsize,
    )
    return Case(
        hf_model=model,
        layout=layout,
        embedded=embedded,
        shapes=shapes,
        window=options.window,
        byte_budget=options.budget_mib * 2**20,
        plain_passes=options.plain_passes,
        device=device,
    )


def build_model(options: argparse.Namespace) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    third = options.hidden // options.heads // 6
    sections = [options.hidden // options.heads // 2 - 2 * third, third, third]
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": options.vocabulary,
            "hidden_size": options.hidden,
            "intermediate_size": options.intermediate,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": sections,
            },
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16},
        audio_config={"encoder_layers": 1, "d_model": 16, "encoder_attention_heads": 1},
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def build_layout(n_tokens: int, question: int, chunks: int) -> Layout:
    """A system prompt, chunks of four parts video and one part sound, a question with options."""
    sound = (n_tokens - 16 - question) // (5 * chunks)
    parts: list[tuple[SegmentKind, int, int | None]] = []
    for i in range(chunks):
        parts += [("frame", 4 * sound, i), ("audio_chunk", sound, i)]
    parts.append(("non_option_question", question - 29, None))
    for i in range(4):
        parts += [("option_letter", 1, i), ("option_text", 5, i)]
    parts += [("template", 4, None), ("last", 1, None)]
    parts.insert(0, ("system", n_tokens - sum(length for _, length, _ in parts), None))
    segments, at = [], 0
    for kind, length, index in parts:
        segments.append(Segment(kind=kind, start=at, stop=at + length, index=index))
        at += length
    return Layout(kind="single_video", n_tokens=at, segments=tuple(segments), answer=1)


def compare(case: Case, pathways: Sequence[Pathway]) -> dict[str, Any]:
    """A line of the table: these pathways at every centre, the baseline included."""
    forwards = 1 + len(pathways) * case.shapes.n_layers
    engine(case, pathways)  # once to warm up
    engine_s, (outputs, flops) = timed(case, lambda: engine(case, pathways))
    passes = [plain(case, pathway, outputs) for pathway in pathways]
    plain_s = mean(seconds for seconds, _ in passes) * forwards
    return {
        "pathways": pathways[0].name if len(pathways) == 1 else f"all {len(pathways)}",
        "forwards": forwards,
        "engine_s": round(engine_s, 4),
        "plain_s": round(plain_s, 4),
        "engine_over_plain": round(engine_s / plain_s, 6),
        "flops_over_plain": round(flops / plain_cost(case.shapes, forwards).flops, 6),
        "agreement": max(difference for _, difference in passes),
    }


def engine(case: Case, pathways: Sequence[Pathway]) -> tuple[Outputs, float]:
    """Every (pathway, centre layer), and the FLOPs it took."""
    text = case.hf_model.get_decoder()
    decoder = Decoder(
        layers=list(text.layers),
        rotary=text.rotary_emb,
        norm=text.norm,
        lm_head=case.hf_model.lm_head,
        config=text.config,
    )
    knockouts = [as_knockout(case, pathway) for pathway in pathways]
    start = min(k.start for k in knockouts if k.start is not None)
    baseline = run_baseline(decoder, case.embedded, start)
    scores, cost = score_bytes(case.byte_budget), plain_cost(case.shapes)
    outputs: Outputs = {}
    for batch in compose_batches(knockouts, case.shapes, case.byte_budget):
        blocked = {row.curve: knockouts[row.curve].blocked for row in batch.rows}
        masks = suffix_masks(case.layout, batch.start, blocked, case.device)
        rows = replay(decoder, baseline, batch.rows, masks, scores)
        cost += replay_cost(case.shapes, batch.start, batch.rows, scores)
        for row, probabilities in zip(batch.rows, rows, strict=True):
            outputs[pathways[row.curve].name, row.center_layer] = probabilities
    return outputs, cost.flops


def as_knockout(case: Case, pathway: Pathway) -> Knockout:
    blocked = blocked_segments(case.layout, pathway)
    return Knockout(
        blocked=blocked,
        start=first_target(case.layout, blocked),
        window=case.window,
        center_layers=tuple(range(case.shapes.n_layers)),
    )


def plain(case: Case, pathway: Pathway, outputs: Outputs) -> tuple[float, float]:
    """Mean seconds of a plain pass, and the largest difference from the engine's probabilities."""
    inputs = reference.Inputs(
        inputs_embeds=case.embedded.inputs_embeds,
        position_ids=case.embedded.position_ids,
        attention_mask=case.embedded.attention_mask,
    )
    edges, spent, difference = plain_edges(case.layout, pathway), [], 0.0
    step = max(1, case.shapes.n_layers // case.plain_passes)
    for center in range(case.shapes.n_layers)[::step][: case.plain_passes]:
        seconds, probabilities = timed(
            case,
            lambda center=center: reference.knockout_probabilities(
                case.hf_model, inputs, edges, center, case.window
            ),
        )
        spent.append(seconds)
        ours = outputs[pathway.name, center]
        difference = max(difference, float((probabilities - ours).abs().max()))
    return mean(spent), difference


def plain_edges(layout: Layout, pathway: Pathway) -> Tensor:
    if pathway.direction == "across":
        held = [m for name in pathway.sources for m in members(layout, name)]
        return reference.edges_across(
            layout.n_tokens, [positions(layout, m).tolist() for m in held]
        )
    sources, targets = (
        [int(p) for name in names for p in group_positions(layout, name)]
        for names in (pathway.sources, pathway.targets)
    )
    both_ways = pathway.direction == "both_ways"
    return reference.edges_between(layout.n_tokens, sources, targets, both_ways=both_ways)


def timed(case: Case, work: Callable[[], Result]) -> tuple[float, Result]:
    began = time.perf_counter()
    result = work()
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    return time.perf_counter() - began, result


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def print_table(results: Sequence[dict[str, Any]]) -> None:
    rows = [COLUMNS, *(tuple(str(row[name]) for name in COLUMNS) for row in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
