#!/usr/bin/env python3
"""Turns public training sets into the one format that perl.py reads.

    python curate.py mantis:nlvr2 mantis:iconqa mmk12 hiyouga/geometry3k --out DIR
    python curate.py mantis:dreamsim --data-dir COPIES --against BENCHMARKS --out DIR
    python curate.py mmk12 --label-with Qwen2.5-VL-7B --out DIR  # a model checks the labels too
    python curate.py --score-labels    # measures the label rules on order_labels.jsonl

1. An adapter takes the first question of each row. Images become plain RGB files.
2. Rules drop questions that cannot be asked or graded, and label what a reordering of the
   images does to the answer (eval.py, "Order labels"). A wrong label poisons training, while
   `never` only loses diversity. So when in doubt, the label is `never`.
3. Duplicates are dropped, exact and near, and questions with two different answers. --against
   FOLDER also drops what shares a picture or 13 consecutive words with a benchmark.

DIR gets train.jsonl, images/, dropped.jsonl (examples for each rule), REPORT.md and ten.jpg (ten
random questions). After a kill, the same command continues. Same input, same bytes.
"""
import argparse
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import perl
from eval import IMAGE, NAME, image_number, infer_label, listed_options, pattern

MAX_IMAGES, MAX_TEXT, MAX_ANSWER_WORDS = 16, 4000, 3
MAX_BYTES, MAX_PIXELS, MAX_ASPECT = 50_000_000, 40_000_000, 100  # of an image
NEAR_BITS = 3           # near duplicates differ in at most 3 of 63 hash bits
LIKE_BITS, LIKENESS = 16, 0.985  # or in 16, with thumbnails that correlate (--against)
NEAR_TEXT = 0.9         # texts are near duplicates from this difflib ratio on
RUN_WORDS = 13          # consecutive words shared with a benchmark count as a leak
TEMPLATE_USES = 10      # runs in more than 10 of our own questions are a template, not a leak
EXAMPLES = 5            # examples kept of what a rule dropped from a source

class Dropped(Exception):
    """A row that is left out; its text is the name of the rule."""

# ---- Sources: rows of a data set, from the Hub or from a local copy --------------------

class Source(NamedTuple):
    """A data set on the Hub; --data-dir holds it under the name after the "/"."""
    name: str    # in ids, and as the samples' source
    hub: str
    config: str  # a folder in it; "": none

def parse_source(text: str) -> Source:
    if mantis := re.fullmatch(r"mantis:([\w.-]+)", text):
        return Source(f"mantis-{mantis[1]}", "TIGER-Lab/Mantis-Instruct", mantis[1])
    if text == "mmk12":
        return Source("mmk12", "FanqingM/MMK12", "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return Source(text.split("/")[1], text, "")
    raise SystemExit(f"{text}: a source is mantis:CONFIG, mmk12 or OWNER/NAME on the Hub")

def needed(module: str):
    """Import a package that only some commands need."""
    try:
        return __import__(module, fromlist=["*"])
    except ImportError:
        raise SystemExit(f"this needs: pip install {module.split('.')[0]}") from None

def find_folder(source: Source, data_dir: str) -> Path:
    """The folder of a source's train files: in a local copy, or downloaded."""
    folder = Path(data_dir, source.hub.split("/")[1])
    if not data_dir:
        wanted = f"{source.config}/train*" if source.config else "*train*.parquet"
        try:
            folder = Path(needed("huggingface_hub").snapshot_download(
                source.hub, repo_type="dataset", allow_patterns=[wanted]))
        except OSError as error:
            raise SystemExit(f"could not load {source.hub}; try --data-dir ({error})") from None
    folder = folder / source.config
    if not any(folder.rglob("train*.parquet")):
        raise SystemExit(f"no train*.parquet in {folder}")
    return folder

def read_table(path: Path) -> Iterator[dict]:
    """Rows of a parquet file, a few at a time because they contain images."""
    for batch in needed("pyarrow.parquet").ParquetFile(path).iter_batches(batch_size=32):
        yield from batch.to_pylist()

@functools.lru_cache(maxsize=None)  # opening a zip reads the list of all its members
def open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} is not a readable zip: {error}") from None

