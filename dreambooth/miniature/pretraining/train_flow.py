"""The denoiser of miniature-flow: a transformer of rectified flow on the miniature's latents, as Stable Diffusion 3 is.

The text encoders are the miniature's two CLIP towers and stay frozen. In T5's place stand zeros, 256 of them in every
prompt. They stay alike in every layer, so training carries one that counts 256 times in each attention.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth.miniature.pretraining.ahead import Ahead
from dreambooth.miniature.pretraining.assemble import assemble_flow_pipeline
from dreambooth.miniature.pretraining.stage import Stage, autocast, fit
from dreambooth.miniature.pretraining.tokenizer import MAX_LENGTH, build_tokenizer
from dreambooth.miniature.pretraining.train_unet import Captioned, cache_latents

STAGE = Stage(name="flow", steps=20_000, minutes=180, learning_rate=1e-3, warmup=40, ema_decay=0.998)
MUON_RATE = 0.02
RATE_OF_TRAINED = 0.5
"""The factor on both peak rates for a denoiser that is trained already."""
SCENES = 36_000
BATCH_SIZE = 32
SHIFT = 1.5
T5_TOKENS = 256


def build_transformer() -> SD3Transformer2DModel:
    """An untrained denoiser of 3.5 M parameters whose blocks and output begin as zero, which diffusers leaves out."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
    # The states of these towers have a standard deviation of about 4.
    transformer.context_embedder.weight.data.mul_(0.25)
    return transformer


def trained_transformer(pipeline: Path) -> SD3Transformer2DModel:
    """The denoiser of a pipeline's folder, in float32."""
    found: SD3Transformer2DModel = SD3Transformer2DModel.from_pretrained(
        pipeline / "transformer", torch_dtype=torch.float32
    )
    return found


def build_towers(text_encoder: CLIPTextModel, clip: CLIPModel) -> nn.ModuleList:
    """The text encoders: the miniature's own with the CLIP's projection, and the CLIP's text tower."""
    config = CLIPTextConfig(**{**clip.config.text_config.to_dict(), "architectures": None})
    towers = [CLIPTextModelWithProjection(config) for _ in range(2)]
    for tower, trained in zip(towers, (text_encoder, clip.text_model), strict=True):
        tower.text_model.load_state_dict(trained.state_dict())
        tower.text_projection.load_state_dict(clip.text_projection.state_dict())
    return nn.ModuleList(towers).eval().requires_grad_(False)


class EncodedCaptions:
    """What the transformer is given of captions: states (B, 25, 192), the last one T5's zero, and pooled (B, 128)."""

    def __init__(self, towers: nn.ModuleList) -> None:
        self._towers, self._tokenizer = towers, build_tokenizer()
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode those that are new, in one batch; the others are remembered."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._encoded]
        if new:
            device = next(self._towers.parameters()).device
            tokens = self._tokenizer(
                new, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
            )
            outputs = [tower(tokens.input_ids.to(device), output_hidden_states=True) for tower in self._towers]
            states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
            zero = states.new_zeros(len(new), 1, states.shape[-1])
            self._encoded |= dict(zip(new, zip(torch.cat([states, zero], dim=1), pooled, strict=True), strict=True))
        chosen = [self._encoded[caption] for caption in captions]
        return torch.stack([states for states, _ in chosen]), torch.stack([pooled for _, pooled in chosen])


class LastCountsForAll:
    """Joint attention whose last token stands for `T5_TOKENS` equal ones: exact, at a quarter of their cost."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Attention of an image (B, I, D) and its text (B, T, D) to both, as JointAttnProcessor2_0 does it."""
        batch, image_tokens, _width = hidden_states.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, projected.shape[1], attn.heads, -1).transpose(1, 2)  # (B, H, N, D / H)

        query, key, value = (
            torch.cat([norm(heads(image(hidden_states))), added_norm(heads(text(encoder_hidden_states)))], dim=2)
            for image, norm, text, added_norm in (
                (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
                (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
                (attn.to_v, nn.Identity(), attn.add_v_proj, nn.Identity()),
            )
        )
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        bias = logits.new_zeros(logits.shape[-1])
        bias[-1] = math.log(T5_TOKENS)
        joint = (logits + bias).softmax(-1).to(value.dtype) @ value
        joint = joint.transpose(1, 2).reshape(batch, -1, hidden_states.shape[-1])
        image, text = joint[:, :image_tokens], joint[:, image_tokens:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def build_optimizers(transformer: nn.Module, stage: Stage, *, factor: float = 1.0) -> tuple[Optimizer, Optimizer]:
    """Muon for the matrices of attention and feed-forward, AdamW for all else; `factor` is on both peak rates."""
    named = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and (".attn." in name or ".ff" in name)]
    others = [p for name, p in named if not (p.ndim == 2 and (".attn." in name or ".ff" in name))]
    return (
        Muon(matrices, lr=factor * MUON_RATE, weight_decay=stage.weight_decay),
        AdamW(
            others, lr=factor * stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay, foreach=True
        ),
    )


def stratified_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Sigmas (count,), logit-normal and shifted, one from each of `count` equal slices of the distribution."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    sigmas: Tensor = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)).sigmoid()
    return SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)


def train_flow(
    folder: Path,
    *,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    clip: CLIPModel,
    device: torch.device,
    stage: Stage = STAGE,
    begin: Path | None = None,
    preview: Path | None = None,
    drawers: int = 0,
) -> tuple[SD3Transformer2DModel, nn.ModuleList]:
    """Train the denoiser, resumably in `folder`; it with its averaged weights, and the text encoders.

    `begin` is a pipeline's folder, whose denoiser is trained on in place of a new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    indices = range(SCENES)
    path = folder / "flow-latents.npy"
    cache_latents(path, vae, indices=indices, device=device)
    latents = np.load(path, mmap_mode="r")
    towers = build_towers(text_encoder, clip).to(device)
    encoded = EncodedCaptions(towers)
    transformer = (trained_transformer(begin) if begin else build_transformer()).to(device)
    usual = transformer.attn_processors
    transformer.set_attn_processor(LastCountsForAll())

    def loss_at(step: int, progress: float) -> Tensor:
        chosen, captions = batches(step)
        generator = torch.Generator().manual_seed(random.Random(f"flow noise {step}").getrandbits(40))
        mean, std = torch.from_numpy(latents[chosen].astype(np.float32)).unbind(1)  # (B, 4, 16, 16) each
        clean = (mean + std * torch.randn(mean.shape, generator=generator)).to(device)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        sigmas = stratified_sigmas(len(chosen), generator).to(device)
        column = sigmas.view(-1, 1, 1, 1)
        states, pooled = encoded(captions)
        with autocast(device):
            velocity: Tensor = transformer(
                hidden_states=(1 - column) * clean + column * noise,
                timestep=1000 * sigmas,
                encoder_hidden_states=states,
                pooled_projections=pooled,
            ).sample.float()
        return F.mse_loss(velocity, noise - clean)

    def write_preview(module: nn.Module) -> None:
        if preview is not None:
            assemble_flow_pipeline(preview, vae=vae, transformer=transformer, towers=towers, shift=SHIFT)

    with Ahead(Captioned(indices=indices, batch_size=BATCH_SIZE, rank=0), processes=drawers) as batches:
        optimizers = build_optimizers(transformer, stage, factor=RATE_OF_TRAINED if begin else 1.0)
        fit(
            stage,
            transformer,
            loss_at,
            folder,
            optimizers=optimizers,
            on_save=write_preview,
            save_every_seconds=300,
        )
    transformer.set_attn_processor(usual)
    return transformer, towers
