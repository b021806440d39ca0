"""The doctor on a real Ray: every node answers, and what is broken on purpose is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.doctor import examine

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_healthy_machine_and_one_with_two_faults(
    make_config: Any, tracking_in: Callable[[Path], str], tmp_path: Path
) -> None:
    findings = {finding.check: finding for finding in examine(make_config(tracking__uri=tracking_in(tmp_path)))}
    assert {finding.state for check, finding in findings.items() if check != "disk"} == {"ok"}, findings
    assert "loads in" in findings["base model"].found
    assert "without a dashboard" in findings["authentication"].found

    broken = make_config(tracking__uri="http://127.0.0.1:9", storage__root="/proc/nowhere")
    findings = {finding.check: finding for finding in examine(broken)}
    failed = {check for check, finding in findings.items() if finding.state == "failure"}
    assert failed == {"storage", "tracking"}
    assert all(findings[check].cure for check in failed)