def index_images(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """File name of an image -> (zip, member) of each of that name; zip "": a loose file."""
    parts = folder / "train_images_zips.txt"
    for name in parts.read_text().split() if parts.exists() else []:
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing; {parts.name} lists it")
    index = defaultdict(list)
    for archive in sorted(folder.glob("*.zip")):
        for member in open_zip(str(archive)).namelist():
            index[Path(member).name].append((str(archive), member))
    for path in sorted(folder.rglob("*.*")):
        # A symbolic link could lead out of the data set's folder.
        is_inside = path.resolve().is_relative_to(folder.resolve())
        if path.suffix not in (".zip", ".parquet") and is_inside:
            index[path.name].append(("", str(path)))
    return index

def read_bytes(image, index: dict) -> bytes:
    """The bytes of a row's image: in the row itself, or in the file that its path names."""
    if isinstance(image, str):
        image = {"path": image}
    if image and image.get("bytes"):
        return image["bytes"]
    # Many images have the same file name. The one that shares most folders with the row's
    # path, from the end, is meant. If two share as many, neither is safe.
    parts = Path((image or {}).get("path") or "").parts[::-1]
    tails = defaultdict(list)
    for archive, member in index.get(parts[0], []) if parts else ():
        tail = os.path.commonprefix([parts, Path(member).parts[::-1]])
        tails[len(tail)].append((archive, member))
    best = tails[max(tails)] if tails else []
    if len(best) != 1:
        raise Dropped("image not found" if not best else "image name is ambiguous")
    archive, member = best[0]
    try:
        if not archive:
            return Path(member).read_bytes()
        if open_zip(archive).getinfo(member).file_size > MAX_BYTES:
            raise Dropped("image too large or too thin")
        return open_zip(archive).read(member)
    except (OSError, zipfile.BadZipFile, zlib.error):
        raise Dropped("image unreadable") from None

def adapt(row: dict, source: Source) -> tuple[str, str, list]:
    """A row -> question, answer, images. Images without a placeholder go in front."""
    if source.config:
        # Only the first turn of a conversation: later turns refer back to it.
        turns = [turn["content"] for turn in row["conversation"] or ()] + ["", ""]
        question, answer, images = *turns[:2], row["images"]
    elif source.name == "mmk12":
        question, answer, images = row["question"], row["answer"], [row["image"]]
    else:
        question, answer, images = row["problem"], row["answer"], row["images"]
    question, answer, images = question or "", answer or "", images or []
    if "<image>" not in question:
        question = "<image>" * len(images) + question
    return question, answer, images

# ---- Pictures: stored as RGB, named by their pixels, compared by a hash ----------------

def decode(content: bytes) -> Image.Image:
    """Bytes -> the RGB picture that perl.py would see."""
    try:
        # A file of a few kilobytes can hold billions of pixels, so look before decoding.
        with Image.open(io.BytesIO(content), formats=perl.IMAGE_FORMATS) as image:
            short, long = sorted(image.size)
        if short * long <= MAX_PIXELS and long <= MAX_ASPECT * short:
            return perl.read_image(io.BytesIO(content))
    except Exception:  # on broken bytes, decoders raise errors of many kinds
        raise Dropped("image unreadable") from None
    raise Dropped("image too large or too thin")

def pixel_name(picture: Image.Image) -> str:
    """A name for these pixels, whatever file they came in."""
    content = f"{picture.size}".encode() + picture.tobytes()
    return hashlib.sha1(content).hexdigest()[:24]

COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))  # of a DCT

def near_hash(picture: Image.Image) -> int | None:
    """63 bits that survive scaling and compression: whether each of the lowest frequencies
    is above their median. None for a flat picture, because all flat ones are alike."""
    gray = np.asarray(picture.convert("L").resize((32, 32)), dtype=float)
    waves = (COSINES @ gray @ COSINES.T).ravel()[1:]
    if np.abs(waves).max() < 32:
        return None
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes())

def thumbnail(picture: Image.Image) -> np.ndarray:
    """24 x 24 gray values of mean 0 and length 1: two of them multiply to a correlation."""
    small = picture.convert("L").resize((24, 24), Image.Resampling.BOX)
    gray = np.asarray(small, dtype=np.float32).ravel()
    gray = gray - gray.mean()
    return gray / max(float(np.linalg.norm(gray)), 1e-6)

