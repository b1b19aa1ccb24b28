# SPDX-License-Identifier: Apache-2.0
"""What one prefill did, in numbers: tokens, FLOPs with the compressor's own inside, and KV bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .eval import flops as counter
from .eval import profiles

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from .ledger import VisualTokens


@dataclass(frozen=True)
class Report:
    """Numbers of one prefill, summed over the ``samples`` of its batch; ``*_before`` is the uncompressed model.

    ``layer_tokens[l]``: visual tokens that decoder layer l processed. ``flops`` and ``flops_before``: by convention
    (``macs``, ``flops``, ``full``; see ``vlmcompress.eval.flops``). ``compressor_flops``: the method's own, contained
    in ``flops``. ``kv_bytes``: keys and values that the prefill left behind, text included. ``note``: why ``flops`` is
    empty, for a model whose FLOPs are not known. ``kv_visual``, ``kv_text``: cache entries of either kind, averaged over
    heads and layers, where a method acts on the cache.
    """

    samples: int
    images: int
    text_tokens: int
    tokens_before: int
    tokens: int
    layer_tokens: tuple[int, ...]
    flops_before: dict[str, float]
    flops: dict[str, float]
    compressor_flops: float
    kv_bytes_before: float
    kv_bytes: float
    note: str = ""
    kv_visual: float | None = None
    kv_text: float | None = None
    videos: int = 0

    @classmethod
    def from_ledger(cls, config: Any, ledger: VisualTokens | None, *, dtype: torch.dtype | None = None) -> Report:
        """Read the numbers off the ledger of the last prefill.

        ``config``: the model's; ``dtype``: of its cache (default: the config's). Raises ``ValueError`` when no visual
        token ever passed, so that a method that was never applied cannot report a success.
        """
        samples = [] if ledger is None else ledger.samples
        images = [image for sample in samples for image in sample.images]
        if ledger is None or not images:
            raise ValueError("There is nothing to report: no image has passed through the model since compress().")
        flops, flops_before, note = _flops(config, ledger)
        size = _bytes_per_number(dtype or config.dtype) * counter.kv_numbers(config.get_text_config())
        tokens_before = sum(image.n_original for image in images)
        text = sum(sample.text_tokens for sample in samples)
        entries = [sum(layer) for layer in zip(*profiles.cache_entries(ledger), strict=True)]
        return cls(
            samples=len(samples),
            images=sum(image.kind == "image" for image in images),
            videos=sum(image.kind == "video" for image in images),
            text_tokens=text,
            tokens_before=tokens_before,
            tokens=sum(len(image.kept) for image in images),
            layer_tokens=tuple(ledger.layer_tokens),
            flops_before=flops_before,
            flops=flops,
            compressor_flops=ledger.compressor_flops,
            kv_bytes_before=(tokens_before + text) * ledger.n_layers * size,
            kv_bytes=sum(entries) * size,
            note=note,
            **_modality(ledger),
        )

    @property
    def layer_averaged_tokens(self) -> float:
        """Visual tokens that a decoder layer processed on average."""
        return sum(self.layer_tokens) / len(self.layer_tokens)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"layer_averaged_tokens": self.layer_averaged_tokens}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        seen = [f"{n} {kind}(s), " for n, kind in ((self.images, "image"), (self.videos, "video")) if n]
        table = Table(title=f"{self.samples} prompt(s), {''.join(seen)}{self.text_tokens} text tokens")
        for column in ("", "uncompressed", "compressed", "share"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        rows: list[tuple[str, float, float, str]] = [
            ("visual tokens in", self.tokens_before, self.tokens, ",.0f"),
            ("visual tokens, layer average", self.tokens_before, self.layer_averaged_tokens, ",.1f"),
        ]
        for label, name in (("GFLOPs of the prefill, all parts", "full"), ("GMACs on visual tokens", "macs")):
            if self.flops:
                rows.append((label, self.flops_before[name] / 1e9, self.flops[name] / 1e9, ",.4g"))
        rows.append(("KV cache, KiB", self.kv_bytes_before / 1024, self.kv_bytes / 1024, ",.0f"))
        if self.kv_visual is not None and self.kv_text is not None:
            rows.append(("cache entries of visual tokens", self.tokens_before, self.kv_visual, ",.1f"))
            rows.append(("cache entries of text", self.text_tokens, self.kv_text, ",.1f"))
        for label, before, after, form in rows:
            share = f"{after / before:.1%}" if before else "–"
            table.add_row(label, f"{before:{form}}", f"{after:{form}}", share)
        own = "of which the method's own GFLOPs" if self.flops else "GFLOPs of the method itself"
        table.add_row(own, "", f"{self.compressor_flops / 1e9:,.4g}", "")
        return Group(table, self.note) if self.note else table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=96, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _flops(config: Any, ledger: VisualTokens) -> tuple[dict[str, float], dict[str, float], str]:
    """By convention, with and without compression; empty with a sentence that says why where they are not known."""
    try:
        shape = counter.ModelShape.from_config(config)
    except counter.UnknownFlopsError as error:
        return {}, {}, f"FLOPs are not known for the {error.what}."
    after, before = profiles.compressed(shape, ledger), profiles.uncompressed(shape, ledger)

    def summed(samples: list[counter.Profile]) -> dict[str, float]:
        return {name: sum(count(shape, p) for p in samples) for name, count in counter.CONVENTIONS.items()}

    return summed(after), summed(before), ""


def _modality(ledger: VisualTokens) -> dict[str, float]:
    """Cache entries by modality, layer averages summed over the batch."""
    layers = ledger.cache_modality
    if layers is None:
        return {}
    visual, text = (sum(float(layer[kind].sum()) for layer in layers) / len(layers) for kind in (0, 1))
    return {"kv_visual": visual, "kv_text": text}


def _bytes_per_number(dtype: torch.dtype | str | None) -> int:
    import torch

    found = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype or torch.float32
    return found.itemsize
