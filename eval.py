#!/usr/bin/env python3
"""Measure a model on the paper's eight benchmarks and two more, and what order does.

    python eval.py                                         # tiny, data_samples/, CPU
    python eval.py --model Qwen2.5-VL-7B --benchmarks all  # one GPU; MMIU has 25 GB
    python eval.py --step-cost                             # of a training step

Greedy, with the prompt and the grader of training; what cannot be read, asked or parsed
is wrong. eval_runs/MODEL/BENCHMARK/ holds all of it; after a kill the same command goes on.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageFile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import perl
from perl import (LETTERS, MODEL_PRESETS, SAMPLES, Config, Sample, all_orders, extract_answer,
                  last_boxed, permute, plain, prompt_length, same_answer, sample_groups)

class Benchmark(NamedTuple):
    """Where a benchmark's rows are, how many there are, and how its score is made."""
    hub: str      # data set on the Hub; --data-dir holds it under the name behind "/"
    files: str    # its rows
    rows: int     # 0: any number
    scoring: str
    paper: tuple = ("", "")  # the paper's Qwen2.5-VL-7B and PeRL (n_s = 1)
    mean: str = "questions"  # what the score is a mean over, or "tasks"
    has_paths: bool = False  # images are files, zipped or not

LOWER = "below judged: only rules, where a language model read for the published score"
BENCHMARKS = {
    "digits": Benchmark("", "test.jsonl", 0, "as in training"),
    "mantis-eval": Benchmark("TIGER-Lab/Mantis-Eval", "mantis_eval/test-*.parquet", 217,
                             "10 of the paper's 12 scores are k/216", (70.80, 76.39)),
    "blink": Benchmark("BLINK-Benchmark/BLINK", "*/val-*.parquet", 1901, "letter", (55.23, 58.53)),
    "mmiu": Benchmark("FanqingM/MMIU-Benchmark", "all.parquet", 11698, "letter",
                      (52.00, 54.23), mean="tasks", has_paths=True),
    "mathvista": Benchmark("AI4Math/MathVista", "data/testmini-*.parquet", 1000,
                           "rows' precision; " + LOWER, (68.20, 73.00)),
    "mathverse": Benchmark("AI4Math/MathVerse", "testmini.parquet", 3940,
                           "unit optional; " + LOWER, (46.30, 49.56)),
    "mathvision": Benchmark("MathLLMs/MathVision", "data/test-*.parquet", 3040,
                            "unit optional; " + LOWER, (25.07, 28.26)),
    "remi": Benchmark("mehrankazemi/ReMI", "test.parquet", 2600,
                      "value within its task's tolerance", (36.38, 43.38), mean="tasks"),
    "mv-math": Benchmark("PeijieWang/MV-MATH", "**/MV-MATH.json", 2009,
                         "all parts; " + LOWER, (20.41, 25.68), has_paths=True),
    "muirbench": Benchmark("MUIRBENCH/MUIRBENCH", "data/test-*.parquet", 2600, "letter"),
    "medframeqa": Benchmark("SuhaoYu1020/MedFrameQA", "**/test-*.parquet", 2851, "letter")}

# ---- Choices: the letter that a free text settles on -----------------------------------

NUMBERS = "zero one two three four five six seven eight nine ten".split()
ORDINALS = "- first second third fourth fifth sixth seventh eighth ninth tenth".split()
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?!But\b|However\b)|\n+")
# What names an option: a label in front, "(B)", "or C. dogs", "option b".
LABEL = r"\(?([A-Za-z])(?=[).:]|$|,? (?:because|since)\b)"
MARKED = re.compile(rf"^{LABEL}|\(([A-Z])\)|(?<=\s)([A-Z])(?=[).:]\s)|"
                    r"\b(?i:option|choice|answer)\s*:?\s*\(?([A-Z]|[a-z](?!\s\w))(?![\w'’])")
# Less surely a bare "B", unless it is the word "a" ("A unique ..."), or part of "N/A".
BARE = re.compile(
    r"(?<![\w'’$\\^(/])(?!A\s+(?!(?:is|was|has|and|or|but|as|in|on|because|since|fits|looks|"
    r"seems|appears|shows|matches|would)\b)[a-z])([A-HJ-Z])(?![\w'’(^*+-]|/)")
# What takes it back: "not A", "closer than A"; "A is not", "A can be ruled out".
NOT_BEFORE = re.compile(
    r"(?i)(?:\b(?:not|than|neither|nor|unlike|except|instead of|compared to)|n't)"
    r"(?:\s+(?:the|in|of|option|choice|point|image|box))*\s+\(?$")
NOT_AFTER = re.compile(
    r"(?i)\)?(?:,[^,]*,)?(?:\s+(?!because|since|as|while|and)\w+){0,4}?\s+"
    r"(?:(?:is|are|was|does|do|did|can)\s?n[o']t|cannot|incorrect|wrong|ruled out|too)\b")
# A sentence that claims what was asked for, or concludes, beats one that compares.
CLAIM = re.compile(
    r"(?i)\b(?:therefore|thus|hence|in conclusion|closer|closest|nearer|nearest|best|most|"
    r"more accurate(?:ly)?|correct(?:ly)?|fits?|match(?:es)?)\b(?!.*\bon the other hand\b)")
REFUSAL = re.compile(
    r"(?i)^\W*(?:N/A|none|unknown)\b|\bno (?:correct |right )?answer\b|\b(?:cannot|can't|"
    r"could not|unable to|not possible to) (?:be )?(?:determine|tell|see|view|answer|say|identify)")

def extract_choice(response: str, options=("",) * 26) -> str | None:
    """The letter of the option that a response settles on behind </think>, or None."""
    text = re.sub(r"[*`\"]+|\\[()]", "", response.rpartition("</think>")[2]).strip()
    if not text or "<think>" in text:
        return None
    texts = {LETTERS[k]: unlabeled(option, k) for k, option in enumerate(options[:26])}
    stated = extract_answer(text) or ""
    named = spoken_for(stated, texts)
    if not named and re.search(r"\\boxed|<answer>", text):
        named = {letter for letter in texts if same_answer(stated, texts[letter])}
    elif not named:
        named = read_prose(text, texts)
    return min(named) if len(named) == 1 else None

def read_prose(text: str, options: dict[str, str]) -> set[str]:
    """Letters of a text that states no answer: of a labeled first sentence ("B. Both"); the one
    marked as in "(B)"; of the last sentence that claims an option, or that names one."""
    sentences = SENTENCE_END.split(without_list(text).strip())
    if re.match(LABEL, sentences[0]):
        sentences = sentences[:1]
    marked = set()
    for sentence in sentences:
        if re.search(r"\([A-Z]\)", sentence):
            marked |= spoken_for(sentence, options)
    if len(marked) == 1:
        return marked
    claims = list(filter(CLAIM.search, sentences))
    readings = (spoken_for(sentence, options) for sentence in claims[::-1] + sentences[::-1])
    return next(filter(None, readings), set())

