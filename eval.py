#!/usr/bin/env python3
"""Measures a model on the paper's eight benchmarks and two more, and what order does.

    python eval.py                                         # tiny, data_samples/, CPU
    accelerate launch eval.py --model Qwen2.5-VL-7B --benchmarks all  # MMIU: 25 GB
    python eval.py --ask "Which shows a cat?" a.png b.png  # your own question
    python eval.py --compare eval_runs/A eval_runs/B       # two models, paired
    python eval.py --chart FILE.png eval_runs/A ...        # their scores as bars
    python eval.py --flip --data-dir COPIES                # and published flip rates
    python eval.py --page runs/tiny-seed0                  # a training run as HTML

Decoding is greedy and uses the prompt of training. A question that cannot be asked, or an
answer that cannot be read, counts as wrong. eval_runs/MODEL/BENCHMARK/ holds config.json,
samples.jsonl (all responses) and results.json. After a kill, run the same command again.
"""
import argparse
import base64
import csv
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
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageFile
from tqdm import tqdm

import perl
from perl import LETTERS, Sample, all_orders, normalize, permute, same_answer, sample_groups

RULES = "by rules; below judged scores, for which a language model read the answers"

class Benchmark(NamedTuple):
    """Where a benchmark's rows are, how many there are, and how its score is computed."""
    hub: str      # data set on the Hub; --data-dir holds it under the name after "/"
    files: str    # its rows
    rows: int     # 0: any number
    scoring: str
    paper: tuple = ("", "")  # the paper's Qwen2.5-VL-7B and PeRL (n_s = 1)
    mean: str = "questions"  # the score is a mean over questions or over tasks
    has_paths: bool = False  # images are files, zipped or not

BENCHMARKS = {
    "digits": Benchmark("", "test.jsonl", 0, "as in training"),
    "mantis-eval": Benchmark("TIGER-Lab/Mantis-Eval", "mantis_eval/test-*.parquet", 217,
                             "10 of the paper's 12 scores are k/216", (70.80, 76.39)),
    "blink": Benchmark("BLINK-Benchmark/BLINK", "*/val-*.parquet", 1901, "letter", (55.23, 58.53)),
    "mmiu": Benchmark("FanqingM/MMIU-Benchmark", "all.parquet", 11698,
                      "letter; rows with a gold", (52.00, 54.23), "tasks", has_paths=True),
    "mathvista": Benchmark("AI4Math/MathVista", "data/testmini-*.parquet", 1000, RULES,
                           (68.20, 73.00)),
    "mathverse": Benchmark("AI4Math/MathVerse", "testmini.parquet", 3940, RULES, (46.30, 49.56)),
    "mathvision": Benchmark("MathLLMs/MathVision", "data/test-*.parquet", 3040, RULES,
                            (25.07, 28.26)),
    "remi": Benchmark("mehrankazemi/ReMI", "test.parquet", 2600,
                      "value within its task's tolerance", (36.38, 43.38), mean="tasks"),
    "mv-math": Benchmark("PeijieWang/MV-MATH", "**/MV-MATH.json", 2009, RULES, (20.41, 25.68),
                         has_paths=True),
    "muirbench": Benchmark("MUIRBENCH/MUIRBENCH", "data/test-*.parquet", 2600, "letter"),
    "medframeqa": Benchmark("SuhaoYu1020/MedFrameQA", "**/test-*.parquet", 2851, "letter")}

# ---- Reading free text: what an answer or a choice is ----------------------------------
# "the answer is ...", "the best option: ..."; but not "the answer if ...".
DECLARATION = re.compile(
    r"(?i)\b(?:answer|(?:correct|right|best|final) (?:option|choice))\b(?:(?!\bif\b)"
    r"[^.\n:=]){0,80}?(?:\b(?:is|be)\b|:|=)[\s:]*(?=((?:[^.\n]|\.(?=\S)){1,300}))")

# A program, fenced or not: letters and numbers in it are names and steps.
PROGRAM = re.compile(
    r"(?ms)```(?=[^`]*(?:=|\w\())\w*\n.*?(?:```|\Z)|"
    r"^ *(?:import \w|from \w+ import|def \w+\(|\w+ = |print\().*^ *(?:print\(|return\b)[^\n]*|"
    r"^ *(?:import \w+|from \w+ import .*|def \w+\(.*\):)\n.*\Z")

def visible(response: str) -> str:
    """A response after </think>, without the source of programs."""
    return PROGRAM.sub("", response.rpartition("</think>")[2])

def stated_answer(response: str) -> str | None:
    r"""The last \boxed{} or <answer>, as in training; else the last "the answer is"."""
    answer, text = perl.extract_answer(response), visible(response)
    if answer or perl.last_boxed(text) is not None or re.search("<answer>|<think>", text):
        return answer
    declared = DECLARATION.findall(text) or [""]
    return re.sub(r"^\((\w+)\)$", r"\1", declared[-1].strip("*_ $")) or None

def final_number(response: str) -> str | None:
    """The number that the last sentence settles on: "36", "So there are 36 cm."."""
    text = re.sub(r"[*_`#]", "", visible(response)).strip()
    if re.search(r"\\boxed|<answer>|<think>", text) or REFUSAL.search(text):
        return None
    last = canonical(SENTENCE_END.split(text)[-1])
    end = re.split(r"\b(?:is|are|was|were|be|equals?|has|have|gives?|get)\b|=|:\s", last)[-1]
    if to_number(end) is not None:
        return end.strip()
    alone = rf"(?<![\w-]){NUMBER.pattern}(?!\w)"
    numbers = re.findall(alone, end) or re.findall(alone, last)
    return numbers[0] if len(numbers) == 1 else None

NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth".split()
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?!But\b|However\b)|\n+|(?<=[。！？])(?=.)")
# These mark an option: a label in front, "(B)", "or C. dogs", "option b".
LABEL = r"\(?([A-Za-z])(?=[).:]|$|,? (?:because|since)\b)"
MARKED = re.compile(
    rf"^{LABEL}|\(([A-Z])\)|(?<=\s)([A-Z])(?=[).:]\s)|"
    r"\b(?i:option|choice|answer)\s*:?\s*\(?([A-Z]|[a-z](?!\s\w))(?![\w'’])|"
    r"(?:选[项择]?|答案|正确的)[是为]? ?:? ?\(?([A-Z])(?![A-Za-z])|([A-Z])(?:选?项)?[是为]?(?:正确|对的|答案)")
# A bare "B" is weaker. It must not be the word "a" ("A unique ...") or part of "N/A".
BARE = re.compile(
    r"(?<![\w'’$\\^(/])"
    r"(?!A\s+(?!(?:is|was|has|and|or|but|as|in|on|because|since|fits|looks|"
    r"seems|appears|shows|matches|would)\b)[a-z])"
    r"([A-HJ-Z])(?![\w'’(^*+-]|/)")
# These take it back: "not A", "closer than A"; "A is not", "A can be ruled out".
NOT_BEFORE = re.compile(
    r"(?i)(?:\b(?:not|than|neither|nor|unlike|except|instead of|compared to)|n't)"
    r"(?:\s+(?:the|in|of|option|choice|point|image|box))*\s+\(?$|(?:不|非|排除)[是能应]?$")
NOT_AFTER = re.compile(
    r"(?i)\)?(?:,[^,]*,)?(?:\s+(?!because|since|as|while|and)\w+){0,4}?\s+"
    r"(?:(?:is|are|was|does|do|did|can)\s?n[o']t|cannot|incorrect|wrong|ruled out|too)\b|"
    r"\)?(?:选?项)?[是为]?[不错非]")
# A sentence that claims or concludes counts more than one that compares.
CLAIM = re.compile(
    r"(?i)\b(?:therefore|thus|hence|in conclusion|closer|closest|nearer|nearest|best|most|"
    r"more accurate(?:ly)?|correct(?:ly)?|fits?|match(?:es)?)\b(?!.*\bon the other hand\b)")
REFUSAL = re.compile(
    r"(?i)^\W*(?:N/A|none|unknown)\b|\bno (?:correct |right )?answer\b|"
    r"\b(?:cannot|can't|could not|unable to|not possible to) (?:be )?"
    r"(?:determine|tell|see|view|answer|say|identify)")

def extract_choice(response: str, options=("",) * 26) -> str | None:
    """The letter of the option that a response settles on after </think>, or None."""
    text = re.sub(r"[*`\"]+|\\[()]", "", visible(response)).strip()
    if not text or "<think>" in text:
        return None
    texts = dict(zip(LETTERS, unlabeled(options)))
    stated = stated_answer(text) or ""
    named = chosen_in(stated, texts)
    if not named and re.search(r"\\boxed|<answer>", text):  # "\\frac12" is option "0.5"
        named = {letter for letter in texts if same_answer(stated, texts[letter])}
    elif not named:
        named = read_prose(text, texts)
    return min(named) if len(named) == 1 else None

def read_prose(text: str, options: dict[str, str]) -> set[str]:
    """Letters chosen by a label in front, the only "(B)", the last claim or sentence."""
    sentences = SENTENCE_END.split(without_list(text).strip())
    if re.match(LABEL, sentences[0]):
        sentences = sentences[:1]
    marked = set()
    for sentence in sentences:
        if re.search(r"\([A-Z]\)", sentence):
            marked |= chosen_in(sentence, options)
    if len(marked) == 1:
        return marked
    claims = list(filter(CLAIM.search, sentences))
    for sentence in claims[::-1] + sentences[::-1]:
        chosen = chosen_in(sentence, options)
        if chosen:
            return chosen
    return set()

def without_list(text: str) -> str:
    """A text without the options that it lists one per line: listing is not choosing."""
    first = {}  # letter -> the first line with this label
    for line in re.finditer(r"(?m)^[^\w\n]*([A-Z])[).:].*$", text):
        first.setdefault(line[1], line[0])
    if len(first) > 1:
        for line in first.values():
            text = text.replace(line, "", 1)
    return text

