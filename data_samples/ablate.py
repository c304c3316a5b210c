#!/usr/bin/env python3
"""Experiments with perl.py: which part of the method does what, and what a step costs.

    python data_samples/ablate.py --arms start,perl,grpo --seeds 0-2
    python data_samples/ablate.py --jobs 4    # all arms, 8 seeds, four runs at a time
    python data_samples/ablate.py --fork mine.py --flags="--beta 0.01" --seeds 0-4
    python data_samples/ablate.py --recheck   # after a change that must not change results
    python data_samples/ablate.py --tables    # tables of both READMEs, and the figure
    python data_samples/ablate.py --cost      # a training step with and without sharing

Every arm trains the tiny model on the same seeds. A finished run is a line of ablation.jsonl,
with a hash of the code and data that it depends on. While the hash stays the same, the run is
not repeated, so the file can be committed and continued on another machine. --recheck runs
seed 0 of every arm again: where each number is the same to the last digit, the arm's other
runs count for the present code, and `ran_on` says which code they are of. With --fork, new
lines go to SCRATCH/forks.jsonl instead.
"""
import argparse
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
MAKER, LINES = HERE / "make_samples.py", HERE / "ablation.jsonl"
sys.path.insert(0, str(HERE.parent))
from ablation.cost import cost
from ablation.figure import draw
from ablation.hashes import base_hash, code_hash, hash_of
from ablation.measure import measure, rounded
from ablation.stats import holm, interval

import perl  # found through the line above
from eval import table

# ---- Arms ------------------------------------------------------------------------------

class Arm(NamedTuple):
    """One experiment, run once per seed."""
    title: str
    stages: tuple[str, ...] = ("",)  # flags of each run of perl.py, in turn
    data: str = ""                   # flags of make_samples.py: another training set
    fork: str = ""                   # a file that replaces functions of perl.py
    rival: str = "perl"              # PeRL with the same data and budget, to compare with
    more_images: bool = False        # measure it with more images too

# Evaluations take longer than training. So the end of a run is measured once, from its
# checkpoint, and only the arms that the figure shows evaluate on the way.
EVALUATION, N_ORDERS = "--eval-every 0 --eval-orders 6", 6
GRPO, LONG = "--n-permutations 0", "--steps 120 --eval-every 20"
ONLY_IMAGES, MORE_IMAGES = "--kinds largest,smallest,match", "--more-images"
SHARES = {"balanced": 28.6, "0.5": 50, "0.8": 80, "0.95": 95, "1": 100}  # in percent
STAGES_1_2 = ("--steps 20", "--stage 2 --steps 20")
FORKS = str(HERE / "ablation")
ARMS = {
    "start": Arm("start model", (), rival="", more_images=True),
    "perl": Arm("PeRL", ("--eval-every 10",), rival="", more_images=True),
    "grpo": Arm("plain GRPO", (f"{GRPO} --eval-every 10",), more_images=True),
    "perl-120": Arm("PeRL, 120 steps", (LONG,), rival=""),
    "grpo-120": Arm("plain GRPO, 120 steps", (f"{GRPO} {LONG}",), rival="perl-120"),
    "perl-images": Arm("PeRL, only questions for an image", data=ONLY_IMAGES, rival=""),
    "grpo-images": Arm("plain GRPO, only questions for an image", (GRPO,), ONLY_IMAGES,
                       rival="perl-images")}
# They run before the others, which may never run on a small machine.
FIRST = tuple(ARMS)
# 0.95 is the share of data_samples/train.jsonl itself.
for share in ("balanced", "0.5", "0.8", "1"):
    title, data = f"right image first: {share}", f"--first-share {share}"
    ARMS[f"perl-{share}"] = Arm(f"PeRL, {title}", data=data, rival="")
    ARMS[f"grpo-{share}"] = Arm(f"plain GRPO, {title}", (GRPO,), data, rival=f"perl-{share}")
