"""Published recipes, by what is built of them, beside what their sources say.

A row is a source's own numbers: batch, epochs or steps, the rate at five places, what decays and by
how much, how parameters start, what a first update is. They were read from the code named with each
row, or, where there is none, from the paper's section. "Decay" is per step, as a share of the
parameter at the peak rate: big_vision adds 1e-4 after the rate is multiplied in.
"""

import functools
import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiers import suite

from input_pipeline.batches import make_spec
from input_pipeline.records import Info, image_features
from trainer import fields, optimizer, recipe

IMAGES = 1_281_167
KERNELS = r"kernel$"


class Row(NamedTuple):
  """What a source says of a recipe."""

  source: str
  batch: int
  steps: int
  peak: float
  rates: dict  # share of the run -> share of the peak
  decay: float  # of a parameter in a step at the peak rate
  decays: str  # regular expression of our paths that decay
  update: str  # a key of UPDATES: the first update of ones by a gradient, without decay
  options: dict = {}
  clip: float | None = None
  model: dict = {}  # fields of what was built
  method: dict = {}  # fields of config.method
  augment: dict = {}
  data: dict = {}
  train_size: int = IMAGES
  tolerance: float = 2e-3  # of rates: epochs are not whole numbers of steps


def cosine(share, end=0.0):
  return end + (1 - end) * 0.5 * (1 + np.cos(np.pi * share))


def after_warmup(warmup, total, end=0.0, decay=cosine):
  """Rates at five places: half of warm-up, its end, the middle, and near the end."""
  w = warmup / total
  return {w / 2: 0.5, **{w + (1 - w) * share: decay(share, end) for share in (0, 0.5, 0.75, 0.99)}}


def held(epochs, warmup, start, end):
  """timm's: set at the end of an epoch, for the next one, and warm-up lies over the cosine."""
  def rate(epoch):
    done = max(epoch - 1, 0)
    return start + (1 - start) * done / warmup if done < warmup else cosine(done / epochs, end)
  return {(epoch + 0.5) / epochs: rate(epoch) for epoch in (0, 1, 3, 400, 799)}


def each_epoch(epochs, at=(0, 1, 50, 150)):
  return {(epoch + 0.5) / epochs: cosine(epoch / epochs) for epoch in at}


def drops(epochs, at):
  return {(epoch + 0.5) / epochs: 0.1 ** sum(epoch >= drop for drop in at)
          for epoch in (0, *(drop - 1 for drop in at), *at)}


# --- First updates, in float64: what is subtracted at rate 1 from a parameter p of gradient g ---

def np_adam(g, p, decayed, *, decay, eps=1e-8, b1=0.9, b2=0.999, debias=True):
  m, v = ((g, g**2) if debias else ((1 - b1) * g, (1 - b2) * g**2))
  return m / (np.sqrt(v) + eps) + decay * p * decayed


def np_lamb(g, p, decayed, *, decay, eps):
  """Apex's FusedLAMB: the ratio of norms where there is decay."""
  u = np_adam(g, p, decayed, decay=decay, eps=eps)
  return u * np.linalg.norm(p) / np.linalg.norm(u) if decayed else u


def np_sgd(g, p, decayed, *, decay, nesterov=False):
  return (1.9 if nesterov else 1.0) * (g + decay * p * decayed)


def np_lars(g, p, decayed, *, decay):
  d = g + decay * p * decayed
  return d * 1e-3 * np.linalg.norm(p) / np.linalg.norm(d) if decayed else d


def np_adafactor(g, p, decayed, *, decay):
  """beta2 of the first step is 0; a tenth of the scaled gradient is the first moment."""
  shape = np.sort(g.shape)
  v = g**2
  if g.ndim > 1 and shape[-2] >= 32:
    d1, d0 = np.argsort(g.shape)[-2:]
    rows, columns = v.mean(d0, keepdims=True), v.mean(d1, keepdims=True)
    v = rows * columns / rows.mean(d1, keepdims=True)
  return 0.1 * g / np.sqrt(v) + decay * p * decayed


UPDATES = {"adam": np_adam, "lamb": np_lamb, "sgd": np_sgd, "lars": np_lars,
           "adafactor": np_adafactor}

