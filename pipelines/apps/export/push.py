"""Push an exported model to the hub: all of its files in one commit, so that `main` never holds a part of it."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.config.addresses import shown, without_credentials
from dreambooth.errors import InputError
from dreambooth.models.download import hub_fault
from pipelines.apps.export.averages import choose_weights
from pipelines.apps.export.exporting import Exported, find_manifest
from pipelines.apps.export.staging import WEIGHTS
from pipelines.driver.cards import find_card, without_average
from pipelines.driver.console import RunConsole
from pipelines.report.model_card import Form

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SCHEME = "hub:"
_ATTRIBUTES = ".gitattributes"  # the hub's own: which files are large


@dataclass(frozen=True, kw_only=True)
class HubRepository:
    """A repository of models on the hub that this account may write; `public` where it is, or will be made so."""

    id: str
    public: bool
    api: "HfApi"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """The commit's page, and the names and bytes of the model's files."""

    commit_url: str
    public: bool
    files: tuple[tuple[str, int], ...]


def find_repository(push_to: str, *, public: bool) -> HubRepository:
    """The repository that `hub:NAME` or `hub:OWNER/NAME` means; makes nothing.

    Raises InputError for another name, without a hub or a token that may write, and for a public one unless `public`.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    name, what = push_to.removeprefix(_SCHEME), f"--push-to {push_to!r}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{what}: {error}") from None
    if not push_to.startswith(_SCHEME):
        raise InputError(f"{what}: expected {_SCHEME}NAME, or {_SCHEME}OWNER/NAME for an organization")
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{what}: HF_HUB_OFFLINE forbids it; unset it")
    if (fault := hub_fault()) is not None:
        raise InputError(f"{what}: {fault}")
    hub = shown(constants.ENDPOINT)
    cure = f"set HF_TOKEN to a token that may write ({hub}/settings/tokens)"
    token = get_token()
    if token is None:
        raise InputError(f"{what} needs an account of the hub, and there is no token; {cure}")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    with refusals(what, cure):
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise InputError(f"{what}: the token may only read; {cure}")
        repo_id = name if "/" in name else f"{account['name']}/{name}"
        try:
            already_public = not api.model_info(repo_id).private
        except RepositoryNotFoundError:
            return HubRepository(id=repo_id, public=public, api=api)
    if already_public and not public:
        raise InputError(f"{what}: {hub}/{repo_id} is public; give --public if it is meant to be, or another name")
    return HubRepository(id=repo_id, public=already_public, api=api)


def export_and_push(
    model: str,
    push_to: str,
    write: Callable[[str], Exported],
    *,
    form: Form,
    public: bool,
    ema: bool | None = None,
    tracking_uri: str | None,
    console: RunConsole,
) -> tuple[Exported, Pushed]:
    """Export a model by `write(address)` to a temporary folder, add its card, and push both to `hub:NAME`.

    Raises InputError before any work where the push would be refused, and for a model that has no card.
    """
    from huggingface_hub import constants

    repository = find_repository(push_to, public=public)
    weights = choose_weights(find_manifest(model, tracking_uri), ema)
    card = find_card(weights.manifest)
    if card is None:
        raise InputError(
            f"{model!r} doesn't record what it was made from, so it has no card; push a model of 'dreambooth run'"
        )
    with tempfile.TemporaryDirectory(prefix="dreambooth-push-") as temporary:
        folder, file = Path(temporary, "model"), f"{repository.id.rpartition('/')[2]}{WEIGHTS}"
        if weights.unaveraged is not None:
            card = without_average(card)
        exported = write(str(folder if form == "diffusers" else folder / file))
        place = f"{constants.ENDPOINT}/{repository.id}/blob/main/{file}" if form == "single-file" else repository.id
        card.write(folder, form=form, place=place)
        return exported, push(folder, repository, message=f"Upload {card.facts.subject}", console=console)


def push(folder: Path, to: HubRepository, *, message: str, console: RunConsole) -> Pushed:
    """Upload all files of a folder, then commit them in one, without those of an earlier model.

    Raises InputError if the hub refuses or goes away, or somebody else pushes meanwhile; `main` then has nothing of it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    files = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    added = [CommitOperationAdd(name, path) for (name, _), path in zip(files, paths, strict=True)]
    total, done = sum(size for _, size in files), 0
    what = f"the push to {to.id} was not finished, and its main has nothing of it"
    with refusals(what, "push again: what has arrived isn't sent twice"), console.bar("push") as bar:
        to.api.create_repo(to.id, private=not to.public, exist_ok=True)
        before = to.api.model_info(to.id)
        if not before.private and not to.public:
            raise InputError(f"{to.id} was made public meanwhile; give --public if it is meant to be, or another name")
        for one, (_, size) in zip(added, files, strict=True):
            to.api.preupload_lfs_files(to.id, [one], free_memory=False)
            done += size
            bar(done // 10**6, max(1, total // 10**6), "MB")
        kept = {name for name, _ in files} | {_ATTRIBUTES}
        stale = [one.rfilename for one in before.siblings or () if one.rfilename not in kept]
        commit = to.api.create_commit(
            to.id,
            [*added, *(CommitOperationDelete(name, is_folder=False) for name in stale)],
            commit_message=message,
            parent_commit=before.sha,  # else another push at the same time would mix with this one
        )
    return Pushed(commit_url=str(commit.commit_url), public=not before.private, files=files)


@contextlib.contextmanager
def refusals(what: str, cure: str) -> Iterator[None]:
    """Turn what the hub and the network raise into InputError: what isn't done, why, and the cure."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the hub's, the network's, and which library that has depends on the version
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        said = getattr(cause, "server_message", None) or str(cause)  # the hub's own words, where it has some
        lines = [line for line in said.splitlines() if line.strip()]
        reason = without_credentials(lines[0] if lines else type(cause).__name__)
        raise InputError(f"{what}: {type(cause).__name__}: {reason}; {cure}") from error
