# SPDX-License-Identifier: Apache-2.0
"""Methods on image encoders without a language model: CLIP and SigLIP of transformers, open_clip, timm."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import models_encoders
import pytest
import torch
from models_encoders import ENCODERS, LAYERS, frames
from torch import nn

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.compat import REPLAYS_HOOKS
from vlmcompress.methods.centerclip import CenterClip
from vlmcompress.ops.cluster import k_medoids
from vlmcompress.ops.segments import join_segments, video_embedding
from vlmcompress.towers import EncoderHandle

METHODS = {
    "tome": {"keep": 9},
    "tower-cls": {"keep": 9},
    "centerclip": {"keep": 9},
    "centerclip video": {"keep": 9, "frames": 4, "segments": 2},
    "centerclip spectral": {"keep": 9, "frames": 4, "segments": 2, "algorithm": "spectral", "sigma": "median"},
}
SAME = ("clip", "open_clip", "timm")


def applied(model, name: str, pixels: torch.Tensor, **more) -> tuple[torch.Tensor, object]:
    with torch.no_grad(), vlmcompress.compress(model, name.split()[0], **{**METHODS[name], **more}) as handle:
        return adapter_for(model).embed(pixels), handle.last


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]()


@pytest.mark.parametrize("method", METHODS)
def test_one_set_of_weights_gives_the_same_in_three_libraries(method):
    pixels = frames().flatten(0, 1)
    (expected, record), *others = [applied(ENCODERS[kind](), method, pixels) for kind in SAME]
    plain = adapter_for(ENCODERS["clip"]()).embed(pixels)
    assert len(expected) < len(plain) or (expected - plain).abs().max() > 1e-3
    for found, other in others:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert other.layer_tokens == record.layer_tokens and other.cells.equal(record.cells)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_equals_layer_by_layer(kind):
    model, pixels = ENCODERS[kind](), frames()
    adapter = adapter_for(model)
    tower, prefix = adapter.tower, adapter.tower_prefix
    x = tower.embeddings(pixels.flatten(0, 1))
    x = tower.pre_layrnorm(x) if kind == "clip" else x
    for layer in tower.encoder.layers[:2]:
        x = layer(x, None)
    x = join_segments(x, 4, 2, 9, prefix=prefix).hidden
    for layer in tower.encoder.layers[2:]:
        x = layer(x, None)
    x = tower.post_layernorm(x)
    x = model.visual_projection(x[:, 0]) if kind == "clip" else tower.head(x)
    with vlmcompress.compress(model, "centerclip", keep=9, segments=2) as handle:
        found = handle.encode_videos(pixels)
        assert handle.report().layer_tokens == (8 * (36 + prefix),) * 2 + (4 * (9 + prefix),) * 2
    torch.testing.assert_close(found, video_embedding(x, torch.ones(2, 2, dtype=torch.bool)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_schedule_of_two_stages():
    model, pixels = ENCODERS["clip"](), frames(count=6)
    tower = model.vision_model
    x = tower.pre_layrnorm(tower.embeddings(pixels.flatten(0, 1)))
    x = tower.encoder.layers[0](x, None)
    x = tower.encoder.layers[1](join_segments(x, 6, 3, 20).hidden, None)
    x = tower.encoder.layers[2](x, None)
    second = join_segments(x, 3, 1, 8)
    x = tower.encoder.layers[3](second.hidden, None)
    with vlmcompress.compress(model, "centerclip", frames=6, schedule=((1, 3, 20), (3, 1, 8))) as handle:
        found = model(pixel_values=pixels.flatten(0, 1)).image_embeds
        kept = [sample.images[0].kept for sample in handle.last.samples]
    torch.testing.assert_close(found, model.visual_projection(tower.post_layernorm(x[:, 0])), atol=1e-6, rtol=1e-5)
    assert [len(k) for k in kept] == [8, 8] and all(int(k.max()) < 6 * 36 for k in kept)


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["kmedoids", "spectral", "pooling", "sampling"])
def test_batched_equals_single(encoder, algorithm):
    pixels = frames(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    options = {"sigma": "median"} if algorithm == "spectral" else {}
    with vlmcompress.compress(encoder, "centerclip", keep=7, segments=5, algorithm=algorithm, **options) as handle:
        together = handle.encode_videos(pixels, mask)
        whole = handle.encode_videos(pixels)
        for row, count in enumerate(mask.sum(1).tolist()):
            alone = handle.encode_videos(pixels[row : row + 1])
            torch.testing.assert_close(whole[row : row + 1], alone, atol=1e-5, rtol=1e-4)
            # one frame a segment, so the real frames of a padded video are those of the short one
            alone = handle.encode_videos(pixels[row : row + 1, :count])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing(encoder):
    pixels, mask = frames(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    other = pixels.clone()
    other[1, 3:] = 9.0
    with vlmcompress.compress(encoder, "centerclip", keep=7, segments=2) as handle:
        found = handle.encode_videos(pixels, mask)
        assert found.equal(handle.encode_videos(other, mask))
        assert not found.equal(handle.encode_videos(other))
        # of six frames in two segments, three are the first segment of the longer and all of the shorter
        torch.testing.assert_close(found[1:], _first_segment(handle, pixels[1:, :3]), atol=1e-5, rtol=1e-4)


def _first_segment(handle, pixels):
    with vlmcompress.compress(handle.model, "centerclip", keep=7, segments=1, replace=True) as other:
        found = other.encode_videos(pixels)
    return found


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_removal_restores_everything(encoder, method):
    pixels, adapter = frames().flatten(0, 1), adapter_for(encoder)
    if method == "tower-cls" and not adapter.has_cls:
        return  # refused, see test_bad_input
    before, state = adapter.embed(pixels), set(encoder.__dict__)
    config = copy.deepcopy(getattr(encoder, "config", None))
    hooks = _hooks(encoder)
    with vlmcompress.compress(encoder, method.split()[0], **METHODS[method]):
        assert not adapter.embed(pixels).equal(before)
        with pytest.raises(
            ValueError, match="do not divide" if "video" in method or "spectral" in method else "pictures"
        ):
            _broken(adapter, method, pixels)
    assert adapter.embed(pixels).equal(before)
    assert set(encoder.__dict__) == state and _hooks(encoder) == hooks
    if config is not None:
        assert encoder.config.to_dict() == config.to_dict()


def _broken(adapter, method, pixels):
    """A pass that is refused on the way."""
    if "video" in method or "spectral" in method:
        adapter.embed(pixels[:3])
    hook = adapter.tower_layers[1].register_forward_pre_hook(_fail)
    try:
        adapter.embed(pixels)
    finally:
        hook.remove()


def _fail(module, args):
    raise ValueError("pictures cannot be read")


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "tower-cls", "centerclip"])
def test_keeping_everything_is_bit_identical(encoder, method):
    pixels, adapter = frames().flatten(0, 1), adapter_for(encoder)
    if method == "tower-cls" and not adapter.has_cls:
        return
    with vlmcompress.compress(encoder, method, keep=1.0):
        found = adapter.embed(pixels)
    assert found.equal(adapter.embed(pixels))
    with vlmcompress.compress(encoder, "centerclip", keep=36, frames=4, segments=4):
        assert adapter.embed(pixels).equal(found)


def test_gradients_reach_the_blocks_in_front(encoder):
    model = copy.deepcopy(encoder).train()
    with vlmcompress.compress(model, "centerclip", keep=7, segments=2) as handle:
        handle.encode_videos(frames()).square().sum(1).neg().add(
            handle.encode_videos(frames(seed=1)).sum(1)
        ).sum().backward()
    weight = adapter_for(model).tower_norm(0).weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_checkpointing_is_refused_or_right():
    model = ENCODERS["open_clip"]().train()
    model.set_grad_checkpointing()
    with vlmcompress.compress(model, "centerclip", keep=7), pytest.raises(ValueError, match="switch it off"):
        model.encode_image(frames().flatten(0, 1))
    model = ENCODERS["timm"]().train()
    model.set_grad_checkpointing()
    with vlmcompress.compress(model, "centerclip", keep=7), pytest.raises(ValueError, match="switch it off"):
        model(frames().flatten(0, 1))


def test_checkpointing_of_transformers():
    grads = []
    for checkpoint in (False, True):
        model = ENCODERS["clip"]().train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        with vlmcompress.compress(model, "centerclip", keep=7, segments=2) as handle:
            if checkpoint and REPLAYS_HOOKS:
                with pytest.raises(ValueError, match="replays hooks"):
                    handle.encode_videos(frames())
                return
            handle.encode_videos(frames())[:, 0].sum().backward()
        grads.append(model.vision_model.encoder.layers[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_a_detour_around_the_towers_own_call_is_refused(kind):
    model = ENCODERS[kind]()
    tower, pixels = adapter_for(model).tower, frames().flatten(0, 1)
    with vlmcompress.compress(model, "tome", keep=9):
        with pytest.raises(ValueError, match="runs its layers past that"):
            tower.forward_intermediates(pixels)
        assert adapter_for(model).embed(pixels).isfinite().all()
    tower.forward_intermediates(pixels)


@torch.no_grad()
def test_two_threads_and_a_refusal():
    model, pixels = ENCODERS["clip"](), frames(6).flatten(0, 1)
    with vlmcompress.compress(model, "centerclip", keep=7, frames=4, segments=2):
        expected = model(pixel_values=pixels).image_embeds

        def run(number: int):
            try:
                return model(pixel_values=pixels[: 3 if number % 2 else None]).image_embeds
            except ValueError as refusal:
                return str(refusal)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, range(12)))
    assert all(x.equal(expected) for x in found[::2]) and all("do not divide" in x for x in found[1::2])


@torch.no_grad()
def test_half_precision(encoder):
    model = copy.deepcopy(encoder).bfloat16()
    with vlmcompress.compress(model, "centerclip", keep=7, segments=2) as handle:
        found = handle.encode_videos(frames().bfloat16())
        assert found.dtype == torch.bfloat16 and found.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_mixed_precision(encoder, method):
    if method == "tower-cls" and not adapter_for(encoder).has_cls:
        return
    with torch.autocast("cpu", torch.bfloat16):
        found, record = applied(encoder, method, frames().flatten(0, 1))
    assert found.isfinite().all() and record.layer_tokens[-1] < record.layer_tokens[0]


@torch.no_grad()
def test_mean_of_members():
    model, pixels = ENCODERS["clip"](), frames().flatten(0, 1)
    seen = {}
    layers = model.vision_model.encoder.layers
    layers[2].register_forward_pre_hook(lambda module, args: seen.update(full=args[0]))
    model(pixel_values=pixels)
    x = seen["full"][:, 1:]
    clusters = k_medoids(x, 7)
    with vlmcompress.compress(model, "centerclip", keep=7, aggregation="mean") as handle:
        model(pixel_values=pixels)
        mean = torch.stack([x[0][clusters.assign[0] == c].mean(0) for c in range(7)])
        torch.testing.assert_close(seen["full"][0, 1:], mean, atol=1e-6, rtol=1e-5)
        assert handle.last.owner.equal(clusters.assign)


@torch.no_grad()
def test_the_window_reaches_the_graph():
    """Every patch of a frame is in the widest window; a narrow one changes the choice."""
    model, pixels = ENCODERS["clip"](), frames()
    found = []
    for window in (None, (11, 7), (3, 1)):
        options = dict(keep=9, frames=4, segments=2, algorithm="spectral", graph="heat", sigma="median", window=window)
        with vlmcompress.compress(model, "centerclip", **options) as handle:
            found.append(handle.encode_videos(pixels))
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


def test_save_and_restore(tmp_path):
    model = ENCODERS["clip"]()
    vlmcompress.compress(model, "centerclip", frames=4, schedule=((1, 2, 9), (2, 1, 5)))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    handle = vlmcompress.restore(again)
    assert isinstance(handle, EncoderHandle)
    assert handle.method.methods == (CenterClip(frames=4, schedule=((1, 2, 9), (2, 1, 5))),)


def test_bad_input():
    model, siglip = ENCODERS["open_clip"](), ENCODERS["siglip"]()
    text = nn.Linear(2, 2)
    for said, call in (
        ("frames is a whole number", lambda: CenterClip(frames=0)),
        ("segments is a whole number", lambda: CenterClip(segments=True)),
        ("algorithm is one of", lambda: CenterClip(algorithm="magic")),
        ("aggregation is one of", lambda: CenterClip(aggregation="sum")),
        ("metric is one of", lambda: CenterClip(metric="hamming")),
        ("graph is one of", lambda: CenterClip(graph="ring")),
        ("sigma is a positive", lambda: CenterClip(sigma=-1.0)),
        ("p, the order", lambda: CenterClip(p=0.0)),
        ("window is None or two", lambda: CenterClip(window=9)),
        ("window's space or time is a whole", lambda: CenterClip(window=(9, 0))),
        ("keeps nothing", lambda: CenterClip(keep=0)),
        ("at least one stage", lambda: CenterClip(schedule=())),
        ("option schedule", lambda: CenterClip(schedule=3)),
        ("A stage of schedule", lambda: CenterClip(schedule=((1, 2),))),
        ("whole numbers from 1", lambda: CenterClip(frames=4, schedule=((2, 2, 9), (2, 1, 9)))),
        ("only become fewer", lambda: CenterClip(frames=4, schedule=((1, 2, 9), (2, 3, 9)))),
        ("block lies between 1 and 3", lambda: vlmcompress.compress(model, "centerclip", block=LAYERS)),
        ("no language model behind", lambda: vlmcompress.compress(model, "vtc-cls")),
        ("shrinks the pictures", lambda: vlmcompress.compress(model, "resize")),
        ("does not have", lambda: vlmcompress.compress(siglip, "tower-cls")),
        ("Hugging Face, open_clip or timm", lambda: vlmcompress.compress(text, "centerclip")),
        ("takes a model", lambda: vlmcompress.compress("clip", "centerclip")),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert _hooks(model) == 0
    with vlmcompress.compress(model, "centerclip", keep=7, segments=2) as handle:
        with pytest.raises(ValueError, match="already compressed"):
            vlmcompress.compress(model, "tome")
        for said, call in (
            ("Nothing has passed", lambda: handle.last),
            ("Videos come as", lambda: handle.encode_videos(frames()[0])),
            ("mask is", lambda: handle.encode_videos(frames(), torch.ones(2, 3))),
            ("at least one frame", lambda: handle.encode_videos(frames(), torch.zeros(2, 4))),
        ):
            with pytest.raises(ValueError, match=said):
                call()


def test_towers_that_are_not_served():
    import open_clip
    import timm

    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    convolutional = open_clip.model.CLIP(
        embed_dim=16, vision_cfg={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32},
        text_cfg={"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
    )  # fmt: skip
    normed = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 8, "qk_norm": True},
        text_cfg={"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
    )  # fmt: skip
    for model, said in (
        (swin, "no plain vision transformer of timm"),
        (convolutional, "open_clip"),
        (normed, "torch's own"),
    ):
        with pytest.raises(ValueError, match=said):
            vlmcompress.compress(model, "tome", keep=9)


def test_the_catalogue():
    assert vlmcompress.encoders() == ["clip", "open_clip", "siglip", "timm"]
    assert not set(vlmcompress.encoders()) & set(vlmcompress.families())
    assert vlmcompress.support("centerclip", "timm") == (True, "")
    assert vlmcompress.support("vtc-cls", "clip") == (False, "there is no language model behind this tower")
    assert models_encoders.ENCODERS.keys() == set(vlmcompress.encoders())


def test_a_timm_trunk_of_open_clip():
    import open_clip

    model = open_clip.model.CustomTextCLIP(
        embed_dim=16, vision_cfg={"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        text_cfg={"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
    ).eval()  # fmt: skip
    with torch.no_grad(), vlmcompress.compress(model, "centerclip", keep=7, segments=2) as handle:
        assert handle.adapter.model_type == "timm"
        assert handle.encode_videos(torch.randn(2, 4, 3, 160, 160)).shape == (2, 16)
