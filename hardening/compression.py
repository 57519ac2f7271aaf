"""Compressed messages and results, inflated to a bounded size.

What Celery lacks: kombu inflates data before anything is checked, and 1.5 MB can become gigabytes, in the worker
and in the next one that gets the message.
What this does: the same compression methods refuse anything that inflates to more than LIMIT.
To go back: leave out the import in __init__.py. For kombu 5.7.
"""

from collections.abc import Callable
from typing import Any

from kombu import compression
from kombu.exceptions import DecodeError

LIMIT = 64 * 2**20  # bytes; Celery's own messages are far smaller than RabbitMQ's limit of 16 MB


def _bounded(decompressor: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Return a decoder from one of Python's decompressor objects."""

    def inflate(data: bytes) -> bytes:
        stream = decompressor()
        try:
            content: bytes = stream.decompress(data, LIMIT)
        except Exception as exc:  # each method has its own
            raise DecodeError(f"cannot be decompressed: {exc}") from exc
        if not stream.eof:
            raise DecodeError(f"cannot be decompressed, or to more than {LIMIT >> 20} MB only")
        return content

    return inflate


def _bounded_brotli(brotli: Any) -> Callable[[bytes], bytes]:
    def inflate(data: bytes) -> bytes:
        stream = brotli.Decompressor()
        try:
            content: bytes = stream.process(data, output_buffer_limit=LIMIT)
        except Exception as exc:  # also a Brotli before 1.2, which knows no limit
            raise DecodeError(f"cannot be decompressed: {exc}") from exc
        if not stream.is_finished():
            raise DecodeError(f"cannot be decompressed, or to more than {LIMIT >> 20} MB only")
        return content

    return inflate


def _bound_all() -> None:
    """Replace each decoder that this kombu has. One that is not known here stays as it is."""
    import bz2
    import lzma
    import zlib

    known: dict[str, Callable[[bytes], bytes]] = {
        "application/x-gzip": _bounded(zlib.decompressobj),
        "application/x-bz2": _bounded(bz2.BZ2Decompressor),
        "application/x-lzma": _bounded(lzma.LZMADecompressor),
    }
    if zstd := getattr(compression, "zstd", None):
        known["application/zstd"] = _bounded(zstd.ZstdDecompressor)
    if brotli := getattr(compression, "brotli", None):
        known["application/x-brotli"] = _bounded_brotli(brotli)
    encoders: Any = compression
    for kind in compression.encoders():
        if kind in known:
            compression.register(encoders.get_encoder(kind)[0], known[kind], kind)


_bound_all()
