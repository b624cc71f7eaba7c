"""Do the metrics agree with each other and with the judge? Rank correlations, and models ranked apart.

Three questions, because a metric can pass one and fail the next:

- images: does it put all images of one setting (every model, prompt and sampling seed) in the same order?
- changes: does it rise on the prompts on which the other rises, from base to the model (mean over training seeds)?
- models: does it put the means of the models in the same order? Beside it stands how many pairs of models both
  tell apart (`bench.reports.apart`), and how many of those the other way round: where a metric and the judge do that,
  the metric is being gamed.

The three are told together: a metric may order a handful of models well and see nothing in a single image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from bench.reports import layouts, stats, tables
from bench.reports.apart import RULE
from bench.reports.load import BASE, Runs
from bench.reports.uncertainty import LEVEL

STAT = "agreement"
UNITS = ("images", "changes", "models")
UNIT_TITLES = {"images": "over images", "changes": "over changes to base", "models": "over means of models"}
LEVELS = {"images": "Image by image", "changes": "Prompt by prompt", "models": "Model by model"}
RESAMPLES = 500
FEWEST, WORK = 100, 8_000_000  # of many rows there are fewer resamples, about WORK ranked rows in all: their interval
# is narrow, and 100 place its ends within a sixth of its width
CHUNK = 1_000_000  # rows ranked at a time: a few tens of MB
COLUMNS = [
    "prompt_set",
    "guidance",
    "unit",
    "first",
    "second",
    "spearman",
    "low",
    "high",
    "kendall",
    "n",
    "n_prompts",
    "told_apart",
    "opposed",
    "opposed_models",
    "protocol",
    "first_title",
    "second_title",
    "beside",
]
NOTE = (
    "Spearman's rank correlation; [low, high]: 95 % interval, bootstrap over prompts, for these models and training "
    "seeds; where less is better, of the negative. Over changes to base: prompt by prompt, all models together. Told "
    "apart: pairs of models that both tell "
    f"apart; opposed: those of them that the two rank the other way round. {RULE}"
)


def table(
    runs: Runs,
    prompt_set: str | None = None,
    guidance: float | None = None,
    metrics: Sequence[str] | None = None,
    protocol: str | None = None,
) -> pd.DataFrame:
    """One row for each setting, unit and pair of metrics (columns: COLUMNS); arguments as `tables.table`'s.

    spearman, low, high: rank correlation and its interval. kendall: tau-b. n: images, changes or models compared.
    told_apart, opposed, opposed_models (units of models only): see above; "A > B" is what `first` says. beside: whether
    it is a learned metric beside what decides who won by the truth (`columns.lead`), which comes second.
    """
    protocol = protocol or tables.default_protocol(runs)
    tables.one_of(protocol, stats.PROTOCOLS, "protocol")
    chosen = tables.chosen_metrics(runs, metrics)
    parts = [setting(runs, group, chosen, protocol) for group in tables.chosen_groups(runs, prompt_set, guidance)]
    return pd.concat(parts, ignore_index=True)


def setting(runs: Runs, group: tuple[str, float], metrics: Sequence[str], protocol: str) -> pd.DataFrame:
    """The rows of one prompt set and guidance; computed once for whoever asks."""
    key = (*group, tuple(metrics), protocol)
    if key not in runs.agreements:
        runs.agreements[key] = _setting(runs, group, metrics, protocol)
    return runs.agreements[key]


def matrix(rows: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Spearman's correlations of one unit of one setting as a symmetric frame, metrics by metrics."""
    own = rows[rows["unit"] == unit]
    names = list(dict.fromkeys([*own["first"], *own["second"]]))
    found = pd.DataFrame(np.eye(len(names)), names, names)
    for row in own.itertuples():
        found.loc[row.first, row.second] = found.loc[row.second, row.first] = row.spearman
    return found


