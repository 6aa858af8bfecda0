"""What a server counts, in Prometheus' text format over HTTP."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The metrics of one server.

    Args:
      running: how many requests are there now, those that wait included.
      slots: how many are decoded at once.
    """

    def __init__(self, *, running: Callable[[], int], slots: int):
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "dcjax_requests", "Requests that have ended, by how they did.", ["outcome"], registry=self.registry
        )
        self._tokens = Counter("dcjax_tokens", "Tokens sampled for requests.", registry=self.registry)
        self._reloads = Counter("dcjax_reloads", "Times that newer weights were loaded.", registry=self.registry)
        self._version = Gauge("dcjax_weights_version", "Version of the weights served.", registry=self.registry)
        self.first_token = Histogram(
            "dcjax_first_token_seconds", "From a request to its first tokens.", buckets=SECONDS, registry=self.registry
        )
        self._duration = Histogram(
            "dcjax_request_seconds", "From a request to its end.", buckets=SECONDS, registry=self.registry
        )
        for name, told, count in (
            ("dcjax_running", "Requests that are decoded.", lambda: min(running(), slots)),
            ("dcjax_waiting", "Requests that wait for a slot.", lambda: max(running() - slots, 0)),
            ("dcjax_slots", "Requests decoded at once, at most.", lambda: slots),
        ):
            Gauge(name, told, registry=self.registry).set_function(count)

    def ended(self, outcome: str, seconds: float, tokens: int) -> None:
        """A request has ended: by `stop`, by `length`, `refused` or `cancelled`."""
        self._requests.labels(outcome).inc()
        self._tokens.inc(tokens)
        self._duration.observe(seconds)

    def serves(self, version: int) -> None:
        """The first weights are served."""
        self._version.set(version)

    def reloaded(self, version: int) -> None:
        """Newer weights are served."""
        self._reloads.inc()
        self._version.set(version)
