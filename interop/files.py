"""Files of weights, none of them trusted: safetensors, npz and, where torch is there, PyTorch's.

What a file says of itself is checked against its size before anything is allocated, nothing in it
is run, and no name in it becomes a path, except those of the parts of a folder, which are checked.
"""

import argparse
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

INDEX = "model.safetensors.index.json"
# What a folder's weights are called, best first; whatever else there is only if it is alone.
WEIGHTS = (INDEX, "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
PICKLED = (".pt", ".pth", ".bin", ".tar", ".ckpt")
INFLATION = 100  # times its size that an npz may unpack to, above this many bytes:
SMALL = 2**26


class Tensor(NamedTuple):
  """A tensor of a file, not yet read."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


class Source(NamedTuple):
  """Published weights, and what lies beside them."""

  path: Path
  tensors: dict[str, Tensor]
  metadata: dict[str, str]
  config: dict  # config.json, {} if there is none
  preprocessor: dict  # preprocessor_config.json
  tokenizer: Path | None  # tokenizer.json


def read(path, weights: str = "") -> Source:
  """Opens a file of weights or a folder that holds one; tensors are read one by one, when asked.

  Args:
    path: the file or folder. JSON beside a file is read as that in a folder.
    weights: which of several sets in a PyTorch file, such as "ema".

  Raises:
    FileNotFoundError: there is none.
    ValueError: not whole, not of a format that is read, or with a name that has no place in one.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"--from={path}: no such file or folder")
  folder = path if path.is_dir() else path.parent
  file = _weights_in(path) if path.is_dir() else path
  metadata: dict[str, str] = {}
  if file.name.endswith(".index.json"):
    tensors = _shards(file)
  elif file.suffix == ".safetensors":
    tensors, metadata = open_safetensors(file)
  elif file.suffix == ".npz":
    tensors = _npz(file)
  elif file.suffix in PICKLED:
    tensors = _torch(file, weights)
  else:
    raise ValueError(f"{file}: expected .safetensors, .npz, or PyTorch's {', '.join(PICKLED)}")
  if not tensors:
    raise ValueError(f"{file}: it holds no tensors")
  for name in tensors:
    if ".." in name or name.startswith(("/", "~")) or not name.isprintable() or "\\" in name:
      raise ValueError(f"{file}: {name!r} is no name of a parameter; the file was made to do harm")
  found = {name: _json(folder / name) for name in
           ("config.json", "open_clip_config.json", "preprocessor_config.json",
            "processor_config.json")}
  images = found["preprocessor_config.json"] or found["processor_config.json"].get(
    "image_processor") or {}  # the newer of Hugging Face's files
  tokenizer = folder / "tokenizer.json"
  return Source(file, tensors, metadata, found["config.json"] or found["open_clip_config.json"],
                images, tokenizer if tokenizer.is_file() else None)


def write(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None):
  """Writes .npz or .safetensors."""
  arrays = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in tensors.items()}
  if Path(path).suffix == ".npz":
    np.savez(path, **arrays)
  else:
    safetensors.numpy.save_file(arrays, path, metadata=dict(metadata or {"format": "pt"}))


def _weights_in(folder: Path) -> Path:
  for name in WEIGHTS:
    if (folder / name).is_file():
      return folder / name
  files = [file for file in sorted(folder.iterdir())
           if file.suffix in (".safetensors", ".npz", *PICKLED)]
  if len(files) != 1:
    raise FileNotFoundError(f"--from={folder}: expected one file of weights in it, found "
                            f"{', '.join(file.name for file in files) or 'none'}; give the file")
  return files[0]


def _json(path: Path) -> dict:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: no JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: expected a JSON object")
  return content


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """(tensors, metadata) of a file. Raises ValueError if it is not whole."""
  try:
    file = safetensors.safe_open(path, "np")  # checks all offsets against the file's size
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path}: damaged, or no safetensors: {error}") from error

  def tensor(name):
    part = file.get_slice(name)
    return Tensor(tuple(part.get_shape()), part.get_dtype(), lambda: file.get_tensor(name))
  return {name: tensor(name) for name in file.keys()}, file.metadata() or {}


