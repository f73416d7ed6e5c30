"""video-SALMONN 2+ beside what the authors' own code did on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from salmonn import CASES, RECORDED, recorded_checkpoint, sample_of, spec_of
from torch import Tensor

from avflow.datasets.media import DecodedMedia
from avflow.workers.models import load
from avflow.workers.models.base import Embedded, LoadedModel, Prepared, embed

RULES = ("generate", "train")
MEDIA_CASES = ("av", "av_long", "video", "audio")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    folder = recorded_checkpoint(tmp_path_factory.mktemp("recorded") / "salmonn")
    kept: dict[str, LoadedModel] = {}

    def build(rule: str = "generate", **changes: Any) -> LoadedModel:
        key = repr((rule, changes))
        if key not in kept:
            kept[key] = load(spec_of(folder, positions=rule, **changes), "cpu")
        return kept[key]

    return build


def recorded(case: str) -> dict[str, Tensor]:
    return load_file(RECORDED / f"case_{case}.safetensors")


def prepared_case(model: LoadedModel, case: str) -> Prepared:
    """The case's prompt by our own hand, the recorded patches and mel in it."""
    known, tensors = CASES[case], recorded(case)
    grid, n_chunks = known["grid"], known["n_chunks"]
    frames = None
    if grid:
        frames = np.zeros((2 * grid[0], 3, 14 * grid[1], 14 * grid[2]), np.uint8)
    medium = DecodedMedia(
        kind="video" if grid else "audio",
        frames=frames,
        waveform=np.zeros(n_chunks * 480_000, np.float32) if n_chunks else None,
        frame_times=(),
        seconds_per_frame=known["seconds_per_grid"] / 2 if grid else None,
        duration=1.0,
        notes=(),
    )
    sample = sample_of(known["text"].split("\n")[1], medium.kind, with_audio=bool(n_chunks))
    prepared = model.prepare(sample, [medium])
    names = {"pixel_values_videos": "pixel_values_videos", "video_grid_thw": "video_grid_thw",
             "input_features": "audio_feature"}  # fmt: skip
    changed = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    assert {name: value.shape for name, value in changed.items()} == {
        name: prepared.tensors[name].shape for name in names if name in prepared.tensors
    }
    return replace(prepared, tensors=prepared.tensors | changed)


@torch.no_grad()
def plain_logits(model: LoadedModel, embedded: Embedded) -> Tensor:
    logits: Tensor = model.hf_model(
        inputs_embeds=embedded.inputs_embeds,
        position_ids=embedded.position_ids,
        attention_mask=embedded.attention_mask,
        use_cache=False,
    ).logits
    return logits


@torch.no_grad()
def by_layers(model: LoadedModel, embedded: Embedded) -> Tensor:
    decoder, hidden = model.decoder, embedded.inputs_embeds
    rotary = decoder.rotary(hidden, embedded.position_ids)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    logits: Tensor = decoder.lm_head(decoder.norm(hidden))
    return logits


@pytest.mark.parametrize("case", MEDIA_CASES)
@pytest.mark.parametrize("rule", RULES)
def test_prompt_positions_encoders_and_logits_are_the_recorded(
    loaded: Callable[..., LoadedModel], case: str, rule: str
) -> None:
    model, known = loaded(rule), recorded(case)
    prepared = prepared_case(model, case)
    assert torch.equal(prepared.tensors["input_ids"], known["input_ids"])
    assert torch.equal(prepared.tensors["position_ids"], known[f"position_ids.{rule}"])
    features = model.encode(prepared).tensors
    assert set(features) == {name for name in ("audio", "video") if f"{name}_embeds" in known}
    for name, tensor in features.items():
        torch.testing.assert_close(tensor, known[f"{name}_embeds"], atol=1e-5, rtol=0)
    embedded = embed(model, prepared)
    logits = plain_logits(model, embedded)
    torch.testing.assert_close(logits, known[f"logits.{rule}"], atol=5e-5, rtol=0)
    assert torch.equal(by_layers(model, embedded), logits)


