"""Two ranks keep one checkpoint: they agree on which one is whole, and on there being no room for another."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_bytes import tensor_bytes
from process_group import run_together
from test_engines import two_ranks

from dreambooth.config.settings import load_config
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.run_plan import make_plan

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
STAGES = (-1, 0, 1, 2, 3)
EMA = 0.9


def run_ranks(base: Path, output: Path, cases: list[list[Any]], *, hidden: tuple[Path, Path] | None = None) -> None:
    """Start both ranks; rank 1 sees the first of `hidden` where the second is, as on a node of its own."""
    commands = [[sys.executable, str(SCRIPT), str(base), str(output), json.dumps(cases)] for _ in range(2)]
    if hidden is not None:
        mounted = f'mount --bind "{hidden[0]}" "{hidden[1]}" && exec "$@"'
        commands[1] = ["unshare", "--mount", "sh", "-c", mounted, "sh", *commands[1]]
    run_together(commands, output, timeout=300)


def told(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((output / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(re.sub(r"step-0*(\d+)-.*", r"\1", path.name) for path in folder.glob("step-*"))


def test_sizes_and_a_full_disk(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        cases = [[f"zero{stage}", stage, EMA, f"{tmp_path}/zero{stage}"] for stage in STAGES]
        broken = [[f"broken{stage}", stage, EMA, f"{tmp_path}/broken{stage}", 2] for stage in (-1, 2)]
        run_ranks(tiny_pipeline, tmp_path, [*cases, *broken, ["full", 2, EMA, f"{disk}/checkpoints"]])
        one, other = told(tmp_path, "full")
        assert one["full"] == other["full"]
        written = checkpoints(disk / "checkpoints")
        assert written  # the first fits
        said = rf"can't write the checkpoint of step {len(written) + 1} .*no space is left.*of step {written[-1]}$"
        assert re.search(said, one["full"])
        assert all((path / "manifest.json").is_file() for path in (disk / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    for stage in (-1, 2):
        for rank in told(tmp_path, f"broken{stage}"):
            assert "weights or their moments are not finite after step 2" in rank["full"]
        assert checkpoints(tmp_path / f"broken{stage}") == ["1"]
    for stage in STAGES:
        config = two_ranks.configuration(tiny_pipeline, accumulation=1, accumulates=False, ema_decay=EMA)
        settings = {
            "engine": "torch" if stage < 0 else "deepspeed",
            "cluster.num_workers": 2,
            "zero.stage": max(stage, 0),
            "subject.instance_images": str(instance_folder),
            "prior.prior_loss_weight": 0,
        }
        overrides = tuple(f"{name}={value}" for name, value in settings.items())
        plan = make_plan(load_config(config.model_dump(by_alias=True), overrides), Resources(cpus=2, gpus=0))
        [newest] = (tmp_path / f"zero{stage}").glob("step-00000003-*")
        assert tensor_bytes(newest, weights_only=False) == pytest.approx(plan.checkpoint_bytes, rel=0.02), stage


def test_one_rank_sees_a_damaged_copy_and_both_pass_it_over(tiny_pipeline: Path, tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root can give a process a mount of its own")
    here, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    run_ranks(tiny_pipeline, tmp_path, [["first", 2, 0, str(here)]])
    assert checkpoints(here) == ["2", "3"]
    shutil.copytree(here, elsewhere)
    [damaged] = elsewhere.glob("step-00000003-*/zero/zero_pp_rank_1_*optim_states.pt")
    os.truncate(damaged, damaged.stat().st_size - 1)
    run_ranks(tiny_pipeline, tmp_path, [["second", 2, 0, str(here)]], hidden=(elsewhere, here))
    one, other = told(tmp_path, "second")
    assert (one["start"], other["start"]) == (2, 2)
    assert re.search(r"passed over: zero/zero_pp_rank_1_\S+ at .*step-00000003.* bytes", one["warnings"][0])
    assert other["warnings"] == []
