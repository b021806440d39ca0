"""The page of a batch in a real browser: it runs, sorts, and fits a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.batch_report import render_report
from pipelines.batch_result import BatchResult, SubjectResult
from pipelines.subject_record import SubjectRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROBE = """
<script>
  const names = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent);
  const click = title => [...document.querySelectorAll("th")].find(head => head.textContent === title).click();
  const seen = { errors: window.faults, before: names() };
  click("similarity"); seen.up = names();
  click("similarity"); seen.down = names();
  click("subject"); seen.byName = names();
  seen.wide = document.body.scrollWidth > innerWidth;
  seen.requests = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
  document.title = JSON.stringify(seen);
</script>
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine's path")


def page() -> str:
    similarities = {"b-long-name-of-a-subject-that-is-as-long-as-allowed": 0.5, "c": -0.2, "a": 0.9}
    subjects = [
        SubjectResult(
            record=SubjectRecord(name=name, key="k", class_noun="dog", identifier="sks", state="done"),
            similarity={"identifier": similarity},
            history=[{"step": i, "loss": 0.1, "instance_loss": 0.1, "prior_loss": 0.1} for i in range(9)],
        )
        for name, similarity in similarities.items()
    ]
    facts = [("writes to", "s3://a-bucket/with/a/very/long/address/that/has/no/place/to/be/broken/in/at/all")]
    return render_report(BatchResult(name="pets", facts=facts, subjects=subjects))


@pytest.mark.parametrize("width", [500, 1200])  # a headless window has no less than 500
def test_it_runs_sorts_and_fits(tmp_path: Path, width: int) -> None:
    listen = '<script>window.faults = []; addEventListener("error", e => window.faults.push(e.message));</script>'
    html = page().replace('<meta charset="utf-8">', f'<meta charset="utf-8">{listen}').replace("</html>", PROBE)
    (tmp_path / "report.html").write_text(html)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    seen = json.loads(found[1])
    assert seen["errors"] == []
    assert [name[0] for name in seen["before"]] == ["b", "c", "a"]
    assert [name[0] for name in seen["up"]] == ["c", "b", "a"]
    assert [name[0] for name in seen["down"]] == ["a", "b", "c"]
    assert [name[0] for name in seen["byName"]] == ["a", "b", "c"]
    assert seen["wide"] is False
    assert seen["requests"] == 0
