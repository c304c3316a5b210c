#!/usr/bin/env python3
"""Turns public training sets into the one format that perl.py reads.

    python curate.py mantis:nlvr2=6000 mmk12 hiyouga/geometry3k --hold-out 500 --out DIR
    python curate.py mantis:dreamsim --data-dir COPIES --against BENCHMARKS --out DIR
    python curate.py --score-labels    # measures the label rules on order_labels.jsonl

1. An adapter takes the first question of each row. Images become plain RGB files.
2. Rules drop questions that cannot be asked or graded, and label what a reordering of the
   images does to the answer (eval.py, "Order labels"). A wrong label poisons training, while
   `never` only loses diversity. So when in doubt, the label is `never`.
3. Duplicates are dropped, exact and near, and questions with two different answers. --against
   FOLDER also drops what shares a picture or 13 consecutive words with a benchmark.
4. --hold-out N puts N questions, which share no picture with the others, into a file for
   perl.py's --eval-data.

DIR gets train.jsonl, heldout.jsonl, images/, dropped.jsonl (examples for each rule), REPORT.md
and ten.jpg (ten questions). After a kill, the same command continues. Same input, same bytes.
"""
import argparse
import difflib
import functools
import hashlib
import io
import json
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
from PIL import Image
from pyarrow import parquet

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from curation.report import kept, write_report

import eval as ev
import perl

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
    limit: int   # questions to keep at most; 0: no limit

def parse_source(text: str) -> Source:
    """Example: mantis:nlvr2=6000 is at most 6000 questions of a config of Mantis-Instruct."""
    name, equals, number = text.partition("=")
    limit = int(number) if number.isdecimal() else 0
    if limit or not equals:
        if mantis := re.fullmatch(r"mantis:([\w.-]+)", name):
            return Source(f"mantis-{mantis[1]}", "TIGER-Lab/Mantis-Instruct", mantis[1], limit)
        if name == "mmk12":
            return Source("mmk12", "FanqingM/MMK12", "", limit)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return Source(name.split("/")[1], name, "", limit)
    raise SystemExit(f"{text}: a source is mantis:CONFIG, mmk12 or OWNER/NAME on the Hub, "
                     "and perhaps =N, the most questions to keep of it")

def find_folder(source: Source, data_dir: str) -> Path:
    """The folder of a source's train files: in a local copy, or downloaded."""
    folder = Path(data_dir, source.hub.split("/")[1])
    if not data_dir:
        from huggingface_hub import snapshot_download  # needed here only
        wanted = f"{source.config}/train*" if source.config else "*train*.parquet"
        try:
            folder = Path(snapshot_download(source.hub, repo_type="dataset",
                                            allow_patterns=[wanted]))
        except OSError as error:
            raise SystemExit(f"could not load {source.hub}; try --data-dir ({error})") from None
    folder = folder / source.config
    if not any(folder.rglob("train*.parquet")):
        raise SystemExit(f"no train*.parquet in {folder}")
    return folder

def read_tables(files: list[Path]) -> Iterator[dict]:
    """Rows of parquet files, a few at a time because they contain images."""
    for path in files:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=32):
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
    """The hashes so far of which no two differ in at most NEAR_BITS bits."""
    def __init__(self):
        # Cut into NEAR_BITS + 1 bands, two such hashes are equal in at least one band.
        self.bands = defaultdict(list)

    def find_or_add(self, bits: int) -> int:
        """An earlier hash that differs in at most NEAR_BITS bits, or this one, which is added."""
        bands = [(band, bits >> 16 * band & 0xFFFF) for band in range(NEAR_BITS + 1)]
        for band in bands:
            for other in self.bands[band]:
                if (bits ^ other).bit_count() <= NEAR_BITS:
                    return other
        for band in bands:
            self.bands[band].append(bits)
        return bits

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

ANSWER_NAME = ev.pattern(
    rf"""(?:the {ev.IMAGE} that is more similar to the reference {ev.IMAGE} is )?{ev.NAME}
    (?: is more similar to the reference {ev.IMAGE})?\.?""")

def gold_of(answer: str, question: str, n_images: int) -> str:
    """A row's answer -> the gold: a listed option's letter, a named image's number, or a
    text; '' if it is not one of the listed options."""
    text = re.sub(r"(?i)^\s*answer\s*:\s*", "", answer).strip()
    options = ev.listed_options(question)
    if options:
        label = re.fullmatch(r"(?s)\(?([A-Z])\)?(?:[.:]\s.*|\.)?", text)
        texts = [option.casefold().rstrip(".") for option in options]
        wanted = text.casefold().rstrip(".")
        if label:
            return label[1] if label[1] in perl.LETTERS[:len(options)] else ""
        return perl.LETTERS[texts.index(wanted)] if texts.count(wanted) == 1 else ""
    name = ANSWER_NAME.fullmatch(text)
    if name:
        return str(ev.image_number(name)) if ev.image_number(name) <= n_images else ""
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
    if re.search(ev.IMAGE, gold, re.IGNORECASE):
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

