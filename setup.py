"""Writes the commit into what is built: a wheel or a source archive has no git to ask later."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

SOURCE = runpy.run_path(str(Path(__file__).parent / "orchestrator" / "version.py"))


def write_commit(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOURCE["BAKED"]).write_text(SOURCE["commit"]() or "", encoding="ascii")


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout asks git
            write_commit(Path(self.build_lib) / "avflow" / "orchestrator")


class ArchiveWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "orchestrator")


setup(cmdclass={"build_py": BuildWithCommit, "sdist": ArchiveWithCommit})
