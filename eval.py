#!/usr/bin/env python3
"""Measure a model on the paper's eight benchmarks, and how far its answers depend on image order.

    python eval.py                                            # tiny, data_samples/, CPU, a minute
    python eval.py --model Qwen2.5-VL-7B --benchmarks all     # one GPU; MMIU alone is 25 GB of data
    accelerate launch eval.py --model runs/mine/checkpoint-100 --benchmarks blink --orders 6
    python eval.py --model Qwen2.5-VL-7B --score-only         # grade saved responses again
    python eval.py --compare eval_runs/Qwen2.5-VL-7B eval_runs/mine-checkpoint-100

Greedy, with the prompt and the grader of training. Accuracy is that of questions as given. --orders
K asks each question whose images may be permuted in up to K orders: mean, worst and best order,
bias = best - worst (the paper's p(x_max) - p(x_min), A.5), the share of questions with the same
choice in all orders, accuracy by the position of the right image; 95 % bootstrap intervals. What
cannot be read, asked or parsed counts as wrong: denominators are fixed.

eval_runs/MODEL/BENCHMARK/ holds config.json, samples.jsonl (a line a response, only appended to)
and results.json. A killed run loses a batch at most; the same command goes on, to the same results.
"""
import argparse
import functools
import hashlib
import io
import json
import operator
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageFile
from tqdm import tqdm

from perl import (ORDINALS, PRESETS, SAMPLES, Config, Sample, all_orders, canonical, extract_answer,
                  extract_choice, last_boxed, load_model, load_processor, load_samples, permute,
                  plain, prompt_length, read_lines, same_answer, sample_groups, write_atomic)

class Benchmark(NamedTuple):
    """Where a benchmark's rows come from, how many there are, and how its score is made."""
    hub: str                  # data set on the Hub; --data-dir holds it under the name behind "/"
    configs: tuple[str, ...]
    split: str
    files: str                # the same rows in a local copy; {} stands for the config
    rows: int                 # 0: any number
    mean: str                 # micro: over questions; macro: over tasks
    scoring: str

LOWER = "rules only: lies below the published score, which a language model judged"
BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance",
    "Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity")
BENCHMARKS = {
    "digits": Benchmark("", (), "test", "test.jsonl", 0, "micro", "as in training"),
    "mantis-eval": Benchmark("TIGER-Lab/Mantis-Eval", ("mantis_eval",), "test",
                             "{}/test-*.parquet", 217, "micro", "letter, or equal text"),
    "blink": Benchmark("BLINK-Benchmark/BLINK", BLINK_TASKS, "val", "{}/val-*.parquet", 1901,
                       "macro", "letter; mean over 14 tasks"),
    "mmiu": Benchmark("FanqingM/MMIU-Benchmark", ("",), "test", "all.parquet", 11698, "macro",
                      "letter; mean over tasks"),
    "mathvista": Benchmark("AI4Math/MathVista", ("",), "testmini", "data/testmini-*.parquet", 1000,
                           "micro", "option, or number at the row's precision; " + LOWER),
    "mathverse": Benchmark("AI4Math/MathVerse", ("testmini",), "testmini", "testmini.parquet", 3940,
                           "micro", "letter, LaTeX equality; " + LOWER),
    "mathvision": Benchmark("MathLLMs/MathVision", ("",), "test", "data/test-*.parquet", 3040,
                            "micro", "letter or option text, LaTeX equality"),
    "remi": Benchmark("mehrankazemi/ReMI", ("",), "test", "test.parquet", 2600, "macro",
                      "value within its task's tolerance; mean over 13 tasks"),
    "mv-math": Benchmark("PeijieWang/MV-MATH", ("",), "all", "*MV-MATH.json", 2009, "micro",
                         "letter, LaTeX equality, all parts; " + LOWER),
}
PAPER_COLUMNS = tuple(BENCHMARKS)[1:]
PAPER = {
    "Qwen2.5-VL-7B": (70.80, 55.23, 52.00, 68.20, 46.30, 25.07, 36.38, 20.41),
    "MM-Eureka-7B": (69.91, 51.49, 51.67, 73.00, 50.30, 26.90, 43.31, 24.39),
    "Noisy-K12-7B": (73.15, 54.23, 52.13, 72.90, 52.80, 28.90, 41.27, 24.99),
    "R1-Onevision-7B": (71.76, 32.38, 46.48, 64.10, 46.40, 29.90, 36.96, 19.06),
    "PeRL (n_s = 1)": (76.39, 58.53, 54.23, 73.00, 49.56, 28.26, 43.38, 25.68),
    "ablation n_s = 0": (75.93, 56.91, 52.26, 71.8, 49.20, 26.51, 39.62, 24.02),
    "ablation n_s = 2": (77.78, 59.50, 54.55, 72.2, 50.38, 27.89, 39.04, 24.54),
    "ablation n_s = 3": (74.07, 57.02, 52.17, 70.9, 46.39, 27.00, 38.62, 23.25),
}

