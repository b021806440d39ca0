"""Load a registered model with MLflow alone, in a process that can't import this project, Ray or DeepSpeed."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

ALONE = """
import json, sys, warnings
blocked = {"ray", "deepspeed", "dreambooth", "pipelines"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
import mlflow, pandas
"""
"""The start of a program that can import neither."""

PROGRAM = (
    ALONE
    + """
address, prompt, config = sys.argv[1:]
model = mlflow.pyfunc.load_model(address, model_config=json.loads(config))
[image] = model.predict(pandas.DataFrame({"prompt": [prompt]}), params={"seed": 7})["image"]
assert not blocked & set(sys.modules)
print("IMAGE", image)
"""
)


def begin_loading(
    address: str,
    prompt: str,
    *,
    tracking_uri: str,
    folder: Path,
    variables: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
) -> "subprocess.Popen[str]":
    """Start to load a model and to draw with seed 7, in a working folder; its cache is $DREAMBOOTH_CACHE."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-c", PROGRAM, address, prompt, json.dumps(dict(config or {}))]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def drawn(process: "subprocess.Popen[str]") -> Image.Image:
    """The picture of a loading process."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    [line] = [line for line in out.splitlines() if line.startswith("IMAGE ")]
    return Image.open(io.BytesIO(base64.b64decode(line.removeprefix("IMAGE "))))


def refused(process: "subprocess.Popen[str]") -> str:
    """What a loading process ended with: the last line of its error."""
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    return err.strip().splitlines()[-1]
