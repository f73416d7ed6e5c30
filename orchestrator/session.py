"""What a session is given and gives: placements, patience, an outcome."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A model and the GPUs that one worker of it takes."""

    spec: "ModelSpec"
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds: a load before it counts as hung, and running units' grace after a first signal."""

    load_s: float
    grace_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a session ended. `signal` stopped it early, if any did."""

    signal: int | None
    failures: int  # terminal ones
    given_up: Mapping[str, str]  # model -> why


@dataclass(slots=True, kw_only=True)
class Worker:
    """What the coordinator knows of one."""

    model: str
    started: float
    where: str = ""  # host:pid once it is ready
    node: str = ""  # its machine, as the executor calls it

    @property
    def ready(self) -> bool:
        return bool(self.where)