def store_image(content: bytes, out: Path) -> tuple[str, int | None]:
    """Save a picture under the name of its pixels. Returns its path and its near hash."""
    picture = decode(content)
    name = pixel_name(picture)
    # A JPEG that needs no conversion is copied: as PNG it would be ten times as large.
    with Image.open(io.BytesIO(content)) as given:
        is_plain = given.format == "JPEG" and pixel_name(given.convert("RGB")) == name
    target = out / "images" / name[:2] / (name + (".jpg" if is_plain else ".png"))
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        if is_plain:
            temporary.write_bytes(content)
        else:
            picture.save(temporary, "PNG")
        os.replace(temporary, target)
    return str(target.relative_to(out)), near_hash(picture)

class NearIndex:
    """Finds an earlier hash that differs in at most NEAR_BITS bits."""
    def __init__(self):
        # Cut into NEAR_BITS + 1 bands, two such hashes are equal in at least one band.
        self.bands = defaultdict(list)

    def find(self, bits: int) -> int | None:
        for band in range(NEAR_BITS + 1):
            for other in self.bands[band, bits >> 16 * band & 0xFFFF]:
                if (bits ^ other).bit_count() <= NEAR_BITS:
                    return other
        return None

    def add(self, bits: int) -> None:
        for band in range(NEAR_BITS + 1):
            self.bands[band, bits >> 16 * band & 0xFFFF].append(bits)

# ---- Golds: answers that a correct response can match ----------------------------------

# LaTeX that changes how an answer looks, not what it means: \number{24}, \text{cm}.
DECORATION = re.compile(r"\\(?:number|num|boxed|fbox|[mh]box|text\w*|math(?:rm|bf|it|sf)|bm|"
                        r"emph|underline|ensuremath)\s*\{([^{}]*)\}")
SPACING = re.compile(r"\\(?:displaystyle\b|[()\[\],;:! ])|[$~]")
# Other commands with digits in their braces, such as \ding{172}: no response repeats them.
UNKNOWN = re.compile(r"\\(?!(?:[dt]?frac|sqrt|log|ln|lg|sin|cos|tan|cot|angle|overline|widehat|"
                     r"overrightarrow|vec|dot|left|right)\b)[a-zA-Z]+\s*\{[^{}]*\d[^{}]*\}")
STATEMENTS = re.compile(r"(?:[1-9]\s*[.．、]\s*){2,}")  # "3.4.": statements 3 and 4
CIRCLED = "①②③④⑤⑥⑦⑧⑨"
NUMBER = r"-?\d+(?:\.\d+)?"
NUMBERS = re.compile(rf"{NUMBER}(?:\s*(?:[,，、]|\band\b)\s*{NUMBER})+")  # "3, 4", "3 and 4"
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
LETTERS = re.compile(r"[A-Z](?:, ?[A-Z])+")

ONE_OF_MANY = re.compile(
    r"(?i)\bnot (?:be )?unique|\b(?:may|can) vary\b|\bany (?:one|correct|reasonable)\b|"
    r"\bfor example\b|\be\.g\.|\bsuch as\b|\betc\b|\bomitted\b|不唯一|均可|例如|略")
ALTERNATIVES = re.compile(r"(?i)\S\s*(?:\bor\b|或)\s*\S|^[a-z ]{2,}/[a-z ]{2,}$")
PARTS = re.compile(r"(?:^|\s)\(?[1-9][).]\s|[;；\n&、]|\\q?quad\b|\\\\|\\begin|\d\.\d\.")

ANSWER_NAME = pattern(
    rf"""(?:the {IMAGE} that is more similar to the reference {IMAGE} is )?{NAME}
    (?: is more similar to the reference {IMAGE})?\.?""")

def gold_of(answer: str, question: str, n_images: int) -> str:
    """A row's answer -> the gold: a listed option's letter, a named image's number, or a
    text; '' if it is not one of the listed options."""
    text = re.sub(r"(?i)^\s*answer\s*:\s*", "", answer).strip()
    options = listed_options(question)
    if options:
        label = re.fullmatch(r"(?s)\(?([A-Z])\)?(?:[.:]\s.*|\.)?", text)
        texts = [option.casefold().rstrip(".") for option in options]
        wanted = text.casefold().rstrip(".")
        if label:
            return label[1] if label[1] in perl.LETTERS[:len(options)] else ""
        return perl.LETTERS[texts.index(wanted)] if texts.count(wanted) == 1 else ""
    name = ANSWER_NAME.fullmatch(text)
    if name:
        return str(image_number(name)) if image_number(name) <= n_images else ""
    return text.strip("$ ") or text

