"""What a release says of itself in several places is the same in all of them."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

from dreambooth import __version__

ROOT = Path(__file__).parents[2]


def test_one_version() -> None:
    released = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text())
    assert released[0] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_changelog_keeps_to_its_form() -> None:
    titles = re.findall(r"(?m)^(##+) (.+)$", (ROOT / "CHANGELOG.md").read_text())
    assert titles[0] == ("##", "[Unreleased]")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {title for level, title in titles if level == "###"} <= kinds


def test_the_workflow_runs_what_is_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert "bash .ci/run" in commands
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text()))
    assert {made for command in commands for made in re.findall(r"\bmake ([a-z-]+)", command)} <= targets
    assert all((ROOT / path).is_file() for command in commands for path in re.findall(r"tests/\S+\.py", command))


def imported(package: str) -> set[str]:
    """Top-level names that a package's modules import, wherever in them."""
    found: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def distribution(requirement: str) -> str:
    """The normalized name of a requirement such as `ray[default]>=2.60`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ;]", requirement)[0]).lower()


def test_what_the_packages_import_is_declared() -> None:
    """No dependency comes by chance, as another one's: a wheel brings what the code imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [one for extra in ("serve", "low-memory") for one in project["optional-dependencies"][extra]]
    declared = {distribution(one) for one in [*project["dependencies"], *optional]}
    names = (
        (imported("dreambooth") | imported("pipelines")) - set(sys.stdlib_module_names) - {"dreambooth", "pipelines"}
    )
    installed = packages_distributions()
    assert {"torch", "ray", "yaml", "PIL"} <= names
    undeclared = [name for name in names if not declared & {distribution(one) for one in installed.get(name, [name])}]
    assert sorted(undeclared) == []


def test_pythons_that_are_resolved_begin_with_the_oldest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    pythons = workflow["jobs"]["resolve"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"


def test_forms_for_issues_have_what_github_asks_for() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"].get("label") for field in fields)
