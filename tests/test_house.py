"""The house rules that code can check: who imports whom, and that every recipe builds."""

import ast
import functools
import graphlib
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiers import suite

from input_pipeline.batches import make_spec
from input_pipeline.records import Info, image_features
from trainer import recipe

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "losses", "diffusion", "methods", "input_pipeline", "trainer", "evaluators",
         "interop")
# Room -> rooms it may import. What a config names (models, methods, evaluators) is found by that.
ALLOWED = {"models": set(), "losses": set(), "input_pipeline": set(), "diffusion": set(),
           "methods": {"models", "losses", "diffusion"}, "evaluators": {"models", "losses"},
           "trainer": {"input_pipeline", "models", "configs"},
           "interop": {"models"}, "configs": set()}


@functools.cache
def imports(path: Path) -> set[str]:
  """Dotted names of what a file imports anywhere in it; a module found by a literal name counts."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "find_module":
      literal = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
      names |= {".".join(literal)} if len(literal) == 2 else set()
  return names


def rooms(path: Path) -> set[str]:
  return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
  for path in (ROOT / room).glob("**/*.py"):
    outside = (rooms(path) & {*ROOMS, "configs", "train", "evaluate"}) - {room}
    assert outside <= ALLOWED[room], f"{path} imports {outside - ALLOWED[room]}"


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_goes_round_in_a_circle(room):
  files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in (ROOT / room).glob("**/*.py")}
  graph = {name: {other for other in files for found in imports(path)
                  if (found == other or found.rpartition(".")[0] == other) and other != name}
           for name, path in files.items()}
  order = graphlib.TopologicalSorter(graph)
  order.prepare()  # raises CycleError with the circle
  assert order.is_active()


def test_rooms_can_be_read_in_one_sitting():
  long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines())
          for room in (*ROOMS, "configs") for path in (ROOT / room).glob("**/*.py")}
  assert not {name: lines for name, lines in long.items() if lines > 350}


def test_functions_fit_on_a_page():
  """None is over 60 lines, its docstring and what is defined in it included."""
  paths = [*ROOT.glob("*.py"), *(path for room in (*ROOMS, "configs")
                                 for path in (ROOT / room).glob("**/*.py"))]
  lines = [(f"{path.relative_to(ROOT)} {node.name}", node.end_lineno - node.lineno + 1)
           for path in paths for node in ast.walk(ast.parse(path.read_text()))
           if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
  assert not [(name, n) for name, n in lines if n > 60]


def test_only_the_input_pipeline_knows_tfds():
  for path in ROOT.glob("*/*.py"):
    if path.parent.name not in ("input_pipeline", "tests"):
      assert "tensorflow_datasets" not in rooms(path), path
    assert "tensorflow" not in rooms(path), path


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").glob("**/*.py")), ids=lambda p: p.name)
def test_trainer_names_no_method_and_no_batch_key(path):
  words = {node.value for node in ast.walk(ast.parse(path.read_text()))
           if isinstance(node, ast.Constant) and isinstance(node.value, str)}
  methods = {p.stem for p in (ROOT / "methods").glob("*.py")} - {"method"}
  assert not words & methods
  assert not words & {"label", "noise", "text", "label_mix"}


def variants():
  for path in sorted((ROOT / "configs").glob("*.py")):
    if path.stem != "base":
      for variant in importlib.import_module(f"configs.{path.stem}").VARIANTS:
        yield f"configs/{path.stem}.py" + (f":{variant}" if variant else "")


PARAMETERS = {  # of published recipes: encoder, decoder and head as each trains them
  # With layer scale, without a position of the class token; B/16 at 192 pixels.
  "configs/vit.py:imagenet_s16": 22_050_664 + 12 * 2 * 384 - 384,
  "configs/vit.py:imagenet_b16": 86_567_656 + 12 * 2 * 768 - (197 - 144) * 768,
  # big_vision's, with a dense layer before the head.
  "configs/vit.py:imagenet_b16_augreg": 86_567_656 - 768 + 768 * 769,
  # The published counts include the fixed position tables of encoder and decoder.
  "configs/mae.py:imagenet_b16": 111_907_840 - 197 * (768 + 512),
  "configs/mae.py:imagenet_l16": 329_541_888 - 197 * (1024 + 512),
  "configs/resnet.py:imagenet_r18": 11_689_512,
  "configs/resnet.py:imagenet_r50": 25_557_032,
  "configs/clip.py:vit_b32": 151_277_313,
  "configs/clip.py:vit_b16": 149_620_737,
  "configs/clip.py:vit_l14": 427_616_513,
  "configs/clip.py:siglip_b16": 203_155_970,
  "configs/resnet.py:imagenet_r50_8k": 25_557_032,
  # B/16 without head and class token; six blocks of two attentions and an MLP, and embeddings.
  "configs/caption.py:cap_b16": 85_798_656 - 2 * 768 + 6 * (
    8 * (768**2 + 768) + 8 * 768**2 + 5 * 768 + 3 * 2 * 768) + 2 * 768 + (32_000 + 64) * 768,
  "configs/bert.py:base": 109_514_298,  # Hugging Face's BertForMaskedLM of bert-base-uncased
  # Of the published DiT-XL/2's 675,129,632 the fixed position table is 256 x 1152.
  "configs/diffusion.py:imagenet_dit_xl2": 675_129_632 - 256 * 1152,
  "configs/diffusion.py:imagenet_sit_xl2": 675_129_632 - 256 * 1152 - 16 * (1152 + 1),
  "configs/diffusion.py:imagenet_dit_b4": 130_426_496,
}


@pytest.mark.parametrize("name", suite(variants(), keys=tuple(
  name for name in variants() if not re.search("_[blh](14|16|32)|_xl|_r50_v[12]|_8k", name))))
def test_every_recipe_builds(name):
  """All but the data: sections fit their functions, and the shapes of a step fit together."""
  config = recipe.load_config(name)
  if "name" not in config.model:  # the model is that of another run: tests/test_transfer.py
    assert name.startswith("configs/finetune.py") and "imagenet" not in name
    return
  size = 16 if name.endswith("smoke") else 32
  embedded = config.data.source.startswith("glyphs")
  latents = config.data.get("latents")
  shape = ((size, size, 1) if embedded else (1, 1, 1) if config.data.source.startswith("lines:")
           else (None, None, 4 if latents else 3))
  info = Info(shape, 62 if embedded else 1000, (), {"train": 1_281_167}, "")
  of_32k = name.endswith(("siglip_b16", "lit_b16", "cap_b16"))
  vocab_size = 32_000 if of_32k else 30_522 if name.startswith("configs/bert") else 49_408
  tokenizer = SimpleNamespace(vocab_size=vocab_size, context=config.data.get("context"), eos_id=1,
                              pad_id=0, mask_id=2, starts=1)
  config = recipe.fill_from_data(config, info, 1_281_167,
                                 tokenizer if config.data.get("tokenizer") else None)
  method, augment = recipe.make_method(config), recipe.make_augment(config)
  _, rate = recipe.make_optimizer(config, 1_281_167)
  recipe.check_evals(config.evals)
  (h, w), rows = config.model.image_size, config.data.batch_size
  features = image_features((h, w, shape[2]), 1000, "latent" if latents else "image",
                            text="tokenizer" in config.data)
  batch = make_spec(features, rows, [None], tokenizer, latents)
  key = jax.eval_shape(lambda: jax.random.key(0))
  batch = jax.eval_shape(lambda k, b: method.draw(k, augment.train(k, b)), key, batch)
  params, extra = jax.eval_shape(method.init, key, batch)
  loss, _ = jax.eval_shape(method.loss, params, extra, batch, key, 0)
  assert loss.shape == () and loss.dtype == "float32"
  assert all(x.dtype == "float32" for x in jax.tree.leaves(params))
  assert 0 <= float(rate(0)) <= float(rate(config.schedule.get("warmup_steps", 0)))
  if name in PARAMETERS:
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]
