"""Reads batches by tf.data or a PyTorch DataLoader when told to: the other sides of input.py.

  python benchmarks/peers/input.py --side=torch --cases=jpeg --data=FOLDER

Needs tensorflow, or torch and Pillow. What is read and made of it: see benchmarks/input.py.
"""

import argparse
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from benchmarks import worker

BATCH = {"memory": 256, "jpeg": 64}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, RATIO, SIZE = (0.08, 1.0), (3 / 4, 4 / 3), 224


def tf_data(folder: Path, case: str, linear: bool = False):
  import tensorflow as tf
  if case == "memory":
    with np.load(folder / "memory.npz") as file:
      data = tf.data.Dataset.from_tensor_slices({key: file[key] for key in file})
    data = data.shuffle(data.cardinality()).repeat().batch(BATCH[case], drop_remainder=True)
    return data.prefetch(2).as_numpy_iterator()
  files = sorted(map(str, (folder / case).rglob("*.jpg")))
  labels = [int(Path(file).parent.name) for file in files]

  def example(file, label):
    data = tf.io.read_file(file)
    shape = tf.io.extract_jpeg_shape(data)
    start, size, _ = tf.image.sample_distorted_bounding_box(
      shape, tf.zeros([0, 0, 4], tf.float32), area_range=AREA, aspect_ratio_range=RATIO,
      use_image_if_no_bounding_boxes=True)
    box = tf.concat([start[:2], size[:2]], 0)
    # JPEG's own exact transform, which all the others take, and not the faster one.
    image = tf.io.decode_and_crop_jpeg(data, box, channels=3, dct_method="INTEGER_ACCURATE")
    image = (tf.image.resize(image, (SIZE, SIZE)) if linear else
             tf.clip_by_value(tf.image.resize(image, (SIZE, SIZE), "bicubic", antialias=True),
                              0, 255))
    image = tf.image.random_flip_left_right(image)
    return {"image": (image / 255 - MEAN) / STD, "label": label}
  data = tf.data.Dataset.from_tensor_slices((files, labels)).shuffle(len(files)).repeat()
  data = data.map(example, tf.data.AUTOTUNE).batch(BATCH[case]).prefetch(2)
  return data.as_numpy_iterator()


def torch_loader(folder: Path, case: str, tensors: bool = False):
  """Decoded by Pillow; cropped and resized there too, or as tensors of bytes."""
  import torch
  from PIL import Image
  from torch.nn import functional
  from torch.utils.data import DataLoader, Dataset, TensorDataset
  if case == "memory":
    with np.load(folder / "memory.npz") as file:
      data = TensorDataset(torch.from_numpy(file["image"]), torch.from_numpy(file["label"]))
  else:
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))

    def box(width, height):
      """As torchvision's RandomResizedCrop, whose package has no wheel for every torch."""
      for _ in range(10):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
          return random.randint(0, height - h), random.randint(0, width - w), h, w
      return 0, 0, height, width

    class Photos(Dataset):
      files = sorted((folder / case).rglob("*.jpg"))

      def __len__(self):
        return len(self.files)

      def __getitem__(self, i):
        image = Image.open(self.files[i]).convert("RGB")
        top, left, height, width = box(*image.size)
        if not tensors:
          image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC,
                               (left, top, left + width, top + height))
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if tensors:
          image = functional.interpolate(image[None, :, top:top + height, left:left + width],
                                         (SIZE, SIZE), mode="bicubic", antialias=True)[0]
        image = image.flip(-1) if random.random() < 0.5 else image
        return image.float().div_(255).sub_(mean).div_(std), int(self.files[i].parent.name)
    data = Photos()
  loader = DataLoader(data, BATCH[case], shuffle=True, drop_last=True)
  while True:
    yield from loader


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--side", required=True)
  parser.add_argument("--cases", required=True)
  parser.add_argument("--data", type=Path, required=True)
  args = parser.parse_args()
  name, _, variant = args.side.partition(", ")
  make = {"tf.data": tf_data, "torch": torch_loader}[name]
  batches = make(args.data, args.cases, *([True] if variant else []))
  worker.serve(lambda: next(batches))


if __name__ == "__main__":
  main()
