#!/usr/bin/env python3
r"""Which part of the method does what: every arm trains the tiny model on the same seeds.

    python data_samples/ablate.py --short     # PeRL and plain GRPO, 3 seeds
    python data_samples/ablate.py --jobs 4    # all arms, 8 seeds: four runs at a time
    python data_samples/ablate.py --arms perl,clean --seeds 0-3
    python data_samples/ablate.py --tables    # tables and picture of what is there

A finished run is a line of ablation.jsonl, with the hash of all that it came from: the syntax tree
of perl.py (without docstrings; comments are not in it), the samples, the start checkpoint, and the
arm's own flags and code. A run that is there is not run again, so the file can be committed and
gone on with elsewhere. Lines of another hash are counted, left out of the tables, and run again.

An arm is a few flags of perl.py; or a fork, which replaces functions of perl.py as the README
shows; or another training set. It is run by `--run ARM --seed S`, in a process of its own.
"""
import argparse
import ast
import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import perl  # noqa: E402  (found through the line above)

SEEDS = range(8)
RUN_LIMIT = 1800  # seconds, after which a run counts as failed

# ---- Forks: ideas of later papers, each in place of functions of perl.py ---------------

def orders_of(group: list) -> list[list]:
    """The rollouts of a group, order by order."""
    by_order = {}
    for rollout in group:
        by_order.setdefault(rollout.order, []).append(rollout)
    return list(by_order.values())

def columns(groups: list) -> list[list]:
    """The t-th rollouts of all orders, for each t; none of a question in one order only."""
    found = []
    for group in groups:
        by_order = orders_of(group)
        if len(by_order) > 1:
            found += map(list, zip(*by_order))
    return found

def baseline_per_order() -> None:
    """The mean and the deviation of each order's own rollouts, in place of the pooled ones."""
    pooled = perl.set_advantages
    perl.set_advantages = lambda groups: pooled(sum(map(orders_of, groups), []))

def loss_on_clean_order() -> None:
    """As NoisyRollout: answered in any order, learned in the one given, a group's first."""
    set_advantages = perl.set_advantages

    def condition(groups):
        set_advantages(groups)
        for group in groups:
            for rollout in group:
                rollout.prompt = group[0].prompt

    perl.set_advantages = condition

def answer_as_given(rollout) -> str | None:
    """What a rollout answers, moved back to the order given: "1" for the image that stood third
    there. None if there is no answer, or none that names an image."""
    answer = perl.extract_answer(rollout.text)
    if answer is None:
        return None
    asked = dataclasses.replace(rollout.prompt.sample, answer=answer)
    back = tuple(rollout.order.index(place) for place in range(len(rollout.order)))
    try:
        return perl.permute(asked, back).answer
    except KeyError:  # it names an image that is not there
        return None

def reward_agreement() -> None:
    """PA-GRPO (arXiv 2603.21016): who answers as most of a column do, right or wrong, earns as
    much again as for a right answer (the paper's lambda = 1, which likewise weighs both alike)."""
    set_advantages = perl.set_advantages

    def with_agreement(groups):
        for column in columns(groups):
            answers = [answer_as_given(rollout) for rollout in column]
            favourite, votes = Counter(answers).most_common(1)[0]
            for rollout, answer in zip(column, answers):
                if answer is not None and answer == favourite and votes > len(column) / 2:
                    rollout.reward += perl.Config.accuracy_weight
        set_advantages(groups)

    perl.set_advantages = with_agreement

def reward_agree_and_right() -> None:
    """ConsistRoll (arXiv 2606.29812), after its abstract: a joint reward for a column of rollouts
    that are all right, and so agree. Its weight here is that of a right answer."""
    set_advantages = perl.set_advantages

    def with_joint_reward(groups):
        for column in columns(groups):
            if all(rollout.accuracy for rollout in column):
                for rollout in column:
                    rollout.reward += perl.Config.accuracy_weight
        set_advantages(groups)

    perl.set_advantages = with_joint_reward

