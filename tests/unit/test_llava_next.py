# SPDX-License-Identifier: Apache-2.0
"""The geometry of tiled images, and every baseline on them."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE
from models_next import SIZES, prompts_next, tiny_next

import vlmcompress
from vlmcompress.adapters.base import adapter_for

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_next(eos_token_id=None)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_layout_is_the_packed_order(model, size):
    """Features gathered by the layout are what the stock model feeds."""
    inputs = prompts_next(model, [[2, size, 3, "row", 2]])
    layout = adapter_for(model).geometry(inputs)
    pixels = adapter_for(model).pixels(inputs)
    tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = layout.of_views(model.model.multi_modal_projector(tower))
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    for image, features in enumerate(stock):
        n = layout.n[image]
        assert n == len(features) and layout.valid[image].sum() == n
        newline = layout.cell[image, :n] == -1
        assert newline.sum() == layout.grid[image][0]
        torch.testing.assert_close(projected[image, :n][~newline], features[~newline])
        assert (features[newline] == model.model.image_newline).all()
    rows, cols = layout.grid[0]
    crop = layout.patch[0] & ~layout.thumbnail[layout.view[0].clamp_min(0)]
    assert (layout.row[0] * cols + layout.col[0])[crop].tolist() == list(range(rows * cols))
    assert layout.row[0][: layout.n[0]].max() == rows - 1 and layout.col[0].max() == cols
    back = layout.to_views(layout.of_views(projected.new_ones(layout.view_image.shape[0], 36)))
    assert back.sum() == layout.patch.sum()


def test_thumbnail_covers_the_picture(model):
    layout = adapter_for(model).geometry(prompts_next(model, [[1, "tall", 1]]))
    rows, cols = layout.grid[0]
    assert (rows, cols) == (12, 8)
    assert layout.row[0, :36].unique().tolist() == [1, 3, 5, 7, 9, 11]
    assert layout.col[0, :6].tolist() == [0, 2, 3, 4, 6, 7]


@torch.no_grad()
def test_none_is_bit_identical_and_reports(model):
    inputs = prompts_next(model, [[5, "square", 3], [2, "row", 3, "tall", 1]])
    before = model(**inputs).logits
    with vlmcompress.compress(model, "none") as handle:
        assert model(**inputs).logits.equal(before)
        assert [len(i.kept) for s in handle.last.samples for i in s.images] == [36 + 12 * 13, 36 + 6 * 19 + 0, 36 + 12 * 9]
        assert handle.report().tokens == int((inputs["input_ids"] == IMAGE).sum())
