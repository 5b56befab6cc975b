"""Starting from another run: what is taken, what fits other images, what is trained how fast."""

import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import suite

import evaluate
import train
from models import adapt, positions, vit
from trainer import checkpoints, depth, loop, optimizer, recipe, transfer

FAMILIES = ("mae", "vit", "moco", "clip")


@pytest.fixture(scope="module")
def runs(data_dir, smoke_run, tmp_path_factory):
  """name -> its smoke run, or one with the initial state: of another recipe, or of other fields."""
  root, made = tmp_path_factory.mktemp("runs"), {}

  def get(family, **overrides):
    if not overrides and family in ("mae", "vit", "clip"):
      return smoke_run(family)
    name = "_".join([family, *map(str, overrides.values())])
    if name not in made:
      config = recipe.load_config(f"configs/{family}.py:smoke", overrides)
      built = recipe.build(config, data_dir)
      made[name] = root / name
      loop.check_same_run(made[name], recipe.plain(built.config))
      store = checkpoints.Checkpoints(made[name])
      store.save(jax.jit(loop.initial_state(built))(), 1)
      store.finish()
      store.close()
    return made[name]
  return get


def build(data_dir, run, **overrides):
  """The recipe of a fine-tuning, and what it takes."""
  overrides = {"init": str(run), **overrides}
  built = recipe.build(recipe.load_config("configs/finetune.py:smoke", overrides), data_dir)
  state, _ = loop.abstract_state(built)
  return built, transfer.take(built.config, state, built.method, **built.config.init.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_image_network(runs, data_dir, family):
  built, taken = build(data_dir, runs(family), **{"optimizer.layer_decay": "1.0"})
  source = checkpoints.load_run(runs(family))
  part = {"mae": "encoder", "moco": "backbone", "clip": "image", "vit": ""}[family]
  there = source.params[part] if part else source.params
  for path, array in transfer._part(there, "").items():
    if not path.startswith("head/"):
      np.testing.assert_array_equal(taken.params[path], array)
  assert built.config.method.name == "supervised"
  state = jax.jit(loop.initial_state(built))()
  new = transfer.put(state, taken, built.method)
  chex.assert_trees_all_equal(new.params["head"], state.params["head"])
  assert sum(became == "new" for _, _, became in taken.rows) == 2
  assert {path.split("/")[0] for path, _, became in taken.rows if became == "ignored"} == {
    "mae": {"decoder"}, "moco": {"projector"}, "vit": {"head"},
    "clip": {"image_projection", "logit_scale", "text", "text_projection"}}[family]

  image = np.random.default_rng(0).normal(size=(3, 16, 16, 1)).astype(np.float32)
  features = built.method.predict["features"](new.params, new.extra, {"image": image}, None)
  expected = source.method.predict["features"](source.params, source.extra, {"image": image}, None)
  np.testing.assert_allclose(features, expected, atol=1e-6)
  if family == "moco":
    chex.assert_trees_all_equal(new.extra["batch_stats"],
                                source.extra["stats"]["batch_stats"]["backbone"])


@pytest.mark.parametrize("kind", suite(["sincos2d", "learned"], 1))
def test_another_image_size_resamples_positions(runs, data_dir, kind):
  run = runs("vit", **{"model.positions": kind, "model.patch": "4"})
  source = checkpoints.load_run(run)
  table = (positions.FIXED[kind]((4, 4), 32) if kind != "learned"
           else source.params["position"]["table"])
  _, same = build(data_dir, run, **{"init.fresh": "none"})
  np.testing.assert_array_equal(same.params["position/table"], table)
  _, larger = build(data_dir, run, **{"augment.image_size": "24"})
  np.testing.assert_array_equal(larger.params["position/table"],
                                positions.resample(table, (4, 4), (6, 6)))
  assert ("position/table", "(36, 32)", "grid from 4x4 to 6x6") in larger.rows
  # At its own size the new network says exactly what the old one says.
  built, taken = build(data_dir, run, **{"init.fresh": "none"})
  state = transfer.put(jax.jit(loop.initial_state(built))(), taken, built.method)
  image = np.random.default_rng(0).normal(size=(3, 16, 16, 1)).astype(np.float32)
  logits = [jax.jit(method.predict["logits"])(params, {}, {"image": image}, None) for method, params
            in ((built.method, state.params), (source.method, source.params))]
  np.testing.assert_array_equal(*logits)


def test_fixed_positions_are_those_of_the_size_they_were_made_for():
  """A network run on larger images stretches its grid; it does not continue it."""
  module = vit.Positions("sincos2d", (4, 4), 32)
  table = np.asarray(module.apply({}, (8, 8))).reshape(8, 8, 32)
  np.testing.assert_allclose(table, np.asarray(positions.resample(
    positions.FIXED["sincos2d"]((4, 4), 32), (4, 4), (8, 8))).reshape(8, 8, 32), atol=1e-6)
  np.testing.assert_array_equal(module.apply({}, (4, 4)), positions.FIXED["sincos2d"]((4, 4), 32))


def test_channels_and_patches_fit_other_images():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
  grey = rng.normal(size=(4, 4, 1)).astype(np.float32)
  for count in (1, 2, 4):
    new = adapt.channels(kernel, count)
    np.testing.assert_allclose(np.tensordot(np.repeat(grey, count, -1), new, 3),
                               np.tensordot(np.repeat(grey, 3, -1), kernel, 3), rtol=2e-5)
  # Scaled up bilinearly, a patch gives what it gave: <w', B x> = <w, x> (2212.08013 eq. 3).
  for size in (6, 7, 8):
    x = rng.normal(size=(4, 4, 3))
    larger = jax.image.resize(jnp.asarray(x), (size, size, 3), "bilinear")
    np.testing.assert_allclose(np.tensordot(larger, adapt.patch_size(kernel, size), 3),
                               np.tensordot(x, kernel, 3), rtol=1e-4, atol=1e-4)


def test_a_grey_network_on_colours_and_coarser_patches(runs, data_dir, tmp_path):
  """RGB of 24 pixels in patches of 12 for a network of grey 16 pixels in patches of 8."""
  from PIL import Image
  rng = np.random.default_rng(0)
  for name in "ab":
    (tmp_path / "rgb" / name).mkdir(parents=True)
    for i in range(8):
      Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(
        tmp_path / "rgb" / name / f"{i}.png")
  built, taken = build(data_dir, runs("vit"), **{
    "data.source": f"folder:{tmp_path / 'rgb'}", "model.patch": "12", "data.batch_size": "8"})
  became = {path: what for path, _, what in taken.rows}
  assert became["embed/projection/kernel"] == "patch from 8 to 12 pixels"
  assert taken.params["embed/projection/kernel"].shape == (12 * 12 * 3, 32)
  assert built.config.model.num_classes == 2 and built.config.model.channels == 3


def test_rates_by_depth_are_beits():
  params = {"embed": {"kernel": jnp.ones((2, 2))}, "cls": jnp.ones(2), "head": jnp.ones(3),
            "transformer": {"blocks": {"up": jnp.ones((3, 2, 2))}, "norm": jnp.ones(2)}}
  scales = depth.by_depth(params, 0.5, None)
  assert scales["embed"]["kernel"] == scales["cls"] == 0.5**4
  np.testing.assert_allclose(scales["transformer"]["blocks"]["up"], [0.5**3, 0.5**2, 0.5])
  assert scales["head"] == scales["transformer"]["norm"] == 1
  # Two optimizers of their own rates make the same step as one with layer_decay.
  make = lambda lr, **fields: optimizer.make(  # noqa: E731
    schedule=lambda step: 1.0, batch_size=1, lr=lr, weight_decay=0.1, decay="", **fields)[0]
  grads = jax.tree.map(lambda x: 0.3 * x, params)
  tx = make(0.1, layer_decay=0.5)
  updates, _ = tx.update(grads, tx.init(params), params)
  for scale, leaf in ((0.5**4, lambda t: t["cls"]), (0.5**3, lambda t: t["transformer"]["blocks"][
      "up"][0]), (0.5, lambda t: t["transformer"]["blocks"]["up"][2]), (1.0, lambda t: t["head"])):
    alone = make(0.1 * scale)
    expected, _ = alone.update(leaf(grads), alone.init(leaf(params)), leaf(params))
    np.testing.assert_allclose(leaf(updates), expected, rtol=1e-5)


@pytest.mark.parametrize("tuned", suite([0, 1, 2], 1))
def test_only_the_last_blocks_are_tuned(runs, data_dir, tuned):
  """Parameters and gradients before them stay zero changes; the clip norm does not see them."""
  built, taken = build(data_dir, runs("mae"), **{
    "optimizer.tuned_blocks": str(tuned), "schedule.warmup_steps": "0"})
  state = transfer.put(jax.jit(loop.initial_state(built))(), taken, built.method)
  state = state._replace(params={**state.params, "head": jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape), state.params["head"])})
  before = jax.tree.map(np.array, state.params)
  stop = optimizer.stop_frozen(built.config.optimizer)
  batch = next(built.data.train(0, 1))
  ready = built.augment.eval({**batch})
  key = jax.random.key(0)
  loss = lambda p: built.method.loss(stop(p), state.extra, ready, key, 0)[0]  # noqa: E731
  grads = jax.jit(jax.grad(loss))(state.params)
  updates, _ = jax.jit(built.tx.update)(grads, state.opt, state.params)
  blocks = updates["transformer"]["blocks"]
  moved = [any(np.any(np.asarray(x[i])) for x in jax.tree.leaves(blocks)) for i in range(2)]
  assert moved == [i >= 2 - tuned for i in range(2)]
  assert np.any(updates["head"]["kernel"]) and np.any(updates["transformer"]["norm"]["scale"])
  for name in ("embed", "cls", "cls_position", "position"):
    chex.assert_trees_all_equal(updates[name], jax.tree.map(np.zeros_like, before[name]))
    chex.assert_trees_all_equal(grads[name], jax.tree.map(np.zeros_like, before[name]))