def permute_by_gap() -> None:
    """Adaptive permutation: a question is permuted with the probability of its own gap between
    two orders. Stage 0 measures it, half of its answers in each: training sees few questions
    twice. For one process: `gaps` are those of its own questions."""
    sample_orders, draw_orders, gaps = perl.sample_orders, perl.draw_orders, {}

    def in_two_orders(model, processor, samples, n_orders, n, cfg, *more, **named):
        if cfg.stage > 0:
            return sample_orders(model, processor, samples, n_orders, n, cfg, *more, **named)
        groups = sample_orders(model, processor, samples, 2, n // 2, cfg, *more, **named)
        for group in groups:
            row = [rollout.accuracy for rollout in group]
            given, permuted = row[:n // 2], row[n // 2:]
            gap = abs(fmean(given) - fmean(permuted)) if permuted else 0.0
            gaps[group[0].prompt.sample.id] = gap
        return groups

    def by_gap(sample, n_permutations, alpha, rng):
        return draw_orders(sample, n_permutations, gaps.get(sample.id, alpha), rng)

    perl.sample_orders, perl.draw_orders = in_two_orders, by_gap

FORK_CODE = (orders_of, columns, baseline_per_order, loss_on_clean_order, answer_as_given,
             reward_agreement, reward_agree_and_right, permute_by_gap)

# ---- Arms ------------------------------------------------------------------------------

class Arm(NamedTuple):
    """One setting, run once a seed. `stages`: the flags of each run of perl.py, in turn."""
    title: str
    stages: tuple[str, ...] = ("",)
    share: str | None = None        # of right images in front, if another training set is made
    scored: bool = False            # it starts from the seed's stage 0
    fork: Callable | None = None

# Start, half and end; a fourth order of a question more or less changes little.
EVALUATION = "--eval-orders 6 --eval-every 20"
OFTEN = "--eval-every 5"  # for the curves of the picture
GRPO = "--n-permutations 0"
SHARES = {"balanced": 0.286, "0.5": 0.5, "0.8": 0.8, "0.95": 0.95, "1": 1.0}
MADE_SHARES = ("balanced", "0.5", "0.8", "1")  # 0.95 is the committed training set

ARMS = {
    "perl": Arm("PeRL (n_s = 1)", (OFTEN,)),
    "grpo": Arm("plain GRPO (n_s = 0)", (f"{GRPO} {OFTEN}",)),
} | {
    f"{method}-{share}": Arm(f"{title}, right image first: {share}", (flags,), share=share)
    for share in MADE_SHARES for method, title, flags in (("perl", "PeRL", ""),
                                                          ("grpo", "plain GRPO", GRPO))
} | {
    "orders-3": Arm("n_s = 2", ("--n-permutations 2",)),
    "orders-4": Arm("n_s = 3", ("--n-permutations 3",)),
    "alpha-1": Arm("alpha stays 1", ("--alpha-end 1",)),
    "per-order": Arm("a baseline for each order", fork=baseline_per_order),
    "clean": Arm("loss on the clean order", fork=loss_on_clean_order),
    "offline": Arm("filter: offline (stage 0 first)", ("--filter offline",), scored=True),
    "online": Arm("filter: online", ("--filter online",)),
    "agree": Arm("reward: agreement (PA-GRPO)", fork=reward_agreement),
    "agree-right": Arm("reward: agree and right (ConsistRoll)", fork=reward_agree_and_right),
    "adaptive": Arm("permuting by a question's gap", ("--stage 0", "--filter none"),
                    fork=permute_by_gap),
    "stages-1-2": Arm("stage 1, then 2: 20 steps each", ("--steps 20", "--stage 2 --steps 20")),
    "stages-0-1-2": Arm("stages 0, 1, 2: 20 steps each",
                        ("--steps 20", "--stage 2 --steps 20"), scored=True),
}

def flags_of(arm: Arm) -> list[str]:
    """The command lines of an arm's runs, without seed, folder and data."""
    return [f"{EVALUATION} {flags}".strip() for flags in arm.stages]

def queue_of(names: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Runs in the order of their worth: the two main arms, the training sets, the rest."""
    def worth(name: str) -> int:
        return 0 if name in ("perl", "grpo") else 1 if ARMS[name].share else 2

    runs = [(name, seed) for seed in seeds for name in ARMS if name in names]
    return sorted(runs, key=lambda run: worth(run[0]))

# ---- What a run came from --------------------------------------------------------------

def syntax(node) -> str:
    """A syntax tree as text, without docstrings and places, the same for all versions of Python
    (which add empty fields)."""
    if isinstance(node, list):
        return "[" + " ".join(map(syntax, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    text = type(node).__name__
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                value = value[1:]
        if value is not None and value != []:
            text += f" {name}={syntax(value)}"
    return f"({text})"

def code_hash(source: str) -> str:
    """Of Python source; comments, blank lines and docstrings do not count."""
    return hash_of(syntax(ast.parse(source)).encode())

def hash_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]

def base_hash() -> str:
    """Of what all arms share: perl.py, the samples, the start checkpoint."""
    parts = [code_hash(Path(perl.__file__).read_text(encoding="utf-8")).encode()]
    for path in [HERE / "train.jsonl", HERE / "test.jsonl",
                 *sorted(HERE.glob("images/*")), *sorted(HERE.glob("tiny/*"))]:
        parts += [path.name.encode(), path.read_bytes()]
    return hash_of(*parts)

def arm_hash(arm: Arm, base: str) -> str:
    """Of all that an arm's runs come from; the seed is beside it."""
    parts = [base, *flags_of(arm), str(arm.scored)]
    if arm.share:
        parts += [arm.share, code_hash((HERE / "make_samples.py").read_text(encoding="utf-8"))]
    if arm.fork:
        parts += [arm.fork.__name__, *[code_hash(inspect.getsource(code)) for code in FORK_CODE]]
    return hash_of(*[part.encode() for part in parts])

def present_hashes() -> dict[str, str]:
    base = base_hash()
    return {name: arm_hash(arm, base) for name, arm in ARMS.items()}

# ---- One run, in a process of its own --------------------------------------------------

@contextlib.contextmanager
def made_once(folder: Path):
    """Yields a folder to fill, which becomes `folder` then; None if it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            yield None
            return
        filling = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(filling, ignore_errors=True)
        yield filling
        os.replace(filling, folder)

def training_set(share: str, scratch: Path) -> Path:
    """The folder of a training set with another share of right images in front."""
    code = code_hash((HERE / "make_samples.py").read_text(encoding="utf-8"))
    folder = scratch / f"data-{share}-{code}"
    with made_once(folder) as filling:
        if filling:
            subprocess.run([sys.executable, HERE / "make_samples.py", "--only", "data",
                            "--first-share", share, "--out", filling], check=True)
    return folder

def stage_0(seed: int, scratch: Path) -> Path:
    """The folder of the seed's stage 0, which several arms start from."""
    folder = scratch / f"stage0-seed{seed}-{base_hash()}"
    with made_once(folder) as filling:
        if filling:
            perl.main(["--stage", "0", "--seed", str(seed), "--out", str(filling)])
    return folder

def places_of(rollouts: list) -> dict[str, float]:
    """Accuracy by the position of the right image, from 1, where an image is the answer."""
    found = {}
    for rollout in rollouts:
        sample = rollout.prompt.sample
        if sample.order_rule in ("index", "letter"):
            position = perl.ORDER_RULES[sample.order_rule].position_of(rollout.gold, sample)
            found.setdefault(position + 1, []).append(rollout.accuracy)
    return {str(place): fmean(found[place]) for place in sorted(found)}

def note_places() -> None:
    """Let every evaluation add its accuracy by position to the line of metrics."""
    evaluate, sample_groups = perl.evaluate, perl.sample_groups

    def with_places(*args, **named):
        answered = []

        def noted(*args, **named):
            groups = sample_groups(*args, **named)
            answered.extend(sum(groups, []))
            return groups

        perl.sample_groups = noted
        metrics = evaluate(*args, **named)
        perl.sample_groups = sample_groups
        return metrics | {"places": places_of(answered)}

    perl.evaluate = with_places

def run(name: str, seed: int, scratch: Path) -> None:
    """Train one arm with one seed, in scratch/NAME-seedSEED."""
    arm, out = ARMS[name], run_folder(name, seed, scratch)
    data = ["--data", str(training_set(arm.share, scratch) / "train.jsonl")] if arm.share else []
    if arm.scored:
        shutil.copytree(stage_0(seed, scratch), out)
    note_places()
    if arm.fork:
        arm.fork()
    for flags in flags_of(arm):
        perl.main([*flags.split(), *data, "--seed", str(seed), "--out", str(out)])

def run_folder(name: str, seed: int, scratch: Path) -> Path:
    return scratch / f"{name}-seed{seed}"

def read_run(out: Path) -> dict:
    """What a run's metrics say: the curve of evaluations [step, accuracy, worst, bias], accuracy
    by position at the end, share of groups trained on, seconds of sampling and updates."""
    curve, places, kept, drawn, seconds, before = [], {}, 0, 0, 0.0, 0
    for path in [*sorted(out.glob("stage?-*/metrics.jsonl")), out / "metrics.jsonl"]:
        rows = perl.read_lines(path)
        for row in rows:
            if "eval_accuracy" in row and (row["step"] > 0 or not curve):
                values = [row["eval_accuracy"], row["eval_worst"], row["eval_bias"]]
                curve.append([before + row["step"], *[round(value, 5) for value in values]])
                places = {place: round(value, 5) for place, value in row["places"].items()}
            if row["step"] > 0:
                kept, drawn = kept + row["kept"], drawn + row["kept"] + row["dropped"]
                seconds += row["seconds_sample"] + row["seconds_update"]
        before += rows[-1]["step"]
    return {"curve": curve, "places": places, "kept": round(kept / drawn, 4),
            "training_seconds": round(seconds, 1)}

# ---- All runs: a queue, so many at a time ----------------------------------------------

def finished(lines: list[dict], hashes: dict[str, str]) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> its last line of the present code and data; failed ones are among them."""
    return {(line["arm"], line["seed"]): line for line in lines
            if hashes.get(line["arm"]) == line["hash"]}

def start(name: str, seed: int, scratch: Path) -> subprocess.Popen:
    out = run_folder(name, seed, scratch)
    shutil.rmtree(out, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--run", name, "--seed", str(seed),
               "--scratch", str(scratch)]
    with open(f"{out}.log", "w") as log:  # a session of its own: Ctrl-C is for this process
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)

def result_of(name: str, seed: int, scratch: Path, status: int | None, before: str) -> dict:
    """The line of a run that ended with `status` (None: it took too long); `before`: the hash
    when it began."""
    out, line = run_folder(name, seed, scratch), {"arm": name, "seed": seed, "hash": before}
    line["flags"] = flags_of(ARMS[name])
    try:
        if status is None:
            raise RuntimeError(f"it ran longer than {RUN_LIMIT} s")
        if status != 0:
            said = Path(f"{out}.log").read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"status {status}: {said[-1] if said else 'it said nothing'}")
        if arm_hash(ARMS[name], base_hash()) != before:
            raise RuntimeError("code or data changed during the run")
        line |= read_run(out)
    except (RuntimeError, OSError, LookupError, ValueError) as error:
        line["error"] = f"{error}".replace(str(HERE.parent), ".")[-300:]
        return line
    for checkpoint in out.glob("**/checkpoint-*"):
        shutil.rmtree(checkpoint)
    return line

def run_all(queue: list[tuple[str, int]], jobs: int, path: Path, scratch: Path) -> int:
    """Run what is missing, `jobs` at a time, a line each as it ends. Returns how many failed."""
    there = finished(perl.read_lines(path), present_hashes())
    waiting = [run for run in queue if "error" in there.get(run, {"error": "not run yet"})]
    print(f"{len(queue)} runs, {len(queue) - len(waiting)} of them there; {jobs} at a time",
          flush=True)
    running, failed, total, began = {}, 0, len(waiting), time.time()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, seed = waiting.pop(0)
                before = arm_hash(ARMS[name], base_hash())
                running[start(name, seed, scratch)] = name, seed, before, time.time()
            time.sleep(0.5)
            for process, (name, seed, before, since) in list(running.items()):
                seconds = time.time() - since
                if process.poll() is None and seconds < RUN_LIMIT:
                    continue
                status = process.poll()
                process.kill()  # it may have taken too long
                del running[process]
                line = result_of(name, seed, scratch, status, before)
                line["seconds"] = round(seconds, 1)
                perl.append_line(path, line)
                failed += "error" in line
                done = total - len(waiting) - len(running)
                left = (time.time() - began) / done * (total - done) / 60
                said = line.get("error") or f"worst order {line['curve'][-1][2]:.3f}"
                print(f"[{done}/{total}] {name}, seed {seed}: {said}; {seconds:.0f} s; "
                      f"about {left:.0f} minutes left", flush=True)
    finally:  # Ctrl-C: what has not finished is run again next time
        for process in running:
            process.kill()
    return failed

# ---- Tables ----------------------------------------------------------------------------

# 97.5 % quantiles of Student's t with 1, 2, .. degrees of freedom; beyond them, the last.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
               2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
               2.060, 2.056, 2.052, 2.048, 2.045, 2.042)

def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval; of one value, infinite."""
    if len(values) < 2:
        return fmean(values), math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))

ACCURACY, WORST, BIAS = 1, 2, 3  # columns of a curve
Runs = dict[str, dict[int, dict]]  # arm -> seed -> the line of its run

def by_arm(present: dict[tuple[str, int], dict]) -> Runs:
    """The runs that did not fail, arms in their order."""
    runs = {}
    for name, seed in sorted(present, key=lambda run: (list(ARMS).index(run[0]), run[1])):
        if "error" not in present[name, seed]:
            runs.setdefault(name, {})[seed] = present[name, seed]
    return runs

def at_end(runs: Runs, name: str, column: int) -> dict[int, float]:
    """Seed -> accuracy, worst order or bias at the end of an arm's runs, in percent."""
    return {seed: 100 * line["curve"][-1][column] for seed, line in runs.get(name, {}).items()}

def difference(runs: Runs, name: str, other: str) -> list[float]:
    """An arm's worst order less another's, of each seed that both have."""
    ours, theirs = at_end(runs, name, WORST), at_end(runs, other, WORST)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

def average(runs: Runs, name: str, key: str) -> float:
    return fmean(line[key] for line in runs[name].values())

def start_model(runs: Runs) -> list[float]:
    """Accuracy, worst order and bias of the start model in percent: every run begins with them."""
    first = next(iter(runs.values()))
    return [100 * value for value in next(iter(first.values()))["curve"][0][1:]]

def shown(values: list[float]) -> str:
    """93.1 ± 1.2"""
    if not values:
        return ""
    center, half = interval(values)
    return f"{center:.1f}" if half == math.inf else f"{center:.1f} ± {half:.1f}"

def shown_difference(values: list[float]) -> str:
    """+15.1 (+12.0 to +18.2)"""
    if not values:
        return ""
    center, half = interval(values)
    if half == math.inf:
        return f"{center:+.1f}"
    return f"{center:+.1f} ({center - half:+.1f} to {center + half:+.1f})"

def markdown(rows: list[list]) -> str:
    """Rows, the first one the head -> a table."""
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)

