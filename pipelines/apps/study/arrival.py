"""A limit of the time that a request may take to arrive.

uvicorn limits the time between two requests of a connection, not the wait for the first nor that for the rest of one.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def http_within(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which closes a connection whose request isn't whole after as many seconds.

    They count from the connection, or from the first byte of a further request.
    """

    class Limited(_Limited):
        limit = seconds

    return Limited


class _Limited(H11Protocol):
    limit: float
    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._closing = self.loop.call_later(self.limit, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        whole = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if whole:
            self._stop_closing()
        elif self._closing is None:
            self._closing = self.loop.call_later(self.limit, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_closing()
        super().connection_lost(exc)

    def _stop_closing(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
