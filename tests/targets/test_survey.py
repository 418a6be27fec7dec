"""Which modules are targets, why the others are not, and that swapping reaches every place."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers import SVDCompressedLinear
from lowrank.targets import LINEAR
from lowrank.targets.model import matching, replace_module, unwrapped
from lowrank.targets.survey import survey


class Conv1D(nn.Module):
    """As transformers' own: weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _reasons(model: nn.Module, **options: object) -> dict[str, str]:
    return {item.member.name: item.reason for item in survey(model, **options).skipped}  # type: ignore[arg-type]


def _targets(model: nn.Module, **options: object) -> list[str]:
    return [target.name for target in survey(model, **options).targets]  # type: ignore[arg-type]


def test_every_module_with_weights_is_a_target_or_skipped_with_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 3),
            "c1": Conv1D(5, 4),
            "emb": nn.Embedding(7, 4),
            "conv": nn.Conv2d(3, 4, 3),
            "lstm": nn.LSTM(4, 4),
            "gru": nn.GRUCell(4, 4),
            "norm": nn.LayerNorm(4),
            "bn": nn.BatchNorm1d(4),
            "mha": nn.MultiheadAttention(4, 2),
            "drop": nn.Dropout(),
        }
    )
    assert _targets(model) == ["fc", "c1", "emb", "conv", "lstm", "gru", "mha"]
    reasons = _reasons(model)
    assert set(reasons) == {"norm", "bn", "mha.out_proj"}
    assert "without calling" in reasons["mha.out_proj"]
    assert [member.name for member in survey(model).members] == [
        "fc",
        "c1",
        "emb",
        "conv",
        "lstm",
        "gru",
        "norm",
        "bn",
        "mha",
        "mha.out_proj",
    ]


def test_several_weights_in_one_module_are_a_target_or_refused_by_name() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))
    assert _targets(model) == ["0.self_attn", "0.linear1", "0.linear2", "1"]
    assert _targets(model, ignore=["0.self_attn.out_proj"]) == ["0.linear1", "0.linear2", "1"]
    found = {target.name: (target.kind.name, target.shape) for target in survey(model).targets}
    assert found["0.self_attn"] == ("attention", (24, 8))

    class Special(nn.LSTM):
        pass

    class Own(nn.LSTM):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def, override]
            return super().forward(*args, **kwargs)

    shared_by_own = nn.ModuleDict({"lstm": Own(4, 4), "linear": nn.Linear(4, 16)})
    shared_by_own["lstm"].weight_ih_l0 = shared_by_own["linear"].weight
    assert _targets(shared_by_own) == []
    assert "shares a weight" in _reasons(shared_by_own)["lstm"]

    tied = nn.GRU(4, 4)
    tied.weight_hh_l0 = nn.Parameter(torch.zeros(12, 4))
    hooked = nn.MultiheadAttention(4, 2)
    hooked.register_forward_hook(lambda module, args, output: None)
    mixed = nn.GRU(4, 4)
    mixed.weight_ih_l0 = nn.Parameter(torch.zeros(12, 4).double())
    shared = nn.ModuleDict({"first": nn.GRU(4, 4), "second": tied, "linear": nn.Linear(4, 12)})
    shared["first"].weight_hh_l0 = shared["linear"].weight
    model = nn.ModuleDict(
        {
            "special": Special(4, 4),
            "bias_kv": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "zero": nn.MultiheadAttention(4, 2, add_zero_attn=True),
            "weight_norm": nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
            "hooked": hooked,
            "mixed": mixed,
            "shared": shared,
            "meta": nn.LSTM(4, 4, device="meta"),
            "cell": nn.RNNCell(4, 4),
        }
    )
    assert _targets(model) == ["special", "shared.second", "cell"]
    reasons = _reasons(model)
    for name, words in {
        "bias_kv": "add_bias_kv",
        "zero": "add_zero_attn",
        "weight_norm": "parametrized",
        "hooked": "hooks",
        "mixed": "dtype",
        "shared.first": "shares a weight",
        "shared.linear": "tied with shared.first",
        "meta": "meta device",
    }.items():
        assert re.search(words, reasons[name]), (name, reasons[name])
    assert "not among targets" in _reasons(model, targets=["embedding"])["cell"]


def test_parametrized_hooked_and_subclassed_layers_are_refused_by_name() -> None:
    class Special(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.gain = nn.Parameter(torch.ones(4, dtype=torch.float64))

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: None)
    patched = nn.Linear(4, 4)
    patched.forward = patched.forward  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "norm": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "spectral": torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            "hooked": hooked,
            "special": Special(),
            "patched": patched,
            "max_norm": nn.Embedding(4, 4, max_norm=1.0),
            "fc": nn.Linear(4, 4),
        }
    )
    assert _targets(model) == ["fc"]
    reasons = _reasons(model)
    assert "parametrized" in reasons["norm"] and "parametrized" in reasons["spectral"]
    assert "hooks" in reasons["hooked"]
    assert "more than one dtype" in reasons["special"]
    assert "replaced on the instance" in reasons["patched"]
    assert "max_norm" in reasons["max_norm"]


