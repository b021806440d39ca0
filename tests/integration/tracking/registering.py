"""Register a model, and compare its pictures."""

import urllib.request
from pathlib import Path

import plain_mlflow
from PIL import Image, ImageChops
from served import facts_of

from dreambooth.config.settings import TrackingConfig
from pipelines.tracking.registry import RegisteredVersion, register
from pipelines.tracking.runs import track

STEPS = 2


def register_model(
    tracking_uri: str,
    directory: Path,
    *,
    base: Path | None = None,
    name: str = "dreambooth-rex",
    result_key: str,
    description: str | None = None,
) -> RegisteredVersion:
    with track(TrackingConfig(uri=tracking_uri), run_name="rex") as run:
        return register(
            run_id=run.run_id,
            tracking_uri=tracking_uri,
            model=directory,
            name=name,
            tags={"base_model": "miniature", "git_commit": "abc123", "max_train_steps": 200},
            identifier="zqx",
            class_noun="dog",
            result_key=result_key,
            served=facts_of(base or directory),
            description=description,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
        )


def differ(one: Image.Image, other: Image.Image, *, by_more_than: int = 0) -> bool:
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return max(highest for _, highest in difference.getextrema()) > by_more_than


def picture_at(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


SERVE = (
    plain_mlflow.ALONE
    + """
model = mlflow.pyfunc.load_model("models:/dreambooth-rex@latest")
prompts = pandas.DataFrame({"prompt": [sys.argv[1]] * 2})
images = model.predict(prompts, params={"seed": 7})
example = model.predict(model.input_example)
params = {spec.name: spec.default for spec in model.metadata.signature.params}
assert not blocked & set(sys.modules)

blocked = {"ray", "deepspeed"}
import contextlib, io
with contextlib.redirect_stderr(io.StringIO()) as said:
    from pipelines.apps.generate import generate
    generate("models:/dreambooth-rex@latest", sys.argv[1], num=1, output="pictures")
assert said.getvalue() == "", said.getvalue()
assert not blocked & set(sys.modules)
print(json.dumps({"images": list(images["image"]), "params": params, "example": len(example)}))
"""
)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
