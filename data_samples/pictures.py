"""Pictures of a data set: made plain RGB, named by their pixels, found again if nearly the same."""
import hashlib
import io
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

MAX_PIXELS, MAX_ASPECT = 40_000_000, 100
NEAR_BITS = 3  # pictures of which at most so many of 63 hash bits differ are near twins

class Dropped(Exception):
    """A row that is left out; its text names the rule."""

def decode(content: bytes) -> Image.Image:
    """Bytes -> RGB: first frame, turned as EXIF says, what is transparent white."""
    try:
        picture = Image.open(io.BytesIO(content))
        width, height = picture.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise Dropped("image too large or too thin")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # convert() would cut at 255, which leaves white
            picture = picture.point(lambda value: value / 256)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Dropped("image unreadable") from None

def pixel_name(picture: Image.Image) -> str:
    """A name for these pixels, whatever file they came in."""
    content = f"{picture.size}".encode() + picture.tobytes()
    return hashlib.sha1(content).hexdigest()[:24]

COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))  # of a DCT

def near_hash(picture: Image.Image) -> int | None:
    """63 bits that survive scaling and encoding: signs of the lowest frequencies about
    their median. None: the picture is flat, and alike to all flat ones."""
    gray = np.asarray(picture.convert("L").resize((32, 32)), dtype=float)
    waves = (COSINES @ gray @ COSINES.T).ravel()[1:]
    if np.abs(waves).max() < 32:
        return None
    bits = waves > np.median(waves)
    return int("".join("01"[bit] for bit in bits.astype(int)), 2)

def store_image(content: bytes, out: Path) -> tuple[str, int | None]:
    """Save a picture under its pixels' name; a JPEG that any reader opens so byte by byte."""
    picture = decode(content)
    name = pixel_name(picture)
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
    """Finds an earlier hash at most NEAR_BITS bits away: one of 4 bands is then equal."""
    def __init__(self):
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

def draw_ten(samples: list[dict], out: Path) -> None:
    """ten.jpg: each question's images in rows, its id, answer and text above them."""
    side, text_height, columns = 112, 34, 8
    heights = [text_height + side * math.ceil(len(s["images"]) / columns) for s in samples]
    sheet = Image.new("RGB", (side * columns, sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for k, (s, height) in enumerate(zip(samples, heights), 1):
        text = " ".join(s["question"].replace("<image>", "").split())
        text = f"{k}. {s['id']}, {s['order_rule']}, answer {s['answer']}\n{text[:140]}"
        draw.text((4, top + 2), text.encode("ascii", "replace").decode(), "black")
        for j, path in enumerate(s["images"]):
            row, column = divmod(j, columns)
            with Image.open(out / path) as picture:
                small = picture.convert("RGB")
            small.thumbnail((side - 6, side - 6))
            sheet.paste(small, (column * side + 3, top + text_height + row * side))
        top += height
    sheet.save(out / "ten.jpg", quality=85)
