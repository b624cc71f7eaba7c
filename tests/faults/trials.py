"""The trials: one fault each, in a run's life, and what became of the run.

An outcome is `equal` (the commands ended well, and the result is that of an undisturbed run), `told` (a command failed
in one line that names what is wrong, and going on as it says led to that result) or one of BAD.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from faults import damage, operations
from faults.workplace import Child, Ended, Workplace, ids, result

BAD = {
    "wrong": "another result, though something was said",
    "silent": "another result, or damage not found, without a word",
    "lost": "the run cannot be brought to its end",
    "mute": "a failure that is not one line with the cause",
    "hangs": "a command that did not end",
}


class Found(NamedTuple):
    place: str
    outcome: str
    note: str = ""  # what differs or was said, of an outcome in BAD


def judged(work: Workplace, folder: Path, method: str, place: str, *ended: Ended) -> Found:
    """What became of a run whose last command ended well, or did not."""
    last = ended[-1]
    if any("\nhangs" in one.err for one in ended):
        return Found(place, "hangs", last.err[-300:])
    if last.code:
        return Found(place, "lost" if last.clean else "mute", last.last)
    if differing := work.equal(folder, method):
        said = any("bench: " in one.err for one in ended)
        return Found(place, "wrong" if said else "silent", " ".join(differing)[:300])
    return Found(place, "told" if any(one.code > 0 for one in ended) else "equal")


def kill(work: Workplace, draw: random.Random) -> Found:
    """kill -9 at one to three counted operations, then on to the end."""
    folder, method, places = work.fresh(), some_method(draw), []
    left = work.operations[method]
    for _ in range(draw.choice((1, 1, 2, 3))):
        number = draw.randrange(left)
        ended = work.perform(folder, work.going_on(folder, method), operations.send(number, signal.SIGKILL))
        places.append(str(number))
        left = max(1, left - number)
    return judged(work, folder, method, f"{method} operations {' '.join(places)}", ended, go_on(work, folder, method))


def kill_at_random_time(work: Workplace, draw: random.Random) -> Found:
    """kill -9 by the clock, wherever the process is then: in a library's own writing too."""
    folder, method = work.fresh(), some_method(draw)
    seconds = draw.uniform(0.02, 1.2 * work.seconds[method])
    ended = Child(folder, work.line(method), seconds=seconds).wait()
    return judged(work, folder, method, f"{method} {seconds:.2f} s", ended, go_on(work, folder, method))


def stop(work: Workplace, draw: random.Random) -> Found:
    """SIGTERM or Ctrl-C at a counted operation: says how to go on."""
    folder, method = work.fresh(), some_method(draw)
    number, what = draw.randrange(work.operations[method]), draw.choice((signal.SIGTERM, signal.SIGINT))
    ended = work.perform(folder, work.line(method), operations.send(number, what))
    place = f"{method} operation {number} {what.name}"
    if ended.code not in (0, 130) or ended.code and not ended.clean:
        return Found(place, "mute", f"{ended.code} {ended.last}")
    return judged(work, folder, method, place, ended, go_on(work, folder, method))


def _refused(work: Workplace, draw: random.Random, code: int, once: bool) -> Found:
    folder, method = work.fresh(), some_method(draw)
    number = draw.randrange(work.operations[method])
    ended = work.perform(folder, work.line(method), operations.refuse(number, code, once))
    place = f"{method} operation {number} {errno.errorcode[code]}"
    if ended.code and not (ended.clean and "results/" in ended.last):
        return Found(place, "mute", f"{ended.code} {ended.last}")
    return judged(work, folder, method, place, ended, go_on(work, folder, method))


def full(work: Workplace, draw: random.Random) -> Found:
    """From one operation on there is no room."""
    return _refused(work, draw, errno.ENOSPC, once=False)


