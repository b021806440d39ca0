"""The service's description of its API as a page: made of its OpenAPI, without anything fetched from elsewhere."""

import json
from collections.abc import Mapping
from typing import Any

from pipelines.report.pages import Table, cell, render

_MEANINGS = {
    "404": "no such subject",
    "422": "a wrong request",
    "429": "too many wait",
    "503": "the subject can't be loaded",
}


def describe_api(openapi: Mapping[str, Any], example: Mapping[str, Any]) -> str:
    """The page as HTML; `example` is the body of the example request."""
    operations = [
        _operation(openapi, path, method, operation, example)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    about = openapi["info"]
    return render(
        "api.html", title=f"{about['title']}: the API", description=about["description"], operations=operations
    )


def _operation(
    openapi: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any], example: Mapping[str, Any]
) -> dict[str, Any]:
    asked = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    given = operation["responses"]["200"]["content"]["application/json"]["schema"]
    refusals = [f"{status}: {_MEANINGS[status]}" for status in operation["responses"] if status in _MEANINGS]
    body = json.dumps(example)
    return {
        "path": path,
        "method": method.upper(),
        "summary": operation["summary"],
        "answers": "; ".join(["200", *refusals]),
        "asked": _fields(path, "request", asked, openapi) if asked else None,
        "given": _fields(path, "answer", given, openapi),
        "example": f"curl ADDRESS{path} -H 'Content-Type: application/json' -d '{body}'",
    }


def _fields(path: str, of: str, schema: Mapping[str, Any], openapi: Mapping[str, Any]) -> Table | None:
    schema = _resolved(schema.get("items", schema), openapi)
    if "properties" not in schema:
        return None
    required = schema.get("required", ())
    rows = [
        [
            cell(name),
            cell(_kind(field)),
            cell("required" if name in required else str(_default(field))),
            cell(field.get("description", ""), kind="why"),
        ]
        for name, field in schema["properties"].items()
    ]
    columns = (f"field of the {of}", "type", "default", "meaning")
    return Table(title=f"Fields of the {of}: {path}", columns=columns, rows=rows)


def _resolved(schema: Mapping[str, Any], openapi: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = openapi["components"]["schemas"][name] if name else schema
    return found


def _default(field: Mapping[str, Any]) -> Any:
    default = field.get("default")
    return "the model's own" if default is None else default


def _kind(field: Mapping[str, Any]) -> str:
    one = next((each for each in field.get("anyOf", [field]) if each.get("type") != "null"), field)
    kind = f"{one.get('items', {}).get('type', '')} {one['type']}".strip() if "type" in one else ""
    least, most = one.get("minimum", one.get("minLength")), one.get("maximum", one.get("maxLength"))
    if most is None:
        return kind
    lengths = " characters" if kind == "string" else ""
    return f"{kind}, {f'{least:.0f} to' if least is not None else 'up to'} {most:.0f}{lengths}"
