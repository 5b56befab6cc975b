"""Random architectures go out to every published format and in again with the same bits."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import convert
from interop import published as interop
from trainer import recipe

SIZES = st.fixed_dictionaries({
  "patch": st.integers(1, 4), "heads": st.integers(1, 3), "head_dim": st.integers(1, 4),
  "depth": st.integers(1, 3), "mlp_dim": st.integers(1, 40), "channels": st.integers(1, 4),
  "grid": st.tuples(st.integers(1, 4), st.integers(1, 4)), "num_classes": st.integers(1, 7),
  "flag": st.booleans(), "other": st.integers(1, 3), "seed": st.integers(0, 2**31)})


def transformer(a):
  return dict(patch=a["patch"], width=a["heads"] * a["head_dim"], heads=a["heads"],
              depth=a["depth"], mlp_dim=a["mlp_dim"], channels=a["channels"],
              image_size=tuple(side * a["patch"] for side in a["grid"]))


def vit(a, **fields):
  return dict(name="vit", **transformer(a), num_classes=a["num_classes"]) | fields


def npz(a):
  pool = ("cls", "mean", "map")[a["other"] - 1]
  return vit(a, pool=pool, activation="gelu_tanh")


def timm(a):
  fields = (dict(pool="mean", class_token=a["flag"], pool_before_norm=True),
            dict(pool="cls", layer_scale=1e-5, qk_norm=a["flag"]),
            dict(pool="map", class_token=False, patch_bias=True))[a["other"] - 1]
  return vit(a, **fields)


def mae(a):
  return dict(name="mae", **transformer(a), positions="learned", decoder_width=a["other"] * 6,
              decoder_depth=a["other"], decoder_heads=a["other"])


def resnet(a):
  return dict(name="resnet", depths=(a["depth"], 1, a["other"]), widths=(4, a["mlp_dim"], 3),
              bottleneck=a["flag"], stem_width=a["heads"], channels=a["channels"],
              num_classes=a["num_classes"], image_size=(32, 32))


def moco(a):
  body = {name: x for name, x in resnet(a).items() if name != "num_classes"}
  return body | dict(name="moco", backbone="resnet", dim=a["head_dim"],
                     projector_hidden=(5,) * a["flag"])


def moco_v3(a):
  return dict(name="moco", backbone="vit", **transformer(a), dim=a["head_dim"], head_norm=True,
              projector_hidden=(5,) * a["other"], predictor_hidden=(6,),
              predictor_last_norm=a["flag"])


def clip(a, **fields):
  return dict(name="clip", **transformer(a), pre_norm=True, patch_bias=False, embed_dim=a["other"],
              activation="quick_gelu", norm_eps=1e-5, text_width=6, text_depth=a["other"],
              text_heads=a["other"], text_pool="eos", vocab_size=11, context=a["mlp_dim"],
              eos_id=3, pad_id=4) | fields


def siglip(a):
  width = a["heads"] * a["head_dim"]
  return clip(a, pre_norm=False, patch_bias=True, activation="gelu_tanh", norm_eps=1e-6,
              pool="map", embed_dim=width, project_image=False, projection_bias=True,
              text_causal=False, text_pool="last", init_bias=-10.0)


def bert(a):
  return dict(name="bert", width=a["heads"] * a["head_dim"], heads=a["heads"], depth=a["depth"],
              mlp_dim=a["mlp_dim"], vocab_size=11, context=a["patch"], pad_id=4, eos_id=3,
              mask_id=2, segments=1 + a["flag"], image_size=(1, 1), channels=1)


def dit(a):
  return dict(name="dit", **transformer(a), positions="learned", num_classes=a["num_classes"],
              learn_sigma=a["flag"])


METHODS = {
  "vit": dict(name="supervised"), "resnet": dict(name="supervised"),
  "mae": dict(name="mae", mask_ratio=0.5), "moco": dict(name="moco", queue_size=4),
  "clip": dict(name="clip"), "bert": dict(name="bert"),
  "dit": dict(name="diffusion", path="vp_discrete", prediction="eps", samples={})}
OPTIONS = {"moco/v3": dict(queue_size=0), "clip/siglip": dict(loss="sigmoid",
                                                             max_logit_scale=None)}


@pytest.mark.parametrize("name, architecture", [
  ("vit/hf", vit), ("vit/dinov2", lambda a: vit(a, layer_scale=0.1, registers=a["other"] - 1)),
  ("vit/deit", lambda a: vit(a, registers=1)), ("vit/timm", timm), ("vit/npz", npz),
  ("vit/augreg", npz), ("mae/hf", mae), ("mae/original", mae), ("resnet/torchvision", resnet),
  ("resnet/hf", resnet), ("moco/original", moco), ("moco/v3", moco_v3), ("clip/hf", clip),
  ("clip/openai", lambda a: clip(a, text_pool="argmax")), ("clip/siglip", siglip),
  ("bert/hf", bert), ("dit/original", dit)])
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(a=SIZES)
def test_out_and_in_again(name, architecture, a):
  section = architecture(a)
  if section["name"] == "mae":  # one patch stays and one goes
    section["image_size"] = (2 * section["patch"], section["image_size"][1])
  config = ConfigDict(dict(
    model=section, method=METHODS[section["name"]] | OPTIONS.get(name, {}), dtype="float32",
    total_steps=1, accumulate=1, data=dict(batch_size=1),
    augment=dict(image_size=section["image_size"])))
  form, method = interop.FORMATS[name], recipe.make_method(config)
  model = interop.fields(recipe.make_model(config), config.model)
  expected = jax.eval_shape(lambda: convert.initial(method, model))
  rng = np.random.default_rng(a["seed"])
  ours = {path: rng.integers(-2**20, 2**20, x.shape).astype(x.dtype)
          for path, x in expected.items()}

  theirs = interop.give(form, model, ours)
  shapes = {key: x.shape for key, x in theirs.items()}
  told = form.config(model, config) if form.config else {}
  asked = {field: section[field] for field in ("image_size", "heads", "decoder_heads",
                                               "text_heads") if field in section}
  assert interop.recognise(theirs, told, "" if told or "head.weight" in theirs else form.name
                           ) == form
  described = form.describe(shapes, told, asked if not told else {
    "image_size": section["image_size"]}).model
  for field, value in section.items():
    if field in described and field not in ("layer_scale", "eos_id", "pad_id", "mask_id",
                                            "init_bias"):
      assert described[field] == value, field
  again = {**model, **described}
  statuses = {e.status for e in interop.account(form, again, shapes, expected)}
  assert statuses <= {"taken", "transposed", "aside", "new"}
  back = interop.take(form, again, theirs, expected)
  lost = {path for path in ours if path not in back}
  assert all(path.startswith(("extra/updated", "extra/queued_at",
                              "extra/momentum_stats/batch_stats/predictor")) for path in lost)
  for path, x in back.items():
    np.testing.assert_array_equal(x, ours[path], err_msg=path)