ARMS |= {
    "orders-3": Arm("n_s = 2", ("--n-permutations 2",)),
    "orders-4": Arm("n_s = 3", ("--n-permutations 3",)),
    "alpha-1": Arm("alpha stays 1", ("--alpha-end 1",)),
    "per-order": Arm("a baseline for each order", fork=f"{FORKS}/per_order.py"),
    "clean": Arm("loss on the clean order", fork=f"{FORKS}/clean.py"),
    "offline": Arm("stage 0, filter: offline", ("--stage 0", "--filter offline")),
    "online": Arm("filter: online", ("--filter online",)),
    "agree": Arm("reward: agreement (PA-GRPO)", fork=f"{FORKS}/agree.py"),
    "agree-right": Arm("reward: agree, right (ConsistRoll)", fork=f"{FORKS}/agree_right.py"),
    "adaptive": Arm("permuting by gap", ("--stage 0", "--filter none"),
                    fork=f"{FORKS}/adaptive.py"),
    "stages-1-2": Arm("stages 1, 2: 20 steps each", STAGES_1_2),
    "stages-0-1-2": Arm("stages 0, 1, 2: 20 steps each", ("--stage 0", *STAGES_1_2))}

# ---- What a run depends on -------------------------------------------------------------

def arm_hash(arm: Arm, base: str) -> str:
    """Of everything that an arm's runs depend on, except the seed. base: base_hash()."""
    parts = [base, EVALUATION, arm.stages, arm.data, arm.more_images]
    if arm.data or arm.more_images:
        parts.append(code_hash(MAKER))
    if arm.fork:
        parts.append(code_hash(arm.fork))
    return hash_of(*parts)

def heading(name: str, arm: Arm, seed: int) -> dict:
    """By what a run's line is found."""
    base = base_hash()
    return {"arm": name, "seed": seed, "hash": arm_hash(arm, base), "code": base[:8]}

# ---- One run, in a process of its own --------------------------------------------------

def made_data(flags: str, scratch: Path) -> Path:
    """The folder of what make_samples.py makes with these flags. It is made once."""
    name = re.sub("[^a-z0-9.]+", "-", flags).strip("-")
    folder = scratch / f"{name}-{code_hash(MAKER)}"
    if not folder.exists():
        # It gets its name when it is complete, so a kill leaves no incomplete one.
        half = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(half, ignore_errors=True)
        command = [sys.executable, MAKER, "--only", "data", *flags.split(), "--out", half]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("make_samples.py failed; see above")
        os.replace(half, folder)
    return folder

def start_fork(path: str, commands: list[list[str]], main: Callable) -> None:
    """What `python PATH FLAGS` does; with several commands, main() once for each. main:
    perl.main, or parse_config to read the flags only. Exits if the file sets a name that
    perl.py does not have, because nothing would use it."""
    known, called = set(vars(perl)), []

    def checked_main(own_flags=None):
        for name in sorted(vars(perl).keys() - known):
            raise SystemExit(f"{path} sets perl.{name}, which perl.py does not have"
                             f"{perl.nearest(name, known)}")
        called.append(path)
        # One command is in sys.argv, from which the fork may have taken flags of its own.
        for flags in [own_flags] if len(commands) == 1 else commands:
            main(flags)

    perl.main, sys.argv = checked_main, [path, *commands[0]]
    # As with `python PATH`, the file can import modules that lie beside it.
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
    perl.check(called, f"{path} does not call perl.main(): a fork does `import perl`, "
               "replaces functions of it, and calls perl.main()")

# What a fork may replace, but what is measured must not depend on.
MEASURING = ("grade", "distinct_orders", "all_orders", "generate", "sample_groups")

