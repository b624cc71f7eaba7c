"""Scores by the hpsv2 and image-reward packages themselves. Run by THEIR Python as a script, never imported.

    python driver.py JOB RESULT

JOB (JSON): metrics (name -> {checkpoint, med_config}), rows ([path, prompt] each), device. RESULT (JSON): scores
(name -> one a row, null where it failed), problems (name -> row -> why), missing (name -> why its package cannot be
used), versions. Without rows nothing is imported, only looked for. A line on stdout is a row done.

What the packages need to run at all is mended here, in memory only:
- hpsv2 1.2.0's wheel lacks CLIP's byte-pair file; the one in clip-anytorch (or open_clip) is the same.
- hpsv2 downloads LAION's weights, only to overwrite them with its checkpoint; it is given none.
- hpsv2 reads its checkpoint again for each image; it is read once.
- image-reward imports `clip` without declaring it, hence clip-anytorch among the requirements.
"""

import gzip
import json
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

BYTE_PAIRS = "bpe_simple_vocab_16e6.txt.gz"
MODULES = {"hpsv2": ("hpsv2",), "hpsv21": ("hpsv2",), "imagereward": ("ImageReward", "clip")}
PACKAGES = ("hpsv2", "image-reward", "torch", "torchvision", "transformers", "timm")


def load_hpsv2(given, device):
    """`hpsv2.score` for one image and prompt."""
    mend_byte_pairs()
    import torch
    from hpsv2 import img_score

    img_score.device = device
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, _, *args, **options: create(name, None, *args, **options)
    torch.load = lru_cache(maxsize=1)(torch.load)
    return lambda path, prompt: img_score.score(path, prompt, cp=given["checkpoint"])[0]


def mend_byte_pairs():
    """Let hpsv2 open the file its wheel lacks in a package that has it."""
    wanted = Path(find_spec("hpsv2").origin).parent / "src" / "open_clip" / BYTE_PAIRS
    places = [Path(spec.origin).parent / BYTE_PAIRS for spec in map(find_spec, ("clip", "open_clip")) if spec]
    found = next((path for path in places if path.exists()), None)
    if wanted.exists() or found is None:
        return
    opened = gzip.open
    gzip.open = lambda file, *args, **options: opened(found if Path(file) == wanted else file, *args, **options)


def load_imagereward(given, device):
    """`ImageReward.score` for one image and prompt."""
    import ImageReward
    import torch

    model = ImageReward.load(given["checkpoint"], device=device, med_config=given["med_config"])

    def score(path, prompt):
        with torch.no_grad():
            return model.score(prompt, path)

    return score


LOADERS = {"hpsv2": load_hpsv2, "hpsv21": load_hpsv2, "imagereward": load_imagereward}


def run(job, done):
    """The result of a job; done() is called after each row."""
    result = {"scores": {}, "problems": {}, "missing": {}, "versions": versions()}
    for name, given in job["metrics"].items():
        absent = [module for module in MODULES[name] if find_spec(module) is None]
        if absent:
            result["missing"][name] = "no module named " + ", ".join(absent)
        if absent or not job["rows"]:
            continue
        try:
            score = LOADERS[name](given, job["device"])
        except Exception as error:  # whatever an old package raises on new libraries
            result["missing"][name] = told(error)
            continue
        values, problems = [], {}
        for row, (path, prompt) in enumerate(job["rows"]):
            try:
                values.append(float(score(path, prompt)))
            except Exception as error:  # such as an alpha channel, which hpsv2 does not take
                values.append(None)
                problems[row] = told(error)
            done()
        result["scores"][name], result["problems"][name] = values, problems
        del score
    return result


def told(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def versions():
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main():
    job, target = (Path(argument) for argument in sys.argv[1:3])
    progress, sys.stdout = sys.stdout, sys.stderr  # the packages print, too

    def done():
        progress.write(".\n")
        progress.flush()

    target.write_text(json.dumps(run(json.loads(job.read_text(encoding="utf-8")), done)), encoding="utf-8")


if __name__ == "__main__":
    main()
