"""Settings of instance images: what is cut from photographs, how often each comes up, and their masks."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dreambooth.config.bounds import Count, Number, Pixels, Repeats, Resolution, Whole
from dreambooth.config.subject import Frozen


class ImagesConfig(Frozen):
    """Cutting instance images into squares or, with aspect_buckets, rectangles of pixels."""

    later: ClassVar = ("repeats", "aspect_buckets", "masks")

    resolution: Resolution | None = Field(None, description="side of the squares in pixels; null: the base model's own")
    aspect_buckets: bool = Field(
        False,
        description="photographs cropped to the size nearest in aspect ratio, of several with about resolution² "
        "pixels, instead of to squares; a micro batch has photographs of one size; class images and samples are square",
    )
    bucket_step: Pixels | None = Field(
        None,
        description="pixels of which all sides are multiples; null: an eighth of resolution, at most 64",
    )
    bucket_max_aspect_ratio: Number = Field(
        2.0, ge=1, le=8, description="largest aspect ratio of the sizes, longer side over shorter"
    )
    crop: Literal["center", "random"] = Field("center", description="position of the crop in a photograph")
    crops_per_image: Count = Field(8, description="random crops encoded per image; one with center")
    flip: bool = Field(False, description="training on mirrored images; wrong for subjects with a left and a right")
    repeats: dict[str, Repeats] = Field(
        {},
        description="uses of single photographs per epoch, by file name: {a.jpg: 3}; others: once",
    )
    masks: Literal["off", "weight", "crop"] = Field(
        "off",
        description="use of the subject's masks (photo.mask.png, masks/photo.png or an alpha channel): with weight the "
        "loss outside counts less, with crop photographs are cut to the subject",
    )
    mask_background: Number = Field(
        0.1, ge=0, le=1, description="weight of the loss outside the subject, relative to inside, with masks weight"
    )
    max_pixels: Whole = Field(
        50_000_000, ge=1, le=2**31, description="largest image accepted, in pixels; checked before decoding"
    )

    @property
    def masked(self) -> "ImagesConfig | None":
        """These settings if masks are used, or None."""
        return None if self.masks == "off" else self

    @model_validator(mode="after")
    def _buckets_are_on(self) -> Self:
        for name in () if self.aspect_buckets else ("bucket_step", "bucket_max_aspect_ratio"):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value}, but aspect_buckets is off, so photographs are cut to squares; set "
                    f"aspect_buckets to true, or leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def _background_has_masks(self) -> Self:
        default = type(self).model_fields["mask_background"].default
        if self.masks != "weight" and self.mask_background != default:
            raise ValueError(
                f"mask_background is {self.mask_background}, but masks is {self.masks}, so nothing is weighted; set "
                f"masks to weight, or leave mask_background out"
            )
        return self
