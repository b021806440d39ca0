"""Silence library notices meant for developers.

Call before importing diffusers and transformers: notices about a missing torchvision and the like appear at import.
"""

import logging
import os
import warnings


def quiet() -> None:
    """Silence notices of diffusers, transformers, torch and torchao that users can't act on. Imports none of them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("diffusers", "transformers", "torch.distributed.elastic", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("diffusers", "transformers", "torch", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")


def hide_progress_bars() -> None:
    """Hide the progress bars of diffusers and transformers for loading weights."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
