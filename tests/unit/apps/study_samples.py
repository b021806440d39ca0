"""Samples of two models to compare in a study."""

import io

from PIL import Image, PngImagePlugin

from pipelines.apps.study.study import SubjectSamples


def picture(*colour: int, **said: str) -> bytes:
    buffer, more = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, value in said.items():
        more.add_text(name, value)
    Image.new("RGB", (8, 8), tuple(colour)).save(buffer, "PNG", pnginfo=more)
    return buffer.getvalue()


def samples(side: int, *, subject: str = "rex", prompts: int = 3, images: int = 4) -> SubjectSamples:
    """Pictures whose red says whose they are."""
    return SubjectSamples(
        subject=subject,
        class_noun="dog",
        references=(picture(0, 0, 255),),
        samples={
            f"a photo of [V] dog, {prompt}": tuple(picture(side, prompt, image) for image in range(images))
            for prompt in range(prompts)
        },
    )


A, B = {"rex": samples(10)}, {"rex": samples(20)}