# It needs a process of its own, because forks change perl.py's functions for good.
def run(name: str, arm: Arm, seed: int, scratch: Path) -> dict:
    """Train an arm with a seed, in scratch/NAME-seedSEED -> its line of ablation.jsonl."""
    out = scratch / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-seed{seed}"
    line, checkpoint, data, commands = heading(name, arm, seed), "tiny", [], []
    if arm.data:
        data = ["--data", str(made_data(arm.data, scratch) / "train.jsonl")]
    for flags in arm.stages:
        commands.append([*EVALUATION.split(), *shlex.split(flags), *data,
                         "--seed", str(seed), "--out", str(out)])
    shutil.rmtree(out, ignore_errors=True)
    plain = {name: getattr(perl, name) for name in MEASURING}
    with open(f"{out}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if arm.fork:
                start_fork(arm.fork, commands, perl.main)
            else:
                for flags in commands:
                    perl.main(flags)
        except BaseException:
            traceback.print_exc()
            raise
        vars(perl).update(plain)
        if arm.stages:
            line |= {"flags": arm.stages} | read_run(out)
            checkpoint = str(perl.newest_checkpoint(max(out.glob("stage[12]"))))
        line |= measure(checkpoint, HERE / "test.jsonl", N_ORDERS, max_new_tokens=64)
        if arm.more_images:
            path = made_data(MORE_IMAGES, scratch) / "test.jsonl"
            for key, value in measure(checkpoint, path, 24, max_new_tokens=96).items():
                line[f"more_{key}"] = value
    if heading(name, arm, seed)["hash"] != line["hash"]:
        raise RuntimeError("code or data changed during the run")
    for weights in [*out.glob("stage*/checkpoint-*"), *out.glob("stage*/best")]:
        shutil.rmtree(weights)
    return line | {"cpu_seconds": round(time.process_time(), 1)}

def read_run(out: Path) -> dict:
    """From metrics.jsonl: evaluations [step, accuracy, worst order, bias]; shares of groups
    trained on and of groups with a gradient, and of these, what perl.py's metrics of that name
    say; seconds of sampling and updates."""
    curve, steps, total = [], 0, Counter()
    for path in sorted(out.glob("stage[12]/metrics.jsonl")):
        for row in perl.read_lines(path):
            if "eval_accuracy" in row:
                curve.append([row["step"], *rounded(
                    row["eval_accuracy"], row["eval_worst"], row["eval_bias"])])
            if row["step"] == 0:
                continue
            steps += 1
            # Steps of the online filter draw more groups than others, so they count more.
            groups = row["kept"] + row["dropped"]
            with_gradient = groups * row["with_gradient"]
            total.update(groups=groups, kept=row["kept"], with_gradient=with_gradient,
                         equal_as_given=with_gradient * row["equal_as_given"],
                         by_permutation=with_gradient * row["by_permutation"],
                         seconds=row["seconds_sample"] + row["seconds_update"])
    if not steps:
        raise RuntimeError("no step of training: the last stage must be 1 or 2")
    of_these = max(total["with_gradient"], 1)
    return {"steps": steps, "curve": curve, "kept": round(total["kept"] / total["groups"], 4),
            "with_gradient": round(total["with_gradient"] / total["groups"], 4),
            "equal_as_given": round(total["equal_as_given"] / of_these, 4),
            "by_permutation": round(total["by_permutation"] / of_these, 4),
            "training_seconds": round(total["seconds"], 1)}

# ---- All runs, in a pool of processes --------------------------------------------------

def fresh_processes(jobs: int) -> ProcessPoolExecutor:
    """One for each task, so that no task sees what another did to its process."""
    return ProcessPoolExecutor(jobs, get_context("forkserver"), max_tasks_per_child=1)

def missing_runs(arms: dict[str, Arm], seeds: list[int], lines: list[dict]) -> list[tuple]:
    """(name, arm, seed) of the runs that no line has, in the order to run them."""
    base, first, others = base_hash(), [], []
    hashes = {name: arm_hash(arm, base) for name, arm in arms.items()}
    done = {(line["arm"], line["hash"], line["seed"]) for line in lines if "failed" not in line}
    # Seed by seed, so that an interrupted ablation leaves pairs to compare.
    for seed in seeds:
        for name, arm in arms.items():
            is_due = arm.stages or seed == 0  # the start model has no seeds
            if is_due and (name, hashes[name], seed) not in done:
                (first if name in FIRST else others).append((name, arm, seed))
    return first + others

def run_all(missing: list[tuple], jobs: int, path: Path, scratch: Path) -> int:
    """Run these, `jobs` at a time. A run that failed gets a line that says why. Returns how
    many failed."""
    began, n_failed = time.time(), 0
    scratch.mkdir(parents=True, exist_ok=True)
    # Data before the pool starts: several runs need the same.
    for _, arm, _ in missing:
        if arm.data:
            made_data(arm.data, scratch)
        if arm.more_images:
            made_data(MORE_IMAGES, scratch)
    print(f"{len(missing)} runs are missing", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs: each has one core
    with fresh_processes(jobs) as pool:
        waiting = {pool.submit(run, *task, scratch): task for task in missing}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                name, arm, seed = waiting[future]
                error = future.exception()
                if error:
                    n_failed += 1
                    line = heading(name, arm, seed) | {"failed": f"{type(error).__name__}: {error}"}
                    said = f"{line['failed']}; see its .log in {scratch}; run it again to retry"
                else:
                    line = future.result()
                    said = f"worst order {line['all'][WORST]:.3f}"
                perl.append_line(path, line)
                left = (time.time() - began) / done * (len(missing) - done) / 60
                print(f"[{done}/{len(missing)}] {name}, seed {seed}: {said}; "
                      f"about {left:.0f} minutes left", flush=True)
        except BaseException:  # after Ctrl-C, what runs or waits must not go on
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()
            raise
    return n_failed

def results(line: dict) -> dict:
    """What equal code must reproduce: all numbers of a run except times."""
    return {name: value for name, value in line.items()
            if name not in ("hash", "code", "ran_on", "cpu_seconds", "training_seconds")}

def recheck(jobs: int, path: Path, scratch: Path) -> None:
    """Run seed 0 of every arm on the present code. An arm whose numbers are those of the older
    code with most runs keeps its other seeds."""
    now, lines = base_hash()[:8], perl.read_lines(path)
    older = {code: last for code, last in last_lines(lines).items() if code != now}
    perl.check(older, f"{path} has no runs of older code to compare with")
    old = max(older.values(), key=len)
    n_failed = run_all(missing_runs(ARMS, [0], lines), jobs, path, scratch)
    perl.check(n_failed == 0, f"{n_failed} runs failed")
    new = last_lines(perl.read_lines(path)).get(now, {})
    kept = list(new.values())
    for (name, seed), line in old.items():
        first, again = old.get((name, 0), {}), new.get((name, 0), {})
        if "failed" in line or results(first) != results(again):
            print(f"{name}, seed {seed}: has to run again")
        elif (name, seed) not in new:
            ran_on = line.get("ran_on", line["code"])
            kept.append(line | {"hash": again["hash"], "code": now, "ran_on": ran_on})
    # Runs of older code would only stand beside those that now count.
    perl.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))

