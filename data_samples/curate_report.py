"""What curate.py shows of its work: REPORT.md, and ten.jpg with ten questions.

A record is a line of curate.py's logs: {sample, hashes of its images}, with `rule`, the rule
that dropped it, or `why`, the reason for which its images may not move.
"""
import math
import random
import re
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable

from PIL import Image, ImageDraw, ImageOps

import eval as ev
import perl

REASON_EXAMPLES = 2     # questions to show for each reason
ONE_IMAGE = "one image"

def kept(records: Iterable[dict]) -> list[dict]:
    return [record for record in records if "rule" not in record]

# ---- REPORT.md -------------------------------------------------------------------------

def cross_table(pairs: list[tuple], name: str) -> str:
    """Counts of (row, column) pairs, and their sums, as a Markdown table."""
    counts = Counter(pairs)
    columns = sorted({column for _, column in pairs})
    lines = [[name, *columns, "all"], ["---"] * (len(columns) + 2)]
    for row in sorted({row for row, _ in pairs}):
        values = [counts[row, column] for column in columns]
        lines.append([row, *values, sum(values)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

def summary(records: list[dict]) -> str:
    """How many questions stayed, and how many of them can be permuted."""
    several, rules = 0, Counter()
    for record in kept(records):
        sample = record["sample"]
        several += len(sample["images"]) > 1
        rules[sample["order_rule"]] += 1
    n_never = rules.pop("never", 0)
    parts = ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items()))
    text = (f"kept {rules.total() + n_never} of {len(records)} questions; {rules.total()} of "
            f"{several} with several images can be permuted ({parts or 'none'})")
    if rules.total() < several / 10:
        text += "\nWARNING: on the others, PeRL is plain GRPO; REPORT.md says why they may not"
    return text

def flat(question: str) -> str:
    """A question on one line, short enough for a list."""
    text = " ".join(question.split())
    return text if len(text) <= 300 else text[:300] + " ..."

def list_reasons(records: list[dict]) -> str:
    """For each reason why images may not move, two questions. Of words that may mean order:
    the commonest ones."""
    by_reason, words = defaultdict(dict), Counter()
    for record in records:
        question, reason = record["sample"]["question"], record.get("why", ONE_IMAGE)
        if reason != ONE_IMAGE:
            by_reason[reason].setdefault(flat(question), record["sample"])
        if reason.startswith("words"):
            words.update(order_words(question))
    lines = []
    for reason in sorted(by_reason):
        common = [f"{word} {count}" for word, count in words.most_common(12)]
        lines.append(f"- {reason}" + f" ({', '.join(common)})" * reason.startswith("words"))
        # Short questions show best what the reason is.
        for text in sorted(by_reason[reason], key=len)[:REASON_EXAMPLES]:
            s = by_reason[reason][text]
            lines.append(f"  - `{s['id']}`, answer `{s['answer']}`: `{text}`")
    return "\n".join(lines) or "Every question with several images may be permuted."

def order_words(question: str) -> list[str]:
    """The words of a question that made it `never`; names of images would follow them."""
    text = ev.INSIDE.sub("", ev.NAMED_IMAGE.sub("", question))
    return sorted({found[0].lower() for found in ev.ORDER_WORDS.finditer(text)})

def right_places(samples: list[dict]) -> list[tuple[str, str]]:
    """(source and kind, place) of each answer that has one: the number of the image that it
    names, itself or through its option, and the letter of the option."""
    places = []
    for s in samples:
        options = ev.listed_options(s["question"])
        named = re.fullmatch(r"\d+", s["answer"]) if s["order_rule"] == "index" else None
        if s["answer"] in list(perl.LETTERS[:len(options)]):
            kind = "option image" if s["order_rule"] == "letter" else "option"
            places.append((f"{s['source']}: {kind}", s["answer"]))
            named = perl.MENTION.fullmatch(options[perl.LETTERS.index(s["answer"])])
        if named:
            places.append((f"{s['source']}: image", named[named.lastindex or 0]))
    return places

def report(records: list[dict], ten: list[dict], held: set[str], args) -> str:
    """What was dropped and kept; how many images, which labels, where the answers are."""
    fates, images, rules, reasons = [], [], [], []
    for record in records:
        s = record["sample"]
        fates.append((record.get("rule", "**kept**"), s["source"]))
        if "rule" in record:
            continue
        images.append((s["source"], len(s["images"])))
        rules.append((s["source"], s["order_rule"]))
        if "why" in record:
            reasons.append((record["why"], s["source"]))
    samples, listed = [record["sample"] for record in kept(records)], []
    for k, record in enumerate(ten, 1):
        s = record["sample"]
        text = f"`{s['id']}`, {what_moves(record)}, answer `{s['answer']}`"
        listed.append(f"{k}. {text}: `{flat(s['question'])}`")
    parts = [
        f"# {len(samples)} of {len(records)} questions of {', '.join(args.sources)}",
        summary(records) + ".",
        "## What became of the rows", cross_table(fates, "rule"),
        "## Images per question", cross_table(images, "source"),
        "## Order rules", cross_table(rules, "source"),
        "## Why images may not move (`never`)", cross_table(reasons, "reason"),
        list_reasons(kept(records)),
        "## Where the right answer is", cross_table(right_places(samples), "source")]
    if args.hold_out:
        by_source = [("heldout.jsonl", s["source"]) for s in samples if s["id"] in held]
        parts += ["## Held out", cross_table(by_source, "file"),
                  f"{len(held)} of the {args.hold_out} questions that --hold-out asked for. "
                  "They share no picture with train.jsonl. If some are missing, the pictures "
                  "of their source are shared by too many questions."]
    parts += ["## Ten questions", "![](ten.jpg)", "\n".join(listed)]
    return "\n\n".join(parts) + "\n"