DEIT3 = dict(
  source="facebookresearch/deit README_revenge.md:81,412,745,1078, models_v2.py, main.py; "
         "NVIDIA/apex csrc/multi_tensor_lamb.cu", batch=2048, steps=800 * IMAGES // 2048,
  decays=KERNELS, update="lamb", clip=1.0, method=dict(loss="sigmoid", multi_label=True),
  augment=dict(three_augment=True, color_jitter=(0.3, 0.3, 0.3, 0.0), mixup=0.8, cutmix=1.0,
               crop_area=(0.08, 1.0), flip=True), data=dict(repeats=3))
DEIT3_MODEL = dict(layer_scale=1e-4, drop_path_spread="uniform", class_position=False,
                   head_init=0.02, kernel_init="normal", patch_init="torch")


def deit3(lr, drop_path, mix_size):
  return Row(**DEIT3 | dict(
    augment=dict(DEIT3["augment"], mix_size=mix_size), peak=lr, decay=0.05 * lr,
    rates=held(800, 5, 1e-6 / lr, 1e-5 / lr), options=dict(eps=1e-8),
    model=dict(DEIT3_MODEL, drop_path=drop_path), tolerance=0.012))


def mae_pretrain():
  return Row("facebookresearch/mae main_pretrain.py, util/lr_sched.py, PRETRAIN.md", 4096,
             800 * IMAGES // 4096, 2.4e-3, after_warmup(40, 800), 0.05 * 2.4e-3,
             r"(kernel|/cls|mask_token)$", "adam", dict(b2=0.95),
             augment=dict(crop_area=(0.2, 1.0), flip=True, mixup=None),
             method=dict(mask_ratio=0.75, norm_pix=True))


def mae_finetune(base, drop_path, epochs, mix_size):
  peak = 4 * base
  return Row("facebookresearch/mae main_finetune.py, FINETUNE.md, util/lr_decay.py", 1024,
             epochs * IMAGES // 1024, peak, after_warmup(5, epochs, 1e-6 / peak), 0.05 * peak,
             KERNELS, "adam", augment=dict(
               randaugment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0,
               mix_size=mix_size), method=dict(label_smoothing=0.1),
             model=dict(head_init=2e-5, drop_path=drop_path, drop_path_spread="linear",
                        pool="mean", pool_before_norm=True))


MAE_LINEAR = Row("facebookresearch/mae main_linprobe.py, util/lars.py", 16384,
                 90 * IMAGES // 16384, 6.4, after_warmup(10, 90), 0.0, KERNELS, "lars",
                 model=dict(head_init=0.01, probe_norm=True, bn_groups=32, pool="cls"))
