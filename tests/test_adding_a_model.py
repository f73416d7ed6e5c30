"""The page that shows how a family is added: its code, taken off the page, passes the suite."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from tiny_models import numbers, same_bits, spec_of

from avflow.datasets.media import MediaError, decode_sample
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.testbed.render import render_image, render_sound
from avflow.orchestrator.checking_models import checks, recognise
from avflow.workers import models
from avflow.workers.encoders import EncoderCache
from avflow.workers.models.base import ModelSpec
from avflow.workers.models.conformance import Case, conformance
from avflow.workers.models.tiny import build_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-model.md"
SIDE_PX, PATCH_PX = 56, 14
# As LLaVA 1.5's: all images of a turn first, then its texts; the answer follows a colon.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<|IMAGE|>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QUESTION = multiple_choice("Which one is red?\n", ["first", "second", "third"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The page's code as a module."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    file = tmp_path_factory.mktemp("page") / "llava.py"
    file.write_text("\n\n".join(blocks))
    spec = importlib.util.spec_from_file_location("page_llava", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["page_llava"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of a few hundred kilobytes with random weights: 16 tokens a picture."""
    hf: Any = transformers
    tokenizer = build_tokenizer(["USER: ASSISTANT: Which one is red? A. B. C. D.", " A B C D"])
    folder = tmp_path_factory.mktemp("tiny") / "llava"
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(
            size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    config = hf.LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE_PX,
            "patch_size": PATCH_PX, "projection_dim": 32,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        hf.LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(3):
        render_image(number, 0, folder / f"{number}.png")
    render_sound(0, 0, folder / "0.wav")
    return folder


def pictures(n: int = 3, **changes: Any) -> Sample:
    """Two or more candidates and, last, a reference; then the question, as LLaVA has it."""
    media = [MediaPart(kind="image", path=f"{i}.png", role="candidate", index=i) for i in range(n)]
    media[-1] = replace(media[-1], role="reference", index=None)
    fields: dict[str, Any] = {
        "sample_id": "s1", "dataset": "d", "task": "t", "category": "c", "layout": "interleaved",
        "parts": (*media, *QUESTION), "answer": 1, "media_group": "g", "correct_candidate": 1,
    }  # fmt: skip
    return Sample(**fields | changes)


@pytest.fixture
def spec(checkpoint: Path) -> ModelSpec:
    return spec_of(checkpoint, family="llava")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "disk")])
def test_the_pages_family_passes_the_suite(
    page: ModuleType, spec: ModelSpec, root: Path, dtype: str, devices: tuple[str, ...]
) -> None:
    model = page.FAMILY.load(replace(spec, dtype=dtype), devices)
    samples = [pictures(), pictures(2, sample_id="s2", answer=0, correct_candidate=0)]
    cases = [Case(sample=s, media=decode_sample(root, s, model.media_spec)) for s in samples]
    found = list(conformance(model, cases))
    assert [c for c in found if c.result not in ("passed", "skipped")] == []
    assert {c.sample for c in found} == {"s1", "s2", None}


def test_one_line_makes_it_known(
    page: ModuleType, spec: ModelSpec, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Described, loaded and run by name, like any other; its answers begin with a space."""
    monkeypatch.setitem(models.FAMILIES, "llava", page.FAMILY)
    info = models.describe(spec)
    model = models.load(replace(spec, digest=info.digest), "cpu")
    assert info.parameters == sum(p.numel() for p in model.hf_model.parameters())
    assert same_bits(numbers(model, root, pictures()), numbers(model, root, pictures()))
    prepared = model.prepare(pictures(), decode_sample(root, pictures(), model.media_spec))
    assert prepared.prompt.startswith("A chat between a curious human")
    assert [model.token_text(token) for token in prepared.option_tokens] == [" A", " B", " C"]
    assert [s.stop - s.start for s in prepared.layout.of("candidate", "reference")] == [16] * 3
    cache = EncoderCache()
    for question in (QUESTION, multiple_choice("Which one is blue?\n", ["x", "y", "z"])):
        sample = pictures(parts=(*pictures().media, *question))
        cache.encode(model, model.prepare(sample, decode_sample(root, sample, model.media_spec)))
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_command_checks_it_with_the_prompts_that_it_takes(
    page: ModuleType, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.FAMILIES, "llava", page.FAMILY)
    found, _ = recognise(replace(spec, family=""))
    assert found.family == "llava"
    results = list(checks(models.load(found, "cpu"), 1))
    assert [c for c in results if c.result == "failed"] == [], results
    taken = {c.sample for c in results if c.name == "prompt" and c.result == "passed"}
    assert taken == {"match_image-0-00000-pictures"}


def test_what_it_can_not_take_is_refused_by_name(
    page: ModuleType, spec: ModelSpec, root: Path
) -> None:
    model = page.FAMILY.load(spec, ("cpu",))
    sound = MediaPart(kind="audio", path="0.wav", role="reference")
    sample = pictures(parts=(*pictures().media, sound, *QUESTION))
    with pytest.raises(
        MediaError, match=r"LLaVA takes images as candidates .*, audio \(reference\)"
    ):
        model.prepare(sample, decode_sample(root, sample, model.media_spec))
    late = pictures(parts=(*pictures().parts[3:], *pictures().media))
    (check, *_) = conformance(
        model, [Case(sample=late, media=decode_sample(root, late, model.media_spec))]
    )
    assert check.result == "refused"
    with pytest.raises(models.base.UnsupportedModelError, match="llava knows 'llava'"):
        page.FAMILY.describe(replace(spec, path="testbed"))
