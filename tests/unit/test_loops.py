"""The benchmarks' two loops do the same work: the bare one trains what `fit` trains, from the same pair."""

import torch
from loops import bare_loop, fitted, random_data

from dreambooth.config.settings import load_config
from dreambooth.miniature import PIPELINE_DIR, subject_dir
from dreambooth.models.families import family_of
from dreambooth.training.engine import TorchEngine
from dreambooth.training.model import load_model


def test_a_step_of_each_gives_the_same_weights() -> None:
    subject = {
        "name": "bench",
        "class_noun": "car",
        "identifier": "tfz",
        "instance_images": str(subject_dir("coral-car")),
    }
    overrides = ("train.max_train_steps=1", "train.micro_batch_size=1", "train.learning_rate=1e-3")
    settings = load_config({"subject": subject}, overrides)
    text = family_of(PIPELINE_DIR).tokenize(PIPELINE_DIR, ["a photo of a car"])
    data = random_data(PIPELINE_DIR, 64, text, text)
    bare, fit = load_model(PIPELINE_DIR, settings), load_model(PIPELINE_DIR, settings)
    before = {name: value.clone() for name, value in bare.state_dict().items()}

    bare_loop(bare, data, settings)()
    fitted(TorchEngine(fit, settings.train), data, settings)()

    after = bare.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(after, fit.state_dict())
