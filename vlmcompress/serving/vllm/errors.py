# SPDX-License-Identifier: Apache-2.0
"""What a client has sent is answered with HTTP 400 and a sentence where vLLM itself says 500, a fault of the server.

An endpoint plug-in of vLLM (group ``vllm.endpoint_plugins``). Those are loaded only where the variable ``VLLM_PLUGINS``
names them, as in ``VLLM_PLUGINS=vlmcompress``; compression needs no such thing.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse

#: words of a ``RuntimeError`` → what the client is told: a tensor that is cut off, and one without a row
_CAUSES = {
    "PytorchStreamReader": "The embeddings are no tensor that torch.save has written.",
    "prompt placeholders": "The embeddings of an image have at least one row.",
}


class ClientErrors:
    """Tells pictures of too many pixels and broken embeddings from faults of the server."""

    name = "vlmcompress"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Register what answers these errors; vLLM calls it once for each of its applications."""
        app.exception_handler(Image.DecompressionBombError)(_too_large)
        app.exception_handler(UnpicklingError)(_no_tensor)
        app.exception_handler(EOFError)(_no_tensor)
        app.exception_handler(RuntimeError)(_runtime)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing is kept."""


async def _too_large(request: Request, error: Exception) -> JSONResponse:
    return _refusal(f"A picture has too many pixels: {error}")


async def _no_tensor(request: Request, error: Exception) -> JSONResponse:
    return _refusal(_CAUSES["PytorchStreamReader"])


async def _runtime(request: Request, error: Exception) -> JSONResponse:
    for words, sentence in _CAUSES.items():
        if words in str(error):
            return _refusal(sentence)
    from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler

    return await exception_handler(request, error)


def _refusal(sentence: str) -> JSONResponse:
    """An error in the form of vLLM's own."""
    error = {"message": sentence, "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": error}, status_code=400)