def _shards(index: Path) -> dict[str, Tensor]:
  """The tensors of several files, which the index names."""
  where = _json(index).get("weight_map")
  if not isinstance(where, dict):
    raise ValueError(f"{index}: it has no weight_map")
  files = {}
  for shard in sorted(set(map(str, where.values()))):
    if Path(shard).name != shard or shard in ("", ".", ".."):
      raise ValueError(f"{index}: {shard!r} would be outside its folder")
    if not (index.parent / shard).is_file():
      raise FileNotFoundError(f"{index}: there is no {shard} beside it")
    files[shard], _ = open_safetensors(index.parent / shard)
  lacking = [name for name, shard in where.items() if name not in files[str(shard)]]
  if lacking:
    raise ValueError(f"{index}: {lacking[0]} is not in {where[lacking[0]]}")
  return {name: files[str(shard)][name] for name, shard in where.items()}


def _npz(path: Path) -> dict[str, Tensor]:
  size = path.stat().st_size
  try:
    archive = zipfile.ZipFile(path)
    members = [info for info in archive.infolist() if not info.is_dir()]
  except (zipfile.BadZipFile, OSError) as error:
    raise ValueError(f"{path}: damaged, or no npz: {error}") from error
  if sum(info.file_size for info in members) > max(SMALL, INFLATION * size):
    raise ValueError(f"{path}: {size:,} bytes that would unpack to more than {INFLATION} times as "
                     "many; it is not read")

  def tensor(info):
    with archive.open(info) as file:
      version = np.lib.format.read_magic(file)
      header = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[version]
      shape, _, dtype = header(file)
      if dtype.hasobject:
        raise ValueError("it holds Python objects (a pickle), which are not read")
      if file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size:
        raise ValueError(f"an array of shape {shape} does not fit its {info.file_size:,} bytes")

    def read():
      with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
    return Tensor(shape, dtype.name, read)

  tensors = {}
  for info in members:
    try:
      tensors[info.filename.removesuffix(".npy")] = tensor(info)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
      raise ValueError(f"{path}: {info.filename}: {error}") from error
  return tensors


def _torch(path: Path, weights: str) -> dict[str, Tensor]:
  """The tensors of a PyTorch checkpoint, of one of its sets: `weights`, or the averaged ones."""
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path}: PyTorch's files are read only where torch is installed. Or turn it into "
      "safetensors where it is: python -c \"import torch, safetensors.torch as s; "
      f"c = torch.load('{path.name}', weights_only=True, map_location='cpu'); "
      "s.save_file({k: v.contiguous().clone() for k, v in c.get('state_dict', c).items()}, "
      "'model.safetensors')\"") from error
  try:
    with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments: plain data
      content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # a pickle that would run something, or whatever torch makes of bytes
    raise ValueError(f"{path}: not a file of weights alone: {str(error).splitlines()[0]}"
                     ) from error
  if not isinstance(content, Mapping) or weights and weights not in content:
    raise ValueError(f"{path}: expected a dict of tensors"
                     + (f", or one with {weights!r}" if weights else ""))
  for name in (weights, "ema", "model_ema", "state_dict_ema", "model", "state_dict"):
    if isinstance(content.get(name), Mapping):
      content = content[name]
      break
  tensors = {}
  for name, x in content.items():
    if not isinstance(x, torch.Tensor):
      raise ValueError(f"{path}: {name!r} is no tensor; which set of them is meant? Give "
                       "--weights=NAME")
    tensors[name] = Tensor(tuple(x.shape), str(x.dtype).removeprefix("torch."),
                           lambda x=x: (x.float() if x.dtype == torch.bfloat16 else x).numpy())
  return tensors