def make_sample(name: str, question: str, answer: str, images: list, *, source: Source,
                index: dict, out: Path) -> dict:
    """A question -> {sample, hashes of its images, why it is `never`}. Dropped: a rule
    excludes it."""
    question = re.sub(r"\r\n?", "\n", question).strip()
    if not 1 <= len(images) <= MAX_IMAGES:
        raise Dropped(f"not 1 to {MAX_IMAGES} images")
    if question.count("<image>") != len(images):
        raise Dropped("placeholders do not fit the images")
    if len(question) > MAX_TEXT:
        raise Dropped(f"question over {MAX_TEXT} characters")
    if re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]|<\|\w+\|>|<image_", question + answer):
        raise Dropped("control characters or tokens in the text")
    gold, has_options = gold_of(answer, question, len(images)), ev.listed_options(question)
    if not has_options:  # with options, it is a letter
        gold = unwrap_gold(gold, question)
        check_gold(gold)
    elif not gold:
        raise Dropped("answer is none of the options")
    # "The first image" became "1", which alone could be a count.
    names_image = not has_options and re.search(ev.IMAGE, answer, re.IGNORECASE)
    named = f"image {gold}" if names_image and gold.isdecimal() else gold
    label = ev.infer_label(question, named, len(images), source.config)
    text = label.question
    asks_number = label.order_rule == "index" or names_image
    if asks_number and not re.search("(?i)image number", text):
        text += " Answer with the number of the image."
    stored = [store_image(read_bytes(image, index), out) for image in images]
    sample = {"id": name, "images": [path for path, _ in stored],
              "question": text, "answer": gold, "order_rule": label.order_rule,
              "source": source.name}
    if label.order_rule != "never" and len(label.movable) < len(images):
        sample["movable"] = list(label.movable)
    try:
        perl.parse_sample(json.dumps(sample).encode(), out, "row")
    except ValueError as error:
        raise Dropped("perl.py would refuse it: " + str(error).partition(":")[0]) from None
    record = {"sample": sample, "hashes": [bits for _, bits in stored]}
    if label.order_rule == "never":
        record["why"] = ev.label_or_reason(question, named, len(images), source.config)
    return record

def take_in(source: Source, args, work: Path) -> list[dict]:
    """Rows of a source -> one log line each, kept or dropped. Continues a killed run."""
    folder = find_folder(source, args.data_dir)
    log, index = work / f"{source.name}.jsonl", index_images(folder)
    logged = perl.read_lines(log)
    write_rows(log, logged)  # without a last line that a kill tore
    known = {record["sample"]["id"]: record for record in logged}
    files = sorted(folder.rglob("train*.parquet"))
    n_rows = sum(parquet.ParquetFile(path).metadata.num_rows for path in files)
    waiting, records = list(range(1, n_rows + 1)), {}
    limit = source.limit or n_rows
    if source.limit:
        random.Random(source.name).shuffle(waiting)
    # With a limit, random rows are taken in rounds: as many as questions are still missing,
    # since it is unknown how many of them the rules will drop.
    while waiting and len(kept(records.values())) < limit:
        missing = limit - len(kept(records.values()))
        chosen, waiting = set(waiting[:missing]), waiting[missing:]
        for number, row in enumerate(read_tables(files), 1):
            if number not in chosen:
                continue
            name = f"{source.name}-{number:07d}"  # rows keep their number over all files
            if name not in known:
                try:
                    asked = adapt(row, source)
                except (KeyError, TypeError) as error:
                    raise SystemExit(f"{folder}, row {number}: not the columns of {source.name} "
                                     f"({type(error).__name__}: {error})") from None
                known[name] = take_row(name, *asked, source=source, index=index, out=args.out)
                perl.append_line(log, known[name])
            records[name] = known[name]
    return [records[name] for name in sorted(records)]

def take_row(name: str, question: str, answer: str, images: list, **where) -> dict:
    """The record of a row: its sample, or what remains of it and the rule that drops it."""
    try:
        return make_sample(name, question, answer, images, **where)
    except Dropped as dropped:
        return {"rule": str(dropped), "sample": {
            "id": name, "source": where["source"].name,
            "question": question[:MAX_TEXT], "answer": answer[:MAX_TEXT]}}

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
            for row in read_tables([path]):
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
    text = perl.spell_mentions(text).replace("<image>", "")  # as benchmarks write it
    return " ".join(re.findall(r"\w+", text.casefold()))

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
            if bits is not None:
                path = first_path.setdefault(near.find_or_add(bits), path)
            pictures.append(path)
        groups[tuple(pictures)].append(record)
    for group in groups.values():
        drop_in_group(group)

