"""Small parquet shards in the schema Pick-a-Pic was published in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def jpg(colour: tuple[int, int, int], size: tuple[int, int] = (96, 64)) -> bytes:
    """A plain image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def row(caption: str | None, label_0: float | None, number: int = 0, **changes: Any) -> dict[str, Any]:
    """One labelled pair: image 0 is red, image 1 is blue, both the darker the higher the number."""
    shade = 255 - 8 * number
    values = {
        "caption": caption,
        "label_0": label_0,
        "label_1": None if label_0 is None else 1 - label_0,
        "jpg_0": jpg((shade, 0, 0)),
        "jpg_1": jpg((0, 0, shade)),
        "image_0_uid": f"red-{number}",
        "image_1_uid": f"blue-{number}",
        "ranking_id": number,
    }
    return {**dict.fromkeys(SCHEMA.names), **values, **changes}


def write(
    folder: Path,
    shards: Sequence[Sequence[dict[str, Any]]],
    split: str = "train",
    group: int = 2,
    without: Sequence[str] = (),
) -> Path:
    """Write shards as the hub names them, with `group` rows a row group."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA).drop_columns(list(without))
        pq.write_table(
            table, folder / "data" / f"{split}-{number:05d}-of-{len(shards):05d}-abc.parquet", row_group_size=group
        )
    return folder


def colours(images: np.ndarray) -> list[str]:
    """red or blue, for uint8 [n, H, W, 3]."""
    return ["red" if image[..., 0].mean() > image[..., 2].mean() else "blue" for image in images]