MOCO = dict(source="facebookresearch/moco main_moco.py, builder.py, loader.py", batch=256,
            steps=200 * IMAGES // 256, peak=0.03, decay=0.03 * 1e-4, decays="", update="sgd")
ROWS = {
  "configs/vit.py:imagenet_s16": deit3(4e-3, 0.05, 256),
  "configs/vit.py:imagenet_b16": deit3(3e-3, 0.2, 256),
  "configs/vit.py:imagenet_l16": deit3(3e-3, 0.45, 64),
  "configs/vit.py:imagenet_h14": deit3(3e-3, 0.6, 64),
  **{f"configs/vit.py:imagenet_{size}_augreg": Row(
    "google-research/big_vision configs/vit_i1k.py, optax.py, models/vit.py", 4096, 92_897, 1e-3,
    after_warmup(10_000, 92_897), 1e-4, KERNELS, "adam", clip=1.0, train_size=1_268_355,
    model=dict(pre_logits=width, head_bias_init=-6.9, activation="gelu_tanh", token_init=0.0,
               position_init=width**-0.5, class_position=False, pool="cls"),
    method=dict(loss="sigmoid_sum"), data=dict(train_split="train[:99%]"),
    augment=dict(crop_area=(0.05, 1.0), randaugment=(2, 15), mixup=0.5, mix_partner="previous"))
    for size, width in (("s16", 384), ("b16", 768), ("l16", 1024))},
  "configs/vit.py:imagenet_s16_plain": Row(
    "google-research/big_vision configs/vit_s16_i1k.py", 1024, 111_477, 1e-3,
    after_warmup(10_000, 111_477), 1e-4, KERNELS, "adam", clip=1.0, train_size=1_268_355,
    model=dict(pre_logits=384, head_bias_init=0.0, positions="sincos2d", pool="mean"),
    method=dict(loss="softmax"), augment=dict(randaugment=(2, 10), mixup=0.2)),
  **{f"configs/mae.py:imagenet_{size}": mae_pretrain() for size in ("s16", "b16", "l16", "h14")},
  "configs/finetune.py:imagenet_mae_b16": mae_finetune(5e-4, 0.1, 100, 32),
  "configs/finetune.py:imagenet_mae_l16": mae_finetune(1e-3, 0.2, 50, 32),
  "configs/finetune.py:imagenet_mae_h14": mae_finetune(1e-3, 0.3, 50, 16),
  **{f"configs/finetune.py:imagenet_mae_{size}_linear": MAE_LINEAR
     for size in ("b16", "l16", "h14")},
  "configs/moco.py:imagenet_r50_v1": Row(**MOCO, rates=drops(200, (120, 160)), augment=dict(
    grayscale=0.2, grayscale_first=True, color_jitter=(0.4,) * 4, crop_area=(0.2, 1.0)),
    method=dict(temperature=0.07, queue_size=65536, momentum=0.999),
    model=dict(bn_groups=8, projector_hidden=())),
  "configs/moco.py:imagenet_r50_v2": Row(**MOCO, rates=each_epoch(200), augment=dict(
    color_jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, grayscale=0.2, blur=0.5),
    method=dict(temperature=0.2), model=dict(projector_hidden=(2048,)), tolerance=5e-3),
  "configs/moco.py:imagenet_r50_v3": Row(
    "facebookresearch/moco-v3 main_moco.py, CONFIG.md, moco/optimizer.py", 4096,
    100 * IMAGES // 4096, 9.6, after_warmup(10, 100), 9.6e-6, KERNELS, "lars",
    method=dict(temperature=1.0, momentum=0.99, momentum_schedule="cosine"),
    model=dict(predictor_last_norm=False, bn_groups=1)),
  **{f"configs/moco.py:imagenet_vit_{size}_v3": Row(
    "facebookresearch/moco-v3 main_moco.py, vits.py, CONFIG.md", 4096, 300 * IMAGES // 4096,
    2.4e-3, after_warmup(40, 300), 2.4e-4, "", "adam", method=dict(temperature=0.2, momentum=0.99),
    augment=dict(crop_area=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0),
    model=dict(predictor_last_norm=True)) for size in ("s16", "b16")},
  "configs/finetune.py:imagenet_moco_r50_linear": Row(
    "facebookresearch/moco main_lincls.py", 256, 100 * IMAGES // 256, 30.0, drops(100, (60, 80)),
    0.0, KERNELS, "sgd", model=dict(head_init=0.01)),
  **{f"configs/finetune.py:imagenet_moco_vit_{size}_linear": Row(
    "facebookresearch/moco-v3 main_lincls.py, CONFIG.md", 1024, 90 * IMAGES // 1024, 12.0,
    each_epoch(90, (0, 1, 45, 80)), 0.0, KERNELS, "sgd", model=dict(head_init=0.01, heads=12),
    tolerance=0.01) for size in ("s16", "b16")},
  "configs/resnet.py:imagenet_r50": Row(
    "1706.02677 sec. 5.1", 256, 90 * IMAGES // 256, 0.1, drops(90, (30, 60, 80)), 1e-5,
    r"(kernel|head/bias)$", "sgd", dict(nesterov=True),
    model=dict(zero_init=True, head_init=0.01, bn_groups=8)),
  "configs/resnet.py:imagenet_r50_8k": Row(
    "1706.02677 sec. 2.2, 5.1", 8192, 90 * IMAGES // 8192, 3.2,
    {0.0: 1 / 32, 2.5 / 90: (1 + 1 / 32) / 2, 6 / 90: 1.0, 45 / 90: 0.1, 85 / 90: 1e-3}, 3.2e-4,
    r"(kernel|head/bias)$", "sgd", dict(nesterov=True),
    model=dict(zero_init=True, head_init=0.01, bn_groups=256)),
  "configs/resnet.py:imagenet_r18": Row(
    "pytorch/examples imagenet/main.py; torchvision models/resnet.py", 256, 90 * IMAGES // 256,
    0.1, drops(90, (30, 60)), 1e-5, "", "sgd", model=dict(zero_init=False,
                                                          head_init=(3 * 512) ** -0.5)),
  **{f"configs/clip.py:vit_{size}": Row(
    "2103.00020 tables 18 and 20; openai/CLIP clip/model.py; open_clip v2.24 main.py:311", 32768,
    390_625, lr, after_warmup(2000, 390_625), 0.2 * lr,
    r"(kernel|embedding|table|position)$", "adam", dict(eps=1e-6, b2=0.98), tolerance=6e-3)
    for size, lr in (("b32", 5e-4), ("b16", 5e-4), ("l14", 4e-4))},
  "configs/clip.py:siglip_b16": Row(
    "2303.15343 appendix C, table 6", 32768, 91_553, 3e-4, after_warmup(9155.27, 91_553), 3e-5,
    KERNELS, "adafactor", clip=1.0),
  "configs/clip.py:lit_b16": Row(
    "2111.07991 appendix C", 16384, 55_000, 1e-3, after_warmup(10_000, 55_000), 0.0, KERNELS,
    "adafactor", clip=1.0),
  "configs/caption.py:cap_b16": Row(
    "google-research/big_vision configs/proj/cappa/pretrain.py", 8192, 366_500, 1e-3,
    after_warmup(10_000, 366_500), 1e-4, KERNELS, "adafactor", clip=1.0),
  "configs/bert.py:base": Row(
    "1810.04805 appendix A.2; google-research/bert optimization.py", 256, 1_000_000, 1e-4,
    {0.005: 0.5, 0.01: 0.99, 0.5: 0.5, 0.99: 0.01}, 1e-6,
    r"(kernel|embedding|position|segment)$", "adam", dict(eps=1e-6, debias=False), clip=1.0),
  **{f"configs/finetune.py:imagenet_vit_{size}_384": Row(
    "2010.11929 appendix B.1.1; google-research/vision_transformer vit_jax/train.py", 512, 20_000,
    0.03, after_warmup(500, 20_000), 0.0, KERNELS, "sgd", clip=1.0,
    model=dict(dropout=0.1 if size == "l16" else 0.0)) for size in ("b16", "l16")},
}
# Rows of diffusion are in tests/test_diffusion_method.py; recipes that nobody published have none.
UNPUBLISHED = {"", "smoke", "smoke_v3", "moco", "linear", "vp", "coco_b16"}


def test_every_published_recipe_has_a_row():
  from tests.test_house import variants
  published = {name for name in variants() if name.partition(":")[2] not in UNPUBLISHED
               and "diffusion" not in name}
  assert published == set(ROWS)


@functools.cache
def built(name: str):
  """(completed config, model, shapes of parameters, transformation at the peak rate, rate)."""
  row, config = ROWS[name], recipe.load_config(name)
  channels = 1 if config.data.source.startswith("lines:") else 3
  shape = (1, 1, 1) if channels == 1 else (None, None, 3)
  info = Info(shape, 0 if channels == 1 else 1000, (), {"train": row.train_size}, "")
  tokenizer = SimpleNamespace(vocab_size=1000, context=config.data.get("context"), eos_id=1,
                              pad_id=0, mask_id=2, starts=1) if config.data.get(
                                "tokenizer") else None
  config = recipe.fill_from_data(config, info, row.train_size, tokenizer)
  method = recipe.make_method(config)
  features = image_features((*config.model.image_size, channels), 1000, text=bool(tokenizer))
  batch = make_spec(features, 2, [None], tokenizer)
  batch = {key: jax.ShapeDtypeStruct((row.batch, *x.shape[1:]), x.dtype)
           for key, x in batch.items()}
  batch["image"] = jax.ShapeDtypeStruct(batch["image"].shape, np.float32)
  params, _ = jax.eval_shape(method.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
  rate = jax.jit(jax.vmap(recipe.make_optimizer(config, row.train_size)[1]))
  tx, _ = fields.call(optimizer.make, config.optimizer, "optimizer", batch_size=row.batch,
                      schedule=lambda step: 1.0)
  return config, recipe.make_model(config), params, tx, rate


def small(params):
  """Arrays of the same paths with short sides, and a gradient: depth 2, nothing above 40."""
  rng = np.random.default_rng(0)

  def leaf(path, x):
    stacked = "blocks" in [getattr(key, "key", "") for key in path]
    shape = tuple(min(n, 40) for n in x.shape)
    shape = (2, *shape[1:]) if stacked else shape
    return rng.normal(size=shape).astype(np.float32)
  flat = {path: leaf(path, x) for path, x in jax.tree.leaves_with_path(params)}
  names = {"/".join(key.key for key in path): x for path, x in flat.items()}
  return unflatten_dict(names, sep="/")


SMALLER = suite(ROWS, keys=tuple(name for name in ROWS if not re.search("_[lh]1[46]", name)))


@pytest.mark.parametrize("name", SMALLER)
def test_sizes_and_rates(name):
  row, (config, *_, rate) = ROWS[name], built(name)
  assert config.data.batch_size == row.batch
  np.testing.assert_allclose(config.total_steps, row.steps, rtol=2e-3)
  steps = np.array([round(share * config.total_steps) for share in row.rates])
  np.testing.assert_allclose(rate(steps), row.peak * np.array([*row.rates.values()]),
                             atol=row.peak * row.tolerance, err_msg=f"at {[*row.rates]} of the run")
  steps = np.linspace(0, config.total_steps - 1, 400).astype(int)
  assert rate(steps).max() <= row.peak * (1 + 1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_fields(name):
  row, (config, model, *_) = ROWS[name], built(name)
  networks = [model, *(getattr(model, part, None) for part in ("encoder", "backbone", "image"))]
  for field, expected in row.model.items():
    found = [getattr(network, field) for network in networks if hasattr(network, field)]
    np.testing.assert_equal(found[0], expected, err_msg=field)
  for section, wanted in (("method", row.method), ("augment", row.augment), ("data", row.data)):
    for field, expected in wanted.items():
      assert config[section].get(field) == expected, (section, field)


@pytest.mark.parametrize("name", SMALLER)
def test_first_update(name):
  """Of every parameter, at the peak rate."""
  row, (config, _, params, tx, _) = ROWS[name], built(name)
  params, rng = small(params), np.random.default_rng(1)
  grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 1e-2, params)
  updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)
  norm = float(optax.tree.norm({path: g for path, g in flatten_dict(grads, sep="/").items()
                                if not frozen(config, path)}))
  factor = min(1, row.clip / norm) if row.clip else 1
  checked = 0
  flat_updates, flat_grads = (flatten_dict(tree, sep="/") for tree in (updates, grads))
  for path, p in flatten_dict(params, sep="/").items():
    if frozen(config, path):
      assert not np.any(flat_updates[path]), path
      continue
    decayed = bool(re.search(row.decays, path))
    layers = range(len(p)) if "blocks" in path.split("/") else [...]
    for layer, scale in zip(layers, layer_scales(config, path)):
      g, q = (np.float64(x[layer]) for x in (flat_grads[path], p))
      u = UPDATES[row.update](g * factor, q, decayed, decay=row.decay / row.peak, **row.options)
      np.testing.assert_allclose(-np.asarray(flat_updates[path][layer]), row.peak * scale * u,
                                 rtol=1e-3, atol=1e-6 * row.peak, err_msg=path)
      checked += 1
  assert checked > 1


def frozen(config, path: str) -> bool:
  return bool(config.optimizer.get("frozen") and re.search(config.optimizer.frozen, path))


def layer_scales(config, path: str):
  """BEiT's layer decay of two blocks (util/lr_decay.py of facebookresearch/mae)."""
  decay = config.optimizer.get("layer_decay", 1.0)
  if "blocks" in path.split("/"):
    return decay**2, decay
  before = re.match(r"(embed|position|cls|cls_position)(/|$)", path)
  return (decay**3 if before else 1.0,)
