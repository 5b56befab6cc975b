"""Which predictions are right."""


def topk_correct(logits, label, k: int):
  """Whether the label is among the k highest logits, equal ones in class order: bool [b].

  A label of -inf or NaN never is: neither a class without a vote nor a diverged network is right.
  By comparisons, which stay where an example is: a sort would gather the batch. Of NumPy's arrays
  in NumPy, so that float64 stays what it is.
  """
  xp = logits.__array_namespace__()
  own = xp.take_along_axis(logits, label[:, None], axis=-1)                  # b 1
  earlier = xp.arange(logits.shape[-1])[None] < label[:, None]
  ahead = (logits > own) | ((logits == own) & earlier)                       # b classes
  return (ahead.sum(-1) < k) & (own > -xp.inf)[:, 0]
