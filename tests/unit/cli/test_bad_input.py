"""What a person can get wrong: a clear message, exit code 2, and no work started.

Every case goes through the command line twice: as a dry run, and as the real thing on a Ray that must not be started.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipelines.cli import main

CPUS = 8
Refused = Callable[..., str]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def refused(
    tiny_pipeline: Path,
    instance_folder: Path,
    mlflow_database: str,
    output: Path,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """What the command line says to `dreambooth run` with sound arguments but those given."""
    import pipelines.driver.personalize

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CPUS)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(pipelines.driver.personalize, "ray_cluster", start)
    monkeypatch.setattr(pipelines.driver.personalize, "ray_cluster_meanwhile", lambda config: nullcontext(start))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)

    def invoke(*arguments: str | Path, images: str | Path = instance_folder) -> str:
        sound = ("--images", images, "--class-noun", "dog", "--base-model", tiny_pipeline)
        sound += ("--set", f"storage.root={output}")
        before = sorted(working_folder.rglob("*"))
        messages = []
        for dry_run in ([], ["--dry-run"]):
            result = CliRunner().invoke(main, ["run", *map(str, (*sound, *arguments)), *dry_run])
            assert result.exit_code == 2, (result.output, result.exception)
            assert result.stdout == ""
            assert "Traceback" not in result.stderr
            messages.append(re.sub(r"\.probe-[0-9a-f]+(\.[0-9a-f]+\.part)?", ".probe", result.stderr.strip()))
        assert messages[0] == messages[1]
        written = output.rglob("*") if output.is_dir() else ()
        assert [path for path in written if path.is_file()] == []
        assert sorted(working_folder.rglob("*")) == before
        return messages[0].removeprefix("error: ")

    return invoke


def save(path: Path, width: int = 80, height: int = 72) -> Path:
    """A sound picture that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def bomb(path: Path, side: int) -> None:
    """A small PNG whose header claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


class TestInstanceImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Two sound pictures, to add a bad one to."""
        save(tmp_path / "rex" / "1.png")
        save(tmp_path / "rex" / "2.jpg")
        return tmp_path / "rex"

    def test_a_missing_folder(self, refused: Refused, tmp_path: Path) -> None:
        message = refused(images=tmp_path / "nowhere")
        assert message.startswith(
            f"there is nothing at {tmp_path}/nowhere; expected a folder, a glob or a list of .jpg"
        )

    def test_an_empty_folder(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "rex").mkdir()
        assert f"the folder {tmp_path}/rex holds no files" in refused(images=tmp_path / "rex")

    def test_no_image_among_the_files(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "rex").mkdir()
        (tmp_path / "rex" / "notes.txt").write_text("words")
        (tmp_path / "rex" / "film.mp4").write_bytes(b"film")
        message = refused(images=tmp_path / "rex")
        assert message.startswith(f"no image among 2 files at {tmp_path}/rex (film.mp4, notes.txt)")

    def test_a_glob_that_matches_nothing(self, refused: Refused, folder: Path) -> None:
        assert f"no file matches {folder}/*.webp" in refused(images=f"{folder}/*.webp")

    def test_a_corrupt_image(self, refused: Refused, folder: Path) -> None:
        content = bytearray(save(folder / "bad.png").read_bytes())
        content[3000:3100] = bytes(100)
        (folder / "bad.png").write_bytes(content)
        assert f"{folder}/bad.png is damaged" in refused(images=folder)

    @pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp"])
    def test_a_truncated_image(self, refused: Refused, folder: Path, name: str) -> None:
        path = save(folder / name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert f"{path} is damaged" in refused(images=folder)

    def test_a_zero_byte_image(self, refused: Refused, folder: Path) -> None:
        (folder / "bad.png").touch()
        assert refused(images=folder).startswith(f"{folder}/bad.png is empty (0 bytes); replace it")

    def test_something_else_under_an_images_name(self, refused: Refused, folder: Path) -> None:
        (folder / "bad.jpg").write_text("<html>404</html>")
        assert f"{folder}/bad.jpg is no JPEG, PNG, WebP, AVIF" in refused(images=folder)

    def test_an_image_bomb(self, refused: Refused, folder: Path) -> None:
        bomb(folder / "bomb.png", 10_000)
        message = refused(images=folder)
        assert message.startswith(f"{folder}/bomb.png is 10000 x 10000 = 100000000 pixels, but images.max_pixels is ")
        bomb(folder / "bomb.png", 60_000)
        assert f"{folder}/bomb.png is" in refused(images=folder)

    def test_the_limit_is_a_setting(self, refused: Refused, folder: Path) -> None:
        assert "80 x 72 = 5760 pixels, but images.max_pixels is 5759" in refused(
            "--set", "images.max_pixels=5759", images=folder
        )

    def test_an_image_smaller_than_the_resolution(self, refused: Refused, folder: Path) -> None:
        save(folder / "small.png", width=90, height=40)
        message = refused(images=folder)
        assert message.startswith(f"{folder}/small.png is 90 x 40 pixels, but images.resolution is 64")
        assert "1.png" not in message

    def test_all_faults_are_told_at_once(self, refused: Refused, folder: Path) -> None:
        save(folder / "small.png", width=90, height=40)
        (folder / "empty.png").touch()
        assert len(refused(images=folder).splitlines()) == 2

    @pytest.mark.parametrize(
        ("repeats", "message"),
        [
            ("{2.JPG: 2}", "images.repeats: 2.JPG is the name of none of 2 photographs; did you mean 2.jpg?"),
            ("{rex: 2}", "images.repeats: rex is the name of none of 2 photographs; they are 1.png, 2.jpg"),
            ("{1.png: 0}", "images.repeats.1.png: must be at least 1; got 0"),
        ],
    )
    def test_repeats_of_what_is_not_there(self, refused: Refused, folder: Path, repeats: str, message: str) -> None:
        assert refused("--set", f"images.repeats={repeats}", images=folder) == message

    def test_masks_that_are_none(self, refused: Refused, folder: Path) -> None:
        masks = ("--set", "images.masks=weight")
        assert "needs masks, but none of 2 photographs has" in refused(*masks, images=folder)
        save(folder / "1.mask.png", width=40)
        Image.new("L", (80, 72)).save(folder / "2.mask.png")
        size, empty = refused(*masks, images=folder).splitlines()
        assert size.startswith(f"{folder}/1.mask.png is 40 x 72 pixels, but {folder}/1.png, which it masks, is 80 x 72")
        assert empty.startswith(f"{folder}/2.mask.png is empty: its brightest pixel is 0 of 255")

    def test_a_metadata_file_that_breaks_off(self, refused: Refused, folder: Path) -> None:
        (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a photo of [V]"}\n{"file_na')
        assert refused(images=folder).startswith(f"{folder}/metadata.jsonl: line 2 is not JSON")

    def test_a_store_that_nobody_knows(self, refused: Refused) -> None:
        assert "nosuch://bucket/rex" in refused(images="nosuch://bucket/rex")


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "nearest"),
        [
            ("train.learningrate=1e-4", "train.learning_rate"),
            ("train.steps=3", "train.max_train_steps"),
            ("max_train_steps=3", "train.max_train_steps"),
            ("zero.level=2", "zero.stage"),
            ("clusters.num_workers=2", "cluster"),
            ("steps=3", "train.max_train_steps"),
        ],
    )
    def test_an_unknown_one_with_the_nearest_known_one(self, refused: Refused, setting: str, nearest: str) -> None:
        name = "clusters" if setting.startswith("clusters") else setting.partition("=")[0]
        assert refused("--set", setting) == f"unknown setting {name}; did you mean {nearest}?"

    def test_an_unknown_one_in_a_file(self, refused: Refused, working_folder: Path) -> None:
        (working_folder / "run.yaml").write_text("train:\n  learningrate: 0.1\n")
        message = refused("run.yaml")
        assert message == "unknown setting train.learningrate; did you mean train.learning_rate?"

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("train.max_train_steps=many", "train.max_train_steps: must be a whole number"),
            ("train.max_train_steps=1.5", "train.max_train_steps: must be a whole number"),
            ("train.max_train_steps=true", "train.max_train_steps: expected a whole number, got True"),
            ("train.learning_rate=[1]", "train.learning_rate: must be a number"),
            ("train.gradient_checkpointing=perhaps", "train.gradient_checkpointing: must be true or false"),
            ("train=5", "train: expected settings such as train.max_train_steps, got 5"),
            ("engine=tensorflow", "engine: must be 'auto', 'torch' or 'deepspeed'; got 'tensorflow'"),
            ("zero.stage=4", "zero.stage: must be 0, 1, 2 or 3; got 4"),
            ("evaluation.prompts=[]", "evaluation.prompts: "),
            ("images.resolution=100", "images.resolution: expected a multiple of 8, at least 16, got 100"),
            ("train.learning_rate=.inf", "train.learning_rate: must be "),
        ],
    )
    def test_a_wrong_type_or_choice(self, refused: Refused, setting: str, message: str) -> None:
        assert refused("--set", setting).startswith(message)

    @pytest.mark.parametrize("flag", ["--steps", "--workers", "--zero-stage"])
    def test_a_flag_of_a_wrong_type(self, refused: Refused, flag: str) -> None:
        assert f"Invalid value for '{flag}': 'many' is not a valid integer" in refused(flag, "many")

    def test_an_unknown_flag(self, refused: Refused) -> None:
        assert "No such option '--step'" in refused("--step", "3")

    @pytest.mark.parametrize("setting", ["seed", "=3", "train.=3"])
    def test_a_set_that_is_none(self, refused: Refused, setting: str) -> None:
        assert refused("--set", setting).startswith("--set takes a.b=value")

    @pytest.mark.parametrize("value", ["0", "-3"])
    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            (("--steps", "{}"), "train.max_train_steps"),
            (("--workers", "{}"), "cluster.num_workers"),
            (("--set", "train.micro_batch_size={}"), "train.micro_batch_size"),
            (("--set", "train.gradient_accumulation_steps={}"), "train.gradient_accumulation_steps"),
            (("--set", "prior.num_class_images={}"), "prior.num_class_images"),
            (("--set", "prior.batch_size={}"), "prior.batch_size"),
        ],
    )
    def test_counts_that_are_zero_or_negative(
        self, refused: Refused, arguments: tuple[str, ...], name: str, value: str
    ) -> None:
        message = refused(*(argument.format(value) for argument in arguments))
        assert message == f"{name}: must be at least 1; got {value}"

    def test_a_file_that_is_not_there(self, refused: Refused) -> None:
        assert "can't read the configuration nowhere.yaml" in refused("nowhere.yaml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a: [1", "run.yaml is not valid YAML"),
            (b"\xff\xfe\x00", "run.yaml begins as UTF-16-LE and breaks off"),
            (b"", "run.yaml should hold settings"),
            (b"- a", "run.yaml should hold settings"),
        ],
    )
    def test_a_file_that_holds_none(self, refused: Refused, working_folder: Path, content: bytes, message: str) -> None:
        (working_folder / "run.yaml").write_bytes(content)
        assert refused("run.yaml").startswith(message)

    def test_a_file_with_something_else_for_a_subject(self, refused: Refused, working_folder: Path) -> None:
        (working_folder / "run.yaml").write_text("subject: rex\n")
        assert refused("run.yaml") == "subject: expected settings such as subject.instance_images, got 'rex'"

    def test_a_folder_for_a_file(self, refused: Refused, working_folder: Path) -> None:
        (working_folder / "run.yaml").mkdir()
        assert "'run.yaml' is a directory" in refused("run.yaml")

    def test_nothing_at_all(self) -> None:
        result = CliRunner().invoke(main, ["run"])
        assert result.exit_code == 2
        assert "--images photos/rex" in result.stderr
        assert "--class-noun dog" in result.stderr


