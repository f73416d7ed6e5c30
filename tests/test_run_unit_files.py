"""From media files to the reference's numbers, through a loaded checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
from engine_ways import reference_edges, reference_inputs
from unit_runs import curve, curves_of, unit

from avflow.datasets.media import decode_sample
from avflow.datasets.testbed.questions import TASKS
from avflow.datasets.testbed.samples import load as load_samples
from avflow.pathways import catalogue
from avflow.workers import models
from avflow.workers.encoders import EncoderCache
from avflow.workers.engine import reference
from avflow.workers.models.base import ModelSpec, embed
from avflow.workers.models.tiny import build_tiny_checkpoint
from avflow.workers.protocol import CurveSpec
from avflow.workers.run_unit import run_unit


def test_questions_about_one_video_run_its_encoders_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The second question's numbers are to the bit what they are without the first."""
    root = tmp_path_factory.mktemp("shared")
    loaded = models.load(
        ModelSpec(name="m", family="qwen2_5_omni", path="testbed", dtype="float32"), "cpu"
    )
    pair = load_samples(root, seed=4, samples_per_task=1, tasks=("sight", "sound"))
    assert pair[0].media == pair[1].media
    encoders, found = EncoderCache(), []
    spec = unit((curve("video_to_question", correct_only=False),))
    for sample in pair:
        media = decode_sample(root, sample, loaded.media_spec)
        asked = replace(spec, sample=sample, data_root=str(root))
        found.append(list(run_unit(loaded, asked, media, 0, encoders)))
    assert (encoders.misses, encoders.hits) == (1, 1)
    alone = list(run_unit(loaded, asked, media, 0))
    assert found[1][0].p_options.tobytes() == alone[0].p_options.tobytes()
    assert found[1][-1].p_base == alone[-1].p_base


@pytest.mark.parametrize("checkpoint", ["random", "testbed"])
@pytest.mark.parametrize("task", ["sight", "match"])
def test_from_media_files_to_the_references_numbers(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: str, task: str
) -> None:
    """Real files, processor and encoders: every pathway of the sample agrees with the plain way."""
    root = tmp_path_factory.mktemp("media")
    name = next(t.name for t in TASKS if t.name.startswith(task))
    (sample,) = load_samples(root, seed=3, samples_per_task=1, tasks=(name,))
    folder = "testbed"
    if checkpoint == "random":
        folder = str(build_tiny_checkpoint(tmp_path_factory.mktemp("model"), seed=1))
    loaded = models.load(
        ModelSpec(name="m", family="qwen2_5_omni", path=folder, dtype="float32"), "cpu"
    )
    curves = tuple(
        CurveSpec(
            pathway=p,
            window=3,
            center_layers=tuple(range(loaded.info.n_layers)),
            correct_only=False,
        )
        for p in catalogue.ALL
        if p.layout == sample.layout
    )
    media = decode_sample(root, sample, loaded.media_spec)
    spec = replace(unit(curves), sample=sample, data_root=str(root))
    events = list(run_unit(loaded, spec, media, decode_s=0))
    done = curves_of(events)
    assert set(done) == {c.key for c in curves}
    prepared = loaded.prepare(sample, media)
    inputs = reference_inputs(embed(loaded, prepared))
    for c in curves:
        edges = reference_edges(prepared.layout, c.pathway)
        for center in (0, 3, loaded.info.n_layers - 1):
            expected = reference.knockout_probabilities(loaded.hf_model, inputs, edges, center, 3)
            options = expected[list(prepared.option_tokens)].double().numpy()
            np.testing.assert_allclose(done[c.key].p_options[center], options, atol=1e-5)
            base = float(expected[done[c.key].base_token])
            assert done[c.key].p_knockout[center] == pytest.approx(base, abs=1e-5)
