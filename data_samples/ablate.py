#!/usr/bin/env python3
"""Experiments with perl.py: which part of the method does what, and what a step costs.

    python data_samples/ablate.py --short     # PeRL and plain GRPO, 3 seeds
    python data_samples/ablate.py --jobs 4    # all arms, 8 seeds, four runs at a time
    python data_samples/ablate.py --arms perl,clean --seeds 0-3
    python data_samples/ablate.py --tables    # table and picture of the finished runs
    python data_samples/ablate.py --cost      # a training step with and without sharing

Every arm trains the tiny model on the same seeds. A finished run is a line of ablation.jsonl,
with a hash of what it depends on: the code of perl.py (without comments and docstrings), the
samples, the start model, and the arm's flags and code. While the hash stays the same, the run
is not repeated, so the file can be committed and continued on another machine.
"""
import argparse
import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Callable, NamedTuple

import torch
import transformers
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
MAKER = HERE / "make_samples.py"
sys.path.insert(0, str(HERE.parent))
import perl  # found through the line above
from eval import table

# ---- Forks: ideas of other papers, each in place of functions of perl.py ---------------

def before_advantages(change: Callable) -> None:
    """Call change(rollouts by order) on each group before its advantages are computed."""
    set_advantages = perl.set_advantages

    def with_change(groups):
        for group in groups:
            change(orders_of(group))
        set_advantages(groups)

    perl.set_advantages = with_change

def orders_of(group: list) -> list[list]:
    """The rollouts of a group, one list per order; the given order first."""
    by_order = {}
    for rollout in group:
        by_order.setdefault(rollout.order, []).append(rollout)
    return list(by_order.values())

def loss_on_clean_order(by_order: list[list]) -> None:
    """As in NoisyRollout: sample in every order, but train on the given one."""
    for rollout in perl.flatten(by_order):
        rollout.prompt = by_order[0][0].prompt

# The next two forks reward columns: a column has the t-th rollout of every order. A question
# that is asked in one order only has none.
def columns(by_order: list[list]) -> list[tuple]:
    return list(zip(*by_order)) if len(by_order) > 1 else []

def reward_agreement(by_order: list[list]) -> None:
    """PA-GRPO (arXiv 2603.21016): the answer that most of a column give earns as much as a
    right answer, whether it is right or wrong (the paper's lambda = 1)."""
    for column in columns(by_order):
        answers = [answer_as_given(rollout) for rollout in column]
        favourite, votes = Counter(answers).most_common(1)[0]
        for rollout, answer in zip(column, answers):
            if answer is not None and answer == favourite and votes > len(column) / 2:
                rollout.reward += perl.Config.accuracy_weight

def answer_as_given(rollout) -> str | None:
    """A rollout's answer in the given order of images: "1" -> "3" if the first image was the
    third there. None if there is no answer, or it names no image of the question."""
    answer, places = perl.extract_answer(rollout.text), range(len(rollout.order))
    asked = dataclasses.replace(rollout.prompt.sample, answer=answer or "")
    if answer is None or perl.named_positions(asked) is None:
        return None
    back = tuple(rollout.order.index(place) for place in places)
    return perl.permute(asked, back).answer

def reward_agree_and_right(by_order: list[list]) -> None:
    """ConsistRoll (arXiv 2606.29812), after its abstract: columns that are right throughout
    earn a joint reward. Its weight here is that of a right answer."""
    for column in columns(by_order):
        if all(rollout.accuracy for rollout in column):
            for rollout in column:
                rollout.reward += perl.Config.accuracy_weight

def baseline_per_order() -> None:
    """Advantages within each order, in place of the whole group."""
    set_advantages = perl.set_advantages

    def per_order(groups):
        for group in groups:
            set_advantages(orders_of(group))

    perl.set_advantages = per_order

