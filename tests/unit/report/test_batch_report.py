"""The page of a batch: whole, escaped, and not too large."""

import io
import json
import re
from dataclasses import replace
from html import unescape

import pytest
from PIL import Image

from pipelines.driver.batch_summary import lane_busy_share
from pipelines.report.batch_report import SHOWN, render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.tasks import SubjectRecord


def sheet() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((1200, 1500), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def result(name: str, **changes: object) -> SubjectResult:
    record = SubjectRecord(
        name=name, key="k", class_noun="dog", identifier="sks", state="done", lane="d/0", began=100.0, ended=110.0
    )
    history = [{"step": step, "loss": 1 / step, "instance_loss": 0.5, "prior_loss": 0.1} for step in range(1, 501)]
    made = SubjectResult(
        record=record,
        registered=f"dreambooth-{name} version 1",
        history=history,
        steps_per_second=100.0,
        step_seconds=5.0,
    )
    return replace(made, **changes)


def page(*subjects: SubjectResult) -> str:
    return render_report(BatchResult(name="pets", facts=[("lanes", "2 <wide>")], subjects=subjects))


def test_everything_from_data_is_escaped() -> None:
    record = replace(
        result("rex").record, class_noun="<script>x</script>", state="failed", reason="<b>", traceback="<i>\nline"
    )
    made = page(result("rex", record=record))
    assert "&lt;script&gt;x&lt;/script&gt;" in made
    assert "2 &lt;wide&gt;" in made
    assert "<pre>&lt;i&gt;\nline</pre>" in made
    assert made.count("<script>") == 1  # its own


def test_it_needs_nothing_from_elsewhere() -> None:
    made = page(result("rex", contact_sheet=sheet()))
    sources = re.findall(r'(?:src|href)="([^"]*)"', made)
    assert sources
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    notice = re.search(r"/\*! https://github.com/leeoniya/uPlot [^*]*\*/", made)
    assert notice is not None  # of the library that draws charts: its licence asks for it
    assert not re.search(r"url\(|@import|https?://", made.replace(notice[0], ""))


def test_it_stays_small() -> None:
    pictured = page(result("rex", contact_sheet=sheet()))
    assert len(pictured) < 1_000_000
    [chart] = re.findall(r"data-chart='([^']*)'", pictured)
    assert 100 < len(json.loads(unescape(chart))["x"]) <= 200
    many = page(*(result(f"s-{i}") for i in range(SHOWN + 7)))
    assert many.count("<figure>") == SHOWN
    assert "curves of 7 more subjects" in many
    assert many.count("<tr>") == 1 + SHOWN + 7


def test_figures_that_are_not_there_are_dashes() -> None:
    bare = SubjectResult(record=SubjectRecord(name="rex", key="k", class_noun="dog", identifier="sks"))
    assert "<td class=n>–</td>" in page(bare)


def test_similarities_have_columns_where_some_were_measured() -> None:
    assert "similarity" not in page(result("rex"))
    made = page(result("rex"), result("tom", similarity={"identifier": 0.73, "instance": 0.83}))
    assert ">similarity</th>" in made
    assert ">0.73</td>" in made


def test_a_curve_says_how_many_steps_there_were() -> None:
    sparse = result("rex").history[9::10]
    assert "loss over 500 steps" in page(result("rex", history=sparse))


def test_the_busy_share_of_lanes() -> None:
    def trained(lane: str, began: float, ended: float) -> SubjectResult:
        made = result("a")
        return replace(made, record=replace(made.record, lane=lane, began=began, ended=ended))

    # 5 seconds of steps each, in a lane that was there for 12.5.
    assert lane_busy_share([trained("d/0", 100.0, 110.0), trained("d/0", 110.0, 112.5)]) == pytest.approx(0.8)
    # A lane that has nothing left waits for the other.
    assert lane_busy_share([trained("d/0", 100.0, 110.0), trained("d/1", 100.0, 105.0)]) == pytest.approx(0.5)
    # The same batch was gone on with a day later.
    days = [trained("d/0", 100.0, 110.0), trained("e/0", 90_000.0, 90_010.0)]
    assert lane_busy_share(days) == pytest.approx(0.5)
    assert lane_busy_share([]) is None
