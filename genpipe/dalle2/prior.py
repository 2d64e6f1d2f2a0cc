"""The diffusion prior of DALL-E 2 (2204.06125, 2.2): from a caption to the CLIP embedding of a picture of it.

Legend: B captions, G noised embeddings of each, D CLIP width, W width of CLIP's text states, L text positions,
P = L + 1 positions before the time step, C transformer width, H heads, d their width, n candidates, m draws of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, PriorTransformer, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from genpipe.dalle2.sampling import PRIOR, Step, denoise, make_scheduler, noise_of
from genpipe.errors import InputError

EMBEDDING_SCALES = ("unit", "raw")
# 17.2 / sqrt(1024): the paper's factor brings coordinates of unit vectors of width 1,024 to this standard deviation.
PAPER_STD = 0.5375
_HIDDEN = -10000.0  # added to the attention's logits where it must not look, as diffusers does

TextCondition = tuple[Tensor, Tensor, Tensor]  # text embedding (B, D), text states (B, L, W), text mask (B, L)


@dataclass(frozen=True)
class PriorCondition:
    """The transformer's view of the captions, constant over time steps and draws: see `Prior.condition`.

    keys, values: of each layer, for the text's positions and the text embedding's, (B, H, P, d); visible (B, P): which
    of them count, True or False.
    """

    keys: list[Tensor]
    values: list[Tensor]
    visible: Tensor


class Prior(ModelMixin, ConfigMixin):
    """A noised image embedding and a caption in, the clean image embedding out.

    One causal transformer (diffusers' PriorTransformer holds its weights) reads, in this order: the text states, the
    text embedding, the time step, the noised image embedding and a learned query, whose output is the answer (2.2).
    Because of the mask, the first P positions know neither time step nor noise: they are computed once for all of them.

    It works on standardised embeddings: CLIP's are scaled as `embedding_scale` says, then the buffers `mean` and `std`
    (D,) bring each coordinate to mean 0 and deviation 1. They are saved with the weights; until `set_statistics` they
    hold the paper's single scale for "unit", and 0 and 1 for "raw".

    Arguments (all stored in config.json):
        embedding_dim: D; text_width: W; text_length: L, of the CLIP whose embeddings the prior reads.
        num_layers, num_heads, head_dim: of the transformer, C = num_heads * head_dim. Karlo's: 20, 32, 64.
        dropout: in the transformer's blocks.
        text_projection: a linear layer of its own brings text states from W to D; without it W must be D.
        embedding_scale: "unit" brings every embedding to length sqrt(D), "raw" leaves them as CLIP gives them.
        beta_schedule, num_train_timesteps: diffusers' names; "squaredcos_cap_v2" is the cosine schedule.
        clip_identity: `genpipe.identity.weights_identity` of the CLIP it was trained beside; None: unknown.
        clamp: limit of the coordinates of the standardised x_0 at every step of a drawing; None: unlimited. Karlo's
            original sampler and Kandinsky take 10.
    Raises InputError for sizes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        embedding_dim: int,
        text_width: int,
        text_length: int,
        num_layers: int = 20,
        num_heads: int = 32,
        head_dim: int = 64,
        dropout: float = 0.0,
        text_projection: bool = False,
        embedding_scale: str = "unit",
        beta_schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
        clip_identity: str | None = None,
        clamp: float | None = 5.0,
    ) -> None:
        super().__init__()
        if clamp is not None and not clamp > 0:
            raise InputError(f"the clamp of a prior must be above 0, or None, not {clamp!r}.")
        if embedding_scale not in EMBEDDING_SCALES:
            raise InputError(f"embedding_scale must be one of {EMBEDDING_SCALES}, not {embedding_scale!r}.")
        if min(embedding_dim, text_width, text_length, num_layers, num_heads, head_dim) < 1 or num_heads * head_dim % 2:
            raise InputError("a prior needs widths, layers and heads above 0, and an even num_heads * head_dim.")
        if text_width != embedding_dim and not text_projection:
            raise InputError(
                f"text states of width {text_width} do not fit a prior of width {embedding_dim}; set text_projection."
            )
        self.text_to_width = nn.Linear(text_width, embedding_dim) if text_projection else None
        self.transformer = PriorTransformer(
            num_heads, head_dim, num_layers, embedding_dim, text_length, additional_embeddings=4, dropout=dropout
        )
        del self.transformer.clip_mean, self.transformer.clip_std  # they start at zero and get no gradient
        nn.init.normal_(self.transformer.positional_embedding, std=0.02)
        nn.init.normal_(self.transformer.prd_embedding, std=0.02)
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("std", torch.full((embedding_dim,), 1 / PAPER_STD if embedding_scale == "unit" else 1.0))

    @property
    def prediction_type(self) -> str:
        """What `denoise` answers, by diffusers' name: always the clean embedding."""
        return "sample"

    def scaled(self, embedding: Tensor) -> Tensor:
        """CLIP's embeddings (..., D) in float32, see `embedding_scale`."""
        if self.config.embedding_scale == "raw":
            return embedding.float()
        return F.normalize(embedding.float(), dim=-1) * self.config.embedding_dim**0.5

    def to_prior(self, embedding: Tensor) -> Tensor:
        """CLIP's image embeddings (..., D) -> standardised ones, the x_0 of the diffusion, float32."""
        return (self.scaled(embedding) - self.mean.float()) / self.std.float()

    @apply_forward_hook
    def from_prior(self, x_0: Tensor) -> Tensor:
        """Standardised embeddings (..., D) -> image embeddings in CLIP's directions; "unit": of length near sqrt(D)."""
        return x_0.float() * self.std.float() + self.mean.float()

    @torch.no_grad()
    def set_statistics(self, embeddings: Tensor) -> None:
        """Take `mean` and `std` from image embeddings (N, D) as CLIP gives them; they are saved with the weights.

        Raises InputError for fewer than two of them, another width, or numbers that are not finite.
        """
        width, shape = self.config.embedding_dim, tuple(embeddings.shape)
        if len(shape) != 2 or shape[0] < 2 or shape[1] != width or not embeddings.isfinite().all():
            raise InputError(f"statistics need two or more finite embeddings of width {width}, got a tensor {shape}.")
        scaled = self.scaled(embeddings).double()
        self.mean.copy_(scaled.mean(dim=0))
        self.std.copy_(scaled.std(dim=0).clamp(min=1e-3))  # a constant coordinate must not be divided by zero

    @apply_forward_hook
    def condition(self, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor) -> PriorCondition:
        """Captions -> what the later positions see of them.

        text_embedding (B, D) as CLIP gives it, text_states (B, L', W), text_mask (B, L') True for tokens; L' up to L.
        Positions that no caption uses are left out. Raises InputError for shapes that do not fit.
        """
        self._check_text(text_embedding, text_states, text_mask)
        network, mask = self.transformer, text_mask.bool()
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        longest = int((mask.any(dim=0) * places).max())
        states = text_states[:, :longest].to(self.dtype)
        if self.text_to_width is not None:
            states = self.text_to_width(states)
        text = network.encoder_hidden_states_proj(states)  # B, L', C
        pooled = network.embedding_proj(self.scaled(text_embedding).to(self.dtype))[:, None]  # B, 1, C
        position, length = network.positional_embedding, self.config.text_length
        position = torch.cat([position[:, :longest], position[:, length : length + 1]], dim=1)
        x = torch.cat([text, pooled], dim=1) + position  # B, P, C
        visible = F.pad(mask[:, :longest], (0, 1), value=True)  # B, P
        causal = torch.ones(longest + 1, longest + 1, dtype=torch.bool, device=mask.device).tril()
        bias = _bias(visible[:, None, None, :] & causal, x)  # B, 1, P, P
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for block in network.transformer_blocks:
            q, k, v = _queries_keys_values(block, x)
            keys.append(k)
            values.append(v)
            if len(keys) < len(network.transformer_blocks):  # nothing reads these positions' own answers
                x = _attend(block, x, q, k, v, bias)
        return PriorCondition(keys, values, visible)

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, condition: PriorCondition) -> Tensor:
        """Noised standardised embeddings -> the clean ones, as `x_t` is shaped.

        x_t: (B, D), or (B, G, D) for G embeddings of each caption, which do not see one another. t: (), (B,) or (B, G).
        A condition of one row serves all B.
        """
        network, length = self.transformer, self.config.text_length
        groups = x_t[:, None] if x_t.ndim == 2 else x_t
        rows, count = groups.shape[:2]
        t = (t[:, None] if t.ndim == 1 else t).to(groups.device).expand(rows, count)
        time = network.time_embedding(network.time_proj(t.flatten()).to(self.dtype)).unflatten(0, (rows, count))
        noised = network.proj_in(groups.to(self.dtype))  # B, G, C
        query = network.prd_embedding[:, 0].expand(rows, count, -1)
        tokens = torch.stack([time, noised, query], dim=2) + network.positional_embedding[:, None, length + 1 :]
        x = rearrange(tokens, "b g s c -> b (g s) c")  # s = 3: time, noised, query
        place = torch.arange(3 * count, device=x.device)
        own = (place[:, None] // 3 == place // 3) & (place[:, None] >= place)  # the same group, and not later
        before = condition.visible[:, None, None, :].expand(rows, 1, len(place), -1)
        bias = _bias(torch.cat([before, own.expand(rows, 1, -1, -1)], dim=-1), x)  # B, 1, 3 G, P + 3 G
        for block, keys, values in zip(network.transformer_blocks, condition.keys, condition.values, strict=True):
            q, k, v = _queries_keys_values(block, x)
            keys, values = (past.expand(rows, -1, -1, -1) for past in (keys, values))
            x = _attend(block, x, q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), bias)
        answer = network.proj_to_clip_embeddings(network.norm_out(x[:, 2::3]))  # B, G, D
        return answer[:, 0] if x_t.ndim == 2 else answer

    def forward(self, x_t: Tensor, t: Tensor, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """One training pass: see `condition` and `denoise`."""
        return self.denoise(x_t, t, self.condition(text_embedding, text_states, text_mask))

    def _check_text(self, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor) -> None:
        """Raise InputError for captions of another CLIP's shape."""
        c = self.config
        rows, length = len(text_embedding), text_mask.shape[-1]
        shapes = [tuple(tensor.shape) for tensor in (text_embedding, text_states, text_mask)]
        needed = [(rows, c.embedding_dim), (rows, length, c.text_width), (rows, length)]
        if shapes != needed or not 1 <= length <= c.text_length:
            wanted = f"(B, {c.embedding_dim}), (B, L, {c.text_width}), (B, L) with L up to {c.text_length}"
            raise InputError(f"the prior needs text embedding, states and mask of shapes {wanted}, got {shapes}.")


def _bias(visible: Tensor, like: Tensor) -> Tensor:
    """True / False -> what is added to the attention's logits, in the type of `like`."""
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, _HIDDEN)