def main_table(runs: Runs, names: list[str]) -> str:
    rows = [["arm", "seeds", "accuracy", "worst order", "bias", "worst order less plain GRPO's",
             "less PeRL's", "groups trained on", "training, s"],
            ["start model", "", *map("{:.1f}".format, start_model(runs)), "", "", "", ""]]
    for name in names:
        row = [ARMS[name].title, len(runs[name])]
        for column in (ACCURACY, WORST, BIAS):
            row.append(shown(list(at_end(runs, name, column).values())))
        for other in ("grpo", "perl"):
            itself = name == other
            row.append("" if itself else shown_difference(difference(runs, name, other)))
        row.append(f"{average(runs, name, 'kept'):.0%}")
        row.append(f"{average(runs, name, 'training_seconds'):.0f}")
        rows.append(row)
    return markdown(rows)

def places_table(runs: Runs, names: list[str]) -> str:
    """Accuracy by the position of the right image, the mean over seeds."""
    some = next(iter(runs[names[0]].values()))
    rows = [["arm", *some["places"]]]
    for name in names:
        row = [ARMS[name].title]
        for place in some["places"]:
            accuracy = fmean(line["places"][place] for line in runs[name].values())
            row.append(f"{100 * accuracy:.1f}")
        rows.append(row)
    return markdown(rows)

