"""What a fresh process has to import: the method without the vendors, workers without what they do not use."""

import subprocess
import sys
from pathlib import Path

import pytest

import dreambooth

METHOD = Path(dreambooth.__file__).parent

IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "deepspeed", "mlflow", "pipelines"}:
            raise ImportError(f"{name} is blocked: dreambooth has to do without it")

sys.meta_path.insert(0, Blocked())
import dreambooth
from dreambooth.quiet import quiet
quiet()

def fail(name):
    raise

for module in pkgutil.walk_packages(dreambooth.__path__, "dreambooth.", onerror=fail):
    importlib.import_module(module.name)
    print(module.name)
"""


def name_of(path: Path) -> str:
    parts = path.relative_to(METHOD.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_method_imports_without_the_vendors() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {name_of(path) for path in METHOD.rglob("*.py")} - {"dreambooth"}
    assert set(done.stdout.split()) == expected  # a folder without __init__.py would be passed over


@pytest.mark.parametrize("module", ["queue.queue_actor", "worker.lane_worker", "worker.samplers"])
def test_ray_starts_a_queue_a_lane_or_a_sampler_without_importing_torch(module: str) -> None:
    """Ray imports these in processes that never train too: the queue's, and the controller of every worker group."""
    program = f"import sys, pipelines.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "mlflow", "pandas", "matplotlib"} & set(done.stdout.split())


def test_a_driver_and_its_controllers_need_no_torch() -> None:
    """It would cost each 180 MiB and more than a second."""
    program = """
import sys
from pipelines.cluster.trainer import lane_trainer
import pipelines.cluster.process_group, pipelines.driver.single, pipelines.tracking.served_model
lane_trainer(local=True)
from dreambooth.config.settings import load_config
from pipelines.stages.evaluation_task import encoder_address
subject = {"name": "rex", "class_noun": "dog", "instance_images": "photos"}
encoder_address(load_config({"subject": subject, "base_model": "miniature"}, ()))
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"mlflow", "ray.train", "pipelines.driver.conclude"} <= loaded
    assert not {"torch", "diffusers"} & loaded
