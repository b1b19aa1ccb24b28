# SPDX-License-Identifier: Apache-2.0
"""Write the sample images that docs and quick starts use: ``python -m vlmcompress.training.samples assets/images``."""

import json
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from vlmcompress.eval.tasks import load

from .hires import HIRES, HIRES_WEIGHTS
from .questions import KINDS, ask
from .scenes import SceneConfig, make_scene

SEED = 99_000_000  # neither trained on nor part of a test set
INDICES = (2, 5, 7)


def main(folder: Path) -> None:
    """Three scenes, a wide one, two for tiled models, and two test images of easy-VQA, with questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []

    def add(name: str, image: Image.Image, questions: list[tuple[str, str]]) -> None:
        image.save(folder / name)
        rows.extend({"image": name, "question": question, "answer": answer} for question, answer in questions)

    for n, index in enumerate(INDICES):
        scene = make_scene(SEED, index, SceneConfig(objects=(3, 5)))
        asked = ask(scene, np.random.default_rng((SEED, index, 1)), len(KINDS), dict.fromkeys(KINDS, 1.0))
        add(f"scene-{n + 1}.png", scene.image, [(qa.question, qa.answer) for qa in asked])
    scene = make_scene(SEED, 11, SceneConfig(objects=(2, 3)))
    wide = Image.new("RGB", (160, 96), scene.image.getpixel((0, 0)))
    wide.paste(scene.image, (32, 0))  # the processor cuts out the middle, which is the scene
    asked = ask(scene, np.random.default_rng((SEED, 11, 1)), 4, {"color": 1.0, "existence": 1.0})
    add("scene-wide.png", wide, [(qa.question, qa.answer) for qa in asked])
    for n, config in enumerate(HIRES[:2]):
        scene = make_scene(SEED, n, config)
        asked = ask(scene, np.random.default_rng((SEED, n, 1)), len(KINDS), HIRES_WEIGHTS)
        add(f"hires-{n + 1}.png", scene.image, [(qa.question, qa.answer) for qa in asked])
    samples = load("easy-vqa")
    for n, image_id in enumerate(("test-0-", "test-3-")):
        mine = [sample for sample in samples if sample.id.startswith(image_id)][:4]
        add(f"easy-vqa-{n + 1}.png", mine[0].image, [(sample.question, sample.answer) for sample in mine])
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
