"""Prompt templates of zero-shot classification (CLIP, arXiv 2103.00020, section 3.1.4): named sets and one's own.

A template is a text with {} where the class name goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from genpipe.errors import InputError

# A caption that photographs and drawings alike may have. Measured with the shipped family on 1,000 scenes: "a", "the",
# "an image of" and "a drawing of" do as well, to a point; "a photo of", a word it never saw, costs 19 points of its 52,
# and a full stop at the end 13.
PLAIN_TEMPLATES = ("a picture of a {}",)
TEMPLATE_SETS = ("plain", "simple", "openai-imagenet")  # the last two are open_clip's, of 7 and 80 templates
SLOT = "{}"
MAX_TEMPLATE = 500  # characters


def choose_templates(chosen: str | Sequence[str]) -> tuple[str, ...]:
    """Names of sets and own templates, one or several, mixed at will -> the templates, each once, in order.

    Raises InputError for unknown sets, templates without {} or of more than 500 characters, and for none at all.
    """
    templates: list[str] = []
    for text in [chosen] if isinstance(chosen, str) else chosen:
        if SLOT not in text:
            if text not in TEMPLATE_SETS:
                raise InputError(
                    f"There is no template set {text[:100]!r}; choose from {', '.join(TEMPLATE_SETS)}, or give a "
                    f"template of your own with {SLOT} for the class name."
                )
            templates += _named_set(text)
        elif len(text) > MAX_TEMPLATE:
            raise InputError(
                f"The template {text[:40]!r} ... has {len(text):,} characters, the limit is {MAX_TEMPLATE}."
            )
        else:
            templates.append(" ".join(text.split()))
    if not templates:
        raise InputError(f"No template was given; choose from {', '.join(TEMPLATE_SETS)}.")
    return tuple(dict.fromkeys(templates))


def fill(template: str, name: str) -> str:
    """The prompt of a class; braces in the name are ordinary letters."""
    return template.replace(SLOT, name)


def _named_set(name: str) -> tuple[str, ...]:
    if name == "plain":
        return PLAIN_TEMPLATES
    from open_clip import zero_shot_metadata  # takes seconds, and most calls need none of it

    functions = {
        "simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
        "openai-imagenet": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
    }
    return tuple(function(SLOT) for function in functions[name])
