"""All subjects of a batch are checked before anything starts: what is an error, what a warning, and whose."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.images.states import state_of
from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.batch_plan import describe_batch, make_batch_plan
from pipelines.plan.estimate import describe_estimate
from pipelines.plan.inspections import Found, known_inspections, remember_inspections
from pipelines.plan.pace import known_paces, pace_key, remember_paces
from pipelines.plan.run_plan import Plan, make_plan
from pipelines.plan.subject_checks import SubjectCheck, check_subjects, valid_plans
from pipelines.plan.subject_list import ListedSubject
from pipelines.storage.files import join, write_bytes

ROOM = Resources(cpus=4, gpus=0)


def picture(seed: int, size: tuple[int, int] = (80, 80)) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def subject(tmp_path: Path, tiny_pipeline: Path) -> Callable[..., DreamBoothConfig]:
    """A subject with pictures of these seeds."""

    def make(name: str, seeds: tuple[int, ...] = (1, 2, 3), *overrides: str) -> DreamBoothConfig:
        folder = tmp_path / name
        folder.mkdir()
        for seed in seeds:
            picture(100 * len(list(tmp_path.iterdir())) + seed).save(folder / f"{seed}.png")
        plain = {
            "base_model": str(tiny_pipeline),
            "subject": {"name": name, "class_noun": "dog", "instance_images": str(folder)},
            "storage": {"root": str(tmp_path / "out")},
        }
        return load_config(plain, overrides)

    return make


def check(*configs: DreamBoothConfig, known: Mapping[str, Found] | None = None) -> tuple[SubjectCheck, ...]:
    return check_subjects([ListedSubject(name=config.subject.name, config=config) for config in configs], ROOM, known)


def plans_of(checks: tuple[SubjectCheck, ...]) -> tuple[Plan, ...]:
    return valid_plans(checks, skip_invalid=False)


def test_good_subjects_get_plans_and_identifiers_of_their_own(subject: Callable[..., DreamBoothConfig]) -> None:
    checks = check(*(subject(f"rex-{i}") for i in range(4)))
    assert all(not found.errors and not found.warnings for found in checks)
    plans = valid_plans(checks, skip_invalid=False)
    assert len({plan.config.subject.identifier for plan in plans}) == 4


def test_many_are_checked_in_processes_with_the_same_findings(
    subject: Callable[..., DreamBoothConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [subject(f"rex-{number}", (1, 2) if number == 3 else (1, 2, 3)) for number in range(20)]
    Path(configs[17].subject.instance_images[0], "1.png").write_bytes(b"")
    alone = check(*configs)
    monkeypatch.setattr("pipelines.plan.subject_checks._PER_PROCESS", 5)
    monkeypatch.setattr("pipelines.plan.subject_checks.usable_cpus", lambda: 2)
    assert check(*configs) == alone
    assert alone[3].warnings
    assert "is empty" in alone[17].errors[0]


def test_checks_import_no_torch(subject: Callable[..., DreamBoothConfig], tmp_path: Path) -> None:
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(subject("rex")))
    code = f"""
import importlib.metadata, pathlib, pickle, sys
from pipelines.cluster.ray_cluster import Resources, local_resources
from pipelines.plan.batch_plan import make_batch_plan
from pipelines.plan.subject_checks import check_subjects, valid_plans
from pipelines.plan.subject_list import ListedSubject

config = pickle.loads(pathlib.Path({str(tmp_path / "config.pickle")!r}).read_bytes())
for_cpus = importlib.metadata.version("torch").endswith("+cpu")  # others have to be asked for GPUs
room = local_resources() if for_cpus else Resources(cpus=2, gpus=0)
checks = check_subjects([ListedSubject(name="rex", config=config)], room)
make_batch_plan("dogs", valid_plans(checks, skip_invalid=False), room)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # each process would pay for it


