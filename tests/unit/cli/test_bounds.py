"""Every number has two ends: all settings of the schema, and all options of the command line, whichever come."""

from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dreambooth.config.limits import LARGEST_SEED
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.errors import InputError
from pipelines.apps.generate import generate
from pipelines.cli import main

OF_A_SETTING = {("run", "--steps"), ("run", "--workers"), ("run", "--zero-stage")}
"""Options that hand their number on to a setting."""


def numbers(schema: dict[str, Any], groups: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, JSON schema) of every setting that takes a number."""
    for name, field in schema["properties"].items():
        if "$ref" in field:
            yield from numbers(groups[field["$ref"].rpartition("/")[2]], groups, f"{prefix}{name}.")
        for choice in field.get("anyOf", [field]):
            if choice.get("type") in ("integer", "number") and "enum" not in choice:
                yield prefix + name, choice | field


SCHEMA = DreamBoothConfig.model_json_schema()
SETTINGS = dict(numbers(SCHEMA, SCHEMA["$defs"]))


def options(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from options(inner, (*path, name))
    for option in command.params:
        if isinstance(option, click.Option) and isinstance(
            option.type, click.types.IntParamType | click.types.FloatParamType
        ):
            yield path, option


OPTIONS = [(path, option) for path, option in options(main) if (path[0], option.opts[0]) not in OF_A_SETTING]


def test_there_are_some() -> None:
    assert {"train.learning_rate", "images.resolution", "train.ema_decay", "gate.pres_limit"} <= set(SETTINGS)
    assert len(SETTINGS) > 40
    assert len(OPTIONS) > 15


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_has_both_ends(name: str) -> None:
    schema = SETTINGS[name]
    choices = [schema, *schema.get("anyOf", [])]
    for end in ("inimum", "aximum"):
        assert any(f"{start}{end}" in choice for choice in choices for start in ("m", "M", "exclusiveM")), (
            name,
            schema,
        )


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_refuses_what_is_far_out(name: str) -> None:
    run = ("run", "--images", "photos", "--class-noun", "dog", "--dry-run", "--set")
    for value in ("1" + "0" * 30, "-1" + "0" * 30, "-1e30", ".nan", "nan", ".inf", "true"):
        assert refused(*run, f"{name}={value}").startswith(f"{name}: "), value


@pytest.mark.parametrize(
    ("path", "option"), OPTIONS, ids=lambda part: "-".join(part) if isinstance(part, tuple) else part.opts[0]
)
def test_an_option_has_both_ends(path: tuple[str, ...], option: click.Option) -> None:
    kind = option.type
    assert isinstance(kind, click.IntRange | click.FloatRange), "give it a range"
    assert kind.min is not None
    assert kind.max is not None
    for value in (f"1{'0' * 30}", f"-1{'0' * 30}", "nan", "inf"):
        assert f"Invalid value for '{option.opts[0]}'" in refused(*path, option.opts[0], value)


@pytest.mark.parametrize("value", ["1" + "0" * 30, "-1" + "0" * 30])
@pytest.mark.parametrize(
    ("flag", "name"),
    [("--steps", "train.max_train_steps"), ("--workers", "cluster.num_workers"), ("--zero-stage", "zero.stage")],
)
def test_an_option_of_a_setting_has_the_settings_ends(flag: str, name: str, value: str) -> None:
    assert refused("run", "--images", "photos", "--class-noun", "dog", "--dry-run", flag, value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": LARGEST_SEED}, f"seed is {LARGEST_SEED}; expected one that 4 images can count up from"),
        ({"seed": LARGEST_SEED + 1}, f"seed is {LARGEST_SEED + 1}; expected 0 to "),
        ({"height": 100}, "height is 100; expected a multiple of 8"),
        ({"width": 8192}, "width is 8192; expected 8 to 4096"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected 1 to "),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001; expected 1 to 1000"),
    ],
)
def test_pictures_that_cannot_be_drawn(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        generate("nowhere", "a dog", **settings)
    assert str(caught.value).startswith(message)