def full_disk(work: Workplace, draw: random.Random) -> Found:
    """A file system (tmpfs) as small as that: full in the middle of a file, or of an array mapped into memory."""
    folder, method = work.fresh(), some_method(draw)
    size = draw.randrange(8, used(work.finished[method]) // 1024)
    with mounted(folder, f"size={size}k"):
        work.furnish(folder)
        ended = work.perform(folder, work.line(method))
        place = f"{method} {size} kB"
        if ended.code and not ended.clean:
            return Found(place, "mute", f"{ended.code} {ended.last}")
        remount(folder, "size=1g")
        return judged(work, folder, method, place, ended, go_on(work, folder, method))


def read_only(work: Workplace, draw: random.Random) -> Found:
    """From one operation on nothing may be written."""
    return _refused(work, draw, errno.EROFS, once=False)


def read_only_disk(work: Workplace, draw: random.Random) -> Found:
    """A finished run on a disk mounted read-only: it is read as ever, and what must write says why it cannot."""
    folder, method = work.fresh(), some_method(draw)
    command = draw.choice(("verify", "table", "list runs", "report -o {outside}", "export {run} -o {outside}", "run"))
    with mounted(folder, "size=1g"):
        damage.copy_tree(work.finished[method], folder)
        run, outside = ids(folder)[0], work.root / f"outside-{folder.name}"
        line = work.line(method) if command == "run" else command.format(run=run, outside=outside)
        remount(folder, "ro")
        ended = work.perform(folder, line)
        remount(folder, "rw")
        place = f"{method} {command}"
        if (ended.code != 0) != (command == "run") or ended.code and not ended.clean:
            return Found(place, "mute", f"{ended.code} {ended.last}")
        return judged(work, folder, method, place, ended, go_on(work, folder, method))


def broken_operation(work: Workplace, draw: random.Random) -> Found:
    """One operation fails as on a bad disk (EIO), reading ones too."""
    return _refused(work, draw, errno.EIO, once=True)


def slow(work: Workplace, draw: random.Random) -> Found:
    """File operations that take their time, as on a network file system."""
    folder, method = work.fresh(), some_method(draw)
    ended = work.perform(folder, work.line(method), operations.delay(draw.randrange(2**32), 0.05))
    return judged(work, folder, method, method, ended)


def clock(work: Workplace, draw: random.Random) -> Found:
    """The wall clock jumps by years, and the files are as old as another clock says; killed on the way, and resumed."""
    folder, method = work.fresh(), some_method(draw)
    number = draw.randrange(work.operations[method])
    first = operations.all_of(operations.jump_clock(draw.randrange(2**32)), operations.send(number, signal.SIGKILL))
    ended = work.perform(folder, work.line(method), first)
    shift = draw.uniform(-1, 1) * 10 * 365 * 86400
    for path in folder.rglob("*"):
        stat = path.stat()
        os.utime(path, (stat.st_atime + shift, stat.st_mtime + shift))
    line = work.going_on(folder, method)
    last = work.perform(folder, line, operations.jump_clock(draw.randrange(2**32)))
    return judged(work, folder, method, f"{method} operation {number}", ended, last)


def corrupt(work: Workplace, draw: random.Random) -> Found:
    """Damage to a finished run or its cache, then one of the commands that use them."""
    method = some_method(draw)
    folder = work.copy(method)
    path, kind, changed = spoil(folder, draw)
    place = f"{kind} {damage.place(path.relative_to(folder))}"
    if not changed:
        return Found(f"{place} (nothing to damage)", "equal")
    command = draw.choice(("resume", "resume", "verify", "table", "report", "export", "another"))
    ended = USES[command](work, folder, method, path)
    return ended._replace(place=f"{place}: {command}")


def corrupt_midway(work: Workplace, draw: random.Random) -> Found:
    """Damage to what a killed run has left half done, then on with it."""
    folder, method = work.fresh(), some_method(draw)
    number = draw.randrange(work.operations[method] // 10, work.operations[method])
    killed = work.perform(folder, work.line(method), operations.send(number, signal.SIGKILL))
    path, kind, _ = spoil(folder, draw)
    found = resume(work, folder, method, path, killed)
    return found._replace(place=f"{kind} {damage.place(path.relative_to(folder))}: operation {number}")


def resume(work: Workplace, folder: Path, method: str, path: Path, *before: Ended) -> Found:
    ended = go_on(work, folder, method)
    if not ended.code:
        return judged(work, folder, method, "", *before, ended)
    if not ended.clean or path.name not in ended.last:
        return Found("", "mute", ended.last)
    last = go_on(work, folder, method)
    if last.code and path.name == "config.json":  # nobody else knows what it said; the message says what to do
        restore(work, folder, method, path)
        last = go_on(work, folder, method)
    elif last.code and f"remove {path.parent.relative_to(folder)}" in last.last:
        shutil.rmtree(path.parent)
        last = go_on(work, folder, method)
    return judged(work, folder, method, "", *before, ended, last)


def restore(work: Workplace, folder: Path, method: str, path: Path) -> None:
    """Put the settings right by protocol.json, or begin anew where there is none: what the message advises."""
    run = path.parent
    original = work.finished[method] / "results" / "runs" / ids(work.finished[method])[0] / "config.json"
    if (run / "protocol.json").exists():
        path.write_text(original.read_text().replace(original.parent.name, run.name))
        (run / "seal.json").unlink(missing_ok=True)
    else:
        shutil.rmtree(run)


def verify(work: Workplace, folder: Path, method: str, path: Path) -> Found:
    ended = work.perform(folder, "verify")
    named = path.relative_to(folder).as_posix() in ended.out + ended.err
    if not ended.code or not named:
        return Found("", "silent" if not ended.code else "mute", ended.last)
    return resume(work, folder, method, path, ended)


def table(work: Workplace, folder: Path, method: str, path: Path) -> Found:
    return reported(work, folder, method, path, "table --format csv")


def report(work: Workplace, folder: Path, method: str, path: Path) -> Found:
    return reported(work, folder, method, path, "report")


def reported(work: Workplace, folder: Path, method: str, path: Path, line: str) -> Found:
    """What reports show is that of the undisturbed run, or the run is left out and the damaged file named."""
    undisturbed = shown(work, work.finished[method], line)
    ended, page = shown(work, folder, line)
    if "Traceback" in ended.err or ended.code and not ended.clean:
        return Found("", "mute", ended.last)
    if ended.code:
        gone = path.name in ("protocol.json", "config.json")  # then it is no run to reports
        if not gone and path.name not in ended.err:
            return Found("", "mute", ended.last)
    elif (ended.out, page) != (undisturbed[0].out, undisturbed[1]):
        return Found("", "silent" if path.name not in ended.err else "wrong", ended.last)
    return resume(work, folder, method, path)


def shown(work: Workplace, folder: Path, line: str) -> tuple[Ended, bytes]:
    """A report of a folder's runs; that of an undisturbed folder is made once."""
    if (folder, line) not in work.shown:
        (folder / "report.html").unlink(missing_ok=True)
        ended = work.perform(folder, line)
        page = folder / "report.html"
        work.shown[folder, line] = ended, page.read_bytes() if page.exists() else b""
    return work.shown[folder, line]


def export(work: Workplace, folder: Path, method: str, path: Path) -> Found:
    undisturbed = exported(work, work.finished[method], "-before")
    ended = work.perform(folder, f"export {ids(folder)[-1]} -o {folder}-model" if ids(folder) else "list runs")
    if ended.code and not (ended.clean and path.name in ended.err):
        if not (path.name == "config.json" and ended.clean):
            return Found("", "mute", ended.last)
    elif not ended.code and ids(folder) and weights(Path(f"{folder}-model")) != undisturbed:
        return Found("", "silent", "another model")
    return resume(work, folder, method, path, ended)


def exported(work: Workplace, folder: Path, name: str) -> dict[str, bytes]:
    """The weights that `bench export` makes of an undisturbed run, made once."""
    output = Path(f"{folder}{name}")
    if not output.exists():
        assert work.perform(folder, f"export {ids(folder)[-1]} -o {output}").code == 0
    return weights(output)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def another(work: Workplace, folder: Path, method: str, path: Path) -> Found:
    """A new run with the same cache."""
    shutil.move(folder / "results" / "runs", folder / "results" / "others")
    ended = work.perform(folder, work.line(method))
    if ended.code and not (ended.clean and path.name in ended.last):
        return Found("", "mute", ended.last)
    return judged(work, folder, method, "", ended)


def together(work: Workplace, draw: random.Random) -> Found:
    """Two to four processes resume one run that was killed, or begin and resume with one cache; one may be killed."""
    folder, method = work.fresh(), some_method(draw)
    number = draw.randrange(work.operations[method] // 20, work.operations[method])
    work.perform(folder, work.line(method), operations.send(number, signal.SIGKILL))
    begun, count = len(ids(folder)), draw.choice((2, 2, 3, 4))
    wait = " --wait" if begun and draw.random() < 0.7 else ""
    victim = draw.choice((None, draw.randrange(count)))
    children = []
    for process in range(count):
        act = operations.delay(draw.randrange(2**32), 0.1)
        if process == victim:
            act = operations.all_of(act, operations.send(draw.randrange(work.operations[method]), signal.SIGKILL))
        children.append(Child(folder, work.going_on(folder, method) + wait, act))
    ended = [child.wait() for child in children]
    place = f"{method} operation {number}, {count} processes{wait}{'' if victim is None else ', one killed'}"
    for one in ended:
        busy = "is in the hands of" in one.last and not wait
        if one.code not in (0, -signal.SIGKILL) and not (one.clean and busy):
            return Found(place, "mute", f"{one.code} {one.last}")
    if not begun:
        return all_equal(work, folder, method, place)
    return judged(work, folder, method, place, *ended[:0], go_on(work, folder, method))


def all_equal(work: Workplace, folder: Path, method: str, place: str) -> Found:
    """Of several runs begun at once with one cache each is the undisturbed one, where it was not killed."""
    for run in ids(folder):
        last = work.perform(folder, f"run --resume {run}")
        if last.code:
            return Found(place, "lost" if last.clean else "mute", last.last)
        if (found := result(folder, run)) != work.results[method]:
            differing = [name for name in found if found[name] != work.results[method].get(name)]
            return Found(place, "wrong", " ".join(differing)[:300])
    return Found(place, "equal")


def go_on(work: Workplace, folder: Path, method: str) -> Ended:
    return work.perform(folder, work.going_on(folder, method))


def some_method(draw: random.Random) -> str:
    return draw.choice(("spin", "spin", "diffusion_dpo"))


def spoil(folder: Path, draw: random.Random) -> tuple[Path, str, bool]:
    """Damage a file of what a run left: each kind of file as often, whatever their number."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted((folder / "results").rglob("*")):
        if path.is_file() and path.suffix not in (".lock", ".tmp") and path.name != ".lock":
            kinds.setdefault(damage.sort(path.relative_to(folder)), []).append(path)
    path = draw.choice(kinds[draw.choice(sorted(kinds))])
    others = [one for paths in kinds.values() for one in paths]
    kind = draw.choice(damage.KINDS)
    return path, kind, damage.do(kind, path, others, draw)


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class mounted:
    """A file system in memory (tmpfs) at a folder, for whoever may mount one."""

    def __init__(self, folder: Path, options: str):
        self.folder, self.options = folder, options

    def __enter__(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", self.folder], check=True)

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self.folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


USES = {"resume": resume, "verify": verify, "table": table, "report": report, "export": export, "another": another}
"""What may be done with damaged results."""

KINDS: dict[str, tuple[Callable[[Workplace, random.Random], Found], int]] = {
    "kill": (kill, 160),
    "kill_at_random_time": (kill_at_random_time, 60),
    "stop": (stop, 30),
    "corrupt": (corrupt, 140),
    "corrupt_midway": (corrupt_midway, 60),
    "full": (full, 30),
    "full_disk": (full_disk, 30),
    "read_only": (read_only, 10),
    "read_only_disk": (read_only_disk, 10),
    "broken_operation": (broken_operation, 30),
    "slow": (slow, 10),
    "clock": (clock, 20),
    "together": (together, 60),
}
"""What `make faults` does of every kind, and how often."""
