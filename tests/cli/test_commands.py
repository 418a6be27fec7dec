from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

from safetensors.torch import load_file
from tiny_models import make_directory, make_text

import lowrank
from lowrank.cli import app as cli
from lowrank.cli import models as cli_models
from lowrank.cli import shell as cli_shell
from lowrank.cli.app import app, main
from lowrank.cli.paths import Command, InputPath, OutputPath
from lowrank.errors import LowRankError

COMMANDS = ("analyze", "benchmark", "compress", "demo", "evaluate", "finetune", "frontier", "info", "merge")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts."""
    room = tmp_path_factory.mktemp("cli")
    make_directory(room / "model", width=64)
    make_text(room / "texts.txt", 64)
    make_text(room / "held-out.txt", 24, seed=1)
    return room


@pytest.fixture(scope="module")
def compressed(room: Path) -> Path:
    """The model of ``room``, compressed by the command."""
    out = room / "out"
    arguments = ["compress", str(room / "model"), "-o", str(out), "--error-budget", "10%", "-q"]
    assert main([*arguments, "--calibration", str(room / "texts.txt")]) == 0
    return out


def failure(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line that a failing command writes; nothing may be on standard output."""
    capfd.readouterr()
    code = main(arguments)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("lowrank: error: ")
    return code, lines[0].removeprefix("lowrank: error: ")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# compress


def test_compress_writes_a_model_that_loads_and_is_smaller(room: Path, compressed: Path) -> None:
    for name in ("config.json", "lowrank_config.json", "model.safetensors", "plan.json", "report.json", "report.html"):
        assert (compressed / name).is_file(), name
    assert (compressed / "tokenizer.json").read_bytes() == (room / "model" / "tokenizer.json").read_bytes()
    totals = json.loads((compressed / "report.json").read_text())["totals"]
    assert totals["error_upper"] <= 0.10
    assert totals["size_ratio"] < 0.5
    assert totals["bytes_after"] == sum(
        tensor.nbytes for tensor in load_file(compressed / "model.safetensors").values()
    )
    assert not lowrank.load_model(compressed).training


def test_compress_heals_where_it_is_asked_to_and_says_what_that_did(room: Path, tmp_path: Path) -> None:
    arguments = [
        "compress",
        str(room / "model"),
        "--calibration",
        str(room / "texts.txt"),
        "--size-budget",
        "6%",
        "-q",
    ]
    totals = {}
    for name, more in (("plain", ["--no-loss-aware"]), ("healed", ["--heal-steps", "60", "--loss-aware"])):
        assert main([*arguments, "-o", str(tmp_path / name), *more]) == 0
        totals[name] = json.loads((tmp_path / name / "report.json").read_text())["totals"]
    assert "heal" not in totals["plain"] and totals["healed"]["heal"]["steps"] == 60
    assert totals["healed"]["error_measured"] < totals["plain"]["error_measured"]
    assert totals["healed"]["size_ratio"] <= 0.06
    assert "healed: 60 steps" in (tmp_path / "healed" / "report.md").read_text()
    plan = json.loads((tmp_path / "healed" / "plan.json").read_text())
    assert plan["metadata"]["healed"] == {"steps": 60} and plan["metadata"]["loss_aware"] == "output"


