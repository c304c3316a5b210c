"""Tests of perl.py, in its order, and of eval.py: they show by example what each part promises.

    python -m pytest test_perl.py        # one CPU core, no network, one minute
"""
import ast
import base64
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pyarrow
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pyarrow import parquet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from safetensors.torch import load_file, save_file
from transformers import (AutoImageProcessor, AutoTokenizer, GenerationConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)

import eval as ev
import perl
from perl import Rollout, Sample

sys.path.append(str(Path(perl.__file__).parent / "data_samples"))
import ablate
import dry_run
import page

HERE, TINY, CPU = Path(perl.__file__).parent, Path(perl.SHORT_NAMES["tiny"]), torch.device("cpu")
FIELDS = {field.name: field for field in dataclasses.fields(perl.Config)}
table = pytest.mark.parametrize

@pytest.fixture(autouse=True)
def signals():
    """signal.alarm(n) fails a test that hangs."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still running"))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

# ---- Samples -------------------------------------------------------------------------------------

GOOD = dict(id="q1", images=["a.png", "b.png", "c.png"], answer="3", order_rule="index",
            question="<image><image><image> Which shows what <image_2> shows?")
MISSING, IMAGES = None, "<image><image><image>"

@pytest.fixture
def folder(tmp_path):
    """A data folder: images of 1, 6 and 10 tokens (of 28 x 28 pixels), and files that are none."""
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a.png", (28, 28)), ("b.png", (84, 56)), ("c.png", (56, 140)),
                       ("cut.jpg", (200, 200)), ("../outside.png", (28, 28))):
        Image.effect_noise(size, 60).convert("RGB").save(data / name)
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:-3000])
    (data / "text.png").write_text("not a picture")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    return data

def write_rows(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path

def test_load_samples(folder):
    letter = dict(id="q2", order_rule="letter", movable=[1, 2], answer=" B ", source="toy")
    path = write_rows(folder / "good.jsonl", GOOD, "", GOOD | letter)
    first, second = perl.load_samples(path)
    assert (first.id, first.answer, first.source) == ("q1", "3", "")
    assert first.images == tuple(str(folder / name) for name in GOOD["images"])
    assert first.movable == (0, 1, 2), "all may move unless said otherwise"
    assert (second.movable, second.answer, second.source) == ((1, 2), "B", "toy")

# What would not mean the same once the images have changed places.
WOULD_CHANGE = [("answer", text, dict(order_rule="keep"))
                for text in ("Image 2", "a, <image_3>", "x\nimages #1")]
WOULD_CHANGE += [("images", ["a.png", "b.png", "a.png"], others) for others in (
    dict(answer="1"), dict(answer="C", order_rule="letter"),
    dict(answer="2,3", order_rule="sequence"))]
WOULD_CHANGE += [("images", ["a.png"] * 27,
                  dict(order_rule="letter", answer="A", question="<image>" * 27))]

@table("field, value, others", [(field, value, {}) for field, values in {
    "id": [MISSING, 7, " ", "a\0", "\udfff"], "order_rule": [MISSING, "shuffle", ["keep"], "\0"],
    "source": [5, "<|im_end|>", "\ud83d"], "ansver": ["3"],
    "images": [MISSING, "a.png", [], ["a.png", 1, "c.png"], *(
        ["a.png", bad, "c.png"] for bad in  # the link leads out of the folder
        ("none.png", "text.png", "cut.jpg", "../outside.png", "link.png"))],
    "question": [MISSING, [IMAGES], "<image><image> one too few", IMAGES + "<image_4>",
                 IMAGES + "<image_0>", IMAGES + "<|im_end|>", IMAGES + "<|image_pad|>",
                 IMAGES + "A: <|video_pad|> B: x", IMAGES + "\0", IMAGES + "\ud83d", "no image",
                 IMAGES + "<image>", IMAGES + "<image_" + "9" * 5000 + ">"],
    # To order_rule index; to the others below.
    "answer": [MISSING, 3, "4", "0", "A", "", " ", "<|im_end|>", "1\0", "\ud83d", "7" * 10**6],
    "movable": [[0, 3], [-1], [1, 1], "01", [True], [10 ** 400]],
}.items() for value in values] + [
    ("answer", bad, dict(order_rule="letter", movable=[1, 2])) for bad in ("C", "1", "AB")] + [
    ("answer", bad, dict(order_rule="sequence")) for bad in ("1,1,2", "1,4", "1,,2")
    ] + WOULD_CHANGE)
def test_a_bad_sample_is_named_by_file_line_and_field(folder, field, value, others):
    row = GOOD | {"id": "q2"} | others | {field: value}
    row = {name: value for name, value in row.items() if value is not MISSING}
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2, field {field}: ") as refusal:
        perl.load_samples(write_rows(folder / "bad.jsonl", GOOD, row))
    assert len(str(refusal.value)) < 500, "a line that a terminal can show"

def test_an_image_may_come_twice_where_that_is_harmless(folder):
    row = GOOD | dict(images=["a.png", "b.png", "a.png"])
    rows = [row | dict(answer="2"), row | dict(answer="1", order_rule="never"),
            row | dict(answer="Two of the images show it", order_rule="keep"),
            row | dict(answer="B", order_rule="letter", movable=[1, 2])]  # the reference's copy
    rows = [row | dict(id=f"q{k}") for k, row in enumerate(rows)]
    assert len(perl.load_samples(write_rows(folder / "good.jsonl", *rows))) == 4

@table("content, message", [
    (b'{"id": ', "line 1: not valid JSON"), (b"[1]", "line 1: "), (b'\n{"id": "\xff"}', "line 2"),
    (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)[:50]}".encode(), "line 2: not valid JSON"),  # torn
    (f"[{json.dumps(GOOD)}]".encode(), "line 1: .*one object a line"),
    (json.dumps([GOOD], indent=1).encode(), "line 1: not valid JSON"),
    (b'[["id", "x", 1], ["answer", "1"]]', "line 1: .*one object a line"),
    (b'{"id":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 1: not valid JSON"),
    (b'{"id": ' + b"9" * 9000 + b"}", "line 1: not valid JSON"), (b'{"id": NaN}', "field id"),
    (json.dumps(GOOD).encode("utf-16") * 2, "line 1"), (b"\0\0\0\0", "line 1"),
    (f"{json.dumps(GOOD)}\n".encode() * 2, "line 2, field id: .*line 1"),
    (b"", "no samples"), (b"\n \n", "no samples"), (MISSING, "is no file")])
def test_bad_files(folder, content, message):
    if content is not MISSING:
        (folder / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl.*{message}"):
        perl.load_samples(folder / "bad.jsonl")

def test_several_weighted_files(folder):
    write_rows(folder / "one.jsonl", GOOD, GOOD | {"id": "q2"})
    write_rows(folder / "two.jsonl", GOOD | {"id": "q3"})
    other = write_rows(folder / "other.jsonl", GOOD | {"question": GOOD["question"] + "?"})
    cfg, one = tiny_config(), folder / "one.jsonl"
    samples = perl.load_questions(f"{one}*2,{folder / 'two.jsonl'}", PROCESSOR, cfg, ACCELERATOR)
    assert Counter(s.id for s in samples) == {"q1": 2, "q2": 2, "q3": 1}
    for files, problem in ((f"{one},{other}", "an id occurs in two files"),
                           (f"{one}*0", r"\*0 is no file")):
        with pytest.raises(SystemExit, match=problem):
            perl.load_questions(files, PROCESSOR, cfg, ACCELERATOR)

@table("start, end", [
    (b"", b"\n"), (b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"", b"\r\n \r\n")])
def test_byte_order_mark_crlf_and_a_missing_last_newline_do_no_harm(folder, start, end):
    lines = [json.dumps(GOOD | {"id": f"q{k}"}).encode() for k in range(3)]
    (folder / "d.jsonl").write_bytes(start + end.join(lines))
    assert [asked.id for asked in perl.load_samples(folder / "d.jsonl")] == ["q0", "q1", "q2"]

def test_many_images_and_a_megabyte_of_text(folder, capsys):
    """What is too long for the prompt is dropped and counted; 33 images are only many."""
    many = dict(id="many", images=["a.png"] * 32 + ["b.png"], answer="33", order_rule="index",
                question="<image>" * 33 + "<image_33>")
    long = GOOD | dict(id="long", question=IMAGES + "word " * 200_000)
    path = write_rows(folder / "d.jsonl", GOOD, many, long)
    kept = perl.load_questions(str(path), PROCESSOR, tiny_config(), ACCELERATOR)
    assert [asked.id for asked in kept] == ["q1", "many"]
    assert "2 questions, 1 dropped" in capsys.readouterr().out
    order = (32, *range(32))
    moved = perl.permute(kept[1], order)
    assert moved.answer == "1" and moved.question.endswith("<image_1>")
    pictures = perl.encode_prompt(moved, PROCESSOR).pictures
    assert [picture.tokens for picture in pictures] == [6] + [1] * 32

# All that the published tokenizer adds, but <tool_call> and </tool_call>: those are plain words.
REAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
               "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
               "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
               "<|image_pad|>", "<|video_pad|>", "<|fim_prefix|>", "<|fim_middle|>",
               "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]

def special_ids(prompt):
    special = [i for i, token in PROCESSOR.tokenizer.added_tokens_decoder.items() if token.special]
    return [token for token in prompt.ids if token in special]

def test_no_text_becomes_a_control_token(folder):
    specials = [t.content for t in PROCESSOR.tokenizer.added_tokens_decoder.values() if t.special]
    assert all(perl.CONTROL.search(text) for text in REAL_TOKENS + specials)
    plain, = perl.load_samples(write_rows(folder / "d.jsonl", GOOD))
    texts = ["<tool_call>", "<think>", "< |im_end|>", "<|im_<image_1>end|>", "<|im", "_end|>", "|>",
             "<|<image_2>|>", "{{ 1 + 1 }}", "{% raw %}", "<|image_\u200bpad|>", "&lt;|im_end|&gt;",
             "\uff1c|im_end|\uff1e", "<s>", "[INST]", "<<image_1>>", "<im<image_3>age>"]
    for text in texts:
        row = GOOD | dict(question=text + IMAGES + text, answer=text, order_rule="never")
        asked, = perl.load_samples(write_rows(folder / "d.jsonl", row))
        prompt = perl.encode_prompt(asked, PROCESSOR)
        assert special_ids(prompt) == special_ids(perl.encode_prompt(plain, PROCESSOR)), text
        assert len(prompt.ids) == perl.prompt_length(asked, PROCESSOR)

# ---- Images: what may stand in a data folder -----------------------------------------------------

def png_of(width, height):
    """A tiny file that says it is a huge picture: one bit a pixel, all alike."""
    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", pixels),
                     chunk(b"IEND", b"")])

def noise(width=84, height=56):
    return Image.effect_noise((width, height), 60).convert("RGB")

def a_file(content):
    return lambda path: path.write_bytes(content)

def half_of(image, format):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()[:file.tell() // 2]

def link_to(target):
    return lambda path: path.symlink_to(target)

BAD_IMAGES = {
    "truncated.png": (a_file(half_of(noise(), "PNG")), "is no readable image: .*truncated"),
    "truncated.jpg": (a_file(half_of(noise(), "JPEG")), "is no readable image: .*truncated"),
    "header.png": (a_file(png_of(9, 9)[:20]), "is no readable image"),
    "zero.png": (a_file(b""), "is no readable image: cannot identify"),
    "bomb.png": (a_file(png_of(20_000, 20_000)), "is no readable image: .*decompression bomb"),
    "folder.png": (lambda path: path.mkdir(), "is no file"),
    "none.png": (lambda path: None, "is no file"),
    "pipe.png": (os.mkfifo, "is no file"),
    "loop.png": (link_to("loop.png"), "is no readable image: Symlink loop|is no file"),
    "out.png": (link_to("../outside.png"), "lies outside"),
    "../outside.png": (lambda path: None, "lies outside"),
    "/etc/hostname": (lambda path: None, "lies outside"),
    "a\0.png": (lambda path: None, "is no readable image: .*null byte"),
    "\ud800.png": (lambda path: None, "is no readable image: .*surrogates"),
    "x" * 300 + ".png": (lambda path: None, "is no readable image: .*too long"),
    # Needs another program to draw it, which would run what it finds in the file.
    "vector.eps": (lambda path: noise().save(path), "is no readable image: cannot identify")}

@table("name", BAD_IMAGES)
def test_a_bad_image_is_named(folder, name):
    make, message = BAD_IMAGES[name]
    make(folder / name)
    row = GOOD | {"id": "q2", "images": ["a.png", name, "c.png"]}
    signal.alarm(20)
    with pytest.raises(SystemExit, match=rf"bad\.jsonl, line 2, field images: .* ?{message}"):
        perl.load_questions(str(write_rows(folder / "bad.jsonl", GOOD, row)), PROCESSOR,
                            tiny_config(), ACCELERATOR)

def grey_16_bit(levels):
    """A 16-bit picture of the given levels of grey, from 0 to 65535."""
    return Image.frombytes("I;16", (len(levels), 1), struct.pack(f"<{len(levels)}H", *levels))

def drawn(mode, *colours, **options):
    """A row of pixels of the given colours, and how to save it."""
    image = Image.new(mode, (len(colours), 1))
    for k, colour in enumerate(colours):
        image.putpixel((k, 0), colour)
    return image, options

def animation(first, *others):
    frames = [Image.new("RGB", (3, 1), colour) for colour in (first, *others)]
    return frames[0], dict(save_all=True, append_images=frames[1:])

def palette():
    """A row of red and blue pixels; blue, number 1 of the palette, counts as transparent."""
    image, _ = drawn("P", 0, 1, 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image, dict(transparency=1)

RED, BLUE, BLACK, WHITE = (255, 0, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)

@table("name, image, pixels", [
    ("rgba.png", drawn("RGBA", (255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)),
     [RED, WHITE, (127,) * 3]),
    ("la.png", drawn("LA", (0, 255), (0, 0)), [BLACK, WHITE]),
    ("palette.png", palette(), [RED, WHITE, RED]),
    ("16.png", (grey_16_bit([0, 32768, 65535]), {}), [BLACK, (128,) * 3, WHITE]),
    ("bits.png", drawn("1", 0, 1), [BLACK, WHITE]),
    ("grey.png", drawn("L", 0, 99), [BLACK, (99,) * 3]),
    ("cmyk.jpg", (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), dict(quality=100)), [RED] * 8),
    ("moving.gif", animation("red", "blue"), [RED] * 3),
    ("moving.webp", animation("red", "blue"), [RED] * 3),
    ("rgb.bmp", drawn("RGB", RED, BLUE), [RED, BLUE])])
def test_pictures_of_all_kinds_are_read_as_they_look(folder, name, image, pixels):
    image, options = image
    image.save(folder / name, **options)
    read = perl.read_image(folder / name)
    assert read.mode == "RGB" and read.size == image.size
    for k, colour in enumerate(pixels):
        assert read.getpixel((k, 0)) == pytest.approx(colour, abs=2)
    row = dict(id="x", images=[name], question="<image>?", order_rule="index", answer="1")
    asked, = perl.load_samples(write_rows(folder / "one.jsonl", row))
    assert_reads(asked, [name])

def assert_reads(asked, names):
    """The prompt has the pixels of these files as read_image shows them, and its length is known
    before they are decoded."""
    prompt = perl.encode_prompt(asked, PROCESSOR)
    assert len(prompt.ids) == perl.prompt_length(asked, PROCESSOR)
    for picture, path, name in zip(prompt.pictures, asked.images, names):
        assert path.endswith(name)
        plain = PROCESSOR.image_processor([perl.read_image(path)], return_tensors="pt")
        assert torch.equal(picture.pixels, plain["pixel_values"])

@table("suffix", ["jpg", "png", "webp"])
@table("orientation", range(1, 9))
def test_exif_rotation_is_applied(folder, orientation, suffix):
    upright = Image.new("RGB", (112, 56), "white")
    upright.paste("black", (0, 0, 28, 28))  # a mark in the upper left corner
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / f"turned.{suffix}", exif=exif)
    read = perl.read_image(folder / f"turned.{suffix}")
    assert read.size == (112, 56)
    corners = [read.getpixel(place)[0] < 128 for place in ((9, 9), (99, 9), (9, 47), (99, 47))]
    assert corners == [True, False, False, False]
    row = dict(id="x", images=[f"turned.{suffix}"], question="<image>?", order_rule="index",
               answer="1")
    asked, = perl.load_samples(write_rows(folder / "one.jsonl", row))
    assert perl.encode_prompt(asked, PROCESSOR).pictures[0].grid.tolist() == [[1, 4, 8]]
    assert_reads(asked, [f"turned.{suffix}"])

@table("size, tokens", [((1, 1), 1), ((28, 5000), 179), ((5000, 28), 179), ((10_000, 10), None)])
def test_pictures_of_odd_sizes(folder, size, tokens):
    """One pixel is scaled up; a strip of 200 : 1 or more has no place in the vision tower."""
    Image.new("RGB", size).save(folder / "odd.png")
    row = dict(id="odd one", images=["odd.png"], question="<image>?", order_rule="index",
               answer="1")
    path = write_rows(folder / "one.jsonl", row)
    if tokens is None:
        with pytest.raises(SystemExit, match="line 1, field images: .*odd.png is longer than 200"):
            perl.load_questions(str(path), PROCESSOR, tiny_config(), ACCELERATOR)
    else:
        asked, = perl.load_questions(str(path), PROCESSOR, tiny_config(), ACCELERATOR)
        assert [p.tokens for p in perl.encode_prompt(asked, PROCESSOR).pictures] == [tokens]
        assert_reads(asked, ["odd.png"])

# ---- Permutation (Eq. 1) -------------------------------------------------------------------------

def sample(rule="keep", answer="x", n=3, question="?", movable=None):
    return Sample("s", tuple("abcdef"[:n]), question, answer, rule, movable)

@table("rule, answer, movable, order, images, expected", [
    # new_images[j] = images[order[j]]: with (2, 0, 1) the third image comes first
    ("keep", "42", None, (2, 0, 1), "cab", "42"),
    ("index", "3", None, (2, 0, 1), "cab", "1"),
    ("index", "1", None, (2, 0, 1), "cab", "2"),
    ("letter", "A", None, (2, 0, 1), "cab", "B"),
    ("sequence", "3,1,2", None, (2, 0, 1), "cab", "1,2,3"),
    ("sequence", "2, 3", None, (1, 0, 2), "bac", "1, 3"),
    # image a is a fixed reference, options A, B, C are the images b, c, d
    ("letter", "C", (1, 2, 3), (0, 3, 1, 2), "adbc", "A"),
    ("letter", "A", (1, 2, 3), (0, 3, 1, 2), "adbc", "B"),
    # movable positions need not be neighbours: options A, B are the images a, c
    ("letter", "A", (0, 2), (2, 1, 0, 3), "cbad", "B"),
    ("never", "True", None, (0, 1, 2), "abc", "True")])
def test_permute(rule, answer, movable, order, images, expected):
    permuted = perl.permute(sample(rule, answer, len(order), movable=movable), order)
    assert (permuted.images, permuted.answer) == (tuple(images), expected)

def test_permute_renumbers_mentions():
    asked = sample("index", "2", question=IMAGES + "<image_1> or <image_3>? <image_1>!")
    permuted = perl.permute(asked, (2, 0, 1))
    assert permuted.question == IMAGES + "<image_2> or <image_1>? <image_2>!"

@table("rule, movable, order", [
    ("never", None, (1, 0, 2)), ("keep", (1, 2), (1, 0, 2)),
    ("keep", None, (0, 0, 2)), ("keep", None, (0, 1)), ("keep", None, (0, 1, 3))])
def test_permute_refuses(rule, movable, order):
    with pytest.raises(ValueError, match="s: "):
        perl.permute(sample(rule, movable=movable), order)

def test_permute_round_trip():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 6)
        movable = tuple(sorted(rng.sample(range(n), rng.randint(1, n))))
        rule, answer = rng.choice([
            ("keep", "x"), ("index", str(rng.randint(1, n))),
            ("letter", chr(65 + rng.randrange(len(movable)))),
            ("sequence", ",".join(str(k + 1) for k in rng.sample(range(n), rng.randint(1, n))))])
        before = sample(rule, answer, n, f"<image_{rng.randint(1, n)}>", movable)
        order = perl.draw_orders(before, 1, 1.0, rng)[1]
        after = perl.permute(before, order)
        inverse = tuple(order.index(j) for j in range(n))
        assert perl.permute(after, inverse) == before
        if rule == "index":  # the answer points at the same picture as before
            assert after.images[int(after.answer) - 1] == before.images[int(before.answer) - 1]

def test_drawn_orders_are_legal_distinct_and_from_one_generator():
    rng, asked = random.Random(0), sample(n=4, movable=(1, 2, 3))
    for _ in range(50):
        orders = perl.draw_orders(asked, 5, 1.0, rng)
        assert orders[0] == (0, 1, 2, 3) and len(set(orders)) == 6, "all 3! orders, each once"
        assert all(order[0] == 0 and sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(perl.draw_orders(asked, 8, 1.0, rng)) == 9, "more than there are: they come again"
    assert perl.draw_orders(asked, 0, 1.0, rng) == [(0, 1, 2, 3)]
    assert perl.draw_orders(sample("never"), 2, 1.0, rng) == [(0, 1, 2)] * 3
    assert perl.draw_orders(sample(n=1), 2, 1.0, rng) == [(0,)] * 3
    draws = [[perl.draw_orders(sample(n=5), 1, 1.0, rng)[1] for _ in range(20)]
             for rng in (random.Random(3), random.Random(3))]
    assert draws[0] == draws[1] and len(set(draws[0])) > 10, "reproducible, never reset"

def test_alpha_is_the_probability_that_a_question_is_permuted():
    rng = random.Random(0)
    drawn = {alpha: [perl.draw_orders(sample(), 2, alpha, rng) for _ in range(1000)]
             for alpha in (0.0, 0.5, 1.0)}
    plain = {alpha: some.count([(0, 1, 2)] * 3) for alpha, some in drawn.items()}
    assert plain[0.0] == 1000 and plain[1.0] == 0 and 430 < plain[0.5] < 570
    assert {len(set(orders)) for orders in drawn[0.5]} == {1, 3}, "one draw for a whole question"
    counts = Counter(orders[1] for orders in drawn[1.0])
    assert len(counts) == 5 and min(counts.values()) > 140, "the 5 others are equally likely"

def test_all_orders():
    assert len(set(perl.all_orders(sample(n=4), 24))) == 24
    assert perl.all_orders(sample("never"), 24) == [(0, 1, 2)]
    capped = perl.all_orders(sample(n=5), 24)
    assert len(set(capped)) == 24 and capped[0] == (0, 1, 2, 3, 4)
    assert capped == perl.all_orders(sample(n=5), 24), "the same in every evaluation"

# ---- Reward --------------------------------------------------------------------------------------

@table("response, answer, well_formed", [
    (r"<think>a</think> \boxed{3}", "3", True), (r"<think></think>\boxed{\frac{1}{2}}",
                                                 r"\frac{1}{2}", True),
    ("<think>\na\n</think>\n\nso \\boxed{\\{1, 2\\}} it is", r"\{1, 2\}", True),
    (r"<think>\boxed{1}</think> \boxed{2}", "2", True), (r"\boxed{3}", "3", False),
    (r"<think>\boxed{1}</think> so it is 2", None, False), (r"a</think>\boxed{3}", "3", False),
    (r"<think>\boxed{1} the answer is 1", None, False), ("</think>", None, False),
    (r"<think>a</think><think> \boxed{1}", None, False), ("<think>a</think> 3", None, False),
    (r"<think>a</think><think>b</think>\boxed{3}", "3", False), ("", None, False),
    (r"so <think>a</think>\boxed{3}", "3", False), (r"<think>a</think>\boxed{", None, False),
    (r"<think>a</think>\boxed{}", None, False), (r"\boxed{1} and \boxed{ 2 }", "2", False),
    (r"\boxed{1} and \boxed{2", "1", False), (r"\boxed {B}", "B", False),
    ("<answer></answer>", None, False), ("<answer> B", "B", False),
    ("<answer>1</answer><answer>B</answer>", "B", False), (r"<answer>1</answer> \boxed{2}", "2",
                                                           False),
    ("The answer is (B).", "B", False), ("the answer is 1.\nNo, the answer is 2.", "2", False),
    ("Final answer: image 2", "image 2", False), ("**Answer:** 3.5", "3.5", False),
    ("The answer is $\\frac{1}{2}$.", r"\frac{1}{2}", False), ("I think it is B", None, False)])
def test_extract_answer_and_has_format(response, answer, well_formed):
    assert perl.extract_answer(response) == answer
    assert perl.has_format(response) is well_formed

@table("gold, right, wrong", [
    ("B", ["B", "b", "(B)", "B. Both images", "B. a cat and a dog", r"\text{B}", "Option B",
           "(B) A dog, I think", "the answer is B", "B because image 2 shows it"],
     ["C", "A or B", "B. cats or C. dogs", "Both", "B and C", "(A) and (B)", "not B", "A, B",
      "Bob", "B or not B", "option C, not B"]),
    ("yes", ["Yes", "Yes, it is."], ["no", "not yes", "1"]), ("True", ["TRUE"], ["False", "1"]),
    ("3", ["3", "3.0", "image 3", "x = 3", "6/2"], ["-3", "3.5", "13", "Image 2", "3,1"]),
    ("1234", ["1,234", "1234"], ["1,2,3,4"]), ("1,234", ["1234"], ["234"]),
    (r"\frac{1}{2}", ["0.5", "2/4", r"\frac{3}{6}", r"$\sqrt{0.25}$"], ["0.33", "2", "1,2"]),
    ("x^2+2x+1", ["(x+1)^2"], ["(x-1)^2"]), ("cat", ["Cat"], ["dog", "a cat and a dog"]),
    ("3,1,2", ["3, 1, 2", "[3, 1, 2]", "3 -> 1 -> 2", "image 3, image 1, image 2"],
     ["1,2,3", "3,1", "312", "3"])])
def test_is_correct(gold, right, wrong):
    def graded(answers):
        return [a for a in answers if perl.is_correct(rf"<think>t</think> \boxed{{{a}}}", gold)]
    assert graded(right) == right and graded(wrong) == []
    unboxed, unclosed = gold, rf"<think>\boxed{{{gold}}}"
    assert not perl.is_correct(unboxed, gold) and not perl.is_correct(unclosed, gold)

def test_hostile_mathematics_ends_and_the_judge_lives_on(monkeypatch):
    monkeypatch.setattr(perl.MathJudge, "SECONDS", 1.0)
    signal.alarm(30)
    for hostile in ("9^{9^{9^9}}", "99999999!", "((((((9^9)^9)^9)^9)^9)^9)^9"):
        assert not perl.is_correct(rf"\boxed{{{hostile}}}", "17")
    assert perl.MATH_JUDGE.timeouts, "at least one was stopped by the time bound"
    monkeypatch.undo()
    assert perl.is_correct(r"\boxed{\frac{4}{6}}", r"\frac{2}{3}")

@table("hostile", [
    r"\boxed{" * 20_000, "the answer is 1" + " " * 100_000 + "2", "answer is" + "\n" * 100_000,
    r"\boxed{3" + " " * 5_000 + "x}", r"\boxed{" + r"\text " * 20_000 + "}", "<think>" * 20_000,
    "<answer>" * 20_000, r"\boxed{" + "(" * 20_000 + "}"], ids=lambda text: text[:15].strip())
def test_hostile_text_ends(hostile):
    signal.alarm(5)
    assert not perl.is_correct(hostile, "3,1,2") and not perl.is_correct(hostile, "7/2")
    assert not perl.has_format(hostile)

def test_the_judge_is_out_of_reach_of_a_terminals_ctrl_c():
    assert perl.is_correct(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")
    assert os.getsid(perl.MATH_JUDGE.process.pid) != os.getsid(0)

def test_a_response_is_never_run_as_code(tmp_path):
    flag = tmp_path / "executed"
    for code in (f"__import__('os').system('touch {flag}')", f"open('{flag}', 'w')"):
        for text in (code, f"1+{code}", f"$ {code} $", f"= {code}", f"1.0*{code}", f"1 if {code}"):
            perl.is_correct(rf"\boxed{{{text}}}", r"\frac{1}{2}")
            perl.is_correct(r"\boxed{1}", text + "0")
    assert not flag.exists()

# ---- The tiny model, and groups of rollouts for it -----------------------------------------------

def tiny_config(**changes):
    """Small numbers, and gradients that are not scaled, so that they can be compared."""
    base = dict(max_new_tokens=40, updates_per_step=1, beta=0.0, filter="none", max_grad_norm=1e9,
                gradient_checkpointing=False)
    return dataclasses.replace(perl.parse_config([]), **base | changes)

def load_tiny(**changes):
    return perl.load_model("tiny", tiny_config(**changes), CPU)

PROCESSOR, ACCELERATOR = perl.load_processor("tiny", tiny_config()), perl.accelerate.Accelerator()

@pytest.fixture
def questions(folder):
    """Questions with 3, 2 and 1 images of different sizes, and prompts of different lengths."""
    pair = dict(id="q2", images=["b.png", "a.png"], question="<image> or <image>: bigger?",
                order_rule="index", answer="1")
    single = dict(id="q3", images=["c.png"], question="<image>?", order_rule="keep", answer="7")
    return perl.load_samples(write_rows(folder / "three.jsonl", GOOD, pair, single))

def tokens_of(text):
    ids = PROCESSOR.tokenizer(text, add_special_tokens=False).input_ids
    return ids + PROCESSOR.eos_ids[-1:]

def written_groups(questions, rewards=(1.0, 0.1, 0.0, 0.0)):
    """Four rollouts a question, in given words: two on the identity, two on the reversed order."""
    texts, groups = (r"<think>one</think> \boxed{1}", "<think>a much longer thought", "3", ""), []
    for asked in questions:
        identity, pictures = tuple(range(len(asked.images))), perl.load_pictures(asked, PROCESSOR)
        groups.append([])
        for order, text, reward in zip([identity] * 2 + [identity[::-1]] * 2, texts, rewards):
            prompt = perl.encode_prompt(perl.permute(asked, order), PROCESSOR, pictures)
            groups[-1].append(Rollout(prompt, order, prompt.sample.answer, tokens_of(text), text,
                                      truncated=False, reward=reward))
    perl.set_advantages(groups)
    return groups

def gradient_of_update(model, groups, cfg, ref_model=None):
    """The gradient that perl.update hands to the optimizer, flat; and what it returns."""
    class Recorder:
        def step(self):
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            model.zero_grad()
            return self.gradient.norm().item()

    recorder = Recorder()
    returned = perl.update(model, ref_model, recorder, PROCESSOR, groups, cfg, ACCELERATOR)
    return recorder.gradient, *returned

def adamw_updates(model, steps, cfg):
    """What perl.update returns for the groups of each step."""
    settings = dataclasses.replace(cfg, lr=1e-2, weight_decay=0.1)
    optimizer = perl.SplitAdamW(model, settings, ACCELERATOR)
    return [perl.update(model, None, optimizer, PROCESSOR, groups, cfg, ACCELERATOR)
            for groups in steps]

def flat_weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

# ---- Prompts -------------------------------------------------------------------------------------

@table("order, tokens, mention", [((0, 1, 2), [1, 6, 10], 2), ((2, 0, 1), [10, 1, 6], 3)])
def test_prompt(questions, order, tokens, mention):
    asked, pictures = questions[0], perl.load_pictures(questions[0], PROCESSOR)
    prompt = perl.encode_prompt(perl.permute(asked, order), PROCESSOR, pictures)
    assert [picture.tokens for picture in prompt.pictures] == tokens
    assert all(p is pictures[asked.images[k]] for p, k in zip(prompt.pictures, order))
    start = PROCESSOR.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    begins = [k + 1 for k, token in enumerate(prompt.ids) if token == start]
    runs = [prompt.ids[k:k + n + 1].count(PROCESSOR.image_id) for k, n in zip(begins, tokens)]
    assert runs == tokens and prompt.ids.count(PROCESSOR.image_id) == 17
    text = PROCESSOR.tokenizer.decode(prompt.ids)
    assert f"what image {mention} shows" in text and tiny_config().instruction in text

def test_collate(questions):
    prompts = [perl.encode_prompt(asked, PROCESSOR) for asked in questions]
    model, responses = load_tiny(), [[[9, 8], [9]], [[7]], [[9, 9, 9]]]
    inputs, lengths = perl.collate(prompts, responses, model, PROCESSOR, tiny_config())
    for prompt, some, ids, parts in zip(prompts, responses, inputs["input_ids"], lengths):
        row = [*prompt.ids, *sum(some, [])]
        assert ids.tolist()[-len(row):] == row and (ids[:-len(row)] == PROCESSOR.pad_id).all()
        assert parts == [len(ids) - len(row), len(prompt.ids), *map(len, some)]
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [17, 7, 10]

@table("max_pixels, most_tokens", [(262144, 10), (4 * 28 * 28, 4)])
def test_long_prompts_are_dropped_and_counted(folder, questions, capsys, max_pixels, most_tokens):
    processor = perl.load_processor("tiny", tiny_config(max_pixels=max_pixels))
    prompts = [perl.encode_prompt(asked, processor) for asked in questions]
    assert max(p.tokens for prompt in prompts for p in prompt.pictures) <= most_tokens
    lengths = [len(prompt.ids) for prompt in prompts]
    for limit, kept in ((max(lengths), 3), (max(lengths) - 1, 2), (min(lengths), 1)):
        left = perl.load_questions(str(folder / "three.jsonl"), processor,
                                   tiny_config(max_prompt_tokens=limit), ACCELERATOR)
        assert left == [asked for asked, n in zip(questions, lengths) if n <= limit]
        assert len(left) == kept and f"{3 - kept} dropped" in capsys.readouterr().out

def test_an_image_that_the_processor_refuses_is_named(folder):
    Image.new("RGB", (1, 300)).save(folder / "thin.png")
    path = write_rows(folder / "d.jsonl", GOOD | dict(images=["a.png", "thin.png", "c.png"]))
    with pytest.raises(SystemExit, match="thin.png"):
        perl.load_questions(str(path), PROCESSOR, tiny_config(), ACCELERATOR)

# ---- Rollouts ------------------------------------------------------------------------------------

def sample_and_record(model, questions, n, cfg):
    """Rollouts in the order of generate's rows, and what generate returns: scores, logits."""
    real, outputs = model.generate, []

    def generate(**inputs):
        outputs.append(real(**inputs, return_dict_in_generate=True, output_scores=True,
                            output_logits=True))
        return outputs[-1].sequences
    model.generate = generate
    torch.manual_seed(0)
    orders = [perl.all_orders(asked, 2) for asked in questions]
    rollouts = sum(perl.sample_groups(model, PROCESSOR, questions, orders, n, cfg), [])
    return sorted(rollouts, key=lambda r: -len(r.prompt.ids)), outputs[0]  # longest prompt first

