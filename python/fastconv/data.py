"""Data sets in memory, readers of the usual file formats, and the loader that makes batches.

A data set is uint8 images [N, H, W, C] and int64 labels [N]. The loader shuffles, augments and
normalises; everything random is a function of (seed, epoch, index of the image), so a run that is
resumed in the middle of an epoch sees the pixels that the run which was never stopped saw.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv import cuda
from fastconv.augment import ORDER, Augmentation, Draws
from fastconv.init import Share

__all__ = [
    "NAMES",
    "DataLoader",
    "Dataset",
    "ResidentLoader",
    "channel_statistics",
    "cifar10",
    "cifar100",
    "image_folder",
    "load",
    "mnist5k",
    "mnist_idx",
    "read_image",
    "resized",
]

Path_ = str | PathLike[str]
Batch = tuple[NDArray[np.float32], NDArray[np.int64]]

DIGITS = tuple("0123456789")
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory.

    images   uint8 [N, H, W, C], or [N, H, W], which is kept as [N, H, W, 1]
    labels   integers [N] in [0, len(classes)), kept as int64
    classes  the name of each class

    Raises TypeError for images that are not uint8 or labels that are no integers, ValueError for
    sizes that do not agree and for labels out of range.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = np.asarray(self.images), np.asarray(self.labels)
        if images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                "images must be [N, H, W] or [N, H, W, C] and labels [N], "
                f"got {list(np.shape(self.images))} and {list(labels.shape)}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(
                f"labels must lie in [0, {len(self.classes)}), got {labels.min()} to {labels.max()}"
            )
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels.astype(np.int64))
        object.__setattr__(self, "classes", tuple(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | NDArray[Any] | Sequence[int]) -> Dataset:
        """The data set of the chosen images: a slice, an array of indices or of booleans."""
        return Dataset(self.images[index], self.labels[index], self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        _, height, width, channels = self.images.shape
        return height, width, channels


# Readers


def mnist5k(split: str = "train") -> Dataset:
    """The 5,000 real MNIST digits that come with the package, 28 x 28, 500 of each class.

    split "train" is the first 400 digits of each class in the order of the file (4,000), "test" the
    last 100 (1,000). Attribution: fastconv/datasets/README.md.
    """
    _check_split(split)
    with np.load(Path(__file__).parent / "datasets" / "mnist5k.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    position_in_class = np.arange(len(labels)) % 500  # the file is sorted by class
    chosen = position_in_class < 400 if split == "train" else position_in_class >= 400
    return Dataset(images[chosen], labels[chosen], DIGITS)


def mnist_idx(folder: Path_, split: str = "train") -> Dataset:
    """MNIST, or a data set of ten classes in its format such as Fashion-MNIST, from idx files.

    Looks in the folder for train-images-idx3-ubyte, train-labels-idx1-ubyte and the t10k- pair,
    with or without .gz.
    Raises FileNotFoundError for a missing file, ValueError for a malformed one.
    """
    _check_split(split)
    prefix = "train" if split == "train" else "t10k"
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte", f"{prefix}-labels.idx1-ubyte")
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels"
        )
    _check_labels(labels_path, labels, 10)
    return Dataset(images, labels.astype(np.int64), DIGITS)


def cifar10(folder: Path_, split: str = "train") -> Dataset:
    """CIFAR-10, binary version: data_batch_1.bin to data_batch_5.bin, or test_batch.bin.

    A record is a byte of label and 3,072 of pixels (3 x 32 x 32). The folder may be the one
    that holds cifar-10-batches-bin. Raises FileNotFoundError for a missing file, ValueError for a
    malformed one.
    """
    _check_split(split)
    folder = _inner_folder(folder, "cifar-10-batches-bin")
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = [_read_cifar(_find(folder, name), labels=1, column=0, classes=10) for name in names]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Dataset(images, labels, CIFAR10_CLASSES)


def cifar100(folder: Path_, split: str = "train", labels: str = "fine") -> Dataset:
    """CIFAR-100, binary version: train.bin or test.bin; 32 x 32 x 3.

    A record is a coarse label (20 classes), a fine label (100) and 3,072 bytes of pixels. The
    folder may be the one that holds cifar-100-binary. Raises FileNotFoundError for a missing file,
    ValueError for a malformed one.
    """
    _check_split(split)
    if labels not in ("fine", "coarse"):
        raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
    folder = _inner_folder(folder, "cifar-100-binary")
    column, count = (1, 100) if labels == "fine" else (0, 20)
    path = _find(folder, f"{split}.bin")
    images, targets = _read_cifar(path, labels=2, column=column, classes=count)
    return Dataset(images, targets, _class_names(folder / f"{labels}_label_names.txt", count))


def image_folder(folder: Path_, size: int | tuple[int, int], mode: str = "RGB") -> Dataset:
    """Images in one sub-folder a class, the classes in alphabetical order.

    Each image is converted to `mode` ("RGB", or "L" for grey), scaled (bilinear) to cover `size` =
    (height, width) and cropped at its centre. Files whose name ends like no image format are left
    out. Needs the `train` extra (pillow).
    Raises FileNotFoundError for a missing folder, ValueError for an empty class and for a file that
    is no image.
    """
    image_module, _ = _pillow()
    sides = (size, size) if isinstance(size, int) else size
    if min(sides) < 1 or mode not in ("RGB", "L"):
        raise ValueError(f"size must be positive and mode 'RGB' or 'L', got {size} and {mode!r}")
    known = image_module.registered_extensions()
    paths: list[Path] = []
    labels: list[int] = []
    classes = sorted(
        p for p in _existing_folder(folder).iterdir() if p.is_dir() and p.name[0] != "."
    )
    for label, class_folder in enumerate(classes):
        found = sorted(p for p in class_folder.iterdir() if p.suffix.lower() in known)
        if not found:
            raise ValueError(f"{class_folder}: no images in this class")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"{folder}: no sub-folders, expected one for each class")

    with ThreadPoolExecutor() as pool:  # pillow decodes without holding the GIL
        images = np.stack(list(pool.map(lambda path: read_image(path, sides, mode), paths)))
    return Dataset(images, np.array(labels, np.int64), tuple(p.name for p in classes))


def read_image(path: Path_, size: tuple[int, int], mode: str = "RGB") -> NDArray[np.uint8]:
    """An image file as uint8 [H, W, 3], or [H, W] for the mode "L".

    It is scaled (bilinear) to cover `size` = (height, width) and cropped at its centre. Needs the
    `train` extra (pillow). Raises FileNotFoundError, or ValueError for a file that is no image.
    """
    image_module, _ = _pillow()
    try:
        with image_module.open(path) as image:
            return _fitted(image.convert(mode), size)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def resized(dataset: Dataset, size: int) -> Dataset:
    """The data set with images of size x size, scaled as `image_folder` does; itself where it is.

    Needs the `train` extra (pillow) where there is something to do. Raises ValueError for a size
    below 1 and for images of neither one channel nor three.
    """
    if dataset.image_shape[:2] == (size, size):
        return dataset
    image_module, _ = _pillow()
    channels = dataset.image_shape[2]
    if size < 1 or channels not in (1, 3):
        raise ValueError(
            f"cannot scale images of {channels} channels to {size} x {size}: "
            "one channel or three, and a positive size, are needed"
        )

    def scale(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        picture = image_module.fromarray(image[..., 0] if channels == 1 else image)
        return _fitted(picture, (size, size)).reshape(size, size, channels)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(scale, dataset.images))
    shape = (len(images), size, size, channels)
    return Dataset(np.array(images, np.uint8).reshape(shape), dataset.labels, dataset.classes)


def _fitted(image: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A pillow image scaled to cover (height, width) and cropped at its centre."""
    image_module, image_ops = _pillow()
    fitted = image_ops.fit(image, size[::-1], image_module.Resampling.BILINEAR)
    return np.asarray(fitted, dtype=np.uint8)


