"""`dreambooth doctor`: check that a run would work, here or on a cluster, with a cure for each fault."""

import sys
from pathlib import Path
from typing import Any

import click

from pipelines.cli.options import overrides_option

_SIGNS = {"ok": "ok", "warning": "warning", "failure": "FAILURE"}


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--address", help="Ray cluster to check: 'auto' on one of its nodes; default: this machine.")
@overrides_option
def doctor(config: Path | None, address: str | None, overrides: tuple[str, ...]) -> None:
    """Check that a run would work, here or on a cluster.

    Every node, the storage, the tracking server and the base model are checked. CONFIG is the YAML of a run; only its
    storage, tracking, cluster and base model are used. Exit code 0: no faults, 1: faults.
    """
    from rich.console import Console
    from rich.table import Table

    from pipelines.cluster.machine import faults
    from pipelines.cluster.ray_cluster import ray_cluster
    from pipelines.plan.doctor import examine, judge_machines

    settings = _settings(config, address, overrides)
    findings = [judge_machines({"here": faults()})]
    # If Ray can't be started, only checks without it are possible.
    if settings.cluster.address is not None or findings[0].state != "failure":
        with ray_cluster(settings.cluster):
            findings = examine(settings)
    table = Table("check", "state", "found", "what to do", box=None)
    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    for finding in findings:
        state = f"[{colours[finding.state]}]{_SIGNS[finding.state]}[/]"
        table.add_row(finding.check, state, _plain(finding.found), _plain(finding.cure))
    Console().print(table)
    sys.exit(1 if any(finding.state == "failure" for finding in findings) else 0)


def _settings(config: Path | None, address: str | None, overrides: tuple[str, ...]) -> Any:
    from dreambooth.config.overrides import merge, read_yaml
    from dreambooth.config.settings import load_config
    from dreambooth.errors import InputError

    if address is not None and address.startswith(("http://", "https://")):
        raise InputError(
            f"--address is {address!r}, a dashboard's; the doctor joins the cluster itself: run it on a node with "
            f"--address auto, or as a job: ray job submit --address {address} -- dreambooth doctor --address auto"
        )
    # No subject is checked, but a configuration needs one.
    nobody = {"subject": {"name": "nobody", "class_noun": "thing", "instance_images": "none"}}
    settings = merge(nobody, read_yaml(config) if config is not None else {})
    if address is not None:
        settings = merge(settings, {"cluster": {"address": address}})
    return load_config(settings, overrides)


def _plain(text: str) -> str:
    """Escape brackets of addresses and messages, which aren't markup."""
    from rich.markup import escape

    from dreambooth.config.addresses import without_credentials

    return escape(without_credentials(text))
