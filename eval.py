#!/usr/bin/env python3
"""Measure a model on the paper's eight benchmarks, and how far its answers depend on image order.

    python eval.py                                            # tiny, data_samples/, CPU, a minute
    python eval.py --model Qwen2.5-VL-7B --benchmarks all     # one GPU; MMIU alone is 25 GB of data
    accelerate launch eval.py --model runs/mine/checkpoint-100 --benchmarks blink --orders 6
    python eval.py --model Qwen2.5-VL-7B --score-only         # grade saved responses again
    python eval.py --compare eval_runs/Qwen2.5-VL-7B eval_runs/mine-checkpoint-100
    python eval.py --step-cost                                # what a training step costs

Greedy, with the prompt and the grader of training. Accuracy is that of questions as given. --orders
K asks each question whose images may be permuted in up to K orders: mean, worst and best order,
bias = best - worst (the paper's p(x_max) - p(x_min), A.5), the share of questions with the same
choice in all orders, accuracy by the position of the right image; 95 % bootstrap intervals. What
cannot be read, asked or parsed counts as wrong: denominators are fixed.

eval_runs/MODEL/BENCHMARK/ holds config.json, samples.jsonl (a line a response, only appended to)
and results.json. A killed run loses a batch at most; the same command goes on, to the same results.
"""
import argparse
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageFile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import perl
from perl import (MODEL_PRESETS, SAMPLES, Config, Sample, all_orders, extract_answer, last_boxed,
                  load_model, load_processor, load_samples, permute, plain, prompt_length,
                  read_lines, same_answer, sample_groups, write_atomic)

class Benchmark(NamedTuple):
    """Where a benchmark's rows come from, how many there are, and how its score is made."""
    hub: str      # data set on the Hub; --data-dir holds it under the name behind "/"
    files: str    # its rows
    rows: int     # 0: any number
    mean: str     # micro: over questions; macro: over tasks
    scoring: str

LOWER = "below judged scores: rules only, where the published score had a language model's help"
BENCHMARKS = {
    "digits": Benchmark("", "test.jsonl", 0, "micro", "as in training"),
    "mantis-eval": Benchmark("TIGER-Lab/Mantis-Eval", "mantis_eval/test-*.parquet", 217, "micro",
                             "letter, or equal text"),
    "blink": Benchmark("BLINK-Benchmark/BLINK", "*/val-*.parquet", 1901, "macro",
                       "letter; mean over 14 tasks"),
    "mmiu": Benchmark("FanqingM/MMIU-Benchmark", "all.parquet", 11698, "macro",
                      "letter; mean over tasks"),
    "mathvista": Benchmark("AI4Math/MathVista", "data/testmini-*.parquet", 1000, "micro",
                           "option, or number at the row's precision; " + LOWER),
    "mathverse": Benchmark("AI4Math/MathVerse", "testmini.parquet", 3940, "micro",
                           "letter, LaTeX equality; " + LOWER),
    "mathvision": Benchmark("MathLLMs/MathVision", "data/test-*.parquet", 3040, "micro",
                            "letter or option text, LaTeX equality"),
    "remi": Benchmark("mehrankazemi/ReMI", "test.parquet", 2600, "macro",
                      "value within its task's tolerance; mean over 13 tasks"),
    "mv-math": Benchmark("PeijieWang/MV-MATH", "**/MV-MATH.json", 2009, "micro",
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

# ---- Choices: the letter that a free text settles on ---------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBERS = "zero one two three four five six seven eight nine ten".split()
ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth".split()
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?!But\b|However\b)|\n+")  # not behind "B."
# What names an option: a label in front, "(B)", "or C. dogs", "option b".
LABEL = r"\(?([A-Za-z])(?=[).:]|$|,? (?:because|since)\b)"
MARKED = re.compile(
    rf"^{LABEL}|\(([A-Z])\)|(?<=\s)([A-Z])(?=[).:]\s)|"
    r"\b(?i:option|choice|answer)\s*:?\s*\(?([A-Za-z])(?![\w'’])")
# Less surely a bare "B", unless it is the word "a".
BARE = re.compile(
    r"(?<![\w'’$\\^(])"
    r"(?!A\s+(?!(?:is|was|has|and|or|but|as|in|on|because|since|fits|looks|seems|appears|shows|"
    r"matches|would)\b)[a-z])"
    r"([A-HJ-Z])(?![\w'’(^*+-]|/\d)")
# What takes it back: "not A", "closer than A"; "A is not", "A can be ruled out".
NOT_BEFORE = re.compile(
    r"(?:\b(?:not|than|neither|nor|unlike|except|instead of|compared to)|n't)"
    r"(?:\s+(?:the|in|of|option|choice|point|image|box))*\s+\(?$", re.IGNORECASE)
NOT_AFTER = re.compile(
    r"\)?(?:\s+(?!because|since|as|while|and)\w+){0,4}?\s+"
    r"(?:(?:is|are|was|does|do|did|can)\s?n[o']t|cannot|incorrect|wrong|ruled out)\b",
    re.IGNORECASE)

def extract_choice(response: str, options: list[str] | tuple[str, ...] = ("",) * 26) -> str | None:
    """The letter of the option that a response settles on; None if it names none, or two.

    Behind </think>, in this order: what it states as its answer; a first sentence that is labeled
    ("B. Both images"); the one letter marked as in "(B)"; the last sentence that speaks for one.
    """
    text = re.sub(r"[*`\"]+|\\[()]", "", response.rpartition("</think>")[2]).strip()
    if not text or "<think>" in text:
        return None
    texts = {LETTERS[k]: unlabeled(option, k) for k, option in enumerate(options[:26])}
    stated = extract_answer(text) or ""
    named = spoken_for(stated, texts)
    if named or re.search(r"\\boxed|<answer>", text):
        sentences = [stated]
    else:
        sentences = SENTENCE_END.split(without_list(text).strip())
        if re.match(LABEL, sentences[0]):
            sentences = sentences[:1]
    marked = [sentence for sentence in sentences if re.search(r"\([A-Z]\)", sentence)]
    named = set().union(*(spoken_for(sentence, texts) for sentence in marked))
    if len(named) != 1:
        named = set()
        for sentence in reversed(sentences):
            named = named or spoken_for(sentence, texts)
    if not named and len(sentences) == 1:
        named = {letter for letter in texts if same_answer(sentences[0], texts[letter])}
    return named.pop() if len(named) == 1 else None

def unlabeled(option: str, k: int) -> str:
    """The text of option k without its label: "(B) red", 1 -> "red"."""
    return re.sub(rf"^\s*\(?{LETTERS[k]}\s*[).:]\s*", "", option)

def without_list(text: str) -> str:
    """A text less the options that it lists one a line, perhaps with comments: that is no choice."""
    lines = {}
    for letter, line in re.findall(r"(?m)^[^\w\n]*([A-Z])([).:].*)$", text):
        lines.setdefault(letter, line)
    if len(lines) > 1:
        for letter, line in lines.items():
            text = text.replace(letter + line, "", 1)
    return text

def spoken_for(sentence: str, options: dict[str, str]) -> set[str]:
    """Letters of the options that a sentence speaks for: by marked letters, else by option texts,
    else by bare letters. Negated ones do not count; what follows a "but" counts more."""
    wordings = []
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        if canonical(option):
            words = re.escape(canonical(option))
            wordings.append(rf"(?P<{letter}>(?<![\w./{{]){words}(?![\w/]|\.\d))")
    worded = re.compile("|".join(wordings) or r"\b\B")
    for clause in reversed(re.split(r"(?i)\b(?:but|however)\b", plain(sentence))):
        for pattern, text in ((MARKED, clause), (worded, canonical(clause)), (BARE, clause)):
            named = set()
            for match in pattern.finditer(text):
                before = text[max(0, match.start() - 60):match.start()]
                after = text[match.end():match.end() + 100]
                if not NOT_BEFORE.search(before) and not NOT_AFTER.match(after):
                    named.add((match.lastgroup or match[match.lastindex]).upper())
            if named & options.keys():
                return named & options.keys()
    return set()

@functools.lru_cache(maxsize=65536)
def canonical(text: str) -> str:
    """Text to look for option texts in: "the 2nd picture" -> "second image", "three" -> "3"."""
    text = plain(text).casefold()
    for k, (number, ordinal) in enumerate(zip(NUMBERS, ORDINALS)):
        text = re.sub(rf"\b{number}\b", str(k), text)
        text = re.sub(
            rf"\b(?:image #?{k}|(?:{ordinal}|{k}(?:st|nd|rd|th)) (?:1|image|picture|photo|option))"
            r"\b", f"{ordinal} image", text)
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)

