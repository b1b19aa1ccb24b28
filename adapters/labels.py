# SPDX-License-Identifier: Apache-2.0
"""Frames that come to a model as images do, known to be a video by the text that its processor writes between them."""

from __future__ import annotations

from itertools import pairwise

Ids = list[int]


def numbered_frames(ids: Ids, spans: list[tuple[int, int]], cells: int) -> list[int]:
    """How many of the ``spans`` (first column, length) of placeholders in one prompt make each image (1) or video.

    Between two frames of ``cells`` placeholders stand the end of the first, a line break, one token for the word "Frame",
    the number and what follows it (InternVL's processor); in front of the first frame the same with another number. The
    first two numbers are one token each, and none comes twice in one video.
    """
    ends = [start + length for start, length in spans]
    gaps = [ids[end:start] for end, (start, _) in zip(ends, spans[1:], strict=False)]
    found: list[int] = []
    while (i := sum(found)) < len(spans):
        gap = gaps[i] if i < len(gaps) else []
        head, tail = gap[:3], gap[4:]
        before = ids[max(0, spans[i][0] - len(tail) - 2) : spans[i][0]]
        numbers = [before[1:2], gap[3:4]]
        if not tail or [before[:1], before[2:]] != [head[2:], tail] or numbers[0] == numbers[1]:
            found.append(1)
            continue
        n = 1
        while i + n < len(spans) and spans[i + n - 1][1] == spans[i + n][1] == cells:
            label = gaps[i + n - 1]
            number = label[3 : len(label) - len(tail)]
            known = number in numbers if n > 1 else False
            if label[:3] != head or label[-len(tail) :] != tail or not 0 < len(number) < 5 or known:
                break
            numbers.append(number)
            n += 1
        found.append(n)
    return found


def timed_frames(ids: Ids, starts: list[int], cells: int) -> list[int]:
    """The same for frames of ``cells`` placeholders from ``starts`` on, each behind a time (SmolVLM's processor).

    Between two frames stand the token that closes an image, a line break, words, minutes, a colon, seconds, the same
    colon (digits one by one) and the two tokens that open an image; in front of the first the same words and a time.
    """
    gaps = [ids[a + cells : b] for a, b in pairwise(starts)]
    found: list[int] = []
    while (i := sum(found)) < len(starts):
        gap = gaps[i] if i < len(gaps) else []
        label = gap[1:-2]
        before = ids[max(0, starts[i] - 2 - len(label)) : starts[i] - 2]
        n, words = 1, _words(label)
        first = _words(before)
        # the first line break may be one token with those of the text in front of it
        if words and first and (first[0][1:], first[1]) == (words[0][1:], words[1]):
            while i + n < len(starts) and (here := gaps[i + n - 1])[0] == gap[0] and here[-2:] == gap[-2:]:
                if _words(here[1:-2]) != words:
                    break
                n += 1
        found.append(n)
    return found


def _words(label: Ids) -> tuple[Ids, int] | None:
    """What stands in front of the time at the end of ``label``, at least three tokens, and the colon; None: no such."""
    return (label[:-6], label[-1]) if len(label) >= 9 and label[-1] == label[-4] else None
