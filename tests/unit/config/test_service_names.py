"""Names, addresses and bytes that a service or a file can't hold: a sentence, before any work."""

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from pipelines.cli import main

RUN = ("run", "--images", "photos", "--class-noun", "dog", "--dry-run")
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize("name", ["a:b", "a/b", "a@b", "a%b", "a*b", "'ab'", "''", "' a'", "x" * 201, "é" * 101])
def test_a_registered_model(name: str) -> None:
    value = name if name.startswith("'") else f"'{name}'"
    message = refused(*RUN, "--set", f"tracking.registered_model_name={value}")
    if name != "'ab'":
        assert message.startswith("tracking.registered_model_name: expected a name ")


@pytest.mark.parametrize("name", ["''", "' a'", '"a\\nb"', "x" * 251])
def test_an_experiment(name: str) -> None:
    assert refused(*RUN, "--set", f"tracking.experiment={name}").startswith("tracking.experiment: expected a name ")


def test_names_that_mlflow_takes_are_taken(tmp_path: Path) -> None:
    """On a real database: what is let through, MLflow keeps and finds again."""
    from pipelines.tracking.client import connect

    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("/Users/me/pets", "pets: all", 'a "pet"', "100 %", "x" * 250, "ふわ"):
        config = load_config(
            {"subject": {"name": "rex", "class_noun": "dog", "instance_images": "x"}, "tracking": {"experiment": name}}
        )
        client.create_experiment(config.tracking.experiment)
        assert client.get_experiment_by_name(name).name == name
    for name in ("pets.dogs.rex", "my pet", "x" * 200, "ふわ"):
        config = load_config(
            {
                "subject": {"name": "rex", "class_noun": "dog", "instance_images": "x"},
                "tracking": {"registered_model_name": name},
            }
        )
        client.create_registered_model(config.model_name)
        assert client.get_registered_model(name).name == name


@pytest.mark.parametrize(
    "model",
    [
        "models:/a:b@latest",
        "models:/a%b@latest",
        'models:/"a"@latest',
        "models:/",
        "models:/@latest",
        "models:/rex@",
        "models:/rex@a b",
        "models:/rex@a@b",
        "models:/rex/",
        "models:/rex/Production",
        "models:/rex/²",
        "models:/rex/99999999999999999999",
        f"models:/{'x' * 300}@latest",
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "a dog", "--model"),
        ("serve", "--model"),
        ("evaluate", "--instance-images", "photos", "--model"),
        ("study", "--instance-images", "photos", "elsewhere.json"),
        ("gc",),
    ],
    ids=lambda command: command[0],
)
def test_an_address_of_a_model(
    model: str, command: tuple[str, ...], mlflow_database: str, working_folder: Path
) -> None:
    evaluation = "elsewhere.json"
    words = [word for word in command if word != evaluation]
    more = [] if command[0] == "gc" else ["--tracking-uri", mlflow_database]
    message = refused(*words, model, *(["models:/other@latest"] if command[0] == "study" else []), *more)
    expected = "is a registered model; expected a folder" if command[0] == "gc" else f"the model is {model!r}; expected"
    assert expected in message
    assert list(working_folder.iterdir()) == []


class TestBytes:
    @pytest.mark.parametrize(
        "arguments",
        [
            (*RUN, "--name", NOT_UTF8),
            (*RUN, "--set", f"storage.root={NOT_UTF8}"),
            ("batch", NOT_UTF8),
            ("generate", NOT_UTF8, "--model", "x"),
            ("evaluate", "--model", "x", "--instance-images", NOT_UTF8),
            ("gc", NOT_UTF8),
            ("submit", "run", NOT_UTF8),
            ("identifiers", "--check", "a\ud800"),
        ],
    )
    def test_in_an_argument(self, arguments: tuple[str, ...]) -> None:
        place = next(place for place, word in enumerate(arguments, 1) if any(0xD800 <= ord(c) <= 0xDFFF for c in word))
        assert refused(*arguments).startswith(f"argument {place}, b'")

    def test_in_a_real_process(self, working_folder: Path) -> None:
        import subprocess

        command = [sys.executable, "-m", "pipelines.cli", "models", "--tracking-uri", b"caf\xe9"]
        done = subprocess.run(
            command, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        )
        assert done.returncode == 2
        assert done.stderr.startswith(
            b"error: argument 3, b'caf\\xe9', holds bytes that aren't UTF-8; write it as UTF-8"
        )

    @pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "AWS_PROFILE", "RAY_API_SERVER_ADDRESS"])
    def test_in_a_variable(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, NOT_UTF8)
        assert refused("models") == f"the variable {name} is b'caf\\xe9', holds bytes that aren't UTF-8; set it again"

    def test_in_a_variable_to_hand_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from pipelines.driver.jobs import environment

        monkeypatch.setenv("SECRET", NOT_UTF8)
        with pytest.raises(InputError, match="--env SECRET: "):
            environment(["SECRET"])

    def test_in_the_working_folder(self, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = working_folder / NOT_UTF8
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert refused("models").startswith("the working folder b'")

    def test_in_a_photographs_name(self, working_folder: Path, instance_folder: Path, tiny_pipeline: Path) -> None:
        (working_folder / "rex").mkdir()
        for picture in instance_folder.iterdir():
            (working_folder / "rex" / f"{NOT_UTF8}{picture.name}").write_bytes(picture.read_bytes())
        run = ("run", "--images", "rex", "--class-noun", "dog", "--base-model", str(tiny_pipeline), "--dry-run")
        message = refused(*run)
        assert len(message.splitlines()) == 5
        assert "caf\\xe900.png', holds bytes that aren't UTF-8; rename the image or its folder" in message
