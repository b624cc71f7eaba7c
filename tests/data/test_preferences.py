"""Preference sets in their published schemas: what is read, what is left out and why, what is refused."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import fake_pickapic
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.data import PreferenceData, preferences
from bench.data.preferences import load_preferences
from bench.errors import BenchError, UsageError

ENTRIES = {
    "hpdv2": [
        {"prompt": "a cat", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 3], "raw_annotations": []},
        {"prompt": "a dog", "image_path": ["3.png", "4.png"], "rank": [1, 1], "raw_annotations": []},
    ],
    "imagereward": [
        {
            "id": "005658-0040",
            "prompt": "a cat",
            "generations": [f"part-1/images/{k}.png" for k in range(4)],
            "ranking": [1, 2, 5, 3],
        }
    ],
}


def load(spec: str, tmp_path: Path, **options) -> preferences.Preferences:
    return load_preferences(spec, cache=tmp_path / "cache", **options)


def draw(folder: Path, *names: str) -> None:
    """Plain pictures, the number in their names being how red they are."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (int(Path(name).stem), 0, 0)).save(folder / name)


def red(pictures: list[Image.Image]) -> list[int]:
    return [picture.convert("RGB").getpixel((0, 0))[0] for picture in pictures]


def write(path: Path, entries: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def test_pickapic_keeps_ties_and_leaves_out_what_has_no_label(tmp_path: Path) -> None:
    rows = [
        fake_pickapic.row("won by the first", 1.0, 0, has_label=True),
        fake_pickapic.row(" a tie ", 0.5, 1, has_label=True),
        fake_pickapic.row("won by the second", 0.0, 2, has_label=True),
        fake_pickapic.row("never judged", None, 3, has_label=False),
        fake_pickapic.row("says so", 0.0, 4, has_label=False),
        fake_pickapic.row(None, 1.0, 5, has_label=True),
    ]
    fake_pickapic.write(tmp_path / "pick", [rows[:3], rows[3:]], split="test_unique")
    found = load(f"pickapic:{tmp_path / 'pick'}", tmp_path)
    assert found.schema == "pickapic" and found.spec.endswith("#test_unique")
    assert [one.prompt for one in found.judgements] == ["won by the first", "a tie", "won by the second"]
    assert [one.ranks for one in found.judgements] == [(0, 1), (0.5, 0.5), (1, 0)]
    assert found.left_out == {"no label": 2, "no caption": 1}
    first = found.pictures([2, 0])[1]
    assert [picture.convert("RGB").getpixel((0, 0))[0] > 200 for picture in first] == [True, False]  # red, then blue
    assert first[0].size == (96, 64)  # as published, not resized
    assert len(load(f"pickapic:{tmp_path / 'pick'}#test_unique", tmp_path, limit=2).judgements) == 2


def test_a_broken_picture_is_the_reason_of_its_judgement_alone(tmp_path: Path) -> None:
    rows = [fake_pickapic.row("whole", 1.0), fake_pickapic.row("cut", 1.0, 1), fake_pickapic.row("gone", 0.0, 2)]
    rows[1]["jpg_1"], rows[2]["jpg_0"] = rows[1]["jpg_1"][:100], None
    fake_pickapic.write(tmp_path / "pick", [rows], split="test")
    whole, cut, gone = load(f"pickapic:{tmp_path / 'pick'}#test", tmp_path).pictures([0, 1, 2])
    assert len(whole) == 2 and cut == "undecodable picture" and gone == "missing picture"


def test_shards_without_has_label_go_by_their_labels(tmp_path: Path) -> None:
    rows = [fake_pickapic.row("a", 1.0), fake_pickapic.row("b", None, 1)]
    fake_pickapic.write(tmp_path / "pick", [rows], split="test", without=["has_label"])
    assert [one.prompt for one in load(f"pickapic:{tmp_path / 'pick'}#test", tmp_path).judgements] == ["a"]


@pytest.mark.parametrize("place", ["", "test", "images", "given"])
def test_hpdv2_finds_its_pictures_beside_the_file(tmp_path: Path, place: str) -> None:
    file = write(tmp_path / "HPD" / "test.json", ENTRIES["hpdv2"])
    draw((tmp_path if place == "given" else file.parent) / place, *(f"{k}.png" for k in range(5)))
    found = load(f"hpdv2:{file}", tmp_path, images=tmp_path / "given" if place == "given" else None)
    assert [one.ranks for one in found.judgements] == [(2, 1, 3), (1, 1)]
    assert [red(pictures) for pictures in found.pictures([0, 1])] == [[0, 1, 2], [3, 4]]


def test_hpdv2_training_pairs_say_which_is_preferred(tmp_path: Path) -> None:
    entries = [{"prompt": "p", "file_path": ["0.png", "1.png"], "human_preference": [0, 1], "user_hash": "x"}]
    draw(tmp_path / "train", "0.png", "1.png")
    (one,) = load(f"hpdv2:{write(tmp_path / 'train.json', entries)}", tmp_path).judgements
    assert one.ranks[1] < one.ranks[0]  # the smaller rank is the better


@pytest.mark.parametrize("name", ["test.tar.gz", "test_images.zip", "pictures.zip"])
def test_published_archives_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    schema = "hpdv2" if name == "test.tar.gz" else "imagereward"
    names = ["test/0.png", "test/1.png", "test/2.png"] if schema == "hpdv2" else ENTRIES[schema][0]["generations"]
    draw(tmp_path / "raw", *names)
    file = write(tmp_path / "set" / "test.json", ENTRIES[schema][:1])
    archive = file.with_name(name)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for one in names:
                packed.write(tmp_path / "raw" / one, one)
    else:
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(tmp_path / "raw" / "test", "test")
    images = archive if name == "pictures.zip" else None
    found = load(f"{schema}:{file}", tmp_path, images=images)
    assert red(found.pictures([0])[0]) == list(range(len(names)))
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(BenchError, match=f"{name} cannot be unpacked"):
        load(f"{schema}:{file}", tmp_path, images=images)


def test_a_parquet_file_of_the_same_columns_is_read_alike(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ENTRIES["imagereward"]), tmp_path / "test.parquet")
    draw(tmp_path / "test_images", *ENTRIES["imagereward"][0]["generations"])
    assert load(f"imagereward:{tmp_path / 'test.parquet'}", tmp_path).judgements[0].ranks == (1, 2, 5, 3)


