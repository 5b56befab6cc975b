"""The benchmarks' arithmetic on made-up numbers, and that the other side does the same work."""

import ast
import io
import json

import jax
import numpy as np
import pytest

from benchmarks import (
  ablations,
  bad_input_parts,
  bad_inputs,
  compare,
  mutants,
  results,
  sampling,
  scaling,
  train_step,
  worker,
)
from configs.vit import get_config
from trainer import loop, recipe

FACTS = {"parameters": 22_050_664, "flops": 2e11, "peak": 1e11}
KIND = "AMD EPYC, 1 thread, float32, PyTorch eager"


def table(*rows):
  """A page with a table of KIND, and one of another kind around it; rows: (name, batch, ratios)."""
  lines = [compare.row(name, batch, FACTS, [({"wall": 2 * r, "cpu": 3 * r}, {"wall": 2, "cpu": 2})
                                            for r in ratios]) for name, batch, ratios in rows]
  other = compare.row("vit_s16", 8, FACTS, [({"wall": 9, "cpu": 9}, {"wall": 1, "cpu": 1})] * 3)
  return (f"# Results\n\n**{KIND}s** (jax 1)\n\n{compare.HEADER}\n{other}\n\n"
          f"**{KIND}** (jax 1, torch 2)\n\n{compare.HEADER}\n" + "\n".join(lines) + "\n\n## More\n")


def test_a_table_says_what_was_measured_and_is_read_back():
  text = table(("vit_s16", 8, [1.0, 1.1, 1.2, 1.3, 1.4]), ("mae_b16", 4, [0.5] * 3))
  assert "| vit_s16 | 8 | 22,050,664 | 2,400.0 | 0.83 | 2,000.0 | 1.00 | 1.200 |" in text
  low, middle, high = np.quantile([1.0, 1.1, 1.2, 1.3, 1.4], [0.25, 0.5, 0.75], method="weibull")
  for clock, times in ("wall", 1), ("cpu", 1.5):
    read = compare.read(text, KIND, clock)
    assert list(read) == [("vit_s16", 8), ("mae_b16", 4)]
    np.testing.assert_allclose(read["vit_s16", 8], times * np.array([middle, low, high]), atol=6e-4)
    np.testing.assert_allclose(read["mae_b16", 4], [0.5 * times] * 3)
  with pytest.raises(ValueError, match="no table of 'GPU'; there: 'AMD EPYC.*eagers', 'AMD"):
    compare.read(text, "GPU", "wall")


def test_what_got_worse_is_named_and_noise_is_not():
  then = {("a", 8): (1.0, 0.98, 1.02), ("b", 8): (1.0, 0.98, 1.02), ("c", 8): (1.0, 0.9, 1.2),
          ("d", 8): (0.8, 0.79, 0.81), ("e", 8): (1.0, 0.98, 1.02), ("gone", 8): (1.0, 0.9, 1.1)}
  now = {("a", 8): (1.08, 1.07, 1.09),  # worse
         ("b", 8): (1.04, 1.03, 1.05),  # by less than 5%
         ("c", 8): (1.08, 1.07, 1.09), ("e", 8): (1.08, 1.01, 1.2),  # within then's, now's spread
         ("d", 8): (0.85, 0.84, 0.86),  # worse, though faster than the peer
         ("a", 4): (9.0, 9.0, 9.0), ("new", 8): (9.0, 9.0, 9.0)}
  lines = compare.worse(now, then)
  assert [line.split(",")[0] for line in lines] == ["a", "d"]
  assert lines[0] == "a, batch 8: ratio 1.080, was 1.000 (+8%)"


@pytest.mark.parametrize("flags, words", [
  ("--models=vit_s61", "did you mean 'vit_s16'"), ("--models=vit_l16 --device=cpu", "--batch"),
  ("--models=mae_l16_masks --batch=1 --steps=1", "at least 2"),
  ("--models=vit_s16 --device=cpu --python-peer=/nowhere/python", "with torch"),
  ("--models=vit_s16 --device=cpu --against=nowhere.md", "nowhere.md: no such file")])
def test_what_a_user_has_to_change_is_said(flags, words):
  with pytest.raises(ValueError, match=words):
    compare.check(compare.parse(flags.split())[0])


def test_sides_take_steps_in_turn():
  order = []

  class Fake:
    def __init__(self, name):
      self.name = name

    def steps(self, n=1):
      order.extend(self.name * n)
      return {"wall": len(order), "cpu": 0}
  pairs = compare.alternate(Fake("a"), Fake("b"), steps=3, warm_up=2)
  assert "".join(order) == "aabb" + "ababab"
  assert [(a["wall"], b["wall"]) for a, b in pairs] == [(5, 6), (7, 8), (9, 10)]


def test_a_worker_answers_each_line(monkeypatch, capsys):
  taken, clocks = [], iter(range(100))
  monkeypatch.setattr("sys.stdin", io.StringIO("2\n4\n"))
  monkeypatch.setattr(worker.time, "perf_counter", lambda: 8.0 * next(clocks))
  worker.serve(lambda: taken.append(0), parameters=3)
  ready, two, four = map(json.loads, capsys.readouterr().out.splitlines())
  assert ready == {"parameters": 3} and len(taken) == 6
  assert (two["wall"], four["wall"]) == (4.0, 2.0) and two["cpu"] >= 0


