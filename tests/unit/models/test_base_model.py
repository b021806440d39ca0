"""Base models: found, refused, copied once, and known by their content."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from base_folders import UNET, change, fault
from fsspec.implementations.memory import MemoryFileSystem

from dreambooth.models.base_model import BaseModel, resolve_base_model
from dreambooth.models.families import family_of


@pytest.fixture
def memory(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """The base model at memory://models/tiny, and a cache of its own."""
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    for path in tiny_pipeline.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"/models/tiny/{path.relative_to(tiny_pipeline).as_posix()}", path.read_bytes())
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


class TestFinding:
    def test_the_miniature(self) -> None:
        from dreambooth.miniature import PIPELINE_DIR

        base = resolve_base_model("miniature")
        assert base.directory == PIPELINE_DIR
        assert base.resolution == 64
        assert base.parameter_counts["unet"] > 1e6

    @pytest.mark.parametrize("store", ["", "memory://weights"], ids=["a folder", "a store"])
    def test_the_miniature_where_its_weights_are_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: MemoryFileSystem, store: str
    ) -> None:
        from dreambooth.miniature import PIPELINE_DIR, WEIGHTS_DIR

        whole = resolve_base_model("miniature").hash
        monkeypatch.setattr("dreambooth.models.base_model.WEIGHTS_DIR", tmp_path / "package")
        assert "its weights aren't in" in fault("miniature")
        monkeypatch.setenv("DREAMBOOTH_WEIGHTS", str(tmp_path))
        assert "give $DREAMBOOTH_WEIGHTS the address of a copy" in fault("miniature")
        memory.put(str(PIPELINE_DIR), "/weights/pipeline", recursive=True)
        monkeypatch.setenv("DREAMBOOTH_WEIGHTS", store or str(WEIGHTS_DIR))
        assert resolve_base_model("miniature").hash == whole

    def test_a_folder(self, tiny_pipeline: Path) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        base = resolve_base_model(str(tiny_pipeline))
        assert base == BaseModel(address=str(tiny_pipeline), revision=None, directory=tiny_pipeline.resolve())
        assert base.resolution == 64
        kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
        loaded = {
            part: kind.from_pretrained(tiny_pipeline, subfolder=part, local_files_only=True)
            for part, kind in kinds.items()
        }
        counts = {part: sum(p.numel() for p in module.parameters()) for part, module in loaded.items()}
        assert base.parameter_counts == counts

    def test_a_folder_by_a_relative_path(
        self, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "tiny").symlink_to(tiny_pipeline)
        monkeypatch.chdir(tmp_path)
        assert resolve_base_model("models/tiny").directory == tiny_pipeline.resolve()

    def test_a_folder_by_its_address_is_not_copied(self, tiny_pipeline: Path) -> None:
        assert resolve_base_model(f"file://{tiny_pipeline}").directory == tiny_pipeline.resolve()

    @pytest.mark.parametrize(
        "address", ["./missing", "file:///missing", "/no/such/folder", "~/no-such-folder", "missing", "a/b/c"]
    )
    def test_a_folder_that_is_not_there(self, address: str) -> None:
        assert (
            f"base_model {address!r}: expected 'miniature', 'miniature-flow', 'miniature-cascade', a folder"
            in fault(address)
        )
        assert "there is no such folder" in fault(address)

    def test_a_hub_id_that_cannot_be_had(self) -> None:
        message = fault("no-such-owner/no-such-model")
        assert message.startswith("base_model 'no-such-owner/no-such-model' is neither a folder here nor available")
        assert "check the name and the network" in message

    def test_a_file(self, base: Path) -> None:
        assert "there is no such folder" in fault(base / "model_index.json")


class TestWhatIsNoPipeline:
    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert f"expected a diffusers pipeline in {tmp_path}, but it has no model_index.json" in fault(tmp_path)

    def test_a_class_that_is_not_supported(self, base: Path) -> None:
        change(base / "model_index.json", _class_name="KandinskyPipeline")
        assert "holds a KandinskyPipeline, which is not supported; supported: StableDiffusionPipeline" in fault(base)

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '"StableDiffusionPipeline"'])
    def test_an_index_that_names_no_class(self, base: Path, content: str) -> None:
        (base / "model_index.json").write_text(content)
        assert "does not name a pipeline class" in fault(base)

    def test_a_model_that_predicts_something_else(self, base: Path) -> None:
        change(base / "scheduler" / "scheduler_config.json", prediction_type="score")
        assert 'prediction_type is "score"; expected epsilon or v_prediction or sample' in fault(base)


