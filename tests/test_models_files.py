"""A checkpoint's files: what is needed, what is read, and what is named when it is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHARDS, as_published, hub_cache, spec_of

from avflow.workers.models import describe, load
from avflow.workers.models.base import UnsupportedModelError
from avflow.workers.models.tiny import build_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=2)


@pytest.fixture
def published(tiny: Path, tmp_path: Path) -> Path:
    """The layout of Qwen/Qwen2.5-Omni-3B and -7B on the hub."""
    folder = Path(shutil.copytree(tiny, tmp_path / "published"))
    as_published(folder)
    return folder


def weights(path: Path | str, **changes: Any) -> dict[str, torch.Tensor]:
    return load(spec_of(path, **changes), "cpu").hf_model.state_dict()


@pytest.mark.parametrize("speech", ["whole", "absent", "garbage"])
def test_of_a_full_checkpoint_the_thinkers_files_are_enough(
    tiny: Path, published: Path, speech: str
) -> None:
    whole = describe(spec_of(published)).digest
    if speech == "absent":
        (published / SHARDS[2]).unlink()
        (published / "spk_dict.pt").unlink()
    elif speech == "garbage":
        (published / SHARDS[2]).write_bytes(b"not even a header")
    assert describe(spec_of(published)).digest == whole, "speech is no part of what is run"
    assert describe(spec_of(published)).parameters == describe(spec_of(tiny)).parameters
    expected, found = weights(tiny), weights(published)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def to_garbage(file: Path) -> None:
    file.write_bytes(b"garbage, and more of it " * 10)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (Path.unlink, "is missing"),
        (cut, r"has \d+ bytes of \d+"),
        (to_garbage, "is no safetensors file"),
    ],
)
def test_a_shard_that_cannot_be_used_is_named_before_anything_is_loaded(
    published: Path, harm: Callable[[Path], object], says: str
) -> None:
    harm(published / SHARDS[1])
    with pytest.raises(UnsupportedModelError, match=f"1 of 2 weight files.*{SHARDS[1]} {says}"):
        describe(spec_of(published))


def test_the_weights_of_a_single_file_are_checked_too(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is missing"):
        describe(spec_of(folder))


def test_weights_tell_checkpoints_apart_and_other_files_do_not(published: Path) -> None:
    before = describe(spec_of(published)).digest
    (published / "consolidated.safetensors").write_bytes(b"another format's copy")
    assert describe(spec_of(published)).digest == before
    file = published / SHARDS[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert describe(spec_of(published)).digest != before


def test_folders_that_are_no_checkpoint_are_named(published: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="revision 'main' is for hub ids"):
        describe(spec_of(published, revision="main"))
    index = published / "model.safetensors.index.json"
    index.write_text(json.dumps({}))
    with pytest.raises(UnsupportedModelError, match="has no weight_map"):
        describe(spec_of(published))
    (published / "config.json").write_text("{")
    index.unlink()
    with pytest.raises(UnsupportedModelError, match=r"config\.json|weight files"):
        describe(spec_of(published))


def test_a_hub_id_works_offline_and_is_pinned_to_its_commit(
    published: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (published / SHARDS[2]).unlink()
    with hub_cache(monkeypatch, tmp_path / "cache", "Qwen/Tiny", published) as commit:
        main = describe(spec_of("Qwen/Tiny"))
        assert main == describe(spec_of("Qwen/Tiny", revision=commit))
        expected, found = weights(tiny), weights("Qwen/Tiny", revision="main")
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        with pytest.raises(UnsupportedModelError, match="at 'v2' is not in the local cache"):
            describe(spec_of("Qwen/Tiny", revision="v2"))
        with pytest.raises(UnsupportedModelError, match="Qwen/Huge is not in the local cache"):
            describe(spec_of("Qwen/Huge"))
        snapshot = tmp_path / "cache" / "models--Qwen--Tiny" / "snapshots" / commit
        (snapshot / SHARDS[0]).unlink()
        with pytest.raises(UnsupportedModelError, match=f"{SHARDS[0]} is missing"):
            describe(spec_of("Qwen/Tiny"))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_parameters_and_weight_bytes_are_those_of_the_loaded_model(
    tiny: Path, dtype: str, size: int
) -> None:
    info = describe(spec_of(tiny))
    loaded = load(spec_of(tiny, dtype=dtype), "cpu")
    assert info.parameters == sum(p.numel() for p in loaded.hf_model.parameters())
    held = sum(p.numel() * p.element_size() for p in loaded.hf_model.parameters())
    assert info.weight_bytes(dtype) == info.parameters * size == held
    assert info.head_size == loaded.hf_model.config.text_config.hidden_size // info.n_heads
