"""Training data from files: what is read, what is left out and why, and one line for what cannot be used."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import fake_pickapic
import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_pickapic import colours, jpg, row
from PIL import Image

from bench.data import Kept, load_pairs, load_prompts
from bench.data.images import read_image
from bench.errors import BenchError, UsageError
from bench.metrics.base import to_rgb
from bench.storage.shards import BrokenRows

BROKEN = jpg((1, 2, 3))[:200]
ROWS = [
    [row("a cat", 1.0, 0), row("a tie", 0.5, 1), row(" a dog ", 0.0, 2)],
    [row(None, 1.0, 3), row("a cat", 0.0, 4, jpg_0=BROKEN), row("no label", None, 5), row("  ", 0.0, 6)],
    [row("a cow", 1.0, 7, jpg_0=BROKEN), row("a cat", 1.0, 8, image_0_uid="red-0"), row("nothing", 0.0, 9, jpg_1=None)],
]


@pytest.fixture
def shards(tmp_path) -> Path:
    return fake_pickapic.write(tmp_path / "pap", ROWS)


def open_pairs(spec, tmp_path, **options):
    return load_pairs(str(spec), **{"size": None, "seed": 0, "resolution": 32, "cache": tmp_path / "cache", **options})


def complaint(spec, tmp_path, **options) -> str:
    with pytest.raises(BenchError) as caught:
        open_pairs(spec, tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_winners_follow_the_label_and_ties_are_left_out(shards, tmp_path):
    data = open_pairs(f"pickapic:{shards}", tmp_path)
    assert data.prompts == ["a cat", "a dog", "a cat", "a cow", "a cat", "nothing"]
    assert colours(data.winners([0, 1, 4])) == ["red", "blue", "red"]
    assert colours(data.losers([0, 1, 4])) == ["blue", "red", "blue"]
    assert data.winners([4]).shape == (1, 32, 32, 3) and data.paired
    np.testing.assert_allclose(data.winners([1])[0, 16, 16], (0, 0, 255 - 16), atol=4)
    record = data.record()
    assert record["rows"] == 10 and record["pairs"] == 6
    assert record["left_out"] == {"tie": 1, "no caption": 2, "no label": 1}
    assert record["examples"][0] == "train-00001-of-00003-abc.parquet, row group 0, row 0: no caption"


def test_a_pair_with_one_broken_side_is_set_aside_for_every_method(shards, tmp_path):
    data = open_pairs(f"pickapic:{shards}", tmp_path)
    problems = {}
    for side in (data.winners, data.losers):
        with pytest.raises(BrokenRows) as caught:
            side(range(len(data)))
        problems[side] = caught.value.problems
    assert list(problems[data.winners]) == [2, 3, 5] and problems[data.winners] == problems[data.losers]
    kept = Kept(data, problems[data.winners])
    assert kept.rows.tolist() == [0, 1, 4] and kept.prompts == ["a cat", "a dog", "a cat"]
    record = kept.record()
    assert record["pairs"] == 3 and record["left_out"]["undecodable image"] == 2
    assert record["left_out"]["missing image"] == 1 and record["left_out"]["tie"] == 1
    assert record["examples"][0].startswith("train-00001-of-00003-abc.parquet, row group 0, row 1: undecodable image: ")
    with pytest.raises(BenchError, match="not one of 6 rows can be read; the first: broken"):
        Kept(data, dict.fromkeys(range(6), "broken"))


def test_only_the_columns_and_row_groups_needed_are_read(shards, tmp_path, monkeypatch):
    read, groups = [], []
    whole, group = pq.ParquetFile.read, pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, columns: read.append(columns) or whole(self, columns))
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, number, columns: groups.append((number, columns)) or group(self, number, columns),
    )
    data = open_pairs(f"pickapic:{shards}", tmp_path)
    assert len(read) == 3 and not any("jpg" in name for columns in read for name in columns)
    data.winners([0])
    data.winners([0, 1])
    assert groups == [(0, ["jpg_0", "jpg_1"]), (1, ["jpg_0", "jpg_1"])]
    del read[:]
    again = open_pairs(f"pickapic:{shards}", tmp_path)  # the scan is kept
    assert not read and again.fingerprint == data.fingerprint and again.record() == data.record()


def test_copies_are_left_out_on_request(shards, tmp_path):
    spec = f"pickapic:{shards}"
    by_prompt = open_pairs(spec, tmp_path, deduplicate="prompt")
    by_winner = open_pairs(spec, tmp_path, deduplicate="winner")
    assert by_prompt.prompts == ["a cat", "a dog", "a cow", "nothing"]
    assert by_prompt.record()["left_out"]["same prompt again"] == 2
    assert by_winner.record()["left_out"]["same winner again"] == 1 and len(by_winner) == 5
    first = open_pairs(spec, tmp_path, size=2)
    assert first.prompts == ["a cat", "a dog"]
    assert len({data.fingerprint for data in (by_prompt, by_winner, first)}) == 3


def test_the_fingerprint_follows_content_not_place(shards, tmp_path):
    spec = open_pairs(f"pickapic:{shards}", tmp_path).fingerprint
    moved = fake_pickapic.write(tmp_path / "copy", ROWS)
    assert open_pairs(f"pickapic:{moved}", tmp_path).fingerprint == spec
    changed = fake_pickapic.write(tmp_path / "other", [ROWS[0], ROWS[1], [row("a cow", 1.0, 7)]])
    assert open_pairs(f"pickapic:{changed}", tmp_path).fingerprint != spec
    assert open_pairs(f"pickapic:{shards}", tmp_path, resolution=64).fingerprint != spec


def test_splits_are_told_apart_and_captions_make_prompt_sets(shards, tmp_path):
    fake_pickapic.write(shards, [[row("one", 1.0), row("two", 0.0)]], split="test_unique")
    assert len(open_pairs(f"pickapic:{shards}", tmp_path)) == 6
    assert len(open_pairs(f"pickapic:{shards}#test_unique", tmp_path)) == 2
    assert load_prompts(f"pickapic:{shards}#test_unique").prompts == ("one", "two")
    assert "no split 'test'; it has test_unique, train" in complaint(f"pickapic:{shards}#test", tmp_path)
    (single,) = (shards / "data").glob("test*")
    assert len(open_pairs(f"pickapic:{single}", tmp_path)) == 2


def test_images_stored_as_structs_are_read_too(shards, tmp_path):
    """Mirrors made with the datasets library hold {bytes, path} where the original holds bytes."""
    import pyarrow as pa

    (path,) = (fake_pickapic.write(tmp_path / "flat", [ROWS[0]]) / "data").iterdir()
    table = pq.read_table(path)
    for name in ("jpg_0", "jpg_1"):
        cells = [{"bytes": value, "path": None} for value in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(cells))
    pq.write_table(table, tmp_path / "structs.parquet")
    data = open_pairs(f"pickapic:{tmp_path / 'structs.parquet'}", tmp_path)
    assert colours(data.winners([0, 1])) == ["red", "blue"]


def test_the_hub_is_read_at_one_commit(shards, tmp_path, monkeypatch):
    """A stand-in for the hub: a listing at a commit, and a file system over the same shards."""
    import huggingface_hub
    from fsspec.implementations.dirfs import DirFileSystem

    opened = []

    class Api:
        def dataset_info(self, name, revision=None):
            assert (name, revision) == ("owner/name", "v1")
            files = [path.relative_to(shards).as_posix() for path in shards.rglob("*.parquet")]
            siblings = [type("File", (), {"rfilename": name}) for name in (*files, "README.md")]
            return type("Info", (), {"sha": "c0ffee", "siblings": siblings})

    class Files:
        def open(self, path, mode):
            opened.append(path)
            return DirFileSystem(str(shards)).open(path.removeprefix("datasets/owner/name@c0ffee/"), mode)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    data = open_pairs("pickapic:owner/name@v1", tmp_path)
    assert colours(data.winners([0, 1])) == ["red", "blue"] and len(data) == 6
    assert all(path.startswith("datasets/owner/name@c0ffee/data/train-") for path in opened)


def test_reads_from_the_hub_go_on_where_an_outage_broke_them(shards, tmp_path, monkeypatch):
    """Every read fails once, having moved on in the file; the pairs are those of a hub that is well."""
    import huggingface_hub

    failed, waits = [], []

    class Breaking(io.FileIO):
        def read(self, size=-1):
            if (place := (self.name, self.tell())) not in failed:
                failed.append(place)
                super().read(size // 2 if size > 1 else size)
                raise ConnectionResetError("connection reset by peer")
            return super().read(size)

    class Api:
        def dataset_info(self, name, revision=None):
            files = [path.relative_to(shards).as_posix() for path in shards.rglob("*.parquet")]
            return type(
                "Info", (), {"sha": "abad1dea", "siblings": [SimpleNamespace(rfilename=name) for name in files]}
            )

    class Files:
        def open(self, path, mode):
            return Breaking(shards / path.removeprefix("datasets/owner/breaking@abad1dea/"), mode)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    monkeypatch.setattr("time.sleep", waits.append)
    data = open_pairs("pickapic:owner/breaking", tmp_path)
    assert colours(data.winners([0, 1])) == ["red", "blue"] and len(data) == 6
    assert len(failed) > 5 and waits == [5.0] * len(failed)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def dataset_info(self, name, revision=None):
            raise OSError("404 Client Error\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    text = complaint("pickapic:gone/pickapic", tmp_path)
    assert text.startswith("gone/pickapic: no such folder, and the hub failed: 404 Client Error (a mirror")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pickapic:{}/nowhere", "no such folder of parquet files"),
        ("folder:{}/nowhere", "no such folder of images"),
        ("folder:{}/empty", "expected .png, .jpg, .jpeg, .webp files, found none"),
        ("pickapic:{}/empty", "expected parquet files, found none"),
        ("pikapic:x", "unknown source 'pikapic:x'"),
        ("folder:", "unknown source"),
        ("world", "data.size: the drawn world has no end"),
    ],
)
def test_what_is_not_there_is_named(spec, said, tmp_path):
    (tmp_path / "empty").mkdir()
    assert said in complaint(spec.format(tmp_path), tmp_path)


def test_other_columns_name_what_was_expected_and_found(tmp_path):
    """As of `pickapic_v2_no_images`."""
    folder = fake_pickapic.write(tmp_path / "pap", ROWS, without=["jpg_0", "jpg_1"])
    text = complaint(f"pickapic:{folder}", tmp_path)
    assert "expected the columns caption, label_0, jpg_0, jpg_1, found no jpg_0, jpg_1 in train-00000" in text
    assert "which has are_different, best_image_uid" in text
    ties = fake_pickapic.write(tmp_path / "ties", [[row("a tie", 0.5)]])
    assert 'no usable pair in 1 rows; left out: {"tie": 1}' in complaint(f"pickapic:{ties}", tmp_path)
    (tmp_path / "no.parquet").write_text("not parquet at all")
    assert "shard no.parquet cannot be read" in complaint(f"pickapic:{tmp_path / 'no.parquet'}", tmp_path)


def test_a_world_of_another_size_than_the_pipeline_is_refused(tmp_path):
    assert "drawings have 64 pixels, the pipeline expects 512" in complaint("world", tmp_path, size=3, resolution=512)
    with pytest.raises(UsageError, match=r"data\.deduplicate is for pickapic"):
        open_pairs("world", tmp_path, size=3, resolution=64, deduplicate="prompt")


# --- folders ---


def save(path: Path, colour, size=(40, 40), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(options.pop("mode", "RGB"), size, colour).save(path, **options)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    save(folder / "a.png", (255, 0, 0))
    save(folder / "sub" / "b.JPG", (0, 0, 255), format="JPEG")
    save(folder / "c.webp", (0, 255, 0))
    return folder


CAPTIONS = {"a.png": "red, all over", "sub/b.JPG": "blue", "lost.png": "gone"}


@pytest.mark.parametrize("form", ["metadata.jsonl", "captions.csv", "txt"])
def test_captions_come_in_three_forms(images, tmp_path, form):
    if form == "txt":
        for name, caption in CAPTIONS.items():
            (images / name).with_suffix(".txt").write_text(caption + "\n")
    elif form.endswith("csv"):
        lines = [f'{name},"{caption}"' for name, caption in CAPTIONS.items()]
        (images / form).write_text("\n".join(["file_name,caption", *lines]))
    else:
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in CAPTIONS.items()]
        (images / form).write_text("\n".join(lines))
    data = open_pairs(f"folder:{images}", tmp_path)
    assert data.prompts == ["red, all over", "blue"] and not data.paired
    assert colours(data.winners([1, 0])) == ["blue", "red"]
    left_out = data.record()["left_out"]
    assert left_out["no caption"] == 1 and left_out.get("no such image", 0) == (form != "txt")
    with pytest.raises(BenchError, match="one image a prompt, so there are no losers"):
        data.losers([0])
    assert open_pairs(f"folder:{images}", tmp_path, size=1).prompts == ["red, all over"]


def test_a_folder_without_captions_is_one_line(images, tmp_path):
    text = complaint(f"folder:{images}", tmp_path)
    assert "3 images, but none with a caption; expected captions in metadata.jsonl" in text


def test_a_broken_image_in_a_folder_is_named(images, tmp_path):
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    (images / "a.png").write_bytes(BROKEN)
    with pytest.raises(BrokenRows) as caught:
        open_pairs(f"folder:{images}", tmp_path).winners([0])
    assert caught.value.problems[0].startswith("undecodable image: ")


def test_links_to_nothing_pipes_and_captions_in_another_encoding_are_counted_by_name(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("good", "latin"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    for name in ("good", "link", "pipe"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    record = open_pairs(f"folder:{folder}", tmp_path, resolution=64).record()
    assert record["pairs"] == 1 and record["rows"] == 4
    assert record["left_out"] == {"no caption": 1, "no such image": 2}
    assert set(record["examples"]) == {"latin.png: no caption", "link.png: no such image", "pipe.png: no such image"}


def test_images_are_cut_from_the_middle_upright_and_rgb():
    import io

    wide = Image.new("RGB", (120, 40), (0, 0, 255))
    wide.paste((255, 0, 0), (40, 0, 80, 40))
    tall = Image.new("RGBA", (20, 20), (9, 9, 9, 0))
    for image, expected in ((wide, (255, 0, 0)), (tall, (9, 9, 9)), (Image.new("L", (300, 200), 7), (7, 7, 7))):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pixels = read_image(buffer.getvalue(), 24)
        assert pixels.shape == (24, 24, 3) and (pixels[2:-2, 2:-2] == expected).all()
    turned = Image.new("RGB", (40, 40), (0, 0, 255))
    turned.paste((255, 0, 0), (0, 0, 40, 20))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert colours(read_image(buffer.getvalue(), 40)[None, 25:]) == ["red"]


# --- prompt files ---


def deep(mode: str) -> bytes:
    """A horizontal gradient over all 65536 levels, as a PNG of 16 bits a channel."""
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(64, 0)
    buffer = io.BytesIO()
    if mode == "grey":
        Image.fromarray(levels).save(buffer, "png")
        return buffer.getvalue()
    raw = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in levels)  # Pillow writes no such file

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["grey", "colour"])
def test_16_bits_are_scaled_to_8_in_training_and_scoring(mode):
    """Level v of 65535 is v / 257 of 255; cut instead, the gradient is white (mean 254.5)."""
    content = deep(mode)
    expected = np.linspace(0, 255, 64)
    for image in (read_image(content, 64), np.asarray(to_rgb(Image.open(io.BytesIO(content))))):
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert abs(image - expected[None, :, None]).max() <= 1
    wide = Image.fromarray(np.full((4, 4), 70000, np.int32))
    with pytest.raises(ValueError, match="grey values from 70000 to 70000, expected 0 to 65535"):
        to_rgb(wide)


def test_published_prompt_files_load(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na "quoted word\tArts\tSymbols\t-\n1999\tx\ty\t\n'
    )
    expected = ("bond", 'a "quoted word', "1999")
    assert load_prompts(str(tmp_path / "PartiPrompts.tsv")).prompts == expected
    assert load_prompts(f"partiprompts:{tmp_path}").prompts == expected
    for style in ("anime", "concept-art", "paintings", "photo", "drawbench"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
    prompts = load_prompts(f"hpsv2:{tmp_path}").prompts
    assert len(prompts) == 8 and prompts[:3] == ("anime one", "anime two", "concept-art one")
    (tmp_path / "x.json").write_text('{"prompt": "a"}')
    with pytest.raises(BenchError, match=r"x\.json cannot be read: expected a list of prompts, found a dict"):
        load_prompts(str(tmp_path / "x.json"))
    (tmp_path / "photo.json").unlink()
    with pytest.raises(BenchError, match=r"not found: .*photo\.json"):
        load_prompts(f"hpsv2:{tmp_path}")


def test_a_published_set_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fails(*arguments, **options):
        raise OSError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(BenchError, match=r"the hub: offline \(with PartiPrompts.tsv in a folder: partiprompts:FOLDER"):
        load_prompts("partiprompts")
