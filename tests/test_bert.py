"""Masked language modelling: what is hidden and seen, texts by the line, towers of other runs."""

import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluators import masked_text
from input_pipeline import batches, sources, text
from losses import tokens
from methods import bert as method_module
from models import adapt, bert, clip
from trainer import checkpoints, loop, networks, recipe, transfer

PAD, END, MASK, VOCAB, LENGTH = 0, 2, 3, 50, 24
SMALL = dict(width=8, depth=1, heads=2, vocab_size=VOCAB, context=LENGTH, eos_id=END, pad_id=PAD,
             mask_id=MASK, starts=1)
TEXTS = ["a red car", "two birds in a tree", "a house by the sea", "the sea, the sky", "ships",
         "an old map of the world", "the map", "snow", "a map", "one red bird"]


@pytest.fixture(scope="module")
def model():
  return bert.make(**SMALL)


def some_texts(count, lengths, seed=0):
  """[start, n tokens of 4 .. 49, end, padding], n going round `lengths`."""
  rng = np.random.default_rng(seed)
  ids = np.zeros((count, LENGTH), np.int32)
  for row, n in zip(ids, itertools.cycle(lengths)):
    row[:n + 2] = [1, *rng.integers(4, VOCAB, n), END]
  return ids


# --- What is hidden -------------------------------------------------------------------------------

def test_which_tokens_are_hidden_and_how(model):
  """Counts exactly; what becomes of them to within 4.5 standard deviations of a binomial."""
  lengths = (22, 1, 10, 3, 0)
  ids = some_texts(20_000, lengths)
  draw = jax.jit(method_module.make(model).draw)
  batch = jax.device_get(draw(jax.random.key(0), {"text": ids}))
  place = np.arange(LENGTH)
  n = np.resize(lengths, len(ids))
  expected = np.array([min(k, max(1, int(np.round(0.15 * k)))) for k in n])
  given, chosen = batch["masked"], np.zeros(ids.shape, bool)
  for i, j in zip(*np.nonzero(batch["chosen"])):
    assert not chosen[i, batch["places"][i, j]]
    chosen[i, batch["places"][i, j]] = True
  assert batch["places"].shape == (len(ids), 3) and (chosen.sum(1) == expected).all()
  own = (place[None] >= 1) & (place[None] <= n[:, None])
  assert not chosen[~own].any() and (given == ids)[~chosen].all()
  np.testing.assert_allclose(batch["weight"].sum(), len(ids), rtol=1e-5)
  assert (batch["weight"] > 0).sum() == chosen.sum() and len(set(batch["weight"].ravel())) == 2

  total, new, old = chosen.sum(), given[chosen], ids[chosen]
  for share, among in ((0.8 + 0.1 / VOCAB, new == MASK),  # the vocabulary has the mask token too
                       (0.1 * (1 - 2 / VOCAB), (new != MASK) & (new != old)),
                       (0.1 + 0.1 / VOCAB, new == old)):
    assert abs(among.mean() - share) < 4.5 * np.sqrt(share / total), share
  other = np.bincount(new[(new != MASK) & (new != old)], minlength=VOCAB)
  assert (other[np.arange(VOCAB) != MASK] > 0).all()
  full = chosen[n == 22][:, 1:23].mean(0)  # each place of a text alike
  assert abs(full - 3 / 22).max() < 4.5 * np.sqrt(3 / 22 / (n == 22).sum())

  again = jax.device_get(draw(jax.random.key(0), {"text": ids}))
  chex.assert_trees_all_equal(again, batch)
  other = draw(jax.random.key(1), {"text": ids})
  assert (np.asarray(other["masked"]) != given).mean() > 0.05
  assert draw(jax.random.key(1), batch) is not None
  chex.assert_trees_all_equal(jax.device_get(draw(jax.random.key(1), batch)), batch)