class TestSubject:
    @pytest.mark.parametrize("flag", ["--class-noun", "--identifier"])
    @pytest.mark.parametrize("words", ["", " ", "\u3000"])
    def test_nothing_to_be_seen(self, refused: Refused, flag: str, words: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        assert refused(flag, words) == f"subject.{name}: expected at least one visible character, got an empty text"

    @pytest.mark.parametrize("flag", ["--class-noun", "--identifier"])
    @pytest.mark.parametrize("hidden", ["\0", "\n", "\x1b", "\u200b", "\u202e"])
    def test_control_characters(self, refused: Refused, flag: str, hidden: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        message = refused(flag, f"to{hidden}y")
        assert message.startswith(f"subject.{name}: expected visible characters, got the control character U+")
        assert f"U+{ord(hidden):04X}" in message
        assert hidden not in message  # or it would act on the terminal

    @pytest.mark.parametrize("identifier", ["dog", "DOG", " Dog "])
    def test_an_identifier_that_is_the_class_noun(self, refused: Refused, identifier: str) -> None:
        message = refused("--identifier", identifier)
        assert message.startswith("subject: identifier and class_noun are both 'dog'; the identifier has to be another")

    @pytest.mark.parametrize(
        "name", ["", "My Dog", "rex/..", "../rex", "-rex", "rex-", "rex_1", "réx", "a" * 64, "rex\n", "."]
    )
    def test_a_name_unfit_for_paths(self, refused: Refused, name: str) -> None:
        message = refused("--name", name)
        assert message.startswith(
            "subject.name: a subject name becomes part of paths and model names, so it takes 1 to"
        )
        assert message.endswith(f"got {name!r}")

    def test_a_folder_that_gives_no_name(self, refused: Refused, instance_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(instance_folder, tmp_path / "___")
        assert "subject.name: a subject name becomes" in refused(images=tmp_path / "___")

    def test_no_class_noun(self, instance_folder: Path) -> None:
        result = CliRunner().invoke(main, ["run", "--images", str(instance_folder), "--dry-run"])
        assert result.exit_code == 2
        assert result.stderr.strip() == "error: subject.class_noun is missing; give it as in --class-noun dog"


class TestTexts:
    @pytest.mark.parametrize(
        ("caption", "message"),
        [
            (
                "a photo of {identifier} dog",
                "'{identifier}' is no placeholder here; write [V] where the identifier goes",
            ),
            ("a photo of [v] dog", "'[v]' is no placeholder here; write [V]"),
            ("a photo of [V] {class_noun}", "'{class_noun}' is no placeholder here; write the class noun itself"),
            (f"a photo {'on the beach ' * 8}of [V] dog", "'beach on the beach of "),
        ],
    )
    def test_a_caption_that_means_something_else(
        self, refused: Refused, tmp_path: Path, caption: str, message: str
    ) -> None:
        for name in ("1.png", "2.png", "3.png"):
            save(tmp_path / "rex" / name)
        (tmp_path / "rex" / "2.txt").write_text(caption)
        said = refused(images=tmp_path / "rex")
        assert said.startswith(f"the caption of {tmp_path}/rex/2.png")
        assert message in said

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("evaluation.prompts=['a [V] {noun}']", "evaluation.prompts.0: 'a [V] {noun}': '{noun}' is no placeholder"),
            (
                "prompts.instance='a photo of [V] dog'",
                "prompts.instance: 'a photo of [V] dog': '[V]' is no placeholder",
            ),
            (
                "prompts.class='a photo of {identifier}'",
                "prompts.class: 'a photo of {identifier}' names the identifier",
            ),
        ],
    )
    def test_a_setting_that_means_something_else(self, refused: Refused, setting: str, message: str) -> None:
        assert refused("--set", setting).startswith(message)

    def test_an_identifier_that_is_a_placeholder(self, refused: Refused) -> None:
        assert refused("--identifier", "[V]").startswith("subject.identifier: '[V]' is a placeholder; give a rare word")


class TestBaseModel:
    @pytest.mark.parametrize("address", ["./nowhere", "nowhere", "/no/where"])
    def test_one_that_is_not_there(self, refused: Refused, address: str) -> None:
        expected = f"base_model {address!r}: expected 'miniature', 'miniature-flow', 'miniature-cascade', a folder"
        assert refused("--base-model", address).startswith(expected)

    def test_a_hub_id_that_cannot_be_had(self, refused: Refused) -> None:
        message = refused("--base-model", "no-such-owner/no-such-model")
        assert message.startswith("base_model 'no-such-owner/no-such-model' is neither a folder here nor to be had")

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


class TestOtherCommands:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["identifiers", "--base-model", "./nowhere"], "base_model './nowhere': expected"),
            (["identifiers", "--limit", "0"], "Invalid value for '--limit'"),
            (["generate", "a [V] dog"], "Missing option '--model'"),
            (["generate", "--model", "./nowhere", "a [V] dog"], "./nowhere"),
            (["generate", "--model", "./nowhere", "--num", "0", "a [V] dog"], "Invalid value for '--num'"),
            (["generate", "--model", "./nowhere", " "], "the prompt is empty"),
            (["generate", "--model", "./nowhere", "a [v] dog"], "'[v]' is no placeholder here; write [V]"),
            (["generate", "--model", "./nowhere", "a [V] {class_noun}"], "write the class noun itself, such as dog"),
        ],
    )
    def test_they_refuse_in_the_same_way(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_a_prompt_that_a_model_cannot_read_whole(self, tiny_pipeline: Path, working_folder: Path) -> None:
        prompt = f"a photo {'on the beach ' * 8}of a dog"
        result = CliRunner().invoke(main, ["generate", "--model", str(tiny_pipeline), prompt])
        assert result.exit_code == 2
        assert "has 29 tokens, and the base model reads 22: 'beach on the beach of a dog' is cut off" in result.stderr
        assert [path for path in working_folder.rglob("*") if path.is_file()] == []
