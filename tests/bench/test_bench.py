"""The benchmarks' arithmetic, and that their small runs work."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kit import END, random_examples, tiny_model, with_adapter
from vicuna.data.pack import Pack, PackSegment, build_packs

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))
sys.path.append(str(BENCH / "peers"))

import common  # noqa: E402

from benchkit import (  # noqa: E402
    contenders,
    environments,
    examples,
    operations,
    profile,
    rate,
    report,
    summary,
    sweep,
)

SHAPE = operations.Shape(
    hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, head_dim=4, vocab=20, rank=2
)


def script(path: str) -> ModuleType:
    """One of the scripts as a module, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location("bench_" + Path(path).stem, BENCH / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pack_of(segments: list[PackSegment], targets: list[int]) -> Pack:
    import numpy as np

    rows = segments[-1].stop
    zeros = np.zeros(rows, np.int64)
    where = np.array(targets)
    return Pack(
        zeros, zeros, segments, where, zeros[: len(targets)],
        np.ones(len(targets), np.float32), zeros, 1, rows, len(targets),
    )  # fmt: skip


# -- operations ----


def test_operations_by_hand() -> None:
    """Two layers, hidden 8, MLP 12, two heads of four over one key head, five rows, two targets."""
    work = operations.of_pack(pack_of([PackSegment(0, 5)], [2, 4]), SHAPE, "all")
    rows, targets = 5, 2
    # q 8x8, k and v 8x4, o 8x8, gate and up 8x12, down 12x8: products of one row of one layer.
    row = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 96)
    below_first = 2 * (64 + 32 + 32)  # q, k, v of layer 0 need no gradient of their input
    assert work.linear == rows * (2 * row + 2 * row - below_first)
    # u, u B', t, dB, dA: 2 r (2 inputs + 3 outputs); and t A where the input needs it: 2 r inputs.
    sizes = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)]
    lora = sum(2 * 2 * (3 * i + 3 * o) for i, o in sizes)
    assert work.lora == rows * (2 * lora - 2 * 2 * 3 * 8)
    # Two products forward and four backward over 1 + 2 + 3 + 4 + 5 pairs, eight wide.
    assert work.attention == 2 * 6 * 2 * 15 * 8
    assert work.head == 2 * 2 * targets * 8 * 20
    assert work.total == work.linear + work.lora + work.attention + work.head
    frozen = sum(work.by_group.values())
    assert frozen == work.linear + work.head


def test_rows_that_no_target_depends_on_are_not_needed() -> None:
    pack = pack_of([PackSegment(0, 5)], [2, 4])
    whole = operations.of_pack(pack, SHAPE, "all")
    least = operations.of_pack(pack, SHAPE)
    # In the last layer k and v stay; q, o and the MLP are for the targets' rows alone.
    row = 2 * 2 * (64 + 64 + 96 + 96 + 96)
    assert whole.linear - least.linear == (5 - 2) * row
    # Rows 2 and 4 see 3 and 5 pairs.
    assert whole.attention - least.attention == 6 * 2 * (15 - 8) * 8
    assert whole.head == least.head


def test_pairs_count_what_may_be_seen() -> None:
    assert operations.pairs(PackSegment(0, 4)) == 1 + 2 + 3 + 4
    below = PackSegment(10, 13, ((0, 4), (6, 8)))
    assert operations.pairs(below) == 7 + 8 + 9
    assert operations.pairs(below, window=8) == 7 + 8 + 8
    assert operations.pairs(below, rows={11, 40, 3}) == 8


