"""Models, machines and addresses that won't do: refused before any work, as in test_bad_input.py."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from refusing import CPUS, Refused


class TestBaseModel:
    @pytest.mark.parametrize("address", ["./nowhere", "nowhere", "/no/where"])
    def test_one_that_is_not_there(self, refused: Refused, address: str) -> None:
        expected = f"base_model {address!r}: expected 'miniature', 'miniature-flow', 'miniature-cascade', a folder"
        assert refused("--base-model", address).startswith(expected)

    def test_a_hub_id_that_cannot_be_had(self, refused: Refused) -> None:
        message = refused("--base-model", "no-such-owner/no-such-model")
        assert message.startswith("base_model 'no-such-owner/no-such-model' is neither a folder here nor available")

    def test_a_folder_without_a_pipeline(self, refused: Refused, tmp_path: Path) -> None:
        assert f"expected a diffusers pipeline in {tmp_path}" in refused("--base-model", tmp_path)

    def test_a_pipeline_that_is_not_supported(self, refused: Refused, tiny_pipeline: Path, tmp_path: Path) -> None:
        base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableCascadePipeline"}))
        message = refused("--base-model", base)
        assert message.startswith(f"{base} holds a StableCascadePipeline, which is not supported; supported: Stable")

    @pytest.mark.parametrize("name", ["unet", "vae/config.json", "text_encoder/model.safetensors"])
    def test_a_copy_that_broke_off(self, refused: Refused, tiny_pipeline: Path, tmp_path: Path, name: str) -> None:
        base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
        shutil.rmtree(base / name) if name == "unet" else (base / name).unlink()
        assert "is the copy complete?" in refused("--base-model", base)


class TestCluster:
    def test_more_workers_than_it_has(self, refused: Refused) -> None:
        message = refused("--workers", str(CPUS + 1))
        assert message.startswith(
            f"cluster.num_workers is {CPUS + 1}, which takes {CPUS + 1} CPUs and 0 GPUs, but the cluster has {CPUS}"
        )

    def test_gpus_that_it_does_not_have(self, refused: Refused) -> None:
        assert "takes 1 CPU and 1 GPU, but the cluster has 8 CPUs and 0" in refused("--set", "cluster.use_gpu=true")

    def test_more_samplers_than_it_has_room_for(self, refused: Refused) -> None:
        message = refused("--set", f"prior.num_actors={CPUS + 1}")
        assert message.startswith(f"prior.num_actors is {CPUS + 1}, but the cluster has room for {CPUS}, one per CPU")


class TestEvaluation:
    def test_an_image_encoder_that_is_not_there(self, refused: Refused) -> None:
        message = refused("--set", "evaluation.image_encoder=./nowhere")
        assert message.startswith("evaluation.image_encoder: the image encoder './nowhere': expected a folder")

    def test_an_image_encoder_that_is_none(self, refused: Refused, tiny_pipeline: Path) -> None:
        message = refused("--set", f"evaluation.image_encoder={tiny_pipeline / 'text_encoder'}")
        assert "is of the type 'clip_text_model'; expected 'vit'" in message


class TestTracking:
    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("http://127.0.0.1:9", "no MLflow tracking at http://127.0.0.1:9: nothing answers at 127.0.0.1:9"),
            ("sqlite:////proc/no/where/mlflow.db", "/proc/no/where/mlflow.db can't be written"),
            ("mlruns", "tracking.uri is 'mlruns', a folder; expected a database such as sqlite:///mlflow.db"),
            ("nosuch://host/db", "no MLflow tracking at nosuch://host/db"),
        ],
    )
    def test_an_address_that_cannot_be_reached(self, refused: Refused, address: str, message: str) -> None:
        assert message in refused("--set", f"tracking.uri={address}")

    def test_a_file_that_is_no_database(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "mlflow.db").write_text("words" * 1000)
        message = refused("--set", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        assert "the file isn't an SQLite database" in message

    def test_a_password_is_not_repeated(self, refused: Refused) -> None:
        assert "secret" not in refused("--set", "tracking.uri=http://me:secret@127.0.0.1:9")

    def test_a_name_that_the_registry_cannot_hold(self, refused: Refused) -> None:
        message = refused("--set", "tracking.registered_model_name=a/b")
        assert message.startswith("tracking.registered_model_name: expected a name without / : @")


class TestStorage:
    def test_a_store_that_cannot_be_reached(self, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        message = refused("--output", "s3://bucket/rex")
        assert message.startswith("can't write to 's3://bucket/rex': it can't be reached")

    def test_a_store_that_nobody_knows(self, refused: Refused) -> None:
        assert "the address 'nosuch://bucket/rex' can't be used" in refused("--output", "nosuch://bucket/rex")

    @pytest.mark.parametrize("setting", ["storage.run", "storage.prior"])
    def test_a_file_where_the_folder_should_be(self, refused: Refused, setting: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        message = refused("--set", f"{setting}={tmp_path}/file/rex")
        assert message.startswith(f"can't write to '{tmp_path}/file/rex': a part of the path is a file, not a folder")

    def test_a_folder_that_takes_no_files_from_anyone(self, refused: Refused) -> None:
        """Root may write into folders of others, but not into this one."""
        if not Path("/proc/self").is_dir():
            pytest.skip("there is no /proc")
        assert refused("--output", "/proc/dreambooth").startswith("can't write to '/proc/dreambooth': ")

    def test_too_little_space(self, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        message = refused()
        assert "has 0.1 MB free, and 3.2 MB will be written there: 3 checkpoints of 1.0 MB" in message
        assert "choose another folder (storage.root, TMPDIR)" in message

    def test_a_long_name(self, refused: Refused, tmp_path: Path) -> None:
        assert "the path is too long; name a shorter one" in refused("--output", f"{tmp_path}/{'a' * 300}")


class TestStorageOnAFileSystemOfItsOwn:
    """Only root can mount one, so that elsewhere the tests above have to do."""

    @pytest.fixture
    def mount(self, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
        mounted = []

        def mount(options: str) -> Path:
            folder = tmp_path / "mounted"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            try:
                done = subprocess.run(command, capture_output=True, check=False)
            except OSError:
                pytest.skip("there is no mount command")
            if done.returncode:
                pytest.skip("this user may not mount a file system")
            mounted.append(folder)
            return folder

        yield mount
        for folder in mounted:
            subprocess.run(["umount", str(folder)], check=True)

    def test_read_only(self, refused: Refused, mount: Callable[[str], Path]) -> None:
        folder = mount("size=1m,ro")
        message = refused("--output", folder / "rex")
        assert message == f"can't write to '{folder}/rex': it is on a read-only file system; name another folder"

    def test_full(self, refused: Refused, mount: Callable[[str], Path]) -> None:
        folder = mount("size=16k")
        message = refused("--output", folder / "rex")
        assert message == f"can't write to '{folder}/rex': no space is left there; free some, or name another folder"
