"`bench --gpu` where there is none: each part to its end, parts that hang, calls that are killed, and what is right."
import subprocess, time
from conftest import PROGRAM, REPO


def some_parts():
    "One encoder and method, and each other kind of measurement once."
    from peft_study.bench.gpu import all_parts
    others = ("attention and autocast", "waits", "the same bits", "processes with MPS")
    return [p for p in all_parts(tiny=True) if p.name.startswith("MiniLM, lora") or p.name in others]


def test_bench_of_a_gpu_runs_to_its_end(command, tmp_path):
    "Killed in the dry run it keeps what it has; called again it ends its parts. Its first line is the answer."
    from peft_study.bench.gpu import measure_gpu, read_record
    file, asked = tmp_path/"gpu/gpu.jsonl", ["bench", "--gpu", "--dry-run", "--output", tmp_path/"gpu"]
    child = subprocess.Popen([*PROGRAM, *map(str, asked)], cwd=REPO, stdout=subprocess.DEVNULL)
    while child.poll() is None and not any("gap" in row for row in read_record(file)[1]): time.sleep(.2)
    child.kill()
    child.wait()
    time.sleep(2)   # its processes end with it
    left = file.read_text()
    code, out, err = command(*asked, "--minutes", 0, takes_outputs=False)
    assert code == 0 and out.startswith("fastest that is right: MiniLM, lora, 16 to 96 tokens: alone, "), out + err
    assert file.read_text() == left
    measure_gpu(tmp_path/"gpu", tiny=True, parts=some_parts())
    lines, names = read_record(file)[1], {part.name for part in some_parts()}
    assert {line["part"]: line["ended"] for line in lines if "ended" in line} == dict.fromkeys(names, "done")
    assert {line["part"] for line in lines if "ended" not in line} == names
    failed = [line for line in lines if "error" in line]
    assert all("MPS cannot be started" in line["error"] for line in failed), failed
    assert all(row["gap"] < 1e-3 for row in lines if row.get("side") == "ours" and "variant" not in row)
    page = (tmp_path/"gpu/gpu.md").read_text()
    assert "times the peer at its best" in page and "its numbers mean nothing" in page


def test_a_part_that_hangs_costs_its_own_time_alone(tmp_path):
    "It is ended at its limit with its rows kept, the others report, and the next call tries it again."
    from peft_study.bench.gpu import Part, cases, measure_gpu
    forever = dict(tiny=True), cases("ours", "fp32") * 1000
    endless = Part("endless", "peft_study.bench.gpu:measure_cases", forever, limit=15)
    parts = [Part("hangs", "time:sleep", (600,), limit=1), endless,
             Part("after", "peft_study.bench.gpu:measure_waits", (dict(tiny=True),), limit=300)]
    told = []
    measure_gpu(tmp_path, tiny=True, parts=parts, show=told.append)
    ends = [line.rpartition(",")[0] for line in told if not line.startswith("fastest")]
    assert ends == ["hangs: stopped at its limit of 1 s", "endless: stopped at its limit of 15 s", "after: done"]
    lines = (tmp_path/"gpu.jsonl").read_text()
    assert '"gap": 0.0' in lines and '"waits a step"' in lines
    time.sleep(3)
    assert (tmp_path/"gpu.jsonl").read_text() == lines   # what was stopped writes no more


def test_the_fastest_is_right():
    "A configuration whose losses are others, or were not compared, is not called fastest, however fast it is."
    from peft_study.bench.gpu import TOLERANCE, answers
    def row(speed, side="ours", **more):
        usual = dict(encoder="MiniLM", method="lora", tokens=[16, 96], precision="bf16")
        return usual | dict(side=side, examples_per_second=speed) | more
    wrong = [row(900, gap=2 * TOLERANCE, runs=8), row(800, gap=float("nan"), processes=4), row(700, runs=64)]
    line, = answers([*wrong, row(100, gap=0., precision="fp32"), row(300, gap=TOLERANCE / 2), row(200, "peer")])
    assert "tokens: alone, bf16: 300 examples a second; 1.5 times the peer at its best (alone, bf16)" in line
    assert answers(wrong) == []