@table("temperature", [1.0, 0.7])
def test_logprobs_of_the_loss_are_those_of_sampling(questions, temperature):
    model, cfg = load_tiny(), tiny_config(temperature=temperature)
    rollouts, output = sample_and_record(model, questions, 2, cfg)
    sampled = torch.stack(output.scores, dim=1).log_softmax(-1)                     # (B, T, V)
    logprobs, mask = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    assert len(sampled) == len(rollouts) == 10 and len({len(r.prompt.ids) for r in rollouts}) == 3
    for rollout, row, distribution in zip(rollouts, logprobs, sampled):
        ids, n = torch.tensor(rollout.ids), len(rollout.ids)
        expected = distribution[torch.arange(n), ids]
        assert torch.allclose(row[:n], expected, atol=1e-4) and not row[n:].any()
    assert mask.sum(1).tolist() == [len(r.ids) for r in rollouts]

def test_greedy_is_not_random(questions):
    model, prompts = load_tiny(), [perl.encode_prompt(asked, PROCESSOR) for asked in questions]
    for greedy in (True, False):
        responses = perl.generate(model, PROCESSOR, prompts, 30, tiny_config(), greedy)[0]
        assert (len(set(map(tuple, responses))) == 1) is greedy  # two samples are often equal

@table("hostile", [
    dict(do_sample=True, top_k=1, top_p=0.001, temperature=1e-6, repetition_penalty=1.05),
    dict(exponential_decay_length_penalty=[2, 2.0]), dict(encoder_no_repeat_ngram_size=2),
    dict(top_h=0.5), dict(guidance_scale=3.0)], ids=lambda settings: list(settings)[-1])
def test_the_checkpoints_own_sampling_settings_do_not_leak_in(questions, tmp_path, hostile):
    shutil.copytree(TINY, tmp_path / "hostile")
    path = tmp_path / "hostile" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    cfg = tiny_config(temperature=0.7, max_new_tokens=12)
    model = perl.load_model(str(tmp_path / "hostile"), cfg, CPU)
    _, output = sample_and_record(model, questions, 1, cfg)
    for scores, logits in zip(output.scores, output.logits):
        expected = logits.float() / 0.7
        expected[:, PROCESSOR.banned_ids] = -torch.inf
        assert torch.allclose(scores, expected, atol=1e-5)

def test_image_tokens_are_never_sampled(questions):
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    banned = PROCESSOR.tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    model = load_tiny()
    wish = torch.zeros(model.lm_head.out_features).index_fill(0, torch.tensor(banned), 1000.0)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + wish)
    group, = perl.sample_groups(model, PROCESSOR, questions[:1], [[(0, 1, 2)]], 8, tiny_config())
    assert not set(banned) & {token for rollout in group for token in rollout.ids}
    group[0].ids = banned[:1]
    logprobs, _ = perl.response_logprobs(model, PROCESSOR, group[:1], tiny_config())
    assert logprobs.tolist() == [[-math.inf]], "probability zero in the loss, too"

def test_logprobs_equal_a_plain_forward_pass_of_transformers(questions):
    """One sequence at a time, without padding or shared features: neither has an influence."""
    model, rollouts = load_tiny(), sum(written_groups(questions), [])
    logprobs, _ = perl.response_logprobs(model, PROCESSOR, rollouts, tiny_config())
    for rollout, row in zip(rollouts, logprobs):
        ids, n = torch.tensor([rollout.prompt.ids + rollout.ids]), len(rollout.ids)
        logits = model(
            input_ids=ids, mm_token_type_ids=(ids == PROCESSOR.image_id).int(),
            pixel_values=torch.cat([picture.pixels for picture in rollout.prompt.pictures]),
            image_grid_thw=torch.cat([picture.grid for picture in rollout.prompt.pictures])).logits
        logits[..., PROCESSOR.banned_ids] = -torch.inf
        expected = logits[0, -n - 1:-1].log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
        assert torch.allclose(row[:n], expected, atol=1e-5) and not row[n:].any()

def test_the_end_token_is_kept_and_trained_on(questions):
    model = load_tiny()
    rollouts, _ = sample_and_record(model, questions, 6, tiny_config(max_new_tokens=64))
    for rollout in rollouts:
        ends = [token in PROCESSOR.eos_ids for token in rollout.ids]
        assert not any(ends[:-1]) and ends[-1] is not rollout.truncated
        assert ends[-1] or len(rollout.ids) == 64
    assert not all(rollout.truncated for rollout in rollouts)
    only_end = written_groups(questions)[0][3]
    assert only_end.ids == PROCESSOR.eos_ids[-1:]
    logprobs, mask = perl.response_logprobs(model, PROCESSOR, [only_end], tiny_config())
    logprobs.sum().backward()
    assert mask.tolist() == [[True]] and model.model.language_model.norm.weight.grad.any()

def answer_always(text, monkeypatch):
    """Put this answer in the place of perl.generate; returns whether its calls were greedy."""
    greedy_calls = []

    def generate(model, processor, prompts, n, cfg, greedy=False):
        greedy_calls.append(greedy)
        return [[tokens_of(text)] * n for _ in prompts]
    monkeypatch.setattr(perl, "generate", generate)
    return greedy_calls

def test_a_rollout_is_graded_against_the_answer_of_its_order(questions, monkeypatch):
    answer_always(r"<think>x</think> \boxed{1}", monkeypatch)
    orders = [[(0, 1, 2), (2, 0, 1)]]  # in the second, the right image 3 comes first
    group, = perl.sample_groups(None, PROCESSOR, questions[:1], orders, 2, tiny_config())
    assert [r.order for r in group] == [(0, 1, 2)] * 2 + [(2, 0, 1)] * 2
    assert [r.gold for r in group] == ["3", "3", "1", "1"]
    assert [r.reward for r in group] == pytest.approx([0.1, 0.1, 1.0, 1.0])
    assert group[2].prompt.pictures[0].tokens == 10, "the loss sees the order that was answered"

# ---- Advantages and filter -----------------------------------------------------------------------

ROOT = 3 ** 0.5  # rewards 1, 0, 0, 0: mean 1/4, population std ROOT/4, advantages ROOT, -1/ROOT ..

def test_group_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [1, 0, 1, 0]])
    expected = torch.tensor([[ROOT] + [-1 / ROOT] * 3, [0] * 4, [0] * 4, [1, -1, 1, -1]])
    advantages = perl.group_advantages(rewards)
    assert torch.allclose(advantages, expected, atol=1e-6)
    assert not advantages[1:3].any(), "exactly zero without variance"

def scored_group(accuracies, rewards=None):
    return [Rollout(None, (), "", [5], "", False, accuracy=float(accuracy), reward=float(reward))
            for accuracy, reward in zip(accuracies, rewards or accuracies)]

def test_set_advantages():
    group = scored_group([1, 0, 0, 0])
    perl.set_advantages([group])
    assert [r.advantage for r in group] == pytest.approx([ROOT, -1 / ROOT, -1 / ROOT, -1 / ROOT])
    assert [r.reward for r in group] == [1, 0, 0, 0], "the reward stays the reward"

@table("accuracies, rewards, bounds, expected", [
    ([1, 0, 0, 1], None, (0.1, 0.9), "kept"), ([1] * 9 + [0], None, (0.1, 0.9), "kept"),
    ([1] * 4, None, (0, 1), "all_right"), ([0] * 4, None, (0, 1), "all_wrong"),
    ([1] * 4, [1, 1, 1, 0.9], (0, 1), "kept"),  # the format differs
    ([1] * 4, [1, 1, 1, 0.9], (0.1, 0.9), "all_right"),
    ([0] * 4, [0, 0, 0, 0.1], (0.1, 0.9), "all_wrong"),
    ([1] * 11 + [0], None, (0.1, 0.9), "too_easy"), ([0] * 11 + [1], None, (0.1, 0.9), "too_hard"),
    ([1, 1, 0, 0], [0.1] * 4, (0, 1), "flat")])  # an accuracy weight of 0
def test_verdict(accuracies, rewards, bounds, expected):
    group = scored_group(accuracies, rewards)
    perl.set_advantages([group])
    low, high = bounds
    cfg = tiny_config(filter="online", filter_low=low, filter_high=high)
    assert perl.verdict(group, cfg) == expected
    if bounds == (0, 1):  # what the other filters keep
        assert {perl.verdict(group, tiny_config(filter=f)) for f in ("none", "offline")} == {
            expected}

def test_resample_by_difficulty():
    rng, scores = random.Random(0), [1.0] * 100 + [0.5] * 10
    kept = perl.resample_by_difficulty(scores, [0] * 5 + [50] + [0] * 4 + [50], 40, rng)
    assert Counter(scores[k] for k in kept) == {0.5: 10, 1.0: 20} and len(set(kept)) == 30
    scores = [k / 10 for k in range(11) for _ in range(200)]  # plenty of each: the target is met
    kept = perl.resample_by_difficulty(scores, perl.SCORE_TARGET, 990, rng)
    assert [[round(scores[i] * 10) for i in kept].count(k) for k in range(11)] == [
        120, 110, 110, 120, 150, 170, 60, 50, 40, 30, 30]

def test_an_unknown_filter_does_not_fall_through():
    with pytest.raises(KeyError):
        perl.verdict(scored_group([1, 0]), tiny_config(filter="disagree"))

# ---- Loss (Eq. 6) --------------------------------------------------------------------------------

def loss_of(logprobs, old, ref=None, advantages=(1.0,), mask=None, beta=0.0, denominator=4.0):
    mask = torch.ones(logprobs.shape) if mask is None else torch.tensor(mask)
    return perl.policy_loss(logprobs, old, ref, torch.tensor(advantages), mask, clip_low=0.2,
                            clip_high=0.3, beta=beta, denominator=denominator)

@table("denominator", [4, 8])
def test_clipped_surrogate_by_hand(denominator):
    # ratios 1.5, 0.5 under both signs, clipped to [0.8, 1.3]; min(ratio * A, clipped ratio * A) is
    # A = +2:  2.6 (clipped), 1.0          A = -1:  -1.5, -0.8 (clipped)          sum 1.3
    logprobs = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    loss, stats = loss_of(logprobs, torch.zeros(2, 2), None, (2.0, -1.0), denominator=denominator)
    assert loss.item() == pytest.approx(-1.3 / denominator)
    assert (stats["clipped"], stats["kl"]) == (2, 0)
    loss.backward()  # d(-ratio * A) / d log pi = -A * ratio where not clipped
    assert torch.allclose(logprobs.grad * denominator, torch.tensor([[0, -1.0], [1.5, 0]]))

def test_kl_by_hand():
    # k3 = q - log q - 1, q = pi_ref / pi: 1/2 gives 0.19315, 2 gives 0.30685. d/d log pi = 1 - q
    logprobs = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    reference = torch.tensor([[0.25, 1.0]]).log()
    loss, stats = loss_of(logprobs, logprobs.detach(), reference, (0.0,), beta=0.1)
    assert float(stats["kl"]) == pytest.approx(0.19315 + 0.30685, abs=1e-5)
    assert loss.item() == pytest.approx(0.1 * 0.5 / 4, abs=1e-6)
    loss.backward()
    assert torch.allclose(logprobs.grad, 0.1 / 4 * torch.tensor([[0.5, -1.0]]))

@table("garbage", [1e4, -1e4])
@table("where", [0, 1, 2])  # in the policy, the old policy or the reference
def test_masked_tokens_do_not_matter(garbage, where):
    results = []
    for behind in ([], [0.0], [garbage]):
        rows = [torch.tensor([[value] + (behind if k == where else [0.0] * len(behind))])
                for k, value in enumerate((-1.0, -1.1, -1.3))]
        logprobs = rows[0].requires_grad_()
        loss, stats = loss_of(logprobs, *rows[1:], mask=[[1] + [0] * len(behind)], beta=0.1)
        loss.backward()
        assert not logprobs.grad[0, 1:].any()
        results.append([loss.item(), float(stats["kl"]), logprobs.grad[0, 0].item()])
    assert results[1:] == results[:1] * 2

# ---- Updates -------------------------------------------------------------------------------------

def test_on_policy_gradient_is_minus_advantage_times_that_of_the_logprobs(questions):
    model, cfg, groups = load_tiny(), tiny_config(), written_groups(questions)
    gradient, sums, norm = gradient_of_update(model, groups, cfg)
    rollouts, tokens = sum(groups, []), sum(len(r.ids) for group in groups for r in group)
    logprobs, _ = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    advantages = torch.tensor([r.advantage for r in rollouts])
    (-(advantages[:, None] * logprobs).sum() / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(gradient, expected, atol=1e-6) and sums["tokens"] == tokens
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4) and norm > 1e-3

def test_memory_settings_do_not_change_the_gradient(questions):
    groups, reference, gradients = written_groups(questions), load_tiny(), []
    with torch.no_grad():
        reference.model.language_model.norm.weight.mul_(1.1)  # so that the KL term counts
    for changes in (dict(max_tokens_per_micro_batch=1), dict(max_tokens_per_micro_batch=200), {},
                    dict(share=False), dict(logit_chunk=3), dict(gradient_checkpointing=True)):
        cfg = tiny_config(beta=0.1, **changes)
        gradient, sums, _ = gradient_of_update(load_tiny(**changes), groups, cfg, reference)
        gradients.append(gradient)
    assert sums["kl"] > 0 and all(torch.allclose(gradients[0], g, atol=1e-6) for g in gradients)

def test_nothing_to_learn_from_leaves_the_weights_bit_identical(questions):
    weights, cfg = [], tiny_config(updates_per_step=2)
    for steps in ([], [written_groups(questions)], [written_groups(questions), []]):
        model = load_tiny()  # AdamW with weight decay, and after the first step with momentum
        adamw_updates(model, steps, cfg)
        weights.append(flat_weights(model))
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])

@table("updates, forward_passes", [(1, 1), (2, 3)])
def test_old_logprobs_are_stored_and_used_only_for_several_updates(
        questions, monkeypatch, updates, forward_passes):
    real, calls, groups = perl.response_logprobs, [], written_groups(questions[:2])
    monkeypatch.setattr(perl, "response_logprobs", lambda *a: calls.append(a) or real(*a))
    (sums, _), = adamw_updates(load_tiny(), [groups], tiny_config(updates_per_step=updates))
    assert len(calls) == forward_passes
    assert all((r.old_logprobs is None) == (updates == 1) for r in sum(groups, []))
    assert (sums["clipped"] > 0) == (updates == 2), "the first update moved the second's ratio"

@table("frozen", [True, False])
def test_freeze_vision(questions, frozen):
    model, before = load_tiny(freeze_vision=frozen), load_tiny()
    adamw_updates(model, [written_groups(questions)], tiny_config(freeze_vision=frozen))
    same = [torch.equal(*(flat_weights(getattr(m.model, part)) for m in (model, before)))
            for part in ("visual", "language_model")]
    assert same == [frozen, False]

MIXED, RIGHT, WRONG, EASY = [1, 0, 0, 0], [1] * 4, [0] * 4, [1] * 11 + [0]

def collect(monkeypatch, script, **changes):
    """perl.collect_groups, the groups' accuracies scripted; and the ids it asked for, by round."""
    script, rounds = iter(script), []

    def sample_groups(model, processor, samples, orders, n, cfg):
        rounds.append([s.id for s in samples])
        return [scored_group(next(script)) for _ in samples]
    monkeypatch.setattr(perl, "sample_groups", sample_groups)
    asked = [dataclasses.replace(sample(), id=str(k)) for k in range(20)]
    cfg, rng = tiny_config(questions_per_step=4, **changes), random.Random(0)
    return perl.collect_groups(None, None, asked, [], 1.0, rng, cfg, ACCELERATOR), rounds

def test_idle_decode_slots_are_reported():
    text = PROCESSOR.tokenizer("5").input_ids
    end, pad = PROCESSOR.eos_ids[-1], PROCESSOR.pad_id
    rows = [text + [end, pad, pad], text * 3 + [end], text * 4]  # as one call of generate has them
    prompt = SimpleNamespace(sample=sample())
    rollouts = [perl.make_rollout(row, prompt, (), PROCESSOR) for row in rows]
    assert [(len(r.ids), r.idle, r.truncated) for r in rollouts] == [
        (2, 2, False), (4, 0, False), (4, 0, True)]
    groups = {name: [] for name in perl.VERDICTS} | {"kept": [rollouts]}
    sums = {"tokens": 10.0, "kl": 0.0, "clipped": 0.0}
    assert perl.step_metrics(groups, sums, ACCELERATOR)["idle"] == pytest.approx(2 / 12)

def test_groups_without_variance_are_dropped_and_not_counted(monkeypatch):
    groups, rounds = collect(monkeypatch, [MIXED, RIGHT, WRONG, MIXED])
    assert [len(set(ids)) for ids in rounds] == [4]
    metrics = perl.step_metrics(groups, {"tokens": 8.0, "kl": 2.0, "clipped": 4.0}, ACCELERATOR)
    counts = [metrics[name] for name in ("kept", "dropped", "all_right", "all_wrong")]
    assert counts == [2, 2, 1, 1] and metrics["accuracy"] == 6 / 16, "of all that were sampled"
    assert (metrics["kl"], metrics["clip_fraction"]) == (0.25, 0.5), "of the tokens kept"

def test_online_filter_samples_until_the_batch_is_full(monkeypatch):
    online = dict(filter="online", filter_low=0.1, filter_high=0.9, max_rounds=3)
    script = [MIXED, RIGHT, EASY, MIXED, RIGHT, MIXED, MIXED]
    groups, rounds = collect(monkeypatch, script, **online)
    assert [len(ids) for ids in rounds] == [4, 2, 1] and len(set(sum(rounds, []))) == 7
    assert [len(groups[name]) for name in ("kept", "all_right", "too_easy")] == [4, 2, 1]
    groups, rounds = collect(monkeypatch, [RIGHT] * 99, **online)
    assert not groups["kept"] and len(rounds) == 3, "the round limit"

