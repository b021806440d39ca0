"""The identifier's embedding: learnt at a rate of its own, and nothing but ordinary weights at the end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from replicas import deepfloyd
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from dreambooth.config.settings import DreamBoothConfig, load_config
from dreambooth.data.identifier import token_ids_in_prompts
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.delta import rebuild, write_delta
from dreambooth.models.export import export_pipeline, verify_export
from dreambooth.models.families import load_tokenizer
from dreambooth.models.probe import Trained
from dreambooth.training.best_checkpoint import Score, Scores
from dreambooth.training.checkpoint_files import save_files
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import DreamBoothModel, load_components, load_model


def configured(identifier: str = "tfz", **train: object) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "dog", "identifier": identifier, "instance_images": "rex"}
    return load_config({"base_model": "some/base", "subject": subject, "train": train})


def hidden_state(text_encoder: CLIPTextModel, base: Path, prompt: str) -> torch.Tensor:
    ids = load_tokenizer(base)([prompt], return_tensors="pt").input_ids
    with torch.no_grad():
        state: torch.Tensor = text_encoder(ids).last_hidden_state
    return state


def test_it_moves_the_identifier_alone_and_at_its_own_rate(tiny_pipeline: Path) -> None:
    config = configured(learning_rate=1e-9, identifier_learning_rate=0.5)
    engine = TorchEngine(load_model(tiny_pipeline, config), config.train)
    before = load_components(tiny_pipeline).text_encoders["text_encoder"].get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokenizer = load_tokenizer(tiny_pipeline)
    ids = tokenizer(["a photo of tfz dog", "a photo of a dog"], padding=True, return_tensors="pt").input_ids
    engine.backward(engine.model.text_encoders["text_encoder"](ids).last_hidden_state.square().sum())
    engine.step()

    state = engine.state_dict()
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    moved = (state[name] - before).abs().amax(dim=1) > 1e-3
    assert moved.nonzero().flatten().tolist() == sorted(set(token_ids_in_prompts(tokenizer, "tfz")))
    assert not [name for name in state if name.startswith("identifier")]


def test_what_is_exported_is_what_was_trained(tiny_pipeline: Path) -> None:
    config = configured(identifier_learning_rate=0.5)
    model = load_model(tiny_pipeline, config)
    torch.nn.init.normal_(model.identifier_embeddings["text_encoder"].change)
    state = model.exported({name: p.detach() for name, p in model.named_parameters()})
    plain = load_components(tiny_pipeline).text_encoders["text_encoder"]
    plain.load_state_dict(
        {name.removeprefix("text_encoder."): p for name, p in state.items() if name.startswith("text_encoder.")}
    )
    for prompt in ("a photo of tfz dog", "a tfz", "a photo of a dog"):
        trained = hidden_state(model.text_encoders["text_encoder"].eval(), tiny_pipeline, prompt)
        torch.testing.assert_close(hidden_state(plain.eval(), tiny_pipeline, prompt), trained)


def test_the_export_of_t5_is_verified_which_looks_tokens_up_in_a_table_of_two_modules(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deepfloyd.build(base)
    model = load_model(base, configured("sks", identifier_learning_rate=0.5, text_encoders="all"))
    torch.nn.init.normal_(model.identifier_embeddings["text_encoder"].change)
    state = state_of(model)
    export_pipeline(base, state, tmp_path / "right")
    verify_export(tmp_path / "right", base, state, dtype=torch.float32)
    wrong = fold_wrongly(model, state, 0.5)
    export_pipeline(base, wrong, tmp_path / "wrong")
    with pytest.raises(ValueError, match="computes something else than the trained one"):
        verify_export(tmp_path / "wrong", base, wrong, dtype=torch.float32)


def test_copied_components_stay_apart(tiny_pipeline: Path) -> None:
    components = load_components(tiny_pipeline)
    copied = components.copied()
    for one, other in (
        (components.denoiser, copied.denoiser),
        (components.text_encoders["text_encoder"], copied.text_encoders["text_encoder"]),
    ):
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert a is not b, name
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_frozen_text_encoder_has_none(tiny_pipeline: Path) -> None:
    model = load_model(tiny_pipeline, configured(train_text_encoder=False))
    assert not model.identifier_embeddings
    assert all(name.startswith("denoiser.") for name, _ in model.named_parameters())


REPEATED = ("tfz tfz", "x22", "1111", "tfz x22", "tfz")


@pytest.fixture(scope="module")
def moved(tiny_pipeline: Path) -> Callable[..., DreamBoothModel]:
    """A model whose identifier's embedding has moved by about its own size."""

    def make(identifier: str, **train: object) -> DreamBoothModel:
        model = load_model(tiny_pipeline, configured(identifier, **{"identifier_learning_rate": 0.5} | train))
        rng = torch.Generator().manual_seed(0)
        change = model.identifier_embeddings["text_encoder"].change
        change.data += 0.02 * torch.randn(change.shape, generator=rng)
        return model

    return make


def state_of(model: DreamBoothModel) -> Trained:
    return model.exported({name: p.detach().clone() for name, p in model.named_parameters()})


def fold_wrongly(model: DreamBoothModel, state: Trained, part: float) -> Trained:
    """The export without a part of the change."""
    name = next(name for name in state if name.endswith(("token_embedding.weight", "shared.weight")))
    table = state[name].clone()
    table[model.identifier_embeddings["text_encoder"].token_ids] -= (
        part * model.identifier_embeddings["text_encoder"].change.detach()
    )
    return Trained.from_tensors(state.as_tensors() | {name: table})