# ---- Adapters: a row of a data set -> a question -------------------------------------------------

class Question(NamedTuple):
    """A Sample of perl.py (no answer: the row has none), and what scoring needs beside it."""
    sample: Sample
    rule: str                      # how an answer is scored, see grade_row
    options: tuple[str, ...] = ()  # texts of options A, B, ..

def make_question(id, images: list[str], text: str, answer, rule: str, options=(), task="",
                  movable: tuple[int, ...] | None = None, show_options=False) -> Question:
    """One <image> an image, missing ones in front. `movable`: images that are the options."""
    if show_options:  # they are not in the text yet
        text += "".join(f"\n({chr(65 + k)}) {option}" for k, option in enumerate(options))
    text = re.sub(r"<\|\w+\|>", "", text).strip()
    surplus = text.count("<image>") - len(images)
    text = "<image>" * -surplus + text.replace("<image>", "", max(surplus, 0))
    answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer or "").strip()
    return Question(Sample(str(id), tuple(images), text, answer, "letter" if movable else "never",
                           movable, str(task)), rule, tuple(map(str, options)))

def listed_options(text: str) -> list[str]:
    """The options in a question's text: "A. 9,14", "(B) red" or "C:2", a line each."""
    label = r"^\s*\(?([A-Z])\s*[).:、．]"
    found = re.findall(rf"(?ms){label}\s*(.*?)\s*(?={label}|\Z)", text)
    return [option for k, (letter, option, _) in enumerate(found) if letter == chr(65 + k)]

def option_images(options: list[str], n_images: int, text: str) -> tuple[int, ...] | None:
    """Positions of the images that options name: "the second image", "the third image" -> (1, 2).
    None unless they are the last ones, in order, and the question names none or all of them."""
    def positions(names):
        return [ORDINALS.index(name) - 1 for name in names if name in ORDINALS]
    named = positions(re.sub(r" image$", "", canonical(option)) for option in options)
    mentioned = {*positions(re.findall(r"(\w+) image\b", canonical(text)))} & {*named}
    as_last = len(named) > 1 and named == list(range(n_images - len(options), n_images))
    return tuple(named) if as_last and mentioned in (set(), {*named}) else None

def place_tags(text: str, tag: str, images: list[str]) -> tuple[str, list[str]]:
    """Numbered tags -> <image> where an image first stands, <image_k> where it is spoken of.
    Returns the images in the order of their tags, those without one in front."""
    tagged = [k for k in dict.fromkeys(map(int, re.findall(tag, text))) if 0 < k <= len(images)]
    order = [k for k in range(1, len(images) + 1) if k not in tagged] + tagged
    left = dict.fromkeys(tagged, "<image>")
    text = re.sub(tag, lambda m: left.pop(k := int(m[1]), f"<image_{order.index(k) + 1}>"
                                          if k in order else ""), text)
    return text, [images[k - 1] for k in order]

def from_mantis(row: dict, number: int, place) -> Question:
    images, text, gold = [*map(place, row["images"])], row["question"], row["answer"]
    if row["question_type"] != "multi-choice":
        return make_question(row["id"], images, text, gold, "text", (), "short-answer")
    options = [re.sub(rf"^\s*\(?{chr(65 + k)}\s*[).:]\s*", "", option)  # some have labels
               for k, option in enumerate(row["options"])]
    gold = extract_choice(gold) or re.sub(r"[^A-Za-z]", "", gold)[:1].upper()
    return make_question(row["id"], images, text, gold, "choice", options, "multi-choice",
                         option_images(options, len(images), text), show_options=True)

def from_blink(row: dict, number: int, place) -> Question:
    images = [place(row[f"image_{k}"]) for k in range(1, 5) if row.get(f"image_{k}")]
    asked, choices = row["prompt"].split("Select from the following")[0], row["choices"]
    return make_question(row["idx"], images, row["prompt"], row["answer"].strip("() "), "choice",
                         choices, row["sub_task"], option_images(choices, len(images), asked))

def from_mmiu(row: dict, number: int, place) -> Question:
    images, options = [*map(place, row["input_image_path"])], listed_options(row["options"])
    text, gold = row["question"] + "\n" + row["context"], (row["output"] or "").strip("() ")
    gold = gold if re.fullmatch("[A-Z]", gold) and ord(gold) - 65 < len(options) else ""
    movable = option_images(options, len(images), text.replace(row["options"].strip(), ""))
    return make_question(f"{row['task']}-{number}", images, text, gold, "choice", options,
                         row["task"], movable)

