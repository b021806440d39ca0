"""What a family of base models says of itself, and what all of them do alike."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dreambooth.config.train import RATES_OF_TEXT_ENCODER
from dreambooth.errors import InputError
from dreambooth.models.component import Component
from dreambooth.models.config_fields import Field, read_json
from dreambooth.models.families.defaults import Defaults
from dreambooth.models.families.no_text import zero_without_text
from dreambooth.models.families.other_programs import OtherPrograms
from dreambooth.models.families.parts import Parts
from dreambooth.models.families.schedulers import SAMPLER_NAMES
from dreambooth.models.families.served import Served
from dreambooth.models.families.tokenizers import VOCABULARIES

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from dreambooth.config.train import TrainConfig
    from dreambooth.models.base_settings import BaseSettings
    from dreambooth.models.families.computed_once import KeptText
    from dreambooth.models.process import Process

Tensors = dict[str, "Tensor"]
"""Named tensors with a batch axis: text, or conditions of the denoiser besides it."""

OWN_SIZE = "_sample_size"
"""Where exports of families without a field for it keep the side of their x0: diffusers passes over such a name."""


class Family(Parts, OtherPrograms, Served, ABC):
    """One family of text-to-image models. Text tensors are named by the text encoder's folder, see `tokenize`."""

    name: str
    pipeline_class: str
    defaults: Defaults
    fields: tuple[Field, ...]
    """Fields of its configuration files that are read before anything is loaded."""
    scales_up: int = 0
    """How many times larger it makes a picture's sides, as the second stage of a cascade; 0: it needs no picture."""
    distilled_guidance: bool = False
    """Whether the guidance scale is an input of its denoiser, which is then asked once a step."""
    only_squares: bool = False
    """Whether its pictures are always square."""
    noise: Literal["diffusion", "rectified flow"] = "diffusion"
    """The kind of its process, which its scheduler has to be of."""
    sampler: str = "DPMSolverMultistepScheduler"
    """Class of the sampler that `pipeline` has."""
    t5_tokens: int = 0
    """Tokens that T5 reads of a text, if the family has one."""
    t5_masked: bool = False
    """Whether T5 takes a mask."""

    @property
    def sampler_name(self) -> str:
        """Name of the sampler in keys and records of pictures."""
        return SAMPLER_NAMES[self.sampler]

    @property
    def min_snr(self) -> bool:
        """Whether min-SNR weighting has a meaning for its process."""
        return self.noise == "diffusion"

    # Configuration, read without importing torch.

    def downscaling(self, settings: "BaseSettings") -> int:
        """Pixels per position of x0 along a side: a VAE halves between its blocks."""
        return int(2 ** (len(settings["vae.block_out_channels"]) - 1))

    def side_multiple(self, settings: "BaseSettings") -> int:
        """Pixels that a picture's sides have to be a multiple of."""
        return self.downscaling(settings)

    def largest_side(self, settings: "BaseSettings") -> int | None:
        """Pixels of the longest side that the denoiser has positions for; None: there is no limit."""
        return None

    @abstractmethod
    def channels(self, settings: "BaseSettings") -> int:
        """Channels of x0."""

    @abstractmethod
    def resolution(self, settings: "BaseSettings") -> int:
        """Side in pixels of its training images. Raises InputError if the configuration has none."""

    @abstractmethod
    def set_resolution(self, config: dict[str, Any], positions: int) -> dict[str, Any]:
        """The denoiser's configuration for pictures of `positions` positions of x0 a side by default."""

    def defaults_of(self, settings: "BaseSettings") -> Defaults:
        """Settings that suit a base model, by its configuration."""
        return self.defaults

    def check_trainable(self, settings: "BaseSettings") -> None:
        """Raise InputError for a denoiser with inputs that training doesn't give."""

    def reads_text(self, config: Mapping[str, Any]) -> bool:
        """Whether a denoiser with this configuration makes anything of the text that it is given."""
        return True

    def warning(self, settings: "BaseSettings") -> str | None:
        """A warning about a base that can't be learnt in full, by its noise schedule or a missing part, or None."""
        return None

    # Text.

    def run_text_encoders(self, directory: Path, train: "TrainConfig") -> tuple[str, ...]:
        """`chosen_text_encoders` of the base in a directory."""
        return self.chosen_text_encoders([part.folder for part in self.text_encoders(directory)], train)

    def chosen_text_encoders(self, present: Sequence[str], train: "TrainConfig") -> tuple[str, ...]:
        """Folders, of those `present`, of the text encoders that every training step runs, by `train.text_encoders`.

        Others are frozen. Textual Inversion runs them for the identifier's embedding. Raises InputError for a folder
        that the base lacks.
        """
        wanted: Sequence[str] = self.defaults.text_encoders
        if train.method == "textual_inversion":
            wanted = self.defaults.text_encoders or present[:1]
        elif train.text_encoders != "auto":
            named = {"all": present, "none": ()}
            wanted = named[train.text_encoders] if isinstance(train.text_encoders, str) else train.text_encoders
            if unknown := [folder for folder in wanted if folder not in present]:
                raise InputError(
                    f"train.text_encoders names {', '.join(unknown)}, but the base model has {', '.join(present)}"
                )
        run = tuple(folder for folder in present if folder in wanted)
        for name in () if run else RATES_OF_TEXT_ENCODER:
            if (rate := getattr(train, name)) is not None:
                raise InputError(
                    f"train.{name} is {rate}, but no text encoder of the base model is trained by default; leave it "
                    f"out, or name those to train: train.text_encoders [{', '.join(present)}]"
                )
        return run

    @abstractmethod
    def tokenizer(self, directory: Path, folder: str = "tokenizer") -> "PreTrainedTokenizerBase":
        """A tokenizer, cached while its files stay unchanged. Raises InputError for invalid files."""

    @abstractmethod
    def tokenize(self, directory: Path, prompts: Sequence[str]) -> Tensors:
        """Token ids (N, L) of prompts as `<text encoder>.input_ids`, and masks as `….attention_mask` if it takes any.

        Padded and truncated as the base model was trained.
        """

    def tokens_read(self, part: Component, tokenizer: "PreTrainedTokenizerBase") -> int:
        """Tokens that a text encoder reads of a text, its own marks among them."""
        return self.t5_tokens if part.kind.startswith("T5") else int(tokenizer.model_max_length)

    def blank_tokens(self, directory: Path) -> Tensors:
        """`tokenize`'s tensors (1, L) of some text, for their shapes alone: also where tokenizers are missing."""
        import torch

        folders = [directory / part.folder for part in self.role("tokenizer")]
        if all(any((folder / name).is_file() for name in VOCABULARIES) for folder in folders if folder.is_dir()):
            return self.tokenize(directory, [""])
        tokens: Tensors = {}
        for part in self.text_encoders(directory):
            is_t5 = part.kind.startswith("T5")
            positions = read_json(directory / part.folder / "config.json").get("max_position_embeddings", 77)
            length = self.t5_tokens if is_t5 else int(positions)
            tokens[f"{part.folder}.input_ids"] = torch.zeros(1, length, dtype=torch.int64)
            if is_t5 and self.t5_masked:
                tokens[f"{part.folder}.attention_mask"] = torch.ones(1, length, dtype=torch.int64)
        return tokens

    @abstractmethod
    def encode_with(self, folder: str, text_encoder: "nn.Module", tokens: Tensors) -> Tensors:
        """A text encoder's `<folder>.states` (N, L, D) and `<folder>.pooled` (N, D) of `tokenize`'s tensors."""

    @abstractmethod
    def join(self, encoded: Tensors) -> Tensors:
        """The denoiser's `states` (N, L, D) and, if it takes it, `pooled` (N, D), from all that `encode_with` gave."""

    def encode_text(self, text_encoders: "Mapping[str, nn.Module]", text: Tensors) -> Tensors:
        """The denoiser's text, of `text`: tokens of the encoders given, and what the others (frozen) gave before."""
        encoded = dict(text)
        for folder, module in text_encoders.items():
            encoded |= self.encode_with(folder, module, text)
        return zero_without_text(self.join(encoded), text)

    def no_text_is_zero(self, directory: Path) -> bool:
        """Whether its pipeline takes zeros for no text, instead of the states of ""."""
        return False

    # Images.

    def encode_images(self, vae: Any, pixels: "Tensor") -> "tuple[Tensor, Tensor]":
        """Posterior mean and std (N, C, H, W) of x0, in the denoiser's scale, of pixels (N, 3, H, W) in [-1, 1].

        `vae` is None for a family that works on pixels.
        """
        from dreambooth.models.vae import encode

        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean, std = encode(vae, pixels)
        return (mean - shift) * vae.config.scaling_factor, std * vae.config.scaling_factor

    def conditions(
        self, original: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]], size: tuple[int, int]
    ) -> Tensors:
        """Conditions (N, ...) of N pictures of `size`, height and width in pixels.

        By (height, width) of their photographs, and their (top, left) corners there in pixels of the picture's scale.
        """
        return {}

    def draw_conditions(self, process: "Process", x0: "Tensor", conditions: Tensors, rng: "Generator") -> Tensors:
        """Conditions of one image x0 (C, H, W) in one training step, random ones among them."""
        return conditions

    # Noise and denoiser.

    @abstractmethod
    def process(self, directory: Path, shape: tuple[int, int, int]) -> "Process":
        """The noise process of a base model for x0 of `shape` (C, H, W)."""

    @abstractmethod
    def arguments(
        self, config: Any, noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> dict[str, Any]:
        """The denoiser's arguments by name, as the diffusers pipeline passes them.

        `config` is the denoiser's; noisy (N, C, H, W) at moments timesteps (N,) of the process.
        """

    def prediction(self, output: "Tensor", like: "Tensor") -> "Tensor":
        """The denoiser's output in the shape of the noisy x0 `like`."""
        return output

    def denoise(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", text: Tensors, conditions: Tensors
    ) -> "Tensor":
        """model_pred (N, C, H, W)."""
        arguments = self.arguments(denoiser.config, noisy, timesteps, text, conditions)
        return self.prediction(denoiser(**arguments, return_dict=False)[0], noisy)

    def finish_export(self, directory: Path) -> None:
        """Change settings in an exported directory that training made untrue."""

    def check_noise_levels(self, directory: Path, levels: int) -> None:
        """Raise InputError if a base that scales up pictures can't have so many levels of their noise."""

    def set_noise_levels(self, directory: Path, levels: int) -> None:
        """Name the levels of noise of pictures that an exported directory scales up, see `super_resolution`."""

    def sample_noise_levels(self, pipeline: Any, levels: int) -> None:
        """Have a loaded pipeline sample as one that was exported with `set_noise_levels`."""

    # Sampling.

    @abstractmethod
    def pipeline(self, directory: Path, modules: Mapping[str, Any]) -> Any:
        """The diffusers pipeline of components by folder, with the sampler that suits it and no safety checker."""

    @abstractmethod
    def prompt_arguments(self, pipeline: Any, prompts: Sequence[str], *, guided: bool) -> Tensors:
        """Arguments (N, ...) of a pipeline's call for prompts, each text encoded once, and of no text if `guided`."""

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Further arguments of a pipeline's call."""
        return {"guidance_scale": guidance_scale}

    def guidance_scale(self, config: Mapping[str, Any]) -> float:
        """The guidance scale of a second stage, by its denoiser's configuration: 1 if there is no text to guide it."""
        return self.defaults.guidance_scale if self.reads_text(config) else 1.0

    def image_arguments(self, pipeline: Any, images: Sequence["Image"]) -> dict[str, Any]:
        """Arguments of a pipeline's call for the pictures that it scales up."""
        return {"image": list(images)}

    def guides(self, guidance_scale: float) -> bool:
        """Whether a denoiser is evaluated with and without text (arXiv 2207.12598)."""
        return guidance_scale > 1 and not self.distilled_guidance

    def guided(self, pipeline: Any, guidance_scale: float) -> bool:
        """`guides` of the denoiser of a pipeline."""
        return self.guides(guidance_scale)

    def computed_once(
        self, denoiser: "nn.Module", *, guided: bool, kept: "KeptText | None" = None
    ) -> AbstractContextManager[None]:
        """A context within which sampling computes once what a denoiser would compute at every step.

        With `kept` that lies there, for steps that are replayed.
        """
        return nullcontext()

    output_type = "latent"
    """What a pipeline's call is asked for, to be decoded by `decode`."""

    def decode(self, pipeline: Any, x0: "Tensor", *, height: int | None, width: int | None) -> "Tensor":
        """Pixels (N, 3, H, W) in [-1, 1] of a pipeline's output x0; inverts `encode_images`.

        `height` and `width` in pixels as in the call, None for the pipeline's own.
        """
        from dreambooth.models.vae import decode

        vae = pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return decode(vae, x0.to(vae.dtype) / vae.config.scaling_factor + shift)