def test_nothing_below_the_first_adapter_needs_a_gradient() -> None:
    from dataclasses import replace

    pack = pack_of([PackSegment(0, 5)], [2, 4])
    down = replace(SHAPE, layers=1, adapted=("down_proj",))
    work = operations.of_pack(pack, down, "all")
    assert work.by_group["gate_proj", "forward"]
    assert ("gate_proj", "backward") not in work.by_group
    assert ("down_proj", "backward") not in work.by_group
    assert work.attention == 2 * 2 * 15 * 8  # forward alone
    assert work.by_group["lm_head", "backward"] == 2 * 2 * 8 * 20


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied"])
def test_operations_are_those_that_torch_counts(family: str) -> None:
    """Plain transformers + PEFT on one example, its head at rows with a target alone."""
    model = with_adapter(tiny_model(family, attn_implementation="eager")).train()
    pack = build_packs(random_examples()[:1], END, 1000)[0]
    work = operations.of_pack(pack, operations.shape_of(model.config, rank=4), "all")
    with FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=torch.from_numpy(pack.ids)[None],
            logits_to_keep=torch.from_numpy(pack.target_rows),
            use_cache=False,
        ).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(pack.target_ids)).backward()
    counts = counter.get_flop_counts()["Global"]
    # Eager attention multiplies all n x n pairs; n (n + 1) / 2 of them can see each other.
    scores = counts.pop(torch.ops.aten.bmm)
    n = len(pack.ids)
    assert scores * (n + 1) == work.attention * 2 * n
    assert sum(counts.values()) == work.linear + work.lora + work.head


def test_the_rate_of_a_work_is_the_time_of_its_products() -> None:
    rates = rate.Rates({("q_proj", "forward"): 2.0, ("lm_head", "forward"): 8.0}, 8.0, {})
    work = operations.Work()
    work.frozen("q_proj", "forward", 8)
    work.frozen("lm_head", "forward", 8)
    assert rates.weighted(work) == pytest.approx(16 / (4 + 1))


def test_a_rate_is_measured_for_every_product() -> None:
    rates = rate.measure(SHAPE, 4, 2, "float32", rounds=1)
    work = operations.of_pack(pack_of([PackSegment(0, 5)], [2, 4]), SHAPE)
    assert set(work.by_group) <= set(rates.by_group)
    assert all(v > 0 for v in rates.by_group.values())
    assert rates.weighted(work) <= max(rates.by_group.values())


# -- what is said ----


def run_of(seconds: float, peak: float, loss: float = 2.0) -> dict[str, Any]:
    return {
        "seconds": seconds, "peak_gib": peak, "before_gib": 0.5, "process_peak_gib": peak,
        "loss": loss,
    }  # fmt: skip


def entry(name: str, runs: list[dict[str, Any]]) -> summary.Entry:
    return summary.Entry(name, name.title(), "fp32", {}, runs, tokens=100, examples=10)


def test_ratios_and_bars() -> None:
    ours = [run_of(1.0, 1.0), run_of(2.0, 1.1), run_of(4.0, 0.9)]
    found = summary.compare(
        [
            entry("original", [run_of(20.0, 10.0)]),
            entry("plain", [run_of(7.0, 4.0)]),
            entry("trl", [run_of(6.0, 2.0)]),
            summary.Entry("llamafactory", "LLaMA-Factory", missing="no network"),
            entry("ours", ours),
        ]
    )
    figures = found["contenders"]
    assert figures["ours"]["tokens_per_second"] == 50
    assert figures["ours"]["examples_per_second"] == 5.0
    assert figures["ours"]["peak_gib"] == 1.1
    assert figures["original"]["ours_is_faster"] == pytest.approx(10)
    assert figures["llamafactory"]["missing"] == "no network"
    assert found["flags"] == []
    reached = {
        f"{what.split(',')[0]} {value:.3g}": ok for what, value, ok in summary.bars(figures, 0.5)
    }
    assert reached == {
        "speed 10": True,
        "speed 3.5": False,
        "speed 3": True,
        "memory 0.11": True,
        "memory 0.55": False,
        "matrix rate 0.5": False,
    }


