"""What is exported of DeepFloyd IF can be sampled by diffusers, restored from its delta, and served."""

from pathlib import Path

import numpy as np
import pytest
import torch
from deepfloyd_runs import PROMPTS, configured, further, moved
from mlflow.exceptions import MlflowException
from replicas.plain import plain_pipeline
from served import Served

from dreambooth.models.base_model import BaseModel
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import load_tokenizer
from dreambooth.sampling.sampler import load_pipeline, sample


class TestExport:
    @pytest.mark.parametrize("text_encoders", ["none", "all"])
    def test_diffusers_samples_the_same_picture(
        self, base: Path, stage: str, photos: Path, tmp_path: Path, text_encoders: str
    ) -> None:
        from diffusers import DPMSolverMultistepScheduler

        _, state = moved(base, configured(base, photos, text_encoders=text_encoders))
        export_pipeline(base, state, tmp_path / "model")
        verify_export(tmp_path / "model", base, state, dtype=torch.float32)
        pipeline = plain_pipeline(tmp_path / "model")
        assert pipeline.scheduler.config.variance_type == "fixed_small"
        small = further(stage, 2)
        settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
        drawn = pipeline(PROMPTS, clean_caption=False, **settings, **small).images  # by DDPM
        assert len(drawn) == 2
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, lambda_min_clipped=-5.1)
        pipeline.unet.to(memory_format=torch.channels_last)  # other orders of sums, other last bits
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        theirs = pipeline(PROMPTS, clean_caption=False, generator=generators, **settings, **small).images
        ours = sample(
            load_pipeline(tmp_path / "model"),
            PROMPTS,
            [3, 4],
            **settings,  # type: ignore[arg-type]
            dtype=torch.float32,
            images=small.get("image"),
        )
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))

    def test_a_wrong_tensor_is_seen(self, base: Path, photos: Path, tmp_path: Path) -> None:
        _, state = moved(base, configured(base, photos, text_encoders="all"))
        export_pipeline(base, state, tmp_path / "model")
        state["denoiser.conv_in.bias"][0] += 1e-3
        with pytest.raises(ValueError, match=r"conv_in\.bias .*is not what was trained"):
            verify_export(tmp_path / "model", base, state, dtype=torch.float32)

    def test_its_change_against_the_base_restores_it(
        self, bases: dict[str, Path], photos: Path, tmp_path: Path
    ) -> None:
        directory = bases["deepfloyd-if-1"]
        base = BaseModel(address=str(directory), revision=None, directory=directory)
        _, state = moved(directory, configured(directory, photos))
        export_pipeline(directory, state, tmp_path / "model", dtype=torch.float16)
        write_delta(base, tmp_path / "model", tmp_path / "delta")
        rebuild(tmp_path / "delta", tmp_path / "copy", base)
        files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
        assert (tmp_path / "model" / "tokenizer" / "spiece.model") in files
        for path in files:
            assert (tmp_path / "copy" / path.relative_to(tmp_path / "model")).read_bytes() == path.read_bytes()


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # older versions know no other name
def test_the_served_model_refuses_what_the_model_would_not_read(bases: dict[str, Path]) -> None:
    """T5's tokenizer would take 512 tokens."""
    base = bases["deepfloyd-if-1"]
    served = Served(base, tokens=load_tokenizer(base).model_max_length)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert len(served.pictures(["[V] " + "dog " * 75], seed=0, **settings)) == 1
    with pytest.raises(MlflowException, match="has 78 tokens, and the model reads 77"):
        served.pictures(["[V] " + "dog " * 76], seed=0, **settings)
