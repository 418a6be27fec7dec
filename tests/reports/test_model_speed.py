"""The model speed study measured every case, and names what is slower."""

from __future__ import annotations

from studies import load_study, results_of


def test_every_model_was_measured_at_every_size() -> None:
    found = [(case["model"], case["input"]) for case in results_of("model_speed")["cases"]]
    assert found == [
        ("MiniLM", "1 sentence"),
        ("MiniLM", "32 x 64 tokens"),
        ("ResNet-20", "1 image"),
        ("ResNet-20", "64 images"),
    ]


def test_what_is_slower_is_named() -> None:
    study = load_study("model_speed")
    case = {
        "model": "M",
        "input": "1 x",
        "shape": [1, 4],
        "sizes": {"lowrank": [0.25, 0.1]},
        "milliseconds": {"float32": [1.0, 1.0, 1.0], "lowrank": [2.0, 2.0, 2.0]},
        "speedup": {"lowrank": {"float32": [0.5, 0.5, 0.5]}},
    }
    about = {"cpu": "c", "threads": 2, "capability": "x", "torch": "t", "torchao": "a", "route": "native"}
    assert "* lowrank is slower than float32 on M, 1 x: 0.50×." in study.render({"host": about, "cases": [case]})
    case["speedup"] = {"lowrank": {"float32": [2.0, 2.0, 2.0]}}
    assert "No compressed model is slower" in study.render({"host": about, "cases": [case]})
