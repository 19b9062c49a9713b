"""The native kernels give the words of the portable code and of plain integers, however built."""

import ctypes
import functools
import math
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chacha20 import CHUNK, reference_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax import native
from lpgan_jax.mpc.prng import key
from lpgan_jax.ring import Convolution, matmul
from lpgan_jax.ring.contraction import Axis, Contraction, contract
from lpgan_jax.ring.matmul import matmul_portable

COMPILER = next(filter(None, map(shutil.which, native._COMPILERS)), None)
AVAILABLE = native.available  # which the fixture `build` replaces


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


# Builds -------------------------------------------------------------------------------------------

# Whatever the processor, its tests meet the code for lesser ones too: flags in place of the last
# optimisation and architecture, and what the processor must have.
COMMON = ("-std=c++17", "-fPIC", "-shared", "-w")
BUILDS = {
    "as is": (native._FLAGS, ""),
    "AVX-512": ((*native._FLAGS, "-mno-amx-int8"), "amx_int8"),
    "AVX2": ((*COMMON, "-O2", "-mavx2"), "avx2"),
    "baseline": ((*COMMON, "-O1"), ""),
}


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """The kernels of one build take the place of the installed ones."""
    flags, needed = BUILDS[request.param]
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if needed not in native._processor().split() and needed:
        pytest.skip(f"the processor has no {needed}")
    names = {name: f"{name}_{request.param}" for name in (native.RING_PRODUCT, native.CHACHA20)}
    with mock.patch.object(native, "_FLAGS", flags):
        library = ctypes.CDLL(str(native._built(COMPILER, tmp_path_factory.mktemp("cache"))))
    for symbol, name in names.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    with mock.patch.multiple(
        native,
        RING_PRODUCT=names[native.RING_PRODUCT],
        CHACHA20=names[native.CHACHA20],
        available=lambda: True,
    ):
        yield request.param


def with_kernels(function, *operands):
    """The result of a function, compiled with the kernels."""
    compiled = jax.jit(lambda *operands: function(*operands)).lower(*operands)
    assert any(name in compiled.as_text() for name in (native.RING_PRODUCT, native.CHACHA20))
    return compiled.compile()(*operands)


def without(function, *operands):
    """Compiled without them."""
    with mock.patch.object(native, "available", return_value=False):
        compiled = jax.jit(lambda *operands: function(*operands)).lower(*operands)
    assert "lpgan_" not in compiled.as_text()
    return compiled.compile()(*operands)


# Ring products ------------------------------------------------------------------------------------


