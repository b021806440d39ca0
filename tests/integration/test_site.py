"""The documentation site in a browser: it fits a phone and a wide screen, and axe-core finds no fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import needs_browser, open_browser

import dreambooth

pytestmark = needs_browser

ROOT = Path(dreambooth.__file__).parents[1]
LOOKED_AT = ("index", "tutorials/first-subject", "python", "settings", "benchmarks")
"""Pages of every kind: text, pictures, code, wide tables."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as by `make docs`."""
    pytest.importorskip("material", reason="the site needs pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("width", [390, 1920])
def test_every_page_fits(site: Path, tmp_path: Path, width: int) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    with open_browser(tmp_path / "profile", width=width) as page:
        for path in pages:
            page.open(path.as_uri())
            assert page.run("return document.documentElement.scrollWidth <= innerWidth"), path.name


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1920)])
def test_pages_have_no_faults_for_eyes_and_readers(site: Path, tmp_path: Path, scheme: str, width: int) -> None:
    with open_browser(tmp_path / "profile", width=width) as page:
        page.wear(scheme)
        page.open((site / "index.html").as_uri())  # the site keeps the scheme of the first visit
        shown = page.until("document.body.dataset.mdColorScheme")
        assert shown == ("slate" if scheme == "dark" else "default")
        for name in LOOKED_AT:
            page.open((site / f"{name}.html").as_uri())
            assert page.faults() == [], name