# ---- Adapters: a row of a data set -> a question -------------------------------------------------

class Question(NamedTuple):
    """A Sample of perl.py, and what scoring needs beside it. Without an answer: always wrong."""
    sample: Sample
    rule: str                      # how an answer is scored, see grade_row
    options: tuple[str, ...] = ()  # texts of options A, B, ..

def make_question(id, images: list[str], text: str, answer, rule: str, *, options=(), task="",
                  movable: tuple[int, ...] | None = None) -> Question:
    """One <image> an image, missing ones in front. `movable`: images that are the options."""
    text = re.sub(r"<\|\w+\|>", "", text).strip()
    missing = len(images) - text.count("<image>")
    if missing >= 0:
        text = "<image>" * missing + text
    else:
        text = text.replace("<image>", "", -missing)
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    answer = str(answer or "").strip()
    order_rule = "letter" if movable else "never"
    sample = Sample(str(id), tuple(images), text, answer, order_rule, movable, str(task))
    return Question(sample, rule, tuple(map(str, options)))

def show_options(options: list[str]) -> str:
    """A line for each option, for a question whose text does not list them."""
    return "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options))

def listed_options(text: str) -> list[str]:
    """The options in a question's text: "A. 9,14", "(B) red" or "C:2", a line each."""
    label = r"^\s*\(?([A-Z])\s*[).:、．]"
    options = []
    for letter, option, _ in re.findall(rf"(?ms){label}\s*(.*?)\s*(?={label}|\Z)", text):
        if letter == LETTERS[len(options)]:
            options.append(option)
    return options

def image_positions(ordinals: list[str]) -> list[int]:
    """["second", "blue", "third"] -> [1, 2]."""
    return [ORDINALS.index(word) - 1 for word in ordinals if word in ORDINALS]

def option_images(options: list[str], n_images: int, text: str) -> tuple[int, ...] | None:
    """Positions of the images that options name: "the second image", "the third image" -> (1, 2).
    None unless they are the last ones, in order, and the question names none or all of them."""
    named = image_positions([canonical(option).removesuffix(" image") for option in options])
    if len(named) < 2 or named != list(range(n_images - len(options), n_images)):
        return None
    spoken_of = set(image_positions(re.findall(r"(\w+) image\b", canonical(text))))
    if spoken_of & set(named) not in (set(), set(named)):
        return None
    return tuple(named)

def place_tags(text: str, images: list[str]) -> tuple[str, list[str]]:
    """Numbered tags, <image_2> or <image2> -> <image> where an image first stands, <image_k>
    where it is spoken of; images without a tag stand in front. Returns the images in their new
    order."""
    tags = re.findall(r"<image_?(\d+)>", text)
    for k in range(len(images), 0, -1):
        if str(k) not in tags:
            text = f"<image_{k}>{text}"
    order = []  # numbers of the images that have their place

    def new_tag(match) -> str:
        k = int(match[1])
        if k in order:
            return f"<image_{order.index(k) + 1}>"
        if not 1 <= k <= len(images):
            return ""
        order.append(k)
        return "<image>"

    return re.sub(r"<image_?(\d+)>", new_tag, text), [images[k - 1] for k in order]

def from_mantis(row: dict, number: int, place) -> Question:
    """Mantis-Eval: options with or without labels, not in the question's text."""
    images, text, gold = [*map(place, row["images"])], row["question"], row["answer"]
    if row["question_type"] != "multi-choice":
        return make_question(row["id"], images, text, gold, "text", task="short-answer")
    options = [unlabeled(option, k) for k, option in enumerate(row["options"])]
    gold = extract_choice(gold) or re.sub(r"[^A-Za-z]", "", gold)[:1].upper()
    return make_question(
        row["id"], images, text + show_options(options), gold, "choice", options=options,
        task="multi-choice", movable=option_images(options, len(images), text))