# ---- Tables ----------------------------------------------------------------------------

MEASURES = ("accuracy", "worst order", "bias")
ACCURACY, WORST, BIAS = 0, 1, 2

def difference(ours: dict, theirs: dict, column: int, part: str = "all") -> list[float]:
    """A measure of an arm minus that of another, in percent, for each seed of both."""
    seeds = sorted(ours.keys() & theirs.keys())
    return [100 * (ours[seed][part][column] - theirs[seed][part][column]) for seed in seeds]

def differences_from_perl(runs: dict) -> dict[tuple, list[float]]:
    """(arm, measure) -> difference by seed from PeRL with the same data and budget."""
    found = {}
    for name in runs:
        for column in (WORST, ACCURACY):
            values = difference(runs[name], runs.get(arm_of(name).rival, {}), column)
            if len(values) > 1:
                found[name, column] = values
    return found

def last_lines(lines: list[dict]) -> dict[str, dict[tuple, dict]]:
    """Code that all arms share -> (arm, seed) -> the run's last line. Of an arm that was
    changed in between, only the newest form counts."""
    newest = {(line["code"], line["arm"]): line["hash"] for line in lines}
    by_code = {}
    for line in lines:
        last = by_code.setdefault(line["code"], {})
        if line["hash"] == newest[line["code"], line["arm"]]:
            last[line["arm"], line["seed"]] = line
    return by_code

