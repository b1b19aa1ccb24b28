# SPDX-License-Identifier: Apache-2.0
"""Run the rows: greedy answers in left-padded batches first, then the clocks, interleaved, in a phase of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import flops as counter
from . import profiles
from .downscale import downscaled, downscales
from .latency import Timing, interleaved, milliseconds, peak_bytes, refuse_zeros
from .loading import answer, encode_chats, first_sentence
from .rows import UNCOMPRESSED, Row
from .store import Store
from .tasks import Sample
from .workers import Workers

Tick = Callable[[str, int], None]
Question = tuple[str, Sample]
Batch = tuple[list[Question], int, tuple[str, ...]]
ALONE = Workers()


def run_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    samples: Mapping[str, list[Sample]],
    store: Store | None,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    workers: Workers = ALONE,
    tick: Tick = lambda row, answers: None,
) -> dict[str, str]:
    """Answer every question of every task under every row, picking up what ``store`` already holds.

    Several ``workers`` take the batches in turn; only the first has a ``store``, the others pass None. Returns the
    one-sentence error of each run that failed, by run key; the other rows are unaffected. ``tick`` is told the row and
    the number of answers as they finish, stored ones included.
    """
    questions = [(task, sample) for task, found in samples.items() for sample in found]
    errors: dict[str, str] = {}
    for row in rows:
        for seed in row.seeds:
            key = row.run_key(seed)
            done = workers.share(None if store is None else {(a["task"], a["id"]) for a in store.answers(key)})
            left = [q for q in questions if (q[0], q[1].id) not in done]
            tick(key, len(questions) - len(left))
            batches = _batches(left, batch_size, max_new_tokens)
            error = _run(model, processor, row, seed, batches, store, workers, tick) if left else None
            if error:
                errors[key] = error
    return errors


def _batches(questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> list[Batch]:
    """Questions in their order, together with others that are decoded alike: questions, new tokens, ends."""
    alike: dict[tuple[int, tuple[str, ...]], list[Question]] = {}
    for task, sample in questions:
        alike.setdefault((sample.max_new_tokens or max_new_tokens, sample.until), []).append((task, sample))
    return [
        (members[start : start + batch_size], length, until)
        for (length, until), members in alike.items()
        for start in range(0, len(members), batch_size)
    ]


def _run(
    model: Any,
    processor: Any,
    row: Row,
    seed: int | None,
    batches: Sequence[Batch],
    store: Store | None,
    workers: Workers,
    tick: Tick,
) -> str | None:
    """Answer the batches of one run, each worker its own; the error that ended it, in one sentence."""
    import vlmcompress

    key = row.run_key(seed)
    # a method may fail in any way; its row says so and the others go on
    smaller = row.keep if downscales(processor, row) else None
    try:
        named = (UNCOMPRESSED, {}) if smaller is not None else (row.method, row.arguments(seed))
        handle = vlmcompress.compress(model, named[0], **named[1])
    except Exception as failure:
        return first_sentence(failure)
    with handle:
        for start in range(0, len(batches), workers.size):
            lines, error = [], None
            try:
                for batch in batches[start : start + workers.size][workers.rank :][:1]:
                    lines = _batch(model, processor, handle, smaller, *batch)
            except Exception as failure:
                error = first_sentence(failure)
            found = workers.gather((lines, error))
            for answers, _ in found:
                if answers and store is not None:
                    store.append(key, answers)
                tick(key, len(answers))
            failed = [error for _, error in found if error]
            if failed:
                return failed[0]
    return None


def _batch(
    model: Any,
    processor: Any,
    handle: Any,
    smaller: int | float | None,
    batch: Sequence[Question],
    max_new_tokens: int,
    until: tuple[str, ...],
) -> list[dict[str, Any]]:
    """One line per question: the answer, whether it is right, and the ledger's account of what it cost.

    ``smaller``: the tokens that every picture is shrunk to beforehand.
    """
    chats = [sample.chat() for _, sample in batch]
    if smaller is not None:
        chats = [downscaled(processor, chat, smaller) for chat in chats]
    inputs = encode_chats(model, processor, chats)
    predictions = answer(model, processor, inputs, max_new_tokens, until)
    shape = counter.ModelShape.from_config(model.config)
    ledger = handle.last
    size = model.dtype.itemsize
    lines = []
    for (task, sample), prediction, record, profile, entries in zip(
        batch,
        predictions,
        ledger.samples,
        profiles.compressed(shape, ledger),
        profiles.cache_entries(ledger),
        strict=True,
    ):
        lines.append(
            {
                "task": task,
                "id": sample.id,
                "image": sample.picture,
                "kind": sample.kind,
                "question": sample.question,
                "answer": sample.answer,
                "prediction": prediction,
                "tokens_in": sum(len(image.kept) for image in record.images),
                "layer_tokens": profile.mean_visual,
                "compressor_flops": profile.compressor,
                "kv_bytes": shape.kv_bytes(entries, size),
            }
            | sample.mark(prediction)
            | {name: count(shape, profile) for name, count in counter.CONVENTIONS.items()}
        )
    return lines


@torch.inference_mode()
def time_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    sample: Sample,
    *,
    rounds: int = 10,
    decode_tokens: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Prefill ms, decode ms per token and peak bytes of the prefill, one image at a time, by row key.

    All rows run once per round, so a busy machine slows all of them; attaching and removing is outside the clock. The
    uncompressed row is the stock model without hooks. Decoding is the time that ``decode_tokens`` further tokens add to
    ``generate``. Rows that fail are returned with their one-sentence error instead, and leave the others their clocks.
    """
    inputs = encode_chats(model, processor, [sample.chat()])
    refuse_zeros(inputs)
    errors: dict[str, str] = {}
    peaks: dict[str, int] = {}
    cases: dict[str, Callable[[], float]] = {}
    for row in rows:
        try:
            clock = _clock(model, processor, inputs, row, sample, decode_tokens)
            peaks[row.key] = clock.run(lambda c: peak_bytes(c.prefill, model.device))
            _case(clock, "all")()  # what fails while decoding must not end the rounds
        except Exception as error:
            errors[row.key] = first_sentence(error)
            continue
        for part in ("prefill", "first", "all"):
            cases[f"{part} {row.key}"] = _case(clock, part)
    if not cases:
        return {}, errors
    found = interleaved(cases, rounds=rounds, tick=tick)
    timings = {}
    for row in rows:
        if row.key in errors:
            continue
        steps = [
            (a - b) / decode_tokens for a, b in zip(found[f"all {row.key}"], found[f"first {row.key}"], strict=True)
        ]
        timings[row.key] = {
            "prefill_ms": Timing.of(found[f"prefill {row.key}"]).as_dict(),
            "decode_ms_per_token": Timing.of(steps).as_dict(),
            "prefill_peak_bytes": peaks[row.key],
        }
    return timings, errors