def unlabeled(option: str, k: int) -> str:
    """The text of option k without its label: "(B) red", 1 -> "red"; "(B)" -> ""."""
    option = re.sub(rf"^\s*\(?{LETTERS[k]}\s*[).:]\s*", "", option)
    return "" if option == LETTERS[k] else option

def without_list(text: str) -> str:
    """A text less the options that it lists one a line: that is no choice."""
    first = {}  # letter -> the first line that it labels
    for line in re.finditer(r"(?m)^[^\w\n]*([A-Z])[).:].*$", text):
        first.setdefault(line[1], line[0])
    for line in first.values() if len(first) > 1 else ():
        text = text.replace(line, "", 1)
    return text

def spoken_for(sentence: str, options: dict[str, str]) -> set[str]:
    """Letters of the options that a sentence speaks for, first of all behind a "but"."""
    wordings = [r"\b\B"]  # nothing
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        words = re.escape(canonical(option))
        if words:
            wordings.append(rf"(?P<{letter}>(?<![\w./{{]){words}(?![\w/]|\.\d))")
    worded = re.compile("|".join(wordings))
    for clause in reversed(re.split(r"(?i)\b(?:but|however)\b", plain(sentence))):
        readings = [(MARKED, clause), (worded, canonical(clause)), (BARE, clause)]
        if REFUSAL.search(clause):  # unless an option says so
            readings = readings[1:2]
        for pattern, text in readings:
            named = affirmed(pattern, text) & options.keys()
            if named:
                return named
    return set()

def affirmed(pattern: re.Pattern, text: str) -> set[str]:
    """Letters that a pattern finds in a text, less those that the text takes back."""
    letters = set()
    for match in pattern.finditer(text):
        before = text[max(0, match.start() - 60):match.start()]
        after = text[match.end():match.end() + 100]
        if not NOT_BEFORE.search(before) and not NOT_AFTER.match(after):
            letters.add((match.lastgroup or match[match.lastindex]).upper())
    return letters

@functools.lru_cache(maxsize=65536)
def canonical(text: str) -> str:
    """To find option texts in: "the 2nd picture" -> "second image", "three" -> "3"."""
    text = plain(text).casefold()
    for k, (number, ordinal) in enumerate(zip(NUMBERS, ORDINALS)):
        text = re.sub(rf"\b{number}\b", str(k), text)
        place = rf"(?:{ordinal}|{k}(?:st|nd|rd|th)) (?:1|image|picture|photo|option)"
        text = re.sub(rf"\b(?:image #?{k}|{place})\b", f"{ordinal} image", text)
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)

# ---- Adapters: a row of a data set -> a question ---------------------------------------

class Question(NamedTuple):
    """A Sample of perl.py, and what scoring needs beside it."""
    sample: Sample                 # without an answer: always wrong
    rule: str                      # how an answer is scored, see grade_row
    options: tuple[str, ...] = ()  # texts of options A, B, ..; empty for images
    turn: int = 0                  # by how many places the options are rotated
    orders: tuple = ()             # of the images, to ask it in
    problem: str = ""              # why it cannot be asked

def make_question(id, images, text, answer, rule, options=(), task="") -> Question:
    """One <image> an image, missing ones in front. Images that are options may move."""
    text = re.sub(r"<\|\w+\|>", "", text).strip()
    surplus = text.count("<image>") - len(images)
    text = "<image>" * -surplus + text.replace("<image>", "", max(surplus, 0))
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    answer, movable = str(answer or "").strip(), None
    if answer in list(LETTERS[:len(options)]):
        movable = option_images(list(options), len(images), text)
    texts = tuple("" if "<image" in str(option) else str(option) for option in options)
    order_rule = "letter" if movable else "never"
    sample = Sample(str(id), tuple(images), text, answer, order_rule, movable, str(task))
    return Question(sample, rule, texts)

def show_options(options: list[str]) -> str:
    """A line for each option, for a question whose text does not list them."""
    return "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options))

def option_spans(text: str) -> list[tuple[int, int]]:
    """Where the options stand that a text lists last, a line each: "A. 9,14", "(B) red",
    "C:2" or a letter alone; what a page break left behind them is cut off."""
    end = re.search(r"\s*(?:^(?:#|Page \d).*)?\Z", text, re.MULTILINE | re.DOTALL).start()
    labels = []
    for label in re.finditer(r"(?m)^\s*\(?([A-Z])(?:\s*[).:、．]|\s*$)\s*", text[:end]):
        if label[1] == "A":
            labels = [label]  # statements listed before are no options
        elif label[1] == LETTERS[len(labels)]:
            labels.append(label)
    stops = [label.start() for label in labels[1:]] + [end]
    return [(label.end(), len(text[:stop].rstrip())) for label, stop in zip(labels, stops)]

def listed_options(text: str) -> list[str]:
    """The texts of these options."""
    return [text[start:stop] for start, stop in option_spans(text)]

def option_images(options: list[str], n_images: int, text: str) -> tuple[int, ...] | None:
    """Positions of the images that are the options: the last ones, if all options are
    "<image>" or name them in order ("the second image") and the question none or all."""
    first = n_images - len(options)
    if len(options) < 2 or first < 0:
        return None
    if options != ["<image>"] * len(options):
        spans = option_spans(text)
        asked = canonical(text[:spans[0][0]] if spans else text)
        named = [canonical(option).removesuffix(" image") for option in options]
        spoken_of = [name for name in named if f"{name} image" in asked]
        if named != ORDINALS[first + 1:n_images + 1] or spoken_of not in ([], named):
            return None
    return tuple(range(first, n_images))

def rotate(question: Question, turn: int) -> Question | None:
    """The question, its options `turn` places on; None if its text does not list them."""
    sample, options = question.sample, question.options
    text, gold = sample.question, sample.answer
    letters = LETTERS[:len(options)]
    if listed_options(text) != list(options) or gold not in list(letters):
        return None
    rotated = options[turn:] + options[:turn]
    for (start, stop), option in zip(option_spans(text)[::-1], rotated[::-1]):
        text = text[:start] + option + text[stop:]
    gold = letters[letters.index(gold) - turn]
    sample = dataclasses.replace(sample, question=text, answer=gold, order_rule="never")
    return question._replace(sample=sample, options=rotated, turn=turn)

def place_tags(text: str, images: list[str]) -> tuple[str, list[str]]:
    """Numbered tags (<image_2>, <image2>) -> <image> where an image first stands, <image_k>
    where it is spoken of; images without a tag in front. With the images in that order."""
    for k in range(len(images), 0, -1):
        if not re.search(rf"<image_?{k}>", text):
            text = f"<image_{k}>{text}"
    order = []  # numbers of the images that have their place
    def new_tag(match) -> str:
        k = int(match[1])
        if k not in order and 1 <= k <= len(images):
            order.append(k)
            return "<image>"
        return f"<image_{order.index(k) + 1}>" if k in order else ""
    return re.sub(r"<image_?(\d+)>", new_tag, text), [images[k - 1] for k in order]