def from_blink(row: dict, number: int, place) -> Question:
    """BLINK: up to four images, the prompt lists the options."""
    images = [place(row[f"image_{k}"]) for k in range(1, 5) if row.get(f"image_{k}")]
    asked, choices = row["prompt"].split("Select from the following")[0], row["choices"]
    return make_question(
        row["idx"], images, row["prompt"], row["answer"].strip("() "), "choice", options=choices,
        task=row["sub_task"], movable=option_images(choices, len(images), asked))

def from_mmiu(row: dict, number: int, place) -> Question:
    """MMIU: images are paths; the context repeats the options."""
    images, options = [*map(place, row["input_image_path"])], listed_options(row["options"])
    text, gold = row["question"] + "\n" + row["context"], (row["output"] or "").strip("() ")
    movable = None
    if gold in list(LETTERS[:len(options)]):  # beyond them: no answer is right
        movable = option_images(options, len(images), text.replace(row["options"].strip(), ""))
    return make_question(f"{row['task']}-{number}", images, text, gold, "choice", options=options,
                         task=row["task"], movable=movable)

def from_remi(row: dict, number: int, place) -> Question:
    """ReMI: up to six images, with tags <image1> in the text."""
    images = [place(row[f"image_{k}"]) for k in range(1, 7) if row.get(f"image_{k}")]
    text, images = place_tags(row["question"], images)
    if row["task"] in ("Collisions", "Isomorphism"):
        text += " If it is a yes or no question, answer 0 for no and 1 for yes."
    return make_question(f"{row['task']}-{number}", images, text, row["label"],
                         "remi " + row["task"], task=row["task"])

def from_mv_math(row: dict, number: int, place) -> Question:
    """MV-MATH: tags <image_1>; options in the text, often as images."""
    text, images = place_tags(row["question"], [*map(place, row["input_image"])])
    kind, gold, movable, options = row["answer_type"], row["answer"], None, ()
    if kind == "choice":
        options, gold = listed_options(text) or [""] * 4, extract_choice(gold) or gold
        if {*options} == {"<image>"}:  # the options are images: the last ones
            movable = tuple(range(len(images) - len(options), len(images)))
    rule = {"choice": "choice", "multi-step": "parts"}.get(kind, "text")
    return make_question(row["problem_id"], images, text, gold, rule, options=options, task=kind,
                         movable=movable)

def from_mathvista(row: dict, number: int, place) -> Question:
    """MathVista: the gold of a choice is the option's text, a number has its precision."""
    choices, gold, rule = list(row["choices"] or ()), row["answer"], row["answer_type"]
    if row["question_type"] == "multi_choice":
        rule, gold = "choice", LETTERS[choices.index(gold)] if gold in choices else ""
    elif rule in ("integer", "float"):
        digits = int(row["precision"] or 0) if rule == "float" else 0
        rule = f"number {digits}"
    return make_question(row["pid"], [place(row["decoded_image"])], row["query"], gold, rule,
                         options=choices, task=row["metadata"]["task"])

def from_mathverse(row: dict, number: int, place) -> Question:
    """MathVerse: five versions of a question; in "Vision Only" its text is in the image."""
    text, options, rule = row["question"], (), "text"
    if row["question_type"] == "multi-choice":
        options, rule = listed_options(row.get("question_for_eval") or text) or [""] * 4, "choice"
    return make_question(
        row["sample_index"], [place(row["image"])], text or "Answer the question in the image.",
        row["answer"], rule, options=options, task=row["problem_version"])

def from_mathvision(row: dict, number: int, place) -> Question:
    """MathVision: one image; options, where there are any, not in the question's text."""
    options = list(row["options"] or ())
    return make_question(
        row["id"], [place(row["decoded_image"])], row["question"] + show_options(options),
        row["answer"], "choice" if options else "text", options=options, task=row["subject"])

ADAPTERS = {"mantis-eval": from_mantis, "blink": from_blink, "mmiu": from_mmiu, "remi": from_remi,
            "mv-math": from_mv_math, "mathvista": from_mathvista, "mathverse": from_mathverse,
            "mathvision": from_mathvision}

# ---- Data: from the Hub, or from a local copy of the same files ----------------------------------

