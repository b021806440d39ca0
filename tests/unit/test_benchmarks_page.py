"""docs/benchmarks.md takes figures that say what they were measured on, of this version, and no others."""

import json
from pathlib import Path

import pytest
from benchmarks_page import BEGIN, PAGE, Refused, replaced, section, stamped

from dreambooth import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "main.json"
    path.write_text(json.dumps(stamped({"loop_efficiency": 1.004, "startup_seconds": {"ray": 4.5, "all": 147.2}})))
    return path


def altered(path: Path, **stamp: str) -> Path:
    figures = json.loads(path.read_text())
    path.write_text(json.dumps(figures | {"stamp": figures["stamp"] | stamp}))
    return path


def test_figures_stand_below_what_they_were_measured_on(measured: Path) -> None:
    lines = section(
        [altered(measured, processor="AMD EPYC, 2 CPUs to use", GPUs="none", day="2026-11-29")]
    ).splitlines()
    [stamp] = [line for line in lines if line.startswith("`make bench`")]
    assert f"dreambooth {__version__}" in stamp
    assert "2026-11-29, AMD EPYC, 2 CPUs to use, torch " in stamp
    assert [line for line in lines if line.startswith("| ")] == [
        "| figure | |",
        "| loop_efficiency | 1.00 |",
        "| startup_seconds, ray | 4.50 |",
        "| startup_seconds, all | 147 |",
    ]


def test_a_gpu_is_named_in_place_of_the_processor(measured: Path) -> None:
    assert ", NVIDIA H200 (139 GiB), torch" in section([altered(measured, GPUs="NVIDIA H200 (139 GiB)")])


def test_figures_without_a_stamp_are_refused(tmp_path: Path) -> None:
    (tmp_path / "main.json").write_text(json.dumps({"loop_efficiency": 1.0}))
    with pytest.raises(Refused, match="doesn't say what it was measured on; measure it again: `make bench`"):
        section([tmp_path / "main.json"])


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        (f"{__version__}, commit abc1234", True),
        (".".join([*__version__.split(".")[:2], "99"]), True),
        ("0.0.1, commit abc1234", False),
        ("9.0.0", False),
    ],
)
def test_figures_of_another_version_are_refused(measured: Path, version: str, taken: bool) -> None:
    path = altered(measured, dreambooth=version)
    if taken:
        assert f"dreambooth {version}" in section([path])
    else:
        with pytest.raises(Refused, match="and this is"):
            section([path])


def test_the_section_is_made_anew_and_the_rest_of_the_page_stays(measured: Path) -> None:
    page = (ROOT / PAGE).read_text()
    once = replaced(page, section([measured]))
    assert replaced(once, section([measured])) == once
    assert once.count(BEGIN) == 1
    assert once.index(BEGIN) < once.index("\n## The demo\n")
    assert "".join(once.split(section([measured]) + "\n\n")) == page
