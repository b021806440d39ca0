"""Model cards beside the models: a publication of its own at `<run>/card/<key>/`, since figures come after the model.

It holds README.md, four samples, and card.json, from which the card is written again with new figures or another form.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreambooth import __version__
from dreambooth.amounts import counted, duration
from dreambooth.config.settings import DreamBoothConfig
from dreambooth.miniature import BASES
from dreambooth.models.cascade import SUPER_RESOLUTION
from dreambooth.models.download import is_hub_id
from dreambooth.models.licence import licence_of
from pipelines.driver.samples import Samples
from pipelines.driver.train_stage import TrainResult
from pipelines.plan.here import commit
from pipelines.plan.run_plan import Plan
from pipelines.report.model_card import README, SAMPLES, Base, CardFacts, Form, Sample, all_measured, model_card
from pipelines.stages.evaluation_task import meant_encoder
from pipelines.storage.faults import room_for
from pipelines.storage.files import join
from pipelines.storage.pictures import read_pictures
from pipelines.storage.publications import Manifest, begun_at, opened, publish, published

_FACTS = "card.json"
_MOST_SAMPLES = 4
_WEIGHTS = "weights"
_SECTIONS = ("prompts", "images", "train", "prior", "zero", "super_resolution")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card's facts, and its pictures by their names in them; `uri` is where it is published."""

    facts: CardFacts
    pictures: Mapping[str, bytes]
    uri: str | None = field(default=None, compare=False)

    def write(self, folder: Path, *, form: Form = "diffusers", **place: str) -> None:
        """Write README.md and the pictures to a folder, as `model_card` takes form and place."""
        for name, picture in self.pictures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture)
        (folder / README).write_text(model_card(self.facts, form=form, **place), encoding="utf-8")


def card_of(plan: Plan, trained: TrainResult, samples: Samples | None, figures: Mapping[str, Any] | None) -> Card:
    """The card of a finished subject; `figures` is the content of evaluation.json."""
    config, base = plan.config, plan.base
    name, hub_id = _public_name(config.base_model)
    pictures = _pictures(figures if samples is None else samples.record)
    facts = CardFacts(
        subject=config.subject.name,
        class_noun=config.subject.class_noun,
        identifier=str(config.subject.identifier),
        base_name=name,
        base_id=hub_id,
        base_hash=base.hash,
        licence=licence_of(config.base_model, base.directory),
        pipeline_class=base.pipeline_class,
        cascade=plan.second is not None,
        second_base=None if plan.second is None else _base_of(plan.second),
        instance_prompt=config.prompts.instance_prompt(config.subject),
        class_prompt=config.prompts.class_prompt(config.subject) if plan.prior else None,
        num_inference_steps=config.evaluation.num_inference_steps,
        guidance_scale=config.evaluation.guidance_scale,
        training=_training(plan, trained),
        settings=_settings(config),
        samples=tuple(
            Sample(file=f"{SAMPLES}/{place}.png", prompt=prompt) for place, (prompt, _) in enumerate(pictures)
        ),
        seen=_seen(config, samples),
        warnings=() if samples is None else tuple(samples.record.get("warnings", ())),
    )
    if figures is not None:
        facts = facts.with_figures(figures)
    return Card(
        facts=facts, pictures={one.file: content for one, (_, content) in zip(facts.samples, pictures, strict=True)}
    )


def publish_card(card: Card, run_uri: str, key: str) -> Card:
    """Publish a card beside the model of a key, and return it; an earlier card's training and other figures stay."""
    parent = join(run_uri, "card", key)
    earlier = _read(published(parent))
    if earlier is not None:
        measured = all_measured(earlier.facts.measured, card.facts.measured)
        card = replace(card, facts=replace(card.facts, training=earlier.facts.training, measured=measured))
        if earlier == card:
            return earlier
    with tempfile.TemporaryDirectory(prefix="dreambooth-card-") as folder, room_for("the model card", run_uri):
        card.write(Path(folder))
        Path(folder, _FACTS).write_text(card.facts.as_json(), encoding="utf-8")
        return replace(card, uri=publish(Path(folder), parent, metadata={"key": key}).uri)


