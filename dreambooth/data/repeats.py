"""How often each photograph comes up in an epoch, as `images.repeats` says by file name."""

from collections import Counter
from collections.abc import Mapping, Sequence

from dreambooth.amounts import counted
from dreambooth.data.images import InstanceImage
from dreambooth.data.images.names import nearest_name
from dreambooth.errors import InputError


def repeats_of(images: Sequence[InstanceImage], repeats: Mapping[str, int]) -> tuple[int, ...]:
    """Times that each image comes up in an epoch.

    Raises InputError for a name that none of the images has, or two.
    """
    names = [image.address.rsplit("/", 1)[-1] for image in images]
    there, faults = Counter(names), []
    for name in repeats:
        if there[name] > 1:
            addresses = [image.address for image, other in zip(images, names, strict=True) if other == name]
            faults.append(f"images.repeats: {name} is the name of {' and of '.join(addresses)}; rename one of them")
        elif not there[name]:
            near = nearest_name(name, set(names))
            hint = f"did you mean {near}?" if near else f"they are {', '.join(sorted(set(names))[:5])}"
            faults.append(f"images.repeats: {name} is the name of none of {counted(len(images), 'photograph')}; {hint}")
    if faults:
        raise InputError("\n".join(faults))
    return tuple(repeats.get(name, 1) for name in names)
