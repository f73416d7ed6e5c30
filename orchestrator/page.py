"""The report as one HTML page that needs nothing else: figures as SVG, tables, words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import polars as pl

from avflow.orchestrator.findings import LEVEL, THRESHOLD, evidence
from avflow.orchestrator.tables import Table
from avflow.pathways import catalogue

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 75rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-top: 1px solid #999; padding-top: 1rem; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { font-weight: 600; } nav a { margin-right: .7rem; }
table { border-collapse: collapse; font-size: 13px; margin: .7rem 0; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #111; }
.warning { border-left: 4px solid #111; padding-left: .7rem; font-weight: 600; }
details { margin: .4rem 0; } .scroll { overflow-x: auto; }
"""

_METHOD = f"""
A curve is the mean over samples of (p<sub>knockout</sub> - p<sub>base</sub>) / p<sub>base</sub>,
where p is the probability of the predicted answer letter at the last prompt position and the
knockout blocks a pathway in a window of layers around each centre layer. Bands are 95% percentile
bootstrap intervals of the mean; questions about one video are drawn together. A pathway has an
<em>effect</em> at a layer where the mean change is over {THRESHOLD:.0%}, the band excludes zero,
and so does a paired t test over videos at {LEVEL:.0%}, after the correction of Benjamini and
Hochberg over the curve's centre layers (q). Nothing is corrected for the number of curves shown:
of many curves without an effect, some will show one. A change is <em>unclear</em> where its mean is
over {THRESHOLD:.0%} at some layer, but not surely so. Where no mean is, that alone is no proof of
no effect: how far the bands reach says how large a one could be. The layers that are named are
centres of windows. n counts samples; bands and tests count videos.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A figure: its SVG, what it shows in sentences, and the curves in it (None for probes)."""

    name: str
    title: str
    svg: str
    words: Sequence[str]
    curves: pl.DataFrame | None


def render(
    *,
    title: str,
    found: Sequence[str],
    caveats: Sequence[str],
    tables: Mapping[str, Table],
    items: Sequence[Item],
    sessions: Sequence[Mapping[str, object]],
    labels: Mapping[str, str],
    curves: pl.DataFrame,
) -> str:
    """The whole page. `labels`: pathway -> how it is printed; `curves` are those of the words."""
    links = [(name, name) for name in (*tables, *(item.name for item in items))]
    nav = " ".join(f'<a href="#{escape(to)}">{escape(text)}</a>' for to, text in links)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><nav>{nav}</nav>",
        *(f'<p class="warning">{escape(text)}</p>' for text in caveats),
        "<h2>What was found</h2>",
        *(_found(found) if found else ["<p>Nothing yet: no curve or table is stored.</p>"]),
        f"<details><summary>How it was measured, and how sure it is</summary><p>{_METHOD}</p>"
        "</details>",
        *(_table(table) for table in tables.values()),
        *(_figure(item, labels) for item in items),
        "<h2>Every curve in numbers</h2>",
        *_all_curves(curves, labels),
        "<h2>Where the numbers come from</h2>",
        *_sessions(sessions),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _found(lines: Sequence[str]) -> Iterator[str]:
    """Lists; a line that ends with a colon heads those that follow, folded."""
    held: list[str] = []
    heading = ""
    for line in (*lines, ":"):
        if not line.endswith(":"):
            held.append(line)
            continue
        if held:
            text = _list(held)
            yield f"<details><summary>{heading}</summary>{text}</details>" if heading else text
        heading, held = escape(line[:-1]), []


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _table(table: Table) -> str:
    name = escape(table.name)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in table.notes)
    grid = _grid(table.columns, table.cells)
    return f'<h2 id="{name}">{name}: {escape(table.title)}</h2>{grid}{notes}{_list(table.words)}'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _figure(item: Item, labels: Mapping[str, str]) -> str:
    name = escape(item.name)
    svg = item.svg[item.svg.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{escape(item.title)}"', 1
    )
    text = [f'<h2 id="{name}">{name}</h2><figure>{svg}']
    text.append(f"<figcaption>{escape(item.title)}</figcaption></figure>{_list(item.words)}")
    if item.curves is not None and item.curves.height:
        text.append(f"<details><summary>{name} in numbers</summary>")
        text.append(evidence_grid(item.curves, labels))
        text.append("</details>")
    return "".join(text)


def _all_curves(curves: pl.DataFrame, labels: Mapping[str, str]) -> Iterator[str]:
    """Folded, a table a model, data set, window and variant."""
    scope = ("model", "dataset", "window", "variant")
    for key, frame in curves.sort(scope).group_by(scope, maintain_order=True):
        model, dataset, window, variant = key
        text = escape(f"{model} on {dataset}, window of {window}, options by {variant}")
        yield f"<details><summary>{text}</summary>{evidence_grid(frame, labels)}</details>"


def evidence_grid(curves: pl.DataFrame, labels: Mapping[str, str]) -> str:
    """Where each curve is furthest from zero, as an HTML table."""
    columns = (
        "pathway", "panel", "n", "videos", "peak %", "95% band", "at layer", "q",
        "effect at layers", "probability", "log-odds", "accuracy",
    )  # fmt: skip
    order = {pathway.name: at for at, pathway in enumerate(catalogue.ALL)}
    found = evidence(curves).sort(
        pl.col("pathway").replace_strict(order, default=len(order)), "task"
    )
    return _grid(columns, [_evidence_row(row, labels) for row in found.iter_rows(named=True)])


def _evidence_row(row: Mapping[str, object], labels: Mapping[str, str]) -> tuple[str, ...]:
    band = "-" if row["low"] is None else f"{_hundredth(row['low'])} to {_hundredth(row['high'])}"
    return (
        labels.get(str(row["pathway"]), str(row["pathway"])),
        str(row["task"]),
        str(row["n"]),
        str(row["videos"]),
        _hundredth(row["mean"]),
        band,
        str(row["center_layer"]),
        _q(row["q_value"]),
        str(row["layers"]) or "none",
        f"{row['dp']:+.3f}",
        f"{row['log_odds']:+.2f}",
        f"{row['accuracy']:+.3f}",
    )


def _hundredth(share: object) -> str:
    assert isinstance(share, float)
    return f"{100 * share:+.1f}"


def _q(value: object) -> str:
    if not isinstance(value, float):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sessions(sessions: Sequence[Mapping[str, object]]) -> Iterator[str]:
    seen = {str((s.get("commit"), s.get("packages"))) for s in sessions}
    if len(seen) > 1:
        yield (
            '<p class="warning">The sessions of this run did not have the same code or packages '
            "(below).</p>"
        )
    rows = []
    for session in sessions:
        packages = session.get("packages")
        listed = packages.items() if isinstance(packages, Mapping) else ()
        versions = ", ".join(f"{name} {version}" for name, version in listed)
        rows.append(
            (str(session.get("at")), str(session.get("host")), str(session.get("commit")), versions)
        )
    yield _grid(("session", "host", "commit", "packages"), rows)