def from_remi(row: dict, number: int, place) -> Question:
    images = [place(row[f"image_{k}"]) for k in range(1, 7) if row.get(f"image_{k}")]
    text, images = place_tags(row["question"], r"<image(\d+)>", images)
    if row["task"] in ("Collisions", "Isomorphism"):
        text += " If it is a yes or no question, answer 0 for no and 1 for yes."
    return make_question(f"{row['task']}-{number}", images, text, row["label"],
                         "remi " + row["task"], (), row["task"])

def from_mv_math(row: dict, number: int, place) -> Question:
    text, images = place_tags(row["question"], r"<image_(\d+)>", [*map(place, row["input_image"])])
    kind, gold, movable, options = row["answer_type"], row["answer"], None, ()
    if kind == "choice":
        options, gold = listed_options(text) or [""] * 4, extract_choice(gold) or gold
        if {*options} == {"<image>"}:  # the options are images: the last ones
            movable = tuple(range(len(images) - len(options), len(images)))
    rule = {"choice": "choice", "multi-step": "parts"}.get(kind, "text")
    return make_question(row["problem_id"], images, text, gold, rule, options, kind, movable)

def from_mathvista(row: dict, number: int, place) -> Question:
    choices, gold, kind = list(row["choices"] or ()), row["answer"], row["answer_type"]
    rule = {"integer": "number 0", "float": f"number {int(row['precision'] or 0)}"}.get(kind, kind)
    if row["question_type"] == "multi_choice":  # the gold answer is the option's text
        rule, gold = "choice", chr(65 + choices.index(gold)) if gold in choices else ""
    return make_question(row["pid"], [place(row["decoded_image"])], row["query"], gold, rule,
                         choices, row["metadata"]["task"])

def from_mathverse(row: dict, number: int, place) -> Question:
    text, options, rule = row["question"], (), "text"
    if row["question_type"] == "multi-choice":
        options, rule = listed_options(row.get("question_for_eval") or text) or [""] * 4, "choice"
    return make_question(row["sample_index"], [place(row["image"])],
                         text or "Answer the question in the image.",  # version Vision Only
                         row["answer"], rule, options, row["problem_version"])

def from_mathvision(row: dict, number: int, place) -> Question:
    options = list(row["options"] or ())
    return make_question(row["id"], [place(row["decoded_image"])], row["question"], row["answer"],
                         "choice" if options else "text", options, row["subject"],
                         show_options=True)

ADAPTERS = {"mantis-eval": from_mantis, "blink": from_blink, "mmiu": from_mmiu, "remi": from_remi,
            "mv-math": from_mv_math, "mathvista": from_mathvista, "mathverse": from_mathverse,
            "mathvision": from_mathvision}

# ---- Data: from the Hub, or from a local copy of the same files ----------------------------------

