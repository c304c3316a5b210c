#!/usr/bin/env python3
r"""Public training sets -> train.jsonl of perl.py, with its images beside it.

    python data_samples/curate.py mantis:nlvr2 mantis:dreamsim mmk12 --out data/mix
    python data_samples/curate.py problems:hiyouga/geometry3k=/data/geometry3k --out data/geo
    python data_samples/curate.py --score-labels
    python perl.py --data data/mix/train.jsonl --stage 0

A source is mantis:CONFIG (TIGER-Lab/Mantis-Instruct), mmk12 (FanqingM/MMK12) or
problems:REPOSITORY (columns images, problem, answer), downloaded from the Hub or, with
=FOLDER, read from a local copy of the same files. Each row passes, in turn:

  1. rules: one question, its images there and readable, an answer that the grader can check;
  2. order labels: how the answer follows the images (`order_rule`, `movable`, <image_k>), from
     the text alone; in doubt `never`, which only loses permutations of that question;
  3. no duplicates: the same images and an equal or nearly equal text, in all sources;
  4. --against FOLDER: no image and no question of the benchmarks that lie there.

What is dropped is counted by its reason, with examples, in report.md. A run that was stopped
goes on; the same rows give the same bytes.
"""
import argparse
import difflib
import hashlib
import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval as evaluation  # noqa: E402  (found through the line above)
import perl  # noqa: E402

# ---- Order labels: what a change of the images' order does to the answer ---------------

class Label(NamedTuple):
    """A question as perl.py wants it: mentions as <image_k>, positions 0-based."""
    question: str
    answer: str
    order_rule: str
    movable: tuple[int, ...] | None = None  # None: all, or none with `never`

ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
PICTURE = r"(?:image|picture|photo)"
# "image 3", "the second picture"; but not the title of a place: "Image 3: <image>".
NAME = rf"\b(?:the )?(?:({'|'.join(ORDINALS)}) {PICTURE}|{PICTURE} #?(\d{{1,2}}))\b"
TITLED = r"\s*(?:[:.)]\s*<image>|<image>(?!\s*<image>))"
NAMED, TITLE = re.compile(rf"(?i){NAME}(?!{TITLED})"), re.compile(rf"(?i){NAME}(?={TITLED})")
OPTION = re.compile(r"(?m)^\s*\(?([A-J])[).:]\s*(.+?)\s*$")
# A question about one image that is described: what stands left in it does not matter.
DESCRIBED = re.compile(r"(?i)\b(?:description|caption)\b")
# Words that speak of images by their place or time. None of them may be left in a text.
PLACE = (rf"left(?:most)? {PICTURE}|right(?:most)? {PICTURE}|{PICTURE}s? (?:on|to|at) the|former|"
         rf"latter|last|final|{'|'.join(ORDINALS)}|\d+(?:st|nd|rd|th)|previous|prior|preceding|"
         r"earlie(?:r|st)|late(?:r|st)|next|before|after|follow(?:s|ed)?|(?<!of the )following|"
         r"same as|consecutive|successive|begin\w*|starts?|initial|ends?|sequence|in order")
ANY_PLACE = (PLACE + r"|left\w*|right\w*|top|bottom|middle|upper|lower|above|below|adjacent|"
             r"chang\w+|then|again|becomes?|turns?|now|still|already|no longer|anymore")
BY_PLACE_IN_A_DESCRIPTION = re.compile(rf"(?i)\b(?:{PLACE})\b")
BY_PLACE = re.compile(rf"(?i)\b(?:{ANY_PLACE})\b")
PLURAL = re.compile(
    rf"(?i)\b{PICTURE}s #?\d|\bwhich (?:two |three )?{PICTURE}s\b|\b{PICTURE} [A-J]\b")
ONE_OF_SEVERAL = re.compile(rf"(?i)\b(?:the|this|that) {PICTURE}\b(?!s)")
WHICH_IMAGE = re.compile(rf"(?i)\bwhich {PICTURE}\b|\bretrieve the target image\b")
WHICH = re.compile(rf"(?i)\bwhich (?:{PICTURE}|one|of the)\b|\bretrieve the target image\b")
COUNTED = re.compile(
    rf"(?i)\bhow many (?:of the )?(?:\w+ )?{PICTURE}s\b|\bin every {PICTURE}\b|"
    rf"\b(?:sum of|total of|product of|in all|in total)\b.*\b{PICTURE}s\b|"
    rf"\b(?:all|across) (?:of )?(?:the )?{PICTURE}s\b.*\bhow many")
