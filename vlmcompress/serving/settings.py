# SPDX-License-Identifier: Apache-2.0
"""What a server is told about compression, and which methods it can serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..method import POSITIONS, Composition, Method, Stage, create

if TYPE_CHECKING:
    from ..adapters.base import Adapter

#: name of the entry in a model's configuration, and in ``--hf-overrides``
ENTRY = "vlmcompress"

EXAMPLE = '{"vlmcompress": {"method": "vtc-cls", "keep": 64}}'

_ELSE = "'vtc-cls' (on tiled images with \"newlines\": false) or 'grid' with the same number of tokens works"

#: the nearest choice that works, for methods that act inside the language model or read the question ...
NEAREST = {
    "flowcut": 'its cuts inside the vision tower alone can: "llm_layer": null',
    "todre": 'its first stage alone can: "stage2": "never"',
}
#: ... and for those whose number of tokens depends on what an image shows
NEAREST_COUNTED = {
    "globalcom2": 'an exact number of tokens works: "exact_budget": true, or "keep" as a whole number',
    "vtc-cls": 'without newlines it works: "newlines": false',
    "random": "'grid' works",
    "tokenflex-adaptive": "'tokenflex' with a fixed number works",
}


@dataclass(frozen=True)
class Settings:
    """The methods that a server applies to every image."""

    method: Composition

    @classmethod
    def of(cls, config: Any, *, mrope: bool = False) -> Settings | None:
        """The settings in a model's configuration; None where it has none.

        ``config.vlmcompress`` is what ``--hf-overrides`` puts there (``method`` and its options) or what a compressed
        model was saved with. ``mrope``: the family's position ids are three-dimensional. Raises ``ValueError`` in one
        sentence for anything that cannot be served.
        """
        entry = getattr(config, ENTRY, None)
        if entry is None:
            return None
        if not isinstance(entry, Mapping):
            raise ValueError(f"'{ENTRY}' is a mapping such as {EXAMPLE}, not {entry!r}.")
        entry = dict(entry)
        positions = entry.pop("positions", "published")
        parts = entry.pop("methods", None)
        if parts is None:
            method = _single(entry)
        elif entry or not isinstance(parts, list) or not parts:
            raise ValueError(f"'{ENTRY}' holds one 'method' with its options, such as {EXAMPLE}.")
        else:
            method = Composition.of(*(create(part["method"], **part["options"]) for part in parts))
        _check_positions(positions, mrope)
        return cls(method)


def _single(entry: dict[str, Any]) -> Composition:
    name = entry.pop("method", None)
    if not isinstance(name, str):
        raise ValueError(f"'{ENTRY}' names a method, such as {EXAMPLE}; `vlmcompress methods` lists them.")
    return create(name, **entry)


def _check_positions(positions: Any, mrope: bool) -> None:
    if positions not in POSITIONS:
        raise ValueError(f"positions is one of {', '.join(POSITIONS)}, not {positions!r}.")
    served = "original" if mrope else "contiguous"
    if positions not in ("published", served):
        raise ValueError(
            f"A server gives the tokens of this family {served} positions; 'positions': '{positions}' cannot be served."
        )


def check_servable(method: Method, adapter: Adapter, *, counted: bool = True) -> None:
    """Raise ``ValueError`` for a method that acts where a server cannot follow, naming the nearest that works.

    A server keeps what it made of an image for other prompts, and has one length per request in all decoder layers.
    ``counted``: it also counts an image's tokens before it has seen them.
    """
    inside = Stage.CACHE in method.stages or bool(method.cut_layers(adapter))
    # of a method that acts inside too, what it does before reads no prompt
    asks = method.query_aware and not type(method).stages & {Stage.PREFILL, Stage.CACHE}
    if not inside and not asks:
        if counted and not (method.fixed_budget or _exact(method)):
            raise uncertain(Composition.of(method))
        return
    reason = (
        "drops tokens inside the language model, whose layers share one length in a server's KV cache"
        if inside
        else "reads the question, and a server shares an image's tokens between prompts"
    )
    raise ValueError(f"'{method.name}' cannot be served: it {reason}; {NEAREST.get(method.name, _ELSE)}.")


def check_projector(config: Any, settings: Settings | None) -> None:
    """Raise ``ValueError`` for a checkpoint with a trained projector of ours that these settings cannot serve."""
    if getattr(config, "quecc", None):
        raise ValueError(
            "This checkpoint cannot be served: its QueCC projector reads the question, and a server shares an image's tokens "
            "between prompts; one with a TokenFLEX projector can."
        )
    entry = getattr(config, "tokenflex", None)
    if entry and settings is None:
        example = json.dumps({ENTRY: {"method": "tokenflex", "keep": entry["num_image_tokens"]}})
        raise ValueError(f"This checkpoint has a TokenFLEX projector, which vLLM's own class lacks; say {example}.")


def _exact(method: Method) -> bool:
    """Whether a method that can meet a budget exactly is set to do so."""
    options = method.options()
    return "exact_budget" in options and (options["exact_budget"] or isinstance(options["keep"], int))


def uncertain(method: Composition) -> ValueError:
    """The refusal of a method whose number of tokens depends on what an image shows."""
    last = method.at(Stage.TOWER, Stage.ENTRY)[-1]
    hint = NEAREST_COUNTED.get(last.name, _ELSE)
    return ValueError(
        f"'{method.name}' cannot be served as it is: how many tokens it keeps depends on what an image shows, and a server "
        f"counts them before it looks; {hint}."
    )
