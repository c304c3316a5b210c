#!/usr/bin/env python3
"""Turns public training sets into the one format that perl.py reads (README: Real data).

    python curate.py mantis:nlvr2 mantis:iconqa mmk12 hiyouga/geometry3k --out DIR
    python curate.py mantis:dreamsim --data-dir COPIES --against BENCHMARKS --out DIR
    python curate.py mmk12 --label-with Qwen2.5-VL-7B --out DIR  # a model doubts labels too
    python curate.py --score-labels    # the rules for order labels on order_labels.jsonl

1. Adapters: the first question of a row, its images as plain RGB files named by their pixels.
2. Rules drop what cannot be asked or graded, and say what a reordering does to the answer. A
   wrong order_rule poisons training, a `never` only loses diversity: in doubt, never.
3. Twins go, exact and near (same pictures, nearly the same text, same answer), pictures with
   two answers to one question, and what --against FOLDER holds, by picture or by 13 words.

DIR gets train.jsonl, images/, REPORT.md, ten.jpg (ten random questions) and dropped.jsonl
(examples of what each rule dropped). The same command goes on after a kill; the same input
gives the same bytes. `perl.py --stage 0 --data DIR/train.jsonl` scores what is left.
"""
import argparse
import difflib
import functools
import hashlib
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import perl  # noqa: E402  (found through the line above)
from eval import listed_options  # noqa: E402
from order_rules import IMAGE, LabelJudge, gold_of, infer_label, score_labels  # noqa: E402
from pictures import (  # noqa: E402
    Dropped, NearIndex, decode, draw_ten, near_hash, pixel_name, store_image)

MAX_IMAGES, MAX_TEXT, MAX_ANSWER_WORDS = 16, 4000, 3
MAX_BYTES = 50_000_000  # of an image file
NEAR_TEXT = 0.9         # difflib's ratio of two texts that are near twins
RUN_WORDS = 13          # words in a row that a benchmark's text and ours have in common
TEMPLATE_USES = 10      # runs in more of our own questions are a template and prove nothing
EXAMPLES = 5            # kept of what a rule dropped from a source

# ---- Sources: rows of a data set, from the Hub or from a local copy --------------------

class Source(NamedTuple):
    """A data set on the Hub; --data-dir holds it under the name behind "/"."""
    name: str    # in ids, and as the samples' source
    hub: str
    config: str  # a folder in it; "": none

def parse_source(text: str) -> Source:
    if text.startswith("mantis:") and text.removeprefix("mantis:"):
        config = text.removeprefix("mantis:")
        return Source(f"mantis-{config}", "TIGER-Lab/Mantis-Instruct", config)
    if text == "mmk12":
        return Source("mmk12", "FanqingM/MMK12", "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return Source(text.split("/")[1], text, "")
    raise SystemExit(f"{text}: a source is mantis:CONFIG, mmk12 or OWNER/NAME on the Hub")

def needed(module: str):
    """Import what only some commands need."""
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
            raise SystemExit(f"could not load {source.hub}; pass a copy, --data-dir FOLDER "
                             f"({error})") from None
    folder = folder / source.config
    if not any(folder.rglob("train*.parquet")):
        raise SystemExit(f"no train*.parquet in {folder}")
    return folder

def read_table(path: Path) -> Iterator[dict]:
    """Rows of a parquet file, a few at a time: images lie in them."""
    for batch in needed("pyarrow.parquet").ParquetFile(path).iter_batches(batch_size=32):
        yield from batch.to_pylist()

@functools.lru_cache(maxsize=None)  # opening reads the list of all members
def open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} is no readable zip: {error}") from None