SORTED = re.compile(r"(?i)\b(?:order|sort|arrange|rank)\b.*\bimage numbers\b")
REFERENCE = re.compile(r"(?i)(?:\b(?<!is the )reference(?: image)?\s*[:(]?\s*<image>|"
                       r"<image>\s*(?:is|as) (?:the|a) (?:reference|query))")
OTHER_TITLE = re.compile(r"(?i)\b(\w+):\s*<image>")  # "Left: <image>"
FRAMES = ("nextqa", "star", "visual_story_telling", "visual_story")  # of a video or a story

def named_image(match: re.Match) -> int:
    """The number of the image that a match of NAMED names, from 1."""
    return ORDINALS.index(match[1].lower()) + 1 if match[1] else int(match[2])

def clean_answer(answer: str, options: dict[str, str]) -> str:
    """"Answer: (B) dogs" -> "B" where that is an option, "$$6$$" -> "6"."""
    answer = re.sub(r"(?i)^\s*(?:the )?answer(?: is)?:?\s*", "", answer).strip()
    answer = re.sub(r"^\$+|\$+$", "", answer).strip()
    letter = re.match(r"\(?([A-J])(?:[).:]|$)", answer)
    if letter and letter[1] in options:
        return letter[1]
    for name, option in options.items():
        if answer.rstrip(".").casefold() == option.rstrip(".").casefold():
            return name
    return answer

def order_label(text: str, answer: str, n_images: int, style: str = "") -> Label:
    """What the text says about order; `never` in doubt. `style`: the subset. Example: the answer
    to "<image> <image> Is the second image darker?" is kept, asked as "Is <image_2> darker?"."""
    options = dict(OPTION.findall(text))
    gold = clean_answer(answer, options)
    in_doubt = Label(text, gold, "never")
    if n_images < 2 or style in FRAMES or "_" in "".join(re.findall(r"<image_?\d*>", text)):
        return in_doubt
    spoken = TITLE.sub("", text)
    others = set(OTHER_TITLE.findall(spoken.casefold())) - {"images", "pictures", "reference"}
    mentions = [named_image(match) for match in NAMED.finditer(spoken)]
    if PLURAL.search(spoken) or any(not 1 <= k <= n_images for k in mentions):
        return in_doubt
    rest = re.sub(r"(?i)next in the (?:pattern|row)", "", NAMED.sub("", spoken))
    question = NAMED.sub(lambda match: f"<image_{named_image(match)}>", text)
    by_place = (BY_PLACE_IN_A_DESCRIPTION if DESCRIBED.search(text) else BY_PLACE).search(rest)

    if options and set(options.values()) == {"<image>"}:  # the options are images: the last ones
        first = n_images - len(options)
        fits = gold in options and text.count("<image>") == n_images and not mentions
        if fits and not by_place and len(options) > 1:
            return Label(text, gold, "letter", tuple(range(first, n_images)))
        return in_doubt
    if sorted(re.findall(r"\d+", gold)) == [str(k + 1) for k in range(n_images)]:
        if SORTED.search(text) and re.fullmatch(r"\d+(?:\s*,\s*\d+)+", gold) and not mentions:
            return Label(text, gold, "sequence")
        return in_doubt
    if by_place or others:
        return in_doubt

    movable = movable_images(text, n_images)
    named = [named_image(match) for match in NAMED.finditer(gold)]
    if not options and WHICH.search(spoken):
        if re.fullmatch(r"\d{1,2}", gold) and WHICH_IMAGE.search(spoken):
            named = [int(gold)]
        if len(set(named)) == 1 and 1 <= named[0] <= n_images:
            return Label(question, str(named[0]), "index", movable)
        return in_doubt
    if named or options and gold not in options:
        return in_doubt
    if any(re.fullmatch(r"[\d ,]+", option) for option in options.values()):
        return Label(question, gold, "keep", movable) if COUNTED.search(spoken) else in_doubt
    is_statement = {option.casefold() for option in options.values()} == {"true", "false"}
    is_clear = (is_statement or mentions) and not ONE_OF_SEVERAL.search(rest)
    fits = is_clear or COUNTED.search(spoken)
    return Label(question, gold, "keep", movable) if fits else in_doubt

