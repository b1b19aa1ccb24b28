# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a model folder per kind of question, whole and with a random choice of its visual tokens.

``python -m vlmcompress.training.evaluate assets/models/tiny-llava --task scenes --keep 16``: a check of the model that
stands apart from the library's hooks. It gathers the input embeddings itself; the answer is the likeliest next word.
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmcompress.eval.loading import prompt_of
from vlmcompress.eval.tasks import Sample, load, score


@torch.no_grad()
def answers(
    model, processor, samples: list[Sample], keep: int | str | None = None, contiguous: bool = False, seed: int = 0
) -> list[str]:
    """One word per sample. ``keep`` leaves each prompt that many random visual tokens, in their order; of a tiled model
    "thumbnail" leaves the tokens of the thumbnail and "crops" all others.

    ``contiguous`` renumbers what is left; otherwise the survivors and the text keep their positions.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [prompt_of(processor, sample.chat()) for sample in samples]
    lengths: dict[tuple, list[int]] = defaultdict(list)
    for i, ids in enumerate(processor.tokenizer(prompts)["input_ids"]):
        frames = [samples[i].image] if isinstance(samples[i].image, Image.Image) else samples[i].image
        lengths[(len(ids), len(frames), frames[0].size)].append(i)
    found = [""] * len(samples)
    for same in lengths.values():  # prompts of one length, and images of one size, need no padding
        for start in range(0, len(same), 64):
            rows = same[start : start + 64]
            kind = "images" if isinstance(samples[rows[0]].image, Image.Image) else "videos"
            media = [samples[i].image if kind == "images" else list(samples[i].image) for i in rows]
            inputs = processor(text=[prompts[i] for i in rows], return_tensors="pt", **{kind: media}).to(model.device)
            words = _next_words(model, inputs, keep, contiguous, generator)
            for i, word in zip(rows, processor.tokenizer.batch_decode(words[:, None]), strict=True):
                found[i] = word
    return found


def _next_words(model, inputs, keep: int | str | None, contiguous: bool, generator) -> torch.Tensor:
    """Ids [B] of the likeliest next words."""
    ids = inputs["input_ids"]
    core = model.model
    video = "pixel_values_videos" in inputs
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    seen = {name: inputs[name] for name in names if name in inputs}
    read = core.get_video_features if video else core.get_image_features
    image = torch.stack(list(read(**seen, return_dict=True).pooler_output))
    here = ids == (model.config.video_token_id if video else model.config.image_token_id)
    embeds = core.get_input_embeddings()(ids).masked_scatter(here[..., None], image)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if hasattr(core, "get_rope_index"):  # M-RoPE: time, row and column
        more = {name: inputs[name] for name in ("mm_token_type_ids", "second_per_grid_ts") if name in inputs}
        grids = {name: grid for name, grid in seen.items() if name.endswith("_grid_thw")}
        places, _ = core.get_rope_index(ids, **grids, **more)
    if keep is not None:
        kept = _kept(here, keep, model.config.vision_config, generator)
        embeds = embeds.gather(1, kept[..., None].expand(-1, -1, embeds.shape[-1]))
        places = places.gather(-1, kept.expand(*places.shape[:-1], -1))
        if contiguous:
            places = torch.arange(kept.shape[1], device=ids.device).expand_as(places)
    # an all-ones mask: without it, gaps in the positions would be taken for packed sequences
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=ids.device)
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1)


def _kept(here: torch.Tensor, keep: int | str, vision, generator) -> torch.Tensor:
    """Indices [B, K] of the text and of the visual tokens that stay, from the mask [B, S] of the visual ones."""
    if isinstance(keep, str):
        cells = (vision.image_size // vision.patch_size) ** 2
        first = here.cumsum(1) <= cells
        stay = ~here | (first if keep == "thumbnail" else ~first)
        return stay.nonzero()[:, 1].view(len(here), -1)
    if not keep:
        return (~here).nonzero()[:, 1].view(len(here), -1)
    noise = torch.rand(here.shape, generator=generator).to(here.device).masked_fill(~here, 2.0)
    return noise.topk(keep + int((~here[0]).sum()), dim=1).indices.sort(1).values


def accuracy(samples: list[Sample], said: list[str]) -> dict[str, float]:
    """Share of right answers, over all and per kind."""
    marks = defaultdict(list)
    for sample, word in zip(samples, said, strict=True):
        marks["all"].append(score(word, sample.answer))
        marks[sample.kind].append(score(word, sample.answer))
    return {kind: sum(found) / len(found) for kind, found in marks.items()}


def main(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    task: Annotated[str, typer.Option(help="Task to ask.")] = "scenes",
    keep: Annotated[list[int] | None, typer.Option(help="Also with so many random visual tokens.")] = None,
    seeds: Annotated[int, typer.Option(help="Random choices to average over.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Ask a stratified subset.")] = None,
) -> None:
    """Print the accuracy of a model per kind of question."""
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor, samples = AutoProcessor.from_pretrained(model), load(task, limit=limit)

    def show(name: str, row: dict[str, float]) -> None:
        typer.echo(f"{name}: " + ", ".join(f"{kind} {100 * value:.1f}" for kind, value in row.items()))

    show("every token", accuracy(samples, answers(loaded, processor, samples)))
    views = ["thumbnail", "crops"] if loaded.config.model_type == "llava_next" else []
    for part in [*views, *(keep or [])]:
        for contiguous in (False, True):
            draws = range(1 if part in views else seeds)
            runs = [accuracy(samples, answers(loaded, processor, samples, part, contiguous, s)) for s in draws]
            mean = {kind: sum(run[kind] for run in runs) / len(runs) for kind in runs[0]}
            name = f"{part} only" if part in views else f"random {part}"
            show(f"{name}, {'contiguous' if contiguous else 'original'} positions", mean)


if __name__ == "__main__":
    typer.run(main)