@pytest.mark.slow
def test_compare_runs_ours_beside_ours_and_against_a_page(monkeypatch, capsys, tmp_path):
  """From processes to exit status, with a recipe of seconds."""
  monkeypatch.setitem(compare.PAIRS, "small", compare.Pair(
    "configs/vit.py:smoke", {"optimizer.lr": 1e-4}, {"cpu": 16}, {"optimizer.lr": 2e-4}))
  flags = ["--models=small", "--steps=2", "--device=cpu"]
  monkeypatch.setattr(compare, "worse", lambda now, then: [f"{sorted(now)} {sorted(then)}"])
  page = tmp_path / "page.md"
  args, _ = compare.parse(flags)
  name = compare.kind(compare.cpu_name(), args)
  page.write_text(table(("small", 16, [1.0, 1.0])).replace(KIND, name))
  assert compare.main([*flags, f"--against={page}"]) == 1
  out, error = capsys.readouterr()
  assert f"**{name}** (jax " in out and "[('small', 16)] [('small', 16)]" in error
  (wall, *_), = compare.read(out, name, "wall").values()
  assert 0 < wall < 100


def uncompiled(config):
  """What train_step.prepare gives, without a step."""
  built = recipe.build(config, data=recipe.stand_in(config), devices=jax.devices()[:1])
  return train_step.Prepared(None, built, loop.abstract_state(built)[0], 0.0)


def our_work(name: str) -> tuple[int, int]:
  """(parameters, model FLOPs of two examples)."""
  pair = compare.PAIRS[name]
  overrides = {**pair.overrides, "data.batch_size": 2}
  prepared = uncompiled(recipe.load_config(
    pair.config, {key: str(value) for key, value in overrides.items()}))
  return (sum(x.size for x in jax.tree.leaves(prepared.abstract.params)),
          loop.model_flops(prepared.built, prepared.abstract))


@pytest.mark.parametrize("name", [name for name, pair in compare.PAIRS.items() if not pair.other])
def test_a_peer_has_our_parameters_and_our_flops(name):
  torch = pytest.importorskip("torch")
  from torch.utils.flop_counter import FlopCounterMode

  from benchmarks.peers import train_step as peers
  with torch.device("meta"):
    network = peers.MODELS[name]()
    inputs = {key: peers.INPUTS[key](2) for key in network.inputs}
    with FlopCounterMode(display=False) as counter:
      network(**inputs).backward()
  parameters, flops = our_work(name)
  assert peers.parameters(network) == parameters
  assert counter.get_total_flops() == pytest.approx(flops, rel=0.05)


def test_the_line_of_sampling_times():
  fixed, slope, off = sampling.fit([10, 20, 40], [0.5 + 0.1 * n for n in (10, 20, 40)])
  np.testing.assert_allclose([fixed, slope, off], [0.5, 0.1, 0], atol=1e-9)
  assert sampling.fit([10, 20, 40], [1.0, 2.0, 8.0])[2] > 0.2


@pytest.mark.slow
def test_sampling_prints_a_row_for_each_sampler(monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", [
    "sampling.py", "--config=configs/diffusion.py:smoke", "--samplers=euler,heun", "--steps=2,3",
    "--batch=4", "--repeats=1"])
  assert sampling.main() == 0
  rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
  assert [row[0].strip() for row in rows] == ["euler", "heun"]
  assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[1:3])


def test_scaling_predicts_by_flops_from_the_middle(monkeypatch):
  times = {8: 1.0, 16: 5.0, 32: 7.0}
  monkeypatch.setattr(train_step, "prepare", uncompiled)
  monkeypatch.setattr(scaling, "seconds", lambda runs, repeats: {n: times[n] for n in runs})
  monkeypatch.setitem(scaling.AXES, "batch", ("data.batch_size", tuple(times)))
  points = scaling.measure("configs/vit.py:smoke", {
    "augment.image_size": 16, "model.depth": 1, "model.width": 32, "model.mlp_dim": 64,
    "model.heads": 2}, "batch", 1)
  assert [point["value"] for point in points] == [8, 16, 32]
  np.testing.assert_allclose([point["predicted"] for point in points], [2.5, 5.0, 10.0], rtol=1e-6)
  assert len(scaling.figure({"batch": points, "depth": points}).axes) == 2


def test_a_section_of_the_results_is_replaced_or_appended():
  page = results.replace(results.replace(results.START, "EPYC: `a`", "one"), "EPYC: `a` b", "two")
  assert page.startswith("# Results\n") and page.index("one") < page.index("## EPYC: `a` b\n\ntwo")
  again = results.replace(page, "EPYC: `a`", "three")
  assert again == page.replace("one", "three")


