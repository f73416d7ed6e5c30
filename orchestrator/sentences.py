"""What was found, in sentences: how large, on how many samples, how sure, at which layers.

Nothing here decides: the verdicts are those of `findings`, the accuracies those of `accuracy`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import polars as pl

from avflow.orchestrator.findings import THRESHOLD, verdicts
from avflow.pathways import catalogue
from avflow.pathways.pathway import Pathway

FEW: Final = 20
"""Percentile bands of fewer videos than this are noticeably too narrow."""
MOST_SINKS: Final = 4

_SPOKEN: Final = {
    "last": "the last token",
    "question": "the question",
    "non_option_question": "the question without its options",
    "true_option": "the letter of the right option",
    "false_options": "the letters of the wrong options",
    "correct_option": "the letter of the right option",
    "incorrect_options": "the letters of the wrong options",
    "correct_candidate": "the right candidate",
    "incorrect_candidates": "the wrong candidates",
}
_MEMBERS: Final = {"video": "frames", "audio": "chunks of sound", "candidates": "candidates"}


def spoken(pathway: Pathway) -> str:
    """What blocking it means: `the question can't read the video`."""
    sources, targets = _joined(map(_group, pathway.sources)), _joined(map(_group, pathway.targets))
    match pathway.direction:
        case "one_way":
            return f"{targets} can't read {sources}"
        case "both_ways":
            return f"{sources} and {targets} can't read each other"
        case "across":
            members = _joined(_MEMBERS.get(name, name) for name in pathway.sources)
            return f"{members} can't read each other"


def _group(name: str) -> str:
    return _SPOKEN.get(name, f"the {name.replace('_', ' ')}")


def curve_sentences(
    curves: pl.DataFrame, own: Sequence[Pathway] = (), names: Sequence[str] | None = None
) -> list[str]:
    """A sentence a pathway, of curves of one model, data set, variant and window or of a figure's
    panels; in the order of `names`, or of the catalogue. Layers are window centres.
    """
    known = {pathway.name: pathway for pathway in (*catalogue.ALL, *own)}
    found = verdicts(curves)
    order = [name for name in names or known if name in set(found["pathway"])]
    lines = []
    for name in dict.fromkeys(order):
        rows = list(found.filter(pathway=name).iter_rows(named=True))
        head = f"{known[name].label}: if {spoken(known[name])}, "
        lines.append(head + "; ".join(_clauses(rows)) + ".")
    return [*lines, *few_words(curves)]


def few_words(curves: pl.DataFrame) -> list[str]:
    """What to keep in mind of curves of few videos; nothing where each has enough."""
    few = curves["videos"].min()
    if not isinstance(few, int) or few >= FEW:
        return []
    return [
        f"Some of these curves stand on {few} {'video' if few == 1 else 'videos'}: bands of "
        f"fewer than {FEW} are too narrow, and of so few the absence of an effect says little."
    ]


def sweep_sentences(curves: pl.DataFrame, own: Sequence[Pathway] = ()) -> list[str]:
    """Those of all curves; where there is more than one model, data set, window or variant, a
    heading that ends with a colon stands before those of each."""
    scope = ("model", "dataset", "window", "variant")
    parts = curves.sort(scope).partition_by(scope, as_dict=True, maintain_order=True)
    lines = []
    for (model, dataset, window, variant), part in parts.items():
        if len(parts) > 1:
            lines.append(f"{model}, {dataset}, window {window} ({variant}):")
        lines += curve_sentences(part, own)
    return lines


def attention_sentences(table: pl.DataFrame) -> list[str]:
    """Of the shares that Fig. 1, left, draws: `layer`, `group`, `share` and `n`."""
    if table.is_empty():
        return []
    top = table.sort("share", descending=True).unique("group", keep="first", maintain_order=True)
    last = table.filter(pl.col("layer") == pl.col("layer").max()).sort("share", descending=True)
    most = _joined(
        f"{_named(r['group'])} at layer {r['layer']} ({r['share']:.0%})"
        for r in top.iter_rows(named=True)
    )
    ends = _joined(f"{r['share']:.0%} to {_named(r['group'])}" for r in last.iter_rows(named=True))
    return [
        f"Mean over {max(table['n'].to_list())} samples, right or wrong: the last token attends "
        f"most to {most}. In the last layer it gives {ends}."
    ]


def _named(group: str) -> str:
    return group.replace("_", " ")


def portrait_sentences(probe: str, rows: pl.DataFrame) -> list[str]:
    """Of a map, norms or sinks of one sample; `rows` of the `probes` table."""
    held = rows.filter(probe=probe)
    if held.is_empty():
        return []
    lines = [
        f"This is one sample ({held['sample_id'][0]}), drawn by the sweep's seed: what it shows "
        "is not known to hold for others."
    ]
    if probe == "sinks" and held["position"].drop_nulls().is_empty():
        layers = _joined(map(str, sorted(set(held["layer"]))))
        lines.append(f"No token of it is a sink where it enters layer {layers}.")
    sinks = rows.filter(pl.col("position").is_not_null(), probe="sinks")
    of_layer = sinks.sort("layer", "position", "value", descending=[False, False, True])
    for (layer,), found in of_layer.group_by("layer", maintain_order=True):
        tokens = found.group_by("position", maintain_order=True).first()
        named = _joined(
            f"position {r['position']} ({_named(r['group'])}, largest in dimension "
            f"{r['dimension']})"
            for r in tokens.head(MOST_SINKS).iter_rows(named=True)
        )
        more = f", and {tokens.height - MOST_SINKS} more" if tokens.height > MOST_SINKS else ""
        lines.append(f"Sinks that enter layer {layer}: {named}{more}.")
    return lines


def _clauses(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What happens to the probability: falls first, the largest first."""
    by_verdict: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -abs(row["mean"])):
        by_verdict.setdefault(row["verdict"], []).append(row)
    what = "the predicted answer's probability"
    for verdict in ("falls", "rises"):
        if held := by_verdict.get(verdict):
            yield f"{what} {verdict} {_joined(_effect(row) for row in held)}"
            what = "it"
    for verdict, tell in (("unclear", _unclear), ("little", _little)):
        if held := by_verdict.get(verdict):
            yield tell(held, what)
            what = "it"
    if held := by_verdict.get("single"):
        yield f"nothing can be said of {_joined(map(_panel, held))}: one sample or video"


