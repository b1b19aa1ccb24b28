# SPDX-License-Identifier: Apache-2.0
"""One question to the uncompressed and to compressed models: answers as they come, then what they cost."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..attach import compress
from ..eval.latency import Timing, interleaved, milliseconds
from ..eval.loading import encode, first_sentence
from ..eval.rows import parse_options
from ..ledger import VisualTokens
from ..method import Composition, create, tokens_to_keep
from ..registry import METHODS
from ..report import Report
from .models import Loaded

UNCOMPRESSED = "uncompressed"
#: at most this often, and for about this long, prefills are repeated for the clock
ROUNDS, CLOCK_MS = 5, 1500.0
MAX_QUESTION = 2000
MOST_METHODS = 6
#: the budget slider goes down from everything by quarters of an octave
STEPS = 28


@dataclass(frozen=True)
class Answer:
    """What one run said and cost. Times in milliseconds.

    ``first_ms``: from the call of ``generate`` to the first token of this very answer; ``prefill``: medians of further
    prefills that alternate with the other runs', or None where one is too slow to repeat. ``tokens_per_s``: None where
    the answer ended with its first token. ``report`` and ``ledger``: None for the uncompressed model.
    """

    name: str
    text: str = ""
    new_tokens: int = 0
    first_ms: float | None = None
    tokens_per_s: float | None = None
    prefill: Timing | None = None
    report: Report | None = None
    ledger: VisualTokens | None = None
    error: str = ""
    done: bool = False


@dataclass(frozen=True)
class Run:
    """Everything about one question: what was asked, what the tower saw, the answers by name."""

    image: Image.Image
    question: str
    model: str
    pixel_values: Any
    processor: Any
    answers: dict[str, Answer]
    methods: dict[str, dict[str, Any]]
    positions: str


def compose(
    method: str, keep: int | float, options: str = "", second: str = "", second_options: str = ""
) -> Composition:
    """The method with its budget (where it takes one), further options ``NAME=VALUE ...``, and a second stage.

    Raises ``ValueError`` in one sentence for whatever the methods refuse.
    """
    fields = {f.name for f in dataclasses.fields(METHODS.get(method)) if f.init}
    budget = {"keep": keep} if "keep" in fields else {}
    first = create(method, **budget | parse_options(options.split()))
    return first + create(second, **parse_options(second_options.split())) if second else first


def share(step: float) -> float:
    """Share of the visual tokens at a step of the budget slider: 1 at ``STEPS``, 1/128 at 0, even on a log scale."""
    return 2.0 ** ((min(max(step, 0), STEPS) - STEPS) / 4)


def tokens_at(step: float, n: int) -> int:
    """Visual tokens of ``n`` at a step of the budget slider, at least one."""
    return tokens_to_keep(share(step), n)


def takes_budget(method: str) -> bool:
    """Whether the budget slider means something to the method."""
    return any(f.name == "keep" and f.init for f in dataclasses.fields(METHODS.get(method)))


def check_question(text: str | None) -> str:
    """The question without blanks around it. Raises ``ValueError`` in one sentence for none and for an endless one."""
    text = (text or "").strip()
    if not text:
        raise ValueError("Write a question about the picture.")
    if len(text) > MAX_QUESTION:
        raise ValueError(f"The question has {len(text):,} characters; at most {MAX_QUESTION:,} are taken.")
    return text


def visual_tokens(loaded: Loaded, image: Image.Image) -> int:
    """Visual tokens that the uncompressed model is fed for a picture."""
    with loaded.lock:
        inputs = encode(loaded.model, loaded.processor, [image], ["what is this ?"])
    return int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())


def ask(
    loaded: Loaded,
    image: Image.Image,
    question: str,
    methods: Mapping[str, Composition],
    *,
    positions: str = "published",
    new_tokens: int | None = None,
) -> Iterator[Run]:
    """Put a question to the uncompressed model, then to it under each method; yields the run whenever it has grown.

    The model is held until the last answer is there; a caller that stops listening ends the generation. A method that
    fails has its sentence in :attr:`Answer.error`, the others go on. Raises ``ValueError`` for a question that is empty.
    """
    question = check_question(question)
    names = [UNCOMPRESSED, *methods]
    answers = {name: Answer(name) for name in names}
    with loaded.lock:
        inputs = encode(loaded.model, loaded.processor, [image], [question])
    run = Run(
        image, question, loaded.label, inputs.get("pixel_values"), loaded.processor, answers,
        {name: {part.name: part.options() for part in method.methods} for name, method in methods.items()}, positions,
    )  # fmt: skip
    events: queue.Queue[Answer | BaseException | None] = queue.Queue()
    gone = threading.Event()
    length = new_tokens or loaded.new_tokens()

    def work() -> None:
        finished = {}
        try:
            with loaded.lock:
                for name in names:
                    if gone.is_set():
                        return
                    finished[name] = _one(loaded, inputs, name, methods.get(name), positions, length, events.put, gone)
                    events.put(finished[name])
                for answer in _clocked(loaded, inputs, finished, methods, positions):
                    events.put(answer)
        except BaseException as error:
            events.put(error)
        finally:
            events.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            answers[event.name] = event
            yield run
    finally:
        gone.set()
        worker.join()


@torch.inference_mode()
def _one(
    loaded: Loaded, inputs: Mapping[str, Any], name: str, method: Composition | None, positions: str, length: int,
    tell: Callable[[Answer], None], gone: threading.Event,
) -> Answer:  # fmt: skip
    """One answer, told token by token."""
    handle = None
    try:
        handle = None if method is None else compress(loaded.model, method, positions=positions)
        listener = _Listener(name, loaded.processor.tokenizer, tell)
        loaded.model.generate(
            **inputs, do_sample=False, max_new_tokens=length, streamer=listener,
            stopping_criteria=StoppingCriteriaList([_Stop(gone)]),
        )  # fmt: skip
        answer = dataclasses.replace(listener.answer(), done=True)
        if handle is None:
            return answer
        return dataclasses.replace(answer, report=handle.report(), ledger=handle.last)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return Answer(name, error=first_sentence(error), done=True)
    finally:
        if handle is not None:
            handle.remove()


@torch.inference_mode()
def _clocked(
    loaded: Loaded, inputs: Mapping[str, Any], answers: dict[str, Answer], methods: Mapping[str, Composition],
    positions: str,
) -> list[Answer]:  # fmt: skip
    """The answers with the median of prefills that alternate, where they are quick enough to be repeated."""
    alive = [name for name, answer in answers.items() if answer.first_ms is not None and not answer.error]
    rounds = min(ROUNDS, int(CLOCK_MS / sum(answers[name].first_ms or 0.0 for name in alive))) if alive else 0
    if not rounds:
        return []

    def prefill() -> Any:
        return loaded.model(**inputs, use_cache=True, logits_to_keep=1)

    def case(name: str) -> Callable[[], float]:
        def measured() -> float:
            if name not in methods:
                return milliseconds(prefill, loaded.model.device)
            with compress(loaded.model, methods[name], positions=positions):
                return milliseconds(prefill, loaded.model.device)

        return measured

    found = interleaved({name: case(name) for name in alive}, rounds=rounds, warmup=0)
    return [dataclasses.replace(answers[name], prefill=Timing.of(times)) for name, times in found.items()]


class _Stop(StoppingCriteria):
    """Ends the generation when nobody listens any more."""

    def __init__(self, gone: threading.Event):
        self.gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.gone.is_set(), device=input_ids.device)


class _Listener(BaseStreamer):
    """Notes when each token came and tells the text so far."""

    def __init__(self, name: str, tokenizer: Any, tell: Callable[[Answer], None]):
        self.name, self.tokenizer, self.tell = name, tokenizer, tell
        self.tokens: list[int] = []
        self.moments = [time.perf_counter()]
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # the first call hands over the prompt
            self._prompt = False
            return
        self.tokens += value.flatten().tolist()
        self.moments.append(time.perf_counter())
        self.tell(self.answer())

    def end(self) -> None:
        """Nothing is held back, so nothing is left to tell."""

    def answer(self) -> Answer:
        start, *came = self.moments
        further = came[-1] - came[0] if len(came) > 1 else 0.0
        return Answer(
            self.name,
            self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip(),
            len(self.tokens),
            (came[0] - start) * 1e3 if came else None,
            (len(came) - 1) / further if further else None,
        )


def plan(methods: Sequence[str], keep: int | float) -> dict[str, Composition]:
    """The methods of a comparison at one budget. Raises ``ValueError`` for none, too many, or what a method refuses."""
    chosen = list(dict.fromkeys(methods))
    if not chosen:
        raise ValueError("Choose at least one method.")
    if len(chosen) > MOST_METHODS:
        raise ValueError(f"Choose at most {MOST_METHODS} methods; {len(chosen)} are chosen.")
    return {name: compose(name, keep) for name in chosen}
