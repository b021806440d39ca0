"""Class images of several blocks: the same files as of one block after the other, each block reported once written."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.tasks import Source
from pipelines.worker.samplers import ImageSampler


@pytest.fixture(scope="module")
def plan(tiny_pipeline: Path) -> PriorPlan:
    return PriorPlan(
        base_hash=resolve_base_model(str(tiny_pipeline)).hash,
        class_prompt="a photo of a car",
        resolution=32,
        num_inference_steps=1,
        guidance_scale=4.0,
        batch_size=2,
        seed=0,
        dtype="float32",
        sampler="dpm-solver++",
        count=7,
    )


@pytest.fixture(scope="module")
def source(tiny_pipeline: Path) -> Source:
    return Source(address=str(tiny_pipeline))


WANTED = [[0, 1], [3], [4, 5], [6]]  # 2 is there, and 7 more than is wanted


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png") if path.is_file()}


def test_several_blocks_are_those_of_one_after_the_other(plan: PriorPlan, source: Source, tmp_path: Path) -> None:
    sampler, reported = ImageSampler(use_gpu=False), list[list[int]]()

    def made(indices: Sequence[int]) -> bool:
        assert all((tmp_path / "together" / image_name(index)).is_file() for index in indices)
        reported.append(list(indices))
        return False

    written = sampler.class_images(source, plan, plan.blocks(), WANTED, f"{tmp_path}/together", made)
    assert written == [0, 1, 3, 4, 5, 6]
    assert reported == WANTED
    for block, wanted in zip(plan.blocks(), WANTED, strict=True):
        sampler.class_images(source, plan, [block], [wanted], f"{tmp_path}/alone")
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert len(set(files(tmp_path / "alone").values())) == 6


def test_a_stop_leaves_further_blocks(plan: PriorPlan, source: Source, tmp_path: Path) -> None:
    written = ImageSampler(use_gpu=False).class_images(
        source, plan, plan.blocks(), WANTED, str(tmp_path), lambda indices: True
    )
    assert written == [0, 1, 3]  # the second was sampled while the first was written
    assert files(tmp_path).keys() == {image_name(index) for index in written}


def test_a_write_that_fails_is_raised_and_what_was_reported_is_there(
    plan: PriorPlan, source: Source, tmp_path: Path
) -> None:
    (tmp_path / image_name(4)).mkdir()
    reported: list[int] = []
    sampler = ImageSampler(use_gpu=False)
    with pytest.raises(OSError, match="directory"):
        sampler.class_images(
            source, plan, plan.blocks(), WANTED, str(tmp_path), lambda indices: reported.extend(indices) or False
        )
    assert reported == [0, 1, 3]
    assert files(tmp_path).keys() == {image_name(index) for index in (0, 1, 3, 5, 6)}  # whole files, and no others
    (tmp_path / image_name(4)).rmdir()
    sampler.class_images(source, plan, plan.blocks()[2:], WANTED[2:], str(tmp_path))
    again = tmp_path / "again"
    sampler.class_images(source, plan, plan.blocks(), WANTED, str(again))
    assert files(tmp_path) == files(again)
