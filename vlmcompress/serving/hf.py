# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress serve``: one compressed model behind OpenAI's chat API, for methods that no paged engine can run.

A thin front on the serving classes of transformers: its ``ModelManager`` hands out the one model, its ``GenerateManager``
lets requests wait for one thread, its ``ChatCompletionHandler`` speaks the protocol. Ours are what lies around: the method
on the model, what a request may bring, and what is counted. Routes of ``transformers serve`` that load or drop models are
not offered. Needs the extra ``serve-hf``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

import fastapi
import jinja2
import openai  # noqa: F401  transformers' handlers need it, and would only fail at the first request
import uvicorn
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..attach import Handle
from ..eval.loading import first_sentence
from ..ledger import VisualTokens
from . import hf_request
from .hf_metrics import Metrics
from .hf_request import BadRequest

logger = logging.getLogger(__name__)

MAX_WAITING = 64
#: how an event of transformers' streams begins that tells of an error; the message behind it is not escaped
ERROR, QUOTE = 'data: {"error": ', '"'


class OneModel(ModelManager):
    """Hands out one loaded model under one name, whatever is asked for."""

    def __init__(self, name: str, model: Any, processor: Any):
        super().__init__(device=str(model.device), model_timeout=-1)
        self.force_model = name
        self._pair = (model, processor)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # not a name on the hub, where a revision would be added

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._pair

    def list_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "vlmcompress"}]


class CountingManager(GenerateManager):
    """Runs one request after the other on one thread, and counts the visual tokens of each."""

    def __init__(self, handle: Handle, metrics: Metrics):
        super().__init__()
        self._handle, self._metrics = handle, metrics
        self.waiting, self._lock = 0, threading.Lock()

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().submit(self._counted(fn), *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(self._counted(fn), *args, **kwargs)

    def _counted(self, fn: Callable) -> Callable:
        self._wait(1)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._wait(-1)
            before = self._ledger()
            try:
                return fn(*args, **kwargs)
            finally:
                if self._ledger() is not before:  # a prompt without an image leaves no new one
                    self._metrics.prefill(self._handle.report())

        return run

    def _wait(self, change: int) -> None:
        with self._lock:
            self.waiting += change
            self._metrics.waiting.set(self.waiting)

    def _ledger(self) -> VisualTokens | None:
        try:
            return self._handle.last
        except ValueError:
            return None


class OneManager(GenerationState):
    """Gives every request to the same manager."""

    def __init__(self, manager: CountingManager):
        super().__init__()
        self._manager = manager

    def get_manager(self, *args: Any, **kwargs: Any) -> CountingManager:
        return self._manager


class ReadyChat(ChatCompletionHandler):
    """Takes messages that :func:`~.hf_request.read` has prepared, so that nothing here opens an address or a path."""

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Any) -> list[dict]:
        return messages


class Front:
    """What happens to a request, from its bytes to its answer."""

    def __init__(self, name: str, handle: Handle, processor: Any, max_waiting: int = MAX_WAITING):
        self.metrics = Metrics(name, handle.method.name)
        self.models = OneModel(name, handle.model, processor)
        self._manager = CountingManager(handle, self.metrics)
        self._chat = ReadyChat(self.models, OneManager(self._manager))
        self._max_waiting = max_waiting

    async def chat(self, request: fastapi.Request) -> Response:
        """``POST /v1/chat/completions``."""
        try:
            wanted = await self._let_in(request)
            response = await self._chat.handle_request(wanted, request.state.request_id)
        except BadRequest as error:
            return self._refusal(str(error), error.status)
        except fastapi.HTTPException as error:
            return self._refusal(str(error.detail), error.status_code)
        except (ValueError, jinja2.TemplateError) as error:  # of the template, the processor or the method
            self.metrics.over("failed")
            return refusal(first_sentence(error), 422)
        except Exception as error:
            logger.exception("A request failed.")
            self.metrics.over("failed")
            return refusal(f"The model failed on this request: {first_sentence(error)}", 500)
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._watched(response.body_iterator)
        else:
            self.metrics.over("answered")
        return response

    async def _let_in(self, request: fastapi.Request) -> dict[str, Any]:
        if self._manager.waiting >= self._max_waiting:
            raise BadRequest(f"{self._max_waiting} requests wait already; try again later.", 503)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > hf_request.MAX_BODY:
                raise BadRequest(f"The request is larger than {hf_request.MAX_BODY >> 20} MiB.", 413)
        # pictures are decoded beside the loop, which streams other answers meanwhile
        return await asyncio.to_thread(hf_request.read, bytes(body))

    async def _watched(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """The events of a stream, errors as OpenAI's clients read them, and the mark that ends a stream."""
        outcome = "cancelled"
        try:
            async for event in events:
                if event.startswith(ERROR):
                    outcome = "failed"
                    yield f"data: {json.dumps(problem(event[len(ERROR) :].rstrip().removesuffix('}').strip(QUOTE), 422))}\n\n"
                else:
                    yield event
            if outcome != "failed":
                outcome = "answered"
            yield "data: [DONE]\n\n"
        finally:
            await events.aclose()
            self.metrics.over(outcome)

    def _refusal(self, sentence: str, status: int) -> JSONResponse:
        self.metrics.refused(status)
        return refusal(sentence, status)


def problem(sentence: str, status: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": sentence, "type": kind, "code": status}}


def refusal(sentence: str, status: int) -> JSONResponse:
    """:func:`problem` as an answer."""
    return JSONResponse(problem(sentence, status), status_code=status)


def create_app(name: str, handle: Handle, processor: Any, *, max_waiting: int = MAX_WAITING) -> fastapi.FastAPI:
    """The application around one compressed model, called ``name`` by its clients.

    ``POST /v1/chat/completions`` (streaming or not), ``GET /v1/models``, ``/health`` and ``/metrics``. What is wrong with
    a request is answered with HTTP 4xx and a sentence; requests beyond ``max_waiting`` in the queue with 503.

    Raises ``ValueError`` for a processor without a chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"'{name}' has no chat template, so chats cannot be put to it.")
    front = Front(name, handle, processor, max_waiting)
    app = fastapi.FastAPI(title="vlmcompress", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat(request: fastapi.Request) -> Response:
        request.state.request_id = f"chatcmpl-{uuid.uuid4().hex}"
        return await front.chat(request)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": front.models.list_models()}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(front.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that is taken before a model is loaded. Raises ``ValueError`` in one sentence where it cannot be had."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Port {port} of {host} cannot be listened on: {getattr(error, 'strerror', error)}."
        ) from error


def server(app: fastapi.FastAPI) -> uvicorn.Server:
    """What runs the application: ``server(app).run(sockets=[listen(host, port)])``."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=30))
