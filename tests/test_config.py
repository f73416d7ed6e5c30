"""The sweep file: what is refused, and how the refusal reads."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from avflow.orchestrator.config import SweepConfig, json_schema, load_config
from avflow.orchestrator.data import known_tasks, load_samples
from avflow.orchestrator.errors import ConfigError, ExitStatus
from avflow.orchestrator.extras_config import InterventionConfig, ProbeConfig
from avflow.orchestrator.load import parse
from avflow.orchestrator.run_folder import to_yaml
from avflow.workers.protocol import ProbeName

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

GOOD = """\
name: try
models:
  - name: tiny
    family: qwen2_5_omni
    path: testbed
datasets:
  - name: world
    reader: testbed
experiments:
  - name: e
    windows: [3]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    assert caught.value.exit_status is ExitStatus.CONFIGURATION
    return str(caught.value)


def test_the_demo_is_good_and_says_all_there_is_to_say() -> None:
    demo = load_config(DEMO)
    assert demo.models[0].dtype == "float32"
    assert demo.experiments[0].windows == (3,)
    assert demo.datasets[0].settings.samples_per_task == 20
    text = DEMO.read_text()
    for kind, config in (("execution", demo.execution), ("experiment", demo.experiments[0])):
        for field in type(config).model_fields:
            if field not in ("load_deadline_s", "retries"):
                assert f"{field}:" in text, f"the demo does not show {kind}.{field}"


def test_paths_and_addresses_are_as_long_as_they_are(tmp_path: Path) -> None:
    far = "/scratch/" + "/".join(["a-folder-of-a-cluster"] * 20)
    raw = yaml.safe_load(GOOD) | {
        "datasets": [{"name": "d", "reader": "jsonl", "root": far, "settings": {"file": far[1:]}}],
        "execution": {"address": f"ray://{far[1:]}"},
        "mlflow": {"tracking_uri": f"file://{far}"},
    }
    raw["models"][0]["path"] = far
    config = parse(write(tmp_path, yaml.safe_dump(raw)))
    kept = to_yaml(config)  # as a run folder has it
    assert to_yaml(parse(write(tmp_path, kept))) == kept


def uncommented(text: str, section: str) -> str:
    """The demo with a section that it holds as a comment."""
    start = text.index(f"# {section}:\n")
    end = text.index("\n\n", start)
    lines = text[start:end].splitlines()
    return text[:start] + "\n".join(line.removeprefix("# ") for line in lines) + text[end:]


def test_the_commented_pathway_of_the_demo_works(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, uncommented(DEMO.read_text(), "pathways")))
    assert config.own_pathways()[0].label == "audio -/-> true_option+false_options"