def unwrap_gold(gold: str, question: str) -> str:
    r"""A gold without what a response would not repeat. Examples: \number{24} -> 24,
    "24 (students)" -> 24, "3 and 4" -> "3, 4", "3.4." -> "3, 4" or the question's "③④"."""
    previous = None
    while gold != previous:  # decorations can be nested
        previous = gold
        gold = re.sub(r"\s+", " ", DECORATION.sub(r" \1 ", SPACING.sub(" ", gold))).strip()
        gold = re.sub(r"^\{([^{}]*)\}$", r"\1", gold)
    gold = re.sub(rf"^({NUMBER}) ?[(（](?!mod\b|or\b|not\b)[a-z ]+[)）]$", r"\1", gold)
    if STATEMENTS.fullmatch(gold):
        # "3.4." can also be the number 3.4 with a full stop. So it must be the name of
        # statements in the question: ③, or a label such as (3), "3." or "3、".
        numbers = re.findall(r"\d", gold)
        circles = "".join(CIRCLED[int(number) - 1] for number in numbers)
        labels = re.findall(r"(?<![\d.])(\d)\s?[).．、](?!\d)", question)
        if set(circles) <= set(question):
            return circles
        if set(numbers) <= set(labels):
            return ", ".join(numbers)
    is_list = NUMBERS.fullmatch(gold) and not THOUSANDS.fullmatch(gold)
    return ", ".join(re.findall(NUMBER, gold)) if is_list else gold

def has_parts(gold: str) -> bool:
    """Whether a gold answers several questions: labelled, or as "x = 1, y = 2", "5, no"."""
    if PARTS.search(gold):
        return True
    # The grader compares lists.
    if any(lists.fullmatch(gold) for lists in (NUMBERS, THOUSANDS, LETTERS)):
        return False
    # Commas inside brackets belong to one answer: a point, an interval, a function's value.
    inner, text = None, gold
    while text != inner:
        inner, text = text, re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "", text)
    if re.search(r"[,，]|\d \d+(?!\s*/|\d)", text):
        return True
    return re.search(r"[\d\\=].*\band\b|\band\b.*[\d\\=]", text) is not None  # "5 and no"

def check_gold(gold: str) -> None:
    """Dropped: no natural answer would be graded as right."""
    if not gold:
        raise Dropped("no answer")
    if re.search(IMAGE, gold, re.IGNORECASE):
        raise Dropped("answer names an image in words")
    if ONE_OF_MANY.search(gold):
        raise Dropped("answer is one of many")
    if ALTERNATIVES.search(gold):
        raise Dropped("answer lists alternatives")
    if has_parts(gold):
        raise Dropped("answer has several parts")
    if UNKNOWN.search(gold):
        raise Dropped("answer in unknown LaTeX")
    is_long = len(gold.split()) > MAX_ANSWER_WORDS and not re.search(r"[\\^=+]", gold)
    if is_long or len(gold) > 100:
        raise Dropped("open answer")
    if not perl.is_correct(f"\\boxed{{{gold}}}", gold):
        raise Dropped("answer that our grader cannot read")

# ---- A row becomes a sample, or names the rule that drops it ---------------------------

def make_sample(question: str, answer: str, images: list, *, number: int, source: Source,
                index: dict, out: Path) -> dict:
    """A question -> {sample, hashes of its images}. Dropped: a rule excludes it."""
    question = re.sub(r"\r\n?", "\n", question).strip()
    if not 1 <= len(images) <= MAX_IMAGES:
        raise Dropped(f"not 1 to {MAX_IMAGES} images")
    if question.count("<image>") != len(images):
        raise Dropped("placeholders do not fit the images")
    if len(question) > MAX_TEXT:
        raise Dropped(f"question over {MAX_TEXT} characters")
    if re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]|<\|\w+\|>|<image_", question + answer):
        raise Dropped("control characters or tokens in the text")
    gold, has_options = gold_of(answer, question, len(images)), listed_options(question)
    if not has_options:  # with options, it is a letter
        gold = unwrap_gold(gold, question)
        check_gold(gold)
    elif not gold:
        raise Dropped("answer is none of the options")
    # "The first image" became "1", which alone could be a count.
    names_image = not has_options and re.search(IMAGE, answer, re.IGNORECASE)
    named = f"image {gold}" if names_image and gold.isdecimal() else gold
    label = infer_label(question, named, len(images), source.config)
    text = label.question
    asks_number = label.order_rule == "index" or names_image
    if asks_number and not re.search("(?i)image number", text):
        text += " Answer with the number of the image."
    stored = [store_image(read_bytes(image, index), out) for image in images]
    sample = {"id": f"{source.name}-{number:07d}", "images": [path for path, _ in stored],
              "question": text, "answer": gold, "order_rule": label.order_rule,
              "source": source.name}
    if label.order_rule != "never" and len(label.movable) < len(images):
        sample["movable"] = list(label.movable)
    try:
        perl.parse_sample(json.dumps(sample).encode(), out, "row")
    except ValueError as error:
        raise Dropped("perl.py would refuse it: " + str(error).partition(":")[0]) from None
    return {"sample": sample, "hashes": [bits for _, bits in stored]}

