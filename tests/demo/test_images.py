# SPDX-License-Identifier: Apache-2.0
"""Uploads: every oddity becomes upright RGB or one sentence."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from vlmcompress.demo import images
from vlmcompress.demo.images import open_upload

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width=64, height=48):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def near(image, at, colour, tolerance=12):
    return all(abs(a - b) <= tolerance for a, b in zip(image.getpixel(at), colour, strict=True))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif"])
def test_every_format_keeps_its_colours(tmp_path, name):
    halves().save(tmp_path / name)
    image, notes = open_upload(tmp_path / name)
    assert (image.mode, image.size, notes) == ("RGB", (64, 48), [])
    assert near(image, (8, 24), RED) and near(image, (56, 24), BLUE)


def test_exif_rotation_is_applied_and_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    halves().save(tmp_path / "a.jpg", exif=exif)
    image, notes = open_upload(tmp_path / "a.jpg")
    assert image.size == (48, 64) and near(image, (24, 8), RED) and near(image, (24, 56), BLUE)
    assert notes == ["Turned upright as its EXIF tag says."]


def test_cmyk_becomes_rgb(tmp_path):
    halves().convert("CMYK").save(tmp_path / "a.jpg")
    image, _ = open_upload(tmp_path / "a.jpg")
    assert image.mode == "RGB" and near(image, (8, 24), RED, 40) and near(image, (56, 24), BLUE, 40)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / name)
    grey = np.asarray(open_upload(tmp_path / name)[0])[..., 0].astype(int)
    assert (grey[0, 0], grey[-1, -1]) == (0, 255)
    assert abs(np.median(grey) - 127) <= 1


def test_floating_point_pictures_use_their_own_range(tmp_path):
    values = np.full((40, 40), -3.0, np.float32)
    values[20:], values[0, 0] = 5.0, np.nan
    Image.fromarray(values).save(tmp_path / "a.tiff")
    grey = np.asarray(open_upload(tmp_path / "a.tiff")[0])[..., 0]
    assert (grey[5, 5], grey[30, 5]) == (0, 255)


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_upload(tmp_path / "a.png")[0].getpixel((3, 3)) == (255, 255, 255)
    palette = halves().quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert open_upload(tmp_path / "p.png")[0].getpixel((8, 24)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_of_an_animation_the_first_frame_is_used(tmp_path, name):
    first, second = Image.new("RGB", (40, 40), RED), Image.new("RGB", (40, 40), BLUE)
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    image, notes = open_upload(tmp_path / name)
    assert near(image, (20, 20), RED) and notes == ["Of 2 frames the first is used."]


def test_one_pixel_is_enlarged(tmp_path):
    Image.new("RGB", (1, 1), BLUE).save(tmp_path / "a.png")
    image, notes = open_upload(tmp_path / "a.png")
    assert image.size == (32, 32) and image.getpixel((31, 31)) == BLUE
    assert notes == ["Resized from 1 × 1 to 32 × 32 pixels."]


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_ten_thousand_pixels_are_cut_down(tmp_path, name):
    halves(10_000, 400).save(tmp_path / name)
    image, notes = open_upload(tmp_path / name)
    assert image.width == images.LONGEST and image.height in (163, 164)
    assert near(image, (10, 80), RED) and near(image, (4000, 80), BLUE)
    assert len(notes) == 1 and notes[0].startswith("Resized from ")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="far more than the 89 million pixels"):
        open_upload(tmp_path / "a.png")
    header = struct.pack(">IIBBBBB", 9_600, 9_600, 8, 2, 0, 0, 0)  # more than Pillow warns of, less than it refuses
    (tmp_path / "b.png").write_bytes(bomb[:8] + chunk(b"IHDR", header) + bomb[33:])
    with pytest.raises(ValueError, match="9,600 × 9,600 pixels, more than"):
        open_upload(tmp_path / "b.png")


def test_a_thread_of_pixels_is_refused(tmp_path):
    Image.new("RGB", (4000, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="one side may be at most 30 times the other"):
        open_upload(tmp_path / "a.png")


def test_what_is_no_picture_gets_one_sentence(tmp_path, monkeypatch):
    # lmms-eval, which other tests import, makes Pillow accept pictures that are cut off; the demo never loads it
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    halves().save(tmp_path / "whole.png")
    halves().save(tmp_path / "whole.jpg")
    cases = {
        "text.png": b"hello",
        "empty.jpg": b"",
        "cut.png": (tmp_path / "whole.png").read_bytes()[:60],
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:400],
        "drawing.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",  # would start ghostscript
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="could not be read as a picture"):
            open_upload(tmp_path / name)


def test_size_and_absence_are_told(tmp_path):
    with pytest.raises(ValueError, match="no longer there"):
        open_upload(tmp_path / "none.png")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 20 MiB"):
        open_upload(tmp_path / "large.png")
