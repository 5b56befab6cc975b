"""Fields of a config: one account of each, in the signature of what it configures."""

import inspect
import json
import re
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np
import pytest

import train
from input_pipeline import batches
from input_pipeline.augment import images as augment
from input_pipeline.augment import latents
from trainer import checkpoints, fields, help, networks, optimizer, recipe, schedule, sharding

ROOT = Path(__file__).parents[1]


class Parts(nn.Module):
  """A network with another one inside."""

  inner: nn.Module
  width: int
  kind: Literal["a", "b"] = "a"  # of what


def takes(*, variant: str = "", image_size, share: float | None = None, dims: tuple[int, ...] = (),
          pair: tuple[int, int] | int = 1, anything: Any = None,
          **rest: (Parts, dict(text_=Parts))):
  return dict(rest, variant=variant, image_size=image_size, share=share, dims=dims, pair=pair,
              anything=anything)


def test_what_a_function_takes():
  found = fields.accepted(takes)
  assert set(found) == {"variant", "image_size", "share", "dims", "pair", "anything", "width",
                        "kind", "text_width", "text_kind"}
  assert found["text_kind"] == fields.Field(Literal["a", "b"], "a", Parts, "kind")
  assert found["width"].default is inspect.Parameter.empty
  assert fields.choices(found["kind"].hint) == ("a", "b") and not fields.choices(int)


@pytest.mark.parametrize("section, message", [
  (dict(kind="c"), r"config\.model\.kind = 'c': allowed: a, b"),
  (dict(text_kind=1), r"config\.model\.text_kind = 1: allowed: a, b"),
  (dict(widht=3), r"config\.model\.widht: unknown field; did you mean 'width'"),
  (dict(width=3.0), r"config\.model\.width = 3\.0: expected int"),
  (dict(width=True), r"config\.model\.width = True: expected int"),
  (dict(share="x"), r"config\.model\.share = 'x': expected float or None"),
  (dict(dims=3), r"config\.model\.dims = 3: expected whole numbers, in brackets"),
  (dict(dims=(3, "x")), r"config\.model\.dims = \(3, 'x'\): expected whole numbers"),
  (dict(pair=(1, 2, 3)), r"config\.model\.pair = \(1, 2, 3\): expected \(int, int\) or int"),
  (dict(image_size=3), r"config\.model\.image_size: .* no field of a section"),
])
def test_what_a_section_may_not_say(section, message):
  with pytest.raises(ValueError, match=message):
    fields.call(takes, section, "model", image_size=8)


def test_numbers_of_numpy_are_numbers():
  assert fields.plain({"a": (np.float64(0.5), np.int64(2))}) == {"a": (0.5, 2)}


def test_what_a_section_may_say():
  made = fields.call(takes, dict(share=1, dims=[1, 2], pair=(3, 4), kind="b", width=None,
                                 anything={"a": [1]}), "model", image_size=8, not_asked_for=1)
  assert made == dict(variant="", image_size=8, share=1, dims=(1, 2), pair=(3, 4), kind="b",
                      anything={"a": (1,)})
  with pytest.raises(ValueError, match="config.model: missing .*image_size"):
    fields.call(takes, {}, "model")


CONFIGURED = [("data", batches.open_data), ("augment", augment.make), ("augment", latents.make),
              ("optimizer", optimizer.make), ("schedule", schedule.make),
              ("mesh", sharding.make_mesh), ("checkpoint", checkpoints.Checkpoints),
              ("init", networks.Init)]
for folder, label, name in (("models", "model", "make"), ("methods", "method", "make"),
                            ("evaluators", "evals", "evaluate")):
  modules = [fields.find_module(folder, path.stem, "") for path in (ROOT / folder).glob("*.py")]
  CONFIGURED += [(label, getattr(module, name)) for module in modules if hasattr(module, name)
                 and module.__name__ != "models.backbones"]  # which is no method's model


@pytest.mark.parametrize("label, function", CONFIGURED,
                         ids=lambda x: x if isinstance(x, str) else x.__module__)
def test_every_field_says_what_it_is(label, function):
  """A type or names, and a line of help, without which --help would be a list of riddles."""
  for name, field in fields.accepted(function).items():
    if name in help.PROVIDED or f"{label}.{name}" in help.PROVIDED or (
        label == "model" and name in networks.FROM_DATA):
      continue
    assert field.hint is not inspect.Parameter.empty, name
    assert help.help_lines(field.owner).get(field.own_name), name