def take_in(source: Source, args, work: Path) -> list[dict]:
    """Rows of a source -> one log line each, kept or dropped. Continues a killed run."""
    folder = find_folder(source, args.data_dir)
    log, index = work / f"{source.name}.jsonl", index_images(folder)
    records = perl.read_lines(log)
    write_rows(log, records)  # without a last line that a kill tore
    number, done = 0, len(records)
    # The number of a row is part of its id, so rows keep their order over all files.
    for path in sorted(folder.rglob("train*.parquet")):
        for row in read_table(path):
            number += 1
            if number <= done:
                continue
            try:
                question, answer, images = adapt(row, source)
            except (KeyError, TypeError) as error:
                raise SystemExit(f"{path}, row {number}: not the columns of {source.name} "
                                 f"({type(error).__name__}: {error})") from None
            try:
                record = make_sample(question, answer, images, number=number, source=source,
                                     index=index, out=args.out)
            except Dropped as dropped:
                record = {"rule": str(dropped), "sample": {
                    "id": f"{source.name}-{number:07d}", "source": source.name,
                    "question": question[:MAX_TEXT], "answer": answer[:MAX_TEXT]}}
            perl.append_line(log, record)
            records.append(record)
    return records

def write_rows(path: Path, rows: list[dict]) -> None:
    perl.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

# ---- Rules for the whole set: benchmarks, contradictions, duplicates -------------------

def leaves(value) -> Iterator[str | bytes]:
    """Every text and every image's bytes in a row, however deeply nested."""
    if isinstance(value, (str, bytes)):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)

def benchmark_leaves(folder: Path) -> Iterator[str | bytes]:
    """The texts and images of a folder: parquet, JSON and JSONL rows, image files, zips."""
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".parquet":
            for row in read_table(path):
                yield from leaves(row)
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            for part in text.split("\n") if path.suffix == ".jsonl" else [text]:
                if part.strip():
                    yield from leaves(json.loads(part))
        elif path.suffix == ".zip":
            for member in open_zip(str(path)).namelist():
                yield open_zip(str(path)).read(member)
        elif path.is_file():
            yield path.read_bytes()

def words_of(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.replace("<image>", "").casefold()))

def runs_of(text: str) -> set[str]:
    """Every RUN_WORDS consecutive words of a text."""
    words = words_of(text).split(" ")
    return {" ".join(words[k:k + RUN_WORDS]) for k in range(len(words) - RUN_WORDS + 1)}

class Benchmarks(NamedTuple):
    """What the folders of --against contain."""
    runs: set[str]           # of words
    names: set[str]          # of pictures
    hashes: np.ndarray       # (N,), near hashes of the pictures that are not flat
    thumbnails: np.ndarray   # (N, 576)

    def shows(self, bits: int, picture: Path) -> bool:
        """Whether a picture with this near hash is one of these, scaled or compressed."""
        apart = np.bitwise_count(self.hashes ^ np.uint64(bits))
        if (apart <= NEAR_BITS).any():
            return True
        # Thin lines change more bits than that when they are scaled, so look at the pixels.
        alike = self.thumbnails[apart <= LIKE_BITS]
        return len(alike) > 0 and (alike @ thumbnail(perl.read_image(picture))).max() >= LIKENESS

