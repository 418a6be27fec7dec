"""Models that are more, or less, than modules with weights: modes that fold, inference mode, TorchScript, torch's own quantisation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import UsageError


def data(count: int = 4) -> list[Tensor]:
    return [torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def compress(model: nn.Module, **kwargs: Any) -> lowrank.CompressionResult:
    arguments: dict[str, Any] = {"calibration": data(), "error_budget": 0.1, "formats": ["int8"], "progress": False}
    return lowrank.compress_model(model, **(arguments | kwargs))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


class Folding(nn.Linear):
    """Folds a side branch into its weight on ``eval()`` and takes it out on ``train()``, as loralib does."""

    def __init__(self) -> None:
        super().__init__(48, 48)
        self.side, self.folded = nn.Parameter(0.05 * torch.randn(48, 48)), False

    def train(self, mode: bool = True) -> Folding:
        super().train(mode)
        if mode is self.folded:
            self.weight.data += -self.side.data if mode else self.side.data
            self.folded = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.folded else super().forward(x) + x @ self.side.T


@pytest.mark.parametrize(
    ("training", "work"),
    [(True, "compress"), (True, "analyze"), (True, "apply"), (False, "analyze"), (False, "refused")],
)
def test_a_train_that_does_more_than_to_set_a_flag_is_called(training: bool, work: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Folding(), nn.ReLU(), nn.Linear(48, 8)).train(training)
    before, x = model[0].weight.detach().clone(), data(1)[0]
    wanted = model(x)
    if work == "analyze":
        lowrank.analyze_model(model, calibration=data(), progress=False)
    elif work == "refused":
        # A file of the folded weight would be folded once more by whoever loads it.
        with pytest.raises(UsageError, match=r"pass model.train\(\) and save in that mode"):
            compress(model, ignore=["0"])
    else:
        result = compress(model, ignore=["0"])
        if work == "apply":
            lowrank.apply_plan(model, result.plan, data())
    assert model.training is training and model[0].training is training and model[0].folded is not training
    # Folded once and taken out once: to rounding.
    torch.testing.assert_close(model[0].weight, before, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_aware", [False, "auto"])
def test_inside_inference_mode(loss_aware: Any) -> None:
    """There tensors know no gradients, and stay so when the block is left."""
    with torch.inference_mode():
        model, inputs = mlp(), [x.clone() for x in data()]
        inside = compress(model, calibration=inputs, loss_aware=loss_aware, formats="all")
        assert model[0].weight.is_inference()
    outside = compress(mlp(), loss_aware=loss_aware, formats="all")
    x = data(1)[0]
    assert inside.plan.entries == outside.plan.entries
    with torch.no_grad():
        assert torch.equal(inside.model(x), outside.model(x))
        # And out of it the result is a model like any other.
        again = compress(model, calibration=inputs, loss_aware=loss_aware, formats="all")
        assert torch.equal(again.model(x), outside.model(x))


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found: nn.Module = torch.jit.trace(model, data(1)[0])
        return found


@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused_by_name(inside: bool) -> None:
    model = scripted(mlp())
    if inside:
        model = nn.Sequential(nn.Linear(48, 48), nn.Sequential(model)).eval()
    where = r"layer 1\.0 is TorchScript" if inside else r"the model is TorchScript"
    with pytest.raises(UsageError, match=where + r".*pass the nn.Module that it was made from"):
        compress(model)
    with pytest.raises(UsageError, match="TorchScript"):
        lowrank.analyze_model(model, calibration=data(), progress=False)


@pytest.mark.parametrize("inside", [False, True])
def test_modules_that_torch_has_quantised_are_refused_by_name(inside: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    if inside:
        model = nn.Sequential(nn.Linear(48, 48), model).eval()
    with pytest.raises(UsageError, match=rf"layer {r'1[.]0' if inside else '0'} is a .*torch has quantised it already"):
        compress(model)


def test_weights_that_are_views_count_as_what_they_show() -> None:
    """Transposed, negated and imaginary views: the numbers are what is compressed."""
    torch.manual_seed(0)
    plain, views = mlp(), mlp()
    conjugate = torch.complex(torch.zeros(8, 48), -plain[2].weight.detach()).conj()
    with torch.no_grad():
        views[0].weight = nn.Parameter(plain[0].weight.detach().T.contiguous().T)
        views[2].weight = nn.Parameter(conjugate.imag)
        assert views[2].weight.is_neg() and not views[0].weight.is_contiguous()
    one, other = compress(plain), compress(views)
    x = data(1)[0]
    with torch.no_grad():
        assert one.plan.entries == other.plan.entries and torch.equal(one.model(x), other.model(x))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (torch.compile, r"wrapped by torch.compile; pass model._orig_mod"),
        (nn.DataParallel, r"wrapped by DataParallel; pass model.module"),
    ],
)
def test_wrappers_are_refused_by_name(wrap: Any, words: str) -> None:
    with warnings.catch_warnings():
        # Importing torch's compiler warns of TorchScript.
        warnings.simplefilter("ignore", DeprecationWarning)
        wrapped = wrap(mlp())
    with pytest.raises(UsageError, match=words):
        compress(wrapped)


class Odd(nn.Module):
    """Holds numbers of every kind beside two layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.fc, self.head = nn.Linear(48, 64), nn.Linear(64, 8)
        self.register_buffer("ids", torch.arange(7))
        self.register_buffer("flags", torch.arange(6) > 2)
        self.register_buffer("short", torch.arange(5).to(torch.uint16))
        self.register_buffer("coarse", torch.randn(16, 16, generator=generator).to(torch.float8_e4m3fn))
        self.waves = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.complex64))
        self.table = nn.Embedding(5, 8)
        self.table.weight = nn.Parameter(torch.randint(0, 9, (5, 8), generator=generator), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(x)))


def test_numbers_of_other_kinds_are_copied_bit_for_bit_and_listed(tmp_path: Path) -> None:
    model = Odd().eval()
    result = compress(model)
    rows = {row.name: row for row in result.report.rows}
    assert not rows[""].compressed and not rows["table"].compressed and "dtype torch.int64" in str(rows["table"].reason)
    result.save(tmp_path / "out")
    loaded = lowrank.load_model(tmp_path / "out", model=Odd).state_dict()
    for name in ("ids", "flags", "short", "coarse", "waves", "table.weight"):
        before, after = model.state_dict()[name], loaded[name]
        assert before.dtype == after.dtype and before.shape == after.shape
        if name == "coarse":
            # NumPy has no such numbers.
            before, after = before.view(torch.uint8), after.view(torch.uint8)
        assert before.numpy(force=True).tobytes() == after.numpy(force=True).tobytes()
