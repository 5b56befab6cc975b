"""The run report: what it says of a run directory, and the page itself in a real browser."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

import evaluate
import train
from trainer import report
from trainer.logging import read_lines

HOSTILE = "<script>window.hacked = 1</script>"
FACTS = {"recipe": f"vit: {HOSTILE}", "parameters": "1,234"}
SPENT = {"start": 1.0, "compilation": 3.0, "input wait": 0.5, "evaluation": 2.0,
         "checkpoints": 0.25, "steps and logging": 13.25}


def make_run(workdir, seed=0, evaluated=True):
  """A run directory of 100 steps in two sessions, as if trained; loss is 100 / step + seed."""
  (workdir / "figures").mkdir(parents=True)
  config = {"config_name": "vit:smoke", "seed": seed, "total_steps": 100,
            "model": {"depth": 2, "classes": [HOSTILE, "b"]}, "init": {}}
  (workdir / "config.json").write_text(json.dumps(config))
  odd = {50: float("nan"), 60: float("inf")}
  rows = [{"step": step, "time": 50.0 + step, "train/loss": 100 / step + seed,
           f"train/{HOSTILE}": odd.get(step, -step)} for step in range(1, 101)]
  for at in (50, 100) if evaluated else ():
    rows.append({"step": at, "time": 151.0, "eval/knn/top1": at / 200, "eval/knn/top5": 0.75})
  if evaluated:
    rows[-1] |= {"eval/knn/untrained/top1": 0.125, "eval/probe/top1": 0.625}
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows)
                                         + '{"step": 100, "ti')
  for name, step in (("grid", 50), ("grid", 100), ("map", 100)):
    Image.fromarray(np.full((40, 900, 3), step, np.uint8)).save(
      workdir / "figures" / f"{name}_step{step:08d}.png")
  for start, stop, reason in ((0, 40, "stopped by SIGTERM"), (40, 100, "")):
    report.update(workdir, "start", step=start, facts=FACTS, command="python train.py --x='<b>'",
                  changed=["config.model.depth: 12 -> 2"])
    report.update(workdir, "stop", step=stop, spent=SPENT, reason=reason)
  return workdir


def words(page):
  """The text of a page's body, its spaces made one."""
  body = re.sub(r"(?s)<(style|script).*?</\1>", "", page.read_text())
  return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_what_the_page_says(tmp_path):
  run = make_run(tmp_path / "one")
  text = words(run / "report.html")
  for said in ("knn/top1 0.5 untrained 0.125 probe/top1 0.625 knn/top5 0.75",  # the headline
               "steps 100 wall time 0m40s last loss 1 parameters 1,234",
               "metric trained untrained knn/top1 0.5 0.125 knn/top5 0.75",
               "grid, step 100", "1 from earlier steps", "grid, step 50",
               "compilation 6.0 s 15.0%", "steps and logging 26.5 s 66.2%",
               "0 40 0m20s stopped by SIGTERM", "40 100 0m20s",
               "Changed from the recipe: model.depth 12 -&gt; 2 All 6 fields",
               "python train.py --x=&#39;&lt;b&gt;&#39;", f"--workdir={run}", "finished"):
    assert said in text, said
  assert "not finished" not in text and "None yet" not in text
  report.update(run, "evaluation", step=100, metrics={"knn/top1": 0.375}, changed=[])
  report.update(run, "evaluation", step=100, metrics={"knn/top1": float("nan")},
                changed=["--config.evals.knn.k=3"])
  text = words(run / "report.html")
  assert "At step 100 metric trained knn/top1 0.375 At step 100, with --config.evals.knn" in text
  assert "knn/top1 nan" in text


@pytest.mark.parametrize("case,said", [
  ("no metrics", "not finished : stopped by SIGTERM steps 40 of 100"),
  ("no history", "vit:smoke · finished"),
  ("no evaluation", "Evaluation None yet."),
  ("killed", "not finished : running, or killed knn/top1 0.5")])
def test_incomplete_runs_read_right(case, said, tmp_path):
  run = make_run(tmp_path / "run", evaluated=case != "no evaluation")
  history = (run / "history.jsonl").read_text().splitlines(keepends=True)
  if case == "no metrics":
    (run / "metrics.jsonl").unlink()
    (run / "history.jsonl").write_text("".join(history[:2]))
  if case == "no history":
    (run / "history.jsonl").unlink()
  if case == "killed":
    (run / "history.jsonl").write_text("".join(history[:3]))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "total_steps": 200}))
  page = report._replace(tmp_path / "page.html", report.render([report.read_run(run)]))
  assert said in words(page)
  if case == "no metrics":
    assert "No step is logged yet." in words(page) and "metric trained" not in words(page)


