"""`dreambooth export --push-to` against a hub over HTTP: one commit, private, or nothing; and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import Hub, hub_server
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load

from dreambooth.data.images import png_bytes
from dreambooth.models.base_model import resolve_base_model
from pipelines.cli import main
from pipelines.driver.cards import Card, publish_card
from pipelines.report.model_card import CardFacts, Sample
from pipelines.storage.publications import publish

# huggingface_hub posts commits in the old way of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    metadata = {"key": "k", "subject": "rex", "class_noun": "dog", "identifier": "tfz", "resolution": 64}
    metadata |= {"base_model": str(tiny_pipeline), "base_hash": resolve_base_model(str(tiny_pipeline)).hash}
    return publish(tiny_pipeline, str(tmp_path_factory.mktemp("push") / "rex" / "model"), metadata=metadata).uri


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(monkeypatch) as made:
        yield made


def push(model: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", model, "--quiet", *arguments])


WHOLE = ("--format", "diffusers", "--push-to")


def test_a_model_and_its_card_in_one_private_commit(hub: Hub, model: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    result = push(model, *WHOLE, "hub:rex")
    assert result.exit_code == 0, result.output
    repository = hub.repositories["me/rex"]
    assert repository.private
    assert len(repository.commits) == 2  # the hub's own, and ours
    assert result.stdout.splitlines()[-1] == f"private  {hub.url}/me/rex/commit/{repository.head}"
    for name, content in repository.main.items():
        if name != ".gitattributes":
            assert f"{len(content):>13}  {name}\n" in result.stdout
    assert "from_pretrained('me/rex')" in ModelCard(repository.main["README.md"].decode()).text
    from diffusers import DiffusionPipeline

    for name, content in repository.main.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "copy", dtype=torch.float32, local_files_only=True)
    expected = load((tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    for name, tensor in loaded.unet.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_stored_card_goes_along_with_its_samples(hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"key": "k", "subject": "rex", "class_noun": "dog", "identifier": "tfz"}
    metadata |= {"base_model": "miniature", "base_hash": "0" * 16, "ema_decay": None}
    model = publish(tiny_pipeline, str(tmp_path / "rex" / "model"), metadata=metadata).uri
    samples = tuple(Sample(file=f"samples/{place}.png", prompt=f"tfz dog {place}") for place in range(4))
    facts = CardFacts(
        subject="rex",
        class_noun="dog",
        identifier="tfz",
        base_name="miniature",
        base_id=None,
        base_hash="0" * 16,
        training=(("hardware", "1 x a processor"),),
        samples=samples,
    )
    pictures = {sample.file: png_bytes(Image.new("RGB", (8, 8), (place, 0, 0))) for place, sample in enumerate(samples)}
    publish_card(Card(facts=facts, pictures=pictures), str(tmp_path / "rex"), "k")
    assert push(model, "--format", "single-file", "--push-to", "hub:rex", "--no-ema").exit_code == 0
    main_now = hub.repositories["me/rex"].main
    assert {name: main_now[name] for name in pictures} == pictures
    card = ModelCard(main_now["README.md"].decode())
    assert [one["output"]["url"] for one in card.data.to_dict()["widget"]] == list(pictures)
    assert "| hardware | 1 x a processor |" in card.text


def test_another_form_takes_the_place_of_the_first(hub: Hub, model: str) -> None:
    assert push(model, *WHOLE, "hub:me/rex").exit_code == 0
    again = push(model, "--format", "single-file", "--push-to", "hub:me/rex", "--dtype", "float16")
    assert again.exit_code == 0, again.output
    main_now = hub.repositories["me/rex"].main
    assert set(main_now) == {".gitattributes", "README.md", "rex.safetensors"}
    assert f"from_single_file('{hub.url}/me/rex/blob/main/rex.safetensors'" in main_now["README.md"].decode()


def test_a_push_that_broke_off_leaves_main_as_it_was(hub: Hub, model: str) -> None:
    before = {"README.md": b"of before"}
    hub.make("me/rex", private=True, files=before)
    hub.drops_at, hub.refuses_at = 2, 3  # the second file, and once more when it is sent again
    failed = push(model, *WHOLE, "hub:rex")
    assert failed.exit_code == 2
    assert "the push to me/rex was not finished, and its main has nothing of it: " in failed.stderr
    assert hub.repositories["me/rex"].main == before
    assert len(hub.blobs) == 1
    assert push(model, *WHOLE, "hub:rex").exit_code == 0
    assert "model_index.json" in hub.repositories["me/rex"].main
    weights = [name for name in hub.repositories["me/rex"].main if name.endswith(".safetensors")]
    assert hub.put == len(weights) + 2  # what had arrived wasn't sent again


def test_two_pushes_at_once_do_not_mix(hub: Hub, model: str) -> None:
    other = {"README.md": b"another model", "other.safetensors": b"of somebody else"}
    hub.make("me/rex", private=True, files={})
    hub.meanwhile = other
    late = push(model, *WHOLE, "hub:rex")
    assert late.exit_code == 2
    assert "A commit has happened since" in late.stderr
    assert hub.repositories["me/rex"].main == other
    assert push(model, *WHOLE, "hub:rex").exit_code == 0
    assert "other.safetensors" not in hub.repositories["me/rex"].main


def test_public_only_where_it_is_asked_for(hub: Hub, model: str) -> None:
    hub.make("me/known", private=False, files={})
    refused = push(model, *WHOLE, "hub:known")
    assert refused.exit_code == 2
    assert "me/known is public; give --public" in refused.stderr
    assert hub.repositories["me/known"].main == {}
    for name in ("known", "new"):
        result = push(model, *WHOLE, f"hub:{name}", "--public")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1].startswith("public  ")
        assert not hub.repositories[f"me/{name}"].private


@pytest.mark.parametrize(
    ("to", "token", "told"),
    [
        ("hub:rex", None, "there is no token; set HF_TOKEN to a token that may write"),
        ("hub:rex", "hf_read", "the token may only read; set HF_TOKEN"),
        ("hub:rex", "hf_expired", "Invalid user token. "),
        ("rex", "hf_write", "expected hub:NAME, or hub:OWNER/NAME"),
        ("hub:a/b/c", "hf_write", "--push-to 'hub:a/b/c': "),
        ("hub:../rex", "hf_write", "--push-to 'hub:../rex': "),
        ("hub:others/rex", "hf_write", "others/rex was not finished, and its main has nothing of it"),
    ],
)
def test_refused_with_a_sentence(
    hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str, token: str | None, told: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    result = push(model, *WHOLE, to)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not hub.repositories
    assert not hub.blobs
    assert token is None or token not in result.output


def test_one_place_and_a_model_that_says_what_it_is(hub: Hub, model: str, tiny_pipeline: Path) -> None:
    for arguments in ([], ["--to", "x", "--push-to", "hub:x"], ["--to", "x", "--public"]):
        assert push(model, "--format", "diffusers", *arguments).exit_code == 2
    bare = push(str(tiny_pipeline), *WHOLE, "hub:rex")
    assert bare.exit_code == 2
    assert "doesn't record what it was made from" in bare.stderr
