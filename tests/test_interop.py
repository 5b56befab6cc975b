"""Published weights into run directories and back: recordings, full-size names, bad files."""

import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import published
import pytest
import tokenizers
from arrays import photo
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

import convert
from interop import preprocessing
from interop import published as interop
from models import dit, positions
from trainer import checkpoints, recipe

NAMES = Path(__file__).parent / "published_names"


def importing(source, to, *flags):
  return convert.main([f"--from={source}", f"--to={to}", *flags])


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pixels(io):
  return {"image": published.nhwc(io["pixel_values"])}


def pair(io):
  return {**pixels(io), "text": io["input_ids"].astype(np.int32)}


# Recording -> (the format it is written in, {prediction: (batch, recorded output)} by its arrays).
RECORDED = {
  "vit": ("vit/hf", lambda io: {"logits": (pixels(io), io["logits"])}),
  "vit_timm_avg": ("vit/timm", lambda io: {"logits": (pixels(io), io["logits"])}),
  "vitmae": ("mae/hf", lambda io: {
    "reconstruct": ({**pixels(io), "noise": io["noise"]}, {"pred": io["logits"]})}),
  "moco_v1": ("moco/original", lambda io: {}),  # steps of training: tests/test_reference_moco.py
  "moco_v2": ("moco/original", lambda io: {}),
  "moco_v3_vit": ("moco/v3", lambda io: {}),
  "resnet": ("resnet/hf", lambda io: {"logits": (pixels(io), io["logits_eval"])}),
  "resnet_torchvision_layout": ("resnet/torchvision", lambda io: {
    "logits": (pixels(io), io["logits_eval"])}),
  "clip_eos": ("clip/hf", lambda io: {
    "embed_image": (pair(io), io["image_embeds_nomask"]),
    "embed_text": (pair(io), io["text_embeds_nomask"])}),
  "clip_openai_layout": ("clip/openai", lambda io: {
    "embed_image": (pair(io), unit(io["image_features"])),
    "embed_text": (pair(io), unit(io["text_features"]))}),
  "siglip": ("clip/siglip", lambda io: {"embed_image": (pair(io), io["image_embeds"]),
                                        "embed_text": (pair(io), io["text_embeds"])}),
  "bert_mlm": ("bert/hf", lambda io: {"logits": (
    {"text": io["input_ids"].astype(np.int32), "segments": io["token_type_ids"].astype(np.int32)},
    io["logits_nomask"])}),
  "dit": ("dit/original", lambda io: {"denoise": (
    {"image": published.nhwc(io["x"]), "t": io["t"], "label": io["y"]},
    published.nhwc(io["out"]))}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("case", RECORDED)
def test_recordings_go_in_and_out(case, directory, capsys):
  """Recorded outputs to 1e-5 by load_run; the way back gives the file bit for bit."""
  source, (form, expected) = published.REFERENCE / case / "model.safetensors", RECORDED[case]
  assert importing(source, directory / case) == 0
  told = capsys.readouterr().out
  assert form in told and "missing" not in told and "unexpected" not in told
  run = checkpoints.load_run(directory / case)
  for name, (batch, outputs) in expected(published.arrays(case)).items():
    ours = run.predict(name, batch)
    outputs = outputs if isinstance(outputs, dict) else {None: outputs}
    for key, output in outputs.items():
      np.testing.assert_allclose(ours if key is None else ours[key], output, atol=1e-5)
  out = directory / f"{case}_out"
  assert convert.main([f"--from={directory / case}", f"--to={out}",
                       f"--to_format={interop.FORMATS[form].publisher}"]) == 0
  before, after = load_file(source), load_file(out / "model.safetensors")
  counters = {name for name in set(after) - set(before) if not after[name].any()}
  assert set(after) == {*before, *counters}  # the files kept for tests are without their counters
  assert all(name.endswith(("num_batches_tracked", "queue_ptr")) for name in counters)
  for name, x in before.items():
    assert after[name].dtype == x.dtype and np.array_equal(after[name], x), name


@pytest.mark.slow
def test_a_run_of_ours_goes_in_and_out_of_every_format_of_its_family(directory, capsys):
  """Through each publisher's layout and in again every parameter has the same bits."""
  for case, publishers in {"vit": ("hf", "timm", "npz", "vit/augreg"),
                           "vitmae": ("hf", "original"), "clip_eos": ("hf", "openai"),
                           "resnet": ("hf", "torchvision")}.items():
    if not (directory / case).exists():
      assert importing(published.REFERENCE / case / "model.safetensors", directory / case) == 0
    first = checkpoints.load_run(directory / case)
    before = flatten_dict(first.params, sep="/")
    for publisher in publishers:
      where = directory / f"{case}_as_{publisher.replace('/', '_')}"
      assert convert.main([f"--from={directory / case}", f"--to={where}_out",
                           f"--to_format={publisher}"]) == 0, capsys.readouterr().err
      flags = ["--config.model.decoder_heads=4", "--config.model.norm_eps=1e-12"]
      flags = flags if case == "vitmae" else []
      if publisher == "original" or publisher == "timm":
        flags += ["--config.model.heads=4"]
      assert importing(f"{where}_out", where, *flags) == 0, capsys.readouterr().err
      after = flatten_dict(checkpoints.load_run(where).params, sep="/")
      assert set(after) == set(before)
      for path, x in before.items():
        assert np.array_equal(x, after[path]), (publisher, path)


def test_sit_is_told_by_format(directory, capsys):
  """Names are DiT's. Data at t = 0 here and 1 there, velocity to the noise and to the data."""
  source, io = published.REFERENCE / "dit" / "model.safetensors", published.arrays("dit")
  assert importing(source, directory / "sit", "--format=sit") == 0
  run = checkpoints.load_run(directory / "sit")
  weights = published.to_ours("dit/original", published.load("dit"), dict(run.config.model))[0]
  theirs = dit.make(**{name: x for name, x in run.config.model.items() if name != "name"}
                    | {"learn_sigma": True})
  x, time = published.nhwc(io["x"]), np.array([0.05, 0.3, 0.7, 0.98], np.float32)
  out = run.predict("denoise", {"image": x, "t": time, "label": io["y"]})
  expected = theirs.apply({"params": weights}, x, 1 - time, io["y"])[..., :4]
  np.testing.assert_allclose(out, -expected, atol=1e-5)
  assert convert.main([f"--from={directory / 'sit'}", f"--to={directory / 'sit_out'}",
                       "--to_format=sit"]) == 0, capsys.readouterr().err
  after = load_file(directory / "sit_out" / "model.safetensors")
  assert all(np.array_equal(after[name], x) for name, x in published.load("dit").items())


# --- Full size, on abstract arrays ----------------------------------------------------------------

def listed(name: str) -> dict[str, tuple[int, ...]]:
  """{parameter: shape} of a file of `name AxBx...` lines; {0..11} counts layers."""
  shapes = {}
  for line in (NAMES / f"{name}.txt").read_text().splitlines():
    name, shape = line.split()
    shape = () if shape == "-" else tuple(map(int, shape.split("x")))
    layers = re.search(r"\{0\.\.(\d+)\}", name)
    for i in range(int(layers[1]) + 1 if layers else 1):
      shapes[re.sub(r"\{.*\}", str(i), name)] = shape
  return shapes


FULL = {  # file -> (format, parameters in all, of them not ours, the model's fields beside)
  "vit_hf_b16": ("vit/hf", 86_567_656), "vit_hf_l16": ("vit/hf", 304_326_632),
  "vit_hf_h14": ("vit/hf", 632_045_800), "mae_hf_b16": ("mae/hf", 111_907_840),
  "mae_hf_l16": ("mae/hf", 329_541_888), "clip_hf_b32": ("clip/hf", 151_277_313),
  "clip_hf_l14": ("clip/hf", 427_616_513), "siglip_hf_b16": ("clip/siglip", 203_155_970),
  "clip_openai_b32": ("clip/openai", 151_277_313), "clip_openai_l14": ("clip/openai", 427_616_513),
  "bert_hf_base": ("bert/hf", 109_514_298),
  "resnet_hf_50": ("resnet/hf", 25_557_032), "resnet_torchvision_50": (
    "resnet/torchvision", 25_557_032), "dit_xl2": ("dit/original", 675_129_632),
  "vit_timm_b16": ("vit/timm", 86_567_656), "vit_timm_siglip_b16": ("vit/timm", 92_884_224),
  "vit_timm_reg4_b14": ("vit/timm", 86_582_016), "vit_dinov2_reg4_b14": ("vit/dinov2", 86_583_552),
  "vit_deit_distilled_b16": ("vit/deit", 87_338_192),
}


@pytest.mark.parametrize("name", FULL)
def test_what_a_wrapper_puts_before_all_names_is_taken_off(name):
  """DDP, torch.compile, Lightning and what they make of each other; never what a format says."""
  names = listed(name)
  assert interop.wrapper(names) == ""
  for prefix in ("module.", "_orig_mod.", "model.", "student.", "module._orig_mod.",
                 "model.module."):
    assert interop.wrapper([prefix + n for n in names]) == prefix
  assert interop.wrapper(["module." + n for n in names] + ["n_averaged"]) == ""


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_and_shapes_map_one_to_one(name):
  shapes, (wanted, count) = listed(name), FULL[name]
  config = {"architecture": name, "quick_gelu": True, "vision_cfg": {}, "text_cfg": {}}
  form = interop.recognise(shapes, config)
  assert form.name == wanted
  canonical = {c: shapes[n] for c, n in form.canonical(shapes).items()}
  network = form.describe(canonical, config if "openai" in name else {}, {})
  source = type("Source", (), dict(config={}, preprocessor={}))
  full = convert.complete_config(network, source, form, {})
  method = recipe.make_method(full)
  model = interop.fields(recipe.make_model(full), full.model)
  expected = jax.eval_shape(lambda: convert.initial(method, model))
  entries = interop.account(form, model, canonical, expected)
  told = {entry.status for entry in entries}
  assert told <= {"taken", "transposed", "aside", "new"}, entries
  assert all(e.ours.startswith("params/head") for e in entries if e.status == "new"), entries
  back = jax.eval_shape(lambda arrays: interop.give(form, model, arrays), expected)
  aside = {entry.theirs for entry in entries if entry.status == "aside"}
  learned = {n for n in canonical if not n.endswith(("running_mean", "running_var",
                                                     "num_batches_tracked"))}
  assert sum(int(np.prod(canonical[n])) for n in learned) == count
  new = {n for n in back if n.startswith(("head.", "classifier.")) and n not in canonical}
  assert {n: x.shape for n, x in back.items() if n not in new} | {
    n: canonical[n] for n in aside} == canonical


# --- What is not taken ----------------------------------------------------------------------------

def written(tmp_path, tensors, name="model.safetensors", config="vit"):
  folder = tmp_path / "given"
  folder.mkdir()
  (np.savez if name.endswith(".npz") else save_file)(*(
    (folder / name,) if name.endswith(".npz") else (tensors, folder / name)),
    **(tensors if name.endswith(".npz") else {}))
  if config:
    text = (published.REFERENCE / config / "config.json").read_text()
    (folder / "config.json").write_text(text)
  return folder


def refused(tmp_path, capsys, source, *flags) -> str:
  """The error of an import that writes nothing."""
  before = sorted(tmp_path.rglob("*"))
  assert importing(source, tmp_path / "run", *flags) == 1
  assert sorted(tmp_path.rglob("*")) == before
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.startswith("error: ")
  return captured.err


def changed(edit):
  tensors = published.load("vit")
  edit(tensors)
  return tensors


BIAS, KERNEL = "vit.layernorm.bias", "vit.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("edit, error", [
  (lambda t: t.update(more=np.zeros(3, np.float32)), "unexpected  more [3]"),
  (lambda t: t.pop(KERNEL), f"missing     {KERNEL} [64, 256]"),
  (lambda t: t.update({KERNEL: t[KERNEL].T.copy()}), "(expected [64, 256])"),
  (lambda t: t.update({BIAS: t[BIAS][:5].copy()}), f"wrong shape {BIAS} [5]"),
  (lambda t: t.update({"../x": t.pop(BIAS)}), "'../x' is no name of a parameter"),
  (lambda t: t.update({"module." + BIAS: t[BIAS]}), "several names mean the same parameter"),
  (lambda t: [t.pop(n) for n in list(t) if n.startswith("vit.enc")], "no known format"),
])
def test_tensors_without_a_place(edit, error, tmp_path, capsys):
  assert error in refused(tmp_path, capsys, written(tmp_path, changed(edit)))


