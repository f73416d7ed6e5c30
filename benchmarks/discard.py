"""What discarding tokens saves of a prefill, as a ratio, beside the token-layers that it saves.

    python benchmarks/discard.py --json FILE        some two minutes on two cores

Paper section 6, Table 4: video and audio leave after layer 26 of 36, the question's text after 29;
here at the same share of the layers of a random model. Each way's prefill is timed right after the
full one, both warm, by the function that a sweep times its discards with.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cases import Case, build
from engine import QUICK

from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Positions
from avflow.workers.engine.discard import timed_prefill

MEDIA_AFTER, QUESTION_AFTER = 26 / 36, 29 / 36
LONG = replace(QUICK, chunks=12)  # 1,268 tokens, most of them media, as in the paper's prompts


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill with tokens discarded, as ratios.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = build(LONG, torch.float32, torch.device("cpu"))
    rows = latency(case, options.repeats)
    show(case, rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def ways(case: Case) -> dict[str, Mapping[int, Positions]]:
    """What leaves after which layer."""
    layers, layout = case.size.layers, case.layout
    media = np.concatenate([group_positions(layout, name) for name in ("video", "audio")])
    question = group_positions(layout, "non_option_question")
    late, later = (round(share * layers) for share in (MEDIA_AFTER, QUESTION_AFTER))
    return {
        f"media after layer {layers // 2}": {layers // 2: media},
        f"media after layer {late}": {late: media},
        f"question after layer {later}": {later: question},
        f"media after {late}, question after {later}": {late: media, later: question},
    }


def latency(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Of each way: full over discarding prefill time (`speedup`, its least and greatest), and the
    same ratio of token-layers (`bound`)."""
    full = timed_prefill(case.decoder, case.embedded, {})
    rows = []
    for name, drops in ways(case).items():
        seconds, ratios = [], []
        for _ in range(repeats):
            whole = timed_prefill(case.decoder, case.embedded, {})
            fewer = timed_prefill(case.decoder, case.embedded, drops)
            if whole.seconds and fewer.seconds:  # both were timed
                seconds.append(fewer.seconds)
                ratios.append(whole.seconds / fewer.seconds)
        row = {
            "way": name,
            "prefill_s": median(seconds),
            "speedup": median(ratios),
            "speedup_least": min(ratios),
            "speedup_greatest": max(ratios),
            "bound": full.token_layers / fewer.token_layers,
        }
        rows.append(row)
    return rows


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    """The table, for people."""
    print(f"{case.layout.n_tokens} tokens, {case.size.layers} layers")
    print(f"{'leave':36}{'prefill ms':>11}{'speedup':>9}{'least':>8}{'most':>8}{'bound':>8}")
    for row in rows:
        print(
            f"{row['way']:36}{1000 * row['prefill_s']:11.0f}{row['speedup']:9.2f}"
            f"{row['speedup_least']:8.2f}{row['speedup_greatest']:8.2f}{row['bound']:8.2f}"
        )


if __name__ == "__main__":
    main()
