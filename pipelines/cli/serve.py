"""`dreambooth serve`: serve many subjects at one address."""

import importlib.util
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import click

from dreambooth.errors import InputError
from pipelines.apps.page_policy import LOOPBACK_HOSTS
from pipelines.cli.options import address_option, graph_option, tracking_uri_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.apps.serve.subjects import ServedSubject


@click.command()
@click.option("--model", required=True, help="Models: models:/NAME@ALIAS or models:/NAME/VERSION; NAME may hold *.")
@click.option(
    "--base-shared/--no-base-shared",
    default=True,
    show_default=True,
    help="Share one loaded base and load only the trained weights of a subject; else load whole models.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all networks.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option(
    "--replicas", default=1, show_default=True, type=click.IntRange(1, 1000), help="Number of samplers, one GPU each."
)
@click.option(
    "--subjects-loaded",
    default=4,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Subjects kept in memory per replica.",
)
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1, 1024), help="Requests sampled together.")
@click.option(
    "--queue",
    default=32,
    show_default=True,
    type=click.IntRange(0, 1_000_000),
    help="Requests to queue before answering 429.",
)
@graph_option
@address_option
@tracking_uri_option
def serve(model: str, host: str, port: int, address: str | None, tracking_uri: str | None, **limits: Any) -> None:
    """Serve image generation for registered models over HTTP.

    A page for trying it is at /, the API's description at /docs.
    """
    from dreambooth.config.settings import ClusterConfig
    from pipelines.apps.serve.subjects import find_subjects
    from pipelines.cluster.ray_cluster import ray_cluster
    from pipelines.tracking.client import resolve_tracking_uri

    if importlib.util.find_spec("grpc_reflection") is None:  # a dependency of ray[serve] alone
        raise InputError("Ray Serve is not fully installed; run: pip install 'ray[serve]'")
    uri = resolve_tracking_uri(tracking_uri)
    subjects = find_subjects(model, uri)
    for subject in subjects:
        click.echo(f"{subject.name:<24} {subject.class_noun:<12} {subject.identifier:<8} {subject.address}")
    _check_free(host, port)
    with ray_cluster(ClusterConfig(address=address)) as resources:
        _run(subjects, uri, host, port, use_gpu=resources.gpus > 0, **limits)


def _run(
    subjects: "Sequence[ServedSubject]", tracking_uri: str, host: str, port: int, *, use_gpu: bool, **limits: Any
) -> None:
    from ray import serve as ray_serve

    from pipelines.apps.serve.app import ServeSettings, application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = ServeSettings(use_gpu=use_gpu, loopback=host in LOOPBACK_HOSTS, **limits)
    ray_serve.start(http_options={"host": host, "port": port})
    try:
        ray_serve.run(application(subjects, tracking_uri, settings), name="dreambooth", route_prefix="/")
        click.echo(
            f"open http://{host}:{port}/ in a browser; http://{host}:{port}/docs describes the API; Ctrl-C ends it"
        )
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        click.echo("\nstopped")
    finally:
        ray_serve.delete("dreambooth")


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise InputError(f"can't listen on {host}:{port} ({error.strerror}); give another --port or --host") from None