class TestRemote:
    def test_copied_once(self, memory: MemoryFileSystem, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = resolve_base_model("memory://models/tiny")
        monkeypatch.setattr(MemoryFileSystem, "get_file", _fail)
        again = resolve_base_model("memory://models/tiny/")
        assert again.directory == resolve_base_model("memory://models/tiny").directory
        assert first.hash == again.hash == resolve_base_model(str(tiny_pipeline)).hash
        assert first.address == "memory://models/tiny"

    def test_copied_anew_when_it_changes_even_at_the_same_size(self, memory: MemoryFileSystem) -> None:
        before = resolve_base_model("memory://models/tiny")
        content = memory.cat_file(f"/models/tiny/{UNET}")
        memory.pipe_file(f"/models/tiny/{UNET}", content[:-1] + bytes([content[-1] ^ 1]))
        after = resolve_base_model("memory://models/tiny")
        assert after.directory != before.directory
        assert after.hash != before.hash

    def test_a_copy_that_breaks_off_is_never_taken_for_a_whole_one(
        self, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        whole, copied = MemoryFileSystem.get_file, []

        def break_off(self: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
            if len(copied) == 4:
                raise ConnectionResetError("the store went away")
            copied.append(source)
            whole(self, source, target, **options)

        monkeypatch.setattr(MemoryFileSystem, "get_file", break_off)
        assert "the store went away" in fault("memory://models/tiny")
        assert [path for path in (tmp_path / "cache" / "bases").iterdir() if path.suffix != ".lock"] == []
        monkeypatch.setattr(MemoryFileSystem, "get_file", whole)
        assert resolve_base_model("memory://models/tiny").resolution == 64

    def test_nothing_there(self, memory: MemoryFileSystem) -> None:
        assert fault("memory://models/other") == "base_model 'memory://models/other': there is nothing at that address"

    def test_a_scheme_that_nobody_knows(self) -> None:
        assert "base_model 'nosuch://models/tiny' can't be read" in fault("nosuch://models/tiny")

    def test_a_store_that_is_away(self, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        class EndpointConnectionError(Exception):
            """Drivers have exceptions of their own: botocore's are no OSErrors."""

        def away(*args: Any, **options: Any) -> None:
            raise EndpointConnectionError("could not connect")

        monkeypatch.setattr(MemoryFileSystem, "find", away)
        assert "can't be read: EndpointConnectionError: could not connect" in fault("memory://models/tiny")


def _fail(*args: Any, **options: Any) -> None:
    raise AssertionError("it was copied again")


class TestHash:
    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            (UNET, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
            ("tokenizer/tokenizer.json", lambda content: content + b"\n"),
            ("scheduler/scheduler_config.json", lambda content: content.replace(b"0.012", b"0.013")),
        ],
    )
    def test_it_changes_with_a_byte(self, base: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
        before = resolve_base_model(str(base)).hash
        (base / name).write_bytes(damage((base / name).read_bytes()))
        assert resolve_base_model(str(base)).hash != before

    def test_it_changes_with_a_name(self, base: Path) -> None:
        before = resolve_base_model(str(base)).hash
        (base / "vae" / "note.txt").write_text("a note")
        after = resolve_base_model(str(base)).hash
        (base / "vae" / "note.txt").rename(base / "vae" / "other.txt")
        assert len({before, after, resolve_base_model(str(base)).hash}) == 3

    def test_it_does_not_depend_on_where_it_lies_or_on_what_is_never_loaded(
        self, base: Path, tiny_pipeline: Path
    ) -> None:
        (base / "safety_checker").mkdir()
        (base / "safety_checker" / "config.json").write_text("{}")
        (base / "README.md").write_text("words")
        assert resolve_base_model(str(base)).hash == resolve_base_model(str(tiny_pipeline)).hash
        assert len(resolve_base_model(str(base)).hash) == 16


def test_modules_made_while_a_base_is_loaded_stay_where_they_are(tiny_pipeline: Path) -> None:
    """A lane publishes one subject while it loads parts for the next."""
    family, made = family_of(tiny_pipeline), []

    def make(stop: threading.Event) -> None:
        while not stop.is_set():
            made.append(torch.nn.Linear(2, 2).weight.device.type)

    stop = threading.Event()
    other = threading.Thread(target=make, args=(stop,))
    other.start()
    try:
        for _ in range(5):
            for part in ("unet", "vae", "text_encoder"):
                family.load(tiny_pipeline, part)
    finally:
        stop.set()
        other.join()
    assert set(made) == {"cpu"}
