"""Textual Inversion: one embedding is learnt, everything else stays as it was, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.identifier import token_ids_in_prompts
from dreambooth.data.images import find_instance_images
from dreambooth.data.prepare import prepare_data
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import load_tokenizer
from dreambooth.training.engine import TorchEngine
from dreambooth.training.loop import StepMetrics, fit
from dreambooth.training.model import load_components, load_model


def configured(base: Path | str, images: Path | str = "photos", **changes: Any) -> DreamBoothConfig:
    plain: dict[str, Any] = {
        "base_model": str(base),
        "subject": {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": str(images)},
        "images": {"resolution": 64},
        "train": {
            "method": "textual_inversion",
            "max_train_steps": 6,
            "identifier_learning_rate": 0.05,
            "micro_batch_size": 2,
        }
        | changes.pop("train", {}),
    }
    return load_config(plain | changes)


class Run:
    """One training, from the start or from a checkpoint."""

    def __init__(self, base: Path, images: Path, **train: Any) -> None:
        self.config = configured(base, images, train=train)
        photographs = find_instance_images([str(images)])
        self.data = prepare_data(base, self.config, photographs, [])
        self.engine = TorchEngine(load_model(base, self.config), self.config.train)
        self.metrics: list[StepMetrics] = []

    def fit(self, start: int = 0, save: tuple[int, Path] | None = None) -> "Run":
        def on_step(step: int, metrics: StepMetrics | None) -> None:
            if metrics is not None:
                self.metrics.append(metrics)
            if save is not None and step == save[0]:
                self.engine.save(save[1])

        fit(self.engine, self.data, self.config.train, start=start, on_step=on_step)
        return self

    @property
    def change(self) -> Tensor:
        return self.engine.model.identifier_embeddings["text_encoder"].change.detach()


def token(base: Path, text: str) -> int:
    [index] = token_ids_in_prompts(load_tokenizer(base), text)
    return index


def embeddings(base: Path) -> Tensor:
    table: Tensor = load_components(base).text_encoders["text_encoder"].get_input_embeddings().weight.detach()  # type: ignore[operator]
    return table


def test_it_starts_at_the_class_nouns_embedding(tiny_pipeline: Path) -> None:
    model = load_model(tiny_pipeline, configured(tiny_pipeline))
    tokenizer = load_tokenizer(tiny_pipeline)
    states = [
        model.text_encoders["text_encoder"](tokenizer([prompt], return_tensors="pt").input_ids).last_hidden_state
        for prompt in ("a photo of tfz", "a photo of dog", "a photo of cat")
    ]
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2])


def test_one_embedding_moves_and_all_else_is_the_base_models_bit_for_bit(
    tiny_pipeline: Path, instance_folder: Path, tmp_path: Path
) -> None:
    run = Run(tiny_pipeline, instance_folder).fit()
    state = run.engine.state_dict()
    export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float32)
    verify_export(tmp_path / "model", tiny_pipeline, state, dtype=torch.float32)

    differing = []
    for path in sorted(tiny_pipeline.rglob("*.safetensors")):
        before, after = load_file(path), load_file(tmp_path / "model" / path.relative_to(tiny_pipeline))
        assert before.keys() == after.keys()
        differing += [
            (name, before[name], after[name]) for name in before if not torch.equal(before[name], after[name])
        ]
    [(name, before_table, after_table)] = differing
    assert name.endswith("token_embedding.weight")
    moved = (before_table != after_table).any(dim=1).nonzero().flatten().tolist()
    assert moved == [token(tiny_pipeline, "tfz")]
    learnt = after_table[token(tiny_pipeline, "tfz")] - before_table[token(tiny_pipeline, "dog")]
    assert learnt.abs().max() > 0.01


def test_the_loss_falls(tiny_pipeline: Path, instance_folder: Path) -> None:
    run = Run(tiny_pipeline, instance_folder, max_train_steps=60)
    batch = run.data.batch(range(64))
    with torch.no_grad():
        before = float(run.engine(batch).total)
    run.fit()
    with torch.no_grad():
        assert float(run.engine(batch).total) < before


def test_a_resumed_run_is_the_same_run(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> None:
    whole = Run(tiny_pipeline, instance_folder, ema_decay=0.9).fit(save=(3, tmp_path))
    resumed = Run(tiny_pipeline, instance_folder, ema_decay=0.9)
    resumed.engine.load(tmp_path)
    resumed.fit(start=3)
    assert [m.loss for m in resumed.metrics] == [m.loss for m in whole.metrics[3:]]
    assert torch.equal(resumed.change, whole.change)
    one, other = resumed.engine.state_dict(), whole.engine.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_checkpoint_holds_no_frozen_weights(tiny_pipeline: Path, instance_folder: Path, tmp_path: Path) -> None:
    Run(tiny_pipeline, instance_folder).engine.save(tmp_path)
    stored = torch.load(tmp_path / "engine.pt", weights_only=True)["model"]
    assert list(stored) == ["identifier_embeddings.text_encoder.change"]


def test_its_prompts_have_no_class_noun_and_it_no_class_images() -> None:
    config = configured("some/base")
    assert config.prompts.instance_prompt(config.subject) == "a photo of tfz"
    assert not config.prior.enabled
    assert configured("some/base", prompts={"instance": "a {identifier}"}).prompts.instance == "a {identifier}"
    with pytest.raises(InputError, match="prior preservation has no part"):
        configured("some/base", prior={"prior_loss_weight": 1.0})


def test_without_a_rate_it_learns_at_that_of_its_paper() -> None:
    config = configured("some/base", train={"identifier_learning_rate": None})
    assert config.train.embedding_learning_rate == 5e-3


def test_the_plan_counts_one_embedding_and_the_frozen_weights(tiny_pipeline: Path, instance_folder: Path) -> None:
    from pipelines.plan.run_plan import make_plan

    base = resolve_base_model(str(tiny_pipeline))
    plan = make_plan(configured(tiny_pipeline, instance_folder))
    assert plan.trained_parameters == base.embedding_width("text_encoder") == 16
    assert plan.prior is None
    assert plan.model_state_bytes > 4 * (base.parameter_counts["unet"] + base.parameter_counts["text_encoder"])
    assert plan.key != make_plan(configured(tiny_pipeline, instance_folder, train={"method": "dreambooth"})).key


def test_where_the_embedding_starts_is_part_of_the_key(tiny_pipeline: Path, instance_folder: Path) -> None:
    from pipelines.plan.run_plan import make_plan

    subject = {"name": "rex", "identifier": "tfz", "instance_images": str(instance_folder)}
    keys = {make_plan(configured(tiny_pipeline, subject=subject | {"class_noun": noun})).key for noun in ("dog", "cat")}
    assert len(keys) == 2
