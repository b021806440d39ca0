"""Aspect buckets: the sizes that photographs are cut to, of about as many pixels as the base model's squares.

As in arXiv 2307.01952, section 2.3. A size never has more pixels than the square, so a step takes no more memory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from PIL import Image

from dreambooth.amounts import counted
from dreambooth.config.images import ImagesConfig
from dreambooth.data.images import Size
from dreambooth.data.images.masks import Box, Mask
from dreambooth.errors import InputError
from dreambooth.models.base_settings import BaseSettings

_LARGEST_STEP, _STEPS = 64, 8
"""The usual step in pixels, and steps in a side where that would be too coarse."""


def bucket_sizes(resolution: int, *, step: int, max_aspect_ratio: float) -> tuple[Size, ...]:
    """The square, and for every shorter side in steps the longest side of no more pixels, upright and lying.

    >>> bucket_sizes(512, step=64, max_aspect_ratio=2.0)
    ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    """
    sizes = {(resolution, resolution)}
    for shorter in range(step, resolution, step):
        longer = resolution**2 // shorter // step * step
        if shorter < longer <= max_aspect_ratio * shorter:
            sizes |= {(shorter, longer), (longer, shorter)}
    return tuple(sorted(sizes))


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to a picture's, as a factor; of two alike, the first.

    >>> nearest_size(3000, 2000, [(512, 512), (448, 576), (384, 640)])
    (384, 640)
    """

    def factor(size: Size) -> float:
        ratio = (width * size[0]) / (height * size[1])
        return max(ratio, 1 / ratio)

    return min(sizes, key=factor)


def region(picture: Image.Image, mask: Mask | None, masked: ImagesConfig | None, resolution: int) -> Box:
    """The box of a photograph that training cuts from: all of it, or with masks crop what is around the subject."""
    if mask is None or masked is None or masked.masks != "crop":
        return 0, 0, picture.width, picture.height
    return mask.box(resolution)


def size_for(box: Box, sizes: Sequence[Size]) -> Size:
    """The nearest size to a box."""
    left, top, right, bottom = box
    return nearest_size(right - left, bottom - top, sizes)


def sizes_of(images: ImagesConfig, base: BaseSettings) -> tuple[Size, ...]:
    """All sizes that photographs may be cut to: one square, or with `images.aspect_buckets` several sizes.

    Raises InputError for sides that the denoiser can't divide, or a family of squares alone.
    """
    resolution = images.resolution or base.resolution
    base.check_side(resolution, "images.resolution")
    if not images.aspect_buckets:
        return ((resolution, resolution),)
    if base.family.only_squares:
        raise InputError(
            f"images.aspect_buckets is on, but {base.family.name} makes pictures that are always square; leave it out"
        )
    step = _step(images, base)
    base.check_side(step, "images.bucket_step")
    sizes = bucket_sizes(resolution, step=step, max_aspect_ratio=images.bucket_max_aspect_ratio)
    longest = base.family.largest_side(base)
    return tuple(size for size in sizes if longest is None or max(size) <= max(longest, resolution))


def with_base(images: ImagesConfig, base: BaseSettings) -> ImagesConfig:
    """The settings of images with what the base model decides, where nothing is set."""
    chosen = {"resolution": images.resolution or base.resolution}
    if images.aspect_buckets:
        chosen["bucket_step"] = _step(images, base)
    return images.model_copy(update=chosen)


def _step(images: ImagesConfig, base: BaseSettings) -> int:
    """The step in pixels: as it is set, or 64, less below 512 pixels, and a multiple that the denoiser can divide."""
    if images.bucket_step is not None:
        return images.bucket_step
    multiple = base.family.side_multiple(base)
    step = min(_LARGEST_STEP, (images.resolution or base.resolution) // _STEPS)
    return max(step // multiple, 1) * multiple


def describe_sizes(sizes: Iterable[Size]) -> str:
    """How many photographs have each size, as width x height, the most first.

    >>> describe_sizes([(512, 512), (576, 448), (512, 512)])
    '2 photographs at 512x512, 1 at 448x576'
    """
    (first, count), *others = Counter(sizes).most_common()
    shown = [f"{counted(count, 'photograph')} at {_shown(first)}"]
    return ", ".join([*shown, *(f"{times} at {_shown(size)}" for size, times in others)])


def _shown(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
