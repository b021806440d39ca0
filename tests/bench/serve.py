"""What does `dreambooth serve` carry? Requests over three subjects of the miniature, 1, 5 and 20 at a time.

    python tests/bench/serve.py

Real: the registry, Ray Serve with its settings by default, HTTP on this machine. The subjects are the miniature's own
weights, moved a little: how long a picture takes doesn't depend on what it shows. Every request is one picture at the
model's own settings (64 px, 12 steps, guidance 4), the subjects take turns, and a first round only loads them. The same
with one subject. Requests are sampled together, so pictures per second rise with requests at once. Figures go to
output/bench/serve.json.
"""

import argparse
import json
import shutil
import socket
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from stamps import Figures, stamp, stamped, together

from dreambooth.config.settings import ClusterConfig, TrackingConfig
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.served import served_facts
from dreambooth.quiet import quiet
from pipelines.apps.serve.app import ServeSettings, application
from pipelines.apps.serve.subjects import find_subjects
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.tracking.registry import register
from pipelines.tracking.runs import check_tracking, track

OUTPUT = Path("output/bench/serve.json")
SUBJECTS = {"rex": "zqx", "mug": "tfz", "bag": "tqp"}
AT_ONCE = (1, 5, 20)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def register_subjects(folder: Path) -> str:
    """A registry with a model a subject; returns its address."""
    base = resolve_base_model("miniature")
    uri = check_tracking(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"))
    for number, (name, identifier) in enumerate(SUBJECTS.items()):
        directory = Path(shutil.copytree(base.directory, folder / name))
        weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
        noise = torch.Generator().manual_seed(number)
        moved = {
            key: value + 0.01 * value.std() * torch.randn(value.shape, generator=noise)
            for key, value in load_file(weights).items()
        }
        save_file(moved, weights, {"format": "pt"})
        with track(TrackingConfig(uri=uri), run_name=name) as run:
            register(
                run_id=run.run_id,
                tracking_uri=uri,
                model=directory,
                name=f"dreambooth-{name}",
                tags={"base_model": "miniature", "base_hash": base.hash},
                identifier=identifier,
                class_noun="dog",
                result_key=name,
                served=served_facts(base.settings),
                num_inference_steps=12,
                guidance_scale=4.0,
            )
    return uri


def ask(address: str, subject: str, seed: int) -> float:
    """Seconds that one picture takes; raises for any status but 200."""
    body = json.dumps({"subject": subject, "prompt": "a photo of [V] dog on the beach", "seed": seed}).encode()
    began = time.perf_counter()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=300) as answer:
        answer.read()
    return time.perf_counter() - began


def carried(address: str, subjects: Sequence[str], at_once: int, requests: int) -> dict[str, float]:
    """Requests per second, and the latency that half and 95 of 100 of them have at most."""
    with ThreadPoolExecutor(at_once) as pool:
        began = time.perf_counter()
        seconds = list(pool.map(lambda turn: ask(address, subjects[turn % len(subjects)], turn), range(requests)))
        took = time.perf_counter() - began
    return {
        "requests": requests,
        "requests_per_s": round(requests / took, 2),
        "p50_s": round(statistics.median(seconds), 2),
        "p95_s": round(sorted(seconds)[int(0.95 * (requests - 1))], 2),
    }


def main() -> None:
    """Write the figures as JSON, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--base-shared", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    quiet()
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder, ray_cluster(ClusterConfig()):
        uri = register_subjects(Path(folder))
        settings = ServeSettings(
            base_shared=arguments.base_shared,
            replicas=1,
            subjects_loaded=4,
            batch=8,
            queue=32,
            use_gpu=torch.cuda.is_available(),
            loopback=True,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(find_subjects("models:/dreambooth-*@latest", uri), uri, settings), name="bench")
        address = f"http://127.0.0.1:{port}/generate"
        at = stamp()
        parts: list[Figures] = [stamped({"first_s": {name: round(ask(address, name, 0), 2) for name in SUBJECTS}}, at)]
        for what, subjects in {"three subjects": list(SUBJECTS), "one subject": ["rex"]}.items():
            for at_once in AT_ONCE:
                at = stamp()
                measured = carried(address, subjects, at_once, arguments.requests)
                parts.append(stamped({f"{what}, {at_once} at once": measured}, at))
        serve.shutdown()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(together(*parts), indent=2) + "\n")
    print(OUTPUT.read_text())


if __name__ == "__main__":
    main()
