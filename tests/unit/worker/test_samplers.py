"""What one sampler makes of several bases and trainings, one after the other: of each what a fresh one makes of it."""

import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from processor import multiplies_bf16
from safetensors.torch import load_file, save_file

from dreambooth.models.base_model import resolve_base_model
from dreambooth.sampling.class_images import PriorPlan, image_name
from pipelines.tasks import SampleRequest, Source
from pipelines.worker.samplers import ImageSampler


def request(dtype: str = "float32", seed: int = 1) -> SampleRequest:
    return SampleRequest(
        prompts=("a photo of a dog",),
        seeds=(seed,),
        num_inference_steps=2,
        guidance_scale=4.0,
        resolution=32,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def bases(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Two bases of the same shapes, which differ in weights, VAE and scheduler."""
    other = Path(shutil.copytree(tiny_pipeline, tmp_path_factory.mktemp("bases") / "other"))
    for seed, part in enumerate(("unet", "vae")):
        path = other / part / "diffusion_pytorch_model.safetensors"
        rng = torch.Generator().manual_seed(seed)
        noisy = {
            name: w + 0.25 * w.std(correction=0) * torch.randn(w.shape, generator=rng)
            for name, w in load_file(path).items()
        }
        save_file(noisy, path, {"format": "pt"})
    settings = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    settings |= {"prediction_type": "v_prediction"}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    found = {"a": resolve_base_model(str(tiny_pipeline)), "b": resolve_base_model(str(other))}
    return {name: Source(address=base.address, base_hash=base.hash) for name, base in found.items()}


def trained(base: Source, seed: int, *, text_encoder: bool = True) -> dict[str, torch.Tensor]:
    """An engine's state_dict of a base: its weights, moved a little."""
    rng, state = torch.Generator().manual_seed(seed), {}
    files = {"denoiser": "unet/diffusion_pytorch_model.safetensors"}
    files |= {"text_encoder": "text_encoder/model.safetensors"} if text_encoder else {}
    for owner, name in files.items():
        for key, weight in load_file(Path(base.address) / name).items():
            state[f"{owner}.{key}"] = weight + 0.1 * torch.randn(weight.shape, generator=rng)
    return state


def pixels(picture: bytes) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(picture)), dtype=np.int16)


class Work:
    """Steps of work for samplers: base a or b, weights trained on it, class images."""

    def __init__(self, bases: dict[str, Source], folder: Path) -> None:
        self._bases, self._folder, self._count = bases, folder, 0
        self._alone: dict[str, bytes | None] = {}
        self._states = {
            "a1": trained(bases["a"], 1),
            "a2": trained(bases["a"], 2, text_encoder=False),
            "b1": trained(bases["b"], 3),
            "b2": trained(bases["b"], 4, text_encoder=False),
        }

    def do(self, sampler: ImageSampler, step: str) -> bytes | None:
        """`a`: base a's picture; `a1`: that of weights trained on it, which are given; `give a1`: only given;
        `class a`: base a's class image."""
        name = step.removeprefix("give ").removeprefix("class ")
        base = self._bases[name[0]]
        if step.startswith("class "):
            return self._class_image(sampler, base)
        if len(name) == 1:
            return sampler.samples(base, request())[0]
        source = Source(address=f"trained:{name[0]}")  # the same name for other weights, as after another attempt
        sampler.give_weights(source, base, self._states[name])
        return None if step.startswith("give ") else sampler.samples(source, request())[0]

    def alone(self, step: str) -> bytes | None:
        """What a fresh sampler makes."""
        if step not in self._alone:
            self._alone[step] = self.do(ImageSampler(use_gpu=False), step)
        return self._alone[step]

    def _class_image(self, sampler: ImageSampler, base: Source) -> bytes:
        plan = PriorPlan(
            base_hash=str(base.base_hash),
            class_prompt="a photo of a dog",
            resolution=32,
            num_inference_steps=2,
            guidance_scale=4.0,
            batch_size=1,
            seed=0,
            dtype="float32",
            sampler="dpm-solver++",
            count=1,
        )
        self._count += 1
        folder = self._folder / str(self._count)
        sampler.class_images(base, plan, [range(1)], [[0]], str(folder))
        return (folder / image_name(0)).read_bytes()


