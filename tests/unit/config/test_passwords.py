"""Passwords in addresses are never shown."""

import random
import string
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from click.testing import CliRunner

from dreambooth.config.addresses import shown, without_credentials
from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from pipelines.cli import main
from pipelines.driver.jobs import make_job
from pipelines.plan.describe import printable_settings

SCHEMES = ("http", "https", "postgresql", "mysql+pymysql", "mssql", "ftp", "sftp", "nosuch")


def passwords(count: int) -> list[str]:
    """Random ones of what a keyboard has, each with the letters that mean something in an address."""
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + "!$&()*+,-.;=<>[]^_`{|}~"
    return [
        "".join(
            rng.sample(rng.choices(letters, k=rng.randint(8, 20)) + rng.choices("/#@?%:", k=rng.randint(1, 4)), k=9)
        )
        for _ in range(count)
    ]


class TestPasswordsAreNeverShown:
    """Whatever is done with an address, and whatever goes wrong with it."""

    @pytest.fixture(params=passwords(2))
    def password(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def hidden(self, password: str, text: str) -> None:
        assert password not in text
        assert quote(password, safe="") not in text
        for part in (part for letter in "/#@?" for part in password.split(letter)):
            assert len(part) < 5 or part not in text

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_by_the_function_that_shows_an_address(self, scheme: str) -> None:
        for password in passwords(100):
            for address in (f"{scheme}://me:{password}@127.0.0.1:9/x", f"{scheme}://me:{quote(password, safe='')}@h"):
                self.hidden(password, shown(address))
                self.hidden(password, without_credentials(f"it said: {address} is wrong"))
                self.hidden(password, without_credentials(repr(ValueError(address))))

    @pytest.mark.parametrize("encoded", [False, True])
    @pytest.mark.parametrize("place", ["tracking.uri", "storage.root", "storage.run", "base_model", "cluster.address"])
    def test_by_a_run(
        self, password: str, place: str, encoded: bool, instance_folder: Path, working_folder: Path
    ) -> None:
        address = f"http://me:{quote(password, safe='') if encoded else password}@127.0.0.1:9/x"
        (working_folder / "run.yaml").write_text(yaml.safe_dump(nested(place, address)))
        arguments = ["run", "run.yaml", "--images", str(instance_folder), "--class-noun", "dog"]
        result = CliRunner().invoke(main, [*arguments, "--dry-run"])
        assert result.exit_code == 2, result.output
        self.hidden(password, result.output)
        assert [path.name for path in working_folder.rglob("*") if path.is_file()] == ["run.yaml"]

    @pytest.mark.parametrize(
        "command", ["generate", "models", "serve", "evaluate", "gc", "batch", "jobs", "submit", "doctor"]
    )
    def test_by_other_commands(self, password: str, command: str) -> None:
        address = f"http://me:{password}@127.0.0.1:9/x"
        arguments = {
            "generate": ["generate", "a [V] dog", "--model", "models:/x@latest", "--tracking-uri", address],
            "models": ["models", "--tracking-uri", address],
            "serve": ["serve", "--model", "models:/x@latest", "--tracking-uri", address],
            "evaluate": ["evaluate", "--model", address, "--instance-images", "x"],
            "gc": ["gc", address],
            "batch": ["batch", f"{address}.yaml"],
            "jobs": ["jobs", "list", "--address", address],
            "submit": ["submit", "run", "--set", f"tracking.uri={address}"],
            "doctor": ["doctor", "--address", address],
        }[command]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, (result.output, result.exception)
        self.hidden(password, result.output)

    def test_by_the_settings_that_are_printed_and_tracked(self, password: str) -> None:
        settings = nested("tracking.uri", f"postgresql://me:{quote(password, safe='')}@db/mlflow")
        settings["subject"] = {
            "name": "rex",
            "class_noun": "dog",
            "instance_images": f"https://host/x.png?X-Amz-Signature={quote(password, safe='')}",
        }
        self.hidden(password, yaml.safe_dump(printable_settings(load_config(settings))))

    def test_by_a_name_that_is_taken_from_an_address(self, password: str) -> None:
        from pipelines.cli.batch import batch_name
        from pipelines.plan.subject_list import name_after

        quoted = quote(password, safe="")
        assert name_after(f"https://me:{quoted}@host/photos/Red-Dog?X-Amz-Signature={quoted}") == "red-dog"
        assert batch_name(f"https://me:{quoted}@host/My Dogs.csv?sig={quoted}") == "my-dogs"

    def test_by_what_refuses_a_job(self, password: str) -> None:
        with pytest.raises(InputError, match="holds a password") as refused:
            make_job("run", ["--set", f"tracking.uri=http://me:{password}@mlflow:5000"])
        self.hidden(password, str(refused.value))


def nested(place: str, value: str) -> dict[str, object]:
    group, _, name = place.partition(".")
    return {group: {name: value}} if name else {group: value}


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """What a test's parameter names: an address, or the fixture that serves one."""
    name = str(request.param)
    return str(request.getfixturevalue(name)) if name.isidentifier() else name