def test_fine_tuning_by_the_command(runs, data_dir, tmp_path, capsys):
  """From --config.init=DIR to an evaluation; going on needs no second taking; larger images."""
  source = shutil.copytree(runs("mae"), tmp_path / "mae")
  flags = ["--config=configs/finetune.py:smoke", f"--config.init={source}",
           f"--workdir={tmp_path / 'run'}", f"--data_dir={data_dir}"]
  assert train.main(flags) == 0
  out = capsys.readouterr().out
  assert "decoder" in out and "fixed sincos2d become learned" in out
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["model"]["name"] == "vit" and config["model"]["width"] == 32
  shutil.rmtree(source / "checkpoints")  # a run goes on without its source's weights
  assert train.main(flags) == 0
  assert "became" not in capsys.readouterr().out
  shutil.rmtree(source)
  assert evaluate.main([f"--workdir={tmp_path / 'run'}", f"--data_dir={data_dir}", "--json",
                        "--config.augment.image_size=24", "--config.model.patch=6"]) == 0
  assert "classification/top1" in json.loads(capsys.readouterr().out.splitlines()[-1])
  # A probe: nothing but the head moves, and the statistics of its norm.
  probe = tmp_path / "probe"
  assert train.main([flags[0], f"--config.init={runs('mae')}", f"--workdir={probe}", flags[3],
                     "--config.model.probe_norm=true",
                     "--config.optimizer.layer_decay=1.0",
                     "--config.optimizer.frozen=^(?!head)"]) == 0
  run, source = checkpoints.load_run(probe), checkpoints.load_run(runs("mae"))
  chex.assert_trees_all_equal(run.params["transformer"], source.params["encoder"]["transformer"])
  assert np.any(run.params["head"]["kernel"]) and np.any(
    run.extra["batch_stats"]["head_norm"]["mean"])


