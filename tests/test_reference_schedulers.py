"""Samplers against recorded trajectories of diffusers' schedulers, at every call."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from diffusion import grids, paths, predictions, samplers

INDEX = json.loads((published.REFERENCE / "schedulers" / "index.json").read_text())
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def discrete_path(config):
  return paths.vp_discrete(
    betas=BETAS[config["beta_schedule"]], steps=config["num_train_timesteps"],
    beta_start=config["beta_start"], beta_end=config["beta_end"],
    zero_snr=config.get("rescale_betas_zero_snr", False))


def discrete_grid(path, config, steps, **options):
  return grids.make("discrete", path, steps, spacing=config["timestep_spacing"],
                    offset=config.get("steps_offset", 0), **options)


def ddim(config, steps, prediction="eps", **options):
  """DDIM and DDPM: they step to t - T // n, whichever t comes next."""
  path = discrete_path(config)
  final = path.t_data if config.get("set_alpha_to_one", True) else 0.0
  times = discrete_grid(path, config, steps, final=final)
  targets = np.maximum(times[:-1] - path.steps // steps, final)
  if "variance_type" in config:
    kind = config["variance_type"].split("_")
    options["variance"] = kind[0] if kind[0] == "learned" else kind[1]
  return path, times, "ddpm" if "variance_type" in config else "ddim", {
    "targets": targets, **options}


def in_sigma(config, steps, recorded):
  """Euler, ancestral and Heun: in EDM's frame.

  A Karras grid starts from its ends as recorded: 1 - alpha^2, in float32 there, is off by 1e-4.
  """
  path = discrete_path(config)
  if config.get("use_karras_sigmas"):
    high, low = recorded[[0, -2]].astype(float)
    return path, grids.make("karras", paths.edm(low, high), steps)
  times = discrete_grid(path, config, steps, rounded=False)
  return path, grids.to_sigma(path, times, linear=True)


def multistep(config, steps):
  path = discrete_path(config)
  final = 0.0 if config["final_sigmas_type"] == "sigma_min" else path.t_data
  if config.get("use_karras_sigmas"):
    times = grids.make("karras", path, steps, final=final)
  else:
    times = discrete_grid(path, config, steps, final=final,
                          drop_last=config["timestep_spacing"] != "trailing")
  return path, times, "dpmpp_2m", multistep_options(config)


def multistep_options(config):
  kind = config["algorithm_type"]
  return {"order": config["solver_order"], "of": "eps" if kind == "dpmsolver" else "x0",
          "sde": kind.startswith("sde"), "solver": config["solver_type"],
          "lower_order_final": config.get("lower_order_final", False)}


def edm(config, steps):
  path = paths.edm(config["sigma_min"], config["sigma_max"])
  grid = {"karras": "karras", "exponential": "log_snr"}[config["sigma_schedule"]]
  return path, grids.make(grid, path, steps)


def flow(config, steps, sigmas=None, mu=None):
  """The least time, 1 / T, is shifted twice, once before the grid and once with it."""
  path, shift = paths.linear(), config["shift"] if mu is None else np.exp(mu)
  if sigmas is not None:
    times = np.append(grids.shift_times(np.array(sigmas), shift), 0)
  else:
    end = grids.shift_times(1 / config["num_train_timesteps"], config["shift"])
    times = grids.make("shifted", path, steps, shift=shift, end=end)
  return path, times, "euler", {}


def settings(case, io):
  """(path, times, sampler, options) of ours, and whether they are in EDM's frame."""
  run = INDEX[case]
  config, steps, name = run["config"], run["steps"], run["scheduler"]
  if name in ("DDIMScheduler", "DDPMScheduler"):
    return *ddim(config, steps, **run["step"]), False
  if name == "DPMSolverMultistepScheduler":
    return *multistep(config, steps), False
  if name == "EDMEulerScheduler":
    return *edm(config, steps), "euler", {}, False
  if name == "EDMDPMSolverMultistepScheduler":
    return *edm(config, steps), "dpmpp_2m", multistep_options(config), False
  if name == "FlowMatchEulerDiscreteScheduler":
    return *flow(config, steps, **run["set_timesteps"]), False
  sampler = {"EulerDiscreteScheduler": "euler", "HeunDiscreteScheduler": "heun",
             "EulerAncestralDiscreteScheduler": "euler_ancestral"}[name]
  return *in_sigma(config, steps, io.get("sigmas")), sampler, {}, True


def optimal(prediction, path, mu, s, sigma_data):
  """The optimal network for data N(mu, s^2 I), as diffusers' models are called."""
  def network(x, t):
    if prediction == "edm":
      sigma = jnp.exp(4 * t)[:, None, None]
      x, alpha = x * jnp.sqrt(sigma**2 + sigma_data**2), 1.0
    else:
      alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    total = s**2 * alpha**2 + sigma**2
    x0 = (s**2 * alpha * x + sigma**2 * mu) / total
    eps = sigma * (x - alpha * mu) / total
    if prediction == "edm":
      norm = jnp.sqrt(sigma**2 + sigma_data**2)
      return (x0 - sigma_data**2 / norm**2 * x) * norm / (sigma * sigma_data)
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[prediction]
  return network


@pytest.mark.parametrize("case", INDEX)
def test_trajectory(case):
  config, io = INDEX[case]["config"], published.arrays("schedulers", case)
  io = {key: a.swapaxes(-1, -2) if a.ndim > 2 else a for key, a in io.items()}  # channels last
  path, times, sampler, options, scaled = settings(case, io)
  calls = len(io["x"]) - 1
  name = INDEX[case]["scheduler"]
  prediction = ("edm" if name.startswith("EDM") else "velocity" if name.startswith("Flow")
                else PREDICTIONS[config["prediction_type"]])
  network = optimal(prediction, path, io["mu"].astype(np.float32), float(io["s"]),
                    config.get("sigma_data"))
  learned = config.get("variance_type") == "learned_range"
  if learned:  # recorded variances beside our own predictions
    recorded, predict = jnp.asarray(io["model_output"][..., 3:]), network

    def network(x, t):
      k = jnp.argmin(jnp.abs(times[:-1].astype("float32") - t[0]))
      return jnp.concatenate([predict(x, t), recorded[k]], axis=-1)

  clip = config["clip_sample_range"] if config.get("clip_sample") else None
  denoise = predictions.denoiser(
    network, prediction, path, sigma_data=config.get("sigma_data", 0.5),
    learned_variance=learned, limit=clip and (lambda x0: jnp.clip(x0, -clip, clip)))
  frame = path
  if scaled:
    denoise, frame = predictions.sigma_frame(denoise, path)
  noise = io.get("noise")
  if noise is not None:  # those without a draw in the last step
    noise = np.concatenate([noise, np.zeros((calls - len(noise), *noise.shape[1:]), "float32")])
  _, states = jax.jit(lambda x, noise: samplers.sample(
    denoise, x, times, frame, sampler, noise=noise, trajectory=True, **options))(
      io["x"][0], noise)
  np.testing.assert_allclose(states["x"], io["x"][1:], rtol=1e-5, atol=1e-5)
  if "pred_x0" in io:
    # x_0 is a difference of terms of the size of x / alpha, with their rounding.
    calls = samplers.table(sampler, frame, times, **options).t
    atol = 1e-5 + 1e-6 * np.exp(-frame.log_snr(calls) / 2)
    assert (np.abs(states["x0"] - io["pred_x0"]) <= atol[:, None, None, None]).all()


@pytest.mark.parametrize("case", [
  case for case, run in INDEX.items() if "beta_schedule" in run["config"]])
def test_schedule_and_noising(case):
  path, io = discrete_path(INDEX[case]["config"]), published.arrays("schedulers", case)
  steps = np.round(np.linspace(0, path.steps - 1, 16))
  np.testing.assert_allclose(path.alpha(steps)**2, io["alphas_cumprod"], rtol=1e-5, atol=1e-7)
  if "an_t" in io:
    np.testing.assert_allclose(paths.noised(path, io["an_x0"], io["an_noise"], io["an_t"]),
                               io["an_xt"], atol=1e-5)
    np.testing.assert_allclose(predictions.from_x0_eps("v", io["an_x0"], io["an_noise"], path,
                                                       io["an_t"]), io["an_v"], atol=1e-5)
