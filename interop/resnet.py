"""ResNet as torchvision, timm (the same names) and Hugging Face write it."""

import itertools
from collections.abc import Mapping

import numpy as np

from interop import formats, layout
from interop.formats import Format, Network
from interop.layout import rows

RESNET = [("conv1", "stem", "conv"), ("bn1", "stem_norm", "batch_norm")]
BLOCK = [
  ("conv1", "conv_0", "conv"), ("bn1", "norm_0", "batch_norm"),
  ("conv2", "conv_1", "conv"), ("bn2", "norm_1", "batch_norm"),
  ("conv3", "conv_2", "conv"), ("bn3", "norm_2", "batch_norm"),
  ("downsample.0", "shortcut", "conv"), ("downsample.1", "shortcut_norm", "batch_norm"),
]
HF_RESNET = [("resnet.embedder.embedder.convolution", "stem", "conv"),
             ("resnet.embedder.embedder.normalization", "stem_norm", "batch_norm")]
HF_BLOCK = [
  *[row for i in range(3) for row in (
    (f"layer.{i}.convolution", f"conv_{i}", "conv"),
    (f"layer.{i}.normalization", f"norm_{i}", "batch_norm"))],
  ("shortcut.convolution", "shortcut", "conv"),
  ("shortcut.normalization", "shortcut_norm", "batch_norm"),
]
COUNTERS = r".*\.num_batches_tracked"


def blocks(model: Mapping):
  return [(s, b) for s, depth in enumerate(model["depths"]) for b in range(depth)]


def resnet_rows(model: Mapping, theirs: str = "", ours: str = "params",
                stats: str = "extra/batch_stats", head=(("fc", "head", "dense"),)):
  table = RESNET + [
    (f"layer{s + 1}.{b}.{name}", f"stage_{s}/block_{b}/{our_name}", kind)
    for s, b in blocks(model) for name, our_name, kind in BLOCK]
  return rows([*table, *head], theirs, ours, stats)


def hf_rows(model: Mapping):
  table = HF_RESNET + [
    (f"resnet.encoder.stages.{s}.layers.{b}.{name}", f"stage_{s}/block_{b}/{our_name}", kind)
    for s, b in blocks(model) for name, our_name, kind in HF_BLOCK]
  return rows([*table, ("classifier.1", "head", "dense")])


def torch_name(stage, block, convolution) -> str:
  return f"layer{stage + 1}.{block}.conv{convolution + 1}.weight"


def hf_name(stage, block, convolution) -> str:
  return f"resnet.encoder.stages.{stage}.layers.{block}.layer.{convolution}.convolution.weight"


def resnet_model(shapes, name, stem: str, given, depths=None) -> dict:
  """Fields by the shapes of the stem and of the convolutions `name(stage, block, place)`."""
  depths = tuple(depths or itertools.takewhile(bool, (
    layout.depth(shapes, name(stage, "{i}", 0)) for stage in itertools.count())))
  width, channels, size, _ = formats.shape(shapes, stem, 4)
  side = given.get("image_size") or 224
  return dict(
    depths=depths, bottleneck=name(0, 0, 2) in shapes, stem_width=width, channels=channels,
    widths=tuple(formats.shape(shapes, name(s, 0, 0), 4)[0] for s in range(len(depths))),
    stem="imagenet" if size == 7 else "small",
    image_size=tuple(side) if isinstance(side, (tuple, list)) else (side, side))


def supervised(model: dict, shapes, head: str, given) -> Network:
  classes = shapes[head][0] if head in shapes else None
  model = dict(name="resnet", **model,
               num_classes=formats.need(given, "num_classes", classes, 1000))
  return Network("configs/resnet.py:imagenet_r50", model, dict(augment=formats.IMAGENET))


def torch_describe(shapes, config, given) -> Network:
  return supervised(resnet_model(shapes, torch_name, "conv1.weight", given), shapes, "fc.weight",
                    given)


def hf_describe(shapes, config, given) -> Network:
  if config.get("downsample_in_bottleneck"):
    raise ValueError("config.json: downsample_in_bottleneck: only a stride on the 3x3 convolution "
                     "is supported")
  model = resnet_model(shapes, hf_name, "resnet.embedder.embedder.convolution.weight", given,
                       config.get("depths"))
  return supervised(model, shapes, "classifier.1.weight", given)


def hf_out(model, config) -> dict:
  names = {str(i): f"LABEL_{i}" for i in range(model["num_classes"])}
  wider = 4 if model["bottleneck"] else 1
  return dict(
    architectures=["ResNetForImageClassification"], model_type="resnet",
    num_channels=model["channels"], embedding_size=model["stem_width"],
    hidden_sizes=[wider * width for width in model["widths"]], depths=list(model["depths"]),
    layer_type="bottleneck" if model["bottleneck"] else "basic", hidden_act="relu",
    downsample_in_first_stage=False, downsample_in_bottleneck=False, id2label=names,
    label2id={name: int(i) for i, name in names.items()})


def with_counters(tensors: dict, model: Mapping) -> dict:
  """PyTorch counts the batches that its running statistics have seen; nothing reads it."""
  return {**{name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
             for name in tensors if name.endswith(".running_var")}, **tensors}


FORMATS = [
  Format("resnet/torchvision", "torchvision", (r"^layer1\.0\.conv1\.weight",), torch_describe,
         resnet_rows, aside=COUNTERS, new="params/head", scatter=with_counters),
  Format("resnet/hf", "hf", (r"embedder\.embedder\.convolution",), hf_describe, hf_rows,
         (("embedder.", "resnet.embedder."), ("encoder.", "resnet.encoder.")), aside=COUNTERS,
         new="params/head", scatter=with_counters, config=hf_out),
]
