"""What names a job, and what travels with it; clients that answer by rote stand in for a cluster."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreambooth.errors import InputError
from pipelines.driver.jobs import Job, connect, environment, exit_code, make_job, status, submit


class Client:
    """Remembers what was submitted; knows jobs as (id, status)."""

    def __init__(self, **known: str) -> None:
        self.known = known
        self.submitted: list[dict[str, Any]] = []
        self.files: set[str] = set()

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=i, status=SimpleNamespace(value=s)) for i, s in self.known.items()]

    def submit_job(self, **job: Any) -> None:
        folder = Path(job["runtime_env"]["working_dir"])
        self.files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        self.submitted.append(job)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "my cars.yaml"
    path.write_text("subjects: []")
    return path


def job_of(table: Path) -> Job:
    return make_job("batch", [str(table), "--set", "prompts.instance=a photo of {identifier}"])


def test_a_job_is_named_by_what_it_does(table: Path, tmp_path: Path) -> None:
    first = job_of(table).id
    assert job_of(table).id == first
    elsewhere = tmp_path / "elsewhere" / table.name
    elsewhere.parent.mkdir()
    elsewhere.write_text(table.read_text())
    assert job_of(elsewhere).id == first
    table.write_text("subjects: []\ntrain: {seed: 1}")
    assert job_of(table).id != first
    assert make_job("batch", ["--skip-invalid"]).id != make_job("run", ["--skip-invalid"]).id


def test_the_command_survives_the_shell(table: Path) -> None:
    words = shlex.split(job_of(table).entrypoint)
    assert words[:5] == ["python", "-m", "pipelines.cli", "batch", "inputs/0/my cars.yaml"]
    assert "prompts.instance=a photo of {identifier}" in words
    assert words[-2:] == ["--set", "cluster.address=auto"]


def test_only_what_is_needed_travels(table: Path) -> None:
    client = Client()
    job = job_of(table)
    assert submit(client, job, with_code=True, variables={"AWS_PROFILE": "x"}) == (f"{job.id}-1", "submitted")
    assert {"inputs/0/my cars.yaml", "pipelines/cli/main.py", "dreambooth/config/settings.py"} <= client.files
    assert {name.split("/")[0] for name in client.files} == {"inputs", "pipelines", "dreambooth"}
    assert not [name for name in client.files if name.endswith(".pyc")]
    assert client.submitted[0]["runtime_env"]["env_vars"]["AWS_PROFILE"] == "x"
    submit(client, job_of(table), with_code=False, variables={})
    assert client.files == {"inputs/0/my cars.yaml"}


@pytest.mark.parametrize(
    ("known", "attempt", "fate"),
    [
        ("PENDING", 1, "already running"),
        ("RUNNING", 1, "already running"),
        ("SUCCEEDED", 1, "already done"),
        ("FAILED", 2, "submitted again"),
        ("STOPPED", 2, "submitted again"),
    ],
)
def test_submitting_twice_is_one_job(table: Path, known: str, attempt: int, fate: str) -> None:
    job = job_of(table)
    client = Client(**{f"{job.id}-1": known, "another-1": "RUNNING"})
    assert submit(client, job, with_code=False, variables={}) == (f"{job.id}-{attempt}", fate)
    assert [made["submission_id"] for made in client.submitted] == [f"{job.id}-2"] * (attempt - 1)


def test_only_the_last_attempt_counts(table: Path) -> None:
    job = job_of(table)
    client = Client(**{f"{job.id}-{n}": "STOPPED" for n in range(1, 11)} | {f"{job.id}-11": "RUNNING"})
    assert submit(client, job, with_code=False, variables={}) == (f"{job.id}-11", "already running")


def test_a_folder_that_only_this_machine_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"'photos' is a folder here, and the job runs elsewhere; .*s3://bucket/photos"
    ):
        make_job("batch", ["photos"])
    assert make_job("batch", [str(tmp_path / "photos")]).arguments == ("batch", str(tmp_path / "photos"))


def test_the_exit_code_of_a_job_is_that_of_its_command() -> None:
    def code(status: str, driver_exit_code: int | None) -> int:
        client = Client(job=status)
        listed = client.list_jobs()
        listed[0].driver_exit_code = driver_exit_code
        client.list_jobs = lambda: listed  # type: ignore[method-assign]
        return exit_code(client, "job")

    assert [code("SUCCEEDED", 0), code("FAILED", 3), code("FAILED", 2), code("STOPPED", None)] == [0, 3, 2, 1]


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(InputError, match="NOT_SET"):
        environment(["NOT_SET"])
    with pytest.raises(InputError, match="expected the dashboard's"):
        connect("HEAD:8265")
    with pytest.raises(InputError, match="no job 'x'; it has dreambooth-run-1"):
        status(Client(**{"dreambooth-run-1": "RUNNING"}), "x")


class TestPaths:
    """What is a path is decided by the option that a word stands behind, whatever lies in the working folder."""

    @pytest.fixture(autouse=True)
    def _things_that_lie_here(self, working_folder: Path) -> None:
        for name in ("dog", "miniature", "photos", "auto"):
            (working_folder / name).mkdir()
        (working_folder / "run.yaml").write_text("subject: {class_noun: dog}\nbase_model: miniature\n")
        (working_folder / "s.csv").write_text("name,class_noun,instance_images\nrex,dog,s3://b/rex\n")

    @pytest.mark.parametrize(
        ("command", "arguments"),
        [
            ("run", ("--images", "s3://b/rex", "--class-noun", "dog")),
            ("run", ("--class-noun=dog", "--name", "dog", "--identifier", "photos")),
            ("run", ("--base-model", "miniature", "--images=/shared/rex")),
            ("run", ("--set", "subject.class_noun=dog", "--set", "tracking.experiment=photos")),
            ("run", ("--set", "base_model=miniature", "--quiet", "--dry-run")),
            ("batch", ("s3://b/pets.yaml", "--name", "dog", "--skip-invalid")),
            ("batch", ("--name", "s.csv", "/shared/pets")),
            ("batch", ("/shared/pets.csv", "--set=storage.root=s3://b/out")),
        ],
    )
    def test_what_goes_through_as_it_is(self, command: str, arguments: tuple[str, ...]) -> None:
        job = make_job(command, arguments)
        assert (job.arguments, job.files) == ((command, *arguments), {})

    @pytest.mark.parametrize(
        ("command", "arguments", "named"),
        [
            ("run", ("--class-noun", "dog", "run.yaml"), ("--class-noun", "dog", "inputs/0/run.yaml")),
            ("run", ("--", "run.yaml"), ("inputs/0/run.yaml",)),
            ("batch", ("s.csv", "--name", "dog"), ("inputs/0/s.csv", "--name", "dog")),
        ],
    )
    def test_a_file_that_travels(self, command: str, arguments: tuple[str, ...], named: tuple[str, ...]) -> None:
        job = make_job(command, arguments)
        assert job.arguments == (command, *named)
        assert list(job.files) == [word for word in named if word.startswith("inputs/")]

    @pytest.mark.parametrize(
        ("command", "arguments", "message"),
        [
            ("run", ("--images", "photos"), "subject.instance_images 'photos' is a path here"),
            ("run", ("--images", "nowhere/*.jpg"), "subject.instance_images 'nowhere/*.jpg' is a path here"),
            ("run", ("--images=~/photos",), "subject.instance_images '~/photos' is a path here"),
            ("run", ("--output", "out"), "storage.run 'out' is a path here"),
            ("run", ("--base-model", "dog"), "base_model 'dog' is a path here"),
            ("run", ("--base-model", "./none"), "base_model './none' is a path here"),
            ("run", ("--set", "storage.prior=prior"), "storage.prior 'prior' is a path here"),
            ("run", ("--set", "storage={root: out}"), "storage.root 'out' is a path here"),
            ("run", ("--set", "subject.instance_images=[s3://b/1.png, 2.png]"), "'2.png' is a path here"),
            ("run", ("nowhere.yaml",), "there is nothing at 'nowhere.yaml'"),
            ("run", ("dog",), "'dog' is a folder here"),
            ("batch", ("photos",), "'photos' is a folder here"),
            ("batch", ("relative.yaml",), "relative.yaml: subject.instance_images 'photos' is a path here"),
            ("run", ("relative-run.yaml",), "relative-run.yaml: storage.root 'out' is a path here"),
        ],
    )
    def test_a_path_that_means_nothing_there(
        self, working_folder: Path, command: str, arguments: tuple[str, ...], message: str
    ) -> None:
        (working_folder / "relative.yaml").write_text("[{name: rex, class_noun: dog, instance_images: photos}]")
        (working_folder / "relative-run.yaml").write_text("storage.root: out\n")
        with pytest.raises(InputError) as caught:
            make_job(command, arguments)
        assert message in str(caught.value)

    def test_all_switches_and_paths_of_the_commands_are_known(self) -> None:
        import click

        from pipelines.cli import main
        from pipelines.driver.job_paths import OPTIONS, SWITCHES

        options = [param for name in ("run", "batch") for param in main.commands[name].params]
        switches = {
            word for option in options if isinstance(option, click.Option) and option.is_flag for word in option.opts
        }
        assert switches <= set(SWITCHES)
        assert set(OPTIONS) <= {word for option in options for word in option.opts}

    def test_through_the_command_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from click.testing import CliRunner

        from pipelines.cli import main

        nobody = ["--address", "http://127.0.0.1:9"]
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", nobody[1])  # which Ray's client sets, and is put back
        noun = CliRunner().invoke(main, ["submit", "run", "--images", "s3://b/rex", "--class-noun", "dog", *nobody])
        assert (noun.exit_code, "is a folder here" in noun.stderr) == (2, False)
        images = CliRunner().invoke(main, ["submit", "run", "--images", "photos", "--class-noun", "dog", *nobody])
        assert (images.exit_code, "'photos' is a path here" in images.stderr) == (2, True)
