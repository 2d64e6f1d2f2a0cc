"""minDALL-E read into VQGAN and MinDALLETransformer: names, values, formulas, full size, drawing, training."""

import copy
import gzip
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mindalle_files import PROMPTS, SHORT, stages, write, write_tokenizer
from mindalle_reference import Stage1, Stage2
from tiny_recipes import tiny_recipe
from torch import Tensor

from genpipe.dalle1.mindalle import MinDALLETransformer
from genpipe.dalle1.sampling import generate_tokens
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.dalle1.vqgan import VQGAN
from genpipe.errors import InputError
from genpipe.images import to_pil
from genpipe.parts import load_one_of, load_part, save_part
from genpipe.published import mindalle, taming
from genpipe.published.fitting import assign, on_meta
from genpipe.training.stages import DALLE1Stage
from pipelines.family import load_family

Parts = tuple[VQGAN, MinDALLETransformer]

MANIFEST = json.loads(gzip.decompress((Path(__file__).parent / "manifests/mindalle.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("published") / "1.3B")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    published = mindalle.read(folder)
    return published.parts["dvae"](), published.parts["transformer"]()


def meta(component: str) -> dict[str, Tensor]:
    entries = MANIFEST[component].items()
    return {name: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for name, (shape, kind) in entries}


def test_names_and_shapes_of_the_published_files() -> None:
    first, second = meta("stage1"), meta("stage2")
    assert (len(first), len(second)) == (343, 680)
    vqgan, transformer = on_meta(VQGAN), on_meta(MinDALLETransformer)
    assign(vqgan, taming.vqgan_tensors(first, 5), "the manifest")  # lists what is missing, unexpected or mis-shaped
    assign(transformer, mindalle.transformer_tensors(second), "the manifest")
    assert sum(parameter.numel() for parameter in vqgan.parameters()) == 76_073_859
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_291_081_728
    assert (vqgan.num_codes, vqgan.grid_size) == (16384, 16)
    assert (transformer.prefix_length, transformer.image_length) == (64, 256)


def test_the_plain_modules_of_these_tests_have_the_published_names() -> None:
    short = copy.deepcopy(mindalle.DEFAULTS["stage2"])
    short["hparams"]["n_layers"] = 2
    with torch.device("meta"):
        plain = Stage1(mindalle.DEFAULTS["stage1"]), Stage2(short)
    for stage, component in zip(plain, ("stage1", "stage2"), strict=True):
        shapes = {name: list(tensor.shape) for name, tensor in stage.state_dict().items()}
        published = {name: shape for name, (shape, _) in MANIFEST[component].items()}
        assert shapes == {
            name: shape for name, shape in published.items() if not re.match(r"blocks\.\d*[2-9]|blocks\.\d\d", name)
        }


def test_values_bit_for_bit_both_ways(parts: Parts) -> None:
    ours = parts[0].state_dict()
    for name, tensor in stages()[0].state_dict().items():
        found = ours.pop(taming.vqgan_name(name, 3))
        assert torch.equal(found.view(tensor.shape), tensor), name
    assert not ours
    ours = parts[1].state_dict()
    for name, tensor in stages()[1].state_dict().items():
        assert torch.equal(ours.pop(mindalle.transformer_name(name)), tensor), name
    assert not ours


@torch.no_grad()
def test_the_vqgan_computes_the_published_formulas(parts: Parts) -> None:
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    codes = stages()[0].encode(pixels)
    assert torch.equal(parts[0].encode(pixels), codes.flatten(1)) and len(codes.unique()) > 3
    square = torch.randint(0, 40, (3, 4, 4), generator=torch.Generator().manual_seed(3))
    expected = stages()[0].decode(square)
    decoded = parts[0].decode(square.flatten(1))
    assert (decoded - expected).abs().max() < 1e-5 and expected.std() > 0.1
    assert parts[0].codebook.shape == (40, 6) and parts[0].factor == 4 and not parts[0].training


def test_sizes_that_the_vqgan_cannot_take(parts: Parts) -> None:
    with pytest.raises(InputError, match="divisible by 4"):
        parts[0].encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(InputError, match="square"):
        parts[0].decode(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(InputError, match="factor 4"):
        VQGAN(resolution=18, widths=(32, 32, 32))
    with pytest.raises(InputError, match="norm_groups 32"):
        VQGAN(resolution=16, widths=(32, 48))


@torch.no_grad()
def test_the_transformer_computes_the_published_formulas(parts: Parts) -> None:
    text = parts[1].tokenizer(SHORT, 10)
    images = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(4))
    expected = stages()[1](text.ids, images)
    found = parts[1](text.ids, text.mask, images)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-4 < theirs.std()
    again = parts[1](text.ids, torch.ones_like(text.mask), images)
    assert torch.equal(again[1], found[1])  # padding is read as words


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 5])
def test_step_by_step_equals_the_full_pass(parts: Parts, given: int) -> None:
    model = parts[1]
    text = model.tokenizer(SHORT, 10)
    images = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(5))
    _, expected = model(text.ids, text.mask, images)
    cache, logits = model.prefill(text.ids, text.mask, images[:, :given] if given else None)
    cache = cache.rows(torch.arange(3), model.sequence_length)
    steps = [logits, *(model.decode_next(images[:, t], cache) for t in range(given, 15))]
    assert (torch.stack(steps, dim=1) - expected[:, given:]).abs().max() < 1e-5 < expected.std()


