# SPDX-License-Identifier: Apache-2.0
"""A compressed model for lmms-eval: any supported family of transformers, any method, in left-padded batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from torch.nn.functional import log_softmax
from tqdm import tqdm

from ...attach import compress
from ..loading import answer, encode_chats, load
from ..rows import parse_options

#: what a generation may be told besides its length and its end: greedy decoding only, as every number of this project
GREEDY = {"do_sample": (False, None), "temperature": (0, None), "num_beams": (1, None), "top_p": None}


class CompressedModel(lmms):
    """``AutoModelForImageTextToText`` with a method on it, as a chat model of lmms-eval.

    Args:
        pretrained: model folder or hub id.
        method: a registered name, see ``vlmcompress methods``; "none" is the uncompressed model.
        keep: visual tokens per image, or their share; left out where the method has no such option.
        positions: of the survivors, see :func:`vlmcompress.compress`.
        device: where there is one process; ``accelerate launch`` gives every process its own.
        dtype: of the weights, "auto" for the checkpoint's.
        batch_size: prompts per batch and process.
        attn_implementation: passed to ``from_pretrained``.
        square: pad pictures to squares with the processor's mean colour, as LLaVA-1.5's own code does; the processors
            of its checkpoints on the hub cut the longer side off instead.
        num_frames, fps: frames taken from a video file, as the processor of the family understands them.
        system_prompt: put in front of every chat; the path of a file stands for its text.
        **options: further options of the method, for example ``layer=2``.

    Raises:
        ValueError: in one sentence, for everything that :func:`vlmcompress.compress` and the loader refuse.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "none",
        keep: int | float | None = None,
        *,
        positions: str = "published",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        attn_implementation: str | None = None,
        square: bool = False,
        num_frames: int | None = None,
        fps: float | None = None,
        system_prompt: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is a number of prompts, not '{batch_size}'; there is no automatic choice.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1 and device is not None
        self.device = torch.device(device) if alone else self.accelerator.device
        self.model, self.processor = load(
            pretrained, dtype=dtype, device=self.device, attn_implementation=attn_implementation
        )
        self.config, self.tokenizer = self.model.config, self.processor.tokenizer
        self.square = square
        self.system_prompt = system_prompt and self._resolve_system_prompt(system_prompt)
        self.frames = {k: v for k, v in {"num_frames": num_frames, "fps": fps}.items() if v is not None}
        options = parse_options([f"{name}={value}" for name, value in options.items()])
        if keep is not None:
            options["keep"] = keep
        self.handle = compress(self.model, method, positions=positions, **options)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Greedy answers in the order of the requests; batches never mix generation settings."""
        found: dict[int, GenerationResult] = {}
        for batch, settings in self._batches(requests, self._settings):
            chats = [self._chat(requests[i]) for i in batch]
            inputs = self._encode(chats)
            texts = answer(self.model, self.processor, inputs, settings["max_new_tokens"], settings["until"])
            self._check_applied(chats)
            for i, text in zip(batch, texts, strict=True):
                counts = TokenCounts(output_tokens=len(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
                found[i] = GenerationResult(text, counts)
        return [found[i] for i in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of each continuation and whether greedy decoding would give it.

        Lower is better: lmms-eval takes the smallest of a question's choices (``Task.process_results``).
        """
        found: dict[int, tuple[float, bool]] = {}
        for batch, _ in self._batches(requests, lambda request: {}):
            endings = [self._continuation(requests[i]) for i in batch]
            chats = [self._chat(requests[i]) for i in batch]
            before = self._encode(chats)["attention_mask"].sum(dim=1)
            inputs = self._encode(chats, endings)
            lengths = (inputs["attention_mask"].sum(dim=1) - before).tolist()
            if min(lengths) < 1:
                raise ValueError("A continuation without a token has no likelihood.")
            longest = max(lengths)
            logits = self.model(**inputs, use_cache=True, logits_to_keep=longest + 1).logits.float()
            self._check_applied(chats)
            chances = log_softmax(logits[:, -longest - 1 : -1], dim=-1)
            targets = inputs["input_ids"][:, -longest:]
            picked = chances.gather(-1, targets[..., None])[..., 0]
            greedy = chances.argmax(dim=-1) == targets
            for row, (i, n) in enumerate(zip(batch, lengths, strict=True)):
                found[i] = (-picked[row, -n:].mean().item(), bool(greedy[row, -n:].all()))
        return [found[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vlmcompress answers questions of one round; multi-round tasks are not supported.")

    # Every chat of a request comes from here and from `_continuation`; the simple interface has other arguments.

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        return self._apply_system_prompt(messages, self.system_prompt)

    def _settings(self, request: Instance) -> dict[str, Any]:
        return settings_of(request.args[2])

    def _continuation(self, request: Instance) -> str:
        raise NotImplementedError("Likelihoods are asked through the simple interface: add --force_simple.")

    def _batches(
        self, requests: Sequence[Instance], settings: Callable[[Instance], dict[str, Any]]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Indices of the requests of each batch, with the settings that they share."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(settings(request)), []).append(i)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as progress:
            for key, members in groups.items():
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    yield batch, json.loads(key)
                    progress.update(len(batch))
        if self.handle.last is not None:
            logger.info(f"{self.handle.report()}")

    def _encode(self, chats: list[list[dict[str, Any]]], beginnings: list[str] | None = None) -> dict[str, Any]:
        videos = any(part["type"] == "video" for chat in chats for m in chat for part in m["content"])
        if self.square:
            chats = [_squared(chat, self.processor.image_processor.image_mean) for chat in chats]
        return encode_chats(self.model, self.processor, chats, beginnings, **(self.frames if videos else {}))

    def _check_applied(self, chats: list[list[dict[str, Any]]]) -> None:
        """A method that no picture passed through must not go unnoticed."""
        shown = any(part["type"] in ("image", "video") for chat in chats for m in chat for part in m["content"])
        if shown and self.handle.last is None:
            raise RuntimeError(f"The method '{self.handle.method.name}' was not applied to a batch with pictures.")


class SimpleCompressedModel(CompressedModel):
    """The same behind lmms-eval's older interface (``--force_simple``), which is the one of multiple-choice tasks."""

    is_simple = True

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        context, doc_to_visual, (doc_id, task, split) = request.args[0], request.args[2], request.args[-3:]
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        content = [_visual(visual) for visual in visuals] + [{"type": "text", "text": context}]
        return self._apply_system_prompt([{"role": "user", "content": content}], self.system_prompt)

    def _settings(self, request: Instance) -> dict[str, Any]:
        return settings_of(request.args[1])

    def _continuation(self, request: Instance) -> str:
        target, (doc_id, task, split) = request.args[1], request.args[-3:]
        return target if isinstance(target, str) else str(target(self.task_dict[task][split][doc_id]))


def settings_of(generation: dict[str, Any] | None) -> dict[str, Any]:
    """``max_new_tokens`` and ``until`` of a task's generation settings; ``ValueError`` where they ask for sampling."""
    generation = dict(generation or {})
    until = generation.pop("until", None) or []
    settings = {
        "max_new_tokens": int(generation.pop("max_new_tokens", None) or generation.pop("max_gen_toks", None) or 256),
        "until": [until] if isinstance(until, str) else list(until),
    }
    for name, allowed in GREEDY.items():
        value = generation.get(name)
        if allowed is not None and value not in allowed:
            raise ValueError(f"Answers are decoded greedily, but the task asks for {name}={value}.")
    return settings


def _squared(chat: list[dict[str, Any]], mean: Sequence[float]) -> list[dict[str, Any]]:
    """The chat with its pictures centred on squares of the colour ``mean``."""
    colour = tuple(int(255 * part) for part in mean)

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        image = part["image"].convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return part | {"image": square}

    return [message | {"content": [part_of(part) for part in message["content"]]} for message in chat]


def _visual(visual: Any) -> dict[str, Any]:
    if isinstance(visual, dict):
        kind = visual.get("type", "video")
        return {"type": kind, kind: visual.get("url") or visual.get("path")}
    kind = "video" if isinstance(visual, (str, list, tuple)) else "image"
    return {"type": kind, kind: visual}
