"""MoCo v1, v2 and v3 as the original repositories write them; their backbones alone go out."""

import functools
from collections.abc import Mapping

from interop import formats, layout, resnet, vit
from interop.formats import Format, Network
from interop.layout import rows

# A network of v1 and v2, and one of v3: (theirs, ours, statistics of ours).
QUERY = "params", "extra/stats/batch_stats"
KEY = "extra/momentum_params", "extra/momentum_stats/batch_stats"
QUEUE = [("queue", "queue", "d K -> K d"), ("queue_ptr", "pointer", "1 ->")]
# When the momentum moved and keys were queued, and statistics that nothing reads, are ours alone.
NEW = (r"extra/(updated|queued_at)|extra/momentum_stats/batch_stats/predictor"
       r"|extra/(queue|pointer)$")

# Of v3's ViTs by width. Its S has twice as many as DeiT's (2104.02057 sec. 5), which fit as well.
HEADS = {384: 12, 768: 12}


def backbone_rows(model: Mapping, theirs: str = "", ours: str = QUERY[0], stats: str = QUERY[1]):
  ours, stats = f"{ours}/backbone", f"{stats}/backbone"
  if model["backbone"] == "resnet":
    return resnet.resnet_rows(model, theirs, ours, stats, head=())
  return vit.timm_rows(model, ours, theirs)


def head_table(theirs: str, ours: str, layers: int, norm: bool):
  """A head's modules count its ReLUs and norms too; v1's is one layer without a number."""
  if not norm:
    return [(f"{theirs}.{2 * i}" if layers > 1 else theirs, f"{ours}/dense_{i}", "dense")
            for i in range(layers)]
  return [row for i in range(layers) for row in (
    (f"{theirs}.{3 * i}", f"{ours}/dense_{i}", "dense"),
    (f"{theirs}.{3 * i + 1}", f"{ours}/norm_{i}", "batch_norm"))]


def queue_rows(model: Mapping):
  """facebookresearch/moco."""
  head = head_table("fc", "projector", len(model["projector_hidden"]) + 1, norm=False)
  return [row for theirs, (ours, stats) in (("encoder_q.", QUERY), ("encoder_k.", KEY))
          for row in (*backbone_rows(model, theirs, ours, stats), *rows(head, theirs, ours, stats))
          ] + rows(QUEUE, "", "extra")


def v3_rows(model: Mapping):
  """facebookresearch/moco-v3."""
  name = "fc" if model["backbone"] == "resnet" else "head"
  head = head_table(name, "projector", len(model["projector_hidden"]) + 1, norm=True)
  predictor = head_table("predictor", "predictor", len(model["predictor_hidden"]) + 1, norm=True)
  return [row for theirs, (ours, stats) in (("base_encoder.", QUERY), ("momentum_encoder.", KEY))
          for row in (*backbone_rows(model, theirs, ours, stats), *rows(head, theirs, ours, stats))
          ] + rows(predictor, "", *QUERY)


def sizes_of(shapes, head: str, step: int) -> tuple[int, ...]:
  """Features after each dense layer of a head whose layers are `step` modules apart."""
  if f"{head}.weight" in shapes:
    return (formats.shape(shapes, f"{head}.weight", 2)[0],)
  count = layout.depth({name for name in shapes if len(shapes[name]) == 2}, head + ".{i}.weight")
  return tuple(formats.shape(shapes, f"{head}.{i}.weight", 2)[0] for i in range(0, count, step))


def queue_describe(shapes, config, given) -> Network:
  inner = inside(shapes, "encoder_q.")
  *hidden, dim = sizes_of(inner, "fc", 2)
  model = dict(name="moco", backbone="resnet", dim=dim, projector_hidden=tuple(hidden), bn_groups=8,
               **resnet.resnet_model(inner, resnet.torch_name, "conv1.weight", given))
  method = dict(queue_size=shapes["queue"][1] if "queue" in shapes else 65536,
                temperature=config.get("T", 0.2 if hidden else 0.07),
                momentum=config.get("m", 0.999))
  recipe = "configs/moco.py:imagenet_r50_v2" if hidden else "configs/moco.py:imagenet_r50_v1"
  return Network(recipe, model, dict(method=method, augment=formats.IMAGENET))


def v3_describe(shapes, config, given) -> Network:
  inner = inside(shapes, "base_encoder.")
  is_vit = "patch_embed.proj.weight" in inner
  *hidden, dim = sizes_of(inner, "head" if is_vit else "fc", 3)
  predictor = sizes_of(shapes, "predictor", 3)
  own = dict(dim=dim, head_norm=True, projector_hidden=tuple(hidden),
             predictor_hidden=predictor[:-1],
             predictor_last_norm=f"predictor.{3 * len(predictor) - 2}.running_mean" in shapes)
  sections = dict(augment=formats.IMAGENET)
  if is_vit:
    width = formats.shape(inner, "patch_embed.proj.weight", 4)[0]
    known = {"num_heads": HEADS[width]} if width in HEADS else {}
    model = {**vit.timm_model(inner, {**known, **config}, given, name="moco"), "backbone": "vit",
             **own}
    sections.update(optimizer=dict(frozen="backbone/(embed/projection|.*position)"),
                    method=dict(temperature=config.get("T", 0.2)))
    return Network("configs/moco.py:imagenet_vit_b16_v3", model, sections)
  model = dict(name="moco", backbone="resnet", **own,
               **resnet.resnet_model(inner, resnet.torch_name, "conv1.weight", given))
  return Network("configs/moco.py:imagenet_r50_v3", model, sections)


def inside(shapes: Mapping, prefix: str) -> dict:
  """What lies under a prefix, without it."""
  return {name.removeprefix(prefix): shape for name, shape in shapes.items()
          if name.startswith(prefix)}


def with_momentum(tensors: dict, model: Mapping, query: str, key: str) -> dict:
  """Where the momentum encoder is missing the other stands for it, as when training starts."""
  if any(name.startswith(key) for name in tensors):
    return tensors
  return {**{key + name: x for name, x in inside(tensors, query).items()
             if not name.endswith("num_batches_tracked")}, **tensors}


def v3_gather(tensors: dict, model: Mapping) -> dict:
  return with_momentum(tensors, model, "base_encoder.", "momentum_encoder.")


FORMATS = [
  Format("moco/original", "original", (r"^(module\.)?encoder_q\.",), queue_describe, queue_rows,
         aside=resnet.COUNTERS, new=NEW, gather=functools.partial(
           with_momentum, query="encoder_q.", key="encoder_k."), scatter=resnet.with_counters,
         limits=dict(backbone=("resnet",), predictor_hidden=(False,), head_norm=(False,))),
  Format("moco/v3", "original", (r"^(module\.)?base_encoder\.",), v3_describe, v3_rows,
         aside=resnet.COUNTERS, new=NEW, gather=v3_gather, scatter=resnet.with_counters,
         limits=dict(head_norm=(True,))),
  Format("moco/torchvision", "torchvision", (), None, backbone_rows, backbone=True,
         scatter=resnet.with_counters, limits=dict(backbone=("resnet",))),
  Format("moco/timm", "timm", (), None, backbone_rows, backbone=True, scatter=vit.timm_scatter),
]
