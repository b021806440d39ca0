"""Sample from a registered model with MLflow alone, without importing dreambooth.

`dreambooth batch examples/batch.yaml` registers the model, in mlflow.db here or at MLFLOW_TRACKING_URI.
"""

import base64
import os
from pathlib import Path

import mlflow

mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
model = mlflow.pyfunc.load_model("models:/dreambooth-coral-car@latest")

prompts = [{"prompt": "a photo of [V] car in the snow"}, {"prompt": "a photo of [V] car on the beach"}]
answer = model.predict(prompts, params={"seed": 7})
for number, image in enumerate(answer["image"]):
    Path(f"from-mlflow-{number}.png").write_bytes(base64.b64decode(image))