NAMES = ("mnist5k", "mnist", "cifar10", "cifar100", "folder")


def load(
    name: str, split: str, folder: Path_ | None = None, image_size: int | None = None
) -> Dataset:
    """The data set called `name`, one of NAMES, as the command line knows them.

    Every one but mnist5k reads `folder`; "folder" reads its sub-folder train or test. Images are
    scaled to image_size x image_size; without it they keep their size, and those of "folder" get
    32 x 32.
    """
    if name == "folder" and folder is not None:
        _check_split(split)
        return image_folder(_existing_folder(folder) / split, image_size or 32)
    dataset = _load_as_it_is(name, split, folder)
    return dataset if image_size is None else resized(dataset, image_size)


def _load_as_it_is(name: str, split: str, folder: Path_ | None) -> Dataset:
    if name == "mnist5k":
        return mnist5k(split)
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(NAMES)}")
    if folder is None:
        raise ValueError(f"data set {name!r} is read from files: name their folder (--data-dir)")
    return {"mnist": mnist_idx, "cifar10": cifar10, "cifar100": cifar100}[name](folder, split)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")


def _existing_folder(folder: Path_) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    return path


def _inner_folder(folder: Path_, name: str) -> Path:
    """The folder itself, or the one that its archive unpacks to, when that lies in it."""
    path = _existing_folder(folder)
    return path / name if (path / name).is_dir() else path


