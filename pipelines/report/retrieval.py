"""A batch page's part about retrieval: each sample looked up among the photographs of all subjects."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dreambooth.amounts import counted
from dreambooth.evaluation.bootstrap import Interval, bootstrap_mean
from dreambooth.evaluation.intervals import share_interval
from pipelines.report.pages import Cell, Table, cell, number
from pipelines.stages.embeddings import read_embeddings
from pipelines.storage.pictures import read_pictures

if TYPE_CHECKING:
    from dreambooth.evaluation.retrieval import Retrieved

MOST_IN_MATRIX = 12
MOST_MISTAKEN = 20
"""Rows of the table of subjects that are taken for others."""
_OTHERS = "others"


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A subject measured by a bank (name and hash), and the address of DINO's embeddings of its pictures."""

    subject: str
    bank: str
    address: str


@dataclass(frozen=True, kw_only=True)
class RetrievedByBank:
    """Retrieval among the subjects measured by one bank; `left_out` counts those without stored embeddings."""

    bank: str
    subjects: Sequence[str]
    found: "Retrieved"
    left_out: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = {"rank_1": self.rank_1, "mean_average_precision": self.mean_average_precision}
        subjects = {"subjects": len(self.subjects), "left_out": self.left_out}
        return {"bank": self.bank} | subjects | {name: asdict(figure) for name, figure in figures.items()}

    @property
    def rank_1(self) -> Interval:
        """Mean over subjects, each counting alike."""
        return share_interval([[share] for share in self.found.rank_1])

    @property
    def mean_average_precision(self) -> Interval:
        """Mean over subjects, each counting alike."""
        return bootstrap_mean([[value] for value in self.found.mean_average_precision])


@dataclass(frozen=True, kw_only=True)
class RetrievalPart:
    """What the page shows of one bank: a sentence, a matrix of shares by names, and who is taken for whom."""

    summary: str
    columns: Sequence[str]
    matrix: Sequence[tuple[str, Sequence[float]]]
    left_out: str
    mistaken: Table


def retrieved_by_bank(subjects: Iterable[Embedded]) -> list[RetrievedByBank]:
    """Look up the samples of every bank that measured at least two subjects, by their stored embeddings."""
    banks: dict[str, dict[str, str]] = defaultdict(dict)
    for each in subjects:
        banks[each.bank][each.subject] = each.address
    return [found for bank, addresses in banks.items() if (found := _retrieved(bank, addresses)) is not None]


def _retrieved(bank: str, addresses: dict[str, str]) -> RetrievedByBank | None:
    stored = read_pictures(addresses.values())
    found = {}
    for name, address in addresses.items():
        with suppress(KeyError, ValueError):  # missing, or cut short
            found[name] = read_embeddings(stored[address])
    if len(found) < 2:
        return None
    from dreambooth.evaluation.retrieval import retrieve

    samples, photographs = zip(*found.values(), strict=True)
    return RetrievedByBank(
        bank=bank,
        subjects=tuple(found),
        found=retrieve(samples, photographs),
        left_out=len(addresses) - len(found),
    )


def part_of(retrieved: RetrievedByBank) -> RetrievalPart:
    """The part of a page, however many subjects there are: the most confused ones."""
    names, confusion = retrieved.subjects, retrieved.found.confusion
    shown = _most_confused(confusion)
    others = len(names) - len(shown)
    matrix = []
    for row in shown:
        counts, total = [confusion[row][column] for column in shown], sum(confusion[row])
        counts += [total - sum(counts)] if others else []
        matrix.append((names[row], [count / total for count in counts]))
    return RetrievalPart(
        summary=_summary(retrieved),
        columns=[names[column] for column in shown] + ([_OTHERS] if others else []),
        matrix=matrix,
        left_out=f" The {len(shown)} of {len(names)} subjects that are confused most." if others else "",
        mistaken=_mistaken(retrieved),
    )


def _most_confused(confusion: Sequence[Sequence[int]]) -> list[int]:
    """The subjects with most samples of theirs taken for others, and others' for theirs, in the given order."""
    of_others = [sum(row[place] for row in confusion) - confusion[place][place] for place in range(len(confusion))]
    wrong = [sum(row) - row[place] + of_others[place] for place, row in enumerate(confusion)]
    chosen = sorted(range(len(confusion)), key=lambda place: -wrong[place])
    return sorted(chosen[:MOST_IN_MATRIX])


def _summary(retrieved: RetrievedByBank) -> str:
    left_out = ""
    if retrieved.left_out:
        left_out = f" Left out: {counted(retrieved.left_out, 'subject')} without stored embeddings."
    return (
        f"Each sample is looked up by DINO among the photographs of all {len(retrieved.subjects)} subjects. The "
        f"nearest is its own subject's for {_percent(retrieved.rank_1)} of samples (rank-1); mean average precision "
        f"{retrieved.mean_average_precision}. Bank {retrieved.bank}.{left_out}"
    )


def _percent(share: Interval) -> str:
    return f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})"


def _mistaken(retrieved: RetrievedByBank) -> Table:
    """Subjects whose samples are taken for another's, the most often first."""
    rows: list[tuple[float, list[Cell]]] = []
    for place, name in enumerate(retrieved.subjects):
        counts = retrieved.found.confusion[place]
        for other, count in enumerate(counts):
            if other != place and count:
                shares = [retrieved.found.rank_1[place], retrieved.found.mean_average_precision[place]]
                share = count / sum(counts)
                cells = [
                    cell(name),
                    cell(retrieved.subjects[other]),
                    number(share, 2),
                    *(number(one, 2) for one in shares),
                ]
                rows.append((share, cells))
    rows.sort(key=lambda row: -row[0])
    columns = ("samples of", "taken for", "share", "rank-1", "mAP")
    return Table(title="who is taken for whom", columns=columns, rows=[cells for _, cells in rows[:MOST_MISTAKEN]])