def test_loss_is_the_mean_over_chosen_tokens_however_the_batch_is_split(model):
  ids = some_texts(8, (22, 4, 9))
  method = method_module.make(model)
  params, extra = jax.jit(method.init)(jax.random.key(0), {"text": ids})
  batch = jax.jit(method.draw)(jax.random.key(3), {"text": ids})
  run = jax.jit(method.loss)
  value, (_, metrics) = run(params, extra, batch, jax.random.key(0), 0)
  predict = {name: jax.jit(function) for name, function in method.predict.items()}
  logits = np.asarray(predict["logits"](params, {}, {"text": batch["masked"]}, None), float)
  hidden = [(i, p) for i, row in enumerate(batch["places"]) for j, p in enumerate(row)
            if batch["chosen"][i, j]]
  losses = [np.log(np.exp(logits[i, p]).sum()) - logits[i, p, ids[i, p]] for i, p in hidden]
  np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
  right = np.mean([logits[i, p].argmax() == ids[i, p] for i, p in hidden])
  np.testing.assert_allclose(metrics["accuracy"], right, atol=1e-6)
  parts = [run(params, extra, jax.tree.map(lambda x, k=k: x[k::2], batch), jax.random.key(0), 0)[0]
           for k in (0, 1)]
  np.testing.assert_allclose(np.mean(parts), value, rtol=1e-5)
  # What the evaluator sees is hidden in the same way.
  out = jax.device_get(predict["masked"](params, {}, {"text": ids}, jax.random.key(1)))
  logits = predict["logits"](params, {}, {"text": out["masked"]}, None)
  at = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), out["places"][:, :, None], 1)
  target = np.take_along_axis(ids, out["places"], 1)[:, :, None]
  np.testing.assert_allclose(out["likelihood"][:, :, None], np.take_along_axis(at, target, 2),
                             atol=1e-5)
  np.testing.assert_array_equal(out["told"], at.argmax(-1))
  np.testing.assert_array_equal(predict["own_tokens"]({}, {}, {"text": ids}, None), ids > MASK)


def test_each_cross_entropy_is_that_of_the_sum():
  logits, ids = np.random.default_rng(0).normal(size=(2, 3, 5)), np.array([[0, 4, 2], [1, 1, 3]])
  each = tokens.each_cross_entropy(jnp.asarray(logits, jnp.float32), ids)
  expected = [[np.log(np.exp(z).sum()) - z[i] for z, i in zip(*row)] for row in zip(logits, ids)]
  np.testing.assert_allclose(each, expected, rtol=1e-5)


@pytest.mark.parametrize("fields, message", [
  (dict(mask_ratio=0.0), "method.mask_ratio = 0.0"), (dict(mask_share=1.5), "mask_share = 1.5"),
  (dict(random_share=0.3), r"random_share = 0.3: expected a number in \[0, 0.2\]")])
def test_shares_out_of_range(model, fields, message):
  with pytest.raises(ValueError, match=message):
    method_module.make(model, **fields)
  with pytest.raises(ValueError, match="data.mask_token = True"):
    method_module.make(bert.make(**{**SMALL, "mask_id": None}))
  with pytest.raises(ValueError, match="give variant .*BERT-base"):
    bert.make(**{name: x for name, x in SMALL.items() if name != "width"})
  with pytest.raises(ValueError, match="'unilm' .* needs model.causal = False"):
    method_module.make(bert.make(**SMALL, causal=True), masks="unilm")


def test_features_are_of_the_first_token_and_a_gate_leaves_the_head_plain():
  ids = np.array([[1, 7, 8, 2], [1, 9, 2, 0]])
  for activation in "gelu", "swiglu":
    network = bert.make(**SMALL, activation=activation)
    params = jax.device_get(network.init(jax.random.key(0), ids))["params"]
    features, out = network.apply({"params": params}, ids, method="encode")
    np.testing.assert_array_equal(features, out["tokens"][:, 0])
    x = np.asarray(out["tokens"]) @ params["head"]["kernel"] + params["head"]["bias"]
    normal = network.encoder.make_norm().apply({"params": params["head_norm"]}, jax.nn.gelu(
      jnp.asarray(x), approximate=False))
    expected = normal @ params["encoder"]["embed"]["embedding"].T + params["bias"][None, None]
    np.testing.assert_allclose(network.apply({"params": params}, ids), expected, atol=1e-5)


# --- What is seen ---------------------------------------------------------------------------------

