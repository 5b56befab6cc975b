"""MoCo v3 in PyTorch (2104.02057) on a ViT: two views, both ways, and a momentum encoder."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import vit

DIM, TEMPERATURE, MOMENTUM = 256, 0.2, 0.99


def head(*sizes):
  """Dense layers without bias, each with batch norm, the last without scale and bias."""
  layers = []
  for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
    last = i == len(sizes) - 2
    layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=not last)]
    layers += [] if last else [nn.ReLU(inplace=True)]
  return nn.Sequential(*layers)


class MoCo(nn.Module):
  inputs, clip_norm = ("image", "image_2"), None

  def __init__(self, size: str):
    super().__init__()
    backbone = vit.ViT(size, 16, fixed=True)
    backbone.embed.requires_grad_(False)  # the patch projection stays random (sec. 4.1)
    self.encoder = nn.Sequential(backbone, head(backbone.width, 4096, 4096, DIM))
    self.predictor = head(DIM, 4096, DIM)
    self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

  def forward(self, image, image_2):
    views = vit.pixels(image), vit.pixels(image_2)
    with torch.no_grad():
      torch._foreach_lerp_(list(self.momentum_encoder.parameters()),
                           list(self.encoder.parameters()), 1 - MOMENTUM)
      keys = [F.normalize(self.momentum_encoder(view)) for view in views]
    queries = [F.normalize(self.predictor(self.encoder(view))) for view in views]
    label = torch.arange(len(image), device=image.device)
    return 2 * TEMPERATURE * sum(F.cross_entropy(query @ key.T / TEMPERATURE, label)
                                 for query, key in zip(queries, reversed(keys)))