def index_images(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Last name of an image -> (zip, member) of each of that name; zip "": a loose file."""
    parts = folder / "train_images_zips.txt"
    listed = parts.read_text().split() if parts.exists() else []
    for name in listed:
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing; {parts.name} lists it")
    index = defaultdict(list)
    for archive in sorted(folder.glob("*.zip")):
        for member in open_zip(str(archive)).namelist():
            index[Path(member).name].append((str(archive), member))
    for path in sorted(folder.rglob("*.*")):
        is_inside = path.resolve().is_relative_to(folder.resolve())
        if path.suffix not in (".zip", ".parquet") and is_inside:
            index[path.name].append(("", str(path)))
    return index

def read_image(image, index: dict) -> bytes:
    """The bytes of a row's image: in the row, or the one file whose path ends most like it."""
    if isinstance(image, str):
        image = {"path": image}
    if image and image.get("bytes"):
        return image["bytes"]
    parts = Path((image or {}).get("path") or "").parts[::-1]
    tails = defaultdict(list)  # folders that a path has in common with the row's, from the end
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
    """A row -> question, answer, images. Of a conversation the first turn, since later ones
    lean on it; images without a placeholder of their own stand in front."""
    if source.config:
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

# ---- Rules for a row -------------------------------------------------------------------

ASK_NUMBER = " Answer with the number of the image."

def make_sample(question: str, answer: str, images: list, *, number: int, source: Source,
                index: dict, out: Path) -> dict:
    """A question -> {sample, hashes of its images}. Dropped: some rule does not let it in."""
    question = re.sub(r"\r\n?", "\n", question).strip()
    if not 1 <= len(images) <= MAX_IMAGES:
        raise Dropped(f"not 1 to {MAX_IMAGES} images")
    if question.count("<image>") != len(images):
        raise Dropped("placeholders do not fit the images")
    if len(question) > MAX_TEXT:
        raise Dropped(f"question over {MAX_TEXT} characters")
    if re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]|<\|\w+\|>|<image_", question + answer):
        raise Dropped("control characters or tokens in the text")
    options = listed_options(question)
    gold = gold_of(answer, question, len(images))
    if not gold:
        raise Dropped("answer is none of the options" if options else "no answer")
    check_answer(gold, options)
    asks = not options and re.search(IMAGE, answer, re.IGNORECASE)
    label = infer_label(question, gold, len(images), source.config)
    if asks and label.order_rule != "index":  # "The first image" is no count that stays
        label = label._replace(order_rule="never")
    stored = [store_image(read_image(image, index), out) for image in images]
    text = label.question
    if (label.order_rule == "index" or asks) and not re.search("(?i)image number", text):
        text += ASK_NUMBER
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

def check_answer(gold: str, options: list[str]) -> None:
    """Dropped: our grader could not compare it: a sentence, several parts, an image in
    words ("the last image"), or nothing that would grade itself right."""
    is_formula = re.search(r"[\\^=+]", gold) is not None
    if not options and re.search(IMAGE, gold, re.IGNORECASE):
        raise Dropped("answer names an image in words")
    if re.search(r"(?:^|\s)\(?[1-9][).]\s|;|；|\n", gold):
        raise Dropped("answer has several parts")
    if len(gold.split()) > MAX_ANSWER_WORDS and not is_formula or len(gold) > 100:
        raise Dropped("open answer")
    if not perl.is_correct(f"\\boxed{{{gold}}}", gold):
        raise Dropped("answer that our grader cannot read")

def take_in(source: Source, args, work: Path) -> list[dict]:
    """Rows of a source -> a line each in a log, kept or dropped, from where it broke off."""
    folder = find_folder(source, args.data_dir)
    log, index = work / f"{source.name}.jsonl", index_images(folder)
    records = perl.read_lines(log)
    perl.write_atomic(log, "".join(json.dumps(record) + "\n" for record in records))
    number, done = 0, len(records)
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

# ---- Rules for the whole: benchmarks, contradictions, twins ----------------------------

