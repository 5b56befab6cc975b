"""DiT in PyTorch (2212.09748): latents 32 x 32 x 4, noise predicted, variance learned."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import vit

STEPS, CLASSES, FEATURES, SCALE, DROPOUT = 1000, 1000, 256, 0.18215, 0.1


def modulate(x, shift, scale):
  """LayerNorm of [b, n, d] with the example's own shift and scale [b, d]."""
  return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
  def __init__(self, width: int, heads: int):
    super().__init__()
    self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
    self.attention = vit.Attention(width, heads)
    self.mlp = vit.mlp(width, nn.GELU(approximate="tanh"))

  def forward(self, x, c):
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, 1)
    x = x + gate_1[:, None] * self.attention(modulate(x, shift_1, scale_1))
    return x + gate_2[:, None] * self.mlp(modulate(x, shift_2, scale_2))


class DiT(nn.Module):
  """The loss of latents: the error of the noise, and the bound that trains the variance."""

  inputs, clip_norm, ema_decay = ("latent", "label"), None, 0.9999

  def __init__(self, size: str, patch: int):
    super().__init__()
    width, depth, heads = vit.SIZES[size]
    self.patch, self.embed = patch, nn.Conv2d(4, width, patch, patch)
    self.time = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))
    self.label = nn.Embedding(CLASSES + 1, width)
    self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
    self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
    self.projection = nn.Linear(width, patch**2 * 8)
    self.register_buffer("position", 0.02 * torch.randn(1, (32 // patch)**2, width))
    half = FEATURES // 2
    self.register_buffer("frequencies", (-math.log(10_000) / half * torch.arange(half)).exp())
    beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    small = beta * (1 - before) / (1 - bar)  # of the posterior
    small[0] = small[1]
    table = [bar.sqrt(), (1 - bar).sqrt(), before.sqrt() * beta / (1 - bar), small.log(),
             beta.log()]
    self.register_buffer("table", torch.stack(table).float())                # 5 steps

  def network(self, x, t, label):
    """[b, 4, 32, 32], [b], [b] -> [b, 8, 32, 32]."""
    angles = t[:, None] * self.frequencies
    c = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
    x = self.embed(x).flatten(2).transpose(1, 2) + self.position             # b n d
    for block in self.blocks:
      x = block(x, c)
    x = self.projection(modulate(x, *self.modulation(c).chunk(2, 1)))        # b n p*p*8
    side, p = 32 // self.patch, self.patch
    return x.view(-1, side, side, p, p, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 32, 32)

  def forward(self, latent, label):
    """2102.09672 eq. 16; at t = 0 too the bound is that between normals, less work than ours."""
    x0, b, device = latent * SCALE, len(latent), latent.device
    t, eps = torch.randint(STEPS, (b,), device=device), torch.randn_like(x0)
    alpha, sigma, of_x0, log_small, log_large = self.table[:, t, None, None, None]
    x_t = alpha * x0 + sigma * eps
    label = torch.where(torch.rand(b, device=device) < DROPOUT, CLASSES, label)
    output, share = self.network(x_t, t, label).float().chunk(2, 1)
    share = (share + 1) / 2
    log_variance = share * log_large + (1 - share) * log_small
    gap = of_x0 * (x0 - (x_t - sigma * output.detach()) / alpha)
    bound = 0.5 * (log_variance - log_small - 1
                   + (log_small.exp() + gap.square()) * (-log_variance).exp())
    return F.mse_loss(output, eps) + bound.mean() / math.log(2)
