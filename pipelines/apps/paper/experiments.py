"""The experiments of `dreambooth paper`: the paper's tables and more, each row a few settings.

A row is one run per subject of its experiment; rows of equal settings share runs. The paper's own figures (Ruiz et al.,
arXiv 2208.12242) stand beside each table; they are of other models, data and encoders, and only show the direction of
an effect.
"""

from dataclasses import replace

from dreambooth.amounts import counted
from pipelines.apps.paper.rows import Claim, Experiment, Published, Row

FIDELITY = ("dino", "clip_i")
_PAIRS = {"backpack": "boat", "bird": "dog", "car": "cat", "clock": "teapot"}
WRONG_NOUNS = _PAIRS | {second: first for first, second in _PAIRS.items()}
"""Another subject's class noun for each of the subjects', in pairs: two subjects need two sets of class images."""

_METHODS = (*FIDELITY, "clip_t_no_identifier")
_PRESERVED = ("pres", "div", *_METHODS)
_ALONE = "a photo of {identifier}"


DREAMBOOTH = Row(slug="dreambooth", title="DreamBooth (miniature)")
CASCADE = Row(slug="cascade", title="DreamBooth (miniature-cascade)", base_model="miniature-cascade")
FLOW = Row(slug="flow", title="DreamBooth (miniature-flow)", base_model="miniature-flow")
TEXTUAL_INVERSION = Row(
    slug="textual-inversion",
    title="Textual Inversion (miniature)",
    settings={
        "train.method": "textual_inversion",
        "train.identifier_learning_rate": 0.03,
        "train.micro_batch_size": 1,
        "train.max_train_steps": 800,
    },
)
WITHOUT_PRIOR = Row(slug="no-prior", title="DreamBooth without it", settings={"prior.prior_loss_weight": 0})
REAL_IMAGES = Row(
    slug="real",
    title="Real images",
    reads={"dino": "real_dino", "clip_i": "real_clip_i", "clip_t_no_identifier": None},
)


def _same(row: Row, slug: str, title: str) -> Row:
    """A row with the same runs under another title."""
    return replace(row, slug=slug, title=title)


TABLE_1 = Experiment(
    name="table1",
    title="Subject fidelity and prompt fidelity",
    columns=_METHODS,
    rows=(REAL_IMAGES, CASCADE, DREAMBOOTH, FLOW, TEXTUAL_INVERSION),
    claims=(
        Claim(sentence="Real images are above DreamBooth in DINO", column="dino", higher="real", lower="dreambooth"),
        Claim(
            sentence="DreamBooth is above Textual Inversion in DINO",
            column="dino",
            higher="dreambooth",
            lower="textual-inversion",
        ),
        Claim(
            sentence="DreamBooth of the cascade is above that of the latent model in DINO",
            column="dino",
            higher="cascade",
            lower="dreambooth",
        ),
    ),
    note="The cascade is of Imagen's kind, the latent model of Stable Diffusion's; the flow model has no row in the "
    "paper. Each is trained by its own defaults. One of the flow model's text encoders is the text tower of the CLIP "
    "that measures CLIP-T, which may flatter it.",
    published=(
        Published(title="Real images", figures=(0.774, 0.885, None)),
        Published(title="DreamBooth (Imagen)", figures=(0.696, 0.812, 0.306)),
        Published(title="DreamBooth (Stable Diffusion)", figures=(0.668, 0.803, 0.305)),
        Published(title="Textual Inversion (Stable Diffusion)", figures=(0.569, 0.780, 0.255)),
    ),
    published_columns=_METHODS,
    source="Table 1",
)

TABLE_3 = Experiment(
    name="table3",
    title="Prior preservation",
    columns=_PRESERVED,
    rows=(_same(DREAMBOOTH, "prior", "DreamBooth with prior preservation"), WITHOUT_PRIOR),
    claims=(
        Claim(sentence="Prior preservation lowers PRES", column="pres", higher="no-prior", lower="prior"),
        Claim(sentence="Prior preservation raises DIV", column="div", higher="prior", lower="no-prior"),
    ),
    published=(
        Published(title="DreamBooth (Imagen) w/ PPL", figures=(0.493, 0.391, 0.684, 0.815, 0.308)),
        Published(title="DreamBooth (Imagen)", figures=(0.664, 0.371, 0.712, 0.828, 0.306)),
    ),
    published_columns=_PRESERVED,
    source="Table 3",
)

TABLE_4 = Experiment(
    name="table4",
    title="The class noun",
    columns=(*FIDELITY, "near_copies"),
    rows=(
        _same(DREAMBOOTH, "correct", "Correct class noun"),
        Row(slug="no-noun", title="No class noun", settings={"prompts.instance": _ALONE}),
        Row(slug="wrong-noun", title="Wrong class noun", class_noun="wrong"),
    ),
    claims=(
        Claim(
            sentence="The correct class noun is above none in DINO", column="dino", higher="correct", lower="no-noun"
        ),
        Claim(
            sentence="The correct class noun is above a wrong one in DINO",
            column="dino",
            higher="correct",
            lower="wrong-noun",
        ),
        Claim(
            sentence="A wrong class noun gives more near-copies than the correct one",
            column="near_copies",
            higher="wrong-noun",
            lower="correct",
        ),
    ),
    note="Prompts name the class noun that was trained with, or none. Without one, the class images are those of the "
    "correct class, so that nothing else differs; with a wrong one they are of the wrong class. Read DINO with "
    "near-copies: a copy of a photograph is as like the other photographs as they are among themselves.",
    published=(
        Published(title="Correct class", figures=(0.744, 0.853)),
        Published(title="No class", figures=(0.303, 0.607)),
        Published(title="Wrong class", figures=(0.454, 0.728)),
    ),
    published_columns=FIDELITY,
    source="Table 4",
)

