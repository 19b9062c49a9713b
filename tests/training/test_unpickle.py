import copyreg
import pickle
import struct
from pickletools import opcodes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax.training.unpickle import Bytes, unpickle

ARRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)
VALUES = {b"data": ARRAY, b"labels": [3, 9], b"file": [b"a.png", "b"], b"more": (None, True, -7)}


def text(data):
    """A short text as Python 2 writes it."""
    return b"U" + bytes([len(data)]) + data


def python2(shape, fortran, content):
    """A dict with an array, instruction by instruction as Python 2 wrote CIFAR-10's batches."""
    rows, columns = (b"K" + bytes([n]) for n in shape)
    return (
        b"\x80\x02}q\x01(" + text(b"labels") + b"q\x02]q\x03(K\x03K\x09e" + text(b"data") + b"q\x04"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85"
        + text(b"b") + b"\x87Rq\x07(K\x01" + rows + columns + b"\x86cnumpy\ndtype\nq\x08"
        + text(b"u1") + b"K\x00K\x01\x87Rq\x09(K\x03" + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + fortran
        + b"T" + struct.pack("<I", len(content)) + content + b"tbu."
    )  # fmt: skip


def assert_like(found, wanted):
    assert type(found) is (Bytes if isinstance(wanted, np.ndarray) else type(wanted))
    match found:
        case Bytes():
            assert found.values.dtype == np.uint8
            np.testing.assert_array_equal(found.values, wanted)
        case dict():
            assert list(found) == list(wanted)
            for key in wanted:
                assert_like(found[key], wanted[key])
        case list() | tuple():
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                assert_like(one, other)
        case _:
            assert found == wanted


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_python_3_writes(protocol):
    assert_like(unpickle(pickle.dumps(VALUES, protocol)), VALUES)
    columns = np.asfortranarray(ARRAY)
    assert_like(unpickle(pickle.dumps(columns, protocol)), ARRAY)


def test_what_python_2_writes():
    for fortran, order in ((b"\x89", "C"), (b"\x88", "F")):
        data = python2((2, 3), fortran, ARRAY.tobytes(order))
        theirs = pickle.loads(data, encoding="bytes")
        np.testing.assert_array_equal(theirs[b"data"], ARRAY)  # so it is a pickle as Python has it
        assert_like(unpickle(data), {b"labels": [3, 9], b"data": ARRAY})


class Calls:
    def __init__(self, function, *arguments):
        self.made = (function, arguments)

    def __reduce__(self):
        return self.made


class Slots:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(exec, "raise SystemExit"), "refused to load __builtin__.exec"),
        (Calls(np.load, "/etc/passwd", None, True), "refused to load numpy.load"),
        (np.dtype, None),
        (np.dtype("O"), "not of uint8"),
        (np.dtype("u1"), None),
        (Calls(np.dtype, "u1", False, True, {}), "not of uint8"),
        (np.zeros((2, 3), ">u2"), "not of uint8"),
        (np.zeros((2, 3), np.int8), "not of uint8"),
        (np.zeros((2, 3, 4), np.uint8), "none of an array"),
        (np.zeros((0, 3), np.uint8), "refused to load __builtin__.bytes"),
        (np.array([[{}]]), "not of uint8"),
        (np.uint8(3), "refused to load numpy"),
        (Slots(), "refused to load"),
        ({1, 2}, "refused to load __builtin__.set"),
        ({1: 2}, "a key that is no text"),
        ({(): 2}, "a key that is no text"),
        (1.5, "the instruction BINFLOAT"),
        (2**70, None),
    ],
)
def test_other_values(value, message):
    data = pickle.dumps(value, protocol=2)
    if message is None:
        unpickle(data)  # it is harmless, whatever it is
    else:
        with pytest.raises(ValueError, match=message):
            unpickle(data)