def numbered_images(row: dict, place) -> list[str]:
    """The images of columns image_1, image_2 .., which may be empty."""
    return [place(row[f"image_{k}"]) for k in range(1, 7) if row.get(f"image_{k}")]

def from_mantis(row: dict, number: int, place) -> Question:
    """Mantis-Eval: options with or without labels, not in the question's text."""
    images, text, gold = [*map(place, row["images"])], row["question"], row["answer"]
    if row["question_type"] != "multi-choice":
        return make_question(row["id"], images, text, gold, "text", (), "short-answer")
    options = [unlabeled(option, k) for k, option in enumerate(row["options"])]
    gold = extract_choice(gold) or re.sub(r"[^A-Za-z]", "", gold)[:1].upper()
    text, task = text + show_options(options), "multi-choice"
    return make_question(row["id"], images, text, gold, "choice", options, task)

def from_blink(row: dict, number: int, place) -> Question:
    """BLINK: the prompt lists the options."""
    images, text, gold = numbered_images(row, place), row["prompt"], row["answer"].strip("() ")
    return make_question(row["idx"], images, text, gold, "choice", row["choices"], row["sub_task"])

def from_mmiu(row: dict, number: int, place) -> Question:
    """MMIU: the context repeats the options. A gold beyond them makes all answers wrong."""
    images, gold = [*map(place, row["input_image_path"])], (row["output"] or "").strip("() ")
    options, task = listed_options(row["options"]), row["task"]
    text = row["question"] + "\n" + row["context"]
    return make_question(f"{task}-{number}", images, text, gold, "choice", options, task)

def from_remi(row: dict, number: int, place) -> Question:
    """ReMI: tags <image1> in the text."""
    text, images = place_tags(row["question"], numbered_images(row, place))
    gold, task = row["label"], row["task"]
    if task in ("Collisions", "Isomorphism"):
        text += " If it is a yes or no question, answer 0 for no and 1 for yes."
    return make_question(f"{task}-{number}", images, text, gold, f"remi {task}", (), task)

def from_mv_math(row: dict, number: int, place) -> Question:
    """MV-MATH: tags <image_1>; four options in the text, often as images."""
    text, images = place_tags(row["question"], [*map(place, row["input_image"])])
    kind, gold, rule, options = row["answer_type"], row["answer"], "value", []
    if kind == "choice":
        rule, options, gold = "choice", listed_options(text), extract_choice(gold) or gold
        if len(set(options)) < 4 and options != ["<image>"] * 4:
            options = [""] * 4  # not all could be read, or two are alike
    elif kind == "multi-step":
        rule = "parts"
    return make_question(row["problem_id"], images, text, gold, rule, options, kind)

def from_mathvista(row: dict, number: int, place) -> Question:
    """MathVista: the gold of a choice is the option's text; numbers have a precision."""
    choices, gold, rule = list(row["choices"] or ()), row["answer"], row["answer_type"]
    images, task = [place(row["decoded_image"])], row["metadata"]["task"]
    if row["question_type"] == "multi_choice":
        rule, gold = "choice", LETTERS[choices.index(gold)] if gold in choices else ""
    elif rule in ("integer", "float"):
        rule = f"number {int(row['precision'] or 0) if rule == 'float' else 0}"
    return make_question(row["pid"], images, row["query"], gold, rule, choices, task)

def from_mathverse(row: dict, number: int, place) -> Question:
    """MathVerse: five versions of a question. A gold is a letter, or two, or a text."""
    text, options, gold, rule = row["question"], [], row["answer"].strip(), "value"
    if row["question_type"] == "multi-choice":
        options = listed_options(row.get("question_for_eval") or text) or [""] * 4
        rule = "letters" if re.fullmatch(r"[A-Z](?:\s+[A-Z])+", gold) else "choice"
        gold = LETTERS[options.index(gold)] if gold in options else gold.strip("()")
    id, images, task = row["sample_index"], [place(row["image"])], row["problem_version"]
    text = text or "Answer the question in the image."
    return make_question(id, images, text, gold, rule, options, task)

def from_mathvision(row: dict, number: int, place) -> Question:
    """MathVision: one image; options, if any, are not in the question's text."""
    options, images = list(row["options"] or ()), [place(row["decoded_image"])]
    text, rule = row["question"] + show_options(options), "choice" if options else "value"
    return make_question(row["id"], images, text, row["answer"], rule, options, row["subject"])

def from_muirbench(row: dict, number: int, place) -> Question:
    """MuirBench: <image> in questions and options; a twin has "None of the choices ..."."""
    images, options, task = [*map(place, row["image_list"])], row["options"], row["task"]
    text = row["question"] + show_options(options)
    return make_question(row["idx"], images, text, row["answer"], "choice", options, task)

def from_medframeqa(row: dict, number: int, place) -> Question:
    """MedFrameQA: two to five frames of a video; options are not in the text."""
    options = [unlabeled(option, k) for k, option in enumerate(row["options"])]
    text, images = row["question"] + show_options(options), numbered_images(row, place)
    return make_question(row["question_id"], images, text, row["correct_answer"], "choice", options)

ADAPTERS = {
    "mantis-eval": from_mantis, "blink": from_blink, "mmiu": from_mmiu, "remi": from_remi,
    "mathvista": from_mathvista, "mathverse": from_mathverse, "mathvision": from_mathvision,
    "mv-math": from_mv_math, "muirbench": from_muirbench, "medframeqa": from_medframeqa}

# ---- Data: from the Hub, or from a local copy of the same files ------------------------

def load_benchmark(name: str, args) -> list[Question]:
    """Questions of a benchmark, or of a JSONL file of samples; --limit spreads evenly."""
    if name in ADAPTERS:
        folder = find_data(BENCHMARKS[name], args.data_dir)
        rows, cache = read_rows(folder, BENCHMARKS[name].files), Path(args.out, ".images")
        place = functools.partial(place_image, folder=folder, cache=cache)
    else:
        rows = perl.load_samples(SAMPLES / "test.jsonl" if name == "digits" else name)
    n, questions = min(args.limit or len(rows), len(rows)), {}
    for k in range(n):
        number = k * len(rows) // n
        question = Question(rows[number], "text")
        if name in ADAPTERS:
            question = ADAPTERS[name](rows[number], number, place)
        sample = question.sample
        if sample.id in questions:  # two rows with one id
            sample = dataclasses.replace(sample, id=f"{sample.id}-row{number}")
        questions[sample.id] = question._replace(sample=sample)
    return list(questions.values())