def test_help_lists_every_field_of_a_recipe(capsys):
  assert train.main([f"--config={ROOT}/configs/clip.py", "--help"]) == 0
  said = capsys.readouterr().out
  assert "variants: (none), :smoke, :vit_b32" in said and "2103.00020" in said
  flat = " ".join(said.split())
  for expected in (
      "--config.seed = 0 [int]", "--config.model.text_pool = 'eos' [eos | argmax | first",
      "--config.model.width = 128 [int] features of a token",
      "--config.optimizer.name = 'adamw' [adamw | sgd | lars",
      "--config.optimizer.eps = 1e-08 [float] added to the root of the second.",
      "--config.augment.eval_crop = 1.0 [float] share in (0, 1] of each side",
      "--config.evals.zero_shot.examples = 8 [int] images that the figure shows",
      "--config.schedule.warmup_steps = "):
    assert expected in flat, expected
  for provided in ("optimizer.batch_size", "method.batch_size", "model.num_classes", "model.dtype",
                   "model.text_context", "model.image ", "evals.zero_shot.context"):
    assert f"--config.{provided}" not in said
  assert train.main([f"--config={ROOT}/configs/clip.py:nothing", "--help"]) == 1
  assert "no variant 'nothing'" in capsys.readouterr().err
  assert train.main(["--help"]) == 0
  assert "--workdir" in capsys.readouterr().out


def test_list_names_every_recipe_and_variant(capsys):
  assert train.main(["--list"]) == 0
  out = capsys.readouterr().out
  for path in (ROOT / "configs").glob("*.py"):
    assert (f"configs/{path.name}  " in out) == (path.name != "base.py")
  assert "configs/mae.py  Masked autoencoder pre-training (2111.06377).\n" in out
  assert "    reaches linear probe 0.49 +- 0.01" in out and ":imagenet_b16" in out
  assert max(map(len, out.splitlines())) <= 120


def test_print_config_writes_nothing(tmp_path, capsys):
  flags = [f"--config={ROOT}/configs/mae.py:smoke", f"--workdir={tmp_path}/run",
           "--config.model.width=48", "--print_config"]
  assert train.main(flags) == 0
  said = capsys.readouterr().out
  config, rest = json.JSONDecoder().raw_decode(said)
  assert config["model"]["width"] == 48 and config["model"]["image_size"] == [16, 16]
  assert config["total_steps"] == 6 and config["augment"]["eval_crop"] == 1.0
  facts = said[rest:]
  for expected in ("method mae", "parameters", "run directory", "evaluations", "knn"):
    assert expected in facts
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", help.PROVIDED)
def test_what_a_run_provides_is_refused_of_a_section(name):
  """Where the label has a function in the recipes, that function's call refuses it."""
  label, _, field = name.rpartition(".")
  config = {"method": "moco", "init": "finetune"}.get(label, "vit")
  config = recipe.load_config(f"{ROOT}/configs/{config}.py:smoke")
  if label == "augment" and field == "latents" or label == "model" and field != "dtype":
    return  # of another augmentation; what the data says may be said before
  if not label:
    config.evals.classification[field] = 1
  else:
    config[label][field] = 1
  with pytest.raises(ValueError, match=f"{field}: what the run says itself"):
    recipe.build(config)


@pytest.mark.parametrize("config, field, message", [
  ("vit", "optimizer.batch_size=256", "config.optimizer.batch_size: .*no field of a section"),
  ("moco", "method.batch_size=8", "config.method.batch_size"),
  ("vit", "schedule.total_steps=8", "config.schedule.total_steps"),
  ("vit", "data.seed=8", "config.data.seed"),
  ("vit", "model.dtype=bfloat16", "config.model.dtype"),
  ("mae", "evals.knn.k=abc", "config.evals.knn.k = 'abc': expected int"),
  ("mae", "evals.knn.context=3", "config.evals.knn.context"),
  ("mae", "evals.linear_probe.l2=0.1", "config.evals.linear_probe.l2 = 0.1: expected numbers"),
  ("mae", "evals.reconstruction.examples=2.5", "config.evals.reconstruction.examples = 2.5"),
  ("vit", "accumulate=0", "config.accumulate = 0: expected at least 1"),
  ("vit", "ema_decay=none", "config.ema_decay = None: expected float"),
  ("vit", "seed=1.5", "config.seed"),
  ("vit", "model.num_classes=abc", "config.model.num_classes = 'abc': expected int or None"),
  ("vit", "model.context=7", "config.model.context: unknown field"),
  ("vit", "augment.flip=no", "config.augment.flip = 'no': expected bool"),
  ("vit", "augment.mean=abc", "config.augment.mean = 'abc': expected float or numbers"),
  ("vit", "augment.crop_area=('a','b')", "augment.crop_area"),
  ("vit", "dtype=float8", "config.dtype = 'float8': did you mean 'float32'"),
  ("vit", "model.pool=sum", "config.model.pool = 'sum'"),
  ("mae", "model.patch_stem=resnet", "config.model.patch_stem = 'resnet': allowed: patches"),
])
def test_a_wrong_field_ends_a_run_before_it_begins(tmp_path, capsys, config, field, message):
  flags = [f"--config={ROOT}/configs/{config}.py:smoke", f"--config.{field}"]
  assert train.main([*flags, f"--workdir={tmp_path}/run"]) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  assert re.search(message, error), error
  assert not (tmp_path / "run").exists()
