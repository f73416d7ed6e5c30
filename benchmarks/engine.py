"""The engine against the peers' way and the strongest plain way, in one run, as ratios.

    python benchmarks/engine.py --quick --json FILE     about a minute on two cores
    python benchmarks/engine.py                         how it grows with N, L and pathways, too

For each pathway (every centre layer, the baseline given) and for the panel of all 22 (prefill
included): `speedup` over the plain way, its least and greatest over the repeats, `peers_speedup`,
and `bound`, the most that can be asked for: the ratio of token-layers that causality leaves; or,
where one position or a few are replayed, so that time goes into reading weights, the plain way's
time over twice the time of reading the replayed layers' weights, if that is less. `products_s` is
what the layers' bare matrix products take on these few rows, by the same library. A plain pass
takes the same time whatever it blocks, so it is timed before and after each run of the engine,
and multiplied; the peers' pass is timed against it, pair by pair.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bounds import executed, floor, plain, prefill_cost, products, read_weights
from cases import (
    BY_NAME,
    PANEL,
    SMALL_AUDIO,
    SMALL_VISION,
    Case,
    Size,
    build,
    dense_mask,
    eager,
    encode,
    engine,
    naive_pass,
    peers_pass,
    plan,
    prefill,
    seconds,
)

from avflow.pathways.pathway import Pathway

ALONE = ("video_to_question", "audio_video_mutual", "audio_to_video", "cross_frame",
         "video_to_true_option", "question_to_last")  # fmt: skip
BY_WEIGHTS = ("true_option", "last")  # targets that are so few that weights are what is read
QUICK = Size(
    layers=18, hidden=320, intermediate=1280, heads=5, kv_heads=1, vocabulary=4000,
    vision=SMALL_VISION, audio=SMALL_AUDIO, chunks=3, pair_patches=(10, 16), sound=16,
    question=96, window=5, byte_budget=2**29,
)  # fmt: skip


def main() -> None:
    options = _options()
    _keep_memory()
    torch.set_num_threads(options.threads)
    case = build(QUICK, torch.float32, torch.device("cpu"))
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "tokens": case.layout.n_tokens,
        "layers": QUICK.layers,
    }
    report.update(compare(case, repeats=1 if options.quick else 5))
    if not options.quick:
        report["growth"] = growth()
    show(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine against plain forwards, in one run.")
    parser.add_argument("--quick", action="store_true", help="one size, within about a minute")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for all ways alike")
    parser.add_argument("--json", help="also write the numbers to this file")
    return parser.parse_args()


def _keep_memory() -> None:
    """Start again with an allocator that keeps what is freed: else fresh pages for each large
    tensor are what a plain pass on a CPU waits for, and every way is to be timed at its best."""
    if "GLIBC_TUNABLES" not in os.environ:
        tunables = ("mmap_threshold=4294967296", "trim_threshold=68719476736")
        os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{each}" for each in tunables)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """`pathways.NAME.{speedup, bound, ...}`, `panel.{speedup, bound, flops_over_bound, ...}`."""
    peers_over_naive, agreement = _warm_up(case, repeats)
    pathways = {name: _pathway(case, BY_NAME[name], repeats) for name in ALONE}
    panel = _panel(case, max(1, repeats // 2))
    for row in (*pathways.values(), panel):
        row["peers_speedup"] = row["speedup"] * peers_over_naive
    return {
        "pathways": pathways,
        "panel": panel,
        "peers_over_naive": peers_over_naive,
        "agreement": agreement,
    }


def _warm_up(case: Case, repeats: int) -> tuple[float, float]:
    """How much longer the peers' pass takes than the plain one, pair by pair; and the largest
    difference of a probability between the engine and the plain way, where both ran."""
    ratios, difference = [], 0.0
    for name in ("video_to_question", "cross_frame"):
        mask, job = dense_mask(case, BY_NAME[name]), plan(case, [BY_NAME[name]])
        found = engine(case, job, prefill(case, job))
        for center in range(0, case.size.layers, max(1, case.size.layers // (1 + repeats))):
            naive_s, answer = seconds(case, lambda c=center, m=mask: naive_pass(case, m, c))
            difference = max(difference, float((answer - found[name, center]).abs().max()))
            with eager(case):
                peers_s, _ = seconds(case, lambda c=center, m=mask: peers_pass(case, m, c))
            ratios.append(peers_s / naive_s)
    return median(ratios), difference


def _pathway(case: Case, pathway: Pathway, repeats: int) -> dict[str, Any]:
    job = plan(case, [pathway])
    baseline = prefill(case, job)
    forwards = case.size.layers
    engine(case, job, baseline)  # once to warm up
    row = _paired(case, lambda: engine(case, job, baseline), forwards, repeats)
    least = floor(case, job)
    row["bound"] = plain(case, forwards).token_layers / least.token_layers
    row["bound_by"] = "token-layers"
    if set(pathway.targets) <= set(BY_WEIGHTS):
        row["products_s"] = products(case, job)
        row["read_weights_s"] = sum(read_weights(case, batch.first_layer) for batch in job.batches)
        by_weights = row["plain_s"] / (2 * row["read_weights_s"])
        if by_weights < row["bound"]:
            row["bound"], row["bound_by"] = by_weights, "weights"
    row["flops_over_bound"] = executed(case, job).flops / least.flops
    return row


def _panel(case: Case, repeats: int) -> dict[str, Any]:
    job = plan(case, PANEL)
    forwards = 1 + len(PANEL) * case.size.layers

    def whole() -> None:
        encode(case)
        engine(case, job, prefill(case, job))

    row = _paired(case, whole, forwards, repeats)
    least = prefill_cost(case) + floor(case, job)
    done = prefill_cost(case) + executed(case, job)
    row["bound"] = plain(case, forwards).token_layers / least.token_layers
    row["bound_by"] = "token-layers"
    row["flops_over_bound"] = done.flops / least.flops
    return row


def _paired(case: Case, work: Callable[[], object], forwards: int, repeats: int) -> dict[str, Any]:
    """Plain passes right before and after each run of the engine: a machine's speed drifts."""
    mask = dense_mask(case, BY_NAME["audio_video_mutual"])
    center = case.size.layers // 2
    plain_s, engine_s = [], []
    for _ in range(repeats):
        around = [seconds(case, lambda: naive_pass(case, mask, center))[0]]
        engine_s.append(seconds(case, work)[0])
        around.append(seconds(case, lambda: naive_pass(case, mask, center))[0])
        plain_s.append(forwards * sum(around) / 2)
    ratios = [theirs / ours for theirs, ours in zip(plain_s, engine_s, strict=True)]
    return {
        "forwards": forwards,
        "engine_s": median(engine_s),
        "plain_s": median(plain_s),
        "speedup": median(ratios),
        "speedup_least": min(ratios),
        "speedup_greatest": max(ratios),
    }


