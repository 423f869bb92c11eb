"""What the service measures, told to TorchServe's own metrics (deploy/metrics.yaml names them)."""

from __future__ import annotations

import logging
import time
from typing import Any

from handler.session import Session

GAUGE_INTERVAL_S = 1.0


class ServiceMetrics:
    """Emits per finished request, and the gauges about once a second: each value is a line that the frontend parses."""

    def __init__(self, metrics: Any, model_name: str) -> None:
        self._metrics, self._model_name = metrics, model_name
        self._gauges_at = 0.0
        self._gauges: dict[str, float] = {}
        logging.getLogger("ts.metrics.caching_metric").setLevel(logging.INFO)
        # With it TorchServe times every single call to the handler; only our own metrics are worth a line.
        metrics.add_time = lambda *_, **__: None

    def finished(self, session: Session, outcome: str, seconds: float) -> None:
        """Count a request that ended after so long, and where its time went."""
        usage, times = session.usage, session.times
        self._add("counter", "llama_requests_total", 1, outcome)
        self._add("counter", "llama_prompt_tokens_total", usage.prompt_tokens)
        self._add("counter", "llama_prompt_tokens_cached_total", usage.cached_tokens)
        self._add("counter", "llama_generation_tokens_total", usage.completion_tokens)
        drafted = sum(sequence.drafted for sequence in session.sequences)
        if drafted:
            accepted = sum(sequence.accepted for sequence in session.sequences)
            self._add("counter", "llama_draft_tokens_total", drafted)
            self._add("counter", "llama_draft_tokens_accepted_total", accepted)
        self._add("histogram", "llama_e2e_latency_seconds", seconds)
        if times.first_token is None or times.admitted is None:
            return
        self._add("histogram", "llama_queue_seconds", max(0.0, times.admitted - times.arrived))
        self._add("histogram", "llama_prefill_seconds", times.first_token - times.admitted)
        self._add("histogram", "llama_time_to_first_token_seconds", times.first_token - times.arrived)
        steps = usage.completion_tokens / len(session.sequences) - 1
        if steps > 0 and times.last_token is not None:
            self._add("histogram", "llama_inter_token_latency_seconds", (times.last_token - times.first_token) / steps)

    def refused(self, status: int) -> None:
        """Count a request that never reached the engine."""
        self._add("counter", "llama_requests_total", 1, f"http_{status}")

    def gauges(self, running: int, waiting: int, slots: int) -> None:
        """Tell the present load, when it changed and the last telling is a while ago."""
        now = time.monotonic()
        values = {
            "llama_requests_running": running,
            "llama_requests_waiting": waiting,
            "llama_kv_slots_used_ratio": running / slots,
        }
        idle = running == 0 and waiting == 0
        if values == self._gauges or (now - self._gauges_at < GAUGE_INTERVAL_S and not idle):
            return
        self._gauges, self._gauges_at = values, now
        for name, value in values.items():
            self._add("gauge", name, value)

    def _add(self, kind: str, name: str, value: float, *labels: str) -> None:
        from ts.metrics.metric_type_enum import MetricTypes

        kinds = {"counter": MetricTypes.COUNTER, "gauge": MetricTypes.GAUGE, "histogram": MetricTypes.HISTOGRAM}
        self._metrics.get_metric(name, kinds[kind]).add_or_update(value, [self._model_name, *labels])