def dose_arms(share: str) -> tuple[str, str]:
    """The arms of PeRL and plain GRPO on the training set of a share."""
    return (f"perl-{share}", f"grpo-{share}") if share in MADE_SHARES else ("perl", "grpo")

def dose_table(runs: Runs) -> str:
    rows = [["right image first", "seeds", "PeRL", "plain GRPO", "PeRL less plain GRPO"]]
    for share in SHARES:
        ours, theirs = dose_arms(share)
        if ours in runs and theirs in runs:
            rows.append([share, len(difference(runs, ours, theirs)),
                         shown(list(at_end(runs, ours, WORST).values())),
                         shown(list(at_end(runs, theirs, WORST).values())),
                         shown_difference(difference(runs, ours, theirs))])
    return markdown(rows)

def findings(runs: Runs, names: list[str]) -> str:
    """Which arms differ from PeRL in the worst order, by the interval of the difference."""
    above, below, neither = [], [], []
    for name in names:
        gains = difference(runs, name, "perl")
        if name != "perl" and len(gains) > 1:
            center, half = interval(gains)
            verdict = above if center > half else below if center < -half else neither
            verdict.append(ARMS[name].title)
    return ("In the worst order, against PeRL (95 % intervals, not corrected for their number):\n"
            f"- better: {'; '.join(above) or 'none'}\n- worse: {'; '.join(below) or 'none'}\n"
            f"- no difference shown: {'; '.join(neither) or 'none'}")

