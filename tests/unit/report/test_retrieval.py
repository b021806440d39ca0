"""The batch page's part about retrieval, from stored embeddings: names, what is left out, and a thousand subjects."""

import re
import time
from pathlib import Path

import pytest
import torch

from pipelines.report.batch_report import render_report
from pipelines.report.batch_result import BatchResult
from pipelines.report.retrieval import MOST_IN_MATRIX, MOST_MISTAKEN, Embedded, retrieved_by_bank
from pipelines.stages.embeddings import embeddings_uri, store_embeddings


def stored(folder: Path, name: str, samples: torch.Tensor, photographs: torch.Tensor, bank: str = "a@1") -> Embedded:
    uri = str(folder / name / "evaluations" / "k" / "evaluation.json")
    store_embeddings(uri, samples=[samples[:1], samples[1:]], photographs=photographs)
    return Embedded(subject=name, bank=bank, address=embeddings_uri(uri))


def page(subjects: list[Embedded]) -> str:
    return render_report(BatchResult(name="pets", facts=[], subjects=[], retrieved=retrieved_by_bank(subjects)))


EAST, NORTH, UP = torch.eye(3)


def test_who_is_taken_for_whom(tmp_path: Path) -> None:
    rex = stored(tmp_path, "<rex>", torch.stack([EAST, EAST, NORTH, EAST]), EAST[None])
    tom = stored(tmp_path, "tom", torch.stack([NORTH, NORTH]), NORTH[None])
    [found] = retrieved_by_bank([rex, tom])
    assert found.as_dict()["rank_1"]["mean"] == pytest.approx(0.875)
    assert found.as_dict()["mean_average_precision"]["mean"] == pytest.approx((7 / 8 + 1) / 2)
    made = page([rex, tom])
    assert "<h2>Retrieval</h2>" in made
    assert "all 2 subjects" in made
    shares = re.findall(r'<tr><th scope="row">(&lt;rex&gt;|tom)</th>((?:<td class="n"[^>]*>\d*</td>)+)</tr>', made)
    assert [(name, re.findall(r">(\d*)</td>", cells)) for name, cells in shares] == [
        ("&lt;rex&gt;", ["75", "25"]),
        ("tom", ["", "100"]),
    ]
    assert re.search(r"<span>&lt;rex&gt;</span></th><td>tom</td><td[^>]*>0.25</td>", made)


def test_banks_are_looked_up_apart_and_one_subject_is_no_gallery(tmp_path: Path) -> None:
    of_two = [stored(tmp_path, name, EAST[None], EAST[None], "b@2") for name in ("x", "y")]
    alone = stored(tmp_path, "z", UP[None], UP[None])
    assert [found.bank for found in retrieved_by_bank([alone, *of_two])] == ["b@2"]
    assert "Retrieval" not in page([alone])
    assert "Retrieval" not in page([])


def test_what_is_not_stored_or_cut_short_is_left_out(tmp_path: Path) -> None:
    subjects = [
        stored(tmp_path, name, one[None], one[None]) for name, one in zip("abcd", (EAST, NORTH, UP, UP), strict=True)
    ]
    Path(subjects[2].address).unlink()
    content = Path(subjects[3].address).read_bytes()
    Path(subjects[3].address).write_bytes(content[:-4])
    [found] = retrieved_by_bank(subjects)
    assert found.subjects == ("a", "b")
    assert "Left out: 2 subjects without stored embeddings." in page(subjects)


def test_a_thousand_subjects_are_shown_by_those_confused_most(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    subjects = []
    for place in range(1000):
        centre = torch.randn(16, generator=generator)
        samples, photographs = (centre + 0.5 * torch.randn(n, 16, generator=generator) for n in (8, 4))
        subjects.append(stored(tmp_path, f"s-{place}", samples, photographs))
    began = time.perf_counter()
    made = page(subjects)
    assert time.perf_counter() - began < 30
    assert len(made) < 300_000
    assert made.count('<tr><th scope="row">s-') == MOST_IN_MATRIX
    assert f"The {MOST_IN_MATRIX} of 1000 subjects that are confused most." in made
    assert '<th scope="col">others</th>' in made
    assert len(re.findall(r"<span>s-\d+</span></th><td>s-\d+</td>", made)) == MOST_MISTAKEN
