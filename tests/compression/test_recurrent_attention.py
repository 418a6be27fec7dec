"""The main path on models with recurrent layers and attention: the promise, every layer called, saved and loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lowrank
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import prepare_batches
from lowrank.checkpoint import stored_tensors
from lowrank.errors import CheckpointError, NumericsError, UsageError
from lowrank.layers import LAYER_KINDS, CompressedLayer, QuantizedLSTM, QuantizedMultiheadAttention, compressed_layers

VOCABULARY, LENGTH = 50, 12


class Tagger(nn.Module):
    """A tag for each word, by an LSTM over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.rnn = nn.LSTM(24, 32, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.head = nn.Linear(64, 9)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=ids.shape[1])
        return self.head(states)


class Counter(nn.Module):
    """A GRU, then a GRU cell and an RNN cell stepped by hand; the last state counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru = nn.GRU(16, 32)
        self.cell = nn.GRUCell(32, 24)
        self.last = nn.LSTMCell(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.gru(x.transpose(0, 1))[0]
        hidden, state = None, None
        for step in steps:
            hidden = self.cell(step, hidden)
            state = self.last(hidden, state)
        assert state is not None
        return self.head(state[0])


class Encoder(nn.Module):
    """Words through torch's own encoder, with a mask for padding or without."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32) if norm else None)
        self.head = nn.Linear(32, 9)
        with torch.no_grad():
            for parameter in self.encoder.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding))


class Translator(nn.Module):
    """Encoder and decoder with separate attention to what was encoded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Transformer(24, 4, 1, 1, 48, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.body(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)


def words(seed: int = 1, batches: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (16, LENGTH), generator=generator) for _ in range(batches)]


def lengths_of(ids: Tensor) -> Tensor:
    return ids[:, 0] % (LENGTH - 3) + 3


def floats(size: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, LENGTH, size, generator=generator) for _ in range(10)]


def tagged(seed: int = 1) -> list[Any]:
    return [{"ids": ids, "lengths": lengths_of(ids)} for ids in words(seed)]


def padded(seed: int = 1) -> list[Any]:
    return [{"ids": ids, "padding": torch.arange(LENGTH) >= lengths_of(ids)[:, None]} for ids in words(seed)]


MODELS: dict[str, tuple[Any, Any]] = {
    "lstm": (Tagger, tagged),
    "gru": (Counter, lambda seed=1: floats(16, seed)),
    "encoder": (Encoder, words),
    "padded": (Encoder, padded),
    "padded-norm": (lambda: Encoder(norm=True), padded),
    "translator": (Translator, lambda seed=1: floats(24, seed)),
}
KINDS = {
    "lstm": {"QuantizedLSTM"},
    "gru": {"QuantizedGRU", "QuantizedGRUCell", "QuantizedLSTMCell"},
    **{key: {"QuantizedMultiheadAttention"} for key in ("encoder", "padded", "padded-norm", "translator")},
}
# torch itself says so, of the original, where it makes its padded batches into nested tensors.
NESTED = "ignore:The PyTorch API of nested tensors"
pytestmark = [pytest.mark.filterwarnings(NESTED), pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")]


def run(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch) if isinstance(batch, dict) else model(batch)
    return found


def saved(result: lowrank.CompressionResult, folder: Path) -> Path:
    result.save(folder / "out")
    return folder / "out"


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Calls by identity of the layer. Hooks would not do: they make torch's fast path stand aside."""
    called: dict[int, int] = {}
    for kind in LAYER_KINDS.values():

        def counted(self: nn.Module, *args: Any, _forward: Any = kind.forward, **kwargs: Any) -> Any:
            called[id(self)] = called.get(id(self), 0) + 1
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return called


def assert_adds_up(model: nn.Module, result: lowrank.CompressionResult) -> None:
    totals = result.report.totals
    result.report.check_totals()
    assert totals["bytes_before"] == sum(tensor.nbytes for tensor in stored_tensors(model).values())
    assert totals["bytes_after"] == sum(tensor.nbytes for tensor in stored_tensors(result.model).values())
    for entry in result.plan.entries:
        module = result.model.get_submodule(entry.name)
        assert isinstance(module, CompressedLayer)
        assert entry.bytes == module.stored_bytes
        assert entry.spec == module.spec


