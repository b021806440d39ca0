"""A subject, and the instance and class prompts made from it.

>>> subject = Subject(name="rex", class_noun="dog", identifier="sks", instance_images=("rex",))
>>> PromptTemplates().instance_prompt(subject)
'a photo of sks dog'
>>> PromptTemplates().class_prompt(subject)
'a photo of a dog'
"""

import re
import unicodedata
from functools import cache
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dreambooth.config.explain import in_yaml
from dreambooth.config.strict_yaml import Misread
from dreambooth.config.wording import (
    CLASS_NOUN_PLACEHOLDER,
    IDENTIFIER_PLACEHOLDER,
    PROMPT_FIELDS,
    TEMPLATE_FIELDS,
    misplaced,
    visible,
)

_ARTICLE = re.compile(r"(an?|the)\s+(?=\S)", re.IGNORECASE)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Frozen(BaseModel):
    """Base of every setting: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    later: ClassVar[tuple[str, ...]] = ()
    """Settings, in the order they came, that older results have no part of in their keys. New ones go here."""

    def keyed(self) -> dict[str, Any]:
        """Plain settings for a key; `later` ones only where they aren't defaults, so earlier results keep theirs."""
        plain = self.model_dump(mode="json")
        fields = type(self).model_fields
        came = {name: plain.pop(name) for name in self.later}
        return plain | {name: value for name, value in came.items() if getattr(self, name) != fields[name].default}

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse values that YAML reads as something other than text, and text that can't be encoded."""
        annotation: Any = cls.model_fields[str(info.field_name)].annotation
        for each in value if isinstance(value, list | tuple) else [value]:
            if _takes_text(annotation):
                _check_is_text(each, optional=NoneType in get_args(annotation))
            if isinstance(each, str) and (unfit := re.search("[\0\ud800-\udfff]", each)):
                raise ValueError(_hidden(unfit[0], each))
        return value


@cache
def _takes_text(annotation: Any) -> bool:
    """Whether a setting is text or a list of texts; a Literal is not, nor numbers by name."""
    parts = () if get_origin(annotation) is dict else get_args(annotation)
    return annotation is str or any(_takes_text(part) for part in parts)


def _check_is_text(value: object, *, optional: bool) -> None:
    if isinstance(value, Misread):
        raise ValueError(f'YAML reads {value} as {value.reading}; quote it: "{value}"')
    if isinstance(value, bool):
        raise ValueError(f'expected text, got {in_yaml(value)}; quote it: "{in_yaml(value)}"')
    if isinstance(value, int | float):
        raise ValueError(f'expected text, got the number {value}; quote it: "{value}"')
    if value is None and not optional:
        raise ValueError("expected text, got nothing, which is what YAML reads an empty value, ~ and null as; quote it")


def _hidden(char: str, text: str) -> str:
    return f"expected visible characters, got the control character U+{ord(char):04X} in {text!r}"


