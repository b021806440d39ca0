"""`dreambooth batch --dry-run`: one table of what is wrong with whom, then the plan, and nothing is written."""

import io
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from pipelines.cli import main


def png(seed: int, size: tuple[int, int] = (80, 80)) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tiny_pipeline: Path, mlflow_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folders of pictures and a table of subjects, one for every kind of trouble, in memory."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)
    fs = fsspec.filesystem("memory")
    for path in fs.ls("/", detail=False):  # of other tests: it is one for the whole process
        fs.rm(path, recursive=True)
    for number, name in enumerate(("good", "plural", "few", "broken", "small", "mixed", "twice", "alike")):
        for index in range(2 if name == "few" else 4):
            fs.pipe_file(f"/photos/{name}/{index}.png", png(10 * number + index))
    fs.pipe_file("/photos/broken/3.png", b"no picture")
    fs.pipe_file("/photos/small/3.png", png(97, (20, 20)))
    fs.pipe_file("/photos/mixed/3.png", png(98, (100, 80)))
    fs.pipe_file("/photos/alike/3.png", fs.cat_file("/photos/alike/0.png"))
    common = {"base_model": str(tiny_pipeline), "storage": {"root": "memory://results"}}
    rows = [{"name": name, "instance_images": name} for name in ("good", "few", "broken", "small", "mixed", "alike")]
    rows += [{"name": "Good", "instance_images": "good"}]
    rows += [{"name": f"twice-{i}", "instance_images": "twice", "identifier": "sks"} for i in range(2)]
    rows += [{"name": "a-list", "instance_images": [f"plural/{i}.png" for i in range(3)]}]
    rows += [{"name": "a-glob", "instance_images": "plural/*.png"}]
    rows += [{"name": "rare", "instance_images": "memory://photos/plural/[012].png", "identifier": "photo"}]
    rows += [{"name": "typo", "instance_images": "plural", "train.max_steps": 3}]
    rows += [{"name": "gone", "instance_images": "nowhere"}]
    rows += [{"name": "odd", "instance_images": "plural", "class_noun": "qzxwv"}]
    rows = [{"class_noun": "dog"} | row for row in rows]
    fs.pipe_file("/photos/pets.yaml", yaml.safe_dump(common | {"subjects": rows}).encode())
    return "memory://photos/pets.yaml"


def dry_run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["batch", *arguments, "--dry-run"])


def row_of(table: str, name: str) -> str:
    """A subject's row of the table, with the lines that it goes on in."""
    lines = iter(table.splitlines())
    found = next(line for line in lines if line.split() and line.split()[0] == name)
    rest = []
    for line in lines:
        if not line.startswith("  "):
            break
        rest.append(line.strip())
    return " ".join([" ".join(found.split()), *rest])


def test_one_table_says_what_is_wrong_with_whom(photos: str) -> None:
    result = dry_run(photos)
    assert result.exit_code == 2
    said = result.stderr
    assert "15 subjects checked: 8 with errors, 5 with warnings" in said
    errors = {
        "good": "the name 'good' is taken 2 times",
        "Good": "a subject name becomes part of paths and model names",
        "broken": "3.png is no JPEG, PNG, WebP, AVIF",
        "small": "3.png is 20 x 20 pixels",
        "twice-0": "the identifier 'sks' is taken 2 times",
        "twice-1": "the identifier 'sks' is taken 2 times",
        "typo": "unknown setting train.max_steps; did you mean train.max_train_steps?",
        "gone": "there is nothing at memory://photos/nowhere",
    }
    warnings = {
        "few": "2 instance images; the method is made for three to five",
        "mixed": "images of 2 sizes, from 80x80 to 100x80",
        "alike": "0.png and 3.png are the same picture",
        "rare": "with a meaning for the base model",
        "odd": "no word of its own for the class noun 'qzxwv'",
    }
    for kind, expected in (("error: ", errors), ("warning: ", warnings)):
        for name, message in expected.items():
            assert kind in row_of(said, name), (name, said)
            assert message in row_of(said, name), (name, said)
    assert "8 of 15 subjects can't be trained (good, broken, small, Good, twice-0, …)" in said
    assert "--skip-invalid" in said
    assert not fsspec.filesystem("memory").find("/results")


def test_the_others_go_on_and_the_plan_follows(photos: str) -> None:
    result = dry_run(photos, "--skip-invalid", "--set", "prior.num_class_images=6")
    assert result.exit_code == 0, result.output
    assert "pets: 7 subjects of 2 classes" in result.stderr
    assert "2 sets, 12 images to make" in result.stderr
    assert "of tensors a worker" in result.stderr
    assert re.search(r"time +not known before a first result of this base model", result.stderr)
    assert not fsspec.filesystem("memory").find("/results")


def test_a_small_batch_without_fault_is_listed_too(photos: str) -> None:
    fs = fsspec.filesystem("memory")
    table = yaml.safe_load(fs.cat_file("/photos/pets.yaml"))
    rows = [row for row in table["subjects"] if row["name"] == "a-list"]
    fs.pipe_file("/photos/one.yaml", yaml.safe_dump(table | {"subjects": rows}).encode())
    result = dry_run("memory://photos/one.yaml")
    assert result.exit_code == 0, result.output
    assert row_of(result.stderr, "a-list").endswith("3 ready")
    assert "ready" not in dry_run("memory://photos/one.yaml", "--quiet").output


def test_a_machine_without_room_for_one_lane_says_what_it_has_and_what_is_needed(photos: str) -> None:
    result = dry_run(photos, "--set", "cluster.num_workers=5000", "--set", "cluster.cpus_per_worker=2")
    assert result.exit_code == 2
    assert "cluster.num_workers is 5000, which takes 10,000 CPUs and 0 GPUs, but the cluster has" in result.stderr
    assert "subjects checked" not in result.stderr
