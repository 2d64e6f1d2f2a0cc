"""Colours of the backgrounds of emoji scenes: named ones, slightly varied, and blends of two, which have no name."""

from collections.abc import Mapping, Sequence

from genpipe.data.vocabulary import vocabulary

Colour = tuple[int, int, int]  # RGB, 0 to 255

_JITTER = 8  # levels, of 255, to either side of a named colour


def named_colours() -> Mapping[str, Colour]:
    """The colour of each background, by its name."""
    return {name: words.colour for name, words in vocabulary().backgrounds.items()}


def vary(name: str, numbers: Sequence[float]) -> Colour:
    """A background's colour, each channel moved a little by three numbers in [0, 1); the extremes are clipped."""
    levels = 2 * _JITTER + 1
    red, green, blue = (
        min(max(level - _JITTER + int(u * levels), 0), 255)
        for level, u in zip(named_colours()[name], numbers, strict=True)
    )
    return red, green, blue


def blend(name: str, other: str, share: float) -> Colour:
    """The colour that lies between those of two backgrounds, `share` of the way from the first, in [0, 1]."""
    colours = named_colours()
    red, green, blue = (
        round(own + share * (its - own)) for own, its in zip(colours[name], colours[other], strict=True)
    )
    return red, green, blue


def nearest_name(colour: Colour) -> str:
    """The background whose named colour is nearest in RGB."""
    return min(
        (sum((own - its) ** 2 for own, its in zip(colour, named, strict=True)), name)
        for name, named in named_colours().items()
    )[1]
