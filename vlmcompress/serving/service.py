# SPDX-License-Identifier: Apache-2.0
"""A small encoder service: images in, compressed embeddings out, for servers on other machines.

``python -m vlmcompress.serving.service MODEL --method vtc-cls --keep 64 --port 8010``
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from PIL import Image

from .encode import Encoder, packed
from .hf_request import MAX_IMAGES, BadRequest, decoded


def create_app(encoder: Encoder) -> Any:
    """A FastAPI application around ``encoder``.

    ``POST /v1/encode`` with ``{"images": ["<base64>", ...]}`` answers ``{"width": C, "images": [{"tokens": k, "image_embeds":
    "<base64>"}, ...]}``; ``image_embeds`` is what vLLM takes in a content part of that type. What cannot be encoded is
    answered with HTTP 4xx and a sentence. ``GET /health`` answers once the tower is loaded.
    """
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    app = FastAPI(title="vlmcompress encoder")
    # a tower fills its device alone; what waits for it keeps its place
    turn = asyncio.Lock()

    async def health(request: Any) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def encode(request: Any) -> JSONResponse:
        try:
            images = await asyncio.to_thread(_images, await request.body())
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)
        async with turn:
            try:
                tokens = await asyncio.to_thread(encoder, images)
            except ValueError as error:
                return JSONResponse({"error": str(error)}, status_code=422)
        rows = [{"tokens": len(rows), "image_embeds": packed(rows)} for rows in tokens]
        return JSONResponse({"width": encoder.width, "images": rows})

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/v1/encode", encode, methods=["POST"])
    return app


def _images(body: bytes) -> list[Image.Image]:
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest('The body is JSON: {"images": ["<base64>", ...]}.') from error
    texts = wanted.get("images") if isinstance(wanted, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequest('"images" is a list of at least one image in base64.')
    if len(texts) > MAX_IMAGES:
        raise BadRequest(f"{len(texts)} images are more than the {MAX_IMAGES} that one request may bring.", 413)
    return [decoded(text.partition(",")[2] if text.startswith("data:") else text) for text in texts]


def main(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    method: Annotated[str, typer.Option(help="See `vlmcompress methods`.")] = "vtc-cls",
    keep: Annotated[
        str | None, typer.Option(help="Visual tokens per image, or a share of them; default: a quarter (0.25).")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Further options, NAME=VALUE.")] = None,
    host: str = "127.0.0.1",
    port: int = 8010,
    device: str = "cpu",
) -> None:
    """Serve an encoder."""
    import uvicorn

    from ..commands.run import SHARE, options_of

    options = options_of(method, keep, option or [], SHARE)
    encoder = Encoder.from_pretrained(model, method, device=device, **options)
    uvicorn.run(create_app(encoder), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
