"""What curate.py shows of its work: REPORT.md, and ten.jpg with ten questions.

A record is a line of curate.py's logs: {sample, hashes of its images}, with `rule`, the rule
that dropped it, or `why`, the reason for which its images may not move.
"""
import math
import random
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable

from PIL import Image, ImageDraw, ImageOps

import eval as ev
import perl

ONE_IMAGE, ORDER_WORDS = "one image", "words"  # how two of the reasons begin
EXAMPLES, COMMON_WORDS, LONGEST = 2, 12, 300   # of a reason; of the report; characters
COLUMNS, CELL, ROW, LINE = 6, 150, 140, 14     # of ten.jpg; the last three in pixels
RIGHT, FIXED = "#0a7d32", "#777777"  # frame of a right image; caption of one that stays

def kept(records: Iterable[dict]) -> list[dict]:
    return [record for record in records if "rule" not in record]

# ---- What a label means for a question -------------------------------------------------

def movable_of(sample: dict) -> list[int]:
    """0-based positions of the images that may move."""
    return list(perl.Sample(**sample).movable)

def right_images(sample: dict) -> list[int]:
    """0-based positions of the images that the answer names, itself or by its option."""
    options, answer = ev.listed_options(sample["question"]), sample["answer"]
    if sample["order_rule"] in ("index", "sequence", "letter"):
        return perl.named_positions(perl.Sample(**sample))
    if not is_letter(answer, options):
        return []
    k = perl.LETTERS.index(answer)
    if options[k] == "<image>":  # option images stand at the end
        return [len(sample["images"]) - options[k:].count("<image>")]
    named = perl.MENTION.fullmatch(options[k])
    return [int(named[1]) - 1] if named else []

def is_letter(answer: str, options: list[str]) -> bool:
    return answer in list(perl.LETTERS[:len(options)])

def order_words(question: str) -> list[str]:
    """The words that made a question `never`. Names of images would follow their images."""
    text = ev.WORDS["inside"].sub("", ev.NAMED_IMAGE.sub("", question))
    words = ev.WORDS["order"].findall(text)
    return sorted(set(map(str.lower, words)))

def what_moves(record: dict) -> str:
    """Examples: "letter: images 2, 3 may move, the letter is renamed"; "never: one image"."""
    sample = record["sample"]
    rule, movable = sample["order_rule"], movable_of(sample)
    if rule == "never":
        is_words = record["why"].startswith(ORDER_WORDS)
        words = f" ({', '.join(order_words(sample['question']))})" if is_words else ""
        return f"never: {record['why']}{words}"
    which = "all images"
    if len(movable) < len(sample["images"]):
        which = "images " + ", ".join(str(position + 1) for position in movable)
    effects = {"keep": "the answer stays", "letter": "the letter is renamed"}
    return f"{rule}: {which} may move, {effects.get(rule, 'the answer follows')}"

# ---- REPORT.md -------------------------------------------------------------------------

def summary(records: list[dict]) -> str:
    """How many questions stayed, and how many of them can be permuted."""
    n_kept, n_several, rules = 0, 0, Counter()
    for record in kept(records):
        sample = record["sample"]
        n_kept += 1
        n_several += len(sample["images"]) > 1
        rules[sample["order_rule"]] += sample["order_rule"] != "never"
    parts = ", ".join(f"{rule} {count}" for rule, count in sorted((+rules).items()))
    text = (f"kept {n_kept} of {len(records)} questions; {rules.total()} of {n_several} with "
            f"several images can be permuted ({parts or 'none'})")
    # With hardly any, the whole run would train on one order of each question.
    if rules.total() < n_several / 10:
        text += "\nWARNING: on the others PeRL is plain GRPO; REPORT.md says why they may not"
    return text

