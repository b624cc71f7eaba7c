"""Measures of pixels: the drawing's equations solved backwards, and what that is worth on drawings of known defects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from bench.data import drawings, world
from bench.mini import pixels
from bench.mini.pixels import LUMA, Ground

NAVY = np.array(world.BACKGROUNDS["navy"]) / 255
ASKED = "a small red circle to the left of a large blue ring on a navy background"


@pytest.mark.parametrize("shade", [1.0, 0.8])
def test_saturation_is_the_severity_whatever_the_shadow(shade):
    """As `world` draws: shadow, then 0.62 towards grey, or chroma times 1 + 1.2 o and contrast times 1 + 0.35 o."""
    shaded = shade * NAVY
    faded = shaded + 0.62 * 0.5 * (0.5 - shaded)
    vivid = shaded + 0.4 * 1.2 * (shaded - shaded @ LUMA)
    vivid = vivid + 0.4 * 0.35 * (vivid - 0.5)
    for colour, severity in ((shaded, 0), (faded, -0.5), (vivid, 0.4)):
        assert pixels.saturation(colour, "navy") == ("navy", pytest.approx(severity, abs=0.021))


def test_the_table_of_colours_is_what_the_world_draws():
    """The middle of drawings without an object there, for a fade and an oversaturation that clips."""
    scene = world.parse("a small red circle to the left of a large blue ring on a navy background")
    for severity, name in ((-0.5, "fade"), (1.0, "oversaturation")):
        defects = np.zeros((1, 5))
        defects[0, world.DEFECTS.index(name)] = abs(severity)
        drawn = world.render([scene], defects, [0])[0, 2, 2] / 255
        place = np.abs(pixels.SEVERITIES - severity).argmin()
        np.testing.assert_allclose(pixels.drawable(NAVY)[-1, place], drawn, atol=0.6 / 255)


def test_saturation_needs_a_hue_and_the_asked_background():
    brown = np.array(world.BACKGROUNDS["brown"]) / 255
    shown, severity = pixels.saturation(brown, "navy")
    assert shown == "brown" and np.isnan(severity)
    for name in ("white", "grey", "black"):
        assert np.isnan(pixels.saturation(np.array(world.BACKGROUNDS[name]) / 255, name)[1])
    shown, severity = pixels.saturation(np.array([0.3, 0.9, 0.3]), "navy")  # no drawing's background
    assert shown == "" and np.isnan(severity)


def test_shadow_and_blotches_by_hand():
    """Severity 0.6 darkens the middle to 1 - 0.21 and slopes by 0.21; blotches of 0.16 keep 2/3 of their deviation."""
    white = np.array(world.BACKGROUNDS["white"]) / 255
    slopes = 0.21 * np.array([[0.6], [0.8]]) * white
    seen = Ground((1 - 0.21) * white, slopes, np.array([0.3, 0.4, 0.0]))
    assert pixels.shadow(seen, "white") == pytest.approx(0.6)
    assert np.isnan(pixels.shadow(seen, "navy"))
    assert pixels.blotches(seen) == pytest.approx(np.sqrt(0.25 / 3) / (0.16 * 2 / 3))


def test_the_plane_is_found_beside_what_covers_it():
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
    image = 120 + 20 * x[..., None] - 10 * y[..., None] + 3 * rng.standard_normal((64, 64, 3))
    image[10:30, 20:50] = (250, 0, 0)  # an object where none was asked for
    seen = pixels.ground(image.astype(np.uint8), np.ones((64, 64), bool))
    np.testing.assert_allclose(seen.colour * 255, 120, atol=1)
    np.testing.assert_allclose(seen.slopes * 255, np.outer([20, -10], np.ones(3)), atol=1)
    np.testing.assert_allclose(seen.spread * 255, 3, atol=1)


@pytest.mark.parametrize(
    ("shown", "share"),
    [
        (ASKED, 1.0),
        (ASKED.replace("blue", "green"), 0.5),
        (ASKED.replace("red", "blue").replace("large blue", "large red"), 0.0),
        ("a small red circle to the left of a small red cross on a navy background", 0.5),
    ],
)
def test_colours_are_told_in_the_asked_places(shown, share):
    image = world.render([world.parse(shown)], np.zeros((1, 5)), [0])
    assert pixels.measure(image, [ASKED])["colours"][0] == share


def test_an_object_that_is_not_there_has_no_colour():
    image = np.full((1, 64, 64, 3), world.BACKGROUNDS["navy"], np.uint8)
    assert pixels.measure(image, [ASKED])["colours"][0] == 0


def test_measures_follow_the_severity_of_drawings():
    """Of mixed defects and wrong attributes; each measure is defined on about half of the backgrounds or on all."""
    rng = np.random.default_rng(1)
    items = [drawings.labelled(5, index) for index in range(200)]
    items = [replace(item, drawn=world.with_errors(item.asked, rng, 0.05)) for item in items]
    found = pixels.measure(drawings.render(items), [item.caption for item in items])
    known = dict(zip(world.DEFECTS, np.array([item.defects for item in items]).T, strict=True))
    for name, least, defined in (
        ("fade", 0.9, 0.4),
        ("oversaturation", 0.9, 0.4),
        ("blotches", 0.8, 1.0),
        ("shadow", 0.85, 0.35),
    ):
        there = np.isfinite(found[name])
        assert there.mean() >= defined
        assert spearmanr(found[name][there], known[name][there]).statistic > least, name
    right = np.array([item.drawn.background == item.asked.background for item in items])
    assert (found["background"] == right).mean() > 0.85
    assert found["colours"].dtype == np.float32 and found["colours"].mean() > 0.85


def test_nothing_to_measure():
    assert all(values.shape == (0,) for values in pixels.measure(np.empty((0, 64, 64, 3), np.uint8), []).values())
