# SPDX-License-Identifier: Apache-2.0
"""What ``vlmcompress serve`` counts, in the text format that Prometheus reads: the ledger's numbers, summed up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from ..report import Report

#: what can become of a request that was let in
OUTCOMES = ("answered", "failed", "cancelled")
STATES = ("before", "after")


class Metrics:
    """Counters of one server. ``state="before"`` is what the uncompressed model would have taken."""

    def __init__(self, model: str, method: str):
        self._registry = CollectorRegistry()
        about = self._gauge("serving", "What is served; always 1.", ("model", "method"))
        about.labels(model, method).set(1)
        self.waiting = self._gauge("requests_waiting", "Requests that were let in and wait for the model.")
        self._requests = self._counter("requests", "Requests that are over.", ("outcome",))
        self._refused = self._counter("requests_refused", "Requests that were not let in.", ("status",))
        self._images = self._counter("images", "Images that the model has read.")
        self._tokens = self._counter("visual_tokens", "Visual tokens that entered the language model.", ("state",))
        self._layers = self._counter(
            "visual_tokens_layer_average", "Visual tokens that a decoder layer processed on average.", ("state",)
        )
        self._flops = self._counter("prefill_flops", "FLOPs of prefills, those of the method inside.", ("state",))
        self._kv = self._counter("kv_bytes", "Bytes of keys and values that prefills left, text included.", ("state",))
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        for counter in (self._tokens, self._layers, self._flops, self._kv):
            for state in STATES:
                counter.labels(state)

    def _counter(self, name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"vlmcompress_{name}", words, labels, registry=self._registry)

    def _gauge(self, name: str, words: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"vlmcompress_{name}", words, labels, registry=self._registry)

    def over(self, outcome: str) -> None:
        """One request is over; ``outcome`` is one of ``OUTCOMES``."""
        self._requests.labels(outcome).inc()

    def refused(self, status: int) -> None:
        """One request was answered with this HTTP status instead of being let in."""
        self._refused.labels(str(status)).inc()

    def prefill(self, report: Report) -> None:
        """Add one prefill with images. FLOPs are left out for a model whose FLOPs are not known."""
        self._images.inc(report.images)
        pairs = [
            (self._tokens, report.tokens_before, report.tokens),
            (self._layers, report.tokens_before, report.layer_averaged_tokens),
            (self._kv, report.kv_bytes_before, report.kv_bytes),
        ]
        if report.flops:
            pairs.append((self._flops, report.flops_before["full"], report.flops["full"]))
        for counter, before, after in pairs:
            counter.labels("before").inc(before)
            counter.labels("after").inc(after)

    def text(self) -> bytes:
        """Everything, as ``GET /metrics`` answers it."""
        return generate_latest(self._registry)
