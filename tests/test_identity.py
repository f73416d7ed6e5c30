"""Every config field is identity or run time, and job ids don't change by accident."""

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated

import pytest
from pydantic import BaseModel

from avflow.orchestrator import config as config_module
from avflow.orchestrator import extras_config
from avflow.orchestrator.config import ExecutionConfig, ModelConfig, RetryConfig, SweepConfig
from avflow.orchestrator.identity import (
    IDENTITY_VERSION,
    Identity,
    Role,
    RunTime,
    canonical_json,
    differences,
    digest,
    identity_fields,
    role,
)
from avflow.orchestrator.policy import Budgets
from avflow.workers.models.base import ModelSpec

# Fields by class. To add a field: mark it Identity or RunTime in config.py, put it here, and if it
# is identity count IDENTITY_VERSION up and take over the new golden hash below.
CLASSIFIED = {
    "ModelConfig": {
        "identity": "name family dtype attention system_prompt fps max_frames frame_tokens "
        "image_tokens positions block_audio_padding",
        "run time": "path revision gpus_per_model",
    },
    "TestbedSettings": {"identity": "seed samples_per_task tasks", "run time": ""},
    "DatasetConfig": {"identity": "name reader settings", "run time": "root"},
    "CellFilter": {"identity": "models datasets tasks pathways windows", "run time": ""},
    "ExperimentConfig": {
        "identity": "models datasets tasks pathways windows center_layers samples option_span "
        "include exclude",
        "run time": "name all_pathways",
    },
    "PathwayConfig": {"identity": "name layout sources targets direction", "run time": ""},
    "RetryConfig": {
        "identity": "",
        "run time": "exception transient gpu_memory host_memory worker_death node_lost "
        "fatal timeout load breaker_units breaker_s",
    },
    "ExecutionConfig": {
        "identity": "threads byte_budget",
        "run time": "executor address workers limit unit_deadline_s decode_timeout_s "
        "load_deadline_s stop_grace_s retries",
    },
    "MlflowConfig": {"identity": "", "run time": "tracking_uri"},
    "RecordedIdentity": {"identity": "version models datasets", "run time": ""},
    "ScopeConfig": {"identity": "models datasets tasks samples", "run time": "name"},
    "MaskConfig": {"identity": "name pathways layers", "run time": ""},
    "DiscardStepConfig": {"identity": "after_layer groups", "run time": ""},
    "DiscardConfig": {"identity": "name steps", "run time": ""},
    "InterventionConfig": {
        "identity": "models datasets tasks samples option_span masks discards",
        "run time": "name",
    },
    "ProbeConfig": {
        "identity": "models datasets tasks samples probe layers samples_per_task seed "
        "top_dimensions",
        "run time": "name",
    },
    "FigureConfig": {
        "identity": "",
        "run time": "name shows title model datasets tasks panels ordering pathways windows "
        "option_span layers interventions notes",
    },
    "SweepConfig": {
        "identity": "models datasets experiments interventions probes pathways execution identity",
        "run time": "name figures mlflow",
    },
}

EXAMPLE = {
    "name": "golden",
    "models": [{"name": "m", "family": "f", "path": "/p"}],
    "datasets": [{"name": "d", "reader": "testbed"}],
    "experiments": [{"name": "e"}],
    "pathways": [
        {
            "name": "mine",
            "layout": "single_video",
            "sources": ["audio"],
            "targets": ["true_option"],
        }
    ],
}
GOLDEN = {
    1: "a4338411d5db5b5eda2ea9f0acff000a",
    2: "0eb9cebd7da002afecfbee5974669590",
    3: "0eb9cebd7da002afecfbee5974669590",
}


def configs() -> Iterator[type[BaseModel]]:
    kinds = {**vars(config_module), **vars(extras_config)}
    for kind in kinds.values():
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.model_fields:
            yield kind