@pytest.mark.slow
def test_every_ablation_is_another_network_of_the_default_recipe():
  """No row is the default by another name; gates have the parameters of what they replace."""
  built = {}
  for name, changed in ablations.CHOICES.items():
    config = recipe.load_config(ablations.CONFIG, {k: str(v) for k, v in changed.items()})
    prepared = uncompiled(config)
    module = recipe.make_model(prepared.built.config)
    for field, value in changed.items():
      assert getattr(module, field.removeprefix("model.")) == value, name
    built[name] = (repr(module), sum(x.size for x in jax.tree.leaves(prepared.abstract.params)))
  assert len({text for text, _ in built.values()}) == len(built)
  for name in "GLU", "Bilinear", "ReGLU", "GEGLU", "SwiGLU":
    assert built[name][1] == pytest.approx(built["default"][1], rel=0.01)


def test_ablations_keep_the_shape_of_the_recipe_and_of_the_table(monkeypatch, tmp_path, capsys):
  full, half = (ablations.overrides("RMSNorm", 2, steps) for steps in (None, 1300))
  whole = get_config()
  assert full["total_steps"] == whole.total_steps == full["eval_every_steps"]
  assert full["schedule.warmup_steps"] == whole.schedule.warmup_steps
  share = whole.schedule.warmup_steps / whole.total_steps
  assert half["schedule.warmup_steps"] == pytest.approx(1300 * share, abs=1)
  assert full["model.norm"] == "rmsnorm" and full["seed"] == 2
  monkeypatch.setattr(ablations, "train", lambda name, seed, args, cores: seed + len(name) / 100)
  monkeypatch.setattr(train_step, "prepare", uncompiled)
  monkeypatch.setattr(train_step, "parameters", lambda prepared: 1234)
  monkeypatch.setattr(sampling, "seconds", lambda runs, repeats: {"this": 0.5, "default": 0.25})
  monkeypatch.setattr(ablations.environment, "prepare", lambda args: None)
  monkeypatch.setattr(ablations, "ROOT", tmp_path)
  (tmp_path / "README.md").write_text(
    "before\n<!-- ablations -->\nold\n<!-- end of ablations -->\nafter\n")
  monkeypatch.setattr(ablations, "CHOICES", {k: ablations.CHOICES[k] for k in ("default", "ReLU")})
  monkeypatch.setattr("sys.argv", ["ablations.py"])
  assert ablations.main() == 0
  table = capsys.readouterr().out
  assert ("| ReLU | `model.activation=relu` | 1,234 | 1.040 ± 1.000 | 0.040 to 2.040 | 2.0 | 0.50 |"
          in table)
  readme = (tmp_path / "README.md").read_text()
  assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
  assert table.strip() in readme
  (tmp_path / "README.md").write_text("before\n<!-- end of ablations -->\n<!-- ablations -->\n")
  with pytest.raises(ValueError, match="no <!-- ablations --> with an <!-- end of ablations -->"):
    ablations.main()


def test_a_mutant_is_one_change_that_compiles():
  drawn = mutants.draw(40, 0)
  assert drawn == mutants.draw(40, 0) != mutants.draw(40, 1) and len(set(drawn)) == 40
  assert {m.path.split("/")[0] for m in drawn} == set(mutants.PACKAGES)
  assert {m.kind for m in drawn} == {"operator", "sign", "axis", "constant", "dropped"}
  for mutant in drawn:
    source = (mutants.ROOT / mutant.path).read_bytes()
    assert source[mutant.start:mutant.stop].decode() == mutant.old
    assert source[:mutant.start].count(b"\n") <= mutant.line + mutant.old.count("\n") + 3
    changed = source[:mutant.start] + mutant.new.encode() + source[mutant.stop:]
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant


def test_a_mutant_is_seen_by_the_first_test_that_fails(tmp_path):
  (tmp_path / "test_a.py").write_text("def test_one():\n  assert True\n")
  (tmp_path / "test_b.py").write_text("def test_two():\n  assert False\n")
  assert mutants.seen_by(tmp_path, ["test_a.py"], []) is None
  assert mutants.seen_by(tmp_path, ["test_a.py", "test_b.py"], []) == "test_b.py::test_two"


def test_bad_inputs_are_of_many_kinds():
  cases = bad_inputs.CASES
  assert len({(case.kind, case.name) for case in cases}) == len(cases) >= 60
  assert len({case.kind for case in cases}) >= 10
  row = dict(kind="disk", name="a|b", status=1, said="error: " + "x" * 300, left="no run")
  assert bad_inputs.table([row]).splitlines()[2] == (
    "| disk | a\\|b | 1 | error: " + "x" * 190 + "... | no run |")


@pytest.mark.slow
def test_a_bad_input_is_judged_by_what_is_said_and_left():
  case = bad_input_parts.field("model.dept=3", "did you mean 'depth'")
  right = bad_inputs.judge(case)
  assert right["wrong"] == [] and right["status"] == 1 and right["left"] == "no run"
  assert right["said"].startswith("error: config.model.dept: unknown field")
  wrong = bad_inputs.judge(case._replace(status=0, says="width", left="steps 6"))["wrong"]
  assert wrong == ["status 1, not 0", "does not say 'width'", "left no run, not steps 6"]
