"""Turn exceptions into readable sentences."""

import re

_RAISED = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Diverged|Stopped|Exit|Interrupt)\b.*")


def sentence(error: BaseException) -> str:
    """An exception's message in one line; for an error of a Ray worker, the original exception's."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and type(error).__module__.startswith("ray.exceptions"):
        return sentence(cause)
    if isinstance(error, MemoryError):
        return f"no memory is left for this{f' ({error})' if str(error) else ''}; ask for less at once"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first = lines[0]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        raised = [line for line in lines if _RAISED.match(line)]
        started = "" if first.startswith(("Traceback", "ray::", "\x1b")) else f"{first.rstrip(':')}: "
        first = f"{started}{raised[-1] if raised else lines[-1]}"
    ours = type(error) is RuntimeError or type(error).__module__.startswith(("dreambooth.", "pipelines."))
    return first if ours else f"{type(error).__name__}: {first}"