def read_benchmarks(folders: list[Path]) -> Benchmarks:
    """The texts and pictures of these folders."""
    runs, names, hashes, thumbnails = set(), set(), [], []
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"--against {folder} is not a folder")
        for leaf in benchmark_leaves(folder):
            if isinstance(leaf, str):
                runs |= runs_of(leaf)
                continue
            try:
                picture = decode(leaf)
            except Dropped:  # not a picture
                continue
            names.add(pixel_name(picture))
            bits = near_hash(picture)
            if bits is not None:
                hashes.append(bits)
                thumbnails.append(thumbnail(picture))
    return Benchmarks(runs, names, np.array(hashes, dtype=np.uint64),
                      np.array(thumbnails, dtype=np.float32).reshape(-1, 576))

def drop_benchmarks(records: list[dict], folders: list[Path], out: Path) -> None:
    """Drop what shares a picture or a run of words with the benchmarks in these folders."""
    benchmarks = read_benchmarks(folders)
    uses = Counter()
    for record in records:
        uses.update(runs_of(record["sample"]["question"]) & benchmarks.runs)
    # A template such as "Answer the following multiple-choice question" gives nothing away.
    leaks = {run for run, count in uses.items() if count <= TEMPLATE_USES}
    for record in records:
        sample = record["sample"]
        for path, bits in zip(sample["images"], record["hashes"]):
            if Path(path).stem in benchmarks.names:
                record["rule"] = "picture of a benchmark"
            elif bits is not None and benchmarks.shows(bits, out / path):
                record.setdefault("rule", "near duplicate of a benchmark's picture")
        if runs_of(sample["question"]) & leaks:
            record.setdefault("rule", f"{RUN_WORDS} words of a benchmark")

def drop_duplicates(records: list[dict]) -> None:
    """Group questions about the same or nearly the same pictures in the same order; drop
    the duplicates in each group."""
    near, first_path = NearIndex(), {}  # near hash -> the first picture that has it
    groups = defaultdict(list)
    for record in records:
        pictures = []
        for path, bits in zip(record["sample"]["images"], record["hashes"]):
            known = None if bits is None else near.find(bits)
            if bits is not None and known is None:
                near.add(bits)
                first_path[bits] = path
                known = bits
            pictures.append(first_path.get(known, path))
        groups[tuple(pictures)].append(record)
    for group in groups.values():
        drop_in_group(group)

def drop_in_group(group: list[dict]) -> None:
    """Of duplicates the first stays. All versions of a question with two answers go."""
    texts, answers = [], defaultdict(set)
    for record in group:
        texts.append(words_of(record["sample"]["question"]))
        answers[texts[-1]].add(record["sample"]["answer"])
    for k, record in enumerate(group):
        likeness = 0.0
        for j, other in enumerate(group[:k]):
            same_answer = other["sample"]["answer"] == record["sample"]["answer"]
            if same_answer and "rule" not in other:
                ratio = difflib.SequenceMatcher(None, texts[k], texts[j]).ratio()
                likeness = max(likeness, ratio)
        if len(answers[texts[k]]) > 1:
            record["rule"] = "one question with several answers"
        elif likeness >= NEAR_TEXT:
            record["rule"] = "duplicate" if likeness == 1 else "near duplicate"

def kept(records: list[dict]) -> list[dict]:
    return [record for record in records if "rule" not in record]

def judge_labels(records: list[dict], args, work: Path) -> None:
    """Change labels that the model of --label-with disagrees with to `never`."""
    judge, log = LabelJudge(args.label_with), work / "judged.jsonl"
    rows = perl.read_lines(log)
    write_rows(log, rows)
    agrees = {row["id"]: row["agrees"] for row in rows}
    for record in records:
        sample = record["sample"]
        if sample["order_rule"] == "never":
            continue
        if sample["id"] not in agrees:
            parsed = perl.parse_sample(json.dumps(sample).encode(), args.out, sample["id"])
            agrees[sample["id"]] = judge.agrees(parsed)
            perl.append_line(log, {"id": sample["id"], "agrees": agrees[sample["id"]]})
        if not agrees[sample["id"]]:
            record["disputed"] = f"never, not {sample['order_rule']}"
            sample["order_rule"] = "never"
            sample.pop("movable", None)
    print(f"{args.label_with} agrees with {sum(agrees.values())} of {len(agrees)} labels")

# ---- The label rules: measured, and checked by a model ---------------------------------

WOULD_CHANGE = ("If the images stood in another order, and the text spoke of them by their "
                "new numbers, would the right answer to it be another one?")