@pytest.mark.parametrize("name", MODELS)
def test_the_promise_is_kept_and_every_layer_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batches = MODELS[name]
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    result = lowrank.compress_model(model, error_budget=0.05, calibration=batches(), progress=False)
    totals = result.report.totals
    assert totals["error_measured"] <= totals["error_upper"] <= 0.05
    unseen = Evaluator(model, prepare_batches(model, batches(9)), "output").measure(result.model)
    assert 0.0 < unseen.value <= 0.05
    assert totals["size_ratio"] < 0.36
    assert_adds_up(model, result)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert KINDS[name] <= {type(layer).__name__ for layer in result.model.modules()}

    called = count_calls(monkeypatch)
    batch = batches()[0]
    expected = run(result.model, batch)
    layers = [layer for layer in result.model.modules() if isinstance(layer, CompressedLayer)]
    assert called.keys() == {id(layer) for layer in layers}, "a layer was not called"

    directory = saved(result, tmp_path)
    loaded = lowrank.load_model(directory, model=make)
    called.clear()
    assert torch.equal(run(loaded, batch), expected)
    assert len(called) == len(layers)
    assert compressed_layers(loaded).keys() == compressed_layers(result.model).keys()
    skeleton = make()
    assert torch.equal(run(lowrank.load_model(directory, model=skeleton), batch), expected)
    assert not any(isinstance(module, CompressedLayer) for module in skeleton.modules())
    again = lowrank.apply_plan(make().eval(), result.plan, calibration=batches())
    assert torch.equal(run(again, batch), expected)