def tables(lines: list[dict], hashes: dict[str, str]) -> str:
    """Everything that the lines of the present code and data say, in Markdown."""
    present = finished(lines, hashes)
    runs, n_lines = by_arm(present), sum(hashes.get(line["arm"]) == line["hash"] for line in lines)
    failures = [line for line in present.values() if "error" in line]
    text = (f"{len(present) - len(failures)} runs; {len(failures)} failed; "
            f"{len(lines) - n_lines} lines of other code or data are left out.")
    for line in failures:
        text += f"\n- {line['arm']}, seed {line['seed']} failed: {line['error']}"
    names = [name for name in runs if not ARMS[name].share]
    if not names:
        return text
    return "\n".join([
        text, "\nMeans over seeds with 95 % t-intervals, in percent; differences are paired by "
        "seed.\n", main_table(runs, names), "", findings(runs, names),
        "\nAccuracy by the position of the right image:\n", places_table(runs, names),
        "\nWorst order by how often the right image stands first in the training set:\n",
        dose_table(runs)])

# ---- Picture ---------------------------------------------------------------------------

COLORS = {"perl": "#1a66c9", "grpo": "#d1610a"}
INK, FAINT = "#24292f", "#8a9199"

def band(columns) -> tuple[list[float], list[float], list[float]]:
    """Values over seeds, a list for each place on the axis -> means, lower and upper bounds."""
    means, lower, upper = [], [], []
    for values in columns:
        center, half = interval(values)
        half = 0.0 if half == math.inf else half  # one seed has no band
        means.append(center)
        lower.append(center - half)
        upper.append(center + half)
    return means, lower, upper