def movable_images(text: str, n_images: int) -> tuple[int, ...] | None:
    """All, but for one that the text shows as the reference where it stands."""
    reference = REFERENCE.search(text)
    if reference is None:
        return None
    fixed = text[:text.index("<image>", reference.start())].count("<image>")
    return tuple(k for k in range(n_images) if k != fixed)

def score_labels(path: Path) -> str:
    """Precision of the labels that let images move, and recall, on the labelled questions."""
    lines, rows = [], perl.read_lines(path)
    for name in sorted({row["set"] for row in rows}):
        given = wanted = right = 0
        for row in rows:
            if row["set"] != name:
                continue
            n_images = row["question"].count("<image>")
            label = order_label(row["question"], row["answer"], n_images, row["style"])
            given += label.order_rule != "never"
            wanted += row["order_rule"] != "never"
            if label.order_rule == "never":
                continue
            movable = list(range(n_images)) if label.movable is None else list(label.movable)
            mentions = [int(k) for k in perl.MENTION.findall(label.question)]
            found = [label.order_rule, movable, label.answer, mentions]
            if found == [row.get(key) for key in ("order_rule", "movable", "gold", "mentions")]:
                right += 1
            else:
                lines.append(f"  wrong: {row['question']!r} -> {found}, not {row['order_rule']}")
        lines.insert(0, f"{name}: {right} of {given} labels that let images move are right; "
                        f"{right} of {wanted} questions that allow it found")
    return "\n".join(lines)

# ---- Sources: a data set's rows, from the Hub or a local copy --------------------------

class Row(NamedTuple):
    """A row. images: names of files, or encoded; turns: (question, answer) pairs."""
    id: str
    images: list
    turns: list[tuple[str, str]]

def from_mantis(row: dict, number: int) -> Row:
    """TIGER-Lab/Mantis-Instruct: a conversation about images of a zip beside the rows."""
    images = [image["bytes"] and image or image["path"] for image in row["images"] or ()]
    said = [turn["content"] for turn in row["conversation"]]
    return Row(row["id"] or str(number), images, list(zip(said[::2], said[1::2])))

def from_mmk12(row: dict, number: int) -> Row:
    """FanqingM/MMK12: one embedded image."""
    return Row(row["id"] or str(number), [row["image"]], [(row["question"], row["answer"])])

def from_problems(row: dict, number: int) -> Row:
    """The columns that sets for vision-language RL share: images, problem, answer."""
    images = row["images"] if isinstance(row["images"], list) else [row["images"]]
    return Row(row.get("id") or str(number), images, [(row["problem"], row["answer"])])

class Source(NamedTuple):
    name: str        # as on the command line, without =FOLDER
    repository: str  # on the Hub
    config: str      # folder of its rows in there, or empty
    folder: str      # local copy, or empty
    adapt: object    # a row and its number -> Row

def parse_source(text: str) -> Source:
    """"mantis:nlvr2=/data/mantis" -> Source. SystemExit: none of the known ones."""
    name, _, folder = text.partition("=")
    kind, _, rest = name.partition(":")
    if kind == "mantis" and rest:
        return Source(name, "TIGER-Lab/Mantis-Instruct", rest, folder, from_mantis)
    if name == "mmk12":
        return Source(name, "FanqingM/MMK12", "", folder, from_mmk12)
    if kind == "problems" and rest:
        return Source(name, rest, "", folder, from_problems)
    raise SystemExit(f"{text} is no source: mantis:CONFIG, mmk12 or problems:REPOSITORY, "
                     "each with =FOLDER for a local copy")

