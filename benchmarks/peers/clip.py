"""CLIP in PyTorch (2103.00020): ViT-B/32, and a causal text Transformer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import vit

VOCAB, CONTEXT, WIDTH, DEPTH, HEADS = 49_408, 77, 512, 12, 8  # of the text tower


class QuickGelu(nn.Module):
  def forward(self, x):
    return x * torch.sigmoid(1.702 * x)


class CLIP(nn.Module):
  inputs, clip_norm = ("image", "text"), None

  def __init__(self):
    super().__init__()
    stack = dict(activation=QuickGelu(), eps=1e-5)
    self.image = vit.ViT("B", 32, pre_norm=True, **stack)
    self.embed = nn.Embedding(VOCAB, WIDTH)
    self.position = nn.Parameter(0.01 * torch.randn(CONTEXT, WIDTH))
    self.text = vit.Transformer(WIDTH, DEPTH, HEADS, **stack)
    self.image_projection = nn.Linear(self.image.width, WIDTH, bias=False)
    self.text_projection = nn.Linear(WIDTH, WIDTH, bias=False)
    self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

  def forward(self, image, text):
    with torch.no_grad():
      self.logit_scale.clamp_(max=math.log(100))
    image = F.normalize(self.image_projection(self.image(vit.pixels(image))))
    x = self.text(self.embed(text) + self.position, causal=True)             # b l d
    x = x[torch.arange(len(x), device=x.device), text.argmax(1)]
    text = F.normalize(self.text_projection(x))
    logits = self.logit_scale.exp() * image @ text.T
    label = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
