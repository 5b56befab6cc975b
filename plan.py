"""Compiles a recipe's training step for a topology that need not be there; trains nothing.

  python plan.py --config=configs/mae.py:imagenet_l16 --topology=v5e:16x16 [--json]
  python plan.py --config=configs/vit.py --topology=cpu:8 --config.mesh.fsdp=8 --layout

Prints parameters, model FLOPs, memory of a device, collectives and a roofline. Needs no data set;
TPU topologies need the libtpu package.
"""

import argparse
import json
import os
import sys

from train import parse_overrides


def gigabytes(n: float) -> str:
  return f"{n / 2**30:.3g} GiB" if n >= 2**28 else f"{n / 2**20:.3g} MiB"


def show(plan: dict):
  """One figure a line, for a person."""
  print(f"{plan['config']} on {plan['topology']}: {plan['devices']} devices, mesh {plan['mesh']}")
  print(f"  parameters        {plan['parameters']:,}")
  print(f"  model FLOPs       {plan['model_flops']:.4g} a step of {plan['batch_size']:,} examples")
  limit = {None: "", True: f", fits {gigabytes(plan['memory_bytes'] or 0)}",
           False: f", DOES NOT FIT {gigabytes(plan['memory_bytes'] or 0)}"}[plan["fits"]]
  print(f"  memory a device   {gigabytes(plan['bytes_per_device'])} (arguments "
        f"{gigabytes(plan['argument_bytes'])}, temporaries "
        f"{gigabytes(plan['temporary_bytes'])}){limit}")
  for kind, entry in plan["collectives"].items():
    print(f"  {kind:17} {entry['count']:,} of {gigabytes(entry['bytes'])} together a step")
  if plan["step_time_roofline"]:
    times = ", ".join(f"{name} {1e3 * t:.3g}" for name, t in plan["times"].items())
    print(f"  roofline          {1e3 * plan['step_time_roofline']:.3g} ms a step ({times} ms), "
          f"MFU at most {plan['mfu_roofline']:.0%}")


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:VARIANT")
  parser.add_argument("--topology", required=True, help="v4, v5e, v5p or v6e and a shape, such as "
                      "v5e:16x16, or cpu:N")
  parser.add_argument("--json", action="store_true", help="print one JSON line")
  parser.add_argument("--layout", action="store_true", help="print how each parameter is split")
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest, parser)

  # Planning needs no accelerator, and takes none away from who is training on it.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  kind, _, count = args.topology.partition(":")
  if kind == "cpu" and "jax" not in sys.modules:
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                               + f" --xla_force_host_platform_device_count={count}")
  from trainer import loop, plan, recipe, sharding
  try:
    config = recipe.load_config(args.config, overrides)
    built = recipe.build(config, data=recipe.stand_in(config),
                         devices=plan.topology_devices(args.topology))
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if args.layout:
    for path, shape, spec in sharding.layout(loop.abstract_state(built)[0].params, built.mesh):
      print(f"{path:60} {str(shape):24} {spec}")
  result = plan.plan(built, args.topology)
  print(json.dumps(result)) if args.json else show(result)
  return 0


if __name__ == "__main__":
  sys.exit(main())