def find_rows(source: Source) -> tuple[Path, list[Path]]:
    """A source's folder and its parquet files. SystemExit: not there."""
    folder = Path(source.folder)
    if not source.folder:
        from huggingface_hub import snapshot_download  # needed here only
        wanted = f"{source.config}/*".lstrip("/")
        try:
            folder = Path(snapshot_download(source.repository, repo_type="dataset",
                                            allow_patterns=wanted))
        except OSError as error:
            raise SystemExit(f"{source.name}: could not load {source.repository}; pass a local "
                             f"copy, {source.name}=FOLDER ({error})") from None
    if (folder / source.config).is_dir():
        folder = folder / source.config
    files = sorted(path for path in folder.rglob("*.parquet") if "train" in path.name)
    if not files:
        raise SystemExit(f"{source.name}: no train*.parquet in {folder}")
    return folder, files

def unpack(folder: Path, work: Path) -> Path:
    """The folder that holds the images of a source's zips: unpacked in `work`, once."""
    archives = sorted(folder.rglob("*.zip"))
    for archive in archives:
        target = work / archive.relative_to(folder).with_suffix("")
        if not (target / ".unpacked").exists():
            shutil.unpack_archive(archive, target)
            (target / ".unpacked").touch()
    return work if archives else folder

def rows_of(source: Source, files: list[Path]) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a source, a batch in memory at a time."""
    from pyarrow import parquet  # needed here only
    batches = (batch for path in files for batch in parquet.ParquetFile(path).iter_batches(256))
    yield from enumerate(row for batch in batches for row in batch.to_pylist())

# ---- Rules: a row -> a sample of perl.py, or why not -----------------------------------

class Unfit(Exception):
    """Why a row is left out: the reason, by which it is counted."""

def is_checkable(gold: str, label: Label, options: dict[str, str]) -> bool:
    """Whether the grader of training can tell a right answer: a letter, yes or no, an image, a
    number or formula; not words, which could be put in other words."""
    if label.order_rule in ("index", "letter", "sequence") or gold in options:
        return True
    if gold.casefold() in ("yes", "no", "true", "false"):
        return True
    if len(gold) > 60 or not re.search(r"\d|\\", gold) or re.search(r"(?<!\\)\b[a-z]{4}", gold):
        return False
    return perl.is_correct(rf"\boxed{{{gold}}}", gold)

def sample_of(row: Row, source: Source, place, max_images: int) -> dict:
    """A row -> a line of train.jsonl, image paths still where they are. Unfit: why not."""
    if not row.turns or not all(map(str.strip, map(str, row.turns[0]))):
        raise Unfit("no question or no answer")
    question, answer = (str(text).strip() for text in row.turns[0])
    if not 1 <= len(row.images) <= max_images:
        raise Unfit(f"0 or more than {max_images} images")
    if "<image>" not in question:
        question = "<image>" * len(row.images) + question
    if question.count("<image>") != len(row.images):
        raise Unfit("as many <image> as images are wanted")
    label = order_label(question, answer, len(row.images), source.config)
    if not is_checkable(label.answer, label, dict(OPTION.findall(question))):
        raise Unfit("answer in words, or more than one")
    sample = {"id": f"{source.name}-{row.id}", "images": list(map(place, row.images)),
              "question": label.question, "answer": label.answer, "order_rule": label.order_rule,
              "source": source.name}
    if label.movable is not None:
        sample["movable"] = list(label.movable)
    return sample

def keep_images(sample: dict, out: Path) -> None:
    """Copy a sample's images into OUT/images, named by their content, and check the sample as
    perl.py will. Unfit: an image or a text that it refuses."""
    copies = []
    for image in sample["images"]:
        path = Path(image)
        if not path.is_file():
            raise Unfit("an image is missing")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:20]
        copy = out / "images" / f"{digest}{path.suffix.lower()}"
        if not copy.exists():
            temporary = copy.with_suffix(".tmp")
            shutil.copyfile(path, temporary)
            temporary.replace(copy)
        copies.append(f"images/{copy.name}")
    sample["images"] = copies
    try:
        perl.parse_sample(json.dumps(sample).encode(), out, "row")
    except ValueError as error:
        field = re.search(r"field (\w+)", str(error))
        raise Unfit(f"perl.py refuses its {field[1] if field else 'row'}") from None

def read_source(source: Source, out: Path, max_images: int) -> list[dict]:
    """A line a row, in OUT/work: the sample, or the reason and an example. Goes on behind the
    last whole line of a run that was stopped."""
    folder, files = find_rows(source)
    rules = hashlib.sha256(f"{source[:4]} {max_images}".encode() + Path(__file__).read_bytes())
    work = out / "work" / f"{re.sub(r'[^A-Za-z0-9]', '-', source.name)}-{rules.hexdigest()[:8]}"
    work.mkdir(parents=True, exist_ok=True)
    images = unpack(folder, work)
    journal = work / "rows.jsonl"
    done = perl.read_lines(journal)
    perl.write_atomic(journal, "".join(json.dumps(line) + "\n" for line in done))

    def place(image) -> str:
        return evaluation.place_image(image, images, work / "images")

    for number, raw in rows_of(source, files):
        if number < len(done):
            continue
        line = {"number": number}
        try:
            row = source.adapt(raw, number)
            line["sample"] = sample_of(row, source, place, max_images)
            keep_images(line["sample"], out)
        except Unfit as reason:
            line = {"number": number, "dropped": str(reason), "example": row.turns[:1]}
        except (AttributeError, KeyError, OSError, TypeError) as error:
            line = {"number": number, "dropped": "columns that are not as documented",
                    "example": repr(error)}
        perl.append_line(journal, line)
        done.append(line)
    return done

# ---- Duplicates, benchmarks ------------------------------------------------------------

NEARLY = 0.9  # of the characters of two questions are the same, in the same order
ALIKE = 236   # of the 256 cells of two images are equal

def words_of(question: str) -> str:
    """A question's text, less what editions of it differ in."""
    return " ".join(re.sub(r"<image(_\d+)?>", " ", question).casefold().split())