@pytest.mark.parametrize("flags,message", [
  (["--config.init="], "config.init.run is not given"),
  (["--config.init=nowhere"], "nowhere holds no run"),
  (["--config.init={empty}"], "holds no run"),
  (["--config.init={mae}", "--config.model.width=64"], r"cls \(1, 1, 64\): \(1, 1, 32\)"),
  (["--config.init={mae}", "--config.model.depth=3"], r"blocks.*\(3, .*\(2, "),
  (["--config.init={mae}", "--config.model.registers=2"], r"registers .*missing"),
  (["--config.init={mae}", "--config.init.frehs=head"], "did you mean 'fresh'"),
  (["--config.init={mae}", "--config.init.source=encodr"], "missing"),
  (["--config.init={moco}"], "need a model of one stack of blocks"),
  (["--config.init={mae}", "--config.optimizer.tuned_blocks=3"], "depths here: .2"),
  (["--config.init={mae}", "--config.optimizer.layer_decay=1.5"], "layer_decay = 1.5"),
  (["--config.init={diffusion}"], "model dit has no image network"),
])
def test_what_does_not_fit_is_named(runs, data_dir, tmp_path, capsys, flags, message):
  (tmp_path / "empty").mkdir()
  known = {"empty": tmp_path / "empty",
           **{name: runs(name) for name in ("mae", "moco", "diffusion")
              if any("{" + name + "}" in flag for flag in flags)}}
  flags = [flag.format(**known) for flag in flags]
  code = train.main(["--config=configs/finetune.py:smoke", f"--workdir={tmp_path / 'run'}",
                     f"--data_dir={data_dir}", *flags])
  assert code == 1 and re.search(message, capsys.readouterr().err)
  assert not (tmp_path / "run").exists()
