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
    unit: str
    form: str
    of: Callable[[Answer, Report], float | None]
    more_is_better: bool = False


def _by_side(before: Callable[[Report], float | None], after: Callable[[Report], float | None]) -> Any:
    return lambda answer, report: (before if answer.name == UNCOMPRESSED else after)(report)


METRICS = (
    Metric("Visual tokens in", "", ",.0f", _by_side(lambda r: r.tokens_before, lambda r: r.tokens)),
    Metric(
        "Visual tokens, average over layers", "", ",.1f",
        _by_side(lambda r: r.tokens_before, lambda r: r.layer_averaged_tokens),
    ),
    Metric(
        "FLOPs of the prefill", "GFLOPs", ",.4g",
        _by_side(
            lambda r: r.flops_before["full"] / 1e9 if r.flops_before else None,
            lambda r: r.flops["full"] / 1e9 if r.flops else None,
        ),
    ),
    Metric("Keys and values", "KiB", ",.0f", _by_side(lambda r: r.kv_bytes_before / 1024, lambda r: r.kv_bytes / 1024)),
    Metric("Prefill", "ms", ",.1f", lambda a, r: a.prefill.median if a.prefill else None),
    Metric("Time to first token", "ms", ",.1f", lambda a, r: a.first_ms),
    Metric("Decoding", "tokens/s", ",.3g", lambda a, r: a.tokens_per_s, more_is_better=True),
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
        notes.append(f"The method's own work, inside: {after.report.compressor_flops / 1e9:,.3g} GFLOPs.")
    if after.prefill:
        notes.append(f"Prefill: median of {after.prefill.runs}, taken in turns with the uncompressed model.")
    legend = (
        '<p class="vc-legend"><span class="vc-key vc-before"></span>uncompressed'
        '<span class="vc-key vc-after"></span>compressed</p>'
    )
    return f'<div class="vc-costs">{legend}{"".join(rows)}<p class="vc-note">{escape(" ".join(notes))}</p></div>'


def _bars(metric: Metric, before: Answer, after: Answer, report: Report) -> str:
    a, b = metric.of(before, report), metric.of(after, report)
    most = max(a or 0, b or 0) or 1

    def bar(kind: str, value: float | None) -> str:
        text = "not measured" if value is None else f"{value:{metric.form}} {metric.unit}".strip()
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
    if f"{before:{metric.form}}" == f"{after:{metric.form}}":
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
    cards = []
    reference = run.answers[UNCOMPRESSED]
    for name, answer in run.answers.items():
        title = escape(name)
        if answer.error:
            cards.append(
                f'<article class="vc-cell vc-failed"><h3>{title}</h3><p class="vc-small">{escape(answer.error)}</p></article>'
            )
            continue
        image = ""
        if name in pictures:
            image = (
                f'<label class="vc-zoom" title="enlarge"><input type="checkbox" aria-label="enlarge the picture of {title}">'
                f'<img src="{embedded(pictures[name])}" alt="tokens kept by {title}"></label>'
            )
        same = "" if name == UNCOMPRESSED or not answer.done else (
            '<span class="vc-tag">same answer</span>' if answer.text == reference.text
            else '<span class="vc-tag vc-other">other answer</span>'
        )  # fmt: skip
        text = escape(answer.text) or ("(nothing)" if answer.done else "…")
        cards.append(
            f'<article class="vc-cell" data-method="{title}"><h3>{title} {same}</h3>{image}'
            f'<p class="vc-answer">{text}</p>{_facts(answer)}</article>'
        )
    return f'<div class="vc-grid">{"".join(cards)}</div>'


def _facts(answer: Answer) -> str:
    facts = []
    if answer.report is not None:
        facts += [f"{answer.report.tokens:,} tokens in", f"layer average {answer.report.layer_averaged_tokens:,.1f}"]
        if answer.report.flops:
            facts.append(f"{100 * answer.report.flops['full'] / answer.report.flops_before['full']:.0f} % of the FLOPs")
        facts.append(f"{answer.report.kv_bytes / 1024:,.0f} KiB of keys and values")
    if answer.prefill is not None:
        facts.append(f"prefill {answer.prefill.median:,.1f} ms")
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
