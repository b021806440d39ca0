"""What strangers may supply (base models, manifests, names, prompts, passwords) runs nothing and shows nothing."""

import ast
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.sampler import load_pipeline
from dreambooth.training.model import load_components
from pipelines.driver.jobs import make_job
from pipelines.plan.describe import printable_settings

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("dreambooth", "pipelines", "infra") for path in (ROOT / package).rglob("*.py")]
PASSWORD = "correct-horse-battery"


class Trap:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """The trace that nothing may leave; a pickle that would leave it lies beside."""
    path = tmp_path / "pickle.bin"
    torch.save(Trap(tmp_path / "trace"), path)
    yield path
    assert not (tmp_path / "trace").exists()
    # It does work: what is tested is that nobody reads it.
    torch.load(path, weights_only=False)
    assert (tmp_path / "trace").exists()


OWN_TRANSPORT = ("pipelines/queue/queue_actor.py", "pickle.loads")
"""What a driver packs for its own actor goes over Ray, whose messages are pickles anyway; nothing stored is read so."""


def calls() -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in the sources, but for the exception."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if (path.relative_to(ROOT).as_posix(), name) != OWN_TRANSPORT:
                    yield name, node


def keyword(call: ast.Call, name: str) -> Any:
    return next((each.value.value for each in call.keywords if each.arg == name and hasattr(each.value, "value")), None)


def test_no_source_reads_a_pickle_or_hands_text_to_a_shell() -> None:
    forbidden = ("pickle.load", "pickle.loads", "cloudpickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec")
    forbidden += ("os.system", "os.popen", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "joblib.load")
    seen = 0
    for name, call in calls():
        assert name not in forbidden, ast.unparse(call)
        assert keyword(call, "shell") is not True, ast.unparse(call)
        assert keyword(call, "trust_remote_code") is not True, ast.unparse(call)
        if name.endswith("torch.load"):
            seen += 1
            assert keyword(call, "weights_only") is True, ast.unparse(call)
    assert seen  # the walk finds calls


def test_pickles_beside_a_base_models_weights_are_not_read(trap: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    ):
        shutil.copyfile(trap, base / name)
    assert resolve_base_model(str(base)).hash == resolve_base_model(str(tiny_pipeline)).hash
    load_components(base)
    load_pipeline(base, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_in_place_of_weights_are_refused(trap: Path, tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    (weights,) = (base / part).glob("*.safetensors")
    weights.unlink()
    shutil.copyfile(trap, base / part / ("pytorch_model.bin" if part == "text_encoder" else f"{weights.stem}.bin"))
    with pytest.raises(InputError, match="is the copy complete"):
        resolve_base_model(str(base))
    with pytest.raises((OSError, ValueError)):
        load_pipeline(base, device="cpu", dtype=torch.float32)


def test_a_pickle_that_calls_itself_safetensors_is_refused(trap: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    (weights,) = (base / "unet").glob("*.safetensors")
    weights.write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    with pytest.raises(InputError, match="is damaged"):
        resolve_base_model(str(base))


@pytest.mark.parametrize("name", ["../rex", "rex/..", "a b", "rex;reboot", "$(reboot)", "rex\n", "-rex", "<b>", ""])
def test_a_name_that_could_leave_its_folder_or_a_command_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        load_config({"subject": {"name": name, "class_noun": "dog", "instance_images": "x"}})


def test_an_object_of_python_in_a_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"subject: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/x']]"
    )
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)
    assert not (tmp_path / "x").exists()


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    settings = {
        "subject": {"name": "rex", "class_noun": "dog", "instance_images": "x"},
        "tracking": {"uri": f"postgresql://me:{PASSWORD}@db:5432/mlflow"},
    }
    assert PASSWORD not in yaml.safe_dump(printable_settings(load_config(settings)))


def test_a_password_in_a_command_is_refused_before_it_is_kept_with_the_job() -> None:
    with pytest.raises(InputError, match=r"http://me:\*\*\*@mlflow:5000 holds a password") as refused:
        make_job("run", ["run.yaml", "--set", f"tracking.uri=http://me:{PASSWORD}@mlflow:5000"])
    assert PASSWORD not in str(refused.value)
    assert make_job("run", ["--set", "tracking.uri=http://mlflow:5000"]).arguments
