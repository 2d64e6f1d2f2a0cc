"""Recipes, and the overrides that change them."""

import dataclasses

import pytest

from genpipe.errors import InputError
from genpipe.training.config import Recipe, apply_overrides, check, flat, keys_of
from genpipe.training.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_shipped_recipes_are_sound_and_fresh(name: str) -> None:
    shipped = recipe(name)
    check(shipped)
    stage = name.partition("-paper")[0].removesuffix("-64").removesuffix("-256").replace("-", "_")
    assert shipped.name == name and shipped.stage == stage and RECIPES[name].__doc__
    shipped.data.twin_shares.append(1.0)
    shipped.model.clear()
    assert len(recipe(name).data.twin_shares) == 5 and recipe(name).model


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match='no recipe "dave".*clip, clip-64, dalle1, dalle1-64, dalle1-paper, decoder'):
        recipe("dave")


def test_overrides_have_the_type_of_what_they_replace() -> None:
    before = recipe("dalle1")
    untouched = before.to_dict()
    after = apply_overrides(
        before,
        [
            "run.steps=7",
            "optimizer.learning_rate=1e-4",
            "data.twin_shares=[1, 2, 3, 4, 5]",
            "objective.codebook_init=false",
            "objective.dvae=a=b",
            "model.width=64",
            "model.attention=sparse",
            "init=some/folder",
            "run.steps=8",
        ],
    )
    assert before.to_dict() == untouched
    assert (after.run.steps, after.optimizer.learning_rate, after.init) == (8, 1e-4, "some/folder")
    assert after.data.twin_shares == [1, 2, 3, 4, 5] and after.objective["codebook_init"] is False
    assert after.objective["dvae"] == "a=b" and after.model["width"] == 64 and after.model["attention"] == "sparse"
    changed = {key for key, value in flat(after.to_dict()).items() if value != flat(untouched)[key]}
    assert changed == {
        "run.steps", "optimizer.learning_rate", "data.twin_shares", "objective.codebook_init", "objective.dvae",
        "model.width", "model.attention", "init",
    }  # fmt: skip


def test_every_key_can_be_set_to_what_it_is() -> None:
    for name in RECIPES:
        shipped = recipe(name)
        settings = flat(shipped.to_dict())
        assert set(keys_of(shipped)) == set(settings) - {"name", "stage"}
        for key in keys_of(shipped):
            if isinstance(settings[key], str | int | float):
                assert apply_overrides(shipped, [f"{key}={settings[key]}"]) == shipped


def test_lists_and_dicts_are_json() -> None:
    changed = apply_overrides(recipe("dvae"), ["model.widths=[8, 16]"])
    assert changed.model["widths"] == [8, 16]
    architecture = apply_overrides(recipe("clip"), ['model.architecture={"embed_dim": 4}'])
    assert architecture.model["architecture"] == {"embed_dim": 4}


def test_what_is_null_takes_a_number_and_a_number_null() -> None:
    paper = recipe("dvae-paper")
    assert paper.model["branch_gain"] is None
    assert apply_overrides(paper, ["model.branch_gain=0.5"]).model["branch_gain"] == 0.5
    assert apply_overrides(recipe("dvae"), ["model.branch_gain=null"]).model["branch_gain"] is None
    with pytest.raises(InputError, match='"much" is no number or JSON for the setting "model.branch_gain"'):
        apply_overrides(paper, ["model.branch_gain=much"])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run.step=5", "did you mean .*run.steps"),
        ("nonsense=1", 'no setting "nonsense"'),
        ("zzzz.qqqq=1", "known keys: model.text_length, .*init, data.source"),
        ("name=x", 'no setting "name"'),
        ("run=5", 'no setting "run"'),
        ("run.steps", 'has no "="'),
        ("run.steps=many", '"many" is no int for the setting "run.steps"'),
        ("run.steps=1.5", "no int"),
        ("optimizer.learning_rate=fast", "no float"),
        ("objective.codebook_init=perhaps", "no bool"),
        ("data.twin_shares=0.5", "no list"),
        ("data.twin_shares=[1,", "no list"),
        ("run.steps=0", "run.steps is 0; it must be above 0"),
        ("run.batch_size=-1", "run.batch_size"),
        ("optimizer.learning_rate=nan", "above 0"),
        ("optimizer.learning_rate=inf", "above 0"),
        ("optimizer.beta_2=1", "below 1"),
        ("run.ema_decay=1", "at least 0 and below 1"),
        ("run.seed=-1", "0 or above"),
        ("data.hard_negatives=1.5", "from 0 to 1"),
        ("objective.caption_dropout=2", "from 0 to 1"),
        ("objective.bpe_dropout=1", "below 1"),
        ("data.twin_shares=[0, 0, 0, 0, 0]", "five numbers"),
        ("data.twin_shares=[1, 1, 1, 1]", "five numbers"),
        ('data.twin_shares=["a", 1, 1, 1, 1]', "five numbers"),
        ("data.split=test", "one of train, heldout, all"),
        ("data.crop=left", "one of centre"),
        ("run.precision=fp8", "one of auto, bf16, no"),
        ("optimizer.decay=step", "one of cosine"),
    ],
)
def test_a_bad_override_is_refused_in_one_sentence(override: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as refusal:
        apply_overrides(recipe("dalle1"), [override])
    assert "\n" not in str(refusal.value)


def test_a_recipe_is_plain_data() -> None:
    shipped = recipe("clip")
    again = Recipe(**{field.name: getattr(shipped, field.name) for field in dataclasses.fields(shipped)})
    assert again == shipped and shipped.to_dict()["data"]["hard_negatives"] == 0.8
