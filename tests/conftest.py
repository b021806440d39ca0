"""What holds for every test: few threads, no network, a folder of its own to work in."""

import os

# Set before torch, transformers or MLflow are imported anywhere, and inherited by the processes that tests start.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MPLBACKEND": "Agg",
    }
)

from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
INTEGRATION_TIMEOUT_SECONDS = 600


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark tests by the folder they lie in: integration tests get more time, gpu tests a device or a skip."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("integration", "gpu"):
            item.add_marker(folder)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(INTEGRATION_TIMEOUT_SECONDS))
        if folder == "gpu":
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that nothing a test writes by a relative path lands in the checkout."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
