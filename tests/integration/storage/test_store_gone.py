"""The store goes away for good in the middle: every command ends within minutes, and goes on when it is back."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import subject_dir
from pipelines.storage import files, publications
from tests.integration.faulty_store import faulty_proxy

LONGEST_SECONDS = 180
MOMENTS = {
    "class images": r"PUT .*/prior/.*\.png",
    "checkpoint": r"PUT .*/checkpoints/.*/step-00000004-.*/manifest\.json",
    "publication": r"PUT .*/model/.*/unet/",
    "registration": r"PUT .*/results/[^/]+/summary\.json",
}


class Store:
    """A proxy before the store, which hangs up on everybody from the first call that looks like `until` on."""

    def __init__(self) -> None:
        self.until = "nothing"
        self.gone_since: float | None = None

    def seen(self, call: str) -> None:
        if self.gone_since is None and re.match(self.until, call):
            self.gone_since = time.monotonic()

    def fate(self) -> str:
        return "passes" if self.gone_since is None else "gone"


@pytest.fixture
def store(object_store: Any, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    upstream = urlsplit(object_store.environment["AWS_ENDPOINT_URL_S3"]).netloc
    with faulty_proxy(upstream, store.fate, seen=store.seen) as address:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, address)
        yield store


def command(kind: str, config: DreamBoothConfig, s3: str, folder: Path) -> list[str]:
    """`dreambooth run` or `batch` of one subject, whose results lie in the store."""
    settings = {
        "base_model": config.base_model,
        "prior": {"num_class_images": 8, "num_inference_steps": 2, "batch_size": 4},
        "train": {"max_train_steps": 8, "checkpoint_every": 4, "learning_rate": 1e-3},
        "evaluation": {"enabled": False},
        "storage": {"root": f"{s3}/results"},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "cluster": {"lanes": 1},
    }
    subject = {"name": "coral-car", "class_noun": "car", "instance_images": str(subject_dir("coral-car"))}
    start = [sys.executable, "-m", "pipelines.cli", kind]
    if kind == "batch":
        table = folder / "pets.yaml"
        table.write_text(yaml.safe_dump(settings | {"subjects": [subject]}))
        return [*start, str(table)]
    given = folder / "run.yaml"
    given.write_text(yaml.safe_dump(settings | {"subject": subject | {"identifier": "tfz"}}))
    return [*start, str(given)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "batch"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_store_that_goes_for_good_ends_the_command_and_the_same_goes_on(
    kind: str, moment: str, store: Store, s3: str, make_config: Any, tmp_path: Path
) -> None:
    store.until = MOMENTS[moment]
    given = command(kind, make_config(), s3, tmp_path)
    first = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1500)
    assert store.gone_since is not None, first.stderr
    seconds = time.monotonic() - store.gone_since
    print(f"\n{kind}, {moment}: {seconds:.0f} s, exit code {first.returncode}\n{first.stdout}\n{first.stderr}")
    assert first.returncode == 1, first.stderr
    assert seconds < LONGEST_SECONDS
    assert "Traceback" not in first.stderr
    [said] = [line for line in first.stderr.splitlines() if line.startswith("failed: ")]
    assert s3.split("/")[2] in said
    assert "run the same command again" in said

    store.until, store.gone_since = "nothing", None
    again = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert again.returncode == 0, again.stderr
    assert publications.published(f"{s3}/results/coral-car/model") is not None
    assert files.read_json(f"{s3}/results/coral-car/summary.json")["version"] == 1