def _queries_keys_values(block: Any, x: Tensor) -> list[Tensor]:
    """Of one block's attention for x (B, S, C), each (B, H, S, d)."""
    y, attention = block.norm1(x), block.attn1
    layers = (attention.to_q, attention.to_k, attention.to_v)
    return [rearrange(layer(y), "b s (h d) -> b h s d", h=attention.heads) for layer in layers]


def _attend(block: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The rest of one block over x (B, S, C): q looks at k and v, which may hold earlier positions as well.

    Together with `_queries_keys_values` the forward of diffusers' BasicTransformerBlock, which has no place for them.
    """
    seen = rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)), "b h s d -> b s (h d)")
    linear, dropout = block.attn1.to_out
    x = x + dropout(linear(seen))
    return x + block.ff(block.norm3(x))


@torch.no_grad()
def sample(
    prior: Prior,
    text_embedding: Tensor,
    text_states: Tensor,
    text_mask: Tensor,
    seeds: Sequence[Sequence[int]],
    null_text: TextCondition | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    draws: int = 2,
    scheduler: str | SchedulerMixin = "ddim",
    clamp: float | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Draw image embeddings (B, n, D) of captions, to be read by direction: see `Prior.from_prior`.

    Each candidate is drawn `draws` times, and the draw that points most nearly where the text embedding points is kept
    (2.2). Its noise comes from its own seed alone, so a candidate's result does not depend on its neighbours.

    Args:
        text_embedding (B, D), text_states (B, L, W), text_mask (B, L): of the captions, as CLIP gives them.
        seeds: n of each caption, B x n.
        null_text: the same three of the empty caption, or of what should be avoided, with 1 or B rows; needed for a
            guidance_scale other than 1, which is the conditional prediction alone.
        scheduler: a name of genpipe.dalle2.sampling or a diffusers scheduler; clamp: in place of the prior's own, None
            for that one. callback: gets each Step, x of shape (B n, draws, D).
    Raises InputError for bad arguments, FloatingPointError when the prior's output is not finite.
    """
    candidates = len(seeds[0]) if len(seeds) else 0
    if len(seeds) != len(text_embedding) or not candidates or any(len(row) != candidates for row in seeds):
        raise InputError(f"the prior needs seeds for each of {len(text_embedding)} captions, the same number for each.")
    if draws < 1:
        raise InputError(f"draws is {draws}; the prior needs at least 1.")
    if guidance_scale != 1 and null_text is None:
        raise InputError("guidance of the prior needs null_text, the encoding of the empty caption.")
    condition = prior.condition(text_embedding, text_states, text_mask)
    null = prior.condition(*null_text) if null_text is not None and guidance_scale != 1 else None

    def predictor(seen: PriorCondition) -> Callable[[Tensor, Tensor], Tensor]:
        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            groups = rearrange(x_t, "(b n) m d -> b (n m) d", n=candidates)
            return rearrange(prior.denoise(groups, t, seen), "b (n m) d -> (b n) m d", n=candidates).float()

        return predict

    c, flat = prior.config, [seed for row in seeds for seed in row]
    x_0 = denoise(
        predictor(condition),
        make_scheduler(
            scheduler,
            beta_schedule=c.beta_schedule,
            num_train_timesteps=c.num_train_timesteps,
            prediction_type=prior.prediction_type,
        ),
        noise_of(flat, (draws, c.embedding_dim), PRIOR).to(text_embedding.device),
        num_inference_steps,
        null_predict=predictor(null) if null is not None else None,
        guidance_scale=guidance_scale,
        clamp=c.clamp if clamp is None else clamp,
        seeds=flat,
        stream=PRIOR,
        callback=callback,
        stage="prior",
    )
    drawn = rearrange(prior.from_prior(x_0), "(b n) m d -> b n m d", n=candidates)
    return closest_draw(drawn, text_embedding)


def closest_draw(drawn: Tensor, text_embedding: Tensor) -> Tensor:
    """Of image embeddings (B, n, m, D) the one of each m with the largest cosine to its text's (B, D) -> (B, n, D)."""
    score = torch.einsum("bnmd,bd->bnm", F.normalize(drawn, dim=-1), F.normalize(text_embedding.to(drawn), dim=-1))
    best = score.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, drawn.shape[-1])
    return drawn.gather(2, best)[:, :, 0]
