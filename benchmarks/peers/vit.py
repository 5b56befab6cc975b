"""ViT in PyTorch (2010.11929), and the block that all peers are made of."""

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class Attention(nn.Module):
  """Self-attention by one fused projection and PyTorch's own kernel: [b, n, d] -> [b, n, d]."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

  def forward(self, x, causal: bool = False):
    b, n, d = x.shape
    query, key, value = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # b k n h
    x = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return self.out(x.transpose(1, 2).reshape(b, n, d))


def mlp(width: int, activation: nn.Module):
  return nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))


class Block(nn.Module):
  def __init__(self, width: int, heads: int, activation: nn.Module, eps: float):
    super().__init__()
    self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
    self.attention, self.mlp = Attention(width, heads), mlp(width, activation)

  def forward(self, x, causal: bool = False):
    x = x + self.attention(self.attention_norm(x), causal)
    return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
  """Blocks and a norm after them."""

  def __init__(self, width: int, depth: int, heads: int, activation=None, eps: float = 1e-6):
    super().__init__()
    self.blocks = nn.ModuleList(
      Block(width, heads, activation or nn.GELU(), eps) for _ in range(depth))
    self.norm = nn.LayerNorm(width, eps)

  def forward(self, x, causal: bool = False):
    for block in self.blocks:
      x = block(x, causal)
    return self.norm(x)


class ViT(nn.Module):
  """Normalised images [b, c, 224, 224] -> the class token [b, d]."""

  def __init__(self, size: str, patch: int, fixed: bool = False, pre_norm: bool = False, **stack):
    super().__init__()
    self.width, depth, heads = SIZES[size]
    self.embed = nn.Conv2d(3, self.width, patch, patch, bias=not pre_norm)
    self.cls = nn.Parameter(0.02 * torch.randn(1, 1, self.width))
    patches = (224 // patch)**2
    if fixed:  # what it holds costs nothing: noise stands for sines
      self.register_buffer("position", 0.02 * torch.randn(1, patches, self.width))
    else:
      self.position = nn.Parameter(0.02 * torch.randn(1, 1 + patches, self.width))
    self.norm = nn.LayerNorm(self.width, stack["eps"]) if pre_norm else nn.Identity()
    self.fixed, self.transformer = fixed, Transformer(self.width, depth, heads, **stack)

  def tokens(self, image):
    x = self.embed(image).flatten(2).transpose(1, 2)                         # b n d
    cls = self.cls.expand(len(x), -1, -1)
    if self.fixed:
      return torch.cat([cls, x + self.position], 1)                          # b 1+n d
    return torch.cat([cls, x], 1) + self.position

  def forward(self, image):
    return self.transformer(self.norm(self.tokens(image)))[:, 0]


def pixels(image):
  """Bytes [b, c, h, w] to [-1, 1], in the step as on our side."""
  return image.float().div(127.5).sub(1)


class Classifier(nn.Module):
  """The supervised loss: softmax over 1000 classes."""

  inputs, clip_norm = ("image", "label"), 1.0

  def __init__(self, size: str):
    super().__init__()
    self.backbone = ViT(size, 16)
    self.head = nn.Linear(self.backbone.width, 1000)

  def forward(self, image, label):
    return F.cross_entropy(self.head(self.backbone(pixels(image))), label)
