"""The miniature's denoiser and text encoder, trained together on cached latents of captioned scenes.

On a CPU two processes of one thread each, with averaged gradients, do half as much again as one of two threads.
"""

import random
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel

from dreambooth.miniature.pretraining.ahead import Ahead
from dreambooth.miniature.pretraining.assemble import assemble_pipeline
from dreambooth.miniature.pretraining.captions import is_held_out_prompt, sample_caption
from dreambooth.miniature.pretraining.drawing import draw
from dreambooth.miniature.pretraining.photographs import to_pixels
from dreambooth.miniature.pretraining.stage import Stage, autocast, fit
from dreambooth.miniature.pretraining.tokenizer import MAX_LENGTH, build_tokenizer
from dreambooth.miniature.pretraining.train_clip import text_config
from dreambooth.miniature.pretraining.world import Scene, sample_scene

STAGE = Stage(name="unet", steps=3479, minutes=58, learning_rate=1e-3, warmup=200, ema_decay=0.999)
SCENES = 16_000
BATCH_SIZE = 48  # over all processes
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 4 M parameters, with attention where it is cheap: at 8 x 8."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_text_encoder(clip: CLIPModel | None = None) -> CLIPTextModel:
    """The text encoder, with the CLIP's text tower for a start."""
    text_encoder = CLIPTextModel(text_config(build_tokenizer()))
    if clip is not None:
        text_encoder.load_state_dict(clip.text_model.state_dict())
    return text_encoder


def training_scene(index: int) -> Scene:
    """The scene behind the cached latents at `index`: never one of a held-out prompt."""
    rng = random.Random(f"scene {index}")
    while is_held_out_prompt(scene := sample_scene(rng)):
        pass
    return scene


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A batch of the scenes at `indices` for one of the processes: places in `indices`, and captions."""

    indices: range
    batch_size: int
    rank: int

    def __call__(self, step: int) -> tuple[list[int], list[str]]:
        """Scenes (by number) and captions of a step, whatever went before it."""
        rng = random.Random(f"unet {step} {self.rank}")
        chosen = [rng.randrange(len(self.indices)) for _ in range(self.batch_size)]
        captions = [sample_caption(rng, training_scene(self.indices[place])).text for place in chosen]
        return chosen, ["" if rng.random() < CAPTION_DROPOUT else caption for caption in captions]


@torch.no_grad()
def cache_latents(path: Path, vae: AutoencoderKL, *, indices: range, device: torch.device) -> None:
    """Write scaled posterior means and deviations of the scenes, unless there: (scenes, 2, 4, 16, 16) float16."""
    if path.exists():
        return
    latents = np.empty((len(indices), 2, 4, 16, 16), np.float16)
    vae = vae.to(device).eval()
    for start in tqdm(range(0, len(indices), 64), desc="latents", dynamic_ncols=True, disable=indices.start > 0):
        images = [draw(training_scene(index)) for index in indices[start : start + 64]]
        with autocast(device):
            posterior = vae.encode(torch.from_numpy(to_pixels(images)).to(device)).latent_dist
        both = torch.stack([posterior.mean, posterior.std], dim=1).float() * vae.config.scaling_factor
        latents[start : start + len(images)] = both.cpu().numpy().astype(np.float16)
    part = path.with_suffix(".part.npy")
    np.save(part, latents)
    part.rename(path)


@dataclass(frozen=True, kw_only=True)
class UnetRun:
    """Settings of a training process."""

    folder: Path
    stage: Stage
    device: str
    preview: Path | None
    """Where the pipeline as it is so far is written now and then."""
    world_size: int
    port: int
    drawers: int


def train_unet(
    folder: Path,
    *,
    vae: AutoencoderKL,
    clip: CLIPModel,
    device: torch.device,
    processes: int = 1,
    stage: Stage = STAGE,
    preview: Path | None = None,
    drawers: int = 0,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train both, resumably in `folder`, in `processes` processes on a CPU; returns their averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vae.cpu().save_pretrained(folder / "unet-vae")
    torch.save(build_text_encoder(clip).state_dict(), folder / "text-start.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = UnetRun(
        folder=folder,
        stage=stage,
        device=str(device),
        preview=preview,
        world_size=processes,
        port=port,
        drawers=drawers,
    )
    if processes == 1:
        _train(0, run)
    else:
        spawn(_train, (run,), nprocs=processes)
    unet, text_encoder = build_unet(), build_text_encoder()
    state = torch.load(folder / "unet-averaged.pt", weights_only=True)
    unet.load_state_dict(state["unet"])
    text_encoder.load_state_dict(state["text_encoder"])
    return unet, text_encoder


def _train(rank: int, run: UnetRun) -> None:
    if run.world_size > 1:
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{run.port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=run.world_size)
    torch.manual_seed(0)
    device = torch.device(run.device)
    path = run.folder / f"latents-{rank}-of-{run.world_size}.npy"
    indices = range(rank, SCENES, run.world_size)  # of all scenes, this process's share
    cache_latents(path, AutoencoderKL.from_pretrained(run.folder / "unet-vae"), indices=indices, device=device)
    latents = np.load(path, mmap_mode="r")
    tokenizer = build_tokenizer()
    unet, text_encoder = build_unet(), build_text_encoder()
    text_encoder.load_state_dict(torch.load(run.folder / "text-start.pt", weights_only=True))
    text_encoder.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())  # a quarter faster here than fused attention on a CPU
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    alphas: Tensor = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.to(
        device
    )
    batch_size = BATCH_SIZE // run.world_size

    def loss_at(step: int, progress: float) -> Tensor:
        chosen, captions = batches(step)
        generator = torch.Generator().manual_seed(random.Random(f"unet noise {step} {rank}").getrandbits(40))
        mean, std = torch.from_numpy(latents[chosen].astype(np.float32)).unbind(1)  # (B, 4, 16, 16) each
        clean = (mean + std * torch.randn(mean.shape, generator=generator)).to(device)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        # One timestep from each of B equal slices: as uniform as independent ones, with less variance.
        timesteps = (
            ((torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) * 1000 / batch_size)
            .long()
            .to(device)
        )
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        with autocast(device):
            states = text_encoder(tokens.input_ids.to(device)).last_hidden_state
            prediction: Tensor = unet(noisy, timesteps, states).sample.float()
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
        error = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))  # (B,)
        return (weight * error).mean()

    def preview(module: nn.Module) -> None:
        if run.preview is not None:
            unet.set_attn_processor(AttnProcessor2_0())
            vae = AutoencoderKL.from_pretrained(run.folder / "unet-vae")
            assemble_pipeline(run.preview, vae=vae, unet=unet, text_encoder=text_encoder)
            unet.set_attn_processor(AttnProcessor())

    drawn = Captioned(indices=indices, batch_size=batch_size, rank=rank)
    with Ahead(drawn, processes=run.drawers) as batches:
        fit(
            run.stage,
            both,
            loss_at,
            run.folder,
            rank=rank,
            world_size=run.world_size,
            on_save=preview,
            save_every_seconds=300,
        )
    if rank == 0:
        state = {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}
        torch.save(
            {name: {key: value.cpu() for key, value in part.items()} for name, part in state.items()},
            run.folder / "unet-averaged.pt",
        )
    if run.world_size > 1:
        torch.distributed.destroy_process_group()