# ---- ten.jpg ---------------------------------------------------------------------------

COLUMNS, CELL, ROW, LINE = 6, 150, 140, 14  # of images; width, height; height of a text line
RIGHT, FIXED = "#0a7d32", "#777777"  # frame of a right image; caption of one that stays

def choose_ten(records: list[dict]) -> list[dict]:
    """Ten random questions, from all sources and order rules in turn."""
    kinds = defaultdict(list)
    for record in records:
        kinds[record["sample"]["source"], record["sample"]["order_rule"]].append(record)
    rng, chosen = random.Random(0), []
    for kind in sorted(kinds):
        rng.shuffle(kinds[kind])
    while len(chosen) < min(10, len(records)):
        for kind in sorted(kinds):
            if kinds[kind]:
                chosen.append(kinds[kind].pop())
    return chosen[:10]

def movable_of(sample: dict) -> list[int]:
    if sample["order_rule"] == "never":
        return []
    return sample.get("movable", list(range(len(sample["images"]))))

def right_images(s: dict) -> list[int]:
    """0-based positions of the images that the answer names, itself or by its option."""
    options, answer = ev.listed_options(s["question"]), s["answer"]
    if s["order_rule"] in ("index", "sequence"):
        return [int(number) - 1 for number in answer.split(",")]
    if s["order_rule"] == "letter":
        return [movable_of(s)[perl.LETTERS.index(answer)]]
    if answer not in list(perl.LETTERS[:len(options)]):
        return []
    k = perl.LETTERS.index(answer)
    if options[k] == "<image>":  # option images stand at the end
        return [len(s["images"]) - options[k:].count("<image>")]
    named = perl.MENTION.fullmatch(options[k])
    return [int(named[1]) - 1] if named else []

def what_moves(record: dict) -> str:
    """Examples: "letter: images 2, 3 may move, the letter is renamed"; "never: one image"."""
    s = record["sample"]
    if s["order_rule"] == "never":
        words = ", ".join(order_words(s["question"]))
        return f"never: {record['why']}" + f" ({words})" * record["why"].startswith("words")
    movable = movable_of(s)
    which = "all images may move"
    if len(movable) < len(s["images"]):
        which = f"images {', '.join(str(k + 1) for k in movable)} may move"
    effect = {"keep": "the answer stays", "letter": "the letter is renamed"}
    return f"{s['order_rule']}: {which}, {effect.get(s['order_rule'], 'the answer follows')}"

def readable(question: str) -> str:
    """The text with [1], [2] where the images stand, and image 2 for <image_2>."""
    text = perl.MENTION.sub(r"image \1", " ".join(question.split()))
    parts = text.split("<image>")
    for k in range(1, len(parts)):
        parts[k] = f"[{k}]{parts[k]}"
    # Pillow's built-in font has Latin letters only.
    return "".join(parts).encode("ascii", "replace").decode()

def draw_ten(records: list[dict], out: Path) -> None:
    """ten.jpg: for each question what may move, its text, and its images, the right one framed."""
    blocks = []
    for k, record in enumerate(records, 1):
        s = record["sample"]
        lines = [f"{k}. {s['id']}, answer {s['answer']}", what_moves(record)]
        lines += textwrap.wrap(readable(s["question"]), 180, max_lines=3)
        rows = math.ceil(len(s["images"]) / COLUMNS)
        blocks.append((record, lines, LINE * len(lines) + 8 + ROW * rows))
    sheet = Image.new("RGB", (CELL * COLUMNS, sum(height for _, _, height in blocks)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for record, lines, height in blocks:
        draw.line((0, top, sheet.width, top), FIXED)
        for j, line in enumerate(lines):
            draw.text((6, top + 4 + LINE * j), line, "black")
        for j in range(len(record["sample"]["images"])):
            row, column = divmod(j, COLUMNS)
            corner = column * CELL, top + LINE * len(lines) + 8 + ROW * row
            draw_image(sheet, record["sample"], j, out, corner=corner)
        top += height
    sheet.save(out / "ten.jpg", quality=90)

def draw_image(sheet, sample: dict, j: int, out: Path, *, corner: tuple[int, int]) -> None:
    """Image j of a question in its cell, below a caption that says whether it may move."""
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    shown = ImageOps.contain(perl.read_image(out / sample["images"][j]), (CELL - 12, ROW - 30))
    sheet.paste(shown, (left + 6, top + LINE + 4))
    moves, is_right = j in movable_of(sample), j in right_images(sample)
    caption = f"[{j + 1}] {'may move' if moves else 'stays'}{', right' if is_right else ''}"
    draw.text((left + 6, top), caption, RIGHT if is_right else "black" if moves else FIXED)
    if is_right:
        right, bottom = left + 6 + shown.width, top + LINE + 4 + shown.height
        draw.rectangle((left + 2, top + LINE, right + 3, bottom + 3), outline=RIGHT, width=4)

def write_report(records: list[dict], held: set[str], args) -> None:
    """REPORT.md and ten.jpg in args.out."""
    ten = choose_ten(kept(records))
    perl.write_atomic(args.out / "REPORT.md", report(records, ten, held, args))
    draw_ten(ten, args.out)
