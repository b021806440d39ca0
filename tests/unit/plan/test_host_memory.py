"""Main memory of nodes: what is planned of it, and what is refused for want of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth.config.settings import load_config
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources, usable_memory
from pipelines.plan.batch_plan import describe_batch, make_batch_plan
from pipelines.plan.host_memory import (
    LIBRARIES_BYTES,
    Held,
    check_host_memory,
    describe_host_memory,
    host_phases,
    snapshot_bytes,
)
from pipelines.plan.run_plan import Plan, make_plan

CPUS = Resources(cpus=64, gpus=0)
BF16_WEIGHTS = "zero.weights=bf16", "train.mixed_precision=bf16"
LARGE = 1_000_000_000
"""Parameters of a UNet that is planned for."""


@pytest.fixture
def planned(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> Callable[..., Plan]:
    """A plan of four workers without class images; as if the UNet had LARGE parameters."""

    def make(*overrides: str, resources: Resources = CPUS) -> Plan:
        subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(instance_folder)}
        settings = {"base_model": str(tiny_pipeline), "subject": subject, "storage": {"root": str(tmp_path)}}
        common = ("cluster.num_workers=4", "prior.prior_loss_weight=0", "storage.dtype=float32")
        plan = make_plan(load_config(settings, (*common, *overrides)), resources)
        vars(plan.base)["parameter_counts"] = {"unet": LARGE, "text_encoder": 0, "vae": 0}
        return plan

    return make


def phase(plan: Plan, begins: str) -> Held:
    [held] = [held for held in host_phases(plan) if held.phase.startswith(begins)]
    return replace(held, each=held.each - LIBRARIES_BYTES)


class TestPhases:
    def test_slices_are_a_part_and_a_loaded_model_is_there_twice(self, planned: Callable[..., Plan]) -> None:
        """In bytes a parameter: with ZeRO-3 a quarter of 4, else the base and the copy that is trained."""
        assert phase(planned("zero.stage=3"), "loading").each == LARGE
        assert phase(planned("zero.stage=2"), "loading").each == 2 * 4 * LARGE

    def test_rounded_weights_stand_beside_those_that_masters_are_made_from(self, planned: Callable[..., Plan]) -> None:
        """The base, its copy, the rounded one and a quarter of the masters; of slices a quarter of the rounded ones."""
        assert phase(planned(*BF16_WEIGHTS, "zero.stage=2"), "loading").each == (4 + 4 + 2 + 4 / 4) * LARGE
        assert phase(planned(*BF16_WEIGHTS, "zero.stage=3"), "loading").each == 2 * LARGE / 4
        gpus = replace(CPUS, gpus=4)
        assert phase(planned(*BF16_WEIGHTS, "zero.stage=2", resources=gpus), "loading").each == (4 + 4 + 2) * LARGE

    @pytest.mark.parametrize(
        ("settings", "each", "first"),
        [
            # Base, weights, masters, gradients, moments; a snapshot of masters and moments, on the first weights too.
            (("zero.stage=1",), 4 + 4 + 4 + 12 / 4 + 12 / 4, 4),
            (("zero.stage=2",), 4 + 4 + 16 / 4 + 12 / 4, 4),
            (("zero.stage=3",), 20 / 4 + 12 / 4, 0),
            (("zero.stage=3", "train.ema_decay=0.9"), 24 / 4 + 16 / 4, 0),
            (("zero.stage=0",), 4 + 4 + 4 + 8, 4 + 8),
            (("engine=torch",), 4 + 4 + 4 + 8, 4 + 8),
            (("zero.stage=3", "train.checkpoint_every=1000"), 20 / 4, 0),
            ((*BF16_WEIGHTS, "zero.stage=1"), 4 + 2 + 4 + 12 / 4 + 12 / 4, 2),
            ((*BF16_WEIGHTS, "zero.stage=2"), 4 + 2 + 16 / 4 + 12 / 4, 2),
            ((*BF16_WEIGHTS, "zero.stage=3"), 18 / 4 + 12 / 4, 0),
        ],
    )
    def test_training(self, planned: Callable[..., Plan], settings: tuple[str, ...], each: float, first: float) -> None:
        plan = planned("train.max_train_steps=1000", *settings)
        held = phase(plan, "training")
        assert (held.each / LARGE, held.first / LARGE) == (each, first)
        assert phase(plan, "gathering").first == held.first + 4 * LARGE

    def test_scores_take_a_pipeline_and_a_gpu_has_it(self, planned: Callable[..., Plan]) -> None:
        settings = ("zero.stage=3", "evaluation.bank=miniature")
        for more, each in ((("evaluation.every=10",), 4 + 4), (("evaluation.every=10", "train.keep=best"), 4 + 4 + 4)):
            plain, scored = phase(planned(*settings), "training"), phase(planned(*settings, *more), "training")
            assert (scored.each, scored.first) == (plain.each, plain.first + each * LARGE)
        on_gpus = planned(*settings, "evaluation.every=10", resources=replace(CPUS, gpus=4))
        assert phase(on_gpus, "training").first == 0

    def test_on_a_gpu_what_is_offloaded_is_there(self, planned: Callable[..., Plan]) -> None:
        settings = ("zero.stage=3", "train.checkpoint_every=1000", "train.max_train_steps=1000")
        gpus = replace(CPUS, gpus=4)
        assert phase(planned(*settings, resources=gpus), "training").each == 0
        offloaded = planned(*settings, "zero.offload_optimizer=true", resources=gpus)
        # Masters and moments, gradients, and the buffer they are summed in.
        assert phase(offloaded, "training").each == (12 + 4 + 4) * LARGE / 4
        everything = planned(*settings, *(f"zero.offload_{part}=true" for part in ("optimizer", "parameters")))
        assert phase(replace(everything, use_gpu=True), "training").each == (12 + 4 + 4 + 4) * LARGE / 4
        two = replace(planned("zero.stage=2", *settings[1:], "zero.offload_optimizer=true"), use_gpu=True)
        assert phase(two, "training").each == (4 + (12 + 4 + 4) / 4) * LARGE  # the base model, too

    @pytest.mark.parametrize(
        "settings",
        [
            *(("zero.stage=0",), ("zero.stage=1",), ("zero.stage=2",), ("zero.stage=3",), ("engine=torch",)),
            *((*BF16_WEIGHTS, f"zero.stage={stage}") for stage in (1, 2, 3)),
        ],
    )
    @pytest.mark.parametrize("average", ["0.9", "null"])
    def test_snapshots_are_the_files_of_a_checkpoint(
        self, planned: Callable[..., Plan], settings: tuple[str, ...], average: str
    ) -> None:
        """Whose bytes test_checkpoint_ranks.py compares with those on the disk."""
        plan = planned(*settings, f"train.ema_decay={average}")
        each, first = snapshot_bytes(plan)
        assert 4 * each + first == pytest.approx(plan.checkpoint_bytes, rel=1e-6)


class TestNodes:
    def test_what_does_not_fit_is_told_before_any_work(self, planned: Callable[..., Plan]) -> None:
        plan = planned("zero.stage=2")
        with pytest.raises(InputError) as told:
            check_host_memory(plan, [64 << 30])
        assert re.search(
            r"gathering .* takes at least 14\.4\d GiB on each of 4 workers and 7\.45 GiB more on the first of main "
            r"memory, but the machine has 64\.00 GiB; zero\.stage=3, .*machines with more memory",
            str(told.value),
        ), told.value
        check_host_memory(plan, [128 << 30])
        check_host_memory(plan, ())  # unknown
        with pytest.raises(InputError, match="2 machines have 64"):
            check_host_memory(plan, [32 << 30] * 2)
        check_host_memory(plan, [32 << 30] * 4)
        check_host_memory(planned("zero.stage=3"), [64 << 30])

    def test_a_batch_has_the_lanes_that_there_is_memory_for(self, planned: Callable[..., Plan]) -> None:
        plan = planned("zero.stage=3", "train.max_train_steps=1000")
        two = [plan, replace(plan, config=plan.config.model_copy(), key="other")] * 2
        nodes = replace(CPUS, node_bytes=(110 << 30,))
        batch = make_batch_plan("pets", two, nodes)
        assert batch.lanes == 2
        rows = dict(describe_batch(batch))
        assert rows["lanes"] == "2 (as many as main memory has room for)"
        assert re.search(r"GiB on each of 4 workers .*each of 2 lanes, .*; the machine has 110", rows["main memory"])
        asked = planned("zero.stage=3", "cluster.lanes=3", "train.max_train_steps=1000")
        with pytest.raises(InputError, match=r"in each of 3 lanes .*; cluster\.lanes=2, or"):
            make_batch_plan("pets", [asked] * 4, nodes)

    def test_this_machine_has_some(self) -> None:
        assert 2**30 < usable_memory() < 2**50

    def test_one_worker_has_one_figure(self, planned: Callable[..., Plan]) -> None:
        what, value = describe_host_memory([planned("cluster.num_workers=1")], [64 << 30])
        assert what == "main memory"
        assert re.fullmatch(r"about [\d.]+ GiB, .*; the machine has 64\.00 GiB", value)
