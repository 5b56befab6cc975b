"""What no forward pass shows: initial scales, how noise is spread, what rounding takes away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiers import suite

from input_pipeline.splits import with_parts
from interop import formats
from interop.published import FORMATS
from models import bert, dit, mae, resnet, transformer, vit

WIDE = dict(image_size=32, channels=3, patch=8, width=96, depth=2, heads=4, mlp_dim=384)


def initial(model, *args):
  return flatten_dict(jax.jit(model.init)(jax.random.key(0), *args)["params"], sep="/")


def spread(x):
  return float(np.std(np.asarray(x, np.float64)))


# --- Where parameters start -----------------------------------------------------------------------

def test_a_vit_starts_as_timm_starts_it():
  """trunc_normal_(std=.02) of timm is cut at +-2, a hundred deviations: normal. PyTorch's
  convolutions are uniform within 1 / sqrt(fan in)."""
  model = vit.make(**WIDE, num_classes=50, kernel_init="normal", patch_init="torch",
                   head_init=0.02, class_position=False, layer_scale=1e-4)
  params = initial(model, jnp.zeros((1, 32, 32, 3)))
  assert "cls_position" not in params
  for name in ("transformer/blocks/attention/qkv_kernel", "transformer/blocks/mlp/up/kernel",
               "transformer/blocks/mlp/down/kernel", "transformer/blocks/attention/out/kernel",
               "head/kernel"):
    np.testing.assert_allclose(spread(params[name]), 0.02, rtol=0.03, err_msg=name)
  assert np.abs(params["transformer/blocks/mlp/up/kernel"]).max() > 0.06  # not cut at two
  bound = (8 * 8 * 3) ** -0.5
  kernel = np.abs(params["embed/projection/kernel"])
  assert 0.99 * bound < kernel.max() <= bound
  np.testing.assert_allclose(spread(kernel), bound / 12**0.5, rtol=0.03)  # of |uniform|


def test_moco_v3s_patch_projection_is_xavier_and_its_attention_has_fans_of_its_own():
  model = vit.make(**WIDE, patch_init="xavier")
  params = initial(model, jnp.zeros((1, 32, 32, 3)))
  bound = (6 / (3 * 8 * 8 + 96)) ** 0.5  # vits.py of facebookresearch/moco-v3
  assert 0.99 * bound < np.abs(params["embed/projection/kernel"]).max() <= bound
  bound = (6 / (96 + 96)) ** 0.5
  assert 0.99 * bound < np.abs(params["transformer/blocks/attention/qkv_kernel"]).max() <= bound


@pytest.mark.parametrize("std", suite([0.0, 0.01, 2e-5], 1))
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_head_starts_at_its_own_scale(family, std):
  model = vit.make(**WIDE, num_classes=200, head_init=std) if family == "vit" else resnet.make(
    variant="18", image_size=32, channels=3, num_classes=200, head_init=std, stem="small",
    depths=(1, 1), widths=(8, 96))
  head = initial(model, jnp.zeros((1, 32, 32, 3)))["head/kernel"]
  np.testing.assert_allclose(spread(head), std, rtol=0.05, atol=1e-12)


def test_augreg_has_a_tanh_layer_before_its_head():
  model = vit.make(**WIDE, num_classes=5, pre_logits=24, head_init=0.3, position_init=96**-0.5,
                   token_init=0.0, class_position=False)
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  params = initial(model, x)
  assert not np.any(params["cls"])
  np.testing.assert_allclose(spread(params["position/table"]), 96**-0.5, rtol=0.1)
  logits, out = jax.jit(model.apply)({"params": unflatten_dict(params, sep="/")}, x)
  dense = {name: np.float64(params[name]) for name in params}
  hidden = np.tanh(np.float64(out["features"]) @ dense["representation/kernel"]
                   + dense["representation/bias"])
  np.testing.assert_allclose(logits, hidden @ dense["head/kernel"], rtol=2e-4, atol=1e-5)
  assert out["features"].shape == (2, 96)


def test_bert_starts_at_002_cut_at_two_deviations():
  model = bert.make(vocab_size=400, context=64, eos_id=1, pad_id=0, width=96, depth=2, heads=4)
  params = initial(model, jnp.zeros((1, 64), jnp.int32))
  tables = {name: x for name, x in params.items()
            if name.endswith(("kernel", "embedding", "position", "segment"))}
  assert len(tables) == 8
  for name, x in tables.items():
    assert np.abs(x).max() <= 0.04, name
    if x.size > 1000:  # of a normal cut at two deviations 0.8796 of the spread is left
      np.testing.assert_allclose(spread(x), 0.02 * 0.8796, rtol=0.05, err_msg=name)


def test_a_decoder_of_any_mlp():
  fields = dict(WIDE, depth=1, decoder_width=32, decoder_depth=1, decoder_heads=2)
  order = jnp.arange(16).reshape(1, -1)
  for given, expected in ((None, 128), (48, 48)):
    params = initial(mae.make(**fields, decoder_mlp_dim=given), jnp.zeros((1, 32, 32, 3)),
                     order[:, :4], order)
    assert params["decoder/transformer/blocks/mlp/up/kernel"].shape == (1, 32, expected)


# --- Drop path ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,expected", [
  ("linear", [0, 0.1, 0.2, 0.3]), ("uniform", [0.3, 0.3, 0.3, 0.3])])
def test_how_drop_path_is_spread(name, expected):
  """How often each block leaves an example as it was, of 4,000; branches give exactly 1."""
  n, depth = 4000, 4
  model = transformer.Transformer(depth, 1, 4, drop_path=0.3, drop_path_spread=name,
                                  final_norm=False)
  x = jnp.zeros((n, 1, 2))
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(
    model.init, jax.random.key(0), x[:1])["params"])
  run = jax.jit(lambda params: model.apply(
    {"params": params}, x, train=True, rngs={"drop_path": jax.random.key(1)}))
  counts = []
  for block in range(depth):
    bias = params["blocks"]["mlp"]["down"]["bias"].at[block].set(1.0)
    own = {**params, "blocks": {**params["blocks"], "mlp": {
      **params["blocks"]["mlp"], "down": {**params["blocks"]["mlp"]["down"], "bias": bias}}}}
    y = run(own)
    counts.append(float((y[:, 0, 0] == 0).mean()))
    np.testing.assert_allclose(y.max(), 1 / (1 - expected[block]), rtol=1e-5)
  np.testing.assert_allclose(counts, expected, atol=0.025)


# --- bfloat16 -------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("float32_stream", [True, False])
def test_what_small_branches_add_is_not_rounded_away(float32_stream):
  """At a layer scale of 1e-4, by how many of the stream's elements the blocks are felt."""
  fields = dict(WIDE, depth=4, num_classes=0, pool="none", dtype="bfloat16", layer_scale=1e-4,
                float32_stream=float32_stream)
  model = vit.make(**fields)
  stack = transformer.Transformer(
    4, 4, 384, final_norm=False, layer_scale=1e-4, dtype=jnp.bfloat16,
    float32_stream=float32_stream)
  x = jax.random.normal(jax.random.key(1), (2, 16, 96))
  stream = x.astype(jnp.float32 if float32_stream else jnp.bfloat16)
  params = stack.init(jax.random.key(0), stream)["params"]
  exact = transformer.Transformer(4, 4, 384, final_norm=False, layer_scale=1e-4).apply(
    {"params": params}, stream.astype(jnp.float32)) - stream.astype(jnp.float32)

  # What the stack leaves in bfloat16 is rounded at its very end; what it adds shows by its gradient
  # of the layer scales, and in its blocks run one by one.
  def added(params):
    seen = []
    def keep(next_function, args, kwargs, context):
      y = next_function(*args, **kwargs)
      if context.module.name is None and type(context.module).__name__ == "Block":
        seen.append(y)
      return y
    import flax.linen as nn
    with nn.intercept_methods(keep), jax.disable_jit():
      stack.apply({"params": params}, stream)
    return seen[-1]

  last = added(params)
  changed = float((last.astype(jnp.float32) != stream.astype(jnp.float32)).mean())
  if float32_stream:
    assert last.dtype == jnp.float32 and changed > 0.99
    error = np.abs(np.asarray(last - stream - exact)).max() / np.abs(np.asarray(exact)).max()
    assert error < 0.05
  else:
    assert last.dtype == jnp.bfloat16 and changed < 0.1
  assert model.apply({"params": model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]},
                     jnp.zeros((1, 32, 32, 3)))[0].dtype == jnp.bfloat16