def leaves(value) -> Iterator[str | bytes]:
    """Every text and every image's bytes in a row, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, (str, bytes)):
        yield value

def benchmark_leaves(folder: Path) -> Iterator[str | bytes]:
    """The texts and images of a folder: rows of parquet and JSON files, files, zips."""
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".parquet":
            for row in read_table(path):
                yield from leaves(row)
        elif path.suffix in (".json", ".jsonl"):
            texts = [path.read_text(encoding="utf-8")]
            if path.suffix == ".jsonl":
                texts = filter(str.strip, texts[0].split("\n"))
            for text in texts:
                yield from leaves(json.loads(text))
        elif path.suffix == ".zip":
            for member in open_zip(str(path)).namelist():
                yield open_zip(str(path)).read(member)
        elif path.is_file():
            yield path.read_bytes()

def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.replace("<image>", "").casefold())

def runs_of(text: str) -> set[str]:
    """Every RUN_WORDS words in a row of a text."""
    words = words_of(text)
    return {" ".join(words[k:k + RUN_WORDS]) for k in range(len(words) - RUN_WORDS + 1)}

def read_benchmarks(folders: list[Path]) -> tuple[set[str], set[str], NearIndex]:
    """Runs of words, names of pictures, and near hashes, of all that lies in the folders."""
    runs, names, near = set(), set(), NearIndex()
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"--against {folder} is no folder")
        for leaf in benchmark_leaves(folder):
            if isinstance(leaf, str):
                runs |= runs_of(leaf)
                continue
            try:
                picture = decode(leaf)
            except Dropped:
                continue  # no picture
            names.add(pixel_name(picture))
            bits = near_hash(picture)
            if bits is not None:
                near.add(bits)
    return runs, names, near

def drop_benchmarks(records: list[dict], folders: list[Path]) -> None:
    """Drop what shares a picture or a run of words with the benchmarks in these folders."""
    runs, names, near = read_benchmarks(folders)
    uses = Counter()
    for record in records:
        uses.update(runs_of(record["sample"]["question"]) & runs)
    runs = {run for run, count in uses.items() if count <= TEMPLATE_USES}
    for record in records:
        sample = record["sample"]
        for path, bits in zip(sample["images"], record["hashes"]):
            if Path(path).stem in names:
                record["rule"] = "picture of a benchmark"
            elif bits is not None and near.find(bits) is not None:
                record.setdefault("rule", "near twin of a benchmark's picture")
        if runs_of(sample["question"]) & runs:
            record.setdefault("rule", f"{RUN_WORDS} words of a benchmark")

def drop_twins(records: list[dict]) -> None:
    """Of twins the first stays: the same or nearly the same pictures in the same order, and
    nearly the same text with the same answer. One text with two answers goes altogether."""
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
        drop_twins_of(group)

def drop_twins_of(group: list[dict]) -> None:
    """The same for questions about the same pictures."""
    answers = defaultdict(set)
    for record in group:
        answers[text_of(record)].add(record["sample"]["answer"])
    for k, record in enumerate(group):
        text, answer = text_of(record), record["sample"]["answer"]
        earlier = [text_of(other) for other in kept(group[:k])
                   if other["sample"]["answer"] == answer]
        ratios = [difflib.SequenceMatcher(None, text, other).ratio() for other in earlier]
        if len(answers[text]) > 1:
            record["rule"] = "one question with several answers"
        elif text in earlier:
            record["rule"] = "twin"
        elif max(ratios, default=0) >= NEAR_TEXT:
            record["rule"] = "near twin"

def text_of(record: dict) -> str:
    return " ".join(words_of(record["sample"]["question"]))

def kept(records: list[dict]) -> list[dict]:
    return [record for record in records if "rule" not in record]

def judge_labels(records: list[dict], args, work: Path) -> None:
    """Labels that the model of --label-with does not agree with become never."""
    judge, log = LabelJudge(args.label_with), work / "judged.jsonl"
    rows = perl.read_lines(log)
    perl.write_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
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

# ---- Report ----------------------------------------------------------------------------

def cross_table(pairs: list[tuple], name: str) -> str:
    """Counts of (row, column) pairs, and their sum, as a Markdown table."""
    counts = Counter(pairs)
    columns = sorted({column for _, column in pairs})
    lines = [[name, *columns, "all"], ["---"] * (len(columns) + 2)]
    for row in sorted({row for row, _ in pairs}):
        values = [counts[row, column] for column in columns]
        lines.append([row, *values, sum(values)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

def report(records: list[dict], sources: list[str]) -> str:
    """What was read, dropped and kept; how many images, which rules, where answers stand."""
    samples = [record["sample"] for record in kept(records)]
    fates = [(record.get("rule", "**kept**"), record["sample"]["source"]) for record in records]
    ten = []
    for k, s in enumerate(ten_random(samples), 1):
        text = " ".join(s["question"].split())
        ten.append(f"{k}. `{s['id']}`, {s['order_rule']}, answer `{s['answer']}`: `{text}`")
    images = [(s["source"], len(s["images"])) for s in samples]
    rules = [(record["sample"]["source"], record.get("disputed", record["sample"]["order_rule"]))
             for record in kept(records)]
    return "\n\n".join([
        f"# {len(samples)} of {len(records)} questions of {', '.join(sources)}",
        "## What became of the rows", cross_table(fates, "rule"),
        "## Images per question", cross_table(images, "source"),
        "## Order rules", cross_table(rules, "source"),
        "## Where the right answer stands", cross_table(right_places(samples), "source"),
        "## Ten random questions", "![](ten.jpg)", "\n".join(ten)]) + "\n"

def right_places(samples: list[dict]) -> list[tuple[str, str]]:
    """(source and kind, place) of each answer that has one: of the image that it names, by
    number or through its option, and of the option."""
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

def ten_random(samples: list[dict]) -> list[dict]:
    return random.Random(0).sample(samples, min(10, len(samples)))

# ---- Main ------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("sources", nargs="*", help="mantis:CONFIG, mmk12, OWNER/NAME")
    parser.add_argument("--out", type=Path, help="folder for train.jsonl and its images")
    parser.add_argument("--data-dir", default="", help="local copies instead of the Hub: "
                        "Mantis-Instruct/CONFIG, MMK12, NAME in it, with the Hub's files")
    parser.add_argument("--against", type=Path, action="append", default=[],
                        help="folder of benchmarks' files; what they hold is dropped")
    parser.add_argument("--label-with", default="", metavar="MODEL",
                        help="a model judges the order labels too; where it disagrees, never")
    parser.add_argument("--score-labels", action="store_true",
                        help="score the order labels on order_labels.jsonl, and stop")
    args = parser.parse_args(argv)
    if not args.score_labels and not (args.sources and args.out):
        parser.error("name a source and --out DIR")
    return args

def open_work(args) -> Path:
    """The folder of a run's logs; SystemExit if another command or code began it."""
    work = args.out / ".work"
    files = ("curate.py", "order_rules.py", "pictures.py")
    code = [Path(HERE, name).read_bytes() for name in files]
    settings = {"sources": args.sources, "data_dir": args.data_dir, "judge": args.label_with,
                "code": hashlib.sha1(b"".join(code)).hexdigest()}
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{args.out} was begun with other sources or code; name another --out")
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
    for name, rows in (("dropped.jsonl", examples), ("train.jsonl", samples)):
        perl.write_atomic(args.out / name, "".join(json.dumps(row) + "\n" for row in rows))
    perl.write_atomic(args.out / "REPORT.md", report(records, args.sources))
    draw_ten(ten_random(samples), args.out)

def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.score_labels:
        score_labels(HERE / "order_labels.jsonl")
        return
    sources = [parse_source(text) for text in args.sources]
    if len({source.name for source in sources}) < len(sources):
        raise SystemExit("two sources of one name: their ids would be the same")
    work, records = open_work(args), []
    for source in sources:
        records += take_in(source, args, work)
    drop_benchmarks(kept(records), args.against)
    drop_twins(kept(records))
    if not kept(records):
        raise SystemExit(f"no question is left of {len(records)}; see {work}")
    if args.label_with:
        judge_labels(kept(records), args, work)
    write_results(records, args)
    print(f"{len(kept(records))} of {len(records)} questions are in {args.out / 'train.jsonl'}; "
          f"{args.out / 'REPORT.md'} says what became of the others")

if __name__ == "__main__":
    main()