def test_thinned_curves_keep_their_extremes_and_means():
  x = np.random.default_rng(0).normal(size=50_001)
  x[777], x[30_000], x[40_000] = 1e6, -1e6, np.nan
  kept = report.thin([(10 * i, v) for i, v in enumerate(x)], 2000)
  assert len(kept) < 2100 and all(x[step // 10] == v or step == 400_000 for step, v in kept)
  steps = [step for step, _ in kept]
  assert steps == sorted(steps) and {0, 7770, 300_000, 400_000, 500_000} <= set(steps)
  assert report.thin([(1, 2.0), (2, 3.0)], 2) == [(1, 2.0), (2, 3.0)]
  line = [(i, np.nan if i == 7 else 2.0 * i) for i in range(6000)]
  step, mean = np.array(report.means(line)).T
  np.testing.assert_allclose(mean, 2 * step)
  assert len(mean) == 150 and step[0] == (sum(range(41)) - 7) / 40 and not report.means(line[:300])


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
  run = make_run(tmp_path / "run")
  (run / "report.html").unlink()
  (run / "report.html").mkdir()
  with caplog.at_level(logging.WARNING, "vitrine"):
    assert report.update(run, "stop", step=1, spent=SPENT, reason="") is None
    assert report.update(tmp_path / "none", "stop", step=1, spent=SPENT, reason="") is None
  assert len(caplog.records) == 2 and str(run) in caplog.text


def test_a_training_and_an_evaluation_write_it(data_dir, tmp_path, capsys):
  run, data = tmp_path / "run", f"--data_dir={data_dir}"
  flags = ["--config=configs/vit.py:smoke", f"--workdir={run}", data,
           "--config.checkpoint.every_steps=2"]
  broken = ["--config.optimizer.lr=1e30", "--config.optimizer.name=sgd",
            "--config.optimizer.ns_steps=none", "--config.schedule.warmup_steps=0"]
  assert train.main([*flags, *broken]) == 1
  assert "not finished : not finite at step" in words(run / "report.html")
  shutil.rmtree(run)
  assert train.main(flags) == 0
  assert f"report  {run / 'report.html'}" in capsys.readouterr().out
  started, stopped = read_lines(run / "history.jsonl")
  assert started["step"] == 0 and "config.checkpoint.every_steps: None -> 2" in started["changed"]
  assert started["command"] == "python train.py " + " ".join(flags)
  assert {"recipe", "devices", "parameters", "python", "packages", "commit", "code"} <= set(
    started["facts"])
  assert stopped["step"] == 6 and stopped["reason"] == "" and set(stopped["spent"]) == set(SPENT)
  assert all(seconds >= 0 for seconds in stopped["spent"].values())
  np.testing.assert_allclose(sum(stopped["spent"].values()), stopped["time"] - started["time"],
                             atol=stopped["spent"]["start"] + 0.5)
  assert evaluate.main([f"--workdir={run}", data]) == 0
  metrics = read_lines(run / "history.jsonl")[-1]["metrics"]
  assert f"classification/top1 {metrics['classification/top1']:.4g}" in words(run / "report.html")


def test_compare_refuses_what_is_no_run(tmp_path, capsys):
  run = make_run(tmp_path / "run")
  for others, message in ((["--compare", str(run), str(tmp_path / "nun")], "nun holds no run"),
                          (["--compare", str(run), f"{run}/"], "given twice")):
    assert evaluate.main([*others, f"--out={tmp_path / 'page.html'}"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "page.html").exists()
  for flags in ([], [f"--workdir={run}", "--compare", str(run)]):
    with pytest.raises(SystemExit):
      evaluate.main(flags)


# --- In a browser ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
  found = shutil.which("chromium") or shutil.which("google-chrome")
  if not found:
    pytest.skip("no chromium to look at the page with")
  with sync_playwright() as playwright:
    yield playwright.chromium.launch(executable_path=found)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  runs = [make_run(folder / parent / "<b>&", seed) for seed, parent in enumerate("ab")]
  report.compare(list(map(str, runs)), folder / "compare.html")
  return {"run": runs[0] / "report.html", "compare": folder / "compare.html"}


@pytest.fixture(params=[("run", 1280), ("run", 375), ("compare", 1280), ("compare", 360)],
                ids=lambda p: f"{p[0]} {p[1]}")
def opened(request, browser, pages):
  """(page, its kind), checked at the end: no error, no request, all images, no overflow."""
  kind, width = request.param
  with browser.new_context(viewport={"width": width, "height": 800}, offline=True,
                           has_touch=width < 600) as context:
    page, complaints, requests = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[kind].as_uri())
    yield page, kind, width < 600
    assert not complaints
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}, requests
    assert sum(url.startswith("file") for url in requests) == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert pictures == [900] * (3 if kind == "run" else 4)
    assert page.evaluate("window.hacked") is None and page.locator("script").count() == 2


def test_the_page_in_a_browser(opened):
  page, kind, phone = opened
  assert HOSTILE in page.inner_text("body")
  figure = page.locator(".chart", has_text="train/loss")
  svg, output = figure.locator("> svg"), figure.locator("output")
  svg.scroll_into_view_if_needed()
  box = svg.bounding_box()

  def axis(name="x"):
    return [float(t.replace(",", "")) for t in svg.locator(f"text.{name}").all_text_contents()]

  def at(share):
    """A point of the plot, by its share of the width without the labels at its left."""
    left = 12 + 6.5 * max(len(t) for t in svg.locator("text.y").all_text_contents())
    return box["x"] + left + share * (box["width"] - left - 10), box["y"] + 100

  # The value at rest is the last; pointed at, that of the nearest step.
  assert re.findall(r"(\S+)\s+step (\d+)", output.inner_text()) == [
    (str(1 + seed), "100") for seed in range(1 if kind == "run" else 2)]
  (page.touchscreen.tap if phone else page.mouse.move)(*at(24 / 99))
  found = re.findall(r"(\S+)\s+step (\d+)", output.inner_text())
  assert found == [(str(4 + seed), "25") for seed in range(1 if kind == "run" else 2)]

  # Dragging from 25 to 76 shows these steps alone, and their range of values; then one moves.
  whole = axis(), axis("y")
  page.mouse.move(*at(24 / 99))
  page.mouse.down()
  page.mouse.move(*at(75 / 99))
  assert figure.locator("rect").count() == 1
  page.mouse.up()
  assert 25 <= min(axis()) < max(axis()) <= 76 and max(axis("y")) < 6 < max(whole[1])
  before = axis()
  page.keyboard.down("Shift")
  page.mouse.down()
  page.mouse.move(*at(25 / 99))
  page.mouse.up()
  page.keyboard.up("Shift")
  assert max(before) < max(axis()) <= 100
  page.mouse.dblclick(*at(0.5))
  assert (axis(), axis("y")) == whole and figure.get_by_text("reset").is_hidden()

  # The keyboard does the same, from the last point on.
  page.mouse.move(0, 0)
  svg.focus()
  page.keyboard.press("ArrowLeft")
  assert "step 99" in output.inner_text()
  page.keyboard.press("+")
  assert min(axis()) >= 50 and figure.get_by_text("reset").is_visible()
  figure.get_by_text("reset").click()
  assert (axis(), axis("y")) == whole

  # A logarithmic axis has powers of ten, or 1, 2 and 5 times them, and no place for what is <= 0.
  figure.get_by_text("log", exact=True).click()
  assert {f"{v:e}"[:3] for v in axis("y")} <= {"1.0", "2.0", "5.0"}
  heights = svg.locator("text.y").evaluate_all("all => all.map(x => Number(x.getAttribute('y')))")
  slopes = np.diff(heights) / np.diff(np.log10(axis("y")))
  np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)
  assert len(heights) >= 2 and slopes[0] < -20 and max(heights) < 200
  other = page.locator(".chart", has_text=HOSTILE)
  assert {"nan", "inf"} <= set(other.locator("text").all_text_contents())
  lines = other.locator("path").first.get_attribute("d").count("M")
  assert lines == 3                                                         # broken at nan and inf
  other.get_by_text("log", exact=True).click()
  assert other.locator("path").first.get_attribute("d") == ""
  if kind == "compare":
    assert figure.locator("path").count() == 2
    page.locator(".legend input").first.uncheck()
    assert figure.locator("path").count() == 1 and "step" in output.inner_text()
    text = page.inner_text("body")
    assert re.search(r"seed\s+0\s+1\n", text) and "model.depth" not in text
    assert re.search(r"knn/top1\s+0.5\s+0.5\s+untrained\s+0.125\s+0.125", text)
