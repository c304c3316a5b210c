"""`python eval.py --page RUN`: page.html, beside this file, with a run's data and images in it."""
import base64
import io
import json
import re
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace

import perl

def write(run: Path) -> Path:
    """SystemExit: `run` is no run folder, or nothing is logged in it yet."""
    rows = [row | {"held_out": name == "held_out"} for name in ("rollouts", "held_out")
            for row in perl.read_lines(run / f"{name}.jsonl")]
    metrics = perl.read_lines(run / "metrics.jsonl")
    if not metrics:
        raise SystemExit(f"--page {run}: no metrics.jsonl of a training run there")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    cfg = perl.Config(**config)
    by_group, paths = {}, {}  # a held-out question is one group through all steps
    for row in rows:
        step = "held-out" if row["held_out"] else row["step"]
        by_group.setdefault((step, row["id"]), []).append(row)
        paths |= dict.fromkeys(row["images"])
    groups = [describe(group, cfg) for group in by_group.values()]
    images = {path: as_data(path) for path in paths}  # each read once, though in many rows
    data = {"run": run.name, "config": config, "metrics": metrics, "groups": groups,
            "images": images}
    # Model text stays text: "</script>" in it must not end the script, nor any tag begin.
    content = json.dumps(data).replace("<", "\\u003c")
    empty = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    perl.write_atomic(run / "page.html", empty.replace("NO_DATA", content))
    return run / "page.html"

def describe(rows: list[dict], cfg: perl.Config) -> dict:
    """A group as the page shows it: rollouts by order, statistics of rewards, the verdict."""
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