def _effect(row: Mapping[str, Any]) -> str:
    layers = str(row["layers"])
    where = f"effect at {'layer' if layers.isdigit() else 'layers'} {layers}"
    size = f"by {abs(row['mean']):.0%} at layer {row['center_layer']}"
    return f"for {_panel(row)} {size} ({_sure(row)}; {where})"


def _unclear(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    each = _joined(
        f"for {_panel(row)}, whose largest mean change is {row['mean']:+.0%} at layer "
        f"{row['center_layer']} ({_sure(row)})"
        for row in rows
    )
    return f"whether {what} changes is unclear {each}"


def _little(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """Small means, apart by whether the bands, too, stay within the threshold."""
    parts = []
    close = [row for row in rows if row["reach"] <= THRESHOLD]
    if close:
        parts.append(
            f"{what} changes by no more than {THRESHOLD:.0%} at any layer {_on(close)} (no band "
            f"goes beyond {_most(close)}; {_counts(close)})"
        )
    loose = [row for row in rows if row["reach"] > THRESHOLD]
    if loose:
        parts.append(
            f"no mean change over {THRESHOLD:.0%} is seen {_on(loose)}, but bands reach "
            f"{_most(loose)}, so that one is not excluded ({_counts(loose)})"
        )
    return "; ".join(parts)


def _on(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"for {_joined(sorted(map(_panel, rows)))}"


def _panel(row: Mapping[str, Any]) -> str:
    """As a sentence names it."""
    task = str(row["task"])
    if width := re.fullmatch(r"(.*?)k = (\d+)", task):
        return f"{width[1]}windows of {width[2]}"
    return {"mean of tasks": "the mean of the tasks", "pooled": "all samples pooled"}.get(
        task, task
    )


def _most(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{max(row['reach'] for row in rows):.1%}"


def _sure(row: Mapping[str, Any]) -> str:
    """Sample count, band and corrected p."""
    band = f"95% band {row['low']:+.0%} to {row['high']:+.0%}"
    return f"{band}, corrected {_p(row['q_value'])}, {_counts([row])}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    n = sorted({row["n"] for row in rows})
    text = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    if any(row["videos"] < row["n"] for row in rows):
        videos = sorted({row["videos"] for row in rows})
        text += f" of {videos[0]}" + (f" to {videos[-1]}" if len(videos) > 1 else "") + " videos"
    return text


def _joined(words: Iterable[str]) -> str:
    """`a`; `a and b`; `a, b and c`."""
    listed = list(words)
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