class TestInspections:
    @pytest.fixture(autouse=True)
    def settled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files count as settled from the start: nobody can set the time of a change."""
        monkeypatch.setattr("dreambooth.data.images.states.SETTLED_SECONDS", 0.0)

    def test_are_taken_from_an_earlier_plan_while_the_files_are_the_same(
        self, subject: Callable[..., DreamBoothConfig], tmp_path: Path
    ) -> None:
        configs = subject("rex"), subject("mug", (1, 2))
        checks = check(*configs)
        remember_inspections(str(tmp_path), "dogs", {one.name: one.found for one in checks})
        known = known_inspections(str(tmp_path), "dogs")
        assert check(*configs, known=known) == checks
        assert "2 instance images" in checks[1].warnings[0]
        (found,) = known["rex"].values()
        found[0] = "taken from there"
        again = check(*configs, known=known)
        assert [one.data_hash for one in plans_of(again)] == ["taken from there", plans_of(checks)[1].data_hash]
        assert {one.name: one.found for one in again} == known

    @pytest.mark.parametrize("damage", ["changed, its time set back", "cut short", "replaced", "gone", "one more"])
    def test_are_made_again_of_a_file_that_changed(self, subject: Callable[..., DreamBoothConfig], damage: str) -> None:
        config = subject("rex")
        known = {"rex": check(config)[0].found}
        assert known["rex"]
        photo = Path(config.subject.instance_images[0], "2.png")
        times, content = photo.stat(), photo.read_bytes()
        match damage:
            case "changed, its time set back":
                photo.write_bytes(content[:-20] + bytes(20))
                os.utime(photo, ns=(times.st_atime_ns, times.st_mtime_ns))
            case "cut short":
                photo.write_bytes(content[:-20])
            case "replaced":
                picture(99).save(photo.with_name("new.png"))
                photo.with_name("new.png").replace(photo)
            case "gone":
                photo.unlink()
            case "one more":
                picture(99).save(photo.with_name("4.png"))
        (fresh,), (again,) = check(config), check(config, known=known)
        assert again == fresh
        assert again.found.keys().isdisjoint(known["rex"])
        assert bool(again.errors) == (damage in ("changed, its time set back", "cut short"))

    def test_are_made_again_with_other_settings_or_captions(self, subject: Callable[..., DreamBoothConfig]) -> None:
        config = subject("rex")
        known = {"rex": check(config)[0].found}
        small = load_config(config.model_dump(mode="json"), ("images.max_pixels=10",))
        assert "images.max_pixels is 10" in check(small, known=known)[0].errors[0]
        Path(config.subject.instance_images[0], "1.txt").write_text("a photo of [V] in the rain")
        (again,) = check(config, known=known)
        assert again.found.keys().isdisjoint(known["rex"])
        assert again == check(config)[0]

    def test_are_not_remembered_of_files_just_written_or_without_a_state(
        self, subject: Callable[..., DreamBoothConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dreambooth.data.images.states.SETTLED_SECONDS", 3.0)
        assert not check(subject("rex"))[0].found
        write_bytes("memory://inspected/1.png", b"some")
        assert state_of("memory://inspected/1.png") is None

    @pytest.mark.parametrize("content", [b"", b"[1]", b'{"rex": 1}', b'{"rex": {"key": ["ha'])
    def test_of_a_damaged_file_are_none(self, tmp_path: Path, content: bytes) -> None:
        write_bytes(str(tmp_path / "batches" / "dogs" / "inspections.json"), content)
        assert known_inspections(str(tmp_path), "dogs") == {}
        assert known_inspections(str(tmp_path / "nowhere"), "dogs") == {}

    @pytest.mark.parametrize("stored", [None, ["hash", [], []], ["hash", "words", [[1, 1]] * 3], ["hash", [], [1] * 3]])
    def test_of_another_form_are_made_again(self, subject: Callable[..., DreamBoothConfig], stored: object) -> None:
        config = subject("rex")
        before = check(config)
        known = {"rex": dict.fromkeys(before[0].found, stored)}
        assert check(config, known=known) == before


def test_plans_share_the_settings_that_they_have_in_common(subject: Callable[..., DreamBoothConfig]) -> None:
    configs = [subject("rex"), subject("fido"), subject("mug", (1, 2, 3), "train.max_train_steps=7")]
    rex, fido, mug = valid_plans(check(*configs), skip_invalid=False)
    assert rex.config.train is fido.config.train
    assert rex.base is fido.base is mug.base
    assert mug.config.train.max_train_steps == 7 != rex.config.train.max_train_steps
    alone = make_plan(configs[1], ROOM, identifier=fido.config.subject.identifier)
    assert (fido.key, fido.config) == (alone.key, alone.config)
    assert pickle.loads(pickle.dumps(fido)) == fido


def test_identifiers_do_not_take_a_given_one(subject: Callable[..., DreamBoothConfig]) -> None:
    chosen = check(subject("rex"))[0].plan
    assert chosen is not None
    given = subject("mug", (1, 2, 3), f"subject.identifier={chosen.config.subject.identifier}")
    other = check(given, subject("fido"), load_config(chosen.config.model_dump() | {"subject": unnamed(chosen.config)}))
    assert len({found.plan.config.subject.identifier for found in other if found.plan}) == 3


def test_identifiers_are_not_warned_of_that_nobody_gave(subject: Callable[..., DreamBoothConfig]) -> None:
    rex = subject("rex")
    many = [rex.model_copy(update={"subject": rex.subject.model_copy(update={"name": f"rex-{i}"})}) for i in range(70)]
    found = check(*many)  # more than the tokenizer has rare tokens for, so some identifiers are spelled
    assert len({one.plan.config.subject.identifier for one in found if one.plan}) == 70
    assert {warning for one in found for warning in one.warnings} == {"its images are those of rex-0"}


def unnamed(config: DreamBoothConfig) -> dict[str, object]:
    return config.subject.model_dump() | {"identifier": None}


def test_images_that_are_too_alike(subject: Callable[..., DreamBoothConfig], tmp_path: Path) -> None:
    config = subject("rex")
    first = Image.open(next((tmp_path / "rex").iterdir()))
    first.save(tmp_path / "rex" / "copy.png")
    first.save(tmp_path / "rex" / "nearly.jpg", quality=60)
    picture(77, (90, 80)).save(tmp_path / "rex" / "wide.png")
    [found] = check(config)
    said = "\n".join(found.warnings)
    assert "are the same picture" in said
    assert "nearly.jpg" in said
    assert "are nearly the same picture" in said
    assert "images of 2 sizes, from 80x80 to 90x80" in said
    assert "wide.png" not in said.replace("images of", "")


def test_what_is_wrong_is_told_of_its_own_subject(subject: Callable[..., DreamBoothConfig], tmp_path: Path) -> None:
    few, broken, small, gone = subject("few", (1,)), subject("broken"), subject("small"), subject("gone")
    (tmp_path / "broken" / "4.png").write_bytes(b"no picture")
    picture(5, (20, 20)).save(tmp_path / "small" / "5.png")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    checks = {found.name: found for found in check(few, broken, small, gone)}
    assert not checks["few"].errors
    assert "three to five" in checks["few"].warnings[0]
    assert "4.png" in checks["broken"].errors[0]
    assert "5.png" in checks["small"].errors[0]
    assert checks["gone"].errors

    with pytest.raises(InputError, match=r"3 of 4 subjects can't be trained \(broken, small, gone\); .*--skip-invalid"):
        valid_plans(tuple(checks.values()), skip_invalid=False)
    [plan] = valid_plans(tuple(checks.values()), skip_invalid=True)
    assert plan.config.subject.name == "few"
    with pytest.raises(InputError, match="no subject of 1 can be trained"):
        valid_plans([checks["gone"]], skip_invalid=True)


def test_words_that_the_base_model_does_not_know_or_knows_too_well(
    subject: Callable[..., DreamBoothConfig],
) -> None:
    strange = subject("strange", (1, 2, 3), "subject.class_noun=qzxwv")
    common = subject("common", (1, 2, 3), "subject.identifier=photo")
    found = {one.name: "\n".join(one.warnings) for one in check(strange, common)}
    assert "no word of its own for the class noun 'qzxwv'" in found["strange"]
    assert "with a meaning for the base model" in found["common"]


def test_two_subjects_with_the_same_images(subject: Callable[..., DreamBoothConfig], tmp_path: Path) -> None:
    rex = subject("rex")
    twin = rex.model_copy(update={"subject": rex.subject.model_copy(update={"name": "twin"})})
    assert check(rex, twin)[1].warnings == ("its images are those of rex",)


def test_a_batch_that_has_no_room_or_mixes_workers(subject: Callable[..., DreamBoothConfig]) -> None:
    plans = valid_plans(check(subject("a"), subject("b", (1, 2, 3), "cluster.cpus_per_worker=2")), skip_invalid=False)
    with pytest.raises(InputError, match="b needs other workers than a"):
        make_batch_plan("pets", plans, ROOM)
    with pytest.raises(InputError, match="the cluster has 1 CPU "):
        make_batch_plan("pets", plans[1:], Resources(cpus=1, gpus=0))
    greedy = valid_plans(check(subject("c", (1, 2, 3), "cluster.lanes=5")), skip_invalid=False)
    with pytest.raises(InputError, match=r"cluster.lanes is 5, but the cluster has room for 4"):
        make_batch_plan("pets", greedy, ROOM)


def test_the_plan_says_how_many_lanes_and_why(subject: Callable[..., DreamBoothConfig]) -> None:
    plans = valid_plans(check(*(subject(f"s-{i}") for i in range(6))), skip_invalid=False)
    rows = dict(describe_batch(make_batch_plan("pets", plans, ROOM)))
    assert rows["lanes"] == "4 (4 CPUs, and a subject takes 1)"
    assert rows["batch"] == "pets: 6 subjects of 1 class"
    assert rows["class images"].startswith("1 set, 200 images to make")
    few = dict(describe_batch(make_batch_plan("pets", plans[:2], ROOM)))
    assert few["lanes"] == "2 (no more than subjects)"


@pytest.mark.parametrize("stored", [b'{"a": {"steps_per', b"[]", b'{"a": {"rate": 1}}', b'{"a": 1}', b"\xff"])
def test_paces_that_cannot_be_read_are_none_and_are_replaced(
    subject: Callable[..., DreamBoothConfig], stored: bytes
) -> None:
    plans = valid_plans(check(subject("rex")), skip_invalid=False)
    root = plans[0].config.storage.root
    write_bytes(join(root, "batches", "paces.json"), stored)
    assert known_paces(root) == {}
    remember_paces(root, "rex", [(plans[0], 2.0)])
    assert known_paces(root)[pace_key(plans[0])].steps_per_second == 2.0


def test_the_time_is_estimated_by_the_pace_of_earlier_runs(subject: Callable[..., DreamBoothConfig]) -> None:
    steps = "train.max_train_steps=1200"
    plans = valid_plans(check(*(subject(f"s-{i}", (1, 2, 3), steps) for i in range(4))), skip_invalid=False)
    root = plans[0].config.storage.root

    def time() -> str:
        return dict(describe_estimate(plans, lanes=2))["time"]

    assert time() == f"not known before a first result of this base model, these settings and workers is at {root}"
    [slower] = valid_plans(check(subject("slow", (1, 2, 3), "train.micro_batch_size=2")), skip_invalid=False)
    remember_paces(root, "cups", [(slower, 1.0), (plans[0], None), (plans[0], 0.0)])
    assert time().startswith("not known")
    [longer] = valid_plans(check(subject("long", (1, 2, 3), "train.max_train_steps=7")), skip_invalid=False)
    remember_paces(root, "dogs", [(longer, 8.0), (plans[0], 10.0), (plans[1], 11.0)])
    assert time().startswith("about 4 min of steps in each lane, at the 10.0 steps/s of dogs on 2")
    [alone] = [value for what, value in describe_estimate(plans[:1], lanes=1) if what == "time"]
    assert alone.startswith("about 2 min of steps, at the 10.0 steps/s of dogs on 2")
    assert known_paces(root)[pace_key(slower)].batch == "cups"
    [by_minutes] = valid_plans(
        check(subject("often", (1, 2, 3), "train.checkpoint_every_minutes=5")), skip_invalid=False
    )
    [sampled] = valid_plans(check(subject("seen", (1, 2, 3), "train.validate_every=5")), skip_invalid=False)
    assert pace_key(by_minutes) == pace_key(plans[0]) != pace_key(sampled)
