"""Reads the frontend's messages whole, and what it repeats only once.

Every round the frontend sends all headers of all live requests again, and TorchServe fetches each field with two system
calls, each of which gives up Python's lock and has to win it back: thousands at 32 streams.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

_BLOCK = 1 << 18


class Messages:
    """One connection's messages, read ahead: the frontend sends nothing before it has the reply to the last one."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._at = 0
        # A live request as it was last sent, if it had headers only, and what stands for it when it is sent again.
        self._repeated: dict[bytes, tuple[bytes, dict[str, Any]]] = {}
        # The last message, if there was nothing else in it, and what stands for it.
        self._whole: tuple[bytes, list[dict[str, Any]]] | None = None

    def retrieve(self, connection: Any, length: int) -> bytearray:
        """The next bytes; what TorchServe's own reader of single fields is replaced by."""
        self._need(connection, length)
        field = self._kept[self._at : self._at + length]
        self._at += length
        return field

    def inference(self, connection: Any) -> list[dict[str, Any]]:
        """The requests of one round; of those that were there before only the ids."""
        requests, repeated = [], {}
        if self._whole is not None:
            self._need(connection, 1)
            if self._skip(self._whole[0]):
                self._drop()
                return self._whole[1]
        began = self._at
        while True:
            id_ = self._field(connection)
            if id_ is None:
                break
            key = bytes(id_)
            known = self._repeated.get(key)
            if known is not None and self._skip(known[0]):
                repeated[key] = known
                requests.append(known[1])
                continue
            start = self._at
            # Positions count from here: nothing is dropped from the buffer before the message ends.
            request = {"requestId": id_, "headers": self._headers(connection), "parameters": self._inputs(connection)}
            if not request["parameters"]:
                again = {"requestId": id_, "headers": [], "parameters": []}
                repeated[key] = (bytes(self._kept[start : self._at]), again)
            requests.append(request)
        self._repeated, self._whole = repeated, None
        if len(repeated) == len(requests):
            self._whole = bytes(self._kept[began : self._at]), [again for _, again in repeated.values()]
        self._drop()
        return requests

    def _drop(self) -> None:
        """Forget what was read."""
        del self._kept[: self._at]
        self._at = 0

    def _headers(self, connection: Any) -> list[dict[str, bytearray]]:
        headers = []
        while (name := self._field(connection)) is not None:
            headers.append({"name": name, "value": self._field(connection)})
        return headers

    def _inputs(self, connection: Any) -> list[dict[str, Any]]:
        inputs = []
        while (name := self._field(connection)) is not None:
            content_type = self._field(connection).decode()
            inputs.append({"name": name.decode(), "contentType": content_type, "value": self._field(connection)})
        return inputs

    def _field(self, connection: Any) -> bytearray | None:
        """A length and as many bytes; None for the length -1, which ends a list."""
        self._need(connection, 4)
        (length,) = struct.unpack_from("!i", self._kept, self._at)
        self._at += 4
        return None if length < 0 else self.retrieve(connection, length)

    def _skip(self, block: bytes) -> bool:
        """Step over a block if it comes next; one that has not all arrived is better read field by field."""
        if not self._kept.startswith(block, self._at):
            return False
        self._at += len(block)
        return True

    def _need(self, connection: Any, length: int) -> None:
        while len(self._kept) - self._at < length:
            block = connection.recv(_BLOCK)
            if not block:  # the frontend is gone, and so is all reason to live
                sys.exit(0)
            self._kept.extend(block)


def read_messages_whole() -> None:
    """Let TorchServe read its messages so; bodies come as bytes, whatever their content type."""
    from ts.protocol import otf_message_handler

    messages = Messages()
    otf_message_handler._retrieve_buffer = messages.retrieve
    otf_message_handler._retrieve_inference_msg = messages.inference
