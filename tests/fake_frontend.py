"""TorchServe's side of the contract, in process: jobs, batches, and replies read as its frontend reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ts.context import Context, RequestProcessor


@dataclass
class Job:
    """One client's request, and what reached the client."""

    request_id: str
    headers: dict[str, str]
    body: bytes
    status: int | None = None
    content_type: str | None = None
    reply_headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    done: bool = False
    open: bool = True  # whether the client is still there
    fresh: bool = True

    @property
    def text(self) -> str:
        """All that arrived."""
        return b"".join(self.chunks).decode()

    @property
    def lines(self) -> list[dict]:
        """The native stream's lines of JSON."""
        return [json.loads(line) for line in self.text.splitlines()]


class MetricsProbe:
    """Stands in for TorchServe's metrics cache and remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, list[str]]] = []

    def get_metric(self, name: str, kind: Any) -> Any:
        probe = self

        class Metric:
            def add_or_update(self, value: float, dimensions: list[str]) -> None:
                probe.told.append((name, value, dimensions))

        return Metric()


class FakeFrontend:
    """Calls a handler with all open jobs at once, as continuous batching does."""

    def __init__(self, handler: Any, settings: dict[str, Any], model_dir: str) -> None:
        self.handler, self.jobs, self.count = handler, {}, 0
        self.metrics = MetricsProbe()
        self.context = Context(
            "llama", model_dir, {}, 64, None, "0.12", metrics=self.metrics, model_yaml_config=settings
        )
        handler.initialize(self.context)

    def post(self, body: Any, path: str = "", content_type: str = "application/json", **headers: str) -> Job:
        """A new request; it reaches the handler in the next round."""
        self.count += 1
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": content_type, **({"url_path": path} if path else {}), **headers}
        job = Job(f"request-{self.count}", sent, encoded)
        self.jobs[job.request_id] = job
        return job

    def round(self) -> None:
        """One call of the handler with all jobs, and its reply given to the clients."""
        jobs = list(self.jobs.values())
        assert jobs, "the frontend calls only while it holds a job"
        data = [{"body": bytearray(job.body)} if job.fresh else {} for job in jobs]
        self.context.request_ids = {place: job.request_id for place, job in enumerate(jobs)}
        self.context.request_processor = [RequestProcessor(dict(job.headers) if job.fresh else {}) for job in jobs]
        for job in jobs:
            job.fresh = False
        replies = self.handler.handle(data, self.context)
        assert len(replies) == len(data)
        for place, request_id in self.context.request_ids.items():
            self._give(self.jobs[request_id], place, replies[place])

    def _give(self, job: Job, place: int, body: bytes) -> None:
        stop = self.context.stopping_criteria[place](body)
        first = job.status is None
        if first:
            job.status = self.context.get_response_status(place)[0]
            job.content_type = self.context.get_response_content_type(place)
            job.reply_headers = dict(self.context.get_response_headers(place))
        assert not (first and stop is True), "a first reply that says it is the last leaves the client without headers"
        assert not (not first and stop is None), "a stream cannot end with a whole reply"
        if not first:
            assert self.context.get_response_status(place)[0] == 200, "the status is out already"
        job.chunks.append(bytes(body))
        job.done = stop is not False
        if job.done or not job.open:  # the frontend sees that a client left when it writes to it
            del self.jobs[job.request_id]

    def run(self, *jobs: Job, rounds: int = 20000) -> None:
        """Rounds until these jobs (or all) have their answers."""
        wanted = jobs or tuple(self.jobs.values())
        for _ in range(rounds):
            if all(job.done or not job.open for job in wanted):
                return
            self.round()
        raise AssertionError("no answer")