def test_the_commented_interventions_and_probes_of_the_demo_work(tmp_path: Path) -> None:
    text = uncommented(uncommented(DEMO.read_text(), "interventions"), "probes")
    config = load_config(write(tmp_path, text))
    masks, discards = config.interventions
    assert [mask.name for mask in masks.masks][-1] == "video_audio_for_text"
    assert [len(discard.steps) for discard in discards.discards] == [0, 1, 2]
    assert {probe.probe for probe in config.probes} == set(get_args(ProbeName))
    for field in (*ProbeConfig.model_fields, *InterventionConfig.model_fields):
        assert field in text, f"the demo does not show {field}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    path: testbed\n", "", ":3: models[0].path: this field is required"),
        ("windows: [3]", "windws: [3]", ":11: experiments[0].windws: unknown field 'windws'; "
         "did you mean 'windows'?"),
        ("windows: [3]", "windows: [0]", ":11: experiments[0].windows[0]: Input should be greater"),
        ("windows: [3]", "windows: []", ":11: experiments[0].windows: "),
        ("windows: [3]", "windows: '3'", ":11: experiments[0].windows: Input should be a valid"),
        ("windows: [3]", "pathways: [video_to_questoin]", ":11: experiments[0].pathways[0]: "
         "unknown pathway 'video_to_questoin'; did you mean 'video_to_question'? known: cross_"),
        ("windows: [3]", "tasks: [sigth]", ":11: experiments[0].tasks[0]: unknown task 'sigth'; "
         "did you mean 'sight'? known: sight, sound, "),
        ("windows: [3]", "models: [big]", "unknown model 'big'; known: tiny"),
        ("windows: [3]", "datasets: [moon]", "unknown data set 'moon'; known: world"),
        ("windows: [3]", "exclude: [{tasks: [sond]}]", ":11: experiments[0].exclude[0].tasks[0]: "
         "unknown task 'sond'; did you mean 'sound'?"),
        ("windows: [3]", "samples: wrong", "experiments[0].samples: Input should be 'correct' or "
         "'all'"),
        ("windows: [3]", "center_layers: [-1]", "experiments[0].center_layers"),
        ("qwen2_5_omni", "qwen25omni", ":4: models[0].family: unknown model family 'qwen25omni'; "
         "did you mean 'qwen2_5_omni'?"),
        ("name: try\n", "name: try\nmlflow: {tracking_uri: 'sqlit:///a.db'}\n",
         ":2: mlflow.tracking_uri: MLflow has no store at 'sqlit:///a.db': give sqlite:////"),
        ("name: try\n", "name: try\nmlflow: {tracking_uri: 'sqlite://a.db'}\n", "MLflow has no"),
        ("path: testbed", "path: ./nowhere", ":5: models[0].path: there is no folder"),
        ("path: testbed", "path: testbed\n    dtype: float16", ":6: models[0].dtype: Input should "
         "be 'float32', 'bfloat16' or 'float64'"),
        ("path: testbed", "path: testbed\n    fps: fast", "models[0].fps: Input should be a valid "
         "number (it is 'fast')"),
        ("reader: testbed", "reader: avqa", ":8: datasets[0].reader: unknown reader 'avqa'; known: "
         "testbed, av_speakerbench"),
        ("    reader: testbed\n", "", ":7: datasets[0].reader: this field is required"),
        ("reader: testbed", "reader: worldsense", ":7: datasets[0].root: this field is required"),
        ("reader: testbed", "reader: worldsense\n    root: .\n    settings: {seed: 1}",
         ":10: datasets[0].settings.seed: unknown field 'seed'; known: tasks, durations, prompt"),
        ("reader: testbed", "reader: worldsense\n    root: .\n    settings: {tasks: [Smell]}",
         ":10: datasets[0].settings.tasks[0]: unknown task 'Smell'; known: Attribute Recognition"),
        ("reader: testbed", "reader: worldsense\n    root: .\n    settings: {prompt: worldsens}",
         ":10: datasets[0].settings.prompt: Input should be 'av_speakerbench', 'worldsense'"),
        ("reader: testbed", "reader: worldsense\n    root: .\n    settings: {prompt: {qestion: }}",
         ":10: datasets[0].settings.prompt.qestion: unknown field 'qestion'; did you mean 'q"),
        ("reader: testbed", "reader: worldsense\n    root: .\n    settings: {prompt: {option: x}}",
         ":10: datasets[0].settings.prompt: option is 'x'; it must hold {letter} and then "),
        ("windows: [3]", "tasks: [wurld/sight]", ":11: experiments[0].tasks[0]: unknown task "
         "'wurld/sight'; did you mean 'world/sight'?"),
        ("reader: testbed", "reader: testbed\n    settings: {tasks: [smell]}",
         "datasets[0].settings.tasks[0]: unknown task 'smell'"),
        ("name: try\n", "name: try\nname: again\n", ":2: 'name' is given twice (first in line 1)"),
        ("name: try\n", "name: try\nworkers: 2\n", ":2: workers: unknown field 'workers'; known: "
         "name, models"),
        ("name: try\n", "name: [try\n", "not valid YAML"),
        ("name: try\n", "name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("name: e", "name: e\n  - name: e", "experiments[1].name: 'e' is there already"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_line_and_field(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    assert message in refusal(tmp_path, GOOD.replace(old, new))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, GOOD.replace("reader: testbed", "reader: x").replace("[3]", "[-3]"))
    assert text.count("\n") == 1, text
    assert ":8: " in text
    assert ":11: " in text


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "\x00"])
def test_what_is_no_sweep_file_is_refused(tmp_path: Path, text: str) -> None:
    assert "sweep.yaml" in refusal(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


OWN = """\
pathways:
  - name: mine
    layout: single_video
    sources: [audio]
    targets: [true_option, false_options]
"""


def test_a_pathway_of_one_s_own(tmp_path: Path) -> None:
    text = OWN + GOOD.replace("windows: [3]", "pathways: [mine, video_to_last]")
    (mine,) = load_config(write(tmp_path, text)).own_pathways()
    assert mine.targets == ("true_option", "false_options")
    assert "no group 'smell'" in refusal(tmp_path, text.replace("[audio]", "[smell]"))
    assert "known: system, video, audio" in refusal(tmp_path, text.replace("[audio]", "[smell]"))
    assert "pathways[0].name" in refusal(tmp_path, text.replace("mine", "not-an-identifier"))
    across = text + "    direction: across\n"
    assert "direction" in refusal(tmp_path, across)


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "one").mkdir(parents=True)
    for path, expected in (
        ("./checkpoints/one", str(tmp_path / "checkpoints" / "one")),
        ("checkpoints/one", str(tmp_path / "checkpoints" / "one")),
        ("Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-3B"),
        ("testbed", "testbed"),
    ):
        config = load_config(write(tmp_path, GOOD.replace("path: testbed", f"path: {path}")))
        assert config.models[0].path == expected


