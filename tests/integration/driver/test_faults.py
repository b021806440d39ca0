"""Whatever is killed in the middle of a batch, nothing is lost, doubled or changed; `tests/bench/faults.py` strikes."""

from pathlib import Path

import pytest

from tests.bench import faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return faults.undisturbed(tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize("name", [*faults.FAULTS, *faults.STORE_FAULTS])
def test_a_fault_costs_no_subject(name: str, calm: dict[str, dict[str, str]], tmp_path: Path) -> None:
    row = faults.measure(name, tmp_path, calm)
    assert faults.sound(row), row
