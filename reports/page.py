"""One HTML file that can be mailed: no request leaves it, and everything in it is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.reports import cost, layouts, plots, sections, tables
from bench.reports.apart import RULE
from bench.reports.load import Runs
from bench.reports.pictures import AMOUNTS, Amount, gallery, prompt_list
from bench.reports.verdict import headline, verdicts
from bench.storage.stages import atomic_write

MAX_MB = 20.0  # what most mail servers take
MB = 1e6
OPEN = 3  # rows of pictures that are seen at once; the others are folded away
POLICY = (
    "default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'"
)


def write(runs: Runs, output: Path, max_mb: float = MAX_MB) -> Path:
    """Write the report of `runs` as one self-contained HTML file of at most `max_mb` and return its path."""
    output = Path(output)
    if output.is_dir():
        raise BenchError(f"{output} is a folder; give the page a file name, e.g. -o {output / 'report.html'}")
    try:
        atomic_write(output, html(runs, max_mb))
    except OSError as error:
        raise BenchError(f"cannot write {output}: {error.strerror}") from error
    return output


def html(runs: Runs, max_mb: float = MAX_MB) -> str:
    """The page as text. Too large a page is drawn again with fewer and smaller pictures, in the end with none."""
    template = _environment().get_template("template.html")
    shown = context(runs)
    for amount in AMOUNTS:
        text = template.render(shown | pictures(runs, shown, amount) | {"max_mb": max_mb})
        size = len(text.encode())
        if size <= max_mb * MB:
            return text.replace("@SIZE@", f"{size / MB:.1f} MB", 1)
    raise BenchError(
        f"the page is {size / MB:.1f} MB even without pictures, more than --max-mb {max_mb:g}; "
        "allow more or report fewer runs"
    )


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters |= {
        "duration": cost.duration,
        "flops": cost.flops,
        "pretty": _pretty,
        "minus": sections.minus,
        "whole": _whole,
    }
    return environment


def context(runs: Runs) -> dict[str, Any]:
    """Everything the template shows, but for the pictures."""
    palette = plots.colours(runs.models)
    found = verdicts(runs)
    style, script = _looks(palette), _beside("page.js")
    prices = cost.costs(runs)
    lead = tables.lead_column(runs)
    return {
        "suite": runs.protocol.get("suite", {}),
        "protocol": runs.protocol,
        "protocols": runs.protocols,
        "style": sections.safe(style),
        "script": sections.safe(script),
        "policy": sections.safe(POLICY.format(style=_hash(style), script=_hash(script))),
        "models": runs.models,
        "marks": {model: f"m{index}" for index, model in enumerate(palette)},
        "open": OPEN,
        "problems": runs.problems,
        "groups": runs.groups,
        "lead": lead.title,
        "judged": lead.truth,
        "judge_title": layouts.JUDGE_TITLE,
        "rule": RULE,
        "one_seed": layouts.ONE_SEED,
        "reading": layouts.PROTOCOLS[tables.default_protocol(runs)],
        "first": found[0],
        "headline": headline(found),
        "clear": found,
        "price": {row["model"]: row for row in prices.to_dict("records")},
        "price_bars": sections.price_bars(runs, palette),
        "n_seeds": runs.scores["train_seed"].nunique(),
        "newest": str(runs.protocol.get("created", ""))[:10],
        "settings": [sections.setting(runs, one, palette, lead) for one in found],
        "papers": sections.paper_tables(runs),
        "training": sections.training(runs, palette),
        "training_models": [model for model in runs.models if model in set(runs.history["model"])],
    }


def pictures(runs: Runs, shown: dict[str, Any], amount: Amount) -> dict[str, Any]:
    """The galleries of all settings, the numbers behind them, and whether any was cut to make the page smaller."""
    groups = [one["verdict"].group for one in shown["settings"]]
    found = [gallery(runs, one["verdict"].group, one["verdict"].best, amount) for one in shown["settings"]]
    numbers = {
        "prompts": {name: prompt_list(runs, name) for name in dict.fromkeys(name for name, _ in groups)},
        "settings": [one and {"set": name, **one.numbers} for (name, _), one in zip(groups, found, strict=True)],
    }
    return {
        "galleries": found,
        "numbers": json.dumps(numbers, separators=(",", ":")) if any(found) else "",
        "reduced": amount is not AMOUNTS[0],
    }


def _looks(palette: dict[str, str]) -> str:
    """The page's style sheet, the models' colours included: its policy allows no style anywhere else."""
    colours = (f".m{index} {{ background: {colour} }}" for index, colour in enumerate(palette.values()))
    return _beside("page.css") + "\n".join(colours)


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what it lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _whole(text: str) -> Any:
    """The text, no word broken at a hyphen that fits a phone's line: names of models have them."""
    from markupsafe import Markup, escape

    kept = Markup('<span class="nowrap">{}</span>')
    words = ((word, "-" in word and len(word) <= 20) for word in text.split())
    return Markup(" ").join(kept.format(word) if whole else escape(word) for word, whole in words)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
