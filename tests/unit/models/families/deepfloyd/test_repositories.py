"""Which repositories of DeepFloyd IF are base models, and which identifiers they have."""

import json
import shutil
from pathlib import Path

import pytest
from deepfloyd_runs import configured, moved

from dreambooth.data.identifier import candidates, choose_identifier, token_ids_in_prompts
from dreambooth.errors import InputError
from dreambooth.models.base_model import resolve_base_model
from dreambooth.models.export import export_pipeline
from dreambooth.models.families import load_tokenizer


def write_vocabulary(path: Path, *, rare: list[str]) -> None:
    """A sentencepiece model of 400 pieces, those in `rare` in the part that the paper draws identifiers from."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    common = [f"\u2581word{place}" for place in range(80)]
    rest = [f"\u2581other{place}" for place in range(290)]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "\u2581"]
    model = schema.ModelProto()
    for place, piece in enumerate(("<pad>", "</s>", "<unk>")):
        model.pieces.add(piece=piece, score=0.0, type=2 if place == 2 else 3)
    for place, piece in enumerate([*common, *(f"\u2581{one}" for one in rare), *rest, *letters]):
        model.pieces.add(piece=piece, score=-1.0 - place / 10, type=1)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = 1, len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    path.write_bytes(model.SerializeToString())


class TestRepositories:
    def test_nothing_but_its_own_parts_is_needed_or_written(self, base: Path, photos: Path, tmp_path: Path) -> None:
        _, state = moved(base, configured(base, photos))
        export_pipeline(base, state, tmp_path / "model")
        index = json.loads((tmp_path / "model" / "model_index.json").read_text())
        unused = ("safety_checker", "feature_extractor", "watermarker")
        assert [index[name] for name in unused] == [[None, None]] * 3
        assert index["requires_safety_checker"] is False

    def test_stage_i_is_a_base_model(self, bases: dict[str, Path]) -> None:
        base = resolve_base_model(str(bases["deepfloyd-if-1"]))
        assert base.resolution == 16
        assert base.settings.x0_shape(16) == (3, 16, 16)
        assert base.embedding_width("text_encoder") == 48
        assert set(base.parameter_counts) == {"unet", "text_encoder"}

    def test_stage_ii_alone_is_none(self, bases: dict[str, Path]) -> None:
        with pytest.raises(InputError, match=r"stage II.*stage I"):
            resolve_base_model(str(bases["deepfloyd-if-2"]))

    def test_a_side_that_the_unet_cannot_halve_is_refused(self, bases: dict[str, Path]) -> None:
        with pytest.raises(InputError, match="17; expected a multiple of 2"):
            resolve_base_model(str(bases["deepfloyd-if-1"])).settings.x0_shape(17)

    def test_a_unet_with_other_inputs_is_refused(self, bases: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bases["deepfloyd-if-1"], tmp_path / "base"))
        path = copy / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 6}))
        with pytest.raises(InputError, match="in_channels is 6; expected 3"):
            resolve_base_model(str(copy))

    def test_an_identifier_is_chosen_from_t5s_vocabulary(self, bases: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bases["deepfloyd-if-1"], tmp_path / "base"))
        write_vocabulary(copy / "tokenizer" / "spiece.model", rare=["xkq", "wvz", "qzj"])
        tokenizer = load_tokenizer(copy)
        assert {candidate.text for candidate in candidates(tokenizer)} == {"xkq", "wvz", "qzj"}
        chosen = choose_identifier(tokenizer, subject_name="rex")
        assert len(token_ids_in_prompts(tokenizer, chosen)) == 1