def look_of(path: Path) -> torch.Tensor:
    """(256,) of how an image looks: each of 16 x 16 cells brighter than its left neighbour, 1, or
    not, -1. Nearly the same for other sizes and formats of it. A flat one: of its own pixels."""
    image = perl.read_image(path)
    cells = torch.tensor(list(image.convert("L").resize((17, 16), Image.Resampling.BOX).tobytes()))
    brighter = cells.view(16, 17).diff(dim=1).flatten() > 0
    if brighter.sum() < 16:
        seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4])
        brighter = torch.rand(256, generator=torch.Generator().manual_seed(seed)) > 0.5
    return 2.0 * brighter - 1

def seen_in(folder: Path) -> tuple[torch.Tensor, set[str]]:
    """Looks of all images (M, 256), and texts of all questions, in a folder of benchmarks."""
    from pyarrow import parquet  # needed here only
    looks, texts = [torch.zeros(256)], set()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"):
            looks.append(look_of(path))
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            if path.suffix == ".parquet":
                rows = parquet.read_table(path).to_pylist()
            elif path.suffix == ".jsonl":
                rows = perl.read_lines(path)
            else:
                rows = json.loads(path.read_text(encoding="utf-8"))
            for row in rows:
                found = (row.get(name) for name in ("question", "problem", "prompt"))
                texts |= {words_of(text) for text in found if isinstance(text, str)}
    return torch.stack(looks), texts

def without_known(samples: list[dict], out: Path, against: Path | None) -> Iterator[tuple]:
    """(sample, why it is dropped or ""): duplicates of earlier ones, then known benchmarks."""
    known_looks, known_texts = seen_in(against) if against else (torch.zeros(1, 256), set())
    by_images = {}
    for sample in samples:
        text = words_of(sample["question"])
        looks = torch.stack([look_of(out / image) for image in sample["images"]])  # (n, 256)
        equal_cells = (256 + (looks @ known_looks.T).max()) / 2
        twins = by_images.setdefault(tuple(sorted(map(str, looks.tolist()))), [])
        if text in twins:
            yield sample, "duplicate: same images, same text"
        elif any(difflib.SequenceMatcher(None, text, twin).ratio() >= NEARLY for twin in twins):
            yield sample, "duplicate: same images, nearly the same text"
        elif equal_cells >= ALIKE:
            yield sample, "an image of a benchmark"
        elif len(text) > 60 and text in known_texts:  # shorter ones are asked of any image
            yield sample, "a question of a benchmark"
        else:
            yield sample, ""
        twins.append(text)

# ---- Report ----------------------------------------------------------------------------

def table(title: str, counts: Counter) -> str:
    rows = [f"| {key} | {counts[key]} |\n" for key in sorted(counts, key=str)]
    return f"\n| {title} | |\n|---|---|\n" + "".join(rows)