def test_every_epoch_is_a_fresh_shuffle_of_all_questions():
    pool, rng = [], random.Random(0)
    drawn = sum((perl.draw_questions(pool, 10, 4, rng) for _ in range(5)), [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]

# ---- Sharing: it changes the cost of a step and nothing else -------------------------------------

PLAIN = dict(share=False)

def all_groups(questions, n_permutations, n=3):
    """Made-up rollouts: n of unequal length in each order, with advantages that do not cancel."""
    generator, groups = torch.Generator().manual_seed(n_permutations), []
    for asked in questions:
        pictures, orders = perl.load_pictures(asked, PROCESSOR), perl.all_orders(asked, 24)
        groups.append([])
        for k in range(n_permutations + 1):
            order = orders[k % len(orders)]
            prompt = perl.encode_prompt(perl.permute(asked, order), PROCESSOR, pictures)
            for _ in range(n):
                length = int(torch.randint(1, 9, (), generator=generator))
                ids = torch.randint(20, 500, (length,), generator=generator).tolist()
                groups[-1].append(perl.Rollout(prompt, order, "", ids, "", False))
                groups[-1][-1].advantage = float(torch.randn((), generator=generator))
    return groups

def pictures_encoded(model, monkeypatch):
    """Counts of the vision tower's pictures, by their pixels; grows as the tower runs."""
    real, seen = model.model.visual.forward, Counter()

    def forward(pixels, grid_thw, **others):
        sizes = grid_thw.prod(1).tolist()
        seen.update(float(p.double().sum()) for p in pixels.split(sizes))
        return real(pixels, grid_thw=grid_thw, **others)
    monkeypatch.setattr(model.model.visual, "forward", forward)
    return seen

@table("greedy", [True, False])
@table("n, rollout_batch", [(3, 96), (3, 6), (3, 1), (3, 2), (1, 96), (2, 5)])
def test_the_prompts_keys_and_values_kept_once_give_the_same_tokens(
        questions, greedy, n, rollout_batch):
    """Prompts of three lengths, so rows are padded; images of several sizes; n = 1 to 3."""
    model, answers = load_tiny(), []
    for share in (True, False):
        cfg = tiny_config(share=share, rollout_batch=rollout_batch, max_new_tokens=20)
        orders = [perl.all_orders(asked, 2) for asked in questions]
        torch.manual_seed(0)
        groups = perl.sample_groups(model, PROCESSOR, questions, orders, n, cfg, greedy)
        answers.append([[r.ids for r in group] for group in groups])
    assert answers[0] == answers[1] and [len(group) for group in answers[0]] == [2 * n, 2 * n, n]

def test_logits_of_sampling_agree(questions):
    (_, shared), (_, plain) = (
        sample_and_record(load_tiny(), questions, 3, tiny_config(share=share))
        for share in (True, False))
    assert torch.equal(shared.sequences, plain.sequences) and len(shared.sequences) == 15
    for ours, theirs in zip(shared.logits, plain.logits):
        assert torch.allclose(ours, theirs, atol=1e-5)

def test_the_cache_holds_each_prompt_once(questions):
    model, cfg, caches = load_tiny(), tiny_config(max_new_tokens=5), []
    real = model.generate
    model.generate = lambda **inputs: caches.append(inputs["past_key_values"]) or real(**inputs)
    prompts = [perl.encode_prompt(asked, PROCESSOR) for asked in questions]
    perl.generate(model, PROCESSOR, prompts, 4, cfg, greedy=True)
    longest = max(len(prompt.ids) for prompt in prompts)
    for layer in caches[0].layers:
        assert layer.prompts[0].shape[:3] == (3, 2, longest - 1)    # its last token is each row's
        assert layer.keys.shape[0] == 12 and layer.keys.shape[2] <= 5
        assert layer.get_seq_length() == longest - 1 + layer.keys.shape[2]

def test_the_cache_of_a_bfloat16_model_is_in_bfloat16(questions):
    model, caches = load_tiny(dtype="bf16"), []
    real = model.generate
    model.generate = lambda **inputs: caches.append(inputs["past_key_values"]) or real(**inputs)
    prompts = [perl.encode_prompt(asked, PROCESSOR) for asked in questions]
    perl.generate(model, PROCESSOR, prompts, 1, tiny_config(max_new_tokens=3))
    for layer in caches[0].layers:
        kept = (*layer.prompts, layer.keys, layer.values)
        assert {tensor.dtype for tensor in kept} == {torch.bfloat16}

@table("changes, sampling, training", [
    ({}, 1, 1), (dict(rollout_batch=2, max_tokens_per_micro_batch=100), 2, 4),
    (dict(gradient_checkpointing=True), 1, 1), (dict(freeze_vision=True), 1, 1),
    (dict(updates_per_step=2), 1, 2), (PLAIN, 4, 4)])
def test_how_often_a_picture_is_encoded(questions, monkeypatch, changes, sampling, training):
    model, cfg, orders = load_tiny(**changes), tiny_config(**changes), [(0, 1, 2), (2, 1, 0)]
    seen = pictures_encoded(model, monkeypatch)
    groups = perl.sample_groups(model, PROCESSOR, questions[:1], [orders], 2, cfg)
    assert list(seen.values()) == [sampling] * 3
    seen.clear()
    for rollout, advantage in zip(groups[0], (1.0, 0.5, -0.5, -1.0)):
        rollout.advantage = advantage
    update_at_lr_0(model, groups, cfg)
    assert list(seen.values()) == [training] * 3

def update_at_lr_0(model, groups, cfg):
    settings = dataclasses.replace(cfg, lr=0.0, weight_decay=0.0)
    optimizer = perl.SplitAdamW(model, settings, ACCELERATOR)
    perl.update(model, None, optimizer, PROCESSOR, groups, cfg, ACCELERATOR)

def test_pack_example(questions):
    prompt = dataclasses.replace(perl.encode_prompt(questions[2], PROCESSOR), ids=[1, 1, 1, 1])
    other = dataclasses.replace(prompt)
    a, b, c, d = [perl.Rollout(p, (), "", [5] * length, "", False)
                  for p, length in ((prompt, 2), (prompt, 2), (prompt, 3), (other, 9))]
    nine = tiny_config(max_tokens_per_micro_batch=9)
    assert perl.pack([a, b, c, d], nine) == [[a, b], [c], [d]]
    assert perl.pack([a, d, b], nine) == [[a], [d], [b]], "neighbours only"
    assert perl.pack([a, b], tiny_config(share=False)) == [[a], [b]]
    assert perl.micro_batches([a, b, c, d], nine) == [[d], [a, b], [c]], "longest first"
    assert perl.micro_batches([a, b, c, d], tiny_config(max_tokens_per_micro_batch=26)) == [
        [d, a, b, c]]

def test_the_tree(questions):
    """The figure above encode_images: who sees whom, and where positions begin again."""
    pictures = perl.load_pictures(questions[2], PROCESSOR)
    prompt = perl.encode_prompt(questions[2], PROCESSOR, pictures)
    model, L = load_tiny(), len(prompt.ids)
    inputs, _ = perl.collate([prompt], [[[7, 8], [9, 9]]], model, PROCESSOR, tiny_config())
    assert inputs["attention_mask"] == {"full_attention": [[0, L, 2, 2]]}
    first = inputs["position_ids"][:, 0, L]
    assert torch.equal(inputs["position_ids"][:, 0, L:] - first[:, None],
                       torch.tensor([[0, 1, 0, 1]] * 3))

def test_tree_attention_is_attention_under_the_mask_of_the_tree():
    """Rows of 1 token of padding, a prompt of 3, responses of 2 and 2; and of 4, 1 and 3."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    out = perl.tree_attention(query, key, value, [[1, 3, 2, 2], [0, 4, 1, 3]], scaling=0.3)
    owners = torch.tensor([[-1, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 2, 2, 2]])
    sees = (owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])
    assert sees[0].tril()[7].tolist() == [False] + [True] * 3 + [False] * 2 + [True] * 2
    mask = sees.tril()[:, None] | (owners < 0)[:, None, :, None]  # padding sees anything
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask, scale=0.3)
    kept = owners >= 0
    assert torch.allclose(out[kept], expected.transpose(1, 2)[kept], atol=1e-6)

def test_responses_in_a_row_do_not_see_each_other(questions):
    model, rollouts = load_tiny(), all_groups(questions[:1], 0)[0]
    logprobs, mask = perl.response_logprobs(model, PROCESSOR, rollouts, tiny_config())
    changed = [dataclasses.replace(r, ids=r.ids if k == 1 else r.ids[::-1] + [9])
               for k, r in enumerate(rollouts)][::-1]
    others, _ = perl.response_logprobs(model, PROCESSOR, changed, tiny_config())
    T = len(rollouts[1].ids)
    assert torch.allclose(logprobs[1, :T], others[1, :T], atol=1e-6)

@table("n_permutations", [0, 1, 2, 3])
def test_logprobs_and_every_gradient_equal_those_of_the_plain_path(questions, n_permutations):
    groups, gradients, logprobs = all_groups(questions, n_permutations), [], []
    for changes in ({}, PLAIN, dict(max_tokens_per_micro_batch=90),
                    dict(gradient_checkpointing=True, max_tokens_per_micro_batch=150)):
        model, cfg = load_tiny(**changes), tiny_config(beta=0.0, **changes)
        logprobs.append(perl.response_logprobs(model, PROCESSOR, sum(groups, []), cfg)[0])
        gradients.append(gradient_of_update(model, groups, cfg)[0])
    names = [name for name, w in load_tiny().named_parameters() for _ in range(w.numel())]
    vision = torch.tensor(["visual" in name for name in names])
    assert gradients[1][vision].abs().max() > 1e-4, "the vision tower is trained"
    for ours, gradient in zip(logprobs, gradients):
        assert torch.allclose(ours, logprobs[1], atol=1e-5)
        assert torch.allclose(gradient, gradients[1], atol=1e-6, rtol=1e-4)

class Descent(torch.optim.SGD):
    """Plain descent: AdamW would blow up the rounding of near-zero gradients."""
    def __init__(self, model, lr):
        super().__init__([w for w in model.parameters() if w.requires_grad], lr=lr)

    def step(self):
        super().step()
        self.zero_grad()
        return 0.0

@table("changes", [dict(beta=0.1), dict(beta=0.1, updates_per_step=2), dict(freeze_vision=True)])
def test_updates_equal_those_of_the_plain_path(questions, changes):
    """With a reference model, old log-probabilities, or a frozen tower."""
    weights, sums = [], []
    for share in (True, False):
        cfg = tiny_config(share=share, **changes)
        model, reference = load_tiny(**changes), load_tiny() if cfg.beta else None
        optimizer = Descent(model, lr=0.01)
        sums.append(perl.update(model, reference, optimizer, PROCESSOR, all_groups(questions, 1),
                                cfg, ACCELERATOR))
        weights.append(flat_weights(model))
    assert torch.allclose(*weights, atol=1e-6) and (weights[0] - flat_weights(load_tiny())).any()
    assert sums[0][0] == pytest.approx(sums[1][0], abs=1e-4)

def test_equal_orders_share_one_row(questions):
    orders = perl.draw_orders(questions[0], 1, 0.0, random.Random(0))  # alpha 0: not permuted
    groups = perl.sample_groups(load_tiny(), PROCESSOR, questions[:1], [orders], 3, tiny_config())
    assert [len(row) for row in perl.pack(groups[0], tiny_config())] == [6]

# ---- Memory and machines -------------------------------------------------------------------------

def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]

def backward(model, seed):
    """Some gradient in every weight of the language model, the same for the same seed."""
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=ids).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    for weight in trained(model):  # the vision tower has seen no image
        if weight.grad is None:
            weight.grad = torch.full_like(weight, 1e-3, dtype=torch.float32)

def split_run(steps, accelerator=ACCELERATOR, **changes):
    cfg = tiny_config(**dict(lr=1e-3, weight_decay=0.1, max_grad_norm=0.05) | changes)
    model = perl.load_model("tiny", cfg, CPU)
    optimizer, norms = perl.SplitAdamW(model, cfg, accelerator), []
    for seed in range(steps):
        backward(model, seed)
        norms.append(optimizer.step())
    return model, optimizer, norms

@table("max_grad_norm", [0.05, 1e9])
def test_in_float32_on_one_process_it_is_adamw_bit_for_bit(max_grad_norm):
    model, optimizer, norms = split_run(3, max_grad_norm=max_grad_norm)
    plain, expected = load_tiny(), []
    adamw = torch.optim.AdamW(trained(plain), lr=1e-3, weight_decay=0.1)
    for seed in range(3):
        backward(plain, seed)
        expected.append(float(torch.nn.utils.clip_grad_norm_(trained(plain), max_grad_norm)))
        adamw.step()
        adamw.zero_grad()
    assert norms == expected and min(norms) > 0.05
    assert torch.equal(flat_weights(model), flat_weights(plain))
    for name, master in optimizer.masters.items():
        assert master.data_ptr() == optimizer.weights[name].data_ptr(), "no copy"
    assert all(weight.grad is None for weight in model.parameters())

def test_bfloat16_weights_are_roundings_of_what_adamw_makes_in_float32():
    model, optimizer, norms = split_run(3, dtype="bf16")
    plain, expected = load_tiny(dtype="bf16"), []
    masters = [weight.detach().float() for weight in trained(plain)]
    adamw = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1, fused=True)
    for weight in trained(plain):
        weight.grad_dtype = torch.float32
    for seed in range(3):
        backward(plain, seed)
        expected.append(float(torch.nn.utils.clip_grad_norm_(trained(plain), 0.05)))
        for weight, master in zip(trained(plain), masters):
            master.grad, weight.grad = weight.grad, None
        adamw.step()
        for weight, master in zip(trained(plain), masters):
            weight.data.copy_(master)
    assert norms == expected and {w.dtype for w in model.parameters()} == {torch.bfloat16}
    assert torch.equal(flat_weights(model), flat_weights(plain))
    assert all(map(torch.equal, optimizer.masters.values(), masters))

def test_small_steps_add_up_in_float32():
    """lr 1e-6 is far below bfloat16's spacing, and yet 20 steps move the float32 copies by it."""
    model, optimizer, _ = split_run(0, dtype="bf16", lr=1e-6, weight_decay=0.0)
    name = next(name for name in optimizer.masters if "q_proj.weight" in name)
    before = optimizer.masters[name].clone()
    for _ in range(20):
        backward(model, 0)
        optimizer.step()
    assert 1.5e-5 < (optimizer.masters[name] - before).abs().mean() < 2.1e-5

def test_gradients_are_summed_in_float32():
    weight = split_run(0, dtype="bf16")[0].model.language_model.norm.weight
    for scale in [1.0] + [2.0 ** -9] * 64:  # in bfloat16, 1 + 2 ** -9 is 1
        (weight * scale).sum().backward()
    assert weight.grad.dtype == torch.float32 and torch.all(weight.grad == 1 + 64 / 512)

def test_a_weight_without_gradient_counts_as_one_of_zeros():
    weights = []
    for filled in (True, False):
        model, optimizer, _ = split_run(0)
        backward(model, 0)
        norm = model.model.language_model.norm.weight
        norm.grad = torch.zeros_like(norm) if filled else None
        optimizer.step()
        weights.append(flat_weights(model))
    assert torch.equal(*weights)

def test_owners_share_the_tensors_evenly():
    for world in (2, 3, 8):
        parts = [split_run(0, SimpleNamespace(num_processes=world, process_index=rank))[1]
                 for rank in range(world)]
        sizes = [sum(master.numel() for master in part.masters.values()) for part in parts]
        assert sum(sizes) == sum(weight.numel() for weight in trained(load_tiny()))
        assert max(sizes) <= 1.15 * sum(sizes) / world
        assert all(part.owners == parts[0].owners for part in parts)

@table("dtype", ["float32", "bf16"])
def test_the_optimizers_state_goes_over_to_other_numbers_of_processes(tmp_path, dtype):
    model, optimizer, _ = split_run(2, dtype=dtype)
    states = optimizer.state_dict()
    for rank in (0, 1, 2):  # saved by three, read by two
        owned = split_run(0, SimpleNamespace(num_processes=3, process_index=rank))[1].masters
        torch.save({name: states[name] for name in owned}, tmp_path / f"optimizer-{rank}.pt")
    loaded = {}
    for rank in (0, 1):
        world = SimpleNamespace(num_processes=2, process_index=rank)
        part = split_run(0, world, dtype=dtype)[1]
        part.load(tmp_path)
        loaded |= part.state_dict()
    assert loaded.keys() == states.keys()
    assert all(torch.equal(loaded[n][key], states[n][key]) for n in states for key in states[n])
    resumed, again, _ = split_run(0, dtype=dtype)
    again.load(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")  # nothing of them is mapped still
    for each, its in ((model, optimizer), (resumed, again)):
        backward(each, 5)
        its.step()
    assert torch.equal(flat_weights(model), flat_weights(resumed))
    with pytest.raises(SystemExit, match="lacks the optimizer's state"):
        torch.save({}, tmp_path / "optimizer-0.pt")
        (tmp_path / "optimizer-1.pt").unlink(), (tmp_path / "optimizer-2.pt").unlink()
        again.load(tmp_path)

@table("share", [True, False])
def test_the_gradient_in_bfloat16_points_where_that_in_float32_does(questions, share):
    gradients = []
    for dtype in ("float32", "bf16"):
        cfg = tiny_config(dtype=dtype, share=share)
        model = perl.load_model("tiny", cfg, CPU)
        perl.SplitAdamW(model, cfg, ACCELERATOR)  # sets how gradients are summed
        gradients.append(gradient_of_update(model, written_groups(questions), cfg)[0])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.998

def test_logprobs_of_the_loss_are_those_of_sampling_in_bfloat16(questions):
    """To bfloat16's rounding; the positions must rotate in float32."""
    cfg = tiny_config(dtype="bf16")
    model = perl.load_model("tiny", cfg, CPU)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    rollouts, output = sample_and_record(model, questions, 2, cfg)
    sampled = torch.stack(output.scores, dim=1).float().log_softmax(-1)             # (B, T, V)
    logprobs, _ = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    errors = [row[:len(r.ids)] - scores[torch.arange(len(r.ids)), torch.tensor(r.ids)]
              for r, row, scores in zip(rollouts, logprobs, sampled)]
    assert torch.cat(errors).abs().mean() < 0.02

def test_processes_join_on_a_cpu_too(monkeypatch):
    asked = []
    monkeypatch.setattr(perl.accelerate, "Accelerator", lambda **options: asked.append(options))
    perl.start_processes(perl.Config())
    assert asked[0]["cpu"] is not torch.accelerator.is_available()

def lora_model(**changes):
    """The tiny model with adapters that already do something; these; their config."""
    cfg = tiny_config(lora_rank=4, beta=0.1, **changes)
    model = perl.load_model("tiny", cfg, CPU)
    adapters = perl.add_lora(model, cfg)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    return model, adapters, cfg

@table("dtype", ["float32", "bf16"])
def test_lora_trains_float32_adapters_beside_an_untouched_base(questions, dtype):
    cfg = tiny_config(lora_rank=4, beta=0.1, dtype=dtype)
    model, start = perl.load_model("tiny", cfg, CPU), load_tiny(dtype=dtype)
    adapters = perl.add_lora(model, cfg)
    assert {weight.dtype for weight in trained(model)} == {torch.float32}
    projections = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(projections) == 7 * model.config.text_config.num_hidden_layers
    assert not any("visual" in name for name in projections)
    settings = dataclasses.replace(cfg, lr=1e-2)
    optimizer = perl.SplitAdamW(model, settings, ACCELERATOR)
    first, second = (perl.update(model, adapters, optimizer, PROCESSOR, written_groups(questions),
                                 cfg, ACCELERATOR) for _ in range(2))
    assert first[0]["kl"] == 0 and first[1] > 0, "without training it is the start model, to the bit"
    assert second[0]["kl"] > 0
    assert all(weight.abs().max() > 0 for name, weight in model.named_parameters()
               if "lora_B" in name)
    base = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()
            if ".lora_" not in name}
    assert base.keys() == start.state_dict().keys()
    assert all(torch.equal(weight, base[name]) for name, weight in start.state_dict().items())

def test_without_its_adapters_the_model_is_the_reference(questions):
    """Its log-probabilities, and so the gradient of the KL term, are those of the start model."""
    (model, adapters, cfg), groups = lora_model(), written_groups(questions)
    optimizer = perl.SplitAdamW(model, cfg, ACCELERATOR)
    perl.update(model, adapters, optimizer, PROCESSOR, groups, cfg, ACCELERATOR)
    ours = torch.cat([r.ref_logprobs for r in sum(groups, [])])
    perl.store_logprobs(load_tiny(), PROCESSOR, sum(groups, []), "ref_logprobs", cfg)
    assert torch.equal(ours, torch.cat([r.ref_logprobs for r in sum(groups, [])]))

def test_lora_exports_a_plain_folder(questions, tmp_path):
    model, adapters, cfg = lora_model()
    optimizer = perl.SplitAdamW(model, cfg, ACCELERATOR)
    settings = dataclasses.replace(cfg, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    perl.save_checkpoint(settings, 1, model, adapters, PROCESSOR, optimizer, random.Random(0), [],
                         ACCELERATOR)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items()), "a copy"
    names = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    plain = perl.load_model(str(tmp_path / "run" / "checkpoint-1"), cfg, CPU)
    rollouts = sum(written_groups(questions), [])
    expected, _ = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    logprobs, _ = perl.response_logprobs(plain, PROCESSOR, rollouts, cfg)
    adapters.disable_adapter_layers()
    without, _ = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert (without - expected).abs().max() > 0.1
    assert plain.lm_head.weight is plain.get_input_embeddings().weight, "tied, as before"

# ---- Real checkpoints: laid out as Qwen2.5-VL's repositories are ---------------------------------

TEXT_ONLY = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + "
             "message.content + '<|im_end|>\\n' }}{%- endfor %}")

def edit(path, **changes):
    """Change fields of a JSON file; None takes one out."""
    row = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: x for name, x in row.items() if x is not None}))

@pytest.fixture
def real_layout(tmp_path):
    """The tiny checkpoint with a template for text in tokenizer_config.json and the one for images
    in chat_template.json, which AutoTokenizer does not read; older names and fields."""
    folder = tmp_path / "real"
    shutil.copytree(TINY, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    edit(folder / "tokenizer_config.json", chat_template=TEXT_ONLY)
    edit(folder / "preprocessor_config.json", size=None, min_pixels=784, max_pixels=12845056,
         image_processor_type="Qwen2_5_VLImageProcessor")
    return folder

def test_the_template_for_images_is_found_beside_that_for_text(real_layout, questions, capsys):
    cfg = tiny_config()
    assert AutoTokenizer.from_pretrained(real_layout).chat_template == TEXT_ONLY
    real = perl.load_processor(str(real_layout), cfg)
    ids = [perl.encode_prompt(questions[0], processor).ids for processor in (PROCESSOR, real)]
    assert ids[0] == ids[1]
    text = PROCESSOR.tokenizer.decode(ids[0])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert real.image_processor.size["longest_edge"] == cfg.max_pixels
    assert real.image_processor.size["shortest_edge"] == 784
    assert "ChatML" not in capsys.readouterr().out

@table("left", [None, TEXT_ONLY])
def test_without_a_template_for_images_ours_is_used_and_said(real_layout, questions, left, capsys):
    (real_layout / "chat_template.json").unlink()
    edit(real_layout / "tokenizer_config.json", chat_template=left)
    real = perl.load_processor(str(real_layout), tiny_config())
    ids = [perl.encode_prompt(questions[0], processor).ids for processor in (PROCESSOR, real)]
    assert ids[0] == ids[1]
    assert capsys.readouterr().out.count("has no chat template for images") == 1

def test_a_saved_checkpoint_carries_template_and_weights(real_layout, tmp_path):
    cfg, saved = tiny_config(dtype="bf16"), tmp_path / "saved"
    processor = perl.load_processor(str(real_layout), cfg)
    model = perl.load_model(str(real_layout), cfg, CPU)
    for part in (model, processor.tokenizer, processor.image_processor):
        part.save_pretrained(saved)
    template = processor.tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(saved).chat_template == template
    # What AutoProcessor reads; to make one, it needs torchvision for videos.
    assert Qwen2_5_VLProcessor.get_processor_dict(saved)[0]["chat_template"] == template
    again = perl.load_model(str(saved), cfg, CPU)
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight, "tied"
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)

NORM = "model.norm.weight"

@table("change, kind, name", [
    (lambda weights: weights.pop(NORM), "missing", "language_model.norm.weight"),
    (lambda weights: weights.update({"visual.extra": torch.ones(2)}), "unexpected", "visual.extra"),
    (lambda weights: weights.update({NORM: torch.ones(3)}), "mismatched", "norm.weight")])
def test_a_weight_left_out_or_over_is_refused_by_name(real_layout, change, kind, name):
    path = real_layout / "model.safetensors"
    weights = {key: weight.clone() for key, weight in load_file(path).items()}
    weights = {key.replace("model.language_model.", "model."): w for key, w in weights.items()}
    weights = {key.replace("model.visual.", "visual."): w for key, w in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})  # the names in the real repositories
    perl.load_model(str(real_layout), tiny_config(), CPU)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"{kind} keys such as .*{name}"):
        perl.load_model(str(real_layout), tiny_config(), CPU)

def test_weights_cut_short_or_of_another_kind_end_with_one_sentence(real_layout):
    path = real_layout / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SystemExit, match="could not load"):
        perl.load_model(str(real_layout), tiny_config(), CPU)
    path.rename(real_layout / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="could not load"):
        perl.load_model(str(real_layout), tiny_config(), CPU)

class Hostile:
    """Unpickled, it makes a folder."""
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)