def test_entries_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    good = {"prompt": "p", "image_path": ["0.png", "1.png"], "rank": [1, 2]}
    wrong = [
        {"prompt": " "},
        {"rank": [1]},
        {"rank": None},
        {"image_path": ["0.png"], "rank": [1]},
        {"rank": [1, None]},
        {"rank": [1, float("nan")]},
        {"image_path": ["0.png", 7]},
    ]
    draw(tmp_path / "test", "0.png", "1.png")
    away = {"image_path": ["0.png", "9.png"]}, {"image_path": ["../secret.png", "1.png"]}
    file = write(tmp_path / "test.json", [good, *(good | change for change in (*away, *wrong))])
    found = load(f"hpdv2:{file}", tmp_path)
    assert found.left_out == {
        "no prompt": 1,
        "not one rank a picture": 2,
        "fewer than two pictures": 1,
        "no rank": 2,
        "no name of a picture": 1,
    }
    assert found.pictures([1, 2]) == ["missing picture", "picture outside the folder"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("hpdv2:{}/other.json", r"expected a list of entries with prompt, image_path, rank, or prompt, file_path, "),
        ("imagereward:{}/other.json", r"entries with prompt, generations, ranking; found caption, score$"),
        ("imagereward:{}/dict.json", r"found dict$"),
        ("hpdv2:{}/mixed.json", "expected a list of entries"),
        ("hpdv2:{}/text.json", "text.json cannot be read: Expecting value"),
        ("hpdv2:{}/empty.json", "expected a list of entries"),
        ("hpdv2:{}/gone.json", "no such file of preferences"),
        (
            "hpdv2:{}/lost.json",
            "its pictures were not found: no 0.png in .*; name their folder or archive with --images",
        ),
        ("pickapic:{}/pick", "expected the columns caption, label_0, jpg_0, jpg_1, found no jpg_0, jpg_1 in"),
        ("pickapic:{}/none", "no such folder of parquet files"),
    ],
)
def test_another_schema_is_refused_in_one_line(tmp_path: Path, spec: str, said: str) -> None:
    write(tmp_path / "other.json", [{"caption": "a", "score": 1}])
    write(tmp_path / "dict.json", {"prompt": "a"})
    write(tmp_path / "mixed.json", [ENTRIES["hpdv2"][0], "a"])
    write(tmp_path / "empty.json", [])
    write(tmp_path / "lost.json", ENTRIES["hpdv2"])
    (tmp_path / "text.json").write_text("a cat")
    fake_pickapic.write(tmp_path / "pick", [[fake_pickapic.row("a", 1.0)]], "test_unique", without=["jpg_0", "jpg_1"])
    with pytest.raises(BenchError, match=said) as caught:
        load(spec.format(tmp_path), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("hpdv3:x.json", r"no such preference set \(did you mean 'hpdv2'\?\); one of world\[:SPLIT\], pickapic:"),
        ("test.json", "name its schema before it"),
        ("pickapic", "one of world"),
        ("world:tset", r"no such split \(did you mean 'test'\?\)"),
    ],
)
def test_a_wrong_name_is_a_mistake_of_the_caller(tmp_path: Path, monkeypatch, spec: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "test.json", [])
    with pytest.raises(UsageError, match=said):
        load(spec, tmp_path)
    with pytest.raises(UsageError, match="--images goes with hpdv2 and imagereward"):
        load("world", tmp_path, images=tmp_path)


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    fake_pickapic.write(tmp_path / "pick", [[fake_pickapic.row("a", None)]], "test_unique")
    with pytest.raises(BenchError, match="no usable judgement; left out: no label 1"):
        load(f"pickapic:{tmp_path / 'pick'}", tmp_path)