def place_of(sample: dict) -> str:
    """Where the right image stands, from 1, if an image is the answer."""
    if sample["order_rule"] not in ("index", "letter"):
        return "no image is the answer"
    asked, rule = perl.Sample(**sample), perl.ORDER_RULES[sample["order_rule"]]
    return f"{rule.position_of(asked.answer, asked) + 1} of {len(asked.images)}"

def report(kept: list[dict], dropped: dict[str, list], out: Path) -> str:
    """Markdown: what was kept and dropped, the skew that a user would train on, ten questions."""
    text = f"# {len(kept)} questions\n"
    text += table("source", Counter(sample["source"] for sample in kept))
    text += table("images a question", Counter(len(sample["images"]) for sample in kept))
    text += table("order_rule", Counter(sample["order_rule"] for sample in kept))
    text += table("the right image stands", Counter(map(place_of, kept)))
    counts = Counter({why: len(rows) for why, rows in dropped.items()})
    text += "\n## Dropped\n" + table("why", counts)
    for why, examples in sorted(dropped.items()):
        text += f"\n{why}, for example:\n\n"
        for example in examples[:3]:
            text += f"    {json.dumps(example, ensure_ascii=False)[:300]}\n"
    text += "\n## Ten questions\n\n![their images](report.png)\n\n"
    shown = random.Random(0).sample(kept, min(10, len(kept)))
    sheet = Image.new("RGB", (8 * 130, 130 * len(shown) or 1), "white")
    for k, sample in enumerate(shown):
        question = " ".join(sample["question"].split())
        text += f"{k + 1}. {question} -> {sample['answer']} ({sample['order_rule']})\n"
        for place, image in enumerate(sample["images"][:8]):
            small = perl.read_image(out / image)
            small.thumbnail((126, 126))
            sheet.paste(small, (130 * place + 2, 130 * k + 2))
    sheet.save(out / "report.png")
    return text

# ---- Main ------------------------------------------------------------------------------

def curate(sources: list[Source], out: Path, against: Path | None, max_images: int) -> None:
    """Write train.jsonl, report.md and report.png in `out`."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    samples, dropped = [], {}
    for source in sources:
        lines = read_source(source, out, max_images)
        for line in lines:
            if "sample" in line:
                samples.append(line["sample"])
            else:
                why = f"{source.name}: {line['dropped']}"
                dropped.setdefault(why, []).append(line["example"])
        print(f"{source.name}: {len(lines)} rows read", flush=True)
    kept, ids = [], Counter()
    for sample, why in without_known(samples, out, against):
        if why:
            dropped.setdefault(f"{sample['source']}: {why}", []).append(sample["question"])
            continue
        ids[sample["id"]] += 1
        if ids[sample["id"]] > 1:  # two rows of one id
            sample["id"] += f"-{ids[sample['id']]}"
        kept.append(sample)
    perl.write_atomic(out / "train.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    perl.write_atomic(out / "report.md", report(kept, dropped, out))
    n_dropped = sum(map(len, dropped.values()))
    print(f"{len(kept)} questions in {out / 'train.jsonl'}; {n_dropped} rows dropped, see "
          f"{out / 'report.md'}")
    if not kept:
        raise SystemExit("no question is left")

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Public training sets -> train.jsonl of perl.py.")
    parser.add_argument("sources", nargs="*", help="mantis:CONFIG, mmk12, problems:REPOSITORY; "
                        "each with =FOLDER for a local copy")
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument("--against", type=Path, help="folder of benchmarks to leave out")
    parser.add_argument("--max-images", type=int, default=8, help="of a question [8]")
    parser.add_argument("--score-labels", action="store_true",
                        help="precision and recall of the order labels on order_labels.jsonl")
    args = parser.parse_args(argv)
    if args.score_labels:
        return print(score_labels(HERE / "order_labels.jsonl"))
    if not args.sources or not args.out:
        parser.error("name one or more sources, and --out FOLDER")
    if args.against and not args.against.is_dir():
        parser.error(f"--against {args.against} is no folder")
    sources = [parse_source(text) for text in args.sources]
    curate(sources, args.out, args.against, args.max_images)

if __name__ == "__main__":
    main()
