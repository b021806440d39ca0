"""docs/benchmarks.md takes figures that say what they were measured on, of this version, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
from batch_figures import KEPT, OUTPUT, keep, known
from benchmarks_page import BEGIN, END, PAGE, Refused, kept_files, replaced, section, taken
from measured import FILES
from stamps import Stamp, stamp, stamped, together

from dreambooth import __version__

ROOT = Path(__file__).parents[2]
AT: Stamp = {
    "day": "2026-11-29",
    "dreambooth": f"{__version__}, commit abc1234",
    "processor": "AMD EPYC 9R14 Processor, 2 CPUs to use",
    "GPUs": "none",
    "torch": "2.13.0",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "diffusers": "0.42.1",
}
ON = "2026-11-29 | AMD EPYC 9R14, 2 CPUs | torch 2.13.0, ray 2.60.0, deepspeed 0.19.8, diffusers 0.42.1"


def written(path: Path, measured: dict[str, Any]) -> Path:
    path.write_text(json.dumps(measured))
    return path


@pytest.fixture
def main_json(tmp_path: Path) -> Path:
    figures = {"loop_efficiency": 1.004, "startup_seconds": {"ray": 4.5, "total": 147.2}}
    return written(tmp_path / "main.json", stamped(figures, AT))


def rows(section: str) -> list[str]:
    return [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("|  |")]


class TestSection:
    def test_every_row_has_commit_day_machine_and_versions(self, main_json: Path) -> None:
        loop = "steps per second of `fit`, over a bare loop of the same model, batch and optimizer"
        assert rows(section([main_json])) == [
            f"| {loop} | 1.00 | abc1234 | {ON} |",
            f"| from `dreambooth run` to the end of the first training step, s | 147 | abc1234 | {ON} |",
            f"| of that, Ray, s | 4.50 | abc1234 | {ON} |",
        ]

    def test_subjects_are_rows_of_one_table(self, tmp_path: Path) -> None:
        row = {"instance": 0.83, "identifier": 0.69, "class_before": 0.04, "class_after": 0.12, "gain": 0.65}
        path = written(tmp_path / "subjects.json", stamped({"coral-car": row, "mean": row}, AT))
        heads, first, mean = [line for line in section([path]).splitlines() if line.startswith("| ")]
        assert heads.startswith("| subject | instance images | with the identifier |")
        assert first == f"| coral-car | 0.83 | 0.69 | 0.04 | 0.12 | 0.65 | abc1234 | {ON} |"
        assert mean.startswith("| mean | ")

    def test_a_gpu_is_named_in_place_of_the_processor(self, tmp_path: Path) -> None:
        path = written(tmp_path / "gpu.json", stamped({"busy_share": 0.9}, AT | {"GPUs": "NVIDIA H200 (139 GiB)"}))
        assert "| 2026-11-29 | NVIDIA H200 (139 GiB) | torch" in section([path])

    def test_a_figure_of_an_earlier_version_says_so(self, tmp_path: Path) -> None:
        path = written(tmp_path / "main.json", stamped({"x": 1.0}, AT | {"dreambooth": "0.0.1, commit fff0000"}))
        assert "| fff0000 (version 0.0.1: not to be compared) |" in section([path])


class TestTakingOver:
    def test_a_figure_without_a_stamp_is_refused(self, main_json: Path, tmp_path: Path) -> None:
        written(main_json, json.loads(main_json.read_text()) | {"prior_speedup": 2.0})
        with pytest.raises(Refused, match="measured on: prior_speedup; measure it again: `make bench`"):
            taken(main_json, tmp_path / "kept.json")
        assert not (tmp_path / "kept.json").exists()

    @pytest.mark.parametrize(
        ("version", "takes"),
        [
            (f"{__version__}, commit abc1234", True),
            (".".join([*__version__.split(".")[:2], "99"]), True),
            ("0.0.1, commit abc1234", False),
            ("9.0.0", False),
        ],
    )
    def test_figures_of_another_version_are_refused(self, tmp_path: Path, version: str, takes: bool) -> None:
        path = written(tmp_path / "main.json", stamped({"x": 1.0}, AT | {"dreambooth": version}))
        if takes:
            taken(path, tmp_path / "kept.json")
            assert json.loads((tmp_path / "kept.json").read_text())["x"] == 1.0
        else:
            with pytest.raises(Refused, match="x is of version "):
                taken(path, tmp_path / "kept.json")

    def test_what_is_not_measured_again_stays_with_its_stamp(self, main_json: Path, tmp_path: Path) -> None:
        kept, later = tmp_path / "kept.json", AT | {"day": "2026-11-30"}
        taken(main_json, kept)
        taken(written(main_json, stamped({"loop_efficiency": 0.99}, later)), kept)
        measured = json.loads(kept.read_text())
        assert measured["loop_efficiency"] == 0.99
        assert measured["stamps"]["loop_efficiency"]["day"] == "2026-11-30"
        assert measured["startup_seconds"] == {"ray": 4.5, "total": 147.2}
        assert measured["stamps"]["startup_seconds"] == AT


class TestPage:
    def test_the_section_is_made_anew_and_the_rest_of_the_page_stays(self, main_json: Path) -> None:
        page = (ROOT / PAGE).read_text()
        once = replaced(page, section([main_json]))
        assert replaced(once, section([main_json])) == once
        assert once.count(BEGIN) == 1
        assert once.index(END) < once.index("\n## Earlier figures, by other commits\n")
        assert replaced(once, section(kept_files(ROOT / "docs" / "measured"))) == page

    def test_every_figure_of_it_has_words(self) -> None:
        for path in kept_files(ROOT / "docs" / "measured"):
            if path.stem == "gpu":
                continue  # named by size, variant and figure, of which there are more than words
            measured = json.loads(path.read_text())
            for name in measured["stamps"]:
                words = FILES[path.stem].names
                row = isinstance(measured[name], dict) and FILES[path.stem].columns.keys() <= measured[name].keys()
                assert row or any(key == name or key.startswith(f"{name}, ") for key in words), name


class TestBatch:
    """A batch's parts are measured at different times, perhaps by different code: none takes another's stamp."""

    def kept(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(OUTPUT.read_text())
        return figures

    def test_a_part_keeps_the_stamp_of_its_measuring(self) -> None:
        later = AT | {"day": "2026-11-30"}
        keep("sequential", {"seconds": 300.0, "runs": 4}, AT)
        keep("batch", {"seconds": 100.0, "lane_busy_share": 0.9}, later)
        stamps = self.kept()["stamps"]
        assert stamps["sequential_seconds"] == AT
        assert stamps["batch_seconds"] == later
        assert self.kept()["batch_vs_sequential"] == 3.0

    def test_parts_of_two_commits_are_not_divided(self) -> None:
        keep("sequential", {"seconds": 300.0, "runs": 4}, AT)
        keep("batch", {"seconds": 100.0, "lane_busy_share": 0.9}, AT | {"dreambooth": f"{__version__}, commit fff0000"})
        assert "batch_vs_sequential" not in self.kept()
        assert self.kept()["sequential_seconds"] == 300.0

    def test_the_median_is_of_batches_by_the_same_code(self) -> None:
        for seconds, commit in ((90.0, "fff0000"), (100.0, "abc1234"), (130.0, "abc1234"), (110.0, "abc1234")):
            at = AT | {"dreambooth": f"{__version__}, commit {commit}"}
            keep("batch", {"seconds": seconds, "lane_busy_share": 0.9}, at)
        assert self.kept()["batch_seconds"] == 110.0
        assert self.kept()["batches_of_eight"] == [100.0, 130.0, 110.0]

    def test_seconds_without_a_stamp_are_refused(self) -> None:
        KEPT.parent.mkdir(parents=True)
        KEPT.write_text(json.dumps({"batch": 106.2, "batches_of_eight": [106.2]}))
        with pytest.raises(SystemExit, match="doesn't say what it was measured on; delete it"):
            known()


def test_a_stamp_says_code_day_and_machine() -> None:
    now = stamp()
    assert AT.keys() <= now.keys()
    assert now["dreambooth"].startswith(__version__)


def test_figures_of_several_measurements_keep_their_stamps() -> None:
    both = together(stamped({"a": 1, "b": 2}, AT), stamped({"b": 3}, AT | {"day": "2026-11-30"}))
    assert {name: both[name] for name in both["stamps"]} == {"a": 1, "b": 3}
    assert both["stamps"]["b"]["day"] == "2026-11-30"
