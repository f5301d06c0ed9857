"""Execute every notebook, and compare what it shows with what is stored in it: `python tests/notebooks.py`.

A cell that shows a time, a path or another thing that is never the same says so by the tag `varies`. Pictures are not
compared. With `--save`, what differs is stored."""
import argparse, math, re, subprocess, sys
from contextlib import chdir
from pathlib import Path
import nbformat
from fastcore.parallel import parallel
from nbdev.config import get_config
from nbdev.test import test_nb

REPO = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)


def shown(cell) -> str:
    "What a cell shows as text, but for warnings, progress and the addresses of objects."
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream": texts.append(output.text if output.name == "stdout" else "")
        elif "data" in output: texts.append(output.data.get("text/markdown") or output.data.get("text/plain", ""))
    lines = "".join(texts).splitlines()
    text = " ".join(line for line in lines if not re.search(r"\r|(it|examples)/s\]|^step \d+/\d+ · ", line))
    return " ".join(re.sub(r"( at)? 0x[0-9a-f]{6,}", "", text).split())


def close(stored:str, found:str) -> bool:
    "Whether two numbers are the same: whole ones exactly, others as far as machines agree."
    if stored == found: return True
    a, b = (float(text.replace(",", "")) for text in (stored, found))
    whole = re.fullmatch(r"[\d,-]+", stored + found)
    return not whole and math.isclose(a, b, rel_tol=.02, abs_tol=1e-3)


def same(stored:str, found:str) -> bool:
    "Whether two outputs have the same words, and numbers that are close."
    if NUMBER.sub("#", stored) != NUMBER.sub("#", found): return False
    return all(map(close, NUMBER.findall(stored), NUMBER.findall(found)))


def differing(stored, executed) -> list[tuple]: # a cell as stored, and as executed
    "The cells of a notebook that show something else than what is stored."
    pairs = [(a, b) for a, b in zip(stored.cells, executed.cells, strict=True) if a.cell_type == "code"]
    return [(a, b) for a, b in pairs if "varies" not in a.metadata.get("tags", []) and not same(shown(a), shown(b))]


# By CPU time. Two processes take one notebook after the other, and end together if the long ones come first.
LONGEST = ("answer/02_compare", "02_cli", "bench/01_bench", "results/00_statistics", "bench/02_gpu", "study/01_sweep",
           "study/03_pack", "run/06_train", "run/07_stack", "report/00_report", "report/01_tables", "report/03_facts",
           "report/02_docs")


def execute(files) -> bool: # whether one has failed
    "Execute the notebooks in two processes, as nbdev-test does, and store what they show; the longest are told."
    place = {REPO/"nbs"/f"{name}.ipynb": i for i, name in enumerate(LONGEST)}
    files = sorted((f for f in files if not (f.parent/".notest").exists()), key=lambda f: place.get(f, len(place)))
    given = dict(skip_flags=get_config(REPO).tst_flags.split(), basepath=REPO, save=True)
    with chdir(REPO/"nbs"): results = parallel(test_nb, files, n_workers=2, pause=.01, **given)
    names = [str(f.relative_to(REPO/"nbs")) for f in files]
    told = sorted(((seconds, name) for (_, seconds), name in zip(results, names)), reverse=True)
    print("seconds:", ", ".join(f"{name} {seconds:.0f}" for seconds, name in told[:12]))
    failed = [name for (passed, _), name in zip(results, names) if not passed]
    if failed: print("failed:", *failed, file=sys.stderr)
    return bool(failed)


def main(save:bool):
    files = [f for f in sorted((REPO/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in f.parts]
    before, found = {f: f.read_bytes() for f in files}, 0
    try:
        failed = execute(files)
        executed = {f: nbformat.read(f, 4) for f in files}
    finally:
        for f in files: f.write_bytes(before[f])   # whatever has happened
    for f in files:
        stored = nbformat.reads(before[f].decode(), 4)
        for a, b in differing(stored, executed[f]):
            found += 1
            print(f"{f.relative_to(REPO)} cell {a.id}: {a.source.splitlines()[-1]}\n"
                  f"  stored: {shown(a)[:600]}\n  found:  {shown(b)[:600]}", file=sys.stderr)
            a.outputs = b.outputs
        if save: nbformat.write(stored, f)
    if save and found: subprocess.run([Path(sys.executable).parent/"nbdev-clean"], cwd=REPO, check=True)
    if found and not save:
        print(f"{found} stored outputs are not what the notebooks show now: store them by python tests/notebooks.py "
              "--save, or tag a cell `varies`", file=sys.stderr)
    return int(failed or (found > 0 and not save))


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--save", action="store_true", help="store what differs")
    sys.exit(main(asked.parse_args().save))