def test_unilms_four_masks(model):
  ids = some_texts(3000, (22, 7, 2))
  batch = jax.jit(method_module.make(model, masks="unilm").draw)(jax.random.key(0), {"text": ids})
  mask, segments = np.asarray(batch["mask"])[:, 0], np.asarray(batch["segments"])
  n, found = np.resize((22, 7, 2), len(ids)), []
  query, key = np.indices((LENGTH, LENGTH))
  for seen, segment, k in zip(mask, segments, n):
    kinds = {"both": np.ones_like(seen), "forward": key <= query, "backward": key >= query}
    first = int((segment == 0).sum())
    if first < LENGTH:
      assert 2 <= first <= k  # a token of its own in each, beside the start
      assert (np.diff(segment) >= 0).all()
      kinds = {f"prefix {first}": np.where(query < first, key < first, key <= query)}
    (kind,) = [name for name, expected in kinds.items() if (seen == expected).all()]
    found.append(kind)
  for name, share in (("both", 1 / 3), ("prefix", 1 / 3), ("forward", 1 / 6), ("backward", 1 / 6)):
    count = sum(kind.startswith(name) for kind in found)
    assert abs(count / len(found) - share) < 4.5 * np.sqrt(share / len(found)), name
  assert {kind for kind, k in zip(found, n) if k == 7 and "prefix" in kind} == {
    f"prefix {i}" for i in range(2, 8)}

  # And a token that is not seen changes nothing.
  method = method_module.make(model, masks="unilm")
  params, _ = jax.jit(method.init)(jax.random.key(0), {"text": ids[:1]})
  forward = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask=mask))
  row = found.index("forward")
  other = ids[row:row + 1].copy()
  other[0, 5] = 4 + (other[0, 5] - 3) % 40
  change = abs(forward(other, mask[row][None, None]) - forward(ids[row:row + 1],
                                                              mask[row][None, None])).max((0, 2))
  assert (change[:5] == 0).all() and change[5] > 1e-4 and change[6] > 0
  loss, grads = jax.value_and_grad(lambda p: method.loss(
    p, {}, jax.tree.map(lambda x: x[:64], batch), jax.random.key(0), 0)[0])(params)
  chex.assert_tree_all_finite((loss, grads))


# --- Texts by the line ----------------------------------------------------------------------------

def write(path, lines, end="\n"):
  path.write_bytes(b"".join(line + end.encode() for line in lines))
  return f"lines:{path}"


def test_lines_are_texts(tmp_path):
  said = [*TEXTS * 3, "東京 naïve"]
  lines = [b"\xef\xbb\xbf" + said[0].encode(), b"", b"   ", *(f" {s}\t".encode() for s in said[1:])]
  source = write(tmp_path / "a.txt", lines, "\r\n")
  splits, info = sources.open_source(source, held_out=0.3)
  assert sorted(r["text"] for split in splits.values() for r in split) == sorted(said)
  train, test = ({r["text"] for r in splits[name]} for name in ("train", "test"))
  assert train and test and not train & test  # equal texts are on the same side
  assert info.num_examples == {name: len(split) for name, split in splits.items()}
  record = next(r for split in splits.values() for r in split if r["text"] == said[0])
  assert record["name"] == f"{tmp_path / 'a.txt'}, line 1"
  moved = write(tmp_path / "b.txt", [s.encode() for s in said])
  assert sources.open_source(moved, held_out=0.3).info.fingerprint == info.fingerprint
  assert sources.open_source(moved, held_out=0.4).info.fingerprint != info.fingerprint

  made = {cached: batches.make(source, batch_size=4, tokenizer="bytes", context=40, seed=3,
                               mask_token=True, held_out=0.3, cache_bytes=cached)
          for cached in (0, 2**20)}
  for streamed, cached in zip(made[0].train(2, 12), made[2**20].train(2, 12)):
    chex.assert_trees_all_equal(streamed, cached)
    assert {made[0].tokenizer.decode(row) for row in cached["text"]} <= train
    assert cached.keys() == {"text"}
  (last,) = made[0].train(11, 12)
  np.testing.assert_array_equal(last["text"], cached["text"])
  held = {made[0].tokenizer.decode(row) for batch in made[0].eval(None, 4)
          for row in batch["text"][batch["valid"]]}
  assert held == test


def test_lines_that_cannot_be_read(tmp_path, caplog):
  with pytest.raises(FileNotFoundError, match="lines:.*nowhere.txt.: no such file"):
    sources.open_source(f"lines:{tmp_path / 'nowhere.txt'}")
  with pytest.raises(ValueError, match="no texts for the split"):
    sources.open_source(write(tmp_path / "empty.txt", [b"", b" "]))
  with pytest.raises(ValueError, match="no texts for the split 'test'; .* there are 1 in all"):
    sources.open_source(write(tmp_path / "one.txt", [b"only", b""]))
  with pytest.raises(ValueError, match="data.held_out=1.5: expected"):
    sources.open_source(write(tmp_path / "one.txt", [b"only"]), held_out=1.5)
  bad = write(tmp_path / "bad.txt", [*(s.encode() for s in TEXTS), b"\xff\xfe!", b"fine"])
  with pytest.raises(ValueError, match="bad.txt, line 11 is not UTF-8"):
    sources.open_source(bad, held_out=0.3)
  info = sources.open_source(bad, on_error="skip", held_out=0.3).info
  assert sum(info.num_examples.values()) == 11 and "line 11 is not UTF-8" in caplog.text
  with pytest.raises(ValueError, match="did you mean 'lines:'"):
    sources.open_source(f"line:{tmp_path / 'bad.txt'}")


