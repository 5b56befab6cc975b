"""Diffusion and flow matching: one network, any path, prediction, weighting and sampler."""

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion import grids, objectives, paths, predictions, samplers
from diffusion.guidance import guided
from methods.method import Method

LIMITS = {"none": lambda x0: x0, "clip": lambda x0: jnp.clip(x0, -1, 1),
          "threshold": predictions.threshold}


def make(model, *, path: Literal[*paths.PATHS] = "linear", path_options: Mapping = {},
         prediction: Literal[*predictions.PREDICTIONS] = "velocity",
         times: Literal[*objectives.TIMES] = "uniform", times_options: Mapping = {},
         stratified: bool = True, weighting: Literal[*objectives.WEIGHTINGS] = "uniform",
         gamma: float = 5.0, sigma_data: float = 0.5, vlb_weight: float = 1e-3,
         label_dropout: float = 0.1, time_scale: float | None = None,
         samples: Mapping[str, Mapping] = {"sample": {}}) -> Method:
  """A network learns to tell data from noise at every noise level, and so to make data.

  Args:
    model: `(x [b, h, w, c], t [b], label [b]) -> [b, h, w, c]`, or twice the channels with
      `learn_sigma`; its label `num_classes` is "none given", and 0 classes mean no labels.
    path, path_options: a name in `diffusion.paths.PATHS` and its keywords.
    prediction: what the network says, in `diffusion.predictions.PREDICTIONS`.
    times, times_options, stratified: see `diffusion.objectives.sample_times`.
    weighting, gamma: see `diffusion.objectives.weight`.
    sigma_data: standard deviation of the data, for "edm".
    vlb_weight: of the bound that a learned variance is trained by (2102.09672 eq. 16).
    label_dropout: share of labels replaced by "none given" (2207.12598 alg. 1).
    time_scale: factor on the times that the network embeds. None: 1 on a discrete path, else 1000,
      so that times in [0, 1] span the embedding as DDPM's do; SiT's code, and its recipe, have 1.
    samples: prediction name -> keywords of `make_sample`. NAME_path is the same on its way, in the
      model's units: "x" [b, calls + 1, h, w, c] from noise to image, "x0" [b, calls, h, w, c] as
      predicted by each call of the network, "t" [b, calls].
  """
  the_path = _call(paths.PATHS[path], path_options, f"method.path_options of path {path!r}")
  predictions.check(prediction, the_path)
  scale = (1.0 if the_path.steps else 1000.0) if time_scale is None else time_scale
  if not 0 <= label_dropout < 1:
    raise ValueError(f"method.label_dropout = {label_dropout}: expected a number in [0, 1)")
  if model.learn_sigma and not the_path.steps:
    raise ValueError(f"model.learn_sigma needs method.path = 'vp_discrete', not {path!r}")
  jax.eval_shape(lambda: objectives.sample_times(jax.random.key(0), 2, the_path, times, stratified,
                                                 **times_options))  # their errors, now
  mean_options = dict(weighting=weighting, gamma=gamma, sigma_data=sigma_data)

  def network(params, rng=None):
    train = rng is not None
    rngs = {"dropout": rng} if train else {}
    return lambda x, t, label: model.apply({"params": params}, x, t * scale, label, train=train,
                                           rngs=rngs)

  def draw(rng, batch):
    noise_key, time_key, drop_key = jax.random.split(rng, 3)
    b = batch["image"].shape[0]
    return {
      "noise": jax.random.normal(noise_key, batch["image"].shape),
      "time": objectives.sample_times(time_key, b, the_path, times, stratified, **times_options),
      "drop": jax.random.bernoulli(drop_key, label_dropout, (b,)), **batch}

  def label_of(batch):
    if not model.num_classes:
      return None
    return jnp.where(batch["drop"], model.num_classes, batch["label"])

  def init(rng, batch):
    b = batch["image"].shape[0]
    label = jnp.zeros(b, jnp.int32) if model.num_classes else None
    return model.init(rng, batch["image"], jnp.zeros(b), label)["params"], {}

  def loss(params, extra, batch, rng, step):
    x0, eps, t = batch["image"], batch["noise"], batch["time"]
    x_t = paths.noised(the_path, x0, eps, t)
    inputs = predictions.network_inputs(prediction, x_t, the_path, t, sigma_data)
    output = network(params, rng)(*inputs, label_of(batch))
    if model.learn_sigma:
      value = objectives.hybrid(prediction, output, x0, eps, x_t, the_path, t, vlb_weight,
                                **mean_options)
    else:
      value = objectives.loss(prediction, output, x0, eps, the_path, t, **mean_options)
    return value.mean(), (extra, {})

  def denoise(params, extra, batch, rng):
    label = batch.get("label") if model.num_classes else None
    return network(params)(batch["image"], batch["t"], label)

  def make_sample(*, sampler: str = "heun", steps: int = 50, grid: str = "uniform",
                  guidance_scale: float = 1.0, guidance_interval: tuple | None = None,
                  guidance_channels: int | None = None, limit: str = "none",
                  limit_options: Mapping = {}, rederive_eps: bool = False,
                  grid_options: Mapping = {}, sampler_options: Mapping = {}):
    """A prediction: batch["label"] [b] -> images [b, h, w, c] in the model's units.

    batch may hold "guidance" [b] in place of `guidance_scale`, and "noise" [b, h, w, c], of unit
    variance, to start from; a model without labels needs it. Guidance leaves a learned variance
    alone, as DiT's code does, unless `guidance_channels` reaches further than the image's. Steps of
    a grid in `diffusion.grids`, a sampler in `diffusion.samplers.SAMPLERS`; x_0 within a limit in
    LIMITS, whose options are the keywords of `predictions.threshold`.
    """
    at = grids.make(grid, the_path, steps, **grid_options)
    times, terms = samplers.table(sampler, the_path, at, **sampler_options)
    predictions.check(prediction, the_path, at)
    if guidance_channels is None and model.learn_sigma:
      guidance_channels = model.channels  # those after them, the variance's, stay conditional
    limiter = functools.partial(paths.lookup(LIMITS, limit, "limit"), **limit_options)
    jax.eval_shape(limiter, jnp.zeros((1, 2)))  # its errors, now

    def sample(params, extra, batch, rng, trajectory=False):
      start_key, step_key = jax.random.split(rng)
      label = batch["label"] if model.num_classes else None
      noise = batch["noise"] if "noise" in batch else jax.random.normal(
        start_key, (len(label), *model.image_size, model.channels))
      run = functools.partial(network(params), label=None)
      if model.num_classes:
        run = guided(network(params), label, jnp.full_like(label, model.num_classes),
                     batch.get("guidance", guidance_scale), guidance_interval, guidance_channels)
      step = predictions.denoiser(run, prediction, the_path, sigma_data=sigma_data,
                                  limit=None if limit == "none" else limiter,
                                  rederive_eps=rederive_eps, learned_variance=model.learn_sigma)
      start = noise * the_path.sigma(at[0])
      out = samplers.sample(step, start, at, the_path, sampler, trajectory=trajectory,
                            rng=step_key if {"noise", "churn"} & set(terms) else None,
                            **sampler_options)
      if not trajectory:
        return out
      x = jnp.concatenate([start[None], out[1]["x"]])                        # calls+1 b h w c
      return {"x": jnp.moveaxis(x, 1, 0), "x0": jnp.moveaxis(out[1]["x0"], 1, 0),
              "t": jnp.broadcast_to(times, (len(noise), len(times)))}
    return sample

  predict = {"denoise": denoise}
  for name, options in samples.items():
    predict[name] = _call(make_sample, options, f"method.samples.{name}")
    predict[f"{name}_path"] = functools.partial(predict[name], trajectory=True)
  needs = ("image", "label") if model.num_classes else ("image",)
  return Method(init, loss, predict, draw, needs=needs)


def _call(function, options: Mapping, field: str):
  """function(**options). Raises ValueError, with the field, on a keyword that it does not have."""
  try:
    return function(**options)
  except TypeError as error:
    raise ValueError(f"{field}: {error}") from error