def load_benchmark(name: str, args) -> list[Question]:
    """The questions of a benchmark or of a JSONL file of samples; --limit spreads evenly."""
    if name in ADAPTERS:
        rows, folder = read_rows(name, args.data_dir)
        place = functools.partial(place_image, folder=folder, cache=Path(args.out) / ".images")
    else:
        rows = load_samples(SAMPLES / BENCHMARKS[name].files if name in BENCHMARKS else name)
    n = min(args.limit or len(rows), len(rows))
    return [ADAPTERS[name](rows[k], k, place) if name in ADAPTERS else Question(rows[k], "text")
            for k in (j * len(rows) // n for j in range(n))]

def read_rows(name: str, data_dir: str) -> tuple[list[dict], Path | None]:
    """All rows, images as bytes or paths, and the folder that the paths start from."""
    import datasets  # needed here only
    b, rows, folder = BENCHMARKS[name], [], None
    for config in b.configs:
        if data_dir:
            folder = Path(data_dir, b.hub.split("/")[1])
            files = sorted(map(str, folder.glob(b.files.format(config))))
            if not files:
                raise SystemExit(f"--data-dir: no {folder / b.files.format(config)}; copy the "
                                 f"files of {b.hub} there as the Hub has them")
            kind = "json" if files[0].endswith("json") else "parquet"
            part = datasets.load_dataset(kind, data_files=files, split="train")
        else:
            try:
                part = datasets.load_dataset(b.hub, config or None, split=b.split)
            except (ConnectionError, FileNotFoundError) as error:
                raise SystemExit(f"Could not load {b.hub} ({error}). Without a network, pass a "
                                 "folder of local copies: --data-dir FOLDER") from None
        rows += part.data.to_pylist()  # images not decoded: a broken one must not end the run
    if not data_dir and rows[0].keys() & {"input_image_path", "input_image"}:
        folder = unpack_images(b.hub)
    return rows, folder

def unpack_images(hub: str) -> Path:
    """Download the zips of a data set whose rows hold paths; unpack each into its own folder."""
    from huggingface_hub import snapshot_download
    folder = Path(snapshot_download(hub, repo_type="dataset", allow_patterns="*.zip"))
    for archive in folder.glob("*.zip"):
        if not (done := folder / archive.stem / ".unpacked").exists():
            shutil.unpack_archive(archive, done.parent)
            done.touch()
    return folder

def place_image(image, folder: Path | None, cache: Path) -> str:
    """An image of a row -> a file to open: a path in `folder`, else an RGB copy in `cache`, with
    transparent parts white. What is missing or no image gets the name of no file."""
    if not image:
        return "missing image"
    if isinstance(image, str):
        names, places = (image, Path(image).name), (folder, *folder.glob("*/"))
        found = (place / name for place in places for name in names if (place / name).is_file())
        return str(next(found, folder / image))
    content = image["bytes"] or Path(image["path"]).read_bytes()
    target = cache / f"{hashlib.sha1(content).hexdigest()}.png"
    if not target.exists():
        try:
            picture = Image.open(io.BytesIO(content))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            cache.mkdir(parents=True, exist_ok=True)
            picture.convert("RGB").save(temporary := cache / f"{target.stem}-{os.getpid()}.png")
            os.replace(temporary, target)
        except (OSError, SyntaxError, ValueError):
            pass
    return str(target)

# ---- Scoring -------------------------------------------------------------------------------------

def grade_row(row: dict) -> tuple[str | None, bool]:
    """A line of samples.jsonl -> the answer found in its response, and whether it is right."""
    rule, gold, response = row["rule"], row["gold"], row["response"]
    if rule == "choice":
        letter = extract_choice(response, row["options"])
        texts = {chr(65 + k): text or k for k, text in enumerate(row["options"])}
        return letter, letter is not None and texts[letter] == texts.get(gold)  # or a duplicate
    answer = extract_answer(response)
    if answer is None:
        return None, False
    if rule.startswith("remi"):
        return answer, remi_right(rule.split()[1], answer, gold)
    if rule.startswith("number") and (value := to_number(answer)) is not None:
        digits = int(rule.split()[1])
        return answer, (round(value, digits) if digits else int(value)) == float(gold)
    if rule == "list":
        mine, wanted = (re.findall(r"-?\d+(?:\.\d+)?", plain(text)) for text in (answer, gold))
        return answer, [*map(float, mine)] == [*map(float, wanted)]
    return answer, all_parts_right(response, gold) if rule == "parts" else same_answer(answer, gold)

def to_number(text: str) -> float | None:
    r"""The number that an answer is: "$1,234.5", "14 cm", "3/4", "\frac{3}{4}", "50%", "x = 14"."""
    text = re.sub(r"\\[dt]?frac\s*\{?(-?\d+)\}?\s*\{?(\d+)\}?", r"\1/\2", plain(text))
    match = re.fullmatch(r"(?:[A-Za-z]\w*[=≈])?([-+]?(?:\d+\.?\d*|\.\d+))(?:/(\d*[1-9]\d*))?"
                         r"(?:[%°]|\^circ|[a-zA-Z²³][\w/^²³.]*)?",
                         re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[\s$\\{}]", "", text))
    return float(match[1]) / int(match[2] or 1) if match else None

def remi_right(task: str, answer: str, label: str) -> bool:
    """ReMI's own rules: lower case, nothing behind a %, a tolerance for each task."""
    answer, label = (plain(text).lower().split("%")[0].replace("\\", "").strip()
                     for text in (answer, label))
    answer = {"yes": "1", "no": "0"}.get(answer, answer) if label in ("0", "1") else answer
    if task == "RefCoco":
        return answer in [text.strip() for text in label.split(",")]
    mine, gold = to_number(answer), to_number(label)
    if mine is not None and gold is not None:
        bounds = {"Clocks": 10, "GeomShape": 0.03 * abs(gold), "GeomCost": 0.03 * abs(gold)}
        return abs(mine - gold) <= bounds.get(task, 0.01 * abs(gold)) + 1e-9
    bare = [re.sub(r"^([fgh])x$", r"\1", re.sub(r"[\s()]", "", text)) for text in (answer, label)]
    return bare[0] == bare[1]

def all_parts_right(response: str, gold: str) -> bool:
    """A multi-step question: all its parts, labeled "(1)", "(2)" in the answer or boxed singly."""
    def parts(text: str) -> list[str]:
        pieces = re.split(r"[（(]\s*[1-9]\s*[)）]", text)
        return [piece.strip(" ;；,，.。\n") for piece in pieces[1:] or pieces]
    wanted, given = parts(gold), parts(extract_answer(response))
    if len(given) != len(wanted):
        given = [*filter(None, map(last_boxed, re.split(r"(?=\\boxed)", response)))]
    return len(given) == len(wanted) and all(map(same_answer, given, wanted))

def picked(row: dict) -> tuple | None:
    """What an answer picks, as positions in the given order: the same whatever order was asked."""
    answer, order, movable = row["answer"] or "", row["order"], row["movable"]
    if row["order_rule"] == "letter":
        k = ord(extract_choice(answer) or "@") - 65
        return (order[movable[k]],) if 0 <= k < len(movable) else None
    if row["order_rule"] in ("index", "sequence"):
        numbers = [int(k) for k in re.findall(r"\d+", answer)]
        inside = {*numbers} <= {*range(1, len(order) + 1)}
        return tuple(order[k - 1] for k in numbers) if numbers and inside else None
    return (plain(answer).casefold(),) if answer else None

# ---- Measures ------------------------------------------------------------------------------------

def average(values: dict[str, list[float]], mean: str = "micro") -> float:
    """{task: a value a question} -> mean over questions, or (macro) over the tasks' means."""
    if mean == "micro":
        values = {"": sum(values.values(), [])}
    return round(sum(sum(column) / len(column) for column in values.values()) / len(values), 6)

def bootstrap(values: dict[str, list[float]], mean: str = "micro", draws=1000) -> list[float]:
    """95 % percentile interval of `average`, questions drawn anew within each task."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(draws)
    n = sum(map(len, values.values()))
    for task in sorted(values):
        column = torch.tensor([float(value) for value in values[task]])
        drawn = torch.randint(len(column), (draws, len(column)), generator=generator)
        total += column[drawn].mean(1) * (1 / len(values) if mean == "macro" else len(column) / n)
    return [round(q, 6) for q in torch.quantile(total, torch.tensor([0.025, 0.975])).tolist()]

def summary(column: list[float]) -> dict:
    return {"value": average({"": column}), "interval": bootstrap({"": column}), "n": len(column)}

def order_measures(groups: list[list[dict]]) -> dict:
    """How answers depend on image order: shares of the questions, given their graded rows, one an
    order; orders without a row are wrong. Example: right in 3 of 4 orders -> mean .75, worst 0,
    best 1, bias 1; the same wrong picture picked in all orders -> 0, 0, 0, 0, consistency 1."""
    columns, positions = {n: [] for n in ("mean", "worst", "best", "bias", "consistency")}, {}
    for rows in groups:
        right = [row["right"] for row in rows] + [False] * (rows[0]["orders"] - len(rows))
        picks = {picked(row) for row in rows}
        same = len(rows) == rows[0]["orders"] and len(picks) == 1 and None not in picks
        shares = (sum(right) / len(right), min(right), max(right), max(right) - min(right), same)
        for column, share in zip(columns.values(), shares):
            column.append(share)
        for row in rows if rows[0]["order_rule"] in ("letter", "index") else ():
            place = row["order"].index(*picked(row | {"answer": row["gold"]})) + 1
            positions.setdefault(place, []).append(row["right"])
    return {name: summary(column) for name, column in columns.items()} | {
        "by_position": {str(place): summary(positions[place]) for place in sorted(positions)}}

def graded_groups(folder: Path) -> list[list[dict]]:
    """samples.jsonl, graded: the rows of each question in the order of asking; questions by id."""
    groups = {}
    for row in read_lines(folder / "samples.jsonl"):
        row["answer"], row["right"] = (None, False) if row["error"] else grade_row(row)
        groups.setdefault(row["id"], {})[row["k"]] = row
    return [[groups[id][k] for k in sorted(groups[id])] for id in sorted(groups)]

def score(folder: Path) -> dict:
    """Grade a run folder and write results.json, a function of config.json and samples.jsonl."""
    config = json.loads((folder / "config.json").read_text())
    b = BENCHMARKS.get(config["benchmark"], BENCHMARKS["digits"])
    groups, given = graded_groups(folder), {task: [] for task in config["tasks"]}
    rows = [row for group in groups for row in group]
    for first, *_ in groups:
        given[first["task"]].append(first["k"] == 0 and first["right"])
    for task, n in config["tasks"].items():
        given[task] += [False] * (n - len(given[task]))  # without a row: wrong
    permuted = [group for group in groups if group[0]["orders"] > 1]
    result = {
        "score": average(given, b.mean), "interval": bootstrap(given, b.mean), "mean": b.mean,
        "micro": average(given), "n": config["n"], "expected": b.rows or config["n"],
        "no_gold": config["no_gold"], "missing": config["n"] - len(groups), "responses": len(rows),
        "errors": sum(bool(row["error"]) for row in rows),
        "unparsed": sum(row["answer"] is None and not row["error"] for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "tasks": {task: summary(given[task]) for task in sorted(given)},
        "orders": order_measures(permuted) if permuted else None,
        "never_permuted": config["never"], "scoring": b.scoring, "config": config,
        "versions": {p: version(p) for p in ("torch", "transformers", "accelerate", "math-verify")}}
    write_atomic(folder / "results.json", json.dumps(result, indent=1))
    return result

# ---- Asking the model ----------------------------------------------------------------------------

def settings(args) -> Config:
    """Config of perl.py for evaluation. A checkpoint of a run keeps that run's prompt and sizes."""
    chosen, run = dict(PRESETS.get(args.model, {})), Path(args.model).parent / "config.json"
    if Path(args.model).name.startswith("checkpoint-") and run.exists():
        saved = json.loads(run.read_text())
        chosen = {name: saved[name] for name in ("instruction", "max_pixels", "max_new_tokens",
                                                 "rollout_batch", "bf16", "cpu_threads")}
    typed = {"max_new_tokens": args.max_new_tokens, "rollout_batch": args.batch}
    return Config(**chosen | {name: value for name, value in typed.items() if value} | {
        "model": args.model, "max_prompt_tokens": 16384, "gradient_checkpointing": False})

def fixed_chunks(samples: list[Sample], orders: list[list], processor,
                 cfg: Config) -> tuple[list[list[int]], list[str]]:
    """Sample numbers in batches, and for each sample why it cannot be asked (empty if it can).

    Batches depend on samples and settings only. All orders of a sample share one, which encodes its
    images once. At most cfg.rollout_batch sequences and 400,000 tokens, padded, or one sample.
    """
    chunks, problems, size, longest = [], [], 0, 0
    for k, (sample, its_orders) in enumerate(zip(samples, orders)):
        try:
            length = prompt_length(sample, processor)
            problems.append(f"{length} tokens" if length > cfg.max_prompt_tokens else "")
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"image: {error}")
        length = 0 if problems[k] else length
        size, longest = size + len(its_orders), max(longest, length)
        tokens = size * (longest + cfg.max_new_tokens)
        if not chunks or size > cfg.rollout_batch or tokens > 400_000:
            chunks.append([])
            size, longest = len(its_orders), length
        chunks[-1].append(k)
    return chunks, problems

def answer_chunk(model, processor, chunk: list[int], questions: list[Question], orders: list[list],
                 problems: list[str], cfg: Config) -> list[dict]:
    """Ask the questions of a chunk in all their orders: lines of samples.jsonl."""
    able = [k for k in chunk if not problems[k]]
    groups = sample_groups(model, processor, [questions[k].sample for k in able],
                           [orders[k] for k in able], 1, cfg, greedy=True) if able else []
    answered, rows = dict(zip(able, groups)), []
    for k in chunk:
        sample, rule, options = questions[k].sample, questions[k].rule, questions[k].options
        for j, order in enumerate(orders[k]):
            rollout = answered[k][j] if k in answered else None
            rows.append({"id": sample.id, "k": j, "order": order, "orders": len(orders[k]),
                         "task": sample.source, "rule": rule, "options": options,
                         "gold": permute(sample, order).answer, "order_rule": sample.order_rule,
                         "movable": sample.movable, "response": rollout.text if rollout else "",
                         "truncated": bool(rollout and rollout.truncated), "error": problems[k]})
    return rows

def open_folder(folder: Path, config: dict, accelerator: Accelerator) -> set[tuple[str, int]]:
    """Make or reopen a run folder: which (id, order number) it has. Another config is refused."""
    path, samples = folder / "config.json", folder / "samples.jsonl"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomic(path, json.dumps(config, indent=1))
        if samples.exists():  # cut off a line torn by a kill
            os.truncate(samples, samples.read_bytes().rfind(b"\n") + 1)
    accelerator.wait_for_everyone()
    saved = json.loads(path.read_text())
    for name, value in config.items():
        if saved.get(name) != value:
            raise SystemExit(f"{folder}: {name} was {saved.get(name)!r} and is {value!r} now; "
                             "remove the folder or choose another --out")
    return {(row["id"], row["k"]) for row in read_lines(samples)}

def run_benchmark(name: str, model, processor, weights: str, cfg: Config, args, folder: Path,
                  accelerator: Accelerator) -> None:
    """Ask all questions of a benchmark to which the folder has no answers yet."""
    with accelerator.main_process_first():
        loaded = load_benchmark(name, args)
    questions = [question for question in loaded if question.sample.answer]
    samples = [question.sample for question in questions]
    cap = args.orders or (24 if name == "digits" else 1)
    orders = [all_orders(sample, cap) for sample in samples]
    tasks = [sample.source for sample in samples]
    content = json.dumps([[s.id, s.question, s.answer] for s in samples])
    if len({sample.id for sample in samples}) < len(samples):
        raise SystemExit(f"{name}: two questions have the same id")
    config = {"model": args.model, "weights": weights, "benchmark": name, "n": len(samples),
              "no_gold": len(loaded) - len(samples), "limit": args.limit, "orders": cap,
              "never": sum(sample.order_rule == "never" for sample in samples),
              "tasks": {task: tasks.count(task) for task in sorted({*tasks})},
              "questions": hashlib.sha1(content.encode()).hexdigest()} | {
        key: getattr(cfg, key) for key in ("max_new_tokens", "max_pixels", "max_prompt_tokens",
                                           "instruction", "rollout_batch")}
    done = open_folder(folder, config, accelerator)
    chunks, problems = fixed_chunks(samples, orders, processor, cfg)
    todo = [chunk for chunk in chunks if not done >= {(samples[k].id, j) for k in chunk
                                                      for j in range(len(orders[k]))}]
    world, rank = accelerator.num_processes, accelerator.process_index
    for start in tqdm(range(0, len(todo), world), name, disable=not accelerator.is_main_process):
        chunk = todo[start + rank] if start + rank < len(todo) else []
        rows = gather_object(
            answer_chunk(model, processor, chunk, questions, orders, problems, cfg))
        if accelerator.is_main_process:
            with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

# ---- Tables, chart, comparison -------------------------------------------------------------------

def percent(value: float, interval=()) -> str:
    """0.5, (0.4, 0.6) -> "50.0 [40.0, 60.0]"."""
    bounds = " [{:.1f}, {:.1f}]".format(*(100 * bound for bound in interval)) if interval else ""
    return f"{100 * value:.1f}{bounds}"

def table(rows: list[list]) -> str:
    """Rows, the first a heading, as an aligned Markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows) + "\n"

def report(results: dict[str, dict], model: str) -> str:
    """The tables of a model: its scores, its dependence on order, the paper's rows beside it."""
    counts = ("no_gold", "errors", "unparsed", "truncated")
    scores, orders = [["benchmark", "accuracy, % [95 %]", "n", *counts, "scoring"]], [
        ["benchmark", "questions", "never", "mean", "worst order", "best order", "bias [95 %]",
         "same choice", "by position of the right image"]]
    for name, r in results.items():
        n = f"{r['n'] - r['missing']} of {r['expected'] - r['no_gold']}"
        scores.append([name, percent(r["score"], r["interval"]), n, *(r[c] for c in counts),
                       r["scoring"]])
        if o := r["orders"]:
            bias, places = o["bias"], o["by_position"].items()
            orders.append([name, bias["n"], r["never_permuted"],
                           *(percent(o[key]["value"]) for key in ("mean", "worst", "best")),
                           percent(bias["value"], bias["interval"]),
                           percent(o["consistency"]["value"]),
                           " ".join(f"{k}: {percent(place['value'])}" for k, place in places)])
    text = f"{model}\n\n{table(scores)}"
    if len(orders) > 1:
        text += f"\nImage order, over the questions that may be permuted:\n\n{table(orders)}"
    if columns := [column for column in PAPER_COLUMNS if column in results]:
        picks = [PAPER_COLUMNS.index(column) for column in columns]
        text += "\nBeside the paper's scores:\n\n" + table([
            ["model", *columns],
            *([name, *(f"{row[k]:.2f}" for k in picks)] for name, row in PAPER.items()),
            [f"{model} (ours)", *(percent(results[c]["score"], results[c]["interval"])
                                  for c in columns)],
            ["n (ours)", *(results[c]["n"] for c in columns)],
            ["rule-based (ours)", *("below judged" if LOWER in BENCHMARKS[c].scoring else "yes"
                                    for c in columns)]])
    return text

def draw_chart(results: dict[str, dict], model: str, path: Path) -> None:
    """Bars of accuracy with 95 % intervals, beside the paper's start model and PeRL."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(3 + 1.2 * len(results), 4), layout="constrained").subplots()
    for shift, label in ((-0.5, "Qwen2.5-VL-7B"), (-0.25, "PeRL (n_s = 1)")):
        paper = {k + shift: PAPER[label][PAPER_COLUMNS.index(name)]
                 for k, name in enumerate(results) if name in PAPER_COLUMNS}
        axes.bar(*zip(*paper.items()), 0.25, label=f"{label}, paper") if paper else None
    scores = [100 * r["score"] for r in results.values()]
    spread = [[100 * abs(r["interval"][k] - r["score"]) for r in results.values()] for k in (0, 1)]
    axes.bar(range(len(scores)), scores, 0.25, yerr=spread, capsize=3, label=model)
    axes.set(ylabel="accuracy, %", xticks=range(len(scores)), xticklabels=list(results))
    axes.legend()
    axes.figure.savefig(path, dpi=150)

def compare(folder_a: Path, folder_b: Path) -> str:
    """Paired differences B - A of each benchmark, over the questions that both runs answered."""
    rows = [["benchmark", "n", "A", "B", "B - A [95 %]", "mean over orders", "worst order"]]
    for folder in sorted(path.parent for path in folder_a.glob("*/samples.jsonl")):
        mean, tasks = BENCHMARKS.get(folder.name, BENCHMARKS["digits"]).mean, {}
        in_b = {group[0]["id"]: group for group in graded_groups(folder_b / folder.name)}
        for pair in ((a, in_b[a[0]["id"]]) for a in graded_groups(folder) if a[0]["id"] in in_b):
            right = [[row["right"] for row in group] for group in pair]
            (x, *a), (y, *b) = ((r[0], r[0], sum(r) / len(r), min(r)) for r in right)
            tasks.setdefault(pair[0][0]["task"], []).append((x, y, *map(operator.sub, b, a)))
        if tasks:
            x, y, *gains = ({task: [values[k] for values in tasks[task]] for task in tasks}
                            for k in range(5))
            rows.append([folder.name, sum(map(len, tasks.values())), percent(average(x, mean)),
                         percent(average(y, mean)),
                         *(percent(average(gain, mean), bootstrap(gain, mean)) for gain in gains)])
    if len(rows) == 1:
        raise SystemExit(f"{folder_a} and {folder_b} share no answers; name folders of eval_runs/")
    return f"A = {folder_a}\nB = {folder_b}\n\n{table(rows)}"

# ---- Main ----------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tiny", help="Hub id, local folder or short name, as in perl.py")
    add("--benchmarks", default="digits", help="names with commas between, all (the paper's "
        f"eight), or JSONL files of samples; names: {', '.join(BENCHMARKS)}")
    add("--limit", type=int, default=0, help="ask so many questions, evenly spread; 0: all")
    add("--orders", type=int, default=0, help="orders of a question [24 for digits, else 1]")
    add("--data-dir", default="", help="local copies of the data sets; empty: from the Hub")
    add("--out", default="eval_runs", help="folder of the runs")
    add("--batch", type=int, default=0, help="sequences at a time [rollout_batch of perl.py]")
    add("--max-new-tokens", type=int, default=0, help="longest response [2048; tiny: 64]")
    add("--score-only", action="store_true", help="grade saved responses again, load no model")
    add("--compare", nargs=2, metavar="RUN", help="two model folders: paired differences")
    args = parser.parse_args(argv)
    args.benchmarks = [name for part in args.benchmarks.split(",")
                       for name in (PAPER_COLUMNS if part == "all" else (part,))]
    for name in args.benchmarks:
        if name not in BENCHMARKS and not name.endswith(".jsonl"):
            parser.error(f"--benchmarks {name}: none of all, {', '.join(BENCHMARKS)}, *.jsonl")
    return args

def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        return print(compare(*map(Path, args.compare)))
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # what is there of an image is shown
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator()
    parts = Path(args.model).parts  # RUN/checkpoint-100 -> RUN-checkpoint-100
    out = Path(args.out, "-".join(parts[-2 if parts[-1].startswith("checkpoint-") else -1:]))
    if not args.score_only:
        cfg = settings(args)
        if cfg.cpu_threads:
            torch.set_num_threads(cfg.cpu_threads)
        processor = load_processor(args.model, cfg)
        model = load_model(args.model, cfg, accelerator.device)
        starts = [p.detach().flatten()[:64].cpu().numpy().tobytes() for p in model.parameters()]
        weights = hashlib.sha1(b"".join(starts)).hexdigest()  # others, same path: another run
        if accelerator.device.type == "cuda" and cfg.bf16:
            model.bfloat16()
        for name in args.benchmarks:
            run_benchmark(name, model, processor, weights, cfg, args, out / Path(name).stem,
                          accelerator)
    if accelerator.is_main_process:
        results = {p.parent.name: score(p.parent) for p in sorted(out.glob("*/config.json"))}
        if not results:
            raise SystemExit(f"{out} holds no responses; run without --score-only first")
        text = report(results, out.name)
        write_atomic(out / "summary.md", text)
        draw_chart(results, out.name, out / "summary.png")
        print(text)

if __name__ == "__main__":
    main()
