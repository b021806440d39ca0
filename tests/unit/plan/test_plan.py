"""What a run's plan says before any work: memory, class images, all that a person wants to know."""

import shutil
from pathlib import Path

import pytest
from machine_plan import BF16_WEIGHTS, MachinePlan

from dreambooth.errors import InputError
from pipelines.plan.describe import describe_plan
from pipelines.plan.run_plan import Plan


class TestMemory:
    """ZeRO's paper (arXiv 1910.02054, section 3.1) for N workers and P parameters, with 4 bytes each instead of 2:

    weights and gradients 4 P each, and K P of optimizer states, here two Adam moments and fp32 masters (none of those
    at stage 0, where the weights themselves serve). Stage 1 divides K by N, stage 2 gradients too, stage 3 weights too.
    """

    @pytest.mark.parametrize("workers", [2, 4, 8])
    @pytest.mark.parametrize(
        ("stage", "whole", "shared"), [(0, 4 + 4 + 8, 0), (1, 4 + 4, 12), (2, 4, 4 + 12), (3, 0, 4 + 4 + 12)]
    )
    def test_stages(self, plan: MachinePlan, workers: int, stage: int, whole: int, shared: int) -> None:
        made = plan(f"cluster.num_workers={workers}", f"zero.stage={stage}")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * (whole + shared / workers), abs=1)

    @pytest.mark.parametrize(("stage", "whole", "shared"), [(1, 2 + 4, 12), (2, 2, 4 + 12), (3, 0, 2 + 4 + 12)])
    def test_bf16_weights(self, plan: MachinePlan, stage: int, whole: int, shared: int) -> None:
        """Sums of gradients and masters stay fp32."""
        made = plan(*BF16_WEIGHTS, "cluster.num_workers=4", f"zero.stage={stage}")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * (whole + shared / 4), abs=1)

    def test_a_single_worker_with_pytorch(self, plan: MachinePlan) -> None:
        assert plan("zero.stage=3").model_state_bytes == 16 * plan().trained_parameters

    def test_the_moving_average_is_divided_like_the_masters(self, plan: MachinePlan) -> None:
        made = plan("cluster.num_workers=4", "zero.stage=2", "train.ema_decay=0.9")
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * (4 + 20 / 4), abs=1)

    @pytest.mark.parametrize(
        ("stage", "accumulated", "bytes_each"),
        [(1, 1, 4), (1, 2, 4 + 4), (2, 1, 4), (2, 2, 4), (3, 1, 4 / 4), (3, 2, 4 / 4)],
    )
    def test_offload_takes_optimizer_and_gradients_away(
        self, plan: MachinePlan, stage: int, accumulated: int, bytes_each: float
    ) -> None:
        """ZeRO-1 lets gradients accumulate on the device until the last pass of a step."""
        accumulation = f"train.gradient_accumulation_steps={accumulated}"
        made = plan("cluster.num_workers=4", f"zero.stage={stage}", "zero.offload_optimizer=true", accumulation)
        assert made.model_state_bytes == pytest.approx(made.trained_parameters * bytes_each, abs=1)

    def test_what_is_trained(self, plan: MachinePlan) -> None:
        counts = plan().base.parameter_counts
        assert plan().trained_parameters == counts["unet"] + counts["text_encoder"]
        assert plan("train.train_text_encoder=false").trained_parameters == counts["unet"]


class TestDescription:
    def rows(self, plan: Plan) -> dict[str, str]:
        return dict(describe_plan(plan))

    def test_all_that_a_person_wants_to_know(self, plan: MachinePlan, tmp_path: Path) -> None:
        made = plan("cluster.num_workers=2", "train.micro_batch_size=3", "train.gradient_accumulation_steps=2")
        rows = self.rows(made)
        assert rows["instance prompt"] == "a photo of tfz dog"
        assert rows["steps"] == "10 of 12 instance/class pairs"
        assert rows["workers"] == "2 x 1 CPU"
        assert rows["engine"] == "DeepSpeed ZeRO-2"
        assert rows["class images"].startswith("8 of 'a photo of a dog': 8 to make")
        assert rows["writes to"] == f"{tmp_path}/output/rex, registered as dreambooth-rex"
        assert rows["result key"] == made.key
        assert "unet 0.06 M" in rows["base model"]
        assert made.base.hash in rows["base model"]
        assert rows["memory per worker"].startswith("1 MiB")

    def test_class_images_that_are_there_already(self, plan: MachinePlan, tmp_path: Path) -> None:
        made = plan()
        assert made.prior is not None
        folder = tmp_path / "output" / "prior" / made.prior.key
        folder.mkdir(parents=True)
        for index in range(3):
            (folder / f"{index:06d}.png").touch()
        assert "5 to make" in self.rows(made)["class images"]
        for index in range(3, 8):
            (folder / f"{index:06d}.png").touch()
        assert "all made" in self.rows(made)["class images"]

    def test_without_prior_preservation(self, plan: MachinePlan) -> None:
        rows = self.rows(plan("prior.prior_loss_weight=0"))
        assert "class images" not in rows
        assert rows["steps"] == "10 of 1 instance image"
        assert rows["engine"] == "PyTorch"


def test_captions_are_read_before_anything_starts(plan: MachinePlan, instance_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(instance_folder, tmp_path / "rex"))
    (folder / "00.txt").write_text("a photo of [V] dog on the beach")
    (folder / "01.txt").write_text("a photo of a dog")
    (folder / "02.txt").write_text(f"a photo of [V] dog {'in the snow ' * 8}")
    assert plan(images=folder).warnings == (
        f"the caption of {folder}/01.png names no [V]; write [V] where the subject is meant",
        f"the caption of {folder}/02.png has 29 tokens, and the base model reads 22: 'snow in the snow in the snow' is "
        f"cut off",
    )
    (folder / "03.txt").write_text(f"a photo {'in the snow ' * 8}of [V] dog")
    with pytest.raises(InputError, match=r"03\.png has 29 tokens, .* is cut off, the identifier with it; shorten it"):
        plan(images=folder)
