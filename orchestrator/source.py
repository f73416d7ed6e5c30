"""A YAML file whose values know their lines, so that an error can point at one."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from avflow.orchestrator.errors import ConfigError

FieldPath = Sequence[str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The file, its plain data and its node tree."""

    path: Path
    data: object
    node: yaml.Node

    def known(self, field: FieldPath) -> tuple[str | int, ...]:
        """The longest start of `field` that stands in the file."""
        return _descend(self.node, field)[0]

    def line(self, field: FieldPath) -> int:
        """Line, from 1, of a field, or of the nearest thing around it that the file holds."""
        return _descend(self.node, field)[1]

    def where(self, field: FieldPath) -> str:
        """`file:line: models[0].dtype`."""
        place = f"{self.path}:{self.line(field)}"
        return f"{place}: {spell(field)}" if field else place

    def error(self, field: FieldPath, message: str) -> ConfigError:
        """A ConfigError that points at a field."""
        return ConfigError(f"{self.where(field)}: {message}")


def read_source(path: Path) -> Source:
    """Raises ConfigError when the file is missing, is no YAML, or gives a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    if node is None or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a sweep file is a mapping (name: ..., models: ...)")
    _refuse_double_keys(path, node)
    return Source(path=path, data=data, node=node)


def _refuse_double_keys(path: Path, node: yaml.Node) -> None:
    # YAML itself lets the last one win, silently.
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_double_keys(path, item)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(
                    f"{path}:{line}: {key.value!r} is given twice (first in line {seen[key.value]})"
                )
            seen[key.value] = line
            _refuse_double_keys(path, value)


def _descend(node: yaml.Node, field: FieldPath) -> tuple[tuple[str | int, ...], int]:
    known: list[str | int] = []
    line: int = node.start_mark.line + 1
    for part in field:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            item = node.value[part] if part < len(node.value) else None
            found = None if item is None else (item, item)
        else:
            found = None
        if found is None:
            break
        known.append(part)
        line, node = found[0].start_mark.line + 1, found[1]
    return tuple(known), line


def spell(field: FieldPath) -> str:
    """`models[0].dtype`."""
    text = ""
    for part in field:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """`unknown task 'sigth'; did you mean 'sight'? known: sight, sound`."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {value!r};{hint} known: {', '.join(names) or 'none'}"
