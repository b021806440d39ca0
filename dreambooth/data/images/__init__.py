"""Instance images: found, checked for damage, decoded, brought to sRGB and cut.

Image files often differ from what their names promise: phones rotate by a tag, scans are CMYK, drawings are
transparent, downloads stop halfway. So every image is decoded before any work starts, all faults are reported at once,
and the result is always upright opaque 8-bit sRGB.
"""

from dreambooth.data.images.cutting import Cut, Size, cuts, png_bytes, to_pixels
from dreambooth.data.images.decoding import Decoded, decode, decode_image, open_image, read_image
from dreambooth.data.images.finding import InstanceImage, Search, find_instance_images, search_images

__all__ = [
    "Cut",
    "Decoded",
    "InstanceImage",
    "Search",
    "Size",
    "cuts",
    "decode",
    "decode_image",
    "find_instance_images",
    "open_image",
    "png_bytes",
    "read_image",
    "search_images",
    "to_pixels",
]
