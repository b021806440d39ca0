"""What lies in a folder of photographs: pictures of every kind, captions of every spelling, and what is not used."""

import io
from collections.abc import Callable
from pathlib import Path

import fsspec
import pillow_heif
import pytest
from gradients import gradient

from dreambooth.data.images import InstanceImage, find_instance_images, open_image, search_images
from dreambooth.errors import InputError

MAX_PIXELS = 1_000_000
pillow_heif.register_heif_opener(thumbnails=False)


def test_a_folder_gives_its_images_by_name_and_nothing_else(folder: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.webp", "d.jpg"):
        gradient(8, 8).save(folder / name)
    (folder / "notes.md").write_text("not an image")
    (folder / "._a.jpeg").write_bytes(b"what a Mac leaves behind")
    (folder / "sub.jpg").mkdir()
    names = [Path(image.address).name for image in find_instance_images((str(folder),))]
    assert names == ["a.jpeg", "b.PNG", "c.webp", "d.jpg"]


def test_order_is_by_name_however_they_are_listed(folder: Path) -> None:
    paths = [str(folder / name) for name in ("2.png", "1.png", "3.png")]
    for path in paths:
        gradient(8, 8).save(path)
    assert find_instance_images(paths) == find_instance_images(paths[::-1]) == find_instance_images((str(folder),))


def test_an_image_named_twice_counts_once(folder: Path) -> None:
    gradient(8, 8).save(folder / "1.png")
    assert len(find_instance_images((str(folder), str(folder / "1.png")))) == 1


def test_a_glob(folder: Path) -> None:
    for name in ("day-1.png", "day-2.png", "night-1.png"):
        gradient(8, 8).save(folder / name)
    assert len(find_instance_images((str(folder / "day-*"),))) == 2


def test_brackets_in_a_real_name_are_no_glob(folder: Path) -> None:
    gradient(8, 8).save(folder / "rex [1].png")
    assert len(find_instance_images((str(folder / "rex [1].png"),))) == 1


def test_relative_addresses_become_absolute(working_folder: Path) -> None:
    gradient(8, 8).save("1.png")
    assert find_instance_images((".",))[0].address == str(working_folder / "1.png")


def test_any_fsspec_address(memory: fsspec.AbstractFileSystem) -> None:
    buffer = io.BytesIO()
    gradient(8, 6).save(buffer, "png")
    memory.pipe({"/rex/1.png": buffer.getvalue(), "/rex/1.txt": b"rex asleep"})
    (found,) = find_instance_images(("memory://rex",))
    assert found == InstanceImage(address="memory:///rex/1.png", caption="rex asleep")
    assert open_image(found.address, max_pixels=MAX_PIXELS).size == (8, 6)
    assert find_instance_images(("memory://rex/*.png",)) == (found,)


def test_a_caption_beside_an_image(folder: Path) -> None:
    for name in ("1.png", "2.png"):
        gradient(8, 8).save(folder / name)
    (folder / "1.txt").write_text("\ufeffa photo of sks dog\n  on a  chair\n", encoding="utf-8")
    captions = [image.caption for image in find_instance_images((str(folder),))]
    assert captions == ["a photo of sks dog on a chair", None]


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b" \n", "empty"), (b"sks \x00 dog", r"U\+0000"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_caption_that_is_none(folder: Path, content: bytes, cause: str) -> None:
    gradient(8, 8).save(folder / "1.png")
    (folder / "1.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"1\.txt.*{cause}"):
        find_instance_images((str(folder),))


def test_missing_folder(folder: Path) -> None:
    with pytest.raises(InputError, match=r"nothing at .*nowhere; expected a folder, a glob or a list"):
        find_instance_images((str(folder / "nowhere"),))


def test_empty_folder(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rex holds no files"):
        find_instance_images((str(folder),))


def test_no_image_among_the_files(folder: Path) -> None:
    for name in ("a.psd", "b.txt", "c.mov", "d.md"):
        (folder / name).write_text("x")
    with pytest.raises(InputError, match=r"no image among 4 files.*a\.psd, b\.txt, c\.mov and 1 more"):
        find_instance_images((str(folder),))


def test_a_glob_that_matches_nothing(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches .*\*\.jpg"):
        find_instance_images((str(folder / "*.jpg"),))


def test_an_unknown_protocol() -> None:
    with pytest.raises(InputError, match=r"can't read nosuch://bucket/rex: .*nosuch"):
        find_instance_images(("nosuch://bucket/rex",))


def picture(kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    gradient(16, 16).save(out, kind)
    return out.getvalue()


Files = dict[str, bytes]
Place = Callable[[Files], str]


@pytest.fixture(params=["on a disk", "in a store"])
def place(request: pytest.FixtureRequest, folder: Path, memory: fsspec.AbstractFileSystem) -> Place:
    """A function that lays files down and gives the address of their folder."""

    def lay(files: Files) -> str:
        if request.param == "in a store":
            memory.pipe({f"/rex/{name}": content for name, content in files.items()})
            return "memory://rex"
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return str(folder)

    return lay


KINDS = {
    **dict.fromkeys(("jpg", "JPG", "jpeg", "jpe", "jfif"), "JPEG"),
    **{"png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "avif": "AVIF"},
    **{"heic": "HEIF", "heif": "HEIF", "hif": "HEIF", "jp2": "JPEG2000", "ppm": "PPM", "qoi": "QOI"},
}
UNTRUE = {"a.heic": "AVIF", "b.jpg": "HEIF", "c.png": "JPEG", "d": "PNG", "e.jpg_large": "JPEG", "f.download": "WEBP"}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            {f"{index:02}.{suffix}": kind for index, (suffix, kind) in enumerate(KINDS.items())}, id="suffixes"
        ),
        pytest.param(UNTRUE, id="names that say nothing or another kind"),
    ],
)
def test_pictures_of_every_kind_are_read(place: Place, files: dict[str, str]) -> None:
    found = search_images((place({name: picture(kind) for name, kind in files.items()}),))
    assert [image.address.rsplit("/", 1)[-1] for image in found.images] == list(files)
    assert {open_image(image.address, max_pixels=MAX_PIXELS).size for image in found.images} == {(16, 16)}
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("photo.cr2", "a camera's raw data; convert it"),
        ("photo.DNG", "a camera's raw data; convert it"),
        ("drawing.psd", "a kind of picture that is not read; convert it"),
        ("drawing.svg", "a kind of picture that is not read; convert it"),
        ("live.MOV", "a video"),
        ("more.zip", "an archive; unpack it"),
        ("captions.jsonl", "the caption of photo.jpg is photo.txt, or a row of metadata.csv"),
        ("photo.json", "the caption of photo.jpg is photo.txt"),
        ("photo.aae", "export the picture with them"),
        ("b.txt", "the caption of no picture"),
        ("B.CAPTION", "the caption of no picture"),
        ("photo_mask.png", "looks like a mask of photo.png, and images.masks is off"),
        ("photo-masklabel.png", "looks like a mask of photo.png, and images.masks is off"),
        ("latents.npz", "no picture"),
        ("README", "its first bytes are those of no picture"),
        ("photo.download", "its first bytes are those of no picture"),
        ("more/b.jpg", "only pictures that lie directly in a folder are; give that folder, too"),
    ],
)
def test_what_is_not_used_is_named_with_the_reason(place: Place, name: str, reason: str) -> None:
    content = picture() if name.endswith("png") else b"not a picture"
    address = place({"photo.png": picture(), name: content})
    found = search_images((address,))
    assert len(found.images) == 1
    (warning,) = found.warnings
    assert warning.startswith(f"not used of {address}: {name.rpartition('/')[2]} ")
    assert reason in warning


@pytest.mark.parametrize(
    "name", [".DS_Store", "._photo.png", "Thumbs.db", "desktop.ini", "subject.yaml", "__MACOSX/a.png"]
)
def test_what_nobody_put_there_is_passed_over(place: Place, name: str) -> None:
    found = search_images((place({"photo.png": picture(), name: b"x"}),))
    assert (len(found.images), found.warnings) == (1, ())


def test_unused_files_of_one_reason_share_a_warning(place: Place) -> None:
    found = search_images((place({"photo.png": picture(), **dict.fromkeys(("a.cr2", "b.cr2", "c.mov"), b"x")}),))
    assert [warning.partition(": ")[2].partition(" (")[0] for warning in found.warnings] == ["a.cr2, b.cr2", "c.mov"]


def test_a_mask_alone_is_a_picture(place: Place) -> None:
    """A picture of a mask is one, unless there is what it masks."""
    assert len(find_instance_images((place({"venetian_mask.png": picture(), "photo.png": picture()}),))) == 2


@pytest.mark.parametrize(
    "name",
    ["photo.txt", "photo.caption", "photo.jpg.txt", "photo.jpg.caption", "PHOTO.TXT", "Photo.Caption", "photo.JPG.txt"],
)
def test_captions_of_every_spelling(place: Place, name: str) -> None:
    address = place({"photo.jpg": picture("JPEG"), name: b"sks dog asleep"})
    for given in (address, f"{address}/*.jpg", f"{address}/photo.jpg"):
        found = search_images((given,))
        assert [image.caption for image in found.images] == ["sks dog asleep"]
        assert found.warnings == ()


def test_a_caption_of_two_pictures_is_a_warning(place: Place) -> None:
    address = place({"a.jpg": picture("JPEG"), "a.png": picture(), "a.txt": b"sks dog"})
    found = search_images((address,))
    assert [image.caption for image in found.images] == ["sks dog", "sks dog"]
    assert found.warnings == ("a.jpg, a.png share the caption a.txt; a.jpg.txt would be its own",)


def test_a_caption_of_its_own_comes_before_a_shared_one(place: Place) -> None:
    files = {"a.jpg": picture("JPEG"), "a.png": picture(), "a.txt": b"both", "a.png.txt": b"its own"}
    found = search_images((place(files),))
    assert [image.caption for image in found.images] == ["both", "its own"]
    assert found.warnings == ()


def test_names_that_differ_by_case_alone(folder: Path) -> None:
    for name in ("a", "A"):
        gradient(8, 8).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"sks {name}")
    captions = {image.address[-5:]: image.caption for image in find_instance_images((str(folder),))}
    assert captions == {"a.png": "sks a", "A.png": "sks A"}


def test_pictures_in_folders_only(place: Place) -> None:
    with pytest.raises(InputError, match=r"pictures in its folders 10_dog \(2\): give one of them"):
        find_instance_images((place({"10_dog/a.png": picture(), "10_dog/b.png": picture()}),))