def test_no_pickle_is_run(real_layout, straight, tmp_path):
    flag, out = tmp_path / "executed", tmp_path / "run"
    (real_layout / "model.safetensors").unlink()
    torch.save({NORM: Hostile(flag)}, real_layout / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="could not load"):
        perl.load_model(str(real_layout), tiny_config(), CPU)
    shutil.copytree(straight, out)
    torch.save({"model.norm.weight": Hostile(flag)}, out / "checkpoint-4" / "optimizer-0.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        perl.main(["--resume", str(out)])
    assert not flag.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(real_layout / "pytorch_model.bin", weights_only=True)
    torch.load(real_layout / "pytorch_model.bin", weights_only=False)
    assert flag.exists(), "it would have been"

def test_a_vocabulary_larger_than_the_weights_is_refused(real_layout):
    tokenizer = AutoTokenizer.from_pretrained(real_layout)
    rows = json.loads((real_layout / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer.add_tokens([f"word{k}" for k in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(real_layout)
    with pytest.raises(SystemExit, match="its tokenizer belongs to another model"):
        perl.load_processor(str(real_layout), tiny_config())
    config = json.loads((real_layout / "config.json").read_text())
    edit(real_layout / "config.json", text_config=config["text_config"] | {"vocab_size": rows + 64})
    with pytest.raises(SystemExit, match="mismatched keys such as .*embed_tokens"):
        perl.load_model(str(real_layout), tiny_config(), CPU)

def test_a_tokenizer_of_another_model_is_refused(real_layout):
    config = json.loads((real_layout / "config.json").read_text())
    edit(real_layout / "config.json", image_token_id=config["image_token_id"] + 1)
    with pytest.raises(SystemExit, match="its tokenizer belongs to another model"):
        perl.load_processor(str(real_layout), tiny_config())

# ---- Evaluation ----------------------------------------------------------------------------------

def test_evaluate_by_hand(folder, monkeypatch):
    greedy_calls = answer_always(r"<think>x</think> \boxed{1}", monkeypatch)
    row = dict(images=["a.png", "b.png"], question="<image><image>?")
    rows = [row | dict(id="right in 1 of 2 orders", order_rule="index", answer="1", source="x"),
            row | dict(id="right in its one order", order_rule="never", answer="1", source="y"),
            row | dict(id="wrong in its one order", order_rule="never", answer="2", source="y"),
            GOOD | dict(id="right in 2 of 6 orders", source="x")]
    held_out = perl.load_samples(write_rows(folder / "eval.jsonl", *rows))
    scores = perl.evaluate(None, PROCESSOR, held_out, tiny_config(), ACCELERATOR)
    assert scores["eval_accuracy"] == pytest.approx((1 / 2 + 1 + 0 + 2 / 6) / 4)
    assert (scores["eval_worst"], scores["eval_bias"]) == ((0 + 1 + 0 + 0) / 4, (1 + 0 + 0 + 1) / 4)
    scores = perl.evaluate(None, PROCESSOR, held_out, tiny_config(eval_orders=1), ACCELERATOR)
    assert (scores["eval_accuracy"], scores["eval_bias"]) == (2 / 4, 0), "only the given order"
    assert greedy_calls == [True, True]
    few = perl.evaluate(None, PROCESSOR, held_out, tiny_config(questions_per_step=3, eval_orders=1),
                        ACCELERATOR)
    assert few | {"seconds_eval": 0} == scores | {"seconds_eval": 0} and greedy_calls == [True] * 4, "a batch of questions at a time"

# ---- Whole runs ----------------------------------------------------------------------------------

def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight real questions with four or more images: answered now right, now wrong."""
    target, source = tmp_path_factory.mktemp("digits"), HERE / "data_samples"
    rows = [row for row in read_rows(source / "test.jsonl")
            if len(row["images"]) > 3 and row["order_rule"] != "never"][:8]
    (target / "images").mkdir()
    for name in {name for row in rows for name in row["images"]}:
        shutil.copy(source / name, target / name)
    return write_rows(target / "train.jsonl", *rows)

def arguments(data, out, *more, **changes):
    flags = dict(data=data, eval_data=data, out=out, steps=4, questions_per_step=5,
                 rollouts_per_order=3, max_new_tokens=48, updates_per_step=2, beta=0.01,
                 eval_every=2, eval_questions=2, eval_orders=2, save_every=2, log_every=2,
                 max_tokens_per_micro_batch=500, lr=5e-4) | changes
    return [text for name, value in flags.items()
            for text in ("--" + name.replace("_", "-"), str(value))] + list(more)

def metrics_of(out):
    """metrics.jsonl without what may differ between equal runs: time and memory."""
    return [{name: value for name, value in row.items() if not name.startswith(("seconds", "peak"))}
            for row in read_rows(out / "metrics.jsonl")]

def weights_of(checkpoint):
    return flat_weights(Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint))

def files_of(folder, but="nothing"):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.relative_to(folder).parts[0].startswith(but)}

@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run of four steps, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    perl.main(arguments(data, out))
    return out

def test_run_folder(straight, data):
    names = {"config.json", "perl.py", "metrics.jsonl", "rollouts.jsonl", "held_out.jsonl",
             "checkpoint-4"}
    assert {entry.name for entry in straight.iterdir()} == names
    config = json.loads((straight / "config.json").read_text())
    assert config.keys() == FIELDS.keys() and (config["steps"], config["data"]) == (4, str(data))
    rollouts = read_rows(straight / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == [1] * 6 + [3] * 6, "groups: 2 orders of 3 rollouts"
    assert rollouts[0].keys() >= {"id", "order", "question", "response", "gold", "reward"}
    held_out = {}
    for row in read_rows(straight / "held_out.jsonl"):
        held_out.setdefault(row["step"], []).append((row["id"], row["order"]))
    assert list(held_out) == [0, 2, 4] and held_out[0] == held_out[2] == held_out[4]
    assert len({name for name, _ in held_out[0]}) == config["eval_questions"]

def test_metrics(straight):
    rows = metrics_of(straight)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["eval_bias" in row for row in rows] == [True, False, True, False, True]
    for row in rows[0::2]:
        assert 0 <= row["eval_worst"] <= row["eval_accuracy"] <= 1 and 0 <= row["eval_bias"] <= 1
    assert [row["alpha"] for row in rows[1:]] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    for row in rows[1:]:
        assert row.keys() >= {"step", "accuracy", "format", "reward", "kept", "dropped", "length",
                              "truncated", "kl", "clip_fraction", "grad_norm", "alpha", "lr"}
        assert row["kept"] + row["dropped"] == 5 and row["lr"] == 5e-4
        assert row["reward"] == pytest.approx(0.9 * row["accuracy"] + 0.1 * row["format"])
        shares = [row[name] for name in ("accuracy", "format", "truncated", "clip_fraction")]
        assert all(0 <= share <= 1 for share in shares) and 1 <= row["length"] <= 48
        assert row["kl"] >= 0 and row["grad_norm"] >= 0
    assert any(row["kept"] and row["kl"] > 0 for row in rows[1:]), "something was learned"

def test_checkpoint_is_a_whole_hugging_face_folder(straight):
    checkpoint, text = straight / "checkpoint-4", "<think> 1 is 5 </think> \\boxed{2}"
    assert not torch.equal(weights_of(checkpoint), weights_of(TINY))
    new, old = (AutoTokenizer.from_pretrained(path) for path in (checkpoint, TINY))
    assert new(text).input_ids == old(text).input_ids and new.chat_template == old.chat_template
    assert AutoImageProcessor.from_pretrained(checkpoint).patch_size == 14
    new, old = (GenerationConfig.from_pretrained(path) for path in (checkpoint, TINY))
    assert new.eos_token_id == old.eos_token_id

class Killed(Exception):
    pass

def last_checkpoint(out):
    return perl.newest(perl.parse_config(["--out", str(out)]), "checkpoint-*")

def die(*_):
    raise Killed

def run_with(monkeypatch, name, call, event, argv):
    """perl.main(argv), with `event` happening before the call-th call of perl.`name`."""
    *owners, name = name.split(".")  # of "SplitAdamW.step": the class in perl
    owner = functools.reduce(getattr, owners, perl)
    real, calls = getattr(owner, name), []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: (
            calls.append(args) or len(calls) == call and event() or real(*args, **kwargs)))
        perl.main(argv)

def assert_equal_runs(one, other):
    assert metrics_of(one) == metrics_of(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
    assert torch.equal(weights_of(one / "checkpoint-4"), weights_of(other / "checkpoint-4"))

@table("kill, saved", [(4, 2), (2, None)])
def test_resume_after_a_kill_equals_no_kill(data, straight, tmp_path, monkeypatch, kill, saved):
    """Killed in step 4, it goes on after step 2, the last checkpoint; in step 2, from the start."""
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        run_with(monkeypatch, "update", kill, die, arguments(data, out))
    assert metrics_of(out)[-1]["step"] == kill - 1
    assert last_checkpoint(out) == (out / f"checkpoint-{saved}" if saved else None)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "accu')  # a line torn by the kill
    perl.main(["--resume", str(out)])
    assert_equal_runs(out, straight)

def test_resume_of_a_lora_run_equals_no_kill(data, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    perl.main(arguments(data, whole, lora_rank=4))
    with pytest.raises(Killed):
        run_with(monkeypatch, "update", 4, die, arguments(data, killed, lora_rank=4))
    perl.main(["--resume", str(killed)])
    assert_equal_runs(killed, whole)
    assert json.loads((whole / "config.json").read_text())["lr"] == 5e-4, "as typed"
    assert any(row["kl"] > 0 for row in metrics_of(whole)[1:])

@table("tracker", ["tensorboard", "wandb"])
def test_trackers_take_the_metrics_or_name_what_is_missing(data, tmp_path, monkeypatch, tracker):
    """A tracker that is there gets every row of metrics.jsonl; of one that is not, the package."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, LoggerType
    logged = []

    class Recorder(LOGGER_TYPE_TO_CLASS["tensorboard"]):
        def start(self):
            pass

        def store_init_configuration(self, values):
            logged.append(values)

        def log(self, values, step=None, **_):
            logged.append(values | {"logged at": step})

        def finish(self):
            logged.append("finished")

    out = tmp_path / "run"
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers",
                        lambda: [LoggerType.TENSORBOARD])
    argv = arguments(data, out, report_to=tracker, steps=2)
    if tracker == "wandb":
        with pytest.raises(SystemExit, match="pip install wandb"), pytest.warns(UserWarning):
            perl.main(argv)
        return
    perl.main(argv)
    config, *rows, last = logged
    assert config["report_to"] == "tensorboard" and last == "finished"
    assert rows == [row | {"logged at": row["step"]} for row in read_rows(out / "metrics.jsonl")]

# Where a step may be when the signal comes: a function, and which of its calls; in the middle of
# the run, in the last line in the evaluation and the saving of step 2.
PHASES = dict(draw_questions=3, draw_orders=12, load_pictures=15, encode_prompt=30, generate=5,
              grade=80, set_advantages=3, verdict=11, store_logprobs=3, policy_loss=4,
              step_metrics=3, log_group=2, append_line=13) | {"SplitAdamW.step": 3}
PHASES |= {"evaluate": 2, "save_checkpoint": 1, "shutil.rmtree": 1, "torch.save": 2}

@table("phase", PHASES)
def test_ctrl_c_in_any_phase_of_a_step(data, straight, tmp_path, monkeypatch, phase):
    """It ends the run at once, which goes on from the last checkpoint."""
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit, match="KeyboardInterrupt.*; go on with --resume"):
        run_with(monkeypatch, phase, PHASES[phase], lambda: signal.raise_signal(signal.SIGINT),
                 arguments(data, out))
    assert last_checkpoint(out) in (None, out / "checkpoint-2")
    perl.main(["--resume", str(out)])
    assert_equal_runs(out, straight)

@contextlib.contextmanager
def full_disk(out, room, kind):
    """Little room is left where `out` is: on a small disk, or under a limit of a file's size."""
    if kind == "disk":
        filler = out.parent / "filler"
        left = shutil.disk_usage(out.parent).free - room
        filler.write_bytes(b"x" * left)
        try:
            yield
        finally:
            filler.unlink()
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

def mounted(*argv):
    """Whether it worked: it does not everywhere, and for root only."""
    return subprocess.run(["mount", *map(str, argv)], capture_output=True).returncode == 0

@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", disk):
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)

@table("kind, room, place", [
    ("disk", 10 ** 6, "save_checkpoint"), ("disk", 4 * 10 ** 6, "save_checkpoint"),
    ("disk", 0, "append_line"), ("disk", 0, "log_group"), ("limit", 10 ** 6, "save_checkpoint"),
    ("limit", 0, "append_line"), ("limit", 0, "log_group")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
        data, straight, tmp_path, monkeypatch, request, kind, room, place):
    """In the weights (2 MB), in the optimizer's state (6 MB), in a line of a log."""
    folder = request.getfixturevalue("small_disk") if kind == "disk" else tmp_path
    out, held_out = folder / "run", len(read_rows(straight / "held_out.jsonl")) // 3
    calls = dict(save_checkpoint=2, append_line=16 + 2 * held_out, log_group=6)  # in step 3
    with contextlib.ExitStack() as stack:
        with pytest.raises(SystemExit, match=f"(No space left|File too large).*"
                                             f"--resume {out}"):
            run_with(monkeypatch, place, calls[place], lambda: stack.enter_context(
                full_disk(out, room, kind)), arguments(data, out))
    assert last_checkpoint(out) == out / "checkpoint-2"
    perl.main(["--resume", str(out)])
    assert_equal_runs(out, straight)
    assert not (out / "checkpoint.tmp").exists()

@pytest.fixture
def read_only(tmp_path):
    """Makes a folder read-only, for root too."""
    folders = []

    def make(folder):
        if os.geteuid():
            folder.chmod(0o555)
        elif not (mounted("--bind", folder, folder)
                  and mounted("-o", "remount,ro,bind", folder, folder)):
            pytest.skip("root writes everywhere, and may not mount here")
        folders.append(folder)
    yield make
    for folder in folders:
        if os.geteuid():
            folder.chmod(0o755)
        else:
            subprocess.run(["umount", "-l", folder], check=True)

def test_a_read_only_run_folder(data, straight, tmp_path, read_only):
    out, empty = tmp_path / "run", tmp_path / "empty"
    shutil.copytree(straight, out)
    empty.mkdir()
    for folder in (out, empty):
        read_only(folder)
    before = files_of(out)
    for argv, message in ((["--resume", str(out)], "(Read-only|Permission).*--resume"),
                          (arguments(data, empty / "new"), f"--out {empty}/new is no folder"),
                          (arguments(data, empty), f"--out {empty} is no folder"),
                          (arguments(data, out), f"--out {out} is no folder")):
        with pytest.raises(SystemExit, match=message):
            perl.main(argv)
    assert files_of(out) == before and not list(empty.iterdir())

def run_apart(*argv):
    """perl.py in a process of its own, its output taken."""
    return subprocess.Popen([sys.executable, "-u", str(HERE / "perl.py"), *map(str, argv)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ALONE)

def test_a_second_run_in_the_same_folder_is_refused(data, straight, tmp_path):
    """Whether new or resumed, and without a trace; until the first one ends, however it ends."""
    out = tmp_path / "run"
    first = run_apart(*arguments(data, out, steps=500, eval_every=0))
    for line in first.stdout:
        if line.startswith("step 2/"):
            break
    first.send_signal(signal.SIGSTOP)
    before = files_of(out)
    for argv in (arguments(data, out), arguments(data, out, stage=0), ["--resume", str(out)]):
        with pytest.raises(SystemExit, match=f"{out} .*another run is at work"):
            perl.main(argv)
        assert files_of(out) == before
    perl.main(arguments(data, tmp_path / "another", steps=1, eval_every=0))
    first.kill()
    first.communicate()
    perl.main(arguments(data, out))
    assert (out / "stage1-1" / "metrics.jsonl").exists()
    assert_equal_runs(out, straight)

def test_resume_of_a_finished_run_changes_nothing(straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "again")
    perl.main(["--resume", str(tmp_path / "again")])
    assert "done: " in capsys.readouterr().out
    assert_equal_runs(tmp_path / "again", straight)

def test_resume_refuses_a_changed_setting(straight, tmp_path, capsys):
    for folder, message in ((straight, "max_new_tokens was 48"), (tmp_path, "config.json")):
        with pytest.raises(SystemExit):
            perl.main(["--resume", str(folder), "--steps", "4", "--max-new-tokens", "9"])
        assert message in capsys.readouterr().err
    assert perl.parse_config(["--resume", str(straight), "--steps", "4"]).max_new_tokens == 48
    for content in ('{"model": "ti', "[1]", '{"colour": "red"}'):  # damaged
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit):
            perl.main(["--resume", str(tmp_path)])
        assert "config.json" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="--out"):
            perl.main(["--out", str(tmp_path), "--eval-questions", "1"])

def test_stages_share_a_run_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(perl, "SCORE_TARGET", (1,) * 11)  # keeps some of few questions
    out, short = tmp_path / "run", dict(steps=1, eval_every=0)
    perl.main(arguments(data, out, stage=0, score_keep=1))
    scores = json.loads((out / "scores.json").read_text())
    kept = json.loads((out / "kept.json").read_text())
    assert scores.keys() == {asked.id for asked in perl.load_samples(data)} > set(kept) != set()
    assert all(score * 10 == pytest.approx(round(score * 10)) for score in scores.values())
    before = {"stage0-1": files_of(out)}
    perl.main(arguments(data, out, stage=1, **short))
    assert f"training on {len(kept)} questions" in capsys.readouterr().out
    assert {row["id"] for row in read_rows(out / "rollouts.jsonl")} <= set(kept)
    before["stage1-1"] = files_of(out, but="stage")
    perl.main(arguments(data, out, stage=2, lr=0, **short))
    assert f"from {out / 'stage1-1'}" in capsys.readouterr().out
    assert metrics_of(out)[0]["alpha"] == 0
    trained = weights_of(out / "stage1-1" / "checkpoint-1")
    assert not torch.equal(trained, weights_of(TINY))
    assert torch.equal(weights_of(out / "checkpoint-1"), trained), "stage 1's policy, at lr 0"
    before["stage2-1"] = files_of(out, but="stage")
    perl.main(arguments(data, out, stage=2, lr=0, **short))  # once more
    assert {name: files_of(out / name) for name in before} == before, "moved aside, nothing lost"

def test_stage_0_resumes(data, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(perl, "SCORE_TARGET", (1,) * 11)
    flags = dict(stage=0, score_rollouts=2, questions_per_step=3, score_keep=1)
    perl.main(arguments(data, whole, **flags))
    with pytest.raises(Killed):
        run_with(monkeypatch, "sample_groups", 2, die, arguments(data, out, **flags))
    assert len(json.loads((out / "scores.json").read_text())) == 3
    run_with(monkeypatch, "sample_groups", 3, die, ["--resume", str(out)])  # two batches are left
    for name in ("scores.json", "kept.json"):
        assert (out / name).read_text() == (whole / name).read_text()

def test_stage_0_that_would_keep_nothing_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(perl, "is_correct", lambda text, gold: False)
    monkeypatch.setattr(perl, "SCORE_TARGET", (0, 1))
    with pytest.raises(SystemExit, match="score-keep"):
        perl.main(arguments(data, tmp_path / "run", stage=0))
    assert len(json.loads((tmp_path / "run" / "scores.json").read_text())) == 8

@table("beta, models", [(0.0, 1), (0.1, 2)])
def test_without_kl_no_reference_model_is_loaded(data, tmp_path, monkeypatch, beta, models):
    real, loaded = perl.load_model, []
    monkeypatch.setattr(perl, "load_model", lambda *args: loaded.append(args) or real(*args))
    monkeypatch.setattr(perl, "is_correct", lambda text, gold: False)
    monkeypatch.setattr(perl, "has_format", lambda text: False)  # so there is nothing to learn
    perl.main(arguments(data, tmp_path / "run", beta=beta, steps=2, eval_every=0))
    assert len(loaded) == models
    assert [row["dropped"] for row in metrics_of(tmp_path / "run")] == [5, 5]
    assert torch.equal(weights_of(tmp_path / "run" / "checkpoint-2"), weights_of(TINY))

def test_dry_run_loads_no_model_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(perl, "load_model", die)
    perl.main(arguments(data, tmp_path / "run", "--dry-run"))
    assert "order (0, 1, 2, 3" in capsys.readouterr().out and not (tmp_path / "run").exists()

# ---- Memory plan ---------------------------------------------------------------------------------

def planned(n_processes=1, on_gpu=True, **changes):
    return dry_run.plan_memory(tiny_config(**changes), n_processes, on_gpu)

@table("changes", [{}, dict(dtype="bf16"), dict(freeze_vision=True), dict(lora_rank=4),
                   dict(dtype="bf16", lora_rank=4)])
def test_the_plan_counts_weights_gradients_and_state_to_the_byte(changes):
    cfg = tiny_config(**changes)
    model, plan = perl.load_model("tiny", cfg, CPU), planned(on_gpu=False, **changes)
    if cfg.lora_rank:
        perl.add_lora(model, cfg)
    sizes = [weight.numel() for weight in trained(model)]
    assert plan["trained"] == sum(sizes)
    assert plan["frozen"] == sum(weight.numel() for weight in model.parameters()) - sum(sizes)
    assert plan["weights"] == sum(weight.nbytes for weight in model.parameters())
    optimizer = perl.SplitAdamW(model, cfg, ACCELERATOR)
    for weight in trained(model):
        weight.grad = torch.zeros_like(weight, dtype=torch.float32)
    assert plan["gradients"] == sum(weight.grad.nbytes for weight in trained(model))
    optimizer.step()
    own = {weight.data_ptr() for weight in model.parameters()}  # a float32 weight is its own copy
    state = [value for row in optimizer.state_dict().values() for value in row.values()]
    assert plan["adamw"] == sum(value.nbytes for value in state
                                if value.ndim and value.data_ptr() not in own)

@table("changes, part, factor", [
    (dict(dtype="bf16"), "weights", 2), (dict(dtype="float32"), "weights", 4),
    (dict(optimizer_device="host"), "adamw", 12), (dict(optimizer_device="host"), "host", 12),
    (dict(optimizer_device="gpu"), "host", 0), (dict(optimizer_device="gpu", beta=0.1), "host", 2),
    (dict(beta=0.1), "start_model", 2), (dict(beta=0.1, lora_rank=4), "start_model", 0),
    (dict(n_processes=2), "adamw", 6), ({}, "disk", 14)])
def test_bytes_a_parameter(changes, part, factor):
    assert planned(**changes)[part] == factor * planned()["trained"]

@table("changes, smaller, same", [
    (dict(optimizer_device="host"), ["sampling", "update"], ["weights", "gradients"]),
    (dict(freeze_vision=True), ["gradients", "activations", "update"], ["weights", "kv_cache"]),
    (dict(lora_rank=1), ["gradients", "adamw", "disk", "update"], ["kv_cache", "images_read"]),
    (dict(gradient_checkpointing=True), ["activations", "update"], ["sampling"]),
    (dict(rollout_batch=12), ["kv_cache"], ["update", "images_read"]),
    (dict(max_new_tokens=10), ["kv_cache"], ["weights"]),
    (dict(logit_chunk=10), ["logits_chunk"], ["sampling"])])
def test_what_a_setting_saves(changes, smaller, same):
    before, after = planned(), planned(**changes)
    assert all(after[part] < before[part] for part in smaller)
    assert all(after[part] == before[part] for part in same)

def test_the_plan_of_the_real_sizes_needs_no_weights(tmp_path):
    """The 7B's config.json alone: the paper's settings on one 80 GB GPU, AdamW on the host."""
    text = dict(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                num_hidden_layers=28, intermediate_size=18944, tie_word_embeddings=False,
                rope_parameters=dict(rope_theta=1e6, mrope_section=[16, 24, 24]), layer_types=None)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                  out_hidden_size=3584)
    config = json.loads((TINY / "config.json").read_text()) | dict(tie_word_embeddings=False)
    config["text_config"] |= text
    config["vision_config"] |= vision
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = perl.parse_config(["--model", str(tmp_path), "--optimizer-device", "host"])
    plan = dry_run.plan_memory(cfg, 1, on_gpu=True)
    assert plan["trained"] == 8_292_166_656 and plan["weights"] == 2 * plan["trained"]
    assert 60e9 < plan["update"] < 70e9 and 60e9 < plan["sampling"] < 0.92 * 80e9

def test_without_sharing_each_rollout_has_its_own_prompt_in_the_plan():
    shared, plain = planned(), planned(share=False)
    n = perl.Config.rollouts_per_order
    assert plain["images_read"] == n * shared["images_read"]
    assert shared["kv_cache"] < plain["kv_cache"] < n * shared["kv_cache"]

def test_on_a_gpu_the_dtype_is_resolved_before_anything_loads(monkeypatch):
    """Else KL's start model, which is loaded on the host, would be in float32."""
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    for typed, dtype in (([], "bf16"), (["--dtype", "float32"], "float32")):
        cfg = perl.parse_config(typed)
        assert dry_run.plan(cfg, PROCESSOR, [], gpu) == "gpu" and cfg.dtype == dtype
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e8, 80e9))
    with pytest.raises(SystemExit, match="0.1 are free"):
        dry_run.plan(perl.parse_config([]), PROCESSOR, [], gpu)

def test_where_the_state_lies_and_what_does_not_fit():
    def place(gigabytes, *more):
        flags = ["--dtype", "bf16", "--gpu-gb", str(gigabytes / 0.92), *more]
        return dry_run.plan(perl.parse_config(flags), PROCESSOR, [], ACCELERATOR)

    cfg = perl.parse_config(["--dtype", "bf16", "--optimizer-device", "gpu"])
    plan = dry_run.plan_memory(cfg, 1, on_gpu=True)
    sampling, update, state = (plan[part] / 1e9 for part in ("sampling", "update", "adamw"))
    enough, peak = 1.01 * max(sampling, update), max(sampling, update)
    assert dry_run.plan(perl.parse_config([]), PROCESSOR, [], ACCELERATOR) == "gpu", "the CPU's own memory"
    assert place(enough) == "gpu" and place(peak - state / 2) == "host"
    assert place(enough, "--optimizer-device", "host") == "host", "as asked for"
    for flags in ([peak - state / 2, "--optimizer-device", "gpu"], [peak - 2 * state]):
        with pytest.raises(SystemExit, match="GB in .* --max-tokens-per-micro-batch.* --lora-rank"):
            place(*flags)
    if sampling < update:  # stage 0 makes no update
        assert place(peak - 2 * state, "--stage", "0") == "host"

# ---- Several processes --------------------------------------------------------------------------

