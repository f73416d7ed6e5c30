"""One real sample on this machine, to put seconds where an estimate has FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from avflow.orchestrator.cost import nominal_layout
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.estimate import Estimate, of_unit
from avflow.orchestrator.source import unknown
from avflow.workers.protocol import SampleDone, UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.orchestrator.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one sample took, all of its work done, right baseline or not. Seconds, FLOPs.

    `nominal_flops` are those that the estimate has for it: `flops / nominal_flops` says how much
    longer the real prompt is than the nominal one.
    """

    model: str
    dataset: str
    sample_id: str
    device: str
    n_tokens: int
    decode_s: float
    encode_s: float
    prefill_s: float
    replay_s: float
    flops: float
    nominal_flops: float

    @property
    def flops_per_s(self) -> float:
        """Of the decoder, prefill and replay."""
        return self.flops / (self.prefill_s + self.replay_s)

    def hours(self, of: Estimate) -> float:
        """What an estimate takes on such a device, encoders included, decoding left out (it runs
        ahead on the CPUs). For models and data like the sample's."""
        decoder = of.shared * self.flops / self.nominal_flops / self.flops_per_s
        return (decoder + of.samples * self.encode_s) / 3600


def measure(plan: Plan, model: str) -> Measurement:
    """Run the middle one, by cost, of the model's samples. Raises ConfigError if it fails, or if
    its checkpoint or media are not there."""
    from avflow.workers.actor import ModelWorker
    from avflow.workers.decode import decode_unit
    from avflow.workers.models.placement import cuda_devices

    units = [unit for unit in plan.units if unit.model == model]
    if not units:
        raise ConfigError(unknown("model", model, (unit.model for unit in plan.units)))
    unit = _without_probes(units[len(units) // 2])
    config = plan.config.model(model)
    execution = plan.config.execution
    spec = replace(config.spec(), byte_budget=execution.byte_budget)
    devices = cuda_devices(config.gpus_per_model)
    try:
        worker = ModelWorker("measure", spec, devices, execution.threads)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model {model} can't be measured: {error}") from error
    decoded = decode_unit(unit, worker.about()[0])
    done: SampleDone | None = None
    for _ in range(2):  # the first pass pays for kernels that are chosen or compiled once
        for event in worker.run_unit(unit, decoded):
            if isinstance(event, UnitFailure):
                raise ConfigError(f"{unit.unit_id} can't be measured: {event.message}")
            if isinstance(event, SampleDone):
                done = event
    assert done is not None
    nominal = of_unit(unit, nominal_layout(unit.sample, config), worker.model.info)
    return Measurement(
        model=model,
        dataset=unit.sample.dataset,
        sample_id=unit.sample.sample_id,
        device=_device(devices),
        n_tokens=done.n_tokens,
        decode_s=done.decode_s,
        encode_s=done.encode_s,
        prefill_s=done.prefill_s,
        replay_s=done.replay_s,
        flops=done.flops,
        nominal_flops=nominal.shared,
    )


def _without_probes(unit: UnitSpec) -> UnitSpec:
    """Its curves alone, whatever the answer: discards and probes are not in `flops`."""
    curves = tuple(replace(curve, correct_only=False) for curve in unit.curves)
    return replace(unit, curves=curves, extras=(), wanted=frozenset(curve.key for curve in curves))


def _device(devices: tuple[str, ...]) -> str:
    import torch

    if not devices or not devices[0].startswith("cuda"):
        return "this machine's CPU"
    return f"{len(devices)} x {torch.cuda.get_device_name(devices[0])}"
