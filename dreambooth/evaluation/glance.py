"""What the short evaluation looks with: an image encoder, and the miniature's CLIP beside its ViT."""

from collections.abc import Mapping, Sequence

from PIL import Image

from dreambooth.errors import InputError
from dreambooth.evaluation.banks import load_bank
from dreambooth.evaluation.encoders import load_image_encoder
from dreambooth.evaluation.short import Glance

_FIDELITY = ("instance", "samples", "class_before", "class_after")


def look(
    encoder: str, sets: Mapping[str, Sequence[Image.Image]], texts: Sequence[str], *, device: str = "cpu"
) -> Glance:
    """Look at sets of pictures, named as in `Glance`, with the image encoder at an address.

    The miniature's ViT is trained to see past the scene, so its CLIP, which comes with it, looks at that.
    """
    both = [*sets["samples"], *sets["instance"]]
    if encoder != "miniature":
        vit = load_image_encoder(encoder, device=device)
        return Glance(
            images={name: vit.encode(sets[name]) for name in _FIDELITY}, distances=vit.perceptual_distances(both)
        )
    bank = load_bank("miniature", device=device)
    seen = {name: bank.embed_images(images) for name, images in sets.items()}
    try:
        embedded = bank.embed_texts(texts)
    except InputError:  # longer than CLIP reads; pictures have to do
        embedded = None
    return Glance(
        images={name: seen[name].dino for name in _FIDELITY},
        distances=bank.perceptual_distances(both),
        clip={name: seen[name].clip for name in ("instance", "samples", "base")},
        texts=embedded,
    )