def test_a_loss_that_is_off_is_said() -> None:
    runs = [entry("original", [run_of(1, 1, 2.0)]), entry("trl", [run_of(1, 1, 2.021)])]
    assert summary.compare(runs)["flags"] == ["trl: loss 2.0210, but original has 2.0000"]
    nan = summary.compare([runs[0], entry("trl", [run_of(1, 1, float("nan"))])])
    assert len(nan["flags"]) == 1


def test_another_number_of_updates_is_said() -> None:
    run = {**run_of(1, 1), "updates": 1}
    said = summary.compare([summary.Entry("trl", "TRL", runs=[run], tokens=1, updates=2)])
    assert said["flags"] == ["trl: made 1 updates, not 2"]


def test_a_table_goes_between_its_markers(tmp_path: Path) -> None:
    docs = tmp_path / "performance.md"
    docs.write_text("a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n")
    report.write("x", report.table(["k", "v"], [["one", 1]]), docs)
    assert docs.read_text() == (
        "a\n<!-- begin: x -->\n| k | v |\n| --- | ---: |\n| one | 1 |\n<!-- end: x -->\nb\n"
    )
    with pytest.raises(SystemExit, match="begin: y"):
        report.write("y", "", docs)


def test_the_document_has_a_place_for_every_result() -> None:
    text = report.DOCS.read_text(encoding="utf-8")
    for name in ("train 96 x 512", "train 400 x 2048", "sweep", "roofline", "gpu"):
        assert text.count(f"<!-- begin: {name} -->") == 1
        assert text.count(f"<!-- end: {name} -->") == 1


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::silu_backward", "elementwise"),
        ("aten::mul_", "elementwise"),
        ("aten::copy_", "copies"),
        ("aten::_to_copy", "copies"),
        ("aten::_fused_adamw_", "optimiser"),
        ("Optimizer.step#AdamW.step", "optimiser"),
        ("something_new", "other"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert profile.kind_of(operator) == kind


def test_shares_of_a_profile_add_up() -> None:
    found = profile.by_kind({"aten::mm": 3.0, "aten::copy_": 1.0})
    assert dict(found["kinds"])["matrix products"] == 0.75
    assert sum(share for _, share in found["kinds"]) == pytest.approx(1)


def test_the_clock_weighs_losses_by_their_tokens() -> None:
    clock = common.Clock()
    clock.loaded()
    clock.begin()
    clock.lap()
    result = clock.result([1.0, 4.0], [30.0, 10.0])
    assert result["loss"] == pytest.approx(1.75)
    assert result["peak_gib"] >= result["before_gib"] * 0.9
    assert clock.result([1.0, 4.0], [])["loss_weighted"] is False


# -- data and runs ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from run_kit import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    rows = [
        {"instruction": f"第{i}题", "input": "", "output": "答" * (1 + i % 5)} for i in range(9)
    ]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    return path


def test_no_record_is_used_twice(model: Path, data: Path) -> None:
    renderer = examples.renderer_of(model)
    chosen = examples.select(data, renderer, 100, 400, 4, 0, 1)
    assert (len(chosen.items), chosen.updates, len(chosen.order)) == (9, 2, 8)
    assert len(set(chosen.order)) == 8
    for item in chosen.items:
        ids = item.example.ids.tolist()
        assert item.completion == item.value["output"]
        assert item.prompt.endswith("### Response:\n")
        assert ids[-1] == chosen.end_id
        assert chosen.supervised == sum(len(i.example.ids) - i.start for i in chosen.ordered)
    prints = [
        examples.fingerprint(i.example.ids.tolist(), len(i.example.ids) - i.start)
        for i in chosen.ordered
    ]
    assert examples.disagreeing(chosen, prints) == 0
    assert examples.disagreeing(chosen, [*prints[1:], "other"]) == 1
    assert prints[0] == common.fingerprint(
        chosen.ordered[0].example.ids.tolist(),
        len(chosen.ordered[0].example.ids) - chosen.ordered[0].start,
    )


