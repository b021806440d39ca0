"""PixArt-Sigma: a transformer on the latents of SDXL's VAE, with T5's states and a diffusion process."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreambooth.errors import InputError
from dreambooth.models.component import VAE, Component, denoiser_part, scheduler_part, tokenizer_part
from dreambooth.models.config_fields import COUNT, Field, flag, or_null, whole
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.family import OWN_SIZE, Family, Tensors
from dreambooth.models.families.stable_diffusion import SCHEDULE_FIELDS, VAE_FIELDS, dpm_solver, field, load_diffusion
from dreambooth.models.families.t5_text import t5_part
from dreambooth.models.families.tokenizers import each_once, load_tokenizer, padded_with_mask, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.process import Process

_TRANSFORMER = "transformer/config.json"


class PixArtSigma(Family):
    """PixArtTransformer2DModel, which predicts noise and, in further channels, a variance that isn't used."""

    name = "PixArt-Sigma"
    pipeline_class = "PixArtSigmaPipeline"
    components: tuple[Component, ...] = (
        denoiser_part("transformer", "PixArtTransformer2DModel", buffers=("pos_embed.pos_embed",)),
        t5_part("text_encoder"),
        VAE,
        tokenizer_part("tokenizer", "T5Tokenizer"),
        scheduler_part("DDPMScheduler"),
    )
    defaults = Defaults(text_encoders=(), num_inference_steps=20, guidance_scale=4.5)
    fields: tuple[Field, ...] = (
        field(_TRANSFORMER, "sample_size", 128, COUNT, whole),
        field(_TRANSFORMER, OWN_SIZE, None, f"null or {COUNT}", or_null(whole)),
        field(_TRANSFORMER, "patch_size", 2, COUNT, whole),
        field(_TRANSFORMER, "in_channels", 4, COUNT, whole),
        field(_TRANSFORMER, "use_additional_conditions", None, "true, false or null", or_null(flag)),
        *VAE_FIELDS,
        *SCHEDULE_FIELDS,
    )
    t5_tokens = 300
    t5_masked = True
    called_with: ClassVar[Mapping[str, Any]] = {"clean_caption": False, "use_resolution_binning": False}

    def side_multiple(self, settings: "BaseSettings") -> int:
        """Positions of a latent are read in patches."""
        return int(settings["transformer.patch_size"]) * self.downscaling(settings)

    def channels(self, settings: "BaseSettings") -> int:
        """Channels of a latent."""
        return int(settings["transformer.in_channels"])

    def resolution(self, settings: "BaseSettings") -> int:
        """Pixels that an export of ours names, or those of the transformer's sample_size."""
        positions = settings[f"transformer.{OWN_SIZE}"] or settings["transformer.sample_size"]
        return int(positions) * self.downscaling(settings)

    def set_resolution(self, config: dict[str, Any], positions: int) -> dict[str, Any]:
        """Write the side apart from sample_size, which scales the position embeddings: those stay as trained."""
        return config | {OWN_SIZE: positions}

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Refuse conditions on size and aspect ratio, which PixArtSigmaPipeline doesn't give either."""
        conditions, side = settings["transformer.use_additional_conditions"], settings["transformer.sample_size"]
        if conditions or (conditions is None and side == 128):  # null means so in diffusers
            raise InputError(
                f"{settings.directory / _TRANSFORMER}: use_additional_conditions is {conditions} at sample_size "
                f"{side}, so the transformer takes sizes as inputs; expected false, as in PixArt-Sigma's own"
            )

    def partly_without_gradient(self, denoiser: "nn.Module") -> Iterable[str]:
        """The last layer, some of whose rows give the variance."""
        return "proj_out.weight", "proj_out.bias"

    # Text.

    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """T5's tokenizer, cut at 300 tokens."""
        tokenizer = load_tokenizer(directory, "T5Tokenizer", folder)
        tokenizer.model_max_length = self.t5_tokens
        return tokenizer

    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids and masks (N, 300) of prompts in lower case."""
        prompts = [prompt.lower().strip() for prompt in prompts]
        ids, mask = padded_with_mask(self.tokenizer(directory), prompts)
        return {"text_encoder.input_ids": ids, "text_encoder.attention_mask": mask}

    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """States (N, 300, D), and the mask, which the transformer's attention needs too."""
        mask = tokens[f"{folder}.attention_mask"]
        readable = None if mask.is_meta else mask  # its values would be looked at
        states = text_encoder(tokens[f"{folder}.input_ids"], attention_mask=readable).last_hidden_state
        return {f"{folder}.states": states, f"{folder}.mask": mask}

    def join(self, encoded: Tensors) -> Tensors:
        """The only states, and their mask."""
        return {"states": encoded["text_encoder.states"], "mask": encoded["text_encoder.mask"]}

    # Noise and denoiser.

    def process(self, directory: Path, shape: tuple[int, int, int]) -> "Process":
        """The diffusion of the base's scheduler."""
        return load_diffusion(directory)

    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """Noisy latents, integer timesteps, states with their mask, and no conditions on size."""
        return {
            "hidden_states": noisy,
            "timestep": timesteps,
            "encoder_hidden_states": text["states"],
            "encoder_attention_mask": text["mask"],
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def prediction(self, output: "Tensor", like: "Tensor") -> "Tensor":
        """Without the variance in the second half of the channels."""
        return output[:, : like.shape[1]]

    # Sampling.

    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """PixArtSigmaPipeline with DPM-Solver++, as its repositories have it."""
        from diffusers import PixArtSigmaPipeline

        tokenizer = read_tokenizer(directory, "T5Tokenizer", "tokenizer")
        return PixArtSigmaPipeline(**modules, tokenizer=tokenizer, scheduler=dpm_solver(directory))

    def prompt_arguments(self, pipeline: Any, prompts: Sequence[str], *, guided: bool) -> Tensors:
        """prompt_embeds and negative_prompt_embeds, with their masks."""
        texts, places = each_once([*prompts, ""])
        states, mask, _, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=pipeline.device, max_sequence_length=self.t5_tokens
        )
        chosen, nothing = places[:-1], places[-1:] * len(prompts)
        return {
            "prompt_embeds": states[chosen],
            "prompt_attention_mask": mask[chosen],
            "negative_prompt_embeds": states[nothing],
            "negative_prompt_attention_mask": mask[nothing],
        }

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """A picture of the size asked for, not of the nearest in a list and then cut."""
        return {"negative_prompt": None, "guidance_scale": guidance_scale, "use_resolution_binning": False}
