# SPDX-License-Identifier: Apache-2.0
"""Requests of strangers: a chat in OpenAI's form becomes messages for a processor, or one sentence.

Pictures come inside the request only. An address to fetch would make the server call whatever a client names, and a path
would read the server's own files.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import Any

from PIL import Image

from ..demo.images import MAX_BYTES, decode

ROLES = ("system", "user", "assistant")
#: fields that mean something here, and those that change no answer
FIELDS = {"model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"}
IGNORED = {"n", "user", "metadata", "store", "stream_options"}
MAX_BODY, MAX_IMAGES, MAX_TOKENS = 64 * 2**20, 16, 8192


class BadRequest(ValueError):
    """What is wrong with a request, in one sentence; ``status`` is the HTTP status that says so."""

    def __init__(self, sentence: str, status: int = 400):
        super().__init__(sentence)
        self.status = status


def read(body: bytes) -> dict[str, Any]:
    """A chat-completion request whose ``messages`` are ready for a processor, pictures decoded.

    Raises :class:`BadRequest`.
    """
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("The body is no JSON.") from error
    if not isinstance(wanted, dict):
        raise BadRequest('The body is a JSON object with "messages".')
    unknown = sorted(set(wanted) - FIELDS - IGNORED)
    if unknown:
        raise BadRequest(f'"{unknown[0]}" is not supported; supported are {", ".join(sorted(FIELDS))}.')
    messages = wanted.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest('"messages" is a list of at least one message.')
    read_messages = [_message(message) for message in messages]
    images = sum(part["type"] == "image" for message in read_messages for part in message["content"])
    if images > MAX_IMAGES:
        raise BadRequest(f"{images} images are more than the {MAX_IMAGES} that one request may bring.", 413)
    if wanted.get("n") not in (None, 1):
        raise BadRequest('"n" is 1: one answer to a request.')
    length = wanted.pop("max_completion_tokens", None)  # its older name is known to every version of transformers
    if length is not None:
        wanted["max_tokens"] = length
    _number(wanted, "max_tokens", 1, MAX_TOKENS, whole=True)
    _number(wanted, "temperature", 0, 2)
    _number(wanted, "top_p", 0, 1)
    _number(wanted, "seed", 0, 2**63 - 1, whole=True)
    stop = wanted.get("stop")
    if stop is not None and not (
        isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(s, str) for s in stop))
    ):
        raise BadRequest('"stop" is a text or a list of texts.')
    if not isinstance(wanted.get("model", ""), str):
        raise BadRequest('"model" is a text.')
    kept = {name: value for name, value in wanted.items() if name in FIELDS and value is not None}
    return kept | {"messages": read_messages}


def _number(wanted: dict[str, Any], name: str, low: float, high: float, whole: bool = False) -> None:
    value = wanted.get(name)
    kinds = int if whole else (int, float)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high):
        raise BadRequest(f'"{name}" is a {"whole " if whole else ""}number from {low} to {high}.')


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequest(f'Every message has a "role", one of {", ".join(ROLES)}.')
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRequest('The "content" of a message is a text or a list of parts.')
    return {"role": message["role"], "content": [_part(part) for part in content]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        if isinstance(address, str):
            return {"type": "image", "image": picture(address)}
    raise BadRequest('A part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}.')


def picture(address: str) -> Image.Image:
    """The picture of a ``data:`` address as upright RGB. Raises :class:`BadRequest`."""
    head, comma, text = address.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise BadRequest("Pictures come inside the request, as data:image/png;base64,...; no other address is opened.")
    return decoded(text)


def decoded(text: str) -> Image.Image:
    """The picture whose file ``text`` is in base64, as upright RGB. Raises :class:`BadRequest`."""
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise BadRequest(f"A picture is larger than {MAX_BYTES >> 20} MiB.", 413)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("A picture does not come as base64.") from error
    try:
        return decode(io.BytesIO(content))[0]
    except ValueError as error:
        raise BadRequest(str(error)) from error