@pytest.fixture(scope="module")
def work(bases: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(bases, tmp_path_factory.mktemp("class-images"))


@pytest.mark.parametrize(
    "order",
    [
        ("a", "a1", "give b1", "b", "b1"),  # two subjects of one lane, each with its base model's samples
        ("a", "a1", "b1", "a"),  # the base model's samples were there already
        ("a1", "b1", "class b", "b1"),
        ("a1", "give b1", "class b"),  # an evaluation whose pictures were all there
        ("a1", "give b1", "b"),
        ("a1", "give b1", "a", "b1"),
        ("a1", "a2", "a", "a2", "a1"),
        ("b2", "a2", "b", "a", "b2"),
    ],
)
def test_whatever_went_before_pictures_are_those_of_a_fresh_sampler(order: tuple[str, ...], work: Work) -> None:
    sampler = ImageSampler(use_gpu=False)
    made = [(step, work.do(sampler, step)) for step in order]
    for step, picture in made:
        assert picture is None or picture == work.alone(step), step
    assert len({picture for _, picture in made}) == len({picture and step for step, picture in made})


def test_weights_that_do_not_fit_leave_nothing_behind(bases: dict[str, Source], work: Work) -> None:
    sampler = ImageSampler(use_gpu=False)
    plain = work.do(sampler, "a")
    state = trained(bases["a"], 1)
    del state["denoiser.conv_out.bias"]
    sampler.give_weights(Source(address="trained:broken"), bases["a"], state)
    with pytest.raises(RuntimeError, match="conv_out"):
        sampler.samples(Source(address="trained:broken"), request())
    assert work.do(sampler, "a") == plain


def test_a_base_that_has_changed_where_it_lies_is_refused(bases: dict[str, Source]) -> None:
    other = Source(address=bases["a"].address, base_hash=bases["b"].base_hash)
    sampler = ImageSampler(use_gpu=False)
    sampler.samples(bases["a"], request())
    with pytest.raises(RuntimeError, match="use one copy"):
        sampler.samples(other, request())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pictures_are_of_the_dtype_that_was_planned_on_every_cpu(
    dtype: str, bases: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = in_plain_diffusers(bases["a"], request(dtype), getattr(torch, dtype))
    made = []
    for it_does in (True, False):
        multiplies_bf16(monkeypatch, it_does)
        sampler = ImageSampler(use_gpu=False)
        for before in ("float32", "bfloat16"):
            sampler.samples(bases["a"], request(before))
            made += sampler.samples(bases["a"], request(dtype))
    assert len(set(made)) == 1
    others = {"float32", "bfloat16", "float16"} - {dtype}
    assert not set(made) & {sampler.samples(bases["a"], request(other))[0] for other in others}
    assert np.abs(pixels(made[0]) - plain).max() <= 1  # by rounding


def in_plain_diffusers(base: Source, wanted: SampleRequest, dtype: torch.dtype) -> npt.NDArray[np.int16]:
    """The picture as diffusers' own pipeline makes it, under autocast, by a VAE in fp32."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base.address, safety_checker=None, local_files_only=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        latents = pipeline(
            list(wanted.prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            num_inference_steps=wanted.num_inference_steps,
            guidance_scale=wanted.guidance_scale,
            height=wanted.resolution,
            width=wanted.resolution,
            output_type="latent",
        ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
    return np.asarray(pipeline.image_processor.postprocess(decoded)[0], dtype=np.int16)


def test_a_pipeline_makes_room_where_training_has_none_beside_it(
    bases: dict[str, Source], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU; a CPU has no memory of its own to run short of. The log names a pipeline that was there alone."""
    caplog.set_level(logging.INFO, logger="dreambooth.worker")
    sampler = ImageSampler(use_gpu=False)
    before = sampler.samples(bases["a"], request())[0]

    def stays(needed: int) -> bool:
        held = sampler._pipeline
        sampler.make_room(needed)
        return sampler._pipeline is held

    assert stays(1 << 60)
    monkeypatch.setattr("pipelines.cluster.processor.device_bytes", lambda device: 1000)
    assert stays(900)
    assert not caplog.records
    assert not stays(901)
    assert stays(901)  # nothing is loaded
    assert [record.getMessage() for record in caplog.records] == ["sampler unloaded"]
    assert sampler.samples(bases["a"], request())[0] == before
