"""Weights from files: what torch.save wrote comes back, and no file can do more than be wrong."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastconv
from fastconv import checkpoint, models, nn, weights
from fastconv.tensor import Array
from fastconv.weights import read_weights

FORMATS = ["zip", "legacy"]


def save(path: Path, value: Any, form: str = "zip", protocol: int = 2) -> Path:
    new = form == "zip"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return path


def tensors() -> dict[str, torch.Tensor]:
    """Every type, awkward strides, no dimension, no element, and memory that is shared."""
    torch.manual_seed(0)
    base = torch.randn(4, 6, 5)
    return {
        "float32": base,
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "float16": torch.randn(7).half(),
        "int64": torch.tensor(2**40),
        "int32": torch.arange(-3, 3, dtype=torch.int32),
        "int16": torch.arange(-3, 3, dtype=torch.int16),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "uint8": torch.arange(250, 256, dtype=torch.uint8),
        "bool": torch.tensor([[True, False], [False, True]]),
        "transposed": base.permute(2, 0, 1),
        "every other": base[::2, 1:, ::3],
        "one row": base[3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 4),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.zeros(0, 3),
    }


# Files of torch.save


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_torch_files_come_back(tmp_path: Path, form: str, protocol: int) -> None:
    expected = tensors()
    found = read_weights(save(tmp_path / "weights.pth", expected, form, protocol))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.detach().numpy(), strict=True)
    assert np.shares_memory(found["float32"], found["transposed"])
    assert not np.shares_memory(found["float32"], found["float16"])


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
def test_bfloat16_becomes_float32(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    tensor = torch.cat([torch.randn(50), torch.tensor([0.0, -0.0, torch.inf, 1e-40])]).bfloat16()
    path = tmp_path / "weights"
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file({"w": tensor}, path)
    else:
        save(path, {"w": tensor}, form)
    np.testing.assert_array_equal(read_weights(path)["w"], tensor.float().numpy(), strict=True)


@pytest.mark.parametrize("form", FORMATS)
def test_state_of_a_module(tmp_path: Path, form: str) -> None:
    """An OrderedDict with metadata, whose weights then give the same numbers."""
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = save(tmp_path / "weights.pth", layer.state_dict(), form)
    mine = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert mine.load_state_dict(read_weights(path)) == ([], [])
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = layer.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(mine(x).data, expected, rtol=1e-5, atol=1e-6)


def test_big_endian(tmp_path: Path) -> None:
    path = save(tmp_path / "little.pth", {"w": torch.arange(5.0), "n": torch.tensor(3)})
    swapped = rewritten(
        path,
        lambda name, content: (
            b"big"
            if name.endswith("byteorder")
            else np.frombuffer(content, "<f4").astype(">f4").tobytes()
            if name.endswith("data/0")
            else content[::-1]
            if name.endswith("data/1")
            else content
        ),
    )
    found = read_weights(swapped)
    assert found["w"].tolist() == [0, 1, 2, 3, 4] and found["n"] == 3


def test_python_2_wrote_ordered_dicts_as_lists_of_pairs(tmp_path: Path) -> None:
    class Pairs(collections.OrderedDict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            return collections.OrderedDict, ([[key, value] for key, value in self.items()],)

    path = save(tmp_path / "weights.pth", Pairs(w=torch.ones(2), b=torch.zeros(1)), "legacy")
    assert [list(v) for v in read_weights(path).values()] == [[1, 1], [0]]


def test_neither_torch_nor_any_of_its_code_is_needed(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", tensors())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import fastconv; print(len(fastconv.read_weights(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{len(tensors())}\n"


# Which of the tensors are meant


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_training_checkpoints(tmp_path: Path, name: str, form: str) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        name: layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "loss": [0.5, None, True, ("a", {1: 2.5})],
    }
    found = read_weights(save(tmp_path / "checkpoint.pth", saved, form))
    assert found.keys() == {"weight", "bias"}


def test_several_state_dicts_need_a_choice(tmp_path: Path) -> None:
    ones, twos = ({"w": torch.full((2,), n)} for n in (1.0, 2.0))
    path = save(tmp_path / "checkpoint.pth", {"model": ones, "ema": twos, "epoch": 1})
    with pytest.raises(ValueError, match=r"each of \['model', 'ema'\]: say which, its keys are"):
        read_weights(path)
    assert read_weights(path, "ema")["w"].tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"no weights under 'epoch', its keys are \['model', "):
        read_weights(path, "epoch")


def test_the_prefix_of_a_wrapper_goes_when_all_names_have_it(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wrapped = torch.nn.DataParallel(model).state_dict()
    found = read_weights(save(tmp_path / "a.pth", {"state_dict": wrapped}))
    assert list(found) == ["0.weight", "0.bias"]
    some = {"module.w": torch.ones(1), "w": torch.ones(1)}
    assert list(read_weights(save(tmp_path / "b.pth", some))) == list(some)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3}, r"no state_dict, its keys are \['epoch'\]"),
        ({}, r"no state_dict, its keys are \[\]"),
        ([torch.ones(1)], "holds a list, not a state_dict"),
        (torch.ones(1), "holds a ndarray, not a state_dict"),
        ({"w": torch.ones(1), "epoch": 3}, r"no state_dict, its keys are \['w', 'epoch'\]"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"some\.pth: {message}"):
        read_weights(save(tmp_path / "some.pth", value))


def test_safetensors_files_are_known_by_their_content(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "weights.pth"  # the name means nothing
    checkpoint.save_weights(path, {"module.w": np.ones(2), "module.b": np.arange(3)})
    found = read_weights(path)
    assert found["w"].tolist() == [1, 1] and found["b"].tolist() == [0, 1, 2]


def test_the_length_of_a_safetensors_header_may_look_like_a_pickle(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "weights"
    starts = set()
    for length in range(0, 260, 8):
        checkpoint.save_weights(path, {"w" * (1 + length): np.ones(2)})
        starts.add(path.read_bytes()[0])
        assert len(read_weights(path)) == 1
    assert 0x80 in starts


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "some.pth"
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(20)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"some\.pth: neither a file of torch\.save nor"):
            read_weights(path)
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    with pytest.raises(ValueError, match=r"a\.npz: .*without data\.pkl"):
        read_weights(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "nowhere.pth")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"program/{name}", b"\x80\x02N.")
    with pytest.raises(ValueError, match=r"TorchScript program; save its state_dict"):
        read_weights(path)


# Malicious and damaged files


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive with the content that change(name, content) returns; None leaves a file out."""
    target = path.with_name(f"rewritten-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_pickle(tmp_path: Path, pickled: bytes, form: str) -> Path:
    """A file that torch.save might have written, with this pickle as its object."""
    path = tmp_path / f"{form}.pth"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        return path
    start = io.BytesIO()
    torch.save({}, start, _use_new_zipfile_serialization=False)
    magic_version_machine = start.getvalue()[: -len(b"\x80\x02}q\x00.\x80\x02]q\x00.")]
    keys = pickle.dumps(["0"], 2)
    storage = struct.pack("<q4f", 4, 1, 2, 3, 4)
    path.write_bytes(magic_version_machine + pickled + keys + storage)
    return path


def tensor_pickle(
    *,
    storage: str = "torch FloatStorage",
    key: str = "0",
    length: int = 4,
    offset: Any = 0,
    shape: Any = (2, 2),
    strides: Any = (2, 1),
    tail: str = "",
) -> bytes:
    """{"w": a tensor}, as torch pickles it, from its parts."""

    def literal(value: Any) -> str:
        return pickle.dumps(value, 2)[2:-1].decode("latin-1")

    def name(value: str) -> str:
        return "c{}\n{}\n".format(*value.split(" ", 1))

    persistent = (
        f"({literal('storage')}{name(storage)}{literal(key)}{literal('cpu')}{literal(length)}tQ"
    )
    view = f"{literal(offset)}{literal(shape)}{literal(strides)}"
    hooks = f"\x89{name('collections OrderedDict')})R"
    tensor = f"{name('torch._utils _rebuild_tensor_v2')}({persistent}{view}{hooks}tR"
    return f"\x80\x02}}{literal('w')}{tensor}{tail}s.".encode("latin-1")


class Runs:
    """Unpickling this runs a command of the shell."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", [*FORMATS, "bare pickle"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "__builtin__.eval"),
        (os.popen, "os.popen"),
        (getattr, "__builtin__.getattr"),
        (pickle.loads, "pickle.loads"),
        (torch.load, "torch.serialization.load"),
    ],
)
def test_no_file_can_run_anything(
    tmp_path: Path, function: Callable[..., Any], name: str, form: str
) -> None:
    proof = tmp_path / "it ran"
    pickled = pickle.dumps({"w": Runs(function, f"touch '{proof}'")}, 2)
    if form == "bare pickle":
        path = tmp_path / "bare.pth"
        path.write_bytes(pickled)
    else:
        path = with_pickle(tmp_path, pickled, form)
    with pytest.raises(ValueError, match=rf"\.pth: .*asks for ({name}), which weights do not need"):
        read_weights(path)
    assert not proof.exists()


def test_the_attack_would_work_on_pickle(tmp_path: Path) -> None:
    """The test above can fail: the same bytes do run a command where nothing is restricted."""
    pickle.loads(pickle.dumps({"w": Runs(os.system, f"touch '{tmp_path / 'it ran'}'")}, 2))
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_tensor_made_by_hand(tmp_path: Path, form: str) -> None:
    """What follows changes this file; unchanged it is right."""
    found = read_weights(with_pickle(tmp_path, tensor_pickle(), form))
    assert found["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"offset": 1}, "offset 1, shape (2, 2) and strides (2, 1) reaches outside"),
        ({"strides": (3, 1)}, "reaches outside of its storage of 4 elements"),
        ({"shape": (2**62, 2**62), "strides": (2**40, 1)}, "reaches outside"),
        ({"shape": (2**62, 2**62), "strides": (0, 0)}, "not a readable weight file"),
        ({"offset": -1}, "a tensor of offset -1"),
        ({"strides": (-2, 1)}, "strides (-2, 1)"),
        ({"shape": (-2, 2)}, "shape (-2, 2)"),
        ({"strides": (1,)}, "strides (1,)"),
        ({"shape": [2, 2]}, "shape list"),
        ({"shape": ("2", 2)}, "shape tuple"),
        ({"offset": True}, "offset bool"),
        ({"length": 5}, "storage '0' has 16 bytes, its 5 elements of type f4 need 20"),
        (
            {"length": 3, "shape": (3,), "strides": (1,)},
            "storage '0' has 16 bytes, its 3 elements of type f4 need 12",
        ),
        ({"length": -4}, "not described as PyTorch does"),
        ({"key": "1"}, "storage '1' is missing|storage '0' belongs to no tensor"),
        ({"key": "../../data.pkl"}, "is missing|storage '0' belongs to no tensor"),
        ({"storage": "torch ComplexFloatStorage"}, "asks for torch.ComplexFloatStorage"),
        ({"storage": "collections OrderedDict"}, "not described as PyTorch does"),
        ({"tail": "}b"}, "a _View in the place of a dict"),
        ({"tail": "\x85R"}, "a call of something that is no function: str"),
        ({"tail": "\x81"}, "the instruction NEWOBJ, which no weights need"),
        ({"tail": "(i__main__\nx\n"}, "the instruction INST"),
        ({"tail": "\x82\x01"}, "the instruction EXT1"),
        ({"tail": "00000000"}, "the instruction POP"),
        ({"tail": "h\x07"}, "uses entry 7 before it is there"),
        ({"tail": "r\xff\xff\xff\xff"}, None),  # a memo of 4 billion entries: one is used
        ({"tail": "uuu"}, "closes what it did not open"),
        ({"tail": "sss"}, "takes more from its stack|in the place of a dict"),
        ({"tail": "X\xff\xff\xff\xffab"}, "expected 4294967295 bytes"),
    ],
    ids=str,
)
def test_contradictions_are_named(
    tmp_path: Path, parts: dict[str, Any], message: str | None, form: str
) -> None:
    path = with_pickle(tmp_path, tensor_pickle(**parts), form)
    if message is None:
        assert read_weights(path)["w"].tolist() == [[1, 2], [3, 4]]
        return
    pattern = "|".join(re.escape(part) for part in message.split("|"))
    with pytest.raises(ValueError, match=rf"{form}\.pth: .*({pattern})"):
        read_weights(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", "a dict with a key of type tuple"),
        (b"\x80\x02}]Ns.", "a dict with a key of type list"),
        (b"\x80\x02)" + b"\x85" * 10**5 + b".", "nested more than 50 levels deep"),
        (b"\x80\x02]q\x00h\x00a.", "nested more than 50 levels deep"),
        (b"\x80\x02]q\x00" + b"]q\x00(" * 60 + b"h\x00h\x00e" * 60 + b".", "."),
        (b"\x80\x02ctorch\nFloatStorage\n.", "a name without a tensor"),
        (b"\x80\x02", "."),
        (b"\x80\x02.", "takes more from its stack than there is"),
        (b"", "."),
        (b"\x80\x02\xff.", "."),
        (b"\x80\x02}ccollections\nOrderedDict\n}R.", "a call with a dict as arguments"),
    ],
    ids=range(11),
)
def test_pickles_that_crash_others(tmp_path: Path, pickled: bytes, message: str, form: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_weights(with_pickle(tmp_path, pickled, form))


def test_one_list_in_many_places_is_not_walked_again_and_again(tmp_path: Path) -> None:
    """Forty lists, each with the one before it twice: a trillion elements."""
    laughs: list[Any] = []
    for _ in range(40):
        laughs = [laughs, laughs]
    path = save(tmp_path / "laughs.pth", {"state_dict": {"w": torch.ones(1)}, "laughs": laughs})
    assert read_weights(path)["w"] == 1


def test_archives_that_lie(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", {"w": torch.arange(100.0)})
    with zipfile.ZipFile(path) as archive:
        data = next(n for n in archive.namelist() if n.endswith("data/0"))
    for change, message in (
        (lambda n, c: c[:-4] if n == data else c, "has 396 bytes, its 100 elements .* need 400"),
        (lambda n, c: None if n == data else c, "storage '0' is missing"),
        (lambda n, c: b"middle" if n.endswith("byteorder") else c, "unknown byte order b'middle'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_weights(rewritten(path, change))

    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<2f", 41, 42))] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.pth: .*Bad CRC-32"):
        read_weights(tmp_path / "flipped.pth")


def test_archives_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "archive/data.pkl", tensor_pickle(length=2**22, shape=(2**22,), strides=(1,))
        )
        archive.writestr("archive/data/0", bytes(2**24))
    assert path.stat().st_size < 2**16
    with pytest.raises(ValueError, match="a compressed zip archive, which PyTorch never writes"):
        read_weights(path)

    # Entries that are stored, but overlap: each is the whole of the file's longest part.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle())
        archive.writestr("archive/data/0", bytes(2**16))
        for n in range(1, 50):
            entry = zipfile.ZipInfo(f"archive/data/{n}")
            first = archive.getinfo("archive/data/0")
            entry.file_size = entry.compress_size = first.file_size
            entry.CRC, entry.header_offset = first.CRC, first.header_offset
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
    with pytest.raises(
        ValueError, match=r"its parts claim to be larger than the file of \d+ bytes"
    ):
        read_weights(path)


@pytest.mark.parametrize("form", FORMATS)
def test_cut_files(tmp_path: Path, form: str) -> None:
    content = save(tmp_path / "whole.pth", {"w": torch.arange(20.0), "b": torch.ones(3)}, form)
    whole = content.read_bytes()
    path = tmp_path / "cut.pth"
    for length in [*range(4, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth: "):
            read_weights(path)


@pytest.mark.parametrize("form", FORMATS)
def test_random_damage_is_an_error_or_harmless(tmp_path: Path, form: str) -> None:
    """Nothing but ValueError, and nothing but arrays, comes out of a file with changed bytes."""
    value = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    whole = save(tmp_path / "whole.pth", value, form).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        try:
            found = read_weights(path)
        except ValueError:
            refused += 1
        else:
            assert all(isinstance(array, np.ndarray) for array in found.values())
            assert all(array.size <= 64 for array in found.values() if 0 not in array.strides)
    assert 50 < refused < 200


# Into a model


def test_a_live_module_gives_its_weights() -> None:
    reference = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    mine = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert mine.load_state_dict(reference) == ([], [])
    for key, value in reference.state_dict().items():
        np.testing.assert_array_equal(mine.state_dict()[key], value.numpy())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other.load_state_dict(mine)
    np.testing.assert_array_equal(other[0].weight.data, mine[0].weight.data)
    mine.load_state_dict(reference.bfloat16())
    np.testing.assert_array_equal(mine[0].weight.data, reference[0].weight.detach().float().numpy())
    for wrong in (7, torch.nn.Linear, None):
        with pytest.raises(TypeError, match="expected weights by name or a module, got"):
            mine.load_state_dict(wrong)  # type: ignore[arg-type]


def test_num_batches_tracked_may_be_missing() -> None:
    """As in PyTorch: it is younger than many weights."""
    state = dict(nn.BatchNorm2d(4).state_dict())
    del state["num_batches_tracked"]
    layer = nn.Sequential(nn.BatchNorm2d(4))
    layer[0].num_batches_tracked += 5
    assert layer.load_state_dict({f"0.{k}": v for k, v in state.items()}) == ([], [])
    assert layer.state_dict()["0.num_batches_tracked"] == 5
    assert torch.nn.BatchNorm2d(4).load_state_dict(
        {k: torch.from_numpy(v) for k, v in state.items()}
    ) == ([], [])
    del state["running_var"]
    with pytest.raises(ValueError, match="missing key 'running_var'"):
        nn.BatchNorm2d(4).load_state_dict(state)


# Transfer


def small(num_classes: int = 10) -> nn.Module:
    return models.create("smallcnn", image_size=8, num_classes=num_classes)


@pytest.mark.parametrize(
    ("name", "head", "outputs"),
    [
        ("smallcnn", "classifier", ["classifier.4"]),
        ("lenet5", "classifier", ["classifier.5"]),
        ("resnet8_cifar", "fc", ["fc"]),
        ("textbook_stack", "layers.12", ["layers.12"]),
        ("efficientnet_lite0", "_fc", ["_fc"]),
    ],
)
def test_heads(name: str, head: str, outputs: list[str]) -> None:
    model = models.create(name)
    assert weights.head(model) == head
    assert weights.output_layers(model) == outputs


class TwoHeads(nn.Module):
    def __init__(self, classes: int) -> None:
        self.body = nn.Conv2d(1, 4, 3)
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, classes))
        self.gate = nn.Linear(4, 4)
        self.fc = nn.Linear(4, classes)


def test_auxiliary_heads() -> None:
    model = TwoHeads(5)
    assert weights.head(model) == "fc"
    assert weights.output_layers(model) == ["aux.2", "fc"]
    state = {key: value.copy() for key, value in TwoHeads(7).state_dict().items()}
    assert weights.load_pretrained(model, state) == (["aux.2", "fc"], None)
    np.testing.assert_array_equal(model.aux[0].weight.data, state["aux.0.weight"])
    with pytest.raises(ValueError, match="Flatten has no Linear layer"):
        weights.head(nn.Flatten())


def test_weights_of_other_classes() -> None:
    fastconv.manual_seed(1)
    pretrained, model = small(7), small(10)
    fresh = model.classifier[4].weight.data.copy()
    assert weights.load_pretrained(model, pretrained.state_dict()) == (["classifier.4"], None)
    np.testing.assert_array_equal(model.classifier[4].weight.data, fresh)
    for key, value in model.state_dict().items():
        if not key.startswith("classifier.4."):
            np.testing.assert_array_equal(value, pretrained.state_dict()[key], err_msg=key)

    same = small(7)
    assert weights.load_pretrained(same, pretrained.state_dict()) == ([], None)
    np.testing.assert_array_equal(
        same.classifier[4].weight.data, pretrained.classifier[4].weight.data
    )


def test_only_the_number_of_classes_may_differ() -> None:
    state: dict[str, Array] = dict(small(7).state_dict())
    state["features.0.weight"] = np.zeros((32, 1, 3, 3))
    del state["features.1.bias"]
    state["extra"] = np.zeros(1)
    with pytest.raises(ValueError) as caught:
        weights.load_pretrained(small(10), state)
    for part in (
        "'features.0.weight': shape (32, 1, 3, 3) does not fit (32, 3, 3, 3)",
        "missing key 'features.1.bias' (shape (32,))",
        "unexpected key 'extra'",
    ):
        assert part in str(caught.value)
    assert "classifier.4" not in str(caught.value)


def test_a_frozen_backbone_stays_as_it_is() -> None:
    model = small()
    state = {key: value.copy() for key, value in model.state_dict().items()}
    weights.freeze_backbone(model.train())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"classifier.{n}.{w}" for n in (1, 4) for w in ("weight", "bias")]
    x = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    nn.CrossEntropyLoss()(model(x), np.arange(6)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert model.training and model.classifier.training and model.classifier[3].training
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