def test_a_dits_stream_is_float32_too():
  model = dit.make(image_size=8, channels=2, patch=2, width=32, depth=2, heads=2, dtype="bfloat16")
  x, t = jnp.ones((1, 8, 8, 2)), jnp.ones(1)
  shapes = []
  block = dit.Block(2, 128, dtype=jnp.bfloat16)
  stream = jnp.ones((1, 16, 32), jnp.float32)
  out = jax.eval_shape(lambda: block.init_with_output(
    jax.random.key(0), stream, jnp.ones((1, 32), jnp.bfloat16))[0])
  shapes.append(out.dtype)
  assert shapes == [jnp.float32]
  assert jax.eval_shape(lambda: model.init_with_output(
    jax.random.key(0), x, t)[0]).dtype == jnp.float32


# --- Parts of splits ------------------------------------------------------------------------------

@pytest.mark.parametrize("name,expected", [
  ("train[:99%]", range(990)), ("train[99%:]", range(990, 1000)), ("train[5:7]", range(5, 7)),
  ("train[:50%]", range(500))])
def test_a_part_of_a_split(name, expected):
  class Records(list):
    def __getitems__(self, indices):
      return [self[i] for i in indices]

  splits = with_parts({"train": Records(range(1000))}, (name, None, "test"))
  assert set(splits) == {"train", name}
  assert len(splits[name]) == len(expected) and list(splits[name]) == list(expected)
  assert splits[name].__getitems__([0, 1]) == list(expected[:2])