def test_mask_tokens(tmp_path):
  """One id of its own in the vocabulary's size; nothing that a text says is read as it."""
  for name in ("bytes", "bpe"):
    made, plain = (text.make(name, TEXTS, context=24, vocab_size=300, mask_token=on)
                   for on in (True, False))
    assert plain.mask_id is None and made.starts == plain.starts == 1
    assert made.mask_id == made.eos_id - 1 and made.eos_id == made.vocab_size - 1
    assert made.vocab_size - plain.vocab_size == (name == "bytes")
    ids = made.encode([f"a {text.MASK} b"])
    assert made.mask_id not in ids and made.decode(ids[0, 1:]) == f"a {text.MASK} b"
    assert text.from_json(made.to_json()).mask_id == made.mask_id
  plain.pipeline.save(str(tmp_path / "plain.json"))
  added = text.make(str(tmp_path / "plain.json"), context=24, mask_token=True)
  assert added.mask_id == plain.vocab_size == added.vocab_size - 1
  made.pipeline.save(str(tmp_path / "has.json"))
  assert text.make(str(tmp_path / "has.json"), context=24, mask_token=True).mask_id == made.mask_id


# --- Other runs start from it ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(data_dir, a run directory with the initial state of the smoke recipe)."""
  root = tmp_path_factory.mktemp("runs")
  built = recipe.build(recipe.load_config("configs/bert.py:smoke"), str(root / "data"))
  loop.check_same_run(root / "bert", recipe.plain(built.config))
  loop.keep_tokenizer(root / "bert" / checkpoints.TOKENIZER, built.data.tokenizer.to_json())
  store = checkpoints.Checkpoints(root / "bert")
  store.save(jax.jit(loop.initial_state(built))(), 1)
  store.finish()
  store.close()
  return root / "data", root / "bert"


@pytest.mark.slow
def test_clips_text_tower_starts_from_bert(run):
  """The same tokens bit for bit, of a tower of the same build and the same tokenizer."""
  data_dir, workdir = run
  config = recipe.load_config("configs/clip.py:smoke", {"init.text_run": str(workdir)})
  built = recipe.build(config, str(data_dir))
  taken = transfer.take(built.config, loop.abstract_state(built)[0], built.method,
                        **built.config.init)
  before = jax.jit(loop.initial_state(built))()
  state = transfer.put(before, taken, built.method)
  source = checkpoints.load_run(workdir)
  names = ["digit one, sans", "digit nine, bold italic serif"]
  ids = source.tokenize(names)
  np.testing.assert_array_equal(built.data.tokenizer.encode(names), ids)
  tower = recipe.make_model(built.config).text
  out = jax.jit(tower.apply)({"params": state.params["text"]}, ids)[1]["tokens"]
  expected = source.predict("tokens", {"text": ids})
  np.testing.assert_array_equal(out, expected)
  assert np.std(expected) > 0.1
  chex.assert_trees_all_equal(state.params["image"], before.params["image"])
  fates = {became: {path.split("/")[0] for path, _, is_ in taken.rows if is_ == became}
           for became in ("taken", "ignored")}
  assert fates == {"taken": {"text"}, "ignored": {"head", "head_norm", "bias"}}
  both = {"run": str(workdir), "source": "encoder/embed", "into": "text/embed"}  # and another part
  twice = transfer.take(built.config, before, built.method, **both, text_run=str(workdir))
  chex.assert_trees_all_equal(twice.params, taken.params)
  assert len(twice.rows) > len(taken.rows)
  # A finished run is evaluated without the other.
  gone = built.config.copy_and_resolve_references()
  gone.init.text_run = "gone"
  assert networks.fill(gone).to_dict() == gone.to_dict()


