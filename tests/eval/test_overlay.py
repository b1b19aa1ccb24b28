# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch
from PIL import Image

import vlmcompress
from vlmcompress.eval.loading import encode, load, open_image
from vlmcompress.eval.overlay import draw, kept_cells, overlay, seen_by_the_tower


def test_kept_cells_keep_their_colour_and_the_others_lose_it():
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    kept = np.zeros((4, 4), dtype=bool)
    kept[1, 2] = True
    drawn = np.asarray(draw(red, kept, side=400)).astype(int)
    assert drawn.shape == (400, 400, 3)
    assert drawn[150, 250].tolist() == [200, 30, 30]
    for row in range(4):
        for column in range(4):
            middle = drawn[row * 100 + 50, column * 100 + 50]
            assert (np.ptp(middle) > 100) == kept[row, column]


def test_the_picture_is_what_the_tower_saw(tiny_folder, picture):
    model, processor = load(str(tiny_folder))
    image = open_image(picture)  # 90 × 60: the processor cuts its sides off
    inputs = encode(model, processor, [image], ["what color is the star ?"])
    with vlmcompress.compress(model, "grid", keep=9) as handle, torch.no_grad():
        model(**inputs)
        record = handle.last.samples[0].images[0]
        assert kept_cells(record).sum() == 9
        seen = seen_by_the_tower(inputs["pixel_values"][0], processor)
        expected = image.resize((72, 48), Image.Resampling.BICUBIC).crop((12, 0, 60, 48))
        difference = np.asarray(seen).astype(int) - np.asarray(expected).astype(int)
        assert seen.size == (48, 48)
        assert np.abs(difference).mean() < 4
        assert overlay(image, record, inputs["pixel_values"], processor).size == (672, 672)
