"""What `train.py --list` says: the recipes there are, without loading what they train."""

import textwrap

from trainer import config


def recipes() -> str:
  """Each file of configs/: what it is, what its default reaches on the embedded data, variants.

  Files of the user's in that folder are listed too; one that is no recipe is passed over.
  """
  shown = []
  for path in sorted((config.ROOT / "configs").glob("*.py")):
    if "VARIANTS" not in path.read_text(encoding="utf-8"):
      continue  # defaults
    name = f"configs/{path.name}"
    module = config.config_module(str(path))
    first = (module.__doc__ or "").strip().partition("\n")[0]
    lines = [f"{name}  {first}"]
    if reached := module.get_config("").get("expect"):
      lines.append(f"    reaches {reached}")
    variants = " ".join(f":{variant}" for variant in module.VARIANTS if variant)
    lines.append(textwrap.fill(variants, 96, initial_indent="    ", subsequent_indent="    ",
                               break_on_hyphens=False, break_long_words=False))
    shown.append("\n".join(lines))
  usage = ("python train.py --config=configs/NAME.py[:VARIANT]; with --help its fields, and "
           ":smoke takes seconds.")
  return "\n".join([*shown, "", usage])
