# SPDX-License-Identifier: Apache-2.0
"""What the page shows of a run, as HTML. Everything that a user, a model or a file wrote is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from ..report import Report
from .ask import UNCOMPRESSED, Answer, Run


@dataclass(frozen=True)
class Metric:
    """A row of bars. ``of(answer, report)`` with ``report`` that of the compressed run: None where it is not known."""

    label: str
    words: Callable[[float], str]
    of: Callable[[Answer, Report], float | None]
    more_is_better: bool = False


def _by_side(before: Callable[[Report], float | None], after: Callable[[Report], float | None]) -> Any:
    return lambda answer, report: (before if answer.name == UNCOMPRESSED else after)(report)


def operations(count: float) -> str:
    """Floating-point operations in the unit that leaves one to three digits before the point."""
    for factor, unit in ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")):
        if count >= factor:
            return f"{count / factor:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kFLOPs"


def _kib(count: float) -> str:
    return f"{count / 1024:,.0f} KiB"


def _ms(time: float) -> str:
    return f"{time:,.1f} ms"


METRICS = (
    Metric("Visual tokens in", "{:,.0f}".format, _by_side(lambda r: r.tokens_before, lambda r: r.tokens)),
    Metric(
        "Visual tokens, average over layers", "{:,.1f}".format,
        _by_side(lambda r: r.tokens_before, lambda r: r.layer_averaged_tokens),
    ),
    Metric(
        "FLOPs of the prefill", operations,
        _by_side(lambda r: r.flops_before.get("full"), lambda r: r.flops.get("full")),
    ),
    Metric("Keys and values", _kib, _by_side(lambda r: r.kv_bytes_before, lambda r: r.kv_bytes)),
    Metric("Prefill", _ms, lambda a, r: a.prefill.median if a.prefill else None),
    Metric("Time to first token", _ms, lambda a, r: a.first_ms),
    Metric("Decoding", "{:,.3g} tokens/s".format, lambda a, r: a.tokens_per_s, more_is_better=True),
)  # fmt: skip


def sentence(text: str, kind: str = "error") -> str:
    """One sentence for the user; ``kind`` "error" is read out at once."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<p class="vc-{kind}" role="{role}">{escape(text)}</p>'


def answer_card(title: str, answer: Answer | None) -> str:
    """One side of the two answers."""
    if answer is None:
        body, state = "–", "waits"
    elif answer.error:
        body, state = escape(answer.error), "failed"
    else:
        body, state = escape(answer.text) or ("(nothing)" if answer.done else "…"), "done" if answer.done else "comes"
    return (
        f'<section class="vc-card vc-{state}"><h3>{escape(title)}</h3>'
        f'<p class="vc-answer" data-state="{state}">{body}</p></section>'
    )


def costs(run: Run, name: str) -> str:
    """Bars of the uncompressed and of one compressed answer, and the ratio between them."""
    before, after = run.answers[UNCOMPRESSED], run.answers[name]
    if after.report is None:
        return ""
    rows = [_bars(metric, before, after, after.report) for metric in METRICS]
    notes = [after.report.note] if after.report.note else []
    if after.report.flops:
        notes.append(f"The method's own work, inside: {operations(after.report.compressor_flops)}.")
    if after.prefill:
        notes.append(f"Prefill: median of {after.prefill.runs}, taken in turns with the uncompressed model.")
    else:
        notes.append("Prefill: too slow here to be repeated for the clock.")
    legend = (
        '<p class="vc-legend"><span class="vc-key vc-before"></span>uncompressed'
        '<span class="vc-key vc-after"></span>compressed</p>'
    )
    return f'<div class="vc-costs">{legend}{"".join(rows)}<p class="vc-note">{escape(" ".join(notes))}</p></div>'


def _bars(metric: Metric, before: Answer, after: Answer, report: Report) -> str:
    a, b = metric.of(before, report), metric.of(after, report)
    most = max(a or 0, b or 0) or 1

    def bar(kind: str, value: float | None) -> str:
        text = "not measured" if value is None else metric.words(value)
        width = 100 * (value or 0) / most
        return (
            f'<div class="vc-line"><div class="vc-track"><div class="vc-bar vc-{kind}" style="width:{width:.2f}%"></div>'
            f'</div><span class="vc-value">{text}</span></div>'
        )

    return (
        f'<div class="vc-metric"><div class="vc-name"><span>{escape(metric.label)}</span><b>{_ratio(metric, a, b)}</b></div>'
        f"{bar('before', a)}{bar('after', b)}</div>"
    )


def _ratio(metric: Metric, before: float | None, after: float | None) -> str:
    """How the compressed side compares, in words that hold for both directions."""
    if not before or not after:
        return ""
    if metric.words(before) == metric.words(after):
        return "the same"
    factor, word = max(before, after) / min(before, after), "more" if after > before else "less"
    if metric.more_is_better:
        word = "faster" if after > before else "slower"
    return f"{factor:.3g}× {word}" if factor >= 1.1 else f"{100 * (factor - 1):.1f} % {word}"


