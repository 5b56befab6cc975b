"""optimizer.groups: paths with a rate, decay, schedule or optimizer of their own, or none."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from runs import broken_off

import train
from methods.method import Method, Phase
from trainer import checkpoints, fields, groups, help, loop, optimizer, recipe, stored
from trainer.state import make_init, make_step

SHAPES = {"encoder/blocks/up/kernel": (2, 3, 4), "encoder/blocks/up/bias": (2, 4),
          "head/kernel": (4, 2), "predictor/kernel": (4, 4), "predictor/bias": (4,)}
COSINE = optax.cosine_decay_schedule(1.0, 3)


def tree(seed):
  rng = np.random.default_rng(seed)
  return unflatten_dict({name: rng.normal(size=shape).astype(np.float32)
                         for name, shape in SHAPES.items()}, sep="/")


def make(**section):
  return optimizer.make(**{"schedule": COSINE, "batch_size": 8, "total_steps": 3, "lr": 0.1,
                           **section})


def moved(tx, params=None, steps=3):
  """Parameters after some steps on set gradients, {path: array}, and the last state."""
  params = tree(0) if params is None else params
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(steps):
    grads = jax.tree.map(lambda _, g: g, params, tree(t + 1)) if len(params) == 3 else {
      name: tree(t + 1)[name] for name in params}
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return flatten_dict(jax.device_get(params), sep="/"), state


def pieces(of_predictor, of_rest):
  """The same with one optax optimizer on the predictor and another one on the rest."""
  start = tree(0)
  own, _ = moved(of_predictor, {"predictor": start["predictor"]})
  rest, _ = moved(of_rest, {name: start[name] for name in ("encoder", "head")})
  return own | rest


def kernels(params):
  return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


@pytest.mark.parametrize("said,own", [
  (dict(schedule=dict(name="constant")), optax.adamw(0.1, weight_decay=0.2, mask=kernels)),
  (dict(lr=0.3, weight_decay=0.0), optax.adamw(lambda t: 0.3 * COSINE(t), weight_decay=0.0)),
  (dict(base_lr=0.64), optax.adamw(lambda t: 0.02 * COSINE(t), weight_decay=0.2, mask=kernels)),
  (dict(weight_decay=0.5, decay="bias$"), optax.adamw(
    lambda t: 0.1 * COSINE(t), weight_decay=0.5, mask=lambda params: jax.tree.map(
      lambda decays: not decays, kernels(params)))),
  (dict(name="sgd", momentum=0.5, weight_decay=0.0),
   optax.sgd(lambda t: 0.1 * COSINE(t), momentum=0.5)),
  (dict(b1=0.5), optax.adamw(lambda t: 0.1 * COSINE(t), b1=0.5, b2=0.95, weight_decay=0.2,
                             mask=kernels)),
  (dict(schedule=dict(name="linear", warmup_steps=1), lr=0.2), optax.adamw(
    lambda t: 0.2 * jnp.where(t < 1, 0.0, 1 - (t - 1) / 2), weight_decay=0.2, mask=kernels)),
], ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_a_group_is_an_optimizer_of_its_own(said, own):
  """What a group does not say is the rest's, whose own moves stay what they were."""
  b2 = {"b2": 0.95} if "b1" in said else {}
  tx, _ = make(groups={"predictor": {"path": "^predictor/", **said}}, weight_decay=0.2, **b2)
  expected = pieces(own, optax.adamw(lambda t: 0.1 * COSINE(t), weight_decay=0.2, mask=kernels,
                                     **b2))
  chex.assert_trees_all_close(moved(tx)[0], expected, rtol=1e-6, atol=1e-6)
  alike = moved(make(weight_decay=0.2, **b2)[0])[0]
  assert np.abs(alike["predictor/kernel"] - expected["predictor/kernel"]).max() > 1e-3


