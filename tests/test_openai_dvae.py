"""OpenAI's dVAE read into DVAE: names, values through both containers, formulas, refusals, full size."""

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai_modules
import pytest
import torch
from openai_modules import CODES, CONFIG, Decoder, Encoder, randomised, registered
from tiny_recipes import tiny_recipe
from torch import Tensor, nn

from genpipe.dalle1.dvae import DVAE
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part
from genpipe.published import openai_dvae, registry
from genpipe.published.fitting import assign, on_meta
from genpipe.training.stages import DALLE1Stage
from pipelines.family import describe_family
from pipelines.importing import import_family

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # of the classes made here
MANIFEST = json.loads(gzip.decompress((Path(__file__).parent / "manifests/openai_dvae.json.gz").read_bytes()))


def write(folder: Path, encoder: nn.Module, decoder: nn.Module, legacy: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    with registered():
        for name, module in (("encoder.pkl", encoder), ("decoder.pkl", decoder)):
            torch.save(module, folder / name, _use_new_zipfile_serialization=not legacy)
    return folder


@pytest.fixture
def modules() -> tuple[nn.Module, nn.Module]:
    return randomised(Encoder(), 0), randomised(Decoder(), 1)


def pictures() -> Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2))


def test_names_and_shapes_of_the_published_files() -> None:
    halves = [
        {name: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for name, (shape, kind) in half.items()}
        for half in (MANIFEST["encoder"], MANIFEST["decoder"])
    ]
    assert [len(half) for half in halves] == [74, 76]
    model = on_meta(lambda: DVAE(**openai_dvae.CONFIG))
    assign(model, openai_dvae.mapped(*halves), "the manifest")  # lists whatever is missing, unexpected or mis-shaped
    published = sum(tensor.numel() for half in halves for tensor in half.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == published + 1  # log_scale, of no use here
    assert (model.grid_size, model.num_codes) == (32, 8192)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_values_bit_for_bit_both_ways(tmp_path: Path, modules: tuple[nn.Module, nn.Module], legacy: bool) -> None:
    model = openai_dvae.load(write(tmp_path, *modules, legacy), CONFIG)
    assert "dall_e" not in sys.modules
    ours = model.state_dict()
    for half, module in zip(("encoder", "decoder"), modules, strict=True):
        for name, tensor in module.state_dict().items():
            found = ours.pop(openai_dvae._renamed(name, half))
            assert torch.equal(
                found.T[:, :, None, None] if name == "blocks.input.w" and half == "decoder" else found, tensor
            )
    assert list(ours) == ["log_scale"] and not model.training


def test_codes_and_pictures_of_the_published_formulas(tmp_path: Path, modules: tuple[nn.Module, nn.Module]) -> None:
    """Bit for bit: the same convolutions in the same order; the one-hot convolution is a look-up."""
    encoder, decoder = (module.state_dict() for module in modules)
    model = openai_dvae.load(write(tmp_path, *modules), CONFIG)
    with torch.no_grad():
        logits = openai_modules.encode(encoder, pictures())
        assert torch.equal(model.encode_logits(pictures()), logits)
        assert torch.equal(model.encode(pictures()), logits.argmax(dim=1).flatten(1))
        assert logits.flatten(2).std(dim=2).mean() > 0.1 * logits.std()  # they do depend on the picture
        square = torch.randint(0, CODES, (3, 2, 2), generator=torch.Generator().manual_seed(3))
        expected = openai_modules.decode(decoder, square)
        assert torch.equal(model.decode(square.flatten(1)), expected)
    assert expected.std() > 0.05 and ((expected > 0) & (expected < 1)).float().mean() > 0.5


def test_half_precision_and_saving(tmp_path: Path, modules: tuple[nn.Module, nn.Module]) -> None:
    folder = write(tmp_path / "files", *modules)
    half = openai_dvae.load(folder, CONFIG, torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    model = openai_dvae.load(folder, CONFIG)
    save_part(model, tmp_path / "dvae")
    again = load_part(DVAE, tmp_path / "dvae")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again.encode(pictures()), model.encode(pictures()))


def test_the_files_are_a_family_of_one_part(tmp_path: Path) -> None:
    with registered(), torch.serialization.skip_data():  # full size: the numbers are a hole in the file
        torch.save(Encoder((256, 512, 1024, 2048), 8192), tmp_path / "encoder.pkl")
    assert openai_dvae.recognises(tmp_path) and openai_dvae.missing(tmp_path) == ["decoder.pkl"]
    with registered(), torch.serialization.skip_data():
        torch.save(Decoder((256, 512, 1024, 2048), 8192, 128), tmp_path / "decoder.pkl")
    assert registry.find(tmp_path / "decoder.pkl") is registry.find(tmp_path) is openai_dvae
    sizes = [(tmp_path / name).stat() for name in openai_dvae.FILES]
    for size, published in zip(sizes, (215_144_960, 175_319_064), strict=True):
        assert published <= size.st_size < 1.01 * published and 512 * size.st_blocks < 5_000_000
    published = openai_dvae.read(tmp_path)
    assert list(published.parts) == ["dvae"] and published.licence.url.startswith("https://")
    model = published.parts["dvae"]()
    assert sum(parameter.numel() for parameter in model.parameters()) == 97_616_007


def test_once_imported_a_transformer_trains_on_its_codes(
    tmp_path: Path, modules: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_dvae, "CONFIG", CONFIG)  # of these small files
    done = import_family(str(write(tmp_path / "files", *modules)), tmp_path / "mine")
    assert done["parts"] == ["dvae"] and describe_family(tmp_path / "mine").pipelines == []
    stage = DALLE1Stage(tiny_recipe("dalle1", tmp_path / "mine" / "dvae"), None)
    batch = stage.collate(np.zeros((2, 3, 16, 16), dtype=np.uint8), ["a cat", "a hat"], np.random.default_rng(0))
    loss, _ = stage.loss(stage.model, batch, 0, torch.Generator())
    loss.backward()
    assert stage.model.config.num_image_tokens == CODES and stage.model.config.grid_size == 2
    assert stage.model.image_head.weight.grad.abs().sum() > 0


def test_other_folders_are_not_taken(tmp_path: Path) -> None:
    assert not openai_dvae.recognises(tmp_path) and not openai_dvae.recognises(tmp_path / "encoder.pkl")
    (tmp_path / "encoder.pkl").touch()
    (tmp_path / "other.pkl").touch()
    assert openai_dvae.recognises(tmp_path) and not openai_dvae.recognises(tmp_path / "other.pkl")


class Command:
    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.line,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_foreign_global_is_named_and_not_run(
    tmp_path: Path, modules: tuple[nn.Module, nn.Module], legacy: bool
) -> None:
    modules[1].hook = Command(f"touch {tmp_path}/ran")
    folder = write(tmp_path / "files", *modules, legacy)
    with pytest.raises(InputError, match=r"decoder\.pkl.*(posix|nt)\.system"):
        openai_dvae.load(folder, CONFIG)
    assert not (tmp_path / "ran").exists()


def without(name: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        stem, _, last = name.rpartition(".")
        delattr(module.get_submodule(stem), last)

    return change


def with_another(module: nn.Module) -> None:
    module.blocks.input.more = nn.Parameter(torch.zeros(1))


def transposed(module: nn.Module) -> None:
    last = module.blocks.output.conv
    last.w = nn.Parameter(last.w.detach().transpose(0, 1).clone())


@pytest.mark.parametrize(
    ("half", "change", "words"),
    [
        (0, without("blocks.group_3.block_2.res_path.conv_2.b"), r"missing encoder\.5\.1\.convs\.1\.bias"),
        (1, without("blocks.input.w"), "missing codebook"),
        (0, with_another, r"unexpected encoder blocks\.input\.more"),
        (0, transposed, r"mis-shaped to_codes\.weight \[20, 24, 1, 1\] instead of \[24, 20, 1, 1\]"),
        (1, transposed, r"mis-shaped decoder\.8\.weight \[8, 6, 1, 1\]"),
    ],
    ids=["missing", "no table", "extra", "transposed", "transposed in the decoder"],
)
def test_tensors_that_do_not_fit_are_listed(
    tmp_path: Path, modules: tuple[nn.Module, nn.Module], half: int, change: Callable[[nn.Module], None], words: str
) -> None:
    change(modules[half])
    with pytest.raises(InputError, match=words):
        openai_dvae.load(write(tmp_path, *modules), CONFIG)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_files(tmp_path: Path, modules: tuple[nn.Module, nn.Module], legacy: bool) -> None:
    path = write(tmp_path, *modules, legacy) / "encoder.pkl"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"encoder\.pkl"):
        openai_dvae.load(tmp_path, CONFIG)
