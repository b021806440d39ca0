"""All settings as a Markdown page, made from the configuration's classes."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from dreambooth.config.explain import in_yaml
from dreambooth.config.miniatures import other_defaults
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.models.families import FAMILIES

_HEAD = f"""# Settings

Given in a YAML file, or one by one with `--set group.name=value`; in a table of subjects also for one subject alone.
Defaults are for {FAMILIES[0].name}; where a built-in base model has another one, it stands behind it. This page
is made by `dreambooth settings --markdown`.
"""


def settings_page() -> str:
    """Render a table per group of settings, in Markdown."""
    groups = {name: field.annotation for name, field in DreamBoothConfig.model_fields.items()}
    nested = {name: model for name, model in groups.items() if isinstance(model, type) and issubclass(model, BaseModel)}
    parts = [_HEAD, *_group("", DreamBoothConfig, "A run", leave_out=nested)]
    for name, model in nested.items():
        parts += _group(f"{name}.", model, name)
    return "\n".join(parts)


def _group(prefix: str, model: type[BaseModel], title: str, *, leave_out: Any = ()) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{(model.__doc__ or '').strip().partition(chr(10))[0]}\n"
    yield "| setting | default | meaning |\n|---|---|---|"
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        key = field.alias or name
        default = "*required*" if field.is_required() else _shown(field.default)
        for value, bases in other_defaults(f"{prefix}{key}", field.default, _shown).items():
            default += f"; {', '.join(bases)}: {value}"
        yield f"| `{prefix}{key}` | {default} | {_meaning(field.description or '', _choices(field.annotation))} |"
    yield ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "<br>".join(_shown(each) for each in value)
    return f"`{in_yaml(value)}`"


def _choices(annotation: Any) -> list[Any]:
    """The possible values of a setting with a list of choices."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _meaning(description: str, choices: list[Any]) -> str:
    shown = ", ".join(f"`{choice}`" for choice in choices)
    text = description.replace("|", "\\|")
    return f"{text} ({shown})" if shown else text
