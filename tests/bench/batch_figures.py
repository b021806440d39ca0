"""What was measured of a batch, kept part by part with its stamps, and the figures of output/bench/batch.json."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stamps import Figures, Stamp, alike, stamped, together

COUNT = 8
OUTPUT = Path("output/bench/batch.json")
KEPT = OUTPUT.with_name("batch-seconds.json")
Kept = dict[str, list[Figures]]
"""What was measured of each part, with its stamp, the newest last."""


RATIOS = {
    "batch_vs_sequential": ("sequential", "seconds", "batch"),
    "batch_vs_peer": ("peer", "seconds", "batch"),
    "batch_vs_peer_shared_class": ("peer", "shared_class", "batch"),
    "batch_vs_peer_same_sampler": ("peer", "seconds", "same_sampler"),
    "batch_vs_peer_shared_class_same_sampler": ("peer", "shared_class", "same_sampler"),
}
"""The part and figure above the line, and the part whose seconds are below it."""
SECONDS = {
    "batch_seconds": ("batch", "seconds"),
    "batch_same_sampler_seconds": ("same_sampler", "seconds"),
    "sequential_seconds": ("sequential", "seconds"),
    "sequential_runs": ("sequential", "runs"),
    "peer_seconds": ("peer", "seconds"),
    "peer_shared_class_seconds": ("peer", "shared_class"),
    "peer_runs": ("peer", "runs"),
}


def figures(kept: Kept) -> Figures:
    """What the page shows. A ratio is left out where one of its two was not measured, or not by the same code here."""
    newest = {part: each[-1] for part, each in kept.items()}
    if "batch" in newest:
        newest["batch"] = _median(kept["batch"])
    found = [
        stamped({name: round(newest[slow][figure] / newest[fast]["seconds"], 2)}, newest[slow]["stamp"])
        for name, (slow, figure, fast) in RATIOS.items()
        if slow in newest and fast in newest and alike(newest[slow]["stamp"], newest[fast]["stamp"])
    ]
    if "batch" in newest:
        of_all = {name: newest["batch"][name] for name in ("lane_busy_share", "batches_of_eight")}
        found.append(stamped(of_all, newest["batch"]["stamp"]))
    found += [
        stamped({name: round(newest[part][figure], 1)}, newest[part]["stamp"])
        for name, (part, figure) in SECONDS.items()
        if part in newest
    ]
    if "counts" in newest:
        found.append(stamped({"seconds_per_subject": _per_subject(newest)}, newest["counts"]["stamp"]))
    for part in ("control_plane", "control_plane_100k"):
        if part in newest:
            measured = {name: value for name, value in newest[part].items() if name != "stamp"}
            found.append(stamped({part: measured}, newest[part]["stamp"]))
    return together(*found)


def _median(batches: Sequence[Figures]) -> Figures:
    """The batch of eight: the median of those by the same code on the same machine as the newest."""
    at = batches[-1]["stamp"]
    each = [one for one in batches if alike(one["stamp"], at)]
    return {
        "stamp": at,
        "seconds": statistics.median(one["seconds"] for one in each),
        "lane_busy_share": round(statistics.median(one["lane_busy_share"] for one in each), 4),
        "batches_of_eight": [round(one["seconds"], 1) for one in each],
    }


def _per_subject(newest: Mapping[str, Figures]) -> Figures:
    """Seconds per subject of batches of so many; the batch of eight is among them where it is alike."""
    counts = {name: value for name, value in newest["counts"].items() if name != "stamp"}
    if "batch" in newest and alike(newest["batch"]["stamp"], newest["counts"]["stamp"]):
        counts[str(COUNT)] = newest["batch"]["seconds"]
    return {n: round(counts[n] / int(n), 1) for n in sorted(counts, key=int)}


def known() -> Kept:
    """What was measured before. Exits where it doesn't say on what: an earlier version of this script wrote it."""
    kept: Kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if any(not isinstance(each, list) or any("stamp" not in one for one in each) for each in kept.values()):
        sys.exit(f"{KEPT} doesn't say what it was measured on; delete it, and measure all parts again")
    return kept


def keep(part: str, measured: Figures, at: Stamp) -> None:
    """Write what was measured of a part with what was measured before; of batches of eight all are kept."""
    kept = known()
    kept[part] = [*(kept.get(part, []) if part == "batch" else []), {"stamp": at, **measured}]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=2) + "\n")
    OUTPUT.write_text(json.dumps(figures(kept), indent=2) + "\n")