@pytest.mark.parametrize("variant", ["CLIP-B/32", "SigLIP-B/16"])
def test_a_tower_is_all_that_its_bert_was_and_pools_as_its_own_variant(variant):
  """Whatever the image network beside it has: quick-GELU here, other norms' epsilon."""
  of_bert = bert.make(**SMALL).encoder
  fields = {f"text_{name}": x for name, x in adapt.text_fields(of_bert).items()}
  tokenizer = {name: SMALL[name] for name in ("vocab_size", "context", "eos_id", "pad_id")}
  tower = clip.make(variant=variant, image_size=32, channels=3, **tokenizer, **fields).text
  assert tower == of_bert.clone(pool="last" if "Sig" in variant else "eos")


@pytest.mark.parametrize("name, overrides, message", [
  ("clip", {"model.text_width": "48"}, r"text/embed/embedding \(300, 48\): \(300, 32\)"),
  ("clip", {"model.text_segments": "0", "model.text_depth": "3"}, r"blocks.*\(3, .*\(1, "),
  ("vit", {}, "a model vit has no text network"),
  ("clip", {"init.text_run": "nowhere"}, "nowhere holds no run")])
def test_towers_that_do_not_fit(run, name, overrides, message):
  data_dir, workdir = run
  overrides = {"init.text_run": str(workdir), **overrides}
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    built = recipe.build(recipe.load_config(f"configs/{name}.py:smoke", overrides), str(data_dir))
    transfer.take(built.config, loop.abstract_state(built)[0], built.method,
                        **built.config.init)


# --- How well it is told --------------------------------------------------------------------------

def test_unigram_and_score_by_hand():
  found = masked_text.score(np.array([True, False, True, True]), np.log([0.5, 0.1, 0.5, 0.4]))
  assert found["accuracy"] == 0.75
  np.testing.assert_allclose(found["perplexity"], (0.5 * 0.1 * 0.5 * 0.4) ** -0.25)
  found = masked_text.unigram(np.array([5, 5, 5, 7]), np.array([5, 7, 9]))  # shares 4, 2, 1 of 7
  np.testing.assert_allclose([found["accuracy"], found["perplexity"]],
                             [1 / 3, (4 / 7 * 2 / 7 / 7) ** (-1 / 3)])


def test_evaluator_counts_chosen_tokens_and_draws_them(tmp_path):
  tokenizer = text.make("bytes", context=12, mask_token=True)
  ids = tokenizer.encode(["abc", "aab"])
  given = ids.copy()
  given[0, 2], given[1, 1] = tokenizer.mask_id, ord("z")
  out = {"masked": given, "places": np.array([[2, 5], [1, 3]]),
         "chosen": np.array([[True, False], [True, True]]),
         "told": np.array([[ord("b"), 0], [ord("x"), ord("b")]]),
         "likelihood": np.log([[0.5, 1e-9], [0.25, 0.5]])}
  own = np.isin(ids, [ord(c) for c in "abc"])

  def collect(name, split, *keys, params="trained", limit=None, first=None):
    return {"masked": out, "own_tokens": own}[name], {"text": ids}

  context = SimpleNamespace(collect=collect, detokenize=tokenizer.decode, eval_split="test",
                            train_split="train", figures=tmp_path, step=7)
  found = masked_text.evaluate(context, baselines=("unigram",))
  np.testing.assert_allclose(found["accuracy"], 2 / 3)
  np.testing.assert_allclose(found["perplexity"], 16 ** (1 / 3), rtol=1e-6)
  np.testing.assert_allclose(found["unigram/accuracy"], 1 / 3)  # of b, a and b: a is commonest
  np.testing.assert_allclose(found["unigram/perplexity"], (3 / 9 * 4 / 9 * 3 / 9) ** (-1 / 3))
  assert (tmp_path / "masked_text_step00000007.png").stat().st_size > 5000
  row = masked_text.spelt(tokenizer.decode, ids[1], *(out[name][1] for name in (
    "places", "chosen", "told")))
  assert row[:4] == [("", ""), ("a", "x"), ("a", ""), ("b", "b")]
  assert {*row[4:]} == {("", "")}
  for fields, message in (({"limit": 0}, "masked_text.limit = 0"), ({"baselines": ("unigrm",)},
                                                                    "did you mean 'unigram'")):
    with pytest.raises(ValueError, match=message):
      masked_text.evaluate(context, **fields)
  with pytest.raises(ValueError, match="needs texts"):
    masked_text.evaluate(SimpleNamespace(detokenize=None))
