"""Pictures of any common format, as Pillow reads them, made into what a network takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dfs.data.augment import Box, middle_cut
from dfs.data.files import DataError
from dfs.data.preprocessing import Preprocessing

# Formats that hold photographs; what else lies in a class folder is passed over.
_FORMATS = "jpg jpeg png webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in _FORMATS.split())
_MODES = {1: "L", 3: "RGB"}


class PictureError(DataError):
    """A picture that can't be read."""


def read_picture(path: Path, channels: int) -> Image.Image:
    """A picture, upright, without transparency, grey or in colour.

    Orientation is that of the EXIF data. What is transparent becomes white. Of several frames the
    first is taken; 16-bit grey is brought to 8 bits.

    Args:
        channels: 1 for grey, 3 for RGB.

    Raises:
        PictureError: names the file.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return _plain(upright).convert(_MODES[channels])
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise PictureError(f"{path}: is a folder, not a picture") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{path}: not a picture of a known format") from error
    # What Pillow's decoders raise on damaged files is not documented.
    except Exception as error:
        raise PictureError(f"{path}: unreadable ({error or type(error).__name__})") from error


def cut_pixels(picture: Image.Image, box: Box, size: int) -> Tensor:
    """The part ``box`` of a picture scaled to a square, uint8 (C, size, size)."""
    width, height = picture.size
    if box != (0, 0, width, height) or (width, height) != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(picture, np.uint8))
    return pixels.view(size, size, -1).permute(2, 0, 1).contiguous()


def network_pixels(path: Path, preprocessing: Preprocessing) -> Tensor:
    """A picture as a network gets it before normalization, uint8 (C, size, size).

    Raises:
        PictureError: names the file.
    """
    picture = read_picture(path, preprocessing.channels)
    box = middle_cut(*picture.size, preprocessing.resize, preprocessing.size)
    return cut_pixels(picture, box, preprocessing.size)


def _plain(picture: Image.Image) -> Image.Image:
    """8 bits a channel, opaque."""
    if picture.mode.startswith("I"):
        # 16-bit PNG and TIFF; 32-bit files of this kind hold 16-bit values.
        levels = np.clip(np.array(picture, np.int64) >> 8, 0, 255)
        return Image.fromarray(levels.astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture
