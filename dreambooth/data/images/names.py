"""Classify files in a folder of photographs by name or, failing that, by their first bytes."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

_PICTURES = (
    *("jpg", "jpeg", "jpe", "jfif", "jfi", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
    *("avif", "avifs", "heic", "heics", "heif", "heifs", "hif"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "qoi"),
)
_CAPTIONS = ("txt", "caption")
_METADATA = ("metadata.jsonl", "metadata.csv")
_SYSTEM = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "subject.yaml", "subject.yml", "__macosx"))
"""Files of operating systems, and our own settings of the subject."""
_MASK = re.compile(r"(.+?)(?:-masklabel|-condlabel|[-_. ]mask)", re.IGNORECASE)
_CONDITION = "-condlabel"
MASKS_FOLDER = "masks"
"""Folder of masks beside photographs, under the photographs' names."""

_REASONS = {
    "a camera's raw data; convert it to TIFF, PNG or JPEG": "3fr arw cr2 cr3 crw dng erf iiq kdc mef mrw nef nrw orf "
    "pef raf raw rw2 rwl sr2 srf srw x3f",
    "a kind of picture that is not read; convert it to PNG or JPEG": "ai dds emf eps exr fits hdr icns ico jxl jxr "
    "kra pcx pdf ps psb psd sgi svg tga wdp wmf xbm xcf xpm",
    "a video; save some frames of it as pictures": "3gp avi m4v mkv mov mp4 mpeg mpg mts webm wmv",
    "an archive; unpack it": "7z bz2 gz rar tar tgz xz zip zst",
    "captions in an unsupported form; the caption of photo.jpg is photo.txt, or a row of metadata.csv": "cap csv json "
    "jsonl parquet tags toml tsv xml yaml yml",
    "it holds changes to a picture, which are not applied; export the picture with them": "aae dop lrv pp3 thm xmp",
    "no picture": "db html ini js log md npy npz onnx pdf pkl pt py safetensors sh rtf doc docx odt url",
}
_REASON_OF = {suffix: reason for reason, suffixes in reversed(_REASONS.items()) for suffix in suffixes.split()}
_OTHER = "its first bytes are those of no picture that is read"

HEAD_BYTES = 16
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|II\*\0|MM\0\*|\0\0\0\x0cjP  |qoif"
    rb"|....ftyp(?:avi[fs]|mif1|msf1|hei[cxms]|hev[cx])",
    re.DOTALL,
)


def is_system_file(path: str) -> bool:
    """Whether a file is no picture by intent: hidden, an operating system's, or the subject's settings."""
    name = _name(path).lower()
    return name.startswith(".") or name in _SYSTEM


def has_picture_name(path: str) -> bool:
    """Whether a path ends like a supported picture."""
    return _suffix(path) in _PICTURES


def may_be_picture(path: str) -> bool:
    """Whether a path has no known ending, so that the content decides."""
    return not is_caption_name(path) and _suffix(path) not in _REASON_OF


def is_picture(head: bytes) -> bool:
    """Whether a file whose first HEAD_BYTES are `head` is a supported picture."""
    return _SIGNATURE.match(head) is not None


def reason_not_used(path: str) -> str:
    """The reason why a file that is neither picture nor caption isn't used, and the cure."""
    return _REASON_OF.get(_suffix(path), _OTHER)


def is_caption_name(path: str) -> bool:
    """Whether a path ends like a caption."""
    return _suffix(path) in _CAPTIONS


def is_metadata_name(path: str) -> bool:
    """Whether a path is that of a metadata file, which may hold captions."""
    return _name(path) in _METADATA


def caption_names(picture: str) -> Iterator[str]:
    """Possible names of a picture's caption, the most specific first."""
    for stem in dict.fromkeys((picture, stem_of(picture))):
        for suffix in _CAPTIONS:
            yield f"{stem}.{suffix}"


def metadata_names(picture: str) -> Iterator[str]:
    """Possible names of the metadata file beside a picture."""
    folder = picture.rpartition("/")[0]
    for name in _METADATA:
        yield f"{folder}/{name}"


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that may have been meant: one that differs by case alone, or little."""
    known = sorted(names)
    by_case = [each for each in known if each.casefold() == name.casefold()]
    return next(iter(by_case or get_close_matches(name, known, 1)), None)


def masked_picture(path: str, paths: Iterable[str]) -> str | None:
    """The picture among `paths` that this file masks, by the naming of OneTrainer and others."""
    stem = masked_stem(path)
    if stem is None:
        return None
    return next((other for other in paths if has_picture_name(other) and stem_of(other) == stem), None)


def masked_stem(path: str) -> str | None:
    """The path, without its ending, of the picture that a file masks by its name, or None."""
    mask = _MASK.fullmatch(stem_of(path)) if has_picture_name(path) else None
    return None if mask is None else mask[1]


def is_mask_name(path: str) -> bool:
    """Whether a name can only be a mask's: `photo.mask.png`."""
    return has_picture_name(path) and stem_of(path).lower().endswith(".mask")


def is_condition(path: str) -> bool:
    """Whether a file that is named like a mask is a picture that OneTrainer conditions on."""
    return stem_of(path).lower().endswith(_CONDITION)


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _suffix(path: str) -> str:
    return _name(path).lower().rpartition(".")[2] if "." in _name(path) else ""


def stem_of(path: str) -> str:
    """A path without its ending."""
    return path.removesuffix(f".{path.rpartition('.')[2]}") if _suffix(path) else path