def test_a_part_without_examples():
  with pytest.raises(ValueError, match=r"'train\[9:\]': none of the 3 examples of 'train'"):
    with_parts({"train": [1, 2, 3]}, ("train[9:]",))


# --- What shapes do not tell ----------------------------------------------------------------------

@pytest.mark.parametrize("width,hidden", [(384, 1536), (768, 3072)])
def test_moco_v3s_vits_have_twelve_heads_and_an_import_says_so(width, hidden):
  """vits.py of facebookresearch/moco-v3: `vit_small` has twelve heads, DeiT's S six."""
  shapes = {"patch_embed.proj.weight": (width, 3, 16, 16), "pos_embed": (1, 197, width),
            "cls_token": (1, 1, width), "head.0.weight": (4096, width),
            "head.3.weight": (4096, 4096), "head.6.weight": (256, 4096),
            **{f"blocks.{i}.mlp.fc1.weight": (hidden, width) for i in range(12)}}
  shapes = {"predictor.0.weight": (4096, 256), "predictor.3.weight": (256, 4096),
            **{f"base_encoder.{name}": shape for name, shape in shapes.items()}}
  form = FORMATS["moco/v3"]
  model = form.describe(shapes, {}, {}).model
  assert model["heads"] == 12
  said = {entry.ours for entry in formats.assumed(form, model, {}, {})}
  assert "config.model.heads = 12" in said
  assert form.describe(shapes, {}, {"heads": 6}).model["heads"] == 6
  told = {entry.ours for entry in formats.assumed(form, model, {"num_heads": 12}, {})}
  assert not any("heads" in line for line in told)