def find_data(benchmark: Benchmark, data_dir: str) -> Path:
    """The folder of a data set: in --data-dir, or downloaded. Zips are unpacked, once."""
    folder = Path(data_dir, benchmark.hub.split("/")[1])
    if not data_dir:
        from huggingface_hub import snapshot_download as download  # needed here only
        wanted = [benchmark.files.replace("**/", "*")]  # NOTE: this "*" matches "/", too
        if benchmark.has_paths:
            wanted += ["*.zip", "*.jpg", "*.jpeg", "*.png"]
        try:
            folder = Path(download(benchmark.hub, repo_type="dataset", allow_patterns=wanted))
        except OSError as error:
            raise SystemExit(f"Could not load {benchmark.hub}; pass a copy, --data-dir FOLDER "
                             f"({error})") from None
    for archive in folder.rglob("*.zip") if benchmark.has_paths else ():
        done = archive.with_suffix("") / ".unpacked"
        if not done.exists():
            shutil.unpack_archive(archive, done.parent)
            done.touch()
    return folder

def read_rows(folder: Path, files: str) -> list[dict]:
    """Rows of parquet or JSON files. Images stay encoded: a broken one ends no run."""
    from pyarrow import parquet  # needed here only
    rows = []
    for path in sorted(folder.glob(files)):
        is_json = path.suffix == ".json"
        rows += json.loads(path.read_text()) if is_json else parquet.read_table(path).to_pylist()
    if not rows:
        raise SystemExit(f"no {folder / files}; --data-dir takes the Hub's files")
    return rows

@functools.lru_cache(maxsize=4)
def files_by_ending(folder: Path) -> dict[str, str]:
    """The files in a folder and below, by any ending of their path: "x/0.jpg", "0.jpg"."""
    files = {}
    for path in sorted(folder.rglob("*.*")):
        names = path.relative_to(folder).parts
        for k in range(len(names)):
            files.setdefault("/".join(names[k:]), str(path))
    return files

def place_image(image, folder: Path | None, cache: Path) -> str:
    """An image of a row -> a file: that in `folder` whose path ends like it, or a copy in
    `cache`. No image: the name of no file."""
    if isinstance(image, str) and image:
        ending = os.path.normpath(image).lstrip("/")
        return files_by_ending(folder).get(ending, str(folder / image))
    if not image:
        return "missing image"
    content = image["bytes"] or Path(image["path"]).read_bytes()
    target = cache / hashlib.sha1(content).hexdigest()
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"{target.name}-{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, target)
    return str(target)

# ---- Scoring ---------------------------------------------------------------------------

def grade_row(row: dict) -> tuple[str | None, bool]:
    """A line of samples.jsonl -> the answer found in the response, and is it right?"""
    rule, gold, response = row["rule"], row["gold"], row["response"]
    if rule == "choice":
        letter, texts = extract_choice(response, row["options"]), dict(zip(LETTERS, row["options"]))
        is_twin = bool(texts.get(letter)) and texts[letter] == texts.get(gold)
        return letter, letter == gold or is_twin
    answer = extract_answer(response)
    if answer is None:
        return None, False
    if rule.startswith("number") and to_number(answer) is not None:
        value, digits = to_number(answer), int(rule.split()[1])
        return answer, (round(value, digits) if digits else int(value)) == float(gold)
    if rule.startswith("remi"):
        return answer, remi_right(rule.split()[1], answer, gold)
    if rule == "list":
        return answer, NUMBER.findall(answer) == NUMBER.findall(gold)
    if rule == "letters":
        return answer, set(re.findall(r"\b[A-Z]\b", answer)) == set(gold.split())
    if rule == "parts":
        return answer, all_parts_right(response, gold)
    return answer, (same_value if rule == "value" else same_answer)(answer, gold)

