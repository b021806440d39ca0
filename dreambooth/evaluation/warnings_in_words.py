"""What the figures of an evaluation mean for the person who trained: the paper's failures, in words, with a cure."""

from collections.abc import Mapping, Sequence

from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import PromptRow

MANY_NEAR_COPIES = 0.25
PROMPT_LOST = 0.05
MANY_PROMPTS_LOST = 0.25


def warnings_of(intervals: Mapping[str, Interval], rows: Sequence[PromptRow]) -> tuple[str, ...]:
    """Sentences for what went wrong; none where nothing did."""
    sentences = []
    if intervals["near_copies"].mean >= MANY_NEAR_COPIES:
        sentences.append(
            f"samples copy the photographs ({intervals['near_copies'].mean:.0%} are near-copies): "
            f"fewer steps or more class images"
        )
    gaps = [row.clip_t_base - row.clip_t_no_identifier for row in rows if row.clip_t_base is not None]
    lost = sum(gap > PROMPT_LOST for gap in gaps)
    if gaps and lost / len(gaps) >= MANY_PROMPTS_LOST:
        sentences.append(
            f"prompts are not followed ({lost} of {len(gaps)} less than the base model follows them): fewer steps, a "
            f"lower learning rate or more class images"
        )
    return tuple(sentences)
