"""What holds for every test: few threads, no network, a folder of its own to work in.

And what many tests share: a base model so small that a training step takes milliseconds, and a subject's images.
"""

import os

# Set before torch, transformers or MLflow are imported anywhere, and inherited by the processes that tests start.
# MKL_CBWR: on AMD's Zen 4, MKL rounds a product of one or two rows by where its operands lie in memory, and the header
# of a file moves its weights.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_CBWR": "AUTO",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MPLBACKEND": "Agg",
    }
)

import shutil
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.collector import collect_less_garbage

collect_less_garbage()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background job: the commands that tests start would not be stopped by Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
INTEGRATION_TIMEOUT_SECONDS = 600
LONGEST = (
    "test_disk_full.py",
    "test_family_kills.py",
    "test_train_stage.py",
    "test_cascade_run.py",
    "test_batch_killed.py",
    "test_family_engines.py",
    "test_family_batch.py",
    "test_engines.py",
    "test_personalize.py",
    "test_batch.py",
    "test_prior_stage.py",
)
"""They take minutes each, and go first: no process is left with one of them when the others have finished."""
APART = ("test_disk_full.py", "test_family_kills.py")
"""Their tests share nothing and take a minute or more each: two processes may divide them. Other files stay whole."""


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all of pytest's processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(shared_folder: Path) -> None:
    """What one process has counted, the others need not."""
    os.environ["DREAMBOOTH_CACHE"] = str(shared_folder / "cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder they lie in: integration tests get more time, gpu tests a device or a skip.

    Those marked `extras` are skipped without their package.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("integration", "gpu"):
            item.add_marker(folder)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(INTEGRATION_TIMEOUT_SECONDS))
        for marker in item.iter_markers("extras"):
            [package] = marker.args
            if find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"needs {package}, which make test-extras has"))
        if folder == "gpu":
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a file's tests go to one process, except those of APART."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if Path(file).name in APART else file

    return Files(config, log)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that nothing a test writes by a relative path lands in the checkout."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion directory of random weights, always the same, for 64 x 64 images. Not to be written to."""
    import torch

    from dreambooth.quiet import hide_progress_bars, quiet

    quiet()
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from dreambooth.miniature import PIPELINE_DIR
    from dreambooth.models.families import load_tokenizer

    hide_progress_bars()
    directory = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = load_tokenizer(PIPELINE_DIR)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def instance_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of noise, 80 x 72, 00.png to 04.png, always the same. Not to be written to."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("subject") / "red-dog"
    folder.mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (72, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def full_size(tmp_path: Path) -> Path:
    """Configurations of the size of Stable Diffusion 1.5 (982.5 M parameters), without weights."""
    from full_size import write_configurations

    write_configurations(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def mlflow_database(shared_folder: Path) -> str:
    """The address of an empty MLflow database: to make one takes seconds. Not to be written to."""
    from filelock import FileLock

    from pipelines.tracking.client import connect

    uri = f"sqlite:///{shared_folder}/mlflow.db"
    with FileLock(shared_folder / "mlflow.lock"):
        connect(uri)
    return uri


@pytest.fixture(scope="session")
def tracking_in(mlflow_database: str) -> Callable[[Path], str]:
    """Puts an empty MLflow database into a folder, unless there is one, and returns its address."""

    def put(folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        database = folder / "mlflow.db"
        if not database.exists():
            shutil.copyfile(mlflow_database.removeprefix("sqlite:///"), database)
        return f"sqlite:///{database}"

    return put