def find_card(model: Manifest) -> Card | None:
    """The card of a published model; of one that has none, what its manifest says; None if that says nothing."""
    run_uri, key = _place(model)
    stored = None if run_uri is None else _read(published(join(run_uri, "card", key)))
    return stored or _from_manifest(model.metadata)


def add_figures(model: Manifest, evaluation: Mapping[str, Any]) -> Card | None:
    """Publish a model's card again with the figures of an evaluation.json; None for a model without a card."""
    run_uri, key = _place(model)
    stored = None if run_uri is None else _read(published(join(run_uri, "card", key)))
    if stored is None or run_uri is None:
        return None
    return publish_card(replace(stored, facts=stored.facts.with_figures(evaluation)), run_uri, key)


def without_average(card: Card) -> Card:
    """The card of the last step's weights of a model that is a moving average: samples and figures aren't theirs."""
    rows = (*(row for row in card.facts.training if row[0] != _WEIGHTS), (_WEIGHTS, "of the last step, not averaged"))
    return Card(facts=replace(card.facts, training=rows, samples=(), seen=(), measured=(), warnings=()), pictures={})


def _place(model: Manifest) -> tuple[str | None, str]:
    """The folder of the run that published a model, and the model's key."""
    run_uri, found, _ = model.uri.rpartition("/model/")
    return run_uri if found else None, str(model.metadata.get("key", ""))


def _read(manifest: Manifest | None) -> Card | None:
    if manifest is None:
        return None
    with opened(manifest) as folder:
        try:
            facts = CardFacts.from_json((folder / _FACTS).read_text(encoding="utf-8"))
        except (KeyError, TypeError):  # of another version
            return None
        pictures = {one.file: (folder / one.file).read_bytes() for one in facts.samples}
    return Card(facts=facts, pictures=pictures, uri=manifest.uri)


def _from_manifest(metadata: Mapping[str, Any]) -> Card | None:
    if not {"subject", "class_noun", "identifier", "base_model", "base_hash"} <= metadata.keys():
        return None
    name, hub_id = _public_name(str(metadata["base_model"]))
    second = metadata.get(SUPER_RESOLUTION)
    facts = CardFacts(
        subject=str(metadata["subject"]),
        class_noun=str(metadata["class_noun"]),
        identifier=str(metadata["identifier"]),
        base_hash=str(metadata["base_hash"]),
        base_name=name,
        base_id=hub_id,
        licence=licence_of(str(metadata["base_model"]), Path(str(metadata["base_model"]))),
        cascade=second is not None,
        second_base=None if second is None else _stated_base(second),
        num_inference_steps=metadata.get("num_inference_steps"),
        guidance_scale=metadata.get("guidance_scale"),
    )
    return Card(facts=facts, pictures={})


def _base_of(plan: Plan) -> Base:
    address, base = plan.config.base_model, plan.base
    name, hub_id = _public_name(address)
    return Base(name=name, id=hub_id, hash=base.hash, licence=licence_of(address, base.directory))


def _stated_base(metadata: Mapping[str, Any]) -> Base:
    """A base model by what a manifest says of it."""
    address = str(metadata["base_model"])
    name, hub_id = _public_name(address)
    return Base(name=name, id=hub_id, hash=str(metadata["base_hash"]), licence=licence_of(address, Path(address)))


def _settings(config: DreamBoothConfig) -> dict[str, Any]:
    """Settings of the training without addresses and names of files: of photographs that come up again their number."""
    settings: dict[str, Any] = {
        section: getattr(config, section).model_dump(mode="json", by_alias=True) for section in _SECTIONS
    }
    repeats = Counter(settings["images"]["repeats"].values())
    settings["images"]["repeats"] = [
        f"{counted(count, 'photograph')} {times} times" for times, count in sorted(repeats.items())
    ]
    second = config.super_resolution.base_model
    if second is None:
        del settings[SUPER_RESOLUTION]
    else:
        settings[SUPER_RESOLUTION]["base_model"] = _public_name(second)[0]
    return settings


