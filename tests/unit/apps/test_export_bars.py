"""Bars of an export: each counts the bytes of all files together, and is filled once, by the last of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from changed_models import publish_changed

from pipelines.apps.export.exporting import export_whole
from pipelines.apps.export.lora import export_lora
from pipelines.apps.export.progress import counted_bytes
from pipelines.driver.console import RunConsole
from pipelines.driver.relay import Update


class Watched(RunConsole):
    """Keeps what its bars are told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.bars: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def bar(self, title: str) -> Iterator[Update]:
        assert title not in self.bars, "a bar begins again"
        told = self.bars.setdefault(title, [])
        yield lambda done, total, note: told.append((done, total))


@pytest.fixture
def console(tiny_pipeline: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Watched:
    """What an export from one place to another has told."""
    form, dtype, source, to = request.param
    model = publish_changed(tiny_pipeline, tmp_path, lambda name, tensor: tensor + 0.01)
    if source == "remote":
        filesystem = fsspec.filesystem("memory")
        filesystem.put(model, "/published/rex", recursive=True)
        model = "memory://published/rex"
    to = {"local": str(tmp_path / "out"), "remote": "memory://exports/out"}[to]
    watched = Watched()
    if form == "lora":
        export_lora(model, f"{to}.safetensors", rank=4, console=watched)
    else:
        ending = "" if form == "diffusers" else ".safetensors"
        export_whole(model, f"{to}{ending}", form=form, dtype=dtype, console=watched)
    for place in ("/published", "/exports"):
        if fsspec.filesystem("memory").exists(place):
            fsspec.filesystem("memory").rm(place, recursive=True)
    return watched


@pytest.mark.parametrize(
    ("console", "titles"),
    [
        (("diffusers", "auto", "local", "local"), ["diffusers", "checksum"]),
        (("diffusers", "bfloat16", "remote", "remote"), ["download", "diffusers", "checksum and upload"]),
        (("single-file", "auto", "remote", "local"), ["download", "single-file", "checksum"]),
        (("lora", "auto", "local", "remote"), ["decomposed", "lora", "checksum and upload"]),
    ],
    indirect=["console"],
)
def test_every_bar_is_filled_once(console: Watched, titles: list[str]) -> None:
    assert list(console.bars) == titles
    for title, told in console.bars.items():
        assert len({total for _, total in told}) == 1, title
        counts = [done for done, _ in told]
        assert counts == sorted(counts), title
        assert counts[-1] == told[-1][1], title


def test_a_bar_counts_megabytes_and_its_last_byte_fills_it() -> None:
    console = Watched()
    with counted_bytes(console, "written", 2_500_000) as counted:
        for count in (999_999, 1, 1_499_999, 1):
            counted.add(count)
    assert console.bars["written"] == [(0, 3), (1, 3), (2, 3), (3, 3)]