def test_files_that_are_not_whole_or_not_weights(tmp_path, capsys):
  folder = written(tmp_path, published.load("vit"))
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  file.write_bytes(whole[:-100])
  assert "model.safetensors: damaged" in refused(tmp_path, capsys, folder)
  file.write_bytes(b"\x80\x04\x95" + whole[:100])
  assert "model.safetensors: damaged" in refused(tmp_path, capsys, file)
  file.unlink()
  assert "found none" in refused(tmp_path, capsys, folder)
  assert "no such file" in refused(tmp_path, capsys, tmp_path / "nowhere")
  (folder / "weights.h5").write_bytes(whole)
  assert ".safetensors, .npz" in refused(tmp_path, capsys, folder / "weights.h5")
  (folder / "config.json").write_text("{")
  save_file(published.load("vit"), file)
  assert "config.json: no JSON" in refused(tmp_path, capsys, folder)


def test_npz_files_that_lie(tmp_path, capsys):
  path = tmp_path / "weights.npz"
  np.savez(path, a=np.array([{"an": "object"}]))
  assert "a pickle" in refused(tmp_path, capsys, path)
  np.savez_compressed(path, a=np.zeros(2**25, np.float32))
  assert "unpack to more than" in refused(tmp_path, capsys, path)
  header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000), }"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header + b"\n").to_bytes(2, "little")
                     + header + b"\n")
  assert "does not fit its" in refused(tmp_path, capsys, path)
  path.write_bytes(path.read_bytes()[:40])
  assert "damaged" in refused(tmp_path, capsys, path)


