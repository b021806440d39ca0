"""The memory of an export: less than one component, whatever the model's size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from changed_models import publish_changed
from replicas.stable_diffusion import build

FORMS = {
    "single-file": ["--format", "single-file", "--to", "{to}.safetensors"],
    "diffusers": ["--format", "diffusers", "--dtype", "bfloat16", "--to", "{to}"],
    "lora": ["--format", "lora", "--rank", "4", "--to", "{to}.safetensors"],
}
SCRIPT = """
import json, sys
from pathlib import Path
from pipelines.cli import main

def status(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024

def export(model, to):
    main(["export", model, *(word.format(to=to) for word in arguments), "--quiet"], standalone_mode=False)

small, large, folder, *arguments = sys.argv[1:]
export(small, f"{folder}/small")  # imports are no part of it
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
export(large, f"{folder}/large")
print(json.dumps(status("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    """A small and a large published model, and the bytes of the large one's smaller trained component."""
    folder = tmp_path_factory.mktemp("models")
    addresses = []
    large = {"width": 512, "layers": 16, "channels": (128, 256), "depth": 5}
    for name, sizes in (("small", {}), ("large", large)):
        base = folder / name / "base"
        base.mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build(base, **sizes)
        addresses.append(publish_changed(base, folder / name, lambda name, tensor: tensor + 1e-3 * tensor.flip(0)))
    parts = [sum(path.stat().st_size for path in (base / part).glob("*")) for part in ("unet", "text_encoder")]
    assert sum(parts) > 250e6
    return addresses[0], addresses[1], min(parts)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_holds_less_than_a_component(models: tuple[str, str, int], form: str, tmp_path: Path) -> None:
    small, large, component = models
    command = [sys.executable, "-c", SCRIPT, small, large, str(tmp_path), *FORMS[form]]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    peak = json.loads(ran.stdout.splitlines()[-1])
    assert peak < component, f"{peak / 1e6:.0f} MB beside the imports, and a component has {component / 1e6:.0f} MB"
