"""Where results go, proved before any work."""

import shutil
from pathlib import Path

import pytest
from machine_plan import MachinePlan

from dreambooth.errors import InputError
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.batch_plan import describe_batch, make_batch_plan
from pipelines.plan.destinations import check_destinations, check_servers


class TestDestinations:
    def test_they_pass_and_nothing_is_left_in_them(self, plan: MachinePlan, tmp_path: Path) -> None:
        check_destinations([plan()])
        assert [path for path in (tmp_path / "output").rglob("*") if path.is_file()] == []

    @pytest.mark.parametrize("place", ["run", "prior"])
    def test_a_folder_that_cannot_be(self, plan: MachinePlan, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=f"can't write to '{tmp_path}/file/here': a part of the path is a file"):
            check_destinations([plan(f"storage.{place}={tmp_path}/file/here")])

    def test_a_batch_names_every_base_model(self, plan: MachinePlan, tiny_pipeline: Path, tmp_path: Path) -> None:
        resources = Resources(cpus=8, gpus=0)
        copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "other"))
        (copy / "vae" / "note.txt").write_text("another one")
        plans = [plan(), plan(base=copy), plan("train.seed=1", base=copy)]
        rows = [value for name, value in describe_batch(make_batch_plan("b", plans, resources)) if name == "base model"]
        assert rows == [
            f"{tiny_pipeline}, hash {plans[0].base.hash}: 1 subject",
            f"{copy}, hash {plans[1].base.hash}: 2 subjects",
        ]
        alone = dict(describe_batch(make_batch_plan("b", plans[:1], resources)))
        assert alone["base model"] == f"{tiny_pipeline}, hash {plans[0].base.hash}"

    def test_a_batch_is_not_measured_by_the_first_subjects_encoder(self, plan: MachinePlan) -> None:
        resources = Resources(cpus=8, gpus=0)
        with pytest.raises(InputError, match=r"evaluation\.image_encoder=facebook/dino-vits16"):
            make_batch_plan("b", [plan(), plan(base="miniature")], resources)
        encoder = "evaluation.image_encoder=miniature"
        assert make_batch_plan("b", [plan(encoder), plan(encoder, base="miniature")], resources).lanes == 2

    def test_without_prior_preservation_its_folder_is_not_looked_at(self, plan: MachinePlan, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        check_destinations([plan(f"storage.prior={tmp_path}/file/here", "prior.prior_loss_weight=0")])

    def test_a_tracking_server_that_is_away(self, plan: MachinePlan) -> None:
        with pytest.raises(InputError, match=r"no MLflow tracking at http://127\.0\.0\.1:9"):
            check_servers([plan("tracking.uri=http://127.0.0.1:9")])

    def test_a_file_of_sqlite_is_no_place_for_several_nodes(self, plan: MachinePlan, tmp_path: Path) -> None:
        made = plan(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        check_servers([made], nodes=1)
        with pytest.raises(InputError, match=r"the cluster has 3 nodes, but MLflow .*'mlflow server'.* tracking\.uri"):
            check_servers([made], nodes=3)

    @pytest.mark.parametrize(
        ("overrides", "checkpoints", "models"),
        [
            (("train.max_train_steps=1000", "train.checkpoint_every=100"), 3, 1),  # two are kept while one is written
            (("train.max_train_steps=200", "train.checkpoint_every=100"), 1, 2),
            (("train.max_train_steps=5", "train.checkpoint_every_minutes=1"), 3, 1),
            (("train.max_train_steps=5", "storage.dtype=float32"), 1, 2),  # the model, and where it is put together
        ],
    )
    def test_the_space_that_a_run_takes(
        self,
        plan: MachinePlan,
        monkeypatch: pytest.MonkeyPatch,
        overrides: tuple[str, ...],
        checkpoints: int,
        models: int,
    ) -> None:
        made = plan(*overrides)
        model = (4 if made.config.storage.dtype == "float32" else 2) * sum(made.base.parameter_counts.values())
        needed = checkpoints * 12 * made.trained_parameters + models * model  # they and TMPDIR lie on one disk
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(InputError, match=r"[GM]B free, and .* will be written there: .* checkpoints? of "):
            check_destinations([made])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        check_destinations([made])

    def test_checkpoints_that_are_there_already_take_no_more_room(
        self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = plan("train.max_train_steps=1000", "train.checkpoint_every=100")
        left = Path(made.config.run_uri, "checkpoints", made.key, "step-00000100-16f3a1b2c3d4e5f6", "engine.pt")
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(1000))
        usage = shutil.disk_usage("/")
        needed = 3 * made.checkpoint_bytes + made.published_bytes - 1000
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        check_destinations([made])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(InputError, match="will be written"):
            check_destinations([made])

    def test_the_models_of_all_subjects_need_room(self, plan: MachinePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        many = [plan(f"subject.name=dog-{number}", "train.max_train_steps=5") for number in range(4)]
        usage = shutil.disk_usage("/")
        needed = 2 * many[0].checkpoint_bytes + (4 + 2) * many[0].published_bytes  # two lanes, two in TMPDIR
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        check_destinations(many, lanes=2)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(InputError, match="4 models of"):
            check_destinations(many, lanes=2)
