"""Our DiT against a recording of the published one, its loss and gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from tiers import suite

from models import dit, vit

HEADS = 4
SMALL = dict(image_size=8, channels=4, patch=2, width=48, depth=2, heads=HEADS, num_classes=10,
             learn_sigma=True, positions="learned")


@pytest.fixture(scope="module")
def params():
  return published.to_ours("dit/original", published.load("dit"), SMALL)[0]


@pytest.fixture(scope="module")
def io():
  recorded = published.arrays("dit")
  return {name: published.nhwc(x) if x.ndim == 4 else x for name, x in recorded.items()}


@pytest.fixture(scope="module")
def denoise():
  model = dit.make(**SMALL)
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def test_output(params, io, denoise):
  np.testing.assert_allclose(denoise(params, io["x"], io["t"], io["y"]), io["out"], atol=1e-5)


def test_fractional_times(params, io, denoise):
  out = denoise(params, io["x"], io["frac_t"], io["y"])
  np.testing.assert_allclose(out, io["frac_out"], atol=1e-5)


def test_guidance(params, io, denoise):
  """2207.12598 eq. 6 with weight scale - 1, on the first three channels alone, as published."""
  b = len(io["cfg_x"]) // 2
  x = np.concatenate([io["cfg_x"][:b]] * 2)  # the second half of the labels is null
  out = denoise(params, x, io["cfg_t"], io["cfg_y"])
  np.testing.assert_allclose(out, io["cfg_raw"], atol=1e-5)
  cond, null = out[:b, ..., :3], out[b:, ..., :3]
  guided = np.concatenate([null + io["cfg_scale"] * (cond - null)] * 2)
  guided = np.concatenate([guided, out[..., 3:]], axis=-1)
  np.testing.assert_allclose(guided, io["cfg_out"], atol=1e-5)
  np.testing.assert_array_equal(denoise(params, x, io["cfg_t"], None)[b:], out[b:])


def test_stages(params, io):
  """Patches, time, the first block and the last layer, each from the recorded stage before it."""
  def run(module, params, *args):
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args))(params, *args)
  patches = run(vit.PatchEmbed(48), params["embed"], vit.patchify(io["x"], 2))
  np.testing.assert_allclose(patches, io["tap_patches"], atol=1e-5)
  condition = params["condition"]
  time = run(dit.Condition(48), {k: v for k, v in condition.items() if k != "label"}, io["t"])
  np.testing.assert_allclose(time, io["tap_t_emb"], atol=1e-5)
  label = condition["label"]["embedding"][io["y"]]
  c = jax.nn.silu(io["tap_t_emb"] + label)
  x = io["tap_patches"] + params["position"]["table"][None]
  first = jax.tree.map(lambda a: a[0], params["blocks"])
  x = run(dit.Block(HEADS, 192), first, x, c)
  np.testing.assert_allclose(x, io["tap_block0"], atol=1e-5)
  second = jax.tree.map(lambda a: a[1], params["blocks"])
  x = run(dit.Block(HEADS, 192), second, io["tap_block0"], c)
  tokens = run(dit.Final(32), params["final"], x, c)
  np.testing.assert_allclose(tokens, io["tap_final_tokens"], atol=1e-5)


# --- The hybrid loss of 2102.09672, eq. 15 and 16, on 1000 steps of linear beta -------------------

BETA = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETA)
PREVIOUS = np.append(1.0, ALPHA_BAR[:-1])
BETA_TILDE = BETA * (1 - PREVIOUS) / (1 - ALPHA_BAR)  # 2006.11239 eq. 7
FLOOR = np.append(BETA_TILDE[1], BETA_TILDE[1:])  # 0 at the first step, so the second stands in


def hybrid_loss(out, x0, noise, x_t, t):
  """L_simple [b] and L_vlb [b] in bits a dimension: gradients of the latter to variances only."""
  def at(table):
    return jnp.asarray(table[t], jnp.float32).reshape(-1, 1, 1, 1)
  eps, v = jnp.split(out, 2, axis=-1)
  simple = jnp.square(noise - eps).mean((1, 2, 3))
  share = (v + 1) / 2
  log_var = share * at(np.log(BETA)) + (1 - share) * at(np.log(FLOOR))       # eq. 15
  guess = (x_t - at(np.sqrt(1 - ALPHA_BAR)) * jax.lax.stop_gradient(eps)) / at(np.sqrt(ALPHA_BAR))

  def posterior_mean(x0):  # 2006.11239 eq. 7
    return (at(np.sqrt(PREVIOUS) * BETA / (1 - ALPHA_BAR)) * x0
            + at(np.sqrt(1 - BETA) * (1 - PREVIOUS) / (1 - ALPHA_BAR)) * x_t)

  mean = posterior_mean(guess)
  gap = posterior_mean(x0) - mean
  kl = 0.5 * (log_var - at(np.log(FLOOR)) - 1 + at(FLOOR) * jnp.exp(-log_var)
              + jnp.square(gap) * jnp.exp(-log_var))

  def cdf(x):  # the published approximation of the normal's
    z = (x - mean) * jnp.exp(-0.5 * log_var)
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

  above, below = cdf(x0 + 1 / 255), cdf(x0 - 1 / 255)  # 2006.11239 eq. 13
  likelihood = jnp.where(x0 < -0.999, above, jnp.where(x0 > 0.999, 1 - below, above - below))
  nll = -jnp.log(jnp.maximum(likelihood, 1e-12))
  vlb = jnp.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / np.log(2)
  return simple, vlb


@pytest.mark.parametrize("fields", suite([{}, {"scan": True}, {"remat": "dots"}, {
  "remat": "full", "scan": True}], 0, 3))
def test_loss_and_gradients(params, fields):
  train = {name: published.nhwc(x) if x.ndim == 4 else x
           for name, x in published.arrays("dit", "train").items()}
  model = dit.make(**SMALL, **fields)

  def loss(params):
    out = model.apply({"params": params}, train["x_t"], train["t"], train["y"], train=True)
    terms = hybrid_loss(out, train["x0"], train["noise"], train["x_t"], train["t"])
    return sum(terms).mean(), terms

  (_, (simple, vlb)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(simple, train["term_mse"], atol=1e-5)
  np.testing.assert_allclose(vlb, train["term_vb"], atol=1e-5)
  # Published positions are fixed, so they have no recorded gradient.
  published.assert_gradients("dit/original", SMALL, grads, published.arrays("dit", "grads"))