def _clock(model: Any, processor: Any, inputs: dict[str, Any], row: Row, sample: Sample, decode_tokens: int) -> _Clock:
    """The clock of a row on ``inputs``, or on its own smaller picture."""
    if row.keep is None or not downscales(processor, row):
        return _Clock(model, inputs, row, decode_tokens)
    small = encode_chats(model, processor, [downscaled(processor, sample.chat(), row.keep)])
    return _Clock(model, small, Row(UNCOMPRESSED), decode_tokens)


class _Clock:
    """One row on one input: attaches, measures, removes."""

    def __init__(self, model: Any, inputs: dict[str, Any], row: Row, decode_tokens: int):
        self.model, self.inputs, self.row, self.decode_tokens = model, inputs, row, decode_tokens

    def prefill(self) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def generate(self, new: int) -> Any:
        return self.model.generate(**self.inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)

    def run(self, measure: Callable[[_Clock], Any]) -> Any:
        import vlmcompress

        if self.row.method == UNCOMPRESSED:
            return measure(self)
        with vlmcompress.compress(self.model, self.row.method, **self.row.arguments(self.row.seeds[0])):
            return measure(self)


def _case(clock: _Clock, part: str) -> Callable[[], float]:
    run: dict[str, Callable[[_Clock], Any]] = {
        "prefill": lambda c: c.prefill(),
        "first": lambda c: c.generate(1),
        "all": lambda c: c.generate(1 + c.decode_tokens),
    }
    return lambda: clock.run(lambda c: milliseconds(lambda: run[part](c), c.model.device))
