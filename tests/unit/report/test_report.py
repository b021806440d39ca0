import pytest
from PIL import Image

from dreambooth.training.loop import StepMetrics
from pipelines.report.pictures import Row, contact_sheet, loss_curve

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def _plain(colour: tuple[int, int, int], count: int = 1, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for _ in range(count)]


def _box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Where a colour is on a sheet: left, top, right, bottom."""
    mask = Image.new("1", sheet.size)
    mask.putdata([pixel == colour for pixel in sheet.get_flattened_data()])
    box = mask.getbbox()
    assert box is not None
    return box


def test_base_samples_stand_left_of_fine_tuned_ones() -> None:
    sheet = contact_sheet([Row(title="on the beach", baseline=_plain(BLUE, 2), images=_plain(RED, 2))], title="rex")
    left, right = _box(sheet, BLUE), _box(sheet, RED)
    assert left[2] < right[0]
    assert left[1] == right[1]
    assert right[2] < sheet.width


def test_rows_stand_below_each_other() -> None:
    sheet = contact_sheet([Row(title="instance images", images=_plain(BLUE, 5)), Row(title="", images=_plain(RED))])
    assert _box(sheet, BLUE)[3] < _box(sheet, RED)[1]
    assert sheet.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("size", "cell"), [((64, 64), 128), ((48, 48), 144), ((200, 200), 200), ((512, 512), 256), ((768, 512), 256)]
)
def test_small_images_are_enlarged_and_large_ones_shrunk(size: tuple[int, int], cell: int) -> None:
    sheet = contact_sheet([Row(title="a photo of a dog", images=_plain(RED, 1, size))])
    left, top, right, bottom = _box(sheet, RED)
    assert right - left == cell
    assert bottom - top == round(cell * size[1] / size[0])


def test_pixels_of_small_images_stay_sharp() -> None:
    checks = Image.new("RGB", (64, 64))
    checks.putdata([RED if (x + y) % 2 else BLUE for y in range(64) for x in range(64)])
    sheet = contact_sheet([Row(title="", images=[checks])])
    left, top, right, bottom = _box(sheet, RED)
    colours = sheet.crop((left, top, right, bottom)).getcolors()
    assert colours is not None
    assert {colour for _, colour in colours} == {RED, BLUE}


def test_many_images_go_on_below_and_long_titles_are_cut() -> None:
    rows = [Row(title="a very long prompt " * 40, images=_plain(RED, 30))]
    sheet = contact_sheet(rows, title="an even longer title " * 40)
    left, top, right, bottom = _box(sheet, RED)
    assert right - left == 12 * 128 + 11 * 8
    assert bottom - top == 3 * 128 + 2 * 8
    assert sheet.width == right + 24
    # Nothing is written over the edge.
    assert sheet.crop((sheet.width - 20, 0, sheet.width, sheet.height)).getcolors() == [(20 * sheet.height, WHITE)]


def test_a_sheet_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([Row(title="nothing", images=[])])


def _history(steps: int, **more: float) -> list[dict[str, float]]:
    """What a run leaves: the records of StepMetrics."""
    plain = {"instance_loss": 0.1, "prior_loss": 0.1, "learning_rate": 1e-4, "text_encoder_learning_rate": 5e-5}
    rest = {"grad_norm": 1.0, "images_per_second": 2.0}
    return [
        StepMetrics(step=step, loss=0.2 + 0.1 / step, **{**plain, **rest, **more}).as_dict()
        for step in range(1, steps + 1)
    ]


def _has_colour(picture: Image.Image, colour: str) -> bool:
    wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    colours = picture.getcolors(picture.width * picture.height)
    assert colours is not None
    return any(found == wanted for _, found in colours)


def test_a_curve_shows_what_took_part() -> None:
    both = loss_curve(_history(50))
    assert _has_colour(both, "#1f77b4")
    assert _has_colour(both, "#d1701f")
    assert _has_colour(both, "#8a5fb4")
    alone = loss_curve(_history(50, prior_loss=0.0, text_encoder_learning_rate=0.0))
    assert _has_colour(alone, "#1f77b4")
    assert not _has_colour(alone, "#d1701f")
    assert not _has_colour(alone, "#8a5fb4")


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_short_history_is_drawn_too(steps: int) -> None:
    assert loss_curve(_history(steps)).width > 800
