"""Published state dicts in our layout, and our gradients compared in theirs."""

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from interop import layout
from interop.published import FORMATS

REFERENCE = Path(__file__).parent / "reference"


def load(case: str) -> dict[str, np.ndarray]:
  return load_file(REFERENCE / case / "model.safetensors")


def arrays(case: str, name: str = "io") -> dict[str, np.ndarray]:
  return dict(np.load(REFERENCE / case / f"{name}.npz"))


def nhwc(x):
  return np.transpose(x, (0, 2, 3, 1))


def to_ours(form: str, weights, fields) -> tuple[dict, dict]:
  """(params, extra) from a state dict in a format of interop; `fields` are the model's."""
  tree = unflatten_dict(layout.ours(FORMATS[form].rows(fields), weights), sep="/")
  return tree["params"], tree.get("extra", {})


def to_theirs(form: str, fields, params, extra=None) -> dict[str, np.ndarray]:
  """What there is of our params and extra, or of their gradients, under the published names."""
  flat = flatten_dict({"params": params, "extra": extra or {}}, sep="/")
  return layout.theirs(FORMATS[form].rows(fields),
                       {path: np.asarray(x) for path, x in flat.items()})


def thinned(flat: np.ndarray) -> np.ndarray:
  """The numbers of a parameter that the recordings keep: at most 64, evenly spaced."""
  return flat[::max(1, -(-flat.size // 64))]


def assert_gradients(form, fields, grads, recorded, cancelled=()):
  """Every published parameter's gradient, to 1e-4 of its largest recorded number.

  Key biases have no gradient but rounding (softmax cancels them), nor have those `cancelled` by
  something else: both must be that small.
  """
  theirs = to_theirs(form, fields, grads)
  assert set(recorded) <= set(theirs)
  largest = max(np.abs(g).max() for g in recorded.values())
  for name, expected in recorded.items():
    actual = theirs[name].ravel()
    actual = actual if expected.size == actual.size else thinned(actual)
    if name.endswith(("key.bias", *cancelled)):
      assert np.abs(actual).max() < 1e-6 * largest and np.abs(expected).max() < 1e-6 * largest
      continue
    scale = np.abs(expected).max()
    assert scale > 1e-6 * largest, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale, err_msg=name)