def to_number(text: str) -> float | None:
    r"""The number that an answer is: "$1,234.5", "14 cm", "\frac34", "50%", "x = 14"."""
    text = re.sub(r"\\[dt]?frac\s*\{?(-?\d+)\}?\s*\{?(\d+)\}?", r"\1/\2", plain(text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[\s$\\{}]", "", text)
    match = re.fullmatch(r"(?:[A-Za-z]\w*[=≈])?([-+]?(?:\d+\.?\d*|\.\d+))(?:/(\d*[1-9]\d*))?"
                         r"(?:[%°]|\^circ|[a-zA-Z²³][\w/^²³.]*)?", text)
    return float(match[1]) / int(match[2] or 1) if match else None

PART_LABEL = r"[（(]\s*[1-9]\s*[)）]"
NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
POWER = r"(?:\s*\^\s*\{?[23]\}?|[²³])?"
UNIT = re.compile(
    rf"(?i)(?:\b|(?<=[\d\s}})]))(?:[kcmd]?m|m?l|k?g)(?:\s*/\s*[hs])?{POWER}\s*$"
    rf"|\b(?:square |cubic )?(?:units?|[a-z]*(?:met|lit)(?:re|er)s?){POWER}\s*$"
    r"|(?:\^?\s*\{?\\circ\}?|°)\s*T?\s*$|\\?%\s*$")
SYMBOL = r"(?<![a-zA-Z])([kcmd]?m|m?l|k?g)\s*\}?\s*(?:\^\s*\{?([-\d]+))?[}\s.]*$"  # cm, cm^{2}

def bare_value(text: str) -> str:
    r"""Without left side and unit: "Area =9 \pi \mathrm{~cm}^{2}" -> "9 \pi"."""
    text = plain(text.replace("~", " "))
    text = re.sub(r"^([^=]*)=\s*([a-z])$", r"\2=\1", text)  # "5 = s"
    text = re.sub(r"^(?!\d)[\w.\\(){}, ]*=(?=\s*\S)", "", text)  # but "2 x =" stays
    return UNIT.sub("", text).lstrip(" ,;").rstrip(" \\,;")

def same_value(answer: str, gold: str) -> bool:
    """same_answer, where the left side ("Area =") and the unit may be missing."""
    # Signs of math amid a text end the parsing there; then mojibake, a Chinese comma.
    for old, new in (("\\[", ""), ("\\]", ""), ("$", ""), ("掳", "°"), ("、", ","), ("；", ";")):
        answer, gold = answer.replace(old, new), gold.replace(old, new)
    # Another number or small letter on the left (y_2, y_3; x, y), or unit (cm^2, cm^3; m, cm).
    for pattern in (r"\d(?=[^=]*=)", r"^\W*([a-z])\s*=", SYMBOL):
        mine, wanted = (sorted(re.findall(pattern, text)) for text in (answer, gold))
        if mine and wanted and mine != wanted:
            return False
    value, gold_value = bare_value(answer), bare_value(gold)
    # Of words and of a chain of equations math-verify reads a part.
    if re.search(r"(?i)(?<![\\\w])[a-z]{4}", gold_value) or gold.count("=") > 1:
        if NUMBER.findall(value) != NUMBER.findall(gold_value):
            return False
    return same_answer(answer, gold) or value != "" and same_answer(value, gold_value)

def remi_right(task: str, answer: str, label: str) -> bool:
    """ReMI's own rules: lower case, nothing behind a %, a tolerance for each task."""
    answer = plain(answer).lower().split("%")[0].replace("\\", "").strip()
    label = plain(label).lower().split("%")[0].replace("\\", "").strip()
    if label in ("0", "1"):
        answer = {"yes": "1", "no": "0"}.get(answer, answer)
    if task == "RefCoco":
        return answer in re.split(r"\s*,\s*", label)
    mine, gold = to_number(answer), to_number(label)
    if mine is None or gold is None:  # "f(x)" is the function f
        return re.sub(r"(?<=^[fgh])\(x\)$|[\s()]", "", answer) == re.sub(r"[\s()]", "", label)
    bounds = {"Clocks": 10, "GeomShape": 0.03 * abs(gold), "GeomCost": 0.03 * abs(gold)}
    return abs(mine - gold) <= bounds.get(task, 0.01 * abs(gold)) + 1e-9

def skeleton(text: str) -> str:
    """A text without space, $ and labels, its separators alike: what any copy keeps."""
    text = re.sub(r"[\s$]", "", text)
    return re.sub(rf"(?:[;；,，。]|\.(?!\d)|{PART_LABEL})+", "|", text).strip("|")

def all_parts_right(response: str, gold: str) -> bool:
    """A multi-step question: its parts labeled "(1)", "(2)", in a box each, or in a list."""
    stated, visible = extract_answer(response), response.rpartition("</think>")[2]
    boxes = map(last_boxed, re.split(r"(?=\\boxed)", visible))
    items = re.split(r"[,，;；](?![^(\[{]*[)\]}])", stated)
    wanted = list(filter(skeleton, re.split(PART_LABEL, gold)))
    for parts in (re.split(PART_LABEL, stated), filter(None, boxes), items):
        given = list(filter(skeleton, parts))
        if skeleton(";".join(given)) == skeleton(gold):
            return True
        if len(given) == len(wanted) and all(map(same_value, given, wanted)):
            return True
    return False

def picked(row: dict) -> tuple | None:
    """What an answer picks, as positions in the given order, whatever order was asked."""
    answer, order, movable = row["answer"] or "", row["order"], row["movable"]
    if row["order_rule"] == "letter":
        letter = extract_choice(answer, [""] * len(movable))
        return (order[movable[LETTERS.index(letter)]],) if letter else None
    if row["order_rule"] in ("index", "sequence"):
        positions = [int(number) - 1 for number in re.findall(r"\d+", answer)]
        if not positions or min(positions) < 0 or max(positions) >= len(order):
            return None
        return tuple(order[position] for position in positions)
    return (plain(answer).casefold(),) if answer else None

# ---- Measures --------------------------------------------------------------------------

def average(values: dict[str, list[float]], mean: str = "questions") -> float:
    """{task: a value a question} -> mean over questions, or over the tasks' means."""
    if mean == "questions":
        values = {"": sum(values.values(), [])}
    return round(statistics.fmean(map(statistics.fmean, values.values())), 6)

def bootstrap(values: dict[str, list[float]], mean: str = "questions") -> list[float]:
    """95 % percentile interval of `average`, questions drawn anew within each task."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(1000)
    n = sum(map(len, values.values()))
    for task in sorted(values):
        column = torch.tensor(values[task], dtype=torch.float32)
        drawn = torch.randint(len(column), (1000, len(column)), generator=generator)
        weight = 1 / len(values) if mean == "tasks" else len(column) / n
        total += column[drawn].mean(1) * weight
    bounds = torch.quantile(total, torch.tensor([0.025, 0.975]))
    return [round(bound, 6) for bound in bounds.tolist()]

def summary(column: list[float]) -> dict:
    """Mean, interval and number of a column of values."""
    return {"value": average({"": column}), "interval": bootstrap({"": column}), "n": len(column)}

MEASURES = ("mean", "worst", "best", "bias", "same choice", "flip", "unread", "control",
            "rstd", "first - last")

def order_measures(groups: list[list[dict]]) -> dict:
    """From graded rows, one an order, a missing one wrong: 3 of 4 right -> mean .75, worst 0,
    best 1, bias 1. flip: different choices in 6 orders; control: the same in one order."""
    columns, by_place = {}, {}  # measure -> a value a question; position -> which are right
    for rows in groups:
        n = rows[0]["orders"]
        asked, again = rows[:n], rows[n:n + 6]
        right = [row["right"] for row in asked] + [False] * (n - len(asked))
        picks = list(map(picked, asked)) + [None] * (n - len(asked))
        values = {
            "mean": sum(right) / n, "worst": min(right), "best": max(right),
            "bias": max(right) - min(right),  # the paper's p(x_max) - p(x_min), A.5
            "same choice": len(set(picks)) == 1 and None not in picks,
            "flip": len(set(picks[:6]) - {None}) > 1, "unread": None in picks[:6]}
        if again:
            values["control"] = len(set(map(picked, again)) - {None}) > 1
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        for row in asked:
            if row["order_rule"] in ("letter", "index"):
                right_image, = picked(row | {"answer": row["gold"]})
                place = row["order"].index(right_image) + 1
                by_place.setdefault(place, []).append(row["right"])
    measures = {name: summary(column) for name, column in columns.items()}
    places = {str(place): summary(by_place[place]) for place in sorted(by_place)}
    accuracies = [place["value"] for place in places.values()]
    if accuracies:
        measures["rstd"] = {"value": round(statistics.pstdev(accuracies), 6)}
        measures["first - last"] = {"value": round(accuracies[0] - accuracies[-1], 6)}
    return measures | {"by position": places}

def graded_groups(folder: Path) -> list[list[dict]]:
    """samples.jsonl, graded: a question's rows as they were asked; questions by id."""
    groups = {}
    for row in perl.read_lines(folder / "samples.jsonl"):
        row["answer"], row["right"] = (None, False) if row["error"] else grade_row(row)
        groups.setdefault(row["id"], {})[row["turn"], row["k"]] = row  # the last of its kind
    return [[rows[key] for key in sorted(rows)] for _, rows in sorted(groups.items())]

def score(folder: Path) -> dict:
    """Grade a run folder and write results.json: a function of the two files beside it."""
    config = json.loads((folder / "config.json").read_text())
    benchmark = BENCHMARKS.get(config["benchmark"], BENCHMARKS["digits"])
    mean, groups = benchmark.mean, graded_groups(folder)
    as_given = {task: [] for task in config["tasks"]}
    permuted, rotated, rows = [], [], sum(groups, [])
    for group in groups:
        first = group[0]
        as_given[first["task"]].append(first["turn"] == first["k"] == 0 and first["right"])
        if first["orders"] > 1:
            permuted.append([row for row in group if row["turn"] == 0])
        if group[-1]["turn"] > 0:
            turns = [row["right"] for row in group if row["k"] == 0]
            rotated.append(len(turns) == len(first["options"]) and all(turns))
    for task, n in config["tasks"].items():
        as_given[task] += [False] * (n - len(as_given[task]))  # without a row: wrong
    result = {
        "score": average(as_given, mean), "interval": bootstrap(as_given, mean),
        "over questions": average(as_given), "over tasks": average(as_given, "tasks"),
        "n": config["n"], "expected": benchmark.rows or config["n"],
        "missing": config["n"] - len(groups), "errors": sum(row["error"] != "" for row in rows),
        "unparsed": sum(row["answer"] is None and not row["error"] for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "tasks": {task: summary(as_given[task]) for task in sorted(as_given)},
        "orders": order_measures(permuted) if permuted else {},
        "all rotations": summary(rotated) if rotated else {}, "config": config}
    perl.write_atomic(folder / "results.json", json.dumps(result, indent=1))
    return result

# ---- Asking the model ------------------------------------------------------------------

KEPT_SETTINGS = "instruction max_pixels max_new_tokens rollout_batch dtype cpu_threads".split()

def settings(args) -> Config:
    """Config of perl.py. A checkpoint of a run keeps that run's prompt and sizes."""
    chosen, run = MODEL_PRESETS.get(args.model, {}), Path(args.model).parent / "config.json"
    if Path(args.model).name.startswith("checkpoint-") and run.exists():
        saved = json.loads(run.read_text())
        chosen = {name: saved[name] for name in KEPT_SETTINGS}
    cfg = Config(**chosen)
    cfg.model, cfg.max_prompt_tokens, cfg.gradient_checkpointing = args.model, 16384, False
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    cfg.rollout_batch, cfg.temperature = args.batch or cfg.rollout_batch, args.temperature or 1.0
    return cfg

def plan(question: Question, cap: int, processor, cfg, args) -> list[Question]:
    """How to ask a question: in its orders, and with --rotate-options in rotations."""
    try:
        length = prompt_length(question.sample, processor)
        problem = f"{length} tokens" if length > cfg.max_prompt_tokens else ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = f"image: {error}"
    orders = all_orders(question.sample, cap)
    if args.temperature > 0 and len(orders) > 1:  # the same-order control
        orders = orders + orders[:1] * len(orders)
    planned = [question._replace(orders=orders, problem=problem)]
    for turn in range(1, len(question.options) if args.rotate_options else 0):
        rotated = rotate(planned[0], turn)
        if rotated is not None:
            planned.append(rotated._replace(orders=orders[:1]))
    return planned

def answer_chunk(model, processor, chunk: list[Question], cfg, greedy) -> list[dict]:
    """Ask the questions of a chunk in all their orders: lines of samples.jsonl."""
    able, rows = [q for q in chunk if not q.problem], []
    seed = hashlib.sha1("".join(q.sample.id for q in chunk).encode()).digest()[:4]
    torch.manual_seed(int.from_bytes(seed))  # a resumed run samples the same again
    answered = iter(sample_groups(model, processor, [q.sample for q in able],
                                  [q.orders for q in able], 1, cfg, greedy=greedy))
    for q in chunk:
        rollouts = [None] * len(q.orders) if q.problem else next(answered)
        for k, (order, rollout) in enumerate(zip(q.orders, rollouts)):
            rows.append({
                "id": q.sample.id, "turn": q.turn, "k": k, "order": order,
                "error": q.problem, "orders": len(set(q.orders)), "task": q.sample.source,
                "rule": q.rule, "options": q.options, "gold": permute(q.sample, order).answer,
                "order_rule": q.sample.order_rule, "movable": q.sample.movable,
                "response": rollout.text if rollout else "",
                "truncated": rollout is not None and rollout.truncated})
    return rows

def open_folder(folder: Path, config: dict, accelerator) -> set[tuple]:
    """Make or reopen a run folder: which (id, turn, k) it has. Refuses another config."""
    path, samples = folder / "config.json", folder / "samples.jsonl"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            perl.write_atomic(path, json.dumps(config, indent=1))
        if samples.exists():  # cut off a line torn by a kill
            os.truncate(samples, samples.read_bytes().rfind(b"\n") + 1)
    accelerator.wait_for_everyone()
    saved = json.loads(path.read_text())
    for name, value in config.items():
        if saved.get(name) != value:
            raise SystemExit(f"{folder}: {name} was {saved.get(name)!r} and is {value!r} "
                             "now; remove the folder or choose another --out")
    return {(row["id"], row["turn"], row["k"]) for row in perl.read_lines(samples)}

def run_benchmark(name: str, model, processor, weights: str, cfg, args, folder: Path,
                  accelerator) -> None:
    """Ask all questions of a benchmark to which the folder has no answers yet."""
    with accelerator.main_process_first():
        questions = load_benchmark(name, args)
    samples, planned, todo = [question.sample for question in questions], [], []
    content = json.dumps([[s.id, s.question, s.answer] for s in samples])
    cap = args.orders or (24 if name == "digits" else 1)
    config = {
        "model": args.model, "weights": weights, "benchmark": name, "n": len(samples),
        "limit": args.limit, "orders": cap, "rotate_options": args.rotate_options,
        "temperature": args.temperature, "questions": hashlib.sha1(content.encode()).hexdigest(),
        "tasks": Counter(sample.source for sample in samples)}
    config |= {key: getattr(cfg, key) for key in KEPT_SETTINGS[:4]}
    done = open_folder(folder, config, accelerator)
    for question in questions:
        planned += plan(question, cap, processor, cfg, args)
    for chunk in perl.fill(planned, lambda c: sum(len(q.orders) for q in c) <= cfg.rollout_batch):
        wanted = {(q.sample.id, q.turn, k) for q in chunk for k in range(len(q.orders))}
        if not wanted <= done:
            todo.append(chunk)
    world, rank = accelerator.num_processes, accelerator.process_index
    for start in tqdm(range(0, len(todo), world), name, disable=rank > 0):
        chunk = todo[start + rank] if start + rank < len(todo) else []
        rows = gather_object(answer_chunk(model, processor, chunk, cfg, not args.temperature))
        for row in rows if rank == 0 else ():
            perl.append_line(folder / "samples.jsonl", row)

# ---- Tables, comparison ----------------------------------------------------------------

def percent(value: float, interval=()) -> str:
    """0.5, (0.4, 0.6) -> "50.0 [40.0, 60.0]"."""
    bounds = [f"{100 * bound:.1f}" for bound in interval]
    return f"{100 * value:.1f} [{', '.join(bounds)}]" if bounds else f"{100 * value:.1f}"

def table(rows: list[list]) -> str:
    """Rows, the first a heading, as an aligned Markdown table."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)

SCORE_ROWS = ("accuracy [95 %]", "over questions", "over tasks", "paper: start", "paper: PeRL",
              "answered", "errors", "unparsed", "truncated", "right in all rotations", "orders of")

def report(results: dict[str, dict], model: str) -> str:
    """A model's results in percent, a column a benchmark, and how each is scored."""
    columns, notes = [["", *SCORE_ROWS, *MEASURES, "by position"]], ""
    for name, r in results.items():
        benchmark, orders = BENCHMARKS.get(name, BENCHMARKS["digits"]), r["orders"]
        turned = r["all rotations"] or {"value": 0, "n": 0}
        cells = [name, percent(r["score"], r["interval"]), percent(r["over questions"]),
                 percent(r["over tasks"]), *benchmark.paper,
                 f"{r['n'] - r['missing']} of {r['expected']}", r["errors"], r["unparsed"],
                 r["truncated"], f"{percent(turned['value'])} of {turned['n']}",
                 orders["bias"]["n"] if orders else 0]
        for measure in MEASURES:
            found = orders.get(measure)
            cells.append(percent(found["value"], found.get("interval", ())) if found else "")
        places = orders.get("by position", {})
        columns.append(cells + [", ".join(f"{k}: {percent(places[k]['value'])}" for k in places)])
        notes += f"{name}: mean over {benchmark.mean}; {benchmark.scoring}\n"
    return f"{model}\n\n{table([*zip(*columns)])}\n{notes}"

def compare(folder_a: Path, folder_b: Path) -> str:
    """Paired differences B - A of each benchmark, over the questions that both answered."""
    lines = [["benchmark", "n", "A", "B", "B - A [95 %]", "mean over orders", "worst order"]]
    for folder in sorted(path.parent for path in folder_a.glob("*/samples.jsonl")):
        mean = BENCHMARKS.get(folder.name, BENCHMARKS["digits"]).mean
        in_b = {group[0]["id"]: group for group in graded_groups(folder_b / folder.name)}
        columns, n = [{}, {}, {}, {}, {}], 0  # columns: {task: a value a question}
        for group in graded_groups(folder):
            first, other = group[0], in_b.get(group[0]["id"], [])
            a = [row["right"] for row in group if row["turn"] == 0][:first["orders"]]
            b = [row["right"] for row in other if row["turn"] == 0][:first["orders"]]
            if a and b:
                n += 1
                gains = b[0] - a[0], statistics.mean(b) - statistics.mean(a), min(b) - min(a)
                for column, value in zip(columns, (a[0], b[0], *gains)):
                    column.setdefault(first["task"], []).append(value)
        if n:
            cells = [percent(average(column, mean)) for column in columns[:2]]
            for gain in columns[2:]:
                cells.append(percent(average(gain, mean), bootstrap(gain, mean)))
            lines.append([folder.name, n, *cells])
    if len(lines) == 1:
        raise SystemExit(f"{folder_a} and {folder_b} have no common answers")
    return f"A = {folder_a}\nB = {folder_b}\n\n{table(lines)}"

# ---- --step-cost: what a training step costs, with and without sharing -----------------

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
    prompts = [perl.Prompt(None, ids, pictures) for _ in range(cfg.n_permutations + 1)]
    return [perl.Rollout(prompt, (), "", [text_id] * cfg.max_new_tokens, "", True,
                         advantage=(-1.0) ** k)
            for prompt in prompts for k in range(cfg.rollouts_per_order)]

def count_flops(config, cfg, shape: list[int]) -> tuple[dict, dict]:
    """FLOPs of a step by part, and their minimum: all images and prompts once, only pairs that
    are seen. The vision tower's are torch's count without weights, the others arithmetic."""
    with torch.device("meta"):
        model = perl.FAMILY_MODEL(config)
    rollouts = full_rollouts(cfg, shape, config.vision_config, 0, 1)
    prompt, layers = rollouts[0].prompt, model.model.language_model.layers
    B, T, L, P = len(rollouts), cfg.max_new_tokens, len(prompt.ids), cfg.n_permutations + 1
    token = 2 * sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    pair = 4 * config.text_config.hidden_size * len(layers)  # a token that sees another
    head = 2 * model.lm_head.weight.numel()                  # the logits of a token
    pixels = prompt.pictures[0].pixels.to("meta")
    places = torch.empty(len(pixels), 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = model.model.visual(pixels, prompt.pictures[0].grid, position_ids=places)
        forward = shape[0] * counter.get_total_flops()  # of all images
        features.pooler_output.sum().backward()
        both = shape[0] * counter.get_total_flops()
    batches, vision = perl.micro_batches(rollouts, cfg), B * (forward + both)
    if cfg.share:  # once in each call of generate, and in each micro-batch of the loss
        at_once = min(cfg.rollout_batch * P // B, 4 * cfg.max_tokens_per_micro_batch // L)
        vision = math.ceil(P / max(at_once, 1)) * forward + len(batches) * both
    # Shared: each prompt once, its last token with the first step; else each rollout's prompt.
    reads, seen, steps = (P, L - 1, T) if cfg.share else (B, L, T - 1)
    prefill = reads * (token * seen + pair * seen ** 2)
    decode = B * (steps * (token + pair * (seen + (steps + 1) / 2)) + T * head)
    loss = 0.0
    for batch in batches:
        rows = perl.pack(batch, cfg)
        longest = max(map(perl.row_length, rows))
        pairs = len(rows) * longest ** 2
        if len(batch) > len(rows):  # a prompt sees itself, a response the prompt and itself
            pairs = len(rows) * L ** 2 + len(batch) * T * (L + T)
        loss += 3 * (len(rows) * longest * token + pairs * pair)
        loss += 4 * len(batch) * T * head  # logits are made again in the backward pass
    flops = {"vision": 1.0 * vision, "prefill": 1.0 * prefill, "decode": decode, "loss": loss}
    prompts = P * (token * L + pair * L * (L + 1) / 2)
    responses = B * T * (token + pair * (L + (T + 1) / 2) + head)
    return flops, {"vision": float(forward + both), "prefill": prompts, "decode": responses,
                   "loss": 3 * (prompts + responses)}

def time_step(cfg, shape: list[int]) -> dict[str, float]:
    """Seconds of sampling and update, and this process's peak memory in MB."""
    torch.set_num_threads(cfg.cpu_threads or torch.get_num_threads())
    accelerator, processor = Accelerator(), perl.load_processor(cfg.model, cfg)
    processor.banned_ids += processor.eos_ids  # responses of full length
    model = perl.load_model(cfg.model, cfg, accelerator.device)
    text_id, n = processor.tokenizer("a").input_ids[0], cfg.rollouts_per_order
    rollouts = full_rollouts(cfg, shape, model.config.vision_config, text_id, processor.image_id)
    prompts = [rollout.prompt for rollout in rollouts[::n]]
    optimizer = perl.SplitAdamW(model, cfg, accelerator)
    start = time.time()
    responses = perl.generate(model, processor, prompts, n, cfg)
    sampled = time.time()
    for rollout, ids in zip(rollouts, sum(responses, [])):
        rollout.ids = ids
    perl.update(model, None, optimizer, processor, [rollouts], cfg, accelerator)
    return {"sample": sampled - start, "update": time.time() - sampled,
            "peak_mb": 1e3 * perl.peak_gb()}

def time_apart(cfg, shape: list[int]) -> dict[str, float]:
    """time_step in a process of its own, out of reach of a terminal's Ctrl-C."""
    command = [sys.executable, __file__, "--time-step", json.dumps([vars(cfg), shape])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    if done.returncode:
        raise SystemExit("--step-cost: the step that was timed failed; see above")
    return json.loads(done.stdout.splitlines()[-1])

def step_cost(args, perl_flags: list[str]) -> None:
    """Print FLOPs at the model's size (tiny: the 7B's), and seconds and memory here."""
    shape = [args.benchmark_images, args.benchmark_image_tokens, args.benchmark_text_tokens]
    cfg = perl.parse_config([
        "--model", args.model, "--max-new-tokens", str(args.max_new_tokens or 256),
        "--max-tokens-per-micro-batch", "16384", "--updates-per-step", "1", "--beta", "0",
        "--no-gradient-checkpointing", "--optimizer-device", "host", *perl_flags])
    if min(shape) < 1 or shape[2] <= shape[0] or cfg.max_new_tokens < 3:
        raise SystemExit("--step-cost: images and tokens from 1, more text tokens than images, "
                         "--max-new-tokens from 3")
    config = perl.load_pretrained(transformers.AutoConfig, cfg.model)
    config = QWEN_7B if cfg.model == "tiny" else config
    parts, row = {}, {}  # parts: {"flops_shared": {"vision": .., ..}, ..}
    for way in tqdm(("shared", "plain"), "time"):
        its_cfg = dataclasses.replace(cfg, share=way == "shared")
        parts[f"seconds_{way}"] = time_apart(its_cfg, shape)
        row[f"peak_mb_{way}"] = parts[f"seconds_{way}"].pop("peak_mb")
        parts[f"flops_{way}"], parts["flops_minimum"] = count_flops(config, its_cfg, shape)
    for name, values in parts.items():
        row[name] = sum(values.values())
        row |= {f"{name}_{part}": value for part, value in values.items()}
    print(json.dumps(row))

# ---- Main ------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and with --step-cost what is left of it for perl.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tiny", help="Hub id, local folder or short name, as in perl.py")
    add("--benchmarks", default="digits", help=f"all, *.jsonl or of {', '.join(BENCHMARKS)}")
    add("--limit", type=int, default=0, help="ask so many questions, evenly spread; 0: all")
    add("--orders", type=int, default=0, help="orders of a question [24 for digits, else 1]")
    add("--rotate-options", action="store_true", help="ask in every rotation of listed options")
    add("--temperature", type=float, default=0.0, help="0: greedy; else with same-order control")
    add("--data-dir", default="", help="local copies of the data sets; empty: from the Hub")
    add("--out", default="eval_runs", help="folder of the runs")
    add("--batch", type=int, default=0, help="sequences at a time [rollout_batch of perl.py]")
    add("--max-new-tokens", type=int, default=0, help="longest response [2048; tiny: 64]")
    add("--score-only", action="store_true", help="grade saved responses, load no model")
    add("--compare", nargs=2, metavar="RUN", help="two model folders: paired differences")
    add("--page", metavar="RUN", help="write RUN/page.html: a training run's curves and groups")
    add("--step-cost", action="store_true", help="of training; takes perl.py's settings too")
    add("--benchmark-images", type=int, default=4, help="step cost: images of its question")
    add("--benchmark-image-tokens", type=int, default=256, help="step cost: tokens of each")
    add("--benchmark-text-tokens", type=int, default=64, help="step cost: other tokens")
    add("--time-step", default="", help=argparse.SUPPRESS)
    args, perl_flags = parser.parse_known_args(argv)
    if perl_flags and not args.step_cost:
        parser.error(f"unknown: {' '.join(perl_flags)}")
    paper = [name for name in BENCHMARKS if BENCHMARKS[name].paper[0]]
    args.benchmarks = paper if args.benchmarks == "all" else args.benchmarks.split(",")
    for name in args.benchmarks:
        if name not in BENCHMARKS and not name.endswith(".jsonl"):
            parser.error(f"--benchmarks {name}: none of all, {', '.join(BENCHMARKS)}, *.jsonl")
    return args, perl_flags

def ask_and_report(args) -> None:
    """Answers to all benchmarks chosen, unless --score-only; then scores and a table."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # what is there of an image is shown
    accelerator, parts = Accelerator(), Path(args.model).parts
    n_names = 2 if parts[-1].startswith("checkpoint-") else 1  # RUN/checkpoint-100: both
    out = Path(args.out, "-".join(parts[-n_names:]))
    if not args.score_only:
        cfg = settings(args)
        torch.set_num_threads(cfg.cpu_threads or torch.get_num_threads())
        processor = perl.load_processor(args.model, cfg)
        model = perl.load_model(args.model, cfg, accelerator.device)
        starts = [w.detach().flatten()[:64].float().tolist() for w in model.parameters()]
        weights = hashlib.sha1(str(starts).encode()).hexdigest()  # others are another run
        for benchmark in args.benchmarks:
            run_benchmark(benchmark, model, processor, weights, cfg, args,
                          out / Path(benchmark).stem, accelerator)
    if accelerator.is_main_process:
        folders = sorted(path.parent for path in out.glob("*/config.json"))
        if not folders:
            raise SystemExit(f"{out} holds no responses; run without --score-only first")
        text = report({folder.name: score(folder) for folder in folders}, out.name)
        perl.write_atomic(out / "summary.md", text)
        print(text)

def main(argv: list[str] | None = None) -> None:
    """Compare, or measure a step, or ask the model and report."""
    args, perl_flags = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if args.compare:
            print(compare(*map(Path, args.compare)))
        elif args.page:
            from data_samples import page  # needed here only
            print(f"wrote {page.write(Path(args.page))}")
        elif args.time_step:
            cfg, shape = json.loads(args.time_step)
            print(json.dumps(time_step(Config(**cfg), shape)))
        elif args.step_cost:
            step_cost(args, perl_flags)
        else:
            ask_and_report(args)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; run the same command again to go on") from None

if __name__ == "__main__":
    main()