def label_end(axes, name: str, x: float, y: float) -> None:
    """Write the arm's name and value beside the last point of its line."""
    title = "PeRL" if name == "perl" else "GRPO"
    axes.annotate(f"{title} {y:.0f} %", (x, y), xytext=(9, 0), textcoords="offset points",
                  color=COLORS[name], fontsize=12, fontweight="bold", va="center",
                  annotation_clip=False)

def draw_curves(axes, runs: Runs) -> None:
    """Worst order over steps: each seed, the mean and its interval, named at the line's end."""
    for name in ("grpo", "perl"):
        curves = []
        for line in runs[name].values():
            steps, _, worst, _ = zip(*line["curve"])
            curves.append([100 * value for value in worst])
            axes.plot(steps, curves[-1], color=COLORS[name], alpha=0.25, linewidth=0.8)
        means, lower, upper = band(zip(*curves))
        axes.fill_between(steps, lower, upper, color=COLORS[name], alpha=0.22, linewidth=0)
        axes.plot(steps, means, color=COLORS[name], linewidth=2.4)
        label_end(axes, name, steps[-1], means[-1])
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("training step")
    axes.set_title("During training; right image first in 95 %", loc="left")

def draw_doses(axes, runs: Runs) -> None:
    """Worst order at the end over the share of right images in front: means and intervals."""
    for k, name in ((1, "grpo"), (0, "perl")):
        x, ends = [], []
        for share in SHARES:
            if dose_arms(share)[k] in runs:
                x.append(100 * SHARES[share])
                ends.append(list(at_end(runs, dose_arms(share)[k], WORST).values()))
        means, lower, upper = band(ends)
        axes.fill_between(x, lower, upper, color=COLORS[name], alpha=0.22, linewidth=0)
        axes.plot(x, means, color=COLORS[name], linewidth=2.4, marker="o", markersize=5)
        label_end(axes, name, x[-1], means[-1])
    axes.set_xticks([100 * share for share in SHARES.values()],
                    ["29\nbalanced", "50", "80", "95\ndefault", "100"])
    *_, label_95, label_100 = axes.get_xticklabels()
    label_95.set_horizontalalignment("right")  # they would touch
    label_100.set_horizontalalignment("left")
    axes.set_xlabel("training questions whose right image stands first, %")
    axes.set_title("At the end, by skew of the training set", loc="left")