def test_a_checkpoint_of_pytorch_without_torch(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  (tmp_path / "moco.pth.tar").write_bytes(b"\x80\x04")
  assert "weights_only=True" in refused(tmp_path, capsys, tmp_path / "moco.pth.tar")


def test_parts_of_a_folder_stay_inside_it(tmp_path, capsys):
  folder, tensors = written(tmp_path, published.load("vit")), published.load("vit")
  (folder / "model.safetensors").rename(folder / "part.safetensors")
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../part.safetensors")}))
  assert "outside its folder" in refused(tmp_path, capsys, folder)
  index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
  assert importing(folder, tmp_path / "run") == 0


def test_what_a_file_does_not_tell_is_asked_for(tmp_path, capsys):
  folder = written(tmp_path, published.load("vit"), config=None)
  assert "--config.model.heads=" in refused(tmp_path, capsys, folder)
  folder.joinpath("model.safetensors").rename(tmp_path / "model.safetensors")
  file = tmp_path / "model.safetensors"
  assert "does not divide" in refused(tmp_path, capsys, file, "--config.model.heads=5")
  assert "--config.model.image_size" in refused(
    tmp_path, capsys, file, "--config.model.heads=4", "--config.model.image_size=(32,40)")
  assert "expected one of" in refused(tmp_path, capsys, file, "--format=keras")
  assert "known are dit/original" in refused(tmp_path, capsys, file, "--format=dit")
  assert importing(file, tmp_path / "run", "--config.model.heads=4") == 0
  run = checkpoints.load_run(tmp_path / "run")
  assert run.config.augment.mean == 0.5 and run.config.model.heads == 4
  assert "exists already" in refused_again(tmp_path, capsys, file)


def refused_again(tmp_path, capsys, file):
  capsys.readouterr()
  assert importing(file, tmp_path / "run", "--config.model.heads=4") == 1
  return capsys.readouterr().err


def test_an_encoder_alone_says_that_the_decoder_is_missing(tmp_path, capsys):
  whole = published.load("vitmae")
  tensors = {name: x for name, x in whole.items() if not name.startswith("decoder.")}
  folder = written(tmp_path, tensors, config="vitmae")
  assert importing(folder, tmp_path / "run") == 0
  told = capsys.readouterr().out
  assert "no decoder.mask_token in the file" in told and re.search(r"\d new\b", told)
  run = checkpoints.load_run(tmp_path / "run")
  theirs = interop.give(interop.FORMATS["mae/hf"], interop.fields(
    recipe.make_model(run.config), run.config.model), convert.flat(run.params, {}))
  assert all(np.array_equal(theirs[name], x) for name, x in tensors.items())
  half = {name: x for name, x in whole.items() if "decoder_layers.1" not in name}
  save_file(half, folder / "model.safetensors")
  assert importing(folder, tmp_path / "half") == 1
  assert "missing     decoder.decoder_layers.1." in capsys.readouterr().err


def test_names_of_several_versions_are_one():
  """transformers 5 calls the decoder of MAE otherwise; encoders come with and without a prefix."""
  for form, theirs, canonical in (
      ("mae/hf", "decoder.decoder_encoder.layer.1.output.dense.bias",
       "decoder.decoder_layers.1.output.dense.bias"),
      ("vit/hf", "embeddings.cls_token", "vit.embeddings.cls_token"),
      ("vit/dinov2", "dinov2_with_registers.layernorm.bias", "vit.layernorm.bias"),
      ("moco/original", "module.encoder_q.fc.weight", "encoder_q.fc.weight"),
      ("vit/npz", "params/Transformer/posembed_input/pos_embedding", "pos_embedding")):
    assert interop.FORMATS[form].canonical([theirs]) == {canonical: theirs}


def hugging_face(**fields):
  return {}, dict(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3], **fields)


