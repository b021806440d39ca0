"""The identifier's embedding: learnt at a rate of its own, and nothing but ordinary weights at the end."""

from pathlib import Path

import torch
from transformers import CLIPTextModel

from dreambooth.config import DreamBoothConfig, load_config
from dreambooth.engine import TorchEngine
from dreambooth.families.stable_diffusion import load_tokenizer
from dreambooth.identifier import token_ids_in_prompts
from dreambooth.model import load_components, load_model


def configured(**train: object) -> DreamBoothConfig:
    subject = {"name": "rex", "class_noun": "dog", "identifier": "tfz", "instance_images": "rex"}
    return load_config({"base_model": "some/base", "subject": subject, "train": train})


def hidden_state(text_encoder: CLIPTextModel, base: Path, prompt: str) -> torch.Tensor:
    ids = load_tokenizer(base)([prompt], return_tensors="pt").input_ids
    with torch.no_grad():
        state: torch.Tensor = text_encoder(ids).last_hidden_state
    return state


def test_it_moves_the_identifier_alone_and_at_its_own_rate(tiny_pipeline: Path) -> None:
    config = configured(learning_rate=1e-9, identifier_learning_rate=0.5)
    engine = TorchEngine(load_model(tiny_pipeline, config), config.train)
    before = load_components(tiny_pipeline).text_encoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokenizer = load_tokenizer(tiny_pipeline)
    ids = tokenizer(["a photo of tfz dog", "a photo of a dog"], padding=True, return_tensors="pt").input_ids
    assert engine.model.text_encoder is not None
    engine.backward(engine.model.text_encoder(ids).last_hidden_state.square().sum())
    engine.step()

    state = engine.state_dict()
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    moved = (state[name] - before).abs().amax(dim=1) > 1e-3
    assert moved.nonzero().flatten().tolist() == sorted(set(token_ids_in_prompts(tokenizer, "tfz")))
    assert not [name for name in state if name.startswith("identifier")]


def test_what_is_exported_is_what_was_trained(tiny_pipeline: Path) -> None:
    config = configured(identifier_learning_rate=0.5)
    model = load_model(tiny_pipeline, config)
    assert model.identifier_embedding is not None
    assert model.text_encoder is not None
    torch.nn.init.normal_(model.identifier_embedding.change)
    state = model.exported({name: p.detach() for name, p in model.named_parameters()})
    plain = load_components(tiny_pipeline).text_encoder
    plain.load_state_dict(
        {name.removeprefix("text_encoder."): p for name, p in state.items() if name.startswith("text_encoder.")}
    )
    for prompt in ("a photo of tfz dog", "a tfz", "a photo of a dog"):
        trained = hidden_state(model.text_encoder.eval(), tiny_pipeline, prompt)
        torch.testing.assert_close(hidden_state(plain.eval(), tiny_pipeline, prompt), trained)


def test_copied_components_stay_apart(tiny_pipeline: Path) -> None:
    components = load_components(tiny_pipeline)
    copied = components.copied()
    for one, other in ((components.denoiser, copied.denoiser), (components.text_encoder, copied.text_encoder)):
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert a is not b, name
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_frozen_text_encoder_has_none(tiny_pipeline: Path) -> None:
    model = load_model(tiny_pipeline, configured(train_text_encoder=False, identifier_learning_rate=0.1))
    assert model.identifier_embedding is None
    assert all(name.startswith("denoiser.") for name, _ in model.named_parameters())
