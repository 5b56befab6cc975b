"""Inception-v3 (1512.00567) as the Frechet inception distance uses it (1706.08500).

The network of 2015 whose port to PyTorch, pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, FID
is computed with. Of torchvision's Inception it differs in weights, in 1008 outputs, in average
pooling that leaves the padding out, and in the maximum pooling of its last block. Modules bear the
names that the published weights have.
"""

from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from models.batch_norm import BatchNorm

SIZE = 299  # pixels
WIDE, TALL = (1, 7), (7, 1)
SPLIT = (384, (1, 3), (3, 1))  # two convolutions of one input, side by side


def block_a(pooled):
  return (("branch1x1", (64, (1, 1))), ("branch5x5", (48, (1, 1)), (64, (5, 5))),
          ("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
          ("branch_pool", (pooled, (1, 1))))


def block_c(d):
  return (("branch1x1", (192, (1, 1))), ("branch7x7", (d, (1, 1)), (d, WIDE), (192, TALL)),
          ("branch7x7dbl", (d, (1, 1)), (d, TALL), (d, WIDE), (d, TALL), (192, WIDE)),
          ("branch_pool", (192, (1, 1))))


BLOCK_E = (("branch1x1", (320, (1, 1))), ("branch3x3", (384, (1, 1)), SPLIT),
           ("branch3x3dbl", (448, (1, 1)), (384, (3, 3)), SPLIT), ("branch_pool", (192, (1, 1))))

# Block -> branches: (name, (features, kernel, ...) of each layer). A block without a branch_pool
# halves the image: by its branches' last layers, and by a maximum beside them.
BLOCKS = {
  "Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64),
  "Mixed_6a": (("branch3x3", (384, (3, 3))),
               ("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))),
  "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160),
  "Mixed_6e": block_c(192),
  "Mixed_7a": (("branch3x3", (192, (1, 1)), (320, (3, 3))),
               ("branch7x7x3", (192, (1, 1)), (192, WIDE), (192, TALL), (192, (3, 3)))),
  "Mixed_7b": BLOCK_E, "Mixed_7c": BLOCK_E}


class Layer(nn.Module):
  """Convolution, batch normalisation with the stored statistics, ReLU."""

  features: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x):
    # Full precision on any device: the published distances hold for the published features.
    x = nn.Conv(self.features, self.kernel, self.stride, self.padding, use_bias=False,
                precision="highest", name="conv")(x)
    return nn.relu(BatchNorm(epsilon=1e-3, name="bn")(x, train=False))


class Block(nn.Module):
  """Branches side by side (1512.00567 figs. 5 to 7 and 10): [b, h, w, c] -> [b, h', w', d]."""

  branches: tuple
  pool: str = "mean"  # before branch_pool: "mean" or "max"

  @nn.compact
  def __call__(self, x):
    same = {"strides": (1, 1), "padding": "SAME"}
    halves, out = self.branches[-1][0] != "branch_pool", []
    for name, *layers in self.branches:
      y = x
      if name == "branch_pool":
        y = (nn.max_pool(x, (3, 3), **same) if self.pool == "max" else
             nn.avg_pool(x, (3, 3), **same, count_include_pad=False))
      for i, (features, *kernels) in enumerate(layers):
        how = (2, "VALID") if halves and i == len(layers) - 1 else ()
        number = f"_{i + 1}" if len(layers) > 1 else ""
        y = jnp.concatenate([
          Layer(features, kernel, *how, name=name + number + (letter if kernels[1:] else ""))(y)
          for kernel, letter in zip(kernels, "ab")], axis=-1)
      out.append(y)
    if halves:
      out.append(nn.max_pool(x, (3, 3), (2, 2)))
    return jnp.concatenate(out, axis=-1)


class Inception(nn.Module):
  """image [b, h, w, 3] in [-1, 1], from 75 pixels on -> features ("pool3") [b, 2048], logits."""

  @nn.compact
  def __call__(self, image):
    x = Layer(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(image)
    x = Layer(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = Layer(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = Layer(80, (1, 1), name="Conv2d_3b_1x1")(x)
    x = Layer(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))                                       # b 35 35 192 of 299
    for name, branches in BLOCKS.items():
      x = Block(branches, "max" if name == "Mixed_7c" else "mean", name=name)(x)
    features = x.mean((1, 2))                                                # b 2048
    logits = nn.Dense(1008, precision="highest", name="fc")(features)
    return {"features": features, "logits": logits}


@jax.jit
def features(variables, image):
  """uint8 images [b, h, w, 3] -> float32 [b, 2048], as pytorch-fid computes them.

  Resized to 299 pixels bilinearly, with half-pixel centres and without antialiasing.
  """
  image = image.astype(jnp.float32) / 255
  image = jax.image.resize(image, (len(image), SIZE, SIZE, 3), "linear", antialias=False)
  return Inception().apply(variables, 2 * image - 1)["features"]


THEIRS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
          "var": "running_var"}
AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # (out, in, h, w) -> (h, w, in, out); (out, in) -> ...


def load(path: str):
  """The variables of `features` from a safetensors file with pytorch-fid's names.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another format, which might run code as it is read; tensors that are missing, of
      another shape or not of this network, all before anything is computed.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"{path}: no such file of Inception weights")
  if Path(path).suffix != ".safetensors":
    raise ValueError(
      f"{path} is no .safetensors file, and others may run code as they are read. Where PyTorch is "
      "installed, turn it into one: python -c \"import torch, safetensors.torch as s; "
      f"s.save_file(torch.load('{path}', weights_only=True), 'inception.safetensors')\"")
  try:
    given = load_file(path)
  except SafetensorError as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  given = {name: w for name, w in given.items() if not name.endswith("num_batches_tracked")}
  spec = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  shapes = flax.traverse_util.flatten_dict(
    jax.eval_shape(Inception().init, jax.random.key(0), spec))
  names = {(collection, *module, leaf): ".".join((*module, THEIRS[leaf]))
           for collection, *module, leaf in shapes}
  wanted = {names[key]: tuple(shape.shape[i] for i in np.argsort(AXES[shape.ndim]))
            for key, shape in shapes.items()}
  wrong = [f"{name} {shape}: " + (f"{given[name].shape}" if name in given else "missing")
           for name, shape in wanted.items() if name not in given or given[name].shape != shape]
  wrong += [f"{name}: not of this network" for name in given if name not in wanted]
  if wrong:
    raise ValueError(f"{path} does not hold FID's Inception; {len(wrong)} tensors differ, such as "
                     "\n  " + "\n  ".join(wrong[:5]))
  return flax.traverse_util.unflatten_dict(
    {key: given[name].transpose(AXES[given[name].ndim]).astype(np.float32)
     for key, name in names.items()})
