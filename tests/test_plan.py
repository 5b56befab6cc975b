"""plan.py: what it counts in compiled programs, and what meshes must and must not move."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiers import suite

import plan as command
from input_pipeline import stand_in
from trainer import loop, plan, recipe, sharding


def compiled(function, mesh, *specs, out=None):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
          for shape, spec in specs]
  out = NamedSharding(mesh, out or PartitionSpec())
  return jax.jit(function, out_shardings=out).lower(*args).compile().as_text()


def test_collectives_of_known_programs():
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
  split, whole = PartitionSpec("x"), PartitionSpec()
  reduce = compiled(lambda a: a.sum(0), mesh, ((64, 100), split))
  assert plan.collectives(reduce) == {"all-reduce": {"count": 1, "bytes": 400}}
  gather = compiled(lambda a: a * 2, mesh, ((64, 100), split))
  assert plan.collectives(gather) == {"all-gather": {"count": 1, "bytes": 25_600}}
  assert plan.collectives(compiled(lambda a: a * 2, mesh, ((64, 100), whole))) == {}


def test_a_loop_counts_as_often_as_it_runs():
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"),
                     out_specs=PartitionSpec("x"))
  def looped(a):
    return jax.lax.scan(lambda a, _: (jnp.sin(jax.lax.psum(a, "x")) * a, None), a, length=7)[0]

  text = compiled(looped, mesh, ((64, 100), PartitionSpec("x")), out=PartitionSpec("x"))
  assert plan.collectives(text) == {"all-reduce": {"count": 7, "bytes": 7 * 8 * 100 * 4}}


def test_loop_without_a_noted_trip_count():
  text = """
%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %cp = (bf16[3]{0}, bf16[3]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  %rs = bf16[4,2]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
}
"""
  assert plan.collectives(text) == {"all-reduce": {"count": 12, "bytes": 12 * 32},
                                    "all-gather": {"count": 12, "bytes": 12 * 32},
                                    "collective-permute": {"count": 12, "bytes": 12 * 6},
                                    "reduce-scatter": {"count": 12, "bytes": 12 * 16 * 4}}


def small(mesh, name):
  # Muon's matrices are gathered once more, whole: AdamW is what is looked at here.
  extra = {"model.decoder_heads": "8", "model.decoder_width": "64"} if "mae" in name else {
    "optimizer.name": "adamw", "optimizer.ns_steps": "none"}
  config = recipe.load_config(name, {
    "model.scan": "true", "model.width": "64", "model.heads": "8", "model.mlp_dim": "128",
    "model.depth": "4", "data.batch_size": "64", **extra,
    **{f"mesh.{axis}": str(size) for axis, size in mesh.items()}})
  data = stand_in.stand_in(config.data.source, 64)
  return recipe.build(config, data=data)


@pytest.mark.parametrize("name", suite(["configs/vit.py:smoke", "configs/mae.py:smoke"], 0))
def test_data_parallel_moves_the_gradients_once(name):
  built = small({"data": 8}, name)
  step, state = plan.compile_step(built)
  moved = plan.collectives(step.as_text())
  gradients = 4 * sum(x.size for x in jax.tree.leaves(state.params))
  assert set(moved) == {"all-reduce"}
  assert 0.95 * gradients <= moved["all-reduce"]["bytes"] <= gradients + 4096


@pytest.mark.parametrize("name", suite(["configs/vit.py:smoke", "configs/mae.py:smoke"], 0))
def test_fsdp_gathers_the_parameters_twice(name):
  built = small({"data": 1, "fsdp": 8}, name)
  step, state = plan.compile_step(built)
  moved = plan.collectives(step.as_text())
  parameters = 4 * sum(x.size for x in jax.tree.leaves(state.params))
  assert moved["all-gather"]["bytes"] <= 2.05 * parameters
  # The CPU compiler has no reduce-scatter: it reduces all and keeps a part.
  assert moved["all-reduce"]["bytes"] <= 1.05 * parameters
  assert moved.get("all-to-all", {"bytes": 0})["bytes"] <= 0.02 * parameters
  held = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in
             jax.tree.leaves((state.params, state.opt)))
  everything = sum(x.size for x in jax.tree.leaves((state.params, state.opt)))
  rest = sum(x.size for x in jax.tree.leaves((state.params, state.opt))
             if "fsdp" not in str(x.sharding.spec))
  assert held <= 1.05 / 8 * everything + rest


def test_the_command(capsys):
  assert command.main(["--config=configs/mae.py:smoke", "--topology=cpu:4", "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert result["parameters"] == 25_136 and result["devices"] == 4
  assert result["bytes_per_device"] > 4 * 3 * 25_136 and result["fits"] is None


@pytest.mark.slow
def test_the_layout(capsys):
  assert command.main(["--config=configs/vit.py:smoke", "--topology=cpu:8", "--layout",
                       "--config.mesh.fsdp=8"]) == 0
  shown = capsys.readouterr().out
  assert "transformer/blocks/mlp/up/kernel" in shown and "'fsdp'" in shown


def test_flops_of_vit_b16():
  """17.6 GFLOPs (multiply-adds counted once) forward an image: DeiT's table, arXiv 2012.12877."""
  config = recipe.load_config("configs/vit.py:imagenet_b16_augreg", {"data.batch_size": "8"})
  data = stand_in.stand_in(config.data.source, 8, 224, 3, 1000)
  built = recipe.build(config, data=data, devices=jax.devices()[:1])
  state, _ = loop.abstract_state(built)
  assert loop.model_flops(built, state) / (3 * 2 * 8) == pytest.approx(17.58e9, rel=0.01)


@pytest.mark.parametrize("flags,message", [
  (["--topology=v5x:4x4"], "expected cpu:N, or one of v4"),
  (["--topology=v5e"], "with a shape"),
  (["--topology=cpu:8", "--config.mesh.data=3"], "must multiply to the 8 devices"),
  (["--topology=cpu:8", "--config.data.source=tfds:imagenet2012"], "augment.image_size")])
def test_errors(flags, message, capsys):
  assert command.main(["--config=configs/mae.py:smoke", *flags]) == 1
  assert message in capsys.readouterr().err


def test_chips_have_plausible_figures():
  for chip in plan.CHIPS.values():
    assert 1e14 < chip.flops < 1e15 and chip.memory >= 16 * 2**30
    assert 100 < chip.flops / chip.bandwidth < 1000


def test_layout_lists_every_parameter():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  tree = {"blocks": {"mlp": {"up": {"kernel": jnp.zeros((3, 8, 16))}}}, "cls": jnp.zeros((1, 1, 5))}
  assert sharding.layout(tree, mesh) == [
    ("blocks/mlp/up/kernel", (3, 8, 16), PartitionSpec(None, "fsdp", "tensor")),
    ("cls", (1, 1, 5), PartitionSpec(None, None, None))]
