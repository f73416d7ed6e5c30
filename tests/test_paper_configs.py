"""The paper's sweep files: they load, ask what the paper asks, and a figure's own file no more."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from avflow.orchestrator.config import SweepConfig, load_config
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.figure_config import PROBE_OF, figure_names
from avflow.orchestrator.identity import identity_fields
from avflow.orchestrator.nominal import plan_anyway
from avflow.orchestrator.partial import only
from avflow.pathways.catalogue import ALL, INTERLEAVED, SINGLE_VIDEO

CONFIGS = Path(__file__).parents[1] / "configs"
FIGURES = [f"fig{number}" for number in range(1, 30)] + ["table1", "table4"]


@pytest.fixture(scope="module")
def paper() -> SweepConfig:
    return load_config(CONFIGS / "paper.yaml")


def test_every_figure_and_table_of_the_paper_is_there(paper: SweepConfig) -> None:
    assert set(FIGURES) <= set(figure_names(paper.figures))
    shown = {name for figure in paper.figures for row in figure.pathways for name in row}
    assert shown == {pathway.name for pathway in ALL}


def test_the_miniature_shows_the_same_items_in_the_same_way(paper: SweepConfig) -> None:
    testbed = load_config(CONFIGS / "paper-testbed.yaml")

    def shape(config: SweepConfig) -> list[tuple[object, ...]]:
        return [
            (f.name, f.shows, f.title, f.panels, f.ordering, f.pathways, f.interventions)
            for f in config.figures
        ]

    assert shape(testbed) == shape(paper)
    for section in ("experiments", "interventions", "probes"):
        names = [[one.name for one in getattr(config, section)] for config in (testbed, paper)]
        assert names[0] == names[1]
    stands_for = dict(zip(testbed.models, paper.models, strict=True))
    shown = {figure.name: figure.model for figure in paper.figures}
    for figure in testbed.figures:
        assert stands_for[testbed.model(figure.model)].name == shown[figure.name]


def test_figures_of_a_pathway_are_where_the_catalogue_says(paper: SweepConfig) -> None:
    rows = {figure.name: {n for row in figure.pathways for n in row} for figure in paper.figures}
    for pathway in ALL:
        assert all(pathway.name in rows[name] for name in pathway.figures), pathway.name


def test_all_pathways_leaves_none_out(paper: SweepConfig, tmp_path: Path) -> None:
    text = (CONFIGS / "paper.yaml").read_text()
    assert text.count("all_pathways: false") == 1
    path = tmp_path / "paper.yaml"
    path.write_text(text.replace("all_pathways: false", "all_pathways: true"))
    assert paper.experiments[0].exclude
    assert not load_config(path).experiments[0].exclude


def test_files_of_one_figure_are_current() -> None:
    spec = importlib.util.spec_from_file_location("one_a_figure", CONFIGS / "one_a_figure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = dict(module.files())
    assert {path.stem for path in written} == set(FIGURES)
    assert set((CONFIGS / "figures").iterdir()) == set(written)
    for path, text in written.items():
        assert path.read_text() == text, f"run: python configs/one_a_figure.py ({path.name})"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figures_own_file_asks_part_of_what_the_whole_asks(paper: SweepConfig, name: str) -> None:
    part = load_config(CONFIGS / "figures" / f"{name}.yaml")
    whole = {dataset.name: identity_fields(dataset) for dataset in paper.datasets}
    for dataset in part.datasets:  # the same samples, and so the same fingerprint
        assert identity_fields(dataset) == whole[dataset.name]
        assert (CONFIGS / dataset.root).resolve() in {
            Path(other.root or "") for other in paper.datasets
        }
    for figure in part.figures:
        assert figure.number == name
        needed = {pathway for row in figure.pathways for pathway in row}
        asked = {pathway for one in part.experiments for pathway in one.pathways}
        assert asked >= needed
        assert {model.name for model in part.models} == {figure.model}


Asked = Counter[tuple[str, str, str, str, int]]
"""(model, data set, task, pathway or intervention, window) -> samples that are asked it."""


def asked(config: SweepConfig) -> Asked:
    counts: Asked = Counter()
    for unit in plan_anyway(config).plan.units:
        where = (unit.model, unit.sample.dataset, unit.sample.task)
        counts.update((*where, curve.pathway.name, curve.window) for curve in unit.curves)
        counts.update((*where, extra.key.split("/")[-1], 0) for extra in unit.extras)
    return counts


def shown(config: SweepConfig, name: str, counts: Asked) -> Asked:
    """What of it this figure shows."""
    found: Asked = Counter()
    for figure in (one for one in config.figures if one.number == name):
        names = {pathway for row in figure.pathways for pathway in row} | set(figure.interventions)
        names |= {PROBE_OF.get(figure.shows, "")}
        for key, n in counts.items():
            model, dataset, task, what, window = key
            of_window = not window or window in figure.windows
            if what in names and of_window and model == figure.model:
                found |= Counter({key: n}) if figure.holds(dataset, task) else Counter()
    return found


def test_the_figures_own_files_plan_all_that_the_whole_plans_of_them(paper: SweepConfig) -> None:
    """Nothing of a figure is left out of its file: Table 4's once had one task of seven."""
    whole = asked(paper)
    for name in FIGURES:
        part = asked(load_config(CONFIGS / "figures" / f"{name}.yaml"))
        assert part
        assert shown(paper, name, part) == shown(paper, name, whole), name
    baselines = [n for key, n in shown(paper, "table4", whole).items() if key[3] == "baseline"]
    assert sum(baselines) == 201 + 206 + 204 + 205 + 288 + 27 + 45 + 3 * 200
    assert sum(n for key, n in whole.items() if key[3] == "video_for_last") == 3212


