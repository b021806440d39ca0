from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel

from dreambooth.miniature import CLIP_DIR, FLOW_DIR, PIPELINE_DIR
from dreambooth.miniature.pretraining.assemble import assemble_flow_pipeline
from dreambooth.miniature.pretraining.train_flow import (
    MUON_RATE,
    T5_TOKENS,
    EncodedCaptions,
    LastCountsForAll,
    build_optimizers,
    build_towers,
    build_transformer,
    stratified_sigmas,
    trained_transformer,
)
from dreambooth.miniature.pretraining.train_flow import STAGE as FLOW_STAGE

PROMPT = "a photo of a red dog on the beach"


def towers() -> nn.ModuleList:
    return build_towers(
        CLIPTextModel.from_pretrained(PIPELINE_DIR / "text_encoder", dtype=torch.float32),
        CLIPModel.from_pretrained(CLIP_DIR, dtype=torch.float32),
    )


def test_one_zero_that_counts_for_all_is_as_good_as_all_of_them() -> None:
    torch.manual_seed(0)
    transformer = build_transformer()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # blocks begin as zero, where nothing would be compared
    states, pooled = EncodedCaptions(towers())([PROMPT, ""])
    noisy, moments = torch.randn(2, 4, 16, 16), torch.tensor([100.0, 900.0])

    def velocity(states: Tensor) -> Tensor:
        given = {"hidden_states": noisy, "timestep": moments, "pooled_projections": pooled}
        found: Tensor = transformer(**given, encoder_hidden_states=states).sample
        return found

    with torch.no_grad():
        of_all = velocity(torch.cat([states, states[:, -1:].expand(-1, T5_TOKENS - 1, -1)], dim=1))
        transformer.set_attn_processor(LastCountsForAll())
        of_one = velocity(states)
    assert states[:, -1].count_nonzero() == 0
    torch.testing.assert_close(of_one, of_all, rtol=1e-4, atol=1e-4)


def test_every_weight_has_one_optimizer() -> None:
    transformer = build_transformer()
    chosen = [p for one in build_optimizers(transformer, FLOW_STAGE) for g in one.param_groups for p in g["params"]]
    assert sorted(map(id, chosen)) == sorted(map(id, transformer.parameters()))


def test_a_trained_denoiser_goes_on_from_its_weights_at_half_the_rates() -> None:
    trained = trained_transformer(FLOW_DIR / "pipeline")
    stored = load_file(FLOW_DIR / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name: tensor.dtype for name, tensor in trained.state_dict().items()} == dict.fromkeys(stored, torch.float32)
    assert all(torch.equal(tensor.half(), stored[name]) for name, tensor in trained.state_dict().items())
    muon, adamw = build_optimizers(trained, FLOW_STAGE, factor=0.5)
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (MUON_RATE / 2, FLOW_STAGE.learning_rate / 2)


def test_sigmas_rise_by_slices_and_have_the_median_of_their_distribution() -> None:
    sigmas = stratified_sigmas(1001, torch.Generator().manual_seed(0))
    assert (sigmas.diff() > 0).all()
    assert sigmas[0] > 0
    assert sigmas[-1] < 1
    assert abs(float(sigmas[500]) - 0.6) < 1e-2  # half way, shifted by 1.5


def test_an_assembled_pipeline_does_not_name_the_folder_that_its_vae_came_from(tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(PIPELINE_DIR, subfolder="vae")
    folder = tmp_path / "pipeline"
    assemble_flow_pipeline(folder, vae=vae, transformer=build_transformer(), towers=towers(), shift=1.5)
    assert AutoencoderKL.from_pretrained(folder, subfolder="vae").config.shift_factor == 0.0
    assert [path for path in folder.rglob("*.json") if str(PIPELINE_DIR) in path.read_text()] == []