def test_ours_and_the_trainer_train_on_the_same(model: Path, data: Path, tmp_path: Path) -> None:
    """What runs in the contenders' processes, on a tiny model: the same ids, the same loss."""
    import with_trainer
    import with_vicuna

    renderer = examples.renderer_of(model)
    chosen = examples.select(data, renderer, 8, 400, 4, 0, 1)
    examples.write(chosen, tmp_path)
    job = contenders.Job(
        str(model), renderer.tokenizer.data.pad_id, tmp_path / "examples.jsonl",
        tmp_path / "records.jsonl", examples.TEMPLATE, chosen.updates, chosen.batch, 400, 1024,
        threads=1, seed=1,
    )  # fmt: skip
    known = contenders.contenders()
    results = {}
    for name, runs in (("ours", with_vicuna), ("plain", with_trainer), ("original", with_trainer)):
        variant = next(v for v in known[name].variants if v.name in ("fp32", "auto"))
        work = tmp_path / name
        results[name] = runs.run(contenders.words_of(job, variant, work, work / "out.json"))
    assert examples.disagreeing(chosen, results["ours"]["fingerprints"]) == 0
    assert results["ours"]["real_tokens"] == chosen.tokens
    assert {r["updates"] for r in results.values()} == {2}
    assert all(r["seconds"] > 0 for r in results.values())
    # Before the first update an adapter adds nothing, whatever its first weights.
    first = [r["losses"][0] for r in results.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-4)
    assert summary._losses(results) == []


def test_how_a_contender_is_run(tmp_path: Path) -> None:
    """A process of its own: its result, or why there is none."""
    job = contenders.Job(
        "", 0, tmp_path / "none", tmp_path / "none", "alpaca", 1, 1, 16, 16, threads=3, seed=1
    )

    def outcome(code: str, limit: float | None = None) -> contenders.Run:
        script = tmp_path / "script.py"
        script.write_text("import json, os, sys, time\njob = json.load(open(sys.argv[1]))\n" + code)
        variant = contenders.Variant("fp32", {"dtype": "fp32"})
        contender = contenders.Contender("x", "X", str(script), (variant,))
        return contenders.run(contender, variant, job, Path(sys.executable), limit)

    done = outcome(
        "json.dump([job['variant'], job['threads'], os.environ['OMP_NUM_THREADS']], "
        "open(job['out'], 'w'))"
    )
    assert (done.result, done.failure) == ([{"dtype": "fp32"}, 3, "3"], "")
    assert "exit code 3" in outcome("print('the reason', file=sys.stderr); sys.exit(3)").failure
    assert "the reason" in outcome("print('the reason', file=sys.stderr); sys.exit(3)").failure
    assert outcome("time.sleep(60)", limit=0.2).timed_out


def test_a_probe_takes_the_fastest_way_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"a": 4.0, "b": 2.0, "c": None, "d": 1.0}
    limits = []

    def fake(_: Any, variant: Any, __: Any, ___: Any, limit: float | None) -> contenders.Run:
        limits.append(limit)
        took = seconds[variant.name]
        if took is None:
            return contenders.Run(failure="stopped after 55 s", timed_out=True)
        return contenders.Run({"seconds": took}, wall=10 * took)

    monkeypatch.setattr(contenders, "run", fake)
    kinds = {"a": "fp32", "b": "fp32", "c": "bf16", "d": "bf16"}
    ways = tuple(contenders.Variant(n, {"dtype": kinds[n]}) for n in seconds)
    contender = contenders.Contender("x", "X", "x.py", ways)
    found = contenders.probe(contender, None, 100, Path("python"))  # type: ignore[arg-type]
    assert found.taken is ways[1]
    assert found.figures == {"a": 25.0, "b": 50.0, "c": "stopped after 55 s", "d": "not tried"}
    assert limits == [None, 95.0, 55.0]


def test_an_environment_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "no network\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(environments.NotMade, match="no network"):
        environments.python_of("trl", tmp_path, lambda _: None)
    assert not (tmp_path / "trl" / ".made").exists()


