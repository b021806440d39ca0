"""Work behind the training: a call in a thread, whose outcome is asked for later."""

import contextvars
import threading
import time
from collections.abc import Callable


class Behind:
    """Calls a function in a thread. `seconds` is what it took."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._error: Exception | None = None
        self.seconds = 0.0
        context = contextvars.copy_context()  # logs name the subject and the lane
        self._thread = threading.Thread(target=context.run, args=(self._run, call), name="behind", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised where the outcome is asked for
            self._error = error
        self.seconds = time.perf_counter() - began

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end, whether it failed or not."""
        self._thread.join()

    def result(self) -> None:
        """Wait for its end, and raise what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
