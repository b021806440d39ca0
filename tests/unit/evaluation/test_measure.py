"""One subject's figures, from embeddings made by hand."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from dreambooth.errors import InputError
from dreambooth.evaluation.bank import ImageEmbeddings
from dreambooth.evaluation.bootstrap import Interval
from dreambooth.evaluation.figures import BankId, Figures, by_bank, column, figures_from
from dreambooth.evaluation.measure import PromptSamples, measure

BANK = BankId(name="miniature", hash="0123456789abcdef")
EAST, NORTH, WEST = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]
NORTH_EAST = [math.sqrt(0.5), math.sqrt(0.5), 0.0]
UP = [0.0, 0.0, 1.0]


def embedded(dino: list[list[float]], clip: list[list[float]] | None = None) -> ImageEmbeddings:
    return ImageEmbeddings(dino=torch.tensor(dino), clip=torch.tensor(clip if clip is not None else dino))


def of_prompt(samples: ImageEmbeddings, prompt: str = "a photo of a [V] dog", **more: Any) -> PromptSamples:
    texts = {"text": torch.tensor(NORTH), "text_no_identifier": torch.tensor(EAST)}
    return PromptSamples(prompt=prompt, samples=samples, **{**texts, **more})


def two_prompts() -> Figures:
    first = of_prompt(
        embedded([EAST, NORTH]),
        "first",
        application="recontextualization",
        base=embedded([EAST, EAST]),
        distances=torch.tensor([[0.0, 0.4], [0.4, 0.0]]),
    )
    second = of_prompt(
        embedded([WEST, UP]),
        "second",
        text_no_identifier=torch.tensor(NORTH),
        base=embedded([NORTH_EAST, NORTH_EAST]),
        distances=torch.tensor([[0.0, 0.2], [0.2, 0.0]]),
    )
    return measure(
        bank=BANK, prompts=[first, second], instance=embedded([EAST, NORTH_EAST]), class_samples=embedded([WEST, UP])
    )


def test_likeness_to_the_subject_alone_is_a_figure_of_its_own() -> None:
    prompts = [of_prompt(embedded([EAST, NORTH]), "first"), of_prompt(embedded([WEST, UP]), "second")]
    instance = embedded([EAST, NORTH_EAST])
    plain, masked = (
        measure(bank=BANK, prompts=prompts, instance=instance, subject=each) for each in (None, embedded([NORTH]))
    )
    assert masked.figures["dino_subject"].values == pytest.approx((0.5, 0))
    assert {name: each for name, each in masked.figures.items() if name != "dino_subject"} == plain.figures
    with pytest.raises(InputError, match="the masked instance images, dino"):
        measure(bank=BANK, prompts=prompts, instance=instance, subject=embedded([[math.nan] * len(EAST)]))


def test_likeness_of_the_subjects_patches_is_a_figure_of_its_own() -> None:
    instance = embedded([EAST, NORTH_EAST])
    both = [embedded([EAST, NORTH]), embedded([WEST, UP])]
    similar = [torch.tensor([[0.9, 0.7], [0.5, 0.3]]), torch.tensor([[0.2, 0.2], [0.2, 0.2]])]
    prompts = [
        of_prompt(samples, f"prompt {place}", to_subject={"dino": similar[place]}) for place, samples in enumerate(both)
    ]
    found = measure(bank=BANK, prompts=prompts, instance=instance)
    assert found.figures["dino_subject_patches"].values == pytest.approx((0.6, 0.2))
    plain = measure(
        bank=BANK, prompts=[dataclasses.replace(each, to_subject={}) for each in prompts], instance=instance
    )
    assert {name: each for name, each in found.figures.items() if "patches" not in name} == plain.figures
    none = [dataclasses.replace(each, to_subject={"dino": torch.zeros(2, 0)}) for each in prompts]
    unmeasured = measure(bank=BANK, prompts=none, instance=instance).unmeasured["dino_subject_patches"]
    assert unmeasured == "no patch of an instance image is more than half the subject's"


DINOV2 = BankId(name="dinov2", hash="2" * 16)


def beside(embeddings: ImageEmbeddings, *dinov2: list[float]) -> ImageEmbeddings:
    return dataclasses.replace(embeddings, further={"dinov2": torch.tensor(dinov2)})


def test_an_encoder_beside_the_bank_has_columns_of_its_own() -> None:
    instance = beside(embedded([EAST, NORTH_EAST]), [1.0, 0.0], [0.6, 0.8])
    samples = [beside(embedded([EAST]), [1.0, 0.0]), beside(embedded([UP]), [0.0, 1.0])]
    prompts = [of_prompt(each, f"prompt {place}") for place, each in enumerate(samples)]
    plain = measure(bank=BANK, prompts=prompts, instance=instance)
    figures = measure(bank=BANK, prompts=prompts, instance=instance, further={"dinov2": DINOV2})
    assert figures.figures["dinov2"].values == pytest.approx((0.8, 0.4))
    assert figures.figures["real_dinov2"].interval.mean == pytest.approx(0.6)
    assert figures.unmeasured["dinov2_subject_patches"] == "no masks of the instance images were given"
    assert {figures.figures[name].bank for name in ("dinov2", "real_dinov2")} == {DINOV2}
    assert {name: each for name, each in figures.figures.items() if each.bank == BANK} == plain.figures
    assert figures.banks == (BANK, DINOV2)
    assert figures_from(json.loads(json.dumps(figures.as_dict()))) == figures
    apart = by_bank(figures.as_dict())
    assert [(bank, set(own)) for bank, own in apart] == [
        (BANK, set(plain.figures)),
        (DINOV2, {"dinov2", "real_dinov2"}),
    ]
    assert column("dinov2", [figures, figures]).mean == pytest.approx(0.6)
    other = measure(
        bank=BANK, prompts=prompts, instance=instance, further={"dinov2": BankId(name="dinov2", hash="3" * 16)}
    )
    assert column("dino", [figures, other]).n
    with pytest.raises(InputError, match="dinov2@2222222222222222 and dinov2@3333333333333333"):
        column("dinov2", [figures, other])
    wider = dataclasses.replace(prompts[0], samples=beside(embedded([EAST]), [1.0, 0.0, 0.0]))
    with pytest.raises(InputError, match=r"samples of the prompt 'prompt 0', dinov2: embeddings of width 3 and 2"):
        measure(bank=BANK, prompts=[wider], instance=instance, further={"dinov2": DINOV2})


def test_every_figure_of_two_prompts() -> None:
    figures = two_prompts()
    half = math.sqrt(0.5)
    means = {name: figure.interval.mean for name, figure in figures.figures.items()}
    first, second = (1 + half + 0 + half) / 4, (-1 - half + 0 + 0) / 4
    assert means == pytest.approx(
        {
            "dino": (first + second) / 2,
            "clip_i": (first + second) / 2,
            "clip_t": (0.5 + 0) / 2,
            "clip_t_no_identifier": (0.5 + 0) / 2,
            "clip_t_base": (1 + half) / 2,
            "pres": second,
            "div": 0.3,
            "real_dino": half,
            "real_clip_i": half,
            "context_variance": (first - second) ** 2 / 2,
            "prompts_followed": 0,
            "near_copies": 0.25,
            "nearest_dino": (1 + half - half + 0) / 4,
        }
    )
    assert figures.unmeasured == {
        "background_leak": "no masks of the subject were given",
        "dino_subject": "no masks of the instance images were given",
        "dino_subject_patches": "no masks of the instance images were given",
        "pres_base": "no samples of the class prompt were given",
        "prompts_apart": "no distances between samples of different prompts were given",
    }
    assert {figure.bank for figure in figures.figures.values()} == {BANK}
    assert [(pair.sample, pair.instance, pair.similarity, pair.near_copy) for pair in figures.nearest] == [
        (0, 0, pytest.approx(1), True),
        (1, 1, pytest.approx(half), False),
        (2, 1, pytest.approx(-half), False),
        (3, 0, pytest.approx(0), False),
    ]


def test_figures_can_be_stored() -> None:
    figures = two_prompts()
    assert figures_from(json.loads(json.dumps({"subject": "rex", **figures.as_dict()}))) == figures


def test_figures_of_two_banks_never_share_a_column() -> None:
    figures = two_prompts()
    other = measure(
        bank=BankId(name="paper", hash="f" * 16), prompts=[of_prompt(embedded([EAST]))], instance=embedded([EAST])
    )
    assert column("dino", [figures, figures]).mean == pytest.approx(figures.figures["dino"].interval.mean)
    with pytest.raises(InputError, match="miniature@0123456789abcdef and paper@ffffffffffffffff"):
        column("dino", [figures, other])
    with pytest.raises(InputError, match="has no figure 'pres': no samples of the class prompt"):
        column("pres", [other])


def test_one_instance_image_and_one_sample_give_what_they_can() -> None:
    figures = measure(bank=BANK, prompts=[of_prompt(embedded([EAST]))], instance=embedded([EAST]))
    assert set(figures.figures) == {"dino", "clip_i", "clip_t", "clip_t_no_identifier", "near_copies", "nearest_dino"}
    assert figures.figures["dino"].interval == Interval(mean=1, low=1, high=1, n=1)
    assert figures.unmeasured["real_dino"] == "one instance image has no other to be compared with"
    assert figures.unmeasured["div"] == "no distances between samples were given"
    assert figures.unmeasured["context_variance"] == "a variance over prompts needs at least 2 prompts"
    assert figures.unmeasured["clip_t_base"] == "no samples by the base model were given"


def test_the_order_of_prompts_samples_and_photographs_changes_no_figure() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> ImageEmbeddings:
        dino, clip = torch.randn(count, 6, generator=generator), torch.randn(count, 4, generator=generator)
        return ImageEmbeddings(dino=dino, clip=clip)

    texts = torch.randn(3, 4, generator=generator)
    instance, classes = random(5), random(4)
    prompts = [
        PromptSamples(prompt=str(i), samples=random(4), text=text, text_no_identifier=text, base=random(4))
        for i, text in enumerate(texts)
    ]

    def turned(embeddings: ImageEmbeddings) -> ImageEmbeddings:
        return ImageEmbeddings(dino=embeddings.dino.flip(0), clip=embeddings.clip.flip(0))

    others = [dataclasses.replace(each, samples=turned(each.samples)) for each in reversed(prompts)]
    one = measure(bank=BANK, prompts=prompts, instance=instance, class_samples=classes)
    other = measure(bank=BANK, prompts=others, instance=turned(instance), class_samples=turned(classes))
    for name, figure in one.figures.items():
        assert other.figures[name].interval.mean == pytest.approx(figure.interval.mean), name
    assert sorted(other.figures) == sorted(one.figures)


def test_leaks_are_averaged_by_prompt() -> None:
    prompts = [
        of_prompt(embedded([EAST]), "first", background_leak=[0.1, 0.3]),
        of_prompt(embedded([EAST]), "second", background_leak=[0.6]),
        of_prompt(embedded([EAST]), "without masks"),
    ]
    leak = measure(bank=BANK, prompts=prompts, instance=embedded([EAST])).figures["background_leak"]
    assert leak.values == pytest.approx((0.2, 0.6))


class TestWarnings:
    def test_of_samples_that_copy_the_photographs(self) -> None:
        figures = measure(bank=BANK, prompts=[of_prompt(embedded([EAST, NORTH]))], instance=embedded([EAST, NORTH]))
        assert figures.warnings == (
            "samples copy the photographs (100% are near-copies): fewer steps (train.keep=best with evaluation.every "
            "finds how many) or more class images",
        )

    def test_of_prompts_that_are_not_followed(self) -> None:
        # The base model's images follow their own texts; the fine-tuned model's all look like the photograph.
        photograph = embedded([EAST], [EAST])
        prompts = [
            of_prompt(
                embedded([EAST], [UP]), str(i), text_no_identifier=torch.tensor(text), base=embedded([EAST], [text])
            )
            for i, text in enumerate((WEST, NORTH))
        ]
        [warning] = measure(bank=BANK, prompts=prompts, instance=photograph).warnings
        assert warning.startswith("prompts are not followed (100% of them less than half as closely as by the base")

    def test_of_a_class_that_became_the_subject(self) -> None:
        samples, photographs = embedded([EAST], [UP]), embedded([EAST, EAST], [EAST, WEST])
        figures = measure(
            bank=BANK, prompts=[of_prompt(samples)], instance=photographs, class_samples=embedded([EAST], [UP])
        )
        assert figures.warnings == (
            "the class became the subject (PRES 1.00, the photographs among themselves 1.00): more class images or a "
            "higher prior_loss_weight",
        )

    def test_of_a_subject_that_was_not_learnt(self) -> None:
        samples, photographs = embedded([NORTH], [UP]), embedded([EAST, EAST], [EAST, WEST])
        [warning] = measure(bank=BANK, prompts=[of_prompt(samples)], instance=photographs).warnings
        assert warning.startswith("the samples hardly look like the subject (DINO 0.00, the photographs among them")

    def test_are_not_given_for_a_model_that_is_well(self) -> None:
        first = of_prompt(embedded([EAST], [NORTH]), base=embedded([EAST], [NORTH]))
        figures = measure(
            bank=BANK,
            prompts=[first],
            instance=embedded([EAST, EAST], [EAST, WEST]),
            class_samples=embedded([NORTH]),
        )
        assert figures.warnings == ()


class TestBadInput:
    INSTANCE = embedded([EAST, NORTH])

    def fault(self, *prompts: PromptSamples, instance: ImageEmbeddings = INSTANCE, **more: Any) -> str:
        with pytest.raises(InputError) as caught:
            measure(bank=BANK, prompts=prompts, instance=instance, **more)
        return str(caught.value)

    def test_no_prompts(self) -> None:
        assert self.fault() == "an evaluation needs at least one prompt with samples, got none"

    def test_no_samples(self) -> None:
        empty = ImageEmbeddings(dino=torch.empty(0, 3), clip=torch.empty(0, 3))
        message = self.fault(of_prompt(embedded([EAST])), of_prompt(empty, "a [V] dog at night"))
        assert message == "there are no samples of the prompt 'a [V] dog at night'; sample it before measuring"

    def test_no_instance_images(self) -> None:
        empty = ImageEmbeddings(dino=torch.empty(0, 3), clip=torch.empty(0, 3))
        assert "at least one instance image, got none" in self.fault(of_prompt(embedded([EAST])), instance=empty)

    def test_distances_of_one_sample(self) -> None:
        message = self.fault(of_prompt(embedded([EAST]), distances=torch.zeros(1, 1)))
        assert message.startswith("DIV needs at least 2 samples of a prompt, got 1")

    def test_distances_of_other_samples(self) -> None:
        message = self.fault(of_prompt(embedded([EAST]), "a dog", distances=torch.zeros(3, 3)))
        assert message == "the prompt 'a dog' has distances (3, 3) for 1 samples; expected (1, 1)"

    @pytest.mark.parametrize("encoder", ["dino", "clip"])
    def test_samples_embedded_by_another_encoder(self, encoder: str) -> None:
        wide = ImageEmbeddings(**{"dino": torch.ones(1, 3), "clip": torch.ones(1, 3), encoder: torch.ones(1, 7)})
        message = self.fault(of_prompt(wide, "a [V] dog"))
        assert message.startswith(f"samples of the prompt 'a [V] dog', {encoder}: embeddings of width 7 and 3 can't be")
        assert "embeddings stored by another bank have to be made again" in message

    def test_a_text_embedded_by_another_encoder(self) -> None:
        message = self.fault(of_prompt(embedded([EAST]), "a [V] dog", text=torch.ones(9)))
        assert message.startswith("the text of the prompt 'a [V] dog': embeddings of width 9 and 3 can't be compared")

    @pytest.mark.parametrize("where", ["samples", "base", "text", "class", "instance"])
    def test_embeddings_that_are_not_numbers(self, where: str) -> None:
        broken = embedded([EAST, [math.nan, 0.0, 0.0]])
        fine = embedded([EAST])
        parts: dict[str, Any] = {"base": broken} if where == "base" else {}
        if where == "text":
            parts = {"text": torch.tensor([math.nan, 0.0, 0.0])}
        message = self.fault(
            of_prompt(broken if where == "samples" else fine, "a [V] dog", **parts),
            instance=broken if where == "instance" else fine,
            class_samples=broken if where == "class" else fine,
        )
        whose = {
            "samples": "samples of the prompt 'a [V] dog', dino: the embedding at 1",
            "base": "samples of the prompt 'a [V] dog' by the base model, dino: the embedding at 1",
            "text": "the text of the prompt 'a [V] dog': the embedding at 0",
            "class": "samples of the class prompt, dino: the embedding at 1",
            "instance": "the instance images, dino: the embedding at 1",
        }
        assert message.startswith(f"{whose[where]} isn't finite")
