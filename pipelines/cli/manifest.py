"""`dreambooth manifest`: print Kubernetes manifests for a run or a batch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.given import Real
from pipelines.cli.options import overrides_option

if TYPE_CHECKING:
    from pipelines.plan.run_plan import Plan


@click.command()
@click.argument("kind", type=click.Choice(["rayjob", "raycluster"]))
@click.argument("config")
@overrides_option
@click.option("--image", required=True, help="Image built from infra/docker/Dockerfile, where the cluster can pull it.")
@click.option("--namespace", default="dreambooth", show_default=True, help="Kubernetes namespace of the manifests.")
@click.option("--queue", default="dreambooth", show_default=True, help="LocalQueue of Kueue; '' for none.")
@click.option(
    "--retries",
    default=2,
    show_default=True,
    type=click.IntRange(0, 100),
    help="Retries of the job, each on a new cluster.",
)
@click.option("--deadline", default=24.0, show_default=True, type=Real(0.01, 8760), help="Deadline in hours.")
@click.option(
    "--gpus-per-node",
    default=8,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="GPUs of a node; a larger worker group takes several pods.",
)
def manifest(
    kind: str, config: str, overrides: tuple[str, ...], image: str, queue: str, deadline: float, **options: Any
) -> None:
    """Print KubeRay manifests for a run or a batch.

    They define a cluster of the planned size, and the job on it. CONFIG is the YAML of one run, or a batch's table; it
    is checked as by --dry-run, and the cluster must reach all its addresses. cluster.use_gpu 'auto' means GPUs here.
    Manifests contain no secrets: tracking and storage take theirs from infra/kubernetes. Usage: dreambooth manifest
    rayjob … | kubectl apply -f -
    """
    from pipelines.cli.batch import batch_name
    from pipelines.plan.manifests import Placement, ray_cluster, ray_job, to_yaml

    placement = Placement(image=image, queue=queue or None, deadline_seconds=round(deadline * 3600), **options)
    command, content, plans, lanes = _planned(config, overrides)
    name = _name(config, plans)
    if kind == "raycluster":
        manifests = [ray_cluster(name, plans, lanes=lanes, placement=placement)]
    else:
        sets = [word for override in overrides for word in ("--set", override)]
        # A batch is named after its table; Kubernetes allows few characters in file names.
        file = "run.yaml" if command == "run" else f"{batch_name(config)}{Path(config).suffix.lower()}"
        files = {} if content is None else {file: content}
        words = [command, config if content is None else file, *sets]
        manifests = ray_job(name, words, files, plans, lanes=lanes, placement=placement)
    click.echo(to_yaml(manifests), nl=False)


def _planned(config: str, overrides: tuple[str, ...]) -> "tuple[str, str | None, tuple[Plan, ...], int]":
    """(command, the file's content unless the cluster reads it itself, plans, lanes)."""
    from dreambooth.config.settings import load_config
    from dreambooth.config.text_files import decode_text
    from dreambooth.errors import InputError
    from dreambooth.reach import prove_store
    from pipelines.cluster.ray_cluster import Resources
    from pipelines.plan.run_plan import make_plan
    from pipelines.plan.subject_checks import check_subjects, valid_plans
    from pipelines.plan.subject_list import read_batch
    from pipelines.storage.files import filesystem, is_local, read_bytes

    anything = Resources(cpus=1 << 20, gpus=1 << 20)
    if is_local(config) and Path(config).is_dir():
        raise InputError(f"{config} is a folder of this machine; put it where the cluster reads it (s3://…)")
    prove_store(config, what=f"can't read {config!r}")
    fs, path = filesystem(config)
    if not fs.isfile(path):
        raise InputError(f"there is nothing at {config!r}; expected the YAML of a run, or a batch's table")
    content = decode_text(read_bytes(config), config)
    if is_local(config) and _is_run(config, content):
        plans: tuple[Plan, ...] = (make_plan(load_config(Path(config), overrides), anything),)
        command, lanes = "run", 1
    else:
        plans = valid_plans(check_subjects(read_batch(config, overrides), anything), skip_invalid=False)
        command, lanes = "batch", _lanes(plans)
    for plan in plans:
        _check_reachable(plan)
    return command, content if is_local(config) else None, plans, lanes


def _is_run(config: str, content: str) -> bool:
    from dreambooth.config.strict_yaml import NotYaml, parse_yaml

    if not config.lower().endswith((".yaml", ".yml")):
        return False
    try:
        settings = parse_yaml(content, config)
    except NotYaml:
        return True  # the next reader reports the fault
    return isinstance(settings, dict) and "subjects" not in settings


def _lanes(plans: "tuple[Plan, ...]") -> int:
    from dreambooth.amounts import counted
    from dreambooth.errors import InputError

    lanes = plans[0].config.cluster.lanes
    if lanes is None:
        raise InputError(
            f"cluster.lanes is not set, but decides how large the cluster is; give, for example, --set cluster.lanes="
            f"{min(4, len(plans))} for {counted(len(plans), 'subject')}"
        )
    return min(lanes, len(plans))


def _check_reachable(plan: "Plan") -> None:
    """Raise InputError for addresses local to this machine and for passwords in addresses."""
    from dreambooth.config.addresses import shown
    from dreambooth.errors import InputError
    from pipelines.plan.local_addresses import local_addresses

    if local := local_addresses(plan.config):
        raise InputError(
            f"{plan.config.subject.name}: {local[0]} is a path of this machine, which pods don't see; expected an "
            f"address such as s3://bucket/folder"
        )
    if (uri := plan.config.tracking.uri) is not None and shown(uri) != uri:
        raise InputError(
            f"tracking.uri {shown(uri)} holds a password, which a manifest would show; leave it out and set "
            f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the secret dreambooth-credentials"
        )


def _name(config: str, plans: "tuple[Plan, ...]") -> str:
    """Job name with a key: other settings of the same subjects are another job."""
    from dreambooth.config.settings import config_hash
    from pipelines.cli.batch import batch_name

    key = config_hash(*sorted(plan.key for plan in plans))[:8]
    return f"{plans[0].config.subject.name if len(plans) == 1 else batch_name(config)}-{key}"