TWO_PROCESSES = """
import os, sys, torch
sys.path[:0] = [{here!r}]
import perl
accelerator = perl.start_processes(perl.Config())
import test_perl as t
world, rank = accelerator.num_processes, accelerator.process_index
groups = t.written_groups(perl.load_samples({path!r}))
# Which of the three groups a process has; "empty": all of them on one process.
for case, parts in dict(even=([0, 1], [2]), empty=([0, 1, 2], [])).items():
    mine = sum(parts, []) if world == 1 else parts[rank]
    cfg = t.tiny_config(lr=1e-6, max_grad_norm=0.01)
    model = t.load_tiny()
    optimizer = perl.SplitAdamW(model, cfg, accelerator)
    norms = [perl.update(model, None, optimizer, t.PROCESSOR, [groups[k] for k in mine], cfg,
                         accelerator)[1] for _ in range(3)]
    before = t.flat_weights(model)
    perl.update(model, None, optimizer, t.PROCESSOR, [], cfg, accelerator)  # nothing on any
    assert torch.equal(before, t.flat_weights(model))
    torch.save([norms, before, optimizer.state_dict()], f"{{case}}-{{world}}-{{rank}}.pt")
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
ALONE |= {"OMP_NUM_THREADS": "1"}

def test_two_processes_give_the_numbers_of_one(questions, tmp_path):
    script, start = tmp_path / "two.py", flat_weights(load_tiny())
    path = str(tmp_path / "data" / "three.jsonl")
    script.write_text(TWO_PROCESSES.format(here=str(HERE), path=path))
    for launch in ([sys.executable], TORCHRUN):
        subprocess.run([*launch, script], check=True, timeout=240, cwd=tmp_path, env=ALONE)
    for case in ("even", "empty"):
        norms, weights, states = torch.load(tmp_path / f"{case}-1-0.pt")
        both = [torch.load(tmp_path / f"{case}-2-{rank}.pt") for rank in (0, 1)]
        for other_norms, other_weights, _ in both:
            assert other_norms == pytest.approx(norms, rel=1e-4)
            drift = (other_weights - weights).norm() / (weights - start).norm()
            assert drift < 0.01 and torch.equal(other_weights, both[0][1])
        parts = [both[0][2], both[1][2]]
        assert parts[0].keys() | parts[1].keys() == states.keys()
        sizes = [sum(state["master"].numel() for state in part.values()) for part in parts]
        assert sum(sizes) == len(start) and max(sizes) < 0.52 * len(start)
        for name, state in (parts[0] | parts[1]).items():  # the first moment: mean gradient
            error = (state["exp_avg"] - states[name]["exp_avg"]).norm()
            assert error <= 1e-4 * states[name]["exp_avg"].norm() + 1e-12

def states_of(checkpoint):
    states = {}
    for path in checkpoint.glob("optimizer-*.pt"):
        states |= torch.load(path)
    return states

@table("dtype", ["float32", "bf16"])
def test_runs_of_two_processes_and_their_resume(data, straight, tmp_path, dtype):
    """Four steps at a time; and two, then on: on two processes to the last bit, then on one."""
    flags = dict(questions_per_step=4, eval_questions=3, dtype=dtype)
    def run(launch, *argv):
        result = subprocess.run([*launch, str(HERE / "perl.py"), *map(str, argv)], timeout=240,
                                env=ALONE, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout
    out = run(TORCHRUN, *arguments(data, tmp_path / "whole", **flags))
    assert "2 process(es)" in out and out.count("done: ") == 1
    rows = metrics_of(tmp_path / "whole")
    assert [row.keys() for row in rows] == [row.keys() for row in metrics_of(straight)]
    assert [row["kept"] + row["dropped"] for row in rows[1:]] == [4] * 4
    argv = arguments(data, tmp_path / "first", **flags)
    script = tmp_path / "killed.py"  # ends both processes in step 3
    script.write_text(f"import sys, os; sys.path[:0] = [{str(HERE)!r}]\nimport perl\n"
                      "real, calls = perl.update, []\n"
                      "def update(*args):\n    calls.append(1)\n"
                      "    return os._exit(3) if len(calls) == 3 else real(*args)\n"
                      f"perl.update = update\nperl.main({argv!r})\n")
    assert subprocess.run([*TORCHRUN, script], env=ALONE, timeout=240,
                          capture_output=True).returncode != 0
    assert last_checkpoint(tmp_path / "first") == tmp_path / "first" / "checkpoint-2"
    shutil.copytree(tmp_path / "first", tmp_path / "one")
    run(TORCHRUN, "--resume", tmp_path / "first")
    whole, again = (states_of(tmp_path / name / "checkpoint-4") for name in ("whole", "first"))
    assert whole.keys() == again.keys() and metrics_of(tmp_path / "first") == rows
    assert all(torch.equal(whole[n][k], again[n][k]) for n in whole for k in whole[n])
    run([sys.executable], "--resume", tmp_path / "one")
    one = states_of(tmp_path / "one" / "checkpoint-4")
    assert one.keys() == whole.keys()
    assert len(list((tmp_path / "one" / "checkpoint-4").glob("optimizer-*"))) == 1

# ---- Fuzz: FUZZ=N for N times as many examples, drawn anew each time -----------------------------

FUZZ = int(os.environ.get("FUZZ", 0))

def fuzz(n_examples):
    """Call a test with n_examples draws; the same ones each time, unless FUZZ is set."""
    settings = hypothesis.settings(
        max_examples=n_examples * max(FUZZ, 1), derandomize=not FUZZ, database=None, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck))
    return lambda test: settings(hypothesis.given(st.data())(test))

@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    """Good pictures g0.png .. g4.png of different sizes, and files that are none."""
    outside = tmp_path_factory.mktemp("fuzz")
    folder = outside / "data"
    folder.mkdir()
    for k in range(5):
        noise(28 * (k + 1), 28).save(folder / f"g{k}.png")
    noise().save(outside / "outside.png")
    (folder / "empty.png").touch()
    (folder / "out.png").symlink_to(outside / "outside.png")
    Image.new("RGB", (5000, 10)).save(folder / "strip.png")
    return folder

def load_alone(folder, *lines, most_tokens=120):
    """What a user gets for a file of these lines: the questions kept and how many were dropped, or
    the sentence that the program ends with. Anything else that is raised fails the test."""
    (folder / "fuzz.jsonl").write_bytes(b"\n".join(lines))
    said = []
    try:
        kept = perl.load_questions(str(folder / "fuzz.jsonl"), PROCESSOR, tiny_config(
            max_prompt_tokens=most_tokens), SimpleNamespace(print=said.append))
    except SystemExit as end:
        assert isinstance(end.code, str) and len(end.code) < 2000
        if "none left" not in end.code:
            return None, end.code
        kept = []
    dropped = int(re.search(r"questions, (\d+) dropped", said[0])[1])
    assert f" {len(kept)} questions, " in said[0] and len(kept) + dropped == len(lines)
    return kept, ""

HARMLESS = st.sampled_from([
    "Which?", " like ", "\n", "<image_1>", "<image_01>", "<image", "_1>", "<imagE>", "images",
    "{{x}}", "{% if %}", "<think>", "</think>", "<tool_call>", "<|", "|>", "im_end", "\\boxed{2}",
    "1", "B", "\U0001f600", "'", '"', "\\", "\u202e", "\x1b", "\u2028"]) | st.text(max_size=4)
HARMFUL = st.sampled_from([
    "<image_2>", "<image_3>", "<image_0>", "<image_99>", "<image_\u0662>", "image 2", "Image #1",
    "<image>", "<|im_end|>", "<|image_pad|>", "\0", "\ud83d"])
TEXTS = st.builds(lambda *parts: "".join(sum(parts, [])), st.lists(HARMLESS, max_size=4), st.one_of(
    *[st.just([])] * 7, st.lists(HARMFUL, max_size=1)), st.lists(HARMLESS, max_size=2))
JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner),
                    max_leaves=4)
BAD_PATHS = ["empty.png", "none.png", "out.png", "../outside.png", "strip.png", ".", "", "g0.png\0"]

@st.composite
def rows(draw):
    """A record: half of them as they should be, the others with something wrong in them."""
    n = draw(st.sampled_from([1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 26, 27, 33]))
    images = [f"g{k % 5}.png" for k in draw(st.permutations(range(n)))]
    if draw(st.integers(0, 9)) == 0:
        images[draw(st.integers(0, n - 1))] = draw(st.sampled_from([*images, *BAD_PATHS]))
    places = sorted(draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n)))
    movable = draw(st.sampled_from([None, places]))
    named = list(range(n)) if movable is None else movable
    rule = draw(st.sampled_from(sorted(perl.ORDER_RULES)))
    listed = draw(st.permutations(range(1, n + 1)))[:draw(st.integers(1, 4))]
    answer = {"index": str(listed[0]), "letter": perl.LETTERS[listed[0] % 26 % max(len(named), 1)],
              "sequence": draw(st.sampled_from([",", ", ", " , "])).join(map(str, listed))
              }.get(rule) or "7" + draw(TEXTS)
    pieces = draw(st.permutations(["<image>"] * n + draw(st.lists(TEXTS, max_size=2))))
    row = dict(id=draw(st.sampled_from("vwxyz") | TEXTS.map(lambda text: "q" + text)),
               images=images, question="".join(pieces), answer=answer, order_rule=rule)
    row |= {} if movable is None else {"movable": movable}
    if draw(st.integers(0, 7)) == 0:
        field = draw(st.sampled_from([*Sample.__dataclass_fields__, "extra"]))
        row[field] = draw(JUNK)
        if draw(st.booleans()):
            del row[field]
    return row

@st.composite
def lines(draw):
    """A record as bytes; one in ten is cut short, has a byte changed, or is no object."""
    line = json.dumps(draw(rows()), ensure_ascii=True).encode()
    kind = draw(st.integers(0, 29))
    cut = draw(st.integers(0, len(line)))
    return {0: line[:cut], 1: line[:cut] + draw(st.binary(max_size=3)) + line[cut + 1:],
            2: b"[" + line + b"]"}.get(kind, line).replace(b"\n", b" ").strip() or b"{"

def meaning(images, movable, sample):
    """What a question and its answer say with pictures in the place of their names, read from the
    README's table; nothing of perl.permute is used. Images: a label for each."""
    def picture(number):
        return f"[{images[int(number) - 1]}]"

    question = re.sub(r"<image_(\d+)>", lambda found: picture(found[1]), sample.question)
    answer = sample.answer
    if sample.order_rule == "index":
        answer = picture(answer)
    if sample.order_rule == "sequence":
        answer = [picture(number) for number in answer.split(",")]
    if sample.order_rule == "letter":
        answer = picture(sorted(movable)["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(answer)] + 1)
    if sample.order_rule == "keep":
        assert not re.search(r"\bimages?[\s_#]*\d", answer, re.IGNORECASE)
    return question, answer

def assert_permutations_keep_the_meaning(asked, row, rng):
    n, labels = len(asked.images), [f"picture {k}" for k in range(len(asked.images))]
    movable = list(range(n)) if row.get("movable") is None else row["movable"]
    free = [] if asked.order_rule == "never" else sorted(movable)
    before, answers = meaning(labels, movable, asked), {}
    for _ in range(4):
        order, shuffled = list(range(n)), rng.sample(free, len(free))
        for new, old in zip(free, shuffled):
            order[new] = old
        permuted = perl.permute(asked, tuple(order))
        moved = [labels[old] for old in order]
        assert permuted.images == tuple(asked.images[old] for old in order)
        assert meaning(moved, movable, permuted) == before
        shown = permuted.images, permuted.question  # what the model sees has one answer
        assert answers.setdefault(shown, permuted.answer) == permuted.answer
    for order in perl.draw_orders(asked, 3, 1.0, rng):
        assert all(order[k] == k for k in range(n) if k not in free) and set(order) == {*range(n)}

SEEN = Counter()

@fuzz(100)
def test_fuzz_records(fuzz_folder, data):
    """Each record alone, then all as one file: loaded, dropped and counted, or refused by name."""
    some = data.draw(st.lists(lines(), min_size=2, max_size=5))
    rng = random.Random(data.draw(st.integers(0, 99)))
    ids, fit, first_refused = set(), 0, None
    for number, line in enumerate(some, 1):
        kept, why = load_alone(fuzz_folder, line)
        SEEN["records"] += 1
        SEEN["records refused"] += kept is None
        if kept is None:
            assert re.search(r"fuzz\.jsonl, line 1(, field (?s:.*))?: ", why), why
            first_refused = first_refused or number
            continue
        row = json.loads(line)
        if row["id"] in ids:
            first_refused = first_refused or number
        ids.add(row["id"])
        for asked in kept:
            fit += 1
            assert_permutations_keep_the_meaning(asked, row, rng)
            assert_only_its_own_control_tokens(asked, rng)
    kept, why = load_alone(fuzz_folder, *some)
    if first_refused:
        assert kept is None and f"fuzz.jsonl, line {first_refused}" in why
    else:
        assert len(kept) == fit

def assert_only_its_own_control_tokens(asked, rng):
    """Neither a text nor a new order adds to those of the same images without a text."""
    bare = dataclasses.replace(asked, question="<image>" * len(asked.images))
    permuted = perl.permute(asked, perl.draw_orders(asked, 1, 1.0, rng)[1])
    controls = {*PROCESSOR.tokenizer.all_special_ids, *PROCESSOR.banned_ids, *PROCESSOR.eos_ids}
    counts = []
    for sample in (bare, asked, permuted):
        ids = perl.encode_prompt(sample, PROCESSOR).ids
        assert len(ids) == perl.prompt_length(sample, PROCESSOR)
        counts.append(Counter(token for token in ids if token in controls))
    assert counts[0] == counts[1] == counts[2]

@st.composite
def image_files(draw):
    """(bytes, suffix) of a picture of any mode, size and format; three of four are damaged."""
    suffix, modes = draw(st.sampled_from([
        ("png", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]), ("jpg", ["L", "RGB", "CMYK"]),
        ("webp", ["RGB", "RGBA"]), ("gif", ["1", "L", "P", "RGB"]), ("bmp", ["1", "L", "P", "RGB"]),
        ("tiff", ["F", "I;16", "RGB"])]))
    mode, side = draw(st.sampled_from(modes)), st.integers(1, 90) | st.sampled_from([1, 300, 4000])
    size = draw(side), draw(st.integers(1, 90))
    image = Image.frombytes("L", size, random.Random(draw(st.integers(0, 99))).randbytes(
        size[0] * size[1]))
    image = image.quantize(9) if mode == "P" else image.convert(mode)
    options = {}
    if draw(st.booleans()) and suffix in ("png", "jpg", "webp"):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))
        options["exif"] = draw(st.sampled_from([exif.tobytes(), b"Exif\0\0" + bytes(9), b"x"]))
    if mode == "P" and suffix in ("png", "gif"):
        options["transparency"] = draw(st.integers(0, 8))
    if suffix in ("png", "webp", "gif") and draw(st.integers(0, 4)) == 0:
        options |= dict(save_all=True, append_images=[image])
    file = io.BytesIO()
    try:
        image.save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    except Exception:  # Pillow writes not every mix; what is read is another matter
        return draw(st.binary(max_size=50)), suffix
    content = bytearray(file.getvalue())
    for _ in range(draw(st.sampled_from([0, 1, 1, 3]))):
        place = draw(st.integers(0, len(content)) | st.integers(0, min(60, len(content))))
        length = draw(st.sampled_from([0, 1, 1, 4, len(content)]))
        content[place:place + length] = draw(st.binary(max_size=length and 4))
    return bytes(content), suffix

@fuzz(25)
def test_fuzz_images(fuzz_folder, data):
    """Whatever the bytes: a prompt whose length was foreseen, or a refusal that names the file."""
    content, suffix = data.draw(image_files())
    path = fuzz_folder / f"image.{suffix}"
    path.write_bytes(content)
    row = dict(id="x", images=["g0.png", path.name], question="<image><image>?", answer="2",
               order_rule="index")
    SEEN["images"] += 1
    kept, why = load_alone(fuzz_folder, json.dumps(row).encode(), most_tokens=8192)
    SEEN["images refused"] += kept is None
    if kept is None:
        assert re.search(rf"(line 1|x), field images: .*{path.name}", why), why
    for asked in kept or []:
        prompt = perl.encode_prompt(asked, PROCESSOR)
        assert len(prompt.ids) == perl.prompt_length(asked, PROCESSOR)
        assert all(picture.pixels.isfinite().all() for picture in prompt.pictures)

def test_fuzz_ran():
    """Hypothesis may stop early: so the examples are counted. pytest -s shows them."""
    print(", ".join(f"{n} {what}" for what, n in sorted(SEEN.items())))
    assert SEEN["records"] >= max(250 * FUZZ, 200) and SEEN["images"] >= 25 * max(FUZZ, 1)
    for what in ("records", "images"):
        assert 0.1 < SEEN[f"{what} refused"] / SEEN[what] < 0.9, "both ends are tried"

# ---- The README's forks --------------------------------------------------------------------------

SNIPPETS = [text.split("```")[0] for text in (HERE / "README.md").read_text().split("```python\n")[1:]]

def pair_sample(order_rule="pair"):
    return Sample("s", tuple("abc"), "?", "1-3", order_rule)

def as_loss(ratios, advantages):
    """policy_loss of two rollouts of two tokens each, whose ratios to the old policy are given."""
    rollouts = [Rollout(None, (), "", [5, 5], "", False)] * 2
    loss, _ = perl.policy_loss(
        torch.tensor(ratios).log(), torch.zeros(2, 2), None, torch.tensor(advantages),
        torch.ones(2, 2), clip_low=0.2, clip_high=0.2, beta=0.0,
        denominator=perl.loss_denominator(rollouts))
    return loss.item()

def reward_of_100_tokens():
    rollout = Rollout(None, (), "5", [1] * 100, r"<think>x</think>\boxed{5}", False)
    perl.grade(rollout, tiny_config())
    return rollout.reward