def test_the_table_is_on_standard_output_and_remarks_on_standard_error(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--error-budget", "0.2"]) == 0
    out, err = capfd.readouterr()
    assert "of the original size" in out
    assert "lm_head" in out
    assert f"written to {tmp_path / 'out'}" in err
    assert "written to" not in out


def test_compress_prints_json_for_machines(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["compress", str(room / "model"), "-o", out, "--size-budget", "60%", "--json", "-q"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["totals"]["size_ratio"] <= 0.6
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())


def test_dry_run_writes_nothing_and_predicts_the_bytes(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(room)
    arguments = ["compress", str(room / "model"), "--error-budget", "0.1", "--dry-run", "-q"]
    assert main([*arguments, "-o", str(tmp_path / "absent" / "out")]) == 0
    assert "nothing written" in capfd.readouterr().out
    assert main([*arguments, "--json"]) == 0
    plan = lowrank.Plan.from_json(capfd.readouterr().out)
    assert plan.entry("lm_head").format == "int8"
    assert plan.bytes == sum(entry.bytes for entry in plan.entries)
    assert list(tmp_path.iterdir()) == []
    assert snapshot(room) == before


def test_a_saved_plan_is_applied_and_can_be_edited(room: Path, compressed: Path, tmp_path: Path) -> None:
    common = ["compress", str(room / "model"), "--calibration", str(room / "texts.txt"), "-q"]
    assert main([*common, "--plan", str(compressed / "plan.json"), "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()
    plan = lowrank.Plan.from_json((compressed / "plan.json").read_text())
    name = plan.entries[0].name
    edited = plan.with_entry(name, format="dense", rank=None, bits=None, activations=None)
    (tmp_path / "edited.json").write_text(edited.to_json())
    assert main([*common, "--plan", str(tmp_path / "edited.json"), "-o", str(tmp_path / "edited")]) == 0
    rows = json.loads((tmp_path / "edited" / "report.json").read_text())["rows"]
    assert {row["name"]: row["format"] for row in rows}[name] == "dense"


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"a": 1, "a": 2}', '{"x": NaN}'])
def test_a_damaged_plan_is_bad_input(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "plan.json").write_text(content)
    arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]
    code, message = failure([*arguments, "-q"], capfd)
    assert code == 3
    assert "plan.json" in message
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model(
    room: Path, compressed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_directory(tmp_path / "other", width=32)
    arguments = ["compress", str(other), "-o", str(tmp_path / "out"), "--plan", str(compressed / "plan.json"), "-q"]
    assert failure(arguments, capfd)[0] == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--error-budget", "0"], "positive"),
        (["--error-budget", "-0.1"], "positive"),
        (["--error-budget", "nan"], "positive"),
        (["--error-budget", "inf"], "positive"),
        (["--error-budget", "much"], "not a number"),
        (["--error-budget", "5"], "at most 1"),
        (["--error-budget", "500%"], "at most 1"),
        (["--size-budget", "1.5"], "at most 1"),
        ([], "--error-budget or --size-budget"),
        (["--error-budget", "0.1", "--metric", "kl"], "needs --calibration"),
        (["--error-budget", "0.1", "--validation", "x.txt"], "--validation"),
        (["--error-budget", "0.1", "--heal"], "--heal: needs --calibration"),
        (["--error-budget", "0.1", "--heal-steps", "9", "--metric", "weight"], "--heal: needs --calibration"),
        (["--error-budget", "0.1", "--loss-aware"], "loss_aware=True: needs calibration"),
        (["--error-budget", "0.1", "--formats", "int9"], "int9"),
        (["--error-budget", "0.1", "--formats", "pruned"], "not in this version"),
        (["--error-budget", "0.1", "--ignore", "no-such-*"], "no-such-*"),
        (["--error-budget", "0.1", "--threads", "0"], "--threads"),
        (["--error-budget", "0.1", "--threads", "many"], "--threads"),
        (["--error-budget", "0.1", "--device", "cuda"], "CUDA"),
        (["--error-budget", "0.1", "--device", "abacus"], "abacus"),
        (["--error-budget", "0.1", "--no-such-option"], "--no-such-option"),
        (["--error-budget", "0.1", "--seed", "-1"], "--seed"),
    ],
)
def test_usage_errors(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if options[-1:] == ["cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    code, line = failure(["compress", str(room / "model"), "-o", str(tmp_path / "out"), "-q", *options], capfd)
    assert code == 2
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_large_budget_is_legal_where_the_metric_is_no_share(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", str(room / "model"), "--dry-run", "-q", "--calibration", str(room / "texts.txt")]
    assert main([*arguments, "--error-budget", "3", "--metric", "kl"]) == 0
    assert "predicted" in capfd.readouterr().out


def test_output_is_needed(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, line = failure(["compress", str(room / "model"), "--error-budget", "0.1"], capfd)
    assert code == 2
    assert "--output" in line


def never(*arguments: object, **options: object) -> None:
    raise AssertionError("the model was loaded before the output was checked")


@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        (lambda room, out: (out.mkdir(), (out / "thesis.txt").write_text("mine")), 2),
        (lambda room, out: out.write_text("a file"), 5),
        (lambda room, out: out.parent.rmdir(), 5),
        (lambda room, out: out.parent.chmod(0o555), 5),
    ],
)
def test_the_output_is_checked_before_any_work(
    room: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prepare: object,
    code: int,
) -> None:
    monkeypatch.setattr(cli_models, "load_pretrained", never)
    out = tmp_path / "parent" / "out"
    out.parent.mkdir()
    prepare(room, out)  # type: ignore[operator]
    before = snapshot(tmp_path)
    try:
        assert failure(["compress", str(room / "model"), "-o", str(out), "--error-budget", "0.1"], capfd)[0] == code
    finally:
        if out.parent.exists():
            out.parent.chmod(0o755)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["model", "model/inside", "."])
def test_output_and_input_may_not_lie_in_one_another(
    room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(cli_models, "load_pretrained", never)
    before = snapshot(room / "model")
    arguments = ["compress", str(room / "model"), "-o", str(room / place), "--error-budget", "0.1", "--overwrite"]
    assert failure(arguments, capfd)[0] == 2
    assert snapshot(room / "model") == before


def test_overwrite_replaces_everything_that_was_there(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "old.txt").write_text("old")
    (out / "deep" / "thesis.txt").write_text("three years")
    arguments = ["compress", str(room / "model"), "-o", str(out), "--error-budget", "0.2", "-q"]
    before = snapshot(out)
    for more in ([], ["--overwrite"]):
        assert main([*arguments, *more]) == 2
        assert snapshot(out) == before
    (out / "lowrank_config.json").write_text("{}")
    assert main([*arguments, "--overwrite"]) == 0
    assert not (out / "old.txt").exists()
    assert (out / "model.safetensors").exists()


def test_a_budget_out_of_reach_names_what_can_be_reached_and_writes_nothing(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--error-budget", "1e-6", "-q"]
    code, line = failure([*arguments, "--calibration", str(room / "texts.txt")], capfd)
    assert code == 4
    assert "1e-06" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a b", "line\nbreak", "-o", "ü" * 120, "x" * 255, b"\xff\xfe".decode("utf-8", "surrogateescape")]
)
def test_odd_names_work(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    source, outputs = tmp_path / name, tmp_path / "outputs"
    source.mkdir()
    outputs.mkdir()
    for file in (room / "model").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(outputs)
    arguments = [f"--output={name}", "--error-budget", "0.2", "-q", "--", str(source)]
    assert main(["compress", *arguments]) == 0
    capfd.readouterr()
    assert main(["info", "--", name]) == 0
    assert "LlamaForCausalLM" in capfd.readouterr().out


# what goes in


@pytest.mark.parametrize(
    ("source", "code"),
    [("absent", 3), ("texts.txt", 3), ("empty", 3), ("model/model.safetensors", 3), ("model.bin", 3)],
)
def test_sources_that_are_no_model(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str, code: int
) -> None:
    (room / "empty").mkdir(exist_ok=True)
    (room / "model.bin").write_bytes(b"\x80\x04.")
    arguments = ["compress", str(room / source), "-o", str(tmp_path / "out"), "--error-budget", "0.1", "-q"]
    found, line = failure(arguments, capfd)
    assert found == code
    assert Path(source).name in line


def test_calibration_that_cannot_be_used(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(path: Path) -> str:
        arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--error-budget", "0.1", "-q"]
        code, line = failure([*arguments, "--calibration", str(path)], capfd)
        assert code == 3
        assert path.name in line
        return line

    (tmp_path / "empty.txt").touch()
    (tmp_path / "few.txt").write_text("the cat\n")
    (tmp_path / "data.csv").write_text("the cat\n")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no")
    np.savez(tmp_path / "objects.npz", input_ids=np.array([{}], dtype=object))
    np.savez(tmp_path / "uneven.npz", input_ids=np.zeros((4, 3), int), attention_mask=np.zeros((5, 3), int))
    np.savez(tmp_path / "unknown.npz", pixels=np.zeros((4, 3), int), more=np.zeros((4, 3), int))
    np.savez(tmp_path / "outside.npz", input_ids=np.full((16, 3), 10_000))
    assert "holds no text" in refused(tmp_path / "empty.txt")
    assert ".npz or .safetensors" in refused(tmp_path / "data.csv")
    assert "no such file" in refused(tmp_path / "absent.npz")
    for name in ("broken.npz", "objects.npz"):
        assert "not a readable .npz" in refused(tmp_path / name)
    assert "same" in refused(tmp_path / "uneven.npz")
    assert "pixels, more" in refused(tmp_path / "unknown.npz")
    arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--error-budget", "0.1", "-q"]
    for name, message in (("outside.npz", "token id 10000"), ("few.txt", "16 samples")):
        code, line = failure([*arguments, "--calibration", str(tmp_path / name)], capfd)
        assert code == 3
        assert message in line
    assert not (tmp_path / "out").exists()


def test_arrays_calibrate_as_texts_do(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = torch.randint(4, 30, (64, 8), generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "ids.npz", input_ids=ids.numpy().astype(np.int32), attention_mask=np.ones((64, 8), bool))
    from safetensors.torch import save_file

    save_file({"tokens": ids}, tmp_path / "ids.safetensors")
    for name in ("ids.npz", "ids.safetensors"):
        out = str(tmp_path / name.replace(".", "-"))
        arguments = ["compress", str(room / "model"), "-o", out, "--error-budget", "0.1", "-q"]
        assert main([*arguments, "--calibration", str(tmp_path / name)]) == 0
        assert (
            main(["evaluate", out, "--against", str(room / "model"), "--data", str(tmp_path / name), "--json", "-q"])
            == 0
        )
        printed = capfd.readouterr().out
        assert json.loads(printed[printed.index('{\n  "kl"') :])["output_error"]["value"] < 0.1


# evaluate, analyze, info


def test_evaluate_measures_with_intervals(room: Path, compressed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "evaluate",
        str(compressed),
        "--against",
        str(room / "model"),
        "--data",
        str(room / "held-out.txt"),
        "-q",
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for name in ("output_error", "kl", "perplexity_increase", "top1_agreement"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert 0.0 < found["output_error"]["value"] < 0.15
    assert found["samples"]["value"] == 24
    ratio = found["perplexity_compressed"]["value"] / found["perplexity_original"]["value"]
    assert math.isclose(ratio - 1, found["perplexity_increase"]["value"], rel_tol=1e-6)
    assert main(arguments) == 0
    text = capfd.readouterr().out
    assert "output error" in text
    assert "over 24 samples" in text


def test_a_model_against_itself_differs_in_nothing(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = str(room / "model")
    assert main(["evaluate", model, "--against", model, "--data", str(room / "held-out.txt"), "--json", "-q"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["output_error"]["value"] == found["kl"]["value"] == 0.0
    assert found["top1_agreement"]["value"] == 1.0


@pytest.mark.parametrize("source", ["model", "model/model.safetensors"])
def test_analyze_reads_directories_and_files(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str
) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.html", tmp_path / "a.svg"]
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    options = [f"--{name}={path}" for name, path in zip(("json", "html", "plot"), files, strict=True)]
    assert main(["analyze", str(room / source), "-q", *options]) == 0
    assert "lm_head" in capfd.readouterr().out
    assert any("lm_head" in row["name"] for row in json.loads(files[0].read_text())["rows"])
    assert "<html" in files[1].read_text()
    assert files[2].read_text().count("<path") > 10
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.html", "a.svg"}
    assert files[0].stat().st_mode & 0o777 == 0o666 & ~cli_shell._umask()


def test_analyze_prints_json_and_takes_calibration(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", str(room / "model"), "--calibration", str(room / "texts.txt"), "--json", "-", "-q"]
    assert main(arguments) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert any(row["data_ranks"] for row in rows)


@pytest.mark.parametrize(
    ("option", "code"), [("--json=absent/a.json", 5), ("--html=model", 2), ("--plot=a.gif", 2), ("--ignore=zzz*", 2)]
)
def test_analyze_checks_its_files_first(
    room: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], option: str, code: int
) -> None:
    monkeypatch.chdir(room)
    assert failure(["analyze", "model", "-q", option], capfd)[0] == code


def test_info(compressed: Path, room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(compressed), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["layers"] > 0
    assert main(["info", str(compressed)]) == 0
    text = capfd.readouterr().out
    assert "LlamaForCausalLM" in text
    assert "0.1 (output)" in text
    assert failure(["info", str(room / "model")], capfd)[0] == 3


# help and failures


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capfd.readouterr().out
    example = next(line for line in text.splitlines() if "Example: lowrank" in line).split("Example: ")[1].split()
    assert example[1] == command
    app.commands[command].make_context(command, example[2:])  # type: ignore[attr-defined]


def test_the_commands_are_the_ones_that_exist(capfd: pytest.CaptureFixture[str]) -> None:
    assert sorted(app.commands) == list(COMMANDS)  # type: ignore[attr-defined]
    assert failure([], capfd)[0] == 2
    assert failure(["finetune"], capfd)[0] == 2
    assert main(["--help"]) == 0
    assert "Exit codes" in capfd.readouterr().out
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"lowrank {lowrank.__version__}\n"


def test_our_own_bug_is_one_line_and_a_traceback_with_debug(
    compressed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(directory: Path) -> None:
        raise KeyError("a\nb\x1b[31m")

    monkeypatch.setattr(cli, "describe", broken)
    code, line = failure(["info", str(compressed)], capfd)
    assert code == 1
    assert "bug in lowrank: KeyError" in line
    assert "--debug" in line
    assert "\x1b" not in line
    with pytest.raises(KeyError):
        main(["info", str(compressed), "--debug"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LowRankError("x"), 3),
        (MemoryError(), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 6),
        (OSError(28, "No space left on device", "/x"), 5),
        (NotImplementedError("heal=True: not in this version"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    compressed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def broken(directory: Path) -> None:
        raise error

    monkeypatch.setattr(cli, "describe", broken)
    assert failure(["info", str(compressed)], capfd)[0] == code


def test_no_output_of_any_command_is_an_input_of_it(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_models, "load_pretrained", never)
    model = tmp_path / "model"
    shutil.copytree(room / "model", model)
    weights = model / "model.safetensors"
    (tmp_path / "texts.txt").write_text("one\n")
    os.link(weights, tmp_path / "hard")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "plan.json").write_text("{}")
    before = snapshot(tmp_path)
    text = ["--calibration", str(tmp_path / "texts.txt")]
    for arguments in (
        ["analyze", str(model), "--json", str(weights)],
        ["analyze", str(model), "--html", str(tmp_path / "hard")],
        ["analyze", str(model), "--plot", str(tmp_path / "link" / "new.png")],
        ["analyze", str(model), "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.json")],
        ["analyze", str(weights), "--json", str(weights)],
        ["analyze", str(model), *text, "--html", str(tmp_path / "texts.txt")],
        ["frontier", str(model), "--html", str(model / "config.json")],
        ["frontier", str(model), "-o", str(tmp_path / "f"), "--json", str(tmp_path / "f" / "frontier.json")],
        ["benchmark", str(model), "--json", str(weights)],
        ["finetune", str(model), "--data", str(tmp_path / "texts.txt"), "-o", str(model / "a")],
        ["merge", str(model), str(tmp_path), "-o", str(tmp_path / "m")],
        ["compress", str(model), "-o", str(tmp_path / "plan.json"), "--plan", str(tmp_path / "plan.json")],
    ):
        code, line = failure(arguments, capfd)
        assert code == 2 and "lie in one another" in line, (arguments, line)
        assert snapshot(tmp_path) == before


def test_every_path_of_every_command_says_whether_it_is_read_or_written() -> None:
    for command in app.commands.values():
        assert isinstance(command, Command), command.name
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                assert isinstance(parameter.type, InputPath | OutputPath), (command.name, parameter.name)


# groups of samples


def test_a_budget_in_each_group(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_text(tmp_path / "a=b.txt", 24, seed=5)
    texts, held, other = str(room / "texts.txt"), str(room / "held-out.txt"), str(tmp_path / "a=b.txt")
    arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--error-budget", "10%", "-q"]
    arguments += ["--calibration", texts, "--validation", f"news={held}", "--validation", f"captions={other}"]
    assert main(arguments) == 0
    assert "in each of 2 groups by itself: news, captions" in " ".join(capfd.readouterr().out.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: item["samples"] for name, item in report["totals"]["groups"].items()} == {"news": 24, "captions": 24}
    evaluated = ["evaluate", str(tmp_path / "out"), "--against", str(room / "model"), "-q"]
    assert main([*evaluated, "--data", f"news={held}", "--data", f"captions={other}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["groups"]
    for name, item in found.items():
        assert math.isclose(item["output_error"]["value"], report["totals"]["groups"][name]["error"], rel_tol=1e-6)
    assert main([*evaluated, "--data", f"captions={other}"]) == 0
    assert capfd.readouterr().out.startswith("captions:\nmeasure")
    # A path with a slash before its "=" has no name.
    assert main([*evaluated, "--data", other]) == 0
    assert capfd.readouterr().out.startswith("measure")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["news=x.txt", "news=y.txt"], "--validation: group 'news' is given twice (x.txt and y.txt)"),
        (["x.txt", "y.txt"], "given 2 times (x.txt and y.txt): put all samples into one file"),
        (["news=x.txt", "y.txt"], "--validation NAME=FILE"),
        (["=x.txt"], "given as NAME=FILE"),
        (["news="], "given as NAME=FILE"),
        ([f"{'n' * 61}=x.txt"], "1 to 60 characters"),
    ],
)
def test_files_that_cannot_be_groups(
    room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "out"), "--error-budget", "10%"]
    arguments += ["--calibration", str(room / "texts.txt")]
    code, error = failure([*arguments, *(part for file in options for part in ("--validation", file))], capfd)
    assert code == 2 and words in error
    assert not (tmp_path / "out").exists()


def test_a_groups_file_is_never_written_over(room: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    make_text(tmp_path / "data" / "news.txt", 24)
    arguments = ["compress", str(room / "model"), "-o", str(tmp_path / "data"), "--error-budget", "10%", "--overwrite"]
    arguments += ["--calibration", str(room / "texts.txt"), "--validation", f"news={tmp_path / 'data' / 'news.txt'}"]
    code, error = failure(arguments, capfd)
    assert code == 2 and "lie in one another" in error
    assert (tmp_path / "data" / "news.txt").exists()
