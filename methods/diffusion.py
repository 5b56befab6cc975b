"""Diffusion and flow matching: one network, any path, prediction, weighting and sampler."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffusion import grids, objectives, paths, predictions, samplers
from diffusion.guidance import guided
from methods.method import Method

LIMITS = {"none": lambda x0: x0, "clip": lambda x0: jnp.clip(x0, -1, 1),
          "threshold": predictions.threshold}


class Frame(NamedTuple):
  """What training and samplers have in common; `make` describes the fields."""

  model: Any
  path: paths.Path
  prediction: str
  sigma_data: float
  time_scale: float

  def network(self, params, rng=None):
    """(x [b, h, w, c], t [b], label [b]) -> the output, in training where rng is given."""
    train = rng is not None
    rngs = {"dropout": rng} if train else {}
    return lambda x, t, label: self.model.apply({"params": params}, x, t * self.time_scale, label,
                                                train=train, rngs=rngs)


def make_frame(model, path: str, path_options: Mapping, prediction: str, sigma_data: float,
               time_scale: float | None) -> Frame:
  """Raises ValueError where path, prediction and network do not go together."""
  the_path = _call(paths.PATHS[path], path_options, f"method.path_options of path {path!r}")
  predictions.check(prediction, the_path)
  if model.learn_sigma and not the_path.steps:
    raise ValueError(f"model.learn_sigma needs method.path = 'vp_discrete', not {path!r}")
  if time_scale is None:
    time_scale = 1.0 if the_path.steps else 1000.0
  return Frame(model, the_path, prediction, sigma_data, time_scale)


def losses(frame: Frame, params, batch, rng, vlb_weight: float, **weighting):
  """Each example's loss [b] at its time batch["time"] [b], with its noise batch["noise"].

  `weighting`: as of `objectives.loss`, or with a learned variance `objectives.hybrid`.
  """
  model, path, prediction, sigma_data, _ = frame
  x0, eps, t = batch["image"], batch["noise"], batch["time"]
  x_t = paths.noised(path, x0, eps, t)
  inputs = predictions.network_inputs(prediction, x_t, path, t, sigma_data)
  label = None
  if model.num_classes:
    label = jnp.where(batch["drop"], model.num_classes, batch["label"])
  output = frame.network(params, rng)(*inputs, label)
  weighting |= {"sigma_data": sigma_data}
  if model.learn_sigma:
    return objectives.hybrid(prediction, output, x0, eps, x_t, path, t, vlb_weight, **weighting)
  return objectives.loss(prediction, output, x0, eps, path, t, **weighting)


def make_sample(frame: Frame, *, sampler: str = "heun", steps: int = 50, grid: str = "uniform",
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
  model, path = frame.model, frame.path
  at = grids.make(grid, path, steps, **grid_options)
  times, terms = samplers.table(sampler, path, at, **sampler_options)
  predictions.check(frame.prediction, path, at)
  if guidance_channels is None and model.learn_sigma:
    guidance_channels = model.channels  # those after them, the variance's, stay conditional
  limiter = functools.partial(paths.lookup(LIMITS, limit, "limit"), **limit_options)
  jax.eval_shape(limiter, jnp.zeros((1, 2)))  # its errors, now

  def sample(params, extra, batch, rng, trajectory=False):
    start_key, step_key = jax.random.split(rng)
    label = batch["label"] if model.num_classes else None
    noise = batch["noise"] if "noise" in batch else jax.random.normal(
      start_key, (len(label), *model.image_size, model.channels))
    run = functools.partial(frame.network(params), label=None)
    if model.num_classes:
      run = guided(frame.network(params), label, jnp.full_like(label, model.num_classes),
                   batch.get("guidance", guidance_scale), guidance_interval, guidance_channels)
    step = predictions.denoiser(run, frame.prediction, path, sigma_data=frame.sigma_data,
                                limit=None if limit == "none" else limiter,
                                rederive_eps=rederive_eps, learned_variance=model.learn_sigma)
    start = noise * path.sigma(at[0])
    out = samplers.sample(step, start, at, path, sampler, trajectory=trajectory,
                          rng=step_key if {"noise", "churn"} & set(terms) else None,
                          **sampler_options)
    if not trajectory:
      return out
    x = jnp.concatenate([start[None], out[1]["x"]])                          # calls+1 b h w c
    return {"x": jnp.moveaxis(x, 1, 0), "x0": jnp.moveaxis(out[1]["x0"], 1, 0),
            "t": jnp.broadcast_to(times, (len(noise), len(times)))}
  return sample


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
  frame = make_frame(model, path, path_options, prediction, sigma_data, time_scale)
  if not 0 <= label_dropout < 1:
    raise ValueError(f"method.label_dropout = {label_dropout}: expected a number in [0, 1)")
  draw_times = functools.partial(objectives.sample_times, path=frame.path, times=times,
                                 stratified=stratified, **times_options)
  jax.eval_shape(lambda: draw_times(jax.random.key(0), 2))  # their errors, now

  def draw(rng, batch):
    noise_key, time_key, drop_key = jax.random.split(rng, 3)
    b = batch["image"].shape[0]
    return {
      "noise": jax.random.normal(noise_key, batch["image"].shape),
      "time": draw_times(time_key, b),
      "drop": jax.random.bernoulli(drop_key, label_dropout, (b,)), **batch}

  def init(rng, batch):
    b = batch["image"].shape[0]
    label = jnp.zeros(b, jnp.int32) if model.num_classes else None
    return model.init(rng, batch["image"], jnp.zeros(b), label)["params"], {}

  def loss(params, extra, batch, rng, step):
    value = losses(frame, params, batch, rng, vlb_weight, weighting=weighting, gamma=gamma)
    return value.mean(), (extra, {})

  def denoise(params, extra, batch, rng):
    label = batch.get("label") if model.num_classes else None
    return frame.network(params)(batch["image"], batch["t"], label)

  predict = {"denoise": denoise}
  for name, options in samples.items():
    predict[name] = _call(functools.partial(make_sample, frame), options, f"method.samples.{name}")
    predict[f"{name}_path"] = functools.partial(predict[name], trajectory=True)
  needs = ("image", "label") if model.num_classes else ("image",)
  return Method(init, loss, predict, draw, needs=needs)


def _call(function, options: Mapping, field: str):
  """function(**options). Raises ValueError, with the field, on a keyword that it does not have."""
  try:
    return function(**options)
  except TypeError as error:
    raise ValueError(f"{field}: {error}") from error