def test_a_figures_file_leaves_out_what_it_does_not_show(paper: SweepConfig) -> None:
    fig9 = only(paper, "fig9")
    assert fig9.experiments[0].pathways == (
        "video_to_audio", "audio_to_video", "video_audio_to_question", "video_audio_to_last",
    )  # fmt: skip
    assert not fig9.experiments[0].exclude
    assert not fig9.interventions + fig9.probes
    fig1 = only(paper, "fig1")
    assert [probe.probe for probe in fig1.probes] == ["last_attention", "attention_map", "sinks"]
    assert not fig1.experiments
    widths = {width for one in only(paper, "fig8").experiments for width in one.windows}
    assert widths == {1, 3, 5, 7, 9, 11}
    with pytest.raises(ConfigError, match="did you mean 'fig9'"):
        only(paper, "fig99")


def test_the_catalogue_has_22_and_15() -> None:
    assert Counter(p.layout for p in ALL) == {"single_video": 22, "interleaved": 15}
    assert len(SINGLE_VIDEO) + len(INTERLEAVED) == len(ALL)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: testbed-f64, datasets: [items]", "model: tesbed, datasets: [items]", "testbed"),
        ("shows: sinks, model: testbed, datasets: [world]",
         "shows: sinks, model: testbed, datasets: [wrld]", "did you mean 'world'"),
        ("[[video_to_audio, audio_to_video],", "[[video_to_audio, reference_to_last],",
         "no kind of prompt has all of these pathways"),
        ("interventions: [video_for_last,", "interventions: [video_for_lst,", "video_for_last"),
        ("panels: mean,", "panels: mean, windows: [3, 5],", "curves are of one window"),
    ],
)  # fmt: skip
def test_a_figure_that_cant_be_drawn_is_refused_by_line(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = (
        (CONFIGS / "paper-testbed.yaml")
        .read_text()
        .replace("shows: curves, windows: [3],", "shows: curves,")
    )
    assert old in text
    path = tmp_path / "sweep.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"sweep.yaml:\d+: figures\[\d+\]") as caught:
        load_config(path)
    assert said in str(caught.value)
