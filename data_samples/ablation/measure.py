"""Accuracy, worst order and bias of a model on a file of samples."""
import dataclasses
from pathlib import Path
from statistics import fmean

from accelerate import Accelerator

import perl


def rounded(*values: float) -> list[float]:
    return [round(value, 5) for value in values]

def measure(checkpoint: str, path: Path, n_orders: int, max_new_tokens: int) -> dict:
    """Greedy answers to the questions of a file, in at most n_orders orders: accuracy, worst
    order and bias, over `all` and over those that `ask` for an image; accuracy by the
    position of the right image, from 1."""
    cfg = dataclasses.replace(perl.parse_config([]), max_new_tokens=max_new_tokens)
    device, asking, places = Accelerator().device, [], {}
    perl.transformers.logging.set_verbosity_error()
    perl.fit_machine(cfg, device)
    processor = perl.load_processor(checkpoint, cfg)
    model = perl.load_model(checkpoint, cfg, device)
    samples = perl.load_samples(path)
    orders = [perl.all_orders(sample, n_orders) for sample in samples]
    groups = perl.sample_groups(model, processor, samples, orders, cfg, n=1, greedy=True)
    for group in groups:
        if group[0].prompt.sample.order_rule in ("index", "letter"):
            asking.append(group)
            for rollout in group:
                place = perl.named_positions(rollout.prompt.sample)[0] + 1
                places.setdefault(place, []).append(rollout.accuracy)
    by_place = {}
    for place in sorted(places):
        by_place[str(place)] = round(fmean(places[place]), 5)
    return {"all": shares_right(groups), "ask": shares_right(asking), "places": by_place}

def shares_right(groups: list[list]) -> list[float]:
    """Accuracy, worst order and bias, as perl.evaluate has them."""
    rows = [[rollout.accuracy for rollout in group] for group in groups]
    worst, best = fmean(map(min, rows)), fmean(map(max, rows))
    return rounded(fmean(map(fmean, rows)), worst, best - worst)
