"""Sampling from a pipeline loaded once: in a lane's worker, or as a Ray actor."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dreambooth.config.bounds import Graph
from dreambooth.errors import InputError
from dreambooth.sampling.behind import behind
from dreambooth.sampling.class_images import PriorPlan, generate_block, image_name
from pipelines.cluster.collector import collect_less_garbage
from pipelines.cluster.logs import log
from pipelines.cluster.metrics import record
from pipelines.cluster.processor import make_room
from pipelines.storage.files import exists, join, read_bytes, write_bytes
from pipelines.tasks import BankAddress, EncoderAddress, MaskedPicture, Measured, SampleRequest, Source, picture_name
from pipelines.worker.held_pipeline import HeldPipeline

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dreambooth.evaluation.bank import Bank, ImageEmbeddings
    from dreambooth.evaluation.further import FurtherEncoder
    from dreambooth.evaluation.patches import MaskedPhotograph
    from dreambooth.sampling.pictures import Pictures


class ImageSampler:
    """Samples from one pipeline at a time.

    `use_gpu` moves it to this actor's GPU; on a CPU it runs on `num_threads`. The caller chooses the dtype. `graph` is
    `cluster.graph_sampling`.
    """

    def __init__(self, *, use_gpu: bool, num_threads: int = 1, graph: Graph = "off") -> None:
        collect_less_garbage()
        import torch

        from dreambooth.quiet import quiet
        from dreambooth.sampling.graphs import graphs_for

        quiet()
        torch.set_num_threads(num_threads)
        self._device = "cuda" if use_gpu else "cpu"
        self._pipeline = HeldPipeline(self._device)
        self._graphs = graphs_for(graph, self._device, lambda reason: log("sampling not graphed", reason=reason))
        self._bank: tuple[BankAddress, Bank] | None = None
        self._further: dict[EncoderAddress, FurtherEncoder] = {}

    def ready(self) -> None:
        """Return once the actor is up."""

    def unload(self) -> None:
        """Free the pipeline, its captured steps and encoders; the next call loads them again."""
        self._pipeline, self._bank, self._further = HeldPipeline(self._device), None, {}
        if self._graphs is not None:
            self._graphs.forget()

    def make_room(self, needed: int) -> None:
        """Unload unless the GPU has room for `needed` bytes, which are those of other work and of what is loaded."""
        if self._pipeline.loaded or self._bank is not None or self._further:
            make_room(self._device, needed, self._give_way)

    def _give_way(self) -> None:
        log("sampler unloaded", reason="the GPU has no room for training beside it")
        self.unload()

    def class_images(
        self,
        source: Source,
        plan: PriorPlan,
        blocks: Sequence[range],
        wanted: Sequence[Sequence[int]],
        uri: str,
        made: Callable[[Sequence[int]], bool] = lambda indices: False,
    ) -> list[int]:
        """Make blocks of class images and write those wanted of each; returns their indices.

        A block is written while the next one is sampled. `made` is then called with its indices, and returns whether to
        stop: at most the block that is being sampled is still made.
        """
        pipeline = self._pipeline.get(source, plan.dtype)
        stopping, written = False, list[int]()

        def sampled() -> Iterator[list[Callable[[], int]]]:
            for block, indices in zip(blocks, wanted, strict=True):
                if stopping:
                    return
                pictures = generate_block(pipeline, plan, block, self._graphs)
                yield [partial(_write_class_image, uri, index, pictures, block.index(index)) for index in indices]

        for indices in behind(sampled(), self._device):
            record("dreambooth_class_images_total", len(indices))
            written += indices
            stopping = made(indices) or stopping
        return written

    def samples(self, source: Source, request: SampleRequest, small: Sequence[bytes] = ()) -> list[bytes]:
        """Pictures as PNG, in order; with `small` ones, as PNG, those are scaled up by a cascade's second stage."""
        import torch

        from dreambooth.data.images import png_bytes
        from dreambooth.sampling.sampler import sample_each

        return sample_each(
            png_bytes,
            self._pipeline.get(source, request.dtype),
            request.prompts,
            request.seeds,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            height=request.resolution,
            width=request.resolution,
            dtype=getattr(torch, request.dtype),
            images=_opened(small) or None,
            graphs=self._graphs,
        )

    def measured(
        self,
        source: Source,
        request: SampleRequest,
        uri: str,
        bank: BankAddress | None,
        instance: Sequence[bytes] = (),
        masked: Sequence[MaskedPicture] = (),
    ) -> "Measured | None":
        """Measure the pictures `0.png`, `1.png`, … at `uri`, sampling missing ones; `instance` are real ones.

        A complete set is not sampled again. `masked` are the real ones that have masks. Without a bank pictures are
        made, and nothing is measured.
        """
        addresses = [join(uri, picture_name(place)) for place in range(len(request.seeds))]
        if all(exists(address) for address in addresses):
            pictures = [read_bytes(address) for address in addresses]
        else:
            pictures = self.samples(source, request)
            for address, picture in zip(addresses, pictures, strict=True):
                write_bytes(address, picture)
        if bank is None:
            return None
        images, encoders = _opened(pictures), self._bank_at(bank)
        distances = encoders.perceptual_distances([*images, *_opened(instance)])
        return Measured(
            bank=encoders.hash,
            embeddings=self._embedded(images, bank),
            distances=distances[: len(images)],
            to_subject=self._to_subject(images, _opened_masked(masked), bank) if masked else {},
        )

    def seen(self, pictures: Sequence[bytes], bank: BankAddress) -> "Measured":
        """Measure pictures in memory."""
        images, encoders = _opened(pictures), self._bank_at(bank)
        return Measured(
            bank=encoders.hash,
            embeddings=self._embedded(images, bank),
            distances=encoders.perceptual_distances(images),
        )

    def texts(self, texts: Sequence[str], bank: BankAddress) -> "Tensor":
        """Embeddings of texts: (M, D2). Raises InputError for a bank without CLIP, and for a text too long for it."""
        return self._bank_at(bank).embed_texts(texts)

    def texts_if_read(self, texts: Sequence[str], bank: BankAddress) -> "Tensor | None":
        """`texts`, or None where the bank can't read one of them."""
        try:
            return self.texts(texts, bank)
        except InputError:
            return None

    def give_weights(self, source: Source, base: Source, state: dict[str, Any]) -> None:
        """Make `source` the base's pipeline with these trained weights, an engine's state_dict."""
        self._pipeline.give(source, base, state)

    def _embedded(self, images: "Sequence[Image]", address: BankAddress) -> "ImageEmbeddings":
        """Embeddings by a bank and the encoders beside it."""
        further = {each.name: self._further_at(each).encode(images) for each in address.further}
        return dataclasses.replace(self._bank_at(address).embed_images(images), further=further)

    def _to_subject(
        self, images: "Sequence[Image]", photographs: "Sequence[MaskedPhotograph]", address: BankAddress
    ) -> "dict[str, Tensor]":
        """Masked patch similarities (N, M) by a bank's DINO and the encoders beside it that have patches."""
        found = {"dino": self._bank_at(address).subject_similarities(images, photographs)}
        for each in address.further:
            if (similar := self._further_at(each).subject_similarities(images, photographs)) is not None:
                found[each.name] = similar
        return found

    def _further_at(self, address: EncoderAddress) -> "FurtherEncoder":
        """The encoder at an address; all of them stay loaded."""
        if address not in self._further:
            from dreambooth.evaluation.further import load_further

            encoder = load_further(address.name, address.address, device=self._device)
            _check_hash(address.name, encoder.hash, address.hash)
            self._further[address] = encoder
        return self._further[address]

    def _bank_at(self, address: BankAddress) -> "Bank":
        """The bank at an address; the last one stays loaded."""
        where = dataclasses.replace(address, further=(), hash=None)
        if self._bank is None or self._bank[0] != where:
            from dreambooth.evaluation.bank import BankLocations
            from dreambooth.evaluation.banks import load_bank

            locations = BankLocations(dino=address.dino, clip=address.clip, lpips=address.lpips)
            self._bank = where, load_bank(address.name, device=self._device, locations=locations)
        bank = self._bank[1]
        if address.hash is not None:
            _check_hash(address.name, bank.hash, address.hash)
        return bank


def _write_class_image(uri: str, index: int, pictures: "Pictures", place: int) -> int:
    from dreambooth.data.images import png_bytes

    write_bytes(join(uri, image_name(index)), png_bytes(pictures[place]))
    return index


def _check_hash(name: str, here: str, expected: str) -> None:
    if here != expected:
        raise RuntimeError(f"the encoders of {name} have hash {here} here, and {expected} at the driver; use one copy")


def _opened(pictures: Sequence[bytes]) -> "list[Image]":
    from PIL import Image

    return [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]


def _opened_masked(photographs: Sequence[MaskedPicture]) -> "list[MaskedPhotograph]":
    from PIL import Image

    from dreambooth.evaluation.patches import MaskedPhotograph

    pictures = _opened([each.picture for each in photographs])
    masks = [Image.open(io.BytesIO(each.mask)) for each in photographs]
    return [MaskedPhotograph(picture=picture, mask=mask) for picture, mask in zip(pictures, masks, strict=True)]
