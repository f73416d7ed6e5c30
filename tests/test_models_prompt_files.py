"""Tokenizer, processor and chat template: read when a sweep is planned, and named if they fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import avflow
from salmonn import spec_of as salmonn_spec
from salmonn import tiny_checkpoint
from tiny_models import as_published, hub_cache, spec_of
from tiny_sweep import write_sweep

from avflow.workers.models import describe, load
from avflow.workers.models.base import ModelSpec, UnsupportedModelError
from avflow.workers.models.tiny import SPECIAL_TOKENS, build_tiny_checkpoint

TEXT = "Which colour is shown?\nA. red\n<|im_start|>user\n"
NAMED = ("audio_token", "audio_bos_token", "audio_eos_token", "image_token", "video_token",
         "vision_bos_token", "vision_eos_token")  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "qwen2_5_omni": build_tiny_checkpoint(folder / "omni", n_layers=2),
        "video_salmonn2": tiny_checkpoint(folder / "salmonn"),
    }


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(tiny[family], tmp_path / family))


def spec(family: str, folder: Path | str) -> ModelSpec:
    return spec_of(folder) if family == "qwen2_5_omni" else salmonn_spec(folder)


def in_older_files(folder: Path) -> None:
    """The same tokenizer and processor as releases before transformers 5 hold them: vocabulary,
    merges and added tokens apart, one preprocessor_config.json, the template in JSON."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    added = tokenizer["added_tokens"]
    merges = [" ".join(m) for m in tokenizer["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    ids = {token["content"]: token.pop("id") for token in added}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(ids[token["content"]]): token for token in added},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if (folder / "processor_config.json").is_file():
        settings["extra_special_tokens"] = {name: SPECIAL_TOKENS[name] for name in NAMED}
        _older_processor(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _older_processor(folder: Path) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    both = {**processor["image_processor"], **processor["feature_extractor"]}
    size = both.pop("size")
    both |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    both["processor_class"] = "Qwen2_5OmniProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(both))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


def ids_of(model: Any) -> list[int]:
    tokenizer = getattr(model.maker, "tokenizer", None) or model.maker.processor.tokenizer
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    return ids


@pytest.mark.parametrize("family", ["qwen2_5_omni", "video_salmonn2"])
def test_an_older_releases_files_mean_the_same(
    copy: Callable[[str], Path], tiny: dict[str, Path], family: str
) -> None:
    folder = copy(family)
    in_older_files(folder)
    older, newer = (load(spec(family, at), "cpu") for at in (folder, tiny[family]))
    assert ids_of(older) == ids_of(newer)
    assert older.media_spec == newer.media_spec
    assert describe(spec(family, folder)).parameters == newer.info.parameters


@pytest.mark.parametrize(
    ("family", "older", "files", "says"),
    [
        ("qwen2_5_omni", False, ["tokenizer.json"],
         r"tokenizer: no tokenizer\.json, no vocab\.json and merges\.txt"),
        ("qwen2_5_omni", False, ["tokenizer_config.json"], r"settings: no tokenizer_config\.json"),
        ("qwen2_5_omni", False, ["processor_config.json"],
         r"processor: no preprocessor_config\.json, no processor_config\.json"),
        ("qwen2_5_omni", False, ["chat_template.jinja"],
         r"chat template: no chat_template\.jinja, no chat_template\.json"),
        ("qwen2_5_omni", True, ["vocab.json", "merges.txt"], r"no tokenizer\.json, no vocab\.json"),
        ("qwen2_5_omni", True, ["preprocessor_config.json"], r"no preprocessor_config\.json"),
        ("qwen2_5_omni", True, ["chat_template.json"], r"no chat_template\.json"),
        ("video_salmonn2", False, ["tokenizer.json"], r"no tokenizer\.json, no vocab\.json"),
        ("video_salmonn2", False, ["tokenizer_config.json"], r"no tokenizer_config\.json"),
        ("video_salmonn2", True, ["merges.txt"], r"no vocab\.json and merges\.txt"),
        ("qwen2_5_omni", False, ["tokenizer.json", "chat_template.jinja"],
         r"no tokenizer\.json.*; chat template: no chat_template\.jinja"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_when_planning(
    copy: Callable[[str], Path], family: str, older: bool, files: list[str], says: str
) -> None:
    folder = copy(family)
    if older:
        in_older_files(folder)
    describe(spec(family, folder))
    for file in files:
        (folder / file).unlink()
    with pytest.raises(UnsupportedModelError, match=f"{folder} lacks files .*{says}"):
        describe(spec(family, folder))


@pytest.mark.parametrize(
    ("family", "file"),
    [
        ("qwen2_5_omni", "tokenizer_config.json"),
        ("qwen2_5_omni", "tokenizer.json"),
        ("qwen2_5_omni", "processor_config.json"),
        ("qwen2_5_omni", "chat_template.jinja"),
        ("video_salmonn2", "tokenizer.json"),
    ],
)
def test_they_are_part_of_what_a_checkpoint_is(
    copy: Callable[[str], Path], family: str, file: str
) -> None:
    folder = copy(family)
    before = describe(spec(family, folder)).digest
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert describe(spec(family, folder)).digest != before


# What `git clone` leaves of a large file where git-lfs is not installed.
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 11422654\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", POINTER, "JSONDecodeError: "),
        ("tokenizer.json", "{}", "files can't be read as those of qwen2_5_omni"),
        ("processor_config.json", "{", "not a valid JSON file|JSONDecodeError"),
        ("chat_template.jinja", "{% for %}", "TemplateSyntaxError: "),
    ],
)
def test_broken_files_are_named_when_planning(
    copy: Callable[[str], Path], file: str, content: str, message: str
) -> None:
    folder = copy("qwen2_5_omni")
    (folder / file).write_text(content)
    for use in (describe, load):
        with pytest.raises(UnsupportedModelError, match=message) as refused:
            use(spec_of(folder))
        assert str(refused.value).startswith(f"model tiny: {folder}: its files")


def test_a_tokenizer_of_other_ids_is_refused_when_planning(copy: Callable[[str], Path]) -> None:
    folder = copy("video_salmonn2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"audio_token_id": 3}))
    for use in (describe, load):
        with pytest.raises(UnsupportedModelError, match=r"audio_token_id is 3 in config\.json"):
            use(salmonn_spec(folder))


def test_the_cache_of_the_hub_is_looked_through_too(
    copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("qwen2_5_omni")
    as_published(folder)
    (folder / "tokenizer.json").unlink()
    says = r"the local cache of Qwen/Tiny at 0123\w+ lacks .* no tokenizer\.json"
    with (
        hub_cache(monkeypatch, tmp_path / "cache", "Qwen/Tiny", folder),
        pytest.raises(UnsupportedModelError, match=says),
    ):
        describe(spec_of("Qwen/Tiny"))


@pytest.mark.parametrize("family", ["qwen2_5_omni", "video_salmonn2"])
@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_nothing_is_started_for_a_checkpoint_without_a_tokenizer(
    copy: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    command: str,
) -> None:
    file = write_sweep(tmp_path)
    config = yaml.safe_load(file.read_text())
    broken = copy(family)
    (broken / "tokenizer.json").unlink()
    config["models"].append({"name": "broken", "family": family, "path": str(broken)})
    file.write_text(yaml.safe_dump(config))
    run = ["--run", str(tmp_path / "run")] if command == "sweep" else []
    done = avflow(command, file, *run)
    assert done.returncode == 2
    assert "tokenizer.json" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()
