"""Prints what memory CLIP's and SigLIP's loss and its gradient need on a device.

  python benchmarks/contrastive_memory.py [--chunk=256] [--dim=512]

Compiles for 1 and for 8 CPU devices, each with its part of the batch, and runs nothing: MiB of
temporary arrays on a device, as XLA's buffer assignment has it.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from losses import contrastive
from trainer import sharding

LOSSES = {
  "softmax": lambda image, text, chunk: contrastive.clip_loss(image, text, 100.0, chunk),
  "sigmoid": lambda image, text, chunk: contrastive.siglip_loss(image, text, 10.0, -10.0, chunk),
}


def temporary(loss, batch: int, dim: int, devices: int, chunk: int) -> int:
  """Bytes a device needs beside embeddings and their gradients."""
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  rows = sharding.batch_sharding(mesh)
  x = jax.ShapeDtypeStruct((batch, dim), jnp.float32)
  gradient = jax.jit(jax.value_and_grad(lambda *x: LOSSES[loss](*x, chunk).mean(), (0, 1)),
                     in_shardings=(rows, rows), out_shardings=(None, (rows, rows)))
  return gradient.lower(x, x).compile().memory_analysis().temp_size_in_bytes


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--chunk", type=int, default=256)
  parser.add_argument("--dim", type=int, default=512)
  args = parser.parse_args()
  print("| loss | batch | devices | plain, MiB | in chunks, MiB |\n|---|---|---|---|---|")
  for loss in LOSSES:
    for batch in (2048, 4096, 8192):
      for devices in (1, 8):
        plain, bounded = (temporary(loss, batch, args.dim, devices, chunk) / 2**20
                          for chunk in (0, args.chunk))
        print(f"| {loss} | {batch} | {devices} | {plain:.1f} | {bounded:.1f} |", flush=True)


if __name__ == "__main__":
  main()
