# SPDX-License-Identifier: Apache-2.0
"""Pictures that strangers upload: decoded with care, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

#: decoders that are trusted with a stranger's file; the others of Pillow start programs or are little tested
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 20 * 2**20
#: pixels of a decoded file: where Pillow begins to warn of decompression bombs
MAX_PIXELS = 89_478_485
MAX_RATIO = 30
#: processors cut large pictures down in any case; the demo does it first, so that the page stays light
LONGEST, SHORTEST = 4096, 32


def open_upload(path: str | Path) -> tuple[Image.Image, list[str]]:
    """The picture as upright RGB, at most ``LONGEST`` pixels long, and sentences on what was done to it.

    Raises ``ValueError`` in one sentence for a file that is too large, damaged, no picture of a known format, or so
    long and thin that a processor would blow it up.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("The picture is no longer there; upload it once more.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"The picture is larger than {MAX_BYTES >> 20} MiB; upload a smaller one.")
    return decode(path)


def decode(file: Path | BinaryIO) -> tuple[Image.Image, list[str]]:
    """What :func:`open_upload` makes of a file that is there and not too large. Raises ``ValueError`` likewise."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            frames = getattr(image, "n_frames", 1)
            image.draft("RGB", (LONGEST, LONGEST))  # JPEG only: decode at a fraction where that is enough
            image.load()
            upright = ImageOps.exif_transpose(image)
            turned = image.getexif().get(0x0112, 1) != 1
            rgb = to_rgb(upright)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"The picture has far more than the {MAX_PIXELS / 1e6:.0f} million pixels that are decoded."
        ) from None
    # whatever a decoder makes of a damaged file, the user gets one sentence
    except Exception as error:
        raise ValueError(
            f"This file could not be read as a picture: it is damaged or none of {', '.join(FORMATS)}."
        ) from error
    notes = [f"Of {frames} frames the first is used."] * (frames > 1) + [
        "Turned upright as its EXIF tag says."
    ] * turned
    return _fit(rgb, notes), notes


class _Refused(ValueError):
    """A picture that is refused for its size."""


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _Refused(
            f"The picture has {width:,} × {height:,} pixels, more than the {MAX_PIXELS / 1e6:.0f} million that are decoded."
        )
    if max(width, height) > MAX_RATIO * max(1, min(width, height)) and max(width, height) > SHORTEST:
        raise _Refused(
            f"The picture has {width:,} × {height:,} pixels; one side may be at most {MAX_RATIO} times the other."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB: transparency on white, more than 8 bits scaled down instead of clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit grey by its full range; 32-bit integers that need no more the same; other numbers by what occurs."""
    numbers = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    if mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (numbers - low) / (high - low) if high > low else np.zeros_like(numbers)
    return (scaled * 255).round().astype(np.uint8)


def _fit(image: Image.Image, notes: list[str]) -> Image.Image:
    """Cut down what is too long, enlarge what no processor could cut into patches."""
    width, height = image.size
    scale = min(1.0, LONGEST / max(width, height))
    if min(width, height) < SHORTEST:
        scale = SHORTEST / min(width, height)
    if scale == 1.0:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    notes.append(f"Resized from {width:,} × {height:,} to {size[0]:,} × {size[1]:,} pixels.")
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
