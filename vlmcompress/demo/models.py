# SPDX-License-Identifier: Apache-2.0
"""The models that the page has loaded: shared by all users, handed to one at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[2]
#: shipped with the repository, not with the wheel
SHIPPED, SAMPLES, RESULTS = ROOT / "assets" / "models", ROOT / "assets" / "images", ROOT / "results"
DEFAULT = SHIPPED / "tiny-llava"


@dataclass(eq=False, repr=False)
class Loaded:
    """One model with its processor; whoever runs it holds ``lock``, so that a request meets no other's handle."""

    name: str
    model: Any
    processor: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def label(self) -> str:
        """What a user calls it: the folder's name, or the hub id."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name

    def new_tokens(self) -> int:
        """How long an answer may be: what the model's folder says, or 64."""
        return self.model.generation_config.max_new_tokens or 64


class Pool:
    """Loaded models by name; the one used longest ago leaves when there are more than ``size``."""

    def __init__(self, device: str = "cpu", size: int = 2):
        self.device, self.size = device, size
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def get(self, name: str) -> Loaded:
        """The model ``name``, loaded and warmed up where it is not there yet.

        Raises ``ValueError`` in one sentence where it cannot be loaded; nothing that is loaded changes then.
        """
        from ..eval.loading import load

        name = str(name).strip()
        if not name:
            raise ValueError("Name a model: a folder on this machine or a hub id.")
        found = self._known(name)
        if found is not None:
            return found
        with self._loading:  # whoever uses a model that is there need not wait for this
            found = self._known(name)
            if found is None:
                found = Loaded(name, *load(name, device=self.device))
                _warm_up(found)
                with self._lock:
                    self._models[name] = found
                    while len(self._models) > self.size:
                        self._models.popitem(last=False)
            return found

    def _known(self, name: str) -> Loaded | None:
        with self._lock:
            if name in self._models:
                self._models.move_to_end(name)
            return self._models.get(name)


def _warm_up(loaded: Loaded) -> None:
    """Answer once, so that the first user's clock does not tell of kernels being set up."""
    from ..eval.loading import answer, encode

    inputs = encode(loaded.model, loaded.processor, [Image.new("RGB", (64, 64), "white")], ["what is this ?"])
    answer(loaded.model, loaded.processor, inputs, 2)


def shipped() -> list[str]:
    """Folders of the models that this repository ships."""
    return [str(folder) for folder in sorted(SHIPPED.glob("*/")) if (folder / "config.json").is_file()]


def methods_for(family: str) -> dict[str, str]:
    """Name → summary of the methods that work on a family and can be chosen first, ``none`` left out."""
    from ..catalog import methods, support

    return {name: cls.summary for name, cls in methods().items() if name != "none" and support(name, family)[0]}


def second_stages(family: str) -> list[str]:
    """Methods that can stand behind another: they act inside the language model or on the cache only."""
    from ..catalog import methods
    from ..method import Stage

    late = {Stage.PREFILL, Stage.CACHE}
    return [name for name in methods_for(family) if methods()[name].stages and methods()[name].stages <= late]