def test_a_config_survives_its_own_yaml(tmp_path: Path) -> None:
    config = load_config(DEMO).with_execution(workers=3, limit=2)
    again = load_config(write(tmp_path, to_yaml(config)))
    assert again.model_dump() == config.model_dump()


def test_the_command_line_has_the_last_word_and_is_checked() -> None:
    config = load_config(DEMO).with_execution(workers=3, executor="local", limit=2)
    assert (config.execution.workers, config.execution.executor) == (3, "local")
    assert config.execution.limit == 2
    assert config.with_execution().execution == config.execution
    with pytest.raises(ConfigError, match=r"execution\.limit: Input should be greater than 0"):
        config.with_execution(limit=0)


def test_a_config_is_frozen() -> None:
    config: Any = load_config(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"


def test_the_schema_is_for_editors() -> None:
    schema = json_schema()
    published = json.loads((DEMO.parent / "sweep.schema.json").read_text())
    assert published == json.loads(json.dumps(schema)), (
        "the sweep file has changed: write json_schema() to configs/sweep.schema.json again"
    )
    model = schema["$defs"]["ModelConfig"]["properties"]
    assert "checkpoint" in model["path"]["description"]
    assert set(model) >= {"name", "family", "dtype", "gpus_per_model"}


def test_reading_a_run_does_not_need_its_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("path: testbed", "path: /gone/away"))
    assert parse(path).models[0].path == "/gone/away"
    with pytest.raises(ConfigError, match="no folder /gone/away"):
        load_config(path)


def test_samples_of_the_testbed(tmp_path: Path) -> None:
    raw = yaml.safe_load(GOOD)
    raw["datasets"][0] |= {
        "root": str(tmp_path),
        "settings": {"samples_per_task": 2, "tasks": ["sight", "match_image"], "seed": 3},
    }
    (config,) = SweepConfig.model_validate_json(json.dumps(raw)).datasets
    loaded = load_samples(config)
    assert [s.task for s in loaded.samples] == ["sight"] * 2 + ["match_image"] * 2
    assert {s.dataset for s in loaded.samples} == {"world"}
    assert all((loaded.root / part.path).is_file() for s in loaded.samples for part in s.media)
    assert load_samples(config).fingerprint == loaded.fingerprint
    assert len(known_tasks("testbed")) == 9


def test_an_unusable_data_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = parse(write(tmp_path, GOOD.replace("testbed\nexp", "testbed\n    root: ./file\nexp")))
    with pytest.raises(ConfigError, match=r"data set world: .*can't be used"):
        load_samples(config.datasets[0])


def test_the_data_sets_of_the_docs_are_good(tmp_path: Path) -> None:
    text = (DEMO.parents[1] / "docs" / "datasets.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(blocks) == 2
    start, end = GOOD.index("datasets:"), GOOD.index("experiments:")
    for block in blocks:
        config = load_config(write(tmp_path, GOOD[:start] + block + GOOD[end:]))
        assert all(dataset.root.startswith("/data/") for dataset in config.datasets)
