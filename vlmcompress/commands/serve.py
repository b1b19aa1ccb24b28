# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress serve``."""

from __future__ import annotations


def serve(
    model_name: str, method: str, keep: str | None, pairs: list[str], positions: str, host: str, port: int, device: str,
    dtype: str, max_waiting: int,
) -> None:  # fmt: skip
    """Check everything cheap first, then load, compress and serve until interrupted."""
    from ..attach import compress
    from ..eval.loading import load
    from ..serving.hf import create_app, listen, server
    from .run import SHARE, options_of

    options = options_of(method, keep, pairs, SHARE)
    socket = listen(host, port)
    model, processor = load(model_name, device=device, dtype=dtype)
    handle = compress(model, method, positions=positions, **options)
    app = create_app(model_name, handle, processor, max_waiting=max_waiting)
    print(f"Serving {model_name} under {handle.method.name} at http://{host}:{socket.getsockname()[1]}/v1", flush=True)
    server(app).run(sockets=[socket])