def test_greedy_drawing_follows_the_published_formulas(parts: Parts) -> None:
    text = parts[1].tokenizer(PROMPTS[:1], 10)
    drawn = generate_tokens(parts[1], text.ids, text.mask, [[0]], temperature=0)[0]
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        for t in range(16):
            tokens[:, t] = stages()[1](text.ids, tokens)[1][:, t].argmax(dim=-1)
    assert torch.equal(drawn, tokens)


def test_saved_parts_load_again(tmp_path: Path, parts: Parts) -> None:
    for part, name in zip(parts, ("dvae", "transformer"), strict=True):
        save_part(part, tmp_path / name)
        again = load_one_of((MinDALLETransformer, VQGAN), tmp_path / name)
        assert type(again) is type(part)
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in part.state_dict().items())
    assert torch.equal(again.tokenizer(SHORT, 10).ids, parts[1].tokenizer(SHORT, 10).ids)
    (tmp_path / "transformer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_part(MinDALLETransformer, tmp_path / "transformer")


def memory(name: str) -> int:
    """VmRSS, what this process has in memory now, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_full_size_is_mapped_from_its_file(tmp_path: Path) -> None:
    (tmp_path / mindalle.CONFIG).touch()
    (tmp_path / mindalle.STAGE_1).touch()
    with torch.serialization.skip_data():  # the numbers are a hole in the file
        tensors = {name: torch.empty(shape) for name, (shape, _) in MANIFEST["stage2"].items()}
        torch.save({"state_dict": tensors}, tmp_path / mindalle.STAGE_2)
    del tensors
    size = (tmp_path / mindalle.STAGE_2).stat()
    assert 5_164_326_912 <= size.st_size < 5.2e9 and 512 * size.st_blocks < 20e6
    write_tokenizer(tmp_path / "tokenizer", ["[UNK]", *(f"t{number}" for number in range(16382)), "[PAD]"], [])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    model = mindalle.read(tmp_path).parts["transformer"]()
    assert memory("VmHWM") - before < 0.3e9  # nothing is read before it is used
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_291_081_728
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert float(model.image_head.weight.detach().sum()) == 0 and memory("VmHWM") - before < 0.5e9  # a matrix of 100 MB


def test_the_pipeline_draws_with_them(folder: Path, parts: Parts) -> None:
    family = load_family(folder)
    with pytest.warns(UserWarning, match="[Nn]ot ranked"):
        output = family.dalle1("a red car", num_candidates=3, keep=2, seed=7)
    assert [picture.size for picture in output.images[0]] == [(16, 16)] * 2 and output.seeds[0] == [7, 8]
    assert family.dalle1.resolve_sampling().top_k == 256
    text = parts[1].tokenizer(["a red car"], 10)
    tokens = generate_tokens(parts[1], text.ids, text.mask, [[7, 8]], top_k=256)[0]
    expected = to_pil(torch.cat([parts[0].decode(row[None]) for row in tokens]))
    assert [picture.tobytes() for picture in output.images[0]] == [picture.tobytes() for picture in expected]


def test_they_train_further(tmp_path: Path, parts: Parts) -> None:
    """A new transformer over the VQGAN's codes; the published one on its own."""
    for part, name in zip(parts, ("dvae", "transformer"), strict=True):
        save_part(part, tmp_path / name)
    recipe = tiny_recipe("dalle1", tmp_path / "dvae")
    tuned = replace(recipe, init=str(tmp_path / "transformer"), objective={**recipe.objective, "bpe_dropout": 0.0})
    for settings, cls in ((recipe, DALLE1Transformer), (tuned, MinDALLETransformer)):
        stage = DALLE1Stage(settings, None)
        assert type(stage.model) is cls and stage.model.config.num_image_tokens == 40
        pictures = np.random.default_rng(0).integers(0, 256, size=(2, 3, 16, 16), dtype=np.uint8)
        batch = stage.collate(pictures, ["a red car", "a cat"], np.random.default_rng(0))
        loss, _ = stage.loss(stage.model, batch, 0, torch.Generator())
        loss.backward()
        assert torch.isfinite(loss) and stage.model.image_head.weight.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in stage.dvae.parameters())
