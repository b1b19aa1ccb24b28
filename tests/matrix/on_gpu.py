# SPDX-License-Identifier: Apache-2.0
"""Every method on every family on a GPU against the same on the CPU, in fp32: ``make test-gpu``.

Each cell takes the prompt and the kernel that the covering choice of ``test_matrix.py`` has for it.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from cells import OPTIONS
from depth import CELLS, expected
from pairs import covering
from stories import STORIES

import vlmcompress
import vlmcompress.flex

#: where the second run is made; without a GPU the file fails and does not skip
DEVICE = "cuda"
GREEDY = [cell for cell in CELLS if cell[4] == "greedy" and not expected(*cell)]


def answers(device: str, method: str, family: str, prompt: str, attention: str):
    """Logits of every step [T, B, V], and per layer the columns that it processed, on the CPU."""
    story = STORIES[family]
    model = story.build(attention)
    if method.startswith("tokenflex"):
        torch.manual_seed(0)
        vlmcompress.flex.install(model, counts=(4, 9))
    inputs = {key: value.to(device) for key, value in story.write(model, story.specs[prompt]).items()}
    model.to(device)
    with vlmcompress.compress(model, method, **OPTIONS[method]) as handle:
        out = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=list(story.special),
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ledger = handle.last
    frames = [ledger.frame_at(layer).index.cpu() for layer in range(ledger.n_layers)]
    return torch.stack(out.logits).cpu(), frames, out.sequences.cpu()


@pytest.mark.parametrize("cell", covering(GREEDY, whole=2), ids="-".join)
@torch.no_grad()
def test_gpu_equals_cpu(cell):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = (answers(device, *cell[:4]) for device in ("cpu", DEVICE))
    assert torch.equal(here[2], there[2])
    for ours, theirs in zip(here[1], there[1], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(there[0], here[0], atol=1e-3, rtol=1e-3)
