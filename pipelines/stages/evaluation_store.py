"""Store an evaluation for the driver: a publication of PNGs and a JSON."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from dreambooth.evaluation.verdict import ShortVerdict, Similarity
from pipelines.stages.photographs import Evaluation
from pipelines.storage.files import join
from pipelines.storage.publications import opened, publish, published

INDEX = "evaluation.json"


def store_evaluation(evaluation: Evaluation, run_uri: str, key: str) -> None:
    """Publish samples and similarities below a run's folder."""
    with tempfile.TemporaryDirectory(prefix="dreambooth-evaluation-") as folder:
        root = Path(folder)
        names: dict[str, dict[str, list[str]]] = {"before": {}, "after": {}}
        for side, pictures in (("before", evaluation.before), ("after", evaluation.after)):
            for number, (prompt, images) in enumerate(pictures.items()):
                names[side][prompt] = [
                    _write(root, f"{side}-{number}-{i}.png", image) for i, image in enumerate(images)
                ]
        index = names | {
            "instance": [_write(root, f"instance-{i}.png", image) for i, image in enumerate(evaluation.instance)],
            "class_prompt": evaluation.class_prompt,
            "similarity": asdict(evaluation.similarity) if evaluation.similarity else None,
            "verdict": evaluation.verdict.as_dict() if evaluation.verdict else None,
        }
        (root / INDEX).write_text(json.dumps(index))
        publish(root, join(run_uri, "evaluation"), metadata={"key": key})


def load_evaluation(run_uri: str, key: str) -> Evaluation | None:
    """The evaluation that `store_evaluation` published for a key, or None."""
    manifest = published(join(run_uri, "evaluation"))
    if manifest is None or manifest.metadata.get("key") != key:
        return None
    with opened(manifest) as root:
        index = json.loads((root / INDEX).read_text())
        sides = {
            side: {prompt: [(root / name).read_bytes() for name in names] for prompt, names in index[side].items()}
            for side in ("before", "after")
        }
        return Evaluation(
            instance=tuple((root / name).read_bytes() for name in index["instance"]),
            before=sides["before"],
            after=sides["after"],
            class_prompt=index["class_prompt"],
            similarity=Similarity(**index["similarity"]) if index["similarity"] else None,
            verdict=ShortVerdict.from_dict(index["verdict"]) if index.get("verdict") else None,
        )


def _write(root: Path, name: str, image: bytes) -> str:
    (root / name).write_bytes(image)
    return name
