"""Takes training steps of a network in PyTorch when told to: the other side of compare.py.

  python benchmarks/peers/train_step.py --model=vit_s16 --batch=8 [--compile] [--threads=2]

A step is forward, loss, backward and the fused AdamW, on one batch of bytes that is there already.
On a GPU networks run under autocast in `--dtype`. Needs torch alone. See benchmarks/worker.py.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks import worker
from benchmarks.peers import clip, dit, mae, moco, vit

MODELS = {  # name -> network whose forward is the loss of what its `inputs` name
  "vit_s16": lambda: vit.Classifier("S"), "vit_b16": lambda: vit.Classifier("B"),
  "vit_l16": lambda: vit.Classifier("L"), "mae_b16": lambda: mae.MAE("B"),
  "mae_l16": lambda: mae.MAE("L"), "moco_s16": lambda: moco.MoCo("S"), "clip_b32": clip.CLIP,
  "dit_s4": lambda: dit.DiT("S", 4), "dit_xl2": lambda: dit.DiT("XL", 2)}

INPUTS = {  # name -> batch size -> array
  "image": lambda b: torch.randint(256, (b, 3, 224, 224), dtype=torch.uint8),
  "image_2": lambda b: torch.randint(256, (b, 3, 224, 224), dtype=torch.uint8),
  "latent": lambda b: torch.randn(b, 4, 32, 32),
  "label": lambda b: torch.randint(1000, (b,)),
  "text": lambda b: torch.randint(49_408, (b, 77))}


def parameters(network) -> int:
  """How many are trained or frozen; a momentum encoder's copies do not count."""
  return sum(p.numel() for name, p in network.named_parameters() if "momentum" not in name)


def make_step(network, batch, device: str, dtype: torch.dtype, compiled: bool):
  """() -> None, done when it returns."""
  trained = [p for p in network.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    [{"params": [p for p in trained if p.ndim > 1]},
     {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
    lr=1e-4, weight_decay=0.05, fused=True)
  decay = getattr(network, "ema_decay", None)
  average = [p.detach().clone() for p in trained] if decay else []
  loss_of = torch.compile(network) if compiled else network

  def step():
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      loss = loss_of(**batch)
    loss.backward()
    if network.clip_norm:
      torch.nn.utils.clip_grad_norm_(trained, network.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if average:
      torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - decay)
    if device == "cuda":
      torch.cuda.synchronize()
  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--model", required=True, choices=MODELS)
  parser.add_argument("--batch", type=int, required=True)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--threads", type=int)
  parser.add_argument("--compile", action="store_true")
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  network = MODELS[args.model]().to(device)
  batch = {name: INPUTS[name](args.batch).to(device) for name in network.inputs}
  step = make_step(network, batch, device, getattr(torch, args.dtype), args.compile)
  began = time.perf_counter()
  step()
  worker.serve(step, version=f"torch {torch.__version__}", parameters=parameters(network),
               first_step=time.perf_counter() - began)


if __name__ == "__main__":
  main()
