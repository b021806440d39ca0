"""What a machine may lack: made do without where that can be, and named where it can't. On real folders."""

import os
import pwd
import stat
from pathlib import Path

import pytest

from dreambooth.errors import InputError
from pipelines.cluster import machine
from pipelines.cluster.machine import MachineFault, check_loopback, faults, ray_folder, settle
from pipelines.plan.doctor import judge_machines

NOBODY = 987_654_321
HOMELESS = "/proc/nohome"


@pytest.fixture(autouse=True)
def _sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home of the test's own, no variable that says otherwise, and nothing that stays set."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("TMPDIR", "RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *machine._CACHES):
        monkeypatch.setenv(name, "")  # so that what `settle` sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "_OBJECTS_BYTES", 1)
    for name in machine._USER_VARIABLES:
        monkeypatch.setenv(name, "me")


def found() -> str:
    return "; ".join(fault.found for fault in faults())


def read_only(folder: Path) -> Path:
    """A folder that is there and takes no file, from root neither."""
    folder.symlink_to("/proc/self")
    return folder


def test_a_sound_machine_is_left_as_it_is() -> None:
    before = dict(os.environ)
    settle()
    assert dict(os.environ) == before
    assert faults() == ()
    assert ray_folder() is None
    check_loopback()


@pytest.mark.parametrize("home", [HOMELESS, "/proc/nohome/deeper"])
def test_without_a_home_a_private_folder_is_one(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    assert f"the home {home} can't be written" in found()
    settle()
    folder = Path.home()
    assert str(folder) != home
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()
    assert "does for one" in found()
    assert not any(fault.stops for fault in faults())


def test_a_home_that_can_only_be_read_stays_and_caches_go_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = read_only(tmp_path / "kept")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", "/where/a/person/says")
    settle()
    assert Path.home() == home
    assert os.environ["MPLCONFIGDIR"] == "/where/a/person/says"
    assert Path(os.environ["DREAMBOOTH_CACHE"]).parent.is_dir()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_another_users_folder_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever made it first could put a configuration there that this user's programs believe."""
    monkeypatch.setattr(machine, "_temporary", lambda: str(tmp_path))
    monkeypatch.setattr(machine, "_SHORT_FOLDERS", (str(tmp_path),))
    monkeypatch.setenv("HOME", HOMELESS)
    (tmp_path / f"dreambooth-home-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"dreambooth-home-{os.getuid()}").chmod(0o777)
    settle()
    assert os.environ["HOME"] == HOMELESS
    assert any(fault.stops for fault in faults())


def test_a_user_without_an_entry_in_passwd_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(machine, "_home", lambda: Path(os.environ["HOME"]))
    for name in machine._USER_VARIABLES:
        monkeypatch.setenv(name, "")
    settle()
    assert getpass.getuser() == f"user{NOBODY}"
    assert f"user {NOBODY} has no entry in passwd; user{NOBODY} is the name used" in found()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("kind", ["long", "missing", "unwritable", "a file"])
def test_a_folder_that_takes_no_sockets(
    variable: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 100)
    if kind == "long":
        folder.mkdir()
    elif kind == "unwritable":
        folder = read_only(tmp_path / "x")
    elif kind == "a file":
        folder = tmp_path / "x"
        folder.touch()
    monkeypatch.setenv(variable, str(folder))
    assert ray_folder() == "/tmp/ray"
    if variable == "TMPDIR":
        words = "bytes long, and Ray's sockets need it shorter; Ray's files go to /tmp/ray"
        assert (words if kind == "long" else f"TMPDIR {folder} can't be written") in found()
    monkeypatch.setattr(machine, "_SHORT_FOLDERS", (str(tmp_path / "gone"),))
    with pytest.raises(
        InputError, match=r"no folder takes Ray's sockets: .* set TMPDIR to a folder that can be, with a"
    ):
        ray_folder()
    assert any(fault.stops for fault in faults())


def test_the_longest_path_that_will_do_is_one_that_ray_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray._private.utils import validate_socket_filepath

    monkeypatch.setattr(machine, "_can_write", lambda folder: True)
    for length in range(2, 120):
        folder = "/" + "x" * (length - 1)
        if machine._takes_sockets(folder):
            validate_socket_filepath(f"{folder}/ray/session_2026-11-28_17-06-43_123456_4194304/sockets/plasma_store")
    assert machine._takes_sockets("/" + "x" * 38)


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_OBJECTS_BYTES", 1 << 60)
    (fault,) = faults()
    assert "MiB free" in fault.found
    assert "--shm-size" in fault.cure
    assert not fault.stops


def test_a_working_folder_that_takes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir("/proc")
    assert "the working folder /proc can't be written" in found()
    assert "storage.root and tracking.uri" in faults()[-1].cure
    assert faults(working_folder=False) == ()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the working folder is gone" in found()


def test_the_doctor_names_the_machine_and_the_worst_decides() -> None:
    mended, fatal = MachineFault(found="no home", cure="set HOME"), MachineFault(found="x", cure="y", stops=True)
    assert judge_machines({"one": (), "two": ()}).state == "ok"
    finding = judge_machines({"one": (mended,), "two": (mended,)})
    assert (finding.state, finding.found, finding.cure) == ("warning", "one: no home; two: no home", "set HOME")
    assert judge_machines({"one": (mended,), "two": (fatal,)}).state == "failure"