def name_from(text: str) -> str:
    """Make a subject name from any text, such as a folder's name; empty if it has neither letter nor digit.

    >>> name_from("My Dog (2)")
    'my-dog-2'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def check_name(name: str) -> str:
    """Return a subject's or batch's name. Raises ValueError, with the nearest valid name, if it is unfit for paths."""
    if not _NAME.fullmatch(name):
        # Accents are dropped: é becomes e.
        plain = name_from(
            "".join(each for each in unicodedata.normalize("NFKD", name) if not unicodedata.combining(each))
        )
        raise ValueError(
            f"a subject name becomes part of paths and model names, so it takes 1 to 63 of a-z, 0-9 and '-', "
            f"with no '-' at either end{f'; write {plain}' if plain else ''}; got {name!r}"
        )
    return name


def as_tuple(value: object) -> object:
    """Wrap a single address in a tuple."""
    return (value,) if isinstance(value, str) else value


def _check_addresses(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses or any(not address.strip() for address in addresses):
        raise ValueError("expected a folder, a glob or a list of image addresses, got an empty one")
    return addresses


Words = Annotated[str, AfterValidator(visible)]


def _check_noun(noun: str) -> str:
    """Refuse a noun with an article of its own or with a placeholder."""
    if fault := misplaced(noun, known=()):
        raise ValueError(f"{noun!r} holds a placeholder: {fault}")
    if _ARTICLE.match(noun):
        raise ValueError(f"expected the noun without its article, {_ARTICLE.sub('', noun)!r}, got {noun!r}")
    return noun


def _check_identifier(identifier: str) -> str:
    if identifier.casefold() in [each.casefold() for each in (*PROMPT_FIELDS, *TEMPLATE_FIELDS)]:
        raise ValueError(f"{identifier!r} is a placeholder; give a rare word, or leave it out and one is chosen")
    return identifier


class Subject(Frozen):
    """Three to five photographs of one thing, its class noun and its identifier.

    With `identifier` None a rare token is chosen (`dreambooth.data.identifier`). `instance_images` is a folder, a glob
    or a list of images, local or at any fsspec address.
    """

    name: Annotated[str, AfterValidator(check_name)] = Field(
        description="name for folders and the registered model: a-z, 0-9 and dashes, at most 63"
    )
    class_noun: Annotated[Words, AfterValidator(_check_noun)] = Field(
        description="class noun of the subject: dog, backpack, fire engine"
    )
    identifier: Annotated[Words, AfterValidator(_check_identifier)] | None = Field(
        None, description="rare token that names the subject; null: choose one"
    )
    instance_images: Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_check_addresses)] = Field(
        description="three to five photographs: folder, glob or list; photo.txt beside photo.jpg is its caption"
    )

    @model_validator(mode="after")
    def _identifier_is_not_the_class_noun(self) -> "Subject":
        if self.identifier is None:
            return self
        identifier, noun = _folded(self.identifier), _folded(self.class_noun)
        if identifier == noun:
            raise ValueError(
                f"identifier and class_noun are both {self.class_noun!r}; the identifier has to be another, rare word "
                f"(leave it out and one is chosen)"
            )
        if f" {identifier} " in f" {noun} ":
            raise ValueError(
                f"class_noun {self.class_noun!r} holds the identifier {self.identifier!r}, which prompts put before "
                f"it; leave it out of the class noun, or every member of the class has that name"
            )
        return self


def _folded(words: str) -> str:
    """Normalize as tokenizers do: composed, in lower case."""
    return unicodedata.normalize("NFC", words).casefold()


def _check_template(template: str) -> str:
    if fault := misplaced(template, known=TEMPLATE_FIELDS):
        raise ValueError(f"{template!r}: {fault}")
    return visible(template)


Template = Annotated[str, AfterValidator(_check_template)]


def _check_names_identifier(template: str) -> str:
    if "{identifier}" not in template:
        raise ValueError(f"expected {{identifier}} in the instance template, got {template!r}")
    return template


def _check_names_no_identifier(template: str) -> str:
    if "{identifier}" in template:
        raise ValueError(
            f"{template!r} names the identifier, and class images show any other member of the class; leave "
            f"{{identifier}} out"
        )
    return template


class PromptTemplates(Frozen):
    """The instance and the class prompt (paper, section 3.1 and 3.2), as templates.

    Fields of a template: {identifier}, {class_noun}, {article} ("a" or "an", as the class noun needs).
    """

    instance: Annotated[Template, AfterValidator(_check_names_identifier)] = Field(
        "a photo of {identifier} {class_noun}", description="prompt of instance images in training"
    )
    class_: Annotated[Template, AfterValidator(_check_names_no_identifier)] = Field(
        "a photo of {article} {class_noun}",
        alias="class",
        description="prompt of class images, in sampling and training",
    )

    def instance_prompt(self, subject: Subject) -> str:
        """The instance prompt. Raises ValueError while the subject has no identifier."""
        if subject.identifier is None:
            raise ValueError(f"subject {subject.name!r} has no identifier yet")
        return self._fill(self.instance, subject)

    def class_prompt(self, subject: Subject) -> str:
        """The prompt of the class images."""
        return self._fill(self.class_, subject)

    def noun_beside_identifier(self, subject: Subject) -> str:
        """The class noun for prompts with the identifier: "" if the instance prompt has none.

        A model trained on "a photo of [V]" alone, as by Textual Inversion, is prompted the same way.
        """
        return subject.class_noun if CLASS_NOUN_PLACEHOLDER in self.instance else ""

    @staticmethod
    def _fill(template: str, subject: Subject) -> str:
        article = "an" if subject.class_noun[0].lower() in "aeiou" else "a"
        return template.format(identifier=subject.identifier, class_noun=subject.class_noun, article=article)


def fill_identifier(prompt: str, identifier: str) -> str:
    """Replace `[V]` in a prompt with a subject's identifier."""
    return prompt.replace(IDENTIFIER_PLACEHOLDER, identifier)


def fill_prompt(prompt: str, identifier: str, class_noun: str) -> str:
    """Fill `[V]` and `{class_noun}` of a prompt; an empty noun leaves no gap.

    >>> fill_prompt("a photo of [V] {class_noun} in the snow", "sks", "")
    'a photo of sks in the snow'
    """
    return " ".join(fill_identifier(prompt, identifier).replace(CLASS_NOUN_PLACEHOLDER, class_noun).split())