ARE_OPTIONS = "Are the images themselves the options to choose from?"

class LabelJudge:
    """Asks a local model the paper's two questions about a label, in perl.py's format."""
    def __init__(self, name: str):
        self.cfg = perl.parse_config(["--model", name])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        perl.fit_machine(self.cfg, device)
        self.processor = perl.load_processor(name, self.cfg)
        self.model = perl.load_model(name, self.cfg, device)

    def agrees(self, sample: perl.Sample) -> bool:
        """Whether the model confirms the label on both questions; no answer is a no."""
        rule, asked, as_given = sample.order_rule, [], tuple(range(len(sample.images)))
        for text, holds in ((WOULD_CHANGE, rule != "keep"), (ARE_OPTIONS, rule == "letter")):
            text = f"{sample.question}\n\nThis is about the question above. {text} Yes or no?"
            asked.append(dataclasses.replace(sample, question=text, order_rule="never",
                                             answer="Yes" if holds else "No"))
        groups = perl.sample_groups(self.model, self.processor, asked, [[as_given]] * 2,
                               self.cfg, n=1, greedy=True)
        return all(rollout.accuracy == 1 for (rollout,) in groups)

def score_labels(path: Path) -> None:
    """Print precision and recall of the rules on labeled questions, and the misses."""
    counts = defaultdict(Counter)  # by set
    for row in perl.read_lines(path):
        question, rule, part = row["question"], row["order_rule"], row["set"]
        n = question.count("<image>")
        got = infer_label(question, gold_of(row["answer"], question, n), n, row["style"])
        mentions = list(map(int, perl.MENTION.findall(got.question)))
        wanted = (row.get("gold"), rule, tuple(row.get("movable", ())))
        right = got[1:] == wanted and mentions == row.get("mentions")
        counts[part].update(["questions"], wanted=rule != "never", right=right,
                            labeled=got.order_rule != "never")
        if not right and (got.order_rule, rule) != ("never", "never"):
            print(f"{part}: {got.order_rule}, not {rule}: {question!r}")
    for part, n in counts.items():
        print(f"{part}: of {n['questions']} questions {n['labeled']} labeled other than never, "
              f"{n['right']} right; recall {n['right']} of {n['wanted']}")

# ---- Report ----------------------------------------------------------------------------