TABLE_5 = Experiment(
    name="table5",
    title="The number of instance images",
    every_subject=False,
    columns=("dino", "clip_t_no_identifier", "div", "near_copies"),
    rows=tuple(
        Row(slug=f"images-{count}", title=counted(count, "image"), instance_images=count) for count in range(1, 6)
    ),
    claims=(
        Claim(sentence="Five images are above one in DINO", column="dino", higher="images-5", lower="images-1"),
        Claim(sentence="Five images are above one in DIV", column="div", higher="images-5", lower="images-1"),
        Claim(
            sentence="One image gives more near-copies than five",
            column="near_copies",
            higher="images-1",
            lower="images-5",
        ),
    ),
    note="However many images are trained on, samples are compared with all five.",
    published=(
        Published(title="Backpack", figures=(0.494, 0.515, 0.596, 0.604, 0.597)),
        Published(title="Dog", figures=(0.798, 0.851, 0.871, 0.876, 0.864)),
    ),
    published_columns=("1 image", "2", "3", "4", "5"),
    source="Table 5 (DINO)",
)

IDENTIFIER = Experiment(
    name="identifier",
    title="A rare identifier or a common word",
    columns=_PRESERVED,
    every_subject=False,
    rows=(
        _same(DREAMBOOTH, "rare", "Rare token"),
        Row(slug="common-word", title='Common word ("green")', settings={"subject.identifier": "green"}),
    ),
    claims=(
        Claim(
            sentence="A rare identifier is above a common word in DINO",
            column="dino",
            higher="rare",
            lower="common-word",
        ),
    ),
    note="The paper's section 3.1 argues for rare tokens without figures.",
)

TEXT_ENCODER = Experiment(
    name="text-encoder",
    title="Text encoder trained or frozen",
    columns=_PRESERVED,
    every_subject=False,
    rows=(
        _same(DREAMBOOTH, "trained", "Trained"),
        Row(slug="frozen", title="Frozen", settings={"train.train_text_encoder": False}),
    ),
    claims=(
        Claim(
            sentence="A trained text encoder is above a frozen one in DINO",
            column="dino",
            higher="trained",
            lower="frozen",
        ),
    ),
    note="With a frozen text encoder the identifier's embedding is not learnt either.",
)

CHECKPOINT = Experiment(
    name="checkpoint",
    title="The last checkpoint or the best",
    columns=(*_METHODS, "near_copies"),
    every_subject=False,
    rows=(
        _same(DREAMBOOTH, "last", "Last"),
        Row(slug="best", title="Best by DINO + CLIP-T", settings={"train.keep": "best", "evaluation.every": 50}),
    ),
    claims=(
        Claim(sentence="The best checkpoint is above the last in DINO", column="dino", higher="best", lower="last"),
    ),
    note="The score is measured every 50 steps on samples of five other prompts than the table's.",
)

CLASS_IMAGES = Experiment(
    name="class-images",
    title="The number of class images",
    columns=_PRESERVED,
    every_subject=False,
    rows=(
        _same(WITHOUT_PRIOR, "class-images-0", "None"),
        *(
            Row(slug=f"class-images-{count}", title=str(count), settings={"prior.num_class_images": count})
            for count in (10, 50, 200)
        ),
    ),
    claims=(
        Claim(
            sentence="200 class images are below 10 in PRES",
            column="pres",
            higher="class-images-10",
            lower="class-images-200",
        ),
    ),
)

STEPS = Experiment(
    name="steps",
    title="Training steps",
    columns=(*_PRESERVED, "near_copies"),
    every_subject=False,
    rows=tuple(
        Row(slug=f"steps-{count}", title=str(count), settings={"train.max_train_steps": count})
        for count in (60, 125, 250, 500)
    ),
    claims=(Claim(sentence="250 steps are above 60 in DINO", column="dino", higher="steps-250", lower="steps-60"),),
)

SUPER_RESOLUTION = Experiment(
    name="super-resolution",
    title="The super-resolution stage",
    columns=_METHODS,
    every_subject=False,
    rows=(
        _same(CASCADE, "little-noise", "Fine-tuned with little noise (levels to 99)"),
        replace(
            CASCADE,
            slug="much-noise",
            title="Fine-tuned with much noise (levels to 399)",
            settings={"super_resolution.noise_levels": 400},
        ),
        replace(CASCADE, slug="not-tuned", title="Not fine-tuned", settings={"super_resolution.max_train_steps": 0}),
    ),
    claims=(
        Claim(
            sentence="Fine-tuning the super-resolution stage raises DINO",
            column="dino",
            higher="little-noise",
            lower="not-tuned",
        ),
        Claim(
            sentence="Less noise of the small picture raises DINO",
            column="dino",
            higher="little-noise",
            lower="much-noise",
        ),
    ),
    note="The rows have the same first stage, so the same prompt and noise give the same small picture, of 16 pixels. "
    "Much noise is that of the pretraining; samples have a quarter of the levels. The paper shows in pictures, without "
    "figures, that details of the subject are lost with much noise or without fine-tuning.",
)

EXPERIMENTS = (
    TABLE_1,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    SUPER_RESOLUTION,
    IDENTIFIER,
    TEXT_ENCODER,
    CHECKPOINT,
    CLASS_IMAGES,
    STEPS,
)