def profile(before: int, layer_tokens: Sequence[int], chosen: int) -> str:
    """Visual tokens that each decoder layer processed, as columns; ``chosen`` is the one that the picture shows."""
    most = max(before, *layer_tokens, 1)
    columns = "".join(
        f'<div class="vc-column{" vc-chosen" if layer == chosen else ""}" title="layer {layer}: {tokens:,} tokens">'
        f'<div class="vc-fill" style="height:{100 * tokens / most:.2f}%"></div></div>'
        for layer, tokens in enumerate(layer_tokens)
    )
    last = len(layer_tokens) - 1
    label = f"Visual tokens by decoder layer: {', '.join(map(str, layer_tokens))}"
    return (
        f'<figure class="vc-profile"><figcaption>Visual tokens in each decoder layer: '
        f"<b>{layer_tokens[chosen]:,}</b> of {before:,} in layer {chosen}</figcaption>"
        f'<div class="vc-columns" role="img" aria-label="{label}">{columns}</div>'
        f'<div class="vc-axis"><span>layer 0</span><span>layer {last}</span></div></figure>'
    )


def budget(step_share: float, tokens: int | None, n: int | None, used: bool = True) -> str:
    """The words under the budget slider."""
    if not used:
        return '<p class="vc-budget">This method has no budget per image; set its options under “More”.</p>'
    percent = f"{100 * step_share:.3g} %"
    words = f"{percent} of the visual tokens" if n is None else f"<b>{tokens:,}</b> of {n:,} visual tokens ({percent})"
    return f'<p class="vc-budget">{words}</p>'


def embedded(picture: Image.Image) -> str:
    """A picture as the address of itself."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid(run: Run, pictures: dict[str, Image.Image]) -> str:
    """The comparison: a card for every answer with its picture and costs."""
    known = next((answer.report for answer in run.answers.values() if answer.report), None)
    return (
        f'<div class="vc-grid">{"".join(_cell(run, answer, pictures, known) for answer in run.answers.values())}</div>'
    )


def _cell(run: Run, answer: Answer, pictures: dict[str, Image.Image], known: Report | None) -> str:
    """One card. ``known``: any report of the comparison, which tells what the uncompressed model costs."""
    title = escape(answer.name)
    if answer.error:
        words = f'<p class="vc-small">{escape(answer.error)}</p>'
        return f'<article class="vc-cell vc-failed"><h3>{title}</h3>{words}</article>'
    image, tag = "", ""
    if answer.name in pictures:
        image = (
            f'<label class="vc-zoom" title="enlarge"><input type="checkbox" aria-label="enlarge the picture of {title}">'
            f'<img src="{embedded(pictures[answer.name])}" alt="tokens kept by {title}"></label>'
        )
    if answer.name != UNCOMPRESSED and answer.done:
        same = answer.text == run.answers[UNCOMPRESSED].text
        tag = f'<span class="vc-tag{"" if same else " vc-other"}">{"same" if same else "other"} answer</span>'
    text = escape(answer.text) or ("(nothing)" if answer.done else "…")
    return (
        f'<article class="vc-cell" data-method="{title}"><h3>{title} {tag}</h3>{image}'
        f'<p class="vc-answer">{text}</p>{_facts(answer, known)}</article>'
    )


def _facts(answer: Answer, known: Report | None) -> str:
    facts = []
    report = answer.report
    if report is not None:
        facts += [f"{report.tokens:,} tokens in", f"layer average {report.layer_averaged_tokens:,.1f}"]
        if report.flops:
            share = report.flops["full"] / report.flops_before["full"]
            facts.append(f"{operations(report.flops['full'])} ({100 * share:.0f} %)")
        facts.append(f"{_kib(report.kv_bytes)} of keys and values")
    elif known is not None and answer.name == UNCOMPRESSED:
        facts += [f"{known.tokens_before:,} tokens in", f"layer average {known.tokens_before:,.1f}"]
        if known.flops_before:
            facts.append(operations(known.flops_before["full"]))
        facts.append(f"{_kib(known.kv_bytes_before)} of keys and values")
    if answer.prefill is not None:
        facts.append(f"prefill {_ms(answer.prefill.median)}")
    elif answer.first_ms is not None:
        facts.append(f"first token after {answer.first_ms:,.0f} ms")
    return f'<ul class="vc-facts">{"".join(f"<li>{escape(fact)}</li>" for fact in facts)}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], codes: Sequence[str] = ()) -> str:
    """A table that scrolls inside its own box; ``codes[i]``: the command behind row i, opened by a click."""
    if not rows:
        return sentence("No row fits these filters.", "note")
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = []
    for i, row in enumerate(rows):
        first, *others = (escape(str(cell)) for cell in row)
        if codes:
            first = f"<details><summary>{first}</summary><code>{escape(codes[i])}</code></details>"
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="vc-scroll" tabindex="0" role="region" aria-label="table"><table class="vc-table"><thead><tr>{top}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )
