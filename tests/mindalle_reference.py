"""minDALL-E's two stages from their published descriptions, written plainly and with the published names.

For the tests: their state dicts are what the published files hold, and what they compute is compared with ours.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linears = dict[str, nn.Module]


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # B, C, cells
        weights = torch.softmax(q.mT @ k / math.sqrt(x.shape[1]), dim=-1)  # of query cell (rows) on key cell
        return x + self.proj_out((v @ weights.mT).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one column right, one row below


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Level(nn.Module):
    def __init__(self, n_in: int, n_out: int, blocks: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(n_out) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, o: Any) -> None:
        super().__init__()
        widths = [o["ch"] * factor for factor in o["ch_mult"]]
        self.conv_in = nn.Conv2d(3, o["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = o["resolution"] // 2**i in o["attn_resolutions"]
            level = Level(widths[i - 1] if i else o["ch"], width, o["num_res_blocks"], attends)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], o["z_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, o: Any) -> None:
        super().__init__()
        widths = [o["ch"] * factor for factor in o["ch_mult"]]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(o["z_channels"], widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels = []
        for i, width in enumerate(widths):
            attends = o["resolution"] // 2**i in o["attn_resolutions"]
            level = Level(widths[min(i + 1, last)], width, o["num_res_blocks"] + 1, attends)
            if i:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(swish(self.norm_out(x)))


class Codes(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class Stage1(nn.Module):
    """VQGAN. Takes the section stage1 of a config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        o, width = config["hparams"], config["embed_dim"]
        self.encoder, self.decoder = Encoder(o), Decoder(o)
        self.quantize = Codes(config["n_embed"], width)
        self.quant_conv = nn.Conv2d(o["z_channels"], width, 1)
        self.post_quant_conv = nn.Conv2d(width, o["z_channels"], 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] -> codes (B, h, w): the nearest vector of each cell, every distance looked at."""
        z = self.quant_conv(self.encoder(2 * pixels - 1)).permute(0, 2, 3, 1)[..., None, :]
        return (z - self.quantize.embedding.weight).square().sum(dim=-1).argmin(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        z = self.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
        return (self.decoder(self.post_quant_conv(z)) * 0.5 + 0.5).clamp(0, 1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        h = self.mlp[0](self.ln2(x))
        return x + self.mlp[2](h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))  # the exact GELU


class Stage2(nn.Module):
    """Transformer. Takes the section stage2 of a config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        o = config["hparams"]
        width = o["embed_dim"]
        self.tok_emb_img = nn.Embedding(config["vocab_size_img"], width)
        self.tok_emb_txt = nn.Embedding(config["vocab_size_txt"], width)
        self.pos_emb_img = nn.Embedding(o["ctx_len_img"], width)
        self.pos_emb_txt = nn.Embedding(o["ctx_len_txt"], width)
        self.blocks = nn.ModuleList(Layer(width, o["n_heads"]) for _ in range(o["n_layers"]))
        self.ln_f = nn.LayerNorm(width)
        self.head_img = nn.Linear(width, config["vocab_size_img"], bias=False)
        self.head_txt = nn.Linear(width, config["vocab_size_txt"], bias=False)

    def forward(self, texts: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, L), image tokens (B, N) -> text logits (B, L - 1, V_text), image logits (B, N, V)."""
        text = self.tok_emb_txt(texts) + self.pos_emb_txt.weight
        image = self.tok_emb_img(images) + self.pos_emb_img.weight
        x = torch.cat([text, image], dim=1)
        for block in self.blocks:
            x = block(x)
        x, length = self.ln_f(x), texts.shape[1]
        return self.head_txt(x[:, : length - 1]), self.head_img(x[:, length - 1 : -1])


def randomised(module: Any, seed: int) -> Any:
    """Weights so large that everything counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            size = 0.3 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            parameter.copy_((parameter.ndim == 1) + size * torch.randn(parameter.shape, generator=generator))
    return module.eval()