def _find(folder: Path_, *names: str) -> Path:
    """The first of the names that exists in the folder, as it is or with .gz."""
    path = _existing_folder(folder)
    for name in names:
        for candidate in (path / name, path / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(f"{path / names[0]}: no such file")


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """An idx file of bytes: 0, 0, 8 (unsigned byte), number of axes, sizes as big-endian uint32."""
    content = _read_bytes(path)
    expected_magic = bytes([0, 0, 8, ndim])
    if content[:4] != expected_magic:
        raise ValueError(
            f"{path}: magic number 0x{content[:4].hex()}, expected 0x{expected_magic.hex()}"
        )
    header = 4 + 4 * ndim
    if len(content) < header:
        raise ValueError(f"{path}: {len(content)} bytes, the header alone has {header}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: {len(content)} bytes, but its header says {list(shape)}, {expected} bytes"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_cifar(
    path: Path, *, labels: int, column: int, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Records of `labels` bytes, of which `column` is wanted, and 3 planes of 32 x 32 pixels."""
    content = _read_bytes(path)
    record = labels + 3 * 32 * 32
    if not content or len(content) % record:
        raise ValueError(f"{path}: {len(content)} bytes, expected a multiple of {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    targets = records[:, column].astype(np.int64)
    _check_labels(path, targets, classes)
    planes = records[:, labels:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), targets


def _check_labels(path: Path, labels: NDArray[Any], classes: int) -> None:
    if labels.size and labels.max() >= classes:
        record = int(labels.argmax())
        raise ValueError(
            f"{path}: label {labels[record]} in record {record}, expected 0 to {classes - 1}"
        )


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    """One name a line, as the archive has them; the numbers where the file is missing."""
    if not path.is_file():
        return tuple(str(i) for i in range(count))
    names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if len(names) != count:
        raise ValueError(f"{path}: {len(names)} names of classes, expected {count}")
    return names


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs pillow: pip install 'fastconv[train]'") from error
    return Image, ImageOps


# Batches


def channel_statistics(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel over all images, in units of 255, each of length C.

    Sums of integers, so exact and the same on every machine. A channel without any variation gets
    std 1.
    """
    if not len(dataset):
        raise ValueError("statistics of an empty data set")
    channels = dataset.image_shape[2]
    histogram = np.zeros((channels, 256), np.int64)
    for start in range(0, len(dataset), 256):  # bincount widens to int64: a few images at a time
        part = dataset.images[start : start + 256]
        for c in range(channels):
            histogram[c] += np.bincount(part[..., c].ravel(), minlength=256)
    value = np.arange(256) / 255
    count = histogram.sum(axis=1)
    mean = histogram @ value / count
    std = np.sqrt(np.maximum(histogram @ value**2 / count - mean**2, 0))
    std[std == 0] = 1
    return tuple(mean.tolist()), tuple(std.tolist())


class DataLoader:
    """Batches of a data set: float32 [B, C, H, W] in channels-last memory, and int64 labels [B].

    shuffle       a new order for each epoch, from (seed, epoch)
    augmentation  what is done to the images at random; nothing when not given
    mean, std     of each channel in units of 255: pixels become (x / 255 - mean) / std;
                  0 and 1 when not given
    drop_last     leave out the last batch when it is not full
    prefetch      how many batches background threads prepare ahead; 0 prepares each when it is
                  asked for
    workers       the number of these threads
    rank          the process that this is, of the `processes` that share each batch of batch_size
                  images; it may get none of the last one
    micro_batch   share this many images at a time; all of a batch when not given

    What is random about an image depends on (seed, epoch, its index in the data set) alone.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 64,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        drop_last: bool = False,
        prefetch: int = 2,
        workers: int = 1,
        rank: int = 0,
        processes: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        if not 0 <= rank < processes:
            raise ValueError(f"expected 0 <= rank < processes, got {rank} and {processes}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("prefetch", prefetch, 0),
            ("workers", workers, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        channels = dataset.image_shape[2]
        mean = [0.0] * channels if mean is None else list(mean)
        std = [1.0] * channels if std is None else list(std)
        if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
            raise ValueError(
                f"mean and std must have {channels} values, std positive, got {mean} and {std}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augmentation = augmentation or Augmentation()
        self.drop_last = drop_last
        self.prefetch = prefetch
        self.workers = workers
        self.rank = rank
        self.processes = processes
        self.micro_batch = micro_batch or batch_size
        # (x / 255 - mean) / std = x * scale + shift, for one image as it lies in memory.
        pixels = dataset.image_shape[0] * dataset.image_shape[1]
        self._scale = np.tile(np.array([1 / (255 * s) for s in std], np.float32), pixels)
        self._shift = np.tile(
            np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32), pixels
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def shares(self, number: int) -> list[Share]:
        """Which rows of each micro-batch of batch `number` this process gets, one after another.

        As many as the other processes get, or one more or less.
        """
        total = min(self.batch_size, len(self.dataset) - number * self.batch_size)
        sizes = [
            min(self.micro_batch, total - first) for first in range(0, total, self.micro_batch)
        ]
        ends = [[n * r // self.processes for r in (self.rank, self.rank + 1)] for n in sizes]
        return [Share(start, stop, n) for (start, stop), n in zip(ends, sizes, strict=True)]

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch 0."""
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from number `start` on, as if those before had been taken."""
        order = self.order(epoch)
        numbers = range(start, len(self))
        if not self.prefetch:
            return (self._batch(order, epoch, k) for k in numbers)
        return self._prefetched(order, epoch, numbers)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of the images [N] in the order of this epoch."""
        indices = np.arange(len(self.dataset))
        if not self.shuffle:
            return indices
        return np.argsort(Draws(self.seed, epoch, indices).bits(ORDER), kind="stable")

    def _prefetched(
        self, order: NDArray[np.int64], epoch: int, numbers: range
    ) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="fastconv-data")
        pending: deque[Future[Batch]] = deque()
        try:
            for k in numbers:
                pending.append(pool.submit(self._batch, order, epoch, k))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the caller leaves its loop early
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, order: NDArray[np.int64], epoch: int, number: int) -> Batch:
        indices = self.indices(order, number)
        draws = Draws(self.seed, epoch, indices)
        images = self.augmentation.apply(self.dataset.images[indices], draws)
        rows = images.reshape(len(images), len(self._scale)).astype(np.float32)
        rows *= self._scale
        rows += self._shift
        pixels = rows.reshape(images.shape)
        self.augmentation.cut(pixels, draws)
        return pixels.transpose(0, 3, 1, 2), self.dataset.labels[indices]

    def indices(self, order: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Of the images in this process's part of batch `number`."""
        own = [
            number * self.batch_size + i * self.micro_batch + np.arange(share.start, share.stop)
            for i, share in enumerate(self.shares(number))
        ]
        return order[np.concatenate(own)]

    @property
    def scale_and_shift(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of each channel [C]: a normalised pixel is byte * scale + shift."""
        channels = self.dataset.image_shape[2]
        return self._scale[:channels], self._shift[:channels]


class ResidentLoader:
    """The batches of a DataLoader, made on a CUDA device from images that lie there as bytes.

    A batch is one small array, `picks`; `arrays` makes of it what the loader would have made, to
    the bit, with one kernel.

    loader  crops and mirrors its images at most, and is not shared by several processes
    dtype   of the pixels: numpy's, or "bfloat16"

    Raises ValueError for a loader that `why_not` gives a reason against.
    """

    def __init__(self, loader: DataLoader, dtype: Any = np.float32) -> None:
        reason = self.why_not(loader)
        if reason is not None:
            raise ValueError(f"the images cannot stay on the device: {reason}")
        self.loader = loader
        self._dtype = cuda.dtype_name(dtype)
        self._images = cuda.array(np.ascontiguousarray(loader.dataset.images))
        self._labels = cuda.array(np.ascontiguousarray(loader.dataset.labels))
        self._scale, self._shift = map(cuda.array, loader.scale_and_shift)

    @staticmethod
    def why_not(loader: DataLoader) -> str | None:
        """Why the images of this loader cannot stay on the device; None where they can."""
        if not loader.augmentation.only_moves:
            return "the kernel that makes a batch crops and mirrors, and has no other augmentation"
        needed, free = loader.dataset.images.nbytes, int(cuda.kernels().free_memory())
        if needed > free // 2:
            return f"they take {needed:,} bytes, more than half of the {free:,} that are free"
        return None

    def batches(
        self, epoch: int, start: int = 0
    ) -> Generator[tuple[NDArray[np.int64]], None, None]:
        """(picks,) of each batch of an epoch from number `start` on.

        picks  int64 [B, 4] of each image: index, top and left of its crop in the padded image,
               whether it is mirrored
        """
        order = self.loader.order(epoch)
        for number in range(start, len(self.loader)):
            indices = self.loader.indices(order, number)
            draws = Draws(self.loader.seed, epoch, indices)
            augmentation = self.loader.augmentation
            columns = (indices, *augmentation.places(draws), augmentation.mirrored(draws))
            yield (np.stack(columns, axis=1).astype(np.int64),)

    def arrays(self, picks: Any) -> tuple[Any, Any]:
        """Images [B, C, H, W] in channels-last memory and labels [B] of picks on the device."""
        x, y = cuda.kernels().gather_batch(
            self._images,
            self._labels,
            picks,
            self._scale,
            self._shift,
            self.loader.augmentation.crop_padding,
            self._dtype,
        )
        return x, y
