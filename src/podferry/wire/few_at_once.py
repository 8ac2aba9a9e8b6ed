"""A server that answers a few connections at once, each in a thread of its own, and closes those that come beside them."""

from __future__ import annotations

import threading
from socketserver import ThreadingMixIn
from typing import Any, ClassVar


class FewAtOnce(ThreadingMixIn):
    """Goes before the class of a threading server. At most `at_once` connections are open, whoever opens them."""

    at_once: ClassVar[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._places = threading.BoundedSemaphore(self.at_once)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection where there is a place, or close it."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[attr-defined]  # of the server's class
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one, and give its place back."""
        try:
            self.answer(request, client_address)
        finally:
            self._places.release()

    def answer(self, request: Any, client_address: Any) -> None:
        """Answer one connection, and close it."""
        super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has left, or was too slow: nobody need know."""