def draw(runs: Runs, path: Path) -> None:
    """Left: worst order over steps. Right: the same at the end, by skew of the training set. On a
    white panel with round corners, for light and dark pages."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    pyplot.rcParams.update({
        "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.edgecolor": FAINT, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": 12, "axes.titleweight": "bold"})
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10.4, 4.8), sharey=True, gridspec_kw={
            "left": 0.08, "right": 0.87, "bottom": 0.215, "top": 0.79, "wspace": 0.42})
    figure.patch.set_alpha(0)
    figure.add_artist(FancyBboxPatch(
        (0.012, 0.025), 0.976, 0.95, boxstyle="round,pad=0,rounding_size=0.03",
        mutation_aspect=10.4 / 4.8, facecolor="white", edgecolor="#d0d7de", zorder=-10))
    draw_curves(left, runs)
    draw_doses(right, runs)
    start = start_model(runs)[WORST - 1]
    for axes in (left, right):
        axes.set_facecolor("none")
        axes.set_ylim(0, 100)
        axes.grid(axis="y", color="#e4e8ec")
        axes.axhline(start, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(axes.get_xlim()[1], start + 2, f"start model {start:.0f} %", color="#656d76",
                  ha="right", fontsize=10)
    left.set_ylabel("right in every order, %")
    seeds = sorted({len(runs[name]) for name in runs if name.startswith(("perl", "grpo"))})
    number = " to ".join(map(str, sorted({seeds[0], seeds[-1]})))
    figure.text(0.035, 0.9, "Held-out questions answered right in every order of their images",
                fontsize=14, fontweight="bold")
    figure.text(0.97, 0.9, f"mean of {number} seeds, 95 % interval\nthin lines: single seeds",
                fontsize=10, color="#656d76", ha="right")
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
    pyplot.close(figure)
    print(f"drew {path} ({path.stat().st_size // 1000} kB)")

# ---- Main ------------------------------------------------------------------------------

def seeds_of(text: str) -> list[int]:
    """"0-7" or "3" -> seeds."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ablations of perl.py on the tiny model.")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each [2]")
    parser.add_argument("--short", action="store_true", help="PeRL and plain GRPO, 3 seeds")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=seeds_of, default=list(SEEDS), help="A-B [0-7]")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--lines", type=Path, default=HERE / "ablation.jsonl",
                        help="the file of finished runs; the picture lies beside it")
    parser.add_argument("--scratch", type=Path, default=Path("runs/ablation"),
                        help="folder of the runs [%(default)s]")
    parser.add_argument("--run", choices=ARMS, help="run one arm here, with --seed")
    parser.add_argument("--seed", type=int, default=0, help="of --run")
    args = parser.parse_args(argv)
    scratch, names = args.scratch.resolve(), args.arms.split(",")
    for name in names:
        if name not in ARMS:
            parser.error(f"--arms: {name} is none of {', '.join(ARMS)}")
    if args.run:
        return run(args.run, args.seed, scratch)
    if args.short:
        names, args.seeds = ["perl", "grpo"], [0, 1, 2]
    failed = 0
    if not args.tables:
        failed = run_all(queue_of(names, args.seeds), args.jobs, args.lines, scratch)
    hashes, lines = present_hashes(), perl.read_lines(args.lines)
    print(tables(lines, hashes))
    runs = by_arm(finished(lines, hashes))
    if "perl" in runs and "grpo" in runs:
        draw(runs, args.lines.with_suffix(".png"))
    if failed:
        raise SystemExit(f"{failed} runs failed; they are run again next time")

if __name__ == "__main__":
    main()