def chosen_in(sentence: str, options: dict[str, str]) -> set[str]:
    """Letters of the options that a sentence chooses; what follows "but" counts first."""
    wordings = [r"\b\B"]  # never matches: the options may have no texts
    # Longest first: "the left dog" must not be read as "the left".
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        words = re.escape(canonical(option))
        if words:
            wordings.append(rf"(?P<{letter}>(?<![\w./{{]){words}(?![\w/]|\.\d))")
    worded = re.compile("|".join(wordings))
    for clause in reversed(re.split(r"(?i)\b(?:but|however)\b", normalize(sentence))):
        readings = [(MARKED, clause), (worded, canonical(clause)), (BARE, clause)]
        if REFUSAL.search(clause):
            readings = readings[1:2]  # an option may say "cannot be determined"
        for regex, text in readings:
            named = affirmed(regex, text) & options.keys()
            if named:
                return named
    return set()

def affirmed(regex: re.Pattern, text: str) -> set[str]:
    """Letters that a regex finds in a text, without those that the text takes back."""
    letters = set()
    for match in regex.finditer(text):
        before = text[max(0, match.start() - 60):match.start()]
        after = text[match.end():match.end() + 100]
        if not NOT_BEFORE.search(before) and not NOT_AFTER.match(after):
            letters.add((match.lastgroup or match[match.lastindex]).upper())
    return letters

@functools.lru_cache(maxsize=65536)
def canonical(text: str) -> str:
    """One spelling for options: "the 2nd picture" -> "second image", "three" -> "3"."""
    text = normalize(text).casefold()
    for k, (number, ordinal) in enumerate(zip(NUMBER_WORDS, ORDINALS)):
        text = re.sub(rf"\b{number}\b", str(k), text)
        place = rf"(?:{ordinal}|{k}(?:st|nd|rd|th)) (?:1|image|picture|photo|option)"
        text = re.sub(rf"\b(?:image #?{k}|{place})\b", f"{ordinal} image", text)
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)

# ---- Options: as a text lists them -----------------------------------------------------
def unlabeled(options) -> list[str]:
    """Options without their labels: "A. cat", "(B) red", "(C)" -> "cat", "red", ""."""
    texts = []
    for letter, option in zip(LETTERS, options):
        text = re.sub(rf"^\s*\(?{letter}\s*[).:]\s*", "", option)
        texts.append("" if text == letter else text)
    return texts

def show_options(options: list[str]) -> str:
    """One line per option, for a question whose text does not list them."""
    return "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options))

def option_spans(text: str) -> list[tuple[int, int]]:
    """Where the options are that a text lists last, one per line: "A. 9", "(B) red"."""
    end = re.search(r"\s*(?:^(?:#|Page \d).*)?\Z", text, re.MULTILINE | re.DOTALL).start()
    labels = []
    for label in re.finditer(r"(?m)^\s*\(?([A-Z])(?:\s*[).:、．]|\s*$)\s*", text[:end]):
        if label[1] == "A":
            labels = [label]  # a list before this one holds statements, not options
        elif label[1] == LETTERS[len(labels)]:
            labels.append(label)
    stops = [label.start() for label in labels[1:]] + [end]
    return [(label.end(), len(text[:stop].rstrip())) for label, stop in zip(labels, stops)]

def listed_options(text: str) -> list[str]:
    """The texts of these options."""
    return [text[start:stop] for start, stop in option_spans(text)]

# ---- Adapters: a row of a data set -> a question ---------------------------------------
class Question(NamedTuple):
    """A Sample of perl.py and what scoring needs in addition."""
    sample: Sample                 # without an answer: always wrong
    rule: str                      # how an answer is scored, see grade_row
    options: tuple[str, ...] = ()  # texts of options A, B, ..; empty for images
    orders: tuple = ()             # of the images, to ask it in
    problem: str = ""              # why it cannot be asked
    label: str = ""                # the order_rule; why, if a benchmark's is `never`

def make_question(key, images, text, answer, rule, *, options=(), task="") -> Question:
    """One <image> per image, missing ones in front; order labels as in training."""
    text = re.sub(r"<\|\w+\|>", "", text).strip()
    surplus = text.count("<image>") - len(images)
    text = "<image>" * -surplus + text.replace("<image>", "", max(surplus, 0))
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    answer, is_listed = str(answer or "").strip(), listed_options(text) == list(options)
    found = "options that the text does not list"
    if len(images) < 2 or is_listed or not options:
        found = label_or_reason(text, answer, len(images), "benchmark")
    label = Label(text, answer, "never") if isinstance(found, str) else found
    if label.order_rule == "keep" and options:
        options = listed_options(label.question)  # their "image 2" became "<image_2>"
    # An option that is an image has no text to look for in a response.
    texts = tuple("" if "<image>" in str(option) else str(option) for option in options)
    sample = Sample(str(key), tuple(images), *label, str(task))
    shown = f"never: {found}" if isinstance(found, str) else label.order_rule
    return Question(sample, rule, texts, label=shown)

def options_in(question: Question, order) -> list[str]:
    """The options as the prompt shows them in an order: "<image_2>" -> "image 1"."""
    texts = []
    for option in question.options:
        moved = permute(dataclasses.replace(question.sample, question=option), order)
        texts.append(perl.spell_mentions(moved.question))
    return texts

def place_tags(text: str, images: list[str]) -> tuple[str, list[str]]:
    """An image's first tag (<image2>) becomes <image>, a later one <image_k>; and images."""
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
    text = re.sub(r"<image_?(\d+)>", new_tag, text)
    return text, [images[k - 1] for k in order]

def numbered_images(row: dict, place) -> list[str]:
    """The images of columns image_1, image_2 .., which may be empty."""
    return [place(row[f"image_{k}"]) for k in range(1, 7) if row.get(f"image_{k}")]

# ruff: noqa: ARG001
def from_mantis(row: dict, number: int, place) -> Question:
    """Mantis-Eval: options with or without labels, not in the question's text."""
    images, text, gold = [*map(place, row["images"])], row["question"], row["answer"]
    if row["question_type"] != "multi-choice":
        return make_question(row["id"], images, text, gold, "text", task="short-answer")
    options = unlabeled(row["options"])
    gold = extract_choice(gold) or re.sub(r"[^A-Za-z]", "", gold)[:1].upper()
    return make_question(row["id"], images, text + show_options(options), gold, "choice",
                         options=options, task="multi-choice")

def from_blink(row: dict, number: int, place) -> Question:
    """BLINK: the prompt lists the options."""
    images, gold = numbered_images(row, place), row["answer"].strip("() ")
    return make_question(row["idx"], images, row["prompt"], gold, "choice",
                         options=row["choices"], task=row["sub_task"])

def from_mmiu(row: dict, number: int, place) -> Question:
    """MMIU: the context repeats the options. A gold beyond them makes all answers wrong."""
    images, task = [*map(place, row["input_image_path"])], row["task"]
    text, gold = f"{row['question']}\n{row['context']}", (row["output"] or "").strip("() ")
    return make_question(f"{task}-{number}", images, text, gold, "choice",
                         options=listed_options(row["options"]), task=task)

def from_remi(row: dict, number: int, place) -> Question:
    """ReMI: tags <image1> in the text."""
    text, images = place_tags(row["question"], numbered_images(row, place))
    task = row["task"]
    if task in ("Collisions", "Isomorphism"):
        text += " If it is a yes or no question, answer 0 for no and 1 for yes."
    key, rule = f"{task}-{number}", f"remi {task}"
    return make_question(key, images, text, row["label"], rule, task=task)

def from_mv_math(row: dict, number: int, place) -> Question:
    """MV-MATH: tags <image_1>; four options in the text, often as images."""
    text, images = place_tags(row["question"], [*map(place, row["input_image"])])
    key, gold, rule, options = row["problem_id"], row["answer"], "value", []
    kind = row["answer_type"]
    if kind == "choice":
        rule, options, gold = "choice", listed_options(text), extract_choice(gold) or gold
        if len(set(options)) < 4 and options != ["<image>"] * 4:
            options = [""] * 4  # not all could be read, or two are equal
    elif kind == "multi-step":
        rule = "parts"
    return make_question(key, images, text, gold, rule, options=options, task=kind)

def from_mathvista(row: dict, number: int, place) -> Question:
    """MathVista: the gold of a choice is the option's text; numbers have a precision."""
    choices, gold, rule = list(row["choices"] or ()), row["answer"], row["answer_type"]
    key, text, images = row["pid"], row["query"], [place(row["decoded_image"])]
    if row["question_type"] == "multi_choice":
        rule, gold = "choice", LETTERS[choices.index(gold)] if gold in choices else ""
    elif rule in ("integer", "float"):
        rule = f"number {int(row['precision'] or 0) if rule == 'float' else 0}"
    return make_question(key, images, text, gold, rule, options=choices,
                         task=row["metadata"]["task"])

def from_mathverse(row: dict, number: int, place) -> Question:
    """MathVerse: five versions of a question. A gold is a letter, or two, or a text."""
    text, options, gold, rule = row["question"], [], row["answer"].strip(), "value"
    if row["question_type"] == "multi-choice":
        options = listed_options(row.get("question_for_eval") or text) or [""] * 4
        rule = "text" if re.fullmatch(r"[A-Z](?:\s+[A-Z])+", gold) else "choice"
        gold = LETTERS[options.index(gold)] if gold in options else gold.strip("()")
    images, text = [place(row["image"])], text or "Answer the question in the image."
    return make_question(row["sample_index"], images, text, gold, rule, options=options,
                         task=row["problem_version"])

