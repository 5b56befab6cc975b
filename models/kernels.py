"""Functions that XLA compiles badly when written plainly: each is its plain definition, faster.

What is done, and what it is for (measured on CPUs, float32): gradients by hand keep what is cheap
to compute again out of memory; sums over the last axis are products with a vector, for which there
is a library; products whose result is tall are formed transposed; heads stand before tokens, so
that every product of attention is one of contiguous matrices.
"""

import functools
import math

import jax
import jax.numpy as jnp


def _row_sums(x, weights):
  """sum_j x_ij weights_j: [n, d], [d] -> [n, 1]. On a CPU XLA's own reduction is half as fast."""
  return jax.lax.platform_dependent(
    x, weights, cpu=lambda x, w: (x @ w)[:, None],
    default=lambda x, w: (x * w[None]).sum(-1, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise(x, scale, bias, epsilon, dtype):
  return _normalise_forward(x, scale, bias, epsilon, dtype)[0]


def _normalise_forward(x, scale, bias, epsilon, dtype):                      # x: n d
  x32, shares = x.astype(jnp.float32), jnp.full(x.shape[-1], 1 / x.shape[-1])
  mean = _row_sums(x32, shares)                                              # n 1
  centred = x32 - mean
  rstd = jax.lax.rsqrt(_row_sums(jnp.square(centred), shares) + epsilon)     # n 1
  y = centred * rstd * scale[None] + bias[None]
  return y.astype(dtype), (x, mean, rstd, scale)


def _normalise_backward(dtype, residuals, g):
  x, mean, rstd, scale = residuals
  x, mean, rstd, g = jax.lax.optimization_barrier((x, mean, rstd, g.astype(jnp.float32)))
  normal = (x.astype(jnp.float32) - mean) * rstd
  weighted, scale_shares = g * normal, scale / len(scale)
  dx = g * scale[None] - _row_sums(g, scale_shares) - normal * _row_sums(weighted, scale_shares)
  return (dx * rstd).astype(x.dtype), weighted.sum(0), g.sum(0), None


_normalise.defvjp(_normalise_forward, _normalise_backward)


def layer_norm(x, scale, bias, epsilon: float, dtype=None):
  """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axis (1607.06450 eq. 3).

  The variance is of centred values (the fast form loses half its digits in float32). The result is
  of `dtype`, None: of that of x.
  """
  dtype = jnp.dtype(dtype or x.dtype)
  return _normalise(x.reshape(-1, x.shape[-1]), scale, bias, epsilon, dtype).reshape(x.shape)


@jax.custom_vjp
def gelu(x):
  """x times the normal distribution function of x (1606.08415), by erf: XLA's erfc is slower."""
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x, g):
  x, g = jax.lax.optimization_barrier((x, g))  # else erf is kept from the forward pass
  density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
  return (g * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5)) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def _product(x, kernel):
  return x @ kernel


def _kernel_gradient(x, g):
  """x^T g: [n, i], [n, o] -> [i, o]."""
  if x.shape[1] <= g.shape[1]:
    return x.T @ g
  return jax.lax.platform_dependent(
    x, g, cpu=lambda x, g: jax.lax.optimization_barrier(g.T @ x).T, default=lambda x, g: x.T @ g)


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)),
                lambda residuals, g: (g @ residuals[1].T, _kernel_gradient(residuals[0], g)))


def dot_general(x, kernel, dimension_numbers, **_):
  """`jax.lax.dot_general` of x [..., *i] and a kernel [*i, *o], as flax's dense layers call it."""
  axes = len(dimension_numbers[0][0])
  rows, columns = x.shape[:-axes], kernel.shape[axes:]
  flat = kernel.reshape(-1, math.prod(columns))                              # i o
  return _product(x.reshape(-1, len(flat)), flat).reshape(*rows, *columns)


def unstack(tree):
  """Arrays [n, ...] in a tree -> n trees of arrays [...].

  The gradient is one concatenation, where that of indexing is n sums of padded arrays.
  """
  leaves, structure = jax.tree.flatten(tree)
  rows = zip(*(jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves))
  return [jax.tree.unflatten(structure, [a.reshape(a.shape[1:]) for a in row]) for row in rows]


@jax.custom_vjp
def _attend(query, key, value, bias, mask):
  return _attend_forward(query, key, value, bias, mask)[0]


def _attend_forward(query, key, value, bias, mask):                          # b k n d
  logits = jnp.einsum("bkqd,bknd->bkqn", query, key, preferred_element_type=jnp.float32)
  logits = logits * query.shape[-1] ** -0.5
  logits = logits if bias is None else logits + bias.astype(jnp.float32)
  logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  weights = jax.nn.softmax(logits).astype(value.dtype)
  out = jnp.einsum("bkqn,bknd->bkqd", weights, value)
  return out, (query, key, value, bias, weights, out)


def _attend_backward(residuals, g):
  query, key, value, bias, weights, out = residuals
  dweights = jnp.einsum("bkqd,bknd->bkqn", g, value, preferred_element_type=jnp.float32)
  inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
  dlogits = weights * (dweights - inner)                                     # b k q n, float32
  dbias = None
  if bias is not None:
    axes = tuple(i for i, size in enumerate(bias.shape) if size < dlogits.shape[i])
    dbias = dlogits.sum(axes, keepdims=True).astype(bias.dtype)
  dlogits = (dlogits * query.shape[-1] ** -0.5).astype(query.dtype)
  dquery = jnp.einsum("bkqn,bknd->bkqd", dlogits, key)
  dkey = jnp.einsum("bkqn,bkqd->bknd", dlogits, query)
  dvalue = jnp.einsum("bkqn,bkqd->bknd", weights, g)
  return dquery, dkey, dvalue, dbias, None


_attend.defvjp(_attend_forward, _attend_backward)


def attention(query, key, value, *, bias=None, mask=None):
  """softmax(query key^T / sqrt(d) + bias) value (1706.03762 eq. 1), softmax in float32.

  query [b, q, k, d], key and value [b, n, k, d], bias and mask (True = attend) broadcastable to
  [b, k, q, n] -> [b, q, k, d].
  """
  out = _attend(*(x.transpose(0, 2, 1, 3) for x in (query, key, value)), bias, mask)
  return out.transpose(0, 2, 1, 3)
