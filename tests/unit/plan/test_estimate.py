import pytest

from dreambooth.amounts import duration


@pytest.mark.parametrize(("seconds", "shown"), [(7.4, "7 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_shown_as_a_person_would(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
