"""SimSiam (2011.10566): two views of an image predict each other, and no negatives."""

from losses.simsiam import negative_cosine

from methods.method import Method


def make(model) -> Method:
  """A `models.simsiam.SimSiam` learns; its predictor's rate is the optimizer's to say."""
  def init(rng, batch):
    extra = dict(model.init(rng, batch["image"]))
    return extra.pop("params"), extra

  def run(params, extra, image):
    return model.apply({"params": params, **extra}, image, train=True, mutable=["batch_stats"])

  def loss(params, extra, batch, rng, step):
    (z1, p1), extra = run(params, extra, batch["image"])
    (z2, p2), extra = run(params, extra, batch["image_2"])
    value = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2                     # eq. 2
    unit = z1 / (z1**2).sum(-1, keepdims=True) ** 0.5
    return value.mean(), (extra, {"std": unit.std(0).mean() * z1.shape[1] ** 0.5})

  def features(params, extra, batch, rng):
    return model.apply({"params": params, **extra}, batch["image"])[0]

  return Method(init, loss, {"features": features}, statistics="batch_stats",
                needs=("image", "image_2"))
