# SPDX-License-Identifier: Apache-2.0
"""Load a model, a processor and an image, or say in one sentence why not; put a question to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load(
    name: str, *, dtype: str = "auto", device: Any = "cpu", attn_implementation: str | None = None
) -> tuple[Any, Any]:
    """Model in eval mode and processor of a local folder or a hub id.

    Raises ``ValueError`` in one sentence for a missing folder, one without config, weights or processor, a model
    that reads no images and a family without an adapter.
    """
    from transformers import AutoProcessor

    from ..catalog import families
    from ..checkpoints import loader_of

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"The folder {folder} holds no model: it has no config.json.")
    elif folder.exists():
        raise ValueError(f"{folder} is a file; a model is a folder with config.json, weights and a processor.")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"There is no model folder '{name}'.")
    config = read_config(name)
    if config.model_type not in families():
        known = ", ".join(families())
        raise ValueError(
            f"'{name}' is of the family '{config.model_type}', which is not supported; supported: {known}."
        )
    if folder.is_dir() and not any((folder / file).is_file() for file in PROCESSOR_FILES):
        raise ValueError(f"The folder {folder} has no processor ({' or '.join(PROCESSOR_FILES)} is missing).")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = loader_of(config)(
            name, dtype=dtype, **({} if attn_implementation is None else {"attn_implementation": attn_implementation})
        )
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"'{name}' could not be loaded: {first_sentence(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"'{name}' has no complete processor: its tokenizer or its image processor is missing.")
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


def read_config(name: str) -> Any:
    """Configuration of a local folder or a hub id; no weights are read.

    Raises ``ValueError`` in one sentence for one that cannot be read and for a model that reads no images.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    # whatever libraries make of a damaged folder, the user gets one sentence, with their error as its cause
    except Exception as error:
        raise ValueError(f"The configuration of '{name}' could not be read: {first_sentence(error)}") from error
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"'{name}' ({config.model_type}) is a text-only model; there are no visual tokens to compress."
        )
    return config


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


def turn(question: str, *media: Image.Image | Sequence[Image.Image]) -> list[dict[str, Any]]:
    """A chat of one user turn: its pictures (a sequence of pictures is a video), then the question."""
    shown = [{"type": "image", "image": m} if isinstance(m, Image.Image) else {"type": "video", "video": list(m)}
             for m in media]  # fmt: skip
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def encode_chats(
    model: Any,
    processor: Any,
    chats: Sequence[list[dict[str, Any]]],
    beginnings: Sequence[str] | None = None,
    **processor_options: Any,
) -> dict[str, Any]:
    """Left-padded inputs of a batch of chats on the model's device, pixels in its dtype.

    A chat is a list of messages as the processors of transformers take them: ``{"role", "content": [{"type": "text",
    "text"} | {"type": "image", "image"} | {"type": "video", "video"}]}`` with pictures, frames or paths. ``beginnings``
    are the first words of the answers, behind the prompts; ``processor_options`` go to the processor (``num_frames``).
    """
    prompts = [prompt_of(processor, chat) for chat in chats]
    texts = prompts if beginnings is None else [p + b for p, b in zip(prompts, beginnings, strict=True)]
    parts = [part for chat in chats for message in chat for part in message["content"]]
    media = {f"{kind}s": [p[kind] for p in parts if p["type"] == kind] for kind in ("image", "video")}
    media = {name: found for name, found in media.items() if found}
    bos = processor.tokenizer.bos_token
    if bos and texts[0].startswith(bos):  # the template wrote it; the tokenizer must not do so again
        processor_options["add_special_tokens"] = False
    inputs = processor(text=texts, return_tensors="pt", padding=True, **media, **processor_options)
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def prompt_of(processor: Any, chat: list[dict[str, Any]]) -> str:
    """The processor's own chat template around a chat; LLaVA's plain form, each part on a line, without a template."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(chat, add_generation_prompt=True)
    parts = [part for message in chat for part in message["content"]]
    return "".join(
        (p["text"] if p["type"] == "text" else getattr(processor, f"{p['type']}_token")) + "\n" for p in parts
    )


def encode(model: Any, processor: Any, images: list[Image.Image], questions: list[str]) -> dict[str, Any]:
    """:func:`encode_chats` of one picture and one question each."""
    return encode_chats(model, processor, [turn(q, image) for image, q in zip(images, questions, strict=True)])


@torch.inference_mode()
def answer(
    model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int, until: Sequence[str] = ()
) -> list[str]:
    """Greedy answers to the batch, cut before the first of the strings ``until``."""
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for stop in filter(None, until):
        texts = [text.split(stop)[0] for text in texts]
    return [text.strip() for text in texts]


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