def by_arm(last: dict[tuple, dict]) -> dict[str, dict[int, dict]]:
    """Arm, in the order of ARMS -> seed -> the line of a run that did not fail."""
    runs = {name: {} for name in ARMS}
    for (name, seed), line in sorted(last.items()):
        if "failed" not in line:
            runs.setdefault(name, {})[seed] = line
    return {name: lines for name, lines in runs.items() if lines}

def arm_of(name: str) -> Arm:
    """A fork of a user has no title but its name, and PeRL as its rival."""
    return ARMS.get(name, Arm(name))

def shown(values: list[float], sign: str = "") -> str:
    """93.1 ± 1.2, or with sign "+": +15.1 ± 3.1."""
    if not values:
        return ""
    center, half = interval(values)
    return f"{center:{sign}.1f}" + (f" ± {half:.1f}" if half < math.inf else "")

NOT_RUN = "not run yet\n"
MAIN = ("start", "perl", "grpo")
ALL = ("arm", "seeds", *MEASURES, "accuracy minus PeRL's", "worst order minus PeRL's")
SHARES_OF_GROUPS = {"groups trained on": "kept", "with a gradient": "with_gradient",
                    "of these equal as given": "equal_as_given",
                    "of these by permutation alone": "by_permutation"}
BY_SHARE = [f"{kind}-{share}".removesuffix("-0.95") for share in SHARES
            for kind in ("perl", "grpo")]
IMAGES = ("start", "perl-images", "grpo-images")
# Marker in a README -> arms (none: arms_table chooses), part of a run's line, columns.
TABLES = {
    "main": ((*MAIN, "perl-120", "grpo-120"), "all",
             ("arm", "seeds", *MEASURES, "worst order minus PeRL's", "with a gradient")),
    "positions": (MAIN, "all", ("arm", "by position")),
    "arms": ((), "all", (*ALL, *SHARES_OF_GROUPS)),
    "forks": ((), "all", (*ALL, "worst order minus GRPO's")),
    "shares": (BY_SHARE, "all", ALL),
    "images": (IMAGES, "ask", (*ALL, *SHARES_OF_GROUPS)),
    "images-all": (IMAGES, "all", ALL),
    "more": (MAIN, "more_all", (*ALL, "by position"))}

def cells_of(runs: dict, name: str, part: str, survivors: list) -> dict[str, str]:
    """All that tables say of an arm. survivors: the differences to print in bold."""
    lines, cells = runs[name], {"arm": arm_of(name).title, "seeds": len(runs[name])}
    for column, its_name in enumerate(MEASURES):
        cells[its_name] = shown([100 * line[part][column] for line in lines.values()])
        for other, rival in (("PeRL", arm_of(name).rival), ("GRPO", "grpo")):
            text = shown(difference(lines, runs.get(rival, {}), column, part), "+")
            if other == "PeRL" and (name, column) in survivors:
                text = f"**{text}**"
            cells[f"{its_name} minus {other}'s"] = "" if name in ("start", rival) else text
    key, places = "more_places" if part == "more_all" else "places", []
    for place in next(iter(lines.values()))[key]:
        places.append(f"{100 * fmean(line[key][place] for line in lines.values()):.0f}")
    cells["by position"] = " / ".join(places)
    for head, field in SHARES_OF_GROUPS.items():
        shares = [line[field] for line in lines.values() if field in line]
        cells[head] = f"{100 * fmean(shares):.0f} %" if shares else ""
    return cells

def arms_table(runs: dict, which: str) -> str:
    names, part, heads = TABLES[which]
    if which == "arms":
        names = [name for name in runs if name in MAIN or arm_of(name).rival == "perl"]
    elif which == "forks":
        names = [name for name in runs if name in MAIN or name not in ARMS]
    # Holm's correction is for the tests that `arms` and `shares` show, on all questions.
    survivors = holm(differences_from_perl(runs)) if part == "all" else []
    rows = [list(heads)]
    for name in names:
        if name in runs:
            cells = cells_of(runs, name, part, survivors)
            rows.append([cells[head] for head in heads])
    return table(rows) if len(rows) > 1 else NOT_RUN