def cross_table(pairs: list[tuple], name: str) -> str:
    """Counts of (row, column) pairs, and their sums, as a Markdown table."""
    counts = Counter(pairs)
    columns = sorted({column for _, column in pairs})
    lines = [[name, *columns, "all"], ["---"] * (len(columns) + 2)]
    for row in sorted({row for row, _ in pairs}):
        values = [counts[row, column] for column in columns]
        lines.append([row, *values, sum(values)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

def report(records: list[dict], ten: list[dict], sources: list[str]) -> str:
    """What was dropped and kept; how many images, which labels, where the answers are."""
    fates, images, rules, samples = [], [], [], []
    for record in records:
        s = record["sample"]
        fates.append((record.get("rule", "**kept**"), s["source"]))
        if "rule" not in record:
            samples.append(s)
            images.append((s["source"], len(s["images"])))
            rules.append((s["source"], record.get("disputed", s["order_rule"])))
    listed = []
    for k, s in enumerate(ten, 1):
        text = " ".join(s["question"].split())
        listed.append(f"{k}. `{s['id']}`, {s['order_rule']}, answer `{s['answer']}`: `{text}`")
    return "\n\n".join([
        f"# {len(samples)} of {len(records)} questions of {', '.join(sources)}",
        "## What became of the rows", cross_table(fates, "rule"),
        "## Images per question", cross_table(images, "source"),
        "## Order rules", cross_table(rules, "source"),
        "## Where the right answer is", cross_table(right_places(samples), "source"),
        "## Ten random questions", "![](ten.jpg)", "\n".join(listed)]) + "\n"

def right_places(samples: list[dict]) -> list[tuple[str, str]]:
    """(source and kind, place) of each answer that has one: the number of the image that it
    names, itself or through its option, and the letter of the option."""
    places = []
    for s in samples:
        options = listed_options(s["question"])
        named = re.fullmatch(r"\d+", s["answer"]) if s["order_rule"] == "index" else None
        if s["answer"] in list(perl.LETTERS[:len(options)]):
            kind = "option image" if s["order_rule"] == "letter" else "option"
            places.append((f"{s['source']}: {kind}", s["answer"]))
            named = perl.MENTION.fullmatch(options[perl.LETTERS.index(s["answer"])])
        if named:
            places.append((f"{s['source']}: image", named[named.lastindex or 0]))
    return places

def draw_ten(samples: list[dict], out: Path) -> None:
    """ten.jpg: the images of each question in rows, below its id, answer and text."""
    side, text_height, columns = 112, 34, 8
    heights = [text_height + side * math.ceil(len(s["images"]) / columns) for s in samples]
    sheet = Image.new("RGB", (side * columns, sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for k, (s, height) in enumerate(zip(samples, heights), 1):
        text = " ".join(s["question"].replace("<image>", "").split())
        text = f"{k}. {s['id']}, {s['order_rule']}, answer {s['answer']}\n{text[:140]}"
        # Pillow's built-in font has Latin letters only.
        draw.text((4, top + 2), text.encode("ascii", "replace").decode(), "black")
        for j, path in enumerate(s["images"]):
            row, column = divmod(j, columns)
            small = perl.read_image(out / path)
            small.thumbnail((side - 6, side - 6))
            sheet.paste(small, (column * side + 3, top + text_height + row * side))
        top += height
    sheet.save(out / "ten.jpg", quality=85)

# ---- Main ------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("sources", nargs="*", help="mantis:CONFIG, mmk12, OWNER/NAME")
    add("--out", type=Path, help="folder for train.jsonl and its images")
    # The copies have the Hub's files, in Mantis-Instruct/CONFIG, MMK12 or NAME.
    add("--data-dir", default="", help="folder of local copies, in place of the Hub")
    add("--against", type=Path, action="append", default=[],
        help="folder of benchmarks; what they contain is dropped")
    add("--label-with", default="", metavar="MODEL",
        help="a model checks the order labels; where it disagrees, the label becomes never")
    add("--score-labels", action="store_true", help="score the label rules, and stop")
    args = parser.parse_args(argv)
    if not args.score_labels and not (args.sources and args.out):
        parser.error("name a source and --out DIR")
    return args

def open_work(args) -> Path:
    """The folder of a run's logs. Exits if other settings or other code began it."""
    work = args.out / ".work"
    code = (HERE / "curate.py").read_bytes() + (HERE.parent / "eval.py").read_bytes()
    settings = {"sources": args.sources, "data_dir": args.data_dir, "judge": args.label_with,
                "code": hashlib.sha1(code).hexdigest()}
    if (path := work / "settings.json").exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{args.out} was begun with other sources or code; use another --out")
    work.mkdir(parents=True, exist_ok=True)
    perl.write_atomic(path, json.dumps(settings))
    return work

def write_results(records: list[dict], args) -> None:
    """train.jsonl, examples of what was dropped, report and picture."""
    samples = [record["sample"] for record in kept(records)]
    shown, examples = Counter(), []
    for record in records:
        case = record.get("rule"), record["sample"]["source"]
        shown[case] += 1
        if "rule" in record and shown[case] <= EXAMPLES:
            examples.append({"rule": record["rule"], **record["sample"]})
    write_rows(args.out / "dropped.jsonl", examples)
    write_rows(args.out / "train.jsonl", samples)
    ten = random.Random(0).sample(samples, min(10, len(samples)))
    perl.write_atomic(args.out / "REPORT.md", report(records, ten, args.sources))
    draw_ten(ten, args.out)

def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.score_labels:
        return score_labels(HERE / "order_labels.jsonl")
    sources = [parse_source(text) for text in args.sources]
    if len({source.name for source in sources}) < len(sources):
        raise SystemExit("two sources have the same name, so their ids would clash")
    work, records = open_work(args), []
    for source in sources:
        records += take_in(source, args, work)
    # Each rule works on what the rules before it left.
    drop_benchmarks(kept(records), args.against, args.out)
    drop_duplicates(kept(records))
    if not kept(records):
        raise SystemExit(f"none of {len(records)} questions is left; see {work}")
    if args.label_with:
        judge_labels(kept(records), args, work)
    write_results(records, args)
    print(f"kept {len(kept(records))} of {len(records)} questions; see {args.out / 'REPORT.md'}")

if __name__ == "__main__":
    main()
