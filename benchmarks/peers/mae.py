"""MAE in PyTorch (2111.06377): 75% of patches removed, targets standardised."""

import torch
from torch import nn

from benchmarks.peers import vit

PATCH, WIDTH, DEPTH, HEADS = 16, 512, 8, 16  # WIDTH and on: the decoder's


class MAE(nn.Module):
  inputs, clip_norm = ("image",), None

  def __init__(self, size: str):
    super().__init__()
    self.encoder = vit.ViT(size, PATCH, fixed=True)
    self.embed = nn.Linear(self.encoder.width, WIDTH)
    self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
    self.register_buffer("position", 0.02 * torch.randn(1, 1 + (224 // PATCH)**2, WIDTH))
    self.decoder = vit.Transformer(WIDTH, DEPTH, HEADS)
    self.prediction = nn.Linear(WIDTH, PATCH**2 * 3)

  def forward(self, image):
    image = vit.pixels(image)
    tokens = self.encoder.tokens(image)
    cls, x = tokens[:, :1], tokens[:, 1:]
    b, n, d = x.shape
    shuffle = torch.rand(b, n, device=x.device).argsort(1)
    restore, kept = shuffle.argsort(1), n // 4
    x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, d))               # b m d
    x = self.embed(self.encoder.transformer(torch.cat([cls, x], 1)))
    filler = self.mask_token.expand(b, n - kept, -1)
    cls, x = x[:, :1], torch.cat([x[:, 1:], filler], 1)                      # b n d, shuffled
    x = x.gather(1, restore[:, :, None].expand(-1, -1, WIDTH))               # b n d, image order
    x = self.decoder(torch.cat([cls, x], 1) + self.position)
    pred = self.prediction(x[:, 1:])                                         # b n p*p*c
    side = 224 // PATCH
    target = image.view(b, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(b, n, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).square().mean(-1)                                # b n
    mask = (restore >= kept).float()  # 1 = removed
    return (error * mask).sum() / mask.sum()
