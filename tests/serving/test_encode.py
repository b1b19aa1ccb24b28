# SPDX-License-Identifier: Apache-2.0
"""The encoder: only tower and projector are loaded, its tokens are the compressed model's, its service says what is wrong."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmcompress import compress, flex
from vlmcompress.serving.encode import Encoder, content_part, unpacked


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def base64_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(autouse=True)
def _whole_pictures(monkeypatch):
    """Importing lmms-eval, as other tests of this process do, tells PIL to accept truncated pictures."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return Encoder.from_pretrained(str(tiny_folder), "vtc-cls", keep=9)


def test_tokens_are_those_of_the_compressed_model(encoder, tiny_folder):
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder).eval()
    processor = AutoProcessor.from_pretrained(tiny_folder)
    images = [noise(60, 90), noise(48, 48)]
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for image, tokens in zip(images, encoder(images), strict=True):
        inputs = processor(text="<image> what color", images=image, return_tensors="pt")
        first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
        with compress(model, "vtc-cls", keep=9), torch.no_grad():
            model(**inputs)
        torch.testing.assert_close(tokens, seen.pop()[0, first : first + 9], atol=1e-6, rtol=0)
    hook.remove()


def test_no_decoder_layer_is_loaded(encoder):
    names = [name for name, _ in encoder.model.named_parameters()]
    assert not any(".layers." in name and "language_model" in name for name in names)
    assert encoder.model.get_input_embeddings().weight.shape[0] == 1
    assert encoder.width == 32


def test_no_image_no_token(encoder):
    assert encoder([]) == []


def test_tensors_travel_as_text(encoder):
    (tokens,) = encoder([noise(48, 48)])
    part = content_part(tokens)
    assert part["type"] == "image_embeds"
    assert torch.equal(unpacked(part["image_embeds"]), tokens)
    for bad in ("no base64!", base64.b64encode(b"nothing").decode(), ""):
        with pytest.raises(ValueError, match="tensor"):
            unpacked(bad)


def test_what_cannot_be_encoded_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="cannot be served"):
        Encoder.from_pretrained(str(tiny_folder), "fastv")
    with pytest.raises(ValueError, match="keeps nothing"):
        Encoder.from_pretrained(str(tiny_folder), "vtc-cls", keep=0)


def test_the_number_may_follow_from_what_the_image_shows(tiny_folder):
    encoder = Encoder.from_pretrained(str(tiny_folder), "token-correlation")
    plain, busy = Image.new("RGB", (48, 48), "red"), noise(48, 48)
    assert len({len(tokens) for tokens in encoder([plain, busy])}) == 2


@pytest.mark.parametrize("keep", [4, 9, 36])
def test_a_flexible_projector_makes_any_number(tiny_folder, tmp_path, keep):
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tiny_folder).eval(),
        AutoProcessor.from_pretrained(tiny_folder),
    )
    flex.install(model, counts=(4, 9))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = noise(60, 90)
    (tokens,) = Encoder.from_pretrained(str(tmp_path), "tokenflex", keep=keep)([image])
    with torch.no_grad():
        model.model.multi_modal_projector.num_image_tokens = keep
        pixels = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
        (expected,) = model.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)


def test_families_counted_by_grid_are_refused():
    from models_qwen import tiny_qwen

    model = tiny_qwen(family="qwen2_5_vl")
    with pytest.raises(ValueError, match="use the plug-in for vLLM"):
        Encoder(model, None, "grid", keep=4)


@pytest.fixture(scope="module")
def client(encoder):
    from fastapi.testclient import TestClient

    from vlmcompress.serving.service import create_app

    return TestClient(create_app(encoder))


def test_the_service_encodes(client, encoder):
    images = [noise(60, 90), noise(48, 48)]
    address = "data:image/png;base64," + base64_of(images[1])
    answer = client.post("/v1/encode", json={"images": [base64_of(images[0]), address]})
    assert answer.status_code == 200 and answer.json()["width"] == 32
    for found, expected in zip(answer.json()["images"], encoder(images), strict=True):
        assert found["tokens"] == 9
        assert torch.equal(unpacked(found["image_embeds"]), expected)
    assert client.get("/health").status_code == 200


def test_photos_are_turned_upright(client):
    """As a server of vLLM does with the pixels that it is sent."""
    photo, exif = noise(60, 90), Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    sideways, buffer = photo.transpose(Image.Transpose.ROTATE_90), io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    texts = [base64.b64encode(buffer.getvalue()).decode(), base64_of(photo), base64_of(sideways)]
    turned, upright, lying = client.post("/v1/encode", json={"images": texts}).json()["images"]
    assert turned == upright != lying


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "JSON"),
        (b"{}", 400, "list of at least one"),
        (b'{"images": []}', 400, "list of at least one"),
        (b'{"images": [3]}', 400, "list of at least one"),
        (b'{"images": ["***"]}', 400, "base64"),
        (b'{"images": ["bm90aGluZw=="]}', 400, "could not be read as a picture"),
        (json.dumps({"images": ["a"] * 17}).encode(), 413, "17 images are more than the 16"),
        (f'{{"images": ["{base64_of(Image.new("1", (12_000, 9_000)))}"]}}'.encode(), 400, "more than the 89 million"),
        (f'{{"images": ["{base64_of(noise(60, 60))[:400]}"]}}'.encode(), 400, "damaged"),
    ],
)
def test_bad_requests_get_a_sentence(client, body, status, words):
    answer = client.post("/v1/encode", content=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]