@pytest.mark.parametrize("name", ["lstm", "encoder"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_other_metrics_options_and_the_model_itself(name: str, activations: str) -> None:
    make, batches = MODELS[name]
    model = make().eval()
    by_weight = lowrank.compress_model(
        model, error_budget=0.01, metric="weight", activations=activations, progress=False
    )
    assert 0.0 < by_weight.report.totals["error_measured"] <= 0.01
    assert_adds_up(model, by_weight)
    wanted = "float" if name == "lstm" else activations
    packed = [entry for entry in by_weight.plan.entries if entry.kind in ("recurrent", "attention")]
    assert packed and {entry.activations for entry in packed} == {wanted}
    original = run(model, batches()[0])
    result = lowrank.compress_model(model, size_budget=0.5, calibration=batches(), inplace=True, progress=False)
    assert result.model is model
    found = run(model, batches()[0])
    assert 0.0 < float((found - original).norm() / original.norm()) < 0.05


def test_rows_of_modules_with_several_weights() -> None:
    result = lowrank.compress_model(Encoder().eval(), error_budget=0.05, calibration=words(), progress=False)
    rows = {row.name: row for row in result.report.rows}
    attention, out = rows["encoder.layers.1.self_attn"], rows["encoder.layers.1.self_attn.out_proj"]
    layer = result.model.get_submodule(attention.name)
    assert isinstance(layer, QuantizedMultiheadAttention)
    assert (attention.format, attention.bits, attention.activations) == ("int8", 8, layer.activations)
    assert (out.format, out.bits, out.activations) == ("int8", 8, layer.activations)
    assert attention.bytes_after + out.bytes_after == layer.stored_bytes
    assert attention.bytes_before == 4 * (96 * 32 + 96) and out.bytes_before == 4 * (32 * 32 + 32)
    assert attention.weight_error is not None and 0.0 < attention.weight_error < 0.01
    assert out.reason == "taken with encoder.layers.1.self_attn"


def test_what_is_ignored_stays_and_the_rest_of_its_encoder_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder().eval()
    result = lowrank.compress_model(
        model, error_budget=0.05, calibration=padded(), ignore=["*.self_attn", "*.1.linear1"], progress=False
    )
    rows = {row.name: row for row in result.report.rows}
    assert rows["encoder.layers.0.self_attn"].reason == "ignored"
    assert rows["encoder.layers.0.self_attn.out_proj"].format == "dense"
    assert rows["encoder.layers.0.linear1"].format != "dense"
    layers = [layer for layer in result.model.modules() if isinstance(layer, CompressedLayer)]
    called = count_calls(monkeypatch)
    batch = padded(3)[0]
    found, expected = run(result.model, batch), run(model, batch)
    assert called.keys() == {id(layer) for layer in layers}
    assert float((found - expected).norm() / expected.norm()) <= 0.05


def test_overrides_and_plans_are_checked() -> None:
    model, data = Tagger().eval(), tagged()
    forced = {"rnn": {"format": "int8", "bits": 5}}
    result = lowrank.compress_model(model, error_budget=0.5, calibration=data, overrides=forced, progress=False)
    layer = result.model.get_submodule("rnn")
    assert isinstance(layer, QuantizedLSTM)
    assert layer.bits == 5
    assert int(layer.weight_hh_l1_reverse_codes.abs().max()) == 15
    for wanted, words_of in (("lowrank", "can be dense or int8"), ({"format": "int8", "activations": "int8"}, "only")):
        with pytest.raises(UsageError, match=words_of):
            lowrank.compress_model(model, error_budget=0.5, calibration=data, overrides={"rnn": wanted})
    with pytest.raises(CheckpointError, match="weight-only"):
        lowrank.apply_plan(model, result.plan.with_entry("rnn", activations="int8"), calibration=data)
    with pytest.raises(CheckpointError, match="can be dense or int8"):
        lowrank.apply_plan(model, result.plan.with_entry("rnn", format="lowrank", rank=2), calibration=data)


def test_a_number_that_is_none_is_named() -> None:
    model = Tagger().eval()
    model.rnn.weight_hh_l1.data[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"rnn, weight_hh_l1.*\[3, 4\]"):
        lowrank.compress_model(model, error_budget=0.1, calibration=tagged(), progress=False)
    result = lowrank.compress_model(
        model, error_budget=0.01, metric="weight", on_nonfinite="copy", ignore=["embed"], progress=False
    )
    rows = {row.name: row for row in result.report.rows}
    assert rows["rnn"].format == "dense" and "left as it is" in str(rows["rnn"].reason)


@pytest.mark.parametrize(
    "change", [{"num_layers": 1}, {"bidirectional": False}, {"hidden_size": 16}, {"batch_first": False}, {"kind": 0}]
)
def test_a_model_of_other_options_is_refused_at_loading(change: dict[str, Any], tmp_path: Path) -> None:
    model = Tagger().eval()
    result = lowrank.compress_model(model, error_budget=0.05, calibration=tagged(), progress=False)
    directory = saved(result, tmp_path)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "hidden_size": 32, **change}
    options.pop("kind", None)

    def other() -> nn.Module:
        made = Tagger()
        made.rnn = (nn.GRU if "kind" in change else nn.LSTM)(24, **options)
        return made

    with pytest.raises(CheckpointError, match="rnn"):
        lowrank.load_model(directory, model=other)


@pytest.mark.parametrize("name", ["lstm", "padded"])
def test_a_damaged_scale_is_refused_at_loading(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make, batches = MODELS[name]
    # Scales of groups may be negative; those of rows may not.
    result = lowrank.compress_model(
        make().eval(), error_budget=0.05, calibration=batches(), formats=["int8"], progress=False
    )
    file = saved(result, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    leaf = "rnn.weight_hh_l0_scale" if name == "lstm" else "encoder.layers.0.self_attn.k_proj.scale"
    tensors[leaf][3] = -1.0
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="positive and finite"):
        lowrank.load_model(tmp_path / "out", model=make)


def test_a_manifest_of_a_billion_layers_is_refused_at_once(tmp_path: Path) -> None:
    result = lowrank.compress_model(Tagger().eval(), error_budget=0.05, calibration=tagged(), progress=False)
    manifest = saved(result, tmp_path) / "lowrank_config.json"
    document = json.loads(manifest.read_text())
    document["layers"]["rnn"]["options"]["num_layers"] = 10**9
    manifest.write_text(json.dumps(document))
    with (
        mock.patch("lowrank.io.index.read_tensor", side_effect=AssertionError("read")),
        mock.patch.object(QuantizedLSTM, "register_buffer", side_effect=AssertionError("built")),
        pytest.raises(CheckpointError, match="num_layers"),
    ):
        lowrank.load_model(tmp_path / "out", model=Tagger)


@pytest.mark.parametrize("name", ["lstm", "encoder"])
def test_compiled_and_exported_models_give_the_same(name: str) -> None:
    make, batches = MODELS[name]
    model = lowrank.compress_model(make().eval(), error_budget=0.05, calibration=batches(), progress=False).model
    batch = batches()[0]
    if name == "lstm":
        # A graph holds no packed sequence.
        layer = model.get_submodule("rnn")
        x = torch.randn(3, 5, 24)
        with torch.no_grad():
            assert torch.equal(torch.compile(layer, backend="aot_eager")(x)[0], layer(x)[0])
        return
    expected = run(model, batch)
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager"), batch), expected)
    with torch.no_grad():
        exported = torch.export.export(model, (batch,)).module()
        torch.testing.assert_close(exported(batch), expected)
