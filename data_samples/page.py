"""What `python eval.py --page RUN` writes: RUN/page.html, one file with a run's curves and its
logged groups, images included. page.html beside this file is the page without the data."""
import base64
import io
import json
import re
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace

import perl

HERE = Path(__file__).resolve().parent

def write(run: Path) -> Path:
    """SystemExit: `run` is no run folder, or nothing is logged in it yet."""
    rows = [row | {"held_out": name == "held_out"} for name in ("rollouts", "held_out")
            for row in perl.read_lines(run / f"{name}.jsonl")]
    metrics = perl.read_lines(run / "metrics.jsonl")
    if not metrics:
        raise SystemExit(f"--page {run}: no metrics.jsonl of a training run there")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    by_group = {}  # a held-out question is one group through all steps
    for row in rows:
        step = "held-out" if row["held_out"] else row["step"]
        by_group.setdefault((step, row["id"]), []).append(row)
    groups = [describe(group, perl.Config(**config)) for group in by_group.values()]
    images = {path: as_data(path) for row in rows for path in row["images"]}
    data = {"run": run.name, "config": config, "metrics": metrics, "groups": groups,
            "images": images}
    # Model text stays text: "</script>" in it must not end the script, nor any tag begin.
    content = json.dumps(data).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8").replace("NO_DATA", content)
    perl.write_atomic(run / "page.html", page)
    return run / "page.html"

def describe(rows: list[dict], cfg: perl.Config) -> dict:
    """A group as the page shows it: its rollouts by order, mean and deviation of the rewards, and
    what the filter did with it."""
    rewards = [row["reward"] for row in rows]
    orders = {}
    for row in rows:
        rule = perl.ORDER_RULES.get(row.get("order_rule"), perl.ORDER_RULES["keep"])
        is_name = re.fullmatch(rule.name, row["gold"])  # of one image
        right = rule.position_of(row["gold"], SimpleNamespace(**row)) if is_name else -1
        orders.setdefault(tuple(row["order"]), []).append(row | {"right_image": right})
    known = cfg.filter in perl.CHOICES["filter"]  # not a fork's
    verdict = perl.verdict([SimpleNamespace(**row) for row in rows], cfg) if known else cfg.filter
    return {"step": rows[0]["step"], "id": rows[0]["id"], "orders": list(orders.values()),
            "held_out": rows[0]["held_out"], "mean": fmean(rewards),
            "deviation": pstdev(rewards), "verdict": verdict}

def as_data(path: str) -> str:
    """An image, at most 256 pixels wide and high, as the page's own; empty if it is gone."""
    try:
        image = perl.read_image(path)
    except OSError:
        return ""
    image.thumbnail((256, 256))
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