def longer_table(runs: dict) -> str:
    """Worst order over the steps of the longer budget."""
    ours, theirs = runs.get("perl-120", {}), runs.get("grpo-120", {})
    rows, by_step = [["step", "seeds", "PeRL", "plain GRPO", "PeRL minus plain GRPO"]], {}
    for seed in sorted(ours.keys() & theirs.keys()):
        for point, other in zip(ours[seed]["curve"], theirs[seed]["curve"]):
            worst, others_worst = 100 * point[1 + WORST], 100 * other[1 + WORST]
            pair = worst, others_worst, worst - others_worst
            by_step.setdefault(point[0], []).append(pair)
    for step, pairs in by_step.items():
        perl_worst, grpo_worst, gaps = zip(*pairs)
        rows.append([step, len(pairs), shown(perl_worst), shown(grpo_worst), shown(gaps, "+")])
    return table(rows) if by_step else NOT_RUN

def holm_text(runs: dict) -> str:
    """Which differences from PeRL the correction leaves, in sentences."""
    differences, n_plain, found = differences_from_perl(runs), 0, {}
    survivors = holm(differences)
    for (name, column), values in differences.items():
        center, half = interval(values)
        n_plain += abs(center) > half
        if (name, column) in survivors:
            which = MEASURES[column], "below" if center < 0 else "above"
            found.setdefault(which, []).append(arm_of(name).title)
    text = (f"Of {len(differences)} paired differences from PeRL with the same data and "
            f"budget (accuracy and worst order), {n_plain} have a 95 % interval without 0, "
            f"and {len(survivors)} survive Holm's correction for their number:\n\n")
    for its_name in ("worst order", "accuracy"):
        for word in ("below", "above"):
            titles = "; ".join(found.get((its_name, word), ["none"]))
            text += f"- {its_name} {word} PeRL's: {titles}\n"
    return text

def runs_text(code: str, last: dict[tuple, dict]) -> str:
    """Which code the runs are of, how many there are, and which failed."""
    older = Counter(line["ran_on"] for line in last.values() if "ran_on" in line)
    failed, wanted = [], []
    for (name, seed), line in sorted(last.items()):
        if "failed" in line:
            failed.append(f"{name}, seed {seed} ({line['failed']})")
    for name, arm in ARMS.items():
        wanted += [(name, seed) for seed in range(8 if arm.stages else 1)]
    text = f"{len(last) - len(failed)} runs of perl.py {code}. "
    if older:
        forms = ", ".join(f"{count} on {ran_on}" for ran_on, count in older.items())
        text += (f"{older.total()} of them ran on older forms of the code ({forms}), and count "
                 "because seed 0 of their arm gave equal numbers on the present one. ")
    return (f"{text}Failed: {'; '.join(failed) or 'none'}. Of {len(wanted)} runs (every arm, 8 "
            f"seeds), {len(set(wanted) - last.keys())} have not been started.\n")

def all_tables(code: str, last: dict[tuple, dict]) -> dict[str, str]:
    """What stands between the markers of the READMEs."""
    runs = by_arm(last)
    texts = {name: arms_table(runs, name) for name in TABLES if name != "forks"}
    return texts | {"longer": longer_table(runs), "holm": holm_text(runs),
                    "runs": runs_text(code, last)}

def write_tables(path: Path, texts: dict[str, str]) -> None:
    """Replace what stands between <!-- table: NAME --> and <!-- /table --> in a file."""
    def filled(marked: re.Match) -> str:
        perl.check(marked[1] in texts, f"{path}: no table {marked[1]}, only {sorted(texts)}")
        return f"<!-- table: {marked[1]} -->\n{texts[marked[1]]}<!-- /table -->"

    text = path.read_text(encoding="utf-8")
    marker = r"<!-- table: ([\w-]+) -->.*?<!-- /table -->"
    perl.write_atomic(path, re.sub(marker, filled, text, flags=re.DOTALL))

# ---- Main ------------------------------------------------------------------------------

def seeds_of(text: str) -> list[int]:
    """"0-7" or "3" -> seeds."""
    first, _, last = text.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    perl.check(seeds, f"{text}: the last seed is below the first")
    return seeds