def timm(**fields):
  return dict(pretrained_cfg=dict(mean=[0.1, 0.2, 0.3], std=[1, 2, 3], **fields)), {}


EDGE, SQUARE = dict(shortest_edge=256), dict(height=256, width=256)
TOLD = {  # publisher's file -> image_size, eval_crop, eval_squash, interpolation
  "dinov2": (hugging_face(size=EDGE, do_center_crop=True, crop_size=dict(height=224, width=224),
                          resample=3), 224, 0.875, False, "bicubic"),
  "vit": (hugging_face(size=SQUARE, resample=2), 256, 1.0, True, "linear"),
  "vit of 2021": (hugging_face(feature_extractor_type="ViTFeatureExtractor", size=224, resample=2),
                  224, 1.0, True, "linear"),
  "clip of 2021": (hugging_face(feature_extractor_type="CLIPFeatureExtractor", size=224,
                                crop_size=224, do_center_crop=True, resample=3),
                   224, 1.0, False, "bicubic"),
  "deit of 2021": (hugging_face(feature_extractor_type="DeiTFeatureExtractor", size=256,
                                crop_size=224, do_center_crop=True, resample=3),
                   224, 0.875, True, "bicubic"),
  "no crop after all": (hugging_face(size=EDGE, do_center_crop=False, crop_size=224, resample=1),
                        256, 1.0, False, "lanczos3"),
  "convnext": (hugging_face(image_processor_type="ConvNextImageProcessor",
                            size=dict(shortest_edge=224), resample=3),
               224, 0.875, False, "bicubic"),
  "convnext 384": (hugging_face(image_processor_type="ConvNextImageProcessor",
                                size=dict(shortest_edge=384), crop_pct=0.9, resample=3),
                   384, 1.0, True, "bicubic"),
  "not resized": (hugging_face(do_resize=False, size=EDGE), 256, None, None, None),
  "nulls": (hugging_face(size=dict(shortest_edge=None, height=224, width=224)),
            224, 1.0, True, None),
  "a pair": (hugging_face(size=[224, 224], resample=2), 224, 1.0, True, "linear"),
  "unlike sides": (hugging_face(size=dict(height=256, width=320), crop_size=224,
                                do_center_crop=True), 224, None, None, None),
  "timm": (timm(input_size=[3, 224, 224], crop_pct=0.9, interpolation="bicubic"),
           224, 0.9, False, "bicubic"),
  "timm, as data/config.py": (timm(), None, 0.875, False, "bicubic"),
  "timm squash": (timm(input_size=[3, 448, 448], crop_pct=1.0, crop_mode="squash",
                       interpolation="lanczos"), 448, 1.0, True, "lanczos3"),
  "timm, a null": (timm(input_size=None, crop_pct=0.9), None, 0.9, False, "bicubic"),
  "timm border": (timm(crop_mode="border", interpolation="bilinear"), None, None, None, "linear"),
  "open_clip": ((dict(preprocess_cfg=dict(size=224, mean=[0.1, 0.2, 0.3], std=[1, 2, 3])), {}),
                224, 1.0, False, "bicubic"),
  "open_clip squash": ((dict(preprocess_cfg=dict(
    size=[256, 256], mean=[0.1, 0.2, 0.3], std=[1, 2, 3], resize_mode="squash",
    interpolation="bilinear")), {}), 256, 1.0, True, "linear"),
}


