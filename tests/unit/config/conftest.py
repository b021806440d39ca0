"""An environment that leads nowhere."""

import os

import pytest


@pytest.fixture(autouse=True)
def _straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no credentials but a test's, no cluster's variables."""
    for name in [
        name for name in os.environ if name.lower().endswith("_proxy") or name.startswith(("AWS_", "RAY_ADDR"))
    ]:
        monkeypatch.delenv(name)
