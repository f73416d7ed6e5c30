"""docs/adding-a-dataset.md does what it says: its files are written out, its commands run."""

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from in_process import avflow
from media_files import even, write_video
from PIL import Image

from avflow.datasets.prompts import TEMPLATES
from avflow.datasets.reading import LeftOut
from avflow.datasets.sample import Sample

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-dataset.md"
FILE = re.compile(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(PAGE.read_text()) if name == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, and the media that they speak of; the clip's sound ends early."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILE.findall(PAGE.read_text()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for kind in ("clips", "pictures", "sounds"):
        (tmp_path / "mine" / kind).mkdir()
    write_video(tmp_path / "mine/clips/ball.mp4", even(3, 10), sound_s=1)
    write_video(tmp_path / "mine/clips/bell.mp4", even(2, 10))
    for name in ("cat", "dog"):
        Image.new("RGB", (56, 56), "red").save(tmp_path / f"mine/pictures/{name}.png")
    soundfile.write(tmp_path / "mine/sounds/bark.wav", np.zeros(16_000), 16_000)
    return tmp_path


def run(line: str) -> str:
    words = shlex.split(line, comments=True)
    assert words[0] == "avflow"
    done = avflow(*words[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands() -> list[str]:
    (block,) = blocks("sh")
    return block.splitlines()


def test_the_folder_is_checked_and_planned(folder: Path) -> None:
    check, plan, _ = commands()
    assert "3 questions; 5 media decoded" in run(check)
    assert "over 3 samples" in run(plan)


def test_the_sweep_runs_and_what_decoding_changed_is_in_its_table(folder: Path) -> None:
    (query,) = blocks("sql")
    run(commands()[2])
    told = run(f"avflow query runs/mine {shlex.quote(query)} --format json")
    assert "clips/ball.mp4: sound ends at 1.00 s of 2.90 s" in told


def test_the_reader_reads_its_table(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("birdsong", folder / "datasets/birdsong.py")
    assert spec is not None
    assert spec.loader is not None
    birdsong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(birdsong)
    wren, robin = birdsong.read(folder / "birds", template=TEMPLATES["plain"])
    assert isinstance(wren, Sample)
    assert (wren.answer_letter, wren.media[0].path) == ("A", "wren.mp4")
    assert isinstance(robin, LeftOut)
    assert "answer is 'E'" in robin.reason


def test_what_the_page_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).is_file(), target
