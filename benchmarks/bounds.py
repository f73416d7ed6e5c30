"""The least that a job needs: by count, in reading weights, in bare matrix products."""

from typing import Any

import torch
from cases import Case, Job, seconds
from torch import Tensor, nn

from avflow.workers.engine.cost import Cost, batch_cost, knockout_floor, plain_cost, prefill_floor
from avflow.workers.engine.rows import steps


def executed(case: Case, job: Job) -> Cost:
    """What the engine executes for a job, the prefill apart."""
    costs = (batch_cost(case.shapes, batch) for batch in job.batches)
    return sum(costs, Cost())


def floor(case: Case, job: Job) -> Cost:
    """The least that a job needs, the prefill apart."""
    return knockout_floor(case.layout, case.shapes, job.knockouts)


def prefill_cost(case: Case) -> Cost:
    """Of the baseline."""
    return prefill_floor(case.shapes)


def plain(case: Case, forwards: int) -> Cost:
    """Of so many full passes."""
    return plain_cost(case.shapes, forwards)


def read_weights(case: Case, first_layer: int) -> float:
    """Seconds to read the weights of the layers from `first_layer` on once, the best of five."""
    weights = [p for layer in case.decoder.layers[first_layer:] for p in layer.parameters()]
    return min(
        seconds(case, lambda: [weight.view(-1).sum() for weight in weights])[0] for _ in range(5)
    )


@torch.inference_mode()
def products(case: Case, job: Job) -> float:
    """Seconds of the bare matrix products that a job's batches can't do without: each layer's own
    projections, once, of as many positions as then go through it. The best of five."""
    hidden = case.embedded.inputs_embeds[0, :1]
    asked: list[tuple[nn.Module, Tensor]] = []
    for batch in job.batches:
        layers = range(batch.first_layer, case.size.layers)
        for step in steps(batch.rows, layers, batch.trunk_until(case.size.layers)):
            counts = [case.layout.n_tokens - batch.start] * (len(step.running) + step.trunk)
            for row in step.joins:
                targets = batch.masks[batch.rows[row].mask].targets
                counts.append(sum(stop - start for start, stop in targets))
            n = len(counts) if step.layer == case.size.layers - 1 else sum(counts)
            asked.append((case.decoder.layers[step.layer], hidden.repeat(n, 1)))

    def work() -> None:
        for layer, positions in asked:
            attention: Any = layer.self_attn
            mlp: Any = layer.mlp
            attention.k_proj(positions)
            attention.v_proj(positions)
            attention.o_proj(attention.q_proj(positions))
            mlp.up_proj(positions)
            mlp.down_proj(mlp.gate_proj(positions))

    return min(seconds(case, work)[0] for _ in range(5))