def _public_name(base_model: str) -> tuple[str, str | None]:
    """A base model's public name, which hides where it lies, and its hub id if it has one."""
    if base_model in BASES:
        return f"{base_model}, which comes with dreambooth", None
    file = base_model.partition("#")[0]
    hub_id = "/".join(file.split("/")[:2])
    if "://" not in file and not file.startswith(("/", ".", "~")) and is_hub_id(hub_id):
        return hub_id, hub_id
    return "A base model that isn't on the hub", None


def _pictures(evaluation: Mapping[str, Any] | None) -> list[tuple[str, bytes]]:
    """Up to four of an evaluation's samples with their prompts, of as many prompts as there are."""
    if evaluation is None:
        return []
    chosen = _spread([[(of["prompt"], address) for address in of["fine_tuned"]] for of in evaluation["pictures"]])
    stored = read_pictures(address for _, address in chosen)
    return [(prompt, stored[address]) for prompt, address in chosen if address in stored]


def _spread(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Up to four of all rows' items: the rows' first ones, evenly spread over the rows, then their second ones."""
    rounds = [[row[place] for row in rows if place < len(row)] for place in range(max(map(len, rows), default=0))]
    found: list[Any] = []
    for items in rounds:
        count = min(_MOST_SAMPLES - len(found), len(items))
        found += [items[place * len(items) // count] for place in range(count)]
    return found


def _seen(config: DreamBoothConfig, samples: Samples | None) -> tuple[tuple[str, str], ...]:
    """The similarities and shares of the samples for the eye."""
    if samples is None or samples.similarity is None or samples.shares is None:
        return ()
    similarity, shares, encoder = samples.similarity, samples.shares, meant_encoder(config)
    public = encoder if encoder == "miniature" or is_hub_id(encoder) else "one that isn't on the hub"
    rows = [
        ("image encoder", public),
        ("similarity of samples to the photographs", f"{similarity.identifier:.3f}"),
        ("similarity among the photographs", f"{similarity.instance:.3f}"),
        ("similarity of the class before", f"{similarity.class_before:.3f}"),
        ("similarity of the class after", f"{similarity.class_after:.3f}"),
        ("near-copies of a photograph", f"{shares.near_copies:.0%}"),
    ]
    if shares.prompts_followed is not None:
        rows.append(("prompts followed", f"{shares.prompts_followed:.0%}"))
    return tuple(rows)


def _training(plan: Plan, trained: TrainResult) -> tuple[tuple[str, str], ...]:
    config, train = plan.config, plan.config.train
    workers = config.cluster.num_workers
    pairs = train.micro_batch_size * train.gradient_accumulation_steps * workers
    begun = begun_at(trained.model.uri.rpartition("/")[2])
    each = trained.device or ("GPU" if plan.use_gpu else "CPU")
    rows = [
        ("photographs", f"{len(plan.images)} (hash {plan.data_hash})"),
        ("class images", f"{plan.prior.count}, weight {config.prior.prior_loss_weight}" if plan.prior else "none"),
        ("trained", " and ".join(["denoiser", *plan.run_text_encoders]).replace("text_encoder", "text encoder")),
        ("resolution", f"{config.images.resolution} px"),
        (
            "steps",
            f"{trained.steps} of {counted(pairs, 'instance image')} each; published is step {trained.exported_step}",
        ),
        (_WEIGHTS, "" if train.ema_decay is None else f"moving average, decay {train.ema_decay:g}"),
        ("learning rate", f"{train.learning_rate:g}"),
        ("engine", f"DeepSpeed ZeRO-{config.zero.stage}" if plan.engine == "deepspeed" else "PyTorch"),
        ("hardware", f"{workers} x {each}"),
        ("time", f"{duration(trained.seconds)} of steps, {trained.steps_per_second:.2f} steps/s"),
        ("published", "" if begun is None else f"{begun:%Y-%m-%d}"),
        ("program", f"dreambooth {__version__}{commit()}"),
        ("key", plan.key),
    ]
    if (second := trained.second) is not None:
        rows.insert(5, ("second stage", f"{second.steps} steps; published is step {second.exported_step}"))
    if train.method == "textual_inversion":
        rows[2] = ("trained", "the identifier's embedding (Textual Inversion)")
    return tuple((what, value) for what, value in rows if value)