class TestRepeatedTokens:
    """Every equal token of a prompt is changed, and the table has one row for all of them."""

    @pytest.mark.parametrize("method", ["dreambooth", "textual_inversion"])
    @pytest.mark.parametrize("identifier", REPEATED)
    def test_what_is_exported_is_what_was_trained(
        self, tiny_pipeline: Path, moved: Callable[..., DreamBoothModel], identifier: str, method: str
    ) -> None:
        model = moved(identifier, method=method)
        state = state_of(model)
        plain = load_components(tiny_pipeline).text_encoders["text_encoder"]
        plain.load_state_dict(
            {name.removeprefix("text_encoder."): p for name, p in state.items() if name.startswith("text_encoder.")}
        )
        for prompt in (f"a photo of {identifier} dog", identifier, "a photo of a dog"):
            trained = hidden_state(model.text_encoders["text_encoder"].eval(), tiny_pipeline, prompt)
            torch.testing.assert_close(hidden_state(plain.eval(), tiny_pipeline, prompt), trained)

    @pytest.mark.parametrize("identifier", REPEATED)
    def test_textual_inversion_starts_every_token_at_the_noun(self, tiny_pipeline: Path, identifier: str) -> None:
        config = configured(identifier, method="textual_inversion")
        model = load_model(tiny_pipeline, config)
        count = len(token_ids_in_prompts(load_tokenizer(tiny_pipeline), identifier))
        started, like = (
            hidden_state(model.text_encoders["text_encoder"], tiny_pipeline, prompt)
            for prompt in (f"a photo of {identifier}", f"a photo of {' '.join(['dog'] * count)}")
        )
        torch.testing.assert_close(started, like)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("identifier", ["x22", "tfz"])
    def test_a_wrong_fold_is_not_published(
        self,
        tiny_pipeline: Path,
        tmp_path: Path,
        moved: Callable[..., DreamBoothModel],
        identifier: str,
        dtype: torch.dtype,
    ) -> None:
        model = moved(identifier)
        state = state_of(model)
        export_pipeline(tiny_pipeline, state, tmp_path / "right", dtype=dtype)
        verify_export(tmp_path / "right", tiny_pipeline, state, dtype=dtype)
        wrong = fold_wrongly(model, state, 0.1)
        export_pipeline(tiny_pipeline, wrong, tmp_path / "wrong", dtype=dtype)
        with pytest.raises(ValueError, match="computes something else than the trained one"):
            verify_export(tmp_path / "wrong", tiny_pipeline, wrong, dtype=dtype)

    def test_nor_is_another_architecture(self, tiny_pipeline: Path, tmp_path: Path) -> None:
        """The right tensors, and a configuration that computes something else of them."""
        state = state_of(load_model(tiny_pipeline, configured("tfz")))
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float16)
        path = tmp_path / "model" / "text_encoder" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu", "num_attention_heads": 4}))
        with pytest.raises(ValueError, match=r"the text encoder in .* computes something else"):
            verify_export(tmp_path / "model", tiny_pipeline, state, dtype=torch.float16)

    def test_a_model_kept_as_its_change_computes_the_same(
        self, tiny_pipeline: Path, tmp_path: Path, moved: Callable[..., DreamBoothModel]
    ) -> None:
        state, base = state_of(moved("x22")), resolve_base_model(str(tiny_pipeline))
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float16)
        write_delta(base, tmp_path / "model", tmp_path / "delta")
        rebuild(tmp_path / "delta", tmp_path / "rebuilt", base)
        verify_export(tmp_path / "rebuilt", tiny_pipeline, state, dtype=torch.float16)

    def test_a_frozen_text_encoder_has_to_compute_as_the_bases(self, tiny_pipeline: Path, tmp_path: Path) -> None:
        state = state_of(load_model(tiny_pipeline, configured("tfz", train_text_encoder=False)))
        export_pipeline(tiny_pipeline, state, tmp_path / "model", dtype=torch.float16)
        verify_export(tmp_path / "model", tiny_pipeline, state, dtype=torch.float16)
        path = tmp_path / "model" / "text_encoder" / "model.safetensors"
        stored = load_file(path)
        name = next(name for name in stored if name.endswith("final_layer_norm.weight"))
        save_file(stored | {name: -stored[name]}, path, {"format": "pt"})
        with pytest.raises(ValueError, match="computes something else"):
            verify_export(tmp_path / "model", tiny_pipeline, state, dtype=torch.float16)

    def test_trained_weights_can_be_saved_as_they_are_and_with_what_they_compute(
        self, tmp_path: Path, moved: Callable[..., DreamBoothModel]
    ) -> None:
        state = state_of(moved("x22"))
        assert state.probe is not None
        torch.save({"state": state}, tmp_path / "state.pt")
        plain = torch.load(tmp_path / "state.pt", weights_only=True)["state"]
        assert plain.keys() == state.keys()
        scores = Scores(measured=[Score(step=1, dino=0.5, clip_t=0.2)], weights=state)
        save_files(scores.files(), tmp_path)
        again = Scores.load(tmp_path, [scores.measured[0].as_dict()]).weights
        assert isinstance(again, Trained)
        assert again.probe is not None
        assert again.keys() == state.keys()
        assert torch.equal(again.probe.encoded["text_encoder.states"], state.probe.encoded["text_encoder.states"])