@pytest.mark.parametrize("kind", list(configs()), ids=lambda kind: kind.__name__)
def test_every_field_is_classified_and_described(kind: type[BaseModel]) -> None:
    found: dict[str, list[str]] = {"identity": [], "run time": []}
    for name, field in kind.model_fields.items():
        found[role(kind, name).value].append(name)
        assert field.description, f"{kind.__name__}.{name} says nothing of itself"
    listed = CLASSIFIED[kind.__name__]
    assert found == {group: names.split() for group, names in listed.items()}


def test_the_identity_of_a_sweep_is_what_it_was() -> None:
    config = SweepConfig.model_validate_json(json.dumps(EXAMPLE))
    assert digest(identity_fields(config)) == GOLDEN[IDENTITY_VERSION], (
        "the identity of every sweep has changed: existing run folders will be refused. If that is "
        "meant, count IDENTITY_VERSION up and add the new hash."
    )


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"name": "other"}, True),
        ({"mlflow": {"tracking_uri": "http://x"}}, True),
        ({"execution": {"workers": 9, "limit": 3, "retries": {"transient": 7}}}, True),
        ({"models": [{"name": "m", "family": "f", "path": "/elsewhere"}]}, True),
        ({"experiments": [{"name": "renamed"}]}, True),
        ({"models": [{"name": "m", "family": "f", "path": "/p", "dtype": "float32"}]}, False),
        ({"execution": {"byte_budget": 1}}, False),
        ({"execution": {"threads": 2}}, False),
        ({"experiments": [{"name": "e", "windows": [9]}]}, False),
        ({"pathways": []}, False),
    ],
)
def test_identity_is_what_can_change_a_number(change: dict[str, object], same: bool) -> None:
    one = SweepConfig.model_validate_json(json.dumps(EXAMPLE))
    other = SweepConfig.model_validate_json(json.dumps(EXAMPLE | change))
    assert (identity_fields(one) == identity_fields(other)) is same


def test_an_unclassified_field_is_refused() -> None:
    class Forgetful(BaseModel):
        fine: Identity[int] = 1
        also_fine: RunTime[int] = 1
        forgotten: int = 1
        undecided: Annotated[int, Role.IDENTITY, Role.RUN_TIME] = 1

    assert role(Forgetful, "fine") is Role.IDENTITY
    for name in ("forgotten", "undecided"):
        with pytest.raises(TypeError, match=f"Forgetful.{name}"):
            role(Forgetful, name)
    with pytest.raises(TypeError):
        identity_fields(Forgetful())


def test_the_model_section_is_the_workers_spec() -> None:
    # Not asked of a person for each model: the plan fills them in.
    planned = ("digest", "byte_budget")
    spec = [field.name for field in fields(ModelSpec) if field.name not in planned]
    assert [name for name in ModelConfig.model_fields if name != "gpus_per_model"] == spec
    for field in fields(ModelSpec):
        if field.name not in ("name", "family", "path", *planned):
            assert ModelConfig.model_fields[field.name].default == field.default
    assert ModelSpec(name="m", family="f", path="p").byte_budget == ExecutionConfig().byte_budget
    budgets = [field.name for field in fields(Budgets) if field.name != "store"]
    assert list(RetryConfig.model_fields) == budgets
    assert RetryConfig().budgets() == Budgets()


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1.0, "é"], "a": None}) == '{"a":null,"b":[1.0,"\\u00e9"]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len(digest({})) == 32
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))
    with pytest.raises(TypeError):
        canonical_json({"a": {1, 2}})


def test_differences_name_each_leaf() -> None:
    mine = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    theirs = {"a": {"b": 2, "c": [1, 3]}, "e": "y" * 500}
    found = list(differences(mine, theirs))
    assert found[:2] == ["a.b: 1 here, 2 there", "a.c[1]: 2 here, 3 there"]
    assert found[2] == 'd: "x" here, absent there'
    assert len(found[3]) < 200
    assert not list(differences(mine, dict(mine)))
