"""Published weights to a run directory, and back.

  python convert.py --from=FILE_OR_FOLDER --to=DIR [--format=FORMAT] [--config.any.field=value]
  python convert.py --from=RUN --to=DIR --to_format=hf|timm|npz|torchvision|openai|original

The run directory is like those of train.py: for evaluate.py, load_run and --config.init.run. What a
file does not tell is asked for by name, such as --config.model.heads=12. Nothing is downloaded,
nothing in a file is run, and nothing is written unless every tensor has its place.
"""

import argparse
import contextlib
import json
import math
import operator
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from train import parse_overrides
from trainer import environment

ROOT = Path(__file__).parent
ASIDE = "published.safetensors"  # in a run directory: what its file had and we do not use
IMAGENET = 1_281_167  # images, by which epochs of a recipe are steps


@contextlib.contextmanager
def new_folder(path: Path):
  """A folder beside `path` that takes its place at the end, unless something goes wrong."""
  if path.exists():
    raise ValueError(f"--to={path}: it exists already")
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  try:
    yield partial
    partial.chmod(0o755)
    partial.rename(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def complete_config(network, source, form, overrides):
  """The recipe's config with the network that the file holds, and its own preprocessing."""
  from interop import preprocessing
  from trainer import recipe
  config = recipe.load_config(str(ROOT / network.recipe))
  groups, recipes_name = config.model.get("bn_groups"), config.config_name
  config.model = dict(network.model)
  sections = {**network.sections, "augment": {
    "image_size": network.model["image_size"], **network.sections.get("augment", {}),
    **(preprocessing.told(source.config, source.preprocessor) if form.images else {})}}
  for name, section in sections.items():
    config[name] = {**config[name].to_dict(), **section}
  config.dtype, config.config_name, config.expect = "float32", f"{recipes_name} ({form.name})", ""
  for key, value in overrides.items():
    recipe.override(config, key, value)
  queue = config.method.get("queue_size")
  if queue:
    config.data.batch_size = min(config.data.batch_size, queue)
  if groups and "bn_groups" not in config.model:
    config.model.bn_groups = math.gcd(groups, config.data.batch_size)
  info = SimpleNamespace(image_shape=(None, None, config.model.channels), num_classes=0)
  return recipe.fill_from_data(config, info, IMAGENET)


def tokenizer_of(source, config):
  """The tokenizer beside the weights, with the context and the end of text of the model."""
  from trainer import fields
  if not (source.tokenizer and config.model.get("vocab_size")):
    return None
  text = fields.find_module("input_pipeline", "text", "")
  told = {} if config.model.get("text_pool") in ("argmax", None) else {
    name: config.model[name] for name in ("eos_id", "pad_id")}
  tokenizer = text.make(str(source.tokenizer), context=config.model.context, **told)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(f"{source.tokenizer}: {tokenizer.vocab_size} tokens, the weights are for "
                     f"{config.model.vocab_size}")
  for name in ("eos_id", "pad_id", "mask_id", "starts"):
    if name in config.model:
      config.model[name] = getattr(tokenizer, name)
  return tokenizer


def flat(params, extra) -> dict:
  from flax.traverse_util import flatten_dict
  return flatten_dict({"params": params, "extra": extra}, sep="/")


def initial(method, model) -> dict:
  """What a run of this network starts with, {path: array}."""
  import jax
  import jax.numpy as jnp
  batch = {"image": jnp.zeros((1, *model.get("image_size", (1, 1)), model.get("channels", 1))),
           "label": jnp.zeros(1, jnp.int32)}
  if "context" in model:
    batch["text"] = jnp.zeros((1, model["context"]), jnp.int32)
  return flat(*method.init(jax.random.key(0), batch))


def import_weights(args, overrides) -> str:
  """Writes the run directory; returns what to tell the user. Raises ValueError."""
  import jax
  import numpy as np
  from flax.traverse_util import unflatten_dict
  from ml_collections import ConfigDict

  from interop import files, formats, layout, preprocessing, published
  from trainer import recipe, store
  from trainer.state import TrainState
  source = files.read(args.source, args.weights)
  source, told = published.unwrapped(source)
  form = published.recognise(source.tensors, source.config, args.format)
  names = form.canonical(source.tensors)
  shapes = {name: source.tensors[theirs].shape for name, theirs in names.items()}
  if len(names) < len(source.tensors):
    raise ValueError(f"{source.path}: several names mean the same parameter")
  given = ConfigDict(dict(model={}))
  for key, value in overrides.items():
    if key.startswith("model."):
      recipe.override(given, key, value)
  network = form.describe(shapes, source.config, given.model.to_dict())
  config = complete_config(network, source, form, overrides)
  tokenizer = tokenizer_of(source, config)
  method = recipe.make_method(config)
  model = published.fields(recipe.make_model(config), config.model)

  expected = jax.eval_shape(lambda: initial(method, model))
  entries = published.account(form, model, shapes, expected)
  if any(entry.status in layout.WRONG for entry in entries):
    raise ValueError(f"{source.path} is not a whole {form.name} of this architecture:\n"
                     + layout.show(entries, verbose=False))
  arrays = published.take(form, model, {
    name: source.tensors[theirs].read() for name, theirs in names.items()}, expected)
  lacking = [path for path in expected if path not in arrays]
  if lacking:
    new = jax.jit(lambda: operator.itemgetter(*lacking, lacking[0])(initial(method, model)))()
    arrays |= zip(lacking, map(np.asarray, new))
  tree = unflatten_dict(arrays, sep="/")
  kept = {entry.theirs for entry in entries if entry.status == "aside"} | {
    name for name in names if form.keep and re.fullmatch(form.keep, name)}
  aside = {name: source.tensors[names[name]].read() for name in sorted(kept & {*names})}
  renamed = {name: theirs for name, theirs in names.items() if name != theirs}
  with new_folder(Path(args.to)) as folder:
    kept = store.Checkpoints(folder, metadata={
      "config": recipe.plain(config), "code": store.code_version(), "data": ""})
    kept.save(TrainState(np.zeros((), np.int32), tree["params"], None, tree.get("extra", {}),
                          None), 0)
    kept.finish()
    kept.close()
    (folder / "config.json").write_text(
      json.dumps(recipe.plain(config), indent=2) + "\n", encoding="utf-8")
    files.write(folder / ASIDE, aside, {
      "format": form.name, "names": json.dumps(renamed), "config": json.dumps(source.config)})
    if tokenizer:
      (folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
  entries += formats.assumed(form, config.model, source.config, given.model)
  if form.images:
    entries += preprocessing.assumed(config.augment, source, overrides)
  return f"{source.path}: {form.name}{told}\n{layout.show(entries)}\nwritten to {args.to}"


def export_weights(args) -> str:
  """Writes published weights; returns what to tell the user. Raises ValueError."""
  import numpy as np

  from interop import files, preprocessing, published
  from trainer import checkpoints, recipe, store
  run = checkpoints.load_run(args.source)
  path, aside, facts = Path(args.source) / ASIDE, {}, {}
  if path.exists():
    aside, facts = files.open_safetensors(path)
  model = published.fields(recipe.make_model(run.config), run.config.model)
  form = published.to_write(model, args.to_format, facts.get("format", ""))
  arrays = {path: np.asarray(x) for path, x in flat(run.params, run.extra).items()}
  tensors = published.give(form, model, arrays)
  config = form.config(model, run.config) if form.config else {}
  if facts.get("format") == form.name:
    tensors |= {name: tensor.read() for name, tensor in aside.items()}
    names = json.loads(facts["names"])
    tensors = {names.get(name, name): x for name, x in tensors.items()}
    config = {**json.loads(facts["config"]), **config}
  with new_folder(Path(args.to)) as folder:
    files.write(folder / f"model{form.suffix}", tensors)
    if config:
      (folder / "config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if form.publisher == "hf" and form.images:
      (folder / "preprocessor_config.json").write_text(json.dumps(
        preprocessing.to_hugging_face(run.config.augment, run.config.model.channels),
        indent=2) + "\n", encoding="utf-8")
    tokenizer = Path(args.source) / store.TOKENIZER
    if tokenizer.exists():
      shutil.copy(tokenizer, folder)
  return f"{args.source}, step {run.step}, as {form.name}: {len(tensors):,} tensors in {args.to}"


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--from", dest="source", required=True,
                      help="a file of weights, a folder that holds one, or a run directory")
  parser.add_argument("--to", required=True, help="a folder that does not exist yet")
  parser.add_argument("--format", default="", help="how the weights are written, where their names "
                      "do not tell: FAMILY/PUBLISHER or one of the two")
  parser.add_argument("--weights", default="", help="which set of a PyTorch file, such as model; "
                      "default the averaged ones (ema) if there are any")
  parser.add_argument("--to_format", default="", help="write a run in this format")
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest, parser)
  if args.to_format and (overrides or args.format or args.weights):
    parser.error("--to_format writes a run as it is: without --config, --format and --weights")

  args.distributed = args.coordinator = None
  environment.prepare(args)
  from trainer.store import CheckpointError
  try:
    print(export_weights(args) if args.to_format else import_weights(args, overrides))
  except (ValueError, OSError, CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
