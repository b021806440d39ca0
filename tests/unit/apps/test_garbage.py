import datetime
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreambooth.errors import InputError
from pipelines.apps.garbage import find_leftovers, remove_leftovers
from pipelines.cli import main
from pipelines.storage.files import exists, join, write_bytes
from pipelines.storage.publications import Manifest, publish, read_manifest, write_manifest

DAY = datetime.timedelta(days=1)
OLD, NEW = "20200101T000000000000Z-0123abcd", "29990101T000000000000Z-0123abcd"


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "store")


def test_only_old_prefixes_without_a_manifest_go(store: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"whole")
    whole = publish(tmp_path / "model", join(store, "rex", "model"), metadata={})
    for name in (OLD, NEW):
        write_bytes(join(store, "rex", "model", name, "unet", "weights.bin"), b"12345")
    write_bytes(join(store, "prior", "abc", "000000.png"), b"a class image")

    found = find_leftovers(store, older_than=DAY)
    assert [(one.uri.rsplit("/", 1)[-1], one.size) for one in found] == [(OLD, 5)]
    remove_leftovers(found)

    assert find_leftovers(store, older_than=DAY) == ()
    assert read_manifest(whole.uri) == whole
    assert exists(join(store, "rex", "model", NEW, "unet", "weights.bin"))
    assert exists(join(store, "prior", "abc", "000000.png"))


def test_checkpoints_that_were_never_finished_go_too(store: str) -> None:
    old, new = "step-00000010-16f3a1b2c3d4e5f6", "step-00000020-fff3a1b2c3d4e5f6"
    for key in ("whole", "broken"):
        for name in (old, new):
            write_bytes(join(store, "rex", "checkpoints", key, name, "rank-0.safetensors"), b"1234567")
    write_manifest(Manifest(uri=join(store, "rex", "checkpoints", "whole", old), files={}, metadata={}))

    [found] = find_leftovers(store, older_than=DAY)
    assert found.uri.endswith(f"rex/checkpoints/broken/{old}")
    assert (found.size, found.begun.year) == (7, 2022)
    remove_leftovers((found,))
    assert find_leftovers(store, older_than=DAY) == ()
    assert exists(join(store, "rex", "checkpoints", "broken", new, "rank-0.safetensors"))
    assert exists(join(store, "rex", "checkpoints", "whole", old, "rank-0.safetensors"))


def test_the_command_lists_and_then_removes(tmp_path: Path) -> None:
    leftover = tmp_path / "output" / "rex" / "model" / OLD / "unet"
    leftover.mkdir(parents=True)
    (leftover / "weights.bin").write_bytes(bytes(1 << 20))
    listed = CliRunner().invoke(main, ["gc", str(tmp_path / "output"), "--dry-run"])
    assert "1.0 MiB" in listed.output
    assert "1 leftover found" in listed.output
    assert leftover.exists()
    removed = CliRunner().invoke(main, ["gc", str(tmp_path / "output")])
    assert "1 leftover removed" in removed.output
    assert not leftover.exists()


def test_an_address_without_anything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing at"):
        find_leftovers(str(tmp_path / "nowhere"), older_than=DAY)
