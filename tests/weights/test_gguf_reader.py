"""The GGUF reader: what sound files hold, and one typed error with the right names for every defect."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from tests.weights import gguf_bytes as raw
from tests.weights.gguf_bytes import Tensor, gguf

from moesaic.errors import CheckpointError, ModelNotFoundError, UnsupportedFormatError
from moesaic.quant import FORMATS, WeightFormat
from moesaic.weights import Checkpoint, open_checkpoint

F32, Q4_0, Q4_K = 0, 2, 12


def write(tmp_path: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_reads_what_the_reference_package_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((3, 5, 64), np.float32)
    blocks = reference.quants.quantize(matrix, reference.GGMLQuantizationType.Q8_0)
    writer = reference.GGUFWriter(tmp_path / "model.gguf", "test")
    writer.add_string("test.text", "héllo 世界")
    writer.add_uint32("test.number", 4_000_000_000)
    writer.add_int64("test.negative", -(1 << 40))
    writer.add_float32("test.real", 0.5)
    writer.add_bool("test.flag", True)
    writer.add_array("test.strings", ["a", "", "ccc"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_tensor("plain", matrix)
    writer.add_tensor("half", matrix.astype(np.float16))
    writer.add_tensor("blocks", blocks, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", matrix[0, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert isinstance(checkpoint, Checkpoint) and checkpoint.kind == "gguf"
    metadata = dict(checkpoint.metadata)
    assert metadata.pop("test.numbers").tolist() == [1, -2, 3]
    assert metadata == {
        "general.architecture": "test",
        "test.text": "héllo 世界",
        "test.number": 4_000_000_000,
        "test.negative": -(1 << 40),
        "test.real": 0.5,
        "test.flag": True,
        "test.strings": ("a", "", "ccc"),
    }
    info = checkpoint.tensors["blocks"]
    assert (info.format.name, info.shape, info.nbytes) == ("Q8_0", (3, 5, 64), 3 * 5 * 2 * 34)
    assert np.array_equal(checkpoint.raw("blocks"), blocks.reshape(15, 68))
    assert np.array_equal(checkpoint.raw("plain").view(np.float32), matrix.reshape(15, 64))
    assert checkpoint.raw("vector").shape == (1, 256)
    assert not checkpoint.raw("plain").flags.writeable and not checkpoint.raw("plain").flags.owndata
    view = checkpoint.raw("plain")
    checkpoint.release("plain")
    checkpoint.close()
    assert np.array_equal(view.view(np.float32), matrix.reshape(15, 64)), "views outlive release and close"
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.raw("plain")


def test_release_gives_pages_back(tmp_path: Path) -> None:
    def resident_file_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssFile")) * 1024

    size = 32 << 20
    data = np.ones(size, np.uint8).tobytes()
    path = write(tmp_path, gguf(tensors=[Tensor("big", (size // 4,), F32, 0)], data=data))
    checkpoint = open_checkpoint(path)
    before = resident_file_bytes()
    assert int(checkpoint.raw("big").max()) == 1
    touched = resident_file_bytes()
    assert touched - before > size * 0.9
    checkpoint.release("big")
    assert resident_file_bytes() - before < size * 0.1


def test_version_2_and_alignment(tmp_path: Path) -> None:
    keys = [raw.key("general.alignment", raw.U32, raw.scalar(raw.U32, 64))]
    tensors = [Tensor("a", (4,), F32, 0), Tensor("b", (4,), F32, 64)]
    content = gguf(keys, tensors, bytes(64) + struct.pack("<4f", 1, 2, 3, 4), version=2, alignment=64)
    checkpoint = open_checkpoint(write(tmp_path, content))
    assert checkpoint.raw("b").view(np.float32).tolist() == [[1, 2, 3, 4]]


def _u32(name: str, value: int) -> bytes:
    return raw.key(name, raw.U32, raw.scalar(raw.U32, value))


DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic": (gguf(magic=b"GGML"), "not a GGUF file"),
    "short": (b"GGU", "magic.*truncated"),
    "version 1": (gguf(version=1), "version 1: expected 2 or 3"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "tensor count": (gguf(num_tensors=1 << 63), f"declares {1 << 63} tensors"),
    "key count": (gguf(num_keys=1 << 62), f"{1 << 62} keys"),
    "fewer keys": (gguf(num_keys=5, alignment=1), "'key 0 of 5'.*truncated"),
    "fewer tensors": (gguf(num_tensors=3, alignment=1), "'tensor 0 of 3'.*truncated"),
    "key length": (gguf([struct.pack("<Q", 1 << 60)]), "string of"),
    "key twice": (gguf([_u32("a", 1), _u32("a", 2)]), "'a'.*appears twice"),
    "empty key": (gguf([_u32("", 1)]), "is empty"),
    "key not utf-8": (gguf([raw.key(b"\xff\xfe", raw.U32, bytes(4))]), "not UTF-8"),
    "text not utf-8": (gguf([raw.key("a", raw.STRING, raw.string(b"x\xc3"))]), "'a'.*not UTF-8"),
    "text too long": (gguf([raw.key("a", raw.STRING, struct.pack("<Q", 1 << 40))]), "'a'.*at most"),
    "value type": (gguf([raw.key("a", 13, bytes(8))]), "'a'.*unknown value type 13"),
    "boolean": (gguf([raw.key("a", raw.BOOL, b"\x02")]), "'a'.*boolean 2"),
    "array of booleans": (gguf([raw.key("a", raw.ARRAY, raw.array(raw.BOOL, [b"\x07"]))]), "'a'.*boolean"),
    "array count": (gguf([raw.key("a", raw.ARRAY, raw.array(raw.U8, [], 1 << 50))]), "'a'.*truncated"),
    "array overflow": (gguf([raw.key("a", raw.ARRAY, raw.array(raw.F64, [], (1 << 61) + 1))]), "'a'.*truncated"),
    "strings count": (gguf([raw.key("a", raw.ARRAY, raw.array(raw.STRING, [], 1 << 22))]), "'a'.*declares"),
    "nested arrays": (
        gguf([raw.key("a", raw.ARRAY, struct.pack("<IQ", raw.ARRAY, 1) * 8 + raw.array(raw.U8, [b"x"]))]),
        "'a'.*nests arrays",
    ),
    "alignment 0": (gguf([_u32("general.alignment", 0)]), "general.alignment.*power of two"),
    "alignment 24": (gguf([_u32("general.alignment", 24)]), "general.alignment.*24"),
    "alignment huge": (gguf([_u32("general.alignment", 1 << 31)]), "general.alignment"),
    "alignment text": (gguf([raw.key("general.alignment", raw.STRING, raw.string("32"))]), "general.alignment"),
    "no dimensions": (gguf(tensors=[Tensor("t", (), F32, 0)]), "'t'.*0 dimensions"),
    "many dimensions": (gguf(tensors=[Tensor("t", (1,), F32, 0, num_dims=1 << 31)]), "'t'.*dimensions"),
    "zero dimension": (gguf(tensors=[Tensor("t", (4, 0), F32, 0)]), "'t'.*none may be 0"),
    "tensor twice": (gguf(tensors=[Tensor("t", (4,), F32, 0)] * 2, data=bytes(64)), "'t'.*twice"),
    "no name": (gguf(tensors=[Tensor("", (4,), F32, 0)], data=bytes(64)), "has no name"),
    "product overflow": (
        gguf(tensors=[Tensor("t", (1 << 32, 1 << 32, 1 << 32), F32, 0)], data=bytes(64)),
        "'t'.*occupies",
    ),
    "offset unaligned": (gguf(tensors=[Tensor("t", (4,), F32, 8)], data=bytes(64)), "'t'.*multiple of 32"),
    "offset outside": (gguf(tensors=[Tensor("t", (4,), F32, 1 << 62)], data=bytes(64)), "'t'.*occupies"),
    "offset wraps": (gguf(tensors=[Tensor("t", (4,), F32, (1 << 64) - 32)], data=bytes(64)), "'t'.*occupies"),
    "data truncated": (gguf(tensors=[Tensor("t", (17,), F32, 0)], data=bytes(64)), "'t'.*68 bytes"),
    "overlap": (
        gguf(tensors=[Tensor("s", (16,), F32, 0), Tensor("t", (8,), F32, 32)], data=bytes(128)),
        "'t'.*overlaps the tensor 's'",
    ),
    "rows of blocks": (gguf(tensors=[Tensor("t", (100,), Q4_0, 0)], data=bytes(64)), "'t'.*multiple of 32"),
    "rows of super-blocks": (gguf(tensors=[Tensor("t", (320, 2), Q4_K, 0)], data=bytes(4096)), "'t'.*256"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects(defect: str, tmp_path: Path) -> None:
    content, message = DEFECTS[defect]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value), "the message names the file"


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.in_gguf], ids=lambda fmt: fmt.name)
def test_every_format_is_read_by_its_number(fmt: WeightFormat, tmp_path: Path) -> None:
    nbytes = fmt.nbytes(2, 512)
    raw = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
    path = write(tmp_path, gguf(tensors=[Tensor("t", (512, 2), fmt.ggml_type, 0)], data=raw.tobytes()))
    checkpoint = open_checkpoint(path)
    info = checkpoint.tensors["t"]
    assert (info.format, info.shape, info.nbytes) == (fmt, (2, 512), nbytes)
    assert np.array_equal(checkpoint.raw("t"), raw.reshape(2, -1))


@pytest.mark.parametrize(("kind", "name"), [(24, "I8"), (28, "F64"), (31, "unknown type"), (999, "unknown type")])
def test_formats_that_cannot_be_read_are_named(kind: int, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, gguf(tensors=[Tensor("blk.0.x", (256,), kind, 0)], data=bytes(2048)))
    with pytest.raises(UnsupportedFormatError, match=rf"model\.gguf.*blk\.0\.x.*{name}.*{kind}"):
        open_checkpoint(path)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        open_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError, match="neither safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(Path("/dev/zero"))


def _part(index: int, count: int, tensors: list[Tensor], number: int | None = None, total: int = 2) -> bytes:
    keys = [
        raw.key("split.no", raw.U16, raw.scalar(raw.U16, index - 1 if number is None else number)),
        raw.key("split.count", raw.U16, raw.scalar(raw.U16, count)),
        raw.key("split.tensors.count", raw.I32, raw.scalar(raw.I32, total)),
    ]
    return gguf(keys, tensors, struct.pack("<4f", *(index,) * 4) + bytes(16))


def test_split_models(tmp_path: Path) -> None:
    first = write(tmp_path, _part(1, 2, [Tensor("a", (4,), F32, 0)]), "m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*is missing"):
        open_checkpoint(first)
    second = write(tmp_path, _part(2, 2, [Tensor("b", (4,), F32, 0)]), "m-00002-of-00002.gguf")
    checkpoint = open_checkpoint(first)
    assert {name: checkpoint.raw(name).view(np.float32)[0, 0] for name in checkpoint.tensors} == {"a": 1, "b": 2}
    assert checkpoint.tensors["b"].file == second
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}, "a folder with one split model"
    with pytest.raises(CheckpointError, match="part 2 of a split model: open the first part"):
        open_checkpoint(second)

    write(tmp_path, _part(2, 2, [Tensor("b", (4,), F32, 0)], number=0), second.name)
    with pytest.raises(CheckpointError, match=r"says part 0 of 2.*expected part 1 of 2"):
        open_checkpoint(first)
    write(tmp_path, _part(2, 2, [Tensor("a", (4,), F32, 0)]), second.name)
    with pytest.raises(CheckpointError, match=r"'a'.*two parts"):
        open_checkpoint(first)
    write(tmp_path, _part(2, 2, []), second.name)
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count.*2.*parts hold 1"):
        open_checkpoint(first)


def test_a_renamed_part_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, _part(1, 3, [Tensor("a", (4,), F32, 0)]), "renamed.gguf")
    with pytest.raises(CheckpointError, match="keep the names"):
        open_checkpoint(path)
