"""Pictures to arrays, upright and in RGB."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from avflow.datasets.media_spec import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.sampling import fit


def read_picture(path: Path, spec: MediaSpec) -> DecodedMedia:
    """A picture file's (first) picture. Raises MediaError; an OSError of the disk as it is."""
    try:
        with Image.open(path) as image:
            picture, notes = _rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error; Pillow's own carry no number
        raise MediaError(
            f"{path}: damaged or not an image ({error}); fetch it again or leave its samples out"
        ) from error
    height, width = fit(picture.height, picture.width, spec.image_max_pixels, spec.patch_multiple)
    if (height, width) != (picture.height, picture.width):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    frames = np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)[None]
    return DecodedMedia(
        kind="image",
        frames=np.ascontiguousarray(frames),
        waveform=None,
        frame_times=(),
        seconds_per_frame=None,
        duration=0.0,
        notes=notes,
    )


def _rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """In RGB, and a note if that changed it. What is transparent becomes white, as in
    qwen-vl-utils: below it may lie anything."""
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits of grey off at 255
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB"), ()
    image = image.convert("RGBA")
    clear = np.asarray(image)[..., 3].min() < 255
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return on_white.convert("RGB"), ("what is transparent was made white",) if clear else ()