LOAD = b"cnumpy\ndtype\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "pickle exhausted"),
        (b".", "damaged"),
        (b"N", "pickle exhausted"),
        (b"(.", "damaged"),
        (b"]t.", "damaged"),
        (b"h\x00.", "damaged"),
        (b"K\x01R.", "damaged"),
        (b"K\x01\x85.", None),
        (b"K\x01\x86.", None),
        (b"NK\x01a.", "no list"),
        (b"NK\x01K\x02s.", "no dict"),
        (b"}(K\x01u.", "no dict"),
        (b"NNb.", "a state that is none"),
        (LOAD + b"}b.", "a state that is none"),
        (LOAD + b"(U\x02u1K\x00K\x01tR}b.", "a state that is none"),
        (LOAD + b")\x81.", "the instruction NEWOBJ"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"\x83\x01\x01.", "the instruction EXT2"),
        (b"\x84\x01\x01\x01\x01.", "the instruction EXT4"),
        (b"S'\\d'\n.", "the instruction STRING"),
        (b"Pname\n.", "the instruction PERSID"),
        (b"NQ.", "the instruction BINPERSID"),
        (b"(inumpy\ndtype\n.", "the instruction INST"),
        (b"(" + LOAD + b"o.", "the instruction OBJ"),
        (b"\x8c\x05numpy\x8c\x05dtype\x93.", None),
        (b"\x8c\x05numpyK\x01\x93.", "a name that is no text"),
        (b"\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "refused to load numpy.dtype.__init__"),
        (b"c_codecs\nencode\nU\x01aU\x06latin1\x86R.", "a call that makes no array"),
        (b"T\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    ],
)
def test_other_programs(code, message):
    data = b"\x80\x02" + code
    if message is None:
        unpickle(data)
    else:
        with pytest.raises(ValueError, match=message):
            unpickle(data)


def test_registered_extensions_are_not_loaded(monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("builtins", "exec"))
    with pytest.raises(ValueError, match="EXT1"):
        unpickle(b"\x80\x02\x82\x01.")


def test_small_files_stay_small():
    long = b"X" + struct.pack("<I", 2**20) + bytes(2**20)
    encode = b"c_codecs\nencode\nh\x00h\x01\x86R"
    data = b"\x80\x02" + long + b"q\x00" + b"X\6\0\0\0latin1q\x01" + 100 * encode + b"."
    with pytest.raises(ValueError, match="more bytes than the file has"):
        unpickle(data)
    with pytest.raises(ValueError, match="more than 1000000 instructions"):
        unpickle(b"\x80\x02" + b"]" * 10**6 + b".")
    # Each tuple has the one before twice: to hash, compare or print the last takes for ever.
    twice = b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(100))
    with pytest.raises(ValueError, match="a key that is no text"):
        unpickle(b"\x80\x02}" + twice + b"Ns.")
    with pytest.raises(ValueError, match="makes no array"):
        unpickle(b"\x80\x02" + LOAD.replace(b"dtype", b"ndarray") + twice + b"R.")


NAMES = st.sampled_from([op.code.encode("latin-1") for op in opcodes])


@settings(max_examples=400)
@given(st.data())
def test_damaged_pickles(data):
    start = data.draw(st.sampled_from([python2((2, 3), b"\x89", ARRAY.tobytes())] +
                      [pickle.dumps(VALUES, protocol) for protocol in (2, 3, 4)]))  # fmt: skip
    content = bytearray(start)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["cut", "byte", "instruction", "insert", "repeat"])):
            case "cut":
                del content[at : at + data.draw(st.integers(1, 30))]
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "instruction":
                content[at : at + 1] = data.draw(NAMES)
            case "insert":
                content[at:at] = data.draw(NAMES) + data.draw(st.binary(max_size=6))
            case _:
                content[at:at] = content[at : at + 40]
        if not content:
            return
    try:
        found = unpickle(bytes(content))
    except ValueError:
        return
    if isinstance(found, dict):
        for value in found.values():
            if isinstance(value, Bytes) and value.values is not None:
                assert value.values.dtype == np.uint8
                assert value.values.ndim == 2
                assert value.values.sum() >= 0  # each byte can be read
