"""Opens input: its file system, its files of lines whatever they are packed in; and says whether a file is still the same."""

import codecs
import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.pipeline.data.source import InputSpec
from sere.pipeline.runtime.storage import first_line, open_filesystem

# What stores and archives call that which changes with a file's content.
_TAGS = ("CRC", "ETag", "etag", "md5Hash", "Content-MD5", "LastModified", "Last-Modified", "mtime", "created")
# A file that is changed twice in as short a time may have one time for both: file systems count in steps.
_SETTLED_S = 2.0
_ARCHIVES = ("zip", "tar", "libarchive")


def open_input(spec: InputSpec) -> tuple[Any, str]:
    """The fsspec file system of input, and the path in it.

    Raises:
        ConfigError: if it cannot be opened.
    """
    try:
        return open_filesystem(spec.data, spec.storage_options)
    except ConfigError:
        raise
    except Exception as error:
        # Archives and caches open something at once, and every kind of storage has errors of its own.
        kind = spec.data.split("://", 1)[0]
        remedy = "check the path behind each '::', and its storage_options"
        if kind in _ARCHIVES and "::" not in spec.data:
            remedy = f"files in an archive are {kind}://GLOB::ARCHIVE, such as {kind}://*.jsonl::/data/a.{kind}"
        raise ConfigError(f"{mask_uri(spec.data)} cannot be opened ({mask_uri(first_line(error))}): {remedy}") from error


@contextmanager
def open_lines(spec: InputSpec, path: str) -> Iterator[io.TextIOWrapper]:
    """A file of lines as text: bytes that are not UTF-8 as `surrogateescape` decodes them.

    Raises:
        UnicodeError: while it is read, if it is UTF-16 that is none.
    """
    filesystem, _ = open_input(spec)
    zstd = path.endswith(".zst")
    with filesystem.open(path, "rb", compression=None if zstd else "infer") as opened:
        # fsspec needs one more package for zstd; pyarrow does not.
        raw = io.BufferedReader(pa.CompressedInputStream(opened, "zstd") if zstd else opened)
        encoding = _encoding(raw.peek(1024)[:1024])
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        with io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="") as lines:
            yield lines


@contextmanager
def open_parquet(spec: InputSpec, path: str, unit: str) -> Iterator[pq.ParquetFile]:
    """A parquet file.

    Args:
        spec: What it is a part of.
        path: In the file system.
        unit: Of timestamps of 96 bits, as Spark and Hive write them.
    """
    filesystem, _ = open_input(spec)
    with filesystem.open(path, "rb") as opened, pq.ParquetFile(opened, coerce_int96_timestamp_unit=unit) as parquet:
        yield parquet


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError("it is UTF-32: iconv -f UTF-32 -t UTF-8 converts it")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a mark: every other byte of what is mostly ASCII is zero, which is in no text in UTF-8.
    for encoding, zeros, others in (("utf-16-le", head[1::2], head[0::2]), ("utf-16-be", head[0::2], head[1::2])):
        if len(others) > 1 and zeros.count(0) > len(zeros) / 2 and others.count(0) < len(others) / 10:
            return encoding
    return "utf-8-sig"


def fingerprint_of(filesystem: Any, path: str) -> str:
    """Of a local file's bytes; of what a store says changes with them."""
    if not _is_local(filesystem):
        return _said(filesystem, path)
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stamp_of(filesystem: Any, path: str) -> str:
    """What changes with a file's contents, without reading it; "" for a local file that is too new to be told from its next."""
    if not _is_local(filesystem):
        return _said(filesystem, path)
    found = os.stat(path)
    settled = time.time() - found.st_mtime > _SETTLED_S
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns" if settled else ""


def _said(filesystem: Any, path: str) -> str:
    # fsspec's `ukey` covers all that a store says, which is more when a file is asked for than when its folder is listed.
    info = filesystem.info(path)
    tag = next((info[name] for name in _TAGS if info.get(name) not in (None, "")), None)
    return f"{info.get('size')} bytes, {tag}" if tag else str(filesystem.ukey(path))


def _is_local(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)
