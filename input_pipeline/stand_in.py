"""Data that has shapes and cannot be read: for planning a run where its data set is not."""

from input_pipeline import records
from input_pipeline.batches import Data, make_spec
from input_pipeline.sources import find, parts


def stand_in(source: str, batch_size: int, image_size=None, channels: int | None = None,
             num_classes: int | None = None, train_examples: int = 1_281_167,
             views: int = 1, latents: str | None = None, tokenizer: str | None = None,
             **text_options) -> Data:
  """Data that has shapes and cannot be read: for planning a run where its data set is not.

  The embedded source knows its own shapes; of others the caller has to say them. `text_options`
  are those of `text.make`; its "bpe" has its shapes without having seen a caption.

  Raises:
    ValueError: the image size, channels or number of classes is not known.
  """
  scheme = parts(source)[0]
  if scheme == "lines":
    features = {"text": records.Feature((), "str", "text")}
  else:
    if scheme == "glyphs":
      module, rest = find(source)
      native, channels, num_classes = module.shape(rest)
      image_size = image_size or native
    unknown = [field for field, value in {
      "augment.image_size": image_size, "model.channels": channels,
      "model.num_classes": num_classes}.items() if value is None]
    if unknown:
      raise ValueError(f"without the data of {source!r}, the config must say {', '.join(unknown)}")
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    features = records.image_features((*size, channels), num_classes,
                                      "latent" if latents else "image", text=tokenizer is not None)
  tokens = None
  if tokenizer is not None:
    from input_pipeline import text
    tokens = text.make(tokenizer, **text_options)

  def carrying(names=None):
    kept = {name: x for name, x in features.items() if names is None or name in names}
    spec = make_spec(kept, batch_size, [None] * views, tokens, latents)
    info = records.describe(features, {"train": train_examples}, "")
    return Data(info, None, None, spec, "train", None, tokens, carrying)
  return carrying()
