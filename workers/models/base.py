"""What a model family gives the engine: prepared inputs, embeddings, positions and its decoder.

Shapes: B batch, N prompt tokens, D hidden size, L decoder layers, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from avflow.datasets.media import DecodedMedia, MediaSpec
from avflow.datasets.sample import LayoutKind, Sample
from avflow.pathways.layout import Layout, LayoutError

if TYPE_CHECKING:  # a plan is made without it
    from transformers import PreTrainedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ATTENTIONS = ("sdpa", "eager")  # that transformers gives a mask to, and the engine was held to

# Of a prompt's tensors those that depend on its texts; all others are the media's alone.
TEXT_TENSORS = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "position_ids"})


class UnsupportedModelError(ValueError):
    """The checkpoint is not one this family knows how to run: what differs, and what is known."""


class NotNowError(UnsupportedModelError):
    """The checkpoint could not be fetched, or its GPUs are taken, just now: another try may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which checkpoint, and how to run it. Every field is identity: it can change a number.

    `path` is a local folder, a hub id, or `testbed` for the shipped checkpoint. `dtype` is
    float32, bfloat16 or float64; `attention` is what the unmodified model runs with (sdpa, eager).
    `system_prompt` None means the family's stated default. `fps` frames a second; `max_frames`
    a video; `frame_tokens` and `image_tokens` at most a frame pair and an image, after merging
    (None: the checkpoint's own pixel budget). `positions` and `block_audio_padding` are for
    families with two rules of positions or silence among their tokens (video-SALMONN 2+); the
    others refuse all but the default. `byte_budget` of a batch's activations, for which loading
    leaves room. `digest`, if given, is what the checkpoint must have: that of `ModelInfo`.
    """

    name: str
    family: str
    path: str
    revision: str | None = None
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    system_prompt: str | None = None
    fps: float = 2.0
    max_frames: int = 128
    frame_tokens: int | None = 144
    image_tokens: int | None = 576
    positions: Literal["generate", "train"] = "generate"
    block_audio_padding: bool = True
    byte_budget: int = 2**31
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What planning needs to know of a checkpoint, read without its weights.

    `head_size` is of one attention head; `parameters` counts what is loaded, encoders included.
    `digest` is a sha256 of config and weight-file identities: equal digests mean equal models.
    """

    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    digest: str

    def weight_bytes(self, dtype: str) -> int:
        """What the loaded weights take. Raises KeyError for a dtype that is not in DTYPES."""
        return self.parameters * DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One sample's processor output on the CPU, with its layout.

    `tensors` are the processor's own outputs by name (TEXT_TENSORS, and what the encoders take);
    `option_tokens` the vocabulary id of each option letter as the model would generate it first;
    `prompt` the expanded text and `offsets` int64 [N, 2] each token's characters in it; `notes`
    say what was changed in the media.
    """

    sample: Sample
    tensors: dict[str, Tensor]
    layout: Layout
    option_tokens: tuple[int, ...]
    prompt: str
    offsets: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the encoders made of a prompt's media: `tensors` by a name of the family's own, each
    [n, D], the media of one kind in the order of the prompt. Prompts with equal media have equal
    features, whatever their texts."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """The decoder's exact inputs: inputs_embeds [1, N, D], position_ids int64 as its rotary
    embedding takes them (M-RoPE [3, 1, N], else [1, N]), attention_mask int64 [1, N] (all ones),
    input_ids int64 [1, N]."""

    inputs_embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    input_ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The text decoder, piece by piece, as the official modules.

    `layers[i](h, attention_mask=…, position_embeddings=…, past_key_values=…)` returns [B, N, D];
    `rotary(h, position_ids)` the (cos, sin) that all layers share; `config` the text config.
    """

    layers: Sequence[nn.Module]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    norm: nn.Module
    lm_head: nn.Module
    config: "PreTrainedConfig"


class LoadedModel(Protocol):
    """A checkpoint in memory. One a worker."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def info(self) -> ModelInfo: ...
    @property
    def decoder(self) -> Decoder: ...
    @property
    def hf_model(self) -> nn.Module: ...
    @property
    def media_spec(self) -> MediaSpec: ...
    @property
    def device(self) -> torch.device: ...

    def prepare(self, sample: Sample, media: Sequence[DecodedMedia]) -> Prepared:
        """Processor output and layout. `media` in the order of `sample.media`. CPU only.

        Raises LayoutError when a group can't be located, MediaError when media don't fit.
        """
        ...

    def official_inputs(self, prepared: Prepared) -> Mapping[str, object]:
        """Keyword arguments with which `hf_model`'s own forward and generate run this prompt."""
        ...

    def token_text(self, token: int) -> str:
        """The characters of one vocabulary id."""
        ...

    def encode(self, prepared: Prepared) -> Features:
        """Run the encoders. Of `prepared` it reads the tensors that are not TEXT_TENSORS alone."""
        ...

    def embed(self, prepared: Prepared, features: Features) -> Embedded:
        """The decoder's inputs: the embedding table, features put in their places, positions.

        Raises LayoutError where features or positions don't fit the prompt's tokens.
        """
        ...


def with_media(
    table: nn.Module, ids: Tensor, features: Features, tokens: Mapping[str, int]
) -> Tensor:
    """inputs_embeds [1, N, D] of ids [1, N]: the embedding `table`'s, and each kind of features at
    the places of its one of `tokens`. On the device of `ids`, wherever the table lies.

    Raises LayoutError where there are more or fewer places than features.
    """
    hidden: Tensor = table(ids).to(ids.device)
    for kind, tensor in features.tensors.items():
        where = ids == tokens[kind]
        if int(where.sum()) != len(tensor):
            raise LayoutError(
                f"the prompt has {int(where.sum())} places for {len(tensor)} outputs of the "
                f"{kind} encoder"
            )
        hidden = hidden.masked_scatter(where.unsqueeze(-1), tensor.to(hidden))
    return hidden


def embed(model: LoadedModel, prepared: Prepared) -> Embedded:
    """Encode and embed one prompt on its own."""
    return model.embed(prepared, model.encode(prepared))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of checkpoint that can be run.

    `about` is a line for people; `model_types` are those of config.json that it knows; `describe`
    reads all of a checkpoint but its weights; `load` puts one on one or more devices ("cpu",
    "cuda:0", ...). Both raise UnsupportedModelError. `own_frame_tokens`: those of a frame
    pair at most in a video of so many frames, of so many allowed, where `ModelSpec.frame_tokens`
    is None; None: it takes no video. `layouts`: the kinds of prompt that it takes, so that a plan
    can warn of the others.
    """

    about: str
    model_types: tuple[str, ...]
    describe: Callable[[ModelSpec], ModelInfo]
    load: Callable[[ModelSpec, Sequence[str]], LoadedModel]
    own_frame_tokens: Callable[[int, int], int] | None = None
    layouts: tuple[LayoutKind, ...] = ("single_video", "interleaved")