FORKS = {  # what a snippet changes: before and after
    "shorter": (reward_of_100_tokens, 1.0, pytest.approx(0.95)),
    "gspo": (lambda: as_loss([[2.0, 0.5], [1.1, 1.1]], [1.0, 2.0]), None,
             pytest.approx(-(1.0 + 2.2) / 2)),
    "centered": (lambda: perl.group_advantages(torch.tensor([[1.0, 0, 0, 0]]))[0, 0].item(),
                 pytest.approx(ROOT), 0.75),
    "exact zeros": (lambda: perl.group_advantages(torch.full((1, 12), 0.1)).any().item(), False,
                    False),
    "pair": (lambda: [perl.permute(pair_sample(), (2, 0, 1)).answer, perl.same_answer("1-3", "1-3"),
                      perl.same_answer("2-4", "1-3"), perl.same_answer("1/2", "0.5")],
             KeyError, ["2-1", True, False, True]),
    "disagree": (lambda: [perl.verdict(
        [dataclasses.replace(r, order=(k // 2,)) for k, r in enumerate(scored_group(accuracies))],
        tiny_config(filter="disagree")) for accuracies in ([1, 0, 0, 0], [1, 0, 0, 1])],
        KeyError, ["kept", "agree"]),
    "per_order": (lambda: two_orders("advantage"),
                  pytest.approx([ROOT, -1 / ROOT, -1 / ROOT, -1 / ROOT]), [1, -1, 0, 0]),
    "clean": (lambda: two_orders("prompt"), list("ggpp"), list("gggg"))}

def two_orders(field):
    """Of two rollouts each to a prompt as given and a permuted one, the first right."""
    group = [dataclasses.replace(r, order=(k // 2,), prompt="ggpp"[k])
             for k, r in enumerate(scored_group([1, 0, 0, 0]))]
    perl.set_advantages([group])
    return [getattr(r, field) for r in group]

@table("name", FORKS)
def test_the_readmes_forks_do_what_they_say(name, monkeypatch):
    snippet, = [text for text in SNIPPETS if name in text]
    assert len(snippet.strip().split("\n")) <= 10 and snippet.rstrip().endswith("perl.main()")
    value, before, after = FORKS[name]
    if before is KeyError:
        with pytest.raises(KeyError):
            value()
    elif before is not None:
        assert value() == before
    for target in ("grade", "policy_loss", "loss_denominator", "group_advantages", "verdict",
                   "VERDICTS", "set_advantages", "same_answer"):
        monkeypatch.setattr(perl, target, getattr(perl, target))  # put back after the test
    monkeypatch.setattr(perl, "CHOICES", dict(perl.CHOICES))
    monkeypatch.setattr(perl, "ORDER_RULES", dict(perl.ORDER_RULES))
    started = []
    monkeypatch.setattr(perl, "main", lambda: started.append(name))
    exec(snippet, {})
    assert started == [name] and value() == after

def test_a_fork_runs(data, tmp_path, monkeypatch):
    """The filter by disagreement, from the command line on."""
    snippet, = [text for text in SNIPPETS if "disagree" in text]
    for target in ("verdict", "VERDICTS"):
        monkeypatch.setattr(perl, target, getattr(perl, target))
    monkeypatch.setattr(perl, "CHOICES", dict(perl.CHOICES))
    argv = arguments(data, tmp_path / "run", filter="disagree", steps=1, eval_every=0, beta=0)
    monkeypatch.setattr(sys, "argv", ["fork.py", *argv])
    exec(snippet, {})
    row, = metrics_of(tmp_path / "run")
    assert row["kept"] + row["agree"] >= 5 and row["agree"] == row["dropped"]

# ---- Ablation ------------------------------------------------------------------------------------

def test_the_t_interval():
    """Half the width of [1, 2, 3, 4] by hand: 3.182 * 1.29099 / 2; and each quantile cuts off 2.5 %
    of its distribution, integrated by trapezoids."""
    assert ablate.interval([1, 2, 3, 4]) == (2.5, pytest.approx(2.054, abs=1e-3))
    assert ablate.interval([5.0]) == (5.0, math.inf)
    for freedom, quantile in enumerate(ablate.T_QUANTILES, 1):
        constant = math.gamma((freedom + 1) / 2) / (
            math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        t = torch.linspace(-quantile, quantile, 20001, dtype=torch.float64)
        density = constant * (1 + t ** 2 / freedom) ** (-(freedom + 1) / 2)
        assert torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=1e-4)

CODE = 'def f(x):\n    """What."""\n    return x + 1\n'

@table("changed, same", [
    (CODE.replace("return", "# why\n\n    return  "), True), (CODE.replace("What", "Which"), True),
    (CODE.replace('    """What."""\n', ""), True), ('"""Module."""\n' + CODE, True),
    (CODE.replace("+ 1", "+ 2"), False), (CODE + "f(1)\n", False),
    (CODE.replace('"""What."""', 'y = "What."'), False)])
def test_comments_and_docstrings_do_not_change_the_hash_and_code_does(changed, same):
    assert (ablate.code_hash(changed) == ablate.code_hash(CODE)) is same

def test_the_hash_of_an_arm_is_of_its_flags_fork_data_and_what_all_share():
    arm, base = ablate.Arm("title", ("--seed 1",)), "base"
    others = [ablate.arm_hash(arm._replace(**change), base) for change in (
        dict(stages=("--seed 2",)), dict(stages=("--seed 1", "")), dict(share="0.5"),
        dict(share="0.8"), dict(scored=True), dict(fork=ablate.reward_agreement),
        dict(fork=ablate.permute_by_gap))] + [ablate.arm_hash(arm, "other")]
    assert len({ablate.arm_hash(arm, base), *others}) == len(others) + 1
    assert ablate.arm_hash(arm._replace(title="other"), base) == ablate.arm_hash(arm, base)

def test_the_main_arms_run_first_then_the_training_sets_then_the_rest():
    queue = ablate.queue_of(["clean", "grpo-0.5", "perl-0.5", "grpo", "perl"], [3, 4])
    assert queue == [("perl", 3), ("grpo", 3), ("perl", 4), ("grpo", 4),
                     ("perl-0.5", 3), ("grpo-0.5", 3), ("perl-0.5", 4), ("grpo-0.5", 4),
                     ("clean", 3), ("clean", 4)]

def write_run(out, worst, *stages):
    """metrics.jsonl of runs of two steps; `stages`: folders of earlier ones."""
    for folder in (*stages, ""):
        (out / folder).mkdir(parents=True, exist_ok=True)
        step = dict(kept=1, dropped=3, seconds_sample=2.0, seconds_update=1.0)
        evaluation = dict(eval_accuracy=0.75, eval_bias=0.25, places={"1": 1.0, "2": 0.5})
        write_rows(out / folder / "metrics.jsonl",
                   evaluation | dict(step=0, eval_worst=0.25), step | dict(step=1),
                   step | evaluation | dict(step=2, eval_worst=worst))

class Ended:
    """A process of a run that has ended."""
    def __init__(self, status):
        self.status = status

    def poll(self):
        return self.status

    def kill(self):
        pass

@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """run_all on runs that end at once: worst order .5, .6 .. by seed, less .1 for plain GRPO;
    those in `broken` fail. Returns what is called, the runs started, `broken`, and the file."""
    started, broken, path = [], set(), tmp_path / "ablation.jsonl"

    def start(name, seed, scratch):
        started.append((name, seed))
        out = ablate.run_folder(name, seed, scratch)
        scratch.mkdir(exist_ok=True)
        if (name, seed) in broken:
            Path(f"{out}.log").write_text(f"loading\n{HERE}/perl.py: out of memory\n")
            return Ended(1)
        write_run(out, worst=0.5 + seed / 10 - 0.1 * (name == "grpo"))
        (out / "checkpoint-2").mkdir(exist_ok=True)
        return Ended(0)

    monkeypatch.setattr(ablate, "start", start)
    monkeypatch.setattr(ablate, "base_hash", lambda: "now")
    monkeypatch.setattr(ablate.time, "sleep", lambda seconds: None)

    def run_all(names=("perl", "grpo"), seeds=(0, 1, 2)):
        started.clear()
        queue = ablate.queue_of(names, seeds)
        return ablate.run_all(queue, 2, path, tmp_path / "scratch")

    return run_all, started, broken, path

def test_a_finished_run_is_not_run_again_until_its_code_changes(ablation, tmp_path, monkeypatch):
    run_all, started, _, path = ablation
    assert run_all() == 0 and len(started) == 6
    assert not list(tmp_path.glob("scratch/*/checkpoint-*")), "their weights are not kept"
    assert run_all() == 0 and started == []
    assert run_all(seeds=(2, 3)) == 0 and started == [("perl", 3), ("grpo", 3)]
    line = read_rows(path)[0]
    assert line.pop("seconds") >= 0 and line == dict(
        arm="perl", seed=0, hash=ablate.present_hashes()["perl"],
        flags=["--eval-orders 6 --eval-every 20 --eval-every 5"],
        curve=[[0, 0.75, 0.25, 0.25], [2, 0.75, 0.5, 0.25]], places={"1": 1.0, "2": 0.5},
        kept=0.25, training_seconds=6.0)
    monkeypatch.setattr(ablate, "base_hash", lambda: "changed")
    text = ablate.tables(read_rows(path), ablate.present_hashes())
    assert text == "0 runs; 0 failed; 8 lines of other code or data are left out."
    assert run_all(seeds=(0,)) == 0 and started == [("perl", 0), ("grpo", 0)]
    text = ablate.tables(read_rows(path), ablate.present_hashes())
    assert text.startswith("2 runs; 0 failed; 8 lines of other code or data are left out.")

def test_a_failed_run_is_told_and_run_again_and_stops_no_other(ablation):
    run_all, started, broken, path = ablation
    broken.add(("perl", 1))
    assert run_all() == 1 and len(started) == 6
    failed, = [line for line in read_rows(path) if "error" in line]
    assert (failed["arm"], failed["seed"]) == ("perl", 1)
    assert failed["error"] == "status 1: ./perl.py: out of memory", "no path of a machine"
    text = ablate.tables(read_rows(path), ablate.present_hashes())
    assert text.startswith("5 runs; 1 failed;") and "- perl, seed 1 failed: status 1" in text
    broken.clear()
    assert run_all() == 0 and started == [("perl", 1)]
    text = ablate.tables(read_rows(path), ablate.present_hashes())
    assert text.startswith("6 runs; 0 failed; 0 lines")

def test_code_that_changes_during_a_run_makes_it_fail(ablation, monkeypatch):
    run_all, _, _, path = ablation
    changes = itertools.count()
    monkeypatch.setattr(ablate, "base_hash", lambda: f"change {next(changes)}")
    assert run_all(names=("perl",), seeds=(0,)) == 1
    assert read_rows(path)[0]["error"] == "code or data changed during the run"

def test_tables_by_hand(ablation):
    """PeRL's worst order is 50, 60 and 70 %, plain GRPO's .1 less, but for seed 2, which only PeRL
    has: the paired difference is over two seeds and without spread."""
    run_all, _, _, path = ablation
    run_all(seeds=(0, 1))
    run_all(names=("perl",), seeds=(2,))
    text = ablate.tables(read_rows(path), ablate.present_hashes())
    assert ("| PeRL (n_s = 1) | 3 | 75.0 ± 0.0 | 60.0 ± 24.8 | 25.0 ± 0.0 | "
            "+10.0 (+10.0 to +10.0) |  | 25% | 6 |") in text
    assert "| plain GRPO (n_s = 0) | 2 |" in text and "- worse: plain GRPO (n_s = 0)" in text
    assert "| start model |  | 75.0 | 25.0 | 25.0 |" in text
    assert "| PeRL (n_s = 1) | 100.0 | 50.0 |" in text, "by position"
    assert "| 0.95 | 2 | 60.0 ± 24.8 | 45.0 ± 63.5 | +10.0 (+10.0 to +10.0) |" in text, "by skew"

def test_the_picture_is_drawn_and_small(ablation, tmp_path, capsys):
    run_all, _, _, path = ablation
    run_all(names=("perl", "grpo", "grpo-1", "perl-0.5"))
    runs = ablate.by_arm(ablate.finished(read_rows(path), ablate.present_hashes()))
    ablate.draw(runs, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 1500 and picture.getpixel((0, 0))[3] == 0, "round corners"
        assert picture.getpixel((picture.width // 2, 40))[:3] == (255, 255, 255)
    assert (tmp_path / "ablation.png").stat().st_size < 200_000

def test_the_curve_of_several_stages_is_one(tmp_path):
    write_run(tmp_path, 0.5, "stage1-1")
    (tmp_path / "stage0-1").mkdir()
    found = ablate.read_run(tmp_path)
    assert [point[0] for point in found["curve"]] == [0, 2, 4]
    assert (found["kept"], found["training_seconds"]) == (0.25, 12.0)

def answered(text, order=(0, 1)):
    """A rollout of the answer `text` to a question of two images, whose first one is right."""
    asked = perl.permute(sample("index", "1", n=len(order)), order)
    accuracy = float(text == asked.answer)
    return Rollout(perl.Prompt(asked, [1], []), order, asked.answer, [1], rf"\boxed{{{text}}}",
                   truncated=False, accuracy=accuracy, reward=accuracy)

@table("text, order, given", [
    ("1", (0, 1), "1"), ("1", (1, 0), "2"), ("1", (2, 0, 1), "3"), ("3", (2, 0, 1), "2"),
    ("3", (1, 0), None), ("none", (1, 0), "none"), ("", (1, 0), None)])
def test_an_answer_moved_back_to_the_given_order(text, order, given):
    assert ablate.answer_as_given(answered(text, order)) == given

def group_of(*texts, orders=((0, 1), (1, 0))):
    """Answers order by order, as many in each."""
    n = len(texts) // len(orders)
    return [answered(text, orders[k // n]) for k, text in enumerate(texts)]

ONE_ORDER = group_of("1", "1", "1", "1", orders=((0, 1), (0, 1)))

@table("fork, group, rewards", [  # columns: the first answers of both orders, then the second ones
    ("reward_agreement", group_of("1", "1", "2", "1"), [1.9, 1, 1.9, 0]),
    ("reward_agreement", group_of("2", "9", "1", "9"), [0.9, 0, 0.9, 0]),
    ("reward_agreement", ONE_ORDER, [1, 1, 1, 1]),
    ("reward_agree_and_right", group_of("1", "1", "2", "1"), [1.9, 1, 1.9, 0]),
    ("reward_agree_and_right", group_of("2", "1", "1", "2"), [0, 1.9, 0, 1.9]),
    ("reward_agree_and_right", ONE_ORDER, [1, 1, 1, 1])])
def test_rewards_of_later_papers(fork, group, rewards, monkeypatch):
    """Agreement pays whether right or wrong; being right together pays on top; a question in one
    order only has nothing to agree with."""
    monkeypatch.setattr(perl, "set_advantages", perl.set_advantages)
    group = [dataclasses.replace(rollout) for rollout in group]
    getattr(ablate, fork)()
    perl.set_advantages([group])
    assert [rollout.reward for rollout in group] == pytest.approx(rewards)
    assert any(rollout.advantage for rollout in group) == (len(set(rewards)) > 1)

def test_the_forks_of_baseline_and_condition(monkeypatch):
    """Advantages of pooled rewards 1, 0, 0, 0, and of those of each order; then what is learned."""
    monkeypatch.setattr(perl, "set_advantages", perl.set_advantages)
    group = group_of("1", "9", "9", "9")
    for fork, expected in ((None, [ROOT] + [-1 / ROOT] * 3), ("baseline_per_order", [1, -1, 0, 0])):
        if fork:
            getattr(ablate, fork)()
        perl.set_advantages([group])
        assert [rollout.advantage for rollout in group] == pytest.approx(expected)
    assert [rollout.prompt.sample.answer for rollout in group] == ["1", "1", "2", "2"]
    ablate.loss_on_clean_order()
    perl.set_advantages([group])
    assert [rollout.prompt.sample.answer for rollout in group] == ["1"] * 4

def test_permuting_follows_a_questions_own_gap(monkeypatch):
    """Stage 0 asks in two orders; training then permutes by the gap, evaluation as before."""
    answers = {"biased": [1.0, 1, 0, 0], "fair": [1.0, 0, 1, 0], "fixed": [1.0, 0]}
    groups = []
    for name, row in answers.items():
        prompt = perl.Prompt(dataclasses.replace(sample("keep"), id=name), [1], [])
        groups.append([dataclasses.replace(answered("1"), prompt=prompt, accuracy=accuracy)
                       for accuracy in row])
    asked = []
    monkeypatch.setattr(perl, "draw_orders", perl.draw_orders)
    monkeypatch.setattr(perl, "sample_orders", lambda *args: asked.append(args[3:5]) or groups)
    ablate.permute_by_gap()
    for stage in (0, 1):
        perl.sample_orders(None, None, [], 1, 4, tiny_config(stage=stage), ACCELERATOR)
    assert asked == [(2, 2), (1, 4)]
    rng = random.Random(0)
    for name, permuted in (("biased", 40), ("fair", 0), ("fixed", 0), ("held out", 20)):
        asked_for = dataclasses.replace(sample("keep"), id=name)
        drawn = [perl.draw_orders(asked_for, 1, 0.5, rng)[1] != (0, 1, 2) for _ in range(40)]
        assert sum(drawn) == pytest.approx(permuted, abs=9 if name == "held out" else 0)

def test_accuracy_by_the_position_of_the_right_image():
    """The first image is right: in order (1, 0) it stands second. Letters name image 2 and on."""
    letter = sample("letter", "B", movable=(1, 2))
    option = dataclasses.replace(answered("1"), prompt=perl.Prompt(letter, [1], []), gold="B",
                                 accuracy=0.0)
    rollouts = group_of("1", "1", "1", "2") + [option]
    assert ablate.places_of(rollouts) == {"1": 1.0, "2": 0.5, "3": 0.0}

def test_an_arm_runs_with_its_fork_and_notes_positions(tmp_path, monkeypatch, data):
    for target in ("evaluate", "sample_groups", "set_advantages"):
        monkeypatch.setattr(perl, target, getattr(perl, target))  # put back after the test
    short = " ".join(arguments(data, "", steps=1, eval_every=1, beta=0)).replace("--out ", "")
    monkeypatch.setattr(ablate, "EVALUATION", short)
    ablate.run("agree", 100, tmp_path)
    found = ablate.read_run(tmp_path / "agree-seed100")
    assert [point[0] for point in found["curve"]] == [0, 1] and found["places"]

def test_a_training_set_without_a_favoured_place(tmp_path):
    pytest.importorskip("sklearn")
    folder = ablate.training_set("balanced", tmp_path)
    assert (folder / "test.jsonl").read_bytes() == (HERE / "data_samples/test.jsonl").read_bytes()
    answers = [row["answer"] for row in read_rows(folder / "train.jsonl")
               if row["source"] == "largest" and len(row["images"]) == 4]
    assert Counter(answers) == dict.fromkeys("1234", 30)
    assert ablate.training_set("balanced", tmp_path) == folder, "made once"

def section_of(name):
    """The banner above a function of perl.py."""
    before = (HERE / "perl.py").read_text().split(f"\ndef {name}(")[0]
    return re.findall(r"(?m)^# ---- (.*?) -+$", before)[-1]

def test_the_reading_map():
    """README's table from the paper to the code: each name is there, and where an equation is named,
    the function or its section says so; of other places in the paper, one function of the row."""
    readme = (HERE / "README.md").read_text()
    table = readme.partition("| paper | code |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().split("\n")[1:]]
    assert len(rows) >= 9
    fields = {f.name for kind in (Sample, Rollout) for f in dataclasses.fields(kind)}
    for paper, code in rows:
        names = set(re.findall(r"`([A-Za-z_]+)`", code)) - fields
        assert names and names <= vars(perl).keys(), f"{paper}: not all of {code} is in perl.py"
        functions = [name for name in names if isinstance(getattr(perl, name), type(section_of))]
        said = [f"{getattr(perl, name).__doc__} {section_of(name)}" for name in functions]
        for place in re.findall(r"Eq\. [\d-]+|Algorithm 1|A\.[\d.]*\d", paper):
            found = [place in text for text in said]
            assert all(found) if place.startswith("Eq") else any(found), (place, functions)

# ---- Config --------------------------------------------------------------------------------------

def test_every_field_is_read():
    sources = [path.read_text() for path in (HERE / "perl.py", HERE / "eval.py") if path.exists()]
    read = {node.attr for text in sources for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and getattr(node.value, "id", "") == "cfg"}
    assert not FIELDS.keys() - read

def test_help_lists_every_field_with_its_prose(capsys):
    with pytest.raises(SystemExit):
        perl.parse_config(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text and len(field.metadata["help"]) > 10
        assert "".join(field.metadata["help"].split()) in text

def test_epochs_as_typed_count_for_the_tiny_model_too():
    assert perl.parse_config(["--epochs", "1"]).steps == 0 and perl.parse_config([]).steps == 40
    assert perl.parse_config(["--epochs", "1", "--steps", "7"]).steps == 7

def test_lora_takes_a_learning_rate_of_its_own():
    assert perl.parse_config(["--lora-rank", "4"]).lr == pytest.approx(2e-4)
    assert perl.parse_config(["--lora-rank", "4", "--model", "x"]).lr == pytest.approx(1e-5)
    assert perl.parse_config(["--lora-rank", "4", "--lr", "3e-4"]).lr == 3e-4

def test_presets_and_their_precedence():
    presets = [*perl.MODEL_PRESETS.values(), *perl.STAGE_PRESETS.values()]
    assert all(preset.keys() <= FIELDS.keys() for preset in presets)
    assert perl.parse_config(["--model", "Qwen2.5-VL-7B"]).lr == 1e-6, "the paper's"
    assert perl.parse_config(["--model", "tiny"]).lr == perl.MODEL_PRESETS["tiny"]["lr"]
    cfg = perl.parse_config(["--stage", "2", "--filter", "none", "--lr", "0.5", "--no-share"])
    assert (cfg.filter, cfg.lr, cfg.share, cfg.alpha_start) == ("none", 0.5, False, 0.0)

@table("n_permutations, n", [(0, 12), (1, 6), (2, 4), (3, 3)])
def test_the_number_of_permutations_keeps_the_number_of_rollouts(n_permutations, n):
    typed = ["--n-permutations", str(n_permutations)]
    assert perl.parse_config(typed).rollouts_per_order == n
    assert perl.parse_config(typed + ["--rollouts-per-order", "2"]).rollouts_per_order == 2

@table("argv, message", [
    ("--nonsense 1", "--nonsense"), ("--step 3", "--step"), ("--stage 3", "--stage"),
    ("--steps 1.5", "--steps"), ("--lr fast", "--lr"), ("--filter on", "--filter"),
    ("--n-permutations 4", "does not divide"),
    ("--n-permutations -1", "--n-permutations"), ("--steps -1", "--steps"),
    ("--beta nan", "--beta"), ("--micro-batch 0", "--micro-batch"),
    ("--temperature 0", "--temperature"), ("--instruction <|im_end|>", "--instruction"),
    ("--alpha-end -0.5", "--alpha-end"),
    ("--alpha-start 1.5", "--alpha-start")])
def test_bad_flags_end_the_program(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        perl.parse_config(argv.split())
    assert end.value.code == 2 and message in capsys.readouterr().err

@table("flag, value, message", [
    ("--model", "/no/such/model", "could not load '/no/such/model"),
    ("--data", "none.jsonl", "none.jsonl"), ("--data", TINY / "config.json", "config.json, line 1"),
    ("--out", TINY / "config.json", "--out .*config.json is no folder"),
    ("--questions-per-step", 3, "--questions-per-step is not a multiple")])
def test_a_run_that_cannot_start_ends_with_one_sentence(
        data, tmp_path, monkeypatch, flag, value, message):
    if flag == "--questions-per-step":
        monkeypatch.setattr(perl.accelerate.Accelerator, "num_processes", 2)
    with pytest.raises(SystemExit, match=message) as end:
        perl.main(arguments(data, tmp_path / "run") + [flag, str(value)])
    assert "\n" not in str(end.value) and not (tmp_path / "run").exists()

# ---- Option extraction and eval.py --------------------------------------------------------------

OPTION_TEXTS = ["Left image", "Right image", "Both images", "Neither image"]
LATTER = ["the second image", "the third image"]
POINTS = ["Point A", "Point B", "Point C", "Point D"]

# ---- extraction ----------------------------------------------------------------------------------

@pytest.mark.parametrize("response, letter", [
    (r"\boxed{\text{(C)}}", "C"), ("C. Both images", "C"), ("option c.", "C"), ("Both images", "C"),
    ("both images.", "C"), ("(C)", "C"), ("c", "C"), ("**C**", "C"), ('"C"', "C"), ("C)", "C"),
    ("The answer is (C).", "C"), ("Answer: C", "C"), ("The correct option is (C), since", "C"),
    ("The correct answer is:\n\n(C) Both images", "C"), ("C, because both show it", "C"),
    ("not A but C", "C"), ("The answer is not A but C.", "C"), ("It is not (A) but (C).", "C"),
    ("option A looks right, but C fits better", "C"), ("(A) looks right. However, (C) fits.", "C"),
    ("The answer is C because A is not in the picture.", "C"), ("So A is wrong. It is C.", "C"),
    ("<think>A or B?</think>\n\\boxed{C. Both images}", "C"), ("<answer>C", "C"),
    (r"\boxed{A} no, \boxed{C}", "C"), ("The answer is A. No, the answer is C.", "C"),
    ("Neither A nor B is right. C is the best option.", "C"), ("A C", None),
    ("A and C", None), ("(A) and (C)", None), ("A, C", None), ("The answer is A and C.", None),
    (r"\boxed{A, C}", None), (r"\boxed{AC}", None), ("E", None), ("(F)", None),
    (r"\boxed{E}", None), (r"\boxed{92.5}. It is a left image.", None),
    ("The answer is (E).", None), ("<think>the answer is C", None), ("", None), (" \n", None),
    (r"\boxed{}", None), ("Not C.", None), ("None of the above.", None), ("I cannot tell.", None),
    ("(A) Left image\n(B) Right image\n(C) Both images\n(D) Neither image", None),
    ("(A) Left image (B) Right image (C) Both images", None), ("B. cats or C. dogs", None),
    ("(C) Both images. (A) shows one only.", "C"), ("C. a cat and a dog", "C"), ("C</s>", "C"),
    ("Both show it. (C)\n\nWhy the others are wrong:\n* **(A) Left.** It would be the correct "
     "answer if it was red.\n* **(B) Right.** No.", "C"),
    ("(A) Left image\n(B) Right image\n(C) Both images\n(D) Neither image\n\n(C) Both images", "C"),
])
def test_choice_forms(response, letter):
    assert ev.extract_choice(response, OPTION_TEXTS) == letter

@pytest.mark.parametrize("response, options, letter", [
    ("The second image", LATTER, "A"), ("Image 3", LATTER, "B"), ("the 2nd picture", LATTER, "A"),
    ("(B) the second image", LATTER, "B"),  # a letter counts more than words
    ("Therefore, the second image is closer to the first than the third image.", LATTER, "A"),
    ("The first image is Cubism.\n\nTherefore, the second image shares its style.", LATTER, "A"),
    ("Point B, where the child sits, is closer.", POINTS[:2], "B"), ("C is the one.", POINTS, "C"),
    ("B is closer to the camera than A.", ["A is closer", "B is closer"], "B"),
    ("Yes, the cat is under the car.", ["yes", "no"], "A"), ("No", ["yes", "no"], "B"),
    ("There are three people.", ["0", "3", "2", "1"], "B"), (r"\boxed{14}", ["12", "14"], "B"),
    (r"\boxed{145^\circ}", ["35°", "145°"], "B"), (r"\boxed{\frac12}", ["0.25", "0.5"], "B"),
    ("A dog is visible. The correct choice would be D.", POINTS, "D"), ("14", ["14", "14"], "A"),
    ("(B) 5 m", ["(A) 3 m", "(B) 5 m"], "B"), ("5 m", ["(A) 3 m", "(B) 5 m"], "B"),
    ("(A) Point A is the handle.\n(B) Point B is the tip.\n\nThere is no correct answer.", POINTS,
     None),
])
def test_choice_by_option_text(response, options, letter):
    assert ev.extract_choice(response, options) == letter

@table("response, options, letter", [
    ("I cannot see a picture.", list("ABCDE"), None), (r"\boxed{N/A}", POINTS, None),
    ("I can see a cat on a mat.", list("ABCDE"), None), ("A unique shape is shown.", POINTS, None),
    ("It cannot be determined from the images.", POINTS, None),
    ("It cannot be determined.", ["yes", "no", "cannot be determined"], "C"),
    (r"\boxed{\text{None of the choices provided}}", ["1", "None of the choices provided"], "B"),
    ("Box B has the right curve and fits. Box A, on the other hand, is too small.",
     ["box A", "box B"], "B"),
    ("Point A is closer to the camera. Point B is further back.", POINTS[:2], "A"),
    ("Image B shows the colour more accurately. Image A is darker.", ["image A", "image B"], "B"),
    ("The second image is most similar. The third image has other colours.", LATTER, "A"),
    ("In this answer a person is named.", POINTS, None)])
def test_refusals_are_no_letters_and_claims_come_first(response, options, letter):
    assert ev.extract_choice(response, options) == letter

@pytest.mark.parametrize("response, answer", [
    (r"<think>\boxed{1}</think> \boxed{2} \boxed{\frac{1}{3}} \boxed{4", r"\frac{1}{3}"),
    (r"<answer>2</answer> \boxed{3}", "3"), ("<answer>1</answer> <answer>2", "2"),
    ("The answer is (B).", "B"), ("The answer is 1. The answer is 3.5.", "3.5"),
    (r"<think>\boxed{2}", None), ("no idea", None), (r"\boxed{}", None),
])
def test_extract_answer(response, answer):
    assert perl.extract_answer(response) == answer

@pytest.mark.parametrize("answer, gold, same", [
    ("14 cm", "14", True), (r"14\text{ cm}", "14", True), ("5 km/h", "5", True),
    (r"3 \text{ m}^2", "3", True), ("$14", "14", True), ("50%", "50", True), (r"50\%", "50", True),
    ("1,234", "1234", True),
    (r"1{,}234", "1234", True), ("−3", "-3", True), ("x = 14", "14", True), ("+14", "14", True),
    (r"\dfrac{3}{4}", r"\frac34", True), (r"\frac34", "0.75", True), ("3/4", r"\frac{3}{4}", True),
    (r"\{3,1,2\}", r"\{1,2,3\}", True), ("{2,1}", "{1,2}", True), ("(2,1)", "(1,2)", False),
    ("2√3", r"2\sqrt{3}", True), ("6π", r"6\pi", True), ("60°", r"60^{\circ}", True),
    ("14x", "14", False), ("-14", "14", False), ("C. Both", "C", True), ("A and C", "A", False),
    ("not A but C", "C", False), ("9^{9^{9^9}}", "3", False),
])
def test_number_forms(answer, gold, same):
    assert perl.same_answer(answer, gold) == same

# ---- adapters ------------------------------------------------------------------------------------

def place(image):
    return f"{image}.png"

def test_mantis_rows():
    row = {"id": "m1", "question": "Which is <image> brighter?", "images": [0, 1], "answer": "(B)",
           "question_type": "multi-choice", "options": ["(A) First image", "Second image"],
           "data_source": "", "category": ""}
    q = ev.from_mantis(row, 0, place)
    assert q.sample.question == (
        "<image>Which is <image> brighter?\n(A) First image\n(B) Second image")
    assert (q.sample.answer, q.sample.order_rule, q.sample.movable) == ("B", "letter", (0, 1))
    q = ev.from_mantis(row | {"question": "Is the first image brighter?"}, 0, place)
    assert q.sample.order_rule == "never"  # the question names an image
    q = ev.from_mantis(row | {"question_type": "short-answer", "options": [], "answer": "Yes"}, 0,
                       place)
    assert (q.rule, q.sample.answer, q.options) == ("text", "Yes", ())

def test_blink_rows():
    row = {"idx": "val_Jigsaw_1", "question": "", "sub_task": "Jigsaw", "image_1": 1, "image_2": 2,
           "image_3": 3, "image_4": None, "choices": LATTER, "answer": "(B)", "explanation": "",
           "prompt": "Given the first image, is the second image or the third image the missing "
                     "part?\nSelect from the following choices.\n(A) the second image\n(B) the "
                     "third image"}
    q = ev.from_blink(row, 0, place)
    assert q.sample.images == ("1.png", "2.png", "3.png") and q.sample.source == "Jigsaw"
    assert (q.sample.answer, q.sample.movable, q.sample.order_rule) == ("B", (1, 2), "letter")
    assert perl.permute(q.sample, (0, 2, 1)).answer == "A"
    q = ev.from_blink(row | {"choices": ["left", "right"]}, 0, place)
    assert q.sample.order_rule == "never"

def test_mmiu_rows():
    options = "A: the first image\nB: the second image"
    row = {"task": "forensic_detection_blink", "question": "Which is real?", "output": "B",
           "input_image_path": ["./2D-spatial/a/0.jpg", "./2D-spatial/a/1.jpg"],
           "options": options, "context": "Select from the following choices.\n" + options}
    q = ev.from_mmiu(row, 7, place)
    assert q.sample.id == "forensic_detection_blink-7" and q.sample.answer == "B"
    assert q.options == ("the first image", "the second image") and q.sample.movable == (0, 1)
    for missing in (None, "", "G"):  # such a row counts as wrong, as in the official code
        q = ev.from_mmiu(row | {"output": missing}, 7, place)
        assert q.sample.order_rule == "never"
        assert not graded("A", gold=q.sample.answer, options=q.options)["right"]

def test_remi_rows():
    row = {"task": "Clocks", "question": "At <image2> and <image1>, not <image2>?", "label": "35"} \
        | {f"image_{k}": k if k < 4 else None for k in range(1, 7)}
    q = ev.from_remi(row, 3, place)
    assert q.sample.question == "<image>At <image> and <image>, not <image_2>?"
    assert q.sample.images == ("3.png", "2.png", "1.png") and q.rule == "remi Clocks"

@pytest.mark.parametrize("task, answer, label, right", [
    ("Clocks", "45", "35", True), ("Clocks", "46", "35", False), ("Clocks", "ten", "10", False),
    ("GeomShape", "103", "100", True), ("GeomShape", "104", "100", False),
    ("GeomCost", "$97", "100", True), ("EmojiAlgebra", "101", "100", True),
    ("EmojiAlgebra", "102", "100", False), ("EmojiAlgebra", "-100.5", "-100", True),
    ("RefCoco", "3", "1, 3", True), ("RefCoco", "2", "1,3", False), ("FuncRead", "f(x)", "f", True),
    ("IQ", "(b)", "B", True), ("Charts", "45%", "45", True), ("Isomorphism", "Yes", "1", True),
    ("CodeEdit", "x += 1", "x+=1", True),
])
def test_remi_rules(task, answer, label, right):
    assert ev.remi_right(task, answer, label) == right

def test_mv_math_rows():
    row = {"problem_id": 3, "answer": "D", "answer_type": "choice", "input_image": list("abcde"),
           "question": "Which?\n\n<image_1>\nA.\n\n<image_2>\nB.\n\n<image_3>\nC.\n\n<image_4>\n"
                       "D.\n\n<image_5>"}
    q = ev.from_mv_math(row, 0, place)
    assert q.sample.movable == (1, 2, 3, 4) and q.sample.order_rule == "letter"
    text = "<image_1>\n\n<image_2>\nA. 9,14\nB. 9,16\nC. 8,16\nD. 10,14"
    q = ev.from_mv_math(row | {"question": text, "input_image": ["a", "b"]}, 0, place)
    assert q.options == ("9,14", "9,16", "8,16", "10,14") and q.sample.order_rule == "never"
    q = ev.from_mv_math(row | {"answer_type": "multi-step", "answer": "(1) B (3, 5); (2) 7.5."}, 0,
                        place)
    assert q.rule == "parts"

def graded(response, rule="choice", gold="B", options=("x", "y"), **more):
    row = {"id": "q", "k": 0, "order": [0], "orders": 1, "task": "", "rule": rule, "gold": gold,
           "options": list(options), "order_rule": "never", "movable": [0], "response": response,
           "turn": 0, "turns": 1, "truncated": False, "error": ""} | more
    row["answer"], row["right"] = ev.grade_row(row)
    return row

def test_mathvista_rows_and_rules():
    row = {"pid": "1", "question": "", "decoded_image": 0, "choices": ["10", "12", "10"],
           "precision": None, "answer": "12", "question_type": "multi_choice",
           "answer_type": "text", "query": "Hint.\nQuestion: Which?\nChoices:\n(A) 10\n(B) 12",
           "metadata": {"task": "fqa"}}
    q = ev.from_mathvista(row, 0, place)
    assert (q.rule, q.sample.answer, q.sample.images) == ("choice", "B", ("0.png",))
    duplicate = {"gold": "A", "options": ["10", "12", "10"]}
    assert graded("(C)", **duplicate)["right"] and not graded("(B)", **duplicate)["right"]
    free = row | {"question_type": "free_form", "choices": None, "answer": "1.45",
                  "answer_type": "float", "precision": 2.0}
    assert ev.from_mathvista(free, 0, place).rule == "number 2"
    assert ev.from_mathvista(free | {"answer_type": "integer"}, 0, place).rule == "number 0"
    assert graded(r"\boxed{\$1.449}", "number 2", "1.45")["right"]
    assert not graded(r"\boxed{1.46}", "number 2", "1.45")["right"]
    assert graded(r"\boxed{1,400 apples}", "number 0", "1400")["right"]
    assert graded("The answer is 2007 and 2008.", "list", "[2007, 2008]")["right"]
    assert graded("none", "list", "[1]")["answer"] is None

def test_mathverse_and_mathvision_rows():
    row = {"sample_index": "5", "problem_version": "Vision Only", "question": "", "image": 0,
           "question_type": "multi-choice", "answer": "C", "question_for_eval":
           "BC is ()\nChoices:\nA:2\nB:2√{{3}}\nC:√{{3}}\nD:2√{{2}}"}
    q = ev.from_mathverse(row, 0, place)
    assert q.options == ("2", "2√{{3}}", "√{{3}}", "2√{{2}}")
    assert q.sample.source == "Vision Only"
    assert q.sample.question == "<image>Answer the question in the image."
    row = {"id": "21", "question": "Cut out <image1>?\n<image2>", "options": list("ABCDE"),
           "answer": "E", "decoded_image": 0, "subject": "logic", "level": 1}
    q = ev.from_mathvision(row, 0, place)
    assert q.sample.question.startswith("<image>Cut out <image1>?\n<image2>\n(A) A\n")
    assert q.sample.images == ("0.png",)
    assert graded(r"\boxed{E}", options=list("ABCDE"), gold="E")["right"]

def test_multi_step_is_right_only_if_all_parts_are():
    gold = "(1) $a=\\frac{1}{2}$; (2) $(3, 4)$；（3）7.5."
    assert graded(r"\boxed{(1) \frac12 (2) (3,4) (3) 7.5}", "parts", gold)["right"]
    assert graded(r"So \boxed{0.5}, then \boxed{(3,4)}, last \boxed{7.5}", "parts", gold)["right"]
    assert not graded(r"\boxed{(1) \frac12 (2) (3,4) (3) 7}", "parts", gold)["right"]
    assert not graded(r"\boxed{7.5}", "parts", gold)["right"]

def test_place_tags_and_mojibake():
    text = "a <image_2> b <image_1> <image_2> <image_9>"
    assert ev.place_tags(text, ["x", "y"]) == (
        "a <image> b <image> <image_1> ", ["y", "x"])
    q = ev.make_question("q", ["x"], "ï¼ˆ30Â°ï¼‰ <|im_end|> <image><image>", "1", "text")
    assert q.sample.question == "ï¼ˆ30Â°ï¼‰  <image>"
    assert ev.place_tags("[1, 2] <image1>", ["x"])[0] == "[1, 2] <image>"
    assert ev.make_question("q", ["x"], "?", [1, 2], "text").sample.answer == "1, 2"

def encoded(picture, kind):
    picture.save(buffer := io.BytesIO(), kind)
    return {"bytes": buffer.getvalue(), "path": None}

def test_odd_images_are_placed_or_counted_wrong(tmp_path):
    clear, red = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGB", (30, 30), "red")
    odd = [encoded(Image.new("P", (40, 40)), "PNG"), encoded(clear, "PNG"),
           encoded(Image.new("L", (187, 18)), "PNG"), encoded(red, "BMP"),
           encoded(Image.new("CMYK", (9, 9)), "JPEG")]
    paths = [ev.place_image(image, None, tmp_path) for image in odd]
    opened = [perl.read_image(path) for path in paths]
    assert [image.mode for image in opened] == ["RGB"] * 5 and opened[2].size == (187, 18)
    assert opened[1].getpixel((0, 0)) == (255, 255, 255)
    assert opened[3].getpixel((0, 0)) == (255, 0, 0)
    assert not Path(ev.place_image(None, None, tmp_path)).exists()
    junk = ev.place_image({"bytes": b"junk", "path": None}, None, tmp_path)
    bomb = ev.place_image(encoded(Image.new("1", (20000, 10000)), "PNG"), None, tmp_path)
    for path in (junk, bomb, ev.place_image(None, None, tmp_path)):
        q, = ev.plan(ev.make_question("q", [path], "?", "1", "text"), 1, PROCESSOR,
                     SimpleNamespace(max_prompt_tokens=99), SimpleNamespace(
                         temperature=0.0, rotate_options=False))
        assert q.problem.startswith("image: ")
    (tmp_path / "2D-spatial" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "2D-spatial" / "a" / "0.jpg")
    for name in ("./2D-spatial/a/0.jpg", "a/0.jpg"):
        assert Path(ev.place_image(name, tmp_path, tmp_path)).exists()

def write_parquet(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)

def test_rows_come_from_a_local_copy_of_the_hub_files(tmp_path):
    images = [encoded(Image.new("RGB", (30, 30)), "PNG"), {"bytes": b"junk", "path": None}]
    rows = [{"id": str(k), "question": "<image1>?", "options": [], "answer": "3", "subject": "s",
             "decoded_image": images[k % 2]} for k in range(6)]
    (tmp_path / "MathVision" / "data").mkdir(parents=True)
    write_parquet(rows, tmp_path / "MathVision" / "data" / "test-00000-of-00001.parquet")
    args = SimpleNamespace(data_dir=str(tmp_path), out=str(tmp_path / "out"), limit=3)
    questions = ev.load_benchmark("mathvision", args)
    assert [q.sample.id for q in questions] == ["0", "2", "4"]  # evenly spread
    assert Path(questions[0].sample.images[0]).exists()
    with pytest.raises(SystemExit, match="BLINK"):
        ev.load_benchmark("blink", args)

PICTURE = {"bytes": encoded(Image.new("RGB", (30, 30)), "PNG")["bytes"], "path": None}
MV_TEXT = "Which?\n\n<image_1>\n" + "".join(f"{letter}.\n\n<image_{k}>\n"
                                              for k, letter in enumerate("ABCD", 2)) + "\n##"
LAYOUTS = {  # a row of each data set, where its files lie, and what a right answer is
    "mantis-eval": ("mantis_eval/test-0.parquet", "B", {
        "id": "m", "question": "Which <image><image>?", "images": [PICTURE] * 2, "answer": "B",
        "question_type": "multi-choice", "options": ["(A) a cat", "(B) a dog"]}),
    "blink": ("Jigsaw/val-0.parquet", "A", {
        "idx": "b", "prompt": "Which?\n(A) the second image\n(B) the third image", "answer": "(A)",
        "image_1": PICTURE, "image_2": PICTURE, "image_3": PICTURE, "image_4": None,
        "choices": ["the second image", "the third image"], "sub_task": "Jigsaw"}),
    "mmiu": ("all.parquet", "B", {
        "task": "t", "question": "?", "context": "Select.\nA: x\nB: y", "output": "B",
        "options": "A: x\nB: y", "input_image_path": ["./2D-spatial/t/0.png"]}),
    "mathvista": ("data/testmini-0.parquet", "1.449", {
        "pid": "1", "decoded_image": PICTURE, "choices": None, "precision": 2.0, "answer": "1.45",
        "question_type": "free_form", "answer_type": "float", "query": "?",
        "metadata": {"task": "fqa"}}),
    "mathverse": ("testmini.parquet", r"9\pi", {
        "sample_index": "1", "problem_version": "Text Lite", "question": "?", "image": PICTURE,
        "question_type": "free-form", "answer": r"Area $=9 \pi \mathrm{cm}^{2}$",
        "question_for_eval": "?"}),
    "mathvision": ("data/test-0.parquet", "2", {
        "id": "1", "question": "<image1>?", "options": [], "answer": "2", "subject": "s",
        "decoded_image": PICTURE}),
    "remi": ("test.parquet", "40", {
        "task": "Clocks", "question": "<image1>, <image2>?", "label": "35", "image_1": PICTURE,
        "image_2": PICTURE}),
    "mv-math": ("data/MV-MATH.json", "C", {
        "problem_id": 1, "question": MV_TEXT, "answer": "C", "answer_type": "choice",
        "input_image": ["q.png", "a.png", "b.png", "c.png", "d.png"]}),
    "muirbench": ("data/test-0.parquet", "B", {
        "idx": "1-1", "task": "Counting", "question": "<image><image> How many?", "answer": "B",
        "options": ["1", "None of the choices provided"], "image_list": [PICTURE] * 2,
        "image_relation": "", "image_type": "", "counterpart_idx": "1-2"}),
    "medframeqa": ("data/test-0.parquet", "B", {
        "question_id": "1", "question": "What?", "options": ["x", "y", "z"], "correct_answer": "B",
        "image_1": PICTURE, "image_2": PICTURE, "image_3": None})}

@table("name", LAYOUTS)
def test_the_hub_is_asked_for_the_rows_wherever_they_lie(name, tmp_path, monkeypatch):
    """The stand-in for snapshot_download keeps the files that the Hub's own filter lets through."""
    file, _, row = LAYOUTS[name]
    images = "images/deep/q.png" if ev.BENCHMARKS[name].has_paths else ""

    def download(hub, repo_type, allow_patterns):
        assert hub == ev.BENCHMARKS[name].hub and repo_type == "dataset"
        files = [file, images, "README.md", "archive/train-0.parquet", "other.json"]
        kept = set(filter_repo_objects(filter(None, files), allow_patterns=allow_patterns))
        assert kept == set(filter(None, (file, images)))
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith("json"):
            (tmp_path / file).write_text(json.dumps([row]))
        else:
            write_parquet([row], tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    args = SimpleNamespace(data_dir="", out=str(tmp_path / "out"), limit=0)
    assert len(ev.load_benchmark(name, args)) == 1

@table("name", LAYOUTS)
def test_every_adapter_reads_a_local_copy_with_its_zips(name, tmp_path):
    file, answer, row = LAYOUTS[name]
    folder = tmp_path / ev.BENCHMARKS[name].hub.split("/")[1]
    (folder / file).parent.mkdir(parents=True)
    if file.endswith("json"):  # twice: two rows with one id
        (folder / file).write_text(json.dumps([row, row]))
    else:
        write_parquet([row, row], folder / file)
    for image in row.get("input_image_path", []) + row.get("input_image", []):
        inner = "2D-spatial/t" if name == "mmiu" else "images"  # in the zip's own inner folder
        (tmp_path / "zipped" / inner).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30)).save(tmp_path / "zipped" / inner / Path(image).name)
        shutil.make_archive(str(folder / "images"), "zip", tmp_path / "zipped")
    args = SimpleNamespace(data_dir=str(tmp_path), out=str(tmp_path / "out"), limit=0)
    questions = ev.load_benchmark(name, args)
    assert len({q.sample.id for q in questions}) == 2
    for q in questions:
        assert all(Path(image).exists() for image in q.sample.images)
        assert graded(rf"\boxed{{{answer}}}", q.rule, q.sample.answer, q.options)["right"]
        assert not graded(r"\boxed{D}", q.rule, q.sample.answer, q.options)["right"]
        assert q.sample.order_rule == ("letter" if name in ("blink", "mv-math") else "never")

def test_option_images_are_no_duplicates():
    q = ev.from_mv_math(LAYOUTS["mv-math"][2], 0, place)
    assert q.sample.movable == (1, 2, 3, 4) and q.options == ("",) * 4
    right = {letter for letter in "ABCD"
             if graded(rf"\boxed{{{letter}}}", gold="C", options=q.options)["right"]}
    assert right == {"C"}
    worst = [graded("A", gold=ev.permute(q.sample, order).answer, options=q.options)["right"]
             for order in ev.all_orders(q.sample, 24)]
    assert any(worst) and not all(worst), "who always says A is right in some orders only"
    for text in ("A: one\nB: two\n\nWhich is right?\nA. A only\nB. B only\nC. none\nD. both",
                 "?\nA. A only\nB. B only\nC. none\nD. both\n\nPage 7 of 67"):
        row = LAYOUTS["mv-math"][2] | {"question": text, "input_image": []}
        assert ev.from_mv_math(row, 0, place).options == ("A only", "B only", "none", "both")

@table("gold, options, right, wrong", [
    ("(C)", "xyz", ["C", "z"], ["A", "B"]), ("False", ["True", "False"], ["B", "False"], ["A"]),
    (r"090^\circ T", [r"180^\circ T", r"090^\circ T"], ["B"], ["A"]),
    ("C\nD", "wxyz", ["C, D", "D and C"], ["C", "A, C, D"])])
def test_golds_of_mathverse(gold, options, right, wrong):
    text = "?\nChoices:" + "".join(f"\n{letter}:{o}" for letter, o in zip("ABCD", options))
    row = LAYOUTS["mathverse"][2] | {"question_type": "multi-choice", "answer": gold,
                                     "question_for_eval": text}
    q = ev.from_mathverse(row, 0, place)
    for answers, verdict in ((right, True), (wrong, False)):
        for answer in answers:
            row = graded(rf"\boxed{{{answer}}}", q.rule, q.sample.answer, q.options)
            assert row["right"] is verdict, answer

@table("gold, right, wrong", [
    (r"Area $=9 \pi \mathrm{cm}^{2}$", [r"9\pi", r"A = 9 \pi \text{ cm}^2"],
     [r"-9\pi", r"9\pi+1", r"90\pi", r"900\pi \text{ mm}^2", r"9\pi \text{ cm}^3"]),
    ("4.4 m", ["4.4", "4.4 m"], ["-4.4", "5.4", "44", "440 cm", "4.4 cm"]), ("212°T", ["212", "212°"], ["221"]),
    (r"\frac{1225\pi }{2} \text { units }^2", [r"\frac{1225\pi}{2}"], [r"1225\pi"]),
    ("slope =-4", ["-4"], ["4"]), ("$5=s$", ["5", "s=5"], ["4"]), ("$x=0$", ["x=0", "0"], ["y=0"]),
    ("118掳T", ["118"], ["118.5"]), ("2191.7 metres", ["2191.7"], ["2.1917"]),
    (r"\frac{25}{2} \text{ units}", ["12.5"], ["12"]), ("$y_2=(x+2)^3$", ["(x+2)^3"], ["y_3=(x+2)^3"]),
    (r"Surface Area $=603.186$ units $^{2}$", ["603.186", r"SA $=603.186$ units $^{2}$"],
     [r"Surface Area $=604.186$ units $^{2}$", r"Surface Area $=-603.186$ units $^{2}$"]),
    ("Center $=(20,10)$", ["(20,10)", "Center $=(20,10)$"], ["Center $=(21,10)$"]),
    (r"$2 \angle O=\angle C-\angle A$", [r"2\angle O = \angle C-\angle A"],
     [r"$3 \angle O=\angle C-\angle A$"]),
    ("$y_2=(x+2)^3=y_1(x+2)$", ["y_2=(x+2)^3=y_1(x+2)"],
     ["y_2=(x+3)^3=y_1(x+2)", "y_-2=(x+2)^3=y_1(x+2)", "y_2=(x+2)^{-3}=y_1(x+2)"]),
    ("$1+3+5+7=4^{2}$", ["1+3+5+7=4^2"], ["2+3+5+7=4^2"]),
    (r"\[g(x)=(x + 4)^2 - 5\].", ["(x+4)^2-5"], [r"(x + 5)^2 - 5\]."]),
    ("domain: [-4, 0) and range: (-3, 1]", ["Domain: [-4, 0), range: (-3, 1]"],
     [f"domain: {first} and range: (-3, 1]" for first in ("[-5, 0)", "[4, 0)", "[-40, 0)")]),
    (r"\text { local maximum: }(-3,60) \text {, local minimum: }(3, -60)",
     ["(-3,60) (3, -60)"], ["(-4,60) (3, -60)"])])
def test_left_side_and_unit_are_optional(gold, right, wrong):
    for answers, verdict in ((right, True), (wrong, False)):
        for answer in answers:
            assert ev.same_value(answer, gold) is verdict, answer

def test_multi_step_answers_in_three_ways():
    gold = "(1)(1) $3$, (2) $(1,2)$\n\n(2) 40 or 50"
    for response in (r"\boxed{(1)(1) 3, (2) (1,2) (2) 40 or 50}",
                     r"\boxed{3}, \boxed{(1,2)}, \boxed{40 or 50}", r"\boxed{3, (1,2), 40 or 50}"):
        assert graded(response, "parts", gold)["right"], response
    for response in (r"\boxed{3, (1,2), 40}", r"\boxed{3, (2,1), 40 or 50}", r"\boxed{3, (1,2)}",
                     r"<think>\boxed{3} \boxed{(1,2)}</think> \boxed{40 or 50}"):
        assert not graded(response, "parts", gold)["right"], response

# ---- rotations, samples --------------------------------------------------------------------------

def test_rotate_moves_texts_and_the_right_letter():
    row = {"id": "m", "question": "Which?", "images": [1], "answer": "A", "options": ["x", "y", "z"],
           "question_type": "multi-choice"}
    q = ev.from_mantis(row, 0, place)
    turned = [q] + [ev.rotate(q, turn) for turn in (1, 2)]
    assert [t.sample.answer for t in turned] == ["A", "C", "B"]
    assert turned[1].sample.question == "<image>Which?\n(A) y\n(B) z\n(C) x"
    assert all(t.options["ABC".index(t.sample.answer)] == "x" for t in turned)
    unlisted = q._replace(sample=dataclasses.replace(q.sample, question="<image>Which?"))
    assert ev.rotate(unlisted, 1) is None

def test_rotations_and_the_same_order_control_are_asked_and_kept_apart(tmp_path, monkeypatch):
    blink = LAYOUTS["blink"][2]
    rows = [blink | {"idx": "same"}, blink | {
        "idx": "words", "choices": ["cat", "dog", "cow"], "answer": "(B)",
        "prompt": "Which?\n(A) cat\n(B) dog\n(C) cow"}]
    write_parquet(rows, tmp_path / "BLINK" / "Jigsaw" / "val-0.parquet")
    asked = []

    def answer(model, processor, samples, orders, n, cfg, greedy):
        asked.extend(order for its_orders in orders for order in its_orders)
        assert not greedy and cfg.temperature == 0.5
        return [[SimpleNamespace(text=r"\boxed{B}", truncated=False) for _ in its_orders]
                for its_orders in orders]

    monkeypatch.setattr(ev, "sample_groups", answer)
    ev.main(["--benchmarks", "blink", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"),
             "--orders", "2", "--temperature", "0.5", "--rotate-options"])
    r = json.loads((tmp_path / "out" / "tiny" / "blink" / "results.json").read_text())
    # Two orders and as many times the given one, a rotation; three rotations in one order.
    assert len(asked) == 4 + 1 + 3
    assert (r["score"], r["n"], r["all rotations"]["value"], r["all rotations"]["n"]) == (
        0.5, 2, 0, 2)
    assert (r["orders"]["bias"]["value"], r["orders"]["bias"]["n"]) == (1, 1)
    assert (r["orders"]["flip"]["value"], r["orders"]["control"]["value"]) == (1, 0)

# ---- step cost -----------------------------------------------------------------------------------

SMALL_STEP = [3, 6, 10]  # images, tokens of each, other tokens

def step_flags(images, image_tokens, text_tokens, new_tokens):
    return ["--step-cost", f"--benchmark-images={images}", f"--max-new-tokens={new_tokens}",
            f"--benchmark-image-tokens={image_tokens}", f"--benchmark-text-tokens={text_tokens}"]

def step_config(**changes):
    return dataclasses.replace(perl.parse_config([]), beta=0.0, max_new_tokens=5,
                               max_tokens_per_micro_batch=16384, **changes)

@table("changes", [{}, PLAIN, dict(n_permutations=2, rollouts_per_order=2),
                   dict(max_tokens_per_micro_batch=50)])
def test_flops_by_arithmetic_are_those_of_a_whole_step(changes):
    """The parts that --step-cost prints add up to what torch counts in sampling and an update."""
    cfg, model = dataclasses.replace(step_config(), **changes), load_tiny()
    endless = dataclasses.replace(PROCESSOR, banned_ids=PROCESSOR.banned_ids + PROCESSOR.eos_ids)
    rollouts = ev.full_rollouts(cfg, SMALL_STEP, model.config.vision_config, 40,
                                PROCESSOR.image_id)
    prompts = [r.prompt for r in rollouts[::cfg.rollouts_per_order]]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        perl.generate(model, endless, prompts, cfg.rollouts_per_order, cfg)
        update_at_lr_0(model, [rollouts], cfg)
    flops, _ = ev.count_flops(model.config, cfg, SMALL_STEP)
    assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-3)

def test_flops_at_the_size_of_the_7b():
    def count(**changes):
        return ev.count_flops(ev.QWEN_7B, dataclasses.replace(cfg, **changes), shape)
    cfg = dataclasses.replace(step_config(), max_new_tokens=256)
    shape = [4, 256, 64]
    (shared, minimum), (plain, _) = count(), count(share=False)
    total = sum(shared.values())
    assert total <= 0.30 * sum(plain.values()) and total <= 1.15 * sum(minimum.values())
    assert all(0.95 < minimum[part] / shared[part] < 1.001 for part in minimum)
    fewer, permuted = count(rollouts_per_order=2)[0], count(n_permutations=3)[0]
    assert fewer["prefill"] == shared["prefill"] and permuted["prefill"] == 2 * shared["prefill"]
    assert fewer["vision"] == permuted["vision"] == shared["vision"]

def test_step_cost_prints_an_object(capfd, monkeypatch):
    monkeypatch.setattr(ev, "time_apart", ev.time_step)
    ev.main(step_flags(2, 4, 9, 4) + ["--n-permutations", "2"])
    row = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert {"flops_shared", "flops_plain", "flops_minimum", "seconds_shared", "seconds_plain",
            "peak_mb_shared", "peak_mb_plain", "flops_minimum_vision", "seconds_plain_update",
            "flops_shared_decode"} <= set(row) and min(row.values()) > 0

@table("flags, message", [
    (step_flags(0, 4, 9, 4), "more text tokens than images"),
    (step_flags(4, 4, 4, 4), "more text tokens than images"),
    (step_flags(1, -4, 9, 4), "more text tokens than images"),
    (step_flags("many", 4, 9, 4), "--benchmark-images: invalid int value: 'many'"),
    (step_flags(1, 4, 9, 1), "--max-new-tokens"),
    (["--step-cost", "--n-permutations", "4"], "does not divide"), (["--nonsense"], "--nonsense")])
def test_a_step_that_cannot_be_measured_ends_with_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        ev.main(flags)
    assert message in f"{end.value} {capsys.readouterr().err}"

def test_ctrl_c_during_the_step_cost_is_one_sentence():
    process = subprocess.Popen([sys.executable, str(HERE / "eval.py"), *step_flags(2, 4, 9, 4)],
                               stderr=subprocess.PIPE, text=True, bufsize=1)
    signal.alarm(60)
    assert "time" in process.stderr.read(20), "the bar is there: the first step is being timed"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 1 and "interrupted; run the same command again" in err
    assert "Traceback" not in err

# ---- measures ------------------------------------------------------------------------------------

def test_average_and_bootstrap():
    values = {"a": [1, 1, 0, 0], "b": [1]}
    assert ev.average(values) == 0.6 and ev.average(values, "tasks") == 0.75
    assert ev.bootstrap({"": [1, 1, 1]}) == [1, 1] and ev.bootstrap(values) == ev.bootstrap(values)
    low, high = ev.bootstrap({"": [0, 1] * 50})  # 1.96 * sqrt(.25 / 100) = .098
    assert abs(low - 0.402) < 0.02 and abs(high - 0.598) < 0.02
    assert ev.bootstrap({"a": [0, 0], "b": [1, 1]}, "tasks") == [0.5, 0.5]  # tasks are not redrawn

def group(answers, golds, orders, rule="index", n_orders=None, movable=None):
    rows = []
    for k, (answer, gold, order) in enumerate(zip(answers, golds, orders)):
        row = graded("" if answer is None else rf"\boxed{{{answer}}}", "text", gold, k=k,
                     order=list(order), orders=n_orders or len(orders), order_rule=rule,
                     movable=movable or [*range(len(order))])
        rows.append(row)
    return rows

def test_order_measures():
    swaps = [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)]
    right = group("2132", "2132", swaps)                # image 2 of the given order, found anywhere
    wrong = group("1213", "2132", swaps)                # always the same wrong picture
    first = group("1111", "2132", swaps)                # always says "first": right once
    unread = group([None] * 4, "2132", swaps)
    m = ev.order_measures([right, wrong, first, unread])
    assert m["bias"]["n"] == 4
    values = {name: share["value"] for name, share in m.items() if name != "by position"}
    assert values == {"mean": (1 + 0 + 0.25 + 0) / 4, "worst": 0.25, "best": 0.5, "bias": 0.25,
                      "same choice": 0.5, "flip": 0.25, "unread": 0.25, "first - last": 0.25,
                      "rstd": pytest.approx(0.117851)}
    assert {place: (p["value"], p["n"]) for place, p in m["by position"].items()} == {
        "1": (0.5, 4), "2": (0.25, 8), "3": (0.25, 4)}
    unfinished = ev.order_measures([group("21", "21", swaps[:2], n_orders=4)])
    assert unfinished["mean"]["value"] == 0.5 and unfinished["same choice"]["value"] == 0

def test_order_measures_of_letters_with_a_reference_image():
    orders = [(0, 1, 2), (0, 2, 1)]
    m = ev.order_measures([group("AB", "AB", orders, "letter", movable=[1, 2])])
    assert m["same choice"]["value"] == 1
    assert [(k, p["value"], p["n"]) for k, p in m["by position"].items()] == [
        ("2", 1, 1), ("3", 1, 1)]
    m = ev.order_measures([group(["7", "7"], ["8", "8"], orders, "keep")])
    assert (m["same choice"]["value"], m["by position"]) == (1, {})

# ---- runs ----------------------------------------------------------------------------------------

def run(out, *flags):
    ev.main(["--out", str(out), "--limit", "12", "--orders", "3", "--batch", "10", *flags])
    return (out / "tiny" / "digits" / "results.json").read_bytes()

def test_a_killed_run_goes_on_to_the_same_results(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "a")
    assert json.loads(whole)["n"] == 12 and "bias" in capsys.readouterr().out
    calls, sample_groups = [], ev.sample_groups

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_groups(*args, **kwargs)

    monkeypatch.setattr(ev, "sample_groups", dies)
    with pytest.raises(SystemExit, match="run the same command again to go on"):
        run(tmp_path / "b")
    samples = tmp_path / "b" / "tiny" / "digits" / "samples.jsonl"
    lines = samples.read_bytes().count(b"\n")
    samples.write_bytes(samples.read_bytes()[:-30])  # a torn last line: its batch is asked again
    run(tmp_path / "b", "--score-only")
    assert json.loads((samples.parent / "results.json").read_bytes())["missing"] > 0
    done = len(calls)
    assert run(tmp_path / "b") == whole and lines > 0
    assert run(tmp_path / "b") == whole and run(tmp_path / "b", "--score-only") == whole
    whole_run = len(calls) - done
    assert run(tmp_path / "c") == whole and len(calls) - done - whole_run == whole_run + 1
    for flag, field in (("--orders", "orders"), ("--max-new-tokens", "max_new_tokens"),
                        ("--batch", "rollout_batch")):
        with pytest.raises(SystemExit, match=f"{field} was .* is 7 now"):
            run(tmp_path / "b", flag, "7")

def test_failures_count_as_wrong_in_fixed_denominators(tmp_path, monkeypatch):
    monkeypatch.setattr(perl, "image_problem", lambda *_: "")  # a benchmark's image is not refused
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    Image.new("RGB", (3, 900)).save(tmp_path / "thin.png")  # no aspect ratio for the vision tower
    rows = [{"id": name, "images": [f"{name}.png"], "question": "<image>Which?", "answer": "1",
             "order_rule": "keep"} for name in ("a", "thin")]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ev.main(["--benchmarks", str(path), "--out", str(tmp_path / "out"), "--max-new-tokens", "4"])
    r = json.loads((tmp_path / "out" / "tiny" / "mine" / "results.json").read_text())
    assert (r["n"], r["errors"], r["unparsed"], r["truncated"], r["score"]) == (2, 1, 1, 1, 0)

def test_compare_is_paired(tmp_path):
    for run_name, answers in (("A", "1100"), ("B", "1010")):
        folder = tmp_path / run_name / "digits"
        folder.mkdir(parents=True)
        rows = [graded(rf"\boxed{{{answer}}}", "text", "1", id=str(k), answer=None)
                for k, answer in enumerate(answers)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4 - (
            run_name == "B")]))
    line = ev.compare(tmp_path / "A", tmp_path / "B").splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["digits", "3", "66.7", "66.7"] and cells[4].startswith("0.0 [-")

def test_the_report_stands_beside_the_paper():
    result = {"score": 0.5, "interval": [0.4, 0.6], "n": 100, "expected": 1901, "errors": 0,
              "unparsed": 1, "truncated": 0, "missing": 0, "orders": {}, "all rotations": {},
              "over questions": 0.5, "over tasks": 0.45}
    text = ev.report({"blink": result, "mathvista": result}, "mine")
    assert "50.0 [40.0, 60.0]" in text and "100 of 1901" in text and "58.53" in text
    assert "below judged" in text and "52.00" not in text  # MMIU was not run

# ---- page of a run -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    """A run of two steps with a kept and a dropped group, whose texts try to break out, and a
    held-out question asked at steps 0 and 1."""
    run = tmp_path_factory.mktemp("paged") / "run"
    Image.new("RGB", (300, 20), "red").save(run.parent / "red.png")
    run.mkdir()
    (run / "config.json").write_text(json.dumps(vars(perl.Config(filter="online"))))
    shared = dict(images=[str(run.parent / "red.png"), "gone.png"], question="<image><image>Which?",
                  format=1.0, order_rule="index", movable=[0, 1])
    hostile = "</script><script>document.title='broken'</script><b>bold</b> \\boxed{2}"
    rows = [shared | dict(step=1, id="q", order=order, gold=gold, response=hostile, accuracy=right,
                          reward=right, advantage=2 * right - 1)
            for order, gold, right in (([0, 1], "1", 0.0), ([1, 0], "2", 1.0))]
    rows.append(shared | dict(step=2, id="r", order=[0, 1], gold="1", response="x", accuracy=1.0,
                              reward=1.0, advantage=0.0))
    write_rows(run / "rollouts.jsonl", *rows)
    write_rows(run / "held_out.jsonl", *[
        shared | dict(step=step, id="h", order=[0, 1], gold="1", response="first" * step,
                      accuracy=step, reward=step, advantage=0.0) for step in (0, 1)])
    write_rows(run / "metrics.jsonl", dict(step=0, eval_accuracy=.5, eval_worst=.25, eval_bias=.5),
               dict(step=1, accuracy=.5, format=1.0, kept=1, dropped=1, all_right=1, all_wrong=0,
                    length=9.0, kl=0.0, idle=.1, truncated=0.0))
    ev.main(["--page", str(run)])
    return run / "page.html"

def test_a_page_needs_nothing_else(paged):
    text = paged.read_text()
    assert not re.search(r"(src|href)=|@import|url\(|NO_DATA", text)
    assert "<b>bold" not in text and text.count("</script>") == 1
    data = json.loads(re.search(r"const DATA = (.*);", text)[1])
    assert [(group["verdict"], group["mean"], len(group["orders"])) for group in data["groups"]] == [
        ("kept", 0.5, 2), ("all_right", 1.0, 1), ("flat", 0.5, 1)]
    assert [row["step"] for row in data["groups"][2]["orders"][0]] == [0, 1], "through the run"
    assert [order[0]["right_image"] for order in data["groups"][0]["orders"]] == [0, 1]
    red, gone = data["images"].values()
    with Image.open(io.BytesIO(base64.b64decode(red.partition(",")[2]))) as image:
        assert image.width == 256 and gone == ""

def test_a_page_of_answers_that_name_no_single_image_and_of_a_forks_filter(paged, tmp_path):
    rows = [dict(row, order_rule=rule, gold=gold, id=rule) for row in read_rows(
        paged.parent / "rollouts.jsonl")[:1] for rule, gold in (
            ("sequence", "2,1"), ("keep", "2"), ("letter", "B"), ("a fork's", "1-2"))]
    write_rows(tmp_path / "rollouts.jsonl", *rows)
    write_rows(tmp_path / "metrics.jsonl", dict(step=1, kept=1, dropped=0))
    (tmp_path / "config.json").write_text(json.dumps(vars(perl.Config(filter="disagree"))))
    page.write(tmp_path)
    data = json.loads(re.search(r"const DATA = (.*);", (tmp_path / "page.html").read_text())[1])
    assert [group["verdict"] for group in data["groups"]] == ["disagree"] * 4
    assert [group["orders"][0][0]["right_image"] for group in data["groups"]] == [-1, -1, 1, -1]

def in_browser(page, profile, width):
    """The page as Chromium has it after its script ran."""
    browser = shutil.which("chromium") or pytest.skip("no chromium")
    flags = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
             f"--disable-component-update --disable-sync --user-data-dir={profile} --dump-dom "
             f"--window-size={width},800")
    return subprocess.run([browser, *flags.split(), f"file://{page}"], capture_output=True,
                          text=True, timeout=60).stdout

def test_the_page_in_a_browser(paged, tmp_path):
    """Its script runs: curves are drawn, the group is shown, and model text is text."""
    shown = in_browser(paged, tmp_path, 1200)
    assert shown.count("<svg") == 6 and "<title>PeRL run</title>" in shown
    assert "Order 2, 1: 1 of 1 right" in shown and "Mean reward 0.500" in shown
    assert "&lt;b&gt;bold&lt;/b&gt;" in shown and "step 2: r" in shown
    assert shown.count('class="right"') == 2, "the right image is framed in both orders"

def test_the_page_by_keyboard_on_a_narrow_screen(paged, tmp_path):
    """Arrow keys go through the groups, to the held-out question; nothing sticks out."""
    keys = """<script>
      for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"])
        document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      document.title = document.documentElement.scrollWidth + " of " + innerWidth;
    </script>"""
    page = tmp_path / "keys.html"
    page.write_text(paged.read_text() + keys)
    shown = in_browser(page, tmp_path / "profile", 400)
    assert "Held-out question h" in shown and "step 1: right" in shown
    width, screen = map(int, re.search(r"<title>(\d+) of (\d+)</title>", shown).groups())
    assert width <= screen <= 500

def test_a_page_of_no_run_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no metrics.jsonl of a training run"):
        ev.main(["--page", str(tmp_path)])

# ---- data_samples/curate.py ----------------------------------------------------------------------

sys.path.append(str(HERE / "data_samples"))
import curate  # noqa: E402
import order_rules  # noqa: E402
import pictures  # noqa: E402

LABELLED = read_rows(HERE / "data_samples" / "order_labels.jsonl")
DIGITS = sorted((HERE / "data_samples" / "images").glob("*.png"))

@table("part, least", [("rules", 58), ("held-out", 27), ("attack", 73)])
def test_order_labels_other_than_never_are_right(part, least):
    """The held-out questions were written without sight of the rules, and scored once; `attack`
    to find wrong labels, after which the rules were mended."""
    found = 0
    for row in (row for row in LABELLED if row["set"] == part):
        n = row["question"].count("<image>")
        gold = order_rules.gold_of(row["answer"], row["question"], n)
        label = order_rules.infer_label(row["question"], gold, n, row["style"])
        if label.order_rule != "never":
            mentions = [int(k) for k in perl.MENTION.findall(label.question)]
            got = (label.order_rule, list(label.movable), label.answer, mentions)
            assert got == (row["order_rule"], row["movable"], row["gold"], row["mentions"]), row
            found += 1
    assert found >= least

@table("question, answer", [
    ("<image><image> What is the number of the image that shows a cat?", "2"),
    ("<image><image> Which image shows a cat?\nA. One\nB. Two", "A"),
    ("<image><image> Which image shows a cat, and how many cats?", "2"),
    ("<image><image> Is image one brighter than both other images?", "Yes"),
    ("<image><image><image> Which image is closer to the reference image?", "2"),
    ("Image 2: <image> Image 1: <image> Which image shows a cat?", "2"),
    ("<image><image> Which image shows a cat?", "3"),
    ("<image><image> The dogs in both images face each other. True or false?", "True"),
    ("<image><image> The dog in one image is facing that in the other image. True?", "Yes"),
    ("<image><image> What did the man pick up?\nA. A cup\nB. A book", "A"),
    ("<image><image> Where in the images is the cat?", "the last one"),
    ("<image><image><image> Which image shows a cat, 1 or 3?", "3"),
    ("<image><image> What word do the letters in the images spell?", "on"),
    ("<image><image> Give the rank of each image by size; sort the image numbers.", "2,1"),
    ("<image><image> Sort the image numbers in reverse order.", "2,1"),
    ("<image>Which is larger, A or B?\nA. <image>\nB. <image>", "A"),
    ("<image><image> Answer with the 0-based index: which image shows a cat?", "1")])
def test_in_doubt_never(question, answer):
    label = order_rules.infer_label(question, answer, question.count("<image>"), "any")
    assert label.order_rule == "never" and label.question == question

def test_a_label_means_the_same_picture_in_every_order(tmp_path):
    """Eq. 1 on the labelled questions: the picture that an answer names moves with it."""
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    for row in LABELLED:
        n = row["question"].count("<image>")
        gold = order_rules.gold_of(row["answer"], row["question"], n)
        label = order_rules.infer_label(row["question"], gold, n, row["style"])
        if label.order_rule not in ("index", "letter"):
            continue
        names = tuple(f"{k}.png" for k in range(n))
        sample = Sample("q", names, label.question, label.answer, label.order_rule, label.movable)
        for order in perl.all_orders(sample, 6):
            moved = perl.permute(sample, order)
            place = {"index": lambda s: int(s.answer) - 1,
                     "letter": lambda s: s.movable["ABCDEFGHIJ".index(s.answer)]}[sample.order_rule]
            assert moved.images[place(moved)] == sample.images[place(sample)]

def digit(k, kind="PNG", mode="RGB"):
    """The bytes of a real digit; kind JPEG is another encoding of the same picture."""
    with Image.open(DIGITS[k]) as image:
        return encoded(image.convert(mode), kind)["bytes"]

def mantis_row(k, paths, question, answer):
    images = [{"bytes": None, "path": path} for path in paths]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(k), "images": images, "conversation": talk, "source": "any"}

def write_mantis(folder, config, rows, contents, parts=("train_images.zip",)):
    """A subset of Mantis-Instruct as on the Hub: parquet, and the images in one or more zips."""
    folder = folder / "Mantis-Instruct" / config
    write_parquet(rows, folder / "train-00000-of-00001.parquet")
    if len(parts) > 1:
        (folder / "train_images_zips.txt").write_text("\n".join(parts))
    for k, part in enumerate(parts):
        with zipfile.ZipFile(folder / part, "w") as archive:
            for name in sorted(contents)[k::len(parts)]:
                archive.writestr(name, contents[name])

OPTIONS = "\nA. <image>\nB. <image>\nC. <image>"
DREAM = ("Answer the following multiple-choice question:\nHere are there images: <image> <image> "
         "<image>. If image {} is the reference image, which image of the other two is more "
         "similar to the reference image?\nOptions:\n(A) Image {}\n(B) Image {}")

@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies in the layouts of the Hub; images of one name lie in several folders."""
    root, contents, dream, icon = tmp_path_factory.mktemp("copies"), {}, [], []
    for k in range(6):
        paths = [f"nights/{k}/{j}.png" for j in range(3)]
        contents |= {path: digit(3 * k + j) for j, path in enumerate(paths)}
        dream.append(mantis_row(k, paths, DREAM.format(2, 1, 3), "AB"[k % 2]))
    write_mantis(root, "dreamsim", dream, contents)
    for k in range(6):
        paths = [f"choose_img/{k}/{name}.png" for name in ("image", *"012")]
        contents |= {path: digit(20 + 4 * k + j) for j, path in enumerate(paths)}
        icon.append(mantis_row(k, paths, f"<image>Which shape is like {k}?{OPTIONS}", "Answer: B"))
    write_mantis(root, "iconqa", icon, contents, ("part_0.zip", "part_1.zip"))
    k12 = [{"id": str(k), "question": f"As shown, AB = {k}. How long is CD?", "answer": f"$${k}$$",
            "subject": "math", "image": {"bytes": digit(50 + k, mode=mode), "path": None}}
           for k, mode in enumerate(("RGB", "RGBA", "L", "P"))]
    write_parquet(k12, root / "MMK12" / "data" / "train-00000-of-00001.parquet")
    geometry = [{"images": [{"bytes": digit(60 + k), "path": None}], "answer": rf"{k}\sqrt{{2}}",
                 "problem": "<image>Find x."} for k in range(3)]
    write_parquet(geometry, root / "geometry3k" / "data" / "train-00000-of-00001.parquet")
    return root

ALL_SOURCES = ["mantis:dreamsim", "mantis:iconqa", "mmk12", "hiyouga/geometry3k"]

def run_curate(copies, out, *more, sources=ALL_SOURCES):
    curate.open_zip.cache_clear()
    curate.main([*sources, "--data-dir", str(copies), "--out", str(out), *more])
    return out

@pytest.fixture(scope="module")
def curated(copies, tmp_path_factory):
    return run_curate(copies, tmp_path_factory.mktemp("curated") / "out")

def test_rows_of_all_layouts_become_samples(curated):
    samples = {sample.id: sample for sample in perl.load_samples(curated / "train.jsonl")}
    assert Counter(s.source for s in samples.values()) == {
        "mantis-dreamsim": 6, "mantis-iconqa": 6, "mmk12": 4, "geometry3k": 3}
    dream, icon = samples["mantis-dreamsim-0000002"], samples["mantis-iconqa-0000001"]
    assert (dream.answer, dream.order_rule, dream.movable) == ("B", "keep", (0, 1, 2))
    assert "<image_2> is the reference" in dream.question and "(A) <image_1>" in dream.question
    assert (icon.answer, icon.order_rule, icon.movable) == ("B", "letter", (1, 2, 3))
    k12, geometry = samples["mmk12-0000003"], samples["geometry3k-0000002"]
    assert (k12.answer, k12.order_rule) == ("2", "never") and k12.question.startswith("<image>As")
    assert (geometry.answer, geometry.question) == (r"1\sqrt{2}", "<image>Find x.")
    for sample, first in ((dream, 3), (icon, 20), (k12, 52), (geometry, 61)):
        for k, path in enumerate(sample.images, first):  # the right picture stands at each place
            with Image.open(path) as image, Image.open(DIGITS[k]) as source:
                assert image.tobytes() == source.convert("RGB").tobytes()

def test_the_report_counts_and_shows(curated):
    text = (curated / "REPORT.md").read_text()
    assert text.startswith("# 19 of 19 questions") and text.count("\n1. ") == 1
    assert "| mantis-iconqa: option image | 0 | 0 | 0 | 6 | 6 |" in text
    assert "| mantis-dreamsim: image | 3 | 3 | 0 | 0 | 6 |" in text, "option A names image 1"
    with Image.open(curated / "ten.jpg") as image:
        assert image.height > 10 * 100

def test_on_our_own_samples_the_rules_give_the_label_or_never():
    found = Counter()
    for row in read_rows(HERE / "data_samples" / "train.jsonl"):
        question, n = perl.MENTION.sub(r"image \1", row["question"]), len(row["images"])
        gold = order_rules.gold_of(row["answer"], question, n)
        label = order_rules.infer_label(question, gold, n, row["source"])
        found[label.order_rule] += 1
        if label.order_rule != "never":
            movable = tuple(row.get("movable", range(n)))
            assert label[1:] == (row["answer"], row["order_rule"], movable), row
    assert found["keep"] > 300 and found["index"] > 500

def test_a_curated_set_in_a_dry_run(curated, capsys):
    perl.main(["--data", str(curated / "train.jsonl"), "--eval-data", "", "--dry-run"])
    text = capsys.readouterr().out
    assert "19 questions, 0 dropped" in text and "order (0, 1, 2" in text

def test_questions_of_one_and_of_several_images_train_together(tmp_path, monkeypatch):
    """Real digits through the adapter for images/problem/answer: one image has one order, in
    all (n_s + 1) * n rollouts of its group; several have two. Both kinds reach the loss."""
    folder, rows = HERE / "data_samples", []
    counts = [row for row in read_rows(folder / "test.jsonl") if row["source"] == "count"]
    for k, row in enumerate(counts[:20]):
        question = "How many of the images show an even digit?"
        images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in row["images"]]
        answer = row["answer"]
        if k % 2:  # a single image; its gold is a guess, which makes some rollouts wrong
            images, answer = images[:1], str(int(answer) % 2)
        rows.append({"images": images, "problem": question, "answer": answer})
    write_parquet(rows, tmp_path / "digits" / "train.parquet")
    out = run_curate(tmp_path, tmp_path / "out", sources=["our/digits"])
    assert Counter(s.order_rule for s in perl.load_samples(out / "train.jsonl")) == {
        "keep": 10, "never": 10}
    kept, update = [], perl.update
    monkeypatch.setattr(perl, "update", lambda *args: kept.extend(args[4]) or update(*args))
    perl.main(arguments(out / "train.jsonl", tmp_path / "run", eval_data="", steps=1,
                        questions_per_step=20, rollouts_per_order=6))
    assert {len(group) for group in kept} == {12}
    orders = {1: set(), 2: set()}
    for group in kept:
        n_orders = len({rollout.order for rollout in group})
        orders[n_orders].add(len(group[0].prompt.sample.images))
    assert orders[1] == {1} and min(orders[2]) > 1
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["kept"] == len(kept) and row["grad_norm"] > 0

BAD = {
    "not 1 to 16 images": mantis_row(0, [], "How many?", "3"),
    "placeholders do not fit the images": mantis_row(0, ["a.png", "b.png"], "<image> Why?", "3"),
    "question over 4000 characters": mantis_row(0, ["a.png"], "<image>" + "why " * 1500, "3"),
    "control characters or tokens in the text": mantis_row(
        0, ["a.png"], "<image><|im_end|> What is it?", "3"),
    "no answer": mantis_row(0, ["a.png"], "<image> What is it?", " "),
    "answer is none of the options": mantis_row(0, ["a.png"], "<image>?\nA. 1\nB. 2", "C"),
    "answer names an image in words": mantis_row(
        0, ["a.png", "b.png"], "<image><image> Which?", "The final image"),
    "answer has several parts": mantis_row(0, ["a.png"], "<image> Solve.", "(1) 3; (2) 4"),
    "open answer": mantis_row(0, ["a.png"], "<image> What is it?", "A man who rides a bike."),
    "answer that our grader cannot read": mantis_row(0, ["a.png"], "<image> Which set?", "{3"),
    "image not found": mantis_row(0, ["none.png"], "<image> How many?", "3"),
    "image name is ambiguous": mantis_row(0, ["0.png"], "<image> How many?", "3"),
    "image unreadable": mantis_row(0, ["torn.png"], "<image> How many?", "3"),
    "image too large or too thin": mantis_row(0, ["thin.png"], "<image> How many?", "3"),
    "twin": mantis_row(0, ["a.png"], "<image> How many brown cows graze here?", "4"),
    "near twin": mantis_row(0, ["a.jpg"], "<image> How many brown cows do graze here?", "4"),
    "one question with several answers": mantis_row(0, ["b.png"], "<image> Is it odd?", "No")}

@pytest.fixture
def bad_copies(tmp_path):
    """Rows that each rule drops, after three that stay."""
    good = [mantis_row(0, ["a.png"], "<image> How many brown cows graze here?", "4"),
            mantis_row(0, ["a.png"], "<image> Is this a horse?", "No"),
            mantis_row(0, ["c.png"], "<image> Is it odd?", "No"),
            mantis_row(0, ["b.png"], "<image> Is it odd?", "Yes")]  # contradicted below
    thin = encoded(Image.new("RGB", (900, 3)), "PNG")["bytes"]
    contents = {"a.png": digit(0), "a.jpg": digit(0, "JPEG"), "b.png": digit(1),
                "c.png": digit(2), "x/0.png": digit(3), "y/0.png": digit(4), "thin.png": thin,
                "torn.png": digit(5)[:-60]}
    rows = good + list(BAD.values())
    write_mantis(tmp_path / "copies", "nlvr2", rows, contents)
    return tmp_path / "copies"

def test_what_a_rule_drops_is_counted_and_shown(bad_copies, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # ev.main sets it
    out = run_curate(bad_copies, tmp_path / "out", sources=["mantis:nlvr2"])
    dropped = Counter(row["rule"] for row in read_rows(out / "dropped.jsonl"))
    assert dropped == dict.fromkeys(BAD, 1) | {"one question with several answers": 2}
    assert [s.id[-1] for s in perl.load_samples(out / "train.jsonl")] == ["1", "2", "3"]
    text = (out / "REPORT.md").read_text()
    assert all(f"| {rule} | " in text for rule in BAD)
    assert text.startswith(f"# 3 of {len(BAD) + 4} questions")

def test_an_answer_that_names_an_image_never_stays(tmp_path):
    rows = [mantis_row(0, ["a.png", "b.png"], f"<image><image> {question}", "The first image")
            for question in ("How many of the images show a 3?", "Which image shows a 3?")]
    write_mantis(tmp_path, "nlvr2", rows, {"a.png": digit(0), "b.png": digit(1)})
    out = run_curate(tmp_path, tmp_path / "out", sources=["mantis:nlvr2"])
    assert [s.order_rule for s in perl.load_samples(out / "train.jsonl")] == ["never", "index"]

def test_benchmarks_are_kept_out(copies, tmp_path):
    """By the same pixels, by a JPEG of them, by 13 words; 13 words of a template do not count."""
    against = tmp_path / "against"
    write_parquet([{"question": "short", "image": {"bytes": digit(3), "path": None}}],
                  against / "test.parquet")
    (against / "near.jpg").write_bytes(digit(21, "JPEG"))
    template = "here are there images if image 2 is the reference image which image of the other"
    write_rows(against / "b.jsonl", {"deep": [{"q": template}]})
    k12 = [{"id": str(k), "question": text, "answer": "3", "subject": "math",
            "image": {"bytes": digit(70 + k), "path": None}} for k, text in enumerate((
                "The two cars drive off at noon from towns ninety miles apart; when do they meet?",
                "A car drives."))]
    sources = tmp_path / "copies"
    shutil.copytree(copies, sources)
    write_parquet(k12, sources / "MMK12" / "data" / "train-00001.parquet")
    (against / "c.json").write_text(json.dumps([k12[0]["question"].upper()]))
    out = run_curate(sources, tmp_path / "out", "--against", str(against))
    dropped = {row["id"]: row["rule"] for row in read_rows(out / "dropped.jsonl")}
    assert dropped == {"mantis-dreamsim-0000002": "picture of a benchmark",
                       "mantis-iconqa-0000001": "near twin of a benchmark's picture",
                       "mmk12-0000005": "13 words of a benchmark"}

def test_a_killed_curation_goes_on_to_the_same_bytes(copies, curated, tmp_path, monkeypatch):
    out, calls, store = tmp_path / "out", [], curate.store_image

    def dies(*args):
        calls.append(args)
        return die() if len(calls) == 30 else store(*args)

    monkeypatch.setattr(curate, "store_image", dies)
    with pytest.raises(Killed):
        run_curate(copies, out)
    assert not (out / "train.jsonl").exists()
    with open(out / ".work" / "mantis-iconqa.jsonl", "a") as file:
        file.write('{"sample": {"id"')  # a line torn by the kill
    run_curate(copies, out)
    assert len(calls) < 30 + 18 + 24 + 7
    for name in ("train.jsonl", "REPORT.md", "ten.jpg", "dropped.jsonl"):
        assert (out / name).read_bytes() == (curated / name).read_bytes()
    with pytest.raises(SystemExit, match="begun with other sources"):
        run_curate(copies, out, sources=["mmk12"])

def test_a_label_that_a_model_disputes_is_never(copies, curated, tmp_path, monkeypatch):
    """A stub says that images are options and that order matters: only `letter` is so. A
    killed run does not ask again; the tiny model, which knows none of this, agrees with none."""
    asked = []

    def says_yes(model, processor, samples, orders, n, cfg, greedy):
        asked.extend(samples)
        assert greedy and n == 1 and all(order == [tuple(range(len(s.images)))]
                                         for s, order in zip(samples, orders))
        return [[SimpleNamespace(accuracy=float(s.answer == "Yes"))] for s in samples]

    monkeypatch.setattr(perl, "sample_groups", says_yes)
    out = run_curate(copies, tmp_path / "out", "--label-with", "tiny")
    rules = Counter((s.source, s.order_rule) for s in perl.load_samples(out / "train.jsonl"))
    assert rules == {("mantis-iconqa", "letter"): 6, ("mantis-dreamsim", "never"): 6,
                     ("mmk12", "never"): 4, ("geometry3k", "never"): 3}
    assert len(asked) == 2 * 12 and "options to choose from" in asked[1].question
    assert "| never, not keep | all |" in (out / "REPORT.md").read_text()
    before = (out / "train.jsonl").read_bytes()
    run_curate(copies, out, "--label-with", "tiny")
    assert len(asked) == 2 * 12 and (out / "train.jsonl").read_bytes() == before
    monkeypatch.undo()
    out = run_curate(copies, tmp_path / "real", "--label-with", "tiny", sources=["mantis:iconqa"])
    assert {s.order_rule for s in perl.load_samples(out / "train.jsonl")} == {"never"}

@table("sources, message", [
    (["mmk13"], "a source is mantis:CONFIG"), (["mantis:"], "a source is"),
    (["mantis:none"], "no train.*parquet in"), (["a/x", "b/x"], "two sources of one name"),
    (["hiyouga/MMK12"], "row 1: not the columns of MMK12")])
def test_a_source_that_cannot_be_read_ends_with_one_sentence(copies, tmp_path, sources, message):
    with pytest.raises(SystemExit, match=message):
        run_curate(copies, tmp_path / "out", sources=sources)

def test_the_hub_is_asked_for_train_files_and_what_lacks_is_named(copies, tmp_path, monkeypatch):
    shutil.copytree(copies, tmp_path / "copies")
    (tmp_path / "copies" / "Mantis-Instruct" / "iconqa" / "part_1.zip").unlink()
    with pytest.raises(SystemExit, match="part_1.zip is missing"):
        run_curate(tmp_path / "copies", tmp_path / "out", sources=["mantis:iconqa"])
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, **more: (
        asked.append((name, more["allow_patterns"])) or copies / name.split("/")[1]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    curate.main(["mmk12", "mantis:iconqa", "--out", str(tmp_path / "loaded")])
    assert asked == [("FanqingM/MMK12", ["*train*.parquet"]),
                     ("TIGER-Lab/Mantis-Instruct", ["iconqa/train*"])]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="pip install huggingface_hub"):
        curate.main(["mmk12", "--out", str(tmp_path / "hub")])

def test_odd_images_come_out_plain():
    deep = Image.new("I;16", (40, 30), 40000)
    turned = Image.new("RGB", (40, 30), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    turned.getexif()[0x0112] = 6  # what is on the left belongs at the top
    turned.save(file := io.BytesIO(), "PNG", exif=turned.getexif())
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    assert pictures.decode(encoded(deep, "PNG")["bytes"]).getpixel((0, 0)) == (156, 156, 156)
    upright = pictures.decode(file.getvalue())
    assert upright.size == (30, 40) and upright.getpixel((29, 0)) == (0, 0, 255)
    assert pictures.decode(encoded(clear, "PNG")["bytes"]).getpixel((0, 0)) == (255, 255, 255)
    assert pictures.near_hash(Image.new("RGB", (40, 40), "white")) is None