def permute_by_gap() -> None:
    """Permute each question with the probability of its own gap in accuracy between two
    orders, which stage 0 measures. For one process."""
    sample_orders, draw_orders, gaps = perl.sample_orders, perl.draw_orders, {}

    def in_two_orders(model, processor, samples, cfg, *more, **named):
        if cfg.stage > 0:
            return sample_orders(model, processor, samples, cfg, *more, **named)
        named |= {"n_orders": 2, "n": named["n"] // 2}
        groups = sample_orders(model, processor, samples, cfg, *more, **named)
        for group in groups:
            means = [fmean(r.accuracy for r in rollouts) for rollouts in orders_of(group)]
            gaps[group[0].prompt.sample.id] = max(means) - min(means)
        return groups

    def by_gap(sample, n_permutations, alpha, rng):
        return draw_orders(sample, n_permutations, gaps.get(sample.id, alpha), rng)

    perl.sample_orders, perl.draw_orders = in_two_orders, by_gap

FORK_CODE = (before_advantages, orders_of, loss_on_clean_order, columns, reward_agreement,
             answer_as_given, reward_agree_and_right, baseline_per_order, permute_by_gap)

# ---- Arms ------------------------------------------------------------------------------

class Arm(NamedTuple):
    """One experiment, run once per seed."""
    title: str
    stages: tuple[str, ...] = ("",)  # flags of each run of perl.py, in turn
    share: str = ""                  # right images first, in a training set made for it
    change: Callable | None = None   # of each group, before its advantages
    fork: Callable | None = None     # replaces functions of perl.py

# More orders and evaluations would take most of the time.
EVALUATION = "--eval-orders 6 --eval-every 20"
OFTEN, GRPO = "--eval-every 5", "--n-permutations 0"
SHARES = {"balanced": 28.6, "0.5": 50, "0.8": 80, "0.95": 95, "1": 100}  # in percent
STAGES_1_2 = ("--steps 20", "--stage 2 --steps 20")
ARMS = {"perl": Arm("PeRL (n_s = 1)", (OFTEN,)),
        "grpo": Arm("plain GRPO (n_s = 0)", (f"{GRPO} {OFTEN}",))}
# 0.95 is the share of data_samples/train.jsonl itself.
for share in ("balanced", "0.5", "0.8", "1"):
    ARMS[f"perl-{share}"] = Arm(f"PeRL, right image first: {share}", share=share)
    ARMS[f"grpo-{share}"] = Arm(f"plain GRPO, right image first: {share}", (GRPO,), share)
ARMS |= {
    "orders-3": Arm("n_s = 2", ("--n-permutations 2",)),
    "orders-4": Arm("n_s = 3", ("--n-permutations 3",)),
    "alpha-1": Arm("alpha stays 1", ("--alpha-end 1",)),
    "per-order": Arm("a baseline for each order", fork=baseline_per_order),
    "clean": Arm("loss on the clean order", change=loss_on_clean_order),
    "offline": Arm("filter: offline", ("--stage 0", "--filter offline")),
    "online": Arm("filter: online", ("--filter online",)),
    "agree": Arm("reward: agreement (PA-GRPO)", change=reward_agreement),
    "agree-right": Arm("reward: agree, right (ConsistRoll)", change=reward_agree_and_right),
    "adaptive": Arm("permuting by gap", ("--stage 0", "--filter none"),
                    fork=permute_by_gap),
    "stages-1-2": Arm("stages 1, 2: 20 steps each", STAGES_1_2),
    "stages-0-1-2": Arm("stages 0, 1, 2: 20 steps each", ("--stage 0", *STAGES_1_2))}

# ---- What a run depends on -------------------------------------------------------------

def syntax(node) -> str:
    """A syntax tree as text, without docstrings and line numbers."""
    if isinstance(node, list):
        return "[" + " ".join(map(syntax, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    text = type(node).__name__
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                value = value[1:]
        # Each version of Python adds fields that are empty in older code.
        if value is not None and value != []:
            text += f" {name}={syntax(value)}"
    return f"({text})"

def code_hash(source: str) -> str:
    """A hash of Python code that comments, blank lines and docstrings do not change."""
    return hash_of(syntax(ast.parse(source)))

def hash_of(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

def base_hash() -> str:
    """Of what all arms share: perl.py, the samples, the start model."""
    parts = [code_hash(Path(perl.__file__).read_text(encoding="utf-8"))]
    for pattern in ("train.jsonl", "test.jsonl", "images/*", "tiny/*"):
        for path in sorted(HERE.glob(pattern)):
            parts += [path.name, path.read_bytes()]
    return hash_of(*parts)

def arm_hash(arm: Arm, base: str) -> str:
    """Of everything that an arm's runs depend on, except the seed."""
    parts = [base, EVALUATION, *arm.stages]
    if arm.share:
        parts += [arm.share, code_hash(MAKER.read_text(encoding="utf-8"))]
    if arm.change or arm.fork:
        # All forks' code, because they call each other.
        parts.append((arm.change or arm.fork).__name__)
        for code in FORK_CODE:
            parts.append(code_hash(inspect.getsource(code)))
    return hash_of(*parts)

def present_runs(lines: list[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> the line of its run with the present code and data."""
    base, runs = base_hash(), {}
    for name, arm in ARMS.items():
        present = arm_hash(arm, base)
        for line in lines:
            if line["arm"] == name and line["hash"] == present:
                runs.setdefault(name, {})[line["seed"]] = line
    return runs

# ---- One run, in a process of its own --------------------------------------------------

def training_set(share: str, scratch: Path) -> Path:
    """The folder of a training set with another share of right images first, made once."""
    folder = scratch / f"data-{share}-{code_hash(MAKER.read_text(encoding='utf-8'))}"
    if not folder.exists():
        # It gets its name when it is complete, so a kill leaves no incomplete one.
        half = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(half, ignore_errors=True)
        command = [sys.executable, MAKER, "--only", "data", "--first-share", share, "--out", half]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("make_samples.py failed; see above")
        os.replace(half, folder)
    return folder

def places_of(rollouts: list) -> dict[str, float]:
    """Accuracy by the position of the right image, from 1, where an image is the answer."""
    found = {}
    for rollout in rollouts:
        sample = rollout.prompt.sample
        if sample.order_rule in ("index", "letter"):
            place = perl.named_positions(sample)[0] + 1
            found.setdefault(place, []).append(rollout.accuracy)
    return {str(place): round(fmean(found[place]), 5) for place in sorted(found)}

def note_places() -> None:
    """Let every evaluation add its accuracy by position to the metrics."""
    evaluate, sample_orders, answered = perl.evaluate, perl.sample_orders, []

    def noted(*args, **named):
        groups = sample_orders(*args, **named)
        answered.extend(perl.flatten(groups))
        return groups

    def with_places(*args, **named):
        answered.clear()
        metrics = evaluate(*args, **named)
        return metrics | {"places": places_of(answered)}

    perl.sample_orders, perl.evaluate = noted, with_places

# It needs a process of its own, because forks change perl.py's functions for good.
def run(name: str, seed: int, scratch: Path) -> dict:
    """Train one arm with one seed, in scratch/NAME-seedSEED -> its line of ablation.jsonl."""
    arm, out, data = ARMS[name], scratch / f"{name}-seed{seed}", []
    before = arm_hash(arm, base_hash())
    if arm.share:
        data = ["--data", str(training_set(arm.share, scratch) / "train.jsonl")]
    note_places()
    if arm.change:
        before_advantages(arm.change)
    if arm.fork:
        arm.fork()
    shutil.rmtree(out, ignore_errors=True)
    with open(f"{out}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        for flags in arm.stages:
            perl.main([*EVALUATION.split(), *flags.split(), *data, "--seed", str(seed),
                       "--out", str(out)])
    if arm_hash(arm, base_hash()) != before:
        raise RuntimeError("code or data changed during the run")
    for checkpoint in out.glob("stage*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"arm": name, "seed": seed, "hash": before, "flags": arm.stages, **read_run(out)}

def read_run(out: Path) -> dict:
    """A run's results: its curve of evaluations [step, accuracy, worst, bias], accuracy by
    position at the end, share of groups trained on, seconds of sampling and updates."""
    curve, places, kept, drawn, seconds, before = [], {}, 0, 0, 0.0, 0
    for path in sorted(out.glob("stage[12]/metrics.jsonl")):
        rows = perl.read_lines(path)
        for row in rows:
            # Stage 2 begins with the evaluation that stage 1 ended with.
            if "eval_accuracy" in row and (row["step"] > 0 or not curve):
                values = row["eval_accuracy"], row["eval_worst"], row["eval_bias"]
                curve.append([before + row["step"], *[round(value, 5) for value in values]])
                places = row["places"]
            if row["step"] > 0:
                kept, drawn = kept + row["kept"], drawn + row["kept"] + row["dropped"]
                seconds += row["seconds_sample"] + row["seconds_update"]
        before += rows[-1]["step"]
    return {"curve": curve, "places": places, "kept": round(kept / drawn, 4),
            "training_seconds": round(seconds, 1)}

# ---- All runs, in a pool of processes --------------------------------------------------

# Fresh processes, one for each task, so that no task sees what another did to its process.
fresh_processes = functools.partial(
    ProcessPoolExecutor, mp_context=get_context("spawn"), max_tasks_per_child=1)

def run_all(names: list[str], seeds: list[int], jobs: int, path: Path, scratch: Path) -> None:
    """Run what is missing, `jobs` at a time. Exits at the end if some failed."""
    runs, missing, failed, began = present_runs(perl.read_lines(path)), [], 0, time.time()
    scratch.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that an interrupted ablation leaves pairs to compare.
    for seed in seeds:
        for name in names:
            if seed not in runs.get(name, ()):
                missing.append((name, seed))
                # Training sets come before the pool starts: several runs need the same.
                if ARMS[name].share:
                    training_set(ARMS[name].share, scratch)
    print(f"{len(missing)} of {len(names) * len(seeds)} runs are missing", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs: each has one core
    with fresh_processes(jobs) as pool:
        waiting = {pool.submit(run, *task, scratch): task for task in missing}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                said = future.exception()
                if said:
                    failed += 1
                else:
                    perl.append_line(path, future.result())
                    said = f"worst order {future.result()['curve'][-1][WORST]:.3f}"
                name, seed = waiting[future]
                left = (time.time() - began) / done * (len(missing) - done) / 60
                print(f"[{done}/{len(missing)}] {name}, seed {seed}: {said}; about {left:.0f} "
                      "minutes left", flush=True)
        except BaseException:  # after Ctrl-C, what runs or waits must not go on
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()
            raise
    if failed:
        raise SystemExit(f"{failed} runs failed, see {scratch}; they are run again next time")

# ---- Table and picture -----------------------------------------------------------------

# 97.5 % quantiles of Student's t with 1, 2, .. degrees of freedom; beyond them, the last.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
ACCURACY, WORST, BIAS = 1, 2, 3  # columns of a curve

def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval; infinite for one value."""
    if len(values) < 2:
        return fmean(values), math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))

def shown(values: list[float], sign: str = "") -> str:
    """93.1 ± 1.2. With sign "+": +15.1 ± 3.1, in bold if the interval excludes 0."""
    if not values:
        return ""
    center, half = interval(values)
    text = f"{center:{sign}.1f}" + (f" ± {half:.1f}" if half < math.inf else "")
    return f"**{text}**" if sign and abs(center) > half else text

def at_end(lines: dict[int, dict], column: int) -> list[float]:
    """Accuracy, worst order or bias at the end of each seed's run, in percent."""
    return [100 * line["curve"][-1][column] for line in lines.values()]

def difference(runs: dict, name: str, other: str) -> list[float]:
    """An arm's worst order minus another's, for each seed that both have."""
    pairs = runs[name].keys() & runs.get(other, {}).keys()
    ours = at_end({seed: runs[name][seed] for seed in pairs}, WORST)
    theirs = at_end({seed: runs[other][seed] for seed in pairs}, WORST)
    return [a - b for a, b in zip(ours, theirs)]

def arms_at(share: str) -> tuple[str, str]:
    """The arms of PeRL and plain GRPO on the training set of a share."""
    return (f"perl-{share}", f"grpo-{share}") if f"perl-{share}" in ARMS else ("perl", "grpo")

def arm_row(runs: dict, name: str) -> list:
    """A row of the table: means over an arm's seeds, and differences from the main arms."""
    lines, row = list(runs[name].values()), [ARMS[name].title, len(runs[name])]
    for column in (ACCURACY, WORST, BIAS):
        row.append(shown(at_end(runs[name], column)))
    for other in arms_at(ARMS[name].share)[::-1]:
        row.append(shown(difference(runs, name, other), "+") if name != other else "")
    places = []
    for place in lines[0]["places"]:
        places.append(f"{100 * fmean(line['places'][place] for line in lines):.0f}")
    kept = fmean(line["kept"] for line in lines)
    seconds = fmean(line["training_seconds"] for line in lines)
    return row + [" / ".join(places), f"{kept:.0%}", f"{seconds:.0f}"]

def summary(lines: list[dict]) -> str:
    """What the runs of the present code and data say, in Markdown."""
    runs = present_runs(lines)
    n_runs = sum(map(len, runs.values()))
    text = f"{n_runs} runs; {len(lines) - n_runs} lines of other code or data are left out"
    if not runs:
        return text
    # Every run begins with the same evaluation, that of the start model.
    first, *_ = next(iter(runs.values())).values()
    start = [f"{100 * value:.1f}" for value in first["curve"][0][1:]]
    rows = [["arm", "seeds", "accuracy", "worst order", "bias", "worst order minus GRPO's",
             "minus PeRL's", "by position", "groups trained on", "training, s"],
            ["start model", "", *start, "", "", "", "", ""]]
    for name in runs:
        rows.append(arm_row(runs, name))
    return (f"{text}. Means over seeds with 95 % t-intervals, in percent. Differences are "
            "paired by seed, on the same training set, and bold if their interval (not "
            f"corrected for the number of arms) excludes 0.\n\n{table(rows)}")

COLORS = {"PeRL": "#1a66c9", "GRPO": "#d1610a"}

def draw_line(axes, title: str, x: list[float], columns: list) -> None:
    """Means over seeds, a column for each x, in their 95 % band; named at the end."""
    means, halves = torch.tensor([interval(values) for values in columns]).T
    halves = halves.nan_to_num(posinf=0.0)  # one seed has no band
    axes.fill_between(x, means - halves, means + halves, color=COLORS[title], alpha=0.22)
    axes.plot(x, means, color=COLORS[title], linewidth=2.4, marker="o", markersize=4)
    axes.annotate(f"{title} {means[-1]:.0f} %", (x[-1], means[-1]), xytext=(8, 0), va="center",
                  textcoords="offset points", color=COLORS[title], weight="bold")

def draw(runs: dict, path: Path) -> None:
    """Left: worst order over steps. Right: at the end, by skew of the training set."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.6), sharey=True,
                                            layout="constrained")
    for k, title in enumerate(COLORS):
        curves = []
        for line in runs[arms_at("0.95")[k]].values():
            steps, _, worst, _ = zip(*line["curve"])
            curves.append([100 * value for value in worst])
            left.plot(steps, curves[-1], color=COLORS[title], alpha=0.25, linewidth=0.8)
        draw_line(left, title, steps, list(zip(*curves)))
        ends = {}
        for share, percent in SHARES.items():
            if arms_at(share)[k] in runs:
                ends[percent] = at_end(runs[arms_at(share)[k]], WORST)
        draw_line(right, title, list(ends), list(ends.values()))
    for axes in (left, right):
        axes.axhline(curves[0][0], color="gray", linestyle="--")
        axes.grid(axis="y", alpha=0.3)
    left.set(ylim=(0, 100), xlabel="training step (dashed: the start model)",
             ylabel="right in every order, %", title="During training")
    right.set(xlabel="training questions with the right image first, % (29: balanced)",
              title="At the end, by skew of the training set")
    right.set_xticks(list(SHARES.values()), ["29", "50", "80", "95", "100"])
    figure.suptitle("Held-out questions answered right in every order of their images",
                    weight="bold")
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})

# ---- Cost of a training step, with and without sharing ---------------------------------

QWEN_7B = transformers.Qwen2_5_VLConfig(
    text_config=dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                     num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    vision_config=dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584))

def full_rollouts(cfg, shape: list[int], vision, text_id: int, image_id: int) -> list:
    """Rollouts of full length. shape: images, tokens of each, other tokens of the prompt."""
    n_images, tokens, text_tokens = shape
    side = max(k for k in range(1, math.isqrt(tokens) + 1) if tokens % k == 0)
    grid = torch.tensor([[1, 2 * side, 2 * tokens // side]])  # patches, nearest to a square
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    pixels = torch.randn(4 * tokens, width)
    pictures = [perl.Picture(pixels, grid, tokens) for _ in range(n_images)]
    ids = ([text_id] + [image_id] * tokens) * n_images + [text_id] * (text_tokens - n_images)
    rollouts = []
    for _ in range(cfg.n_permutations + 1):
        prompt = perl.Prompt(None, ids, pictures)
        for k in range(cfg.rollouts_per_order):
            response = [text_id] * cfg.max_new_tokens
            rollouts.append(perl.Rollout(prompt, (), "", response, "", truncated=True,
                                         advantage=(-1.0) ** k))
    return rollouts

def count_flops(config, cfg, shape: list[int]) -> tuple[dict, dict]:
    """FLOPs of a step by part, and the least possible: each image and prompt once, and only
    pairs of tokens that see each other."""
    with torch.device("meta"):  # shapes without numbers
        model = perl.FAMILY_MODEL.from_config(config)
    layers = model.model.language_model.layers
    rollouts = full_rollouts(cfg, shape, config.vision_config, 0, 1)
    prompt, P, B = rollouts[0].prompt, cfg.n_permutations + 1, len(rollouts)
    L, T = len(prompt.ids), cfg.max_new_tokens
    token = 2 * sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    pair = 4 * config.text_config.hidden_size * len(layers)  # a token that sees another
    head = 2 * model.lm_head.weight.numel()                  # the logits of a token

    # The vision tower is counted by torch, the language model by arithmetic.
    pixels = prompt.pictures[0].pixels.to("meta")
    places = torch.empty(len(pixels), 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = model.model.visual(pixels, prompt.pictures[0].grid, position_ids=places)
        forward = float(shape[0] * counter.get_total_flops())
        features.pooler_output.sum().backward()
        both = float(shape[0] * counter.get_total_flops())
    batches, vision = perl.micro_batches(rollouts, cfg), B * (forward + both)
    if cfg.share:
        # Once in each call of generate, and in each micro-batch of the loss.
        fit = min(4 * cfg.max_tokens_per_micro_batch // L, cfg.rollout_batch * P // B)
        vision = math.ceil(P / max(fit, 1)) * forward + len(batches) * both

    # Shared: each prompt once, its last token in the first step. Plain: once per rollout.
    reads, seen, steps = (P, L - 1, T) if cfg.share else (B, L, T - 1)
    prefill = float(reads * (token * seen + pair * seen ** 2))
    decode = B * (steps * (token + pair * (seen + (steps + 1) / 2)) + T * head)
    loss = 0.0
    for batch in batches:
        rows = perl.pack(batch, cfg)
        longest = max(map(perl.row_length, rows))
        pairs = len(rows) * longest ** 2
        if len(batch) > len(rows):
            # Packed: a prompt sees itself, a response the prompt and itself.
            pairs = len(rows) * L ** 2 + len(batch) * T * (L + T)
        # Backward takes twice the forward pass; the logits are also made a second time.
        loss += 3 * (len(rows) * longest * token + pairs * pair)
        loss += 4 * len(batch) * T * head
    prompts = P * (token * L + pair * L * (L + 1) / 2)
    responses = B * T * (token + pair * (L + (T + 1) / 2) + head)
    return ({"vision": vision, "prefill": prefill, "decode": decode, "loss": loss},
            {"vision": forward + both, "prefill": prompts, "decode": responses,
             "loss": 3 * (prompts + responses)})

def time_step(cfg, shape: list[int]) -> dict[str, float]:
    """Seconds of sampling and update, and this process's peak memory in MB."""
    transformers.logging.disable_progress_bar()
    accelerator, processor = Accelerator(), perl.load_processor(cfg.model, cfg)
    perl.fit_machine(cfg, accelerator.device)
    # Without end tokens, responses have full length.
    processor.banned_ids += processor.eos_ids
    model = perl.load_model(cfg.model, cfg, accelerator.device)
    text_id, n = processor.tokenizer("a").input_ids[0], cfg.rollouts_per_order
    rollouts = full_rollouts(cfg, shape, model.config.vision_config, text_id, processor.image_id)
    optimizer, began = perl.SplitAdamW(model, cfg, accelerator), time.time()
    prompts = [rollout.prompt for rollout in rollouts[::n]]
    responses = perl.flatten(perl.generate(model, processor, prompts, n, cfg))
    sampled = time.time()
    for rollout, ids in zip(rollouts, responses):
        rollout.ids = ids
    perl.update(model, None, optimizer, processor, [rollouts], cfg=cfg)
    updated, peak = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    return {"sample": sampled - began, "update": updated - sampled, "peak_mb": peak}

def cost(shape: list[int], perl_flags: list[str]) -> None:
    """Print FLOPs at the model's size (tiny: the 7B's), and seconds and memory here."""
    defaults = ("--max-new-tokens 256 --max-tokens-per-micro-batch 16384 --updates-per-step 1 "
                "--beta 0 --no-gradient-checkpointing --optimizer-device host")
    cfg = perl.parse_config([*defaults.split(), *perl_flags])
    if min(shape) < 1 or shape[2] <= shape[0] or cfg.max_new_tokens < 3:
        raise SystemExit("--cost: images and tokens from 1, more text tokens than images, "
                         "--max-new-tokens from 3")
    config = QWEN_7B
    if cfg.model != "tiny":
        config = perl.load_pretrained(transformers.AutoConfig, cfg.model)
    parts, row = {}, {}  # parts: {"flops_shared": {"vision": .., ..}, ..}
    for way in ("shared", "plain"):
        its_cfg = dataclasses.replace(cfg, share=way == "shared")
        print(f"timing a step, {way}", file=sys.stderr, flush=True)
        # In a fresh process, nothing else has raised the peak memory.
        with fresh_processes(1) as pool:
            parts[f"seconds_{way}"] = pool.submit(time_step, its_cfg, shape).result()
        row[f"peak_mb_{way}"] = parts[f"seconds_{way}"].pop("peak_mb")
        parts[f"flops_{way}"], parts["flops_minimum"] = count_flops(config, its_cfg, shape)
    for name, values in parts.items():
        row[name] = sum(values.values())
        for part, value in values.items():
            row[f"{name}_{part}"] = value
    print(json.dumps(row))

# ---- Main ------------------------------------------------------------------------------

def seeds_of(text: str) -> list[int]:
    """"0-7" or "3" -> seeds."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--jobs", type=int, default=2, help="runs at a time, one core each [2]")
    add("--short", action="store_true", help="PeRL and plain GRPO, 3 seeds")
    add("--arms", default=",".join(ARMS), help="some of %(default)s")
    add("--seeds", type=seeds_of, default=seeds_of("0-7"), help="A-B [0-7]")
    add("--tables", action="store_true", help="run nothing, show what is there")
    add("--lines", type=Path, default=HERE / "ablation.jsonl", help="file of finished runs")
    add("--scratch", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    add("--cost", action="store_true", help="cost of a step; takes perl.py's flags too")
    add("--images", type=int, default=4, help="--cost: images of the question")
    add("--image-tokens", type=int, default=256, help="--cost: tokens of each image")
    add("--text-tokens", type=int, default=64, help="--cost: other tokens of the prompt")
    args, perl_flags = parser.parse_known_args(argv)
    scratch, names = args.scratch.resolve(), args.arms.split(",")
    if not set(names) <= set(ARMS):
        parser.error(f"--arms: some of {', '.join(ARMS)}")
    if args.cost:
        return cost([args.images, args.image_tokens, args.text_tokens], perl_flags)
    if perl_flags:
        parser.error(f"unknown: {' '.join(perl_flags)}")
    if args.short:
        names, args.seeds = ["perl", "grpo"], [0, 1, 2]
    if not args.tables:
        run_all(names, args.seeds, args.jobs, args.lines, scratch)
    lines = perl.read_lines(args.lines)
    print(summary(lines))
    runs = present_runs(lines)
    if "perl" in runs and "grpo" in runs:
        draw(runs, args.lines.with_suffix(".png"))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues") from None