def from_mathvision(row: dict, number: int, place) -> Question:
    """MathVision: one image; options, if any, are not in the question's text."""
    options, images = list(row["options"] or ()), [place(row["decoded_image"])]
    text, rule = row["question"] + show_options(options), "choice" if options else "value"
    return make_question(row["id"], images, text, row["answer"], rule,
                         options=options, task=row["subject"])

def from_muirbench(row: dict, number: int, place) -> Question:
    """MuirBench: <image> in questions and options; the last may be "None of the ..."."""
    images, options = [*map(place, row["image_list"])], row["options"]
    text = row["question"] + show_options(options)
    return make_question(row["idx"], images, text, row["answer"], "choice", options=options,
                         task=row["task"])

def from_medframeqa(row: dict, number: int, place) -> Question:
    """MedFrameQA: two to five frames of a video; options are not in the text."""
    options, images = unlabeled(row["options"]), numbered_images(row, place)
    key, text = row["question_id"], row["question"] + show_options(options)
    return make_question(key, images, text, row["correct_answer"], "choice", options=options)

ADAPTERS = {
    "mantis-eval": from_mantis, "blink": from_blink, "mmiu": from_mmiu, "remi": from_remi,
    "mathvista": from_mathvista, "mathverse": from_mathverse, "mathvision": from_mathvision,
    "mv-math": from_mv_math, "muirbench": from_muirbench, "medframeqa": from_medframeqa}

# ---- Data: from the Hub, or from a local copy of the same files ------------------------
def load_benchmark(name: str, args) -> list[Question]:
    """Questions of a benchmark, or of a JSONL file of samples; --limit spreads evenly."""
    adapter = ADAPTERS.get(name)
    if adapter:
        folder = find_data(BENCHMARKS[name], args.data_dir)
        rows, cache = read_rows(folder, BENCHMARKS[name].files), Path(args.out, ".images")
        place = functools.partial(place_image, folder=folder, cache=cache)
    else:
        rows = perl.load_samples(perl.SAMPLES / "test.jsonl" if name == "digits" else name)
    if name == "mmiu":
        rows = [row for row in rows if row["output"]]  # as its authors do
    n, questions = min(args.limit or len(rows), len(rows)), {}
    for k in range(n):
        number = k * len(rows) // n
        row = rows[number]
        question = adapter(row, number, place) if adapter else Question(row, "text")
        sample = question.sample
        if sample.id in questions:  # two rows with one id
            sample = dataclasses.replace(sample, id=f"{sample.id}-row{number}")
        questions[sample.id] = question._replace(sample=sample)
    return list(questions.values())

def find_data(benchmark: Benchmark, data_dir: str) -> Path:
    """The folder of a data set: in --data-dir, or downloaded. Zips are unpacked once."""
    folder = Path(data_dir, benchmark.hub.split("/")[1])
    if not data_dir:
        from huggingface_hub import snapshot_download as download  # needed here only
        wanted = [benchmark.files.replace("**/", "*")]  # the Hub's "*" matches "/", too
        if benchmark.has_paths:
            wanted += ["*.zip", "*.jpg", "*.jpeg", "*.png"]
        try:
            folder = download(benchmark.hub, repo_type="dataset", allow_patterns=wanted)
        except OSError as error:
            raise SystemExit(f"Could not load {benchmark.hub}: {error}\n"
                             "Pass a local copy with --data-dir FOLDER") from None
    for archive in Path(folder).rglob("*.zip") if benchmark.has_paths else ():
        done = archive.with_suffix("") / ".unpacked"
        if not done.exists():
            shutil.unpack_archive(archive, done.parent)
            done.touch()
    return Path(folder)

def read_rows(folder: Path, files: str) -> list[dict]:
    """Rows of parquet or JSON files. Images stay encoded: a broken one stops nothing."""
    from pyarrow import parquet  # needed here only
    rows = []
    for path in sorted(folder.glob(files)):
        if path.suffix == ".json":
            rows += json.loads(path.read_text())
        else:
            rows += parquet.read_table(path).to_pylist()
    perl.check(rows, f"no {folder / files}; --data-dir takes the Hub's files")
    return rows

@functools.lru_cache(maxsize=4)
def files_by_ending(folder: Path) -> dict[str, str]:
    """All files below a folder, by any ending of their path: "x/0.jpg", "0.jpg"."""
    files = {}
    for path in sorted(folder.rglob("*.*")):
        names = path.relative_to(folder).parts
        for k in range(len(names)):
            files.setdefault("/".join(names[k:]), str(path))
    return files

def place_image(image, folder: Path | None, cache: Path) -> str:
    """An image of a row -> the file in `folder` with such a path, or a copy in `cache`."""
    if not image:
        return "missing image"  # no file has this name, so the question counts as wrong
    if isinstance(image, str):
        ending = os.path.normpath(image).lstrip("/")
        return files_by_ending(folder).get(ending, str(folder / image))
    content = image["bytes"] or Path(image["path"]).read_bytes()
    target = cache / hashlib.sha1(content).hexdigest()
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"{target.name}-{os.getpid()}"  # of this process alone
        temporary.write_bytes(content)
        os.replace(temporary, target)
    return str(target)

# ---- Scoring ---------------------------------------------------------------------------
def grade_row(row: dict) -> tuple[str | None, bool]:
    """A line of samples.jsonl -> the answer that the response gives, and is it right?"""
    rule, gold, response = row["rule"], row["gold"], row["response"]
    if rule == "choice":
        letter = extract_choice(response, row["options"])
        texts = dict(zip(LETTERS, row["options"]))
        # MathVista lists some options twice: either letter is right.
        is_twice = bool(texts.get(letter)) and texts[letter] == texts.get(gold)
        return letter, letter == gold or is_twice
    answer = stated_answer(response)
    # A model that does not box may end in the number, unless it was cut off before.
    if answer is None and to_number(gold) is not None and not row.get("truncated"):
        answer = final_number(response)
    if answer is None:
        return None, False
    if rule.startswith("number") and to_number(answer) is not None:
        value, digits = to_number(answer), int(rule.split()[1])
        return answer, (round(value, digits) if digits else int(value)) == float(gold)
    if rule.startswith("remi"):
        return answer, remi_right(rule.split()[1], answer, gold)
    if rule == "parts":
        return answer, all_parts_right(response, gold)
    return answer, (same_value if rule == "value" else same_answer)(answer, gold)

NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
# Left side, sign, whole number, fraction, power of ten, pi, unit.
NUMERAL = re.compile(
    r"(?i)(?:(?:[A-Z]\w*)? ?= ?)?(?:about |approximately )?([-+]?) ?"
    r"(?:(\d+\.?\d*|\.\d+)(?![\d/]))?(?: ?(\d+\.?\d*|\.\d+)/(\d*[1-9]\d*))?"
    r"(?: ?(?:\\times|\\cdot|[x*]) ?10\^\{?([-+]?\d{1,3})\}?|e([-+]?\d{1,3}))? ?(\\pi\b)?"
    r"(?: ?[%°]|(?: ?/ ?| ?)(?!(?:or|and|to|[nxyz])\b)[^\W\d_]++(?:[23]|\^\{\d\})?\.?)*+")

