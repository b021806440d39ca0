"""Instance images: found, checked for damage, decoded, brought to sRGB and cut into squares.

Can a photograph be trusted to be what its name says? No: phones rotate by a tag, scans are CMYK, drawings are
see-through, downloads stop halfway. So every image is opened and decoded before any work starts, all faults are named
at once, and what comes out is always upright opaque 8-bit sRGB.
"""

from dreambooth.data.images.cutting import png_bytes, squares, to_pixels
from dreambooth.data.images.decoding import Decoded, decode, decode_image, open_image, read_image
from dreambooth.data.images.finding import InstanceImage, Search, find_instance_images, search_images

__all__ = [
    "Decoded",
    "InstanceImage",
    "Search",
    "decode",
    "decode_image",
    "find_instance_images",
    "open_image",
    "png_bytes",
    "read_image",
    "search_images",
    "squares",
    "to_pixels",
]