def drop_in_group(group: list[dict]) -> None:
    """Of duplicates the first stays. All versions of a question with two answers go."""
    answers, stay = defaultdict(set), defaultdict(list)  # text: answers; answer: texts
    texts = [words_of(record["sample"]["question"]) for record in group]
    for record, text in zip(group, texts):
        answers[text].add(record["sample"]["answer"])
    for record, text in zip(group, texts):
        answer = record["sample"]["answer"]
        ratios = [difflib.SequenceMatcher(None, text, other).ratio() for other in stay[answer]]
        if len(answers[text]) > 1:
            record["rule"] = "one question with several answers"
        elif max(ratios, default=0) >= NEAR_TEXT:
            record["rule"] = "duplicate" if max(ratios) == 1 else "near duplicate"
        else:
            stay[answer].append(text)

# ---- The label rules, measured ---------------------------------------------------------

def score_labels(path: Path) -> None:
    """Print precision and recall of the rules on labeled questions, and the misses."""
    counts = defaultdict(Counter)  # by set
    for row in perl.read_lines(path):
        question, rule, part = row["question"], row["order_rule"], row["set"]
        n = question.count("<image>")
        got = ev.infer_label(question, gold_of(row["answer"], question, n), n, row["style"])
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

# ---- Held-out questions ----------------------------------------------------------------

def clusters(samples: list[dict]) -> list[list[dict]]:
    """Questions that share pictures, directly or through other questions, in one list."""
    by_picture = defaultdict(list)  # by the hash of its pixels, as PNG or JPEG
    for sample in samples:
        for path in sample["images"]:
            by_picture[Path(path).stem].append(sample)
    found, seen = [], set()
    for sample in samples:
        cluster, waiting = [], [sample]
        while waiting:
            other = waiting.pop()
            if other["id"] not in seen:
                seen.add(other["id"])
                cluster.append(other)
                for path in other["images"]:
                    waiting += by_picture.pop(Path(path).stem, [])
        if cluster:
            found.append(cluster)
    return found

def hold_out(samples: list[dict], n: int) -> set[str]:
    """Ids of about n questions, by source in proportion, that share no picture with the
    others. A cluster that is larger than what its sources still lack is passed over."""
    lacking, before = Counter(), 0
    sizes = Counter(sample["source"] for sample in samples)
    for source, size in sorted(sizes.items()):
        # The sums up to here are rounded, so that the parts add up to n.
        given = lacking.total()
        before += size
        lacking[source] = round(n * before / len(samples)) - given
    held = set()
    for cluster in sorted(clusters(samples), key=random_key):
        needs = Counter(sample["source"] for sample in cluster)
        if needs <= lacking:
            held.update(sample["id"] for sample in cluster)
            lacking.subtract(needs)
    return held

def random_key(cluster: list[dict]) -> str:
    """Looks random, and depends on the questions' ids only."""
    first = min(sample["id"] for sample in cluster)
    return hashlib.sha1(first.encode()).hexdigest()

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
    add("--hold-out", type=int, default=0, metavar="N",
        help="put N questions into heldout.jsonl, for --eval-data of perl.py")
    add("--score-labels", action="store_true", help="score the label rules, and stop")
    args = parser.parse_args(argv)
    if not args.score_labels and not (args.sources and args.out):
        parser.error("name a source and --out DIR")
    if args.hold_out < 0:
        parser.error("--hold-out must be 0 or more")
    return args

def open_work(args) -> Path:
    """The folder of a run's logs. Exits if other settings or other code began it."""
    work = args.out / ".work"
    parts = ("curate.py", "order_words.txt", "../eval.py", "../perl.py")
    code = b"".join((HERE / part).read_bytes() for part in parts)
    settings = {"sources": args.sources, "data_dir": args.data_dir,
                "code": hashlib.sha1(code).hexdigest()}
    if (path := work / "settings.json").exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{args.out} has other sources or code; remove it or use another --out")
    work.mkdir(parents=True, exist_ok=True)
    perl.write_atomic(path, json.dumps(settings))
    return work

def write_results(records: list[dict], args) -> None:
    """train.jsonl, heldout.jsonl, examples of what was dropped, report and picture."""
    samples = [record["sample"] for record in kept(records)]
    held = hold_out(samples, args.hold_out)
    write_rows(args.out / "train.jsonl", [s for s in samples if s["id"] not in held])
    (args.out / "heldout.jsonl").unlink(missing_ok=True)  # of an earlier --hold-out
    if held:
        write_rows(args.out / "heldout.jsonl", [s for s in samples if s["id"] in held])
    shown, examples = Counter(), []
    for record in records:
        case = record.get("rule"), record["sample"]["source"]
        shown[case] += 1
        if "rule" in record and shown[case] <= EXAMPLES:
            examples.append({"rule": record["rule"], **record["sample"]})
    write_rows(args.out / "dropped.jsonl", examples)
    write_report(records, held, args)

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
    if len(kept(records)) <= args.hold_out:
        raise SystemExit(f"{len(kept(records))} of {len(records)} questions are left, too few "
                         f"to hold out {args.hold_out}; {work} says what was dropped")
    write_results(records, args)

if __name__ == "__main__":
    main()
