"""A subject: what is personalized, and the two prompts made from it.

>>> subject = Subject(name="rex", class_noun="dog", identifier="sks", instance_images=("rex",))
>>> PromptTemplates().instance_prompt(subject)
'a photo of sks dog'
>>> PromptTemplates().class_prompt(subject)
'a photo of a dog'
"""

import re
import unicodedata
from functools import cache
from string import Formatter
from types import NoneType
from typing import Annotated, Any, get_args

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

from dreambooth.strict_yaml import Misread

IDENTIFIER_PLACEHOLDER = "[V]"
CLASS_NOUN_PLACEHOLDER = "{class_noun}"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Frozen(BaseModel):
    """Base of every setting: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what YAML doesn't read as the text it looks like, and text that nothing can write down."""
        annotation: Any = cls.model_fields[str(info.field_name)].annotation
        for each in value if isinstance(value, list | tuple) else [value]:
            if _takes_text(annotation):
                _check_is_text(each, optional=NoneType in get_args(annotation))
            if isinstance(each, str) and (unfit := re.search("[\0\ud800-\udfff]", each)):
                raise ValueError(_hidden(unfit[0], each))
        return value


@cache
def _takes_text(annotation: Any) -> bool:
    """Whether a setting is text, or a list of texts; a choice of words is none."""
    return annotation is str or any(_takes_text(part) for part in get_args(annotation))


def _check_is_text(value: object, *, optional: bool) -> None:
    if isinstance(value, Misread):
        raise ValueError(f'YAML reads {value} as {value.reading}; quote it: "{value}"')
    if isinstance(value, bool):
        raise ValueError(f'expected text, got {str(value).lower()}; quote it: "{str(value).lower()}"')
    if isinstance(value, int | float):
        raise ValueError(f'expected text, got the number {value}; quote it: "{value}"')
    if value is None and not optional:
        raise ValueError("expected text, got nothing, which is what YAML reads an empty value, ~ and null as; quote it")


def _hidden(char: str, text: str) -> str:
    return f"expected visible characters, got the control character U+{ord(char):04X} in {text!r}"


def name_from(text: str) -> str:
    """A subject name made of any text, such as a folder's name; empty where it has neither letter nor digit.

    >>> name_from("My Dog (2)")
    'my-dog-2'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def check_name(name: str) -> str:
    """A subject's or a batch's name as it is; ValueError, with the nearest spelling, for one unfit for paths."""
    if not _NAME.fullmatch(name):
        # Accents are left off: é is no other letter to who reads a path.
        plain = name_from(
            "".join(each for each in unicodedata.normalize("NFKD", name) if not unicodedata.combining(each))
        )
        raise ValueError(
            f"a subject name becomes part of paths and model names, so it takes 1 to 63 of a-z, 0-9 and '-', "
            f"with no '-' at either end{f'; write {plain}' if plain else ''}; got {name!r}"
        )
    return name


def _check_words(words: str) -> str:
    """Refuse what can't stand in a prompt: nothing at all, or control and other invisible characters."""
    hidden = [char for char in words if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn")]
    if hidden:
        raise ValueError(_hidden(hidden[0], words))
    if not words.strip():
        raise ValueError("expected at least one visible character, got an empty text")
    return " ".join(words.split())


def as_tuple(value: object) -> object:
    """One address as a list of one."""
    return (value,) if isinstance(value, str) else value


def _check_addresses(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses or any(not address.strip() for address in addresses):
        raise ValueError("expected a folder, a glob or a list of image addresses, got an empty one")
    return addresses


Words = Annotated[str, AfterValidator(_check_words)]


class Subject(Frozen):
    """Three to five photographs of one thing, and what that thing is.

    `identifier` None means that a rare token is chosen (`dreambooth.identifier`). `instance_images` is a folder, a glob
    or a list of images, local or at any address that fsspec knows.
    """

    name: Annotated[str, AfterValidator(check_name)] = Field(
        description="of folders and of the registered model: a-z, 0-9 and dashes, 63 at most"
    )
    class_noun: Words = Field(description="what the subject is: dog, backpack, fire engine")
    identifier: Words | None = Field(None, description="the rare token that names the subject; None: one is chosen")
    instance_images: Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_check_addresses)] = Field(
        description="folder, glob or list of photographs, three to five of them; photo.txt beside photo.jpg captions it"
    )

    @model_validator(mode="after")
    def _identifier_is_not_the_class_noun(self) -> "Subject":
        if self.identifier is not None and self.identifier.casefold() == self.class_noun.casefold():
            raise ValueError(
                f"identifier and class_noun are both {self.class_noun!r}; the identifier has to be another, rare word "
                f"(leave it out and one is chosen)"
            )
        return self


def _check_template(template: str) -> str:
    known = {"identifier", "class_noun", "article"}
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"not a prompt template: {error} in {template!r}") from None
    fields = {field for _, field, _, _ in parsed if field is not None}
    if any(spec or conversion for _, _, spec, conversion in parsed):
        raise ValueError(f"{template!r}: expected plain fields such as {{class_noun}}, without ':' and '!'")
    if fields - known:
        raise ValueError(f"{template!r} holds {sorted(fields - known)}; a template knows {sorted(known)}")
    return _check_words(template)


Template = Annotated[str, AfterValidator(_check_template)]


def _check_names_identifier(template: str) -> str:
    if "{identifier}" not in template:
        raise ValueError(f"expected {{identifier}} in the instance template, got {template!r}")
    return template


class PromptTemplates(Frozen):
    """The instance and the class prompt (paper, section 3.1 and 3.2), as templates.

    Fields of a template: {identifier}, {class_noun}, {article} ("a" or "an", as the class noun needs).
    """

    instance: Annotated[Template, AfterValidator(_check_names_identifier)] = Field(
        "a photo of {identifier} {class_noun}", description="what an instance image is trained with"
    )
    class_: Template = Field(
        "a photo of {article} {class_noun}", alias="class", description="what class images are made and trained with"
    )

    def instance_prompt(self, subject: Subject) -> str:
        """The instance prompt; raises ValueError while the subject has no identifier yet."""
        if subject.identifier is None:
            raise ValueError(f"subject {subject.name!r} has no identifier yet")
        return self._fill(self.instance, subject)

    def class_prompt(self, subject: Subject) -> str:
        """The class prompt: what the prior-preservation images show."""
        return self._fill(self.class_, subject)

    def noun_beside_identifier(self, subject: Subject) -> str:
        """The class noun as prompts with the identifier say it: "" where the instance prompt names none.

        A model that was taught "a photo of [V]" alone, as by Textual Inversion, is asked for it by that name.
        """
        return subject.class_noun if CLASS_NOUN_PLACEHOLDER in self.instance else ""

    @staticmethod
    def _fill(template: str, subject: Subject) -> str:
        article = "an" if subject.class_noun[0].lower() in "aeiou" else "a"
        return template.format(identifier=subject.identifier, class_noun=subject.class_noun, article=article)


def fill_identifier(prompt: str, identifier: str) -> str:
    """Put a subject's identifier where a prompt says `[V]`."""
    return prompt.replace(IDENTIFIER_PLACEHOLDER, identifier)


def fill_prompt(prompt: str, identifier: str, class_noun: str) -> str:
    """Put identifier and class noun into a prompt with `[V]` and `{class_noun}`; without a noun no gap is left.

    >>> fill_prompt("a photo of [V] {class_noun} in the snow", "sks", "")
    'a photo of sks in the snow'
    """
    return " ".join(fill_identifier(prompt, identifier).replace(CLASS_NOUN_PLACEHOLDER, class_noun).split())