@pytest.mark.parametrize("case", TOLD)
def test_preprocessing_that_files_tell(case):
  files, size, share, squash, how = TOLD[case]
  want = dict(mean=(0.1, 0.2, 0.3), std=(1, 2, 3), image_size=size and (size, size),
              eval_crop=share, eval_squash=squash, interpolation=how)
  assert preprocessing.told(*files) == {key: x for key, x in want.items() if x is not None}


def test_files_that_tell_nothing_of_images():
  assert preprocessing.told({}, {}) == preprocessing.told(dict(model_type="vit"), {}) == {}
  plain = preprocessing.told({}, dict(do_normalize=False, size=SQUARE))
  assert (plain["mean"], plain["std"]) == (0.0, 1.0)


@pytest.mark.parametrize("share", [1.0, 0.875, 0.9, 224 / 248])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("how", ["linear", "bicubic", "lanczos3"])
def test_preprocessing_comes_back(share, squash, how):
  augment = dict(image_size=(224, 224), eval_crop=share, eval_squash=squash, interpolation=how,
                 mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
  hugging_face = preprocessing.to_hugging_face(augment, 3)
  assert hugging_face["image_processor_type"] == (
    "CLIPImageProcessor" if not squash else
    "ViTImageProcessor" if share == 1 else "DeiTImageProcessor")
  back = preprocessing.told({}, hugging_face)
  assert preprocessing.resized(back) == preprocessing.resized(augment)
  assert {**back, "eval_crop": share} == augment
  timm = dict(pretrained_cfg=preprocessing.to_timm(augment, 3))
  assert preprocessing.told(timm, {}) == augment


def test_fields_of_none_are_their_defaults():
  augment = dict(image_size=(32, 32), interpolation=None, mean=None, std=0.25, eval_crop=1.0)
  assert preprocessing.to_hugging_face(augment, 2)["resample"] == 3
  assert preprocessing.to_hugging_face(augment, 2)["image_mean"] == [0.5, 0.5]
  assert preprocessing.to_timm(augment, 1)["interpolation"] == "bicubic"


def test_the_newer_file_of_a_processor_is_read(tmp_path, capsys):
  folder = written(tmp_path, published.load("vit"), config="vit")
  (folder / "processor_config.json").write_text(json.dumps(dict(image_processor=dict(
    size=dict(height=16, width=16), resample=2, image_mean=[0.5] * 3, image_std=[0.25] * 3))))
  assert importing(folder, tmp_path / "run") == 0
  assert "config.augment" not in capsys.readouterr().out
  assert checkpoints.load_run(tmp_path / "run").config.augment.std == [0.25] * 3


def test_what_is_assumed_of_images_is_said(tmp_path, capsys):
  """google/vit-base-patch16-224's own file squashes; without it the recipe's cut is assumed."""
  folder = written(tmp_path, published.load("vit"), config="vit")
  assert importing(folder, tmp_path / "bare") == 0
  said = capsys.readouterr().out
  for field in ("mean = 0.5", "eval_crop = 0.875", "interpolation = 'linear'"):
    assert f"config.augment.{field}" in said
  (folder / "preprocessor_config.json").write_text(json.dumps(dict(
    size=dict(height=16, width=16), resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)))
  assert importing(folder, tmp_path / "run") == 0
  assert "config.augment" not in capsys.readouterr().out
  run = checkpoints.load_run(tmp_path / "run")
  image = photo(40, 61)
  squashed = Image.fromarray(image).resize(run.config.augment.image_size[::-1], Image.BILINEAR)
  np.testing.assert_allclose(run.preprocess(image[None])[0], np.asarray(squashed) / 127.5 - 1,
                             atol=1e-6)


def test_a_tokenizer_is_taken_along(tmp_path, capsys):
  folder = written(tmp_path, published.load("clip_eos"), config="clip_eos")
  words = {f"w{i}": i for i in range(200)}
  words["<|endoftext|>"] = words.pop("w150")
  pipeline = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
  pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  pipeline.save(str(folder / "tokenizer.json"))
  assert importing(folder, tmp_path / "run") == 0
  run = checkpoints.load_run(tmp_path / "run")
  ids = run.tokenize(["w7 w9", "w3"])
  assert ids.shape == (2, 16) and ids[0, :3].tolist() == [7, 9, 150] and (ids[1, 1:] == 150).all()
  assert run.predict("embed_text", {"text": ids}).shape == (2, 40)
  assert convert.main([f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}",
                       "--to_format=hf"]) == 0
  assert {file.name for file in (tmp_path / "out").iterdir()} == {
    "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
  pipeline.add_tokens(["w200", "w201"])
  pipeline.save(str(folder / "tokenizer.json"))
  capsys.readouterr()
  assert importing(folder, tmp_path / "other") == 1
  assert "202 tokens, the weights are for 200" in capsys.readouterr().err


def test_a_run_of_our_own_goes_out(tmp_path, capsys):
  """Fixed positions become a table; what a format has no place for is an error."""
  config = recipe.load_config("configs/mae.py:smoke")
  info = SimpleNamespace(image_shape=(16, 16, 1), num_classes=0)
  config = recipe.fill_from_data(config, info, 100)
  method = recipe.make_method(config)
  model = interop.fields(recipe.make_model(config), config.model)
  ours = {path: np.ones(x.shape, x.dtype) for path, x in jax.eval_shape(
    lambda: convert.initial(method, model)).items()}
  theirs = interop.give(interop.FORMATS["mae/hf"], model, ours)
  table = theirs["vit.embeddings.position_embeddings"]
  np.testing.assert_array_equal(table[0, 0], 0)
  np.testing.assert_array_equal(table[0, 1:], positions.FIXED["sincos2d"]((4, 4), 32))
  assert theirs["decoder.decoder_pos_embed"].shape == (1, 17, 16)
  expected = {**ours, "params/encoder/unknown": np.zeros(1)}
  with pytest.raises(ValueError, match="no place for params/encoder/unknown"):
    interop.give(interop.FORMATS["mae/hf"], model, expected)
  with pytest.raises(ValueError, match="config.model.pool = 'mean': vit/hf has 'cls'"):
    interop.to_write({**model, "name": "vit"}, "vit/hf")
  with pytest.raises(ValueError, match="mae goes out as hf, original"):
    interop.to_write(model, "torchvision")
  folder = written(tmp_path, published.load("vit"))
  assert convert.main([f"--from={folder}", f"--to={tmp_path / 'out'}", "--to_format=hf"]) == 1
  assert not (tmp_path / "out").exists() and "error: " in capsys.readouterr().err