def _setting(runs: Runs, group: tuple[str, float], metrics: Sequence[str], protocol: str) -> pd.DataFrame:
    scores = tables.group_scores(runs, group)
    there = [scores.column(name) for name in metrics if name in scores.metrics]
    places, lead = [scores.columns.index(column) for column in there], tables.lead_column(runs)
    signs = np.array([column.sign for column in there])
    read = signs * stats.per_prompt(scores, protocol)[..., places]
    values = {"images": _images(scores, places, signs), "changes": _changes(scores, read)}
    found = [
        (unit, *row)
        for unit, (rows, prompts) in values.items()
        for row in _over_rows(rows, prompts, len(scores.prompts))
    ]
    found += [("models", *row) for row in _over_models(read)]
    names = [column.name for column in there]
    told = _told_apart(runs, group, names, protocol) if len(scores.models) > 1 else {}
    rows = []
    for unit, first, second, *estimate, kendall, n in found:
        pair = there[first], there[second]
        apart = told[names[first], names[second]] if unit == "models" and told else (pd.NA, pd.NA, "")
        beside = lead.truth and pair[1] == lead and not pair[0].truth
        rows.append(
            (
                *group,
                unit,
                names[first],
                names[second],
                *estimate,
                kendall,
                n,
                len(scores.prompts),
                *apart,
                protocol,
                *map(layouts.spoken_name, pair),
                beside,
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS).astype({"told_apart": "Int64", "opposed": "Int64"})


# --- what is compared ---


def _images(scores: stats.Scores, places: Sequence[int], signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every image [N, metrics] and the prompt of each [N]; an untrained model counts once."""
    values = signs * scores.values[..., places]
    for index, model in enumerate(scores.models):
        if model in scores.untrained:
            values[index, 1:] = np.nan
    prompts = np.broadcast_to(np.arange(len(scores.prompts))[:, None], values.shape[:-1])
    return _known(values.reshape(-1, len(places)), prompts.ravel())


def _changes(scores: stats.Scores, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-prompt differences to the base, mean over training seeds, of all models together: [N, metrics]."""
    if BASE not in scores.models:
        return np.empty((0, read.shape[-1])), np.empty(0, int)
    base = scores.models.index(BASE)
    gain = np.ma.masked_invalid(np.delete(read - read[base], base, axis=0)).mean(axis=1).filled(np.nan)
    prompts = np.broadcast_to(np.arange(read.shape[2]), gain.shape[:-1])
    return _known(gain.reshape(-1, read.shape[-1]), prompts.ravel())


def _known(values: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    some = np.isfinite(values).any(axis=1)
    return values[some], prompts[some]


# --- rank correlations ---


def _over_rows(values: np.ndarray, prompts: np.ndarray, count: int) -> Iterator[tuple]:
    """(first, second, spearman, low, high, kendall, n) of each pair of columns of values [N, metrics]."""
    from scipy.stats import kendalltau

    resamples = int(np.clip(WORK // max(1, len(values)), FEWEST, RESAMPLES))
    counts = np.concatenate([np.ones((count, 1), np.float32), stats.resample_counts(count, resamples)], axis=1)
    for rows, pairs in _by_presence(values):
        own = values[rows]
        if len(own) < 3:
            continue
        size = max(1, CHUNK // len(own))
        replicates = np.concatenate(
            [spearman(own, counts[:, start : start + size][prompts[rows]]) for start in range(0, counts.shape[1], size)]
        )
        for first, second in pairs:
            kendall = kendalltau(own[:, first], own[:, second]).statistic
            yield first, second, *_interval(replicates[:, first, second]), kendall, len(own)


def _over_models(read: np.ndarray) -> Iterator[tuple]:
    """The same of the models' means; read: [models, training seeds, prompts, metrics]."""
    from scipy.stats import kendalltau, rankdata

    data = np.ma.masked_invalid(read).mean(axis=1).filled(np.nan)
    present = np.isfinite(data).any(axis=1)
    shared = data[:, (np.isfinite(data) | ~present[:, None]).all(axis=(0, 2))]
    if not shared.shape[1]:
        return
    counts = stats.resample_counts(shared.shape[1], RESAMPLES)
    means = np.concatenate([shared.mean(axis=1)[None], np.einsum("kpm,pb->bkm", shared, counts) / len(counts)])
    for rows, pairs in _by_presence(means[0]):
        if rows.sum() < 3:
            continue
        own = means[:, rows]
        ranks = rankdata(own, axis=1)
        replicates = correlation(ranks.transpose(0, 2, 1), np.ones((len(ranks), 1, ranks.shape[1])))
        for first, second in pairs:
            kendall = kendalltau(own[0, :, first], own[0, :, second]).statistic
            yield first, second, *_interval(replicates[:, first, second]), kendall, int(rows.sum())


def _by_presence(values: np.ndarray) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Pairs of columns by the rows in which both have a value; where nothing is missing, all pairs at once."""
    present = np.isfinite(values)
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for first, second in combinations(range(values.shape[1]), 2):
        groups.setdefault((present[:, first] & present[:, second]).tobytes(), []).append((first, second))
    for rows, pairs in groups.items():
        yield np.frombuffer(rows, bool), pairs


def spearman(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's correlations [B, M, M] of the columns of values [N, M], row n counted weights[n, b] times.

    Ranks are those within each resample (ties share their mean rank), not those of the whole sample.
    """
    ranks = np.stack([weighted_ranks(column, weights) for column in values.T])
    return correlation(ranks.transpose(2, 0, 1), weights.T[:, None])


def weighted_ranks(column: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks [N, B] of column [N], up to a constant, when row n is there weights[n, b] times."""
    order = column.argsort(kind="stable")
    ordered = column[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(column)]
    total = np.concatenate([np.zeros((1, weights.shape[1])), weights[order].cumsum(axis=0, dtype=np.float64)])
    ranks = np.empty(weights.shape)
    ranks[order] = np.repeat((total[starts] + total[ends]) / 2, ends - starts, axis=0)
    return ranks


def correlation(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlations [B, M, M] of values [B, M, N] with weights [B, 1, N]; NaN without spread."""
    centred = values - (values * weights).sum(axis=2, keepdims=True) / weights.sum(axis=2, keepdims=True)
    covariance = (centred * weights) @ centred.transpose(0, 2, 1)
    spread = np.sqrt(np.einsum("bii->bi", covariance))
    scale = spread[:, :, None] * spread[:, None]
    return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def _interval(replicates: np.ndarray) -> stats.Estimate:
    """The first is of the sample itself, the others of its resamples; without spread there is no correlation."""
    tail, drawn = (1 - LEVEL) / 2, replicates[1:]
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(replicates[0]) or not len(drawn):
        return stats.Estimate(np.nan, np.nan, np.nan)
    return stats.Estimate(replicates[0], *np.quantile(drawn, [tail, 1 - tail]))


# --- models told apart ---


def _told_apart(
    runs: Runs, group: tuple[str, float], metrics: Sequence[str], protocol: str
) -> dict[tuple[str, str], tuple]:
    """(pairs of models told apart by both, of those ranked the other way round, which) by pair of metrics."""
    beats = {metric: tables.apart(runs, group, metric, "mean", protocol).beats for metric in metrics}
    order = {
        metric: [(better, worse) for worse in runs.models for better in runs.models if worse in found.get(better, ())]
        for metric, found in beats.items()
    }
    found = {}
    for first, second in combinations(metrics, 2):
        opposed = [pair for pair in order[first] if pair[::-1] in order[second]]
        both = len(opposed) + sum(pair in order[second] for pair in order[first])
        found[first, second] = both, len(opposed), "; ".join(f"{better} > {worse}" for better, worse in opposed)
    return found


# --- layouts ---


def render(tidy: pd.DataFrame, format: str = "text") -> str:
    """csv and json as tidy rows; text, md and latex: each metric beside the judge, then all with all."""
    tables.one_of(format, tables.FORMATS, "--format")
    if format in ("csv", "json"):
        return tables.render(tidy, format)
    if tidy.empty:
        return "nothing to compare: agreement needs at least two metrics and three images\n"
    draw, escaped = {
        "text": (_text, str),
        "md": (layouts.markdown, layouts.markdown_text),
        "latex": (layouts.latex, layouts.latex_text),
    }[format]
    shown = []
    for _, rows in tidy.groupby(["prompt_set", "guidance"], sort=False):
        said = sentence(rows)
        shown += [_paragraph(f"{caption(rows)}. {said}", format, escaped)] if said else []
        shown += [draw(*block) for block in _blocks(rows, escaped)]
    return "\n\n".join([*shown, _paragraph(NOTE, format, escaped)]) + "\n"


def _paragraph(text: str, format: str, escaped: Callable[[str], str]) -> str:
    return "\n".join(layouts.folded(text)) if format == "text" else escaped(text)


def _text(heading: str, header: list[str], body: list[list[str]]) -> str:
    return "\n".join([heading, *layouts.wrapped(header, body)])


def _blocks(rows: pd.DataFrame, escaped: Callable[[str], str]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(heading, header, body) of one setting."""
    where = caption(rows)
    beside = _beside_judge(rows)
    if len(beside):
        yield f"agreement with {judged(rows)} · {where}", *with_judge(rows)
        yield from _opposed_block(rows, where, escaped)
    for unit in UNITS:
        square = matrix(rows, unit)
        if len(square):
            titles = titled(rows, square)
            body = [
                [title, *(_number(value) for value in line)]
                for title, line in zip(titles, square.to_numpy(), strict=True)
            ]
            yield f"agreement of all with all, {UNIT_TITLES[unit]} · {where}", ["metric", *titles], body


def titled(rows: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """What these columns are called where nothing else says whose they are."""
    known = {
        **dict(zip(rows["first"], rows["first_title"], strict=True)),
        **dict(zip(rows["second"], rows["second_title"], strict=True)),
    }
    return [known[name] for name in names]


def caption(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return " · ".join(
        [
            f"prompt set {first['prompt_set']}",
            f"guidance {first['guidance']:g}",
            f"{first['n_prompts']} prompts",
            layouts.PROTOCOLS[first["protocol"]],
        ]
    )


def with_judge(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and body: each learned metric beside the judge's utility, in every unit, and of how many."""
    beside = _beside_judge(rows)
    counts = {unit: own["n"] for unit, own in beside.groupby("unit")}
    header = [
        "metric",
        *(
            f"{title}, n {layouts.span(counts[unit])}" if unit in counts else title
            for unit, title in UNIT_TITLES.items()
        ),
        "told apart by both",
        "opposed",
    ]
    body = []
    for title, own in beside.groupby("first_title", sort=False):
        by = own.set_index("unit")
        line = [_estimate(by.loc[unit]) if unit in by.index else "-" for unit in UNITS]
        apart = ["-", "-"]
        if "models" in by.index and pd.notna(by.loc["models", "told_apart"]):
            apart = [str(by.loc["models", name]) for name in ("told_apart", "opposed")]
        body.append([str(title), *line, *apart])
    return header, body


def sentence(rows: pd.DataFrame) -> str:
    """Which metrics rank as the judge does at which level, as far as their intervals show; "" without a judge.

    With the judge: the interval of the rank correlation lies above 0; against it: below; neither: around it.
    """
    said = []
    for unit, own in _beside_judge(rows).dropna(subset="spearman").groupby("unit", sort=False):
        sides = {
            "with the judge": own["low"] > 0,
            "against it": own["high"] < 0,
            "neither": (own["low"] <= 0) & (own["high"] >= 0),
        }
        named = {side: ", ".join(own.loc[there, "first_title"]) for side, there in sides.items()}
        said.append(f"{LEVELS[unit]} " + "; ".join(f"{side}: {names}" for side, names in named.items() if names) + ".")
    return " ".join(said)


def opposed(rows: pd.DataFrame) -> dict[str, str]:
    """Title of a metric -> the pairs of models that it and the judge's utility rank in opposite ways."""
    own = _beside_judge(rows)
    return {row.first_title: row.opposed_models for row in own.itertuples() if row.opposed_models}


def _opposed_block(rows: pd.DataFrame, where: str, escaped: Callable[[str], str]) -> Iterator[tuple]:
    body = [[name, escaped(pairs)] for name, pairs in opposed(rows).items()]
    if body:
        yield f"opposed to the judge, both clear of 0 · {where}", ["metric", "says, and the judge the reverse"], body


def judged(rows: pd.DataFrame) -> str:
    """ "the judge's utility"."""
    return "the judge's " + str(_beside_judge(rows)["second_title"].iloc[0]).removeprefix(layouts.JUDGED)


def _beside_judge(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a learned metric and the judge's utility; the judge always comes second."""
    return rows[rows["beside"].astype(bool)]


def _estimate(row: pd.Series) -> str:
    value, low, high = row[["spearman", "low", "high"]]
    return "-" if np.isnan(value) else f"{layouts.number(value, 2)} {layouts.interval(low, high, 2)}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else layouts.number(value, 2)