def cross_table(pairs: list[tuple], name: str) -> str:
    """Counts of (row, column) pairs, and their sums, as a Markdown table."""
    if not pairs:
        return "none"
    counts, (rows, columns) = Counter(pairs), map(set, zip(*pairs))
    lines = [[name, *sorted(columns), "all"], ["---"] * (len(columns) + 2)]
    for row in sorted(rows):
        values = [counts[row, column] for column in sorted(columns)]
        lines.append([row, *values, sum(values)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

def on_one_line(question: str) -> str:
    text = " ".join(question.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."

def list_reasons(records: list[dict]) -> str:
    """For each reason why images may not move, two questions; of words that may mean
    order, also the commonest."""
    by_reason, words = defaultdict(dict), Counter()
    for record in records:
        sample, reason = record["sample"], record.get("why", ONE_IMAGE)
        if reason == ONE_IMAGE:
            continue
        # Many rows ask the same; one of them is enough to show.
        by_reason[reason].setdefault(on_one_line(sample["question"]), sample)
        if reason.startswith(ORDER_WORDS):
            words.update(order_words(sample["question"]))
    common = ", ".join(f"{word} {count}" for word, count in words.most_common(COMMON_WORDS))
    lines = []
    for reason, examples in sorted(by_reason.items()):
        found = f" ({common})" if reason.startswith(ORDER_WORDS) else ""
        lines.append(f"- {reason}{found}")
        # A short question shows best what the reason is.
        for text in sorted(examples, key=len)[:EXAMPLES]:
            name, answer = examples[text]["id"], examples[text]["answer"]
            lines.append(f"  - `{name}`, answer `{answer}`: `{text}`")
    return "\n".join(lines)

def right_places(samples: list[dict]) -> list[tuple[str, str]]:
    """(source and kind, place) of each answer that has one: the letter of its option, and
    the number of the image that it names."""
    # A favourite place would be learned in place of the task.
    places = []
    for sample in samples:
        options, right = ev.listed_options(sample["question"]), right_images(sample)
        kind = "option image" if sample["order_rule"] == "letter" else "option"
        if kind == "option image" or is_letter(sample["answer"], options):
            places.append((f"{sample['source']}: {kind}", sample["answer"]))
        if kind == "option" and len(right) == 1:
            places.append((f"{sample['source']}: image", str(right[0] + 1)))
    return places

def report(records: list[dict], ten: list[dict], held: set[str], args) -> str:
    """What was dropped and kept; how many images, which labels, where the answers are."""
    fates, images, rules, reasons, parts = [], [], [], [], []
    for record in records:
        sample, source = record["sample"], record["sample"]["source"]
        fates.append((record.get("rule", "**kept**"), source))
        if "rule" not in record:
            images.append((source, len(sample["images"])))
            rules.append((source, sample["order_rule"]))
            parts.append((source, "heldout" if sample["id"] in held else "train"))
        if "why" in record and "rule" not in record:
            reasons.append((record["why"], source))
    samples, listed = [record["sample"] for record in kept(records)], []
    for k, record in enumerate(ten, 1):
        name, answer = record["sample"]["id"], record["sample"]["answer"]
        text = on_one_line(record["sample"]["question"])
        listed.append(f"{k}. `{name}`, {what_moves(record)}, answer `{answer}`: `{text}`")
    # heldout.jsonl may be short: a cluster of questions that share pictures stays together.
    held_out = f"{len(held)} of {args.hold_out} questions are held out."
    return "\n\n".join([
        f"# {len(samples)} of {len(records)} questions of {', '.join(args.sources)}",
        summary(records) + ".",
        "## What became of the rows", cross_table(fates, "rule"),
        "## Training and held-out part", held_out, cross_table(parts, "source"),
        "## Images per question", cross_table(images, "source"),
        "## Order rules", cross_table(rules, "source"),
        "## Why images may not move (`never`)", cross_table(reasons, "reason"),
        list_reasons(kept(records)),
        "## Where the right answer is", cross_table(right_places(samples), "source"),
        "## Ten questions", "![](ten.jpg)", "\n".join(listed)]) + "\n"

# ---- ten.jpg ---------------------------------------------------------------------------

def choose_ten(records: list[dict]) -> list[dict]:
    """Ten random questions, from all sources and order rules in turn."""
    kinds, turns = Counter(), []
    for record in random.Random(0).sample(records, len(records)):
        kind = record["sample"]["source"], record["sample"]["order_rule"]
        kinds[kind] += 1
        turns.append((kinds[kind], kind, record["sample"]["id"], record))
    return [record for *_, record in sorted(turns)[:10]]

def readable(question: str) -> str:
    """The text with [1], [2] where the images stand, and image 2 for <image_2>."""
    text = perl.spell_mentions(" ".join(question.split()))
    for k in range(text.count("<image>")):
        text = text.replace("<image>", f"[{k + 1}]", 1)
    # Pillow's built-in font has Latin letters only.
    return text.encode("ascii", "replace").decode()

def draw_ten(records: list[dict], out: Path) -> None:
    """ten.jpg: for each question what may move, its text, and its images; the right one
    has a frame."""
    # The height of the sheet must be known before anything is drawn on it.
    blocks, total = [], 0
    for k, record in enumerate(records, 1):
        sample = record["sample"]
        head = readable(f"{k}. {sample['id']}, answer {sample['answer']}")
        lines = [head, what_moves(record)]
        lines += textwrap.wrap(readable(sample["question"]), 180, max_lines=3)
        blocks.append((total, lines, sample))
        total += LINE * len(lines) + 8 + ROW * math.ceil(len(sample["images"]) / COLUMNS)
    sheet = Image.new("RGB", (CELL * COLUMNS, total), "white")
    draw = ImageDraw.Draw(sheet)
    for top, lines, sample in blocks:
        draw.line((0, top, sheet.width, top), FIXED)
        for j, line in enumerate(lines):
            draw.text((6, top + 4 + LINE * j), line, "black")
        for j in range(len(sample["images"])):
            row, column = divmod(j, COLUMNS)
            corner = column * CELL, top + LINE * len(lines) + 8 + ROW * row
            draw_image(sheet, sample, j, out, corner=corner)
    sheet.save(out / "ten.jpg", quality=90)

def draw_image(sheet, sample: dict, j: int, out: Path, *, corner: tuple[int, int]) -> None:
    """Image j of a question in its cell, below a caption that says whether it may move."""
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    # Small pictures are enlarged: a digit of 28 pixels would be hard to see.
    picture = perl.read_image(out / sample["images"][j])
    shown = ImageOps.contain(picture, (CELL - 12, ROW - 30))
    sheet.paste(shown, (left + 6, top + LINE + 4))
    moves, is_right = j in movable_of(sample), j in right_images(sample)
    caption = f"[{j + 1}] {'may move' if moves else 'stays'}{', right' if is_right else ''}"
    colour = "black" if moves else FIXED
    draw.text((left + 6, top), caption, RIGHT if is_right else colour)
    if is_right:
        right, bottom = left + 6 + shown.width, top + LINE + 4 + shown.height
        box = left + 2, top + LINE, right + 3, bottom + 3
        draw.rectangle(box, outline=RIGHT, width=4)

def write_report(records: list[dict], held: set[str], args) -> None:
    """REPORT.md and ten.jpg in args.out; prints a summary."""
    ten = choose_ten(kept(records))
    perl.write_atomic(args.out / "REPORT.md", report(records, ten, held, args))
    draw_ten(ten, args.out)
    print(summary(records))
    if len(held) < args.hold_out:
        print(f"held out {len(held)} of {args.hold_out}: other questions share pictures with "
              "too many of the rest")
    print(f"see {args.out / 'REPORT.md'}")