def load_benchmark(name: str, args) -> list[Question]:
    """The questions of a benchmark or of a JSONL file of samples; --limit spreads evenly."""
    if name in ADAPTERS:
        folder = find_data(BENCHMARKS[name], args.data_dir)
        rows = read_rows(folder, BENCHMARKS[name].files)
        place = functools.partial(place_image, folder=folder, cache=Path(args.out, ".images"))
    else:
        rows = load_samples(SAMPLES / BENCHMARKS[name].files if name in BENCHMARKS else name)
    n = min(args.limit or len(rows), len(rows))
    questions = []
    for k in (j * len(rows) // n for j in range(n)):
        if name in ADAPTERS:
            questions.append(ADAPTERS[name](rows[k], k, place))
        else:
            questions.append(Question(rows[k], "text"))
    return questions

def find_data(benchmark: Benchmark, data_dir: str) -> Path:
    """The folder of a data set: in --data-dir, or downloaded. Zips in it are unpacked once."""
    folder = Path(data_dir, benchmark.hub.split("/")[1])
    if not data_dir:
        from huggingface_hub import snapshot_download  # needed here only
        wanted = [benchmark.files.removeprefix("**/"), "*.zip"]
        try:
            folder = Path(snapshot_download(benchmark.hub, repo_type="dataset",
                                            allow_patterns=wanted))
        except OSError as error:
            raise SystemExit(f"Could not load {benchmark.hub} ({error}). Without a network, pass "
                             "a folder of local copies: --data-dir FOLDER") from None
    for archive in folder.glob("*.zip"):
        done = folder / archive.stem / ".unpacked"
        if not done.exists():
            shutil.unpack_archive(archive, done.parent)
            done.touch()
    return folder

def read_rows(folder: Path, files: str) -> list[dict]:
    """Rows of parquet or JSON files. Images stay encoded: a broken one must not end the run."""
    from pyarrow import parquet  # needed here only
    rows = []
    for path in sorted(folder.glob(files)):
        if path.suffix == ".json":
            rows += json.loads(path.read_text(encoding="utf-8"))
        else:
            rows += parquet.read_table(path).to_pylist()
    if not rows:
        raise SystemExit(f"no {folder / files}; --data-dir takes the files as the Hub has them")
    return rows

def place_image(image, folder: Path | None, cache: Path) -> str:
    """An image of a row -> a file to open: a path in `folder`, else an RGB copy in `cache`, with
    transparent parts white. What is missing or no image gets the name of no file."""
    if not image:
        return "missing image"
    if isinstance(image, str):
        for place in (folder, *folder.glob("*/")):
            for name in (image, Path(image).name):
                if (place / name).is_file():
                    return str(place / name)
        return str(folder / image)
    content = image["bytes"] or Path(image["path"]).read_bytes()
    target = cache / f"{hashlib.sha1(content).hexdigest()}.png"
    if not target.exists():
        try:
            picture = Image.open(io.BytesIO(content))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            cache.mkdir(parents=True, exist_ok=True)
            temporary = cache / f"{target.stem}-{os.getpid()}.png"
            picture.convert("RGB").save(temporary)
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
        texts = {}
        for label, option in zip(LETTERS, row["options"]):
            texts[label] = option or label
        return letter, letter is not None and texts[letter] == texts.get(gold)  # or a duplicate
    answer = extract_answer(response)
    if answer is None:
        return None, False
    if rule.startswith("remi"):
        return answer, remi_right(rule.split()[1], answer, gold)
    if rule.startswith("number"):
        value, digits = to_number(answer), int(rule.split()[1])
        if value is not None:
            rounded = round(value, digits) if digits else int(value)
            return answer, rounded == float(gold)
    if rule == "list":
        return answer, numbers_in(answer) == numbers_in(gold)
    if rule == "parts":
        return answer, all_parts_right(response, gold)
    return answer, same_answer(answer, gold)

def numbers_in(text: str) -> list[float]:
    """"[2007, 2008.5]" -> [2007.0, 2008.5]."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", plain(text))]

def to_number(text: str) -> float | None:
    r"""The number that an answer is: "$1,234.5", "14 cm", "3/4", "\frac{3}{4}", "50%", "x = 14"."""
    text = re.sub(r"\\[dt]?frac\s*\{?(-?\d+)\}?\s*\{?(\d+)\}?", r"\1/\2", plain(text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[\s$\\{}]", "", text)
    match = re.fullmatch(r"(?:[A-Za-z]\w*[=≈])?([-+]?(?:\d+\.?\d*|\.\d+))(?:/(\d*[1-9]\d*))?"
                         r"(?:[%°]|\^circ|[a-zA-Z²³][\w/^²³.]*)?", text)
    return float(match[1]) / int(match[2] or 1) if match else None

def remi_right(task: str, answer: str, label: str) -> bool:
    """ReMI's own rules: lower case, nothing behind a %, a tolerance for each task."""
    def clean(text: str) -> str:
        return plain(text).lower().split("%")[0].replace("\\", "").strip()

    def bare(text: str) -> str:  # "f(x)" is the function f
        return re.sub(r"^([fgh])x$", r"\1", re.sub(r"[\s()]", "", text))

    answer, label = clean(answer), clean(label)
    if label in ("0", "1"):
        answer = {"yes": "1", "no": "0"}.get(answer, answer)
    if task == "RefCoco":
        return answer in [text.strip() for text in label.split(",")]
    mine, gold = to_number(answer), to_number(label)
    if mine is None or gold is None:
        return bare(answer) == bare(label)
    bounds = {"Clocks": 10, "GeomShape": 0.03 * abs(gold), "GeomCost": 0.03 * abs(gold)}
    return abs(mine - gold) <= bounds.get(task, 0.01 * abs(gold)) + 1e-9

def answer_parts(text: str) -> list[str]:
    """"(1) a; (2) b" -> ["a", "b"]; a text without labels is one part."""
    pieces = re.split(r"[（(]\s*[1-9]\s*[)）]", text)
    return [piece.strip(" ;；,，.。\n") for piece in pieces[1:] or pieces]

def all_parts_right(response: str, gold: str) -> bool:
    """A multi-step question: all its parts, labeled "(1)", "(2)" in the answer or boxed singly."""
    wanted, given = answer_parts(gold), answer_parts(extract_answer(response))
    if len(given) != len(wanted):
        boxes = map(last_boxed, re.split(r"(?=\\boxed)", response))
        given = [box for box in boxes if box]
    return len(given) == len(wanted) and all(map(same_answer, given, wanted))

def picked(row: dict) -> tuple | None:
    """What an answer picks, as positions in the given order: the same whatever order was asked."""
    answer, order, movable = row["answer"] or "", row["order"], row["movable"]
    if row["order_rule"] == "letter":
        letter = extract_choice(answer)
        options = LETTERS[:len(movable)]
        return (order[movable[options.index(letter)]],) if letter and letter in options else None
    if row["order_rule"] in ("index", "sequence"):
        positions = [int(number) - 1 for number in re.findall(r"\d+", answer)]
        if not positions or min(positions) < 0 or max(positions) >= len(order):
            return None
        return tuple(order[position] for position in positions)
    return (plain(answer).casefold(),) if answer else None

# ---- Measures ------------------------------------------------------------------------------------

def average(values: dict[str, list[float]], mean: str = "micro") -> float:
    """{task: a value a question} -> mean over questions, or (macro) over the tasks' means."""
    if mean == "micro":
        values = {"": sum(values.values(), [])}
    return round(statistics.fmean(map(statistics.fmean, values.values())), 6)

def bootstrap(values: dict[str, list[float]], mean: str = "micro", draws=1000) -> list[float]:
    """95 % percentile interval of `average`, questions drawn anew within each task."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(draws)
    n = sum(map(len, values.values()))
    for task in sorted(values):
        column = torch.tensor(values[task], dtype=torch.float32)
        drawn = torch.randint(len(column), (draws, len(column)), generator=generator)
        total += column[drawn].mean(1) * (1 / len(values) if mean == "macro" else len(column) / n)
    return [round(q, 6) for q in torch.quantile(total, torch.tensor([0.025, 0.975])).tolist()]

def summary(column: list[float]) -> dict:
    """Mean, interval and number of a column of values."""
    return {"value": average({"": column}), "interval": bootstrap({"": column}), "n": len(column)}

def order_measures(groups: list[list[dict]]) -> dict:
    """How answers depend on image order: shares of the questions, given their graded rows, one an
    order; orders without a row are wrong. Example: right in 3 of 4 orders -> mean .75, worst 0,
    best 1, bias 1; the same wrong picture picked in all orders -> 0, 0, 0, 0, consistency 1."""
    columns = {name: [] for name in ("mean", "worst", "best", "bias", "consistency")}
    by_place = {}
    for rows in groups:
        n_orders = rows[0]["orders"]
        right = [row["right"] for row in rows] + [False] * (n_orders - len(rows))
        picks = {picked(row) for row in rows}
        columns["mean"].append(sum(right) / n_orders)
        columns["worst"].append(min(right))
        columns["best"].append(max(right))
        columns["bias"].append(max(right) - min(right))
        columns["consistency"].append(
            len(rows) == n_orders and len(picks) == 1 and None not in picks)
        for row in rows:
            if row["order_rule"] in ("letter", "index"):
                right_image, = picked(row | {"answer": row["gold"]})
                place = row["order"].index(right_image) + 1
                by_place.setdefault(place, []).append(row["right"])
    measures = {name: summary(column) for name, column in columns.items()}
    measures["by_position"] = {str(place): summary(by_place[place]) for place in sorted(by_place)}
    return measures

def graded_groups(folder: Path) -> list[list[dict]]:
    """samples.jsonl, graded: the rows of each question in the order of asking; questions by id."""
    groups = {}
    for row in read_lines(folder / "samples.jsonl"):
        row["answer"], row["right"] = (None, False) if row["error"] else grade_row(row)
        groups.setdefault(row["id"], {})[row["k"]] = row
    ordered = []
    for _, by_order in sorted(groups.items()):
        ordered.append([by_order[k] for k in sorted(by_order)])
    return ordered

def score(folder: Path) -> dict:
    """Grade a run folder and write results.json, a function of config.json and samples.jsonl."""
    config = json.loads((folder / "config.json").read_text())
    benchmark = BENCHMARKS.get(config["benchmark"], BENCHMARKS["digits"])
    groups = graded_groups(folder)
    rows = sum(groups, [])
    as_given = {task: [] for task in config["tasks"]}
    for first, *_ in groups:
        as_given[first["task"]].append(first["k"] == 0 and first["right"])
    for task, n in config["tasks"].items():
        as_given[task] += [False] * (n - len(as_given[task]))  # without a row: wrong
    permuted = [group for group in groups if group[0]["orders"] > 1]
    result = {
        "score": average(as_given, benchmark.mean),
        "interval": bootstrap(as_given, benchmark.mean),
        "mean": benchmark.mean,
        "micro": average(as_given),
        "n": config["n"],
        "expected": benchmark.rows or config["n"],
        "missing": config["n"] - len(groups),
        "responses": len(rows),
        "errors": sum(bool(row["error"]) for row in rows),
        "unparsed": sum(row["answer"] is None and not row["error"] for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "tasks": {task: summary(as_given[task]) for task in sorted(as_given)},
        "orders": order_measures(permuted) if permuted else None,
        "never_permuted": config["never"],
        "scoring": benchmark.scoring,
        "config": config,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    write_atomic(folder / "results.json", json.dumps(result, indent=1))
    return result

# ---- Asking the model ----------------------------------------------------------------------------

KEPT_SETTINGS = "instruction max_pixels max_new_tokens rollout_batch dtype cpu_threads".split()

def settings(args) -> Config:
    """Config of perl.py for evaluation. A checkpoint of a run keeps that run's prompt and sizes."""
    chosen = dict(MODEL_PRESETS.get(args.model, {}))
    run = Path(args.model).parent / "config.json"
    if Path(args.model).name.startswith("checkpoint-") and run.exists():
        saved = json.loads(run.read_text())
        chosen = {name: saved[name] for name in KEPT_SETTINGS}
    typed = {"max_new_tokens": args.max_new_tokens, "rollout_batch": args.batch}
    chosen |= {name: value for name, value in typed.items() if value}
    return Config(**chosen | {
        "model": args.model, "max_prompt_tokens": 16384, "gradient_checkpointing": False})

def fixed_chunks(samples: list[Sample], orders: list[list], processor,
                 cfg: Config) -> tuple[list[list[int]], list[str]]:
    """Sample numbers in batches, and for each sample why it cannot be asked (empty if it can).

    Batches depend on samples and settings only. All orders of a sample share one, which encodes its
    images once. At most cfg.rollout_batch sequences and 400,000 tokens, padded, or one sample.
    """
    chunks, problems, size, longest = [], [], 0, 0
    for k, sample in enumerate(samples):
        length, problem = 0, ""
        try:
            length = prompt_length(sample, processor)
        except (OSError, SyntaxError, ValueError) as error:
            problem = f"image: {error}"
        if length > cfg.max_prompt_tokens:
            length, problem = 0, f"{length} tokens"
        problems.append(problem)
        size, longest = size + len(orders[k]), max(longest, length)
        tokens = size * (longest + cfg.max_new_tokens)
        if not chunks or size > cfg.rollout_batch or tokens > 400_000:
            chunks.append([])
            size, longest = len(orders[k]), length
        chunks[-1].append(k)
    return chunks, problems

def answer_chunk(model, processor, chunk: list[int], questions: list[Question], orders: list[list],
                 problems: list[str], cfg: Config) -> list[dict]:
    """Ask the questions of a chunk in all their orders: lines of samples.jsonl."""
    able = [k for k in chunk if not problems[k]]
    groups = []
    if able:
        groups = sample_groups(model, processor, [questions[k].sample for k in able],
                               [orders[k] for k in able], 1, cfg, greedy=True)
    answered = dict(zip(able, groups))
    rows = []
    for k in chunk:
        sample, rule, options = questions[k]
        for j, order in enumerate(orders[k]):
            rollout = answered[k][j] if k in answered else None
            rows.append({
                "id": sample.id, "k": j, "order": order, "orders": len(orders[k]),
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

def describe_run(name: str, samples: list[Sample], cap: int, weights: str, cfg: Config,
                 args) -> dict:
    """config.json: everything that an answer depends on, and the sizes that scores are shares of."""
    content = json.dumps([[s.id, s.question, s.answer] for s in samples])
    tasks = [sample.source for sample in samples]
    config = {
        "model": args.model, "weights": weights, "benchmark": name, "n": len(samples),
        "limit": args.limit, "orders": cap,
        "never": sum(sample.order_rule == "never" for sample in samples),
        "tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
        "questions": hashlib.sha1(content.encode()).hexdigest()}
    for key in KEPT_SETTINGS[:4]:
        config[key] = getattr(cfg, key)
    return config

def run_benchmark(name: str, model, processor, weights: str, cfg: Config, args, folder: Path,
                  accelerator: Accelerator) -> None:
    """Ask all questions of a benchmark to which the folder has no answers yet."""
    with accelerator.main_process_first():
        questions = load_benchmark(name, args)
    samples = [question.sample for question in questions]
    if len({sample.id for sample in samples}) < len(samples):
        raise SystemExit(f"{name}: two questions have the same id")
    cap = args.orders or (24 if name == "digits" else 1)
    orders = [all_orders(sample, cap) for sample in samples]
    config = describe_run(name, samples, cap, weights, cfg, args)
    done = open_folder(folder, config, accelerator)
    chunks, problems = fixed_chunks(samples, orders, processor, cfg)
    todo = []
    for chunk in chunks:
        wanted = {(samples[k].id, j) for k in chunk for j in range(len(orders[k]))}
        if not wanted <= done:
            todo.append(chunk)
    world, rank = accelerator.num_processes, accelerator.process_index
    for start in tqdm(range(0, len(todo), world), name, disable=not accelerator.is_main_process):
        chunk = todo[start + rank] if start + rank < len(todo) else []
        rows = gather_object(
            answer_chunk(model, processor, chunk, questions, orders, problems, cfg))
        if accelerator.is_main_process:
            with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

def run_benchmarks(args, out: Path, accelerator: Accelerator) -> None:
    """Load the model and ask it the questions of all benchmarks chosen."""
    cfg = settings(args)
    if cfg.cpu_threads:
        torch.set_num_threads(cfg.cpu_threads)
    processor = load_processor(args.model, cfg)
    model = load_model(args.model, cfg, accelerator.device)
    digest = hashlib.sha1()  # other weights under the same path are another run
    for weight in model.parameters():
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    for name in args.benchmarks:
        run_benchmark(name, model, processor, digest.hexdigest(), cfg, args,
                      out / Path(name).stem, accelerator)

# ---- Tables, comparison -------------------------------------------------------------------------

def percent(value: float, interval=()) -> str:
    """0.5, (0.4, 0.6) -> "50.0 [40.0, 60.0]"."""
    bounds = " [{:.1f}, {:.1f}]".format(*(100 * bound for bound in interval)) if interval else ""
    return f"{100 * value:.1f}{bounds}"

def table(rows: list[list]) -> str:
    """Rows, the first a heading, as an aligned Markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)

def report(results: dict[str, dict], model: str) -> str:
    """The tables of a model: its scores, its dependence on order, the paper's rows beside it."""
    counts = ["errors", "unparsed", "truncated"]
    scores = [["benchmark", "accuracy, % [95 %]", "n", *counts, "scoring"]]
    orders = [["benchmark", "questions", "never", "mean", "worst order", "best order",
               "bias [95 %]", "same choice", "by position of the right image"]]
    for name, r in results.items():
        n = f"{r['n'] - r['missing']} of {r['expected']}"
        scores.append([name, percent(r["score"], r["interval"]), n,
                       *(r[count] for count in counts), r["scoring"]])
        o = r["orders"]
        if o:
            places = [f"{k}: {percent(place['value'])}" for k, place in o["by_position"].items()]
            orders.append([
                name, o["bias"]["n"], r["never_permuted"], percent(o["mean"]["value"]),
                percent(o["worst"]["value"]), percent(o["best"]["value"]),
                percent(o["bias"]["value"], o["bias"]["interval"]),
                percent(o["consistency"]["value"]), " ".join(places)])
    text = f"{model}\n\n{table(scores)}"
    if len(orders) > 1:
        text += f"\nImage order, over the questions that may be permuted:\n\n{table(orders)}"
    columns = [name for name in PAPER_COLUMNS if name in results]
    if columns:
        text += f"\nBeside the paper's scores:\n\n{table(paper_rows(columns, results, model))}"
    return text

def paper_rows(columns: list[str], results: dict[str, dict], model: str) -> list[list[str]]:
    """The paper's scores of these benchmarks, and ours below them."""
    rows = [["model", *columns]]
    for name, published in PAPER.items():
        rows.append([name] + [f"{published[PAPER_COLUMNS.index(c)]:.2f}" for c in columns])
    ours, sizes = [f"{model} (ours)"], ["n (ours)"]
    for column in columns:
        ours.append(percent(results[column]["score"], results[column]["interval"]))
        sizes.append(results[column]["n"])
    return rows + [ours, sizes]

def compare(folder_a: Path, folder_b: Path) -> str:
    """Paired differences B - A of each benchmark, over the questions that both runs answered."""
    heading = ["benchmark", "n", "A", "B", "B - A [95 %]", "mean over orders", "worst order"]
    rows = [heading]
    for folder in sorted(path.parent for path in folder_a.glob("*/samples.jsonl")):
        mean = BENCHMARKS.get(folder.name, BENCHMARKS["digits"]).mean
        in_b = {group[0]["id"]: group for group in graded_groups(folder_b / folder.name)}
        columns, n = [{}, {}, {}, {}, {}], 0  # A, B, and the gains; {task: a value a question}
        for group in graded_groups(folder):
            if group[0]["id"] not in in_b:
                continue
            a = [row["right"] for row in group]
            b = [row["right"] for row in in_b[group[0]["id"]]]
            gains = b[0] - a[0], sum(b) / len(b) - sum(a) / len(a), min(b) - min(a)
            for column, value in zip(columns, (a[0], b[0], *gains)):
                column.setdefault(group[0]["task"], []).append(value)
            n += 1
        if n:
            cells = [percent(average(column, mean)) for column in columns[:2]]
            for gain in columns[2:]:
                cells.append(percent(average(gain, mean), bootstrap(gain, mean)))
            rows.append([folder.name, n, *cells])
    if len(rows) == 1:
        raise SystemExit(f"{folder_a} and {folder_b} share no answers; name folders of eval_runs/")
    return f"A = {folder_a}\nB = {folder_b}\n\n{table(rows)}"

# ---- --step-cost: what a training step costs, with and without sharing ---------------------------

QWEN_7B = Qwen2_5_VLConfig(
    text_config=dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                     num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    vision_config=dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584))

class StepShape(NamedTuple):
    """The made-up question whose step is measured."""
    images: int
    image_tokens: int  # of each image
    text_tokens: int   # the other tokens of the prompt, one in front of each image

def full_rollouts(cfg: Config, shape: StepShape, vision, text_id: int, image_id: int) -> list:
    """All rollouts of the made-up question, of full length."""
    side = math.isqrt(shape.image_tokens)
    while shape.image_tokens % side:
        side -= 1  # of all grids, the one nearest to a square
    grid = torch.tensor([[1, 2 * side, 2 * shape.image_tokens // side]])  # in patches
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    pictures = []
    for _ in range(shape.images):
        pixels = torch.randn(4 * shape.image_tokens, width)
        pictures.append(perl.Picture(pixels, grid, shape.image_tokens))
    ids = ([text_id] + [image_id] * shape.image_tokens) * shape.images
    ids += [text_id] * (shape.text_tokens - shape.images)
    rollouts = []
    for _ in range(cfg.n_permutations + 1):
        prompt = perl.Prompt(None, ids, pictures)
        for k in range(cfg.rollouts_per_order):
            rollouts.append(perl.Rollout(prompt, (), "", [text_id] * cfg.max_new_tokens, "", True,
                                         advantage=(-1.0) ** k))
    return rollouts

def count_flops(config, cfg: Config, shape: StepShape) -> tuple[dict, dict]:
    """FLOPs of a step by part, and their minimum: each image and prompt once, each response token
    once in sampling, forward and backward in the loss, only pairs of tokens that are seen.

    Those of the vision tower are torch's count on a model without weights, the others arithmetic;
    a test holds the whole to torch's count of a real step. A backward pass costs two forward."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    rollouts = full_rollouts(cfg, shape, config.vision_config, 0, 1)
    prompt = rollouts[0].prompt
    B, T, L, P = len(rollouts), cfg.max_new_tokens, len(prompt.ids), cfg.n_permutations + 1
    layers = model.model.language_model.layers
    token = 2 * sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    pair = 4 * config.text_config.hidden_size * len(layers)  # a token that sees another
    head = 2 * model.lm_head.weight.numel()                  # the logits of a token

    pixels = prompt.pictures[0].pixels.to("meta")
    places = torch.empty(len(pixels), 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        seen = model.model.visual(pixels, prompt.pictures[0].grid, position_ids=places)
        forward = shape.images * counter.get_total_flops()
        seen.pooler_output.sum().backward()
        both = shape.images * counter.get_total_flops()
    batches = perl.micro_batches(rollouts, cfg)
    prompts_at_once = min(cfg.rollout_batch // cfg.rollouts_per_order,
                          4 * cfg.max_tokens_per_micro_batch // L)
    calls = math.ceil(P / max(prompts_at_once, 1))
    vision = B * (forward + both)
    if cfg.share:  # once in each call of generate, and in each micro-batch of the loss
        vision = calls * forward + len(batches) * both
    if cfg.share:  # each prompt once, less its last token; T steps, of which the first reads that
        prefill, steps, seen = P * (token * (L - 1) + pair * (L - 1) ** 2), T, L - 1
    else:          # each rollout's prompt, which gives the first token
        prefill, steps, seen = B * (token * L + pair * L ** 2), T - 1, L
    pairs = steps * seen + steps * (steps + 1) / 2
    decode = B * (steps * token + pairs * pair + T * head)
    loss = 0
    for batch in batches:
        rows = perl.pack(batch, cfg)
        longest = max(map(perl.row_length, rows))
        if len(batch) > len(rows):  # a prompt sees itself, a response the prompt and itself
            pairs = len(rows) * L ** 2 + len(batch) * T * (L + T)
        else:
            pairs = len(rows) * longest ** 2
        loss += 3 * (len(rows) * longest * token + pairs * pair)
        loss += 4 * len(batch) * T * head  # logits are made again in the backward pass
    flops = {"vision": float(vision), "prefill": float(prefill), "decode": float(decode),
             "loss": float(loss)}
    prompts = P * (token * L + pair * L * (L + 1) / 2)
    responses = B * T * (token + pair * (L + (T + 1) / 2) + head)
    return flops, {"vision": float(forward + both), "prefill": prompts, "decode": responses,
                   "loss": 3 * (prompts + responses)}

def time_step(cfg: Config, shape: StepShape) -> dict[str, float]:
    """Seconds of sampling and update, and the peak memory of this process in MB."""
    transformers.logging.disable_progress_bar()
    if cfg.cpu_threads:
        torch.set_num_threads(cfg.cpu_threads)
    accelerator, n = Accelerator(), cfg.rollouts_per_order
    processor = load_processor(cfg.model, cfg)
    processor.banned_ids += processor.eos_ids  # responses of full length
    model = load_model(cfg.model, cfg, accelerator.device)
    text_id = processor.tokenizer("a").input_ids[0]
    vision = model.config.vision_config
    rollouts = full_rollouts(cfg, shape, vision, text_id, processor.image_id)
    prompts = [rollout.prompt for rollout in rollouts[::n]]
    start = time.time()
    responses = perl.generate(model, processor, prompts, n, cfg)
    sampled = time.time()
    for rollout, ids in zip(rollouts, sum(responses, [])):
        rollout.ids = ids
    optimizer = perl.SplitAdamW(model, cfg, accelerator)
    perl.update(model, None, optimizer, processor, [rollouts], cfg, accelerator)
    return {"sample": sampled - start, "update": time.time() - sampled,
            "peak_mb": 1e3 * perl.peak_gb()}

def time_apart(cfg: Config, shape: StepShape) -> dict[str, float]:
    """time_step in a process of its own, whose peak memory is the step's. It runs in a session of
    its own: a terminal's Ctrl-C reaches this process only, which then ends that one."""
    job = json.dumps([vars(cfg), shape])
    done = subprocess.run([sys.executable, __file__, "--time-step", job], stdout=subprocess.PIPE,
                          text=True, start_new_session=True)
    if done.returncode:
        raise SystemExit("--step-cost: the step that was timed did not end well; see above")
    return json.loads(done.stdout.splitlines()[-1])

def step_cost(args, perl_flags: list[str]) -> None:
    """Print FLOPs at the model's size (tiny: at that of the 7B), and seconds and memory here."""
    shape = StepShape(args.benchmark_images, args.benchmark_image_tokens, args.benchmark_text_tokens)
    if min(shape) < 1 or shape.text_tokens <= shape.images:
        raise SystemExit(f"--step-cost: {shape} is no prompt; it takes one image or more, of one "
                         "token or more, and more text tokens than images")
    cfg = perl.parse_config([
        "--model", args.model, "--max-new-tokens", str(args.max_new_tokens or 256),
        "--max-tokens-per-micro-batch", "16384", "--updates-per-step", "1", "--beta", "0",
        "--no-gradient-checkpointing", *perl_flags])
    if cfg.max_new_tokens < 3:
        raise SystemExit("--step-cost: --max-new-tokens must be 3 or more")
    config = QWEN_7B if cfg.model == "tiny" else perl.load_pretrained(AutoConfig, cfg.model)
    ways = {"shared": dataclasses.replace(cfg, share=True),
            "plain": dataclasses.replace(cfg, share=False)}
    runs = {"shared": [], "plain": []}
    for way in tqdm([*ways] * 3, "time"):  # in turn: a busy machine is busy for both
        runs[way].append(time_apart(ways[way], shape))
    parts, row = {}, {}  # parts: {"flops_shared": {"vision": .., ..}, ..}
    for way in ways:
        middle = {name: statistics.median(run[name] for run in runs[way]) for name in runs[way][0]}
        row[f"peak_mb_{way}"] = middle.pop("peak_mb")
        parts[f"seconds_{way}"] = middle
        parts[f"flops_{way}"], parts["flops_minimum"] = count_flops(config, ways[way], shape)
    for name, values in parts.items():
        row[name] = sum(values.values())
        for part, value in values.items():
            row[f"{name}_{part}"] = value
    for name in row:
        if "_shared" in name:
            shared, plain = row[name], row[name.replace("shared", "plain")]
            print(f"{name:24} {shared:10.4g}   plain {plain:10.4g}   ratio {shared / plain:.3f}")
    print(f"FLOPs / minimum: {row['flops_shared'] / row['flops_minimum']:.3f}\n{json.dumps(row)}")

# ---- Main ----------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and with --step-cost what is left of it for perl.py."""
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
    add("--step-cost", action="store_true", help="FLOPs, seconds and memory of a training step "
        "with and without sharing; takes perl.py's settings too, such as --n-permutations")
    add("--benchmark-images", type=int, default=4, help="step cost: images of its question")
    add("--benchmark-image-tokens", type=int, default=256, help="step cost: tokens of each image")
    add("--benchmark-text-tokens", type=int, default=64, help="step cost: other prompt tokens")
    add("--time-step", default="", help=argparse.SUPPRESS)
    args, perl_flags = parser.parse_known_args(argv)
    if perl_flags and not args.step_cost:
        parser.error(f"unknown: {' '.join(perl_flags)}")
    chosen = args.benchmarks.split(",")
    if "all" in chosen:
        place = chosen.index("all")
        chosen[place:place + 1] = PAPER_COLUMNS
    for name in chosen:
        if name not in BENCHMARKS and not name.endswith(".jsonl"):
            parser.error(f"--benchmarks {name}: none of all, {', '.join(BENCHMARKS)}, *.jsonl")
    args.benchmarks = chosen
    return args, perl_flags

def main(argv: list[str] | None = None) -> None:
    """Compare, or measure a step, or ask the model and report."""
    args, perl_flags = parse_args(argv)
    if args.compare:
        print(compare(*map(Path, args.compare)))
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.time_step:
        cfg, shape = json.loads(args.time_step)
        print(json.dumps(time_step(Config(**cfg), StepShape(*shape))))
        return
    try:
        if args.step_cost:
            step_cost(args, perl_flags)
        else:
            evaluate_and_report(args)
    except KeyboardInterrupt:
        what = "nothing is kept" if args.step_cost else "the same command goes on"
        raise SystemExit(f"\ninterrupted; {what}") from None

def evaluate_and_report(args) -> None:
    """Answers to all benchmarks chosen, unless --score-only; then scores and tables."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # what is there of an image is shown
    accelerator = Accelerator()
    parts = Path(args.model).parts
    name = "-".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
    out = Path(args.out, name)  # RUN/checkpoint-100 -> RUN-checkpoint-100
    if not args.score_only:
        run_benchmarks(args, out, accelerator)
    if accelerator.is_main_process:
        folders = sorted(path.parent for path in out.glob("*/config.json"))
        if not folders:
            raise SystemExit(f"{out} holds no responses; run without --score-only first")
        results = {folder.name: score(folder) for folder in folders}
        text = report(results, name)
        write_atomic(out / "summary.md", text)
        print(text)

if __name__ == "__main__":
    main()