def test_options_are_inherited_by_the_same_optimizer_alone():
  """Adam's b1 is none of sgd's, and lion's is another thing."""
  for name, own in (("lion", optax.lion(0.1, weight_decay=0.0)),
                    ("sgd", optax.sgd(0.1, momentum=0.9))):
    tx, _ = make(schedule=lambda t: 1.0, b1=0.5, groups={"p": dict(path="^predictor", name=name)})
    expected = pieces(own, optax.adamw(0.1, b1=0.5, weight_decay=0.0))
    chex.assert_trees_all_close(moved(tx)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_frozen_group_is_optimizer_frozen_bit_for_bit(clip_norm):
  said = dict(name="lamb", weight_decay=0.1, clip_norm=clip_norm)
  pattern = dict(said, frozen="^predictor/")
  group = dict(said, groups={"predictor": dict(path="^predictor/", frozen=True)})
  (one, state), (other, other_state) = (moved(make(**section)[0]) for section in (pattern, group))
  chex.assert_trees_all_equal(one, other)
  chex.assert_trees_all_equal(state, other_state)
  assert set(state.inner_states) == {"trained", "frozen"}
  np.testing.assert_array_equal(one["predictor/kernel"], tree(0)["predictor"]["kernel"])
  assert np.any(one["head/kernel"] != tree(0)["head"]["kernel"])
  gradient = jax.grad(lambda params: sum(map(jnp.sum, jax.tree.leaves(
    optimizer.stop_frozen(group)(params)))))(tree(0))
  assert {path: bool(x.any()) for path, x in flatten_dict(gradient, sep="/").items()} == {
    path: not path.startswith("predictor") for path in SHAPES}


def test_the_clip_norm_is_of_all_groups_but_not_of_what_is_frozen():
  groups = {"predictor": dict(path="^predictor/", lr=0.3), "still": dict(path="^head", frozen=True)}
  tx, _ = make(name="sgd", momentum=0.0, clip_norm=0.5, schedule=lambda t: 1.0, groups=groups)
  grads = tree(1)
  updates = flatten_dict(jax.jit(tx.update)(grads, tx.init(tree(0)), tree(0))[0], sep="/")
  grads = flatten_dict(grads, sep="/")
  norm = np.sqrt(sum(np.square(np.float64(g)).sum() for path, g in grads.items()
                     if not path.startswith("head")))
  assert norm > 1
  for path, update in updates.items():
    rate = 0.3 if path.startswith("predictor") else 0.0 if path.startswith("head") else 0.1
    np.testing.assert_allclose(update, -rate * 0.5 / norm * grads[path], rtol=1e-5)


def test_rates_by_depth_multiply_those_of_groups():
  groups = {"bias": dict(path="bias$", lr=0.3)}
  plain, deep = (make(name="sgd", momentum=0.0, schedule=lambda t: 1.0, groups=groups, **fields)[0]
                 for fields in ({}, dict(layer_decay=0.5)))
  updates = [flatten_dict(tx.update(tree(1), tx.init(tree(0)), tree(0))[0], sep="/")
             for tx in (plain, deep)]
  for path, update in updates[0].items():
    scale = np.array([0.25, 0.5]).reshape(2, *[1] * (update.ndim - 1)) if "blocks" in path else 1
    np.testing.assert_allclose(updates[1][path], update * scale, rtol=1e-6)
    assert np.any(update)


def test_of_several_that_match_the_first_by_name_has_it():
  groups = {"b": dict(path="kernel", lr=0.5), "a": dict(path="^predictor/", lr=0.2)}
  tx, _ = make(name="sgd", momentum=0.0, schedule=lambda t: 1.0, groups=groups)
  updates, _ = tx.update(jax.tree.map(np.ones_like, tree(0)), tx.init(tree(0)), tree(0))
  rates = {path: -float(np.ravel(x)[0]) for path, x in flatten_dict(updates, sep="/").items()}
  assert rates == pytest.approx({"predictor/kernel": 0.2, "predictor/bias": 0.2,
                                 "head/kernel": 0.5, "encoder/blocks/up/kernel": 0.5,
                                 "encoder/blocks/up/bias": 0.1})


def test_rates_that_are_logged():
  _, rate = make(groups={
    "predictor": dict(path="^predictor/", schedule=dict(name="constant")),
    "head": dict(path="^head/", base_lr=3.2), "decays": dict(path="up/bias", weight_decay=0.1),
    "still": dict(path="up/kernel", lr=0.2, frozen=True)})
  assert set(rate.groups) == {"predictor", "head"}
  np.testing.assert_allclose([rate(2), rate.groups["predictor"](2), rate.groups["head"](2)],
                             [0.025, 0.1, 0.025], rtol=1e-5)


def test_groups_in_phases():
  """A group that is in no part of a phase is left alone there; the steps are the phase's."""
  def loss(params, extra, batch, rng, step):
    return sum(map(jnp.sum, jax.tree.leaves(params))), (extra, {})

  method = Method(lambda *_: (tree(0), {}), None, {}, phases={
    "a": Phase(loss, "^(encoder|head)", 2), "b": Phase(loss, "^predictor")})
  tx, _ = make(name="sgd", momentum=0.0, phases=method.turns, groups={
    "head": dict(path="^head", schedule=dict(name="linear")), "bias": dict(path="bias", lr=0.2)})
  state = make_init(method, tx, lambda batch: batch, {}, 0, False)()
  step = jax.jit(make_step(method, tx, lambda rng, batch: batch, seed=0))
  for _ in range(2):
    state, _ = step(state, {"x": np.zeros(4)})
  after, cosine, linear = flatten_dict(state.params, sep="/"), 1 + 0.75, 1 + 2 / 3
  for path, expected in {"predictor/kernel": 0.1 * cosine, "predictor/bias": 0.2 * cosine,
                         "head/kernel": 2 * 0.1 * linear, "encoder/blocks/up/bias": 0.4 * cosine,
                         "encoder/blocks/up/kernel": 0.2 * cosine}.items():
    np.testing.assert_allclose(flatten_dict(tree(0), sep="/")[path] - after[path], expected,
                               rtol=1e-4)


# --- By the command -------------------------------------------------------------------------------

FLAGS = ["--config=configs/vit.py:smoke", "--config.log_every_steps=1",
         "--config.evals.classification=none"]


@pytest.mark.slow
def test_a_run_with_groups_goes_on_bit_for_bit(data_dir, tmp_path):
  flags = [*FLAGS, f"--data_dir={data_dir}", "--config.checkpoint.every_steps=2",
           "--config.checkpoint.keep=none", "--config.optimizer.groups.head.path=^head/",
           "--config.optimizer.groups.head.schedule.name=constant",
           "--config.optimizer.groups.norms.path=norm/(scale|bias)$",
           "--config.optimizer.groups.norms.name=sgd",
           "--config.optimizer.groups.still.path=^embed",
           "--config.optimizer.groups.still.frozen=true"]
  workdir, rows = broken_off(flags, tmp_path)
  assert len(rows) == 6 and len({row["train/lr"] for row in rows}) > 2
  assert len({row["train/lr_head"] for row in rows}) == 1 and "train/lr_norms" not in rows[0]
  whole = checkpoints.load_run(workdir)
  start = recipe.build(stored.load_config(workdir), data_dir)
  before = jax.jit(loop.initial_state(start))().params
  distance = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole.params, jax.device_get(before))
  assert max(jax.tree.leaves(distance["embed"])) < 1e-6 < 1e-4 < min(
    jax.tree.leaves([distance["head"], distance["transformer"]["blocks"]["mlp"]["up"]]))


