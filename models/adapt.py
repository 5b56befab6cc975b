"""A trained network for another run: what it was made with, parameters that fit other images."""

import dataclasses

import numpy as np
from einops import rearrange

from models import backbones, positions, text, vit


def fields(network) -> dict:
  """What `make` of the network's module needs to build one like it for other images and classes.

  Fixed positions become learned ones, as they are for fine-tuning (2111.06377 appendix A.1).
  """
  kind = next((kind for kind, cls in zip(backbones.BACKBONES, backbones.NETWORKS, strict=True)
               if type(network) is cls), None)
  if kind is None:
    raise ValueError(f"a model {type(network).__name__.lower()} has no image network to start from")
  own = backbones.fields_of(kind)
  values = {f.name: getattr(network, f.name) for f in dataclasses.fields(network)
            if f.name in own and getattr(network, f.name) != f.default}
  if values.get("positions") in positions.FIXED:
    del values["positions"]
  return {"name": kind, **values}


def text_fields(network) -> dict:
  """What a text network was made with, defaults too: its parameters mean nothing else.

  Left out is what another run may choose: the features that it takes, and how it is computed.
  """
  chosen = ("pool", "attention", "scan", "remat")
  return {name: getattr(network, name) for name in text.fields_of(type(network), prefix="")
          if name not in chosen}


def adapt(params: dict, there, here) -> tuple[dict, dict[str, str]]:
  """Parameters {path: array} of the network `there` for `here`, and {path: what was done to it}.

  Whatever needs nothing done, or would not help, is returned as it was.
  """
  params, notes = dict(params), {}

  def change(path, array, note):
    params[path] = array
    notes[path] = note

  kernel = "embed/projection/kernel" if isinstance(there, vit.ViT) else "stem/kernel"
  if getattr(there, "patch_stem", "patches") != "patches":
    kernel = None  # what is embedded are features
  if kernel in params and there.channels != here.channels:
    old = np.asarray(params[kernel])  # a patch's is flat: [p * p * c, d]
    new = channels(old.reshape(-1, there.channels, old.shape[-1]), here.channels)
    shape = (-1,) if old.ndim == 2 else (*old.shape[:2], here.channels)
    change(kernel, new.reshape(*shape, old.shape[-1]),
           f"from {there.channels} to {here.channels} channels")
  if not (isinstance(there, vit.ViT) and isinstance(here, vit.ViT)):
    return params, notes

  biases = "transformer/relative_bias"
  if biases in params and there.grid != here.grid:
    extents = [tuple(2 * side - 1 for side in network.grid) for network in (there, here)]
    change(biases, np.asarray(positions.resample(params[biases], *extents, here.resample)),
           f"grid from {there.grid[0]}x{there.grid[1]} to {here.grid[0]}x{here.grid[1]}")
  if kernel in params and there.patch != here.patch:
    split = rearrange(np.asarray(params[kernel]), "(p q c) d -> p q c d", p=there.patch,
                      c=here.channels)
    change(kernel, patch_size(split, here.patch).reshape(-1, split.shape[-1]),
           f"patch from {there.patch} to {here.patch} pixels")
  if here.positions == "learned":
    fixed = there.positions in positions.FIXED
    if fixed:
      change("position/table", positions.FIXED[there.positions](there.grid, there.width),
             f"fixed {there.positions} become learned")
    if here.has_class_position and not there.has_class_position:
      change("cls_position", np.zeros((1, 1, there.width), np.float32), "had none: zero")
    if "position/table" in params and there.grid != here.grid:
      change("position/table", np.asarray(positions.resample(
        params["position/table"], there.grid, here.grid, here.resample)),
        f"grid from {there.grid[0]}x{there.grid[1]} to {here.grid[0]}x{here.grid[1]}")
  if there.has_class_position and not here.has_class_position and here.has_class_token:
    change("cls", np.asarray(params["cls"]) + np.asarray(params["cls_position"]),
           "with its position")
  return params, notes


def channels(kernel, count: int):
  """[..., c, d] for another number of channels: what a grey image, repeated, gives stays the same.

  The sum over channels is shared out equally.
  """
  kernel = np.asarray(kernel)
  return np.repeat(kernel.sum(-2, keepdims=True) / np.float32(count), count, axis=-2)


def patch_size(kernel, size: int):
  """[p, p, c, d] -> [size, size, c, d], to give on resized patches what it gave on the originals.

  The least-squares solution (FlexiViT, 2212.08013 eq. 3), with bilinear resizing.
  """
  kernel = np.asarray(kernel, np.float64)
  matrix = bilinear_matrix(kernel.shape[0], size)                            # size p
  inverse = np.linalg.pinv(matrix.T)                                         # size p
  return np.einsum("ap,bq,pqcd->abcd", inverse, inverse, kernel).astype(np.float32)


def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
  """Bilinear resizing of a line, without antialiasing, as a matrix [size_out, size_in]."""
  at = np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)
  return np.maximum(0, 1 - np.abs(at.reshape(-1, 1) - np.arange(size_in).reshape(1, -1)))
