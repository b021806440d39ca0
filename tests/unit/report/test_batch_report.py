"""The page of a batch: whole, escaped, and not too large."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from pipelines.driver.batch_summary import lane_busy_share
from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult, SubjectResult
from pipelines.report.links import relative_link
from pipelines.tasks import SubjectRecord


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
    assert '<pre tabindex="0">&lt;i&gt;\nline</pre>' in made
    assert made.count("<script>") == 1  # its own


def test_it_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    Image.effect_noise((1200, 1500), 60).convert("RGB").save(tmp_path / "0.png")
    made = page(result("rex", sample=str(tmp_path / "0.png")))
    sources = re.findall(r'(?:src|href)="([^"]*)"', made)
    assert sources
    assert all(source.startswith(("data:image/webp;base64,", "data:,")) for source in sources)
    notice = re.search(r"/\*! https://github.com/leeoniya/uPlot [^*]*\*/", made)
    assert notice is not None  # of the library that draws charts: its licence asks for it
    assert not re.search(r"url\(|@import|https?://", made.replace(notice[0], ""))


def test_it_stays_small() -> None:
    many = page(*(result(f"s-{i}") for i in range(100)))
    [chart] = re.findall(r"data-chart='([^']*)'", many)
    content = json.loads(unescape(chart))
    assert 100 < len(content["x"]) <= 200
    assert len(content["series"]) == 40
    assert "losses of 60 more subjects" in many
    assert "losses of 1 more subject are" in page(*(result(f"s-{i}") for i in range(41)))
    assert many.count("<tr ") == 100
    assert len(many) < 500_000


def test_verdicts_come_first_and_the_worst_on_top() -> None:
    copies = ("samples copy the photographs (50% are near-copies): fewer steps",)
    shares = {"near_copies": 0.5, "prompts_followed": 1.0}
    lost = replace(result("lost").record, state="failed", reason="no memory")
    low, high = ({"identifier": value, "instance": 0.8} for value in (0.5, 0.7))
    made = page(
        result("good", similarity=high, verdict=shares | {"near_copies": 0.0}),
        result("fair", similarity=low, verdict=shares | {"near_copies": 0.0}),
        result("bad", similarity=high, verdict=shares, warnings=copies),
        SubjectResult(record=lost),
        result("blind"),
    )
    assert re.findall(r'<tr data-name="(\w+)" data-verdict="([\w ]+)"', made) == [
        ("lost", "failed"),
        ("bad", "copies"),
        ("blind", "not measured"),
        ("fair", "bound"),
        ("good", "bound"),
    ]
    chips = re.findall(r"<b>(\d)</b> ([\w ]+)</button>", made)
    assert chips == [("1", "failed"), ("1", "copies"), ("1", "not measured"), ("2", "bound")]
    assert '<dt class="doubt">copies</dt><dd>fewer steps</dd>' in made
    assert made.index("no memory") < made.index("samples copy the photographs (50% are near-copies)")


def test_times_and_counts_are_said_as_a_person_would() -> None:
    record = replace(result("rex").record, began=100.0, ended=1000.0)
    assert '<td class="n" data-v="900.0">15 min</td>' in page(result("rex", record=record))


def test_subjects_link_to_their_pages() -> None:
    assert '<a href="../../rex/report.html">rex</a>' in page(result("rex", page="../../rex/report.html"))
    assert relative_link("/out/rex/report.html", "/out/batches/pets") == "../../rex/report.html"
    assert relative_link("/out/batches/pets/report.html", "/out/a b") == "../batches/pets/report.html"
    assert relative_link("s3://pets/out/my%20rex/report.html", "s3://pets/out") == "my%2520rex/report.html"
    assert relative_link("s3://other/rex/report.html", "s3://pets/out") == "s3://other/rex/report.html"
    assert relative_link("/out/rex/report.html", "s3://pets/out") == "file:///out/rex/report.html"


def test_figures_that_are_not_there_are_dashes() -> None:
    bare = SubjectResult(record=SubjectRecord(name="rex", key="k", class_noun="dog", identifier="sks"))
    assert '<td class="n">–</td>' in page(bare)


def test_similarities_have_columns_where_some_were_measured() -> None:
    assert ">similarity<" not in page(result("rex"))
    made = page(result("rex"), result("tom", similarity={"identifier": 0.73, "instance": 0.83}))
    assert ">similarity</button></th>" in made
    assert ">0.73</td>" in made


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