def to_number(text: str) -> float | None:
    r"""The number that an answer is: "$1,234.5", "14 cm", "1\frac34", "2\times10^3"."""
    text = re.sub(r"\\frac ?\{?(-?\d+)\}? ?\{?(\d+)\}?", r" \1/\2", normalize(text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[£€]", "", text)
    match = NUMERAL.fullmatch(re.sub(r"≈|\\approx(?![a-z])", "=", text).strip())
    if not match or not (match[2] or match[3]):
        return None
    value = float(match[2] or 0) + (float(match[3]) / float(match[4]) if match[3] else 0)
    value *= 10.0 ** min(int(match[5] or match[6] or 0), 300) * (math.pi if match[7] else 1)
    return (-value if match[1] == "-" else value) if math.isfinite(value) else None

PART_LABEL = r"[（(]\s*[1-9]\s*[)）]"
WORD = re.compile(r"(?i)(?<![\\\w])[a-z]{4}")
SYMBOLS = re.compile(rf"{NUMBER.pattern}|[()\[\]]")

def same_value(answer: str, gold: str) -> bool:
    """same_answer on texts of mathematics: "Area = 9 cm^2", "5 = s", "bearing 212°T"."""
    texts = []
    for text in (answer, gold):
        text = normalize((perl.last_boxed(text) or text).replace("掳", "°")).strip(" ,;.")
        text = re.sub(r" +(?=\^)|(?<=°) ?T\b", "", text)
        text = re.sub(r"^([^=]*)= ?([a-z])$", r"\2=\1", text)
        texts.append(re.sub(r"^(?:[A-Za-z][a-z]{2,}[\w. ]*|S\.?A\.?|\(x, ?y\)) ?=", "", text))
    answer, gold = texts
    if "=" not in answer:  # the left side may be missing, and so may the unit
        gold = re.sub(r"^(?!\d)[\w.\\(){}, ]*=(?=\s*\S)", "", gold)
    if not re.search(r"[a-zA-Z}]$", answer):
        gold = re.sub(r"(?i)[ .]*(?<![a-z\\])(?:[kcm]?m|[a-z]{5,})(?:\^\{[23]\})?$", "", gold)
    # Of words, the numbers in their order are enough: "local maximum: (-3,60)".
    if WORD.search(gold) and not WORD.search(answer) and "(" in gold:
        return SYMBOLS.findall(answer) == SYMBOLS.findall(gold)
    return same_answer(answer, gold)

def remi_right(task: str, answer: str, label: str) -> bool:
    """ReMI's own rules: lower case, nothing after a %, a tolerance for each task."""
    value, gold = to_number(answer.split("%")[0]), to_number(label.split("%")[0])
    answer, label = (normalize(text).lower().split("%")[0].replace("\\", "").strip()
                     for text in (answer, label))
    if task in ("Collisions", "Isomorphism"):  # 0 and 1 mean no and yes there only
        answer = {"yes": "1", "no": "0"}.get(answer, answer)
    if task == "RefCoco":
        return answer in re.split(r"\s*,\s*", label)
    if value is None or gold is None:
        answer = re.sub(r"(?<=^[fgh])\(x\)$", "", answer)  # "f(x)" is the function f
        return re.sub(r"[\s()]", "", answer) == re.sub(r"[\s()]", "", label)
    bounds = {"Clocks": 10, "GeomShape": 0.03 * abs(gold), "GeomCost": 0.03 * abs(gold)}
    return abs(value - gold) <= bounds.get(task, 0.01 * abs(gold)) + 1e-9

def split_parts(separator: str, text: str) -> list[str]:
    return [part for part in re.split(separator, text) if part.strip(" ,;，；。.")]

def all_parts_right(response: str, gold: str) -> bool:
    """A multi-step question: parts labeled "(1)", "(2)", in a box each, or in a list."""
    stated, wanted = stated_answer(response), split_parts(PART_LABEL, gold)
    boxes = map(perl.last_boxed, re.split(r"(?=\\boxed)", visible(response)))
    for parts in (split_parts(PART_LABEL, stated), list(filter(None, boxes)),
                  split_parts(r"[,，;；](?![^(\[{]*[)\]}])", stated)):
        if len(parts) == len(wanted) and all(map(same_value, parts, wanted)):
            return True
    return False

def picked(row: dict) -> tuple | None:
    """What an answer picks, as positions in the given order, whatever order was asked."""
    answer, order, movable = row["answer"] or "", row["order"], row["movable"]
    is_choice = row["rule"] == "choice"
    if row["order_rule"] == "letter" or is_choice and row["order_rule"] == "keep":
        letter = extract_choice(answer, [""] * max(len(movable), len(row["options"])))
        k = LETTERS.index(letter) if letter else len(movable)
        # Under `keep`, an option without text is a picture, too: a fixed text is right.
        is_image = k < len(movable) and not (is_choice and row["options"][k])
        is_image |= k < len(movable) and row["order_rule"] == "letter"
        return (order[movable[k]],) if is_image else (letter,) if letter else None
    if row["order_rule"] in ("index", "sequence"):
        positions = [int(number) - 1 for number in re.findall(r"\d+", answer)]
        if not positions or min(positions) < 0 or max(positions) >= len(order):
            return None
        return tuple(order[position] for position in positions)
    return (normalize(answer).casefold(),) if answer else None

# ---- Measures --------------------------------------------------------------------------
def average(values: dict[str, list[float]], mean: str = "questions") -> float:
    """{task: a value per question} -> mean over questions, or over the tasks' means."""
    if mean == "questions":
        values = {"": perl.flatten(values.values())}
    return round(statistics.fmean(map(statistics.fmean, values.values())), 6)

def bootstrap(values: dict[str, list[float]], mean: str = "questions") -> list[float]:
    """95 % percentile interval of `average`; questions are resampled within each task."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(1000)
    n = sum(map(len, values.values()))
    for task in sorted(values):
        column = torch.tensor(values[task], dtype=torch.float32)              # (n,)
        drawn = torch.randint(len(column), (1000, len(column)), generator=generator)
        weight = 1 / len(values) if mean == "tasks" else len(column) / n
        total += column[drawn].mean(1) * weight                               # (1000,)
    bounds = torch.quantile(total, torch.tensor([0.025, 0.975]))
    return [round(bound, 6) for bound in bounds.tolist()]

def summary(column: list[float]) -> dict:
    """Mean, interval and number of a column of values."""
    values = {"": column}
    return {"value": average(values), "interval": bootstrap(values), "n": len(column)}

def order_measures(groups: list[list[dict]]) -> dict:
    """From graded rows, one per order. A missing one is wrong; flips are of the first 6."""
    columns, by_place = defaultdict(list), defaultdict(list)
    for rows in groups:
        n = rows[0]["orders"]
        right = [row["right"] for row in rows] + [False] * (n - len(rows))
        picks = [*map(picked, rows)] + [None] * (n - len(rows))
        columns["mean"].append(sum(right) / n)
        columns["worst"].append(min(right))
        columns["best"].append(max(right))
        columns["bias"].append(max(right) - min(right))  # p(x_max) - p(x_min), A.5
        columns["same choice"].append(len(set(picks)) == 1 and None not in picks)
        columns["flip"].append(len(set(picks[:6]) - {None}) > 1)
        columns["unread"].append(None in picks[:6])
        for row in rows:
            if row["order_rule"] in ("letter", "index"):
                right_image, = picked(row | {"answer": row["gold"]})
                by_place[row["order"].index(right_image) + 1].append(row["right"])
    measures = {name: summary(column) for name, column in columns.items()}
    places = {str(place): summary(by_place[place]) for place in sorted(by_place)}
    return measures | {"by position": places}

def graded_groups(folder: Path) -> list[list[dict]]:
    """samples.jsonl, graded: a question's rows as they were asked; questions by id."""
    groups = defaultdict(dict)
    for row in perl.read_lines(folder / "samples.jsonl"):
        row["answer"], row["right"] = (None, False) if row["error"] else grade_row(row)
        groups[row["id"]][row["k"]] = row  # a run that was killed may hold a row twice
    return [[rows[k] for k in sorted(rows)] for _, rows in sorted(groups.items())]

def score(folder: Path) -> dict:
    """Grade a run folder and write results.json: a function of its two other files."""
    config = json.loads((folder / "config.json").read_text())
    benchmark = BENCHMARKS.get(config["benchmark"], BENCHMARKS["digits"])
    mean, groups = benchmark.mean, graded_groups(folder)
    as_given, permuted, counts = defaultdict(list), [], Counter()
    for group in groups:
        first = group[0]
        as_given[first["task"]].append(first["k"] == 0 and first["right"])
        counts["unread"] += first["k"] > 0 or first["answer"] is None
        if first["orders"] > 1:
            permuted.append(group)
        for row in group:
            counts["errors"] += row["error"] != ""
            counts["unparsed"] += row["answer"] is None and not row["error"]
            counts["truncated"] += row["truncated"]
    # The denominator is fixed: a question without a response is wrong.
    for task, n in config["tasks"].items():
        as_given[task] += [False] * (n - len(as_given[task]))
    tasks = {task: summary(as_given[task]) for task in sorted(as_given)}
    result = {
        "score": average(as_given, mean), "interval": bootstrap(as_given, mean),
        "n": config["n"], "expected": benchmark.rows or config["n"],
        "missing": config["n"] - len(groups), "errors": counts["errors"],
        "unread": (counts["unread"] + config["n"] - len(groups)) / max(config["n"], 1),
        "unparsed": counts["unparsed"], "truncated": counts["truncated"], "tasks": tasks,
        "orders": order_measures(permuted) if permuted else {}, "config": config}
    perl.write_atomic(folder / "results.json", json.dumps(result, indent=1))
    return result

# ---- Asking the model ------------------------------------------------------------------
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
KEPT_SETTINGS = ("instruction", "max_pixels", "max_new_tokens", "rollout_batch", "dtype")

def settings(args) -> perl.Config:
    """Config of perl.py. A checkpoint of a run keeps that run's prompt and sizes."""
    chosen = perl.MODEL_PRESETS.get(args.model, {}) | {"model": args.model}
    run = Path(args.model).parent
    if (run / "started").exists():
        saved = json.loads((run / "config.json").read_text())
        chosen = {name: saved[name] for name in ("model", *KEPT_SETTINGS)}
    cfg = perl.Config(**chosen)
    cfg.max_prompt_tokens, cfg.gradient_checkpointing = 16384, False
    cfg.max_new_tokens = args.max_new_tokens or cfg.max_new_tokens
    cfg.rollout_batch = args.batch or cfg.rollout_batch
    return cfg

def plan(question: Question, cap: int, processor, cfg) -> Question:
    """The question with the orders to ask it in, or with the problem that prevents it."""
    try:
        length = perl.prompt_length(question.sample, processor)
        problem = f"{length} tokens" if length > cfg.max_prompt_tokens else ""
    except IMAGE_ERRORS as error:
        problem = f"image: {error}"  # a broken image counts as wrong and stops nothing
    return question._replace(orders=all_orders(question.sample, cap), problem=problem)

def batches(questions: list[Question], size: int) -> list[list[Question]]:
    """Questions in batches of at most `size` sequences, or of one question."""
    filled, room = [], 0
    for question in questions:
        if len(question.orders) > room:
            filled.append([])
            room = size
        filled[-1].append(question)
        room -= len(question.orders)
    return filled

def answer_batch(model, processor, batch: list[Question], cfg) -> list[dict]:
    """Ask the questions of a batch in all their orders: lines of samples.jsonl."""
    rows, samples, orders = [], [], []
    for question in batch:
        if not question.problem:
            samples.append(question.sample)
            orders.append(question.orders)
    answered = iter(sample_groups(model, processor, samples, orders, cfg, n=1, greedy=True))
    for question in batch:
        sample, n = question.sample, len(question.orders)
        rollouts = [None] * n if question.problem else next(answered)
        for k, (order, rollout) in enumerate(zip(question.orders, rollouts)):
            rows.append({
                "id": sample.id, "k": k, "order": order, "error": question.problem,
                "orders": n, "task": sample.source, "rule": question.rule,
                "options": options_in(question, order),
                "gold": permute(sample, order).answer,
                "order_rule": sample.order_rule, "movable": sample.movable,
                "response": rollout.text if rollout else "",
                "truncated": rollout is not None and rollout.truncated})
    return rows

def open_folder(folder: Path, config: dict, accelerator) -> set[tuple]:
    """Create or reopen a run folder: the (id, k) that it has. Refuses another config."""
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
        perl.check(saved.get(name) == value, f"{folder} has answers with {name} "
                   f"{saved.get(name)!r}, not {value!r}; remove it or choose another --out")
    return {(row["id"], row["k"]) for row in perl.read_lines(samples)}

def run_benchmark(name: str, model, processor, cfg, args, *, weights: str, folder: Path,
                  accelerator) -> None:
    """Ask all questions of a benchmark that the folder has no answers to yet."""
    with accelerator.main_process_first():  # it downloads and unpacks
        questions = load_benchmark(name, args)
    questions = screened(questions, name, args.data_dir) if args.flip else questions
    samples = [question.sample for question in questions]
    content = json.dumps([dataclasses.astuple(s)[2:] for s in samples])
    cap = args.orders or (24 if name == "digits" else 1)
    config = {
        "model": args.model, "weights": weights, "benchmark": name, "n": len(samples),
        "limit": args.limit, "orders": cap, "tasks": Counter(s.source for s in samples),
        "labels": Counter(q.label or q.sample.order_rule for q in questions),
        "questions": hashlib.sha1(content.encode()).hexdigest()}
    config |= {setting: getattr(cfg, setting) for setting in KEPT_SETTINGS[:4]}
    done, todo = open_folder(folder, config, accelerator), []
    planned = [plan(question, cap, processor, cfg) for question in questions]
    for batch in batches(planned, cfg.rollout_batch):
        # All orders of a question are in one batch; a kill may cut off the last ones.
        if not done.issuperset((q.sample.id, len(q.orders) - 1) for q in batch):
            todo.append(batch)
    world, rank = accelerator.num_processes, accelerator.process_index
    for start in tqdm(range(0, len(todo), world), name, disable=rank > 0):
        # All processes take part in each round, as gather_object waits for them.
        batch = todo[start + rank] if start + rank < len(todo) else []
        rows = gather_object(answer_batch(model, processor, batch, cfg))
        for row in rows if rank == 0 else ():
            perl.append_line(folder / "samples.jsonl", row)

# ---- Tables, comparison ----------------------------------------------------------------
def percent(value: float, interval=()) -> str:
    """0.5, (0.4, 0.6) -> "50.0 [40.0, 60.0]"."""
    bounds = [f"{100 * bound:.1f}" for bound in interval]
    return f"{100 * value:.1f} [{', '.join(bounds)}]" if bounds else f"{100 * value:.1f}"

def table(rows: list[list]) -> str:
    """Rows, the first one the heading, as an aligned Markdown table; empty ones left out."""
    rows = [row for row in rows if any(map(str, row[1:]))]
    widths = [max(map(len, map(str, column))) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    text = ""
    for row in rows:
        text += "| " + " | ".join(map(str.ljust, map(str, row), widths)) + " |\n"
    return text

def report(results: dict[str, dict], model: str) -> str:
    """A model's results in percent, one column per benchmark, and how each is scored."""
    measures = ["mean", "worst", "best", "bias", "same choice", "flip", "unread"]
    columns, notes = [["", "accuracy [95 %]", "no answer read", "paper: start", "paper: PeRL",
                       "answered", "errors", "unparsed", "truncated", "orders of", *measures,
                       "by position"]], ""
    for name, r in results.items():
        benchmark, orders = BENCHMARKS.get(name, BENCHMARKS["digits"]), r["orders"]
        cells = [name, percent(r["score"], r["interval"]), percent(r.get("unread", 0)),
                 *benchmark.paper, f"{r['n'] - r['missing']} of {r['expected']}", r["errors"],
                 r["unparsed"], r["truncated"], orders["bias"]["n"] if orders else ""]
        for measure in measures:
            found = orders.get(measure)
            cells.append(percent(found["value"], found["interval"]) if found else "")
        places = orders.get("by position", {})
        cells.append(", ".join(f"{k}: {percent(places[k]['value'])}" for k in places))
        columns.append(cells)
        notes += f"{name}: mean over {benchmark.mean}; {benchmark.scoring}\n"
        for label, n in sorted(r.get("config", {}).get("labels", {}).items()):
            notes += f"  order label {label}: {n}\n"
    return f"{model}\n\n{table([*zip(*columns)])}\n{notes}"

def compare(folder_a: Path, folder_b: Path) -> str:
    """Paired differences B - A of each benchmark, over questions that both answered."""
    lines = [["benchmark", "n", "A", "B", "B - A [95 %]", "mean over orders",
              "worst order", "where both were read", "no answer A", "no answer B"]]
    for path in sorted(folder_a.glob("*/samples.jsonl")):
        name = path.parent.name
        mean = BENCHMARKS.get(name, BENCHMARKS["digits"]).mean
        in_b = {group[0]["id"]: group for group in graded_groups(folder_b / name)}
        columns = [defaultdict(list) for _ in range(8)]  # each: task -> values
        for group in graded_groups(path.parent):
            other = in_b.get(group[0]["id"])
            if other:
                a, b = ([row["right"] for row in rows] for rows in (group, other))
                unread = group[0]["answer"] is None, other[0]["answer"] is None
                gains = [b[0] - a[0], statistics.mean(b) - statistics.mean(a), min(b) - min(a)]
                if len(a) == 1:  # as in the report, orders count where there are several
                    gains[1:] = None, None
                # Answers that could not be read flatter the gain of a model that boxes.
                gains.append(None if any(unread) else b[0] - a[0])
                for column, value in zip(columns, (a[0], b[0], *gains, *unread)):
                    if value is not None:
                        column[group[0]["task"]].append(value)
        if columns[0]:
            cells = [percent(average(column, mean)) for column in columns[:2]]
            for gain in columns[2:6]:
                values = (average(gain, mean), bootstrap(gain, mean)) if gain else ()
                cells.append(percent(*values) if values else "")
            cells += [percent(average(column)) for column in columns[6:]]
            lines.append([name, sum(map(len, columns[0].values())), *cells])
    perl.check(len(lines) > 1, f"{folder_a} and {folder_b} have no common answers")
    text = f"A = {folder_a}\nB = {folder_b}\n\n{table(lines)}"
    for path in folder_b.glob("*/config.json"):
        if not (folder_a / path.parent.name).exists():
            text += f"\nnot compared, since A lacks it: {path.parent}"
    return text

COLORS = ("#1a66c9", "#d1600a", "#1a7f37", "#8250df", "#b3261e", "#59636e")  # of models

def chart(file: str, folders: list[str]) -> None:
    """A bar chart of models by benchmark: mean over orders next to the worst order."""
    from matplotlib.figure import Figure  # needed here only
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    bars, ticks, x = defaultdict(list), [], 0
    for folder, color in zip(folders, COLORS * len(folders)):
        axes.bar(0, 0, color=color, label=Path(folder).name)
        for path in sorted(Path(folder).glob("*/results.json")):
            result = json.loads(path.read_text())
            orders = result["orders"] or {"mean": result | {"value": result["score"]}}
            # Models that were asked in other numbers of orders do not stand side by side.
            label = f"{path.parent.name}\n{orders['mean']['n']} questions"
            label += f"\nup to {result['config']['orders']} orders" if "worst" in orders else ""
            for name in ("mean", "worst")[:len(orders)]:
                bars[label].append((color, name == "worst", orders[name]))
    perl.check(bars and file.endswith(".png"), f"--chart FILE.png EVAL_RUN...: {file} is not a "
               f".png, or there are no results in {' '.join(folders) or 'no folder'}")
    # The bars of a benchmark stand together, with a gap before the next one.
    for own in bars.values():
        ticks.append(x + (len(own) - 1) / 2)
        for color, is_worst, measure in own:
            axes.bar(x, 100 * measure["value"], 0.9, color=(color, 0.3 if is_worst else 1),
                     edgecolor=color, hatch="///" if is_worst else "")
            low, high = 100 * torch.tensor(measure["interval"])
            axes.plot([x, x], [low, high], color="#24292f", linewidth=1.2)
            axes.text(x, high + 1.5, f"{100 * measure['value']:.1f}", ha="center", fontsize=8,
                      bbox={"color": "w", "pad": 0.2})
            x += 1
        x += 0.8
    axes.bar(0, 0, color="w", edgecolor="#59636e", hatch="///", label="in the worst order")
    axes.set_xticks(ticks, bars, fontsize=9)
    axes.set(xlim=(-0.9, x - 0.9), ylim=(0, 109), ylabel="right answers, %, 95 % interval")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    figure.set_size_inches(1.5 + 0.45 * max(x, 6), 4.5)
    figure.savefig(file, dpi=150)

# ---- --ask: a question about your own images -------------------------------------------
ASKS_WHICH = re.compile(r"(?i)\bwhich (?:of (?:the|these) )?(?:\w+ )?(?:one|image|picture|photo)")

def own_question(text: str, paths: list[str]) -> Question:
    """A question without a gold; its order_rule says how an answer names an image."""
    perl.check(not os.path.isfile(text), f"--ask {text}: the question comes first")
    text = text if "<image>" in text else "<image>" * len(paths) + text
    named = NAMED_IMAGE.sub(as_mention, text)  # "image 2" will follow its image
    row = {"id": "--ask", "images": [*map(os.path.abspath, paths)], "question": named,
           "answer": "1", "order_rule": "never"}
    perl.parse_sample(json.dumps(row).encode(), Path("/"), "--ask")  # exits on any error
    # No gold is known, but the rules for order labels need one: let it be the first image.
    options = listed_options(text)
    gold = "A" if options or LETTER_SLOT.search(text) else "1"
    question = make_question("--ask", paths, text, gold, "choice" if options else "text",
                             options=options)
    if question.sample.order_rule == "never":  # in doubt, all images may move
        rule = "keep" if options or not ASKS_WHICH.search(text) else "index"
        question = question._replace(sample=Sample("--ask", paths, named, gold, rule))
    return question

def ask(args) -> str:
    """The answer to --ask in each order, the image that it names, and how many agree."""
    question = own_question(args.ask[0], args.ask[1:])
    model, processor, cfg = start_model(args)
    question = plan(question, args.orders or (24 if args.all_orders else 1), processor, cfg)
    perl.check(not question.problem, f"--ask: {question.problem}")
    images, said, lines = question.sample.images, Counter(), []
    rows = answer_batch(model, processor, [question], cfg)
    folder = os.path.join(os.path.dirname(args.ask[-1]), "")  # not to be repeated in each line
    for row in rows:
        row["answer"] = grade_row(row)[0]
        # A position in the given order, whatever order was asked, or a text.
        choice, = picked(row) or [""]
        meant = images[choice].replace(folder, "") if isinstance(choice, int) else ""
        said[meant or choice] += 1
        shown = " ".join(permute(question.sample, row["order"]).images).replace(folder, "")
        lines.append([shown, row["answer"] or "not read", meant])
    choice, n = said.most_common(1)[0]
    agreement = f"{n} of {len(rows)} orders agree: {choice or 'no answer'}"
    text = table([["images in this order", "answer", "means"], *lines])
    return f"{text}\n{agreement if len(rows) > 1 else rows[0]['response']}"

# ---- --flip: the flip rate of Facet-Probe, next to its published rates -----------------
# Facet-Probe (arXiv 2606.26079) screened 270 items by hand; its rates are over "keep" and
# "borderline". Six orders, a gold that stays; a flip is more than one parsed answer.
SCREEN = "artifacts/screens/imageset_position_reference_screen.csv"
RATES = "artifacts/paper/image_set_screened_rates.csv"
FLIP_SETS = {"mantis-eval": "mantis_eval", "medframeqa": "medframeqa"}  # our name, theirs

def read_clone(data_dir: str, file: str) -> list[dict]:
    """The rows of a table in the clone of Facet-Probe below --data-dir."""
    path = Path(data_dir, "facet-probe", file)
    perl.check(path.exists(), f"--flip reads {path}: clone github.com/yahskapar/"
               "facet-probe into the folder of --data-dir")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))

def screened(questions: list[Question], name: str, data_dir: str) -> list[Question]:
    """The questions of the published rates: all images move, text and gold stay."""
    by_id, moving = {question.sample.id: question for question in questions}, []
    for row in read_clone(data_dir, SCREEN):
        key = row["hf_id"]
        if row["dataset"] == FLIP_SETS[name] and row["classification"] != "exclude":
            perl.check(key in by_id, f"--flip: {name} has no question {key}, one of the "
                       "published rates'; --data-dir needs its whole test split")
            texts = [by_id[key].sample.question, *by_id[key].options]
            asked, *options = map(perl.spell_mentions, texts)
            sample = dataclasses.replace(by_id[key].sample, question=asked, order_rule="keep",
                                         movable=None)
            moving.append(by_id[key]._replace(sample=sample, options=options, label="keep"))
    return moving

def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n; unlike a bootstrap's, it is no point at 0 of 18."""
    z, scale = 1.96 / math.sqrt(n), 1 + 1.96 * 1.96 / n
    half = z * math.sqrt(share * (1 - share) + z * z / 4)
    return (share + z * z / 2 - half) / scale, (share + z * z / 2 + half) / scale

def flip_table(results: dict[str, dict], model: str, data_dir: str) -> str:
    """Our flip rates and the published ones, each with its interval."""
    cells, heading, unread = defaultdict(list), ["flip rate [95 %]"], ""
    for name, theirs in FLIP_SETS.items():
        flip = results[name]["orders"]["flip"]
        rates = [{"model": model, "k6_flip_rate": flip["value"], "n_screened": flip["n"]}]
        rates += [row for row in read_clone(data_dir, RATES) if row["dataset"] == theirs]
        for row in rates:
            share, n = float(row["k6_flip_rate"]), int(row["n_screened"])
            cells[row["model"]].append(percent(share, wilson(share, n)))
        heading.append(f"{name}, {flip['n']} items")
        unread += f"  {name} {percent(results[name]['orders']['unread']['value'])}"
    rows = [heading] + [[key, *cells[key]] for key in cells]
    return (f"{model}, and models of Facet-Probe (its prompts)\n\n{table(rows)}\n"
            "Few items make wide intervals: only large differences mean anything.\n"
            f"Items of {model} with an unread answer in %:{unread}\n")

# ---- Order labels: what reordering does to an answer; skip it on a first reading -------
# A wrong order_rule poisons training, a `never` only loses diversity. So a question gets
# another rule only if it has one of five forms, and no word is left that may mean order:
#   letter    the options are images                    A. <image>  B. <image>
#   index     "which image ...?", the gold is a number  Which image shows the taller tower?
#   sequence  the gold sorts all images by number       Sort the images ... -> 2,1,3
#   keep      images are named by number                Is image 2 sharper than image 1?
#   keep      all images are meant                      How many images show a red object?
# "image 2" and "the second picture" become <image_2>, which follows the picture. Options
# "the second image", "the third image" of a benchmark are images: its text stays as it is.

def pattern(text: str) -> re.Pattern:
    """A regex that ignores case; it may be laid out in indented lines."""
    return re.compile("(?i)" + re.sub(r"\n +", "", text))

# Frames of one video: their order is part of every question.
VIDEO = {"nextqa", "star", "llava-video", "mementos", "visual_story_telling", "spot-the-diff"}
A_BENCHMARK = {"benchmark", *BENCHMARKS}
IMAGE = r"(?:image|picture|photo(?:graph)?|pic|img)"
PLACE = rf"(?:{'|'.join(ORDINALS[1:])}|\d{{1,2}}(?:st|nd|rd|th))"
SIDE = r"(?:left|right|top|bottom|upper|lower|middle|cent(?:er|re|ral))(?:most|-?hand|-?side)?"
NAME = rf"(?:the )?(?:{IMAGE} #?(\d{{1,2}})|({PLACE}) {IMAGE})\b(?!-)"
NAME_ALONE = pattern(rf"{NAME}\.?")
NAMED_IMAGE = pattern(rf"\b{NAME}(?!\s*[:=]\s*<image>)")
WHERE = rf"(?:{PLACE}|left|right)"
TWO_PLACES = pattern(rf"\b({WHERE}) (or|and) (?=(?:the )?{WHERE} {IMAGE}s?\b)")
LEFT_OR_RIGHT = pattern(
    rf"""\b(?:the )?(left|right)(?:most|[- ]?hand)? {IMAGE}s?\b(?!['’-])|
    \b(?:the )?{IMAGE} (?:on|to|at) (?:the )?(?:far )?(left|right)\b
    (?! of| ?-?(?:most|hand|half|edge|side))""")
LETTER_SLOT = pattern(rf"\b(?:(?:candidate|option)(?: {IMAGE})? )?([A-J])[:.)] *<image>")
SLOT_LABEL = pattern(rf"\b{NAME}\s*[:=]\s*<image>")  # "Image 1: <image>"
BARE_NUMBERS = NUMBER_WORDS[1:] + "i ii iii iv v".split()
NAMED_WORDS = {"{IMAGE}": IMAGE, "{PLACE}": PLACE, "{SIDE}": SIDE,
               "{NUMBER}": "|".join(BARE_NUMBERS)}

def read_words() -> dict[str, re.Pattern]:
    """The lists of order_words.txt, where comments say what each is for."""
    text, words = (perl.SAMPLES / "order_words.txt").read_text(encoding="utf-8"), {}
    for name, regex in NAMED_WORDS.items():
        text = text.replace(name, regex)
    # A list is its name in brackets, then indented lines.
    for name, lines in re.findall(r"(?m)^\[(.+)\]\n((?: .*\n)+)", text):
        words[name] = pattern("\n" + lines.rstrip("\n"))
    return words

WORDS = read_words()
BARE_NAMES = {*BARE_NUMBERS, *"abcdefghij", *map(str, range(100)), "and", "no", "number"}
LETTER_NAME = re.compile(r"\b(?:[B-HJ-Z]\b(?![-'.])|A\b(?! [a-z]))|(?<=[a-z] )(?<!letter )A\b")
SORTS_IMAGES = pattern(
    rf"""\b(?:sort|order|arrange)(?: all)?(?: of)?(?: the| these)?(?: \w+)? {IMAGE}s\b|
    \border (?:were|are|should) (?:the|these)(?: \w+)? {IMAGE}s\b""")
SORTING = pattern(
    r"\b(?:sort|order|arrange)\b|\bin (?:which|what) order\b|\b(?:\w+est|most|least) first\b")
# A description of one picture: its sides are sides in the picture, unless they are an image's.
RETRIEVAL = pattern(rf"""\bgiven (?:a|this) detailed description\b|
    \bwhich {IMAGE} (?:is|do you think) the caption\b""")
SIDE_OF_IMAGE = pattern(rf"""\b{SIDE}[- ](?:hand )?(?:{IMAGE}|one|option|frame)|
    \b(?:{IMAGE}|one|option|frame) (?:on|in|at|to) the (?:far )?{SIDE}\b""")
# One unnamed image: which one would depend on the order, unless its content says so.
LONE_IMAGE = pattern(
    rf"""\b(?:the|this|that)(?: (?!other|same|target)\w+)? {IMAGE}\b
    (?! (?:with|that|which|of|showing|containing|where|in which|on which|numbers)\b)""")
FIXED_OPTION = pattern(r"(?:none|cannot|can't|no (?:correct|right|such)|unknown)\b.*")
SERIES = pattern(r"\b(?:sequence|series|order|previous|next|after|before|between)\b")
OF_REFERENCE = pattern(r"\b(?:next in|completes) the (?:pattern|sequence|row)\b|\bthis one\b")
NO_CHANGE = pattern(rf"\bmost likely\b(?! to)|\b(?:{IMAGE}s|was|were)(?: the {IMAGE}s)? taken\b")
STATEMENT = pattern(rf"\btwo {IMAGE}s, is the (?:following )?statement (?:true|right)\b")
WHICH_IMAGE = pattern(rf"\bwhich\b[^.?]*\b{IMAGE}s?\b")
ASKS_IMAGE = pattern(
    rf"""\bwhich (?:of (?:the|these)(?: \w+)? {IMAGE}s|of the other (?:two )?{IMAGE}s|(?:one )?
    {IMAGE} (?:shows?|contains?|ha[sd]|holds|depicts?|features?|includes?|displays?|is|does|
    do you|(?:provided |best )*match(?:es)?|of the other))|\bin which {IMAGE}\b|
    \bretrieve the target {IMAGE}\b|\b(?:find|select|choose|identify) the {IMAGE}\b""")
WHICH_IMAGES = pattern(
    rf"\bwhich (?:of (?:the|these) )?(?:\w+ )?{IMAGE}s\b|\b(?:all|those) {IMAGE}s that\b")
OF_WHICH = pattern(r"\b(?:one|either|another|each|an image|reference|query)\b|@|<image>")
ASKS_NUMBER = pattern(r"\b(?:how many|fraction|what is the (?:sum|number|total))\b")
NUMBER_OF_IMAGE = pattern(rf"\bnumber of (?:the|an?|that) {IMAGE}\b|\b{IMAGE} number\b")
REFERENCE_SLOT = pattern(
    rf"""(?:\A|[.?!\n]\s*)(?:(?:reference|query)(?: {IMAGE})?\s*:\s*<image>|
    if <image> is the (?:reference|query) {IMAGE})""")
REFERENCE_NAME = pattern(
    rf"<image_(\d+)> is the (?:reference|query)|(?:reference|query) {IMAGE} is <image_(\d+)>")
BETWEEN = pattern(r"[\s.,;]*(?:and)?[\s.,;]*")  # may stand between equal images
PREAMBLE = pattern(r"^answer the following (?:multiple-choice )?question:\s*")

class Label(NamedTuple):
    """The order fields of a sample, and its question with <image_k> for "image k"."""
    question: str
    answer: str
    order_rule: str
    movable: tuple[int, ...] | None = None

def infer_label(question: str, answer: str, n_images: int, source: str) -> Label:
    """The order label. `answer`: an option's letter, an image's number or name, text."""
    found = label_or_reason(question, answer, n_images, source)
    is_never = isinstance(found, str)
    return Label(PREAMBLE.sub("", question), answer, "never") if is_never else found

def label_or_reason(question: str, answer: str, n_images: int, source: str) -> Label | str:
    """The order label, or the reason why it is `never`."""
    options, name = listed_options(question), NAME_ALONE.fullmatch(answer)
    names_image = not options and re.search(IMAGE, answer, re.IGNORECASE)
    answer = str(image_number(name)) if name and names_image else answer  # "Image 3"
    never = Label(PREAMBLE.sub("", question), answer, "never")
    if n_images < 2 or question.count("<image>") != n_images or source in VIDEO:
        return "one image" if n_images < 2 else "frames of a video"
    if answer not in list(LETTERS[:len(options)]) and (options or not answer):
        return "no gold"
    asked = question
    if options:
        asked = question[:option_spans(question)[0][0]].rpartition("\n")[0]
    slots = LETTER_SLOT.findall(asked)
    if not options and slots == list(LETTERS[:len(slots)]):  # "A: <image> B: <image>"
        asked = LETTER_SLOT.sub("\0", asked)
        is_last = "<image>" not in asked.partition("\0")[2]  # a reference comes before
        options = ["<image>"] * len(slots) if is_last and answer in slots else []
    label = option_image_label(never, options, asked, n_images, source)
    label = label or text_label(never, options, n_images, source)
    # A gold "Image 3 suggests ..." would have to follow that image.
    follows = isinstance(label, str) or label.order_rule == "index"
    return label if follows or not names_image else "the answer names an image"

def text_label(never: Label, options: list[str], n_images: int, source: str) -> Label | str:
    """The label of a question whose options, if any, are texts."""
    question, answer = never.question, never.answer
    spoken = TWO_PLACES.sub(r"\1 image \2 ", question)
    if source == "nlvr2" and n_images == 2:
        spoken = LEFT_OR_RIGHT.sub(name_side, spoken)
        spoken = re.sub(rf"(?i)\bthe {IMAGE} pair\b", "the pair of images", spoken)
    texts = [re.sub(r"(?<=\S)(?:\s*<image>)+$", "", option) for option in options]
    is_odd = "<image>" in "".join(texts)
    for label in SLOT_LABEL.finditer(spoken):  # "Image 2: <image>" must be the second one
        is_odd |= image_number(label) != spoken.count("<image>", 0, label.end())
    # Where are the images, and which of them are named?
    unlabeled = SLOT_LABEL.sub("<image>", spoken)
    named = NAMED_IMAGE.sub(as_mention, spoken)
    movable = movable_slots(unlabeled, named, n_images)
    numbers = [int(number) for number in perl.MENTION.findall(named)]
    if is_odd or movable is None or not set(numbers) <= set(range(1, n_images + 1)):
        return "an image has its own place in the text"
    # Is a word left that may speak of their order?
    rest = perl.MENTION.sub("@", NAMED_IMAGE.sub(as_mention, unlabeled))
    is_list = re.fullmatch(r"\d+(\s*,\s*\d+)+", answer) is not None
    is_retrieval = RETRIEVAL.search(question) is not None
    if is_list:
        rest = SORTING.sub("", rest)
    if speaks_of_order(f"{rest} {answer}", is_retrieval):
        return "words that may mean order, time or place"
    lone = LONE_IMAGE.search(re.sub("(?i)reference|query", "other", rest))
    is_named_caption = is_retrieval and numbers and not options
    if is_oddly_named(rest) or is_named_caption or lone and not is_retrieval:
        return "a name that would not follow its image"
    # What kind of answer is it?
    unclear, keep = "answer unclear", Label(named, answer, "keep", movable)
    if is_list:
        complete = sorted(map(int, answer.split(","))) == list(range(1, n_images + 1))
        sorts = SORTS_IMAGES.search(question) and not re.search(r"(?i)\beach\b", question)
        return keep._replace(order_rule="sequence") if complete and sorts else unclear
    if ASKS_IMAGE.search(question) and not options:
        names_one = answer.isdecimal() and int(answer) - 1 in movable
        is_clear = names_one and (is_retrieval or not WORDS["asks more"].search(question))
        return keep._replace(order_rule="index") if is_clear else unclear
    is_count = ASKS_NUMBER.search(question) and not NUMBER_OF_IMAGE.search(question)
    may_name = [is_bare_name(NAMED_IMAGE.sub("", text)) for text in texts or [answer]]
    is_name = any(may_name) and (WHICH_IMAGE.search(question) or not is_count)
    if is_name or not options and WHICH_IMAGES.search(question):
        return unclear
    if numbers:
        return keep  # the names follow
    rest = NO_CHANGE.sub("", rest)
    is_evidence = source in A_BENCHMARK and options and not WORDS["action"].search(rest)
    is_about_pair = source == "nlvr2" or STATEMENT.search(question)
    is_about_all = is_about_pair or WORDS["several images"].search(named) and WORDS["shown"].search(named)
    if (is_evidence or is_about_all) and not WORDS["change"].search(rest):
        return keep
    return "perhaps not about all images, or about a change"

def option_image_label(never: Label, options: list[str], asked: str, n_images: int,
                       source: str) -> Label | str | None:
    """The label if options are images, shown or named in order, before fixed texts."""
    is_shown = options[:1] == ["<image>"]
    names = list(filter(None, map(NAME_ALONE.fullmatch, options)))
    n_options = options.count("<image>") if is_shown else len(names)
    if n_options < 2 or not all(map(FIXED_OPTION.fullmatch, options[n_options:])):
        return None
    first, has_fixed_gold = n_images - n_options, never.answer in [*LETTERS[n_options:]]
    moving = list(range(first + 1, n_images + 1))
    names_shown = NAMED_IMAGE.sub(as_mention, TWO_PLACES.sub(r"\1 image \2 ", asked))
    spoken_of = sorted({*map(int, perl.MENTION.findall(names_shown))} - {*range(first + 1)})
    rule, movable = "keep" if has_fixed_gold else "letter", tuple(range(first, n_images))
    label = never._replace(order_rule=rule, movable=movable)
    if not is_shown:  # if not in order or not alike, the names become <image_k>
        in_order = [image_number(name) for name in names] == moving
        is_alike = spoken_of in ([], moving) and not SERIES.search(asked)
        is_letter = in_order and is_alike and not has_fixed_gold and source in A_BENCHMARK
        return label if is_letter else None
    is_retrieval = RETRIEVAL.search(asked) is not None
    if first:
        asked = OF_REFERENCE.sub("", asked)
    if first < 0 or spoken_of or is_oddly_named(perl.MENTION.sub("", asked)):
        return "a name that would not follow its image"
    if speaks_of_order(NAMED_IMAGE.sub("", asked), is_retrieval):
        return "words that may mean order, time or place"
    return label

def image_number(name: re.Match) -> int:
    """A match of NAME -> the number of the image that it names: "the 2nd image" -> 2."""
    number, place = name[1], (name[2] or "").lower()
    return ORDINALS.index(place) if place in ORDINALS else int(number or place[:-2])

def as_mention(name: re.Match) -> str:
    return f"<image_{image_number(name)}>"

def name_side(name: re.Match) -> str:
    return "image 1" if (name[1] or name[2]).lower() == "left" else "image 2"

def movable_slots(text: str, named: str, n_images: int) -> tuple[int, ...] | None:
    """Positions of images that only their number tells apart. None: some have texts."""
    pieces = text.split("<image>")
    first = 1 if REFERENCE_SLOT.search(text) else 0
    alike = [BETWEEN.fullmatch(piece) for piece in pieces[1 + first:-1]]
    label = re.search(r"[^\n.?!]*:\s*$", pieces[0])  # "Left: <image>"
    group = re.search(rf"(?i)\b{IMAGE}s\b|is the reference|^\s*(?:reference|query)", pieces[0])
    lists = label and re.search(r" and |,", label[0])  # "My dog and his: <image><image>"
    if not all(alike) or label and not group or lists:
        return None
    references = set()
    for match in REFERENCE_NAME.finditer(named):
        references.add(int(match[1] or match[2]) - 1)
    if first:
        return tuple(range(1, n_images)) if references <= {0} else None
    if re.search(r"(?i)\b(?:reference|query)\b", text) and len(references) != 1:
        return None  # the reader would have to guess which image it is
    return tuple(range(n_images))

def is_bare_name(text: str) -> bool:
    """Whether an answer or option may name images: "1 and 3", "B", "circuit 2"."""
    words = set(re.findall(r"\w+", text.lower()))
    return any(map(str.isdecimal, words)) or bool(words - {"no"}) and words <= BARE_NAMES

def is_oddly_named(text: str) -> bool:
    """Whether the text may mean an image in a way that would not follow it."""
    spans = option_spans(text)
    asked = text[:spans[0][0]].rpartition("\n")[0] if spans else text
    other = re.search(r"(?i)\bthe other\b", text)
    if other and not OF_WHICH.search(text, 0, other.start()):
        return True  # the other one of which?
    return WORDS["odd name"].search(text) is not None or LETTER_NAME.search(asked) is not None

def speaks_of_order(text: str, is_retrieval: bool) -> bool:
    """Whether words are left that may mean the order of images, not the inside of one."""
    plain = WORDS["inside"].sub("", text)
    if is_retrieval and not SIDE_OF_IMAGE.search(text):
        plain = WORDS["in a picture"].sub("", plain)
    return WORDS["order"].search(plain) is not None

# ---- --page: a training run as one HTML file -------------------------------------------
def write_page(run: Path) -> Path:
    """page.html in a stage's folder, or in OUT's last: the template with its data."""
    folder, rows = perl.stage_folder(run), []
    for name in ("rollouts", "held_out"):
        for row in perl.read_lines(folder / f"{name}.jsonl"):
            rows.append(row | {"held_out": name == "held_out"})
    metrics = perl.read_lines(folder / "metrics.jsonl")
    perl.check(metrics, f"--page {folder}: no metrics.jsonl of a training run there")
    # A fork may have other settings, or lack some.
    config = vars(perl.Config()) | json.loads((folder / "config.json").read_text("utf-8"))
    by_group, images = defaultdict(list), {}
    for row in rows:
        # A held-out question is one group: its answers are followed through all steps.
        by_group["held-out" if row["held_out"] else row["step"], row["id"]].append(row)
        for path in row["images"]:
            if path not in images:
                images[path] = as_data(path)
    groups = [describe(group, SimpleNamespace(**config)) for group in by_group.values()]
    data = {"run": "/".join(folder.resolve().parts[-2:]), "config": config,
            "metrics": metrics, "groups": groups, "images": images}
    # Model text stays text: a "</script>" in it must not end the script.
    content = json.dumps(data).replace("<", "\\u003c")
    template = (perl.SAMPLES / "page.html").read_text(encoding="utf-8")
    perl.write_atomic(folder / "page.html", template.replace("NO_DATA", content))
    return folder / "page.html"

def describe(rows: list[dict], cfg) -> dict:
    """A group as the page shows it: rollouts by order, statistics, the verdict."""
    rewards, orders = [row["reward"] for row in rows], defaultdict(list)
    for row in rows:
        named = perl.named_positions(SimpleNamespace(**row | {"answer": row["gold"]})) or []
        right_image = named[0] if len(named) == 1 else -1  # to be framed, if it is one
        orders[tuple(row["order"])].append(row | {"right_image": right_image})
    verdict = cfg.filter  # of a fork: only its own code knows its verdicts
    if verdict in perl.CHOICES["filter"]:
        verdict = perl.verdict([SimpleNamespace(**row) for row in rows], cfg)
    return {"step": rows[0]["step"], "id": rows[0]["id"], "orders": list(orders.values()),
            "held_out": rows[0]["held_out"], "mean": statistics.fmean(rewards),
            "deviation": statistics.pstdev(rewards), "verdict": verdict}

def as_data(path: str) -> str:
    """An image as text, at most 256 pixels wide and high; empty if it is gone."""
    try:
        image = perl.read_image(path)
    except OSError:
        return ""
    image.thumbnail((256, 256))
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()

# ---- Main ------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tiny", help="Hub id, local folder or perl.py's short name")
    add("--benchmarks", default="digits", help=f"all, *.jsonl or {', '.join(BENCHMARKS)}")
    add("--limit", type=int, default=0, help="ask at most N questions, evenly spread")
    add("--orders", type=int, default=0, help="per question [24 for digits, else 1]")
    add("--data-dir", default="", help="local copies of the data sets [from the Hub]")
    add("--out", default="eval_runs", help="folder of the runs")
    add("--batch", type=int, default=0, help="sequences at a time [perl.py: rollout_batch]")
    add("--max-new-tokens", type=int, default=0, help="longest response [2048; tiny: 64]")
    add("--flip", action="store_true", help="flip rates of Facet-Probe's questions")
    add("--score-only", action="store_true", help="grade saved responses, load no model")
    add("--ask", nargs="+", metavar=("QUESTION", "IMAGE"), help="about images of your own")
    add("--all-orders", action="store_true", help="--ask in at most 24 orders, or --orders")
    add("--compare", nargs=2, metavar="EVAL_RUN", help="eval_runs/MODEL: paired differences")
    add("--chart", nargs="+", metavar=("FILE.png", "EVAL_RUN"), help="eval_runs/MODEL: bars")
    add("--page", metavar="RUN", help="page.html of a training run: curves and groups")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = perl.nearest(unknown[0], map(perl.flag_of, vars(args)))
        parser.error(f"no such argument: {unknown[0]}{hint}")
    perl.check(not args.ask or len(args.ask) > 1, "--ask needs a question and its images")
    if args.flip:  # fixed questions in six orders
        args.benchmarks, args.limit, args.orders = ",".join(FLIP_SETS), 0, 6
    paper = [name for name in BENCHMARKS if BENCHMARKS[name].paper[0]]
    args.benchmarks = paper if args.benchmarks == "all" else args.benchmarks.split(",")
    for name in args.benchmarks:
        if name not in BENCHMARKS and not name.endswith(".jsonl"):
            parser.error(f"--benchmarks {name}: not all, {', '.join(BENCHMARKS)} or *.jsonl"
                         f"{perl.nearest(name, BENCHMARKS)}")
    return args

def start_model(args) -> tuple:
    """The model of --model, its processor and its settings. Exits if it cannot be found."""
    folder = Path(args.model)
    is_hub_id = args.model.count("/") == 1 and not folder.parent.is_dir()
    names = [*perl.SHORT_NAMES, *map(str, folder.parent.glob("*"))]
    perl.check(args.model in perl.SHORT_NAMES or is_hub_id or folder.is_dir(), f"--model "
               f"{args.model} is not a folder, short name or Hub id{perl.nearest(args.model, names)}")
    perl.check(not (folder / "started").exists(), f"--model {folder} is a run; name its "
               f"checkpoint, {perl.newest_checkpoint(folder)}")
    accelerator, cfg = Accelerator(), settings(args)
    perl.fit_machine(cfg, accelerator.device, accelerator.num_processes)
    processor = perl.load_processor(args.model, cfg)
    return perl.load_model(args.model, cfg, accelerator.device), processor, cfg

def ask_and_report(args) -> None:
    """Ask the chosen benchmarks, unless --score-only; then grade and print a table."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # show as much as there is of a broken image
    accelerator, parts = Accelerator(), Path(args.model).parts
    # RUN/stage1/checkpoint-40: all three parts are needed to tell runs apart.
    n_parts = 3 if Path(args.model).with_name("started").exists() else 1
    model_name = "-".join(parts[-n_parts:])
    out = Path(args.out, model_name, "flip" if args.flip else "")
    if not args.score_only:
        model, processor, cfg = start_model(args)
        # The start of each tensor identifies the weights: others are another run.
        starts = [w.detach().flatten()[:64].float().tolist() for w in model.parameters()]
        weights = hashlib.sha1(str(starts).encode()).hexdigest()
        for benchmark in args.benchmarks:
            run_benchmark(benchmark, model, processor, cfg, args, weights=weights,
                          folder=out / Path(benchmark).stem, accelerator=accelerator)
    if accelerator.is_main_process:
        folders = sorted(path.parent for path in out.glob("*/config.json"))
        results = {folder.name: score(folder) for folder in folders}
        perl.check(results, f"{out} holds no responses; run without --score-only first")
        text = report(results, model_name)
        text = flip_table(results, model_name, args.data_dir) if args.flip else text
        perl.write_atomic(out / "summary.md", text)
        print(text)

def main(argv: list[str] | None = None) -> None:
    """Compare or draw runs, or write a page, or ask the model and report."""
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if args.compare:
            print(compare(*map(Path, args.compare)))
        elif args.chart:
            chart(args.chart[0], args.chart[1:])
            print(f"wrote {args.chart[0]}")
        elif args.ask:
            print(ask(args))
        elif args.page:
            print(f"wrote {write_page(Path(args.page))}")
        else:
            ask_and_report(args)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; run the same command again to continue") from None

if __name__ == "__main__":
    main()
