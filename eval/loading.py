# SPDX-License-Identifier: Apache-2.0
"""Load a model, a processor and an image, or say in one sentence why not; put a question to them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load(name: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Model in eval mode and processor of a local folder or a hub id.

    Raises ``ValueError`` in one sentence for a missing folder, one without config, weights or processor, a model
    that reads no images and a family without an adapter.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from ..catalog import families

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"The folder {folder} holds no model: it has no config.json.")
    elif folder.exists():
        raise ValueError(f"{folder} is a file; a model is a folder with config.json, weights and a processor.")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"There is no model folder '{name}'.")
    try:
        config = AutoConfig.from_pretrained(name)
    # whatever libraries make of a damaged folder, the user gets one sentence, with their error as its cause
    except Exception as error:
        raise ValueError(f"The configuration of '{name}' could not be read: {first_sentence(error)}") from error
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"'{name}' ({config.model_type}) is a text-only model; there are no visual tokens to compress."
        )
    if config.model_type not in families():
        known = ", ".join(families())
        raise ValueError(
            f"'{name}' is of the family '{config.model_type}', which is not supported; supported: {known}."
        )
    if folder.is_dir() and not any((folder / file).is_file() for file in PROCESSOR_FILES):
        raise ValueError(f"The folder {folder} has no processor ({' or '.join(PROCESSOR_FILES)} is missing).")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"'{name}' could not be loaded: {first_sentence(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"'{name}' has no complete processor: its tokenizer or its image processor is missing.")
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


def open_image(path: str | Path) -> Image.Image:
    """The picture as RGB. Raises ``ValueError`` in one sentence when it is missing or no readable image."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no image file '{path}'.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{path}' could not be read as an image: it is damaged or of an unknown format.") from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, without what libraries append about hubs and tracebacks."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


def prompt_of(processor: Any, question: str) -> str:
    """The processor's own chat template around one image and the question; LLaVA's plain form without a template."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{processor.image_token}\n{question}\n"


def encode(model: Any, processor: Any, images: list[Image.Image], questions: list[str]) -> dict[str, Any]:
    """Left-padded inputs of a batch on the model's device, pixels in its dtype."""
    prompts = [prompt_of(processor, question) for question in questions]
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


@torch.inference_mode()
def answer(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Greedy answers to the batch."""
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return [
        text.strip()
        for text in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def fingerprint(name: str) -> str:
    """Digest of a local model's configuration, tokenizer, processor and weights; a hub id stands for itself.

    Of weights it reads the sizes and both ends, so that a folder of many gigabytes costs nothing.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as stream:
                head = stream.read(1 << 20)
                stream.seek(max(0, file.stat().st_size - (1 << 20)))
                digest.update(json.dumps([file.name, file.stat().st_size]).encode() + head + stream.read())
        elif file.suffix in (".json", ".jinja", ".txt", ".model"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