@pytest.mark.parametrize("rule", RULES)
def test_text_alone_gives_the_recorded_logits(
    loaded: Callable[..., LoadedModel], rule: str
) -> None:
    model, known = loaded(rule), recorded("text")
    hf: Any = model.hf_model
    table = hf.get_input_embeddings()
    positions = torch.arange(known["input_ids"].shape[1]).repeat(3, 1, 1)
    assert torch.equal(positions, known[f"position_ids.{rule}"])
    embedded = Embedded(
        inputs_embeds=table(known["input_ids"]),
        position_ids=positions,
        attention_mask=torch.ones_like(known["input_ids"]),
        input_ids=known["input_ids"],
    )
    logits = plain_logits(model, embedded)
    torch.testing.assert_close(logits, known[f"logits.{rule}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", MEDIA_CASES)
def test_greedy_ids_are_those_of_the_authors_generate(
    loaded: Callable[..., LoadedModel], case: str
) -> None:
    """Ours token by token, and transformers' generate on the official inputs of this family."""
    model, known = loaded("generate"), recorded(case)
    prepared = prepared_case(model, case)
    wanted = known["generate.ids"][0]
    embedded, said = embed(model, prepared), []
    hf: Any = model.hf_model
    table = hf.get_input_embeddings()
    for _ in wanted:
        said.append(int(plain_logits(model, embedded)[0, -1].argmax()))
        last = table(torch.tensor([[said[-1]]]))
        after = embedded.position_ids.amax(dim=(0, 2), keepdim=True).expand(3, 1, 1) + 1
        embedded = replace(
            embedded,
            inputs_embeds=torch.cat([embedded.inputs_embeds, last], dim=1),
            position_ids=torch.cat([embedded.position_ids, after], dim=2),
            attention_mask=torch.ones(1, embedded.attention_mask.shape[1] + 1, dtype=torch.int64),
        )
    assert said == wanted.tolist()
    hf: Any = model.hf_model
    generated = hf.generate(
        **model.official_inputs(prepared), max_new_tokens=len(wanted), do_sample=False
    )
    assert generated[0].tolist() == wanted.tolist()


def test_the_rule_of_positions_is_the_difference(loaded: Callable[..., LoadedModel]) -> None:
    apart = {}
    for case in MEDIA_CASES:
        generate, train = (
            plain_logits(loaded(rule), embed(loaded(rule), prepared_case(loaded(rule), case)))
            for rule in RULES
        )
        apart[case] = float((generate - train).abs().max())
    assert min(apart.values()) > 0.01, apart  # far beyond the 5e-5 of conformance


def test_bfloat16_reaches_every_part(loaded: Callable[..., LoadedModel]) -> None:
    model = loaded(dtype="bfloat16")
    assert {p.dtype for p in model.hf_model.parameters()} == {torch.bfloat16}
    embedded = embed(model, prepared_case(model, "av"))
    assert embedded.inputs_embeds.dtype == torch.bfloat16
    assert torch.equal(by_layers(model, embedded), plain_logits(model, embedded))


def test_eager_attention_is_the_text_models_alone(loaded: Callable[..., LoadedModel]) -> None:
    model = loaded(attention="eager")
    hf: Any = model.hf_model
    assert hf.get_decoder().config._attn_implementation == "eager"
    assert hf.model.visual.config._attn_implementation == "sdpa"
    prepared = prepared_case(model, "av")
    logits = plain_logits(model, embed(model, prepared))
    known = recorded("av")["logits.generate"]
    torch.testing.assert_close(logits, known, atol=5e-5, rtol=0)


def test_planning_knows_what_was_loaded(loaded: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = loaded()
    assert model.info.parameters == sum(p.numel() for p in model.hf_model.parameters())
    assert (model.info.n_layers, model.info.n_heads, model.info.n_kv_heads) == (3, 4, 2)
    assert (model.info.hidden_size, model.info.head_size, model.info.vocab_size) == (64, 16, 160)
    assert model.token_text(114) == "What"