def words(seed, shape, dtype=np.uint64):
    """Uniform words; a quarter of them with the least or the most of all digits."""
    rng, bits = np.random.default_rng(seed), 8 * np.dtype(dtype).itemsize
    digits = [int.from_bytes((bits // 8 - 1) * d + last) for d, last in EDGES]
    edges = np.array([0, 1, 2 ** (bits - 1), 2**bits - 1, *digits], dtype)
    uniform = rng.integers(0, 2**bits, shape, dtype)
    return np.where(rng.integers(0, 4, shape) == 0, rng.choice(edges, shape), uniform)


EDGES = [(b"\x7f", b"\x80"), (b"\x80", b"\x80")]  # digits of -128 after a carry, and without


@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (9, 1030, 3),  # few columns, in two passes over K
        (3, 1030, 41),  # few rows
        (5, 300, 5),
        (70, 7, 40),
        (33, 300, 300),  # columns in two blocks
        (300, 520, 70),  # digits: more rows than columns, two passes over K
        (70, 1030, 300),  # more columns than rows, three passes
        (330, 64, 270),  # more columns than stay in cache
        (270, 65, 330),
        (512, 512, 64),
    ],
    ids=str,
)
def test_every_way_to_multiply_matrices(build, shape, dtype):
    m, k, n = shape
    a, b = words(1, (m, k), dtype), words(2, (k, n), dtype)
    product = with_kernels(matmul, a, b)
    np.testing.assert_array_equal(product, a @ b)  # NumPy's words wrap
    for i in range(0, min(m, n), 50):
        exact = sum(int(x) * int(y) for x, y in zip(a[i], b[:, i], strict=True))
        assert int(product[i, i]) == exact % 2 ** (8 * a.itemsize)


def test_every_way_to_multiply_matrices_in_a_batch(build):
    """A batch over one operand makes a larger product of it; over both, several starts."""
    shapes = [(3, 1030, 41), (70, 30, 40), (9, 600, 70)]
    for m, k, n in shapes:
        a, b = words(3, (2, m, k)), words(4, (2, k, n))
        np.testing.assert_array_equal(with_kernels(jax.vmap(matmul), a, b), a @ b)
        np.testing.assert_array_equal(with_kernels(jax.vmap(matmul, (0, None)), a, b[0]), a @ b[0])
        np.testing.assert_array_equal(with_kernels(jax.vmap(matmul, (None, 0)), a[0], b), a[0] @ b)


@dataclass(frozen=True)
class Case:
    """A contraction and the shapes of its operands."""

    contraction: Contraction
    a: tuple[int, ...]
    b: tuple[int, ...]

    @functools.cached_property
    def addresses(self):
        """Words of padded a [start, m, k], of b [start, k, n] and of the result [start, m, n]."""
        c = self.contraction

        def walk(axes, array):
            offsets = np.zeros(1, np.int64)
            for axis in axes:
                steps = np.arange(axis.size) * axis.strides[array]
                offsets = (offsets[:, None] + steps).reshape(-1)
            return offsets

        def view(array, down, across):
            starts = np.array([start[array] for start in c.starts])
            return starts[:, None, None] + down[:, None] + across

        return (
            view(0, walk(c.rows, 0), walk(c.inner, 0)),
            view(1, walk(c.inner, 1), walk(c.columns, 0)),
            view(2, walk(c.rows, 1), walk(c.columns, 1)),
        )

    def portable(self, a, b):
        """The product in JAX, by gathers."""
        at_a, at_b, at_out = self.addresses
        a = jnp.pad(a, self.contraction.padding) if self.contraction.padding else a
        parts = jax.vmap(matmul_portable)(a.reshape(-1)[at_a], b.reshape(-1)[at_b])
        out = jnp.zeros(math.prod(self.contraction.shape), a.dtype)
        return out.at[at_out.reshape(-1)].set(parts.reshape(-1)).reshape(self.contraction.shape)

    def exact(self, a, b):
        """The product in Python integers."""
        at_a, at_b, at_out = self.addresses
        a = np.pad(a, self.contraction.padding) if self.contraction.padding else a
        dtype, ring = a.dtype, 2 ** (8 * a.itemsize)
        a, b = a.reshape(-1).astype(object), b.reshape(-1).astype(object)
        out = np.full(math.prod(self.contraction.shape), None)
        for one_a, one_b, one_out in zip(at_a, at_b, at_out, strict=True):
            out[one_out] = a[one_a] @ b[one_b] % ring
        return out.astype(dtype).reshape(self.contraction.shape)

    def __call__(self, a, b):
        return contract(a, b, self.contraction, self.portable)


@dataclass(frozen=True)
class Dimension:
    """How an axis of a view walks along a dimension of an array: some of it, either way."""

    size: int
    step: int
    slack: int  # elements of the dimension that one walk leaves at its ends

    @property
    def length(self):
        return (self.size - 1) * abs(self.step) + 1 + self.slack

    def first(self, skipped):
        return skipped if self.step > 0 else self.length - 1 - self.slack + skipped


@st.composite
def cases(draw):
    """Views of arrays with a dimension for each of their axes, in any order."""
    sizes = st.sampled_from([1, 2, 3, 5])
    groups = [draw(st.lists(sizes, max_size=2)) for _ in range(3)]
    groups[draw(st.integers(0, 2))].append(draw(st.sampled_from([1, 8, 40, 72])))
    rows, inner, columns = groups
    starts = draw(st.integers(1, 3))

    def array(sizes, steps, most_slack):
        """Dimensions of the axes, and the strides of these in an array of them in some order."""
        axes = [
            Dimension(n, draw(st.sampled_from(steps)), draw(st.integers(0, most_slack)))
            for n in sizes
        ]
        order = draw(st.permutations(range(len(axes))))
        lengths = [axes[i].length for i in order]
        words = [1, *accumulate(reversed(lengths), lambda x, y: x * y)]
        unit = dict(zip(order, reversed(words[:-1]), strict=True))
        strides = [axes[i].step * unit[i] for i in range(len(axes))]
        numbered = list(enumerate(axes))
        firsts = [
            sum(axis.first(draw(st.integers(0, axis.slack))) * unit[i] for i, axis in numbered)
            for _ in range(starts)
        ]
        return lengths, strides, firsts

    a_shape, a_strides, a_firsts = array([*rows, *inner], [1, 1, 2, -1], 2)
    b_shape, b_strides, b_firsts = array([*inner, *columns], [1, 1, 2, -1], 1)
    one_shape, out_strides, out_firsts = array([*rows, *columns], [1, 1, -1], 0)
    out_firsts = [first + i * math.prod(one_shape) for i, first in enumerate(out_firsts)]
    margins = [draw(st.tuples(st.integers(0, 1), st.integers(0, 1))) for _ in a_shape]
    margins = [m if n > sum(m) else (0, 0) for n, m in zip(a_shape, margins, strict=True)]
    padded = draw(st.booleans())

    def axes(sizes, first, second):
        return tuple(Axis(n, (p, q)) for n, p, q in zip(sizes, first, second, strict=True))

    r, k = len(rows), len(inner)
    contraction = Contraction(
        rows=axes(rows, a_strides[:r], out_strides[:r]),
        inner=axes(inner, a_strides[r:], b_strides[:k]),
        columns=axes(columns, b_strides[k:], out_strides[r:]),
        shape=(starts, *one_shape),
        starts=tuple(zip(a_firsts, b_firsts, out_firsts, strict=True)),
        padding=tuple(margins) if padded else (),
    )
    removed = [sum(m) if padded else 0 for m in margins]
    return Case(
        contraction,
        tuple(n - m for n, m in zip(a_shape, removed, strict=True)),
        tuple(b_shape),
    )


@settings(max_examples=12, deadline=None)
@given(
    case=cases(),
    seed=st.integers(0, 2**32),
    batched=st.sampled_from(["", "a", "b", "ab"]),
    dtype=st.sampled_from([np.uint64, np.uint32]),
)
def test_any_views(build, case, seed, batched, dtype):
    a = words(seed, (2, *case.a) if "a" in batched else case.a, dtype)
    b = words(seed + 1, (2, *case.b) if "b" in batched else case.b, dtype)
    if batched:
        function = jax.vmap(case, tuple(0 if name in batched else None for name in "ab"))
        pairs = [(a[i] if "a" in batched else a, b[i] if "b" in batched else b) for i in range(2)]
        exact = np.stack([case.exact(*pair) for pair in pairs])
    else:
        function, exact = case, case.exact(a, b)
    np.testing.assert_array_equal(with_kernels(function, a, b), exact)
    np.testing.assert_array_equal(without(function, a, b), exact)


# Strides, padding, the sizes of image and kernel, channels, features: the network's own, with
# enough channels for digits; and odd ones.
CONVOLUTIONS = [
    ((2, 2), ((1, 1), (1, 1)), (8, 8), (4, 4), 16, 40),
    ((1, 1), ((0, 0), (0, 0)), (3, 4), (2, 3), 3, 2),
    ((1, 2), ((2, 0), (0, 1)), (5, 7), (3, 2), 1, 17),
    ((2, 3), ((0, 3), (1, 1)), (4, 6), (4, 3), 9, 8),
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolutions(build, geometry):
    strides, padding, input_hw, kernel_hw, channels, features = geometry
    images, kernels, once = (0, 3, 1, 2), (3, 2, 0, 1), (1, 1)  # NHWC, HWIO
    conv = Convolution(images, kernels, images, strides, padding, once, once)
    x = words(5, (3, *input_hw, channels))
    w = words(6, (*kernel_hw, channels, features))
    dy = words(7, conv.shape(x.shape, w.shape))
    of_x = Convolution(images, (2, 3, 0, 1), images, once, ((2, 2), (2, 1)), strides, once)
    of_w = Convolution((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1), once, padding, once, strides)

    def maps(x, w, dy):
        return conv(x, w), of_x(dy, w), of_w(x, dy)

    for result, expected in zip(with_kernels(maps, x, w, dy), without(maps, x, w, dy), strict=True):
        np.testing.assert_array_equal(result, expected)


# ChaCha20 -----------------------------------------------------------------------------------------


def bits(width, size):
    return lambda keys: jax.vmap(lambda k: jax.random.bits(k, (size,), f"uint{width}"))(keys)


@functools.cache
def expected_bits(width, size, batch):
    """What the portable code draws; where that is quick, compared with RFC 8439 in plain Python."""
    keys = jax.random.split(key(1), batch)
    drawn = np.asarray(without(bits(width, size), keys))
    if width == 64 or size < 1000:
        for k, own in zip(keys, drawn, strict=True):
            np.testing.assert_array_equal(own, reference_bits(k, width, size))
    return drawn


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_chacha20(build, width):
    chunk = CHUNK * 512 // max(width, 32) * max(32 // width, 1)  # words of this width
    sizes = [(1, 1), (3, 517), (1, chunk + 1)]
    if width >= 32:
        sizes += [(1, chunk), (1, chunk - 1), (1, 2 * chunk - 7), (2, 3 * chunk + 129)]
    for batch, size in sizes:
        drawn = with_kernels(bits(width, size), jax.random.split(key(1), batch))
        np.testing.assert_array_equal(drawn, expected_bits(width, size, batch))


# Which code runs ----------------------------------------------------------------------------------

SCRIPT = """
import hashlib, jax, numpy as np
from lpgan_jax import key, native
from lpgan_jax.ring import matmul

native._FLAGS = (*native._FLAGS, "-O1")  # built sooner
a, b = (jax.random.bits(key(i), shape, np.uint64) for i, shape in enumerate([(70, 90), (90, 50)]))
drawn = jax.random.bits(key(2), (9000,), np.uint64)
words = b"".join(np.asarray(x).tobytes() for x in (a, b, matmul(a, b), drawn))
print(native.available(), hashlib.sha256(words).hexdigest())
"""


def started(**environment):
    """A process that runs the script."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process):
    """(whether it had the kernels, a hash of what it computed, what it logged)."""
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    native, digest = out.split()
    return native == "True", digest, log


@pytest.fixture
def failing_compiler(tmp_path):
    """A folder with a compiler that fails, in an encoding of its own."""
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_bytes(b"#!/bin/sh\nprintf 'no such flag \\351\\377' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return str(compiler.parent)


def test_the_portable_code_runs_where_kernels_cannot(tmp_path, failing_compiler):
    """And two processes that build at once leave one whole library; all compute the same."""
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [
        started(LPGAN_NATIVE="0"),
        started(PATH=str(tmp_path)),
        started(PATH=failing_compiler, **cache),
    ]
    results = [printed(process) for process in processes]
    assert not any(built for built, *_ in results)
    assert "no such flag" in results[2][2]
    if COMPILER is not None:
        both = [printed(process) for process in [started(**cache), started(**cache)]]
        assert all(built for built, *_ in both)
        (library,) = (tmp_path / "cache" / "lpgan_jax" / "native").iterdir()
        assert library.suffix == ".so"
        results += both
    assert len({digest for _, digest, _ in results}) == 1


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("missing", ["folder", "home"])
def test_no_place_for_the_library(missing, monkeypatch, caplog, tmp_path):
    if missing == "folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    assert not AVAILABLE.__wrapped__()
    assert "the portable code runs" in caplog.text