def growth() -> list[dict[str, Any]]:
    """Ratios as the prompt, the model and the number of pathways grow."""
    sizes = {
        **{f"N, {chunks} chunks": replace(QUICK, chunks=chunks) for chunks in (2, 3, 6, 12)},
        **{f"L, {layers} layers": replace(QUICK, layers=layers) for layers in (6, 9, 18, 27)},
    }
    rows = []
    for name, size in sizes.items():
        case = build(size, torch.float32, torch.device("cpu"))
        rows.append({"grows": name, **_grown(case, [BY_NAME["video_to_question"]])})
    case = build(QUICK, torch.float32, torch.device("cpu"))
    for number in (1, 5, 22):
        text = PANEL[::-1][:number]
        rows.append({"grows": f"pathways, {number}", **_grown(case, text)})
    return rows


def _grown(case: Case, pathways: Sequence[Pathway]) -> dict[str, Any]:
    job = plan(case, pathways)
    forwards = 1 + len(pathways) * case.size.layers
    row = _paired(case, lambda: engine(case, job, prefill(case, job)), forwards, 2)
    least = prefill_cost(case) + floor(case, job)
    row["bound"] = plain(case, forwards).token_layers / least.token_layers
    return {"tokens": case.layout.n_tokens, "layers": case.size.layers, **row}


def show(report: dict[str, Any]) -> None:
    """The table, for people."""
    print(f"{report['tokens']} tokens, {report['layers']} layers, {report['machine']}")
    print(f"{'':24}{'speedup':>9}{'least':>8}{'most':>8}{'bound':>9}{'of bound':>10}{'peers':>9}")
    for name, row in [*report["pathways"].items(), ("panel", report["panel"])]:
        print(
            f"{name:24}{row['speedup']:9.2f}{row['speedup_least']:8.2f}"
            f"{row['speedup_greatest']:8.2f}{row['bound']:9.2f}"
            f"{row['speedup'] / row['bound']:9.0%}{row['peers_speedup']:10.2f}  {row['bound_by']}"
        )
        if "products_s" in row:
            share, reads = (row[k] / row["engine_s"] for k in ("products_s", "read_weights_s"))
            print(
                f"{'':24}  {share:.0%} of its time is the bare matrix products of its rows; "
                f"reading the weights alone takes {reads:.0%}"
            )
    print(f"panel: executed FLOPs {report['panel']['flops_over_bound']:.3f} x the bound; "
          f"largest difference of a probability {report['agreement']:.1e}")  # fmt: skip
    for row in report.get("growth", ()):
        print(
            f"{row['grows']:24}{row['speedup']:9.2f}{row['bound']:25.2f}"
            f"{row['speedup'] / row['bound']:9.0%}  N={row['tokens']} L={row['layers']}"
        )


if __name__ == "__main__":
    main()
