"""A team's cluster, on this machine: `make cluster-demo`.

    python infra/ray/cluster_demo.py --folder output/cluster-demo

Starts MLflow with a password on Postgres and S3 (infra/services) and a Ray cluster of three nodes with a token; uploads
photographs of four subjects; submits them as a batch from outside the cluster; kills a node while two are in training;
lists the models and samples from one by way of the registry; stops everything. Exit code 0 means that nothing was lost.
The folder keeps the results; a second run starts anew beside them.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from local_nodes import Cluster, in_the_middle, kill_node, running_a_lane, started

from dreambooth.miniature import subject_dir
from pipelines.storage import files

SERVICES = Path(__file__).resolve().parents[1] / "services" / "services.py"
SUBJECTS = ("coral-car", "crimson-clock", "lime-car", "teal-bird")
STEPS, CHECKPOINT_EVERY = 120, 20
BEGAN = time.monotonic()


def main() -> int:
    """Run the demo, and stop everything at the end."""
    parser = argparse.ArgumentParser(description="A batch on a cluster on this machine, of which a node dies.")
    parser.add_argument("--folder", type=Path, default=Path("output/cluster-demo"))
    folder: Path = parser.parse_args().folder.absolute() / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    say(f"services: MLflow with a password, Postgres, S3; everything of this lies in {folder}")
    try:
        os.environ.update(start_services(folder))
        say(f"cluster: three nodes with a token and TLS; MLflow is at {os.environ['MLFLOW_TRACKING_URI']}")
        with started(folder, (0, 2, 2)) as cluster:
            say(f"the cluster is at {cluster.address}; whoever has no token gets {cluster.ask(None)}")
            return demonstrate(cluster, folder, f"s3://dreambooth/{folder.name}")
    finally:
        subprocess.run([sys.executable, SERVICES, "stop", "--folder", folder / "services"], check=False)
        say("stopped")


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    sys.stdout.write(f"[{time.monotonic() - BEGAN:4.0f} s] {text}\n")
    sys.stdout.flush()


def start_services(folder: Path) -> dict[str, str]:
    """Environment variables of MLflow and the store."""
    command = [sys.executable, SERVICES, "start", "--folder", folder / "services"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    exports = (line.removeprefix("export ").partition("=") for line in done.stdout.splitlines())
    return {name: value for name, separator, value in exports if separator}


def demonstrate(cluster: Cluster, folder: Path, place: str) -> int:
    """Submit, kill a node, wait, look."""
    results = f"{place}/results"
    table = write_table(folder, place)
    say(f"submitting {len(SUBJECTS)} subjects from outside")
    submit = [*cluster.command("submit", "batch", str(table)), "--set", f"storage.root={results}"]
    with subprocess.Popen(submit, cwd=folder, env=cluster.environment) as batch:
        while not (in_the_middle(results) and running_a_lane(cluster)):
            if batch.poll() is not None:
                say("the batch ended before a node could be killed")
                return 1
            time.sleep(1)
        say("a model is published and another subject is in training: killing a node")
        kill_node(running_a_lane(cluster)[0])
    if batch.returncode:
        say(f"the batch failed with {batch.returncode}")
        return 1
    say("the models, from MLflow on Postgres:")
    dreambooth(cluster, folder, "models")
    say("samples of one of them, its weights from the registry by way of S3:")
    model, prompt = f"models:/dreambooth-{SUBJECTS[0]}@latest", "a photo of [V] car on the beach"
    dreambooth(cluster, folder, "generate", prompt, "--model", model, "--output", str(folder / "samples"))
    say(f"nothing was lost; look at {folder / 'samples' / 'contact_sheet.png'}")
    return 0


def write_table(folder: Path, place: str) -> Path:
    """Write the subjects' table here and upload their photographs."""
    fs, root = files.filesystem(f"{place}/photographs")
    for name in SUBJECTS:
        for path in sorted(subject_dir(name).glob("*.png")):
            fs.put_file(str(path), f"{root}/{name}/{path.name}")
    settings = {
        "prior": {"num_class_images": 24},
        "train": {"max_train_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY},
        "evaluation": {"images_per_prompt": 1},
        "cluster": {"lanes": 2},  # so the remaining node has room for both
        "subjects": [
            {
                "name": name,
                "class_noun": name.rpartition("-")[2],
                "instance_images": f"{place}/photographs/{name}",
            }
            for name in SUBJECTS
        ],
    }
    table = folder / "subjects.yaml"
    table.write_text(yaml.safe_dump(settings))
    return table


def dreambooth(cluster: Cluster, folder: Path, *arguments: str) -> None:
    """Run a command as a user with these variables."""
    subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], check=True, cwd=folder, env=cluster.environment)


if __name__ == "__main__":
    sys.exit(main())