def test_durations_of_a_groups_schedule_are_converted():
  config = recipe.load_config("configs/vit.py:smoke", {
    "total_steps": "40", "optimizer.groups.head.path": "^head/", "data.batch_size": "16",
    "optimizer.groups.head.schedule.name": "constant",
    "optimizer.groups.head.schedule.warmup_examples": "160"})
  _, rate = recipe.make_optimizer(config, 1000)
  peak = float(rate.groups["head"](39))
  np.testing.assert_allclose([float(rate.groups["head"](t)) / peak for t in (0, 5, 10, 20)],
                             [0, 0.5, 1, 1], atol=1e-6)


HEAD = "optimizer.groups.head"


@pytest.mark.parametrize("flags,message", [
  ({f"{HEAD}.lr": "1"}, "config.optimizer.groups.head: missing a required"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.weight_decy": "1"},
   "config.optimizer.groups.head.weight_decy: unknown field; did you mean 'weight_decay'"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.lr": "1", f"{HEAD}.base_lr": "1"},
   "optimizer.groups.head: give lr or base_lr, not both"),
  ({f"{HEAD}.path": "^haed/"},
   "optimizer.groups.head.path = '^haed/': matches no parameter; they are"),
  ({f"{HEAD}.path": "^head/", "optimizer.frozen": "head"},
   "optimizer.groups.head.path = '^head/': all that it matches is taken by optimizer.frozen = "),
  ({f"{HEAD}.path": "^head/", "optimizer.groups.any.path": "^he"},
   "optimizer.groups.head.path = '^head/': all that it matches is taken by optimizer.groups.any"),
  ({f"{HEAD}.path": ".", f"{HEAD}.frozen": "true"},
   "optimizer.groups.head.path = '.': must match some parameters and not all"),
  ({f"{HEAD}.path": "("}, "optimizer.groups.head.path = '(': no regular expression"),
  ({"optimizer.frozen": "*"}, "optimizer.frozen = '*': no regular expression"),
  ({f"{HEAD}.path": "3"}, "config.optimizer.groups.head.path = 3: expected str"),
  ({f"{HEAD}": "3"}, "config.optimizer.groups.head = 3: expected dict"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.name": "sdg"}, "head.name = 'sdg': did you mean 'sgd'"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.name": "sgd", f"{HEAD}.b1": "0.5"},
   "optimizer.groups.head.b1: sgd takes momentum, nesterov"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.schedule.nmae": "constant"},
   "config.optimizer.groups.head.schedule.nmae: unknown field; did you mean 'name'"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.schedule.name": "cosin"},
   "config.optimizer.groups.head.schedule.name = 'cosin': did you mean 'cosine'"),
  ({f"{HEAD}.path": "^head/", f"{HEAD}.schedule.warmup_epochs": "-1"},
   "optimizer.groups.head.schedule: warmup_epochs = -1: expected a number of epochs"),
  ({"optimizer.groups": "3"}, "config.optimizer.groups = 3: expected dict or None"),
  ({"optimizer.groups.a/b.path": "x"}, "config.optimizer.groups.a/b: expected a name"),
])
def test_what_cannot_be_is_an_error_before_compiling(flags, message, data_dir, tmp_path, capsys):
  code = train.main([*FLAGS, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}",
                     *(f"--config.{name}={value}" for name, value in flags.items())])
  error = capsys.readouterr().err.replace("\n", " ")
  assert code == 1 and error.startswith("error: ")
  assert message in error
  assert not (tmp_path / "run").exists()


def test_help_and_fields():
  for name, field in fields.accepted(groups.group).items():
    assert field.hint is not inspect.Parameter.empty, name
    assert help.help_lines(field.owner).get(field.own_name), name
  said = " ".join(help.help_of("configs/vit.py:smoke").split())
  assert "--config.optimizer.groups.NAME.path [str] regular expression" in said
  assert "--config.optimizer.groups.NAME.momentum" in said
