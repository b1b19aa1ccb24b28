# SPDX-License-Identifier: Apache-2.0
"""MustDrop's windows where they cannot merge in the tower: behind projectors that join patches, and in pooled videos."""

from __future__ import annotations

import math
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from reference import entering
from torch.nn.functional import cosine_similarity

import vlmcompress

sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
from slow import check, stock_of
from stories import STORIES

#: family, prompt, side of the windows
CASES = [
    ("qwen2_vl", "two images", 2), ("qwen2_5_vl", "ragged", 2), ("qwen2_5_vl", "video", 2), ("qwen3_vl", "two images", 2),
    ("qwen3_vl", "video", 3), ("internvl", "ragged", 2), ("smolvlm", "two images", 2), ("idefics3", "one", 3),
    ("llava_next_video", "video", 2), ("llava_onevision", "video", 2),
]  # fmt: skip
IDS = ["-".join(map(str, case)) for case in CASES]


def windows_of(tokens: torch.Tensor, layout, image: int, side: int) -> list[tuple[list[int], float]]:
    """Tokens of one image, by number, in every whole window of every view, and their mean mutual cosine."""
    found = []
    views = layout.view[image, : layout.n[image]].tolist()
    width = layout.view_widths[views[0]]
    for view in sorted({v for v in views if v >= 0}):
        mine = [i for i, v in enumerate(views) if v == view]
        rows, cols = len(mine) // width, width
        for top, left in product(range(0, rows - side + 1, side), range(0, cols - side + 1, side)):
            window = [mine[(top + r) * cols + left + c] for r, c in product(range(side), range(side))]
            pairs = [cosine_similarity(tokens[a], tokens[b], dim=0) for a, b in product(window, window) if a != b]
            found.append((window, float(torch.stack(pairs).mean())))
    return found


class Prompt:
    """A prompt of the stock model: what it feeds of every image or video, and the windows of that."""

    @torch.no_grad()
    def __init__(self, family: str, prompt: str, side: int, attention: str = "sdpa"):
        self.story = STORIES[family]
        self.model = self.story.build(attention)
        self.inputs = self.story.write(self.model, self.story.specs[prompt])
        with vlmcompress.compress(self.model, "none") as handle:
            self.model(**self.inputs)
            layout = handle.last.layout
        embeds = stock_of(self.model, self.inputs).embeds
        self.tokens = [embeds[layout.sample[i], layout.column[i, :n]] for i, n in enumerate(layout.n)]
        self.windows = [windows_of(tokens, layout, i, side) for i, tokens in enumerate(self.tokens)]
        # a threshold that some windows pass and some do not, as far from all of them as can be
        cosines = sorted(cosine for windows in self.windows for _, cosine in windows)
        below, above = max(pairwise(cosines), key=lambda pair: pair[1] - pair[0])
        self.threshold = (below + above) / 2


@pytest.mark.parametrize(("family", "prompt", "side"), CASES, ids=IDS)
@torch.no_grad()
def test_windows_are_those_of_the_tokens(family, prompt, side):
    """What enters, which tokens it stands for, and how many can never leave, from the uncompressed model's tokens."""
    case = Prompt(family, prompt, side)
    options = {"window": side, "key_rate": 0.3, "layers": (0,), "gamma": 1.5, "alpha": 1.5}
    with vlmcompress.compress(case.model, "mustdrop", similarity=case.threshold, **options) as handle:
        embeds = entering(case.model, lambda: case.model(**case.inputs))
        ledger = handle.last
    layout, frame = ledger.layout, ledger.frames[0]
    for number, image in enumerate(image for sample in ledger.samples for image in sample.images):
        tokens, middle = case.tokens[number], (side - 1) // 2 * (side + 1)
        merged = [window for window, cosine in case.windows[number] if cosine >= case.threshold]
        alone = set(range(len(tokens))) - {token for window in merged for token in window}
        sources = dict(sorted({**{t: [t] for t in alone}, **{w[middle]: sorted(w) for w in merged}}.items()))
        assert image.kept.tolist() == list(sources)
        assert [sorted(s.tolist()) for s in image.sources] == list(sources.values())
        row = layout.sample[number]
        means = torch.stack([tokens[s].mean(0) for s in sources.values()])
        torch.testing.assert_close(embeds[row, frame.image[row] == number], means, atol=1e-5, rtol=1e-5)
        left = layout.view[number, list(sources)]
        floor = sum(math.ceil(0.3 * int((left == view).sum())) for view in left.unique() if view >= 0)
        assert len(image.kept_at(3)) == floor


@pytest.mark.parametrize(("family", "prompt", "side"), CASES, ids=IDS)
@pytest.mark.parametrize("decoding", ["greedy", "beams", "second turn"])
def test_equals_the_slow_reference(family, prompt, side, decoding):
    case = Prompt(family, prompt, side, "eager" if decoding == "beams" else "sdpa")
    options = {"layers": (0, 1), "gamma": 0.03, "alpha": 0.06, "window": side, "similarity": case.threshold}
    check(case.model, "mustdrop", options, case.inputs, decoding, case.story.special)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_nothing_alike_is_nothing_merged(family):
    story = STORIES[family]
    model = story.build("sdpa")
    inputs = story.write(model, story.specs["ragged"])
    before = model(**inputs).logits
    with vlmcompress.compress(model, "mustdrop", similarity=1.0, gamma=0.0):
        assert model(**inputs).logits.equal(before)