def test_the_hub_is_asked_for_the_published_files(tmp_path: Path, monkeypatch) -> None:
    draw(tmp_path / "raw", "0.png", "1.png", "2.png", "3.png", "4.png")
    write(tmp_path / "hub" / "test.json", ENTRIES["hpdv2"])
    with tarfile.open(tmp_path / "hub" / "test.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "raw", "test")
    asked = []

    def download(name: str, file: str, repo_type: str, revision: str | None) -> str:
        asked.append((name, file, repo_type, revision))
        if name == "owner/gone":
            raise OSError("404\nand more")
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert red(load("hpdv2:owner/name@abc", tmp_path).pictures([0])[0]) == [0, 1, 2]
    assert asked == [("owner/name", file, "dataset", "abc") for file in ("test.json", "test.tar.gz")]
    with pytest.raises(BenchError, match="no such file, and the hub failed: 404 ") as caught:
        load("hpdv2:owner/gone", tmp_path)
    assert "\n" not in str(caught.value)


def test_people_of_the_drawn_world_are_those_of_its_pairs(tmp_path: Path) -> None:
    found = load("world:validation", tmp_path, limit=200)
    pairs = PreferenceData(200, preferences.WORLD_SEED, "validation").pairs
    assert [one.prompt for one in found.judgements] == [pair.winner.caption for pair in pairs]
    assert {one.ranks for one in found.judgements} == {(1.0, 2.0)} and not found.left_out
    assert found.truth(3) == (pairs[3].winner.utility, pairs[3].loser.utility)
    worse = sum(found.truth(row)[0] < found.truth(row)[1] for row in range(200))
    assert 10 < worse < 90  # people are noisy, and better than a coin
    (pictures,) = found.pictures([3])
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
