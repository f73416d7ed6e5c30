"""Write configs/figures/ from configs/paper.yaml: a sweep file a figure, for partial runs.

    python configs/one_a_figure.py

A test fails until the files are those that this would write.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from avflow.orchestrator.config import load_config
from avflow.orchestrator.partial import only

HERE = Path(__file__).resolve().parent
HEADER = """\
# yaml-language-server: $schema=../sweep.schema.json
# {name} of "From Senses to Decisions" alone. Written from paper.yaml by one_a_figure.py.
#
#     avflow sweep configs/figures/{name}.yaml --run /data/runs/{name}

"""


def files(source: Path = HERE / "paper.yaml") -> Iterator[tuple[Path, str]]:
    """Each file and its text."""
    whole = load_config(source)
    for name in dict.fromkeys(figure.number for figure in whole.figures):
        # As a person would write it: what was not given stays out.
        data = only(whole, name).model_dump(mode="json", exclude_defaults=True)
        for dataset in data["datasets"]:
            dataset["root"] = f"../../data/{Path(dataset['root']).name}"
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
        yield HERE / "figures" / f"{name}.yaml", HEADER.format(name=name) + text


if __name__ == "__main__":
    for path, text in files():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