def test_weights_that_hold_no_plain_numbers_are_refused_by_name() -> None:
    class Wrapped(Tensor):
        pass

    model = nn.ModuleDict(
        {
            "meta": nn.Linear(4, 4, device="meta"),
            "lazy": nn.LazyLinear(4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "empty": nn.Linear(1, 4),
            "fc": nn.Linear(4, 4),
        }
    )
    model["empty"].weight = nn.Parameter(torch.zeros(4, 0))
    model["wrapped"] = nn.Linear(4, 4)
    model["wrapped"].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Wrapped))
    assert _targets(model) == ["fc"]
    reasons = _reasons(model)
    assert "meta device" in reasons["meta"]
    assert "complex64" in reasons["complex"]
    assert "nothing to compress" in reasons["empty"]
    assert "plain tensor" in reasons["wrapped"]
    assert "not yet initialised" in reasons["lazy"]


def test_tied_weights_are_one_target_and_half_tied_ones_none() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "other": nn.Linear(4, 4)})
    model["head"].weight = model["emb"].weight
    found = survey(model)
    assert [[member.name for member in target.members] for target in found.targets] == [["emb", "head"], ["other"]]
    assert found.targets[0].looked_up and [member.name for member in found.targets[0].multiplying] == ["head"]
    assert _targets(model, targets=["linear"]) == ["other"]
    assert "tied with emb" in _reasons(model, targets=["linear"])["head"]


def test_a_module_used_twice_is_one_target_with_two_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    (target,) = survey(model).targets
    assert target.members[0].names == ("0", "2")
    new = nn.Identity()
    replace_module(model, target.members[0].names, new)
    assert model[0] is new and model[2] is new


def test_ignore_covers_what_is_inside_and_lists_near_misses() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    assert _targets(model, ignore=["encoder"]) == ["head"]
    assert _targets(model, ignore=["encoder.0"]) == ["encoder.1", "head"]
    assert _targets(model, ignore=["*.1"]) == ["encoder.0", "head"]
    with pytest.raises(UsageError, match="did you mean encoder") as raised:
        survey(model, ignore=["encodr.*"])
    assert raised.value.exit_code == 2
    with pytest.raises(UsageError, match="must be a list"):
        matching("head", ["head"], "ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [[], ["lstm"], "linear"])
def test_unknown_kinds_of_targets_are_refused(targets: object) -> None:
    with pytest.raises(UsageError, match="targets"):
        survey(nn.Sequential(nn.Linear(2, 2)), targets=targets)  # type: ignore[arg-type]


def test_wrappers_and_bare_layers_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="single layer"):
        unwrapped(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="_orig_mod"):
        unwrapped(torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"))
    with pytest.raises(UsageError, match="DataParallel"):
        unwrapped(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        unwrapped("model")


def test_compressed_layers_are_not_compressed_again() -> None:
    model = nn.Sequential(SVDCompressedLinear(4, 4, 2), nn.Linear(4, 4))
    assert _reasons(model)["0"] == "already compressed"


def test_the_matrix_of_a_conv1d_is_transposed() -> None:
    layer = Conv1D(5, 4)
    assert torch.equal(LINEAR.matrix(layer), layer.weight.detach().T)


def test_convolutions_are_targets_with_their_full_shape() -> None:
    model = nn.ModuleDict(
        {
            "one": nn.Conv1d(6, 4, 3, groups=2, padding="same"),
            "two": nn.Conv2d(3, 4, (3, 5), stride=2, padding_mode="reflect", padding=1),
        }
    )
    found = survey(model).targets
    assert [(target.name, target.kind.name, target.shape) for target in found] == [
        ("one", "conv", (4, 3, 3)),
        ("two", "conv", (4, 3, 3, 5)),
    ]
    assert "not among targets" in _reasons(model, targets=["linear"])["two"]


def test_convolutions_that_are_no_targets_are_named_with_the_reason() -> None:
    class Special(nn.Conv2d):
        def forward(self, x):  # type: ignore[no-untyped-def, override]
            return super().forward(x) * 2

    hooked = nn.Conv2d(2, 2, 3)
    hooked.register_forward_pre_hook(lambda module, args: None)
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(2, 2, 3),
            "video": nn.Conv3d(2, 2, 3),
            "special": Special(2, 2, 3),
            "hooked": hooked,
            "norm": torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3)),
            "lazy": nn.LazyConv2d(2, 3),
            "meta": nn.Conv2d(2, 2, 3, device="meta"),
            "one": nn.Conv2d(2, 2, 3),
            "tied": nn.Conv2d(2, 2, 3),
            "plain": nn.Conv2d(2, 2, 3),
        }
    )
    model["tied"].weight = model["one"].weight
    assert _targets(model) == ["up", "video", "special", "plain"]
    assert {target.kind.name for target in survey(model).targets} == {"decoded-conv", "conv"}
    assert all("conv layers" in reason for reason in list(_reasons(model, targets=["linear"]).values())[:3])
    reasons = _reasons(model)
    expected = {
        "hooked": "hooks",
        "norm": "parametrized",
        "lazy": "not yet initialised",
        "meta": "meta device",
        "one": "tied",
        "tied": "tied",
    }
    assert set(reasons) - set(expected) == {"norm.parametrizations.weight"}
    assert all(text in reasons[name] for name, text in expected.items())