def test_long_records_are_nearly_as_long_as_the_cutoff(model: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample.jsonl"
    rows = [{"instruction": f"第{i}题", "input": "", "output": "答案" * 4} for i in range(20)]
    sample.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    renderer = examples.renderer_of(model)
    sweep.write_long(sample, tmp_path / "long.jsonl", renderer, 1024, 4)
    chosen = examples.select(tmp_path / "long.jsonl", renderer, 4, 2048, 2, 0, 1)
    lengths = [len(i.example.ids) for i in chosen.items]
    assert len(lengths) == 4
    assert min(lengths) > 900


def test_the_roofline_of_a_tiny_model(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "roofline.json"
    words = [
        "--model", str(model), "--data", str(data), "--records", "4", "--cutoff", "400",
        "--batch", "4", "--threads", "1", "--rounds", "1", "--tokens_per_second", "100",
        "--dtype", "fp32", "--profile", "--out", str(out),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["roofline.py", *words])
    assert script("roofline.py").main() == 0
    found = json.loads(out.read_text())
    assert found["share"] == pytest.approx(
        100 * found["gflop_per_token"] / found["rate_gflops"], rel=1e-6
    )
    assert found["gflop_per_token"] < found["gflop_per_token_all_rows_of_last_layer"]
    assert dict(found["profile"]["kinds"])["matrix products"] > 0
    assert "share of the matrix rate" in capsys.readouterr().out


# -- the GPU's script, as far as a CPU can tell ----


@pytest.mark.parametrize("group", ["7b bf16", "7b nf4", "7b int8"])
def test_the_gpu_script_on_a_tiny_model(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a group's process: model, steps, parity with plain PEFT, figures."""
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    out = tmp_path / "gpu.json"
    words = ["--tiny", "--device", "cpu", "--child", group, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    gpu = script("gpu/train.py")
    assert gpu.main() == 0
    found = json.loads(out.read_text())
    assert found["finished"]
    tasks = found["tasks"]
    wanted = next(g for g in gpu.GROUPS if g.name == group)
    assert set(tasks) == {t.name for t in wanted.tasks}
    assert tasks["parity"]["loss"] < 1e-3
    assert tasks["parity"]["gradient"] < 5e-2
    if "plain mixed" in tasks:
        ours, plain = tasks["ours mixed"], tasks["plain mixed"]
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert ours["tokens"] == plain["tokens"]
    text = gpu.markdown(
        {
            "machine": report_machine(), "tiny": True, "installed": {"trl": False},
            "groups": {group: found}, "bars": gpu.bars({group: found}),
        }
    )  # fmt: skip
    assert f"| {group}: parity |" in text
    assert "pass" not in text


def report_machine() -> dict[str, Any]:
    from benchkit import machine

    return machine.describe(1) | {"device": "cpu"}


def test_the_bars_of_the_gpu() -> None:
    gpu = script("gpu/train.py")
    found = {
        "7b bf16": {
            "tasks": {
                "rate": {"tflops": 600.0},
                "ours full": {"achieved_tflops": 330.0},
                "ours mixed": {"tokens_per_second": 1000.0},
                "plain mixed": {"tokens_per_second": 600.0},
                "memory 2048": {"peak_gib": 15.0},
                "parity": {"loss": 1e-3},
            }
        },
        "7b nf4": {"tasks": {"ours mixed": {"tokens_per_second": 850.0}}},
    }
    told = {what: ok for what, _, ok in gpu.bars(found)}
    assert told["7b bf16, 2048 tokens: at most 16.0 GiB"] is True
    assert told["7b nf4, 2048 tokens: at most 6.0 GiB"] is None
    assert told["7b bf16: at least 50 % of the measured matrix rate"] is True
    assert told["7b nf4: at least 80 % of the speed in bf16"] is True
    assert told["7b bf16: at least 1.8 x transformers + PEFT"] is False