def fork_arm(path: str, flags: str) -> dict[str, Arm]:
    """The arms of --fork: PeRL and plain GRPO, and the user's."""
    perl.check(Path(path).is_file(), f"--fork {path}: there is no such file")
    with fresh_processes(1) as pool:  # misspelt names and flags, before anything runs
        pool.submit(start_fork, path, [shlex.split(flags)], perl.parse_config).result()
    arm = Arm(path, (flags,), fork=str(Path(path).resolve()))
    return {"perl": ARMS["perl"], "grpo": ARMS["grpo"], f"{path} {flags}".strip(): arm}

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--jobs", type=int, default=2, help="runs at a time, one core each [2]")
    add("--arms", default=",".join(ARMS), help="some of %(default)s")
    add("--seeds", type=seeds_of, default=seeds_of("0-7"), help="A-B [0-7]")
    add("--fork", help="compare a file that replaces functions of perl.py")
    add("--flags", default="", help='of the fork: --flags="--beta 0.01"')
    add("--recheck", action="store_true", help="keep runs of older code with equal results")
    add("--tables", action="store_true", help="run nothing; write the READMEs' tables")
    add("--lines", type=Path, default=LINES, help="file of finished runs")
    add("--scratch", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    add("--cost", action="store_true", help="cost of a step; takes perl.py's flags too")
    add("--images", type=int, default=4, help="--cost: images of the question")
    add("--image-tokens", type=int, default=256, help="--cost: tokens of each image")
    add("--text-tokens", type=int, default=64, help="--cost: other tokens of the prompt")
    args, perl_flags = parser.parse_known_args(argv)
    if args.cost:
        return cost([args.images, args.image_tokens, args.text_tokens], perl_flags)
    perl.check(not perl_flags, f"unknown: {' '.join(perl_flags)}")
    names, scratch, files = args.arms.split(","), args.scratch.resolve(), [args.lines]
    perl.check(set(names) <= set(ARMS), f"--arms: some of {', '.join(ARMS)}")
    arms = {name: ARMS[name] for name in ARMS if name in names}
    if args.fork:
        arms = fork_arm(args.fork, args.flags)
        files.append(scratch / "forks.jsonl")
    n_failed = 0
    if args.recheck:
        recheck(args.jobs, args.lines, scratch)
    elif not args.tables:
        missing = missing_runs(arms, args.seeds, perl.flatten(map(perl.read_lines, files)))
        n_failed = run_all(missing, args.jobs, files[-1], scratch)
    base, lines = base_hash(), perl.flatten(map(perl.read_lines, files))
    # If an arm was changed and changed back, its present form counts.
    present = [arm_hash(arm, base) for arm in arms.values()]
    lines.sort(key=lambda line: line["hash"] in present)
    show(last_lines(lines), base[:8], args)
    perl.check(n_failed == 0, f"{n_failed} runs failed")

def show(by_code: dict[str, dict], now: str, args) -> None:
    """Print the tables, separately for each code; with --fork, only the one that compares.
    Update the figure, and with --tables the READMEs: both are of the code with most runs."""
    for code, last in by_code.items():
        of = "" if code == now else "another perl.py or other data: "
        texts = all_tables(code, last)
        summary = texts.pop("runs")
        if args.fork:  # the arms that were not run are of no interest
            summary = summary.partition(" Of ")[0]
        print(f"\n{of}{summary}")
        if args.fork:
            texts = {"forks": arms_table(by_arm(last), "forks")}
        for name, text in texts.items():
            print(f"{name}:\n{text}")
    if by_code and not args.fork:
        # A few runs of changed code must not replace complete tables.
        most = max(reversed(by_code), key=lambda code: len(by_code[code]))
        draw(by_arm(by_code[most]), SHARES, args.lines.with_suffix(".png"))
        if args.tables and args.lines == LINES:
            texts = all_tables(most, by_code[most])
            for readme in (HERE.parent / "README.md", HERE / "README.md"):
                write_tables(readme, texts)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues") from None
