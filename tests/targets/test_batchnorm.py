"""Folding BatchNorm: the same outputs in eval mode, only where nothing else happens in between."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_state, eps, seeded
from torch import Tensor, nn

from lowrank import fold_batchnorm
from lowrank.errors import UsageError
from lowrank.targets.batchnorm import FoldedBatchNorm


def lively(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters as after training."""
    generator = seeded(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
                if module.affine:
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


class Block(nn.Module):
    """A residual block: the second BatchNorm's output is added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_stay_the_same_up_to_rounding(dtype: torch.dtype) -> None:
    model = lively(nn.Sequential(Block(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, affine=False), nn.Flatten())).to(dtype)
    folded, pairs = fold_batchnorm(model)
    assert pairs == [("0.conv1", "0.bn1"), ("0.conv2", "0.bn2"), ("1", "2")]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(5, 4, 8, 8, generator=seeded()).to(dtype)
    expected = copy.deepcopy(model).double()(x.double())
    error = torch.linalg.vector_norm(folded(x).double() - expected) / torch.linalg.vector_norm(expected)
    assert float(error.detach()) <= 8.0 * eps(dtype)


def test_one_dimension_and_a_bias() -> None:
    model = lively(nn.Sequential(nn.Conv1d(3, 5, 3, bias=True), nn.BatchNorm1d(5), nn.ReLU())).double()
    folded, pairs = fold_batchnorm(model)
    x = torch.randn(2, 3, 9, dtype=torch.float64, generator=seeded())
    assert pairs == [("0", "1")]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-13, atol=1e-13)


def test_the_model_itself_stays_as_it_is_and_shares_nothing_with_the_copy() -> None:
    model = lively(nn.Sequential(Block(), nn.Conv2d(4, 3, 1)))
    model[1].train()
    model[0].conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, _ = fold_batchnorm(model)
    assert_same_state(model, before)
    assert (model.training, model[1].training, folded[1].training) == (False, True, True)
    assert not folded[0].conv1.weight.requires_grad and not folded[0].conv1.bias.requires_grad
    own = {value.data_ptr() for value in folded.state_dict().values()}
    assert not own & {value.data_ptr() for value in model.state_dict().values()}


class Tangled(nn.Module):
    """Nothing here may be folded but the last pair."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.bn_shown = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.bn_twice = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.batch, self.bn_batch = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.hooked, self.bn_hooked = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.read, self.bn_read = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.acted, self.bn_acted = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
        self.bn_norm = nn.BatchNorm2d(3)
        self.good, self.bn_good = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2.0)

    def forward(self, x: Tensor) -> Tensor:
        shown = self.shown(x)
        x = self.bn_shown(shown) + shown
        x = self.bn_twice(self.bn_twice(self.twice(x)))
        x = self.bn_hooked(self.hooked(self.bn_batch(self.batch(x))))
        x = self.bn_read(self.read(x)) + self.read.weight.sum()
        x = self.bn_norm(self.norm(self.bn_acted(torch.relu(self.acted(x)))))
        return self.bn_good(self.good(x))


def test_only_pairs_between_which_nothing_happens_are_folded() -> None:
    model = lively(Tangled()).double()
    folded, pairs = fold_batchnorm(model)
    assert pairs == [("good", "bn_good")]
    assert isinstance(folded.bn_good, FoldedBatchNorm)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    model = Branching().train()
    with pytest.raises(UsageError, match=r"cannot trace this Branching \(TraceError: .*control flow") as raised:
        fold_batchnorm(model)
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
    assert model.training and model.bn.training


def test_a_convolution_whose_weight_is_tied_keeps_its_batchnorm() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].weight = model[0].weight
    folded, pairs = fold_batchnorm(model)
    assert pairs == [] and folded[2].weight is folded[0].weight is not model[0].weight


def test_parts_of_a_model_that_cannot_be_traced_as_a_whole_are_folded() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Block()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x) if x.sum() > 0 else x
            return self.bn(self.conv(x))

    model = lively(Branching()).double()
    folded, pairs = fold_batchnorm(model)
    parts = ("stem", "blocks.0", "blocks.1")
    assert pairs == [(f"{part}.conv{i}", f"{part}.bn{i}") for part in parts for i in (1, 2)]
    assert type(folded.bn) is nn.BatchNorm2d
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_network_of_transformers_is_folded_in_parts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    model = lively(transformers.ResNetForImageClassification(config)).double()
    folded, pairs = fold_batchnorm(model)
    assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) >= 5
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(folded(x).logits, model(x).logits, rtol=1e-10, atol=1e-12)
