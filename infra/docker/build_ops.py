"""Build DeepSpeed's Adam operations into an image, so that no node has to compile them; run by the Dockerfile.

The pipeline uses torch's optimizer and needs none; a changed DeepSpeed configuration may. A torch with CUDA needs the
compiler of the same CUDA (nvcc); with another or none the operations are skipped with a message.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version

OPERATIONS = ("CPU_ADAM", "FUSED_ADAM")
ARCHITECTURES = "8.0;8.6;8.9;9.0"
"""GPU architectures, from A100 to H200; no GPU is visible while an image is built."""


def main() -> None:
    """Build them if possible; exits with pip's code if the build fails."""
    import torch

    wanted = torch.version.cuda
    found = nvcc_version() if wanted else None
    if wanted != found:
        sys.stdout.write(
            f"DeepSpeed's operations are not built: torch is made for CUDA {wanted} and nvcc is of "
            f"{found or 'no version: it is not there'}; TORCH_INDEX_URL chooses another torch\n"
        )
        return
    command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-build-isolation", "--no-deps"]
    command += ["--force-reinstall", f"deepspeed=={version('deepspeed')}"]
    sys.exit(subprocess.run(command, env=os.environ | build_environment(wanted), check=False).returncode)


def nvcc_version() -> str | None:
    """Major and minor version of CUDA's compiler, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    return release[1] if release else None


def build_environment(cuda: str | None) -> Mapping[str, str]:
    """Environment of DeepSpeed's setup."""
    chosen = {f"DS_BUILD_{operation}": "1" for operation in OPERATIONS}
    if cuda is None:
        return chosen | {"DS_ACCELERATOR": "cpu"}
    return chosen | {"DS_ACCELERATOR": "cuda", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}


if __name__ == "__main__":
    main()
